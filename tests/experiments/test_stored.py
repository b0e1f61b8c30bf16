"""Reading run folders: whole, torn, of other settings, and never writing."""

import json

import pytest

from fastent.experiments.stored import read_runs
from fastent.train.errors import RunError, RunWarning


def test_runs_are_read_in_the_order_of_their_seeds_with_all_that_they_hold(three_runs):
    runs = read_runs(three_runs)
    assert [run.seed for run in runs] == [0, 1, 2]
    assert [len(run.rows) for run in runs] == [51, 51, 51]
    assert runs[0].environment["torch"] == "2.0"
    assert runs[0].state == "complete: grokked"
    assert runs[0].name == "e1-baseline-add-seed0"


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
        run.measure()


def test_preset_is_the_nearest_with_what_differs_from_it(tmp_path, writer):
    folder = writer(tmp_path, 0)
    assert read_runs(tmp_path)[0].preset == ("quick", {})
    record = json.loads((folder / "config.json").read_text())
    record["config"]["weight_decay"] = 0.1
    record["config"]["task"] = "sub"
    (folder / "config.json").write_text(json.dumps(record))
    assert read_runs(tmp_path)[0].preset == ("quick", {"weight_decay": 0.1})


@pytest.mark.parametrize(("name", "content"), [("config.json", "{"), ("config.json", "{}"), ("DONE", "[]")])
def test_a_damaged_file_is_named(tmp_path, writer, name, content):
    (writer(tmp_path, 0) / name).write_text(content)
    with pytest.raises(RunError, match=name):
        read_runs(tmp_path)
