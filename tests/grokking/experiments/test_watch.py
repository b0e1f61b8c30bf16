"""Runs on the terminal: the table, the live view, and what is left where there is no terminal."""

import io
import json
import os
import re
import signal
import warnings

import numpy as np
import pytest

pytest.importorskip("tyro")
pytest.importorskip("rich")
from rich.console import Console

from fastent.cli import main
from fastent.grokking.experiments import watch as module
from fastent.grokking.experiments.folder import Folder
from fastent.grokking.experiments.watch import PLAIN, Forecasts, print_runs, sparkline, watch
from fastent.grokking.train.storage import RunWarning


def terminal(width=110, height=30):
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=height, color_system=None)


def hold(run):
    (run / "lock").write_text(json.dumps({"pid": os.getppid(), "host": os.uname().nodename}))


def end(run):
    (run / "lock").unlink()
    (run / "DONE").write_text('{"steps": 1000, "reason": "max_steps"}')


@pytest.fixture
def sweep(tmp_path, three_runs, writer):
    """Three complete runs and one in training, in `runs`."""
    hold(writer(three_runs, 3, last_step=1000, done=False))
    return three_runs


@pytest.mark.parametrize("command", [["runs"], ["watch", "--once"], ["report", "--out"]])
def test_what_files_hold_moves_no_cursor_and_is_no_markup(tmp_path, writer, capsys, command):
    writer(tmp_path / "runs", 0)
    failed = writer(tmp_path / "runs", 1, last_step=200, done=False)
    (failed / "FAILED").write_text(json.dumps({"reason": "no [/such] style \x1b[2J\udc80"}))
    (tmp_path / "runs" / "a\x1b[31m").mkdir()
    (tmp_path / "runs" / "a\x1b[31m" / "config.json").write_text("{}")
    out = [str(tmp_path / "report")] if command[0] == "report" else []
    with warnings.catch_warnings():
        warnings.simplefilter("always", RunWarning)
        assert main([command[0], str(tmp_path / "runs"), *command[1:], *out]) == 0
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err
    assert r"a\x1b[31m" in captured.out + captured.err
    if command[0] != "report":
        assert r"no [/such] style \x1b[2J\udc80" in captured.out


def test_the_table_of_runs_is_plain_text_where_there_is_no_terminal(sweep, writer, capsys):
    run = writer(sweep, 4, last_step=200, done=False)
    failed = {
        "attempts": 2,
        "reason": "out of memory",
        "lines": ["the \x1b[2Jlast"],
        "command": "fastent run e1",
    }
    (run / "FAILED").write_text(json.dumps(failed))
    (sweep / "notes.txt").write_text("")
    assert main(["runs", str(sweep)]) == 0
    captured = capsys.readouterr()
    head, *rows = captured.out.splitlines()
    assert head.split() == ["run", "state", "step", "of", "T_mem", "T_grok", "H", "written"]
    assert [row.split()[:7] for row in rows[:5]] == [
        ["e1-baseline-add-seed0", "complete", "2,500", "8,000", "300", "1,500", "0.550"],
        ["e1-baseline-add-seed1", "complete", "2,500", "8,000", "300", "1,600", "0.560"],
        ["e1-baseline-add-seed2", "complete", "2,500", "8,000", "300", "1,700", "0.570"],
        ["e1-baseline-add-seed3", "running", "1,000", "8,000", "300", "–", "0.780"],
        ["e1-baseline-add-seed4", "failed", "200", "8,000", "–", "–", "0.890"],
    ]
    assert rows[5:] == [
        "",
        "5 runs: 3 complete, 1 failed, 1 running; 8,700 of at most 23,500 steps",
        "e1-baseline-add-seed4: out of memory",
        "  the \\x1b[2Jlast",
        "  to try again: fastent run e1",
        "no runs, skipped: notes.txt",
    ]
    assert "\x1b" not in captured.out
    assert captured.err == ""


