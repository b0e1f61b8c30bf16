"""The same calls under pytest-benchmark, to compare commits on one machine (`nox -s speed`).

``nox -s speed -- --benchmark-autosave``, and after a change ``nox -s speed -- --benchmark-compare``. `fastent bench`
compares providers with each other, in turn; here each is timed alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from bench.entropy import SIZES
from bench.providers import COVARIANCE, ENTROPY, SHAPES, Provider, Shape, loaded
from fastent.covariance import centered_matrix
from fastent.linalg import eigenvalues

shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s.n}x{s.d}-{s.dtype}")


def call_of(op: str, provider: Provider, h: torch.Tensor) -> Any:
    """Return its function, or skip where it cannot be called: not installed, or without this dtype."""
    call = loaded(op)[provider]
    if isinstance(call, str):
        pytest.skip(call)
    try:
        call(h)
    except TypeError as error:
        pytest.skip(str(error))
    return call


@shapes
@pytest.mark.parametrize("provider", loaded(ENTROPY), ids=lambda provider: provider.name)
def test_entropy(benchmark: Any, provider: Provider, shape: Shape) -> None:
    benchmark.group = f"entropy {shape.columns}"
    h = shape.tensor()
    value = benchmark(call_of(ENTROPY, provider, h), h)
    assert 0 < value < np.log(shape.d) + 0.01  # RankMe adds 1e-5 to each share


@shapes
@pytest.mark.parametrize("provider", loaded(COVARIANCE), ids=lambda provider: provider.name)
def test_covariance(benchmark: Any, provider: Provider, shape: Shape) -> None:
    benchmark.group = f"covariance {shape.columns}"
    h = shape.tensor()
    assert benchmark(call_of(COVARIANCE, provider, h), h).shape == (shape.d, shape.d)


@pytest.mark.parametrize("m", SIZES)
def test_eigenvalues(benchmark: Any, m: int) -> None:
    h = torch.randn(512, m, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values, _ = benchmark(eigenvalues, centered_matrix(h, side="covariance").matrix)
    assert values.shape == (m,)
