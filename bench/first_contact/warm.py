"""Compilation of all kernels that a first contact launches, on every core and without touching the GPU.

It fills TRITON_CACHE_DIR under the keys of Triton's launcher, so that no later stage compiles: of ninety seconds, one
kernel after the other, some ten are left. What is launched follows from the variants of `bench.gpu` and of the smoke
test, and from the shapes of the tests.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from bench import gpu
from bench.first_contact import smoke
from fastent.kernels.compile import specialize
from fastent.kernels.covariance import LAUNCHES
from fastent.kernels.launch import Launch, output, workspace

# Of tests marked gpu, where nothing else has their like.
TESTED = (
    (4096, 33),
    (700, 300),
    (2000, 1600),
    (64, 2048),
    (256, 64),
    (48, 6),
    (24, 40),
    (300, 20),
    (65536, 64),
)
# Of the test that draws its shapes: both sides, whole and in parts, no multiple of anything.
DRAWN = ((601, 101), (41, 35), (101, 241), (35, 41))


def variants() -> Iterator[gpu.Variant]:
    """Yield all that is launched, some of it twice."""
    session: Any = types.SimpleNamespace(cuda=True, quick=False, device=torch.device("cuda"))
    yield from gpu.timed_variants(session)
    yield from gpu.table_variants(session)
    yield from smoke.variants(session.device)
    for dtype in gpu.DTYPES:
        for n, d in TESTED:
            yield gpu.Variant("ResidentCovariance", n, d, dtype)
        for n, d in DRAWN:
            for layout in ("contiguous", "transposed"):
                yield gpu.Variant("centered_matrix", n, d, dtype, layout=layout)


def launches(variant: gpu.Variant) -> Iterator[Launch]:
    """Yield the launches of a variant, with the spread and without, on tensors that hold no data."""
    n, d, batch = variant.n, variant.d, variant.batch
    x = torch.empty((n, d) if batch == 1 else (batch, n, d), dtype=variant.dtype, device="meta")
    h, side = gpu.LAYOUTS[variant.layout](x), variant.columns()["side"]
    evaluator = variant.evaluator(h.device)
    yield from evaluator.launches(h, evaluator.output())
    out, work = (memory(side, batch, n, d, h.device, spread=False) for memory in (output, workspace))
    yield from LAUNCHES[side](h, out, work, 1 / n)


def architecture() -> int:
    """Compute capability of the first GPU, such as 90, by the driver's tool; 90 where there is none."""
    command = ("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    if shutil.which(command[0]) is None:
        return 90
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return int(found[0].replace(".", ""))


KERNELS: dict[str, tuple[Any, dict[str, Any]]] = {}
"""Sources and options to compile, by what distinguishes them; processes inherit it."""


def build(key: str, arch: int) -> str | None:
    """Compile one kernel; the error in words, None if there is none."""
    source, options = KERNELS[key]
    try:
        triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    except Exception as error:  # said, and the others go on
        return f"{source.fn.__name__}: {type(error).__name__}: {error}"[:300]
    return None


def main(argv: list[str] | None = None) -> int:
    """Compile them all; the number that failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--at-most", type=int, metavar="N", help="kernels; default: all")
    most = parser.parse_args(argv).at_most
    start, arch, workers = time.monotonic(), architecture(), os.cpu_count() or 1
    for launch in itertools.chain.from_iterable(map(launches, dict.fromkeys(variants()))):
        source, options = specialize(launch, arch)
        KERNELS.setdefault(f"{source.hash()} {sorted(options.items(), key=str)}", (source, options))
        if most is not None and len(KERNELS) >= most:
            break
    print(f"{len(KERNELS)} kernels for sm_{arch} after {time.monotonic() - start:.1f} s", flush=True)
    with multiprocessing.get_context("fork").Pool(workers) as pool:  # CUDA is not initialised here
        failed = [
            error for error in pool.starmap(build, [(key, arch) for key in KERNELS], chunksize=1) if error
        ]
    print(
        f"compiled by {workers} processes in {time.monotonic() - start:.1f} s, {len(failed)} failed",
        *failed,
        sep="\n",
    )
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
