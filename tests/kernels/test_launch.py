"""The launch plan: every term summed once, one wave of programs, a function of the shape alone."""

from __future__ import annotations

import pytest

from fastent.kernels.launch import TABLE, Side, partition

EDGES = (1, 2, 31, 32, 33, 128, 255, 256, 257, 512, 1000, 4096, 8192)
LENGTHS = (1, 2, 15, 16, 17, 63, 64, 127, 128, 129, 512, 1000, 4096, 65536, 1_000_003)


sides = pytest.mark.parametrize("side", TABLE)


@sides
@pytest.mark.parametrize("m", EDGES)
def test_tiles_cover_the_lower_triangle(m: int, side: Side) -> None:
    cut = partition(side, m, 512)
    across = round(((8 * cut.tiles + 1) ** 0.5 - 1) / 2)
    assert across * (across + 1) // 2 == cut.tiles
    assert (across - 1) * cut.tile.edge < m <= across * cut.tile.edge


@sides
@pytest.mark.parametrize("m", EDGES)
def test_parts_cover_the_summed_axis_once_and_none_is_empty(m: int, side: Side) -> None:
    for length in LENGTHS:
        cut = partition(side, m, length)
        assert (cut.parts - 1) * cut.chunk < length <= cut.parts * cut.chunk
        assert cut.chunk % cut.tile.step == 0


@sides
@pytest.mark.parametrize("m", EDGES)
def test_a_split_stays_within_one_wave_and_its_parts_are_not_short(m: int, side: Side) -> None:
    for length in LENGTHS:
        cut = partition(side, m, length)
        assert cut.parts == 1 or (cut.tiles * cut.parts <= 128 and cut.chunk >= 64), length


def test_few_tiles_and_many_rows_are_split_and_many_tiles_are_not() -> None:
    assert partition("covariance", 128, 512)[1:] == (10, 8, 64)
    assert partition("covariance", 32, 65536)[1:] == (1, 128, 512)
    assert partition("gram", 512, 4096)[1:] == (36, 3, 1376)
    assert partition("covariance", 2048, 65536).parts == 1


@sides
def test_table_ends_with_an_entry_for_every_size_and_grows(side: Side) -> None:
    limits = [entry.largest for entry in TABLE[side]]
    assert limits[-1] is None
    assert limits[:-1] == sorted(set(limits[:-1]))
    for limit, entry in zip(limits[:-1], TABLE[side][:-1], strict=True):
        assert limit is not None
        assert partition(side, limit, 512).tile == entry.tile
        assert partition(side, limit + 1, 512).tile != entry.tile


def test_means_come_first_where_no_split_was_left_to_lose() -> None:
    # From 1,153 columns on (edge 64) there are more tiles than a wave holds: one part anyway.
    first = min(entry.largest for entry in TABLE["covariance"][1:-1] if entry.largest)
    before = partition("covariance", first, 65536)
    after = partition("covariance", first + 1, 65536)
    assert (before.tile.means_first, before.parts) == (False, 1)
    assert (after.tile.means_first, after.parts) == (True, 1)
