# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-calls=False, disallow-untyped-decorators=False
"""Centred covariance and Gram matrix in float64, lower triangle, of fp16, bf16, fp32 or fp64 activations.

**Covariance**, in one pass. With the shifted rows ``y_n = h_n - shift`` it accumulates ``S = sum y y^T`` and
``s = sum y`` together and writes ``C = (S - s s^T / N) * scale``. Each tile is cast on its way in: there is no float64
copy of the input. The shift of a column is the median of its first, middle and last entry. The error of one pass grows
as ``(shift - mean)^2 / variance``: at most N - 1 for any entry (Samuelson's inequality), and that much where the
entry is a lone outlier, as row 0 can be (the first token of a language model). The median of three is not one,
and it is an entry of the column all the same: constant columns give exactly 0. Where the table says so
(`Tile.means_first`), ``s`` comes from a launch of its own and the loop sums products alone: the same formula, in a loop
with fewer registers and so fewer warps to a tile.

**Gram matrix**, the smaller side when N < d: ``G = Z Z^T * scale`` with ``z_n = (h_n - shift) - mean(h - shift)``.
Centring needs every row before the first product, and correcting afterwards would need the row sums of all of G;
so the means come from a launch of their own: small beside the product, and the result has the accuracy of two passes.

**Spread**: trace, sum of squares and participation ratio by the same launch. ``(sum l)^2 / sum l^2`` of the eigenvalues
l is ``tr(C)^2 / |C|_F^2``: exact, without an eigensolve, and small enough to log at every step. Where the squares leave
float64's range (entries near 1e154 or 1e-162) the ratio is not finite or 0; constant rows give 0 / 0, NaN. The entropy
path says which (`fastent.Status`).

Every sum has a fixed order. The products go through `tl.dot` step by step. Column sums are kept one for each
row of a step and folded by halves at the end: `tl.sum` would add in an order that follows the register
layout, and that follows the strides of the input. Where the summed axis is split, each part leaves its sums in
memory and the last one of its tile to come adds them all, in the order of the parts; so does the last tile with the
shares of the spread. The only atomics are the counts of those that have come, integers.

Only the lower triangle is meaningful: tiles above the diagonal are never written. NaN and Inf come through to
the diagonal. Nothing is checked here: see `fastent.activations`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import (
    GROUP,
    OPTIONS,
    Again,
    Launch,
    Output,
    Side,
    Workspace,
    at_once,
    gluon_is_here,
    last_to_come,
    means_partition,
    memory_arguments,
    output,
    partition,
    product_launch,
    strides,
    tile_index,
    workspace,
)

if gluon_is_here():
    from .gluon import covariance_kernel as gluon_kernel

__all__ = ["LAUNCHES", "ResidentCovariance", "covariance", "gram", "shifted_covariance"]


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
    """Store the product of one part and count it; whether it was the last of its tile to come."""
    r = tl.arange(0, EDGE)
    at = partial_ptr + ((batch * parts + part) * tiles + tile) * EDGE * EDGE
    tl.store(at + r[:, None] * EDGE + r[None, :], product)
    return last_to_come(counted_ptr + batch * tiles + tile, parts)


@triton.jit
def add_parts(tile, tiles, batch, parts, partial_ptr, sums_ptr, EDGE: tl.constexpr, AHEAD: tl.constexpr):
    """Add up all parts of a tile, in the order of the parts, not of their arrival.

    The products, and where there is `sums_ptr` the column sums: for the rows of the tile, and for its columns.
    """
    r = tl.arange(0, EDGE)
    at = partial_ptr + (batch * parts * tiles + tile) * EDGE * EDGE + r[:, None] * EDGE + r[None, :]
    total = tl.zeros((EDGE, EDGE), tl.float64)
    total_i = tl.zeros((EDGE,), tl.float64)
    total_j = tl.zeros((EDGE,), tl.float64)
    if sums_ptr is not None:
        at_sums = sums_ptr + (batch * parts * tiles + tile) * 2 * EDGE + r
    stride = tl.full((), EDGE * EDGE, tl.int64) * tiles
    part = tl.zeros((1,), tl.int32)
    for _ in range(0, parts, AHEAD):
        # Unrolled, so that the loads need not wait for the additions; these stay in order.
        for _ in tl.static_range(AHEAD):
            # Not through the first-level cache, which may hold what another evaluation left here.
            total += tl.load(at, mask=(part < parts)[:, None], other=0.0, cache_modifier=".cg")
            if sums_ptr is not None:
                total_i += tl.load(at_sums, mask=part < parts, other=0.0, cache_modifier=".cg")
                total_j += tl.load(at_sums + EDGE, mask=part < parts, other=0.0, cache_modifier=".cg")
                at_sums += tiles * 2 * EDGE
            at += stride
            part += 1
    return total, total_i, total_j


@triton.jit
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
    BLOCK: tl.constexpr,
):
    """Leave the share of `program`; the last of `programs` to do so writes the spread."""
    shares_ptr += batch * shares_batch
    tl.store(shares_ptr + 2 * program, trace)
    tl.store(shares_ptr + 2 * program + 1, squares)
    if last_to_come(arrived_ptr + batch, programs):
        lane = tl.arange(0, BLOCK)
        traces = tl.zeros((BLOCK,), tl.float64)
        sums = tl.zeros((BLOCK,), tl.float64)
        for first in range(0, programs, BLOCK):
            at = shares_ptr + 2 * (first + lane)
            mask = first + lane < programs
            # Not through the first-level cache, which may hold what another evaluation left here.
            traces += tl.load(at, mask=mask, other=0.0, cache_modifier=".cg")
            sums += tl.load(at + 1, mask=mask, other=0.0, cache_modifier=".cg")
        total = tl.sum(traces, axis=0)
        square = tl.sum(sums, axis=0)
        spread_ptr += 3 * batch
        tl.store(spread_ptr, total)
        tl.store(spread_ptr + 1, square)
        tl.store(spread_ptr + 2, total * total / square)


@triton.jit
def tile_shares(values, i, j, rows, cols):
    """Contribution of a tile of the lower triangle, 0 outside the matrix, to trace and sum of squares.

    `tl.sum` is in order here: the layout of a product follows from the tile, not from the strides of the input.
    """
    trace = tl.sum(tl.sum(tl.where(rows[:, None] == cols[None, :], values, 0.0), axis=0), axis=0)
    squares = tl.sum(tl.sum(values * values, axis=0), axis=0)
    # A tile below the diagonal stands for its mirror image too; those on it are whole.
    return trace, tl.where(i == j, squares, 2.0 * squares)


@triton.jit(do_not_specialize=["n", "blocks", "chunk"])
def _mean_kernel(
    h_ptr,  # (batch, n, d) fp16, bf16, fp32 or fp64, any strides
    centre_ptr,  # (batch, 3, d) fp64 out: shift, mean - shift, mean
    sums_ptr,  # see Workspace; None where there is one part
    counted_ptr,
    n,
    d,
    h_batch,
    h_row,
    h_col,
    blocks,  # blocks of columns
    chunk,  # rows of a part
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    block = tl.program_id(0) % blocks
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    part = tl.program_id(1)
    parts = tl.num_programs(1)
    lane = tl.arange(0, COLUMNS)
    cols = block * COLUMNS + lane
    inside = cols < d
    h_ptr += batch * h_batch
    shift = column_shift(h_ptr, n, cols, h_row, h_col, inside)
    # Rows are counted from the start of the part: a part never has 2^31 of them.
    start = part.to(tl.int64) * chunk
    length = tl.minimum(n - start, chunk).to(tl.int32)
    rows = tl.arange(0, ROWS)
    at = h_ptr + start * h_row + rows.to(tl.int64)[:, None] * h_row + cols.to(tl.int64)[None, :] * h_col
    stride = tl.full((), ROWS, tl.int64) * h_row
    sums = tl.zeros((ROWS, COLUMNS), tl.float64)
    for _ in range(0, length, ROWS):
        live = (rows < length)[:, None]
        x = tl.load(at, mask=live & inside[None, :], other=0.0).to(tl.float64)
        sums += tl.where(live, x - shift[None, :], 0.0)
        rows += ROWS
        at += stride
    total = fold(sums, ROWS, COLUMNS)
    last = True
    if sums_ptr is not None:
        at_sums = sums_ptr + (batch * parts * blocks + block) * COLUMNS + lane
        tl.store(at_sums + part.to(tl.int64) * blocks * COLUMNS, total)
        last = last_to_come(counted_ptr + batch * blocks + block, parts)
    if last:
        if sums_ptr is not None:
            total = tl.zeros((COLUMNS,), tl.float64)
            other = tl.zeros((1,), tl.int32)
            for _ in range(0, parts, 8):
                for _ in tl.static_range(8):  # see add_parts
                    total += tl.load(at_sums, mask=other < parts, other=0.0, cache_modifier=".cg")
                    at_sums += blocks * COLUMNS
                    other += 1
        delta = total / n.to(tl.float64)
        at_centre = centre_ptr + 3 * batch * d + cols
        tl.store(at_centre, shift, mask=inside)
        tl.store(at_centre + d, delta, mask=inside)
        tl.store(at_centre + 2 * d, shift + delta, mask=inside)


def means_launch(h: Tensor, out: Output, work: Workspace) -> Launch:
    """Return the launch that fills `out.centre` from `h` (n, d) or (batch, n, d)."""
    n, d = h.shape[-2:]
    cut = means_partition(n, d)
    memory = (h, out.centre, work.mean_sums, work.mean_counted)
    return Launch(
        _mean_kernel,
        (cut.tiles * out.centre.shape[0], cut.parts),
        (*memory, n, d, *strides(h), cut.tiles, cut.chunk, cut.tile.step, cut.tile.edge),
        {"num_warps": cut.tile.warps, "num_stages": 1, **OPTIONS},
    )


@triton.jit(do_not_specialize=["n", "tiles", "chunk", "shares_batch"])
def _covariance_kernel(
    h_ptr,  # (batch, n, d) fp16, bf16, fp32 or fp64, any strides
    lower_ptr,  # (batch, d, d) fp64 out
    centre_ptr,  # (batch, 3, d) fp64: shift, mean - shift, mean; in with MEANS_FIRST, else out
    sums_ptr,  # see Workspace; None where there is one part, or with MEANS_FIRST
    partial_ptr,
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
    scale: tl.float64,
    EDGE: tl.constexpr,
    STEP: tl.constexpr,
    MEANS_FIRST: tl.constexpr,
    AHEAD: tl.constexpr,  # parts that are under way at once
    BLOCK: tl.constexpr,
):
    tile = tl.program_id(0) % tiles
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    part = tl.program_id(1)
    parts = tl.num_programs(1)
    i, j = tile_index(tile)
    h_ptr += batch * h_batch
    cols_i = i * EDGE + tl.arange(0, EDGE)
    cols_j = j * EDGE + tl.arange(0, EDGE)
    in_i = cols_i < d
    in_j = cols_j < d
    at_centre = centre_ptr + 3 * batch * d
    if MEANS_FIRST:
        shift_i = tl.load(at_centre + cols_i, mask=in_i, other=0.0)
        shift_j = tl.load(at_centre + cols_j, mask=in_j, other=0.0)
    else:
        shift_i = column_shift(h_ptr, n, cols_i, h_row, h_col, in_i)
        shift_j = column_shift(h_ptr, n, cols_j, h_row, h_col, in_j)

    # Rows are counted from the start of the part: a part never has 2^31 of them.
    start = part.to(tl.int64) * chunk
    length = tl.minimum(n - start, chunk).to(tl.int32)
    rows = tl.arange(0, STEP)
    at_rows = h_ptr + start * h_row + rows.to(tl.int64)[:, None] * h_row
    # Two columns to a thread: more lie further apart in shared memory as float64, and meet in its banks. Said of the
    # columns: of their product with the stride it would be a lie, and strided input would be read wrong.
    at_i = at_rows + tl.max_contiguous(cols_i.to(tl.int64), 2)[None, :] * h_col
    at_j = at_rows + tl.max_contiguous(cols_j.to(tl.int64), 2)[None, :] * h_col
    stride = tl.full((), STEP, tl.int64) * h_row
    live = (rows < length)[:, None]
    x_i = widen(tl.load(at_i, mask=live & in_i[None, :], other=0.0))
    x_j = widen(tl.load(at_j, mask=live & in_j[None, :], other=0.0))
    if not MEANS_FIRST:
        sum_i = tl.zeros((STEP, EDGE), tl.float64)
        sum_j = tl.zeros((STEP, EDGE), tl.float64)
    product = tl.zeros((EDGE, EDGE), tl.float64)
    for _ in range(0, length, STEP):
        # Padding becomes 0 after the shift: before it, it would become -shift.
        y_i = tl.where(live, x_i.to(tl.float64) - shift_i[None, :], 0.0)
        y_j = tl.where(live, x_j.to(tl.float64) - shift_j[None, :], 0.0)
        # The next step is on its way while this one is multiplied.
        rows += STEP
        at_i += stride
        at_j += stride
        live = (rows < length)[:, None]
        next_i = tl.load(at_i, mask=live & in_i[None, :], other=0.0)
        next_j = tl.load(at_j, mask=live & in_j[None, :], other=0.0)
        if not MEANS_FIRST:
            sum_i += y_i
            sum_j += y_j
        product = tl.dot(tl.trans(y_i), y_j, product, out_dtype=tl.float64)
        x_i = widen(next_i)
        x_j = widen(next_j)

    last = True
    if not MEANS_FIRST:
        total_i = fold(sum_i, STEP, EDGE)
        total_j = fold(sum_j, STEP, EDGE)
        if sums_ptr is not None:
            at_sums = sums_ptr + ((batch * parts + part) * tiles + tile) * 2 * EDGE + tl.arange(0, EDGE)
            tl.store(at_sums, total_i)
            tl.store(at_sums + EDGE, total_j)
    if partial_ptr is not None:
        last = leave_part(product, tile, tiles, batch, part, parts, partial_ptr, counted_ptr, EDGE)
    if last:
        if partial_ptr is not None:
            product, added_i, added_j = add_parts(
                tile, tiles, batch, parts, partial_ptr, sums_ptr, EDGE, AHEAD
            )
            if not MEANS_FIRST:
                total_i = added_i
                total_j = added_j
        if MEANS_FIRST:
            delta_i = tl.load(at_centre + d + cols_i, mask=in_i, other=0.0)
            delta_j = tl.load(at_centre + d + cols_j, mask=in_j, other=0.0)
        else:
            delta_i = total_i / n.to(tl.float64)
            delta_j = total_j / n.to(tl.float64)
            owner = in_i & (cols_i == cols_j)  # one tile on the diagonal writes for its columns
            tl.store(at_centre + cols_i, shift_i, mask=owner)
            tl.store(at_centre + d + cols_i, delta_i, mask=owner)
            tl.store(at_centre + 2 * d + cols_i, shift_i + delta_i, mask=owner)
        # Symmetric in i and j, and no larger than the product: nothing overflows that need not.
        outer = (delta_i[:, None] * delta_j[None, :]) * n.to(tl.float64)
        at = lower_ptr + (batch * d + cols_i[:, None]) * d + cols_j[None, :]
        inside = in_i[:, None] & in_j[None, :]
        result = tl.where(inside, (product - outer) * scale, 0.0)
        tl.store(at, result, mask=inside)
        if spread_ptr is not None:
            trace, squares = tile_shares(result, i, j, cols_i, cols_j)
            add_spread(
                trace, squares, tile, tiles, batch, spread_ptr, shares_ptr, shares_batch, arrived_ptr, BLOCK
            )


def covariance_launches(h: Tensor, out: Output, work: Workspace, scale: float) -> list[Launch]:
    """Return the launches that fill `out` from `h` (n, d) or (batch, n, d)."""
    n, d = h.shape[-2:]
    cut = partition("covariance", d, n)
    tile = cut.tile
    steps = strides(h)
    shape = (n, d, *steps, cut.tiles, cut.chunk, scale)
    if tile.gluon:
        turned = steps[1] == 1 and steps[2] != 1
        memory = (h, out.lower, out.centre, *memory_arguments(out, work))
        args = (*memory, *shape, tile.edge, tile.step, turned, GROUP)
        return [means_launch(h, out, work), product_launch(gluon_kernel, out, cut, args)]
    memory = (h, out.lower, out.centre, work.sums, *memory_arguments(out, work))
    constants = (tile.edge, tile.step, tile.means_first, tile.ahead, GROUP)
    product = product_launch(_covariance_kernel, out, cut, (*memory, *shape, *constants))
    return [means_launch(h, out, work), product] if tile.means_first else [product]


@triton.jit(do_not_specialize=["n", "tiles", "chunk", "shares_batch"])
def _gram_kernel(
    h_ptr,  # (batch, n, d) fp16, bf16, fp32 or fp64, any strides
    centre_ptr,  # (batch, 3, d) fp64: shift, mean - shift, mean
    lower_ptr,  # (batch, n, n) fp64 out
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
    chunk,  # columns of a part
    scale: tl.float64,
    EDGE: tl.constexpr,
    STEP: tl.constexpr,
    AHEAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tile = tl.program_id(0) % tiles
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    part = tl.program_id(1)
    parts = tl.num_programs(1)
    i, j = tile_index(tile)
    rows_i = i * EDGE + tl.arange(0, EDGE)
    rows_j = j * EDGE + tl.arange(0, EDGE)
    in_i = rows_i < n
    in_j = rows_j < n

    start = part * chunk
    stop = tl.minimum(start + chunk, d)
    cols = start + tl.arange(0, STEP)
    at_cols = h_ptr + batch * h_batch + cols.to(tl.int64)[None, :] * h_col
    at_i = at_cols + rows_i.to(tl.int64)[:, None] * h_row
    at_j = at_cols + rows_j.to(tl.int64)[:, None] * h_row
    at_centre = centre_ptr + 3 * batch * d + cols
    stride = tl.full((), STEP, tl.int64) * h_col
    live = cols < stop
    x_i = widen(tl.load(at_i, mask=in_i[:, None] & live[None, :], other=0.0))
    x_j = widen(tl.load(at_j, mask=in_j[:, None] & live[None, :], other=0.0))
    shift = tl.load(at_centre, mask=live, other=0.0)
    delta = tl.load(at_centre + d, mask=live, other=0.0)
    product = tl.zeros((EDGE, EDGE), tl.float64)
    for _ in range(start, stop, STEP):
        # Two subtractions: their sum is the mean rounded at the size of the offset, and that rounding would
        # enter every entry to first order. Columns past the end are 0 - 0 - 0; rows past it are not stored.
        z_i = (x_i.to(tl.float64) - shift[None, :]) - delta[None, :]
        z_j = (x_j.to(tl.float64) - shift[None, :]) - delta[None, :]
        cols += STEP
        at_i += stride
        at_j += stride
        at_centre += STEP
        live = cols < stop
        next_i = tl.load(at_i, mask=in_i[:, None] & live[None, :], other=0.0)
        next_j = tl.load(at_j, mask=in_j[:, None] & live[None, :], other=0.0)
        shift = tl.load(at_centre, mask=live, other=0.0)
        delta = tl.load(at_centre + d, mask=live, other=0.0)
        product = tl.dot(z_i, tl.trans(z_j), product, out_dtype=tl.float64)
        x_i = widen(next_i)
        x_j = widen(next_j)

    last = True
    if partial_ptr is not None:
        last = leave_part(product, tile, tiles, batch, part, parts, partial_ptr, counted_ptr, EDGE)
    if last:
        if partial_ptr is not None:
            product, _i, _j = add_parts(tile, tiles, batch, parts, partial_ptr, None, EDGE, AHEAD)
        at = lower_ptr + (batch * n + rows_i[:, None]) * n + rows_j[None, :]
        inside = in_i[:, None] & in_j[None, :]
        result = product * scale
        tl.store(at, result, mask=inside)
        if spread_ptr is not None:
            trace, squares = tile_shares(tl.where(inside, result, 0.0), i, j, rows_i, rows_j)
            add_spread(
                trace, squares, tile, tiles, batch, spread_ptr, shares_ptr, shares_batch, arrived_ptr, BLOCK
            )


def gram_launches(h: Tensor, out: Output, work: Workspace, scale: float) -> list[Launch]:
    """Return the launches that fill `out` from `h` (n, d) or (batch, n, d)."""
    n, d = h.shape[-2:]
    cut = partition("gram", n, d)
    memory = (h, out.centre, out.lower, *memory_arguments(out, work))
    shape = (n, d, *strides(h), cut.tiles, cut.chunk, scale)
    tile = cut.tile
    constants = (tile.edge, tile.step, tile.ahead, GROUP)
    product = product_launch(_gram_kernel, out, cut, (*memory, *shape, *constants))
    return [means_launch(h, out, work), product]


LAUNCHES: dict[Side, Callable[[Tensor, Output, Workspace, float], list[Launch]]] = {
    "covariance": covariance_launches,
    "gram": gram_launches,
}
"""What fills an `Output` from activations (n, d) or (batch, n, d), with scratch memory and a scale, by side."""


def _run(side: Side, h: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """Take memory for the matrices of `h` (without a spread), run the launches; return triangles and centres."""
    n, d = h.shape[-2:]
    batch = h.shape[0] if h.ndim == 3 else 1
    out = output(side, batch, n, d, h.device, spread=False)
    together, groups = batch, [(h, out)]
    if batch > 1 and (most := at_once(side, *((d, n) if side == "covariance" else (n, d)))) is not None:
        # One group after the other in the same scratch memory, which would grow to several times the results.
        together = min(batch, most)
        groups = [
            (some, Output(lower, centre, None, out.block))
            for some, lower, centre in zip(
                *(tensor.split(together) for tensor in (h, out.lower, out.centre)), strict=True
            )
        ]
    work = workspace(side, together, n, d, h.device, spread=False)
    with torch.cuda.device_of(h):  # Triton launches on the current device
        for some, results in groups:
            for launch in LAUNCHES[side](some, results, work, 1.0 / n if scale is None else scale):
                launch.run()
    return (out.lower, out.centre) if h.ndim == 3 else (out.lower[0], out.centre[0])


def covariance(h: Tensor, *, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Centred covariance of activations: ``sum (h_n - mean) (h_n - mean)^T * scale``.

    Parameters
    ----------
    h : Tensor, shape (n, d) or (batch, n, d)
        Activations in float16, bfloat16, float32 or float64, any strides; on a CUDA device of compute
        capability 8.0 or later, or anywhere under Triton's interpreter.
    scale : float, optional
        Factor of the sum; 1 / n when left out.

    Returns
    -------
    lower : Tensor, shape (d, d) or (batch, d, d), float64
        The lower triangle in units of `h` squared. What stands above the diagonal has no meaning.
    mean : Tensor, shape (d,) or (batch, d), float64
        Column means.
    """
    lower, centre = _run("covariance", h, scale)
    return lower, centre[..., 2, :]


