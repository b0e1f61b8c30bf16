"""How eigenvalues and entropy answer to a change of the covariance: the paper's Lemmas 1 to 3.

``H = -sum p_i log p_i`` with ``p = lambda / tr C``, in nats. To first order ``dH = tr(G dC)`` with
``G = -(log(C / tr C) + H) / tr C``, formed on the range of C: eigenvalues below the relative floor get weight 0. Where
rows move by a small eta, the variance outside that range is of order eta^2, so it takes no part in the first order.
(The representation behind a final LayerNorm always has a singular covariance.)

If the rows h_i move by dh_i, the covariance moves by ``A + A^T + O(|dh|^2)`` with
``A = (1/N) sum (h_i - mean) dh_i^T``. With ``a_i = v_i^T (A + A^T) v_i / lambda_i``, the relative growth of each
eigenvalue, the first-order change is ``dH = -Cov_p(log p, a)``: entropy falls exactly when the large
eigenvalues grow faster, in proportion, than the small ones. Nothing of this needs a spectral gap.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .entropy import relative_floor

__all__ = [
    "Alignment",
    "alignment",
    "covariance_update",
    "entropy_change",
    "entropy_gradient",
    "gradient_matrix",
    "lipschitz_above_floor",
    "lipschitz_local",
    "lipschitz_regularized",
    "mirsky",
    "regularized_entropy",
    "relative_growth",
    "trace_distance",
    "weyl",
]

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]


def weyl(perturbation: ArrayLike) -> float:
    """Spectral norm of E: no ordered eigenvalue of ``C + E`` is farther from that of C (Weyl 1912)."""
    return float(np.linalg.norm(np.asarray(perturbation, dtype=np.float64), 2))


def mirsky(perturbation: ArrayLike) -> tuple[float, float]:
    """Frobenius and trace norm of E: bounds on the ordered eigenvalues' changes together.

    ``sqrt(sum (lambda_i' - lambda_i)^2)`` is at most the first, ``sum |lambda_i' - lambda_i|`` at most the second.

    References
    ----------
    Hoffman and Wielandt 1953; Mirsky, "Symmetric gauge functions and unitarily invariant norms", 1960.
    """
    e = np.asarray(perturbation, dtype=np.float64)
    return float(np.linalg.norm(e, "fro")), float(np.linalg.norm(e, "nuc"))


def trace_distance(c: ArrayLike, other: ArrayLike) -> float:
    """Half the trace norm of ``C / tr C - C' / tr C'``: the T of Fannes and Audenaert for covariances.

    By Mirsky's inequality it is at least the total variation distance of the two ordered spectra.
    """
    a, b = np.asarray(c, dtype=np.float64), np.asarray(other, dtype=np.float64)
    return float(np.linalg.norm(a / np.trace(a) - b / np.trace(b), "nuc")) / 2


def regularized_entropy(eigenvalues: ArrayLike, eps: float) -> float:
    """``-sum p_i log(p_i + eps)`` in nats, ``p = lambda / sum lambda``: the entropy of the paper's Lemma 1."""
    lam = np.asarray(eigenvalues, dtype=np.float64)
    p = lam / lam.sum()
    return float(-(p * np.log(p + eps)).sum())


def entropy_gradient(eigenvalues: ArrayLike) -> Vector:
    """``dH / d lambda_i = -(log p_i + H) / sum lambda``, shape (d,); 0 for eigenvalues below the floor."""
    lam = np.asarray(eigenvalues, dtype=np.float64)
    total, deviation = _deviations(lam)[::2]
    return -deviation / total


def gradient_matrix(c: ArrayLike) -> Matrix:
    """G with ``dH = tr(G dC)``: C's eigenvectors with `entropy_gradient` as eigenvalues, shape (d, d)."""
    lam, vectors = np.linalg.eigh(np.asarray(c, dtype=np.float64))
    gradient: Matrix = (vectors * entropy_gradient(lam)) @ vectors.T
    return gradient


def entropy_change(c: ArrayLike, update: ArrayLike) -> float:
    """First-order change of H in nats when C moves by `update`: ``tr(G update)``."""
    return float((gradient_matrix(c) * np.asarray(update, dtype=np.float64)).sum())


def lipschitz_local(eigenvalues: ArrayLike) -> float:
    """Smallest K with ``|dH| <= K ||dC||_F`` to first order: the norm of `entropy_gradient`.

    Attained by a change that commutes with C and has `entropy_gradient` as its eigenvalues.
    """
    return float(np.linalg.norm(entropy_gradient(eigenvalues)))


def lipschitz_above_floor(smallest: float, total: float, d: int) -> float:
    """K with ``|H(C') - H(C)| <= K ||C' - C||_F`` for all C, C' of eigenvalues >= `smallest`, trace >= `total`.

    ``sqrt(d) log(total / smallest) / total``: it grows without bound as `smallest` goes to 0, and no spectral
    gap enters. Spectra with one large and d - 1 smallest eigenvalues need ``sqrt(1 - 1/d)`` of it in the limit.

    Raises
    ------
    ValueError
        If `smallest` is not positive: then no constant serves.
    """
    if smallest <= 0:
        raise ValueError(f"without a positive smallest eigenvalue no constant serves; got {smallest}")
    ratio = max(total / smallest, np.e)  # log(x) / x falls only from e on, and the trace may be larger
    return float(np.sqrt(d) * np.log(ratio) / (ratio * smallest))


def lipschitz_regularized(eps: float, total: float, d: int) -> float:
    """K of Lemma 1 for `regularized_entropy`: all covariances of which one has trace `total`, any C' - C.

    ``sqrt(d) (log((1 + eps) / eps) + 1 / (1 + eps)) / total``.
    """
    spread = np.log((1 + eps) / eps) + 1 / (1 + eps)  # largest minus smallest slope of -p log(p + eps)
    return float(np.sqrt(d) * spread / total)


def covariance_update(h: ArrayLike, dh: ArrayLike) -> Matrix:
    """First-order change of the covariance, ``A + A^T``, when the rows `h` (n, d) move by `dh` (n, d)."""
    rows: Matrix = np.asarray(h, dtype=np.float64)
    moved: Matrix = np.asarray(dh, dtype=np.float64)
    a = (rows - rows.mean(axis=0)).T @ (moved - moved.mean(axis=0)) / len(rows)
    update: Matrix = a + a.T
    return update


def relative_growth(c: ArrayLike, update: ArrayLike) -> tuple[Vector, Vector]:
    """Eigenvalues of C, descending, and the relative change of each, ``v_i^T update v_i / lambda_i``.

    Only eigenvalues above the relative floor, so both have shape (rank,). Where eigenvalues coincide, the single
    changes depend on the choice of eigenvectors; their sums over a cluster do not.
    """
    lam, vectors = np.linalg.eigh(np.asarray(c, dtype=np.float64))
    kept = lam >= relative_floor(lam)
    v = vectors[:, kept]
    growth = np.einsum("ji,jk,ki->i", v, np.asarray(update, dtype=np.float64), v) / lam[kept]
    return lam[kept][::-1], growth[::-1]


class Alignment(NamedTuple):
    """``dH = -correlation * spread_log_p * spread_growth``, means and spreads weighted by p.

    Attributes
    ----------
    change : float
        First-order dH, in nats.
    correlation : float
        Of log p_i and the relative growth a_i, -1 to 1; positive when large eigenvalues grow faster.
    spread_log_p : float
        Standard deviation of log p_i.
    spread_growth : float
        Standard deviation of a_i.
    leading_growth : float
        a_1, of the largest eigenvalue.
    """

    change: float
    correlation: float
    spread_log_p: float
    spread_growth: float
    leading_growth: float


def alignment(c: ArrayLike, update: ArrayLike) -> Alignment:
    """Split the first-order change of H into how far apart the eigenvalues are and how they grow."""
    lam, growth = relative_growth(c, update)
    p = lam / lam.sum()
    log_p = np.log(p)
    x, y = log_p - p @ log_p, growth - p @ growth
    covariance = float(p @ (x * y))
    sx, sy = float(np.sqrt(p @ (x * x))), float(np.sqrt(p @ (y * y)))
    correlation = covariance / (sx * sy) if sx > 0 and sy > 0 else 0.0
    return Alignment(-covariance, correlation, sx, sy, float(growth[0]))


def _deviations(lam: Vector) -> tuple[float, Vector, Vector]:
    """Total, shares p, and ``log p_i + H`` of a spectrum; both 0 below the floor."""
    kept = (lam >= relative_floor(lam)) & (lam > 0)
    total = float(lam[kept].sum())
    p = np.where(kept, lam, 0.0) / total
    log_p = np.log(np.where(kept, p, 1.0))
    deviation = np.where(kept, log_p - p @ log_p, 0.0)
    return total, p, deviation
