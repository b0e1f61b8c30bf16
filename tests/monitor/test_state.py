"""The state of a monitor: asking for it changes nothing, its shape is fixed, and checkpoints of every kind take it."""

import copy
import json
import math
import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from fake_device import FakeStreams
from torch import Tensor, nn
from torch.distributed.checkpoint.stateful import Stateful

from fastent import Status, spectral_entropy
from fastent.monitor.deferred import Devices, Ring, TorchFormer
from fastent.monitor.monitor import SpectralEntropyMonitor as Monitor
from fastent.monitor.monitor import StopAfterCrossing
from fastent.records import Collapse, EntropyRecord, columns


def inputs(seed: int = 0, n: int = 48, d: int = 6) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeStreams]:
    """Every monitor's device, with a clock that the test turns."""
    fake = FakeStreams()
    slots = Ring(fake, TorchFormer())
    monkeypatch.setattr(Devices, "of", lambda self, x: slots)
    yield fake
    fake.tick()


# Asking for it changes nothing


def test_a_state_in_the_middle_of_an_accumulation_leaves_it_whole() -> None:
    monitor = Monitor()
    monitor.observe(3, inputs(), layer="a", merge=True)
    state = monitor.state_dict()
    assert state == monitor.state_dict()
    assert monitor.history == []
    monitor.observe(3, inputs(1), layer="a", merge=True)
    records = monitor.flush()
    whole = spectral_entropy(torch.cat([inputs(), inputs(1)])).normalized
    assert [(r.step, r.n, r.normalized) for r in records] == [(3, 96, pytest.approx(whole, abs=1e-13))]
    resumed = Monitor()
    resumed.load_state_dict(state)  # as if the step had ended where the state was taken
    half = spectral_entropy(inputs()).normalized
    assert [(r.step, r.n, r.normalized) for r in resumed.history] == [(3, 48, pytest.approx(half, abs=1e-13))]


def test_a_state_holds_what_is_under_way_and_hands_none_of_it_out(streams: FakeStreams) -> None:
    logged: list[EntropyRecord] = []
    monitor = Monitor(threshold=0.5, stopping=StopAfterCrossing(0), on_record=logged.append)
    monitor.observe(3, torch.outer(torch.arange(20.0), torch.ones(6)), layer="a")
    threading.Timer(0.05, streams.tick).start()
    state = monitor.state_dict()
    assert (monitor.history, logged, monitor.pending) == ([], [], 1)
    assert not monitor.crossed
    assert not monitor.should_stop()
    resumed = Monitor(threshold=0.5, stopping=StopAfterCrossing(0))
    resumed.load_state_dict(state)
    assert resumed.should_stop()
    assert monitor.flush() == logged == monitor.history == resumed.history
    assert monitor.should_stop()
    assert monitor.state_dict() == state
    monitor.close()


@pytest.mark.filterwarnings("ignore:step 1 is recorded as failed")
@pytest.mark.parametrize("on_error", ["raise", "record"])
def test_a_state_raises_nothing_of_what_waits_to_be_raised(streams: FakeStreams, on_error: Any) -> None:
    monitor = Monitor(on_error=on_error, on_nonfinite="raise")
    for step in range(3):
        monitor.observe(step, inputs(step) * (math.nan if step == 2 else 1.0), layer="a")
    streams.events[1].error = RuntimeError("CUDA error: unspecified launch failure")
    streams.tick()
    history = monitor.state_dict()["history"]
    failed = [Status.FAILED] if on_error == "record" else []
    assert history["status"] == [Status.OK, *failed, Status.NONFINITE]
    with pytest.raises(RuntimeError if on_error == "raise" else FloatingPointError):
        monitor.flush()
    streams.events[1].error = None
    assert monitor.state_dict()["history"] == history
    monitor.close()


# Nor does a copy


def pickled(monitor: Monitor) -> Monitor:
    return pickle.loads(pickle.dumps(monitor))  # type: ignore[no-any-return]


copies = pytest.mark.parametrize("copied", [copy.deepcopy, pickled])


@copies
def test_a_copy_in_the_middle_of_an_accumulation_leaves_it_whole(
    copied: Callable[[Monitor], Monitor],
) -> None:
    monitor = Monitor()
    monitor.observe(3, inputs(), layer="a", merge=True)
    state, twin = monitor.state_dict(), copied(monitor)
    assert (monitor.history, monitor.state_dict(), twin.state_dict()) == ([], state, state)
    monitor.observe(3, inputs(1), layer="a", merge=True)
    assert [(r.step, r.n) for r in monitor.flush()] == [(3, 96)]
    with pytest.warns(UserWarning, match="observed again at step 3"):  # as after a load_state_dict
        twin.observe(3, inputs(1), layer="a", merge=True)
    assert [(r.step, r.n) for r in twin.flush()] == [(r.step, r.n) for r in twin.history] == [(3, 48)]


