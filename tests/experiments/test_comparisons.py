"""Comparisons of two groups of times against published data sets, exact null distributions and simulation."""

import numpy as np
import pytest
from scipy import stats

from fastent.experiments.comparisons import (
    Times,
    cohens_d,
    log_rank,
    mann_whitney,
    restricted_mean,
    signed_rank,
)

# Freireich et al. (1963), weeks of remission: 6-MP (12 of 21 censored) and placebo.
SIX_MP = Times(
    (6, 6, 6, 6, 7, 9, 10, 10, 11, 13, 16, 17, 19, 20, 22, 23, 25, 32, 32, 34, 35),
    tuple(c == "1" for c in "111010100110001100000"),
)
PLACEBO = Times.of([1, 1, 2, 2, 3, 4, 4, 5, 5, 8, 8, 8, 8, 11, 11, 12, 12, 15, 17, 22, 23], 23)


def times(*values, limit=1000):
    return Times.of(values, limit)


def test_freireich_log_rank_chi_square_and_restricted_means_are_the_published_ones():
    result = log_rank(PLACEBO, SIX_MP, 35)
    assert result.statistic**2 == pytest.approx(16.79, abs=0.005)
    assert result.p_value == pytest.approx(stats.chi2.sf(16.793, 1) / 2, rel=1e-3)
    assert result.note == "12 runs censored"
    drug, placebo = restricted_mean(SIX_MP, 35), restricted_mean(PLACEBO, 35)
    assert drug.value == pytest.approx(23.287, abs=5e-4)
    assert placebo.value == pytest.approx(8.667, abs=5e-4)
    # Published standard error of the 6-MP restricted mean: 2.83.
    assert (drug.high - drug.value) / 1.959964 == pytest.approx(2.83, abs=0.005)
    assert result.effect.value == pytest.approx(23.287 - 8.667, abs=1e-3)


def test_restricted_mean_without_censoring_is_the_mean_of_the_cut_times():
    x = np.array([100.0, 300.0, 500.0, 900.0])
    t = Times.of(x.tolist(), 1000)
    e = restricted_mean(t, 600)
    assert e.value == pytest.approx(np.minimum(x, 600).mean())
    full = restricted_mean(t, 1000)
    # Greenwood without censoring is the plain variance over n.
    assert full.high - full.value == pytest.approx(1.959964 * x.std() / 2, rel=1e-6)


def test_restricted_mean_refuses_an_area_beyond_the_last_censored_time():
    with pytest.raises(ValueError, match="must not exceed the last censored time, 500"):
        restricted_mean(Times.of([100, None], 500), 600)


def test_dropping_a_censored_run_would_make_the_mean_smaller():
    kept = restricted_mean(Times.of([100, 200, None], 1000), 1000)
    assert kept.value == pytest.approx((100 + 200 + 1000) / 3)
    assert kept.value > restricted_mean(Times.of([100, 200], 1000), 1000).value


def test_mann_whitney_of_separated_groups_has_the_exact_p_value():
    result = mann_whitney(times(1, 2, 3), times(4, 5, 6))
    assert result.p_value == pytest.approx(1 / 20)  # one of C(6, 3) arrangements
    assert result.effect.value == 1.0
    assert 0.4 < result.effect.low < 0.6  # three of each say little
    assert result.effect.high == 1.0
    assert mann_whitney(times(4, 5, 6), times(1, 2, 3)).p_value == pytest.approx(1.0)


def test_mann_whitney_ties_censored_runs_last():
    # Treated run 2 was cut: it counts as later than every time seen, and as equal to control run 3.
    result = mann_whitney(times(100, 200, None), times(300, None, 400))
    assert result.statistic == 2 + 2.5 + 2
    assert result.note == "2 runs not there by step 1000 are tied last"


def test_mann_whitney_does_not_see_beyond_the_smallest_cut():
    control, treated = Times.of([100, 900], 1000), Times.of([None, 200], [500, 1000])
    # 900 lies beyond the cut at 500: as unknown as the censored run.
    assert mann_whitney(control, treated).statistic == 1.5 + 1
    assert mann_whitney(control, treated).note == "2 runs not there by step 500 are tied last"


