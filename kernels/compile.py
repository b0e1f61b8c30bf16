"""Ahead-of-time compilation of every kernel, on a machine that needs no GPU.

Each launch is specialised as Triton's launcher would do it (types, alignment, values equal to 1), compiled
for an architecture and disassembled (`cuobjdump` and `nvdisasm` ship in the Triton wheel; counts are of one warp and
one trip around the inner loop). The gates on what comes out:

- `DMMA`, the float64 matrix instruction, in the product's inner loop, and no `DFMA` there: every dtype runs
  on the tensor cores;
- no stack and no local loads or stores: nothing spills; of input whose columns lie apart, nothing in the loop;
- at most 255 registers, and shared memory within the block limit of the architecture;
- in Gluon, where the layouts are ours, fewer wavefronts of shared memory than cycles of products, so that the products
  bound the loop.

Both are of a program and a trip: `fastent.kernels.ptx` runs one, and the addresses of the lanes say in which banks
they meet; the cycles are a multiprocessor's at 256 FLOP (H100 with DMMA.16x8x16; half as fast with the 8x8x4 shapes).

``python -m fastent.kernels.compile`` prints the table and exits with 1 where a gate fails. ``--check FILE`` compares
it with a table that was written before and shows the lines that differ. It says nothing of speed, and the
interpreter cannot be used: unset TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from .covariance import LAUNCHES
from .launch import IN_TRITON, TABLE, Launch, Side, output, workspace
from .ptx import Machine, wavefronts

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
LAYOUTS = ("contiguous", "transposed", "odd", "strided")
SHARED_LIMIT = {80: 166912, 90: 232448, 100: 232448}  # bytes a block may have
MAX_REGISTERS = 255
# Triton 3.6 and 3.7 abort on a float64 product for sm_100.
ARCHS = (80, 90) if triton.__version__.startswith(("3.6.", "3.7.")) else (80, 90, 100)

_PRODUCTS = ("covariance", "gluon", "gram")  # the kernels with a matrix product

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
    spills: int  # local loads and stores
    total: int


@dataclass(frozen=True)
class Resources:
    """What one kernel takes on one architecture."""

    kernel: str
    dtype: str  # of the input
    layout: str
    edge: int | None  # of the output tile; the means have none
    warps: int
    stage: (
        str  # "part" sums a part and, where it is the last to come, adds them all; "whole" has nothing to add
    )
    spread: bool  # the participation ratio included
    arch: int
    registers: int
    stack: int  # bytes
    spills: int  # local loads and stores
    shared: int  # bytes
    loop: Loop
    cycles: int  # of the products of a program and trip
    wavefronts: int  # of shared memory, beside them

    @property
    def faults(self) -> tuple[str, ...]:
        """The gates this kernel fails, in words."""
        found = []
        if self.kernel in _PRODUCTS and not any(name.startswith("DMMA") for name in self.loop.matrix):
            found.append("no DMMA in the inner loop")
        if self.loop.fma:
            found.append(f"{self.loop.fma} DFMA in the inner loop")
        if self.kernel == "gluon" and self.wavefronts >= self.cycles:
            found.append(f"{self.wavefronts} wavefronts for {self.cycles} cycles of products")
        # For columns that lie apart, those of the result do not stay in registers through every loop.
        apart = self.layout in ("transposed", "strided")
        if self.loop.spills or ((self.stack or self.spills) and not apart):
            found.append(f"spills: {self.stack} bytes of stack, {self.spills} local accesses")
        if self.registers > MAX_REGISTERS:
            found.append(f"{self.registers} registers")
        if self.shared > SHARED_LIMIT[self.arch]:
            found.append(f"{self.shared} bytes of shared memory")
        return tuple(found)


def launches(dtype: torch.dtype, layout: str) -> Iterator[Launch]:
    """Every launch of the table, with Gluon and without, for one input dtype and layout, on tensors without data.

    With the spread and without for contiguous input. For the others with it, which takes more registers, and
    where d is no multiple of 16, so that fewer addresses are known to be aligned.
    """
    yield from _launches_of_table(dtype, layout)
    kept = TABLE["covariance"]
    TABLE["covariance"] = IN_TRITON
    try:
        yield from _launches_of_table(dtype, layout)
    finally:
        TABLE["covariance"] = kept


def _launches_of_table(dtype: torch.dtype, layout: str) -> Iterator[Launch]:
    less, spreads = (0, (False, True)) if layout == "contiguous" else (3, (True,))
    for side, entries in TABLE.items():
        smallest = 0
        for entry in entries:
            largest = entry.largest or smallest + 1024
            for m, length in ((largest, 64), (smallest + 32, 4096)):  # one part, parts
                sizes = (m - less, length) if side == "covariance" else (m, length - less)
                for spread in spreads:
                    yield from _launches_of(side, *sizes, dtype, layout, spread)
            smallest = largest


def _launches_of(
    side: Side, m: int, length: int, dtype: torch.dtype, layout: str, spread: bool
) -> list[Launch]:
    n, d = (length, m) if side == "covariance" else (m, length)
    h = _empty(n, d, dtype, layout)
    out = output(side, 1, n, d, h.device, spread=spread)
    work = workspace(side, 1, n, d, h.device, spread=spread)
    return LAUNCHES[side](h, out, work, 1 / n)


def _empty(n: int, d: int, dtype: torch.dtype, layout: str) -> Tensor:
    if layout == "transposed":
        return torch.empty((1, d, n), dtype=dtype, device="meta").mT
    if layout == "odd":  # nothing is aligned
        return torch.empty((1, n, d + 1), dtype=dtype, device="meta")[..., 1:]
    if layout == "strided":
        return torch.empty((1, n, 2 * d), dtype=dtype, device="meta")[..., 1::2]
    return torch.empty((1, n, d), dtype=dtype, device="meta")


def specialize(launch: Launch, arch: int) -> tuple[ASTSource, dict[str, Any]]:
    """Turn a launch into what Triton's launcher would compile for it: the typed source, and the options."""
    fn = launch.kernel
    backend = make_backend(GPUTarget("cuda", arch, 32))
    binder = create_function_from_signature(fn.signature, fn.params, backend)
    bound, specialization, options = binder(*launch.args, **launch.options)
    options, signature, constexprs, attrs = fn._pack_args(backend, options, bound, specialization, options)
    if fn.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource

        return GluonASTSource(fn, signature, constexprs, attrs), options.__dict__
    return ASTSource(fn, signature, constexprs, attrs), options.__dict__


