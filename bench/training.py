"""Training loops: what a monitor is put into, and a step of the stacked trainer against a plain `nn.Module` loop.

`LOOPS` are the trainer's, a small vision model's and a small causal language model's. Each makes one step when called,
and comes with the model, the probe and the layer that a user would watch. Data is synthetic and lies in memory: a
loader would only make the steps longer and the overhead smaller. A probe costs about a third of a step (no backward)
for as many samples as a batch has, and the entropy; the sizes here are one or two batches, and at least four rows for
each feature of the layer.

`training` times, for the `paper` model, one step of

- `plain`: `torch.nn.TransformerEncoderLayer` under `torch.nn.Embedding`, `torch.optim.AdamW` as it comes,
  `cross_entropy`, a batch drawn by an index: the loop most people would write;
- `fastent`: the stacked trainer, data order included, for 1 seed and for 8.

The rows say how many seeds a step covers; ratios are of the time per seed, round by round. The acceptance: 1 seed
on 2 threads at most a third of `plain`, and 8 seeds no slower per seed than 1.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.harness import Row, environment, interleaved, quantiles, ratio
from fastent.activations import Tokens
from fastent.grokking.train.config import TrainConfig, preset
from fastent.grokking.train.models import plain_model
from fastent.grokking.train.stack import Stack
from fastent.grokking.train.tasks import Task, make_task, probe_index, split

VARIANTS: dict[str, dict[str, object]] = {
    "paper": {},
    "paper, mean readout": {"readout": "mean"},
    "paper, with =": {"equals_token": True},
    "MLP": {"model": "mlp"},
}


@dataclass
class TrainingLoop:
    """One training run.

    Attributes
    ----------
    model : nn.Module or None
        What is trained, wrapped or compiled where asked for; None where activations are handed over (`activations`).
    step : callable
        Makes one step.
    probe : Tensor
        What the monitor runs.
    layer : str or callable
        What it watches.
    tokens : str, optional
        As `fastent.SpectralEntropyMonitor` takes it.
    activations : callable, optional
        Where the loop itself forms them.
    """

    model: nn.Module | None
    step: Callable[[], object]
    probe: Tensor
    layer: Any
    tokens: Tokens | None = None
    activations: Callable[[], Tensor] | None = None


Wrap = Callable[[nn.Module], nn.Module]


def trainer(wrap: Wrap, seed: int) -> TrainingLoop:
    """Train the `paper` preset's Transformer as an ordinary module; 512 pairs a batch, 512 in the probe, d = 128."""
    config = preset("paper")
    task, train, batch = _pairs(config, seed)
    probe = task.inputs[probe_index(train, config.probe_size, seed, "train")]
    return _loop(plain_model(config, task), wrap, batch, probe, "layer", "last")


def _pairs(config: TrainConfig, seed: int) -> tuple[Task, Tensor, Callable[[], tuple[Tensor, Tensor]]]:
    """Task, training pairs, and what draws a batch of them by an index."""
    task = make_task(config)
    train = split(task, config.train_fraction, seed)[0]
    inputs, labels = task.inputs[train], task.labels[train]

    def batch() -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(train), (config.batch_size,))
        return inputs[rows], labels[rows]

    return task, train, batch


def stacked(wrap: Wrap, seed: int) -> TrainingLoop:
    """Train the same by the trainer's own step (`fastent.grokking.train.stack`), which is several times as fast."""
    stack = Stack(preset("paper"), [seed])
    return TrainingLoop(
        None, stack.train_step, torch.empty(0), None, None, lambda: stack.representations()[0]
    )


