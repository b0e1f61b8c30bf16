"""The README's benchmark tables from the committed rows: ``python -m bench.readme [--check]``.

They stand between ``<!-- bench: NAME -->`` and ``<!-- /bench -->``. With ``--check`` nothing is written, and the exit
status is 1 where a table does not follow from the rows.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

from bench import tables
from bench.harness import ROOT, Row, read_rows
from bench.providers import ENTROPIES
from bench.tables import interval, markdown, monitor_table

README = ROOT / "README.md"
ROWS = ROOT / "bench" / "results" / "cpu"
# What numpy.cov, the direct product and torch.cov compute is the same, exactly centred in float64.
_EXACT_COVARIANCES = ("torch, direct", "torch.cov", "numpy.cov")


def fill(text: str, folder: Path) -> str:
    """Return `text` with each marked table made anew from the rows in `folder`."""

    def table(found: re.Match[str]) -> str:
        name = found[1]
        return f"<!-- bench: {name} -->\n{TABLES[name](read_rows(folder / f'{name}.jsonl'))}\n<!-- /bench -->"

    return re.sub(r"<!-- bench: (\w+) -->\n.*?<!-- /bench -->", table, text, flags=re.DOTALL)


def entropy_table(rows: list[Row]) -> str:
    """Fastent's time over the direct way's and over the fastest exact peer's, float32 input, a row for each shape."""
    return _against(rows, "torch, direct", [row["provider"] for row in rows if row.get("exact")])


def covariance_table(rows: list[Row]) -> str:
    """Fastent's time for the covariance matrix alone over the same two."""
    return _against(rows, "torch, direct", _EXACT_COVARIANCES)


def plain_monitor_table(rows: list[Row]) -> str:
    """Overhead of a monitor in loops that are neither compiled nor distributed, one thread."""
    return monitor_table([row for row in rows if row["mode"] == "plain" and row["threads"] == 1])


def in_training_table(rows: list[Row]) -> str:
    """List the calls of the exact providers, and of the direct way, between the steps of the first loop."""
    exact = {provider.name for provider in ENTROPIES if provider.exact} | {"torch, direct"}
    loop = rows[0]["loop"] if rows else None
    return tables.in_training_table([row for row in rows if row["provider"] in exact and row["loop"] == loop])


def _against(rows: list[Row], direct: str, exact: list[str] | tuple[str, ...]) -> str:
    rows = [row for row in rows if row["dtype"] == "float32"]
    threads = sorted({row["threads"] for row in rows})
    lines = []
    for n, d in dict.fromkeys((row["n"], row["d"]) for row in rows):
        cells = [f"{n:,} x {d:,}"]
        for count in threads:
            here = {
                row["provider"]: row for row in rows if (row["n"], row["d"], row["threads"]) == (n, d, count)
            }
            fastest = min((row for name, row in here.items() if name in exact), key=lambda row: row["us_p50"])
            cells += [interval(here[direct]), f"{interval(fastest)} {fastest['provider']}"]
        lines.append(cells)
    header = ["rows x columns"]
    for count in threads:
        header += [f"{tables.threads(count)}: over the direct way's", "over the fastest exact peer's"]
    return markdown(header, lines)


TABLES: dict[str, Callable[[list[Row]], str]] = {
    "entropy": entropy_table,
    "covariance": covariance_table,
    "in_training": in_training_table,
    "monitor": plain_monitor_table,
}


def main(argv: list[str] | None = None) -> int:
    """Write the tables, or compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    text = README.read_text()
    filled = fill(text, ROWS)
    if parser.parse_args(argv).check:
        return int(filled != text)
    README.write_text(filled)
    return 0


if __name__ == "__main__":
    sys.exit(main())
