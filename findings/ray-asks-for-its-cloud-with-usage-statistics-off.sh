#!/usr/bin/env bash
# ray 2.60.0: with RAY_USAGE_STATS_ENABLED=0 and include_dashboard=False a Ray that starts still sends HTTP requests to the
# metadata addresses of three clouds (169.254.169.254 and metadata.google.internal), to find out for its usage report
# where it runs; the report is then not made. UsageStatsHead.run asks before it looks whether statistics are on. On a
# machine that may speak to nobody these are alarms, or seconds of waiting for answers that do not come.
# The way round: a proxy on loopback that nobody serves (HTTP_PROXY), with NO_PROXY for loopback, while Ray starts.
# Here a proxy on loopback takes the requests down, so that none leaves the machine.
#
# Output seen:
#   ray 2.60.0, usage statistics enabled: False
#   asked for http://169.254.169.254/latest/meta-data/
#   asked for http://169.254.169.254/metadata/instance?api-version=2021-12-13
#   asked for http://metadata.google.internal/computeMetadata/v1
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "ray==2.60.0"
"$folder/venv/bin/python" - 2>"$folder/err" <<'PY' || { cat "$folder/err"; exit 1; }
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

asked = set()


class Proxy(BaseHTTPRequestHandler):
    def do_GET(self):
        asked.add(self.path)
        self.send_error(404)


server = HTTPServer(("127.0.0.1", 0), Proxy)
threading.Thread(target=server.serve_forever, daemon=True).start()
proxy = f"http://127.0.0.1:{server.server_port}"
os.environ |= {"HTTP_PROXY": proxy, "http_proxy": proxy, "NO_PROXY": "127.0.0.1,localhost"}
os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
import ray
from ray._common.usage.usage_lib import usage_stats_enabled

ray.init(address="local", num_cpus=1, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
deadline = time.monotonic() + 60
while len(asked) < 3 and time.monotonic() < deadline:
    time.sleep(0.1)
ray.shutdown()
print(f"ray {ray.__version__}, usage statistics enabled: {usage_stats_enabled()}")
print(*(f"asked for {path}" for path in sorted(asked)), sep="\n")
assert len(asked) == 3, "Ray no longer asks"
PY
