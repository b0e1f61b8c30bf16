"""NumPy's OpenBLAS in place of MKL: when it is taken, and that it answers as torch does."""

import ctypes
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import fastent
from fastent import linalg
from fastent.covariance import centered_matrix
from fastent.linalg import use_one_thread

found = pytest.mark.skipif(linalg._library() is None, reason="NumPy is not from a wheel with OpenBLAS")

SHAPES = [
    (512, 128),
    (41, 127),
    (127, 41),
    (2, 3),
    (3, 2),
    (2, 1),
    (7, 1),
    (1100, 33),
    (70_000, 9),
    (30, 300),
]


@pytest.fixture
def suited(monkeypatch):
    """A machine where it is preferred, whatever this one is."""
    library = linalg._Library(lambda *arguments: None, lambda *arguments: None, lambda: 1)
    monkeypatch.setattr(linalg, "_library", lambda: library)
    monkeypatch.setattr(linalg, "_mkl_is_slow", lambda: True)
    return library


def force(monkeypatch, chosen: bool) -> None:
    monkeypatch.setattr(linalg, "openblas_preferred", lambda x, product_edge=None: chosen)
    monkeypatch.setattr(linalg, "SOLVE_FROM", 1)


def activations(n: int, d: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, d, dtype=torch.float64, generator=generator) + 3.0).to(dtype)


def test_it_is_preferred_for_plain_cpu_tensors_where_every_condition_holds(suited):
    assert linalg.openblas_preferred(torch.ones(2, 2))
    assert not linalg.openblas_preferred(torch.ones(2, 2, device="meta"))
    assert not linalg.openblas_preferred(torch.ones(2, 2).as_subclass(type("Other", (torch.Tensor,), {})))


