"""By how much a condition delays grokking, against the baseline runs of the same settings.

Every run is kept: one that did not grok is censored at the limit of steps, and means are restricted to that limit.
Tests are one-sided, "later than the baseline", as the paper's; Mann-Whitney treats the groups as unpaired, as the
paper does, the others use that seeds are shared.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fastent.experiments.claims import (
    IN_PART,
    NO_CASE,
    NONE,
    NOT_REPRODUCED,
    NOT_RUN,
    OTHER_SETTING,
    REPRODUCED,
    judge_value,
    worded,
)
from fastent.experiments.comparisons import (
    Comparison,
    Times,
    cohens_d,
    log_rank,
    mann_whitney,
    restricted_mean,
    signed_rank,
)
from fastent.experiments.document import Verdict
from fastent.experiments.paired import mean_delay, stratified_log_rank
from fastent.experiments.statistics import Estimate, holm, proportion
from fastent.experiments.stored import StoredRun
from fastent.train.quantities import MeasuredRun


@dataclass(frozen=True)
class Group:
    """The complete runs of one condition, by seed; `stored` and `measured` are the same runs."""

    condition: str
    stored: tuple[StoredRun, ...]
    measured: tuple[MeasuredRun, ...]

    @classmethod
    def of(cls, condition: str, stored: Sequence[StoredRun]) -> Group:
        """Measure `stored`."""
        runs = sorted(stored, key=lambda run: run.seed)
        return cls(condition, tuple(runs), tuple(run.measure() for run in runs))

    @property
    def seeds(self) -> tuple[int, ...]:
        """Their seeds, ascending."""
        return tuple(run.seed for run in self.stored)

    def only(self, seeds: Sequence[int]) -> Group:
        """Return the runs of `seeds` alone."""
        kept = [i for i, seed in enumerate(self.seeds) if seed in seeds]
        return Group(
            self.condition, tuple(self.stored[i] for i in kept), tuple(self.measured[i] for i in kept)
        )

    @property
    def times(self) -> Times:
        """T_grok of each, censored at its end."""
        summaries = [run.summary for run in self.measured]
        return Times.of([s.t_grok for s in summaries], [s.last_step for s in summaries])


def groups_of(runs: Sequence[StoredRun], experiment: str) -> dict[str, Group]:
    """Group the runs of one experiment by condition, in the order of their names."""
    conditions = sorted({run.condition for run in runs if run.experiment == experiment})
    return {
        name: Group.of(name, [r for r in runs if r.experiment == experiment and r.condition == name])
        for name in conditions
    }


@dataclass(frozen=True)
class Delay:
    """One condition against the baseline.

    `mean` is the mean T_grok restricted to `limit`, `delay` the difference of these means with an interval from
    pairs where seeds are shared (else Greenwood's); `paired` holds the tests on shared seeds and is empty without
    them; `adjusted` is the Mann-Whitney p-value after Holm over the conditions of the experiment; `events` counts the
    runs of both groups that grokked.
    """

    group: Group
    limit: int
    grokked: Estimate
    mean: Estimate
    delay: Estimate
    rank: Comparison
    survival: Comparison
    paired: tuple[Comparison, ...]
    effect_size: Estimate | None
    adjusted: float
    events: int

    @property
    def condition(self) -> str:
        """Name of the condition."""
        return self.group.condition

    @property
    def known(self) -> bool:
        """Whether any run groks at all, so that there is something to be delayed."""
        return self.events > 0


def delays(baseline: Group, treated: Sequence[Group]) -> list[Delay]:
    """Compare each of `treated` with `baseline`; means go to the earliest limit of steps or end without grokking."""
    compared = [_delay(baseline, group) for group in treated]
    adjusted = holm({delay.condition: delay.rank.p_value for delay in compared})
    return [
        replace(delay, adjusted=adjusted[delay.condition])  # one family: this experiment
        for delay in compared
    ]


def _delay(baseline: Group, group: Group) -> Delay:
    control, times = baseline.times, group.times
    limits = [int(run.config["max_steps"]) for run in (*baseline.stored, *group.stored)]
    summaries = [run.summary for run in (*baseline.measured, *group.measured)]
    limit = min(*limits, *(s.last_step for s in summaries if s.t_grok is None))
    shared = [seed for seed in group.seeds if seed in baseline.seeds]
    survival = log_rank(control, times, limit)
    delay = _without_interval(survival.effect) if min(control.n, times.n) < 3 else survival.effect
    paired: tuple[Comparison, ...] = ()
    if shared:
        a, b = baseline.only(shared).times, group.only(shared).times
        paired = (signed_rank(a, b), stratified_log_rank(a, b))
        delay = mean_delay(a, b, limit) or delay
    rank = mann_whitney(control, times)
    return Delay(
        group=group,
        limit=limit,
        grokked=proportion(times.n - times.censored, times.n),
        mean=mean_time(group, limit),
        delay=delay,
        rank=rank,
        survival=survival,
        paired=paired,
        effect_size=cohens_d(control, times),
        adjusted=rank.p_value,
        events=sum(control.observed) + sum(times.observed),
    )


def mean_time(group: Group, limit: int) -> Estimate:
    """Mean T_grok of a group, restricted to `limit` steps; without an interval below three runs."""
    mean = restricted_mean(group.times, limit)
    return _without_interval(mean) if group.times.n < 3 else mean


def _without_interval(estimate: Estimate) -> Estimate:
    # Greenwood's variance of one or two runs is 0 or next to it: that is ignorance, not certainty.
    return replace(estimate, low=None, high=None, method=f"no interval: n = {estimate.n}")


def judge_later(delay: Delay | None) -> Verdict:
    """Verdict on "it delays grokking": reproduced if the interval of the delay lies above 0, in part if its value."""
    if delay is None:
        return NOT_RUN
    return judge_positive(delay.delay) if delay.known else NO_CASE


def judge_positive(estimate: Estimate | None) -> Verdict:
    """Verdict on "it is more than 0": reproduced if the whole interval is, in part if the value is, else not."""
    if estimate is None:
        return NOT_RUN
    if estimate.low is not None and estimate.low > 0:
        return REPRODUCED
    return IN_PART if estimate.value > 0 else NOT_REPRODUCED


def tested(delay: Delay | None) -> str:
    """Write the paper's test and effect size: "p = 0.044, with Holm 0.13; d = 0.70 (95 % CI ...)"."""
    if delay is None:
        return NONE
    size = "undefined, runs are censored" if delay.effect_size is None else worded(delay.effect_size, "", 2)
    return f"p = {p_value(delay.rank.p_value)}, with Holm {p_value(delay.adjusted)}; d = {size}"


def judge_test(delay: Delay | None, effect_size: float, *, comparable: bool) -> Verdict:
    """Verdict on a significant effect of a size: in part if only the adjusted p-value or only the size agrees."""
    if delay is None:
        return NOT_RUN
    if not comparable:
        return OTHER_SETTING
    agrees = judge_value(effect_size, delay.effect_size, comparable=True) == REPRODUCED
    return (NOT_REPRODUCED, IN_PART, REPRODUCED)[(delay.adjusted < 0.05) + agrees]


def p_value(value: float | None) -> str:
    """Write a p-value to two significant digits, "0.044" or "5.2e-05"; a dash for None."""
    if value is None:
        return NONE
    return f"{value:.2g}" if value >= 1e-3 else f"{value:.1e}"


def words(condition: str) -> str:
    """Say what a condition does.

    Examples
    --------
    >>> words("losses-0.1+norm-as-baseline")
    'mixing, α = 0.1, losses averaged; norm as in the baseline'
    """
    return "; ".join(_words(part) for part in condition.split("+"))


def _words(part: str, form: str = "{}, {}") -> str:
    if found := re.fullmatch(r"(losses|logits)-(.+)", part):
        return form.format("mixing", f"α = {found[2]}, {found[1]} averaged")
    if part.startswith("norm-as-"):
        other = part.removeprefix("norm-as-")
        return (
            "norm as in the baseline" if other == "baseline" else f"norm as under {_words(other, '{} ({})')}"
        )
    fixed = {
        "baseline": "baseline",
        "norm-mem": "norm held where the baseline has memorised",
        "norm-start": "norm held at its start",
        "norm-start-each": "norm of each tensor held at its start",
        "to-the-end": "baseline, trained to the limit of steps",
    }
    return fixed.get(part, part)
