"""E6, the question whether other tasks and another group show what addition shows.

Multiplication with 0, subtraction and composition in S5 beside E1's addition (paper, section 9, Table 3 and Figures 5
to 8), and controls that the paper lacks. Its rows for multiplication and subtraction are identical to the last digit.
Two of the tasks are addition under other names: without 0, multiplication modulo p is addition modulo p - 1, and
with a table of tokens for each operand subtraction is addition. Training knows no names, so those two must agree with
their addition but for the seeds: what differs between them says how much a difference between tasks means.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastent.experiments.claims import (
    IN_PART,
    NONE,
    NOT_REPRODUCED,
    NOT_RUN,
    REPRODUCED,
    Claim,
    counted,
    decimal,
    judge_share,
    judge_value,
    percent,
    steps,
    worded,
)
from fastent.experiments.document import Verdict
from fastent.experiments.e6_compared import NAMES, Difference, Task, agrees, difference, task_of, title
from fastent.experiments.statistics import Estimate, proportion
from fastent.experiments.stored import StoredRun
from fastent.train.presets import TrainConfig
from fastent.train.tasks import make_task

TITLE = "E6: do other tasks and groups show the same?"

PAPER = {
    "add": (5, 14_040, 0.605),
    "mul": (5, 21_560, 0.589),
    "sub": (5, 21_560, 0.589),
    "s5": (10, 4_380, 0.655),
}
"""Its Table 3: runs, all of which grok, T_grok and H*."""

SPREAD = 0.02
"""H* over the modular tasks: its text lost by how little it varies; its table by 0.016."""

AS_EXPECTED = Verdict("yes", "as it must be")
NOT_AS_EXPECTED = Verdict("no", "not as it must be")


@dataclass(frozen=True)
class Tasks:
    """Analysis of the complete runs of E6 beside E1's addition.

    `tasks` holds addition and the paper's other tasks by name; `controls` the differences of tasks that are one under
    other names, `contrast` that of subtraction and addition with shared tokens, which are not.
    """

    tasks: dict[str, Task]
    controls: tuple[Difference, ...]
    contrast: Difference | None


def analyse(runs: Sequence[StoredRun]) -> Tasks | None:
    """Set the tasks side by side; None if no run is E6's.

    Parameters
    ----------
    runs : sequence of StoredRun
        Complete runs of E1 and E6.
    """
    if not any(run.experiment == "e6" for run in runs):
        return None

    def task(name: str, experiment: str = "e6", condition: str = "baseline", of: str = "") -> Task | None:
        kept = [
            run
            for run in runs
            if (run.experiment, run.config["task"]) == (experiment, of or name)
            and (
                run.condition == condition
                or (condition.endswith("-") and run.condition.startswith(condition))
            )
        ]
        return task_of(name, kept) if kept else None

    found = {"add": task("add", "e1"), **{name: task(name) for name in ("mul", "sub", "s5")}}
    own = "with-own-tokens"
    pairs = (
        (
            task("addition modulo p - 1", condition="with-modulus-", of="add"),
            task("mul_nonzero"),
        ),
        (
            task("addition, own tokens", condition=own, of="add"),
            task("subtraction, own tokens", condition=own, of="sub"),
        ),
    )
    add, sub = found["add"], found["sub"]
    return Tasks(
        tasks={name: each for name, each in found.items() if each is not None},
        controls=tuple(difference(a, b) for a, b in pairs if a is not None and b is not None),
        contrast=None if add is None or sub is None else difference(add, sub),
    )


def not_commuting(config: TrainConfig) -> float:
    """Share of all pairs (a, b) of a task with a b other than b a."""
    task = make_task(config)
    table = task.labels.view(task.operands, task.operands)
    return float((table != table.T).double().mean())


def claims(result: Tasks) -> list[Claim]:
    """Each claim of the paper that E6's runs speak to, beside what they say."""
    found = [claim for name, task in result.tasks.items() for claim in _row_claims(name, task)]
    others = [task for name, task in result.tasks.items() if name != "add"]
    ahead = _pooled(others)
    found += [
        Claim(
            "§9",
            "the pattern is the same across tasks and groups: H falls below H* before grokking",
            "; ".join(f"{NAMES[task.name]} {counted(task.left_out.preceding)}" for task in others) or NONE,
            judge_share(ahead),
            "in every run of the other tasks that groks, H* from the task's other seeds; in part: at least half",
        ),
        Claim(
            "§9, App. E.6",
            f"within modular arithmetic H* is the same (its table: within {0.605 - 0.589:.3f})",
            _modular(result),
            _judge_modular(result),
            f"largest mean less smallest below {SPREAD:g}, over three tasks; in part: below twice that",
        ),
        Claim(
            "Table 3",
            "multiplication and subtraction have one T_grok and one H* (identical rows: a slip?)",
            _rows_alike(result),
            _judge_rows(result),
            "ours agree to the printed digits; in part: the intervals of T_grok and of H* overlap",
        ),
        Claim(
            "§9",
            "94 % of the pairs of S5 do not commute",
            f"{percent(not_commuting(TrainConfig(task='s5')))} (exactly 1 − 7/120, by the seven classes)",
            REPRODUCED,
            "counted",
        ),
    ]
    s5, add = result.tasks.get("s5"), result.tasks.get("add")
    if s5 is not None:
        found.append(
            Claim(
                "§9",
                "in 5 of 10 seeds of S5 the rolling window detects the collapse before grokking",
                counted(s5.fall.preceding),
                judge_value(0.5, s5.fall.preceding, comparable=s5.comparable),
                "one half lies in our interval; in part: within 25 %",
            )
        )
    if s5 is not None and add is not None:
        gap = difference(add, s5)
        found.append(
            Claim(
                "§9",
                "S5 has a threshold of its own, above that of addition",
                f"H* of S5 less H* of addition {worded(gap.h_star, '')}",
                _judge_above(gap.h_star),
                "the interval of the difference lies above 0; in part: the difference does",
            )
        )
    if result.controls:
        found.append(
            Claim(
                "not in the paper",
                "tasks that are one under other names have one T_grok and one H*",
                "; ".join(_worded_difference(each) for each in result.controls),
                _judge_controls(result.controls),
                "0 lies in the interval of each difference",
            )
        )
    return found


