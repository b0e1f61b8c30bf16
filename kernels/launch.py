"""Launches: tile sizes chosen from the shape of the input by a small table, and the memory that they write.

Neither the batch size, nor the strides, nor the dtype has a say: so the order of every sum, and with it (on one
device, by one compiler) every bit of the result, depends on the shape of one matrix and on nothing else.

Whoever evaluates again and again takes results and scratch memory once and hands them in: then no launch allocates
anything. The scratch memory belongs to one evaluation at a time, so each stream needs its own.

`bench/tune.py` makes the table; `fastent.kernels.compile` checks each entry ahead of time for spills, shared memory
and matrix instructions. No entry has been timed on a GPU yet (bench/NOTES.md).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Side = Literal["covariance", "gram"]

# No fused multiply-add outside the products: the bits then do not hang on what a compiler chooses to contract.
OPTIONS = {"enable_fp_fusion": False}
# Shares of the spread added at once.
GROUP = 256
# Programs to stay at or below when an axis is split: one wave on an H100 or H200 (132 multiprocessors).
_PROGRAMS = 128
# Shortest part of a split axis: four steps, so that the first load is paid back. Not timed yet.
_SHORTEST_PART = 64


@dataclass(frozen=True)
class Tile:
    """An output tile and the way to walk to it."""

    edge: int  # the output tile is edge x edge
    step: int  # rows (columns, on the Gram side) taken per iteration
    warps: int
    stages: int = 1  # the kernels prefetch by hand: the compiler's pipelining stays off
    means_first: bool = False  # column means from a launch of their own, so that the loop keeps no sums
    registers: int | None = (
        None  # of a thread; None: the assembler's choice, which may spill to fit one more block
    )


class Entry(NamedTuple):
    """One line of the launch table."""

    largest: int | None  # edge of the result up to which it serves; None: any
    tile: Tile


class Launch(NamedTuple):
    """One kernel launch, as the launcher runs it and as the ahead-of-time compiler sees it."""

    kernel: Any
    grid: tuple[int, int]
    args: tuple[Any, ...]
    options: dict[str, Any]

    def run(self) -> None:
        """Launch on the current device and stream."""
        self.kernel[self.grid](*self.args, **self.options)


# 32 x 32 gives a small matrix tiles to fill the chip. 64 x 64 with column sums in the loop spills at 4 warps, and at a
# step of 32 for strided input; without the sums 4 warps hold it, at two thirds of the shared-memory traffic: worth the
# launch for the means, which reads the input once, where there are many tiles. 128 x 128 spills under triton 3.6
# and 3.7 and for sm_80, on the Gram side everywhere (bench/NOTES.md).
TABLE: dict[Side, tuple[Entry, ...]] = {
    "covariance": (
        Entry(256, Tile(edge=32, step=16, warps=4)),
        Entry(1536, Tile(edge=64, step=16, warps=8, registers=255)),
        Entry(None, Tile(edge=64, step=16, warps=4, means_first=True, registers=255)),
    ),
    "gram": (
        Entry(256, Tile(edge=32, step=16, warps=4, registers=255)),
        Entry(None, Tile(edge=64, step=16, warps=8, registers=255)),
    ),
}


class Partition(NamedTuple):
    """How the lower triangle of an m x m product over a summed axis is cut up."""

    tile: Tile
    tiles: int  # tiles on and below the diagonal
    parts: int  # of the summed axis, each with its own partial sums
    chunk: int  # length of a part, a multiple of `tile.step`


def partition(side: Side, m: int, length: int) -> Partition:
    """Cut an m x m lower triangle, summed over `length` terms, into programs.

    Parameters
    ----------
    side : {"covariance", "gram"}
        Whose table.
    m : int
        Edge of the result: d on the covariance side, N on the Gram side.
    length : int
        Length of the summed axis: N on the covariance side, d on the Gram side.

    Returns
    -------
    Partition
        A function of (side, m, length) alone.
    """
    tile = next(tile for largest, tile in TABLE[side] if largest is None or m <= largest)
    across = -(-m // tile.edge)
    tiles = across * (across + 1) // 2
    # Entries without sums in the loop serve long products of many tiles, which a split could only slow down.
    wanted = 1 if tile.means_first else max(1, min(_PROGRAMS // tiles, length // _SHORTEST_PART))
    steps = -(-length // tile.step)
    chunk = -(-steps // wanted) * tile.step
    return Partition(tile, tiles, -(-length // chunk), chunk)


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
    counted: Tensor | None  # (batch, tiles) int64: parts that have left theirs, in all evaluations
    shares: Tensor | None  # (batch, tiles, 2) float64: what each tile adds to the spread
    arrived: Tensor | None  # (batch,) int64: tiles that have added theirs, in all evaluations

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
    cut = partition(side, m, length)
    edge = cut.tile.edge
    partial = sums = counted = shares = arrived = None
    if cut.parts > 1:
        partial = torch.empty((batch, cut.parts, cut.tiles, edge, edge), dtype=torch.float64, device=device)
        counted = torch.zeros((batch, cut.tiles), dtype=torch.int64, device=device)
        if side == "covariance":
            sums = torch.empty((batch, cut.parts, cut.tiles, 2, edge), dtype=torch.float64, device=device)
    if spread:
        shares = torch.empty((batch, cut.tiles, 2), dtype=torch.float64, device=device)
        arrived = torch.zeros(batch, dtype=torch.int64, device=device)
    return Workspace(partial, sums, counted, shares, arrived)


def strides(h: Tensor) -> tuple[int, int, int]:
    """Strides of `h` (n, d) or (batch, n, d) in elements: batch, row, column."""
    # A single matrix has no batch stride; 0 counts as aligned, so it does not cost a compilation of its own.
    return (0 if h.ndim == 2 or h.shape[0] == 1 else h.stride(0), h.stride(-2), h.stride(-1))


def memory_arguments(out: Output, work: Workspace) -> tuple[Any, ...]:
    """Arguments of a product for the sums of its parts and for its spread, where there are such."""
    stride = 0 if work.shares is None else work.shares.stride(0)
    return work.partial, work.counted, out.spread, work.shares, work.arrived, stride


def product_launch(kernel: Any, out: Output, cut: Partition, args: tuple[Any, ...]) -> Launch:
    """Return the launch of a product: one program for each tile, matrix and part."""
    tile = cut.tile
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "maxnreg": tile.registers, **OPTIONS}
    return Launch(kernel, (cut.tiles * out.lower.shape[0], cut.parts), args, options)
