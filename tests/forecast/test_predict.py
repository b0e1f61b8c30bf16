"""Row 29 of the faults: always a Forecast, with a reason where it has no step, and an interval that holds its point."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from planted_runs import H_STAR

from fastent.entropy import spectral_entropy
from fastent.forecast.history import History
from fastent.forecast.power_law import Fold, PowerLaw
from fastent.forecast.predict import Forecast, Reason, predict_grok_time

FOLDS = tuple(Fold(40_000.0, 2.0, 500.0, 0.625, 100.0 * (i + 1)) for i in range(9))
LAW = PowerLaw(c1=40_000.0, gamma=2.0, c2=500.0, h_star=0.625, gap_range=(0.0, 0.25), folds=FOLDS, n_runs=9)


folds = st.builds(
    Fold, st.floats(0, 1e300), st.floats(0.1, 20), st.floats(0, 1e300), st.floats(0, 0.99), st.floats(0, 1e6)
)


@st.composite
def laws(draw):
    low = draw(st.floats(0, 0.5))
    return PowerLaw(
        c1=draw(st.floats(0, 1e300)),
        gamma=draw(st.floats(0.1, 20)),
        c2=draw(st.floats(0, 1e300)),
        h_star=draw(st.floats(0, 0.99)),
        gap_range=(low, draw(st.floats(low, 1))),
        folds=tuple(draw(st.lists(folds, max_size=20))),
    )


@st.composite
def histories(draw):
    entropy = draw(st.lists(st.floats(0, 1) | st.just(math.nan), max_size=12))
    gaps = draw(st.lists(st.integers(1, 10**6), min_size=len(entropy), max_size=len(entropy)))
    return History(np.cumsum(gaps), entropy)


@settings(deadline=None)
@given(entropy=histories() | st.floats(0, 1) | st.just(math.nan) | st.none(), law=st.none() | laws())
def test_there_is_always_a_forecast_with_a_step_or_a_reason(entropy, law):
    forecast = predict_grok_time(entropy, law)
    assert isinstance(forecast, Forecast)
    assert (forecast.reason is None) == (forecast.step is not None) == (forecast.message == "")
    if forecast.step is None:
        assert forecast.remaining is forecast.interval is forecast.level is None
        return
    assert 0 <= forecast.now <= forecast.step < math.inf
    assert forecast.remaining >= 0
    assert forecast.step == forecast.now + forecast.remaining
    assert (forecast.interval is None) == (forecast.level is None) == (len(law.folds) < 9)
    assert forecast.note == law.note
    if forecast.interval is not None:
        low, high = forecast.interval
        assert forecast.now <= low <= forecast.step <= high


@pytest.mark.parametrize(("advantage", "beats"), [((0.01, 0.1), True), ((-0.01, 0.1), False), (None, None)])
def test_a_forecast_says_what_the_clock_says_with_a_step_or_without_and_whether_the_law_beats_it(
    advantage, beats
):
    law = replace(LAW, t_grok=(800.0, 1000.0, 1600.0), advantage=advantage)
    for h, reason in ((0.7, None), (0.6, Reason.BELOW_THRESHOLD)):
        early, late, after = (predict_grok_time(h, law, step=step) for step in (600, 1200, 2000))
        assert (early.by_clock, late.by_clock, after.by_clock) == (1000, 1600, None)
        assert {each.reason for each in (early, late, after)} == {reason}
        assert early.beats_clock is beats
    # The law's own step is as it was.
    assert predict_grok_time(0.7, law, step=600).step == predict_grok_time(0.7, LAW, step=600).step
    assert predict_grok_time(0.7, LAW, step=600).by_clock is None


@settings(deadline=None)
@given(h=st.floats(0, 1), law=laws(), step=st.integers(0, 10**7))
def test_a_bare_entropy_is_forecast_exactly_where_the_law_has_been(h, law, step):
    forecast = predict_grok_time(h, law, step=step)
    low, high = law.gap_range
    gap, slack = h - law.h_star, 0.1 * (high - low)
    assert forecast.now == step
    if gap <= 0:
        assert forecast.reason is Reason.BELOW_THRESHOLD
    elif not low - slack <= gap <= high + slack:
        assert forecast.reason is Reason.EXTRAPOLATION
    else:
        assert forecast.remaining == pytest.approx(law.c1 * gap**law.gamma + law.c2, rel=1e-12)


def test_without_a_law_or_an_evaluation_there_is_no_forecast():
    assert predict_grok_time(0.7, None).reason is Reason.NO_LAW
    assert predict_grok_time(None, None).reason is Reason.NO_LAW
    assert predict_grok_time(None, LAW).reason is Reason.NO_HISTORY
    assert predict_grok_time(History([], []), LAW).reason is Reason.NO_HISTORY


@settings(deadline=None)
@given(run=histories(), law=laws())
def test_an_unusable_latest_entropy_is_never_forecast_from(run, law):
    latest = History([*run.step, 10**8], [*run.entropy, math.nan])
    assert predict_grok_time(latest, law).reason is Reason.UNUSABLE


@settings(deadline=None)
@given(run=histories(), law=laws(), share=st.floats(0, 1))
def test_at_or_below_the_threshold_there_is_nothing_left_to_forecast(run, law, share):
    latest = History([*run.step, 10**8], [*run.entropy, share * law.h_star])
    assert predict_grok_time(latest, law).reason is Reason.BELOW_THRESHOLD


@settings(deadline=None)
@given(start=st.floats(0.65, 0.8), rise=st.floats(0.003, 0.015), wild=st.integers(0, 3))
def test_a_rising_entropy_is_not_forecast_even_with_one_wild_evaluation(start, rise, wild):
    entropy = start + rise * np.arange(6)
    step = np.arange(0, 1200, 200)
    assert predict_grok_time(History(step, entropy), LAW).reason is Reason.RISING
    entropy[1 + wild] = 0.95
    assert predict_grok_time(History(step, entropy), LAW).reason is Reason.RISING


@settings(deadline=None)
@given(start=st.floats(0.7, 0.8), slope=st.floats(0, 0.015), seed=st.integers(0, 10**6))
def test_a_falling_or_flat_entropy_is_forecast_in_spite_of_noise(start, slope, seed):
    noise = np.random.default_rng(seed).uniform(-0.003, 0.003, 6)
    entropy = start - slope * np.arange(6) + noise
    assume(entropy[-1] > H_STAR)
    forecast = predict_grok_time(History(np.arange(0, 1200, 200), entropy), LAW)
    assert forecast.step == pytest.approx(1000 + 40_000 * (entropy[-1] - 0.625) ** 2 + 500)


def test_extrapolation_is_refused_beyond_a_tenth_of_the_range_of_gaps():
    for h, reason in ((0.89, None), (0.91, Reason.EXTRAPOLATION)):
        assert predict_grok_time(h, LAW).reason is reason
    narrow = PowerLaw(40_000.0, 2.0, 500.0, 0.625, gap_range=(0.1, 0.2))
    for h, reason in ((0.725, None), (0.72, None), (0.71, Reason.EXTRAPOLATION)):
        assert predict_grok_time(h, narrow).reason is reason
    assert "0.0850" in predict_grok_time(0.71, narrow).message


def test_interval_reaches_as_far_as_the_worst_miss_of_nine_runs_and_starts_no_earlier_than_now():
    forecast = predict_grok_time(0.825, LAW, step=10_000)
    assert forecast.interval == pytest.approx((12_100 - 900, 12_100 + 900))
    assert forecast.level == 0.9
    close = predict_grok_time(0.63, LAW, step=10_000)
    assert close.interval == pytest.approx((10_000, 10_501 + 900))


def test_a_law_made_by_hand_forecasts_without_an_interval():
    forecast = predict_grok_time(0.7, PowerLaw(40_000.0, 2.0, 500.0, 0.6))
    assert forecast.step == pytest.approx(900)
    assert forecast.interval is forecast.level is None
    assert forecast.note.startswith("No interval: the law does not hold how far off it was.")


def test_results_of_spectral_entropy_are_taken_by_their_status():
    h = torch.diag(torch.tensor([1.0, 0.7, 0.2, 0.1], dtype=torch.float64)).repeat(3, 1)
    h = torch.cat([h, -h])
    result = spectral_entropy(h)
    law = PowerLaw(40_000.0, 2.0, 500.0, result.normalized - 0.1)
    assert predict_grok_time(result, law, step=200).step == pytest.approx(200 + 400 + 500)
    assert predict_grok_time(spectral_entropy(torch.ones(6, 4)), law).reason is Reason.UNUSABLE
    assert predict_grok_time(spectral_entropy(h * math.nan), law).reason is Reason.UNUSABLE
    with pytest.raises(ValueError, match="batched"):
        predict_grok_time(spectral_entropy(torch.stack([h, h]), batch_dims=1), law)


@pytest.mark.parametrize(
    ("entropy", "step", "message"),
    [
        (4.2, None, "must be normalised"),
        (-0.1, None, "must be normalised"),
        (0.7, -1, "step must be finite"),
        (0.7, math.inf, "step must be finite"),
        (History([0], [0.7]), 200, "left out with a history"),
    ],
)
def test_a_callers_mistake_is_an_error_and_not_a_forecast(entropy, step, message):
    with pytest.raises(ValueError, match=message):
        predict_grok_time(entropy, LAW, step=step)
