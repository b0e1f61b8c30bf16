"""All benchmarks of the CPU, one after the other: ``fastent bench [--quick]``, or ``python -m bench.suite``.

Each question is a module of its own and writes ``DIR/cpu/<question>.jsonl``; then the figures and tables are made from
these rows (`bench.report_cpu`). A machine that is doing something else gives noise: its load is in every row, and a
warning is printed here.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from bench import report_cpu
from bench.harness import ROOT, pinned

QUESTIONS = (
    "imports",
    "accuracy",
    "memory",
    "covariance",
    "entropy",
    "eigensolve",
    "in_training",
    "monitor",
    "training",
    "forecast",
    "plan",
)
QUICK_TRAINING = ("--threads", "1", "--rounds", "5", "--variants", "paper")


def run(question: str, out: Path, *, quick: bool) -> int:
    """Run one question in a process of its own; return its exit status."""
    line = [sys.executable, "-m", f"bench.{question}", "--out", str(out / "cpu" / f"{question}.jsonl")]
    if quick:
        line += QUICK_TRAINING if question == "training" else ["--quick"]
    start = time.perf_counter()
    print(f"== {question}", flush=True)
    # The threads of a measurement are pinned by its own process; the training benchmark sets them itself.
    status = subprocess.run(line, cwd=ROOT, env=pinned(os.cpu_count() or 1), check=False).returncode
    print(f"-- {question}: {time.perf_counter() - start:.0f} s, exit status {status}", flush=True)
    return status


def main() -> int:
    """Run the questions, write figures and tables; 1 if one of them failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--only", nargs="+", default=list(QUESTIONS), choices=QUESTIONS)
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"warning: the load of this machine is {load:.1f} before anything was started", file=sys.stderr)
    start = time.perf_counter()
    failed = [question for question in arguments.only if run(question, out, quick=arguments.quick)]
    for path in report_cpu.write(out / "cpu", out / "cpu"):
        print(path)
    print(
        f"{len(arguments.only) - len(failed)} of {len(arguments.only)} questions in {time.perf_counter() - start:.0f} s"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
