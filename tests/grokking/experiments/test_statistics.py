"""Estimates over seeds against closed forms and published values.

Comparisons of two groups of times against published data sets, exact null distributions and simulation.

Tests on pairs: exact p-values, censoring, ties, and intervals over seeds.

Pearson's r and differences of means with their intervals.
"""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from fastent.grokking.experiments.statistics import (
    UNKNOWN,
    Estimate,
    Times,
    cohens_d,
    coverage,
    coverage_tables,
    holm,
    less,
    log_rank,
    mann_whitney,
    mean_delay,
    over,
    pearson,
    proportion,
    restricted_mean,
    signed_rank,
    sizes,
    spread,
    stratified_log_rank,
    welch,
)


def test_interval_of_a_mean_is_students():
    x = [1.0, 2.0, 4.0, 8.0]
    e = over(x)
    expected = stats.ttest_1samp(x, 0).confidence_interval(0.95)
    assert (e.low, e.high) == (pytest.approx(expected.low), pytest.approx(expected.high))
    assert (e.value, e.n, e.method) == (3.75, 4, "Student's t")


def test_interval_of_a_length_ends_at_zero_and_that_of_a_share_at_its_ends():
    assert over([1.0, 2.0, 6.0], least=0).low == 0
    e = over([0.1, 0.5, 0.9], least=0, most=1)
    assert (e.low, e.value, e.high) == (0, pytest.approx(0.5), 1)
    assert over([10.0, 20.0, 90.0]).low < 0  # a difference may be anything


def test_values_that_are_not_known_take_no_part_and_none_is_unknown():
    assert over([1.0, np.nan, 3.0, 5.0]) == over([1.0, 3.0, 5.0])
    assert over([np.nan]) == over([]) == UNKNOWN


@pytest.mark.parametrize("x", [[3.0], [3.0, 5.0]])
def test_fewer_than_three_values_get_no_interval_and_the_result_says_so(x):
    e = over(x)
    assert (e.value, e.bounded) == (np.mean(x), False)
    assert e.method == f"no interval: n = {len(x)}"


def test_equal_values_have_an_interval_without_width_and_say_so():
    e = over([2.0, 2.0, 2.0])
    assert (e.low, e.high, e.method) == (2.0, 2.0, "no spread: all values equal")


def test_spread_has_the_chi_square_interval():
    x = np.random.default_rng(0).normal(0, 2, 9)
    e = spread([*x, np.nan])
    assert e.value == pytest.approx(x.std(ddof=1))
    for end, tail in ((e.low, 0.025), (e.high, 0.975)):
        assert stats.chi2.sf(8 * (e.value / end) ** 2, 8) == pytest.approx(tail)
    assert not spread([1.0, 2.0]).known


def test_a_difference_of_two_numbers_has_the_interval_of_both_and_none_without_ours():
    x, y = np.random.default_rng(0).normal(0, 1, (2, 400))
    e, both = less(over(x), over(y)), welch(y, x)
    assert (e.value, e.low, e.high) == pytest.approx((both.value, both.low, both.high), abs=2e-3)
    assert less(Estimate(5.0, 4.0, 7.0), Estimate(1.0)).low == 3.0
    assert not less(Estimate(5.0), Estimate(1.0, 0.0, 2.0)).bounded


def test_all_of_n_has_the_closed_form_clopper_pearson_bound():
    for n in (3, 10):
        e = proportion(n, n)
        assert (e.value, e.high) == (1.0, 1.0)
        assert e.low == pytest.approx(0.025 ** (1 / n), rel=1e-9)
    assert proportion(5, 10).low == pytest.approx(0.1871, abs=1e-4)


def test_holm_matches_the_textbook_example_and_keeps_the_order():
    adjusted = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert list(adjusted) == ["a", "b", "c", "d"]
    assert list(adjusted.values()) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm({"a": 0.7, "b": 0.8}) == {"a": 1.0, "b": 1.0}


# Freireich et al. (1963), weeks of remission: 6-MP (12 of 21 censored) and placebo.
SIX_MP = Times(
    np.array((6, 6, 6, 6, 7, 9, 10, 10, 11, 13, 16, 17, 19, 20, 22, 23, 25, 32, 32, 34, 35), dtype=float),
    np.array(tuple(c == "1" for c in "111010100110001100000")),
)
PLACEBO = Times.of([1, 1, 2, 2, 3, 4, 4, 5, 5, 8, 8, 8, 8, 11, 11, 12, 12, 15, 17, 22, 23], 23)


def times(*values, limit=1000):
    return Times.of(values, limit)


def test_freireich_log_rank_chi_square_is_the_published_one():
    limit = 5  # every run was watched at least as long
    result = log_rank(PLACEBO, SIX_MP, limit)
    assert result.statistic**2 == pytest.approx(16.79, abs=0.005)
    assert result.p_value == pytest.approx(stats.chi2.sf(16.793, 1) / 2, rel=1e-3)  # too many ways to count
    assert result.note == "12 runs censored"
    cut = [np.minimum(t.values, limit) for t in (PLACEBO, SIX_MP)]
    assert result.effect == welch(*cut)


