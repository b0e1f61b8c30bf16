"""Two-pass covariance in plain NumPy.

``C = 1/(N - correction) sum_n (x_n - mean)(x_n - mean)^T``, rows are samples: first the mean, then the
products of the centred rows. Slow and obvious; the package computes the same in one pass.

Two things are added to the textbook form. The arithmetic can be `numpy.longdouble` (``extended=True``; 64
bits of mantissa on x86-64, no more than float64 on some other platforms: see `EXTENDED_EPS`). And the rows
are brought near 1 by powers of two, which change no bit of a mantissa, before anything is summed or squared:
values near 1e200 or 1e-200 have a covariance outside float64, but a spectral entropy like any other.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["EXTENDED_EPS", "Array", "centered", "covariance", "eigenvalues", "scaled_covariance"]

Array = NDArray[np.float64] | NDArray[np.longdouble]

EXTENDED_EPS = float(np.finfo(np.longdouble).eps)
"""Spacing at 1 of the extended precision: 1.1e-19 on x86-64, 2.2e-16 where a long double is a double."""


def _rows(x: ArrayLike, extended: bool) -> Array:
    rows = np.asarray(x)
    if rows.ndim != 2 or rows.shape[0] < 1:
        raise ValueError(f"x must have shape (n, d) with n >= 1; got {rows.shape}")
    # In C order whatever came in, so that BLAS sums in the same order and strides change no bit.
    rows = rows.astype(np.longdouble if extended else np.float64, order="C")
    if not np.isfinite(rows).all():
        raise ValueError("x must be finite; it holds NaN or Inf")
    return rows


def _exponent(values: Array) -> int:
    """Exponent e with max |values| in [2^(e-1), 2^e); 0 for zeros."""
    largest = np.max(np.abs(values), initial=0)
    return int(np.frexp(largest)[1])


def centered(x: ArrayLike, *, extended: bool = False) -> tuple[Array, int]:
    """Rows minus their mean, brought to at most 1 in magnitude by a power of two.

    Parameters
    ----------
    x : array_like, shape (n, d)
        Finite values of any real dtype; complex values are not checked for.
    extended : bool
        Compute in `numpy.longdouble` instead of float64.

    Returns
    -------
    y : ndarray, shape (n, d)
        Centred rows, ``max |y|`` in [1/2, 1) unless all rows are equal (then 0).
    exponent : int
        ``y * 2**exponent`` has the units of `x`.

    Raises
    ------
    ValueError
        If `x` is not 2-D, has no row, or is not finite.
    """
    rows = _rows(x, extended)
    first = _exponent(rows)
    y = np.ldexp(rows, -first)
    y = y - y.mean(axis=0)
    y = y - y.mean(axis=0)  # the rounding of the first mean, which matters when the offset is large
    second = _exponent(y)
    return np.ldexp(y, -second), first + second


def scaled_covariance(x: ArrayLike, *, correction: int = 0, extended: bool = False) -> tuple[Array, int]:
    """Covariance as ``matrix * 2**exponent``, for values whose squares leave the floating-point range.

    Parameters
    ----------
    x : array_like, shape (n, d)
        Finite values, one sample per row.
    correction : int
        The sum of products is divided by ``n - correction``.
    extended : bool
        Compute in `numpy.longdouble`.

    Returns
    -------
    matrix : ndarray, shape (d, d)
        Symmetric bit for bit.
    exponent : int
        The covariance in units of `x` squared is ``matrix * 2**exponent``.

    Raises
    ------
    ValueError
        As `centered`, or if `correction` is not less than ``n``.
    """
    y, exponent = centered(x, extended=extended)
    if correction >= len(y):
        raise ValueError(f"correction must be less than the number of rows {len(y)}; got {correction}")
    products = y.T @ y
    lower = np.tril(products)
    matrix = lower + np.tril(products, -1).T  # BLAS does not promise symmetric rounding
    return matrix / (len(y) - correction), 2 * exponent


def covariance(x: ArrayLike, *, correction: int = 0, extended: bool = False) -> Array:
    """Covariance of the columns of `x`, in units of `x` squared.

    Parameters and errors are those of `scaled_covariance`. An entry outside the range of the result's dtype
    comes out as 0 or infinity.

    Returns
    -------
    ndarray, shape (d, d)
        float64, or `numpy.longdouble` with ``extended=True``; symmetric bit for bit.
    """
    matrix, exponent = scaled_covariance(x, correction=correction, extended=extended)
    with np.errstate(over="ignore", under="ignore"):
        return np.ldexp(matrix, exponent)


def eigenvalues(matrix: Array) -> Array:
    """Eigenvalues of a symmetric matrix, ascending, in the precision of the matrix.

    float64 goes to LAPACK. A long double matrix is first rotated by LAPACK's eigenvectors, made orthogonal to
    long double precision by one Newton-Schulz step, and then diagonalised by Jacobi rotations until the
    off-diagonal part has a Frobenius norm below ``d EXTENDED_EPS ||matrix||_F``: by Weyl's inequality that
    norm bounds what is left of the error of every eigenvalue.

    Parameters
    ----------
    matrix : ndarray, shape (d, d)
        Symmetric, finite, of float64 or `numpy.longdouble`; entries within the range of float64.

    Returns
    -------
    ndarray, shape (d,)
        Of the dtype of `matrix`. Rounding can leave tiny negative values.

    Raises
    ------
    numpy.linalg.LinAlgError
        If LAPACK or the Jacobi rotations do not converge.
    """
    double = matrix.astype(np.float64)
    if matrix.dtype == np.float64:
        return np.linalg.eigvalsh(double)
    vectors = np.linalg.eigh(double)[1].astype(np.longdouble)
    vectors = vectors @ (3 * np.eye(len(matrix), dtype=np.longdouble) - vectors.T @ vectors) / 2
    rotated = vectors.T @ matrix @ vectors
    return np.sort(_jacobi(((rotated + rotated.T) / 2).astype(np.longdouble)))


def _jacobi(matrix: NDArray[np.longdouble], max_sweeps: int = 30) -> NDArray[np.longdouble]:
    """Diagonal of a symmetric matrix after cyclic Jacobi rotations, d/2 disjoint pairs at a time.

    The pairs are those of a round-robin tournament (Golub and Van Loan, Matrix Computations, section 8.5.6).
    """
    size = len(matrix)
    a = np.pad(matrix, (0, size % 2))  # an even number of players; the row of zeros is never rotated
    seats = np.arange(len(a))
    tolerance = size * EXTENDED_EPS * np.sqrt((a * a).sum())
    for _ in range(max_sweeps):
        off_diagonal = a - np.diag(np.diag(a))
        if np.sqrt((off_diagonal * off_diagonal).sum()) <= tolerance:
            return np.diag(a)[:size]
        for _ in range(len(a) - 1):
            p, q = seats[: len(a) // 2], seats[len(a) // 2 :][::-1]
            _rotate(a, p, q)
            seats = np.concatenate([seats[:1], seats[-1:], seats[1:-1]])
    raise np.linalg.LinAlgError(f"Jacobi rotations did not converge in {max_sweeps} sweeps")


def _rotate(a: NDArray[np.longdouble], p: NDArray[np.intp], q: NDArray[np.intp]) -> None:
    """Rotate rows and columns p[k], q[k] of `a`, in place, so that a[p, q] becomes 0 for each k."""
    pivot = a[p, q]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        tau = (a[q, q] - a[p, p]) / (2 * pivot)
        tangent = np.where(tau >= 0, 1, -1) / (np.abs(tau) + np.sqrt(1 + tau * tau))
    tangent = np.where(pivot == 0, 0, tangent)
    c = 1 / np.sqrt(1 + tangent * tangent)
    s = tangent * c
    rows_p, rows_q = a[p], a[q]
    a[p], a[q] = c[:, None] * rows_p - s[:, None] * rows_q, s[:, None] * rows_p + c[:, None] * rows_q
    columns_p, columns_q = a[:, p], a[:, q]
    a[:, p], a[:, q] = c * columns_p - s * columns_q, s * columns_p + c * columns_q
