"""Run folders in closed form, so that every quantity of the report has an exact value."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fastent.train.presets import preset
from fastent.train.runs import Job

EVERY = 50
T_MEM = 300


def entropy_at(step: int, seed: int) -> float:
    """0.85 up to step 500, then a straight fall by 0.01 an evaluation down to 0.55; seed k 0.01 k higher."""
    return round(0.85 - 0.01 * min(max(0, step - 500) // EVERY, 30) + 0.01 * seed, 10)


def row_at(step: int, seed: int, t_grok: int) -> dict[str, object]:
    return {
        "step": step,
        "train_loss": 1.0 / (1 + step),
        "train_accuracy": min(1.0, step / T_MEM),
        "test_loss": 2.0,
        "test_accuracy": 1.0 if step >= t_grok else 0.25 if step >= t_grok - 200 else 0.0,
        "parameter_norm": 120.0 - step / 100,
        "entropy": entropy_at(step, seed),
        "entropy_status": "ok",
        "effective_rank": 30.0,
        "participation_ratio": 20.0,
    }


def write_run(
    out: Path,
    seed: int,
    *,
    t_grok: int = 1500,
    last_step: int = 2500,
    done: bool = True,
    experiment: str = "e1",
    condition: str = "baseline",
    environment: dict[str, object] | None = None,
) -> Path:
    job = Job(experiment, condition, preset("quick", task="add"), (0, 1, 2))
    folder = out / job.run_name(seed)
    folder.mkdir(parents=True)
    config = {
        "schema_version": 1,
        "experiment": experiment,
        "condition": condition,
        "seed": seed,
        "stack": [0, 1, 2],
        "config": json.loads(json.dumps(dataclasses.asdict(dataclasses.replace(job.config, evaluate_every=EVERY)))),
    }
    (folder / "config.json").write_text(json.dumps(config))
    if environment is not None:
        (folder / "environment.json").write_text(json.dumps(environment))
    lines = [json.dumps(row_at(step, seed, t_grok)) + "\n" for step in range(0, last_step + 1, EVERY)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    if done:
        (folder / "DONE").write_text(json.dumps({"schema_version": 1, "steps": last_step, "reason": "grokked"}))
    return folder


@pytest.fixture
def three_runs(tmp_path: Path) -> Path:
    """Seeds 0, 1, 2, grokked at 1,500, 1,600 and 1,700, with H* 0.65, 0.64 and 0.63."""
    out = tmp_path / "runs"
    for seed in range(3):
        write_run(out, seed, t_grok=1500 + 100 * seed, environment={"torch": "2.0", "cpu": "an <b>old</b> one & slow"})
    return out


@pytest.fixture
def writer() -> Callable[..., Path]:
    return write_run