def _row_claims(name: str, task: Task) -> list[Claim]:
    n, t_grok, h_star = PAPER[name]
    rule = "the paper's number lies in our interval; in part: within 25 %"
    return [
        Claim(
            "Table 3",
            f"{NAMES[name]}: {n} of {n} runs grok, at {steps(t_grok)} steps, with H* {h_star}",
            f"{counted(task.grokked)}; T_grok {worded(task.t_grok)}; H* {worded(task.h_star, '')}",
            _worst(
                judge_share(task.grokked),
                judge_value(t_grok, task.t_grok, comparable=task.comparable),
                judge_value(h_star, task.h_star, comparable=task.comparable),
            ),
            f"every run groks; {rule}. The least of the three verdicts",
        )
    ]


def _worst(*verdicts: Verdict) -> Verdict:
    """Take the least favourable; one that judges nothing comes before all but "not reproduced"."""
    order = (NOT_REPRODUCED, IN_PART, REPRODUCED)
    judged = [verdict for verdict in verdicts if verdict in order]
    silent = [verdict for verdict in verdicts if verdict not in order]
    if silent and NOT_REPRODUCED not in judged:
        return silent[0]
    return min(judged, key=order.index)


def _pooled(tasks: Sequence[Task]) -> Estimate | None:
    shares = [task.left_out.preceding for task in tasks if task.left_out.preceding is not None]
    n = sum(share.n for share in shares)
    return proportion(round(sum(share.value * share.n for share in shares)), n) if n else None


def _means(result: Tasks) -> dict[str, Estimate]:
    found = {name: result.tasks[name].h_star for name in ("add", "mul", "sub") if name in result.tasks}
    return {name: h for name, h in found.items() if h is not None}


def _modular(result: Tasks) -> str:
    means = _means(result)
    if len(means) < 2:
        return NONE
    values = [h.value for h in means.values()]
    said = ", ".join(f"{NAMES[name]} {decimal(h.value)}" for name, h in means.items())
    return f"{said}: within {decimal(max(values) - min(values))}"


def _judge_modular(result: Tasks) -> Verdict:
    values = [h.value for h in _means(result).values()]
    if len(values) < 3:
        return NOT_RUN
    spread = max(values) - min(values)
    if spread < SPREAD:
        return REPRODUCED
    return IN_PART if spread < 2 * SPREAD else NOT_REPRODUCED


def _rows_alike(result: Tasks) -> str:
    rows = [result.tasks.get(name) for name in ("mul", "sub")]
    return "; ".join(
        f"{NAMES[task.name]} {worded(task.t_grok)}, H* {worded(task.h_star, '')}"
        for task in rows
        if task is not None
    )


def _judge_rows(result: Tasks) -> Verdict:
    mul, sub = result.tasks.get("mul"), result.tasks.get("sub")
    if mul is None or sub is None:
        return NOT_RUN
    pairs = ((mul.t_grok, sub.t_grok, 0), (mul.h_star, sub.h_star, 3))
    if any(a is None or b is None for a, b, _ in pairs):
        return NOT_RUN
    if all(a and b and round(a.value, digits) == round(b.value, digits) for a, b, digits in pairs):
        return REPRODUCED
    return IN_PART if all(a and b and _overlap(a, b) for a, b, _ in pairs) else NOT_REPRODUCED


def _overlap(a: Estimate, b: Estimate) -> bool:
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return False
    return a.low <= b.high and b.low <= a.high


def _judge_above(difference: Estimate | None) -> Verdict:
    if difference is None:
        return NOT_RUN
    if difference.low is not None and difference.low > 0:
        return REPRODUCED
    return IN_PART if difference.value > 0 else NOT_REPRODUCED


def _judge_controls(controls: Sequence[Difference]) -> Verdict:
    answers = [agrees(each) for each in controls]
    if False in answers:
        return NOT_AS_EXPECTED
    return NOT_RUN if None in answers else AS_EXPECTED


def _worded_difference(each: Difference) -> str:
    names = f"{title(each.second)} less {title(each.first)}"
    return f"{names}: T_grok {worded(each.t_grok)}, H* {worded(each.h_star, '')}"


def headline(result: Tasks) -> str:
    """Say in a few sentences what the tasks show."""
    parts = []
    for task in result.tasks.values():
        runs = len(task.group.stored)
        grokked = round(task.grokked.value * runs)
        said = f"{title(task)} {grokked} of {runs}"
        if task.t_grok is not None and task.h_star is not None:
            said += f" at {steps(task.t_grok.value)} steps with H* {decimal(task.h_star.value)}"
        parts.append(said)
    text = f"E6: runs that grok: {'; '.join(parts)}."
    judged = [answer for each in result.controls if (answer := agrees(each)) is not None]
    if judged:
        alike = sum(judged)
        text += f" {alike} of {len(judged)} pairs of tasks that are one under other names agree within their intervals."
    return text
