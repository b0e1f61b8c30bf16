"""The look of the figures: palette, marks, drawing for light and dark screens, and saving.

Series colours are those of Okabe and Ito, which readers with colour-blindness tell apart, lightened for dark screens;
no figure tells series apart by colour alone. Thin lines are runs, thick lines their mean over the evaluations that all
runs share; every axis has its unit. A figure comes as SVG text with its letters as outlines, so it needs no font, and
the same data give the same bytes. Nothing is smoothed.
"""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fastent.grokking.experiments import document
from fastent.grokking.experiments.data import Runs
from fastent.grokking.experiments.statistics import Array


@dataclass(frozen=True)
class Theme:
    """Colours of a figure, as hexadecimal RGB."""

    paper: str
    ink: str
    faint: str
    train: str
    test: str
    entropy: str
    norm: str
    signal: str


LIGHT = Theme("#ffffff", "#1c2430", "#c9d0d9", "#7a8594", "#0072b2", "#d55e00", "#009e73", "#a3477f")
DARK = Theme("#12161c", "#e3e8ef", "#3a4452", "#9aa5b4", "#56b4e9", "#f08a3c", "#2fc79a", "#e08fc0")


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

DASHED: Any = (0, (5, 2))
DOTTED: Any = (0, (1, 2))


def both(draw: Callable[[], Figure]) -> tuple[str, str]:
    """Return the figure that `draw` makes as SVG text for light and for dark screens; same data, same text."""
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


def drawn(name: str, draw: Callable[[], Figure], caption: str, alt: str) -> document.Figure:
    """Make a figure of the report, for light and for dark screens."""
    return document.Figure(name, caption, alt, functools.partial(both, draw))


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


def thousands(value: float, _: float) -> str:
    """Write a number of steps as an axis shows it: "1,020"."""
    return f"{value:,.0f}".replace("-", "−")


def mark(
    axes: Axes, step: Array, y: Array, at: float, marker: dict[str, Any], colour: str = LIGHT.signal
) -> None:
    """Mark a curve at a step that was evaluated."""
    here = step == at
    axes.plot(step[here], y[here], color=colour, **marker)


def lines(
    axes: Axes, runs: Runs, name: str, label: str = "", *, thin: float = 0.8, alpha: float = 0.55, **look: Any
) -> None:
    """Draw an array of each run as a thin line, and with a label their mean as a thick one."""
    for step, y in runs.lines(getattr(runs, name)):
        axes.plot(step, y, linewidth=thin, alpha=alpha, **look)
    if label:
        axes.plot(*mean_over_runs(runs, name), linewidth=2.2, label=label, **look)


def mean_over_runs(runs: Runs, name: str) -> tuple[Array, Array]:
    """Return the steps that every run evaluated, and the mean of an array there; NaN where a run has none."""
    rows = list(runs.lines(getattr(runs, name)))
    shared = functools.reduce(np.intersect1d, [step for step, _ in rows])
    return shared, np.mean([values[np.isin(step, shared)] for step, values in rows], axis=0)
