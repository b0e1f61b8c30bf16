"""Any module as a model: the arithmetic of the hand-written stack, the folders of every run, and what is refused."""

import dataclasses
import json
import os
import signal

import pytest
import torch
from torch import nn

pytest.importorskip("tyro")
from fastent import spectral_entropy
from fastent.cli import main
from fastent.grokking.experiments.data import read_run
from fastent.grokking.train import registry, train
from fastent.grokking.train.conditions import HeldLogits, HeldNorm, InTurn, Mixing, make_condition
from fastent.grokking.train.config import TrainConfig
from fastent.grokking.train.estimate import trial
from fastent.grokking.train.measures import Measures
from fastent.grokking.train.models import initial_parameters, plain_model, seeded
from fastent.grokking.train.modules import ModuleStack
from fastent.grokking.train.runs import Job
from fastent.grokking.train.stack import Stack
from fastent.grokking.train.storage import Interrupted
from fastent.grokking.train.sweep import check_config
from fastent.grokking.train.tasks import batch_index, make_task, split

SMALL = TrainConfig(
    modulus=11, width=16, heads=2, feedforward=24, hidden=(12, 10), batch_size=32, probe_size=40,
    evaluate_every=2, max_steps=4,
)  # fmt: skip
SETTINGS = {
    field.name: getattr(SMALL, field.name)
    for field in dataclasses.fields(SMALL)
    if field.name not in ("task", "model", "measures")
}


class Net(nn.Module):
    """Two tokens through a table, a normalisation with buffers, dropout and a layer of its own name."""

    def __init__(self, config, task):
        super().__init__()
        self.table = nn.Embedding(task.vocabulary, 6)
        self.norm = nn.BatchNorm1d(12)
        self.drop = nn.Dropout(0.3)
        self.out = nn.Linear(12, task.classes)

    def forward(self, tokens):
        return self.out(self.drop(self.norm(self.table(tokens).flatten(1)).relu()))


class WithHead(Net):
    """The same with its last layer called as conditions need it."""

    def __init__(self, config, task):
        super().__init__(config, task)
        self.head = self.out
        del self.out

    def forward(self, tokens):
        return self.head(self.drop(self.norm(self.table(tokens).flatten(1)).relu()))


