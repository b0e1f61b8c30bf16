"""Records: what is kept, exact through JSON, and crossings that outlive a bounded list."""

import json
import math
from typing import Any

import pytest
import torch

from fastent import Status, spectral_entropy
from fastent.records import EntropyRecord, Recording


def record(step: int, normalized: float, *, layer: str = "a", status: Status = Status.OK, d: int = 8) -> Any:
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
    del state["threshold"]
    state["layers"], state["history"] = {}, []
    with pytest.raises(KeyError, match="threshold"):
        recording.load_state_dict(state)
    assert recording.crossings == {"a": 0}
    assert len(recording.records) == 1
