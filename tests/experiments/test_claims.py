"""Verdicts and the wording of numbers."""

import pytest

from fastent.experiments.claims import (
    IN_PART,
    NOT_REPRODUCED,
    NOT_RUN,
    OTHER_SETTING,
    REPRODUCED,
    counted,
    decimal,
    judge_share,
    judge_value,
    percent,
    steps,
    worded,
)
from fastent.experiments.statistics import Estimate, bootstrap, proportion


@pytest.mark.parametrize(
    ("successes", "verdict"),
    [(10, REPRODUCED), (9, IN_PART), (5, IN_PART), (4, NOT_REPRODUCED), (0, NOT_REPRODUCED)],
)
def test_a_share_is_reproduced_only_at_all_and_not_below_half(successes, verdict):
    assert judge_share(proportion(successes, 10)) == verdict


@pytest.mark.parametrize(
    ("value", "low", "high", "verdict"),
    [
        (110, 90, 130, REPRODUCED),
        (110, 105, 115, IN_PART),
        (125, 120, 130, IN_PART),
        (126, 120, 130, NOT_REPRODUCED),
        (100, None, None, IN_PART),  # without an interval there is nothing to lie in
    ],
)
def test_a_number_is_reproduced_inside_the_interval_and_in_part_within_a_quarter(value, low, high, verdict):
    assert judge_value(100, Estimate(value, low, high, 5, "m"), comparable=True) == verdict


def test_a_number_of_another_setting_is_not_judged_and_no_run_is_not_run():
    assert judge_value(100, Estimate(1, 0, 2, 5, "m"), comparable=False) == OTHER_SETTING
    assert judge_value(100, None, comparable=True) == NOT_RUN
    assert judge_share(None) == NOT_RUN


def test_numbers_are_worded_with_interval_n_and_unit():
    assert worded(Estimate(1020.4, -90.0, 1150.0, 10, "m")) == "1,020 steps (95 % CI −90 to 1,150; n = 10)"
    assert worded(Estimate(0.5, 0.25, 0.75, 4, "m"), "%") == "50 % (95 % CI 25 % to 75 %; n = 4)"
    assert worded(Estimate(0.64, 0.6, 0.7, 3, "m"), "", 2) == "0.64 (95 % CI 0.60 to 0.70; n = 3)"
    assert worded(bootstrap([5.0, 7.0])) == "6 steps (no interval: n = 2)"
    assert worded(None) == "–"
    assert counted(proportion(3, 3)) == "3 of 3 runs (95 % CI 29 % to 100 %)"
    assert (steps(None), decimal(None), percent(None), counted(None)) == ("–",) * 4
    assert (steps(-1500), decimal(-0.12345), percent(0.999)) == ("−1,500", "−0.123", "100 %")