def measure(launch: Launch, arch: int, *, layout: str, seen: set[str]) -> Resources | None:
    """Compile one launch for one architecture and read its resources; None if `seen` has it already."""
    source, options = specialize(launch, arch)
    key = f"{arch} {source.hash()} {options['num_warps']}"
    if key in seen:
        return None
    seen.add(key)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    usage, sass = disassemble(compiled.asm["cubin"])
    arguments = dict(zip(launch.kernel.arg_names, launch.args, strict=True))
    name = "gluon" if launch.kernel.is_gluon() else launch.kernel.__name__.strip("_").removesuffix("_kernel")
    cycles, passes = trip(launch, source, compiled.asm["ptx"]) if name in _PRODUCTS else (0, 0)
    return Resources(
        kernel=name,
        dtype=source.signature["h_ptr"].removeprefix("*"),
        layout=layout,
        edge=arguments.get("EDGE"),
        warps=launch.options["num_warps"],
        stage="whole" if arguments.get("partial_ptr", arguments.get("sums_ptr")) is None else "part",
        spread=arguments.get("spread_ptr") is not None,
        arch=arch,
        registers=usage["REG"],
        stack=usage["STACK"],
        spills=spills(sass),
        shared=compiled.metadata.shared,
        loop=count_loop(sass),
        cycles=cycles,
        wavefronts=passes,
    )


def trip(launch: Launch, source: ASTSource, ptx: str) -> tuple[int, int]:
    """Cycles of the products of a program in one trip around the inner loop, and wavefronts of shared memory."""
    # What is None or 1, or a constant, is no parameter; of the pointers only the alignment counts, and two follow.
    given = [
        0 if isinstance(value, Tensor) else value
        for name, value in zip(launch.kernel.arg_names, launch.args, strict=True)
        if source.signature[name] != "constexpr"
    ]
    machine = Machine(ptx, 32 * launch.options["num_warps"])
    machine.run([*given, 0, 0], (0, 0), launch.grid, trip=True)
    return machine.flops // 256, sum(wavefronts(access) for access in machine.accesses)


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
        spills=families["STL"] + families["LDL"],
        total=names.total(),
    )


def _bytes(name: str) -> int:
    """Bytes that a load or store moves for a warp: its name ends in the bits of a lane, 32 if it does not say."""
    _, *modifiers = name.split(".")
    bits = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128}
    if name == "LDGDEPBAR":
        return 0
    return 4 * next((bits[modifier] for modifier in modifiers if modifier in bits), 32)


