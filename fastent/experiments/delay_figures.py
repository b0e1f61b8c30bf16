"""Figures of E2 and E3: when each condition groks, and accuracy and entropy on the way, as in the paper's Figure 3.

The paper's description of its Figure 3 survives in part, that of Figure 2 not at all; these are in their manner.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray

from fastent.experiments.delays import Delay, Group, mean_time, words
from fastent.experiments.entropy_shift import AtLoss
from fastent.experiments.figures import WIDTH, mean_over_runs
from fastent.experiments.style import LIGHT
from fastent.train.quantities import MeasuredRun

THOUSANDS = FuncFormatter(lambda value, _: f"{value:,.0f}".replace("-", "−"))

LOOKS: tuple[tuple[str, Any], ...] = (
    (LIGHT.train, (0, (5, 2))),
    (LIGHT.test, "solid"),
    (LIGHT.entropy, "solid"),
    (LIGHT.norm, (0, (6, 1.5, 1, 1.5))),
    (LIGHT.signal, (0, (1, 1.2))),
)
"""Colour and dash of the baseline and of up to four conditions."""


def grokking_times(baseline: Group, delays: Sequence[Delay]) -> Figure:
    """T_grok of every run by condition, with the mean restricted to the limit of steps and its interval."""
    rows = [baseline, *(delay.group for delay in delays)]
    figure = Figure(figsize=(WIDTH, 1.1 + 0.55 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for row, group in enumerate(rows):
        times = group.times
        for value, seen in zip(times.values, times.observed, strict=True):
            axes.plot(value, row, "o" if seen else ">", color=LIGHT.signal, alpha=0.65, markeredgewidth=0)
    limit = min(delay.limit for delay in delays)
    for row, mean in enumerate([mean_time(baseline, limit), *(delay.mean for delay in delays)]):
        axes.plot(mean.value, row, "D", color=LIGHT.ink, markersize=6, zorder=3)
        if mean.low is not None and mean.high is not None:
            axes.plot([mean.low, mean.high], [row, row], color=LIGHT.ink, linewidth=1.5)
        if row == 0:
            axes.axvline(mean.value, color=LIGHT.ink, linewidth=1, linestyle=(0, (2, 2)))
    axes.set_yticks(range(len(rows)), [words(group.condition) for group in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, 1.03 * max(max(group.times.values) for group in rows))
    axes.set_xlabel("T_grok (training steps)")
    axes.xaxis.set_major_formatter(THOUSANDS)
    return figure


def trajectories(groups: Sequence[Group]) -> Figure:
    """Test accuracy, entropy and norm of up to five conditions: thin lines are runs, thick ones their mean."""
    figure = Figure(figsize=(WIDTH, 8.4), layout="constrained")
    a, b, c = figure.subplots(3, 1, sharex=True, height_ratios=(1, 1.3, 0.9))
    columns = {a: "test_accuracy", b: "entropy", c: "parameter_norm"}
    for axes, name in columns.items():
        for group, (colour, dash) in zip(groups, LOOKS, strict=False):
            _lines(axes, group.measured, name, colour, dash, words(group.condition))
    a.set(title="A  Test accuracy", ylabel="accuracy (share)", ylim=(-0.03, 1.05))
    b.set(title="B  Spectral entropy", ylabel="H (normalised, no unit)")
    c.set(title="C  Parameter norm", ylabel="Euclidean norm (no unit)", xlabel="training step")
    figure.legend(handles=a.get_legend_handles_labels()[0], loc="outside upper center", ncols=2, fontsize=9)
    c.set_xlim(left=0)
    c.xaxis.set_major_formatter(THOUSANDS)
    return figure


def _lines(axes: Axes, runs: Sequence[MeasuredRun], name: str, colour: str, dash: Any, label: str) -> None:
    for run in runs:
        axes.plot(
            run.trajectory.step,
            getattr(run.trajectory, name),
            color=colour,
            linewidth=0.7,
            alpha=0.4,
            linestyle=dash,
        )
    step, mean = mean_over_runs(runs, name)
    axes.plot(step, mean, color=colour, linewidth=2.2, linestyle=dash, label=label)


def at_equal_loss(rows: dict[str, Sequence[AtLoss]]) -> Figure:
    """Difference of H to the baseline at equal training loss, one line a condition, with intervals."""
    figure = Figure(figsize=(WIDTH, 3.8), layout="constrained")
    axes = figure.subplots()
    count = len(rows)
    for place, ((condition, levels), (colour, dash)) in enumerate(zip(rows.items(), LOOKS[1:], strict=False)):
        # Set side by side, so that intervals do not cover each other.
        shift = 1.04 ** (place - (count - 1) / 2)
        loss: NDArray[np.float64] = np.array([level.loss for level in levels]) * shift
        axes.plot(
            loss,
            [v.difference.value for v in levels],
            "o",
            color=colour,
            linestyle=dash,
            label=words(condition),
        )
        for x, level in zip(loss, levels, strict=True):
            if level.difference.low is not None and level.difference.high is not None:
                axes.plot([x, x], [level.difference.low, level.difference.high], color=colour, linewidth=1.5)
    axes.axhline(0, color=LIGHT.ink, linewidth=1)
    axes.set_xscale("log")
    axes.invert_xaxis()
    axes.set(xlabel="training loss (nats), falling", ylabel="H minus the baseline's (no unit)")
    axes.legend(loc="best")
    return figure
