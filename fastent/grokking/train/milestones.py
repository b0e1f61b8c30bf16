"""Quantities of one run: when it memorised, when it grokked, when its entropy fell, and by how much it led.

Pure functions of evaluation steps and values, after sections 3.3 and 5 of the paper; what its text leaves
open is settled here:

- ``T_mem``: first evaluation with train accuracy >= 0.99; ``T_grok``: first with test accuracy >= the
  criterion; ``T_grok`` sustained: the first of three such evaluations in a row.
- ``H*`` of a run: the normalised entropy at ``T_grok``. It needs test labels.
- ``T_cross(H*)``: first evaluation with ``H < H*``, strictly.
- ``T_collapse``: first evaluation where ``H`` lies more than ``tau`` below the largest of the five
  evaluations that end there. The window counts evaluations, so it spans ``4 * evaluate_every`` steps. ``tau =
  0.05`` is ours: the paper's text lost it.
- lead: ``T_grok - T_cross`` or ``T_grok - T_collapse``; positive when the entropy comes first.

A quantity that the run does not reach is None, never a step limit and never 0. An entropy whose status is
neither ``ok`` nor ``rank_limited`` takes no part: it can neither cross nor serve as the level that another
fell from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fastent.spectrum import Status

TAU = 0.05
WINDOW = 5
SUSTAINED = 3

Array = NDArray[np.float64]
Steps = NDArray[np.int64]


class Criteria(Protocol):
    """What `summarize_run` needs of a run's configuration; the trainer's config satisfies it."""

    @property
    def criterion(self) -> float:
        """Test accuracy that counts as grokking, in [0, 1]."""

    @property
    def memorised(self) -> float:
        """Train accuracy that counts as memorised, in [0, 1]."""


@dataclass(frozen=True)
class Trajectory:
    """The columns of a run's metrics that the quantities read, each of shape (m,), one entry per evaluation.

    `entropy` is the normalised entropy, NaN where its status makes it unusable; accuracies lie in [0, 1];
    `parameter_norm` is the Euclidean norm of all parameters.
    """

    step: Steps
    train_accuracy: Array
    test_accuracy: Array
    entropy: Array
    parameter_norm: Array

    @classmethod
    def from_rows(cls, rows: Sequence[Mapping[str, Any]]) -> Trajectory:
        """Columns of `rows`, the lines of a run's metrics in their order.

        Raises
        ------
        ValueError
            If there are no rows, their steps do not strictly increase, or a status is unknown.
        """
        if not rows:
            raise ValueError("the run holds no evaluation: its metrics are empty")
        step = np.array([row["step"] for row in rows], dtype=np.int64)
        if not (np.diff(step) > 0).all():
            at = int(np.argmin(np.diff(step) > 0))
            raise ValueError(f"steps must increase from row to row; step {step[at + 1]} follows {step[at]}")
        usable = np.array([Status(row["entropy_status"]).usable for row in rows])
        return cls(
            step=step,
            train_accuracy=_column(rows, "train_accuracy"),
            test_accuracy=_column(rows, "test_accuracy"),
            entropy=np.where(usable, _column(rows, "entropy"), np.nan),
            parameter_norm=_column(rows, "parameter_norm"),
        )


def _column(rows: Sequence[Mapping[str, Any]], key: str) -> Array:
    return np.array([np.nan if row[key] is None else row[key] for row in rows], dtype=np.float64)


def first_reaching(step: Steps, values: Array, level: float, *, in_a_row: int = 1) -> int | None:
    """Step of the first evaluation with ``values >= level``, or of the first of `in_a_row`; else None."""
    return _first(step, values >= level, in_a_row)


def first_below(step: Steps, entropy: Array, threshold: float) -> int | None:
    """``T_cross``: step of the first evaluation with ``entropy < threshold``, strictly; else None."""
    return _first(step, entropy < threshold, 1)


def first_collapse(step: Steps, entropy: Array, *, tau: float = TAU, window: int = WINDOW) -> int | None:
    """``T_collapse``: step where `entropy` first fell by more than `tau` within `window` evaluations.

    The fall is measured from the largest entropy among the `window` evaluations that end at the step, the
    step's own included. NaN (an unusable entropy) neither falls nor is fallen from.

    Parameters
    ----------
    step, entropy : arrays of shape (m,)
        Evaluation steps and the normalised entropy there.
    tau : float
        Smallest fall, in units of normalised entropy.
    window : int
        Number of evaluations, at least 2.

    Returns
    -------
    int or None

    Raises
    ------
    ValueError
        If `window` is below 2: a fall needs two evaluations.
    """
    if window < 2:
        raise ValueError(f"window must be at least 2 evaluations; got {window}")
    padded = np.concatenate([np.full(window - 1, -np.inf), np.where(np.isnan(entropy), -np.inf, entropy)])
    highest = np.lib.stride_tricks.sliding_window_view(padded, window).max(axis=1)
    # NaN - x > tau is False, so an unusable entropy never counts as a fall.
    return _first(step, highest - entropy > tau, 1)


def _first(step: Steps, hit: NDArray[np.bool_], in_a_row: int) -> int | None:
    if hit.size < in_a_row:
        return None
    runs = np.lib.stride_tricks.sliding_window_view(hit, in_a_row).all(axis=1)
    return int(step[np.argmax(runs)]) if runs.any() else None


def lead(t_grok: int | None, t_signal: int | None) -> int | None:
    """Return the steps by which a signal preceded ``T_grok``: negative when late, None without either."""
    return None if t_grok is None or t_signal is None else t_grok - t_signal


def value_at(step: Steps, values: Array, at: int | None) -> float | None:
    """Return `values` at evaluation step `at`; None if `at` is None, was not evaluated, or holds NaN."""
    hits = np.flatnonzero(step == at) if at is not None else np.array([], dtype=np.int64)
    return None if hits.size == 0 or np.isnan(values[hits[0]]) else float(values[hits[0]])


@dataclass(frozen=True)
class RunSummary:
    """What one run did: times in steps, entropies normalised (0 to 1), None where it did not get there.

    `h_star` is the entropy at `t_grok`, and `t_cross` and `lead_cross` are taken at that same run's `h_star`:
    a circular choice, because an entropy that only falls is first below its value at `t_grok` one evaluation
    after `t_grok`. Leads at a threshold from other runs come from `first_below` and `lead`.
    """

    t_mem: int | None
    t_grok: int | None
    t_grok_sustained: int | None
    h_star: float | None
    t_cross: int | None
    t_collapse: int | None
    lead_cross: int | None
    lead_collapse: int | None
    entropy_start: float | None
    entropy_at_mem: float | None
    entropy_max: float | None
    entropy_end: float | None
    norm_start: float | None
    norm_at_mem: float | None
    norm_at_grok: float | None
    norm_end: float | None
    train_accuracy_end: float | None
    test_accuracy_end: float | None
    last_step: int
    evaluations: int
    unusable: int


def summarize_run(
    rows: Sequence[Mapping[str, Any]] | Trajectory,
    config: Criteria,
    *,
    tau: float = TAU,
    window: int = WINDOW,
) -> RunSummary:
    """Every quantity of one run.

    Parameters
    ----------
    rows : sequence of mappings, or Trajectory
        The lines of the run's ``metrics.jsonl`` in their order.
    config : Criteria
        Gives `criterion` and `memorised`.
    tau, window : float, int
        Of `first_collapse`.

    Returns
    -------
    RunSummary

    Raises
    ------
    ValueError
        As `Trajectory.from_rows`.
    """
    run = rows if isinstance(rows, Trajectory) else Trajectory.from_rows(rows)
    step, entropy, norm = run.step, run.entropy, run.parameter_norm
    t_mem = first_reaching(step, run.train_accuracy, config.memorised)
    t_grok = first_reaching(step, run.test_accuracy, config.criterion)
    h_star = value_at(step, entropy, t_grok)
    t_cross = None if h_star is None else first_below(step, entropy, h_star)
    t_collapse = first_collapse(step, entropy, tau=tau, window=window)
    usable = entropy[~np.isnan(entropy)]
    first, last = int(step[0]), int(step[-1])
    return RunSummary(
        t_mem=t_mem,
        t_grok=t_grok,
        t_grok_sustained=first_reaching(step, run.test_accuracy, config.criterion, in_a_row=SUSTAINED),
        h_star=h_star,
        t_cross=t_cross,
        t_collapse=t_collapse,
        lead_cross=lead(t_grok, t_cross),
        lead_collapse=lead(t_grok, t_collapse),
        entropy_start=value_at(step, entropy, first),
        entropy_at_mem=value_at(step, entropy, t_mem),
        entropy_max=float(usable.max()) if usable.size else None,
        entropy_end=value_at(step, entropy, last),
        norm_start=value_at(step, norm, first),
        norm_at_mem=value_at(step, norm, t_mem),
        norm_at_grok=value_at(step, norm, t_grok),
        norm_end=value_at(step, norm, last),
        train_accuracy_end=value_at(step, run.train_accuracy, last),
        test_accuracy_end=value_at(step, run.test_accuracy, last),
        last_step=last,
        evaluations=int(step.size),
        unusable=int(step.size - usable.size),
    )
