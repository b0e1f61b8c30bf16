"""What is checked before the first job starts, so that a mistake costs a sentence and leaves no folder behind.

`TrainConfig` knows the range of each setting; here is what needs more than the settings: the task's table, the
machine, the device, and what lies in the folder already.
"""

from __future__ import annotations

import functools
import glob
import json
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch

from fastent.train.measures import Measures
from fastent.train.presets import TrainConfig
from fastent.train.runs import Job, what_counts
from fastent.train.tasks import make_task

LARGEST_SEED = 2**64 - 1
MOST_SEEDS = 10_000
WORKERS_PER_PROCESSOR = 4


def check_jobs(jobs: Sequence[Job], out: Path, *, workers: int, device: str, force: bool = False) -> None:
    """Check all jobs, the device and the folder `out`; nothing is written.

    Raises
    ------
    ValueError
        At the first rule that does not hold: the rule, the value, the remedy, and the job where it is one's own.
    """
    check_device(device)
    most = most_workers()
    if not 1 <= workers <= most:
        raise ValueError(
            f"workers must be at least 1{f' and at most {most} on this machine' if workers > 1 else ''}; got {workers}"
        )
    for job in jobs:
        try:
            check_config(job.config)
        except ValueError as error:
            raise ValueError(f"{job.experiment}-{job.condition}-{job.config.task}: {error}") from error
    if not force:
        _check_folder(jobs, out)


def most_workers() -> int:
    """Return the number of processes beyond which more of them only take memory here."""
    return WORKERS_PER_PROCESSOR * (os.cpu_count() or 1)


def check_device(device: str) -> None:
    """Check that the trainer can use `device`.

    Raises
    ------
    ValueError
        If it is neither the CPU nor a CUDA device that is there.
    """
    rule = f"device must be cpu, or a CUDA device such as cuda or cuda:0; got {device!r}"
    try:
        asked = torch.device(device)
    except RuntimeError as error:
        raise ValueError(rule) from error
    if asked.type == "cpu":
        return
    if asked.type != "cuda":
        raise ValueError(rule)
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (asked.index or 0) >= there:
        raise ValueError(f"{rule}, and torch sees {there or 'no'} CUDA device{'s' if there > 1 else ''} here")


@functools.lru_cache(maxsize=256)
def check_config(config: TrainConfig) -> None:
    """Check that a task, split and model of `config` can be made on this machine.

    Raises
    ------
    ValueError
        If the modulus does not suit the task or its measures, a set of pairs has fewer than the two rows that an
        entropy needs, or the memory of this machine is too small.
    """
    needed, there = memory(config), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        raise ValueError(
            f"a seed of these settings needs some {needed / 1e9:.3g} GB, and this machine has {there / 1e9:.3g} GB: "
            "choose a smaller modulus, width, feedforward, hidden or batch_size"
        )
    total = len(make_task(config).labels)
    train = round(config.train_fraction * total)
    for name, count, least in (("train", train, 2), ("test", total - train, 2)):
        if count < least:
            raise ValueError(
                f"train_fraction {config.train_fraction:g} leaves {count} of {total} pairs to the {name} set, and an "
                f"entropy needs {least}: choose another fraction or a larger modulus"
            )
    Measures(config)


def memory(config: TrainConfig) -> int:
    """Estimate the bytes that a seed of `config` takes at the least, from its sizes alone."""
    n = {"s5": 120, "mul_nonzero": config.modulus - 1}.get(config.task, config.modulus)
    d, tokens = config.width, n * (2 if config.separate_tokens else 1)
    if config.model == "mlp":
        sizes = [d * (2 if config.combine == "concat" else 1), *config.hidden]
        parameters = tokens * d + sum(a * b for a, b in pairwise(sizes)) + sizes[-1] * n
        units, scores = sum(sizes), 0
    else:
        parameters = tokens * d + 4 * d * d + 2 * d * config.feedforward + d * n
        units, scores = 6 * d + config.feedforward, 2 * n * n * config.heads
    # Drawn in float64 from two words each, then float32 with AdamW's two moments and the gradient; the scores of all
    # pairs of tokens, twice with their gradient; numbers and label of each pair, int64; activations with gradients.
    return 24 * parameters + 8 * scores + 48 * n * n + 8 * config.batch_size * (units + n)


def check_seeds(count: int, largest: int) -> None:
    """Check how many seeds are asked for, and the largest of them.

    Raises
    ------
    ValueError
        If there are more than `MOST_SEEDS`, or one is beyond `LARGEST_SEED`.
    """
    if count > MOST_SEEDS:
        raise ValueError(
            f"seeds must be at most {MOST_SEEDS:,} at a time, for each is a run and a folder; got {count:,}"
        )
    if largest > LARGEST_SEED:
        raise ValueError(f"a seed must be below 2^64; got {largest}")


def _check_folder(jobs: Sequence[Job], out: Path) -> None:
    """See that runs of one name and different seeds are of one configuration, or a report would mix them."""
    names = {job.run_name(seed) for job in jobs for seed in job.seeds}
    for job in jobs:
        asked = job.settings() | {"measures": []}
        prefix = job.run_name(0).removesuffix("0")
        for path in sorted(out.glob(f"{glob.escape(prefix)}*")):
            if path.name in names or not path.name.removeprefix(prefix).isdecimal() or not what_counts(path):
                continue
            try:
                recorded = json.loads((path / "config.json").read_bytes())["config"] | {"measures": []}
            except (OSError, ValueError, KeyError, TypeError):
                continue  # a run that cannot be read is refused where it is asked for
            changes = [
                f"{key} {recorded[key]!r}, now {value!r}"
                for key, value in asked.items()
                if key in recorded and recorded[key] != value
            ]
            if changes:
                raise ValueError(
                    f"{out} holds {path.name} with other settings ({'; '.join(changes)}), and what is told of both "
                    "would mix them: give another --out, or --force to have them side by side"
                )
