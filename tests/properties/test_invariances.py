"""Every property of `fastent.testing` on every backend, and what those say of bits and of the other quantities."""

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from fastent.testing import PROPERTIES, Activations, activations, check_backend
from properties.backends import Backend, examples, for_every_backend


@pytest.mark.parametrize("name", PROPERTIES)
def test_every_property_of_the_test_kit_holds_on_every_backend(backend: Backend, name: str) -> None:
    tried = examples(backend, 0.75)  # for the time of twenty properties on four backends
    check_backend(lambda h: backend.result(h).normalized, properties=[name], examples=tried)


def assert_scales(backend: Backend, h: Activations, exponent: int) -> None:
    x = h.tensor()
    factor = 2.0**exponent
    a, b = backend.result(x), backend.result(x * factor)
    assert np.array_equal(backend.covariance(x * factor), backend.covariance(x) * factor**2)
    # LAPACK has an absolute threshold too, the root of the smallest normal number, 2^-511: what rounding leaves so far
    # down, a hundred orders below the largest eigenvalue, does not scale.
    expected, got = a.eigenvalues * factor**2, b.eigenvalues
    seen = np.maximum(np.abs(expected), np.abs(got)) > 2.0**-480
    assert np.array_equal(got[seen], expected[seen])
    assert (b.entropy, b.participation_ratio) == (a.entropy, a.participation_ratio)


@for_every_backend(
    h=activations(dtypes=(torch.float32, torch.float64), max_offset=1e3, scaled=False),
    exponent=st.integers(-40, 40),
)
def test_scaling_by_a_power_of_two_changes_no_bit(backend: Backend, h: Activations, exponent: int) -> None:
    assert_scales(backend, h, exponent)


def test_scaling_changes_no_bit_where_eigenvalues_underflow_lapacks_threshold(backend: Backend) -> None:
    h = Activations(14, 14, "through the floor", 0.0, 1.0, torch.float32, "expanded columns", 356649840)
    assert_scales(backend, h, -32)


@for_every_backend(0.5, h=activations())
def test_memory_layout_changes_no_bit(backend: Backend, h: Activations) -> None:
    x = h.tensor()
    packed = x.contiguous().clone()
    assert np.array_equal(backend.covariance(x), backend.covariance(packed))
    assert backend.entropy(x) == backend.entropy(packed)


@for_every_backend(0.3, h=activations(spectra=("zero",)))
def test_constant_rows_have_entropy_zero(backend: Backend, h: Activations) -> None:
    got = backend.result(h.tensor())
    assert (got.entropy, got.normalized, got.total_variance) == (0.0, 0.0, 0.0)
    assert not backend.covariance(h.tensor()).any()
