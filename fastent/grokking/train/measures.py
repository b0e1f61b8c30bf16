"""Further columns of a run's metrics, chosen by `TrainConfig.measures`: what each asks of a stack.

A name stands for a `Measure`, a function of the `Moment` of an evaluation (`fastent.grokking.train.registry`). Ours:

- "test_probe": `entropy_test`, H on a probe of test pairs as large as the training probe.
- "probe_sizes": H on nested training probes of doubling size, `entropy_64`, `entropy_128`, ...; on the whole
  training set, `entropy_train`; and on all pairs, `entropy_all`. Every entropy has a column ``<name>_status``.
- "fourier": how far the representation follows the task's group. `alignment`, the paper's measure on the
  training probe, with `alignment_null` and `alignment_null_mean`, the largest and the mean of what it is for
  19 permutations of the labels; `leading_alignment`, that of the leading eigenvectors of the covariance, and
  `leading_alignment_null`, the largest of the same 19. On all test pairs: `label_share`, the share of variance
  between labels; of that variance, `top_share`, the part in the five strongest frequencies, and `frequencies`,
  how many take part (participation). For S5 no alignment; instead of top_share `isotypic_41`, ..., the share of
  each irreducible representation but the trivial one.
- "progress": `restricted_loss` and `excluded_loss` (nats) by the key frequencies of that moment, `key_blocks`
  (their names, ascending), and `embedding_gini`, of the norms of the embedding's components per function of a
  block, the constant left out; not where an operand is several tokens.
- "logit_scale": a column of that name, the root mean square of the logits on the training probe, each row less
  its mean over the classes.

The frequencies are of labels under addition, and of discrete logarithms for products, where results of 0 are
left out of "fourier" and "progress". Measures change nothing and are functions of the parameters and the seed,
so a resumed run has the same columns.

The values of a task form a group: residues under addition, non-zero residues under multiplication (cyclic, by
the discrete logarithm), or S5. Functions on the group (`Harmonics`) fall apart into blocks that the operation does
not mix: one for each frequency of a cyclic group, one for each irreducible representation of S5, whose projection
is ``P_rho = (d_rho / |G|) sum_s chi_rho(s^-1) L_s`` with ``(L_s f)(g) = f(s^-1 g)``. The constant function is left
out everywhere: what belongs to it is a mean. The measures are pure functions of float64 tensors with a leading
axis of S seeds:

- `alignment` is the paper's (section 11): the largest |Pearson r| of a coordinate of the representation with a
  character of the label. It is a maximum over some ten thousand correlations, so chance alone makes it large:
  `alignment_null` gives what it is for permuted labels.
- `leading_alignment` is that of the paper's second version as we read it: of the representation along each of the
  leading eigenvectors of its covariance, the largest correlation with a frequency of the label, averaged. How many
  lead is ours, two for each of five frequencies.
- `label_spectrum` is ours: how the variance between the label means divides over the blocks.
- `restricted_and_excluded_loss` and `gini` are the progress measures of Nanda et al. 2023.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import log_softmax

from fastent.entropy import spectral_entropy
from fastent.grokking.train.config import TrainConfig
from fastent.grokking.train.modules import AnyStack
from fastent.grokking.train.registry import NAME, find, origin
from fastent.grokking.train.runs import NUMBERS
from fastent.grokking.train.stacked import add_in_order
from fastent.grokking.train.storage import RunError
from fastent.grokking.train.tasks import Task, generator, make_task, probe_index, split
from fastent.linalg import LAPACK_TO

PARTITIONS = ((5,), (4, 1), (3, 2), (3, 1, 1), (2, 2, 1), (2, 1, 1, 1), (1, 1, 1, 1, 1))
"""Irreducible representations of S5 by their partitions: trivial, ..., sign; of dimension 1 4 5 6 5 4 1."""


@dataclass(frozen=True)
class Harmonics:
    """Orthonormal functions on the values of a task, each in a block.

    Attributes
    ----------
    basis : array, shape (values, m), float64
        Orthonormal columns, each orthogonal to the constant; rows of values outside the group are 0.
    block : array, shape (m,), int64
        Block of each column.
    names : tuple of str
        Of the blocks: frequencies "1", "2", ..., or partitions "41", "32", ...
    members : array, shape (values,), bool
        Which values are of the group: all but the 0 of "mul".
    cyclic : bool
        Whether the group is cyclic, so that the columns are its characters' cosines and sines.
    """

    basis: NDArray[np.float64]
    block: NDArray[np.int64]
    names: tuple[str, ...]
    members: NDArray[np.bool_]
    cyclic: bool


def task_harmonics(config: TrainConfig) -> Harmonics:
    """Blocks of functions on the labels of a task, and on its operands, which are numbered alike.

    Raises
    ------
    ValueError
        If the task is a product and the modulus is not an odd prime: its units are then no cyclic group of
        p - 1 members. Or if it is another package's task that names no cyclic group.
    """
    task = make_task(config)
    if config.task == "s5":
        return _symmetric(task.labels.numpy().reshape(120, 120))
    if task.exponents is None:
        raise ValueError(
            f"the measures fourier and progress need the characters of a group, and task {config.task!r} names none: "
            "leave them out, or give its Task exponents"
        )
    return _cyclic(task.exponents())


def _cyclic(exponent: NDArray[np.int64]) -> Harmonics:
    """Cosines and sines of frequency 1 .. n/2 on values g^exponent; a negative exponent is outside."""
    members = exponent >= 0
    n = int(members.sum())
    columns, block = [], []
    for k in range(1, n // 2 + 1):
        angle = 2 * np.pi * (k * exponent % n) / n
        for wave in [np.cos(angle)] if 2 * k == n else [np.cos(angle), np.sin(angle)]:
            wave = np.where(members, wave, 0.0)
            columns.append(wave / np.linalg.norm(wave))
            block.append(k - 1)
    names = tuple(str(k) for k in range(1, n // 2 + 1))
    return Harmonics(np.stack(columns, axis=1), np.array(block), names, members, cyclic=True)


def _symmetric(table: NDArray[np.int64]) -> Harmonics:
    """Bases of the isotypic parts of the functions on S5, the trivial one left out."""
    columns, block = [], []
    for number, partition in enumerate(PARTITIONS[1:]):
        projection = isotypic_projection(partition, table)
        rank = round(np.trace(projection))
        columns.append(np.linalg.eigh(projection)[1][:, -rank:])
        block += [number] * rank
    names = tuple("".join(map(str, partition)) for partition in PARTITIONS[1:])
    basis = np.concatenate(columns, axis=1)
    return Harmonics(basis, np.array(block), names, np.ones(len(table), dtype=bool), cyclic=False)


def isotypic_projection(partition: Sequence[int], table: NDArray[np.int64]) -> NDArray[np.float64]:
    """``P_rho`` as a matrix on functions of the group, (P f)(g) = sum_x P[g, x] f(x).

    Parameters
    ----------
    partition : sequence of int
        The representation of S_n.
    table : array, shape (n!, n!), int64
        Number of the product a b at [a, b], the elements numbered in lexicographic order.

    Notes
    -----
    With x = s^-1 g, ``P[g, x] = (d / n!) chi(x g^-1)``, and chi is that of g x^-1 as well: symmetric.
    """
    n = sum(partition)
    elements = list(permutations(range(n)))
    values = np.array([character(partition, cycle_type(element)) for element in elements])
    inverse = np.argmax(table == 0, axis=1)  # element 0 is the identity
    dimension = character(partition, (1,) * n)
    projection: NDArray[np.float64] = dimension / len(elements) * values[table.T[inverse]]
    return projection


def cycle_type(permutation: Sequence[int]) -> tuple[int, ...]:
    """Lengths of the cycles, the longest first.

    Examples
    --------
    >>> cycle_type((1, 0, 3, 4, 2))
    (3, 2)
    """
    smallest = []
    for start in range(len(permutation)):
        orbit = [start]
        while (after := permutation[orbit[-1]]) != start:
            orbit.append(after)
        smallest.append(min(orbit))
    return tuple(sorted(Counter(smallest).values(), reverse=True))


def character(partition: Sequence[int], cycles: Sequence[int]) -> int:
    """Irreducible character of the symmetric group on a cycle type, by the Murnaghan-Nakayama rule.

    Removing a rim hook of length k from a partition moves one of its beta numbers b to the free place b - k;
    the sign counts the ones jumped over.

    References
    ----------
    James and Kerber, "The Representation Theory of the Symmetric Group", 1981, section 2.4.

    Examples
    --------
    >>> character((4, 1), (1, 1, 1, 1, 1)), character((4, 1), (5,))
    (4, -1)
    """
    beta = frozenset(part + len(partition) - 1 - i for i, part in enumerate(partition))
    return _character(beta, tuple(cycles))


def _character(beta: frozenset[int], cycles: tuple[int, ...]) -> int:
    if not cycles:
        return 1
    k, total = cycles[0], 0
    for b in beta:
        if b >= k and b - k not in beta:
            jumped = sum(b - k < other < b for other in beta)
            total += (-1) ** jumped * _character(beta - {b} | {b - k}, cycles[1:])
    return total


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


def leading_projections(h: Tensor, count: int) -> Tensor:
    """Centred `h` (S, N, d) along the `count` leading eigenvectors of its covariance: (S, N, count), float64."""
    h = h.double()
    h = h - h.mean(1, keepdim=True)
    products = torch.matmul(h.mT, h)
    if products.shape[-1] <= LAPACK_TO:
        products = products.cpu()  # in one copy, to where they are solved sooner
    return torch.matmul(h, torch.linalg.eigh(products).eigenvectors[:, :, -count:].to(h.device))


def leading_alignment(projections: Tensor, characters: Tensor, block: Tensor) -> Tensor:
    """Mean over `projections` of the largest correlation with a block of characters.

    The correlation with a block is the multiple one, with all its functions: the eigenvectors of a cosine and a sine
    of one frequency may have any phase, and this does not see it.

    Parameters
    ----------
    projections : Tensor, shape (S, N, k)
        As `leading_projections` gives them.
    characters : Tensor, shape (S, N, m)
        Characters of each row's label.
    block : Tensor, shape (m,), int64
        The frequency of each.

    Returns
    -------
    Tensor, shape (S,), float64
        In [0, 1]: 1 where each projection is a function of one frequency of the label; a constant one counts as 0.
    """
    x, y = _standardized(projections), _standardized(characters)
    # Block by block the normal equations of regressing x on y: what they explain of x is the squared correlation.
    gram = torch.matmul(y.mT, y) * (block.unsqueeze(0) == block.unsqueeze(1))
    products = torch.matmul(y.mT, x)
    explained = products * torch.matmul(torch.linalg.pinv(gram, hermitian=True), products)
    blocks = torch.nn.functional.one_hot(block).to(explained)
    return torch.matmul(blocks.T, explained).clamp(0, 1).sqrt().amax(1).mean(1)


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


Columns = dict[str, list[Any]]
"""By column, one JSON value a seed of the stack."""

SMALLEST_PROBE = 64

PERMUTATIONS = 19
"""Permutations of the labels: the alignment exceeds all of them by chance in 1 case of 20."""

KEY_FREQUENCIES = 5
"""As many as Nanda et al. find in their network, out of (p - 1) / 2."""

LEADING = 2 * KEY_FREQUENCIES
"""Leading eigenvectors whose alignment is taken: a cosine and a sine for each key frequency. Ours."""

KEY_REPRESENTATIONS = 2
"""The same for S5, out of six; Chughtai et al. 2023 find that networks learn few of them."""

_CHUNK = 2048  # pairs in a forward pass: their hidden units stay in the cache


class Measure(Protocol):
    """Columns by name: what is registered as "measure". `Grouped` marks one that needs the characters of the task."""

    def __call__(self, moment: Moment, /) -> Mapping[str, Any]:
        """Compute columns at one evaluation.

        Parameters
        ----------
        moment : Moment
            The seeds as they are now; nothing of it may be changed.

        Returns
        -------
        mapping
            By name, one number, word or None a seed: a list, or a tensor or array of shape (S,). The names are those
            of no other column, and the same at every evaluation.
        """


@dataclass(frozen=True)
class Grouped:
    """A measure that needs the characters of the task's group: a task without is refused before a run begins."""

    columns: Callable[[Moment], Mapping[str, Any]]

    def __call__(self, moment: Moment) -> Mapping[str, Any]:
        """Return the columns."""
        return self.columns(moment)


