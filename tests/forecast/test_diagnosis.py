"""Each row of Table 5 as an exact case, and what must not change a diagnosis: noise, outliers, unusable evaluations."""

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted_runs import planted_runs

from fastent.forecast.diagnosis import _TABLE, Phase, diagnose
from fastent.forecast.history import History

H_STAR = 0.6


def run(*pieces, every=200, norm=None):
    """A run of straight pieces, each (from, to, evaluations)."""
    entropy = np.concatenate([np.linspace(start, stop, n) for start, stop, n in pieces])
    return History(every * np.arange(entropy.size), entropy, norm=norm)


PLATEAU = (0.88, 0.90, 20)
COLLAPSE = (0.90, 0.55, 36)  # 0.01 an evaluation


def test_row_1_high_and_not_falling_is_phase_1():
    diagnosis = diagnose(run(PLATEAU, norm=np.linspace(30, 60, 20)), threshold=H_STAR, test_accuracy=0.01)
    assert diagnosis.phase is Phase.NORM_EXPANSION
    assert "norm grows" in diagnosis.meaning
    assert diagnosis.action == "Continue training."
    shrinks = diagnose(run(PLATEAU, norm=np.linspace(60, 30, 20)), threshold=H_STAR)
    assert shrinks.phase is Phase.NORM_EXPANSION
    assert "norm is not growing" in shrinks.meaning
    assert diagnose(run(PLATEAU)).phase is Phase.NORM_EXPANSION


def test_row_2_begins_when_the_level_has_fallen_by_the_tolerance():
    # The median of three lags by one evaluation: after k of them the level is 0.90 - 0.01 (k - 1).
    phases = [diagnose(run(PLATEAU, (0.89, 0.90 - 0.01 * k, k)), threshold=H_STAR).phase for k in (5, 7)]
    assert phases == [Phase.NORM_EXPANSION, Phase.COLLAPSE_ONSET]
    assert "predict_grok_time" in diagnose(run(PLATEAU, (0.89, 0.8, 10))).action
    assert diagnose(run(PLATEAU, (0.89, 0.83, 7)), fall=0.1).phase is Phase.NORM_EXPANSION


def test_row_3_is_within_the_tolerance_of_the_threshold_or_just_below_it():
    def phase(stop, n, **known):
        return diagnose(run((0.9, 0.9, 10), (0.89, stop, n)), threshold=H_STAR, **known).phase

    assert phase(0.62, 28) is Phase.COLLAPSE_ONSET  # level 0.63
    assert phase(0.60, 30) is Phase.NEAR_THRESHOLD  # level 0.61
    assert phase(0.56, 34, test_accuracy=0.01) is Phase.NEAR_THRESHOLD  # below for 400 steps
    assert phase(0.50, 40) is Phase.NEAR_THRESHOLD  # below for long, but nobody looked at the accuracy
    assert phase(0.50, 40, test_accuracy=0.7) is Phase.NEAR_THRESHOLD  # it is generalising


def test_row_4_is_below_for_more_than_1_000_steps_with_a_low_test_accuracy():
    collapsed = run((0.9, 0.9, 10), (0.89, 0.50, 40))
    diagnosis = diagnose(collapsed, threshold=H_STAR, test_accuracy=0.01)
    assert diagnosis.phase is Phase.COLLAPSED_WITHOUT_GENERALISING
    assert "inductive bias" in diagnosis.action
    # The level is that of the evaluation before: below 0.6 from the 31st on, 9 evaluations ago at most.
    assert 1_000 <= diagnosis.evidence["steps_below"] <= 1_800
    assert (
        diagnose(collapsed, threshold=H_STAR, test_accuracy=0.01, imminent=2_000).phase
        is Phase.NEAR_THRESHOLD
    )


def test_row_5_is_no_fall_for_as_long_as_the_patience():
    assert diagnose(run((0.88, 0.87, 100)), threshold=H_STAR).phase is Phase.NORM_EXPANSION  # 19,800 steps
    stagnant = diagnose(run((0.88, 0.87, 101)), threshold=H_STAR)
    assert stagnant.phase is Phase.NO_COLLAPSE
    assert "weight decay" in stagnant.action
    # Half a collapse, and nothing since.
    half = run(PLATEAU, (0.9, 0.75, 16), (0.75, 0.75, 110))
    assert diagnose(half, threshold=H_STAR).phase is Phase.NO_COLLAPSE
    assert diagnose(half, threshold=H_STAR, patience=25_000).phase is Phase.COLLAPSE_ONSET
    # A slow fall is one.
    assert diagnose(run((0.88, 0.82, 101)), threshold=H_STAR).phase is Phase.COLLAPSE_ONSET


def test_a_run_at_the_criterion_has_generalised_whatever_its_entropy():
    for history in (run(PLATEAU), run(PLATEAU, COLLAPSE), History([], []), run((0.5, 0.5, 200))):
        assert diagnose(history, threshold=H_STAR, test_accuracy=0.99).phase is Phase.GENERALISED
    assert diagnose(run(PLATEAU), test_accuracy=0.98).phase is Phase.NORM_EXPANSION


def test_too_few_usable_evaluations_are_not_diagnosed():
    nan = math.nan
    assert diagnose(History([], [])).phase is Phase.NOT_ENOUGH_HISTORY
    assert diagnose(run((0.9, 0.9, 4))).phase is Phase.NOT_ENOUGH_HISTORY
    assert diagnose(run((0.9, 0.9, 5))).phase is Phase.NORM_EXPANSION
    # An old level says nothing of now.
    stale = diagnose(run(PLATEAU, (nan, nan, 3)))
    assert stale.phase is Phase.NOT_ENOUGH_HISTORY
    assert stale.evidence["unusable"] == 3
    assert stale.evidence["entropy"] is None
    assert diagnose(run(PLATEAU, (nan, nan, 2))).phase is Phase.NORM_EXPANSION


