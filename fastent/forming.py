"""The covariance (or Gram matrix) of one evaluation, its mean and its participation ratio, formed on the device.

`KernelFormer` runs our kernels into memory that was taken once: one or two launches, and
nothing is allocated. `TorchFormer` is for devices without them. Neither asks the device for anything.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastent.covariance import centered_matrix

if TYPE_CHECKING:
    from fastent.kernels.resident import ResidentCovariance

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
