"""Padded activations described by their structure, as `fastent.testing.Activations` are."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from fastent.testing import RANGE, seeds


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
        seed=draw(seeds()),
    )
