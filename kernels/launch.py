# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False
"""Launches: tile sizes chosen from the shape of the input by a small table, and the memory that they write.

Neither the batch size, nor the strides, nor the dtype has a say: so the order of every sum, and with it (on one
device, by one compiler) every bit of the result, depends on the shape of one matrix and on nothing else.

Whoever evaluates again and again takes results and scratch memory once and hands them in: then no launch allocates
anything. The scratch memory belongs to one evaluation at a time, so each stream needs its own.

`bench/tune.py` makes the table; `fastent.kernels.compile` checks each entry ahead of time for spills, shared memory
and matrix instructions. No entry has been timed on a GPU yet (bench/NOTES.md).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

Side = Literal["covariance", "gram"]

# No fused multiply-add outside the products: the bits then do not hang on what a compiler chooses to contract.
OPTIONS = {"enable_fp_fusion": False}
# Shares of the spread added at once.
GROUP = 256
# Of the chip that a split is to fill, an H100 or H200. Any other gets the same split: the bits are the shape's alone.
MULTIPROCESSORS = 132
# Steps of the loop that take as long as what a program of a split does beside it (folding, storing, counting itself);
# parts that are added in the time of one step. Estimates from the machine code (bench/NOTES.md), not timed.
_BESIDE, _ADDED = 4, 3
# Bytes of partial sums that a split of a matrix may take, and all matrices of a call to the plain functions at once.
MOST_PARTIAL = 64 * 2**20
# What a thread can have.
_MOST_REGISTERS = 255


@dataclass(frozen=True)
class Tile:
    """An output tile and the way to walk to it."""

    edge: int  # the output tile is edge x edge
    step: int  # rows (columns, on the Gram side) taken per iteration
    warps: int
    blocks: int  # programs that a multiprocessor holds at once, by their registers, with the dtype that takes most
    stages: int = 1  # the kernels prefetch by hand: the compiler's pipelining stays off
    means_first: bool = False  # column means from a launch of their own, so that the loop keeps no sums
    gluon: bool = False  # by `fastent.kernels.gluon`, which takes the means first
    # Of a thread, at most. None: the assembler chooses, which may spill to fit one more block (see product_launch).
    registers: int | None = None

    @property
    def ahead(self) -> int:
        """Parts under way at once when they are added: 64 registers of a thread; more spill (bench/NOTES.md)."""
        return max(1, 1024 * self.warps // self.edge**2)


class Entry(NamedTuple):
    """One line of the launch table."""

    largest: int | None  # edge of the result up to which it serves; None: any
    tile: Tile


class Again(NamedTuple):
    """A launch that was made before, for other activations: nothing is left to find out or to compile."""

    start: Callable[..., None]  # hands its arguments to the driver
    rest: tuple[Any, ...]  # those after the address of the activations; tensors as addresses

    def run(self, address: int) -> None:
        """Launch for activations at `address`, on the device it was made for and the current stream."""
        self.start(address, *self.rest)


class Launch(NamedTuple):
    """One kernel launch, as the launcher runs it and as the ahead-of-time compiler sees it."""

    kernel: Any
    grid: tuple[int, int]
    args: tuple[Any, ...]  # the activations first
    options: dict[str, Any]

    def run(self) -> Again | None:
        """Launch on the current device and stream; return what does so again, None from the interpreter."""
        compiled = self.kernel[self.grid](*self.args, **self.options)
        if compiled is None:
            return None
        rest = tuple(arg.data_ptr() if isinstance(arg, Tensor) else arg for arg in self.args[1:])
        return Again(compiled[(*self.grid, 1)], rest)


# Versions whose code was run (tests/kernels/test_gluon.py). Another may take the fragments of a product for those of
# another instruction and multiply other values without a word, as 3.8 does with those of 3.7.
_GLUON_VERSIONS = ("3.6.", "3.7.", "3.8.", "3.9.")


def gluon_is_here() -> bool:
    """Whether this Triton has what `fastent.kernels.gluon` is made of, and compiles it: it interprets no Gluon."""
    if not triton.__version__.startswith(_GLUON_VERSIONS):
        return False
    try:
        from triton.experimental.gluon.language.nvidia.ampere import mma_v2  # noqa: F401
    except ImportError:  # experimental: no version has promised it
        return False
    return not triton.knobs.runtime.interpret


# 32 x 32 gives a small matrix tiles to fill the chip. 64 x 64 with column sums in the loop spills at 4 warps, and at a
# step of 32 for strided input; without the sums 4 warps hold it: worth the launch for the means, which reads the input
# once, where there are many tiles. In Gluon that is from 513 columns on; without it the sums stay in the loop up to
# 1,536, since the compiler's layouts make of 4 warps no more than of 8. 128 x 128 spills, in Gluon for all but
# contiguous 16-bit and float32 input, and leaves more of the last wave empty (bench/NOTES.md).
_SMALL = Entry(256, Tile(edge=32, step=16, warps=4, blocks=3))
_SUMS = Tile(edge=64, step=16, warps=8, blocks=1, registers=255)
_LARGE = Tile(edge=64, step=16, warps=4, blocks=2, means_first=True, registers=255)
IN_GLUON = (_SMALL, Entry(512, _SUMS), Entry(None, dataclasses.replace(_LARGE, gluon=True)))
IN_TRITON = (_SMALL, Entry(1536, _SUMS), Entry(None, _LARGE))
"""The covariance's entries with Gluon and without it."""

