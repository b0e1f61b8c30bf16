"""Seeds of any `torch.nn.Module` in training, one after the other, with gradients by torch.

`ModuleStack` does what `fastent.grokking.train.stack.Stack` does, by the same split, batches, probes, AdamW, evaluation
and conditions, for a model without gradients by hand: one of another package, or a Transformer of several layers. It is
slower: every position of every pair is computed, each product by itself, and nothing is captured as a CUDA graph.

What a module may have beside ``forward(tokens) -> logits``:

- ``head``, a `torch.nn.Linear` with a bias whose output is what the module returns. What it reads is the
  representation unless something else is named, and conditions that change what the head is trained on need it.
- ``represent(tokens)``, the representation that `entropy_at` = "readout" or "final_norm" asks for.

`entropy_at` may name any submodule instead, such as "blocks.0": its output is the representation, (N, d), or (N, T, d),
of which `readout` takes the last position or the mean over positions.

Random numbers that the module draws (its start, dropout) are functions of the seed and the step, and buffers are in the
checkpoints, so a run resumes exactly on a CPU; on a GPU as exactly as torch's kernels repeat themselves.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastent.grokking.train.config import TrainConfig
from fastent.grokking.train.models import (
    Condition,
    hand_written,
    judged,
    seeded,
    spread,
    starting_module,
)
from fastent.grokking.train.stack import Stack, adamw, misfits, repeat_labels
from fastent.grokking.train.stacked import Parameters, tensor_norms
from fastent.grokking.train.tasks import Task, batch_index, make_task, probe_index, split

_ROWS = 1024  # pairs in a forward pass of an evaluation


class ModuleStack:
    """Seeds of one configuration, trained one after the other.

    Parameters
    ----------
    config : TrainConfig
        What to train.
    seeds : sequence of int
        Distinct; each decides its split, starting values, batches and probes alone.
    device : str or torch.device
        Where to train.
    condition : Condition, optional
        An intervention; without one, the baseline.
    dtype : torch.dtype
        float32, or float64 for tests.

    Attributes
    ----------
    steps_done : int
        Steps that every seed has made.
    seeds : tuple of int
        The seeds still in training, in the order of every result's leading axis.

    Raises
    ------
    ValueError
        If no seed is given, or one twice; if the module does not return logits (N, classes); if there is no
        representation where `config.entropy_at` says; if the condition needs a head and there is none.
    """

    def __init__(
        self,
        config: TrainConfig,
        seeds: Sequence[int],
        device: str | torch.device = "cpu",
        condition: Condition | None = None,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if not seeds or len(set(seeds)) != len(seeds):
            raise ValueError(f"seeds must be at least one and distinct; got {list(seeds)}")
        self.config = config
        self.task = make_task(config)
        self.steps_done = 0
        self._condition = condition
        device = torch.device(device)
        self._inputs, self._labels = self.task.inputs.to(device), self.task.labels.to(device)
        self._parts = {seed: _Seed(config, self.task, seed, device, dtype) for seed in seeds}
        self._check(next(iter(self._parts.values())))

    @staticmethod
    def shares_launches(device: str | torch.device) -> bool:
        """Whether the seeds share launches: they do not, and their bits are those of their solo runs."""
        return False

    @property
    def device(self) -> torch.device:
        """Where it trains."""
        return self._inputs.device

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds still in training."""
        return tuple(self._parts)

    def train_step(self) -> Tensor:
        """Make one step of every seed and return its training losses, (S,), detached."""
        losses = [self._step(part) for part in self._parts.values()]
        self.steps_done += 1
        return torch.stack(losses)

    def _step(self, part: _Seed) -> Tensor:
        config, step = self.config, self.steps_done
        members = batch_index(part.seed, step, len(part.train), config.batch_size, config.sampling)
        pairs = part.train[torch.from_numpy(members)].to(self._inputs.device)
        inputs, labels, condition = self._inputs[pairs], self._labels[pairs], self._condition
        given = [] if condition is None else condition.numbers((part.seed,), step + 1)
        numbers = iter([torch.from_numpy(array).to(inputs.device) for array in given])
        part.module.train()
        with seeded(part.seed, "step", step, inputs.device):
            if condition is not None and condition.touches_head:
                loss, gradients = self._by_the_head(
                    part, part.read_by_head(inputs), labels, condition, numbers
                )
            else:
                loss = nn.functional.cross_entropy(part.logits(inputs), labels)
                gradients = _gradients(loss, part.trained)
        with torch.no_grad():
            adamw(part.state, gradients, part.count, config)
            if condition is not None:
                stacked = {
                    kind: {name: tensor.detach().unsqueeze(0) for name, tensor in tensors.items()}
                    for kind, tensors in part.state.items()
                }
                condition.after_step(stacked, numbers)
        return loss.detach()

    @staticmethod
    def _by_the_head(
        part: _Seed, hidden: Tensor, labels: Tensor, condition: Condition, numbers: Iterator[Tensor]
    ) -> tuple[Tensor, Parameters]:
        """Loss and gradients where a condition comes between the representations and the head, as in `Stack`."""
        names = {"head.weight", "head.bias"}
        with torch.no_grad():
            p = {name: part.trained[name].unsqueeze(0) for name in names}
            mixed = condition.before_head(hidden.unsqueeze(0))
            repeated = repeat_labels(labels.unsqueeze(0), mixed, condition)
            losses, grad, head = condition.head_gradients(p, mixed, repeated, numbers)
            grad = condition.before_head_gradient(grad)
        rest = {name: tensor for name, tensor in part.trained.items() if name not in names}
        gradients = _gradients(hidden, rest, grad[0])
        return losses[0], gradients | {name: g[0] for name, g in head.items()}

    @torch.no_grad()
    def evaluate(self) -> dict[str, Tensor]:
        """Return train and test loss and accuracy, and parameter_norm, each (S,), float64.

        The norm is that of the parameters that are trained, as conditions hold it.
        """
        columns: dict[str, list[Tensor]] = {}
        for part in self._parts.values():
            part.module.eval()
            chunks = zip(*(torch.split(each, _ROWS) for each in (self._inputs, self._labels)), strict=True)
            found = [judged(part.logits(x).unsqueeze(0), y.unsqueeze(0)) for x, y in chunks]
            losses, right = (torch.cat(each, 1)[0].double() for each in zip(*found, strict=True))
            for name, pairs in (("train", part.train), ("test", part.test)):
                columns.setdefault(f"{name}_loss", []).append(losses[pairs].mean())
                columns.setdefault(f"{name}_accuracy", []).append(right[pairs].mean())
            norm = torch.linalg.vector_norm(part.norms())
            columns.setdefault("parameter_norm", []).append(norm)
        return {name: torch.stack(column) for name, column in columns.items()}

    def representations(self, which: str = "probe") -> Tensor:
        """Return the representations, (S, N, d), on a probe of training ("probe") or "test" pairs."""
        return self.represent(torch.stack([part.probes[which] for part in self._parts.values()]))

    @property
    def head_reads_representation(self) -> bool:
        """Whether `represent` is known to be the same with `head` and without."""
        part = next(iter(self._parts.values()))
        return self.config.entropy_at == "readout" and part.head is not None and part.represent is None

    @torch.no_grad()
    def represent(self, pairs: Tensor, *, head: bool = False) -> Tensor:
        """Return the representations, or with `head` what the head reads, of pairs (N,) or (S, N): (S, N, d).

        Raises
        ------
        ValueError
            If the head is asked for and there is none.
        """
        if head:
            self._need_head("what a measure asks for")
        return self._of_seeds(pairs, lambda part: part.read_by_head if head else part.representation)

    @torch.no_grad()
    def logits(self, pairs: Tensor) -> Tensor:
        """Return the logits, (S, N, classes), of pairs numbered as in the task, (N,) or (S, N)."""
        return self._of_seeds(pairs, lambda part: part.logits)

    def parameter(self, name: str) -> Tensor:
        """Return a parameter of all seeds, (S, ...); not to be written to.

        Raises
        ------
        ValueError
            If the module has none of this name.
        """
        if name not in next(iter(self._parts.values())).parameters:
            raise ValueError(
                f"model {self.config.model!r} has no parameter {name!r}, which a measure asks for"
            )
        return torch.stack([part.parameters[name].detach() for part in self._parts.values()])

    def logit_scale(self) -> Tensor:
        """Return the scale of the logits on the training probe, (S,), float64."""
        return spread(self.logits(torch.stack([part.probes["probe"] for part in self._parts.values()])))

    def norms(self) -> Tensor:
        """Return the Euclidean norm of the tensor of each parameter that is trained, (tensors, S), float64."""
        return torch.stack([part.norms() for part in self._parts.values()], 1)

    def state_dict(self, seed: int) -> Parameters:
        """Return a seed's whole training state as flat named tensors (copies), steps included."""
        part = self._parts[seed]
        state = {
            f"{kind}.{name}": tensor.detach().clone()
            for kind, tensors in part.whole_state.items()
            for name, tensor in tensors.items()
        }
        return state | {"steps": torch.tensor(self.steps_done)}

    @torch.no_grad()
    def load_state_dict(self, seed: int, state: Parameters) -> None:
        """Put a seed's state back; all seeds of a stack must be loaded from the same step.

        Raises
        ------
        KeyError
            If the seed is not of this stack.
        ValueError
            If `misfits` finds any. Nothing is loaded then.
        """
        part = self._parts[seed]
        if wrong := part.misfits(state):
            raise ValueError(f"the state is not of these settings: {'; '.join(wrong)}")
        for kind, tensors in part.whole_state.items():
            for name, tensor in tensors.items():
                tensor.copy_(state[f"{kind}.{name}"])
        part.count.fill_(float(state["steps"]))
        self.steps_done = int(state["steps"])

    @staticmethod
    def misfits(config: TrainConfig, state: Parameters) -> list[str]:
        """Say which tensors of a seed's state a stack of `config` cannot take, as `stack.misfits` does."""
        return _Seed(config, make_task(config), 0, torch.device("cpu"), torch.float32).misfits(state)

    def keep(self, seeds: Sequence[int]) -> None:
        """Drop every other seed; the ones kept go on unchanged."""
        self._parts = {seed: part for seed, part in self._parts.items() if seed in seeds}

    def module(self, seed: int) -> nn.Module:
        """Return a copy of a seed's module."""
        return copy.deepcopy(self._parts[seed].module)

    def _of_seeds(self, pairs: Tensor, way: Callable[[_Seed], Callable[[Tensor], Tensor]]) -> Tensor:
        pairs = pairs.expand(len(self._parts), -1)
        found = zip(self._parts.values(), pairs, strict=True)
        return torch.stack([self._of_pairs(part, numbers, way(part)) for part, numbers in found])

    def _of_pairs(self, part: _Seed, pairs: Tensor, way: Callable[[Tensor], Tensor]) -> Tensor:
        part.module.eval()
        chunks = torch.split(pairs.to(self._inputs.device), _ROWS)
        return torch.cat([way(self._inputs[chunk]) for chunk in chunks])

    @torch.no_grad()
    def _check(self, part: _Seed) -> None:
        inputs, name = self._inputs[:2], self.config.model
        part.module.eval()
        logits = part.logits(inputs)
        wanted = (len(inputs), self.task.classes)
        if not isinstance(logits, Tensor) or tuple(logits.shape) != wanted:
            found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(
                f"model {name!r} must return logits of shape (N, {self.task.classes}) for tokens "
                f"{tuple(inputs.shape)}; got {found}"
            )
        h = part.representation(inputs)
        if h.dim() != 2 or len(h) != len(inputs):
            raise ValueError(
                f"entropy_at={self.config.entropy_at!r} of model {name!r} must give (N, d), or (N, T, d) for a "
                f"sequence; got {tuple(h.shape)} for {len(inputs)} pairs"
            )
        if self._condition is not None and self._condition.touches_head:
            self._need_head("what this condition changes")

    def _need_head(self, why: str) -> None:
        if next(iter(self._parts.values())).head is None:
            raise ValueError(
                f"model {self.config.model!r} has no `head`, a torch.nn.Linear with a bias whose output it returns, "
                f"and that is {why}: name its last layer so, or do without"
            )


