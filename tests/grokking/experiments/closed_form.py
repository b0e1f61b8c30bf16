"""Run folders whose columns are functions of the step, so that every number of an analysis is known."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from fastent.grokking.train.config import preset
from fastent.grokking.train.runs import Job

EVERY = 100


def write_run(
    out: Path,
    experiment: str,
    condition: str,
    seed: int,
    *,
    t_grok: int | None,
    last_step: int = 4000,
    entropy: Callable[[int], float] = lambda step: 0.9,
    train_loss: Callable[[int], float] = lambda step: 2.0 ** -(step / 100),
    norm: Callable[[int], float] = lambda step: 50.0,
    test_accuracy: Callable[[int], float] | None = None,
    t_mem: int = 300,
    timing: list[dict[str, object]] | None = None,
    columns: dict[str, Callable[[int], float]] | None = None,
    **changes: object,
) -> Path:
    """Write a complete run that ends at `last_step`, its limit of steps if it did not grok."""
    changes = {"max_steps": 4000, "evaluate_every": EVERY, **changes}
    config = preset("paper", **changes)
    job = Job(experiment, condition, config, (seed,))
    folder = out / job.run_name(seed)
    folder.mkdir(parents=True)
    record = {
        "schema_version": 1, "experiment": experiment, "condition": condition, "seed": seed, "stack": [seed],
        "config": dataclasses.asdict(config),
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(record))
    jump = (
        (lambda step: float(t_grok is not None and step >= t_grok))
        if test_accuracy is None
        else test_accuracy
    )
    rows = [
        {
            "step": step,
            "train_loss": train_loss(step),
            "train_accuracy": float(step >= t_mem),
            "test_loss": 2.0,
            "test_accuracy": jump(step),
            "parameter_norm": norm(step),
            "entropy": entropy(step),
            "entropy_status": "ok",
            "effective_rank": 30.0,
            "participation_ratio": 20.0,
            **{name: value(step) for name, value in (columns or {}).items()},
        }
        for step in range(0, last_step + 1, EVERY)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if timing is not None:
        (folder / "timing.jsonl").write_text("".join(json.dumps(row) + "\n" for row in timing))
    reason = "max_steps" if t_grok is None else "grokked"
    (folder / "DONE").write_text(json.dumps({"schema_version": 1, "steps": last_step, "reason": reason}))
    return folder
