"""Numbers over seeds, each with its n, its interval and how the interval was made; and tests on two groups of runs.

Built on `scipy.stats`. Nothing here chooses a test or a family: callers do, and pass all of a family's p-values to
`holm` together.

Intervals of means are Student's: with three to ten seeds a bootstrap over them, BCa too, and Greenwood's normal
interval hold the truth far more rarely than they say (``python -m fastent.grokking.experiments.statistics`` simulates
it for ``docs/results.md``). p-values of small groups are exact: every way to choose the treated runs is counted.

A run that ends before it groks is censored, not dropped: dropping it, as the paper's "28 of 30" does, biases the mean
time down. Rank tests tie censored runs last; means of times are restricted to a step that every censored run reached;
the log-rank test counts a run until it was cut; Cohen's d, which needs every time, is unknown as soon as one is
censored. All tests are one-sided, "the treated runs are later", as the paper's. Seeds decide split, start and batches,
so runs of one seed under two conditions are pairs.

Evaluations of a run are far from independent, so numbers made of many of them get their intervals by leaving out whole
runs (`jackknife`): resampling evaluations would give intervals that are far too narrow, and a bootstrap over few runs
repeats some of them and fits the rest too well (`fastent.forecast.power_law` has the simulations).
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

LEVEL = 0.95

FEWEST = 3
"""Values below which no interval is given: Student's of two is more than six times as wide as they are apart."""

WAYS = 200_000
"""Ways to choose the treated runs up to which all are counted: ten of twenty are 184,756."""


@dataclass(frozen=True)
class Estimate:
    """A number, its interval and where both come from; NaN where there is none.

    `low` and `high` are NaN where no interval of that level exists (`method` says why), `value` where nothing is known
    at all; `n` counts what the number rests on (runs, unless said otherwise); `level` is the interval's confidence. NaN
    fails every comparison, so no verdict comes of it.
    """

    value: float = math.nan
    low: float = math.nan
    high: float = math.nan
    n: int = 0
    method: str = ""
    level: float = LEVEL

    @property
    def known(self) -> bool:
        """Whether there is a number."""
        return not math.isnan(self.value)

    @property
    def bounded(self) -> bool:
        """Whether there is an interval."""
        return not math.isnan(self.low)

    @property
    def excludes_zero(self) -> bool:
        """Whether there is an interval and 0 lies outside it."""
        return self.bounded and not self.low <= 0 <= self.high


UNKNOWN = Estimate()
"""The number that no run gives."""


def proportion(successes: int, n: int) -> Estimate:
    """Share of `n` runs with the exact (Clopper-Pearson) interval: 3 of 3 reads 1, 0.29 to 1; unknown of none.

    Raises
    ------
    ValueError
        If `n` is negative or `successes` not in 0 to `n`.
    """
    if n == 0 == successes:
        return UNKNOWN
    interval = stats.binomtest(successes, n).proportion_ci(LEVEL, method="exact")
    return Estimate(successes / n, float(interval.low), float(interval.high), n, "Clopper-Pearson")


def over(values: Iterable[float], *, least: float = -math.inf, most: float = math.inf) -> Estimate:
    """Mean of the values that are known (not NaN), with Student's interval; unknown if none is.

    Parameters
    ----------
    values : iterable of floats, one per seed
    least, most : float
        What the mean cannot pass (0 for a length or a time): the interval ends there.

    Returns
    -------
    Estimate
        Without an interval below three values; where all are equal the interval has no width, and `method` says so.

    Examples
    --------
    >>> e = over([1.0, 2.0, 6.0])
    >>> round(e.low, 4), round(e.high, 4)
    (-3.5724, 9.5724)
    >>> over([1.0, 2.0, 6.0], least=0).low
    0.0
    """
    x = np.array([value for value in values if np.isfinite(value)], dtype=np.float64)
    if not x.size:
        return UNKNOWN
    mean = float(x.mean())
    if x.size < FEWEST:
        return Estimate(mean, n=x.size, method=f"no interval: n = {x.size}")
    if (x == x[0]).all():
        return Estimate(mean, mean, mean, x.size, "no spread: all values equal")
    half = _students(x.size - 1) * float(x.std(ddof=1)) / math.sqrt(x.size)
    return Estimate(
        mean, max(mean - half, float(least)), min(mean + half, float(most)), x.size, "Student's t"
    )


