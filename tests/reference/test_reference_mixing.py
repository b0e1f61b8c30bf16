"""Mixing: the exact formulas, the bounds and the paper's claim that fails."""

import itertools

import numpy as np
import pytest

from fastent.reference.covariance import covariance
from fastent.reference.entropy import (
    binary_entropy,
    entropy_of_eigenvalues,
    fannes_audenaert,
    spectral_entropy,
)
from fastent.reference.mixing import (
    best_bound,
    cyclic_shift,
    expected_covariance,
    mix,
    mixed_covariance,
    sandwich,
    shifted_covariance,
)

ROWS = np.random.default_rng(0).standard_normal((24, 5)) + np.array([3.0, 0.0, -1.0, 0.0, 10.0])


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5, 0.83, 1.0])
def test_mixed_covariance_is_that_of_the_mixed_rows(alpha: float) -> None:
    permutation = np.random.default_rng(1).permutation(24)
    np.testing.assert_allclose(
        mixed_covariance(ROWS, permutation, alpha), covariance(mix(ROWS, permutation, alpha)), atol=1e-13
    )


@pytest.mark.parametrize("shift", [1, 2, 7, 23, -3])
@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9])
def test_shifted_covariance_in_the_fourier_basis_is_that_of_the_mixed_rows(alpha: float, shift: int) -> None:
    direct = covariance(mix(ROWS, cyclic_shift(24, shift), alpha))
    np.testing.assert_allclose(shifted_covariance(ROWS, alpha, shift), direct, atol=1e-13)


@pytest.mark.parametrize("alpha", [0.05, 0.3, 0.7])
def test_sandwich_constants_are_attained_by_a_constant_and_an_alternating_direction(alpha: float) -> None:
    low, high = sandwich(alpha)
    alternating = (-1.0) ** np.arange(64)
    pairs = np.repeat((-1.0) ** np.arange(32), 2)  # equal in each pair: swapping within pairs changes nothing
    x = np.stack([alternating, pairs], axis=1)
    swap = np.arange(64) ^ 1
    np.testing.assert_allclose(np.diag(mixed_covariance(x, swap, alpha)), [low, high], atol=1e-14)


@pytest.mark.parametrize("n", [3, 4, 5, 6])
def test_expected_covariances_match_the_enumeration(n: int) -> None:
    x, alpha = ROWS[:n], 0.2
    every = [np.array(p) for p in itertools.permutations(range(n))]
    free = [p for p in every if (p != np.arange(n)).all()]
    assert len(free) == {3: 2, 4: 9, 5: 44, 6: 265}[n]
    for over, choices in (("permutations", every), ("derangements", free)):
        mean = np.mean([covariance(mix(x, p, alpha)) for p in choices], axis=0)
        np.testing.assert_allclose(mean, expected_covariance(covariance(x), n, alpha, over=over), atol=1e-13)


def test_printed_lemma_5_fails_by_a_loss_of_first_order_in_alpha() -> None:
    t = np.arange(64)
    x = np.stack([np.sqrt(2) * np.cos(2 * np.pi * t / 64), 0.5 * (-1.0) ** t], axis=1)
    before = spectral_entropy(x).entropy
    for alpha, want in ((0.1, -0.990), (0.05, -0.939), (0.01, -0.896), (0.001, -0.886)):
        loss = (spectral_entropy(mix(x, cyclic_shift(64), alpha)).entropy - before) / alpha
        assert loss == pytest.approx(want, abs=5e-4)
        assert -loss <= best_bound(alpha, 2) / alpha


def test_best_bound_is_approached_by_a_slow_against_near_nyquist_cosines() -> None:
    d, alpha, n = 8, 0.1, 4096
    k = (1 - 2 * alpha) ** 2
    s = np.linspace(1e-3, 1 - 1e-3, 9999)
    t = s / (s + k * (1 - s))
    best = s[np.argmax(binary_entropy(s) - binary_entropy(t) + (t - s) * np.log(d - 1))]
    frequencies = np.array([1, *(n // 2 - np.arange(1, d))])
    shares = np.array([best] + [(1 - best) / (d - 1)] * (d - 1))
    x = np.sqrt(2 * shares) * np.cos(2 * np.pi * np.outer(np.arange(n), frequencies) / n)
    after = entropy_of_eigenvalues(np.linalg.eigvalsh(shifted_covariance(x, alpha)))
    loss = spectral_entropy(x).entropy - after
    assert best_bound(alpha, d) == pytest.approx(0.260968, abs=5e-7)
    assert loss == pytest.approx(0.260964, abs=5e-7)
    assert loss <= best_bound(alpha, d)


@pytest.mark.parametrize("d", [2, 3, 17, 128, 4096])
@pytest.mark.parametrize("alpha", [1e-6, 1e-3, 0.1, 0.4, 0.4999, 0.5 - 1e-12, 0.6, 1 - 1e-3])
def test_best_bound_is_the_maximum_of_its_formula(alpha: float, d: int) -> None:
    k = (1 - 2 * alpha) ** 2
    s = np.concatenate([np.geomspace(1e-14, 0.5, 200_000), 1 - np.geomspace(1e-14, 0.5, 200_000)])
    t = s / (s + k * (1 - s))
    brute = np.max(binary_entropy(s) - binary_entropy(t) + (t - s) * np.log(d - 1))
    assert best_bound(alpha, d) == pytest.approx(brute, rel=1e-7, abs=1e-13)


@pytest.mark.parametrize("d", [2, 4, 9])
@pytest.mark.parametrize("alpha", [0.05, 0.25, 0.45])
def test_no_weights_between_k_and_1_beat_the_best_bound(alpha: float, d: int) -> None:
    rng = np.random.default_rng(d)
    k, bound, worst = (1 - 2 * alpha) ** 2, best_bound(alpha, d), 0.0
    for _ in range(4000):
        lam = rng.dirichlet(np.full(d, rng.choice([0.1, 0.5, 2.0, 50.0])))
        weights = rng.choice([k, 1.0], d) if rng.random() < 0.7 else rng.uniform(k, 1, d)
        if rng.random() < 0.5:  # the extremal shape: one eigenvalue against equal others
            lam = np.r_[lam[:1], np.full(d - 1, (1 - lam[0]) / (d - 1))]
            weights = np.r_[1.0, np.full(d - 1, k)]
        worst = max(worst, abs(entropy_of_eigenvalues(lam) - entropy_of_eigenvalues(weights * lam)))
    assert 0.95 * bound < worst <= bound + 1e-12


def test_best_bound_has_the_figures_of_the_mathematics_and_beats_fannes_audenaert() -> None:
    assert best_bound(1e-6, 2) / 1e-6 == pytest.approx(0.896, abs=1e-3)
    assert best_bound(1e-6, 128) / 1e-6 == pytest.approx(5.04, abs=5e-3)
    assert best_bound(0.1, 128) == pytest.approx(0.560, abs=5e-4)
    assert fannes_audenaert(0.1 / 0.9, 128) == pytest.approx(0.887, abs=5e-4)
    assert best_bound(0.0, 8) == best_bound(1.0, 8) == 0.0
    assert best_bound(0.5, 8) == np.log(8)
    assert best_bound(0.3, 8) == pytest.approx(best_bound(0.7, 8), rel=1e-12)


def test_arguments_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"alpha = 1\.5"):
        best_bound(1.5, 4)
    with pytest.raises(ValueError, match="d = 1"):
        best_bound(0.1, 1)
    with pytest.raises(ValueError, match="'cycles'"):
        expected_covariance(np.eye(2), 4, 0.1, over="cycles")
