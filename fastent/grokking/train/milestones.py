"""Moments of runs: when they memorised and grokked, and when their entropy fell.

Pure functions of evaluation steps and values with evaluations along the last axis, (..., m), after sections 3.3 and 5
of the paper; what its text leaves open is settled here:

- ``T_mem``: first evaluation with train accuracy >= 0.99; ``T_grok``: first with test accuracy >= the
  criterion; ``T_grok`` sustained: the first of three such evaluations in a row.
- ``H*`` of a run: the normalised entropy at ``T_grok``. It needs test labels.
- ``T_cross(H*)``: first evaluation with ``H < H*``, strictly.
- ``T_collapse``: first evaluation where ``H`` lies more than ``tau`` below the largest of the five
  evaluations that end there. The window counts evaluations, so it spans ``4 * evaluate_every`` steps. ``tau =
  0.05`` is the paper's. What comes before ``T_mem`` is for the caller to leave out: a network that memorises changes
  its entropy by more than that, whether it will grok or not.

A moment that a run does not reach is NaN, never a step limit and never 0. A NaN entropy (its status makes it unusable)
takes no part: it can neither cross nor serve as the level that another fell from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastent.grokking.train.config import TrainConfig

TAU = 0.05
WINDOW = 5
SUSTAINED = 3

Array = NDArray[np.float64]


def first(step: Array, hit: NDArray[np.bool_], in_a_row: int = 1) -> Array:
    """Step of the first evaluation where `hit` (..., m) holds, or of the first of `in_a_row`; (...)."""
    if hit.shape[-1] < in_a_row:
        return np.full(hit.shape[:-1], np.nan)
    all_hit = np.lib.stride_tricks.sliding_window_view(hit, in_a_row, axis=-1).all(axis=-1)
    at = all_hit.argmax(axis=-1)[..., None]
    found = np.where(np.take_along_axis(all_hit, at, -1), np.take_along_axis(step, at, -1), np.nan)
    return found[..., 0]


def first_collapse(step: Array, entropy: Array, *, tau: float = TAU, window: int = WINDOW) -> Array:
    """``T_collapse``: first step with an `entropy` more than `tau` below the largest of `window` evaluations; (...).

    The evaluations are those that end at the step, its own among them.

    Raises
    ------
    ValueError
        If `window` is below 2: a fall needs two evaluations.
    """
    if window < 2:
        raise ValueError(f"window must be at least 2 evaluations; got {window}")
    known = np.where(np.isnan(entropy), -np.inf, entropy)
    before = np.full((*known.shape[:-1], window - 1), -np.inf)
    padded = np.concatenate([before, known], axis=-1)
    highest = np.lib.stride_tricks.sliding_window_view(padded, window, axis=-1).max(axis=-1)
    # A comparison with NaN is False, so an unusable entropy never counts as a fall.
    return first(step, highest - entropy > tau)


class Reached:
    """What one run has reached, row by row of its metrics: the steps that DONE holds, None where it has not.

    Attributes
    ----------
    t_mem, t_grok, t_grok_sustained : int or None
    """

    def __init__(self, config: TrainConfig) -> None:
        self.t_mem: int | None = None
        self.t_grok: int | None = None
        self.t_grok_sustained: int | None = None
        self._config = config
        self._in_a_row: list[int] = []  # steps at the criterion, without one below it in between

    def add(self, row: Mapping[str, Any]) -> None:
        """Take the next row; an accuracy of null, which was not finite, reaches nothing."""
        step, train, test = row["step"], row.get("train_accuracy"), row.get("test_accuracy")
        if self.t_mem is None and train is not None and train >= self._config.memorised:
            self.t_mem = step
        if self.t_grok_sustained is not None:
            return
        if test is None or not test >= self._config.criterion:
            self._in_a_row.clear()
            return
        if self.t_grok is None:
            self.t_grok = step
        self._in_a_row.append(step)
        if len(self._in_a_row) == SUSTAINED:
            self.t_grok_sustained = self._in_a_row[0]

    def as_json(self) -> dict[str, int | None]:
        """Return the steps by name."""
        return {"t_mem": self.t_mem, "t_grok": self.t_grok, "t_grok_sustained": self.t_grok_sustained}
