"""Data: every pair of a finite structure, its split and its batches, all pure functions of numbers.

The tasks are tables: all pairs of operands with the class of the result. A name stands for a `TaskMaker`
(`fastent.grokking.train.registry`). The split, the probe and the order
of the batches come from counter-based generators (Philox, keyed by seed and purpose), so that batch number
`step` of a seed is the same whatever else is trained beside it and from whichever step a run is resumed.
Only the generator's raw words are used: NumPy promises those, and not the methods of
`numpy.random.Generator`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations
from typing import Protocol
from zlib import crc32

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from fastent.grokking.train.config import Sampling, TrainConfig
from fastent.grokking.train.registry import find, origin


@dataclass(frozen=True)
class Task:
    """All pairs of a task; `task_of_table` makes one from the results.

    Attributes
    ----------
    name : str
        For people, with the modulus where there is one: "add mod 97".
    inputs : Tensor, shape (M, T), int64
        Tokens of each pair, as a rule two, or of a longer sequence. The second half of the places (of an odd number
        the smaller half) has tokens from `offset` on.
    labels : Tensor, shape (M,), int64
        Class of the result, 0 <= label < `classes`.
    operands : int
        Number of values an operand takes.
    tokens : int
        Number of tokens that one operand can have at a place: `operands`, or 5 where it is a permutation's images.
    offset : int
        First token of the second operand: 0 where the operands share their tokens.
    vocabulary : int
        Number of operand tokens (an "=" comes after them, if the model has one).
    classes : int
        Number of results.
    exponents : function, optional
        Where values and results form a cyclic group (some of them may lie outside): the exponent of each value to a
        generator, shape (operands,), int64, negative outside. The measures "fourier" and "progress" need it. It may
        raise ValueError where there is no such group.

    Raises
    ------
    ValueError
        If shapes, dtypes or ranges are not as above.
    """

    name: str
    inputs: Tensor
    labels: Tensor
    operands: int
    tokens: int
    offset: int
    vocabulary: int
    classes: int
    exponents: Callable[[], NDArray[np.int64]] | None = None

    def __post_init__(self) -> None:
        shape = tuple(self.inputs.shape)
        if not (len(shape) == 2 and tuple(self.labels.shape) == shape[:1] and min(shape) > 0):
            raise ValueError(
                f"task {self.name!r}: inputs must have shape (M, T) and labels (M,); got {shape} and "
                f"{tuple(self.labels.shape)}"
            )
        places = self.inputs.clone()
        places[:, (shape[1] + 1) // 2 :] -= self.offset
        for what, found, most in (("inputs", places, self.tokens), ("labels", self.labels, self.classes)):
            if found.dtype != torch.int64 or int(found.min()) < 0 or int(found.max()) >= most:
                raise ValueError(
                    f"task {self.name!r}: {what} must be int64, from 0 to {most - 1}; got {found.dtype}, from "
                    f"{found.min()} to {found.max()}"
                    + (f" (from the second operand's {self.offset} is taken off)" if self.offset else "")
                )


class TaskMaker(Protocol):
    """A task by name: what is registered as "task"."""

    def __call__(self, config: TrainConfig, /) -> Task:
        """Tabulate the task.

        Parameters
        ----------
        config : TrainConfig
            Its `modulus` and `separate_tokens` are for the task to take or leave.
        """


def make_task(config: TrainConfig) -> Task:
    """Tabulate the task of a configuration.

    Raises
    ------
    ValueError
        If `config.task` is unknown, or its maker refuses the configuration.
    TypeError
        If its maker returns something else.
    """
    made = find("task", config.task)(config)
    if not isinstance(made, Task):
        raise TypeError(
            f"task {config.task!r} of {origin('task', config.task)} must be made as a Task; got {type(made).__name__}"
        )
    return made


def task_of_table(
    name: str,
    table: ArrayLike,
    config: TrainConfig,
    *,
    exponents: Callable[[], NDArray[np.int64]] | None = None,
    written: NDArray[np.int64] | None = None,
) -> Task:
    """All pairs of operands 0 .. n - 1, the first one slowest, with the result ``table[a, b]``.

    Parameters
    ----------
    name : str
        For people.
    table : array, shape (n, n), integers
        Results, from 0 on.
    config : TrainConfig
        Whether the operands share their tokens.
    exponents : function, optional
        See `Task`.
    written : array, shape (n, k), int64, optional
        The tokens of each operand; one, its number, if not given.

    Raises
    ------
    ValueError
        If `table` is not square, or holds something else than integers from 0 on.

    Examples
    --------
    >>> task_of_table("nim", [[0, 1], [1, 0]], TrainConfig()).labels
    tensor([0, 1, 1, 0])
    """
    results = np.asarray(table)
    n = len(results)
    if results.shape != (n, n) or n == 0 or not np.issubdtype(results.dtype, np.integer):
        raise ValueError(
            f"task {name!r}: the table of results must be integers of shape (n, n); got {results.dtype}, "
            f"{results.shape}"
        )
    if written is None:
        written = np.arange(n).reshape(n, 1)
    tokens = int(written.max()) + 1
    offset = tokens if config.separate_tokens else 0
    first, second = np.divmod(np.arange(n * n), n)
    return Task(
        name=name,
        inputs=torch.from_numpy(np.concatenate([written[first], written[second] + offset], axis=1)),
        labels=torch.from_numpy(results.reshape(-1).astype(np.int64)),
        operands=n,
        tokens=tokens,
        offset=offset,
        vocabulary=tokens + offset,
        classes=int(results.max()) + 1,
        exponents=exponents,
    )


_OPERATIONS = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "mul_nonzero": np.multiply}


def modular(config: TrainConfig) -> Task:
    """Tabulate an operation on residues.

    "mul" runs over all residues, 0 included; "mul_nonzero" over 1 .. p-1, where it is addition modulo p - 1
    under another name (labels and tokens count from 0 for residue 1). Results are residues under addition (cyclic), or
    under multiplication, where the non-zero ones of a prime modulus are cyclic.

    Raises
    ------
    ValueError
        If "mul_nonzero" has a modulus that is not prime.
    """
    p, task = config.modulus, config.task
    table = _OPERATIONS[task].outer(np.arange(p), np.arange(p)) % p
    first = 0
    if task == "mul_nonzero":
        if p < 3 or any(p % q == 0 for q in range(2, int(p**0.5) + 1)):
            raise ValueError(f"mul_nonzero needs a prime modulus of at least 3, or products are 0; got {p}")
        first = 1
        table = table[1:, 1:] - 1

    def exponents() -> NDArray[np.int64]:
        return np.arange(p) if task in ("add", "sub") else discrete_logarithm(p)[first:]

    return task_of_table(f"{task} mod {p}", table, config, exponents=exponents)


def s5(config: TrainConfig) -> Task:
    """Tabulate the composition of permutations of five points.

    ``(a b)(i) = a(b(i))``, numbered in lexicographic order; as "images" the inputs are a(1), ..., a(5), b(1), ...,
    b(5), counted from 0.
    """
    images = _permutations(5) if config.operand_tokens == "images" else None
    return task_of_table("S5", _composition(5), config, written=images)


def discrete_logarithm(p: int) -> NDArray[np.int64]:
    """Exponent of each residue to the least primitive root g of the prime p, shape (p,); -1 for 0.

    Raises
    ------
    ValueError
        If `p` is not an odd prime.

    Examples
    --------
    >>> discrete_logarithm(7).tolist()  # powers of 3: 1 3 2 6 4 5
    [-1, 0, 2, 1, 4, 5, 3]
    """
    for g in range(2, p):
        powers = [1]
        while (power := powers[-1] * g % p) not in (0, 1) and len(powers) < p:
            powers.append(power)
        if len(set(powers)) == p - 1:
            exponent = np.full(p, -1)
            exponent[powers] = np.arange(p - 1)
            return exponent
    raise ValueError(f"characters of products need an odd prime modulus; got {p}")


def split(task: Task, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Numbers of the training and of the test pairs, each ascending, int64.

    The training set has ``round(fraction * M)`` pairs.

    Raises
    ------
    ValueError
        If either set would be empty.
    """
    total = len(task.labels)
    n_train = round(fraction * total)
    if not 0 < n_train < total:
        raise ValueError(
            f"train_fraction {fraction} leaves {n_train} of {total} pairs to train on; both sets need one"
        )
    order = _permutation(total, seed, "split")
    return torch.from_numpy(np.sort(order[:n_train])), torch.from_numpy(np.sort(order[n_train:]))


