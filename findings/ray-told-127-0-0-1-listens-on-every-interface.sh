#!/usr/bin/env bash
# ray 2.60.0: ray.init(_node_ip_address="127.0.0.1") is taken for "no address given": Ray puts the machine's own address in
# its place, and its servers (GCS, raylet, workers) listen on every interface, without a password, for whoever can reach
# the machine to run code there. Any other loopback address (127.0.0.2) changes the name, not what is listened on.
# The way round: RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 before the import, a switch for systems where several machines are
# not supported; on Linux too it makes 127.0.0.1 the node's address, and all of Ray then listens there alone.
#
# Output seen:
#   ray 2.60.0
#   told 127.0.0.1: node at 127.0.0.1: False, servers on loopback alone: False
#   with the switch: node at 127.0.0.1: True, servers on loopback alone: True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "ray==2.60.0" "psutil==7.2.2"
cat > "$folder/listen.py" <<'PY'
import os
import sys

import psutil

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
if sys.argv[1] == "with the switch":
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
import ray

told = {} if sys.argv[1] == "with the switch" else {"_node_ip_address": "127.0.0.1"}
ray.init(address="local", num_cpus=1, include_dashboard=False, logging_level="ERROR", log_to_driver=False, **told)
own = [psutil.Process(), *psutil.Process().children(recursive=True)]
places = {c.laddr.ip for p in own for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN}
(node,) = ray.nodes()
local = node["NodeManagerAddress"] == "127.0.0.1"
alone = places <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
if sys.argv[1] != "with the switch":
    print("ray", ray.__version__)
print(f"{sys.argv[1]}: node at 127.0.0.1: {local}, servers on loopback alone: {alone}")
ray.shutdown()
assert local == alone == (sys.argv[1] == "with the switch"), "Ray does something else now"
PY
"$folder/venv/bin/python" "$folder/listen.py" "told 127.0.0.1" 2>"$folder/err" || { cat "$folder/err"; exit 1; }
"$folder/venv/bin/python" "$folder/listen.py" "with the switch" 2>"$folder/err" || { cat "$folder/err"; exit 1; }
