"""A claim of the paper beside our figure, and how numbers are worded.

The rule for a verdict stands in the claim itself (`why`), so that a reader can disagree with it. A number of
the paper that belongs to the paper's setting is never judged by runs of another: the verdict is then "other
setting".
"""

from __future__ import annotations

from dataclasses import dataclass

from fastent.experiments.document import Table, Verdict
from fastent.experiments.statistics import Estimate

REPRODUCED = Verdict("yes", "reproduced")
IN_PART = Verdict("part", "in part")
NOT_REPRODUCED = Verdict("no", "not reproduced")
OTHER_SETTING = Verdict("none", "other setting")
NOT_RUN = Verdict("none", "not run")
NO_CASE = Verdict("none", "no case")
"""The runs hold nothing that the claim is about."""
MIXED = Verdict("none", "mixed settings")
"""The runs were not made with one and the same settings: what they say together is said of none."""

NONE = "–"


@dataclass(frozen=True)
class Claim:
    """One row of the summary: where the paper says what, what we find, and the verdict with its rule."""

    where: str
    says: str
    ours: str
    verdict: Verdict
    why: str


def claims_table(caption: str, claims: list[Claim]) -> Table:
    """Lay out `claims` as the summary table."""
    rows = tuple((c.where, c.says, c.ours, c.verdict, c.why) for c in claims)
    return Table(caption, ("Paper", "It says", "These runs", "Verdict", "Judged by"), rows)


def judge_share(share: Estimate | None) -> Verdict:
    """Verdict on "in every run": reproduced at all, not reproduced below one half, in part between."""
    if share is None:
        return NOT_RUN
    if share.value == 1:
        return REPRODUCED
    return IN_PART if share.value >= 0.5 else NOT_REPRODUCED


def judge_value(paper: float, ours: Estimate | None, *, comparable: bool) -> Verdict:
    """Verdict on a number: reproduced if inside our interval, in part if within a quarter, else not."""
    if ours is None:
        return NOT_RUN
    if not comparable:
        return OTHER_SETTING
    if ours.low is not None and ours.high is not None and ours.low <= paper <= ours.high:
        return REPRODUCED
    return IN_PART if abs(ours.value - paper) <= 0.25 * abs(paper) else NOT_REPRODUCED


def steps(value: float | None) -> str:
    """Write a step or a number of steps, "1,020"; a dash for None."""
    return NONE if value is None else f"{value:,.0f}".replace("-", "−")


def decimal(value: float | None, digits: int = 3) -> str:
    """Write a number to `digits` places; a dash for None."""
    return NONE if value is None else f"{value:.{digits}f}".replace("-", "−")


def percent(value: float | None) -> str:
    """Write a share in per cent, no decimals; a dash for None."""
    return NONE if value is None else f"{100 * value:.0f} %"


def worded(estimate: Estimate | None, unit: str = "steps", digits: int = 3) -> str:
    """Write an estimate with interval and n: "1,020 steps (95 % CI 900 to 1,150; n = 10)".

    `unit` "steps" and "%" choose their format, anything else is written to `digits` places with the unit
    after it.
    """
    if estimate is None:
        return NONE

    def number(value: float) -> str:
        if unit == "steps":
            return steps(value)
        return percent(value) if unit == "%" else decimal(value, digits)

    after = f" {unit}" if unit not in ("", "%") else ""
    if estimate.low is None or estimate.high is None:
        return f"{number(estimate.value)}{after} ({estimate.method})"
    span = f"{number(estimate.low)} to {number(estimate.high)}"
    return f"{number(estimate.value)}{after} ({100 * estimate.level:.0f} % CI {span}; n = {estimate.n})"


def counted(share: Estimate | None) -> str:
    """Write a share of runs: "9 of 10 runs (95 % CI 55 % to 100 %)"; a dash for None."""
    if share is None:
        return NONE
    span = f"{100 * share.level:.0f} % CI {percent(share.low)} to {percent(share.high)}"
    return f"{round(share.value * share.n)} of {share.n} runs ({span})"
