"""Conditions of training: the paper's interventions by name, each one small object applied at three places.

Mixed representations (E2), a held parameter norm (E3), and both. The baseline is no condition at all and costs nothing.
A condition's name says what it does, its parts joined by "+":

- ``losses-<alpha>``: the head is trained on the representations and on their mixture, the two losses averaged
  (the formula of Appendix C). ``logits-<alpha>``: the two logits averaged (the text of Appendix C). The head is
  affine, so that is the loss of its answer to ``(h + h~) / 2``: mixing alone, with half the alpha.
- ``norm-start``: after each step all parameters are scaled by one factor, so that their common Euclidean norm
  stays what it was at initialisation. ``norm-start-each``: each tensor by its own factor; a tensor that starts
  at 0 is left free. ``norm-as-<condition>``: the common norm follows that of the same seed's complete run under
  another condition, log-linear between its evaluations and constant after its end. ``norm-mem``: it follows the
  baseline's until that has memorised, and is held there.

Scaling changes the parameters only: AdamW's two moments stay as they are. They are means of gradients that were
taken at the same norm, or nearly, as the wanted norm moves little within their memory (10 and 50 steps).
Evaluation and entropy see the representations as they are, never mixed.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastent.grokking.train.config import TrainConfig
from fastent.grokking.train.models import initial_parameters
from fastent.grokking.train.runs import Job, read_settings
from fastent.grokking.train.storage import RunError, read_rows
from fastent.grokking.train.tasks import make_task
from fastent.mixing import mix_representations


class Condition:
    """Training as it is; a subclass overrides what it changes.

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


NONE = ("baseline", "to-the-end")
"""Conditions that leave the training as it is and differ in the experiment's settings, if at all."""

SETTINGS = "with-"
"""The same goes for every condition that begins so: it names settings, such as "with-mlp-sum"."""

_AS, _MEM = "norm-as-", "norm-mem"

Average = Literal["losses", "logits"]
Norms = Callable[[int, int], Sequence[float]]
"""Norms to hold, by seed and step: a single one for all parameters together, or one for each tensor."""


def make_condition(job: Job, out: Path) -> Condition | None:
    """Return what the condition of `job` does to its training; None if nothing.

    Parameters
    ----------
    job : Job
        Its `condition` is a name as above.
    out : Path
        Folder of the run folders, where the run is whose norm is followed.

    Raises
    ------
    RunError
        If no condition is called that, or the run to follow is missing, incomplete or of other settings.
    """
    if job.condition in NONE or job.condition.startswith(SETTINGS):
        return None
    parts = [_part(text, job, out) for text in job.condition.split("+")]
    return parts[0] if len(parts) == 1 else InTurn(parts)


def followed(condition: str) -> str | None:
    """Name the condition whose runs must be complete before those of `condition` can start, if any.

    Examples
    --------
    >>> followed("losses-0.1+norm-as-baseline")
    'baseline'
    """
    for part in reversed(condition.split("+")):
        if part == _MEM:
            return "baseline"
        if part.startswith(_AS):
            return part.removeprefix(_AS)
    return None


def source_job(job: Job) -> Job | None:
    """Return the runs whose norms those of `job` follow: E1's baseline, or E2's runs under a mixing."""
    condition = followed(job.condition)
    if condition is None:
        return None
    return Job("e1" if condition == "baseline" else "e2", condition, job.config, job.seeds)


def _part(text: str, job: Job, out: Path) -> Condition:
    if found := re.fullmatch(r"(losses|logits)-(\d*\.?\d+)", text):
        return Mixing(float(found[2]), "losses" if found[1] == "losses" else "logits")
    if text in ("norm-start", "norm-start-each"):
        return HeldNorm(_starting_norms(job.config, each=text.endswith("each")))
    if text == _MEM or text.startswith(_AS):
        return HeldNorm(_followed_norms(job, out, until_memorised=text == _MEM))
    raise RunError(
        f"no condition is called {job.condition!r}; there are {', '.join(NONE)}, losses-0.1, logits-0.1, "
        "norm-start, norm-start-each, norm-mem, norm-as-baseline, and several of these joined by +"
    )


class Mixing(Condition):
    """Training of the head on representations mixed along the batch, whose order is random: the paper's E2.

    Parameters
    ----------
    alpha : float
        Weight of the next row of the batch, 0 to 1 (no unit).
    average : {"losses", "logits"}
        What is averaged over the original and the mixed representations.
    """

    def __init__(self, alpha: float, average: Average) -> None:
        if not 0 <= alpha <= 1:
            raise RunError(f"alpha must lie in [0, 1]; got {alpha:g}")
        self.average = average
        self.alpha = alpha if average == "losses" else alpha / 2

    def before_head(self, hidden: Tensor) -> Tensor:
        """Append the mixed rows, (S, N, d) to (S, 2 N, d), or put them in the place of the original."""
        mixed = mix_representations(hidden, self.alpha)
        return torch.cat([hidden, mixed], 1) if self.average == "losses" else mixed

    def before_head_gradient(self, grad: Tensor) -> Tensor:
        """Gradient of `before_head`."""
        if self.average == "logits":
            return self._mixed_gradient(grad)
        own, mixed = grad.chunk(2, 1)
        return own + self._mixed_gradient(mixed)

    def _mixed_gradient(self, grad: Tensor) -> Tensor:
        # The transpose of a cyclic shift by -1 is the shift by 1.
        return mix_representations(grad, self.alpha, shift=-1)


