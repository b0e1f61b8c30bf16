"""Every entry of the launch table through the interpreter, whole and in parts, on shapes small enough for it.

The table is cut down to the entry, so that a small matrix takes it.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fastent.kernels.covariance import ResidentCovariance
from fastent.kernels.launch import TABLE, Entry, Side, Tile, partition
from fastent.reference.covariance import centered

EPS = float(np.finfo(np.float64).eps)
ENTRIES = sorted({(side, entry.tile) for side, entries in TABLE.items() for entry in entries}, key=str)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# (m, length): tails of the tile in both axes; more than one tile; long enough to be split.
SHAPES = ((2, 2), (63, 17), (131, 33), (33, 150))


def name(value: object) -> str:
    if isinstance(value, Tile):
        return f"{value.edge}x{value.edge}-{value.warps}"
    return str(value).removeprefix("torch.")


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch, side: Side, tile: Tile) -> None:
    monkeypatch.setitem(TABLE, side, (Entry(None, tile),))


def matrix(side: Side, m: int, length: int, dtype: torch.dtype, *, offset: float = 3.0) -> Tensor:
    n, d = (length, m) if side == "covariance" else (m, length)
    x = torch.randn((n, d), generator=torch.Generator().manual_seed(m + length), dtype=torch.float64)
    return (x * torch.logspace(-1, 1, d, dtype=torch.float64) + offset).to(dtype)


def truth(x: Tensor, side: Side) -> tuple[np.ndarray, np.ndarray]:
    y, exponent = centered(x.double().cpu().numpy(), extended=True)
    y = np.ldexp(y if side == "covariance" else y.T, exponent)
    return y.T @ y / x.shape[0], np.abs(y).max(axis=0)


@pytest.mark.usefixtures("only")
@pytest.mark.parametrize(("m", "length"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize(("side", "tile"), ENTRIES, ids=name)
def test_entry_is_inside_the_gate_and_its_spread_is_that_of_its_matrix(
    side: Side, tile: Tile, dtype: torch.dtype, m: int, length: int, device: torch.device
) -> None:
    assert partition(side, m, length).tile == tile
    assert partition(side, m, length).parts == (5 if length == 150 else 1)
    x = matrix(side, m, length, dtype).to(device)
    n, d = x.shape
    evaluator = ResidentCovariance(n, d, device=device, side=side)
    out = evaluator.output()
    evaluator(x, out)
    want, largest = truth(x, side)
    below = np.tri(m, dtype=bool)
    got = out.lower[0].cpu().numpy()  # what stands above the diagonal means nothing, NaN included
    error = np.abs(np.where(below, got, 0) - np.where(below, want, 0))
    assert (error < EPS * (length + 2) * np.outer(largest, largest)).all()
    lower = out.lower[0].tril().cpu().double()
    whole = lower + lower.tril(-1).mT
    assert out.spread is not None
    trace, squares, ratio = out.spread[0].tolist()
    assert trace == pytest.approx(float(whole.trace()), rel=1e-13)
    assert squares == pytest.approx(float(whole.square().sum()), rel=1e-13)
    assert ratio == trace * trace / squares
    assert 1.0 - 1e-12 <= ratio <= m


@pytest.mark.usefixtures("only")
@pytest.mark.parametrize(("m", "length"), [(131, 33), (33, 150)])
@pytest.mark.parametrize(("side", "tile"), ENTRIES, ids=name)
def test_bits_stay_when_padding_neighbours_and_strides_change(
    side: Side, tile: Tile, m: int, length: int, device: torch.device
) -> None:
    x = matrix(side, m, length, torch.float32).to(device)
    n, d = x.shape
    want = evaluate(x[None], side)
    for filling in (0.0, 7e30, float("nan")):
        # Rows and columns beyond the matrix, and the other members of the batch, hold something else.
        storage = torch.full((3, n + 70, d + 70), filling, dtype=x.dtype, device=device)
        batch = storage[:, :n, :d]
        batch[1] = x
        got = evaluate(batch, side)
        for part, whole in zip(got, want, strict=True):
            assert torch.equal(part[1], whole[0])
    turned = x.T.contiguous().T
    assert all(torch.equal(a, b) for a, b in zip(evaluate(turned[None], side), want, strict=True))


def evaluate(x: Tensor, side: Side) -> tuple[Tensor, Tensor, Tensor]:
    evaluator = ResidentCovariance(*x.shape[1:], batch=len(x), device=x.device, side=side)
    out = evaluator.output()
    evaluator(x, out)
    assert out.spread is not None
    return out.lower.tril(), out.centre[:, 2:], out.spread
