"""When to stop training: policies for `SpectralEntropyMonitor.should_stop`.

A policy is a function of the monitor that answers whether it is time. It reads what the monitor recorded and
nothing else, so it cannot know whether the network generalises: entropy may fall without grokking.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class Monitored(Protocol):
    """What a policy may ask a monitor."""

    @property
    def crossed(self) -> bool:
        """Whether every watched layer has been below the threshold."""

    @property
    def crossings(self) -> dict[str, int]:
        """First step below the threshold by layer."""

    @property
    def last_step(self) -> int | None:
        """The newest step that the monitor was told of."""


@dataclass(frozen=True)
class StopAfterCrossing:
    """Stop once `steps` steps have passed since every watched layer's entropy went below the threshold.

    Parameters
    ----------
    steps : int
        0 stops at the crossing itself.

    Raises
    ------
    ValueError
        If `steps` is negative.
    """

    steps: int = 1000

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"steps must not be negative; got {self.steps}")

    def __call__(self, monitor: Monitored) -> bool:
        """Whether it is time."""
        if not monitor.crossed or monitor.last_step is None:
            return False
        return monitor.last_step - max(monitor.crossings.values()) >= self.steps