@pytest.fixture(autouse=True)
def _nothing_stays(monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    registry.register("model", "net", Net)
    registry.register("model", "with_head", WithHead)


CONDITIONS = [
    None,
    Mixing(0.2, "losses"),
    InTurn(
        [Mixing(0.2, "logits"), HeldLogits(lambda s, t: (1.5,)), HeldNorm(lambda s, t: (9.0,), moments=True)]
    ),
]


@pytest.mark.parametrize("condition", CONDITIONS, ids=["baseline", "mixing", "all"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model": "mlp"},
        {"norm_place": "pre", "final_norm": True, "activation": "gelu", "readout": "mean"},
    ],
    ids=["post", "mlp", "pre"],
)
def test_one_layer_by_autograd_follows_the_hand_written_stack(changes, condition):
    config = dataclasses.replace(SMALL, **changes, measures=("progress", "logit_scale"))
    ours, theirs = (
        kind(config, (3, 5), condition=condition, dtype=torch.float64) for kind in (Stack, ModuleStack)
    )
    for _ in range(8):
        torch.testing.assert_close(theirs.train_step(), ours.train_step(), rtol=1e-7, atol=0)
    for name, column in ours.evaluate().items():
        torch.testing.assert_close(theirs.evaluate()[name], column, rtol=1e-6, atol=0)
    torch.testing.assert_close(theirs.representations(), ours.representations(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(theirs.norms(), ours.norms(), rtol=1e-6, atol=1e-9)
    found, wanted = Measures(config)(theirs), Measures(config)(ours)
    assert found.pop("key_blocks") == wanted.pop("key_blocks")
    assert {k: pytest.approx(v, rel=1e-5) for k, v in wanted.items()} == found


def test_two_layers_are_trained_as_a_loop_with_torchs_adamw_trains_them():
    config = dataclasses.replace(SMALL, layers=2, measures=("test_probe",))
    stack, task = ModuleStack(config, (4,)), make_task(config)
    model = plain_model(config, task)
    model.load_state_dict(initial_parameters(config, task, 4))
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.learning_rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=True,
    )
    members, _ = split(task, config.train_fraction, 4)
    for step in range(4):
        pairs = members[torch.from_numpy(batch_index(4, step, len(members), config.batch_size))]
        loss = nn.functional.cross_entropy(model(task.inputs[pairs]), task.labels[pairs])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert torch.equal(stack.train_step(), loss.detach()[None])
    trained = stack.module(4).state_dict()
    assert all(torch.equal(trained[name], tensor) for name, tensor in model.state_dict().items())
    assert sum(name.startswith("layer.1.") for name in trained) == 12
    h = model.represent(task.inputs[stack._parts[4].probes["probe"]]).detach()
    torch.testing.assert_close(stack.representations()[0], h)
    one, two = (initial_parameters(dataclasses.replace(config, layers=n), task, 4) for n in (1, 2))
    for name in ("tokens.weight", "positions.weight", "head.weight", "head.bias"):
        assert torch.equal(one[name], two[name])  # a second layer leaves the start of the others as it is


def test_the_entropy_is_that_of_the_layer_that_is_named():
    config = dataclasses.replace(SMALL, layers=2, entropy_at="layer.0", readout="mean")
    stack = ModuleStack(config, (0,))
    module, probe = stack.module(0).eval(), stack.task.inputs[stack._parts[0].probes["probe"]]
    with torch.no_grad():
        after = module.layer[0](module.tokens(probe) + module.positions.weight).mean(1)
    found = spectral_entropy(stack.representations()[0]).normalized
    assert found == pytest.approx(spectral_entropy(after).normalized, rel=1e-5)
    above = ModuleStack(dataclasses.replace(config, entropy_at="readout"), (0,))
    assert found != pytest.approx(spectral_entropy(above.representations()[0]).normalized, rel=1e-3)


def test_random_numbers_and_buffers_are_of_the_seed_and_the_step_alone():
    config = dataclasses.replace(SMALL, model="with_head")
    both, alone = ModuleStack(config, (0, 1)), ModuleStack(config, (1,))
    outside = torch.random.get_rng_state()
    for _ in range(3):
        both.train_step()
        torch.rand(3)
        alone.train_step()
    state = alone.state_dict(1)
    assert all(torch.equal(tensor, state[name]) for name, tensor in both.state_dict(1).items())
    assert int(state["buffer.norm.num_batches_tracked"]) == 3
    assert not torch.equal(both.state_dict(0)["parameter.head.weight"], state["parameter.head.weight"])
    with seeded(7, "anything"):
        torch.rand(5)
    torch.random.set_rng_state(outside)
    later = ModuleStack(config, (1,))
    later.load_state_dict(1, state)
    assert later.steps_done == 3
    losses = later.train_step()
    assert torch.equal(losses, alone.train_step())
    both.keep([1])
    assert both.seeds == (1,)
    other = {**state, "buffer.norm.running_mean": torch.zeros(3)}
    with pytest.raises(
        ValueError, match=r"buffer\.norm\.running_mean has shape \(3,\) in the state, and \(12,\) is"
    ):
        later.load_state_dict(1, other)
    assert torch.equal(losses, both.train_step())


def test_a_parameter_that_takes_no_part_or_is_frozen_stays():
    class Idle(Net):
        def __init__(self, config, task):
            super().__init__(config, task)
            self.idle = nn.Parameter(torch.ones(3))
            self.table.weight.requires_grad_(False)

    registry.register("model", "idle", Idle)
    stack = ModuleStack(dataclasses.replace(SMALL, model="idle", entropy_at="drop"), (0,))
    before = stack.state_dict(0)
    stack.train_step()
    after = stack.state_dict(0)
    same = {name for name in before if torch.equal(before[name], after[name])} - {"steps"}
    assert {"parameter.idle", "parameter.table.weight", "first.idle"} <= same
    config = stack.config
    for name in ("norm-start", "norm-start-each"):
        held = make_condition(Job("own", name, config, (0,)), None)
        stack = ModuleStack(config, (0,), condition=held)
        before = stack.norms()
        stack.train_step()
        after = stack.norms()
        if name == "norm-start":
            assert float(after.norm()) == pytest.approx(float(before.norm()), rel=1e-6)
        else:  # what starts at 0 is left free
            torch.testing.assert_close(after[before > 0], before[before > 0], rtol=1e-6, atol=0)
        assert float(stack.evaluate()["parameter_norm"]) == pytest.approx(float(stack.norms().norm()))
    assert "parameter.out.weight" not in same


@pytest.mark.filterwarnings("ignore:model with_head. gradients by torch")
def test_a_module_is_trained_in_run_folders_and_goes_on_bit_for_bit(tmp_path):
    class Stop:
        def row(self, job, seed, row):
            if (seed, row["step"]) == (1, 2):
                os.kill(os.getpid(), signal.SIGTERM)  # which saves at this step

        def done(self, job, seed):
            pass

    asked = {
        "model": WithHead,
        "condition": "losses-0.2",
        "measures": ["logit_scale"],
        "seeds": [1, 0],
        "quiet": True,
    }
    asked = {**asked, **SETTINGS}
    with pytest.raises(Interrupted, match="stopped after step 2, saved"):
        train("add", out=tmp_path / "a", observers=[Stop()], **asked)
    resumed = train("add", out=tmp_path / "a", **asked)
    whole = train("add", out=tmp_path / "b", **asked)
    for a, b in zip(resumed, whole, strict=True):
        assert ",model=with_head," in a.name
        for name in ("metrics.jsonl", "checkpoint-4.safetensors", "config.json", "DONE"):
            assert (a / name).read_bytes() == (b / name).read_bytes(), name
    run = read_run(resumed[1])
    assert [row["step"] for row in run.rows] == [0, 2, 4]
    assert run.record["guests"][0]["place"] == "test_modules:WithHead"
    stack = ModuleStack(check_model(run), (0,), condition=Mixing(0.2, "losses"))
    for _ in range(4):
        stack.train_step()
    assert run.rows[-1]["entropy"] == spectral_entropy(stack.representations()[0]).normalized
    assert run.rows[-1]["test_loss"] == float(stack.evaluate()["test_loss"])


def check_model(run):
    return TrainConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in run.config.items()})


