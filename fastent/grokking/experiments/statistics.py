"""Numbers over seeds, each with its n, its interval and how the interval was made; and tests on two groups of runs.

Built on `scipy.stats`. Nothing here chooses a test or a family: callers do, and pass all of a family's p-values to
`holm` together.

A run that ends before it groks is censored, not dropped: dropping it, as the paper's "28 of 30" does, biases the mean
time down. Rank tests tie censored runs last; means of times are restricted means; the log-rank test counts a run until
it was cut; Cohen's d, which needs every time, is None as soon as one is censored. All tests are one-sided, "the treated
runs are later", as the paper's. Seeds decide split, start and batches, so runs of one seed under two conditions are
pairs.

Evaluations of a run are far from independent, so numbers made of many of them get their intervals by leaving out whole
runs (`jackknife`): resampling evaluations would give intervals that are far too narrow, and a bootstrap over few runs
repeats some of them and fits the rest too well (`fastent.forecast.power_law` has the simulations).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

LEVEL = 0.95
RESAMPLES = 10_000


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


UNKNOWN = Estimate()
"""The number that no run gives."""


def bootstrap(values: ArrayLike, statistic: Callable[..., Any] = np.mean) -> Estimate:
    """`statistic` of `values` with a bias-corrected and accelerated bootstrap interval over them.

    Below three values no bootstrap means anything and none is made; where BCa is undefined (all values equal,
    or the statistic constant under the jackknife) the percentile interval stands in. `method` says which it
    was.

    Parameters
    ----------
    values : sequence of floats, one per seed
        Finite.
    statistic : callable
        Takes an array and an `axis`, as `numpy.mean` does.

    Raises
    ------
    ValueError
        If `values` is empty or not finite.

    References
    ----------
    Efron, "Better bootstrap confidence intervals", JASA 82 (1987).

    Examples
    --------
    >>> bool(np.isnan(bootstrap([4.0]).low))
    True
    """
    x = np.asarray(values, dtype=np.float64)
    if x.size == 0 or not np.isfinite(x).all():
        raise ValueError(f"values must be finite and at least one; got {x.tolist()}")
    point = float(statistic(x, axis=-1))
    if x.size < 3:
        return Estimate(point, n=x.size, method=f"no interval: n = {x.size}")
    if (x == x[0]).all():
        return Estimate(point, point, point, x.size, "no spread: all values equal")
    for method, name in (("BCa", "BCa bootstrap"), ("percentile", "percentile bootstrap, BCa undefined")):
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore", stats.DegenerateDataWarning)
            result = stats.bootstrap(
                (x,),
                statistic,
                axis=-1,
                n_resamples=RESAMPLES,
                confidence_level=LEVEL,
                method=method,
                random_state=np.random.default_rng(0),
            )
        low, high = (float(end) for end in result.confidence_interval)
        if np.isfinite([low, high]).all():
            return Estimate(point, low, high, x.size, name)
    raise AssertionError("a percentile interval of finite values is finite")


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


def over(values: Iterable[float]) -> Estimate:
    """Mean of the values that are known (not NaN), with its bootstrap interval; unknown if none is."""
    known = [float(value) for value in values if np.isfinite(value)]
    return bootstrap(known) if known else UNKNOWN


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
    interval = stats.ttest_ind(b, a, equal_var=False).confidence_interval(LEVEL)
    low, high = float(interval.low), float(interval.high)
    return Estimate(gap, low, high, a.size + b.size, "difference of means, Welch interval")


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

    z = stats.norm.ppf((1 + LEVEL) / 2)

    def excess(theta: float) -> float:
        return float((share - theta) ** 2 - z**2 * variance(theta))

    low = 0.0 if share == 0 else optimize.brentq(excess, 0.0, share - 1e-12)
    high = 1.0 if share == 1 else optimize.brentq(excess, share + 1e-12, 1.0)
    effect = Estimate(share, low, high, m + n, "P(treated later), Newcombe score interval")
    return Comparison(
        "Mann-Whitney U, one-sided", float(result.statistic), float(result.pvalue), (n, m), effect, note
    )


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
    half = float(stats.norm.ppf((1 + LEVEL) / 2)) * variance**0.5
    method = f"restricted mean to step {limit:g}, Greenwood interval"
    return Estimate(area, max(area - half, 0.0), min(area + half, limit), times.n, method)


def _area(times: Times, limit: float) -> tuple[float, float]:
    value, seen = times.values, times.observed
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


def log_rank(control: Times, treated: Times, limit: float) -> Comparison:
    """One-sided log-rank test, "the treated runs are later"; a censored run counts until its cut.

    The effect is the difference of the restricted means up to `limit` (treated minus control, in steps), with
    a normal interval. Raises as `restricted_mean`.
    """
    # 0 / 0 where no event has anyone of the other group at risk beside it.
    with np.errstate(invalid="ignore"):
        result = stats.logrank(_censored(treated), _censored(control), alternative="less")
    (a, va), (b, vb) = _area(control, limit), _area(treated, limit)
    half = float(stats.norm.ppf((1 + LEVEL) / 2)) * (va + vb) ** 0.5
    method = f"difference of restricted means to step {limit:g}, Greenwood interval"
    effect = Estimate(b - a, b - a - half, b - a + half, control.n + treated.n, method)
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
    """Mean over pairs of ``min(treated, limit) - min(control, limit)`` in steps, with a BCa interval over seeds.

    That is the difference of the restricted means to `limit`. Unknown if a run was cut before `limit` without the
    event: its restricted time is then unknown.
    """
    if min(control.cut, treated.cut) < limit:
        return UNKNOWN
    return bootstrap(np.minimum(treated.values, limit) - np.minimum(control.values, limit))


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

    if n < 3:
        return without(f"n = {n}")
    if not np.isfinite([value, *left_out]).all():
        return without("undefined with a run left out")
    there, back = scale
    centre, replicates = there(value), np.array([there(x) for x in left_out])
    if not math.isfinite(centre):
        return without("a perfect fit")
    if not np.isfinite(replicates).all():
        return without("a perfect fit with a run left out")
    width = float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * math.sqrt((n - 1) * float(replicates.var()))
    low, high = float(back(centre - width)), float(back(centre + width))
    if scale is EXPLAINED and low < WORST:
        return without(f"not determined by {n} runs")
    return Estimate(value, low, high, n, "jackknife over runs")
