"""Conditions of training: the paper's interventions by name, each one small object applied at three places.

Mixed representations (E2), a held parameter norm (E3), a held scale of the logits, and several of these. The baseline
is no condition at all and costs nothing. A condition's name says what it does, its parts joined by "+":

- ``losses-<alpha>``: the head is trained on the representations and on their mixture, the two losses averaged
  (the formula of Appendix C). ``logits-<alpha>``: the two logits averaged (the text of Appendix C). The head is
  affine, so that is the loss of its answer to ``(h + h~) / 2``: mixing alone, with half the alpha.
- ``norm-start``: after each step all parameters are scaled by one factor, so that their common Euclidean norm
  stays what it was at initialisation. ``norm-start-each``: each tensor by its own factor; a tensor that starts
  at 0 is left free. ``norm-as-<condition>``: the common norm follows that of the same seed's complete run under
  another condition, log-linear between its evaluations and constant after its end. ``norm-mem``: it follows the
  baseline's until that has memorised, and is held there.
- ``norm-as-baseline`` alone is the sham: what the holding does by itself, as nothing else is changed. It has
  three variants, which every ``norm-as-<condition>`` has: ``norm-as-baseline-moments``, AdamW's moments scaled
  along; ``norm-as-baseline-each``, each tensor by its own factor to its own norm; ``norm-as-baseline-every-step``,
  the norm of every step instead of the line between evaluations. The record has no such norms, so these two train
  what they follow once more beside them (twice the cost).
- ``logits-as-<condition>``: in training the logits are divided by one number a step, a temperature, so that their
  scale is that of the same seed's complete run under another condition. With a held norm it says whether the norm
  acts through the scale (as arXiv 2606.18465 finds), without one whether the scale acts by itself. The scale is the
  root mean square of the logits, each row less its mean over the classes: recorded on the training probe (measure
  "logit_scale"), set on each batch. The gradients take the temperature for a constant.

Scaling changes the parameters only: AdamW's two moments stay as they are, but under ``-moments``. They are means of
gradients that were taken at the same norm, or nearly, as the wanted norm moves little within their memory (10 and 50
steps). Under ``-moments``, parameters times c have their first moment divided by c and their second by c^2: what the
chain rule makes of the gradient when the unit of the parameters changes, and what the gradient of a loss that ignores
their scale does. The direction and the size of the next step stay what they were.

Evaluation and entropy see the network as it is, its representations never mixed, its logits never divided.

The first word of a part is a name of `fastent.grokking.train.registry`: "losses", "logits", "norm" or another
package's. What stands behind it and a "-" is the argument of its `ConditionMaker`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastent.grokking.train.config import TrainConfig
from fastent.grokking.train.models import (
    Condition,
    head_gradients,
    initial_parameters,
    logit_scale,
    starting_module,
)
from fastent.grokking.train.modules import AnyStack, stack_kind
from fastent.grokking.train.registry import BUILT_IN, check_known, find, names, origin
from fastent.grokking.train.runs import OWN, Job, check_rows, damages, read_settings
from fastent.grokking.train.stacked import Parameters, tensor_norms
from fastent.grokking.train.storage import RunError, RunWarning, read_rows
from fastent.grokking.train.tasks import make_task
from fastent.mixing import mix_representations

NONE = ("baseline", "to-the-end")
"""Conditions that leave the training as it is and differ in the experiment's settings, if at all."""

SETTINGS = "with-"
"""The same goes for every condition that begins so: it names settings, such as "with-mlp-sum"."""

_ALLOWED = re.compile(r"[\w.=+-]+", re.ASCII)

_PART = re.compile(
    r"(?P<average>losses|logits)-(?P<alpha>\d*\.?\d+)|norm-start(?P<each>-each)?|(?P<mem>norm-mem)"
    r"|norm-as-(?P<norm>.+?)(-(?P<how>each|moments|every-step))?|logits-as-(?P<logits>.+)"
)

NORM, SCALE = "parameter_norm", "logit_scale"
"""Columns that a run can follow."""

Average = Literal["losses", "logits"]
Norms = Callable[[int, int], Sequence[float]]
"""Norms to hold, by seed and step: a single one for all parameters together, or one for each tensor."""


