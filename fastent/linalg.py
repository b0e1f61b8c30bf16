"""Centred products and eigenvalues without Triton: torch, and NumPy's OpenBLAS and LAPACK where they are faster.

**Products.** The input goes through a float64 buffer of at most `CHUNK_BYTES`, so there is never a float64 copy of a
large one. Only the lower triangle is computed: by OpenBLAS where it serves, else by torch, which has no syrk, in slabs
of `SLAB` rows, for little more than half the products. Long chunks are then cut into `GROUPS` for a batched product:
every thread gets a panel, where one tall product leaves threads idle. All other choices follow from the shape alone,
so the bits do not depend on strides or on other items of a batch.

**OpenBLAS** in place of torch's MKL, for one thread on a processor that is not Intel's: there MKL runs kernels at
about half the speed (bench/NOTES.md). NumPy's wheels carry it; its ``dsyrk`` is called where it lies, as NumPy calls it
for ``a.T @ a``, but for one triangle, with a factor and a sum, and its ``dsyevd`` as ``numpy.linalg.eigvalsh`` calls
it, to the same bits; ctypes lets other threads run meanwhile, where NumPy's solver holds the interpreter. Only where
both libraries have one thread, since two pools on the same cores fight, or where the product is so small that OpenBLAS
takes none but the calling thread for it. No number of threads is ever changed, so ``OMP_NUM_THREADS=1`` in the
environment (torchrun's default) is what makes a process eligible for all shapes, ``torch.set_num_threads(1)`` alone is
not. Which of the two computes is a function of the machine, of the numbers of threads and of the shape; their last bits
differ.

**Eigenvalues** come from LAPACK on the CPU, of matrices up to `LAPACK_TO` on CUDA too, for which they are copied, a
batch at once; of larger ones from cuSOLVER, and from LAPACK where that fails: a solve whose eigenvalues do not sum to
the trace is a failed one. Either way the host waits for the device. NaN must be kept out by the caller: solvers hang
or fail on it.

**Forks.** A fork copies one thread. If that thread has run torch's operations on several, its copy waits for ever for
those that were left behind, at the first operation that wants them: in torch, not here, but a silent hang all the
same. Where the threads can be counted (Linux, NumPy's own OpenBLAS) it becomes an error.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

Side = Literal["covariance", "gram"]


# Edge from which its eigenvalues come sooner than MKL's: 0.94 of the time at 192, 0.6 at 1,024, 1.1 at 64.
SOLVE_FROM = 192
# torch's: from so many entries on a reduction wakes the other threads, and from one more on what goes by elements.
GRAIN = 2**15
# A product that small OpenBLAS makes in the calling thread, and ends before torch's pool has woken; it wakes its own
# threads, which then spin, somewhere above an edge of 96, where it gains nothing any more (bench/NOTES.md).
ON_CALLER_EDGE, ON_CALLER_ENTRIES = 64, GRAIN
HUGE_FROM = 724  # 4 MiB, from which NumPy asks for huge pages
# Names in the wheels of NumPy 2 and 1; the suffix says that all integers have 64 bits.
_PREFIXES = ("scipy_", "")
CPUINFO = Path("/proc/cpuinfo")  # Linux only
_CPU = torch.device("cpu")
_ROW_MAJOR, _LOWER, _AS_IT_IS, _TRANSPOSED = 101, 122, 111, 112


class _Library(NamedTuple):
    syrk: Callable[..., None]
    syevd: Callable[..., None]
    threads: Callable[[], int]


def openblas_preferred(x: Tensor, product_edge: int | None = None) -> bool:
    """Whether eigenvalues of `x` belong here rather than to torch, or a product with a matrix of this edge."""
    if type(x) is not Tensor or not x.is_cpu or not openblas_available():
        return False
    if product_edge is not None and product_edge <= ON_CALLER_EDGE and x.numel() <= ON_CALLER_ENTRIES:
        return True
    library = _library()
    return torch.get_num_threads() == 1 and library is not None and library.threads() == 1


def openblas_available() -> bool:
    """Whether it would serve this processor, given one thread."""
    return _mkl_is_slow() and _library() is not None


def openblas_pool() -> int | None:
    """Threads that it may have started beside its callers; None where it was not found."""
    library = _library()
    return None if library is None else library.threads() - 1


def openblas_empty(m: int) -> Tensor:
    """Uninitialised float64 matrix (m, m), a large one in NumPy's memory, which asks for huge pages."""
    if m >= HUGE_FROM:
        return torch.from_numpy(np.empty((m, m)))
    return torch.empty((m, m), dtype=torch.float64, device=_CPU)  # its address is handed to C


