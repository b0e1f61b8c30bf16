"""The trainer's models as ordinary modules: what it is tested and timed against, and what a state exports to.

`PlainTransformer` is `torch.nn.TransformerEncoderLayer` under `torch.nn.Embedding`, every position computed
in full. Its parameters have the names of `fastent.train.models`, so a state moves over by
`load_state_dict`.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from fastent.train.presets import TrainConfig
from fastent.train.tasks import Task


class PlainTransformer(nn.Module):
    """One encoder layer on embedded tokens and positions, and a linear head."""

    def __init__(self, config: TrainConfig, task: Task) -> None:
        super().__init__()
        self.readout = config.readout
        self.equals = task.vocabulary if config.equals_token else None
        self.tokens = nn.Embedding(task.vocabulary + config.equals_token, config.width)
        self.positions = nn.Embedding(2 + config.equals_token, config.width)
        self.layer = nn.TransformerEncoderLayer(
            config.width,
            config.heads,
            config.feedforward,
            dropout=0.0,
            activation=config.activation,
            batch_first=True,
            norm_first=config.norm_place == "pre",
        )
        if config.norm_place == "none":
            self.layer.norm1 = nn.Identity()  # type: ignore[assignment]
            self.layer.norm2 = nn.Identity()  # type: ignore[assignment]
        self.head = nn.Linear(config.width, task.classes)

    def represent(self, pairs: Tensor) -> Tensor:
        """Representation handed to the head, (N, width), of token pairs (N, 2)."""
        if self.equals is not None:
            pairs = torch.cat([pairs, pairs.new_full((len(pairs), 1), self.equals)], dim=1)
        hidden: Tensor = self.layer(self.tokens(pairs) + self.positions.weight)
        return hidden[:, -1] if self.readout == "last" else hidden.mean(1)

    def forward(self, pairs: Tensor) -> Tensor:
        """Logits (N, classes) of token pairs (N, 2)."""
        logits: Tensor = self.head(self.represent(pairs))
        return logits


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


def plain_model(config: TrainConfig, task: Task) -> PlainTransformer | PlainMLP:
    """Return the ordinary module of a configuration, with torch's own initial values."""
    return PlainTransformer(config, task) if config.model == "transformer" else PlainMLP(config, task)
