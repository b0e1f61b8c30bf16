"""Many jobs, trained by an executor, and what became of each.

`check_jobs` looks before the first one starts, so that a mistake costs a sentence and leaves no folder behind:
`TrainConfig` knows the range of each setting, here is what needs the task's table, the machine, the device, and what
lies in the folder already.

A job that fails does not stop the others. One that follows the norm of other runs starts once these are over. Where it
is trained is the business of an executor (`fastent.grokking.train.executors`). In a process of its own a job that was
killed or died is tried once more, from its last checkpoint, and then marked failed; one that was refused (locked,
another configuration, disk full) is not tried again.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import itertools
import os
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import torch

from fastent.entropy import spectral_entropy
from fastent.grokking.train.conditions import make_condition, sources
from fastent.grokking.train.config import TrainConfig
from fastent.grokking.train.executors import End, Executor, Inline, Order, Pool, Reach, last
from fastent.grokking.train.loop import Observer, Observers
from fastent.grokking.train.measures import Measures
from fastent.grokking.train.models import hand_written
from fastent.grokking.train.modules import stack_kind
from fastent.grokking.train.registry import BUILT_IN
from fastent.grokking.train.runs import (
    OWN,
    Job,
    Row,
    announced,
    check_rows,
    mark_failed,
    read_settings,
    what_counts,
)
from fastent.grokking.train.storage import Interrupted, RunError, RunWarning, StopRequest, read_rows
from fastent.grokking.train.tasks import make_task

LARGEST_SEED = 2**64 - 1
MOST_SEEDS = 10_000
WORKERS_PER_PROCESSOR = 4


def check_jobs(
    jobs: Sequence[Job],
    out: Path,
    *,
    workers: int,
    device: str,
    force: bool = False,
    elsewhere: bool = False,
) -> None:
    """Check all jobs, the device and the folder `out`; nothing is written.

    Where they are trained `elsewhere`, nothing is said of the processors, the memory and the devices, which are there.

    Raises
    ------
    ValueError
        At the first rule that does not hold: the rule, the value, the remedy, and the job where it is one's own.
    """
    if elsewhere:
        device = "cpu"  # what is tried here is
    else:
        check_device(device)
    most = max(workers, 1) if elsewhere else most_workers()
    if not 1 <= workers <= most:
        raise ValueError(
            f"workers must be at least 1{f' and at most {most} on this machine' if workers > 1 else ''}; got {workers}"
        )
    for job in jobs:
        try:
            check_config(job.config, elsewhere=elsewhere)
            if job.experiment == OWN:
                make_condition(job, out, device)  # an experiment's are there
            if job.guests() or not hand_written(job.config):
                _rehearse(job, out, device)
        except (ValueError, RunError) as error:
            raise ValueError(f"{job.experiment}-{job.condition}-{job.config.task}: {error}") from error
    if not force:
        _check_folder(jobs, out)
    if slow := dict.fromkeys(_model(job.config) for job in jobs if not hand_written(job.config)):
        warnings.warn(
            f"{', '.join(slow)}: gradients by torch, one seed after the other, which is slower than the Transformer of "
            "one layer and the MLP, whose gradients are by hand; --dry-run times it",
            RunWarning,
            stacklevel=2,
        )


def _model(config: TrainConfig) -> str:
    return f"model {config.model}" + (f" of {config.layers} layers" if config.layers > 1 else "")


def _rehearse(job: Job, out: Path, device: str) -> None:
    """Make one step of one seed, and what is computed at an evaluation: what other packages brought may fail in it.

    Raises
    ------
    ValueError, RunError
        If it fails, whatever its error.
    """
    alone = replace(job, seeds=job.seeds[:1])
    try:
        condition = None if sources(job) else make_condition(alone, out, device)
        stack = stack_kind(job.config)(job.config, alone.seeds, device, condition)
        stack.evaluate()
        spectral_entropy(stack.representations(), batch_dims=1)
        Measures(job.config)(stack)
        stack.train_step()
    except (ValueError, RunError):
        raise
    except Exception as error:  # of another's code: whatever it is, no run begins
        guests = ", ".join(f"{each['kind']} {each['name']} ({each['place']})" for each in job.guests())
        raise ValueError(f"a first step with {guests} failed with {type(error).__name__}: {error}") from error


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
def check_config(config: TrainConfig, *, elsewhere: bool = False) -> None:
    """Check that a task, split and model of `config` can be made, on this machine unless they are trained `elsewhere`.

    Raises
    ------
    ValueError
        If the modulus does not suit the task or its measures, a set of pairs has fewer than the two rows that an
        entropy needs, or the memory of this machine is too small.
    """
    needed, there = memory(config), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there and not elsewhere:
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
    if config.task in BUILT_IN["task"]:  # without a table of a size that may be a mistake
        n = {"s5": 120, "mul_nonzero": config.modulus - 1}.get(config.task, config.modulus)
    else:
        n = make_task(config).operands
    d, tokens = config.width, n * (2 if config.separate_tokens else 1)
    if config.model not in BUILT_IN["model"]:
        parameters = units = scores = 0  # of another package: nobody knows before
    elif config.model == "mlp":
        sizes = [d * (2 if config.combine == "concat" else 1), *config.hidden]
        parameters = tokens * d + sum(a * b for a, b in pairwise(sizes)) + sizes[-1] * n
        units, scores = sum(sizes), 0
    else:
        parameters = tokens * d + config.layers * (4 * d * d + 2 * d * config.feedforward) + d * n
        units, scores = config.layers * (6 * d + config.feedforward), 2 * n * n * config.heads
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
            if path.name in names or not path.name.removeprefix(prefix).isdecimal():
                continue
            try:
                if not what_counts(path):
                    continue
                recorded = read_settings(path) | {"measures": []}
            except (OSError, RunError):
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


ATTEMPTS = 2

LINES = 10
"""How many of the last lines of a process are kept of a job that failed."""

PATIENCE = 60.0
"""Seconds that an attempt on another machine waits for one that was given up and may still be saving."""


@dataclass(frozen=True)
class JobOutcome:
    """What became of a job.

    Attributes
    ----------
    job : Job
    attempts : int
    error : str or None
        Why it is not complete after so many attempts; None if it is.
    lines : tuple of str
        The last that its process wrote to standard error, where it failed.
    """

    job: Job
    attempts: int
    error: str | None = None
    lines: tuple[str, ...] = field(default=(), compare=False)


def run_jobs(
    jobs: Sequence[Job],
    out: Path,
    *,
    workers: int = 1,
    device: str = "cpu",
    force: bool = False,
    observers: Sequence[Observer] = (),
    stop: StopRequest | None = None,
    executor: Executor | None = None,
    command: str = "",
) -> list[JobOutcome]:
    """Train every job, each as one stack.

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
    executor : Executor, optional
        Where to train instead; closed at the end.
    command : str
        What to type to go on with a job that failed, for its FAILED file.

    Returns
    -------
    list of JobOutcome
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
    chosen: Executor = executor or (Inline() if workers == 1 else Pool(workers))
    with contextlib.closing(chosen), announced(jobs, out) as sign:
        return _Sweep(jobs, out, device, force, observers, stop, chosen, command, sign).run()


