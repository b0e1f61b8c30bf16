import itertools

import numpy as np
import pytest
import torch

from fastent.grokking.train.config import TrainConfig
from fastent.grokking.train.tasks import batch_index, generator, make_task, probe_index, split


@pytest.mark.parametrize(
    ("task", "law"),
    [("add", lambda a, b: a + b), ("sub", lambda a, b: a - b), ("mul", lambda a, b: a * b)],
)
def test_every_pair_of_a_modular_task_has_the_class_of_its_result(task, law):
    data = make_task(TrainConfig(task=task, modulus=7))
    pairs = list(itertools.product(range(7), repeat=2))
    assert data.inputs.tolist() == [list(pair) for pair in pairs]
    assert data.labels.tolist() == [law(a, b) % 7 for a, b in pairs]
    assert (data.operands, data.vocabulary, data.classes, data.name) == (7, 7, 7, f"{task} mod 7")


def test_multiplication_without_zero_is_addition_mod_p_minus_1_under_discrete_logarithms():
    p, root = 11, 2
    logarithm = {pow(root, k, p): k for k in range(p - 1)}
    data = make_task(TrainConfig(task="mul_nonzero", modulus=p))
    assert len(data.labels) == (p - 1) ** 2
    for (a, b), label in zip(data.inputs.tolist(), data.labels.tolist(), strict=True):
        assert (logarithm[a + 1] + logarithm[b + 1]) % (p - 1) == logarithm[label + 1]


def test_multiplication_without_zero_needs_a_prime_modulus():
    with pytest.raises(ValueError, match="prime modulus of at least 3, or products are 0; got 9"):
        make_task(TrainConfig(task="mul_nonzero", modulus=9))


def test_s5_composes_right_to_left_and_is_a_group_of_120_with_94_percent_of_pairs_not_commuting():
    data = make_task(TrainConfig(task="s5"))
    elements = list(itertools.permutations(range(5)))
    table = data.labels.view(120, 120)
    rng = np.random.default_rng(0)
    for a, b in rng.integers(0, 120, (200, 2)):
        assert elements[table[a, b]] == tuple(elements[a][elements[b][i]] for i in range(5))
    for rows in (table, table.T):  # a Latin square
        assert (rows.sort(1).values == torch.arange(120)).all()
    a, b, c = torch.from_numpy(rng.integers(0, 120, (3, 500)))
    assert torch.equal(table[table[a, b], c], table[a, table[b, c]])
    # The number of commuting pairs is |G| times the number of conjugacy classes, 7.
    assert (table == table.T).sum() == 120 * 7
    assert round(float((table != table.T).double().mean()), 2) == 0.94


@pytest.mark.parametrize("separate", [False, True])
def test_s5_as_images_is_the_same_pairs_written_as_what_both_permutations_make_of_1_to_5(separate):
    one = make_task(TrainConfig(task="s5"))
    data = make_task(TrainConfig(task="s5", operand_tokens="images", separate_tokens=separate))
    elements = list(itertools.permutations(range(5)))
    assert torch.equal(data.labels, one.labels)
    assert (data.operands, data.tokens, data.vocabulary, data.classes) == (120, 5, 10 if separate else 5, 120)
    for (a, b), images in zip(one.inputs[::97].tolist(), data.inputs[::97].tolist(), strict=True):
        assert tuple(images[:5]) == elements[a]
        assert tuple(token - 5 * separate for token in images[5:]) == elements[b]


def test_separate_tokens_make_subtraction_the_same_problem_as_addition():
    add = make_task(TrainConfig(task="add", modulus=7, separate_tokens=True))
    sub = make_task(TrainConfig(task="sub", modulus=7, separate_tokens=True))
    assert add.vocabulary == 14
    assert set(add.inputs[:, 0].tolist()).isdisjoint(add.inputs[:, 1].tolist())
    relabelled = add.inputs.clone()
    relabelled[:, 1] = 7 + (7 - (add.inputs[:, 1] - 7)) % 7
    of_pair = {
        tuple(pair): label for pair, label in zip(sub.inputs.tolist(), sub.labels.tolist(), strict=True)
    }
    assert [of_pair[tuple(pair)] for pair in relabelled.tolist()] == add.labels.tolist()


