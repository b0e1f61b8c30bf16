"""E5, the question whether a power law of the entropy gap forecasts grokking, and what that is worth.

Analysis of E1's runs, and of a few trained to the limit of steps (paper, section 8, Figure 4b; section 10; Appendix
D). The law is fitted the paper's way, to all evaluations of all runs that grokked, and judged by R2; and by leaving
out whole runs, H* and the law fitted to the others, against the clock at the same evaluations
(`fastent.leave_one_out`). What the runs determine of its parameters is asked of the profile of gamma and of the law
without C2. Savings, the monitor's cost and Table 5 are in `savings` and `table5`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastent.experiments import savings, table5
from fastent.experiments.columns import over
from fastent.experiments.savings import Cost, Savings
from fastent.experiments.statistics import Estimate, proportion
from fastent.experiments.stored import StoredRun
from fastent.experiments.table5 import Guide
from fastent.history import History
from fastent.leave_one_out import LeaveOneOut, leave_one_run_out
from fastent.power_law import PowerLaw, profile_gamma
from fastent.train.quantities import MeasuredRun

TITLE = "E5: does a power law forecast grokking?"

GAMMAS = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0)
"""Exponents at which the profile of the likelihood is shown."""


@dataclass(frozen=True)
class Validation:
    """Forecasts of runs left out.

    `law` and `clock` hold each run's mean absolute error over its T_grok, as estimates over runs; `advantage` is the
    clock's minus the law's, over runs; `better` the share of runs that the law forecasts better. `warning` is T_grok
    minus the first evaluation after T_mem at which the law forecasts at all, in steps.
    """

    runs: LeaveOneOut
    law: Estimate | None
    clock: Estimate | None
    law_r_squared: float
    clock_r_squared: float
    advantage: Estimate | None
    better: Estimate | None
    warning: Estimate | None


@dataclass(frozen=True)
class Forecasts:
    """Analysis of E5. `law`, `profile` and `validation` are None with fewer than three runs that grokked.

    `profile` holds R2 at `GAMMAS`. `long` are the runs that went on to the limit of steps.
    """

    runs: tuple[MeasuredRun, ...]
    histories: tuple[History, ...]
    law: PowerLaw | None
    profile: tuple[float, ...] | None
    validation: Validation | None
    saved: Savings
    long: tuple[MeasuredRun, ...]
    cost: Cost | None
    guide: Guide | None
    comparable: bool


def analyse(runs: Sequence[StoredRun], *, comparable: bool) -> Forecasts | None:
    """Fit, cross-validate and stop E1's runs; None without any.

    Parameters
    ----------
    runs : sequence of StoredRun
        Complete runs of E1, E5 and, for Table 5 alone, of any other experiment.
    comparable : bool
        Whether E1's were made with the paper's setting.
    """
    stored = [run for run in runs if run.experiment == "e1"]
    if not stored:
        return None
    measured = [run.measure() for run in stored]
    histories = [
        History(m.trajectory.step, m.trajectory.entropy, m.summary.t_grok, norm=m.trajectory.parameter_norm)
        for m in measured
    ]
    law: PowerLaw | None = None
    profile: tuple[float, ...] | None = None
    validation: Validation | None = None
    with contextlib.suppress(ValueError):  # too few runs that grokked, or too few evaluations above H*
        law = PowerLaw.fit(histories)
        profile = tuple(float(r) for r in profile_gamma(histories, GAMMAS))
        validation = _validate(leave_one_run_out(histories), measured)
    return Forecasts(
        runs=tuple(measured),
        histories=tuple(histories),
        law=law,
        profile=profile,
        validation=validation,
        saved=savings.savings(measured, min(int(run.config["max_steps"]) for run in stored)),
        long=tuple(run.measure() for run in runs if run.experiment == "e5"),
        cost=savings.monitor_cost(stored),
        guide=table5.guide([run.measure() for run in runs if run.experiment != "e5"], measured),
        comparable=comparable,
    )


def _validate(runs: LeaveOneOut, measured: Sequence[MeasuredRun]) -> Validation:
    law, clock = runs.score("law"), runs.score("clock")
    both = np.isfinite(law.mape) & np.isfinite(clock.mape)
    advantage = clock.mape[both] - law.mape[both]
    warnings = []
    for held_out in runs.runs:
        t_mem = measured[held_out.run].summary.t_mem
        after = held_out.step[held_out.step >= t_mem] if t_mem is not None else held_out.step[:0]
        if after.size:
            warnings.append(held_out.t_grok - float(after[0]))
    return Validation(
        runs=runs,
        law=over(law.mape.tolist()),
        clock=over(clock.mape.tolist()),
        law_r_squared=law.r_squared,
        clock_r_squared=clock.r_squared,
        advantage=over(advantage.tolist()),
        better=proportion(int((advantage > 0).sum()), advantage.size) if advantage.size else None,
        warning=over(warnings),
    )


def parameter(law: PowerLaw | None, name: str) -> Estimate | None:
    """Return a law's parameter with its jackknife interval, or without one where the runs do not determine it."""
    if law is None or getattr(law, name) is None:
        return None
    interval = law.intervals.get(name)
    low, high = interval or (None, None)
    method = "jackknife over runs" if interval else "not determined by the runs"
    return Estimate(float(getattr(law, name)), low, high, law.n_runs, method, law.level)
