"""Spectra known by construction: mixtures and merged parts."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from fastent.testing import EPS, SPECTRA, Activations, activations, plain, seeds, truth_of
from properties.backends import Backend, for_every_backend, merge_tree

TOLERANCE = 1e-12


def centered(x: np.ndarray) -> np.ndarray:
    y = x - x.mean(axis=0)
    return y - y.mean(axis=0)


def entropy(p: np.ndarray) -> float:
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())


def mixture(x: np.ndarray, y: np.ndarray, weight: float) -> torch.Tensor:
    """Rows whose covariance is ``weight C_x + (1 - weight) C_y``, for centred x and y of equal length."""
    return torch.from_numpy(np.concatenate([np.sqrt(2 * weight) * x, np.sqrt(2 * (1 - weight)) * y]))


@for_every_backend(
    a=plain(max_n=16, max_d=8),
    seed=seeds(),
    spectrum=st.sampled_from(sorted(SPECTRA)),
    weight=st.floats(0, 1),
    exponent=st.integers(-4, 4),
)
def test_trace_times_entropy_is_concave_on_all_covariances(
    backend: Backend, a: Activations, seed: int, spectrum: str, weight: float, exponent: int
) -> None:
    x, y = centered(a.array()), centered(a.but(spectrum=spectrum, seed=seed, scale=10.0**exponent).array())

    def weighted(h: torch.Tensor) -> float:
        got = backend.result(h)
        return got.total_variance * got.entropy

    parts = [weighted(torch.from_numpy(part)) for part in (x, y)]
    total = backend.result(mixture(x, y, weight)).total_variance
    chord = weight * parts[0] + (1 - weight) * parts[1]
    assert weighted(mixture(x, y, weight)) >= chord - TOLERANCE * total


def test_entropy_alone_is_not_concave_on_the_cone(backend: Backend) -> None:
    # diag(e, e) and diag(1, 0): the paper's Step 2 of Lemma 5 would need 0.347 at the middle.
    e = 1e-3
    signs = np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    x, y = signs * np.sqrt([e, e]), signs * [1.0, 0.0]
    middle = backend.entropy(mixture(x, y, 0.5))
    mean = (backend.entropy(torch.from_numpy(x)) + backend.entropy(torch.from_numpy(y))) / 2
    assert mean == pytest.approx(math.log(2) / 2, abs=1e-14)
    p = np.array([e, 1 + e]) / (1 + 2 * e)
    assert middle == pytest.approx(entropy(p), abs=1e-14)
    assert middle < 0.01 < mean


@for_every_backend(
    h=activations(min_n=3, max_offset=1e6),
    cuts=st.lists(st.integers(1, 39), max_size=12),
    choices=st.lists(st.integers(0, 11), max_size=12),
)
def test_parts_merged_in_any_tree_have_the_moments_of_the_whole(
    backend: Backend, h: Activations, cuts: list[int], choices: list[int]
) -> None:
    x = h.tensor()
    edges = sorted({0, h.n, *(cut for cut in cuts if cut < h.n)})
    parts = [backend.moments(x[low:high]) for low, high in itertools.pairwise(edges)]
    covariance, merged_entropy = backend.of_moments(merge_tree(backend, parts, choices))
    truth = truth_of(x)
    values = x.double().numpy().astype(np.longdouble)
    reach = np.ptp(values, axis=0)
    error = np.abs(covariance.astype(np.longdouble) - np.ldexp(truth.matrix, truth.exponent))
    assert (error <= EPS * h.n * np.outer(reach, reach)).all()
    assert abs(merged_entropy - truth.entropy) <= truth.tolerance(1e-12)


def test_merging_costs_no_digits_at_an_offset_of_1e6(backend: Backend) -> None:
    # Means that were rounded at the size of the offset would lose eps * 1e6 here, and H 1e-11.
    x = Activations(97, 6, "geometric", offset=1e6, seed=3).tensor()
    parts = [backend.moments(part) for part in x.split([1, 2, 40, 53, 1])]
    covariance, merged_entropy = backend.of_moments(merge_tree(backend, parts, [2, 0]))
    truth = truth_of(x)
    error = np.abs(covariance.astype(np.longdouble) - np.ldexp(truth.matrix, truth.exponent))
    assert np.max(error) < 1e-14 * np.trace(covariance)
    assert abs(merged_entropy - truth.entropy) < 1e-13
