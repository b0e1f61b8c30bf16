"""Numbers over seeds, each with its n, its interval and how the interval was made.

Built on `scipy.stats`. Nothing here chooses a test or a family: callers do, and pass all of a family's
p-values to `holm` together. Comparisons of two groups of runs by their times are in `comparisons`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

LEVEL = 0.95
RESAMPLES = 10_000


@dataclass(frozen=True)
class Estimate:
    """A number, its interval and where both come from.

    `low` and `high` are None where no interval of that level exists (`method` says why); `n` counts what the
    number rests on (runs, unless said otherwise); `level` is the interval's confidence.
    """

    value: float
    low: float | None
    high: float | None
    n: int
    method: str
    level: float = LEVEL


def bootstrap(
    values: Sequence[float],
    statistic: Callable[..., Any] = np.mean,
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
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
    level : float
        Confidence, in (0, 1).
    resamples, seed : int
        Number of resamples and the generator's seed; the same seed gives the same interval.

    Raises
    ------
    ValueError
        If `values` is empty or not finite.

    References
    ----------
    Efron, "Better bootstrap confidence intervals", JASA 82 (1987).

    Examples
    --------
    >>> bootstrap([4.0]).low is None
    True
    """
    x = np.asarray(values, dtype=np.float64)
    if x.size == 0 or not np.isfinite(x).all():
        raise ValueError(f"values must be finite and at least one; got {list(values)}")
    point = float(statistic(x, axis=-1))
    if x.size < 3:
        return Estimate(point, None, None, x.size, f"no interval: n = {x.size}", level)
    if (x == x[0]).all():
        return Estimate(point, point, point, x.size, "no spread: all values equal", level)
    for method, name in (("BCa", "BCa bootstrap"), ("percentile", "percentile bootstrap, BCa undefined")):
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore", stats.DegenerateDataWarning)
            result = stats.bootstrap(
                (x,),
                statistic,
                axis=-1,
                n_resamples=resamples,
                confidence_level=level,
                method=method,
                random_state=np.random.default_rng(seed),
            )
        low, high = (float(end) for end in result.confidence_interval)
        if np.isfinite([low, high]).all():
            return Estimate(point, low, high, x.size, name, level)
    raise AssertionError("a percentile interval of finite values is finite")


def proportion(successes: int, n: int, *, level: float = LEVEL) -> Estimate:
    """Share of `n` runs with the exact (Clopper-Pearson) interval: 3 of 3 reads 1, 0.29 to 1.

    Raises
    ------
    ValueError
        If `n` is not positive or `successes` not in 0 to `n`.
    """
    interval = stats.binomtest(successes, n).proportion_ci(level, method="exact")
    return Estimate(successes / n, float(interval.low), float(interval.high), n, "Clopper-Pearson", level)


def pearson(x: Sequence[float], y: Sequence[float], *, level: float = LEVEL) -> Estimate:
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
    >>> pearson([1.0, 2.0, 3.0], [2.0, 4.0, 6.0]).value
    1.0
    """
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if a.shape != b.shape or a.size < 2:
        raise ValueError(f"r needs two or more pairs; got {a.size} and {b.size} values")
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return Estimate(
            float("nan"), None, None, a.size, "r is undefined: all values of one are equal", level
        )
    r = float(np.clip(np.corrcoef(a, b)[0, 1], -1.0, 1.0))
    if a.size < 4 or abs(r) == 1:
        return Estimate(r, None, None, a.size, f"no interval: n = {a.size}, r = {r:.3g}", level)
    half = float(stats.norm.ppf((1 + level) / 2)) / (a.size - 3) ** 0.5
    low, high = (float(np.tanh(np.arctanh(r) + sign * half)) for sign in (-1, 1))
    return Estimate(r, low, high, a.size, "Pearson r, Fisher interval", level)


def welch(x: Sequence[float], y: Sequence[float], *, level: float = LEVEL) -> Estimate:
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
        return Estimate(gap, None, None, a.size + b.size, f"no interval: n = {a.size} and {b.size}", level)
    interval = stats.ttest_ind(b, a, equal_var=False).confidence_interval(level)
    low, high = float(interval.low), float(interval.high)
    return Estimate(gap, low, high, a.size + b.size, "difference of means, Welch interval", level)


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
