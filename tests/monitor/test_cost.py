"""What a monitor says that it costs, on clocks that the test turns: a second passes where the test says so."""

import copy
import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fake_device import FakeStreams
from torch import Tensor, nn

from fastent import Moments
from fastent import SpectralEntropyMonitor as Monitor
from fastent.monitor import cost, deferred
from fastent.monitor.cost import Clock, Cost
from fastent.monitor.deferred import DeferredEntropy, Devices, Ring, TorchFormer


class Seconds:
    """A clock; `spend` makes a function that lets time pass before it does what another one does."""

    def __init__(self) -> None:
        self.now = 100.0
        self.reads = 0

    def __call__(self) -> float:
        self.reads += 1
        return self.now

    def spend(self, seconds: float, function: Callable[..., Any] = lambda *given: None) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.now += seconds
            return function(*args, **kwargs)

        return call


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> Seconds:
    clock = Seconds()
    monkeypatch.setattr(cost, "perf_counter", clock)
    monkeypatch.setattr(deferred, "centered_matrix", clock.spend(2.0, deferred.centered_matrix))
    monkeypatch.setattr(deferred, "entropy_of_rows", clock.spend(3.0, deferred.entropy_of_rows))
    return clock


@pytest.fixture
def probe() -> Tensor:
    return torch.randn(40, 6, generator=torch.Generator().manual_seed(0))


