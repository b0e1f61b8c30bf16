"""Figures and tables from the rows of `bench.suite`: ``python -m bench.report DIR`` where DIR/cpu holds them.

Three pictures: error against time for every provider on every input; overhead of a monitor against its stride; time
against rows and columns, with the floor. One Markdown file with all tables. Rows decide everything: the same rows
give the same files. Without matplotlib there are no pictures.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench import tables
from bench.harness import Row, read_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TABLES: dict[str, tuple[str, Callable[[list[Row]], str]]] = {
    "accuracy": ("Errors", tables.accuracy_table),
    "entropy": ("Entropy: fastent's time over the others'", tables.entropy_table),
    "covariance": ("Covariance: fastent's time over the others'", tables.covariance_table),
    "in_training": ("A call between training steps", tables.in_training_table),
    "memory": ("Peak memory of one call, and what the host reads", tables.memory_table),
    "eigensolve": ("Eigenvalues", tables.eigensolve_table),
    "monitor": ("A monitor in training", tables.monitor_table),
    "training": ("A training step, per seed", tables.training_table),
    "forecast": ("Forecast", tables.simple_table),
    "imports": ("Import", tables.imports_table),
    "plan": ("Cost model", tables.plan_table),
}
NOTES = {
    "accuracy": "The truth is in long double. RankMe is held to the truth of its own quantity. `-inf` and `nan` are "
    "what a provider answered, the name of an exception what it raised.",
    "entropy": "Ratio and its 95 % interval, round by round; below 1 fastent is faster. **Bold**: the other is surely "
    "faster. RankMe computes another quantity, in float32. Every call is made twice before the clock starts; with "
    "several threads, once more before each measurement, after a pause in which all pools come to rest.",
    "covariance": "Read as above.",
    "in_training": "Time of a call whose input comes straight from a forward pass, and by how much the ten training "
    "steps after it take longer than after no call, with the 95 % interval: what its pool of threads leaves behind.",
    "memory": "Reads by the host, counted on the CPU: numbers taken from a tensor, tensors handed to NumPy, "
    "decompositions, whose status it reads. Each would wait for a GPU; a monitor leaves its to another thread there.",
    "monitor": "Time of a run with a monitor over that of one without, less 1, with its 95 % interval.",
    "plan": "Rates measured in the same process. The model is held to within 25 % at the points of the role check.",
}
STYLES = {
    "fastent": ("#d55e00", "o"),
    "torch, direct": ("#0072b2", "s"),
    "numpy": ("#009e73", "D"),
    "scikit-learn PCA, full": ("#a3477f", "^"),
    "scikit-learn PCA, covariance": ("#a3477f", "v"),
    "scikit-learn PCA, no copy": ("#a3477f", "1"),
    "ssrlib": ("#8a6d00", "<"),
    "ssrlib, no copy": ("#8a6d00", "2"),
    "vendi-score": ("#56b4e9", ">"),
    "torchmetrics FID states": ("#7a8594", "P"),
    "stable-pretraining RankMe": ("#1c2430", "x"),
}
SMALLEST = 1e-17  # errors of 0 are drawn here
WRONG = 3.0  # and answers that are no number here


def write(rows_in: Path, out: Path) -> list[Path]:
    """Write the tables, and the pictures where matplotlib is there; return the files.

    Parameters
    ----------
    rows_in : Path
        Folder of the rows, one file a question; questions that are not there are left out.
    out : Path
        Folder to write into.
    """
    rows = {name: read_rows(rows_in / f"{name}.jsonl") for name in TABLES}
    out.mkdir(parents=True, exist_ok=True)
    report = out / "report.md"
    pictures: dict[str, Path] = {}
    if importlib.util.find_spec("matplotlib") is not None:
        for name, draw in (("accuracy", _accuracy), ("monitor", _overhead), ("entropy", _cost)):
            if rows[name]:
                pictures[name] = out / f"{name}.png"
                draw(rows[name], pictures[name])
    report.write_text(_markdown(rows, pictures))
    return [report, *pictures.values()]


def _markdown(rows: dict[str, list[Row]], pictures: dict[str, Path]) -> str:
    parts = ["# Benchmarks on a CPU", "Made by `fastent bench` from the rows beside this file."]
    parts.append(_environment([row for group in rows.values() for row in group]))
    for name, (title, table) in TABLES.items():
        if rows[name]:
            parts += [f"## {title}", table(rows[name])]
            if name in NOTES:
                parts.append(NOTES[name])
            if name in pictures:
                parts.append(f"![{title}]({pictures[name].name})")
    return "\n\n".join(parts) + "\n"


def _environment(rows: list[Row]) -> str:
    def values(name: str) -> str:
        return ", ".join(dict.fromkeys(str(row[name]) for row in rows if row.get(name) is not None))

    packages = ("torch", "numpy", "scipy", "scikit-learn", "ssrlib", "vendi-score", "torchmetrics")
    packages = (*packages, "stable-pretraining")
    versions = ", ".join(f"{name} {values(name)}" for name in packages if values(name))
    loads = [row["load"] for row in rows if "load" in row]
    span = f"load of the machine {min(loads)} to {max(loads)}" if loads else ""
    return (
        f"{values('device')}, {values('cores')} cores; Python {values('python')}, {versions}; commit "
        f"{values('commit')}; {span}."
    )


def _accuracy(rows: list[Row], path: Path) -> None:
    rows = [row for row in rows if row["op"] == "accuracy"]
    inputs = list(dict.fromkeys(row["input"] for row in rows))
    figure, axes = _figure(3, -(-len(inputs) // 3), height=2.5)
    for ax, name in zip(axes, inputs, strict=False):
        for row in (row for row in rows if row["input"] == name and "us_p50" in row):
            error = WRONG if row["error"] is None else max(row["error"], SMALLEST)
            colour, marker = STYLES[row["provider"]]
            ax.plot(row["us_p50"] / 1e3, error, marker, color=colour, label=row["provider"], markersize=6)
        ax.set(xscale="log", yscale="log", ylim=(SMALLEST / 3, 10), title=name)
        _plain_ticks(ax.xaxis)
        ax.axhline(1e-12, color="#c9d0d9", linewidth=1, zorder=0)
        ax.set_yticks([1e-16, 1e-12, 1e-8, 1e-4, 1])
    for ax in axes[len(inputs) :]:
        ax.set_axis_off()
    for ax in axes[-3:]:
        ax.set_xlabel("time of a call [ms]")
    for ax in axes[::3]:
        ax.set_ylabel("error of H / log d")
    _finish(figure, axes, path, columns=4)


def _overhead(rows: list[Row], path: Path) -> None:
    modes = list(dict.fromkeys((row["mode"], row["threads"]) for row in rows))
    figure, axes = _figure(len(modes), 1, height=3.4)
    colours = dict(zip(dict.fromkeys(row["loop"] for row in rows), _palette(), strict=False))
    for ax, (mode, threads) in zip(axes, modes, strict=True):
        for loop, (colour, marker) in colours.items():
            points = [
                row
                for row in rows
                if (row["loop"], row["mode"], row["threads"]) == (loop, mode, threads) and row["stride"]
            ]
            if not points:
                continue
            x = np.array([row["stride"] for row in points])
            share = 100 * np.array([row["share"] for row in points])
            ax.plot(x, share, color=colour, marker=marker, markersize=5, label=f"{loop}: time of the probes")
            middle = 100 * np.array([row["overhead"] for row in points])
            low = 100 * np.array([row["overhead_low"] for row in points])
            high = 100 * np.array([row["overhead_high"] for row in points])
            shift = x * (1.06 + 0.05 * list(colours).index(loop))
            # What lies below the axis, the noise of two runs, is drawn on its edge.
            low, middle, high = (np.maximum(values, 0.011) for values in (low, middle, high))
            ax.errorbar(
                shift, middle, [middle - low, high - middle], fmt=".", color=colour, alpha=0.6, capsize=2
            )
        ax.axhline(1.0, color="#1c2430", linewidth=0.8, linestyle="--")
        ax.axvline(200, color="#c9d0d9", linewidth=0.8, zorder=0)
        ax.set(xscale="log", yscale="log", xlabel="steps between probes", ylim=(0.01, 300))
        _plain_ticks(ax.yaxis, 1.0)
        _plain_ticks(ax.xaxis, 1.0)
        ax.set_title(f"{mode}, {tables.threads(threads)}")
    axes[0].set_ylabel("overhead [%]; dashed: 1 %")
    _finish(figure, axes, path, columns=4)


def _cost(rows: list[Row], path: Path) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    threads = sorted({row["threads"] for row in rows})
    figure, axes = _figure(2, len(threads), height=3.2)
    for i, count in enumerate(threads):
        chosen = [row for row in rows if row["threads"] == count and row["dtype"] == "float32"]
        for ax, fixed, moving, value in zip(
            axes[2 * i : 2 * i + 2], ("d", "n"), ("n", "d"), (128, 512), strict=True
        ):
            here = [row for row in chosen if row[fixed] == value]
            for name, (colour, marker) in STYLES.items():
                points = sorted((row[moving], row["us_p50"]) for row in here if row["provider"] == name)
                if points and "no copy" not in name:
                    x, y = np.array(points).T
                    wide = 2.2 if name == "fastent" else 1.0
                    ax.plot(x, y / 1e3, color=colour, marker=marker, markersize=4, linewidth=wide, label=name)
            floor = sorted((row[moving], row["floor_us"]) for row in here if "floor_us" in row)
            if floor:
                x, y = np.array(floor).T
                ax.plot(
                    x,
                    y / 1e3,
                    color="#1c2430",
                    linestyle="--",
                    linewidth=1,
                    label="floor of fastent's libraries",
                )
            ax.set(xscale="log", yscale="log", xlabel={"n": "rows N", "d": "columns d"}[moving])
            ax.xaxis.set_major_locator(FixedLocator(sorted({row[moving] for row in here})))
            ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            ax.xaxis.set_minor_locator(NullLocator())
            _plain_ticks(ax.yaxis)
            ax.set_title(f"{'N' if fixed == 'n' else fixed} = {value}, {tables.threads(count)}")
        axes[2 * i].set_ylabel("time of a call [ms]")
    _finish(figure, axes, path, columns=4)


def _plain_ticks(axis: Any, *multiples: float) -> None:
    """Put ticks at 1, 2 and 5 times the powers of ten, written out."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=multiples or (1.0, 2.0, 5.0)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: f"{value:g}")


def _palette() -> list[tuple[str, str]]:
    return [("#d55e00", "o"), ("#0072b2", "s"), ("#009e73", "D"), ("#a3477f", "^")]


def _figure(columns: int, lines: int, *, height: float) -> tuple[Any, list[Axes]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.0, height * lines + 0.9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, squeeze=False)
    return figure, list(axes.flat)


def _finish(figure: Any, axes: list[Axes], path: Path, *, columns: int) -> None:
    entries: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
        ax.spines[["top", "right"]].set_visible(False)
        ax.title.set_fontsize(9)
        ax.tick_params(labelsize=8)
    figure.legend(
        list(entries.values()),
        list(entries),
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize=8,
    )
    figure.savefig(path, dpi=110, metadata={"Software": None})
