"""The multilayer perceptron of stacked seeds: forward and gradients by hand, only what reaches the loss.

The first layer is linear in each operand's embedding, so its product with every token is computed once, and
a pair adds up its two rows. Otherwise as `fastent.train.plain.PlainMLP`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastent.train.presets import TrainConfig
from fastent.train.products import Parameters, add_rows, into_input, into_weight, linear, take_rows
from fastent.train.tasks import Task


class Kept(NamedTuple):
    """What the gradients need of a forward pass."""

    columns: Tensor
    before: list[Tensor]  # of each hidden layer, before its nonlinearity
    after: list[Tensor]  # and after it, (S, N, size)


class MLP:
    """Forward pass and gradients for parameters (S, ...) and pairs given by their `columns`.

    Attributes
    ----------
    columns : Tensor, shape (3, M), int64
        For every pair of the task: its two rows of the table and its label.
    """

    def __init__(self, config: TrainConfig, task: Task, device: torch.device) -> None:
        self.width, self.layers = config.width, len(config.hidden)
        self.concat = config.combine == "concat"
        self.gelu = config.activation == "gelu"
        second = task.inputs[:, 1] + (task.vocabulary if self.concat else 0)
        self.columns = torch.stack([task.inputs[:, 0], second, task.labels]).to(device)

    def table(self, p: Parameters) -> Tensor:
        """First layer's products with the tokens, its bias added to the first operand's: (S, R, size)."""
        tokens, weight, bias = p["tokens.weight"], p["layers.0.weight"], p["layers.0.bias"]
        if not self.concat:
            # Each of the two rows brings half of the bias.
            return linear(tokens, weight, bias / 2)
        first, second = weight[:, :, : self.width], weight[:, :, self.width :]
        return torch.cat([linear(tokens, first, bias), linear(tokens, second, torch.zeros_like(bias))], 1)

    def forward(self, p: Parameters, table: Tensor, columns: Tensor) -> tuple[Tensor, Kept]:
        """Last hidden layer, (S, N, hidden[-1]), of the pairs with `columns` (3, S, N)."""
        before = [take_rows(table, columns[0]).add_(take_rows(table, columns[1]))]
        after = [self._activate(before[0])]
        for k in range(1, self.layers):
            before.append(linear(after[-1], p[f"layers.{k}.weight"], p[f"layers.{k}.bias"]))
            after.append(self._activate(before[-1]))
        return after[-1], Kept(columns, before, after)

    def backward(self, p: Parameters, kept: Kept, grad: Tensor) -> Parameters:
        """Gradients of all parameters but the head's from that of the representation."""
        g: Parameters = {}
        for k in range(self.layers - 1, -1, -1):
            if self.gelu:
                grad = torch.ops.aten.gelu_backward(grad, kept.before[k])
            else:
                grad = torch.ops.aten.threshold_backward(grad, kept.after[k], 0)
            g[f"layers.{k}.bias"] = grad.sum(1)
            if k > 0:
                g[f"layers.{k}.weight"] = into_weight(grad, kept.after[k - 1])
                grad = into_input(grad, p[f"layers.{k}.weight"])
        tokens, weight = p["tokens.weight"], p["layers.0.weight"]
        n = tokens.shape[1]
        table = grad.new_zeros(len(tokens), n * (2 if self.concat else 1), grad.shape[2])
        add_rows(table, kept.columns[0], grad)
        add_rows(table, kept.columns[1], grad)
        if self.concat:
            first, second = table[:, :n], table[:, n:]
            g["layers.0.weight"] = torch.cat([into_weight(first, tokens), into_weight(second, tokens)], 2)
            g["tokens.weight"] = into_input(first, weight[:, :, : self.width]).add_(
                into_input(second, weight[:, :, self.width :])
            )
        else:
            g["layers.0.weight"] = into_weight(table, tokens)
            g["tokens.weight"] = into_input(table, weight)
        return g

    def _activate(self, before: Tensor) -> Tensor:
        return torch.nn.functional.gelu(before) if self.gelu else before.relu()
