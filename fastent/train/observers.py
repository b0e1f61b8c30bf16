"""Who is told of a run while it trains: a progress bar, a logger."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Protocol

from fastent.train.errors import RunWarning
from fastent.train.runs import Job, Row


class Observer(Protocol):
    """Takes the rows of runs and their ends, in order for each run."""

    def row(self, job: Job, seed: int, row: Row) -> None:
        """Take one line of the metrics."""

    def done(self, job: Job, seed: int) -> None:
        """Take note that the run is complete, now or since before."""


class Observers:
    """Several observers as one. What one of them raises costs a single `RunWarning`; the run goes on."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = observers
        self._failed: set[int] = set()

    def row(self, job: Job, seed: int, row: Row) -> None:
        """Pass one line of the metrics on."""
        for observer in self._observers:
            self._guarded(observer, functools.partial(observer.row, job, seed, row))

    def done(self, job: Job, seed: int) -> None:
        """Pass on that the run is complete."""
        for observer in self._observers:
            self._guarded(observer, functools.partial(observer.done, job, seed))

    def _guarded(self, observer: Observer, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            if id(observer) not in self._failed:
                self._failed.add(id(observer))
                warnings.warn(
                    f"{type(observer).__name__} failed ({error!r}); the run goes on without more warnings",
                    RunWarning,
                    stacklevel=3,
                )
