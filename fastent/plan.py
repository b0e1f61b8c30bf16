"""What monitoring a large model would cost, and what to choose: ``fastent plan``.

One layer's (n, d) activations cost ``call + bytes / bandwidth + flops / rate(m) + solve(m)``, m = min(n, d): a pass
that converts and centres, the products of the lower triangle, the eigenvalues. Bytes, operations and memory are counts
of what the CPU path does; the rates are measured on the CPU of this process, about two seconds, at its thread count.
Between measured sizes they are interpolated on logarithmic axes, above the largest a solve grows as m^3; that is an
extrapolation and is said to be one (`Cost.extrapolated`). The forward pass of the probe is a model's own, and as a rule
most of what a monitor costs: it counts where its time is given, or where there is a monitor to measure (`measure`), and
where it does not the plan says so.

Three ways to evaluate L layers on R ranks that each hold the model:

one rank
    Rank 0 evaluates all layers, the others wait or go on.
layers over ranks
    Each rank watches L / R of the layers, on the same probe. Nothing is sent but the results.
rows over ranks
    Each rank runs its share of the probe and their moments are added up (`fastent.Moments.all_reduce`): d^2 / 2 float64
    a layer over the network, and 2 d from each rank; and a d x d matrix to solve, whatever the number of rows; each
    rank solves L / R of them.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Literal

import torch
from torch import nn

from fastent import linalg
from fastent.covariance import centered_matrix
from fastent.entropy import spectral_entropy
from fastent.linalg import SLAB, _chunk_length
from fastent.monitor.monitor import SpectralEntropyMonitor

FLOAT64 = 8

Side = Literal["covariance", "gram"]
Curve = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Work:
    """Counts for the entropy of (n, d) activations.

    Attributes
    ----------
    side : {"covariance", "gram"}
        Matrix that is formed and solved.
    m, length : int
        Its edge, and the terms that each of its entries sums.
    bytes : int
        Read and written by the pass that converts and centres, and the matrix.
    flops : int
        Of the products, multiplications and additions.
    solve_flops : int
        Of the reduction to tridiagonal form, ``4/3 m^3``; the rest of a solve is of lower order.
    memory : int
        Bytes beside the activations at the peak: the float64 buffer, the matrix and the solver's copy of it.
    launches : int
        Matrix products that are called.
    """

    side: Side
    m: int
    length: int
    bytes: int
    flops: int
    solve_flops: int
    memory: int
    launches: int


@dataclass(frozen=True)
class Rates:
    """What a device does, measured (`fastent.plan.measure_rates`) or assumed.

    Attributes
    ----------
    call : float
        Seconds of an evaluation that are there at any size.
    bandwidth : float
        Bytes per second of the pass that converts and centres.
    product : sequence of (edge, flops per second)
        Of the products, by the edge m of the matrix, ascending.
    solve : sequence of (edge, seconds)
        Of the eigenvalues, by the edge, ascending.
    """

    call: float
    bandwidth: float
    product: Curve
    solve: Curve


@dataclass(frozen=True)
class Cost:
    """Seconds of one evaluation by parts.

    `extrapolated` says that the matrix is larger than any that the rates were measured on.
    """

    call: float
    convert: float
    product: float
    solve: float
    extrapolated: bool

    @property
    def seconds(self) -> float:
        """All parts together."""
        return self.call + self.convert + self.product + self.solve


def work(n: int, d: int, *, itemsize: int = 4, side: Side | None = None) -> Work:
    """Count what the entropy of (n, d) activations takes.

    Parameters
    ----------
    n, d : int
        Rows and features.
    itemsize : int
        Bytes of an entry of the activations.
    side : {"covariance", "gram"}, optional
        The smaller by default, as `fastent.spectral_entropy` takes it.

    Raises
    ------
    ValueError
        If n or d is less than 2.

    Examples
    --------
    >>> work(512, 8192, itemsize=2).side, work(512, 8192).m
    ('gram', 512)
    """
    if n < 2 or d < 2:
        raise ValueError(f"an entropy needs at least 2 rows and 2 features; got n = {n}, d = {d}")
    side = side or ("gram" if n < d else "covariance")
    m, length = (n, d) if side == "gram" else (d, n)
    chunk = _chunk_length(length, m)
    chunks = math.ceil(length / chunk)
    full, rest = divmod(m, SLAB)  # slabs of the lower triangle, each as long as it reaches
    return Work(
        side=side,
        m=m,
        length=length,
        # read the input, write the float64 buffer, read it for the means, read and write it to centre;
        # write and read the matrix
        bytes=n * d * (itemsize + 4 * FLOAT64) + 2 * FLOAT64 * m * m,
        flops=length * (SLAB**2 * full * (full + 1) + 2 * rest * m),
        solve_flops=4 * m**3 // 3,
        memory=FLOAT64 * (chunk * m + 2 * m * m),
        launches=chunks * (full + (rest > 0)),
    )


def estimate(one: Work, rates: Rates) -> Cost:
    """Time of that work at those rates."""
    return Cost(
        call=rates.call,
        convert=one.bytes / rates.bandwidth,
        product=one.flops / _between(rates.product, one.m, power=0.0),
        solve=_between(rates.solve, one.m, power=3.0),
        extrapolated=one.m > min(rates.product[-1][0], rates.solve[-1][0]),
    )


def floor(one: Work, rates: Rates) -> float:
    """Seconds that no implementation on this device undercuts by much.

    The products of a triangle (half of all) at the best rate that was measured, and the eigenvalues; reading the
    input goes on meanwhile.
    """
    best = max(rate for _, rate in rates.product)
    return one.m * one.m * one.length / best + _between(rates.solve, one.m, power=3.0)


def all_reduce_bytes(d: int, ranks: int) -> int:
    """Bytes that each rank sends to add up the moments of one layer (`fastent.Moments.all_reduce`), by a ring.

    That is d (d + 1) / 2 products, and 2 d + 6 numbers of each rank, in float64; a ring sends ``2 (ranks - 1) / ranks``
    of it.
    """
    numbers = d * (d + 1) // 2 + ranks * (2 * d + 6)
    return math.ceil(FLOAT64 * numbers * 2 * (ranks - 1) / ranks)


def _between(curve: Curve, x: float, *, power: float) -> float:
    """Value at `x` between points on logarithmic axes; above them with slope `power`, below them as at the first."""
    if x <= curve[0][0]:
        return curve[0][1]
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        if x <= x1:
            share = math.log(x / x0) / math.log(x1 / x0)
            return math.exp((1 - share) * math.log(y0) + share * math.log(y1))
    return curve[-1][1] * float((x / curve[-1][0]) ** power)


EDGES = (16, 64, 128, 256, 512, 1024)
LENGTH = 512


def measure_rates(edges: Sequence[int] = EDGES, *, budget: float = 0.1) -> Rates:
    """Measure this CPU.

    Parameters
    ----------
    edges : sequence of int
        Sizes of matrix to measure at, ascending; larger ones are extrapolated to.
    budget : float
        Seconds to spend on each of them, three repetitions at least.
    """
    generator = torch.Generator().manual_seed(0)
    product, solve = [], []
    for m in edges:
        h = torch.randn(LENGTH, m, generator=generator, dtype=torch.float64, device="cpu")
        lower, add_lower_product = linalg.product_target(h, m)
        products = partial(add_lower_product, lower, h.T, 1.0, first=True)
        solution = partial(linalg.eigenvalues, centered_matrix(h, side="covariance").matrix)
        product.append((m, work(LENGTH, m, side="covariance").flops / _seconds(products, budget)))
        solve.append((m, _seconds(solution, budget)))
    tall = torch.randn(4096, 128, generator=generator, dtype=torch.float32, device="cpu")
    convert = partial(linalg.centred, tall, exact=False)
    small = work(2, 2)
    rates = Rates(0.0, work(4096, 128).bytes / _seconds(convert, budget), product, solve)
    pair = torch.eye(2, dtype=torch.float32, device="cpu")
    whole = _seconds(lambda: spectral_entropy(pair), budget)
    parts = small.bytes / rates.bandwidth + small.flops / product[0][1] + solve[0][1]
    return Rates(max(0.0, whole - parts), rates.bandwidth, product, solve)


def _seconds(call: Callable[[], object], budget: float) -> float:
    call()
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 3 or (time.perf_counter() - began < budget and len(times) < 1000):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return median(times)


@dataclass(frozen=True)
class Measured:
    """What one probe took.

    Attributes
    ----------
    layers, d, probe : int
        Layers recorded; features and rows of the one that takes the most operations.
    forward : float
        Seconds of the pass, with its checks.
    evaluation : float
        Seconds of all that the training thread does or waits for besides.
    """

    layers: int
    d: int
    probe: int
    forward: float
    evaluation: float


_FEWEST, _MOST = 3, 50  # evaluations that a measurement takes


def measure(monitor: SpectralEntropyMonitor, *, budget: float = 2.0) -> Measured:
    """Evaluate a monitor's probe some times, by its own clock (`fastent.SpectralEntropyMonitor.cost`); medians.

    Parameters
    ----------
    monitor : SpectralEntropyMonitor
        With a fixed probe. Its records of these steps stay in it.
    budget : float
        Seconds to spend, after a first evaluation that is not counted.

    Raises
    ------
    ValueError
        If it evaluates nothing by itself.
    """
    first = monitor.last_step or 0
    steps = itertools.count((first // monitor.every + 1) * monitor.every, monitor.every)
    records = [*monitor.step(next(steps)), *monitor.flush()]
    if not records:
        raise ValueError(
            "the monitor has no pass of its own to measure: make it with a model, a fixed probe and layers"
        )
    forward: list[float] = []
    evaluation: list[float] = []
    began = time.perf_counter()
    while len(forward) < _FEWEST or (time.perf_counter() - began < budget and len(forward) < _MOST):
        before = monitor.cost
        monitor.step(next(steps))
        monitor.flush()
        after = monitor.cost
        forward.append(after.forward - before.forward)
        evaluation.append(max(0.0, after.seconds - before.seconds - forward[-1]))
    shapes = [(record.n, record.d) for record in records if record.n > 1]
    n, d = max(shapes, key=lambda shape: work(*shape).flops, default=(2, 2))
    return Measured(len(records), d, n, median(forward), median(evaluation))


def made_by(place: str) -> SpectralEntropyMonitor:
    """Call a function that makes a monitor.

    Parameters
    ----------
    place : str
        ``module:function``; modules of the current folder are found too.

    Raises
    ------
    ValueError
        If there is no such function, or it raises, makes something else, or a monitor that has no fixed probe.
    """
    name, _, function = place.partition(":")
    if not name or not function:
        raise ValueError(f"model is MODULE:FUNCTION, such as train:make_monitor; got {place!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    with called_for(place):
        module = importlib.import_module(name)
    make = getattr(module, function, None)
    if make is None:
        own = [each for each, value in vars(module).items() if inspect.isfunction(value)]
        raise ValueError(
            f"model={place!r}: {name} has no {function!r}; its functions are {', '.join(own) or 'none'}"
        )
    if isinstance(make, SpectralEntropyMonitor | nn.Module) or not callable(make):
        raise ValueError(
            f"model={place!r} is a {type(make).__name__} and no function: write one without arguments that makes the "
            "model and returns its monitor, and name that"
        )
    try:
        inspect.signature(make).bind()
    except TypeError as error:
        raise ValueError(f"model={place!r} is called without arguments, and it has: {error}") from error
    with called_for(place):
        monitor = make()
    if not isinstance(monitor, SpectralEntropyMonitor):
        raise ValueError(
            f"model={place!r} must return a fastent.SpectralEntropyMonitor, with the model, the probe and the layers "
            f"of the run that is planned; got {type(monitor).__name__}"
        )
    if monitor._watched is None or monitor._batch is not None:
        raise ValueError(
            f"model={place!r} must return a monitor with a fixed probe, whose pass is measured; got one that "
            + ("has no model" if monitor._watched is None else "watches the training batch")
            + ". What it takes of training is in its `cost`, after some steps of the run itself"
        )
    return monitor


@contextmanager
def called_for(place: str) -> Iterator[None]:
    """Raise what the user's code for ``model=place`` raises as a ValueError that says where it was raised."""
    try:
        yield
    except Exception as error:  # any, since it is theirs
        name = place.partition(":")[0]
        if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
            raise ValueError(f"model={place!r}: {error}; looked for in {os.getcwd()} too") from error
        if isinstance(error, SyntaxError):
            raise ValueError(f"model={place!r}: {error}") from error
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if Path(frame.filename).is_relative_to(Path.cwd())] or frames
        said = "; ".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())])
        raise ValueError(
            f"model={place!r} raised {said} ({own[-1].filename}, line {own[-1].lineno})"
        ) from error


