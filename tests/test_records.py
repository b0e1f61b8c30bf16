"""Records: what is kept, exact through JSON; crossings and courses that outlive a bounded list."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastent
from fastent import Status, spectral_entropy
from fastent.forecast.diagnosis import Phase
from fastent.forecast.history import History, recent_change
from fastent.grokking.train.milestones import first_collapse
from fastent.records import MEDIAN, PATIENCE, WINDOW, Collapse, Course, EntropyRecord, Recording, rows_of


def record(
    step: int, normalized: float, *, layer: str = "a", status: Status | None = None, d: int = 8
) -> EntropyRecord:
    status = status or (Status.NONFINITE if math.isnan(normalized) else Status.OK)
    return EntropyRecord(
        step=step,
        layer=layer,
        normalized=normalized,
        entropy=normalized * math.log(d),
        effective_rank=d**normalized,
        participation_ratio=1.5,
        total_variance=0.1,
        ceiling=1.0,
        status=status,
        flags=() if status is Status.OK else (status,),
        message="",
        n=100,
        d=d,
    )


def through_json(values: Any) -> Any:
    return json.loads(json.dumps(values, allow_nan=False))


def test_record_has_the_numbers_of_the_result_as_floats() -> None:
    result = spectral_entropy(torch.randn(5, 7, generator=torch.Generator().manual_seed(0)))
    kept = EntropyRecord.of(40, "blocks.0", result)
    for name in (
        "normalized",
        "entropy",
        "effective_rank",
        "participation_ratio",
        "total_variance",
        "ceiling",
    ):
        assert getattr(kept, name) == getattr(result, name)
        assert type(getattr(kept, name)) is float
    assert (kept.step, kept.layer, kept.n, kept.d) == (40, "blocks.0", 5, 7)
    assert kept.status is Status.RANK_LIMITED
    assert kept.flags == (Status.RANK_LIMITED,)
    assert kept.message == result.message != ""


def test_record_comes_back_from_strict_json_bit_for_bit() -> None:
    kept = record(3, 0.1 + 0.2, status=Status.RANK_LIMITED)
    assert EntropyRecord.from_dict(through_json(kept.as_dict())) == kept


def test_nan_and_infinity_survive_strict_json() -> None:
    bad = EntropyRecord.of(0, "a", spectral_entropy(torch.full((4, 3), math.nan)))
    values = bad.as_dict()
    assert values["normalized"] is None
    assert values["status"] == "nonfinite"
    back = EntropyRecord.from_dict(through_json(values))
    assert math.isnan(back.normalized)
    assert back.as_dict() == values
    huge = EntropyRecord.of(0, "a", spectral_entropy(torch.eye(4, dtype=torch.float64) * 1e200))
    assert huge.total_variance == math.inf
    assert EntropyRecord.from_dict(through_json(huge.as_dict())) == huge


def test_a_crossing_is_the_first_usable_record_below_the_threshold() -> None:
    recording = Recording(10, 0.5)
    rows = [
        (0, 0.9, Status.OK),
        (1, 0.0, Status.ZERO_VARIANCE),
        (2, math.nan, Status.NONFINITE),
        (3, 0.3, Status.UNRESOLVED_OFFSET),
        (4, 0.3, Status.OUT_OF_RANGE),
        (5, 0.5, Status.OK),
    ]
    for step, normalized, status in rows:
        recording.add(record(step, normalized, status=status))
        assert recording.crossings == {}
    recording.add(record(6, 0.4999, status=Status.RANK_LIMITED))
    recording.add(record(7, 0.9))
    recording.add(record(8, 0.1))
    assert recording.crossings == {"a": 6}


def test_a_crossing_and_a_width_outlive_their_record() -> None:
    recording = Recording(2, 0.5)
    for step, normalized in enumerate([0.4, 0.9, 0.9, 0.9]):
        recording.add(record(step, normalized))
    assert [kept.step for kept in recording.records] == [2, 3]
    assert recording.crossings == {"a": 0}
    again = Recording(2, 0.5)
    again.load_state_dict(through_json(recording.state_dict()))
    assert again.crossings == {"a": 0}
    assert list(again.records) == list(recording.records)
    with pytest.raises(ValueError, match="had d = 8 and now has d = 9"):
        again.check(4, "a", 9)
    with pytest.raises(ValueError, match="already has a record at step 3"):
        again.check(3, "a")
    again.check(4, "a", 8)


def test_another_threshold_finds_the_crossings_again_in_the_saved_records() -> None:
    recording = Recording(10, 0.5)
    for step, normalized in enumerate([0.9, 0.7, 0.4]):
        recording.add(record(step, normalized))
    state = through_json(recording.state_dict())
    for threshold, crossings in [(0.8, {"a": 1}), (0.2, {}), (None, {})]:
        other = Recording(10, threshold)
        other.load_state_dict(state)
        assert other.crossings == crossings


def test_a_state_that_cannot_be_read_changes_nothing() -> None:
    recording = Recording(10, 0.5)
    recording.add(record(0, 0.4))
    state = recording.state_dict()
    del state["collapse"]
    state["layers"], state["history"] = ({name: [] for name in state[part]} for part in ("layers", "history"))
    with pytest.raises(KeyError, match="collapse"):
        recording.load_state_dict(state)
    assert recording.crossings == {"a": 0}
    assert len(recording.records) == 1


# Collapses and thresholds of each layer

entropies = st.lists(st.floats(0, 1) | st.sampled_from([0.25, 0.5, 0.75, math.nan]), max_size=40)


@settings(deadline=None, max_examples=50)
@given(
    entropy=entropies,
    gaps=st.lists(st.integers(1, 300), min_size=40, max_size=40),
    collapse=st.builds(
        Collapse, st.sampled_from([0.05, 0.25, 0.5]), st.integers(1, 2_000), st.sampled_from([0, 0, 700])
    ),
    saved=st.integers(0, 40),
)
def test_a_collapse_is_that_of_its_definition_over_the_whole_run_wherever_it_was_saved(
    entropy, gaps, collapse, saved
):
    step = np.cumsum(gaps)[: len(entropy)].tolist()
    run = [(at, h) for at, h in zip(step, entropy, strict=True) if at >= collapse.since]
    falls = (
        at for at, h in run if any(at - collapse.within <= s <= at and x - h > collapse.fall for s, x in run)
    )
    expected = next(falls, None)
    recording, told = Recording(2, None, collapse), []
    for i, (at, h) in enumerate(zip(step, entropy, strict=True)):
        if i == saved:
            state = through_json(recording.state_dict())
            recording = Recording(2, None, collapse)
            recording.load_state_dict(state)
            assert recording.state_dict() == state
        recording.add(record(at, h))
        told += [recording.fallen.popleft().step for _ in list(recording.fallen)]
    assert recording.collapsed == ({} if expected is None else {"a": expected})
    assert told == list(recording.collapsed.values())


def test_a_collapse_by_default_is_t_collapse_of_the_study_at_its_200_steps():
    rng = np.random.default_rng(0)
    entropy = np.clip(0.8 + rng.normal(0, 0.02, (50, 60)).cumsum(1), 0, 1)
    entropy[rng.random(entropy.shape) < 0.1] = math.nan
    step = 200.0 * np.arange(60)
    expected = first_collapse(np.broadcast_to(step, entropy.shape), entropy)
    recording = Recording(1, None, Collapse())
    for layer, values in enumerate(entropy):
        for at, h in zip(step, values, strict=True):
            recording.add(record(int(at), float(h), layer=str(layer)))
    assert recording.collapsed == {str(i): int(at) for i, at in enumerate(expected) if not math.isnan(at)}
    assert 25 < len(recording.collapsed) < 50


def test_what_comes_before_since_is_no_collapse_and_no_level_to_fall_from():
    recording = Recording(10, None, Collapse(since=400))
    for step, h in [(0, 0.9), (200, 0.7), (400, 0.6), (600, 0.56)]:
        recording.add(record(step, h))
        assert recording.collapsed == {}
    recording.add(record(800, 0.5))
    assert recording.collapsed == {"a": 800}


def test_a_wild_value_of_an_unusable_record_neither_collapses_nor_is_fallen_from():
    recording = Recording(10, None, Collapse())
    for step, h, status in [
        (0, 0.8, Status.OK),
        (200, 0.1, Status.UNRESOLVED_OFFSET),
        (400, 0.9, Status.OUT_OF_RANGE),
        (600, 0.76, Status.OK),
        (1_000, 0.74, Status.OK),  # of the last 800 steps 0.76 is the highest
    ]:
        recording.add(record(step, h, status=status))
        assert recording.collapsed == {}
    recording.add(record(1_200, 0.70, status=Status.RANK_LIMITED))
    assert recording.collapsed == {"a": 1_200}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fall": 0.0}, r"fall is a difference of normalised entropies, in \(0, 1\); got 0.0"),
        ({"fall": 5}, "got 5"),
        ({"within": 0}, "within must be at least 1 step; got 0"),
        ({"since": -1}, "since is a step, 0 or more; got -1"),
    ],
)
def test_a_collapse_without_sense_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Collapse(**arguments)


def test_a_layer_has_the_threshold_of_its_name_else_of_the_first_pattern_that_fits():
    thresholds = {"blocks.*": 0.5, "**.mlp": 0.6, "blocks.1": 0.7}
    recording = Recording(10, thresholds)
    found = {"blocks.0": 0.5, "blocks.1": 0.7, "blocks.1.mlp": 0.6, "head": None}
    for layer, threshold in found.items():
        assert recording.threshold(layer) == threshold
        recording.add(record(0, 0.65, layer=layer))
    assert recording.crossings == {"blocks.1": 0}
    other = Recording(10, {**thresholds, "blocks.0": 0.66, "blocks.1": 0.6})
    other.load_state_dict(through_json(recording.state_dict()))  # each layer's is another, or the same
    assert other.crossings == {"blocks.0": 0}


# Courses


def of_the_whole(step, entropy, threshold, patience):
    """Evidence from the arrays of the whole run, by their definitions in `fastent.forecast.diagnosis.Evidence`."""
    step, entropy = np.array(step, dtype=float), np.array(entropy, dtype=float)
    usable = ~np.isnan(entropy)
    known = {
        "entropy": None,
        "peak": None,
        "drop": None,
        "gap": None,
        "steps_below": None,
        "steps_observed": float(step[-1] - step[0]) if len(step) else 0.0,
        "entropy_change": recent_change(step, entropy, WINDOW),
        "unusable": int((~usable[-WINDOW:]).sum()),
    }
    if len(step) >= WINDOW and usable[-WINDOW:].sum() >= MEDIAN:
        windows = np.lib.stride_tricks.sliding_window_view(entropy[usable], MEDIAN)
        at, level = step[usable][MEDIAN - 1 :], np.median(windows, axis=1)
        late = level[at >= step[-1] - patience]
        known |= {"entropy": level[-1], "peak": level.max()}
        known["drop"] = (late if len(late) else level[-1:]).max() - level[-1]
        if threshold is not None:
            above = np.flatnonzero(level >= threshold)
            since = at[above[-1] + 1 if len(above) else 0] if level[-1] < threshold else step[-1]
            known |= {"gap": level[-1] - threshold, "steps_below": step[-1] - since}
    return known


@settings(deadline=None)
@given(
    entropy=entropies,
    gaps=st.lists(st.integers(1, 300), min_size=40, max_size=40),
    threshold=st.none() | st.sampled_from([0.25, 0.5, 0.75]),
    patience=st.sampled_from([1.0, 200.0, 1_000.0, PATIENCE, math.inf]),
)
def test_a_diagnosis_is_that_of_the_definitions_over_the_whole_run(entropy, gaps, threshold, patience):
    step = np.cumsum(gaps)[: len(entropy)]
    diagnosis = fastent.diagnose(History(step, entropy), threshold=threshold, patience=patience)
    expected = of_the_whole(step, entropy, threshold, patience)
    assert {name: diagnosis.evidence[name] for name in expected} == expected


@settings(deadline=None)
@given(
    entropy=entropies,
    threshold=st.none() | st.sampled_from([0.25, 0.5, 0.75]),
    every=st.sampled_from([1, 200, 7_000]),
    size=st.integers(1, 12),
    saved=st.integers(0, 40),
)
def test_a_bounded_history_saved_anywhere_gives_the_diagnosis_of_the_whole(
    entropy, threshold, every, size, saved
):
    recording = Recording(size, threshold)
    for at, h in enumerate(entropy):
        if at == saved:
            state = through_json(recording.state_dict())
            recording = Recording(size, threshold)
            recording.load_state_dict(state)
            assert recording.state_dict() == state
        recording.add(record(every * at, h))
    monitor = fastent.SpectralEntropyMonitor(threshold=threshold, history_size=size)
    monitor._recording = recording
    whole = fastent.diagnose(History(every * np.arange(len(entropy)), entropy), threshold=threshold)
    assert monitor.diagnose() == whole
    assert len(monitor.history) == min(size, len(entropy))


@pytest.mark.parametrize("layers", [1, 48, 120])
def test_a_collapse_seen_long_ago_is_one_however_many_layers_share_the_monitor(layers):
    """At 0.9 for 2,000 steps, down to 0.4 by 4,000, there until 40,000; 401 evaluations of each layer."""
    recording = Recording(25, 0.6)
    for step in range(0, 40_001, 100):
        h = float(np.interp(step, [2_000, 4_000], [0.9, 0.4]))
        for layer in range(layers):
            recording.add(record(step, h, layer=f"blocks.{layer}"))
    monitor = fastent.SpectralEntropyMonitor(threshold=0.6, history_size=25)
    monitor._recording = recording
    for layer in (0, layers - 1):
        diagnosis = monitor.diagnose(layer=f"blocks.{layer}", test_accuracy=0.01)
        assert diagnosis.phase is Phase.COLLAPSED_WITHOUT_GENERALISING
        assert diagnosis.evidence["steps_observed"] == 40_000
        assert diagnosis.evidence["peak"] == 0.9
        assert diagnosis.evidence["steps_below"] == 40_000 - 3_400  # 0.6 at 3,200; the level lags by one
    assert len(monitor.history) == 25 * layers
    assert [kept.step for kept in monitor.history] == sorted(kept.step for kept in monitor.history)


def test_a_course_keeps_no_more_than_the_patience_however_long_the_run():
    course = Course(0.5, patience=100)
    for step in range(5_000):  # falling, so that every level is the highest of what follows
        course.add(step, 1 - step / 5_000)
    assert len(course.state_dict()["peaks"]) == 101
    assert course.recent_peak == pytest.approx(course.level + 100 / 5_000)


def test_another_threshold_is_looked_for_in_what_is_left_of_the_run():
    course = Course(0.3)
    values = list(enumerate(np.linspace(1.0, 0.4, 61).tolist()))
    for step, h in values:
        course.add(step, h)
    other = Course(0.7)
    other.load_state_dict(course.state_dict())
    other.find_below(values[-40:])
    assert other.below_since == 32  # H is below 0.7 from 31 on, its median of three one later
    other.find_below(values[-2:])
    assert other.below_since == 60  # below now, since when is not known
    none = Course(None)
    none.load_state_dict(course.state_dict())
    none.find_below(values)
    assert none.below_since is None


def test_a_state_of_version_1_gets_its_courses_from_its_records():
    recording = Recording(100, 0.6)
    for step in range(0, 4_000, 100):
        recording.add(record(step, float(np.interp(step, [2_000, 3_000], [0.9, 0.4]))))
    state = recording.state_dict()
    old = {**state, "history": rows_of(state["history"])}
    old["layers"] = {row.pop("name"): row for row in rows_of(state["layers"])}
    again = Recording(100, 0.6)
    again.load_state_dict(old)
    assert again.state_dict() == state
