"""The look of the figures: palette, marks, drawing for light and dark screens, and saving.

Series colours are those of Okabe and Ito, which readers with colour-blindness tell apart, lightened for dark screens;
no figure tells series apart by colour alone. Thin lines are runs, thick lines their mean over all of them, in which a
run that has ended counts with its last value: runs end some time after they grok, so a mean of those that still run
would be of the late ones. Legends stand above the axes, off the curves; every axis has its unit. A figure comes as SVG
text with its letters as outlines, so it needs no font, and the same data give the same bytes. Nothing is smoothed.
"""

from __future__ import annotations

import functools
import io
import re
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy import stats

from fastent.grokking.experiments import document
from fastent.grokking.experiments.data import Runs
from fastent.grokking.experiments.statistics import Array, mean_known


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
        "text.parse_math": False,  # a name may hold dollars
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
    """Return the steps that any run evaluated, and the mean of an array there; NaN where a run has none.

    A run that has ended counts with its last value.
    """
    rows = list(runs.lines(getattr(runs, name)))
    steps = functools.reduce(np.union1d, [step for step, _ in rows])
    held = [values[np.maximum(np.searchsorted(step, steps, "right") - 1, 0)] for step, values in rows]
    return steps, np.mean(held, axis=0)


def legend_above(axes: Axes, columns: int = 9) -> None:
    """Put the legend above the axes, to the right, beside the title."""
    axes.legend(
        loc="lower right", bbox_to_anchor=(1.0, 0.98), ncols=columns, borderaxespad=0, columnspacing=1.3
    )


def compared(name: str, groups: Mapping[str, Runs]) -> tuple[document.Figure, document.Figure]:
    """Make two figures of groups of runs, by their titles, each beside the first: when they grok, and H on the way.

    Groups without a run are left out; one at least has some.
    """
    groups = {title: runs for title, runs in groups.items() if len(runs)}
    first = next(iter(groups))
    grokked_by = functools.partial(_grokked_by, until=max(runs.end.max() for runs in groups.values()))
    return (
        drawn(
            f"{name}-grokked",
            functools.partial(panels, groups, grokked_by, ("training step", "share of runs grokked")),
            f"Share of the runs that have grokked, by step (Kaplan-Meier); grey: {first}. Upright bars: runs that "
            "ended without grokking; they count until then.",
            "Step curves of the share of runs that have grokked, one panel a condition.",
        ),
        drawn(
            f"{name}-accuracy",
            functools.partial(panels, groups, _entropy_at_accuracy, ("test accuracy (share)", "H (no unit)")),
            f"H against the test accuracy, from T_mem on, in tenths of the accuracy. Thin lines: runs; thick lines: "
            f"their mean; grey: {first}. Where a condition lies on the grey line, H goes with the test accuracy "
            "whatever was done.",
            "Entropy against test accuracy, one panel a condition.",
        ),
    )


def panels(
    groups: Mapping[str, Runs], draw: Callable[..., None], labels: tuple[str, str], columns: int = 4
) -> Figure:
    """Draw one panel for each of `groups` beside the first of them, in grey; the first alone if there is no other."""
    (title, first), *others = groups.items()
    shown = others or [(title, first)]
    columns = min(columns, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(WIDTH, 0.5 + 2.3 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes, (name, runs) in zip(grid.flat, shown, strict=False):
        if others:
            draw(axes, first, color=LIGHT.train, linestyle=DASHED)
        draw(axes, runs, color=LIGHT.test, linestyle="solid")
        axes.set_title(textwrap.fill(name, 112 // columns), fontsize=9, fontweight="normal")
    for axes in grid.flat[len(shown) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel(labels[1])
    for place, axes in enumerate(grid.flat[: len(shown)]):
        if place + columns >= len(shown):
            axes.set_xlabel(labels[0])
            axes.xaxis.set_tick_params(labelbottom=True)
    grid[0, 0].set_xlim(left=0)
    if grid[0, 0].get_xlim()[1] > 1.5:
        grid[0, 0].xaxis.set_major_formatter(thousands)
        grid[0, 0].xaxis.set_major_locator(MaxNLocator(3))
    return figure


def _grokked_by(axes: Axes, runs: Runs, until: float, **look: Any) -> None:
    step, share, cut = share_grokked(runs)
    # Nothing is known of the share beyond the last run that was cut.
    end = cut.max() if share[-1] < 1 else until
    axes.step(np.r_[step, end], np.r_[share, share[-1]], where="post", linewidth=1.8, **look)
    axes.plot(cut, share[np.searchsorted(step, cut, "right") - 1], "|", color=look["color"], ms=9, mew=1.5)
    axes.set_ylim(-0.03, 1.05)


def share_grokked(runs: Runs) -> tuple[Array, Array, Array]:
    """Return the Kaplan-Meier share of runs that have grokked: steps, the share from each on, and where runs were cut.

    References
    ----------
    Kaplan and Meier, "Nonparametric estimation from incomplete observations", JASA 53 (1958).
    """
    times = runs.times
    seen, cut = times.values[times.observed], times.values[~times.observed]
    curve = stats.ecdf(stats.CensoredData(uncensored=seen, right=cut)).cdf
    return np.r_[0.0, curve.quantiles], np.r_[0.0, curve.probabilities], cut


TENTHS = np.linspace(0, 1, 11)
THIN: dict[str, Any] = {"linewidth": 0.7, "alpha": 0.4}


def _entropy_at_accuracy(axes: Axes, runs: Runs, **look: Any) -> None:
    rows, middle = entropy_at_accuracy(runs), (TENTHS[1:] + TENTHS[:-1]) / 2
    mean = np.array([mean_known(column) for column in rows.T])
    for row in (*rows, mean):
        known = ~np.isnan(row)
        drawn_as: dict[str, Any] = {"linewidth": 2.2, "marker": "o", "ms": 4} if row is mean else THIN
        axes.plot(middle[known], row[known], **drawn_as, **look)
    axes.set_xlim(0, 1)
    axes.set_xticks((0, 0.5, 1), ("0", "0.5", "1"))


def entropy_at_accuracy(runs: Runs) -> Array:
    """Mean H of each run from T_mem on, by tenth of the test accuracy, (n, 10); NaN where it has no evaluation."""
    tenth = np.digitize(runs.test_accuracy, TENTHS[1:-1])
    used = ~np.isnan(runs.entropy + runs.test_accuracy) & (runs.step >= runs.t_mem[:, None])
    found = np.full((len(runs), TENTHS.size - 1), np.nan)
    for i, k in np.ndindex(found.shape):
        if (here := used[i] & (tenth[i] == k)).any():
            found[i, k] = runs.entropy[i, here].mean()
    return found
