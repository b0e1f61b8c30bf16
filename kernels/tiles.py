# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-calls=False, disallow-untyped-decorators=False
"""What the covariance and the Gram kernel share: tiles, exact shifts, sums in a fixed order, the end of a split.

Every sum has a fixed order. The products go through `tl.dot` step by step. Column sums are kept one for each
row of a step and folded by halves at the end: `tl.sum` would add in an order that follows the register
layout, and that follows the strides of the input. Where the summed axis is split, each part writes its
partial sums and a second launch adds them, in a fixed order too. No atomics.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, Plan, Side
from .memory import ELEMENTS, Output, Workspace, output, workspace
from .spread import add_spread

# No fused multiply-add outside the products: the bits then do not hang on what a compiler chooses to contract.
OPTIONS = {"enable_fp_fusion": False}
# Parts added at once where the parts of a split axis are added.
PARTS = 4
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


@triton.jit(do_not_specialize=["n", "m", "tiles", "parts", "shares_batch"])
def _finish_kernel(
    partial_ptr,  # (batch, parts, tiles, EDGE, EDGE) fp64
    sums_ptr,  # (batch, parts, m) fp64: sum of y; None on the Gram side, where nothing is left to subtract
    lower_ptr,  # (batch, m, m) fp64 out
    centre_ptr,  # (batch, 3, m) fp64: shift in; mean - shift and mean out; None on the Gram side
    spread_ptr,  # (batch, 3) fp64 out; None: not wanted
    shares_ptr,  # see add_spread
    arrived_ptr,
    shares_batch,
    n,
    m,
    tiles,
    parts,
    scale: tl.float64,
    EDGE: tl.constexpr,
    PARTS: tl.constexpr,
    ELEMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tile = tl.program_id(0) % tiles
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    i, j = tile_index(tile)
    element = tl.program_id(1) * ELEMENTS + tl.arange(0, ELEMENTS)
    row = i * EDGE + element // EDGE
    col = j * EDGE + element % EDGE
    inside = (row < m) & (col < m)
    group = tl.arange(0, PARTS)
    product = tl.zeros((PARTS, ELEMENTS), tl.float64)
    sum_i = tl.zeros((PARTS, ELEMENTS), tl.float64)
    sum_j = tl.zeros((PARTS, ELEMENTS), tl.float64)
    for first in range(0, parts, PARTS):
        part = (first + group)[:, None]
        mask = (part < parts) & inside[None, :]
        index = batch * parts + part
        at = partial_ptr + (index * tiles + tile) * EDGE * EDGE + element[None, :]
        product += tl.load(at, mask=mask, other=0.0)
        if sums_ptr is not None:
            sum_i += tl.load(sums_ptr + index * m + row[None, :], mask=mask, other=0.0)
            sum_j += tl.load(sums_ptr + index * m + col[None, :], mask=mask, other=0.0)
    result = fold(product, PARTS, ELEMENTS)
    if sums_ptr is not None:
        count = n.to(tl.float64)
        delta_i = fold(sum_i, PARTS, ELEMENTS) / count
        delta_j = fold(sum_j, PARTS, ELEMENTS) / count
        result -= (delta_i * delta_j) * count
        at_centre = centre_ptr + 3 * batch * m + row
        owner = inside & (row == col)
        shift = tl.load(at_centre, mask=owner, other=0.0)
        tl.store(at_centre + m, delta_i, mask=owner)
        tl.store(at_centre + 2 * m, shift + delta_i, mask=owner)
    result *= scale
    tl.store(lower_ptr + (batch * m + row) * m + col, result, mask=inside)
    if spread_ptr is not None:
        values = tl.where(inside, result, 0.0)
        squares = tl.sum(values * values, axis=0)
        add_spread(
            tl.sum(tl.where(row == col, values, 0.0), axis=0),
            tl.where(i == j, squares, 2.0 * squares),
            tile * tl.num_programs(1) + tl.program_id(1),
            tiles * tl.num_programs(1),
            batch,
            spread_ptr,
            shares_ptr,
            shares_batch,
            arrived_ptr,
            BLOCK,
        )


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


def spread_arguments(
    out: Output, work: Workspace, cut: Plan
) -> tuple[Tensor | None, Tensor | None, Tensor | None, int]:
    """Arguments of a product for its spread; of a part there is none yet."""
    if out.spread is None or cut.parts > 1:
        return None, None, None, 0
    assert work.shares is not None
    return out.spread, work.shares, work.arrived, work.shares.stride(0)


def product_launch(kernel: Any, out: Output, cut: Plan, args: tuple[Any, ...]) -> Launch:
    """Return the launch of a product: one program for each tile, matrix and part."""
    options = {"num_warps": cut.tile.warps, "num_stages": cut.tile.stages, **OPTIONS}
    return Launch(kernel, (cut.tiles * out.lower.shape[0], cut.parts), args, options)


def finish_launch(
    out: Output, work: Workspace, centre: Tensor | None, n: int, cut: Plan, scale: float
) -> Launch:
    """Return the launch that adds the parts of a product and writes `out`; `centre` on the covariance side."""
    batch, m = out.lower.shape[:2]
    edge = cut.tile.edge
    spread = spread_arguments(out, work, cut._replace(parts=1))
    shape = (n, m, cut.tiles, cut.parts, scale, edge, PARTS, ELEMENTS, GROUP)
    args = (work.partial, work.sums, out.lower, centre, *spread, *shape)
    grid = (cut.tiles * batch, edge * edge // ELEMENTS)
    return Launch(_finish_kernel, grid, args, {"num_warps": 4, "num_stages": 1, **OPTIONS})