def test_a_split_is_a_partition_of_its_size_fixed_by_its_seed():
    task = make_task(TrainConfig())
    train, test = split(task, 0.3, 5)
    assert len(train) == round(0.3 * 97**2)
    assert sorted(train.tolist() + test.tolist()) == list(range(97**2))
    assert torch.equal(train, split(task, 0.3, 5)[0])
    other = split(task, 0.3, 6)[0]
    # Two independent subsets of share 0.3 have 0.09 of all pairs in common (sd 0.002).
    common = len(set(train.tolist()) & set(other.tolist())) / 97**2
    assert 0.08 < common < 0.10


def test_a_split_with_an_empty_side_is_refused():
    with pytest.raises(ValueError, match="leaves 0 of 4 pairs to train on"):
        split(make_task(TrainConfig(modulus=2)), 0.1, 0)


def test_probes_are_fixed_members_of_their_set_without_repetition():
    index = torch.arange(1000, 2000)
    probe = probe_index(index, 512, 3, "probe")
    assert len(set(probe.tolist())) == 512
    assert set(probe.tolist()) <= set(index.tolist())
    assert torch.equal(probe, probe_index(index, 512, 3, "probe"))
    assert not torch.equal(probe, probe_index(index, 512, 4, "probe"))
    assert torch.equal(probe_index(index, 1000, 3, "probe"), index)


@pytest.mark.parametrize(("n_train", "batch_size"), [(53, 16), (48, 16), (10, 16), (1, 4)])
def test_batches_cut_shuffled_passes_so_each_pass_uses_every_pair_once(n_train, batch_size):
    stream = np.concatenate([batch_index(7, step, n_train, batch_size) for step in range(40)])
    passes = [stream[i : i + n_train] for i in range(0, len(stream) - n_train + 1, n_train)]
    assert all(sorted(one) == list(range(n_train)) for one in passes)
    if n_train > 20:
        assert len({tuple(one) for one in passes}) == len(passes)


def test_a_batch_is_a_function_of_seed_and_step_alone():
    forward = [batch_index(7, step, 100, 32) for step in range(20)]
    backward = [batch_index(7, step, 100, 32) for step in reversed(range(20))][::-1]
    assert all((a == b).all() for a, b in zip(forward, backward, strict=True))
    assert not (forward[0] == batch_index(8, 0, 100, 32)).all()


def test_batches_with_replacement_draw_every_pair_equally_often_whatever_was_drawn_before():
    n_train, size = 50, 64
    batches = [batch_index(7, step, n_train, size, "replacement") for step in range(400)]
    assert all((batch_index(7, k, n_train, size, "replacement") == batches[k]).all() for k in (399, 3, 200))
    counts = np.bincount(np.concatenate(batches), minlength=n_train)
    # Chi squared of 49 degrees of freedom exceeds 94 once in 10,000; shuffled passes would have it near 0.
    assert 20 < ((counts - 512) ** 2 / 512).sum() < 94
    # Two draws of one batch are the same pair as often as chance has it.
    same = np.mean([len(set(batch)) for batch in batches])
    assert same == pytest.approx(n_train * (1 - (1 - 1 / n_train) ** size), abs=0.5)


def test_the_first_batch_of_seed_0_is_what_it_always_was():
    # Recorded runs are compared with reruns: the order of the data must outlive versions of NumPy.
    assert batch_index(0, 0, 2823, 512)[:6].tolist() == [793, 2150, 270, 1289, 945, 470]
    assert split(make_task(TrainConfig()), 0.3, 0)[0][:6].tolist() == [4, 5, 8, 14, 17, 19]


def test_purposes_and_turns_have_streams_of_their_own():
    words = {
        tuple(generator(seed, purpose, turn).random_raw(2).tolist())
        for seed in (0, 1)
        for purpose in ("split", "batches")
        for turn in (0, 1)
    }
    assert len(words) == 8


def test_a_seed_outside_64_bits_is_refused():
    with pytest.raises(ValueError, match="got -1"):
        generator(-1, "split")
