"""What living objects still have to do when the interpreter ends, all of them within `EXIT_SECONDS`."""

from __future__ import annotations

import atexit
import functools
import logging
import os
import time
import weakref
from typing import Protocol

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