class Vision(nn.Module):
    """Residual network of seven convolutions on 32 x 32 images, 64 features."""

    def __init__(self) -> None:
        super().__init__()
        widths = (16, 16, 32, 64)
        self.stem = nn.Conv2d(3, widths[0], 3, stride=2, padding=1, bias=False)
        self.stages = nn.ModuleList(
            nn.ModuleDict(
                {
                    "down": nn.Conv2d(a, b, 3, stride=1 if a == b else 2, padding=1, bias=False),
                    "norm1": nn.BatchNorm2d(b),
                    "conv": nn.Conv2d(b, b, 3, padding=1, bias=False),
                    "norm2": nn.BatchNorm2d(b),
                }
            )
            for a, b in itertools.pairwise(widths)
        )
        self.features = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, 10) of images (N, 3, 32, 32)."""
        x = self.stem(x)
        for stage in self.stages:
            x = functional.relu(stage["norm1"](stage["down"](x)))
            x = functional.relu(x + stage["norm2"](stage["conv"](x)))
        return self.head(self.features(x))


def vision(wrap: Wrap, seed: int) -> TrainingLoop:
    """Train it on 128 images a batch; 256 in the probe, d = 64."""
    images, labels = torch.randn(1024, 3, 32, 32), torch.randint(10, (1024,))

    def batch() -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(images), (128,))
        return images[rows], labels[rows]

    return _loop(Vision(), wrap, batch, images[:256], "features", None)


class Language(nn.Module):
    """Causal language model: two pre-norm blocks of width 128, 64 tokens, a vocabulary of 256."""

    def __init__(self, vocabulary: int = 256, width: int = 128, length: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(width),
                    "attention": nn.Linear(width, 3 * width),
                    "out": nn.Linear(width, width),
                    "norm2": nn.LayerNorm(width),
                    "up": nn.Linear(width, 4 * width),
                    "down": nn.Linear(4 * width, width),
                }
            )
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (N, T, vocabulary) of tokens (N, T)."""
        n, t = tokens.shape
        x = self.tokens(tokens) + self.positions.weight[:t]
        for block in self.blocks:
            q, k, v = (
                part.view(n, t, self.heads, -1).transpose(1, 2)
                for part in block["attention"](block["norm1"](x)).chunk(3, dim=-1)
            )
            mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + block["out"](mixed.transpose(1, 2).flatten(2))
            x = x + block["down"](functional.gelu(block["up"](block["norm2"](x))))
        return self.head(self.norm(x))


def language(wrap: Wrap, seed: int) -> TrainingLoop:
    """Train it on 8 sequences of 64 tokens a batch; 16 in the probe, every token but the first a row, d = 128."""
    text = torch.randint(256, (512, 65))

    def batch() -> tuple[Tensor, Tensor]:
        rows = text[torch.randint(len(text), (8,))]
        return rows[:, :-1], rows[:, 1:].flatten()

    return _loop(Language(), wrap, batch, text[:16, :-1].clone(), "norm", "skip_first")


def _loop(
    model: nn.Module,
    wrap: Wrap,
    batch: Callable[[], tuple[Tensor, Tensor]],
    probe: Tensor,
    layer: str,
    tokens: Tokens | None,
) -> TrainingLoop:
    model = wrap(model)
    step = _step(model, torch.optim.AdamW(model.parameters(), lr=1e-3), batch)
    return TrainingLoop(model, step, probe, layer, tokens)


def _step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: Callable[[], tuple[Tensor, Tensor]]
) -> Callable[[], None]:
    def step() -> None:
        x, y = batch()
        loss = functional.cross_entropy(model(x).flatten(0, -2), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


LOOPS: dict[str, Callable[[Wrap, int], TrainingLoop]] = {
    "trainer's model": trainer,
    "trainer, stacked": stacked,
    "vision": vision,
    "language": language,
}


def plain_step(config: TrainConfig, seed: int) -> Callable[[], object]:
    """Return one step of the loop most people would write."""
    torch.manual_seed(seed)
    task, _, batch = _pairs(config, seed)
    model = plain_model(config, task)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, betas=config.betas
    )
    return _step(model, optimizer, batch)


def training(quick: bool) -> list[Row]:
    """Rows of every variant at this process's thread count; the ratios are printed. `quick`: of the first."""
    rows = []
    for name in list(VARIANTS)[:1] if quick else VARIANTS:
        config = replace(preset("paper"), **VARIANTS[name])  # type: ignore[arg-type]
        calls = {
            "plain": plain_step(config, 1000),
            "fastent": Stack(config, [1000]).train_step,
            "fastent x8": Stack(config, range(1000, 1008)).train_step,
        }
        seconds = interleaved(calls, rounds=5 if quick else 25)
        seconds["fastent x8"] = seconds["fastent x8"] / 8
        for provider, values in seconds.items():
            rows.append(
                {
                    "op": "training step, per seed",
                    "model": name,
                    "provider": provider.split()[0],
                    "seeds": 8 if provider.endswith("x8") else 1,
                    **quantiles(values),
                    **environment(),
                }
            )
        one = ratio(seconds["plain"], seconds["fastent"])
        eight = ratio(seconds["fastent x8"], seconds["fastent"])
        print(
            f"{name}: {one[0]:.1f} times faster than plain ({one[1]:.1f} to {one[2]:.1f}); 8 seeds take "
            f"{eight[0]:.2f} ({eight[1]:.2f} to {eight[2]:.2f}) of 1 seed's time per seed"
        )
    return rows
