"""What training and an evaluation in it cost: loops, a step of the stacked trainer, a monitor, a call between steps.

`LOOPS` are the trainer's, a small vision model's and a small causal language model's. Each makes one step when called,
and comes with the model, the probe and the layer that a user would watch. Data is synthetic and lies in memory: a
loader would only make the steps longer and the overhead smaller. A probe costs about a third of a step (no backward)
for as many samples as a batch has, and the entropy; the sizes here are one or two batches, and at least four rows for
each feature of the layer.

Each question gives its rows at the thread count of its process (`bench.suite`).

`training`
    For the `paper` model, one step of `plain`, the loop most people would write (`torch.nn.TransformerEncoderLayer`
    under `torch.nn.Embedding`, `torch.optim.AdamW` as it comes, `cross_entropy`, a batch drawn by an index), and of
    `fastent`, the stacked trainer, data order included, for 1 seed and for 8. The rows say how many seeds a step
    covers; ratios are of the time per seed, round by round. The acceptance: 1 seed on 2 threads at most a third of
    `plain`, and 8 seeds no slower per seed than 1.
`monitor`
    Runs of the same model, one without a monitor and one for each stride, take turns in blocks of steps (A B C A B C
    ...) in one process, so that they share whatever else the machine does. The overhead of a stride is the time of its
    run over that of the run without, less 1, over whole periods of the stride, with a bootstrap interval. At long
    strides that interval is the noise of two training runs, so each row has `share` too: the median time of a probe
    over that of the steps of a period. Noise hardly touches it, but it leaves out what a probe does to the caches of
    the next step. Modes: plain; ``torch.compile``, where a C++ compiler is there; DDP over two processes (gloo) of one
    thread each, whose rank 0 has the monitor.
`in_training`
    An evaluation between training steps, by provider. `bench.entropy` times a call by itself, when the pools of threads
    of all libraries are at rest. A probe's activations come straight from a forward pass, so torch's pool still spins
    on the cores that another library's pool wakes up on; and the ten training steps that follow share the cores with
    whatever that pool leaves spinning. So here every call comes between steps of a training run, and the steps after it
    are timed too: ``after_us`` is what they take more than the same steps after a probe that nothing was computed of,
    in the same round.
`training_batch`
    ``probe="batch"`` at every step and at every tenth, a fixed probe at every step and a run without a monitor, by
    turns as in `monitor`. The monitor's work is in the forward pass then, so `share` compares steps of one run: what
    one with an evaluation, and the one before it, at whose end the hooks are registered, take more than the others.
`early_end`
    A probe of the language model with a vocabulary of 32,000, every block watched, whose pass ends with the last block,
    beside one whose pass is whole (`fastent.monitor.probe`), each after a step of its own run, by turns. The rows have
    the operations of the pass too: no probe can take a smaller share of the whole one's time than of its operations.
`deferred`
    In line or by a worker: the CPU's choice between the two (`fastent.monitor.deferred.WORKER_FROM`) comes from here,
    from a run with a core to spare: the smallest width from which the loop with the worker takes less time at every
    width, by all of the interval (`worker_from`). A stand-in for training multiplies matrices in one thread, several
    times as long as an eigensolve takes, and asks for the entropy of (512, d) activations before each step; the cost of
    an evaluation is what the loop, the flush at its end included, takes more than without. "worker" hands an idle one a
    copy of the activations, as a monitor does; "worker, matrices" forms the matrices in the thread that trains. The
    last case has 24 layers of (2048, 768) and is timed for the ratio of those two costs (``cost_ratio``).
"""

from __future__ import annotations

import functools
import itertools
import os
import shutil
import tempfile
import time
import timeit
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fastent
from bench.harness import (
    Row,
    bootstrap,
    environment,
    interleaved,
    median_interval,
    quantiles,
    ratio,
    ratio_columns,
    raw,
    read_rows,
    settle,
    write_rows,
)
from bench.providers import ENTROPY, OURS, able
from fastent.activations import Resolution, Rows, Tokens
from fastent.covariance import centered_matrix
from fastent.grokking.train.config import TrainConfig, preset
from fastent.grokking.train.models import plain_model
from fastent.grokking.train.stack import Stack
from fastent.grokking.train.tasks import Task, make_task, probe_index, split
from fastent.linalg import eigenvalues
from fastent.monitor.deferred import DeferredEntropy, Host, Staged, in_line
from fastent.monitor.probe import Watched

