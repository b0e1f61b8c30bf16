"""Candidates for the launch table (`kernels/launch.py`): ``python -m bench.tune``.

On a GPU each candidate is timed on shapes of its range, and the fastest of each is printed and written: the table is
then set by hand from it. Without one nothing can be timed, and this says so: it compiles the candidates ahead of time
and ranks those that pass the gates by a model of one multiprocessor. The model has no latencies; it can say what a
candidate cannot exceed, not what it reaches.

The model, per block and trip around the inner loop, in cycles of an H100 or H200 (CUDA programming guide, throughput
of instructions per multiprocessor): matrix products at 256 FLOP a cycle for DMMA.16x8x16 and half of it for the
8x8x4 shapes (triton#10313 measured 45-53 and 28-31 TFLOP/s); shared memory at a wavefront, counted from the addresses
of a trip; casts to float64 at 16 lanes; float64 additions at 64 lanes. The bound is the time of the products at full
rate over the longest of the four.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from bench.gpu import Session, activations, device_times
from bench.harness import Row, write_rows
from fastent.kernels.compile import DTYPES, LAYOUTS, Resources, _launches_of, measure, resident
from fastent.kernels.covariance import ResidentCovariance
from fastent.kernels.launch import TABLE, Entry, Side, Tile, gluon_is_here, partition

# m and length of each range of the table, to time.
SHAPES: dict[Side, tuple[tuple[int, int], ...]] = {
    "covariance": ((64, 512), (128, 512), (256, 4096), (512, 4096), (1024, 4096), (2048, 8192), (4096, 8192)),
    "gram": ((128, 1024), (256, 4096), (512, 4096), (512, 8192), (2048, 8192)),
}
BLOCKS = (1, 2, 3, 4, 6, 8)  # programs of a multiprocessor that the split counts on


def candidates(side: Side) -> Iterator[Tile]:
    """Tiles to try, all with the same split: one program to a multiprocessor."""
    for edge, step, warps in itertools.product((32, 64, 128), (16, 32), (4, 8, 16)):
        if 512 <= edge * edge // warps <= 4096 or (edge, warps) == (32, 4):
            for first in (False, True) if side == "covariance" else (False,):
                for gluon in (False, True) if first and edge > 32 and gluon_is_here() else (False,):
                    yield Tile(edge, step, warps, blocks=1, means_first=first, gluon=gluon)


def compile_candidate(side: Side, tile: Tile, arch: int, dtype: str, layout: str) -> Resources | None:
    """Resources of the product with this tile, without a spread."""
    kept = TABLE[side]
    TABLE[side] = (Entry(None, tile),)
    try:
        found = _launches_of(side, 2048, 64, DTYPES[dtype], layout, False)
        product = next(one for one in found if "EDGE" in one.kernel.arg_names)
        return measure(product, arch, layout=layout, seen=set())
    finally:
        TABLE[side] = kept


def model(row: Resources, step: int) -> dict[str, float]:
    """Cycles of a trip by unit, blocks on a multiprocessor, bytes in flight there, and the bound."""
    assert row.edge is not None
    flops = 2 * row.edge**2 * step
    large = all(name.startswith("DMMA.16") for name in row.loop.matrix)
    cycles = {
        "products": flops / (256 if large else 128),
        "shared": row.wavefronts,
        "casts": row.warps * row.loop.casts * 32 / 16,
        "adds": row.warps * row.loop.adds * 32 / 64,
    }
    blocks = resident(row.registers, row.shared, row.warps)
    return {
        **cycles,
        "blocks": blocks,
        # One step is under way while another is multiplied.
        "bytes_in_flight": blocks * row.warps * row.loop.global_bytes,
        "products_for_each_lds": sum(row.loop.matrix.values()) * (16 if large else 1) / row.loop.shared_loads,
        "bound": flops / 256 / max(cycles.values()),
    }


def rank(arch: int, dtype: str, layouts: Sequence[str], out: Path | None) -> None:
    """Compile all candidates, print them by their bound, and write the rows."""
    print("No CUDA device: nothing is timed. What follows is compiled, and ranked by a model.")
    rows: list[Row] = []
    for side in TABLE:
        found = []
        for tile in candidates(side):
            row = compile_candidate(side, tile, arch, dtype, "contiguous")
            assert row is not None
            faults = list(row.faults)
            for layout in () if faults else layouts:
                other = compile_candidate(side, tile, arch, dtype, layout)
                assert other is not None
                faults += [f"{layout}: {fault}" for fault in other.faults]
            found.append({**dataclasses.asdict(tile), **described(row, tile), "faults": faults})
        found.sort(key=lambda values: (bool(values["faults"]), -values["bound"]))
        print("\n" + "  ".join(found[0]))
        for values in found:
            print("  ".join(text(value).rjust(len(name)) for name, value in values.items()), flush=True)
        rows += [{"op": "tune", "side": side, "arch": arch, "dtype": dtype, **values} for values in found]
    if out:
        write_rows(out, rows)


def described(row: Resources, tile: Tile) -> Row:
    """Resources of a candidate and what the model says of it."""
    return {"registers": row.registers, "stack": row.stack, **model(row, tile.step)}


def text(value: object) -> str:
    """Write a value for the table."""
    if isinstance(value, list):
        return "; ".join(value) or "none"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def timed(out: Path) -> None:
    """Time the candidates on a GPU, then the splits of the fastest; print the fastest of each shape."""
    session = Session(torch.device("cuda"), False, out, time.monotonic() + 3600)
    session.part = "tune"
    for side, shapes in SHAPES.items():
        for m, length in shapes:
            best = min(
                (time_of(session, side, m, length, tile), str(tile), tile) for tile in candidates(side)
            )
            print(
                f"{side:<11} m = {m:<5} length = {length:<6} {1e6 * best[0]:9.1f} us  {best[2]}", flush=True
            )
            if m <= 256:
                for blocks in BLOCKS:
                    seconds = time_of(session, side, m, length, dataclasses.replace(best[2], blocks=blocks))
                    print(f"  split for {blocks} on a multiprocessor: {1e6 * seconds:.1f} us")


def time_of(session: Session, side: Side, m: int, length: int, tile: Tile) -> float:
    """Median seconds of an evaluation with this tile; infinite where it does not run."""
    kept = TABLE[side]
    TABLE[side] = (Entry(None, tile),)
    n, d = (length, m) if side == "covariance" else (m, length)
    try:
        parts = partition(side, m, length).parts
        h = activations(n, d, torch.bfloat16, session.device)
        evaluator = ResidentCovariance(n, d, device=session.device, side=side)
        found = device_times(session, functools.partial(evaluator, h, evaluator.output()))
    except Exception as error:  # out of resources: a candidate that is none
        session.skip(
            "tune", f"{type(error).__name__}: {error}"[:200], side=side, tile=dataclasses.asdict(tile)
        )
        return float("inf")
    finally:
        TABLE[side] = kept
    session.add("tune", tile=dataclasses.asdict(tile), side=side, n=n, d=d, parts=parts, **found.columns())
    return float(sorted(found.seconds)[len(found.seconds) // 2])


def main() -> None:
    """Time on a GPU, else compile and rank."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="a folder on a GPU, else a file; rows as JSON lines")
    parser.add_argument("--arch", type=int, default=90, help="without a GPU: compile for this one")
    parser.add_argument("--dtype", default="bf16", choices=DTYPES, help="without a GPU: of the input")
    parser.add_argument(
        "--layout", action="append", choices=LAYOUTS[1:], help="without a GPU: too, for the gates"
    )
    options = parser.parse_args()
    if torch.cuda.is_available():
        out = options.out or Path("tune")
        out.mkdir(parents=True, exist_ok=True)
        timed(out)
        return
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        rank(options.arch, options.dtype, options.layout or (), options.out)


if __name__ == "__main__":
    main()
