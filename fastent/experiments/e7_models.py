"""One model of E7: its runs, what each of them does, and the signals that come before grokking."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fastent.experiments import leads
from fastent.experiments.claims import steps
from fastent.experiments.columns import column, over, values_at
from fastent.experiments.delays import Group
from fastent.experiments.e1_baseline import paper_window
from fastent.experiments.statistics import Estimate, proportion
from fastent.experiments.stored import StoredRun
from fastent.train.presets import TrainConfig
from fastent.train.quantities import WINDOW, Array, MeasuredRun, first_reaching
from fastent.train.tasks import make_task

NEAR_ZERO = 0.1
"""Test accuracy that still counts as near 0; chance is about 0.01."""

OUTCOMES = (
    "collapses, does not generalise",
    "groks",
    "half-way",
    "dips, does not generalise",
    "does not collapse",
    "does not memorise",
    "does not generalise, no H* to judge by",
)
"""What a run can do; the first is what the paper says of its MLP. Half-way: test accuracy above 0.1, not grokked. Dips:
H falls below H* and is back above it over the last evaluations; collapses: it stays."""

COLLAPSES, DIPS = OUTCOMES[0], OUTCOMES[3]

LAST = 5
"""Evaluations at the end of a run whose median H says whether it has collapsed."""


@dataclass(frozen=True)
class Model:
    """The runs of one model, `outcomes` as in `OUTCOMES` and `below` the first step with H under H*, by run."""

    label: str
    group: Group
    below: tuple[int | None, ...]
    outcomes: tuple[str, ...]

    @property
    def holds(self) -> Estimate:
        """Share of its runs that do what the paper says of its MLP."""
        return proportion(self.outcomes.count(COLLAPSES), len(self.outcomes))

    def at_end(self, name: str) -> list[float | None]:
        """Values of a column at the end of each run."""
        ends = [run.summary.last_step for run in self.group.measured]
        return values_at(self.group.stored, self.group.measured, name, ends)

    def at_mem(self, name: str) -> list[float | None]:
        """Values of a column at T_mem of each run."""
        ends = [run.summary.t_mem for run in self.group.measured]
        return values_at(self.group.stored, self.group.measured, name, ends)

    def aligned(self) -> list[int | None]:
        """First step of each run from which the alignment exceeds its null twice in a row after T_mem."""
        return [
            None
            if run.summary.t_mem is None
            else _twice(run, column(stored, "alignment"), _null_of(stored, run))
            for stored, run in zip(self.group.stored, self.group.measured, strict=True)
        ]

    def signals(self) -> dict[str, list[int | None]]:
        """Date, by what it is in words, each thing that may say that a run will grok: a step for each run."""
        runs = list(zip(self.group.stored, self.group.measured, strict=True))
        falls = leads.collapse(self.group.measured, window=paper_window(self.group.measured) or WINDOW)
        chance = [math.log(_classes(stored)) for stored, _ in runs]
        return {
            "alignment above its null": self.aligned(),
            "half of the variance between labels in five frequencies": [
                _twice(run, column(stored, "top_share"), 0.5) for stored, run in runs
            ],
            "restricted loss below half of chance": [
                _twice(run, _negative(column(stored, "restricted_loss")), -loss / 2)
                for (stored, run), loss in zip(runs, chance, strict=True)
            ],
            falls.source: list(falls.times),
            "H below the Transformers' H*": list(self.below),
        }


def _null_of(stored: StoredRun, run: MeasuredRun) -> Array:
    """Return the alignment's null from T_mem on; before, nothing exceeds it."""
    null = column(stored, "alignment_null")
    missing = np.full(len(run.trajectory.step), np.inf)
    return (
        missing if null is None else np.where(run.trajectory.step >= (run.summary.t_mem or 0), null, np.inf)
    )


def _negative(values: Array | None) -> Array | None:
    return None if values is None else -values


def _twice(run: MeasuredRun, values: Array | None, level: Array | float) -> int | None:
    """Step of the first of two evaluations in a row with values above `level`; None if there is none."""
    if values is None:
        return None
    return first_reaching(run.trajectory.step, np.where(values > level, 1.0, 0.0), 1.0, in_a_row=2)


def _classes(run: StoredRun) -> int:
    return make_task(TrainConfig(**run.config)).classes


def outcome_of(run: MeasuredRun, h_star: Estimate | None) -> str:
    """Say which of `OUTCOMES` a run has, H* being the Transformers' mean; None if there is none."""
    collapses, groks, half_way, dips, stays, never, unjudged = OUTCOMES
    entropy = run.trajectory.entropy[~np.isnan(run.trajectory.entropy)]
    if run.summary.t_grok is not None:
        return groks
    if run.summary.t_mem is None:
        return never
    if np.nanmax(run.trajectory.test_accuracy) > NEAR_ZERO:
        return half_way
    if h_star is None or entropy.size == 0:
        return unjudged
    if np.median(entropy[-LAST:]) < h_star.value:
        return collapses
    return dips if entropy.min() < h_star.value else stays


def told(model: Model) -> str:
    """Say how many runs of a model do what, with the mean T_grok: "5 of 5 groks, T_grok 12,000 on average"."""
    parts = []
    for outcome in OUTCOMES:
        count = model.outcomes.count(outcome)
        if count:
            parts.append(f"{count} of {len(model.outcomes)} {outcome}")
    times = over([run.summary.t_grok for run in model.group.measured])
    if times is not None:
        parts.append(f"T_grok {steps(times.value)} on average")
    return ", ".join(parts)
