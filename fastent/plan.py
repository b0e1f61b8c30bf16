"""What monitoring a large model would cost, and what to choose: ``fastent plan``.

Three ways to evaluate L layers on R ranks that each hold the model (`fastent.cost_model` for each layer):

one rank
    Rank 0 evaluates all layers, the others wait or go on.
layers over ranks
    Each rank watches L / R of the layers, on the same probe. Nothing is sent but the results.
rows over ranks
    Each rank runs its share of the probe and their moments are added up (`fastent.Moments.all_reduce`): d^2 float64 a
    layer over the network, and a d x d matrix to solve, whatever the number of rows; each rank solves L / R of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastent.cost_model import FLOAT64, Estimate, Rates, Work, all_reduce_bytes, estimate, work

RESULT_BYTES = 6 * 8  # what a rank sends of each layer


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
    estimate : Estimate
        Its time.
    """

    name: str
    seconds: float
    sending: float
    sent: int
    memory: int
    work: Work
    estimate: Estimate


@dataclass(frozen=True)
class Plan:
    """All ways, and the choice.

    Attributes
    ----------
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
    probe_time : float or None
        Seconds of the probe's forward pass that are in `share` and `stride`; None where nobody said.
    """

    ways: tuple[Way, ...]
    best: Way
    share: float
    stride: int
    other_side: float
    probe_time: float | None


MOST = 10**12
"""Bound of every count: beyond it no estimate means anything."""

SMALLEST, LARGEST = 1e-9, 1e12
"""Bounds of every time, rate and share."""


def check_plan(
    *,
    layers: int,
    d: int,
    probe: int,
    ranks: int,
    stride: int,
    step_time: float,
    itemsize: int = 2,
    link: float = 25e9,
    budget: float = 0.01,
    probe_time: float | None = None,
) -> None:
    """Check the numbers of a plan, before anything is measured.

    Raises
    ------
    ValueError
        If a count is below 1 (2 for rows and features) or over `MOST`, or a time, rate or share no number of its
        range.
    """
    counts = {
        "layers": (layers, 1),
        "d": (d, 2),
        "probe": (probe, 2),
        "ranks": (ranks, 1),
        "stride": (stride, 1),
    }
    for name, (count, least) in counts.items():
        if not least <= count <= MOST:
            raise ValueError(f"{name} must be from {least} to {MOST:,}; got {count}")
    if not 1 <= itemsize <= 16:
        raise ValueError(f"itemsize must be from 1 to 16 bytes; got {itemsize}")
    for name, value, unit in (("step_time", step_time, "seconds"), ("link", link / 1e9, "GB per second")):
        if not SMALLEST <= value <= LARGEST:
            raise ValueError(f"{name} must be from {SMALLEST:g} to {LARGEST:g} {unit}; got {value:g}")
    if not SMALLEST <= budget <= 1:
        raise ValueError(f"budget must be over 0 and at most 100 percent; got {100 * budget:g}")
    if probe_time is not None and not 0 <= probe_time <= LARGEST:
        raise ValueError(f"probe_time must be from 0 to {LARGEST:g} seconds; got {probe_time:g}")


def make_plan(
    rates: Rates,
    *,
    layers: int,
    d: int,
    probe: int,
    ranks: int,
    stride: int,
    step_time: float,
    itemsize: int = 2,
    link: float = 25e9,
    budget: float = 0.01,
    probe_time: float | None = None,
) -> Plan:
    """Estimate every way and choose.

    Parameters
    ----------
    rates : Rates
        Of the processor that evaluates.
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

    Raises
    ------
    ValueError
        As `check_plan`.
    """
    check_plan(
        layers=layers,
        d=d,
        probe=probe,
        ranks=ranks,
        stride=stride,
        step_time=step_time,
        itemsize=itemsize,
        link=link,
        budget=budget,
        probe_time=probe_time,
    )
    whole = work(probe, d, itemsize=itemsize)
    one = estimate(whole, rates)
    activations = probe * d * itemsize
    ways = [
        Way("one rank", layers * one.seconds, 0.0, 0, whole.memory + activations, whole, one),
    ]
    if ranks > 1:
        mine = math.ceil(layers / ranks)
        sending = mine * RESULT_BYTES / link
        ways.append(
            Way(
                "layers over ranks",
                mine * one.seconds + sending,
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
                layers * (parts.seconds - parts.solve) + mine * parts.solve + sent / link,
                sent / link,
                sent,
                part.memory + rows * d * itemsize + FLOAT64 * (d + d * d),
                part,
                parts,
            )
        )
    best = min(ways, key=lambda way: way.seconds)
    cost = best.seconds + (probe_time or 0.0)
    other = work(probe, d, itemsize=itemsize, side="covariance" if whole.side == "gram" else "gram")
    return Plan(
        ways=tuple(ways),
        best=best,
        share=cost / (stride * step_time),
        stride=max(1, math.ceil(cost / (budget * step_time))),
        other_side=estimate(other, rates).seconds,
        probe_time=probe_time,
    )


def describe(plan: Plan, *, layers: int, probe: int, d: int, stride: int, budget: float = 0.01) -> list[str]:
    """Lines for the screen."""
    lines = [f"{'way':<18} {'per probe':>10} {'computing':>10} {'sending':>10} {'sent':>10} {'memory':>10}"]
    for way in plan.ways:
        mark = "  <- fastest" if way is plan.best else ""
        lines.append(
            f"{way.name:<18} {_time(way.seconds):>10} {_time(way.seconds - way.sending):>10} "
            f"{_time(way.sending):>10} {_size(way.sent):>10} {_size(way.memory):>10}{mark}"
        )
    best, one = plan.best, plan.best.estimate
    alone = ", the forward pass left out" if plan.probe_time is None else ""
    lines += [
        "",
        f"one layer      {best.work.m:,} x {best.work.m:,} {best.work.side}: {best.work.flops / 1e9:.3g} + "
        f"{best.work.solve_flops / 1e9:.3g} GFLOP, {_size(best.work.bytes)} moved, "
        f"{best.work.launches} products",
        f"               convert {_time(one.convert)}, products {_time(one.product)}, "
        f"eigenvalues {_time(one.solve)}, calls {_time(one.call)}",
        f"other matrix   {_time(plan.other_side)} a layer",
        "forward pass   "
        + (
            "not in these numbers: nobody said how long the probe's takes; measure it and give --probe-time"
            if plan.probe_time is None
            else f"{_time(plan.probe_time)} for the probe, as given; in share and stride"
        ),
        f"share          {plan.share:.2%} of the training time at stride {stride:,}{alone}",
        f"choose         {best.name}; stride {plan.stride:,} or more keeps it within {100 * budget:g} %{alone}",
    ]
    if probe <= d:
        ceiling = math.log(probe - 1) / math.log(d)
        lines.append(
            f"ceiling        {probe:,} rows in {d:,} features: H cannot exceed {ceiling:.3f}; its changes still show"
        )
    if any(way.estimate.extrapolated for way in plan.ways):
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
