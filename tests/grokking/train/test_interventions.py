"""Conditions: exact gradients, norms held to rounding, and nothing that a resumed run could lack."""

import dataclasses
import json

import pytest
import torch

from fastent.grokking.experiments.jobs import JOBS
from fastent.grokking.train.conditions import HeldNorm, InTurn, Mixing, followed, make_condition, source_job
from fastent.grokking.train.config import preset
from fastent.grokking.train.loop import train
from fastent.grokking.train.models import initial_parameters, plain_model
from fastent.grokking.train.runs import Job
from fastent.grokking.train.stack import Stack
from fastent.grokking.train.storage import RunError
from fastent.grokking.train.sweep import _WorkerPool
from fastent.grokking.train.tasks import batch_index, make_task, split

CONFIG = preset(
    "paper", modulus=11, width=16, feedforward=32, heads=2, batch_size=24, probe_size=32, train_fraction=0.6,
    learning_rate=1e-2, evaluate_every=5, max_steps=20,
)  # fmt: skip
FINAL = dataclasses.replace(CONFIG, final_norm=True)
MLP = dataclasses.replace(CONFIG, model="mlp", hidden=(24, 16))


def job(condition, seeds=(0, 1), config=CONFIG):
    return Job("e3", condition, config, seeds)


def stack(condition, tmp_path=None, *, config=CONFIG, **options):
    return Stack(config, (0, 1), condition=make_condition(job(condition, config=config), tmp_path), **options)


def norm(parameters):
    return torch.stack([t.double().norm() for t in parameters]).norm().item()


def gradients(module, loss):
    return dict(
        zip(dict(module.named_parameters()), torch.autograd.grad(loss, module.parameters()), strict=True)
    )


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.4, 1.0])
@pytest.mark.parametrize("average", ["losses", "logits"])
@pytest.mark.parametrize("config", [CONFIG, FINAL, MLP], ids=["transformer", "final norm", "mlp"])
def test_first_moment_after_a_step_is_the_autograd_gradient_of_the_papers_formula(config, average, alpha):
    task = make_task(config)
    mixed = stack(f"{average}-{alpha:g}", config=config, dtype=torch.float64)
    module = plain_model(config, task).double()
    module.load_state_dict(
        {
            name.removeprefix("parameter."): tensor
            for name, tensor in mixed.state_dict(1).items()
            if name.startswith("parameter.")
        }
    )
    pairs = split(task, config.train_fraction, 1)[0]
    pairs = pairs[torch.from_numpy(batch_index(1, 0, len(pairs), config.batch_size))]
    hidden, labels = module.represent(task.inputs[pairs]), task.labels[pairs]
    if config.final_norm:  # what the head gets is mixed
        hidden = module.final_norm(hidden)
    # Appendix C: h~_i = (1 - a) h_i + a h_(i+1), cyclic; both logits by the same head.
    neighbour = hidden[torch.arange(1, len(hidden) + 1) % len(hidden)]
    logits = module.head(hidden), module.head((1 - alpha) * hidden + alpha * neighbour)
    entropy = torch.nn.functional.cross_entropy
    if average == "losses":
        loss = (entropy(logits[0], labels) + entropy(logits[1], labels)) / 2
    else:
        loss = entropy((logits[0] + logits[1]) / 2, labels)
    expected = gradients(module, loss)
    losses = mixed.train_step()
    assert losses[1].item() == pytest.approx(loss.item(), abs=1e-14)
    state = mixed.state_dict(1)
    for name, gradient in expected.items():
        torch.testing.assert_close(
            state[f"first.{name}"], (1 - config.betas[0]) * gradient, rtol=1e-11, atol=1e-14, msg=name
        )


def test_mixing_with_alpha_zero_trains_as_the_baseline():
    plain, mixed = Stack(CONFIG, (0, 1), dtype=torch.float64), stack("losses-0", dtype=torch.float64)
    for _ in range(5):
        torch.testing.assert_close(plain.train_step(), mixed.train_step(), rtol=1e-12, atol=0)


def test_evaluation_and_representations_are_not_mixed():
    plain, mixed = Stack(CONFIG, (0, 1)), stack("losses-0.4")
    assert torch.equal(plain.representations(), mixed.representations())
    assert all(
        torch.equal(a, b) for a, b in zip(plain.evaluate().values(), mixed.evaluate().values(), strict=True)
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-7), (torch.float64, 1e-15)])
@pytest.mark.parametrize("mixing", ["", "losses-0.1+"])
def test_the_common_norm_stays_what_it_was_at_the_start(dtype, tolerance, mixing):
    held = stack(f"{mixing}norm-start", dtype=dtype)
    start = {seed: norm(initial_parameters(CONFIG, make_task(CONFIG), seed).values()) for seed in (0, 1)}
    free = Stack(CONFIG, (0, 1), dtype=dtype)
    for _ in range(10):
        held.train_step()
        free.train_step()
        norms = held.evaluate()["parameter_norm"].tolist()
        assert norms == pytest.approx([start[0], start[1]], rel=tolerance)
    # Each tensor's share of the norm is left to the training, which would have moved the whole by itself.
    assert abs(free.evaluate()["parameter_norm"][0].item() / start[0] - 1) > 0.05
    assert (
        abs(held.module(0).tokens.weight.norm().item() / free.module(0).tokens.weight.norm().item() - 1)
        > 0.01
    )


