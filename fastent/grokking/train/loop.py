"""The training of a stack of seeds, evaluated under the entropy monitor, saved, and resumed exactly where it stopped.

The loop has one order: evaluate, end the runs that are over, save, stop if asked, step. Everything that
decides what comes next (the data of a step, the ending of a run, which seeds share a stack) is a function of
the configuration and the step, so a resumed run meets the same arithmetic as an uninterrupted one and its
metrics and weights are equal bit for bit on the same device with the same number of threads.

Each seed goes on from what it has itself: its newest checkpoint that can serve, or step 0. Where one of a stack has
less than the others (its folder is gone, a checkpoint is damaged, a crash came between two writes) the others' files
stay as they are. On a CPU, where seeds are independent to the bit, it is trained alone. On a GPU the last bits depend
on how many share a launch, so the others fill their places without a trace until the step where their own record
ends, and there their checkpoints are put back; a seed that is over fills its place until the step where it ended.

Who is told of a run while it trains (`Observer`) may be a progress bar or a logger.
"""

from __future__ import annotations

import contextlib
import functools
import math
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from fastent.entropy import spectral_entropy
from fastent.grokking.train.checkpoint import KEPT, Checkpoint
from fastent.grokking.train.conditions import make_condition
from fastent.grokking.train.environment import describe_environment
from fastent.grokking.train.measures import Measures
from fastent.grokking.train.models import Condition
from fastent.grokking.train.modules import AnyStack, stack_kind
from fastent.grokking.train.runs import Job, Row, Run
from fastent.grokking.train.storage import Interrupted, RunError, RunWarning, StopRequest
from fastent.monitor.monitor import SpectralEntropyMonitor

TOLERANCE = 5.0
"""Seconds by which wall clock and monotonic clock may part before it is called a jump."""