def add_lower_syrk(lower: Tensor, a: Tensor, scale: float, *, first: bool = False) -> None:
    """Add ``scale * a a^T`` to the lower triangle (`first`: overwrite it).

    Parameters
    ----------
    lower : Tensor, shape (m, m), float64
        Contiguous.
    a : Tensor, shape (m, k), float64
        It or its transpose is contiguous.
    scale : float
        Factor of the product.
    first : bool
        `lower` holds nothing yet, NaN perhaps.

    Raises
    ------
    TypeError
        For any other memory: C is given addresses, and would read or write whatever is there.
    """
    m, k = a.shape
    flip = a.T.is_contiguous()
    if not (
        lower.is_cpu
        and a.is_cpu
        and lower.dtype is a.dtype is torch.float64
        and lower.is_contiguous()
        and (flip or a.is_contiguous())
        and lower.shape == (m, m)
    ):
        raise TypeError(
            "OpenBLAS needs contiguous float64 on the CPU, (m, m) and (m, k); got "
            f"{tuple(lower.shape)} and {tuple(a.shape)}, {lower.dtype} and {a.dtype}, {lower.device} and {a.device}"
        )
    library = _library()
    assert library is not None
    library.syrk(
        _ROW_MAJOR,
        _LOWER,
        _TRANSPOSED if flip else _AS_IT_IS,
        m,
        k,
        scale,
        a.data_ptr(),
        m if flip else k,
        0.0 if first else 1.0,
        lower.data_ptr(),
        m,
    )


def openblas_eigenvalues(matrix: Tensor) -> Tensor:
    """Ascending eigenvalues, shape (..., m), of the lower triangle of `matrix`; fails as torch's solver does."""
    m = matrix.shape[-1]
    values = torch.empty(matrix.shape[:-1], dtype=torch.float64, device=_CPU)
    for item, own in zip(matrix.reshape(-1, m, m), values.view(-1, m), strict=True):
        failed = _syevd(openblas_empty(m).copy_(item), own)
        if failed:
            raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
                f"the eigenvalues of a {m} x {m} matrix did not converge: {failed} elements off the diagonal are left"
            )
    return values


def _syevd(matrix: Tensor, values: Tensor) -> int:
    """Write the eigenvalues (m,) of the lower triangle of `matrix`, which is overwritten; 0, or LAPACK's complaint."""
    library = _library()
    assert library is not None
    m, info = ctypes.c_int64(len(values)), ctypes.c_int64()

    def call(work: Tensor, size: int, integers: Tensor, count: int) -> None:
        library.syevd(
            b"N",
            b"U",  # LAPACK is column-major: the upper triangle of the transpose is our lower one
            m,
            matrix.data_ptr(),
            m,
            values.data_ptr(),
            work.data_ptr(),
            ctypes.c_int64(size),
            integers.data_ptr(),
            ctypes.c_int64(count),
            info,
            1,  # lengths of the two strings, as Fortran wants them
            1,
        )

    integers = torch.empty(1, dtype=torch.int64, device=_CPU)
    best = torch.empty(1, dtype=torch.float64, device=_CPU)
    call(best, -1, integers, -1)  # asks how much memory serves best
    size = int(best)
    call(torch.empty(size, dtype=torch.float64, device=_CPU), size, integers, 1)
    return info.value


@functools.cache
def _mkl_is_slow() -> bool:
    """Whether torch computes with MKL on another vendor's processor; False where the vendor cannot be read."""
    has_mkl: bool = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    return has_mkl and _vendor() not in (None, "GenuineIntel")


