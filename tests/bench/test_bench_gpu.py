"""The rehearsal of the GPU benchmark on a CPU, and the report made from its rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FIGURES = ("us_p50", "slowdown", "calls", "extra_bytes", "matrix_over_gate", "entropy_over_gate")
# Every operation of the benchmark; those that need a GPU are skipped with their reason.
MEASURED = {"covariance", "entropy", "eigensolve", "probe forward", "probe on the thread", "slowdown"}
NEEDS_A_GPU = {"kernel", "probe in the stream", "host synchronisations", "blocked stream", "peak memory"}


def rehearse(folder: Path, *parts: str, interpret: bool = False) -> list[dict[str, Any]]:
    chosen = [argument for part in parts for argument in ("--part", part)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"OMP_NUM_THREADS": "1"} | ({"TRITON_INTERPRET": "1"} if interpret else {})
    command = [sys.executable, "-m", "bench.gpu", "--device", "cpu", "--quick", "--out", str(folder), *chosen]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in (folder / "gpu.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rehearsal")


@pytest.fixture(scope="module")
def rows(folder: Path) -> list[dict[str, Any]]:
    return rehearse(folder, "training", "host", "kernel", "providers", "eigensolve")


def test_a_rehearsal_measures_or_says_why_not(rows: list[dict[str, Any]]) -> None:
    assert {row["op"] for row in rows if "skipped" not in row} == MEASURED
    assert {row["op"] for row in rows if "skipped" in row} >= NEEDS_A_GPU
    for row in rows:
        assert row["device"]
        assert row["torch"]
        assert "triton" in row
        assert "commit" in row
        figures = [name for name in FIGURES if name in row]
        assert bool(figures) != ("skipped" in row), row
        assert row.get("skipped", "-")


def test_a_provider_is_compared_with_itself_as_one(rows: list[dict[str, Any]]) -> None:
    ours = [row["over_fastent"] for row in rows if row.get("provider") == "fastent" and "over_fastent" in row]
    assert ours == [1.0] * len(ours)
    assert len(ours) == 6


def test_the_report_has_a_table_for_each_measurement_and_lists_what_was_skipped(
    folder: Path, rows: list[dict[str, Any]]
) -> None:
    subprocess.run([sys.executable, "-m", "bench.report", str(folder)], cwd=ROOT, check=True)
    text = (folder / "report.md").read_text()
    for op in MEASURED:
        assert f"\n## {op}\n" in text
    assert "\n## kernel\n" not in text
    not_measured = text.split("## Not measured")[1]
    assert not_measured.count("no CUDA device") >= len(NEEDS_A_GPU)
    assert (folder / "slowdown.png").stat().st_size > 10_000


@pytest.mark.nightly
def test_the_whole_rehearsal_is_inside_every_gate(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    rows = rehearse(tmp_path, interpret=True)
    checked = [row for row in rows if row["part"] == "correctness"]
    assert all(row["passed"] for row in checked)
    assert {row["provider"] for row in checked} == {"torch", "torch, entropy", "triton", "triton, entropy"}


def test_a_wrong_result_ends_the_run_before_any_timing(tmp_path: Path) -> None:
    code = (
        "import sys, bench.gpu as c\n"
        "right = c.centered_matrix\n"
        "def wrong(*args, **options):\n"
        "    centered = right(*args, **options)\n"
        "    centered.matrix[-1, 0] *= 1 + 1e-9\n"
        "    return centered\n"
        "c.centered_matrix, c.QUICK = wrong, ((41, 20),)\n"
        f"sys.exit(c.main(['--device', 'cpu', '--quick', '--out', {str(tmp_path)!r}]))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1, done.stderr[-2000:]
    rows = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert {row["part"] for row in rows} == {"correctness"}
    assert not all(row["passed"] for row in rows if "passed" in row)


def test_without_a_gpu_the_benchmark_of_one_refuses(tmp_path: Path) -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "bench.gpu", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--device cpu --quick is a rehearsal" in done.stderr
