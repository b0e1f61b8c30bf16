"""Columns of a run's metrics beside the usual ones: what `fastent.train.measures` adds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fastent.experiments.statistics import Estimate, bootstrap
from fastent.experiments.stored import StoredRun
from fastent.spectrum import Status
from fastent.train.quantities import MeasuredRun, summarize_run, value_at

Array = NDArray[np.float64]


def column(run: StoredRun, name: str) -> Array | None:
    """Return a column, shape (m,), NaN where the run has no number; None if it was not recorded."""
    if not run.rows or name not in run.rows[0]:
        return None
    return np.array([np.nan if row[name] is None else row[name] for row in run.rows], dtype=np.float64)


def entropy_column(run: StoredRun, name: str) -> Array | None:
    """Return a further entropy, NaN where its status makes it unusable; None if it was not recorded."""
    values = column(run, name)
    if values is None:
        return None
    usable = [Status(row[f"{name}_status"]).usable for row in run.rows]
    return np.where(usable, values, np.nan)


def with_entropy(run: MeasuredRun, entropy: Array) -> MeasuredRun:
    """Return `run` as a monitor on another probe would have seen it: the same but for `entropy`, (m,)."""
    trajectory = replace(run.trajectory, entropy=entropy)
    return replace(run, trajectory=trajectory, summary=summarize_run(trajectory, run.levels))


def values_at(
    stored: Sequence[StoredRun], measured: Sequence[MeasuredRun], name: str, steps: Sequence[int | None]
) -> list[float | None]:
    """Value of a column at one step of each run; None where there is none."""
    found = []
    for run, one, at in zip(stored, measured, steps, strict=True):
        values = column(run, name)
        found.append(None if values is None else value_at(one.trajectory.step, values, at))
    return found


def over(values: Sequence[float | None]) -> Estimate | None:
    """Mean of what is known, with its bootstrap interval; None if nothing is."""
    known = [float(value) for value in values if value is not None and np.isfinite(value)]
    return bootstrap(known) if known else None