def _students(freedom: float) -> float:
    return float(stats.t.ppf((1 + LEVEL) / 2, freedom))


def mean_known(values: Array) -> float:
    """Mean of the values that are not NaN; NaN if none is."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else np.nan


def where_known(values: Array, holds: Callable[[Array], Mask]) -> Array:
    """Whether something holds of values, 1 or 0; NaN where they are."""
    return np.where(np.isnan(values), np.nan, holds(values))


def share(answers: Iterable[float]) -> Estimate:
    """Share of the answers that are 1 of those that are known (not NaN); unknown if none is."""
    known = [float(answer) for answer in answers if not np.isnan(answer)]
    return proportion(sum(answer == 1 for answer in known), len(known))


def pearson(x: ArrayLike, y: ArrayLike) -> Estimate:
    """Pearson's r of pairs, one a seed, with Fisher's interval (exact for normal pairs only, from 4 pairs).

    Raises
    ------
    ValueError
        If there are fewer than two pairs, or not as many of one as of the other.

    References
    ----------
    Fisher, "On the probable error of a coefficient of correlation deduced from a small sample", Metron 1 (1921).

    Examples
    --------
    >>> round(pearson([1.0, 2.0, 3.0], [2.0, 4.0, 6.0]).value, 12)
    1.0
    """
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if a.shape != b.shape or a.size < 2:
        raise ValueError(f"r needs two or more pairs; got {a.size} and {b.size} values")
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return Estimate(float("nan"), n=a.size, method="r is undefined: all values of one are equal")
    found = stats.pearsonr(a, b)
    r = float(found.statistic)
    if a.size < 4 or 1 - abs(r) < EXACT:
        return Estimate(r, n=a.size, method=f"no interval: n = {a.size}, r = {r:.3g}")
    interval = found.confidence_interval(LEVEL)
    low, high = float(interval.low), float(interval.high)
    return Estimate(r, low, high, a.size, "Pearson r, Fisher interval")


def welch(x: ArrayLike, y: ArrayLike) -> Estimate:
    """Mean of `y` minus mean of `x`, of runs that share nothing, with Welch's interval.

    Raises
    ------
    ValueError
        If one of them is empty.
    """
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if min(a.size, b.size) == 0:
        raise ValueError(f"each group needs a value; got {a.size} and {b.size}")
    gap = float(b.mean() - a.mean())
    if min(a.size, b.size) < 2 or (np.ptp(a) == 0 and np.ptp(b) == 0):
        return Estimate(gap, n=a.size + b.size, method=f"no interval: n = {a.size} and {b.size}")
    parts = [float(x.var(ddof=1)) / x.size for x in (a, b)]
    freedom = sum(parts) ** 2 / sum(part**2 / (x.size - 1) for part, x in zip(parts, (a, b), strict=True))
    half = _students(freedom) * math.sqrt(sum(parts))
    return Estimate(gap, gap - half, gap + half, a.size + b.size, "difference of means, Welch interval")


def less(ours: Estimate, other: Estimate) -> Estimate:
    """`ours` minus `other`, with the interval that both give; of a number without an interval only the value counts.

    References
    ----------
    Zou and Donner, "Construction of confidence limits about effect measures: a general approach", Statistics in
    Medicine 27 (2008).

    Examples
    --------
    >>> e = less(Estimate(10.0, 7.0, 14.0, 5), Estimate(2.0, -1.0, 6.0))
    >>> e.value, e.low, e.high
    (8.0, 3.0, 13.0)
    """
    gap = ours.value - other.value
    if not ours.bounded:
        return Estimate(gap, n=ours.n, method=ours.method)
    low, high = (other.low, other.high) if other.bounded else (other.value, other.value)
    return Estimate(
        gap,
        gap - math.hypot(ours.value - ours.low, high - other.value),
        gap + math.hypot(ours.high - ours.value, other.value - low),
        ours.n,
        "difference of independent numbers, by the intervals of both",
    )


def spread(values: Iterable[float]) -> Estimate:
    """Return the standard deviation of the values that are known, its chi-square interval exact for normal values."""
    x = np.array([value for value in values if np.isfinite(value)], dtype=np.float64)
    if x.size < FEWEST:
        return Estimate(n=x.size, method=f"n = {x.size}")
    deviation, freedom = float(x.std(ddof=1)), x.size - 1
    tails = stats.chi2.ppf([(1 + LEVEL) / 2, (1 - LEVEL) / 2], freedom)
    low, high = (deviation * math.sqrt(freedom / tail) for tail in tails)
    return Estimate(deviation, low, high, x.size, "standard deviation, chi-square interval")


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down adjustment of one family of p-values, by name, in the order given.

    Examples
    --------
    >>> {k: round(p, 3) for k, p in holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}).items()}
    {'a': 0.03, 'b': 0.06, 'c': 0.06, 'd': 0.02}

    References
    ----------
    Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6
    (1979).
    """
    adjusted: dict[str, float] = {}
    worst = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda k: p_values[k])):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = worst
    return {name: adjusted[name] for name in p_values}


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