@pytest.mark.filterwarnings("default:model transformer of 2 layers. gradients by torch")
def test_two_layers_from_the_command_line(tmp_path, capsys):
    line = [
        "run",
        "own",
        "--layers",
        "2",
        "--condition",
        "norm-start",
        "--modulus",
        "7",
        "--width",
        "8",
        "--heads",
        "1",
    ]
    line += [
        "--feedforward",
        "8",
        "--max-steps",
        "2",
        "--evaluate-every",
        "1",
        "--batch-size",
        "8",
        "--seeds",
        "0",
    ]
    out = ["--workers", "1", "--quiet", "--out", str(tmp_path)]
    assert main([*line, "--entropy-at", "layer.0", *out]) == 0
    said = capsys.readouterr()
    assert "warning: model transformer of 2 layers: gradients by torch, one seed after the other" in said.err
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("own-norm-start-add-modulus=7,layers=2,")
    norms = [row["parameter_norm"] for row in read_run(path).rows]
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-6)
    assert json.loads((path / "config.json").read_text())["config"]["entropy_at"] == "layer.0"
    assert main(["runs", str(tmp_path)]) == 0
    assert "complete" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "condition", "said"),
    [
        ({"model": "net"}, None, "at='readout', .* has no `head` whose input .* give one of table, norm, drop, out"),
        ({"model": "net", "entropy_at": "middle"}, None, "model 'net' has no such layer: give one of table"),
        ({"model": "net", "entropy_at": "out"}, Mixing(0.1, "losses"), "no `head`, .* is what this condition changes"),
        ({"model": "wide"}, None, r"must return logits of shape \(N, 11\) for tokens \(2, 2\); got \(2, 5\)"),
        ({"model": "flat", "entropy_at": "table"}, None, r"must give \(N, d\), .* got \(20,\) for 2 pairs"),
        ({"model": "idle", "entropy_at": "spare"}, None, "layer 'spare' of model 'idle' is not called"),
    ],
)  # fmt: skip
def test_a_module_that_cannot_be_trained_or_measured_is_refused_in_a_sentence(changes, condition, said):
    class Idle(Net):
        def __init__(self, config, task):
            super().__init__(config, task)
            self.spare = nn.Linear(2, 2)

    class Flat(nn.Module):
        def __init__(self, config, task):
            super().__init__()
            self.table = nn.Flatten(0)
            self.out = nn.Linear(2, task.classes)

        def forward(self, tokens):
            self.table(tokens.repeat(1, 5))
            return self.out(tokens.float())

    registry.register(
        "model",
        "wide",
        lambda config, task: nn.Sequential(nn.Embedding(99, 5), nn.Flatten(), nn.Linear(10, 5)),
    )
    registry.register("model", "flat", Flat)
    registry.register("model", "idle", Idle)
    with pytest.raises(ValueError, match=said):
        ModuleStack(dataclasses.replace(SMALL, **changes), (0,), condition=condition)


def test_a_measure_that_reads_the_head_says_what_the_module_lacks():
    config = dataclasses.replace(SMALL, model="net", entropy_at="drop", measures=("progress",))
    with pytest.raises(
        ValueError, match=r"model 'net' has no parameter 'tokens\.weight', which a measure asks for"
    ):
        Measures(config)(ModuleStack(config, (0,)))
    config = dataclasses.replace(config, model="with_head")
    with pytest.raises(
        ValueError, match=r"model 'with_head' has no parameter 'tokens\.weight', which a measure"
    ):
        Measures(config)(ModuleStack(config, (0,)))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layers": 0}, "layers must be at least 1; got 0"),
        ({"layers": 2, "model": "mlp"}, "layers must be 1 for the MLP, whose depth is .*; got 2"),
        ({"entropy_at": "layer.0"}, "entropy_at must be readout or final_norm; got 'layer.0'"),
        ({"layers": 2, "entropy_at": "<b>"}, "or the name of a layer such as layer.0; got '<b>'"),
    ],
)
def test_depth_and_layers_that_do_not_fit_the_model_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        TrainConfig(**changes)


def test_a_module_is_timed_by_a_trial_and_its_sizes_are_checked(tmp_path):
    config = dataclasses.replace(SMALL, model="with_head")
    check_config(config)
    assert trial(Job("own", "baseline", config, (0, 1)), tmp_path, "cpu", 0.01).seconds > 0
    with pytest.raises(ValueError, match="needs some"):
        check_config(dataclasses.replace(SMALL, layers=10**9))
