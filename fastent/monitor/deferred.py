"""Spectral entropy evaluated beside training: the thread that trains forms the matrices, a worker solves them.

An evaluation is opened at a step, gets the activations of any number of layers, and is committed: in the training
stream only the covariances are formed. A daemon thread with one LAPACK thread polls until they are on the host (a wait
for a CUDA event would be one more call that blocks) and takes the eigenvalues; of the matrices that have arrived, those
of one size are solved together where the device can and they are many. Results come back as (step, results by layer),
in the order of the commits. The training thread never waits for the device, and for the worker only in `flush`, or
where a full ring was told to block.

On CUDA a matrix, its mean and its participation ratio are formed in the training stream (`KernelFormer`: our kernels,
into memory that was taken once, one or two launches; `TorchFormer` for devices without them). A slot of a ring holds
the memory on both sides: a side stream copies to pinned memory, and an event says when it is there. Slots are used
again: in the steady state nothing is allocated, and nothing waits, except `Streams.solve`, which is for the worker.
`Streams` is all that this asks of a device, so that a test may stand in for its clock.

On the CPU the worker has large layers. An idle one gets a copy of the activations and does everything, a busy one the
matrices, formed by the thread that trains (`Host`); layers of one evaluation are solved side by side where cores are
free. Small ones are evaluated in line and arrive at once: handing them over costs more than solving them (`Devices`
has the rule, bench/NOTES.md the measurement). Records have the same bits either way.

A full ring drops the evaluation before anything is computed, counts it and warns once. What goes wrong in the worker is
raised when its result is due, with the step named, and ends neither the thread nor the process. The worker ends with
its owner; at the end of the interpreter it is given `fastent.process.EXIT_SECONDS`, and then abandoned.

A thread that queries events breaks the capture of a CUDA graph by another, in torch's default mode. The worker takes
itself out of that before its first query (`ignore_captures`), so a capture needs no mode of its own. Not run on a
device yet.
"""

from __future__ import annotations

import ctypes
import dataclasses
import logging
import os
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from fastent.activations import Resolution, Rows
from fastent.covariance import CenteredMatrix, centered_matrix, triton_obstacle
from fastent.entropy import (
    TINY,
    SpectralEntropy,
    Status,
    checked,
    entropy_of_matrix,
    entropy_of_rows,
    held_resolution,
    unmeasured,
)
from fastent.linalg import EPS, Side, fallbacks, use_one_thread
from fastent.moments import Moments
from fastent.monitor.cost import Clock
from fastent.process import at_exit, warn_user
from fastent.sampling import SamplingError

if TYPE_CHECKING:
    from fastent.kernels.covariance import ResidentCovariance

# Evaluators kept; with more than that, shapes no longer come back.
_MOST_EVALUATORS = 64
# Slots that wait for another use; with more than that, shapes no longer come back.
_MOST_FREE = 256
# From this edge on the worker surely gains where a core is idle, and costs at most some 1 % where none is
# (bench/NOTES.md).
WORKER_FROM = 128
# Memory of a copy of activations over that of their matrix. Only the evaluation that an idle worker begins with has
# copies, so a full ring of `CAPACITY` takes at most half more.
MOST_COPIED = 4
# Threads that solve at once, the worker among them.
MOST_AT_ONCE = 8
# cuSOLVER takes a batch in one call from torch 2.12 on; before, it solves one after the other.
HAS_BATCHED_SOLVER = torch.torch_version.TorchVersion(torch.__version__) >= "2.12"
# Matrices of one size from which on a batched solver is called: 32 of 128 x 128 take 7 ms together on a small GPU, and
# 0.4 ms each by LAPACK. Not measured on a large one yet.
BATCH_FROM = 16
# Seconds between two looks at an event: at first, and at most.
_FIRST_PAUSE, _LONGEST_PAUSE = 5e-5, 1e-3
# Seconds that a thread which was told to end has to hear of it.
_LAST_SECONDS = 0.1

THREAD_NAME = "fastent-eigenvalues"

_DRIVER = "libcuda.so.1"  # Linux, as Triton
_CAPTURE_MODE_THREAD_LOCAL = 1  # CUstreamCaptureMode

_log = logging.getLogger(__name__)


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


class KernelFormer:
    """Covariances, or Gram matrices, formed by the kernels."""

    def __init__(self) -> None:
        self._evaluators: dict[tuple[int, int, Hashable], ResidentCovariance] = {}

    def memory(self, x: Tensor) -> Any:
        """Take the output tensors that `form` writes results of this shape to."""
        from fastent.kernels.launch import output

        n, d = x.shape
        return output("gram" if n < d else "covariance", 1, n, d, x.device, spread=True)

    def form(self, x: Tensor, memory: Any, stream: Hashable) -> Formed:
        """Launch the kernels on checked activations (n, d) in the current stream, which is called `stream`."""
        from fastent.kernels.covariance import ResidentCovariance

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
    """The same by torch's operations, into new memory each time."""

    def memory(self, x: Tensor) -> None:
        """Nothing to take."""

    def form(self, x: Tensor, memory: Any, stream: Hashable) -> Formed:
        """Queue the operations."""
        centered = centered_matrix(x)
        entries = x[0].to(torch.float64)
        delta = (centered.shift - entries) + centered.delta
        return _in_one_block(centered.matrix, torch.stack((entries, delta)), spread_of(centered.matrix))


