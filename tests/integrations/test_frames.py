"""Data frames of pandas and polars: every column with its type, empty ones too, and every value as it was."""

import math
from typing import Any

import pytest
import torch

from fastent import History, SpectralEntropyMonitor

WORDS = ("layer", "status", "flags", "message", "mask")
COUNTS = ("step", "n", "d")
MISSING = ("bias", "standard_error", "mask")


@pytest.fixture(params=["pandas", "polars"])
def library(request: pytest.FixtureRequest) -> str:
    pytest.importorskip(request.param)
    return str(request.param)


def monitored() -> SpectralEntropyMonitor:
    monitor = SpectralEntropyMonitor()
    h = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    for step, values in enumerate([h, h * math.nan]):
        monitor.observe(step, values, layer="a")
    return monitor


def types(frame: Any) -> dict[str, str]:
    return {name: str(frame[name].dtype).lower() for name in frame.columns}


def test_a_monitors_columns_are_the_attributes_of_a_record_with_or_without_rows(library: str) -> None:
    monitor = monitored()
    frame = getattr(monitor, f"to_{library}")()
    names = list(vars(monitor.history[0]))
    assert list(frame.columns) == names
    kinds = dict.fromkeys(names, "float64") | dict.fromkeys(WORDS, "string") | dict.fromkeys(COUNTS, "int64")
    assert types(frame) == types(getattr(SpectralEntropyMonitor(), f"to_{library}")()) == kinds
    assert (len(frame), frame["flags"].to_list()) == (2, ["rank_limited", "rank_limited nonfinite"])
    for name in names:
        if name == "flags":
            continue
        for value, record in zip(frame[name].to_list(), monitor.history, strict=True):
            if name in MISSING:
                assert getattr(record, name) is None
                assert str(value) in {"None", "nan", "<NA>"}
            else:
                expected = getattr(record, name)
                assert value == expected or (math.isnan(value) and math.isnan(expected))


@pytest.mark.parametrize("known", [{"t_grok": 200.0, "norm": [30.0, 31.0]}, {}])
def test_a_historys_columns_are_numbers_and_nan_where_not_known(library: str, known: dict[str, Any]) -> None:
    frame = getattr(History([0, 200], [0.9, math.nan], **known), f"to_{library}")()
    expected = {
        "step": [0.0, 200.0],
        "entropy": [0.9, math.nan],
        "norm": known.get("norm", [math.nan] * 2),
        "t_grok": [known.get("t_grok", math.nan)] * 2,
    }
    assert list(frame.columns) == list(expected)
    for name, values in expected.items():
        assert frame[name].to_list() == pytest.approx(values, nan_ok=True, abs=0)
    empty = getattr(History([], []), f"to_{library}")()
    assert types(empty) == types(frame) == dict.fromkeys(expected, "float64")
    assert len(empty) == 0
