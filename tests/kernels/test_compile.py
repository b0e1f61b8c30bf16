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
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

from fastent.kernels.compile import (
    ARCHS,
    DTYPES,
    LAYOUTS,
    SHARED_LIMIT,
    Loop,
    Resources,
    count_loop,
    differences,
    inner_loop,
    launches,
)
from fastent.kernels.launch import IN_GLUON, IN_TRITON, TABLE

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MISSING = [name for name in ("nvdisasm", "cuobjdump") if not (TOOLS / name).exists()]
needs_tools = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64" or bool(MISSING),
    reason=f"platform {sys.platform} {platform.machine()}, missing in the triton wheel: {MISSING}",
)

COMMITTED = Path(__file__).parents[2] / "bench" / "results" / "aot.txt"

# Every entry, with Gluon and without, with the spread and without: whole, and in parts.
ENTRIES = {"covariance": IN_TRITON, "gluon": IN_GLUON[-1:], "gram": TABLE["gram"]}
PRODUCTS = {
    (kernel, entry.tile.edge, entry.tile.warps, stage, spread)
    for kernel, entries in ENTRIES.items()
    for entry in entries
    for stage in ("whole", "part")
    for spread in (False, True)
}
MEANS = {("mean", None, 8, stage, False) for stage in ("whole", "part")}
SAMPLE = ((80, "fp32"), (90, "bf16"))  # what the default suite compiles; everything: see the nox session aot


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


def compile_some(cache: Path, *chosen: str) -> subprocess.Popen[str]:
    return start("-m", "fastent.kernels.compile", "--json", *chosen, cache=cache)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    cache = tmp_path_factory.mktemp("triton")
    processes = [
        compile_some(cache, "--layout", "contiguous", "--arch", str(arch), "--dtype", dtype)
        for arch, dtype in SAMPLE
    ]
    return [row for process in processes for row in finish(process)]


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("kernel", "edge", "warps", "stage", "spread"))


@needs_tools
@pytest.mark.parametrize(("arch", "dtype"), SAMPLE)
def test_every_product_runs_on_float64_tensor_cores_without_spilling(
    arch: int, dtype: str, rows: list[dict[str, Any]]
) -> None:
    found = {key(row): row for row in rows if (row["arch"], row["dtype"]) == (arch, dtype)}
    assert found.keys() == PRODUCTS | MEANS
    for product in PRODUCTS:
        loop = found[product]["loop"]
        assert loop["matrix"], product
        assert all(name.startswith("DMMA") for name in loop["matrix"]), product
        assert loop["fma"] == 0, product
        assert found[product]["cycles"] == 2 * product[1] ** 2 * 16 / 256, product
        assert found[product]["wavefronts"] > 0, product
    for name, row in found.items():
        assert (row["stack"], row["spills"]) == (0, 0), name
        assert row["registers"] <= 255, name
        assert 0 < row["shared"] <= SHARED_LIMIT[arch], name
        assert row["faults"] == [], name


def test_the_committed_table_has_every_kernel_and_no_fault() -> None:
    version, _, *lines = COMMITTED.read_text().splitlines()
    assert version.startswith("triton 3.9")
    assert all(line.endswith("  ok") for line in lines)
    for arch in SHARED_LIMIT:
        assert sum(f" sm_{arch} " in line for line in lines) == len(DTYPES) * len(PRODUCTS | MEANS), arch


@needs_tools
@pytest.mark.skipif(
    COMMITTED.read_text().splitlines()[0] != f"triton {triton.__version__}",
    reason=f"the committed table is of another triton than {triton.__version__}",
)
def test_a_sample_is_as_the_committed_table_says(rows: list[dict[str, Any]]) -> None:
    assert len(rows) > 2 * len(PRODUCTS)
    assert differences([row["line"] for row in rows], COMMITTED) == []
    assert len(differences([rows[0]["line"].replace("  ok", "  OK")], COMMITTED)) == 1


