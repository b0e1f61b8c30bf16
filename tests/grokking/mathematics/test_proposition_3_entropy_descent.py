"""Proposition 3: to first order a step changes entropy by minus a weighted covariance; alignment is measured."""

import numpy as np
import pytest

from fastent.grokking.mathematics.checks import entropy_of
from fastent.grokking.mathematics.collapse import PHASES, collapse_span, descent
from fastent.reference.perturbation import alignment, entropy_change, gradient_matrix, relative_growth


def test_change_of_entropy_is_minus_the_covariance_of_log_p_and_growth():
    rng = np.random.default_rng(0)
    for d in (2, 6, 20):
        c, e = (rng.standard_normal((d, d)) for _ in range(2))
        c, e = c @ c.T, (e + e.T) / 10
        found = alignment(c, e)
        assert found.change == pytest.approx(entropy_change(c, e), rel=1e-10, abs=1e-14)
        product = -found.correlation * found.spread_log_p * found.spread_growth
        assert found.change == pytest.approx(product, rel=1e-12)
        step = 1e-6
        slope = (entropy_of(c + step * e) - entropy_of(c - step * e)) / (2 * step)
        assert found.change == pytest.approx(slope, rel=1e-4, abs=1e-8)


def test_entropy_falls_exactly_when_large_eigenvalues_grow_faster_in_proportion():
    c = np.diag([4.0, 2.0, 1.0])
    for powers, sign in (([0.3, 0.2, 0.1], 1), ([0.2, 0.2, 0.2], 0), ([-0.1, 0.0, 0.1], -1)):
        found = alignment(c, c * np.array(powers))
        assert np.sign(round(found.correlation, 12)) == sign
        assert np.sign(round(-found.change, 12)) == sign
    # growth of the leading eigenvalue alone is no sign of a fall: here the others grow faster
    risen = alignment(c, np.diag([0.4, 1.0, 0.9]))
    assert risen.leading_growth > 0
    assert risen.change > 0


def test_a_change_that_keeps_the_rank_of_a_singular_covariance_is_of_first_order():
    rng = np.random.default_rng(1)
    y, dy = rng.standard_normal((2, 50, 4))
    y, dy = np.pad(y - y.mean(0), ((0, 0), (0, 2))), np.pad(dy - dy.mean(0), ((0, 0), (0, 2)))
    c = y.T @ y / 50
    update = (y.T @ dy + dy.T @ y) / 50
    assert np.linalg.matrix_rank(c) == 4
    assert len(relative_growth(c, update)[0]) == 4
    assert np.isfinite(gradient_matrix(c)).all()
    step = 1e-5
    moved = y + step * dy
    slope = (entropy_of(moved.T @ moved / 50) - entropy_of(c)) / step
    assert slope == pytest.approx(entropy_change(c, update), abs=1e-3)


def test_first_order_predicts_single_steps_of_a_grokking_run(small_run):
    phases = {row.phase: row for row in descent(small_run)}
    assert set(phases) == set(PHASES)
    for row in phases.values():
        assert row.n >= 10, row
        assert row.rank_correlation > 0.5, row
        assert row.sign_agreement > 0.7, row
    assert phases["all"].rank_correlation > 0.7


def test_alignment_on_the_run_is_weak_and_turns_positive_with_the_collapse(small_run):
    phases = {row.phase: row for row in descent(small_run)}
    assert phases["before"].alignment < phases["during"].alignment
    assert 0.05 < phases["during"].alignment < 0.6
    # The paper's sufficient condition holds before the collapse too, so it is not what brings it.
    assert phases["before"].leading > 0.6
    assert phases["during"].leading > 0.6


def test_weight_decay_by_itself_raises_entropy_and_the_gradient_by_itself_foretells_little(small_run):
    # Under AdamW the printed form, with the loss's gradient for the step, is another quantity.
    row = descent(small_run)[-1]
    assert row.from_decay > 0
    assert row.gradient_rank_correlation < row.rank_correlation - 0.2
    assert row.gradient_sign < row.sign_agreement


def test_collapse_span_is_from_a_tenth_to_nine_tenths_of_the_fall():
    step = np.arange(0.0, 100.0, 10.0)
    entropy = np.array([0.5, 0.8, 1.0, 0.95, 0.88, 0.5, 0.2, 0.08, 0.0, 0.1])
    assert collapse_span(step, entropy) == (40.0, 70.0)
