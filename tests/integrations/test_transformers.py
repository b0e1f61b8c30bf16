"""The callback in a real Trainer: what it records, logs, saves, decides, and what it leaves as it was."""

import json
import math
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_device import FakeStreams
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fastent

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from transformers import (
    EarlyStoppingCallback,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from fastent.integrations.transformers import SpectralEntropyCallback
from fastent.monitor.deferred import Devices, Ring, TorchFormer

LAYERS = ["transformer.h.0", "transformer.h.1.mlp"]
GENERATOR = torch.Generator().manual_seed(3)
PROBE = {"input_ids": torch.randint(0, 32, (12, 8), generator=GENERATOR)}
TOKENS = torch.randint(0, 32, (24, 8), generator=GENERATOR)
DATA = [{"input_ids": row, "labels": row} for row in TOKENS]


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=32, n_positions=8, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
        )
    )


def trainer_of(
    folder: Path, *callbacks: TrainerCallback, model: nn.Module | None = None, **given: Any
) -> Trainer:
    options: dict[str, Any] = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "logging_steps": 2,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    args = TrainingArguments(str(folder), **(options | given))
    data = {"train_dataset": DATA, "eval_dataset": DATA[:8]}
    return Trainer(gpt2() if model is None else model, args, callbacks=list(callbacks), **data)


def watch(**options: Any) -> SpectralEntropyCallback:
    return SpectralEntropyCallback(layers=LAYERS, probe=PROBE, **({"tokens": "mean"} | options))


def values(callback: SpectralEntropyCallback) -> list[tuple[int, str, float]]:
    assert callback.monitor is not None
    return [(record.step, record.layer, record.normalized) for record in callback.monitor.history]


def steps(callback: SpectralEntropyCallback) -> list[int]:
    return sorted({step for step, _, _ in values(callback)})


