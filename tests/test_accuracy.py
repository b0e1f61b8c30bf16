"""`spectral_entropy` against truth at 50 digits or in long double, over the whole range it is promised for.

The promise: |H - Href| <= 1e-12 (H normalised) for float32 and float64 input, n up to 512, d up to 256, offsets up
to 1e6 times the spread, scales from 1e-150 to 1e150 in float64 and from 1e-30 to 1e30 in float32, for every
planted spectrum. Href is the entropy of the very values given, after their cast to the input's dtype.

How Href is known to far better than 1e-12:

- d <= 16: the covariance is a matrix of integers, exact; mpmath solves it at 50 digits.
- Above, mpmath would take minutes a matrix (d^3 at 50 digits). There the covariance is two-pass in long double
  (errors below n 1.1e-19 of the trace) and its eigenvalues come from Jacobi rotations in long double, which stop
  when the off-diagonal part E has ||E||_F <= d 1.1e-19 ||C||_F. By Hoffman and Wielandt the eigenvalues
  are then off by at most ||E||_F in the 2-norm, sqrt(d) ||E||_F in sum: at d = 256 the distance of the spectra is
  T <= 2.3e-16 and, by Fannes and Audenaert, the entropy is off by less than 1e-14 nats. That the two ways agree is
  itself tested: at d <= 16 in the property suite, at d = 64 here, at d = 256 in the nightly run.

An eigenvalue within a factor of 4 of the floor d eps lambda_max may be counted or not: such a matrix is judged by
the Fannes-Audenaert bound (`fastent.testing`).
"""

import itertools

import numpy as np
import pytest
import torch

import fastent
from fastent.reference.entropy import entropy_of_eigenvalues, spectral_entropy
from fastent.testing import SPECTRA, Activations, exact_truth, long_double_truth, truth_of

OFFSETS = (0.0, 1.0, 1e3, 1e6)
SCALES = {torch.float32: (1e-30, 1.0, 1e30), torch.float64: (1e-150, 1.0, 1e150)}
GRID = [(t, offset, scale) for t in SCALES for offset, scale in itertools.product(OFFSETS, SCALES[t])]


def check(h: Activations, device: torch.device) -> None:
    x = h.tensor().to(device)
    got, truth = fastent.spectral_entropy(x), truth_of(x)
    error, allowed = abs(got.entropy - truth.entropy) / np.log(h.d), truth.tolerance(1e-12) / np.log(h.d)
    assert error <= allowed, f"{h}: off by {error:.2e}, allowed {allowed:.2e}"
    expected = "zero_variance" if h.spectrum == "zero" else "rank_limited" if h.n <= h.d else "ok"
    assert got.status == expected, f"{h}: status {got.status}, {got.message}"
    if h.spectrum == "zero":
        assert got.normalized == 0.0


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_entropy_is_right_to_1e_12_at_every_dtype_offset_and_scale(
    spectrum: str, device: torch.device
) -> None:
    for seed, (dtype, offset, scale) in enumerate(GRID):
        check(Activations(512, 16, spectrum, offset, scale, dtype, seed=seed), device)


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", [(2, 16), (16, 16), (17, 16), (512, 2), (41, 127), (127, 41)])
def test_entropy_is_right_to_1e_12_at_every_shape(
    shape: tuple[int, int], spectrum: str, device: torch.device
) -> None:
    # Every sixth point of the grid: both dtypes, two offsets; the next spectrum begins with the next point.
    turn = list(SPECTRA).index(spectrum)
    for dtype, offset, scale in GRID[turn % 6 :: 6]:
        check(Activations(*shape, spectrum, offset, scale, dtype, seed=turn), device)


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_entropy_is_right_to_1e_12_at_512_by_256(spectrum: str, device: torch.device) -> None:
    turn = list(SPECTRA).index(spectrum)
    for dtype in SCALES:
        offset, scale = OFFSETS[-1 - turn % 4], SCALES[dtype][turn % 3]
        check(Activations(512, 256, spectrum, offset, scale, dtype, seed=turn), device)


@pytest.mark.nightly
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_entropy_is_right_to_1e_12_at_512_by_256_on_the_whole_grid(
    spectrum: str, device: torch.device
) -> None:
    for seed, (dtype, offset, scale) in enumerate(GRID):
        check(Activations(512, 256, spectrum, offset, scale, dtype, seed=seed), device)


def compare_truths(n: int, d: int) -> None:
    x = Activations(n, d, "geometric", 1e3, 1.0, torch.float32, seed=1).tensor().double().numpy()
    exact, long_double = exact_truth(x), long_double_truth(x)
    assert np.abs(exact.shares - long_double.shares).sum() < 1e-16
    assert abs(exact.entropy - long_double.entropy) < 1e-15


def test_long_double_truth_agrees_with_fifty_digits_at_d_64() -> None:
    compare_truths(64, 64)


@pytest.mark.nightly
def test_long_double_truth_agrees_with_fifty_digits_at_d_256() -> None:
    compare_truths(512, 256)


@pytest.mark.parametrize("scale", [1e-200, 1e-155, 1e-150, 1e-8, 1e-6, 1.0, 1e6, 1e150, 1e200])
def test_paper_convention_clamps_at_its_absolute_floor_at_every_scale(
    scale: float, device: torch.device
) -> None:
    x = Activations(64, 6, "geometric", 1.0, scale).tensor()
    got = fastent.spectral_entropy(x.to(device), convention="paper")
    want = spectral_entropy(x.numpy(), convention="paper", extended=True)
    assert got.normalized == pytest.approx(want.normalized, abs=1e-12)
    if scale <= 1e-150:  # every eigenvalue is clamped: "maximally uniform", whatever the data
        assert got.normalized == pytest.approx(1.0, abs=1e-11)


def test_spread_far_below_a_constant_column_is_resolved(device: torch.device) -> None:
    # The values reach 1 and need no scaling, but every variance underflows.
    x = torch.tensor([[0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1]], dtype=torch.float64) * 1e-200
    x[:, 0] = 1.0
    got = fastent.spectral_entropy(x.to(device))
    assert got.entropy == pytest.approx(entropy_of_eigenvalues([0.5, 0.5, 0.0]), abs=1e-14)
    assert got.status == "unresolved_offset"  # at 1.0, float64 itself could hide far more than 1e-200
