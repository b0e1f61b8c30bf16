"""What an evaluation costs the thread that trains, in line or by a worker: ``python -m bench.deferred [--out FILE]``.

The CPU's choice between the two (`fastent.devices.WORKER_FROM`) comes from here, from a run with a core to spare: the
smallest width from which the loop with the worker takes less time at every width, by all of the interval. A stand-in
for training multiplies matrices in one thread, several times as long as an eigensolve takes, and asks for the entropy
of (512, d) activations before each step; the cost of an evaluation is what the loop, the flush at its end included,
takes more than without.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench.harness import Row, environment, interleaved, quantiles, ratio, write_rows
from fastent.covariance import centered_matrix
from fastent.deferred import DeferredEntropy
from fastent.devices import WORKER_FROM, Host, in_line
from fastent.eigenvalues import eigenvalues
from fastent.ring import Device

N = 512
WIDTHS = (64, 128, 256, 512)
STEPS = 8
WORK = 3.0  # a step's work over an eigensolve's time


def steps(h: Tensor, work: int, evaluations: DeferredEntropy | None) -> Callable[[], None]:
    """Make a loop of `STEPS` steps of `work` products each."""
    a = torch.randn(128, 128)

    def loop() -> None:
        for step in range(STEPS):
            if evaluations is not None:
                opened = evaluations.open(step)
                if opened is None:
                    raise RuntimeError("an evaluation was dropped")
                with opened:
                    opened.add("layer", h)
            for _ in range(work):
                a @ a
        if evaluations is not None:
            evaluations.flush()
            if len(list(evaluations.arrived())) != STEPS:
                raise RuntimeError("results are missing")

    return loop


def seconds(call: Callable[[], object], repeats: int) -> float:
    """Median time of a call."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def measure(d: int) -> list[Row]:
    """Rows for one width: the cost of an evaluation on the training thread, in line and by the worker."""
    host = Host()

    def worker(x: Tensor) -> Device:
        return host

    h = torch.randn(N, d)
    matrix = centered_matrix(h)
    a = torch.randn(128, 128)
    work = max(1, round(WORK * seconds(lambda: eigenvalues(matrix), 5) / seconds(lambda: a @ a, 200)))
    providers = {
        "none": steps(h, work, None),
        "in line": steps(h, work, DeferredEntropy(device_of=in_line)),
        "worker": steps(h, work, DeferredEntropy(device_of=worker)),
    }
    timings = interleaved(providers, rounds=15 if d < 256 else 7)
    costs = {name: (timings[name] - timings["none"]) / STEPS for name in ("in line", "worker")}
    middle, low, high = ratio(timings["worker"], timings["in line"])
    rows = []
    for name, cost in costs.items():
        row = {"op": "deferred", "provider": name, "n": N, "d": d, "dtype": "float32"} | quantiles(cost)
        row["us_step"] = round(float(np.median(timings["none"])) / STEPS * 1e6, 1)
        if name == "worker":
            row |= {"ratio": round(middle, 4), "ratio_low": round(low, 4), "ratio_high": round(high, 4)}
        rows.append(row | environment())
    return rows


def worker_from(rows: list[Row]) -> int | None:
    """Smallest width from which on the worker gains at every width, the whole interval; None where it does not."""
    found = None
    for row in sorted((row for row in rows if "ratio_high" in row), key=lambda row: row["d"], reverse=True):
        if row["ratio_high"] >= 1.0:
            break
        found = row["d"]
    return found


def main() -> None:
    """Measure, print the table, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for d in WIDTHS for row in measure(d)]
    print(
        f"{'d':>5} {'step us':>9} {'in line us':>11} {'worker us':>10}   loop time, worker / in line [95 %]"
    )
    for inline, worker in zip(rows[::2], rows[1::2], strict=True):
        span = f"{worker['ratio']:.3f} [{worker['ratio_low']:.3f}, {worker['ratio_high']:.3f}]"
        print(
            f"{worker['d']:>5} {worker['us_step']:>9} {inline['us_p50']:>11} {worker['us_p50']:>10}   {span}"
        )
    found = worker_from(rows)
    print(
        f"\nWORKER_FROM = {found if found is not None else f'above {max(WIDTHS)}'} from these rows; "
        f"fastent.devices has {WORKER_FROM}. Load before and after: {rows[0]['load']}, {rows[-1]['load']}, "
        f"of which this run is 1 to 2; cores: {len(os.sched_getaffinity(0))}. Other processes make the rows worthless."
    )
    if args.out:
        write_rows(args.out, rows)


if __name__ == "__main__":
    main()
