"""Each quantity of a run against values read off a closed-form H(t) and accuracy."""

from dataclasses import dataclass

import numpy as np
import pytest

from fastent.grokking.train.milestones import (
    Trajectory,
    first_below,
    first_collapse,
    first_reaching,
    lead,
    summarize_run,
    value_at,
)


@dataclass(frozen=True)
class Config:
    criterion: float = 0.99
    memorised: float = 0.99


STEPS = np.arange(0, 1001, 100)


def rows(entropy, test, train=None, status=None, norm=None):
    m = len(entropy)
    train = [1.0] * m if train is None else train
    status = ["ok"] * m if status is None else status
    norm = [10.0] * m if norm is None else norm
    return [
        {
            "step": 100 * i,
            "train_accuracy": train[i],
            "test_accuracy": test[i],
            "entropy": entropy[i],
            "entropy_status": status[i],
            "parameter_norm": norm[i],
        }
        for i in range(m)
    ]


def test_first_reaching_counts_the_level_itself_and_gives_none_when_never_reached():
    values = np.array([0.2, 0.98, 0.99, 1.0])
    assert first_reaching(STEPS[:4], values, 0.99) == 200
    assert first_reaching(STEPS[:4], values, 1.01) is None


def test_sustained_grokking_is_the_first_of_three_in_a_row_and_a_single_spike_is_not():
    values = np.array([0, 1, 0, 1, 1, 0, 1, 1, 1, 0.0])
    assert first_reaching(STEPS[:10], values, 0.99) == 100
    assert first_reaching(STEPS[:10], values, 0.99, in_a_row=3) == 600
    assert first_reaching(STEPS[:2], values[:2], 0.99, in_a_row=3) is None


def test_crossing_is_strict_and_skips_unusable_entropy():
    entropy = np.array([0.9, 0.7, np.nan, 0.6, 0.5])
    assert first_below(STEPS[:5], entropy, 0.6) == 400
    assert first_below(STEPS[:5], entropy, 0.65) == 300
    assert first_below(STEPS[:5], entropy, 0.5) is None


@pytest.mark.parametrize(
    ("slope", "expected"),
    # After k evaluations of a steady fall the window shows min(k, 4) * slope: five evaluations, four steps.
    [(0.06, 100), (0.03, 200), (0.02, 300), (0.013, 400), (0.012, None)],
)
def test_collapse_of_a_steady_fall_is_seen_when_four_intervals_exceed_tau(slope, expected):
    entropy = 0.9 - slope * np.arange(STEPS.size)
    assert first_collapse(STEPS, entropy, tau=0.05, window=5) == expected


def test_collapse_is_measured_from_the_highest_entropy_of_the_window():
    # Rises first: against the oldest entry alone the fall at 500 would only be 0.90 - 0.87.
    entropy = np.array([0.85, 0.90, 0.95, 0.95, 0.95, 0.87, 0.87])
    assert first_collapse(STEPS[:7], entropy) == 500
    assert first_collapse(STEPS[:7], entropy, tau=0.1) is None


def test_collapse_forgets_what_lies_outside_the_window():
    entropy = np.array([0.9, 0.88, 0.87, 0.86, 0.855, 0.845])
    assert first_collapse(STEPS[:6], entropy, window=5) is None
    assert first_collapse(STEPS[:6], entropy, window=6) == 500


def test_an_unusable_entropy_neither_falls_nor_is_fallen_from():
    assert first_collapse(STEPS[:4], np.array([0.8, np.nan, 0.78, 0.77])) is None
    assert first_collapse(STEPS[:4], np.array([0.8, np.nan, 0.70, 0.70])) == 200
    assert first_collapse(STEPS[:3], np.full(3, np.nan)) is None


def test_a_window_of_one_evaluation_is_refused():
    with pytest.raises(ValueError, match="at least 2 evaluations; got 1"):
        first_collapse(STEPS, np.zeros(STEPS.size), window=1)


def test_lead_is_signed_and_none_without_either_time():
    assert lead(1000, 400) == 600
    assert lead(400, 1000) == -600
    assert lead(None, 400) is None
    assert lead(400, None) is None


def test_value_at_gives_none_off_the_grid_and_at_nan():
    values = np.array([1.0, np.nan, 3.0])
    assert value_at(STEPS[:3], values, 200) == 3.0
    assert value_at(STEPS[:3], values, 100) is None
    assert value_at(STEPS[:3], values, 150) is None
    assert value_at(STEPS[:3], values, None) is None


def test_summary_of_a_closed_form_run():
    # H(t) = 0.9 until 400, then 0.02 down an evaluation; test accuracy jumps at 800.
    entropy = [0.9 - 0.02 * max(0, i - 4) for i in range(11)]
    test = [0.01] * 8 + [1.0] * 3
    train = [0.1, 0.5, 0.995] + [1.0] * 8
    norm = [20.0 + i for i in range(11)]
    s = summarize_run(rows(entropy, test, train, norm=norm), Config())
    assert (s.t_mem, s.t_grok, s.t_grok_sustained) == (200, 800, 800)
    assert s.h_star == pytest.approx(0.82)
    # Steadily falling: first below the run's own H* one evaluation after T_grok, so the own lead is negative.
    assert (s.t_cross, s.lead_cross) == (900, -100)
    assert (s.t_collapse, s.lead_collapse) == (700, 100)
    assert (s.entropy_start, s.entropy_at_mem, s.entropy_max) == (0.9, 0.9, 0.9)
    assert s.entropy_end == pytest.approx(0.78)
    assert (s.norm_start, s.norm_at_mem, s.norm_at_grok, s.norm_end) == (20, 22, 28, 30)
    assert (s.last_step, s.evaluations, s.unusable) == (1000, 11, 0)


def test_a_run_that_never_groks_has_no_threshold_crossing_or_lead_but_may_collapse():
    entropy = [0.9, 0.9, 0.7, 0.7]
    s = summarize_run(rows(entropy, [0.01] * 4, train=[0.2] * 4), Config())
    assert (s.t_mem, s.t_grok, s.t_grok_sustained) == (None, None, None)
    assert (s.h_star, s.t_cross, s.lead_cross, s.lead_collapse, s.norm_at_grok) == (None,) * 5
    assert s.t_collapse == 200


def test_rows_with_another_status_do_not_count():
    status = ["ok", "zero_variance", "nonfinite", "rank_limited"]
    s = summarize_run(rows([0.9, 0.0, None, 0.88], [0, 0, 0, 1.0], status=status), Config())
    assert s.t_collapse is None
    assert s.h_star == 0.88
    assert (s.entropy_max, s.unusable) == (0.9, 2)


def test_an_unusable_entropy_at_grokking_leaves_no_threshold():
    s = summarize_run(rows([0.9, 0.5], [0, 1.0], status=["ok", "zero_variance"]), Config())
    assert (s.t_grok, s.h_star, s.t_cross) == (100, None, None)


def test_empty_metrics_and_repeated_steps_are_refused():
    with pytest.raises(ValueError, match="no evaluation"):
        Trajectory.from_rows([])
    repeated = rows([0.9, 0.8], [0, 0])
    repeated[1]["step"] = 0
    with pytest.raises(ValueError, match="step 0 follows 0"):
        Trajectory.from_rows(repeated)
