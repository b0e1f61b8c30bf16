"""A machine for PTX on the CPU: one program at a time, all its threads in lockstep, an instruction at a time.

It runs what Triton makes for a GPU where there is none: for values, which a kernel leaves in `Machine.memory`, and for
addresses, which it finds in `Machine.accesses`: how often shared memory must be passed over is a matter of the
addresses that the lanes of a warp name at once. The instructions are those that the kernels here are made of; any
other raises `NotImplementedError` by its name. Lockstep shows no race, and threads of a program that part ways at a
branch are not followed: `AssertionError`.

Layouts of fragments: PTX ISA, "Matrix fragments for mma.m8n8k4" and "mma.m16n8k16 with .f64".
"""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Access", "Machine", "wavefronts"]

_CPU = torch.device("cpu")
_LABEL = re.compile(r"(\$\w+):")
_INSTRUCTION = re.compile(r"(?:@(!?)(%\w+)\s+)?([a-z]\w*(?:(?:\.|::)\w+)*)\s*(.*);$")
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")
_ADDRESS = re.compile(r"([%\w]+)(?:\s*\+\s*(-?\d+))?")
_BITS = {8: 0xFF, 16: 0xFFFF, 32: 0xFFFFFFFF}
_LOWEST = -(2**63)
_COMPARE = {name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")}
_COMPARE |= {name + "u": compare for name, compare in _COMPARE.items()}


class Access(NamedTuple):
    """One instruction of a program that touches shared memory."""

    store: bool
    bytes: int  # of a lane
    addresses: Tensor  # (threads,)
    active: Tensor  # (threads,) bool


class _Instruction(NamedTuple):
    guard: str | None
    negated: bool
    name: str
    kind: str  # the last part of the name: what the values are
    operands: list[str]


def wavefronts(access: Access) -> int:
    """Count the passes over the 32 banks of shared memory that an access takes, of all warps of the program.

    A bank is 4 bytes wide. 8-byte accesses are served by half a warp at a time, 16-byte ones by a quarter; those served
    together take as many passes as there are different words in one bank.
    """
    words = access.bytes // 4
    lanes = max(words, 1)
    total = 0
    for address, active in zip(
        access.addresses.view(-1, 32 // lanes), access.active.view(-1, 32 // lanes), strict=True
    ):
        touched = {word for at in address[active].tolist() for word in range(at // 4, at // 4 + lanes)}
        banks = [word % 32 for word in touched]
        total += max((banks.count(bank) for bank in set(banks)), default=0)
    return total


def _signed(values: Tensor, bits: int) -> Tensor:
    return values if bits == 64 else (values << (64 - bits)) >> (64 - bits)


def _bits(values: Tensor, bits: int) -> Tensor:
    return values if bits == 64 else values & _BITS[bits]


def _to_float(values: Tensor, kind: str) -> Tensor:
    if kind == "f64":
        return values.view(torch.float64)
    if kind == "f32":
        return values.to(torch.int32).view(torch.float32).double()
    return values.to(torch.int16).view({"f16": torch.float16, "bf16": torch.bfloat16}[kind]).double()


class Machine:
    """One compiled kernel, the memory of its device and the registers of the program that runs.

    Parameters
    ----------
    ptx : str
        As Triton leaves it.
    threads : int
        Of a program.
    memory : Tensor, shape (bytes,), uint8, optional
        What pointers point into, by offset. Without it loads give 0 and stores go nowhere, which is enough for the
        addresses in shared memory.
    shared : int
        Bytes of shared memory.
    """

    def __init__(self, ptx: str, threads: int, memory: Tensor | None = None, shared: int = 2**18) -> None:
        self.threads, self.memory = threads, memory
        self.shared = torch.zeros(shared, dtype=torch.uint8, device=_CPU)
        self.labels: dict[str, int] = {}
        self.code: list[_Instruction] = []
        lane = torch.arange(threads, dtype=torch.int64, device=_CPU)
        self.lane = lane
        self.group, self.in_group = lane % 32 // 4, lane % 4  # of the fragments of a product
        self.everyone = torch.ones(threads, dtype=torch.bool, device=_CPU)
        for raw in ptx[ptx.index("\n{") :].splitlines():
            text = raw.partition("//")[0].strip()
            if label := _LABEL.fullmatch(text):
                self.labels[label[1]] = len(self.code)
            elif text and text[0] not in ".{})$" and (found := _INSTRUCTION.match(text)):
                operands = _OPERAND.findall(found[4])
                name = found[3].replace("::cta", "")
                self.code.append(
                    _Instruction(found[2], found[1] == "!", name, name.rpartition(".")[2], operands)
                )

    def run(
        self,
        params: Sequence[int | float],
        program: tuple[int, int],
        programs: tuple[int, int],
        *,
        trip: bool = False,
    ) -> None:
        """Run one program.

        Parameters
        ----------
        params : sequence of int or float
            Values of the kernel's parameters; pointers are offsets into the memory.
        program, programs : (int, int)
            Which one, of how many.
        trip : bool
            Stop at the second turn of the first matrix product, with the accesses and the products since the first:
            one trip around the inner loop.
        """
        self.params = params
        special: dict[str, Tensor | int] = {
            "%tid.x": self.lane,
            "%ntid.x": self.threads,
            "%laneid": self.lane % 32,
        }
        for axis, name in enumerate("xyz"):
            special[f"%ctaid.{name}"] = (*program, 0)[axis]
            special[f"%nctaid.{name}"] = (*programs, 1)[axis]
        self.registers = {name: self.everyone * value for name, value in special.items()}
        self.accesses: list[Access] = []
        self.flops = 0  # of the products
        first, at = None, 0
        while at < len(self.code):
            instruction = self.code[at]
            at += 1
            active = self.everyone
            if instruction.guard:
                active = self.registers[instruction.guard] != instruction.negated
            base = instruction.name.partition(".")[0]
            if base in ("bra", "ret"):
                assert active.all() or not active.any(), f"threads part ways at {instruction}"
                if active.all():
                    at = len(self.code) if base == "ret" else self.labels[instruction.operands[0]]
                continue
            if trip and base == "mma":
                if first == at:
                    return
                if first is None:
                    first, self.flops, self.accesses = at, 0, []
            if active.any():
                getattr(self, f"_{base}", self._arithmetic)(instruction, active)
        assert not trip, "no loop with a matrix product"

    # Operands

    def _value(self, text: str, kind: str) -> Tensor:
        if text.startswith("%"):
            return self.registers[text]
        if text.startswith(("0d", "0f")):
            number = int(text[2:], 16)
            return self.everyone * (number - (number >> 63 << 64))
        if text == "global_smem":
            return self.everyone * 0
        bits = 64 if kind == "pred" else int(kind.lstrip("bfsu"))
        return _bits(self.everyone * int(text, 0), bits)

    def _floats(self, text: str, kind: str) -> Tensor:
        return _to_float(self._value(text, kind), kind)

    def _set(self, name: str, values: Tensor, active: Tensor) -> None:
        if active is not self.everyone:
            old = self.registers.get(name, torch.zeros_like(values))
            values = torch.where(active, values, old)
        self.registers[name] = values

    def _names(self, text: str) -> list[str]:
        return _OPERAND.findall(text.strip("{}[] "))

    def _address(self, text: str) -> Tensor:
        found = _ADDRESS.match(text.strip("[] "))
        assert found, text
        return self._value(found[1], "b64") + int(found[2] or 0)

    # Memory

    def _ld(self, instruction: _Instruction, active: Tensor) -> None:
        _, space, *_ = instruction.name.split(".")
        targets = self._names(instruction.operands[0])
        size = int(instruction.kind[1:]) // 8
        if space == "param":
            value = self.params[int(re.findall(r"_param_(\d+)", instruction.operands[1])[0])]
            if isinstance(value, float):
                exact = torch.full((self.threads,), value, dtype=torch.float64, device=_CPU)
                pattern = exact.view(torch.int64) if size == 8 else exact.float().view(torch.int32).long()
            else:
                pattern = self.everyone * value
            self._set(targets[0], _bits(pattern, 8 * size), active)
            return
        address = self._address(instruction.operands[1])
        if space == "shared":
            self.accesses.append(Access(False, size * len(targets), address, active))
        memory = self.shared if space == "shared" else self.memory
        for number, target in enumerate(targets):
            if memory is None:
                values = torch.zeros(self.threads, dtype=torch.int64, device=_CPU)
            else:
                at = (
                    torch.where(active, address, 0)[:, None]
                    + number * size
                    + torch.arange(size, dtype=torch.int64, device=_CPU)
                )
                values = torch.zeros((self.threads, 8), dtype=torch.uint8, device=_CPU)
                values[:, :size] = memory[at]
                values = values.view(torch.int64)[:, 0]
            self._set(target, values, active)

    def _st(self, instruction: _Instruction, active: Tensor) -> None:
        space = instruction.name.split(".")[1]
        sources = self._names(instruction.operands[1])
        size = int(instruction.kind[1:]) // 8
        address = self._address(instruction.operands[0])
        if space == "shared":
            self.accesses.append(Access(True, size * len(sources), address, active))
        memory = self.shared if space == "shared" else self.memory
        if memory is None:
            return
        for number, source in enumerate(sources):
            values = self._value(source, instruction.kind)[:, None].view(torch.uint8)[active, :size]
            memory[
                address[active, None] + number * size + torch.arange(size, dtype=torch.int64, device=_CPU)
            ] = values

    def _atom(self, instruction: _Instruction, active: Tensor) -> None:
        assert ".add.u" in instruction.name, instruction
        assert int(active.sum()) == 1, "one thread counts for its program"
        target, place, source = instruction.operands
        bits = int(instruction.kind[1:])
        address = int(self._address(place)[active])
        added = int(self._value(source, instruction.kind)[active])
        assert self.memory is not None
        cell = self.memory[address : address + bits // 8].view({32: torch.int32, 64: torch.int64}[bits])
        self._set(target, self.everyone * int(cell), active)
        cell += added

    def _bar(self, instruction: _Instruction, active: Tensor) -> None:
        assert active.all(), f"threads part ways at {instruction}"

    def _shfl(self, instruction: _Instruction, active: Tensor) -> None:
        assert ".bfly." in instruction.name, instruction
        target, source, mask, *_ = instruction.operands
        self._set(target, self._value(source, "b32")[self.lane ^ int(mask, 0)], active)

    # Products

    def _mma(self, instruction: _Instruction, active: Tensor) -> None:
        assert active.all(), instruction
        d, a, b, c = (self._names(operand) for operand in instruction.operands)
        (m, n, k) = {"m16n8k16": (16, 8, 16), "m8n8k4": (8, 8, 4)}[instruction.name.split(".")[3]]
        warps, warp = self.threads // 32, self.lane // 32
        self.flops += 2 * m * n * k * warps
        left = torch.zeros((warps, m, k), dtype=torch.float64, device=_CPU)
        for number, name in enumerate(a):
            row = self.group + (8 * (number % 2) if m == 16 else 0)
            column = self.in_group + (4 * (number // 2) if m == 16 else 0)
            left[warp, row, column] = self._floats(name, "f64")
        right = torch.zeros((warps, k, n), dtype=torch.float64, device=_CPU)
        for number, name in enumerate(b):
            right[warp, self.in_group + 4 * number, self.group] = self._floats(name, "f64")
        product = left @ right
        for number, (target, name) in enumerate(zip(d, c, strict=True)):
            found = product[warp, self.group + 8 * (number // 2), 2 * self.in_group + number % 2]
            self._set(target, (found + self._floats(name, "f64")).view(torch.int64), active)

    # The rest

    def _mov(self, instruction: _Instruction, active: Tensor) -> None:
        target, source = instruction.operands
        bits = 1 if instruction.kind == "pred" else int(instruction.kind[1:])
        if target.startswith("{"):
            names = self._names(target)
            for number, name in enumerate(names):
                part = self._value(source, instruction.kind) >> (number * bits // len(names))
                self._set(name, _bits(part, bits // len(names)), active)
        elif source.startswith("{"):
            names = self._names(source)
            each = bits // len(names)
            parts = (self._value(name, f"b{each}") << (number * each) for number, name in enumerate(names))
            self._set(target, functools.reduce(torch.bitwise_or, parts), active)
        else:
            value = self._value(source, instruction.kind)
            self._set(target, value if bits > 1 else value.bool(), active)

    def _cvt(self, instruction: _Instruction, active: Tensor) -> None:
        target, source = instruction.operands
        to, kind = instruction.name.split(".")[-2:]
        if "f" in kind:
            assert to in ("f64", "f32"), instruction
            values = self._floats(source, kind)
            values = (
                values.view(torch.int64)
                if to == "f64"
                else _bits(values.float().view(torch.int32).long(), 32)
            )
        else:
            values = self._value(source, kind)
            values = _signed(values, int(kind[1:])) if kind[0] == "s" else _bits(values, int(kind[1:]))
            values = values.double().view(torch.int64) if to == "f64" else _bits(values, int(to[1:]))
        self._set(target, values, active)

    def _setp(self, instruction: _Instruction, active: Tensor) -> None:
        _, relation, *_ = instruction.name.split(".")
        kind = instruction.kind
        target, *sources = instruction.operands
        a, b = (
            self._floats(source, kind) if kind[0] == "f" else self._value(source, kind) for source in sources
        )
        if kind[0] == "s":
            a, b = _signed(a, int(kind[1:])), _signed(b, int(kind[1:]))
        elif kind == "u64":
            a, b = a ^ _LOWEST, b ^ _LOWEST
        self._set(target, _COMPARE[relation](a, b), active)

    def _selp(self, instruction: _Instruction, active: Tensor) -> None:
        target, a, b, chosen = instruction.operands
        values = torch.where(
            self.registers[chosen], self._value(a, instruction.kind), self._value(b, instruction.kind)
        )
        self._set(target, values, active)

    def _arithmetic(self, instruction: _Instruction, active: Tensor) -> None:
        base, *modifiers = instruction.name.split(".")
        kind = instruction.kind
        target, *sources = instruction.operands
        if kind == "f64" and base in _FLOATS:
            found = _FLOATS[base](*(self._floats(source, kind) for source in sources)).view(torch.int64)
        elif base in _INTEGERS:
            values = [self._value(source, kind) for source in sources]
            bits = 64 if kind == "pred" else int(kind[1:])
            wide = "wide" in modifiers
            if kind[0] == "s" and bits < 64:  # the third of a wide sum has twice the bits
                values[:2] = [_signed(value, bits) for value in values[:2]]
            found = _INTEGERS[base](*values)
            found = found if kind == "pred" else _bits(found, 2 * bits if wide else bits)
        else:
            raise NotImplementedError(instruction.name)
        self._set(target, found, active)


_FLOATS: dict[str, Callable[..., Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "min": torch.fmin,
    "max": torch.fmax,
    "neg": torch.neg,
}
_INTEGERS: dict[str, Callable[..., Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "mad": lambda a, b, c: a * b + c,
    "div": lambda a, b: torch.div(a, b, rounding_mode="trunc"),
    "rem": torch.fmod,
    "min": torch.minimum,
    "max": torch.maximum,
    "neg": torch.neg,
    "not": torch.bitwise_not,
    "and": torch.bitwise_and,
    "or": torch.bitwise_or,
    "xor": torch.bitwise_xor,
    "shl": torch.bitwise_left_shift,
    "shr": torch.bitwise_right_shift,
    "bfe": lambda a, start, length: (a >> start) & ((1 << length) - 1),
}
