# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-calls=False, disallow-untyped-decorators=False
"""Centred covariance in float64, lower triangle, in one pass over fp16, bf16, fp32 or fp64 activations.

With the shifted rows ``y_n = h_n - shift`` it accumulates ``S = sum y y^T`` and ``s = sum y`` together and writes
``C = (S - s s^T / N) * scale``. Each tile is cast on its way in: there is no float64 copy of the input.

The shift of a column is the median of its first, middle and last entry. The error of one pass grows as
``(shift - mean)^2 / variance``: at most N - 1 for any entry (Samuelson's inequality), and that much where the
entry is a lone outlier, as row 0 can be (the first token of a language model). The median of three is not one,
and it is an entry of the column all the same: constant columns give exactly 0.

Where the table says so (`Tile.means_first`), ``s`` comes from a launch of its own and the loop sums products alone:
the same formula, in a loop with fewer registers and so fewer warps to a tile.

Only the lower triangle is meaningful: tiles above the diagonal are never written. NaN and Inf come through to
the diagonal. Nothing is checked here: see `fastent.activations`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .gram import gram
from .launch import Launch, plan
from .means import means_launch
from .memory import Output, Workspace
from .spread import add_spread, tile_shares
from .tiles import (
    GROUP,
    add_parts,
    column_shift,
    fold,
    leave_part,
    memory_arguments,
    product_launch,
    run,
    strides,
    tile_index,
    widen,
)

__all__ = ["covariance", "covariance_launches", "gram", "shifted_covariance"]


@triton.jit
def _add_sums(tile, tiles, batch, parts, sums_ptr, EDGE: tl.constexpr):
    """Column sums of all parts of a tile, of its rows' columns and of its columns', in the order of the parts."""
    at = sums_ptr + (batch * parts * tiles + tile) * 2 * EDGE + tl.arange(0, EDGE)
    total_i = tl.zeros((EDGE,), tl.float64)
    total_j = tl.zeros((EDGE,), tl.float64)
    for _ in range(parts):
        total_i += tl.load(at, cache_modifier=".cg")
        total_j += tl.load(at + EDGE, cache_modifier=".cg")
        at += tiles * 2 * EDGE
    return total_i, total_j


@triton.jit(do_not_specialize=["n", "tiles", "chunk", "shares_batch"])
def _covariance_kernel(
    h_ptr,  # (batch, n, d) fp16, bf16, fp32 or fp64, any strides
    lower_ptr,  # (batch, d, d) fp64 out
    centre_ptr,  # (batch, 3, d) fp64: shift, mean - shift, mean; in with MEANS_FIRST, else out
    sums_ptr,  # see Workspace; None where there is one part
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
    MEANS_FIRST: tl.constexpr,  # then there is one part
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
    at_i = at_rows + cols_i.to(tl.int64)[None, :] * h_col
    at_j = at_rows + cols_j.to(tl.int64)[None, :] * h_col
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
        if partial_ptr is not None:
            at_sums = sums_ptr + ((batch * parts + part) * tiles + tile) * 2 * EDGE + tl.arange(0, EDGE)
            tl.store(at_sums, total_i)
            tl.store(at_sums + EDGE, total_j)
            last = leave_part(product, tile, tiles, batch, part, parts, partial_ptr, counted_ptr, EDGE)
    if last:
        if MEANS_FIRST:
            delta_i = tl.load(at_centre + d + cols_i, mask=in_i, other=0.0)
            delta_j = tl.load(at_centre + d + cols_j, mask=in_j, other=0.0)
        else:
            if partial_ptr is not None:
                product = add_parts(tile, tiles, batch, parts, partial_ptr, EDGE)
                total_i, total_j = _add_sums(tile, tiles, batch, parts, sums_ptr, EDGE)
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
        result = (product - outer) * scale
        tl.store(at, result, mask=inside)
        if spread_ptr is not None:
            trace, squares = tile_shares(tl.where(inside, result, 0.0), i, j, cols_i, cols_j)
            add_spread(
                trace, squares, tile, tiles, batch, spread_ptr, shares_ptr, shares_batch, arrived_ptr, BLOCK
            )


def covariance_launches(h: Tensor, out: Output, work: Workspace, scale: float) -> list[Launch]:
    """Return the launches that fill `out` from `h` (n, d) or (batch, n, d)."""
    n, d = h.shape[-2:]
    cut = plan("covariance", d, n)
    tile = cut.tile
    memory = (h, out.lower, out.centre, work.sums, *memory_arguments(out, work))
    shape = (n, d, *strides(h), cut.tiles, cut.chunk, scale)
    constants = (tile.edge, tile.step, tile.means_first, GROUP)
    product = product_launch(_covariance_kernel, out, cut, (*memory, *shape, *constants))
    return [means_launch(h, out.centre), product] if tile.means_first else [product]


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
    lower, centre = run("covariance", covariance_launches, h, scale)
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
    lower, centre = run("covariance", covariance_launches, h, scale)
    return lower, centre[..., 0, :], centre[..., 1, :]