class Clock:
    """Time since its making. Warns once if the wall clock jumps (it was set, or the machine slept)."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._offset = time.time() - self._start
        self._warned = False

    def read(self) -> tuple[float, float]:
        """Return the wall clock (seconds since 1970) and the monotonic seconds since the start."""
        wall, monotonic = time.time(), time.monotonic()
        jump = wall - monotonic - self._offset
        if abs(jump) > TOLERANCE and not self._warned:
            self._warned = True
            warnings.warn(
                f"the wall clock moved by {jump:+.0f} s; durations are taken from the monotonic clock",
                RunWarning,
                stacklevel=2,
            )
        return wall, monotonic - self._start


class Observer(Protocol):
    """Takes the rows of runs and their ends, in order for each run."""

    def row(self, job: Job, seed: int, row: Row) -> None:
        """Take one line of the metrics."""

    def done(self, job: Job, seed: int) -> None:
        """Take note that the run is complete, now or since before."""


class Observers:
    """Several observers as one. What one of them raises costs a single `RunWarning`; the run goes on."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = observers
        self._failed: set[int] = set()

    def row(self, job: Job, seed: int, row: Row) -> None:
        """Pass one line of the metrics on."""
        for observer in self._observers:
            self._guarded(observer, functools.partial(observer.row, job, seed, row))

    def done(self, job: Job, seed: int) -> None:
        """Pass on that the run is complete."""
        for observer in self._observers:
            self._guarded(observer, functools.partial(observer.done, job, seed))

    def _guarded(self, observer: Observer, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            if id(observer) not in self._failed:
                self._failed.add(id(observer))
                warnings.warn(
                    f"{type(observer).__name__} failed ({error!r}); the run goes on without more warnings",
                    RunWarning,
                    stacklevel=3,
                )


CHECKPOINT_EVERY = 250
"""Steps between checkpoints. It decides how much a crash costs, not what is computed."""

LAYER = "representation"


def train(
    job: Job,
    out: Path,
    *,
    device: str | torch.device = "cpu",
    checkpoint_every: int = CHECKPOINT_EVERY,
    force: bool = False,
    observers: Sequence[Observer] = (),
    stop: StopRequest | None = None,
) -> None:
    """Train the seeds of `job` as one stack to their ends, each from its newest checkpoint if any.

    Parameters
    ----------
    job : Job
        What to train.
    out : Path
        Folder of the run folders.
    device : str or torch.device
        Where to train.
    checkpoint_every : int
        Steps between checkpoints; the newest two are kept until the run is complete, then the last.
    force : bool
        Go on although the folders hold another configuration or a newer schema (see `Run`).
    observers : sequence of Observer
        Told of each row, after it is on its way to the disk, and of each run that is or was complete.
    stop : StopRequest, optional
        Looked at after each step.

    Raises
    ------
    Interrupted
        If `stop` asked for it; the state is saved.
    RunError
        If a folder is locked, was written with another configuration, or cannot be written (disk full,
        read-only); what was saved before is intact. Or if there is no such condition, or it lacks a run that
        it follows.
    """
    environment = describe_environment(device)
    with _disk_errors_explained(out), contextlib.ExitStack() as opened:
        runs = [opened.enter_context(Run(out, job, seed, environment, force=force)) for seed in job.seeds]
        told = Observers(observers)
        for run in runs:
            if run.done is not None:
                told.done(job, run.seed)
        points = {run.seed: run.newest() for run in runs if run.done is None}
        for run in runs:
            _check_fits(run, points.get(run.seed))
        for run in runs:
            run.begin()
        _warn_of_lost_runs(runs, points)
        condition = make_condition(job, out, device) if points else None
        for part in _parts(runs, points, shared=stack_kind(job.config).shares_launches(device)):
            _Training(job, part, points, device, told, condition).run(checkpoint_every, stop)
        for run in runs:
            run.keep_last()


Points = dict[int, Checkpoint | None]
"""By seed, where a run that is not complete goes on: its checkpoint, or None for step 0."""


def _parts(runs: Sequence[Run], points: Points, *, shared: bool) -> list[list[Run]]:
    """Pick the runs that are trained side by side, one list after the other."""
    if not points:
        return []
    if shared:
        return [list(runs)]
    steps = sorted({_step(point) for point in points.values()})
    return [[run for run in runs if run.seed in points and _step(points[run.seed]) == step] for step in steps]


MOST_NAMED = 5
"""Tensors of other shapes that a refusal names."""


def _check_fits(run: Run, point: Checkpoint | None) -> None:
    """See that a run can go on from `point` with the settings of its job, before anything in its folder is changed."""
    if point is None:
        return
    wrong = stack_kind(run.job.config).misfits(run.job.config, point.tensors)
    if not wrong and int(point.tensors["steps"]) != point.step:
        wrong = [f"its tensors are of step {int(point.tensors['steps'])}"]
    try:
        SpectralEntropyMonitor(every=run.job.config.evaluate_every).load_state_dict(point.state["monitor"])
    except (KeyError, TypeError, ValueError) as error:
        wrong.append(f"monitor: {error}")
    if wrong:
        more = [f"and {len(wrong) - MOST_NAMED} more"] if len(wrong) > MOST_NAMED else []
        raise RunError(
            f"{run.path}: checkpoint {point.step} does not fit the settings given now, whatever is forced:\n  "
            + "\n  ".join(wrong[:MOST_NAMED] + more)
            + "\nNothing was changed: give the settings of the folder, or another --out"
        )


def _warn_of_lost_runs(runs: Sequence[Run], points: Points) -> None:
    others = any(run.done is not None or points[run.seed] is not None for run in runs)
    lost = [run.name for run in runs if run.seed in points and points[run.seed] is None]
    if others and lost:
        warnings.warn(
            f"{', '.join(lost)}: no checkpoint, though others of the stack have one, so it starts from step 0; the "
            "files of the others stay as they are",
            RunWarning,
            stacklevel=3,
        )


def _step(point: Checkpoint | None) -> int:
    return 0 if point is None else point.step


class _Training:
    """The stack, with the run folder and the monitor of each of its seeds."""

    def __init__(
        self,
        job: Job,
        runs: Sequence[Run],
        points: Points,
        device: str | torch.device,
        observers: Observers,
        condition: Condition | None,
    ) -> None:
        self.job = job
        self.runs = {run.seed: run for run in runs}
        self.clock = Clock()
        self.observers = observers
        self.points = {run.seed: points[run.seed] for run in runs if run.done is None}
        first = min(_step(point) for point in self.points.values())
        seeds = [run.seed for run in runs if run.trains_after(first)]
        self.stack: AnyStack = stack_kind(job.config)(job.config, seeds, device=device, condition=condition)
        self.measures = Measures(job.config)
        self.monitors = {
            seed: SpectralEntropyMonitor(every=job.config.evaluate_every) for seed in self.points
        }
        self.saved = {seed: _step(point) for seed, point in self.points.items()}
        for seed, point in self.points.items():
            run, event = self.runs[seed], "start" if point is None else "resume"
            run.rewind(None if point is None else point.step)
            run.timing.append({"event": event, "step": _step(point), **self._now()})
        self._put_back(first)

    def run(self, checkpoint_every: int, stop: StopRequest | None) -> None:
        """Evaluate, end, save, stop or step, until no seed is left."""
        while self.stack.seeds:
            step = self.stack.steps_done
            self._evaluate(step)
            ended = {seed: reason for seed in self.stack.seeds if (reason := self._ending(seed, step))}
            asked = None if stop is None else stop.signal
            if ended or asked or step % checkpoint_every == 0:
                self._save(step)
            if ended:
                self._finish(ended, step)
            elif asked:
                name = signal.Signals(asked).name
                raise Interrupted(
                    asked, f"{name}: stopped after step {step}, saved; the same command goes on"
                )
            else:
                self.stack.train_step()
                self._put_back(step + 1)

    def _put_back(self, step: int) -> None:
        """Put back the state of each seed whose checkpoint is of `step`."""
        for seed, point in self.points.items():
            if point is not None and point.step == step:
                self.stack.load_state_dict(seed, point.tensors)
                self.monitors[seed].load_state_dict(point.state["monitor"])

    def _recorded(self, step: int) -> list[Run]:
        """Pick the runs of the stack whose record goes on at `step`: not complete, and not saved beyond it."""
        saved = self.saved
        return [self.runs[seed] for seed in self.stack.seeds if seed in saved and saved[seed] <= step]

    def _evaluate(self, step: int) -> None:
        due = [run for run in self._recorded(step) if run.evaluation_due(step) and run.last_row_step < step]
        if not due:
            return
        values = {name: column.tolist() for name, column in self.stack.evaluate().items()}
        further = self.measures(self.stack)
        before = time.perf_counter()
        entropies = spectral_entropy(self.stack.representations(), batch_dims=1).unbind()
        cost = {"monitor_seconds": time.perf_counter() - before, "seeds": len(entropies)}
        for run in due:
            at = self.stack.seeds.index(run.seed)
            self.monitors[run.seed].observe(step, entropies[at], layer=LAYER)
            (record,) = self.monitors[run.seed].flush()
            row: Row = {
                "step": step,
                **{name: column[at] for name, column in values.items()},
                "entropy": record.normalized,
                "entropy_status": record.status.value,
                "effective_rank": record.effective_rank,
                "participation_ratio": record.participation_ratio,
                **{name: column[at] for name, column in further.items()},
            }
            row = {key: _json_number(value) for key, value in row.items()}
            run.record(row)
            run.timing.append({"event": "evaluation", "step": step, **self._now(), **cost})
            self.observers.row(self.job, run.seed, row)

    def _ending(self, seed: int, step: int) -> str | None:
        """Why the run of `seed` ends at `step`, or None."""
        run, config = self.runs[seed], self.job.config
        if run.done is not None:
            return str(run.done["reason"]) if step >= run.done["steps"] else None
        if step < self.saved[seed]:
            return None
        if step >= config.max_steps:
            return "max_steps"
        if not run.evaluation_due(step):
            return None
        grokked = run.reached.t_grok_sustained
        return "grokked" if grokked is not None and step >= config.last_step(grokked) else None

    def _save(self, step: int) -> None:
        for run in self._recorded(step):
            if self.saved[run.seed] < step:
                state = {"monitor": self.monitors[run.seed].state_dict()}
                run.save(Checkpoint(step, self.stack.state_dict(run.seed), state))
                run.keep_newest(KEPT)
                self.saved[run.seed] = step

    def _finish(self, ended: dict[int, str], step: int) -> None:
        for run in self._recorded(step):
            if run.seed in ended:
                run.finish(step, ended[run.seed], self._now())
                self.observers.done(self.job, run.seed)
        self.stack.keep([seed for seed in self.stack.seeds if seed not in ended])

    def _now(self) -> dict[str, float]:
        time, seconds = self.clock.read()
        return {"time": time, "seconds": seconds}


def _json_number(value: Any) -> Any:
    """`value`, with None for NaN and infinities, which JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def _disk_errors_explained(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(
            f"cannot write {error.filename or out}: {error.strerror}. What was saved before is intact: make "
            "room or make it writable, and give the same command again"
        ) from error
