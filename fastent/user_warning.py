"""A warning that points at the user's line, however deep in the package it arises."""

from __future__ import annotations

import functools
import sys
import warnings
from types import FrameType


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
    # What `fastent.uncompiled` leaves out of a compiler is called by a frame of the compiler's.
    return module.partition(".")[0] == "fastent" or module == "torch._dynamo.eval_frame"
