"""Every property of `fastent.testing` on every backend, and what those say of bits and of the other quantities."""

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from fastent.testing import PROPERTIES, TAME, Activations, activations, check_backend
from properties.backends import Backend, examples, for_every_backend


@pytest.mark.parametrize("name", PROPERTIES)
def test_every_property_of_the_test_kit_holds_on_every_backend(backend: Backend, name: str) -> None:
    check_backend(lambda h: backend.result(h).normalized, properties=[name], examples=examples(backend))


@for_every_backend(h=activations())
def test_quantities_of_a_result_are_of_one_entropy_between_zero_and_its_ceiling(
    backend: Backend, h: Activations
) -> None:
    got = backend.result(h.tensor())
    ceiling = min(1.0, np.log(h.n - 1) / np.log(h.d))
    assert got.ceiling == pytest.approx(ceiling, abs=1e-15)
    assert 0.0 <= got.normalized <= min(1.0, got.ceiling + 1e-14)
    assert got.normalized == pytest.approx(got.entropy / np.log(h.d), abs=1e-15)
    assert 1.0 <= got.effective_rank <= min(h.n - 1, h.d) * (1 + 1e-12) or got.entropy == 0.0


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
