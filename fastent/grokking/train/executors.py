"""Executors: where the attempts at a sweep's jobs are made, each behind the same four calls.

`fastent.grokking.train.sweep` decides what is tried, in which order and how often; an executor makes attempts and says
how each ended. Nothing is shared with an attempt but the order it is given, one line of JSON, and the folder of runs:
progress is read there, and a run goes on there, whoever trained it before. Except for `Inline`, an attempt is a process
of its own with its number of threads set, so that the same job gives the same bytes wherever it is trained.

========== ====================================== ===================== =============================================
executor   attempts                               installed by          a lost machine
========== ====================================== ===================== =============================================
`Inline`   in this process, one after the other   the core              -
`Pool`     in processes of this machine           the core              -
`Ray`      as tasks of a Ray cluster              extra ``sweep``       Ray begins its attempts anew, elsewhere
`Slurm`    as Slurm jobs, by submitit             extra ``slurm``       Slurm requeues them
========== ====================================== ===================== =============================================

The process of an attempt (`worker`) reads what to train from the first line of its standard input. The rest of it only
has to stay open: when it ends, whoever started it is gone, and the process saves and stops rather than train on unseen.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol, Self

import torch

import fastent
from fastent.grokking.train.loop import Observer, train
from fastent.grokking.train.runs import Job
from fastent.grokking.train.storage import Interrupted, RunError, RunLocked, StopRequest

REFUSED = 3
"""Exit status for a `RunError`: trying again would end the same way."""

POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Order:
    """What an attempt is to do.

    Attributes
    ----------
    job : Job
        Trained as one stack.
    out : Path
        Folder of the run folders.
    device : str
        Where to train, as torch names it.
    threads : int
        Of the process.
    force : bool
        See `fastent.grokking.train.loop.train`.
    sign : str
        Name of a file that lies in `out`, "" for none: where it cannot be seen, `out` is another machine's folder.
    patience : float
        Seconds to wait for runs that another process holds: on another machine an attempt that was given up may still
        be saving.
    """

    job: Job
    out: Path
    device: str = "cpu"
    threads: int = 1
    force: bool = False
    sign: str = ""
    patience: float = 0.0

    def line(self) -> str:
        """Return the order as one line, for `worker` to read."""
        job = self.job
        named = {"experiment": job.experiment, "condition": job.condition, "settings": job.settings()}
        values = {**vars(self), "job": {**named, "seeds": job.seeds, "changed": job.changed}}
        return json.dumps({**values, "out": str(self.out)}) + "\n"

    @classmethod
    def of_line(cls, line: str) -> Self:
        """Make an order from what `line` gave."""
        values: dict[str, Any] = json.loads(line)
        return cls(**{**values, "job": Job.of_settings(**values["job"]), "out": Path(values["out"])})


@dataclass(frozen=True)
class End:
    """How an attempt ended.

    Attributes
    ----------
    job : Job
    error : str or None
        Why it is not complete; None if it is.
    final : bool
        Whether trying again would end the same way: it was refused.
    messages : str
        What it wrote to standard error.
    """

    job: Job
    error: str | None = None
    final: bool = False
    messages: str = ""


class Reach(StrEnum):
    """How far away attempts are made."""

    HERE = "this process"
    MACHINE = "this machine"
    NETWORK = "other machines"


class Executor(Protocol):
    """Makes attempts.

    Attributes
    ----------
    reach : Reach
        From another process, rows are read in the folder of runs, and a job whose process died is tried again.
    size : int or None
        Attempts at a time; None for as many as there are, where a queue takes them.
    threads : int
        Of each.
    """

    reach: Reach
    size: int | None
    threads: int

    def submit(self, orders: Sequence[Order]) -> None:
        """Take `orders`, `size` at a time at most, those before that have not ended included."""

    def ended(self, observer: Observer, stop: StopRequest | None) -> Iterator[End]:
        """Wait a moment, and yield the attempts that have ended since.

        One that trains in this process does so meanwhile, tells `observer` and heeds `stop`, and raises `Interrupted`.
        """

    def stop(self) -> None:
        """Have all attempts save and stop, and wait until they have; none of them is yielded any more."""

    def close(self) -> None:
        """Let go of everything; attempts that have not ended are ended."""


class Inline:
    """Attempts in this process, one after the other, in its own threads."""

    reach, size = Reach.HERE, 1

    def __init__(self) -> None:
        self.threads = torch.get_num_threads()
        self._orders: deque[Order] = deque()

    def submit(self, orders: Sequence[Order]) -> None:
        """See `Executor`."""
        self._orders.extend(orders)

    def ended(self, observer: Observer, stop: StopRequest | None) -> Iterator[End]:
        """See `Executor`."""
        while self._orders:
            order = self._orders.popleft()
            how = {"device": order.device, "force": order.force, "observers": [observer], "stop": stop}
            try:
                train(order.job, order.out, **how)  # type: ignore[arg-type]
            except Interrupted:
                raise
            except RunError as error:
                yield End(order.job, str(error), final=True)
            except Exception as error:  # whatever it is, the other jobs have their turn
                yield End(order.job, repr(error), messages=traceback.format_exc())
            else:
                yield End(order.job)

    def stop(self) -> None:
        """See `Executor`."""
        self._orders.clear()

    close = stop


class Pool:
    """Attempts in processes of this machine.

    Parameters
    ----------
    size : int
        Attempts at a time.
    threads : int, optional
        Of each; this process's shared out among them if not given.
    """

    reach = Reach.MACHINE

    def __init__(self, size: int, threads: int | None = None) -> None:
        self.size = size
        self.threads = threads or max(1, torch.get_num_threads() // size)
        self.working: list[Worker] = []

    def submit(self, orders: Sequence[Order]) -> None:
        """See `Executor`."""
        self.working += [Worker(order) for order in orders]

    def ended(self, observer: Observer, stop: StopRequest | None) -> Iterator[End]:
        """See `Executor`."""
        time.sleep(POLL_SECONDS)
        for worker in list(self.working):
            if worker.process.poll() is not None:
                self.working.remove(worker)
                yield worker.end()

    def stop(self) -> None:
        """See `Executor`."""
        for worker in self.working:
            worker.process.terminate()
        for worker in self.working:
            sys.stderr.write(worker.end().messages)
        self.working.clear()

    def close(self) -> None:
        """See `Executor`."""
        for worker in self.working:
            worker.process.kill()
            worker.end()
        self.working.clear()


START_WORKER = """
import importlib.util, os, sys
spec = importlib.util.spec_from_file_location(
    "fastent", sys.argv[1], submodule_search_locations=[os.path.dirname(sys.argv[1])]
)
sys.modules["fastent"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["fastent"])
from fastent.grokking.train.executors import worker
sys.exit(worker())
"""
"""A worker runs this process's own fastent, installed or not, and with -P nothing that lies in the current folder: a
file there may have the name of any module."""


class Worker:
    """A process that makes one attempt."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self._messages = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  closed by `end`
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", START_WORKER, fastent.__file__],
            stdin=subprocess.PIPE,
            stderr=self._messages,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(order.threads)},
            # Out of reach of the terminal's Ctrl-C, which the parent passes on once.
            start_new_session=True,
        )
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died already: its status tells
            self.process.stdin.write(order.line())
            self.process.stdin.flush()

    def end(self) -> End:
        """Wait for its end, and say how it was."""
        status = self.process.wait()
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        self._messages.seek(0)
        messages = self._messages.read()
        self._messages.close()
        return _end(self.order.job, status, messages)