def _in_one_block(*parts: Tensor) -> Formed:
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


class Streams(Protocol):
    """What a ring asks of a device: the stream that training uses now, and one beside it."""

    batched: bool

    def current(self) -> Hashable:
        """Name the stream that training uses now."""

    def event(self) -> torch.cuda.Event:
        """Make an event that is passed (`query`) until it is recorded."""

    def stamp(self) -> torch.cuda.Event:
        """Make such an event that keeps the time at which it passes."""

    def mark(self, stamp: torch.cuda.Event) -> None:
        """Put `stamp` behind all that training has queued."""

    def seconds(self, first: torch.cuda.Event, second: torch.cuda.Event) -> float:
        """Time between two stamps that have passed."""

    def pinned(self, size: int) -> Tensor:
        """Allocate `size` float64 of host memory that the device writes to by itself."""

    def aside(self, block: Tensor, after: torch.cuda.Event) -> AbstractContextManager[None]:
        """Queue what is done inside on the side stream, after `after` has passed.

        The memory of `block` is not used again before the side stream is done with it.
        """

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Queue a copy to the host."""

    def record(self, event: torch.cuda.Event) -> None:
        """Put `event` behind all that is queued."""

    def query(self, event: torch.cuda.Event) -> bool:
        """Whether `event` has passed. For the worker: captures by other threads are none of its business."""

    def solve(self, matrices: list[Tensor]) -> Tensor:
        """Eigenvalues of lower triangles (m, m), all of one size, in one call: (count, m) on the host. Waits."""


class _Thread(threading.local):
    ignores_captures = False


_thread = _Thread()


def ignore_captures() -> None:
    """Permit the calling thread what captures by other threads forbid it, queries of events among them; once.

    While one thread captures in the mode "global", torch's default, such a call in another one fails and spoils the
    capture, unless that other thread's own mode is "thread_local" (CUDA driver API, cuThreadExchangeStreamCaptureMode).
    """
    if _thread.ignores_captures:
        return
    _thread.ignores_captures = True
    try:
        exchange = ctypes.CDLL(_DRIVER).cuThreadExchangeStreamCaptureMode
    except (OSError, AttributeError) as error:  # no such library, or none with that function
        _log.debug("captures by other threads are not ignored: %s", error)
        return
    failed = exchange(ctypes.byref(ctypes.c_int(_CAPTURE_MODE_THREAD_LOCAL)))
    if failed:
        _log.warning(
            "cuThreadExchangeStreamCaptureMode returned %d: capture CUDA graphs with "
            "capture_error_mode='thread_local' while evaluations are under way",
            failed,
        )


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

    def current(self) -> Hashable:
        """Address of the current stream."""
        return torch.cuda.current_stream(self.device).cuda_stream

    def event(self) -> torch.cuda.Event:
        """Make an event without timing."""
        return torch.cuda.Event()  # type: ignore[no-untyped-call]

    def stamp(self) -> torch.cuda.Event:
        """Make an event with timing."""
        return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

    def mark(self, stamp: torch.cuda.Event) -> None:
        """Put `stamp` behind what the current stream holds."""
        stamp.record(torch.cuda.current_stream(self.device))

    def seconds(self, first: torch.cuda.Event, second: torch.cuda.Event) -> float:
        """Time between two stamps that have passed."""
        return 1e-3 * first.elapsed_time(second)  # type: ignore[no-any-return]

    def pinned(self, size: int) -> Tensor:
        """Allocate page-locked memory: from pageable memory a copy would be staged, and wait."""
        return torch.empty(size, dtype=torch.float64, device="cpu", pin_memory=True)

    @contextmanager
    def aside(self, block: Tensor, after: torch.cuda.Event) -> Iterator[None]:
        """Queue on the side stream, after `after`."""
        self._side.wait_event(after)
        try:
            with torch.cuda.stream(self._side):
                yield
        finally:
            block.record_stream(self._side)

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Queue a copy to pinned memory."""
        target.copy_(source, non_blocking=True)

    def record(self, event: torch.cuda.Event) -> None:
        """Put `event` behind the copy."""
        event.record(self._side)

    def query(self, event: torch.cuda.Event) -> bool:
        """Whether `event` has passed; the calling thread ignores captures from its first query on."""
        ignore_captures()
        return event.query()  # type: ignore[no-any-return, no-untyped-call]

    def solve(self, matrices: list[Tensor]) -> Tensor:
        """Solve a batch by cuSOLVER, on a stream of its own; the calling thread waits."""
        with torch.cuda.device(self.device), torch.cuda.stream(self._solving):
            values: Tensor = torch.linalg.eigvalsh(torch.stack(matrices).mT, UPLO="U")
            return values.cpu()