RESULT_BYTES = 6 * 8  # what a rank sends of each layer


MOST = 10**12
"""Bound of every count: beyond it no estimate means anything."""

SMALLEST, LARGEST = 1e-9, 1e12
"""Bounds of every time, rate and share."""


@dataclass(frozen=True, kw_only=True)
class Monitoring:
    """What is to be monitored, and what it may cost; its numbers are checked before anything is measured.

    Attributes
    ----------
    layers, d, probe, ranks, stride : int
        Watched layers, their features, rows of the probe, processes, steps between probes.
    step_time : float
        Seconds of a training step.
    itemsize : int
        Bytes of an entry of the activations.
    link : float
        Bytes per second that a rank sends.
    budget : float
        Share of the training time that a monitor may take.
    probe_time : float, optional
        Seconds of the probe's forward pass; without it share and stride are those of the evaluation alone.
    evaluation_time : float, optional
        Seconds of the evaluation of all layers on one rank, if it was measured: then what is computed is estimated
        relative to it.

    Raises
    ------
    ValueError
        If a count is below 1 (2 for rows and features) or over `MOST`, or a time, rate or share no number of its
        range.
    """

    layers: int
    d: int
    probe: int
    ranks: int
    stride: int
    step_time: float
    itemsize: int = 2
    link: float = 25e9
    budget: float = 0.01
    probe_time: float | None = None
    evaluation_time: float | None = None

    def __post_init__(self) -> None:
        for name, least in {"layers": 1, "d": 2, "probe": 2, "ranks": 1, "stride": 1}.items():
            count = getattr(self, name)
            if not least <= count <= MOST:
                raise ValueError(f"{name} must be from {least} to {MOST:,}; got {count}")
        if not 1 <= self.itemsize <= 16:
            raise ValueError(f"itemsize must be from 1 to 16 bytes; got {self.itemsize}")
        for name, value, unit in (
            ("step_time", self.step_time, "seconds"),
            ("link", self.link / 1e9, "GB per second"),
        ):
            if not SMALLEST <= value <= LARGEST:
                raise ValueError(f"{name} must be from {SMALLEST:g} to {LARGEST:g} {unit}; got {value:g}")
        if not SMALLEST <= self.budget <= 1:
            raise ValueError(f"budget must be over 0 and at most 100 percent; got {100 * self.budget:g}")
        for name in ("probe_time", "evaluation_time"):
            seconds = getattr(self, name)
            if seconds is not None and not 0 <= seconds <= LARGEST:
                raise ValueError(f"{name} must be from 0 to {LARGEST:g} seconds; got {seconds:g}")


