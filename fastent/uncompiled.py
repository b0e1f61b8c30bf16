"""Functions that a compiler leaves out: they run as plain Python where a compiled function calls them.

The library calls OpenBLAS by address and reads numbers on the host, which a compiler either breaks up or fails on.
`torch.compiler.disable` does that too, and imports the compiler, which takes a second; here it is asked only once
somebody else has imported it, since nothing is compiled before.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

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
