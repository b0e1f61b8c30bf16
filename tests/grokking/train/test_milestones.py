"""Each quantity of a run against values read off a closed-form H(t) and accuracy."""

import numpy as np
import pytest

from fastent.grokking.train.config import preset
from fastent.grokking.train.milestones import SUSTAINED, Reached, first, first_collapse

STEPS = np.arange(0, 1001, 100)


def test_first_is_the_first_evaluation_that_hits_and_nan_when_none_does():
    values = np.array([0.2, 0.98, 0.99, 1.0])
    assert first(STEPS[:4], values >= 0.99) == 200
    assert np.isnan(first(STEPS[:4], values >= 1.01))


def test_sustained_grokking_is_the_first_of_three_in_a_row_and_a_single_spike_is_not():
    values = np.array([0, 1, 0, 1, 1, 0, 1, 1, 1, 0.0])
    assert first(STEPS[:10], values >= 0.99) == 100
    assert first(STEPS[:10], values >= 0.99, SUSTAINED) == 600
    assert np.isnan(first(STEPS[:2], values[:2] >= 0.99, SUSTAINED))


@pytest.mark.parametrize(
    ("slope", "expected"),
    # After k evaluations of a steady fall the window shows min(k, 4) * slope: five evaluations, four steps.
    [(0.06, 100), (0.03, 200), (0.02, 300), (0.013, 400), (0.012, np.nan)],
)
def test_collapse_of_a_steady_fall_is_seen_when_four_intervals_exceed_tau(slope, expected):
    entropy = 0.9 - slope * np.arange(STEPS.size)
    np.testing.assert_equal(first_collapse(STEPS, entropy, tau=0.05, window=5), expected)


def test_collapse_is_measured_from_the_highest_entropy_of_the_window():
    # Rises first: against the oldest entry alone the fall at 500 would only be 0.90 - 0.87.
    entropy = np.array([0.85, 0.90, 0.95, 0.95, 0.95, 0.87, 0.87])
    assert first_collapse(STEPS[:7], entropy) == 500
    assert np.isnan(first_collapse(STEPS[:7], entropy, tau=0.1))


def test_collapse_forgets_what_lies_outside_the_window():
    entropy = np.array([0.9, 0.88, 0.87, 0.86, 0.855, 0.845])
    assert np.isnan(first_collapse(STEPS[:6], entropy, window=5))
    assert first_collapse(STEPS[:6], entropy, window=6) == 500


def test_an_unusable_entropy_neither_falls_nor_is_fallen_from():
    assert np.isnan(first_collapse(STEPS[:4], np.array([0.8, np.nan, 0.78, 0.77])))
    assert first_collapse(STEPS[:4], np.array([0.8, np.nan, 0.70, 0.70])) == 200
    assert np.isnan(first_collapse(STEPS[:3], np.full(3, np.nan)))


def test_a_window_of_one_evaluation_is_refused():
    with pytest.raises(ValueError, match="at least 2 evaluations; got 1"):
        first_collapse(STEPS, np.zeros(STEPS.size), window=1)


def test_rows_of_runs_are_each_on_their_own():
    hit = np.array([[False, True, True], [False, False, False], [True, False, True]])
    steps = np.array([[0, 100, 200], [0, 100, 200], [0, 50, np.nan]])
    np.testing.assert_equal(first(steps, hit), [100, np.nan, 0])
    np.testing.assert_equal(first(steps, hit, 2), [100, np.nan, np.nan])
    entropy = np.array([[0.9, 0.8, 0.7], [0.9, 0.9, 0.9], [0.9, np.nan, 0.5]])
    np.testing.assert_equal(first_collapse(STEPS[None, :3].repeat(3, 0), entropy), [100, np.nan, 200])


def test_a_run_reaches_what_its_accuracies_say_and_the_rest_is_none():
    test = [0.01] * 4 + [1.0, 0.5] + [0.99] * 5
    train = [0.1, None, 0.99] + [1.0] * 8
    columns = zip(STEPS.tolist(), train, test, strict=True)
    rows = [{"step": at, "train_accuracy": a, "test_accuracy": b} for at, a, b in columns]

    assert reached(rows) == {"t_mem": 200, "t_grok": 400, "t_grok_sustained": 600}
    assert reached(rows[:5]) == {"t_mem": 200, "t_grok": 400, "t_grok_sustained": None}
    assert reached(rows[:1]) == dict.fromkeys(("t_mem", "t_grok", "t_grok_sustained"))


def reached(rows):
    found = Reached(preset("quick", criterion=0.99, memorised=0.99))
    for row in rows:
        found.add(row)
    return found.as_json()


def test_row_by_row_a_run_reaches_what_all_rows_together_say():
    rng = np.random.default_rng(0)
    for _ in range(200):
        hit = rng.random((2, STEPS.size)) < rng.random()
        rows = [
            {"step": int(step), "train_accuracy": float(train), "test_accuracy": float(test)}
            for step, train, test in zip(STEPS, *hit, strict=True)
        ]
        expected = first(STEPS, hit[0]), first(STEPS, hit[1]), first(STEPS, hit[1], SUSTAINED)
        found = [np.nan if step is None else step for step in reached(rows).values()]
        np.testing.assert_equal(found, expected)
