"""The state of each run in a folder: by its files, whole or damaged, complete or being written."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from fastent.grokking.experiments.folder import Folder, State
from fastent.grokking.train.config import preset
from fastent.grokking.train.runs import Job, announced, awaited
from fastent.grokking.train.storage import RunError, RunLock


def look(path, **options):
    return {state.name: state for state in Folder(path, **options).look()}


def hold(run, pid=None):
    """Leave the lock of a process in the folder of a run, of one that lives if not told."""
    (run / "lock").write_text(json.dumps({"pid": pid or os.getppid(), "host": os.uname().nodename}))


def dead_pid():
    with subprocess.Popen(["true"]) as process:
        return process.pid


def finish(run, **changes):
    done = {"schema_version": 1, "steps": 2500, "reason": "grokked", "t_mem": 300, "t_grok": 1500}
    (run / "DONE").write_text(json.dumps({**done, **changes}))


def test_each_state_is_told_by_the_files_of_a_run(tmp_path, writer):
    finish(writer(tmp_path, 0))
    hold(writer(tmp_path, 1, last_step=1000, done=False))
    hold(writer(tmp_path, 2, last_step=1600, done=False), dead_pid())
    failed = writer(tmp_path, 3, last_step=200, done=False)
    (failed / "FAILED").write_text('{"attempts": 2, "reason": "out of memory"}')
    (writer(tmp_path, 4) / "config.json").write_text("{")
    # The limit is that of the preset `quick`.
    told = {
        state.name[-1]: (state.state, state.step, state.limit, state.t_mem, state.t_grok, state.entropy)
        for state in Folder(tmp_path).look()
    }
    assert told == {
        "0": (State.COMPLETE, 2500, 8000, 300, 1500, 0.55),
        "1": (State.RUNNING, 1000, 8000, 300, None, 0.76),
        "2": (State.INTERRUPTED, 1600, 8000, 300, 1500, 0.65),
        "3": (State.FAILED, 200, 8000, None, None, 0.88),
        "4": (State.DAMAGED, None, None, None, None, None),
    }
    details = {state.name[-1]: state.detail for state in Folder(tmp_path).look()}
    assert details["3"] == "out of memory"
    assert "seed4/config.json: damaged: expected a JSON object" in details["4"]


def test_a_complete_run_is_told_by_its_ends_and_its_other_lines_are_not_read(tmp_path, writer):
    run = writer(tmp_path, 0)
    finish(run, t_mem=350)
    metrics = run / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True)
    metrics.write_bytes(b"".join(b"x" * (len(line) - 1) + b"\n" for line in lines[:-1]) + lines[-1])
    (state,) = Folder(tmp_path).look()
    assert (state.state, state.step, state.t_mem, state.entropy) == (State.COMPLETE, 2500, 350, 0.55)
    (whole,) = Folder(tmp_path, whole=True).look()
    assert whole.state is State.DAMAGED  # all lines are read there


def test_a_last_line_longer_than_what_is_read_at_first_is_found(tmp_path, writer):
    run = writer(tmp_path, 0)
    finish(run)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    row = {**json.loads(lines[-1]), "key_blocks": "7 " * 20_000}
    (run / "metrics.jsonl").write_text("\n".join([*lines[:-1], json.dumps(row)]) + '\n{"step": 25')
    (state,) = Folder(tmp_path).look()
    assert (state.state, state.step) == (State.COMPLETE, 2500)


def test_a_torn_last_line_is_left_out_and_told_of_a_run_that_nobody_trains(tmp_path, writer):
    run = writer(tmp_path, 0, last_step=1000, done=False)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 1050, "entr')
    (state,) = Folder(tmp_path).look()
    assert (state.state, state.step) == (State.INTERRUPTED, 1000)
    assert state.detail == "line 22 of its metrics is torn, and is dropped when it goes on"
    hold(run)
    (state,) = Folder(tmp_path).look()
    assert (state.state, state.step, state.detail) == (State.RUNNING, 1000, "")


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda run: (run / "config.json").unlink(), "config.json is missing: put it back from a copy"),
        (lambda run: (run / "config.json").write_text("[]"), "config.json: damaged: expected a JSON object, found"),
        (lambda run: (run / "DONE").write_text('{"reason": "grokked"}'), "not what its name says, for it has no steps"),
        (lambda run: (run / "DONE").write_text('{"steps": 2600, "reason": ""}'), "at step 2,500, and DONE says 2,600"),
        (lambda run: (run / "DONE").write_text('{"steps": "x", "reason": ""}'), "DONE: steps must be a whole number"),
        (
            lambda run: (run / "metrics.jsonl").write_text(
                (run / "metrics.jsonl").read_text().replace('"ok"', '"fine"')
            ),
            "metrics.jsonl: column entropy: 'fine' is not a valid Status: put it back from a copy",
        ),
        (lambda run: (run / "metrics.jsonl").unlink(), "its rows are none, and DONE says 2,500"),
        (
            lambda run: (run / "metrics.jsonl").write_text(
                (run / "metrics.jsonl").read_text().replace('{"step": 100,', '{"step": 100;')
            ),
            "metrics.jsonl: line 3 is damaged, and rows follow it",
        ),
        (
            lambda run: (run / "metrics.jsonl").write_text(
                (run / "metrics.jsonl").read_text().replace('{"step": 100,', '{"step": 40,')
            ),
            "steps must increase from row to row",
        ),
    ],
)  # fmt: skip
def test_a_run_whose_files_miss_something_is_damaged_and_hides_no_other(tmp_path, writer, break_it, said):
    run = writer(tmp_path, 0)
    writer(tmp_path, 1)
    break_it(run)
    damaged, sound = Folder(tmp_path).look()
    assert damaged.state is State.DAMAGED
    assert said in damaged.detail
    assert str(run) in damaged.detail
    assert sound.state is State.COMPLETE


def test_a_run_is_read_on_while_it_is_written_and_anew_where_it_was_taken_back(tmp_path, writer):
    run = writer(tmp_path, 0, last_step=1000, done=False)
    whole = (writer(tmp_path / "later", 0) / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    folder = Folder(tmp_path / run.name)
    for lines in (20, 21, 5, 40, 8, 51):
        (run / "metrics.jsonl").write_bytes(b"".join(whole[:lines]))
        (state,) = folder.look()
        assert state.step == 50 * (lines - 1)
        assert [row["step"] for row in state.stored.rows] == list(range(0, 50 * lines, 50))
    # Written anew, by another configuration say, to more than there was before.
    longer = [line.replace(b'{"step"', b'{"forced": true, "step"') for line in whole]
    (run / "metrics.jsonl").write_bytes(b"".join(longer))
    (state,) = folder.look()
    assert [row.get("forced") for row in state.stored.rows] == [True] * 51


def test_what_lies_beside_runs_is_named_and_skipped(tmp_path, writer):
    writer(tmp_path, 0)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "figures").mkdir()
    (tmp_path / ".DS_Store").write_text("")
    folder = Folder(tmp_path)
    assert len(folder.look()) == 1
    assert folder.foreign == ["figures/", "notes.txt"]
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"hidden_size": 768}')
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "lock").write_text("")
    os.mkfifo(tmp_path / "a\x1b[2J")
    assert len(folder.look()) == 1
    assert folder.foreign == ["a\\x1b[2J", "figures/", "model/", "notes.txt", "packages/"]


def test_a_folder_that_nobody_may_look_into_is_skipped_by_name(tmp_path, writer, monkeypatch):
    writer(tmp_path, 0)
    (tmp_path / "private").mkdir()
    real = Path.is_file

    def is_file(path):
        if path.parent.name == "private":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(Path, "is_file", is_file)
    folder = Folder(tmp_path)
    assert [state.state for state in folder.look()] == [State.COMPLETE]
    assert folder.foreign == ["private/"]


def test_a_place_without_runs_is_refused_with_what_is_there_instead(tmp_path, writer):
    def refusal(path):
        with pytest.raises(RunError) as refused:
            Folder(path).look()
        return str(refused.value)

    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("")
    writer(tmp_path / "runs" / "quick", 0)
    assert refusal(tmp_path / "no").startswith(f"{tmp_path / 'no'} does not exist: give the --out")
    assert refusal(tmp_path / "empty").startswith(f"{tmp_path / 'empty'} is empty: give the --out")
    assert refusal(tmp_path / "file.txt").startswith(
        f"{tmp_path / 'file.txt'} is a file and no folder of runs"
    )
    assert (
        refusal(tmp_path / "runs")
        == f"{tmp_path / 'runs'} holds no run itself: give {tmp_path / 'runs' / 'quick'}"
    )
    assert f"{tmp_path} holds no run, only empty/, file.txt, runs/: give" in refusal(tmp_path)


def test_runs_that_a_living_process_announced_are_awaited(tmp_path, writer):
    interrupted = writer(tmp_path, 0, last_step=1000, done=False)
    job = Job("e1", "baseline", preset("quick"), (0, 1))
    with announced([job], tmp_path):
        (path,) = tmp_path.glob("sweep-*.json")
        sweep = json.loads(path.read_text())
        assert (sweep["pid"], sweep["limits"]) == (os.getpid(), {job.run_name(seed): 8000 for seed in (0, 1)})
        # This process does not count as another one that lives.
        assert awaited(tmp_path) == {}
        path.write_text(json.dumps({**sweep, "pid": os.getppid(), "started": None}))
        states = look(tmp_path)
        assert [(state.state, state.step, state.limit) for state in states.values()] == [
            (State.WAITING, 1000, 8000),
            (State.WAITING, None, 8000),
        ]
        path.write_text(json.dumps({**sweep, "pid": dead_pid()}))
        assert {state.state for state in look(tmp_path).values()} == {State.INTERRUPTED}
    assert list(tmp_path.iterdir()) == [interrupted]


def test_a_folder_in_which_nothing_was_trained_has_not_begun(tmp_path):
    (tmp_path / "e1-baseline-add-seed0").mkdir()
    (tmp_path / "e1-baseline-add-seed0" / "lock").write_text("")
    (state,) = Folder(tmp_path).look()
    assert (state.state, state.detail) == (State.INTERRUPTED, "it has not begun")


def test_looking_changes_nothing_and_takes_no_lock(tmp_path, writer):
    run = writer(tmp_path, 0, last_step=1000, done=False)
    with RunLock(run):
        before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in run.iterdir()}
        hold(run)  # as another process's
        Folder(tmp_path).look()
        (run / "lock").write_bytes(before[run / "lock"][0])
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in run.iterdir()} == {
        path: kept for path, kept in before.items() if path.name != "lock"
    }


def test_packed_runs_are_told_as_their_folders_are(tmp_path, three_runs):
    from fastent.grokking.experiments.data import pack, read_runs

    pack(read_runs(three_runs), tmp_path / "packed")
    (tmp_path / "packed" / "broken.parquet").write_bytes(b"PAR1")
    from_folders, (broken, *from_file) = look(three_runs).values(), look(tmp_path / "packed").values()
    for state, packed in zip(from_folders, from_file, strict=True):
        assert {**vars(packed), "written": 0, "stored": 0} == {**vars(state), "written": 0, "stored": 0}
    assert (broken.name, broken.state) == ("broken.parquet", State.DAMAGED)
    assert "damaged: expected packed runs" in broken.detail
    assert len(look(tmp_path / "packed" / "e1-baseline-add.parquet")) == 3
