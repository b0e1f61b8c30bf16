"""Everything that a GPU should tell us, in one call: ``python -m bench.gpu --out DIR``.

Correctness comes first; a wrong result ends the run with status 1, before any timing. Then kernel times, providers side
by side, eigensolves, what a probe costs training, host synchronisations and peak memory: each part a module.
Rows go to ``DIR/gpu.jsonl`` as they are made; ``python -m bench.report DIR`` makes a figure and a table.

Under 8 minutes on an H100 or H200; no network, no test runner. ``--device cpu --quick`` is a rehearsal: what needs a
GPU is recorded as skipped with the reason, and no time of it says anything about one. With TRITON_INTERPRET=1 it
runs the kernels interpreted on the smallest shapes.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from pathlib import Path

import torch

from bench import gpu_correctness, gpu_eigensolve, gpu_host, gpu_kernel, gpu_providers, gpu_training
from bench.gpu_device import Session

PARTS = {
    "correctness": gpu_correctness,
    "training": gpu_training,
    "host": gpu_host,
    "kernel": gpu_kernel,
    "providers": gpu_providers,
    "eigensolve": gpu_eigensolve,
}


def main(argv: list[str] | None = None) -> int:
    """Run the parts that were asked for; 1 where a result is wrong or a part broke."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true", help="few shapes and rounds")
    parser.add_argument("--part", action="append", choices=PARTS, help="default: all")
    parser.add_argument("--minutes", type=float, default=7.5, help="after which what is left is skipped")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch.cuda.is_available() is False; --device cpu --quick is a rehearsal without a GPU")
    options.out.mkdir(parents=True, exist_ok=True)
    torch.backends.cuda.matmul.allow_tf32 = False
    start = time.monotonic()
    deadline = start + 60 * options.minutes
    session = Session(torch.device(options.device), options.quick, options.out, deadline)
    failed = False
    for name in options.part or PARTS:
        session.part = name
        begun = time.monotonic()
        try:
            if PARTS[name].run(session) is False:
                failed = True
                print("a result is outside its gate: nothing is timed", file=sys.stderr)
        except Exception as error:  # one part must not cost the rows of the others
            failed = True
            session.skip(name, f"the part broke: {type(error).__name__}: {error}"[:500], broke=True)
            traceback.print_exc()
        print(f"{name:12s} {time.monotonic() - begun:6.1f} s", flush=True)
        if failed and name == "correctness":
            break
    skipped = sum("skipped" in row for row in session.rows)
    print(
        f"{len(session.rows)} rows, {skipped} of them skipped, {time.monotonic() - start:.0f} s: {options.out}"
    )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
