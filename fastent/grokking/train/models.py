"""The models by name: parameters and their starting values, head and loss, and each as an ordinary module.

The stacked models (`fastent.grokking.train.stacked`) share the names of their parameters with `PlainTransformer` and
`PlainMLP`, so a state moves over by `load_state_dict`. Those compute every position in full, by
`torch.nn.TransformerEncoderLayer` under `torch.nn.Embedding`: what the trainer is tested and timed against.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastent.grokking.train.config import TrainConfig
from fastent.grokking.train.registry import BUILT_IN, find, origin
from fastent.grokking.train.stacked import MLP, Parameters, Transformer, into_input, into_weight, linear
from fastent.grokking.train.tasks import Task, generator


class PlainTransformer(nn.Module):
    """Encoder layers on embedded tokens and positions, and a linear head."""

    def __init__(self, config: TrainConfig, task: Task) -> None:
        super().__init__()
        self.readout = config.readout
        self.equals = task.vocabulary if config.equals_token else None
        self.tokens = nn.Embedding(task.vocabulary + config.equals_token, config.width)
        self.positions = nn.Embedding(task.inputs.shape[1] + config.equals_token, config.width)
        layers = [_encoder_layer(config) for _ in range(config.layers)]
        self.layer = layers[0] if config.layers == 1 else nn.Sequential(*layers)
        self.final_norm = nn.LayerNorm(config.width) if config.final_norm else nn.Identity()
        self.entropy_at = config.entropy_at
        self.head = nn.Linear(config.width, task.classes)

    def read(self, pairs: Tensor) -> Tensor:
        """Vector read out of the layer, (N, width), of the tokens of pairs, (N, 2) or (N, 10)."""
        if self.equals is not None:
            pairs = torch.cat([pairs, pairs.new_full((len(pairs), 1), self.equals)], dim=1)
        hidden: Tensor = self.layer(self.tokens(pairs) + self.positions.weight)
        return hidden[:, -1] if self.readout == "last" else hidden.mean(1)

    def represent(self, pairs: Tensor) -> Tensor:
        """Representation that is measured, (N, width), of the tokens of pairs."""
        read = self.read(pairs)
        return read if self.entropy_at == "readout" else self.final_norm(read)

    def forward(self, pairs: Tensor) -> Tensor:
        """Logits (N, classes) of the tokens of pairs."""
        logits: Tensor = self.head(self.final_norm(self.read(pairs)))
        return logits


def _encoder_layer(config: TrainConfig) -> nn.TransformerEncoderLayer:
    layer = nn.TransformerEncoderLayer(
        config.width,
        config.heads,
        config.feedforward,
        dropout=0.0,
        activation=config.activation,
        batch_first=True,
        norm_first=config.norm_place == "pre",
    )
    if config.norm_place == "none":
        layer.norm1 = nn.Identity()  # type: ignore[assignment]
        layer.norm2 = nn.Identity()  # type: ignore[assignment]
    return layer


class PlainMLP(nn.Module):
    """Hidden layers on the two embeddings, side by side or summed, and a linear head."""

    def __init__(self, config: TrainConfig, task: Task) -> None:
        super().__init__()
        self.concat = config.combine == "concat"
        self.tokens = nn.Embedding(task.vocabulary, config.width)
        sizes = [config.width * (2 if self.concat else 1), *config.hidden]
        self.layers = nn.ModuleList(nn.Linear(m, n) for m, n in pairwise(sizes))
        self.activation = nn.ReLU() if config.activation == "relu" else nn.GELU()
        self.head = nn.Linear(sizes[-1], task.classes)

    def represent(self, pairs: Tensor) -> Tensor:
        """Last hidden layer, (N, hidden[-1]), of token pairs (N, 2)."""
        embedded = self.tokens(pairs)
        hidden: Tensor = embedded.flatten(1) if self.concat else embedded.sum(1)
        for layer in self.layers:
            hidden = self.activation(layer(hidden))
        return hidden

    def forward(self, pairs: Tensor) -> Tensor:
        """Logits (N, classes) of token pairs (N, 2)."""
        logits: Tensor = self.head(self.represent(pairs))
        return logits


class ModelMaker(Protocol):
    """A model by name: what is registered as "model"."""

    def __call__(self, config: TrainConfig, task: Task, /) -> nn.Module:
        """Make the module of one seed, with its starting values.

        Parameters
        ----------
        config : TrainConfig
        task : Task
            Its `vocabulary`, `classes` and the length of its `inputs` say what the module takes and gives.

        Returns
        -------
        nn.Module
            From the tokens of pairs, (N, T) int64, to logits, (N, `task.classes`).
        """


def plain_model(config: TrainConfig, task: Task) -> PlainTransformer | PlainMLP:
    """Return the ordinary module of a configuration of ours, with torch's own initial values."""
    return PlainMLP(config, task) if config.model == "mlp" else PlainTransformer(config, task)