@dataclass(frozen=True, eq=False)
class Times:
    """Times to an event in steps; where `observed` is False the run ended at that time without the event."""

    values: Array
    observed: NDArray[np.bool_]

    @classmethod
    def of(cls, times: ArrayLike, limits: ArrayLike) -> Times:
        """From times that are NaN (or None) where the event never came, and the step at which each run (or all) ended.

        Raises
        ------
        ValueError
            If there are no times, the lengths differ, or a time lies beyond its limit.
        """
        values = np.asarray(times, dtype=np.float64)
        ends = np.asarray(limits, dtype=np.float64)
        if values.size == 0 or ends.shape not in ((), values.shape):
            raise ValueError(
                f"times and limits must be as long as each other and not empty; got {values.size}, {ends.size}"
            )
        ends = np.broadcast_to(ends, values.shape)
        if (late := values > ends).any():
            at = int(late.argmax())
            raise ValueError(f"a time must not lie beyond its run's end; got {values[at]:g} > {ends[at]:g}")
        return cls(np.where(np.isnan(values), ends, values), ~np.isnan(values))

    @property
    def n(self) -> int:
        """Number of runs."""
        return self.values.size

    @property
    def censored(self) -> int:
        """Number of runs that ended without the event."""
        return int((~self.observed).sum())

    @property
    def cut(self) -> float:
        """Earliest end of a run without the event; infinite if all had it."""
        return float(self.values[~self.observed].min(initial=np.inf))


def mann_whitney(control: Times, treated: Times) -> Comparison:
    """One-sided Mann-Whitney U: are the treated runs later? Censored runs are tied last.

    Where runs were cut at different steps, the smallest cut is the horizon for all: a time beyond it is as
    unknown to the ranks as a censored one. The p-value is exact, ties and all, up to ten against ten, else normal with
    tie correction. The effect is the chance that a treated run is later than a control run
    (ties count half), with Newcombe's score interval, which stays honest when the groups do not overlap.

    References
    ----------
    Newcombe, "Confidence intervals for an effect size measure based on the Mann-Whitney statistic", part 2,
    Statistics in Medicine 25 (2006), method 5.
    """
    x, y, note = _tied_last(control, treated)
    result = stats.mannwhitneyu(y, x, alternative="greater")
    m, n = y.size, x.size
    p_value = _exact(stats.rankdata(np.r_[y, x]), m)
    share = float(result.statistic) / (m * n)

    def variance(theta: float) -> float:
        half = (m + n) / 2 - 1
        spread = 1 + half * (1 - theta) / (2 - theta) + half * theta / (1 + theta)
        return theta * (1 - theta) * spread / (m * n)

    z = stats.norm.ppf((1 + LEVEL) / 2)

    def excess(theta: float) -> float:
        return float((share - theta) ** 2 - z**2 * variance(theta))

    low = 0.0 if share == 0 else optimize.brentq(excess, 0.0, share - 1e-12)
    high = 1.0 if share == 1 else optimize.brentq(excess, share + 1e-12, 1.0)
    effect = Estimate(share, low, high, m + n, "P(treated later), Newcombe score interval")
    p_value = float(result.pvalue) if p_value is None else p_value
    return Comparison("Mann-Whitney U, one-sided", float(result.statistic), p_value, (n, m), effect, note)


