"""Centred covariance and Gram matrices without Triton: the CPU path, and CUDA where Triton cannot run.

The input goes through a float64 buffer of at most `CHUNK_BYTES`, so there is never a float64 copy of a large one.
Only the lower triangle is computed: by NumPy's OpenBLAS where that is faster and has one thread (`fastent.openblas`);
otherwise by torch, which has no syrk, in slabs of `SLAB` rows, for little more than half the products. Long chunks are
then cut into `GROUPS` for a batched product: every thread gets a panel, where one tall product leaves threads idle.

All other choices follow from the shape alone, so the bits do not depend on strides or on other items of a batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastent import openblas

CHUNK_BYTES = 4 * 2**20
GROUPS = 4
GROUPED_FROM = 1024  # shorter panels lose more to the extra sum than the threads gain
# A multiple of the 24 rows that MKL's AVX-512 product computes at once: 0.6 of a full product's time where slabs of 32
# take 0.7 (bench/NOTES.md).
SLAB = 48


def covariance(x: Tensor, scale: float, *, exact_mean: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Lower triangle of ``scale * sum (x - mean)(x - mean)^T``.

    Parameters
    ----------
    x : Tensor, shape (n, d)
        Activations, any float dtype and strides.
    scale : float
        1/n for the covariance.
    exact_mean : bool
        Give the mean beyond the rounding of one float64, as merging parts at a large offset needs: one more pass.

    Returns
    -------
    lower : Tensor, shape (d, d), float64
        Only the lower triangle is meaningful; the rest is uninitialised.
    shift, delta : Tensor, shape (d,), float64
        Their sum is the mean; apart, since the sum rounds at the size of the offset.
    """
    n, d = x.shape
    rows = _chunk_length(n, d)
    chunk = x if n == rows else x[:rows]
    lower, add_lower_product = target(x, d)
    buffer, shift, delta = centered(chunk, exact=exact_mean or x.dtype == torch.float64)
    add_lower_product(lower, buffer.T, scale, first=True)
    if n == rows:  # the two-pass algorithm
        return lower, shift, delta
    center = shift + delta
    residual = buffer.sum(0)
    for start in range(rows, n, rows):
        chunk = x[start : start + rows]
        y = buffer[: chunk.shape[0]].copy_(chunk).sub_(center)
        residual += y.sum(0)
        add_lower_product(lower, y.T, scale)
    lower.addr_(residual, residual, alpha=-scale / n)
    return lower, shift, delta.add_(residual, alpha=1.0 / n)


def gram(x: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Lower triangle of ``scale * Yc Yc^T``, Yc the column-centred rows; same non-zero spectrum, for n < d.

    Parameters
    ----------
    x : Tensor, shape (n, d)
        Activations, any float dtype and strides.
    scale : float
        1/n for the spectrum of the covariance.

    Returns
    -------
    lower : Tensor, shape (n, n), float64
        Only the lower triangle is meaningful; the rest is uninitialised.
    shift, delta : Tensor, shape (d,), float64
        Their sum is the mean.
    """
    n, d = x.shape
    columns = _chunk_length(d, n)
    lower, add_lower_product = target(x, n)
    means = []
    for start in range(0, d, columns):
        y, *mean = centered(x[:, start : start + columns], exact=x.dtype == torch.float64)
        means.append(mean)
        add_lower_product(lower, y, scale, first=start == 0)
    shifts, deltas = zip(*means, strict=True)
    return lower, torch.cat(shifts), torch.cat(deltas)


def target(x: Tensor, m: int) -> tuple[Tensor, Callable[..., None]]:
    """Memory for an (m, m) matrix, uninitialised, and the function that adds products to it."""
    if openblas.preferred(x):
        return openblas.empty(m), openblas.add_lower_product
    return torch.empty((m, m), dtype=torch.float64, device=x.device), _add_lower_product


def centered(x: Tensor, *, exact: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Contiguous float64 copy of the rows of `x` (k, d) less their mean, and that mean as shift and delta.

    A constant column must give exactly 0. The float64 mean of up to 2^29 equal values of 24 bits is that value, so
    for inputs narrower than float64 one pass will do; `exact` takes row 0 off first, then the mean of the rest.
    """
    y = torch.empty(x.shape, dtype=torch.float64, device=x.device)
    if not exact:
        shift = y.copy_(x).mean(0)
        return y.sub_(shift), shift, torch.zeros_like(shift)
    shift = x[0].to(torch.float64, copy=True)
    # Of mixed dtypes torch would make a copy first.
    y = torch.sub(x, shift, out=y) if x.dtype == torch.float64 else y.copy_(x).sub_(shift)
    delta = y.mean(0)
    return y.sub_(delta), shift, delta


def _chunk_length(length: int, width: int) -> int:
    """Rows of `width` float64 that fit the buffer, a multiple of GROUPS where there is a choice."""
    fit = max(GROUPS, CHUNK_BYTES // (8 * width))
    return length if length <= fit else fit // GROUPS * GROUPS


def _add_lower_product(lower: Tensor, a: Tensor, scale: float, *, first: bool = False) -> None:
    """Add ``scale * a a^T`` to the lower triangle (`first`: overwrite it); `a` has shape (m, k)."""
    m, k = a.shape
    grouped = k >= GROUPED_FROM and k % GROUPS == 0
    if grouped:  # (m, k) -> (GROUPS, m, k / GROUPS), whichever of the two axes is contiguous
        panels = a.view(m, GROUPS, k // GROUPS).transpose(0, 1)
    for low in range(0, m, SLAB):
        high = min(low + SLAB, m)
        slab = lower[low:high, :high]
        if grouped:
            product = torch.bmm(panels[:, low:high], panels[:, :high].mT).sum(0)
            torch.mul(product, scale, out=slab) if first else slab.add_(product, alpha=scale)
        else:
            torch.addmm(slab, a[low:high], a[:high].T, beta=0.0 if first else 1.0, alpha=scale, out=slab)
