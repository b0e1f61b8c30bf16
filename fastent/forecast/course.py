"""What a diagnosis and a forecast need of a run so far, evaluation by evaluation and in bounded memory.

The level of a run is the median of three usable evaluations in a row, so that a single wild one decides nothing. Kept
are the highest level ever, the highest of the last `patience` steps (as the levels that no later one exceeds, at
most one for each step), since when the level is below the threshold, the first step, and the latest evaluations.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

WINDOW = 5
MEDIAN = 3
PATIENCE = 20_000.0


class Course:
    """Running summary of one layer's normalised entropy.

    Parameters
    ----------
    threshold : float or None
        Level to be below.
    patience : float
        Steps over which `recent_peak` looks back.

    Attributes
    ----------
    first : int, float or None
        Step of the first evaluation.
    peak : float or None
        The highest level ever.
    below_since : int, float or None
        Step at which the level last went below the threshold; None at or above it, or without one.

    Examples
    --------
    >>> course = Course(threshold=0.7, patience=400)
    >>> for step, entropy in enumerate([0.9, 0.9, 0.9, 0.8, 0.6, 0.5, 0.4]):
    ...     course.add(200 * step, entropy)
    >>> course.level, course.peak, course.recent_peak, course.below_since
    (0.5, 0.9, 0.8, 1000)
    """

    def __init__(self, threshold: float | None, patience: float = PATIENCE) -> None:
        self.threshold, self.patience = threshold, patience
        self.first: float | None = None
        self.peak: float | None = None
        self.below_since: float | None = None
        self._recent: deque[tuple[float, float]] = deque(maxlen=WINDOW)
        self._usable: deque[float] = deque(maxlen=MEDIAN)
        self._peaks: deque[tuple[float, float]] = deque()  # steps rise, levels fall

    def add(self, step: float, entropy: float) -> None:
        """Take the next evaluation; NaN is an unusable one."""
        if self.first is None:
            self.first = step
        self._recent.append((step, entropy))
        if math.isnan(entropy):
            return
        self._usable.append(entropy)
        level = self.level
        if level is None:
            return
        self.peak = level if self.peak is None else max(self.peak, level)
        while self._peaks and self._peaks[-1][1] <= level:
            self._peaks.pop()
        self._peaks.append((step, level))
        self._forget(step)
        if self.threshold is None or level >= self.threshold:
            self.below_since = None
        elif self.below_since is None:
            self.below_since = step

    @property
    def last(self) -> float | None:
        """Step of the latest evaluation."""
        return self._recent[-1][0] if self._recent else None

    @property
    def recent(self) -> list[tuple[float, float]]:
        """Steps and entropies of the latest evaluations, 5 at most."""
        return list(self._recent)

    @property
    def level(self) -> float | None:
        """Median of the last three usable evaluations; None before there are so many."""
        return sorted(self._usable)[MEDIAN // 2] if len(self._usable) == MEDIAN else None

    @property
    def recent_peak(self) -> float | None:
        """The highest level of the last `patience` steps; the latest level counts wherever it is."""
        if self._recent:
            self._forget(self._recent[-1][0])
        return self._peaks[0][1] if self._peaks else None

    def state_dict(self) -> dict[str, Any]:
        """State as plain JSON values; NaN is None."""
        return {
            "first": self.first,
            "peak": self.peak,
            "below_since": self.below_since,
            "recent": [[step, None if math.isnan(h) else h] for step, h in self._recent],
            "usable": list(self._usable),
            "peaks": [list(item) for item in self._peaks],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace everything by what `state_dict` gave, for the same threshold and patience.

        Raises
        ------
        KeyError, TypeError, ValueError
            For anything else. Nothing is replaced then.
        """
        single = {name: checked_number(name, state[name]) for name in ("first", "peak", "below_since")}
        recent = [
            (_number("a step", step), math.nan if h is None else _number("H", h))
            for step, h in state["recent"]
        ]
        usable = [_number("H", h) for h in state["usable"]]
        peaks = [(_number("a step", step), _number("a peak", level)) for step, level in state["peaks"]]
        self.first, self.peak, self.below_since = single["first"], single["peak"], single["below_since"]
        self._recent, self._usable = deque(recent, WINDOW), deque(usable, MEDIAN)
        self._peaks = deque(peaks)

    def find_below(self, evaluations: Iterable[tuple[float, float]]) -> None:
        """Find `below_since` again in what is left of the run, for a threshold that is not the saved one.

        Exact as far back as `evaluations` go; where the level was below the threshold in all of them, and had been
        above it before, the first of them stands for the step that is not known.
        """
        rest = Course(self.threshold, self.patience)
        for step, entropy in evaluations:
            rest.add(step, entropy)
        self.below_since = rest.below_since
        level, threshold = self.level, self.threshold
        if rest.level is None and level is not None and threshold is not None and level < threshold:
            self.below_since = self.last

    def _forget(self, now: float) -> None:
        while len(self._peaks) > 1 and self._peaks[0][0] < now - self.patience:
            self._peaks.popleft()


def checked_number(name: str, value: Any) -> float | None:
    """Give a saved number or None, or raise ValueError."""
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    raise ValueError(f"{name} must be a number or null; got {value!r}")


def _number(name: str, value: Any) -> float:
    number = checked_number(name, value)
    if number is None:
        raise ValueError(f"{name} must be a number; got null")
    return number
