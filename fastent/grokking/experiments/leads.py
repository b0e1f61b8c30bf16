"""By how much the entropy leads: the four ways to say when it "fell", and a sweep over the threshold.

A lead depends on where ``H*`` came from, so every result here says it:

- `own_threshold`: the run's own entropy at its grokking. Circular, and not usable ahead of time.
- `in_sample_threshold`: the mean of all seeds, the run's own among them. The paper's.
- `left_out_threshold`: the mean of the other seeds. What a monitor could have known.
- `collapse`: no threshold; the first fall by more than tau within a window.

A run that groks and never crosses counts as not preceded; a run that does not grok has no lead and takes part
in false alarms alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastent.grokking.experiments.statistics import Estimate, bootstrap, proportion
from fastent.train.quantities import TAU, WINDOW, MeasuredRun, first_below, first_collapse, lead

Array = NDArray[np.float64]

HORIZON = 1000
"""Steps within which an alarm must come true: the paper's "grokking imminent (1,000 steps)" (Table 5)."""


@dataclass(frozen=True)
class Leads:
    """Leads of all runs by one rule, in the order of the runs.

    `thresholds` are normalised entropies (None for a run without one), `times` steps of the signal, `leads`
    steps from the signal to grokking. `preceding` is the share of grokked runs whose lead is positive, `mean`
    the mean lead of those that grokked and gave the signal at all (negative leads included); None where there
    is none.
    """

    rule: str
    source: str
    thresholds: tuple[float | None, ...]
    times: tuple[int | None, ...]
    leads: tuple[int | None, ...]
    preceding: Estimate | None
    mean: Estimate | None


def own_threshold(runs: Sequence[MeasuredRun]) -> Leads:
    """Lead of the crossing of each run's own ``H*``: circular, for comparison."""
    return _crossing(
        "own run", "the run's own H at T_grok (circular)", runs, [r.summary.h_star for r in runs]
    )


def in_sample_threshold(runs: Sequence[MeasuredRun]) -> Leads:
    """Lead of the crossing of the mean ``H*`` of all runs that grokked, as in the paper."""
    known = [r.summary.h_star for r in runs if r.summary.h_star is not None]
    mean = float(np.mean(known)) if known else None
    return _crossing("all seeds", "mean H* of the same seeds (the paper's)", runs, [mean] * len(runs))


def left_out_threshold(runs: Sequence[MeasuredRun]) -> Leads:
    """Lead of the crossing of the mean ``H*`` of the other runs that grokked."""
    thresholds: list[float | None] = []
    for i in range(len(runs)):
        known = [r.summary.h_star for j, r in enumerate(runs) if j != i and r.summary.h_star is not None]
        thresholds.append(float(np.mean(known)) if known else None)
    return _crossing("other seeds", "mean H* of the other seeds (leave-one-out)", runs, thresholds)


def collapse(runs: Sequence[MeasuredRun], *, tau: float = TAU, window: int = WINDOW) -> Leads:
    """Lead of the first fall by more than `tau` within `window` evaluations."""
    times = [first_collapse(r.trajectory.step, r.trajectory.entropy, tau=tau, window=window) for r in runs]
    spans = {(window - 1) * r.evaluate_every for r in runs}
    source = f"a fall of H by more than {tau:g} within {window} evaluations"
    if len(spans) == 1:
        source += f" ({spans.pop():,} steps)"
    return _leads("collapse", source, runs, [None] * len(runs), times)


def _crossing(rule: str, source: str, runs: Sequence[MeasuredRun], thresholds: list[float | None]) -> Leads:
    times = [
        None if h is None else first_below(r.trajectory.step, r.trajectory.entropy, h)
        for r, h in zip(runs, thresholds, strict=True)
    ]
    return _leads(rule, source, runs, thresholds, times)


def _leads(
    rule: str,
    source: str,
    runs: Sequence[MeasuredRun],
    thresholds: list[float | None],
    times: list[int | None],
) -> Leads:
    leads = [lead(r.summary.t_grok, t) for r, t in zip(runs, times, strict=True)]
    grokked = sum(r.summary.t_grok is not None for r in runs)
    known = [x for x in leads if x is not None]
    return Leads(
        rule,
        source,
        tuple(thresholds),
        tuple(times),
        tuple(leads),
        proportion(sum(x > 0 for x in known), grokked) if grokked else None,
        bootstrap(known) if known else None,
    )


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


def sweep(
    runs: Sequence[MeasuredRun], thresholds: Sequence[float] | Array, *, horizon: int = HORIZON
) -> Sweep:
    """Share preceding, lead and false alarms at each of `thresholds`.

    Parameters
    ----------
    runs : sequence of MeasuredRun
    thresholds : sequence of floats
        Normalised entropies, ascending.
    horizon : int
        Steps after an alarm within which grokking must come, else the alarm is false.

    Returns
    -------
    Sweep
    """
    rows = [_at_threshold(runs, float(h), horizon) for h in thresholds]
    preceding, mean, low, high, false, early = np.array(rows, dtype=np.float64).reshape(len(rows), 6).T
    grid = np.asarray(thresholds, dtype=np.float64)
    return Sweep(grid, preceding, mean, low, high, false, early, horizon)


def _at_threshold(runs: Sequence[MeasuredRun], threshold: float, horizon: int) -> tuple[float, ...]:
    leads: list[int] = []
    false: list[bool] = []
    grokked = early = 0
    for run in runs:
        t_grok, t_mem = run.summary.t_grok, run.summary.t_mem
        t_cross = first_below(run.trajectory.step, run.trajectory.entropy, threshold)
        grokked += t_grok is not None
        if t_cross is None:
            continue
        early += t_mem is None or t_cross < t_mem
        if t_grok is not None:
            leads.append(t_grok - t_cross)
        if t_grok is not None and t_cross < t_grok:
            false.append(t_grok - t_cross > horizon)
        elif t_grok is None and run.summary.last_step - t_cross >= horizon:
            false.append(True)
    nan = float("nan")
    return (
        sum(x > 0 for x in leads) / grokked if grokked else nan,
        sum(leads) / len(leads) if leads else nan,
        min(leads) if leads else nan,
        max(leads) if leads else nan,
        sum(false) / len(false) if false else nan,
        early / len(runs) if runs else nan,
    )


def observed_thresholds(runs: Sequence[MeasuredRun], spacing: float = 0.005) -> Array:
    """Multiples of `spacing` that span every usable entropy of `runs`; empty if there is none."""
    usable = np.concatenate([r.trajectory.entropy for r in runs]) if runs else np.array([])
    usable = usable[~np.isnan(usable)]
    if usable.size == 0:
        return np.array([])
    low, high = np.floor(usable.min() / spacing), np.ceil(usable.max() / spacing)
    return np.arange(low, high + 1) * spacing
