"""The stages of a first contact: what becomes of one that fails, hangs or floods, and a rehearsal of them all."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bench.first_contact import __main__ as contact
from bench.first_contact.__main__ import FIRST, ROOT, Stage, run, stages

SECOND = "env warm smoke gluon compiled sanitize"


def summary(out: Path) -> list[str]:
    return (out / "summary.txt").read_text().splitlines()


def test_a_stage_that_fails_or_hangs_leaves_its_output_and_does_not_keep_the_next_from_running(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contact, "GRACE", 1.0)
    chosen = [
        Stage("wrong", 60, "echo one; exit 3"),
        # As pytest, it is told of its limit and may write its report; unlike pytest, it does not end then.
        Stage("stubborn", 0.4, "trap 'echo three' INT; echo two; while true; do sleep 0.01; done"),
        Stage("good", 60, "echo four; echo LIMIT seconds"),
    ]
    run(chosen, tmp_path, end=100)
    assert [line.partition(",")[0] for line in summary(tmp_path)] == [
        "wrong: exit 3",
        "stubborn: stopped at its limit",
        "good: exit 0",
    ]
    log = (tmp_path / "log.txt").read_text()
    printed = [line for line in log.splitlines() if not line.startswith("=====")]
    assert printed == ["one", "two", "three", "four", "60 seconds"]
    assert "four" in capsys.readouterr().out


CONTACT = """
from bench.first_contact import __main__ as contact
contact.GRACE = 0.1
contact.stages = lambda out, rehearse: [
    contact.Stage("long", LIMIT, "trap 'echo heard' INT; echo begun; while true; do sleep 0.01; done"),
    contact.Stage("verdicts", 60, "echo table"),
]
contact.heed_signals()
contact.main([])
"""


def begun(tmp_path: Path, limit: float, **options: Any) -> subprocess.Popen[str]:
    code = CONTACT.replace("LIMIT", str(limit))
    environment = {**os.environ, "OUT": str(tmp_path), "STAGES": "long", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", code], env=environment, text=True, stdout=subprocess.PIPE, **options
    )


def test_a_stage_hears_its_limit_where_interrupts_were_ignored_as_behind_a_shells_ampersand(
    tmp_path: Path,
) -> None:
    contact = begun(tmp_path, 0.2, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    assert contact.communicate()[0].endswith("table\n")
    assert "heard" in (tmp_path / "log.txt").read_text().splitlines()


def test_a_contact_that_is_ended_takes_its_stage_with_it(tmp_path: Path) -> None:
    contact, log = begun(tmp_path, 60), tmp_path / "log.txt"
    while not (log.exists() and "begun" in log.read_text().splitlines()):
        time.sleep(0.01)
    (stage,) = Path("/proc", str(contact.pid), "task", str(contact.pid), "children").read_text().split()
    contact.terminate()
    contact.communicate(timeout=20)
    assert contact.returncode == 128 + signal.SIGTERM
    status = Path("/proc", stage, "stat")  # whoever it was left to may not have waited for it yet
    assert not status.exists() or status.read_text().split()[2] == "Z"


def test_a_disk_that_is_full_ends_no_contact(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(Path, "open", lambda *args, **options: (_ for _ in ()).throw(full))
    run([Stage("one", 60, "true"), Stage("two", 60, "true")], tmp_path, end=100)
    one, two = capsys.readouterr().out.splitlines()
    assert one.startswith("one: [Errno 28] No space left on device")
    assert two.startswith("two: [Errno 28]")


def test_the_folder_of_results_is_named_from_where_one_is(tmp_path: Path) -> None:
    script = ROOT / "bench" / "first_contact" / "first_contact.sh"
    environment = {**os.environ, "OUT": "found here", "STAGES": "none such"}
    done = subprocess.run(["bash", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "STAGES names none such" in done.stderr  # and nothing was run
    assert (tmp_path / "found here").is_dir()


def test_what_a_stage_leaves_running_ends_with_it(tmp_path: Path) -> None:
    run([Stage("parent", 60, "sleep 60 & echo $!")], tmp_path, end=100)
    status = Path("/proc", (tmp_path / "log.txt").read_text().split()[-1], "stat")
    deadline = time.monotonic() + 20
    while status.exists() and status.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_no_stage_begins_or_goes_on_after_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contact, "LEAST", 0.2)
    run([Stage("rest", None, "sleep 60"), Stage("late", 60, "echo never")], tmp_path, end=0.4)
    rest, late = summary(tmp_path)
    assert rest.startswith("rest: stopped at its limit")
    assert late.startswith("late: not begun")


def test_of_a_flood_the_end_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contact, "KEPT", 1000)
    run([Stage("flood", 60, "seq 100000"), Stage("next", 60, "echo after")], tmp_path, end=100)
    log = (tmp_path / "log.txt").read_bytes()
    assert len(log) < 1200
    assert b"100000\n" in log
    assert log.endswith(b"after\n")


def test_both_calls_name_stages_that_are_there_and_leave_the_benchmark_time() -> None:
    known = {stage.name: stage for stage in stages(Path("out"), rehearse=False)}
    assert set(SECOND.split()) <= set(known)
    *first, rest = (known[name].limit for name in FIRST.split())
    assert rest is None
    assert all(limit is not None for limit in first)
    assert 'COMMIT=<hash> END=150 STAGES="' + SECOND + '"' in (contact.__doc__ or "")


def test_the_smoke_test_has_each_entry_of_the_launch_table_whole_and_in_parts() -> None:
    pytest.importorskip("triton")
    from bench.first_contact import smoke
    from fastent.kernels.launch import TABLE, partition

    cuts = [
        (side, partition(side, *((d, n) if side == "covariance" else (n, d)))) for side, n, d in smoke.cases()
    ]
    found = {(side, cut.tile, cut.parts > 1) for side, cut in cuts}
    assert found == {
        (side, entry.tile, split)
        for side, entries in TABLE.items()
        for entry in entries
        for split in (False, True)
    }


def test_the_verdicts_are_the_last_that_is_printed_whatever_became_of_the_stages(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = [
        Stage("bad", 60, "exit 1"),
        Stage("good", 60, "echo fine"),
        Stage("verdicts", 60, "echo table"),
    ]
    monkeypatch.setattr(contact, "stages", lambda out, rehearse: planted)
    for name, value in {"OUT": str(tmp_path), "STAGES": "bad good", "COMMIT": "abc"}.items():
        monkeypatch.setenv(name, value)
    assert contact.main([]) == 0
    assert capsys.readouterr().out.endswith("\ntable\n")
    assert [line.partition(",")[0] for line in summary(tmp_path)] == [
        *("commit abc", "bad: exit 1", "good: exit 0")
    ]
    monkeypatch.setenv("STAGES", "good best")
    with pytest.raises(SystemExit, match="2"):
        contact.main([])
    assert "STAGES names best; there are bad good verdicts" in capsys.readouterr().err


def test_the_end_names_what_failed_and_holds_each_target_against_what_was_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    from bench.first_contact import verdicts
    from bench.report import TARGETS

    checks = ({"check": "a", "passed": True, "said": "fine"}, {"check": "b", "passed": False, "said": "off"})
    (tmp_path / "smoke.jsonl").write_text("".join(json.dumps(row) + "\n" for row in checks))
    (tmp_path / "junit.xml").write_text(
        '<testsuites><testsuite><testcase classname="tests.x" name="good"/>'
        '<testcase classname="tests.x" name="bad"><failure message="1 != 2&#10;more"/></testcase>'
        "</testsuite></testsuites>"
    )
    shape = {"op": "kernel", "n": 512, "d": 128, "dtype": "bfloat16", "cache": "warm", "timing": "graph"}
    rows = [
        {"part": "kernel", "run": "1", "capability": "sm_90", "device": "a card", **shape, "batch": batch}
        | {"us_p20": 8.0, "us_p50": us, "us_p80": 40.0}
        for batch, us in ((1, 9.0), (32, 21.0))
    ]
    # A later run that was cut short takes nothing from what was measured before.
    cut = {"part": "kernel", "run": "2", "op": "kernel", "late": True}
    rows.append({**cut, "skipped": "the time of the run was used up"})
    (tmp_path / "gpu.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert verdicts.main([str(tmp_path)]) == 0
    failed, bad, *table = capsys.readouterr().out.splitlines()
    assert failed == "FAIL b: off"
    assert bad == "FAILURE tests.x::bad: 1 != 2"
    words = [line.split(" | ")[3] for line in table if line.startswith("| ") and "---" not in line][1:]
    assert len(words) == len(TARGETS)
    assert {word: words.count(word) for word in ("met", "missed")} == {"met": 1, "missed": 1}


def test_files_that_end_in_the_middle_cost_the_verdicts_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    from bench.first_contact import verdicts

    (tmp_path / "junit.xml").write_text('<testsuites><testsuite><testcase classname="tests.x" na')
    (tmp_path / "smoke.jsonl").write_text('{"check": "b", "passed": false, "said": "off"}\n{"chec')
    assert verdicts.main([str(tmp_path)]) == 0
    failed, torn, *table = capsys.readouterr().out.splitlines()
    assert failed == "FAIL b: off"
    assert torn.startswith("junit.xml cannot be read")
    assert "not measured" in table[-1]


def test_the_end_of_a_contact_in_which_nothing_was_measured_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    from bench.first_contact import verdicts

    assert verdicts.main([str(tmp_path)]) == 0
    assert "not measured" in capsys.readouterr().out


@pytest.mark.nightly
def test_a_rehearsal_walks_all_stages_without_a_gpu(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    names = [*FIRST.split(), "gluon", "correctness"]
    environment = {
        **os.environ,
        "OUT": str(tmp_path),
        "STAGES": " ".join(names),
        "COMMIT": "abc",
    }
    command = ["bash", "bench/first_contact/first_contact.sh", "--rehearse"]
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = summary(tmp_path)
    assert lines[0].startswith("commit abc")
    assert [line.partition(",")[0] for line in lines[1:]] == [f"{name}: exit 0" for name in names], (
        done.stdout
    )
    assert len(list(tmp_path.iterdir())) <= 8
    assert "not measured" in done.stdout.splitlines()[-1]
    assert all(json.loads(line)["passed"] for line in (tmp_path / "smoke.jsonl").read_text().splitlines())
