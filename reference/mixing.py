"""Mixing of representations: exact covariances and the bounds that hold.

Each row is replaced by ``(1 - a) h_i + a h_pi(i)`` for a permutation pi. On centred data X, with
``M = (1 - a) I + a P``, the covariance becomes ``X^T M^T M X / N``. M is normal and ``M^T M`` has its
eigenvalues in ``[(1 - 2a)^2, 1]``, so ``(1 - 2a)^2 C <= C_mixed <= C`` in the Loewner order for every
permutation and ``0 <= a <= 1``: mixing takes variance away from every direction. What that does to the
entropy is bounded by `best_bound`.

The paper's Lemma 5 claims ``H(C_mixed) >= H(C) - O(a^2)``. That is false: the loss can be first order in a
(for the rows of `counterexample` under a cyclic shift it tends to 0.89 a). On average over permutations mixing
only rescales the covariance (`expected_covariance`), so the first-order change of H averages to 0 and is a loss for
about every other permutation: `slope` gives it, `slope_deviation` its spread.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .covariance import Array, covariance
from .perturbation import entropy_change, entropy_gradient

__all__ = [
    "best_bound",
    "counterexample",
    "cyclic_shift",
    "expected_covariance",
    "extremal_rows",
    "mix",
    "mixed_covariance",
    "sandwich",
    "shifted_covariance",
    "slope",
    "slope_deviation",
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
    own, cross = covariance(x), _cross(x, permutation)
    mixed: Array = ((1 - alpha) ** 2 + alpha**2) * own + alpha * (1 - alpha) * (cross + cross.T)
    return mixed


def slope(x: ArrayLike, permutation: ArrayLike) -> float:
    """``dH / d alpha`` at alpha = 0, in nats: ``tr(G (K + K^T))``, G as in `fastent.reference.perturbation`.

    The term ``-2 C`` of the covariance's own slope drops out, since H does not depend on the scale.
    """
    cross = _cross(x, permutation)
    return entropy_change(covariance(x), cross + cross.T)


def slope_deviation(eigenvalues: ArrayLike, n: int) -> float:
    """Return the standard deviation of `slope` over all permutations of n rows, whose mean is 0; exact, nats.

    ``2 sqrt(sum p_i^2 (log p_i + H)^2 / (n - 1))``: with ``q_ij = 2 x_i^T G x_j``, whose rows and columns sum
    to 0, the slope is ``(1/n) sum q_i,pi(i)``, of variance ``sum q_ij^2 / (n^2 (n - 1))``.

    References
    ----------
    Hoeffding, "A combinatorial central limit theorem", Annals of Mathematical Statistics 22 (1951), Theorem 2.
    """
    lam: NDArray[np.float64] = np.asarray(eigenvalues, dtype=np.float64)
    return float(2 * np.linalg.norm(entropy_gradient(lam) * lam) / np.sqrt(n - 1))


def _cross(x: ArrayLike, permutation: ArrayLike) -> NDArray[np.float64]:
    """``K = (1/N) sum (x_i - mean)(x_pi(i) - mean)^T``."""
    rows: NDArray[np.float64] = np.asarray(x, dtype=np.float64)
    y = rows - rows.mean(axis=0)
    y = y - y.mean(axis=0)
    cross: NDArray[np.float64] = y.T @ y[np.asarray(permutation)] / len(y)
    return cross


def counterexample(n: int = 64) -> NDArray[np.float64]:
    """Rows (n, 2) whose cyclic shift breaks the printed Lemma 5: ``sqrt(2) cos(2 pi t / n)``, ``(-1)^t / 2``.

    The shift keeps nearly all of the first column's variance and ``(1 - 2 alpha)^2`` of the second's. n is even.
    """
    t = np.arange(n)
    return np.stack([np.sqrt(2) * np.cos(2 * np.pi * t / n), 0.5 * (-1.0) ** t], axis=1)


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
    and ``k = (1 - 2a)^2``. Attained: see `extremal_rows`. For small a it is linear in a: 0.896 a for d = 2,
    5.04 a for d = 128.

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
    return _largest_fall(alpha, d)[0]


def extremal_rows(n: int, d: int, alpha: float) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """Rows (n, d) and a permutation without fixed points that lose exactly ``best_bound(alpha, d)``.

    The permutation swaps the two rows of each of n/2 pairs. The first column is equal within pairs and keeps its
    variance; the other d - 1, orthogonal and of one size, change sign within pairs and keep ``(1 - 2 alpha)^2``.

    Raises
    ------
    ValueError
        If n is odd or less than ``max(4, 2 (d - 1))``: then there are too few pairs.
    """
    if n % 2 or n < max(4, 2 * (d - 1)):
        raise ValueError(f"needs an even n of at least {max(4, 2 * (d - 1))} for d = {d}; got n = {n}")
    pairs = n // 2
    share = _largest_fall(alpha, d)[1]
    kept = np.where(np.arange(pairs) < pairs // 2, 1.0, -1.0)
    kept -= kept.mean()
    shrunk = np.eye(pairs, d - 1) * np.sqrt(n / 2)  # column k lives in pair k alone
    columns = np.column_stack([kept / kept.std() * np.sqrt(share), shrunk * np.sqrt((1 - share) / (d - 1))])
    rows = np.repeat(columns, 2, axis=0)
    rows[1::2, 1:] *= -1
    return rows, np.arange(n) ^ 1


def _largest_fall(alpha: float, d: int) -> tuple[float, float]:
    """`best_bound` and the share s of the kept direction at which it is attained."""
    if not 0 <= alpha <= 1 or d < 2:
        raise ValueError(f"needs 0 <= alpha <= 1 and d >= 2; got alpha = {alpha}, d = {d}")
    k = (1 - 2 * alpha) ** 2
    if k == 0:
        return float(np.log(d)), 1 / d  # from uniform to a single direction
    if k == 1:
        return 0.0, 0.5
    # In u = log(s / (1 - s)) the change of weight is a plain shift, log(t / (1 - t)) = u - log k, and
    # neither end of (0, 1) is crowded. Outside the first interval both entropies differ from their limits
    # by less than 1e-15.
    low, high = -np.log(d) - 40 + np.log(k), 40.0
    best, at = 0.0, 0.0
    for _ in range(8):  # a grid, then finer grids around its best point: the function may have two humps
        u = np.linspace(low, high, 4001)
        value = _fall(u, -np.log(k), d)
        i = int(np.argmax(value))
        if value[i] > best:
            best, at = float(value[i]), float(u[i])
        low, high = u[max(i - 1, 0)], u[min(i + 1, len(u) - 1)]
    return best, float(1 / (1 + np.exp(-at)))


def _fall(u: NDArray[np.float64], step: float, d: int) -> NDArray[np.float64]:
    """Entropy of the grouped spectrum at log-odds u, minus that at u + step."""

    def grouped(v: NDArray[np.float64]) -> NDArray[np.float64]:
        log_s, log_rest = -np.logaddexp(0, -v), -np.logaddexp(0, v)
        s, rest = np.exp(log_s), np.exp(log_rest)
        entropy: NDArray[np.float64] = -s * log_s - rest * log_rest + rest * np.log(d - 1)
        return entropy

    return grouped(u) - grouped(u + step)
