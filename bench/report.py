"""A table and a figure from the rows of `bench.gpu`: ``python -m bench.report DIR``.

Reads ``DIR/gpu.jsonl``; writes ``DIR/report.md`` and ``DIR/report.png``. What was skipped is listed with its reason, so
that a rehearsal on a CPU cannot be mistaken for a measurement of a GPU. Without matplotlib there is no figure. Rows of
`bench.suite` in ``DIR/cpu`` get their report there (`bench.report_cpu`).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench import report_cpu
from bench.harness import Row

# op -> columns of its table, as (heading, key)
TABLES: dict[str, Sequence[tuple[str, str]]] = {
    "kernel": (
        *(("batch", "batch"), ("n", "n"), ("d", "d"), ("dtype", "dtype"), ("side", "side"), ("L2", "cache")),
        *(("launches", "launches"), ("us p20", "us_p20"), ("us p50", "us_p50"), ("us p80", "us_p80")),
        *(("TFLOP/s", "tflops"), ("share of floor", "share_of_floor")),
    ),
    "covariance": (
        *(("n", "n"), ("d", "d"), ("provider", "provider"), ("us p20", "us_p20"), ("us p50", "us_p50")),
        *(("us p80", "us_p80"), ("host us", "host_us"), ("over fastent", "over_fastent")),
    ),
    "entropy": (
        *(("n", "n"), ("d", "d"), ("provider", "provider"), ("us p20", "us_p20"), ("us p50", "us_p50")),
        *(("us p80", "us_p80"), ("host us", "host_us"), ("over fastent", "over_fastent")),
    ),
    "eigensolve": (
        *(("d", "d"), ("provider", "provider"), ("batch", "batch"), ("us p50", "us_p50")),
        ("us per matrix", "us_per_matrix"),
    ),
    "probe forward": (
        ("n", "n"),
        ("d", "d"),
        ("us p20", "us_p20"),
        ("us p50", "us_p50"),
        ("us p80", "us_p80"),
    ),
    "probe in the stream": (
        *(("batch", "batch"), ("n", "n"), ("d", "d"), ("us p20", "us_p20"), ("us p50", "us_p50")),
        ("us p80", "us_p80"),
    ),
    "probe on the thread": (
        *(("provider", "provider"), ("us p20", "us_p20"), ("us p50", "us_p50"), ("us p80", "us_p80")),
    ),
    "slowdown": (
        *(("step", "step"), ("step us", "step_us"), ("probe", "provider"), ("every", "stride")),
        *(
            ("slowdown", "slowdown"),
            ("low", "slowdown_low"),
            ("high", "slowdown_high"),
            ("dropped", "dropped"),
        ),
    ),
    "host synchronisations": (("provider", "provider"), ("n", "n"), ("d", "d"), ("calls that wait", "calls")),
    "blocked stream": (("provider", "provider"), ("stream busy us", "pause_us"), ("back after us", "us_p50")),
    "peak memory": (
        *(("n", "n"), ("d", "d"), ("provider", "provider"), ("input bytes", "input_bytes")),
        *(("above it", "extra_bytes"), ("held before", "held_bytes")),
    ),
}
ENVIRONMENT = (
    *("device", "capability", "multiprocessors", "sm_mhz", "memory_mhz", "driver", "cuda", "torch", "triton"),
    *("python", "threads", "commit"),
)


def read(folder: Path) -> list[Row]:
    """Rows of a run."""
    return [json.loads(line) for line in (folder / "gpu.jsonl").read_text().splitlines()]


def cell(value: Any) -> str:
    """Write a value for a table: three or four digits, nothing for what a row has not got."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def table(rows: Iterable[Row], columns: Sequence[tuple[str, str]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = ["| " + " | ".join(heading for heading, _ in columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell(row.get(key)) for _, key in columns) + " |" for row in rows]
    return lines


def correctness(rows: list[Row]) -> list[str]:
    """Lines on the gates: one for each provider and dtype, the worst case named."""
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["provider"], row["dtype"]].append(row)
    summary = []
    for (provider, dtype), found in groups.items():
        checked = [row for row in found if row["op"] == "correctness"]
        entropies = [row["difference"] for row in found if row["op"] == "entropy"]
        summary.append(
            {
                "provider": provider,
                "dtype": dtype,
                "cases": len(found),
                "failed": sum(not row["passed"] for row in found),
                "worst": max((row["error_over_gate"] for row in checked), default=None),
                "entropy": max(entropies, default=None),
            }
        )
    columns = (
        *(("provider", "provider"), ("dtype", "dtype"), ("cases", "cases"), ("failed", "failed")),
        *(("largest error over its gate", "worst"), ("largest difference of H", "entropy")),
    )
    return table(summary, columns)


