"""The monitor as a training loop uses it: steps, history, threshold, stopping, bad activations, state."""

import copy
import gc
import json
import math
import sys
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastent import Status, spectral_entropy
from fastent.forecast.history import History
from fastent.monitor.monitor import SpectralEntropyMonitor, StopAfterCrossing
from fastent.records import Collapse, EntropyRecord

Monitor = SpectralEntropyMonitor


def inputs(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*(shape or (48, 6)), generator=torch.Generator().manual_seed(seed))


def observed(monitor: SpectralEntropyMonitor, *args: Any, **layer: str) -> list[EntropyRecord]:
    monitor.observe(*args, **layer)
    return monitor.flush()


def spread(normalized: float, d: int = 2, n: int = 40) -> Tensor:
    """(n, 2) activations of a given entropy: variances q and 1 - q along the axes, by bisection."""
    low, high = 1e-12, 0.5
    for _ in range(100):
        q = (low + high) / 2
        h = -(q * math.log(q) + (1 - q) * math.log(1 - q)) / math.log(2)
        low, high = (q, high) if h < normalized else (low, q)
    sign = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]], dtype=torch.float64)
    return (sign * torch.tensor([(1 - q) ** 0.5, q**0.5], dtype=torch.float64)).repeat(n // 4, 1)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


# Steps


def test_step_evaluates_at_multiples_of_every_and_returns_nothing_between(model: nn.Module) -> None:
    monitor = Monitor(model, inputs(), ["0", "2"], every=3)
    arrived = {step: monitor.step(step) for step in range(8)}
    assert [step for step, records in arrived.items() if records] == [0, 3, 6]
    assert [record.layer for record in arrived[3]] == ["0", "2"]
    assert monitor.history == arrived[0] + arrived[3] + arrived[6]
    assert monitor.last_step == 7
    expected = spectral_entropy(model[0](inputs()).detach())
    assert arrived[6][0] == EntropyRecord.of(6, "0", expected)


def test_a_step_seen_again_is_not_evaluated_again(model: nn.Module) -> None:
    monitor = Monitor(model, inputs(), "2")
    assert len(monitor.step(0)) == 1
    assert monitor.step(0) == []  # gradient accumulation: the same global step for several batches
    assert len(monitor.history) == 1


def steps_recorded(monitor: SpectralEntropyMonitor, steps: Iterable[int]) -> list[int]:
    return [record.step for step in steps for record in monitor.step(step)]


def test_steps_that_skip_multiples_are_evaluated_right_after_them_at_their_own_step(
    model: nn.Module,
) -> None:
    def recorded(every: int, steps: Iterable[int]) -> list[int]:
        return steps_recorded(Monitor(model, inputs(), "2", every=every), steps)

    assert recorded(10, range(1, 40, 2)) == [11, 21, 31]
    assert recorded(10, [7, 17, 27, 37]) == [17, 27, 37]  # after the first, each is in a new ten
    assert recorded(10, [0, 4, 8, 12, 16, 20]) == [0, 12, 20]
    assert recorded(10, [3, 55, 56, 99]) == [55, 99]  # once, however many multiples were passed
    assert recorded(10, range(1, 35)) == [10, 20, 30]  # where every step is passed: the multiples
    assert recorded(10, range(31, 55)) == [40, 50]  # a loop that goes on without a state
    assert recorded(10, [30, 31, 40]) == [30, 40]


def test_a_state_knows_which_multiple_is_next_also_under_another_stride(model: nn.Module) -> None:
    monitor = Monitor(model, inputs(), "2", every=10)
    assert steps_recorded(monitor, range(1, 14, 2)) == [11]
    state = json.loads(json.dumps(monitor.state_dict()))
    for every, recorded in [(10, [21, 31]), (15, [15, 31]), (4, [17, 21, 25, 29, 33])]:
        resumed = Monitor(model, inputs(), "2", every=every)
        resumed.load_state_dict(state)
        assert steps_recorded(resumed, range(13, 34, 2)) == recorded


def test_an_activation_observed_first_does_not_take_the_steps_place(model: nn.Module) -> None:
    monitor = Monitor(model, inputs(), "2", every=10)
    monitor.step(9)
    monitor.observe(10, inputs(), layer="a")
    assert [record.layer for record in monitor.step(10)] == ["a", "2"]


def test_an_evaluation_that_failed_is_repeated_at_its_step_and_not_at_each_one_after_it(
    model: nn.Module,
) -> None:
    x = inputs()
    monitor = Monitor(model, x, "2", every=10)
    monitor.step(9)
    x.add_(1)
    for _ in range(2):
        with pytest.raises(ValueError, match="the probe changed"):
            monitor.step(11)
    assert steps_recorded(monitor, [12, 13]) == []
    resumed = Monitor(model, x, "2", every=10)
    assert steps_recorded(resumed, [9, 11]) == [11]


def test_a_state_of_version_1_goes_on_where_it_was(model: nn.Module) -> None:
    def old(last_step: int, last_probed: int) -> dict[str, Any]:
        state = {
            **Monitor(model, inputs(), "2", every=10).state_dict(),
            "version": 1,
            "layers": {},
            "history": [],
        }
        del state["last_called"], state["unfinished"]
        return {**state, "last_step": last_step, "last_probed": last_probed}

    for state, recorded in [(old(25, 20), [30]), (old(30, 30), [40]), (old(30, 20), [30, 40])]:
        monitor = Monitor(model, inputs(), "2", every=10)
        monitor.load_state_dict(state)
        assert steps_recorded(monitor, range(state["last_step"], state["last_step"] + 11)) == recorded


def test_steps_that_go_back_are_negative_or_not_whole_are_errors(model: nn.Module) -> None:
    monitor = Monitor(model, inputs(), "2", every=1)
    monitor.step(5)
    with pytest.raises(ValueError, match="steps do not go back: got 4 after 5"):
        monitor.step(4)
    with pytest.raises(ValueError, match="got 4 after 5"):
        monitor.observe(4, inputs(), layer="x")
    with pytest.raises(ValueError, match="steps start at 0; got -1"):
        monitor.step(-1)
    with pytest.raises(TypeError, match=r"step must be a whole number; got 6\.0"):
        monitor.step(6.0)  # type: ignore[arg-type]
    assert monitor.last_step == 5
    assert [record.step for record in monitor.history] == [5]


def test_a_failed_probe_can_be_repeated_at_its_step(model: nn.Module) -> None:
    monitor = Monitor(model, inputs(), "2")
    handle = model[1].register_forward_hook(lambda module, args, out: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        monitor.step(0)
    handle.remove()
    assert len(monitor.step(0)) == 1


def test_observe_records_at_any_step_and_needs_no_model() -> None:
    monitor = Monitor()
    h = inputs(30, 5)
    assert observed(monitor, 7, h, layer="a") == [EntropyRecord.of(7, "a", spectral_entropy(h))]
    monitor.observe(7, h, layer="b")
    monitor.observe(8, h, layer="a")
    assert [(record.step, record.layer) for record in monitor.history] == [(7, "a"), (7, "b"), (8, "a")]
    with pytest.raises(RuntimeError, match="step needs a model, a probe and layers"):
        monitor.step(200)


def test_observe_takes_entropies_that_were_computed_in_one_batch() -> None:
    h = inputs(3, 30, 5)
    monitors = [Monitor(threshold=0.5) for _ in range(3)]
    batch = spectral_entropy(h, batch_dims=1)
    for monitor, result in zip(monitors, batch.unbind(), strict=True):
        monitor.observe(0, result, layer="encoder")
    for monitor, one in zip(monitors, h, strict=True):
        assert monitor.history[0].normalized == pytest.approx(spectral_entropy(one).normalized, abs=1e-13)
    with pytest.raises(ValueError, match="use its unbind"):
        monitors[0].observe(1, batch, layer="encoder")


def test_observe_takes_tokens_as_the_monitor_was_told() -> None:
    h = inputs(10, 4, 5)
    record = observed(Monitor(tokens="skip_first"), 0, h, layer="a")[0]
    assert record.normalized == spectral_entropy(h[:, 1:].flatten(0, 1)).normalized
    with pytest.raises(ValueError, match="Say which"):
        Monitor().observe(0, h, layer="a")


# Arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every": 0}, "every must be at least 1; got 0"),
        ({"history_size": 0}, "history_size must be at least 1; got 0"),
        ({"threshold": 0.0}, r"threshold is a normalised entropy, in \(0, 1\]; got 0.0"),
        ({"threshold": math.nan}, "got nan"),
        ({"threshold": 61}, "got 61"),
        ({"threshold": {"a": 0.5, "b": 1.5}}, r"in \(0, 1\]; got 1.5"),
        ({"stopping": StopAfterCrossing()}, "StopAfterCrossing needs a threshold"),
        ({"stopping": StopAfterCrossing(), "threshold": {}}, "StopAfterCrossing needs a threshold"),
        ({"on_collapse": print}, r"give collapse=fastent\.Collapse\(\) too"),
        (
            {
                "model": nn.Linear(2, 2),
                "probe": torch.zeros(4, 2),
                "layers": "",
                "every": 200,
                "collapse": Collapse(within=150),
            },
            "a fall needs two evaluations, and collapse has within=150 with every=200",
        ),
        ({"tokens": "middle"}, "tokens must be one of 'flatten'.*got 'middle'"),
        ({"on_nonfinite": "ignore"}, "on_nonfinite must be one of 'record', 'raise'; got 'ignore'"),
        ({"probe": torch.zeros(4, 2), "layers": "a"}, "missing: model"),
        ({"model": nn.Linear(2, 2)}, "missing: probe, layers"),
        (
            {"model": nn.LazyLinear(2), "probe": torch.zeros(4, 2), "layers": ""},
            "run one batch through it first",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_bad_arguments_are_refused_when_the_monitor_is_built(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Monitor(**arguments)


@pytest.mark.parametrize("name", ["every", "history_size", "batch_size"])
def test_a_count_that_is_not_whole_is_refused_by_name(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} must be a whole number; got 1.5"):
        Monitor(**{name: 1.5})


def test_a_collapse_that_is_a_bare_number_is_refused() -> None:
    with pytest.raises(TypeError, match=r"collapse must be a fastent\.Collapse; got 0\.05"):
        Monitor(collapse=0.05)  # type: ignore[arg-type]


def test_a_model_that_is_not_a_module_is_refused() -> None:
    with pytest.raises(TypeError, match=r"model must be an nn\.Module; got function"):
        Monitor(lambda x: x, inputs(), "")  # type: ignore[arg-type]


# History, crossing, stopping


def test_history_keeps_the_newest_and_the_logger_sees_all() -> None:
    seen: list[EntropyRecord] = []
    monitor = Monitor(history_size=3, on_record=seen.append)
    for step in range(10):
        monitor.observe(step, spread(0.9), layer="a")
    assert [record.step for record in monitor.history] == [7, 8, 9]
    assert [record.step for record in seen] == list(range(10))


def test_a_logger_that_raises_is_warned_of_once_and_gets_the_next_records() -> None:
    seen: list[int] = []

    def log(record: EntropyRecord) -> None:
        seen.append(record.step)
        raise OSError("disk full")

    monitor = Monitor(on_record=log)
    with pytest.warns(RuntimeWarning, match=r"on_record failed at step 0: OSError\('disk full'\)") as caught:
        monitor.observe(0, spread(0.9), layer="a")
    assert caught[0].filename == __file__
    monitor.observe(1, spread(0.9), layer="a")
    monitor.observe(2, spread(0.9), layer="a")
    assert seen == [0, 1, 2]
    assert len(monitor.history) == 3


def test_crossed_is_the_threshold_alone_and_stays() -> None:
    monitor = Monitor(threshold=0.6)
    seen = []
    for step, h in enumerate([0.9, 0.61, 0.59, 0.8]):
        record = observed(monitor, step, spread(h), layer="a")[0]
        assert record.normalized == pytest.approx(h, abs=1e-9)
        seen.append(monitor.crossed)
    assert seen == [False, False, True, True]
    assert monitor.crossings == {"a": 2}
    assert not monitor.should_stop()  # no policy was given


def test_layers_are_those_of_the_model_in_the_order_asked_for_then_those_observed(model: nn.Module) -> None:
    monitor = Monitor(model, inputs(), ["2", "0"])
    assert (monitor.layers, monitor.needs_every_rank) == (("2", "0"), False)
    for layer in ("z", "a"):
        monitor.observe(0, inputs(), layer=layer)
    monitor.step(0)
    assert monitor.layers == ("2", "0", "z", "a")
    assert Monitor(model, inputs(), "*", check=False).layers == ()  # a pattern's are known once they ran
    assert Monitor(model, inputs(), "*").layers == ("0", "1", "2")
    assert (Monitor().layers, Monitor().needs_every_rank) == ((), False)


def test_without_a_threshold_nothing_crosses() -> None:
    monitor = Monitor()
    monitor.observe(0, spread(0.01), layer="a")
    assert monitor.crossings == {}
    assert not monitor.crossed


def test_of_several_layers_all_must_cross() -> None:
    monitor = Monitor(threshold=0.6)
    assert not monitor.crossed
    for step, (a, b) in enumerate([(0.9, 0.9), (0.5, 0.9), (0.9, 0.9), (0.9, 0.5)]):
        monitor.observe(step, spread(a), layer="a")
        monitor.observe(step, spread(b), layer="b")
        assert monitor.crossed == (step == 3)
    assert monitor.crossings == {"a": 1, "b": 3}


def test_a_layer_that_is_watched_but_not_yet_recorded_has_not_crossed(model: nn.Module) -> None:
    monitor = Monitor(model, inputs(), "2", threshold=0.6)
    monitor.observe(0, spread(0.1), layer="a")
    assert monitor.crossings == {"a": 0}
    assert not monitor.crossed


def test_should_stop_the_given_number_of_steps_after_the_last_layer_crossed() -> None:
    monitor = Monitor(threshold=0.6, stopping=StopAfterCrossing(steps=100))
    monitor.observe(0, spread(0.1), layer="a")
    monitor.observe(0, spread(0.9), layer="b")
    monitor.observe(150, spread(0.9), layer="a")
    assert not monitor.should_stop()
    monitor.observe(200, spread(0.1), layer="b")
    assert not monitor.should_stop()
    monitor.observe(299, spread(0.1), layer="b")
    assert not monitor.should_stop()
    monitor.observe(300, spread(0.9), layer="b")
    assert monitor.should_stop()


def test_should_stop_counts_the_steps_between_evaluations(model: nn.Module) -> None:
    for p in model.parameters():
        nn.init.zeros_(p)
    model[2].weight.data[0, 0] = model[0].weight.data[0, 0] = 1.0  # rank one: entropy 0
    monitor = Monitor(model, inputs(), "2", every=10, threshold=0.6, stopping=StopAfterCrossing(steps=3))
    answers = []
    for step in range(6):
        monitor.step(step)
        answers.append(monitor.should_stop())
    assert answers == [False, False, False, True, True, True]


def test_of_layers_with_thresholds_of_their_own_those_without_one_are_not_waited_for() -> None:
    monitor = Monitor(threshold={"a": 0.6, "b*": 0.8})
    for step, (a, b, c) in enumerate([(0.9, 0.9, 0.1), (0.7, 0.7, 0.1), (0.5, 0.9, 0.9)]):
        for layer, h in {"a": a, "b1": b, "c": c}.items():
            monitor.observe(step, spread(h), layer=layer)
        assert monitor.crossed == (step == 2)
    assert monitor.crossings == {"b1": 1, "a": 2}
    gap = {layer: monitor.diagnose(layer=layer).evidence["gap"] for layer in monitor.layers}
    for step in (3, 4):
        for layer in gap:
            monitor.observe(step, spread(0.5), layer=layer)
    gap = {layer: monitor.diagnose(layer=layer).evidence["gap"] for layer in monitor.layers}
    assert gap == {"a": pytest.approx(-0.1), "b1": pytest.approx(-0.3), "c": None}


@pytest.mark.parametrize("layers", [["0", "2"], "*", lambda model, probe: {"0": model[0](probe)}])
def test_a_threshold_for_a_layer_that_is_not_watched_is_refused_with_those_that_are(
    model: nn.Module, layers: Any
) -> None:
    Monitor(model, inputs(), layers, threshold={"0": 0.5, "?": 0.6})
    with pytest.raises(ValueError, match=r"threshold has '0\.mlp', which fits no layer that is watched: '0'"):
        Monitor(model, inputs(), layers, threshold={"0": 0.5, "0.mlp": 0.6})


def test_on_collapse_gets_the_record_of_each_layer_once_after_on_record_has() -> None:
    told: list[tuple[str, int, str]] = []
    monitor = Monitor(
        collapse=Collapse(fall=0.1, within=10),
        on_record=lambda record: told.append(("record", record.step, record.layer)),
        on_collapse=lambda record: told.append(("collapse", record.step, record.layer)),
    )
    for step, (a, b) in enumerate([(0.9, 0.9), (0.85, 0.7), (0.75, 0.4), (0.3, 0.2)]):
        monitor.observe(step, spread(a), layer="a")
        monitor.observe(step, spread(b), layer="b")
    collapses = [i for i, (what, _, _) in enumerate(told) if what == "collapse"]
    assert [told[i] for i in collapses] == [("collapse", 1, "b"), ("collapse", 2, "a")]
    assert [told[i - 1][1:] for i in collapses] == [(1, "b"), (2, "a")]
    assert monitor.collapsed == {"a": 2, "b": 1}
    assert not monitor.crossed


def test_an_alarm_that_raises_is_warned_of_once_and_training_and_the_next_one_go_on() -> None:
    told: list[str] = []

    def alarm(record: EntropyRecord) -> None:
        told.append(record.layer)
        raise OSError("no mail server")

    monitor = Monitor(collapse=Collapse(), on_collapse=alarm)
    for layer in ("a", "b"):
        monitor.observe(0, spread(0.9), layer=layer)
    with pytest.warns(RuntimeWarning, match=r"on_collapse failed at step 1: OSError\('no mail server'\)"):
        monitor.observe(1, spread(0.8), layer="a")
    monitor.observe(1, spread(0.8), layer="b")
    assert told == ["a", "b"]


@pytest.mark.parametrize("library", ["pandas", "polars"])
@pytest.mark.parametrize("source", [Monitor(), History([], [])])
def test_a_data_frame_without_its_library_is_refused_in_a_sentence(
    source: Any, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    message = f"^to_{library} needs {library}, which is not installed: pip install {library}$"
    with pytest.raises(ModuleNotFoundError, match=message):
        getattr(source, f"to_{library}")()


def test_a_policy_is_any_function_of_the_monitor() -> None:
    monitor = Monitor(stopping=lambda m: len(m.history) >= 2)
    monitor.observe(0, spread(0.9), layer="a")
    assert not monitor.should_stop()
    monitor.observe(1, spread(0.9), layer="a")
    assert monitor.should_stop()
    with pytest.raises(ValueError, match="steps must not be negative; got -1"):
        StopAfterCrossing(-1)


def test_a_threshold_above_the_ceiling_of_its_probe_warns_once_for_each_layer() -> None:
    monitor = Monitor(threshold=0.8)
    ceiling = math.log(4) / math.log(64)  # 5 samples in 64 dimensions
    with pytest.warns(
        UserWarning, match=f"threshold 0.8 is above {ceiling:.4f}.*5 samples of layer 'a'"
    ) as caught:
        monitor.observe(0, inputs(5, 64), layer="a")
    assert caught[0].filename == __file__
    monitor.observe(1, inputs(5, 64), layer="a")
    with pytest.warns(UserWarning, match="layer 'b'"):
        monitor.observe(1, inputs(5, 64), layer="b")
    Monitor(threshold=0.8).observe(0, inputs(200, 64), layer="a")  # no warning


# Bad activations


def bad_model(value: float, dtype: torch.dtype = torch.float32) -> nn.Module:
    class Bad(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = x.to(dtype).clone()
            x[3, 1] = value
            x[5, 0] = math.inf
            return x

    return Bad()


def test_nan_in_activations_is_recorded_and_training_goes_on() -> None:
    monitor = Monitor(bad_model(math.nan), inputs(), "", every=1, threshold=0.99)
    record = monitor.step(0)[0]
    assert record.status is Status.NONFINITE
    assert math.isnan(record.normalized)
    assert "2 NaN or Inf" in record.message
    assert "the first at (3, 1)" in record.message
    assert not monitor.crossed
    assert len(monitor.step(1)) == 1


def test_nan_in_activations_raises_on_request_once_recorded() -> None:
    seen: list[EntropyRecord] = []
    monitor = Monitor(bad_model(math.nan), inputs(), "", on_nonfinite="raise", on_record=seen.append)
    message = r"layer '' at step 0: 2 NaN or Inf in the activations \(torch\.float32\), the first at \(3, 1\)"
    with pytest.raises(FloatingPointError, match=message):
        monitor.step(0)
    assert [record.status for record in monitor.history] == [Status.NONFINITE]
    assert seen == monitor.history
    with pytest.raises(FloatingPointError, match="layer 'x' at step 1"):
        monitor.observe(1, torch.full((4, 2), math.nan), layer="x")


def test_overflow_of_half_precision_names_the_dtype() -> None:
    record = Monitor(bad_model(1e6, torch.float16), inputs(), "").step(0)[0]
    assert record.status is Status.NONFINITE
    assert "2 NaN or Inf in the activations (torch.float16)" in record.message


def test_a_change_of_width_is_an_error_naming_old_and_new() -> None:
    monitor = Monitor()
    monitor.observe(0, inputs(20, 5), layer="a")
    monitor.observe(1, inputs(30, 5), layer="a")  # another n is not
    with pytest.raises(ValueError, match="layer 'a' had d = 5 and now has d = 6"):
        monitor.observe(2, inputs(20, 6), layer="a")
    monitor.observe(2, inputs(20, 6), layer="b")
    assert [record.d for record in monitor.history] == [5, 5, 6]


def test_a_move_to_another_device_is_an_error_naming_both() -> None:
    monitor = Monitor()
    monitor.observe(0, inputs(20, 5), layer="a")
    with pytest.raises(ValueError, match="the activations moved from cpu to meta"):
        monitor.observe(1, inputs(20, 5).to("meta"), layer="a")


@pytest.mark.gpu
def test_a_model_that_moved_to_the_gpu_is_an_error_until_a_new_monitor_takes_the_state(
    model: nn.Module,
) -> None:
    def output(net: nn.Module, probe: Tensor) -> Tensor:
        return net(probe.to(next(net.parameters()).device))

    x = inputs()
    first, second = Monitor(model, x, output, every=1), Monitor(model, x, output, every=1)
    first.step(0)
    model.cuda()
    with pytest.raises(ValueError, match="moved from cpu to cuda:0"):
        first.step(1)
    second.load_state_dict(first.state_dict())
    (record,) = second.step(2) + second.flush()  # there already, or still under way
    assert record.normalized == pytest.approx(first.history[0].normalized, abs=1e-5)


# Autograd, memory, dtypes


def test_no_graph_and_no_activation_is_kept_alive(model: nn.Module) -> None:
    refs: list[weakref.ref[Tensor]] = []
    model[0].register_forward_hook(lambda module, args, out: refs.append(weakref.ref(out)))
    monitor = Monitor(model, inputs(), "0")
    gc.collect()
    gc.disable()  # by reference counts alone
    try:
        monitor.step(0)
        h = model(inputs())
        refs.append(weakref.ref(h))
        monitor.observe(0, h, layer="head")
        del h
        assert [ref() for ref in refs] == [
            None
        ] * 4  # the check of the probe, a step, our own pass and its output
    finally:
        gc.enable()


def test_inference_tensors_and_inference_mode_are_fine(model: nn.Module) -> None:
    monitor = Monitor(model, inputs(), "2", every=1)
    expected = monitor.step(0)[0].normalized
    with torch.inference_mode():
        h = model(inputs())
        assert monitor.step(1)[0].normalized == expected
    assert observed(monitor, 1, h, layer="h")[0].normalized == expected


def test_autocast_reaches_the_model_and_not_the_entropy(model: nn.Module) -> None:
    monitor = Monitor(model, inputs(), "2", every=1)
    plain = monitor.step(0)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = model(inputs())
        assert h.dtype is torch.bfloat16
        cast = monitor.step(1)[0]
        at_hand = observed(monitor, 1, h, layer="h")[0]
    expected = spectral_entropy(h.detach())  # outside
    assert cast.normalized == at_hand.normalized == expected.normalized
    assert cast.normalized != plain.normalized
    assert cast.normalized == pytest.approx(plain.normalized, abs=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_cast_to_16_bits_after_the_monitor_was_built_keeps_float64_records(
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 6))
    ids = torch.arange(50)
    monitor = Monitor(model, ids, "1", every=1)
    before = monitor.step(0)[0]
    model.to(dtype)
    after = monitor.step(1)[0]
    expected = spectral_entropy(model(ids).detach().double())
    assert after.normalized == pytest.approx(expected.normalized, abs=1e-14)
    assert after.normalized != before.normalized
    assert monitor.history[0] == before


# State


def test_state_comes_back_through_a_json_file_bit_for_bit(model: nn.Module, tmp_path: Path) -> None:
    monitor = Monitor(model, inputs(), ["0", "2"], every=2, threshold=0.99)
    for step in range(8):
        monitor.step(step)
    monitor.observe(7, torch.full((4, 2), math.nan), layer="bad")
    file = tmp_path / "monitor.json"
    file.write_text(json.dumps(monitor.state_dict(), allow_nan=False))
    other = Monitor(model, inputs(), ["0", "2"], every=2, threshold=0.99)
    other.load_state_dict(json.loads(file.read_text()))
    assert other.state_dict() == monitor.state_dict()
    assert other.history[:8] == monitor.history[:8]
    assert other.crossings == monitor.crossings == {"0": 0, "2": 0}
    assert other.last_step == 7


def test_a_replay_from_a_checkpoint_ends_in_the_history_of_an_uninterrupted_run(model: nn.Module) -> None:
    def run(monitor: SpectralEntropyMonitor, net: nn.Module, start: int, stop: int) -> None:
        opt = torch.optim.SGD(net.parameters(), lr=0.05)
        for step in range(start, stop):
            monitor.step(step)
            opt.zero_grad()
            net(inputs(seed=step)).square().mean().backward()
            opt.step()

    monitor = Monitor(model, inputs(), "2", every=2)
    run(monitor, model, 0, 5)
    state, weights = monitor.state_dict(), copy.deepcopy(model.state_dict())
    run(monitor, model, 5, 12)
    whole = monitor.history

    model.load_state_dict(weights)  # in the same process: records after the checkpoint must go
    monitor.load_state_dict(state)
    assert [record.step for record in monitor.history] == [0, 2, 4]
    run(monitor, model, 5, 12)
    assert monitor.history == whole

    model.load_state_dict(weights)
    resumed = Monitor(model, inputs(), "2", every=2)
    resumed.load_state_dict(state)
    assert resumed.step(4) == []  # a loop that starts again at the step it saved
    run(resumed, model, 5, 12)
    assert resumed.history == whole


def test_state_of_another_probe_or_version_is_refused_and_nothing_is_loaded(model: nn.Module) -> None:
    monitor = Monitor(model, inputs(), "2")
    monitor.step(0)
    state = monitor.state_dict()
    other = Monitor(model, inputs(seed=1), "2")
    old, new = state["probe"][:12], other.state_dict()["probe"][:12]
    with pytest.raises(ValueError, match=f"recorded with probe {old}, this monitor has probe {new}"):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match=f"recorded with probe {old}, this monitor has no probe"):
        Monitor().load_state_dict(state)
    with pytest.raises(ValueError, match="the state has version 99; this release reads 1 to 4"):
        monitor.load_state_dict({**state, "version": 99})
    assert other.history == []
    assert len(monitor.history) == 1


def places(value: Any) -> list[tuple[Any, ...]]:
    """The path of everything in a nested state."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path for key, item in items for path in [(key,), *((key, *rest) for rest in places(item))]]


def test_a_damaged_state_is_loaded_whole_or_not_at_all() -> None:
    def line(step: int) -> Tensor:
        return torch.outer(torch.arange(20.0), torch.ones(3)) if step > 4 else inputs(20, 3, seed=step)

    saved, monitor = Monitor(threshold=0.5), Monitor(threshold=0.5)
    for step in range(8):
        saved.observe(step, line(step), layer="a")
    monitor.observe(3, inputs(9, 4), layer="b")
    good, own = json.dumps(saved.state_dict()), json.dumps(monitor.state_dict())
    loaded = refused = 0
    damages: list[Any] = [None, "x", [], {}, -1, 1.5, True, math.nan, KeyError]
    for path in places(json.loads(good)):
        for damage in damages:
            state = json.loads(good)
            parent = state
            for key in path[:-1]:
                parent = parent[key]
            if damage is KeyError:
                del parent[path[-1]]
            else:
                parent[path[-1]] = damage
            reason = ""
            try:
                monitor.load_state_dict(state)
            except ValueError as error:
                reason = str(error)
            if reason.startswith("nothing is loaded: "):
                refused += 1
                assert json.dumps(monitor.state_dict()) == own, (path, damage)
            else:  # it may mean something: then all of it is in use
                assert not reason, (path, damage)
                loaded += 1
                json.dumps(monitor.state_dict())
                assert monitor.crossed in (True, False)
                monitor.observe(max(monitor.last_step or 0, 9), inputs(20, 5), layer="c")
                for layer in {record.layer for record in monitor.history}:
                    monitor.diagnose(layer=layer)
                monitor.load_state_dict(json.loads(own))
    assert refused > 800
    assert loaded > 100


def test_load_state_dict_hashes_the_probe_again(model: nn.Module) -> None:
    x = inputs()
    monitor = Monitor(model, x, "2")
    state = monitor.state_dict()
    x.add_(1)
    with pytest.raises(ValueError, match="the probe changed"):
        monitor.load_state_dict(state)


def test_a_closed_monitor_takes_no_steps_and_keeps_its_history(model: nn.Module) -> None:
    with Monitor(model, inputs(), "2") as monitor:
        monitor.step(0)
        monitor.flush()
        assert not monitor.closed
    assert monitor.closed
    monitor.close()
    for call in (lambda: monitor.step(200), lambda: monitor.observe(200, inputs(), layer="a")):
        with pytest.raises(
            RuntimeError, match=r"the monitor is closed: .* make a new monitor .* load_state_dict"
        ):
            call()
    assert len(monitor.history) == 1


def test_leaving_the_context_by_an_exception_closes_and_lets_it_pass() -> None:
    monitor = Monitor()
    with pytest.raises(ArithmeticError), monitor:
        raise ArithmeticError
    with pytest.raises(RuntimeError, match="closed"):
        monitor.observe(0, inputs(), layer="a")