def model(seconds: Seconds) -> nn.Module:
    """Two layers, whose forward pass takes 5 s."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    net.register_forward_pre_hook(seconds.spend(5.0))
    return net


def test_each_second_is_counted_once_and_where_it_was_spent(seconds: Seconds, probe: Tensor) -> None:
    monitor = Monitor(model(seconds), probe, ["0", "2"], every=10, on_record=seconds.spend(0.25))
    assert monitor.cost == Cost()
    for step in range(30):
        seconds.now += 1.0  # training
        monitor.step(step)
    # One evaluation is the pass, two covariances, two entropies and two records.
    each = {"forward": 5.0, "covariance": 4.0, "eigenvalues": 6.0, "recording": 0.5}
    total = {name: 3 * value for name, value in each.items()}
    # From the first to the third two of them, and 20 steps of training.
    assert monitor.cost == Cost(**total, evaluations=3, share=31.0 / (31.0 + 20.0))
    assert monitor.cost.seconds == 46.5


def test_a_step_that_is_not_due_reads_no_clock(seconds: Seconds, probe: Tensor) -> None:
    monitor = Monitor(model(seconds), probe, "2", every=100)
    monitor.step(0)
    reads = seconds.reads
    for step in range(1, 100):
        monitor.step(step)
    assert seconds.reads == reads > 0


def test_the_share_is_not_known_from_one_evaluation(seconds: Seconds, probe: Tensor) -> None:
    monitor = Monitor(model(seconds), probe, "2", every=1)
    monitor.step(0)
    assert (monitor.cost.evaluations, monitor.cost.share) == (1, None)
    monitor.step(0)  # once more in the same step
    assert (monitor.cost.evaluations, monitor.cost.share) == (1, None)


def test_an_evaluation_that_fails_has_taken_its_time_and_counts_once(seconds: Seconds, probe: Tensor) -> None:
    net = model(seconds)
    monitor = Monitor(net, probe, "2", every=1)
    broken = net.register_forward_pre_hook(lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        monitor.step(0)
    broken.remove()
    monitor.step(0)
    assert (monitor.cost.evaluations, monitor.cost.forward, monitor.cost.covariance) == (1, 10.0, 2.0)
    with monitor._evaluations.clock.part("recording"):
        seconds.now += 1.0
    assert monitor.cost.recording == 1.0  # nothing was left open


def test_rows_that_are_merged_count_where_they_are_added_up(
    seconds: Seconds, probe: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Moments, "update", seconds.spend(2.0, Moments.update))
    monkeypatch.setattr(deferred, "entropy_of_matrix", seconds.spend(3.0, deferred.entropy_of_matrix))
    monitor = Monitor()
    for step in range(2):
        for part in probe.split(20):
            monitor.observe(step, part, layer="a", merge=True)
        seconds.now += 7.0
    monitor.flush()
    found = monitor.cost
    assert (found.covariance, found.eigenvalues, found.forward, found.evaluations) == (8.0, 6.0, 0.0, 2)


def test_waiting_is_counted_where_training_waits(
    seconds: Seconds, probe: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = FakeStreams()
    ring = Ring(streams, TorchFormer())
    evaluations = DeferredEntropy(capacity=1, on_full="block", device_of=lambda x: ring)
    monkeypatch.setattr(deferred.Worker, "wait", seconds.spend(4.0, deferred.Worker.wait))
    for step in range(2):
        opened = evaluations.open(step)
        assert opened is not None
        with opened:
            opened.add("a", probe)
        streams.tick()
    evaluations.flush()
    assert evaluations.clock.cost.waiting == 8.0
    evaluations.close()


def test_on_a_device_the_pass_and_the_covariances_take_its_own_time_and_nobody_waits(
    seconds: Seconds, probe: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = FakeStreams()
    ring = Ring(streams, TorchFormer())
    monkeypatch.setattr(Devices, "of", lambda self, x: ring)
    monitor = Monitor(model(seconds), probe, ["0", "2"], every=1)
    monitor.step(0)  # not known before this one: its pass is on the host's clock
    streams.tick()
    monitor.flush()
    first = monitor.cost
    # A mark is a second: one covariance lies between two marks.
    assert (first.forward, first.covariance, first.queueing) == (5.0, 2.0, 4.0)
    monitor.step(1)
    assert monitor.cost.forward == 5.0  # not there yet
    streams.tick()
    monitor.flush()
    # Six marks in turn: the pass begins, two covariances begin and end, the pass ends.
    assert monitor.cost.forward == 5.0 + (5.0 - 2.0)
    assert monitor.cost.covariance == 4.0
    assert monitor.cost.queueing == 4.0 + (5.0 + 4.0)
    assert monitor.cost.eigenvalues == 0.0
    assert monitor.cost.seconds == 13.0 + monitor.cost.waiting  # the host's, which is the longer
    monitor.close()


def test_a_pass_that_is_not_over_on_the_device_is_waited_for_by_the_worker_alone(
    seconds: Seconds, probe: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = FakeStreams()
    ring = Ring(streams, TorchFormer())
    monkeypatch.setattr(Devices, "of", lambda self, x: ring)
    monitor = Monitor(model(seconds), probe, ["0"], every=1)
    monitor.step(0)
    streams.tick()
    monitor.flush()
    marked = streams.mark

    def held(stamp: Any) -> None:
        marked(stamp)
        stamp.passed = False
        stamps.append(stamp)

    stamps: list[Any] = []
    monkeypatch.setattr(streams, "mark", held)
    monitor.step(1)
    streams.tick()
    assert not monitor._evaluations.flush(0.05)
    assert monitor.step(1) == []
    for stamp in stamps:
        stamp.passed = True
    assert [record.step for record in monitor.flush()] == [1]
    monitor.close()


def test_the_worker_has_a_sum_of_its_own(probe: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    host = deferred.Host()
    evaluations = DeferredEntropy(device_of=lambda x: host)
    opened = evaluations.open(0)
    assert opened is not None
    with opened:
        opened.add("a", probe)
    evaluations.flush()
    assert evaluations.clock.cost.worker == 0.0  # as long as nobody has asked what has arrived
    list(evaluations.arrived())
    found = evaluations.clock.cost
    assert found.worker > 0.0 == found.eigenvalues
    assert found.seconds == found.covariance + found.waiting
    evaluations.close()


def test_it_can_be_logged_and_is_shown_and_belongs_to_its_process(seconds: Seconds, probe: Tensor) -> None:
    monitor = Monitor(model(seconds), probe, ["0", "2"], every=10)
    assert repr(monitor) == "<SpectralEntropyMonitor of 2 layers (0, 2), every 10 steps: no evaluation yet>"
    monitor.step(0)
    assert str(monitor.cost) == "15000 ms an evaluation: forward 5000, covariance 4000, eigenvalues 6000"
    assert repr(monitor).endswith(f"every 10 steps: {monitor.cost}>")
    assert json.loads(json.dumps(dataclasses.asdict(monitor.cost)))["forward"] == 5.0
    assert not {"cost", "forward", "share"} & monitor.state_dict().keys()
    assert copy.deepcopy(monitor).cost == Cost()
    with pytest.raises(dataclasses.FrozenInstanceError):
        monitor.cost.forward = 0.0  # type: ignore[misc]


def test_a_part_within_a_part_is_not_counted_twice(seconds: Seconds) -> None:
    clock = Clock()
    with clock.part("forward"):
        seconds.now += 1.0
        for _ in range(2):
            with clock.part("covariance"):
                seconds.now += 2.0
                with clock.part("covariance"):
                    seconds.now += 4.0
        seconds.now += 8.0
    with clock.part("eigenvalues"):
        seconds.now += 16.0
    assert clock.cost == Cost(forward=9.0, covariance=12.0, eigenvalues=16.0)
