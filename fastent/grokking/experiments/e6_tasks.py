"""E6, the question whether other tasks and another group show what addition shows.

Multiplication with 0, subtraction and composition in S5 beside E1's addition (paper, section 9, Table 3 and Figures 5
to 8), and controls that the paper lacks. Its rows for multiplication and subtraction are identical to the last digit.
Two of the tasks are addition under other names: without 0, multiplication modulo p is addition modulo p - 1, and
with a table of tokens for each operand subtraction is addition. Training knows no names, so those two must agree with
their addition but for the seeds: what differs between them says how much a difference between tasks means.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy import stats

from fastent.grokking.experiments import leads
from fastent.grokking.experiments.claims import (
    CLAIMS,
    NONE,
    Experiment,
    Finding,
    Findings,
    counted,
    decimal,
    judge_positive,
    judge_share,
    judge_within,
    least,
    of,
    percent,
    span,
    steps,
    worded,
)
from fastent.grokking.experiments.data import Runs
from fastent.grokking.experiments.delays import p_value
from fastent.grokking.experiments.document import Block, Section, Table, Text, Verdict
from fastent.grokking.experiments.figures import (
    CROSS,
    DASHED,
    DOTTED,
    FALL,
    GROK,
    LIGHT,
    WIDTH,
    compared,
    drawn,
    mark,
    thousands,
)
from fastent.grokking.experiments.leads import Leads
from fastent.grokking.experiments.statistics import (
    UNKNOWN,
    Estimate,
    less,
    log_rank,
    over,
    proportion,
    restricted_mean,
    share,
    welch,
)
from fastent.grokking.train.config import TrainConfig
from fastent.grokking.train.tasks import make_task

TITLE = "E6: do other tasks and groups show the same?"

PAPER = {"add": (14_040, 0.605), "mul": (21_560, 0.589), "sub": (21_560, 0.589), "s5": (4_380, 0.655)}
"""Its Table 3: T_grok and H*."""


@dataclass(frozen=True)
class Tasks:
    """Analysis of the complete runs of E6 beside E1's addition.

    `tasks` holds addition and the paper's other tasks by name; `controls` the differences of tasks that are one under
    other names, `contrasts` those of subtraction and addition with shared tokens, and of S5 with permutations as five
    tokens and as one, which are not.
    """

    tasks: dict[str, TaskRuns]
    controls: tuple[Difference, ...]
    contrasts: tuple[Difference, ...]


def analyse(runs: Runs) -> Tasks | None:
    """Set the tasks of E6 beside E1's addition; None if no run is E6's."""
    if not len(runs.select("e6")):
        return None
    tasks = {"add": runs.select("e1", "baseline", "add")}
    tasks |= {name: runs.select("e6", "baseline", name) for name in ("mul", "sub", "s5")}
    found = {name: task_of(name, each) for name, each in tasks.items() if len(each)}
    images = runs.select("e6", "with-images", "s5")
    apart = [(found["add"], found["sub"])] if {"add", "sub"} <= set(found) else []
    if "s5" in found and len(images):
        apart.append((found["s5"], task_of("s5_images", images)))
    own = functools.partial(runs.select, "e6", "with-own-tokens")
    less = runs.select("e6", task="add")
    pairs = (
        {
            "addition modulo p - 1": less[[run.condition.startswith("with-modulus-") for run in less.stored]],
            "mul_nonzero": runs.select("e6", "baseline", "mul_nonzero"),
        },
        {"addition, own tokens": own(task="add"), "subtraction, own tokens": own(task="sub")},
    )
    return Tasks(
        tasks=found,
        controls=tuple(
            difference(*(task_of(name, each) for name, each in pair.items()))
            for pair in pairs
            if all(len(each) for each in pair.values())
        ),
        contrasts=tuple(difference(*pair) for pair in apart),
    )


def not_commuting(config: TrainConfig) -> float:
    """Share of all pairs (a, b) of a task with a b other than b a."""
    task = make_task(config)
    table = task.labels.view(task.operands, task.operands)
    return float((table != table.T).double().mean())


def claims(result: Tasks) -> Findings:
    """Each claim of the paper that E6's runs speak to, beside what they say."""
    found: dict[str, Finding] = {f"e6.{name}": _row(name, task) for name, task in result.tasks.items()}
    others = [task for name, task in result.tasks.items() if name != "add"]
    ahead = _pooled(others)
    found |= {
        "e6.pattern": _of_grokked(
            others,
            "; ".join(f"{NAMES[task.name]} {counted(task.left_out.preceding)}" for task in others) or NONE,
            judge_share(ahead),
        ),
        "e6.modular": _modular(result),
        "e6.rows_alike": _rows_alike(result),
        "e6.not_commuting": Finding(
            f"{percent(not_commuting(TrainConfig(task='s5')))} (exactly 1 − 7/120, by the seven classes)",
            Verdict.REPRODUCED,
        ),
    }
    s5, add = result.tasks.get("s5"), result.tasks.get("add")
    if s5 is not None:
        found["e6.s5_window"] = _of_grokked(
            [s5],
            counted(s5.fall.preceding),
            CLAIMS["e6.s5_window"].judge(s5.fall.preceding, comparable=s5.runs.comparable),
        )
    if s5 is not None and add is not None:
        gap = difference(add, s5)
        found["e6.s5_threshold"] = _of_grokked(
            [s5],
            f"H* of S5 less H* of addition {worded(gap.h_star, '')}",
            judge_positive(gap.h_star, CLAIMS["e6.s5_threshold"].margin),
        )
    if result.controls:
        found["e6.relabelled"] = Finding(
            "; ".join(_worded_difference(each) for each in result.controls), _judge_controls(result.controls)
        )
    return found


