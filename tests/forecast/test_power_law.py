"""The fitted law against planted ones, its intervals against their level, and what it says when it cannot know."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted_runs import H_STAR, planted_runs
from scipy import stats

from fastent.forecast.history import History, mean_interval
from fastent.forecast.power_law import (
    Fold,
    PowerLaw,
    jackknife_plus,
    leave_one_run_out,
    profile_gamma,
    residual_life,
)
from fastent.reference.forecast import entropy_power, interval_across, remaining_power, worst_miss

NOISY = {"scale": 0.15, "offset": 0.01, "noise": 0.002}


@pytest.mark.parametrize("gamma", [0.7, 1.0, 1.65, 3.0])
@pytest.mark.parametrize("c2", [0.0, 700.0])
def test_a_planted_law_is_recovered(gamma, c2):
    runs = planted_runs(4, gamma=gamma, c2=c2)
    law = PowerLaw.fit(runs)
    # H* is known and nothing is noisy; what is left is the end of the search in log gamma, 1e-9.
    assert law.h_star == H_STAR
    assert law.gamma == pytest.approx(gamma, rel=1e-6)
    assert law.c1 == pytest.approx(40_000.0, rel=1e-5)
    assert law.c2 == pytest.approx(c2, abs=0.01)
    assert law.r_squared == pytest.approx(1, abs=1e-9)
    assert (law.n_runs, law.n_points) == (4, sum(int((run.entropy > H_STAR).sum()) for run in runs))
    gaps = np.concatenate([run.entropy[run.entropy > H_STAR] - H_STAR for run in runs])
    assert law.gap_range == (gaps.min(), gaps.max())


@settings(deadline=None)
@given(
    gamma=st.floats(0.1, 5),
    c1=st.floats(0, 1e6),
    c2=st.floats(0, 1e4),
    h_star=st.floats(0, 0.99),
    h=st.floats(0, 1),
)
def test_remaining_time_is_the_references(gamma, c1, c2, h_star, h):
    law = PowerLaw(c1, gamma, c2, h_star)
    expected = remaining_power(h, h_star=h_star, c1=c1, gamma=gamma, c2=c2)
    assert law.remaining(h) == pytest.approx(expected, rel=1e-13, nan_ok=True)


def test_intervals_cover_the_truth_at_their_level():
    # What a fit to very many runs finds: noise in H biases all fits alike.
    truth = PowerLaw.fit(planted_runs(60, rng=np.random.default_rng(1), **NOISY))
    rng = np.random.default_rng(2)
    laws = [PowerLaw.fit(planted_runs(6, rng=rng, **NOISY)) for _ in range(80)]
    # 95 % less three binomial standard deviations; R^2 is skewed even in log(1 - R^2).
    for name, least in (("c1", 0.87), ("gamma", 0.87), ("c2", 0.87), ("h_star", 0.87), ("r_squared", 0.8)):
        ends = np.array([law.intervals[name] for law in laws])
        points = np.array([getattr(law, name) for law in laws])
        assert ((ends[:, 0] <= points) & (points <= ends[:, 1])).all(), name
        assert (
            np.mean((ends[:, 0] <= getattr(truth, name)) & (getattr(truth, name) <= ends[:, 1])) >= least
        ), name
    # Not by being endless: they know gamma to a factor.
    assert np.median([np.ptp(np.log(law.intervals["gamma"])) for law in laws]) < math.log(2)


def test_intervals_and_correlations_are_the_jackknife_over_runs():
    runs = planted_runs(6, rng=np.random.default_rng(3), **NOISY)
    law = PowerLaw.fit(runs)
    parts = [PowerLaw.fit(runs[:i] + runs[i + 1 :]) for i in range(6)]
    log_gamma = np.log([part.gamma for part in parts])
    width = stats.t.ppf(0.975, 5) * math.sqrt(5 / 6 * ((log_gamma - log_gamma.mean()) ** 2).sum())
    assert np.log(law.intervals["gamma"]) == pytest.approx(math.log(law.gamma) + np.array([-width, width]))
    at_grok = [run.entropy_at_grok for run in runs]
    student = stats.t.interval(0.95, 5, np.mean(at_grok), stats.sem(at_grok))
    assert law.intervals["h_star"] == pytest.approx(student, rel=1e-9)
    together = np.corrcoef(np.log([part.c1 for part in parts]), log_gamma)[0, 1]
    assert law.correlations["log c1, log gamma"] == pytest.approx(together, rel=1e-6)


def test_evaluating_each_run_more_often_does_not_make_the_law_surer():
    ratios = []
    for seed in range(4):
        often = planted_runs(6, every=50, rng=np.random.default_rng(seed), scale=0.15, offset=0.01)
        seldom = [History(run.step[::-9][::-1], run.entropy[::-9][::-1], run.t_grok) for run in often]
        widths = [np.ptp(np.log(PowerLaw.fit(runs).intervals["gamma"])) for runs in (often, seldom)]
        ratios.append(widths[0] / widths[1])
    # Resampling evaluations would claim a third of the width for nine times as many.
    assert np.mean(ratios) > 0.7


def test_without_c2_the_fit_is_as_good_only_where_none_was_planted():
    zero = PowerLaw.fit(planted_runs(5, c2=0.0))
    assert zero.r_squared_without_c2 == pytest.approx(zero.r_squared, abs=1e-9)
    assert zero.gamma_without_c2 == pytest.approx(zero.gamma, rel=1e-6)
    large = PowerLaw.fit(planted_runs(5, c2=3_000.0, gamma=3.0))
    assert large.r_squared_without_c2 < large.r_squared - 0.01
    low, high = large.intervals["c2"]
    assert 0 < low <= 3_000.01
    assert high >= 2_999.99


def test_profile_peaks_at_the_fitted_gamma():
    runs = planted_runs(5, rng=np.random.default_rng(5), **NOISY)
    law = PowerLaw.fit(runs)
    below, at, above = profile_gamma(runs, [law.gamma / 1.5, law.gamma, law.gamma * 1.5])
    assert at == pytest.approx(law.r_squared, rel=1e-12)
    assert max(below, above) < at


def test_parameters_that_the_runs_do_not_determine_have_no_interval():
    # The entropy rises towards grokking: the best non-increasing law is a constant.
    step = np.arange(0, 2001, 100)
    runs = [History(step, np.append(0.7 + 1e-4 * step[:-1] + 0.001 * i, 0.6), 2000) for i in range(4)]
    law = PowerLaw.fit(runs)
    assert (law.c1, law.c2) == (0, pytest.approx(1050))
    assert law.r_squared == pytest.approx(0, abs=1e-12)
    assert law.intervals["c1"] is None
    assert law.intervals["gamma"] is None
    assert law.correlations["log c1, log gamma"] is None
    # A step function of the entropy: gamma goes to the end of its search.
    runs = [
        History(step, np.where(step < 1000, 0.9, np.where(step < 2000, 0.89 + 1e-5 * i, 0.6)), 2000)
        for i in range(4)
    ]
    assert PowerLaw.fit(runs).intervals["gamma"] is None


def test_runs_that_did_not_grok_take_no_part_and_order_does_not_matter():
    runs = planted_runs(5, rng=np.random.default_rng(6), **NOISY)
    law = PowerLaw.fit(runs)
    more = PowerLaw.fit([*runs, History([0, 200, 400], [0.9, 0.95, 0.99])])
    assert more == replace(law, n_censored=1)
    back = PowerLaw.fit(runs[::-1])
    assert [back.c1, back.gamma, back.c2] == pytest.approx([law.c1, law.gamma, law.c2], rel=1e-6)
    assert back.intervals["gamma"] == pytest.approx(law.intervals["gamma"], rel=1e-5)


def test_time_in_other_units_scales_only_the_steps():
    runs = planted_runs(5, rng=np.random.default_rng(7), **NOISY)
    law = PowerLaw.fit(runs)
    other = PowerLaw.fit([History(8 * run.step, run.entropy, 8 * run.t_grok) for run in runs])
    misses, others = ([fold.miss for fold in each.folds] for each in (law, other))
    assert [other.c1, other.c2, *others] == pytest.approx(
        [8 * each for each in (law.c1, law.c2, *misses)], rel=1e-6
    )
    assert [other.gamma, other.r_squared] == pytest.approx([law.gamma, law.r_squared], rel=1e-6)


def test_a_law_comes_back_from_json():
    runs = planted_runs(5, rng=np.random.default_rng(8), **NOISY)
    for law in (PowerLaw.fit(runs), PowerLaw(1.0, 2.0, 0.0, 0.5)):
        assert PowerLaw.from_dict(json.loads(json.dumps(law.as_dict(), allow_nan=False))) == law


def test_residual_life_is_that_of_the_times_still_to_come_and_0_when_none_is():
    times, at = np.array([500.0, 100.0, 300.0]), np.array([500.0, 0, 100, 299, 700])
    assert residual_life(times, at, np.mean).tolist() == [0, 300, 300, 101, 0]
    assert residual_life(times, at, np.median).tolist() == [0, 300, 300, 101, 0]
    skewed = np.array([100.0, 200.0, 900.0])
    assert residual_life(skewed, np.array([0.0, 150.0]), np.median).tolist() == [200, 400]


def test_clock_of_a_law_is_the_median_of_its_runs_that_have_not_grokked_yet():
    law = PowerLaw(1.0, 2.0, 0.0, 0.5, t_grok=(1600.0, 800.0, 1000.0))
    assert [law.by_clock(now) for now in (0, 799, 800, 1200, 1600)] == [1000, 1000, 1300, 1600, None]
    assert PowerLaw(1.0, 2.0, 0.0, 0.5).by_clock(0) is None


def test_advantage_is_the_interval_of_what_the_law_is_nearer_than_the_clock_on_runs_left_out():
    runs = planted_runs(5, rng=np.random.default_rng(9), **NOISY)
    law = PowerLaw.fit(runs, level=0.9)
    assert law.t_grok == tuple(run.t_grok for run in runs)
    gains = []
    for fold in leave_one_run_out(runs).runs:
        others = np.delete(law.t_grok, fold.run)
        clock = [np.median(others[others > now]) - now if (others > now).any() else 0 for now in fold.step]
        off = np.abs(clock - fold.remaining) - np.abs(fold.by_law - fold.remaining)
        gains.append(off.mean() / fold.t_grok)
    assert law.advantage == pytest.approx(mean_interval(gains, 0.9))


def test_law_beats_the_clock_where_the_entropy_tells_and_not_where_all_runs_grok_together():
    assert PowerLaw.fit(planted_runs(6)).beats_clock is True
    rng = np.random.default_rng(10)
    blind = []
    for t_grok in rng.integers(95, 105, 6) * 100:
        step = np.arange(0, t_grok + 1, 100)
        blind.append(History(step, np.append(rng.uniform(0.7, 0.9, step.size - 1), 0.6), t_grok))
    assert PowerLaw.fit(blind).beats_clock is False
    assert PowerLaw(1.0, 2.0, 0.0, 0.5).beats_clock is None


def test_a_law_saved_by_an_earlier_version_is_read_and_says_what_it_lacks():
    fitted = PowerLaw.fit(planted_runs(9))
    values = {**fitted.as_dict(), "residual": [300.0, 0.2], "level": 0.95}
    for name in ("t_grok", "advantage", "folds", "n_censored", "n_unusable"):
        del values[name]
    law = PowerLaw.from_dict(json.loads(json.dumps(values)))
    assert (law.t_grok, law.advantage, law.beats_clock) == ((), None, None)
    assert law.remaining(0.7) == fitted.remaining(0.7)
    assert law.forecast_interval(0, 0.7) is None
    assert law.note.startswith("No interval: the law does not hold how far off it was.")


def test_folds_hold_the_law_of_the_others_and_its_worst_miss_of_the_run_left_out():
    runs = planted_runs(5, rng=np.random.default_rng(11), **NOISY)
    for fold, held_out in zip(PowerLaw.fit(runs).folds, leave_one_run_out(runs).runs, strict=True):
        law = held_out.law
        assert fold[:4] == (law.c1, law.gamma, law.c2, law.h_star)
        expected = worst_miss(held_out.t_grok, held_out.step, held_out.by_law)
        assert expected > 0
        assert fold.miss == pytest.approx(expected, rel=1e-12)
    # A run without an evaluation above the others' H* is given no forecast, and none of it is missed.
    low = History([0, 200, 400], [0.5, 0.5, 0.5], 400)
    assert PowerLaw.fit([*runs, low]).folds[5].miss == 0


@settings(deadline=None)
@given(n=st.integers(1, 40), seed=st.integers(0, 10**6), h=st.floats(0.5, 1), now=st.integers(0, 10**5))
def test_interval_across_runs_is_the_references_from_nine_runs_on_and_holds_the_laws_own_step(
    n, seed, h, now
):
    rng = np.random.default_rng(seed)
    folds = tuple(
        Fold(*each)
        for each in np.stack(
            [
                rng.uniform(1e3, 1e5, n),
                rng.uniform(0.5, 3, n),
                rng.uniform(0, 1e3, n),
                rng.uniform(0.4, 0.6, n),
                np.round(rng.exponential(2e3, n), -3),  # ties
            ],
            1,
        ).tolist()
    )
    law = PowerLaw(4e4, 2.0, 500.0, 0.5, folds=folds)
    points = now + remaining_power(
        np.maximum(h, [fold.h_star for fold in folds]),
        h_star=np.array([fold.h_star for fold in folds]),
        c1=np.array([fold.c1 for fold in folds]),
        gamma=np.array([fold.gamma for fold in folds]),
        c2=np.array([fold.c2 for fold in folds]),
    )
    expected = interval_across(points, [fold.miss for fold in folds])
    interval = law.forecast_interval(now, h)
    assert (interval is None) == (expected is None) == (n < 9)
    if interval is not None:
        step = now + float(law.remaining(h))
        low, high = max(now, min(expected[0], step)), max(expected[1], step)
        assert interval == pytest.approx((low, high), rel=1e-12)


@pytest.mark.parametrize("n", [9, 19])
def test_interval_holds_a_whole_run_at_once_in_nine_of_ten_resamplings_of_runs(n):
    # The law is known: a run's forecasts are off by what its own entropy is off, which its evaluations share.
    rng = np.random.default_rng(n)
    law = Fold(40_000.0, 1.65, 700.0, H_STAR, 0.0)
    left = np.arange(800.0, 10_001.0, 400.0)
    h = entropy_power(left, h_star=H_STAR, c1=law.c1, gamma=law.gamma, c2=law.c2)
    own = 0.01 * rng.standard_t(3, size=(1_000, n + 1, 1))
    noisy = h + own + 0.002 * rng.normal(size=(1_000, n + 1, left.size))
    off = law.c1 * np.maximum(noisy - H_STAR, 0) ** law.gamma + law.c2 - left
    misses = np.abs(off).max(2)
    # At a run's evaluations, T_grok at 0; the folds' laws are all the true one.
    points = np.broadcast_to(off[:, -1, :, None], (1_000, left.size, n))
    low, high = jackknife_plus(points, misses[:, None, :-1])
    covered = ((low <= 0) & (high >= 0)).all(1).mean()
    assert 0.85 <= covered <= 0.95
    # Evaluations are no runs: the same share of all of them is within less, and loses runs.
    within = np.quantile(np.abs(off[:, :-1]).reshape(1_000, -1), 0.9, axis=1)
    assert (misses[:, -1] <= within).mean() < 0.85


@pytest.mark.nightly
def test_fitted_laws_hold_a_whole_run_at_once_in_nine_of_ten_resamplings_of_runs():
    rng = np.random.default_rng(9)
    held = []
    for _ in range(1_000):
        *runs, new = planted_runs(10, rng=rng, every=400, shuffled=True, **NOISY)
        law = PowerLaw.fit(runs)
        known = zip(new.step.tolist(), new.entropy.tolist(), strict=True)
        intervals = [law.forecast_interval(t, h) for t, h in known if t < new.t_grok and h > law.h_star]
        held.append(all(low <= new.t_grok <= high for low, high in intervals))
    assert 0.85 <= np.mean(held) <= 0.95


def test_note_says_why_there_is_no_interval_what_the_clock_does_and_which_runs_took_no_part():
    runs = planted_runs(9)
    never = History([0, 200, 400], [0.9, 0.95, 0.99])
    unusable = History([0, 200, 400], [0.9, 0.8, np.nan], 400)
    law = PowerLaw.fit(runs)
    assert law.forecast_interval(0, 0.7) is not None
    assert law.note == ""
    few = PowerLaw.fit(runs[:8])
    assert few.forecast_interval(0, 0.7) is None
    assert few.note == "No interval: one at 90 % takes at least 9 runs that grokked; the law has 8."
    some = PowerLaw.fit([*runs, never, never, unusable])
    assert (some.n_runs, some.n_censored, some.n_unusable) == (9, 2, 1)
    assert some.folds == law.folds
    assert "2 of the 12 runs given had not grokked when they ended" in some.note
    assert "1 of the 12 runs given had no usable entropy where they grokked" in some.note
    assert "the clock says as much" in replace(law, advantage=(-0.1, 0.1)).note


def test_fewer_than_three_runs_that_grokked_are_refused():
    with pytest.raises(ValueError, match=r"at least 3 runs that grokked.* got 2 of 3"):
        PowerLaw.fit([*planted_runs(2), History([0, 200], [0.9, 0.8])])
    with pytest.raises(ValueError, match="none of 0 runs"):
        profile_gamma([], [1.0])


@pytest.mark.parametrize(
    "parameters",
    [
        (-1.0, 1.0, 0.0, 0.5),
        (1.0, 0.0, 0.0, 0.5),
        (1.0, 1.0, -1.0, 0.5),
        (1.0, 1.0, 0.0, 1.0),
        (math.nan, 1.0, 0.0, 0.5),
    ],
)
def test_a_law_that_forecasts_nonsense_is_refused(parameters):
    with pytest.raises(ValueError, match=r"must|in \[0, 1\)"):
        PowerLaw(*parameters)


def test_importing_the_package_does_not_load_scipy():
    program = (
        "import fastent.forecast.predict, fastent.forecast.diagnosis, sys\n"
        "print([name for name in sys.modules if name.startswith('scipy')])"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stdout.strip() == "[]"
