"""What mixing does to a covariance: the sandwich, the exact formulas, the averages, the best bound.

Also the paper's Lemma 5, ``H(C_mixed) >= H(C) - O(alpha^2)``, at a fixed case that breaks it.
"""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

import fastent
from fastent.reference.mixing import (
    best_bound,
    cyclic_shift,
    expected_covariance,
    mix,
    mixed_covariance,
    sandwich,
    shifted_covariance,
)
from fastent.testing import Activations, plain, seeds
from properties.backends import Backend, for_every_backend

# Rounding of the mixed rows and of both covariances, as a share of the total variance.
ROUNDING = 1e-13

# An example that enumerates all derangements or permutations of its rows costs up to 44: fewer of them.
ENUMERATED = 0.25

alphas = st.floats(0, 1)


def entropy(backend: Backend, x: np.ndarray) -> float:
    return backend.entropy(torch.from_numpy(np.ascontiguousarray(x)))


def covariance(backend: Backend, x: np.ndarray) -> np.ndarray:
    return backend.covariance(torch.from_numpy(np.ascontiguousarray(x)))


def derangements(n: int) -> list[np.ndarray]:
    return [np.array(p) for p in itertools.permutations(range(n)) if all(i != j for i, j in enumerate(p))]


@for_every_backend(h=plain(max_offset=1.0), alpha=alphas, seed=seeds())
def test_mixing_shrinks_the_covariance_by_at_most_its_sandwich_constant(
    backend: Backend, h: Activations, alpha: float, seed: int
) -> None:
    x = h.array()
    permutation = np.random.default_rng(seed).permutation(h.n)
    before, after = covariance(backend, x), covariance(backend, mix(x, permutation, alpha))
    low, high = sandwich(alpha)
    slack = ROUNDING * (1 + h.offset**2) * np.trace(before)
    assert np.linalg.eigvalsh(after - low * before)[0] >= -slack
    assert np.linalg.eigvalsh(high * before - after)[0] >= -slack
    # hence each ordered eigenvalue, by Weyl
    lam, mixed = np.linalg.eigvalsh(before), np.linalg.eigvalsh(after)
    assert (mixed >= low * lam - slack).all()
    assert (mixed <= high * lam + slack).all()


@for_every_backend(h=plain(max_offset=1.0), alpha=alphas, shift=st.integers(1, 39), seed=seeds())
def test_covariance_of_mixed_rows_is_the_exact_formula(
    backend: Backend, h: Activations, alpha: float, shift: int, seed: int
) -> None:
    x = h.array()
    slack = ROUNDING * (1 + h.offset**2) * h.d
    permutation = np.random.default_rng(seed).permutation(h.n)
    got = covariance(backend, mix(x, permutation, alpha))
    assert np.max(np.abs(got - mixed_covariance(x, permutation, alpha))) <= slack
    if shift % h.n:
        shifted = fastent.mix_representations(torch.from_numpy(x), alpha=alpha, shift=shift)
        got = backend.covariance(shifted)
        assert np.max(np.abs(got - mixed_covariance(x, cyclic_shift(h.n, shift), alpha))) <= slack
        assert np.max(np.abs(got - shifted_covariance(x, alpha, shift))) <= slack


@for_every_backend(ENUMERATED, h=plain(min_n=3, max_n=5, max_d=6), alpha=alphas)
def test_covariance_averaged_over_all_derangements_is_proportional(
    backend: Backend, h: Activations, alpha: float
) -> None:
    x = h.array()
    every = derangements(h.n)
    assert len(every) == {3: 2, 4: 9, 5: 44}[h.n]
    mean = np.mean([covariance(backend, mix(x, p, alpha)) for p in every], axis=0)
    want = expected_covariance(covariance(backend, x), h.n, alpha, over="derangements")
    assert np.max(np.abs(mean - want)) <= ROUNDING * h.d


@for_every_backend(ENUMERATED, h=plain(min_n=3, max_n=4, max_d=6), alpha=alphas)
def test_covariance_averaged_over_all_permutations_is_proportional(
    backend: Backend, h: Activations, alpha: float
) -> None:
    x = h.array()
    every = [np.array(p) for p in itertools.permutations(range(h.n))]
    mean = np.mean([covariance(backend, mix(x, p, alpha)) for p in every], axis=0)
    want = expected_covariance(covariance(backend, x), h.n, alpha, over="permutations")
    assert np.max(np.abs(mean - want)) <= ROUNDING * h.d


@for_every_backend(ENUMERATED, h=plain(min_n=3, max_n=5, max_d=6), alpha=alphas)
def test_trace_weighted_entropy_does_not_rise_on_average_over_all_derangements(
    backend: Backend, h: Activations, alpha: float
) -> None:
    x = h.array()
    mixed = [backend.result(torch.from_numpy(mix(x, p, alpha))) for p in derangements(h.n)]
    weighted = np.mean([result.total_variance * result.entropy for result in mixed])
    trace = np.mean([result.total_variance for result in mixed])
    assert weighted <= trace * entropy(backend, x) + 1e-12 * h.d


def test_unweighted_entropy_can_rise_on_average(backend: Backend) -> None:
    x = np.array([[5.0, -6.0], [-4.0, 0.0], [4.0, -6.0], [-4.0, 1.0]])
    before = entropy(backend, x)
    for alpha, plain_mean, weighted_mean in ((0.45, 0.146, -0.011), (0.3, 0.015, -0.003)):
        mixed = [backend.result(torch.from_numpy(mix(x, p, alpha))) for p in derangements(4)]
        assert len(mixed) == 9
        assert np.mean([r.entropy for r in mixed]) - before == pytest.approx(plain_mean, abs=5e-4)
        trace = np.mean([r.total_variance for r in mixed])
        weighted = np.mean([r.total_variance * r.entropy for r in mixed]) / trace - before
        assert weighted == pytest.approx(weighted_mean, abs=5e-4)


def test_best_bound_is_nearly_reached(backend: Backend) -> None:
    n, d, alpha = 4096, 8, 0.1
    # The share of the slow column at which B(0.1, 8) is attained.
    s = 0.63476
    shares = np.array([s] + [(1 - s) / (d - 1)] * (d - 1))
    frequencies = np.array([1, *(n // 2 - np.arange(1, d))])
    x = np.sqrt(2 * shares) * np.cos(2 * np.pi * np.outer(np.arange(n), frequencies) / n)
    loss = entropy(backend, x) - entropy(backend, mix(x, cyclic_shift(n), alpha))
    assert loss == pytest.approx(0.260964, abs=5e-7)
    assert loss < best_bound(alpha, d) == pytest.approx(0.260968, abs=5e-7)


def test_printed_lemma_5_fails_at_first_order_in_alpha(backend: Backend) -> None:
    t = np.arange(64)
    x = torch.from_numpy(np.stack([np.sqrt(2) * np.cos(2 * np.pi * t / 64), 0.5 * (-1.0) ** t], axis=1))
    before = backend.entropy(x)
    for alpha, want in ((0.1, -0.990), (0.05, -0.939), (0.01, -0.896), (0.001, -0.886)):
        slope = (backend.entropy(fastent.mix_representations(x, alpha=alpha)) - before) / alpha
        assert slope == pytest.approx(want, abs=5e-4)  # a loss of order alpha^2 would tend to 0