def _of_grokked(tasks: Sequence[TaskRuns], said: str, verdict: Verdict) -> Finding:
    """Make the finding on a claim about runs that grok; it has no case where `tasks` were run and no run groks."""
    if verdict is not Verdict.NOT_RUN or not tasks or any(task.grokked.value for task in tasks):
        return Finding(said, verdict)
    return Finding(
        "; ".join(f"{NAMES[task.name]}: grokked {counted(task.grokked)}" for task in tasks), Verdict.NO_CASE
    )


def _row(name: str, task: TaskRuns) -> Finding:
    judged = [
        less(ours, Estimate(paper))
        for ours, paper in zip((task.t_grok, task.h_star), PAPER[name], strict=True)
    ]
    verdict = (
        least(judge_share(task.grokked), *map(judge_within, judged, _margins(PAPER[name][0])))
        if task.runs.comparable
        else Verdict.OTHER_SETTING
    )
    said = [
        f"{name} {worded(ours, unit)}; less the paper's {span(gap, write)}" if gap.known else f"{name} {NONE}"
        for name, ours, unit, gap, write in (
            ("T_grok", task.t_grok, "steps", judged[0], steps),
            ("H*", task.h_star, "", judged[1], decimal),
        )
    ]
    return Finding("; ".join((counted(task.grokked), *said)), verdict)


def _pooled(tasks: Sequence[TaskRuns]) -> Estimate:
    """Share of the grokked runs of all tasks that are preceded, of those that have other seeds."""
    known = [task.left_out.preceding for task in tasks if task.left_out.preceding.known]
    return proportion(sum(round(each.value * each.n) for each in known), sum(each.n for each in known))


