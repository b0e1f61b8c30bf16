"""The cost model against measured points: ``python -m bench.plan [--quick] [--out FILE]``.

Rates are measured in the same process, half before and half after the points; the model must be within `LIMIT` of
every point of the role "check". Those of the role "extrapolated" have a matrix larger than any that the rates saw:
they show how far to trust the model there.
"""

from __future__ import annotations

from statistics import median

import fastent
from bench.cases import Shape
from bench.harness import Row, command, environment, interleaved, quantiles
from bench.tables import plan_table
from fastent.cost_model import Rates, estimate, floor, work
from fastent.rates import EDGES, measure_rates

LIMIT = 0.25
CHECKED = (
    Shape(512, 64, quick=True),
    Shape(512, 128, quick=True),
    Shape(512, 256),
    Shape(512, 512),
    Shape(512, 768),
    Shape(4096, 128, quick=True),
    Shape(16384, 256),
    Shape(64, 2048, quick=True),
    Shape(256, 8192),
    Shape(512, 8192, "bfloat16"),
)
EXTRAPOLATED = (Shape(2048, 1536), Shape(2048, 2048))


def between(a: Rates, b: Rates) -> Rates:
    """Middle of two measurements of the same processor."""
    return Rates(
        median((a.call, b.call)),
        median((a.bandwidth, b.bandwidth)),
        [(m, (x + y) / 2) for (m, x), (_, y) in zip(a.product, b.product, strict=True)],
        [(m, (x + y) / 2) for (m, x), (_, y) in zip(a.solve, b.solve, strict=True)],
    )


def measure(quick: bool) -> list[Row]:
    """Rows of all points at this process's thread count."""
    edges = EDGES[:-1] if quick else EDGES
    before = measure_rates(edges)
    points = [(shape, "check") for shape in CHECKED if shape.quick or not quick]
    points += [] if quick else [(shape, "extrapolated") for shape in EXTRAPOLATED]
    timings = []
    for shape, _ in points:
        h = shape.tensor()
        call = {"fastent": lambda h=h: fastent.spectral_entropy(h)}
        timings.append(interleaved(call, rounds=9 if quick else 25, budget=2.0 if quick else 8.0)["fastent"])
    rates = between(before, measure_rates(edges))
    rows = []
    for (shape, role), seconds in zip(points, timings, strict=True):
        one = work(shape.n, shape.d, itemsize=2 if shape.dtype == "bfloat16" else 4)
        predicted = estimate(one, rates)
        row = {"op": "cost model", "provider": "fastent", **shape.columns, **quantiles(seconds)}
        row |= {"role": role, "m": one.m, "bytes": one.bytes, "flops": one.flops, "memory": one.memory}
        row |= {
            "predicted_us": round(predicted.seconds * 1e6, 1),
            "floor_us": round(floor(one, rates) * 1e6, 1),
            "limit": LIMIT,
        }
        rows.append(row | environment())
    return rows


if __name__ == "__main__":
    command("bench.plan", __doc__, measure, plan_table)
