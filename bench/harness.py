"""What every benchmark shares: interleaved timing, pinned threads, the environment record, one row format.

Machines are noisy, so providers are timed in turn within one process (A B A B ...) and compared by the ratio of
neighbours; absolute microseconds are for orientation only. A pool of threads keeps the size that it started with, so
each thread count has a process of its own (`command`).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

Row = dict[str, Any]
Measure = Callable[[bool], list[Row]]

ROOT = Path(__file__).parent.parent
POOLS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
# Seconds for which the threads of an idle pool may go on spinning, with room: OpenBLAS's for 2^28 cycles, 0.1 s.
SPINNING = 0.25
# A library that was told to use another processor's kernels is not at its best.
OVERRIDES = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")


def interleaved(
    providers: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 25,
    target: float = 0.02,
    budget: float | None = None,
) -> dict[str, np.ndarray]:
    """Seconds per call, shape (rounds,), of each provider; every round times each of them once, in turn.

    Parameters
    ----------
    providers : mapping of name to callable
        All are called once before the clock starts, as warm-up (a call of more than half a second: its time counts
        for nothing but the number of rounds). With several threads, once more after a pause before each measurement:
        the pools of two libraries disturb each other.
    rounds : int
        Rounds counted.
    target : float
        Seconds that one measurement should last: short calls are repeated within it.
    budget : float, optional
        Seconds that all rounds together should last at most: slow calls get fewer rounds, but three at least.
    """
    seconds_once, repeats = {}, {}
    for name, call in providers.items():
        took = _seconds(call)
        if took < 0.5:
            took = max(_seconds(call), 1e-7)
        seconds_once[name], repeats[name] = took, max(1, round(target / took))
    if budget is not None:
        once = sum(repeats[name] * took for name, took in seconds_once.items())
        rounds = min(rounds, max(3, int(budget / once)))
    seconds: dict[str, list[float]] = {name: [] for name in providers}
    for _ in range(rounds):
        for name, call in providers.items():
            if settle() and seconds_once[name] < 0.5:
                call()  # wakes its own pool
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            seconds[name].append((time.perf_counter() - start) / repeats[name])
    return {name: np.array(values) for name, values in seconds.items()}


def beside(
    ours: str,
    providers: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 25,
    budget: float,
    far: float = 5.0,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Seconds per call of each provider, and those of `ours` in the same rounds.

    Providers that take more than `far` times as long as `ours` are measured apart from the others, in a quarter of
    `budget`: they would take the time for the rounds that close comparisons need.
    """
    single = {name: min(_seconds(call), _seconds(call)) for name, call in providers.items()}
    near = [name for name in providers if single[name] <= far * single[ours]]
    apart = [name for name in providers if name not in near]
    groups = [(near, 0.75), ([ours, *apart], 0.25)] if apart else [(near, 1.0)]
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for names, share in groups:
        seconds = interleaved({name: providers[name] for name in names}, rounds=rounds, budget=share * budget)
        found = {name: (values, seconds[ours]) for name, values in seconds.items()} | found
    return {name: found[name] for name in providers}


def settle() -> bool:
    """Let the pools of all libraries come to rest where they have several threads; whether they have.

    NumPy's would spin on the cores that torch's needs, and the other way round. At most `SPINNING`; less where the
    system says how long each thread has run (Linux).
    """
    if torch.get_num_threads() == 1:
        return False
    deadline = time.perf_counter() + SPINNING
    before = None
    while time.perf_counter() < deadline:
        time.sleep(0.01)  # twice the time after which the system counts a running thread again
        now = _seconds_of_others()
        if now is not None and now == before:
            break
        before = now
    return True


def _seconds_of_others() -> dict[str, str] | None:
    """How long each other thread of this process has run, by its number."""
    main = str(threading.get_native_id())
    try:
        return {
            task.name: (task / "schedstat").read_text().split()[0]
            for task in Path("/proc/self/task").iterdir()
            if task.name != main
        }
    except OSError:  # another system, or a thread that has just ended
        return None


