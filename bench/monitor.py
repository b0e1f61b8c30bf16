"""What an evaluation costs a training run.

Each question gives its rows at the thread count of its process (`bench.suite`).

`monitor` Runs of the same model, one without a monitor and one for each stride, take turns in blocks of steps (A B C A
B C ...) in one process, so that they share whatever else the machine does. The overhead of a stride is the time of its
run over that of the run without, less 1, over whole periods of the stride, with a bootstrap interval. At long strides
that interval is the noise of two training runs, so each row has `share` too: the median time of a probe over that of
the steps of a period. Noise hardly touches it, but it leaves out what a probe does to the caches of the next step.
Modes: plain; ``torch.compile``, where a C++ compiler is there; DDP over two processes (gloo) of one thread each, whose
rank 0 has the monitor. `in_training` An evaluation between training steps, by provider. `bench.entropy` times a call by
itself, when the pools of threads of all libraries are at rest. A probe's activations come straight from a forward pass,
so torch's pool still spins on the cores that another library's pool wakes up on; and the ten training steps that follow
share the cores with whatever that pool leaves spinning. So here every call comes between steps of a training run, and
the steps after it are timed too: ``after_us`` is what they take more than the same steps after a probe that nothing was
computed of, in the same round. `deferred` In line or by a worker: the CPU's choice between the two
(`fastent.monitor.deferred.WORKER_FROM`) comes from here, from a run with a core to spare: the smallest width from which
the loop with the worker takes less time at every width, by all of the interval (`worker_from`). A stand-in for training
multiplies matrices in one thread, several times as long as an eigensolve takes, and asks for the entropy of (512, d)
activations before each step; the cost of an evaluation is what the loop, the flush at its end included, takes more than
without.
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
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

import fastent
from bench.harness import (
    Row,
    bootstrap,
    environment,
    interleaved,
    median_interval,
    quantiles,
    ratio_columns,
    read_rows,
    settle,
    write_rows,
)
from bench.providers import ENTROPIES, entropies
from bench.training import LOOPS, TrainingLoop, Wrap
from fastent.activations import matrix_of
from fastent.covariance import centered_matrix
from fastent.linalg import eigenvalues
from fastent.monitor.deferred import DeferredEntropy, Device, Host, in_line
from fastent.monitor.probe import Watched

STRIDES = (1, 10, 100, 200, 1000)
LIMIT_STRIDE, LIMIT = 200, 0.01
BLOCK = 10
"""Steps in a turn."""

CALLED_IN = ("trainer's model", "vision", "language")
BEFORE, AFTER = 2, 10
"""Steps in a turn before the probe, and after it: together longer than a pool spins (0.1 s)."""

N = 512
WIDTHS = (64, 128, 256, 512)
STEPS = 8
WORK = 3.0  # a step's work over an eigensolve's time


class TimedRun:
    """A training run with or without a monitor, timed step by step."""

    def __init__(self, loop: TrainingLoop, stride: int) -> None:
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
    make: Callable[[int], TrainingLoop],
    strides: tuple[int, ...],
    periods: float,
    steps: int,
    *,
    watched: bool = True,
) -> list[TimedRun]:
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
    runs = [TimedRun(make(seed), stride if watched else 0) for seed, stride in enumerate((0, *strides))]
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


def _monitor_rows(name: str, mode: str, runs: list[TimedRun]) -> list[Row]:
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
        spans = bootstrap(used, lambda drawn: ours[drawn].sum(1) / theirs[drawn].sum(1), resamples=resamples)
        found = (float(ours.sum() / theirs.sum()), *spans)
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


def monitor(quick: bool) -> list[Row]:
    """Rows of all loops at this process's thread count."""
    rows = []
    for name, make in LOOPS.items():
        rows += _monitor_rows(
            name, "plain", compare(functools.partial(make, _as_it_is), *settings(quick, "plain"))
        )
        if name == "trainer, stacked":
            continue  # no module to compile or to wrap
        if quick or torch.get_num_threads() > 1:
            continue  # the other modes at one thread only, which each process of DDP has
        if has_compiler():
            wrapped = functools.partial(make, _compiled)
            rows += _monitor_rows(name, "compiled", compare(wrapped, *settings(quick, "compiled")))
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
        write_rows(Path(out), _monitor_rows(name, "DDP, 2 processes", runs))
    dist.barrier()
    dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def probed(loop: TrainingLoop) -> Callable[[], Tensor]:
    """Make a function that runs the probe as a monitor does, and returns the activations (n, d) of the layer."""
    assert loop.model is not None
    watched = Watched(loop.model, loop.probe, loop.layer)

    def read() -> Tensor:
        kept: list[Tensor] = []
        watched.run(lambda name, h: kept.append(matrix_of(h, tokens=loop.tokens).contiguous()))
        return kept[0]

    return read


def turns(
    loop: TrainingLoop, calls: dict[str | None, Callable[[Tensor], Any]], rounds: int
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


def _call_rows(name: str, loop: TrainingLoop, rounds: int) -> list[Row]:
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


def in_training(quick: bool) -> list[Row]:
    """Rows of all loops at this process's thread count; `quick`: of the first."""
    rows = []
    for name in CALLED_IN[:1] if quick else CALLED_IN:
        rows += _call_rows(name, LOOPS[name](_as_it_is, 0), 6 if quick else 14)
    return rows


def _steps(h: Tensor, work: int, evaluations: DeferredEntropy | None) -> Callable[[], None]:
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


def _seconds(call: Callable[[], object], repeats: int) -> float:
    """Median time of a call."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def _deferred_rows(d: int) -> list[Row]:
    """Rows for one width: the cost of an evaluation on the training thread, in line and by the worker."""
    host = Host()

    def worker(x: Tensor) -> Device:
        return host

    h = torch.randn(N, d)
    matrix = centered_matrix(h)
    a = torch.randn(128, 128)
    work = max(1, round(WORK * _seconds(lambda: eigenvalues(matrix), 5) / _seconds(lambda: a @ a, 200)))
    providers = {
        "none": _steps(h, work, None),
        "in line": _steps(h, work, DeferredEntropy(device_of=in_line)),
        "worker": _steps(h, work, DeferredEntropy(device_of=worker)),
    }
    timings = interleaved(providers, rounds=15 if d < 256 else 7)
    costs = {name: (timings[name] - timings["none"]) / STEPS for name in ("in line", "worker")}
    rows = []
    for name, cost in costs.items():
        row = {"op": "deferred", "provider": name, "n": N, "d": d, "dtype": "float32"} | quantiles(cost)
        row["us_step"] = round(float(np.median(timings["none"])) / STEPS * 1e6, 1)
        if name == "worker":
            row |= ratio_columns(timings["worker"], timings["in line"])
        rows.append(row | environment())
    return rows


def deferred(quick: bool) -> list[Row]:
    """Rows of all widths; `quick`: of the first two."""
    return [row for d in (WIDTHS[:2] if quick else WIDTHS) for row in _deferred_rows(d)]


def worker_from(rows: list[Row]) -> int | None:
    """Smallest width from which on the worker gains at every width, the whole interval; None where it does not."""
    found = None
    for row in sorted((row for row in rows if "ratio_high" in row), key=lambda row: row["d"], reverse=True):
        if row["ratio_high"] >= 1.0:
            break
        found = row["d"]
    return found
