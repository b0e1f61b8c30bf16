"""Figures of E8: the two probes along the runs and at grokking (the paper's Figure 10), and H against the size."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastent.experiments.e8_probes import Probe, Probes
from fastent.experiments.figures import WIDTH
from fastent.experiments.style import LIGHT

DASHED = (0, (5, 2))


def two_probes(result: Probes) -> Figure:
    """H of both probes along the runs, and of one against the other at T_grok."""
    figure = Figure(figsize=(WIDTH, 4.4), layout="constrained")
    a, b = figure.subplots(1, 2, width_ratios=(1.7, 1))
    kinds = ((result.runs, LIGHT.entropy, "solid", "training"), (result.tested, LIGHT.test, DASHED, "test"))
    for runs, colour, dash, name in kinds:
        for run in runs:
            a.plot(run.trajectory.step, run.trajectory.entropy, color=colour, linestyle=dash, linewidth=1)
        a.plot([], [], color=colour, linestyle=dash, label=f"{name} probe")
    grokked = [run.summary.t_grok for run in result.runs if run.summary.t_grok is not None]
    for step in grokked:
        a.axvline(step, color=LIGHT.ink, linewidth=0.8, linestyle=(0, (1, 2)))
    a.set(title="A  Along the runs", xlabel="training step", ylabel="H (normalised, no unit)")
    a.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    a.legend(loc="upper right")
    if result.grokked:
        x, y = np.array(result.grokked).T
        low, high = min(x.min(), y.min()) - 0.005, max(x.max(), y.max()) + 0.005
        b.plot([low, high], [low, high], color=LIGHT.ink, linewidth=1)
        b.plot(x, y, "o", color=LIGHT.signal, alpha=0.75, markeredgewidth=0)
        b.set(xlim=(low, high), ylim=(low, high), aspect="equal")
    b.set(title="B  At T_grok", xlabel="H, training probe (no unit)", ylabel="H, test probe (no unit)")
    return figure


def sizes(result: Probes) -> Figure:
    """Deficit of H, its spread over the runs, and the entropy of each size along the first run."""
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    a, b = figure.subplots(1, 2)
    sampled = [p for p in result.sized if p.name not in ("entropy_train", "entropy_all")]
    (population,) = (p.n for p in result.sized if p.name == "entropy_train")
    n = np.array([p.n for p in sampled])
    a.plot(n, [_value(p) for p in sampled], "o", color=LIGHT.entropy, label="as read")
    half = [(p.n, p.corrected.value) for p in sampled if p.corrected is not None]
    if half:
        a.plot(*zip(*half, strict=True), "D", color=LIGHT.norm, fillstyle="none", label="corrected")
    a.plot(
        n, _law(sampled, n, population), color=LIGHT.ink, linewidth=1, label="b (1/N − 1/n), from the largest"
    )
    a.axhline(0, color=LIGHT.ink, linewidth=0.8)
    a.set(title="A  What H lacks at T_grok", ylabel="H of all training pairs − H of N (no unit)")
    a.legend(loc="upper right")
    spread = np.array([np.nan if p.spread is None else p.spread for p in sampled])
    b.plot(n, spread, "o", color=LIGHT.signal, label="over the runs")
    if (spread > 0).all():
        root = np.sqrt(1 / n - 1 / population)
        at = int(np.argmin(np.abs(np.log(n / 512))))
        b.plot(n, spread[at] * root / root[at], color=LIGHT.ink, linewidth=1, label="√(1/N − 1/n)")
        b.set_yscale("log")
        b.legend(loc="upper right")
    b.set(title="B  Its spread", ylabel="standard deviation (no unit)")
    for axes in (a, b):
        _sizes_axis(axes, n)
    return figure


def _value(probe: Probe) -> float:
    return float("nan") if probe.deficit is None else probe.deficit.value


def _law(sampled: list[Probe], n: np.ndarray, population: int) -> np.ndarray:
    largest = sampled[-1]
    return _value(largest) * (1 / n - 1 / population) / (1 / largest.n - 1 / population)


def _sizes_axis(axes: Axes, n: np.ndarray) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(n, [f"{value:,}" for value in n])
    axes.minorticks_off()
    axes.set_xlabel("pairs in the probe, N (number)")