def _exact(scores: Array, treated: int) -> float | None:
    """Chance that as many of `scores` add up to at least what the first `treated` do; None of too many ways."""
    if math.comb(scores.size, treated) > WAYS:
        return None
    sums = scores[_choices(scores.size, treated)].sum(axis=1)
    # Sums of equal scores in another order differ by rounding.
    return float((sums >= scores[:treated].sum() - 1e-9 * max(1.0, np.abs(scores).sum())).mean())


@functools.lru_cache(maxsize=8)
def _choices(n: int, k: int) -> NDArray[np.int8]:
    return np.array(list(itertools.combinations(range(n), k)), dtype=np.int8)


def _tied_last(control: Times, treated: Times) -> tuple[Array, Array, str]:
    horizon = min(control.cut, treated.cut)
    if horizon == np.inf:
        return control.values, treated.values, ""
    x, y = (np.where(t.observed & (t.values <= horizon), t.values, np.inf) for t in (control, treated))
    last = int(np.isinf(x).sum() + np.isinf(y).sum())
    return x, y, f"{last} runs not there by step {horizon:g} are tied last"


def signed_rank(control: Times, treated: Times) -> Comparison:
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
        horizon = min(control.cut, treated.cut)
        x, y = np.minimum(x, horizon), np.minimum(y, horizon)
        note = f"times are cut at step {horizon:g}"
    difference = y - x
    if (difference == 0).all():
        effect = Estimate(0.0, n=control.n, method="Hodges-Lehmann shift; no interval: all pairs tie")
        return Comparison("Wilcoxon signed-rank, one-sided", 0.0, 1.0, (control.n, treated.n), effect, note)
    result = stats.wilcoxon(difference, alternative="greater")
    effect = _hodges_lehmann(difference)
    return Comparison(
        "Wilcoxon signed-rank, one-sided",
        float(result.statistic),
        float(result.pvalue),
        (control.n, treated.n),
        effect,
        note,
    )


def _hodges_lehmann(difference: Array) -> Estimate:
    n = difference.size
    i, j = np.triu_indices(n)
    walsh = np.sort((difference[i] + difference[j]) / 2)
    null = np.ones(1)
    # The null distribution of the statistic: each rank is positive with chance 1/2.
    for rank in range(1, n + 1):
        null = np.convolve(null, np.r_[0.5, np.zeros(rank - 1), 0.5])
    centre = float(np.median(walsh))
    cut = int(np.searchsorted(np.cumsum(null), (1 - LEVEL) / 2, side="right"))
    method = "Hodges-Lehmann shift, exact interval"
    if cut == 0:
        return Estimate(centre, n=n, method=f"Hodges-Lehmann shift; no interval: n = {n}")
    return Estimate(centre, float(walsh[cut - 1]), float(walsh[-cut]), n, method)


def restricted_mean(times: Times, limit: float) -> Estimate:
    """Mean of ``min(time, limit)``, with Student's interval: what is known of a mean time when some runs were cut.

    Raises
    ------
    ValueError
        If `limit` is not positive, or a run was cut before it: its restricted time is then unknown.

    References
    ----------
    Royston and Parmar, "Restricted mean survival time", BMC Medical Research Methodology 13 (2013).
    """
    mean = over(_restricted(times, limit), least=0, most=limit)
    return replace(mean, method=f"{mean.method}, restricted to step {limit:g}")


def _restricted(times: Times, limit: float) -> Array:
    if limit <= 0:
        raise ValueError(f"limit must be positive; got {limit}")
    if times.cut < limit:
        raise ValueError(f"limit must not exceed the step where a run was cut, {times.cut:g}; got {limit:g}")
    cut: Array = np.minimum(times.values, limit)
    return cut


