"""What each experiment asks the trainer for: a function from settings and seeds to jobs.

An experiment varies what it is about (a task, a condition) and takes everything else from the settings it is
given, a preset with the command line's changes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from fastent.train.presets import TrainConfig
from fastent.train.runs import Job

ALPHA = 0.1
"""Weight of the other row in the mixing. Ours: the paper's text lost it."""

DOSES = (0.05, 0.1, 0.2, 0.4)
"""Weights of the dose-response."""

FEWER, TO_THE_END = 5, 3
"""Seeds, the first ones, of the runs that only support others, and of those to the limit of steps."""

Jobs = Callable[[TrainConfig, Sequence[int]], list[Job]]


def e1(config: TrainConfig, seeds: Sequence[int]) -> list[Job]:
    """E1, does the collapse of the entropy precede grokking: the settings as they are."""
    return [Job("e1", "baseline", config, tuple(seeds))]


def e2(config: TrainConfig, seeds: Sequence[int]) -> list[Job]:
    """E2, does mixing delay grokking: E1's runs, both readings of the loss, and a dose-response over alpha."""
    chosen = [_job("e2", f"{average}-{ALPHA:g}", config, seeds) for average in ("losses", "logits")]
    doses = [_job("e2", f"losses-{alpha:g}", config, seeds[:FEWER]) for alpha in DOSES if alpha != ALPHA]
    return [*e1(config, seeds), *chosen, *doses]


def e3(config: TrainConfig, seeds: Sequence[int]) -> list[Job]:
    """E3, is it the norm: controls with the norm held, with and without mixing, and the runs they follow.

    The first is our reading of the paper's control. With E1 and E2 the norms that follow other runs make a two
    by two design: mixed or not, with the baseline's norm or that of the mixed runs. The others hold the norm at
    its start.
    """
    mixed, fewer = f"losses-{ALPHA:g}", seeds[:FEWER]
    return [
        *e1(config, seeds),
        _job("e3", f"{mixed}+norm-as-baseline", config, seeds),
        _job("e2", mixed, config, seeds),
        _job("e3", f"norm-as-{mixed}", config, seeds),
        _job("e3", "norm-start", config, fewer),
        _job("e3", f"{mixed}+norm-start", config, fewer),
        _job("e3", "norm-start-each", config, fewer),
        _job("e3", f"{mixed}+norm-start-each", config, fewer),
    ]


def e5(config: TrainConfig, seeds: Sequence[int]) -> list[Job]:
    """E5, does a power law forecast grokking, and what does stopping early save: E1's runs.

    And a few of them trained to the limit of steps, to see what is lost by stopping and which alarms are false.
    """
    to_the_end = dataclasses.replace(config, run_past_steps=config.max_steps)
    return [*e1(config, seeds), _job("e5", "to-the-end", to_the_end, seeds[:TO_THE_END])]


def _job(experiment: str, condition: str, config: TrainConfig, seeds: Sequence[int]) -> Job:
    return Job(experiment, condition, config, tuple(seeds))


JOBS: dict[str, Jobs] = {"e1": e1, "e2": e2, "e3": e3, "e4": e1, "e5": e5}
"""By id, every experiment that can be run. E4 is an analysis of E1's runs."""
