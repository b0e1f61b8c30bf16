# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-calls=False, disallow-untyped-decorators=False
"""Covariance of many columns in Gluon, where the layouts in registers and in shared memory are ours to choose.

The formula, the promises and the memory are those of `fastent.kernels.covariance` with the means first: lower
triangle, float64 sums, parts added in their order, the spread by the same launch. What differs is the way of a tile
through shared memory, which bounds that kernel (bench/NOTES.md):

- a thread holds two neighbouring columns of a row, 16 bytes as float64, so that eight lanes store 128 bytes in a row;
  of an input whose rows, not columns, lie next to each other it holds two rows of a column, and all is turned;
- the four values in a row that the lanes of a fragment read from each of four rows are swizzled past the other rows'.

So no store and no load meets another in a bank, whatever the dtype and the strides of the input: 384 wavefronts for
each 512 cycles of products, where the compiler's own layouts take up to 1,024. A layout moves values and orders no sum:
the bits do not depend on the strides.

Gluon is experimental: where a Triton lacks it, and under the interpreter, `fastent.kernels.launch` names other tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from .launch import last_to_come, tile_index

__all__ = ["covariance_kernel"]

# Rows and columns of the float64 product instruction: Triton 3.8 and 3.9 know 8x8x4 alone, and would take the fragments
# of 16x8x16 for it without a word.
INSTRUCTION = gl.constexpr([16, 8] if triton.__version__.startswith(("3.6.", "3.7.")) else [8, 8])


@gluon.jit
def add_spread(
    trace,
    squares,
    program,
    programs,
    batch,
    spread_ptr,  # (batch, 3) fp64 out
    shares_ptr,  # (batch, >= programs, 2) fp64
    shares_batch,  # elements from one matrix to the next
    arrived_ptr,  # (batch,) int64
    BLOCK: gl.constexpr,
):
    """Leave the share of `program`; the last of `programs` to do so writes the spread."""
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    shares_ptr += batch * shares_batch
    gl.store(shares_ptr + 2 * program, trace)
    gl.store(shares_ptr + 2 * program + 1, squares)
    if last_to_come(arrived_ptr + batch, programs):
        lane = gl.arange(0, BLOCK, layout=LANES)
        traces = gl.zeros([BLOCK], gl.float64, LANES)
        sums = gl.zeros([BLOCK], gl.float64, LANES)
        for first in range(0, programs, BLOCK):
            at = shares_ptr + 2 * (first + lane)
            mask = first + lane < programs
            # Not through the first-level cache, which may hold what another evaluation left here.
            traces += gl.load(at, mask=mask, other=0.0, cache_modifier=".cg")
            sums += gl.load(at + 1, mask=mask, other=0.0, cache_modifier=".cg")
        total = gl.sum(traces, axis=0)
        square = gl.sum(sums, axis=0)
        spread_ptr += 3 * batch
        gl.store(spread_ptr, total)
        gl.store(spread_ptr + 1, square)
        gl.store(spread_ptr + 2, total * total / square)


@gluon.jit(do_not_specialize=["n", "tiles", "chunk", "shares_batch"])
def covariance_kernel(
    h_ptr,  # (batch, n, d) fp16, bf16, fp32 or fp64, any strides
    lower_ptr,  # (batch, d, d) fp64 out
    centre_ptr,  # (batch, 3, d) fp64: shift, mean - shift, mean
    partial_ptr,  # see Workspace; None where there is one part
    counted_ptr,
    spread_ptr,  # (batch, 3) fp64 out; None: not wanted
    shares_ptr,  # see add_spread
    arrived_ptr,
    shares_batch,
    n,
    d,
    h_batch,
    h_row,
    h_col,
    tiles,
    chunk,  # rows of a part
    scale: tl.float64,  # of gl.float64 the launcher makes fp32
    EDGE: gl.constexpr,
    STEP: gl.constexpr,
    TURNED: gl.constexpr,  # rows lie next to each other in memory, columns do not
    BLOCK: gl.constexpr,
):
    """Sum the products of one part of one tile, and finish the tile if it is the last part to come."""
    WARPS: gl.constexpr = gl.num_warps()
    ORDER: gl.constexpr = [0, 1] if TURNED else [1, 0]
    VALUES: gl.constexpr = [2, 1] if TURNED else [1, 2]
    LANES: gl.constexpr = [STEP // 2, 64 // STEP] if TURNED else [1, 32]
    ACROSS: gl.constexpr = [1, WARPS] if TURNED else [WARPS, 1]
    LOADED: gl.constexpr = gl.BlockedLayout(VALUES, LANES, ACROSS, ORDER)
    SHARED: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 4, order=ORDER)
    PRODUCT: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [2, WARPS // 2], INSTRUCTION)
    LEFT: gl.constexpr = gl.DotOperandLayout(0, PRODUCT, 1)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, PRODUCT, 1)

    tile = gl.program_id(0) % tiles
    batch = (gl.program_id(0) // tiles).to(gl.int64)
    part = gl.program_id(1)
    parts = gl.num_programs(1)
    i, j = tile_index(tile)
    cols = gl.arange(0, EDGE, layout=gl.SliceLayout(0, LOADED))
    in_i = i * EDGE + cols < d
    in_j = j * EDGE + cols < d
    at_centre = centre_ptr + 3 * batch * d
    shift_i = gl.load(at_centre + i * EDGE + cols, mask=in_i, other=0.0)[None, :]
    shift_j = gl.load(at_centre + j * EDGE + cols, mask=in_j, other=0.0)[None, :]
    in_i = in_i[None, :]
    in_j = in_j[None, :]

    # Rows are counted from the start of the part: a part never has 2^31 of them.
    start = part.to(gl.int64) * chunk
    left = gl.minimum(n - start, chunk).to(gl.int32)
    rows = gl.arange(0, STEP, layout=gl.SliceLayout(1, LOADED))
    # Where a thread reads stays; where the step and the tile begin is the same for all threads and costs each nothing.
    within = rows.to(gl.int64)[:, None] * h_row + cols.to(gl.int64)[None, :] * h_col
    at = h_ptr + batch * h_batch + start * h_row
    at_i = at + (i * EDGE).to(gl.int64) * h_col
    at_j = at + (j * EDGE).to(gl.int64) * h_col
    stride = gl.to_tensor(STEP).to(gl.int64) * h_row
    live = (rows < left)[:, None]
    x_i = gl.load(at_i + within, mask=live & in_i, other=0.0)
    x_j = gl.load(at_j + within, mask=live & in_j, other=0.0)
    y_i = gl.allocate_shared_memory(gl.float64, [STEP, EDGE], SHARED)
    y_j = gl.allocate_shared_memory(gl.float64, [STEP, EDGE], SHARED)
    product = gl.zeros([EDGE, EDGE], gl.float64, PRODUCT)
    while left > 0:
        # Padding becomes 0 after the shift: before it, it would become -shift.
        y_i.store(gl.where(live, x_i.to(gl.float64) - shift_i, 0.0))
        y_j.store(gl.where(live, x_j.to(gl.float64) - shift_j, 0.0))
        # The next step is on its way while this one is multiplied.
        left -= STEP
        at_i += stride
        at_j += stride
        live = (rows < left)[:, None]
        x_i = gl.load(at_i + within, mask=live & in_i, other=0.0)
        x_j = gl.load(at_j + within, mask=live & in_j, other=0.0)
        product = mma_v2(y_i.permute((1, 0)).load(LEFT), y_j.load(RIGHT), product)

    rows_i = gl.arange(0, EDGE, layout=gl.SliceLayout(1, PRODUCT))
    cols_j = gl.arange(0, EDGE, layout=gl.SliceLayout(0, PRODUCT))
    last = True
    if partial_ptr is not None:
        at_part = partial_ptr + (batch * parts * tiles + tile) * EDGE * EDGE
        within_tile = rows_i[:, None] * EDGE + cols_j[None, :]
        next_part = gl.to_tensor(EDGE * EDGE).to(gl.int64) * tiles
        gl.store(at_part + part * next_part + within_tile, product)
        last = last_to_come(counted_ptr + batch * tiles + tile, parts)
    if last:
        if partial_ptr is not None:
            product = gl.zeros([EDGE, EDGE], gl.float64, PRODUCT)
            for _ in range(parts):
                # Not through the first-level cache, which may hold what another evaluation left here.
                product += gl.load(at_part + within_tile, cache_modifier=".cg")
                at_part += next_part
        rows_i += i * EDGE
        cols_j += j * EDGE
        in_rows = rows_i < d
        in_cols = cols_j < d
        delta_i = gl.load(at_centre + d + rows_i, mask=in_rows, other=0.0)
        delta_j = gl.load(at_centre + d + cols_j, mask=in_cols, other=0.0)
        # Symmetric in i and j, and no larger than the product: nothing overflows that need not.
        outer = (delta_i[:, None] * delta_j[None, :]) * n.to(gl.float64)
        inside = in_rows[:, None] & in_cols[None, :]
        result = (product - outer) * scale
        gl.store(lower_ptr + (batch * d + rows_i[:, None]) * d + cols_j[None, :], result, mask=inside)
        if spread_ptr is not None:
            result = gl.where(inside, result, 0.0)
            diagonal = gl.where(rows_i[:, None] == cols_j[None, :], result, 0.0)
            trace = gl.sum(gl.sum(diagonal, axis=0), axis=0)
            squares = gl.sum(gl.sum(result * result, axis=0), axis=0)
            # A tile below the diagonal stands for its mirror image too; those on it are whole.
            squares = gl.where(i == j, squares, 2.0 * squares)
            add_spread(
                trace, squares, tile, tiles, batch, spread_ptr, shares_ptr, shares_batch, arrived_ptr, BLOCK
            )
