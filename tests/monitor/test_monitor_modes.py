"""The monitor's two modes: the same records, and what is known when while evaluations are under way."""

import copy
import json
import math
import pickle
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fake_device import FakeStreams, Operations
from torch import Tensor, nn

from fastent import Status, spectral_entropy
from fastent.monitor import deferred
from fastent.monitor.deferred import Devices, Ring, TorchFormer
from fastent.monitor.monitor import SpectralEntropyMonitor as Monitor
from fastent.monitor.monitor import StopAfterCrossing
from fastent.records import EntropyRecord


def inputs(seed: int = 0, n: int = 48, d: int = 6) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def line(n: int = 20, d: int = 6) -> Tensor:
    """Activations of entropy 0."""
    return torch.outer(torch.arange(float(n)), torch.ones(d))


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeStreams]:
    """Every monitor's device, with a clock that the test turns."""
    fake = FakeStreams()
    slots = Ring(fake, TorchFormer())
    monkeypatch.setattr(Devices, "of", lambda self, x: slots)
    yield fake
    fake.tick()


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def steps(records: list[EntropyRecord]) -> list[tuple[int, str]]:
    return [(record.step, record.layer) for record in records]


# The same records


def test_on_the_cpu_both_modes_leave_the_same_state_to_the_bit(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deferred, "WORKER_FROM", 2)  # the worker for every size
    monkeypatch.setattr(deferred, "_usable_cores", lambda: 2)
    threads = threading.active_count()

    def run(mode: Any) -> tuple[str, list[Any]]:
        handed: list[EntropyRecord] = []
        net = copy.deepcopy(model)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        with Monitor(net, inputs(), ["0", "1", "2"], every=2, threshold=0.5, mode=mode) as monitor:
            for step in range(20):
                handed += monitor.step(step)
                if step % 5 == 0:
                    bad = inputs(step, 5, 9)
                    bad[0, 0] = math.inf
                    for layer, h in {"bad": bad, "gram": inputs(step, 5, 9), "line": line()}.items():
                        monitor.observe(step, h, layer=layer)
                optimizer.zero_grad()
                net(inputs(step)).square().sum().backward()
                optimizer.step()
            handed += monitor.flush()
            assert (threading.active_count() > threads) == (mode == "deferred")
        return json.dumps(monitor.state_dict()), [record.as_dict() for record in handed]

    state, handed = run("sync")
    assert run("deferred") == (state, handed)
    assert len(handed) == 42


def test_in_sync_mode_everything_is_evaluated_at_once(streams: FakeStreams) -> None:
    monitor = Monitor(mode="sync")
    h = inputs()
    monitor.observe(0, h, layer="a")
    assert monitor.history == [EntropyRecord.of(0, "a", spectral_entropy(h))]
    assert not streams.calls
    with pytest.raises(ValueError, match="mode must be one of 'deferred', 'sync'; got 'async'"):
        Monitor(mode="async")  # type: ignore[arg-type]


def test_sampling_errors_need_the_activations_and_are_evaluated_in_line(streams: FakeStreams) -> None:
    monitor, in_line = Monitor(standard_error=True), Monitor(standard_error=True, mode="sync")
    for one in (monitor, in_line):
        one.observe(0, inputs(), layer="a")
    assert monitor.history == in_line.history
    (record,) = monitor.history
    assert record.standard_error is not None
    assert not streams.calls


# Moments


def in_parts(model: nn.Module, h: Tensor, **options: Any) -> Monitor:
    """Four layers whose rows come in parts: a probe's, offset ones in 16 bits, bad ones and constant ones."""
    monitor = Monitor(model, inputs(), ["0", "2"], every=1, batch_size=20, **options)
    monitor.step(0)
    for part in h.split(7):
        monitor.observe(1, (1000 + part).half(), layer="half", merge=True)
        monitor.observe(1, part / 0.0, layer="bad", merge=True)
        monitor.observe(1, torch.ones_like(part), layer="constant", merge=True)
        monitor.observe(1, part, layer="good", merge=True)
    return monitor


def test_the_worker_takes_moments_with_the_bits_of_an_evaluation_in_line(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deferred, "WORKER_FROM", 2)
    monkeypatch.setattr(deferred, "_usable_cores", lambda: 2)
    monitors = [in_parts(model, inputs(3), mode=mode) for mode in ("sync", "deferred")]
    for monitor in monitors:
        monitor.flush()
    first, second = [json.dumps(monitor.state_dict()) for monitor in monitors]
    assert first == second
    assert [r.status.value for r in monitors[0].history if r.step] == [
        "unresolved_offset", "nonfinite", "zero_variance", "ok",
    ]  # fmt: skip
    assert monitors[1].cost.worker > 0.0
    monitors[1].close()