@needs_tools
@pytest.mark.nightly
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gates_hold_for_every_layout_of_the_input(layout: str, tmp_path: Path) -> None:
    processes = [compile_some(tmp_path, "--layout", layout, "--arch", str(arch)) for arch in ARCHS]
    found = [row for process in processes for row in finish(process)]
    assert {row["layout"] for row in found} == {layout}
    assert [row for row in found if row["faults"]] == []


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_other_layouts_are_compiled_with_the_spread_where_no_address_need_be_aligned(layout: str) -> None:
    found = set()
    for launch in launches(torch.float32, layout):
        arguments = dict(zip(launch.kernel.arg_names, launch.args, strict=True))
        assert arguments["d"] % 16 != 0
        if "EDGE" in arguments:
            stage = "whole" if arguments.get("partial_ptr") is None else "part"
            found.add((arguments["EDGE"], launch.options["num_warps"], stage))
            assert arguments["spread_ptr"] is not None
    assert found == {product[1:4] for product in PRODUCTS}


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
    assert row["scales"].count("fp64") > row["scales"].count(None)


COUNTS = """
import json, re
import torch, triton
from triton.backends.compiler import GPUTarget
from fastent.kernels.compile import launches, specialize

event = re.compile(r"(st\\.global|ld\\.global\\.cg|bar\\.sync|atom\\.global[.\\w]*)")
for launch in launches(torch.float32, "contiguous"):
    arguments = dict(zip(launch.kernel.arg_names, launch.args))
    if arguments.get("partial_ptr") is not None and arguments.get("spread_ptr") is not None and arguments["EDGE"] == 32:
        source, options = specialize(launch, 90)
        ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
        print(json.dumps({"kernel": launch.kernel.__name__, "events": event.findall(ptx)}))
"""


@needs_tools
def test_what_a_program_leaves_is_stored_before_it_is_counted_and_read_after(tmp_path: Path) -> None:
    found = finish(start("-c", COUNTS, cache=tmp_path))
    assert {row["kernel"] for row in found} == {"_covariance_kernel", "_gram_kernel"}
    for row in found:
        events = row["events"]
        counts = [i for i, event in enumerate(events) if event.startswith("atom")]
        assert len(counts) == 2, row["kernel"]  # of the parts of a tile, of the tiles of a matrix
        for i in counts:
            # One thread counts for all of its program: release and acquire reach the others through barriers.
            assert events[i] == "atom.global.gpu.acq_rel.add.u64"
            before = [event for event in events[:i] if event != events[i]]
            assert before[-1] == "bar.sync"
            assert "st.global" in before
            assert events[i + 1] == "bar.sync"
            assert "ld.global.cg" in events[i + 1 :]


STAND_IN = """
import json
import torch, triton
from triton.backends.compiler import GPUTarget
from fastent.kernels.covariance import ResidentCovariance

loaded, launched = [], []

class Utils:
    def load_binary(self, name, *rest):
        loaded.append(name)
        return 1, 2, 100, 0, 1024

    def unload_module(self, module):
        pass

    def get_device_properties(self, device):
        return {"max_shared_mem": 232448}

class Driver:
    utils = Utils()

    def launcher_cls(self, src, metadata):
        def launch(x, y, z, stream, function, packed, hooks, enter, exit, *args):
            args = [arg.data_ptr() if isinstance(arg, torch.Tensor) else arg for arg in args]
            launched.append([src.fn.arg_names, x, y, z, stream, function, *args])
        return launch

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 7

    def get_active_torch_device(self):
        return torch.device("cpu")

triton.runtime.driver.set_active(Driver())
evaluator = ResidentCovariance(64, 600, device=torch.device("cpu"))
out = evaluator.output()
one, two = torch.zeros((2, 1, 64, 600), dtype=torch.bfloat16)
evaluator(one, out)
triton.runtime.jit.JITFunction.run = None
evaluator(two, out)
print(json.dumps({"loaded": loaded, "launched": launched, "addresses": [one.data_ptr(), two.data_ptr()]}))
"""