OTHERS = NUMBERS.union(
    ("step", "entropy_status", "event", "environment_sha256", "crc32"), ("run", "seed", "log")
)
"""Columns of a run's logs, and those by which tables and packed runs tell runs apart."""


class Measures:
    """The measures that a configuration names, ready for every evaluation of its stacks.

    Raises
    ------
    ValueError
        If a measure is not there or cannot be imported, or needs characters that the task does not have
        (`task_harmonics`).
    """

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self._pairs: dict[int, _Pairs] = {}
        self._measures: dict[str, Measure] = {name: find("measure", name) for name in config.measures}
        grouped = any(isinstance(measure, Grouped) for measure in self._measures.values())
        self._harmonics = task_harmonics(config) if grouped else None

    def __call__(self, stack: AnyStack) -> Columns:
        """Return the columns of all measures, for the seeds of `stack` in their order.

        Raises
        ------
        RunError
            If a measure returns no columns, or one that is there already.
        """
        if not self._measures:
            return {}
        for seed in stack.seeds:
            if seed not in self._pairs:
                self._pairs[seed] = _Pairs(self._config, stack.task, seed, self._harmonics)
        moment = Moment(stack, [self._pairs[seed] for seed in stack.seeds], self._harmonics)
        columns: Columns = {}
        for name, measure in self._measures.items():
            for column, values in measure(moment).items():
                columns[column] = _checked(name, column, values, len(stack.seeds), columns)
        return columns