VARIANTS: dict[str, dict[str, object]] = {
    "paper": {},
    "paper, mean readout": {"readout": "mean"},
    "paper, with =": {"equals_token": True},
    "MLP": {"model": "mlp"},
}

STRIDES = (1, 10, 100, 200, 1000)
LIMIT_STRIDE, LIMIT = 200, 0.01
BLOCK = 10
"""Steps in a turn."""

CALLED_IN = ("trainer's model", "vision", "language")
BEFORE, AFTER = 2, 10
"""Steps in a turn before the probe, and after it: together longer than a pool spins (0.1 s)."""

VOCABULARY, EARLY_LIMIT = 32_000, 0.6

PROBE_BEFORE = {"vision": 0.62388, "language": 0.68639}
"""Overhead of a fixed probe at every step, on one thread, at commit 7689b28: before passes ended early."""
BATCH_LIMIT, BATCH_TENTH_LIMIT = 0.15, 0.01  # of that; at every tenth step, of training

N = 512
WIDTHS = (64, 128, 256, 512)
STEPS = 8
MANY_LAYERS = (2048, 768, 24)  # n, d, layers
WORK = 3.0  # a step's work over an eigensolve's time


@dataclass
class TrainingLoop:
    """One training run.

    Attributes
    ----------
    model : nn.Module or None
        What is trained, wrapped or compiled where asked for; None where activations are handed over (`activations`).
    step : callable
        Makes one step.
    probe : Tensor
        What the monitor runs.
    layer : str or callable
        What it watches.
    tokens : str, optional
        As `fastent.SpectralEntropyMonitor` takes it.
    activations : callable, optional
        Where the loop itself forms them.
    """

    model: nn.Module | None
    step: Callable[[], object]
    probe: Tensor
    layer: Any
    tokens: Tokens | None = None
    activations: Callable[[], Tensor] | None = None


Wrap = Callable[[nn.Module], nn.Module]


def trainer(wrap: Wrap, seed: int) -> TrainingLoop:
    """Train the `paper` preset's Transformer as an ordinary module; 512 pairs a batch, 512 in the probe, d = 128."""
    config = preset("paper")
    task, train, batch = _pairs(config, seed)
    probe = task.inputs[probe_index(train, config.probe_size, seed, "train")]
    return _loop(plain_model(config, task), wrap, batch, probe, "layer", "last")


def _pairs(config: TrainConfig, seed: int) -> tuple[Task, Tensor, Callable[[], tuple[Tensor, Tensor]]]:
    """Task, training pairs, and what draws a batch of them by an index."""
    task = make_task(config)
    train = split(task, config.train_fraction, seed)[0]
    inputs, labels = task.inputs[train], task.labels[train]

    def batch() -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(train), (config.batch_size,))
        return inputs[rows], labels[rows]

    return task, train, batch


def stacked(wrap: Wrap, seed: int) -> TrainingLoop:
    """Train the same by the trainer's own step (`fastent.grokking.train.stack`), which is several times as fast."""
    stack = Stack(preset("paper"), [seed])
    return TrainingLoop(
        None, stack.train_step, torch.empty(0), None, None, lambda: stack.representations()[0]
    )