def hand_written(config: TrainConfig) -> bool:
    """Whether a configuration's model has gradients by hand (`fastent.grokking.train.stacked`)."""
    return config.model in BUILT_IN["model"] and config.layers == 1


def starting_module(config: TrainConfig, task: Task, seed: int) -> nn.Module:
    """Return the ordinary module of a configuration as a seed starts it: a function of the seed alone.

    Ours start at `initial_parameters`. Another's is made with torch's generators set by the seed.

    Raises
    ------
    ValueError
        If there is no such model.
    TypeError
        If its maker returns something else.
    """
    with seeded(seed, "start"):
        made = find("model", config.model)(config, task)
    if not isinstance(made, nn.Module):
        raise TypeError(
            f"model {config.model!r} of {origin('model', config.model)} must be made as a torch.nn.Module; got "
            f"{type(made).__name__}"
        )
    if config.model in BUILT_IN["model"]:
        made.load_state_dict(initial_parameters(config, task, seed))
    return made


@contextlib.contextmanager
def seeded(seed: int, purpose: str, turn: int = 0, device: torch.device | None = None) -> Iterator[None]:
    """Set torch's random numbers by (seed, purpose, turn) while open, and put them back."""
    on = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=on):
        torch.manual_seed(int(generator(seed, purpose, turn).random_raw()))
        yield


class Model(Protocol):
    """Forward pass and gradients of a model whose parameters, (S, ...) each, are handed in."""

    columns: Tensor
    """For every pair of the task, (K, M) int64: where it looks things up, and its label last."""

    def table(self, p: Parameters) -> Any:
        """Compute what depends on one token only."""

    def forward(self, p: Parameters, table: Any, columns: Tensor) -> tuple[Tensor, Any]:
        """Input of the head, (S, N, d), for columns (K, S, N), and what gradients need.

        What is kept has the `representation` that is measured, (S, N, d).
        """

    def backward(self, p: Parameters, kept: Any, grad: Tensor) -> Parameters:
        """Gradients of all parameters but the head's from that of the head's input."""


def make_model(config: TrainConfig, task: Task, device: torch.device) -> Model:
    """Return the stacked forward pass and gradients of a configuration's model (it holds no parameters)."""
    return Transformer(config, task, device) if config.model == "transformer" else MLP(config, task, device)