def make_condition(job: Job, out: Path, device: str | torch.device = "cpu") -> Condition | None:
    """Return what the condition of `job` does to its training; None if nothing.

    Parameters
    ----------
    job : Job
        Its `condition` is a name as above.
    out : Path
        Folder of the run folders, where the runs are that are followed.
    device : str or torch.device
        Where to train once more what is followed at every step or tensor by tensor.

    Raises
    ------
    RunError
        If no condition is called that or holds a thing twice, or a run to follow is missing, incomplete, of other
        settings or without the column.
    """
    if job.condition in NONE or job.condition.startswith(SETTINGS):
        return None
    parts = job.condition.split("+")
    for start, what in (("norm-", "a norm"), ("logits-as-", "a scale of the logits")):
        if sum(part.startswith(start) for part in parts) > 1:
            raise RunError(f"{job.condition!r} holds {what} twice: leave one out")
    if not _ALLOWED.fullmatch(job.condition):
        raise RunError(
            f"a condition is of letters, digits and . _ - = +, for it goes into names of folders; got {job.condition!r}"
        )
    made = [_part(text, Setting(job, out, device)) for text in parts]
    return made[0] if len(made) == 1 else InTurn(made)


@dataclasses.dataclass(frozen=True)
class Setting:
    """The runs that a condition is made for.

    Attributes
    ----------
    job : Job
        Its `config` and `seeds` among it.
    out : Path
        Folder of the run folders.
    device : str or torch.device
        Where to train.
    """

    job: Job
    out: Path
    device: str | torch.device


class ConditionMaker(Protocol):
    """A condition by name: what is registered as "condition"."""

    def __call__(self, argument: str, setting: Setting, /) -> Condition:
        """Make the condition.

        Parameters
        ----------
        argument : str
            What follows the name and a "-" in the condition of a job: "0.1" of "losses-0.1", "" of "losses".
        setting : Setting

        Raises
        ------
        ValueError, RunError
            If it does not take the argument or the setting.
        """


def _part(text: str, setting: Setting) -> Condition:
    name, _, argument = text.partition("-")
    try:
        check_known("condition", name)
    except ValueError as error:
        raise _unknown(setting.job) from error
    try:
        made = find("condition", name)(argument, setting)
    except ValueError as error:
        raise RunError(f"condition {text!r}: {error}") from error
    if not isinstance(made, Condition):
        raise RunError(
            f"condition {name!r} of {origin('condition', name)} must be made as a Condition; got {type(made).__name__}"
        )
    return made


def _unknown(job: Job) -> RunError:
    guests = [each.name for each in names("condition") if each.name not in BUILT_IN["condition"]]
    return RunError(
        f"no condition is called {job.condition!r}; there are {', '.join(NONE)}, losses-0.1, logits-0.1, "
        "norm-start, norm-start-each, norm-mem, norm-as-baseline (and with -each, -moments, -every-step), "
        f"logits-as-baseline, {''.join(f'{name}, ' for name in guests)}and several of these joined by +"
    )


def followed(condition: str) -> dict[str, str]:
    """Name, by column, the condition whose complete runs those of `condition` follow in it.

    Examples
    --------
    >>> followed("losses-0.1+norm-as-baseline"), followed("logits-as-norm-mem")
    ({'parameter_norm': 'baseline'}, {'logit_scale': 'norm-mem'})
    """
    found = {}
    for part in condition.split("+"):
        if match := _PART.fullmatch(part):
            if match["mem"]:
                found[NORM] = "baseline"
            elif match["norm"]:
                found[NORM] = match["norm"]
            elif match["logits"]:
                found[SCALE] = match["logits"]
    return found


def sources(job: Job) -> list[Job]:
    """Return the runs that must be complete before those of `job` can start."""
    return [_source(job, name) for name in dict.fromkeys(followed(job.condition).values())]


