"""What entropy must not notice: order, rotation, translation, scale, repetition and layout of the rows."""

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from fastent.reference.entropy import fannes_audenaert
from properties.backends import Backend, Result, for_every_backend
from properties.strategies import TAME, Activations, activations, plain, seeds
from properties.truth import EPS, count_at_floor


def same_entropy(a: Result, b: Result, tolerance: float) -> bool:
    """Normalised entropies equal to `tolerance`, or to what eigenvalues at the floor can make of it."""
    d = len(a.eigenvalues)
    allowed = tolerance * np.log(d)
    at_floor = max(count_at_floor(a.eigenvalues), count_at_floor(b.eigenvalues))
    if at_floor:
        share = a.eigenvalues[-1] / a.eigenvalues.sum()
        allowed += fannes_audenaert(at_floor * 4 * d * EPS * share, d)
    return abs(a.entropy - b.entropy) <= allowed


@for_every_backend(h=activations())
def test_entropy_lies_between_zero_and_its_ceiling(backend: Backend, h: Activations) -> None:
    got = backend.result(h.tensor())
    ceiling = min(1.0, np.log(h.n - 1) / np.log(h.d))
    assert got.ceiling == pytest.approx(ceiling, abs=1e-15)
    assert 0.0 <= got.normalized <= min(1.0, got.ceiling + 1e-14)
    assert got.normalized == pytest.approx(got.entropy / np.log(h.d), abs=1e-15)
    assert 1.0 <= got.effective_rank <= min(h.n - 1, h.d) * (1 + 1e-12) or got.entropy == 0.0


@for_every_backend(h=activations(), seed=seeds)
def test_entropy_ignores_the_order_of_rows_to_1e_13(backend: Backend, h: Activations, seed: int) -> None:
    x = h.tensor()
    order = torch.from_numpy(np.random.default_rng(seed).permutation(h.n))
    assert same_entropy(backend.result(x[order]), backend.result(x), 1e-13)


@for_every_backend(h=activations(), seed=seeds)
def test_entropy_ignores_the_order_and_signs_of_columns_to_1e_13(
    backend: Backend, h: Activations, seed: int
) -> None:
    x = h.tensor()
    rng = np.random.default_rng(seed)
    order = torch.from_numpy(rng.permutation(h.d))
    signs = torch.from_numpy(rng.choice([-1.0, 1.0], h.d)).to(h.dtype)
    assert same_entropy(backend.result(x[:, order] * signs), backend.result(x), 1e-13)


@for_every_backend(h=plain(), seed=seeds)
def test_entropy_ignores_a_rotation_of_the_features(backend: Backend, h: Activations, seed: int) -> None:
    # The product rounds by about d eps of each row, hence 1e-12 rather than 1e-13.
    q = np.linalg.qr(np.random.default_rng(seed).standard_normal((h.d, h.d)))[0]
    x = h.array()
    assert same_entropy(backend.result(torch.from_numpy(x @ q)), backend.result(torch.from_numpy(x)), 1e-12)


@for_every_backend(h=plain(), exponent=st.integers(0, 30), seed=seeds)
def test_entropy_ignores_a_translation_to_1e_13(
    backend: Backend, h: Activations, exponent: int, seed: int
) -> None:
    # Multiples of 2^-16 moved by integers up to 2^30: no sum is rounded, so only the backend can err.
    x = np.round(h.array() * 2**16) / 2**16
    offset = np.random.default_rng(seed).integers(-(2**exponent), 2**exponent, h.d, endpoint=True)
    moved = x + offset
    assert np.array_equal(moved - offset, x)
    assert same_entropy(backend.result(torch.from_numpy(moved)), backend.result(torch.from_numpy(x)), 1e-13)


@for_every_backend(
    h=activations(dtypes=(torch.float32, torch.float64), max_offset=1e3, scaled=False),
    exponent=st.integers(-40, 40),
)
def test_scaling_by_a_power_of_two_changes_no_bit(backend: Backend, h: Activations, exponent: int) -> None:
    x = h.tensor()
    factor = 2.0**exponent
    a, b = backend.result(x), backend.result(x * factor)
    assert np.array_equal(backend.covariance(x * factor), backend.covariance(x) * factor**2)
    assert np.array_equal(b.eigenvalues, a.eigenvalues * factor**2)
    assert (b.entropy, b.participation_ratio) == (a.entropy, a.participation_ratio)


@for_every_backend(h=plain(), exponent=st.floats(-6, 6))
def test_entropy_ignores_any_other_scale(backend: Backend, h: Activations, exponent: float) -> None:
    x = torch.from_numpy(h.array())
    assert same_entropy(backend.result(x * 10.0**exponent), backend.result(x), 1e-12)


@for_every_backend(h=activations(max_n=16), copies=st.integers(2, 4), interleaved=st.booleans())
def test_entropy_ignores_repeated_rows(
    backend: Backend, h: Activations, copies: int, interleaved: bool
) -> None:
    # Also n crosses d: the same entropy from the Gram matrix and from the covariance.
    x = h.tensor()
    repeated = x.repeat_interleave(copies, dim=0) if interleaved else torch.cat([x] * copies)
    assert same_entropy(backend.result(repeated), backend.result(x), 1e-13)


@for_every_backend(h=activations())
def test_memory_layout_changes_no_bit(backend: Backend, h: Activations) -> None:
    x = h.tensor()
    packed = x.contiguous().clone()
    assert np.array_equal(backend.covariance(x), backend.covariance(packed))
    assert backend.entropy(x) == backend.entropy(packed)


@for_every_backend(h=activations(spectra=TAME, layouts=("contiguous",), dtypes=(torch.float64,)))
def test_input_is_left_as_it_was(backend: Backend, h: Activations) -> None:
    x = h.tensor()
    before = x.clone()
    backend.covariance(x)
    backend.entropy(x)
    assert torch.equal(x, before)


@for_every_backend(h=activations(spectra=("zero",)))
def test_constant_rows_have_entropy_zero(backend: Backend, h: Activations) -> None:
    got = backend.result(h.tensor())
    assert (got.entropy, got.normalized, got.total_variance) == (0.0, 0.0, 0.0)
    assert not backend.covariance(h.tensor()).any()
