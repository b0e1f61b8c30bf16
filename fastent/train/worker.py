"""One stack in a process of its own: what `fastent.train.sweep` starts.

The first line of standard input says what to train. The rest of it only has to stay open: when it ends, the
parent is gone, and the worker saves and stops rather than train on unseen.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import torch

from fastent.train.errors import Interrupted, RunError
from fastent.train.loop import train
from fastent.train.runs import Job
from fastent.train.signals import StopRequest

REFUSED = 3
"""Exit status for a `RunError`: trying again would end the same way."""


def order(job: Job, out: Path, *, device: str, threads: int, force: bool) -> str:
    """Put a worker's task on one line, for `main` to read."""
    task = {
        "experiment": job.experiment,
        "condition": job.condition,
        "config": job.settings(),
        "seeds": list(job.seeds),
        "out": str(out),
        "device": device,
        "threads": threads,
        "force": force,
    }
    return json.dumps(task) + "\n"


def main() -> int:
    """Train what standard input orders; return the exit status."""
    with StopRequest() as stop:
        task: dict[str, Any] = json.loads(sys.stdin.readline())
        threading.Thread(target=_stop_at_end_of, args=(sys.stdin.fileno(),), daemon=True).start()
        torch.set_num_threads(task["threads"])
        job = Job.of_settings(*(task[name] for name in ("experiment", "condition", "config", "seeds")))
        try:
            train(job, Path(task["out"]), device=task["device"], force=task["force"], stop=stop)
        except Interrupted as interruption:
            print(interruption, file=sys.stderr)
            return 128 + interruption.signal
        except RunError as error:
            print(error, file=sys.stderr)
            return REFUSED
    return 0


def _stop_at_end_of(descriptor: int) -> None:
    # Not through sys.stdin: a thread that waits inside a buffered stream aborts the interpreter's shutdown.
    while os.read(descriptor, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
