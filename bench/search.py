"""The search for the paper's setting: 96 choices of what its text leaves open, measured by the paper's own numbers.

``docs/search.md`` is the protocol, with the reason of every number here, and takes in the tables that follow from the
rows. ``python -m bench.search`` runs what is missing of it, can be killed at any instant and goes on by the same
command; ``--report`` writes the tables, ``--check`` compares them.

A run is the trainer's own, in a run folder under the scratch folder, stopped where its rung ends and resumed from
there. The rows are all that counts: one for each combination of stage 0, one for each (stage, point, seed, rung) with
all evaluations up to there, and one with the environment wherever that has changed.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import qmc

from bench.harness import ROOT, Row, read_rows
from fastent.entropy import spectral_entropy
from fastent.grokking.experiments.document import markdown_table, marked
from fastent.grokking.train.config import TrainConfig
from fastent.grokking.train.environment import describe_environment
from fastent.grokking.train.loop import train
from fastent.grokking.train.milestones import first, first_collapse
from fastent.grokking.train.runs import Job
from fastent.grokking.train.stack import Stack
from fastent.grokking.train.storage import Interrupted, JsonLines, RunLock, StopRequest

Changes = dict[str, Any]
Array = NDArray[np.float64]

BASE = replace(
    TrainConfig(),
    task="add",
    modulus=97,
    model="transformer",
    width=128,
    heads=4,
    feedforward=512,
    weight_decay=1.0,
    batch_size=512,
    probe_size=512,
    evaluate_every=100,
    max_steps=30_000,
    criterion=0.99,
    memorised=0.95,
    run_past_steps=1_200,
    run_past_share=0.0,
)
"""What all points share: the paper's own values, and the end of a run."""

_SMALL = 128**-0.5

ARCHITECTURE: tuple[tuple[Changes, ...], ...] = (
    (
        {"start": "torch", "init_scale": 1.0},
        {"start": "torch", "init_scale": _SMALL},
        {"start": "normal", "init_scale": _SMALL},
        {"start": "xavier", "init_scale": _SMALL},
    ),
    ({"norm_place": "post"}, {"norm_place": "pre"}),
    (
        {"final_norm": False, "entropy_at": "readout"},
        {"final_norm": True, "entropy_at": "readout"},
        {"final_norm": True, "entropy_at": "final_norm"},
    ),
    ({"activation": "relu"}, {"activation": "gelu"}),
    ({"readout": "last"}, {"readout": "mean"}),
    ({"equals_token": False}, {"equals_token": True}),
)
"""Choices, equally likely each, that decide H at step 0."""

TRAINING: tuple[tuple[Changes, ...], ...] = (
    ({"betas": [0.9, 0.98]}, {"betas": [0.9, 0.999]}),
    ({"sampling": "epochs"}, {"sampling": "replacement"}),
)

SOBOL_SEED, DRAWN = 13123, 2**12
POINTS, BRACKET, RUNGS = 96, 48, (2_000, 10_000, 30_000)
H_BOUNDS = (0.75, 0.83)
START_SEEDS, SEED, NEW_SEEDS = (1000, 1001, 1002, 1003), 1000, (1001, 1002, 1003, 1004)
BEST, SLOW = 8, 5e-4
CHECKPOINT_EVERY = 1_000


def combinations() -> list[Changes]:
    """All combinations of `ARCHITECTURE`, the last choice fastest."""
    return [_merged(parts) for parts in product(*ARCHITECTURE)]


@cache
def _drawn() -> list[tuple[str, Changes]]:
    """Draw the Sobol sequence: the key of the architecture, and all settings, of each point in its order."""
    choices = (*ARCHITECTURE, *TRAINING)
    generator = np.random.default_rng(SOBOL_SEED)
    found = []
    for u in qmc.Sobol(len(choices) + 2, scramble=True, seed=generator).random(DRAWN):
        picked = [options[int(x * len(options))] for options, x in zip(choices, u, strict=False)]
        settings = _merged(picked) | {"train_fraction": _fraction(u[-2]), "learning_rate": _rate(u[-1])}
        found.append((_key(_merged(picked[: len(ARCHITECTURE)])), settings))
    return found


