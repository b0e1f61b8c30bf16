"""Two-pass covariance and long double eigenvalues, against exact fractions, mpmath and closed forms."""

from fractions import Fraction

import mpmath
import numpy as np
import pytest

from fastent.reference.covariance import EXTENDED_EPS, centered, covariance, eigenvalues, scaled_covariance

EPS = float(np.finfo(np.float64).eps)


def exact_covariance(x: np.ndarray) -> list[list[Fraction]]:
    rows = [[Fraction(float(value)) for value in row] for row in x]
    n, d = x.shape
    mean = [sum(row[i] for row in rows) / n for i in range(d)]
    return [
        [sum((row[i] - mean[i]) * (row[j] - mean[j]) for row in rows) / n for j in range(d)] for i in range(d)
    ]


@pytest.mark.parametrize("extended", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1.0, 1e3, 1e7])
def test_covariance_matches_exact_fractions_at_every_offset(offset: float, extended: bool) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((41, 5)) * [1.0, 1e-3, 1e3, 1.0, 1.0] + offset * np.array([1, -1, 1, 0, 0.5])
    got = covariance(x, extended=extended)
    want = exact_covariance(x)
    spread = np.sqrt([float(want[i][i]) for i in range(5)])
    error = [
        [abs(float(Fraction(str(got[i, j])) - want[i][j])) / (spread[i] * spread[j]) for j in range(5)]
        for i in range(5)
    ]
    # 41 products, each of two rounded differences: a few eps, far under the worst case of 44.
    assert np.max(error) < 10 * (EXTENDED_EPS if extended else EPS)


def test_covariance_is_symmetric_bit_for_bit_and_divides_by_n_minus_correction() -> None:
    x = np.random.default_rng(1).standard_normal((37, 23))
    biased, unbiased = covariance(x), covariance(x, correction=1)
    assert np.array_equal(biased, biased.T)
    np.testing.assert_allclose(unbiased * 36, biased * 37, rtol=1e-14)
    np.testing.assert_allclose(unbiased, np.cov(x.T), rtol=1e-12, atol=1e-14)


def test_power_of_two_scales_change_no_bit_down_to_the_ends_of_the_range() -> None:
    x = np.random.default_rng(2).standard_normal((20, 4))
    matrix, exponent = scaled_covariance(x)
    for shift in (-900, -300, 1, 300, 1000):
        scaled, moved = scaled_covariance(np.ldexp(x, shift))
        assert np.array_equal(scaled, matrix)
        assert moved == exponent + 2 * shift


def test_rows_at_opposite_ends_of_float64_do_not_overflow() -> None:
    largest = np.finfo(np.float64).max
    x = np.array([[largest, 1.0], [-largest, 1.0]])
    matrix, exponent = scaled_covariance(x)
    assert np.isfinite(matrix).all()
    assert np.isinf(covariance(x)[0, 0])
    y, half = centered(x)
    assert np.ldexp(y[0, 0], half) == largest
    assert (matrix[0, 0], exponent) == (y[0, 0] ** 2, 2 * half)


def test_constant_rows_have_a_covariance_of_exactly_zero() -> None:
    x = np.full((7, 3), 0.1) * [1.0, 1e10, 1e-10]
    assert not covariance(x).any()
    assert not covariance(x, extended=True).any()


@pytest.mark.parametrize("size", [1, 2, 7, 64, 101])
def test_long_double_eigenvalues_match_the_closed_form_of_the_second_difference(size: int) -> None:
    matrix = 2 * np.eye(size, dtype=np.longdouble)
    index = np.arange(size - 1)
    matrix[index, index + 1] = matrix[index + 1, index] = -1
    k = np.arange(1, size + 1, dtype=np.longdouble)
    pi = 4 * np.arctan(np.longdouble(1))
    want = 4 * np.sin(k * pi / (2 * (size + 1))) ** 2
    assert np.max(np.abs(eigenvalues(matrix) - want)) < 4 * size * EXTENDED_EPS


@pytest.mark.parametrize("spread", [1.0, 1e-6, 1e-15, 0.0])
def test_long_double_eigenvalues_match_mpmath_also_in_clusters(spread: float) -> None:
    rng = np.random.default_rng(3)
    basis = np.linalg.qr(rng.standard_normal((12, 12)))[0].astype(np.longdouble)
    planted = np.concatenate([1 + spread * np.arange(6), 1e-8 * (1 + spread * np.arange(5)), [0.0]])
    matrix = (basis * planted.astype(np.longdouble)) @ basis.T
    matrix = (matrix + matrix.T) / 2
    with mpmath.workdps(50):
        exact = mpmath.matrix([[mpmath.mpf(str(value)) for value in row] for row in matrix])
        want = sorted(mpmath.eigsy(exact, eigvals_only=True))
        error = max(abs(mpmath.mpf(str(a)) - b) for a, b in zip(eigenvalues(matrix), want, strict=True))
    assert error < 12 * EXTENDED_EPS * 8


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros(3), r"\(n, d\)"),
        (np.zeros((0, 3)), "n >= 1"),
        ([[0.0, np.nan]], "finite"),
        ([[0.0, np.inf]], "finite"),
    ],
)
def test_unusable_rows_are_refused_by_name(x: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        covariance(x)


def test_a_correction_that_leaves_no_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="number of rows 3; got 3"):
        covariance(np.eye(3), correction=3)
