"""Runs in closed form, as folders and as measured, so that every quantity of the report has an exact value."""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")
from fastent.grokking.experiments.data import PRESETS_JSON, StoredRun
from fastent.grokking.train.config import preset
from fastent.grokking.train.runs import Job

EVERY = 50
T_MEM = 300
ENVIRONMENT = {"torch": "2.0", "cpu": "an <b>old</b> one & slow | `loud`"}


def entropy_at(step: int, seed: int) -> float:
    """0.85 up to step 500, then a straight fall by 0.01 an evaluation down to 0.55; seed k 0.01 k higher."""
    return round(0.85 - 0.01 * min(max(0, step - 500) // EVERY, 30) + 0.01 * seed, 10)


def row_at(step: int, seed: int, t_grok: int | None) -> dict[str, object]:
    return {
        "step": step,
        "train_loss": 1.0 / (1 + step),
        "train_accuracy": min(1.0, step / T_MEM),
        "test_loss": 2.0,
        "test_accuracy": 1.0 if t_grok is not None and step >= t_grok else 0.25,
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
    t_grok: int | None = 1500,
    last_step: int = 2500,
    done: bool = True,
    experiment: str = "e1",
) -> Path:
    job = Job(experiment, "baseline", preset("quick", task="add", evaluate_every=EVERY), (0, 1, 2))
    folder = out / job.run_name(seed)
    folder.mkdir(parents=True)
    config = {
        "schema_version": 1,
        "experiment": experiment,
        "condition": "baseline",
        "seed": seed,
        "stack": [0, 1, 2],
        "config": dataclasses.asdict(job.config),
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT))
    lines = [json.dumps(row_at(step, seed, t_grok)) + "\n" for step in range(0, last_step + 1, EVERY)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    if done:
        (folder / "DONE").write_text(
            json.dumps({"schema_version": 1, "steps": last_step, "reason": "grokked"})
        )
    return folder


@pytest.fixture(scope="session")
def writer() -> Callable[..., Path]:
    return write_run


@pytest.fixture
def three_runs(tmp_path: Path) -> Path:
    """Seeds 0, 1, 2, grokked at 1,500, 1,600 and 1,700, with H* 0.65, 0.64 and 0.63."""
    for seed in range(3):
        write_run(tmp_path / "runs", seed, t_grok=1500 + 100 * seed)
    return tmp_path / "runs"


def measured(
    entropy: Sequence[float], test: Sequence[float], *, seed: int = 0, every: int = 100, t_mem: int = 0
) -> StoredRun:
    config = {**PRESETS_JSON["quick"], "evaluate_every": every, "criterion": 0.99, "memorised": 0.99}
    rows = tuple(
        {
            **row_at(every * i, seed, None),
            "train_accuracy": float(every * i >= t_mem),
            "test_accuracy": reached,
            "entropy": None if math.isnan(h) else h,
            "parameter_norm": 10.0,
        }
        for i, (h, reached) in enumerate(zip(entropy, test, strict=True))
    )
    record = {"experiment": "e1", "condition": "baseline", "seed": seed, "config": config}
    return StoredRun(Path(f"seed{seed}"), record, {}, rows, (), {"reason": "planted"}, None)


@pytest.fixture
def measure() -> Callable[..., StoredRun]:
    return measured