def log_rank(control: Times, treated: Times, limit: float) -> Comparison:
    """One-sided log-rank test, "the treated runs are later"; a censored run counts until its cut.

    The p-value is exact up to ten against ten: of observed less expected events over all ways to choose the treated
    runs; else it is scipy's. The effect is the difference of the means restricted to `limit` (treated minus control,
    in steps), with Welch's interval. Raises as `restricted_mean`.

    References
    ----------
    Peto and Peto, "Asymptotically efficient rank invariant test procedures", Journal of the Royal Statistical Society
    A 135 (1972).
    """
    # 0 / 0 where no event has anyone of the other group at risk beside it.
    with np.errstate(invalid="ignore"):
        result = stats.logrank(_censored(treated), _censored(control), alternative="less")
    exact = _exact(_expected_less_observed(treated, control), treated.n)
    known = np.isfinite(result.statistic)
    p_value = exact if exact is not None else float(result.pvalue) if known else 1.0
    censored = control.censored + treated.censored
    return Comparison(
        "log-rank, one-sided",
        float(result.statistic) if known else 0.0,
        p_value,
        (control.n, treated.n),
        welch(_restricted(control, limit), _restricted(treated, limit)),
        f"{censored} runs censored" if censored else "",
    )


def _expected_less_observed(first: Times, second: Times) -> Array:
    """Events expected of each run, those of both groups as one, less its own: the later, the more."""
    values, seen = (
        np.concatenate(pair) for pair in ((first.values, second.values), (first.observed, second.observed))
    )
    events, died = np.unique(values[seen], return_counts=True)
    hazard = died / (values[None, :] >= events[:, None]).sum(axis=1)
    later: Array = ((values[:, None] >= events) * hazard).sum(axis=1) - seen
    return later


def _censored(times: Times) -> stats.CensoredData:
    return stats.CensoredData(uncensored=times.values[times.observed], right=times.values[~times.observed])


def cohens_d(control: Times, treated: Times) -> Estimate:
    """Cohen's d of treated over control: difference of means over the pooled standard deviation.

    The interval inverts the non-central t distribution: exact for normal times. Unknown with a censored run, with
    fewer than two runs in a group, or without spread: the number is then not defined.
    """
    if control.censored or treated.censored or min(control.n, treated.n) < 2:
        return UNKNOWN
    x, y = control.values, treated.values
    freedom = x.size + y.size - 2
    pooled = (((x - x.mean()) ** 2).sum() + ((y - y.mean()) ** 2).sum()) / freedom
    if pooled == 0:
        return UNKNOWN
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

    tail = (1 - LEVEL) / 2
    return Estimate(d, bound(1 - tail), bound(tail), x.size + y.size, "Cohen's d, non-central t interval")


def stratified_log_rank(control: Times, treated: Times) -> Comparison:
    """One-sided log-rank test stratified by seed, "the treated run of a pair is later".

    In a stratum of two runs only the first event counts, and by then one of two was as likely as the other: the
    test is the sign test over the pairs in which one run is known to be first. A pair whose times tie, or whose
    only event comes after the other run was cut, says nothing. The p-value is exact; the effect is the share of
    the pairs that say something in which the treated run is later.

    Parameters
    ----------
    control, treated : Times
        The same seeds in the same order.

    Raises
    ------
    ValueError
        If the two do not hold as many runs.

    References
    ----------
    Mantel, "Evaluation of survival data and two new rank order statistics arising in its consideration", Cancer
    Chemotherapy Reports 50 (1966).
    """
    if control.n != treated.n:
        raise ValueError(f"pairs need as many control as treated runs; got {control.n} and {treated.n}")
    a, a_seen, b, b_seen = control.values, control.observed, treated.values, treated.observed
    # An event at the very step of the other run's cut came first: the other was still without it.
    later = int((a_seen & ((a < b) | ((a == b) & ~b_seen))).sum())
    earlier = int((b_seen & ((b < a) | ((b == a) & ~a_seen))).sum())
    known = later + earlier
    silent = control.n - known
    note = f"{silent} of {control.n} pairs tie or are cut before either groks" if silent else ""
    n = (control.n, treated.n)
    test = "log-rank stratified by seed, one-sided, exact"
    if known == 0:
        effect = Estimate(0.5, n=0, method="share of pairs, treated later; no pair says anything")
        return Comparison(test, 0.0, 1.0, n, effect, note)
    p_value = float(stats.binomtest(later, known, alternative="greater").pvalue)
    statistic = (later - known / 2) / (known / 4) ** 0.5
    return Comparison(test, statistic, p_value, n, proportion(later, known), note)