@dataclass(frozen=True)
class Way:
    """One way to evaluate all layers.

    Attributes
    ----------
    name : str
        See the module.
    seconds : float
        Of the slowest rank, for one probe: computing and sending.
    sending : float
        Of those, sending.
    sent : int
        Bytes that a rank sends.
    memory : int
        Bytes at the peak on a rank, the activations of one layer included.
    work : Work
        For one layer.
    cost : Cost
        Its time.
    """

    name: str
    seconds: float
    sending: float
    sent: int
    memory: int
    work: Work
    cost: Cost


@dataclass(frozen=True)
class Plan:
    """All ways, and the choice.

    Attributes
    ----------
    asked : Monitoring
        What was asked for.
    ways : tuple of Way
        Those that the number of ranks allows.
    best : Way
        The fastest.
    share : float
        Of the training time, at the stride asked for.
    stride : int
        The smallest one at which that share is within the budget.
    other_side : float
        Seconds that the larger of the two matrices would take instead for one layer.
    """

    asked: Monitoring
    ways: tuple[Way, ...]
    best: Way
    share: float
    stride: int
    other_side: float


def make_plan(rates: Rates, asked: Monitoring) -> Plan:
    """Estimate every way at the rates of the processor that evaluates, and choose."""
    layers, d, probe, ranks, link = asked.layers, asked.d, asked.probe, asked.ranks, asked.link
    itemsize, step_time = asked.itemsize, asked.step_time
    whole = work(probe, d, itemsize=itemsize)
    one = estimate(whole, rates)
    measured = asked.evaluation_time
    scale = 1.0 if measured is None else measured / (layers * one.seconds)  # for all ways: they are compared
    activations = probe * d * itemsize
    ways = [
        Way("one rank", layers * scale * one.seconds, 0.0, 0, whole.memory + activations, whole, one),
    ]
    if ranks > 1:
        mine = math.ceil(layers / ranks)
        sending = mine * RESULT_BYTES / link
        ways.append(
            Way(
                "layers over ranks",
                mine * scale * one.seconds + sending,
                sending,
                mine * RESULT_BYTES,
                whole.memory + activations,
                whole,
                one,
            )
        )
        rows = max(2, math.ceil(probe / ranks))
        part = work(rows, d, itemsize=itemsize, side="covariance")
        parts = estimate(part, rates)
        sent = layers * all_reduce_bytes(d, ranks)
        ways.append(
            Way(
                "rows over ranks",
                scale * (layers * (parts.seconds - parts.solve) + mine * parts.solve) + sent / link,
                sent / link,
                sent,
                part.memory + rows * d * itemsize + FLOAT64 * (d + d * d),
                part,
                parts,
            )
        )
    best = min(ways, key=lambda way: way.seconds)
    cost = best.seconds + (asked.probe_time or 0.0)
    other = work(probe, d, itemsize=itemsize, side="covariance" if whole.side == "gram" else "gram")
    return Plan(
        asked=asked,
        ways=tuple(ways),
        best=best,
        share=cost / (asked.stride * step_time),
        stride=max(1, math.ceil(cost / (asked.budget * step_time))),
        other_side=estimate(other, rates).seconds,
    )


