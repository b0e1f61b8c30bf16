"""Rounds in turn, ratios of neighbours, pools at rest, and what a row says of its machine."""

import math
import subprocess

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


def test_quantiles_and_ratios_follow_from_the_rounds_that_a_row_keeps():
    g = np.random.default_rng(0)
    ours, theirs, cost = g.exponential(1e-3, (3, 25))
    rows = [
        {"op": "entropy"} | harness.quantiles(theirs) | harness.ratio_columns(ours, theirs),
        {"op": "early end"} | harness.quantiles(ours) | harness.ratio_columns(ours, theirs, row="ours"),
        {"op": "deferred"} | harness.quantiles(cost) | harness.ratio_columns(ours, theirs, row=None),
        {"op": "before rounds were kept", "us_p50": 3.0, "ratio": 1.0},
    ]
    assert harness.differing(rows) == []
    assert [row.keys() & {"ours_us", "theirs_us"} for row in rows] == [
        {"ours_us"},
        {"theirs_us"},
        {"ours_us", "theirs_us"},
        set(),
    ]
    assert [row["ratio"] for row in rows[:3]] == [round(harness.ratio(ours, theirs)[0], 4)] * 3
    assert rows[0]["raw_us"] == pytest.approx(1e6 * theirs, rel=1e-4)
    for row, key in ((rows[0], "ratio_high"), (rows[1], "us_p20"), (rows[2], "ratio")):
        right, row[key] = row[key], 7.0
        (text,) = harness.differing(rows)
        assert text == f"{row['op']} None: {key} 7.0, of its rounds {right}"
        row[key] = right


def test_the_commit_is_that_of_the_checkout_else_of_the_environment_and_says_if_it_is_dirty(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("COMMIT", "b" * 40)
    # Changes in what measuring writes are none.
    for found, changes, recorded in (
        ("a" * 40, None, "a" * 7),
        ("a" * 40 + "-dirty", None, "a" * 7),
        ("a" * 40 + "-dirty", "1234abcd", "aaaaaaa-dirty"),
        (None, None, "b" * 7),
    ):
        monkeypatch.setattr(harness, "commit", lambda found=found: found)
        monkeypatch.setattr(harness, "recorded_changes", lambda changes=changes: changes)
        assert harness.recorded_commit() == recorded
        known = harness.environment()
        assert (known["commit"], known["changes"]) == (recorded, changes)
    monkeypatch.setenv("COMMIT", "b" * 40 + "-dirty")
    assert harness.recorded_commit() == "bbbbbbb-dirty"
    monkeypatch.delenv("COMMIT")
    assert harness.recorded_commit() is None


def test_changes_of_the_tree_are_told_apart_by_a_hash_but_not_those_in_what_measuring_writes(
    tmp_path, monkeypatch: pytest.MonkeyPatch
):
    def git(*command):
        name = ("-c", "user.name=x", "-c", "user.email=x")
        subprocess.run(("git", *name, *command), cwd=tmp_path, check=True, capture_output=True)

    (tmp_path / "bench" / "results").mkdir(parents=True)
    for name in ("code.py", "README.md", "bench/results/rows.jsonl"):
        (tmp_path / name).write_text("before")
    git("init")
    git("add", "-A")
    git("commit", "-m", "all")
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    monkeypatch.setattr(harness, "commit", lambda: "a" * 40)
    changes = harness.recorded_changes.__wrapped__
    for name in ("README.md", "bench/results/rows.jsonl", "bench/results/new.jsonl"):
        (tmp_path / name).write_text("after")
    found = [changes()]
    for name, text in (("code.py", "after"), ("new.py", ""), ("new.py", "more")):
        (tmp_path / name).write_text(text)
        found.append(changes())
    assert found[0] is None
    assert len(set(found)) == 4
    monkeypatch.setattr(harness, "commit", lambda: None)
    assert changes() is None
