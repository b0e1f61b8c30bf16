"""The edge from which the CPU hands over to the worker, as it follows from the benchmark's rows."""

import pytest

from bench.deferred import worker_from


@pytest.mark.parametrize(
    ("highest", "edge"),
    [
        ({64: 0.9, 128: 0.8, 256: 0.8}, 64),
        ({64: 1.2, 128: 0.99, 256: 0.8}, 128),
        ({64: 0.9, 128: 1.0, 256: 0.8}, 256),  # 64 gained by luck
        ({64: 0.9, 128: 0.9, 256: 1.01}, None),
    ],
)
def test_the_edge_is_the_smallest_from_which_on_every_interval_is_below_one(highest, edge):
    rows = [row for d, high in highest.items() for row in ({"d": d}, {"d": d, "ratio_high": high})]
    assert worker_from(rows) == edge