def shifted_covariance(h: Tensor, *, scale: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """As `covariance`, with the mean in two parts whose sum one float64 would round.

    Parameters
    ----------
    h : Tensor, shape (n, d) or (batch, n, d)
        As in `covariance`.
    scale : float, optional
        Factor of the sum; 1 / n when left out.

    Returns
    -------
    lower : Tensor, shape (d, d) or (batch, d, d), float64
        As in `covariance`.
    shift : Tensor, shape (d,) or (batch, d), float64
        An entry of each column.
    delta : Tensor, shape (d,) or (batch, d), float64
        Column means minus `shift`, to the last bits of their own size. Merging the moments of parts needs
        them: where the offset is large, a mean in one float64 has lost more than the merge may lose.
    """
    lower, centre = _run("covariance", h, scale)
    return lower, centre[..., 0, :], centre[..., 1, :]


def gram(h: Tensor, *, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Gram matrix of the column-centred rows: entry (n, m) is ``(h_n - mean) . (h_m - mean) * scale``.

    It has the non-zero eigenvalues of `covariance` and is the smaller of the two when n < d.

    Parameters
    ----------
    h : Tensor, shape (n, d) or (batch, n, d)
        As in `covariance`.
    scale : float, optional
        Factor of the sum; 1 / n when left out.

    Returns
    -------
    lower : Tensor, shape (n, n) or (batch, n, n), float64
        The lower triangle in units of `h` squared. What stands above the diagonal has no meaning.
    mean : Tensor, shape (d,) or (batch, d), float64
        Column means.
    """
    lower, centre = _run("gram", h, scale)
    return lower, centre[..., 2, :]


# Launches kept to be made again; with more than that, outputs do not come back.
_MOST_AGAIN = 64


class ResidentCovariance:
    """Centred covariance (or Gram matrix), mean and participation ratio of matrices of one shape, in memory taken once.

    What a training loop runs: an evaluation allocates nothing, touches no tensor on the host, asks the device for
    nothing, and so can be captured in a CUDA graph after one call outside (which compiles). It is 1 launch on the
    covariance side, 2 on the Gram side and wherever else the means come first, participation ratio included. From
    the second call on, with an output and activations as those of an earlier one, only an address is new, and Triton's
    launcher, which would look at every argument again, has no part in it.

    Parameters
    ----------
    n, d : int
        Samples and features.
    batch : int
        Matrices of one evaluation.
    device : torch.device
        Where they are: CUDA of compute capability 8.0 or later, or the CPU under Triton's interpreter.
    side : {"covariance", "gram"}, optional
        The smaller one by default.
    scale : float, optional
        Factor of the sums of products; 1 / n by default.

    Notes
    -----
    The scratch memory is one: an evaluation must not start, on whatever stream, before the last one of the same
    object has ended. Evaluations on one stream keep to that by themselves.
    """

    def __init__(
        self,
        n: int,
        d: int,
        *,
        batch: int = 1,
        device: torch.device,
        side: Side | None = None,
        scale: float | None = None,
    ) -> None:
        self.n, self.d, self.batch, self.device = n, d, batch, device
        self.side: Side = side or ("gram" if n < d else "covariance")
        self.scale = 1.0 / n if scale is None else scale
        self.workspace = workspace(self.side, batch, n, d, device, spread=True)
        self._again: dict[tuple[object, ...], list[Again]] = {}

    def output(self) -> Output:
        """Take memory for one result; a ring holds several."""
        return output(self.side, self.batch, self.n, self.d, self.device, spread=True)

    def launches(self, h: Tensor, out: Output) -> list[Launch]:
        """Return what `__call__` runs, in order."""
        return LAUNCHES[self.side](h, out, self.workspace, self.scale)

    def __call__(self, h: Tensor, out: Output) -> None:
        """Queue the evaluation of `h` into `out` on the current stream and return.

        Parameters
        ----------
        h : Tensor, shape (batch, n, d), or (n, d) for a batch of one
            float16, bfloat16, float32 or float64, any strides, on the device given here.
        out : Output
            From `output`; `lower`, `centre` and `spread` are overwritten.
        """
        address = h.data_ptr()
        # All that the launches hang on but the address itself, of which Triton asks whether 16 divides it.
        key = (h.dtype, h.shape, h.stride(), address % 16, out.block.data_ptr())
        # Triton launches on the current device.
        with torch.cuda.device_of(h):
            if known := self._again.get(key):
                for again in known:
                    again.run(address)
                return
            made = [launch.run() for launch in self.launches(h, out)]
        if len(self._again) >= _MOST_AGAIN:  # outputs that were not kept
            self._again.clear()
        ready = [again for again in made if again is not None]
        if len(ready) == len(made):  # all or none: some launches without the others would be wrong
            self._again[key] = ready