def exactly(control, treated, statistic):
    """Share of all ways to choose the treated runs whose statistic is at least that of the one seen."""
    values, seen = np.r_[treated.values, control.values], np.r_[treated.observed, control.observed]
    n, found = values.size, []
    for chosen in itertools.combinations(range(n), treated.n):
        mask = np.isin(np.arange(n), chosen)
        found.append(statistic(Times(values[~mask], seen[~mask]), Times(values[mask], seen[mask])))
    return np.mean(np.array(found) >= statistic(control, treated) - 1e-9)


def expected_less_observed(control, treated):
    """Events that are expected of the treated runs, event by event, less those seen."""
    total = 0.0
    for t in np.unique(np.r_[control.values[control.observed], treated.values[treated.observed]]):
        at_risk = [(x.values >= t).sum() for x in (control, treated)]
        died = [((x.values == t) & x.observed).sum() for x in (control, treated)]
        total += sum(died) * at_risk[1] / sum(at_risk) - died[1]
    return total


def test_log_rank_p_is_the_share_of_all_labellings_ties_and_cuts_included():
    control, treated = times(100, 200, 200, 400, None), times(200, 500, None, 600, 300)
    found = log_rank(control, treated, 1000)
    assert found.p_value == exactly(control, treated, expected_less_observed)
    apart = log_rank(times(1, 2, 3, 4, 5), times(6, 7, 8, 9, 10), 1000)
    assert apart.p_value == 1 / math.comb(10, 5)
    assert stats.norm.cdf(apart.statistic) < 0.4 * apart.p_value  # what the normal would say


def test_mann_whitney_p_is_the_share_of_all_labellings_ties_and_cuts_included():
    def rank_sum(a, b):
        x, y = (np.where(t.observed, t.values, np.inf) for t in (a, b))
        return stats.rankdata(np.r_[x, y])[x.size :].sum()

    control, treated = times(100, 200, 200, 400, None), times(200, 500, None, 600, 300)
    assert mann_whitney(control, treated).p_value == exactly(control, treated, rank_sum)


def test_ten_against_ten_are_counted_and_thirty_against_ten_are_not():
    low, high = Times.of(range(10), 99), Times.of(range(10, 20), 99)
    assert mann_whitney(low, high).p_value == log_rank(low, high, 99).p_value == 1 / math.comb(20, 10)
    many = Times.of(range(10, 40), 99)
    assert mann_whitney(low, many).p_value == pytest.approx(
        stats.mannwhitneyu(many.values, low.values, alternative="greater").pvalue
    )


def test_restricted_mean_is_the_mean_of_the_cut_times_within_zero_and_the_limit():
    e = restricted_mean(Times.of([100.0, 300.0, 500.0, 900.0], 1000), 600)
    assert e.value == pytest.approx(375)
    assert e.low == pytest.approx(over([100, 300, 500, 600]).low)
    wide = restricted_mean(Times.of([10, 10, None], 1000), 1000)
    assert (wide.low, wide.high) == (0, 1000)
    assert wide.method == "Student's t, restricted to step 1000"


def test_restricted_mean_refuses_a_limit_beyond_the_first_cut():
    with pytest.raises(ValueError, match="must not exceed the step where a run was cut, 500"):
        restricted_mean(Times.of([100, None], 500), 600)
    with pytest.raises(ValueError, match="must be positive"):
        restricted_mean(Times.of([100], 500), 0)


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
        x, y = rng.normal(10, 1, 10), rng.normal(11, 1, 12)
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
    assert (result.effect.bounded, result.effect.method) == (
        False,
        "Hodges-Lehmann shift; no interval: n = 5",
    )
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
    assert e.value == pytest.approx(1.0)
    # At each end the observed t has the tail's probability under the non-central t distribution.
    t = (25 / 10) ** 0.5
    assert stats.nct.sf(t, 8, e.low * t) == pytest.approx(0.025, abs=1e-6)
    assert stats.nct.cdf(t, 8, e.high * t) == pytest.approx(0.025, abs=1e-6)


def test_cohens_d_is_undefined_with_a_censored_run_a_single_run_or_no_spread():
    assert not cohens_d(times(1, 2), times(3, None)).known
    assert not cohens_d(times(1), times(3, 4)).known
    assert not cohens_d(times(1, 1), times(3, 3)).known


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


def test_five_of_five_later_pairs_have_p_of_one_in_32():
    result = stratified_log_rank(Times.of([1, 2, 3, 4, 5], 99), Times.of([2, 3, 4, 5, 6], 99))
    assert result.p_value == 1 / 32
    assert result.statistic == pytest.approx(5**0.5)
    assert (result.effect.value, result.effect.n) == (1.0, 5)
    assert result.effect.low == pytest.approx(0.025 ** (1 / 5))
    assert result.note == ""