def _modular(result: Tasks) -> Finding:
    tasks = [task for name in ("add", "mul", "sub") if (task := result.tasks.get(name)) and task.h_star.known]
    found = [task.runs.h_star[~np.isnan(task.runs.h_star)] for task in tasks]
    said = ", ".join(f"{task.title} {decimal(task.h_star.value)}" for task in tasks)
    if len(tasks) < 3 or min(map(len, found)) < 2 or all(np.ptp(h) == 0 for h in found):
        return Finding(said or NONE, Verdict.NOT_RUN)
    p = float(stats.f_oneway(*found).pvalue)
    ends = stats.tukey_hsd(*found).confidence_interval()
    furthest = max(-float(ends.low.min()), float(ends.high.max()))
    said += f"; they differ with p = {p_value(p)}, by up to {decimal(furthest)}"
    if (s5 := result.tasks.get("s5")) and s5.h_star.known:
        known = s5.runs.h_star[~np.isnan(s5.runs.h_star)]
        said += f"; with S5 p = {p_value(float(stats.f_oneway(*found, known).pvalue))}"
    alike = furthest <= CLAIMS["e6.modular"].margin
    verdict = Verdict.NOT_REPRODUCED if p < 0.05 else Verdict.UNDECIDED
    return Finding(said, Verdict.REPRODUCED if alike else verdict)


def _rows_alike(result: Tasks) -> Finding:
    mul, sub = result.tasks.get("mul"), result.tasks.get("sub")
    if not (mul and sub):
        return Finding(NONE, Verdict.NOT_RUN)
    gap = difference(mul, sub)
    return Finding(_worded_difference(gap), _judge_alike(gap))


def _margins(t_grok: float) -> tuple[float, float]:
    """Differences of T_grok, in steps, and of H* that change no conclusion, as in E1's claims."""
    times, h_star = CLAIMS["e1.t_grok"], CLAIMS["e1.h_star"]
    return t_grok * times.margin / times.number, h_star.margin


def _judge_alike(each: Difference) -> Verdict:
    return least(*map(judge_within, (each.t_grok, each.h_star), _margins(each.first.t_grok.value)))


def _judge_same(each: Difference) -> Verdict:
    """Judge tasks that are one: apart from what lies within the margins, 0 outside of an interval says they are not."""
    gaps = (each.t_grok, each.h_star)
    if any(gap.low > 0 or gap.high < 0 for gap in gaps):
        return Verdict.NOT_AS_EXPECTED
    found = _judge_alike(each)
    return Verdict.AS_EXPECTED if found is Verdict.REPRODUCED else found


def _judge_controls(controls: Sequence[Difference]) -> Verdict:
    order = (Verdict.NOT_AS_EXPECTED, Verdict.NOT_RUN, Verdict.UNDECIDED, Verdict.AS_EXPECTED)
    return min(map(_judge_same, controls), key=order.index)


def _worded_difference(each: Difference) -> str:
    names = f"{each.second.title} less {each.first.title}"
    return f"{names}: T_grok {worded(each.t_grok)}, H* {worded(each.h_star, '')}"


def headline(result: Tasks) -> str:
    """Say in a few sentences what the tasks show."""
    parts = []
    for task in result.tasks.values():
        said = f"{task.title} {of(task.grokked)}"
        if task.t_grok.known and task.h_star.known:
            said += f" at {steps(task.t_grok.value)} steps with H* {decimal(task.h_star.value)}"
        parts.append(said)
    text = f"E6: runs that grok: {'; '.join(parts)}."
    if result.controls:
        alike = [_judge_same(each) for each in result.controls].count(Verdict.AS_EXPECTED)
        text += (
            f" {alike} of {len(result.controls)} pairs of tasks that are one under other names surely agree."
        )
    return text


NAMES = {
    "add": "addition",
    "mul": "multiplication",
    "sub": "subtraction",
    "s5": "S5",
    "s5_images": "S5, ten tokens",
    "mul_nonzero": "multiplication without 0",
}


@dataclass(frozen=True, eq=False)
class TaskRuns:
    """The runs of one task.

    `t_grok` is the mean over the runs, restricted to the limit of steps if some did not grok; `fall` are the leads of
    the paper's T_collapse, `left_out` those at the H* of the task's other runs.
    """

    name: str
    runs: Runs
    grokked: Estimate
    t_grok: Estimate
    h_star: Estimate
    left_out: Leads
    fall: Leads

    @property
    def title(self) -> str:
        """Its name for people."""
        return NAMES.get(self.name, self.name)


