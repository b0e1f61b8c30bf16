"""Counts of an evaluation are those of the committed table; what they mean for the cost model and the import."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import counters
from fastent.plan import work

ROOT = Path(__file__).parents[2]
COMMITTED = json.loads(counters.TABLE.read_text())

FORBIDDEN = ("triton", "scipy.stats", "matplotlib", "tyro", "rich", "safetensors", "pyarrow", "lightning")


def test_counts_are_those_of_the_committed_table():
    command = [sys.executable, "-m", "bench.counters"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    hint = "if the change is meant: python -m bench.counters --update"
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}\n{hint}"


def test_a_further_read_product_or_block_changes_the_counts():
    h = torch.randn(64, 64, dtype=torch.float64)
    once = counters.count(lambda: float((h @ h).sum()))
    twice = counters.count(lambda: (float((h @ h).sum()), float((h @ h).sum())))
    assert once == {
        "host_syncs": 1,
        "products": 1,
        "flops": 2 * 64**3,
        "allocations": 1,
        "bytes": 8 * 64**2,
        "peak": 8 * 64**2,
    }
    assert twice == {name: count * (1 if name == "peak" else 2) for name, count in once.items()}


def test_reads_by_the_host_are_numbers_arrays_and_decompositions():
    x = torch.randn(8, 3, dtype=torch.float64)
    assert counters.host_reads(lambda: x.T @ x) == 0
    assert counters.host_reads(lambda: float(x.sum())) == 1
    assert counters.host_reads(lambda: np.cov(x.numpy())) == 1
    assert counters.host_reads(lambda: np.asarray(x)) == 1
    assert counters.host_reads(lambda: torch.linalg.eigvalsh(x.T @ x)) == 1
    assert counters.host_reads(lambda: torch.linalg.svdvals(x).sum().item()) == 2


def test_an_evaluation_reads_one_number_and_never_copies_a_large_input_to_float64():
    for name, count in COMMITTED.items():
        if name.startswith("spectral_entropy"):
            assert count["host_syncs"] == 1
    tall = COMMITTED["spectral_entropy, 16384 x 128 float32"]
    assert tall["peak"] < 8 * 16384 * 128 / 3


@pytest.mark.parametrize(
    ("case", "n", "d"),
    [
        ("512 x 128 float32", 512, 128),
        ("4096 x 128 bfloat16", 4096, 128),
        ("16384 x 128 float32", 16384, 128),
        ("128 x 1024 float32", 128, 1024),
    ],
)
def test_the_cost_model_counts_the_products_and_operations_that_are_made(case, n, d):
    count = COMMITTED[f"spectral_entropy, {case}"]
    assert (work(n, d).launches, work(n, d).flops) == (count["products"], count["flops"])


def test_importing_fastent_brings_no_extra_and_no_slow_module():
    program = "import sys, torch, numpy; a = set(sys.modules); import fastent; print(*set(sys.modules) - a)"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True
    )
    brought = result.stdout.split()
    assert "fastent.entropy" in brought
    assert [name for name in brought if name.startswith(FORBIDDEN)] == []