def points(passing: Iterable[Changes]) -> list[Changes]:
    """List the settings of the first `POINTS` points of the Sobol sequence whose architecture is in `passing`."""
    keys = {_key(changes) for changes in passing}
    return [settings for key, settings in _drawn() if key in keys][:POINTS]


def _merged(parts: Iterable[Changes]) -> Changes:
    return {key: value for part in parts for key, value in part.items()}


def _fraction(u: float) -> float:
    return 0.2 if u < 0.5 else round(float(0.2 + 0.3 * (2 * u - 1)), 4)


def _rate(u: float) -> float:
    return 1e-3 if u < 0.25 else float(f"{10 ** (-4 + (u - 0.25) / 0.75):.3g}")


class Target(NamedTuple):
    """A number of the paper: how it is compared, and how far a single run may lie from it."""

    name: str
    paper: float
    deviation: float
    logarithm: bool = False
    side: int = 0  # 1 or -1: only a value above, or below, is a miss
    span: tuple[float, float] = (-math.inf, math.inf)  # of the paper's own seeds

    def z(self, value: float) -> float:
        """Deviations from the paper, cut at `MISSED`; a value that is not there is missed."""
        if math.isnan(value):
            return MISSED
        gap = math.log(value / self.paper) if self.logarithm else value - self.paper
        z = gap / self.deviation
        if z * self.side < 0:
            return 0.0
        return max(-MISSED, min(MISSED, z))


MISSED = 6.0
TARGETS = {
    target.name: target
    for target in (
        Target("T_mem", 920, 0.70, logarithm=True),
        Target("T_grok", 14_360, 0.35, logarithm=True),
        Target("H at 0", 0.785, 0.01, span=(0.775, 0.805)),
        Target("rise", 0.0, 0.02, side=1),
        Target("H*", 0.609, 0.023, span=(0.584, 0.654)),
        Target("fall", 0.039, 0.02),
        Target("growth", 1.0, 0.20, logarithm=True, side=-1),
        Target("r", -0.248, 0.30),
        Target("lead", 1_020, 0.20, logarithm=True),
    )
}
"""docs/search.md has the source of each number."""


