"""Rows of activations, taken one by one: tokens of padded samples, positions of maps.

Slow and obvious: loops over samples, tokens and positions. What padding holds is never looked at.
"""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import ArrayLike

from .covariance import Array

__all__ = ["rows_of_map", "rows_of_tokens"]


def rows_of_tokens(h: ArrayLike, tokens: str, mask: ArrayLike | None = None) -> Array:
    """Rows of (n, tokens, d) activations.

    Parameters
    ----------
    h : array_like, shape (n, tokens, d)
        Activations.
    tokens : {"flatten", "first", "last", "mean", "skip_first"}
        Every real token; the first or last real one of each sample; their mean; every real one but the first.
    mask : array_like, shape (n, tokens), optional
        True or 1 for a real token. All are, if left out.

    Returns
    -------
    ndarray, shape (k, d), float64
        In the order of samples, then tokens.

    Raises
    ------
    ValueError
        If `tokens` is unknown, or asks for a token of a sample that has no real one.
    """
    h = np.asarray(h)
    real = np.ones(h.shape[:2], bool) if mask is None else np.asarray(mask) == 1
    found = []
    for sample, kept in zip(h, real, strict=True):
        own = [token.astype(np.float64) for token, counts in zip(sample, kept, strict=True) if counts]
        if tokens == "flatten":
            found += own
        elif tokens == "skip_first":
            found += own[1:]
        elif tokens not in ("first", "last", "mean"):
            raise ValueError(f"unknown choice of tokens: {tokens!r}")
        elif not own:
            raise ValueError(f"tokens={tokens!r} needs a real token in each sample")
        else:
            found.append(
                own[0] if tokens == "first" else own[-1] if tokens == "last" else np.mean(own, axis=0)
            )
    return np.array(found, dtype=np.float64).reshape(-1, h.shape[2])


def rows_of_map(h: ArrayLike, positions: str, channel_axis: int) -> Array:
    """Rows of a map with channels.

    Parameters
    ----------
    h : array_like, shape (n, ...)
        Activations; one axis counts channels, the others positions.
    positions : {"flatten", "mean"}
        Every position a row, or their mean in each sample.
    channel_axis : int
        The axis of channels, 1 or more.

    Returns
    -------
    ndarray, shape (k, channels), float64
        In the order of samples, then positions.
    """
    h = np.asarray(h)
    sizes = [size for axis, size in enumerate(h.shape) if axis not in (0, channel_axis)]
    found = []
    for sample in h:
        own = []
        for place in itertools.product(*map(range, sizes)):
            index: list[int | slice] = list(place)
            index.insert(channel_axis - 1, slice(None))
            own.append(sample[tuple(index)].astype(np.float64))
        found += own if positions == "flatten" else [np.mean(own, axis=0)]
    return np.array(found, dtype=np.float64)
