"""The slim trainer: tasks, seed-stacked models, loop and run folders."""

from __future__ import annotations