def _checked(measure: str, column: str, values: Any, seeds: int, before: Columns) -> list[Any]:
    found = values.tolist() if isinstance(values, Tensor | np.ndarray) else list(values)
    if column in before or column in OTHERS or not NAME.fullmatch(column):
        wrong = f"column {column!r}, which " + (
            "is there already" if NAME.fullmatch(column) else "is no name of letters, digits and underscores"
        )
    elif len(found) != seeds or not all(isinstance(v, float | int | str | None) for v in found):
        wrong = f"{found!r} as {column!r}, which must be one number or word for each of {seeds} seeds"
    else:
        return found
    raise RunError(f"measure {measure!r} of {origin('measure', measure)} returns {wrong}")


class _Pairs:
    """What stays the same for a seed: the numbers of its pairs, int64.

    `grouped_probe`, `grouped_test` and `grouped_train` are those of `probe`, `test` and `train` whose result is in the
    group, `permutations` (Q, N) of the places in the first of them.
    """

    def __init__(self, config: TrainConfig, task: Task, seed: int, harmonics: Harmonics | None) -> None:
        self.all = torch.arange(len(task.labels))
        self.train, self.test = split(task, config.train_fraction, seed)
        self.probe = probe_index(self.train, config.probe_size, seed, "probe")
        self.test_probe = probe_index(self.test, config.probe_size, seed, "test")
        self.sized = {}
        size = SMALLEST_PROBE
        while size < len(self.train):
            self.sized[size] = probe_index(self.train, size, seed, "probe")
            size *= 2
        if harmonics is None:
            return
        inside = torch.from_numpy(harmonics.members)[task.labels]
        self.grouped_probe, self.grouped_test, self.grouped_train = (
            part[inside[part]] for part in (self.probe, self.test, self.train)
        )
        orders = [
            np.argsort(
                generator(seed, "permuted labels", turn).random_raw(len(self.grouped_probe)), kind="stable"
            )
            for turn in range(PERMUTATIONS)
        ]
        self.permutations = torch.from_numpy(np.stack(orders))


