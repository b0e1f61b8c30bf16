"""Tests on pairs: exact p-values, censoring, ties, and intervals over seeds."""

import numpy as np
import pytest

from fastent.experiments.comparisons import Times
from fastent.experiments.paired import mean_delay, stratified_log_rank


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
    assert (result.p_value, result.effect.low, result.effect.n) == (1.0, None, 0)


def test_treated_first_is_evidence_for_the_other_side():
    result = stratified_log_rank(Times.of([9, 9, 9], 99), Times.of([1, 2, 3], 99))
    assert (result.p_value, result.effect.value) == (1.0, 0.0)


def test_mean_delay_is_restricted_and_refuses_times_cut_before_the_limit():
    control, treated = Times.of([10, 20, 30], 100), Times.of([20, None, 40], 100)
    assert mean_delay(control, treated, 100).value == pytest.approx((10 + 80 + 10) / 3)
    assert mean_delay(control, treated, 25).value == pytest.approx((10 + 5 + 0) / 3)
    assert mean_delay(control, Times.of([20, None, 40], [100, 90, 100]), 100) is None


def test_pairs_must_be_pairs():
    with pytest.raises(ValueError, match="as many control as treated"):
        stratified_log_rank(Times.of([1], 9), Times.of([1, 2], 9))
