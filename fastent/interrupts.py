"""Ctrl-C that waits until what must not be left half done is done.

It could come between any two instructions, in the middle of undoing too. So it is noted, and raised at the end. A
second one is raised at once while the model runs, a third one wherever it comes. Only the main thread gets it.
"""

from __future__ import annotations

# Not `signal`, which makes enums of what it gives: 10 us for each call.
import _signal  # type: ignore[import-not-found]
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interrupts:
    """Handler of Ctrl-C that takes note and hands on to `handler` later."""

    def __init__(self, handler: Callable[[int, FrameType | None], Any]) -> None:
        self._handler = handler
        self._waiting = 0
        self._second_at_once = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle the signal."""
        self._waiting += 1
        if self._waiting == 1 or (self._waiting == 2 and not self._second_at_once):
            return
        self._waiting = 0  # if it raises, what is undone from here on is not interrupted
        self._second_at_once, before = False, self._second_at_once
        self._handler(number, frame)
        self._second_at_once = before

    @contextmanager
    def second_at_once(self) -> Iterator[None]:
        """Hand on a second one without waiting, for what may take too long."""
        before, self._second_at_once = self._second_at_once, True
        try:
            yield
        finally:
            self._second_at_once = before

    @contextmanager
    def all_held(self) -> Iterator[None]:
        """Keep a second one too, within `second_at_once`."""
        before, self._second_at_once = self._second_at_once, False
        try:
            yield
        finally:
            self._second_at_once = before

    def release(self) -> None:
        """Put the handler back, and hand on what waited."""
        installed: Any = _signal.getsignal(_signal.SIGINT)
        if installed is self:  # not one that was set meanwhile
            _signal.signal(_signal.SIGINT, self._handler)
        if self._waiting:
            self._waiting = 0
            self._handler(_signal.SIGINT, sys._getframe())


@contextmanager
def interrupts_held() -> Iterator[Interrupts]:
    """Hold Ctrl-C inside; within another such block, until that one ends."""
    handler = _signal.getsignal(_signal.SIGINT)
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield Interrupts(_ignore)
        return
    if isinstance(handler, Interrupts):
        yield handler
        return
    held = Interrupts(handler)
    try:
        _signal.signal(_signal.SIGINT, held)
        yield held
    finally:
        held.release()


def _ignore(number: int, frame: FrameType | None) -> None: ...
