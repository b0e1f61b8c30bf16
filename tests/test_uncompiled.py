"""A monitor inside a compiled function: left out by the compiler, and asked for it only where one is there."""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastent
from fastent.monitor.monitor import SpectralEntropyMonitor as Monitor


def inputs(seed: int = 0) -> Tensor:
    return torch.randn(48, 6, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def dynamo() -> Iterator[Any]:
    import torch._dynamo

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor"
)  # the compiler's, hidden by it otherwise
@pytest.mark.parametrize("compiled", [True, False])
def test_a_step_and_a_hook_in_a_compiled_function_record_as_outside_of_one(
    dynamo: Any, compiled: bool
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    monitor = Monitor(model, inputs(9), ["0", "2"], every=2)

    def train(x: Tensor, step: int) -> Tensor:
        out = model(x)
        monitor.observe(step, out, layer="out")
        monitor.step(step)
        return 2 * out.square().mean()

    run = torch.compile(train, backend="eager") if compiled else train
    losses = [run(inputs(step), step) for step in range(5)]
    assert [loss.item() for loss in losses] == [2 * model(inputs(s)).square().mean().item() for s in range(5)]
    layers = [(record.step, record.layer) for record in monitor.history]
    assert layers == [
        (step, layer) for step in range(5) for layer in (["out", "0", "2"] if step % 2 == 0 else ["out"])
    ]
    if compiled:
        assert dynamo["stats"]["unique_graphs"] >= 1


@pytest.mark.usefixtures("dynamo")
def test_a_warning_points_at_the_users_line_when_the_compiler_is_there() -> None:
    monitor = Monitor()
    monitor.observe(0, inputs(), layer="a")
    with pytest.warns(UserWarning, match="observed again") as caught:
        monitor.observe(0, inputs(), layer="a")
    assert caught[0].filename == __file__


def test_neither_the_import_nor_a_step_imports_the_compiler() -> None:
    code = """
import sys, torch, fastent
m = fastent.SpectralEntropyMonitor(torch.nn.Linear(4, 4), torch.randn(9, 4), "")
m.step(0); m.observe(0, torch.randn(9, 4), layer="a"); m.flush(); m.should_stop()
print("torch._dynamo" in sys.modules, len(m.history))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "2"]


FUNCTIONS = {
    "spectral_entropy": lambda h: fastent.spectral_entropy(h * 1.0).normalized,
    "covariance": lambda h: fastent.covariance(h * 1.0).sum(),
    "sampling_error": lambda h: fastent.sampling_error(h * 1.0).standard_error,
    "Moments": lambda h: fastent.Moments().update(h * 1.0).covariance().sum(),
}


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_compiled_function_gets_the_same_numbers_as_any_other(name: str) -> None:
    function = FUNCTIONS[name]
    h = inputs()
    assert float(torch.compile(function, backend="eager")(h)) == float(function(h))


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_graph_that_must_be_whole_is_refused_with_the_reason_and_the_remedy(name: str) -> None:
    with pytest.raises(torch._dynamo.exc.Unsupported, match="call it outside of the compiled function"):
        torch.compile(FUNCTIONS[name], backend="eager", fullgraph=True)(inputs())
