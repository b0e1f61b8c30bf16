"""Where the probe's pass ends, and that it gives the same to the bit wherever that is."""

import json
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastent.monitor import probe as probe_module
from fastent.monitor.monitor import SpectralEntropyMonitor as Monitor

BLOCKS = ["blocks.0", "blocks.1", "blocks.2"]


def inputs(n: int = 24, seed: int = 0) -> Tensor:
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))


class Counted(nn.Linear):
    """Counts its calls in a list, which a probe puts back, and in one of the class, which it does not."""

    calls: list[str] = []  # noqa: RUF012

    def __init__(self, name: str, *sizes: int) -> None:
        super().__init__(*sizes)
        self.name, self.own = name, [0]

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(self.name)
        self.own[0] += 1
        return super().forward(x)


class Model(nn.Module):
    """An embedding, three blocks with a buffer, a norm and a projection."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = Counted("embed", 6, 8)
        self.blocks = nn.ModuleList(
            nn.Sequential(Counted(f"block{i}", 8, 8), nn.BatchNorm1d(8), nn.Tanh()) for i in range(3)
        )
        self.head = Counted("head", 8, 40)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


@pytest.fixture(autouse=True)
def _no_calls() -> Iterator[None]:
    Counted.calls.clear()
    yield
    Counted.calls.clear()


def calls(monitor: Monitor, step: int) -> list[str]:
    """What ran in the probe's pass of a step."""
    Counted.calls.clear()
    monitor.step(step)
    return list(Counted.calls)


ALL = ["embed", "block0", "block1", "block2", "head"]


def values(monitor: Monitor) -> str:
    return json.dumps(monitor.state_dict()["history"])


def test_the_projection_behind_the_last_watched_layer_is_computed_in_the_first_pass_alone() -> None:
    model = Model()
    monitor = Monitor(model, inputs(), "blocks", every=1)
    assert Counted.calls == ALL
    assert calls(monitor, 0) == calls(monitor, 1) == ALL[:-1]
    unchecked = Monitor(model, inputs(), "blocks", every=1, check=False)
    assert calls(unchecked, 0) == ALL
    assert calls(unchecked, 1) == ALL[:-1]
    assert values(unchecked) == values(monitor)


@pytest.mark.parametrize(
    ("layers", "ran"),
    [
        ("blocks.2:input", ALL[:3]),
        (["blocks.1", "embed"], ALL[:3]),
        (["blocks.0.0:input", "blocks.0.0"], ALL[:2]),
        ("head", ALL),
        (["", "embed"], ALL),
        (lambda model, x: model.embed(x), ALL[:1]),
    ],
)
def test_a_pass_ends_with_the_last_layer_in_the_order_of_the_model_or_before_it_runs(
    layers: Any, ran: list[str]
) -> None:
    monitor = Monitor(Model(), inputs(), layers, every=1)
    assert calls(monitor, 0) == ran


def test_what_a_shorter_pass_records_has_the_bits_of_a_whole_one_and_training_those_of_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def train(watch: bool) -> tuple[list[Tensor], str]:
        model = Model()
        monitor = Monitor(model, inputs(), ["blocks.1", "blocks.0.1:input"], every=1) if watch else Monitor()
        for step in range(3):
            if watch:
                monitor.step(step)
            model.zero_grad()
            model(inputs(seed=step + 1)).square().mean().backward()
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.1 * p.grad  # type: ignore[operator]
        assert model.head.own == [3]
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        return [*model.state_dict().values(), torch.get_rng_state()], values(monitor)

    short, history = train(True)
    assert all(map(torch.equal, short, train(False)[0]))
    monkeypatch.setattr(probe_module, "_has_hooks_for_any_end", lambda model: True)
    assert train(True)[1] == history


def test_a_layer_that_is_idle_lets_the_pass_go_on_and_one_that_wakes_up_is_seen() -> None:
    class Sparse(Model):
        used = (0, 1, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            for i in self.used:
                x = x + self.blocks[i](x)
            return self.head(x)

    model = Sparse()
    monitor = Monitor(model, inputs(), "blocks.*", every=1)
    assert calls(monitor, 0) == ALL[:-1]
    model.used = (0, 1)  # type: ignore[assignment]
    assert calls(monitor, 1) == ["embed", "block0", "block1", "head"]
    assert [r.status.value for r in monitor.history[-3:]] == ["ok", "ok", "not_run"]
    model.used = (1, 0, 2)  # in another order: whole once more
    assert calls(monitor, 2) == ["embed", "block1", "block0", "block2", "head"]
    assert calls(monitor, 3) == ["embed", "block1", "block0", "block2"]
    model.used = (0, 0, 1, 2)  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match=r"'blocks\.0' fired 2 times in one forward pass"):
        monitor.step(4)


