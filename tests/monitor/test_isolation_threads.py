"""A probe beside other threads: their random numbers, the switches of the process, and one model shared."""

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo  # the probe changes the compiler's stance only where it is loaded
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastent.monitor.isolation import undisturbed
from fastent.monitor.monitor import SpectralEntropyMonitor

SECONDS = 20  # that a thread is waited for: only a failure takes as long


def probe() -> Tensor:
    return torch.linspace(-1, 1, 40 * 6).reshape(40, 6).sin()


class Thread:
    """A thread that does what it is told, one thing at a time."""

    def __init__(self) -> None:
        self._wake, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._task: Callable[[], object] | None = None
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while self._wake.acquire() and self._task is not None:
            self._task()
            self._done.release()

    def do(self, task: Callable[[], object] | None) -> None:
        self._task = task
        self._wake.release()
        if task is not None:
            assert self._done.acquire(timeout=SECONDS)

    def end(self) -> None:
        self.do(None)
        self._thread.join(SECONDS)


@contextmanager
def beside() -> Iterator[Thread]:
    thread = Thread()
    try:
        yield thread
    finally:
        thread.end()


def seed() -> None:
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    random.seed(3)


def draw() -> tuple[float, ...]:
    return (torch.rand(()).item(), float(np.random.rand()), random.random())  # noqa: NPY002


class During(nn.Module):
    """Calls a function in the middle of its forward pass."""

    def __init__(self, call: Callable[[], object]) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        self.call()
        return x


class Draws(nn.Module):
    """Draws in eval mode too."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.rand_like(x) + nn.functional.dropout(x, training=True)
        return nn.functional.rrelu(x, training=True)  # takes no generator from us


# Random numbers


def test_what_another_thread_draws_during_a_pass_is_not_drawn_again() -> None:
    seed()
    expected = [draw() for _ in range(5)]
    seed()
    served: list[Any] = []
    with beside() as loader:
        take = lambda: served.append(draw())  # noqa: E731
        monitor = SpectralEntropyMonitor(During(lambda: loader.do(take)), probe(), "", every=1, check=False)
        loader.do(take)
        monitor.step(0)
        loader.do(take)
        monitor.step(1)
        loader.do(take)
    assert served == expected


def test_a_model_that_draws_takes_nothing_from_a_thread_that_draws_meanwhile() -> None:
    seed()
    expected = [torch.rand(()).item() for _ in range(5)]
    seed()
    served: list[float] = []
    with beside() as loader:
        take = lambda: served.append(torch.rand(()).item())  # noqa: E731
        model = nn.Sequential(Draws(), During(lambda: loader.do(take)), Draws())
        monitor = SpectralEntropyMonitor(model, probe(), "", every=1, check=False)
        take()
        monitor.step(0)
        take()
        monitor.step(1)
        take()
    assert served == expected


def test_a_draw_that_falls_into_a_random_operation_of_the_model_is_not_drawn_again() -> None:
    seed()
    expected = [torch.rand(()).item() for _ in range(4)]
    seed()
    served: list[float] = []

    class Within(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if torch.Tag.nondeterministic_seeded in func.tags:
                loader.do(lambda: served.append(torch.rand(()).item()))
            return func(*args, **(kwargs or {}))

    class Random(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand_like(x) + torch.randn(6) + x.clone().uniform_() + torch.randint(3, (6,))

    monitor = SpectralEntropyMonitor(Random(), probe(), "", check=False)
    with beside() as loader, Within():
        monitor.step(0)
    assert served == expected


def test_a_pass_draws_and_records_the_same_beside_an_idle_thread() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), Draws(), nn.Linear(5, 4), Draws())
    layers = ["0", "1", "2", "3"]
    seed()
    before = torch.get_rng_state()
    (*alone,) = SpectralEntropyMonitor(model, probe(), layers).step(0)
    with beside():
        (*together,) = SpectralEntropyMonitor(model, probe(), layers).step(0)
    assert alone == together
    assert torch.equal(torch.get_rng_state(), before)


def test_operators_of_higher_order_run_beside_an_idle_thread() -> None:
    class Conditional(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 1e9, lambda x: x + 1, lambda x: x * 2, (x,))

    x = probe()
    expected = SpectralEntropyMonitor(nn.Identity(), 2 * x, "").step(0)[0].total_variance
    with beside():
        assert SpectralEntropyMonitor(Conditional(), x, "").step(0)[0].total_variance == expected


# Switches


def switches() -> list[Any]:
    return [torch.backends.mha.get_fastpath_enabled(), torch._dynamo.eval_frame._stance.stance]


def test_passes_that_overlap_leave_the_switches_of_the_process_as_they_were() -> None:
    before = switches()
    seen: list[Any] = []
    with beside() as other:
        first, second = undisturbed(nn.Linear(6, 4)), undisturbed(nn.Linear(6, 4))
        first.__enter__()
        other.do(second.__enter__)
        seen.append(switches())
        first.__exit__(None, None, None)
        seen.append(switches())
        other.do(lambda: second.__exit__(None, None, None))
    assert seen == [[False, "force_eager"]] * 2
    assert switches() == before == [True, "default"]


def test_gradients_and_the_autocast_cache_stay_on_in_another_thread() -> None:
    seen: list[bool] = []
    with beside() as other, undisturbed(nn.Linear(6, 4)):
        assert not torch.is_grad_enabled()
        assert not torch.is_autocast_cache_enabled()
        other.do(lambda: seen.extend([torch.is_grad_enabled(), torch.is_autocast_cache_enabled()]))
    assert seen == [True, True]


# One model in two threads


@pytest.mark.parametrize("part", [False, True], ids=["the same model", "a part of it"])
def test_passes_of_two_threads_through_one_model_wait_for_each_other(part: bool) -> None:
    inside, most = [], []

    class Counting(nn.Module):
        count: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            inside.append(0)
            most.append(len(inside))
            self.count.add_(1)
            out = x * self.count.clone()
            threading.Event().wait(0.002)
            inside.pop()
            return out

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Sequential(Counting(), nn.Linear(5, 4)))
    buffer = model[1][0].count
    watched = [
        (model, probe(), "1"),
        (model[1], model[0](probe()).detach(), "") if part else (model, probe(), "1"),
    ]
    expected = [SpectralEntropyMonitor(*one).step(0)[0].normalized for one in watched]
    most.clear()
    found: list[list[float]] = [[], []]

    def run(i: int) -> None:
        monitor = SpectralEntropyMonitor(*watched[i], every=1, check=False)
        for step in range(15):
            found[i].extend(record.normalized for record in monitor.step(step))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert found == [[h] * 15 for h in expected]
    assert set(most) == {1}
    assert model[1][0].count is buffer
    assert buffer.item() == 0
    assert model[1].training
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_pass_inside_a_pass_of_the_same_thread_does_not_wait() -> None:
    inner = nn.Linear(6, 5)
    model = nn.Sequential(inner, nn.Tanh())
    records: list[Any] = []
    nested = SpectralEntropyMonitor(inner, probe(), "")
    model[1].register_forward_hook(lambda *args: records.extend(nested.step(0)))
    assert len(SpectralEntropyMonitor(model, probe(), "1").step(0)) == len(records) == 1
    assert inner.training