@dataclass
class _Sweep:
    """Jobs on their way through an executor; also the observer that hears of their rows, each once."""

    jobs: Sequence[Job]
    out: Path
    device: str
    force: bool
    observers: Sequence[Observer]
    stop: StopRequest | None
    executor: Executor
    command: str = ""
    sign: str = ""

    def __post_init__(self) -> None:
        self.observer = Observers(self.observers)
        self.waiting = list(dict.fromkeys(self.jobs))
        self.attempts: Counter[Job] = Counter()
        self.working: set[Job] = set()
        self.outcomes: dict[Job, JobOutcome] = {}
        self.told: dict[tuple[Job, int], int] = {}
        self.offsets: dict[tuple[Job, int], int] = {}

    def run(self) -> list[JobOutcome]:
        while self.waiting or self.working:
            if self.stop is not None and self.stop.signal is not None:
                self._interrupt(self.stop.signal)
            self._submit()
            for end in self.executor.ended(self, self.stop):
                self._settle(end)
            for job in self.working:
                self._read(job)
        return [self.outcomes[job] for job in self.jobs]

    def row(self, job: Job, seed: int, row: Row) -> None:
        """Pass a row on, unless it was told before an attempt that was given up."""
        if row["step"] > self.told.get((job, seed), -1):
            self.told[job, seed] = row["step"]
            self.observer.row(job, seed, row)

    def done(self, job: Job, seed: int) -> None:
        """Pass on that the run is complete."""
        self.observer.done(job, seed)

    def _submit(self) -> None:
        ready = self._ready()
        for job in ready:
            self.waiting.remove(job)
            self.working.add(job)
            self.attempts[job] += 1
            # What an attempt rewinds is read again from the start, and not told again.
            self.offsets.update({(job, seed): 0 for seed in job.seeds})
        if not ready:
            return
        try:
            self.executor.submit([self._order(job) for job in ready])
        except RunError as error:
            if not self.outcomes and self.working == {*ready}:
                raise
            for job in ready:  # a queue that takes nothing for now ends no other job
                self._settle(End(job, str(error)))

    def _ready(self) -> list[Job]:
        """Find the jobs that may begin now: there is room, and they follow no run that is not over."""
        room = None if self.executor.size is None else self.executor.size - len(self.working)
        unfinished = {name for job in (*self.waiting, *self.working) for name in _names(job)}
        free = (
            job for job in self.waiting if all(unfinished.isdisjoint(_names(each)) for each in sources(job))
        )
        return list(itertools.islice(free, room))

    def _order(self, job: Job) -> Order:
        order = Order(job, self.out, self.device, self.executor.threads, self.force)
        if self.executor.reach is Reach.NETWORK:
            order = replace(order, out=self.out.resolve(), sign=self.sign, patience=PATIENCE)
        return order

    def _read(self, job: Job) -> None:
        """Tell of new rows, read where the attempt writes them."""
        if self.executor.reach is Reach.HERE:
            return
        for seed in job.seeds:
            path = self.out / job.run_name(seed) / "metrics.jsonl"
            try:
                rows, self.offsets[job, seed] = read_rows(path, self.offsets[job, seed])
                check_rows(path, rows)
            except (OSError, RunError):
                continue  # the attempt refuses it, and says why
            for row in rows:
                self.row(job, seed, row)

    def _settle(self, end: End) -> None:
        job, attempts = end.job, self.attempts[end.job]
        self._read(job)
        self.working.remove(job)
        sys.stderr.write(end.messages)
        if end.error is None:
            self.outcomes[job] = JobOutcome(job, attempts)
            if self.executor.reach is not Reach.HERE:
                for seed in job.seeds:
                    self.done(job, seed)
        elif end.final:
            self.outcomes[job] = JobOutcome(job, attempts, end.error)
        elif self.executor.reach is not Reach.HERE and attempts < ATTEMPTS:
            self.waiting.append(job)
        else:
            lines = tuple(last(end.messages, LINES))
            self.outcomes[job] = JobOutcome(job, attempts, end.error, lines)
            with contextlib.suppress(OSError):  # the outcome is told even where the disk takes nothing more
                mark_failed(self.out, job, attempts, end.error, lines, self.command)

    def _interrupt(self, number: int) -> None:
        self.executor.stop()
        name = signal.Signals(number).name
        raise Interrupted(number, f"{name}: stopped and saved; the same command goes on")


def _names(job: Job) -> list[str]:
    return [job.run_name(seed) for seed in job.seeds]
