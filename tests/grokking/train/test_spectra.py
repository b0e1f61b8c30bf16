"""Alignment, shares and progress measures of planted representations."""

import math

import numpy as np
import pytest
import torch

from fastent.grokking.train import measures
from fastent.grokking.train.config import TrainConfig
from fastent.grokking.train.measures import task_harmonics

P = 97


def harmonics(task="add"):
    found = task_harmonics(TrainConfig(task=task))
    return torch.from_numpy(found.basis), torch.from_numpy(found.block)


def waves(labels, frequencies, phase=0.0):
    """Cosines and sines of the frequencies at the labels, side by side: (len(labels), 2 k)."""
    angles = 2 * math.pi / P * labels.double().unsqueeze(1) * torch.tensor(frequencies) + phase
    return torch.cat([angles.cos(), angles.sin()], 1)


@pytest.fixture
def labels():
    return torch.from_numpy(np.random.default_rng(0).integers(0, P, 512))


def test_alignment_of_cosines_is_one_and_of_a_constant_zero(labels):
    basis, _ = harmonics()
    h = torch.stack([waves(labels, [3, 17]), torch.full((512, 4), 0.1)])
    characters = basis[labels].expand(2, -1, -1)
    assert measures.alignment(h, characters).tolist() == pytest.approx([1.0, 0.0], abs=1e-14)


def test_alignment_is_the_largest_pearson_correlation(labels):
    basis, _ = harmonics()
    h = np.random.default_rng(1).standard_normal((512, 5)) + 3
    expected = abs(np.corrcoef(h.T, basis[labels].numpy().T)[:5, 5:]).max()
    found = measures.alignment(torch.from_numpy(h).unsqueeze(0), basis[labels].unsqueeze(0))
    assert float(found) == pytest.approx(expected, rel=1e-12)


def test_leading_alignment_of_waves_is_one_whatever_their_phase_and_the_basis():
    # Every label five times, so that frequencies are orthogonal on the rows; amplitudes tell them apart.
    basis, block = harmonics()
    labels = torch.arange(P).repeat(5)
    sizes = torch.tensor([5.0, 4, 3, 2, 1]).repeat(2)
    turned = torch.linalg.qr(torch.from_numpy(np.random.default_rng(4).standard_normal((16, 10)))).Q.T
    h = torch.stack([waves(labels, [3, 17, 20, 30, 44], phase) * sizes @ turned + 2 for phase in (0.0, 0.3)])
    characters = basis[labels].expand(2, -1, -1)
    leading = measures.leading_projections(h, 10)
    assert leading.square().sum(1)[0].tolist() == pytest.approx(
        [485 / 2 * a**2 for a in (1, 1, 2, 2, 3, 3, 4, 4, 5, 5)], rel=1e-9
    )
    assert measures.leading_alignment(leading, characters, block).tolist() == pytest.approx([1.0] * 2)
    # One more eigenvector than there are waves has nothing along it: ten of eleven are aligned.
    flat = torch.nn.functional.pad(leading, (1, 0))
    assert measures.leading_alignment(flat, characters, block).tolist() == pytest.approx([10 / 11] * 2)


def test_leading_alignment_is_the_largest_multiple_correlation_with_a_frequency_averaged(labels):
    basis, block = harmonics()
    x = np.random.default_rng(5).standard_normal((512, 3))
    characters = basis[labels].numpy()
    expected = []
    for column in x.T - x.mean(0)[:, None]:
        found = []
        for frequency in range(48):
            pair = characters[:, (block == frequency).numpy()]
            pair = pair - pair.mean(0)
            fitted = pair @ np.linalg.lstsq(pair, column, rcond=None)[0]
            found.append(np.linalg.norm(fitted) / np.linalg.norm(column))
        expected.append(max(found))
    found = measures.leading_alignment(torch.from_numpy(x)[None], basis[labels][None], block)
    assert float(found) == pytest.approx(np.mean(expected), rel=1e-9)


