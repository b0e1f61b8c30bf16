"""The models of stacked seeds: forward and gradients by hand, only what reaches the loss, seeds as the leading axis.

On a CPU in float32, one seed at a time, the products go to oneDNN: torch hands float32 products to MKL, which on a
Zen 5 core is 2.2 times slower at these sizes (110 against 245 GFLOP/s). Elsewhere they are batched products. Nothing
here records a graph.

The Transformer has keys, values and attention scores only once for each distinct (token, position): they are
computed from that table, and each pair looks its own up. Where the last position is read, only its query, its
residual and its feed-forward part are computed. The perceptron's first layer is linear in each operand's embedding, so
its product with every token is computed once, and a pair adds up its two rows. Every product is what
`fastent.grokking.train.models.PlainTransformer` and `PlainMLP` have, in another order, so loss and gradients agree to
rounding.

Shapes: S seeds, N pairs, T positions, U positions read (1 or T), R rows of the table, Q rows that are queried,
d = width, h heads.
"""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from fastent.grokking.train.config import TrainConfig
from fastent.grokking.train.tasks import Task

Parameters = dict[str, Tensor]
"""Tensors by the names of `fastent.grokking.train.models`'s module, each with a leading axis of seeds."""

_HAS_ONEDNN = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]


def _onednn(x: Tensor) -> bool:
    return _HAS_ONEDNN and len(x) == 1 and x.dtype == torch.float32 and x.device.type == "cpu"


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None, after: str = "none") -> Tensor:
    # A weight that is dense neither way round would fall to oneDNN's reference loop, 1,000 times slower.
    if not (weight.is_contiguous() or weight.mT.is_contiguous()):
        weight = weight.contiguous()
    out: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, after, [], "")
    return out


def linear(x: Tensor, weight: Tensor, bias: Tensor, *, relu: bool = False) -> Tensor:
    """``x weight^T + bias``, and its positive part if `relu`: (S, N, k), (S, n, k), (S, n) to (S, N, n)."""
    if _onednn(x):
        return _product(x, weight[0], bias[0], "relu" if relu else "none")
    out = torch.baddbmm(bias.unsqueeze(1), x, weight.mT)
    return out.relu_() if relu else out


def linear_onto(base: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Add a sublayer's output to its residual: ``base + x weight^T + bias``, base (S, N, n)."""
    if _onednn(x):
        total: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, base, weight[0], bias[0], "add")
        return total
    return torch.baddbmm(base, x, weight.mT).add_(bias.unsqueeze(1))


def into_input(grad: Tensor, weight: Tensor) -> Tensor:
    """Gradient of `linear`'s input, ``grad weight``: (S, N, n), (S, n, k) to (S, N, k)."""
    if _onednn(grad):
        return _product(grad, weight[0].mT)
    return torch.bmm(grad, weight)


def into_weight(grad: Tensor, x: Tensor) -> Tensor:
    """Gradient of `linear`'s weight, ``grad^T x``: (S, N, n), (S, N, k) to (S, n, k)."""
    if _onednn(grad):
        # oneDNN copies a transposed first factor: let it be the narrow one.
        if grad.shape[2] <= x.shape[2]:
            return _product(grad.mT, x[0].mT)
        return _product(x.mT, grad[0].mT).mT.contiguous()
    return torch.bmm(grad.mT, x)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """LayerNorm over the last axis, (S, N, d) with (S, d) scales, and what its gradient needs."""
    shape = [x.shape[-1]]
    if len(x) == 1:
        y, mean, rstd = torch.native_layer_norm(x, shape, weight[0], bias[0], 1e-5)
    else:
        y, mean, rstd = torch.native_layer_norm(x, shape, None, None, 1e-5)
        y = torch.addcmul(bias.unsqueeze(1), y, weight.unsqueeze(1))
    return y, (x, mean, rstd)


