"""Ahead-of-time compilation of every kernel, on a machine that needs no GPU.

Each launch is specialised as Triton's launcher would do it (types, alignment, values equal to 1), compiled
for an architecture and disassembled. The gates on what comes out:

- `DMMA`, the float64 matrix instruction, in the product's inner loop, and no `DFMA` there: every dtype runs
  on the tensor cores;
- no stack and no local loads or stores: nothing spills;
- at most 255 registers, and shared memory within the block limit of the architecture.

``python -m fastent.kernels.compile`` prints the table and exits with 1 where a gate fails. It says nothing of
speed, and the interpreter cannot be used: unset TRITON_INTERPRET.
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

from .covariance import covariance_launches
from .gram import gram_launches
from .launch import TABLE, Launch

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LAYOUTS = ("contiguous", "transposed", "odd", "strided")
SHARED_LIMIT = {80: 166912, 90: 232448}  # bytes a block may have
MAX_REGISTERS = 255

_PRODUCTS = ("covariance", "gram")  # the kernels with a matrix product

_INSTRUCTION = re.compile(r"^\s+(?:/\*[0-9a-f]+\*/)?\s*(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*(?:\.\w+)*)")
_LABEL = re.compile(r"^(\.L\w+):")
_BRANCH = re.compile(r"\bBRA\b.*`\((\.L\w+)\)")


@dataclass(frozen=True)
class Resources:
    """What one kernel takes on one architecture."""

    kernel: str
    dtype: str  # of the input; the second stage of a split has none of its own
    layout: str
    edge: int | None  # of the output tile
    arch: int
    registers: int
    stack: int  # bytes
    spills: int  # local loads and stores
    shared: int  # bytes
    matrix: dict[str, int]  # matrix instructions of the inner loop
    fma: int  # scalar float64 fused multiply-adds in that loop
    async_copies: int

    @property
    def faults(self) -> tuple[str, ...]:
        """The gates this kernel fails, in words."""
        found = []
        if self.kernel in _PRODUCTS and not any(name.startswith("DMMA") for name in self.matrix):
            found.append("no DMMA in the inner loop")
        if self.fma:
            found.append(f"{self.fma} DFMA in the inner loop")
        if self.stack or self.spills:
            found.append(f"spills: {self.stack} bytes of stack, {self.spills} local accesses")
        if self.registers > MAX_REGISTERS:
            found.append(f"{self.registers} registers")
        if self.shared > SHARED_LIMIT[self.arch]:
            found.append(f"{self.shared} bytes of shared memory")
        return tuple(found)


def launches(dtype: torch.dtype, layout: str) -> Iterator[Launch]:
    """Every launch of the table for one input dtype and layout, on tensors that hold no data."""
    smallest = 0
    for largest, _ in TABLE:
        m = largest or 2 * smallest
        smallest = m
        for build, n, d, edge in ((covariance_launches, 4096, m, m), (gram_launches, m, 4096, m)):
            h = _empty(n, d, dtype, layout)
            lower = torch.empty((1, edge, edge), dtype=torch.float64, device="meta")
            centre = torch.empty((1, 3, d), dtype=torch.float64, device="meta")
            yield from build(h, lower, centre, 1 / n)


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
    return ASTSource(fn, signature, constexprs, attrs), options.__dict__


def measure(launch: Launch, arch: int, *, layout: str, seen: set[str]) -> Resources | None:
    """Compile one launch for one architecture and read its resources; None if `seen` has it already."""
    source, options = specialize(launch, arch)
    key = f"{arch} {source.hash()}"
    if key in seen:
        return None
    seen.add(key)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    usage, sass = _disassemble(compiled.asm["cubin"])
    inner = Counter(_instructions(_inner_loop(sass)))
    whole = Counter(_instructions(sass))
    element = source.signature.get("h_ptr", "*").removeprefix("*")
    names = launch.kernel.arg_names
    return Resources(
        kernel=launch.kernel.__name__.removeprefix("_").removesuffix("_kernel"),
        dtype=element or "-",
        layout=layout if element else "-",
        edge=launch.args[names.index("EDGE")] if "EDGE" in names else None,
        arch=arch,
        registers=usage["REG"],
        stack=usage["STACK"],
        spills=sum(count for name, count in whole.items() if name.split(".")[0] in ("STL", "LDL")),
        shared=compiled.metadata.shared,
        matrix={
            name: count for name, count in sorted(inner.items()) if name.split(".")[0] in ("DMMA", "HMMA")
        },
        fma=inner["DFMA"],
        async_copies=sum(count for name, count in whole.items() if name.startswith("LDGSTS")),
    )


def measure_all(
    archs: Iterable[int] = tuple(SHARED_LIMIT),
    dtypes: Iterable[torch.dtype] = DTYPES,
    layouts: Iterable[str] = LAYOUTS,
) -> Iterator[Resources]:
    """Resources of every kernel the launch table leads to, as they are compiled."""
    seen: set[str] = set()
    for arch in archs:
        for layout in layouts:
            for dtype in dtypes:
                for launch in launches(dtype, layout):
                    found = measure(launch, arch, layout=layout, seen=seen)
                    if found is not None:
                        yield found


def _disassemble(cubin: bytes) -> tuple[dict[str, int], list[str]]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        usage = _output(triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(file))
        sass = _output(triton.knobs.nvidia.nvdisasm.path, "-c", str(file))
    return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", usage)}, sass.splitlines()


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _inner_loop(sass: list[str]) -> list[str]:
    """Lines of the shortest loop that holds a matrix instruction or a float64 multiply-add, or none."""
    labels: dict[str, int] = {}
    loops = []
    for number, line in enumerate(sass):
        if label := _LABEL.match(line):
            labels[label[1]] = number
        if (branch := _BRANCH.search(line)) and branch[1] in labels:
            loops.append(sass[labels[branch[1]] : number + 1])
    products = [
        body for body in loops if any(name.startswith(("DMMA", "DFMA")) for name in _instructions(body))
    ]
    return min(products, key=len, default=[])


def _instructions(sass: Iterable[str]) -> Iterator[str]:
    return (found[1] for line in sass if (found := _INSTRUCTION.match(line)))


def table(rows: Iterable[Resources]) -> Iterator[str]:
    """Lines of a plain-text table, one for each kernel."""
    form = "{:<11} {:<5} {:<10} {:>4}  {:<5} {:>4} {:>5} {:>6} {:>6}  {:<19} {:>4} {:>5}  {}"
    yield form.format(
        *("kernel", "dtype", "layout", "edge", "arch", "regs", "stack", "spills", "shared"),
        *("inner loop", "DFMA", "async", "gates"),
    )
    for row in rows:
        matrix = ", ".join(f"{count} {name}" for name, count in row.matrix.items())
        yield form.format(
            *(row.kernel, row.dtype, row.layout, row.edge or "-", f"sm_{row.arch}", row.registers, row.stack),
            *(
                row.spills,
                row.shared,
                matrix or "-",
                row.fma,
                row.async_copies,
                "; ".join(row.faults) or "ok",
            ),
        )


def main(argv: list[str] | None = None) -> int:
    """Compile everything, print what came out, and return 1 if a gate fails."""
    parser = argparse.ArgumentParser(
        prog="python -m fastent.kernels.compile", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--arch", type=int, action="append", choices=sorted(SHARED_LIMIT), help="default: all"
    )
    parser.add_argument("--layout", action="append", choices=LAYOUTS, help="of the input; default: all")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args(argv)
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set, so nothing can be compiled; unset it")
    failed = False

    def watched() -> Iterator[Resources]:
        nonlocal failed
        for row in measure_all(options.arch or tuple(SHARED_LIMIT), layouts=options.layout or LAYOUTS):
            failed = failed or bool(row.faults)
            yield row

    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # an empty cache: what is measured was compiled now
        if options.json:
            for row in watched():
                print(
                    json.dumps({**asdict(row), "faults": row.faults, "triton": triton.__version__}),
                    flush=True,
                )
        else:
            print(f"triton {triton.__version__}")
            for line in table(watched()):
                print(line, flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
