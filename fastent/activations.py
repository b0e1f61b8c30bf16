"""Checks and token choice: whatever a layer gave, made an (n, d) or (batch, n, d) matrix of activations.

Bad input stops here, with the rule, the value seen and the remedy. Rows are samples. Nothing is copied unless
it must be: an exact cast of integers, a move off MPS (which has no float64), a choice of tokens. The data are
not read, except for the range of int64 input, so this costs no host synchronisation.
"""

from __future__ import annotations

import sys
from typing import Literal, get_args

import torch
from torch import Tensor

Tokens = Literal["flatten", "last", "mean", "skip_first"]

_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INT64_EXACT = 2**53


def matrix_of(h: Tensor, *, tokens: Tokens | None = None, batch_dims: int = 0) -> Tensor:
    """Check activations and bring them into the shape that everything after this expects.

    Parameters
    ----------
    h : Tensor, shape (n, d), (batch, tokens, d), or with one leading batch axis
        Activations of any real dtype on any device; any strides.
    tokens : {"flatten", "last", "mean", "skip_first"}, optional
        What to make of a (samples, tokens, d) input: every token a row; the last token; the mean over tokens
        (in float64); every token but the first (the attention sink of language models).
    batch_dims : {0, 1}
        1 when the first axis counts independent matrices (layers, seeds).

    Returns
    -------
    Tensor, shape (n, d) or (batch, n, d)
        float16, bfloat16, float32 or float64, detached from autograd.

    Raises
    ------
    TypeError
        If `h` is not a dense real tensor that holds data.
    ValueError
        If its shape leaves a choice open, has fewer than two rows or no column, or an int64 is beyond 2^53.
    """
    _check_kind(h)
    if tokens is not None and tokens not in get_args(Tokens):
        raise ValueError(f"tokens must be one of {', '.join(map(repr, get_args(Tokens)))}; got {tokens!r}")
    if batch_dims not in (0, 1):
        raise ValueError(f"batch_dims must be 0 or 1; got {batch_dims!r}")
    h = _exact_float(h.detach())
    x = _choose_tokens(h, tokens, batch_dims)
    n, d = x.shape[-2:]
    if n < 2:
        raise ValueError(
            f"a covariance needs at least 2 samples (rows); got N = {n} from shape {tuple(h.shape)}"
        )
    if d < 1:
        raise ValueError(f"activations need at least one column; got shape {tuple(h.shape)}")
    if x.ndim == 3 and x.shape[0] < 1:
        raise ValueError(f"the batch axis is empty; got shape {tuple(h.shape)}")
    return x


def first_nonfinite(x: Tensor) -> tuple[int, tuple[int, ...]] | None:
    """Count NaN and Inf in `x` and find the first, or None when all are finite. Reads all of `x`."""
    bad = ~torch.isfinite(x)
    count = int(bad.sum())
    if count == 0:
        return None
    flat = int(bad.reshape(-1).to(torch.uint8).argmax())
    index = []
    for size in reversed(x.shape):
        flat, i = divmod(flat, size)
        index.append(i)
    return count, tuple(reversed(index))


def _check_kind(h: Tensor) -> None:
    if not isinstance(h, Tensor):
        remedy = "; use torch.from_numpy(h)" if type(h).__module__ == "numpy" else ""
        raise TypeError(f"h must be a torch.Tensor; got {type(h).__name__}{remedy}")
    # A fake tensor can exist only when its module has been imported: no import of ours for the check.
    fake = sys.modules.get("torch._subclasses.fake_tensor")
    if h.is_meta or (fake is not None and isinstance(h, fake.FakeTensor)):
        raise TypeError(
            "h is a meta or fake tensor: it has a shape but no data; run the model on real tensors"
        )
    if h.is_nested:
        raise TypeError("h is a nested tensor: use h.values(), whose rows are its tokens")
    if h.layout != torch.strided:
        raise TypeError(f"h must be dense; got layout {h.layout}: use h.to_dense()")
    if h.is_quantized:
        raise TypeError(f"h is quantised ({h.dtype}): use h.dequantize()")
    if hasattr(h, "full_tensor"):
        raise TypeError(
            "h is a DTensor: use h.full_tensor(), or fastent.Moments over h.to_local() for row shards"
        )
    if h.is_complex():
        raise TypeError(f"h is complex ({h.dtype}): use torch.view_as_real(h).flatten(-2), or its abs()")


def _exact_float(h: Tensor) -> Tensor:
    if h.device.type == "mps":  # no float64 there
        h = h.cpu()
    if h.dtype in _KERNEL_DTYPES:
        return h
    if h.is_floating_point():  # float8: every value is exact in float32
        return h.to(torch.float32)
    if h.dtype == torch.int64 and h.numel() and max(-int(h.min()), int(h.max())) > _INT64_EXACT:
        raise ValueError("h holds int64 values beyond 2^53, which float64 cannot represent; scale them down")
    return h.to(torch.float64)


def _choose_tokens(h: Tensor, tokens: Tokens | None, batch_dims: int) -> Tensor:
    dims = h.ndim - batch_dims
    shape = tuple(h.shape)
    if dims == 2:
        if tokens is not None:
            raise ValueError(
                f"tokens={tokens!r} needs h of shape (samples, tokens, d); got {shape}: leave it out"
            )
        return h
    if dims != 3:
        wanted = "(n, d)" if batch_dims == 0 else "(batch, n, d)"
        raise ValueError(f"h must have shape {wanted}; got {shape}")
    if tokens is None:
        choices = 'tokens="flatten", "last", "mean", "skip_first"' + (
            ", or batch_dims=1" if not batch_dims else ""
        )
        raise ValueError(f"h must have shape (n, d); got {shape}. Say which: {choices}")
    if h.shape[-2] < (2 if tokens == "skip_first" else 1):
        raise ValueError(f"tokens={tokens!r} needs more tokens than shape {shape} has")
    if tokens == "last":
        return h[..., -1, :]
    if tokens == "mean":
        return h.mean(-2, dtype=torch.float64)
    if tokens == "skip_first":
        h = h[..., 1:, :]
    return h.flatten(-3, -2)
