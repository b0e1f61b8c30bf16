"""Figures of the report, in the manner of the paper's Figure 1, and the one of the README.

Thin lines are runs, thick lines their mean over the evaluations that all runs share; every axis has its unit,
series differ in dash or place as well as in colour. A figure comes as SVG text with its letters as outlines,
so it needs no font, and the same data give the same bytes. Nothing is smoothed.

``python -m fastent.experiments.figures RUNS PICTURE`` draws the README's picture from the E1 runs in a
folder.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import fields
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from fastent.experiments.leads import Leads, Sweep
from fastent.experiments.stored import read_runs
from fastent.experiments.style import DARK, LIGHT, Theme
from fastent.train.quantities import TAU, MeasuredRun, Trajectory

Array = NDArray[np.float64]

WIDTH = 10.0  # inches; the page shows it at up to 1,090 px

CROSS: dict[str, Any] = {"marker": "v", "linestyle": "none", "markersize": 6.5, "zorder": 4}
FALL: dict[str, Any] = {
    **CROSS,
    "marker": "D",
    "markersize": 5.5,
    "fillstyle": "none",
    "markeredgewidth": 1.5,
}
GROK: dict[str, Any] = {**CROSS, "marker": "o", "markersize": 6}


_left_out: ContextVar[bool] = ContextVar("figures left out", default=False)


@contextlib.contextmanager
def left_out() -> Iterator[None]:
    """Let `both` draw nothing and return empty pictures: for those who read the words alone."""
    token = _left_out.set(True)
    try:
        yield
    finally:
        _left_out.reset(token)


def both(draw: Callable[[], Figure]) -> tuple[str, str]:
    """Return the figure that `draw` makes as SVG text for light and for dark screens; same data, same text."""
    if _left_out.get():
        return "", ""
    with mpl.rc_context({"svg.fonttype": "path"}):
        file = io.StringIO()
        _drawn(draw).savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    # What precedes the element names a document type on the network; no reader needs it.
    light = _numbered(file.getvalue())
    light = light[light.index("<svg") :]
    dark = {getattr(LIGHT, f.name): getattr(DARK, f.name) for f in fields(Theme)}
    return light, re.sub("#[0-9a-f]{6}", lambda match: dark.get(match[0], match[0]), light)


def _numbered(svg: str) -> str:
    """Name the elements of `svg` in the order they appear: matplotlib hashes their last bits, which can waver."""
    names: dict[str, str] = {}
    return re.sub(r"\b[mp][0-9a-f]{10}\b", lambda match: names.setdefault(match[0], f"e{len(names)}"), svg)


def save_png(draw: Callable[[], Figure], path: Path, *, dpi: int = 150) -> None:
    """Write the figure that `draw` makes to `path`, in the colours for light screens."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _drawn(draw).savefig(path, format="png", dpi=dpi, metadata={"Software": None})


def _drawn(draw: Callable[[], Figure]) -> Figure:
    look: dict[Any, Any] = {
        **dict.fromkeys(
            ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), LIGHT.ink
        ),
        **dict.fromkeys(("figure.facecolor", "savefig.facecolor", "axes.facecolor"), LIGHT.paper),
        "grid.color": LIGHT.faint,
        "grid.linewidth": 0.5,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.titlesize": 11,
        "axes.titlelocation": "left",
        "axes.titleweight": "bold",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "font.family": "DejaVu Sans",
        "font.size": 10,
    }
    with mpl.rc_context(look):
        figure = draw()
        FigureCanvasAgg(figure)
        return figure


