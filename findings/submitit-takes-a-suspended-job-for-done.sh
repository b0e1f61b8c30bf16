#!/usr/bin/env bash
# submitit 1.5.4: a Slurm job that is suspended (as by gang scheduling, or `scontrol suspend`) is taken for done, although
# Slurm lets it go on later: `Job.done()` is true, `Job.result()` would raise that the job has no output, and once seen so
# the job is not asked about again, so that `done()` stays true while it runs. InfoWatcher.is_done knows seven states that
# are not the end; SUSPENDED, and the likes of CONFIGURING, RESIZING or SIGNALING, are not among them.
# The way round: ask `squeue` for the state, and take only states for the end that are.
# A stand-in for `sacct` prints what it prints of such a job; no Slurm is needed.
#
# Output seen:
#   submitit 1.5.4
#   running: RUNNING, done: False
#   suspended: SUSPENDED, done: True
#   running again: SUSPENDED, done: True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "submitit==1.5.4"
mkdir "$folder/bin"
cat > "$folder/bin/sacct" <<SH
#!/bin/sh
echo "JobID|State|NodeList"
echo "12|\$(cat "$folder/state")|node1"
SH
chmod +x "$folder/bin/sacct"
PATH="$folder/bin:$PATH" "$folder/venv/bin/python" - "$folder" <<'PY'
import sys
import time
from pathlib import Path

import submitit
from submitit.slurm.slurm import SlurmJob

folder = Path(sys.argv[1])
job = SlurmJob(folder, "12")
print("submitit", submitit.__version__)
seen = []
for name, state in (("running", "RUNNING"), ("suspended", "SUSPENDED"), ("running again", "RUNNING")):
    (folder / "state").write_text(state)
    time.sleep(0.01)  # within a millisecond of the last call even a forced check asks nobody
    done = job.done(force_check=True)
    seen.append((job.state, done))
    print(f"{name}: {job.state}, done: {done}")
assert seen == [("RUNNING", False), ("SUSPENDED", True), ("SUSPENDED", True)], "submitit no longer does so"
PY
