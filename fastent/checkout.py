"""The benchmarks of a checkout: no part of the installed package, ``fastent bench`` runs them from there."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def find_suite() -> Path:
    """Find the checkout that holds ``bench/suite.py``: where this package lies, or the current folder.

    Raises
    ------
    FileNotFoundError
        If neither is one.
    """
    places = [Path(__file__).resolve().parents[1], Path.cwd()]
    for place in places:
        if (place / "bench" / "suite.py").is_file():
            return place
    raise FileNotFoundError(
        "the benchmarks are in fastent's repository, not in the installed package: clone it and run "
        f"`fastent bench` there (looked for bench/suite.py in {' and '.join(map(str, places))})"
    )


def run_benchmarks(*, quick: bool, out: Path, only: Sequence[str] = ()) -> int:
    """Run the suite in a process of its own and return its exit status; see `fastent.cli.bench`."""
    line = [sys.executable, "-m", "bench.suite", "--out", str(out.resolve())]
    line += ["--quick"] if quick else []
    line += ["--only", *only] if only else []
    return subprocess.run(line, cwd=find_suite(), check=False).returncode
