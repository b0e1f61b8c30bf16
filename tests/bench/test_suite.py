"""The suite of all benchmarks: its questions, and the command that runs it from a checkout."""

import os
import types

import pytest

pytest.importorskip("tyro")
pytest.importorskip("matplotlib")
from bench import report, suite
from bench.harness import read_rows
from fastent import cli
from fastent.cli import main


def test_bench_outside_a_checkout_says_where_the_benchmarks_are(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "site" / "fastent" / "checkout.py"))
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "--quick"]) == 1
    error = capsys.readouterr().err
    assert "not in the installed package" in error
    assert "clone it" in error


def test_bench_hands_its_options_to_the_suite_of_the_checkout(monkeypatch, tmp_path):
    seen = []

    def run(line, *, cwd, check, env):
        seen.append((line[1:], cwd, env and env["PYTHONPATH"].split(os.pathsep)[0]))
        return types.SimpleNamespace(returncode=0)

    monkeypatch.setattr(cli.subprocess, "run", run)
    assert main(["bench", "--quick", "--out", str(tmp_path), "--only", "entropy", "monitor"]) == 0
    ((line, cwd, path),) = seen
    assert line == ["-m", "bench.suite", "--out", str(tmp_path), "--quick", "--only", "entropy", "monitor"]
    assert (cwd / "bench" / "suite.py").is_file()
    assert path is None
    # Modules of the current folder are found from the checkout.
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "--provider", "mine:entropy", "--out", str(tmp_path)]) == 0
    assert seen[1][0][-2:] == ["--provider", "mine:entropy"]
    assert seen[1][2] == str(tmp_path)


def test_every_question_has_a_function_and_a_place_in_the_report(monkeypatch):
    assert set(suite.QUESTIONS) == set(report.CPU)
    asked = []
    for question in suite.QUESTIONS.values():
        module, function = question.place.split(".")
        monkeypatch.setattr(f"bench.{module}.{function}", lambda quick, place=question.place: [place, quick])
    asked = {name: suite.measure(name, quick=True) for name in suite.QUESTIONS}
    assert asked == {name: [question.place, True] for name, question in suite.QUESTIONS.items()}


def test_a_question_is_asked_in_a_process_for_each_thread_count_and_its_rows_are_written(tmp_path, capsys):
    status = suite.main(["--quick", "--only", "forecast", "--threads", "1", "2", "--out", str(tmp_path)])
    assert status == 0
    rows = read_rows(tmp_path / "cpu" / "forecast.jsonl")
    assert [row["threads"] for row in rows] == [1, 1, 1, 2, 2, 2]
    assert {row["op"] for row in rows} == {"forecast"}
    assert "## Forecast" in (tmp_path / "cpu" / "report.md").read_text()
    assert "1 of 1 questions" in capsys.readouterr().out


def test_without_a_folder_the_table_is_printed_and_a_failed_question_is_said(monkeypatch, tmp_path, capsys):
    rows = [{"provider": "x", "threads": 1, "us_p20": 1.0, "us_p50": 2.0, "us_p80": 3.0}]
    monkeypatch.setattr(suite, "part", lambda name, threads, quick, guests: rows)
    monkeypatch.chdir(tmp_path)
    assert suite.main(["--only", "forecast"]) == 0
    assert "| x | 1 | 1 us | 2 us | 3 us |" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []

    def fails(name, threads, quick, guests):
        raise suite.subprocess.CalledProcessError(3, "x")

    monkeypatch.setattr(suite, "part", fails)
    assert suite.main(["--only", "forecast", "plan"]) == 1
    printed = capsys.readouterr()
    assert "0 of 2 questions" in printed.out
    assert "exit status 3" in printed.err


def test_help_lists_the_questions(capsys):
    with pytest.raises(SystemExit):
        suite.main(["--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in suite.QUESTIONS)
