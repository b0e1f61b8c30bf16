"""Centred covariance of activations in float64, on whichever side is smaller.

``C = (1/n) sum (h_i - mean)(h_i - mean)^T``, rows are samples. Products and sums are float64 whatever comes in;
float16, bfloat16 and float32 products are exact there, so the only error is that of the float64 sum. Centring is by a
shift first, so an offset of 1e7 times the spread costs no digits. For n < d the n x n Gram matrix of the
centred rows has the same non-zero spectrum and costs less.

Two backends compute the same: Triton kernels on CUDA (`fastent.kernels`), torch on any device.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from fastent import linalg
from fastent.activations import (
    Array,
    Positions,
    RealTokens,
    Resolution,
    Rows,
    Tokens,
    first_nonfinite,
    of_array,
)
from fastent.linalg import Side
from fastent.process import uncompiled, warn_of_detached

Backend = Literal["auto", "torch", "triton"]
BACKENDS = get_args(Backend)
MIRRORED_AT_ONCE = 32  # edge of a block
_ABOVE = ~np.tri(MIRRORED_AT_ONCE, dtype=bool)  # above the diagonal


class CenteredMatrix(NamedTuple):
    """A float64 matrix with the non-zero spectrum of the covariance, and where it came from.

    Attributes
    ----------
    matrix : Tensor, shape (..., m, m)
        float64; only the lower triangle is meaningful. m is d for the covariance, n for the Gram matrix.
    shift, delta : Tensor, shape (..., d)
        Their sum is the mean of the rows, float64; apart, since the sum rounds at the size of the offset.
    side : {"covariance", "gram"}
        Which of the two `matrix` is.
    n, d : int
        Samples and features.
    resolution : Resolution
        Of the input's dtype: what it could not tell apart, this cannot either.
    rounding : Tensor, shape (), optional
        Variance that rounding added, in units of the trace, where it is known from many parts.
    entries : Tensor, shape (k, d), optional
        Some of the input where the rest is gone, for `fastent.activations.held_dtype`.
    """

    matrix: Tensor
    shift: Tensor
    delta: Tensor
    side: Side
    n: int
    d: int
    resolution: Resolution
    rounding: Tensor | None = None
    entries: Tensor | None = None

    @property
    def trace(self) -> Tensor:
        """Total variance, shape (...,), in units of the input squared."""
        return (
            self.matrix.trace() if self.matrix.ndim == 2 else self.matrix.diagonal(dim1=-2, dim2=-1).sum(-1)
        )

    def where_solved(self) -> CenteredMatrix:
        """Return it where its eigenvalues are taken: for LAPACK on the host, by one copy and one wait."""
        if not self.matrix.is_cuda or self.matrix.shape[-1] > linalg.LAPACK_TO:
            return self
        parts = [self.matrix, self.shift, self.delta, *([] if self.rounding is None else [self.rounding])]
        block = torch.cat([part.flatten() for part in parts]).cpu()
        pieces = block.split([part.numel() for part in parts])  # type: ignore[no-untyped-call]
        names = ("matrix", "shift", "delta", "rounding")
        return self._replace(
            **{name: piece.view(part.shape) for name, piece, part in zip(names, pieces, parts, strict=False)}
        )


@uncompiled
def covariance(
    h: Tensor | Array,
    *,
    correction: int = 0,
    tokens: Tokens | None = None,
    positions: Positions | None = None,
    channel_axis: int | None = None,
    mask: Tensor | Array | RealTokens | None = None,
    batch_dims: int = 0,
    backend: Backend = "auto",
) -> Tensor:
    """Covariance of activations, centred exactly and accumulated in float64.

    Parameters
    ----------
    h : Tensor or ndarray, shape (n, d), or (batch, n, d) with ``batch_dims=1``
        Activations, one sample per row; any real dtype, device and strides. (n, tokens, d) needs `tokens`.
    correction : int
        The normaliser is ``n - correction``: 0 as in the paper, 1 for the unbiased estimate.
    tokens, positions, channel_axis, mask
        What to make of a token axis, of a map, and of padding: as in `fastent.spectral_entropy`.
    batch_dims : {0, 1}
        1 when the first axis counts independent matrices.
    backend : {"auto", "torch", "triton"}
        "auto" takes Triton on CUDA from sm_80 on and torch elsewhere; "triton" raises where it cannot run.

    Returns
    -------
    Tensor, shape (d, d) or (batch, d, d), float64
        Symmetric bit for bit, on the device of `h`, in units of `h` squared.

    Raises
    ------
    TypeError, ValueError
        For unusable input (as `fastent.spectral_entropy`), NaN or Inf in it, or ``n <= correction``.
    OverflowError
        If the squares leave float64's range: values near 1e200 or 1e-200.

    Warns
    -----
    UserWarning
        Once, if `h` requires a gradient while gradients are recorded: none flows through the result.

    References
    ----------
    Chan, Golub and LeVeque, "Algorithms for computing the sample variance", 1983; arXiv 2604.13123, Definition 1.

    Examples
    --------
    >>> import torch
    >>> covariance(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]))
    tensor([[0.5000, 0.0000],
            [0.0000, 0.5000]], dtype=torch.float64)
    """
    if not isinstance(h, Tensor):
        h = of_array(h, "h")
    elif h.requires_grad and torch.is_grad_enabled():
        warn_of_detached("covariance")
    x = Rows(tokens, positions, channel_axis, mask).matrix(h, batch_dims)
    n = x.shape[-2]
    if not correction < n:
        raise ValueError(
            f"the normaliser is n - correction and must be positive; got n = {n}, correction = {correction}"
        )
    centered = centered_matrix(x, backend=backend, side="covariance", scale=1.0 / (n - correction))
    _refuse_out_of_range(centered, x)
    return mirror_lower(centered.matrix)


def centered_matrix(
    x: Tensor,
    *,
    backend: Backend = "auto",
    side: Side | None = None,
    scale: float | None = None,
    exact_mean: bool = False,
    resolution: Resolution | None = None,
) -> CenteredMatrix:
    """Covariance, or for n < d Gram matrix, of checked activations; the way to every spectrum.

    Parameters
    ----------
    x : Tensor, shape (n, d) or (batch, n, d)
        What `fastent.activations.Rows.matrix` returned.
    backend : {"auto", "torch", "triton"}
        See `covariance`.
    side : {"covariance", "gram"}, optional
        The smaller one by default.
    scale : float, optional
        Factor of the sum of products; 1/n by default.
    exact_mean : bool
        Give the mean beyond the rounding of one float64, as merging parts at a large offset needs. The kernels
        always do; only the covariance side has it.
    resolution : Resolution, optional
        Of the activations that `x` was made of; that of its own dtype by default.

    Returns
    -------
    CenteredMatrix
        On the device of `x`; nothing was checked for range.
    """
    n, d = x.shape[-2:]
    side = side or ("gram" if n < d else "covariance")
    scale = 1.0 / n if scale is None else scale
    if _use_triton(x, backend):
        if side == "gram":
            from fastent.kernels.covariance import gram

            matrix, shift = gram(x, scale=scale)
            delta = torch.zeros_like(shift)
        else:
            from fastent.kernels.covariance import shifted_covariance

            matrix, shift, delta = shifted_covariance(x, scale=scale)
    else:
        parts = [
            linalg.centred_gram(item, scale)
            if side == "gram"
            else linalg.centred_covariance(item, scale, exact_mean=exact_mean)
            for item in (x if x.ndim == 3 else (x,))
        ]
        if x.ndim == 3:
            matrix, shift, delta = (torch.stack(part) for part in zip(*parts, strict=True))
        else:
            ((matrix, shift, delta),) = parts
    return CenteredMatrix(matrix, shift, delta, side, n, d, resolution or Resolution.of(x.dtype))


def mirror_lower(matrix: Tensor) -> Tensor:
    """Symmetric matrix from its lower triangle, whatever the upper one holds; shape (..., m, m).

    The memory of `matrix` may become that of the result: on the CPU it is done in place, in blocks that stay in the
    cache, and by NumPy, whose copies start sooner than torch's.
    """
    if matrix.device.type != "cpu":
        return matrix.tril() + matrix.tril(-1).mT
    whole = matrix.numpy()
    m = whole.shape[-1]
    for low in range(0, m, MIRRORED_AT_ONCE):
        high = min(low + MIRRORED_AT_ONCE, m)
        if low:
            whole[..., :low, low:high] = whole[..., low:high, :low].swapaxes(-1, -2)
        block = whole[..., low:high, low:high]
        np.copyto(block, block.swapaxes(-1, -2).copy(), where=_ABOVE[: high - low, : high - low])
    return matrix


def _refuse_out_of_range(centered: CenteredMatrix, x: Tensor) -> None:
    trace = centered.trace
    if x.ndim == 2 and torch.finfo(torch.float64).tiny <= float(trace) < torch.inf:
        return
    bad = ~((trace >= torch.finfo(torch.float64).tiny) & (trace < torch.inf))
    if not bool(bad.any()):
        return
    found = first_nonfinite(x)
    if found is not None:
        raise ValueError(f"h holds {found[0]} NaN or Inf ({x.dtype}); the first is at {found[1]}")
    constant = (x == x[..., :1, :]).flatten(-2).all(-1)  # whose covariance is truly 0
    if bool((bad & ~constant).any()):
        seen = trace[bad & ~constant].flatten()[0].item()
        raise OverflowError(
            f"the squares of h leave float64's range (total variance {seen:.3g}); multiply h by a power of two first"
        )


def _use_triton(x: Tensor, backend: Backend) -> bool:
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}; got {backend!r}")
    if backend == "torch" or (backend == "auto" and not x.is_cuda):
        return False
    obstacle = triton_obstacle(x.device)
    if obstacle is None:
        return True
    if backend == "triton":
        raise RuntimeError(f'backend="triton" cannot run: {obstacle}; use backend="torch"')
    _warn_once(obstacle)
    return False


def triton_obstacle(device: torch.device) -> str | None:
    """Why the Triton kernels cannot run on `device`, in a sentence; None when they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cpu":
        return (
            None
            if os.environ.get("TRITON_INTERPRET") == "1"
            else "the tensor is on the CPU, without TRITON_INTERPRET=1"
        )
    if device.type != "cuda":
        return f"the tensor is on {device.type}"
    return _cuda_obstacle(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _cuda_obstacle(index: int) -> str | None:
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        return f"the GPU is sm_{major}{minor}, and fp64 matrix instructions start at sm_80"
    try:  # one small launch: a compiler that fails must not stop a training run later
        from fastent.kernels import covariance as kernels

        kernels.covariance(torch.zeros((2, 2), dtype=torch.float32, device=f"cuda:{index}"), scale=0.5)
    except Exception as error:  # whatever the compiler raises, the torch path still works
        return f"a trial compilation failed: {type(error).__name__}: {error}"
    return None


@functools.cache
def _warn_once(obstacle: str) -> None:
    warnings.warn(
        f"fastent uses torch instead of its Triton kernels: {obstacle}", RuntimeWarning, stacklevel=2
    )