def mean_delay(control: Times, treated: Times, limit: float) -> Estimate:
    """Mean over pairs of ``min(treated, limit) - min(control, limit)`` in steps, with Student's interval over seeds.

    That is the difference of the restricted means to `limit`. Unknown if a run was cut before `limit` without the
    event: its restricted time is then unknown.
    """
    if min(control.cut, treated.cut) < limit:
        return UNKNOWN
    later = np.minimum(treated.values, limit) - np.minimum(control.values, limit)
    return over(later, least=-limit, most=limit)


EXACT = 1e-12
"""Distance from a correlation or share of 1 that rounding alone can leave."""

WORST = -1.0
"""Share of explained variance below which an interval says nothing: the errors are twice those of the mean."""

Scale = tuple[Callable[[float], float], Callable[[float], float]]
"""A transformation to a scale, infinite where it has an end, and back."""

PLAIN: Scale = (lambda x: x, lambda x: x)
CORRELATION: Scale = (
    lambda r: math.copysign(math.inf, r) if 1 - abs(r) < EXACT else math.atanh(r),
    math.tanh,
)
"""Fisher's, for correlations."""
EXPLAINED: Scale = (
    lambda r: math.inf if 1 - r < EXACT else -math.log(1 - r),
    # A float holds no share as low as e^700 times the variance.
    lambda x: -math.expm1(min(-x, 700.0)),
)
"""For shares of explained variance, as in `fastent.forecast.power_law`."""


def jackknife(value: float, left_out: Sequence[float], scale: Scale = PLAIN) -> Estimate:
    """`value` of all runs with an interval from its values with each run left out.

    Parameters
    ----------
    value : float
        Of all runs.
    left_out : sequence of floats
        Of all runs but one, one for each run.
    scale : pair of functions
        Where the interval is symmetric, and the way back.

    Returns
    -------
    Estimate
        Without an interval below three runs, where a value is undefined or at the end of its scale (a correlation
        of 1, nothing unexplained), and where the interval of an explained share reaches below -1. `method` says
        which.

    Examples
    --------
    >>> x = [1.0, 2.0, 6.0]
    >>> e = jackknife(3.0, [4.0, 3.5, 1.5])   # their mean: the interval is Student's
    >>> round(e.low, 4), round(e.high, 4)
    (-3.5724, 9.5724)

    References
    ----------
    Tukey, "Bias and confidence in not quite large samples", Annals of Mathematical Statistics 29 (1958).
    """
    n = len(left_out)

    def without(reason: str) -> Estimate:
        return Estimate(value, n=n, method=f"no interval: {reason}")

    if n < FEWEST:
        return without(f"n = {n}")
    if not np.isfinite([value, *left_out]).all():
        return without("undefined with a run left out")
    there, back = scale
    centre, replicates = there(value), np.array([there(x) for x in left_out])
    if not math.isfinite(centre):
        return without("a perfect fit")
    if not np.isfinite(replicates).all():
        return without("a perfect fit with a run left out")
    width = _students(n - 1) * math.sqrt((n - 1) * float(replicates.var()))
    low, high = float(back(centre - width)), float(back(centre + width))
    if scale is EXPLAINED and low < WORST:
        return without(f"not determined by {n} runs")
    return Estimate(value, low, high, n, "jackknife over runs")


SIZES = (3, 5, 10)
"""Numbers of seeds in the simulation."""

TRIALS = 2000

DRAWS: Mapping[str, tuple[Callable[..., Array], float]] = {
    "normal": (lambda rng, size: rng.normal(0.0, 1.0, size), 0.0),
    "log-normal, spread 0.25": (lambda rng, size: rng.lognormal(0.0, 0.25, size), math.exp(0.25**2 / 2)),
    "exponential": (lambda rng, size: rng.exponential(1.0, size), 1.0),
}
"""Distributions of a quantity over seeds, each with its mean; the second is as skewed as our T_grok."""


