"""Conditions: exact gradients, norms held to rounding, and nothing that a resumed run could lack."""

import dataclasses
import json

import pytest
import torch
from toy_stack import without_checksums

from fastent.grokking.experiments.jobs import JOBS
from fastent.grokking.train.conditions import (
    HeldNorm,
    InTurn,
    Mixing,
    followed,
    make_condition,
    sources,
)
from fastent.grokking.train.config import preset
from fastent.grokking.train.executors import Pool
from fastent.grokking.train.loop import train
from fastent.grokking.train.models import initial_parameters, logit_scale, plain_model
from fastent.grokking.train.runs import Job
from fastent.grokking.train.stack import Stack
from fastent.grokking.train.storage import Damaged, RunError, RunWarning, read_rows
from fastent.grokking.train.sweep import _Sweep
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
    recorded = dataclasses.replace(CONFIG, measures=("logit_scale",))
    train(Job("e1", "baseline", recorded, (0, 1)), tmp_path)
    return tmp_path


@pytest.fixture
def changed_runs(followed_runs):
    """The same, from before there were checksums, so that a log may be changed."""
    for seed in (0, 1):
        without_checksums(followed_runs / f"e1-baseline-add-seed{seed}")
    return followed_runs


def rows(out, name):
    return read_rows(out / name / "metrics.jsonl", 0)[0]


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


def test_the_sham_replayed_from_every_step_is_the_baseline_to_rounding(followed_runs):
    free = Stack(CONFIG, (0, 1), dtype=torch.float64)
    held, line = (
        stack(f"norm-as-baseline{how}", followed_runs, dtype=torch.float64) for how in ("-every-step", "")
    )
    for _ in range(20):
        expected, replayed, between = free.train_step(), held.train_step(), line.train_step()
    torch.testing.assert_close(replayed, expected, rtol=1e-6, atol=0)
    assert (between / expected - 1).abs().max() > 2e-5
    # Not the very same run: the norm is that of the float32 twin, and constant after the end of the record.
    assert not torch.equal(replayed, expected)
    last = held.evaluate()["parameter_norm"]
    held.train_step()
    torch.testing.assert_close(held.evaluate()["parameter_norm"], last, rtol=1e-12, atol=0)


@pytest.mark.parametrize("how", ["each", "every-step"])
def test_a_twin_that_leaves_the_recorded_run_is_told_of_once(changed_runs, how):
    # As where the record is of another machine, and from step 10 on the last bits have made a difference.
    path = changed_runs / "e1-baseline-add-seed1" / "metrics.jsonl"
    changed = [{**row, "parameter_norm": row["parameter_norm"] * (1.01 if row["step"] >= 10 else 1)}
               for row in rows(changed_runs, path.parent.name)]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in changed))
    held = make_condition(job(f"norm-as-baseline-{how}"), changed_runs)
    held.numbers((0, 1), 5)
    with pytest.warns(RunWarning, match="seed1, trained once more, has another norm at step 10") as told:
        held.numbers((0, 1), 20)
    assert len(told) == 1


def test_a_twin_follows_the_condition_that_is_followed(followed_runs):
    train(Job("e2", "losses-0.4", CONFIG, (0, 1)), followed_runs)
    mixed, replayed = (
        stack(f"losses-0.4{norm}", followed_runs) for norm in ("", "+norm-as-losses-0.4-every-step")
    )
    for _ in range(12):
        expected, got = mixed.train_step(), replayed.train_step()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=0)


