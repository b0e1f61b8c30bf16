"""Triples (t, H(t), T_grok) of runs that grokked, and least squares of a power law to them.

``remaining = C1 gap^gamma + C2`` with ``gap = H - H*``. For a fixed gamma it is linear, and C1 >= 0, C2 >= 0
have a closed form (non-negative least squares in two unknowns), so only gamma is searched, between
`GAMMA_BOUNDS`. What a fit means and how sure it is belongs to `fastent.power_law`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastent.history import Array, History, Interval

Sign = Literal["non-negative", "free", "zero"]

GAMMA_BOUNDS = (0.1, 20.0)
_LOG_GAMMAS = np.log(np.geomspace(*GAMMA_BOUNDS, 33))


class Triples(NamedTuple):
    """Usable evaluations before grokking, flat over the runs used.

    Attributes
    ----------
    origin : tuple of int
        Which of the histories given are used, in order: those that grokked with a usable entropy there.
    t_grok, entropy_at_grok : arrays of shape (n_runs,)
        Of each run used.
    run : integer array of shape (m,)
        Place in `origin` of each evaluation's run.
    step, entropy, remaining : arrays of shape (m,)
        Evaluation step, normalised entropy, steps until `t_grok` (positive).
    """

    origin: tuple[int, ...]
    t_grok: Array
    entropy_at_grok: Array
    run: NDArray[np.intp]
    step: Array
    entropy: Array
    remaining: Array

    @classmethod
    def of(cls, histories: Sequence[History]) -> Self:
        """Collect them; a run without `entropy_at_grok` takes no part, since it cannot calibrate H*."""
        origin: list[int] = []
        t_grok, at_grok = [], []
        run, step, entropy = [np.empty(0, np.intp)], [np.empty(0)], [np.empty(0)]
        for i, history in enumerate(histories):
            h = history.entropy_at_grok
            if history.t_grok is None or h is None:
                continue
            before = history.usable & (history.step < history.t_grok)
            run.append(np.full(int(before.sum()), len(origin)))
            step.append(history.step[before])
            entropy.append(history.entropy[before])
            origin.append(i)
            t_grok.append(history.t_grok)
            at_grok.append(h)
        runs, steps, times = np.concatenate(run), np.concatenate(step), np.array(t_grok)
        return cls(
            origin=tuple(origin),
            t_grok=times,
            entropy_at_grok=np.array(at_grok),
            run=runs,
            step=steps,
            entropy=np.concatenate(entropy),
            remaining=times[runs] - steps if origin else steps,
        )


class Solution(NamedTuple):
    """One least-squares fit; `gap_range` and `n_points` are of the evaluations it used."""

    c1: float
    gamma: float
    c2: float
    h_star: float
    r_squared: float
    gap_range: Interval
    n_points: int

    def remaining(self, entropy: Array) -> Array:
        """Return the steps until grokking at entropies above `h_star`."""
        steps: Array = self.c1 * (entropy - self.h_star) ** self.gamma + self.c2
        return steps

    @property
    def determined(self) -> bool:
        """Whether gamma was found inside its bounds, with a c1 that makes it matter."""
        low, high = GAMMA_BOUNDS
        return self.c1 > 0 and 1.001 * low < self.gamma < high / 1.001


def solve(
    triples: Triples, used: NDArray[np.bool_], *, c2: Sign = "non-negative", gamma: float | None = None
) -> Solution:
    """Least squares over the runs `used` (n_runs,), H* calibrated on the same runs.

    Parameters
    ----------
    triples : Triples
        Evaluations at or below H* take no part.
    used : bool array of shape (n_runs,)
        The other runs are left out of H* too.
    c2 : {"non-negative", "free", "zero"}
        Constraint on C2.
    gamma : float, optional
        Not searched when given.

    Raises
    ------
    ValueError
        If fewer than three different entropies above H* remain.
    """
    from scipy.optimize import minimize_scalar

    h_star = float(triples.entropy_at_grok[used].mean())
    kept = used[triples.run] & (triples.entropy > h_star)
    gap, y = triples.entropy[kept] - h_star, triples.remaining[kept]
    if np.unique(gap).size < 3:
        raise ValueError(
            f"a power law needs at least 3 different entropies above H* = {h_star:.4f} before grokking; "
            f"{int(used.sum())} runs hold {np.unique(gap).size}. Evaluate more often"
        )
    # Over the largest gap, so that powers stay in (0, 1] for any gamma.
    top = float(gap.max())
    log_gap = np.log(gap / top)

    def linear(log_gamma: ArrayLike) -> tuple[Array, Array, Array]:
        return fit_line(np.exp(np.multiply.outer(np.exp(log_gamma), log_gap)), y, c2=c2)

    if gamma is None:
        # A grid first: with constraints the error may have several minima in gamma.
        near = int(np.argmin(linear(_LOG_GAMMAS)[2]))
        bracket = _LOG_GAMMAS[max(near - 1, 0)], _LOG_GAMMAS[min(near + 1, len(_LOG_GAMMAS) - 1)]
        best = minimize_scalar(
            lambda x: float(linear(x)[2]), bounds=bracket, method="bounded", options={"xatol": 1e-9}
        )
        gamma = math.exp(best.x)
    slope, intercept, error = (float(x) for x in linear(math.log(gamma)))
    total = float(((y - y.mean()) ** 2).sum())
    return Solution(
        c1=slope / top**gamma,
        gamma=gamma,
        c2=intercept,
        h_star=h_star,
        r_squared=1 - error * y.size / total if total > 0 else 0.0,
        gap_range=(float(gap.min()), top),
        n_points=int(kept.sum()),
    )


def fit_line(
    u: Array, y: Array, weights: Array | None = None, *, c2: Sign = "non-negative"
) -> tuple[Array, Array, Array]:
    """Weighted least squares of ``y = slope u + intercept`` along the last axis of `u`, with slope >= 0.

    `u` (..., m) and `y` (m,) are not negative; the intercept obeys `c2`. Returns slope, intercept and the
    weighted mean squared error, each of shape (...).
    """
    w = np.full(y.shape, 1 / y.size) if weights is None else weights / weights.sum()
    norm = (u * u) @ w
    # Where all u are 0 their slope does not matter.
    through_0 = (u @ (w * y)) / np.where(norm > 0, norm, np.inf)
    if c2 == "zero":
        slope, intercept = through_0, np.zeros_like(through_0)
    else:
        mean_u, mean_y = u @ w, y @ w
        centred = u - mean_u[..., None]
        variance = (centred * centred) @ w
        slope = np.maximum((centred @ (w * (y - mean_y))) / np.where(variance > 0, variance, np.inf), 0)
        intercept = mean_y - slope * mean_u
        if c2 == "non-negative":
            # y and u are not negative, so at most one of the two constraints binds.
            binds = intercept < 0
            slope, intercept = np.where(binds, through_0, slope), np.where(binds, 0.0, intercept)
    residual = y - (slope[..., None] * u + intercept[..., None])
    return slope, intercept, (residual * residual) @ w