@copies
def test_a_copy_holds_what_is_under_way_and_the_original_hands_it_out(
    streams: FakeStreams, copied: Callable[[Monitor], Monitor]
) -> None:
    logged: list[EntropyRecord] = []
    monitor = Monitor(threshold=0.5, stopping=StopAfterCrossing(0), on_record=logged.append)
    monitor.observe(3, torch.outer(torch.arange(20.0), torch.ones(6)), layer="a")
    threading.Timer(0.05, streams.tick).start()
    twin = copied(monitor)
    assert (monitor.history, logged, monitor.pending) == ([], [], 1)
    assert not monitor.should_stop()
    assert twin.should_stop()
    held = twin.flush()
    assert (logged, twin.pending) == ([], 0)  # once, by the original
    assert monitor.flush() == logged == monitor.history == held == twin.history != []
    assert twin.state_dict() == monitor.state_dict()
    for one in (monitor, twin):
        one.close()


@copies
@pytest.mark.parametrize("on_error", ["raise", "record"])
@pytest.mark.filterwarnings("ignore:step 1 is recorded as failed")
def test_a_copy_raises_nothing_and_what_waits_to_be_raised_stays_with_the_original(
    streams: FakeStreams, on_error: Any, copied: Callable[[Monitor], Monitor]
) -> None:
    monitor = Monitor(on_error=on_error, on_nonfinite="raise")
    for step in range(3):
        monitor.observe(step, inputs(step) * (math.nan if step == 2 else 1.0), layer="a")
    streams.events[1].error = RuntimeError("CUDA error: unspecified launch failure")
    streams.tick()
    twin = copied(monitor)
    twin.flush()
    failed = [Status.FAILED] if on_error == "record" else []
    assert [record.status for record in twin.history] == [Status.OK, *failed, Status.NONFINITE]
    with pytest.raises(RuntimeError if on_error == "raise" else FloatingPointError):
        monitor.flush()
    streams.events[1].error = None
    for one in (monitor, twin):
        one.close()


# Nor does a resumed run tell of a collapse twice, or never


def alarmed(told: list[int], state: Any = None, *, fall: float | None = 0.05) -> Monitor:
    alarm = {} if fall is None else {"collapse": Collapse(fall), "on_collapse": lambda r: told.append(r.step)}
    monitor = Monitor(**alarm)
    if state is not None:
        monitor.load_state_dict(json.loads(json.dumps(state)))
    return monitor


def wide(along: int) -> Tensor:
    """Activations that are wide along some of 6 axes."""
    return inputs() * torch.tensor([1.0] * along + [0.01] * (6 - along))


def test_a_resumed_run_tells_of_a_collapse_neither_twice_nor_never() -> None:
    first: list[int] = []
    monitor = alarmed(first)
    states = []
    for step, along in enumerate([6, 6, 3, 1]):
        states.append(monitor.state_dict())
        monitor.observe(step, wide(along), layer="a")
    assert first == [2]
    for step, state in enumerate(states):
        again: list[int] = []
        resumed = alarmed(again, state)
        resumed.flush()
        for later, along in list(enumerate([6, 6, 3, 1]))[step:]:
            resumed.observe(later, wide(along), layer="a")
        assert again == ([] if step == 3 else [2])
        assert resumed.collapsed == {"a": 2}
        assert resumed.state_dict() == monitor.state_dict()


def test_a_collapse_under_way_in_a_state_is_told_of_by_the_resumed_run_and_by_no_copy(
    streams: FakeStreams,
) -> None:
    first: list[int] = []
    monitor = alarmed(first)
    for step, along in enumerate([6, 1]):
        monitor.flush()
        monitor.observe(step, wide(along), layer="a")
        streams.tick()
    state, twin = monitor.state_dict(), copy.deepcopy(monitor)
    twin.flush()
    assert (monitor.collapsed, first, twin.collapsed) == ({}, [], {"a": 1})
    again: list[int] = []
    resumed = alarmed(again, state)
    assert resumed.collapsed == {"a": 1}
    late: list[int] = []
    alarmed(late, resumed.state_dict()).flush()  # resumed again before anybody was told
    for one in (resumed, monitor):
        one.flush()
        one.flush()
    assert first == again == late == [1]
    assert resumed.state_dict() == monitor.state_dict()
    for one in (monitor, twin, resumed):
        one.close()


