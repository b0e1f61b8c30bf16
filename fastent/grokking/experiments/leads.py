"""Leads of the entropy over grokking: five ways to say when it "fell", and a sweep over the threshold.

A lead depends on where ``H*`` came from, so every result here says it:

- `own_threshold`: the run's own entropy at its grokking. Circular, and not usable ahead of time.
- `in_sample_threshold`: the mean of all seeds, the run's own among them. The paper's.
- `left_out_threshold`: the mean of the other seeds. What a monitor could have known.
- `collapse`: no threshold; the first fall by more than tau within a window, from T_mem on.
- `paper_collapse`: the paper's window, the value now against the value five evaluations before, from T_mem on.

A run that groks and never crosses counts as not preceded; a run that does not grok has no lead and takes part
in false alarms alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from fastent.grokking.experiments.data import Runs
from fastent.grokking.experiments.statistics import (
    UNKNOWN,
    Array,
    Estimate,
    Mask,
    mean_known,
    over,
    proportion,
    share,
)
from fastent.grokking.train.milestones import TAU, WINDOW

HORIZON = 1000
"""Steps within which an alarm must come true: the paper's "grokking imminent (1,000 steps)" (Table 5)."""

SPAN = 800
"""Steps that five evaluations span on the paper's grid, 200 steps apart."""

PAPER_SPAN = 1000
"""Steps of the paper's "5-step rolling window": five evaluations, "1,000 steps" where it speaks of S5."""

LAST = 5
"""Evaluations at the end of a run whose median H says whether a fall lasted."""


@dataclass(frozen=True, eq=False)
class Leads:
    """Leads of all runs by one rule, arrays of shape (n,) in the order of the runs, NaN where a run has none.

    `thresholds` are normalised entropies, `times` steps of the signal, `leads` steps from the signal to grokking.
    `preceding` is the share of grokked runs whose lead is positive, of those with a usable H and, for a crossing, a
    threshold (of one run alone there is none from other seeds), `mean` the mean lead of those that grokked and gave
    the signal at all (negative leads included). `lasting` is the share of the runs with a collapse, grokked or not,
    whose H ends (median of the last five evaluations) more than tau below the level it fell from; crossings have none.
    """

    rule: str
    source: str
    thresholds: Array
    times: Array
    leads: Array
    preceding: Estimate
    mean: Estimate
    lasting: Estimate = UNKNOWN


def own_threshold(runs: Runs) -> Leads:
    """Lead of the crossing of each run's own ``H*``: circular, for comparison."""
    return _crossing("own run", "the run's own H at T_grok (circular)", runs, runs.h_star)


def in_sample_threshold(runs: Runs) -> Leads:
    """Lead of the crossing of the mean ``H*`` of all runs that grokked, as in the paper."""
    everyone = np.full(len(runs), mean_known(runs.h_star))
    return _crossing("all seeds", "mean H* of the same seeds (the paper's)", runs, everyone)


def left_out_threshold(runs: Runs) -> Leads:
    """Lead of the crossing of the mean ``H*`` of the other runs that grokked."""
    others = np.array([mean_known(np.delete(runs.h_star, i)) for i in range(len(runs))])
    return _crossing("other seeds", "mean H* of the other seeds (leave-one-out)", runs, others)


