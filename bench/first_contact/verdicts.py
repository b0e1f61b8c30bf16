"""What a first contact found, for the end of its output: ``python -m bench.first_contact.verdicts DIR``.

Checks and tests that failed, then the targets with what was measured (`bench.report`), from the files in DIR.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from bench.harness import read_rows
from bench.report import verdict_table

SHOWN = 12  # failures of each kind


def failed_checks(file: Path) -> Iterator[str]:
    """Lines on the checks of the smoke test that failed."""
    for row in read_rows(file):
        if not row["passed"]:
            yield f"FAIL {row['check']}: {row['said']}"


def failed_tests(file: Path) -> Iterator[str]:
    """Lines on the tests that failed or broke, by pytest's report."""
    try:
        cases = list(ElementTree.parse(file).iter("testcase")) if file.exists() else []
    except ElementTree.ParseError as error:  # pytest was ended while it wrote
        yield f"{file.name} cannot be read: {error}"
        return
    for case in cases:
        for fault in (*case.iter("failure"), *case.iter("error")):
            message = fault.get("message", "").partition("\n")[0]
            yield f"{fault.tag.upper()} {case.get('classname')}::{case.get('name')}: {message}"


def main(argv: list[str] | None = None) -> int:
    """Print it."""
    (folder,) = map(Path, sys.argv[1:] if argv is None else argv)
    for lines in (failed_checks(folder / "smoke.jsonl"), failed_tests(folder / "junit.xml")):
        for line in list(lines)[:SHOWN]:
            print(line[:200])
    print(verdict_table(read_rows(folder / "gpu.jsonl")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
