"""Spectral entropy in plain NumPy.

``H = -sum p_i log p_i`` with ``p_i = lambda_i / sum lambda`` over the eigenvalues of the covariance, in nats,
and ``H / log d`` in [0, 1]. Two conventions for small eigenvalues:

``relative``
    Those below ``d eps lambda_max`` (eps of float64, whatever the arithmetic) count as 0, and
    ``0 log 0 = 0``. Scaling the data changes nothing; constant rows have H = 0.
``paper``
    As printed in the paper's Appendix B: eigenvalues are raised to 1e-12, normalised, and 1e-12 is added
    inside the logarithm. Constant rows then score 1, "maximally uniform".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from .covariance import Array, eigenvalues, scaled_covariance

__all__ = [
    "PAPER_FLOOR",
    "Convention",
    "SpectralEntropy",
    "binary_entropy",
    "ceiling",
    "effective_rank",
    "entropy_of_eigenvalues",
    "fannes_audenaert",
    "participation_ratio",
    "relative_floor",
    "spectral_entropy",
]

Convention = Literal["relative", "paper"]

PAPER_FLOOR = 1e-12
"""The absolute clamp and the regulariser of the paper's Appendix B, in units of the data squared."""


@dataclass(frozen=True)
class SpectralEntropy:
    """What `spectral_entropy` returns.

    Attributes
    ----------
    normalized : float
        ``entropy / log d``, no unit.
    entropy : float
        In nats.
    effective_rank : float
        ``exp(entropy)``, between 1 and d (Roy and Vetterli, "The effective rank", EUSIPCO 2007).
    participation_ratio : float
        ``(sum lambda)^2 / sum lambda^2``, at most `effective_rank`.
    eigenvalues : ndarray, shape (d,)
        Ascending, as the solver gave them, in units of the data squared.
    total_variance : float
        Trace of the covariance.
    ceiling : float
        What `normalized` cannot exceed with so few rows.
    """

    normalized: float
    entropy: float
    effective_rank: float
    participation_ratio: float
    eigenvalues: Array
    total_variance: float
    ceiling: float


def relative_floor(eigenvalues: Array) -> float:
    """``d eps lambda_max``: below it an eigenvalue in float64 is noise."""
    return float(len(eigenvalues) * np.finfo(np.float64).eps * np.max(eigenvalues))


def entropy_of_eigenvalues(eigenvalues: ArrayLike, *, convention: Convention = "relative") -> float:
    """Entropy of a spectrum in nats.

    Parameters
    ----------
    eigenvalues : array_like, shape (d,)
        Of a positive semidefinite matrix, in any order; slightly negative values count as 0. A long double
        array is worked on in long double.
    convention : {"relative", "paper"}
        See the module.

    Raises
    ------
    ValueError
        If `convention` is unknown.
    """
    lam = np.asarray(eigenvalues)
    lam = lam.astype(np.longdouble if lam.dtype == np.longdouble else np.float64)
    if convention == "paper":
        lam = np.maximum(lam, PAPER_FLOOR)
        p = lam / lam.sum()
        return float(-(p * np.log(p + PAPER_FLOOR)).sum())
    if convention != "relative":
        raise ValueError(f'convention must be "relative" or "paper"; got {convention!r}')
    kept = lam[(lam >= relative_floor(lam)) & (lam > 0)]
    if kept.size == 0:
        return 0.0
    p = kept / kept.sum()
    entropy = float(-(p * np.log(p)).sum())
    return min(max(0.0, entropy), float(np.log(len(lam))))  # rounding must not leave [0, log d]


def effective_rank(entropy: float) -> float:
    """``exp(entropy)``, entropy in nats."""
    return float(np.exp(entropy))


def participation_ratio(matrix: Array) -> float:
    """``tr(C)^2 / ||C||_F^2``, the exponential of the Renyi-2 entropy; 1 for the zero matrix, like exp(0)."""
    largest = np.max(np.abs(matrix))
    if largest == 0:
        return 1.0
    scaled = matrix / largest
    return float(np.trace(scaled) ** 2 / (scaled * scaled).sum())


def ceiling(n: int, d: int) -> float:
    """Largest normalised entropy of n rows in d dimensions: ``log min(n - 1, d) / log d``."""
    rank = min(n - 1, d)
    return float(np.log(rank) / np.log(d)) if rank > 0 else 0.0


def spectral_entropy(
    x: ArrayLike, *, convention: Convention = "relative", extended: bool = False
) -> SpectralEntropy:
    """Spectral entropy of the rows of `x`.

    Parameters
    ----------
    x : array_like, shape (n, d)
        Finite values, one sample per row, ``d >= 2``.
    convention : {"relative", "paper"}
        See the module.
    extended : bool
        Covariance, eigenvalues and entropy in `numpy.longdouble`.

    Raises
    ------
    ValueError
        If `x` is not 2-D, has no row, is not finite or has one column, or `convention` is unknown.
    """
    matrix, exponent = scaled_covariance(x, extended=extended)
    d = len(matrix)
    if d < 2:
        raise ValueError("x must have at least 2 columns: the entropy is divided by log d")
    scaled = eigenvalues(matrix)
    with np.errstate(over="ignore", under="ignore"):
        lam = np.ldexp(scaled, exponent)
        total = np.ldexp(np.trace(matrix), exponent)
    if convention == "paper":  # its floor has units: long double holds the squares of every float64
        entropy = entropy_of_eigenvalues(np.ldexp(scaled.astype(np.longdouble), exponent), convention="paper")
    else:
        entropy = entropy_of_eigenvalues(scaled, convention=convention)
    return SpectralEntropy(
        normalized=entropy / float(np.log(d)),
        entropy=entropy,
        effective_rank=effective_rank(entropy),
        participation_ratio=participation_ratio(matrix),
        eigenvalues=lam,
        total_variance=float(total),
        ceiling=ceiling(np.shape(x)[0], d),
    )


def binary_entropy(t: ArrayLike) -> Array:
    """``h2(t) = -t log t - (1 - t) log(1 - t)`` in nats, 0 at t = 0 and t = 1."""
    t = np.asarray(t, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        first = np.where(t > 0, -t * np.log(t), 0.0)
        second = np.where(t < 1, -(1 - t) * np.log1p(-t), 0.0)
    return first + second


def fannes_audenaert(distance: float, d: int) -> float:
    """Largest difference of the entropies of two distributions on d points, in nats.

    ``T log(d - 1) + h2(T)`` for a total variation distance ``T <= 1 - 1/d`` (half the trace norm of the
    difference of two matrices of trace one); ``log d`` beyond, so that an upper bound may stand for
    `distance`.

    References
    ----------
    Audenaert, "A sharp Fannes-type inequality for the von Neumann entropy", J. Phys. A 40 (2007), Theorem 1.
    """
    if distance >= 1 - 1 / d:
        return float(np.log(d))
    return float(distance * np.log(d - 1) + binary_entropy(distance))
