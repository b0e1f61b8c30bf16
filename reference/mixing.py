"""Mixing of representations: exact covariances and the bounds that hold.

Each row is replaced by ``(1 - a) h_i + a h_pi(i)`` for a permutation pi. On centred data X, with
``M = (1 - a) I + a P``, the covariance becomes ``X^T M^T M X / N``. M is normal and ``M^T M`` has its
eigenvalues in ``[(1 - 2a)^2, 1]``, so ``(1 - 2a)^2 C <= C_mixed <= C`` in the Loewner order for every
permutation and ``0 <= a <= 1``: mixing takes variance away from every direction. What that does to the
entropy is bounded by `best_bound`.

The paper's Lemma 5 claims ``H(C_mixed) >= H(C) - O(a^2)``. That is false: the loss can be first order in a
(for 64 rows ``(sqrt(2) cos(2 pi t / 64), (-1)^t / 2)`` under a cyclic shift it tends to 0.89 a). On average
over permutations mixing only rescales the covariance: see `expected_covariance`.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .covariance import Array, covariance

__all__ = [
    "best_bound",
    "cyclic_shift",
    "expected_covariance",
    "mix",
    "mixed_covariance",
    "sandwich",
    "shifted_covariance",
]


def cyclic_shift(n: int, shift: int = 1) -> NDArray[np.intp]:
    """Return the permutation ``pi(i) = (i + shift) mod n``."""
    return (np.arange(n) + shift) % n


def mix(x: ArrayLike, permutation: ArrayLike, alpha: float) -> NDArray[np.float64]:
    """``(1 - alpha) x_i + alpha x_pi(i)``, shape (n, d), in float64."""
    rows: NDArray[np.float64] = np.asarray(x, dtype=np.float64)
    mixed: NDArray[np.float64] = (1 - alpha) * rows + alpha * rows[np.asarray(permutation)]
    return mixed


def mixed_covariance(x: ArrayLike, permutation: ArrayLike, alpha: float) -> Array:
    """Covariance after mixing, from the unmixed rows.

    ``((1-a)^2 + a^2) C + a (1-a) (K + K^T)`` with ``K = (1/N) sum (x_i - mean)(x_pi(i) - mean)^T``; exact.
    """
    rows: NDArray[np.float64] = np.asarray(x, dtype=np.float64)
    y = rows - rows.mean(axis=0)
    y = y - y.mean(axis=0)
    cross = y.T @ y[np.asarray(permutation)] / len(y)
    mixed: Array = ((1 - alpha) ** 2 + alpha**2) * covariance(rows) + alpha * (1 - alpha) * (cross + cross.T)
    return mixed


def shifted_covariance(x: ArrayLike, alpha: float, shift: int = 1) -> Array:
    """Covariance after mixing with a cyclic shift, in the Fourier basis along the sample axis.

    ``sum_k |1 - a + a w_k|^2 c_k c_k^*`` with ``w_k = exp(2 pi i k shift / N)`` and the Fourier
    coefficients ``c_k`` of the centred rows; exact. A column that varies slowly along the samples keeps its
    variance, one that alternates keeps (1 - 2a)^2 of it.
    """
    rows: NDArray[np.float64] = np.asarray(x, dtype=np.float64)
    y = rows - rows.mean(axis=0)
    coefficients = np.fft.fft(y, axis=0) / len(y)
    coefficients[0] = 0  # the mean, up to rounding
    turn = np.exp(2j * np.pi * shift * np.arange(len(y)) / len(y))
    gain = np.abs(1 - alpha + alpha * turn) ** 2
    products = ((coefficients * gain[:, None]).T @ coefficients.conj()).real
    mixed: Array = (products + products.T) / 2
    return mixed


def sandwich(alpha: float) -> tuple[float, float]:
    """Return (k, 1), ``k = (1 - 2 alpha)^2``: every permutation gives ``k C <= C_mixed <= C``."""
    return (1 - 2 * alpha) ** 2, 1.0


def expected_covariance(
    matrix: Array, n: int, alpha: float, *, over: Literal["permutations", "derangements"]
) -> Array:
    """Mean of the covariance after mixing, over uniformly random permutations or derangements of n rows.

    Proportional to C: ``((1-a)^2 + a^2) C`` over permutations; over derangements, which have no fixed point
    (``n >= 2``), less by ``2a(1-a)/(N-1) C``.

    Raises
    ------
    ValueError
        If `over` is unknown.
    """
    factor = (1 - alpha) ** 2 + alpha**2
    if over == "derangements":
        factor -= 2 * alpha * (1 - alpha) / (n - 1)
    elif over != "permutations":
        raise ValueError(f'over must be "permutations" or "derangements"; got {over!r}')
    return factor * matrix


def best_bound(alpha: float, d: int) -> float:
    """Largest change of the entropy by mixing, in nats: any data in d dimensions, any permutation.

    ``B(a, d) = max over 0 < s < 1 of h2(s) - h2(t) + (t - s) log(d - 1)``, with ``t = s / (s + k (1 - s))``
    and ``k = (1 - 2a)^2``. Sharp: a slow cosine against d - 1 near-Nyquist cosines under a cyclic shift
    approaches it as n grows. For small a it is linear in a: 0.896 a for d = 2, 5.04 a for d = 128.

    Parameters
    ----------
    alpha : float
        Mixing coefficient in [0, 1].
    d : int
        Dimension, at least 2.

    Raises
    ------
    ValueError
        If `alpha` or `d` is out of range.
    """
    if not 0 <= alpha <= 1 or d < 2:
        raise ValueError(f"needs 0 <= alpha <= 1 and d >= 2; got alpha = {alpha}, d = {d}")
    k = (1 - 2 * alpha) ** 2
    if k == 0:
        return float(np.log(d))  # from uniform to a single direction
    if k == 1:
        return 0.0
    # In u = log(s / (1 - s)) the change of weight is a plain shift, log(t / (1 - t)) = u - log k, and
    # neither end of (0, 1) is crowded. Outside the first interval both entropies differ from their limits
    # by less than 1e-15.
    low, high = -np.log(d) - 40 + np.log(k), 40.0
    best = 0.0
    for _ in range(8):  # a grid, then finer grids around its best point: the function may have two humps
        u = np.linspace(low, high, 4001)
        value = _fall(u, -np.log(k), d)
        i = int(np.argmax(value))
        best = max(best, float(value[i]))
        low, high = u[max(i - 1, 0)], u[min(i + 1, len(u) - 1)]
    return best


def _fall(u: NDArray[np.float64], step: float, d: int) -> NDArray[np.float64]:
    """Entropy of the grouped spectrum at log-odds u, minus that at u + step."""

    def grouped(v: NDArray[np.float64]) -> NDArray[np.float64]:
        log_s, log_rest = -np.logaddexp(0, -v), -np.logaddexp(0, v)
        s, rest = np.exp(log_s), np.exp(log_rest)
        entropy: NDArray[np.float64] = -s * log_s - rest * log_rest + rest * np.log(d - 1)
        return entropy

    return grouped(u) - grouped(u + step)
