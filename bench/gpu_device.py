"""What the GPU benchmark knows of its device: timing there, its clocks, and what to say where there is none.

A row that has no meaning on a device is written with ``"skipped"`` and the reason, and without a figure.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from bench.harness import Row, environment, write_rows
from fastent.grokking.train.stack import capture_cuda_graph

NO_GPU = "no CUDA device: this measures one"

# Datasheet of an H200 (SXM): the floors of the kernel's times refer to them. H100 SXM has the same tensor rate.
PEAK_FLOPS = 67e12  # float64 on the tensor cores
PEAK_BYTES = 4.3e12  # a copy, measured; datasheet 4.8


@dataclass
class Session:
    """One run of the benchmark: where, how long, and the rows so far."""

    device: torch.device
    quick: bool
    out: Path
    deadline: float  # of time.monotonic(); parts stop before it and say so
    rows: list[Row] = field(default_factory=list)
    part: str = ""
    _environment: Row = field(default_factory=dict)

    @property
    def cuda(self) -> bool:
        """Whether there is a GPU to measure."""
        return self.device.type == "cuda"

    @property
    def late(self) -> bool:
        """Whether the time of the whole run is used up."""
        return time.monotonic() > self.deadline

    def add(self, op: str, **values: object) -> None:
        """Record a row, with the environment, and write all rows so far: nothing is lost to a crash."""
        if not self._environment:
            self._environment = device_environment(self.device)
        self.rows.append({"part": self.part, "op": op, **values, **clocks(self.device), **self._environment})
        write_rows(self.out / "gpu.jsonl", self.rows)

    def skip(self, op: str, reason: str, **values: object) -> None:
        """Record that something was not measured, and why."""
        self.add(op, skipped=reason, **values)


def device_environment(device: torch.device) -> Row:
    """Machine and versions, the device's included."""
    row = environment()
    row["cuda"] = torch.version.cuda
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        row |= {
            "device": torch.cuda.get_device_name(device),
            "capability": f"sm_{properties.major}{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
        }
    return row


def clocks(device: torch.device) -> Row:
    """Clocks now in MHz, of the multiprocessors and the memory; nothing on the CPU."""
    if device.type != "cuda":
        return {"sm_mhz": None, "memory_mhz": None}
    command = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem", "--format=csv,noheader,nounits"]
    with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError):
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
        sm, memory = (int(value) for value in found.splitlines()[device.index or 0].split(","))
        return {"sm_mhz": sm, "memory_mhz": memory}
    return {"sm_mhz": None, "memory_mhz": None}


def device_times(
    session: Session,
    call: Callable[[], object],
    *,
    rounds: int = 20,
    cold: bool = False,
    graph: bool = False,
    target: float = 1e-3,
) -> np.ndarray:
    """Seconds of `call` on the device, shape (rounds,).

    On CUDA by events, around as many calls as last about `target` seconds, queued behind a pause so that the host is
    ahead; with `graph` they are captured once and replayed, so that short kernels are not timed by their launches;
    with `cold` one call a round, after the second-level cache was overwritten. On the CPU by the clock.
    """
    if not session.cuda:
        return host_times(call, rounds=rounds)
    call()
    cache = torch.empty(256 * 2**20 if cold else 1, dtype=torch.int8, device=session.device)
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    repeats = 1 if cold else max(1, min(200, int(target / max(time.perf_counter() - start, 1e-7))))

    def several() -> None:
        for _ in range(repeats):
            call()

    queue: Callable[[], object] = capture_cuda_graph(several)[0] if graph else several
    pairs = []
    for _ in range(rounds):
        if cold:
            cache.zero_()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        torch.cuda._sleep(200_000)
        events[0].record()
        queue()
        events[1].record()
        pairs.append(events)
    torch.cuda.synchronize()
    return np.array([first.elapsed_time(last) * 1e-3 / repeats for first, last in pairs])


def host_times(call: Callable[[], object], *, rounds: int = 20) -> np.ndarray:
    """Seconds that `call` keeps the thread that makes it, shape (rounds,); the device is idle before each."""
    seconds = []
    call()
    for _ in range(rounds):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return np.array(seconds)


def activations(
    n: int, d: int, dtype: torch.dtype, device: torch.device, *, batch: int | None = None
) -> torch.Tensor:
    """Columns with spreads from 0.1 to 10 about 1, the same on every device."""
    generator = torch.Generator().manual_seed(n + d)
    shape = (n, d) if batch is None else (batch, n, d)
    if n * d * (batch or 1) > 2**26:  # too long to draw on the host
        x = torch.randn(shape, device=device, dtype=torch.float32)
    else:
        x = torch.randn(shape, generator=generator).to(device)
    return (x * torch.logspace(-1, 1, d, device=device) + 1.0).to(dtype)
