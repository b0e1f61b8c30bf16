"""Data frames of pandas and polars: every column with its type, empty ones too, and every value as it was."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fastent import History, SpectralEntropyMonitor

ROOT = Path(__file__).parents[2]
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


def test_the_tables_of_runs_have_their_types_and_miss_what_is_missing(library: str, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    from fastent import load_runs

    (tmp_path / "a-seed0").mkdir()
    (tmp_path / "a-seed0" / "DONE").write_text("{")
    damaged = load_runs(tmp_path).runs
    whole = load_runs(ROOT / "bench" / "results" / "paper" / "e1-baseline-add.parquet")
    for table in (damaged, whole.runs, whole.rows):
        frame = getattr(table, f"to_{library}")()
        assert list(frame.columns) == table.columns
        kinds = {str: "string", float: "float64", int: "int64", int | None: "int64", bool | None: "boolean"}
        assert types(frame) == {name: kinds[kind] for name, kind in table.kinds.items()}
        assert len(frame) == len(table)
    frame = getattr(whole.runs, f"to_{library}")()
    assert frame["t_grok"].to_list() == whole.runs.values["t_grok"]
    assert frame["final_norm"].to_list() == [False] * 10
    missing = getattr(damaged, f"to_{library}")()
    assert [str(missing[name].to_list()[0]) in {"None", "nan", "<NA>"} for name in damaged.columns] == [
        name not in ("run", "state", "detail") for name in damaged.columns
    ]


def test_the_example_of_tables_of_runs_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    monkeypatch.chdir(ROOT)
    section = (ROOT / "docs" / "runs.md").read_text().partition("## In Python")[2]
    names: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", section, re.DOTALL):
        exec(code, names)
    assert len(names["runs"]) == names["late"]["seed"].nunique() == 10
    assert (names["late"]["step"] >= names["late"]["t_grok"]).all()
