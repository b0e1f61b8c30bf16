"""A run's history, H* from several, and the trend that one wild evaluation does not move."""

import math

import numpy as np
import pytest
from scipy import stats

from fastent.entropy import Status
from fastent.forecast.history import History, calibrate_threshold, recent_change
from fastent.records import EntropyRecord


def record(step, normalized, status=Status.OK, layer="encoder"):
    return EntropyRecord(step, layer, normalized, 1.0, 2.0, 2.0, 1.0, 1.0, status, (), "", n=512, d=128)


def test_entropy_at_grok_is_the_evaluation_there_or_the_line_between_its_neighbours():
    step, entropy = [0, 200, 400], [0.9, 0.75, 0.25]
    assert History(step, entropy, 200).entropy_at_grok == 0.75
    assert History(step, entropy, 250).entropy_at_grok == 0.625
    assert History(step, entropy, 0).entropy_at_grok == 0.9


def test_entropy_at_grok_is_none_where_the_run_does_not_say():
    step = [0, 200, 400]
    assert History(step, [0.9, 0.75, 0.25]).entropy_at_grok is None
    assert History(step, [0.9, 0.75, 0.25], 401).entropy_at_grok is None
    assert History(step, [0.9, math.nan, 0.25], 200).entropy_at_grok is None
    assert History(step, [0.9, math.nan, 0.25], 300).entropy_at_grok is None
    assert History([], [], 200).entropy_at_grok is None


def test_records_with_an_unusable_status_become_nan():
    records = [
        record(0, 0.9),
        record(200, 0.8, Status.RANK_LIMITED),
        record(400, 0.7, Status.UNRESOLVED_OFFSET),
        record(600, 0.0, Status.ZERO_VARIANCE),
        record(800, math.nan, Status.NONFINITE),
    ]
    run = History.from_records(records, t_grok=200)
    assert run.step.tolist() == [0, 200, 400, 600, 800]
    assert run.usable.tolist() == [True, True, False, False, False]
    assert run.entropy_at_grok == 0.8


def test_records_of_several_layers_need_a_choice():
    records = [record(step, h, layer=name) for step in (0, 200) for name, h in (("a", 0.9), ("b", 0.5))]
    with pytest.raises(ValueError, match="'a', 'b'"):
        History.from_records(records)
    assert History.from_records(records, layer="b").entropy.tolist() == [0.5, 0.5]
    assert len(History.from_records([])) == 0


def test_a_run_replayed_until_a_step_does_not_know_what_came_later():
    run = History([0, 200, 400], [0.9, 0.8, 0.7], 400, norm=[1.0, 2.0, 3.0])
    then = run.until(399)
    assert then.step.tolist() == [0, 200]
    assert then.norm.tolist() == [1.0, 2.0]
    assert then.t_grok is None
    assert run.until(400).t_grok == 400


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0, 200], [4.2, 4.0]), "must be normalised"),
        (([0, 200], [0.9, -0.1]), "must be normalised"),
        (([0, 200], [0.9, math.inf]), "must be normalised"),
        (([0, 0], [0.9, 0.9]), "strictly increase"),
        (([0, math.nan], [0.9, 0.9]), "strictly increase"),
        (([0, 200], [0.9]), "one entry for each of 2 steps"),
    ],
)
def test_a_history_that_is_not_one_run_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        History(*arguments)


def test_threshold_is_the_mean_over_the_runs_that_grokked():
    grokked = [History([0, 200], [0.9, h], 200) for h in (0.5, 0.625, 0.75)]
    threshold = calibrate_threshold([*grokked, History([0, 200], [0.9, 0.1])])
    assert threshold.value == 0.625
    assert threshold.per_run == (0.5, 0.625, 0.75)
    expected = stats.t.interval(0.95, 2, 0.625, stats.sem([0.5, 0.625, 0.75]))
    assert threshold.interval == pytest.approx(expected, rel=1e-12)
    assert calibrate_threshold(grokked, level=0.5).interval[0] > threshold.interval[0]
    assert calibrate_threshold(grokked[:1]).interval is None


def test_a_threshold_without_a_run_that_grokked_is_refused():
    with pytest.raises(ValueError, match="none of 1 runs grokked"):
        calibrate_threshold([History([0, 200], [0.9, 0.1])])


@pytest.mark.parametrize("n", [3, 5])
def test_interval_of_the_threshold_covers_the_truth_at_its_level(n):
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        runs = [History([0, 200], [0.9, h], 200) for h in 0.6 + 0.02 * rng.normal(size=n)]
        low, high = calibrate_threshold(runs).interval
        covered += low <= 0.6 <= high
    # 95 % within three binomial standard deviations; a bootstrap of 3 covers 75 %.
    assert 0.917 <= covered / 400 <= 0.983


def test_recent_change_is_exact_on_a_line_and_unmoved_by_one_wild_or_missing_evaluation():
    step = np.arange(0.0, 1000.0, 100.0)
    line = 0.9 - 1e-4 * step
    assert recent_change(step, line, 5) == pytest.approx(-0.04, abs=1e-12)
    wild = line.copy()
    wild[-3] = 0.1
    assert recent_change(step, wild, 5) == pytest.approx(-0.04, abs=1e-12)
    wild[-3] = math.nan
    assert recent_change(step, wild, 5) == pytest.approx(-0.04, abs=1e-12)
    assert recent_change(step[:2], line[:2], 5) is None
    assert recent_change(step, np.where(step > 700, math.nan, line), 3) is None
