"""The matrix products and normalisations of the stacked models, seeds as the leading axis.

On a CPU in float32, one seed at a time, the products go to oneDNN: torch hands float32 products to MKL,
which on a Zen 5 core is 2.2 times slower at these sizes (110 against 245 GFLOP/s). Elsewhere they are
batched products. Nothing here records a graph; the gradients are written out beside each forward.
"""

from __future__ import annotations

import torch
from torch import Tensor

Parameters = dict[str, Tensor]
"""Tensors by the names of `fastent.train.plain`'s module, each with a leading axis of seeds."""

_HAS_ONEDNN = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]


def _onednn(x: Tensor) -> bool:
    return _HAS_ONEDNN and len(x) == 1 and x.dtype == torch.float32 and x.device.type == "cpu"


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None, after: str = "none") -> Tensor:
    # A weight that is dense neither way round would fall to oneDNN's reference loop, 1,000 times slower.
    if not (weight.is_contiguous() or weight.mT.is_contiguous()):
        weight = weight.contiguous()
    out: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, after, [], "")
    return out


def linear(x: Tensor, weight: Tensor, bias: Tensor, *, relu: bool = False) -> Tensor:
    """``x weight^T + bias``, and its positive part if `relu`: (S, N, k), (S, n, k), (S, n) to (S, N, n)."""
    if _onednn(x):
        return _product(x, weight[0], bias[0], "relu" if relu else "none")
    out = torch.baddbmm(bias.unsqueeze(1), x, weight.mT)
    return out.relu_() if relu else out


def linear_onto(base: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Add a sublayer's output to its residual: ``base + x weight^T + bias``, base (S, N, n)."""
    if _onednn(x):
        total: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, base, weight[0], bias[0], "add")
        return total
    return torch.baddbmm(base, x, weight.mT).add_(bias.unsqueeze(1))


def into_input(grad: Tensor, weight: Tensor) -> Tensor:
    """Gradient of `linear`'s input, ``grad weight``: (S, N, n), (S, n, k) to (S, N, k)."""
    if _onednn(grad):
        return _product(grad, weight[0].mT)
    return torch.bmm(grad, weight)


def into_weight(grad: Tensor, x: Tensor) -> Tensor:
    """Gradient of `linear`'s weight, ``grad^T x``: (S, N, n), (S, N, k) to (S, n, k)."""
    if _onednn(grad):
        # oneDNN copies a transposed first factor: let it be the narrow one.
        if grad.shape[2] <= x.shape[2]:
            return _product(grad.mT, x[0].mT)
        return _product(x.mT, grad[0].mT).mT.contiguous()
    return torch.bmm(grad.mT, x)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """LayerNorm over the last axis, (S, N, d) with (S, d) scales, and what its gradient needs."""
    shape = [x.shape[-1]]
    if len(x) == 1:
        y, mean, rstd = torch.native_layer_norm(x, shape, weight[0], bias[0], 1e-5)
    else:
        y, mean, rstd = torch.native_layer_norm(x, shape, None, None, 1e-5)
        y = torch.addcmul(bias.unsqueeze(1), y, weight.unsqueeze(1))
    return y, (x, mean, rstd)


def layer_norm_gradient(
    grad: Tensor, saved: tuple[Tensor, ...], weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `layer_norm`'s input (S, N, d), weight (S, d) and bias (S, d)."""
    x, mean, rstd = saved
    shape = [x.shape[-1]]
    if len(x) == 1:
        dx, dw, db = torch.ops.aten.native_layer_norm_backward(
            grad, x, shape, mean, rstd, weight[0], bias[0], [True, True, True]
        )
        return dx, dw.unsqueeze(0), db.unsqueeze(0)
    normal = (x - mean) * rstd
    dw, db = (grad * normal).sum(1), grad.sum(1)
    dx, _, _ = torch.ops.aten.native_layer_norm_backward(
        grad * weight.unsqueeze(1), x, shape, mean, rstd, None, None, [True, False, False]
    )
    return dx, dw, db


def take_rows(table: Tensor, index: Tensor) -> Tensor:
    """Rows of (S, R, d) at (S, N): (S, N, d)."""
    if len(table) == 1:
        return table[0].index_select(0, index[0]).unsqueeze(0)
    return table.gather(1, index.unsqueeze(2).expand(-1, -1, table.shape[2]))


def add_rows(table: Tensor, index: Tensor, rows: Tensor) -> None:
    """Add (S, N, d) to the rows of (S, R, d) at (S, N), in place: the gradient of `take_rows`."""
    if table.device.type != "cpu":
        add_in_order(table, index, rows)
    elif len(table) == 1:
        table[0].index_add_(0, index[0], rows[0])
    else:
        table.scatter_add_(1, index.unsqueeze(2).expand(-1, -1, table.shape[2]), rows)


def add_numbers(table: Tensor, index: Tensor, numbers: Tensor) -> None:
    """Add (S, h, N) to (S, h, R) at (S, h, N), in place."""
    if table.device.type != "cpu":
        add_in_order(table.view(-1, table.shape[2]), index.flatten(0, 1), numbers.flatten(0, 1))
    else:
        table.scatter_add_(2, index, numbers)


def add_in_order(table: Tensor, index: Tensor, values: Tensor) -> None:
    """Add (G, N, ...) to (G, R, ...) at (G, N), in place, with the same bits every time.

    For a GPU, where `scatter_add_` and `index_add_` add in the order in which threads happen to arrive: here the
    places are sorted first. Unsafe means that no index is checked: the check reads the greatest one on the host,
    which stops it and cannot be captured in a graph.
    """
    groups, rows = table.shape[:2]
    places = index + torch.arange(0, groups * rows, rows, device=index.device).unsqueeze(1)
    torch.ops.aten._index_put_impl_(
        table.view(-1, *table.shape[2:]),
        [places.view(-1)],
        values.flatten(0, 1),
        accumulate=True,
        unsafe=True,
    )
