"""A monitor under Accelerate as it is: its checkpoints, its trackers, its compiled regions, its processes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastent

pytest.importorskip("accelerate")
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker
from accelerate.utils import TorchDynamoPlugin

PROBE = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
INPUTS = torch.randn(64, 6, generator=torch.Generator().manual_seed(2))


def accelerator_of(**options: Any) -> Accelerator:
    """One Accelerator, as a process of its own would have: its settings are the process's."""
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=True, **options)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.fc(x).relu())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


LAYERS = ["blocks.1", "blocks.*.fc", "head"]
NAMES = ["blocks.1", "blocks.0.fc", "blocks.1.fc", "blocks.2.fc", "head"]


class Tracker(GeneralTracker):
    """A tracker that keeps what it gets."""

    name = "kept"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, Any]]] = []

    @property
    def tracker(self) -> list[tuple[int | None, dict[str, Any]]]:
        return self.rows

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        pass

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.rows.append((step, values))


def prepared(accelerator: Accelerator) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = Net()
    return accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.05))  # type: ignore[no-any-return]


def train(
    accelerator: Accelerator, model: nn.Module, optimizer: Any, steps: range, monitor: Any = None
) -> None:
    for step in steps:
        optimizer.zero_grad()
        accelerator.backward(model(INPUTS[step::4]).square().mean())
        optimizer.step()
        if monitor is not None:
            monitor.step(step + 1)


def values(monitor: fastent.SpectralEntropyMonitor) -> list[tuple[int, str, float]]:
    return [(record.step, record.layer, record.normalized) for record in monitor.history]


def test_save_state_and_load_state_carry_a_registered_monitor(tmp_path: Path) -> None:
    accelerator = accelerator_of()
    model, optimizer = prepared(accelerator)
    whole = fastent.SpectralEntropyMonitor(model, PROBE, LAYERS, every=1)
    accelerator.register_for_checkpointing(whole)
    train(accelerator, model, optimizer, range(2), whole)
    accelerator.save_state(str(tmp_path / "state"))
    train(accelerator, model, optimizer, range(2, 4), whole)
    file = tmp_path / "state" / "custom_checkpoint_0.pkl"
    assert torch.load(file, weights_only=True)["last_step"] == 2  # no pickled class is in it

    again = accelerator_of()
    model, optimizer = prepared(again)
    resumed = fastent.SpectralEntropyMonitor(model, PROBE, LAYERS, every=1)
    again.register_for_checkpointing(resumed)
    again.load_state(str(tmp_path / "state"))
    train(again, model, optimizer, range(2, 4), resumed)
    assert values(resumed) == values(whole)
    assert len(values(whole)) == 4 * len(NAMES)


def test_a_tracker_gets_every_record_at_its_own_step(tmp_path: Path) -> None:
    tracker = Tracker()
    accelerator = accelerator_of(log_with=tracker)
    accelerator.init_trackers("grokking")
    model, optimizer = prepared(accelerator)

    def log(record: fastent.EntropyRecord) -> None:
        accelerator.log({f"entropy/{record.layer}": record.normalized}, step=record.step)

    monitor = fastent.SpectralEntropyMonitor(model, PROBE, LAYERS, every=2, on_record=log)
    train(accelerator, model, optimizer, range(4), monitor)
    expected = [(step, {f"entropy/{layer}": value}) for step, layer, value in values(monitor)]
    assert tracker.rows == expected
    assert [step for step, _ in expected] == [2] * 5 + [4] * 5


def trained(monitored: bool, **options: Any) -> tuple[list[Tensor], list[tuple[int, str, float]], Any]:
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    accelerator = accelerator_of(**options)
    model, optimizer = prepared(accelerator)
    monitor = fastent.SpectralEntropyMonitor(model, PROBE, LAYERS, every=1) if monitored else None
    train(accelerator, model, optimizer, range(4), monitor)
    compiled = counters["stats"]["unique_graphs"], dict(counters["graph_break"])
    state = [*accelerator.unwrap_model(model).state_dict().values(), torch.get_rng_state()]
    return state, [] if monitor is None else values(monitor), compiled


def test_training_has_the_same_bits_with_a_monitor_in_mixed_precision_and_the_probe_passes_as_training() -> (
    None
):
    options = {"mixed_precision": "bf16"}
    without, _, _ = trained(False, **options)
    state, found, _ = trained(True, **options)
    assert all(map(torch.equal, state, without))
    _, single, _ = trained(True)
    assert [layer for _, layer, _ in found] == NAMES * 4
    assert found[0] != single[0]


# A tracer of torch.compile looks at .grad of all, and silences that by a filter that pytest's comes before.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_regions_keep_their_graphs_their_bits_and_the_names_of_the_model() -> None:
    dynamo = TorchDynamoPlugin(backend="eager", use_regional_compilation=True)
    without, _, graphs = trained(False, dynamo_plugin=dynamo)
    state, found, with_monitor = trained(True, dynamo_plugin=dynamo)
    assert with_monitor == graphs
    assert graphs[0] >= 1
    assert all(map(torch.equal, state, without))
    _, plain, _ = trained(True)
    assert [record[:2] for record in found] == [record[:2] for record in plain]
    assert [h for _, _, h in found] == pytest.approx([h for _, _, h in plain], rel=1e-5)
