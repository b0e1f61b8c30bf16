"""Where activations lie, and who evaluates them: CUDA by a ring, the CPU by the worker or in line.

A thread that queries events breaks the capture of a CUDA graph by another: before a capture wait for what is
under way (``flush``), or capture with ``capture_error_mode="thread_local"``.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from fastent.covariance import CenteredMatrix, centered_matrix, triton_obstacle
from fastent.forming import KernelFormer, TorchFormer
from fastent.ring import Device, Event, Ring, Staged, Streams
from fastent.rounding import Resolution
from fastent.spectrum import TINY, held_resolution

# From this edge on a hand-over to the worker costs nothing that could be measured even where no core is idle, and
# hides 10 ms and more where one is (bench/NOTES.md).
WORKER_FROM = 512
# cuSOLVER takes a batch in one call from torch 2.12 on; before, it solves one after the other.
HAS_BATCHED_SOLVER = torch.torch_version.TorchVersion(torch.__version__) >= "2.12"


@dataclass(eq=False)
class _OnHost:
    """A matrix that need not go anywhere."""

    centered: CenteredMatrix
    dtype: torch.dtype
    source: Tensor | None = None
    batched: Streams | None = None

    def ready(self) -> bool:
        return True

    def spread(self) -> None:
        return None

    def release(self) -> None:
        return None


class Host:
    """The CPU: formed by the training thread, solved by the worker, with the bits of an evaluation in line."""

    # Dropped evaluations would make the record depend on luck, and waiting costs no more than solving in line.
    waits_when_full = True

    def stage(self, x: Tensor, resolution: Resolution) -> Staged | None:
        """Form the matrix; None for values so extreme, or not finite, that the activations are needed again."""
        centered = centered_matrix(x, resolution=resolution)
        trace = float(centered.trace)
        if not TINY <= trace < torch.inf:
            return None
        resolution = held_resolution(centered, trace, x)
        return _OnHost(dataclasses.replace(centered, resolution=resolution), x.dtype)


class CudaStreams:
    """A CUDA device: its current stream, where training runs, and a side stream of our own.

    Parameters
    ----------
    device : torch.device
        With an index.
    """

    batched = HAS_BATCHED_SOLVER

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._solving = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._formed = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def current(self) -> Hashable:
        """Address of the current stream."""
        return torch.cuda.current_stream(self.device).cuda_stream

    def event(self) -> Event:
        """Make an event without timing."""
        return torch.cuda.Event()  # type: ignore[no-untyped-call]

    def pinned(self, size: int) -> Tensor:
        """Allocate page-locked memory: from pageable memory a copy would be staged, and wait."""
        return torch.empty(size, dtype=torch.float64, device="cpu", pin_memory=True)

    @contextmanager
    def aside(self, block: Tensor) -> Iterator[None]:
        """Queue on the side stream, after what the current stream holds."""
        self._formed.record(torch.cuda.current_stream(self.device))
        self._side.wait_event(self._formed)
        try:
            with torch.cuda.stream(self._side):
                yield
        finally:
            block.record_stream(self._side)

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Queue a copy to pinned memory."""
        target.copy_(source, non_blocking=True)

    def record(self, event: Event) -> None:
        """Put `event` behind the copy."""
        assert isinstance(event, torch.cuda.Event)
        event.record(self._side)

    def solve(self, matrices: list[Tensor]) -> Tensor:
        """Solve a batch by cuSOLVER, on a stream of its own; the calling thread waits."""
        with torch.cuda.device(self.device), torch.cuda.stream(self._solving):
            values: Tensor = torch.linalg.eigvalsh(torch.stack(matrices).mT, UPLO="U")
            return values.cpu()


class Devices:
    """Which device object serves a tensor; the default of `fastent.deferred.DeferredEntropy`.

    CUDA: always a ring. CPU: the worker where the solve is long, this thread uses one thread and there are other
    cores; otherwise in line. With several intra-op threads LAPACK gives other last bits than the worker's
    one, and they leave no core to it. Elsewhere in line.
    """

    def __init__(self) -> None:
        self._rings: dict[torch.device, Ring] = {}
        self._host = Host()

    def of(self, x: Tensor) -> Device | None:
        """Device object for checked activations (n, d); None for an evaluation in line.

        Raises
        ------
        RuntimeError
            While the current stream is being captured.
        """
        if x.device.type == "cuda":
            # Before anything is taken: memory taken now would be the graph's, and zeroed by its replays alone.
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "a deferred evaluation cannot be part of a CUDA graph: call step or observe between replays"
                )
            ring = self._rings.get(x.device)
            if ring is None:
                former = KernelFormer() if triton_obstacle(x.device) is None else TorchFormer()
                ring = self._rings[x.device] = Ring(CudaStreams(x.device), former)
            return ring
        if x.device.type != "cpu" or min(x.shape) < WORKER_FROM:
            return None
        return self._host if torch.get_num_threads() == 1 and _usable_cores() > 1 else None


def in_line(x: Tensor) -> None:
    """Evaluate everything in line."""


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