def _source(job: Job, condition: str) -> Job:
    """Return the runs of `condition` with the settings of `job`: E1's baseline, E2's mixing, E3's else, or own ones."""
    mixing = (match := _PART.fullmatch(condition)) is not None and match["average"]
    experiment = "e1" if condition == "baseline" else "e2" if mixing else "e3"
    experiment = OWN if job.experiment == OWN else experiment
    return dataclasses.replace(job, experiment=experiment, condition=condition)


def losses(argument: str, setting: Setting) -> Condition:
    """Make ``losses-<alpha>``."""
    found = _matched(f"losses-{argument}", setting)
    return _mixing(found["alpha"], "losses", setting)


def logits(argument: str, setting: Setting) -> Condition:
    """Make ``logits-<alpha>`` or ``logits-as-<condition>``."""
    found = _matched(f"logits-{argument}", setting)
    if found["alpha"]:
        return _mixing(found["alpha"], "logits", setting)
    return HeldLogits(_between(_logs(_source(setting.job, found["logits"]), setting.out, SCALE)))


def norm(argument: str, setting: Setting) -> Condition:
    """Make a condition that begins with ``norm-``."""
    found, job, out = _matched(f"norm-{argument}", setting), setting.job, setting.out
    if found["mem"]:
        return HeldNorm(_between(_logs(_source(job, "baseline"), out, NORM, until_memorised=True)))
    if not found["norm"]:
        return HeldNorm(_starting_norms(job.config, each=bool(found["each"])))
    source = _source(job, found["norm"])
    logs = _logs(source, out, NORM)
    if found["how"] in ("each", "every-step"):
        twins = {seed: _Twin(source, seed, out, setting.device, logs[seed]) for seed in job.seeds}
        return HeldNorm(_at_every_step(logs, twins) if found["how"] == "every-step" else _each(logs, twins))
    return HeldNorm(_between(logs), moments=found["how"] == "moments")


def _matched(text: str, setting: Setting) -> re.Match[str]:
    found = _PART.fullmatch(text)
    if found is None:
        raise _unknown(setting.job)
    return found


