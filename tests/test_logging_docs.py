"""The recipes of docs/logging.md, run as they stand with a device that is 30 steps late."""

import json
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from fake_device import FakeStreams
from torch import nn

import fastent
from fastent.monitor.deferred import Devices, Ring, TorchFormer

TEXT = (Path(__file__).parent.parent / "docs" / "logging.md").read_text()
RECIPES = dict(re.findall(r"^## (.*?)\n.*?```python\n(.*?)```", TEXT, re.DOTALL | re.MULTILINE))


class Run:
    """What W&B does with a log: a row for each call; one whose step has passed is dropped."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.step = 0
        self.axes: dict[str, str] = {}

    def define_metric(self, name: str, step_metric: str) -> None:
        self.axes[name] = step_metric

    def log(self, values: dict[str, float], step: int | None = None) -> None:
        if step is not None and step < self.step:
            return
        self.step = self.step + 1 if step is None else step
        self.rows.append(values)


class Writer:
    """TensorBoard's writer, which keeps what it gets."""

    made: "Writer"

    def __init__(self, folder: str) -> None:
        self.rows: list[tuple[str, float, int]] = []
        Writer.made = self

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.rows.append((tag, value, step))

    def close(self) -> None:
        assert self.rows


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, Any]]:
    streams = FakeStreams()
    slots = Ring(streams, TorchFormer())
    monkeypatch.setattr(Devices, "of", lambda self, x: slots)
    monkeypatch.chdir(tmp_path)
    run, wandb, board = Run(), ModuleType("wandb"), ModuleType("torch.utils.tensorboard")
    wandb.init = lambda project: run  # type: ignore[attr-defined]
    board.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 2))

    done = threading.Event()

    def run_on() -> None:
        while not done.wait(0.01):
            streams.tick()

    clock = threading.Thread(target=run_on)

    def train(step: int) -> float:
        with torch.no_grad():
            model[0].weight.mul_(0.999)
            model[0].weight[0].mul_(1.002)
        if step % 100 == 30:
            streams.tick()
        if step == 300:  # the last evaluation is still under way when the loop ends
            clock.start()
        return float(step)

    yield {"fastent": fastent, "model": model, "probe": torch.randn(128, 20), "train": train, "run": run}
    done.set()
    streams.tick()


def test_there_is_a_recipe_for_each_heading() -> None:
    assert list(RECIPES) == [
        "Lines of JSON",
        "Weights & Biases",
        "TensorBoard",
        "A metric that something else reads",
    ]


def test_lines_of_json_are_all_records(names: dict[str, Any], tmp_path: Path) -> None:
    exec(RECIPES["Lines of JSON"], names)
    lines = (tmp_path / "entropy.jsonl").read_text().splitlines()
    records = [fastent.EntropyRecord.from_dict(json.loads(line)) for line in lines]
    assert records == names["monitor"].history
    assert [record.step for record in records] == [0, 100, 200, 300]


def test_wandb_keeps_every_late_value_at_its_own_step(names: dict[str, Any]) -> None:
    exec(RECIPES["Weights & Biases"], names)
    run = names["run"]
    assert run.axes == {"*": "trainer/step"}
    logged = [(row["trainer/step"], row["entropy/1"]) for row in run.rows if "entropy/1" in row]
    assert logged == [(record.step, record.normalized) for record in names["monitor"].history]
    assert [step for step, _ in logged] == [0, 100, 200, 300]
    assert sum("loss" in row for row in run.rows) == 301
    # Each came after the loss of a later step: at the loop's step all would have been dropped or misplaced.
    position = {row["trainer/step"]: i for i, row in enumerate(run.rows) if "loss" in row}
    at = [i for i, row in enumerate(run.rows) if "entropy/1" in row]
    assert all(i > position[step + 30] for i, (step, _) in zip(at[:3], logged[:3], strict=True))


def test_tensorboard_gets_every_late_value_at_its_own_step(names: dict[str, Any]) -> None:
    exec(RECIPES["TensorBoard"], names)
    logged = [(step, value) for tag, value, step in Writer.made.rows if tag == "entropy/1"]
    assert logged == [(record.step, record.normalized) for record in names["monitor"].history]
    assert [step for step, _ in logged] == [0, 100, 200, 300]


def test_a_metric_that_is_read_after_a_flush_is_there_and_stops_the_run(names: dict[str, Any]) -> None:
    exec(RECIPES["A metric that something else reads"], names)
    monitor = names["monitor"]
    assert names["step"] == 99  # the first validation: the evaluation of step 0 is known there
    assert names["metrics"] == {"entropy": monitor.history[0].normalized}
