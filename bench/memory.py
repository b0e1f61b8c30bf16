"""Peak memory of one call beside its input: ``python -m bench.memory [--quick] [--out FILE]``.

The kernel's high-water mark of this process (``VmHWM``, reset before each call through ``/proc/self/clear_refs``) above
what was resident before, after a call on a small input. Blocks from 64 KiB on are mapped one by one
(``MALLOC_MMAP_THRESHOLD_``), so what an earlier call has freed is not there to be used again. Linux alone has this.

And how often the host reads what torch has computed (`bench.host_reads`), since that too is counted, not timed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bench.cases import Shape
from bench.harness import Row, command, environment
from bench.host_reads import host_reads
from bench.providers import ENTROPIES, entropies
from bench.tables import memory_table

SHAPES = (Shape(65536, 128, quick=True), Shape(512, 1024, quick=True), Shape(512, 4096))
LIMIT = 16 * 2**20  # for fastent at 65,536 x 128
MAPPED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def extra_bytes(call: Callable[[], object]) -> int | None:
    """Bytes by which `call` raises what is resident, at its peak; None where the mark cannot be reset."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        call()
        return max(0, _status("VmHWM") - before)
    except OSError:
        return None


def measure(quick: bool) -> list[Row]:
    """Rows of all shapes."""
    rows = []
    for shape in SHAPES:
        if quick and not shape.quick:
            continue
        h = shape.tensor()
        for provider, call in entropies().items():
            call(h[:256, :32])
            row = {"op": "memory", "provider": provider.name, "quantity": provider.quantity, **shape.columns}
            row["extra_bytes"] = extra_bytes(lambda call=call, h=h: call(h))
            row["host_reads"] = host_reads(lambda call=call, h=h: call(h))
            row["input_bytes"] = h.numel() * h.element_size()
            if provider is ENTROPIES[0] and shape.n == 65536:
                row["limit"] = LIMIT
            rows.append(row | environment(*([provider.package] if provider.package else [])))
    return rows


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


if __name__ == "__main__":
    command("bench.memory", __doc__, measure, memory_table, threads=(1,), changes=MAPPED)
