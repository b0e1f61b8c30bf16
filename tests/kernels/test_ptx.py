"""The machine for PTX: passes over the banks by closed forms, instructions by what they are for, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastent.kernels.ptx import Access, Machine, wavefronts

LANE = torch.arange(32)
ALL = torch.ones(32, dtype=torch.bool)


@pytest.mark.parametrize(
    ("size", "addresses", "passes"),
    [
        (4, 4 * LANE, 1),  # a word of each bank
        (4, 0 * LANE, 1),  # one word for all
        (4, 128 * LANE, 32),  # 32 words of one bank
        (4, 4 * (LANE % 16) + 128 * (LANE // 16), 2),
        (8, 8 * LANE, 2),  # by half warps
        (8, 64 * LANE, 2 * 8),
        (8, 128 * (LANE % 16), 2 * 16),
        (16, 16 * LANE, 4),  # by quarters
        (16, 64 * LANE, 4 * 4),
    ],
)
def test_wavefronts_are_the_words_that_meet_in_a_bank(size: int, addresses: Tensor, passes: int) -> None:
    assert wavefronts(Access(False, size, addresses, ALL)) == passes
    assert (
        wavefronts(Access(False, size, torch.cat([addresses, addresses]), torch.cat([ALL, ALL])))
        == 2 * passes
    )


def test_lanes_that_do_not_take_part_meet_nobody() -> None:
    assert wavefronts(Access(True, 8, 128 * LANE, LANE < 3)) == 3
    assert wavefronts(Access(True, 8, 128 * LANE, LANE < 0)) == 0


def run(body: str, params: tuple[int | float, ...] = (), threads: int = 32, size: int = 4096) -> Machine:
    machine = Machine("\n{\n" + body + "\nret;\n}\n", threads, torch.zeros(size, dtype=torch.uint8))
    machine.run(params, (3, 1), (7, 2))
    return machine


@pytest.mark.parametrize(
    ("code", "want"),
    [
        ("mul.wide.s32 %rd1, %r1, -8;", -8 * LANE),
        ("cvt.s64.s32 %rd1, %r2;", LANE - 5),
        ("cvt.u64.u32 %rd1, %r2;", (LANE - 5) % 2**32),
        ("mad.wide.s32 %rd1, %r2, 3, %rd0;", 3 * (LANE - 5) + 10**10),
        ("bfe.u32 %r3, %r1, 2, 2; cvt.u64.u32 %rd1, %r3;", LANE // 4 % 4),
        ("div.s32 %r3, %r2, 3; cvt.s64.s32 %rd1, %r3;", torch.div(LANE - 5, 3, rounding_mode="trunc")),
        ("setp.lt.s32 %p1, %r2, 0; selp.b64 %rd1, 1, 2, %p1;", torch.where(LANE < 5, 1, 2)),
        ("setp.lt.u32 %p1, %r2, 9; selp.b64 %rd1, 1, 2, %p1;", torch.where((LANE >= 5) & (LANE < 14), 1, 2)),
        ("mov.b64 %rd1, 7; setp.gt.s32 %p1, %r1, 9; @%p1 mov.b64 %rd1, 8;", torch.where(LANE > 9, 8, 7)),
        ("shfl.sync.bfly.b32 %r3, %r1, 5, 31, -1; cvt.u64.u32 %rd1, %r3;", LANE ^ 5),
        ("mov.b64 {%r3, %r4}, %rd0; mov.b64 %rd1, {%r3, %r4};", 0 * LANE + 10**10),
        ("mov.u32 %r3, %ctaid.x; cvt.u64.u32 %rd1, %r3;", 0 * LANE + 3),
    ],
)
def test_integers_are_as_wide_and_as_signed_as_the_instruction_says(code: str, want: Tensor) -> None:
    setup = "mov.u32 %r1, %tid.x; sub.s32 %r2, %r1, 5; mov.b64 %rd0, 10000000000;"
    machine = run((setup + code).replace(";", ";\n"))
    assert machine.registers["%rd1"].tolist() == want.tolist()


def test_16_bit_values_become_float64_exactly_and_parameters_keep_their_width() -> None:
    code = """ld.param.b64 %rd1, [k_param_0];
    ld.param.b32 %r1, [k_param_0];
    cvt.f64.f32 %rd2, %r1;
    mov.b16 %rs1, 0xC0A0;
    cvt.f64.bf16 %rd3, %rs1;
    add.rn.f64 %rd3, %rd3, %rd1;"""
    found = {
        name: run(code, (0.1,)).registers[name].view(torch.float64)[0].item()
        for name in ("%rd1", "%rd2", "%rd3")
    }
    assert found == {"%rd1": 0.1, "%rd2": torch.tensor(0.1).item(), "%rd3": 0.1 - 5.0}


@pytest.mark.parametrize(
    ("shape", "m", "k", "counts"), [("m16n8k16", 16, 16, (8, 4, 4)), ("m8n8k4", 8, 4, (1, 1, 2))]
)
def test_fragments_of_a_product_are_laid_out_as_the_instruction_set_says(
    shape: str, m: int, k: int, counts: tuple[int, int, int]
) -> None:
    a = torch.arange(m * k, dtype=torch.float64).view(m, k)
    b = torch.arange(k * 8, dtype=torch.float64).view(k, 8) ** 2
    group, within = LANE // 4, LANE % 4
    held = []  # row of a: group, or 8 more; column: the lane's in its group, or 4, 8, 12 more
    for i in range(counts[0]):
        held.append(a[group + 8 * (i % 2), within + 4 * (i // 2)] if m == 16 else a[group, within])
    held += [b[within + 4 * i, group] for i in range(counts[1])]
    names = [f"%a{i}" for i in range(counts[0])] + [f"%b{i}" for i in range(counts[1])]
    lines = ["mov.u32 %r1, %tid.x;", "mul.wide.u32 %rd1, %r1, 8;"]
    lines += [f"ld.global.b64 {name}, [%rd1 + {256 * i}];" for i, name in enumerate(names)]
    lines += [f"mov.b64 %c{i}, 0d3FF0000000000000;" for i in range(counts[2])]
    operands = (
        "{" + ", ".join(f"%{name}{i}" for i in range(count)) + "}"
        for name, count in zip("cabc", (counts[2], *counts), strict=True)
    )
    lines.append(f"mma.sync.aligned.{shape}.row.col.f64.f64.f64.f64 {', '.join(operands)};")
    machine = Machine("\n{\n" + "\n".join(lines) + "\n}\n", 32, torch.stack(held).view(torch.uint8).flatten())
    machine.run((), (0, 0), (1, 1))
    want = a @ b + 1
    for i in range(counts[2]):
        got = machine.registers[f"%c{i}"].view(torch.float64)
        assert torch.equal(got, want[group + 8 * (i // 2), 2 * within + i % 2])


def test_what_is_not_known_or_cannot_be_followed_is_refused() -> None:
    with pytest.raises(NotImplementedError, match=r"ex2\.approx\.f32"):
        run("ex2.approx.f32 %r1, 1;")
    with pytest.raises(AssertionError, match="part ways"):
        run("mov.u32 %r1, %tid.x;\nsetp.lt.s32 %p1, %r1, 4;\n@%p1 bra $L;\n$L:\n")
    with pytest.raises(AssertionError, match="no loop"):
        Machine("\n{\nret;\n}\n", 32).run((), (0, 0), (1, 1), trip=True)