Pairs = Literal["probe", "test_probe", "train", "test", "all"]
"""Sets of pairs: probes of `probe_size` from the training and the test set, these sets, and all pairs."""


class Moment:
    """The stack at one evaluation; what several measures need is computed once.

    Attributes
    ----------
    stack : AnyStack
        Not to be changed.
    seeds : tuple of int
        The order of every leading axis of S.
    step : int
        Steps made.
    config : TrainConfig
    task : Task
    """

    def __init__(self, stack: AnyStack, pairs: list[_Pairs], harmonics: Harmonics | None) -> None:
        self.stack = stack
        self.pairs = pairs
        self._harmonics = harmonics

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds, in order."""
        return self.stack.seeds

    @property
    def step(self) -> int:
        """Steps made."""
        return self.stack.steps_done

    @property
    def config(self) -> TrainConfig:
        """Settings of the run."""
        return self.stack.config

    @property
    def task(self) -> Task:
        """All pairs with their labels."""
        return self.stack.task

    def numbers(self, which: Pairs = "probe") -> Tensor:
        """Numbers of a set of pairs, (S, N), int64."""
        return torch.stack([getattr(pairs, which) for pairs in self.pairs])

    def labels(self, which: Pairs = "probe") -> Tensor:
        """Classes of a set of pairs, (S, N), int64, on the device."""
        return self.task.labels[self.numbers(which)].to(self.stack.device)

    def representations(self, which: Pairs = "probe") -> Tensor:
        """Representations of a set of pairs, (S, N, d)."""
        return self.at(lambda pairs: getattr(pairs, which))

    def logits(self, which: Pairs = "probe") -> Tensor:
        """Logits of a set of pairs, (S, N, classes)."""
        return self.stack.logits(self.numbers(which))

    def parameter(self, name: str) -> Tensor:
        """Values of a parameter, (S, ...)."""
        return self.stack.parameter(name)

    @cached_property
    def everything(self) -> Tensor:
        """Representations of all pairs, (S, M, d)."""
        return self._of_all(head=False)

    @cached_property
    def given(self) -> Tensor:
        """What the head gets of all pairs, (S, M, d)."""
        return self.everything if self.stack.head_reads_representation else self._of_all(head=True)

    def _of_all(self, *, head: bool) -> Tensor:
        pairs = torch.arange(len(self.task.labels))
        return torch.cat(
            [self.stack.represent(chunk, head=head) for chunk in torch.split(pairs, _CHUNK)], dim=1
        )

    def at(self, index: Callable[[_Pairs], Tensor]) -> Tensor:
        """Representations, (S, N, d), of pairs that every seed has N of."""
        numbers = torch.stack([index(pairs) for pairs in self.pairs]).to(self.everything.device)
        rows = torch.arange(len(numbers), device=numbers.device).unsqueeze(1)
        return self.everything[rows, numbers]

    @property
    def harmonics(self) -> Harmonics:
        """Functions on the values of the task."""
        assert self._harmonics is not None
        return self._harmonics

    @cached_property
    def basis(self) -> Tensor:
        """Their columns, (values, m), on the device."""
        return torch.from_numpy(self.harmonics.basis).to(self.everything.device)

    @cached_property
    def block(self) -> Tensor:
        """Their blocks, (m,), on the device."""
        return torch.from_numpy(self.harmonics.block).to(self.everything.device)

    @property
    def keys(self) -> int:
        """Number of key blocks."""
        wanted = KEY_FREQUENCIES if self.harmonics.cyclic else KEY_REPRESENTATIONS
        return min(wanted, len(self.harmonics.names))

    def parts(self, h: Tensor) -> Iterator[_Part]:
        """Seeds with their part of `h`, together; one by one where they differ in how many results are in the group."""
        seeds = len(self.pairs)
        alone = not bool(self.harmonics.members.all())
        for s in range(seeds if alone else 1):
            yield _Part(self, slice(s, s + 1) if alone else slice(0, seeds), h)


class _Part:
    """Some seeds of a moment, and their pairs whose result is in the group."""

    def __init__(self, moment: Moment, seeds: slice, h: Tensor) -> None:
        self.moment, self.seeds = moment, seeds
        self.pairs = moment.pairs[seeds]
        self.h = h[seeds]
        self.device = self.h.device
        self.task = moment.stack.task

    def of(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Representations (S, N, d) and labels (S, N) of pairs (S, N)."""
        rows = torch.arange(len(numbers)).unsqueeze(1)
        return self.h[rows.to(self.device), numbers.to(self.device)], self.task.labels[numbers].to(
            self.device
        )

    def means(self, h: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Label means and counts."""
        return label_means(h, labels, self.task.classes)

    def parameter(self, name: str) -> Tensor:
        """Values of a parameter, (S, ...)."""
        return self.moment.stack.parameter(name)[self.seeds]


def _entropy(name: str, h: Tensor) -> Columns:
    results = spectral_entropy(h, batch_dims=1).unbind()
    return {name: [r.normalized for r in results], f"{name}_status": [r.status.value for r in results]}


def test_probe(moment: Moment) -> Columns:
    """Columns of the measure "test_probe"."""
    return _entropy("entropy_test", moment.at(lambda pairs: pairs.test_probe))


def probe_sizes(moment: Moment) -> Columns:
    """Columns of the measure "probe_sizes"."""
    columns: Columns = {}
    for size in moment.pairs[0].sized:
        columns |= _entropy(f"entropy_{size}", moment.at(lambda pairs, size=size: pairs.sized[size]))  # type: ignore[misc]
    columns |= _entropy("entropy_train", moment.at(lambda pairs: pairs.train))
    return columns | _entropy("entropy_all", moment.everything)


@Grouped
def fourier(moment: Moment) -> Columns:
    """Columns of the measure "fourier"."""
    found: dict[str, list[Tensor]] = {}
    for part in moment.parts(moment.everything):
        columns: dict[str, Tensor] = {}
        if moment.harmonics.cyclic:
            h, labels = part.of(torch.stack([pairs.grouped_probe for pairs in part.pairs]))
            orders = torch.stack([pairs.permutations for pairs in part.pairs]).to(part.device)
            characters = moment.basis[labels]
            null = alignment_null(h, characters, orders)
            columns["alignment"] = alignment(h, characters)
            columns["alignment_null"] = null.amax(0)
            # One after the other: the order in which torch's mean adds depends on how many seeds there are.
            columns["alignment_null_mean"] = null.cumsum(0)[-1] / len(null)
            leading = leading_projections(h, LEADING)
            columns["leading_alignment"] = leading_alignment(leading, characters, moment.block)
            rows = torch.arange(len(h), device=h.device).unsqueeze(1)
            columns["leading_alignment_null"] = torch.stack(
                [
                    leading_alignment(leading[rows, order], characters, moment.block)
                    for order in orders.unbind(1)
                ]
            ).amax(0)
        h, labels = part.of(torch.stack([pairs.grouped_test for pairs in part.pairs]))
        means, counts = part.means(h, labels)
        shares = label_spectrum(means, moment.basis, moment.block)
        columns["label_share"] = between_share(h, means, counts)
        if moment.harmonics.cyclic:
            columns["top_share"] = shares.sort(1, descending=True).values[:, : moment.keys].sum(1)
            columns["frequencies"] = participation(shares)
        else:
            named = zip(moment.harmonics.names, shares.unbind(1), strict=True)
            columns |= {f"isotypic_{name}": share for name, share in named}
        for name, column in columns.items():
            found.setdefault(name, []).append(column)
    return {name: torch.cat(columns).tolist() for name, columns in found.items()}


@Grouped
def progress(moment: Moment) -> Columns:
    """Columns of the measure "progress"."""
    columns: Columns = {name: [] for name in ("restricted_loss", "excluded_loss", "key_blocks")}
    if moment.stack.task.tokens == moment.stack.task.operands:
        columns["embedding_gini"] = _embedding_gini(moment).tolist()
    names = moment.harmonics.names
    inside = torch.from_numpy(moment.harmonics.members)[moment.stack.task.labels]
    grouped = torch.arange(len(inside))[inside]
    for part in moment.parts(moment.given):
        means, counts = part.means(*part.of(grouped.expand(len(part.pairs), -1)))
        train, labels = part.of(torch.stack([pairs.grouped_train for pairs in part.pairs]))
        restricted, excluded, key = restricted_and_excluded_loss(
            *(part.parameter("head.weight"), part.parameter("head.bias"), means, counts, train, labels),
            basis=moment.basis,
            block=moment.block,
            keys=moment.keys,
        )
        columns["restricted_loss"] += restricted.tolist()
        columns["excluded_loss"] += excluded.tolist()
        columns["key_blocks"] += [" ".join(names[k] for k in row) for row in key.tolist()]
    return columns


def _embedding_gini(moment: Moment) -> Tensor:
    """Mean over the operands' tables of tokens, where they have one each."""
    task, tokens = moment.stack.task, moment.stack.parameter("tokens.weight")
    sizes = torch.bincount(moment.block)
    coefficients = []
    for start in sorted({0, task.offset}):
        table = tokens[:, start : start + task.operands]
        energy = block_energy(table, moment.basis, moment.block)
        coefficients.append(gini((energy / sizes).sqrt()))
    return torch.stack(coefficients).mean(0)


def logit_scale(moment: Moment) -> Columns:
    """Column of the measure "logit_scale"."""
    return {"logit_scale": moment.stack.logit_scale().tolist()}
