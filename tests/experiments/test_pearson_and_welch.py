"""Pearson's r and differences of means with their intervals."""

import math

import numpy as np
import pytest
from scipy import stats

from fastent.experiments.statistics import pearson, welch


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
    assert pearson([1, 2, 4], [1, 3, 2]).low is None
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
    assert welch([1.0, 2.0], [4.0]).low is None
    with pytest.raises(ValueError, match="each group needs a value"):
        welch([], [1.0])
