"""Several seeds of one configuration in training: parameters, AdamW, one step, evaluation.

Every seed is a run of its own: its split, starting values and batches depend on its number alone, and nothing of one
seed enters another. On a GPU the seeds share each launch, stacked along the leading axis; on a CPU they take turns,
which keeps one seed's working set in the cache and its bits those of its solo run.

On a GPU a step is one CUDA graph: some 150 kernels of a few microseconds that, launched one by one, would wait for the
host. What differs from step to step is read on the device: the inputs of the next `WINDOW` steps are put there
together, and a counter that the graph itself moves on says which of them is next. So the host may run ahead, and
prepares a window while the steps of the one before are computed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from fastent.grokking.train.config import TrainConfig
from fastent.grokking.train.models import (
    Condition,
    PlainMLP,
    PlainTransformer,
    head_gradients,
    initial_parameters,
    logit_scale,
    make_model,
    pair_losses,
    parameter_shapes,
    plain_model,
)
from fastent.grokking.train.stacked import Parameters, linear, tensor_norms
from fastent.grokking.train.tasks import (
    Task,
    batch_index,
    batch_indices,
    make_task,
    probe_index,
    split,
    to_device,
)

WINDOW = 256
"""Steps whose inputs are prepared together: 32 MiB of batches for 32 seeds and 512 pairs."""

T = TypeVar("T")
Launch = Callable[[], object]
Capture = Callable[[Callable[[], Any], Sequence[Tensor]], tuple[Launch, Any]]
"""Record a function and return what launches it again, and its result's place. Tensors to restore are given."""

_WARM_UP = 3  # launches before the capture: libraries allocate their workspaces at the first


def capture_cuda_graph(function: Callable[[], T], state: Sequence[Tensor] = ()) -> tuple[Launch, T]:
    """Capture `function`, which reads nothing on the host, as a CUDA graph; `state` is left as it was found."""
    saved = [tensor.clone() for tensor in state]
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP):
            function()
    torch.cuda.current_stream().wait_stream(side)
    for tensor, before in zip(state, saved, strict=True):
        tensor.copy_(before)
    graph = torch.cuda.CUDAGraph()
    # Other threads may use the device meanwhile, as one that pins memory does.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = function()
    return graph.replay, result


class GraphedStep:
    """A step repeated from one capture of it.

    Parameters
    ----------
    advance : function of tensors
        Makes a step from its inputs on the device, changes `state` in place and returns the losses. It is
        called once, or a few times, with the same places of all tensors that it will see in every replay.
    inputs : function of a step and a number of steps
        The inputs of so many steps from there on, tensors on the device with a leading axis of steps, otherwise
        of the same shapes and dtypes always.
    state : sequence of Tensor
        All that `advance` changes.
    device : torch.device
    capture : Capture
        `capture_cuda_graph`, or a stand-in for a test without a GPU.
    """

    def __init__(
        self,
        advance: Callable[[Sequence[Tensor]], Tensor],
        inputs: Callable[[int, int], Sequence[Tensor]],
        state: Sequence[Tensor],
        device: torch.device,
        capture: Capture = capture_cuda_graph,
    ) -> None:
        self._advance, self._inputs = advance, inputs
        self._state, self._capture = state, capture
        self._buffers: list[Tensor] = []
        self._place = torch.zeros(1, dtype=torch.int64, device=device)
        self._first = self._next = -WINDOW
        self._launch: Launch | None = None
        self._losses = torch.empty(0)

    def __call__(self, step: int) -> Tensor:
        """Make step number `step` (from 0) and return its losses."""
        if step != self._next or step >= self._first + WINDOW:
            self._prepare(step)
        if self._launch is None:
            self._launch, self._losses = self._capture(self._body, [*self._state, self._place])
        self._launch()
        self._next = step + 1
        return self._losses.clone()

    def _body(self) -> Tensor:
        losses = self._advance([buffer.index_select(0, self._place).squeeze(0) for buffer in self._buffers])
        self._place.add_(1)
        return losses

    def _prepare(self, first: int) -> None:
        """Put the inputs of the steps from `first` on where the graph reads them, behind what is in flight."""
        inputs = self._inputs(first, WINDOW)
        if not self._buffers:
            self._buffers = [torch.empty_like(tensor) for tensor in inputs]
        for buffer, tensor in zip(self._buffers, inputs, strict=True):
            buffer.copy_(tensor)
        self._place.zero_()
        self._first = first


