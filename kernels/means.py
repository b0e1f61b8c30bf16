# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-calls=False, disallow-untyped-decorators=False
"""Shift and mean of every column, in a launch of their own, for products that centre as they load.

It reads `h` once. The Gram side needs it, since centring there needs every row before the first product; the
covariance of many columns takes it so that the loop of the product keeps no sums.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch
from .tiles import OPTIONS, column_shift, fold, strides

# Rows and columns that one program of the column means holds at once.
_ROWS, _COLUMNS, _WARPS = 128, 32, 8


@triton.jit(do_not_specialize=["n", "blocks"])
def _mean_kernel(
    h_ptr,  # (batch, n, d) fp16, bf16, fp32 or fp64, any strides
    centre_ptr,  # (batch, 3, d) fp64 out: shift, mean - shift, mean
    n,
    d,
    h_batch,
    h_row,
    h_col,
    blocks,  # blocks of columns
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    cols = (tl.program_id(0) % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    inside = cols < d
    h_ptr += batch * h_batch
    shift = column_shift(h_ptr, n, cols, h_row, h_col, inside)
    rows = tl.arange(0, ROWS)
    at = h_ptr + rows.to(tl.int64)[:, None] * h_row + cols.to(tl.int64)[None, :] * h_col
    stride = tl.full((), ROWS, tl.int64) * h_row
    total = tl.zeros((ROWS, COLUMNS), tl.float64)
    for _ in range(0, n, ROWS):
        live = (rows < n)[:, None]
        x = tl.load(at, mask=live & inside[None, :], other=0.0).to(tl.float64)
        total += tl.where(live, x - shift[None, :], 0.0)
        rows += ROWS
        at += stride
    delta = fold(total, ROWS, COLUMNS) / n.to(tl.float64)
    at_centre = centre_ptr + 3 * batch * d + cols
    tl.store(at_centre, shift, mask=inside)
    tl.store(at_centre + d, delta, mask=inside)
    tl.store(at_centre + 2 * d, shift + delta, mask=inside)


def means_launch(h: Tensor, centre: Tensor) -> Launch:
    """Return the launch that fills `centre` (batch, 3, d) from `h` (n, d) or (batch, n, d)."""
    n, d = h.shape[-2:]
    blocks = -(-d // _COLUMNS)
    return Launch(
        _mean_kernel,
        (blocks * centre.shape[0], 1),
        (h, centre, n, d, *strides(h), blocks, _ROWS, _COLUMNS),
        {"num_warps": _WARPS, "num_stages": 1, **OPTIONS},
    )
