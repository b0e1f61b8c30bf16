"""Estimates over seeds against closed forms and published values."""

import numpy as np
import pytest

from fastent.experiments.statistics import bootstrap, holm, proportion


def test_bootstrap_interval_of_a_large_normal_sample_matches_the_normal_interval():
    x = np.random.default_rng(1).normal(10, 2, 400)
    e = bootstrap(x.tolist())
    half = 1.96 * x.std() / 20
    assert e.value == pytest.approx(x.mean())
    assert e.low == pytest.approx(x.mean() - half, abs=0.03)  # 0.2 is the half-width: 15 % of it
    assert e.high == pytest.approx(x.mean() + half, abs=0.03)
    assert (e.n, e.method, e.level) == (400, "BCa bootstrap", 0.95)


def test_bca_corrects_for_skew_where_the_percentile_interval_does_not():
    # The acceleration pushes both ends towards the long tail.
    x = np.random.default_rng(0).exponential(1.0, 30)
    draws = np.random.default_rng(2).choice(x, (20_000, 30)).mean(axis=1)
    e = bootstrap(x.tolist())
    low, high = np.quantile(draws, [0.025, 0.975])
    assert e.low > low + 0.01
    assert e.high > high + 0.01


def test_bootstrap_is_reproducible_and_takes_another_statistic():
    x = [1.0, 2.0, 4.0, 8.0, 16.0]
    assert bootstrap(x) == bootstrap(x)
    assert bootstrap(x, np.median).value == 4.0


@pytest.mark.parametrize("x", [[3.0], [3.0, 5.0]])
def test_fewer_than_three_values_get_no_interval_and_the_result_says_so(x):
    e = bootstrap(x)
    assert (e.value, e.low, e.high) == (np.mean(x), None, None)
    assert e.method == f"no interval: n = {len(x)}"


def test_equal_values_and_an_undefined_bca_say_what_stood_in():
    assert bootstrap([2.0, 2.0, 2.0]).method == "no spread: all values equal"
    e = bootstrap([1.0, 1.0, 1.0, 1.0, 5.0], np.median)
    assert e.method == "percentile bootstrap, BCa undefined"
    assert (e.value, e.low, e.high) == (1.0, 1.0, 5.0)


def test_bootstrap_refuses_what_is_not_finite():
    with pytest.raises(ValueError, match="finite and at least one"):
        bootstrap([1.0, float("nan"), 2.0])
    with pytest.raises(ValueError, match="finite and at least one"):
        bootstrap([])


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