def _seconds(call: Callable[[], object]) -> float:
    settle()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def median_interval(values: np.ndarray, *, resamples: int = 2000) -> tuple[float, float, float]:
    """Median and its 95 % bootstrap interval."""
    draws = np.random.default_rng(0).choice(values, (resamples, len(values)))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    return float(np.median(values)), float(low), float(high)


def ratio(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float, float]:
    """Median of the round-by-round ratio of two timings, and its interval."""
    return median_interval(ours / theirs)


def ratio_columns(ours: np.ndarray, theirs: np.ndarray) -> Row:
    """`ratio` as columns of a row."""
    middle, low, high = ratio(ours, theirs)
    return {"ratio": round(middle, 4), "ratio_low": round(low, 4), "ratio_high": round(high, 4)}


def quantiles(seconds: np.ndarray) -> Row:
    """Microseconds at the 20th, 50th and 80th percentile."""
    low, middle, high = np.quantile(seconds * 1e6, [0.2, 0.5, 0.8])
    return {"us_p20": round(low, 2), "us_p50": round(middle, 2), "us_p80": round(high, 2)}


def environment(*packages: str) -> Row:
    """Machine and versions, for every row; `packages` are distributions whose versions are recorded too."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else _processor(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if cuda
        else None,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "triton": triton_version,
        **{package: version(package) for package in packages},
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),  # above the threads of the benchmark: others were running
        "commit": _output("git", "rev-parse", "--short", "HEAD"),
    }


def version(package: str) -> str | None:
    """Version of an installed distribution, None if it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def write_rows(path: Path, rows: list[Row]) -> None:
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_rows(path: Path) -> list[Row]:
    """Rows of a file, in order; none if there is no such file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def command(
    module: str,
    description: str | None,
    measure: Measure,
    show: Callable[[list[Row]], str],
    *,
    threads: Sequence[int] = (1, 2),
    quick_threads: Sequence[int] = (1,),
    changes: Mapping[str, str] | None = None,
) -> None:
    """Command line of a benchmark: a process for each thread count, a table on the screen, rows in a file.

    Parameters
    ----------
    module : str
        Name for ``python -m``, such as "bench.covariance".
    description : str
        Its docstring.
    measure : callable
        Rows of one thread count, measured in this process; gets whether to be quick.
    show : callable
        Table, as text, of all rows.
    threads, quick_threads : sequence of int
        Thread counts measured by default.
    changes : mapping, optional
        Environment variables that a process needs besides.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds")
    parser.add_argument("--threads", type=int, nargs="+")
    parser.add_argument("--out", type=Path, help="file for the rows")
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        torch.set_num_threads(arguments.part)
        write_rows(arguments.out, measure(arguments.quick))
        return
    counts = arguments.threads or (quick_threads if arguments.quick else threads)
    rows = []
    for count in counts:
        rows += part(module, count, *(["--quick"] if arguments.quick else []), changes=changes)
    print(show(rows))
    if arguments.out:
        write_rows(arguments.out, rows)


def part(module: str, threads: int, *options: str, changes: Mapping[str, str] | None = None) -> list[Row]:
    """Rows of one thread count from a process of its own; `changes` are added to its environment."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.jsonl"
        line = [sys.executable, "-m", module, "--part", str(threads), "--out", str(out), *options]
        subprocess.run(line, check=True, cwd=ROOT, env=pinned(threads) | dict(changes or {}))
        return read_rows(out)


def pinned(threads: int) -> dict[str, str]:
    """Environment variables of a process whose pools have `threads` threads and choose their own kernels."""
    kept = {name: value for name, value in os.environ.items() if name not in OVERRIDES}
    return kept | dict.fromkeys(POOLS, str(threads))


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return names[0].split(":", 1)[1].strip() if names else platform.processor()


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