def collapse(runs: Runs, *, tau: float = TAU) -> Leads:
    """Lead of the first fall by more than `tau` below the largest H of the last 800 steps, from T_mem on."""
    window, said = 1 + _evaluations(runs, SPAN, WINDOW - 1), f"{SPAN} steps"
    if window == WINDOW and set(runs.setting("evaluate_every")) != {SPAN // (WINDOW - 1)}:
        said = f"{WINDOW} evaluations"
    source = f"a fall of H by more than {tau:g} within {said} (our T_collapse)"
    at = np.arange(runs.step.shape[1])
    return _fall(source, runs, runs.first_collapse(tau, window), lambda i: (at <= i) & (at > i - window), tau)


def paper_collapse(runs: Runs, *, tau: float = TAU) -> Leads:
    """Lead of the first H more than `tau` below H 1,000 steps before, both from T_mem on: the paper's T_collapse."""
    lag = _evaluations(runs, PAPER_SPAN, WINDOW)
    h, at = runs.memorised_entropy, np.arange(runs.step.shape[1])
    fell = np.zeros(h.shape, dtype=bool)
    fell[:, lag:] = h[:, :-lag] - h[:, lag:] > tau
    source = f"H lower by more than {tau:g} than {PAPER_SPAN:,} steps before (the paper's T_collapse)"
    return _fall(source, runs, runs.first(fell), lambda i: at == i - lag, tau)


def _evaluations(runs: Runs, span: int, otherwise: int) -> int:
    """Count the evaluations in `span` steps; `otherwise` if it is no multiple of them or grids differ."""
    every = {int(value) for value in runs.setting("evaluate_every")}
    return otherwise if len(every) != 1 or span % (only := every.pop()) else span // only


def _fall(source: str, runs: Runs, times: Array, fell_from: Callable[[int], Mask], tau: float) -> Leads:
    """Leads of falls at `times`, from the largest H where `fell_from` holds for the index of the fall."""
    lasts = []
    for h, step, time in zip(runs.memorised_entropy, runs.step, times, strict=True):
        if not np.isnan(time):
            ends = h[~np.isnan(h)][-LAST:]
            level = np.nanmax(h[fell_from(int(np.flatnonzero(step == time)[0]))])
            lasts.append(float(level - np.median(ends) > tau))
    found = _leads("collapse", source, runs, np.full(len(runs), np.nan), times)
    return replace(found, lasting=share(lasts))


def _crossing(rule: str, source: str, runs: Runs, thresholds: Array) -> Leads:
    return _leads(rule, source, runs, thresholds, runs.first_below(thresholds))


def _leads(rule: str, source: str, runs: Runs, thresholds: Array, times: Array) -> Leads:
    leads = runs.t_grok - times
    asked = runs.grokked & ~np.isnan(runs.entropy).all(axis=1)
    if rule != "collapse":
        asked &= ~np.isnan(thresholds)
    preceding = proportion(int((leads > 0).sum()), int(asked.sum()))
    return Leads(rule, source, thresholds, times, leads, preceding, over(leads))


@dataclass(frozen=True)
class Sweep:
    """What each threshold would have given, arrays of shape (k,) over `thresholds` (ascending).

    `preceding`: share of grokked runs first below the threshold before they grokked. `lead`, `lead_low`,
    `lead_high`: mean, smallest and largest lead in steps of the grokked runs that cross it. `false`: share of
    the alarms (crossings before grokking) after which grokking does not come within the horizon; an alarm
    whose run ends earlier is not judged. `early`: share of all runs that cross before they have memorised.
    NaN where nothing is there to be counted.
    """

    thresholds: Array
    preceding: Array
    lead: Array
    lead_low: Array
    lead_high: Array
    false: Array
    early: Array
    horizon: int

    def useful(self) -> tuple[float, float] | None:
        """Smallest and largest threshold that precede every grokking with no false or early alarm; else None.

        The thresholds between the two all do, or the widest such stretch is given. It is read off the same
        runs, so it is what could have been chosen with hindsight, not a forecast.
        """
        good = (self.preceding == 1) & (self.false == 0) & (self.early == 0)
        edges = np.flatnonzero(np.diff(np.r_[False, good, False]))
        if edges.size == 0:
            return None
        starts, ends = edges[::2], edges[1::2] - 1
        widest = int(np.argmax(self.thresholds[ends] - self.thresholds[starts]))
        return float(self.thresholds[starts[widest]]), float(self.thresholds[ends[widest]])


def sweep(runs: Runs, thresholds: ArrayLike, *, horizon: int = HORIZON) -> Sweep:
    """Share preceding, lead and false alarms at each of `thresholds`.

    Parameters
    ----------
    runs : Runs
    thresholds : array_like, shape (k,)
        Normalised entropies, ascending.
    horizon : int
        Steps after an alarm within which grokking must come, else the alarm is false.

    Returns
    -------
    Sweep
    """
    grid = np.asarray(thresholds, dtype=np.float64)
    rows = np.array([_at_threshold(runs, h, horizon) for h in grid], dtype=np.float64).reshape(-1, 6)
    preceding, mean, low, high, false, early = rows.T
    return Sweep(grid, preceding, mean, low, high, false, early, horizon)


def _at_threshold(runs: Runs, threshold: float, horizon: int) -> tuple[float, ...]:
    crossed, grokked = runs.first_below(threshold), runs.grokked
    leads = runs.t_grok - crossed
    known = leads[~np.isnan(leads)]
    early = ~np.isnan(crossed) & ~(crossed >= runs.t_mem)
    # A run that ended within the horizon without grokking does not say whether its alarm was false.
    never = (runs.end - crossed)[~grokked] >= horizon
    judged = np.r_[leads[leads > 0] > horizon, never[never]]
    return (
        (known > 0).sum() / grokked.sum() if grokked.any() else np.nan,
        *((known.mean(), known.min(), known.max()) if known.size else (np.nan,) * 3),
        judged.mean() if judged.size else np.nan,
        early.sum() / len(runs) if len(runs) else np.nan,
    )


def observed_thresholds(runs: Runs, spacing: float = 0.005) -> Array:
    """Multiples of `spacing` that span every usable entropy of `runs`; empty if there is none."""
    usable = runs.entropy[~np.isnan(runs.entropy)]
    if usable.size == 0:
        return np.array([])
    low, high = np.floor(usable.min() / spacing), np.ceil(usable.max() / spacing)
    return np.arange(low, high + 1) * spacing