class HeldNorm(Condition):
    """Scaling of the parameters after each step to given Euclidean norms.

    Parameters
    ----------
    norms : function of seed and step
        One norm for all parameters of a seed together, or one for each tensor in their order. 0 leaves free.
    """

    def __init__(self, norms: Norms) -> None:
        self._norms = norms

    def numbers(self, seeds: Sequence[int], step: int) -> list[NDArray[np.float64]]:
        """Return the norms to hold, (1, S) or (tensors, S)."""
        return [np.array([self._norms(seed, step) for seed in seeds], dtype=np.float64).T]

    def after_step(self, parameters: dict[str, Tensor], numbers: Iterator[Tensor]) -> None:
        """Scale the parameters, (S, ...) each, in place."""
        tensors, wanted = list(parameters.values()), next(numbers)
        now = torch.stack(
            [torch.linalg.vector_norm(t.flatten(1), dim=1, dtype=torch.float64) for t in tensors]
        )
        if len(wanted) == 1:
            now = torch.linalg.vector_norm(now, dim=0, keepdim=True)
        factors = torch.where((wanted > 0) & (now > 0), wanted / now, 1.0)
        for tensor, factor in zip(tensors, factors.expand(len(tensors), -1), strict=True):
            tensor.mul_(factor.to(tensor.dtype).view(-1, *[1] * (tensor.dim() - 1)))


class InTurn(Condition):
    """Several conditions, each applied to what the one before it made."""

    def __init__(self, parts: Sequence[Condition]) -> None:
        self._parts = parts

    def before_head(self, hidden: Tensor) -> Tensor:
        """Pass through each."""
        for part in self._parts:
            hidden = part.before_head(hidden)
        return hidden

    def before_head_gradient(self, grad: Tensor) -> Tensor:
        """Pass back through each."""
        for part in reversed(self._parts):
            grad = part.before_head_gradient(grad)
        return grad

    def numbers(self, seeds: Sequence[int], step: int) -> list[NDArray[np.float64]]:
        """Return those of each."""
        return [array for part in self._parts for array in part.numbers(seeds, step)]

    def after_step(self, parameters: dict[str, Tensor], numbers: Iterator[Tensor]) -> None:
        """Apply each."""
        for part in self._parts:
            part.after_step(parameters, numbers)


def _starting_norms(config: TrainConfig, *, each: bool) -> Norms:
    task = make_task(config)

    @functools.cache
    def at_start(seed: int) -> tuple[float, ...]:
        norms = [float(torch.linalg.vector_norm(t)) for t in initial_parameters(config, task, seed).values()]
        return tuple(norms) if each else (math.hypot(*norms),)

    return lambda seed, step: at_start(seed)


def _followed_norms(job: Job, out: Path, *, until_memorised: bool) -> Norms:
    source = source_job(job)
    assert source is not None
    logs = {seed: _norm_log(source, seed, out, until_memorised=until_memorised) for seed in job.seeds}
    return lambda seed, step: (math.exp(np.interp(step, *logs[seed])),)


Column = NDArray[np.float64]


def _norm_log(source: Job, seed: int, out: Path, *, until_memorised: bool) -> tuple[Column, Column]:
    """Return the steps and the logarithms of the norm in the log of a complete run, up to its T_mem if asked."""
    path = out / source.run_name(seed)
    remedy = f"`fastent run {source.experiment}` with the same settings, seeds and --out makes it"
    if not (path / "DONE").exists():
        raise RunError(f"{path}, whose norm is to be followed, is missing or not complete: {remedy}")
    recorded = read_settings(path)
    if recorded | {"measures": []} != source.settings() | {"measures": []}:  # they do not change the norm
        raise RunError(f"{path}, whose norm is to be followed, was trained with other settings: {remedy}")
    rows, _ = read_rows(path / "metrics.jsonl", 0)
    if until_memorised:
        reached = [k for k, row in enumerate(rows) if (row["train_accuracy"] or 0) >= source.config.memorised]
        if not reached:
            raise RunError(f"{path} never memorised, so there is no norm to hold from then on")
        rows = rows[: reached[0] + 1]
    norms = [row["parameter_norm"] for row in rows]
    if not norms or any(norm is None or norm <= 0 for norm in norms):
        raise RunError(f"{path / 'metrics.jsonl'} holds no norm, or none that can be followed")
    return np.array([row["step"] for row in rows], dtype=np.float64), np.log(norms)
