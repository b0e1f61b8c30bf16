"""What is not so in the paper, against the closed forms of the counterexamples."""

import math

import pytest

from fastent.experiments import corrections
from fastent.reference.entropy import entropy_of_eigenvalues


def exact_change(alpha):
    """Both columns are waves, so a cyclic shift scales their variances (1 and 1/4) by |1 - a + a w|^2."""
    slow = 1 - 2 * alpha * (1 - alpha) * (1 - math.cos(2 * math.pi / 64))
    fast = (1 - 2 * alpha) ** 2
    return entropy_of_eigenvalues([0.25 * fast, slow]) - entropy_of_eigenvalues([0.25, 1.0])


def test_mixing_losses_match_the_closed_form_and_are_of_first_order():
    losses = corrections.mixing_losses()
    for loss in losses:
        assert loss.change == pytest.approx(exact_change(loss.alpha), abs=1e-12)
    slopes = [loss.change / loss.alpha for loss in losses]
    assert slopes == pytest.approx([-0.990, -0.939, -0.896, -0.886], abs=1e-3)


def test_constant_rows_score_one_by_the_papers_convention_and_zero_by_ours():
    import torch

    assert corrections.scores(torch.ones(512, 128)) == (1.0, 0.0)


def test_the_papers_convention_depends_on_the_unit_and_ours_does_not():
    matrix = corrections.decaying()
    paper, ours = zip(*(corrections.scores(s * matrix) for s in corrections.SCALES), strict=True)
    assert max(ours) - min(ours) < 1e-12
    assert paper[0] == pytest.approx(ours[0], abs=1e-6)
    assert paper[-1] > 0.999