def test_on_a_device_moments_go_their_way_without_a_wait_and_keep_what_rounding_adds(
    model: nn.Module, streams: FakeStreams
) -> None:
    in_line = in_parts(model, inputs(3), mode="sync")
    expected = in_line.flush()
    monitor = in_parts(model, inputs(3))
    assert (monitor.history, monitor.pending) == ([], 1)
    with Operations():  # fails on an operation that stops the host
        monitor._evaluator.end_merging()
    streams.tick()
    handed = monitor.flush()
    assert steps(monitor.history) == steps(in_line.history)
    for got, wanted in zip(monitor.history, in_line.history, strict=True):
        assert (got.status, got.message, got.n, got.mask) == (
            wanted.status,
            wanted.message,
            wanted.n,
            wanted.mask,
        )
        assert got.normalized == pytest.approx(wanted.normalized, abs=1e-13, nan_ok=True)
        assert got.participation_ratio == pytest.approx(wanted.participation_ratio, rel=1e-12, nan_ok=True)
    assert len(handed) == len(expected) + 2
    monitor.close()


def test_the_sum_over_the_ranks_goes_the_same_way(model: nn.Module, streams: FakeStreams) -> None:
    monitor = Monitor(model, inputs(), ["0", "2"], every=1, across_ranks=True)
    assert monitor.step(0) == []
    assert monitor.pending == 1
    streams.tick()
    assert steps(monitor.flush()) == [(0, "0"), (0, "2")]
    monitor.close()


def test_slots_of_moments_are_used_again_beside_those_of_activations(streams: FakeStreams) -> None:
    monitor = Monitor()
    for step in range(3):
        monitor.observe(step, inputs(step), layer="a", merge=True)
        monitor.observe(step, inputs(step), layer="b")
        monitor._evaluator.end_merging()
        streams.tick()
        monitor.flush()
    assert streams.calls["pinned"] == 2
    by_step = [[r.normalized for r in monitor.history if r.step == step] for step in range(3)]
    assert all(pair[0] == pytest.approx(pair[1], abs=1e-13) for pair in by_step)
    monitor.close()


def test_moments_that_find_a_full_ring_are_evaluated_in_line(streams: FakeStreams) -> None:
    monitor = Monitor()
    for step in range(10):
        monitor.observe(step, inputs(step), layer="a", merge=True)
    monitor._evaluator.end_merging()
    assert (monitor.dropped, streams.calls["copy"]) == (0, 8)
    streams.tick()
    assert [r.step for r in monitor.flush()] == list(range(10))
    monitor.close()


# What is known when


def test_records_arrive_later_in_order_each_once_and_in_the_calling_thread(
    model: nn.Module, streams: FakeStreams
) -> None:
    logged: list[tuple[int, int]] = []

    def log(record: EntropyRecord) -> None:
        logged.append((record.step, threading.get_ident()))

    monitor = Monitor(model, inputs(), ["0", "2"], every=2, on_record=log)
    for step in range(5):
        assert monitor.step(step) == []
    assert (monitor.history, monitor.pending, monitor.last_step) == ([], 3, 4)
    streams.tick(4)
    end = time.monotonic() + 10
    handed = monitor.step(5)
    while len(handed) < 4 and time.monotonic() < end:  # a step that is not due hands out what is there
        handed += monitor.step(5)
    assert steps(handed) == [(0, "0"), (0, "2"), (2, "0"), (2, "2")]
    assert monitor.pending == 1
    streams.tick()
    rest = monitor.flush()
    assert steps(rest) == [(4, "0"), (4, "2")]
    assert monitor.flush() == []
    assert monitor.history == handed + rest
    assert logged == [(record.step, threading.get_ident()) for record in monitor.history]
    expected = spectral_entropy(model[0](inputs()).detach())
    assert (rest[0].normalized, rest[0].status, rest[0].n) == (expected.normalized, Status.OK, 48)
    monitor.close()


