"""Rounds in turn, ratios of neighbours, pools at rest, and what a row says of its machine."""

import math

import numpy as np
import pytest
import torch

from bench import harness


def test_providers_take_turns_and_slow_ones_get_fewer_rounds():
    calls = []
    seconds = harness.interleaved(
        {name: (lambda name=name: calls.append(name)) for name in "ab"}, rounds=3, target=0.0
    )
    assert calls == [*"aabb", *"ababab"]
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}
    few = harness.interleaved({"a": lambda: sum(range(20_000))}, rounds=50, target=0.001, budget=0.0)
    assert len(few["a"]) == 3


def test_providers_far_slower_than_ours_are_timed_apart_and_leave_the_others_their_rounds(
    monkeypatch: pytest.MonkeyPatch,
):
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in ("ours", "near", "far")}
    took = {calls["ours"]: 0.02, calls["near"]: 0.09, calls["far"]: 1.0}
    monkeypatch.setattr(harness, "_seconds", took.__getitem__)
    found = harness.beside("ours", calls, rounds=9, budget=4.0)
    assert list(found) == list(calls)
    # 3 s for rounds of 0.02 + 0.09; 1 s for rounds of 0.02 + 1.0, of which there are three at least.
    assert order == ["ours", "near"] * 9 + ["ours", "far"] * 3
    assert {name: (len(theirs), len(ours)) for name, (theirs, ours) in found.items()} == {
        "ours": (9, 9),
        "near": (9, 9),
        "far": (3, 3),
    }
    assert found["near"][1] is found["ours"][0]
    order.clear()
    harness.beside("ours", {"ours": calls["ours"]}, rounds=2, budget=1.0)
    assert order == ["ours", "ours"]


def test_a_ratio_of_neighbours_ignores_what_weighs_on_both():
    weather = np.array([1.0, 5.0, 1.0, 9.0, 2.0, 1.0, 3.0])
    assert harness.ratio(2.0 * weather, weather) == (2.0, 2.0, 2.0)


def test_measurements_at_several_threads_wait_until_no_other_thread_runs(monkeypatch: pytest.MonkeyPatch):
    seen = iter([{"7": "1"}, {"7": "2"}, {"7": "3"}, {"7": "3"}])
    monkeypatch.setattr(harness, "_seconds_of_others", lambda: next(seen))
    monkeypatch.setattr(harness, "SPINNING", math.inf)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert harness.settle()
    assert next(seen, None) is None
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert not harness.settle()


def test_the_interval_of_a_median_is_that_of_its_resampled_values():
    values = np.random.default_rng(3).exponential(size=31)
    draws = np.random.default_rng(0).choice(values, (2000, 31))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    assert harness.median_interval(values) == (float(np.median(values)), low, high)


def test_rows_come_back_as_they_were_and_say_where_they_were_made(tmp_path):
    row = {"op": "x", "us_p50": 1.5, "error": None} | harness.environment("scipy", "not-installed")
    harness.write_rows(tmp_path / "new" / "rows.jsonl", [row, row])
    assert harness.read_rows(tmp_path / "new" / "rows.jsonl") == [row, row]
    assert harness.read_rows(tmp_path / "none.jsonl") == []
    assert (row["torch"], row["threads"]) == (torch.__version__, torch.get_num_threads())
    assert row["scipy"]
    assert row["not-installed"] is None
    assert list(row)[3:9] == ["device", "driver", "cores", "python", "torch", "numpy"]


def test_the_commit_is_that_of_the_checkout_else_of_the_environment_and_says_if_it_is_dirty(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("COMMIT", "b" * 40)
    for found, recorded in (("a" * 40, "a" * 7), ("a" * 40 + "-dirty", "aaaaaaa-dirty"), (None, "b" * 7)):
        monkeypatch.setattr(harness, "commit", lambda found=found: found)
        assert harness.recorded_commit() == recorded
        assert harness.environment()["commit"] == recorded
    monkeypatch.delenv("COMMIT")
    assert harness.recorded_commit() is None
