"""Truth for any matrix of floats, and the gates that results are held to.

Up to d = 16 the covariance is computed in exact integers and its eigenvalues by mpmath at 50 digits. Above,
both are in long double (two-pass, then Jacobi rotations; see `fastent.reference.covariance`), which leaves
errors of about d * 1e-19 of the trace; a test compares the two where both can run.
"""

from __future__ import annotations

from dataclasses import dataclass

import mpmath
import numpy as np
import torch
from torch import Tensor

from fastent.reference.covariance import eigenvalues, scaled_covariance
from fastent.reference.entropy import entropy_of_eigenvalues, fannes_audenaert

EPS = float(np.finfo(np.float64).eps)
EXACT_UP_TO = 16


@dataclass(frozen=True)
class Truth:
    """Spectrum and entropy of one matrix.

    `shares` are the eigenvalues over their sum, long double, ascending, zeros for constant rows; the
    covariance is `matrix` times 2^exponent. `entropy` is in nats, floored as in the convention "relative".
    """

    shares: np.ndarray
    matrix: np.ndarray
    exponent: int
    entropy: float

    @property
    def d(self) -> int:
        return len(self.shares)

    @property
    def at_the_floor(self) -> int:
        """Eigenvalues within a factor of 4 of d eps lambda_max, which rounding may put on either side."""
        return count_at_floor(self.shares)

    def tolerance(self, away: float = 1e-12) -> float:
        """Error allowed to an entropy in nats: ``away * log d``, or at the floor Fannes-Audenaert's bound.

        The distance of the spectra is then at most the mass of those eigenvalues and the error of the others,
        for which the gate of the eigenvalues stands, 10 d eps lambda_max each.
        """
        if self.at_the_floor == 0:
            return away * float(np.log(self.d))
        largest = float(self.shares[-1])
        mass = self.at_the_floor * 4 * self.d * EPS * largest
        return fannes_audenaert(mass + self.d * 10 * self.d * EPS * largest / 2, self.d)


def count_at_floor(eigenvalues: np.ndarray) -> int:
    """Eigenvalues within a factor of 4 of d eps times the largest."""
    floor = len(eigenvalues) * EPS * np.max(eigenvalues)
    return int(np.sum((eigenvalues > floor / 4) & (eigenvalues < 4 * floor)))


def truth_of(h: Tensor) -> Truth:
    """Truth for the values in `h`, an (n, d) tensor of any float dtype."""
    x = h.detach().to(torch.float64).cpu().numpy()
    return exact_truth(x) if x.shape[1] <= EXACT_UP_TO else long_double_truth(x)


def long_double_truth(x: np.ndarray) -> Truth:
    """Two-pass covariance and Jacobi rotations in long double."""
    matrix, exponent = scaled_covariance(x, extended=True)
    trace = np.trace(matrix)
    if trace == 0:
        return Truth(np.zeros(len(matrix), np.longdouble), matrix, exponent, 0.0)
    shares = np.maximum(eigenvalues(matrix / trace), 0)
    return Truth(shares, matrix, exponent, entropy_of_eigenvalues(shares))


def exact_truth(x: np.ndarray) -> Truth:
    """Covariance in integers, eigenvalues and entropy at 50 digits."""
    scatter, exponent = exact_scatter(x)
    n, d = x.shape
    trace = sum(scatter[i, i] for i in range(d))
    bits = max(0, int(trace).bit_length() - 64)
    matrix = np.array(
        [[_long_double(value, bits) for value in row] for row in scatter], dtype=np.longdouble
    ) / np.longdouble(n * n)
    if trace == 0:
        return Truth(np.zeros(d, np.longdouble), matrix, exponent, 0.0)
    with mpmath.workdps(50):
        normalized = mpmath.matrix([[mpmath.mpf(value) / trace for value in row] for row in scatter.tolist()])
        lam = sorted(max(value, mpmath.mpf(0)) for value in mpmath.eigsy(normalized, eigvals_only=True))
        kept = [value for value in lam if value >= d * EPS * lam[-1]]
        p = [value / mpmath.fsum(kept) for value in kept]
        entropy = float(-mpmath.fsum(value * mpmath.log(value) for value in p))
        shares = np.array([mpmath.nstr(value, 30) for value in lam]).astype(np.longdouble)
    return Truth(shares, matrix, exponent + bits, entropy)


def exact_scatter(x: np.ndarray) -> tuple[np.ndarray, int]:
    """``n^2 C`` as integers (Python's, in an object array) times 2^exponent, exactly."""
    mantissa, exponent = np.frexp(x)
    integers = (mantissa * 2.0**53).astype(np.int64).astype(object)
    used = exponent[mantissa != 0]
    lowest = int(used.min()) if used.size else 0
    steps = np.where(mantissa != 0, exponent - lowest, 0).astype(object)
    rows = integers * 2**steps
    sums = rows.sum(axis=0)
    return len(x) * (rows.T @ rows) - np.outer(sums, sums), 2 * (lowest - 53)


def _long_double(value: int, bits: int) -> np.longdouble:
    """``value / 2^bits`` to the last place of a long double, for values beyond its integers."""
    with mpmath.workdps(50):
        return np.longdouble(mpmath.nstr(mpmath.mpf(value) / mpmath.mpf(2) ** bits, 30))
