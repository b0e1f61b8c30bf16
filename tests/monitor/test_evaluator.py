"""What a layer may do at a later probe, and a hook with activations: a status, never the end of training."""

import copy
import json
import math
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastent
from fastent import Status, spectral_entropy
from fastent.monitor.monitor import SpectralEntropyMonitor as Monitor
from fastent.records import rows_of


def inputs(seed: int = 0, n: int = 48, d: int = 6) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


class Mixture(nn.Module):
    """Three experts; `routes` gives each its rows of the input, or None where it is not called."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(nn.Linear(6, 6 + i) for i in range(3))
        self.routes: list[slice | None] = [slice(0, 16), slice(16, 32), slice(32, 48)]

    def forward(self, x: Tensor) -> list[Tensor]:
        return [e(x[rows]) for e, rows in zip(self.experts, self.routes, strict=True) if rows is not None]


NAMES = ["experts.0", "experts.1", "experts.2"]


# A later probe


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize(
    ("rows", "status", "n"),
    [(None, Status.NOT_RUN, 0), (slice(0, 0), Status.TOO_FEW_ROWS, 0), (slice(5, 6), Status.TOO_FEW_ROWS, 1)],
)
def test_an_expert_without_tokens_has_a_status_and_the_others_are_recorded(
    rows: slice | None, status: Status, n: int, checked: bool
) -> None:
    model = Mixture()
    seen: list[fastent.EntropyRecord] = []
    monitor = Monitor(model, inputs(), NAMES, every=1, threshold=0.999, on_record=seen.append, check=checked)
    monitor.step(0)
    model.routes[1] = rows
    records = monitor.step(1)
    assert [(r.layer, r.status, r.n, r.d) for r in records] == [
        ("experts.0", Status.OK, 16, 6),
        ("experts.1", status, n, 7),
        ("experts.2", Status.OK, 16, 8),
    ]
    idle = records[1]
    assert not idle.status.usable
    assert idle.flags == (status,)
    assert all(math.isnan(x) for x in (idle.normalized, idle.entropy, idle.effective_rank, idle.ceiling))
    assert idle.message
    assert seen == monitor.history
    assert monitor.crossings == dict.fromkeys(NAMES, 0)
    model.routes[1] = slice(16, 32)
    assert [r.status for r in monitor.step(2)] == [Status.OK] * 3
    history = fastent.History.from_records(monitor.history, layer="experts.1")
    assert history.usable.tolist() == [True, False, True]
    state = json.loads(json.dumps(monitor.state_dict(), allow_nan=False))
    again = Monitor(model, inputs(), NAMES, every=1, threshold=0.999)
    again.load_state_dict(state)
    assert again.state_dict() == state


@pytest.mark.parametrize("rows", [None, slice(0, 0), slice(5, 6)])
def test_an_expert_that_is_idle_at_the_first_evaluation_is_an_error_where_it_was_named(
    rows: slice | None,
) -> None:
    model = Mixture()
    model.routes[1] = rows
    error = RuntimeError if rows is None else ValueError
    with pytest.raises(error) as info:
        Monitor(model, inputs(), NAMES)
    assert any("the probe's pass failed at construction" in note for note in info.value.__notes__)
    monitor = Monitor(model, inputs(), NAMES, check=False)
    with pytest.raises(error) as info:
        monitor.step(0)
    assert "in the pass of the monitor's probe at step 0" in info.value.__notes__
    assert monitor.history == []


@pytest.mark.parametrize("probe", [(torch.zeros(8, 6), torch.zeros(8)), {"x": torch.zeros(8, 6)}])
def test_a_probe_that_the_forward_pass_has_no_arguments_for_is_said_to_be_one(probe: Any) -> None:
    with pytest.raises(TypeError) as info:
        Monitor(nn.Sequential(nn.Linear(6, 8)), probe, "0")
    (note,) = [note for note in info.value.__notes__ if "does not fit" in note]
    assert note.startswith("the probe does not fit Sequential.forward(input)")
    assert "of a batch (x, y) give x alone" in note


def test_a_type_error_within_a_pass_that_fits_has_no_such_note() -> None:
    class Wrong(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return len(3)  # type: ignore[arg-type]

    with pytest.raises(TypeError) as info:
        Monitor(Wrong(6, 8), torch.zeros(8, 6), "")
    assert not [note for note in info.value.__notes__ if "does not fit" in note]


def test_the_check_at_construction_is_a_first_evaluation_for_an_expert_that_is_idle_at_step_0() -> None:
    model = Mixture()
    monitor = Monitor(model, inputs(), NAMES)
    model.routes[2] = None
    assert [(r.layer, r.status, r.d) for r in monitor.step(0)][2] == ("experts.2", Status.NOT_RUN, 8)


def test_an_expert_that_no_name_asked_for_is_left_out_with_one_warning_until_it_runs() -> None:
    model = Mixture()
    model.routes[1] = None
    with pytest.warns(UserWarning, match=r"'experts\.1' did not run in the probe's pass") as caught:
        monitor = Monitor(model, inputs(), "experts", every=1, threshold=0.999)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [r.layer for r in monitor.step(0)] == ["experts.0", "experts.2"]
        assert monitor.crossed  # nobody waits for a layer that has not run
        model.routes[1] = slice(16, 32)
        assert [r.layer for r in monitor.step(1)] == NAMES
        model.routes[1] = None
        assert [r.status for r in monitor.step(2)] == [Status.OK, Status.NOT_RUN, Status.OK]


def test_a_resumed_monitor_knows_an_idle_expert_from_its_state() -> None:
    model = Mixture()
    monitor = Monitor(model, inputs(), NAMES, every=1)
    monitor.step(0)
    model.routes[1] = None
    resumed = Monitor(model, inputs(), NAMES, every=1, check=False)
    resumed.load_state_dict(json.loads(json.dumps(monitor.state_dict())))
    assert [r.status for r in resumed.step(1)] == [Status.OK, Status.NOT_RUN, Status.OK]
    state = monitor.state_dict()  # as version 1 wrote it
    rows = {name: rows_of(state[name]) for name in ("layers", "history")}
    layers = {row.pop("name"): row for row in rows["layers"]}
    old = {**state, "version": 1, "last_probed": 0, "layers": layers, "history": rows["history"]}
    del old["ran"]
    resumed = Monitor(model, inputs(), NAMES, every=1, check=False)
    resumed.load_state_dict(old)
    assert [r.status for r in resumed.step(1)] == [Status.OK, Status.NOT_RUN, Status.OK]


def test_a_function_that_leaves_an_expert_out_later_gets_the_status_too() -> None:
    model = Mixture()

    def outputs(net: Any, probe: Tensor) -> dict[int, Tensor]:
        return {i: net.experts[i](probe[rows]) for i, rows in enumerate(net.routes) if rows is not None}

    monitor = Monitor(model, inputs(), outputs, every=1)
    monitor.step(0)
    model.routes[0] = None
    assert [(r.layer, r.status) for r in monitor.step(1)] == [
        ("0", Status.NOT_RUN), ("1", Status.OK), ("2", Status.OK),
    ]  # fmt: skip


def test_idle_evaluations_are_unusable_for_a_diagnosis_and_do_not_change_what_is_known() -> None:
    model = Mixture()
    monitor = Monitor(model, inputs(), NAMES, every=1)
    for step in range(6):
        model.routes[1] = None if step in (3, 4) else slice(16, 32)
        monitor.step(step)
    evidence = monitor.diagnose(layer="experts.1").evidence
    assert evidence["unusable"] == 2
    assert evidence["entropy"] == monitor.history[1].normalized


@pytest.mark.parametrize("checked", [True, False])
def test_a_rank_that_does_not_record_knows_which_layers_may_be_idle(
    monkeypatch: pytest.MonkeyPatch, checked: bool
) -> None:
    from fastent.monitor import probe

    monkeypatch.setattr(probe, "is_sharded", lambda module: True)
    monkeypatch.setattr(probe, "_rank", lambda: 1)
    model = Mixture()
    monitor = Monitor(model, inputs(), NAMES, every=1, check=checked)
    monitor.step(0)
    for step, rows in enumerate((None, slice(0, 0)), 1):
        model.routes[1] = rows
        assert monitor.step(step) == []
    assert monitor.state_dict()["ran"] == {"layer": NAMES, "d": [6, 7, 8]}


def test_a_copy_checks_nothing_and_knows_what_ran() -> None:
    model = Mixture()
    monitor = Monitor(model, inputs(), NAMES, every=1)
    monitor.step(0)
    monitor.observe(0, inputs(), layer="a", merge=True)
    model.routes[1] = None  # what a check would refuse
    for twin in (copy.deepcopy(monitor), pickle.loads(pickle.dumps(monitor))):
        assert [r.layer for r in twin.history] == [*NAMES, "a"]
        assert [r.status for r in twin.step(1)][-2:] == [Status.NOT_RUN, Status.OK]


# Names and order


def test_records_come_in_the_order_of_layers_not_of_the_pass() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    records = Monitor(model, inputs(), ["2", "0", "1"]).step(0)
    assert [(r.layer, r.d) for r in records] == [("2", 4), ("0", 8), ("1", 8)]


def test_numbers_as_names_are_strings_from_the_start() -> None:
    def outputs(model: nn.Module, probe: Tensor) -> dict[Any, Tensor]:
        return {3: model(probe), 1: probe}

    model = nn.Linear(6, 6)
    monitor = Monitor(model, inputs(), outputs, every=1)
    assert [r.layer for r in monitor.step(0)] == ["3", "1"]
    monitor.observe(0, inputs(), layer=7)  # type: ignore[arg-type]
    resumed = Monitor(model, inputs(), outputs, every=1)
    resumed.load_state_dict(json.loads(json.dumps(monitor.state_dict())))
    assert resumed.history == monitor.history
    assert [r.layer for r in resumed.step(1)] == ["3", "1"]
    assert resumed.diagnose(layer=3).evidence["steps_observed"] == 1  # type: ignore[arg-type]
    assert len(fastent.History.from_records(resumed.history, layer=3)) == 2  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="two activations named '1'"):
        Monitor(model, inputs(), lambda net, x: {1: x, "1": x})


# The check at construction


def test_a_probe_that_the_model_cannot_take_is_found_at_construction() -> None:
    layers = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 1))
    for model, probe, name, error, message in [
        (layers, inputs(d=5), "0", RuntimeError, "shapes cannot be multiplied"),
        (layers, inputs().double(), "0", RuntimeError, "dtype"),
        (layers, torch.zeros(4, 3, 6), "0", ValueError, "Say which"),
        (layers, inputs(), "1", ValueError, "d must be at least 2"),
    ]:  # fmt: skip
        with pytest.raises(error, match=message) as info:
            Monitor(model, probe, name)
        assert any("the probe's pass failed at construction" in note for note in info.value.__notes__)
        Monitor(model, probe, name, check=False)


def test_a_layer_that_runs_twice_is_found_at_construction() -> None:
    shared = nn.Linear(6, 6)
    with pytest.raises(RuntimeError, match="'0' fired 2 times"):
        Monitor(nn.Sequential(shared, shared), inputs(), "0")


def test_the_check_leaves_training_bit_identical_and_records_nothing() -> None:
    def train(watch: bool) -> list[Tensor]:
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4))
        optimizer = torch.optim.Adam(model.parameters())
        for step in range(3):
            if watch:
                monitor = Monitor(model, inputs(9), ["0", "3"])
                assert (monitor.history, monitor.last_step, monitor.pending) == ([], None, 0)
            optimizer.zero_grad()
            model(inputs(step)).square().sum().backward()
            optimizer.step()
        return [*model.state_dict().values(), torch.get_rng_state()]

    assert all(map(torch.equal, train(True), train(False)))


# An evaluation that fails


class Failing(nn.Sequential):
    """A model whose forward pass raises while `failing` is set."""

    failing = False

    def forward(self, x: Tensor) -> Tensor:
        if self.failing:
            raise RuntimeError("out of memory")
        return super().forward(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("checked", [True, False])
def test_a_pass_that_fails_is_recorded_for_every_layer_on_request_and_training_goes_on(checked: bool) -> None:
    torch.manual_seed(0)
    model = Failing(nn.Linear(6, 8), nn.Linear(8, 4))
    monitor = Monitor(model, inputs(), ["1", "0"], every=1, on_error="record", threshold=0.9, check=checked)
    model.failing = True
    with pytest.warns(RuntimeWarning, match="step 0 is recorded as failed") as caught:
        records = monitor.step(0)
    assert len(caught) == 1
    assert monitor.step(0) == []  # it is done, and not tried again
    records += monitor.step(1)  # without a warning
    known = {"1": 4, "0": 8} if checked else {"1": 0, "0": 0}
    assert [(r.step, r.layer, r.status, r.n, r.d) for r in records] == [
        (step, layer, Status.FAILED, 0, d) for step in (0, 1) for layer, d in known.items()
    ]
    assert records[0].message == (
        "the evaluation failed: RuntimeError: out of memory; in the pass of the monitor's probe at step 0"
    )
    assert math.isnan(records[0].normalized)
    assert monitor.crossings == {}
    model.failing = False
    assert [(r.layer, r.status, r.d) for r in monitor.step(2)] == [("1", Status.OK, 4), ("0", Status.OK, 8)]
    again = Monitor(model, inputs(), ["1", "0"], every=1, threshold=0.9)
    again.load_state_dict(json.loads(json.dumps(monitor.state_dict())))
    assert [r.status for r in again.history] == [r.status for r in monitor.history]
    with pytest.raises(ValueError, match="had d = 8 and now has d = 5"):  # the first success told the width
        again.observe(4, inputs(d=5), layer="0")


def test_a_probe_that_changed_and_unusable_activations_are_recorded_on_request() -> None:
    x = inputs()
    monitor = Monitor(nn.Sequential(nn.Linear(6, 8)), x, "0", every=1, on_error="record")
    monitor.step(0)
    x.add_(1)
    with pytest.warns(RuntimeWarning, match="step 1 is recorded as failed"):
        records = monitor.step(1)
    for h in (inputs(), inputs()[0], inputs()):  # without a warning, and the third is no half of its own
        monitor.observe(1, h, layer="half", merge=True)
    records += monitor.flush()
    assert [(r.layer, r.status) for r in records] == [("0", Status.FAILED), ("half", Status.FAILED)]
    assert "ValueError: the probe changed" in records[0].message
    assert "layer 'half'" in records[1].message
    monitor.observe(2, inputs(), layer="half", merge=True)
    assert [(r.layer, r.status) for r in monitor.flush()] == [("half", Status.OK)]
    with pytest.raises(ValueError, match="steps do not go back"):
        monitor.step(1)
    with pytest.raises(ValueError, match="merge=True adds up activations"):
        monitor.observe(3, spectral_entropy(x), layer="a", merge=True)


def test_bad_arguments_raise_at_construction_also_where_failures_are_recorded() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        Monitor(nn.Linear(6, 8), inputs(d=5), "", on_error="record")
    with pytest.raises(ValueError, match="on_error must be one of 'raise', 'record'; got 'warn'"):
        Monitor(on_error="warn")  # type: ignore[arg-type]


def test_a_function_that_fails_before_it_ever_ran_leaves_one_warning_in_place_of_a_record() -> None:
    def layers(model: nn.Module, probe: Tensor) -> Tensor:
        raise RuntimeError("no batch yet")

    monitor = Monitor(nn.Linear(6, 8), inputs(), layers, every=1, on_error="record", check=False)
    with pytest.warns(
        RuntimeWarning, match="step 0 failed, and leaves no record: RuntimeError: no batch yet"
    ):
        assert monitor.step(0) == []
    assert monitor.step(1) == []


# Observing in hooks


class Blocks(nn.Module):
    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.reentrant = nn.Linear(6, 8), nn.Linear(8, 4), reentrant

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return self.second(self.first(x).tanh())
        return self.second(checkpoint(lambda x: self.first(x).tanh(), x, use_reentrant=self.reentrant))


def gradients(model: nn.Module, batches: list[Tensor]) -> list[Tensor]:
    model.zero_grad()
    for x in batches:
        model(x.requires_grad_()).square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_a_hook_that_returns_what_observe_does_changes_no_output_under_checkpointing(
    reentrant: bool | None,
) -> None:
    expected = gradients(Blocks(None), [inputs()])
    model, monitor = Blocks(reentrant), Monitor()
    calls = []

    def hook(module: nn.Module, args: Any, out: Tensor) -> Any:
        calls.append(0)
        return monitor.observe(5, out, layer="first")

    handle = model.first.register_forward_hook(hook)
    got = gradients(model, [inputs()])
    assert len(calls) == (1 if reentrant is None else 2)
    assert all(map(torch.equal, got, expected))
    handle.remove()
    (record,) = monitor.flush()
    result = spectral_entropy(model.first(inputs()).detach())
    assert record == fastent.EntropyRecord.of(5, "first", result)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_rows_of_an_accumulated_batch_merge_and_those_of_a_repeated_pass_do_not_count_twice(
    reentrant: bool | None,
) -> None:
    model, monitor = Blocks(reentrant), Monitor()
    step = 0  # read by the hook
    handle = model.first.register_forward_hook(
        lambda module, args, out: monitor.observe(step, out, layer="first", merge=True)
    )
    parts = [inputs(n=20), inputs(1, n=7), inputs(2, n=1)]
    for step in (0, 1):  # noqa: B007
        gradients(model, parts)
    handle.remove()
    (record,) = [r for r in monitor.history if r.step == 0]  # there since the first call of step 1
    whole = spectral_entropy(model.first(torch.cat(parts)).detach())
    assert (record.n, record.status) == (28, Status.OK)
    assert record.normalized == pytest.approx(whole.normalized, abs=1e-13)
    assert [r.step for r in monitor.flush()] == [0, 1]
    assert [r.n for r in monitor.history] == [28, 28]


@pytest.mark.gpu
@pytest.mark.parametrize("reentrant", [False, True])
def test_on_a_gpu_whose_backward_pass_has_a_thread_of_its_own_a_repeated_pass_counts_once_too(
    reentrant: bool,
) -> None:
    model, monitor = Blocks(reentrant).cuda(), Monitor()
    model.first.register_forward_hook(
        lambda module, args, out: monitor.observe(0, out, layer="first", merge=True)
    )
    gradients(model, [inputs().cuda(), inputs(1).cuda()])
    assert [r.n for r in monitor.flush()] == [96]


def test_a_second_call_of_a_step_is_ignored_with_one_warning() -> None:
    monitor = Monitor()
    monitor.observe(5, inputs(), layer="a")
    with pytest.warns(UserWarning, match="layer 'a' was observed again at step 5.*merge=True") as caught:
        monitor.observe(5, inputs(1), layer="a")
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monitor.observe(5, inputs(2), layer="a")
        monitor.observe(6, inputs(), layer="a")
        monitor.observe(6, inputs(1), layer="a", merge=True)  # the record is there already
    assert [(r.step, r.n) for r in monitor.flush()] == [(5, 48), (6, 48)]
    expected = spectral_entropy(inputs()).normalized
    assert [r.normalized for r in monitor.history] == [expected, expected]


def test_gradients_observed_in_a_backward_pass_are_no_repetition() -> None:
    monitor, model = Monitor(), Blocks(None)
    model.first.register_full_backward_hook(
        lambda module, grads, outs: monitor.observe(0, outs[0], layer="grad", merge=True)
    )
    gradients(model, [inputs(), inputs(1)])
    assert [r.n for r in monitor.flush()] == [96]


def test_a_batch_of_one_or_none_has_the_status_too_few_rows() -> None:
    monitor = Monitor(threshold=0.99)
    for step, n in enumerate([1, 0, 48]):
        monitor.observe(step, inputs(n=n), layer="a")
        monitor.observe(step, inputs(n=n), layer="b", merge=True)
    seen = {(r.layer, r.step): (r.status, r.n, r.d) for r in monitor.flush()}
    few, ok = Status.TOO_FEW_ROWS, Status.OK
    for layer in "ab":
        assert [seen[layer, step] for step in range(3)] == [(few, 1, 6), (few, 0, 6), (ok, 48, 6)]
    assert monitor.crossings == {"a": 2, "b": 2}
    rows = Monitor(standard_error=True)
    rows.observe(0, inputs(n=1), layer="a")
    assert rows.history[0].status is few


def test_what_is_merged_ends_with_the_step_a_flush_or_the_monitor() -> None:
    whole = spectral_entropy(torch.cat([inputs(), inputs(1)])).normalized

    def merged() -> Monitor:
        monitor = Monitor()
        monitor.observe(3, inputs(), layer="a", merge=True)
        monitor.observe(3, inputs(1), layer="a", merge=True)
        assert monitor.history == []
        return monitor

    for end in (
        lambda monitor: monitor.flush(),
        lambda monitor: monitor.close(),
        lambda monitor: monitor.observe(4, inputs(), layer="b"),
    ):
        monitor = merged()
        end(monitor)
        assert monitor.history[0].normalized == pytest.approx(whole, abs=1e-13)
        assert (monitor.history[0].step, monitor.history[0].n) == (3, 96)
    monitor = merged()
    monitor.load_state_dict(Monitor().state_dict())
    assert monitor.flush() == []


def test_what_cannot_be_merged_is_refused() -> None:
    with pytest.raises(ValueError, match="entropies do not add up"):
        Monitor().observe(0, spectral_entropy(inputs()), layer="a", merge=True)
    with pytest.raises(ValueError, match="standard_error needs the activations"):
        Monitor(standard_error=True).observe(0, inputs(), layer="a", merge=True)
    with pytest.raises(ValueError, match="d must be at least 2"):
        Monitor().observe(0, inputs(d=1), layer="a", merge=True)
    monitor = Monitor()
    monitor.observe(0, inputs(), layer="a")
    with pytest.raises(ValueError, match="had d = 6 and now has d = 5"):
        monitor.observe(1, inputs(d=5), layer="a", merge=True)


def test_a_hook_that_observes_is_not_fed_by_the_monitors_own_probe() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    monitor = Monitor(model, inputs(), "2", every=1)
    model[0].register_forward_hook(lambda module, args, out: monitor.observe(0, out, layer="train"))
    assert [r.layer for r in monitor.step(0)] == ["2"]
    model(inputs(1))
    assert [r.layer for r in monitor.flush()] == ["train"]


@pytest.mark.parametrize("merge", [False, True])
def test_a_hook_that_observes_is_not_fed_by_the_probe_of_another_monitor(merge: bool) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    training, other = Monitor(), Monitor(model, inputs(), "2", every=1)
    hook = model[0].register_forward_hook(
        lambda module, args, out: training.observe(0, out, layer="train", merge=merge)
    )
    other.step(0)
    batch = inputs(1)
    model(batch)
    hook.remove()
    expected = spectral_entropy(model[0](batch).detach()).normalized
    assert [r.normalized for r in training.flush()] == [pytest.approx(expected, abs=1e-12)]


def test_a_step_in_a_hook_of_the_model_does_not_call_itself() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh())
    monitor = Monitor(model, inputs(), "0", every=1)
    model[1].register_forward_hook(lambda module, args, out: monitor.step(0) and None)
    model(inputs(1))
    assert [(r.step, r.layer) for r in monitor.history] == [(0, "0")]


def test_records_that_nobody_takes_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastent.monitor import monitor

    monkeypatch.setattr(monitor, "MOST_WAITING", 5)
    monitor = Monitor(history_size=3)
    for step in range(12):
        monitor.observe(step, inputs(), layer="a")
    assert [r.step for r in monitor.flush()] == [7, 8, 9, 10, 11]
    assert [r.step for r in monitor.history] == [9, 10, 11]


def test_merged_rows_are_judged_by_the_dtype_that_they_came_in() -> None:
    h = (1000 + inputs(n=64, d=8)).to(torch.float16)  # an offset that float16 cannot resolve
    monitor = Monitor()
    for part in (h[:40], h[40:]):
        monitor.observe(0, part, layer="a", merge=True)
    (record,) = monitor.flush()
    assert record.status is spectral_entropy(h).status is Status.UNRESOLVED_OFFSET
