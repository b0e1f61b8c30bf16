"""Interventions on training: a condition is one small object that the trainer applies at three places.

The baseline is no condition at all and costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


class Condition:
    """Leaves training as it is; a subclass overrides what it changes.

    A condition holds no state that a run accumulates: what it does is a function of the seed, the step and
    the tensors at hand, so that a run resumes exactly.
    """

    def before_head(self, hidden: Tensor) -> Tensor:
        """Return what the head is trained on, (S, k N, d), for the batch's representations (S, N, d).

        The labels are repeated k times, and the loss is the mean over the k N rows. Evaluation and the
        entropy see the representations themselves.
        """
        return hidden

    def before_head_gradient(self, grad: Tensor) -> Tensor:
        """Gradient of `before_head`: (S, k N, d) to (S, N, d)."""
        return grad

    def numbers(self, seeds: Sequence[int], step: int) -> list[NDArray[np.float64]]:
        """Return what `after_step` needs of this host after step number `step` (from 1) of `seeds`.

        The shapes are the same at every step: on a GPU these numbers are there before the step is launched.
        """
        return []

    def after_step(self, parameters: dict[str, Tensor], numbers: Iterator[Tensor]) -> None:
        """Change the parameters, (S, ...) each, in place after a step.

        `numbers` gives what the method of that name returned, as tensors beside the parameters: take as many.
        Tensors are not to be read on the host here, or the step could not be captured as a CUDA graph.
        """