class Interval:
    """Time that the device takes for what training queues inside, known when it has passed.

    Parameters
    ----------
    streams : Streams
        The device.

    Attributes
    ----------
    ended : torch.cuda.Event
        Behind what was queued inside.
    """

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._began, self.ended = streams.stamp(), streams.stamp()

    def __enter__(self) -> None:
        self._streams.mark(self._began)

    def __exit__(self, *error: object) -> None:
        self._streams.mark(self.ended)

    @property
    def passed(self) -> bool:
        """Whether `seconds` can be read."""
        return self._streams.query(self.ended)

    @property
    def seconds(self) -> float:
        """What the device took."""
        return self._streams.seconds(self._began, self.ended)


class Staged:
    """A centred matrix on its way to the thread that solves it; this one is on the host and has arrived.

    Attributes
    ----------
    centered : CenteredMatrix
        On the host; meaningful once `ready`.
    dtype : torch.dtype or None
        Of the activations, if they came in one piece.
    source : Tensor or None
        The matrix on a device that could solve it.
    batched : Streams or None
        Whose `solve` takes it.
    forming : Interval or None
        When a device formed it.
    """

    source: Tensor | None = None
    batched: Streams | None = None
    forming: Interval | None = None

    def __init__(self, centered: CenteredMatrix, dtype: torch.dtype | None) -> None:
        self.centered, self.dtype = centered, dtype

    def ready(self) -> bool:
        """Whether `centered` has arrived. Never waits."""
        return True

    def spread(self) -> tuple[float, float] | None:
        """Trace and participation ratio as a device found them."""
        return None

    def entropy(self, spectrum: Spectrum | None) -> SpectralEntropy:
        """Find the entropy, by LAPACK where there is no `spectrum`."""
        return _entropy(self, spectrum)

    def release(self) -> None:
        """Give its memory back."""


class Copied(Staged):
    """A copy of activations, of which the worker forms the matrix too.

    Parameters
    ----------
    x : Tensor, shape (n, d)
        Checked activations on the CPU.
    resolution : Resolution
        Of what they were made of.
    """

    def __init__(self, x: Tensor, resolution: Resolution) -> None:
        with torch.inference_mode(False):  # it is read outside of inference mode
            self._rows = x.clone(memory_format=torch.contiguous_format)
        self._resolution = resolution

    def entropy(self, spectrum: Spectrum | None) -> SpectralEntropy:
        """Find the entropy as it is found in line."""
        return entropy_of_rows(self._rows, self._resolution)


