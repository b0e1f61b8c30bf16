"""What each experiment asks the trainer for: a function from settings and seeds to jobs.

An experiment varies what it is about (a task, a condition) and takes everything else from the settings it is
given, a preset with the command line's changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fastent.train.presets import TrainConfig
from fastent.train.runs import Job

Jobs = Callable[[TrainConfig, Sequence[int]], list[Job]]


def e1(config: TrainConfig, seeds: Sequence[int]) -> list[Job]:
    """E1, does the collapse of the entropy precede grokking: the settings as they are."""
    return [Job("e1", "baseline", config, tuple(seeds))]


JOBS: dict[str, Jobs] = {"e1": e1}
"""By id, every experiment that can be run."""