def test_norm_of_each_tensor_stays_what_it_was_and_tensors_that_start_at_zero_are_free():
    held = stack("norm-start-each", dtype=torch.float64)
    start = initial_parameters(CONFIG, make_task(CONFIG), 1)
    for _ in range(5):
        held.train_step()
    for name, tensor in held.module(1).double().named_parameters():
        if start[name].norm() > 0:
            assert tensor.norm().item() == pytest.approx(start[name].norm().item(), rel=1e-7), name
        else:
            assert tensor.norm() > 0, name


def test_scaling_leaves_the_moments_and_the_direction_of_the_step():
    held, free = stack("norm-start", dtype=torch.float64), Stack(CONFIG, (0, 1), dtype=torch.float64)
    held.train_step()
    free.train_step()
    a, b = held.state_dict(0), free.state_dict(0)
    ratios = torch.cat(
        [(a[n] / b[n]).flatten() for n in a if n.startswith("parameter.") and b[n].abs().min() > 0]
    )
    assert ratios.std() < 1e-12
    assert all(torch.equal(a[n], b[n]) for n in a if n.split(".")[0] in ("first", "second"))


@pytest.fixture
def followed_runs(tmp_path):
    train(Job("e1", "baseline", CONFIG, (0, 1)), tmp_path)
    return tmp_path


def rows(out, name):
    return [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]


