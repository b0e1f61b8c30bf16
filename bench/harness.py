"""What every benchmark shares: interleaved timing, pinned threads, the environment record, one row format.

Machines are noisy, so providers are timed in turn within one process (A B A B ...) and compared by the ratio of
neighbours; absolute microseconds are for orientation only. A pool of threads keeps the size that it started with, so
each thread count has a process of its own (`pinned`, `bench.suite`).

A row keeps the time of every round (``raw_us``; where it has a ratio, ``ours_us`` or ``theirs_us`` of the same rounds),
and its quantiles, ratio and interval are of these very numbers, so that anyone can take them again (`differing`).
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastent.grokking.train import storage
from fastent.grokking.train.environment import commit, describe_environment, version
from fastent.grokking.train.storage import write_atomically

Row = dict[str, Any]

ROOT = Path(__file__).parent.parent
POOLS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
# Seconds for which the threads of an idle pool may go on spinning, with room: OpenBLAS's for 2^28 cycles, 0.1 s.
SPINNING = 0.25
FAR = 5.0
# Ceilings of a GPU: what a copy moves, and what the full product executes; the second is a peer of the kernels too.
COPY, PRODUCT = "copy", "cuBLAS float64 product"
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
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Seconds per call of each provider, and those of `ours` in the same rounds.

    Providers that take more than `FAR` times as long as `ours` are measured apart from the others, in a quarter of
    `budget`: they would take the time for the rounds that close comparisons need.
    """
    single = {name: min(_seconds(call), _seconds(call)) for name, call in providers.items()}
    near = [name for name in providers if single[name] <= FAR * single[ours]]
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


def bootstrap(n: int, statistic: Callable[[np.ndarray], np.ndarray]) -> tuple[float, float]:
    """95 % interval of a statistic of n observations, which gets their places (2000, n) and gives (2000,)."""
    drawn = np.random.default_rng(0).integers(n, size=(2000, n))
    low, high = np.quantile(statistic(drawn), [0.025, 0.975])
    return float(low), float(high)


def median_interval(values: np.ndarray) -> tuple[float, float, float]:
    """Median and its 95 % bootstrap interval."""
    spans = bootstrap(len(values), lambda drawn: np.median(values[drawn], axis=1))
    return float(np.median(values)), *spans


def ratio(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float, float]:
    """Median of the round-by-round ratio of two timings, and its interval."""
    return median_interval(ours / theirs)


def raw(seconds: np.ndarray) -> list[float]:
    """Microseconds of each round, to the five digits that a row keeps."""
    return [float(f"{1e6 * value:.5g}") for value in seconds]


def ratio_columns(ours: np.ndarray, theirs: np.ndarray, *, row: str | None = "theirs") -> Row:
    """`ratio` as columns of a row, with the rounds of both but of the one that the row keeps as its own, `row`."""
    rounds = {"ours": raw(ours), "theirs": raw(theirs)}
    return _ratio(**rounds) | {f"{name}_us": us for name, us in rounds.items() if name != row}


def _ratio(ours: list[float], theirs: list[float]) -> Row:
    middle, low, high = ratio(np.array(ours), np.array(theirs))
    return {"ratio": round(middle, 4), "ratio_low": round(low, 4), "ratio_high": round(high, 4)}


def quantiles(seconds: np.ndarray) -> Row:
    """Microseconds at the 20th, 50th and 80th percentile, and of each round."""
    us = raw(seconds)
    return _quantiles(us) | {"rounds": len(us), "raw_us": us}


def _quantiles(us: list[float]) -> Row:
    low, middle, high = np.quantile(us, [0.2, 0.5, 0.8])
    return {"us_p20": round(low, 2), "us_p50": round(middle, 2), "us_p80": round(high, 2)}


def differing(rows: list[Row]) -> list[str]:
    """Say which columns of rows do not follow from the rounds that these keep; rows without any are passed over."""
    found = []
    for row in rows:
        again = _quantiles(row["raw_us"]) if "raw_us" in row else {}
        if "ours_us" in row or "theirs_us" in row:
            pair = [row[name] if name in row else row["raw_us"] for name in ("ours_us", "theirs_us")]
            if "ratio" in row:
                again |= _ratio(*pair)
            else:
                names = ("slowdown", "slowdown_low", "slowdown_high")
                again |= {name: x - 1.0 for name, x in zip(names, ratio(*map(np.array, pair)), strict=True)}
        wrong = [
            f"{key} {row.get(key)}, of its rounds {value}"
            for key, value in again.items()
            if row.get(key) != value
        ]
        if wrong:
            found.append(f"{row.get('op')} {row.get('provider')}: {'; '.join(wrong)}")
    return found


def columns(h: Tensor) -> Row:
    """Shape and dtype of activations (..., n, d) as columns of a row."""
    return {"n": h.shape[-2], "d": h.shape[-1], "dtype": str(h.dtype).removeprefix("torch.")}


def environment(*packages: str | None) -> Row:
    """Machine and versions, for every row, and those of the distributions `packages` (None is passed over)."""
    cuda = torch.cuda.is_available()
    known = describe_environment("cuda" if cuda else "cpu")
    return {
        "device": known["device" if cuda else "cpu"],
        "driver": _driver() if cuda else None,
        "cores": os.cpu_count(),
        **{name: known[name] for name in ("python", "torch", "numpy", "triton")},
        **{package: version(package) for package in packages if package},
        "threads": known["threads"],
        "load": round(os.getloadavg()[0], 2),  # above the threads of the benchmark: others were running
        "commit": recorded_commit(),
        "changes": recorded_changes(),
    }


def recorded_commit() -> str | None:
    """Seven digits of the checkout's commit, or of the variable COMMIT where there is no checkout.

    "-dirty" follows where the tree has other changes than in what measuring writes (`WRITTEN`).
    """
    known = commit() or os.environ.get("COMMIT")
    if known is None:
        return None
    dirty = known.endswith("-dirty") if commit() is None else recorded_changes() is not None
    return known[:7] + ("-dirty" if dirty else "")


WRITTEN = ("bench/results", "docs", "README.md")


@functools.cache
def recorded_changes() -> str | None:
    """Eight digits of a hash of what the tree changes in its commit, new files too; None if nothing, or no checkout."""
    if commit() is None:
        return None
    paths = (".", *(f":(exclude){path}" for path in WRITTEN))

    def git(*command: str) -> bytes:
        return subprocess.run(
            ("git", "--no-optional-locks", *command, "--", *paths), cwd=ROOT, capture_output=True, check=True
        ).stdout

    found = git("diff", "HEAD", "--binary")
    for name in git("ls-files", "-z", "--others", "--exclude-standard").split(b"\0")[:-1]:
        found += name + b"\0" + (ROOT / name.decode()).read_bytes()
    return hashlib.sha256(found).hexdigest()[:8] if found else None


def write_rows(path: Path, rows: list[Row]) -> None:
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def read_rows(path: Path) -> list[Row]:
    """Rows of a file, in order; none if there is no such file."""
    return storage.read_rows(path, 0)[0]


def pinned(threads: int) -> dict[str, str]:
    """Environment variables of a process whose pools have `threads` threads and choose their own kernels."""
    kept = {name: value for name, value in os.environ.items() if name not in OVERRIDES}
    return kept | dict.fromkeys(POOLS, str(threads))


def _driver() -> str | None:
    command = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
