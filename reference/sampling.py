"""What a finite sample does to the spectral entropy: its bias, its spread, and the grouped jackknife.

The covariance of N rows has its large eigenvalues too large and its small ones too small, so the entropy of a
sample is low. For normal rows with covariance eigenvalues lambda, shares p and entropy H (nats), to second order
in the sample's deviation,

``E[H_N] - H = -(1/2N) [ 2 + sum_{i != j} p_i p_j / L(p_i, p_j) - 2 sum p_i^2 - 4 sum p_i^2 (log p_i + H) ]``

with the logarithmic mean ``L(x, y) = (x - y) / (log x - log y)``. A flat spectrum gives ``-(d - 1)(d + 2) / (2 d N)``,
about ``-d / 2N``, the largest of all; one that decays fast gives less. The formula needs the spectrum behind the
sample. `grouped_jackknife` needs nothing but exchangeable rows, normal or not.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .entropy import spectral_entropy
from .perturbation import entropy_gradient

__all__ = ["Jackknife", "grouped_jackknife", "sampling_bias", "sampling_deviation"]


def sampling_bias(eigenvalues: ArrayLike, n: int) -> float:
    """``E[H_N] - H`` in nats, to order 1/N, of n normal rows whose covariance has these eigenvalues."""
    lam: NDArray[np.float64] = np.asarray(eigenvalues, dtype=np.float64)
    p = lam[lam > 0] / lam.sum()
    log_p = np.log(p)
    entropy = -(p @ log_p)
    gap, log_gap = p[:, None] - p, log_p[:, None] - log_p
    near = np.abs(log_gap) < 1e-6  # there the logarithmic mean is the geometric one, to 1e-13
    inverse_mean = np.where(near, 1 / np.sqrt(np.outer(p, p)), log_gap / np.where(near, 1.0, gap))
    pairs = np.outer(p, p) * inverse_mean
    np.fill_diagonal(pairs, 0.0)
    square = p * p
    return float(-(2 + pairs.sum() - 2 * square.sum() - 4 * square @ (log_p + entropy)) / (2 * n))


def sampling_deviation(eigenvalues: ArrayLike, n: int) -> float:
    """Return the standard deviation of H_N in nats, to order 1/sqrt(N), of n normal rows: 0 for a flat spectrum.

    ``sqrt(2 sum p_i^2 (log p_i + H)^2 / N)``, the delta method with ``Var(v_i^T dC v_i) = 2 lambda_i^2 / N``.
    """
    lam: NDArray[np.float64] = np.asarray(eigenvalues, dtype=np.float64)
    return float(np.sqrt(2 / n) * np.linalg.norm(entropy_gradient(lam) * lam))


class Jackknife(NamedTuple):
    """Estimates in nats.

    Attributes
    ----------
    entropy : float
        Of all rows.
    corrected : float
        Without the bias of order 1/N.
    standard_error : float
        Of `corrected`, and for `entropy` rather too large.
    """

    entropy: float
    corrected: float
    standard_error: float


def grouped_jackknife(x: ArrayLike, groups: ArrayLike) -> Jackknife:
    """Delete each group of rows in turn, and take the entropy of the others.

    Parameters
    ----------
    x : array_like, shape (n, d)
        One sample per row; the groups must be exchangeable.
    groups : array_like of int, shape (n,)
        The group of each row, 0 to g - 1; sizes may differ.

    References
    ----------
    Busing, Meijer and van der Leeden, "Delete-m jackknife for unequal m", Statistics and Computing 9 (1999).
    """
    rows, label = np.asarray(x), np.asarray(groups)
    n, sizes = len(rows), np.bincount(label)
    whole = spectral_entropy(rows).entropy
    without = np.array([spectral_entropy(rows[label != j]).entropy for j in range(len(sizes))])
    ratio = n / sizes
    corrected = len(sizes) * whole - ((1 - 1 / ratio) * without).sum()
    pseudo = ratio * whole - (ratio - 1) * without
    variance = np.mean((pseudo - corrected) ** 2 / (ratio - 1))
    return Jackknife(whole, float(corrected), float(np.sqrt(variance)))
