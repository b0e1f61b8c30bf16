"""What the session writes down: faults that were tried and survived, by tests that passed."""

import json
from types import SimpleNamespace

import pytest
from fault_figures import Faults


def report(outcome, **fault):
    return SimpleNamespace(
        when="call", passed=outcome == "passed", nodeid="tests/a.py::b", user_properties=[("fault", fault)]
    )


def test_figures_of_tests_that_passed_are_written_in_order_of_rows_with_commit_and_date(tmp_path):
    faults = Faults(tmp_path / "new" / "faults.json")
    faults.pytest_sessionstart()
    faults.pytest_runtest_logreport(report("passed", row=8, what="x", tried=3, survived=3))
    faults.pytest_runtest_logreport(report("passed", row=1, what="y", tried=2, survived=2))
    faults.pytest_runtest_logreport(report("failed", row=1, what="z", tried=2, survived=2))
    faults.pytest_sessionfinish(1)
    assert not faults.path.exists()
    faults.pytest_sessionfinish(0)
    first, second = json.loads(faults.path.read_text())
    assert set(first) == {"row", "test", "what", "tried", "survived", "commit", "date"}
    assert (first["row"], first["what"], first["tried"], first["test"]) == (1, "y", 2, "tests/a.py::b")
    assert second["row"] == 8
    assert not faults.path.with_name("long.json").exists()


def test_figures_of_long_runs_are_written_beside_them(tmp_path):
    faults = Faults(tmp_path / "faults.json")
    faults.pytest_sessionstart()
    figure = {"what": "calls", "count": 3, "seconds": 0.5}
    faults.pytest_runtest_logreport(
        SimpleNamespace(when="call", passed=True, nodeid="t", user_properties=[("long", figure)])
    )
    faults.pytest_sessionfinish(0)
    assert json.loads(faults.path.read_text()) == []
    (found,) = json.loads(faults.path.with_name("long.json").read_text())
    assert figure.items() <= found.items()
    assert {"test", "commit", "date"} <= set(found)


@pytest.mark.parametrize(("tried", "survived"), [(3, 2), (0, 0)])
def test_what_did_not_survive_and_what_was_never_tried_is_no_figure(figure, tried, survived):
    with pytest.raises(AssertionError, match=f"kills: {survived} of {tried} survived"):
        figure(1, "kills", tried, survived)