def test_a_crossing_and_a_stop_are_known_once_the_record_has_arrived(streams: FakeStreams) -> None:
    monitor = Monitor(threshold=0.5, stopping=StopAfterCrossing(steps=0))
    monitor.observe(100, line(), layer="a")
    assert (monitor.crossed, monitor.crossings, monitor.should_stop()) == (False, {}, False)
    streams.tick()
    monitor.flush()
    assert (monitor.crossed, monitor.crossings, monitor.should_stop()) == (True, {"a": 100}, True)
    monitor.close()


def test_a_checkpoint_holds_what_was_asked_for_and_a_step_still_hands_it_out(streams: FakeStreams) -> None:
    monitor, in_line = Monitor(threshold=0.5), Monitor(threshold=0.5, mode="sync")
    for one in (monitor, in_line):
        one.observe(3, line(), layer="a")
    threading.Timer(0.05, streams.tick).start()
    state = monitor.state_dict()
    expected = in_line.state_dict()
    (ratio,) = state["history"].pop("participation_ratio")  # of the device's norms
    assert [ratio] == [pytest.approx(r, rel=1e-12) for r in expected["history"].pop("participation_ratio")]
    assert state == expected
    assert steps(monitor.flush()) == [(3, "a")]
    monitor.close()


def test_loading_a_state_forgets_what_is_under_way(streams: FakeStreams) -> None:
    monitor = Monitor()
    monitor.observe(1, inputs(), layer="a")
    streams.tick()
    state = monitor.state_dict()
    monitor.observe(5, inputs(1), layer="a")
    monitor.observe(6, torch.full((4, 2), math.nan), layer="b")
    threading.Timer(0.05, streams.tick).start()
    monitor.load_state_dict(state)
    assert (steps(monitor.history), monitor.pending, monitor.flush()) == ([(1, "a")], 0, [])
    monitor.observe(5, inputs(1), layer="a")  # again, and a width that "b" never had
    monitor.observe(6, inputs(), layer="b")
    streams.tick()
    assert steps(monitor.flush()) == [(5, "a"), (6, "b")]
    monitor.close()


def test_a_layer_under_way_is_not_asked_for_twice_nor_with_another_width(streams: FakeStreams) -> None:
    monitor = Monitor()
    monitor.observe(1, inputs(), layer="a")
    with pytest.warns(UserWarning, match="layer 'a' was observed again at step 1"):
        monitor.observe(1, inputs(), layer="a")
    with pytest.raises(ValueError, match="layer 'a' had d = 6 and now has d = 5"):
        monitor.observe(2, inputs(d=5), layer="a")
    streams.tick()
    assert steps(monitor.flush()) == [(1, "a")]
    monitor.close()


def test_what_the_worker_does_leaves_the_training_thread_without_a_wait(
    model: nn.Module, streams: FakeStreams
) -> None:
    x = inputs()
    monitor = Monitor(model, x, ["0", "2"], every=1)
    monitor.step(0)
    streams.tick()
    monitor.flush()
    monitor._watched.probe.check = lambda: None  # type: ignore[method-assign, union-attr]  # hashes on the CPU alone
    with Operations() as operations:
        assert monitor.step(1) == []
    assert operations.seen["addmm"] >= 2  # the pass ran inside
    assert streams.calls["pinned"] == 2
    streams.tick()
    assert len(monitor.flush()) == 2
    monitor.close()


def test_a_warning_that_is_an_error_loses_no_record(streams: FakeStreams) -> None:
    monitor = Monitor(threshold=0.9)
    for step in range(2):
        monitor.observe(step, inputs(step, 5, 9), layer="a")  # its ceiling is 0.63
    streams.tick()
    with pytest.raises(UserWarning, match=r"the threshold 0\.9 is above 0\.6309"):
        monitor.flush()
    assert steps(monitor.flush()) == [(0, "a"), (1, "a")]
    monitor.close()


# Bad ends


def test_nan_raises_on_request_at_the_call_where_it_arrives(streams: FakeStreams) -> None:
    monitor = Monitor(on_nonfinite="raise")
    monitor.observe(4, inputs() / 0.0, layer="a")
    monitor.observe(5, inputs(), layer="b")
    streams.tick()
    message = r"layer 'a' at step 4: NaN or Inf in 6 of 6 features, the first is feature 0 \(torch\.float32\)"
    with pytest.raises(FloatingPointError, match=message):
        monitor.flush()
    assert [record.status for record in monitor.history] == [Status.NONFINITE, Status.OK]
    assert steps(monitor.flush()) == [(4, "a"), (5, "b")]
    monitor.close()