class Slot(Staged):
    """Memory of one matrix, on the device and pinned.

    Parameters
    ----------
    ring : Ring
        Where it goes back to.
    streams : Streams
        The device.
    key : tuple of int
        Edge of the matrix, and features; of moments the features alone.
    memory
        What the ring's former writes to.
    """

    def __init__(self, ring: Ring, streams: Streams, key: tuple[int, ...], memory: Any) -> None:
        self.key = key
        self.memory = memory
        self.batched = streams if streams.batched else None
        self._ring = ring
        self._host: Formed | None = None
        self._streams = streams
        self._event = streams.event()
        self.forming: Interval = Interval(streams)

    def fill(self, formed: Formed, n: int, dtype: torch.dtype, resolution: Resolution) -> None:
        """Queue the copy of what was formed from `n` rows of `dtype`."""
        d = self.key[-1]
        self.dtype = dtype
        host = self._send(formed)
        side: Side = "gram" if n < d else "covariance"
        shift, delta = host.centre[0], host.centre[1]
        self.centered = CenteredMatrix(
            host.matrix, shift, delta, side, n, d, resolution, entries=host.centre[:1]
        )

    def fill_merged(self, formed: Formed, centered: CenteredMatrix) -> None:
        """Queue the copy of `centered`, of moments, whose rounding is behind the spread."""
        self.dtype = None
        host = self._send(formed)
        self.centered = centered._replace(
            matrix=host.matrix, shift=host.centre[0], delta=host.centre[1], rounding=host.spread[3]
        )

    def _send(self, formed: Formed) -> Formed:
        streams = self._streams
        if self._host is None:
            with torch.inference_mode(False):  # it is written to outside of inference mode too
                self._host = formed.at(streams.pinned(len(formed.block)))
        with streams.aside(formed.block, self.forming.ended):
            streams.copy(formed.block, self._host.block)
            streams.record(self._event)
        self.source = formed.matrix if self.batched else None
        return self._host

    def ready(self) -> bool:
        """Whether the copy has been made. Never waits."""
        return self._streams.query(self._event)

    def spread(self) -> tuple[float, float]:
        """Trace and participation ratio as the device found them."""
        assert self._host is not None
        trace, _, ratio = self._host.spread[:3].tolist()
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
    former : KernelFormer or TorchFormer
        How the matrices are formed there.

    Attributes
    ----------
    allocated : int
        Slots that were ever allocated.
    """

    waits_when_full = False

    def __init__(self, streams: Streams, former: KernelFormer | TorchFormer) -> None:
        self._streams, self._former = streams, former
        self._free: dict[tuple[int, ...], deque[Slot]] = {}
        self.allocated = 0

    def stage(self, x: Tensor, resolution: Resolution) -> Staged:
        """Form the covariance (or Gram matrix) in the training stream and send it on its way."""
        slot = self._take((min(x.shape), x.shape[1]), lambda: self._former.memory(x))
        try:
            with slot.forming:
                formed = self._former.form(x, slot.memory, self._streams.current())
            slot.fill(formed, x.shape[0], x.dtype, resolution)
        except BaseException:
            slot.release()
            raise
        return slot

    def stage_merged(self, centered: CenteredMatrix) -> Staged:
        """Send the matrix of moments on its way."""
        assert centered.rounding is not None
        slot = self._take((centered.d,), lambda: None)
        try:
            with slot.forming:
                centre = torch.stack((centered.shift, centered.delta))
                spread = torch.cat((spread_of(centered.matrix), centered.rounding.reshape(1)))
                formed = _in_one_block(centered.matrix, centre, spread)
            slot.fill_merged(formed, centered)
        except BaseException:
            slot.release()
            raise
        return slot

    def passing(self) -> Interval:
        """Make the interval of a pass of the probe."""
        return Interval(self._streams)

    def give_back(self, slot: Slot) -> None:
        """Keep a slot for another use. Called by the worker too."""
        self._free.setdefault(slot.key, deque()).append(slot)

    def _take(self, key: tuple[int, ...], memory: Callable[[], Any]) -> Slot:
        free = self._free.get(key)
        if free:
            return free.popleft()
        if sum(map(len, list(self._free.values()))) > _MOST_FREE:
            self._free = {}
        self.allocated += 1
        with torch.inference_mode(False):  # its memory is written to outside of inference mode too
            return Slot(self, self._streams, key, memory())


class Host:
    """The CPU: all by the worker, or formed by the training thread, with the bits of an evaluation in line.

    The worker gets a copy of the activations where it has nothing else to do and they take little memory. Otherwise the
    training thread forms the matrix, so that it never waits for a worker that has more to do than it has itself.
    """

    # Dropped evaluations would make the record depend on luck, and waiting costs no more than solving in line.
    waits_when_full = True

    def stage(self, x: Tensor, resolution: Resolution, *, idle: bool = False) -> Staged | None:
        """Copy the activations for an `idle` worker, or form the matrix.

        None for values so extreme, or not finite, that the activations are needed again.
        """
        if idle and x.nbytes <= MOST_COPIED * 8 * min(x.shape) ** 2:
            return Copied(x, resolution)
        centered = centered_matrix(x, resolution=resolution)
        trace = float(centered.trace)
        if not TINY <= trace < torch.inf:
            return None
        resolution = held_resolution(centered, trace, x)
        return Staged(centered._replace(resolution=resolution), x.dtype)

    def stage_merged(self, centered: CenteredMatrix) -> Staged:
        """Take the matrix of moments as it is."""
        return Staged(centered, None)


Device = Host | Ring
"""Where activations lie, if their entropy is evaluated by the worker."""


class Devices:
    """Which device object serves a tensor; the default of `DeferredEntropy`.

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


def _free_cores() -> int:
    """Cores for the worker: those that the last minute has left free beside the thread that trains, or one."""
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 1.0
    return max(1, min(MOST_AT_ONCE, _usable_cores() - max(1, round(busy))))


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


Spectrum = tuple[Tensor, str]
"""Eigenvalues and the solver's name, as `fastent.linalg.eigenvalues` returns them."""


class Evaluated(NamedTuple):
    """Entropy of one layer, with its sampling errors where they were put in with it, and the name of its mask."""

    entropy: SpectralEntropy
    sampling: SamplingError | None = None
    mask: str | None = None


class FailedEvaluation(RuntimeError):
    """An evaluation that failed in the worker.

    Parameters
    ----------
    evaluation : Evaluation
        With its `error`.

    Attributes
    ----------
    step : int
        Of the evaluation.
    results : dict
        What to record in place of its results, by layer: the status `failed`.
    """

    def __init__(self, evaluation: Evaluation) -> None:
        error = evaluation.error
        assert error is not None
        super().__init__(f"the deferred evaluation of step {evaluation.step} failed: {described(error)}")
        self.step = evaluation.step
        self.results = {layer: Evaluated(failed(d, error)) for layer, d in evaluation.widths.items()}


def failed(d: int, error: BaseException) -> SpectralEntropy:
    """Make the result of a layer of `d` features, 0 if that is not known, whose evaluation ended in `error`."""
    return unmeasured(Status.FAILED, 0, d, f"the evaluation failed: {described(error)}")


def described(error: BaseException) -> str:
    """Give the type and text of an error, with its notes."""
    notes: list[str] = getattr(error, "__notes__", [])
    return "; ".join((f"{type(error).__name__}: {error}", *notes))


