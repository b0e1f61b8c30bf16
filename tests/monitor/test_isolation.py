"""Training with a monitor is bit-identical to training without one; each guard is needed for that."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from fake_device import FakeStreams
from torch import Tensor, nn

from fastent.monitor import isolation
from fastent.monitor.deferred import Devices, Host, Ring, TorchFormer
from fastent.monitor.isolation import undisturbed
from fastent.monitor.monitor import SpectralEntropyMonitor

STEPS = 12


@pytest.fixture(autouse=True)
def _no_other_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a plain process: pytest-xdist's workers have a thread of their own (`tests/test_guard_threads.py`)."""
    monkeypatch.setattr(isolation, "_other_threads", lambda: False)


class Restless(nn.Module):
    """Changes a buffer and draws from every generator in forward, in eval mode too, and lets both matter."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        noise = torch.rand(1) + float(np.random.rand()) + random.random()  # noqa: NPY002
        return x + 1e-3 * noise * self.count


class Bomb(nn.Module):
    """Raises in eval mode, that is in the middle of the probe's forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            raise ArithmeticError("forward failed midway")
        return x


def make_model(last: nn.Module | None = None) -> nn.Sequential:
    body = [nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(inplace=True), nn.Dropout(0.3), Restless()]
    return nn.Sequential(*body, last or nn.Identity(), nn.Linear(16, 3))


def seed_all() -> None:
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    random.seed(3)


def random_states() -> list[Any]:
    return [
        torch.get_rng_state().tolist(),
        np.random.get_state(legacy=False)["state"]["key"].tolist(),  # noqa: NPY002
        random.getstate(),
    ]


def flat(state: Any) -> list[Any]:
    """Every leaf of a nested state, tensors as bytes."""
    if isinstance(state, dict):
        return [leaf for key, value in state.items() for leaf in [key, *flat(value)]]
    if isinstance(state, list | tuple):
        return [leaf for value in state for leaf in flat(value)]
    return [state.numpy().tobytes() if isinstance(state, Tensor) else state]


def train(
    optimizer: Callable[..., torch.optim.Optimizer],
    watch: Callable[[nn.Module], Callable[[int], object]] | None,
    last: nn.Module | None = None,
) -> list[Any]:
    """Weights, optimiser and random states after STEPS steps; `watch` makes what is called in each."""
    seed_all()
    model = make_model(last)
    opt = optimizer(model.parameters())
    step_monitor = watch(model) if watch else lambda step: None
    for step in range(STEPS):
        x = torch.randn(32, 6)
        loss = model(x).square().mean()
        opt.zero_grad()
        loss.backward()
        step_monitor(step)
        opt.step()
        step_monitor(step)
    return flat([model.state_dict(), opt.state_dict(), random_states()])


