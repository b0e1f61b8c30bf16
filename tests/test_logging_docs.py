"""The recipes of docs/logging.md, run as they stand with a device that is 30 steps late."""

import json
import re
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from fake_device import FakeStreams
from fake_wandb import FakeWandb
from torch import nn

import fastent
from fastent.monitor.deferred import Devices, Ring, TorchFormer

TEXT = (Path(__file__).parent.parent / "docs" / "logging.md").read_text()
RECIPES = dict(re.findall(r"^## (.*?)\n.*?```python\n(.*?)```", TEXT, re.DOTALL | re.MULTILINE))


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, Any]]:
    streams = FakeStreams()
    slots = Ring(streams, TorchFormer())
    monkeypatch.setattr(Devices, "of", lambda self, x: slots)
    monkeypatch.chdir(tmp_path)
    run, wandb = FakeWandb(), ModuleType("wandb")
    wandb.init = lambda project: run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
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
            evaluations = recipe["monitor"]._evaluations
            while len(list(evaluations.to_come())) < evaluations.pending:  # the worker may be late too
                time.sleep(0.001)
        if step == 300:  # the last evaluation is still under way when the loop ends
            clock.start()
        return float(step)

    recipe: dict[str, Any] = {"model": model, "probe": torch.randn(128, 20), "train": train, "run": run}
    yield recipe
    done.set()
    streams.tick()


def test_there_is_a_recipe_for_each_heading() -> None:
    assert list(RECIPES) == [
        "Lines of JSON",
        "Weights & Biases",
        "Another logger",
        "A metric that something else reads",
    ]


def test_lines_of_json_are_all_records(names: dict[str, Any], tmp_path: Path) -> None:
    exec(RECIPES["Lines of JSON"], names)
    lines = (tmp_path / "entropy.jsonl").read_text().splitlines()
    records = [fastent.EntropyRecord.from_dict(json.loads(line)) for line in lines]
    assert records == names["monitor"].history
    assert [record.step for record in records] == [0, 100, 200, 300]


def test_wandb_keeps_every_late_value_at_its_own_step_and_every_row_of_the_loop(
    names: dict[str, Any],
) -> None:
    exec(RECIPES["Weights & Biases"], names)
    run, history = names["run"], names["monitor"].history
    run.finish()
    assert run.axes == {"entropy/*": "entropy/step"}
    assert [(record.step, record.layer) for record in history] == [
        (step, layer) for step in (0, 100, 200, 300) for layer in "012"
    ]
    for layer in "012":
        logged = [
            (row["entropy/step"], row[f"entropy/{layer}"]) for row in run.rows if f"entropy/{layer}" in row
        ]
        assert logged == [(record.step, record.normalized) for record in history if record.layer == layer]
    assert [row["loss"] for row in run.rows if "loss" in row] == list(range(301))
    # Each stands in the row of a later step: logged at the loop's step it would have been dropped or misplaced.
    rows = [row for row in run.rows if "entropy/1" in row]
    assert all(row["loss"] >= row["entropy/step"] + 30 for row in rows[:3])


def test_a_function_of_a_record_gets_every_late_value_with_its_own_step(names: dict[str, Any]) -> None:
    exec(RECIPES["Another logger"], names)
    logged = names["logged"]["entropy/1"]
    assert logged == [(record.step, record.normalized) for record in names["monitor"].history]
    assert [step for step, _ in logged] == [0, 100, 200, 300]


def test_a_metric_that_is_read_after_a_flush_is_there_and_stops_the_run(names: dict[str, Any]) -> None:
    exec(RECIPES["A metric that something else reads"], names)
    monitor = names["monitor"]
    assert names["step"] == 99  # the first validation: the evaluation of step 0 is known there
    assert names["metrics"] == {"entropy": monitor.history[0].normalized}