def probe_index(index: Tensor, size: int, seed: int, purpose: str) -> Tensor:
    """Draw `size` members of `index` without replacement: the same ones for the whole run.

    All of `index`, in its own order, where it has no more than `size`.
    """
    if len(index) <= size:
        return index
    order = _permutation(len(index), seed, f"probe {purpose}")
    return index[torch.from_numpy(np.sort(order[:size]))]


def batch_index(
    seed: int, step: int, n_train: int, batch_size: int, sampling: Sampling = "epochs"
) -> np.ndarray:
    """Return the members of the training set in batch number `step`, shape (batch_size,), int64.

    The batches cut one sequence: batch `step` holds its places ``step * batch_size`` onwards. It is made of
    "epochs", shuffled passes over the training set, so that every pass uses each pair once and a batch may join
    two; or of draws with "replacement".
    """
    first = step * batch_size
    parts: list[np.ndarray] = []
    while first < (step + 1) * batch_size:
        turn, place = divmod(first, n_train)
        count = min(n_train - place, (step + 1) * batch_size - first)
        parts.append(_pass(seed, turn, n_train, sampling)[place : place + count])
        first += count
    return np.concatenate(parts)


def batch_indices(
    seeds: Sequence[int],
    first: int,
    steps: int,
    n_train: int,
    batch_size: int,
    sampling: Sampling,
    device: torch.device,
) -> Tensor:
    """`batch_index` of several seeds at `steps` steps from `first` on, on `device`: (steps, S, batch_size), int64.

    The sorting, which is most of it, is done there; the host draws the words and waits for nothing.
    """
    start = first * batch_size
    turns = range(start // n_train, -(-(first + steps) * batch_size // n_train))
    words = np.array(
        [[generator(seed, "batches", turn).random_raw(n_train) for turn in turns] for seed in seeds]
    )
    if sampling == "replacement":
        passes = to_device(torch.from_numpy((words >> np.uint64(1)).view(np.int64)), device) % n_train
    else:
        # Unsigned order as signed order.
        drawn = to_device(torch.from_numpy((words ^ np.uint64(1 << 63)).view(np.int64)), device)
        passes = drawn.argsort(dim=2, stable=True)
    place = start - turns[0] * n_train
    return (
        passes.flatten(1)[:, place : place + steps * batch_size]
        .view(len(seeds), steps, batch_size)
        .movedim(1, 0)
    )


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Move a host tensor without waiting for what the device has still to do."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def generator(seed: int, purpose: str, turn: int = 0) -> np.random.Philox:
    """Return a counter-based generator of its own for each (seed, purpose, turn).

    Raises
    ------
    ValueError
        If `seed` is not in 0 .. 2^64 - 1.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"a seed must be at least 0 and below 2^64; got {seed}")
    return np.random.Philox(key=np.array([seed, (crc32(purpose.encode()) << 32) + turn], dtype=np.uint64))


def _permutation(n: int, seed: int, purpose: str, turn: int = 0) -> np.ndarray:
    return np.argsort(generator(seed, purpose, turn).random_raw(n), kind="stable")


@lru_cache(maxsize=256)
def _pass(seed: int, turn: int, n_train: int, sampling: Sampling) -> np.ndarray:
    if sampling == "replacement":
        # The remainder favours no member by more than n_train in 2^63.
        words = generator(seed, "batches", turn).random_raw(n_train)
        return (words >> np.uint64(1)).view(np.int64) % n_train
    return _permutation(n_train, seed, "batches", turn)


def _permutations(points: int) -> np.ndarray:
    return np.array(list(permutations(range(points))))


def _composition(points: int) -> np.ndarray:
    elements = _permutations(points)
    powers = points ** np.arange(points)
    code = elements @ powers
    number = np.full(code.max() + 1, -1)
    number[code] = np.arange(len(elements))
    composed = elements[:, elements]  # [a, b, i] = a(b(i))
    return number[composed @ powers]