def describe(plan: Plan) -> list[str]:
    """Lines for the screen."""
    asked = plan.asked
    d, probe = asked.d, asked.probe
    lines = [f"{'way':<18} {'per probe':>10} {'computing':>10} {'sending':>10} {'sent':>10} {'memory':>10}"]
    for way in plan.ways:
        mark = "  <- fastest" if way is plan.best else ""
        lines.append(
            f"{way.name:<18} {_time(way.seconds):>10} {_time(way.seconds - way.sending):>10} "
            f"{_time(way.sending):>10} {_size(way.sent):>10} {_size(way.memory):>10}{mark}"
        )
    best, one = plan.best, plan.best.cost
    alone = ", the forward pass left out" if asked.probe_time is None else ""
    measured = asked.evaluation_time is not None
    if asked.probe_time is None:
        forward = (
            "not in these numbers, and as a rule most of what a probe costs: --model MODULE:FUNCTION has it measured, "
            "--probe-time gives it"
        )
    else:
        source = "measured" if measured else "as given"
        forward = f"{_time(asked.probe_time)} for the probe, {source}; in share and stride"
    lines += [
        "",
        f"one layer      {best.work.m:,} x {best.work.m:,} {best.work.side}: {best.work.flops / 1e9:.3g} + "
        f"{best.work.solve_flops / 1e9:.3g} GFLOP, {_size(best.work.bytes)} moved, "
        f"{best.work.launches} products",
        f"               convert {_time(one.convert)}, products {_time(one.product)}, "
        f"eigenvalues {_time(one.solve)}, calls {_time(one.call)}",
        f"other matrix   {_time(plan.other_side)} a layer",
        f"forward pass   {forward}",
        f"share          {plan.share:.2%} of the training time at stride {asked.stride:,} and "
        f"{_time(asked.step_time)} a step{alone}",
        f"choose         {best.name}; stride {plan.stride:,} or more keeps it within {100 * asked.budget:g} %{alone}",
    ]
    if asked.evaluation_time is not None:
        layers = f"{asked.layers:,} layer{'s' if asked.layers > 1 else ''}"
        by_rates = _time(asked.layers * plan.ways[0].cost.seconds)
        lines.insert(
            lines.index(f"forward pass   {forward}"),
            f"evaluation     {_time(asked.evaluation_time)} for {layers}, measured; by the rates {by_rates}, if all "
            "are as large as the largest",
        )
    if probe <= d:
        ceiling = math.log(probe - 1) / math.log(d)
        lines.append(
            f"ceiling        {probe:,} rows in {d:,} features: H cannot exceed {ceiling:.3f}; its changes still show"
        )
    if any(way.cost.extrapolated for way in plan.ways):
        lines.append("extrapolated   matrices larger than any measured: the eigenvalues as m^3")
    return lines


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}" if seconds < 1e4 else f"{seconds / 3600:.3g} h"
    return f"{seconds / 1e-6:.3g} us" if seconds else "0"


def _size(count: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"