def coverage(trials: int = TRIALS) -> list[tuple[str, str, int, float]]:
    """Simulate how often each interval of a mean that is called 95 % holds it: (interval, distribution, n, share)."""
    rows = []
    for name, (draw, truth) in DRAWS.items():
        for n in SIZES:
            x = draw(np.random.default_rng(n), (trials, n))
            mean, error = x.mean(axis=1), x.std(axis=1, ddof=1) / math.sqrt(n)
            half = {
                "Student's t (used here)": _students(n - 1) * error,
                "Greenwood, normal": stats.norm.ppf((1 + LEVEL) / 2) * error * math.sqrt((n - 1) / n),
            }
            rows += [(kind, name, n, float((abs(mean - truth) <= h).mean())) for kind, h in half.items()]
            with warnings.catch_warnings():
                # Three values can be drawn all alike.
                warnings.simplefilter("ignore")
                low, high = stats.bootstrap(
                    (x,), np.mean, axis=-1, n_resamples=999, method="BCa", rng=np.random.default_rng(0)
                ).confidence_interval
            rows.append(("BCa bootstrap", name, n, float(((low <= truth) & (truth <= high)).mean())))
    return rows


def sizes(trials: int = TRIALS) -> list[tuple[str, int, float]]:
    """Simulate how often p is at most 0.05 where the groups do not differ: (test, runs in each, share).

    Times are rounded, so that there are ties, and cut, so that about a tenth are censored.
    """
    rows = []
    for n in SIZES[:2]:
        rng, found = np.random.default_rng(n), []
        for _ in range(trials):
            drawn = np.round(rng.lognormal(0.0, 0.25, (2, n)) * 10)
            a, b = (Times(np.minimum(x, 14), x <= 14) for x in drawn)
            exact, rank = log_rank(a, b, 14.0), mann_whitney(a, b)
            normal = stats.mannwhitneyu(*_tied_last(b, a)[:2], alternative="greater", method="asymptotic")
            found.append(
                (exact.p_value, float(stats.norm.cdf(exact.statistic)), rank.p_value, float(normal.pvalue))
            )
        names = (
            *("log-rank, exact (used here)", "log-rank, normal"),
            *("Mann-Whitney, exact (used here)", "Mann-Whitney, normal"),
        )
        rows += [
            (name, n, float(share))
            for name, share in zip(names, (np.array(found) <= 0.05).mean(0), strict=True)
        ]
    return rows


def coverage_tables() -> str:
    """Write both simulations as Markdown."""
    from fastent.grokking.experiments.document import markdown_table

    held: dict[tuple[str, str], list[str]] = {}
    for kind, name, _, part in coverage():
        held.setdefault((name, kind), []).append(f"{100 * part:.1f} %")
    rejected: dict[str, list[str]] = {}
    for test, _, part in sizes():
        rejected.setdefault(test, []).append(f"{100 * part:.1f} %")
    first = markdown_table(
        ("quantity over seeds", "interval", *(f"n = {n}" for n in SIZES)),
        [(*key, *parts) for key, parts in held.items()],
        (2, 3, 4),
    )
    second = markdown_table(
        ("test", *(f"{n} against {n}" for n in SIZES[:2])),
        [(key, *parts) for key, parts in rejected.items()],
        (1, 2),
    )
    return f"\n{first}\n\n{second}\n\n"


def main() -> None:
    """Print how often the intervals hold what they say and how often the tests reject, or write it to a document."""
    from fastent.grokking.experiments.document import marked

    parser = argparse.ArgumentParser(
        prog="python -m fastent.grokking.experiments.statistics", description=main.__doc__
    )
    parser.add_argument("--fill", type=Path, help="document with <!-- fastent statistics: coverage --> in it")
    given = parser.parse_args()
    if given.fill is None:
        print(coverage_tables())
        return
    text = marked(given.fill.read_text(encoding="utf-8"), "fastent statistics", lambda _: coverage_tables())
    given.fill.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
