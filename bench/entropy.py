"""fastent's entropy against the direct way, on the CPU: ``python -m bench.entropy [--out FILE]``.

The direct way is what anyone writes first: float64 copy, subtract the mean, one full product, eigvalsh, clamp,
entropy. Each thread count runs in its own process, since pools keep their size.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

import fastent
from bench.harness import Row, environment, interleaved, quantiles, ratio, write_rows

# (n, d) and the share of the direct way's time that must not be exceeded
CASES = {
    (512, 64): 1.05,
    (512, 128): 1.05,
    (512, 256): 1.05,
    (512, 512): 1.05,
    (512, 768): 1.05,
    (4096, 128): 0.75,
    (65536, 128): 0.6,
    (512, 1024): 1 / 4,
    (512, 4096): 1 / 40,
}
MEMORY_CASE = (65536, 128)
MEMORY_LIMIT = 16 * 2**20


def direct(h: Tensor) -> float:
    """Spectral entropy as it is usually written."""
    x = h.double()
    x = x - x.mean(0)
    eigenvalues = torch.linalg.eigvalsh(x.T @ x / x.shape[0]).clamp(min=1e-12)
    p = eigenvalues / eigenvalues.sum()
    return float(-(p * p.log()).sum())


def measure(threads: int) -> list[Row]:
    """Rows of all cases at one thread count, in this process."""
    torch.set_num_threads(threads)
    rows = []
    for (n, d), limit in CASES.items():
        h = torch.randn(n, d, generator=torch.Generator().manual_seed(0))
        slow = n * d * min(n, d) > 10**9 or d > 512
        timings = interleaved(
            {"fastent": lambda h=h: fastent.spectral_entropy(h), "direct": lambda h=h: direct(h)},
            rounds=7 if slow else 25,
        )
        middle, low, high = ratio(timings["fastent"], timings["direct"])
        for provider, seconds in timings.items():
            side = min(n, d) if provider == "fastent" else d
            row = {"op": "entropy", "provider": provider, "n": n, "d": d, "dtype": "float32"} | quantiles(
                seconds
            )
            # bytes: read h (4 n d) + write and read the matrix (16 m m); flops: products of the side taken, half of
            # them for fastent, without the eigensolve
            work = 2 * n * d * side
            row |= {
                "bytes": 4 * n * d + 16 * side * side,
                "flops": work // 2 if provider == "fastent" else work,
            }
            if provider == "fastent":
                row |= {
                    "ratio": round(middle, 4),
                    "ratio_low": round(low, 4),
                    "ratio_high": round(high, 4),
                    "limit": limit,
                }
            rows.append(row | environment())
    return rows


def peak_memory() -> Row:
    """Bytes by which one call on the large case raises this process's peak: a fresh process, please."""
    torch.set_num_threads(2)
    n, d = MEMORY_CASE
    h = torch.randn(n, d)
    fastent.spectral_entropy(h[:512])  # loads LAPACK, starts the pool
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fastent.spectral_entropy(h)
    extra = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    row = {
        "op": "entropy_memory",
        "provider": "fastent",
        "n": n,
        "d": d,
        "dtype": "float32",
        "extra_bytes": extra,
    }
    return row | {"limit": MEMORY_LIMIT} | environment()


def main() -> None:
    """Run every part in a process of its own, print the table, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        rows = [peak_memory()] if args.part == "memory" else measure(int(args.part))
        print(json.dumps(rows))
        return
    rows = []
    for part in ("1", "2", "memory"):
        command = [sys.executable, "-m", "bench.entropy", "--part", part]
        rows += json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    print(
        f"{'threads':>7} {'n':>6} {'d':>5} {'direct us':>10} {'fastent us':>10} {'ratio [95 %]':>24} {'limit':>6}"
    )
    for ours, theirs in zip(rows[0:-1:2], rows[1:-1:2], strict=True):
        span = f"{ours['ratio']:.3f} [{ours['ratio_low']:.3f}, {ours['ratio_high']:.3f}]"
        print(
            f"{ours['threads']:>7} {ours['n']:>6} {ours['d']:>5} {theirs['us_p50']:>10.0f} {ours['us_p50']:>10.0f} "
            f"{span:>24} {ours['limit']:>6.3f}{'' if ours['ratio'] <= ours['limit'] else '  MISSED'}"
        )
    memory = rows[-1]
    print(
        f"peak extra memory at {memory['n']} x {memory['d']}: {memory['extra_bytes'] / 2**20:.1f} MiB (limit 16)"
    )
    if args.out:
        write_rows(args.out, rows)


if __name__ == "__main__":
    main()
