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
