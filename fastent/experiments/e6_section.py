"""E6's part of the report: the tasks side by side, the relabelling controls, and the spectra over the groups."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from fastent.experiments import e6_figures
from fastent.experiments.claims import NONE, counted, decimal, steps, worded
from fastent.experiments.delay_blocks import drawn, span
from fastent.experiments.document import Block, Section, Table, Text
from fastent.experiments.e6_compared import Difference, Task, agrees, chance_shares, shares_at, title
from fastent.experiments.e6_tasks import PAPER, TITLE, Tasks
from fastent.experiments.statistics import Estimate


def section(result: Tasks) -> Section:
    """E6's part of the report."""
    controls = [task for each in result.controls for task in (each.first, each.second)]
    blocks: list[Block] = [
        Text(
            "The paper's Table 3 beside ours. Its rows for multiplication and subtraction are identical in all "
            "columns, 21,560 steps and 0.589, which two tasks of five runs each hardly give by chance."
        ),
        _tasks_table([*result.tasks.values(), *controls]),
        drawn(
            "e6-tasks",
            functools.partial(e6_figures.trajectories, result),
            "In the manner of the paper's Figures 5 to 8. One line a run; T_cross is of the H* of the task's "
            "other seeds.",
            "Accuracy and spectral entropy against the training step, one column a task.",
        ),
    ]
    pairs = [*result.controls, *([] if result.contrast is None else [result.contrast])]
    if pairs:
        blocks += [
            Text(
                "Multiplication modulo a prime p without 0 is addition modulo p - 1 under other names, by discrete "
                "logarithms; subtraction is addition with the second operand's tokens renamed, if it has a table "
                "of its own. Nothing in training knows names, so the two of a pair differ as two sets of seeds "
                "do. With shared tokens subtraction is no such copy: sums are symmetric and differences are not."
            ),
            _pairs_table(pairs, result.contrast),
        ]
    cyclic = [task for task in (*result.tasks.values(), *controls) if task.name != "s5"]
    if any(estimate is not None for task in cyclic for estimate in shares_at(task, "top_share")):
        blocks.append(_frequencies_table(cyclic))
    s5 = result.tasks.get("s5")
    if s5 is not None and any(e is not None for e in shares_at(s5, "isotypic_41")):
        blocks += [
            Text(
                "Functions on S5 fall apart into seven parts, one for each irreducible representation ρ, by "
                "P_ρ = (d_ρ/120) Σ χ_ρ(s⁻¹) L_s. Without the trivial one, the mean, label means without structure "
                "would divide their variance as the squared dimensions do."
            ),
            drawn(
                "e6-isotypic",
                functools.partial(e6_figures.isotypic, s5),
                "Share of the variance between the label means of test representations in each irreducible "
                "representation of S5, by its partition. Dotted: without structure. Circles: T_grok.",
                "Shares of six irreducible representations against the training step.",
            ),
            _isotypic_table(s5),
        ]
    return Section("e6", TITLE, tuple(blocks))


def _tasks_table(tasks: Sequence[Task]) -> Table:
    rows = []
    for task in tasks:
        printed = PAPER.get(task.name)
        rows.append(
            (
                title(task),
                "S5, not abelian" if task.name == "s5" else "cyclic",
                counted(task.grokked),
                NONE if printed is None else steps(printed[1]),
                worded(task.t_grok),
                NONE if printed is None else decimal(printed[2]),
                worded(task.h_star, ""),
                counted(task.left_out.preceding),
                worded(task.left_out.mean),
                counted(task.fall.preceding),
                worded(task.fall.mean),
            )
        )
    columns = (
        *("task", "group", "grokked", "T_grok, paper", "T_grok", "H*, paper", "H*"),
        *("T_cross before T_grok", "lead", "T_collapse before T_grok", "lead"),
    )
    caption = (
        "Table 3 with ours, and the controls. T_cross is of the H* of the task's other seeds, T_collapse a fall of "
        "H by more than 0.05 within 800 steps."
    )
    return Table(caption, columns, tuple(rows))


def _pairs_table(pairs: Sequence[Difference], contrast: Difference | None) -> Table:
    rows = [
        (
            f"{title(pair.second)} less {title(pair.first)}",
            "no" if pair is contrast else "yes",
            worded(pair.t_grok),
            worded(pair.h_star, "", 4),
            {True: "yes", False: "no", None: NONE}[agrees(pair)],
        )
        for pair in pairs
    ]
    caption = (
        "Pairs of tasks: differences of mean T_grok and of mean H*, with Welch's intervals (T_grok restricted to the "
        "limit of steps, with Greenwood's, where a run does not grok)."
    )
    columns = ("pair", "one task under other names", "T_grok", "H*", "0 in both intervals")
    return Table(caption, columns, tuple(rows))


def _frequencies_table(tasks: Sequence[Task]) -> Table:
    rows = []
    for task in tasks:
        top, frequencies = shares_at(task, "top_share"), shares_at(task, "frequencies")
        label, aligned = shares_at(task, "label_share"), shares_at(task, "alignment")
        rows.append((title(task), _arrows(label), _arrows(top), _arrows(frequencies, 1), _arrows(aligned)))
    caption = (
        "Spectra over the group, means over the runs at T_mem → T_grok → the end: share of the variance of test "
        "representations between labels; of that the five strongest frequencies, and how many take part; the "
        "paper's alignment on the training probe. For products the frequencies are of discrete logarithms."
    )
    columns = ("task", "between labels", "five frequencies", "frequencies that take part", "alignment")
    return Table(caption, columns, tuple(rows))


def _isotypic_table(task: Task) -> Table:
    moments = {name: shares_at(task, f"isotypic_{name}") for name in chance_shares()}
    rows = [
        (
            f"({', '.join(name)})",
            decimal(chance),
            *(span(estimate, decimal) for estimate in moments[name]),
        )
        for name, chance in chance_shares().items()
    ]
    columns = ("representation", "without structure", "at T_mem", "at T_grok", "at the end")
    caption = "Shares of the irreducible representations of S5, means over the runs with their intervals."
    return Table(caption, columns, tuple(rows), (1,))


def _arrows(estimates: Sequence[Estimate | None], digits: int = 2) -> str:
    return " → ".join(decimal(None if e is None else e.value, digits) for e in estimates)
