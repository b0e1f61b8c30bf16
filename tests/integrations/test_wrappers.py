"""Models in the wrappers of Fabric, PEFT and Accelerate: layers have the names that the user gave them."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastent import SpectralEntropyMonitor as Monitor

X = torch.randn(48, 6, generator=torch.Generator().manual_seed(0))
LAYERS = ["first", "blocks.*.linear", "head"]


class Affine(nn.Linear):  # torch.compile skips the code of torch's own modules, not of this one
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.act = Affine(8, 8), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.act(self.linear(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = Affine(6, 8), nn.Linear(8, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def entropies(model: nn.Module, layers: Any = LAYERS) -> dict[str, float]:
    return {record.layer: record.normalized for record in Monitor(model, X, layers).step(0)}


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.fixture
def no_process_group_is_left() -> Iterator[None]:
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("strategy", ["auto", "ddp"])
@pytest.mark.filterwarnings("ignore")  # of Lightning's
def test_layers_in_fabric_are_named_as_in_the_model_that_was_set_up(
    strategy: str, compiled: bool, no_process_group_is_left: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    lightning = pytest.importorskip("lightning")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    fabric = lightning.Fabric(accelerator="cpu", devices=1, strategy=strategy)
    fabric.launch()
    model = fabric.setup(torch.compile(net(), backend="eager") if compiled else net())
    before = hooks(model)
    assert entropies(model) == entropies(net())
    assert hooks(model) == before
    assert entropies(model, "**.linear").keys() == {"blocks.0.linear", "blocks.1.linear"}
    if compiled:  # by Fabric, with its own wrapper, and the bare model beside it
        with pytest.raises(ValueError, match="'first' is in a compiled graph"):
            Monitor(model, "batch", LAYERS)
    else:
        monitor = Monitor(model, "batch", LAYERS, every=1)
        model(X)
        assert {record.layer: record.normalized for record in monitor.step(0)} == entropies(net())


def test_layers_under_peft_are_named_as_in_the_base_model_and_give_what_the_adapters_make_of_them() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["head"], r=2, init_lora_weights=False)
    model = peft.get_peft_model(net(), config)
    found, base = entropies(model), entropies(net())
    assert list(found) == list(base)
    assert {name for name in base if found[name] != base[name]} == {"head"}
    with model.disable_adapter():
        assert entropies(model) == base
    # As PEFT has them: whole paths, and what an adapter is made of.
    assert entropies(model, "base_model.model.first") == {"base_model.model.first": base["first"]}
    assert entropies(model, "head.base_layer") == {"head.base_layer": base["head"]}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo looks at it
@pytest.mark.parametrize("probe", ["fixed", "batch"])
def test_regions_that_accelerate_compiled_are_watched_with_0_recompiles_and_0_graph_breaks(
    probe: str,
) -> None:
    utils = pytest.importorskip("accelerate.utils")
    counters, results = torch._dynamo.utils.counters, []
    # Of a region, the pass of a probe shows what is within; training's own pass shows what it returns.
    layers = LAYERS if probe == "fixed" else ["first", "blocks.*", "head"]
    for watched in (False, True):
        torch._dynamo.reset()
        counters.clear()
        model = utils.compile_regions(net(), backend="eager")
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        monitor = Monitor(model, X if probe == "fixed" else "batch", layers, every=2) if watched else None
        with torch._dynamo.config.patch(error_on_recompile=True):
            for step in range(4):
                opt.zero_grad()
                x = torch.randn(32, 6, generator=torch.Generator().manual_seed(step))
                model(x).square().mean().backward()
                opt.step()
                if monitor is not None:
                    monitor.step(step)
        assert not counters["graph_break"]
        results.append(([p.tolist() for p in model.parameters()], counters["stats"]["unique_graphs"]))
    torch._dynamo.reset()
    assert monitor is not None
    end = ".linear" if probe == "fixed" else ""
    assert monitor.layers == ("first", f"blocks.0{end}", f"blocks.1{end}", "head")
    assert len(monitor.history) == 8
    assert results[0] == results[1]
