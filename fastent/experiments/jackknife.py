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

Scale = tuple[Callable[[float], float], Callable[[float], float]]
"""A transformation to a scale and back."""

PLAIN: Scale = (lambda x: x, lambda x: x)
CORRELATION: Scale = (lambda r: math.atanh(min(max(r, -1 + 1e-15), 1 - 1e-15)), math.tanh)
"""Fisher's, for correlations."""
EXPLAINED: Scale = (lambda r: -math.log(max(1 - r, 1e-15)), lambda x: -math.expm1(-x))
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
        Without an interval below three runs, or where a value is not finite.

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
    known = [value, *left_out]
    if n < 3 or not np.isfinite(known).all():
        reason = f"no interval: n = {n}" if n < 3 else "no interval: undefined with a run left out"
        return Estimate(value, None, None, n, reason, level)
    there, back = scale
    centre, replicates = there(value), np.array([there(x) for x in left_out])
    width = float(stats.t.ppf((1 + level) / 2, n - 1)) * math.sqrt((n - 1) * float(replicates.var()))
    return Estimate(
        value, float(back(centre - width)), float(back(centre + width)), n, "jackknife over runs", level
    )
