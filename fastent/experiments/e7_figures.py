"""Figures of E7: MLPs beside the Transformer (the paper's Figure 9), their spectra, and every setting in small."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from fastent.experiments.columns import column
from fastent.experiments.e7_mlp import Sufficiency
from fastent.experiments.e7_models import Model
from fastent.experiments.figures import GROK, WIDTH
from fastent.experiments.style import LIGHT

Array = NDArray[np.float64]

DASHED: Any = (0, (5, 2))
DOTTED: Any = (0, (1, 2))


def side_by_side(result: Sufficiency) -> Figure:
    """Accuracy, H and alignment of the Transformer and of the plainest MLPs, one column a model."""
    models = (result.transformer, *result.plainest)
    figure, grid = _grid(models, 3, 7.8)
    for axes, model in zip(grid[0], models, strict=True):
        for run in model.group.measured:
            step = run.trajectory.step
            axes.plot(step, run.trajectory.train_accuracy, color=LIGHT.train, linestyle=DASHED, linewidth=0.9)
            axes.plot(step, run.trajectory.test_accuracy, color=LIGHT.test, linewidth=1.1)
        axes.set(title=model.label, ylim=(-0.03, 1.05))
    for axes, model in zip(grid[1], models, strict=True):
        for run in model.group.measured:
            axes.plot(run.trajectory.step, run.trajectory.entropy, color=LIGHT.entropy, linewidth=1.1)
            here = run.trajectory.step == run.summary.t_grok
            axes.plot(run.trajectory.step[here], run.trajectory.entropy[here], color=LIGHT.ink, **GROK)
        if result.h_star is not None:
            axes.axhline(result.h_star.value, color=LIGHT.signal, linewidth=1.2, linestyle=DOTTED)
    for axes, model in zip(grid[2], models, strict=True):
        _columns(axes, model, "alignment_null", LIGHT.train, DOTTED)
        _columns(axes, model, "alignment", LIGHT.norm, "solid")
        axes.set_ylim(0, 1.03)
    _named(grid[0][0], "accuracy (share)", {"train": (LIGHT.train, DASHED), "test": (LIGHT.test, "solid")})
    _named(
        grid[1][0],
        "H (normalised, no unit)",
        {"H": (LIGHT.entropy, "solid"), "H* of the Transformer": (LIGHT.signal, DOTTED)},
    )
    _named(
        grid[2][0],
        "alignment, max |r| (no unit)",
        {"training probe": (LIGHT.norm, "solid"), "labels permuted": (LIGHT.train, DOTTED)},
    )
    return figure


def spectra(result: Sufficiency) -> Figure:
    """Shares of variance by label and frequency, and the progress measures, one column a model."""
    models = (result.transformer, *result.plainest)
    figure, grid = _grid(models, 2, 5.6)
    for axes, model in zip(grid[0], models, strict=True):
        _columns(axes, model, "label_share", LIGHT.test, DASHED)
        _columns(axes, model, "top_share", LIGHT.norm, "solid")
        axes.set(title=model.label, ylim=(-0.03, 1.05))
    for axes, model in zip(grid[1], models, strict=True):
        _columns(axes, model, "test_loss", LIGHT.train, DOTTED)
        _columns(axes, model, "restricted_loss", LIGHT.test, "solid")
        _columns(axes, model, "excluded_loss", LIGHT.signal, DASHED)
        axes.set_yscale("log")
    _named(
        grid[0][0],
        "share (no unit)",
        {"between labels": (LIGHT.test, DASHED), "of it, five frequencies": (LIGHT.norm, "solid")},
    )
    _named(
        grid[1][0],
        "loss (nats)",
        {
            "restricted": (LIGHT.test, "solid"),
            "excluded": (LIGHT.signal, DASHED),
            "test": (LIGHT.train, DOTTED),
        },
    )
    return figure


def settings(result: Sufficiency) -> Figure:
    """Test accuracy and H of every run, one panel a setting, on one scale."""
    columns = min(3, len(result.mlps))
    rows = -(-len(result.mlps) // columns)
    figure = Figure(figsize=(WIDTH, 0.9 + 2.3 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    panels = grid.ravel()
    for axes, model in zip(panels, result.mlps, strict=False):
        for run in model.group.measured:
            axes.plot(run.trajectory.step, run.trajectory.test_accuracy, color=LIGHT.test, linewidth=1.1)
            axes.plot(
                run.trajectory.step,
                run.trajectory.entropy,
                color=LIGHT.entropy,
                linewidth=1.1,
                linestyle=DASHED,
            )
        if result.h_star is not None:
            axes.axhline(result.h_star.value, color=LIGHT.signal, linewidth=1.2, linestyle=DOTTED)
        axes.set(title=model.label, ylim=(-0.03, 1.05), xlabel="training step")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.xaxis.set_major_locator(_few())
    for axes in panels[len(result.mlps) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("accuracy; H (no unit)")
    series = {
        "test accuracy": (LIGHT.test, "solid"),
        "H": (LIGHT.entropy, DASHED),
        "H* of the Transformer": (LIGHT.signal, DOTTED),
    }
    handles = [panels[0].plot([], [], color=c, linestyle=d, label=name)[0] for name, (c, d) in series.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, fontsize=9)
    return figure


def _few() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(4)


def _grid(models: Sequence[Model], rows: int, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    grid = figure.subplots(rows, len(models), sharex="col", sharey="row", squeeze=False)
    for axes in grid[-1]:
        axes.set_xlabel("training step")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.xaxis.set_major_locator(_few())
    return figure, grid


def _columns(axes: Axes, model: Model, name: str, colour: str, dash: Any) -> None:
    for stored, run in zip(model.group.stored, model.group.measured, strict=True):
        values = column(stored, name)
        if values is not None:
            axes.plot(run.trajectory.step, values, color=colour, linestyle=dash, linewidth=1.1)


def _named(axes: Axes, label: str, series: dict[str, tuple[str, Any]]) -> None:
    axes.set_ylabel(label)
    for name, (colour, dash) in series.items():
        axes.plot([], [], color=colour, linestyle=dash, label=name)
    axes.legend(loc="best")