class Vision(nn.Module):
    """Residual network of seven convolutions on 32 x 32 images, 64 features."""

    def __init__(self) -> None:
        super().__init__()
        widths = (16, 16, 32, 64)
        self.stem = nn.Conv2d(3, widths[0], 3, stride=2, padding=1, bias=False)
        self.stages = nn.ModuleList(
            nn.ModuleDict(
                {
                    "down": nn.Conv2d(a, b, 3, stride=1 if a == b else 2, padding=1, bias=False),
                    "norm1": nn.BatchNorm2d(b),
                    "conv": nn.Conv2d(b, b, 3, padding=1, bias=False),
                    "norm2": nn.BatchNorm2d(b),
                }
            )
            for a, b in itertools.pairwise(widths)
        )
        self.features = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, 10) of images (N, 3, 32, 32)."""
        x = self.stem(x)
        for stage in self.stages:
            x = functional.relu(stage["norm1"](stage["down"](x)))
            x = functional.relu(x + stage["norm2"](stage["conv"](x)))
        return self.head(self.features(x))


def vision(wrap: Wrap, seed: int) -> TrainingLoop:
    """Train it on 128 images a batch; 256 in the probe, d = 64."""
    images, labels = torch.randn(1024, 3, 32, 32), torch.randint(10, (1024,))

    def batch() -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(images), (128,))
        return images[rows], labels[rows]

    return _loop(Vision(), wrap, batch, images[:256], "features", None)


class Block(nn.Module):
    """Pre-norm block: causal attention and a perceptron."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.attention = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Add to x (N, T, width)."""
        n, t, _ = x.shape
        q, k, v = (
            part.view(n, t, self.heads, -1).transpose(1, 2)
            for part in self.attention(self.norm1(x)).chunk(3, dim=-1)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class Language(nn.Module):
    """Causal language model: two blocks of width 128, 64 tokens."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        width, length = 128, 64
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads=4) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (N, T, vocabulary) of tokens (N, T)."""
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def language(wrap: Wrap, seed: int, *, vocabulary: int = 256, layer: str = "norm") -> TrainingLoop:
    """Train it on 8 sequences of 64 tokens a batch; 16 in the probe, every token but the first a row, d = 128."""
    text = torch.randint(vocabulary, (512, 65))

    def batch() -> tuple[Tensor, Tensor]:
        rows = text[torch.randint(len(text), (8,))]
        return rows[:, :-1], rows[:, 1:].flatten()

    return _loop(Language(vocabulary), wrap, batch, text[:16, :-1].clone(), layer, "skip_first")


def _loop(
    model: nn.Module,
    wrap: Wrap,
    batch: Callable[[], tuple[Tensor, Tensor]],
    probe: Tensor,
    layer: str,
    tokens: Tokens | None,
) -> TrainingLoop:
    model = wrap(model)
    step = _step(model, torch.optim.AdamW(model.parameters(), lr=1e-3), batch)
    return TrainingLoop(model, step, probe, layer, tokens)


def _step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: Callable[[], tuple[Tensor, Tensor]]
) -> Callable[[], None]:
    def step() -> None:
        x, y = batch()
        loss = functional.cross_entropy(model(x).flatten(0, -2), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


LOOPS: dict[str, Callable[[Wrap, int], TrainingLoop]] = {
    "trainer's model": trainer,
    "trainer, stacked": stacked,
    "vision": vision,
    "language": language,
}


def plain_step(config: TrainConfig, seed: int) -> Callable[[], object]:
    """Return one step of the loop most people would write."""
    torch.manual_seed(seed)
    task, _, batch = _pairs(config, seed)
    model = plain_model(config, task)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, betas=config.betas
    )
    return _step(model, optimizer, batch)


def training(quick: bool) -> list[Row]:
    """Rows of every variant at this process's thread count; the ratios are printed. `quick`: of the first."""
    rows = []
    for name in list(VARIANTS)[:1] if quick else VARIANTS:
        config = replace(preset("paper"), **VARIANTS[name])  # type: ignore[arg-type]
        calls = {
            "plain": plain_step(config, 1000),
            "fastent": Stack(config, [1000]).train_step,
            "fastent x8": Stack(config, range(1000, 1008)).train_step,
        }
        seconds = interleaved(calls, rounds=5 if quick else 25)
        seconds["fastent x8"] = seconds["fastent x8"] / 8
        for provider, values in seconds.items():
            row: Row = {"op": "training step, per seed", "model": name, "provider": provider.split()[0]}
            row |= {"seeds": 8 if provider.endswith("x8") else 1, **quantiles(values)}
            if provider != "plain":
                row |= ratio_columns(values, seconds["plain"], row="ours")
            rows.append(row | environment())
        one = ratio(seconds["plain"], seconds["fastent"])
        eight = ratio(seconds["fastent x8"], seconds["fastent"])
        print(
            f"{name}: {one[0]:.1f} times faster than plain ({one[1]:.1f} to {one[2]:.1f}); 8 seeds take "
            f"{eight[0]:.2f} ({eight[1]:.2f} to {eight[2]:.2f}) of 1 seed's time per seed"
        )
    return rows


