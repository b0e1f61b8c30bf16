"""Durations that a moved wall clock cannot make negative."""

from __future__ import annotations

import time
import warnings

from fastent.train.errors import RunWarning

TOLERANCE = 5.0
"""Seconds by which wall clock and monotonic clock may part before it is called a jump."""


class Clock:
    """Time since its making. Warns once if the wall clock jumps (it was set, or the machine slept)."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._offset = time.time() - self._start
        self._warned = False

    def read(self) -> tuple[float, float]:
        """Return the wall clock (seconds since 1970) and the monotonic seconds since the start."""
        wall, monotonic = time.time(), time.monotonic()
        jump = wall - monotonic - self._offset
        if abs(jump) > TOLERANCE and not self._warned:
            self._warned = True
            warnings.warn(
                f"the wall clock moved by {jump:+.0f} s; durations are taken from the monotonic clock",
                RunWarning,
                stacklevel=2,
            )
        return wall, monotonic - self._start