def resident(registers: int, shared: int, warps: int) -> int:
    """Programs that a multiprocessor of an H100 or H200 holds at once.

    It has 65,536 registers, given out to a warp in 256s, 64 warps and 228 KiB of shared memory, of which each program
    takes 1 KiB more than it uses.
    """
    return min(65536 // (32 * warps * (-(-registers // 8) * 8)), 64 // warps, 233472 // (shared + 1024), 32)


def spills(sass: list[str]) -> int:
    """Local loads and stores of the whole kernel."""
    return sum(name.split(".")[0] in ("STL", "LDL") for name in instructions(sass))


def measure_all(
    archs: Iterable[int] = ARCHS, dtypes: Iterable[str] = tuple(DTYPES), layouts: Iterable[str] = LAYOUTS
) -> Iterator[Resources]:
    """Resources of every kernel the launch table leads to, as they are compiled."""
    seen: set[str] = set()
    for arch in archs:
        for layout in layouts:
            for dtype in dtypes:
                for launch in launches(DTYPES[dtype], layout):
                    found = measure(launch, arch, layout=layout, seen=seen)
                    if found is not None:
                        yield found


_COLUMNS = (
    *("kernel", "dtype", "layout", "edge", "warps", "stage", "spread", "arch", "regs", "stack", "spills"),
    *("shared", "inner loop", "DFMA", "LDS", "STS", "LDG", "LDGSTS", "BAR", "cycles", "waves", "gates"),
)
_FORM = (
    "{:<11} {:<5} {:<10} {:>4} {:>5} {:<5} {:<6} {:<6} {:>4} {:>5} {:>6} {:>6}"
    "  {:<19} {:>4} {:>3} {:>3} {:>3} {:>6} {:>3} {:>6} {:>5}  {}"
)


def header() -> str:
    """First line of a table."""
    return _FORM.format(*_COLUMNS)


def line(row: Resources) -> str:
    """Line of the table for one kernel."""
    loop = row.loop
    matrix = ", ".join(f"{count} {name}" for name, count in loop.matrix.items())
    return _FORM.format(
        *(row.kernel, row.dtype, row.layout, row.edge or "-", row.warps, row.stage),
        *("yes" if row.spread else "no", f"sm_{row.arch}", row.registers, row.stack, row.spills, row.shared),
        *(matrix or "-", loop.fma, loop.shared_loads, loop.shared_stores, loop.loads, loop.async_copies),
        *(loop.barriers, row.cycles or "-", row.wavefronts or "-", "; ".join(row.faults) or "ok"),
    )


def differences(lines: Iterable[str], file: Path) -> list[str]:
    """Lines of a table that a written one has not got; all of them where that is of another Triton."""
    known = file.read_text().splitlines()
    if known[0] != f"triton {triton.__version__}":
        return [f"{file} is of {known[0]}, this is {triton.__version__}"]
    return [f"not in {file}: {found}" for found in lines if found not in known]


def main(argv: list[str] | None = None) -> int:
    """Compile what is asked for, print what came out, and return 1 if a gate fails or the table has changed."""
    parser = argparse.ArgumentParser(
        prog="python -m fastent.kernels.compile", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--arch", type=int, action="append", choices=ARCHS, help="default: all")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="of the input; default: all")
    parser.add_argument("--layout", action="append", choices=LAYOUTS, help="of the input; default: all")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table there too")
    parser.add_argument("--check", type=Path, metavar="FILE", help="compare with a table written before")
    options = parser.parse_args(argv)
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set, so nothing can be compiled; unset it")
    lines, failed = [], False
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # an empty cache: what is measured was compiled now
        if not options.json:
            print(f"triton {triton.__version__}\n{header()}", flush=True)
        found = measure_all(options.arch or ARCHS, options.dtype or DTYPES, options.layout or LAYOUTS)
        for row in found:
            lines.append(line(row))
            failed = failed or bool(row.faults)
            record = {**asdict(row), "faults": row.faults, "line": lines[-1], "triton": triton.__version__}
            print(json.dumps(record) if options.json else lines[-1], flush=True)
    if options.write:
        options.write.write_text("\n".join([f"triton {triton.__version__}", header(), *lines]) + "\n")
    changed = differences(lines, options.check) if options.check else []
    print(*changed, sep="\n", end="\n" if changed else "", file=sys.stderr)
    return int(failed or bool(changed))


if __name__ == "__main__":
    sys.exit(main())