@needs_tools
@pytest.mark.nightly
def test_a_second_call_hands_the_driver_what_triton_would(tmp_path: Path) -> None:
    (found,) = finish(start("-c", STAND_IN, cache=tmp_path))
    launched, (one, two) = found["launched"], found["addresses"]
    assert found["loaded"] == ["_mean_kernel", "_gram_kernel"]
    assert len(launched) == 4
    for first, again in zip(launched[:2], launched[2:], strict=True):
        assert first[0][0] == "h_ptr"
        assert (first[6], again[6]) == (one, two)
        assert first[:6] + first[7:] == again[:6] + again[7:]


def loop(**changes: Any) -> Loop:
    counts = {field.name: 0 for field in fields(Loop) if field.name != "matrix"}
    return Loop(**{"matrix": {"DMMA.884": 16}, **counts, **changes})


def test_gates_name_each_fault() -> None:
    good = {
        "kernel": "covariance",
        "dtype": "fp32",
        "layout": "contiguous",
        "edge": 64,
        "warps": 8,
        "stage": "whole",
        "spread": False,
        "arch": 80,
        "registers": 255,
        "stack": 0,
        "spills": 0,
        "shared": 166912,
        "loop": loop(),
        "cycles": 512,
        "wavefronts": 511,
    }
    assert Resources(**good).faults == ()
    for change, words in (
        ({"loop": loop(matrix={})}, "no DMMA"),
        ({"loop": loop(matrix={"HMMA.1688.F32": 4})}, "no DMMA"),
        ({"loop": loop(fma=3)}, "3 DFMA"),
        ({"stack": 8}, "8 bytes of stack"),
        ({"spills": 2}, "2 local accesses"),
        ({"registers": 256}, "256 registers"),
        ({"shared": 166913}, "166913 bytes"),
        ({"kernel": "gluon", "wavefronts": 512}, "512 wavefronts for 512 cycles"),
    ):
        (fault,) = Resources(**{**good, **change}).faults
        assert words in fault
    # Columns apart: around the loop, not in it.
    around = {**good, "layout": "strided", "stack": 8, "spills": 2}
    assert Resources(**around).faults == ()
    assert len(Resources(**{**around, "loop": loop(spills=1)}).faults) == 1
    assert Resources(**{**good, "wavefronts": 1024}).faults == ()  # the compiler's layouts, not ours
    assert Resources(**{**good, "kernel": "gluon"}).faults == ()
    assert Resources(**{**good, "arch": 90, "shared": 232448}).faults == ()


def test_inner_loop_is_the_shortest_one_with_a_product() -> None:
    sass = [
        ".L_x_0:",
        "        /*0010*/                   IADD3 R1, R1, 0x1, RZ ;",
        "        /*0020*/              @!P0 BRA `(.L_x_0) ;",
        ".L_x_1:",
        "        /*0030*/                   DADD R2, R2, R4 ;",
        ".L_x_2:",
        "        /*0035*/                   LDS.64 R2, [R4] ;",
        "        /*0036*/                   LDGSTS.E.128 [R5], [R6.64] ;",
        "        /*0040*/                   DMMA.8x8x4 R8, R2, R4, R8 ;",
        "        /*0050*/               @P1 BRA `(.L_x_2) ;",
        "        /*0060*/               @P2 BRA `(.L_x_1) ;",
        "        /*0070*/                   DFMA R2, R2, R4, R6 ;",
        "        /*0080*/                   BRA `(.L_x_3) ;",
        ".L_x_3:",
    ]
    assert inner_loop(sass) == sass[5:10]
    assert inner_loop(sass[11:]) == []
    assert count_loop(sass) == loop(
        matrix={"DMMA.8x8x4": 1}, shared_loads=1, async_copies=1, shared_bytes=256, global_bytes=512, total=4
    )