def test_an_entropy_that_starts_below_the_threshold_or_rises_has_not_collapsed():
    low = run((0.5, 0.55, 30))
    assert diagnose(low, threshold=H_STAR, test_accuracy=0.01).phase is Phase.NORM_EXPANSION
    assert diagnose(run((0.4, 0.9, 30)), threshold=H_STAR, test_accuracy=0.01).phase is Phase.NORM_EXPANSION
    assert diagnose(run((0.5, 0.55, 200)), threshold=H_STAR).phase is Phase.NO_COLLAPSE
    # Back up after a fall: the collapse is undone.
    assert diagnose(run((0.9, 0.8, 10), (0.8, 0.9, 10)), threshold=H_STAR).phase is Phase.NORM_EXPANSION


def test_without_a_threshold_a_collapse_is_never_near_or_below_it():
    diagnosis = diagnose(run(PLATEAU, COLLAPSE), test_accuracy=0.01)
    assert diagnosis.phase is Phase.COLLAPSE_ONSET
    assert diagnosis.evidence["gap"] is diagnosis.evidence["steps_below"] is None


CASES = [
    (run(PLATEAU), {}),
    (run(PLATEAU, (0.89, 0.7, 20)), {}),
    (run((0.9, 0.9, 10), (0.89, 0.60, 30)), {}),
    (run((0.9, 0.9, 10), (0.89, 0.45, 45)), {"test_accuracy": 0.01}),
    (run((0.88, 0.87, 120)), {}),
]


@settings(deadline=None)
@given(
    case=st.integers(0, 4),
    at=st.integers(3, 18),
    wild=st.just(math.nan) | st.floats(0, 1),
    seed=st.integers(0, 9999),
)
def test_one_wild_or_unusable_evaluation_and_small_noise_do_not_change_the_row(case, at, wild, seed):
    history, known = CASES[case]
    entropy = history.entropy + np.random.default_rng(seed).uniform(-0.003, 0.003, len(history))
    entropy[-at] = wild
    expected = [
        Phase.NORM_EXPANSION,
        Phase.COLLAPSE_ONSET,
        Phase.NEAR_THRESHOLD,
        Phase.COLLAPSED_WITHOUT_GENERALISING,
        Phase.NO_COLLAPSE,
    ][case]
    assert diagnose(History(history.step, entropy), threshold=H_STAR, **known).phase is expected


@settings(deadline=None)
@given(
    entropy=st.lists(st.floats(0, 1) | st.just(math.nan), max_size=30),
    threshold=st.none() | st.floats(0, 1),
    accuracy=st.none() | st.floats(0, 1),
    every=st.sampled_from([1, 200, 5_000]),
    normed=st.booleans(),
)
def test_any_history_has_a_diagnosis_with_json_evidence(entropy, threshold, accuracy, every, normed):
    step = every * np.arange(len(entropy))
    history = History(step, entropy, norm=1.0 + step if normed else None)
    diagnosis = diagnose(history, threshold=threshold, test_accuracy=accuracy)
    assert diagnosis.meaning
    assert diagnosis.action
    evidence = diagnosis.evidence
    assert json.loads(json.dumps(evidence, allow_nan=False)) == evidence
    if evidence["entropy"] is not None:
        assert 0 <= evidence["entropy"] <= evidence["peak"] <= 1
        assert 0 <= evidence["drop"] <= evidence["peak"] - evidence["entropy"]
        assert (evidence["gap"] is None) == (threshold is None)


def test_a_run_replayed_passes_through_the_rows_in_their_order():
    (whole,) = planted_runs(1, gamma=1.65, c2=600.0)
    early = History(
        np.append(np.arange(-1_000, 0, 100), whole.step) + 1_000,
        np.append(np.full(10, whole.entropy[0]), whole.entropy),
    )
    seen = [
        diagnose(early.until(step), threshold=0.625, test_accuracy=float(step == early.step[-1])).phase
        for step in early.step
    ]
    assert list(dict.fromkeys(seen)) == [
        Phase.NOT_ENOUGH_HISTORY,
        Phase.NORM_EXPANSION,
        Phase.COLLAPSE_ONSET,
        Phase.NEAR_THRESHOLD,
        Phase.GENERALISED,
    ]
    changes = sum(a is not b for a, b in itertools.pairwise(seen))
    assert changes == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": 4.0}, r"threshold must lie in \[0, 1\]"),
        ({"test_accuracy": 99.0}, r"test_accuracy must lie in \[0, 1\]"),
        ({"test_accuracy": math.nan}, r"test_accuracy must lie in \[0, 1\]"),
        ({"patience": 0}, "patience must be positive"),
        ({"fall": -0.1}, "fall must be positive"),
    ],
)
def test_tolerances_without_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        diagnose(run(PLATEAU), **arguments)


def test_nothing_is_said_of_a_norm_that_nobody_measured():
    for norm in (None, np.full(20, math.nan)):
        diagnosis = diagnose(run(PLATEAU, norm=norm))
        assert diagnosis.phase is Phase.NORM_EXPANSION
        assert diagnosis.evidence["norm_change"] is None
        assert "norm" not in diagnosis.meaning + diagnosis.action


def test_no_row_of_the_table_speaks_of_the_norm_by_itself():
    assert set(_TABLE) == set(Phase)
    assert [phase for phase, said in _TABLE.items() if "norm" in " ".join(said).lower()] == []


def test_a_patience_shorter_than_the_last_gap_between_levels_sees_no_fall():
    stale = run((0.9, 0.6, 30), (math.nan, math.nan, 2))
    assert diagnose(stale, patience=100).evidence["drop"] == 0.0