def _vendor() -> str | None:
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        return None
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")]
    return names[0] if names else None


@functools.cache
def _library() -> _Library | None:
    """Find the OpenBLAS that NumPy's wheel carries and has loaded; None for NumPy of other sources."""
    return _load(Path(np.__file__).parent.parent / "numpy.libs")


def _load(folder: Path) -> _Library | None:
    files = list(folder.glob("*openblas*"))
    if len(files) != 1:
        return None
    library: Any = ctypes.CDLL(str(files[0]))
    for prefix in _PREFIXES:
        syrk = getattr(library, f"{prefix}cblas_dsyrk64_", None)
        syevd = getattr(library, f"{prefix}dsyevd_64_", None)
        threads = getattr(library, f"{prefix}openblas_get_num_threads64_", None)
        if syrk is not None and syevd is not None and threads is not None:
            choice, integer, double, address = ctypes.c_int, ctypes.c_int64, ctypes.c_double, ctypes.c_void_p
            matrix = (address, integer)  # and its leading dimension
            syrk.argtypes = (choice, choice, choice, integer, integer, double, *matrix, double, *matrix)
            syrk.restype = None
            text, number = ctypes.c_char_p, ctypes.POINTER(integer)
            spaces = (address, number, address, number)  # and their sizes
            syevd.argtypes = (
                *(text, text, number, address, number, address),
                *spaces,
                *(number, ctypes.c_size_t, ctypes.c_size_t),
            )
            syevd.restype = None
            threads.argtypes = ()
            threads.restype = ctypes.c_int
            return _Library(syrk, syevd, threads)
    return None


_TASKS = Path("/proc/self/task")  # Linux only


class _TorchPool:
    """Whether the parent's pool ran at the fork, and whether this process is the child."""

    ran = False
    lost = False


def check_pool() -> None:
    """Raise where an operation on several threads would not come back.

    Raises
    ------
    RuntimeError
        In a forked child of a process whose pool of threads had started, unless it uses one thread.
    """
    if _TorchPool.lost and torch.get_num_threads() > 1:
        raise RuntimeError(
            f"this is a forked child, and the {torch.get_num_threads()} threads that torch would use stayed in its "
            "parent: an operation would wait for them for ever. Start processes by spawn "
            "(torch.multiprocessing.set_start_method('spawn')), or call torch.set_num_threads(1) in the child first"
        )


def _torch_pool_runs() -> bool:
    """Whether there are threads that are neither Python's nor OpenBLAS's, enough for torch's pool."""
    wanted = torch.get_num_threads() - 1
    others = openblas_pool()
    if wanted < 1 or others is None or not _TASKS.exists():
        return False
    return len(list(_TASKS.iterdir())) - threading.active_count() - others >= wanted


def _before_fork() -> None:
    _TorchPool.ran = _torch_pool_runs()


def _after_fork_in_child() -> None:
    _TorchPool.lost = _TorchPool.lost or _TorchPool.ran


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_child=_after_fork_in_child)


CHUNK_BYTES = 4 * 2**20
GROUPS = 4
GROUPED_FROM = 1024  # shorter panels lose more to the extra sum than the threads gain
# A multiple of the 24 rows that MKL's AVX-512 product computes at once: 0.6 of a full product's time where slabs of 32
# take 0.7 (bench/NOTES.md).
SLAB = 48


