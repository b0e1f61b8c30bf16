"""Complete runs in memory, with whatever columns they are given."""

import dataclasses
import json
import math
from pathlib import Path

from fastent.grokking.experiments.data import StoredRun

EVERY = 200


def planted(job, seed, *, test, entropy, train=None, **columns):
    """A run whose row k is at step 200 k; every column is a list, or a number for all rows."""
    rows = []
    for k in range(len(test)):
        row = {
            "step": EVERY * k,
            "train_loss": 0.1,
            "train_accuracy": (1.0 if k >= 2 else 0.5) if train is None else train[k],
            "test_loss": 1.0,
            "test_accuracy": test[k],
            "parameter_norm": 50.0,
            "entropy": entropy[k],
            "entropy_status": "ok",
            "effective_rank": 20.0,
            "participation_ratio": 10.0,
        }
        for name, column in columns.items():
            row[name] = column[k] if isinstance(column, (list, tuple)) else column
            if name.startswith("entropy_"):
                row[f"{name}_status"] = "ok"
        rows.append(row)
    record = {
        "schema_version": 1,
        "experiment": job.experiment,
        "condition": job.condition,
        "seed": seed,
        "stack": list(job.seeds),
        "config": json.loads(json.dumps(dataclasses.asdict(job.config))),
    }
    done = {"schema_version": 1, "steps": rows[-1]["step"], "reason": "planted"}
    return StoredRun(Path(job.run_name(seed)), record, {}, tuple(rows), (), done, None)


def tables(section):
    """Tables of a section by the beginning of their captions."""
    return {b.caption.split(",")[0].split(".")[0]: b for b in section.blocks if hasattr(b, "columns")}


def listed(values):
    """A list of an array, None for NaN."""
    return [None if math.isnan(value) else value for value in values]
