"""NumPy's OpenBLAS in place of torch's MKL, for one thread on a processor that is not Intel's.

There MKL runs kernels at about half the speed of OpenBLAS's, and torch has no product that computes one triangle
(bench/NOTES.md). NumPy's wheels carry OpenBLAS; its ``dsyrk`` is called where it lies, as NumPy calls it for
``a.T @ a``, but for one triangle, with a factor and a sum; ctypes lets other threads run meanwhile.

Only where both libraries have one thread: two pools on the same cores fight. No number of threads is ever changed,
so ``OMP_NUM_THREADS=1`` in the environment (torchrun's default) is what makes a process eligible,
``torch.set_num_threads(1)`` alone is not. Which of the two computes is a function of the machine, of the
numbers of threads and of the shape; their last bits differ.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

# Edge from which its eigenvalues come sooner than MKL's: 0.94 of the time at 192, 0.6 at 1,024, 1.1 at 64.
SOLVE_FROM = 192
HUGE_FROM = 724  # 4 MiB, from which NumPy asks for huge pages
# Names in the wheels of NumPy 2 and 1; the suffix says that all integers have 64 bits.
_PREFIXES = ("scipy_", "")
CPUINFO = Path("/proc/cpuinfo")  # Linux only
_CPU = torch.device("cpu")
_ROW_MAJOR, _LOWER, _AS_IT_IS, _TRANSPOSED = 101, 122, 111, 112


class _Library(NamedTuple):
    syrk: Callable[..., None]
    threads: Callable[[], int]


def preferred(x: Tensor) -> bool:
    """Whether products and eigenvalues of `x` belong here rather than to torch."""
    if type(x) is not Tensor or not x.is_cpu or torch.get_num_threads() != 1 or not available():
        return False
    library = _library()
    return library is not None and library.threads() == 1


def available() -> bool:
    """Whether it would serve this processor, given one thread."""
    return _mkl_is_slow() and _library() is not None


def pool() -> int | None:
    """Threads that it may have started beside its callers; None where it was not found."""
    library = _library()
    return None if library is None else library.threads() - 1


def empty(m: int) -> Tensor:
    """Uninitialised float64 matrix (m, m), a large one in NumPy's memory, which asks for huge pages."""
    if m >= HUGE_FROM:
        return torch.from_numpy(np.empty((m, m)))
    return torch.empty((m, m), dtype=torch.float64, device=_CPU)  # its address is handed to C


def add_lower_product(lower: Tensor, a: Tensor, scale: float, *, first: bool = False) -> None:
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


def eigenvalues(matrix: Tensor) -> Tensor:
    """Ascending eigenvalues, shape (..., m), of the lower triangle of `matrix`; fails as torch's solver does."""
    try:  # LAPACK is column-major: the upper triangle of the transpose is our lower one
        return torch.from_numpy(np.linalg.eigvalsh(matrix.mT.numpy(), UPLO="U"))
    except np.linalg.LinAlgError as error:
        raise torch.linalg.LinAlgError(str(error)) from error  # type: ignore[attr-defined]


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
        threads = getattr(library, f"{prefix}openblas_get_num_threads64_", None)
        if syrk is not None and threads is not None:
            choice, integer, double = ctypes.c_int, ctypes.c_int64, ctypes.c_double
            matrix = (ctypes.c_void_p, integer)  # and its leading dimension
            syrk.argtypes = (choice, choice, choice, integer, integer, double, *matrix, double, *matrix)
            syrk.restype = None
            threads.argtypes = ()
            threads.restype = ctypes.c_int
            return _Library(syrk, threads)
    return None
