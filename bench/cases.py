"""The one table of cases: shapes that are timed, and inputs, easy and hard, whose answers are compared with truth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Shape:
    """Normal entries of one shape and dtype; `quick` ones are measured by ``--quick`` too."""

    n: int
    d: int
    dtype: str = "float32"
    quick: bool = False

    def tensor(self) -> Tensor:
        """Activations (n, d)."""
        return torch.randn(self.n, self.d, generator=torch.Generator().manual_seed(0)).to(DTYPES[self.dtype])

    @property
    def columns(self) -> dict[str, object]:
        """Columns of a row."""
        return {"n": self.n, "d": self.d, "dtype": self.dtype}


SHAPES = (
    Shape(512, 64),
    Shape(512, 128, quick=True),
    Shape(512, 128, "bfloat16"),
    Shape(512, 128, "float64"),
    Shape(512, 256),
    Shape(512, 512),
    Shape(512, 768),
    Shape(4096, 128, quick=True),
    Shape(65536, 128),
    Shape(512, 1024, quick=True),
    Shape(512, 4096),
)


@dataclass(frozen=True)
class Input:
    """Activations whose entropy is known to many digits.

    Attributes
    ----------
    name : str
        What is easy or hard about it.
    make : callable
        From a generator to activations (n, d).
    """

    name: str
    make: Callable[[torch.Generator], Tensor]

    def tensor(self) -> Tensor:
        """Activations (n, d), the same ones each time."""
        return self.make(torch.Generator().manual_seed(1))


def planted(g: torch.Generator, n: int, d: int) -> Tensor:
    """Float64 rows with a decaying spectrum, ``1 / (1 + i)``, in a rotated basis."""
    basis = torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64))[0]
    shares = 1.0 / torch.arange(1, d + 1, dtype=torch.float64)
    return (torch.randn(n, d, generator=g, dtype=torch.float64) * shares.sqrt()) @ basis


def _duplicates(g: torch.Generator) -> Tensor:
    return planted(g, 8, 64).repeat(64, 1).float()


INPUTS = (
    Input("easy", lambda g: planted(g, 512, 64).float()),
    Input("easy, float64", lambda g: planted(g, 512, 64)),
    Input("bfloat16", lambda g: planted(g, 512, 64).bfloat16()),
    Input("offset 1e6", lambda g: (planted(g, 512, 64) + 1e6).float()),
    Input("offset 1e6, float64", lambda g: planted(g, 512, 64) + 1e6),
    Input("scale 1e-7", lambda g: (planted(g, 512, 64) * 1e-7).float()),
    Input("N < d", lambda g: planted(g, 24, 64).float()),
    Input("duplicates", _duplicates),
    Input("constant rows", lambda g: torch.full((512, 64), 0.1)),
)