def training_dynamics(
    runs: Sequence[MeasuredRun], crossing: Leads, fall: Leads, h_star: float | None
) -> Figure:
    """Accuracies, entropy and parameter norm against the step: the paper's Figure 1.

    `crossing` and `fall` give T_cross, whose thresholds are drawn as a band, and T_collapse; `h_star` is the
    mean over the seeds, None draws no line.
    """
    figure = Figure(figsize=(WIDTH, 8.4), layout="constrained")
    a, b, c = figure.subplots(3, 1, sharex=True, height_ratios=(1.1, 1.35, 0.85))
    _lines(a, runs, "train_accuracy", colour=LIGHT.train, dash=(0, (5, 2)), label="train")
    _lines(a, runs, "test_accuracy", colour=LIGHT.test, dash="solid", label="test")
    a.set(title="A  Accuracy", ylabel="accuracy (share)", ylim=(-0.03, 1.05))

    _lines(b, runs, "entropy", colour=LIGHT.entropy, dash="solid", label="H")
    known = [h for h in crossing.thresholds if h is not None]
    if known:
        label = f"H* of {crossing.rule}"
        b.axhspan(min(known), max(known), color=LIGHT.signal, alpha=0.22, linewidth=0, label=label)
    if h_star is not None:
        b.axhline(h_star, color=LIGHT.signal, linewidth=1.2, linestyle=(0, (2, 2)), label="H*, mean")
    b.set(title="B  Spectral entropy", ylabel="H (normalised, no unit)")

    _lines(c, runs, "parameter_norm", colour=LIGHT.norm, dash="solid", label="norm")
    c.set(title="C  Parameter norm", ylabel="Euclidean norm (no unit)", xlabel="training step")
    c.set_ylim(bottom=0)
    columns = {a: "test_accuracy", b: "entropy", c: "parameter_norm"}
    for axes, name in columns.items():
        _marks(axes, runs, name, crossing, fall)
    for axes in (a, b):
        axes.legend(
            loc="lower right", bbox_to_anchor=(1.0, 0.98), ncols=7, borderaxespad=0, columnspacing=1.3
        )
    c.set_xlim(0, max(int(run.trajectory.step[-1]) for run in runs))
    c.xaxis.set_major_formatter(_thousands)
    return figure


def around_grokking(runs: Sequence[MeasuredRun], crossing: Leads, fall: Leads, *, reach: int) -> Figure:
    """Test accuracy and entropy against the step counted from each run's own T_grok, `reach` either way."""
    figure = Figure(figsize=(WIDTH, 5.4), layout="constrained")
    a, b = figure.subplots(2, 1, sharex=True)
    for axes, name, colour in ((a, "test_accuracy", LIGHT.test), (b, "entropy", LIGHT.entropy)):
        for run, crossed, fell in zip(runs, crossing.times, fall.times, strict=True):
            if run.summary.t_grok is None:
                continue
            x = run.trajectory.step - run.summary.t_grok
            y = _column(run.trajectory, name)
            near = np.abs(x) <= reach
            axes.plot(x[near], y[near], color=colour, linewidth=1.2, alpha=0.8)
            for at, marker in ((crossed, CROSS), (fell, FALL)):
                if at is not None and abs(at - run.summary.t_grok) <= reach:
                    here = run.trajectory.step == at
                    axes.plot(x[here], y[here], color=LIGHT.signal, **marker)
        axes.axvline(0, color=LIGHT.ink, linewidth=1)
    b.plot([], [], color=LIGHT.signal, label="T_collapse", **FALL)
    b.plot([], [], color=LIGHT.signal, label=f"T_cross, H* of {crossing.rule}", **CROSS)
    b.legend(loc="lower left")
    a.set(title="A  Test accuracy", ylabel="accuracy (share)", ylim=(-0.03, 1.05))
    b.set(title="B  Spectral entropy", ylabel="H (normalised, no unit)", xlabel="training steps after T_grok")
    b.xaxis.set_major_formatter(_thousands)
    return figure


