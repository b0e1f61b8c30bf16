# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-calls=False, disallow-untyped-decorators=False
"""Centred covariance in float64, lower triangle, in one pass over fp16, bf16, fp32 or fp64 activations.

With the shifted rows ``y_n = h_n - shift`` it accumulates ``S = sum y y^T`` and ``s = sum y`` together and writes
``C = (S - s s^T / N) * scale``. Each tile is cast on its way in: there is no float64 copy of the input.

The shift of a column is the median of its first, middle and last entry. The error of one pass grows as
``(shift - mean)^2 / variance``: at most N - 1 for any entry (Samuelson's inequality), and that much where the
entry is a lone outlier, as row 0 can be (the first token of a language model). The median of three is not one,
and it is an entry of the column all the same: constant columns give exactly 0.

Only the lower triangle is meaningful: tiles above the diagonal are never written. NaN and Inf come through to
the diagonal. Nothing is checked here: see `fastent.activations`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gram import gram
from .launch import Launch, plan
from .tiles import (
    column_shift,
    finish_launch,
    fold,
    partials,
    product_launch,
    run,
    strides,
    tile_index,
    widen,
)

__all__ = ["covariance", "covariance_launches", "gram", "shifted_covariance"]


@triton.jit(do_not_specialize=["n", "tiles", "chunk"])
def _covariance_kernel(
    h_ptr,  # (batch, n, d) fp16, bf16, fp32 or fp64, any strides
    lower_ptr,  # (batch, d, d) fp64 out, when there is one part
    centre_ptr,  # (batch, 3, d) fp64 out: shift, mean - shift, mean; when there are parts, the shift alone
    partial_ptr,  # (batch, parts, tiles, EDGE, EDGE) fp64 out, when there are parts: sum of y y^T
    sums_ptr,  # (batch, parts, d) fp64 out, when there are parts: sum of y
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
    shift_i = column_shift(h_ptr, n, cols_i, h_row, h_col, in_i)
    shift_j = column_shift(h_ptr, n, cols_j, h_row, h_col, in_j)

    start = part * chunk
    stop = tl.minimum(start + chunk, n)
    rows = start + tl.arange(0, STEP)
    at_rows = h_ptr + rows.to(tl.int64)[:, None] * h_row
    at_i = at_rows + cols_i.to(tl.int64)[None, :] * h_col
    at_j = at_rows + cols_j.to(tl.int64)[None, :] * h_col
    stride = tl.full((), STEP, tl.int64) * h_row
    live = (rows < stop)[:, None]
    x_i = widen(tl.load(at_i, mask=live & in_i[None, :], other=0.0))
    x_j = widen(tl.load(at_j, mask=live & in_j[None, :], other=0.0))
    sum_i = tl.zeros((STEP, EDGE), tl.float64)
    sum_j = tl.zeros((STEP, EDGE), tl.float64)
    product = tl.zeros((EDGE, EDGE), tl.float64)
    for _ in range(start, stop, STEP):
        # Padding becomes 0 after the shift: before it, it would become -shift.
        y_i = tl.where(live, x_i.to(tl.float64) - shift_i[None, :], 0.0)
        y_j = tl.where(live, x_j.to(tl.float64) - shift_j[None, :], 0.0)
        # The next step is on its way while this one is multiplied.
        rows += STEP
        at_i += stride
        at_j += stride
        live = (rows < stop)[:, None]
        next_i = tl.load(at_i, mask=live & in_i[None, :], other=0.0)
        next_j = tl.load(at_j, mask=live & in_j[None, :], other=0.0)
        sum_i += y_i
        sum_j += y_j
        product = tl.dot(tl.trans(y_i), y_j, product, out_dtype=tl.float64)
        x_i = widen(next_i)
        x_j = widen(next_j)
    total_i = fold(sum_i, STEP, EDGE)
    total_j = fold(sum_j, STEP, EDGE)

    owner = in_i & (cols_i == cols_j)  # one tile on the diagonal writes for its columns
    at_centre = centre_ptr + 3 * batch * d + cols_i
    if parts == 1:
        count = n.to(tl.float64)
        delta_i = total_i / count
        delta_j = total_j / count
        # Symmetric in i and j, and no larger than the product: nothing overflows that need not.
        outer = (delta_i[:, None] * delta_j[None, :]) * count
        at = lower_ptr + (batch * d + cols_i[:, None]) * d + cols_j[None, :]
        tl.store(at, (product - outer) * scale, mask=in_i[:, None] & in_j[None, :])
        tl.store(at_centre, shift_i, mask=owner)
        tl.store(at_centre + d, delta_i, mask=owner)
        tl.store(at_centre + 2 * d, shift_i + delta_i, mask=owner)
    else:
        index = batch * parts + part
        r = tl.arange(0, EDGE)
        tl.store(partial_ptr + (index * tiles + tile) * EDGE * EDGE + r[:, None] * EDGE + r[None, :], product)
        tl.store(sums_ptr + index * d + cols_i, total_i, mask=owner)
        if part == 0:
            tl.store(at_centre, shift_i, mask=owner)


def covariance_launches(h: Tensor, lower: Tensor, centre: Tensor, scale: float) -> list[Launch]:
    """Return the launches that fill `lower` (batch, d, d) and `centre` (batch, 3, d) from `h` (batch, n, d)."""
    n, d = h.shape[1:]
    cut = plan(d, n)
    partial, sums = lower, centre  # not touched when there is one part
    if cut.parts > 1:
        partial = partials(h, cut)
        sums = torch.empty((h.shape[0], cut.parts, d), dtype=torch.float64, device=h.device)
    shape = (n, d, *strides(h), cut.tiles, cut.chunk, scale, cut.tile.edge, cut.tile.step)
    product = product_launch(_covariance_kernel, h, cut, (h, lower, centre, partial, sums, *shape))
    if cut.parts == 1:
        return [product]
    return [product, finish_launch(partial, sums, lower, centre, n, cut, scale)]


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
    lower, centre = run(covariance_launches, h, h.shape[-1], scale)
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
    lower, centre = run(covariance_launches, h, h.shape[-1], scale)
    return lower, centre[..., 0, :], centre[..., 1, :]
