"""The launch plan: every term summed once, the chip filled, a function of the shape alone, its memory bounded."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from fastent.kernels.compile import resident
from fastent.kernels.covariance import ResidentCovariance
from fastent.kernels.launch import (
    IN_GLUON,
    IN_TRITON,
    MOST_PARTIAL,
    MULTIPROCESSORS,
    TABLE,
    Entry,
    Partition,
    Side,
    Tile,
    at_once,
    partition,
    split,
)

EDGES = (1, 2, 31, 32, 33, 128, 255, 256, 257, 512, 1000, 4096, 8192)
LENGTHS = (1, 2, 15, 16, 17, 63, 64, 127, 128, 129, 512, 1000, 4096, 65536, 1_000_003)
COMMITTED = Path(__file__).parents[2] / "bench" / "results" / "aot.txt"


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


def filled(cut: Partition, length: int) -> float:
    """Steps that all programs make over those for which the chip has room in the waves that they take."""
    wave = MULTIPROCESSORS * cut.tile.blocks
    waves = -(-cut.tiles * cut.parts // wave)
    steps = cut.chunk // cut.tile.step
    return cut.tiles * -(-length // cut.tile.step) / (waves * wave * steps)


@pytest.mark.parametrize(
    ("side", "m", "length"),
    [
        *(("covariance", d, 8192) for d in (768, 1024, 1280, 1536, 2048, 2304, 4096)),
        ("covariance", 128, 65536),
        ("covariance", 256, 4096),
        ("gram", 512, 4096),
        ("gram", 512, 8192),
        ("gram", 2048, 8192),
    ],
)
@pytest.mark.parametrize("entries", [IN_GLUON, IN_TRITON], ids=["gluon", "triton"])
def test_long_sums_leave_at_most_a_tenth_of_the_chip_idle(
    side: Side, m: int, length: int, entries: tuple[Entry, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TABLE, "covariance", entries)
    assert filled(partition(side, m, length), length) >= 0.9


@sides
def test_a_split_fills_no_less_than_none_and_its_memory_is_bounded(side: Side) -> None:
    for m, length in itertools.product(EDGES, LENGTHS):
        cut = partition(side, m, length)
        if cut.parts > 1:
            steps = -(-length // cut.tile.step)
            assert filled(cut, length) > filled(cut._replace(parts=1, chunk=steps * cut.tile.step), length)
            assert 8 * cut.parts * cut.tiles * cut.tile.edge**2 <= MOST_PARTIAL


@sides
def test_the_partial_sums_of_matrices_taken_at_once_are_bounded_and_none_is_left_out_that_fits(
    side: Side,
) -> None:
    for m, length in itertools.product(EDGES, LENGTHS):
        cut, most = partition(side, m, length), at_once(side, m, length)
        assert (most is None) == (cut.parts == 1)
        if most is not None:
            size = 8 * cut.parts * cut.tiles * cut.tile.edge**2
            assert most * size <= MOST_PARTIAL < (most + 1) * size


def test_a_short_walk_is_not_split_for_less_than_it_costs() -> None:
    assert split(1, 7, 1, 1000) == (1, 7)
    assert split(10, 32, 3, 1000) == (8, 4)
    assert split(MULTIPROCESSORS, 1000, 1, 1000) == (1, 1000)  # a full wave
    assert split(MULTIPROCESSORS + 1, 1000, 1, 1000) == (13, 77)  # 14 waves of 77 steps, not 2 of 1,000
    assert split(MULTIPROCESSORS + 1, 1000, 1, 5)[0] <= 5


def test_few_tiles_and_long_sums_are_split_and_full_waves_are_not() -> None:
    assert partition("covariance", 128, 512)[1:] == (10, 8, 64)
    assert partition("covariance", 128, 65536)[1:] == (10, 39, 1696)
    assert partition("gram", 512, 4096)[1:] == (36, 7, 592)
    assert partition("covariance", 2048, 65536)[1:] == (528, 1, 65536)


@sides
def test_table_ends_with_an_entry_for_every_size_and_grows(side: Side) -> None:
    limits = [entry.largest for entry in TABLE[side]]
    assert limits[-1] is None
    assert limits[:-1] == sorted(set(limits[:-1]))
    for limit, entry in zip(limits[:-1], TABLE[side][:-1], strict=True):
        assert limit is not None
        assert partition(side, limit, 512).tile == entry.tile
        assert partition(side, limit + 1, 512).tile != entry.tile


@pytest.mark.parametrize(
    ("kernel", "tile"),
    [
        *(("covariance", entry.tile) for entry in IN_TRITON),
        ("gluon", IN_GLUON[-1].tile),
        *(("gram", entry.tile) for entry in TABLE["gram"]),
    ],
    ids=str,
)
def test_programs_of_a_multiprocessor_are_those_that_the_compiled_registers_allow(
    kernel: str, tile: Tile
) -> None:
    fields = [line.split()[:12] for line in COMMITTED.read_text().splitlines()[2:]]
    fit = min(  # with the dtype that takes most
        resident(int(registers), int(shared), tile.warps)
        for name, _, _, edge, warps, _, _, arch, registers, _, _, shared in fields
        if (name, edge, warps, arch) == (kernel, str(tile.edge), str(tile.warps), "sm_90")
    )
    # The oldest Triton takes some registers more than that of the table: one program less at most.
    assert fit - 1 <= tile.blocks <= fit


@pytest.mark.parametrize(("columns", "limit"), [("side by side", None), ("apart", 255)])
def test_columns_apart_may_take_all_registers_of_a_thread(columns: str, limit: int | None) -> None:
    # 512 x 127 in float32 spilled under triton 3.6, to fit one more block.
    x = (
        torch.empty(512, 127, device="meta")
        if columns == "side by side"
        else torch.empty(127, 512, device="meta").T
    )
    evaluator = ResidentCovariance(512, 127, device=x.device)
    (launch,) = evaluator.launches(x, evaluator.output())
    assert launch.options["maxnreg"] == limit
