"""Forked children that lost the threads of torch's pool.

A fork copies one thread. If that thread has run torch's operations on several, its copy waits for ever for those that
were left behind, at the first operation that wants them: in torch, not here, but a silent hang all the same. Where
the threads can be counted (Linux, NumPy's own OpenBLAS) it becomes an error.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

import torch

from fastent import openblas

_TASKS = Path("/proc/self/task")  # Linux only


class _Pool:
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
    if _Pool.lost and torch.get_num_threads() > 1:
        raise RuntimeError(
            f"this is a forked child, and the {torch.get_num_threads()} threads that torch would use stayed in its "
            "parent: an operation would wait for them for ever. Start processes by spawn "
            "(torch.multiprocessing.set_start_method('spawn')), or call torch.set_num_threads(1) in the child first"
        )


def _runs() -> bool:
    """Whether there are threads that are neither Python's nor OpenBLAS's, enough for torch's pool."""
    wanted = torch.get_num_threads() - 1
    others = openblas.pool()
    if wanted < 1 or others is None or not _TASKS.exists():
        return False
    return len(list(_TASKS.iterdir())) - threading.active_count() - others >= wanted


def _before() -> None:
    _Pool.ran = _runs()


def _after_in_child() -> None:
    _Pool.lost = _Pool.lost or _Pool.ran


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_child=_after_in_child)
