"""How far representations, logits and embeddings follow the task's group: pure functions of tensors.

Everything is float64 and has a leading axis of S seeds. `Harmonics` (`fastent.train.characters`) gives the
functions on the values of the task; a block is a frequency, or an irreducible representation of S5.

- `alignment` is the paper's (section 11): the largest |Pearson r| of a coordinate of the representation with a
  character of the label. It is a maximum over some ten thousand correlations, so chance alone makes it large:
  `alignment_null` gives what it is for permuted labels.
- `label_spectrum` is ours: how the variance between the label means divides over the blocks.
- `restricted_and_excluded_loss` and `gini` are the progress measures of Nanda et al. 2023.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from fastent.train.products import add_in_order


def alignment(h: Tensor, characters: Tensor) -> Tensor:
    """Largest |Pearson r| of a column of `h` with a column of `characters`.

    Parameters
    ----------
    h : Tensor, shape (S, N, d)
        Representations.
    characters : Tensor, shape (S, N, m)
        Characters of each row's label.

    Returns
    -------
    Tensor, shape (S,), float64
        In [0, 1]; a constant column correlates with nothing.
    """
    return _largest(_standardized(h), _standardized(characters))


def alignment_null(h: Tensor, characters: Tensor, permutations: Tensor) -> Tensor:
    """`alignment` after each of Q permutations of the rows of `h` against those of `characters`.

    Parameters
    ----------
    h, characters : Tensor
        As in `alignment`.
    permutations : Tensor, shape (S, Q, N), int64

    Returns
    -------
    Tensor, shape (Q, S), float64
        With Q = 19 the alignment exceeds the largest of them with a chance of 1 in 20 if labels play no part.
    """
    x, y = _standardized(h), _standardized(characters)
    rows = torch.arange(len(x), device=x.device).unsqueeze(1)
    return torch.stack([_largest(x[rows, order], y) for order in permutations.unbind(1)])


def _standardized(x: Tensor) -> Tensor:
    x = x.double()
    x = x - x.mean(1, keepdim=True)
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    standardized: Tensor = x / norm.masked_fill(norm == 0, 1.0)
    return standardized


def _largest(x: Tensor, y: Tensor) -> Tensor:
    return torch.matmul(x.mT, y).abs().flatten(1).amax(1)


def label_means(h: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Mean of the rows of each label, and how many there are.

    Parameters
    ----------
    h : Tensor, shape (S, N, d)
    labels : Tensor, shape (S, N), int64
    classes : int

    Returns
    -------
    means : Tensor, shape (S, classes, d), float64
        The mean over all rows for a label without rows.
    counts : Tensor, shape (S, classes), float64
    """
    h = h.double()
    counts = h.new_zeros(len(h), classes).scatter_add_(1, labels, h.new_ones(labels.shape))
    means = h.new_zeros(len(h), classes, h.shape[2])
    add_in_order(means, labels, h)
    means /= counts.clamp(min=1).unsqueeze(2)
    return torch.where(counts.unsqueeze(2) > 0, means, h.mean(1, keepdim=True)), counts


def between_share(h: Tensor, means: Tensor, counts: Tensor) -> Tensor:
    """Share of the variance of `h` that lies between labels, (S,), in [0, 1]; NaN where it has none.

    Without any structure it is about (labels - 1) / (N - 1).
    """
    h = h.double()
    mean = h.mean(1, keepdim=True)
    between = (counts.unsqueeze(2) * (means - mean).square()).sum((1, 2))
    return between / (h - mean).square().sum((1, 2))


def label_spectrum(means: Tensor, basis: Tensor, block: Tensor) -> Tensor:
    """Shares of the variance between label means by block.

    Parameters
    ----------
    means : Tensor, shape (S, values, d)
        One row a value; what they have in common plays no part.
    basis : Tensor, shape (values, m)
        Orthonormal functions.
    block : Tensor, shape (m,), int64

    Returns
    -------
    Tensor, shape (S, blocks), float64
        Summing to 1; NaN where the means are all equal.
    """
    energy = block_energy(means, basis, block)
    return energy / energy.sum(1, keepdim=True)


