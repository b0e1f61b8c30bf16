import dataclasses
import json
import math

import pytest

from fastent.grokking.train.config import PRESETS, SOURCES, TrainConfig, completed, own_fraction, preset


def test_every_field_has_a_source_and_no_source_lacks_its_field():
    assert set(SOURCES) == {field.name for field in dataclasses.fields(TrainConfig)}
    assert all(source.startswith(("paper", "ours: ")) for source in SOURCES.values())


def test_the_paper_preset_holds_what_the_papers_text_gives():
    given = {
        "task": "add",
        "modulus": 97,
        "model": "transformer",
        "layers": 1,
        "width": 128,
        "heads": 4,
        "feedforward": 512,
        "learning_rate": 1e-3,
        "weight_decay": 1.0,
        "batch_size": 512,
        "max_steps": 50_000,
        "evaluate_every": 200,
        "probe_size": 512,
    }
    assert {name: getattr(PRESETS["paper"], name) for name in given} == given
    assert set(given) == {name for name, source in SOURCES.items() if source.startswith("paper")}


def test_a_preset_takes_changes_and_an_unknown_one_is_named_with_its_alternatives():
    assert preset("paper", modulus=11) == dataclasses.replace(PRESETS["paper"], modulus=11)
    with pytest.raises(ValueError, match=r"'papr'; there are .*paper"):
        preset("papr")


def test_a_task_brings_what_it_needs_and_is_overruled_by_what_is_given():
    assert preset("paper", task="s5").train_fraction == 0.5
    assert preset("paper", task="s5", train_fraction=0.3).train_fraction == 0.3
    assert preset("paper", task="sub") == dataclasses.replace(PRESETS["paper"], task="sub")


def test_a_variant_of_the_paper_differs_from_it_in_one_choice():
    paper = dataclasses.asdict(PRESETS["paper"])
    for name, config in PRESETS.items():
        if name.startswith("paper-"):
            changed = [field for field, value in dataclasses.asdict(config).items() if value != paper[field]]
            assert len(changed) == 1, name
            assert SOURCES[changed[0]].startswith("ours")


@pytest.mark.parametrize("name", PRESETS)
def test_a_config_survives_json(name):
    restored = TrainConfig(**json.loads(json.dumps(dataclasses.asdict(PRESETS[name]))))
    assert restored == PRESETS[name]
    assert hash(restored) == hash(PRESETS[name])


def test_a_record_that_lacks_a_younger_setting_means_the_value_that_it_was_trained_with():
    younger = {"final_norm": False, "entropy_at": "readout", "start": "torch", "sampling": "epochs"}
    younger |= {"operand_tokens": "one", "layers": 1}
    record = {"task": "s5", "sampling": "replacement"}
    assert completed(record) == {**younger, **record}
    assert record == {"task": "s5", "sampling": "replacement"}


def test_the_command_line_sets_each_kind_of_field():
    tyro = pytest.importorskip("tyro")
    arguments = ["--task", "s5", "--betas", "0.8", "0.9", "--hidden", "5", "6", "7", "--equals-token"]
    assert tyro.cli(TrainConfig, args=arguments) == TrainConfig(
        task="s5", betas=(0.8, 0.9), hidden=(5, 6, 7), equals_token=True
    )


def test_a_run_goes_past_grokking_by_steps_or_by_share_whichever_is_more_and_never_past_the_cap():
    config = TrainConfig(run_past_steps=3_000, run_past_share=0.2, max_steps=50_000)
    assert config.last_step(1_000) == 4_000
    assert config.last_step(20_000) == 24_000
    assert config.last_step(48_000) == 50_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 130}, "multiple of heads"),
        ({"train_fraction": 1.0}, "strictly between 0 and 1; got 1.0"),
        ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ({"hidden": (), "model": "mlp"}, "at least one layer"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"learning_rate": -1e-3}, "learning_rate must be finite and not negative; got -0.001"),
        ({"epsilon": 0.0}, "epsilon must be finite and over 0"),
        ({"max_steps": 2**24 + 1}, "max_steps must be at most 2.24 = 16,777,216"),
        ({"criterion": 1.01}, "criterion"),
        ({"entropy_at": "final_norm"}, "needs final_norm=True"),
        ({"operand_tokens": "images"}, "needs task=\"s5\" .*; got task='add'"),
        ({"operand_tokens": "images", "task": "s5", "model": "mlp"}, "the MLP reads two tokens"),
        ({"probe_size": 1}, "probe_size must be at least 2"),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_rule(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changes)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "field", [f.name for f in dataclasses.fields(TrainConfig) if f.type in ("float", float)]
)
def test_no_setting_is_infinite_or_no_number(field, value):
    with pytest.raises(ValueError, match=f"{field} must .* got {value}"):
        TrainConfig(**{field: value})


def test_a_share_that_was_asked_for_goes_for_every_task_and_otherwise_each_has_its_own():
    for base, task, own in (
        ("quick", "add", 0.4),
        ("quick", "s5", 0.5),
        ("paper", "add", 0.3),
        ("paper", "s5", 0.5),
    ):
        for start in ("add", "s5"):
            assert own_fraction(preset(base, task=start), task, base) == own
            assert own_fraction(preset(base, task=start, train_fraction=0.6), task, base) == 0.6
    assert own_fraction(preset("quick"), "mul", "quick") == PRESETS["quick"].train_fraction
