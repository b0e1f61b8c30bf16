"""From a device's memory to the host's, without stopping the thread that trains.

A matrix that was formed in the training stream is copied on a side stream to a slot of pinned memory, and an event
says when it is there. Slots are used again: in the steady state nothing is allocated. Beside the matrix
goes what needs no eigenvalues: its trace, and the norms behind the participation ratio, from the device.

`Streams` is all that this asks of a device: `fastent.devices` asks CUDA, and a test may stand in for the device's
clock. Nothing here waits, except `Streams.solve`, which is for the worker.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from fastent.covariance import CenteredMatrix, centered_matrix

# Slots that wait for another use; with more than that, shapes no longer come back.
_MOST_FREE = 256


class Event(Protocol):
    """A point in a stream."""

    def query(self) -> bool:
        """Whether the stream has passed it. Never waits."""


class Streams(Protocol):
    """What a ring asks of a device: the stream that training uses now, and one beside it."""

    batched: bool

    def event(self) -> Event:
        """Make an event that is passed until it is recorded."""

    def pinned(self, *shape: int) -> Tensor:
        """Allocate float64 host memory that the device writes to by itself."""

    def aside(self, tensors: Sequence[Tensor]) -> AbstractContextManager[None]:
        """Queue what is done inside on the side stream, after all that training has queued so far.

        The memory of `tensors` is not used again before the side stream is done with them.
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
    source: Tensor | None  # the matrix on a device that could solve it
    batched: Streams | None  # whose `solve` takes it

    def ready(self) -> bool:
        """Whether `centered` has arrived. Never waits."""

    def moments(self) -> tuple[float, float] | None:
        """Trace and ``sum p^2`` as the device found them."""

    def release(self) -> None:
        """Give its memory back."""


class Device(Protocol):
    """Where activations lie, if their entropy is evaluated by the worker."""

    waits_when_full: bool

    def stage(self, x: Tensor) -> Staged | None:
        """Form the centred matrix of checked activations (n, d); None if they must be looked at in line."""


class Slot:
    """Pinned memory of one matrix; a `Staged` while it is in use.

    Parameters
    ----------
    ring : Ring
        Where it goes back to.
    streams : Streams
        The device.
    m, d : int
        Edge of the matrix, and features.
    """

    def __init__(self, ring: Ring, streams: Streams, m: int, d: int) -> None:
        self._ring = ring
        self._matrix, self._shift, self._delta = streams.pinned(m, m), streams.pinned(d), streams.pinned(d)
        self._moments = streams.pinned(3)
        self._event = streams.event()
        self.batched = streams if streams.batched else None
        self.source: Tensor | None = None
        self.centered: CenteredMatrix

    def fill(self, streams: Streams, centered: CenteredMatrix) -> None:
        """Queue the copies of a matrix on the device."""
        sources = (centered.matrix, centered.shift, centered.delta)
        with streams.aside(sources):
            moments = moments_of(centered.matrix)
            targets = (self._matrix, self._shift, self._delta, self._moments)
            for source, target in zip((*sources, moments), targets, strict=True):
                streams.copy(source, target)
            streams.record(self._event)
        self.source = centered.matrix if self.batched else None
        self.centered = dataclasses.replace(
            centered, matrix=self._matrix, shift=self._shift, delta=self._delta
        )

    def ready(self) -> bool:
        """Whether the copies have been made."""
        return self._event.query()

    def moments(self) -> tuple[float, float]:
        """Trace and ``sum p^2`` as the device found them."""
        trace, lower, diagonal = self._moments.tolist()
        return trace, 2.0 * lower * lower - diagonal * diagonal

    def release(self) -> None:
        """Give the slot back; a copy that is still queued is done before the next one, on the same stream."""
        self.source = None
        self._ring.give_back(self)


class Ring:
    """Slots of pinned memory for the matrices of one device.

    Parameters
    ----------
    streams : Streams
        The device.

    Attributes
    ----------
    allocated : int
        Slots that were ever allocated.
    """

    waits_when_full = False

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._free: dict[tuple[int, int], deque[Slot]] = {}
        self.allocated = 0

    def stage(self, x: Tensor) -> Staged:
        """Form the covariance (or Gram matrix) in the training stream and send it on its way."""
        centered = centered_matrix(x)
        m, d = centered.matrix.shape[-1], centered.d
        slot = self._take(m, d)
        try:
            slot.fill(self._streams, centered)
        except BaseException:
            slot.release()
            raise
        return slot

    def give_back(self, slot: Slot) -> None:
        """Keep a slot for another use. Called by the worker too."""
        m, d = slot._matrix.shape[-1], slot._shift.shape[-1]
        self._free.setdefault((m, d), deque()).append(slot)

    def _take(self, m: int, d: int) -> Slot:
        free = self._free.get((m, d))
        if free:
            return free.popleft()
        if sum(map(len, list(self._free.values()))) > _MOST_FREE:
            self._free = {}
        self.allocated += 1
        with torch.inference_mode(False):  # its memory is written to outside of inference mode too
            return Slot(self, self._streams, m, d)


def moments_of(matrix: Tensor) -> Tensor:
    """Trace, and over it the Frobenius norms of the lower triangle and the diagonal, shape (3,), on the device.

    ``sum p^2``, whose inverse is the participation ratio, is twice the square of the second less that of the
    third. Divided by the trace first, no square leaves float64's range.
    """
    lower = matrix.tril()
    diagonal = lower.diagonal()
    trace = diagonal.sum()
    lower /= trace
    return torch.stack((trace, torch.linalg.vector_norm(lower), torch.linalg.vector_norm(diagonal)))
