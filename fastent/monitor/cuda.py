"""Where activations lie, and how their matrices reach the thread that solves them without stopping training.

On CUDA a matrix, its mean and its participation ratio are formed in the training stream (`KernelFormer`: our kernels,
into memory that was taken once, one or two launches; `TorchFormer` for devices without them). A slot of a ring holds
the memory on both sides: a side stream copies to pinned memory, and an event says when it is there. Slots are used
again: in the steady state nothing is allocated, and nothing waits, except `Streams.solve`, which is for the worker.
`Streams` is all that this asks of a device, so that a test may stand in for its clock. On the CPU the worker solves
large matrices, and small ones are solved in line (`Devices` has the rule).

A thread that queries events breaks the capture of a CUDA graph by another: before a capture wait for what is
under way (``flush``), or capture with ``capture_error_mode="thread_local"``.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastent.covariance import centered_matrix

if TYPE_CHECKING:
    from fastent.kernels.resident import ResidentCovariance
import dataclasses
import os
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from fastent.covariance import triton_obstacle
from fastent.entropy import TINY, held_resolution
from fastent.linalg import CenteredMatrix, Side
from fastent.rounding import Resolution

# Evaluators kept; with more than that, shapes no longer come back.
_MOST_EVALUATORS = 64


class Formed(NamedTuple):
    """What one evaluation leaves on the device, all float64."""

    matrix: Tensor  # (m, m), the lower triangle; m is the smaller of n and d
    centre: Tensor  # (>= 2, d): shift, which is an entry of each column, and mean - shift
    spread: Tensor  # (3,): trace, sum of squares of all entries, participation ratio
    block: Tensor  # their memory, in one piece

    def at(self, block: Tensor) -> Formed:
        """Return the same, in another block of memory of the same size."""
        start = self.block.storage_offset()
        matrix, centre, spread = (
            block.as_strided(part.shape, part.stride(), part.storage_offset() - start) for part in self[:3]
        )
        return Formed(matrix, centre, spread, block)


class Former(Protocol):
    """A way to form them."""

    def memory(self, x: Tensor) -> Any:
        """Take memory on the device that `form` writes results of this shape to."""

    def form(self, x: Tensor, memory: Any, stream: Hashable) -> Formed:
        """Queue the evaluation of checked activations (n, d) in the current stream, which is called `stream`."""


class KernelFormer:
    """By the kernels."""

    def __init__(self) -> None:
        self._evaluators: dict[tuple[int, int, Hashable], ResidentCovariance] = {}

    def memory(self, x: Tensor) -> Any:
        """Take the kernels' output tensors."""
        from fastent.kernels.launch import output

        n, d = x.shape
        return output("gram" if n < d else "covariance", 1, n, d, x.device, spread=True)

    def form(self, x: Tensor, memory: Any, stream: Hashable) -> Formed:
        """Launch the kernels."""
        from fastent.kernels.resident import ResidentCovariance

        n, d = x.shape
        key = (n, d, stream)  # the scratch memory serves one evaluation at a time, so one stream
        evaluator = self._evaluators.get(key)
        if evaluator is None:
            if len(self._evaluators) >= _MOST_EVALUATORS:
                self._evaluators.clear()
            evaluator = self._evaluators[key] = ResidentCovariance(n, d, device=x.device)
        evaluator(x, memory)
        return Formed(memory.lower[0], memory.centre[0], memory.spread[0], memory.block)


class TorchFormer:
    """By torch's operations, into new memory each time."""

    def memory(self, x: Tensor) -> None:
        """Nothing to take."""

    def form(self, x: Tensor, memory: Any, stream: Hashable) -> Formed:
        """Queue the operations."""
        centered = centered_matrix(x)
        entries = x[0].to(torch.float64)
        delta = (centered.shift - entries) + centered.delta
        parts = (centered.matrix, torch.stack((entries, delta)), spread_of(centered.matrix))
        block = torch.cat([part.flatten() for part in parts])
        pieces = block.split([part.numel() for part in parts])  # type: ignore[no-untyped-call]
        matrix, centre, spread = (piece.view_as(part) for piece, part in zip(pieces, parts, strict=True))
        return Formed(matrix, centre, spread, block)


def spread_of(matrix: Tensor) -> Tensor:
    """Trace, sum of squares and participation ratio of a symmetric matrix from its lower triangle, shape (3,).

    Divided by the trace first, no square leaves float64's range; only the sum of squares itself may.
    """
    lower = matrix.tril()
    diagonal = lower.diagonal()
    trace = diagonal.sum()
    lower /= trace
    purity = 2.0 * lower.square().sum() - diagonal.square().sum()
    return torch.stack((trace, purity * trace.square(), 1.0 / purity))


# Slots that wait for another use; with more than that, shapes no longer come back.
_MOST_FREE = 256


class Event(Protocol):
    """A point in a stream."""

    def query(self) -> bool:
        """Whether the stream has passed it. Never waits."""