def test_the_json_of_runs_holds_numbers_or_null(sweep, capsys):
    assert main(["runs", str(sweep), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["path"] == str(sweep)
    assert told["skipped"] == []
    assert told["runs"][3].pop("written").endswith("+00:00")
    assert re.fullmatch("[0-9a-f]{64}", told["runs"][3].pop("identity"))
    assert told["runs"][3] == {
        "name": "e1-baseline-add-seed3",
        "state": "running",
        "step": 1000,
        "limit": 8000,
        "t_mem": 300,
        "t_grok": None,
        "entropy": 0.78,
        "test_accuracy": 0.25,
        "detail": "",
        "lines": [],
        "command": "",
        "copies": [],
    }


@pytest.mark.parametrize("command", ["runs", "watch"])
def test_a_wrong_folder_is_one_sentence_and_status_1(command, tmp_path, capsys):
    assert main([command, str(tmp_path)]) == 1
    assert capsys.readouterr().err == (
        f"fastent: {tmp_path} is empty: give the --out of `fastent run`, or a folder of packed runs\n"
    )


def test_one_frame_shows_progress_the_curve_and_a_forecast(sweep, capsys):
    assert main(["watch", str(sweep), "--once"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "H, 0.55 to 0.88" in lines[0]
    # H of seed 3 is 0.88 for half of its steps, then falls by 0.01 an evaluation.
    assert lines[1].startswith("e1-baseline-add-seed3  running   █░░░░░░░  1,000  8,000  ███████████")
    assert lines[1].endswith("▆  0.780  0.25    300  ~1,600 (clock)")
    assert lines[2].split()[:3] == ["e1-baseline-add-seed0", "complete", "████████"]
    assert lines[2].endswith("1,500")
    assert lines[-1] == "~: forecast from the complete runs of the same settings here, if it groks"


def test_a_forecast_needs_runs_of_the_same_settings_that_grokked(sweep, writer):
    def forecast():
        states = Folder(sweep, whole=True).look()
        (state,) = (state for state in states if state.name == "e1-baseline-add-seed3")
        return Forecasts().of(state, states)

    assert forecast() == "~1,600 (clock)"
    config = sweep / "e1-baseline-add-seed2" / "config.json"
    kept = config.read_text()
    config.write_text(kept.replace('"width": 128', '"width": 64'))
    assert forecast() == "–"
    config.write_text(
        kept.replace('"measures": []', '"measures": ["fourier"]')
    )  # changes nothing of the training
    assert forecast() == "~1,600 (clock)"


def test_lines_of_progress_end_with_the_last_run(sweep, monkeypatch, capsys):
    waits = []

    def wait(seconds, stop):
        waits.append(seconds)
        if len(waits) == 2:
            end(sweep / "e1-baseline-add-seed3")
        return False

    monkeypatch.setattr(module, "_stopped_within", wait)
    assert main(["watch", str(sweep)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[1:3] for line in lines[:5]] == [
        ["e1-baseline-add-seed0", "complete"],
        ["e1-baseline-add-seed1", "complete"],
        ["e1-baseline-add-seed2", "complete"],
        ["e1-baseline-add-seed3", "running"],
        ["e1-baseline-add-seed3", "complete"],
    ]
    assert lines[3].split("  ")[3:] == [
        "step 1,000 of 8,000",
        "H 0.780",
        "test 0.25",
        "T_grok ~1,600 (clock)",
    ]
    assert lines[5:] == ["4 runs: 4 complete; 8,500 of at most 8,500 steps"]


def test_on_a_terminal_the_view_ends_with_the_last_run_and_leaves_one_frame(sweep, monkeypatch):
    def wait(seconds, stop):
        end(sweep / "e1-baseline-add-seed3")
        return False

    monkeypatch.setattr(module, "_stopped_within", wait)
    console = terminal()
    assert watch(sweep, console=console) == 0
    written = console.file.getvalue()
    assert written.count("\x1b[?25l") == written.count("\x1b[?25h") == 1
    left = written.rpartition("\x1b[?25h")[2]
    assert left.count("complete") == 5  # four runs and their count
    assert "running" not in left


@pytest.mark.parametrize("make", [terminal, lambda: Console(file=io.StringIO())])
def test_ctrl_c_ends_the_view_with_its_status_and_the_cursor_shown(sweep, monkeypatch, make):
    real = module._stopped_within

    def wait(seconds, stop):
        os.kill(os.getpid(), signal.SIGINT)
        return real(seconds, stop)

    monkeypatch.setattr(module, "_stopped_within", wait)
    console = make()
    before = signal.getsignal(signal.SIGINT)
    assert watch(sweep, console=console) == 130
    assert signal.getsignal(signal.SIGINT) is before
    written = console.file.getvalue()
    assert written.count("\x1b[?25l") == written.count("\x1b[?25h") == console.is_terminal


def test_runs_that_nobody_trains_end_the_view_with_status_1(three_runs, writer, capsys):
    writer(three_runs, 3, last_step=1000, done=False)
    assert main(["watch", str(three_runs)]) == 1
    assert "4 runs: 3 complete, 1 interrupted; 8,500 of at most 15,500 steps" in capsys.readouterr().out


def test_more_runs_than_a_terminal_has_lines_are_counted_those_in_training_first(sweep):
    folder = Folder(sweep, whole=True)
    console = Console(file=io.StringIO(), width=200)
    console.print(module.frame(folder, folder.look(), Forecasts(), console, most=2))
    lines = console.file.getvalue().splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["e1-baseline-add-seed3", "e1-baseline-add-seed0"]
    assert lines[3] == "and 2 more"


def test_a_narrow_terminal_shows_each_run_in_a_line(sweep):
    console = terminal(width=80)
    assert watch(sweep, once=True, console=console) == 0
    head, *rows = console.file.getvalue().splitlines()
    assert head.split() == ["run", "state", "step", "H", "T_grok"]
    assert [row.split()[0][-1] for row in rows[:4]] == ["3", "0", "1", "2"]
    assert rows[0].split()[-2:] == ["~1,600", "(clock)"]


def test_a_terminal_without_block_characters_gets_ascii(sweep):
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="replace")
    assert watch(sweep, once=True, console=Console(file=file)) == 0
    file.flush()
    row = file.buffer.getvalue().decode("ascii").splitlines()[1]
    assert row.startswith("e1-baseline-add-seed3  running   @.......  1,000  8,000  @@@@@@@@@@@")


def test_a_sparkline_puts_each_value_at_its_height():
    step = np.arange(8.0)
    assert sparkline(step, step, 7.0, (0, 7), 8) == "▁▂▃▄▅▆▇█"
    assert sparkline(step, step, 14.0, (0, 7), 8) == "▁▃▅▇█   "  # half of the way
    assert sparkline(step[:3], np.array([0.0, np.nan, 7.0]), 2.0, (0, 7), 3, PLAIN) == ". @"
    # Two evaluations over six columns: each is held until the next.
    assert sparkline(np.array([0.0, 3.0]), np.array([7.0, 0.0]), 5.0, (0, 7), 6) == "███▁  "
    assert sparkline(np.array([]), np.array([]), 0.0, (0, 1), 2) == "  "


def test_a_folder_of_a_thousand_runs_is_told_from_three_files_a_run(sweep, monkeypatch):
    """Whatever is in a complete run's folder, only what tells its state is opened."""
    done = json.loads((sweep / "e1-baseline-add-seed0" / "DONE").read_text())
    (sweep / "e1-baseline-add-seed0" / "DONE").write_text(json.dumps({**done, "t_mem": 300, "t_grok": 1500}))
    opened = []
    real = io.open
    monkeypatch.setattr(
        io, "open", lambda path, *rest, **options: opened.append(path) or real(path, *rest, **options)
    )
    print_runs(sweep / "e1-baseline-add-seed0", console=Console(file=io.StringIO()))
    names = {path.name for path in opened if hasattr(path, "name")}
    assert names <= {"config.json", "DONE", "FAILED", "lock"}