def test_statistic_is_the_stratified_log_rank_z_of_observed_minus_expected():
    control, treated = Times.of([10, 20, 30, 40], 99), Times.of([15, 10, None, 90], 99)
    # Each informative pair: one event among two at risk, expectation 1/2, variance 1/4.
    expected = ((1 - 0.5) + (0 - 0.5) + (1 - 0.5) + (1 - 0.5)) / np.sqrt(4 / 4)
    result = stratified_log_rank(control, treated)
    assert result.statistic == pytest.approx(expected)
    assert result.p_value == pytest.approx(5 / 16)  # 3 or 4 of 4 heads


def test_censored_runs_count_only_where_the_order_is_known():
    # Known later; cut at the very step of the event: later; cut before the event: unknown; both cut; tie.
    control = Times.of([10, 50, 60, None, 30], [99, 99, 99, 99, 99])
    treated = Times.of([None, None, None, None, 30], [99, 50, 40, 99, 99])
    result = stratified_log_rank(control, treated)
    assert result.effect.n == 2
    assert result.p_value == 0.25
    assert result.note == "3 of 5 pairs tie or are cut before either groks"


def test_pairs_that_say_nothing_give_no_interval_and_p_of_one():
    result = stratified_log_rank(Times.of([None, 5], 9), Times.of([None, 5], 9))
    assert (result.p_value, result.effect.bounded, result.effect.n) == (1.0, False, 0)


def test_treated_first_is_evidence_for_the_other_side():
    result = stratified_log_rank(Times.of([9, 9, 9], 99), Times.of([1, 2, 3], 99))
    assert (result.p_value, result.effect.value) == (1.0, 0.0)


def test_mean_delay_is_restricted_and_refuses_times_cut_before_the_limit():
    control, treated = Times.of([10, 20, 30], 100), Times.of([20, None, 40], 100)
    assert mean_delay(control, treated, 100).value == pytest.approx((10 + 80 + 10) / 3)
    assert mean_delay(control, treated, 25).value == pytest.approx((10 + 5 + 0) / 3)
    assert not mean_delay(control, Times.of([20, None, 40], [100, 90, 100]), 100).known


def test_pairs_must_be_pairs():
    with pytest.raises(ValueError, match="as many control as treated"):
        stratified_log_rank(Times.of([1], 9), Times.of([1, 2], 9))


def test_r_and_its_interval_are_those_of_scipy():
    rng = np.random.default_rng(0)
    x = rng.standard_normal(10)
    y = x + rng.standard_normal(10)
    expected = stats.pearsonr(x, y)
    found = pearson(x, y)
    assert found.value == pytest.approx(expected.statistic, rel=1e-12)
    low, high = expected.confidence_interval(0.95)
    assert (found.low, found.high, found.n) == (pytest.approx(low), pytest.approx(high), 10)


def test_fewer_than_four_pairs_or_no_spread_have_no_interval():
    assert not pearson([1, 2, 4], [1, 3, 2]).bounded
    assert pearson([1, 2, 3, 4], [2, 4, 6, 8]).method == "no interval: n = 4, r = 1"
    assert math.isnan(pearson([1, 1, 1, 1], [1, 2, 3, 4]).value)
    with pytest.raises(ValueError, match="two or more pairs"):
        pearson([1], [1])


def test_interval_of_a_difference_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = [
        f.low < 1.0 < f.high for f in (welch(rng.normal(0, 1, 5), rng.normal(1, 3, 8)) for _ in range(1000))
    ]
    assert 0.93 < np.mean(covered) < 0.97


def test_difference_is_the_second_less_the_first_and_has_no_interval_for_one_run():
    assert welch([1.0, 2.0], [4.0]).value == 2.5
    assert not welch([1.0, 2.0], [4.0]).bounded
    with pytest.raises(ValueError, match="each group needs a value"):
        welch([], [1.0])


@pytest.mark.nightly
def test_students_interval_holds_what_it_says_and_the_bootstrap_does_not():
    held = {(kind, name, n): share for kind, name, n, share in coverage()}
    for n in (3, 5, 10):
        assert held["Student's t (used here)", "normal", n] == pytest.approx(
            0.95, abs=0.015
        )  # 3 errors of 2,000
        assert held["Student's t (used here)", "log-normal, spread 0.25", n] > 0.93
    for kind in ("BCa bootstrap", "Greenwood, normal"):
        assert 0.68 < held[kind, "normal", 3] < 0.8
        assert 0.8 < held[kind, "normal", 5] < 0.88


@pytest.mark.nightly
def test_exact_tests_reject_no_more_often_than_they_say():
    assert all(share <= 0.06 for test, _, share in sizes() if "exact" in test)


@pytest.mark.nightly
def test_the_committed_table_of_coverage_is_what_the_command_makes():
    document = Path(__file__).parents[3] / "docs" / "results.md"
    assert coverage_tables() in document.read_text(encoding="utf-8")
