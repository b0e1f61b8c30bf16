"""What an evaluation does, counted, not timed: ``python -m bench.counters [--update]``.

What torch is asked for is counted, with torch's own products: NumPy's (`fastent.linalg`) are used on none.
So counts do not depend on the machine, and a test holds them to the committed table (bench/results/counters.json): a
change fails until the table is updated on purpose. Without ``--update`` this prints what differs and ends with 1.

``host_syncs``
    Reads of a number from a tensor, each of which waits on CUDA.
``products``, ``flops``
    Matrix products called, and their operations.
``allocations``, ``bytes``, ``peak``
    Blocks of `LARGE` bytes or more that torch hands out, their sum, and the most of them at one time.

Registers, spills and instructions of the kernels have a table of their own, bench/results/aot.txt.

Two questions of `bench.suite` are counted too:

`memory`
    Peak memory of one call beside its input: the kernel's high-water mark of the process (``VmHWM``, reset before each
    call through ``/proc/self/clear_refs``) above what was resident before, after a call on a small input. Blocks from
    64 KiB on are mapped one by one (`bench.suite.MAPPED`), so what an earlier call has freed is not there to be used
    again. Linux alone has this. And how often the host reads what torch has computed (`host_reads`).
`imports`
    Time, resident memory and modules of ``import fastent`` beyond ``import torch``, each in a fresh interpreter. The
    acceptance is `IMPORT_LIMIT`; which modules may not come with it is a test (tests/bench/test_counters.py).
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fastent
from bench.harness import ROOT, Row, environment, pinned, quantiles
from bench.providers import ENTROPY, OURS, Shape, able, chosen
from fastent import linalg
from fastent.monitor import isolation

TABLE = Path(__file__).parent / "results" / "counters.json"
LARGE = 4096
PRODUCTS = ("aten.mm.", "aten.addmm.", "aten.bmm.", "aten.baddbmm.", "aten.mv.")

IMPORTS = """
import sys, torch, numpy
before = set(sys.modules)
import fastent
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(*sorted(new - set(sys.stdlib_module_names) - {"fastent", "torch", "numpy"}))
"""


READING = ("aten._local_scalar_dense", "aten._linalg_eigh", "aten._linalg_svd", "aten.nonzero", "aten.equal")

MEMORY_SHAPES = (Shape(65536, 128, quick=True), Shape(512, 1024, quick=True), Shape(512, 4096))
MEMORY_LIMIT = 16 * 2**20  # for fastent at 65,536 x 128

IMPORT_LIMIT = 0.15  # seconds
# What, beyond what; torch imports NumPy only when it is asked for an array.
IMPORT_CASES = (("fastent", "torch"), ("fastent", "torch, numpy"))
IMPORT_PROGRAM = """
import importlib, json, resource, sys, time
for name in sys.argv[1].split(", "):
    importlib.import_module(name)
modules = len(sys.modules)
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
for name in sys.argv[2].split(", "):
    importlib.import_module(name)
seconds = time.perf_counter() - start
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([seconds, (after - before) * 1024, len(sys.modules) - modules]))
"""


class _Calls(TorchDispatchMode):
    """Names of the operations that are dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))

    def of(self, *prefixes: str) -> int:
        """Count those that begin with one of `prefixes`."""
        return sum(name.startswith(prefixes) for name in self.names)


def count(call: Callable[[], object]) -> dict[str, int]:
    """Count what one call does, after another that warms up."""
    call()
    with _Calls() as calls:
        call()
    with FlopCounterMode(display=False) as flops:
        call()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        call()
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    changes = [change for change in changes if abs(change) >= LARGE]
    held = peak = 0
    for change in changes:
        held += change
        peak = max(peak, held)
    new = [change for change in changes if change > 0]
    return {
        "host_syncs": calls.of("aten._local_scalar_dense"),
        "products": calls.of(*PRODUCTS),
        "flops": flops.get_total_flops(),
        "allocations": len(new),
        "bytes": sum(new),
        "peak": peak,
    }


