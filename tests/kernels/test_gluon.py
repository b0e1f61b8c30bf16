"""The covariance in Gluon: values, bits and counters of whole launches, its PTX run on the CPU.

No interpreter knows Gluon. So the kernel is compiled, in a process without TRITON_INTERPRET, and all its programs
run on `fastent.kernels.ptx.Machine`, with every layout of registers and shared memory as the compiler made it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastent.kernels import launch
from fastent.kernels.launch import IN_GLUON, IN_TRITON, TABLE, gluon_is_here

COMMITTED = Path(__file__).parents[2] / "bench" / "results" / "aot.txt"

RUN = """
import json, sys
import torch, triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from fastent.kernels import launch
from fastent.kernels.compile import specialize
from fastent.kernels.covariance import covariance_launches
from fastent.kernels.ptx import Machine

arch, dtype, layouts, shape, launches = json.loads(sys.argv[1])
dtype = getattr(torch, dtype)
batch, n, d = shape
tile = launch.IN_GLUON[-1].tile
launch.TABLE["covariance"] = (launch.Entry(None, tile),)
launch.MULTIPROCESSORS, launch._BESIDE = 4, 0  # so that a sum of few steps is split
whole = torch.randint(-50, 50, shape, generator=torch.Generator().manual_seed(0))


def lie(layout):
    x = whole.to(dtype)
    if layout == "transposed":
        return x.mT.contiguous().mT
    apart = 2 if layout == "strided" else 1
    store = torch.full((batch, n, apart * d + 1), float("nan"), dtype=dtype)
    held = store[..., 1 :: apart] if layout != "contiguous" else x
    return held.copy_(x)


def storages(args):
    return {arg.untyped_storage().data_ptr(): arg.untyped_storage() for arg in args if isinstance(arg, Tensor)}


