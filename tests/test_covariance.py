"""The public covariance against closed forms and an extended-precision reference."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import fastent
from fastent.covariance import centered_matrix, mirror_lower, triton_obstacle
from fastent.linalg import CHUNK_BYTES

EPS = 2.2e-16


def activations(n: int, d: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def truth(h: torch.Tensor, correction: int = 0) -> np.ndarray:
    """Two-pass covariance in extended precision."""
    x = h.to(torch.float64).numpy().astype(np.longdouble)
    x = x - x.mean(0)
    return x.T @ x / (len(x) - correction)


def assert_within_gate(c: torch.Tensor, h: torch.Tensor) -> None:
    """max |C - Cref| / (eps n a_i a_j) < 1 with a_i the largest distance from row 0, and symmetric bit for bit."""
    x = h.to(torch.float64)
    a = (x - x[0]).abs().amax(0).numpy()
    error = np.abs(c.numpy() - truth(h)).astype(np.float64)
    assert (error <= EPS * len(x) * np.outer(a, a)).all()
    assert torch.equal(c, c.T)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "d"), [(41, 127), (127, 41), (2, 3), (3, 2), (70, 70), (1100, 33)])
def test_covariance_is_inside_its_error_gate(n, d, dtype):
    h = activations(n, d, dtype)
    assert_within_gate(fastent.covariance(h, backend="torch"), h)


def test_inputs_longer_than_the_buffer_are_inside_the_gate_and_take_every_path():
    d = 96
    rows = CHUNK_BYTES // (8 * d)
    for n in (rows, rows + 1, 2 * rows + 7):
        for dtype in (torch.float32, torch.float64):
            h = activations(n, d, dtype) + 3.0
            assert_within_gate(fastent.covariance(h, backend="torch"), h)
    wide = activations(3, CHUNK_BYTES // 8) + 3.0  # columns of the Gram side in three chunks
    gram = centered_matrix(wide, backend="torch")
    centered = wide - wide.mean(0)
    expected = (centered @ centered.T / 3).tril()
    assert torch.allclose(gram.matrix.tril(), expected, rtol=1e-12)
    assert torch.allclose(gram.shift + gram.delta, wide.mean(0), atol=1e-14)


@pytest.mark.parametrize("offset", [1e2, 1e4, 1e6, 1e7])
@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.interpreter)])
def test_covariance_is_right_to_1e_14_at_any_offset(offset, backend):
    h = activations(512, 16) + offset
    error = np.abs(fastent.covariance(h, backend=backend).numpy() - truth(h)).max()
    assert error / truth(h).max() < 1e-14


def test_an_outlier_in_row_0_costs_no_digits_on_the_torch_path():
    h = activations(512, 16)
    h[0] = 1e8
    c = fastent.covariance(h, backend="torch")
    assert np.abs(c.numpy() - truth(h)).max() / truth(h).max() < 1e-14


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("n", [2, 3, 7, 1000, 70_000])
def test_constant_columns_have_exactly_zero_covariance(n, dtype):
    row = torch.tensor([0.1, -7.3, 1e4, 3.0], dtype=torch.float64).to(dtype)
    h = row.expand(n, 4).clone()
    assert not fastent.covariance(h, backend="torch").any()
    h[:, 1] = activations(n, 1, dtype)[:, 0]
    c = fastent.covariance(h, backend="torch")
    assert c[1, 1] > 0
    c[1, 1] = 0
    assert not c.any()


@pytest.mark.parametrize("m", [1, 5, 63, 64, 65, 128, 200])
def test_a_mirrored_matrix_has_the_lower_triangle_twice_whatever_the_upper_one_held(m):
    lower = activations(2 * m, m).view(2, m, m)
    for matrix in (lower, lower[0]):
        poisoned = matrix.clone()
        poisoned[..., *torch.triu_indices(m, m, 1)] = torch.nan
        whole = mirror_lower(poisoned)
        assert torch.equal(whole, whole.mT)
        assert torch.equal(whole.tril(), matrix.tril())


def test_correction_is_the_normaliser():
    h = activations(10, 3)
    for correction in (0, 1, 9):
        assert (
            np.abs(fastent.covariance(h, correction=correction).numpy() - truth(h, correction)).max() < 1e-13
        )
    with pytest.raises(ValueError, match="correction = 10"):
        fastent.covariance(h, correction=10)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.interpreter)])
def test_items_of_a_batch_are_bit_equal_to_themselves_alone(backend):
    for shape in ((3, 50, 7), (3, 7, 50)):
        h = torch.stack([activations(*shape[1:], seed=seed) for seed in range(3)])
        together = fastent.covariance(h, batch_dims=1, backend=backend)
        for item, alone in zip(together, h, strict=True):
            assert torch.equal(item, fastent.covariance(alone, backend=backend))


def test_nonfinite_and_out_of_range_values_raise_with_what_was_seen():
    h = activations(20, 3)
    with pytest.raises(OverflowError, match="power of two"):
        fastent.covariance(h * 1e200)
    with pytest.raises(OverflowError, match="power of two"):
        fastent.covariance(h * 1e-200)
    batch = torch.stack([h, h * 0, h * 1e-200])
    with pytest.raises(OverflowError, match="power of two"):
        fastent.covariance(batch, batch_dims=1)
    fastent.covariance(batch[:2], batch_dims=1)
    h[4, 1] = torch.nan
    with pytest.raises(ValueError, match=r"1 NaN or Inf \(torch.float64\); the first is at \(4, 1\)"):
        fastent.covariance(h)


def test_unknown_backend_is_an_error():
    with pytest.raises(ValueError, match="'auto', 'torch', 'triton'"):
        fastent.covariance(activations(4, 2), backend="cuda")


def test_triton_on_a_cpu_tensor_without_the_interpreter_raises_and_auto_does_not(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "without TRITON_INTERPRET=1" in triton_obstacle(torch.device("cpu"))
    with pytest.raises(RuntimeError, match='use backend="torch"'):
        fastent.covariance(activations(4, 2), backend="triton")
    fastent.covariance(activations(4, 2))


def test_without_triton_the_torch_path_answers_and_the_triton_backend_says_why(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="triton is not installed"):
        fastent.covariance(activations(4, 2), backend="triton")
    fastent.covariance(activations(4, 2))


def test_an_old_gpu_and_a_compiler_that_fails_leave_it_to_torch_with_one_warning(monkeypatch):
    from fastent.covariance import _cuda_obstacle, _use_triton, _warn_once
    from fastent.kernels import covariance as kernels

    def fails(*arguments, **options):
        raise RuntimeError("no ptxas")

    monkeypatch.setattr(torch, "zeros", lambda *arguments, **options: None)  # there is no such device here
    monkeypatch.setattr(kernels, "covariance", fails)
    x = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))
    for capability, reason in (
        ((7, 5), "the GPU is sm_75"),
        ((9, 0), "a trial compilation failed: .*no ptxas"),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index, found=capability: found)
        for cached in (_cuda_obstacle, _warn_once):
            cached.cache_clear()
        with pytest.warns(RuntimeWarning, match=f"torch instead of its Triton kernels: {reason}") as warned:
            assert [_use_triton(x, "auto") for _ in range(3)] == [False] * 3
        assert len(warned) == 1
        with pytest.raises(
            RuntimeError, match=f'backend="triton" cannot run: {reason}.*; use backend="torch"'
        ):
            _use_triton(x, "triton")
    _cuda_obstacle.cache_clear()


MEMORY = """
import resource, torch, fastent
torch.set_num_threads(2)
h = torch.randn(65536, 128)
fastent.spectral_entropy(h[:4096])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
fastent.spectral_entropy(h)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_a_large_input_needs_less_than_16_mib_beside_itself():
    # Its float64 copy would take 64 MiB.
    command = [sys.executable, "-c", MEMORY]
    extra = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert extra < 16 * 2**20
