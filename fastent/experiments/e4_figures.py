"""Figures of E4 and E5: norm against entropy, remaining steps against the gap: the paper's Figure 4, (a) and (b)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from fastent.experiments.delay_figures import THOUSANDS
from fastent.experiments.figures import WIDTH
from fastent.experiments.remaining import Predictor
from fastent.experiments.style import LIGHT
from fastent.train.quantities import MeasuredRun


def norm_against_entropy(runs: Sequence[MeasuredRun]) -> Figure:
    """Every run's way through the plane of norm and H; filled once it has grokked, open before."""
    figure = Figure(figsize=(WIDTH, 5.2), layout="constrained")
    axes = figure.subplots()
    for run in runs:
        t = run.trajectory
        axes.plot(t.parameter_norm, t.entropy, color=LIGHT.faint, linewidth=0.8, zorder=1)
        grokked = t.test_accuracy >= run.levels.criterion
        rising = ~grokked & (t.test_accuracy >= 0.5)
        early = ~grokked & ~rising
        axes.plot(
            t.parameter_norm[early], t.entropy[early], "o", color=LIGHT.train, markersize=3, fillstyle="none"
        )
        axes.plot(
            t.parameter_norm[rising], t.entropy[rising], "v", color=LIGHT.signal, markersize=5, zorder=3
        )
        axes.plot(
            t.parameter_norm[grokked], t.entropy[grokked], "o", color=LIGHT.test, markersize=3.5, zorder=2
        )
    for marker, colour, style, label in (
        ("o", LIGHT.train, "none", "test accuracy below 0.5"),
        ("v", LIGHT.signal, "full", "0.5 up to the criterion"),
        ("o", LIGHT.test, "full", "grokked"),
    ):
        axes.plot([], [], marker, color=colour, fillstyle=style, label=label)
    axes.set(xlabel="Euclidean norm of all parameters (no unit)", ylabel="H (normalised, no unit)")
    axes.legend(loc="best")
    return figure


def explained(table: Sequence[Predictor]) -> Figure:
    """R2 of every predictor, in sample with its interval, and on runs left out."""
    figure = Figure(figsize=(WIDTH, 1.0 + 0.55 * len(table)), layout="constrained")
    axes = figure.subplots()
    for row, predictor in enumerate(table):
        value = predictor.in_sample
        axes.plot(value.value, row - 0.12, "D", color=LIGHT.entropy, markersize=6)
        if value.low is not None and value.high is not None:
            axes.plot([value.low, value.high], [row - 0.12, row - 0.12], color=LIGHT.entropy, linewidth=1.5)
        axes.plot(
            max(predictor.left_out, -1.0), row + 0.16, "o", color=LIGHT.test, markersize=6, fillstyle="none"
        )
    axes.plot([], [], "D", color=LIGHT.entropy, label="in sample, as in the paper")
    axes.plot([], [], "o", color=LIGHT.test, fillstyle="none", label="runs left out (at −1: worse)")
    axes.axvline(0, color=LIGHT.ink, linewidth=1)
    axes.set_yticks(range(len(table)), [predictor.name for predictor in table])
    axes.set_ylim(len(table) - 0.5, -0.5)
    axes.set_xlim(-1.05, 1.02)
    axes.set_xlabel("R² of the steps that remain")
    figure.legend(handles=axes.get_legend_handles_labels()[0], loc="outside upper right", ncols=2)
    return figure


def remaining_against_gap(
    gap: Sequence[np.ndarray], remaining: Sequence[np.ndarray], curve: tuple[np.ndarray, np.ndarray]
) -> Figure:
    """Draw the steps that remain against H − H*, one line a run, with the fitted law."""
    figure = Figure(figsize=(WIDTH, 5.0), layout="constrained")
    axes = figure.subplots()
    for x, y in zip(gap, remaining, strict=True):
        axes.plot(x, y, "o-", color=LIGHT.entropy, markersize=3, linewidth=0.6, alpha=0.6)
    axes.plot([], [], "o-", color=LIGHT.entropy, markersize=3, linewidth=0.6, label="runs")
    axes.plot(*curve, color=LIGHT.ink, linewidth=2.2, label="fitted law")
    axes.set(xlabel="H − H* (no unit)", ylabel="steps until T_grok", ylim=(0, None), xlim=(0, None))
    axes.yaxis.set_major_formatter(THOUSANDS)
    axes.legend(loc="best")
    return figure