def counts() -> dict[str, Any]:
    """Count every case, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        # A monitor's evaluation hides from dispatch modes, these counters among them.
        seen = patch.object(isolation, "_disable_current_modes", contextlib.nullcontext)
        with patch.object(linalg, "openblas_preferred", lambda x, product_edge=None: False), seen:
            found: dict[str, Any] = {name: count(call) for name, call in _cases().items()}
    finally:
        torch.set_num_threads(threads)
    output = subprocess.run([sys.executable, "-c", IMPORTS], check=True, stdout=subprocess.PIPE, text=True)
    found["packages that import fastent brings beside torch and numpy"] = output.stdout.split()
    return found


def _cases() -> dict[str, Callable[[], object]]:
    def normal(n: int, d: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(n, d, generator=torch.Generator().manual_seed(0)).to(dtype)

    short, tall, wide = normal(512, 128), normal(4096, 128, torch.bfloat16), normal(128, 1024)
    double, large = normal(512, 128, torch.float64), normal(16384, 128)
    model = nn.Sequential(nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 8))
    # In line, so that the counts hold the whole evaluation, not a thread's share of it.
    monitor = fastent.SpectralEntropyMonitor(model, normal(512, 16), "1", every=1, mode="sync")
    steps = iter(range(1_000_000))
    return {
        "spectral_entropy, 512 x 128 float32": lambda: fastent.spectral_entropy(short),
        "spectral_entropy, 512 x 128 float64": lambda: fastent.spectral_entropy(double),
        "spectral_entropy, 4096 x 128 bfloat16": lambda: fastent.spectral_entropy(tall),
        "spectral_entropy, 16384 x 128 float32": lambda: fastent.spectral_entropy(large),
        "spectral_entropy, 128 x 1024 float32": lambda: fastent.spectral_entropy(wide),
        "covariance, 512 x 128 float32": lambda: fastent.covariance(short),
        "Moments.update twice, 512 x 128 float32": lambda: fastent.Moments().update(short).update(short),
        "monitor step, one layer of 512 x 128": lambda: monitor.step(next(steps)),
    }


def host_reads(call: Callable[[], object]) -> int:
    """Count the reads of one call."""
    numpy = Tensor.numpy
    with _Calls() as calls:

        def counted(self: Tensor, **options: Any) -> Any:
            calls.names.append(READING[0])
            return numpy(self, **options)

        with patch.object(Tensor, "numpy", counted):
            call()
    return calls.of(*READING)


def extra_bytes(call: Callable[[], object]) -> int | None:
    """Bytes by which `call` raises what is resident, at its peak; None where the mark cannot be reset."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        call()
        return max(0, _status("VmHWM") - before)
    except OSError:
        return None


def memory(quick: bool) -> list[Row]:
    """Rows of all shapes."""
    rows = []
    for shape in chosen(MEMORY_SHAPES, quick):
        h = shape.tensor()
        case = {"op": "memory", **shape.columns}
        calls, left_out = able(ENTROPY, h[:256, :32], case)
        for provider, call in calls.items():
            row = {**case, "provider": provider.name, "quantity": provider.quantity}
            row["input_bytes"] = h.numel() * h.element_size()
            try:
                row["extra_bytes"] = extra_bytes(lambda call=call, h=h: call(h))
                row["host_reads"] = host_reads(lambda call=call, h=h: call(h))
            except Exception as error:  # a guest must not end the benchmark
                row["skipped"] = f"{type(error).__name__}: {error}"
            if provider.name == OURS and shape.n == 65536:
                row["limit"] = MEMORY_LIMIT
            rows.append(row | environment(provider.package))
        rows += [row | environment() for row in left_out]
    return rows


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


def imports(quick: bool) -> list[Row]:
    """Rows of all cases; the files are in the page cache after one round that is not counted."""
    found: dict[tuple[str, str], list[list[float]]] = {case: [] for case in IMPORT_CASES}
    for counted in range(-1, 5 if quick else 15):
        for case in IMPORT_CASES:
            line = [sys.executable, "-c", IMPORT_PROGRAM, case[1], case[0]]
            output = subprocess.run(
                line, check=True, cwd=ROOT, env=pinned(1), stdout=subprocess.PIPE, text=True
            ).stdout
            if counted >= 0:
                found[case].append(json.loads(output))
    rows = []
    for (name, beyond), values in found.items():
        seconds, extra, modules = np.array(values).T
        row = {"op": "import", "provider": name, "beyond": beyond, **quantiles(seconds)}
        row |= {"extra_bytes": int(np.median(extra)), "modules": int(modules[0])}
        rows.append(row | {"limit_us": IMPORT_LIMIT * 1e6} | environment())
    return rows


def main() -> int:
    """Compare with the table, or write it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--update", action="store_true", help="write the table")
    text = json.dumps(counts(), indent=1) + "\n"
    if parser.parse_args().update:
        TABLE.write_text(text)
        return 0
    committed = TABLE.read_text()
    lines = difflib.unified_diff(
        committed.splitlines(), text.splitlines(), str(TABLE.name), "now", lineterm="", n=3
    )
    print(*lines, sep="\n")
    return int(text != committed)


if __name__ == "__main__":
    sys.exit(main())
