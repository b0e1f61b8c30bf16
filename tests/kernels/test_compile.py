"""The gates on ahead-of-time compiled kernels: sm_80 and sm_90, every dtype, every entry of the launch table.

Kernels are compiled in processes of their own, because under TRITON_INTERPRET, which the other tests need, a
decorated function can no longer be compiled.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import triton

from fastent.kernels.compile import LAYOUTS, SHARED_LIMIT, Resources, _inner_loop
from fastent.kernels.launch import TABLE

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MISSING = [name for name in ("nvdisasm", "cuobjdump") if not (TOOLS / name).exists()]
needs_tools = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64" or bool(MISSING),
    reason=f"platform {sys.platform} {platform.machine()}, missing in the triton wheel: {MISSING}",
)

PRODUCTS = {(kernel, tile.edge) for kernel in ("covariance", "gram") for _, tile in TABLE}
DTYPES = ("fp16", "bf16", "fp32", "fp64")


def start(*arguments: str, cache: Path) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    out, err = process.communicate()
    assert process.returncode in (0, 1), err[-4000:]
    assert out, err[-4000:]
    return [json.loads(line) for line in out.splitlines()]


def compile_all(layouts: tuple[str, ...], cache: Path) -> list[dict[str, Any]]:
    chosen = [argument for layout in layouts for argument in ("--layout", layout)]
    processes = [
        start("-m", "fastent.kernels.compile", "--json", "--arch", str(arch), *chosen, cache=cache)
        for arch in SHARED_LIMIT
    ]
    return [row for process in processes for row in finish(process)]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return compile_all(("contiguous",), tmp_path_factory.mktemp("triton"))


@needs_tools
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", SHARED_LIMIT)
def test_every_product_runs_on_float64_tensor_cores_without_spilling(
    arch: int, dtype: str, rows: list[dict[str, Any]]
) -> None:
    found = {
        (row["kernel"], row["edge"]): row for row in rows if (row["arch"], row["dtype"]) == (arch, dtype)
    }
    assert found.keys() == PRODUCTS | {("mean", None)}
    for key in PRODUCTS:
        row = found[key]
        assert row["matrix"], key
        assert all(name.startswith("DMMA") for name in row["matrix"]), key
        assert row["fma"] == 0, key
    for key, row in found.items():
        assert (row["stack"], row["spills"]) == (0, 0), key
        assert row["registers"] <= 255, key
        assert 0 < row["shared"] <= SHARED_LIMIT[arch], key
        assert row["faults"] == [], key


@needs_tools
@pytest.mark.parametrize("arch", SHARED_LIMIT)
def test_adding_the_parts_compiles_without_spilling(arch: int, rows: list[dict[str, Any]]) -> None:
    found = [row for row in rows if row["kernel"] == "finish" and row["arch"] == arch]
    # Each edge twice: with column sums to subtract, and without.
    assert sorted(row["edge"] for row in found) == sorted(2 * [tile.edge for _, tile in TABLE])
    assert [row["faults"] for row in found] == [[]] * len(found)


@needs_tools
@pytest.mark.nightly
def test_gates_hold_for_every_layout_of_the_input(tmp_path: Path) -> None:
    found = compile_all(LAYOUTS, tmp_path)
    assert {row["layout"] for row in found} == {*LAYOUTS, "-"}
    assert [row for row in found if row["faults"]] == []


SPILL = """
import json
from dataclasses import asdict
import torch
from fastent.kernels.compile import launches, measure, specialize

chosen = list(launches(torch.float32, "contiguous"))
signatures = [specialize(launch, 90)[0].signature for launch in chosen]
starved = chosen[0]._replace(options={**chosen[0].options, "maxnreg": 64})
found = measure(starved, 90, layout="contiguous", seen=set())
print(json.dumps({**asdict(found), "faults": found.faults, "scales": [s.get("scale") for s in signatures]}))
"""


@needs_tools
def test_spills_are_seen_and_scale_is_passed_as_float64(tmp_path: Path) -> None:
    (row,) = finish(start("-c", SPILL, cache=tmp_path))
    assert row["stack"] > 0
    assert row["spills"] > 0
    assert any("spills" in fault for fault in row["faults"])
    # Triton would pass an unannotated Python float as fp32; the means have no scale.
    assert set(row["scales"]) == {"fp64", None}
    assert row["scales"].count(None) == len(TABLE)


def test_gates_name_each_fault() -> None:
    good = {
        "kernel": "covariance",
        "dtype": "fp32",
        "layout": "contiguous",
        "edge": 64,
        "arch": 80,
        "registers": 255,
        "stack": 0,
        "spills": 0,
        "shared": 166912,
        "matrix": {"DMMA.884": 16},
        "fma": 0,
        "async_copies": 0,
    }
    assert Resources(**good).faults == ()
    for change, words in (
        ({"matrix": {}}, "no DMMA"),
        ({"matrix": {"HMMA.1688.F32": 4}}, "no DMMA"),
        ({"fma": 3}, "3 DFMA"),
        ({"stack": 8}, "8 bytes of stack"),
        ({"spills": 2}, "2 local accesses"),
        ({"registers": 256}, "256 registers"),
        ({"shared": 166913}, "166913 bytes"),
    ):
        (fault,) = Resources(**{**good, **change}).faults
        assert words in fault
    assert Resources(**{**good, "arch": 90, "shared": 232448}).faults == ()


def test_inner_loop_is_the_shortest_one_with_a_product() -> None:
    sass = [
        ".L_x_0:",
        "        /*0010*/                   IADD3 R1, R1, 0x1, RZ ;",
        "        /*0020*/              @!P0 BRA `(.L_x_0) ;",
        ".L_x_1:",
        "        /*0030*/                   DADD R2, R2, R4 ;",
        ".L_x_2:",
        "        /*0040*/                   DMMA.8x8x4 R8, R2, R4, R8 ;",
        "        /*0050*/               @P1 BRA `(.L_x_2) ;",
        "        /*0060*/               @P2 BRA `(.L_x_1) ;",
        "        /*0070*/                   DFMA R2, R2, R4, R6 ;",
        "        /*0080*/                   BRA `(.L_x_3) ;",
        ".L_x_3:",
    ]
    assert _inner_loop(sass) == sass[5:8]
    assert _inner_loop(sass[9:]) == []
