"""Activation matrices described by their structure: shape, spectrum, offset, scale, dtype, stride, seed.

A failing example prints as one line that rebuilds it, and shrinks towards small, plain and unscaled. Nothing
is drawn entry by entry: random entries all have the same, well-conditioned spectrum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

# Spectra of r eigenvalues, the largest about 1. Those of TAME, and their products, stay far above the floor.
SPECTRA = {
    "flat": lambda r: np.ones(r),
    "geometric": lambda r: 0.5 ** np.arange(r),
    "power law": lambda r: (1.0 + np.arange(r)) ** -2,
    "clustered": lambda r: np.where(np.arange(r) < r / 2, 1.0, 1e-4) * (1 + 1e-9 * np.arange(r)),
    "one large": lambda r: np.where(np.arange(r) == 0, 1.0, 1e-6),
    "rank one": lambda r: np.where(np.arange(r) == 0, 1.0, 0.0),
    "zero": lambda r: np.zeros(r),
    "through the floor": lambda r: 10.0 ** -np.linspace(0, 20, r),
}
TAME = ("flat", "geometric", "power law", "clustered", "one large")

LAYOUTS = (
    "contiguous",
    "transposed",
    "padded rows",
    "every other column",
    "strided both ways",
    "expanded columns",
    "expanded rows",
)

# Offsets (in units of the spread) and exponents of scale (powers of ten) that a dtype can hold.
RANGE = {
    torch.float64: ((0.0, 1.0, 1e3, 1e6), 150),
    torch.float32: ((0.0, 1.0, 1e3, 1e6), 30),
    torch.bfloat16: ((0.0, 1.0, 1e2), 30),
    torch.float16: ((0.0, 1.0, 1e2), 1),
}


@dataclass(frozen=True)
class Activations:
    """An (n, d) matrix of planted spectrum."""

    n: int = 8
    d: int = 4
    spectrum: str = "flat"
    offset: float = 0.0  # mean of each column, in units of the root mean square spread
    scale: float = 1.0
    dtype: torch.dtype = torch.float64
    layout: str = "contiguous"
    seed: int = 0

    @property
    def shares(self) -> np.ndarray:
        """Planted eigenvalues over their sum, descending; min(n - 1, d) of them, zeros when all are."""
        lam = SPECTRA[self.spectrum](min(self.n - 1, self.d))
        return lam / max(lam.sum(), np.finfo(float).tiny)

    def array(self) -> np.ndarray:
        """The matrix in float64, before any cast; its spread (root mean variance of a column) is `scale`."""
        rng = np.random.default_rng(self.seed)
        r = min(self.n - 1, self.d)
        basis = np.linalg.qr(np.column_stack([np.ones(self.n), rng.standard_normal((self.n, r))]))[0][:, 1:]
        directions = np.linalg.qr(rng.standard_normal((self.d, self.d)))[0][:, :r]
        y = (basis * np.sqrt(self.n * self.d * self.shares)) @ directions.T
        return (y + self.offset * rng.choice([-1.0, 1.0], self.d)) * self.scale

    def tensor(self) -> Tensor:
        """The matrix in its dtype and layout, amid NaN wherever memory is not part of it."""
        x = torch.from_numpy(self.array()).to(self.dtype)
        n, d = self.n, self.d
        if self.layout == "transposed":
            return x.T.contiguous().T
        if self.layout == "padded rows":
            memory = x.new_full((n, d + 3), torch.nan)
            memory[:, 1 : d + 1] = x
            return memory[:, 1 : d + 1]
        if self.layout == "every other column":
            memory = x.new_full((n + 1, 2 * d), torch.nan)
            memory[1:, 1::2] = x
            return memory[1:, 1::2]
        if self.layout == "strided both ways":
            memory = x.new_full((d, 2 * n), torch.nan)
            memory[:, ::2] = x.T
            return memory[:, ::2].T
        if self.layout == "expanded columns":
            return x[:, :1].clone().expand(n, d)
        if self.layout == "expanded rows":
            return x[:1].clone().expand(n, d)
        return x

    def but(self, **changes: object) -> Activations:
        """The same with some fields replaced."""
        return replace(self, **changes)


seeds = st.integers(0, 2**32 - 1)


@dataclass(frozen=True)
class Padded:
    """Activations (n, tokens, d) of samples of different lengths, with whatever stands at their padding."""

    lengths: tuple[int, ...]  # real tokens of each sample, at least one
    tokens: int
    d: int
    side: str = "right"
    padding: float = 0.0
    dtype: torch.dtype = torch.float64
    mask_dtype: torch.dtype = torch.bool
    sequence_first: bool = False  # in memory; the shape stays
    seed: int = 0

    def mask(self) -> Tensor:
        """1 for a real token, (n, tokens)."""
        rng = np.random.default_rng(self.seed)
        kept = np.zeros((len(self.lengths), self.tokens), bool)
        for row, length in zip(kept, self.lengths, strict=True):
            if self.side == "right":
                row[:length] = True
            elif self.side == "left":
                row[self.tokens - length :] = True
            else:
                row[rng.choice(self.tokens, length, replace=False)] = True
        return torch.from_numpy(kept).to(self.mask_dtype)

    def tensor(self) -> Tensor:
        """The activations; every real token is drawn on its own, with a decaying spectrum and an offset."""
        rng = np.random.default_rng(self.seed + 1)
        scales = 1.0 / (1.0 + np.arange(self.d))
        shape = (len(self.lengths), self.tokens, self.d)
        h = torch.from_numpy(rng.standard_normal(shape) * scales + 0.5).to(self.dtype)
        h[self.mask() != 1] = self.padding
        return h.transpose(0, 1).contiguous().transpose(0, 1) if self.sequence_first else h

    def but(self, **changes: object) -> Padded:
        """The same with some fields replaced."""
        return replace(self, **changes)


@st.composite
def padded(draw: st.DrawFn) -> Padded:
    tokens = draw(st.integers(1, 7), label="tokens")
    return Padded(
        # At least three real tokens beside the first of each sample, so that every choice leaves enough rows.
        lengths=(*draw(st.lists(st.integers(1, tokens), min_size=1, max_size=9)), tokens, tokens, tokens),
        tokens=tokens,
        d=draw(st.integers(2, 9)),
        side=draw(st.sampled_from(["right", "left", "anywhere"])),
        padding=draw(st.sampled_from([0.0, 7.0, math.inf, math.nan])),
        dtype=draw(st.sampled_from(tuple(RANGE))),
        mask_dtype=draw(st.sampled_from([torch.bool, torch.int64, torch.uint8, torch.float32])),
        sequence_first=draw(st.booleans()),
        seed=draw(seeds),
    )


@st.composite
def activations(
    draw: st.DrawFn,
    *,
    max_n: int = 40,
    max_d: int = 24,
    min_n: int = 2,
    spectra: tuple[str, ...] = tuple(SPECTRA),
    dtypes: tuple[torch.dtype, ...] = tuple(RANGE),
    layouts: tuple[str, ...] = LAYOUTS,
    max_offset: float = 1e6,
    scaled: bool = True,
) -> Activations:
    dtype = draw(st.sampled_from(dtypes), label="dtype")
    offsets, exponent = RANGE[dtype]
    return Activations(
        n=draw(st.integers(min_n, max_n)),
        d=draw(st.integers(2, max_d)),
        spectrum=draw(st.sampled_from(spectra)),
        offset=draw(st.sampled_from([offset for offset in offsets if offset <= max_offset])),
        scale=10.0 ** draw(st.integers(-exponent, exponent)) if scaled else 1.0,
        dtype=dtype,
        layout=draw(st.sampled_from(layouts)),
        seed=draw(seeds),
    )


def plain(**limits: object) -> st.SearchStrategy[Activations]:
    """Contiguous float64 near 1, no offset: for properties whose own arithmetic would round otherwise."""
    fixed = {"dtypes": (torch.float64,), "layouts": ("contiguous",), "max_offset": 0.0, "scaled": False}
    return activations(**{**fixed, **limits})  # type: ignore[arg-type]
