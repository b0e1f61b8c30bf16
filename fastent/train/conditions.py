"""Interventions on training: a condition is one small object that the trainer applies at three places.

The baseline is no condition at all and costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

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

    def after_step(self, seeds: Sequence[int], step: int, parameters: dict[str, Tensor]) -> None:
        """Change the parameters, (S, ...) each, in place after step number `step` (from 1) of `seeds`."""