def run(product):
    source, options = specialize(product, arch)
    ptx = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options).asm["ptx"]
    at, top, held = {}, 256, storages(product.args)
    for key, storage in held.items():
        at[key] = top
        top += -(-storage.nbytes() // 256) * 256
    memory = torch.full((top,), 255, dtype=torch.uint8)  # NaN where nothing is
    raw = {key: torch.empty(0, dtype=torch.uint8).set_(storage) for key, storage in held.items()}
    for key, content in raw.items():
        memory[at[key] : at[key] + len(content)] = content
    params = [
        at[arg.untyped_storage().data_ptr()] + arg.data_ptr() - arg.untyped_storage().data_ptr()
        if isinstance(arg, Tensor) else arg
        for name, arg in zip(product.kernel.arg_names, product.args)
        if source.signature[name] != "constexpr"
    ]
    machine = Machine(ptx, 32 * tile.warps, memory)
    for part in reversed(range(product.grid[1])):
        for program in range(product.grid[0]):
            machine.run([*params, 0, 0], (program, part), product.grid)
    for key, content in raw.items():
        content.copy_(memory[at[key] : at[key] + len(content)])


x = whole.double()
y = x - x.mean(1, keepdim=True)
want = y.mT @ y / n
found = []
for layout in layouts:
    h = lie(layout)
    out = launch.output("covariance", batch, n, d, h.device, spread=True)
    work = launch.workspace("covariance", batch, n, d, h.device, spread=True)
    for _ in range(launches):
        out.block.fill_(float("nan"))
        out.centre[:, 0], out.centre[:, 1] = x[:, 0], (x - x[:, :1]).mean(1)
        product = covariance_launches(h, out, work, 1 / n)[-1]
        assert product.kernel.is_gluon()
        run(product)
    lower = out.lower.tril()
    mirrored = lower + lower.tril(-1).mT
    traces, squares = mirrored.diagonal(dim1=1, dim2=2).sum(1), mirrored.square().sum((1, 2))
    expected = torch.stack([traces, squares, traces**2 / squares], 1)
    found.append({
        "error": ((lower - want.tril()).abs().amax() / want.abs().amax()).item(),
        "spread": (out.spread / expected - 1).abs().max().item(),
        "parts": product.grid[1],
        "above": out.lower[:, :64, 64:].isnan().all().item(),
        "bits": [value.hex() for value in [*lower.flatten().tolist(), *out.spread.flatten().tolist()]],
        "counted": [counter.tolist() for counter in (work.counted, work.arrived) if counter is not None],
    })
print(json.dumps(found))
"""


def run(
    arch: int, dtype: str, layouts: tuple[str, ...], shape: tuple[int, int, int], launches: int = 1
) -> list:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", RUN, json.dumps([arch, dtype, layouts, shape, launches])]
    done = subprocess.run(
        command, env={**environment, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[:3000]
    return json.loads(done.stdout.splitlines()[0])


@pytest.mark.nightly
def test_the_compiled_kernel_is_right_in_parts_and_beyond_its_tile() -> None:
    (found,) = run(90, "bfloat16", ("contiguous",), (1, 49, 70))
    assert found["parts"] > 1
    assert found["error"] < 1e-14
    assert found["spread"] < 1e-14
    assert found["above"]  # tiles above the diagonal are never written


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_every_layout_and_member_of_a_batch_has_the_same_right_bits(dtype: str) -> None:
    layouts = ("contiguous", "transposed", "odd", "strided")
    found = run(80 if dtype == "float16" else 90, dtype, layouts, (2, 41, 131))
    for row in found:
        assert row["error"] < 1e-14
        assert row["spread"] < 1e-14
        assert row["bits"] == found[0]["bits"]


@pytest.mark.nightly
def test_a_second_launch_on_the_same_memory_has_the_same_bits() -> None:
    (once,), (twice,) = (run(90, "float32", ("contiguous",), (1, 49, 70), launches) for launches in (1, 2))
    assert once["bits"] == twice["bits"]
    assert twice["counted"] == [
        [[2 * n for n in counts] for counts in once["counted"][0]],
        [2 * n for n in once["counted"][1]],
    ]


def test_gluon_is_where_triton_has_it_and_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    ampere = "triton.experimental.gluon.language.nvidia.ampere"
    monkeypatch.setattr(launch.triton.knobs.runtime, "interpret", False)
    assert gluon_is_here()  # in each Triton that the project allows: 3.6 to 3.9
    monkeypatch.setattr(launch.triton.knobs.runtime, "interpret", True)
    assert not gluon_is_here()
    monkeypatch.setattr(launch.triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(launch.triton, "__version__", "3.10.0")
    assert not gluon_is_here()  # nothing of it was run
    monkeypatch.undo()
    monkeypatch.setattr(launch.triton.knobs.runtime, "interpret", False)
    monkeypatch.setitem(sys.modules, ampere, None)
    assert not gluon_is_here()


def test_the_table_with_gluon_and_the_one_without_it_serve_every_size_and_differ_in_the_large() -> None:
    assert TABLE["covariance"] in (IN_GLUON, IN_TRITON)
    assert IN_GLUON[0] == IN_TRITON[0]
    assert not any(entry.tile.gluon for entry in IN_TRITON)
    assert [entry.tile.gluon for entry in IN_GLUON] == [False, False, True]
    assert IN_GLUON[-1].largest is IN_TRITON[-1].largest is None
    assert IN_GLUON[-1].tile.means_first


def test_products_bound_the_large_kernel_in_the_committed_table() -> None:
    _, names, *lines = COMMITTED.read_text().splitlines()
    columns = {name: names.index(name) for name in ("regs", "cycles", "waves")}
    rows = [line for line in lines if line.startswith("gluon ")]
    assert len(rows) == 3 * 4 * 4  # architectures, dtypes; whole or in parts, with the spread or without
    for row in rows:
        registers, cycles, waves = (
            int(row[:end].split()[-1]) for end in (columns[name] + len(name) for name in columns)
        )
        assert registers <= 255
        # 0.55 of what the compiler's layouts took under 3.6, 1,024 for 512 cycles; and less than the products.
        assert waves <= 0.55 * 2 * cycles
        assert waves < cycles
