"""Count, mean and scatter of parts of a data set, and their merge.

``merge(a, b)`` gives the moments of the rows of both, by the formula of Chan, Golub and LeVeque (1983):
``M2 = M2_a + M2_b + n_a n_b / n (mean_b - mean_a)(mean_b - mean_a)^T``. Raw sums are never merged: at an
offset of 1e6 times the spread they lose all digits and can give a negative eigenvalue.

A mean is kept in two parts, a row of the data and the mean minus that row. One float64 would round the mean by
eps times the offset, and the merge would carry that on: a relative error of ``eps * offset / spread``, 2e-10 at
1e6.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from .covariance import Array

__all__ = ["Moments", "merge", "moments"]


@dataclass(frozen=True)
class Moments:
    """Moments of `n` rows, all in float64 or all in long double.

    Attributes
    ----------
    n : int
        Number of rows; 0 for the neutral element of `merge`.
    shift : ndarray, shape (d,)
        A row of the data, or another point near them, in units of the data.
    delta : ndarray, shape (d,)
        Mean of the rows minus `shift`.
    m2 : ndarray, shape (d, d)
        ``sum (x - mean)(x - mean)^T``, in units of the data squared.
    """

    n: int
    shift: Array
    delta: Array
    m2: Array

    @property
    def mean(self) -> Array:
        """Mean row, shape (d,), rounded at the size of the offset."""
        return self.shift + self.delta

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
    rows = rows.astype(np.longdouble if extended else np.float64, order="C")
    n, d = rows.shape
    if n == 0:
        return Moments(0, np.zeros(d, rows.dtype), np.zeros(d, rows.dtype), np.zeros((d, d), rows.dtype))
    y = rows - rows[0]
    delta = y.mean(axis=0)
    y = y - delta
    products = y.T @ y
    return Moments(n, rows[0], delta, np.tril(products) + np.tril(products, -1).T)


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
    difference = (b.shift - a.shift) + (b.delta - a.delta)
    between = np.outer(difference, difference) * (a.n * b.n / n)
    return Moments(n, a.shift, a.delta + difference * (b.n / n), a.m2 + b.m2 + between)
