"""The evaluator: launches and allocations counted, memory reused, the participation ratio of known spectra."""

from __future__ import annotations

import math
import random
import sys
from collections import Counter
from collections.abc import Callable, Generator
from types import FunctionType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter

from fastent.kernels.covariance import LAUNCHES, ResidentCovariance, covariance, gram, last_to_come
from fastent.kernels.launch import TABLE, Launch, Side, means_partition, partition, workspace


class Allocations(TorchDispatchMode):
    """Operators that return memory which none of their arguments has."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and storage(leaf) not in known:
                self.seen.append(str(func))
        return result


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def activations(n: int, d: int, *, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(n + d)
    return torch.randn((batch, n, d), generator=generator, dtype=torch.float32) + 2


CASES = [
    # side, n, d, launches
    pytest.param(None, 41, 33, 1, id="whole"),
    pytest.param(None, 140, 20, 1, id="split"),
    pytest.param("gram", 20, 41, 2, id="gram"),
    pytest.param("gram", 20, 140, 2, id="gram-split"),
]


@pytest.mark.parametrize(("side", "n", "d", "count"), CASES)
def test_an_evaluation_allocates_nothing_and_takes_these_launches(
    side: Side | None, n: int, d: int, count: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = []
    run = Launch.run
    h = activations(n, d, batch=3).to(device)
    evaluator = ResidentCovariance(n, d, batch=3, device=device, side=side)
    ring = [evaluator.output() for _ in range(2)]
    evaluator(h, ring[0])  # compiles, where there is a compiler
    monkeypatch.setattr(Launch, "run", lambda self: launched.append(self))
    with Allocations() as allocations:
        evaluator(h, ring[1])
    assert allocations.seen == []
    # The launches themselves, outside of the mode: the interpreter moves tensors about with torch.
    assert len(launched) == count
    for launch in launched:
        run(launch)
    for one, two in zip(ring[0][:3], ring[1][:3], strict=True):
        assert one is not None
        assert two is not None
        same = (
            torch.equal(one.tril(), two.tril()) if one.shape[-1] == one.shape[-2] else torch.equal(one, two)
        )
        assert same


def test_the_counter_of_allocations_sees_one() -> None:
    h = activations(40, 8)
    with Allocations() as allocations:
        h[:, 1:].mT.unsqueeze(0)
        assert allocations.seen == []
        h + 1
        torch.empty(3)
    assert len(allocations.seen) == 2


class Compiled:
    """What stands for a kernel before it is compiled and after, and records what it is called with."""

    def __init__(self, after: Compiled | None = None) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.after = after

    def __getitem__(self, grid: Any) -> Any:
        def call(*args: Any, **options: Any) -> Compiled | None:
            at = [arg.data_ptr() if isinstance(arg, Tensor) else arg for arg in args]
            self.calls.append((tuple(grid)[:2], *at))
            return self.after

        return call


@pytest.mark.parametrize(("side", "n", "d", "count"), CASES)
def test_a_call_like_an_earlier_one_leaves_the_jit_out_and_passes_the_same(
    side: Side | None, n: int, d: int, count: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = Compiled()
    jit = Compiled(ready)
    evaluator = ResidentCovariance(n, d, batch=3, device=device, side=side)
    launches = LAUNCHES[evaluator.side]
    monkeypatch.setitem(
        LAUNCHES, evaluator.side, lambda *args: [launch._replace(kernel=jit) for launch in launches(*args)]
    )
    one, two = torch.empty((2, 4, n, d + 1), device=device)
    ring = [evaluator.output() for _ in range(2)]
    evaluator(one[:3, :, :d], ring[0])
    assert (len(jit.calls), len(ready.calls)) == (count, 0)
    evaluator(two[:3, :, :d], ring[0])
    assert (len(jit.calls), len(ready.calls)) == (count, count)
    for first, again in zip(jit.calls, ready.calls, strict=True):
        assert first[0] == again[0]
        assert (first[1], again[1]) == (one.data_ptr(), two.data_ptr())
        assert first[2:] == again[2:]
    for other, out in (
        (two[:3, :, :d], ring[1]),
        (two[:3, :, :d].double(), ring[0]),
        (two[:3, :, 1:], ring[0]),  # not aligned
        (two[:3, :, :d].contiguous(), ring[0]),  # other strides
    ):
        jit.calls.clear()
        ready.calls.clear()
        evaluator(other, out)
        evaluator(other, out)
        assert (len(jit.calls), len(ready.calls)) == (count, count)


def test_launches_of_which_one_cannot_be_made_again_are_all_made_anew(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Triton's hook on its cache may stand in for a launch, which then gives back nothing.
    kernels = [Compiled(), Compiled(Compiled())]
    evaluator = ResidentCovariance(20, 41, device=device)
    gram = LAUNCHES["gram"]
    monkeypatch.setitem(
        LAUNCHES,
        "gram",
        lambda *args: [
            launch._replace(kernel=kernel) for launch, kernel in zip(gram(*args), kernels, strict=True)
        ],
    )
    h, out = torch.empty((20, 41), device=device), evaluator.output()
    for count in (1, 2, 3):
        evaluator(h, out)
        assert [len(kernel.calls) for kernel in kernels] == [count, count]


@pytest.mark.parametrize(("side", "n", "d"), [("covariance", 160, 5), ("gram", 5, 160)])
def test_a_batch_in_groups_has_the_bits_of_its_matrices_and_takes_the_memory_of_one_group(
    side: Side, n: int, d: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules["fastent.kernels.covariance"]
    h = activations(n, d, batch=5).to(device)
    function = gram if side == "gram" else covariance
    alone = [function(item) for item in h]
    taken = []

    def recorded(*args: Any, **options: Any) -> Any:
        taken.append(workspace(*args, **options))
        return taken[-1]

    monkeypatch.setattr(module, "workspace", recorded)
    monkeypatch.setattr(module, "at_once", lambda side, m, length: 2)
    lower, mean = function(h)
    (work,) = taken
    assert work.partial is not None
    assert len(work.partial) == 2
    for one, two, (want, middle) in zip(lower, mean, alone, strict=True):
        assert torch.equal(one.tril(), want.tril())
        assert torch.equal(two, middle)


def test_from_1537_columns_on_the_means_take_a_launch() -> None:
    for d, count in ((1536, 1), (1537, 2), (8192, 2)):
        h = torch.empty((65536, d), dtype=torch.bfloat16, device="meta")
        evaluator = ResidentCovariance(*h.shape, device=h.device)
        assert len(evaluator.launches(h, evaluator.output())) == count


@pytest.mark.parametrize(("side", "n", "d", "count"), CASES)
def test_an_evaluation_has_the_bits_of_the_plain_functions(
    side: Side | None, n: int, d: int, count: int, device: torch.device
) -> None:
    h = activations(n, d, batch=2).to(device)
    evaluator = ResidentCovariance(n, d, batch=2, device=device, side=side)
    out = evaluator.output()
    evaluator(h, out)
    lower, mean = (gram if side == "gram" else covariance)(h)
    assert torch.equal(out.lower.tril(), lower.tril())
    assert torch.equal(out.centre[:, 2], mean)


def test_means_in_parts_are_those_of_all_rows(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TABLE, "covariance", TABLE["covariance"][-1:])
    n, d = 1100, 33
    assert (TABLE["covariance"][0].tile.means_first, means_partition(n, d)[1:]) == (True, (2, 5, 256))
    h = torch.randint(-99, 99, (2, n, d), generator=torch.Generator().manual_seed(0)).float().to(device)
    evaluator = ResidentCovariance(n, d, batch=2, device=device)
    out = evaluator.output()
    means, _ = evaluator.launches(h, out)
    means.run()
    x = h.double()  # integers: every sum is exact
    shift = x[:, [0, n // 2, n - 1]].median(1).values
    delta = (x - shift[:, None]).sum(1) / n
    assert torch.equal(out.centre, torch.stack((shift, delta, shift + delta), 1))


@pytest.mark.interpreter
@pytest.mark.parametrize(("side", "n", "d"), [("covariance", 200, 33), ("gram", 33, 200)])
def test_parts_may_come_in_any_order(side: Side, n: int, d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # The interpreter runs programs in order, so the last part would always be the last to come.
    h = activations(n, d, batch=2)
    evaluator = ResidentCovariance(n, d, batch=2, device=h.device, side=side)
    parts = partition(side, 33, 200).parts
    assert parts > 5
    want, got = evaluator.output(), evaluator.output()
    evaluator(h, want)
    builder, seen = interpreter.interpreter_builder, []
    place = type(builder).set_grid_idx
    for order in (
        [*reversed(range(parts))],
        [*range(1, parts), 0],
        [*range(0, parts, 2), *range(1, parts, 2)],
    ):

        def shuffled(x: int, y: int, z: int, order: list[int] = order) -> None:
            several = builder.grid_dim[1] > 1  # not the launch of the means
            seen.append(several)
            place(builder, x, order[y] if several else y, z)

        monkeypatch.setattr(builder, "set_grid_idx", shuffled)
        for tensor in got:
            assert tensor is not None
            tensor.fill_(math.nan)
        evaluator(h, got)
        for one, two in zip(want[:3], got[:3], strict=True):
            assert one is not None
            assert two is not None
            square = one.shape[-1] == one.shape[-2]
            assert torch.equal(one.tril() if square else one, two.tril() if square else two)
    assert any(seen)


@pytest.mark.parametrize(("side", "n", "d"), [("covariance", 160, 33), ("gram", 33, 160)])
def test_counters_are_never_set_back_and_any_multiple_is_a_start(
    side: Side, n: int, d: int, device: torch.device
) -> None:
    h = activations(n, d).to(device)
    evaluator = ResidentCovariance(n, d, device=device, side=side)
    counted, arrived = evaluator.workspace.counted, evaluator.workspace.arrived
    assert counted is not None
    assert arrived is not None
    _, tiles, parts, _ = partition(side, 33, 160)
    assert (tiles, parts) == (3, 5)
    want, got = evaluator.output(), evaluator.output()
    evaluator(h, want)
    assert counted.tolist() == [[parts] * tiles]
    assert arrived.tolist() == [tiles]
    for before in (2**31 // parts, 2**32 // tiles):  # evaluations, after which 32 bits are used up
        counted.fill_(before * parts)
        arrived.fill_(before * tiles)
        got.block.fill_(math.nan)
        evaluator(h, got)
        assert torch.equal(got.lower.tril(), want.lower.tril())
        for one, two in zip(got[1:3], want[1:3], strict=True):
            assert torch.equal(one, two)  # type: ignore[arg-type]
        assert counted.tolist() == [[(before + 1) * parts] * tiles]
        assert arrived.tolist() == [(before + 1) * tiles]


Rule = Callable[[Any, int], bool]


class Memory:
    """Memory of an evaluator, and what stands for `tl` in the code that counts: a plain store may come late."""

    TILES, PARTS = 2, 4

    def __init__(self) -> None:
        self.counters: Counter[Any] = Counter()
        self.late: dict[Any, int] = {}
        self.parts = [[-1] * self.PARTS for _ in range(self.TILES)]
        self.shares = [-1] * self.TILES

    def debug_barrier(self) -> None:
        """Of the threads of one program, which are one here."""

    def atomic_add(self, counter: Any, value: int, *, sem: str, scope: str) -> int:
        assert (sem, scope) == ("acq_rel", "gpu")
        self.counters[counter] += value
        return self.counters[counter] - value

    def store(self, counter: Any, value: int) -> None:
        self.late[counter] = value

    def counting(self, rule: Rule, counter: Any, programs: int) -> Generator[None, None, bool]:
        last = rule(counter, programs)
        late, self.late = self.late, {}
        yield
        self.counters.update({counter: value - self.counters[counter] for counter, value in late.items()})
        yield
        return last

    def program(
        self, rule: Rule, launch: int, tile: int, part: int, seen: list[set[int]]
    ) -> Generator[None, None, None]:
        """One program of a launch, as the kernels run it; others go on wherever it yields."""
        self.parts[tile][part] = launch
        yield
        if not (yield from self.counting(rule, tile, self.PARTS)):
            return
        self.shares[tile] = launch if {*self.parts[tile]} == {launch} else -1
        yield
        if (yield from self.counting(rule, "tiles", self.TILES)):
            seen.append({*self.shares})

    def launch(self, rule: Rule, launch: int, seen: list[set[int]]) -> list[Generator[None, None, None]]:
        return [
            self.program(rule, launch, tile, part, seen)
            for tile in range(self.TILES)
            for part in range(self.PARTS)
        ]


def wrong_after_an_overlap(rule: Callable[[Memory], Rule], interleavings: int) -> int:
    """In how many interleavings of two launches any of three later ones, each alone, is wrong."""
    wrong = 0
    for seed in range(interleavings):
        choose, memory = random.Random(seed), Memory()
        after: list[set[int]] = []
        for together in ((0, 1), (2,), (3,), (4,)):
            seen: list[set[int]] = []
            under_way = [
                program for launch in together for program in memory.launch(rule(memory), launch, seen)
            ]
            while under_way:
                program = choose.choice(under_way)
                if next(program, memory) is memory:
                    under_way.remove(program)
            after += seen if len(together) == 1 else []
        wrong += after != [{2}, {3}, {4}]
    return wrong


def test_launches_that_overlapped_spoil_none_that_comes_later() -> None:
    # The kernels' own code counts, on memory of this process.
    def kernels(memory: Memory) -> Rule:
        return FunctionType(last_to_come.fn.__code__, {"tl": memory})  # type: ignore[return-value]

    assert wrong_after_an_overlap(kernels, 500) == 0


def test_a_counter_that_is_set_back_is_spoiled_by_an_overlap() -> None:
    def set_back(memory: Memory) -> Rule:
        def rule(counter: Any, programs: int) -> bool:
            last = memory.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == programs - 1
            if last:
                memory.store(counter, 0)
            return last

        return rule

    assert wrong_after_an_overlap(set_back, 100) > 20


@pytest.mark.parametrize(("n", "d", "side"), [(40, 8, "covariance"), (160, 8, "covariance"), (8, 40, "gram")])
def test_participation_ratio_of_known_spectra(n: int, d: int, side: Side, device: torch.device) -> None:
    evaluator = ResidentCovariance(n, d, device=device, side=side)
    out = evaluator.output()
    assert out.spread is not None
    x = torch.zeros(n, d, dtype=torch.float64, device=device)
    rank = 4
    for k in range(rank):  # two rows at +-1 along each axis
        x[2 * k, k], x[2 * k + 1, k] = 1.0, -1.0
    evaluator(x, out)
    assert out.spread[0].tolist() == pytest.approx([2 * rank / n, rank * (2 / n) ** 2, rank], rel=1e-14)
    evaluator(x[:, :1].expand(n, d), out)  # all columns equal: rank one
    assert out.spread[0, 2].item() == pytest.approx(1.0, rel=1e-14)
    evaluator(x[-1:].expand(n, d), out)  # all rows equal
    assert out.spread[0, :2].tolist() == [0.0, 0.0]
    assert math.isnan(out.spread[0, 2].item())


def test_one_bad_matrix_spoils_its_own_spread_alone(device: torch.device) -> None:
    h = activations(140, 20, batch=3).to(device)
    evaluator = ResidentCovariance(140, 20, batch=3, device=device)
    good, out = evaluator.output(), evaluator.output()
    evaluator(h, good)
    h[1, 70, 3] = float("inf")
    evaluator(h, out)
    assert good.spread is not None
    assert out.spread is not None
    assert torch.equal(out.spread[[0, 2]], good.spread[[0, 2]])
    assert not out.spread[1].isfinite().any()
    h[1, 70, 3] = 0.0
    evaluator(h, out)  # the count of arrivals is back at 0: nothing hangs on what came before
    assert out.spread.isfinite().all()
