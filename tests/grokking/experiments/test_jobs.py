"""The runs that E6, E7 and E8 ask for, and that the relabelled tasks are one problem."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from fastent.grokking.experiments.jobs import FEW_PAIRS, FEWER, JOBS, MLPS, controls, planned
from fastent.grokking.train.conditions import make_condition, sources
from fastent.grokking.train.config import TrainConfig, preset
from fastent.grokking.train.loop import train
from fastent.grokking.train.models import plain_model
from fastent.grokking.train.storage import read_rows
from fastent.grokking.train.tasks import discrete_logarithm, make_task

P = 97


def table(task, **changes):
    """Label by first and second operand."""
    found = make_task(TrainConfig(task=task, **changes))
    return found.labels.numpy().reshape(found.operands, found.operands)


def test_products_without_zero_are_sums_of_logarithms_number_for_number():
    log = discrete_logarithm(P)[1:]
    renamed = np.empty((96, 96), dtype=np.int64)
    renamed[np.ix_(log, log)] = log[table("mul_nonzero")]
    np.testing.assert_array_equal(renamed, table("add", modulus=96))


def test_differences_are_sums_with_the_second_operand_renamed_and_inputs_its_tokens_alone():
    negative = -np.arange(P) % P
    np.testing.assert_array_equal(table("sub")[:, negative], table("add"))
    own = make_task(TrainConfig(task="sub", separate_tokens=True))
    assert set(own.inputs[:, 0].tolist()) & set(own.inputs[:, 1].tolist()) == set()


def test_differences_with_shared_tokens_are_no_relabelled_sums():
    # Sums are symmetric whatever one name for an operand's tokens is; differences are not.
    assert (table("add") == table("add").T).all()
    assert (table("sub") == table("sub").T).mean() < 0.02


@pytest.mark.parametrize("model", ["transformer", "mlp"])
def test_a_network_with_renamed_rows_gives_the_same_answers_bit_for_bit(model):
    # Of the sum on (a, b), and of the difference on (a, -b) with the second table's rows renamed.
    config = TrainConfig(task="add", modulus=11, separate_tokens=True, model=model, width=16, hidden=(16,))
    torch.manual_seed(0)
    one, other = plain_model(config, make_task(config)), plain_model(config, make_task(config))
    negative = -torch.arange(11) % 11
    state = one.state_dict()
    state["tokens.weight"] = torch.cat([state["tokens.weight"][:11], state["tokens.weight"][11:][negative]])
    other.load_state_dict(state)
    difference = make_task(dataclasses.replace(config, task="sub"))
    renamed = difference.inputs.view(11, 11, 2)[:, negative].reshape(-1, 2)
    with torch.no_grad():
        assert torch.equal(one(make_task(config).inputs), other(renamed))
    assert torch.equal(make_task(config).labels, difference.labels.view(11, 11)[:, negative].reshape(-1))


def test_the_two_of_a_control_pair_differ_in_the_task_and_what_renames_it_alone():
    product, total, difference, own_total = controls(P)
    assert (product.changes, total.changes) == ({"task": "mul_nonzero"}, {"task": "add", "modulus": 96})
    assert {**difference.changes, "task": "add"} == own_total.changes


@pytest.mark.parametrize("name", ["e6", "e7", "e8"])
def test_jobs_have_folders_of_their_own_known_conditions_and_the_measures_they_analyse(name, tmp_path):
    jobs = JOBS[name](preset("paper"), range(10))
    names = [job.run_name(seed) for job in jobs for seed in job.seeds]
    assert len(set(names)) == len(names)
    assert jobs[0] == JOBS["e1"](preset("paper"), range(10))[0]
    for job in jobs:
        assert make_condition(job, tmp_path) is None
        first = job.experiment == "e1"
        probes, logits = (("test_probe", "probe_sizes"), ("logit_scale",)) if first else ((), ())
        assert job.config.measures == (*probes, "fourier", "progress", *logits)


def test_measures_asked_for_are_kept_and_those_of_the_experiment_added():
    (job,) = JOBS["e8"](preset("paper", measures=("progress",)), (0,))
    assert job.config.measures == ("progress", "test_probe", "probe_sizes", "fourier", "logit_scale")
    assert JOBS["e2"](preset("paper"), (0,))[1].config.measures == ("logit_scale",)


def test_both_models_have_eighty_thousand_steps_on_the_same_few_pairs():
    jobs = JOBS["e7"](preset("paper"), range(10))[1 : 1 + len(FEW_PAIRS)]
    asked = [(job.config.model, job.config.train_fraction) for job in jobs]
    assert sorted(asked) == sorted(itertools.product(("mlp", "transformer"), (0.2, 0.3, 0.4, 0.5, 0.6)))
    assert asked[:2] == [("mlp", 0.2), ("transformer", 0.2)]
    assert {(job.config.modulus, job.config.max_steps, len(job.seeds)) for job in jobs} == {
        (41, 80_000, FEWER)
    }


def test_few_pairs_are_of_residues_and_s5_has_none():
    asked = {job.condition for job in JOBS["e7"](preset("paper", task="s5"), (0,))}
    assert asked == {"baseline", *(mlp.condition for mlp in MLPS)}


def test_e6_has_s5_both_ways_whichever_is_given():
    jobs = JOBS["e6"](preset("paper", task="s5", operand_tokens="images"), (0,))
    written = {(job.experiment, job.condition, job.config.task): job.config.operand_tokens for job in jobs}
    assert {key for key, tokens in written.items() if tokens == "images"} == {
        ("e1", "baseline", "s5"), ("e6", "with-images", "s5"),
    }  # fmt: skip


def test_mlps_have_eighty_thousand_steps_and_differ_from_each_other():
    jobs = JOBS["e7"](preset("paper"), range(10))[1 + len(FEW_PAIRS) :]
    assert [len(job.seeds) for job in jobs[:2]] == [FEWER, FEWER]
    assert {job.config.max_steps for job in jobs} == {80_000}
    assert [job.condition for job in jobs] == [mlp.condition for mlp in MLPS]
    assert len({tuple(mlp.changes.items()) for mlp in MLPS}) == len(MLPS)


def test_seeds_of_e6_are_the_papers():
    asked = {
        (job.condition, job.config.task): len(job.seeds) for job in JOBS["e6"](preset("paper"), range(10))
    }
    assert asked["baseline", "s5"] == asked["with-images", "s5"] == 10
    assert asked["baseline", "mul"] == asked["baseline", "sub"] == 5


def test_thirty_seeds_are_the_baselines_and_the_controls_and_ten_the_shams():
    count = {job.condition: len(job.seeds) for job in JOBS["e3"](preset("paper"), range(30))}
    assert {name for name, n in count.items() if n == 30} == {"baseline", "losses-0.1+norm-as-baseline"}
    assert {name for name, n in count.items() if n == 10} == {"norm-as-baseline", "losses-0.1"}
    assert set(count.values()) == {30, 10, FEWER}
    # The first that a machine makes after what it follows.
    assert list(count)[:3] == ["baseline", "norm-as-baseline", "losses-0.1+norm-as-baseline"]


def test_the_sham_alone_is_the_part_of_e3_that_holds_the_baselines_norm():
    asked = JOBS["sham"](preset("quick"), (0, 1, 2))
    assert [job.condition for job in asked] == [
        "baseline",
        "norm-as-baseline",
        "losses-0.1+norm-as-baseline",
        "norm-as-baseline-every-step",
        "norm-as-baseline-each",
        "norm-as-baseline-moments",
        "losses-0.4+norm-as-baseline",
    ]
    assert set(asked) <= set(JOBS["e3"](preset("quick"), (0, 1, 2)))


@pytest.mark.parametrize("name", ["e2", "e3", "sham"])
def test_runs_come_after_those_that_they_follow(name):
    made = set()
    for job in JOBS[name](preset("paper"), range(12)):
        for source in sources(job):
            assert {source.run_name(seed) for seed in job.seeds} <= made
        made |= {job.run_name(seed) for seed in job.seeds}


def test_a_norm_can_be_followed_whatever_is_measured_beside(tmp_path):
    small = preset("paper", modulus=11, width=8, heads=1, feedforward=8, probe_size=16, max_steps=2)
    base, followed, *_ = JOBS["e3"](dataclasses.replace(small, evaluate_every=1), (0,))
    follows = dataclasses.replace(followed, experiment="e3", condition="norm-as-baseline")
    assert base.config.measures != follows.config.measures
    train(base, tmp_path)
    train(follows, tmp_path)
    norms = [
        [row["parameter_norm"] for row in read_rows(tmp_path / job.run_name(0) / "metrics.jsonl", 0)[0]]
        for job in (base, follows)
    ]
    assert norms[1] == pytest.approx(norms[0], rel=1e-6)


@pytest.mark.parametrize("name", ["e6", "e7", "choices"])
def test_every_kind_of_run_can_be_trained(name, tmp_path):
    small = preset(
        "paper", modulus=11, width=8, heads=1, feedforward=8, hidden=(8, 8), probe_size=16, max_steps=2
    )
    for job in JOBS[name](small, (0,)):
        cheap = dataclasses.replace(job.config, max_steps=2, evaluate_every=2)
        if job.config.task == "s5":
            cheap = dataclasses.replace(cheap, train_fraction=0.02)
        train(dataclasses.replace(job, config=cheap), tmp_path)
        rows, _ = read_rows(tmp_path / job.run_name(0) / "metrics.jsonl", 0)
        assert [row["step"] for row in rows] == [0, 2]
        if "fourier" in cheap.measures:
            assert rows[1]["restricted_loss"] > 0
            assert 0 < rows[1]["label_share"] <= 1
        if job.experiment == "e1":
            assert rows[1]["entropy_all_status"] in ("ok", "rank_limited")


def test_names_carry_what_is_changed_and_runs_that_follow_others_find_them_under_it():
    config = preset("quick", task="s5", learning_rate=5e-4, measures=("fourier",))
    jobs = planned("e3", config, "quick", (0, 1))
    names = {job.run_name(seed) for job in jobs for seed in job.seeds}
    assert {job.changed for job in jobs} == {
        ("learning_rate",)
    }  # S5 has its own share of the pairs, asked for or not
    assert "e1-baseline-s5-learning_rate=0.0005-seed0" in names
    followed = {each.run_name(seed) for job in jobs for each in sources(job) for seed in job.seeds}
    assert followed
    assert followed <= names
    assert {job.changed for job in planned("e3", preset("quick"), "quick", (0,))} == {()}
