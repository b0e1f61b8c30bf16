"""The page on reliability, from its rows and from what was recorded: ``python -m bench.reliability``.

``bench/reliability.toml`` has the faults, what must happen at each, and the tests that do the harm. ``--run`` runs
these tests, the slow ones left out, and records how many cases of each passed. Kills, flips and fuzz cases are
counted where they are done, by the sessions `faults` and `sweeps`, into the same folder. Without an option the marked
parts of the page are made anew; ``--check`` compares them and writes nothing.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
import tomllib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.harness import ROOT, recorded_commit
from fastent.grokking.experiments.document import markdown_table, marked
from fastent.grokking.train.storage import write_atomically

ROWS = Path(__file__).with_suffix(".toml")
FIGURES = ROOT / "bench" / "results" / "faults"
PAGE = ROOT / "docs" / "reliability.md"

SELECTED = "not sweeps and not nightly"
"""What `--run` runs: the nightly tests count what they do themselves, in the session `faults`."""


@dataclass(frozen=True)
class Fault:
    """A row of the page: a fault, what must happen, and its tests: files, or names as of pytest without parameters."""

    number: int
    fault: str
    must: str
    tests: tuple[str, ...]


def faults() -> list[Fault]:
    """Read the rows."""
    rows = tomllib.loads(ROWS.read_text(encoding="utf-8"))["row"]
    return [Fault(**{**row, "tests": tuple(row["tests"])}) for row in rows]


class Cases:
    """Plugin of pytest that counts how the cases of each test ended, whatever their parameters."""

    def __init__(self) -> None:
        self.ended: dict[str, Counter[str]] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Count a case at its call, or where its set-up skipped it or failed."""
        if report.when == "call" or (report.when == "setup" and not report.passed):
            name = report.nodeid.partition("[")[0]
            self.ended.setdefault(name, Counter())[report.outcome] += 1


def run(folder: Path) -> int:
    """Run the tests of all rows and record in `folder` how many cases passed and were skipped; nothing if one fails."""
    import pytest

    cases, at = Cases(), recorded_commit()
    named = sorted({test for fault in faults() for test in fault.tests})
    status = pytest.main(["-q", "-n0", "-m", SELECTED, *named], plugins=[cases])
    if status == 0:
        record = {
            "commit": at,
            "date": datetime.date.today().isoformat(),
            "python": platform.python_version(),
            "tests": {name: dict(sorted(ended.items())) for name, ended in sorted(cases.ended.items())},
        }
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "cases.json", (json.dumps(record, indent=1) + "\n").encode())
    return int(status)


def _read(folder: Path, name: str) -> Any:
    path = folder / name
    return json.loads(path.read_text()) if path.exists() else None


def table_of_faults(folder: Path) -> str:
    """Write faults, what happens, and what was tried: faults that were counted, and cases of tests."""
    counted = _read(folder, "faults.json") or []
    ended = (_read(folder, "cases.json") or {"tests": {}})["tests"]
    lines = []
    for fault in faults():
        tried = _counted([row for row in counted if row["row"] == fault.number])
        cases: Counter[str] = Counter()
        for name, of_test in ended.items():
            if name in fault.tests or name.partition("::")[0] in fault.tests:
                cases.update(of_test)
        if cases["passed"]:
            tried.append(_plural(cases["passed"], "case"))
        if cases["skipped"]:
            tried.append(f"{cases['skipped']:,} not tried here")
        lines.append((str(fault.number), fault.fault, fault.must, "; ".join(tried) or "–"))
    return markdown_table(("#", "fault", "what happens", "tried"), lines) + "\n" + _recorded(folder)