AnyStack = Stack | ModuleStack


def stack_kind(config: TrainConfig) -> type[Stack] | type[ModuleStack]:
    """Return the class that trains a configuration."""
    return Stack if hand_written(config) else ModuleStack


def _gradients(of: Tensor, parameters: Parameters, grad: Tensor | None = None) -> Parameters:
    """Gradients by name; a parameter that takes no part has none."""
    found = torch.autograd.grad(of, list(parameters.values()), grad, allow_unused=True)
    return {name: g for name, g in zip(parameters, found, strict=True) if g is not None}


class _Seed:
    """A seed's module, split, probes and AdamW."""

    def __init__(
        self, config: TrainConfig, task: Task, seed: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.seed, self._config = seed, config
        self.train, self.test = split(task, config.train_fraction, seed)
        self.probes = {
            which: probe_index(part, config.probe_size, seed, which)
            for which, part in (("probe", self.train), ("test", self.test))
        }
        self.module = starting_module(config, task, seed).to(device, dtype)
        self.parameters: Parameters = dict(self.module.named_parameters())
        self.trained: Parameters = {name: p for name, p in self.parameters.items() if p.requires_grad}
        self.state: dict[str, Parameters] = {
            "parameter": dict(self.trained),
            "first": {name: torch.zeros_like(p) for name, p in self.trained.items()},
            "second": {name: torch.zeros_like(p) for name, p in self.trained.items()},
        }
        self.count = torch.zeros((), dtype=torch.float32, device=device)
        kept = self.module.state_dict()
        buffers = {name: t for name, t in self.module.named_buffers() if name in kept}
        self.whole_state = self.state | {"parameter": dict(self.parameters), "buffer": buffers}
        self.head = self._find_head(task.inputs[:2].to(device))
        represent = getattr(self.module, "represent", None)
        self.represent = represent if config.entropy_at in ("readout", "final_norm") else None

    @torch.no_grad()
    def _find_head(self, inputs: Tensor) -> nn.Linear | None:
        head = getattr(self.module, "head", None)
        if not isinstance(head, nn.Linear) or head.bias is None:
            return None
        self.module.eval()
        with _watched(head, lambda args, output: output) as seen:
            logits = self.module(inputs)
        return head if any(each is logits for each in seen) else None

    def logits(self, inputs: Tensor) -> Tensor:
        """Logits of tokens (N, T)."""
        logits: Tensor = self.module(inputs)
        return logits

    def read_by_head(self, inputs: Tensor) -> Tensor:
        """Input of the head, (N, d), for tokens (N, T)."""
        assert self.head is not None
        with _watched(self.head, lambda args, output: args[0]) as seen:
            self.module(inputs)
        h: Tensor = seen[0]
        return h

    def representation(self, inputs: Tensor) -> Tensor:
        """Representation where `entropy_at` says, of tokens (N, T)."""
        at = self._config.entropy_at
        if self.represent is not None:
            found: Tensor = self.represent(inputs)
            return found
        if at == "readout" and self.head is not None:
            return self.read_by_head(inputs)
        layers = dict(self.module.named_modules())
        layers.pop("")
        if at not in layers:
            raise ValueError(
                f"entropy_at={at!r}, and model {self._config.model!r} has no "
                + ("`head` whose input that is" if at == "readout" else "such layer")
                + f": give one of {', '.join(layers)}"
            )
        with _watched(layers[at], lambda args, output: output) as seen:
            self.module(inputs)
        if not seen:
            raise ValueError(
                f"layer {at!r} of model {self._config.model!r} is not called: give another entropy_at"
            )
        h: Tensor = seen[-1][0] if isinstance(seen[-1], tuple) else seen[-1]
        if h.dim() != 3:
            return h
        return h[:, -1] if self._config.readout == "last" else h.mean(1)

    def misfits(self, state: Parameters) -> list[str]:
        """See `stack.misfits`."""
        needed = {
            f"{kind}.{name}": tensor
            for kind, tensors in self.whole_state.items()
            for name, tensor in tensors.items()
        }
        whole = {name for name, tensor in needed.items() if not tensor.is_floating_point()}
        shapes = {name: tuple(tensor.shape) for name, tensor in needed.items()}
        return misfits(shapes | {"steps": ()}, whole | {"steps"}, state)

    @torch.no_grad()
    def norms(self) -> Tensor:
        """Euclidean norm of each parameter that is trained, (tensors,), float64."""
        return tensor_norms({name: p.unsqueeze(0) for name, p in self.trained.items()})[:, 0]


@contextlib.contextmanager
def _watched(module: nn.Module, what: Callable[[Any, Any], Any]) -> Iterator[list[Any]]:
    """Collect what is made of the arguments and the output of each call of `module` while open."""
    seen: list[Any] = []
    hook = module.register_forward_hook(lambda _, args, output: seen.append(what(args, output)))
    try:
        yield seen
    finally:
        hook.remove()
