"""What can go wrong with a run folder, by name. Each message says what to do about it."""

from __future__ import annotations


class RunError(RuntimeError):
    """A run cannot start or go on; what is on disk is left as it was."""


class RunLocked(RunError):
    """Another process holds the run folder."""


class CheckpointError(RunError):
    """One checkpoint cannot be used; the one before it may."""


class RowsLost(CheckpointError):
    """A checkpoint is whole, but not the rows of metrics before it."""


class Interrupted(RunError):
    """A signal asked the run to stop, and it stopped after saving.

    Attributes
    ----------
    signal : int
        The signal's number; the exit status of a shell command is 128 more.
    """

    def __init__(self, signal: int, message: str) -> None:
        super().__init__(message)
        self.signal = signal


class RunWarning(UserWarning):
    """The run goes on, but something about it is not as it should be."""
