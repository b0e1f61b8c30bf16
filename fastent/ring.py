"""From a device's memory to the host's, without stopping the thread that trains.

A slot holds the memory of one matrix on both sides: what is formed in the training stream is copied on a side stream
to pinned memory, and an event says when it is there. Slots are used again: in the steady state nothing is allocated.
Beside the matrix goes what needs no eigenvalues: its trace and participation ratio, from the device.

`Streams` is all that this asks of a device: `fastent.devices` asks CUDA, and a test may stand in for the device's
clock. Nothing here waits, except `Streams.solve`, which is for the worker.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from fastent.covariance import CenteredMatrix, Side
from fastent.forming import Formed, Former
from fastent.rounding import Resolution

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
