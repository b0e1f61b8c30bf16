"""What an evaluation does, counted, not timed: ``python -m bench.counters [--update]``.

What torch is asked for is counted, with torch's own products: NumPy's (`fastent.openblas`) are used on none.
So counts do not depend on the machine, and a test holds them to the committed table (bench/results/counters.json): a
change fails until the table is updated on purpose. Without ``--update`` this prints what differs and ends with 1.

``host_syncs``
    Reads of a number from a tensor, each of which waits on CUDA.
``products``, ``flops``
    Matrix products called, and their operations.
``allocations``, ``bytes``, ``peak``
    Blocks of `LARGE` bytes or more that torch hands out, their sum, and the most of them at one time.

Registers, spills and instructions of the kernels have a table of their own, bench/results/aot.txt.
"""

from __future__ import annotations

import argparse
import difflib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fastent
from fastent import openblas

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


class _Operations(TorchDispatchMode):
    """Counts what is dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.host_syncs = self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        self.host_syncs += name.startswith("aten._local_scalar_dense")
        self.products += name.startswith(PRODUCTS)
        return func(*args, **(kwargs or {}))


def count(call: Callable[[], object]) -> dict[str, int]:
    """Count what one call does, after another that warms up."""
    call()
    with _Operations() as operations:
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
        "host_syncs": operations.host_syncs,
        "products": operations.products,
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
        with patch.object(openblas, "preferred", lambda x: False):
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
    monitor = fastent.SpectralEntropyMonitor(model, normal(512, 16), "1", every=1)
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
