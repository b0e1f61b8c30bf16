"""Spectral entropy of activations: from what a layer gave to the result, whatever the input.

The covariance (`fastent.covariance`), its eigenvalues (`fastent.eigenvalues`), the numbers (`fastent.spectrum`); and
the inputs that take more than that, whose squares leave float64's range.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from typing import Any

import torch
from torch import Tensor

from fastent.activations import Positions, RealTokens, Tokens, first_nonfinite, matrix_of, resolution_of
from fastent.covariance import Backend, CenteredMatrix, centered_matrix
from fastent.eigenvalues import eigenvalues
from fastent.rounding import Resolution
from fastent.spectrum import (
    CONVENTIONS,
    PAPER_FLOOR,
    TINY,
    Convention,
    SpectralEntropy,
    Status,
    constant_rows,
    summarize,
    unsolved,
)
from fastent.uncompiled import uncompiled
from fastent.user_warning import warn_of_detached


@uncompiled
def spectral_entropy(
    h: Tensor,
    *,
    convention: Convention = "relative",
    tokens: Tokens | None = None,
    positions: Positions | None = None,
    channel_axis: int | None = None,
    mask: Tensor | RealTokens | None = None,
    batch_dims: int = 0,
    backend: Backend = "auto",
) -> SpectralEntropy:
    """Entropy of the covariance spectrum of `h`.

    Parameters
    ----------
    h : Tensor, shape (n, d), or (batch, n, d) with ``batch_dims=1``
        Activations, one sample per row; any real dtype, device and strides.
    convention : {"relative", "paper"}
        "paper" clamps eigenvalues at an absolute 1e-12 and adds 1e-12 inside the logarithm, as printed in the
        paper's Appendix B. For comparison only: constant rows score 1, and H depends on the scale.
    tokens : {"flatten", "first", "last", "mean", "skip_first"}, optional
        What to make of a (n, tokens, d) input: each token a row, one token of each sample, their mean, or each token
        but the first of its sample (`fastent.activations.matrix_of`).
    positions : {"flatten", "mean"}, optional
        What to make of a map with channels, such as (n, c, height, width): each position a row, or their mean.
    channel_axis : int, optional
        The axis of `h` that holds the features of a map; goes with `positions`.
    mask : Tensor, shape (n, tokens), optional
        True or 1 for a real token, False or 0 for padding, wherever it is; goes with `tokens`. Padding counts for
        nothing, whatever it holds: "first" and "last" are real tokens, "mean" is over real ones. A
        `fastent.activations.RealTokens` is checked once for many calls.
    batch_dims : {0, 1}
        1 when the first axis counts independent matrices (layers, seeds).
    backend : {"auto", "torch", "triton"}
        See `fastent.covariance`.

    Returns
    -------
    SpectralEntropy
        Floats, or tensors of shape (batch,). On CUDA this waits for the device.

    Raises
    ------
    TypeError
        If `h` or `mask` is not a dense real tensor with data.
    ValueError
        If the shape is wrong or leaves a choice open, n < 2, d < 2, an argument is unknown, or `mask` has another shape
        or device, other values, or no real token where one is asked for.

    Warns
    -----
    UserWarning
        Once, if `h` requires a gradient while gradients are recorded: none flows through the result.

    References
    ----------
    arXiv 2604.13123, Definition 2; Roy and Vetterli, "The effective rank", EUSIPCO 2007.

    Examples
    --------
    >>> import torch
    >>> h = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    >>> spectral_entropy(h).normalized
    1.0
    >>> spectral_entropy(torch.ones(4, 2)).status
    <Status.ZERO_VARIANCE: 'zero_variance'>
    """
    if isinstance(h, Tensor) and h.requires_grad and torch.is_grad_enabled():
        warn_of_detached("spectral_entropy")
    if convention not in CONVENTIONS:
        raise ValueError(f"convention must be 'relative' or 'paper'; got {convention!r}")
    x = checked(
        h,
        tokens=tokens,
        positions=positions,
        channel_axis=channel_axis,
        mask=mask,
        batch_dims=batch_dims,
    )
    resolution = resolution_of(
        h, tokens=tokens, positions=positions, channel_axis=channel_axis, mask=mask, batch_dims=batch_dims
    )
    return entropy_of_rows(x, resolution, convention=convention, backend=backend)


def entropy_of_rows(
    x: Tensor, resolution: Resolution, *, convention: Convention = "relative", backend: Backend = "auto"
) -> SpectralEntropy:
    """Entropy of activations that were `checked`, with the resolution of what they were made of."""
    centered = centered_matrix(x, backend=backend, resolution=resolution)
    if x.ndim == 2:
        trace = float(centered.trace)
        if TINY <= trace < math.inf:
            return summarize(centered, *eigenvalues(centered), trace, convention, rows=x)
        return _of_extreme_values(x, centered, convention, backend)
    traces = centered.trace.tolist()
    good = [TINY <= trace < math.inf for trace in traces]
    if not all(good):  # a NaN would stop the solver for the whole batch
        kept = torch.tensor(good, dtype=torch.bool, device=x.device)[:, None, None]
        centered = dataclasses.replace(centered, matrix=torch.where(kept, centered.matrix, 0.0))
    values, solver = eigenvalues(centered)
    items = []
    for i, trace in enumerate(traces):
        item = dataclasses.replace(
            centered, matrix=centered.matrix[i], shift=centered.shift[i], delta=centered.delta[i]
        )
        if good[i]:
            items.append(summarize(item, values[i], solver, trace, convention, rows=x[i]))
        else:
            items.append(_of_extreme_values(x[i], item, convention, backend))
    return _stack(items)


def checked(
    h: Tensor,
    *,
    tokens: Tokens | None = None,
    positions: Positions | None = None,
    channel_axis: int | None = None,
    mask: Tensor | RealTokens | None = None,
    batch_dims: int | None = None,
) -> Tensor:
    """Activations that a normalised entropy can be taken of; arguments and errors as in `spectral_entropy`."""
    x = matrix_of(
        h,
        tokens=tokens,
        positions=positions,
        channel_axis=channel_axis,
        mask=mask,
        batch_dims=batch_dims,
    )
    if x.shape[-1] < 2:
        raise ValueError("the normalised entropy divides by log d, so d must be at least 2; got d = 1")
    return x


def _of_extreme_values(
    x: Tensor, centered: CenteredMatrix, convention: Convention, backend: Backend
) -> SpectralEntropy:
    """Entropy where the trace was 0, subnormal or not finite: look at the data, scale by a power of two, redo."""
    found = first_nonfinite(x)
    if found is not None:
        count, index = found
        message = f"{count} NaN or Inf in the activations ({x.dtype}), the first at {index}"
        return unsolved(centered, Status.NONFINITE, math.nan, message, convention)
    if not bool((x != x[:1]).any()):
        return constant_rows(centered, convention)
    # Near 1 first, so that row 0 can be subtracted; then the spread near 1, far below a constant column perhaps.
    small, first = _near_one(x.to(torch.float64))
    spread, second = _near_one(small - small[:1])
    exponent = first + second
    scaled = centered_matrix(spread, backend=backend)
    given = centered.resolution
    scaled = dataclasses.replace(
        scaled,
        shift=_times_power_of_two(small[0], -second),
        resolution=given._replace(absolute=_ldexp(given.absolute, -exponent)),
    )
    floor = math.ldexp(PAPER_FLOOR, min(-2 * exponent, 1000))  # from 1 on it clamps every eigenvalue
    again = summarize(scaled, *eigenvalues(scaled), float(scaled.trace), convention, floor)
    total = _times_power_of_two(scaled.trace.cpu(), 2 * exponent)
    values = _times_power_of_two(again.eigenvalues, 2 * exponent)
    return dataclasses.replace(again, eigenvalues=values, total_variance=float(total))


def _near_one(x: Tensor) -> tuple[Tensor, int]:
    """`x` with its largest magnitude in [1/2, 1), and the exponent of two that was taken out."""
    exponent = math.frexp(float(x.abs().amax()))[1]
    return _times_power_of_two(x, -exponent), exponent


def _times_power_of_two(x: Tensor, exponent: int) -> Tensor:
    """``x * 2^exponent`` in steps whose factors are floats: one of 2^1074 is not, but a product may be."""
    step = max(-1000, min(1000, exponent))
    return x * 2.0**step if step == exponent else _times_power_of_two(x * 2.0**step, exponent - step)


def _ldexp(x: float, exponent: int) -> float:
    """``x * 2^exponent``, infinite where it is too large for a float."""
    return math.inf if x and math.frexp(x)[1] + exponent > sys.float_info.max_exp else math.ldexp(x, exponent)


def _stack(items: list[SpectralEntropy]) -> SpectralEntropy:
    def column(name: str) -> Tensor:
        return torch.tensor([getattr(item, name) for item in items], dtype=torch.float64, device="cpu")

    flags = sorted({flag for item in items for flag in item.flags}, key=lambda flag: flag.severity)
    messages = dict.fromkeys(item.message for item in items if item.message)
    changes: dict[str, Any] = {
        name: column(name)
        for name in ("normalized", "entropy", "effective_rank", "participation_ratio", "total_variance")
    }
    return dataclasses.replace(
        items[0],
        eigenvalues=torch.stack([item.eigenvalues for item in items]),
        status=max((item.status for item in items), key=lambda status: status.severity),
        flags=tuple(flags),
        message="; ".join(messages),
        solver=", ".join(dict.fromkeys(item.solver for item in items)),
        _items=tuple(items),
        **changes,
    )
