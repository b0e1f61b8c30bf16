"""The slim trainer: tasks, seed-stacked models, loop and run folders; `train` for runs of one's own.

What is listed here is for those who add a task, a model, a condition or a measure (docs/extending.md).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastent.grokking.train.config import TrainConfig, preset
    from fastent.grokking.train.measures import Grouped, Moment
    from fastent.grokking.train.models import Condition
    from fastent.grokking.train.own import train
    from fastent.grokking.train.registry import register
    from fastent.grokking.train.tasks import Task, task_of_table

__all__ = [
    "Condition",
    "Grouped",
    "Moment",
    "Task",
    "TrainConfig",
    "preset",
    "register",
    "task_of_table",
    "train",
]

_PLACES = {
    "Condition": "models",
    "Grouped": "measures",
    "Moment": "measures",
    "Task": "tasks",
    "TrainConfig": "config",
    "preset": "config",
    "register": "registry",
    "task_of_table": "tasks",
    "train": "own",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: the command line parses settings without the trainer."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
