"""Figures and tables from rows, of a CPU and of a GPU, and those of the documents: ``python -m bench.report DIR``.

``DIR/cpu/<question>.jsonl`` (`bench.suite`) gives ``DIR/cpu/report.md``, ``DIR/gpu.jsonl`` (`bench.gpu`)
``DIR/report.md``, each with its pictures beside it. Rows decide everything: the same rows give the same files. What was
skipped is listed with its reason, so that a rehearsal on a CPU cannot be mistaken for a measurement of a GPU; providers
that are not installed, or raise, are named in their tables. What was measured in a changed tree is marked.

Beside each report ``commits.md`` sets the same benchmarks over commits side by side, as ratios to what was timed in the
same run; times of their own are of a GPU alone. ``commits.jsonl`` keeps what those pages show of rows that newer ones
replace.

The GPU's report begins with a verdict on each target (`verdicts`); it is printed too. Of a file with several runs the
newest counts, part by part.

``--docs`` writes the tables of README.md and docs/benchmarks.md from the committed rows; they stand between
``<!-- bench: NAME -->`` and ``<!-- bench: end -->``. With ``--check`` nothing is written, and the exit status is 1
where a table does not follow from the rows, or an interval not from the rounds that its row keeps.
"""

from __future__ import annotations

import argparse
import functools
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

from bench.harness import COPY, PRODUCT, ROOT, Row, differing, read_rows, write_rows
from bench.providers import OURS, PROVIDERS
from fastent.grokking.experiments.document import markdown_table, marked
from fastent.grokking.experiments.figures import LIGHT, WIDTH, save_png

Table = Callable[[list[Row]], str]
Draw = Callable[[list[Row]], Figure]


@dataclass(frozen=True)
class Chapter:
    """A part of a report: its title, the table of its rows, a note on how to read it, and a picture.

    `by_provider`: the table has a place for each provider, so it gets the rows that were skipped too.
    """

    title: str
    table: Table
    note: str = ""
    draw: Draw | None = None
    by_provider: bool = False


def write(
    title: str, origin: str, sections: Mapping[str, Chapter], rows: Mapping[str, list[Row]], out: Path
) -> list[Path]:
    """Write ``report.md`` and its pictures; return the files.

    Parameters
    ----------
    title, origin : str
        What was measured, and what the page is made from.
    sections : mapping
        By name, in order; a section without rows is left out.
    rows : mapping
        By the name of their section. Skipped ones stand in none but are listed at the end.
    out : Path
        Folder to write into.
    """
    out.mkdir(parents=True, exist_ok=True)
    everything = [row for group in rows.values() for row in group]
    parts, files = [f"# {title}", origin, _machine(everything)], [out / "report.md"]
    for name, section in sections.items():
        done = [row for row in rows.get(name, []) if "skipped" not in row]
        if not done:
            continue
        table = section.table(rows[name] if section.by_provider else done)
        parts += [f"## {section.title}", table, *([section.note] if section.note else [])]
        if section.draw is not None:
            files.append(out / f"{name.replace(' ', '-')}.png")
            save_png(functools.partial(section.draw, done), files[-1], dpi=110)
            parts.append(f"![{section.title}]({files[-1].name})")
    named = {name for name, section in sections.items() if section.by_provider}
    skipped = [row for name, group in rows.items() if name not in named for row in group if "skipped" in row]
    if skipped:
        table = columns("op provider n d skipped", op="what", skipped="why")
        parts += ["## Not measured", table(skipped)]
    files[0].write_text("\n\n".join(parts) + "\n")
    return files


def write_cpu(folder: Path) -> list[Path]:
    """Report on the rows of `bench.suite` in `folder`, written there."""
    rows = {name: read_rows(folder / f"{name}.jsonl") for name in CPU}
    origin = "Made by `fastent bench` from the rows beside this file. [The same over commits](commits.md)."
    files = write("Benchmarks on a CPU", origin, CPU, rows, folder)
    return files + write_commits(folder, [row for group in rows.values() for row in group])


def write_gpu(folder: Path) -> list[Path]:
    """Report on the rows of `bench.gpu` in `folder`, written there; print the verdicts."""
    everything = read_rows(folder / "gpu.jsonl")
    found = with_shares(newest(everything))
    print(verdict_table(everything))
    judged = [verdict._asdict() for verdict in verdicts(everything)]
    rows = {"verdicts": judged, **_group(found, lambda row: row["op"])}
    origin = "Made by `python -m bench.report` from gpu.jsonl beside this file."
    return write("Benchmark of the entropy path", origin, GPU, rows, folder) + write_commits(
        folder, everything
    )


def _machine(rows: list[Row]) -> str:
    def values(name: str) -> str:
        return ", ".join(dict.fromkeys(str(row[name]) for row in rows if row.get(name) is not None))

    packages = ("torch", "numpy", "scipy", "scikit-learn", "ssrlib", "vendi-score", "torchmetrics")
    packages = (*packages, "stable-pretraining")
    versions = ", ".join(f"{name} {values(name)}" for name in packages if values(name))
    loads = [row["load"] for row in rows if "load" in row]
    span = f"load of the machine {min(loads)} to {max(loads)}" if loads else ""
    text = (
        f"{values('device')}, {values('cores')} cores; Python {values('python')}, {versions}; commit "
        f"{values('commit')}; {span}."
    )
    if any("part" in row for row in rows):  # of `bench.gpu`
        known = ("capability", "multiprocessors", "sm_mhz", "memory_mhz", "driver", "cuda", "triton")
        text += " " + ", ".join(f"{name} {values(name)}" for name in known if values(name)) + "."
    return text


def listed(cells: Mapping[str, str | Callable[[Row], object]]) -> Table:
    """Table of the rows as they are, one line each: what stands under each heading, a key or what makes it."""
    return lambda rows: marked_table(
        list(cells),
        [
            ([row], [cell(row) if callable(cell) else _cell(row.get(cell)) for cell in cells.values()])
            for row in rows
        ],
    )


def marked_table(header: Sequence[str], lines: Sequence[tuple[list[Row], list[object]]]) -> str:
    """Write a table; lines with rows of a changed tree are marked, and below it stands which changes those are."""
    changed = [_tree(row) for rows, _ in lines for row in rows if _is_changed(row)]
    text = markdown_table(
        header,
        [
            [f"{cells[0]} {CHANGED}" if any(map(_is_changed, rows)) else cells[0], *cells[1:]]
            for rows, cells in lines
        ],
    )
    return text + (
        f"\n\n{CHANGED} From a changed tree: {', '.join(dict.fromkeys(changed))}." if changed else ""
    )


CHANGED = "†"


def _is_changed(row: Row) -> bool:
    return str(row.get("commit")).endswith("-dirty")


def _tree(row: Row) -> str:
    """Name the commit of a row, with the hash of what the tree changed in it."""
    commit = str(row.get("commit")).removesuffix("-dirty")
    return (
        f"{commit} with changes {row.get('changes') or '(not recorded which)'}"
        if _is_changed(row)
        else commit
    )


def _why(row: Row) -> str:
    return str(row["skipped"]).partition(":")[0]


