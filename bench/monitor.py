"""What a monitor costs a training run: ``python -m bench.monitor [--quick] [--out FILE]``.

Runs of the same model, one without a monitor and one for each stride, take turns in blocks of steps (A B C A B C ...)
in one process, so that they share whatever else the machine does. The overhead of a stride is the time of its run
over that of the run without, less 1, over whole periods of the stride, with a bootstrap interval. At long strides that
interval is the noise of two training runs, so each row has `share` too: the median time of a probe over that of the
steps of a period. Noise hardly touches it, but it leaves out what a probe does to the caches of the next step.

Modes: plain; ``torch.compile``, where a C++ compiler is there; DDP over two processes (gloo) of one thread each, whose
rank 0 has the monitor.
"""

from __future__ import annotations

import functools
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import fastent
from bench.harness import Row, command, environment, median_interval, quantiles, read_rows, write_rows
from bench.loops import LOOPS, Loop, Wrap
from bench.tables import monitor_table

STRIDES = (1, 10, 100, 200, 1000)
LIMIT_STRIDE, LIMIT = 200, 0.01
BLOCK = 10
"""Steps in a turn."""


class Run:
    """A training run with or without a monitor, timed step by step."""

    def __init__(self, loop: Loop, stride: int) -> None:
        self.loop, self.stride = loop, stride
        self.steps_done = 0
        self.step_seconds: list[float] = []
        self.probe_seconds: list[float] = []
        self.blocks: list[float] = []
        self.monitor: fastent.SpectralEntropyMonitor | None = None
        if stride and loop.activations is None:
            self.monitor = fastent.SpectralEntropyMonitor(
                loop.model, loop.probe, loop.layer, every=stride, tokens=loop.tokens
            )
        elif stride:
            self.monitor = fastent.SpectralEntropyMonitor()

    def advance(self, steps: int, *, count: bool = True) -> None:
        """Make `steps` steps; `count` their time."""
        clock = time.perf_counter
        began = clock()
        for _ in range(steps):
            start = clock()
            self.loop.step()
            trained = clock()
            self.steps_done += 1
            self.observe()
            if count:
                self.step_seconds.append(trained - start)
                if self.stride and self.steps_done % self.stride == 0:
                    self.probe_seconds.append(clock() - trained)
        if count:
            self.blocks.append(clock() - began)

    def warm_up(self) -> None:
        """Train for two turns and probe once, uncounted; counting starts at the beginning of a period."""
        self.advance(2 * BLOCK, count=False)
        if self.monitor is not None and self.steps_done % self.stride:
            self.steps_done = (self.steps_done // self.stride + 1) * self.stride
            self.observe()

    def observe(self) -> None:
        """Do what a training script does after each step."""
        if self.monitor is None:
            return
        if self.loop.activations is None:
            self.monitor.step(self.steps_done)
        elif self.steps_done % self.stride == 0:
            self.monitor.observe(self.steps_done, self.loop.activations(), layer="representation")

    @property
    def share(self) -> float:
        """Time of a probe over that of a period: the median probe, `stride` median steps."""
        probe, step = float(np.median(self.probe_seconds)), float(np.median(self.step_seconds))
        return probe / (self.stride * step)


def compare(
    make: Callable[[int], Loop], strides: tuple[int, ...], periods: float, steps: int, *, watched: bool = True
) -> list[Run]:
    """Train a run without a monitor and one for each stride in turns.

    Parameters
    ----------
    make : callable
        From a seed to a fresh run.
    strides : tuple of int
        Of the monitors.
    periods : float
        Periods of the longest stride to train for.
    steps : int
        Steps to train for at least.
    watched : bool
        False on the ranks that have no monitor and make the same steps.
    """
    runs = [Run(make(seed), stride if watched else 0) for seed, stride in enumerate((0, *strides))]
    for run in runs:
        run.warm_up()
    turns = max(steps, round(periods * max(strides))) // BLOCK
    for turn in range(turns):
        # The order turns too: who comes after whom must not matter.
        for run in runs[turn % len(runs) :] + runs[: turn % len(runs)]:
            run.advance(BLOCK)
    for run in runs:
        if run.monitor is not None:
            run.monitor.close()
    return runs


def rows_of(name: str, mode: str, runs: list[Run]) -> list[Row]:
    """Rows of one loop in one mode."""
    plain = np.array(runs[0].blocks)
    rows = []
    probe = min(float(np.median(run.probe_seconds)) for run in runs if run.probe_seconds)
    for run in runs:
        row: Row = {"op": "monitor", "provider": "fastent" if run.stride else "no monitor"}
        row |= {"loop": name, "mode": mode, "stride": run.stride, "probe_us": round(1e6 * probe, 1)}
        row |= quantiles(np.array(run.blocks) / BLOCK) | {"steps": len(run.step_seconds)}
        if run.stride:
            middle, low, high = overhead(np.array(run.blocks), plain, run.stride)
            row |= {"overhead": middle, "overhead_low": low, "overhead_high": high}
            row |= {"share": run.share, "probes": len(run.probe_seconds)}
            if run.stride == LIMIT_STRIDE:
                row["limit"] = LIMIT
        rows.append(row | environment())
    return rows


def overhead(blocks: np.ndarray, plain: np.ndarray, stride: int, resamples: int = 2000) -> tuple[float, ...]:
    """Time of a run over that of the plain one, less 1, and its 95 % bootstrap interval.

    Turns are put together to whole periods of the stride, so that each holds the same number of probes, and the
    estimate is the median of the periods' ratios. Of fewer than five periods the turns are resampled, and the
    estimate is the ratio of the sums.
    """
    length = max(1, stride // BLOCK)
    used = len(blocks) // length * length
    ours = blocks[:used].reshape(-1, length).sum(1)
    theirs = plain[:used].reshape(-1, length).sum(1)
    if len(ours) < 5:
        ours, theirs = blocks[:used], plain[:used]
        draws = np.random.default_rng(0).integers(used, size=(resamples, used))
        low, high = np.quantile(ours[draws].sum(1) / theirs[draws].sum(1), [0.025, 0.975])
        found = (float(ours.sum() / theirs.sum()), float(low), float(high))
    else:
        found = median_interval(ours / theirs, resamples=resamples)
    return tuple(round(value - 1, 5) for value in found)


def settings(quick: bool, mode: str) -> tuple[tuple[int, ...], float, int]:
    """Strides, periods of the longest, and steps at least."""
    if quick:
        return (1, 10, 100, 200), 1.0, 200
    if mode == "plain" and torch.get_num_threads() == 1:
        return STRIDES, 2.0, 2000
    if mode == "DDP":  # two ranks that wait for each other: twice the noise, in waves longer than a turn
        return (10, LIMIT_STRIDE), 1.0, 1600
    return (1, 10, LIMIT_STRIDE), 1.0, 1000


def measure(quick: bool) -> list[Row]:
    """Rows of all loops at this process's thread count."""
    rows = []
    for name, make in LOOPS.items():
        rows += rows_of(name, "plain", compare(functools.partial(make, _as_it_is), *settings(quick, "plain")))
        if name == "trainer, stacked":
            continue  # no module to compile or to wrap
        if quick or torch.get_num_threads() > 1:
            continue  # the other modes at one thread only, which each process of DDP has
        if has_compiler():
            wrapped = functools.partial(make, _compiled)
            rows += rows_of(name, "compiled", compare(wrapped, *settings(quick, "compiled")))
        if dist.is_available() and dist.is_gloo_available():
            rows += distributed(name)
    return rows


def _as_it_is(model: nn.Module) -> nn.Module:
    return model


def _compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model)  # type: ignore[return-value]


def has_compiler() -> bool:
    """Whether ``torch.compile`` finds the C++ compiler that it needs on a CPU."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++"))


def distributed(name: str) -> list[Row]:
    """Rows of a loop under DDP with two processes."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.jsonl"
        mp.spawn(_rank, args=(name, _free_port(), str(out)), nprocs=2)
        return read_rows(out)


def _rank(rank: int, name: str, port: int, out: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    wrap: Wrap = nn.parallel.DistributedDataParallel
    strides, periods, steps = settings(False, "DDP")
    runs = compare(functools.partial(LOOPS[name], wrap), strides, periods, steps, watched=rank == 0)
    if rank == 0:
        write_rows(Path(out), rows_of(name, "DDP, 2 processes", runs))
    dist.barrier()
    dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


if __name__ == "__main__":
    command("bench.monitor", __doc__, measure, monitor_table)
