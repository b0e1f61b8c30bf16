"""Time of the entropy, fastent against everyone: ``python -m bench.entropy [--quick] [--out FILE]``.

All providers in one process, in turn, on the same input; ratios are fastent's time over the other's, round by round.
`LIMITS` are shares of the direct way's time that fastent must not exceed.
"""

from __future__ import annotations

import torch

from bench.cases import SHAPES, Shape
from bench.harness import Row, beside, command, environment, quantiles, ratio_columns
from bench.providers import entropies
from bench.tables import entropy_table
from fastent.cost_model import Rates, floor, work
from fastent.rates import measure_rates

LIMITS = {
    (512, 64): 1.05,
    (512, 128): 1.05,
    (512, 256): 1.05,
    (512, 512): 1.05,
    (512, 768): 1.05,
    (4096, 128): 0.75,
    (65536, 128): 0.6,
    (512, 1024): 1 / 4,
    (512, 4096): 1 / 40,
}


def measure(quick: bool) -> list[Row]:
    """Rows of all shapes at this process's thread count."""
    rows: list[Row] = []
    threads = torch.get_num_threads()
    rates = measure_rates()
    for shape in SHAPES:
        if quick and not shape.quick:
            continue
        rows += measure_shape(shape, rates, rounds=9 if quick else 25, budget=4.0 if quick else 10.0)
    assert torch.get_num_threads() == threads  # no import of a peer may change it
    return rows


def measure_shape(shape: Shape, rates: Rates, *, rounds: int, budget: float) -> list[Row]:
    """Rows of one shape: each provider's time, and fastent's over it; the floor at `rates`."""
    h = shape.tensor()
    calls = {
        provider: (lambda call=call: call(h))
        for provider, call in entropies().items()
        if not (shape.dtype == "bfloat16" and "no copy" in provider.name)  # NumPy has no such type
    }
    named = {provider.name: call for provider, call in calls.items()}
    seconds = beside("fastent", named, rounds=rounds, budget=budget)
    rows = []
    for provider in calls:
        mine = provider.name == "fastent"
        side = min(shape.n, shape.d) if mine else shape.d
        products = 2 * shape.n * shape.d * side
        row = {"op": "entropy", "provider": provider.name, "quantity": provider.quantity, **shape.columns}
        theirs, ours = seconds[provider.name]
        row |= quantiles(theirs) | {"rounds": len(theirs)}
        if mine or provider.name == "torch, direct":
            # bytes: read h + write and read the matrix (16 m m); flops: products of the side taken, half of
            # them for fastent, without the eigensolve
            row["bytes"] = h.element_size() * h.numel() + 16 * side * side
            row["flops"] = products // 2 if mine else products
        if mine:
            row["floor_us"] = round(1e6 * floor(work(shape.n, shape.d), rates), 1)
        if not mine:
            row |= ratio_columns(ours, theirs) | {"exact": provider.exact}
        if provider.name == "torch, direct" and shape.dtype == "float32":
            row["limit"] = LIMITS[shape.n, shape.d]
        rows.append(row | environment(*([provider.package] if provider.package else [])))
    return rows


if __name__ == "__main__":
    command("bench.entropy", __doc__, measure, entropy_table)
