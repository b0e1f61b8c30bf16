"""Lemma 4: the effective rank follows the entropy exactly; that it shrinks exponentially is an assumption."""

import numpy as np
import pytest
import torch

import fastent
from fastent.grokking.mathematics.collapse import shrinkage


def test_effective_rank_is_multiplied_by_the_exponential_of_the_change_of_entropy():
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(200, 10, generator=generator)
    before, after = (fastent.spectral_entropy(h * torch.linspace(1, end, 10)) for end in (0.9, 0.3))
    assert after.effective_rank / before.effective_rank == pytest.approx(
        np.exp(after.entropy - before.entropy), rel=1e-14
    )


def test_shrinkage_is_exponential_exactly_when_the_entropy_falls_at_a_steady_rate():
    step = np.arange(0.0, 1001.0, 50.0)
    steady = 4.0 - 2e-3 * step
    found = shrinkage(step, steady, np.exp(steady))
    assert found.slowest == pytest.approx(2e-3)
    assert found.fastest == pytest.approx(2e-3)
    assert found.rising == 0
    assert found.identity_error < 1e-14
    # a fall that slows down to nothing: gamma > 0 throughout, and no rate that serves for all of it
    slowing = 2.0 + 2.0 / (1 + step / 50)
    found = shrinkage(step, slowing, np.exp(slowing))
    assert 0 < found.slowest < 0.15 * found.fastest


def test_on_a_run_the_rate_is_not_bounded_away_from_0(small_run):
    step = small_run.evaluated("step")
    entropy = small_run.evaluated("entropy") * np.log(small_run.config.width)
    found = shrinkage(step, entropy, np.exp(entropy))
    assert found.identity_error < 1e-14
    assert found.rank_end < 0.8 * found.rank_start
    assert found.slowest < 0.2 * found.fastest  # on most runs it is negative: H rises in between
    # r >= 1 ends any exponential decay: at the fastest rate seen it could not go on for longer than this
    assert entropy.max() / found.fastest < step[-1]
