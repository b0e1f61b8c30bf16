"""Scaling laws of the remaining time: Proposition 6 in two readings, and the fitted power law.

`h` is the normalised entropy, `h_star` the threshold, `remaining` the time until grokking, in steps.

- Exponential relaxation ``dH/dt = -k (H - floor)``.
  As printed, the floor is H* itself. Then H never reaches H*, and the answer is the time until it comes
  within a tolerance: ``(1/k) log((H - H*) / eps)``, which grows without bound as eps goes to 0. The name
  `paper` marks it.
  Repaired, the floor is ``h_inf < h_star`` and H crosses H*: ``(1/k) log((H - h_inf) / (H* - h_inf))``.
- Power law ``remaining = c1 (H - H*)^gamma + c2``. Differentiated along a run (remaining falls by 1 a step)
  it is ``dH/dt = -gap^(1 - gamma) / (c1 gamma)``, ``gap = H - H*``.
- First passage of the squared norm V under weight decay (arXiv 2605.18845): ``dV/dt = -rate V``, with
  ``rate = 2 kappa eta lambda`` and kappa the optimiser's correction, down to ``V*``: ``log(V / V*) / rate``. From
  memorisation on it is the delay; where V is below V* there is none.

- Interval across runs (the jackknife+): each of n runs was forecast by a law fitted to the others, and missed by at
  most so many steps. Forecasts of a new run by the n laws, each with its miss to both sides, are n intervals; the end
  below is the earliest step that fewer than ``level (n + 1)`` of them lie wholly after, and likewise above.

For gamma > 1 that speed diverges at H*: the fall accelerates, where a relaxation slows down. In exponents:
``d log remaining / d log gap`` is gamma for the power law with c2 = 0, and at most 1 for the repaired
relaxation, whatever its constants. So neither law generalises the other.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "entropy_paper",
    "entropy_power",
    "entropy_relaxing",
    "entropy_repaired",
    "exponent_repaired",
    "interval_across",
    "norm_contracting",
    "rate_power",
    "rate_relaxing",
    "remaining_paper",
    "remaining_passage",
    "remaining_power",
    "remaining_repaired",
    "worst_miss",
]

Array = NDArray[np.float64]


def rate_relaxing(h: ArrayLike, *, floor: float, k: float) -> Array:
    """``dH/dt = -k (H - floor)``, per step."""
    return -k * (_float64(h) - floor)


def entropy_relaxing(t: ArrayLike, *, h0: float, floor: float, k: float) -> Array:
    """H after `t` steps of relaxation from `h0`: ``floor + (h0 - floor) exp(-k t)``."""
    return floor + (h0 - floor) * np.exp(-k * _float64(t))


def remaining_paper(h: ArrayLike, *, h_star: float, k: float, eps: float) -> Array:
    """Proposition 6 as printed: steps until ``H - H* = eps``, ``(1/k) log((H - H*) / eps)``.

    Negative where H is already closer than eps; NaN at or below H*, where the solution never is.
    """
    gap = _float64(h) - h_star
    return np.log(np.where(gap > 0, gap, np.nan) / eps) / k


def entropy_paper(remaining: ArrayLike, *, h_star: float, k: float, eps: float) -> Array:
    """Inverse of `remaining_paper`: ``H* + eps exp(k remaining)``."""
    return h_star + eps * np.exp(k * _float64(remaining))


def remaining_repaired(h: ArrayLike, *, h_star: float, h_inf: float, k: float) -> Array:
    """Proposition 6 repaired: steps until H = H* on the way to ``h_inf < h_star``.

    ``(1/k) log((H - h_inf) / (H* - h_inf))``: 0 at H*, negative below it, NaN at or below `h_inf`.
    """
    above = _float64(h) - h_inf
    return np.log(np.where(above > 0, above, np.nan) / (h_star - h_inf)) / k


def entropy_repaired(remaining: ArrayLike, *, h_star: float, h_inf: float, k: float) -> Array:
    """Inverse of `remaining_repaired`: ``h_inf + (H* - h_inf) exp(k remaining)``."""
    return h_inf + (h_star - h_inf) * np.exp(k * _float64(remaining))


def exponent_repaired(h: ArrayLike, *, h_star: float, h_inf: float) -> Array:
    """``d log remaining / d log gap`` of the repaired relaxation, for H > H*.

    With ``x = gap / (H* - h_inf)`` it is ``x / ((1 + x) log(1 + x))``: it tends to 1 at H* and falls from
    there, because ``log(1 + x) > x / (1 + x)``. The rate k drops out.
    """
    x = (_float64(h) - h_star) / (h_star - h_inf)
    return x / ((1 + x) * np.log1p(x))


def rate_power(h: ArrayLike, *, h_star: float, c1: float, gamma: float) -> Array:
    """``dH/dt`` of a run on the power law: ``-gap^(1 - gamma) / (c1 gamma)``, per step, H > H*."""
    gap = _float64(h) - h_star
    return -(np.where(gap > 0, gap, np.nan) ** (1 - gamma)) / (c1 * gamma)


def remaining_power(h: ArrayLike, *, h_star: float, c1: float, gamma: float, c2: float) -> Array:
    """Equation 2: ``c1 (H - H*)^gamma + c2`` steps, H >= H*; c2 is the time left when H crosses H*."""
    gap = _float64(h) - h_star
    return c1 * np.where(gap >= 0, gap, np.nan) ** gamma + c2


def entropy_power(remaining: ArrayLike, *, h_star: float, c1: float, gamma: float, c2: float) -> Array:
    """Inverse of `remaining_power`: ``H* + ((remaining - c2) / c1)^(1 / gamma)``, remaining >= c2.

    NaN for less time than c2: the law says nothing of H after the crossing.
    """
    left = (_float64(remaining) - c2) / c1
    return h_star + np.where(left >= 0, left, np.nan) ** (1 / gamma)


def remaining_passage(v: ArrayLike, *, v_star: float, rate: float) -> Array:
    """First passage of the squared norm from `v` to `v_star`: ``log(v / v_star) / rate`` steps; NaN below it."""
    ratio = _float64(v) / v_star
    return np.log(np.where(ratio >= 1, ratio, np.nan)) / rate


def norm_contracting(remaining: ArrayLike, *, v_star: float, rate: float) -> Array:
    """Inverse of `remaining_passage`: ``v_star exp(rate remaining)``."""
    return v_star * np.exp(rate * _float64(remaining))


def worst_miss(t_grok: float, step: ArrayLike, remaining: ArrayLike) -> float:
    """Error of a run's worst forecast, ``|step + remaining - t_grok|`` in steps; 0 where there is none."""
    forecasts = (_float64(step) + _float64(remaining)).tolist()
    return max((abs(each - t_grok) for each in forecasts), default=0.0)


def interval_across(
    forecasts: ArrayLike, misses: ArrayLike, *, level: Fraction = Fraction(9, 10)
) -> tuple[float, float] | None:
    """Interval of a new run's T_grok at `level` from the `forecasts` (n,) of n laws and their `misses` (n,), in steps.

    None where n is too small for the level: ``level (n + 1) > n``.

    References
    ----------
    Barber, Candes, Ramdas and Tibshirani, "Predictive inference with the jackknife+", Annals of Statistics 49 (2021).
    """
    found, missed = _float64(forecasts), _float64(misses)
    lows, highs = (found - missed).tolist(), (found + missed).tolist()
    enough = level * (len(lows) + 1)
    if enough > len(lows):
        return None
    low = min(end for end in lows if sum(other > end for other in lows) < enough)
    high = max(end for end in highs if sum(other < end for other in highs) < enough)
    return low, high


def _float64(x: ArrayLike) -> Array:
    return np.asarray(x, dtype=np.float64)
