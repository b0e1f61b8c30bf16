"""Functions on the values of a task, sorted by the group that its operation makes of them.

The values of a task form a group: residues under addition, non-zero residues under multiplication (cyclic, by
the discrete logarithm), or S5. Functions on the group fall apart into blocks that the operation does not mix:
one for each frequency of a cyclic group, one for each irreducible representation of S5, whose projection is
``P_rho = (d_rho / |G|) sum_s chi_rho(s^-1) L_s`` with ``(L_s f)(g) = f(s^-1 g)``.

The constant function is left out everywhere: what belongs to it is a mean.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from fastent.grokking.train.config import TrainConfig
from fastent.grokking.train.tasks import make_task

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
        p - 1 members.
    """
    p = config.modulus
    if config.task == "s5":
        return _symmetric(make_task(config).labels.numpy().reshape(120, 120))
    if config.task in ("add", "sub"):
        return _cyclic(np.arange(p), p)
    logarithm = discrete_logarithm(p)
    return _cyclic(logarithm if config.task == "mul" else logarithm[1:], p - 1)


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


def _cyclic(exponent: NDArray[np.int64], n: int) -> Harmonics:
    """Cosines and sines of frequency 1 .. n/2 on values g^exponent; a negative exponent is outside."""
    members = exponent >= 0
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
