# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-calls=False, disallow-untyped-decorators=False
"""What the covariance and the Gram kernel share: tiles, exact shifts, sums in a fixed order, the end of a split.

Every sum has a fixed order. The products go through `tl.dot` step by step. Column sums are kept one for each
row of a step and folded by halves at the end: `tl.sum` would add in an order that follows the register
layout, and that follows the strides of the input. Where the summed axis is split, each part leaves its sums in
memory and the last one of its tile to come adds them all, in the order of the parts. The only atomic is the count of
those that have come, an integer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, Plan, Side
from .memory import Output, Workspace, output, workspace

# No fused multiply-add outside the products: the bits then do not hang on what a compiler chooses to contract.
OPTIONS = {"enable_fp_fusion": False}
# Shares of the spread added at once.
GROUP = 256


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
def fold(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sum over the rows of x (ROWS, COLUMNS), halves onto each other: the same order in every layout."""
    LEVELS: tl.constexpr = ROWS.bit_length() - 2
    for level in tl.static_range(LEVELS):
        halves = tl.permute(tl.reshape(x, (2, ROWS >> (level + 1), COLUMNS)), (1, 2, 0))
        first, second = tl.split(halves)
        x = first + second
    return tl.sum(x, axis=0)  # two rows are left, and two terms have one order


@triton.jit
def widen(x):
    """16-bit values as float32, exactly: triton 3.6 and 3.7 cannot trace a float64 dot to a 16-bit value."""
    if x.dtype.primitive_bitwidth < 32:
        x = x.to(tl.float32)
    return x


@triton.jit
def column_shift(h_ptr, n, cols, h_row, h_col, mask):
    """Median of the first, middle and last entry of the columns."""
    first = h_ptr + cols.to(tl.int64) * h_col
    a = tl.load(first, mask=mask, other=0.0).to(tl.float64)
    b = tl.load(first + (n // 2).to(tl.int64) * h_row, mask=mask, other=0.0).to(tl.float64)
    c = tl.load(first + (n - 1).to(tl.int64) * h_row, mask=mask, other=0.0).to(tl.float64)
    median = tl.maximum(tl.minimum(a, b), tl.minimum(tl.maximum(a, b), c))
    # A maximum over one row changes nothing, but stops triton 3.6 and 3.7 at it (see widen).
    return tl.max(median[None, :], axis=0)


@triton.jit
def leave_part(product, tile, tiles, batch, part, parts, partial_ptr, counted_ptr, EDGE: tl.constexpr):
    """Store the product of one part and count it; whether it was the last of its tile to come.

    What the program stored before goes with it: release and acquire at the scope of the device, so whoever sees all
    others counted sees their stores. The count is set back to 0 for the next evaluation.
    """
    r = tl.arange(0, EDGE)
    at = partial_ptr + ((batch * parts + part) * tiles + tile) * EDGE * EDGE
    tl.store(at + r[:, None] * EDGE + r[None, :], product)
    tl.debug_barrier()
    counter = counted_ptr + batch * tiles + tile
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == parts - 1
    tl.debug_barrier()
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def add_parts(tile, tiles, batch, parts, partial_ptr, EDGE: tl.constexpr):
    """Sum of the products of all parts of a tile, in the order of the parts, not of their arrival."""
    # Parts that are under way at once; more spill under triton 3.6 and 3.7 for sm_80 (bench/NOTES.md).
    AHEAD: tl.constexpr = 128 // EDGE
    r = tl.arange(0, EDGE)
    at = partial_ptr + (batch * parts * tiles + tile) * EDGE * EDGE + r[:, None] * EDGE + r[None, :]
    total = tl.zeros((EDGE, EDGE), tl.float64)
    stride = tl.full((), EDGE * EDGE, tl.int64) * tiles
    part = tl.zeros((1, 1), tl.int32)
    for _ in range(0, parts, AHEAD):
        # Unrolled, so that the loads need not wait for the additions; these stay in order.
        for _ in tl.static_range(AHEAD):
            # Not through the first-level cache, which may hold what another evaluation left here.
            total += tl.load(at, mask=part < parts, other=0.0, cache_modifier=".cg")
            at += stride
            part += 1
    return total


def run(
    side: Side,
    launches: Callable[[Tensor, Output, Workspace, float], list[Launch]],
    h: Tensor,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """Take memory for the matrices of `h` (without a spread), run the launches; return triangles and centres."""
    n, d = h.shape[-2:]
    batch = h.shape[0] if h.ndim == 3 else 1
    out = output(side, batch, n, d, h.device, spread=False)
    work = workspace(side, batch, n, d, h.device, spread=False)
    with torch.cuda.device_of(h):  # Triton launches on the current device
        for launch in launches(h, out, work, 1.0 / n if scale is None else scale):
            launch.run()
    return (out.lower, out.centre) if h.ndim == 3 else (out.lower[0], out.centre[0])


def strides(h: Tensor) -> tuple[int, int, int]:
    """Strides of `h` (n, d) or (batch, n, d) in elements: batch, row, column."""
    # A single matrix has no batch stride; 0 counts as aligned, so it does not cost a compilation of its own.
    return (0 if h.ndim == 2 or h.shape[0] == 1 else h.stride(0), h.stride(-2), h.stride(-1))


def memory_arguments(out: Output, work: Workspace) -> tuple[Any, ...]:
    """Arguments of a product for the sums of its parts and for its spread, where there are such."""
    stride = 0 if work.shares is None else work.shares.stride(0)
    return work.partial, work.counted, out.spread, work.shares, work.arrived, stride


def product_launch(kernel: Any, out: Output, cut: Plan, args: tuple[Any, ...]) -> Launch:
    """Return the launch of a product: one program for each tile, matrix and part."""
    tile = cut.tile
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "maxnreg": tile.registers, **OPTIONS}
    return Launch(kernel, (cut.tiles * out.lower.shape[0], cut.parts), args, options)
