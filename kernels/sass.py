"""What a compiled kernel takes and what its inner loop holds, read from the machine code.

`cuobjdump` and `nvdisasm` ship in the Triton wheel. Counts are of one warp and one trip around the loop.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import triton

_INSTRUCTION = re.compile(r"^\s+(?:/\*[0-9a-f]+\*/)?\s*(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*(?:\.\w+)*)")
_LABEL = re.compile(r"^(\.L\w+):")
_BRANCH = re.compile(r"\bBRA\b.*`\((\.L\w+)\)")


@dataclass(frozen=True)
class Loop:
    """Instructions of an inner loop, by what they keep busy."""

    matrix: dict[str, int]  # matrix instructions by name
    fma: int  # scalar float64 fused multiply-adds
    adds: int  # float64 additions: shift and column sums
    casts: int  # conversions to float64
    shared_loads: int
    shared_stores: int
    loads: int  # from global memory into registers
    async_copies: int  # from global memory into shared: the compiler's pipelining
    shared_bytes: int  # through shared memory, loads and stores, of the 32 lanes
    global_bytes: int  # from global memory, by either way
    barriers: int
    total: int


def disassemble(cubin: bytes) -> tuple[dict[str, int], list[str]]:
    """Resource usage (REG, STACK, SHARED, ...) and the lines of machine code."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        usage = _output(triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(file))
        sass = _output(triton.knobs.nvidia.nvdisasm.path, "-c", str(file))
    return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", usage)}, sass.splitlines()


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def inner_loop(sass: list[str]) -> list[str]:
    """Lines of the shortest loop that holds a matrix instruction or a float64 multiply-add, or none."""
    labels: dict[str, int] = {}
    loops = []
    for number, line in enumerate(sass):
        if label := _LABEL.match(line):
            labels[label[1]] = number
        if (branch := _BRANCH.search(line)) and branch[1] in labels:
            loops.append(sass[labels[branch[1]] : number + 1])
    products = [
        body for body in loops if any(name.startswith(("DMMA", "DFMA")) for name in instructions(body))
    ]
    return min(products, key=len, default=[])


def instructions(sass: Iterable[str]) -> Iterator[str]:
    """Names of the instructions, modifiers included, without their predicates."""
    return (found[1] for line in sass if (found := _INSTRUCTION.match(line)))


def count_loop(sass: list[str]) -> Loop:
    """Count the inner loop of a kernel."""
    names = Counter(instructions(inner_loop(sass)))
    families: Counter[str] = Counter()
    for name, count in names.items():
        families[name.split(".")[0]] += count
    return Loop(
        matrix={
            name: count for name, count in sorted(names.items()) if name.split(".")[0] in ("DMMA", "HMMA")
        },
        fma=families["DFMA"],
        adds=families["DADD"],
        casts=families["F2F"],
        shared_loads=families["LDS"] + families["LDSM"],
        shared_stores=families["STS"],
        loads=families["LDG"],
        async_copies=families["LDGSTS"],
        shared_bytes=sum(_bytes(name) * count for name, count in names.items() if name[:3] in ("LDS", "STS")),
        global_bytes=sum(_bytes(name) * count for name, count in names.items() if name.startswith("LDG")),
        barriers=families["BAR"],
        total=names.total(),
    )


def _bytes(name: str) -> int:
    """Bytes that a load or store moves for a warp: its name ends in the bits of a lane, 32 if it does not say."""
    _, *modifiers = name.split(".")
    bits = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128}
    if name == "LDGDEPBAR":
        return 0
    return 4 * next((bits[modifier] for modifier in modifiers if modifier in bits), 32)


def spills(sass: list[str]) -> int:
    """Local loads and stores of the whole kernel."""
    return sum(name.split(".")[0] in ("STL", "LDL") for name in instructions(sass))
