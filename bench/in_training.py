"""An evaluation between training steps, by provider: ``python -m bench.in_training [--quick] [--out FILE]``.

`bench.entropy` times a call by itself, when the pools of threads of all libraries are at rest. A probe's activations
come straight from a forward pass, so torch's pool still spins on the cores that another library's pool wakes up on;
and the ten training steps that follow share the cores with whatever that pool leaves spinning. So here every call comes
between steps of a training run, and the steps after it are timed too: ``after_us`` is what they take more than the
same steps after a probe that nothing was computed of, in the same round.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from bench.harness import Row, command, environment, median_interval, quantiles, ratio_columns, settle
from bench.loops import LOOPS, Loop
from bench.providers import ENTROPIES, entropies
from bench.tables import in_training_table
from fastent.activations import matrix_of
from fastent.watching import Watched

NAMES = ("trainer's model", "vision", "language")
BEFORE, AFTER = 2, 10
"""Steps in a turn before the probe, and after it: together longer than a pool spins (0.1 s)."""


def probed(loop: Loop) -> Callable[[], Tensor]:
    """Make a function that runs the probe as a monitor does, and returns the activations (n, d) of the layer."""
    assert loop.model is not None
    watched = Watched(loop.model, loop.probe, loop.layer)

    def run() -> Tensor:
        kept: list[Tensor] = []
        watched.run(lambda name, h: kept.append(matrix_of(h, tokens=loop.tokens).contiguous()))
        return kept[0]

    return run


def turns(
    loop: Loop, calls: dict[str | None, Callable[[Tensor], Any]], rounds: int
) -> dict[str | None, np.ndarray]:
    """Seconds of each call and of the steps after it, shape (2, rounds); the order turns from round to round."""
    probe = probed(loop)
    names = list(calls)
    seconds: dict[str | None, list[tuple[float, float]]] = {name: [] for name in names}
    for turn in range(-1, rounds):  # the first one is warm-up
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            settle()  # of what the turn before has left
            for _ in range(BEFORE):
                loop.step()
            h = probe()
            began = time.perf_counter()
            calls[name](h)
            answered = time.perf_counter()
            for _ in range(AFTER):
                loop.step()
            if turn >= 0:
                seconds[name].append((answered - began, time.perf_counter() - answered))
    return {name: np.array(values).T for name, values in seconds.items()}


def rows_of(name: str, loop: Loop, rounds: int) -> list[Row]:
    """Rows of one loop."""
    calls: dict[str | None, Callable[[Tensor], Any]] = {None: lambda h: None}
    calls |= {provider.name: call for provider, call in entropies().items()}
    seconds = turns(loop, calls, rounds)
    n, d = probed(loop)().shape
    rows = []
    for provider in entropies():
        values, after = seconds[provider.name]
        row: Row = {"op": "in training", "provider": provider.name, "quantity": provider.quantity}
        row |= {"loop": name, "n": n, "d": d, "rounds": rounds, **quantiles(values)}
        row |= excess(after, seconds[None][1])
        if provider is not ENTROPIES[0]:
            row |= ratio_columns(seconds[ENTROPIES[0].name][0], values)
        rows.append(row | environment(*([provider.package] if provider.package else [])))
    return rows


def excess(after: np.ndarray, plain: np.ndarray) -> Row:
    """Median difference, in microseconds, of the steps after a call to those after none, and its 95 % interval."""
    names = ("after_us", "after_low", "after_high")
    values = median_interval(1e6 * (after - plain))
    return {name: round(value, 1) for name, value in zip(names, values, strict=True)}


def measure(quick: bool) -> list[Row]:
    """Rows of all loops at this process's thread count; `quick`: of the first."""
    rows = []
    for name in NAMES[:1] if quick else NAMES:
        rows += rows_of(name, LOOPS[name](lambda model: model, 0), 6 if quick else 14)
    return rows


if __name__ == "__main__":
    command("bench.in_training", __doc__, measure, in_training_table)