@dataclass(frozen=True, eq=False)
class Trajectory:
    """Evaluations of a run up to the end of its rung, arrays of shape (m,), and the paper's quantities of it."""

    train: Array
    test: Array
    norm: Array
    h: Array

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Trajectory:
        """Take a row of the search; an entropy that a run does not have is NaN."""
        return cls(*(np.array(row[name], dtype=np.float64) for name in ("train", "test", "norm", "h")))

    @cached_property
    def step(self) -> Array:
        """Steps of the evaluations."""
        return np.arange(len(self.h)) * float(BASE.evaluate_every)

    @cached_property
    def t_mem(self) -> float:
        """T_mem, NaN where it is not reached."""
        return float(first(self.step, self.train >= BASE.memorised))

    @cached_property
    def t_grok(self) -> float:
        """T_grok, NaN where it is not reached."""
        return float(first(self.step, self.test >= BASE.criterion))

    @property
    def grokked(self) -> bool:
        """Whether there is a T_grok."""
        return not math.isnan(self.t_grok)

    @property
    def over(self) -> bool:
        """Whether the run has no steps to make."""
        return self.grokked or self.step[-1] >= BASE.max_steps

    @property
    def judged(self) -> slice:
        """Evaluations up to `run_past_steps` after T_grok: what r is taken of."""
        return slice(self._place(self.t_grok + BASE.run_past_steps) + 1)

    def quantities(self) -> dict[str, float]:
        """Value of each target; of what is open the best that the run may still reach, and NaN for what it missed."""
        found = {"H at 0": float(self.h[0]), "T_mem": self.t_mem, "T_grok": self.t_grok}
        upto = slice(None) if not self.grokked else slice(self._place(self.t_grok) + 1)
        # `fmax` ignores a NaN unless nothing else is there.
        found["rise"] = float(np.fmax.reduce(self.h[upto]) - self.h[0])
        memorised = not math.isnan(self.t_mem)
        found["growth"] = float(self.norm[self._place(self.t_mem)] / self.norm[0]) if memorised else math.nan
        collapse = math.nan
        if memorised:
            since = slice(self._place(self.t_mem), None)
            collapse = float(first_collapse(self.step[since], self.h[since]))
        if self.grokked:
            star = float(self.h[self._place(self.t_grok)])
            lead = self.t_grok - collapse
            return found | {
                "H*": star,
                "fall": star - float(self.h[self.judged][-1]),
                "r": correlation([self]),
                # Not before grokking, or never: as late as an evaluation can tell.
                "lead": lead if lead > 0 else float(BASE.evaluate_every),
            }
        after = float(self.step[-1]) + BASE.evaluate_every
        if self.over:
            late = {"T_grok": after, **({} if memorised else {"T_mem": after})}
            return found | late | dict.fromkeys(("H*", "fall", "r", "lead"), math.nan)
        best = {
            name: target.paper for name, target in TARGETS.items() if math.isnan(found.get(name, math.nan))
        }
        for name in ("T_mem", "T_grok"):
            if name in best:
                best[name] = max(best[name], after)
        if not math.isnan(collapse):
            best["lead"] = max(best["lead"], after - collapse)
        return found | best

    @cached_property
    def distance(self) -> float:
        """Distance from the paper; of a run with steps to make, the least that it may still have."""
        found = self.quantities()
        return sum(huber(target.z(found[name])) for name, target in TARGETS.items())

    def _place(self, step: float) -> int:
        """Place of the evaluation at `step`, or of the last one before."""
        return min(int(step) // BASE.evaluate_every, len(self.h) - 1)


def huber(z: float) -> float:
    """Half of z squared up to 1, straight beyond."""
    return z * z / 2 if abs(z) <= 1 else abs(z) - 0.5


def correlation(runs: Sequence[Trajectory]) -> float:
    """Pearson correlation of norm and H over the judged evaluations of all `runs`; NaN where it has none."""
    norm, h = (np.concatenate([getattr(run, name)[run.judged] for run in runs]) for name in ("norm", "h"))
    known = ~np.isnan(h)
    norm, h = norm[known], h[known]
    if len(h) < 2 or np.ptp(norm) == 0 or np.ptp(h) == 0:
        return math.nan
    return float(np.corrcoef(norm, h)[0, 1])


class Trial(NamedTuple):
    """What to train next: a run up to the end of a rung."""

    stage: int
    point: int
    seed: int
    rung: int


class Search:
    """The rows of a search and what follows from them: what to run next, which points are in, what was found."""

    def __init__(self, rows: Iterable[Row]) -> None:
        rows = list(rows)
        self.environments = [row for row in rows if "environment" in row]
        self.starts = {_key(row["settings"]): row for row in rows if row.get("stage") == 0}
        trained = [row for row in rows if row.get("stage") in (1, 2)]
        self.rows = {_trial(row): row for row in trained}
        self.runs = {trial: Trajectory.of(row) for trial, row in self.rows.items()}

    def unmeasured(self) -> list[Changes]:
        """List the combinations that stage 0 has still to measure."""
        return [changes for changes in combinations() if _key(changes) not in self.starts]

    @cached_property
    def passing(self) -> list[Changes]:
        """Combinations that pass stage 0."""
        low, high = H_BOUNDS
        found = [row for row in self.starts.values() if low <= float(np.mean(row["h"])) <= high]
        return [row["settings"] for row in found]

    @cached_property
    def points(self) -> list[Changes]:
        """Settings of all points; none before stage 0 is complete."""
        found = [] if self.unmeasured() else points(self.passing)
        for trial, row in self.rows.items():
            now = found[trial.point] if trial.point < len(found) else None
            if row["settings"] != now:
                raise ValueError(
                    f"the rows must be of this search's points; {trial} has {row['settings']}, which is now {now}: "
                    "give another --out, or the commit that the file names"
                )
        return found

    @cached_property
    def over(self) -> dict[int, Trajectory]:
        """Runs of stage 1 that came to their ends, by point, in order."""
        return {t.point: run for t, run in sorted(self.runs.items()) if t.stage == 1 and run.over}

    def entrants(self, bracket: range, rung: int) -> list[int] | None:
        """Points of `bracket` that run to `rung` (a place in `RUNGS`), in order; None as long as that is open."""
        if rung == 0:
            return list(bracket)
        before = self.entrants(bracket, rung - 1)
        if before is None:
            return None
        runs = {point: self.runs.get(Trial(1, point, SEED, RUNGS[rung - 1])) for point in before}
        known = {point: run for point, run in runs.items() if run is not None}
        if len(known) < len(runs):
            return None
        kept: list[int] = []
        for fast in (False, True):
            rates = {point: self.points[point]["learning_rate"] for point in known}
            rivals = [p for p, run in known.items() if not run.over and (rates[p] > SLOW) == fast]
            rivals.sort(key=lambda point: (known[point].distance, point))
            kept += rivals[: math.ceil(len(rivals) / 2)]
        return sorted(kept)

    def complete(self, bracket: range) -> bool:
        """Whether all runs of `bracket` have come to their ends."""
        last = self.entrants(bracket, len(RUNGS) - 1)
        return last is not None and all(Trial(1, p, SEED, RUNGS[-1]) in self.runs for p in last)

    def trials(self, count: int = POINTS) -> list[Trial]:
        """List what stage 1 has to run next for its first `count` points: what is missing of one rung."""
        for bracket in brackets(count):
            for place, rung in enumerate(RUNGS):
                for_rung = self.entrants(bracket, place)
                assert for_rung is not None  # the rung before is complete
                missing = [Trial(1, point, SEED, rung) for point in for_rung]
                missing = [trial for trial in missing if trial not in self.runs]
                if missing:
                    return missing
        return []

    def best(self) -> list[int]:
        """Points that stage 2 runs: the nearest that grokked, of the brackets that are complete."""
        there = {point for bracket in brackets(POINTS) if self.complete(bracket) for point in bracket}
        grokked = [
            (run.distance, point) for point, run in self.over.items() if run.grokked and point in there
        ]
        return [point for _, point in sorted(grokked)[:BEST]]

    def further_trials(self) -> list[Trial]:
        """List what stage 2 has still to run."""
        asked = [Trial(2, point, seed, RUNGS[-1]) for seed in NEW_SEEDS for point in self.best()]
        return [trial for trial in asked if trial not in self.runs]

    def verdict(self, point: int) -> Verdict | None:
        """Judge a point by stage 2; None before all of its seeds have run."""
        runs = [self.runs.get(Trial(2, point, seed, RUNGS[-1])) for seed in NEW_SEEDS]
        known = [run for run in runs if run is not None]
        return Verdict(known) if len(known) == len(runs) else None


def brackets(count: int) -> list[range]:
    """Points of each bracket among the first `count`."""
    return [range(low, min(low + BRACKET, count)) for low in range(0, count, BRACKET)]


class Verdict:
    """Four runs of a setting against the paper.

    Attributes
    ----------
    grokked : int
        How many did.
    distance : float
        Mean of their distances.
    values : dict of str to float
        Median of each target over the runs (r: pooled over their evaluations); NaN where not all grokked.
    missed : list of str
        Targets that the rule finds missed.
    """

    def __init__(self, runs: Sequence[Trajectory]) -> None:
        self.grokked = sum(run.grokked for run in runs)
        self.distance = float(np.mean([run.distance for run in runs]))
        found = [run.quantities() for run in runs]
        self.values = {name: float(np.median([values[name] for values in found])) for name in TARGETS}
        if self.grokked == len(runs):
            self.values["r"] = correlation(runs)
        self.missed = [
            name
            for name, target in TARGETS.items()
            if not (
                abs(target.z(self.values[name])) <= 2
                and target.span[0] <= self.values[name] <= target.span[1]
            )
        ]
        if self.grokked < len(runs) and "T_grok" not in self.missed:
            self.missed.append("T_grok")

    @property
    def joint(self) -> bool:
        """Whether the setting gives the paper's numbers jointly."""
        return not self.missed


def _key(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)


def _trial(row: Row) -> Trial:
    return Trial(*(row[name] for name in Trial._fields))


def measure_start(changes: Changes) -> Row:
    """Row of stage 0: H and the norm at step 0 of each seed."""
    stack = Stack(replace(BASE, **changes, train_fraction=0.2), START_SEEDS)
    h = [entropy.normalized for entropy in spectral_entropy(stack.representations(), batch_dims=1).unbind()]
    norms = stack.evaluate()["parameter_norm"].tolist()
    return {
        "stage": 0,
        "settings": changes,
        "seeds": list(START_SEEDS),
        "h": [round(value, 4) for value in h],
        "norm": [round(value, 3) for value in norms],
    }


class _End:
    """Observer that stops a run at the end of its rung, or when what is judged after T_grok is there."""

    def __init__(self, path: Path, rung: int, stop: StopRequest) -> None:
        self.path, self.rung, self.stop = path, rung, stop

    def row(self, job: Job, seed: int, row: Row) -> None:
        if ended(read_rows(self.path), job.config, self.rung) is not None:
            self.stop.signal = signal.SIGTERM

    def done(self, job: Job, seed: int) -> None: ...


def ended(rows: Sequence[Row], config: TrainConfig, rung: int) -> list[Row] | None:
    """Cut the rows of a run at its end or that of its rung; None if it is not there yet."""
    found = (row["step"] for row in rows if row["step"] <= rung and row["test_accuracy"] >= config.criterion)
    t_grok = next(found, None)
    end = rung if t_grok is None else config.last_step(t_grok)
    return [row for row in rows if row["step"] <= end] if rows and rows[-1]["step"] >= end else None


def evaluations(job: Job, scratch: Path, rung: int) -> list[Row]:
    """Train the only seed of `job` to `rung`, or to its end after grokking, from where its folder has it."""
    (seed,) = job.seeds
    path, stop = scratch / job.run_name(seed) / "metrics.jsonl", StopRequest()
    rows = ended(read_rows(path), job.config, rung)
    if rows is None:
        end = _End(path, rung, stop)
        with suppress(Interrupted):
            train(job, scratch, checkpoint_every=CHECKPOINT_EVERY, observers=[end], stop=stop)
        rows = ended(read_rows(path), job.config, rung)
    assert rows is not None
    return rows


def run_trial(trial: Trial, changes: Changes, scratch: Path) -> Row:
    """Train a run to the end of its rung and return its row."""
    start = time.thread_time()
    job = Job(f"point{trial.point:02}", "baseline", replace(BASE, **changes), (trial.seed,))
    rows = evaluations(job, scratch, trial.rung)
    return {
        **trial._asdict(),
        "settings": changes,
        "train": [_floor(row["train_accuracy"]) for row in rows],
        "test": [_floor(row["test_accuracy"]) for row in rows],
        # None where a run has diverged.
        "norm": [row["parameter_norm"] and float(f"{row['parameter_norm']:.5g}") for row in rows],
        "h": [row["entropy"] and round(row["entropy"], 4) for row in rows],
        "seconds": round(time.thread_time() - start, 1),
    }


def _floor(accuracy: float) -> float:
    """Four digits of an accuracy, never over a criterion that it did not reach."""
    return math.floor(accuracy * 1e4 + 1e-9) / 1e4


def _prepare_worker(parent: int) -> None:
    torch.set_num_threads(1)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    # A killed parent tells nobody; its successor would find the run folders locked.
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


class Runner:
    """What runs a search and appends its rows."""

    def __init__(self, out: Path, scratch: Path, workers: int) -> None:
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch.mkdir(parents=True, exist_ok=True)
        self.log, self.scratch, self.workers = JsonLines(out), scratch, workers

    @property
    def search(self) -> Search:
        """The search as its rows stand now."""
        return Search(self.log.rows)

    def append(self, row: Row) -> None:
        """Add a row, and before it the environment if that is not the last one recorded."""
        here = {"environment": describe_environment(), "base": json.loads(json.dumps(asdict(BASE)))}
        recorded = self.search.environments[-1:]
        if recorded != [here]:
            self.log.append(here)
        self.log.append(row)

    def stage_0(self) -> None:
        """Measure every combination at step 0."""
        for changes in self.search.unmeasured():
            self.append(measure_start(changes))

    def stage_1(self, count: int) -> None:
        """Run the first `count` points, rung by rung."""
        if self.search.unmeasured():
            raise SystemExit("stage 1 needs all of stage 0: run --stage 0 first")
        self._run_while(lambda search: search.trials(count))

    def stage_2(self) -> None:
        """Run the new seeds of the best points."""
        if not any(self.search.complete(bracket) for bracket in brackets(POINTS)):
            raise SystemExit(
                "stage 2 needs a complete bracket: run --stage 1 first, or --stage 1 --points 48"
            )
        self._run_while(Search.further_trials)

    def _run_while(self, missing: Callable[[Search], list[Trial]]) -> None:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(self.workers, context, _prepare_worker, (os.getpid(),)) as pool:
            while trials := missing(search := self.search):
                running = [pool.submit(run_trial, t, search.points[t.point], self.scratch) for t in trials]
                try:
                    for future in as_completed(running):
                        self.append(future.result())
                        print(_line(self.log.rows[-1]), flush=True)
                except BaseException:
                    for future in running:
                        future.cancel()
                    raise


def _line(row: Row) -> str:
    run = Trajectory.of(row)
    shown = {"distance": run.distance, **run.quantities()}
    return f"{_trial(row)} {len(run.h) - 1} evaluations, {row['seconds']:.0f} s: " + ", ".join(
        f"{name} {value:.4g}" for name, value in shown.items()
    )


DOCUMENT = ROOT / "docs" / "search.md"
ROWS = ROOT / "bench" / "results" / "search.jsonl"
SHOWN = 12
_COLUMNS = [f"`{name}`" for name in TARGETS]
_NEXT = "`python -m bench.search --workers 2 --out bench/results/search.jsonl` goes on."


def results(search: Search) -> str:
    """Say in Markdown what was found so far: outcome, work done, stage 0, targets, ranking, stage 2."""
    if not search.starts:
        return f"No run yet. {_NEXT}\n"
    parts = [outcome(search), _work(search), _stage_0(search)]
    if search.over:
        parts += [_targets(search.over), _ranking(search)]
    verdicts = {point: found for point in search.best() if (found := search.verdict(point))}
    if verdicts:
        parts.append(_verdicts(search, verdicts))
    return "\n" + "\n\n".join(parts) + "\n\n"


def outcome(search: Search) -> str:
    """Decide by the protocol's rule, or say that it is open."""
    whole = [bracket for bracket in brackets(POINTS) if search.complete(bracket)]
    best = search.best() if whole else []
    verdicts = {point: found for point in best if (found := search.verdict(point))}
    if not best or len(verdicts) < len(best):
        trained = len({trial.point for trial in search.runs if trial.stage == 1})
        return (
            f"**Open.** {trained} of {POINTS} points have begun, {len(whole)} of {len(brackets(POINTS))} brackets are "
            f"complete, stage 2 has {len(verdicts)} of {BEST} settings. {_NEXT}"
        )
    order = sorted(best, key=lambda point: (verdicts[point].distance, point))
    joint = [point for point in order if verdicts[point].joint]
    asked = f"{sum(map(len, whole))} settings"
    if joint:
        return f"**Point {joint[0]} gives the paper's numbers jointly**, of {asked}: {words(search.points[joint[0]])}."
    nearest = "; ".join(
        f"point {point} ({words(search.points[point])}) misses {_names(verdicts[point].missed)}"
        for point in order[:2]
    )
    return f"**No setting of {asked} gives the paper's numbers jointly.** The nearest two: {nearest}."


def words(changes: Changes) -> str:
    """Put the settings of a point in a few words."""
    start = changes["start"]
    if start != "normal":
        start += " 1" if changes["init_scale"] == 1 else " d^-1/2"
    final = {"readout": "final norm, H before it", "final_norm": "final norm, H after it"}
    return ", ".join(
        (
            f"start {start}",
            f"{changes['norm_place']}-norm",
            final[changes["entropy_at"]] if changes["final_norm"] else "no final norm",
            {"relu": "ReLU", "gelu": "GELU"}[changes["activation"]],
            f"{changes['readout']} of {'a, b, =' if changes['equals_token'] else 'a, b'}",
            f"beta2 {changes['betas'][1]:g}",
            changes["sampling"],
            f"fraction {changes['train_fraction']:g}",
            f"lr {changes['learning_rate']:g}",
        )
    )


def _work(search: Search) -> str:
    lines: list[tuple[object, ...]] = [
        ("stage 0: H at step 0", f"{len(search.starts)} of {len(combinations())}", 0, "")
    ]
    for number, bracket in enumerate(brackets(POINTS), 1):
        for place, rung in enumerate(RUNGS):
            for_rung = search.entrants(bracket, place) if search.points else None
            trials = [Trial(1, point, SEED, rung) for point in for_rung or ()]
            lines.append(_work_line(search, f"bracket {number}, to {rung:,}", trials, for_rung is not None))
    trials = [Trial(2, point, seed, RUNGS[-1]) for seed in NEW_SEEDS for point in search.best()]
    lines.append(_work_line(search, "stage 2", trials, bool(trials)))
    return "Done:\n\n" + markdown_table(("part", "runs", "steps in them", "core hours"), lines, (2, 3))


def _work_line(search: Search, name: str, trials: Sequence[Trial], known: bool) -> tuple[object, ...]:
    done = [trial for trial in trials if trial in search.rows]
    steps = sum(int(search.runs[trial].step[-1]) for trial in done)
    hours = sum(search.rows[trial]["seconds"] for trial in done) / 3600
    return name, f"{len(done)} of {len(trials) if known else '?'}", f"{steps:,}", f"{hours:.2f}"


def _stage_0(search: Search) -> str:
    low, high = H_BOUNDS
    mean = {key: float(np.mean(row["h"])) for key, row in search.starts.items()}
    lines = []
    for options in ARCHITECTURE:
        for changes in options:
            with_it = [
                mean[key] for key, row in search.starts.items() if changes.items() <= row["settings"].items()
            ]
            if with_it:
                lines.append(
                    (
                        ", ".join(
                            f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
                            for key, value in changes.items()
                        ),
                        f"{sum(low <= value <= high for value in with_it)} of {len(with_it)}",
                        f"{min(with_it):.3f} to {max(with_it):.3f}",
                    )
                )
    return (
        f"Stage 0: {len(search.passing)} of {len(search.starts)} combinations start with H in [{low}, {high}].\n\n"
        + markdown_table(("choice", "pass", "H at step 0"), lines)
    )


def _targets(runs: Mapping[int, Trajectory]) -> str:
    found = [run.quantities() for run in runs.values()]
    lines = []
    for name, target in TARGETS.items():
        values = np.array([values[name] for values in found])
        within = sum(abs(target.z(value)) <= 2 for value in values)
        known = values[~np.isnan(values)]
        spread = (
            " / ".join(_shown(name, value) for value in np.quantile(known, (0, 0.5, 1)))
            if len(known)
            else "-"
        )
        lines.append((f"`{name}`", _shown(name, target.paper), f"{within} of {len(values)}", spread))
    return (
        f"The {len(runs)} runs of stage 1 that came to their end ({sum(run.grokked for run in runs.values())} of them "
        "grokked), target by target:\n\n"
        + markdown_table(("target", "paper", "runs within two deviations", "least / median / largest"), lines)
    )


def _shown(name: str, value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:,.0f}" if name in ("T_mem", "T_grok", "lead") else f"{value:.3f}"


def _ranking(search: Search) -> str:
    runs = search.over
    order = sorted(runs, key=lambda point: (not runs[point].grokked, runs[point].distance, point))
    lines = [
        (
            point,
            f"{runs[point].distance:.1f}",
            *_values(runs[point].quantities()),
            words(search.points[point]),
        )
        for point in order[:SHOWN]
    ]
    return f"The {len(lines)} of these nearest to the paper (seed {SEED}):\n\n" + markdown_table(
        ("point", "distance", *_COLUMNS, "settings"), lines
    )


def _names(targets: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in targets)  # `H*` twice in a line would be emphasis


def _values(values: Mapping[str, float]) -> list[str]:
    return [_shown(name, values[name]) for name in TARGETS]


def _verdicts(search: Search, verdicts: Mapping[int, Verdict]) -> str:
    order = sorted(verdicts, key=lambda point: (verdicts[point].distance, point))
    lines = [
        (
            point,
            f"{verdicts[point].grokked} of {len(NEW_SEEDS)}",
            f"{verdicts[point].distance:.1f}",
            *_values(verdicts[point].values),
            _names(verdicts[point].missed) or "nothing",
        )
        for point in order
    ]
    header = ("point", "grokked", "distance", *_COLUMNS, "missed")
    return f"Stage 2, medians of seeds {NEW_SEEDS[0]} to {NEW_SEEDS[-1]}:\n\n" + markdown_table(header, lines)


def fill(text: str, rows: Iterable[Row]) -> str:
    """Return `text` with the marked part made anew from `rows`."""
    return marked(text, "search", lambda name: results(Search(rows)))


def main(argv: list[str] | None = None) -> int:
    """Run what is missing, or write or compare what follows from the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", type=int, choices=(0, 1, 2))
    parser.add_argument("--points", type=int, default=POINTS, help="of stage 1; 48 is its first bracket")
    parser.add_argument("--workers", type=int, default=1, help="processes, one thread each")
    parser.add_argument("--out", type=Path, default=ROWS)
    parser.add_argument("--scratch", type=Path, default=ROOT / "runs" / "search")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args(argv)
    if given.report or given.check:
        text = DOCUMENT.read_text()
        filled = fill(text, read_rows(given.out))
        if given.check:
            return int(filled != text)
        DOCUMENT.write_text(filled)
        return 0
    torch.set_num_threads(1)
    runner = Runner(given.out, given.scratch, given.workers)
    stages = (runner.stage_0, lambda: runner.stage_1(given.points), runner.stage_2)
    with RunLock(given.scratch):
        for stage in stages if given.stage is None else stages[given.stage : given.stage + 1]:
            stage()
    return 0


if __name__ == "__main__":
    sys.exit(main())