class Evaluation:
    """What is asked for at one step, and later its results or its error; made by `DeferredEntropy.open`."""

    def __init__(self, step: int, owner: DeferredEntropy) -> None:
        self.step = step
        self.staged: dict[str, Staged] = {}
        self.widths: dict[str, int] = {}
        """Features d of each layer, in the order of arrival."""
        self.error: BaseException | None = None
        self.done = False
        self.worker_seconds = self.device_forward = self.device_covariance = 0.0
        self.clock = owner.clock
        self._owner: DeferredEntropy | None = owner
        self._pass: Interval | None = None
        self._known: dict[str, Evaluated] = {}
        self._masks: dict[str, str | None] = {}

    def add(self, layer: str, h: Tensor, rows: Rows = Rows(), *, mask_name: str | None = None) -> None:
        """Form the matrix of a layer's activations, in the current stream; they are not kept.

        Parameters
        ----------
        layer : str
            A name within this evaluation.
        h : Tensor, shape (n, d), (n, tokens, d) with `rows.tokens`, or a map with `rows.positions`
            Activations.
        rows : Rows
            Which of their numbers are rows.
        mask_name : str, optional
            What the result says of its mask.

        Raises
        ------
        TypeError, ValueError
            As `fastent.spectral_entropy` does.
        """
        self.add_rows(layer, checked(h, rows), rows.resolution(h), mask_name=mask_name)

    def add_rows(
        self, layer: str, x: Tensor, resolution: Resolution, *, mask_name: str | None = None
    ) -> None:
        """Do the same for rows that were `checked`, with the resolution of what they were made of."""
        assert self._owner is not None
        device = self._owner._device_for(x)
        with self.clock.part("queueing" if isinstance(device, Ring) else "covariance"):
            staged = self._owner._stage(device, x, resolution)
            centered = centered_matrix(x, resolution=resolution) if staged is None else None
        if staged is None:
            with self.clock.part("eigenvalues"):
                entropy = entropy_of_rows(x, resolution, centered=centered)
            self.put(layer, entropy, mask_name=mask_name)
        else:
            self._expect(layer, staged, x.shape[-1], mask_name)

    def add_moments(self, layer: str, moments: Moments, *, mask_name: str | None = None) -> None:
        """Ask for the entropy of rows whose moments are at hand, two rows at least; in line where there is no room."""
        assert self._owner is not None
        centered = moments.centered()
        device = self._owner._device_for(centered.matrix) if self._owner.has_room else None
        if device is None:
            with self.clock.part("eigenvalues"):
                self.put(layer, entropy_of_matrix(centered), mask_name=mask_name)
        else:
            with self.clock.part("queueing" if isinstance(device, Ring) else "covariance"):
                staged = device.stage_merged(centered)
            self._expect(layer, staged, centered.d, mask_name)

    def _expect(self, layer: str, staged: Staged, d: int, mask_name: str | None) -> None:
        self.staged[layer] = staged
        self._masks[layer] = mask_name
        self.widths[layer] = d

    def put(
        self,
        layer: str,
        entropy: SpectralEntropy,
        sampling: SamplingError | None = None,
        *,
        mask_name: str | None = None,
    ) -> None:
        """Give a layer's result where it is known already; it keeps its place in the order."""
        self._known[layer] = Evaluated(entropy, sampling, mask_name)
        self.widths[layer] = entropy.d

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Time the pass of a probe inside, by the clock of the device that was used last, if one was."""
        assert self._owner is not None
        if not isinstance(self._owner._device, Ring):
            yield
            return
        self._pass = self._owner._device.passing()
        with self.clock.part("queueing"), self._pass:
            yield

    def rename(self, step: int) -> None:
        """Say which step it is of, where that was not known when it was opened."""
        self.step = step
        self.clock.rename(step)

    def cancel(self) -> None:
        """Give up what was asked for, in place of committing it."""
        self.release()
        self.clock.cancel(self.step)

    def drop(self, layer: str) -> None:
        """Forget what was asked for of a layer, if it was."""
        staged = self.staged.pop(layer, None)
        if staged is not None:
            staged.release()
        for values in (self._known, self._masks, self.widths):
            values.pop(layer, None)

    def arrange(self, layers: Iterable[str]) -> None:
        """Put the results in the order of `layers`, whichever arrived first; others come after them."""
        order = [layer for layer in layers if layer in self.widths]
        self.widths = {layer: self.widths[layer] for layer in (*order, *self.widths)}

    def __enter__(self) -> Evaluation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        owner, self._owner = self._owner, None  # the worker has this one, and must not keep its owner alive
        if kind is not None or owner is None:
            self.release()
        else:
            self.done = not self.staged
            owner._commit(self)

    @property
    def results(self) -> dict[str, Evaluated]:
        """Results by layer, in the order in which the layers came."""
        return {layer: self._known[layer] for layer in self.widths}

    def ready(self) -> bool:
        """Whether all that is staged has arrived, and the pass that it is from is over. Never waits."""
        return all(staged.ready() for staged in self.staged.values()) and (
            self._pass is None or self._pass.passed
        )

    def solve(self, spectra: Mapping[Staged, Spectrum], team: Team) -> None:
        """Find what is missing, by LAPACK where `spectra` does not have the eigenvalues, side by side."""
        intervals = [staged.forming for staged in self.staged.values() if staged.forming is not None]
        self.device_covariance = sum(interval.seconds for interval in intervals)
        if self._pass is not None:
            self.device_forward = max(0.0, self._pass.seconds - self.device_covariance)

        def one(layer: str) -> None:
            staged = self.staged[layer]
            self._known[layer] = Evaluated(staged.entropy(spectra.get(staged)), mask=self._masks[layer])

        team.each(one, self.staged, _free_cores())

    def release(self) -> None:
        """Give all slots back."""
        for staged in self.staged.values():
            staged.release()
        self.staged = {}


class Worker:
    """A daemon thread that solves evaluations in the order in which they are submitted."""

    def __init__(self) -> None:
        self._state = _State()
        self._thread = threading.Thread(target=_work, args=(self._state,), name=THREAD_NAME, daemon=True)
        self._thread.start()
        at_exit(self)

    @property
    def unsolved(self) -> int:
        """Evaluations submitted and not done."""
        return self._state.unsolved

    def submit(self, evaluation: Evaluation) -> None:
        """Queue an evaluation; it will be `done`."""
        with self._state.changed:
            self._state.waiting.append(evaluation)
            self._state.unsolved += 1
            self._state.changed.notify_all()

    def wait(self, most: int, timeout: float | None = None) -> bool:
        """Wait until at most `most` evaluations are unsolved; False if the time was up first."""
        state = self._state
        end = None if timeout is None else time.monotonic() + timeout
        with state.changed:
            while state.unsolved > most:
                if not self._thread.is_alive():
                    raise RuntimeError(f"the worker is gone; {state.unsolved} evaluations are lost")
                left = 1.0 if end is None else min(1.0, end - time.monotonic())
                if left <= 0:
                    return False
                state.changed.wait(left)
        return True

    def stop(self, timeout: float | None = None) -> None:
        """End the thread after the matrix that it is solving, and wait for that."""
        self.abandon()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def abandon(self) -> None:
        """Tell the thread to end, and do not wait."""
        self._state.stop()

    def finish(self, deadline: float) -> None:
        """Solve what is left until `deadline`, then end the thread, or leave it to its fate."""
        if self._thread.is_alive() and not self.wait(0, max(0.0, deadline - time.monotonic())):
            _log.warning("%d deferred evaluations were not finished when the process ended", self.unsolved)
        self.stop(max(_LAST_SECONDS, deadline - time.monotonic()))


class _State:
    """What the thread shares with its owner. The thread knows no more, so that the owner can be collected."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.waiting: deque[Evaluation] = deque()
        self.unsolved = 0
        self.stopping = False
        self._pid = os.getpid()

    def stop(self) -> None:
        self.stopping = True
        if self._pid == os.getpid():  # in a forked child the lock may be held by a thread that is not there
            with self.changed:
                self.changed.notify_all()

    def take(self, wait: bool) -> list[Evaluation]:
        """All that was submitted since; waits for one if asked to, and returns nothing at the end."""
        with self.changed:
            while wait and not self.waiting and not self.stopping:
                self.changed.wait()
            taken = list(self.waiting)
            self.waiting.clear()
            return taken

    def finish(self, evaluation: Evaluation, error: BaseException | None) -> None:
        """Give its slots back, then let its owner see it."""
        try:
            evaluation.release()
        except BaseException as second:
            error = error or second
        with self.changed:
            evaluation.error = error
            evaluation.done = True
            self.unsolved -= 1
            self.changed.notify_all()


