# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-calls=False, disallow-untyped-decorators=False
"""Gram matrix of the column-centred rows in float64, lower triangle: the smaller side when N < d.

``G = Z Z^T * scale`` with ``z_n = (h_n - shift) - mean(h - shift)``, the shift as in `fastent.kernels.covariance`.
Centring needs every row before the first product, and correcting afterwards would need the row sums of all of G;
so the means come from a launch of their own (`means`): small beside the product, and the result has the accuracy of
two passes.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, plan
from .means import means_launch
from .memory import Output, Workspace
from .spread import add_spread, tile_shares
from .tiles import (
    GROUP,
    add_parts,
    leave_part,
    memory_arguments,
    product_launch,
    run,
    strides,
    tile_index,
    widen,
)


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
            product = add_parts(tile, tiles, batch, parts, partial_ptr, EDGE)
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
    cut = plan("gram", n, d)
    memory = (h, out.centre, out.lower, *memory_arguments(out, work))
    shape = (n, d, *strides(h), cut.tiles, cut.chunk, scale)
    product = product_launch(_gram_kernel, out, cut, (*memory, *shape, cut.tile.edge, cut.tile.step, GROUP))
    return [means_launch(h, out.centre), product]


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
    lower, centre = run("gram", gram_launches, h, scale)
    return lower, centre[..., 2, :]
