"""What an import costs: ``python -m bench.imports [--quick] [--out FILE]``.

Time, resident memory and modules of ``import fastent`` beyond ``import torch``, each in a fresh interpreter. The
acceptance is `LIMIT`; which modules may not come with it is a test (tests/test_imports.py).
"""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np

from bench.harness import ROOT, Row, command, environment, pinned, quantiles
from bench.tables import imports_table

LIMIT = 0.15  # seconds
# What, beyond what; torch imports NumPy only when it is asked for an array.
CASES = (("fastent", "torch"), ("fastent", "torch, numpy"))
PROGRAM = """
import importlib, json, resource, sys, time
for name in sys.argv[1].split(", "):
    importlib.import_module(name)
modules = len(sys.modules)
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
for name in sys.argv[2].split(", "):
    importlib.import_module(name)
seconds = time.perf_counter() - start
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([seconds, (after - before) * 1024, len(sys.modules) - modules]))
"""


def measure(quick: bool) -> list[Row]:
    """Rows of all cases; the files are in the page cache after one round that is not counted."""
    found: dict[tuple[str, str], list[list[float]]] = {case: [] for case in CASES}
    for counted in range(-1, 5 if quick else 15):
        for case in CASES:
            line = [sys.executable, "-c", PROGRAM, case[1], case[0]]
            output = subprocess.run(
                line, check=True, cwd=ROOT, env=pinned(1), stdout=subprocess.PIPE, text=True
            ).stdout
            if counted >= 0:
                found[case].append(json.loads(output))
    rows = []
    for (name, beyond), values in found.items():
        seconds, extra, modules = np.array(values).T
        row = {"op": "import", "provider": name, "beyond": beyond, **quantiles(seconds)}
        row |= {"rounds": len(seconds), "extra_bytes": int(np.median(extra)), "modules": int(modules[0])}
        rows.append(row | {"limit_us": LIMIT * 1e6} | environment())
    return rows


if __name__ == "__main__":
    command("bench.imports", __doc__, measure, imports_table, threads=(1,))