class Team:
    """Threads that do the same for several things at once: the caller's, and others that start when they are wanted."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def each(self, call: Callable[[str], None], items: Iterable[str], threads: int) -> None:
        """Make the call for all items in at most so many threads; the first error is raised once none is under way."""
        waiting = deque(items)
        errors: list[BaseException] = []
        helped = threading.Semaphore(0)

        def work() -> None:
            while not errors:
                try:
                    item = waiting.popleft()
                except IndexError:
                    return
                try:
                    call(item)
                except BaseException as error:
                    errors.append(error)

        def help_out() -> None:
            work()
            helped.release()

        helpers = min(threads, len(waiting)) - 1
        while len(self._threads) < helpers:
            thread = threading.Thread(target=_help, args=(self._calls,), name=THREAD_NAME, daemon=True)
            thread.start()
            self._threads.append(thread)
        for _ in range(helpers):
            self._calls.put(help_out)
        work()
        for _ in range(helpers):
            helped.acquire()
        if errors:
            raise errors[0]

    def end(self) -> None:
        """End the threads that were started."""
        for _ in self._threads:
            self._calls.put(None)
        for thread in self._threads:
            thread.join()


def _help(calls: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    use_one_thread()
    while (call := calls.get()) is not None:
        call()


def _work(state: _State) -> None:
    use_one_thread()
    waiting: list[Evaluation] = []
    team = Team()
    try:
        while not state.stopping:
            waiting += state.take(wait=not waiting)
            if waiting:
                arrived = _arrived(state, waiting)
                waiting = waiting[len(arrived) :]
                began = time.perf_counter()
                spectra = _solve_together(arrived)
                arrived[0].worker_seconds = time.perf_counter() - began
                for evaluation in arrived:
                    if state.stopping:
                        return
                    _solve(state, evaluation, spectra, team)
    finally:
        team.end()


def _solve(state: _State, evaluation: Evaluation, spectra: Mapping[Staged, Spectrum], team: Team) -> None:
    began = time.perf_counter()
    try:
        evaluation.ready()  # raises what `_arrived` met
        evaluation.solve(spectra, team)
        evaluation.worker_seconds += time.perf_counter() - began
    except BaseException as error:
        state.finish(evaluation, error)
    else:
        state.finish(evaluation, None)


def _arrived(state: _State, waiting: list[Evaluation]) -> list[Evaluation]:
    """Wait for the first; return it and those right behind it that are there too, of all that was submitted."""
    pause = _FIRST_PAUSE
    while not _is_there(waiting[0]) and not state.stopping:
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)
    waiting += state.take(wait=False)  # what came in the meantime
    count = 1
    while count < len(waiting) and _is_there(waiting[count]):
        count += 1
    return waiting[:count]


def _is_there(evaluation: Evaluation) -> bool:
    try:
        return evaluation.ready()
    except BaseException:  # asked again where it has a place to go
        return True


def _solve_together(evaluations: list[Evaluation]) -> dict[Staged, Spectrum]:
    """Spectra of the sizes that came in numbers, from the device's batched solver; none where it fails."""
    groups: dict[tuple[Streams, int], list[Staged]] = {}
    for evaluation in evaluations:
        for staged in evaluation.staged.values():
            # A NaN would stop the solver for all of them.
            if staged.batched is not None and staged.source is not None and _in_range(staged):
                groups.setdefault((staged.batched, staged.source.shape[-1]), []).append(staged)
    spectra: dict[Staged, Spectrum] = {}
    for (streams, _), group in groups.items():
        if len(group) < BATCH_FROM:
            continue
        try:
            values = streams.solve([staged.source for staged in group if staged.source is not None])
        except Exception as error:  # whatever a device's solver raises, LAPACK still works
            _fall_back(str(error))
            continue
        for staged, own in zip(group, values, strict=True):
            spectra[staged] = own, "cusolver"
    return spectra