def repeat_labels(labels: Tensor, hidden: Tensor, condition: Condition) -> Tensor:
    """Labels (S, N), repeated for what a condition made of the N representations: (S, k N).

    Raises
    ------
    ValueError
        If it made another number of them.
    """
    copies, rest = divmod(hidden.shape[1], labels.shape[1])
    if rest or not copies:
        raise ValueError(
            f"{type(condition).__name__}.before_head must return (S, k N, d) for (S, N, d): each label has its rows; "
            f"got {tuple(hidden.shape)} for N = {labels.shape[1]}"
        )
    return labels.repeat(1, copies)


def misfits(needed: Mapping[str, tuple[int, ...]], whole: Collection[str], state: Parameters) -> list[str]:
    """Say which tensors of a state are not as needed, each with its shape and the one needed.

    Shapes are compared one by one: what only broadcasts would be another network's. Those named in `whole` hold no
    floating-point numbers, and all others do.
    """
    have = {name: tuple(tensor.shape) for name, tensor in state.items()}
    found = [
        f"{name} has shape {have.get(name, 'none')} in the state, and {needed.get(name, 'none')} is needed"
        for name in dict.fromkeys((*needed, *have))
        if have.get(name) != needed.get(name)
    ]
    return found + [
        f"{name} holds {tensor.dtype}, no numbers of its kind"
        for name, tensor in state.items()
        if tensor.is_floating_point() == (name in whole) or tensor.is_complex()
    ]


_EVALUATION_ROWS = {"cpu": 1024}  # pairs in a forward pass of an evaluation: they stay in the cache
_ALL_ROWS = 1 << 14  # elsewhere: few launches