def test_score_interval_of_the_chance_to_be_later_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    truth = stats.norm.cdf(1 / 2**0.5)
    covered = 0
    for _ in range(400):
        x, y = rng.normal(10, 1, 10), rng.normal(11, 1, 10)
        effect = mann_whitney(Times.of(x.tolist(), 99), Times.of(y.tolist(), 99)).effect
        covered += effect.low <= truth <= effect.high
    assert 0.91 < covered / 400 < 0.99  # 0.95, and three standard errors of 400 draws


def test_signed_rank_of_six_rising_pairs_has_the_exact_p_value_and_shift():
    result = signed_rank(times(1, 2, 3, 4, 5, 6), times(2, 4, 6, 8, 10, 12))
    assert result.p_value == pytest.approx(2**-6)
    assert (result.effect.value, result.effect.low, result.effect.high) == (3.5, 1.0, 6.0)


def test_signed_rank_exact_interval_is_the_tabulated_one_for_ten_pairs():
    # n = 10: the two-sided 5 % critical value of the signed-rank statistic is 8, so the 9th Walsh average.
    difference = np.array([3.0, 7, 12, 18, 25, 33, 42, 52, 63, 75])
    result = signed_rank(Times.of([0.0] * 10, 99), Times.of(difference.tolist(), 99))
    i, j = np.triu_indices(10)
    walsh = np.sort((difference[i] + difference[j]) / 2)
    assert (result.effect.low, result.effect.high) == (walsh[8], walsh[-9])


def test_five_pairs_get_no_interval_and_equal_pairs_no_evidence():
    result = signed_rank(times(1, 2, 3, 4, 5), times(2, 4, 6, 8, 10))
    assert (result.effect.low, result.effect.method) == (None, "Hodges-Lehmann shift; no interval: n = 5")
    assert signed_rank(times(1, 2), times(1, 2)).p_value == 1.0


def test_signed_rank_cuts_censored_pairs_and_needs_pairs():
    result = signed_rank(times(100, 200, 300), times(None, 500, 600))
    assert result.effect.value == pytest.approx(450)  # Walsh averages of 900, 300, 300
    assert result.note == "times are cut at step 1000"
    with pytest.raises(ValueError, match="got 2 and 1"):
        signed_rank(times(1, 2), times(1))


def test_cohens_d_of_a_shift_by_one_standard_deviation_is_one_with_a_covering_interval():
    x = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    e = cohens_d(Times.of(x.tolist(), 99), Times.of((x + x.std(ddof=1)).tolist(), 99))
    assert e is not None
    assert e.value == pytest.approx(1.0)
    # At each end the observed t has the tail's probability under the non-central t distribution.
    t = (25 / 10) ** 0.5
    assert stats.nct.sf(t, 8, e.low * t) == pytest.approx(0.025, abs=1e-6)
    assert stats.nct.cdf(t, 8, e.high * t) == pytest.approx(0.025, abs=1e-6)


def test_cohens_d_is_undefined_with_a_censored_run_a_single_run_or_no_spread():
    assert cohens_d(times(1, 2), times(3, None)) is None
    assert cohens_d(times(1), times(3, 4)) is None
    assert cohens_d(times(1, 1), times(3, 3)) is None


def test_times_refuse_an_event_after_the_end_and_unequal_lengths():
    with pytest.raises(ValueError, match="got 12 > 10"):
        Times.of([12], 10)
    with pytest.raises(ValueError, match="got 2, 1"):
        Times.of([1, 2], [5])


def test_cohens_d_of_groups_far_apart_has_an_interval_where_scipys_t_is_not_a_number():
    # Freedom 8 and t near 11: scipy's non-central t has NaN at non-centralities from -10 to -8.
    control, treated = (
        times(1000, 1100, 1200, 1300, 1400, 1500, limit=4000),
        times(2200, 2300, 2400, 2500, limit=4000),
    )
    d = cohens_d(control, treated)
    assert d.value == pytest.approx(1100 / (22.5e4 / 8) ** 0.5)
    scale = (6 * 4 / 10) ** 0.5
    for bound, share in ((d.low, 0.975), (d.high, 0.025)):
        assert stats.nct.cdf(d.value * scale, 8, bound * scale) == pytest.approx(share, abs=1e-9)


def test_runs_that_all_tie_say_nothing_in_the_log_rank_test():
    for values in ((5,), (5, 5, 5), (None, None)):
        result = log_rank(times(*values, limit=9), times(*values, limit=9), 9)
        assert (result.statistic, result.p_value, result.effect.value) == (0.0, 1.0, 0.0)