def test_norm_follows_the_same_seeds_run_at_its_evaluations_and_log_linear_between(followed_runs):
    held = stack("losses-0.4+norm-as-baseline", followed_runs, dtype=torch.float64)
    logs = [
        {row["step"]: row["parameter_norm"] for row in rows(followed_runs, f"e1-baseline-add-seed{s}")}
        for s in (0, 1)
    ]
    assert logs[0][5] != logs[1][5]
    for step in range(1, 24):
        held.train_step()
        low, high = (min(20, 5 * (step // 5 + k)) for k in (0, 1))
        share = (step - low) / 5 if step < 20 else 0
        expected = [log[low] ** (1 - share) * log[high] ** share for log in logs]
        assert held.evaluate()["parameter_norm"].tolist() == pytest.approx(expected, rel=1e-12)


def test_norm_held_from_memorising_on_follows_the_baseline_until_then(followed_runs):
    path = followed_runs / "e1-baseline-add-seed1" / "metrics.jsonl"
    logged = rows(followed_runs, "e1-baseline-add-seed1")
    # Memorised at step 10, as far as the log says.
    for k, row in enumerate(logged):
        row["train_accuracy"] = 0.995 if k >= 2 else 0.5
    path.write_text("".join(json.dumps(row) + "\n" for row in logged))
    with pytest.raises(RunError, match=r"seed0 never memorised"):
        make_condition(job("norm-mem"), followed_runs)
    held = Stack(
        CONFIG, (1,), condition=make_condition(job("norm-mem", (1,)), followed_runs), dtype=torch.float64
    )
    norms = []
    for _ in range(20):
        held.train_step()
        norms.append(held.evaluate()["parameter_norm"].item())
    assert norms[4] == pytest.approx(logged[1]["parameter_norm"], rel=1e-12)
    assert norms[9:] == pytest.approx([logged[2]["parameter_norm"]] * 11, rel=1e-12)
    assert source_job(job("losses-0.1+norm-mem")) == Job("e1", "baseline", CONFIG, (0, 1))


def test_a_run_to_follow_must_be_there_complete_and_of_the_same_settings(followed_runs):
    with pytest.raises(
        RunError, match=r"e2-losses-0\.1-add-seed0, whose norm .* missing .* `fastent run e2`"
    ):
        make_condition(job("norm-as-losses-0.1"), followed_runs)
    with pytest.raises(RunError, match=r"baseline-add-seed7.* missing or not complete"):
        make_condition(job("norm-as-baseline", (0, 7)), followed_runs)
    path = followed_runs / "e1-baseline-add-seed1" / "config.json"
    record = json.loads(path.read_text())
    del record["config"]["sampling"]  # older than the setting, and no other settings for that
    path.write_text(json.dumps(record))
    make_condition(job("norm-as-baseline"), followed_runs)
    with pytest.raises(RunError, match="other settings"):
        make_condition(
            job("norm-as-baseline", config=dataclasses.replace(CONFIG, weight_decay=0.5)), followed_runs
        )
    (followed_runs / "e1-baseline-add-seed1" / "DONE").unlink()
    with pytest.raises(RunError, match=r"baseline-add-seed1.* missing or not complete"):
        make_condition(job("norm-as-baseline"), followed_runs)


@pytest.mark.parametrize(
    "condition", ["losses-0.1", "logits-0.2+norm-start", "norm-start-each", "losses-0.1+norm-as-baseline"]
)
def test_a_run_under_a_condition_resumes_bit_for_bit(followed_runs, condition):
    whole = stack(condition, followed_runs)
    for _ in range(12):
        whole.train_step()
    first = stack(condition, followed_runs)
    for _ in range(7):
        first.train_step()
    second = stack(condition, followed_runs)
    for seed in (0, 1):
        second.load_state_dict(seed, first.state_dict(seed))
    for _ in range(5):
        second.train_step()
    for seed in (0, 1):
        a, b = whole.state_dict(seed), second.state_dict(seed)
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_seeds_in_one_launch_are_trained_as_seeds_in_turn(followed_runs):
    for condition in ("losses-0.1+norm-as-baseline", "logits-0.2+norm-start-each"):
        together = stack(condition, followed_runs, dtype=torch.float64, together=True)
        in_turn = stack(condition, followed_runs, dtype=torch.float64, together=False)
        for _ in range(10):
            torch.testing.assert_close(together.train_step(), in_turn.train_step(), rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    "name", ["mixing", "losses", "losses-0.1+", "norm-as-", "norm-start-all", "losses-2", "logits--1"]
)
def test_an_unknown_condition_is_refused_and_the_known_are_named(name, tmp_path):
    with pytest.raises(RunError):
        make_condition(job(name), tmp_path)
    with pytest.raises(RunError, match=r"called 'losses'; there are baseline, .*norm-start-each"):
        make_condition(job("losses"), tmp_path)


def test_conditions_by_name(tmp_path):
    assert make_condition(job("baseline"), tmp_path) is None
    assert make_condition(job("to-the-end"), tmp_path) is None
    mixed = make_condition(job("logits-0.3"), tmp_path)
    assert isinstance(mixed, Mixing)
    assert mixed.alpha == 0.15
    assert isinstance(make_condition(job("norm-start"), tmp_path), HeldNorm)
    assert isinstance(make_condition(job("losses-0.1+norm-start"), tmp_path), InTurn)
    assert followed("norm-start") is None
    assert source_job(job("norm-as-losses-0.1")) == Job("e2", "losses-0.1", CONFIG, (0, 1))


def test_every_condition_that_an_experiment_asks_for_is_known_and_follows_only_what_it_asks_for(tmp_path):
    for make in JOBS.values():
        jobs = make(CONFIG, (0, 1, 2, 3, 4, 5))
        names = {each.run_name(seed) for each in jobs for seed in each.seeds}
        assert len(names) == sum(len(each.seeds) for each in jobs)
        for each in jobs:
            source = source_job(each)
            if source is None:
                make_condition(each, tmp_path)
            else:
                assert {source.run_name(seed) for seed in each.seeds} <= names


def test_a_pool_starts_a_run_that_follows_others_only_once_they_are_over(tmp_path):
    follows = job("norm-as-losses-0.1", (0, 1))
    elsewhere, baseline = (Job("e2", "losses-0.1", CONFIG, (2,)), Job("e1", "baseline", CONFIG, (0, 1)))
    mixed = Job("e2", "losses-0.1", CONFIG, (1, 2))
    pool = _WorkerPool([follows, mixed, elsewhere, baseline, baseline], tmp_path, 3, "cpu", False, (), None)
    assert len(pool.waiting) == 4
    assert pool._next() == (mixed, 1)
    pool.waiting.remove((mixed, 1))
    # Nothing that the first job follows is left.
    assert pool._next() == (follows, 1)


def test_norm_of_a_mixed_run_is_followed_without_mixing(followed_runs):
    train(Job("e2", "losses-0.1", CONFIG, (0, 1)), followed_runs)
    train(Job("e3", "norm-as-losses-0.1", CONFIG, (0, 1)), followed_runs)
    held, mixed = (
        rows(followed_runs, f"{name}-add-seed0") for name in ("e3-norm-as-losses-0.1", "e2-losses-0.1")
    )
    assert [row["parameter_norm"] for row in held] == pytest.approx(
        [row["parameter_norm"] for row in mixed], rel=1e-7
    )
    assert held[-1]["train_loss"] != pytest.approx(mixed[-1]["train_loss"], rel=1e-4)
