"""Row 10 of the faults: the clock jumps."""

import time

import pytest

from fastent.grokking.train.loop import Clock
from fastent.grokking.train.storage import RunWarning


def test_a_wall_clock_set_back_warns_once_and_durations_stay_right(monkeypatch):
    wall, monotonic = [1_000_000.0], [50.0]
    monkeypatch.setattr(time, "time", lambda: wall[0])
    monkeypatch.setattr(time, "monotonic", lambda: monotonic[0])
    clock = Clock()
    wall[0], monotonic[0] = 1_000_010.0, 60.0
    assert clock.read() == (1_000_010.0, 10.0)
    wall[0], monotonic[0] = 996_420.0, 70.0
    with pytest.warns(RunWarning, match="the wall clock moved by -3600 s"):
        assert clock.read() == (996_420.0, 20.0)
    monotonic[0] = 80.0
    assert clock.read() == (996_420.0, 30.0)  # a second warning would be an error