def _mixing(alpha: str, average: Average, setting: Setting) -> Mixing:
    if setting.job.config.batch_size < 2:
        raise RunError(f"mixing needs a batch_size of at least 2; got {setting.job.config.batch_size}")
    return Mixing(float(alpha), average)


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
    moments : bool
        Whether AdamW's moments are scaled along, the first by the inverse factor and the second by its square.
    """

    def __init__(self, norms: Norms, *, moments: bool = False) -> None:
        self._norms, self._moments = norms, moments

    def numbers(self, seeds: Sequence[int], step: int) -> list[NDArray[np.float64]]:
        """Return the norms to hold, (1, S) or (tensors, S)."""
        return [np.array([self._norms(seed, step) for seed in seeds], dtype=np.float64).T]

    def after_step(self, state: Mapping[str, Parameters], numbers: Iterator[Tensor]) -> None:
        """Scale the parameters, (S, ...) each, in place, and their moments if asked."""
        parameters, wanted = state["parameter"], next(numbers)
        now = tensor_norms(parameters)
        if len(wanted) == 1:
            now = torch.linalg.vector_norm(now, dim=0, keepdim=True)
        factors = torch.where((wanted > 0) & (now > 0), wanted / now, 1.0).expand(len(parameters), -1)
        powers = {"parameter": 1, "first": -1, "second": -2} if self._moments else {"parameter": 1}
        for kind, power in powers.items():
            for tensor, factor in zip(state[kind].values(), factors.pow(power), strict=True):
                tensor.mul_(_per_seed(factor, tensor))


class HeldLogits(Condition):
    """Division of the logits in training by one number a step, so that they have a given scale over the batch.

    Parameters
    ----------
    scales : function of seed and step
        `fastent.grokking.train.models.logit_scale` to have after so many steps: step number k trains on the scale
        after k - 1.
    """

    def __init__(self, scales: Norms) -> None:
        self._scales = scales

    def numbers(self, seeds: Sequence[int], step: int) -> list[NDArray[np.float64]]:
        """Return the scales to have, (S,)."""
        return [np.array([self._scales(seed, step - 1)[0] for seed in seeds], dtype=np.float64)]

    def head_gradients(
        self, p: Parameters, hidden: Tensor, labels: Tensor, numbers: Iterator[Tensor]
    ) -> tuple[Tensor, Tensor, Parameters]:
        """Loss and gradients for the divided logits: those of a head that is divided, divided once more in the head."""
        now, wanted = logit_scale(p, hidden), next(numbers)
        factor = torch.where(now > 0, wanted / now, 1.0)
        divided = {name: p[name] * _per_seed(factor, p[name]) for name in ("head.weight", "head.bias")}
        losses, grad, head = head_gradients(divided, hidden, labels)
        return losses, grad, {name: g.mul_(_per_seed(factor, g)) for name, g in head.items()}


def _per_seed(factor: Tensor, tensor: Tensor) -> Tensor:
    """Factors (S,) in the shape and dtype that multiply a tensor (S, ...)."""
    return factor.to(tensor.dtype).view(-1, *[1] * (tensor.dim() - 1))


class InTurn(Condition):
    """Several conditions, each applied to what the one before it made.

    Raises
    ------
    RunError
        If two of them change the gradients of the head.
    """

    def __init__(self, parts: Sequence[Condition]) -> None:
        # Norms are held last, whatever else a step has done.
        self._parts = sorted(parts, key=lambda part: isinstance(part, HeldNorm))
        heads = [part for part in parts if type(part).head_gradients is not Condition.head_gradients]
        if len(heads) > 1:
            kinds = " and ".join(type(part).__name__ for part in heads)
            raise RunError(f"{kinds} both change the gradients of the head: leave one out")
        self._head = heads[0] if heads else Condition()
        # In the order in which a step takes their numbers: the head comes first.
        self._numbered = [*heads, *(part for part in self._parts if part not in heads)]

    @property
    def touches_head(self) -> bool:
        """Whether one of them does."""
        return any(part.touches_head for part in self._parts)

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
        return [array for part in self._numbered for array in part.numbers(seeds, step)]

    def head_gradients(
        self, p: Parameters, hidden: Tensor, labels: Tensor, numbers: Iterator[Tensor]
    ) -> tuple[Tensor, Tensor, Parameters]:
        """Those of the one that changes the logits, if any does."""
        return self._head.head_gradients(p, hidden, labels, numbers)

    def after_step(self, state: Mapping[str, Parameters], numbers: Iterator[Tensor]) -> None:
        """Apply each."""
        for part in self._numbered:
            part.after_step(state, numbers)


def _starting_norms(config: TrainConfig, *, each: bool) -> Norms:
    task = make_task(config)

    @functools.cache
    def at_start(seed: int) -> tuple[float, ...]:
        start = (
            initial_parameters(config, task, seed)
            if config.model in BUILT_IN["model"]
            else {
                name: p.detach().double()
                for name, p in starting_module(config, task, seed).named_parameters()
                if p.requires_grad
            }
        )
        norms = [float(torch.linalg.vector_norm(t)) for t in start.values()]
        return tuple(norms) if each else (math.hypot(*norms),)

    return lambda seed, step: at_start(seed)


Column = NDArray[np.float64]
Logs = Mapping[int, tuple[Column, Column]]
"""By seed, steps of a recorded run and the logarithms of a column there."""


def _between(logs: Logs) -> Norms:
    return lambda seed, step: (math.exp(np.interp(step, *logs[seed])),)


_APART = 1e-3
"""Difference of logarithms from which on a norm is not the recorded one."""


class _Twin:
    """A seed's run under the condition that is followed, trained once more: the norm of each tensor at every step.

    It starts at step 0 whenever the run that follows it starts or resumes, and so adds no state to it. Its last bits
    may differ from the recorded run's, on another machine or a GPU, and after many steps all of it: this is said in a
    `RunWarning`.
    """

    def __init__(
        self, source: Job, seed: int, out: Path, device: str | torch.device, log: tuple[Column, Column]
    ) -> None:
        self._name = source.run_name(seed)
        self._recorded: dict[float, float] = dict(zip(*(column.tolist() for column in log), strict=True))
        condition = make_condition(dataclasses.replace(source, seeds=(seed,)), out, device)
        self._make = functools.partial(stack_kind(source.config), source.config, (seed,), device, condition)
        self._stack: AnyStack | None = None
        self._norms: list[Column] = []

    def norms(self, step: int) -> Column:
        """Return the norms after `step` steps, (tensors,)."""
        if self._stack is None:
            self._stack = self._make()
            self._norms = [self._now()]
        while len(self._norms) <= step:
            self._stack.train_step()
            self._norms.append(self._now())
            self._compare(len(self._norms) - 1)
        return self._norms[step]

    def _compare(self, step: int) -> None:
        now = math.log(math.hypot(*self._norms[step]))
        if abs(self._recorded.get(step, now) - now) > _APART:
            self._recorded = {}  # told once
            warnings.warn(
                f"{self._name}, trained once more, has another norm at step {step} than was recorded: what is followed "
                "from here on is not the run that is compared with. On the CPU and the number of threads that made the "
                "record it is",
                RunWarning,
                stacklevel=2,
            )

    def _now(self) -> Column:
        assert self._stack is not None
        norms: Column = self._stack.norms()[:, 0].cpu().numpy()
        return norms


def _at_every_step(logs: Logs, twins: Mapping[int, _Twin]) -> Norms:
    """Norms of the steps themselves, in float32: at full precision the run would be the one it follows, bit for bit."""

    def norms(seed: int, step: int) -> Sequence[float]:
        last = int(logs[seed][0][-1])
        return (float(np.float32(math.hypot(*twins[seed].norms(min(step, last))))),)

    return norms


def _each(logs: Logs, twins: Mapping[int, _Twin]) -> Norms:
    """Norms of each tensor, log-linear between the steps of the log; free where a tensor is 0 at either."""

    def norms(seed: int, step: int) -> Sequence[float]:
        steps = logs[seed][0]
        after = int(np.searchsorted(steps, min(step, steps[-1])))
        first, last = int(steps[max(after - 1, 0)]), int(steps[after])
        low, high = twins[seed].norms(first), twins[seed].norms(last)
        share = (min(step, last) - first) / max(last - first, 1)
        return [
            float(a ** (1 - share) * b**share) if a and b else 0.0 for a, b in zip(low, high, strict=True)
        ]

    return norms


_WORDS = {NORM: "norm", SCALE: "logit scale"}


def _logs(source: Job, out: Path, column: str, *, until_memorised: bool = False) -> Logs:
    """Read what complete runs recorded of a column, up to their T_mem if asked."""
    return {seed: _log(source, seed, out, column, until_memorised=until_memorised) for seed in source.seeds}


def _log(source: Job, seed: int, out: Path, column: str, *, until_memorised: bool) -> tuple[Column, Column]:
    path, what = out / source.run_name(seed), _WORDS[column]
    command = source.experiment + (f" --condition {source.condition}" if source.experiment == OWN else "")
    remedy = f"`fastent run {command}` with the same settings, seeds and --out makes it"
    if not (path / "DONE").exists():
        raise RunError(f"{path}, whose {what} is to be followed, is missing or not complete: {remedy}")
    for damaged in damages(path):
        raise damaged
    recorded = read_settings(path)
    if recorded | {"measures": []} != source.settings() | {"measures": []}:  # they do not change the training
        raise RunError(f"{path}, whose {what} is to be followed, was trained with other settings: {remedy}")
    rows, _ = read_rows(path / "metrics.jsonl", 0)
    check_rows(path / "metrics.jsonl", rows)
    if until_memorised:
        reached = [k for k, row in enumerate(rows) if (row["train_accuracy"] or 0) >= source.config.memorised]
        if not reached:
            raise RunError(f"{path} never memorised, so there is no norm to hold from then on")
        rows = rows[: reached[0] + 1]
    values = [row.get(column) or 0.0 for row in rows]
    if not values or not all(value > 0 for value in values):
        raise RunError(
            f"{path / 'metrics.jsonl'} holds no {what}, or none that can be followed"
            + (': train it anew with the measure "logit_scale"' if column == SCALE else "")
        )
    return np.array([row["step"] for row in rows], dtype=np.float64), np.log(values)
