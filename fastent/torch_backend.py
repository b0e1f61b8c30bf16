"""Centred covariance and Gram matrices in plain torch: the CPU path, and CUDA without Triton.

The input goes through a float64 buffer of at most `CHUNK_BYTES`, so there is never a float64 copy of it. Only
the lower triangle is computed, as slabs of `SLABS` row blocks: 10/16 of the products of a full matrix. torch has
no syrk, and scipy's runs in a second thread pool that fights torch's (bench/NOTES.md). Long chunks are cut into
`GROUPS` for a batched product, which gives every thread a panel of its own where one tall product leaves them idle.

All choices follow from the shape alone: the bits do not depend on strides, device load or batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK_BYTES = 4 * 2**20
SLABS = 4
GROUPS = 4
GROUPED_FROM = 1024  # shorter panels lose more to the extra sum than the threads gain


def covariance(x: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Lower triangle of ``scale * sum (x - mean)(x - mean)^T``.

    Parameters
    ----------
    x : Tensor, shape (n, d)
        Activations, any float dtype and strides.
    scale : float
        1/n for the covariance.

    Returns
    -------
    lower : Tensor, shape (d, d), float64
        Symmetric in exact arithmetic; only the lower triangle is meaningful.
    shift, delta : Tensor, shape (d,), float64
        Row 0, and the mean minus row 0: apart, since their sum rounds at the size of the offset.
    """
    n, d = x.shape
    rows = _chunk_length(n, d)
    buffer = torch.empty((rows, d), dtype=torch.float64, device=x.device)
    lower = torch.zeros((d, d), dtype=torch.float64, device=x.device)
    row0 = x[0].to(torch.float64)
    center = row0
    for start in range(0, n, rows):
        chunk = x[start : start + rows]
        y = buffer[: chunk.shape[0]]
        y.copy_(chunk)
        y.sub_(center)
        if start == 0:
            # Constant columns give exactly 0 here, as they must; then the chunk's own mean, so that an
            # outlier in row 0 costs no digits. A whole input in one chunk is the two-pass algorithm.
            first = y.mean(0)
            center = row0 + first
            y.sub_(first)
            residual = torch.zeros_like(first) if n <= rows else y.sum(0)
        else:
            residual += y.sum(0)
        _add_lower_product(lower, y.T)
    residual /= n
    if n > rows:
        _add_lower_outer(lower, residual, -float(n))
    return lower.mul_(scale), row0, first.add_(residual)


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
        Only the lower triangle is meaningful.
    shift, delta : Tensor, shape (d,), float64
        Row 0, and the mean minus row 0.
    """
    n, d = x.shape
    columns = _chunk_length(d, n)
    buffer = torch.empty(n * columns, dtype=torch.float64, device=x.device)
    lower = torch.zeros((n, n), dtype=torch.float64, device=x.device)
    row0 = x[0].to(torch.float64)
    delta = torch.empty_like(row0)
    for start in range(0, d, columns):
        chunk = x[:, start : start + columns]
        width = chunk.shape[1]
        y = buffer[: n * width].view(n, width)
        y.copy_(chunk)
        y.sub_(row0[start : start + width])
        mean = delta[start : start + width]
        torch.mean(y, 0, out=mean)
        y.sub_(mean)
        _add_lower_product(lower, y)
    return lower.mul_(scale), row0, delta


def _chunk_length(length: int, width: int) -> int:
    """Rows of `width` float64 that fit the buffer, a multiple of GROUPS where there is a choice."""
    fit = max(GROUPS, CHUNK_BYTES // (8 * width))
    return length if length <= fit else fit // GROUPS * GROUPS


def _add_lower_product(lower: Tensor, a: Tensor) -> None:
    """Add ``a a^T`` for `a` of shape (m, k) to the lower triangle, slab by slab."""
    m, k = a.shape
    grouped = k >= GROUPED_FROM and k % GROUPS == 0
    panels = a.view(m, GROUPS, k // GROUPS).transpose(0, 1) if grouped else a
    edges = [m * i // SLABS for i in range(SLABS + 1)]
    for low, high in zip(edges, edges[1:], strict=False):
        if low == high:
            continue
        slab = lower[low:high, :high]
        if grouped:
            slab += torch.bmm(panels[:, low:high], panels[:, :high].transpose(1, 2)).sum(0)
        else:
            slab.addmm_(panels[low:high], panels[:high].T)


def _add_lower_outer(lower: Tensor, v: Tensor, factor: float) -> None:
    lower.addr_(v, v, alpha=factor)