def columns(keys: str, **headings: str) -> Table:
    """Table by `listed` of the `keys` of the rows, with the headings of those that have another name."""
    return listed({headings.get(key, key.replace("_", " ")): key for key in keys.split()})


def _cell(value: Any) -> str:
    """Write a value: three or four digits, nothing for what a row has not got."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def ratio_table(rows: list[Row]) -> str:
    """List fastent's time over each provider's, a row for each shape and thread count."""
    names = list(dict.fromkeys(row["provider"] for row in rows if row["provider"] != OURS))
    groups = _group(rows, lambda row: (row["threads"], row["n"], row["d"], row["dtype"]))
    lines: list[tuple[list[Row], list[object]]] = []
    for (threads, n, d, dtype), group in groups.items():
        by_name = {row["provider"]: row for row in group}
        ours = by_name.get(OURS, {})
        cells: list[object] = [f"{n:,} x {d:,} {dtype}", threads]
        cells.append(microseconds(ours["us_p50"]) if "us_p50" in ours else "-")
        cells += [interval(by_name[name]) if name in by_name else "-" for name in names]
        lines.append((group, cells))
    return marked_table(["rows x columns", "threads", OURS, *names], lines)


def interval(row: Row) -> str:
    """Write a ratio with its 95 % interval, bold where fastent is surely faster, and with a limit that it is above."""
    if "skipped" in row:
        return _why(row)
    text = f"{_short(row['ratio'])} [{_short(row['ratio_low'])}, {_short(row['ratio_high'])}]"
    if row["ratio_high"] < 1:
        text = f"**{text}**"
    limit = row.get("limit", math.inf)
    return text + (f" (above our limit, {limit:g})" if row["ratio"] > limit else "")


def accuracy_table(rows: list[Row]) -> str:
    """Errors, a row for each provider and a column for each input."""
    parts = []
    for op, title in (("accuracy", "entropy: error / log d"), ("covariance accuracy", "covariance")):
        chosen = [row for row in rows if row["op"] == op]
        inputs = list(dict.fromkeys(row["input"] for row in chosen))
        lines: list[tuple[list[Row], list[object]]] = []
        for name, group in _group(chosen, lambda row: row["provider"]).items():
            by_input = {row["input"]: row for row in group}
            label = name
            if group[0].get("quantity", "entropy") != "entropy":
                label = f"{name} (its own quantity)"
            lines.append((group, [label, *(_error(by_input[i]) if i in by_input else "-" for i in inputs)]))
        parts.append(marked_table([title, *inputs], lines))
    return "\n\n".join(parts)


def memory_table(rows: list[Row]) -> str:
    """MiB beside the input, a row for each provider and a column for each shape; the host's reads of the first."""
    shapes = list(dict.fromkeys((row["n"], row["d"]) for row in rows))
    lines: list[tuple[list[Row], list[object]]] = []
    for name, group in _group(rows, lambda row: row["provider"]).items():
        by_shape = {(row["n"], row["d"]): row for row in group}
        sizes = (_mebibytes(by_shape[s]) if s in by_shape else "-" for s in shapes)
        lines.append((group, [name, *sizes, group[0].get("host_reads", "-")]))
    return marked_table(
        ["MiB beside the input", *(f"{n:,} x {d:,}" for n, d in shapes), "reads by the host"], lines
    )


def _mebibytes(row: Row) -> str:
    if "skipped" in row:
        return _why(row)
    return "?" if row["extra_bytes"] is None else f"{row['extra_bytes'] / 2**20:.1f}"


def eigensolve_table(rows: list[Row]) -> str:
    """Time of each solver, a row for each size and thread count."""
    names = list(dict.fromkeys(row["provider"] for row in rows))
    lines: list[tuple[list[Row], list[object]]] = []
    for (threads, m), group in _group(rows, lambda row: (row["threads"], row["d"])).items():
        by_name = {row["provider"]: row for row in group}
        times = (microseconds(by_name[n]["us_p50"]) if n in by_name else "-" for n in names)
        lines.append((group, [f"{m:,}", threads, *times]))
    return marked_table(["m", "threads", *names], lines)


def monitor_table(rows: list[Row]) -> str:
    """Overhead in percent of a step, a row for each loop and a column for each stride."""
    strides = sorted({row["stride"] for row in rows if row["stride"]})
    lines: list[tuple[list[Row], list[object]]] = []
    for (loop, mode, threads), group in _group(
        rows, lambda row: (row["loop"], row["mode"], row["threads"])
    ).items():
        by_stride = {row["stride"]: row for row in group}
        plain = by_stride[0]
        one = next(row for row in group if row["stride"])
        times = (microseconds(plain["us_p50"]), microseconds(one["probe_us"]))
        shares = (_percent(by_stride[s]) if s in by_stride else "-" for s in strides)
        lines.append((group, [loop, mode, threads, *times, *shares]))
    header = ["loop", "mode", "threads", "step", "one probe", *(f"every {s:,}" for s in strides)]
    return marked_table(header, lines)


def _percent(row: Row) -> str:
    span = ", ".join(f"{100 * row[name]:.2f}" for name in ("overhead_low", "overhead_high"))
    return f"{100 * row['overhead']:.2f} % [{span}]"


def in_training_table(rows: list[Row]) -> str:
    """Time of a call between training steps and what it adds to those that follow, a row for each provider."""
    columns = list(dict.fromkeys((row["loop"], row["threads"]) for row in rows))
    lines: list[tuple[list[Row], list[object]]] = []
    for name, group in _group(rows, lambda row: row["provider"]).items():
        by_column = {(row["loop"], row["threads"]): row for row in group}
        cells = (_between(by_column[c]) if c in by_column else "-" for c in columns)
        lines.append((group, [name, *cells]))
    return marked_table(
        ["call; the steps after it", *(f"{loop}, {_threads(t)}" for loop, t in columns)], lines
    )


def _between(row: Row) -> str:
    if "skipped" in row:
        return _why(row)
    span = ", ".join(f"{row[name] / 1e3:+.2f}" for name in ("after_low", "after_high"))
    return f"{microseconds(row['us_p50'])}; {row['after_us'] / 1e3:+.2f} ms [{span}]"


def _threads(count: int) -> str:
    """Write a number of threads."""
    return f"{count} thread{'s' if count > 1 else ''}"


def deferred_table(rows: list[Row]) -> str:
    """Cost of an evaluation in line and by the worker, a row for each shape."""
    lines: list[tuple[list[Row], list[object]]] = []
    costs: dict[str, Row] = {}
    for (layers, n, d), group in _group(rows, lambda row: (row["layers"], row["n"], row["d"])).items():
        costs = {row["provider"]: row for row in group}
        worker = costs["worker"]
        cells = [
            f"{layers} of {n} x {d}",
            microseconds(group[0]["us_step"]),
            *(microseconds(row["us_p50"]) for row in costs.values()),
            interval(worker),
            f"{worker['cost_ratio']:.2f} [{worker['cost_low']:.2f}, {worker['cost_high']:.2f}]",
        ]
        lines.append((group, cells))
    names = [*costs, "loop with the worker over in line", "cost, copies over matrices"]
    return marked_table(["layers", "step", *names], lines)