def centred_covariance(x: Tensor, scale: float, *, exact_mean: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Lower triangle of ``scale * sum (x - mean)(x - mean)^T``.

    Parameters
    ----------
    x : Tensor, shape (n, d)
        Activations, any float dtype and strides.
    scale : float
        1/n for the covariance.
    exact_mean : bool
        Give the mean beyond the rounding of one float64, as merging parts at a large offset needs: one more pass.

    Returns
    -------
    lower : Tensor, shape (d, d), float64
        Only the lower triangle is meaningful; the rest is uninitialised.
    shift, delta : Tensor, shape (d,), float64
        Their sum is the mean; apart, since the sum rounds at the size of the offset.
    """
    n, d = x.shape
    rows = _chunk_length(n, d)
    chunk = x if n == rows else x[:rows]
    lower, add_lower_product = product_target(x, d)
    buffer, shift, delta = centred(chunk, exact=exact_mean or x.dtype == torch.float64)
    add_lower_product(lower, buffer.T, scale, first=True)
    if n == rows:  # the two-pass algorithm
        return lower, shift, delta
    center = shift + delta
    residual = buffer.sum(0)
    for start in range(rows, n, rows):
        chunk = x[start : start + rows]
        y = buffer[: chunk.shape[0]].copy_(chunk).sub_(center)
        residual += y.sum(0)
        add_lower_product(lower, y.T, scale)
    lower.addr_(residual, residual, alpha=-scale / n)
    return lower, shift, delta.add_(residual, alpha=1.0 / n)


def centred_gram(x: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Lower triangle of ``scale * Yc Yc^T``, Yc the column-centred rows; same non-zero spectrum, for n < d.

    Parameters
    ----------
    x : Tensor, shape (n, d)
        Activations, any float dtype and strides.
    scale : float
        1/n for the spectrum of the covariance.

    Returns
    -------
    lower : Tensor, shape (n, n), float64
        Only the lower triangle is meaningful; the rest is uninitialised.
    shift, delta : Tensor, shape (d,), float64
        Their sum is the mean.
    """
    n, d = x.shape
    columns = _chunk_length(d, n)
    lower, add_lower_product = product_target(x, n)
    means = []
    for start in range(0, d, columns):
        y, *mean = centred(x[:, start : start + columns], exact=x.dtype == torch.float64)
        means.append(mean)
        add_lower_product(lower, y, scale, first=start == 0)
    shifts, deltas = zip(*means, strict=True)
    return lower, torch.cat(shifts), torch.cat(deltas)


def product_target(x: Tensor, m: int) -> tuple[Tensor, Callable[..., None]]:
    """Memory for an (m, m) matrix, uninitialised, and the function that adds products to it."""
    if openblas_preferred(x, m):
        return openblas_empty(m), add_lower_syrk
    return torch.empty((m, m), dtype=torch.float64, device=x.device), _add_lower_product


def centred(x: Tensor, *, exact: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Contiguous float64 copy of the rows of `x` (k, d) less their mean, and that mean as shift and delta.

    A constant column must give exactly 0. The float64 mean of up to 2^29 equal values of 24 bits is that value, so
    for inputs narrower than float64 one pass will do; `exact` takes row 0 off first, then the mean of the rest.
    """
    y = torch.empty(x.shape, dtype=torch.float64, device=x.device)
    if not exact:
        shift = _mean(y.copy_(x))
        return y.sub_(shift), shift, torch.zeros_like(shift)
    shift = x[0].to(torch.float64, copy=True)
    # Of mixed dtypes torch would make a copy first.
    y = torch.sub(x, shift, out=y) if x.dtype == torch.float64 else y.copy_(x).sub_(shift)
    delta = y.mean(0)
    return y.sub_(delta), shift, delta


def _mean(y: Tensor) -> Tensor:
    """Mean of each column of `y` (k, d): at torch's grain by halves of the columns, to the same bits, in one thread."""
    k, d = y.shape
    if k * d != GRAIN or d % 32 or torch.get_num_threads() == 1 or not y.is_cpu:
        return y.mean(0)
    return torch.cat([y[:, : d // 2].mean(0), y[:, d // 2 :].mean(0)])


def _chunk_length(length: int, width: int) -> int:
    """Rows of `width` float64 that fit the buffer, a multiple of GROUPS where there is a choice."""
    fit = max(GROUPS, CHUNK_BYTES // (8 * width))
    return length if length <= fit else fit // GROUPS * GROUPS


def _add_lower_product(lower: Tensor, a: Tensor, scale: float, *, first: bool = False) -> None:
    """Add ``scale * a a^T`` to the lower triangle (`first`: overwrite it); `a` has shape (m, k)."""
    m, k = a.shape
    grouped = k >= GROUPED_FROM and k % GROUPS == 0
    if grouped:  # (m, k) -> (GROUPS, m, k / GROUPS), whichever of the two axes is contiguous
        panels = a.view(m, GROUPS, k // GROUPS).transpose(0, 1)
    for low in range(0, m, SLAB):
        high = min(low + SLAB, m)
        slab = lower[low:high, :high]
        if grouped:
            product = torch.bmm(panels[:, low:high], panels[:, :high].mT).sum(0)
            torch.mul(product, scale, out=slab) if first else slab.add_(product, alpha=scale)
        else:
            torch.addmm(slab, a[low:high], a[:high].T, beta=0.0 if first else 1.0, alpha=scale, out=slab)


EPS = torch.finfo(torch.float64).eps
# Edge up to which a matrix goes from a CUDA device to LAPACK: cuSOLVER takes a batch one by one before torch 2.12, some
# 2 to 5 ms each at 128, where LAPACK takes 0.35 (on other machines; not yet measured side by side on one).
LAPACK_TO = 512

fallbacks: list[str] = []
"""Reasons of the eigensolves that failed on a GPU and were done again on the CPU, in order."""

_log = logging.getLogger(__name__)


def eigenvalues(matrix: Tensor) -> tuple[Tensor, str]:
    """Eigenvalues of the lower triangle of a symmetric matrix.

    Parameters
    ----------
    matrix : Tensor, shape (..., m, m), float64
        With finite entries; batched or not.

    Returns
    -------
    values : Tensor, shape (..., m)
        float64 on the CPU, ascending.
    solver : str
        "cusolver" or "lapack".

    Notes
    -----
    LAPACK solves a batch one by one, each with the threads of torch's operations (`torch.get_num_threads`); for one
    thread see OpenBLAS above. So where only the matrices are formed on a device, records of a run there and of one on
    the CPU of the same machine differ by the order of the sums in the matrices, and no longer by the solver.
    """
    check_pool()
    # LAPACK is column-major: the upper triangle of the transpose is our lower one, and needs no copy.
    matrix = matrix.mT
    if matrix.is_cuda and matrix.shape[-1] > LAPACK_TO:
        try:
            values = torch.linalg.eigvalsh(matrix, UPLO="U").cpu()
            if _sums_to_trace(values, matrix):
                return values, "cusolver"
            reason = "its eigenvalues do not sum to the trace"
        except RuntimeError as error:  # torch.linalg.LinAlgError is one
            reason = str(error)
        fallbacks.append(reason)
        _log.warning("eigvalsh failed on the GPU (%s): solved on the CPU, %d so far", reason, len(fallbacks))
    if matrix.is_cuda:
        matrix = matrix.cpu()
    if matrix.shape[-1] >= SOLVE_FROM and openblas_preferred(matrix):
        return openblas_eigenvalues(matrix.mT), "lapack"
    return torch.linalg.eigvalsh(matrix, UPLO="U"), "lapack"


def _sums_to_trace(values: Tensor, matrix: Tensor) -> bool:
    trace = matrix.diagonal(dim1=-2, dim2=-1).sum(-1).cpu()
    gate = max(1e-12, 30 * matrix.shape[-1] * EPS)
    return bool(((values.sum(-1) - trace).abs() <= gate * trace).all())


_NAMES = ("libtorch_cpu.so", "torch_cpu.dll", "libtorch_cpu.dylib")


def use_one_thread() -> None:
    """Make torch's operations in the calling thread, LAPACK among them, run in this thread alone.

    Where torch was built with neither MKL nor OpenMP there is nothing to set.
    """
    torch.get_num_threads()  # a thread's first operation sets its number: let that be behind us
    folder = Path(torch.__file__).parent / "lib"
    for name in _NAMES:
        if (folder / name).exists():
            library = ctypes.CDLL(str(folder / name))  # loaded already: this only finds it
            for function in ("MKL_Set_Num_Threads_Local", "omp_set_num_threads"):
                if hasattr(library, function):
                    getattr(library, function)(1)