@dataclass(frozen=True, eq=False)
class Difference:
    """One task against another: T_grok in steps and H*, the second's less the first's."""

    first: TaskRuns
    second: TaskRuns
    t_grok: Estimate
    h_star: Estimate


def task_of(name: str, runs: Runs) -> TaskRuns:
    """Measure the runs of a task."""
    times = runs.times
    t_grok = over(times.values, least=0)
    if times.censored:
        t_grok = (
            restricted_mean(times, runs.setting("max_steps").min()) if times.censored < times.n else UNKNOWN
        )
    return TaskRuns(
        name=name,
        runs=runs,
        grokked=share(runs.grokked),
        t_grok=t_grok,
        h_star=over(runs.h_star, least=0, most=1),
        left_out=leads.left_out_threshold(runs),
        fall=leads.paper_collapse(runs),
    )


def difference(first: TaskRuns, second: TaskRuns) -> Difference:
    """Compare two tasks; their runs share nothing."""
    a, b = (task.runs.h_star[~np.isnan(task.runs.h_star)] for task in (first, second))
    t_grok = UNKNOWN
    if first.grokked.value == second.grokked.value == 1:
        t_grok = welch(first.runs.t_grok, second.runs.t_grok)
    elif first.grokked.value + second.grokked.value > 0:
        limit = min(task.runs.setting("max_steps").min() for task in (first, second))
        t_grok = log_rank(first.runs.times, second.runs.times, limit).effect
    return Difference(first, second, t_grok, welch(a, b) if a.size and b.size else UNKNOWN)


def shares_at(task: TaskRuns, name: str) -> tuple[Estimate, ...]:
    """Mean of a column at T_mem, at T_grok and at the end of the task's runs."""
    return tuple(
        over(task.runs.at(name, step), least=0, most=1)
        for step in (task.runs.t_mem, task.runs.t_grok, task.runs.end)
    )


def chance_shares() -> dict[str, float]:
    """Share of each non-trivial representation of S5 in a function without structure: its squared dimension's."""
    dimensions = {"41": 4, "32": 5, "311": 6, "221": 5, "2111": 4, "11111": 1}
    total = float(np.sum(np.square(list(dimensions.values()))))
    return {name: d * d / total for name, d in dimensions.items()}


def trajectories(result: Tasks) -> Figure:
    """Test accuracy and H of every run, one column a task."""
    tasks = list(result.tasks.values())
    figure = Figure(figsize=(WIDTH, 5.6), layout="constrained")
    grid = figure.subplots(2, len(tasks), sharex="col", sharey="row", squeeze=False)
    for place, task in enumerate(tasks):
        a, b = grid[:, place]
        runs = task.runs
        columns = runs.lines(runs.train_accuracy, runs.test_accuracy, runs.entropy)
        for i, (step, train, test, entropy) in enumerate(columns):
            a.plot(step, train, color=LIGHT.train, linestyle=DASHED, linewidth=0.9)
            a.plot(step, test, color=LIGHT.test, linewidth=1.1)
            b.plot(step, entropy, color=LIGHT.entropy, linewidth=1.1)
            mark(b, step, entropy, task.fall.times[i], FALL)
            mark(b, step, entropy, task.left_out.times[i], CROSS)
            mark(b, step, entropy, runs.t_grok[i], GROK, LIGHT.ink)
        if task.h_star.known:
            b.axhline(task.h_star.value, color=LIGHT.signal, linewidth=1.2, linestyle=DOTTED)
        a.set(title=task.title.capitalize() if task.name != "s5" else "S5", ylim=(-0.03, 1.05))
        b.set_xlabel("training step")
        b.xaxis.set_major_formatter(thousands)
        b.xaxis.set_major_locator(MaxNLocator(3))
    first, second = grid[0, 0], grid[1, 0]
    first.set_ylabel("accuracy (share)")
    second.set_ylabel("H (normalised, no unit)")
    handles = [
        first.plot([], [], color=LIGHT.train, linestyle=DASHED, label="train accuracy")[0],
        first.plot([], [], color=LIGHT.test, label="test accuracy")[0],
        second.plot([], [], color=LIGHT.entropy, label="H")[0],
        second.plot([], [], color=LIGHT.signal, linestyle=DOTTED, label="H*, mean")[0],
        second.plot([], [], color=LIGHT.signal, label="T_collapse", **FALL)[0],
        second.plot([], [], color=LIGHT.signal, label="T_cross", **CROSS)[0],
        second.plot([], [], color=LIGHT.ink, label="T_grok", **GROK)[0],
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=7, fontsize=9)
    return figure