def block_energy(functions: Tensor, basis: Tensor, block: Tensor) -> Tensor:
    """Squared norm of the projection of (S, values, d) on each block: (S, blocks), float64."""
    parts = torch.matmul(basis.T, functions.double()).square().sum(2)
    energy = parts.new_zeros(len(parts), int(block.max()) + 1)
    add_in_order(energy, block.expand_as(parts), parts)
    return energy


def participation(shares: Tensor) -> Tensor:
    """Effective number of blocks, ``(sum s)^2 / sum s^2``: (S, blocks) to (S,)."""
    return shares.sum(1).square() / shares.square().sum(1)


def strongest(shares: Tensor, count: int) -> Tensor:
    """Numbers of the `count` largest of (S, blocks), ascending: (S, count); ties to the lower number."""
    return shares.argsort(dim=1, descending=True, stable=True)[:, :count].sort(1).values


def restricted_and_excluded_loss(
    weight: Tensor,
    bias: Tensor,
    means: Tensor,
    counts: Tensor,
    train: Tensor,
    train_labels: Tensor,
    *,
    basis: Tensor,
    block: Tensor,
    keys: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy with the logits' key frequencies alone, and without them.

    The logits, as functions of a pair of operands, are projected on the functions of the result alone that
    lie in the key blocks: for addition the span of cos(w (a + b)) and sin(w (a + b)) of the key frequencies.
    That projection is the one of the logits' mean over the pairs of each result, so only those are needed.
    Restricted: that part and the constant, over all pairs. Excluded: the logits less that part, over the
    training pairs. Logits count up to a term common to all classes, which no loss sees.

    Nanda et al. take the key frequencies from the trained network. Here they are the `keys` strongest in the
    logits at this moment, since a run does not know its end.

    Parameters
    ----------
    weight, bias : Tensor, shapes (S, classes, d), (S, classes)
        The head.
    means, counts : Tensor, shapes (S, values, d), (S, values)
        Mean representation of the pairs of each result, over all pairs, and their number.
    train, train_labels : Tensor, shapes (S, N, d), (S, N)
        Representations and results of the training pairs.
    basis, block : Tensor
        As in `label_spectrum`.
    keys : int
        Number of key blocks.

    Returns
    -------
    restricted, excluded : Tensor, shape (S,), float64
        In nats.
    key : Tensor, shape (S, keys), int64
        The blocks, ascending.

    References
    ----------
    Nanda, Chan, Lieberum, Smith and Steinhardt, "Progress measures for grokking via mechanistic
    interpretability", ICLR 2023, section 5.1.
    """
    weight, bias = weight.double(), bias.double()
    weight = weight - weight.mean(1, keepdim=True)
    bias = (bias - bias.mean(1, keepdim=True)).unsqueeze(1)
    logits = torch.matmul(means, weight.mT) + bias
    key = strongest(block_energy(logits, basis, block), keys)
    chosen = (block == key.unsqueeze(2)).any(1)
    parts = torch.matmul(basis.T, logits) * chosen.unsqueeze(2)
    part = torch.matmul(basis, parts)
    share = counts / counts.sum(1, keepdim=True)
    constant = (share.unsqueeze(2) * logits).sum(1, keepdim=True)
    chances = log_softmax(constant + part, 2).diagonal(dim1=1, dim2=2)
    restricted = -(share * chances).sum(1)
    places = train_labels.unsqueeze(2)
    own = part.gather(1, places.expand(-1, -1, part.shape[2]))
    rest = torch.matmul(train.double(), weight.mT) + bias - own
    excluded = -log_softmax(rest, 2).gather(2, places).mean((1, 2))
    return restricted, excluded, key


def gini(values: Tensor) -> Tensor:
    """Gini coefficient of non-negative numbers: (S, k) to (S,), 0 if all are equal, 1 - 1/k if one has all.

    ``sum (2 i - k - 1) v_i / (k sum v)`` over the ascending v, i from 1.

    References
    ----------
    Hurley and Rickard, "Comparing measures of sparsity", IEEE Transactions on Information Theory 55 (2009).
    """
    ordered = values.double().sort(1).values
    k = ordered.shape[1]
    weights = 2 * torch.arange(1, k + 1, dtype=torch.float64, device=values.device) - k - 1
    return (ordered * weights).sum(1) / (k * ordered.sum(1))
