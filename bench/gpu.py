"""Everything that a GPU should tell us, in one call: ``python -m bench.gpu --out DIR``.

Correctness comes first: every dtype, side, split and stride against the CPU in float64, and a wrong result ends the run
with status 1, before any timing. Up to 2,048 columns the whole lower triangle is compared with the two-pass covariance
in float64 on the CPU; above, entries at random places. The gate is that of the kernel tests: ``eps n a_i a_j`` with a
the largest centred magnitude of a column. Entropies are compared with those of the CPU path for d <= 256. Then what a
probe costs training, host synchronisations and peak memory (`bench.gpu_training`), kernel times, providers side by side
and eigensolves (`bench.gpu_kernel`).
Rows go to ``DIR/gpu.jsonl`` as they are made; ``python -m bench.report DIR`` makes a figure and a table.

Under 8 minutes on an H100 or H200; no network, no test runner. ``--device cpu --quick`` is a rehearsal: what needs a
GPU is recorded as skipped with the reason, and no time of it says anything about one. There the torch backend takes the
place of the kernels; with TRITON_INTERPRET=1 they run interpreted on the smallest shapes.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import fastent
from bench import gpu_kernel, gpu_training
from bench.gpu_device import Session, activations
from fastent.covariance import centered_matrix, triton_obstacle

EPS = torch.finfo(torch.float64).eps
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Split and whole, both sides, no multiple of anything, every entry of the launch table.
SHAPES = (
    (512, 64),
    (512, 128),
    (41, 127),
    (4096, 129),
    (65536, 32),
    (64, 4096),
    (300, 1000),
    (2100, 1700),
    (512, 2048),
)
LARGE = ((8192, 4096), (4096, 8192))
QUICK = ((512, 64), (41, 127), (4096, 33), (64, 300))
TINY = ((41, 35), (140, 20), (20, 140))
SAMPLES = 4096


def layouts(x: Tensor) -> dict[str, Tensor]:
    """Return views of the same values under other strides."""
    return {
        "contiguous": x,
        "transposed": x.T.contiguous().T,
        "padded rows": torch.nn.functional.pad(x, (3, 2), value=7.0)[:, 3:-2],
        "strided": x.repeat_interleave(2, dim=1)[:, ::2],
    }


def correctness(session: Session) -> bool:
    """Compare everything; say whether all is inside the gates."""
    passed = True
    if session.cuda:
        obstacle = triton_obstacle(session.device)
        if obstacle:
            session.skip("correctness", f"the kernels cannot run here: {obstacle}", provider="triton")
            return False
        shapes = QUICK if session.quick else SHAPES
        for n, d in shapes:
            for dtype in DTYPES:
                passed &= compare(session, n, d, dtype, "triton")
        if not session.quick:
            for n, d in LARGE:
                passed &= compare(session, n, d, torch.bfloat16, "triton")
        return passed
    for n, d in QUICK:
        for dtype in DTYPES:
            passed &= compare(session, n, d, dtype, "torch")
    if os.environ.get("TRITON_INTERPRET") == "1":
        for n, d in TINY:
            for dtype in DTYPES:
                passed &= compare(session, n, d, dtype, "triton")
    else:
        session.skip("correctness", "no CUDA device, and TRITON_INTERPRET is not 1", provider="triton")
    return passed


def compare(session: Session, n: int, d: int, dtype: torch.dtype, provider: str) -> bool:
    """Rows for one shape and dtype: each layout and side against the CPU, and the entropy."""
    x = activations(n, d, dtype, session.device)
    # Each layout of each dtype is compiled anew: a few shapes are enough.
    views = layouts(x) if max(n, d) <= 512 else {"contiguous": x}
    host = x.cpu().double()  # x itself on the CPU in float64: not to be changed
    host = host - host.mean(0)
    sides = ["covariance", "gram"] if max(n, d) <= 2048 else ["gram" if n < d else "covariance"]
    good = True
    for side in sides:
        y = host if side == "covariance" else host.T
        largest = y.abs().amax(0)
        places = pick(y.shape[1])
        want = products(y, places) / n
        bits = None
        for layout, view in views.items():
            got = centered_matrix(view, backend=provider, side=side).matrix  # type: ignore[arg-type]
            found = got.cpu()[places]
            error = (
                (found - want).abs() / (EPS * (y.shape[0] + 2) * largest[places[0]] * largest[places[1]])
            ).max()
            bits = found if bits is None else bits
            same = bool(torch.equal(bits, found))
            passed = bool(error < 1.0) and same
            good &= passed
            session.add(
                "correctness",
                provider=provider,
                n=n,
                d=d,
                dtype=str(dtype).removeprefix("torch."),
                side=side,
                layout=layout,
                entries=len(want),
                error_over_gate=float(error),
                same_bits_as_contiguous=same,
                passed=passed,
            )
    if 1 < d <= 256:
        want_h = fastent.spectral_entropy(x.cpu(), backend="torch").normalized
        difference = abs(fastent.spectral_entropy(x, backend=provider).normalized - want_h)  # type: ignore[arg-type]
        good &= difference <= 1e-12
        session.add(
            "entropy",
            provider=provider,
            n=n,
            d=d,
            dtype=str(dtype).removeprefix("torch."),
            difference=difference,
            passed=difference <= 1e-12,
        )
    return good


def pick(m: int) -> tuple[Tensor, Tensor]:
    """Places on and below the diagonal: all of them up to 2,048, then `SAMPLES` at random, corners included."""
    if m <= 2048:
        i, j = torch.tril_indices(m, m)
        return i, j
    generator = torch.Generator().manual_seed(m)
    a, b = torch.randint(m, (2, SAMPLES), generator=generator)
    a[:4], b[:4] = torch.tensor([0, m - 1, m - 1, m - 2]), torch.tensor([0, 0, m - 1, 1])
    return torch.maximum(a, b), torch.minimum(a, b)


def products(y: Tensor, places: tuple[Tensor, Tensor]) -> Tensor:
    """Entries of ``y^T y`` at `places`."""
    if y.shape[1] <= 2048:
        return (y.T @ y)[places]
    columns = y.T.contiguous()
    parts = [
        (columns[i] * columns[j]).sum(1)
        for i, j in zip(places[0].split(256), places[1].split(256), strict=True)
    ]
    return torch.cat(parts)


PARTS: dict[str, Callable[[Session], bool | None]] = {
    "correctness": correctness,
    "training": gpu_training.training,
    "host": gpu_training.host,
    "kernel": gpu_kernel.kernel,
    "providers": gpu_kernel.providers,
    "eigensolve": gpu_kernel.eigensolve,
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
            if PARTS[name](session) is False:
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