def sgd(parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def adamw(parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01)


def probe() -> Tensor:
    return torch.linspace(-1, 1, 40 * 6).reshape(40, 6).sin()


@pytest.mark.parametrize("where", ["in line", "worker", "device"])
@pytest.mark.parametrize("optimizer", [sgd, adamw])
def test_training_with_a_monitor_gives_the_same_bits_as_without(
    optimizer: Any, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monitors = []
    streams = FakeStreams()
    by = {"in line": None, "worker": Host(), "device": Ring(streams, TorchFormer())}[where]
    monkeypatch.setattr(Devices, "of", lambda self, x: by)

    def watch(model: nn.Module) -> Callable[[int], object]:
        monitors.append(SpectralEntropyMonitor(model, probe(), ["1", "6"], every=1, on_full="block"))

        def step(i: int) -> None:
            streams.tick()
            monitors[0].step(i)

        return step

    threads = torch.get_num_threads()
    assert train(optimizer, watch) == train(optimizer, None)
    assert torch.get_num_threads() == threads
    streams.tick()
    monitors[0].close()
    assert len(monitors[0].history) == 2 * STEPS


@pytest.mark.parametrize("optimizer", [sgd, adamw])
def test_training_is_the_same_when_every_probe_fails_in_forward(optimizer: Any) -> None:
    def watch(model: nn.Module) -> Callable[[int], object]:
        monitor = SpectralEntropyMonitor(model, probe(), "6", every=1, check=False)

        def step(i: int) -> None:
            with pytest.raises(ArithmeticError, match="midway"):
                monitor.step(i)

        return step

    assert train(optimizer, watch, Bomb()) == train(optimizer, None, Bomb())


def test_training_is_the_same_when_every_probe_fails_in_a_hook() -> None:
    def watch(model: nn.Module) -> Callable[[int], object]:
        monitor = SpectralEntropyMonitor(model, probe(), "5", every=1, check=False)

        def step(i: int) -> None:
            with pytest.raises(ValueError, match="Say which"):
                monitor.step(i)

        return step

    class Tokens(nn.Module):  # 3-D in eval mode: the monitor was not told what to make of tokens
        def forward(self, x: Tensor) -> Tensor:
            return x if self.training else x[:, None]

    assert train(sgd, watch, Tokens()) == train(sgd, None, Tokens())


@pytest.mark.parametrize("name", ["_attributes", "_random_states"])
def test_training_differs_without_this_guard(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def nothing(*args: Any) -> Iterator[None]:
        yield

    monkeypatch.setattr(isolation, name, nothing)

    def watch(model: nn.Module) -> Callable[[int], object]:
        return SpectralEntropyMonitor(model, probe(), "6", every=1).step

    assert train(sgd, watch) != train(sgd, None)


@pytest.mark.parametrize("fails", [False, True])
def test_each_submodule_gets_its_own_mode_back(fails: bool) -> None:
    model = make_model(Bomb() if fails else None)
    model.train()
    model[1].eval()  # a frozen BatchNorm
    before = [module.training for module in model.modules()]
    seen: list[bool] = []
    model[3].register_forward_hook(lambda module, args, out: seen.append(module.training))
    monitor = SpectralEntropyMonitor(model, probe(), "6", check=False)
    if fails:
        with pytest.raises(ArithmeticError):
            monitor.step(0)
    else:
        monitor.step(0)
    assert seen == [False]
    assert [module.training for module in model.modules()] == before == [True, True, False] + [True] * 5


def test_an_override_of_train_is_not_called() -> None:
    class Merging(nn.Linear):  # as adapter libraries do: switching to eval rewrites the weights
        def train(self, mode: bool = True) -> "Merging":
            raise AssertionError("train() was called")

    model = Merging(6, 4)
    assert SpectralEntropyMonitor(model, probe(), "").step(0)[0].d == 4


def test_gradients_are_the_same_objects_with_the_same_values() -> None:
    seed_all()
    model = make_model()
    model[0].weight.requires_grad_(False)
    model(torch.randn(32, 6)).sum().backward()
    grads = [p.grad for p in model.parameters()]
    copies = [None if g is None else g.clone() for g in grads]
    flags = [p.requires_grad for p in model.parameters()]
    versions = [p._version for p in model.parameters()]
    SpectralEntropyMonitor(model, probe(), "6").step(0)
    for p, grad, copy in zip(model.parameters(), grads, copies, strict=True):
        assert p.grad is grad
        assert copy is None or torch.equal(grad, copy)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [p._version for p in model.parameters()] == versions
    assert torch.is_grad_enabled()


def test_a_backward_pass_that_is_under_way_survives_a_probe_that_changes_its_buffer() -> None:
    class Scale(Restless):
        def forward(self, x: Tensor) -> Tensor:
            self.count.add_(1)
            return x * self.count  # backward needs this very version of count

    seed_all()
    model = nn.Sequential(nn.Linear(6, 4), Scale())
    loss = model(torch.randn(8, 6)).sum()
    SpectralEntropyMonitor(model, probe(), "1").step(0)
    loss.backward()
    assert model[1].count.item() == 1.0
    torch.testing.assert_close(model[0].bias.grad, torch.full((4,), 8.0))


@pytest.mark.parametrize("fails", [False, True])
def test_buffers_that_a_pass_replaces_resizes_or_adds_are_as_before(fails: bool) -> None:
    class Cache(nn.Module):
        a: Tensor
        b: Tensor
        c: Tensor | None

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("a", torch.arange(3.0))
            self.register_buffer("b", torch.arange(4.0))
            self.register_buffer("c", None)

        def forward(self, x: Tensor) -> Tensor:
            self.a = self.a + 1
            self.b.resize_(9).fill_(7)
            self.c = torch.ones(2)
            self.register_buffer("late", torch.ones(5))
            if fails:
                raise ArithmeticError
            return x

    model = Cache()
    a, b = model.a, model.b
    monitor = SpectralEntropyMonitor(model, probe(), "", check=False)
    if fails:
        with pytest.raises(ArithmeticError):
            monitor.step(0)
    else:
        monitor.step(0)
    assert model.a is a
    assert model.b is b
    assert a.tolist() == [0, 1, 2]
    assert b.tolist() == [0, 1, 2, 3]
    assert (a._version, b._version) == (0, 0)
    assert model.c is None
    assert list(model.state_dict()) == ["a", "b"]


def test_a_buffer_shared_by_two_modules_is_shared_in_the_probe_too() -> None:
    class Writer(Restless):
        def forward(self, x: Tensor) -> Tensor:
            self.count.add_(1)
            return x

    class Reader(Restless):
        def forward(self, x: Tensor) -> Tensor:
            return x * self.count

    model = nn.Sequential(Writer(), Reader())
    model[1].count = model[0].count
    # Not shared, the reader would multiply by 0.
    assert SpectralEntropyMonitor(model, probe(), "1").step(0)[0].total_variance > 0
    assert model[0].count.item() == 0


def test_a_pass_sees_neither_a_graph_nor_inference_tensors() -> None:
    model = nn.Linear(6, 4)
    kept: list[Tensor] = []
    model.register_forward_hook(lambda module, args, out: kept.append(out))
    SpectralEntropyMonitor(model, probe(), "").step(0)
    assert kept[0].grad_fn is None
    assert not kept[0].is_inference()


def test_cast_weights_that_autocast_cached_before_an_update_are_not_used() -> None:
    seed_all()
    model = nn.Linear(6, 5)
    new = torch.randn(5, 6)
    monitor = SpectralEntropyMonitor(model, probe(), "", check=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(probe())  # fills the cache
        with torch.no_grad():
            model.weight.copy_(new)
        cached = monitor.step(0)[0]
        assert torch.is_autocast_cache_enabled()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fresh = monitor.step(200)[0]
    assert cached.normalized == fresh.normalized


def test_global_switches_are_back_after_an_exception() -> None:
    def switches() -> list[bool]:
        fast = torch.backends.mha.get_fastpath_enabled()
        return [fast, torch.is_autocast_cache_enabled(), torch.is_grad_enabled()]

    def interrupted() -> None:
        with undisturbed(nn.Linear(2, 2)):
            assert switches() == [False, False, False]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert switches() == [True, True, True]


@pytest.mark.gpu
def test_cuda_random_state_is_restored() -> None:
    class Noise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand_like(x)

    model = Noise().cuda()
    torch.cuda.manual_seed(1)
    before = torch.cuda.get_rng_state()
    SpectralEntropyMonitor(model, probe().cuda(), "").step(0)
    assert torch.equal(torch.cuda.get_rng_state(), before)