def _end(job: Job, status: int, messages: str) -> End:
    """Say in words how the process of an attempt ended."""
    if status == 0:
        return End(job, messages=messages)
    if status == REFUSED:
        return End(job, messages.strip(), final=True, messages=messages)
    if status < 0:
        name = signal.Signals(-status).name
        said = f"its process was ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    else:
        said = f"its process ended with status {status}" + "".join(f": {line}" for line in last(messages, 1))
    return End(job, said, messages=messages)


def last(messages: str, lines: int) -> list[str]:
    """Return the last lines of what a process wrote."""
    return messages.strip().splitlines()[-lines:]


def worker() -> int:
    """Train what standard input orders; return the exit status."""
    with StopRequest() as stop:
        order = Order.of_line(sys.stdin.readline())
        threading.Thread(target=_stop_at_end_of, args=(sys.stdin.fileno(),), daemon=True).start()
        torch.set_num_threads(order.threads)
        try:
            _attempt(order, stop)
        except Interrupted as interruption:
            print(interruption, file=sys.stderr)
            return 128 + interruption.signal
        except RunError as error:
            print(error, file=sys.stderr)
            return REFUSED
    return 0


SIGN_SECONDS = 10.0
"""How long a file system may take to show a file of another machine."""


def _attempt(order: Order, stop: StopRequest) -> None:
    start = time.monotonic()
    while order.sign and not (order.out / order.sign).exists():
        if time.monotonic() - start > SIGN_SECONDS:
            raise RunError(
                f"{order.out} on {os.uname().nodename} is not the folder that the sweep was given (it holds no "
                f"{order.sign}): give an --out that all machines share"
            )
        time.sleep(POLL_SECONDS)
    while True:
        try:
            return train(order.job, order.out, device=order.device, force=order.force, stop=stop)
        except RunLocked:
            if stop.signal is not None or time.monotonic() - start > order.patience:
                raise
            time.sleep(POLL_SECONDS)


def _stop_at_end_of(descriptor: int) -> None:
    # Not through sys.stdin: a thread that waits inside a buffered stream aborts the interpreter's shutdown.
    while os.read(descriptor, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
