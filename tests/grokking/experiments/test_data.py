"""Reading run folders: whole, torn, of other settings, and never writing.

Packed runs: nothing lost, nothing incomplete, added to, and as good as folders to the report.
"""

import dataclasses
import json
import os
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from fastent.grokking.experiments.data import PRESETS_JSON, Runs, StoredRun, main, pack, read_runs, unpack
from fastent.grokking.experiments.folder import Folder, State
from fastent.grokking.experiments.report import write_report
from fastent.grokking.experiments.statistics import over, share
from fastent.grokking.train.config import preset
from fastent.grokking.train.storage import RunError, RunWarning


def test_runs_are_read_in_the_order_of_their_seeds_with_all_that_they_hold(three_runs):
    runs = read_runs(three_runs)
    assert [run.seed for run in runs] == [0, 1, 2]
    assert [len(run.rows) for run in runs] == [51, 51, 51]
    assert runs[0].environment["torch"] == "2.0"
    assert runs[0].state == "complete: grokked"
    assert runs[0].name == "e1-baseline-add-seed0"


def test_a_run_shows_itself_in_a_line_without_its_rows():
    record = {
        "schema_version": 1,
        "experiment": "e1",
        "condition": "baseline",
        "seed": 0,
        "config": PRESETS_JSON["paper"],
    }
    run = StoredRun(Path("e1-seed0"), record, {}, ({"step": 0}, {"step": 200}), (), None, None)
    assert repr(run) == "StoredRun(e1-seed0: not complete: step 200; 2 rows)"


def test_a_torn_last_line_is_left_out_with_a_warning_and_left_alone_on_disk(tmp_path, writer):
    path = writer(tmp_path, 0, done=False) / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"step": 2550, "train_lo')
    with pytest.warns(RunWarning, match="line 52 is torn"):
        (run,) = read_runs(tmp_path)
    assert [len(run.rows), run.rows[-1]["step"]] == [51, 2500]
    assert path.read_bytes() == whole + b'{"step": 2550, "train_lo'


def test_a_run_that_has_only_begun_has_no_rows_and_cannot_be_measured(tmp_path, writer):
    (writer(tmp_path, 0, done=False) / "metrics.jsonl").unlink()
    (run,) = read_runs(tmp_path)
    assert (run.rows, run.state) == ((), "not complete: no evaluation yet")
    with pytest.raises(ValueError, match="no evaluation"):
        _ = Runs((run,)).step


def test_preset_is_the_nearest_with_what_differs_from_it(tmp_path, writer):
    folder = writer(tmp_path, 0)
    assert read_runs(tmp_path)[0].preset == ("quick", {})
    record = json.loads((folder / "config.json").read_text())
    record["config"]["weight_decay"] = 0.1
    record["config"]["task"] = "sub"
    del record["config"]["sampling"]  # a record of before there was a choice
    (folder / "config.json").write_text(json.dumps(record))
    (run,) = read_runs(tmp_path)
    assert run.preset == ("quick", {"weight_decay": 0.1})
    assert run.config["sampling"] == "epochs"


@pytest.mark.parametrize(("name", "content"), [("config.json", "{"), ("config.json", "{}"), ("DONE", "[]")])
def test_a_damaged_file_is_named(tmp_path, writer, name, content):
    (writer(tmp_path, 0) / name).write_text(content)
    with (
        pytest.warns(RunWarning, match=f"skipped e1-baseline-add-seed0: .*{name}"),
        pytest.raises(
            RunError, match=rf"holds no run that can be read: .*\n  e1-baseline-add-seed0: .*{name}"
        ),
    ):
        read_runs(tmp_path)