def test_an_alarm_that_is_new_or_another_looks_through_the_saved_history() -> None:
    before = alarmed([], fall=None)
    for step, along in enumerate([6, 5, 1]):
        before.observe(step, wide(along), layer="a")
    told: list[int] = []
    resumed = alarmed(told, before.state_dict())
    resumed.flush()
    assert told == [1]
    other = alarmed(told, resumed.state_dict(), fall=0.5)
    other.flush()
    assert told == [1]  # nobody is told of a layer again
    assert other.collapsed == {"a": 2}


# Its shape


def nesting(state: Any) -> Any:
    return {key: nesting(value) for key, value in state.items()} if isinstance(state, dict) else None


def leaves(value: Any) -> list[Any]:
    if isinstance(value, dict | list):
        return [
            leaf for item in (value.values() if isinstance(value, dict) else value) for leaf in leaves(item)
        ]
    return [value]


def recorded() -> Monitor:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    return Monitor(model, inputs(), ["2", "0"], every=2, threshold=0.9, history_size=3)


def test_a_state_has_the_same_keys_whatever_was_recorded() -> None:
    monitor = recorded()
    empty = monitor.state_dict()
    for step in range(9):
        monitor.step(step)
    monitor.observe(8, inputs() * math.nan, layer="other.name")
    full = monitor.state_dict()
    assert nesting(full) == nesting(empty) == nesting(Monitor().state_dict())
    assert full["layers"]["name"] == ["2", "0", "other.name"]
    assert full["history"]["step"] == [4, 4, 6, 6, 8, 8, 8]
    assert {type(leaf) for leaf in leaves(full)} == {str, int, float, type(None)}


def other_layers(layers: Any, **options: Any) -> Monitor:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    return Monitor(model, inputs(), layers, every=2, threshold=0.99, **options)


def test_a_run_that_goes_on_with_other_layers_says_which_and_decides_by_those_it_watches() -> None:
    before = other_layers(["0", "1"])
    before.observe(0, torch.outer(torch.arange(20.0), torch.ones(6)), layer="seen")
    before.step(0)
    with pytest.warns(UserWarning, match="of other layers") as said:
        (after := other_layers(["1", "2"])).load_state_dict(before.state_dict())
    assert [str(warning.message) for warning in said] == [
        "the state is of other layers than this monitor's (in it and not watched, so without further records: '0'; "
        "watched and not in it, so new from here on: '2'). If that is not meant, watch the layers of the state, or "
        "leave it out"
    ]
    assert after.layers == ("1", "2", "seen")
    assert after.history == before.history
    assert not after.crossed
    for step in (1, 2):
        after.step(step)
    assert [(record.step, record.layer) for record in after.history[3:]] == [(2, "1"), (2, "2")]
    assert after.crossed
    # What was watched once is not taken for observed in the next resume either, and is back where it is watched.
    with pytest.warns(UserWarning, match="without further records: '0'\\)"):
        (again := other_layers(["1", "2"])).load_state_dict(json.loads(json.dumps(after.state_dict())))
    assert again.crossed
    assert again.state_dict() == after.state_dict()
    (whole := other_layers(["0", "1", "2"])).load_state_dict(after.state_dict())
    assert whole.layers == ("0", "1", "2", "seen")


@pytest.mark.filterwarnings("error")
def test_layers_that_are_the_same_or_not_known_yet_are_no_difference() -> None:
    def first(model: nn.Module, probe: Tensor) -> dict[str, Tensor]:
        return {"first": model[0](probe)}

    for layers in (["0", "1"], "*", first):
        before = other_layers(layers)
        before.step(0)
        for check in (False, True):
            for state in (before.state_dict(), other_layers(layers).state_dict()):
                other_layers(layers, check=check).load_state_dict(state)
    Monitor(other_layers("0")._watched.model, "batch", "*").load_state_dict(  # type: ignore[union-attr]
        {**before.state_dict(), "probe": "batch", "ran": {"layer": ["1"], "d": [8]}}
    )


def test_a_shallow_copy_is_refused_with_the_two_that_there_are() -> None:
    with pytest.raises(TypeError, match=r"copy\.deepcopy\(monitor\).*state_dict\(\) of this one"):
        copy.copy(recorded())


