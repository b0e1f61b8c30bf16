"""Many jobs, trained in this process or in several, and what became of each.

`check_jobs` looks before the first one starts, so that a mistake costs a sentence and leaves no folder behind:
`TrainConfig` knows the range of each setting, here is what needs the task's table, the machine, the device, and what
lies in the folder already.

A job that fails does not stop the others. One that follows the norm of other runs starts once these are over. In a
process of its own (``workers > 1``) a job whose process was killed or died is tried once more, from its last
checkpoint, and then marked failed; one that was refused (locked, another configuration, disk full) is not tried
again. The first line of such a process's standard input says what to train. The rest of it only has to stay open:
when it ends, the parent is gone, and the worker saves and stops rather than train on unseen.
"""

from __future__ import annotations

import contextlib
import functools
import glob
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
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import torch

import fastent
from fastent.grokking.train.conditions import sources
from fastent.grokking.train.config import TrainConfig
from fastent.grokking.train.loop import Observer, Observers, train
from fastent.grokking.train.measures import Measures
from fastent.grokking.train.runs import Job, announced, mark_failed, read_settings, what_counts
from fastent.grokking.train.storage import Interrupted, RunError, StopRequest, read_rows
from fastent.grokking.train.tasks import make_task

REFUSED = 3
"""Exit status for a `RunError`: trying again would end the same way."""


def order(job: Job, out: Path, *, device: str, threads: int, force: bool) -> str:
    """Put a worker's task on one line, for `worker` to read."""
    task = {
        "experiment": job.experiment,
        "condition": job.condition,
        "config": job.settings(),
        "seeds": list(job.seeds),
        "changed": list(job.changed),
        "out": str(out),
        "device": device,
        "threads": threads,
        "force": force,
    }
    return json.dumps(task) + "\n"


def worker() -> int:
    """Train what standard input orders; return the exit status."""
    with StopRequest() as stop:
        task: dict[str, Any] = json.loads(sys.stdin.readline())
        threading.Thread(target=_stop_at_end_of, args=(sys.stdin.fileno(),), daemon=True).start()
        torch.set_num_threads(task["threads"])
        job = Job.of_settings(
            *(task[name] for name in ("experiment", "condition", "config", "seeds", "changed"))
        )
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


LARGEST_SEED = 2**64 - 1
MOST_SEEDS = 10_000
WORKERS_PER_PROCESSOR = 4


def check_jobs(jobs: Sequence[Job], out: Path, *, workers: int, device: str, force: bool = False) -> None:
    """Check all jobs, the device and the folder `out`; nothing is written.

    Raises
    ------
    ValueError
        At the first rule that does not hold: the rule, the value, the remedy, and the job where it is one's own.
    """
    check_device(device)
    most = most_workers()
    if not 1 <= workers <= most:
        raise ValueError(
            f"workers must be at least 1{f' and at most {most} on this machine' if workers > 1 else ''}; got {workers}"
        )
    for job in jobs:
        try:
            check_config(job.config)
        except ValueError as error:
            raise ValueError(f"{job.experiment}-{job.condition}-{job.config.task}: {error}") from error
    if not force:
        _check_folder(jobs, out)


def most_workers() -> int:
    """Return the number of processes beyond which more of them only take memory here."""
    return WORKERS_PER_PROCESSOR * (os.cpu_count() or 1)


def check_device(device: str) -> None:
    """Check that the trainer can use `device`.

    Raises
    ------
    ValueError
        If it is neither the CPU nor a CUDA device that is there.
    """
    rule = f"device must be cpu, or a CUDA device such as cuda or cuda:0; got {device!r}"
    try:
        asked = torch.device(device)
    except RuntimeError as error:
        raise ValueError(rule) from error
    if asked.type == "cpu":
        return
    if asked.type != "cuda":
        raise ValueError(rule)
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (asked.index or 0) >= there:
        raise ValueError(f"{rule}, and torch sees {there or 'no'} CUDA device{'s' if there > 1 else ''} here")


@functools.lru_cache(maxsize=256)
def check_config(config: TrainConfig) -> None:
    """Check that a task, split and model of `config` can be made on this machine.

    Raises
    ------
    ValueError
        If the modulus does not suit the task or its measures, a set of pairs has fewer than the two rows that an
        entropy needs, or the memory of this machine is too small.
    """
    needed, there = memory(config), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        raise ValueError(
            f"a seed of these settings needs some {needed / 1e9:.3g} GB, and this machine has {there / 1e9:.3g} GB: "
            "choose a smaller modulus, width, feedforward, hidden or batch_size"
        )
    total = len(make_task(config).labels)
    train = round(config.train_fraction * total)
    for name, count, least in (("train", train, 2), ("test", total - train, 2)):
        if count < least:
            raise ValueError(
                f"train_fraction {config.train_fraction:g} leaves {count} of {total} pairs to the {name} set, and an "
                f"entropy needs {least}: choose another fraction or a larger modulus"
            )
    Measures(config)


