"""Tile sizes and launch shapes, chosen from the shape of the input by a small table.

Neither the batch size, nor the strides, nor the dtype has a say: so the order of every sum, and with it (on one
device, by one compiler) every bit of the result, depends on the shape of one matrix and on nothing else.

`bench/tune.py` makes the table; `fastent.kernels.compile` checks each entry ahead of time for spills, shared memory
and matrix instructions. No entry has been timed on a GPU yet (bench/NOTES.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

Side = Literal["covariance", "gram"]

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


class Plan(NamedTuple):
    """How the lower triangle of an m x m product over a summed axis is cut up."""

    tile: Tile
    tiles: int  # tiles on and below the diagonal
    parts: int  # of the summed axis, each with its own partial sums
    chunk: int  # length of a part, a multiple of `tile.step`


def plan(side: Side, m: int, length: int) -> Plan:
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
    Plan
        A function of (side, m, length) alone.
    """
    tile = next(tile for largest, tile in TABLE[side] if largest is None or m <= largest)
    across = -(-m // tile.edge)
    tiles = across * (across + 1) // 2
    # Entries without sums in the loop serve long products of many tiles, which a split could only slow down.
    wanted = 1 if tile.means_first else max(1, min(_PROGRAMS // tiles, length // _SHORTEST_PART))
    steps = -(-length // tile.step)
    chunk = -(-steps // wanted) * tile.step
    return Plan(tile, tiles, -(-length // chunk), chunk)
