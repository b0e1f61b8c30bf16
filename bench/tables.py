"""Rows as Markdown tables: on the screen after a benchmark, and in the documentation by `bench.report_cpu`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

Row = dict[str, Any]


def markdown(header: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """Make a Markdown table."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def entropy_table(rows: list[Row]) -> str:
    """List fastent's time over each provider's, a row for each shape and thread count."""
    return _ratios([row for row in rows if row["op"] == "entropy"])


def covariance_table(rows: list[Row]) -> str:
    """List fastent's time over each provider's, a row for each shape and thread count."""
    return _ratios([row for row in rows if row["op"] == "covariance"])


def _ratios(rows: list[Row]) -> str:
    names = list(dict.fromkeys(row["provider"] for row in rows if row["provider"] != "fastent"))
    groups = _group(rows, lambda row: (row["threads"], row["n"], row["d"], row["dtype"]))
    lines = []
    for (threads, n, d, dtype), group in groups.items():
        by_name = {row["provider"]: row for row in group}
        lines.append(
            [
                f"{n:,} x {d:,} {dtype}",
                threads,
                microseconds(by_name["fastent"]["us_p50"]),
                *(interval(by_name[name]) if name in by_name else "-" for name in names),
            ]
        )
    return markdown(["rows x columns", "threads", "fastent", *names], lines)


def interval(row: Row) -> str:
    """Write a ratio with its 95 % interval, marked where a limit was missed or the other was surely faster."""
    text = f"{_short(row['ratio'])} [{_short(row['ratio_low'])}, {_short(row['ratio_high'])}]"
    if row["ratio_low"] > 1:
        text = f"**{text}**"
    return text + (" (limit missed)" if row["ratio"] > row.get("limit", math.inf) else "")


def accuracy_table(rows: list[Row]) -> str:
    """Errors, a row for each provider and a column for each input."""
    parts = []
    for op, title in (("accuracy", "entropy: error / log d"), ("covariance accuracy", "covariance")):
        chosen = [row for row in rows if row["op"] == op]
        inputs = list(dict.fromkeys(row["input"] for row in chosen))
        lines = []
        for name, group in _group(chosen, lambda row: row["provider"]).items():
            by_input = {row["input"]: row for row in group}
            label = name
            if group[0].get("quantity", "entropy") != "entropy":
                label = f"{name} (its own quantity)"
            lines.append([label, *(_error(by_input[i]) if i in by_input else "-" for i in inputs)])
        parts.append(markdown([title, *inputs], lines))
    return "\n\n".join(parts)


def memory_table(rows: list[Row]) -> str:
    """MiB beside the input, a row for each provider and a column for each shape; the host's reads of the first."""
    shapes = list(dict.fromkeys((row["n"], row["d"]) for row in rows))
    lines = []
    for name, group in _group(rows, lambda row: row["provider"]).items():
        by_shape = {(row["n"], row["d"]): row["extra_bytes"] for row in group}
        sizes = ("?" if by_shape[s] is None else f"{by_shape[s] / 2**20:.1f}" for s in shapes)
        lines.append([name, *sizes, group[0]["host_reads"]])
    return markdown(
        ["MiB beside the input", *(f"{n:,} x {d:,}" for n, d in shapes), "reads by the host"], lines
    )


def eigensolve_table(rows: list[Row]) -> str:
    """Time of each solver, a row for each size and thread count."""
    names = list(dict.fromkeys(row["provider"] for row in rows))
    lines = []
    for (threads, m), group in _group(rows, lambda row: (row["threads"], row["d"])).items():
        by_name = {row["provider"]: row for row in group}
        lines.append(
            [
                f"{m:,}",
                threads,
                *(microseconds(by_name[n]["us_p50"]) if n in by_name else "-" for n in names),
            ]
        )
    return markdown(["m", "threads", *names], lines)


def monitor_table(rows: list[Row]) -> str:
    """Overhead in percent of a step, a row for each loop and a column for each stride."""
    strides = sorted({row["stride"] for row in rows if row["stride"]})
    lines = []
    for (loop, mode, threads), group in _group(
        rows, lambda row: (row["loop"], row["mode"], row["threads"])
    ).items():
        by_stride = {row["stride"]: row for row in group}
        plain = by_stride[0]
        one = next(row for row in group if row["stride"])
        lines.append(
            [
                loop,
                mode,
                threads,
                microseconds(plain["us_p50"]),
                microseconds(one["probe_us"]),
                *(_percent(by_stride[s]) if s in by_stride else "-" for s in strides),
            ]
        )
    header = ["loop", "mode", "threads", "step", "one probe", *(f"every {s:,}" for s in strides)]
    return markdown(header, lines)


def _percent(row: Row) -> str:
    span = ", ".join(f"{100 * row[name]:.2f}" for name in ("overhead_low", "overhead_high"))
    return f"{100 * row['overhead']:.2f} % [{span}]"


def in_training_table(rows: list[Row]) -> str:
    """Time of a call between training steps and what it adds to those that follow, a row for each provider."""
    columns = list(dict.fromkeys((row["loop"], row["threads"]) for row in rows))
    lines = []
    for name, group in _group(rows, lambda row: row["provider"]).items():
        by_column = {(row["loop"], row["threads"]): row for row in group}
        lines.append([name, *(_between(by_column[c]) if c in by_column else "-" for c in columns)])
    return markdown(["call; the steps after it", *(f"{loop}, {threads(t)}" for loop, t in columns)], lines)


def _between(row: Row) -> str:
    span = ", ".join(f"{row[name] / 1e3:+.2f}" for name in ("after_low", "after_high"))
    return f"{microseconds(row['us_p50'])}; {row['after_us'] / 1e3:+.2f} ms [{span}]"


def threads(count: int) -> str:
    """Write a number of threads."""
    return f"{count} thread{'s' if count > 1 else ''}"


def training_table(rows: list[Row]) -> str:
    """List the time of a training step for one seed."""
    return markdown(
        ["model", "loop", "seeds", "threads", "p20", "median", "p80"],
        [
            [
                *(row[name] for name in ("model", "provider", "seeds", "threads")),
                *(microseconds(row[name]) for name in ("us_p20", "us_p50", "us_p80")),
            ]
            for row in rows
        ],
    )


def simple_table(rows: list[Row]) -> str:
    """List what was measured and its time."""
    return markdown(
        ["what", "threads", "p20", "median", "p80"],
        [
            [
                row["provider"],
                row["threads"],
                *(microseconds(row[name]) for name in ("us_p20", "us_p50", "us_p80")),
            ]
            for row in rows
        ],
    )


def imports_table(rows: list[Row]) -> str:
    """Time, memory and modules of each import."""
    return markdown(
        ["import", "beyond", "p20", "median", "p80", "MiB", "modules"],
        [
            [
                row["provider"],
                row["beyond"],
                *(microseconds(row[name]) for name in ("us_p20", "us_p50", "us_p80")),
                f"{row['extra_bytes'] / 2**20:.1f}",
                row["modules"],
            ]
            for row in rows
        ],
    )


def plan_table(rows: list[Row]) -> str:
    """Predicted against measured time of an evaluation."""
    return markdown(
        ["rows x columns", "threads", "measured", "predicted", "predicted / measured", "role"],
        [
            [
                f"{row['n']:,} x {row['d']:,} {row['dtype']}",
                row["threads"],
                microseconds(row["us_p50"]),
                microseconds(row["predicted_us"]),
                f"{row['predicted_us'] / row['us_p50']:.2f}",
                row["role"],
            ]
            for row in rows
        ],
    )


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
