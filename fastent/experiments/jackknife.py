"""Intervals for numbers made of many dependent evaluations: whole runs are left out, one at a time.

Evaluations of a run are far from independent, so resampling them would give intervals that are far too narrow, and
a bootstrap over few runs repeats some of them and fits the rest too well (`fastent.power_law` has the
simulations). Student's t on n - 1 degrees of freedom, on a scale where the number is nearer to normal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats

from fastent.experiments.statistics import LEVEL, Estimate

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
"""For shares of explained variance, as in `fastent.power_law`."""


def jackknife(
    value: float, left_out: Sequence[float], scale: Scale = PLAIN, *, level: float = LEVEL
) -> Estimate:
    """`value` of all runs with an interval from its values with each run left out.

    Parameters
    ----------
    value : float
        Of all runs.
    left_out : sequence of floats
        Of all runs but one, one for each run.
    scale : pair of functions
        Where the interval is symmetric, and the way back.
    level : float
        Confidence, in (0, 1).

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
        return Estimate(value, None, None, n, f"no interval: {reason}", level)

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
    width = float(stats.t.ppf((1 + level) / 2, n - 1)) * math.sqrt((n - 1) * float(replicates.var()))
    low, high = float(back(centre - width)), float(back(centre + width))
    if scale is EXPLAINED and low < WORST:
        return without(f"not determined by {n} runs")
    return Estimate(value, low, high, n, "jackknife over runs", level)
