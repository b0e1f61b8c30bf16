"""The time that planned runs would take, from the clocks of runs on this machine or from a short trial.

Seconds of a step and seed, its share of the evaluations included, are read from the timing of runs in the folder whose
steps are of the same size (`SIZES`), on the same device, processor and number of threads; else a few seconds of
training are timed here, one process at a time, without a checkpoint.

How many steps a run makes nobody knows before: at most its limit, and fewer if it groks. Where complete runs of the
same settings lie in the folder, their mean is given beside. What is not in it: other programs, the other workers' share
of caches and memory, waits for runs that are followed, and what following them costs (up to twice).
"""

from __future__ import annotations

import contextlib
import heapq
import json
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean, quantiles
from typing import Any

import torch

from fastent.entropy import spectral_entropy
from fastent.grokking.train.checkpoint import checkpoint_steps
from fastent.grokking.train.conditions import followed, make_condition
from fastent.grokking.train.environment import describe_environment
from fastent.grokking.train.measures import Measures
from fastent.grokking.train.modules import stack_kind
from fastent.grokking.train.registry import BUILT_IN, names_in
from fastent.grokking.train.runs import Job, check_rows, read_done, read_record
from fastent.grokking.train.storage import RunError, read_object, read_rows

TRIAL_SECONDS = 4.0
"""Of all trials together; each takes `LEAST_SECONDS` though."""

LEAST_SECONDS = 0.2

SIZES = (
    *("model", "modulus", "separate_tokens", "operand_tokens", "equals_token"),
    *("readout", "norm_place", "final_norm", "layers", "width", "heads", "feedforward", "hidden", "combine"),
    *("batch_size", "evaluate_every", "probe_size", "measures"),
)
"""Settings that decide what a step costs, as far as they matter; beside them S5, and whether the condition mixes."""


@dataclass(frozen=True)
class Speed:
    """Seconds of a step and seed, evaluations included: the median, and the tenth and ninetieth percentile."""

    seconds: float
    low: float
    high: float
    recorded: bool

    @classmethod
    def of(cls, seconds: Sequence[float], *, recorded: bool) -> Speed:
        """From several stretches of steps."""
        tenths = quantiles(seconds, n=10) if len(seconds) > 1 else [seconds[0]] * 9
        return cls(tenths[4], tenths[0], tenths[8], recorded)


@dataclass(frozen=True)
class Expected:
    """What planned jobs would be.

    Attributes
    ----------
    complete, begun, new, stacks : int
        Runs of each kind, and the stacks that they are trained in.
    most : int
        Steps that are left if no run ends before its limit.
    likely : int or None
        Steps that are left if runs end when the complete ones of their settings did; None where one has none.
    speeds : tuple of Speed
        Of each kind of job that has steps left.
    longest, usual : (float, float)
        Seconds for `most` and for `likely` steps, from the tenth percentile of the speeds to the ninetieth.
    groups : mapping
        The same of each of several settings, as if it were trained alone.
    """

    complete: int
    begun: int
    new: int
    stacks: int
    most: int
    likely: int | None
    speeds: tuple[Speed, ...]
    longest: tuple[float, float]
    usual: tuple[float, float]
    groups: Mapping[str, Expected] = field(default_factory=dict)

    @property
    def runs(self) -> int:
        """Count them all."""
        return self.complete + self.begun + self.new


