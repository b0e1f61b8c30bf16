"""Every backend against the truth: the gates of errors of covariance, eigenvalues and trace."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastent.testing import EPS, Activations, activations, exact_truth, long_double_truth, truth_of
from properties.backends import Backend, for_every_backend


def in_units_of(truth_exponent: int, value: np.ndarray) -> np.ndarray:
    """Long double `value` without the power of two that the truth keeps apart."""
    return np.ldexp(value.astype(np.longdouble), -truth_exponent)


@given(h=activations(max_d=16))
def test_long_double_truth_agrees_with_fifty_digits(h: Activations) -> None:
    x = h.tensor().double().numpy()
    exact, long_double = exact_truth(x), long_double_truth(x)
    assert np.max(np.abs(exact.shares - long_double.shares)) < 1e-16
    assert abs(exact.entropy - long_double.entropy) <= exact.tolerance(1e-15)
    scale = np.ldexp(np.longdouble(1), exact.exponent - long_double.exponent)
    error = np.abs(exact.matrix * scale - long_double.matrix)
    assert np.max(error) <= 1e-16 * np.trace(long_double.matrix)


@for_every_backend(h=activations())
def test_covariance_is_inside_its_gate_and_symmetric_bit_for_bit(backend: Backend, h: Activations) -> None:
    x = h.tensor()
    given = x.clone()
    got, truth = backend.covariance(x), truth_of(x)
    assert torch.equal(x, given)
    assert np.array_equal(got, got.T)
    values = x.double().numpy().astype(np.longdouble)
    reach = np.max(np.abs(values - values[:1]), axis=0)  # what a shift by row 0 leaves
    gate = EPS * h.n * np.outer(reach, reach)
    error = np.abs(got.astype(np.longdouble) - np.ldexp(truth.matrix, truth.exponent))
    assert (error <= gate).all(), float(np.max(error / np.where(gate > 0, gate, 1)))


@for_every_backend(h=activations(max_n=12), correction=st.sampled_from([0, 1]))
def test_correction_divides_by_n_minus_it(backend: Backend, h: Activations, correction: int) -> None:
    x = h.tensor()
    got, plain = backend.covariance(x, correction) * (h.n - correction), backend.covariance(x) * h.n
    assert np.max(np.abs(got - plain)) <= 4 * EPS * np.max(np.abs(plain))


@for_every_backend(h=activations())
def test_eigenvalues_and_trace_are_inside_their_gates_and_the_entropy_under_its_ceiling(
    backend: Backend, h: Activations
) -> None:
    x = h.tensor()
    got, truth = backend.result(x), truth_of(x)
    assert got.ceiling == pytest.approx(min(1.0, np.log(h.n - 1) / np.log(h.d)), abs=1e-15)
    assert 0.0 <= got.normalized <= min(1.0, got.ceiling + 1e-14)
    assert got.normalized == pytest.approx(got.entropy / np.log(h.d), abs=1e-15)
    assert 1.0 <= got.effective_rank <= min(h.n - 1, h.d) * (1 + 1e-12) or got.entropy == 0.0
    lam = in_units_of(truth.exponent, got.eigenvalues)
    trace = np.trace(truth.matrix)
    want = truth.shares * trace
    assert (np.diff(lam) >= 0).all()
    assert -lam[0] <= 30 * h.d * EPS * lam[-1]
    assert np.max(np.abs(lam - want)) <= 10 * h.d * EPS * want[-1]
    total = in_units_of(truth.exponent, np.array(got.total_variance))
    assert abs(lam.sum() - total) <= 30 * h.d * EPS * trace
    assert abs(total - trace) <= 30 * h.d * EPS * trace


@for_every_backend(h=activations(dtypes=(torch.float64,)))
def test_participation_ratio_and_effective_rank_are_those_of_the_true_spectrum(
    backend: Backend, h: Activations
) -> None:
    x = h.tensor()
    got, p = backend.result(x), truth_of(x).shares
    assert got.effective_rank == pytest.approx(np.exp(got.entropy), rel=1e-14)
    want = 1 / float(p @ p) if p.any() else 1.0
    assert got.participation_ratio == pytest.approx(want, rel=1e-11)
    assert got.participation_ratio <= got.effective_rank * (1 + 1e-11)
