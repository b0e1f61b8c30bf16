"""E5's claims: the law, the forecasts, what stopping saves, what H costs, and Table 5, beside the paper's numbers."""

from __future__ import annotations

from fastent.experiments.claims import (
    IN_PART,
    NO_CASE,
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
from fastent.experiments.delays import judge_positive
from fastent.experiments.document import Verdict
from fastent.experiments.e5_forecast import Forecasts, parameter
from fastent.experiments.savings import Cost
from fastent.experiments.statistics import Estimate
from fastent.experiments.table5 import IMMINENT, Guide

PAPER_R2 = 0.543
PAPER_GAMMA = 1.65
PAPER_MAPE = 0.041
PAPER_WARNING = 12_370
PAPER_SAVED = 0.86
PAPER_MILLISECONDS = 8.0


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
            "not measured: the timing logs of these runs lack it" if cost is None else _cost(cost),
            NO_CASE if cost is None else _judge_cost(cost),
            f"at most {PAPER_MILLISECONDS:g} ms and 1 % of the time; in part: one of them",
        ),
        Claim(
            "Table 5",
            "near the threshold, grokking is imminent (1,000 steps)",
            _imminent(table),
            _judge_guide(table),
            "true of at least 90 % of such evaluations, and 90 % of the runs called so; in part: half of "
            "both",
        ),
        Claim(
            "Table 5, §10",
            "a run whose H stagnates is unlikely to grok",
            _given_up(table),
            _judge_given_up(table),
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
    if estimate.low is None or estimate.high is None:
        return f"{percent_of(estimate.value)} ({estimate.method})"
    span = f"{percent_of(estimate.low)} to {percent_of(estimate.high)}"
    return f"{percent_of(estimate.value)} ({100 * estimate.level:.0f} % CI {span}; n = {estimate.n})"


def _cost(cost: Cost) -> str:
    share = percent_of(cost.share.value) if cost.share.value >= 1e-3 else f"{100 * cost.share.value:.2g} %"
    return (
        f"{worded(cost.milliseconds, 'ms', 2)}, {share} of the time; {', '.join(cost.machines)}, "
        "evaluations as often as in these runs"
    )


def _judge_cost(cost: Cost) -> Verdict:
    cheap = cost.milliseconds.value <= PAPER_MILLISECONDS, cost.share.value <= 0.01
    return (NOT_REPRODUCED, IN_PART, REPRODUCED)[sum(cheap)]


def _imminent(table: Guide | None) -> str:
    if table is None:
        return NONE
    said = f"of the runs that grok, {counted(table.warned)} were called so in the {IMMINENT:,} steps before"
    if table.imminent is None:
        return f"no run is called so before it groks; {said}"
    return f"grokking came within {IMMINENT:,} steps after {worded(table.imminent, '%')} of such evaluations; {said}"


def _judge_guide(table: Guide | None) -> Verdict:
    if table is None or table.warned is None:
        return NOT_RUN
    if table.imminent is None:
        return NOT_REPRODUCED
    shares = table.imminent.value, table.warned.value
    if min(shares) >= 0.9:
        return REPRODUCED
    return IN_PART if min(shares) >= 0.5 else NOT_REPRODUCED


def _given_up(table: Guide | None) -> str:
    if table is None:
        return NONE
    return "no run is called so" if table.given_up is None else f"{counted(table.given_up)} called so grokked"


def _judge_given_up(table: Guide | None) -> Verdict:
    if table is None:
        return NOT_RUN
    if table.given_up is None:
        return NO_CASE
    if table.given_up.value <= 0.1:
        return REPRODUCED
    return IN_PART if table.given_up.value <= 0.5 else NOT_REPRODUCED
