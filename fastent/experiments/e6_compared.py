"""One task of E6, and the difference of two: their runs, times, thresholds and spectra over the group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastent.experiments import leads
from fastent.experiments.columns import over, values_at
from fastent.experiments.comparisons import log_rank, restricted_mean
from fastent.experiments.delays import Group
from fastent.experiments.e1_baseline import paper_window
from fastent.experiments.leads import Leads
from fastent.experiments.statistics import Estimate, proportion, welch
from fastent.experiments.stored import StoredRun
from fastent.train.quantities import WINDOW

NAMES = {
    "add": "addition",
    "mul": "multiplication",
    "sub": "subtraction",
    "s5": "S5",
    "mul_nonzero": "multiplication without 0",
}


@dataclass(frozen=True)
class Task:
    """The runs of one task.

    `t_grok` is the mean over the runs, restricted to the limit of steps if some did not grok; `fall` are the leads of
    T_collapse over the paper's span of steps, `left_out` those at the H* of the task's other runs.
    """

    name: str
    group: Group
    comparable: bool
    grokked: Estimate
    t_grok: Estimate | None
    h_star: Estimate | None
    left_out: Leads
    fall: Leads


@dataclass(frozen=True)
class Difference:
    """One task against another: T_grok in steps and H*, the second's less the first's; None where no run groks."""

    first: Task
    second: Task
    t_grok: Estimate | None
    h_star: Estimate | None


def task_of(name: str, runs: Sequence[StoredRun]) -> Task:
    """Measure the complete runs of a task."""
    group = Group.of(name, runs)
    times = group.times
    t_grok = None
    if times.censored == 0:
        t_grok = over(times.values)
    elif times.censored < times.n:
        t_grok = restricted_mean(times, _limit(group))
    return Task(
        name=name,
        group=group,
        comparable=all(run.preset == ("paper", {}) for run in runs),
        grokked=proportion(times.n - times.censored, times.n),
        t_grok=t_grok,
        h_star=over([run.summary.h_star for run in group.measured]),
        left_out=leads.left_out_threshold(group.measured),
        fall=leads.collapse(group.measured, window=paper_window(group.measured) or WINDOW),
    )


def _limit(*groups: Group) -> float:
    return float(min(run.config["max_steps"] for group in groups for run in group.stored))


def difference(first: Task, second: Task) -> Difference:
    """Compare two tasks; their runs share nothing."""
    a, b = ([r.summary.h_star for r in task.group.measured if r.summary.h_star] for task in (first, second))
    t_grok = None
    if first.grokked.value == second.grokked.value == 1:
        # Greenwood's interval of a few runs is far too narrow; Welch's is right for normal times.
        t_grok = welch(first.group.times.values, second.group.times.values)
    elif first.grokked.value + second.grokked.value > 0:
        limit = _limit(first.group, second.group)
        t_grok = log_rank(first.group.times, second.group.times, limit).effect
    return Difference(first, second, t_grok, welch(a, b) if a and b else None)


def agrees(difference: Difference) -> bool | None:
    """Whether 0 lies in the interval of each of its differences; None if one has no interval."""
    parts = (difference.t_grok, difference.h_star)
    if any(part is None or part.low is None or part.high is None for part in parts):
        return None
    return all(part is not None and (part.low or 0) <= 0 <= (part.high or 0) for part in parts)


def title(task: Task) -> str:
    """Write the name of a task for people."""
    return NAMES.get(task.name, task.name)


def shares_at(task: Task, name: str) -> tuple[Estimate | None, ...]:
    """Mean of a column at T_mem, at T_grok and at the end of the task's runs."""
    group = task.group
    moments = (
        [run.summary.t_mem for run in group.measured],
        [run.summary.t_grok for run in group.measured],
        [run.summary.last_step for run in group.measured],
    )
    return tuple(over(values_at(group.stored, group.measured, name, at)) for at in moments)


def chance_shares() -> dict[str, float]:
    """Share of each non-trivial representation of S5 in a function without structure: its squared dimension's."""
    dimensions = {"41": 4, "32": 5, "311": 6, "221": 5, "2111": 4, "11111": 1}
    total = float(np.sum(np.square(list(dimensions.values()))))
    return {name: d * d / total for name, d in dimensions.items()}
