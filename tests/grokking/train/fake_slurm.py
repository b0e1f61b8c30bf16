"""The five commands of Slurm that submitit calls, on one machine: by the name under which this file is started.

State is files in the folder FAKE_SLURM: ``<job>.state``, ``<job>.pid``, and ``<job>.requeue`` while that is asked for.
"""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path(os.environ["FAKE_SLURM"])


def sbatch(script):
    """Start a job, or an array of them, and say its number."""
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", Path(script).read_text(), re.MULTILINE))
    number = len(list(FOLDER.glob("*.script")))
    (FOLDER / f"{number}.script").write_text(Path(script).read_text())
    last = re.match(r"0-(\d+)", shlex.split(options["array"])[0]) if "array" in options else None
    jobs = [f"{number}_{i}" for i in range(int(last[1]) + 1)] if last else [str(number)]
    for job in jobs:
        (FOLDER / f"{job}.state").write_text("PENDING")
        nowhere = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.Popen(
            [sys.executable, __file__, "job", job, str(number)], start_new_session=True, **nowhere
        )
    print(f"Submitted batch job {number}")


def job(name, number):
    """Run the script of a job until it ends without having been requeued."""
    array, _, index = name.partition("_")
    variables = {"SLURM_JOB_ID": name, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    if index:
        variables |= {"SLURM_ARRAY_JOB_ID": array, "SLURM_ARRAY_TASK_ID": index}
    requeue = FOLDER / f"{name}.requeue"
    while True:
        (FOLDER / f"{name}.state").write_text("RUNNING")
        script = str(FOLDER / f"{number}.script")
        status = subprocess.run(["bash", script], env={**os.environ, **variables}).returncode
        if not requeue.exists():
            break
        requeue.unlink()
    (FOLDER / f"{name}.state").write_text("FAILED" if status else "COMPLETED")


def srun(*arguments):
    """Become the command of a job, its output in the files that are named."""
    command = list(arguments)
    own, array = os.environ["SLURM_JOB_ID"], os.environ.get("SLURM_ARRAY_JOB_ID", "")
    known = {"%j": own, "%t": "0", "%A": array, "%a": os.environ.get("SLURM_ARRAY_TASK_ID", "")}
    while command[0].startswith("--"):
        option = command.pop(0)
        if option in ("--output", "--error"):
            path = re.sub("%[jtAa]", lambda found: known[found[0]], command.pop(0))
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1 if option == "--output" else 2)
    (FOLDER / f"{own}.pid").write_text(str(os.getpid()))
    os.execv(command[0], command)


def squeue(*arguments):
    """Print the states of all jobs, suspended ones too; fail where the file ``down`` is there."""
    assert {"--me", "--array", "--noheader", "--states=all", "--format=%i %T"} == {*arguments}
    with (FOLDER / "asked").open("a") as file:
        file.write("x")
    if (FOLDER / "down").exists():
        sys.exit("slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
    for path in FOLDER.glob("*.state"):
        suspended = path.with_suffix(".suspended").exists()
        print(path.stem, "SUSPENDED" if suspended else path.read_text())


def scontrol(requeue, name):
    """Have a job begin again once it has ended."""
    assert requeue == "requeue"
    (FOLDER / f"{name}.requeue").touch()


def scancel(name, *arguments):
    """Send a signal; without one, SIGTERM and after a while SIGKILL."""
    pid = int((FOLDER / f"{name}.pid").read_text())
    with contextlib.suppress(ProcessLookupError):
        if arguments:
            os.kill(pid, getattr(signal, "SIG" + arguments[1].removeprefix("SIG")))
        else:
            os.kill(pid, signal.SIGTERM)
            time.sleep(1)
            os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    command, *arguments = (
        sys.argv[1:] if sys.argv[1:2] == ["job"] else [Path(sys.argv[0]).name, *sys.argv[1:]]
    )
    globals()[command](*arguments)