def _counted(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Faults of one row of the page, with how many of each were tried and survived."""
    tried, survived = Counter[str](), Counter[str]()
    for row in rows:
        tried[row["what"]] += row["tried"]
        survived[row["what"]] += row["survived"]
    return [f"{what}: {survived[what]:,} of {count:,}" for what, count in tried.items()]


def _plural(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _short(commit: str) -> str:
    """Seven digits of a commit, and "-dirty" where the checkout had changes."""
    digits, *changed = commit.split("-")
    return "-".join((digits[:7], *changed))


def _recorded(folder: Path) -> str:
    cases = _read(folder, "cases.json")
    if cases is None:
        return ""
    skipped = sum(ended.get("skipped", 0) for ended in cases["tests"].values())
    return (
        f"\nCases: of {_plural(len(cases['tests']), 'test')}, all of which passed at commit {_short(cases['commit'])} "
        f"({cases['date']}, Python {cases['python']}); {skipped:,} need what that machine had not, such as a GPU.\n"
    )


def table_of_sweeps(folder: Path) -> str:
    """Write sweeps of the same runs on each engine, as recorded."""
    found = _read(folder, "sweeps.json")
    if found is None:
        return "No sweep is recorded.\n"
    lines = [
        (
            row["executor"],
            f"{row['complete']} of {row['runs']}",
            f"{row['same_bytes']} of {row['runs']}",
            str(row["resumed"]),
            str(row["trained_twice_to_the_end"]),
            f"{row['seconds']:.0f} s",
        )
        for row in found["sweeps"]
    ]
    header = ("trained by", "complete", "same bytes", "resumed", "trained twice to the end", "wall time")
    machine = found["machine"]
    return (
        f"{markdown_table(header, lines)}\n\nRecorded at commit {_short(machine['commit'])} on {found['processors']} "
        f"processors ({machine['cpu']}) that did other work too: times tell only that each ended.\n"
    )


def table_of_long_runs(folder: Path) -> str:
    """Write how many calls, rows or runs were tried at once, and the memory and time that they took."""
    found = _read(folder, "long.json")
    if not found:
        return "No long run is recorded.\n"
    largest = {row["what"]: row for row in sorted(found, key=lambda row: row["count"])}
    lines = [
        (
            what,
            f"{row['count']:,}",
            _memory(row.get("bytes")),
            f"{row['seconds']:,.0f} s" if row["seconds"] >= 10 else f"{row['seconds']:.2g} s",
            _time(row["seconds"] / row["count"]),
        )
        for what, row in sorted(largest.items(), key=lambda item: item[1]["test"])
    ]
    header = ("what", "number", "memory", "processor time", "each")
    commits = ", ".join(sorted({_short(row["commit"]) for row in largest.values()}))
    return markdown_table(header, lines) + f"\n\nRecorded at commit {commits}.\n"


def _memory(count: int | None) -> str:
    if count is None:
        return "–"
    return (
        "no growth" if count == 0 else f"{count / 1e6:,.0f} MB" if count >= 1e7 else f"{count / 1e6:.2g} MB"
    )


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.2g} µs" if seconds < 1e-4 else f"{seconds * 1e3:.2g} ms"


def list_of_tests(folder: Path) -> str:
    """List the tests of each row."""
    return "".join(
        f"{fault.number}. {', '.join(f'`{test}`' for test in fault.tests)}\n" for fault in faults()
    )


PARTS: dict[str, Callable[[Path], str]] = {
    "faults": table_of_faults,
    "sweeps": table_of_sweeps,
    "long": table_of_long_runs,
    "tests": list_of_tests,
}


def fill(text: str, folder: Path) -> str:
    """Return `text`, the page, with its marked parts made anew from the figures in `folder`."""
    return marked(text, "reliability", lambda name: "\n" + PARTS[name](folder) + "\n")


def main(argv: list[str] | None = None) -> int:
    """Make the marked parts of the page anew, after running the tests if asked, or compare them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--run", action="store_true", help="run the tests of the rows first, and record their cases"
    )
    parser.add_argument(
        "--check", action="store_true", help="exit with 1 if the page is not what its rows give"
    )
    given = parser.parse_args(argv)
    if given.run and (status := run(FIGURES)):
        return status
    text = PAGE.read_text(encoding="utf-8")
    filled = fill(text, FIGURES)
    if given.check:
        return int(filled != text)
    PAGE.write_text(filled, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
