"""Runs as tables: every run with its state, the columns that docs/runs.md says, the values that were recorded."""

import json
import re
import sys
from pathlib import Path

import pytest

import fastent
from fastent.grokking.experiments.data import StoredRun, pack, read_runs
from fastent.grokking.experiments.tables import RUN, SETTINGS
from fastent.grokking.train.storage import RunError

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "runs.md").read_text()
TYPES = {str: "string", float: "float64", int: "int64", int | None: "Int64", bool | None: "boolean"}
PACKED = ROOT / "bench" / "results" / "paper"


def documented(table: str) -> dict[str, str]:
    """Type of each column by its name in docs/runs.md."""
    text = PAGE.partition(f"<!-- columns: {table} -->")[2].partition("<!-- columns: end -->")[0]
    rows = [line.strip("| ").split(" | ") for line in text.strip().splitlines()[2:]]
    found = [(name, kind) for names, kind, _ in rows for name in re.findall(r"`([^`]+)`", names)]
    assert len(dict(found)) == len(found)
    return dict(found)


def test_the_page_has_every_column_of_the_runs_with_its_type() -> None:
    runs = fastent.load_runs(PACKED / "e1-baseline-add.parquet").runs
    assert {name: TYPES[kind] for name, kind in runs.kinds.items()} == documented("runs")
    assert runs.columns == list(runs.values) == [*RUN, *SETTINGS]
    assert not RUN.keys() & SETTINGS.keys()


def test_the_page_has_every_column_that_recorded_runs_have_with_its_type() -> None:
    said = documented("rows")
    shapes = {name: re.sub("<n>", r"\\d+", re.sub("<kind>", r"\\d+", name)) for name in said}
    met = set()
    for name in ("e1-baseline-add", "e6-baseline-s5", "e7-mlp-sum-add"):
        for path in PACKED.glob(f"{name}.parquet"):
            for column, kind in fastent.load_runs(path).rows.kinds.items():
                (entry,) = (each for each, shape in shapes.items() if re.fullmatch(shape, column))
                assert TYPES[kind] == said[entry], column
                met.add(entry)
    nearest = PACKED.parent / "nearest" / "e1-baseline-add.parquet"
    met |= said.keys() & set(fastent.load_runs(nearest).rows.columns)
    assert met | {"logit_scale"} == said.keys()


def test_every_run_is_there_with_its_state_and_what_is_known(tmp_path: Path, writer) -> None:
    writer(tmp_path, 0)
    writer(tmp_path, 1, last_step=1000, done=False)
    failed = writer(tmp_path, 2, last_step=200, done=False)
    (failed / "FAILED").write_text('{"attempts": 2, "reason": "out of memory"}')
    (writer(tmp_path, 3) / "config.json").write_text("{")
    tables = fastent.load_runs(tmp_path)
    names = tables.runs.values["run"]
    assert [each[-1] for each in names] == list("0123")
    told = zip(*(tables.runs.values[c] for c in ("state", "step", "t_mem", "t_grok", "h_star")), strict=True)
    assert list(told) == [
        ("complete", 2500, 300, 1500, 0.65),
        ("interrupted", 1000, 300, None, None),
        ("failed", 200, None, None, None),
        ("damaged", None, None, None, None),
    ]
    assert tables.runs.values["detail"][2] == "out of memory"
    assert "seed3/config.json" in tables.runs.values["detail"][3]
    assert tables.runs.values["seed"] == [0, 1, 2, None]
    assert tables.runs.values["width"] == [128, 128, 128, None]
    assert tables.runs.values["betas"][:2] == ["0.9, 0.98"] * 2
    assert (len(tables.runs), len(tables.rows)) == (4, 51 + 21 + 5)
    assert set(tables.rows.values["run"]) == set(names[:3])
    assert repr(tables) == "RunTables(4 runs, 77 rows)"
    assert names[3] in tables._repr_html_()


def test_packed_runs_give_what_their_folders_give_and_a_run_or_a_text_may_be_named(
    three_runs: Path, tmp_path: Path
) -> None:
    for run in three_runs.iterdir():
        done = {"schema_version": 1, "steps": 2500, "reason": "grokked", "t_mem": 300, "t_grok": 1500}
        (run / "DONE").write_text(json.dumps(done))
    pack(read_runs(three_runs), tmp_path / "packed")
    folders, packed = fastent.load_runs(str(three_runs)), fastent.load_runs(tmp_path / "packed")
    assert folders == packed
    one = fastent.load_runs(three_runs / folders.runs.values["run"][1])
    assert one.runs.values["seed"] == [1]
    assert one.runs.values["h_star"] == [0.64]
    assert one.rows.values["entropy"] == [
        h
        for h, run in zip(folders.rows.values["entropy"], folders.rows.values["run"], strict=True)
        if run[-1] == "1"
    ]


def test_runs_with_other_measures_lie_in_one_table_and_words_stay_words(tmp_path: Path, measure) -> None:
    runs = [measure([0.9, 0.8], [0.1, 0.2], seed=seed) for seed in (0, 1)]
    second = tuple(
        {**row, "phase": word, "width_at": 3} for row, word in zip(runs[1].rows, (None, "b"), strict=True)
    )
    named = [
        StoredRun(Path(f"a-seed{i}"), run.record, {}, rows, (), {"reason": "planted", "steps": 100}, None)
        for i, (run, rows) in enumerate(((runs[0], runs[0].rows), (runs[1], second)))
    ]
    pack(named, tmp_path)
    rows = fastent.load_runs(tmp_path).rows
    assert rows.columns[-2:] == ["phase", "width_at"]
    assert (rows.kinds["phase"], rows.kinds["width_at"]) == (str, float)
    assert rows.values["phase"] == [None, None, None, "b"]
    assert rows.values["width_at"] == [None, None, 3, 3]


def test_what_holds_no_runs_is_said(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is empty: give the --out"):
        fastent.load_runs(tmp_path)


def test_without_the_trainers_packages_a_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("data", "folder", "tables"):
        monkeypatch.delitem(sys.modules, f"fastent.grokking.experiments.{module}", raising=False)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"^load_runs needs pyarrow, which is not installed: pip install"
    ):
        _ = fastent.load_runs
    with pytest.raises(AttributeError, match="has no attribute 'load_run'"):
        _ = fastent.load_run
    assert "load_runs" in dir(fastent)
