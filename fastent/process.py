"""The process that fastent runs in: whose line a warning names, what a compiler leaves out, Ctrl-C, the end.

The library calls OpenBLAS by address and reads numbers on the host, which a compiler either breaks up or fails on, so
its functions are `uncompiled`: they run as plain Python where a compiled function calls them.
`torch.compiler.disable` does that too, and imports the compiler, which takes a second; here it is asked only once
somebody else has imported it, since nothing is compiled before.

Ctrl-C could come between any two instructions, in the middle of undoing too. So it is noted, and raised when what must
not be left half done is done. A second one is raised at once while the model runs, a third one wherever it comes. Only
the main thread gets it.

What living objects still have to do when the interpreter ends is done within `EXIT_SECONDS`.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # as `signal`, whose enums take longer than the rest
import atexit
import functools
import logging
import os
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, ParamSpec, Protocol, TypeVar

import torch


def warn_user(message: str, category: type[Warning]) -> None:
    """Warn at the innermost frame outside of this package."""
    level = 1
    frame: FrameType | None = sys._getframe(0)
    while frame is not None and _is_ours(frame.f_globals.get("__name__", "")):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


@functools.cache
def warn_of_detached(function: str) -> None:
    """Warn, once in a process, that no gradient flows through what `function` returns."""
    warn_user(
        f"fastent.{function} was given activations that require a gradient, and none flows through its result: it "
        "cannot be part of a loss. Give it h.detach() if that is meant. Said once",
        UserWarning,
    )


def _is_ours(module: str) -> bool:
    # What `fastent.process` leaves out of a compiler is called by a frame of the compiler's.
    return module.partition(".")[0] == "fastent" or module == "torch._dynamo.eval_frame"


_REASON = (
    "fastent reads numbers on the host and calls libraries by address: call it outside of the compiled function, or "
    "compile without fullgraph=True"
)

P = ParamSpec("P")
R = TypeVar("R")


def uncompiled(function: Callable[P, R]) -> Callable[P, R]:
    """Return `function` as one that is never traced, with all that it calls."""
    disabled: list[Callable[P, R]] = []

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if not disabled:
            disabled.append(torch.compiler.disable(function, reason=_REASON))  # type: ignore[no-untyped-call]
            torch._dynamo.eval_frame.skip_code(call.__code__)  # type: ignore[attr-defined]  # nor this wrapper
        return disabled[0](*args, **kwargs)

    return call


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


EXIT_SECONDS = 10.0

_log = logging.getLogger(__name__)


class Finishing(Protocol):
    """An object that may have something under way."""

    def finish(self, deadline: float) -> None:
        """Bring it to an end until `deadline`, a value of `time.monotonic`."""


_owners: weakref.WeakKeyDictionary[Finishing, int] = weakref.WeakKeyDictionary()


def at_exit(owner: Finishing) -> None:
    """Have ``owner.finish`` called at the regular end of this process, if it lives then. In no particular order."""
    _register()
    _owners[owner] = os.getpid()


@functools.cache
def _register() -> None:
    atexit.register(_finish_all)


def _finish_all() -> None:
    deadline = time.monotonic() + EXIT_SECONDS
    for owner, pid in list(_owners.items()):
        if pid != os.getpid():  # a forked child has neither its threads nor its results
            continue
        try:
            owner.finish(deadline)
        except Exception as error:  # the others still have their turn
            _log.warning("at the end of the process: %s: %s", type(error).__name__, error)