def test_it_is_not_preferred_where_torch_has_several_threads(suited, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert not linalg.openblas_preferred(torch.ones(2, 2))


def test_it_is_not_preferred_where_it_has_several_threads_itself(suited, monkeypatch):
    monkeypatch.setattr(linalg, "_library", lambda: suited._replace(threads=lambda: 2))
    assert not linalg.openblas_preferred(torch.ones(2, 2))


def test_small_products_are_its_own_whatever_the_number_of_threads(suited, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(linalg, "_library", lambda: suited._replace(threads=lambda: 2))
    assert linalg.openblas_preferred(torch.ones(512, 64), 64)
    assert linalg.openblas_preferred(torch.ones(40, 600), 40)
    assert not linalg.openblas_preferred(torch.ones(100, 65), 65)  # torch's threads are as fast
    assert not linalg.openblas_preferred(torch.ones(513, 64), 64)  # long enough for torch's
    assert not linalg.openblas_preferred(torch.ones(64, 64))  # eigenvalues
    monkeypatch.setattr(linalg, "_mkl_is_slow", lambda: False)
    assert not linalg.openblas_preferred(torch.ones(512, 64), 64)


@pytest.mark.parametrize("d", [32, 64, 128, 256, 1024, 2**14, 2**15])
def test_means_at_the_grain_of_torch_have_the_bits_of_one_reduction(d, monkeypatch):
    y = activations(linalg.GRAIN // d, d, torch.float64)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert torch.equal(linalg._mean(y), y.mean(0))


@found
@pytest.mark.nightly
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads' time where Linux has it")
def test_small_products_wake_no_other_thread():
    code = """
import os, threading, time, torch
from fastent import linalg

def others():
    mine = threading.get_native_id()
    threads = [thread for thread in os.listdir("/proc/self/task") if int(thread) != mine]
    return sum(int(open(f"/proc/self/task/{thread}/schedstat").read().split()[0]) for thread in threads)

for m, k in ((64, 512), (16, 2048)):
    a, lower = torch.ones(k, m, dtype=torch.float64).T, torch.empty(m, m, dtype=torch.float64)
    before = others()
    for _ in range(20):
        linalg.add_lower_syrk(lower, a, 1.0, first=True)
    time.sleep(0.02)
    print(others() - before)
"""
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "OPENBLAS_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.split() == ["0", "0"]


def test_it_is_not_preferred_where_it_was_not_found(suited, monkeypatch):
    monkeypatch.setattr(linalg, "_library", lambda: None)
    assert not linalg.openblas_preferred(torch.ones(2, 2))


@pytest.mark.parametrize(
    ("vendor", "mkl", "slow"),
    [
        ("AuthenticAMD", True, True),
        ("AuthenticAMD", False, False),
        ("GenuineIntel", True, False),
        (None, True, False),
    ],
)
def test_mkl_is_slow_on_processors_of_other_vendors(vendor, mkl, slow, monkeypatch):
    monkeypatch.setattr(linalg, "_vendor", lambda: vendor)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    assert linalg._mkl_is_slow.__wrapped__() is slow


@pytest.mark.parametrize(
    ("text", "vendor"),
    [
        (
            "processor\t: 0\nvendor_id\t: AuthenticAMD\n\nprocessor\t: 1\nvendor_id\t: AuthenticAMD\n",
            "AuthenticAMD",
        ),
        ("processor\t: 0\nCPU implementer\t: 0x41\n", None),
        (None, None),
    ],
)
def test_the_vendor_is_read_where_there_is_one(text, vendor, tmp_path, monkeypatch):
    file = tmp_path / "cpuinfo"
    if text is not None:
        file.write_text(text)
    monkeypatch.setattr(linalg, "CPUINFO", file)
    assert linalg._vendor() == vendor


def test_a_library_is_taken_only_if_it_is_the_only_one_and_has_the_functions(tmp_path, monkeypatch):
    class Functions:
        def __init__(self, *names: str) -> None:
            for name in names:
                setattr(self, name, lambda: None)

    names = ("scipy_cblas_dsyrk64_", "scipy_dsyevd_64_", "scipy_openblas_get_num_threads64_")
    libraries = {
        "all": Functions(*names),
        "old": Functions(*(name[6:] for name in names)),
        "half": Functions(*names[::2]),
    }
    monkeypatch.setattr(linalg.ctypes, "CDLL", lambda path: libraries[path.rpartition("-")[2]])
    assert linalg._load(tmp_path) is None
    for name, usable in (("all", True), ("old", True), ("half", False)):
        file = tmp_path / f"libopenblas-{name}"
        file.touch()
        assert (linalg._load(tmp_path) is not None) is usable
        file.unlink()
    for name in ("all", "old"):
        (tmp_path / f"libopenblas-{name}").touch()
    assert linalg._load(tmp_path) is None


@found
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("m", "k"), [(5, 7), (7, 5), (1, 4), (4, 1), (1, 1), (130, 300)])
def test_a_product_overwrites_or_adds_the_lower_triangle_and_leaves_the_upper(m, k, transposed):
    a = activations(m, k, torch.float64)
    a = a.T.contiguous().T if transposed else a
    lower = torch.full((m, m), torch.nan, dtype=torch.float64)
    linalg.add_lower_syrk(lower, a, 0.5, first=True)
    linalg.add_lower_syrk(lower, a, 0.25)
    expected = 0.75 * (a @ a.T)
    assert torch.allclose(lower.tril(), expected.tril(), rtol=1e-14 * k)
    assert lower[torch.triu_indices(m, m, 1).unbind()].isnan().all()


@found
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_both_ways_give_the_same_covariance_gram_matrix_and_mean(n, d, dtype, monkeypatch):
    x = activations(n, d, dtype)
    for function in (
        (linalg.centred_covariance, linalg.centred_gram) if n < 2000 else (linalg.centred_covariance,)
    ):
        results = []
        for chosen in (False, True):
            force(monkeypatch, chosen)
            lower, shift, delta = function(x, 1 / n)
            results.append((lower.tril(), shift, delta))
        (expected, *means), (lower, *same) = results
        assert (lower - expected).abs().max() < 1e-13 * max(1.0, float(expected.abs().max()))
        assert all(torch.equal(*pair) for pair in zip(means, same, strict=True))


@found
def test_its_bits_do_not_depend_on_strides_alignment_or_other_items(monkeypatch):
    force(monkeypatch, True)
    for n, d in ((512, 128), (41, 127), (127, 41), (300, 200)):
        x = activations(n, d)
        c, spectrum = fastent.covariance(x), fastent.spectral_entropy(x).eigenvalues
        store = torch.empty(n * d + 16)
        for offset in range(4):
            y = store[offset : offset + n * d].view(n, d).copy_(x)
            assert torch.equal(fastent.covariance(y), c)
            assert torch.equal(fastent.spectral_entropy(y).eigenvalues, spectrum)
        for y in (x.T.contiguous().T, torch.stack([x, x], 2)[:, :, 1]):
            assert torch.equal(fastent.covariance(y), c)
        both = torch.stack([activations(n, d, seed=1), x])
        assert torch.equal(fastent.covariance(both, batch_dims=1)[1], c)
        assert torch.equal(fastent.spectral_entropy(both, batch_dims=1).eigenvalues[1], spectrum)


@found
def test_its_eigenvalues_do_not_depend_on_where_the_matrix_lies(monkeypatch):
    force(monkeypatch, True)
    matrix = centered_matrix(activations(600, 250)).matrix
    store = torch.empty(250 * 250 + 16, dtype=torch.float64)
    expected = linalg.openblas_eigenvalues(matrix)
    for offset in range(8):
        moved = store[offset : offset + matrix.numel()].view_as(matrix).copy_(matrix)
        keep = np.empty(offset * 11 + 1)  # other addresses for the solver's copy
        assert torch.equal(linalg.openblas_eigenvalues(moved), expected)
        del keep


@found
def test_a_thread_limited_as_the_worker_is_solves_to_the_same_bits_meanwhile(monkeypatch):
    force(monkeypatch, True)
    centered = centered_matrix(activations(600, 250))
    expected, _ = linalg.eigenvalues(centered.matrix)
    seen = []

    def solve() -> None:
        use_one_thread()
        seen.extend(linalg.eigenvalues(centered.matrix)[0] for _ in range(5))

    threads = [threading.Thread(target=solve) for _ in range(2)]
    for thread in threads:
        thread.start()
    x = activations(512, 128)
    products = [fastent.covariance(x) for _ in range(50)]
    for thread in threads:
        thread.join()
    assert len(seen) == 10
    assert all(torch.equal(values, expected) for values in seen)
    assert all(torch.equal(product, products[0]) for product in products)


@found
@pytest.mark.parametrize("m", [1, 2, 41, 192, 300])
def test_its_eigenvalues_are_numpys_to_the_bit_and_read_the_lower_triangle_alone(m):
    matrix = centered_matrix(activations(2 * m, m), side="covariance").matrix.tril()
    expected = np.linalg.eigvalsh(matrix.mT.numpy(), UPLO="U")
    matrix[torch.triu_indices(m, m, 1).unbind()] = torch.nan
    assert np.array_equal(linalg.openblas_eigenvalues(matrix).numpy(), expected)
    batch = torch.stack([matrix, 2 * matrix])
    assert torch.equal(linalg.openblas_eigenvalues(batch)[0], linalg.openblas_eigenvalues(matrix))


@found
def test_its_solver_fails_as_torchs_does(monkeypatch):
    def fail(*arguments):
        ctypes.c_double.from_address(arguments[6]).value = 1.0  # the memory that it asks for
        arguments[10].value = 3  # info

    monkeypatch.setattr(linalg, "_library", lambda: linalg._Library(lambda *a: None, fail, lambda: 1))
    with pytest.raises(torch.linalg.LinAlgError, match="6 x 6 matrix did not converge: 3 elements"):
        linalg.openblas_eigenvalues(torch.eye(6, dtype=torch.float64))


@found
def test_other_threads_have_the_interpreter_while_it_solves(monkeypatch):
    library = linalg._library()
    matrix = centered_matrix(activations(300, 256)).matrix
    asked, ran, seen = threading.Event(), threading.Event(), []

    def note() -> None:
        while asked.wait() and len(seen) < 50:
            asked.clear()
            ran.set()

    def watched(*arguments) -> None:
        ran.clear()
        asked.set()
        library.syevd(*arguments)
        seen.append(ran.is_set())

    monkeypatch.setattr(linalg, "_library", lambda: library._replace(syevd=watched))
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000.0)  # nobody is interrupted: the other thread runs where this one lets it
    other = threading.Thread(target=note, daemon=True)
    try:
        other.start()
        while len(seen) < 50 and not any(seen):
            linalg.openblas_eigenvalues(matrix)
    finally:
        seen += [False] * 50
        asked.set()
        sys.setswitchinterval(interval)
    other.join()
    assert any(seen)


def test_the_eigenvalues_are_its_own_from_its_edge_on(monkeypatch):
    matrices = {d: centered_matrix(activations(50, d)) for d in (5, 6, 7)}
    monkeypatch.setattr(linalg, "openblas_preferred", lambda x, product_edge=None: True)
    monkeypatch.setattr(linalg, "SOLVE_FROM", 6)
    monkeypatch.setattr(
        linalg, "openblas_eigenvalues", lambda matrix: matrix.new_full((matrix.shape[-1],), 7.0)
    )
    for d, own in ((5, False), (6, True), (7, True)):
        values, solver = linalg.eigenvalues(matrices[d].matrix)
        assert bool((values == 7.0).all()) is own
        assert solver == "lapack"
