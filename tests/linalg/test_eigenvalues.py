"""The eigensolve: LAPACK's answer, the guard on the trace, and the way out when the GPU's solver fails (fault 27)."""

import sys

import pytest
import torch

import fastent.linalg
from fastent.covariance import centered_matrix

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


class OnGpu:
    """A matrix that says it is on CUDA; its solver is replaced, its `cpu()` is the real matrix."""

    def __init__(self, matrix: torch.Tensor) -> None:
        self.real = matrix
        self.device, self.is_cuda = torch.device("cuda", 0), True
        self.shape = matrix.shape

    @property
    def mT(self) -> "OnGpu":
        return OnGpu(self.real.mT)

    def cpu(self) -> torch.Tensor:
        return self.real

    def diagonal(self, **dims: int) -> torch.Tensor:
        return self.real.diagonal(**dims)


@pytest.mark.parametrize("failure", ["raises", "wrong"])
def test_a_solver_that_fails_on_the_gpu_is_replaced_counted_and_logged(failure, monkeypatch, caplog):
    solve = torch.linalg.eigvalsh

    def broken(matrix, UPLO):
        if not isinstance(matrix, OnGpu):
            return solve(matrix, UPLO=UPLO)
        if failure == "raises":
            raise torch.linalg.LinAlgError("cusolver error: CUSOLVER_STATUS_EXECUTION_FAILED")
        return solve(matrix.real, UPLO=UPLO) + 1.0

    monkeypatch.setattr(torch.linalg, "eigvalsh", broken)
    monkeypatch.setattr(module, "fallbacks", [])
    matrix = centered(50, 6)
    values, solver = eigenvalues(OnGpu(matrix.matrix))
    assert torch.equal(values, solve(matrix.matrix.mT, UPLO="U"))
    assert solver == "lapack"
    assert len(module.fallbacks) == 1
    assert "solved on the CPU, 1 so far" in caplog.text
