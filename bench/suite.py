"""All benchmarks of the CPU, one after the other: ``fastent bench [--quick]``, or ``python -m bench.suite``.

Each question is a function of one module and is asked in a process of its own for each thread count, whose pools are
pinned to it. With ``--out DIR`` its rows go to ``DIR/cpu/<question>.jsonl``, and the figures and tables are made anew
from all rows there (`bench.report`); without, its table is printed and nothing is written. ``--provider MODULE:NAME``
takes in one from outside (`bench.providers.invite`): it is in every question of providers, their tables and figures. A
machine that is doing something else gives noise: its load is in every row, and a warning is printed here.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bench.harness import ROOT, Row, pinned, read_rows, write_rows
from bench.providers import invite


@dataclass(frozen=True)
class Question:
    """What is measured and where.

    Attributes
    ----------
    place : str
        Module and function, "entropy.covariance"; it gets whether to be quick, and returns the rows.
    threads, quick_threads : tuple of int
        Thread counts by default.
    changes : mapping
        Environment variables that its process needs besides.
    usual : bool
        Whether it is asked when nothing is chosen.
    """

    place: str
    threads: tuple[int, ...] = (1, 2)
    quick_threads: tuple[int, ...] = (1,)
    changes: Mapping[str, str] = field(default_factory=dict)
    usual: bool = True


# Blocks of memory that are mapped one by one are given back at once.
MAPPED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
QUESTIONS = {
    "imports": Question("counters.imports", (1,)),
    "accuracy": Question("entropy.accuracy", (1,)),
    "memory": Question("counters.memory", (1,), changes=MAPPED),
    "covariance": Question("entropy.covariance"),
    "entropy": Question("entropy.entropy"),
    "eigensolve": Question("entropy.eigensolve"),
    "in_training": Question("monitor.in_training"),
    "monitor": Question("monitor.monitor"),
    "training_batch": Question("monitor.training_batch", (1,)),
    "early_end": Question("monitor.early_end"),
    "training": Question("monitor.training", (2, 1)),
    "forecast": Question("entropy.forecast", (1,)),
    "plan": Question("entropy.plan"),
    "deferred": Question("monitor.deferred", (1,), usual=False),
}


def measure(name: str, *, quick: bool) -> list[Row]:
    """Ask a question in this process, at its thread count."""
    module, _, function = QUESTIONS[name].place.partition(".")
    rows: list[Row] = getattr(importlib.import_module(f"bench.{module}"), function)(quick)
    return rows


def part(name: str, threads: int, *, quick: bool, guests: Sequence[str] = ()) -> list[Row]:
    """Ask a question in a process of its own with so many threads.

    Raises
    ------
    subprocess.CalledProcessError
        If the process fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        line = [
            sys.executable,
            "-m",
            "bench.suite",
            "--only",
            name,
            "--part",
            str(threads),
            "--rows",
            str(rows),
        ]
        line += ["--quick"] if quick else []
        line += ["--provider", *guests] if guests else []
        subprocess.run(line, check=True, cwd=ROOT, env=pinned(threads) | dict(QUESTIONS[name].changes))
        return read_rows(rows)


def ask(
    name: str, *, quick: bool, threads: Sequence[int] | None, guests: Sequence[str] = ()
) -> list[Row] | None:
    """Rows of a question at all its thread counts; None if one of its processes failed."""
    question, start = QUESTIONS[name], time.perf_counter()
    print(f"== {name}", flush=True)
    rows: list[Row] | None = []
    try:
        for count in threads or (question.quick_threads if quick else question.threads):
            rows += part(name, count, quick=quick, guests=guests)
    except subprocess.CalledProcessError as error:
        print(f"{name}: {error}", file=sys.stderr)
        rows = None
    print(f"-- {name}: {time.perf_counter() - start:.0f} s", flush=True)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Ask the questions, print or write what comes out; 1 if one of them failed."""
    parser = argparse.ArgumentParser(
        prog="fastent bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the rows, the figures and the tables"
    )
    usual = [name for name, question in QUESTIONS.items() if question.usual]
    parser.add_argument(
        "--only", nargs="+", default=usual, choices=list(QUESTIONS), help=f"default: {' '.join(usual)}"
    )
    parser.add_argument("--threads", type=int, nargs="+")
    parser.add_argument(
        "--provider", nargs="+", default=(), metavar="MODULE:NAME", help="providers from outside"
    )
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    try:
        for place in arguments.provider:
            invite(place)
    except ValueError as error:
        parser.error(str(error))
    if arguments.part:
        torch.set_num_threads(arguments.part)
        write_rows(arguments.rows, measure(arguments.only[0], quick=arguments.quick))
        return 0
    from bench import report  # not in the processes that measure: matplotlib and more

    load, start = os.getloadavg()[0], time.perf_counter()
    if load > 0.5:
        print(f"warning: the load of this machine is {load:.1f} before anything was started", file=sys.stderr)
    done = 0
    for name in arguments.only:
        rows = ask(name, quick=arguments.quick, threads=arguments.threads, guests=arguments.provider)
        if rows is None:
            continue
        done += 1
        if arguments.out:
            write_rows(arguments.out.resolve() / "cpu" / f"{name}.jsonl", rows)
        else:
            print(report.CPU[name].table(rows))
    if arguments.out:
        print(*report.write_cpu(arguments.out.resolve() / "cpu"), sep="\n")
    print(f"{done} of {len(arguments.only)} questions in {time.perf_counter() - start:.0f} s")
    return int(done < len(arguments.only))


if __name__ == "__main__":
    sys.exit(main())
