"""A monitor under Accelerate as it is: its checkpoints, its trackers, its compiled regions, its processes."""

import json
import subprocess
import sys
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


TWO = """
import json, sys
sys.path[:0] = [sys.argv[1]]
import torch
from test_accelerate import INPUTS, LAYERS, PROBE, Tracker, accelerator_of, prepared, values
import fastent
torch.set_num_threads(1)
folder, out = sys.argv[2], {}

def run(steps, resumed_from=None, saved_at=None, **options):
    tracker = Tracker()
    accelerator = accelerator_of(log_with=tracker)
    accelerator.init_trackers("two")
    model, optimizer = prepared(accelerator)
    own = INPUTS[accelerator.process_index :: 2]  # each process its half

    def log(record):
        accelerator.log({f"entropy/{record.layer}": record.normalized}, step=record.step)

    monitor = None
    if options:
        monitor = fastent.SpectralEntropyMonitor(model, layers=LAYERS, every=1, on_record=log, **options)
        accelerator.register_for_checkpointing(monitor)
    if resumed_from is not None:
        accelerator.load_state(resumed_from)
    for step in steps:
        optimizer.zero_grad()
        accelerator.backward(model(own[step::4]).square().mean())
        optimizer.step()
        if monitor is not None:
            monitor.step(step + 1)
        if saved_at == step + 1:
            accelerator.save_state(folder + "/state")
    weights = [p.tolist() for p in accelerator.unwrap_model(model).parameters()] + [torch.get_rng_state().tolist()]
    out["process"] = [accelerator.process_index, accelerator.num_processes, type(model).__name__]
    return model, monitor, tracker.rows, weights

_, _, _, without = run(range(4), saved_at=2)
_, whole, out["logged"], weights = run(range(4), saved_at=2, probe=PROBE)
out["bits"], out["weights"], out["whole"] = weights == without, weights[:-1], values(whole)
_, resumed, _, again = run(range(2, 4), resumed_from=folder + "/state", probe=PROBE)
out["resumed"], out["resumed bits"] = values(resumed), again == weights
rank = out["process"][0]
shard = PROBE[:13] if rank == 0 else PROBE[13:]
model, sharded, _, _ = run(range(2), probe=shard, across_ranks=True)
out["sharded"] = values(sharded)
_, unsharded, _, _ = run(range(2), probe=PROBE)
out["unsharded"] = values(unsharded)
_, batch, _, _ = run(range(2), probe="batch", across_ranks=True)
out["batch"] = [[r.step, r.layer, r.n, r.normalized] for r in batch.history]
with open(f"{folder}/{rank}.json", "w") as file:
    json.dump(out, file)
"""


@pytest.mark.nightly
def test_two_processes_record_the_same_log_once_resume_and_train_as_without(tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(TWO)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = [str(script), str(Path(__file__).parent), str(tmp_path)]
    done = subprocess.run([*launch, *arguments], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    for rank, out in enumerate(ranks):
        assert out["process"] == [rank, 2, "DistributedDataParallel"]
        assert out["bits"]
        assert out["resumed bits"]
        assert out["resumed"] == out["whole"]
        for name in ("weights", "whole", "sharded", "batch"):
            assert out[name] == ranks[0][name]
        assert [record[:2] for record in out["whole"]] == [
            [step, name] for step in (1, 2, 3, 4) for name in NAMES
        ]
        # The probe in shards of 13 and 27 rows is the whole probe; a batch is the 8 rows of each process.
        assert [h for _, _, h in out["sharded"]] == pytest.approx(
            [h for _, _, h in out["unsharded"]], abs=1e-6
        )
        assert [record[:3] for record in out["batch"]] == [
            [step, name, 16] for step in (1, 2) for name in NAMES
        ]
    assert ranks[0]["logged"] == [[step, {f"entropy/{layer}": h}] for step, layer, h in ranks[0]["whole"]]
    assert ranks[1]["logged"] == []