class Stack:
    """Seeds of one configuration, trained side by side and independent of each other.

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
    together : bool, optional
        Whether the seeds share each launch. Where they do, a seed's last bits may depend on how many there
        are. Default: on a GPU yes, on a CPU no.
    capture : Capture, optional
        What turns a step into something that can be launched again. Default: on a GPU `capture_cuda_graph`; on
        a CPU nothing, and every step is computed anew.

    Attributes
    ----------
    steps_done : int
        Steps that every seed has made.
    seeds : tuple of int
        The seeds still in training, in the order of every result's leading axis.

    Raises
    ------
    ValueError
        If no seed is given, or one twice.
    """

    def __init__(
        self,
        config: TrainConfig,
        seeds: Sequence[int],
        device: str | torch.device = "cpu",
        condition: Condition | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        together: bool | None = None,
        capture: Capture | None = None,
    ) -> None:
        device = torch.device(device)
        if not seeds or len(set(seeds)) != len(seeds):
            raise ValueError(f"seeds must be at least one and distinct; got {list(seeds)}")
        # A step's tensors are freed at its end. glibc would give that memory back and fault it in again at the
        # next step, 1,100 faults and a fifth of the time; having freed one block of this size, it keeps them.
        torch.empty(30 << 20, dtype=torch.uint8)
        self.config = config
        self.task = make_task(config)
        self.steps_done = 0
        self._condition = condition
        self._model = make_model(config, self.task, device)
        if together is None:
            together = self.shares_launches(device)
        parts = [tuple(seeds)] if together else [(seed,) for seed in seeds]
        self._groups = [_Group(config, self.task, part, device, dtype) for part in parts]
        self._capture = capture_cuda_graph if capture is None and device.type == "cuda" else capture
        self._rows = _EVALUATION_ROWS.get(device.type, _ALL_ROWS)
        self._graph()

    @staticmethod
    def shares_launches(device: str | torch.device) -> bool:
        """Whether the seeds of a stack on `device` share each launch unless told: their last bits may depend on it."""
        return torch.device(device).type != "cpu"

    @property
    def device(self) -> torch.device:
        """Where it trains."""
        return self._model.columns.device

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds still in training."""
        return tuple(seed for group in self._groups for seed in group.seeds)

    @torch.no_grad()
    def train_step(self) -> Tensor:
        """Make one step of every seed and return its training losses, (S,), detached."""
        losses = [
            self._step(group) if group.graphed is None else group.graphed(self.steps_done)
            for group in self._groups
        ]
        self.steps_done += 1
        return losses[0] if len(losses) == 1 else torch.cat(losses)

    @torch.no_grad()
    def evaluate(self) -> dict[str, Tensor]:
        """Return train and test loss and accuracy, and parameter_norm, each (S,), float64."""
        results = [self._evaluate(group) for group in self._groups]
        return {name: torch.cat([r[name] for r in results]) for name in results[0]}

    def representations(self, which: str = "probe") -> Tensor:
        """Return the representations, (S, N, d), on a probe of training ("probe") or "test" pairs.

        The pairs of a seed stay the same for the whole run.
        """
        return self.represent(torch.cat([group.probes[which] for group in self._groups]))

    @torch.no_grad()
    def represent(self, pairs: Tensor, *, head: bool = False) -> Tensor:
        """Return the representations, or with `head` what the head gets, of pairs numbered as in the task.

        Pairs (N,), or (S, N), to (S, N, d). The two are the same unless a final LayerNorm comes between.
        """
        model, found, first = self._model, [], 0
        pairs = pairs.to(model.columns.device).expand(len(self.seeds), -1)
        for group in self._groups:
            columns = model.columns[:, pairs[first : first + len(group.seeds)]]
            given, kept = model.forward(group.parameters, model.table(group.parameters), columns)
            found.append(given if head else kept.representation)
            first += len(group.seeds)
        return torch.cat(found)

    @property
    def head_reads_representation(self) -> bool:
        """Whether `represent` is the same with `head` and without."""
        return not self.config.final_norm or self.config.entropy_at == "final_norm"

    @torch.no_grad()
    def logits(self, pairs: Tensor) -> Tensor:
        """Return the logits, (S, N, classes), of pairs numbered as in the task, (N,) or (S, N)."""
        hidden = self.represent(pairs, head=True)
        return linear(hidden, self.parameter("head.weight"), self.parameter("head.bias"))

    def parameter(self, name: str) -> Tensor:
        """Return a parameter of all seeds, (S, ...); not to be written to."""
        return torch.cat([group.parameters[name] for group in self._groups])

    @torch.no_grad()
    def logit_scale(self) -> Tensor:
        """Return the scale of the logits on the training probe, (S,), float64."""
        model, found = self._model, []
        for group in self._groups:
            p, columns = group.parameters, self._model.columns[:, group.probes["probe"]]
            found.append(logit_scale(p, model.forward(p, model.table(p), columns)[0]))
        return torch.cat(found)

    def norms(self) -> Tensor:
        """Return the Euclidean norm of each parameter's tensor, (tensors, S), float64."""
        return torch.cat([tensor_norms(group.parameters) for group in self._groups], 1)

    def state_dict(self, seed: int) -> Parameters:
        """Return a seed's whole training state as flat named tensors (copies), steps included."""
        group, s = self._find(seed)
        state = {
            f"{kind}.{name}": tensor[s].clone()
            for kind, tensors in group.state.items()
            for name, tensor in tensors.items()
        }
        return state | {"steps": torch.tensor(self.steps_done)}

    def load_state_dict(self, seed: int, state: Parameters) -> None:
        """Put a seed's state back; all seeds of a stack must be loaded from the same step.

        Raises
        ------
        KeyError
            If the seed is not of this stack.
        ValueError
            If `misfits` finds any. Nothing is loaded then.
        """
        group, s = self._find(seed)
        if wrong := self.misfits(self.config, state):
            raise ValueError(f"the state is not of these settings: {'; '.join(wrong)}")
        for kind, tensors in group.state.items():
            for name, tensor in tensors.items():
                tensor[s].copy_(state[f"{kind}.{name}"])
        group.count.fill_(float(state["steps"]))
        self.steps_done = int(state["steps"])

    @staticmethod
    def misfits(config: TrainConfig, state: Parameters) -> list[str]:
        """Say which tensors of a seed's state a stack of `config` cannot take, as `misfits` does."""
        shapes = parameter_shapes(config, make_task(config))
        kinds = ("parameter", "first", "second")
        needed = {f"{kind}.{name}": tuple(shape) for kind in kinds for name, shape in shapes.items()}
        return misfits(needed | {"steps": ()}, ("steps",), state)

    def keep(self, seeds: Sequence[int]) -> None:
        """Drop every other seed; the ones kept go on unchanged."""
        for group in self._groups:
            group.keep(seeds)
        self._groups = [group for group in self._groups if group.seeds]
        self._graph()

    def module(self, seed: int) -> PlainTransformer | PlainMLP:
        """Return an ordinary module with a copy of a seed's parameters."""
        group, s = self._find(seed)
        module = plain_model(self.config, self.task).to(group.train.device, group.dtype)
        module.load_state_dict({name: tensor[s] for name, tensor in group.parameters.items()})
        return module

    def _graph(self) -> None:
        """Prepare the capture of each group's step, as its tensors lie now."""
        if self._capture is None:
            return
        for group in self._groups:
            group.graphed = GraphedStep(
                functools.partial(self._advance, group),
                functools.partial(self._inputs, group),
                [*(t for tensors in group.state.values() for t in tensors.values()), group.count],
                group.train.device,
                self._capture,
            )

    def _inputs(self, group: _Group, first: int, steps: int) -> list[Tensor]:
        """Return what `_advance` needs in `steps` steps from `first` on, with a leading axis of steps."""
        seeds, device, config = group.seeds, group.train.device, self.config
        n_train = group.train.shape[1]
        batches = batch_indices(seeds, first, steps, n_train, config.batch_size, config.sampling, device)
        if self._condition is None:
            return [batches]
        numbers = [self._condition.numbers(seeds, step + 1) for step in range(first, first + steps)]
        return [
            batches,
            *(to_device(torch.from_numpy(np.stack(n)), device) for n in zip(*numbers, strict=True)),
        ]

    def _step(self, group: _Group) -> Tensor:
        step, n_train, device = self.steps_done, group.train.shape[1], group.train.device
        size, sampling = self.config.batch_size, self.config.sampling
        batch = np.stack([batch_index(seed, step, n_train, size, sampling) for seed in group.seeds])
        numbers = [] if self._condition is None else self._condition.numbers(group.seeds, step + 1)
        return self._advance(group, [torch.from_numpy(array).to(device) for array in (batch, *numbers)])

    def _advance(self, group: _Group, inputs: Sequence[Tensor]) -> Tensor:
        """Make a step on members of the training sets, (S, N), with the condition's numbers; no host reads here."""
        batch, *given = inputs
        numbers = iter(given)
        model, p, config = self._model, group.parameters, self.config
        pairs = group.train.gather(1, batch)
        columns = model.columns.index_select(1, pairs.view(-1)).view(-1, *pairs.shape)
        hidden, kept = model.forward(p, model.table(p), columns)
        labels, condition = columns[-1], self._condition
        if condition is None:
            losses, grad, head = head_gradients(p, hidden, labels)
        else:
            mixed = condition.before_head(hidden)
            repeated = repeat_labels(labels, mixed, condition)
            losses, grad, head = condition.head_gradients(p, mixed, repeated, numbers)
            grad = condition.before_head_gradient(grad)
        group.update(model.backward(p, kept, grad) | head, config)
        if condition is not None:
            condition.after_step(group.state, numbers)
        return losses

    def _evaluate(self, group: _Group) -> Parameters:
        model, p = self._model, group.parameters
        table = model.table(p)
        parts = []
        for first in range(0, model.columns.shape[1], self._rows):
            columns = model.columns[:, None, first : first + self._rows].expand(-1, len(group.seeds), -1)
            parts.append(pair_losses(p, model.forward(p, table, columns)[0], columns[-1]))
        losses, right = (torch.cat(part, 1).double() for part in zip(*parts, strict=True))
        return {
            "train_loss": losses.gather(1, group.train).mean(1),
            "train_accuracy": right.gather(1, group.train).mean(1),
            "test_loss": losses.gather(1, group.test).mean(1),
            "test_accuracy": right.gather(1, group.test).mean(1),
            "parameter_norm": torch.linalg.vector_norm(tensor_norms(p), dim=0),
        }

    def _find(self, seed: int) -> tuple[_Group, int]:
        for group in self._groups:
            if seed in group.seeds:
                return group, group.seeds.index(seed)
        raise KeyError(f"seed {seed} is not in this stack; it has {self.seeds}")


