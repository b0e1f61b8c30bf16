"""Count, mean and scatter of parts of a data set, and their merge.

``merge(a, b)`` gives the moments of the rows of both, by the formula of Chan, Golub and LeVeque (1983):
``M2 = M2_a + M2_b + n_a n_b / n (mean_b - mean_a)(mean_b - mean_a)^T``. Raw sums are never merged: at an
offset of 1e6 times the spread they lose all digits and can give a negative eigenvalue.

A float64 mean is itself rounded, by eps times the offset, and the merge squares nothing of that away: it
leaves a relative error of about ``eps * offset / spread`` (1e-11 at 1e6). The package keeps its means as
differences from a data row to avoid that; here ``extended=True`` does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .covariance import Array

__all__ = ["Moments", "merge", "moments"]


@dataclass(frozen=True)
class Moments:
    """Moments of `n` rows.

    Attributes
    ----------
    n : int
        Number of rows; 0 for the neutral element of `merge`.
    mean : ndarray, shape (d,)
        Mean row, in units of the data.
    m2 : ndarray, shape (d, d)
        ``sum (x - mean)(x - mean)^T``, in units of the data squared.
    """

    n: int
    mean: Array
    m2: Array

    def covariance(self, correction: int = 0) -> Array:
        """``m2 / (n - correction)``; ValueError if that is not a division by a positive number."""
        if correction >= self.n:
            raise ValueError(f"correction must be less than the number of rows {self.n}; got {correction}")
        return self.m2 / (self.n - correction)


def moments(x: ArrayLike, *, extended: bool = False) -> Moments:
    """Moments of the rows of `x`, in two passes.

    Parameters
    ----------
    x : array_like, shape (n, d)
        ``n = 0`` is allowed and gives the neutral element of `merge`.
    extended : bool
        Compute in `numpy.longdouble` instead of float64.

    Raises
    ------
    ValueError
        If `x` is not 2-D.
    """
    rows = np.asarray(x)
    if rows.ndim != 2:
        raise ValueError(f"x must have shape (n, d); got {rows.shape}")
    rows = rows.astype(np.longdouble if extended else np.float64)
    n, d = rows.shape
    if n == 0:
        return Moments(0, np.zeros(d, rows.dtype), np.zeros((d, d), rows.dtype))
    mean = rows.mean(axis=0)
    y = rows - mean
    correction = y.mean(axis=0)  # what the rounding of the mean left behind
    return Moments(n, mean + correction, _symmetric(y.T @ y - n * np.outer(correction, correction)))


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of the rows of `a` and `b` together.

    References
    ----------
    Chan, Golub and LeVeque, "Algorithms for computing the sample variance", The American Statistician 37
    (1983), equation 2.1.
    """
    if a.n == 0 or b.n == 0:
        return b if a.n == 0 else a
    n = a.n + b.n
    difference = b.mean - a.mean
    mean = a.mean + difference * b.n / n
    between = np.outer(difference, difference) * (a.n * b.n / n)
    return Moments(n, mean, a.m2 + b.m2 + between)


def _symmetric(matrix: NDArray[np.float64] | NDArray[np.longdouble]) -> Array:
    return np.tril(matrix) + np.tril(matrix, -1).T