def test_torch_load_reads_a_state_by_weights_alone(tmp_path: Path) -> None:
    monitor, again = recorded(), recorded()
    monitor.step(0)
    torch.save({"monitor": monitor.state_dict()}, tmp_path / "checkpoint.pt")
    again.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True)["monitor"])
    assert again.state_dict() == monitor.state_dict()
    assert again.history == monitor.history != []


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
def test_a_distributed_checkpoint_saves_and_loads_a_monitor_as_it_does_a_model(tmp_path: Path) -> None:
    monitor, again = recorded(), recorded()
    assert isinstance(monitor, Stateful)
    for step in range(5):
        monitor.step(step)
    dcp.save({"monitor": monitor}, checkpoint_id=tmp_path, no_dist=True)
    dcp.load({"monitor": again}, checkpoint_id=tmp_path, no_dist=True)
    assert again.state_dict() == monitor.state_dict()
    assert again.history == monitor.history != []


# Damaged ones

HOSTILE = (None, "x", [], {}, -1, 10**400, math.inf, math.nan, True)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Give the way to each value of a state, of lists to their first two."""
    yield path
    inner = (
        value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    )
    for key, each in inner:
        yield from places(each, (*path, key))


def put(state: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    state = copy.deepcopy(state)
    inner = state
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return state


def refusal(monitor: Monitor, state: Any) -> str:
    try:
        monitor.load_state_dict(state)
    except ValueError as error:
        return str(error)
    return ""


def test_a_state_with_any_value_replaced_is_refused_as_a_whole_or_serves() -> None:
    original = Monitor(collapse=Collapse())
    for step in range(0, 1000, 500):
        original.observe(step, inputs(step), layer="a")
    saved = json.loads(json.dumps(original.state_dict()))
    monitor, tried = Monitor(collapse=Collapse()), 0
    for path in places(saved):
        for value in HOSTILE:
            before, tried = monitor.state_dict(), tried + 1
            said = refusal(monitor, put(saved, path, value))
            if said:
                assert said.startswith("nothing is loaded: ")
                assert len(said) < 500
                assert monitor.state_dict() == before
            else:
                json.dumps(monitor.state_dict(), allow_nan=False)
                assert monitor.predict_grok_time().reason
                monitor.load_state_dict(saved)
    assert tried > 500


# Older ones

VERSION_2 = """
{"version": 2, "probe": null, "last_step": 10, "last_called": null, "unfinished": null, "ran": {}, "dropped": 0,
 "threshold": 0.5, "layers": {"a": {"d": 2, "newest": 10, "crossed_at": 10, "course": {"first": 0, "peak": null,
 "below_since": null, "recent": [[0, 1.0], [10, 0.0]], "usable": [1.0, 0.0], "peaks": []}}},
 "history": [{"step": 0, "layer": "a", "normalized": 1.0, "entropy": 0.6931471805599453, "effective_rank": 2.0,
 "participation_ratio": 2.0, "total_variance": 1.0, "ceiling": 1.0, "status": "ok", "flags": [], "message": "", "n": 4,
 "d": 2, "bias": null, "standard_error": null, "mask": null}, {"step": 10, "layer": "a", "normalized": 0.0,
 "entropy": 0.0, "effective_rank": 1.0, "participation_ratio": 1.0, "total_variance": 5.0, "ceiling": 0.0,
 "status": "rank_limited", "flags": ["rank_limited"], "message": "2 samples in 2 dimensions: H cannot exceed 0.0000; 3 lift the ceiling",
 "n": 2, "d": 2, "bias": null, "standard_error": null, "mask": null}]}
"""  # noqa: E501  as that release wrote it


@pytest.mark.parametrize("version", [1, 2, 3])
def test_states_of_older_versions_are_read(version: int) -> None:
    old = json.loads(VERSION_2)
    if version == 1:
        old.update(version=1, last_probed=None)
        for name in ("last_called", "unfinished", "ran", "dropped"):
            del old[name]
        del old["layers"]["a"]["course"]
    written = old["history"]
    if version == 3:
        layer = old["layers"]["a"]
        layer = {"name": "a", **layer, **layer.pop("course")}
        old.update(version=3, ran={"layer": [], "d": []})
        old.update(layers=columns(layer, [layer]), history=columns(written[0], written))
    monitor, same = (Monitor(threshold=0.5, collapse=Collapse()) for _ in range(2))
    monitor.load_state_dict(old)
    same.observe(0, torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]), layer="a")
    same.observe(10, torch.tensor([[1.0, 2.0], [-1.0, -2.0]]), layer="a")
    assert [record.as_dict() for record in monitor.history] == written
    assert (monitor.crossings, monitor.collapsed, monitor.last_step) == ({"a": 10}, {"a": 10}, 10)
    state = monitor.state_dict()
    assert state["layers"] == same.state_dict()["layers"]
    monitor.load_state_dict(json.loads(json.dumps(state)))
    assert monitor.state_dict() == state
