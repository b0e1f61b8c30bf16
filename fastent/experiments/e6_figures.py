"""Figures of E6: trajectories of each task (the paper's Figure 5), and what of S5 its representations hold."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fastent.experiments.columns import column
from fastent.experiments.e6_compared import Task, chance_shares, title
from fastent.experiments.e6_tasks import Tasks
from fastent.experiments.figures import CROSS, FALL, GROK, WIDTH
from fastent.experiments.style import LIGHT

DASHED: Any = (0, (5, 2))
DOTTED: Any = (0, (1, 2))


def trajectories(result: Tasks) -> Figure:
    """Test accuracy and H of every run, one column a task."""
    tasks = list(result.tasks.values())
    figure = Figure(figsize=(WIDTH, 5.6), layout="constrained")
    grid = figure.subplots(2, len(tasks), sharex="col", sharey="row", squeeze=False)
    for place, task in enumerate(tasks):
        a, b = grid[:, place]
        signals = zip(task.group.measured, task.left_out.times, task.fall.times, strict=True)
        for run, crossed, fell in signals:
            step = run.trajectory.step
            a.plot(step, run.trajectory.train_accuracy, color=LIGHT.train, linestyle=DASHED, linewidth=0.9)
            a.plot(step, run.trajectory.test_accuracy, color=LIGHT.test, linewidth=1.1)
            b.plot(step, run.trajectory.entropy, color=LIGHT.entropy, linewidth=1.1)
            marks = (
                (fell, FALL, LIGHT.signal),
                (crossed, CROSS, LIGHT.signal),
                (run.summary.t_grok, GROK, LIGHT.ink),
            )
            for at, marker, colour in marks:
                here = step == at
                b.plot(step[here], run.trajectory.entropy[here], color=colour, **marker)
        if task.h_star is not None:
            b.axhline(task.h_star.value, color=LIGHT.signal, linewidth=1.2, linestyle=DOTTED)
        a.set(title=title(task).capitalize() if task.name != "s5" else "S5", ylim=(-0.03, 1.05))
        b.set_xlabel("training step")
        b.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        b.xaxis.set_major_locator(MaxNLocator(3))
    first, second = grid[0, 0], grid[1, 0]
    first.set_ylabel("accuracy (share)")
    second.set_ylabel("H (normalised, no unit)")
    handles = [
        first.plot([], [], color=LIGHT.train, linestyle=DASHED, label="train accuracy")[0],
        first.plot([], [], color=LIGHT.test, label="test accuracy")[0],
        second.plot([], [], color=LIGHT.entropy, label="H")[0],
        second.plot([], [], color=LIGHT.signal, linestyle=DOTTED, label="H*, mean")[0],
        second.plot([], [], color=LIGHT.signal, label="T_collapse", **FALL)[0],
        second.plot([], [], color=LIGHT.signal, label="T_cross", **CROSS)[0],
        second.plot([], [], color=LIGHT.ink, label="T_grok", **GROK)[0],
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=7, fontsize=9)
    return figure


def isotypic(task: Task) -> Figure:
    """Share of each irreducible representation in the label means along the runs of S5, one panel each."""
    chance = chance_shares()
    figure = Figure(figsize=(WIDTH, 5.0), layout="constrained")
    panels = figure.subplots(2, 3, sharex=True, sharey=True)
    for axes, (name, share) in zip(panels.ravel(), chance.items(), strict=True):
        for stored, run in zip(task.group.stored, task.group.measured, strict=True):
            values = column(stored, f"isotypic_{name}")
            if values is None:
                continue
            axes.plot(run.trajectory.step, values, color=LIGHT.norm, linewidth=1.1)
            here = run.trajectory.step == run.summary.t_grok
            axes.plot(run.trajectory.step[here], values[here], color=LIGHT.ink, **GROK)
        axes.axhline(share, color=LIGHT.train, linestyle=DOTTED, linewidth=1.2)
        axes.set(title=f"({', '.join(name)}), dimension {round(np.sqrt(119 * share))}", ylim=(-0.03, 1.03))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.xaxis.set_major_locator(MaxNLocator(4))
    for axes in panels[:, 0]:
        axes.set_ylabel("share of variance")
    for axes in panels[-1]:
        axes.set_xlabel("training step")
    return figure
