"""Leads of the entropy over grokking: four ways to say when it "fell", and a sweep over the threshold.

A lead depends on where ``H*`` came from, so every result here says it:

- `own_threshold`: the run's own entropy at its grokking. Circular, and not usable ahead of time.
- `in_sample_threshold`: the mean of all seeds, the run's own among them. The paper's.
- `left_out_threshold`: the mean of the other seeds. What a monitor could have known.
- `collapse`: no threshold; the first fall by more than tau within a window.

A run that groks and never crosses counts as not preceded; a run that does not grok has no lead and takes part
in false alarms alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from fastent.grokking.experiments.data import Runs
from fastent.grokking.experiments.statistics import Array, Estimate, mean_known, over, proportion
from fastent.grokking.train.milestones import TAU, WINDOW

HORIZON = 1000
"""Steps within which an alarm must come true: the paper's "grokking imminent (1,000 steps)" (Table 5)."""


@dataclass(frozen=True, eq=False)
class Leads:
    """Leads of all runs by one rule, arrays of shape (n,) in the order of the runs, NaN where a run has none.

    `thresholds` are normalised entropies, `times` steps of the signal, `leads` steps from the signal to grokking.
    `preceding` is the share of grokked runs whose lead is positive, `mean` the mean lead of those that grokked and gave
    the signal at all (negative leads included).
    """

    rule: str
    source: str
    thresholds: Array
    times: Array
    leads: Array
    preceding: Estimate
    mean: Estimate


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


def collapse(runs: Runs, *, tau: float = TAU, window: int = WINDOW) -> Leads:
    """Lead of the first fall by more than `tau` within `window` evaluations."""
    spans = {(window - 1) * int(every) for every in runs.setting("evaluate_every")}
    source = f"a fall of H by more than {tau:g} within {window} evaluations"
    if len(spans) == 1:
        source += f" ({spans.pop():,} steps)"
    times = runs.first_collapse(tau, window)
    return _leads("collapse", source, runs, np.full(len(runs), np.nan), times)


def _crossing(rule: str, source: str, runs: Runs, thresholds: Array) -> Leads:
    return _leads(rule, source, runs, thresholds, runs.first_below(thresholds))


def _leads(rule: str, source: str, runs: Runs, thresholds: Array, times: Array) -> Leads:
    leads = runs.t_grok - times
    preceding = proportion(int((leads > 0).sum()), int(runs.grokked.sum()))
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
