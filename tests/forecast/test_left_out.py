"""Cross-validation by whole runs: what each fold may see, the clock, and which of the two wins when it should."""

import numpy as np
import pytest
from planted_runs import H_STAR, planted_runs

from fastent.forecast.history import History
from fastent.forecast.power_law import HeldOut, LeaveOneOut, PowerLaw, leave_one_run_out

NOISY = {"scale": 0.15, "offset": 0.01, "noise": 0.002}


def test_each_fold_fits_threshold_and_law_to_the_other_runs_alone():
    runs = planted_runs(5, rng=np.random.default_rng(0), **NOISY)
    for i, fold in enumerate(leave_one_run_out(runs).runs):
        others = PowerLaw.fit(runs[:i] + runs[i + 1 :])
        assert fold.run == i
        assert (fold.law.c1, fold.law.gamma, fold.law.c2) == (others.c1, others.gamma, others.c2)
        assert fold.law.h_star == others.h_star
        assert fold.law.gap_range == others.gap_range
        own = (runs[i].step < runs[i].t_grok) & (runs[i].entropy > others.h_star)
        assert fold.step.tolist() == runs[i].step[own].tolist()
        assert fold.remaining.tolist() == (runs[i].t_grok - runs[i].step[own]).tolist()
        assert fold.by_law == pytest.approx(others.remaining(runs[i].entropy[own]), rel=1e-12)


def test_a_run_left_out_does_not_touch_its_own_forecast():
    runs = planted_runs(4, rng=np.random.default_rng(1), **NOISY)
    late = History(runs[0].step, runs[0].entropy, runs[0].t_grok - 1_000)
    before, after = (leave_one_run_out([first, *runs[1:]]).runs[0] for first in (runs[0], late))
    assert after.law == before.law
    assert after.by_clock.tolist() == before.by_clock[: len(after.by_clock)].tolist()


def test_clock_is_the_mean_of_the_other_runs_and_never_in_the_past():
    step = np.arange(0, 1_001, 100)
    runs = [
        History(step[step <= t], np.append(np.linspace(0.9, 0.7, t // 100), 0.6), t)
        for t in (500, 600, 1_000)
    ]
    last = leave_one_run_out(runs).runs[2]
    assert last.by_clock.tolist() == [550, 450, 350, 250, 150, 50, 0, 0, 0, 0]
    assert last.remaining.tolist() == list(range(1_000, 0, -100))


def test_scores_are_those_of_the_definitions():
    law = PowerLaw(1.0, 1.0, 0.0, H_STAR)
    empty = np.empty(0)
    runs = (
        HeldOut(
            0,
            law,
            200.0,
            np.array([0.0, 100.0]),
            np.array([200.0, 100.0]),
            np.array([190.0, 130.0]),
            np.zeros(2),
            np.zeros(2),
        ),
        HeldOut(
            1, law, 300.0, np.array([0.0]), np.array([300.0]), np.array([300.0]), np.zeros(1), np.zeros(1)
        ),
        HeldOut(2, law, 400.0, empty, empty, empty, empty, empty),
    )
    score = LeaveOneOut(runs).score("law")
    assert score.r_squared == pytest.approx(1 - (100 + 900) / 20_000, rel=1e-12)
    assert score.mae[:2].tolist() == [20, 0]
    assert score.mape[:2].tolist() == [0.1, 0]
    assert np.isnan(score.mae[2])
    clock = LeaveOneOut(runs).score("clock")
    assert clock.r_squared == pytest.approx(1 - (200**2 + 100**2 + 300**2) / 20_000, rel=1e-12)
    with pytest.raises(ValueError, match="'law' or 'clock'"):
        LeaveOneOut(runs).score("h")


def test_law_beats_the_clock_where_the_entropy_tells_and_loses_where_it_does_not():
    tells = leave_one_run_out(planted_runs(6))
    assert tells.score("law").r_squared == pytest.approx(1, abs=1e-9)
    assert tells.score("clock").r_squared < 0.99
    rng = np.random.default_rng(2)
    blind = []
    for t_grok in rng.integers(95, 105, 6) * 100:
        step = np.arange(0, t_grok + 1, 100)
        blind.append(History(step, np.append(rng.uniform(0.7, 0.9, step.size - 1), 0.6), t_grok))
    folds = leave_one_run_out(blind)
    assert folds.score("law").r_squared < 0.1
    assert folds.score("clock").r_squared > 0.95
    assert (folds.score("clock").mape < folds.score("law").mape).all()


def test_fewer_than_three_runs_cannot_be_left_out():
    with pytest.raises(ValueError, match=r"at least 3 .* got 2 of 3 runs"):
        leave_one_run_out([*planted_runs(2), History([0, 200], [0.9, 0.8])])