TABLE: dict[Side, tuple[Entry, ...]] = {
    "covariance": IN_GLUON if gluon_is_here() else IN_TRITON,
    "gram": (
        Entry(256, Tile(edge=32, step=16, warps=4, blocks=3, registers=255)),
        Entry(None, Tile(edge=64, step=16, warps=8, blocks=1, registers=255)),
    ),
}


# The column means: a program takes 128 rows of 32 columns at once.
_MEANS = Tile(edge=32, step=128, warps=8, blocks=3)


class Partition(NamedTuple):
    """How a result and the axis summed over are cut up."""

    tile: Tile
    tiles: int  # of the result: of a matrix those on and below the diagonal
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
    most = max(1, MOST_PARTIAL // (8 * tiles * tile.edge**2))
    parts, steps = split(tiles, -(-length // tile.step), tile.blocks, most)
    return Partition(tile, tiles, parts, steps * tile.step)


def at_once(side: Side, m: int, length: int) -> int | None:
    """Matrices of which the partial sums are within `MOST_PARTIAL`, one at least; None: any, there are no such sums."""
    tile, tiles, parts, _ = partition(side, m, length)
    return None if parts == 1 else max(1, MOST_PARTIAL // (8 * parts * tiles * tile.edge**2))


def means_partition(n: int, d: int) -> Partition:
    """Cut the column means of (n, d) into programs: blocks of columns, and parts of the rows."""
    blocks = -(-d // _MEANS.edge)
    parts, steps = split(blocks, -(-n // _MEANS.step), _MEANS.blocks, n)
    return Partition(_MEANS, blocks, parts, steps * _MEANS.step)


@functools.cache
def split(programs: int, steps: int, blocks: int, most: int) -> tuple[int, int]:
    """Split a walk that each of some programs makes into the parts that take the least time by a model.

    Each wave of programs that fill the chip takes the walk of a part and what is done beside it; in the end the last
    one to come adds all parts. So there is a split where filling the last wave, or a shorter walk, saves more than
    it costs.

    Parameters
    ----------
    programs : int
        Programs without a split.
    steps : int
        Length of the whole walk.
    blocks : int
        Programs that a multiprocessor holds at once.
    most : int
        Parts at most.

    Returns
    -------
    parts, steps : int
        Parts, none of them empty, and steps of each (of the last: at most).
    """
    wave = MULTIPROCESSORS * blocks
    best = (_ADDED * -(-programs // wave) * steps, 1, steps)
    for wanted in range(2, min(most, steps) + 1):
        if wanted >= best[0]:
            break
        walk = -(-steps // wanted)
        parts = -(-steps // walk)
        waves = -(-programs * parts // wave)
        best = min(best, (_ADDED * waves * (walk + _BESIDE) + parts, parts, walk))
    return best[1:]


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
    sums: Tensor | None  # (batch, parts, tiles, 2, edge) float64, the same where the product sums columns too
    counted: Tensor | None  # (batch, tiles) int64: parts that have left theirs, in all evaluations
    shares: Tensor | None  # (batch, tiles, 2) float64: what each tile adds to the spread
    arrived: Tensor | None  # (batch,) int64: tiles that have added theirs, in all evaluations
    mean_sums: Tensor | None  # (batch, parts, blocks, columns) float64, where the means come first, in parts
    mean_counted: Tensor | None  # (batch, blocks) int64: as counted

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
    cut = partition(side, *((d, n) if side == "covariance" else (n, d)))
    tile, means_first = cut.tile, side == "gram" or cut.tile.means_first
    floats = functools.partial(torch.empty, dtype=torch.float64, device=device)
    counters = functools.partial(torch.zeros, dtype=torch.int64, device=device)
    partial = sums = counted = shares = arrived = mean_sums = mean_counted = None
    if cut.parts > 1:
        partial = floats((batch, cut.parts, cut.tiles, tile.edge, tile.edge))
        counted = counters((batch, cut.tiles))
        if not means_first:
            sums = floats((batch, cut.parts, cut.tiles, 2, tile.edge))
    if spread:
        shares = floats((batch, cut.tiles, 2))
        arrived = counters(batch)
    if means_first and (means := means_partition(n, d)).parts > 1:
        mean_sums = floats((batch, means.parts, means.tiles, means.tile.edge))
        mean_counted = counters((batch, means.tiles))
    return Workspace(partial, sums, counted, shares, arrived, mean_sums, mean_counted)


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
    tile, h = cut.tile, args[0]
    # Columns apart take so many registers for their addresses that the assembler's choice spills.
    registers = tile.registers or (None if h.stride(-1) == 1 else _MOST_REGISTERS)
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "maxnreg": registers, **OPTIONS}
    return Launch(kernel, (cut.tiles * out.lower.shape[0], cut.parts), args, options)


@triton.jit
def tile_index(tile):
    """Row and column of a tile from its number, counted along the rows of a lower triangle."""
    i = 0
    j = tile
    while j > i:  # exact for any number, where a float square root is not
        j -= i + 1
        i += 1
    return i, j


@triton.jit
def last_to_come(counter_ptr, programs):
    """Count this program at a counter; whether it is the last of the `programs` of one launch that come there.

    What the program stored before goes with it: release and acquire at the scope of the device, so whoever sees all
    others counted sees their stores. The counter (int64, which no device fills) is never set back: a launch adds
    `programs` to it, whatever the order. Two launches that overlap, which they must not, so spoil their own
    results and none after; arrivals between a last count and a reset would be lost for good.
    """
    tl.debug_barrier()
    before = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
    tl.debug_barrier()
    return before % programs == programs - 1
