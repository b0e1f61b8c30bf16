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
from dataclasses import dataclass, replace

import numpy as np

from fastent.experiments import savings, table5
from fastent.experiments.claims import (
    IN_PART,
    NONE,
    NOT_REPRODUCED,
    NOT_RUN,
    REPRODUCED,
    Claim,
    counted,
    decimal,
    judge_share,
    judge_value,
    percent,
    worded,
)
from fastent.experiments.columns import over
from fastent.experiments.delays import judge_positive
from fastent.experiments.document import Verdict
from fastent.experiments.quantities import MeasuredRun
from fastent.experiments.savings import Cost, Savings
from fastent.experiments.statistics import Estimate, proportion
from fastent.experiments.stored import StoredRun
from fastent.experiments.table5 import Guide
from fastent.history import History
from fastent.leave_one_out import LeaveOneOut, leave_one_run_out
from fastent.power_law import PowerLaw, profile_gamma

TITLE = "E5: does a power law forecast grokking?"

PAPER_R2 = 0.543
PAPER_GAMMA = 1.65
PAPER_MAPE = 0.041
PAPER_WARNING = 12_370
PAPER_SAVED = 0.86
PAPER_MILLISECONDS = 8.0

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


def claims(result: Forecasts) -> list[Claim]:
    """Each claim of the paper that E5 speaks to, beside what the runs say."""
    law, valid, comparable = result.law, result.validation, result.comparable
    r_squared, gamma = parameter(law, "r_squared"), parameter(law, "gamma")
    cost, table = result.cost, result.guide
    near = "the paper's number lies in our interval; in part: within 25 %"
    return [
        Claim(
            "§3.3, §8, abstract (iv)",
            f"a power law in H − H* explains R² = {PAPER_R2} of the remaining steps (CI 0.508 to 0.566)",
            worded(r_squared, ""),
            judge_value(PAPER_R2, r_squared, comparable=comparable),
            near + ". All evaluations of all runs, in sample, as in the paper",
        ),
        Claim(
            "§3.3, §8",
            f"its exponent is γ = {PAPER_GAMMA}",
            worded(gamma, "", 2),
            judge_value(PAPER_GAMMA, gamma, comparable=comparable),
            near,
        ),
        Claim(
            "§8, abstract (iv)",
            f"left-out runs are forecast with a mean absolute percentage error of {percent_of(PAPER_MAPE)}",
            NONE if valid is None else in_percent(valid.law),
            judge_value(PAPER_MAPE, None if valid is None else valid.law, comparable=comparable),
            near + ". Error over T_grok, mean over all evaluations with H > H* of the other runs",
        ),
        Claim(
            "§8",
            "and the entropy forecasts better than the clock (not in the paper: mean T_grok of the other "
            "runs)",
            NONE
            if valid is None
            else f"clock: {in_percent(valid.clock)}; law better in {counted(valid.better)}",
            judge_positive(None if valid is None else valid.advantage),
            "the law's error is smaller, the interval of the difference over runs above 0; in part: smaller",
        ),
        Claim(
            "§8, abstract (iv)",
            f"the mean advance warning is {PAPER_WARNING:,} steps (8,800 to 16,500)",
            NONE if valid is None else worded(valid.warning),
            judge_value(PAPER_WARNING, None if valid is None else valid.warning, comparable=comparable),
            near + ". From the first forecast after T_mem",
        ),
        Claim(
            "§10, App. D.2",
            "grokking follows within 1,000 steps of H falling below H*",
            f"{counted(result.saved.within)} that cross the H* of the other seeds",
            judge_share(result.saved.within),
            "in every run that crosses; in part: at least half",
        ),
        Claim(
            "§10",
            "stopping within 1,000 steps of the crossing loses no accuracy",
            f"{counted(result.saved.grokked)} have grokked when they are stopped",
            judge_share(result.saved.grokked),
            "every stopped run is at the criterion; in part: at least half",
        ),
        Claim(
            "§10",
            f"and saves {percent(PAPER_SAVED)} of the budget of 50,000 steps",
            f"{worded(result.saved.saved, '%')}; stopping at T_grok itself saves "
            f"{worded(result.saved.saved_by_accuracy, '%')}",
            judge_value(PAPER_SAVED, result.saved.saved, comparable=comparable),
            near,
        ),
        Claim(
            "App. D.3",
            f"H costs about {PAPER_MILLISECONDS:g} ms an evaluation, a negligible share of the training",
            NONE if cost is None else _cost(cost),
            NOT_RUN if cost is None else _judge_cost(cost),
            f"at most {PAPER_MILLISECONDS:g} ms and 1 % of the time; in part: one of them",
        ),
        Claim(
            "Table 5",
            "near the threshold, grokking is imminent (1,000 steps)",
            NONE
            if table is None
            else f"true of {_share(table.imminent)} such evaluations of a run; before grokking "
            f"{counted(table.warned)} were warned so",
            _judge_guide(table),
            "true of at least 90 % of such evaluations and 90 % of runs warned; in part: half of one",
        ),
        Claim(
            "Table 5, §10",
            "a run whose H stagnates is unlikely to grok",
            NONE
            if table is None or table.given_up is None
            else f"{counted(table.given_up)} so called grokked",
            NOT_RUN if table is None or table.given_up is None else _judge_given_up(table.given_up),
            "at most 10 % of the runs called so grok; in part: at most half",
        ),
    ]


def percent_of(value: float) -> str:
    """Write a share in per cent with one decimal: "4.1 %"."""
    return f"{decimal(100 * value, 1)} %"


def in_percent(estimate: Estimate | None) -> str:
    """Write a share with its interval in per cent with one decimal."""
    if estimate is None:
        return NONE
    low, high = (None if end is None else 100 * end for end in (estimate.low, estimate.high))
    return worded(replace(estimate, value=100 * estimate.value, low=low, high=high), "per cent", 1)


def _cost(cost: Cost) -> str:
    share = percent_of(cost.share.value) if cost.share.value >= 1e-3 else f"{100 * cost.share.value:.2g} %"
    return (
        f"{worded(cost.milliseconds, 'ms', 2)}, {share} of the time; {', '.join(cost.machines)}, "
        "evaluations as often as in these runs"
    )


def _judge_cost(cost: Cost) -> Verdict:
    cheap = cost.milliseconds.value <= PAPER_MILLISECONDS, cost.share.value <= 0.01
    return (NOT_REPRODUCED, IN_PART, REPRODUCED)[sum(cheap)]


def _share(estimate: Estimate | None) -> str:
    return NONE if estimate is None else worded(estimate, "%")


def _judge_guide(table: Guide | None) -> Verdict:
    if table is None or table.imminent is None or table.warned is None:
        return NOT_RUN
    shares = table.imminent.value, table.warned.value
    if min(shares) >= 0.9:
        return REPRODUCED
    return IN_PART if max(shares) >= 0.5 else NOT_REPRODUCED


def _judge_given_up(share: Estimate) -> Verdict:
    if share.value <= 0.1:
        return REPRODUCED
    return IN_PART if share.value <= 0.5 else NOT_REPRODUCED
