"""Names, shapes and initial values of the models' parameters."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from fastent.train.presets import TrainConfig
from fastent.train.tasks import Task, generator


def parameter_shapes(config: TrainConfig, task: Task) -> dict[str, tuple[int, ...]]:
    """Shape of each parameter by its name in `fastent.train.plain`'s module, in a fixed order."""
    d, f = config.width, config.feedforward
    if config.model == "mlp":
        shapes: dict[str, tuple[int, ...]] = {"tokens.weight": (task.vocabulary, d)}
        sizes = [d * (2 if config.combine == "concat" else 1), *config.hidden]
        for k, (m, n) in enumerate(pairwise(sizes)):
            shapes |= {f"layers.{k}.weight": (n, m), f"layers.{k}.bias": (n,)}
        return shapes | {"head.weight": (task.classes, sizes[-1]), "head.bias": (task.classes,)}
    shapes = {
        "tokens.weight": (task.vocabulary + config.equals_token, d),
        "positions.weight": (2 + config.equals_token, d),
        "layer.self_attn.in_proj_weight": (3 * d, d),
        "layer.self_attn.in_proj_bias": (3 * d,),
        "layer.self_attn.out_proj.weight": (d, d),
        "layer.self_attn.out_proj.bias": (d,),
        "layer.linear1.weight": (f, d),
        "layer.linear1.bias": (f,),
        "layer.linear2.weight": (d, f),
        "layer.linear2.bias": (d,),
    }
    if config.norm_place != "none":
        for norm in ("layer.norm1", "layer.norm2"):
            shapes |= {f"{norm}.weight": (d,), f"{norm}.bias": (d,)}
    return shapes | {"head.weight": (task.classes, d), "head.bias": (task.classes,)}


def initial_parameters(config: TrainConfig, task: Task, seed: int) -> dict[str, Tensor]:
    """Draw a seed's starting values, float64, by the distributions of torch's own layers.

    Embeddings are normal with standard deviation `config.init_scale`; the attention's input projection is
    Xavier uniform with zero biases; linear layers are uniform within 1 / sqrt(fan-in). Each parameter has a
    counter-based generator of its own, keyed by seed and name: a variant that lacks one leaves the others as
    they are.
    """
    shapes = parameter_shapes(config, task)
    return {name: torch.from_numpy(_draw(name, shapes, config, seed)) for name in shapes}


def _draw(name: str, shapes: dict[str, tuple[int, ...]], config: TrainConfig, seed: int) -> np.ndarray:
    shape = shapes[name]
    if ".norm" in name:
        return np.full(shape, 1.0 if name.endswith("weight") else 0.0)
    if name in ("layer.self_attn.in_proj_bias", "layer.self_attn.out_proj.bias"):
        return np.zeros(shape)
    numbers = np.random.Generator(generator(seed, f"start {name}"))
    if name in ("tokens.weight", "positions.weight"):
        return config.init_scale * numbers.standard_normal(shape)
    fan_in = shapes[name.removesuffix("bias") + "weight"][1] if name.endswith("bias") else shape[1]
    bound = math.sqrt(6 / sum(shape)) if name.endswith("in_proj_weight") else 1 / math.sqrt(fan_in)
    return numbers.uniform(-bound, bound, shape)
