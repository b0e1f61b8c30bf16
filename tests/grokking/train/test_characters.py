"""Characters of the tasks' groups against the relations that determine them."""

from itertools import permutations

import numpy as np
import pytest

from fastent.grokking.train.config import TrainConfig
from fastent.grokking.train.measures import (
    PARTITIONS,
    character,
    cycle_type,
    isotypic_projection,
    task_harmonics,
)
from fastent.grokking.train.tasks import discrete_logarithm, make_task

CLASSES = [(1, 1, 1, 1, 1), (2, 1, 1, 1), (2, 2, 1), (3, 1, 1), (3, 2), (4, 1), (5,)]
# Fulton and Harris, "Representation Theory", section 3.1, columns as in CLASSES.
TABLE = {
    (5,): [1, 1, 1, 1, 1, 1, 1],
    (4, 1): [4, 2, 0, 1, -1, 0, -1],
    (3, 2): [5, 1, 1, -1, 1, -1, 0],
    (3, 1, 1): [6, 0, -2, 0, 0, 0, 1],
    (2, 2, 1): [5, -1, 1, -1, -1, 1, 0],
    (2, 1, 1, 1): [4, -2, 0, 1, 1, 0, -1],
    (1, 1, 1, 1, 1): [1, -1, 1, 1, -1, -1, 1],
}


def composition():
    return make_task(TrainConfig(task="s5")).labels.numpy().reshape(120, 120)


def test_murnaghan_nakayama_gives_the_published_table_of_s5():
    assert {p: [character(p, c) for c in CLASSES] for p in PARTITIONS} == TABLE


def test_characters_of_s5_are_orthonormal_over_the_group():
    types = [cycle_type(element) for element in permutations(range(5))]
    values = np.array([[character(p, t) for t in types] for p in PARTITIONS])
    np.testing.assert_array_equal(values @ values.T, 120 * np.eye(7, dtype=int))


def test_isotypic_projections_are_idempotent_orthogonal_and_sum_to_the_identity():
    projections = [isotypic_projection(p, composition()) for p in PARTITIONS]
    assert [round(np.trace(p)) for p in projections] == [1, 16, 25, 36, 25, 16, 1]
    for i, p in enumerate(projections):
        np.testing.assert_allclose(p, p.T, atol=1e-15)
        for j, q in enumerate(projections):
            np.testing.assert_allclose(p @ q, p if i == j else 0 * p, atol=1e-14)
    np.testing.assert_allclose(sum(projections), np.eye(120), atol=1e-14)


def test_isotypic_projections_commute_with_translations_on_both_sides():
    table, projection = composition(), isotypic_projection((3, 2), composition())
    s = 37
    np.testing.assert_allclose(projection[table[s]][:, table[s]], projection, atol=1e-15)
    np.testing.assert_allclose(projection[table[:, s]][:, table[:, s]], projection, atol=1e-15)


def test_ninety_four_per_cent_of_the_pairs_of_s5_do_not_commute():
    table = composition()
    # As many pairs commute as there are elements times classes: 120 * 7 of 14,400.
    assert (table == table.T).sum() == 120 * 7
    assert round(100 * (table != table.T).mean()) == 94


def test_discrete_logarithm_turns_products_into_sums():
    log = discrete_logarithm(97)
    a, b = np.meshgrid(np.arange(1, 97), np.arange(1, 97))
    np.testing.assert_array_equal(log[a * b % 97], (log[a] + log[b]) % 96)
    assert log[0] == -1


@pytest.mark.parametrize("p", [1, 2, 8, 9, 15])
def test_products_modulo_no_odd_prime_have_no_logarithm(p):
    with pytest.raises(ValueError, match="odd prime modulus"):
        discrete_logarithm(p)


@pytest.mark.parametrize(
    ("task", "modulus", "members", "sizes"),
    [
        ("add", 7, 7, [2, 2, 2]),
        ("sub", 8, 8, [2, 2, 2, 1]),
        ("mul", 7, 6, [2, 2, 1]),
        ("mul_nonzero", 7, 6, [2, 2, 1]),
        ("s5", 7, 120, [16, 25, 36, 25, 16, 1]),
    ],
)
def test_harmonics_are_a_full_orthonormal_basis_without_the_constant(task, modulus, members, sizes):
    found = task_harmonics(TrainConfig(task=task, modulus=modulus))
    assert found.members.sum() == members
    assert np.bincount(found.block).tolist() == sizes
    assert len(found.names) == len(sizes)
    np.testing.assert_allclose(found.basis.T @ found.basis, np.eye(members - 1), atol=1e-13)
    np.testing.assert_allclose(found.basis.sum(0), 0, atol=1e-13)
    np.testing.assert_array_equal(found.basis[~found.members], 0)


@pytest.mark.parametrize("task", ["add", "sub", "mul_nonzero", "s5"])
def test_a_function_of_the_result_keeps_its_block_as_a_function_of_either_operand(task):
    config = TrainConfig(task=task, modulus=7)
    found, n = task_harmonics(config), make_task(config).operands
    result = make_task(config).labels.numpy().reshape(n, n)
    f = found.basis @ np.where(found.block == 1, np.linspace(1, 2, n - 1), 0)
    for of_operand in (f[result[:, 3]], f[result[2]]):
        parts = found.basis.T @ of_operand
        np.testing.assert_allclose(parts[found.block != 1], 0, atol=1e-12)
        np.testing.assert_allclose(np.linalg.norm(parts), np.linalg.norm(f), rtol=1e-12)
