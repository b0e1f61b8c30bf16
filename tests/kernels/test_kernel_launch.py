"""The launch plan: every term summed once, one wave of programs, a function of the shape alone."""

from __future__ import annotations

import pytest

from fastent.kernels.launch import TABLE, plan

EDGES = (1, 2, 31, 32, 33, 128, 255, 256, 257, 512, 1000, 4096, 8192)
LENGTHS = (1, 2, 15, 16, 17, 63, 64, 127, 128, 129, 512, 1000, 4096, 65536, 1_000_003)


@pytest.mark.parametrize("m", EDGES)
def test_tiles_cover_the_lower_triangle(m: int) -> None:
    cut = plan(m, 512)
    across = round(((8 * cut.tiles + 1) ** 0.5 - 1) / 2)
    assert across * (across + 1) // 2 == cut.tiles
    assert (across - 1) * cut.tile.edge < m <= across * cut.tile.edge


@pytest.mark.parametrize("m", EDGES)
def test_parts_cover_the_summed_axis_once_and_none_is_empty(m: int) -> None:
    for length in LENGTHS:
        cut = plan(m, length)
        assert (cut.parts - 1) * cut.chunk < length <= cut.parts * cut.chunk
        assert cut.chunk % cut.tile.step == 0


@pytest.mark.parametrize("m", EDGES)
def test_a_split_stays_within_one_wave_and_its_parts_are_not_short(m: int) -> None:
    for length in LENGTHS:
        cut = plan(m, length)
        assert cut.parts == 1 or (cut.tiles * cut.parts <= 128 and cut.chunk >= 64), length


def test_few_tiles_and_many_rows_are_split_and_many_tiles_are_not() -> None:
    assert plan(128, 512)[1:] == (10, 8, 64)
    assert plan(32, 65536)[1:] == (1, 128, 512)
    assert plan(2048, 65536).parts == 1


def test_table_ends_with_an_entry_for_every_size_and_grows() -> None:
    limits = [largest for largest, _ in TABLE]
    assert limits[-1] is None
    assert limits[:-1] == sorted(set(limits[:-1]))
    for limit, (_, tile) in zip(limits[:-1], TABLE[:-1], strict=True):
        assert plan(limit, 512).tile == tile
        assert plan(limit + 1, 512).tile != tile
