"""One LAPACK thread for the calling thread, without a trace in any other.

``torch.set_num_threads`` would not do: it also sets what threads that start later get, and switches MKL's choice of
threads off for the whole process, which could change the bits of training. MKL and OpenMP keep a number for each
thread; it is set there, through the libraries that torch has loaded.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

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