def pair_losses(p: Parameters, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each pair, and whether its class is likelier than every other: (S, N) each."""
    return judged(linear(hidden, p["head.weight"], p["head.bias"]), labels)


def judged(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """`pair_losses` of logits (S, N, classes)."""
    places = labels.unsqueeze(2)
    chances = logits.log_softmax(2)
    own = chances.gather(2, places).squeeze(2)
    # A quarter of argmax's time; and a tie, as of a head that says nothing, is not right.
    rival = chances.scatter_(2, places, -math.inf).amax(2)
    return -own, own > rival


def logit_scale(p: Parameters, hidden: Tensor) -> Tensor:
    """Root mean square of the logits, each row less its mean over the classes: (S, N, d) to (S,), float64."""
    return spread(linear(hidden, p["head.weight"], p["head.bias"]))


def spread(logits: Tensor) -> Tensor:
    """`logit_scale` of logits (S, N, classes)."""
    return (logits - logits.mean(2, keepdim=True)).double().square().mean((1, 2)).sqrt()


def head_gradients(p: Parameters, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Parameters]:
    """Mean cross-entropy (S,), its gradient in the head's input (S, N, d), and the head's gradients."""
    n = hidden.shape[1]
    places = labels.unsqueeze(2)
    chances = linear(hidden, p["head.weight"], p["head.bias"]).log_softmax(2)
    losses = chances.gather(2, places).mean((1, 2)).neg_()
    grad = chances.exp_().div_(n)
    grad.scatter_add_(2, places, grad.new_full((1, 1, 1), -1 / n).expand(places.shape))
    head = {"head.weight": into_weight(grad, hidden), "head.bias": grad.sum(1)}
    return losses, into_input(grad, p["head.weight"]), head


class Condition:
    """Training as it is; a subclass (`fastent.grokking.train.conditions`) overrides what it changes.

    A condition holds no state that a run accumulates: what it does is a function of the seed, the step and
    the tensors at hand, so that a run resumes exactly.
    """

    @property
    def touches_head(self) -> bool:
        """Whether it changes what the head is trained on, or how: a model without `head` cannot have it."""
        changed = ("before_head", "before_head_gradient", "head_gradients")
        return any(getattr(type(self), name) is not getattr(Condition, name) for name in changed)

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
        """Return what the two methods below need of this host in step number `step` (from 1) of `seeds`.

        The shapes are the same at every step: on a GPU these numbers are there before the step is launched. The
        methods get them as tensors beside the parameters, one iterator for both: each takes as many as are its own.
        They read no tensor on the host, or the step could not be captured as a CUDA graph.
        """
        return []

    def head_gradients(
        self, p: Parameters, hidden: Tensor, labels: Tensor, numbers: Iterator[Tensor]
    ) -> tuple[Tensor, Tensor, Parameters]:
        """Return what the function of that name returns, of the loss that is trained on."""
        return head_gradients(p, hidden, labels)

    def after_step(self, state: Mapping[str, Parameters], numbers: Iterator[Tensor]) -> None:
        """Change a step's "parameter" tensors, (S, ...) each, or their "first" and "second" moments, in place."""


def parameter_shapes(config: TrainConfig, task: Task) -> dict[str, tuple[int, ...]]:
    """Shape of each parameter by its name in `fastent.grokking.train.models`'s module, in a fixed order."""
    d, f = config.width, config.feedforward
    if config.model == "mlp":
        shapes: dict[str, tuple[int, ...]] = {"tokens.weight": (task.vocabulary, d)}
        sizes = [d * (2 if config.combine == "concat" else 1), *config.hidden]
        for k, (m, n) in enumerate(pairwise(sizes)):
            shapes |= {f"layers.{k}.weight": (n, m), f"layers.{k}.bias": (n,)}
        return shapes | {"head.weight": (task.classes, sizes[-1]), "head.bias": (task.classes,)}
    shapes = {
        "tokens.weight": (task.vocabulary + config.equals_token, d),
        "positions.weight": (task.inputs.shape[1] + config.equals_token, d),
    }
    for layer in ["layer"] if config.layers == 1 else [f"layer.{k}" for k in range(config.layers)]:
        shapes |= {
            f"{layer}.self_attn.in_proj_weight": (3 * d, d),
            f"{layer}.self_attn.in_proj_bias": (3 * d,),
            f"{layer}.self_attn.out_proj.weight": (d, d),
            f"{layer}.self_attn.out_proj.bias": (d,),
            f"{layer}.linear1.weight": (f, d),
            f"{layer}.linear1.bias": (f,),
            f"{layer}.linear2.weight": (d, f),
            f"{layer}.linear2.bias": (d,),
        }
        for norm in [] if config.norm_place == "none" else ["norm1", "norm2"]:
            shapes |= {f"{layer}.{norm}.weight": (d,), f"{layer}.{norm}.bias": (d,)}
    if config.final_norm:
        shapes |= {"final_norm.weight": (d,), "final_norm.bias": (d,)}
    return shapes | {"head.weight": (task.classes, d), "head.bias": (task.classes,)}


def initial_parameters(config: TrainConfig, task: Task, seed: int) -> dict[str, Tensor]:
    """Draw a seed's starting values, float64.

    LayerNorms start at scale 1 and bias 0; embeddings are normal with standard deviation `config.init_scale`. The
    rest by `config.start`: "torch", the distributions of torch's own layers (the attention's input projection
    Xavier uniform, its biases 0, linear layers uniform within 1 / sqrt(fan-in)); "xavier", every matrix Xavier
    uniform and every bias 0; "normal", every matrix, embeddings too, normal with standard deviation 0.02, every
    bias 0. Each parameter has a counter-based generator of its own, keyed by seed and name: a variant that lacks
    one leaves the others as they are.
    """
    shapes = parameter_shapes(config, task)
    return {name: torch.from_numpy(_draw(name, shapes, config, seed)) for name in shapes}


def _draw(
    name: str, shapes: dict[str, tuple[int, ...]], config: TrainConfig, seed: int
) -> NDArray[np.float64]:
    shape = shapes[name]
    bias = name.endswith("bias")
    if "norm" in name:
        return np.full(shape, 0.0 if bias else 1.0)
    if bias and (config.start != "torch" or "self_attn" in name):
        return np.zeros(shape)
    # Two uniforms in (0, 1) for each number, from the generator's raw words, which NumPy promises to keep.
    words = generator(seed, f"start {name}").random_raw(2 * math.prod(shape))
    first, second = ((words.reshape(2, *shape) >> np.uint64(11)) + 0.5) * 2.0**-53
    if config.start == "normal" or name in ("tokens.weight", "positions.weight"):
        normal: NDArray[np.float64] = np.sqrt(-2 * np.log(first)) * np.cos(2 * np.pi * second)
        return (0.02 if config.start == "normal" else config.init_scale) * normal  # Box and Muller 1958
    fan_in = shapes[name.removesuffix("bias") + "weight"][1] if bias else shape[1]
    xavier = config.start == "xavier" or name.endswith("in_proj_weight")
    bound = math.sqrt(6 / sum(shape)) if xavier else 1 / math.sqrt(fan_in)
    uniform: NDArray[np.float64] = 2 * first - 1
    return bound * uniform
