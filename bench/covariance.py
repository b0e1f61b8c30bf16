"""Time of the covariance matrix alone: ``python -m bench.covariance [--quick] [--out FILE]``.

As `bench.entropy`, without the eigensolve: ``fastent.covariance`` (float64, symmetric bit for bit) against the ways it
is usually formed. Its error is in `bench.accuracy`.
"""

from __future__ import annotations

from bench.cases import SHAPES
from bench.harness import Row, beside, command, environment, quantiles, ratio_columns
from bench.providers import COVARIANCES, covariances
from bench.tables import covariance_table


def measure(quick: bool) -> list[Row]:
    """Rows of all shapes at this process's thread count."""
    rows: list[Row] = []
    for shape in SHAPES:
        if quick and not shape.quick:
            continue
        h = shape.tensor()
        calls = {name: (lambda call=call, h=h: call(h)) for name, call in covariances().items()}
        seconds = beside("fastent", calls, rounds=9 if quick else 25, budget=3.0 if quick else 8.0)
        for name, (values, ours) in seconds.items():
            package = COVARIANCES[name][1]
            # bytes: read h + write C (8 d d); flops: all products, or for fastent the lower triangle's
            work = 2 * shape.n * shape.d**2
            row = {"op": "covariance", "provider": name, **shape.columns, **quantiles(values)}
            row |= {
                "rounds": len(values),
                "bytes": h.element_size() * h.numel() + 8 * shape.d**2,
                "flops": work // 2 if name == "fastent" else work,
            }
            if name != "fastent":
                row |= ratio_columns(ours, values)
            rows.append(row | environment(*([package] if package else [])))
    return rows


if __name__ == "__main__":
    command("bench.covariance", __doc__, measure, covariance_table)
