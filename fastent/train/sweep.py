"""Train many jobs, in this process or in several, and say of each what became of it.

A job that fails does not stop the others. One that follows the norm of other runs starts once these are over. In a
process of its own (``workers > 1``) a job whose process was killed or died is tried once more, from its last
checkpoint, and then marked failed; one that was refused (locked, another configuration, disk full) is not tried
again.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch

import fastent
from fastent.train.errors import Interrupted, RunError
from fastent.train.files import read_rows
from fastent.train.interventions import source_job
from fastent.train.loop import train
from fastent.train.observers import Observer, Observers
from fastent.train.runs import Job, mark_failed
from fastent.train.signals import StopRequest
from fastent.train.worker import REFUSED, order

START_WORKER = """
import importlib.util, os, sys
spec = importlib.util.spec_from_file_location(
    "fastent", sys.argv[1], submodule_search_locations=[os.path.dirname(sys.argv[1])]
)
sys.modules["fastent"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["fastent"])
from fastent.train.worker import main
sys.exit(main())
"""
"""A worker runs this process's own fastent, installed or not, and with -P nothing that lies in the current folder: a
file there may have the name of any module."""

ATTEMPTS = 2
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Outcome:
    """What became of a job: `error` is None if it is complete, else why it is not, after so many attempts."""

    job: Job
    attempts: int
    error: str | None = None


def run_jobs(
    jobs: Sequence[Job],
    out: Path,
    *,
    workers: int = 1,
    device: str = "cpu",
    force: bool = False,
    observers: Sequence[Observer] = (),
    stop: StopRequest | None = None,
) -> list[Outcome]:
    """Train every job, each as one stack, `workers` at a time.

    Parameters
    ----------
    jobs : sequence of Job
        See `plan_stacks`.
    out : Path
        Folder of the run folders.
    workers : int
        1 trains in this process; more, in that many processes which share its threads out among them.
    device, force, observers, stop
        See `train`.

    Returns
    -------
    list of Outcome
        In the order of `jobs`.

    Raises
    ------
    Interrupted
        If `stop` asked for it, once everything is saved.
    ValueError
        If `workers` is below 1.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1; got {workers}")
    if workers == 1:
        return [_run_here(job, out, device, force, observers, stop) for job in jobs]
    return _Pool(jobs, out, workers, device, force, observers, stop).run()


def _run_here(
    job: Job, out: Path, device: str, force: bool, observers: Sequence[Observer], stop: StopRequest | None
) -> Outcome:
    try:
        train(job, out, device=device, force=force, observers=observers, stop=stop)
    except Interrupted:
        raise
    except RunError as error:
        return Outcome(job, 1, str(error))
    except Exception as error:
        traceback.print_exc()
        return _failed(job, out, 1, repr(error))
    return Outcome(job, 1)


def _failed(job: Job, out: Path, attempts: int, reason: str) -> Outcome:
    with contextlib.suppress(OSError):  # the outcome is told even where the disk takes nothing more
        mark_failed(out, job, attempts, reason)
    return Outcome(job, attempts, reason)


@dataclass
class _Worker:
    job: Job
    attempt: int
    process: subprocess.Popen[str]
    stdin: IO[str]
    messages: IO[str]