def adamw(state: Mapping[str, Parameters], gradients: Parameters, count: Tensor, config: TrainConfig) -> None:
    """Take a step of AdamW, in place, by the kernel of `torch.optim.AdamW`; parameters without a gradient stay.

    Parameters
    ----------
    state : mapping
        "parameter" and its moments "first" and "second", each with a tensor a name.
    gradients : dict of Tensor
        By names among these.
    count : Tensor, shape (), float32
        Steps made; one more afterwards.
    config : TrainConfig
    """
    count.add_(1)
    torch._fused_adamw_(
        [state["parameter"][name] for name in gradients],
        list(gradients.values()),
        [state["first"][name] for name in gradients],
        [state["second"][name] for name in gradients],
        [],
        [count] * len(gradients),
        lr=config.learning_rate,
        beta1=config.betas[0],
        beta2=config.betas[1],
        weight_decay=config.weight_decay,
        eps=config.epsilon,
        amsgrad=False,
        maximize=False,
    )


class _Group:
    """Seeds that share each launch: their split, parameters and AdamW, each tensor led by an axis of seeds."""

    def __init__(
        self,
        config: TrainConfig,
        task: Task,
        seeds: tuple[int, ...],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.seeds, self.dtype = seeds, dtype
        parts = [split(task, config.train_fraction, seed) for seed in seeds]
        self.train = torch.stack([train for train, _ in parts]).to(device)
        self.test = torch.stack([test for _, test in parts]).to(device)
        self.probes = {
            which: torch.stack(
                [
                    probe_index(part[place], config.probe_size, seed, which)
                    for seed, part in zip(seeds, parts, strict=True)
                ]
            ).to(device)
            for place, which in enumerate(("probe", "test"))
        }
        start = [initial_parameters(config, task, seed) for seed in seeds]
        self.parameters = {n: torch.stack([s[n] for s in start]).to(device, dtype) for n in start[0]}
        self.first = {name: torch.zeros_like(tensor) for name, tensor in self.parameters.items()}
        self.second = {name: torch.zeros_like(tensor) for name, tensor in self.parameters.items()}
        self.count = torch.zeros((), dtype=torch.float32, device=device)
        self.graphed: GraphedStep | None = None

    @property
    def state(self) -> dict[str, Parameters]:
        """All that a checkpoint holds but the steps."""
        return {"parameter": self.parameters, "first": self.first, "second": self.second}

    def update(self, gradients: Parameters, config: TrainConfig) -> None:
        """Take one step of AdamW: S optimisers in one launch, as they share nothing and stand at one step."""
        adamw(self.state, gradients, self.count, config)

    def keep(self, seeds: Sequence[int]) -> None:
        """Drop every other seed."""
        places = [s for s, seed in enumerate(self.seeds) if seed in seeds]
        if len(places) == len(self.seeds):
            return
        self.seeds = tuple(self.seeds[s] for s in places)
        self.train, self.test = self.train[places], self.test[places]
        for tensors in (self.probes, self.parameters, self.first, self.second):
            for name in tensors:
                tensors[name] = tensors[name][places]
