"""Two groups of runs compared by their times, with censored runs kept.

A run that ends before it groks is censored, not dropped: dropping it, as the paper's "28 of 30" does, biases
the mean time down. Rank tests tie censored runs last; means of times are restricted means; the log-rank test
counts a run until it was cut; Cohen's d, which needs every time, is None as soon as one is censored. All
tests are one-sided, "the treated runs are later", as the paper's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

from fastent.experiments.statistics import LEVEL, Estimate

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Comparison:
    """A test of a control against a treated group, with the size of the effect beside its p-value.

    `n` holds the number of control and of treated runs; `effect` says in its method what it measures; `note`
    says what was done to censored runs and ties, and is empty if nothing was.
    """

    test: str
    statistic: float
    p_value: float
    n: tuple[int, int]
    effect: Estimate
    note: str = ""


@dataclass(frozen=True)
class Times:
    """Times to an event in steps; where `observed` is False the run ended at that time without the event."""

    values: tuple[float, ...]
    observed: tuple[bool, ...]

    @classmethod
    def of(cls, times: Sequence[float | None], limits: float | Sequence[float]) -> Times:
        """From times that are None where the event never came, and the step at which each run (or all) ended.

        Raises
        ------
        ValueError
            If there are no times, the lengths differ, or a time lies beyond its limit.
        """
        ends = (
            [float(limits)] * len(times) if isinstance(limits, (int, float)) else [float(x) for x in limits]
        )
        if not times or len(ends) != len(times):
            raise ValueError(
                f"times and limits must be as long as each other and not empty; got {len(times)}, {len(ends)}"
            )
        for time, end in zip(times, ends, strict=True):
            if time is not None and time > end:
                raise ValueError(f"a time must not lie beyond its run's end; got {time} > {end}")
        values = tuple(end if t is None else float(t) for t, end in zip(times, ends, strict=True))
        return cls(values, tuple(t is not None for t in times))

    @property
    def n(self) -> int:
        """Number of runs."""
        return len(self.values)

    @property
    def censored(self) -> int:
        """Number of runs that ended without the event."""
        return self.n - sum(self.observed)


def mann_whitney(control: Times, treated: Times, *, level: float = LEVEL) -> Comparison:
    """One-sided Mann-Whitney U: are the treated runs later? Censored runs are tied last.

    Where runs were cut at different steps, the smallest cut is the horizon for all: a time beyond it is as
    unknown to the ranks as a censored one. The p-value is exact without ties and with a group of at most 8;
    else normal with tie correction. The effect is the chance that a treated run is later than a control run
    (ties count half), with Newcombe's score interval, which stays honest when the groups do not overlap.

    References
    ----------
    Newcombe, "Confidence intervals for an effect size measure based on the Mann-Whitney statistic", part 2,
    Statistics in Medicine 25 (2006), method 5.
    """
    x, y, note = _tied_last(control, treated)
    result = stats.mannwhitneyu(y, x, alternative="greater")
    m, n = y.size, x.size
    share = float(result.statistic) / (m * n)

    def variance(theta: float) -> float:
        half = (m + n) / 2 - 1
        spread = 1 + half * (1 - theta) / (2 - theta) + half * theta / (1 + theta)
        return theta * (1 - theta) * spread / (m * n)

    z = stats.norm.ppf((1 + level) / 2)

    def excess(theta: float) -> float:
        return float((share - theta) ** 2 - z**2 * variance(theta))

    low = 0.0 if share == 0 else optimize.brentq(excess, 0.0, share - 1e-12)
    high = 1.0 if share == 1 else optimize.brentq(excess, share + 1e-12, 1.0)
    effect = Estimate(share, low, high, m + n, "P(treated later), Newcombe score interval", level)
    return Comparison(
        "Mann-Whitney U, one-sided", float(result.statistic), float(result.pvalue), (n, m), effect, note
    )


def _tied_last(control: Times, treated: Times) -> tuple[Array, Array, str]:
    ends = [v for t in (control, treated) for v, seen in zip(t.values, t.observed, strict=True) if not seen]
    if not ends:
        return np.array(control.values), np.array(treated.values), ""
    horizon = min(ends)

    def ranked(times: Times) -> Array:
        pairs = zip(times.values, times.observed, strict=True)
        return np.array([v if seen and v <= horizon else np.inf for v, seen in pairs])

    x, y = ranked(control), ranked(treated)
    last = int(np.isinf(x).sum() + np.isinf(y).sum())
    return x, y, f"{last} runs not there by step {horizon:g} are tied last"


def signed_rank(control: Times, treated: Times, *, level: float = LEVEL) -> Comparison:
    """One-sided Wilcoxon signed-rank test on pairs that share a seed, "the treated runs are later".

    `control` and `treated` hold the same seeds in the same order. With censored runs every time is cut at the
    smallest cut, so the difference of a pair can only shrink. The effect is the Hodges-Lehmann shift in steps
    (median of the Walsh averages) with its exact interval; below 6 pairs no 95 % interval exists, and none is
    given.

    Raises
    ------
    ValueError
        If the two do not hold as many runs.
    """
    if control.n != treated.n:
        raise ValueError(f"pairs need as many control as treated runs; got {control.n} and {treated.n}")
    x, y, note = _tied_last(control, treated)
    if note:
        horizon = min(
            v for t in (control, treated) for v, s in zip(t.values, t.observed, strict=True) if not s
        )
        x, y = np.minimum(x, horizon), np.minimum(y, horizon)
        note = f"times are cut at step {horizon:g}"
    difference = y - x
    if (difference == 0).all():
        effect = Estimate(
            0.0, None, None, control.n, "Hodges-Lehmann shift; no interval: all pairs tie", level
        )
        return Comparison("Wilcoxon signed-rank, one-sided", 0.0, 1.0, (control.n, treated.n), effect, note)
    result = stats.wilcoxon(difference, alternative="greater")
    effect = _hodges_lehmann(difference, level)
    return Comparison(
        "Wilcoxon signed-rank, one-sided",
        float(result.statistic),
        float(result.pvalue),
        (control.n, treated.n),
        effect,
        note,
    )


def _hodges_lehmann(difference: Array, level: float) -> Estimate:
    n = difference.size
    i, j = np.triu_indices(n)
    walsh = np.sort((difference[i] + difference[j]) / 2)
    null = np.ones(1)
    for rank in range(
        1, n + 1
    ):  # the null distribution of the statistic: each rank is positive with chance 1/2
        null = np.convolve(null, np.r_[0.5, np.zeros(rank - 1), 0.5])
    cut = int(np.searchsorted(np.cumsum(null), (1 - level) / 2, side="right"))
    method = "Hodges-Lehmann shift, exact interval"
    if cut == 0:
        return Estimate(
            float(np.median(walsh)), None, None, n, f"Hodges-Lehmann shift; no interval: n = {n}", level
        )
    return Estimate(float(np.median(walsh)), float(walsh[cut - 1]), float(walsh[-cut]), n, method, level)


def restricted_mean(times: Times, limit: float, *, level: float = LEVEL) -> Estimate:
    """Mean time up to `limit`: the area under the Kaplan-Meier curve, with a normal (Greenwood) interval.

    Without censoring before `limit` it is the mean of ``min(time, limit)``.

    Raises
    ------
    ValueError
        If `limit` is not positive, or the largest time is censored before it: the area beyond is then
        unknown.

    References
    ----------
    Royston and Parmar, "Restricted mean survival time", BMC Medical Research Methodology 13 (2013).
    """
    area, variance = _area(times, limit)
    half = float(stats.norm.ppf((1 + level) / 2)) * variance**0.5
    method = f"restricted mean to step {limit:g}, Greenwood interval"
    return Estimate(area, max(area - half, 0.0), min(area + half, limit), times.n, method, level)


def _area(times: Times, limit: float) -> tuple[float, float]:
    value, seen = np.array(times.values), np.array(times.observed)
    if limit <= 0:
        raise ValueError(f"limit must be positive; got {limit}")
    if value.max() < limit and not seen[value == value.max()].all():
        raise ValueError(f"limit must not exceed the last censored time, {value.max():g}; got {limit:g}")
    events = np.unique(value[seen & (value <= limit)])
    at_risk = (value[None, :] >= events[:, None]).sum(axis=1)
    died = ((value[None, :] == events[:, None]) & seen[None, :]).sum(axis=1)
    survival = np.r_[1.0, np.cumprod(1 - died / at_risk)]
    pieces = survival * np.diff(np.r_[0.0, events, limit])
    beyond = pieces[::-1].cumsum()[::-1][1:]  # area to the right of each event
    left = at_risk - died
    # Where nobody is left the curve is 0 and so is the area beyond: the term vanishes.
    terms = np.divide(beyond**2 * died, at_risk * left, out=np.zeros_like(beyond), where=left > 0)
    return float(pieces.sum()), float(terms.sum())


def log_rank(control: Times, treated: Times, limit: float, *, level: float = LEVEL) -> Comparison:
    """One-sided log-rank test, "the treated runs are later"; a censored run counts until its cut.

    The effect is the difference of the restricted means up to `limit` (treated minus control, in steps), with
    a normal interval. Raises as `restricted_mean`.
    """
    with np.errstate(
        invalid="ignore"
    ):  # 0 / 0 where no event has anyone of the other group at risk beside it
        result = stats.logrank(_censored(treated), _censored(control), alternative="less")
    (a, va), (b, vb) = _area(control, limit), _area(treated, limit)
    half = float(stats.norm.ppf((1 + level) / 2)) * (va + vb) ** 0.5
    method = f"difference of restricted means to step {limit:g}, Greenwood interval"
    effect = Estimate(b - a, b - a - half, b - a + half, control.n + treated.n, method, level)
    censored = control.censored + treated.censored
    note = f"{censored} runs censored" if censored else ""
    known = np.isfinite(result.statistic)
    return Comparison(
        "log-rank, one-sided",
        float(result.statistic) if known else 0.0,
        float(result.pvalue) if known else 1.0,
        (control.n, treated.n),
        effect,
        note,
    )


def _censored(times: Times) -> stats.CensoredData:
    value, seen = np.array(times.values), np.array(times.observed)
    return stats.CensoredData(uncensored=value[seen], right=value[~seen])


def cohens_d(control: Times, treated: Times, *, level: float = LEVEL) -> Estimate | None:
    """Cohen's d of treated over control: difference of means over the pooled standard deviation.

    The interval inverts the non-central t distribution: exact for normal times. None with a censored run,
    with fewer than two runs in a group, or without spread: the number is then not defined.
    """
    if control.censored or treated.censored or min(control.n, treated.n) < 2:
        return None
    x, y = np.array(control.values), np.array(treated.values)
    freedom = x.size + y.size - 2
    pooled = (((x - x.mean()) ** 2).sum() + ((y - y.mean()) ** 2).sum()) / freedom
    if pooled == 0:
        return None
    d = float((y.mean() - x.mean()) / pooled**0.5)
    scale = (x.size * y.size / (x.size + y.size)) ** 0.5

    def bound(share: float) -> float:
        def gap(noncentrality: float) -> float:
            chance = float(stats.nct.cdf(d * scale, freedom, noncentrality))
            # scipy gives NaN far out on the other side of 0, where the chance is 1 or 0 to the last digit.
            saturated = float(noncentrality < d * scale)
            return (saturated if np.isnan(chance) else chance) - share

        reach = 10 + abs(d * scale)
        return float(optimize.brentq(gap, d * scale - reach, d * scale + reach) / scale)

    tail = (1 - level) / 2
    return Estimate(
        d, bound(1 - tail), bound(tail), x.size + y.size, "Cohen's d, non-central t interval", level
    )