def test_leading_alignment_of_noise_is_that_of_chance(labels):
    # The largest of 48 squared correlations, each exponential with mean 2 / 512: 2 (log 48 + 0.577) / 512.
    basis, block = harmonics()
    h = torch.from_numpy(np.random.default_rng(6).standard_normal((1, 512, 128)))
    found = measures.leading_alignment(measures.leading_projections(h, 10), basis[labels][None], block)
    assert float(found) == pytest.approx(math.sqrt(2 * (math.log(48) + 0.577) / 512), rel=0.1)


def test_alignment_null_of_random_representations_is_about_a_fifth(labels):
    # 128 * 96 correlations of standard deviation 1 / sqrt(512): the largest is near 4.1 of them.
    rng = np.random.default_rng(2)
    basis, _ = harmonics()
    h = torch.from_numpy(rng.standard_normal((1, 512, 128)))
    orders = torch.from_numpy(np.stack([[rng.permutation(512) for _ in range(19)]]))
    null = measures.alignment_null(h, basis[labels].unsqueeze(0), orders)
    assert null.shape == (19, 1)
    assert float(null.mean()) == pytest.approx(0.18, abs=0.01)
    assert 0.15 < float(null.min()) < float(null.max()) < 0.24


def test_alignment_null_of_an_aligned_representation_is_that_of_chance(labels):
    rng = np.random.default_rng(3)
    basis, _ = harmonics()
    orders = torch.from_numpy(np.stack([[rng.permutation(512) for _ in range(19)]]))
    h = waves(labels, list(range(1, 49))).unsqueeze(0)
    assert float(measures.alignment_null(h, basis[labels].unsqueeze(0), orders).max()) < 0.24
    identity = torch.arange(512).view(1, 1, 512)
    assert float(measures.alignment_null(h, basis[labels].unsqueeze(0), identity)) == pytest.approx(1.0)


def test_label_means_and_counts_match_a_loop_and_a_missing_label_gets_the_mean():
    h = torch.arange(24, dtype=torch.float64).view(2, 4, 3)
    labels = torch.tensor([[0, 2, 2, 0], [2, 2, 2, 1]])
    means, counts = measures.label_means(h, labels, 3)
    assert counts.tolist() == [[2, 0, 2], [0, 1, 3]]
    assert means[0].tolist() == [[4.5, 5.5, 6.5], [4.5, 5.5, 6.5], [4.5, 5.5, 6.5]]
    assert means[1, 1].tolist() == h[1, 3].tolist()
    assert means[1, 2].tolist() == h[1, :3].mean(0).tolist()


def test_between_share_is_one_without_spread_inside_labels_and_near_its_expectation_for_noise(labels):
    noise = torch.from_numpy(np.random.default_rng(4).standard_normal((512, 64)))
    h = torch.stack([waves(labels, [5] * 32), noise])
    both = labels.expand(2, -1)
    means, counts = measures.label_means(h, both, P)
    share = measures.between_share(h, means, counts)
    assert float(share[0]) == pytest.approx(1.0, abs=1e-12)
    assert float(share[1]) == pytest.approx((int((counts[1] > 0).sum()) - 1) / 511, rel=0.05)


def test_spectrum_of_planted_frequencies_has_their_squared_amplitudes_whatever_the_phase():
    basis, block = harmonics()
    amplitudes = torch.tensor([1.0, 2.0, 1.0, 2.0]).double()
    means = (waves(torch.arange(P), [3, 17], phase=0.4) * amplitudes).unsqueeze(0) + 7
    shares = measures.label_spectrum(means, basis, block)
    assert float(shares[0, 2]) == pytest.approx(0.2, abs=1e-12)
    assert float(shares[0, 16]) == pytest.approx(0.8, abs=1e-12)
    assert float(shares.sum()) == pytest.approx(1.0, abs=1e-12)
    assert float(measures.participation(shares)) == pytest.approx(1 / (0.2**2 + 0.8**2), rel=1e-12)
    assert measures.strongest(shares, 2).tolist() == [[2, 16]]


def test_isotypic_energies_add_up_to_the_energy_of_what_differs_between_labels():
    basis, block = harmonics("s5")
    f = torch.from_numpy(np.random.default_rng(5).standard_normal((1, 120, 6)))
    energy = measures.block_energy(f, basis, block)
    assert float(energy.sum()) == pytest.approx(
        float((f - f.mean(1, keepdim=True)).square().sum()), rel=1e-12
    )