def _in_range(staged: Staged) -> bool:
    try:
        spread = staged.spread() if staged.ready() else None
    except BaseException:  # met again by `_solve`
        return False
    return spread is not None and TINY <= spread[0] < torch.inf


def _fall_back(reason: str) -> None:
    fallbacks.append(reason)
    _log.warning("a batch failed on the device (%s): solved on the CPU, %d so far", reason, len(fallbacks))


def _entropy(staged: Staged, spectrum: Spectrum | None) -> SpectralEntropy:
    """Entropy of a matrix that has arrived, checked against the trace that the device found."""
    spread = staged.spread()
    if spread is not None and spectrum is not None and not _sums_to(spread[0], spectrum[0]):
        _fall_back("its eigenvalues do not sum to the trace")
        spectrum = None
    entropy = entropy_of_matrix(staged.centered, spectrum=spectrum)
    if entropy.status is Status.NONFINITE and staged.dtype is not None:
        message = (
            f"{entropy.message} ({staged.dtype}); the activations are gone: mode='sync' counts the entries"
        )
        return dataclasses.replace(entropy, message=message)
    if spread is None or entropy.solver == "none":
        return entropy
    trace, ratio = spread
    if not _sums_to(trace, entropy.eigenvalues):
        total = float(entropy.eigenvalues.sum())
        raise RuntimeError(
            f"the eigenvalues sum to {total}, and the trace on the device was {trace}: the copy or the solve went wrong"
        )
    if not 0.0 < ratio < torch.inf:  # squares out of float64's range: that of the eigenvalues stands
        return entropy
    return dataclasses.replace(entropy, participation_ratio=ratio)


def _sums_to(trace: float, values: Tensor) -> bool:
    gate = max(1e-12, 30 * values.shape[-1] * EPS)
    return abs(float(values.sum()) - trace) <= gate * trace


OnFull = Literal["drop", "block"]

CAPACITY = 8


