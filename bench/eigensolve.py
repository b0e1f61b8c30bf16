"""Time of the eigenvalues of a covariance: ``python -m bench.eigensolve [--quick] [--out FILE]``.

The floor under every way that forms a matrix; fastent takes torch's LAPACK on the transposed upper triangle, which
saves torch's own transposition, or for large matrices NumPy's (`fastent.openblas`). The singular values of the rows
(512, m) are the other way, which squares nothing.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg
import torch

import fastent
from bench.harness import Row, command, environment, interleaved, quantiles, ratio_columns
from bench.tables import eigensolve_table
from fastent.covariance import centered_matrix
from fastent.eigenvalues import eigenvalues

SIZES = (32, 64, 128, 256, 512, 1024)
QUICK = (64, 128, 512)


def measure(quick: bool) -> list[Row]:
    """Rows of all sizes at this process's thread count."""
    rows: list[Row] = []
    for m in QUICK if quick else SIZES:
        h = torch.randn(512, m, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        centered = centered_matrix(h, side="covariance")
        matrix = fastent.covariance(h)
        array, centred = matrix.numpy(), h - h.mean(0)
        calls = {
            "fastent": lambda a=centered: eigenvalues(a),
            "torch eigvalsh": lambda a=matrix: torch.linalg.eigvalsh(a),
            "numpy eigvalsh": lambda a=array: np.linalg.eigvalsh(a),
            "scipy evr": lambda a=array: scipy.linalg.eigvalsh(a, driver="evr", check_finite=False),
            "torch svdvals of the rows": lambda a=centred: torch.linalg.svdvals(a),
        }
        seconds = interleaved(calls, rounds=9 if quick else 25, budget=3.0 if quick else 15.0)
        for name, values in seconds.items():
            row = {"op": "eigensolve", "provider": name, "n": 512, "d": m, "dtype": "float64"}
            row |= quantiles(values) | {"rounds": len(values)}
            # flops: reduction to tridiagonal form, 4/3 m^3 (LAPACK's count); the svd's are another algorithm's
            if "svd" not in name:
                row["flops"] = 4 * m**3 // 3
            if name != "fastent":
                row |= ratio_columns(seconds["fastent"], values)
            rows.append(row | environment("scipy"))
    return rows


if __name__ == "__main__":
    command("bench.eigensolve", __doc__, measure, eigensolve_table)
