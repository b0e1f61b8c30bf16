# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-calls=False, disallow-untyped-decorators=False
"""Trace, sum of squares and participation ratio of a matrix, by the launch that computes it.

``(sum l)^2 / sum l^2`` of the eigenvalues l is ``tr(C)^2 / |C|_F^2``: exact, without an eigensolve, and small enough
to log at every step. Each program leaves its share in memory and counts itself in; the last one to arrive adds
all shares in the order of the programs, not of their arrival, and sets the count back to 0. The count is an integer:
no float is added by an atomic.

Where the squares leave float64's range (entries near 1e154 or 1e-162) the ratio is not finite or 0; constant rows
give 0 / 0, NaN. The entropy path says which (`fastent.spectrum.Status`).
"""

from __future__ import annotations

import triton
import triton.language as tl


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
    arrived_ptr,  # (batch,) int32
    BLOCK: tl.constexpr,
):
    """Leave the share of `program`; the last of `programs` to do so writes the spread."""
    shares_ptr += batch * shares_batch
    tl.store(shares_ptr + 2 * program, trace)
    tl.store(shares_ptr + 2 * program + 1, squares)
    # Release and acquire at the scope of the device: whoever sees all others counted in sees their shares.
    tl.debug_barrier()
    before = tl.atomic_add(arrived_ptr + batch, 1, sem="acq_rel", scope="gpu")
    if before == programs - 1:
        tl.debug_barrier()
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
        tl.store(arrived_ptr + batch, 0)


@triton.jit
def tile_shares(values, i, j, rows, cols):
    """Contribution of a tile of the lower triangle, 0 outside the matrix, to trace and sum of squares.

    `tl.sum` is in order here: the layout of a product follows from the tile, not from the strides of the input.
    """
    trace = tl.sum(tl.sum(tl.where(rows[:, None] == cols[None, :], values, 0.0), axis=0), axis=0)
    squares = tl.sum(tl.sum(values * values, axis=0), axis=0)
    # A tile below the diagonal stands for its mirror image too; those on it are whole.
    return trace, tl.where(i == j, squares, 2.0 * squares)