def test_each_tensor_follows_its_own_norm_log_linear_between_evaluations(followed_runs):
    free = Stack(CONFIG, (1,))
    norms = [free.norms()[:, 0]]
    for _ in range(20):
        free.train_step()
        norms.append(free.norms()[:, 0])
    held = stack("norm-as-baseline-each", followed_runs, dtype=torch.float64)
    for step in range(1, 24):
        held.train_step()
        first = 5 * ((min(step, 20) - 1) // 5)
        low, high, share = norms[first], norms[first + 5], (min(step, 20) - first) / 5
        held_ones = low > 0  # biases that start at 0 are left free until the first evaluation
        assert held_ones.sum() == (12 if step <= 5 else 16)
        wanted = low ** (1 - share) * high**share
        torch.testing.assert_close(held.norms()[held_ones, 1], wanted[held_ones], rtol=1e-12, atol=0)


def test_moments_scaled_along_are_those_of_the_gradient_in_the_new_unit(followed_runs):
    # Of a loss that ignores the scale of the parameters the gradient at c p is 1/c of that at p.
    plain, along = (
        stack(f"norm-as-baseline{how}", followed_runs, dtype=torch.float64) for how in ("", "-moments")
    )
    plain.train_step()
    along.train_step()
    a, b = plain.state_dict(0), along.state_dict(0)
    free = Stack(CONFIG, (0, 1), dtype=torch.float64)
    free.train_step()
    c = (a["parameter.head.weight"] / free.state_dict(0)["parameter.head.weight"]).mean().item()
    assert abs(c - 1) > 1e-4
    for name in (name.removeprefix("first.") for name in a if name.startswith("first.")):
        assert torch.equal(a[f"parameter.{name}"], b[f"parameter.{name}"])
        for kind, power in (("first", 1), ("second", 2)):
            torch.testing.assert_close(
                b[f"{kind}.{name}"] * c**power, a[f"{kind}.{name}"], rtol=1e-10, atol=1e-300
            )


@pytest.mark.parametrize("mixing", ["", "losses-0.4+"])
def test_logits_are_trained_on_at_the_scale_that_the_followed_run_recorded(followed_runs, mixing):
    held = stack(f"{mixing}logits-as-baseline", followed_runs, dtype=torch.float64)
    log = {row["step"]: row["logit_scale"] for row in rows(followed_runs, "e1-baseline-add-seed1")}
    for step in range(8):
        module = held.module(1)
        task = held.task
        pairs = split(task, CONFIG.train_fraction, 1)[0]
        pairs = pairs[torch.from_numpy(batch_index(1, step, len(pairs), CONFIG.batch_size))]
        hidden, labels = module.represent(task.inputs[pairs]), task.labels[pairs]
        if mixing:
            hidden = torch.cat([hidden, 0.6 * hidden + 0.4 * hidden.roll(-1, 0)])
            labels = labels.repeat(2)
        logits = module.head(hidden)
        low, share = 5 * (step // 5), step % 5 / 5
        wanted = log[low] ** (1 - share) * log[low + 5] ** share
        scale = logits.var(1, correction=0).mean().sqrt().item()
        loss = torch.nn.functional.cross_entropy(logits * (wanted / scale), labels)
        first = gradients(module, loss)
        before = held.state_dict(1)
        assert held.train_step()[1].item() == pytest.approx(loss.item(), rel=1e-12)
        after = held.state_dict(1)
        for name, gradient in first.items():
            taken = after[f"first.{name}"] - CONFIG.betas[0] * before[f"first.{name}"]
            torch.testing.assert_close(taken / (1 - CONFIG.betas[0]), gradient, rtol=1e-8, atol=1e-12)
    assert abs(wanted / scale - 1) > 0.01


def test_norm_and_scale_of_the_logits_are_held_together_in_either_order(followed_runs):
    one, other = (
        stack(name, followed_runs)
        for name in ("norm-as-baseline+logits-as-baseline", "logits-as-baseline+norm-as-baseline")
    )
    for _ in range(6):
        assert torch.equal(one.train_step(), other.train_step())
    assert make_condition(job("logits-as-baseline"), followed_runs).after_step({}, iter(())) is None


def test_evaluation_sees_logits_undivided(followed_runs):
    held = stack("logits-as-baseline", followed_runs)
    held.train_step()
    p = {name: held.parameter(name) for name in ("head.weight", "head.bias")}
    torch.testing.assert_close(held.logit_scale(), logit_scale(p, held.representations()))
    plain = Stack(CONFIG, (0, 1))
    for seed in (0, 1):
        plain.load_state_dict(seed, held.state_dict(seed))
    assert torch.equal(plain.evaluate()["train_loss"], held.evaluate()["train_loss"])


def test_norm_held_from_memorising_on_follows_the_baseline_until_then(changed_runs):
    path = changed_runs / "e1-baseline-add-seed1" / "metrics.jsonl"
    logged = rows(changed_runs, "e1-baseline-add-seed1")
    # Memorised at step 10, as far as the log says.
    for k, row in enumerate(logged):
        row["train_accuracy"] = 0.995 if k >= 2 else 0.5
    path.write_text("".join(json.dumps(row) + "\n" for row in logged))
    with pytest.raises(RunError, match=r"seed0 never memorised"):
        make_condition(job("norm-mem"), changed_runs)
    held = Stack(
        CONFIG, (1,), condition=make_condition(job("norm-mem", (1,)), changed_runs), dtype=torch.float64
    )
    norms = []
    for _ in range(20):
        held.train_step()
        norms.append(held.evaluate()["parameter_norm"].item())
    assert norms[4] == pytest.approx(logged[1]["parameter_norm"], rel=1e-12)
    assert norms[9:] == pytest.approx([logged[2]["parameter_norm"]] * 11, rel=1e-12)
    assert sources(job("losses-0.1+norm-mem")) == [Job("e1", "baseline", CONFIG, (0, 1))]


def test_a_damaged_run_is_not_followed(followed_runs):
    path = followed_runs / "e1-baseline-add-seed1" / "metrics.jsonl"
    whole = path.read_bytes()
    digit = whole.index(b'"parameter_norm": ') + len('"parameter_norm": ')
    flipped = whole[:digit] + bytes([whole[digit] ^ 1]) + whole[digit + 1 :]
    for data in (b"", whole[: whole.index(b"\n") + 1], flipped):
        path.write_bytes(data)
        with pytest.raises(Damaged, match=r"seed1/metrics\.jsonl: .*damaged: expected .*, found"):
            make_condition(job("norm-as-baseline"), followed_runs)


def test_a_run_to_follow_must_be_there_complete_and_of_the_same_settings(changed_runs):
    with pytest.raises(
        RunError, match=r"e2-losses-0\.1-add-seed0, whose norm .* missing .* `fastent run e2`"
    ):
        make_condition(job("norm-as-losses-0.1"), changed_runs)
    with pytest.raises(RunError, match=r"baseline-add-seed7.* missing or not complete"):
        make_condition(job("norm-as-baseline", (0, 7)), changed_runs)
    path = changed_runs / "e1-baseline-add-seed1" / "config.json"
    record = json.loads(path.read_text())
    del record["config"]["sampling"]  # older than the setting, and no other settings for that
    path.write_text(json.dumps(record))
    make_condition(job("norm-as-baseline"), changed_runs)
    with pytest.raises(RunError, match="other settings"):
        make_condition(
            job("norm-as-baseline", config=dataclasses.replace(CONFIG, weight_decay=0.5)), changed_runs
        )
    path = changed_runs / "e1-baseline-add-seed0" / "metrics.jsonl"
    path.write_text(path.read_text().replace("logit_scale", "other"))
    with pytest.raises(RunError, match=r"holds no logit scale.* measure \"logit_scale\""):
        make_condition(job("logits-as-baseline"), changed_runs)
    (changed_runs / "e1-baseline-add-seed1" / "DONE").unlink()
    with pytest.raises(RunError, match=r"baseline-add-seed1.* missing or not complete"):
        make_condition(job("norm-as-baseline"), changed_runs)


@pytest.mark.parametrize(
    "condition",
    [
        "losses-0.1",
        "logits-0.2+norm-start",
        "norm-start-each",
        "losses-0.1+norm-as-baseline",
        "norm-as-baseline-moments",
        "norm-as-baseline-each",
        "norm-as-baseline-every-step",
        "logits-as-baseline+norm-as-baseline",
    ],
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
    for condition in (
        "losses-0.1+norm-as-baseline",
        "logits-0.2+norm-start-each",
        "norm-as-baseline-each+logits-as-baseline",
        "norm-as-baseline-moments",
    ):
        together = stack(condition, followed_runs, dtype=torch.float64, together=True)
        in_turn = stack(condition, followed_runs, dtype=torch.float64, together=False)
        for _ in range(10):
            torch.testing.assert_close(together.train_step(), in_turn.train_step(), rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    "name",
    ["mixing", "losses", "losses-0.1+", "norm-as-", "norm-start-all", "losses-2", "logits--1", "logits-as-"],
)
def test_an_unknown_condition_is_refused_and_the_known_are_named(name, tmp_path):
    with pytest.raises(RunError):
        make_condition(job(name), tmp_path)
    with pytest.raises(RunError, match=r"called 'losses'; there are baseline, .*norm-start-each"):
        make_condition(job("losses"), tmp_path)


@pytest.mark.parametrize(
    "name",
    ["norm-start+norm-start-each", "norm-as-baseline+norm-mem", "logits-as-baseline+logits-as-norm-mem"],
)
def test_a_norm_or_a_scale_that_would_be_held_twice_is_refused(name, tmp_path):
    with pytest.raises(RunError, match=f"'{name}' holds .* twice: leave one out".replace("+", r"\+")):
        make_condition(job(name), tmp_path)


def test_a_batch_of_one_pair_cannot_be_mixed(tmp_path):
    with pytest.raises(RunError, match="batch_size of at least 2; got 1"):
        make_condition(job("losses-0.1", config=dataclasses.replace(CONFIG, batch_size=1)), tmp_path)


def test_conditions_by_name(tmp_path):
    assert make_condition(job("baseline"), tmp_path) is None
    assert make_condition(job("to-the-end"), tmp_path) is None
    mixed = make_condition(job("logits-0.3"), tmp_path)
    assert isinstance(mixed, Mixing)
    assert mixed.alpha == 0.15
    assert isinstance(make_condition(job("norm-start"), tmp_path), HeldNorm)
    assert isinstance(make_condition(job("losses-0.1+norm-start"), tmp_path), InTurn)
    assert followed("norm-start") == {}
    assert sources(job("norm-as-losses-0.1")) == [Job("e2", "losses-0.1", CONFIG, (0, 1))]
    assert sources(job("norm-as-baseline-each+logits-as-norm-as-baseline")) == [
        Job("e1", "baseline", CONFIG, (0, 1)),
        Job("e3", "norm-as-baseline", CONFIG, (0, 1)),
    ]


def test_every_condition_that_an_experiment_asks_for_is_known_and_follows_only_what_it_asks_for(tmp_path):
    for make in JOBS.values():
        jobs = make(CONFIG, (0, 1, 2, 3, 4, 5))
        names = {each.run_name(seed) for each in jobs for seed in each.seeds}
        assert len(names) == sum(len(each.seeds) for each in jobs)
        for each in jobs:
            if not sources(each):
                make_condition(each, tmp_path)
            for source in sources(each):
                assert {source.run_name(seed) for seed in each.seeds} <= names


def test_a_pool_starts_a_run_that_follows_others_only_once_they_are_over(tmp_path):
    follows = job("norm-as-losses-0.1", (0, 1))
    elsewhere, baseline = (Job("e2", "losses-0.1", CONFIG, (2,)), Job("e1", "baseline", CONFIG, (0, 1)))
    mixed = Job("e2", "losses-0.1", CONFIG, (1, 2))
    sweep = _Sweep([follows, mixed, elsewhere, baseline, baseline], tmp_path, "cpu", False, (), None, Pool(1))
    assert len(sweep.waiting) == 4
    assert sweep._ready() == [mixed]
    sweep.waiting.remove(mixed)
    # Nothing that the first job follows is left.
    assert sweep._ready() == [follows]
    sweep.executor.size = None
    sweep.waiting.append(mixed)
    assert sweep._ready() == [elsewhere, baseline, mixed]


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