def isotypic(task: TaskRuns) -> Figure:
    """Share of each irreducible representation in the label means along the runs of S5, one panel each."""
    chance = chance_shares()
    figure = Figure(figsize=(WIDTH, 5.0), layout="constrained")
    panels = figure.subplots(2, 3, sharex=True, sharey=True)
    for axes, (name, part) in zip(panels.ravel(), chance.items(), strict=True):
        for i, (step, values) in enumerate(task.runs.lines(f"isotypic_{name}")):
            if np.isnan(values).all():
                continue
            axes.plot(step, values, color=LIGHT.norm, linewidth=1.1)
            mark(axes, step, values, task.runs.t_grok[i], GROK, LIGHT.ink)
        axes.axhline(part, color=LIGHT.train, linestyle=DOTTED, linewidth=1.2)
        axes.set(title=f"({', '.join(name)}), dimension {round(np.sqrt(119 * part))}", ylim=(-0.03, 1.03))
        axes.xaxis.set_major_formatter(thousands)
        axes.xaxis.set_major_locator(MaxNLocator(4))
    for axes in panels[:, 0]:
        axes.set_ylabel("share of variance")
    for axes in panels[-1]:
        axes.set_xlabel("training step")
    return figure


def section(result: Tasks) -> Section:
    """E6's part of the report."""
    controls = [task for each in result.controls for task in (each.first, each.second)]
    controls += [each.second for each in result.contrasts if each.second.name == "s5_images"]
    blocks: list[Block] = [
        Text(
            "The paper's Table 3 beside ours. Its rows for multiplication and subtraction are identical in all "
            "columns, 21,560 steps and 0.589, which two tasks of five runs each hardly give by chance."
        ),
        _tasks_table([*result.tasks.values(), *controls]),
        drawn(
            "e6-tasks",
            functools.partial(trajectories, result),
            "In the manner of the paper's Figures 5 to 8. One line a run; T_cross is of the H* of the task's "
            "other seeds.",
            "Accuracy and spectral entropy against the training step, one column a task.",
        ),
        *compared("e6", {task.title: task.runs for task in (*result.tasks.values(), *controls)}),
    ]
    if pairs := [*result.controls, *result.contrasts]:
        blocks += [
            Text(
                "Multiplication modulo a prime p without 0 is addition modulo p - 1 under other names, by discrete "
                "logarithms; subtraction is addition with the second operand's tokens renamed, if it has a table "
                "of its own. Nothing in training knows names, so the two of a pair differ as two sets of seeds "
                "do. With shared tokens subtraction is no such copy: sums are symmetric and differences are not. Nor "
                "is S5 with five tokens a permutation, its images, a copy of S5 with one."
            ),
            _pairs_table(pairs, result.contrasts),
        ]
    cyclic = [task for task in (*result.tasks.values(), *controls) if not task.name.startswith("s5")]
    if any(estimate.known for task in cyclic for estimate in shares_at(task, "top_share")):
        blocks.append(_frequencies_table(cyclic))
    s5 = result.tasks.get("s5")
    if s5 is not None and any(e.known for e in shares_at(s5, "isotypic_41")):
        blocks += [
            Text(
                "Functions on S5 fall apart into seven parts, one for each irreducible representation ρ, by "
                "P_ρ = (d_ρ/120) Σ χ_ρ(s⁻¹) L_s. Without the trivial one, the mean, label means without structure "
                "would divide their variance as the squared dimensions do."
            ),
            drawn(
                "e6-isotypic",
                functools.partial(isotypic, s5),
                "Share of the variance between the label means of test representations in each irreducible "
                "representation of S5, by its partition. Dotted: without structure. Circles: T_grok.",
                "Shares of six irreducible representations against the training step.",
            ),
            _isotypic_table(s5),
        ]
    return Section("e6", TITLE, tuple(blocks))


