"""The grids by which the presets were chosen: every trial a line, on seeds that no experiment uses.

``python -m bench.calibration quick``, ``paper`` or ``companion`` runs the trials of its grid that are not yet in
``bench/results/calibration-<grid>.jsonl`` and appends them, one thread, one seed at a time. A trial is the
trainer's run (`bench.search.evaluations`), to the end that its configuration gives it.

Columns: `t_mem`, `t_10`, `t_grok` (first evaluation at 99 % of the training set, 10 % and 99 % of the test set),
`plateau` (`t_10` - `t_mem`: memorised, and hardly better than chance on the rest), `h_*` and `norm_*` (entropy and
parameter norm at the start, at those evaluations, and their extremes), `seconds` (of this thread's processor
time: a trial may share its core).
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from bench.harness import environment
from bench.search import evaluations
from fastent.grokking.train.config import PRESETS, TrainConfig
from fastent.grokking.train.runs import Job
from fastent.grokking.train.storage import JsonLines

Changes = dict[str, Any]

_QUICK: list[Changes] = [
    *(
        {"readout": readout, "train_fraction": fraction, "init_scale": scale}
        for readout, fraction, scale in product(("last", "mean"), (0.5, 0.4, 0.3), (1.0, 0.05))
        if (readout, fraction) != ("last", 0.3)
    ),
    *({"equals_token": True, "train_fraction": fraction} for fraction in (0.5, 0.4)),
    *({"activation": "gelu", "train_fraction": fraction} for fraction in (0.5, 0.4)),
    *({"learning_rate": 2e-3, "train_fraction": fraction} for fraction in (0.4, 0.3)),
    {"norm_place": "pre", "readout": "mean"},
    {"learning_rate": 2e-3, "train_fraction": 0.4, "init_scale": 0.05},
    {"learning_rate": 3e-3, "train_fraction": 0.4},
]

# Fast, and a plateau of 1,000 steps at the first seed.
_QUICK_FINAL: list[Changes] = [
    {"learning_rate": 2e-3, "train_fraction": 0.4},
    {"readout": "last", "train_fraction": 0.5, "init_scale": 1.0},
    {"readout": "last", "train_fraction": 0.4, "init_scale": 0.05},
]

_PAPER: list[Changes] = [
    # The layer's defaults, with and without "=", at torch's initial scale of the embeddings and at smaller ones:
    # the paper's norm rises while the model memorises, which it cannot do from a norm of 116.
    *(
        {"equals_token": equals, "init_scale": scale}
        for scale, equals in product((1.0, 0.02, 128**-0.5), (True, False))
    ),
    {"equals_token": True, "init_scale": 0.02, "learning_rate": 5e-4},
    {"equals_token": True, "init_scale": 0.02, "train_fraction": 0.25},
    {"equals_token": True, "init_scale": 0.02, "norm_place": "pre", "learning_rate": 3e-4},
]

# With "=" and a small scale there is no plateau; without "=", the norm rises at d^-1/2 and H* is too high. GELU
# lowers H* (bench/results/calibration-quick.jsonl).
_PAPER_GELU: list[Changes] = [
    *(
        {"activation": "gelu", "init_scale": 128**-0.5, "train_fraction": fraction}
        for fraction in (0.25, 0.3, 0.2)
    ),
    {"activation": "gelu", "train_fraction": 0.25},
    {"activation": "gelu", "init_scale": 128**-0.5, "train_fraction": 0.25, "learning_rate": 5e-4},
]

# ReLU, the layer's default, at 0.3 of the pairs and at d^-1/2, on the other tasks and another seed.
_PAPER_TASKS: list[Changes] = [
    {"init_scale": 128**-0.5, "task": "sub"},
    {"init_scale": 128**-0.5, "task": "s5"},
    {"init_scale": 128**-0.5, "task": "s5", "train_fraction": 0.5},
    {"init_scale": 128**-0.5, "task": "mul"},
    {"init_scale": 128**-0.5, "train_fraction": 0.28},
]
_PAPER_AGAIN: list[Changes] = [
    {"init_scale": 128**-0.5},
    {"init_scale": 128**-0.5, "task": "s5", "train_fraction": 0.5},
    {"init_scale": 128**-0.5, "task": "sub"},
    {"init_scale": 128**-0.5, "task": "mul"},
]

Stage = tuple[Changes, list[Changes], tuple[int, ...]]

_PAPER_SHARED: Changes = {"init_scale": 1.0, "run_past_steps": 0, "run_past_share": 0.0, "max_steps": 25_000}
_PAPER_TASKS_SHARED: Changes = {**_PAPER_SHARED, "max_steps": 40_000}
_QUICK_SHARED: Changes = {"init_scale": 1.0, "evaluate_every": 50, "run_past_steps": 1000, "max_steps": 5000}

GRIDS: dict[str, list[Stage]] = {
    "quick": [(_QUICK_SHARED, _QUICK, (1000,)), (_QUICK_SHARED, _QUICK_FINAL, (1001, 1002, 1003))],
    "paper": [
        (_PAPER_SHARED, _PAPER, (1000,)),
        (_PAPER_SHARED, _PAPER_GELU, (1000,)),
        (_PAPER_TASKS_SHARED, _PAPER_TASKS, (1000,)),
        (_PAPER_SHARED, [{}], (1001,)),
        (_PAPER_SHARED, _PAPER_AGAIN, (1001, 1002)),
    ],
    "companion": [(asdict(PRESETS["companion"]), [{}], (1000, 1001, 1002, 1003))],
}
"""Stages of a grid: what all trials of a stage share, the trials, and their seeds."""


def trial(config: TrainConfig, seed: int) -> dict[str, Any]:
    """Train one seed to the end of its run and return the columns."""
    start = time.thread_time()
    with TemporaryDirectory() as scratch:
        job = Job("calibration", "baseline", config, (seed,))
        rows = evaluations(job, Path(scratch), config.max_steps)
    marks = {
        name: next((row for row in rows if row[column] >= level), None)
        for name, column, level in (
            ("mem", "train_accuracy", config.memorised),
            ("10", "test_accuracy", 0.1),
            ("grok", "test_accuracy", config.criterion),
        )
    }
    found: dict[str, Any] = {f"t_{name}": row and row["step"] for name, row in marks.items()}
    end = rows[-1]["step"]
    found["plateau"] = (found["t_10"] or end) - found["t_mem"] if found["t_mem"] is not None else None
    for key, column in (("h", "entropy"), ("norm", "parameter_norm")):
        values = [row[column] for row in rows]
        found |= {
            f"{key}_start": values[0],
            f"{key}_max": max(values),
            f"{key}_min": min(values),
            f"{key}_end": values[-1],
        }
        found |= {f"{key}_{name}": row and row[column] for name, row in marks.items()}
    found |= {"test_accuracy_end": rows[-1]["test_accuracy"], "steps": end}
    return {
        **{key: round(v, 4) if isinstance(v, float) else v for key, v in found.items()},
        "seconds": round(time.thread_time() - start, 1),
    }


def main() -> None:
    """Run what is missing of a grid."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("grid", choices=list(GRIDS))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    out = arguments.out or Path(f"bench/results/calibration-{arguments.grid}.jsonl")
    out.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    log = JsonLines(out)
    done = {_key(row) for row in log.rows}
    runs = [
        (shared, *run) for shared, trials, seeds in GRIDS[arguments.grid] for run in product(seeds, trials)
    ]
    for shared, seed, changes in runs:
        config = replace(TrainConfig(), **{**shared, **changes})
        row = {"seed": seed, "changes": changes, "config": asdict(config)}
        row = json.loads(json.dumps(row))
        if _key(row) in done:
            continue
        row |= trial(config, seed) | environment()
        log.append(row)
        print(json.dumps({key: row[key] for key in ("seed", "changes", *_SHOWN)}), flush=True)


_SHOWN = (
    "t_mem",
    "t_10",
    "t_grok",
    "plateau",
    "h_start",
    "h_max",
    "h_grok",
    "norm_start",
    "norm_max",
    "seconds",
)


def _key(row: dict[str, Any]) -> tuple[int, TrainConfig]:
    return row["seed"], TrainConfig(**row["config"])


if __name__ == "__main__":
    main()
