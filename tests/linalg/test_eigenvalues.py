"""The eigensolve: LAPACK's answer, on a device too, the guard on the trace, the way out when the GPU's solver fails."""

import dataclasses
import sys
from typing import Any

import pytest
import torch
from fake_device import OnDevice

import fastent.linalg
from fastent.activations import Resolution
from fastent.covariance import CenteredMatrix, centered_matrix
from fastent.entropy import SpectralEntropy, entropy_of_matrix, entropy_of_rows
from fastent.grokking.train import measures
from fastent.moments import Moments

module = sys.modules["fastent.linalg"]
eigenvalues = module.eigenvalues


def centered(n: int, d: int) -> fastent.covariance:
    return centered_matrix(torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))


def test_only_the_lower_triangle_is_read():
    matrix = centered(50, 6)
    poisoned = matrix.matrix.clone()
    poisoned[torch.triu(torch.ones(6, 6, dtype=torch.bool), 1)] = torch.nan
    values, solver = eigenvalues(poisoned)
    whole = matrix.matrix.tril() + matrix.matrix.tril(-1).T
    assert torch.allclose(values, torch.linalg.eigvalsh(whole), rtol=1e-13)
    assert solver == "lapack"


def test_a_solution_that_misses_the_trace_is_seen():
    matrix = centered(50, 6).matrix
    values = torch.linalg.eigvalsh(matrix)
    assert module._sums_to_trace(values, matrix)
    assert not module._sums_to_trace(values * (1 + 1e-10), matrix)


@pytest.mark.parametrize("failure", ["raises", "wrong"])
def test_a_solver_that_fails_on_the_gpu_is_replaced_counted_and_logged(failure, monkeypatch, caplog):
    solve = torch.linalg.eigvalsh

    def broken(matrix, UPLO):
        if not isinstance(matrix, OnDevice):
            return solve(matrix, UPLO=UPLO)
        if failure == "raises":
            raise torch.linalg.LinAlgError("cusolver error: CUSOLVER_STATUS_EXECUTION_FAILED")
        return solve(matrix, UPLO=UPLO) + 1.0

    monkeypatch.setattr(torch.linalg, "eigvalsh", broken)
    monkeypatch.setattr(module, "fallbacks", [])
    monkeypatch.setattr(module, "LAPACK_TO", 5)
    matrix = centered(50, 6)
    values, solver = eigenvalues(OnDevice(matrix.matrix))
    assert torch.equal(values, solve(matrix.matrix.mT, UPLO="U"))
    assert solver == "lapack"
    assert len(module.fallbacks) == 1
    assert "solved on the CPU, 1 so far" in caplog.text


def on_device(centered: CenteredMatrix) -> CenteredMatrix:
    OnDevice.waits.clear()
    tensors = {name: value for name, value in centered._asdict().items() if isinstance(value, torch.Tensor)}
    return centered._replace(**{name: OnDevice(value) for name, value in tensors.items()})


def assert_same(got: SpectralEntropy, want: SpectralEntropy) -> None:
    for one, two in zip(got.unbind(), want.unbind(), strict=True):
        assert torch.equal(one.eigenvalues, two.eigenvalues)
        for field in dataclasses.fields(SpectralEntropy):
            if field.name != "eigenvalues" and field.init and not field.name.startswith("_"):
                assert getattr(one, field.name) == getattr(two, field.name), field.name


@pytest.mark.parametrize(
    "shape", [(10, 50, 6), (10, 6, 50), (50, 6)], ids=["seeds", "seeds of the Gram side", "one"]
)
def test_matrices_of_a_device_come_to_lapack_in_one_copy_and_one_wait(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if len(shape) == 3:
        x[3] = x[3, :1]  # no variance: left out of the solve
    want = entropy_of_rows(x, Resolution.of(x.dtype))
    got = entropy_of_rows(x, Resolution.of(x.dtype), centered=on_device(centered_matrix(x)))
    assert OnDevice.waits == {"copy": 1}
    assert_same(got, want)


def test_moments_of_a_device_come_in_one_copy_with_their_rounding() -> None:
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) + 3.0
    centered = Moments().update(x).centered()
    assert centered.rounding is not None
    got = entropy_of_matrix(on_device(centered))
    assert OnDevice.waits == {"copy": 1}
    assert_same(got, entropy_of_matrix(centered))


def test_a_larger_matrix_is_solved_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LAPACK_TO", 5)
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    got = entropy_of_rows(x, Resolution.of(x.dtype), centered=on_device(centered_matrix(x)))
    assert got.solver == "cusolver (covariance)"
    assert OnDevice.waits["_linalg_eigh"] == 1
    # A subclass of Tensor gets LAPACK's other routine from torch, with the vectors.
    assert got.normalized == pytest.approx(entropy_of_rows(x, Resolution.of(x.dtype)).normalized, abs=1e-14)


def test_leading_eigenvectors_of_stacked_seeds_are_found_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    h = torch.randn(3, 50, 6, generator=torch.Generator().manual_seed(0))
    want = measures.leading_projections(h, 2)
    solve = torch.linalg.eigh

    def on_host(matrix: torch.Tensor) -> Any:
        assert not isinstance(matrix, OnDevice)
        return solve(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", on_host)
    OnDevice.waits.clear()
    got = measures.leading_projections(OnDevice(h), 2)
    assert OnDevice.waits == {"copy": 1}
    assert torch.equal(got.cpu(), want)