class Reporter(TrainerCallback):
    """What a reporter of `report_to` is told, with the step that it would log it at."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.rows.append((state.global_step, dict(logs)))


def entropy_rows(rows: list[tuple[int, dict[str, float]]]) -> list[tuple[int, str, float]]:
    return [
        (step, key.removeprefix("entropy/"), value)
        for step, row in rows
        for key, value in row.items()
        if key.startswith("entropy/")
    ]


def test_records_come_at_logging_steps_and_go_to_the_log_and_to_the_reporters_of_a_trainer(
    tmp_path: Path,
) -> None:
    reporter = Reporter()
    trainer = trainer_of(tmp_path, reporter)
    callback = watch().attach(trainer)
    trainer.train()
    assert steps(callback) == [0, 2, 4, 6]
    assert entropy_rows(reporter.rows) == values(callback)
    log = [(row["step"], row) for row in trainer.state.log_history]
    assert entropy_rows(log) == values(callback)
    # The Trainer's own log of a step is not taken for done.
    assert [step for step, row in log if "loss" in row] == [2, 4, 6]
    assert callback.monitor is not None
    assert callback.monitor.closed


def test_every_counts_steps_of_its_own(tmp_path: Path) -> None:
    callback = watch(every=3)
    trainer_of(tmp_path, callback).train()
    assert steps(callback) == [0, 3, 6]


def test_values_are_those_of_the_model_as_it_is_then(tmp_path: Path) -> None:
    model = gpt2()
    expected = []

    class Beside(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % 2 == 0:
                monitor = fastent.SpectralEntropyMonitor(model, PROBE, LAYERS, every=1, tokens="mean")
                records = monitor.step(state.global_step)
                expected.extend((record.step, record.layer, record.normalized) for record in records)

    callback = watch()
    trainer_of(tmp_path, callback, Beside(), model=model).train()
    assert values(callback)[2:] == expected


def test_a_trainer_that_reports_and_is_not_attached_is_warned_of(tmp_path: Path) -> None:
    callback = watch()
    trainer = trainer_of(tmp_path, callback, max_steps=1)
    trainer.args.report_to = ["tensorboard"]
    with pytest.warns(UserWarning, match=r"do not reach tensorboard.*callback\.attach\(trainer\)"):
        trainer.train()
    assert callback.attach(trainer) is callback
    assert trainer.callback_handler.callbacks.count(callback) == 1
    trainer.train()


def test_what_is_no_trainer_cannot_be_attached_to() -> None:
    with pytest.raises(TypeError, match=r"attach takes the transformers\.Trainer .*; got GPT2LMHeadModel"):
        watch().attach(gpt2())


def test_a_run_that_goes_on_with_other_layers_puts_those_into_the_metrics(tmp_path: Path) -> None:
    trainer_of(tmp_path, watch(), **SAVING).train()
    checkpoint = str(tmp_path / "checkpoint-3")
    callback = SpectralEntropyCallback(
        layers=["transformer.h.0", "transformer.h.1"], probe=PROBE, tokens="mean"
    )
    seen: dict[str, float] = {}

    class Seen(TrainerCallback):
        def on_evaluate(
            self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any
        ) -> None:
            seen.update({key: value for key, value in metrics.items() if "entropy" in key})

    trainer = trainer_of(tmp_path, callback, Seen(), eval_strategy="steps", eval_steps=6)
    with pytest.warns(
        UserWarning, match=r"not watched, .*: 'transformer\.h\.1\.mlp'; watched .*: 'transformer\.h\.1'"
    ):
        trainer.train(resume_from_checkpoint=checkpoint)
    newest = {f"eval_entropy/{layer}": h for step, layer, h in values(callback) if step == 6}
    assert seen == newest
    assert len(newest) == 2


def test_a_late_record_is_reported_at_its_own_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    streams = FakeStreams()
    slots = Ring(streams, TorchFormer())
    monkeypatch.setattr(Devices, "of", lambda self, x: slots)
    done = threading.Event()

    def run_on() -> None:
        while not done.wait(0.01):
            streams.tick()

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 5:  # what began at step 0, 2 and 4 arrives at step 6
                thread.start()
                while any(not event.passed for event in streams.events):
                    done.wait(0.01)

    thread = threading.Thread(target=run_on)
    trainer = trainer_of(tmp_path, Clock(), report_to=["tensorboard"])
    callback = watch().attach(trainer)
    trainer.train()
    done.set()
    thread.join()
    events = EventAccumulator(next(tmp_path.rglob("*tfevents*")).parent.as_posix()).Reload()
    for layer in LAYERS:
        found = [(event.step, event.value) for event in events.Scalars(f"train/entropy/{layer}")]
        assert found == [(step, pytest.approx(h)) for step, name, h in values(callback) if name == layer]
        assert [step for step, _ in found] == [0, 2, 4, 6]


def trained(folder: Path, *callbacks: TrainerCallback, **options: Any) -> dict[str, Any]:
    model = gpt2()
    trainer = trainer_of(folder, *callbacks, model=model, **options)
    trainer.train()
    return {
        "weights": model.state_dict(),
        "optimizer": list(trainer.optimizer.state_dict()["state"].values()),
        "random": torch.get_rng_state(),
        "modes": [module.training for module in model.modules()],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


def test_training_has_the_same_bits_with_and_without(tmp_path: Path) -> None:
    callback = watch(every=1)
    without, again = (trained(tmp_path, *callbacks) for callbacks in ([], [callback]))
    assert same(without, again)
    assert len(values(callback)) == 14


def test_each_train_has_a_monitor_of_its_own(tmp_path: Path) -> None:
    callback = watch()
    trainer = trainer_of(tmp_path, callback, max_steps=2)
    trainer.train()
    first = callback.monitor
    trainer.train()
    assert callback.monitor is not first
    assert steps(callback) == [0, 2]


def test_a_training_that_broke_off_leaves_no_open_monitor_behind(tmp_path: Path) -> None:
    class Broken(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise InterruptedError

    callback = watch()
    trainer = trainer_of(tmp_path, callback, Broken())
    with pytest.raises(InterruptedError):
        trainer.train()
    first = callback.monitor
    trainer.remove_callback(Broken)
    trainer.train()
    assert first is not None
    assert first.closed
    assert steps(callback) == [0, 2, 4, 6]


SAVING = {"save_strategy": "steps", "save_steps": 3}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 2**65) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.filterwarnings("ignore")
def test_a_state_of_any_content_is_taken_up_or_named_with_the_remedy(tmp_path: Path) -> None:
    trainer_of(tmp_path, watch(), **SAVING).train()
    file = tmp_path / "checkpoint-3" / "entropy.json"
    whole = file.read_bytes()
    state = json.loads(whole)
    callback = watch()
    trainer = trainer_of(tmp_path, callback, **SAVING)
    trainer.state.global_step = 3

    @settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @given(
        st.binary(max_size=20)
        | st.integers(0, len(whole) - 1).map(lambda at: whole[:at])
        | JSON.map(lambda value: json.dumps(value).encode())
        | st.builds(
            lambda name, value: json.dumps({**state, name: value}).encode(),
            st.sampled_from(sorted(state)),
            JSON,
        )
    )
    @example(b"[" * 100_000)
    @example(json.dumps({**state, "probe": "x"}).encode())
    @example(json.dumps([]).encode())
    def survives(data: bytes) -> None:
        file.write_bytes(data)
        refused = None
        try:
            callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)
        except ValueError as error:
            refused = str(error)
        if refused is not None:
            assert refused.startswith(f"{file} is no state that this monitor can take up (")
            assert refused.endswith("or remove it, and records begin anew")

    survives()
    file.write_bytes(whole)
    callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)
    assert steps(callback) == [0, 2]


def test_a_resumed_run_has_the_records_of_one_that_was_never_cut(tmp_path: Path) -> None:
    whole, slow, resumed = watch(every=2), watch(every=3, name="slow"), watch(every=2)
    first = trainer_of(tmp_path, whole, slow, **SAVING)
    first.train()
    assert (tmp_path / "checkpoint-3" / "slow.json").exists()
    assert not list(tmp_path.rglob("*.tmp"))
    slow_too = watch(every=3, name="slow")
    trainer = trainer_of(tmp_path, resumed, slow_too, **SAVING)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert values(resumed) == values(whole)
    assert values(slow_too) == values(slow)
    assert same(trainer.model.state_dict(), first.model.state_dict())
    assert [row["step"] for row in trainer.state.log_history if "entropy/transformer.h.0" in row] == [
        0,
        2,
        4,
        6,
    ]


def test_a_checkpoint_of_another_folder_is_found_where_the_arguments_say_and_missed_with_a_warning(
    tmp_path: Path,
) -> None:
    whole, resumed, missed = watch(), watch(), watch()
    trainer_of(tmp_path / "old", whole, **SAVING).train()
    checkpoint = str(tmp_path / "old" / "checkpoint-3")
    trainer = trainer_of(tmp_path / "new", resumed, resume_from_checkpoint=checkpoint)
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    assert values(resumed) == values(whole)
    with pytest.warns(UserWarning, match=r"resumes at step 3, .*checkpoint-3.entropy\.json is not there"):
        trainer_of(tmp_path / "new", missed).train(resume_from_checkpoint=checkpoint)
    assert steps(missed) == [4, 6]


def test_a_save_that_fails_leaves_the_file_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    callback = watch()
    trainer = trainer_of(tmp_path, callback, **SAVING)
    trainer.train()
    file = tmp_path / "checkpoint-3" / "entropy.json"
    before = file.read_text()
    callback._running = True
    trainer.state.global_step = 3

    def full(number: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space left"):
        callback.on_save(trainer.args, trainer.state, trainer.control)
    assert file.read_text() == before
    assert json.loads(before)["last_step"] == 3


def test_a_policy_ends_training_at_a_multiple_of_every(tmp_path: Path) -> None:
    stopping = fastent.StopAfterCrossing(steps=1)
    callback = watch(threshold=0.86, stopping=stopping)
    trainer = trainer_of(tmp_path, callback)
    trainer.train()
    assert callback.monitor is not None
    assert callback.monitor.crossed
    assert max(callback.monitor.crossings.values()) == 0
    assert trainer.state.global_step == 2


BEST = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "entropy/transformer.h.0",
    "restore_callback_states_from_checkpoint": True,
}


@pytest.mark.parametrize("greater", [True, False])
def test_early_stopping_and_the_best_model_go_by_the_entropy(tmp_path: Path, greater: bool) -> None:
    callback, stopping = watch(every=1), EarlyStoppingCallback(early_stopping_patience=2)
    trainer = trainer_of(tmp_path, callback, stopping, greater_is_better=greater, **BEST)
    trainer.train()
    course = {step: h for step, layer, h in values(callback) if layer == "transformer.h.0" and step}
    choose = max if greater else min
    best = choose(course, key=course.__getitem__)
    assert trainer.state.best_metric == course[best]
    assert trainer.state.best_global_step == best
    assert trainer.state.global_step == min(6, best + 2)


def test_early_stopping_that_the_trainer_had_before_finds_the_entropy(tmp_path: Path) -> None:
    stopping = EarlyStoppingCallback(
        early_stopping_patience=1, early_stopping_threshold=1.0
    )  # no change is enough
    trainer = trainer_of(tmp_path, stopping, **BEST)
    callback = watch(every=1).attach(trainer).attach(trainer)
    trainer.train()
    assert steps(callback) == [0, 1, 2]
    assert (
        len(trainer.callback_handler.callbacks)
        == len(trainer_of(tmp_path, stopping).callback_handler.callbacks) + 2
    )


def test_two_callbacks_of_one_name_are_refused(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, watch(every=1))
    watch().attach(trainer)
    with pytest.raises(ValueError, match=r"the name 'entropy'.*: give one of them another, name="):
        trainer.train()
    assert trainer.state.global_step == 0


def test_callbacks_that_the_trainer_builds_anew_leave_this_one_as_it_is(tmp_path: Path) -> None:
    whole, resumed = watch(every=1), watch(every=1)
    options = BEST | {"greater_is_better": True}
    trainer_of(tmp_path, whole, EarlyStoppingCallback(9), **options).train()
    stopping = EarlyStoppingCallback(9)
    trainer = trainer_of(tmp_path, resumed, stopping, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert stopping not in trainer.callback_handler.callbacks
    assert resumed in trainer.callback_handler.callbacks
    assert values(resumed) == values(whole)


def test_an_unusable_value_is_not_logged_and_never_the_best(tmp_path: Path) -> None:
    def dead(model: nn.Module, probe: Any) -> Tensor:
        return torch.ones(12, 4)

    callback, reporter = SpectralEntropyCallback(layers=dead, probe=PROBE, every=1), Reporter()
    options = BEST | {"metric_for_best_model": "entropy/dead", "greater_is_better": False, "max_steps": 2}
    trainer = trainer_of(tmp_path, reporter, **(options | {"load_best_model_at_end": False}))
    callback.attach(trainer)
    trainer.train()
    assert callback.monitor is not None
    assert {record.status for record in callback.monitor.history} == {fastent.Status.ZERO_VARIANCE}
    assert entropy_rows(reporter.rows) == []
    assert trainer.state.best_metric == math.inf


def test_evaluations_and_predictions_outside_of_training_have_no_entropy(tmp_path: Path) -> None:
    callback = watch()
    trainer = trainer_of(tmp_path, callback, max_steps=2)
    for _ in range(2):
        assert not [key for key in trainer.evaluate() if "entropy" in key]
        assert not [key for key in trainer.predict(DATA[:8]).metrics if "entropy" in key]
        trainer.train()


FORMS = {
    "activation checkpointing": {"activation_checkpointing": True},
    "gradient accumulation": {"gradient_accumulation_steps": 2, "max_steps": 3, "logging_steps": 1},
    "bf16": {"bf16": True},
    "compiled": {"torch_compile": True, "torch_compile_backend": "eager"},
}


# A tracer of torch.compile looks at .grad of all, and silences that by a filter that pytest's comes before.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("form", [*list(FORMS)[:-1], pytest.param("compiled", marks=pytest.mark.nightly)])
def test_each_form_of_training_has_the_same_bits_with_and_without(tmp_path: Path, form: str) -> None:
    callback = watch(every=1)
    without, again = (trained(tmp_path, *callbacks, **FORMS[form]) for callbacks in ([], [callback]))
    assert same(without, again)
    assert steps(callback) == list(range(FORMS[form].get("max_steps", 6) + 1))


def test_under_bf16_the_probe_passes_as_training_does(tmp_path: Path) -> None:
    seen = set()

    def first(model: nn.Module, probe: Any) -> Tensor:
        handle = model.transformer.h[0].mlp.register_forward_hook(lambda m, i, out: seen.add(out.dtype))
        model(**probe)
        handle.remove()
        return torch.randn(12, 4)

    trainer_of(tmp_path, SpectralEntropyCallback(layers=first, probe=PROBE), bf16=True, max_steps=1).train()
    assert seen == {torch.bfloat16}


@pytest.mark.parametrize("form", ["gradient accumulation", "activation checkpointing"])
def test_the_batch_of_training_is_recorded_at_the_step_of_its_loss_and_training_keeps_its_bits(
    tmp_path: Path, form: str
) -> None:
    rows: list[Tensor] = []
    expected: dict[int, float] = {}

    class ByHand(TrainerCallback):
        def on_train_begin(
            self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
        ) -> None:
            self.hook = model.transformer.h[1].mlp.register_forward_hook(self.take)

        def take(self, module: nn.Module, args: Any, output: Tensor) -> None:
            if module.training and torch._C._current_graph_task_id() == -1:  # not again, in the backward pass
                rows.append(output.detach().flatten(0, 1).clone())

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            expected[state.global_step] = fastent.spectral_entropy(torch.cat(rows)).normalized
            rows.clear()

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.hook.remove()

    options = FORMS[form] | {"logging_steps": 1, "max_steps": 3, "eval_strategy": "steps", "eval_steps": 1}
    callback = SpectralEntropyCallback(layers="transformer.h.1.mlp", probe="batch", tokens="flatten")
    again = trained(tmp_path, ByHand(), callback, **options)
    assert {step: h for step, _, h in values(callback)} == pytest.approx(expected, rel=1e-12)
    assert list(expected) == [1, 2, 3]
    assert same(trained(tmp_path, **options), again)


def test_the_batch_of_a_compiled_model_is_refused(tmp_path: Path) -> None:
    callback = SpectralEntropyCallback(layers=LAYERS, probe="batch", tokens="mean")
    trainer = trainer_of(tmp_path, callback, **FORMS["compiled"])
    with pytest.raises(
        ValueError, match="torch_compile=True makes of the model runs none: give a fixed probe"
    ):
        trainer.train()


def test_a_trial_of_a_search_saves_no_state(tmp_path: Path) -> None:
    callback = watch()
    trainer = trainer_of(tmp_path, callback, max_steps=2)
    trainer.train()
    callback._running = True
    trainer.state.is_hyper_param_search = True
    callback.on_save(trainer.args, trainer.state, trainer.control)
    assert not list(tmp_path.rglob("entropy.json"))


@pytest.mark.parametrize("name", ["", "a/b", ".."])
def test_a_name_that_is_no_file_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="name is that of a file"):
        watch(name=name)


def test_an_option_that_the_monitor_does_not_have_is_refused_at_once() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'treshold'"):
        watch(treshold=0.5)


# PEFT 0.21 asks Transformers 5.24 for a property by its former name.
BY_FORMER_NAME = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def adapted(model: nn.Module) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    return peft.get_peft_model(model, config)


@BY_FORMER_NAME
def test_layers_of_an_adapted_model_have_the_names_of_the_model_that_was_adapted(tmp_path: Path) -> None:
    layers = ["transformer.h.*.attn.c_attn", "transformer.h.*", ""]
    plain = [f"transformer.h.{i}{end}" for end in (".attn.c_attn", "") for i in (0, 1)] + [""]
    callback = SpectralEntropyCallback(layers=layers, probe=PROBE, tokens="mean")
    model = adapted(gpt2())
    trainer_of(tmp_path, callback, model=model, max_steps=1).train()
    assert [layer for step, layer, _ in values(callback) if step == 0] == plain
    outputs = []
    layer = model.base_model.model.transformer.h[0].attn.c_attn
    handle = layer.register_forward_hook(lambda module, args, out: outputs.append(out.detach()))
    with torch.no_grad():
        model.eval()(**PROBE)
    handle.remove()
    monitor = fastent.SpectralEntropyMonitor(model, PROBE, layers, tokens="mean")
    with_adapter = fastent.spectral_entropy(outputs[0], tokens="mean").normalized
    assert monitor.step(0)[0].normalized == pytest.approx(with_adapter, rel=1e-12)


@BY_FORMER_NAME
def test_a_prompt_is_no_part_of_a_layers_name() -> None:
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = peft.get_peft_model(gpt2(), config)
    short = {"input_ids": PROBE["input_ids"][:, :5]}
    monitor = fastent.SpectralEntropyMonitor(model, short, "transformer.h.0", tokens="flatten")
    assert [(record.layer, record.n) for record in monitor.step(0)] == [("transformer.h.0", 12 * 7)]


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore")  # of the hosts
@pytest.mark.parametrize(("probe", "packed"), [("fixed", False), ("batch", False), ("batch", True)])
def test_a_trainer_of_trl_keeps_its_bits_and_its_own_metrics_and_resumes(
    tmp_path: Path, probe: str, packed: bool
) -> None:
    trl = pytest.importorskip("trl")
    import datasets
    import tokenizers
    import transformers

    words = {f"w{i}": i for i in range(30)} | {"[UNK]": 30, "[PAD]": 31}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]")),
        pad_token="[PAD]",
        eos_token="[PAD]",
    )
    rows = [{"input_ids": row[: 3 + i % 5].tolist()} for i, row in enumerate(TOKENS)]
    given = (
        {"probe": PROBE, "tokens": "mean"} if probe == "fixed" else {"probe": "batch", "tokens": "flatten"}
    )

    def run(*callbacks: SpectralEntropyCallback, resume: str | None = None) -> Any:
        args = trl.SFTConfig(
            str(tmp_path / "run"),
            max_steps=6,
            per_device_train_batch_size=4,
            logging_steps=2,
            save_steps=4,
            use_cpu=True,
            bf16=False,
            report_to="none",
            packing=packed,
            max_length=8,
        )
        data = datasets.Dataset.from_list(rows)
        trainer = trl.SFTTrainer(gpt2(), args=args, train_dataset=data, processing_class=tokenizer)
        for callback in callbacks:
            callback.attach(trainer)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    def own(trainer: Any) -> list[dict[str, float]]:
        return [row for row in trainer.state.log_history if "loss" in row]

    whole, resumed = (SpectralEntropyCallback(layers=LAYERS, **given) for _ in range(2))
    without, watched = run(), run(whole)
    assert same(without.model.state_dict(), watched.model.state_dict())
    assert own(without) == own(watched)
    assert [row["step"] for row in own(watched)] == [2, 4, 6]
    assert steps(whole) == ([0] if probe == "fixed" else []) + [2, 4, 6]
    run(resumed, resume=str(tmp_path / "run" / "checkpoint-4"))
    assert values(resumed) == values(whole)


TWO = """
import json, os, sys
import torch
torch.set_num_threads(1)
sys.path[:0] = [sys.argv[1], os.path.dirname(sys.argv[1])]
from test_transformers import LAYERS, PROBE, gpt2, same, trainer_of, values, watch
import fastent
from fastent.integrations.transformers import SpectralEntropyCallback
from transformers import EarlyStoppingCallback

