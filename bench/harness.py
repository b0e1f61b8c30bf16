"""What every benchmark shares: interleaved timing, the environment record, one row format.

Machines are noisy, so providers are timed in turn within one process (A B A B ...) and compared by the ratio of
neighbours; absolute microseconds are for orientation only.
"""

from __future__ import annotations

import json
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

Row = dict[str, Any]


def interleaved(
    providers: Mapping[str, Callable[[], object]], *, rounds: int = 25, target: float = 0.02
) -> dict[str, np.ndarray]:
    """Seconds per call, shape (rounds,), of each provider; every round times each of them once, in turn.

    Parameters
    ----------
    providers : mapping of name to callable
        All are called once before the clock starts, as warm-up.
    rounds : int
        Rounds counted.
    target : float
        Seconds that one measurement should last: short calls are repeated within it.
    """
    repeats = {}
    for name, call in providers.items():
        call()
        start = time.perf_counter()
        call()
        repeats[name] = max(1, round(target / max(time.perf_counter() - start, 1e-7)))
    seconds: dict[str, list[float]] = {name: [] for name in providers}
    for _ in range(rounds):
        for name, call in providers.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            seconds[name].append((time.perf_counter() - start) / repeats[name])
    return {name: np.array(values) for name, values in seconds.items()}


def ratio(ours: np.ndarray, theirs: np.ndarray, *, resamples: int = 2000) -> tuple[float, float, float]:
    """Median of the round-by-round ratio of two timings and its 95 % bootstrap interval."""
    ratios = ours / theirs
    draws = np.random.default_rng(0).choice(ratios, (resamples, len(ratios)))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    return float(np.median(ratios)), float(low), float(high)


def quantiles(seconds: np.ndarray) -> Row:
    """Microseconds at the 20th, 50th and 80th percentile."""
    low, middle, high = np.quantile(seconds * 1e6, [0.2, 0.5, 0.8])
    return {"us_p20": round(low, 2), "us_p50": round(middle, 2), "us_p80": round(high, 2)}


def environment() -> Row:
    """Machine and versions, for every row."""
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
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "threads": torch.get_num_threads(),
        "commit": _output("git", "rev-parse", "--short", "HEAD"),
    }


def write_rows(path: Path, rows: list[Row]) -> None:
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


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