class _Pool:
    def __init__(
        self,
        jobs: Sequence[Job],
        out: Path,
        workers: int,
        device: str,
        force: bool,
        observers: Sequence[Observer],
        stop: StopRequest | None,
    ) -> None:
        self.jobs = jobs
        self.out = out
        self.size = workers
        self.device = device
        self.force = force
        self.observers = Observers(observers)
        self.stop = stop
        self.threads = max(1, torch.get_num_threads() // workers)
        self.waiting = deque((job, 1) for job in dict.fromkeys(jobs))
        self.working: list[_Worker] = []
        self.outcomes: dict[Job, Outcome] = {}
        self.told: dict[tuple[Job, int], int] = {}
        self.offsets: dict[tuple[Job, int], int] = {}

    def run(self) -> list[Outcome]:
        try:
            while self.waiting or self.working:
                if self.stop is not None and self.stop.signal is not None:
                    self._interrupt(self.stop.signal)
                while len(self.working) < self.size and (turn := self._next()) is not None:
                    self.waiting.remove(turn)
                    self.working.append(self._start(*turn))
                time.sleep(POLL_SECONDS)
                for worker in list(self.working):
                    ended = worker.process.poll() is not None
                    self._report(worker.job)
                    if ended:
                        self.working.remove(worker)
                        self._end(worker)
        finally:
            for worker in self.working:
                worker.process.kill()
                worker.process.wait()
        return [self.outcomes[job] for job in self.jobs]

    def _next(self) -> tuple[Job, int] | None:
        """Find the first job in waiting whose condition follows no run that is not over."""
        unfinished = [job for job, _ in self.waiting] + [worker.job for worker in self.working]
        for turn in self.waiting:
            source = source_job(turn[0])
            if source is None or not any(_overlap(source, job) for job in unfinished):
                return turn
        return None

    def _start(self, job: Job, attempt: int) -> _Worker:
        messages = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  closed when the worker ends
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", START_WORKER, fastent.__file__],
            stdin=subprocess.PIPE,
            stderr=messages,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(self.threads)},
            # Out of reach of the terminal's Ctrl-C, which this process passes on once.
            start_new_session=True,
        )
        # What the worker rewinds is read again from the start, and not told again.
        self.offsets.update({(job, seed): 0 for seed in job.seeds})
        assert process.stdin is not None
        task = order(job, self.out, device=self.device, threads=self.threads, force=self.force)
        with contextlib.suppress(BrokenPipeError):  # it died already: its status tells
            process.stdin.write(task)
            process.stdin.flush()
        return _Worker(job, attempt, process, process.stdin, messages)

    def _report(self, job: Job) -> None:
        """Tell the observers of new rows, read where the worker writes them."""
        for seed in job.seeds:
            key = (job, seed)
            rows, self.offsets[key] = read_rows(
                self.out / job.run_name(seed) / "metrics.jsonl", self.offsets.get(key, 0)
            )
            for row in rows:
                if row["step"] > self.told.get(key, -1):
                    self.told[key] = row["step"]
                    self.observers.row(job, seed, row)

    def _end(self, worker: _Worker) -> None:
        status = worker.process.returncode
        messages = _close(worker)
        if status == 0:
            self.outcomes[worker.job] = Outcome(worker.job, worker.attempt)
            for seed in worker.job.seeds:
                self.observers.done(worker.job, seed)
        elif status == REFUSED:
            self.outcomes[worker.job] = Outcome(worker.job, worker.attempt, messages.strip())
        elif worker.attempt < ATTEMPTS:
            self.waiting.append((worker.job, worker.attempt + 1))
        else:
            reason = _reason(status, messages)
            self.outcomes[worker.job] = _failed(worker.job, self.out, worker.attempt, reason)

    def _interrupt(self, number: int) -> None:
        for worker in self.working:
            worker.process.send_signal(signal.SIGTERM)
        for worker in self.working:
            worker.process.wait()
            _close(worker)
        self.working.clear()
        name = signal.Signals(number).name
        raise Interrupted(number, f"{name}: stopped and saved; the same command goes on")


def _overlap(a: Job, b: Job) -> bool:
    """Whether two jobs share a run."""
    return bool({a.run_name(seed) for seed in a.seeds} & {b.run_name(seed) for seed in b.seeds})


def _close(worker: _Worker) -> str:
    """Pass on what the worker wrote to standard error, and return it."""
    with contextlib.suppress(OSError):
        worker.stdin.close()
    worker.messages.seek(0)
    text = worker.messages.read()
    worker.messages.close()
    sys.stderr.write(text)
    return text


def _reason(status: int, messages: str) -> str:
    if status < 0:
        name = signal.Signals(-status).name
        return f"its process was ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    last = messages.strip().splitlines()[-1:]
    return f"its process ended with status {status}" + "".join(f": {line}" for line in last)
