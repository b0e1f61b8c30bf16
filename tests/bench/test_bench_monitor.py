"""Overhead of a monitor, calls between training steps, and the edge from which the worker gains."""

import types

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
from bench import monitor, report
from bench.harness import differing
from bench.monitor import TrainingLoop
from fastent.monitor import deferred


def test_the_overhead_of_a_run_is_that_of_its_probes_at_every_stride():
    plain = np.full(200, 10.0)  # turns of 10 steps of 1
    for stride in (1, 10, 100, 200, 1000):
        ours = plain.copy()
        if stride <= 10:
            ours += 10 / stride * 0.5
        else:
            ours[stride // 10 - 1 :: stride // 10] += 0.5
        middle, low, high = monitor.overhead(ours, plain, stride)
        assert middle == pytest.approx(0.5 / stride, abs=1e-5)
        assert low <= middle <= high


def test_a_run_probes_at_the_end_of_each_period_and_not_before():
    loop = types.SimpleNamespace(
        step=lambda: None, activations=lambda: torch.randn(8, 4), model=None, probe=None, layer=None
    )
    run = monitor.TimedRun(loop, 20)
    run.warm_up()
    run.advance(10)
    assert len(run.probe_seconds) == 0
    run.advance(10)
    assert len(run.probe_seconds) == 1
    assert len(run.monitor.history) == 2  # one of them to warm up
    assert len(run.step_seconds) == 20


def test_calls_between_training_steps_take_turns_and_get_the_layer_of_the_probe():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    order: list[str] = []
    probe = torch.randn(5, 3)
    loop = TrainingLoop(model, lambda: order.append("step"), probe, "0")
    seen = []

    def call(h: torch.Tensor) -> None:
        order.append("call")
        seen.append(h)

    seconds = monitor.turns(loop, {None: lambda h: order.append("none"), "call": call}, rounds=2)
    turn = ["step"] * monitor.BEFORE, ["step"] * monitor.AFTER
    none, called = ([*turn[0], name, *turn[1]] for name in ("none", "call"))
    assert order == [*called, *none, *none, *called, *called, *none]  # the first round is warm-up
    assert all(torch.equal(h, model[0](probe)) for h in seen)
    assert [values.shape for values in seconds.values()] == [(2, 2), (2, 2)]


def test_what_a_call_adds_to_the_steps_after_it_is_a_difference_within_a_round():
    weather = np.array([1.0, 5.0, 2.0, 9.0, 3.0])
    found = monitor.excess(weather + 0.25, weather)
    assert found.pop("after_raw_us") == [250_000.0] * 5
    assert found == {"after_us": 250_000.0, "after_low": 250_000.0, "after_high": 250_000.0}


def test_overheads_and_times_after_a_call_follow_from_the_rounds_that_rows_keep():
    loop = types.SimpleNamespace(activations=lambda: None)
    runs = [monitor.TimedRun(loop, stride) for stride in (0, 10)]
    g = np.random.default_rng(0)
    for run in runs:
        run.blocks, run.step_seconds, run.probe_seconds = g.exponential(size=40), [1.0], [0.5]
    rows = monitor._monitor_rows("vision", "plain", runs)
    rows.append({"op": "in training", **monitor.excess(g.exponential(size=9), g.exponential(size=9))})
    assert differing(rows) == monitor.differing(rows) == []
    assert len(rows[1]["raw_us"]) == 40
    for row, key in ((rows[1], "overhead_high"), (rows[2], "after_low")):
        right, row[key] = row[key], 0.5
        (text,) = monitor.differing(rows)
        assert f"{key} 0.5, of its rounds {right}" in text
        row[key] = right


@pytest.mark.parametrize(
    ("highest", "edge"),
    [
        ({64: 0.9, 128: 0.8, 256: 0.8}, 64),
        ({64: 1.2, 128: 0.99, 256: 0.8}, 128),
        ({64: 0.9, 128: 1.0, 256: 0.8}, 256),  # 64 gained by luck
        ({64: 0.9, 128: 0.9, 256: 1.01}, None),
    ],
)
def test_the_edge_is_the_smallest_from_which_on_every_interval_is_below_one(highest, edge):
    rows = [
        {"provider": provider, "d": d, "layers": 1, "ratio_high": high if provider == "worker" else 0.5}
        for d, high in highest.items()
        for provider in ("in line", "worker, matrices", "worker")
    ]
    rows.append({"provider": "worker", "d": 768, "layers": 24, "ratio_high": 2.0})  # another question
    assert monitor.worker_from(rows) == edge


def test_an_evaluation_of_many_layers_is_timed_in_line_with_matrices_and_with_copies(monkeypatch):
    staged = []

    def planted(calls, rounds):
        for call in calls.values():
            call()
        return {name: np.array([1.0, 2.0]) + 3.0 * place for place, name in enumerate(calls)}

    class Noted(deferred.Evaluation):
        def __exit__(self, *error):
            staged.append([type(one) for one in self.staged.values()])
            super().__exit__(*error)

    monkeypatch.setattr(monitor, "interleaved", planted)
    monkeypatch.setattr(deferred, "Evaluation", Noted)
    rows = monitor._deferred_rows(40, 12, layers=2, steps=1, rounds=2)
    assert [row["provider"] for row in rows] == ["in line", "worker, matrices", "worker"]
    assert staged == [[], [deferred.Staged] * 2, [deferred.Copied] * 2]
    assert [row["us_p50"] for row in rows] == [3e6, 6e6, 9e6]
    assert rows[2]["cost_ratio"] == 1.5
    table = report.deferred_table(rows)
    assert "| 2 of 40 x 12 " in table
    assert differing(rows) == []
    assert "1.50 [1.50, 1.50]" in table


def test_the_pass_that_ends_early_leaves_the_projection_out_and_the_hooked_one_does_not(monkeypatch):
    monkeypatch.setattr(monitor, "VOCABULARY", 50)
    monkeypatch.setattr(torch.optim, "AdamW", lambda parameters, lr: None)  # no step is made
    for whole in (True, False):
        loop, watching = monitor._probed_blocks(whole=whole)
        calls = []
        loop.model.head.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        records = watching.step(0) + watching.flush()
        assert [record.layer for record in records] == ["blocks.0", "blocks.1"]
        assert len(calls) == whole
    flops = monitor.operations(loop)
    assert flops["whole pass"] - flops["early end"] == 2 * 16 * 64 * 128 * 50
    per_token = 2 * 128 * 128 * (3 + 1 + 4 + 4)
    products = 2 * 2 * 64 * 128  # of attention, with every token
    assert flops["early end"] == 16 * 64 * 2 * (per_token + products)


def test_the_share_of_the_training_batch_is_what_its_steps_take_beyond_the_others():
    loop = types.SimpleNamespace(activations=lambda: None)
    run = monitor.TimedRun(loop, 5, of_batch=True)
    run.by_phase = [
        [13.0] * 3,
        [10.0] * 3,
        [9.0] * 3,
        [11.0] * 3,
        [12.0] * 3,
    ]  # 3 and the 2 of the step before
    assert run.share == pytest.approx(5 / (5 * 10))


def test_a_run_watches_its_training_batch():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    loop = TrainingLoop(model, lambda: model(torch.randn(20, 3)).sum().backward(), torch.randn(5, 3), "0")
    run = monitor.TimedRun(loop, 4, of_batch=True)
    run.warm_up()
    run.advance(8)
    assert [len(seconds) for seconds in run.by_phase] == [2] * 4
    assert {record.n for record in run.monitor.history} == {20}
