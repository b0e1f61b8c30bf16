"""Heuristic 2: H* varies little over seeds. How little, with an interval, and against its variation between tasks."""

import numpy as np
import pytest

from fastent.grokking.mathematics.collapse import concentration


def planted(within, between, tasks, seeds, seed):
    rng = np.random.default_rng(seed)
    means = 0.6 + between * rng.standard_normal(tasks)
    return {str(i): mean + within * rng.standard_normal(seeds) for i, mean in enumerate(means)}


def test_components_of_variance_are_found_and_their_intervals_cover_them():
    covered = np.zeros(3)
    values = []
    for seed in range(300):
        found = concentration(planted(0.01, 0.03, 4, 5, seed))
        values.append((found.within.value, found.between.value))
        truths = (0.01, 0.03, 0.9)
        for i, (estimate, truth) in enumerate(
            zip((found.within, found.between, found.share), truths, strict=True)
        ):
            assert estimate.low is not None
            assert estimate.high is not None
            covered[i] += estimate.low <= truth <= estimate.high
    assert np.sqrt(np.mean(np.square(values), axis=0)) == pytest.approx([0.01, 0.03], rel=0.1)
    assert (covered / 300 > [0.92, 0.80, 0.92]).all(), covered


def test_tasks_without_a_difference_show_none():
    p_values = [concentration(planted(0.02, 0.0, 3, 5, seed)).p_value for seed in range(200)]
    assert np.mean(np.array(p_values) < 0.05) == pytest.approx(0.05, abs=0.05)
    assert np.mean(p_values) == pytest.approx(0.5, abs=0.08)


def test_the_papers_rows_for_three_tasks_would_be_far_apart_or_not_by_their_spread_over_seeds():
    means = {"add": 0.605, "mul": 0.589, "sub": 0.589}
    deviations = np.array([-1.0, -0.5, 0.0, 0.5, 1.0])
    tight = concentration({task: mean + 0.003 * deviations for task, mean in means.items()})
    loose = concentration({task: mean + 0.03 * deviations for task, mean in means.items()})
    assert tight.p_value < 1e-4
    assert tight.share.value > 0.8
    assert loose.p_value > 0.3
    assert loose.between.value == 0


def test_one_task_or_one_seed_is_refused():
    for few in ({"add": [0.6, 0.61]}, {"add": [0.6, 0.61], "sub": [0.6]}):
        with pytest.raises(ValueError, match="at least two tasks with at least two seeds"):
            concentration(few)