def markdown(rows: list[Row]) -> str:
    """Write the whole report."""
    lines = ["# Benchmark of the entropy path", "", "| | |", "|---|---|"]
    lines += [
        f"| {key} | {cell(rows[-1].get(key))} |" for key in ENVIRONMENT if rows[-1].get(key) is not None
    ]
    done = [row for row in rows if "skipped" not in row]
    checked = [row for row in done if row["part"] == "correctness"]
    if checked:
        lines += ["", "## correctness", "", *correctness(checked)]
    for op, columns in TABLES.items():
        found = [row for row in done if row["op"] == op and row["part"] != "correctness"]
        if found:
            lines += ["", f"## {op}", "", *table(found, columns)]
    skipped = [row for row in rows if "skipped" in row]
    if skipped:
        columns = (("what", "op"), ("provider", "provider"), ("n", "n"), ("d", "d"), ("why", "skipped"))
        lines += ["", "## not measured", "", *table(skipped, columns)]
    return "\n".join(lines) + "\n"


def figure(rows: list[Row], path: Path) -> None:
    """Draw kernel times over their floor, providers over fastent, and slowdowns, whichever there are."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    done = [row for row in rows if "skipped" not in row and row["part"] != "correctness"]
    kernel = [
        row for row in done if row["op"] == "kernel" and row["batch"] == 1 and row["dtype"] == "bfloat16"
    ]
    providers = [row for row in done if row["op"] in ("covariance", "entropy") and "over_fastent" in row]
    slow = [row for row in done if row["op"] == "slowdown"]
    panels = [part for part in (kernel, providers, slow) if part]
    if not panels:
        return
    drawing, axes = pyplot.subplots(1, len(panels), figsize=(6 * len(panels), 4.5), squeeze=False)
    drawing.suptitle(
        f"{rows[-1]['device']}, torch {rows[-1]['torch']}, triton {rows[-1]['triton']}", fontsize=9
    )
    for axis, part in zip(axes[0], panels, strict=True):
        if part is kernel:
            draw_kernel(axis, part)
        elif part is providers:
            draw_providers(axis, part)
        else:
            draw_slowdowns(axis, part)
    drawing.tight_layout()
    drawing.savefig(path, dpi=120)
    pyplot.close(drawing)


def draw_kernel(axis: Any, rows: list[Row]) -> None:
    """Time against d for each n, warm cache, and the floor dashed."""
    for k, n in enumerate(sorted({row["n"] for row in rows})):
        found = sorted(
            (row for row in rows if row["n"] == n and row["cache"] == "warm"), key=lambda row: row["d"]
        )
        widths = [row["d"] for row in found]
        axis.loglog(widths, [row["us_p50"] for row in found], f"C{k}o-", label=f"n = {n}")
        axis.loglog(widths, [row["floor_us"] for row in found], f"C{k}--", linewidth=0.8)
    axis.set(xlabel="d", ylabel="kernel time, us (dashed: floor)")
    axis.legend()


def draw_providers(axis: Any, rows: list[Row]) -> None:
    """Time over fastent's, for each provider over the shapes."""
    shapes = list(dict.fromkeys(f"{row['op']}\n{row['n']} x {row['d']}" for row in rows))
    for provider in dict.fromkeys(row["provider"] for row in rows):
        found = {
            f"{row['op']}\n{row['n']} x {row['d']}": row["over_fastent"]
            for row in rows
            if row["provider"] == provider
        }
        axis.semilogy([shapes.index(name) for name in found], list(found.values()), "o", label=provider)
    axis.axhline(1.0, color="0.7", linewidth=0.8)
    axis.set_xticks(range(len(shapes)), shapes, fontsize=6, rotation=90)
    axis.set_ylabel("time over fastent's")
    axis.legend(fontsize=7)


def draw_slowdowns(axis: Any, rows: list[Row]) -> None:
    """Slowdown of a step in percent against the stride of the probe."""
    for step, provider in dict.fromkeys((row["step"], row["provider"]) for row in rows):
        found = [row for row in rows if (row["step"], row["provider"]) == (step, provider)]
        middle = [100 * row["slowdown"] for row in found]
        spans = [
            [100 * (row["slowdown"] - row["slowdown_low"]) for row in found],
            [100 * (row["slowdown_high"] - row["slowdown"]) for row in found],
        ]
        axis.errorbar(
            [row["stride"] for row in found], middle, yerr=spans, fmt="o-", label=f"{step}: {provider}"
        )
    axis.set_xscale("log")
    axis.set(xlabel="steps from one probe to the next", ylabel="slowdown, %")
    axis.legend(fontsize=7)


def main(argv: list[str] | None = None) -> None:
    """Write the table and the figure beside the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="DIR")
    folder = parser.parse_args(argv).folder
    if (folder / "cpu").is_dir():
        print(*report_cpu.write(folder / "cpu", folder / "cpu"), sep="\n")
        if not (folder / "gpu.jsonl").exists():
            return
    rows = read(folder)
    (folder / "report.md").write_text(markdown(rows))
    if importlib.util.find_spec("matplotlib"):
        figure(rows, folder / "report.png")
        print(f"{folder / 'report.md'} and {folder / 'report.png'}")
    else:
        print(f"{folder / 'report.md'}; no figure, since matplotlib is not installed")


if __name__ == "__main__":
    main()