class DeferredEntropy:
    """Evaluates entropies in the order of their steps, beside the thread that asks for them.

    Parameters
    ----------
    capacity : int
        Evaluations that may wait at once; each takes the memory of its matrices (m x m float64 for each layer, m the
        smaller of samples and features), on the device and pinned on the host; on the CPU one may have copies of up to
        `MOST_COPIED` times that.
    on_full : {"drop", "block"}
        What to do with one more: drop and count it, or wait for room. On the CPU it always waits.
    device_of : callable, optional
        From checked activations to the `Ring` or `Host` that serves them, None for an evaluation in line. `in_line`
        evaluates all in line. Default: `Devices`.

    Examples
    --------
    >>> import torch
    >>> evaluations = DeferredEntropy()
    >>> h = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    >>> with evaluations.open(100) as evaluation:
    ...     evaluation.add("encoder", h)
    >>> evaluations.flush()
    True
    >>> [(step, results["encoder"].entropy.normalized) for step, results in evaluations.arrived()]
    [(100, 1.0)]
    >>> evaluations.close()
    """

    def __init__(
        self,
        *,
        capacity: int = CAPACITY,
        on_full: OnFull = "drop",
        device_of: Callable[[Tensor], Device | None] | None = None,
    ) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1; got {capacity}")
        if on_full not in get_args(OnFull):
            raise ValueError(f"on_full must be 'drop' or 'block'; got {on_full!r}")
        self._settings = {"capacity": capacity, "on_full": on_full, "device_of": device_of}
        self._capacity, self._on_full = capacity, on_full
        self._device_of = device_of or Devices().of
        self._ordered: deque[Evaluation] = deque()
        self._worker: Worker | None = None
        self._pid = os.getpid()
        self._device: Device | None = None  # the last one used
        self.clock = Clock()
        self.dropped = 0
        """Evaluations that found the ring full."""

    @property
    def pending(self) -> int:
        """Evaluations committed whose results have not been handed out."""
        return len(self._ordered)

    @property
    def has_room(self) -> bool:
        """Whether another evaluation may wait."""
        return self._worker is None or self._worker.unsolved < self._capacity

    def open(self, step: int, *, needs_room: bool = True) -> Evaluation | None:
        """Begin the evaluation of a step; use it in a ``with`` statement, which commits or discards it.

        Parameters
        ----------
        step : int
            What its results will be labelled with.
        needs_room : bool
            False if only known results will be `put` in, or moments, so that a full ring does not matter.

        Returns
        -------
        Evaluation or None
            None if the ring is full and the evaluation was dropped.

        Raises
        ------
        RuntimeError
            In a forked child of the process that has the worker.
        """
        self._check_process()
        if needs_room and self._worker is not None and not self.has_room:
            if self._on_full == "drop" and not (self._device and self._device.waits_when_full):
                self._drop(step)
                return None
            with self.clock.part("waiting"):
                self._worker.wait(self._capacity - 1)
        self.clock.begin(step)
        return Evaluation(step, self)

    def arrived(self) -> Iterator[tuple[int, Mapping[str, Evaluated]]]:
        """Hand out what is there, in the order of the commits: (step, results by layer). Never waits.

        Raises
        ------
        FailedEvaluation
            When the next one is an evaluation that failed in the worker, with its step; later ones are still to come.
        """
        if self._ordered:
            self._check_process()
        while self._ordered and self._ordered[0].done:
            evaluation = self._ordered.popleft()
            self.clock.add("worker", evaluation.worker_seconds)
            self.clock.add("forward", evaluation.device_forward)
            self.clock.add("covariance", evaluation.device_covariance)
            if evaluation.error is not None:
                raise FailedEvaluation(evaluation) from evaluation.error
            yield evaluation.step, evaluation.results

    def to_come(self) -> Iterator[tuple[int, Mapping[str, Evaluated], bool]]:
        """Show what `arrived` is still to hand out of what is there, and whether it failed."""
        for evaluation in self._ordered:
            if evaluation.error is not None:
                yield evaluation.step, FailedEvaluation(evaluation).results, True
            elif evaluation.done:
                yield evaluation.step, evaluation.results, False

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until all that was committed is there to be handed out.

        Parameters
        ----------
        timeout : float, optional
            Seconds; by default as long as it takes.

        Returns
        -------
        bool
            False if the time was up first.
        """
        if self._worker is None:
            return True
        self._check_process()
        with self.clock.part("waiting"):
            return self._worker.wait(0, timeout)

    def discard(self) -> None:
        """Wait for what was committed, and throw all results and errors away."""
        self.flush()
        self._ordered.clear()

    def close(self) -> None:
        """Flush and end the worker; results that are there can still be handed out. May be called again."""
        try:
            self.flush()
        finally:
            if self._worker is not None and os.getpid() == self._pid:
                self._worker.stop()
                self._worker = None

    def _commit(self, evaluation: Evaluation) -> None:
        if not evaluation.done:
            if self._worker is None:
                self._worker = Worker()
                weakref.finalize(self, self._worker.abandon)
            self._worker.submit(evaluation)
        self._ordered.append(evaluation)

    def _device_for(self, x: Tensor) -> Device | None:
        device = self._device_of(x)
        self._device = device or self._device
        return device

    def _stage(self, device: Device | None, x: Tensor, resolution: Resolution) -> Staged | None:
        if isinstance(device, Host):
            return device.stage(x, resolution, idle=self._worker is None or not self._worker.unsolved)
        return None if device is None else device.stage(x, resolution)

    def _drop(self, step: int) -> None:
        self.dropped += 1
        if self.dropped == 1:
            warn_user(
                f"the evaluation of step {step} was dropped: {self._capacity} are waiting for the device or "
                "for their eigenvalues; evaluate less often, or wait for room (on_full='block'). Further ones are "
                "counted (dropped) without a warning",
                RuntimeWarning,
            )

    def _check_process(self) -> None:
        if self._pid != os.getpid():
            if self._worker is not None:
                raise RuntimeError(
                    f"the worker of this deferred evaluation belongs to process {self._pid}, and a forked process "
                    "has no copy of it: make a new one (a new monitor) after the fork"
                )
            self._pid = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {"settings": self._settings, "dropped": self.dropped}  # what is under way stays here

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__init__(**state["settings"])  # type: ignore[misc]
        self.dropped = state["dropped"]