def spoil(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


BROKEN = {
    "config of another shape": lambda run: spoil(
        run / "config.json", '"max_steps": 8000', '"max_steps": "8000"'
    ),
    "config without a setting": lambda run: spoil(run / "config.json", '"criterion"', '"criterium"'),
    "config lost": lambda run: (run / "config.json").unlink(),
    "config is a pipe": lambda run: ((run / "config.json").unlink(), os.mkfifo(run / "config.json")),
    "config nested": lambda run: spoil(run / "config.json", '"e1"', "[" * 100_000 + "]" * 100_000),
    "environment a list": lambda run: (run / "environment.json").write_text("[]"),
    "metrics a folder": lambda run: ((run / "metrics.jsonl").unlink(), (run / "metrics.jsonl").mkdir()),
    "metrics lost": lambda run: (run / "metrics.jsonl").unlink(),
    "a word for a number": lambda run: spoil(
        run / "metrics.jsonl", '"test_accuracy": 0.25', '"test_accuracy": "high"'
    ),
    "a number too large": lambda run: spoil(run / "metrics.jsonl", '"step": 50', '"step": ' + "5" * 400),
    "a step twice": lambda run: spoil(run / "metrics.jsonl", '"step": 100', '"step": 50'),
    "no such status": lambda run: spoil(run / "metrics.jsonl", '"ok"', '"fine"'),
    "DONE of words": lambda run: spoil(run / "DONE", "2500", '"2500"'),
    "FAILED a list": lambda run: (run / "FAILED").write_text("[]"),
    "timing of lists": lambda run: (run / "timing.jsonl").write_text('{"event": [], "step": 0}\n'),
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_run_is_skipped_by_name_and_hides_no_other(tmp_path, writer, broken):
    writer(tmp_path, 0)
    broken(writer(tmp_path, 1))
    skipped = {}
    with pytest.warns(RunWarning, match="skipped e1-baseline-add-seed1: "):
        (run,) = read_runs(tmp_path, skipped)
    assert run.seed == 0
    ((name, reason),) = skipped.items()
    assert name == "e1-baseline-add-seed1"
    assert str(tmp_path / name) in reason
    assert any(remedy in reason for remedy in ("put it back from a copy", "move it away"))
    states = {state.name: state.state for state in Folder(tmp_path, whole=True).look()}
    assert (
        states == {"e1-baseline-add-seed0": State.COMPLETE, name: State.DAMAGED}
        or "timing" in reason
        or ("environment" in reason)
    )


def test_folders_of_other_kinds_are_skipped_and_a_report_says_which(three_runs, tmp_path):
    (three_runs / "model").mkdir()
    (three_runs / "model" / "config.json").write_text('{"hidden_size": 768}')
    (three_runs / "notes.tmp").mkdir()
    (three_runs / "table.parquet").write_bytes(b"PAR1, of another program")
    with pytest.warns(RunWarning, match=r"skipped (model|table\.parquet)"):
        write_report(three_runs, tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    assert "Left out, as no run could be read: model, table.parquet. [Why](#origin)" in text
    assert "for it has no experiment: put it back from a copy" in text


def edit_head(path, change):
    table = pq.read_table(path)
    head = json.loads(table.schema.metadata[b"fastent"])
    change(head["runs"][1])
    head["schema_version"] = 1  # of before there were checksums
    pq.write_table(table.replace_schema_metadata({b"fastent": json.dumps(head)}), path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda head: head.update(name="../escaped-seed1"), "'../escaped-seed1' is no name of a folder"),
        (lambda head: head.update(name=".."), "no name of a folder"),
        (lambda head: head.update(done={"steps": []}), r"steps must be a whole number; got \[\]"),
        (lambda head: head.update(config=[]), "damaged: expected packed runs"),
        (lambda head: head.update(columns=7), "damaged: expected packed runs"),
        (lambda head: head.update(environment=None), "damaged: expected packed runs"),
        (lambda head: head["config"].update(seed="1"), "seed must be a whole number; got '1'"),
    ],
)
def test_packed_runs_of_another_shape_are_refused_by_name(packed, change, said):
    path = packed / "e1-baseline-add.parquet"
    edit_head(path, change)
    with pytest.raises(RunError, match=said):
        unpack(path)


def contents(run):
    return run.name, run.record, run.environment, run.rows, run.timing, run.done, run.failed


def add_timing(folder):
    lines = [
        {"event": "start", "step": 0, "time": 1.7e9, "seconds": 0.0},
        {
            "event": "evaluation",
            "step": 0,
            "time": 1.7e9,
            "seconds": 0.1 + 2**-50,
            "monitor_seconds": 0.01,
            "seeds": 3,
        },
    ]
    (folder / "timing.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def packed(three_runs, tmp_path):
    """Three runs, of which one has values that JSON gives as null, and a run of another experiment."""
    path = three_runs / "e1-baseline-add-seed1"
    add_timing(path)
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    rows[3] |= {"test_loss": None, "entropy": None, "entropy_status": "nonfinite"}
    rows[4]["test_loss"] = 1 / 3
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pack(read_runs(three_runs), tmp_path / "packed")
    return tmp_path / "packed"


def test_unpacked_runs_hold_what_their_folders_held_to_the_last_bit(three_runs, packed):
    assert [path.name for path in packed.iterdir()] == ["e1-baseline-add.parquet"]
    folders, again = read_runs(three_runs), read_runs(packed)
    assert [contents(run) for run in again] == [contents(run) for run in folders]
    assert again[1].rows[4]["test_loss"] == 1 / 3
    assert again[1].timing[1]["seconds"] == 0.1 + 2**-50


def test_a_column_that_one_run_lacks_does_not_appear_in_it(three_runs, packed, writer):
    other = writer(three_runs, 7)
    rows = [
        json.loads(line) | {"entropy_test": 0.5}
        for line in (other / "metrics.jsonl").read_text().splitlines()
    ]
    (other / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pack(read_runs(three_runs), packed)
    runs = read_runs(packed)
    assert ["entropy_test" in run.rows[0] for run in runs] == [False, False, False, True]


def test_packing_adds_to_what_is_there_replaces_the_same_run_and_leaves_out_incomplete_ones(
    packed, tmp_path, writer
):
    later = tmp_path / "later"
    for seed, done in ((2, True), (5, True), (6, False)):
        writer(later, seed, t_grok=2000, done=done)
    writer(later, 0, experiment="e5")
    pack(read_runs(later), packed)
    runs = read_runs(packed)
    assert [(run.experiment, run.seed) for run in runs] == [
        ("e1", 0),
        ("e1", 1),
        ("e1", 2),
        ("e1", 5),
        ("e5", 0),
    ]
    assert Runs(tuple(runs)).t_grok.tolist() == [1500, 1600, 2000, 2000, 1500]


def test_packing_twice_gives_the_same_bytes(three_runs, packed):
    path = packed / "e1-baseline-add.parquet"
    before = path.read_bytes()
    pack(read_runs(three_runs), packed)
    assert path.read_bytes() == before


def test_a_report_from_packed_runs_has_the_bytes_of_one_from_their_folders(three_runs, packed, tmp_path):
    pages = []
    for runs in (three_runs, packed):
        write_report(runs, tmp_path / "report")
        text = (tmp_path / "report" / "report.md").read_text()
        lines = [line for line in text.splitlines() if "fastent.grokking.experiments.data" not in line]
        pages.append(
            re.sub(r"--out \S+?(?=[`\n ]|$)", "--out RUNS", "\n".join(lines)).replace(str(runs), "RUNS")
        )
    assert pages[0] == pages[1]
    assert f"python -m fastent.grokking.experiments.data runs/packed {packed}" in text
    assert "fastent run e1 --preset quick --seeds 0-2 --out runs/packed" in text


def of_width(run, width):
    """Make of a planted run one of another width, under its name."""
    record = json.loads((run / "config.json").read_text())
    record["config"]["width"] = width
    (run / "config.json").write_text(json.dumps(record))


def test_two_runs_of_one_name_are_refused(packed, writer):
    of_width(writer(packed, 1), 64)
    with pytest.raises(
        RunError, match="holds e1-baseline-add-seed1 twice, of other settings: as a folder and"
    ):
        read_runs(packed)


def test_a_file_that_is_not_of_packed_runs_or_newer_is_refused_by_name(packed):
    path = packed / "e1-baseline-add.parquet"
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({}), packed / "other.parquet")
    with pytest.warns(
        RunWarning, match=r"skipped other\.parquet: .*other\.parquet: damaged: expected packed runs"
    ):
        assert len(read_runs(packed)) == 3
    head = json.loads(table.schema.metadata[b"fastent"]) | {"schema_version": 9}
    pq.write_table(table.replace_schema_metadata({b"fastent": json.dumps(head)}), path)
    with pytest.raises(RunError, match="packed with schema 9, by a newer fastent"):
        unpack(path)
    path.write_bytes(b"PAR1, not really")
    with pytest.raises(RunError, match=r"baseline-add\.parquet: damaged: expected packed runs, found none"):
        unpack(path)


def test_the_command_packs_and_names_what_it_passed_over(three_runs, tmp_path, writer, capsys, monkeypatch):
    writer(three_runs, 9, done=False)
    monkeypatch.setattr("sys.argv", ["records", str(three_runs), str(tmp_path / "out")])
    main()
    printed = capsys.readouterr().out
    assert "e1-baseline-add.parquet  3 runs" in printed
    assert "not complete, not packed: e1-baseline-add-seed9" in printed


def ragged(rng, count):
    """Runs of different lengths, with entropies that are missing or not usable, that grok or do not."""
    found = []
    for seed in range(count):
        m = int(rng.integers(1, 30))
        entropy = np.cumsum(rng.normal(-0.02, 0.03, m)) + 0.9
        rows = [
            {
                "step": 100 * i,
                "train_accuracy": float(rng.choice([0.5, 1.0], p=[0.3, 0.7])),
                "test_accuracy": float(rng.choice([0.2, 0.99, 1.0], p=[0.8, 0.1, 0.1])),
                "parameter_norm": None if rng.random() < 0.1 else 50.0 - i,
                "entropy": None if rng.random() < 0.1 else entropy[i],
                "entropy_status": "zero_variance" if rng.random() < 0.1 else "ok",
            }
            for i in range(m)
        ]
        record = {"experiment": "e1", "condition": "baseline", "seed": seed, "config": PRESETS_JSON["paper"]}
        found.append(StoredRun(Path(f"seed{seed}"), record, {}, tuple(rows), (), {}, None))
    return found


def test_runs_as_arrays_have_the_quantities_of_each_run_alone():
    stored = ragged(np.random.default_rng(0), 200)
    runs = Runs(tuple(stored))
    config = preset("paper")
    for i, run in enumerate(stored):
        rows = {row["step"]: row for row in run.rows}
        h = {at: row["entropy"] for at, row in rows.items() if row["entropy_status"] == "ok"}
        h = {at: value for at, value in h.items() if value is not None}
        right = [at for at, row in rows.items() if row["test_accuracy"] >= config.criterion]
        memorised = [at for at, row in rows.items() if row["train_accuracy"] >= config.memorised]
        grok, mem = min(right, default=None), min(memorised, default=None)
        kept = {at: value for at, value in h.items() if mem is not None and at >= mem}
        before = {at: [kept[x] for x in range(at - 400, at + 1, 100) if x in kept and at in kept] for at in h}
        expected = {
            "t_mem": mem,
            "t_grok": grok,
            "t_grok_sustained": min((at for at in right if {at + 100, at + 200} <= set(right)), default=None),
            "t_collapse": min(
                (at for at in h if before[at] and max(before[at]) - h[at] > 0.05), default=None
            ),
            "h_star": h.get(grok),
            "entropy_start": h.get(0),
            "entropy_at_mem": h.get(mem),
            "end": max(rows),
            "norm_at_grok": rows[grok]["parameter_norm"] if grok is not None else None,
            "t_cross": min((at for at in h if grok in h and h[at] < h[grok]), default=None),
        }
        columns = (runs.t_mem, runs.t_grok, runs.t_grok_sustained, runs.first_collapse(), runs.h_star)
        columns = (*columns, *(runs.at(runs.entropy, at) for at in (runs.start, runs.t_mem)), runs.end)
        columns = (*columns, runs.at(runs.norm, runs.t_grok), runs.first_below(runs.h_star))
        found = [None if np.isnan(values[i]) else values[i] for values in columns]
        assert dict(zip(expected, found, strict=True)) == expected
    assert {len(step) for step, _ in runs.lines(runs.entropy)} == {len(run.rows) for run in stored}


def test_crossing_is_strict_and_skips_unusable_entropy():
    entropies = ((0.9, "ok"), (0.7, "ok"), (0.1, "zero_variance"), (0.6, "rank_limited"), (0.5, "ok"))
    rows = [
        {"step": 100 * i, "entropy": h, "entropy_status": status} for i, (h, status) in enumerate(entropies)
    ]
    record = {"experiment": "e1", "condition": "baseline", "seed": 0, "config": PRESETS_JSON["paper"]}
    runs = Runs((StoredRun(Path("seed0"), record, {}, tuple(rows), (), {}, None),))
    found = [runs.first_below(level)[0] for level in (0.6, 0.65, 0.5)]
    np.testing.assert_equal(found, [400, 300, np.nan])


def test_a_column_that_a_run_did_not_record_is_nan_and_takes_no_part(tmp_path, writer):
    writer(tmp_path, 0)
    runs = Runs(tuple(read_runs(tmp_path)))
    assert np.isnan(runs.column("alignment")).all()
    assert not over(runs.at("alignment", runs.end)).known
    assert np.isnan(runs.seen_by("entropy_test").h_star).all()


def test_no_runs_are_arrays_without_a_row():
    none = Runs(())
    assert (len(none), none.t_grok.size, none.end.size, none.first_below(0.5).size) == (0, 0, 0, 0)
    assert not over(none.h_star).known
    assert not share(none.grokked).known


def test_steps_that_do_not_increase_are_refused_by_name():
    (run,) = ragged(np.random.default_rng(3), 1)
    twice = dataclasses.replace(run, rows=(run.rows[0], run.rows[0]))
    with pytest.raises(ValueError, match="steps must increase from row to row; in seed0 step 0 follows 0"):
        _ = Runs((twice,)).step


def test_packed_runs_of_two_settings_are_two_files_and_share_no_row(tmp_path, writer):
    first = writer(tmp_path / "runs", 0, t_grok=1500)
    second = writer(tmp_path / "other", 0, t_grok=1600, last_step=2600)
    of_width(second, 64)
    second.rename(tmp_path / "runs" / "e1-baseline-add-width=64-seed0")
    pack(read_runs(tmp_path / "runs"), tmp_path / "packed")
    again = {run.name: run.rows for run in read_runs(tmp_path / "packed")}
    assert {name: len(rows) for name, rows in again.items()} == {
        first.name: 51,
        "e1-baseline-add-width=64-seed0": 53,
    }
