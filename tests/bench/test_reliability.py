"""The page on reliability: every fault has tests that exist, and its marked parts are made of what was recorded."""

import ast
import functools
import json
from types import SimpleNamespace

import pytest

pytest.importorskip("jinja2")
from bench import reliability
from bench.harness import ROOT


@functools.cache
def names_in(path):
    return {
        node.name
        for node in ast.parse((ROOT / path).read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_every_fault_names_tests_that_are_there():
    faults = reliability.faults()
    assert [fault.number for fault in faults] == list(range(1, len(faults) + 1))
    for fault in faults:
        assert all((fault.fault, fault.must, fault.tests)), f"row {fault.number} lacks a text or a test"
        assert len(set(fault.tests)) == len(fault.tests)
        for test in fault.tests:
            path, _, name = test.partition("::")
            assert name in names_in(path) if name else names_in(path), f"row {fault.number}: no {test}"


def test_the_page_is_what_its_rows_and_the_recorded_figures_give(monkeypatch, tmp_path):
    assert reliability.main(["--check"]) == 0
    right = reliability.PAGE.read_text()
    copy = tmp_path / "page.md"
    copy.write_text(right.replace("<!-- reliability: faults -->\n", "<!-- reliability: faults -->\nwrong\n"))
    monkeypatch.setattr(reliability, "PAGE", copy)
    assert reliability.main(["--check"]) == 1
    assert reliability.main([]) == 0
    assert copy.read_text() == right


def test_what_was_counted_stands_in_the_row_of_its_fault(tmp_path):
    kills = {"row": 1, "test": "x", "what": "kills", "commit": "c", "date": "d"}
    rows = [{**kills, "tried": 1000, "survived": 1000}, {**kills, "tried": 5, "survived": 4}]
    (tmp_path / "faults.json").write_text(json.dumps(rows))
    (test, *_) = reliability.faults()[12].tests
    ended = {test: {"passed": 2, "skipped": 1}}
    cases = {"commit": "0123456789", "date": "2026-01-02", "python": "3.12", "tests": ended}
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    lines = reliability.table_of_faults(tmp_path).splitlines()
    assert lines[2].endswith("| kills: 1,004 of 1,005 |")
    assert lines[3].endswith("| – |")
    assert lines[14].endswith("| 2 cases; 1 not tried here |")
    assert "1 test, all of which passed at commit 0123456 (2026-01-02, Python 3.12)" in lines[-1]


def case(nodeid, outcome, when="call"):
    return SimpleNamespace(nodeid=nodeid, outcome=outcome, when=when, passed=outcome == "passed")


@pytest.mark.parametrize("status", [0, 1])
def test_cases_are_counted_by_test_and_recorded_where_none_failed(tmp_path, monkeypatch, status):
    def main(arguments, plugins):
        assert set(arguments[arguments.index(reliability.SELECTED) + 1 :]) == named
        (cases,) = plugins
        for report in (
            *(case("tests/a.py::test_x[1-[2]]", "passed", when) for when in ("setup", "call", "teardown")),
            case("tests/a.py::test_x[3]", "passed"),
            case("tests/a.py::test_x[4]", "skipped", "setup"),
            case("tests/b.py::test_y", "failed" if status else "passed"),
        ):
            cases.pytest_runtest_logreport(report)
        return status

    named = {test for fault in reliability.faults() for test in fault.tests}
    monkeypatch.setattr(pytest, "main", main)
    assert reliability.run(tmp_path / "out") == status
    if status:
        assert not (tmp_path / "out").exists()
    else:
        record = json.loads((tmp_path / "out" / "cases.json").read_text())
        assert record["tests"] == {
            "tests/a.py::test_x": {"passed": 2, "skipped": 1},
            "tests/b.py::test_y": {"passed": 1},
        }


def test_of_long_runs_the_largest_stands_on_the_page_with_what_each_took(tmp_path):
    row = {
        "what": "rows",
        "test": "x",
        "commit": "0123456789-dirty",
        "seconds": 0.01,
        "count": 10,
        "bytes": 0,
    }
    rows = [{**row, "count": 2_000_000, "seconds": 50.0, "bytes": 41_000_000}, row]
    (tmp_path / "long.json").write_text(json.dumps(rows))
    *_, line, _, end = reliability.table_of_long_runs(tmp_path).splitlines()
    assert line == "| rows | 2,000,000 | 41 MB | 50 s | 25 µs |"
    assert end == "Recorded at commit 0123456-dirty."
