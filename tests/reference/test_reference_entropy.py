"""Entropy of known spectra, in both conventions."""

import numpy as np
import pytest

from fastent.reference.entropy import (
    PAPER_FLOOR,
    binary_entropy,
    ceiling,
    effective_rank,
    entropy_of_eigenvalues,
    fannes_audenaert,
    participation_ratio,
    spectral_entropy,
)

LOG2 = np.log(2.0)


@pytest.mark.parametrize(
    ("eigenvalues", "entropy"),
    [
        (np.ones(7), np.log(7)),
        ([0.0, 0.0, 3.0], 0.0),
        ([2.0, 1.0, 1.0], 1.5 * LOG2),
        (2.0 ** -np.arange(40), 2 * LOG2),  # sum k 2^-k = 2, up to 40 * 2^-40
        ([0.0, 0.0], 0.0),
        ([-1e-17, 1.0], 0.0),
    ],
)
def test_known_spectra_have_their_closed_form_entropy(eigenvalues: list[float], entropy: float) -> None:
    tolerance = 1e-10 if len(eigenvalues) == 40 else 1e-15
    assert entropy_of_eigenvalues(eigenvalues) == pytest.approx(entropy, abs=tolerance)
    assert effective_rank(entropy) == pytest.approx(np.exp(entropy))


def test_eigenvalues_below_d_eps_of_the_largest_count_as_zero() -> None:
    floor = 4 * np.finfo(np.float64).eps
    assert entropy_of_eigenvalues([1.0, 0.0, 0.0, 0.99 * floor]) == 0.0
    kept = entropy_of_eigenvalues([1.0, 0.0, 0.0, 1.01 * floor])
    assert kept == pytest.approx(1.01 * floor * (1 - np.log(1.01 * floor)), rel=1e-2)


def test_paper_convention_calls_constant_rows_maximally_uniform() -> None:
    constant = np.full((8, 5), 3.0)
    # p = 1/5 exactly and 1e-12 inside the logarithm
    assert spectral_entropy(constant, convention="paper").entropy == pytest.approx(
        -np.log(0.2 + PAPER_FLOOR), abs=1e-15
    )
    assert spectral_entropy(constant, convention="paper").normalized == pytest.approx(1.0, abs=1e-11)
    assert spectral_entropy(constant).normalized == 0.0


def test_paper_convention_depends_on_the_scale_and_relative_does_not() -> None:
    x = np.random.default_rng(0).standard_normal((64, 6)) * [1, 1, 1, 0.1, 0.01, 0.001]
    for factor in (1e-8, 1e8, 1e200, 1e-200):
        assert spectral_entropy(factor * x).entropy == pytest.approx(spectral_entropy(x).entropy, abs=1e-12)
    assert spectral_entropy(1e-8 * x, convention="paper").normalized == pytest.approx(1.0, abs=1e-3)
    assert spectral_entropy(1e-200 * x, convention="paper").normalized == pytest.approx(1.0, abs=1e-11)
    assert spectral_entropy(1e200 * x, convention="paper").entropy == pytest.approx(
        spectral_entropy(x).entropy, abs=1e-9
    )


def test_result_names_the_quantities_of_a_planted_covariance() -> None:
    # columns of a Hadamard matrix: orthogonal, centred, of variance 1
    h = np.array([[1.0]])
    for _ in range(3):
        h = np.block([[h, h], [h, -h]])
    x = h[:, 1:4] * np.sqrt([4.0, 2.0, 2.0]) + 5
    got = spectral_entropy(x)
    np.testing.assert_allclose(got.eigenvalues, [2, 2, 4], rtol=1e-14)
    assert got.total_variance == pytest.approx(8, rel=1e-14)
    assert got.entropy == pytest.approx(1.5 * LOG2, rel=1e-14)
    assert got.normalized == pytest.approx(1.5 * LOG2 / np.log(3), rel=1e-14)
    assert got.effective_rank == pytest.approx(2**1.5, rel=1e-14)
    assert got.participation_ratio == pytest.approx(64 / 24, rel=1e-14)
    assert got.ceiling == 1.0


def test_extended_precision_agrees_with_float64_and_not_by_the_same_bits() -> None:
    x = np.random.default_rng(1).standard_normal((60, 9)) + 1e3
    plain, extended = spectral_entropy(x), spectral_entropy(x, extended=True)
    assert extended.eigenvalues.dtype == np.longdouble
    assert abs(plain.entropy - extended.entropy) < 1e-13
    assert np.max(np.abs(plain.eigenvalues - extended.eigenvalues)) > 0


def test_participation_ratio_is_scale_free_and_one_for_the_zero_matrix() -> None:
    matrix = np.diag([1.0, 2.0, 3.0])
    for factor in (1e-300, 1.0, 1e300):
        assert participation_ratio(factor * matrix) == pytest.approx(36 / 14, rel=1e-14)
    assert participation_ratio(np.zeros((3, 3))) == 1.0


@pytest.mark.parametrize(
    ("n", "d", "want"),
    [(1, 4, 0.0), (2, 4, 0.0), (3, 4, 0.5), (4, 4, np.log(3) / np.log(4)), (5, 4, 1.0), (900, 4, 1.0)],
)
def test_ceiling_is_log_of_the_rank_that_n_rows_allow(n: int, d: int, want: float) -> None:
    assert ceiling(n, d) == pytest.approx(want, abs=1e-15)


@pytest.mark.parametrize("d", [2, 3, 8, 100])
@pytest.mark.parametrize("distance", [0.0, 1e-9, 0.1, 0.4])
def test_fannes_audenaert_bound_is_attained(distance: float, d: int) -> None:
    q = np.full(d, distance / (d - 1))
    q[0] = 1 - distance
    assert entropy_of_eigenvalues(q) == pytest.approx(fannes_audenaert(distance, d), rel=1e-12, abs=1e-15)


def test_fannes_audenaert_bound_holds_for_random_pairs_and_stops_at_log_d() -> None:
    rng = np.random.default_rng(2)
    for _ in range(500):
        p, q = rng.dirichlet(np.full(6, 0.3), 2)
        distance = np.abs(p - q).sum() / 2
        change = abs(entropy_of_eigenvalues(p) - entropy_of_eigenvalues(q))
        assert change <= fannes_audenaert(distance, 6) + 1e-14
    assert fannes_audenaert(0.9, 6) == fannes_audenaert(1.0, 6) == fannes_audenaert(7.0, 6) == np.log(6)


def test_binary_entropy_is_zero_at_the_ends_and_log_2_in_the_middle() -> None:
    np.testing.assert_allclose(binary_entropy([0.0, 0.5, 1.0]), [0.0, LOG2, 0.0], atol=1e-16)


def test_unknown_convention_and_single_column_are_refused() -> None:
    with pytest.raises(ValueError, match="'absolute'"):
        entropy_of_eigenvalues([1.0, 2.0], convention="absolute")
    with pytest.raises(ValueError, match="at least 2 columns"):
        spectral_entropy(np.zeros((4, 1)))