folder, rank = sys.argv[2], int(os.environ["RANK"])
options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "per_device_train_batch_size": 2}
out = {}

def run(*callbacks, resume=None, **given):
    model = gpt2()
    trainer = trainer_of(folder, *callbacks, model=model, **(options | given))
    trainer.train(resume_from_checkpoint=resume)
    return trainer, model.state_dict()

_, without = run()
whole, resumed = watch(every=1), watch(every=1)
trainer, weights = run(whole)
out["bits"], out["whole"] = same(without, weights), values(whole)
out["processes"] = trainer.args.world_size
run(resumed, resume=folder + "/checkpoint-2")
out["resumed"] = values(resumed)
policy = watch(every=1, threshold=0.8, stopping=lambda monitor: monitor.history[-1].step >= 3)
trainer, _ = run(policy, save_strategy="no")
out["stopped"] = trainer.state.global_step
best = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "entropy/transformer.h.0"}
trainer, _ = run(watch(every=1), EarlyStoppingCallback(1), save_strategy="no", **best, greater_is_better=True)
out["best"], out["early"] = trainer.state.best_metric, trainer.state.global_step
with open(f"{folder}/{rank}.json", "w") as file:
    json.dump(out, file)
trainer.end()
"""


@pytest.mark.nightly
def test_of_two_processes_the_first_records_and_both_get_its_values_and_decisions(tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(TWO)
    # With --cpu it starts one process, whatever --num_processes says; --multi_gpu starts as many, here without a GPU.
    options = ["multi_gpu", "num_processes=2", "num_machines=1", "mixed_precision=no", "dynamo_backend=no"]
    options += ["rdzv_backend=c10d", "main_process_port=0"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", *(f"--{option}" for option in options)]
    arguments = [str(Path(__file__).parent), str(tmp_path)]
    done = subprocess.run([*launch, str(script), *arguments], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    for out in (first, second):
        assert out["processes"] == 2
        assert out["bits"]
        assert out["stopped"] == 3
    assert first["best"] == second["best"]
    assert first["early"] == second["early"]
    assert [step for step, _, _ in first["whole"]] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert first["resumed"] == first["whole"]
    assert second["resumed"] == second["whole"] == []
    course = {step: h for step, layer, h in first["whole"] if layer == "transformer.h.0" and step}
    assert first["best"] in course.values()