def test_an_idle_layer_that_only_a_pattern_matched_is_waited_for_to_the_end_of_the_pass() -> None:
    class Late(Model):
        late = False

        def __init__(self) -> None:
            super().__init__()
            self.blocks.append(nn.Linear(40, 5))

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            for block in self.blocks[:3]:  # type: ignore[union-attr]
                x = x + block(x)
            x = self.head(x)
            return self.blocks[3](x) if self.late else x

    model = Late()
    with pytest.warns(UserWarning, match=r"'blocks\.3' did not run"):
        monitor = Monitor(model, inputs(), "blocks.*", every=1)
    assert calls(monitor, 0) == ALL
    model.late = True
    assert [r.layer for r in monitor.step(1)] == [*BLOCKS, "blocks.3"]


def test_a_loaded_state_is_followed_by_a_whole_pass() -> None:
    monitor = Monitor(Model(), inputs(), BLOCKS, every=1)
    monitor.step(0)
    monitor.load_state_dict(monitor.state_dict())
    assert calls(monitor, 1) == ALL
    assert calls(monitor, 2) == ALL[:-1]


variable: ContextVar[int] = ContextVar("variable", default=0)


def test_what_a_model_changes_for_the_time_of_its_pass_is_put_back_where_it_is_cut_short() -> None:
    class Scoped(Model):
        def forward(self, x: Tensor) -> Tensor:
            token = variable.set(1)
            self.step = self.embed.bias.new_ones(1)
            self.blocks[0].training = True
            with torch.autocast("cpu", dtype=torch.bfloat16), torch.enable_grad():
                out = super().forward(x)
            variable.reset(token)
            return out

    model = Scoped()
    fields = set(model.__dict__)
    monitor = Monitor(model, inputs(), BLOCKS, every=1)
    assert calls(monitor, 0) == ALL[:-1]
    assert variable.get() == 0
    assert set(model.__dict__) == fields
    assert all(module.training for module in model.modules())
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")
    assert torch.is_autocast_cache_enabled()


@pytest.mark.parametrize("caught", [Exception, BaseException])
def test_a_model_that_catches_what_its_layers_raise_gives_the_same(caught: type[BaseException]) -> None:
    class Catching(Model):
        def forward(self, x: Tensor) -> Tensor:
            try:
                return super().forward(x)
            except caught:
                return super().forward(x)

    monitor, plain = (Monitor(model, inputs(), BLOCKS, every=1) for model in (Catching(), Model()))
    plain.step(0)
    assert calls(monitor, 0) == (ALL[:-1] if caught is Exception else [*ALL[:-1], *ALL])
    assert values(monitor) == values(plain)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_block_may_be_the_last(reentrant: bool) -> None:
    class Checkpointed(Model):
        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            for block in self.blocks:
                x = x + checkpoint(block, x, use_reentrant=reentrant)
            return self.head(x)

    model, plain = Checkpointed(), Monitor(Model(), inputs(), BLOCKS, every=1)
    monitor = Monitor(model, inputs(), BLOCKS, every=1)
    plain.step(0)
    assert calls(monitor, 0) == ALL[:-1]
    assert values(monitor) == values(plain)
    model(inputs().requires_grad_()).sum().backward()
    assert model.embed.weight.grad is not None


@pytest.mark.parametrize("everywhere", [False, True])
def test_a_hook_that_is_to_be_called_at_any_end_makes_the_pass_whole(everywhere: bool) -> None:
    seen: list[str] = []
    model = Model()
    monitor = Monitor(model, inputs(), BLOCKS, every=1)

    def hook(module: nn.Module, args: Any, out: Any) -> None:
        if module is model:
            seen.append("end")

    if everywhere:
        handle = nn.modules.module.register_module_forward_hook(hook, always_call=True)
    else:
        handle = model.register_forward_hook(hook, always_call=True)
    try:
        assert calls(monitor, 0) == ALL
    finally:
        handle.remove()
    assert seen == ["end"]
    assert calls(monitor, 1) == ALL[:-1]


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_where_ranks_need_each_other_the_pass_is_whole_and_under_ddp_it_is_not(process_group: None) -> None:
    class Parallel(Model):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            torch.distributed.all_reduce(out)
            return out

    ddp = nn.parallel.DistributedDataParallel(Model())
    assert calls(Monitor(ddp, inputs(), BLOCKS, every=1), 0) == ALL[:-1]
    # Another rank may watch other layers, and would wait for this one in a call behind its own end.
    assert calls(Monitor(Parallel(), inputs(), BLOCKS, every=1), 0) == ALL


def test_a_sharded_models_pass_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_module, "is_sharded", lambda module: True)
    assert calls(Monitor(Model(), inputs(), BLOCKS, every=1), 0) == ALL
    monkeypatch.setattr(probe_module, "_rank", lambda: 1)
    assert calls(Monitor(Model(), inputs(), BLOCKS, every=1), 0) == ALL


def test_a_layer_in_a_thread_of_the_models_own_ends_no_pass() -> None:
    import threading

    class Threaded(Model):
        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            thread = threading.Thread(target=lambda: self.blocks[0](x))
            thread.start()
            thread.join()
            return self.head(x)

    monitor = Monitor(Threaded(), inputs(), "blocks.0", every=1)
    assert calls(monitor, 0) == ["embed", "block0", "head"]
    assert len(monitor.history) == 1