def _tasks_table(tasks: Sequence[TaskRuns]) -> Table:
    rows = []
    for task in tasks:
        printed = PAPER.get(task.name)
        rows.append(
            (
                task.title,
                "S5, not abelian" if task.name.startswith("s5") else "cyclic",
                counted(task.grokked),
                NONE if printed is None else steps(printed[0]),
                worded(task.t_grok),
                NONE if printed is None else decimal(printed[1]),
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
        "Table 3 with ours, and the controls. T_cross is of the H* of the task's other seeds, T_collapse the paper's: "
        "H lower by more than 0.05 than 1,000 steps before, from T_mem on."
    )
    return Table(caption, columns, tuple(rows))


def _pairs_table(pairs: Sequence[Difference], contrasts: Sequence[Difference]) -> Table:
    rows = [
        (
            f"{pair.second.title} less {pair.first.title}",
            "no" if pair in contrasts else "yes",
            worded(pair.t_grok),
            worded(pair.h_star, "", 4),
            _judge_same(pair).label if pair not in contrasts else NONE,
        )
        for pair in pairs
    ]
    caption = (
        "Pairs of tasks: differences of mean T_grok and of mean H*, with Welch's intervals (T_grok restricted to the "
        "limit of steps where a run does not grok)."
    )
    columns = ("pair", "one task under other names", "T_grok", "H*", "alike")
    return Table(caption, columns, tuple(rows))


def _frequencies_table(tasks: Sequence[TaskRuns]) -> Table:
    rows = []
    for task in tasks:
        top, frequencies = shares_at(task, "top_share"), shares_at(task, "frequencies")
        label, aligned = shares_at(task, "label_share"), shares_at(task, "alignment")
        rows.append((task.title, _arrows(label), _arrows(top), _arrows(frequencies, 1), _arrows(aligned)))
    caption = (
        "Spectra over the group, means over the runs at T_mem → T_grok → the end: share of the variance of test "
        "representations between labels; of that the five strongest frequencies, and how many take part; the "
        "paper's alignment on the training probe. For products the frequencies are of discrete logarithms."
    )
    columns = ("task", "between labels", "five frequencies", "frequencies that take part", "alignment")
    return Table(caption, columns, tuple(rows))


def _isotypic_table(task: TaskRuns) -> Table:
    moments = {name: shares_at(task, f"isotypic_{name}") for name in chance_shares()}
    rows = [
        (f"({', '.join(name)})", decimal(chance), *(span(estimate, decimal) for estimate in moments[name]))
        for name, chance in chance_shares().items()
    ]
    columns = ("representation", "without structure", "at T_mem", "at T_grok", "at the end")
    caption = "Shares of the irreducible representations of S5, means over the runs with their intervals."
    return Table(caption, columns, tuple(rows), (1,))


def _arrows(estimates: Sequence[Estimate], digits: int = 2) -> str:
    return " → ".join(decimal(e.value, digits) for e in estimates)


EXPERIMENT = Experiment(
    "e6", "Do other tasks and groups show the same?", ("e1", "e6"), analyse, headline, claims, section
)