class Streams(Protocol):
    """What a ring asks of a device: the stream that training uses now, and one beside it."""

    batched: bool

    def current(self) -> Hashable:
        """Name the stream that training uses now."""

    def event(self) -> Event:
        """Make an event that is passed until it is recorded."""

    def pinned(self, size: int) -> Tensor:
        """Allocate `size` float64 of host memory that the device writes to by itself."""

    def aside(self, block: Tensor) -> AbstractContextManager[None]:
        """Queue what is done inside on the side stream, after all that training has queued so far.

        The memory of `block` is not used again before the side stream is done with it.
        """

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Queue a copy to the host."""

    def record(self, event: Event) -> None:
        """Put `event` behind all that is queued."""

    def solve(self, matrices: list[Tensor]) -> Tensor:
        """Eigenvalues of lower triangles (m, m), all of one size, in one call: (count, m) on the host. Waits."""


class Staged(Protocol):
    """A centred matrix on its way to the thread that solves it."""

    centered: CenteredMatrix  # on the host; meaningful once `ready`
    dtype: torch.dtype  # of the activations
    source: Tensor | None  # the matrix on a device that could solve it
    batched: Streams | None  # whose `solve` takes it

    def ready(self) -> bool:
        """Whether `centered` has arrived. Never waits."""

    def spread(self) -> tuple[float, float] | None:
        """Trace and participation ratio as the device found them."""

    def release(self) -> None:
        """Give its memory back."""


class Device(Protocol):
    """Where activations lie, if their entropy is evaluated by the worker."""

    waits_when_full: bool

    def stage(self, x: Tensor, resolution: Resolution) -> Staged | None:
        """Form the centred matrix of checked activations (n, d); None if they must be looked at in line."""


class Slot:
    """Memory of one matrix, on the device and pinned; a `Staged` while it is in use.

    Parameters
    ----------
    ring : Ring
        Where it goes back to.
    streams : Streams
        The device.
    m, d : int
        Edge of the matrix, and features.
    memory
        What the ring's `Former` writes to.
    """

    def __init__(self, ring: Ring, streams: Streams, m: int, d: int, memory: Any) -> None:
        self.key = (m, d)
        self.memory = memory
        self.centered: CenteredMatrix
        self.dtype: torch.dtype
        self.source: Tensor | None = None
        self.batched = streams if streams.batched else None
        self._ring = ring
        self._host: Formed | None = None
        self._event = streams.event()

    def fill(
        self, streams: Streams, formed: Formed, n: int, dtype: torch.dtype, resolution: Resolution
    ) -> None:
        """Queue the copy of what was formed from `n` rows of `dtype`."""
        d = self.key[1]
        self.dtype = dtype
        if self._host is None:
            with torch.inference_mode(False):  # it is written to outside of inference mode too
                self._host = formed.at(streams.pinned(len(formed.block)))
        with streams.aside(formed.block):
            streams.copy(formed.block, self._host.block)
            streams.record(self._event)
        self.source = formed.matrix if self.batched else None
        side: Side = "gram" if n < d else "covariance"
        shift, delta = self._host.centre[0], self._host.centre[1]
        self.centered = CenteredMatrix(
            self._host.matrix, shift, delta, side, n, d, resolution, entries=self._host.centre[:1]
        )

    def ready(self) -> bool:
        """Whether the copy has been made."""
        return self._event.query()

    def spread(self) -> tuple[float, float]:
        """Trace and participation ratio as the device found them."""
        assert self._host is not None
        trace, _, ratio = self._host.spread.tolist()
        return trace, ratio

    def release(self) -> None:
        """Give the slot back; a copy that is still queued is done before the next one, on the same stream."""
        self.source = None
        self._ring.give_back(self)


class Ring:
    """Slots for the matrices of one device.

    Parameters
    ----------
    streams : Streams
        The device.
    former : Former
        How the matrices are formed there.

    Attributes
    ----------
    allocated : int
        Slots that were ever allocated.
    """

    waits_when_full = False

    def __init__(self, streams: Streams, former: Former) -> None:
        self._streams, self._former = streams, former
        self._free: dict[tuple[int, int], deque[Slot]] = {}
        self.allocated = 0

    def stage(self, x: Tensor, resolution: Resolution) -> Staged:
        """Form the covariance (or Gram matrix) in the training stream and send it on its way."""
        slot = self._take(x)
        try:
            formed = self._former.form(x, slot.memory, self._streams.current())
            slot.fill(self._streams, formed, x.shape[0], x.dtype, resolution)
        except BaseException:
            slot.release()
            raise
        return slot

    def give_back(self, slot: Slot) -> None:
        """Keep a slot for another use. Called by the worker too."""
        self._free.setdefault(slot.key, deque()).append(slot)

    def _take(self, x: Tensor) -> Slot:
        m, d = min(x.shape), x.shape[1]
        free = self._free.get((m, d))
        if free:
            return free.popleft()
        if sum(map(len, list(self._free.values()))) > _MOST_FREE:
            self._free = {}
        self.allocated += 1
        with torch.inference_mode(False):  # its memory is written to outside of inference mode too
            return Slot(self, self._streams, m, d, self._former.memory(x))


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
    """Which device object serves a tensor; the default of `fastent.monitor.deferred.DeferredEntropy`.

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