def memory(config: TrainConfig) -> int:
    """Estimate the bytes that a seed of `config` takes at the least, from its sizes alone."""
    n = {"s5": 120, "mul_nonzero": config.modulus - 1}.get(config.task, config.modulus)
    d, tokens = config.width, n * (2 if config.separate_tokens else 1)
    if config.model == "mlp":
        sizes = [d * (2 if config.combine == "concat" else 1), *config.hidden]
        parameters = tokens * d + sum(a * b for a, b in pairwise(sizes)) + sizes[-1] * n
        units, scores = sum(sizes), 0
    else:
        parameters = tokens * d + 4 * d * d + 2 * d * config.feedforward + d * n
        units, scores = 6 * d + config.feedforward, 2 * n * n * config.heads
    # Drawn in float64 from two words each, then float32 with AdamW's two moments and the gradient; the scores of all
    # pairs of tokens, twice with their gradient; numbers and label of each pair, int64; activations with gradients.
    return 24 * parameters + 8 * scores + 48 * n * n + 8 * config.batch_size * (units + n)


def check_seeds(count: int, largest: int) -> None:
    """Check how many seeds are asked for, and the largest of them.

    Raises
    ------
    ValueError
        If there are more than `MOST_SEEDS`, or one is beyond `LARGEST_SEED`.
    """
    if count > MOST_SEEDS:
        raise ValueError(
            f"seeds must be at most {MOST_SEEDS:,} at a time, for each is a run and a folder; got {count:,}"
        )
    if largest > LARGEST_SEED:
        raise ValueError(f"a seed must be below 2^64; got {largest}")


def _check_folder(jobs: Sequence[Job], out: Path) -> None:
    """See that runs of one name and different seeds are of one configuration, or a report would mix them."""
    names = {job.run_name(seed) for job in jobs for seed in job.seeds}
    for job in jobs:
        asked = job.settings() | {"measures": []}
        prefix = job.run_name(0).removesuffix("0")
        for path in sorted(out.glob(f"{glob.escape(prefix)}*")):
            if path.name in names or not path.name.removeprefix(prefix).isdecimal() or not what_counts(path):
                continue
            try:
                recorded = read_settings(path) | {"measures": []}
            except (OSError, ValueError, KeyError, TypeError):
                continue  # a run that cannot be read is refused where it is asked for
            changes = [
                f"{key} {recorded[key]!r}, now {value!r}"
                for key, value in asked.items()
                if key in recorded and recorded[key] != value
            ]
            if changes:
                raise ValueError(
                    f"{out} holds {path.name} with other settings ({'; '.join(changes)}), and what is told of both "
                    "would mix them: give another --out, or --force to have them side by side"
                )


START_WORKER = """
import importlib.util, os, sys
spec = importlib.util.spec_from_file_location(
    "fastent", sys.argv[1], submodule_search_locations=[os.path.dirname(sys.argv[1])]
)
sys.modules["fastent"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["fastent"])
from fastent.grokking.train.sweep import worker
sys.exit(worker())
"""
"""A worker runs this process's own fastent, installed or not, and with -P nothing that lies in the current folder: a
file there may have the name of any module."""

ATTEMPTS = 2
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class JobOutcome:
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
) -> list[JobOutcome]:
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
    with announced(jobs, out):
        if workers == 1:
            return [_run_here(job, out, device, force, observers, stop) for job in jobs]
        return _WorkerPool(jobs, out, workers, device, force, observers, stop).run()


def _run_here(
    job: Job, out: Path, device: str, force: bool, observers: Sequence[Observer], stop: StopRequest | None
) -> JobOutcome:
    try:
        train(job, out, device=device, force=force, observers=observers, stop=stop)
    except Interrupted:
        raise
    except RunError as error:
        return JobOutcome(job, 1, str(error))
    except Exception as error:
        traceback.print_exc()
        return _failed(job, out, 1, repr(error))
    return JobOutcome(job, 1)


def _failed(job: Job, out: Path, attempts: int, reason: str) -> JobOutcome:
    with contextlib.suppress(OSError):  # the outcome is told even where the disk takes nothing more
        mark_failed(out, job, attempts, reason)
    return JobOutcome(job, attempts, reason)


@dataclass
class _Worker:
    job: Job
    attempt: int
    process: subprocess.Popen[str]
    stdin: IO[str]
    messages: IO[str]


@dataclass
class _WorkerPool:
    jobs: Sequence[Job]
    out: Path
    size: int
    device: str
    force: bool
    observers: Sequence[Observer]
    stop: StopRequest | None

    def __post_init__(self) -> None:
        self.observer = Observers(self.observers)
        self.threads = max(1, torch.get_num_threads() // self.size)
        self.waiting = deque((job, 1) for job in dict.fromkeys(self.jobs))
        self.working: list[_Worker] = []
        self.outcomes: dict[Job, JobOutcome] = {}
        self.told: dict[tuple[Job, int], int] = {}
        self.offsets: dict[tuple[Job, int], int] = {}

    def run(self) -> list[JobOutcome]:
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
        """Find the first job in waiting that follows no run that is not over."""
        unfinished = [job for job, _ in self.waiting] + [worker.job for worker in self.working]
        for turn in self.waiting:
            if not any(_overlap(source, job) for source in sources(turn[0]) for job in unfinished):
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
                    self.observer.row(job, seed, row)

    def _end(self, worker: _Worker) -> None:
        status = worker.process.returncode
        messages = _close(worker)
        if status == 0:
            self.outcomes[worker.job] = JobOutcome(worker.job, worker.attempt)
            for seed in worker.job.seeds:
                self.observer.done(worker.job, seed)
        elif status == REFUSED:
            self.outcomes[worker.job] = JobOutcome(worker.job, worker.attempt, messages.strip())
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
