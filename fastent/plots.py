"""Pictures of entropies with matplotlib: layers over steps as lines or as a heatmap, one run, a spectrum.

What is drawn are plain numbers: `fastent.plot_records` and the `plot` of a monitor, a history and a result bring them.
They are drawn on the axes given, else on a figure of their own that pyplot does not know, whose axes show themselves in
a notebook: no window opens and no backend is chosen. Style and fonts are those that matplotlib is set to. Layers have
the colours of viridis in their order: equal steps of it look equal, also in grey.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

try:
    import matplotlib as mpl
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize, to_rgb
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patheffects import Normal, Stroke
    from matplotlib.ticker import FuncFormatter
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"a picture needs {error.name}, which is not installed: pip install matplotlib", name=error.name
    ) from error

Array = np.ndarray[Any, np.dtype[np.float64]]
Mask = np.ndarray[Any, np.dtype[np.bool_]]

MOST_LINES = 6
"""Layers that are drawn as lines where nothing else is asked for; more are a heatmap."""
MOST_ENTRIES = 20
MOST_TICKS = 40
LONGEST_NAME = 24

ENTROPY = "normalised spectral entropy H"
DASHED: dict[str, Any] = {"linestyle": "--", "linewidth": 0.9}
DOTTED: dict[str, Any] = {"linestyle": ":"}
CROSSING: dict[str, Any] = {"marker": "v", "linestyle": "none", "markersize": 7}
COLLAPSE: dict[str, Any] = {
    "marker": "D",
    "linestyle": "none",
    "markersize": 6,
    "markeredgewidth": 1.5,
    "fillstyle": "none",
}
GROKKING: dict[str, Any] = {"marker": "o", "linestyle": "none", "markersize": 6}
UNUSABLE: dict[str, Any] = {"marker": "x", "linestyle": "none", "markersize": 5}


class Series(NamedTuple):
    """One layer over time. Arrays have shape (m,), an entry for each evaluation; steps increase.

    `usable` says which values count, `limited` which of those too few rows hold down, and `unusable` names the statuses
    of the others.
    """

    name: str
    step: Array
    value: Array
    usable: Mask
    limited: Mask
    unusable: tuple[str, ...] = ()
    threshold: float | None = None
    crossed_at: int | None = None
    collapsed_at: int | None = None

    def at(self, step: int | None) -> tuple[Array, Array]:
        """Return `step` and the value there, (1,) each; (0,) where there is none."""
        here = self.step == (np.nan if step is None else step)
        return self.step[here], self.value[here]


class Picture(Axes):
    """Axes of a figure of its own; a notebook shows it where they are the value of a cell."""

    figure: Figure

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.figure.savefig(file, format="png", bbox_inches="tight")
        return file.getvalue()


def plot_layers(series: Sequence[Series], kind: str | None, ax: Any) -> Axes:
    """Draw layers over steps: what is seen stands at `fastent.SpectralEntropyMonitor.plot`.

    Raises
    ------
    ValueError
        If `kind` is unknown, or there is no layer.
    TypeError
        If `ax` is not axes of matplotlib.
    """
    if kind not in (None, "lines", "heatmap"):
        raise ValueError(f"kind must be 'lines' or 'heatmap'; got {kind!r}")
    if not series:
        raise ValueError("there is no record to draw: plot once one has arrived, which flush() waits for")
    lines = kind == "lines" or (kind is None and len(series) <= MOST_LINES)
    entries = min(len(series), MOST_ENTRIES)
    axes = _axes(ax, max(4.0, 0.21 * (entries + 8)) if lines else min(2.0 + 0.22 * len(series), 12.0))
    (_draw_lines if lines else _draw_heatmap)(axes, series)
    _label_steps(axes)
    return axes


def plot_run(series: Series, t_grok: float | None, at_grok: float | None, ax: Any, label: str | None) -> Axes:
    """Draw one run over steps, in the next colour of the axes, with a dot and a line where it grokked."""
    axes = _axes(ax, 4.0)
    colour = _draw_line(axes, series, None, label)
    if t_grok is not None:
        axes.axvline(t_grok, color=colour, alpha=0.6, **DASHED)
        if at_grok is not None:
            axes.plot(t_grok, at_grok, color=colour, **GROKKING)
    if label is not None:
        axes.legend()
    axes.set_ylabel(ENTROPY)
    _label_steps(axes)
    return axes


class Spectrum(NamedTuple):
    """Shares of the variance, (r,), the largest first, without those that count as 0, and what follows from them."""

    label: str
    shares: Array
    normalized: float
    effective_rank: float


def plot_spectra(spectra: Sequence[Spectrum], ax: Any) -> Axes:
    """Draw spectra, on a logarithmic scale, with their effective ranks as dashed lines."""
    axes = _axes(ax, 4.0)
    colours = _colours(axes, len(spectra)) if len(spectra) > 1 else [None]
    for one, colour in zip(spectra, colours, strict=True):
        name = f"{one.label}: " if one.label else ""
        (line,) = axes.semilogy(
            np.arange(1, len(one.shares) + 1),
            one.shares,
            "o-" if len(one.shares) <= 40 else "-",
            color=colour,
            markersize=3,
            label=f"{name}H = {one.normalized:.3f}, effective rank {one.effective_rank:.3g}",
        )
        axes.axvline(one.effective_rank, color=line.get_color(), **DASHED)
    axes.set(xlabel="eigenvalue, the largest first", ylabel="share of the variance")
    if len(spectra) <= MOST_ENTRIES:
        axes.legend()
    return axes


def shortened(names: Sequence[str], longest: int = LONGEST_NAME) -> tuple[list[str], str]:
    """Return the names without the parts that all begin and end with, and the pattern of these or "".

    Those that are still too long are abbreviated and cut in the middle; different names stay different.

    Examples
    --------
    >>> shortened(["encoder.blocks.0.mlp", "encoder.blocks.1.mlp"])
    (['0', '1'], 'encoder.blocks.*.mlp')
    >>> shortened(["encoder", "decoder.layers.10.projection", "a_projection_with_a_long_name"], longest=17)
    (['encoder', 'd.l.10.projection', 'a_projec…ong_name'], '')
    """
    parts = [name.split(".") for name in names]
    spare = min(map(len, parts)) - 1 if len(names) > 1 else 0  # something of each is left
    before = _in_common(parts, spare)
    after = _in_common([each[::-1] for each in parts], spare - before)
    kept = [".".join(each[before : len(each) - after]) for each in parts]
    first = parts[0]
    pattern = ".".join([*first[:before], "*", *first[len(first) - after :]]) if before + after else ""
    short = [_cut(name, longest) for name in kept]
    while len(set(short)) < len(set(kept)):
        longest += 4
        short = [_cut(name, longest) for name in kept]
    return short, pattern


def _in_common(parts: Sequence[Sequence[str]], most: int) -> int:
    """How many of the first `most` parts are the same in all."""
    return next((i for i in range(most) if len({each[i] for each in parts}) > 1), most)


def _cut(name: str, longest: int) -> str:
    """Abbreviate a name from its first part on, numbers and the last part left as they are, then cut its middle."""
    parts = name.split(".")
    for i, part in enumerate(parts[:-1]):
        if len(".".join(parts)) > longest and not part.isdecimal():
            parts[i] = part[:1]
    name, half = ".".join(parts), (longest - 1) // 2
    return name if len(name) <= longest else f"{name[:half]}…{name[-half:]}"


def _axes(ax: Any, height: float) -> Axes:
    if ax is None:
        figure = Figure(figsize=(8.0, height), layout="constrained")
        return figure.add_subplot(axes_class=Picture)
    if not isinstance(ax, Axes):
        raise TypeError(f"ax must be axes of matplotlib, as figure.subplots() gives; got {type(ax).__name__}")
    return ax


def _colours(ax: Axes, count: int) -> list[Any]:
    """Return the colours of as many layers, without that end of viridis which is lost on the background."""
    dark = sum(to_rgb(ax.get_facecolor())) < 1.5
    return list(mpl.colormaps["viridis"](np.linspace(*((0.3, 1.0) if dark else (0.0, 0.8)), count)))


def _draw_line(ax: Axes, one: Series, colour: Any, label: str | None = None) -> Any:
    """Draw the usable values, dotted where too few rows hold them down, and return the colour."""
    value = np.where(one.usable, one.value, np.nan)
    look = DOTTED if one.limited.any() else {}
    (line,) = ax.plot(one.step, value, color=colour, label=label, **look)
    colour = line.get_color()
    if look and not one.limited.all():
        ax.plot(one.step, np.where(one.limited, np.nan, value), color=colour)
    beside = np.concatenate([[False], one.usable, [False]])
    alone = one.usable & ~beside[:-2] & ~beside[2:]  # no line leads to them
    _mark(ax, one.step[alone], value[alone], marker=".", linestyle="none", color=colour)
    return colour


def _mark(ax: Axes, x: Array, y: Any, **look: Any) -> None:
    if len(x):  # an artist without points takes part in the layout, at the figure's corner
        ax.plot(x, y, **look)


def _draw_lines(ax: Axes, series: Sequence[Series]) -> None:
    ink, colours = mpl.rcParams["text.color"], _colours(ax, len(series))
    levels = {one.threshold for one in series}
    common = levels.pop() if len(levels) == 1 else None
    for one, colour in zip(series, colours, strict=True):
        _draw_line(ax, one, colour)
        if one.threshold is not None and one.threshold != common:
            ax.axhline(one.threshold, color=colour, **DASHED)
        _mark(ax, *one.at(one.crossed_at), color=colour, **CROSSING)
        _mark(ax, *one.at(one.collapsed_at), color=colour, **COLLAPSE)
        bad = one.step[~one.usable]  # at the edge: many have no value, and none is to be relied on
        edge = {"transform": ax.get_xaxis_transform(), "clip_on": False}
        _mark(ax, bad, np.zeros(len(bad)), color=colour, **UNUSABLE, **edge)
    names, pattern = shortened([one.name for one in series])
    shown = np.unique(np.linspace(0, len(series) - 1, min(len(series), MOST_ENTRIES)).round().astype(int))
    entries = [(Line2D([], [], color=colours[i]), names[i]) for i in shown]
    if common is not None:
        ax.axhline(common, color=ink, **DASHED)
        entries.append((Line2D([], [], color=ink, **DASHED), f"threshold {common:g}"))
    elif levels:
        entries.append((Line2D([], [], color=ink, **DASHED), "threshold of a layer"))
    some = f"{len(shown)} of {len(series)}" if len(shown) < len(series) else ""
    title = ", ".join(filter(None, (pattern, some))) or "layer"
    _legend(ax, entries + _marks(series, color=ink), title)
    ax.set_ylabel(ENTROPY)


def _draw_heatmap(ax: Axes, series: Sequence[Series]) -> None:
    ink = mpl.rcParams["text.color"]
    values = np.concatenate([one.value[one.usable] for one in series])
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    norm = Normalize(low, high if high > low else low + 0.01)
    on_colour: dict[str, Any] = {
        "color": "white",
        "path_effects": [Stroke(linewidth=2.5, foreground="black"), Normal()],
    }
    for row, one in enumerate(series):
        value = np.where(one.usable, one.value, np.nan)[None]
        cells = _edges(one.step), (row - 0.5, row + 0.5)
        ax.pcolormesh(*cells, value, norm=norm, cmap="viridis", rasterized=True)
        if one.limited.any():
            held = np.where(one.limited, float(row), np.nan)
            ax.plot(one.step, held, linewidth=1.2, **DOTTED, **on_colour)
    for look, places in (
        (CROSSING | on_colour, [one.at(one.crossed_at)[0] for one in series]),
        (COLLAPSE | on_colour, [one.at(one.collapsed_at)[0] for one in series]),
        (UNUSABLE | {"color": ink}, [one.step[~one.usable] for one in series]),
    ):
        rows = np.repeat(np.arange(len(series)), [len(steps) for steps in places])
        _mark(ax, np.concatenate(places), rows, **look)
    names, pattern = shortened([one.name for one in series])
    every = -(-len(series) // MOST_TICKS)
    ax.set_yticks(range(0, len(series), every), names[::every], parse_math=False)
    ax.set_ylim(len(series) - 0.5, -0.5)
    ax.set_ylabel(pattern or "layer", parse_math=False)
    bar = ax.figure.colorbar(ScalarMappable(norm, "viridis"), ax=ax, label=ENTROPY)
    levels = {one.threshold for one in series if one.threshold is not None}
    for level in levels:
        bar.ax.axhline(level, linewidth=1.2, **on_colour)
    entries = _marks(series, **on_colour)
    if levels:
        entries.insert(0, (Line2D([], [], linewidth=1.2, **on_colour), "threshold, on the scale"))
    if entries:
        _legend(ax, entries, None)


def _edges(step: Array) -> Array:
    """Return the ends of cells around increasing steps, (m + 1,): half way to the next, as far at both ends."""
    if len(step) == 1:
        return np.array([step[0] - 0.5, step[0] + 0.5])
    half = np.diff(step) / 2
    return np.concatenate([[step[0] - half[0]], step[:-1] + half, [step[-1] + half[-1]]])


def _marks(series: Sequence[Series], **look: Any) -> list[tuple[Line2D, str]]:
    """Entries of a legend for the marks that are drawn."""
    unusable = ", ".join(dict.fromkeys(name for one in series for name in one.unusable))
    found = (
        (any(len(one.at(one.crossed_at)[0]) for one in series), CROSSING, "below the threshold"),
        (any(len(one.at(one.collapsed_at)[0]) for one in series), COLLAPSE, "collapse"),
        (any(one.limited.any() for one in series), DOTTED, "rank_limited"),
        (unusable, UNUSABLE | {"color": mpl.rcParams["text.color"], "path_effects": []}, unusable),
    )
    return [(Line2D([], [], **{**look, **mark}), said) for there, mark, said in found if there]


def _legend(ax: Axes, entries: Sequence[tuple[Line2D, str]], title: str | None) -> None:
    """Put a legend beside lines, or without a title above; inside, where nothing would make room for it."""
    handles = [handle for handle, _ in entries]
    if ax.figure.get_layout_engine() is None:
        place: dict[str, Any] = {"loc": "best"}
    elif title is None:
        place = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "ncols": 4, "frameon": False}
    else:
        place = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0), "frameon": False}
    # Names of layers are no formulas, and may begin with an underscore, which would leave them out.
    legend = ax.legend(handles, [str(i) for i in range(len(entries))], title=title, **place)
    for text, (_, said) in zip(legend.get_texts(), entries, strict=True):
        text.set(text=said, parse_math=False)
    legend.get_title().set_parse_math(False)


def _label_steps(ax: Axes) -> None:
    ax.set_xlabel("training step")
    ax.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