def test_a_failure_in_the_worker_names_its_step_at_the_next_call_and_the_others_are_kept(
    streams: FakeStreams,
) -> None:
    monitor = Monitor()
    for step in range(3):
        monitor.observe(step, inputs(step), layer="a")
    streams.events[1].error = RuntimeError("CUDA error: unspecified launch failure")
    streams.tick()
    with pytest.raises(RuntimeError, match="evaluation of step 1 failed: RuntimeError: CUDA error"):
        monitor.flush()
    assert steps(monitor.flush()) == [(0, "a"), (2, "a")]
    streams.events[1].error = None
    monitor.observe(3, inputs(3), layer="a")
    streams.tick()
    assert steps(monitor.flush()) == [(3, "a")]
    monitor.close()


def test_a_failure_in_the_worker_is_recorded_in_its_place_on_request(streams: FakeStreams) -> None:
    monitor = Monitor(on_error="record")
    for step in range(3):
        monitor.observe(step, inputs(step), layer="a")
    streams.events[1].error = RuntimeError("CUDA error: unspecified launch failure")
    streams.tick()
    with pytest.warns(RuntimeWarning, match="step 1 is recorded as failed, and training goes on: ") as caught:
        records = monitor.flush()
    assert len(caught) == 1
    assert [(record.step, record.status, record.d) for record in records] == [
        (0, Status.OK, 6),
        (1, Status.FAILED, 6),
        (2, Status.OK, 6),
    ]
    assert records[1].message == "the evaluation failed: RuntimeError: CUDA error: unspecified launch failure"
    monitor.close()


def test_leaving_by_an_exception_keeps_the_records_and_the_exception(streams: FakeStreams) -> None:
    monitor = Monitor()

    def train() -> None:
        with monitor:
            for step in range(3):
                monitor.observe(step, inputs(step), layer="a")
            streams.events[0].error = RuntimeError("CUDA error: device-side assert")
            streams.tick()
            raise ArithmeticError("diverged")

    with pytest.raises(ArithmeticError, match="diverged") as caught:
        train()
    assert steps(monitor.history) == [(1, "a"), (2, "a")]
    assert "step 0 failed" in caught.value.__notes__[0]
    with pytest.raises(RuntimeError, match="the monitor is closed"):
        monitor.observe(3, inputs(), layer="a")
    monitor.close()


def test_a_dropped_evaluation_is_counted_and_not_even_run(model: nn.Module, streams: FakeStreams) -> None:
    passes = []
    model[0].register_forward_hook(lambda module, args, out: passes.append(0))
    monitor = Monitor(model, inputs(), "2", every=1, check=False)
    for step in range(8):
        monitor.step(step)
    with pytest.warns(RuntimeWarning, match="the evaluation of step 8 was dropped: 8 are waiting") as caught:
        monitor.step(8)
    assert caught[0].filename == __file__
    monitor.step(8)  # seen again: not dropped again
    monitor.step(9)
    assert (monitor.dropped, len(passes)) == (2, 8)
    streams.tick()
    assert [record.step for record in monitor.flush()] == list(range(8))
    assert monitor.state_dict()["dropped"] == 2
    monitor.close()


def test_a_sharded_model_is_run_on_every_rank_also_when_rank_0_drops(
    model: nn.Module, streams: FakeStreams, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastent.monitor import probe

    monkeypatch.setattr(probe, "is_sharded", lambda module: True)
    passes = []
    model[0].register_forward_hook(lambda module, args, out: passes.append(0))
    monitor = Monitor(model, inputs(), "2", every=1, check=False)
    for step in range(8):
        monitor.step(step)
    with pytest.warns(RuntimeWarning, match="step 8 was dropped"):
        monitor.step(8)
    assert len(passes) == 9  # the other ranks wait in theirs
    streams.tick()
    monitor.close()


def test_a_copy_holds_what_was_asked_for_and_goes_on_by_itself(
    model: nn.Module, streams: FakeStreams
) -> None:
    monitor = Monitor(model, inputs(), "2", every=1)
    monitor.step(0)
    threading.Timer(0.05, streams.tick).start()
    twin = copy.deepcopy(monitor)
    again = pickle.loads(pickle.dumps(monitor))
    for one in (monitor, twin, again):
        handed = one.step(1)
        streams.tick()
        assert steps(handed + one.flush()) == [(0, "2"), (1, "2")]
        one.close()
