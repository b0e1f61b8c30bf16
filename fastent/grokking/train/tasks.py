"""Data: every pair of a finite structure, its split and its batches, all pure functions of numbers.

The tasks are tables: all pairs of operands with the class of the result. The split, the probe and the order
of the batches come from counter-based generators (Philox, keyed by seed and purpose), so that batch number
`step` of a seed is the same whatever else is trained beside it and from whichever step a run is resumed.
Only the generator's raw words are used: NumPy promises those, and not the methods of
`numpy.random.Generator`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from fastent.grokking.train.config import Sampling, TrainConfig


@dataclass(frozen=True)
class Task:
    """All pairs of a task.

    Attributes
    ----------
    name : str
        For people, with the modulus where there is one: "add mod 97".
    inputs : Tensor, shape (M, 2) or (M, 10), int64
        Tokens of the operands, of the first and then of the second; M = `operands` squared, first operand slowest.
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
    """

    name: str
    inputs: Tensor
    labels: Tensor
    operands: int
    tokens: int
    offset: int
    vocabulary: int
    classes: int


_OPERATIONS = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "mul_nonzero": np.multiply}


def make_task(config: TrainConfig) -> Task:
    """Tabulate the task of a configuration.

    "mul" runs over all residues, 0 included; "mul_nonzero" over 1 .. p-1, where it is addition modulo p - 1
    under another name (labels and tokens count from 0 for residue 1). "s5" composes permutations of five
    points, ``(a b)(i) = a(b(i))``, numbered in lexicographic order; as "images" its inputs are a(1), ..., a(5), b(1),
    ..., b(5), counted from 0.

    Raises
    ------
    ValueError
        If `config.task` is unknown, or "mul_nonzero" has a modulus that is not prime.
    """
    p = config.modulus
    if config.task == "s5":
        table, name = _composition(5), "S5"
    elif config.task in _OPERATIONS:
        table = _OPERATIONS[config.task].outer(np.arange(p), np.arange(p)) % p
        name = f"{config.task} mod {p}"
    else:
        raise ValueError(f"task must be add, sub, mul, mul_nonzero or s5; got {config.task!r}")
    if config.task == "mul_nonzero":
        if p < 3 or any(p % q == 0 for q in range(2, int(p**0.5) + 1)):
            raise ValueError(f"mul_nonzero needs a prime modulus of at least 3, or products are 0; got {p}")
        table = table[1:, 1:] - 1
    n = len(table)
    # The tokens of each operand.
    written = _permutations(5) if config.operand_tokens == "images" else np.arange(n).reshape(n, 1)
    tokens = int(written.max()) + 1
    offset = tokens if config.separate_tokens else 0
    first, second = np.divmod(np.arange(n * n), n)
    return Task(
        name=name,
        inputs=torch.from_numpy(np.concatenate([written[first], written[second] + offset], axis=1)),
        labels=torch.from_numpy(table.reshape(-1).astype(np.int64)),
        operands=n,
        tokens=tokens,
        offset=offset,
        vocabulary=tokens + offset,
        classes=n,
    )


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
