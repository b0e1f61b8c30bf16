"""The one-layer Transformer of stacked seeds: forward and gradients by hand, only what reaches the loss.

Keys, values and attention scores exist only once for each distinct (token, position): they are computed
from that table, and each pair looks its own up. Where the last position is read, only its query, its
residual and its feed-forward part are computed. Every product is what
`fastent.train.plain.PlainTransformer` has, in another order, so loss and gradients agree to rounding.

Shapes: S seeds, N pairs, T positions, U positions read (1 or T), R rows of the table, Q rows that are
queried, d = width, h heads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastent.train.presets import TrainConfig
from fastent.train.products import (
    Parameters,
    add_numbers,
    add_rows,
    into_input,
    into_weight,
    layer_norm,
    layer_norm_gradient,
    linear,
    linear_onto,
    take_rows,
)
from fastent.train.tasks import Task

_IN, _OUT = "layer.self_attn.in_proj_", "layer.self_attn.out_proj."
_FEED1, _FEED2 = "layer.linear1.", "layer.linear2."
_NORM1, _NORM2 = "layer.norm1.", "layer.norm2."
_NOTHING: tuple[Tensor, ...] = ()


class Table(NamedTuple):
    """What depends on a single (token, position)."""

    embedded: Tensor  # (S, R, d) residual stream before the layer
    read: Tensor  # (S, R, d) what the attention reads: `embedded`, or its LayerNorm
    norm: tuple[Tensor, ...]  # for the gradient of that LayerNorm
    query: Tensor  # (S, h, Q, d/h), scaled
    key: Tensor  # (S, h, R, d/h)
    value: Tensor  # (S, R, d)
    scores: Tensor  # (S, h, Q R)


class Kept(NamedTuple):
    """What the gradients need of a forward pass; rows are N pairs for each of U positions, position slowest."""

    table: Table
    columns: Tensor
    places: Tensor  # (S, h, U T N) of the scores used
    weights: Tensor  # (S, U, T, N, h)
    values: list[Tensor]  # T of (S, N, d)
    mixed: Tensor  # (S, U N, d) heads' outputs
    norm1: tuple[Tensor, ...]
    read: Tensor  # (S, U N, d) what the feed-forward part reads
    norm2: tuple[Tensor, ...]
    before: Tensor | None  # (S, U N, f) before the nonlinearity, where its gradient needs that
    hidden: Tensor  # (S, U N, f)


class Transformer:
    """Forward pass and gradients for parameters (S, ...) and pairs given by their `columns`.

    Attributes
    ----------
    columns : Tensor, shape (T + U T + 1, M), int64
        For every pair of the task: its T rows of the table, its U T places in the flattened scores, its
        label.
    """

    def __init__(self, config: TrainConfig, task: Task, device: torch.device) -> None:
        n = task.operands
        self.task, self.heads, self.place = task, config.heads, config.norm_place
        # Tokens that occur at each position.
        self.parts = [slice(0, n), slice(task.offset, task.offset + n)]
        self.gelu = config.activation == "gelu"
        self.width = config.width
        self.scale = (config.width // config.heads) ** -0.5
        rows = [task.inputs[:, 0], task.inputs[:, 1] - task.offset + n]
        if config.equals_token:
            rows.append(torch.full_like(rows[0], 2 * n))
            self.parts.append(slice(task.vocabulary, task.vocabulary + 1))
        self.positions = len(rows)
        self.table_rows = 2 * n + config.equals_token
        last = config.readout == "last"
        # Queried rows: of the last position, or all.
        self.queries = slice((self.positions - 1) * n if last else 0, self.table_rows)
        readers = rows[-1:] if last else rows
        self.reads = len(readers)
        scores = [(u - self.queries.start) * self.table_rows + row for u in readers for row in rows]
        self.columns = torch.stack([*rows, *scores, task.labels]).to(device)

    def table(self, p: Parameters) -> Table:
        """Compute everything that depends on one token and its position only."""
        n, tokens, positions = self.task.operands, p["tokens.weight"], p["positions.weight"]
        embedded = tokens.new_empty(len(tokens), self.table_rows, self.width)
        for t, part in enumerate(self.parts):
            torch.add(tokens[:, part], positions[:, t : t + 1], out=embedded[:, t * n : (t + 1) * n])
        read, norm = embedded, _NOTHING
        if self.place == "pre":
            read, norm = layer_norm(embedded, p[_NORM1 + "weight"], p[_NORM1 + "bias"])
        weight, bias, d = p[_IN + "weight"], p[_IN + "bias"], self.width
        query = self._split(linear(read[:, self.queries], weight[:, :d], bias[:, :d])) * self.scale
        key_value = linear(read, weight[:, d:], bias[:, d:])
        key = self._split(key_value[..., :d])
        scores = torch.matmul(query, key.mT).flatten(2)
        return Table(embedded, read, norm, query, key, key_value[..., d:], scores)

    def forward(self, p: Parameters, table: Table, columns: Tensor) -> tuple[Tensor, Kept]:
        """Representation handed to the head, (S, N, d), of the pairs with `columns` (T + U T + 1, S, N)."""
        t, u, h, d = self.positions, self.reads, self.heads, self.width
        seeds, n = columns.shape[1:]
        places = columns[t : t + u * t].movedim(0, 1).reshape(seeds, 1, u * t * n).expand(-1, h, -1)
        scores = table.scores.gather(2, places).view(seeds, h, u, t, n)
        weights = scores.softmax(3).permute(0, 2, 3, 4, 1).contiguous()
        values = [take_rows(table.value, columns[k]).view(seeds, n, h, d // h) for k in range(t)]
        mixed = weights.new_empty(seeds, u, n, h, d // h)
        for j in range(u):
            torch.mul(values[0], weights[:, j, 0].unsqueeze(3), out=mixed[:, j])
            for k in range(1, t):
                mixed[:, j].addcmul_(values[k], weights[:, j, k].unsqueeze(3))
        mixed = mixed.view(seeds, u * n, d)
        base = take_rows(table.embedded, self._read_rows(columns))
        middle = linear_onto(base, mixed, p[_OUT + "weight"], p[_OUT + "bias"])
        norm1, norm2 = table.norm, _NOTHING
        if self.place == "post":
            middle, norm1 = layer_norm(middle, p[_NORM1 + "weight"], p[_NORM1 + "bias"])
        read = middle
        if self.place == "pre":
            read, norm2 = layer_norm(middle, p[_NORM2 + "weight"], p[_NORM2 + "bias"])
        before = None
        if self.gelu:
            before = linear(read, p[_FEED1 + "weight"], p[_FEED1 + "bias"])
            hidden = torch.nn.functional.gelu(before)
        else:
            hidden = linear(read, p[_FEED1 + "weight"], p[_FEED1 + "bias"], relu=True)
        out = linear_onto(middle, hidden, p[_FEED2 + "weight"], p[_FEED2 + "bias"])
        if self.place == "post":
            out, norm2 = layer_norm(out, p[_NORM2 + "weight"], p[_NORM2 + "bias"])
        kept = Kept(table, columns, places, weights, values, mixed, norm1, read, norm2, before, hidden)
        return (out if u == 1 else out.view(seeds, u, n, d).mean(1)), kept

    def backward(self, p: Parameters, kept: Kept, grad: Tensor) -> Parameters:
        """Gradients of all parameters but the head's from that of the representation, (S, N, d)."""
        u, g = self.reads, {}
        if u > 1:
            grad = (grad / u).unsqueeze(1).expand(-1, u, -1, -1).flatten(1, 2)
        if self.place == "post":
            grad, g[_NORM2 + "weight"], g[_NORM2 + "bias"] = layer_norm_gradient(
                grad, kept.norm2, p[_NORM2 + "weight"], p[_NORM2 + "bias"]
            )
        g[_FEED2 + "weight"], g[_FEED2 + "bias"] = into_weight(grad, kept.hidden), grad.sum(1)
        inner = into_input(grad, p[_FEED2 + "weight"])
        if kept.before is not None:
            inner = torch.ops.aten.gelu_backward(inner, kept.before)
        else:
            torch.ops.aten.threshold_backward.grad_input(inner, kept.hidden, 0, grad_input=inner)
        g[_FEED1 + "weight"], g[_FEED1 + "bias"] = into_weight(inner, kept.read), inner.sum(1)
        read = into_input(inner, p[_FEED1 + "weight"])
        if self.place == "pre":
            read, g[_NORM2 + "weight"], g[_NORM2 + "bias"] = layer_norm_gradient(
                read, kept.norm2, p[_NORM2 + "weight"], p[_NORM2 + "bias"]
            )
        grad = read.add_(grad)
        if self.place == "post":
            grad, g[_NORM1 + "weight"], g[_NORM1 + "bias"] = layer_norm_gradient(
                grad, kept.norm1, p[_NORM1 + "weight"], p[_NORM1 + "bias"]
            )
        g[_OUT + "weight"], g[_OUT + "bias"] = into_weight(grad, kept.mixed), grad.sum(1)
        query, key_value = self._attention_backward(kept, into_input(grad, p[_OUT + "weight"]))
        return self._table_backward(p, kept, g, query, key_value, grad)

    def _attention_backward(self, kept: Kept, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the table's queries (S, Q, d) and keys and values (S, R, 2 d)."""
        seeds, u, t, n, h = kept.weights.shape
        table, heads = kept.table, grad.view(seeds, u, n, h, -1)
        weights = torch.stack([(heads * v.unsqueeze(1)).sum(4) for v in kept.values], 2)
        scores = torch.ops.aten._softmax_backward_data(weights, kept.weights, 2, weights.dtype)
        value = torch.zeros_like(table.value, memory_format=torch.contiguous_format)
        for k in range(t):
            rows = heads * kept.weights[:, :, k].unsqueeze(4)
            rows = rows.sum(1) if u > 1 else rows[:, 0]
            add_rows(value, kept.columns[k], rows.view(seeds, n, -1))
        full = torch.zeros_like(table.scores)
        add_numbers(full, kept.places, scores.permute(0, 4, 1, 2, 3).reshape(seeds, h, u * t * n))
        full = full.view(seeds, h, -1, self.table_rows)
        query = self._merge(torch.matmul(full, table.key)).mul_(self.scale)
        key = self._merge(torch.matmul(full.mT, table.query))
        return query, torch.cat([key, value], 2)

    def _table_backward(
        self, p: Parameters, kept: Kept, g: Parameters, query: Tensor, key_value: Tensor, base: Tensor
    ) -> Parameters:
        """Gradients of the input projection and the embeddings, added to `g`."""
        n, d, table = self.task.operands, self.width, kept.table
        weight = p[_IN + "weight"]
        g[_IN + "weight"] = torch.cat(
            [into_weight(query, table.read[:, self.queries]), into_weight(key_value, table.read)], 1
        )
        g[_IN + "bias"] = torch.cat([query.sum(1), key_value.sum(1)], 1)
        grad = into_input(key_value, weight[:, d:])
        grad[:, self.queries].add_(into_input(query, weight[:, :d]))
        if self.place == "pre":
            grad, g[_NORM1 + "weight"], g[_NORM1 + "bias"] = layer_norm_gradient(
                grad, table.norm, p[_NORM1 + "weight"], p[_NORM1 + "bias"]
            )
        add_rows(grad, self._read_rows(kept.columns), base)
        tokens, positions = torch.zeros_like(p["tokens.weight"]), []
        for t, part in enumerate(self.parts):
            rows = grad[:, t * n : (t + 1) * n]
            tokens[:, part].add_(rows)
            positions.append(rows.sum(1))
        g["tokens.weight"], g["positions.weight"] = tokens, torch.stack(positions, 1)
        return g

    def _read_rows(self, columns: Tensor) -> Tensor:
        """Rows of the table whose residual is read, (S, U N), position slowest."""
        rows = columns[self.positions - self.reads : self.positions]
        return rows.movedim(0, 1).flatten(1)

    def _split(self, x: Tensor) -> Tensor:
        """(S, R, d) to (S, h, R, d/h)."""
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)

    def _merge(self, x: Tensor) -> Tensor:
        """(S, h, R, d/h) to (S, R, d)."""
        return x.transpose(1, 2).flatten(2)
