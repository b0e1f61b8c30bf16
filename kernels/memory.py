"""What the launches write: results, and the scratch memory between them.

Whoever evaluates again and again takes both once and hands them in: then no launch allocates anything. The scratch
memory belongs to one evaluation at a time, so each stream needs its own.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from .launch import Side, plan


class Output(NamedTuple):
    """Results of one evaluation, all float64 and contiguous."""

    lower: Tensor  # (batch, m, m): the lower triangle; what stands above the diagonal has no meaning
    centre: Tensor  # (batch, 3, d): shift, mean - shift, mean
    spread: Tensor | None  # (batch, 3): trace, sum of squares of all entries, participation ratio
    block: Tensor  # the memory of them all, in one piece: one copy takes it elsewhere

    def nbytes(self) -> int:
        """Bytes of memory."""
        return self.block.nbytes


class Workspace(NamedTuple):
    """Scratch memory of one evaluation at a time."""

    partial: Tensor | None  # (batch, parts, tiles, edge, edge) float64, where the summed axis is split
    sums: Tensor | None  # (batch, parts, tiles, 2, edge) float64, the same on the covariance side
    counted: Tensor | None  # (batch, tiles) int32, all 0 between evaluations: parts that have left theirs
    shares: Tensor | None  # (batch, tiles, 2) float64: what each tile adds to the spread
    arrived: Tensor | None  # (batch,) int32, all 0 between evaluations: tiles that have added theirs

    def nbytes(self) -> int:
        """Bytes of memory."""
        return sum(tensor.nbytes for tensor in self if tensor is not None)


def output(side: Side, batch: int, n: int, d: int, device: torch.device, *, spread: bool) -> Output:
    """Take memory for one result."""
    m = d if side == "covariance" else n
    shapes = [(batch, m, m), (batch, 3, d), (batch, 3)][: 3 if spread else 2]
    # Each starts at a multiple of 16 bytes: Triton compiles other code for memory that is not so aligned.
    ends = list(itertools.accumulate(math.prod(shape) + math.prod(shape) % 2 for shape in shapes))
    block = torch.empty(ends[-1], dtype=torch.float64, device=device)
    lower, centre, *rest = (
        block[start : start + math.prod(shape)].view(shape)
        for start, shape in zip([0, *ends], shapes, strict=False)
    )
    return Output(lower, centre, rest[0] if rest else None, block)


def workspace(side: Side, batch: int, n: int, d: int, device: torch.device, *, spread: bool) -> Workspace:
    """Take the scratch memory of an evaluation, for any dtype and strides."""
    m, length = (d, n) if side == "covariance" else (n, d)
    cut = plan(side, m, length)
    edge = cut.tile.edge
    partial = sums = counted = shares = arrived = None
    if cut.parts > 1:
        partial = torch.empty((batch, cut.parts, cut.tiles, edge, edge), dtype=torch.float64, device=device)
        counted = torch.zeros((batch, cut.tiles), dtype=torch.int32, device=device)
        if side == "covariance":
            sums = torch.empty((batch, cut.parts, cut.tiles, 2, edge), dtype=torch.float64, device=device)
    if spread:
        shares = torch.empty((batch, cut.tiles, 2), dtype=torch.float64, device=device)
        arrived = torch.zeros(batch, dtype=torch.int32, device=device)
    return Workspace(partial, sums, counted, shares, arrived)