class TimedRun:
    """A training run with or without a monitor, timed step by step."""

    def __init__(self, loop: TrainingLoop, stride: int, *, of_batch: bool = False) -> None:
        self.loop, self.stride, self.of_batch = loop, stride, of_batch
        self.steps_done = 0
        self.step_seconds: list[float] = []
        self.probe_seconds: list[float] = []
        self.by_phase: list[list[float]] = [[] for _ in range(stride)]  # whole steps, an evaluation's first
        self.blocks: list[float] = []
        self.monitor: fastent.SpectralEntropyMonitor | None = None
        if stride and loop.activations is None:
            self.monitor = fastent.SpectralEntropyMonitor(
                loop.model, "batch" if of_batch else loop.probe, loop.layer, every=stride, tokens=loop.tokens
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
                if self.stride:
                    done, phase = clock(), self.steps_done % self.stride
                    self.by_phase[phase].append(done - start)
                    if phase == 0:
                        self.probe_seconds.append(done - trained)
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
        if self.of_batch:  # in the pass, and the hooks at the end of the step before
            if self.stride < 3:
                return float("nan")  # no step without an evaluation
            due, *others, before = self.by_phase
            step = float(np.median(np.concatenate(others)))
            probe = float(np.median(due) + np.median(before)) - 2 * step
        else:
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
    take_turns(runs, max(steps, round(periods * max(strides))))
    return runs


def take_turns(runs: list[TimedRun], steps: int) -> None:
    """Train the runs for so many steps in turns of `BLOCK`, and close their monitors."""
    for run in runs:
        run.warm_up()
    for turn in range(steps // BLOCK):
        # The order turns too: who comes after whom must not matter.
        for run in runs[turn % len(runs) :] + runs[: turn % len(runs)]:
            run.advance(BLOCK)
    for run in runs:
        if run.monitor is not None:
            run.monitor.close()


def _monitor_rows(name: str, mode: str, runs: list[TimedRun]) -> list[Row]:
    """Rows of one loop in one mode."""
    rows = []
    probe = min(float(np.median(run.probe_seconds)) for run in runs if run.probe_seconds)
    for run in runs:
        row: Row = {"op": "monitor", "provider": "fastent" if run.stride else "no monitor"}
        row |= {"loop": name, "mode": mode, "stride": run.stride, "probe_us": round(1e6 * probe, 1)}
        row |= quantiles(np.array(run.blocks) / BLOCK) | {"steps": len(run.step_seconds)}
        if run.stride:
            row |= _overhead_columns(row, rows[0])
            row |= {"share": run.share, "probes": len(run.probe_seconds)}
            if run.stride == LIMIT_STRIDE:
                row["limit"] = LIMIT
        rows.append(row | environment())
    return rows


def _overhead_columns(row: Row, plain: Row) -> Row:
    """`overhead` by the turns that two rows keep."""
    found = overhead(np.array(row["raw_us"]), np.array(plain["raw_us"]), row["stride"])
    return dict(zip(("overhead", "overhead_low", "overhead_high"), found, strict=True))


def differing(rows: list[Row]) -> list[str]:
    """Say which overheads, and times after a call, do not follow from the turns and rounds that the rows keep."""
    found, plain = [], dict[tuple[Any, ...], Row]()
    for row in rows:
        run = tuple(row.get(key) for key in ("op", "loop", "mode", "threads"))
        again: Row = {}
        if "after_raw_us" in row:
            again = _after(row["after_raw_us"])
        elif "overhead" in row and "raw_us" in row:
            again = _overhead_columns(row, plain[run])
        elif row.get("stride") == 0:
            plain[run] = row
        found += [
            f"{' '.join(map(str, run))}: {key} {row.get(key)}, of its rounds {value}"
            for key, value in again.items()
            if row.get(key) != value
        ]
    return found


def overhead(blocks: np.ndarray, plain: np.ndarray, stride: int) -> tuple[float, ...]:
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
        spans = bootstrap(used, lambda drawn: ours[drawn].sum(1) / theirs[drawn].sum(1))
        found = (float(ours.sum() / theirs.sum()), *spans)
    else:
        found = median_interval(ours / theirs)
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
            wrapped = functools.partial(make, torch.compile)
            rows += _monitor_rows(name, "compiled", compare(wrapped, *settings(quick, "compiled")))
        if dist.is_available() and dist.is_gloo_available():
            rows += distributed(name)
    return rows


def training_batch(quick: bool) -> list[Row]:
    """Rows of a monitor of the training batch beside one with a fixed probe, at this process's thread count."""
    rows = []
    for name in PROBE_BEFORE:
        ways = (0, False), (1, False), (1, True), (10, True)
        runs = [
            TimedRun(LOOPS[name](_as_it_is, seed), stride, of_batch=of_batch)
            for seed, (stride, of_batch) in enumerate(ways)
        ]
        take_turns(runs, 200 if quick else 3000)
        for run, row in zip(runs, _monitor_rows(name, "plain", runs), strict=True):
            row |= {"op": "training batch"}
            if run.of_batch:
                limit = BATCH_TENTH_LIMIT if run.stride > 1 else round(BATCH_LIMIT * PROBE_BEFORE[name], 5)
                row |= {"provider": "training batch", "limit": limit}
            elif run.stride:
                row |= {"provider": "fixed probe"}
            if run.stride == 1:
                del row["share"]  # no step without an evaluation
            rows.append(row)
    return rows


def _as_it_is(model: nn.Module) -> nn.Module:
    return model


def has_compiler() -> bool:
    """Whether ``torch.compile`` finds the C++ compiler that it needs on a CPU."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++"))


def distributed(name: str) -> list[Row]:
    """Rows of a loop under DDP with two processes."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, args=(name, folder), nprocs=2)
        return read_rows(Path(folder) / "rows.jsonl")


def _rank(rank: int, name: str, folder: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=2)
    wrap: Wrap = nn.parallel.DistributedDataParallel
    strides, periods, steps = settings(False, "DDP")
    runs = compare(functools.partial(LOOPS[name], wrap), strides, periods, steps, watched=rank == 0)
    if rank == 0:
        write_rows(Path(folder) / "rows.jsonl", _monitor_rows(name, "DDP, 2 processes", runs))
    dist.barrier()
    dist.destroy_process_group()


def probed(loop: TrainingLoop) -> Callable[[], Tensor]:
    """Make a function that runs the probe as a monitor does, and returns the activations (n, d) of the layer."""
    assert loop.model is not None
    watched = Watched(loop.model, loop.probe, loop.layer)

    def read() -> Tensor:
        kept: list[Tensor] = []
        watched.run(lambda name, h: kept.append(Rows(loop.tokens).matrix(h).contiguous()))
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
    h = probed(loop)()
    case = {"op": "in training", "loop": name, "n": h.shape[0], "d": h.shape[1]}
    found, left_out = able(ENTROPY, h, case)
    rows: list[Row] = []
    calls: dict[str | None, Callable[[Tensor], Any]] = {None: lambda h: None}
    calls |= {provider.name: call for provider, call in found.items()}
    seconds = turns(loop, calls, rounds)
    for provider in found:
        values, after = seconds[provider.name]
        row: Row = {**case, "provider": provider.name, "quantity": provider.quantity, "exact": provider.exact}
        row |= quantiles(values) | excess(after, seconds[None][1])
        if provider.name != OURS:
            row |= ratio_columns(seconds[OURS][0], values)
        rows.append(row | environment(provider.package))
    return rows + [row | environment() for row in left_out]


def excess(after: np.ndarray, plain: np.ndarray) -> Row:
    """Median difference, in microseconds, of the steps after a call to those after none, and its 95 % interval."""
    rounds = raw(after - plain)
    return _after(rounds) | {"after_raw_us": rounds}


def _after(rounds: list[float]) -> Row:
    values = median_interval(np.array(rounds))
    return {
        name: round(value, 1)
        for name, value in zip(("after_us", "after_low", "after_high"), values, strict=True)
    }


def in_training(quick: bool) -> list[Row]:
    """Rows of all loops at this process's thread count; `quick`: of the first."""
    rows = []
    for name in CALLED_IN[:1] if quick else CALLED_IN:
        rows += _call_rows(name, LOOPS[name](_as_it_is, 0), 6 if quick else 14)
    return rows


def early_end(quick: bool) -> list[Row]:
    """Rows of a probe whose pass ends early and of one whose pass is whole, at this process's thread count."""
    runs = {name: _probed_blocks(whole=name == "whole pass") for name in ("whole pass", "early end")}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(-1, 5 if quick else 25):  # the first one is warm-up
        for name in list(runs) if turn % 2 else list(runs)[::-1]:
            loop, monitor = runs[name]
            loop.step()
            start = time.perf_counter()
            monitor.step(turn + 1)
            monitor.flush()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
    flops = operations(runs["whole pass"][0])
    rows = []
    for name, values in seconds.items():
        row: Row = {
            "op": "early end",
            "provider": name,
            "vocabulary": VOCABULARY,
            **quantiles(np.array(values)),
        }
        row["flops"] = flops[name]
        if name == "early end":
            row |= ratio_columns(np.array(values), np.array(seconds["whole pass"]), row="ours")
            row |= {"floor": round(flops[name] / flops["whole pass"], 4), "limit": EARLY_LIMIT}
        rows.append(row | environment())
    return rows


def _probed_blocks(*, whole: bool) -> tuple[TrainingLoop, fastent.SpectralEntropyMonitor]:
    """Make a run and its monitor of all blocks."""
    torch.manual_seed(0)
    loop = language(_as_it_is, 0, vocabulary=VOCABULARY, layer="blocks")
    assert loop.model is not None
    if whole:  # a hook that is to be called at any end keeps a pass from ending early
        loop.model.register_forward_hook(lambda *_: None, always_call=True)
    return loop, fastent.SpectralEntropyMonitor(
        loop.model, loop.probe, loop.layer, every=1, tokens=loop.tokens
    )


def operations(loop: TrainingLoop) -> dict[str, int]:
    """Count the multiplications and additions of a pass of the probe, whole and without the projection."""
    assert isinstance(loop.model, Language)
    # The products of attention are counted where they are ones of their own.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        loop.model(loop.probe)
    whole = counter.get_total_flops()
    return {"whole pass": whole, "early end": whole - 2 * loop.probe.numel() * loop.model.head.weight.numel()}


class Formed(Host):
    """The CPU with all matrices formed by the thread that trains, whether the worker is idle or not."""

    def stage(self, x: Tensor, resolution: Resolution, *, idle: bool = False) -> Staged | None:
        """Form the matrix."""
        return super().stage(x, resolution)


def _steps(
    inputs: list[Tensor], steps: int, work: int, evaluations: DeferredEntropy | None
) -> Callable[[], None]:
    """Make a loop of so many steps of `work` products each."""
    a = torch.randn(128, 128)

    def loop() -> None:
        for step in range(steps):
            if evaluations is not None:
                opened = evaluations.open(step)
                if opened is None:
                    raise RuntimeError("an evaluation was dropped")
                with opened:
                    for layer, h in enumerate(inputs):
                        opened.add(str(layer), h)
            for _ in range(work):
                a @ a
        if evaluations is not None:
            evaluations.flush()
            if len(list(evaluations.arrived())) != steps:
                raise RuntimeError("results are missing")

    return loop


def _deferred_rows(n: int, d: int, layers: int, steps: int, rounds: int) -> list[Row]:
    """Rows for one shape: the cost of an evaluation on the training thread, in line and by the worker."""
    inputs = [torch.randn(n, d) for _ in range(layers)]
    matrix = centered_matrix(inputs[0]).matrix
    a = torch.randn(128, 128)
    solve = layers * np.median(timeit.repeat(lambda: eigenvalues(matrix), number=1, repeat=5))
    work = max(1, round(WORK * solve / np.median(timeit.repeat(lambda: a @ a, number=1, repeat=200))))
    loop = functools.partial(_steps, inputs, steps, work)
    formed, host = Formed(), Host()
    providers = {
        "none": loop(None),
        "in line": loop(DeferredEntropy(device_of=in_line)),
        "worker, matrices": loop(DeferredEntropy(device_of=lambda x: formed)),
        "worker": loop(DeferredEntropy(device_of=lambda x: host)),
    }
    timings = interleaved(providers, rounds=rounds)
    costs = {name: (timings[name] - timings["none"]) / steps for name in providers if name != "none"}
    rows = []
    for name, cost in costs.items():
        row = {"op": "deferred", "provider": name, "n": n, "d": d, "layers": layers, "dtype": "float32"}
        row |= quantiles(cost) | {"us_step": round(float(np.median(timings["none"])) / steps * 1e6, 1)}
        if name != "in line":
            row |= ratio_columns(timings[name], timings["in line"], row=None)
        if name == "worker":
            middle, low, high = median_interval(cost / costs["worker, matrices"])
            row |= {"cost_ratio": round(middle, 4), "cost_low": round(low, 4), "cost_high": round(high, 4)}
        rows.append(row | environment())
    return rows


def deferred(quick: bool) -> list[Row]:
    """Rows of all shapes; `quick`: of the first two. The edge from which on the worker gains is printed."""
    rows = []
    for d in WIDTHS[:2] if quick else WIDTHS:
        rows += _deferred_rows(N, d, layers=1, steps=STEPS, rounds=15 if d < 256 else 7)
    if not quick:
        rows += _deferred_rows(*MANY_LAYERS, steps=3, rounds=5)
    print(f"the worker gains from d = {worker_from(rows)} on")
    return rows


def worker_from(rows: list[Row]) -> int | None:
    """Smallest width from which on the worker gains at every width, the whole interval; None where it does not."""
    of_worker = [row for row in rows if row["provider"] == "worker" and row["layers"] == 1]
    found = None
    for row in sorted(of_worker, key=lambda row: row["d"], reverse=True):
        if row["ratio_high"] >= 1.0:
            break
        found = row["d"]
    return found