def per_seed(runs: Sequence[MeasuredRun], crossing: Leads, fall: Leads) -> Figure:
    """One panel a run: accuracies and entropy on one scale; the span from the fall of H to T_grok is shaded."""
    columns = min(len(runs), 3)
    rows = -(-len(runs) // columns)
    figure = Figure(figsize=(WIDTH, 0.8 + 2.8 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, run, threshold, fell in zip(grid, runs, crossing.thresholds, fall.times, strict=False):
        step, t_grok = run.trajectory.step, run.summary.t_grok
        axes.plot(
            step, run.trajectory.train_accuracy, color=LIGHT.train, linestyle=(0, (5, 2)), linewidth=1.3
        )
        axes.plot(step, run.trajectory.test_accuracy, color=LIGHT.test, linewidth=1.8)
        axes.plot(step, run.trajectory.entropy, color=LIGHT.entropy, linewidth=1.8)
        if threshold is not None:
            axes.axhline(threshold, color=LIGHT.signal, linestyle=(0, (2, 2)), linewidth=1.2)
        title = f"seed {run.seed}"
        if fell is not None and t_grok is not None:
            axes.axvspan(min(fell, t_grok), max(fell, t_grok), color=LIGHT.signal, alpha=0.18, linewidth=0)
            title += f", lead {_thousands(t_grok - fell, 0)} steps"
        axes.set(title=title, ylim=(-0.03, 1.05))
        axes.xaxis.set_major_formatter(_thousands)
        axes.xaxis.set_major_locator(MaxNLocator(4))
    for axes in grid[len(runs) :]:
        axes.set_visible(False)
    for axes in grid[max(0, len(runs) - columns) : len(runs)]:
        axes.set_xlabel("training step")
        axes.xaxis.set_tick_params(labelbottom=True)
    for axes in grid[::columns]:
        axes.set_ylabel("accuracy; H (no unit)")
    grid[0].set_xlim(0, max(int(r.trajectory.step[-1]) for r in runs))
    handles = [
        grid[0].plot([], [], color=LIGHT.train, linestyle=(0, (5, 2)), label="train accuracy")[0],
        grid[0].plot([], [], color=LIGHT.test, linewidth=1.8, label="test accuracy")[0],
        grid[0].plot([], [], color=LIGHT.entropy, linewidth=1.8, label="spectral entropy H")[0],
        grid[0].plot([], [], color=LIGHT.signal, linestyle=(0, (2, 2)), label=f"H* of {crossing.rule}")[0],
        grid[0].fill_between(
            [], [], color=LIGHT.signal, alpha=0.18, label=f"from a fall of H by {TAU:g} to T_grok"
        ),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=5, fontsize=9)
    return figure


def lead_dots(rules: Sequence[Leads]) -> Figure:
    """Every run's lead by every rule, with the mean and its interval."""
    figure = Figure(figsize=(WIDTH, 1.0 + 0.62 * len(rules)), layout="constrained")
    axes = figure.subplots()
    for row, rule in enumerate(rules):
        known = [x for x in rule.leads if x is not None]
        axes.plot(known, [row] * len(known), "o", color=LIGHT.signal, alpha=0.65, markeredgewidth=0)
        if rule.mean is not None:
            axes.plot(rule.mean.value, row, "D", color=LIGHT.ink, markersize=6, zorder=3)
            if rule.mean.low is not None and rule.mean.high is not None:
                axes.plot([rule.mean.low, rule.mean.high], [row, row], color=LIGHT.ink, linewidth=1.5)
    axes.axvline(0, color=LIGHT.ink, linewidth=1)
    axes.set_yticks(range(len(rules)), [rule.source for rule in rules])
    axes.set_ylim(len(rules) - 0.5, -0.5)
    axes.set_xlabel("lead: T_grok minus the step of the signal (training steps)")
    axes.xaxis.set_major_formatter(_thousands)
    return figure


def threshold_sweep(result: Sweep, runs: Sequence[MeasuredRun]) -> Figure:
    """Share of runs preceded, lead, and false and early alarms, against the threshold."""
    figure = Figure(figsize=(WIDTH, 7.2), layout="constrained")
    a, b, c = figure.subplots(3, 1, sharex=True)
    h = result.thresholds
    a.plot(h, result.preceding, color=LIGHT.test, linewidth=1.8)
    a.set(title="A  Runs in which H fell below the threshold before grokking", ylabel="share of grokked runs")
    b.fill_between(h, result.lead_low, result.lead_high, color=LIGHT.entropy, alpha=0.25, linewidth=0)
    b.plot(h, result.lead, color=LIGHT.entropy, linewidth=1.8)
    b.axhline(0, color=LIGHT.ink, linewidth=1)
    b.set(title="B  Lead: mean, smallest and largest of the runs", ylabel="training steps")
    b.yaxis.set_major_formatter(_thousands)
    label = f"no grokking within {result.horizon:,} steps"
    c.plot(h, result.false, color=LIGHT.signal, linewidth=1.8, label=label)
    c.plot(
        h,
        result.early,
        color=LIGHT.train,
        linestyle=(0, (5, 2)),
        linewidth=1.5,
        label="before it has memorised",
    )
    c.set(title="C  Alarms that are false or too early", ylabel="share", xlabel="threshold on H (no unit)")
    c.legend(loc="lower right", bbox_to_anchor=(1.0, 0.98), ncols=2, borderaxespad=0)
    for axes in (a, c):
        axes.set_ylim(-0.04, 1.04)
    useful = result.useful()
    for axes in (a, b, c):
        if useful is not None:
            axes.axvspan(*useful, color=LIGHT.norm, alpha=0.18, linewidth=0)
        for run in runs:
            if run.summary.h_star is not None:
                axes.axvline(run.summary.h_star, color=LIGHT.ink, linewidth=0.8, linestyle=(0, (1, 2)))
    return figure


def _thousands(value: float, _: float) -> str:
    return f"{value:,.0f}".replace("-", "−")


def _column(trajectory: Trajectory, name: str) -> Array:
    return np.asarray(getattr(trajectory, name), dtype=np.float64)


def _lines(axes: Axes, runs: Sequence[MeasuredRun], name: str, *, colour: str, dash: Any, label: str) -> None:
    for run in runs:
        y = _column(run.trajectory, name)
        axes.plot(run.trajectory.step, y, color=colour, linewidth=0.8, alpha=0.55, linestyle=dash)
    step, mean = mean_over_runs(runs, name)
    axes.plot(step, mean, color=colour, linewidth=2.2, linestyle=dash, label=label)


def mean_over_runs(runs: Sequence[MeasuredRun], name: str) -> tuple[NDArray[np.int64], Array]:
    """Return the steps that every run evaluated, and the mean of `name` there; NaN where a run has none."""
    shared = functools.reduce(np.intersect1d, [run.trajectory.step for run in runs])
    values = [_column(run.trajectory, name)[np.isin(run.trajectory.step, shared)] for run in runs]
    return shared, np.mean(values, axis=0)


def _marks(axes: Axes, runs: Sequence[MeasuredRun], name: str, crossing: Leads, fall: Leads) -> None:
    for run, crossed, fell in zip(runs, crossing.times, fall.times, strict=True):
        y = _column(run.trajectory, name)
        for at, marker, colour in (
            (fell, FALL, LIGHT.signal),
            (crossed, CROSS, LIGHT.signal),
            (run.summary.t_grok, GROK, LIGHT.ink),
        ):
            here = run.trajectory.step == at
            axes.plot(run.trajectory.step[here], y[here], color=colour, **marker)
    axes.plot([], [], color=LIGHT.signal, label="T_collapse", **FALL)
    axes.plot([], [], color=LIGHT.signal, label="T_cross", **CROSS)
    axes.plot([], [], color=LIGHT.ink, label="T_grok", **GROK)


def main() -> None:
    """Draw the README's picture: one panel for each complete E1 run of a folder of runs."""
    from fastent.experiments import e1_baseline

    parser = argparse.ArgumentParser(prog="python -m fastent.experiments.figures", description=main.__doc__)
    parser.add_argument("runs", type=Path, help="folder of runs, the --out of `fastent run e1`")
    parser.add_argument("picture", type=Path, help="PNG file to write")
    given = parser.parse_args()
    runs = [run.measure() for run in read_runs(given.runs) if run.experiment == "e1" and run.done is not None]
    if not runs:
        parser.error(f"{given.runs} holds no complete run of E1")
    result = e1_baseline.analyse(runs, comparable=False)
    save_png(functools.partial(per_seed, result.runs, result.left_out, result.signal), given.picture)


if __name__ == "__main__":
    main()