def expect(
    jobs: Sequence[Job],
    out: Path,
    *,
    workers: int,
    device: str,
    groups: Mapping[str, Sequence[Job]] | None = None,
) -> Expected:
    """Estimate what `jobs` (stacks, of `plan_stacks`) would take; nothing is written.

    Parameters
    ----------
    jobs : sequence of Job
    out : Path
        Folder of the run folders, which need not be there.
    workers : int
        Stacks trained at a time.
    device : str
        As torch names it.
    groups : mapping, optional
        `jobs` by what sets them apart, where they are of several settings.
    """
    threads = torch.get_num_threads()
    own = max(1, threads // workers)
    seen = _Recorded(out, {**describe_environment(device), "threads": own})
    states = {job: [_state(out / job.run_name(seed)) for seed in job.seeds] for job in jobs}
    left = {job: [0 if done else job.config.max_steps - at for done, at in states[job]] for job in jobs}
    ends = {job: seen.end(job) for job in jobs}
    usual = {
        job: [0 if done else max(0, end - at) for done, at in states[job]]
        for job, end in ends.items()
        if end is not None
    }
    kind = {job: _kind(job.settings(), job.condition) for job in jobs}
    kinds = {kind[job]: job for job in jobs if sum(left[job])}
    speeds = {each: found for each, job in kinds.items() if (found := seen.speed(job)) is not None}
    unknown = [each for each in kinds if each not in speeds]
    torch.set_num_threads(own)
    try:
        for each in unknown:
            budget = max(LEAST_SECONDS, TRIAL_SECONDS / len(unknown))
            speeds[each] = trial(kinds[each], out, device, budget)
    finally:
        torch.set_num_threads(threads)

    def seconds(steps: Mapping[Job, Sequence[int]], chosen: Sequence[Job]) -> tuple[float, float]:
        low, high = (
            makespan(
                (
                    sum(steps[job]) * getattr(speeds[kind[job]], bound) if sum(steps[job]) else 0.0
                    for job in chosen
                ),
                workers,
            )
            for bound in ("low", "high")
        )
        return low, high

    def of(chosen: Sequence[Job]) -> Expected:
        flat = [each for job in chosen for each in states[job]]
        known = all(job in usual for job in chosen)
        return Expected(
            complete=sum(done for done, _ in flat),
            begun=sum(at > 0 and not done for done, at in flat),
            new=sum(at == 0 and not done for done, at in flat),
            stacks=len(chosen),
            most=sum(sum(left[job]) for job in chosen),
            likely=sum(sum(usual[job]) for job in chosen) if known else None,
            speeds=tuple({kind[job]: speeds[kind[job]] for job in chosen if kind[job] in speeds}.values()),
            longest=seconds(left, chosen),
            usual=seconds(usual, chosen) if known else (0.0, 0.0),
        )

    return replace(of(jobs), groups={name: of(group) for name, group in (groups or {}).items()})


def makespan(costs: Iterable[float], workers: int) -> float:
    """Return when the last of several tasks ends that `workers` take in turn.

    Examples
    --------
    >>> makespan([3.0, 1.0, 1.0, 2.0], 2)
    4.0
    """
    free = [0.0] * workers
    for cost in costs:
        heapq.heapreplace(free, free[0] + cost)
    return max(free)


def _kind(settings: Mapping[str, Any], condition: str) -> str:
    """Tell apart what takes another time a step."""
    mixing = re.match(r"losses-\d|logits-\d", condition)
    guests = [name for name in names_in(condition) if name not in BUILT_IN["condition"]]
    if settings["task"] not in BUILT_IN["task"]:
        guests.append(settings["task"])
    sizes = [settings.get(name) for name in SIZES]
    return json.dumps([sizes, settings["task"] == "s5", mixing and mixing[0][:6], guests])


def _state(path: Path) -> tuple[bool, int]:
    """Whether a run is complete, and the step of the checkpoint from which it goes on."""
    steps = checkpoint_steps(path) if path.is_dir() else []
    return (path / "DONE").exists(), max(steps, default=0)


class _Recorded:
    """What runs in a folder took that were trained on this machine."""

    def __init__(self, out: Path, environment: dict[str, Any]) -> None:
        self._runs: list[tuple[Path, dict[str, Any], dict[str, Any] | None]] = []
        for path in sorted(each.parent for each in out.glob("*/config.json")):
            # A run that cannot be read tells nothing of time.
            with contextlib.suppress(OSError, RunError):
                if (record := read_record(path)) is not None and "task" in record["config"]:
                    self._runs.append((path, record, read_done(path)))
        self._environment = environment

    def end(self, job: Job) -> int | None:
        """Mean step at which the complete runs of its settings ended; None without any."""
        asked = {**job.settings(), "measures": None}
        ends = [
            done["steps"]
            for _, record, done in self._runs
            if {**record["config"], "measures": None} == asked and record["condition"] == job.condition
            if done is not None
        ]
        return round(fmean(ends)) if ends else None

    def speed(self, job: Job) -> Speed | None:
        """Speed of steps of its size on this machine; None if none were made here."""
        kind, found = _kind(job.settings(), job.condition), list[float]()
        for path, record, _ in self._runs:
            if _kind(record["config"], record["condition"]) == kind:
                with contextlib.suppress(OSError, RunError):
                    recorded = read_object(path / "environment.json", "") or {}
                    if all(
                        recorded.get(key) == self._environment[key] for key in ("cpu", "threads", "device")
                    ):
                        found += _stretches(read_rows(path / "timing.jsonl", 0)[0])
        return Speed.of(found, recorded=True) if found else None


def _stretches(rows: Sequence[dict[str, Any]]) -> list[float]:
    """Seconds of a step and seed between one evaluation and the next of the same execution."""
    check_rows(Path("timing.jsonl"), rows)
    return [
        (row["seconds"] - before["seconds"]) / ((row["step"] - before["step"]) * row["seeds"])
        for before, row in pairwise(rows)
        if before.get("event") == row.get("event") == "evaluation" and row["step"] > before["step"]
        if row.get("seeds") and None not in (row.get("seconds"), before.get("seconds"))
    ]


BLOCK = 5
"""Steps that are timed together."""


def trial(job: Job, out: Path, device: str, budget: float) -> Speed:
    """Time some steps of `job`, for `budget` seconds, and an evaluation; nothing is written.

    On a CPU the seeds of a stack take turns, and one of them is timed; else all of them are.
    """
    seeds = job.seeds if stack_kind(job.config).shares_launches(device) else job.seeds[:1]
    condition = None if followed(job.condition) else make_condition(job, out, device)
    stack = stack_kind(job.config)(job.config, seeds, device, condition)
    measures = Measures(job.config)

    def evaluation() -> None:
        stack.evaluate()
        measures(stack)
        spectral_entropy(stack.representations(), batch_dims=1).unbind()

    def timed(work: Callable[[], object], times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            work()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) / (times * len(seeds))

    timed(stack.train_step, BLOCK)
    evaluation()
    share = timed(evaluation, 1) / job.config.evaluate_every
    end, blocks = time.perf_counter() + budget, [timed(stack.train_step, BLOCK)]
    while time.perf_counter() < end:
        blocks.append(timed(stack.train_step, BLOCK))
    return Speed.of([block + share for block in blocks], recorded=False)


def describe(found: Expected, *, workers: int, out: Path) -> list[str]:
    """Say what is expected, in lines, the last ones of each of several settings."""
    kinds = [
        f"{count} {word}"
        for count, word in ((found.complete, "complete"), (found.begun, "to go on"), (found.new, "new"))
        if count
    ]
    at_once = f", {workers} at a time" if workers > 1 else ""
    stacks = f"{found.stacks} stack{'s' * (found.stacks > 1)}"
    lines = [f"{_runs(found)} in {stacks}{at_once}: {', '.join(kinds)}"]
    if not found.most:
        return [*lines, "nothing is left to train"]
    lines.append(f"steps: at most {found.most:,}")
    if found.likely is not None:
        lines[-1] += (
            f"; about {found.likely:,} if runs end when the complete ones of their settings in {out} did"
        )
    else:
        lines[-1] += (
            f"; fewer where runs grok, and {out} has no complete run of each setting to tell how many"
        )
    timed = sum(not speed.recorded for speed in found.speeds)
    ways = [
        f"{count} kind{'s' * (count > 1)} of job {way}"
        for count, way in (
            (len(found.speeds) - timed, f"recorded in {out} on this machine"),
            (timed, "timed just now, alone on the machine"),
        )
        if count
    ]
    fast, slow = min(s.low for s in found.speeds), max(s.high for s in found.speeds)
    lines.append(f"speed: {1e3 * fast:,.1f} to {1e3 * slow:,.1f} ms a step and seed ({'; '.join(ways)})")
    lines.append(f"time: {_time(found)}")
    lines.append(
        "not counted: other programs, workers in each other's way, and what conditions cost that follow other runs"
    )
    if len(found.groups) > 1:
        lines.append("each setting alone:")
        lines += [f"  {name}: {_runs(group)}, {_time(group)}" for name, group in found.groups.items()]
    return lines


def _runs(found: Expected) -> str:
    return f"{found.runs} run{'s' * (found.runs != 1)}"


def _time(found: Expected) -> str:
    if not found.most:
        return "nothing left to train"
    said = f"{_between(*found.longest)} if every run goes to its limit"
    return said + (f", {_between(*found.usual)} by the complete runs" if found.likely is not None else "")


def _between(low: float, high: float) -> str:
    a, b = duration(low), duration(high)
    (number, unit), (_, other) = a.split(), b.split()
    return a if a == b else f"{number} to {b}" if unit == other else f"{a} to {b}"


def duration(seconds: float) -> str:
    """Write a time to two digits or so.

    Examples
    --------
    >>> duration(48.2), duration(250), duration(7_500), duration(200_000)
    ('48 s', '4 min', '2.1 h', '2.3 days')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6_000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3_600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.1f} days"