def microseconds(us: float) -> str:
    """Write a time with three digits and a unit."""
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if us >= size:
            return f"{us / size:.3g} {unit}"
    return f"{us:.3g} us"


def _error(row: Row) -> str:
    if row["error"] is not None:
        return f"{row['error']:.1e}" if row["error"] else "0"
    return str(row["answer"])


def _short(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"


def _group(rows: list[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def gate_table(rows: list[Row]) -> str:
    """List the gates: one line for each way and dtype, with the largest error of each quantity over its gate."""
    lines: list[tuple[list[Row], list[object]]] = []
    for (provider, dtype), found in _group(rows, lambda row: (row["provider"], row["dtype"])).items():
        worst = [max((row[gate] for row in found if gate in row), default=None) for gate in GATES]
        batches = ", ".join(str(batch) for batch in sorted({row["batch"] for row in found}))
        counts = (len(found), sum(not row["passed"] for row in found))
        lines.append((found, [provider, dtype, batches, *map(_cell, (*counts, *worst))]))
    header = ("way", "dtype", "matrices", "cases", "outside", *(gate.partition("_")[0] for gate in GATES))
    return marked_table(header, lines)


GATES = ("matrix_over_gate", "centre_over_gate", "spread_over_gate", "entropy_over_gate")


def newest(rows: list[Row]) -> list[Row]:
    """Of each part the rows of the last run that has it: rows are appended, so a file may hold several runs."""
    last = {row["part"]: row.get("run") for row in rows}
    return [row for row in rows if row.get("run") == last[row["part"]]]


class NotMeasuredError(Exception):
    """Why a figure cannot be had from the rows."""


class Verdict(NamedTuple):
    """What became of one target."""

    target: str
    limit: str
    measured: str  # the figure, or why there is none
    verdict: str  # "met", "missed" or "not measured"
    card: str


class Measured(NamedTuple):
    """A figure, as it is written, and the row that it comes from."""

    value: float
    text: str
    row: Row


@dataclass(frozen=True)
class Target:
    """What is asked of a figure; `measure` raises NotMeasuredError where the rows do not say."""

    name: str
    limit: float
    unit: str
    measure: Callable[[list[Row]], Measured]
    at_least: bool = False

    def verdict(self, rows: list[Row]) -> Verdict:
        """Hold the rows against it."""
        limit = f"{'>=' if self.at_least else '<='} {self.limit:g} {self.unit}".strip()
        try:
            found = self.measure(rows)
        except NotMeasuredError as reason:
            return Verdict(self.name, limit, str(reason), "not measured", "")
        met = found.value >= self.limit if self.at_least else found.value <= self.limit
        return Verdict(
            self.name, limit, found.text, "met" if met else "missed", str(found.row.get("device", ""))
        )


def verdicts(rows: list[Row]) -> list[Verdict]:
    """Hold each target of the GPU path (`TARGETS`) against rows of `bench.gpu`.

    Rows made without a GPU count for nothing. Of several runs the newest that came to a figure counts, also where it
    found that there is none. A figure that does not measure what its target asks for gives no verdict but a reason: a
    time that is not the device's (`timing`), a slowdown whose evaluations were dropped, a step of another length. Two
    times that are compared are of one run and one card.
    """
    of_gpu = [row for row in rows if "skipped" in row or row.get("capability")]
    return [target.verdict(of_gpu) for target in TARGETS]


def verdict_table(rows: list[Row]) -> str:
    """Write the verdicts as a table."""
    return markdown_table(Verdict._fields, [list(verdict) for verdict in verdicts(rows)])


def _row(rows: list[Row], op: str, **wanted: object) -> Row:
    """Return the newest row with these values; raise the reason where it says why there is no figure, or is none.

    What there was no time for, or a part that broke, says nothing of a row that is there.
    """
    reason = "no row of a GPU"
    for row in reversed([row for row in rows if row["op"] == op]):
        if "skipped" not in row and all(row.get(key) == value for key, value in wanted.items()):
            return row
        # What was skipped as a whole has not all of the values.
        if "skipped" in row and all(row.get(key, value) == value for key, value in wanted.items()):
            reason = row["skipped"]
            if not (row.get("late") or row.get("broke")):
                break
    raise NotMeasuredError(reason)


def _device_row(rows: list[Row], op: str, **wanted: object) -> Row:
    """Return such a row whose time is the device's and nothing else's."""
    row = _row(rows, op, **wanted)
    if row.get("timing") not in DEVICE_TIMINGS:
        raise NotMeasuredError(f"timed by {row.get('timing')}: not the device's time alone")
    return row


DEVICE_TIMINGS = ("graph", "sleep")


def _time(rows: list[Row], **wanted: object) -> Measured:
    row = _device_row(rows, "kernel", dtype="bfloat16", cache="warm", **wanted)
    span = " to ".join(f"{row[name]:.3g}" for name in ("us_p20", "us_p80"))
    return Measured(row["us_p50"], f"{row['us_p50']:.3g} us ({span})", row)


def _over(rows: list[Row], provider: str, n: int, d: int) -> Measured:
    """Time of our covariance, memory at hand, over another's in the same run."""
    shape = {"n": n, "d": d, "dtype": "bfloat16"}
    ours = _device_row(rows, "covariance", provider="fastent, memory at hand", **shape)
    same = {key: ours[key] for key in ("device", "run") if key in ours}
    theirs = _device_row(rows, "covariance", provider=provider, **shape, **same)
    value = ours["us_p50"] / theirs["us_p50"]
    return Measured(
        value, f"{value:.3g}: {microseconds(ours['us_p50'])} over {microseconds(theirs['us_p50'])}", ours
    )


def _rate(rows: list[Row]) -> Measured:
    """Compare the float64 operations executed in a second with those of cuBLAS on the same card."""
    row = _device_row(rows, "kernel", batch=1, n=8192, d=4096, dtype="bfloat16", cache="warm")
    ours, most = row["flops"] / row["us_p50"] * 1e6, ceiling(rows, PRODUCT, row["device"])
    return Measured(ours / most, f"{ours / most:.3g}: {ours / 1e12:.3g} of {most / 1e12:.3g} TFLOP/s", row)


def _slowdown(rows: list[Row], provider: str, stride: int) -> Measured:
    """Slowdown of a captured step of 0.15 ms in percent, of which nothing was dropped."""
    row = _row(rows, "slowdown", step="graph step", provider=provider, stride=stride)
    if not 135 <= row["step_us"] <= 165:
        raise NotMeasuredError(f"the step took {row['step_us']:.0f} us instead of 150")
    if row["dropped"]:
        raise NotMeasuredError(f"{row['dropped']} of {row['probes']} evaluations were dropped")
    middle, low, high = (100 * row[name] for name in ("slowdown", "slowdown_low", "slowdown_high"))
    return Measured(middle, f"{middle:.2f} % [{low:.2f}, {high:.2f}]", row)


def _thread(rows: list[Row]) -> Measured:
    """Time that the direct way keeps the training thread over the time that a deferred evaluation does."""
    ours = _row(rows, "probe on the thread", provider="deferred")
    same = {key: ours[key] for key in ("device", "run") if key in ours}
    theirs = _row(rows, "probe on the thread", provider="direct", **same)
    value = theirs["us_p50"] / ours["us_p50"]
    return Measured(
        value, f"{value:.3g}: {microseconds(theirs['us_p50'])} over {microseconds(ours['us_p50'])}", ours
    )


def _waits(rows: list[Row]) -> Measured:
    row = _row(rows, "host synchronisations", provider="deferred")
    return Measured(row["calls"], str(row["calls"]), row)


def _outside(rows: list[Row]) -> Measured:
    gates = [row for row in rows if row["op"] == "gate" and not row.get("late")]
    if not gates:
        raise NotMeasuredError("no row of a GPU")
    keys = ("provider", "backend", "batch", "n", "d", "dtype", "side", "layout")
    last = {tuple(row.get(key) for key in keys): row for row in gates}
    outside = sum(not row.get("passed", True) for row in last.values())
    unknown = [row["skipped"] for row in last.values() if "skipped" in row]
    if unknown and not outside:  # what could not run at all is not inside its gate
        raise NotMeasuredError(f"{len(unknown)} of {len(last)} could not be held to theirs: {unknown[-1]}")
    return Measured(outside, f"{outside} of {len(last)}", gates[-1])


def _trainer(rows: list[Row]) -> Measured:
    row = _row(rows, "e1", seeds=10)
    ours, theirs = row["seed_steps_per_second"], row["cpu_seed_steps_per_second"]
    return Measured(
        ours / theirs, f"{ours / theirs:.3g}: {ours:,.0f} over {theirs:,.0f} seed-steps a second", row
    )


TARGETS = (
    Target("results outside their gates", 0, "", _outside),
    Target("512 x 128, in the stream", 10, "us", functools.partial(_time, n=512, d=128, batch=1)),
    Target(
        "512 x 128, 32 in one launch, in the stream",
        20,
        "us",
        functools.partial(_time, n=512, d=128, batch=32),
    ),
    Target("calls that wait for the device in a deferred evaluation", 0, "", _waits),
    Target(
        "512 x 128: time that the direct way keeps the thread, over that of a deferred evaluation (both by the "
        "host's clock, the device idle before)",
        50,
        "",
        _thread,
        at_least=True,
    ),
    Target(
        "slowdown of a captured 0.15 ms step, deferred evaluation every 10 steps, none dropped",
        1,
        "%",
        functools.partial(_slowdown, provider="deferred", stride=10),
    ),
    Target(
        "the same, matrix and participation ratio alone, every step",
        8,
        "%",
        functools.partial(_slowdown, provider="matrix and participation ratio", stride=1),
    ),
    *(
        Target(
            f"{n} x {d}: time over that of cuBLAS's float64 product",
            limit,
            "",
            functools.partial(_over, provider=PRODUCT, n=n, d=d),
        )
        for n, d, limit in ((8192, 4096, 0.55), (8192, 2048, 0.67), (8192, 1024, 0.6))
    ),
    Target(
        "8192 x 4096: time over that of the kernel without Gluon, same run",
        0.55,
        "",
        functools.partial(_over, provider="fastent, without Gluon", n=8192, d=4096),
    ),
    Target(
        "8192 x 4096: executed float64 operations over the most that cuBLAS executes",
        0.65,
        "",
        _rate,
        at_least=True,
    ),
    Target("E1, 10 seeds: seed-steps a second over the CPU's", 30, "", _trainer, at_least=True),
)


def ceiling(rows: list[Row], name: str, card: str) -> float:
    """Return the highest rate of a ceiling that was measured on a card, a second, by times of the device alone."""
    here = [row for row in rows if row["op"] == "ceiling" and row.get("timing") in DEVICE_TIMINGS]
    rates = [row["per_second"] for row in here if (row["provider"], row["device"]) == (name, card)]
    if not rates:
        raise NotMeasuredError(f"no ceiling of this card: {name}")
    return max(rates)


def with_shares(rows: list[Row]) -> list[Row]:
    """Give rows of `kernel` their floor and their share of it.

    The floor is what the bytes take at the rate of a copy, or the floating-point operations at that of cuBLAS's float64
    product, whichever is longer; both measured on the same card. Where one is missing there is no share.
    """

    def shared(row: Row) -> Row:
        if row["op"] != "kernel" or "skipped" in row:
            return row
        try:
            rates = [ceiling(rows, name, row["device"]) for name in (COPY, PRODUCT)]
        except NotMeasuredError:
            return row
        floor = 1e6 * max(row["bytes"] / rates[0], row["flops"] / rates[1])
        return {**row, "floor_us": floor, "share_of_floor": floor / row["us_p50"]}

    return [shared(row) for row in rows]


LOOKS = ((LIGHT.entropy, "o"), (LIGHT.test, "s"), (LIGHT.norm, "D"), (LIGHT.signal, "^"))
STYLES = {
    **dict(zip(("fastent", "torch, direct", "numpy", "scikit-learn PCA, full"), LOOKS, strict=True)),
    "scikit-learn PCA, covariance": (LIGHT.signal, "v"),
    "scikit-learn PCA, no copy": (LIGHT.signal, "1"),
    "ssrlib": ("#8a6d00", "<"),
    "ssrlib, no copy": ("#8a6d00", "2"),
    "vendi-score": ("#56b4e9", ">"),
    "torchmetrics FID states": (LIGHT.train, "P"),
    "stable-pretraining RankMe": (LIGHT.ink, "x"),
}
OTHER_MARKERS = "*hpXd8"
"""Of providers that have no style of their own yet, in the order in which they come."""


def styles(rows: list[Row]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each provider of `rows`, those of `STYLES` first and in its order."""
    names = dict.fromkeys(row["provider"] for row in rows)
    new = [name for name in names if name not in STYLES]
    others = {
        name: (LOOKS[i % len(LOOKS)][0], OTHER_MARKERS[i % len(OTHER_MARKERS)]) for i, name in enumerate(new)
    }
    return {name: style for name, style in (STYLES | others).items() if name in names}


SMALLEST = 1e-18  # errors of 0 are drawn here
WRONG = 1e3  # and answers that are no number here


def _accuracy(rows: list[Row]) -> Figure:
    rows = [row for row in rows if row["op"] == "accuracy"]
    inputs, drawn = list(dict.fromkeys(row["input"] for row in rows)), styles(rows)
    figure, axes = _figure(3, -(-len(inputs) // 3), height=2.5)
    for ax, name in zip(axes, inputs, strict=False):
        for row in (row for row in rows if row["input"] == name and "us_p50" in row):
            error = WRONG if row["error"] is None else max(row["error"], SMALLEST)
            colour, marker = drawn[row["provider"]]
            ax.plot(row["us_p50"] / 1e3, error, marker, color=colour, label=row["provider"], markersize=6)
        ax.set(xscale="log", yscale="log", ylim=(SMALLEST / 10, 10 * WRONG), title=name)
        _plain_ticks(ax.xaxis)
        ax.axhline(1e-12, color=LIGHT.ink, linewidth=0.8, linestyle="--", label="what fastent is held to")
        ax.set_yticks(
            [SMALLEST, 1e-16, 1e-12, 1e-8, 1e-4, 1, WRONG],
            ["exactly 0", *(f"$10^{{{power}}}$" for power in (-16, -12, -8, -4)), "1", "no number"],
        )
    for ax in axes[len(inputs) :]:
        ax.set_axis_off()
    for ax in axes[-3:]:
        ax.set_xlabel("time of a call [ms]")
    for ax in axes[::3]:
        ax.set_ylabel("error of H / log d")
    return _with_legend(figure, columns=4)


def _overhead(rows: list[Row]) -> Figure:
    modes = list(dict.fromkeys((row["mode"], row["threads"]) for row in rows))
    figure, axes = _figure(len(modes), 1, height=3.4)
    colours = dict(zip(dict.fromkeys(row["loop"] for row in rows), LOOKS, strict=False))
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
            ax.plot(x, share, color=colour, marker=marker, markersize=5, label=loop)
            middle = 100 * np.array([row["overhead"] for row in points])
            low = 100 * np.array([row["overhead_low"] for row in points])
            high = 100 * np.array([row["overhead_high"] for row in points])
            shift = x * (1.06 + 0.05 * list(colours).index(loop))
            # What lies below the axis, the noise of two runs, is drawn on its edge.
            low, middle, high = (np.maximum(values, 0.011) for values in (low, middle, high))
            ax.errorbar(
                shift, middle, [middle - low, high - middle], fmt=".", color=colour, alpha=0.6, capsize=2
            )
        explained: dict[str, Any] = {"color": LIGHT.ink, "linewidth": 1.0}
        ax.plot([], [], marker="o", markersize=5, label="probes, by their time", **explained)
        ax.errorbar(
            *([math.nan], [math.nan], [math.nan]),
            fmt=".",
            capsize=2,
            label="slowdown against a run without, 95 % interval",
            **explained,
        )
        ax.axhline(1.0, linestyle="--", label="1 %", **explained)
        ax.axvline(200, linestyle=":", zorder=0, label="the default stride", **explained)
        ax.set(xscale="log", yscale="log", xlabel="steps between probes", ylim=(0.01, 300))
        _plain_ticks(ax.yaxis, 1.0)
        ax.yaxis.set_major_formatter(lambda value, _: f"{'≤ ' if value == 0.01 else ''}{value:g}")
        _plain_ticks(ax.xaxis, 1.0)
        ax.set_title(f"{mode}, {_threads(threads)}", fontsize=9)
    axes[0].set_ylabel("share of the training time [%]")
    return _with_legend(figure, columns=4)


def _cost(rows: list[Row]) -> Figure:
    threads = sorted({row["threads"] for row in rows})
    figure, axes = _figure(2, len(threads), height=3.2)
    for i, count in enumerate(threads):
        chosen = [row for row in rows if row["threads"] == count and row["dtype"] == "float32"]
        for ax, fixed, moving, value in zip(
            axes[2 * i : 2 * i + 2], ("d", "n"), ("n", "d"), (128, 512), strict=True
        ):
            here = [row for row in chosen if row[fixed] == value]
            for name, (colour, marker) in styles(here).items():
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
                    color=LIGHT.ink,
                    linestyle="--",
                    linewidth=1,
                    label="floor of fastent's libraries",
                )
            ax.set(xscale="log", yscale="log", xlabel={"n": "rows N", "d": "columns d"}[moving])
            ax.xaxis.set_major_locator(FixedLocator(sorted({row[moving] for row in here})))
            ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            ax.xaxis.set_minor_locator(NullLocator())
            _plain_ticks(ax.yaxis)
            ax.set_title(f"{'N' if fixed == 'n' else fixed} = {value}, {_threads(count)}")
        axes[2 * i].set_ylabel("time of a call [ms]")
    return _with_legend(figure, columns=4)


def _plain_ticks(axis: Any, *multiples: float) -> None:
    """Put ticks at 1, 2 and 5 times the powers of ten, written out."""
    axis.set_major_locator(LogLocator(subs=multiples or (1.0, 2.0, 5.0)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: f"{value:g}")


def _figure(columns: int, lines: int, *, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH, height * lines + 0.9), layout="constrained")
    return figure, list(figure.subplots(lines, columns, squeeze=False).flat)


def _with_legend(figure: Figure, *, columns: int) -> Figure:
    """Put one legend under all panels."""
    entries: dict[str, Any] = {}
    for ax in figure.axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
        ax.tick_params(labelsize=8)
    figure.legend(
        list(entries.values()), list(entries), loc="outside lower center", ncols=columns, fontsize=8
    )
    return figure


def _kernel(rows: list[Row]) -> Figure:
    """Time against d for each n, warm cache, and the floor dashed; bfloat16, one matrix."""
    rows = [row for row in rows if (row["batch"], row["dtype"], row["cache"]) == (1, "bfloat16", "warm")]
    figure, axes = _figure(1, 1, height=4.0)
    for k, n in enumerate(sorted({row["n"] for row in rows})):
        found = sorted((row for row in rows if row["n"] == n), key=lambda row: row["d"])
        widths = [row["d"] for row in found]
        axes[0].loglog(widths, [row["us_p50"] for row in found], f"C{k}o-", label=f"n = {n}")
        axes[0].loglog(widths, [row["floor_us"] for row in found], f"C{k}--", linewidth=0.8)
    axes[0].set(xlabel="d", ylabel="kernel time [us]; dashed: floor")
    return _with_legend(figure, columns=4)


def _over_fastent(rows: list[Row]) -> Figure:
    """Time over fastent's, for each provider over the shapes."""
    figure, axes = _figure(1, 1, height=4.0)
    shapes = list(dict.fromkeys(f"{row['n']} x {row['d']}" for row in rows))
    for provider, group in _group(rows, lambda row: row["provider"]).items():
        places = [shapes.index(f"{row['n']} x {row['d']}") for row in group]
        axes[0].semilogy(places, [row["over_fastent"] for row in group], "o", label=provider)
    axes[0].axhline(1.0, color=LIGHT.ink, linewidth=0.8, linestyle="--")
    axes[0].set_xticks(range(len(shapes)), shapes)
    axes[0].set_ylabel("time over fastent's")
    return _with_legend(figure, columns=4)


def _slowdowns(rows: list[Row]) -> Figure:
    """Slowdown of a step in percent against the stride of the probe."""
    figure, axes = _figure(1, 1, height=4.0)
    for (step, provider), found in _group(rows, lambda row: (row["step"], row["provider"])).items():
        spans = [
            [100 * (row["slowdown"] - row["slowdown_low"]) for row in found],
            [100 * (row["slowdown_high"] - row["slowdown"]) for row in found],
        ]
        axes[0].errorbar(
            [row["stride"] for row in found],
            [100 * row["slowdown"] for row in found],
            yerr=spans,
            fmt="o-",
            label=f"{step}: {provider}",
        )
    axes[0].set(xscale="log", xlabel="steps from one probe to the next", ylabel="slowdown [%]")
    return _with_legend(figure, columns=2)


_TIMES: dict[str, Callable[[Row], object]] = {
    "p20": lambda row: microseconds(row["us_p20"]),
    "median": lambda row: microseconds(row["us_p50"]),
    "p80": lambda row: microseconds(row["us_p80"]),
}
# What is reported of the questions of `bench.suite`, and of the operations of `bench.gpu`.
CPU = {
    "accuracy": Chapter(
        "Errors",
        accuracy_table,
        "The truth is in long double. RankMe is held to the truth of its own quantity. `-inf` and `nan` "
        "are what a provider answered, the name of an exception what it raised.",
        draw=_accuracy,
        by_provider=True,
    ),
    "entropy": Chapter(
        "Entropy: fastent's time over the others'",
        ratio_table,
        "Ratio and its 95 % interval, round by round; below 1 fastent is faster, in **bold** surely so. "
        "RankMe computes another quantity, in float32. Every call is made twice before the"
        " clock starts; with several threads, once more before each measurement, after a pause in which "
        "all pools come to rest.",
        draw=_cost,
        by_provider=True,
    ),
    "covariance": Chapter(
        "Covariance: fastent's time over the others'",
        ratio_table,
        "Read as above.",
        by_provider=True,
    ),
    "in_training": Chapter(
        "A call between training steps",
        in_training_table,
        "Time of a call whose input comes straight from a forward pass, and by how much the ten training "
        "steps after it take longer than after no call, with the 95 % interval: what its pool of threads "
        "leaves behind.",
        by_provider=True,
    ),
    "memory": Chapter(
        "Peak memory of one call, and what the host reads",
        memory_table,
        "Reads by the host, counted on the CPU: numbers taken from a tensor, tensors handed to NumPy, "
        "decompositions, whose status it reads. Each would wait for a GPU; a monitor leaves its to "
        "another thread there.",
        by_provider=True,
    ),
    "eigensolve": Chapter("Eigenvalues", eigensolve_table),
    "monitor": Chapter(
        "A monitor in training",
        monitor_table,
        "Time of a run with a monitor over that of one without, less 1, with its 95 % interval.",
        draw=_overhead,
    ),
    "training_batch": Chapter(
        "A monitor of the training batch",
        listed(
            {
                "loop": "loop",
                "monitor": "provider",
                "every": lambda row: row["stride"] or "",
                "threads": "threads",
                **_TIMES,
                "overhead": lambda row: _percent(row) if row["stride"] else "",
                "share": lambda row: f"{100 * row['share']:.2f} %" if "share" in row else "",
                "held to": lambda row: f"{100 * row['limit']:.2f} %" if "limit" in row else "",
            }
        ),
        "Time of a run with a monitor over that of one without, less 1, with its 95 % interval; share: of steps with "
        "an evaluation against others of the same run. At every step held to 0.15 of what a fixed probe cost before.",
    ),
    "early_end": Chapter(
        "A probe whose pass ends with the last watched layer",
        listed(
            {
                "threads": "threads",
                "pass": "provider",
                **_TIMES,
                "GFLOP": lambda row: f"{row['flops'] / 1e9:.3g}",
                "over the whole": lambda row: interval(row) if "ratio" in row else "",
                "its operations over the whole's": lambda row: (
                    f"{row['floor']:.3f}" if "floor" in row else ""
                ),
            }
        ),
        "The language model with a vocabulary of 32,000, all blocks watched. Held to 0.6 of the whole pass.",
    ),
    "training": Chapter(
        "A training step, per seed",
        listed({"model": "model", "loop": "provider", "seeds": "seeds", "threads": "threads", **_TIMES}),
    ),
    "forecast": Chapter("Forecast", listed({"what": "provider", "threads": "threads", **_TIMES})),
    "imports": Chapter(
        "Import",
        listed(
            {
                "import": "provider",
                "beyond": "beyond",
                **_TIMES,
                "MiB": lambda row: f"{row['extra_bytes'] / 2**20:.1f}",
                "modules": "modules",
            }
        ),
    ),
    "plan": Chapter(
        "Cost model",
        listed(
            {
                "rows x columns": lambda row: f"{row['n']:,} x {row['d']:,} {row['dtype']}",
                "threads": "threads",
                "measured": _TIMES["median"],
                "predicted": lambda row: microseconds(row["predicted_us"]),
                "predicted / measured": lambda row: f"{row['predicted_us'] / row['us_p50']:.2f}",
                "role": "role",
            }
        ),
        "Rates measured in the same process. The model is held to within 25 % at the points of the role "
        "check.",
    ),
    "deferred": Chapter(
        "An evaluation in line or by a worker",
        deferred_table,
        "Time of an evaluation on the thread that trains; below 1 the worker gains.",
    ),
}
_TIMING = (
    "Timing: `graph`, many calls in one CUDA graph; `sleep`, queued behind a sleep that outlasted the host; `host`, "
    "the call waits for the device or could not be kept behind a sleep: the time is the host's too; `clock`, no GPU."
)
_GPU_TABLES: dict[str, Table] = {
    "verdicts": columns("target limit measured verdict card"),
    "gate": gate_table,
    "ceiling": columns("provider timing us_p20 us_p50 us_p80 per_second", per_second="in a second"),
    "kernel": columns(
        "batch n d dtype side cache launches timing us_p20 us_p50 us_p80 tflops share_of_floor",
        cache="L2",
        tflops="TFLOP/s",
    ),
    "covariance": columns("n d provider timing us_p20 us_p50 us_p80 host_us over_fastent"),
    "entropy": columns("n d provider timing us_p20 us_p50 us_p80 host_us over_fastent"),
    "eigensolve": columns("d provider batch us_p50 us_per_matrix"),
    "probe forward": columns("n d timing us_p20 us_p50 us_p80"),
    "probe on the thread": columns("provider us_p20 us_p50 us_p80"),
    "slowdown": columns(
        "step step_us provider stride slowdown slowdown_low slowdown_high probes dropped",
        provider="way",
        stride="every",
        slowdown_low="low",
        slowdown_high="high",
    ),
    "host synchronisations": columns("provider n d calls", calls="calls that wait"),
    "blocked stream": columns(
        "provider pause_us us_p50 waited", pause_us="stream busy us", us_p50="back after us"
    ),
    "peak memory": columns(
        "n d provider input_bytes extra_bytes held_bytes", extra_bytes="above it", held_bytes="held before"
    ),
}
_GPU_FIGURES: dict[str, Draw] = {
    "kernel": _kernel,
    "covariance": _over_fastent,
    "entropy": _over_fastent,
    "slowdown": _slowdowns,
}
_GPU_NOTES = {
    "verdicts": "Where a limit refers to two times, both are of one run on one card.",
    "kernel": "Share of the floor: of what the bytes take at the rate of a copy, or the executed operations at that of "
    "cuBLAS's float64 product, whichever is longer, both measured on this card; without them there is none.",
    "covariance": _TIMING,
    "entropy": _TIMING,
    "slowdown": "A dropped evaluation costs next to nothing: where any was dropped, the row says what dropping costs.",
}
GPU = {
    op: Chapter(op, table, _GPU_NOTES.get(op, ""), _GPU_FIGURES.get(op)) for op, table in _GPU_TABLES.items()
}


BASELINE, SHAPE = "torch, direct", "512 x 128 float32"
"""What all shapes are compared with over commits, and the shape at which all providers are."""

MOST_TREES = 8
"""Columns of a table over commits: the newest."""


def comparisons(rows: list[Row]) -> list[Row]:
    """Return what the page over commits shows of rows.

    Ratios to what was timed in the same run, with their intervals; device times of a GPU, which is the only machine
    whose own times are comparable; and for each commit, or changed tree, the machine.
    """
    found: list[Row] = []
    plain = {
        (row["model"], row["threads"], row["commit"]): row["us_p50"]
        for row in rows
        if row.get("provider") == "plain" and "model" in row
    }
    for row in rows:
        if "skipped" in row or row.get("commit") is None:
            continue
        tree = {name: row.get(name) for name in ("commit", "changes")}
        kept = {"op": row["op"], "against": row.get("provider"), "threads": row.get("threads"), **tree}
        shape = f"{row['n']:,} x {row['d']:,} {row['dtype']}" if row.keys() >= {"n", "d", "dtype"} else ""
        names = ("ratio", "ratio_low", "ratio_high")
        if row.get("capability"):
            names = ("us_p50", "us_p20", "us_p80")
            if (
                row["op"] not in ("kernel", "covariance", "entropy")
                or row.get("timing") not in DEVICE_TIMINGS
            ):
                continue
            of = [f"{row['batch']} of" if row.get("batch", 1) > 1 else "", shape, row.get("cache", "")]
            kept |= {"case": " ".join(filter(None, of)), "threads": None, "card": row["device"]}
            values = [row[name] for name in names]
        elif (
            row["op"] in ("entropy", "covariance")
            and "ratio" in row
            and (row["provider"] == BASELINE or shape == SHAPE)
        ):
            kept |= {"case": shape}
            values = [row[name] for name in names]
        elif row["op"] == "monitor" and "overhead" in row:
            kept |= {
                "case": f"{row['loop']}, {row['mode']}, every {row['stride']:,}",
                "against": "no monitor",
            }
            values = [round(1 + row[name], 5) for name in ("overhead", "overhead_low", "overhead_high")]
        elif row["op"] == "training step, per seed" and row["provider"] != "plain":
            kept |= {"case": f"{row['model']}, seeds: {row['seeds']}", "against": "plain loop"}
            of_medians = row["us_p50"] / plain[row["model"], row["threads"], row["commit"]]
            # Rows from before they had ratios have no interval.
            values = [row[name] for name in names] if "ratio" in row else [round(of_medians, 4)]
        else:
            continue
        machine = {
            "op": "machine",
            **tree,
            **{name: row.get(name) for name in ("device", "cores", "torch", "numpy")},
        }
        found += [machine, kept | dict(zip(names, values, strict=False))]
    return list({_place(row): row for row in found}.values())


def _place(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in ("op", "case", "against", "threads", "card", "commit", "changes"))


def write_commits(folder: Path, rows: list[Row]) -> list[Path]:
    """Add what `rows` say to ``commits.jsonl`` in `folder`; write the page on all that it holds, and its picture."""
    kept, pages = folder / "commits.jsonl", [folder / "commits.md", folder / "commits.png"]
    items = list({_place(row): row for row in (*read_rows(kept), *comparisons(rows))}.values())
    if not items:
        return []
    write_rows(kept, items)
    machines = {_tree(row): row for row in items if row["op"] == "machine"}
    parts = [
        "# Benchmarks over commits",
        "Made by `fastent bench` and `python -m bench.report` from commits.jsonl beside this file, which keeps what "
        "older rows said. A ratio is to what was timed in the same run, with its 95 % interval: below 1, in **bold** "
        'surely so, fastent took less time than what stands under "over"; of a monitor, the run with one is set over '
        "the run without. A ratio without an interval is of medians, from before rows had it.",
        columns("commit device cores torch numpy")(list(machines.values())),
    ]
    drawn = [item for item in items if item["op"] in ("entropy", "covariance") and "ratio" in item]
    if drawn:
        save_png(functools.partial(_over_commits, drawn), pages[1], dpi=110)
        parts.append(f"![Ratios over commits]({pages[1].name})")
    for (op, threads, card), group in _group(
        [item for item in items if item["op"] != "machine"],
        lambda item: (item["op"], item["threads"], item.get("card")),
    ).items():
        parts += [f"## {op}, {card or _threads(threads)}", _commits_table(group)]
    pages[0].write_text("\n\n".join(parts) + "\n")
    return pages if drawn else pages[:1]


def _trees(items: list[Row]) -> dict[str, Row]:
    """One item of each of the newest trees, by its name."""
    trees = {_tree(item): item for item in items}
    return dict(list(trees.items())[-MOST_TREES:])


def _commits_table(items: list[Row]) -> str:
    """Write the figures of one operation, a row for each case and a column for each commit or changed tree."""
    trees = _trees(items)
    heads = [
        f"{item['commit'].removesuffix('-dirty')}{f' {CHANGED}' * _is_changed(item)}"
        for item in trees.values()
    ]
    newest_first = sorted(
        items, key=lambda item: -list(trees).index(_tree(item)) if _tree(item) in trees else 1
    )
    lines: list[list[object]] = []
    for (case, against), group in _group(newest_first, lambda item: (item["case"], item["against"])).items():
        by_tree = {_tree(item): item for item in group}
        lines.append(
            [case, against, *(_figure_of(by_tree[tree]) if tree in by_tree else "" for tree in trees)]
        )
    text = markdown_table(["of", "over", *heads], lines)
    changed = [tree for tree, item in trees.items() if _is_changed(item)]
    return text + (f"\n\n{CHANGED} {', '.join(changed)}." if changed else "")


def _figure_of(item: Row) -> str:
    if "us_p50" in item:
        return f"{microseconds(item['us_p50'])} ({microseconds(item['us_p20'])} to {microseconds(item['us_p80'])})"
    return interval(item) if "ratio_low" in item else _short(item["ratio"])


def _size(name: str) -> int:
    """Order shapes by their size; what is no shape keeps its place."""
    found = re.match(r"([\d,]+) x ([\d,]+) ", name)
    return math.prod(int(each.replace(",", "")) for each in found.groups()) if found else 0


def _over_commits(items: list[Row]) -> Figure:
    """Draw the ratios over commits: to the direct way for each shape, and at one shape to each provider."""
    rows = [
        (
            f"{op}: time over that of the direct way",
            [i for i in items if (i["op"], i["against"]) == (op, BASELINE) and "float32" in i["case"]],
            "case",
        )
        for op in ("entropy", "covariance")
    ] + [
        (
            f"{op}, {SHAPE}: time over that of",
            [i for i in items if i["op"] == op and i["case"] == SHAPE],
            "against",
        )
        for op in ("entropy", "covariance")
    ]
    threads = sorted({item["threads"] for item in items})
    trees = list(_trees(items))
    figure, axes = _figure(len(threads), len(rows), height=2.9)
    for line, (title, chosen, name) in enumerate(rows):
        series = sorted(dict.fromkeys(item[name] for item in chosen), key=_size)
        looks = styles([{"provider": each} for each in series])
        for ax, count in zip(axes[line * len(threads) :], threads, strict=False):
            for place, each in enumerate(series):
                found = [
                    (trees.index(_tree(item)), item)
                    for item in chosen
                    if item[name] == each and item["threads"] == count and _tree(item) in trees
                ]
                # Shapes from small to large; providers as in the other figures.
                colour, marker = looks[each] if name == "against" else (f"C{place % 10}", "o")
                x = [at + 0.5 * (place / len(series) - 0.5) for at, _ in found]
                ratios = [item["ratio"] for _, item in found]
                spans = [
                    [item["ratio"] - item["ratio_low"] for _, item in found],
                    [item["ratio_high"] - item["ratio"] for _, item in found],
                ]
                ax.errorbar(
                    x, ratios, spans, color=colour, marker=marker, markersize=4, linewidth=0.8, label=each
                )
            ax.axhline(1.0, color=LIGHT.ink, linewidth=0.8, linestyle="--")
            ax.set_yscale("log")
            _plain_ticks(ax.yaxis)
            ax.tick_params(labelsize=8)
            ax.set_xticks(
                range(len(trees)), [tree.partition(" ")[0] for tree in trees], rotation=30, fontsize=7
            )
            ax.set_title(f"{title}, {_threads(count)}", fontsize=8)
        if series:
            axes[line * len(threads) + len(threads) - 1].legend(
                loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=6
            )
    return figure


DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")
ROWS = ROOT / "bench" / "results" / "cpu"


def fill(text: str, folder: Path) -> str:
    """Return `text` with each marked table made anew from the rows in `folder`."""

    def table(name: str) -> str:
        question, made = TABLES[name]
        return f"{made(read_rows(folder / f'{question}.jsonl'))}\n"

    return marked(text, "bench", table)


def _cost_of_loops(rows: list[Row]) -> str:
    """Give what a monitor costs in a line for each plain loop on one thread, at the strides that people choose."""
    strides = (100, 200, 1000)
    lines: list[tuple[list[Row], list[object]]] = []
    chosen = [row for row in rows if row["mode"] == "plain" and row["threads"] == 1]
    for loop, group in _group(chosen, lambda row: row["loop"]).items():
        by_stride = {row["stride"]: row for row in group}
        times = (by_stride[0]["us_p50"], by_stride[0]["probe_us"])
        shares = (f"{100 * by_stride[stride]['share']:.2f} %" for stride in strides)
        lines.append((group, [loop, *map(microseconds, times), *shares]))
    return marked_table(["loop", "a step", "a probe", *(f"every {s:,} steps" for s in strides)], lines)


def _entropy_against(rows: list[Row]) -> str:
    """Fastent's time over the direct way's and over the fastest exact peer's, float32 input, a row for each shape."""
    return _against(rows, {row["provider"] for row in rows if row.get("exact")})


def _covariance_against(rows: list[Row]) -> str:
    """Fastent's time for the covariance matrix alone over the same two."""
    # Rows from before they said so: what these three compute is the same, exactly centred in float64.
    known = {"torch, direct", "torch.cov", "numpy.cov"}
    return _against(rows, {row["provider"] for row in rows if row.get("exact", row["provider"] in known)})


def _plain_monitor(rows: list[Row]) -> str:
    """Overhead of a monitor in loops that are neither compiled nor distributed, one thread."""
    return monitor_table([row for row in rows if row["mode"] == "plain" and row["threads"] == 1])


def _exact_in_training(rows: list[Row]) -> str:
    """List the calls of the exact providers, and of the direct way, between the steps of the first loop."""
    # Rows from before they said so are of providers that are still there.
    known = {provider.name for provider in PROVIDERS if provider.exact}
    exact = {row["provider"] for row in rows if row.get("exact", row["provider"] in known)}
    loop = rows[0]["loop"] if rows else None
    return in_training_table(
        [row for row in rows if row["provider"] in exact | {"torch, direct"} and row["loop"] == loop]
    )


def _against(rows: list[Row], exact: set[str]) -> str:
    rows = [row for row in rows if row["dtype"] == "float32" and "skipped" not in row]
    threads = sorted({row["threads"] for row in rows})
    lines: list[tuple[list[Row], list[object]]] = []
    for (n, d), group in _group(rows, lambda row: (row["n"], row["d"])).items():
        cells: list[object] = [f"{n:,} x {d:,}"]
        for count in threads:
            here = {row["provider"]: row for row in group if row["threads"] == count}
            peers = [row for name, row in here.items() if name in exact and "ratio" in row]
            fastest = min(peers, key=lambda row: row["us_p50"])
            cells += [interval(here["torch, direct"]), f"{interval(fastest)} {fastest['provider']}"]
        lines.append((group, cells))
    header = ["rows x columns"]
    for count in threads:
        header += [f"{_threads(count)}: over the direct way's", "over the fastest exact peer's"]
    return marked_table(header, lines)


TABLES: dict[str, tuple[str, Table]] = {
    "cost": ("monitor", _cost_of_loops),
    "entropy": ("entropy", _entropy_against),
    "covariance": ("covariance", _covariance_against),
    "in_training": ("in_training", _exact_in_training),
    "monitor": ("monitor", _plain_monitor),
}
"""Of the documents: the question whose rows a table is made from, and how."""


def _differing(folder: Path) -> list[str]:
    """Say what in the rows below `folder` does not follow from the rounds that they keep."""
    from bench import monitor  # not where tables are drawn: it brings the trainer

    found = {path: read_rows(path) for path in sorted(folder.rglob("*.jsonl"))}
    return [
        f"{path}: {text}"
        for path, rows in found.items()
        for text in (*differing(rows), *monitor.differing(rows))
    ]


def main(argv: list[str] | None = None) -> int:
    """Write the reports of a folder, or the tables of the documents, or compare these."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="DIR", nargs="?")
    parser.add_argument("--docs", action="store_true")
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args(argv)
    if given.docs or given.check:
        filled = {path: fill(path.read_text(), ROWS) for path in DOCUMENTS}
        if given.check:
            wrong = [
                f"{path}: a table is not that of the rows"
                for path, text in filled.items()
                if path.read_text() != text
            ]
            wrong += _differing(given.folder or ROWS)
            print("\n".join(wrong) or "tables and intervals are those of the rows and of their rounds")
            return int(bool(wrong))
        for path, text in filled.items():
            path.write_text(text)
        return 0
    if given.folder is None:
        parser.error("say which: DIR, --docs or --check")
    files = write_cpu(given.folder / "cpu") if (given.folder / "cpu").is_dir() else []
    if (given.folder / "gpu.jsonl").exists():
        files += write_gpu(given.folder)
    if not files:
        parser.error(f"{given.folder} holds neither cpu/ nor gpu.jsonl")
    print(*files, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
