"""Columns that the measures add: against the definitions on small stacks, and of planted networks."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from fastent.entropy import spectral_entropy
from fastent.grokking.train import measures
from fastent.grokking.train.config import TrainConfig
from fastent.grokking.train.loop import train
from fastent.grokking.train.measures import Measures, task_harmonics
from fastent.grokking.train.runs import Job
from fastent.grokking.train.stack import Stack
from fastent.grokking.train.storage import read_rows
from fastent.grokking.train.tasks import make_task, probe_index, split

ALL = ("test_probe", "probe_sizes", "fourier", "progress")
SMALL = TrainConfig(
    modulus=29,
    width=16,
    heads=2,
    feedforward=32,
    probe_size=100,
    batch_size=64,
    evaluate_every=4,
    measures=ALL,
)


def read(out):
    (path,) = out.glob("*/metrics.jsonl")
    return read_rows(path, 0)[0]


def columns(config, seeds=(0, 1), steps=3, together=False):
    stack = Stack(config, seeds, together=together)
    for _ in range(steps):
        stack.train_step()
    return stack, Measures(config)(stack)


def test_no_measures_cost_nothing():
    assert columns(dataclasses.replace(SMALL, measures=()))[1] == {}


def test_entropies_are_those_of_probes_of_test_pairs_of_nested_sizes_and_of_all_pairs():
    stack, found = columns(dataclasses.replace(SMALL, measures=("test_probe", "probe_sizes")))
    names = ["entropy_test", "entropy_64", "entropy_128", "entropy_train", "entropy_all"]
    assert [name for name in found if not name.endswith("_status")] == names
    for s, seed in enumerate(stack.seeds):
        trained, test = split(stack.task, SMALL.train_fraction, seed)
        probes = {
            "entropy_test": probe_index(test, 100, seed, "test"),
            "entropy_64": probe_index(trained, 64, seed, "probe"),
            "entropy_128": probe_index(trained, 128, seed, "probe"),
            "entropy_train": trained,
            "entropy_all": torch.arange(29 * 29),
        }
        for name, pairs in probes.items():
            h = stack.module(seed).represent(stack.task.inputs[pairs])
            assert found[name][s] == pytest.approx(spectral_entropy(h).normalized, abs=1e-6)
            assert found[f"{name}_status"][s] == "ok"
    assert set(probes["entropy_64"].tolist()) < set(probes["entropy_128"].tolist())


def test_scale_of_the_logits_is_their_standard_deviation_over_classes_on_the_training_probe():
    stack, found = columns(dataclasses.replace(SMALL, measures=("logit_scale",)))
    for s, seed in enumerate(stack.seeds):
        trained, _ = split(stack.task, SMALL.train_fraction, seed)
        pairs = stack.task.inputs[probe_index(trained, 100, seed, "probe")]
        logits = stack.module(seed)(pairs).double()
        assert found["logit_scale"][s] == pytest.approx(
            logits.var(1, correction=0).mean().sqrt().item(), rel=1e-5
        )


def test_a_probe_smaller_than_the_width_is_said_to_be_rank_limited():
    config = dataclasses.replace(SMALL, width=64, measures=("probe_sizes",))
    assert columns(config)[1]["entropy_64_status"] == ["rank_limited"] * 2


@pytest.mark.parametrize("task", ["add", "mul", "s5"])
def test_a_seed_has_the_columns_of_its_solo_run(task):
    config = dataclasses.replace(SMALL, task=task, train_fraction=0.1 if task == "s5" else 0.3)
    pair, solo = columns(config, (3, 1)), columns(config, (1,))
    assert {name: column[1] for name, column in pair[1].items()} == {n: c[0] for n, c in solo[1].items()}


def test_a_seed_among_nine_has_the_spectra_of_its_solo_run_to_the_bit():
    config = dataclasses.replace(SMALL, modulus=7, measures=("fourier", "progress"))
    among, solo = columns(config, range(9))[1], [columns(config, (s,))[1] for s in range(9)]
    assert among == {name: [each[name][0] for each in solo] for name in among}


@pytest.mark.parametrize("task", ["add", "mul"])
def test_seeds_that_share_each_launch_have_the_same_columns_to_rounding(task):
    config = dataclasses.replace(SMALL, task=task)
    apart, shared = columns(config), columns(config, together=True)
    for name, column in apart[1].items():
        if isinstance(column[0], str):
            assert shared[1][name] == column
        else:
            assert shared[1][name] == pytest.approx(column, rel=1e-3)


def test_entropy_is_taken_where_it_is_asked_for_and_the_progress_of_what_the_head_gets():
    normed = dataclasses.replace(SMALL, final_norm=True, measures=("test_probe", "progress"))
    before, after = columns(normed), columns(dataclasses.replace(normed, entropy_at="final_norm"))
    for s, seed in enumerate((0, 1)):
        module = before[0].module(seed)
        test = split(before[0].task, SMALL.train_fraction, seed)[1]
        read = module.read(before[0].task.inputs[probe_index(test, 100, seed, "test")])
        for found, h in ((before[1], read), (after[1], module.final_norm(read))):
            assert found["entropy_test"][s] == pytest.approx(spectral_entropy(h).normalized, abs=1e-6)
    for name in ("restricted_loss", "excluded_loss", "key_blocks"):
        assert before[1][name] == after[1][name]


@pytest.mark.parametrize("task", ["add", "mul"])
def test_fourier_columns_are_those_of_the_representations_whose_label_is_in_the_group(task):
    config = dataclasses.replace(SMALL, task=task, measures=("fourier",))
    stack, found = columns(config)
    group = task_harmonics(config)
    for s, seed in enumerate(stack.seeds):
        trained, test = split(stack.task, 0.3, seed)
        module = stack.module(seed)

        def inside(pairs, module=module):
            pairs = pairs[torch.from_numpy(group.members)[stack.task.labels[pairs]]]
            return module.represent(stack.task.inputs[pairs]).detach().numpy(), stack.task.labels[
                pairs
            ].numpy()

        h, labels = inside(probe_index(trained, 100, seed, "probe"))
        r = np.corrcoef(h.T, group.basis[labels].T)[: h.shape[1], h.shape[1] :]
        assert found["alignment"][s] == pytest.approx(abs(r).max(), abs=1e-5)
        assert found["alignment_null_mean"][s] <= found["alignment_null"][s] < 1
        vectors = np.linalg.eigh(np.cov(h.T.astype(np.float64)))[1][:, -10:]
        along = torch.from_numpy(h - h.mean(0)).double() @ torch.from_numpy(vectors)
        characters, block = torch.from_numpy(group.basis[labels]), torch.from_numpy(group.block)
        expected = float(measures.leading_alignment(along[None], characters[None], block))
        assert found["leading_alignment"][s] == pytest.approx(expected, abs=1e-4)
        assert 0 < found["leading_alignment_null"][s] < 1
        h, labels = inside(test)
        means = np.stack([h[labels == c].mean(0) if c in labels else h.mean(0) for c in range(29)])
        energy = np.bincount(group.block, ((group.basis.T @ means) ** 2).sum(1))
        shares = np.sort(energy / energy.sum())[::-1]
        assert found["top_share"][s] == pytest.approx(shares[:5].sum(), rel=1e-4)
        assert found["frequencies"][s] == pytest.approx(1 / (shares**2).sum(), rel=1e-4)
        between = sum((labels == c).sum() * ((means[c] - h.mean(0)) ** 2).sum() for c in range(29))
        assert found["label_share"][s] == pytest.approx(between / ((h - h.mean(0)) ** 2).sum(), rel=1e-4)


def test_s5_has_shares_of_six_representations_and_no_alignment():
    config = dataclasses.replace(SMALL, task="s5", train_fraction=0.1, measures=("fourier",))
    _, found = columns(config)
    assert "alignment" not in found
    shares = [found[f"isotypic_{name}"] for name in ("41", "32", "311", "221", "2111", "11111")]
    assert np.sum(shares, axis=0) == pytest.approx([1, 1], abs=1e-12)
    # Means of nearly unrelated representations: shares near the squared dimensions' of 119.
    assert found["isotypic_311"][0] == pytest.approx(36 / 119, abs=0.1)


def test_tokens_that_are_images_are_no_functions_of_the_group_and_have_no_gini():
    config = dataclasses.replace(SMALL, task="s5", train_fraction=0.1, measures=("progress",))
    images = dataclasses.replace(config, operand_tokens="images")
    one, five = (columns(each, (0,), steps=0)[1].keys() for each in (config, images))
    assert one - five == {"embedding_gini"}


class PlantedStack:
    """A network that adds by the rule of Nanda et al.: waves of a few frequencies, read out by the same."""

    def __init__(self, config, frequencies):
        self.config = config
        self.task = make_task(config)
        self.seeds = (0,)
        self.head_reads_representation = True
        p = config.modulus
        angles = 2 * math.pi / p * torch.arange(p).unsqueeze(1) * torch.tensor(frequencies)
        self.waves = torch.cat([angles.cos(), angles.sin()], 1)
        self.parameters = {
            "head.weight": 30 * self.waves,
            "head.bias": torch.zeros(p),
            "tokens.weight": self.waves,
        }

    def represent(self, pairs, *, head=False):
        return self.waves[self.task.labels[pairs]].unsqueeze(0)

    def parameter(self, name):
        return self.parameters[name].unsqueeze(0)


def test_columns_of_a_network_that_adds_by_five_waves():
    config = dataclasses.replace(SMALL, modulus=97, train_fraction=0.3, probe_size=512)
    found = {k: v[0] for k, v in Measures(config)(PlantedStack(config, [4, 8, 15, 16, 23])).items()}
    assert found["alignment"] == pytest.approx(1.0, abs=1e-6)
    assert found["alignment_null"] < 0.25
    assert found["label_share"] == pytest.approx(1.0, abs=1e-6)
    assert found["top_share"] == pytest.approx(1.0, abs=1e-6)
    assert found["frequencies"] == pytest.approx(5.0, abs=1e-4)
    assert found["key_blocks"] == "4 8 15 16 23"
    assert found["restricted_loss"] < 1e-6
    assert found["excluded_loss"] == pytest.approx(math.log(97), rel=1e-5)
    assert found["embedding_gini"] == pytest.approx(1 - 5 / 48, abs=1e-4)
    assert found["entropy_all"] == pytest.approx(1.0, abs=1e-9)


def test_embedding_gini_of_two_tables_is_their_mean():
    config = dataclasses.replace(SMALL, separate_tokens=True, measures=("progress",))
    stack, found = columns(config)
    group, tokens = task_harmonics(config), stack.parameter("tokens.weight")
    basis, block = torch.from_numpy(group.basis), torch.from_numpy(group.block)
    halves = [measures.gini(measures.block_energy(t, basis, block).sqrt()) for t in tokens.split(29, 1)]
    assert found["embedding_gini"] == pytest.approx(((halves[0] + halves[1]) / 2).tolist(), rel=1e-12)


def test_rows_of_a_run_hold_the_columns_and_its_training_is_the_one_without(tmp_path):
    config = dataclasses.replace(SMALL, max_steps=8)
    train(Job("e1", "baseline", config, (0,)), tmp_path / "with")
    train(Job("e1", "baseline", dataclasses.replace(config, measures=()), (0,)), tmp_path / "without")
    rows, plain = read(tmp_path / "with"), read(tmp_path / "without")
    assert [row["step"] for row in rows] == [0, 4, 8]
    assert [{k: row[k] for k in plain[0]} for row in rows] == plain
    further = Measures(config)(Stack(config, (0,)))
    assert set(rows[0]) - set(plain[0]) == set(further)
    assert {k: rows[0][k] for k in further} == {k: v[0] for k, v in further.items()}