def losses(h_pairs, pair_labels, weight, bias, train, keys):
    basis, block = harmonics()
    means, counts = measures.label_means(h_pairs.unsqueeze(0), pair_labels.unsqueeze(0), P)
    restricted, excluded, key = measures.restricted_and_excluded_loss(
        *(weight.unsqueeze(0), bias.unsqueeze(0), means, counts),
        *(h_pairs[train].unsqueeze(0), pair_labels[train].unsqueeze(0)),
        basis=basis,
        block=block,
        keys=keys,
    )
    return float(restricted), float(excluded), key.tolist()[0]


def test_a_network_of_the_key_frequencies_alone_loses_nothing_restricted_and_everything_excluded():
    pairs = torch.cartesian_prod(torch.arange(P), torch.arange(P)).sum(1) % P
    frequencies = [3, 9, 17, 30, 44]
    weight, bias = waves(torch.arange(P), frequencies), torch.zeros(P).double()
    h = waves(pairs, frequencies)
    full = float(torch.nn.functional.cross_entropy(h @ weight.T + bias, pairs))
    restricted, excluded, key = losses(h, pairs, weight, bias, torch.arange(0, 9409, 3), 5)
    assert restricted == pytest.approx(full, rel=1e-12)
    assert excluded == pytest.approx(math.log(P), rel=1e-12)
    assert key == [k - 1 for k in frequencies]


def test_what_a_network_knows_of_single_pairs_is_all_excluded_and_nothing_restricted():
    # Memorised: each pair of a few has its own coordinate, far above the waves of one frequency.
    pairs = torch.cartesian_prod(torch.arange(P), torch.arange(P)).sum(1) % P
    train = torch.arange(0, 9409, 97 * 4 + 1)
    memory = torch.zeros(9409, P).double()
    memory[train, pairs[train]] = 40.0
    h = torch.cat([0.01 * waves(pairs, [6]), memory], 1)
    weight = torch.cat([waves(torch.arange(P), [6]), torch.eye(P).double()], 1)
    restricted, excluded, _ = losses(h, pairs, weight, torch.zeros(P).double(), train, 1)
    assert excluded < 1e-12
    assert restricted == pytest.approx(math.log(P), rel=0.02)


def test_losses_are_those_of_logits_projected_over_all_pairs_of_operands():
    # The definition itself: project on cos w(a + b) and sin w(a + b) as functions of (a, b).
    rng = np.random.default_rng(6)
    pairs = torch.cartesian_prod(torch.arange(P), torch.arange(P)).sum(1) % P
    h = torch.from_numpy(rng.standard_normal((9409, 8))) + waves(pairs, [2, 5, 11, 40])
    weight, bias = torch.from_numpy(rng.standard_normal((P, 8))), torch.from_numpy(rng.standard_normal(P))
    train = torch.arange(0, 9409, 4)
    restricted, excluded, key = losses(h, pairs, weight, bias, train, 3)
    logits = h @ weight.T + bias
    two_dimensional = waves(pairs, [k + 1 for k in key])
    part = two_dimensional @ torch.linalg.lstsq(two_dimensional, logits).solution
    ablated = logits.mean(0) + part
    assert restricted == pytest.approx(float(torch.nn.functional.cross_entropy(ablated, pairs)), rel=1e-10)
    rest = (logits - part)[train]
    assert excluded == pytest.approx(float(torch.nn.functional.cross_entropy(rest, pairs[train])), rel=1e-10)


def test_gini_is_zero_for_equal_values_and_one_less_a_share_for_a_single_one():
    values = torch.tensor([[2.0, 2.0, 2.0, 2.0], [0.0, 0.0, 3.0, 0.0], [1.0, 2.0, 3.0, 4.0]])
    # The last: mean absolute difference 1.25 over twice the mean 2.5.
    assert measures.gini(values).tolist() == pytest.approx([0.0, 0.75, 0.25], abs=1e-15)
