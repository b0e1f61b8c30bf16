"""Lemma 5: mixing with a permutation. What holds for all of them, what the paper prints, and how wrong that is.

The same statements against every backend of the package: ``tests/properties/test_mixing_lemma.py``.
"""

import itertools

import numpy as np
import pytest

from fastent.grokking.mathematics import checks
from fastent.grokking.mathematics.runs import mixing_of
from fastent.reference.covariance import covariance
from fastent.reference.entropy import fannes_audenaert
from fastent.reference.mixing import (
    best_bound,
    counterexample,
    cyclic_shift,
    extremal_rows,
    mix,
    mixed_covariance,
    slope,
    slope_deviation,
)


def test_every_permutation_of_up_to_7_rows_stays_within_the_sandwich_and_attains_both_ends():
    evidence = checks.mixing_sandwich()
    assert evidence.holds, evidence.text


def test_averages_over_all_permutations_and_derangements_are_the_closed_forms():
    evidence = checks.mixing_expectations()
    assert evidence.holds, evidence.text


def test_best_bound_holds_for_all_permutations_and_swapped_pairs_attain_it():
    evidence = checks.mixing_bound()
    assert evidence.holds, evidence.text


def test_over_all_derangements_the_mean_change_is_of_second_order_and_of_either_sign():
    evidence = checks.mixing_on_average()
    assert evidence.holds, evidence.text


def test_printed_lemma_fails_at_first_order_on_the_counterexample():
    evidence = checks.printed_mixing_bound()
    assert evidence.holds, evidence.text


@pytest.mark.parametrize(
    ("n", "d", "alpha"), [(4, 2, 0.1), (14, 8, 0.25), (256, 128, 0.1), (8, 5, 0.5), (20, 3, 0.9)]
)
def test_rows_of_swapped_pairs_lose_exactly_the_best_bound(n, d, alpha):
    rows, swap = extremal_rows(n, d, alpha)
    assert (swap != np.arange(n)).all()
    before, after = (checks.entropy_of(covariance(x)) for x in (rows, mix(rows, swap, alpha)))
    assert before - after == pytest.approx(best_bound(alpha, d), rel=1e-10)
    assert best_bound(alpha, d) < max(fannes_audenaert(min(alpha / (1 - alpha), 1), d), np.log(d) + 1e-12)


def test_rows_for_the_bound_need_enough_pairs():
    with pytest.raises(ValueError, match="at least 14 for d = 8; got n = 12"):
        extremal_rows(12, 8, 0.1)
    with pytest.raises(ValueError, match="got n = 15"):
        extremal_rows(15, 8, 0.1)


def test_slope_in_alpha_is_the_derivative_at_0():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((30, 5)) * [3.0, 2.0, 1.0, 0.3, 0.1] + 7.0
    before = checks.entropy_of(covariance(x))
    for permutation in (cyclic_shift(30), rng.permutation(30)):
        step = 1e-6
        difference = (checks.entropy_of(mixed_covariance(x, permutation, step)) - before) / step
        assert slope(x, permutation) == pytest.approx(difference, abs=1e-5)
    assert checks.slopes_over(x, cyclic_shift(30)[None])[0] == pytest.approx(
        slope(x, cyclic_shift(30)), abs=1e-12
    )


def test_about_half_of_all_derangements_lose_entropy_at_first_order_on_random_spectra():
    # The slope averages to exactly 0 over them, so it cannot be a gain for all: whatever the spectrum.
    rng = np.random.default_rng(1)
    every = np.array(list(itertools.permutations(range(7))))
    free = every[(every != np.arange(7)).all(axis=1)]
    assert len(free) == 1854
    shares = []
    for _ in range(40):
        x = rng.standard_normal((7, 4)) * np.exp(rng.uniform(-4, 0, 4))
        shares.append(np.mean(checks.slopes_over(x, free) < 0))
    assert 0.4 < np.mean(shares) < 0.6
    assert min(shares) > 0.2


def test_size_of_the_loss_on_random_permutations_falls_as_one_over_root_n():
    rng = np.random.default_rng(2)
    lam = 0.8 ** np.arange(10)
    for n in (50, 800):
        x = rng.standard_normal((n, 10)) * np.sqrt(lam)
        slopes = checks.slopes_over(x, np.stack([rng.permutation(n) for _ in range(2000)]))
        assert slopes.std() == pytest.approx(slope_deviation(np.linalg.eigvalsh(covariance(x)), n), rel=0.06)


def test_on_activations_of_a_run_half_of_the_derangements_fail_the_printed_lemma(small_run):
    negative = small_run.evaluated("mixing_slope_negative")
    assert len(negative) > 20
    assert 0.42 < negative.mean() < 0.58
    assert ((negative > 0.3) & (negative < 0.7)).all()
    ratio = small_run.evaluated("mixing_slope_spread") / small_run.evaluated("mixing_slope_predicted")
    assert ratio == pytest.approx(np.ones(len(ratio)), abs=0.25)  # 200 permutations each
    # so the lemma is wrong in kind, and on shuffled batches of this size wrong by little
    assert small_run.evaluated("mixing_worst").max() < 0.1 * best_bound(0.1, small_run.config.width)


def test_mixing_report_of_the_counterexample_is_its_loss():
    found = mixing_of(counterexample())
    assert found["mixing_cyclic"] == pytest.approx(0.0990, abs=5e-5)
    assert found["mixing_cyclic_slope"] == pytest.approx(-0.885, abs=5e-4)