def layer_norm_gradient(
    grad: Tensor, saved: tuple[Tensor, ...], weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `layer_norm`'s input (S, N, d), weight (S, d) and bias (S, d)."""
    x, mean, rstd = saved
    shape = [x.shape[-1]]
    if len(x) == 1:
        dx, dw, db = torch.ops.aten.native_layer_norm_backward(
            grad, x, shape, mean, rstd, weight[0], bias[0], [True, True, True]
        )
        return dx, dw.unsqueeze(0), db.unsqueeze(0)
    normal = (x - mean) * rstd
    dw, db = (grad * normal).sum(1), grad.sum(1)
    dx, _, _ = torch.ops.aten.native_layer_norm_backward(
        grad * weight.unsqueeze(1), x, shape, mean, rstd, None, None, [True, False, False]
    )
    return dx, dw, db


def _norm(x: Tensor, p: Parameters, name: str) -> tuple[Tensor, tuple[Tensor, ...]]:
    return layer_norm(x, p[name + "weight"], p[name + "bias"])


def _norm_gradient(
    grad: Tensor, saved: tuple[Tensor, ...], p: Parameters, name: str, g: Parameters
) -> Tensor:
    """Gradient of the input of `_norm`; those of its parameters are put into `g`."""
    weight, bias = name + "weight", name + "bias"
    grad, g[weight], g[bias] = layer_norm_gradient(grad, saved, p[weight], p[bias])
    return grad


def tensor_norms(p: Parameters) -> Tensor:
    """Euclidean norm of each tensor, (tensors, S), float64."""
    norms = [torch.linalg.vector_norm(t.flatten(1), dim=1, dtype=torch.float64) for t in p.values()]
    return torch.stack(norms)


def take_rows(table: Tensor, index: Tensor) -> Tensor:
    """Rows of (S, R, d) at (S, N): (S, N, d)."""
    if len(table) == 1:
        return table[0].index_select(0, index[0]).unsqueeze(0)
    return table.gather(1, index.unsqueeze(2).expand(-1, -1, table.shape[2]))


def add_rows(table: Tensor, index: Tensor, rows: Tensor) -> None:
    """Add (S, N, d) to the rows of (S, R, d) at (S, N), in place: the gradient of `take_rows`."""
    if table.device.type != "cpu":
        add_in_order(table, index, rows)
    elif len(table) == 1:
        table[0].index_add_(0, index[0], rows[0])
    else:
        table.scatter_add_(1, index.unsqueeze(2).expand(-1, -1, table.shape[2]), rows)


def add_numbers(table: Tensor, index: Tensor, numbers: Tensor) -> None:
    """Add (S, h, N) to (S, h, R) at (S, h, N), in place."""
    if table.device.type != "cpu":
        add_in_order(table.view(-1, table.shape[2]), index.flatten(0, 1), numbers.flatten(0, 1))
    else:
        table.scatter_add_(2, index, numbers)


def add_in_order(table: Tensor, index: Tensor, values: Tensor) -> None:
    """Add (G, N, ...) to (G, R, ...) at (G, N), in place, with the same bits every time.

    For a GPU, where `scatter_add_` and `index_add_` add in the order in which threads happen to arrive: here the
    places are sorted first. Unsafe means that no index is checked: the check reads the greatest one on the host,
    which stops it and cannot be captured in a graph.
    """
    groups, rows = table.shape[:2]
    places = index + torch.arange(0, groups * rows, rows, device=index.device).unsqueeze(1)
    torch.ops.aten._index_put_impl_(
        table.view(-1, *table.shape[2:]),
        [places.view(-1)],
        values.flatten(0, 1),
        accumulate=True,
        unsafe=True,
    )


_IN, _OUT = "layer.self_attn.in_proj_", "layer.self_attn.out_proj."
_FEED1, _FEED2 = "layer.linear1.", "layer.linear2."
_NORM1, _NORM2 = "layer.norm1.", "layer.norm2."
_FINAL = "final_norm."
_NOTHING: tuple[Tensor, ...] = ()


class PositionTable(NamedTuple):
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

    table: PositionTable
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
    final: tuple[Tensor, ...]
    representation: Tensor  # (S, N, d) what is measured: what was read out, or its LayerNorm


class Transformer:
    """Forward pass and gradients for parameters (S, ...) and pairs given by their `columns`.

    Attributes
    ----------
    columns : Tensor, shape (T + U T + 1, M), int64
        For every pair of the task: its T rows of the table, its U T places in the flattened scores, its
        label.
    """

    def __init__(self, config: TrainConfig, task: Task, device: torch.device) -> None:
        self.heads, self.place = config.heads, config.norm_place
        self.final_norm, self.entropy_at = config.final_norm, config.entropy_at
        self.gelu = config.activation == "gelu"
        self.width = config.width
        self.scale = (config.width // config.heads) ** -0.5
        # First token and number of tokens at each position, and its part of the table.
        n, places = task.tokens, task.inputs.shape[1]
        second = places // 2
        tokens = [(0, n)] * (places - second) + [(task.offset, n)] * second
        tokens += [(task.vocabulary, 1)] * config.equals_token
        starts = [0, *accumulate(size for _, size in tokens)]
        self.parts = [
            (slice(token, token + size), slice(start, start + size))
            for (token, size), start in zip(tokens, starts, strict=False)
        ]
        inputs = [*task.inputs.unbind(1), *[torch.tensor(task.vocabulary)] * config.equals_token]
        rows = [
            (one - token + start).expand(len(task.labels))
            for one, (token, _), start in zip(inputs, tokens, starts, strict=False)
        ]
        self.positions, self.table_rows = len(rows), starts[-1]
        last = config.readout == "last"
        # Queried rows: of the last position, or all.
        self.queries = slice(starts[-2] if last else 0, self.table_rows)
        readers = rows[-1:] if last else rows
        self.reads = len(readers)
        scores = [(u - self.queries.start) * self.table_rows + row for u in readers for row in rows]
        self.columns = torch.stack([*rows, *scores, task.labels]).to(device)

    def table(self, p: Parameters) -> PositionTable:
        """Compute everything that depends on one token and its position only."""
        tokens, positions = p["tokens.weight"], p["positions.weight"]
        embedded = tokens.new_empty(len(tokens), self.table_rows, self.width)
        for t, (part, rows) in enumerate(self.parts):
            torch.add(tokens[:, part], positions[:, t : t + 1], out=embedded[:, rows])
        read, norm = embedded, _NOTHING
        if self.place == "pre":
            read, norm = _norm(embedded, p, _NORM1)
        weight, bias, d = p[_IN + "weight"], p[_IN + "bias"], self.width
        query = self._split(linear(read[:, self.queries], weight[:, :d], bias[:, :d])) * self.scale
        key_value = linear(read, weight[:, d:], bias[:, d:])
        key = self._split(key_value[..., :d])
        scores = torch.matmul(query, key.mT).flatten(2)
        return PositionTable(embedded, read, norm, query, key, key_value[..., d:], scores)

    def forward(self, p: Parameters, table: PositionTable, columns: Tensor) -> tuple[Tensor, Kept]:
        """Input of the head, (S, N, d), of the pairs with `columns` (T + U T + 1, S, N)."""
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
            middle, norm1 = _norm(middle, p, _NORM1)
        read = middle
        if self.place == "pre":
            read, norm2 = _norm(middle, p, _NORM2)
        before = None
        if self.gelu:
            before = linear(read, p[_FEED1 + "weight"], p[_FEED1 + "bias"])
            hidden = torch.nn.functional.gelu(before)
        else:
            hidden = linear(read, p[_FEED1 + "weight"], p[_FEED1 + "bias"], relu=True)
        out = linear_onto(middle, hidden, p[_FEED2 + "weight"], p[_FEED2 + "bias"])
        if self.place == "post":
            out, norm2 = _norm(out, p, _NORM2)
        if u > 1:
            out = out.view(seeds, u, n, d).mean(1)
        represented, final = out, _NOTHING
        if self.final_norm:
            out, final = _norm(out, p, _FINAL)
            if self.entropy_at == "final_norm":
                represented = out
        kept = (table, columns, places, weights, values, mixed, norm1, read, norm2, before, hidden, final)
        return out, Kept(*kept, represented)

    def backward(self, p: Parameters, kept: Kept, grad: Tensor) -> Parameters:
        """Gradients of all parameters but the head's from that of the head's input, (S, N, d)."""
        u, g = self.reads, Parameters()
        if self.final_norm:
            grad = _norm_gradient(grad, kept.final, p, _FINAL, g)
        if u > 1:
            grad = (grad / u).unsqueeze(1).expand(-1, u, -1, -1).flatten(1, 2)
        if self.place == "post":
            grad = _norm_gradient(grad, kept.norm2, p, _NORM2, g)
        g[_FEED2 + "weight"], g[_FEED2 + "bias"] = into_weight(grad, kept.hidden), grad.sum(1)
        inner = into_input(grad, p[_FEED2 + "weight"])
        if kept.before is not None:
            inner = torch.ops.aten.gelu_backward(inner, kept.before)
        else:
            torch.ops.aten.threshold_backward.grad_input(inner, kept.hidden, 0, grad_input=inner)
        g[_FEED1 + "weight"], g[_FEED1 + "bias"] = into_weight(inner, kept.read), inner.sum(1)
        read = into_input(inner, p[_FEED1 + "weight"])
        if self.place == "pre":
            read = _norm_gradient(read, kept.norm2, p, _NORM2, g)
        grad = read.add_(grad)
        if self.place == "post":
            grad = _norm_gradient(grad, kept.norm1, p, _NORM1, g)
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
        d, table = self.width, kept.table
        weight = p[_IN + "weight"]
        g[_IN + "weight"] = torch.cat(
            [into_weight(query, table.read[:, self.queries]), into_weight(key_value, table.read)], 1
        )
        g[_IN + "bias"] = torch.cat([query.sum(1), key_value.sum(1)], 1)
        grad = into_input(key_value, weight[:, d:])
        grad[:, self.queries].add_(into_input(query, weight[:, :d]))
        if self.place == "pre":
            grad = _norm_gradient(grad, table.norm, p, _NORM1, g)
        add_rows(grad, self._read_rows(kept.columns), base)
        tokens, positions = torch.zeros_like(p["tokens.weight"]), []
        for part, rows in self.parts:
            tokens[:, part].add_(grad[:, rows])
            positions.append(grad[:, rows].sum(1))
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


class MLPKept(NamedTuple):
    """What the gradients need of a forward pass."""

    columns: Tensor
    before: list[Tensor]  # of each hidden layer, before its nonlinearity
    after: list[Tensor]  # and after it, (S, N, size)

    @property
    def representation(self) -> Tensor:
        """What is measured: the last hidden layer."""
        return self.after[-1]


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
        if task.inputs.shape[1] != 2:
            raise ValueError(
                f"the MLP reads two tokens, and task {task.name!r} has {task.inputs.shape[1]}: choose another model"
            )
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

    def forward(self, p: Parameters, table: Tensor, columns: Tensor) -> tuple[Tensor, MLPKept]:
        """Last hidden layer, (S, N, hidden[-1]), of the pairs with `columns` (3, S, N)."""
        before = [take_rows(table, columns[0]).add_(take_rows(table, columns[1]))]
        after = [self._activate(before[0])]
        for k in range(1, self.layers):
            before.append(linear(after[-1], p[f"layers.{k}.weight"], p[f"layers.{k}.bias"]))
            after.append(self._activate(before[-1]))
        return after[-1], MLPKept(columns, before, after)

    def backward(self, p: Parameters, kept: MLPKept, grad: Tensor) -> Parameters:
        """Gradients of all parameters but the head's from that of the head's input."""
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
