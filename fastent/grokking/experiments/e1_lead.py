"""E1, the question whether the collapse of the entropy precedes grokking.

Runs of modular addition, `fastent.grokking.experiments.jobs.e1` (paper, sections 3.3 and 5, Figure 1). The paper says
that H falls below a threshold H* in every run before the model generalises, 1,020 steps ahead on average. What "the
threshold" is decides the answer, so the leads are measured with four: see `fastent.grokking.experiments.leads`. They
also depend on what is called grokking and on tau, so both are varied; and one threshold for all runs is swept.

``python -m fastent.grokking.experiments.e1_lead RUNS PICTURE`` draws the README's picture from the E1 runs in a folder.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fastent.grokking.experiments import leads
from fastent.grokking.experiments.claims import (
    CLAIMS,
    NONE,
    Finding,
    Findings,
    counted,
    decimal,
    judge_share,
    percent,
    steps,
    worded,
)
from fastent.grokking.experiments.data import read_runs
from fastent.grokking.experiments.document import Block, Section, Table, Text, Verdict
from fastent.grokking.experiments.figures import (
    CROSS,
    FALL,
    GROK,
    LIGHT,
    WIDTH,
    drawn,
    lines,
    save_png,
    thousands,
)
from fastent.grokking.experiments.leads import Leads, Sweep
from fastent.grokking.experiments.statistics import Estimate, Times, bootstrap, proportion, restricted_mean
from fastent.train.quantities import TAU, WINDOW, MeasuredRun, value_at

TITLE = "E1: does the entropy collapse precede grokking?"

PAPER_H_STAR = 0.605

PAPER_SPAN = 800
"""Steps that the paper's window spans: five evaluations, 200 steps apart."""

TAUS = (0.02, 0.05, 0.10)
CRITERIA = (0.5, 0.9, 0.99)


@dataclass(frozen=True)
class Baseline:
    """Analysis of the complete runs of E1.

    `comparable` says whether they were made with the paper's setting, so that its numbers can be judged;
    `own`, `pooled`, `left_out` and `fall` are the leads by the rules of `fastent.grokking.experiments.leads`, and
    `wide` is `fall` over the paper's 800 steps, if five evaluations span fewer or more of them. `t_grok`
    is a restricted mean if some runs did not grok.
    """

    runs: tuple[MeasuredRun, ...]
    comparable: bool
    h_star: Estimate | None
    t_mem: Estimate | None
    t_grok: Estimate | None
    own: Leads
    pooled: Leads
    left_out: Leads
    fall: Leads
    wide: Leads | None
    sweep: Sweep

    @property
    def rules(self) -> tuple[Leads, ...]:
        """Leads by each rule, the circular one first."""
        known = (self.own, self.pooled, self.left_out, self.fall)
        return known if self.wide is None else (*known, self.wide)

    @property
    def signal(self) -> Leads:
        """The collapse over the paper's span of steps, whatever the grid of evaluations."""
        return self.fall if self.wide is None else self.wide


def analyse(runs: Sequence[MeasuredRun], *, comparable: bool) -> Baseline:
    """Leads by each rule, H* over the seeds and the sweep, from the runs of `runs` that are complete.

    Raises
    ------
    ValueError
        If no run is complete.
    """
    kept = tuple(run for run in runs if run.complete)
    if not kept:
        raise ValueError("no run of E1 is complete")
    return Baseline(
        runs=kept,
        comparable=comparable,
        h_star=_over([r.summary.h_star for r in kept]),
        t_mem=_over([r.summary.t_mem for r in kept]),
        t_grok=_mean_time(kept),
        own=leads.own_threshold(kept),
        pooled=leads.in_sample_threshold(kept),
        left_out=leads.left_out_threshold(kept),
        fall=leads.collapse(kept),
        wide=None if (window := paper_window(kept)) is None else leads.collapse(kept, window=window),
        sweep=leads.sweep(kept, leads.observed_thresholds(kept)),
    )


def paper_window(runs: Sequence[MeasuredRun]) -> int | None:
    """Count the evaluations that span the paper's 800 steps; None if they are five, or the grids differ."""
    every = {run.evaluate_every for run in runs}
    window = 1 + PAPER_SPAN // max(every)
    return None if len(every) > 1 or window in (1, WINDOW) else window


def _over(values: Sequence[float | None]) -> Estimate | None:
    known = [float(v) for v in values if v is not None]
    return bootstrap(known) if known else None


def _mean_time(runs: Sequence[MeasuredRun]) -> Estimate | None:
    """Mean T_grok; if some runs did not grok, the restricted mean to the earliest end of those."""
    times = [r.summary.t_grok for r in runs]
    ends = [r.summary.last_step for r in runs if r.summary.t_grok is None]
    if not ends:
        return _over(times)
    if len(ends) == len(runs):
        return None
    return restricted_mean(Times.of(times, [r.summary.last_step for r in runs]), min(ends))


def _share(runs: Sequence[MeasuredRun], holds: Callable[[MeasuredRun], bool | None]) -> Estimate | None:
    """Share of the runs for which `holds` is true, of those where it is not None."""
    known = [answer for run in runs if (answer := holds(run)) is not None]
    return proportion(sum(known), len(known)) if known else None


def claims(result: Baseline) -> Findings:
    """Each claim of the paper that E1's runs speak to, beside what they say."""
    runs = result.runs

    def delayed(run: MeasuredRun) -> bool:
        s = run.summary
        return s.t_mem is not None and s.t_grok is not None and s.t_grok >= 2 * s.t_mem

    def stable(run: MeasuredRun) -> bool | None:
        s = run.summary
        if s.entropy_start is None or s.entropy_at_mem is None:
            return None
        return abs(s.entropy_at_mem - s.entropy_start) < TAU

    def falls_from_start(run: MeasuredRun) -> bool | None:
        s = run.summary
        if s.entropy_start is None or s.entropy_max is None:
            return None
        return s.entropy_max - s.entropy_start < 0.01

    def norm_grows(run: MeasuredRun) -> bool | None:
        s = run.summary
        return None if s.norm_start is None or s.norm_at_mem is None else s.norm_at_mem > s.norm_start

    window = paper_window(runs) or WINDOW
    early = leads.collapse([run.dated_by(0.5) for run in runs], window=window)
    known = [r.summary.h_star for r in runs if r.summary.h_star is not None]
    spread = max(known) - min(known) if known else None
    tight = Verdict.NOT_RUN if spread is None else judge_share(proportion(int(spread < TAU), 1))
    delay, calm = _share(runs, delayed), _share(runs, stable)
    monotone, growth = _share(runs, falls_from_start), _share(runs, norm_grows)
    change = _over([_difference(r.summary.entropy_at_mem, r.summary.entropy_start) for r in runs])
    rise = _over([_difference(r.summary.entropy_max, r.summary.entropy_start) for r in runs])
    norm = _over([_ratio(r.summary.norm_at_mem, r.summary.norm_start) for r in runs])
    return {
        "e1.memorises_early": Finding(
            f"{counted(delay)}; memorised at {worded(result.t_mem)}", judge_share(delay)
        ),
        "e1.t_grok": Finding(
            worded(result.t_grok), CLAIMS["e1.t_grok"].judge(result.t_grok, comparable=result.comparable)
        ),
        "e1.h_star": Finding(
            worded(result.h_star, ""), CLAIMS["e1.h_star"].judge(result.h_star, comparable=result.comparable)
        ),
        "e1.h_star_stable": Finding(f"largest minus smallest {decimal(spread)} (n = {len(known)})", tight),
        "e1.precedes": _led(result.pooled),
        "e1.precedes_left_out": _led(result.left_out),
        **{
            name: _led(rule)
            for name, rule in zip(("e1.collapse", "e1.collapse_800"), result.rules[3:], strict=False)
        },
        "e1.collapse_at_half": _led(early),
        "e1.phase_1_stable": Finding(
            f"{counted(calm)}; change of H until T_mem {worded(change, '')}", judge_share(calm)
        ),
        "e1.falls_from_start": Finding(
            f"{counted(monotone)}; H rises above its start by {worded(rise, '')}", judge_share(monotone)
        ),
        "e1.norm_grows": Finding(
            f"{counted(growth)}; norm at T_mem over norm at the start {worded(norm, '')}", judge_share(growth)
        ),
    }


def _led(rule: Leads) -> Finding:
    said = f"{counted(rule.preceding)}; lead {worded(rule.mean)}"
    return Finding(said, judge_share(rule.preceding), {"source": rule.source})


def _difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None or b == 0 else a / b


def training_dynamics(
    runs: Sequence[MeasuredRun], crossing: Leads, fall: Leads, h_star: float | None
) -> Figure:
    """Accuracies, entropy and parameter norm against the step: the paper's Figure 1.

    `crossing` and `fall` give T_cross, whose thresholds are drawn as a band, and T_collapse; `h_star` is the
    mean over the seeds, None draws no line.
    """
    figure = Figure(figsize=(WIDTH, 8.4), layout="constrained")
    a, b, c = figure.subplots(3, 1, sharex=True, height_ratios=(1.1, 1.35, 0.85))
    lines(a, runs, "train_accuracy", colour=LIGHT.train, dash=(0, (5, 2)), label="train")
    lines(a, runs, "test_accuracy", colour=LIGHT.test, dash="solid", label="test")
    a.set(title="A  Accuracy", ylabel="accuracy (share)", ylim=(-0.03, 1.05))

    lines(b, runs, "entropy", colour=LIGHT.entropy, dash="solid", label="H")
    known = [h for h in crossing.thresholds if h is not None]
    if known:
        label = f"H* of {crossing.rule}"
        b.axhspan(min(known), max(known), color=LIGHT.signal, alpha=0.22, linewidth=0, label=label)
    if h_star is not None:
        b.axhline(h_star, color=LIGHT.signal, linewidth=1.2, linestyle=(0, (2, 2)), label="H*, mean")
    b.set(title="B  Spectral entropy", ylabel="H (normalised, no unit)")

    lines(c, runs, "parameter_norm", colour=LIGHT.norm, dash="solid", label="norm")
    c.set(title="C  Parameter norm", ylabel="Euclidean norm (no unit)", xlabel="training step")
    c.set_ylim(bottom=0)
    columns = {a: "test_accuracy", b: "entropy", c: "parameter_norm"}
    for axes, name in columns.items():
        _marks(axes, runs, name, crossing, fall)
    for axes in (a, b):
        axes.legend(
            loc="lower right", bbox_to_anchor=(1.0, 0.98), ncols=7, borderaxespad=0, columnspacing=1.3
        )
    c.set_xlim(0, max(int(run.trajectory.step[-1]) for run in runs))
    c.xaxis.set_major_formatter(thousands)
    return figure


def around_grokking(runs: Sequence[MeasuredRun], crossing: Leads, fall: Leads, *, reach: int) -> Figure:
    """Test accuracy and entropy against the step counted from each run's own T_grok, `reach` either way."""
    figure = Figure(figsize=(WIDTH, 5.4), layout="constrained")
    a, b = figure.subplots(2, 1, sharex=True)
    for axes, name, colour in ((a, "test_accuracy", LIGHT.test), (b, "entropy", LIGHT.entropy)):
        for run, crossed, fell in zip(runs, crossing.times, fall.times, strict=True):
            if run.summary.t_grok is None:
                continue
            x = run.trajectory.step - run.summary.t_grok
            y = getattr(run.trajectory, name)
            near = np.abs(x) <= reach
            axes.plot(x[near], y[near], color=colour, linewidth=1.2, alpha=0.8)
            for at, marker in ((crossed, CROSS), (fell, FALL)):
                if at is not None and abs(at - run.summary.t_grok) <= reach:
                    here = run.trajectory.step == at
                    axes.plot(x[here], y[here], color=LIGHT.signal, **marker)
        axes.axvline(0, color=LIGHT.ink, linewidth=1)
    b.plot([], [], color=LIGHT.signal, label="T_collapse", **FALL)
    b.plot([], [], color=LIGHT.signal, label=f"T_cross, H* of {crossing.rule}", **CROSS)
    b.legend(loc="lower left")
    a.set(title="A  Test accuracy", ylabel="accuracy (share)", ylim=(-0.03, 1.05))
    b.set(title="B  Spectral entropy", ylabel="H (normalised, no unit)", xlabel="training steps after T_grok")
    b.xaxis.set_major_formatter(thousands)
    return figure


def per_seed(runs: Sequence[MeasuredRun], crossing: Leads, fall: Leads) -> Figure:
    """One panel a run: accuracies and entropy on one scale; the span from the fall of H to T_grok is shaded."""
    columns = min(len(runs), 3)
    rows = -(-len(runs) // columns)
    figure = Figure(figsize=(WIDTH, 0.8 + 2.8 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, run, threshold, fell in zip(grid, runs, crossing.thresholds, fall.times, strict=False):
        step, t_grok = run.trajectory.step, run.summary.t_grok
        axes.plot(
            step, run.trajectory.train_accuracy, color=LIGHT.train, linestyle=(0, (5, 2)), linewidth=1.3
        )
        axes.plot(step, run.trajectory.test_accuracy, color=LIGHT.test, linewidth=1.8)
        axes.plot(step, run.trajectory.entropy, color=LIGHT.entropy, linewidth=1.8)
        if threshold is not None:
            axes.axhline(threshold, color=LIGHT.signal, linestyle=(0, (2, 2)), linewidth=1.2)
        title = f"seed {run.seed}"
        if fell is not None and t_grok is not None:
            axes.axvspan(min(fell, t_grok), max(fell, t_grok), color=LIGHT.signal, alpha=0.18, linewidth=0)
            title += f", lead {thousands(t_grok - fell, 0)} steps"
        axes.set(title=title, ylim=(-0.03, 1.05))
        axes.xaxis.set_major_formatter(thousands)
        axes.xaxis.set_major_locator(MaxNLocator(4))
    for axes in grid[len(runs) :]:
        axes.set_visible(False)
    for axes in grid[max(0, len(runs) - columns) : len(runs)]:
        axes.set_xlabel("training step")
        axes.xaxis.set_tick_params(labelbottom=True)
    for axes in grid[::columns]:
        axes.set_ylabel("accuracy; H (no unit)")
    grid[0].set_xlim(0, max(int(r.trajectory.step[-1]) for r in runs))
    handles = [
        grid[0].plot([], [], color=LIGHT.train, linestyle=(0, (5, 2)), label="train accuracy")[0],
        grid[0].plot([], [], color=LIGHT.test, linewidth=1.8, label="test accuracy")[0],
        grid[0].plot([], [], color=LIGHT.entropy, linewidth=1.8, label="spectral entropy H")[0],
        grid[0].plot([], [], color=LIGHT.signal, linestyle=(0, (2, 2)), label=f"H* of {crossing.rule}")[0],
        grid[0].fill_between(
            [], [], color=LIGHT.signal, alpha=0.18, label=f"from a fall of H by {TAU:g} to T_grok"
        ),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=5, fontsize=9)
    return figure


def lead_dots(rules: Sequence[Leads]) -> Figure:
    """Every run's lead by every rule, with the mean and its interval."""
    figure = Figure(figsize=(WIDTH, 1.0 + 0.62 * len(rules)), layout="constrained")
    axes = figure.subplots()
    for row, rule in enumerate(rules):
        known = [x for x in rule.leads if x is not None]
        axes.plot(known, [row] * len(known), "o", color=LIGHT.signal, alpha=0.65, markeredgewidth=0)
        if rule.mean is not None:
            axes.plot(rule.mean.value, row, "D", color=LIGHT.ink, markersize=6, zorder=3)
            if rule.mean.low is not None and rule.mean.high is not None:
                axes.plot([rule.mean.low, rule.mean.high], [row, row], color=LIGHT.ink, linewidth=1.5)
    axes.axvline(0, color=LIGHT.ink, linewidth=1)
    axes.set_yticks(range(len(rules)), [rule.source for rule in rules])
    axes.set_ylim(len(rules) - 0.5, -0.5)
    axes.set_xlabel("lead: T_grok minus the step of the signal (training steps)")
    axes.xaxis.set_major_formatter(thousands)
    return figure


def threshold_sweep(result: Sweep, runs: Sequence[MeasuredRun]) -> Figure:
    """Share of runs preceded, lead, and false and early alarms, against the threshold."""
    figure = Figure(figsize=(WIDTH, 7.2), layout="constrained")
    a, b, c = figure.subplots(3, 1, sharex=True)
    h = result.thresholds
    a.plot(h, result.preceding, color=LIGHT.test, linewidth=1.8)
    a.set(title="A  Runs in which H fell below the threshold before grokking", ylabel="share of grokked runs")
    b.fill_between(h, result.lead_low, result.lead_high, color=LIGHT.entropy, alpha=0.25, linewidth=0)
    b.plot(h, result.lead, color=LIGHT.entropy, linewidth=1.8)
    b.axhline(0, color=LIGHT.ink, linewidth=1)
    b.set(title="B  Lead: mean, smallest and largest of the runs", ylabel="training steps")
    b.yaxis.set_major_formatter(thousands)
    label = f"no grokking within {result.horizon:,} steps"
    c.plot(h, result.false, color=LIGHT.signal, linewidth=1.8, label=label)
    c.plot(
        h,
        result.early,
        color=LIGHT.train,
        linestyle=(0, (5, 2)),
        linewidth=1.5,
        label="before it has memorised",
    )
    c.set(title="C  Alarms that are false or too early", ylabel="share", xlabel="threshold on H (no unit)")
    c.legend(loc="lower right", bbox_to_anchor=(1.0, 0.98), ncols=2, borderaxespad=0)
    for axes in (a, c):
        axes.set_ylim(-0.04, 1.04)
    useful = result.useful()
    for axes in (a, b, c):
        if useful is not None:
            axes.axvspan(*useful, color=LIGHT.norm, alpha=0.18, linewidth=0)
        for run in runs:
            if run.summary.h_star is not None:
                axes.axvline(run.summary.h_star, color=LIGHT.ink, linewidth=0.8, linestyle=(0, (1, 2)))
    return figure


def _marks(axes: Axes, runs: Sequence[MeasuredRun], name: str, crossing: Leads, fall: Leads) -> None:
    for run, crossed, fell in zip(runs, crossing.times, fall.times, strict=True):
        y = getattr(run.trajectory, name)
        for at, marker, colour in (
            (fell, FALL, LIGHT.signal),
            (crossed, CROSS, LIGHT.signal),
            (run.summary.t_grok, GROK, LIGHT.ink),
        ):
            here = run.trajectory.step == at
            axes.plot(run.trajectory.step[here], y[here], color=colour, **marker)
    axes.plot([], [], color=LIGHT.signal, label="T_collapse", **FALL)
    axes.plot([], [], color=LIGHT.signal, label="T_cross", **CROSS)
    axes.plot([], [], color=LIGHT.ink, label="T_grok", **GROK)


def headline(result: Baseline) -> str:
    """Say in a few sentences what the runs show."""
    grokked = sum(r.summary.t_grok is not None for r in result.runs)
    said = f"E1: {grokked} of {len(result.runs)} runs grok"
    if result.t_grok is None or result.h_star is None:
        return said + "; there is no lead to measure."

    def led(rule: Leads) -> str:
        if rule.preceding is None or rule.mean is None:
            return f"in none of {grokked} runs"
        before = round(rule.preceding.value * rule.preceding.n)
        return (
            f"before T_grok in {before} of {grokked} runs, with a mean lead of {steps(rule.mean.value)} steps"
        )

    return (
        f"{said}, at step {steps(result.t_grok.value)} on average, where H is "
        f'{decimal(result.h_star.value)}. The signal "{result.signal.source}" came {led(result.signal)}; '
        f"H fell below the H* of the other seeds {led(result.left_out)}."
    )


def section(result: Baseline) -> Section:
    """E1's part of the report."""
    runs, left_out = result.runs, result.left_out
    grokked = [r for r in runs if r.summary.t_grok is not None]
    every = sorted({r.evaluate_every for r in runs})
    h_star = result.pooled.thresholds[0]
    blocks: list[Block] = [
        Text(
            "The paper: in every run the spectral entropy H of the representation falls below a threshold "
            "H* before the test accuracy jumps. Here are the runs; then how far the entropy led, under each "
            "way of choosing the threshold; then what every other threshold would have given."
        ),
        Text(
            f"{len(runs)} complete runs, {len(grokked)} grokked, seeds "
            f"{', '.join(str(r.seed) for r in runs)}. H is evaluated every {' or '.join(map(steps, every))} "
            "steps, and no time below is finer than that.",
            "note",
        ),
        drawn(
            "e1-dynamics",
            functools.partial(training_dynamics, runs, left_out, result.fall, h_star),
            "In the manner of the paper's Figure 1. Thin lines: runs; thick lines: their mean. Circles: "
            "T_grok, the first evaluation with test accuracy at the criterion. Triangles: T_cross, H first "
            "below the H* of the other seeds. Diamonds: T_collapse, the first fall of H by more than 0.05 "
            "within five evaluations.",
            "Train and test accuracy, spectral entropy and parameter norm against the training step, one "
            "line a run.",
        ),
        drawn(
            "e1-seeds",
            functools.partial(per_seed, runs, left_out, result.signal),
            "The same runs one by one. Accuracy and H share the scale from 0 to 1. Shaded: from "
            f"{result.signal.source} to T_grok.",
            "One panel a seed with train accuracy, test accuracy and spectral entropy against the training "
            "step.",
        ),
        _times_table(result),
        _values_table(result),
        _rules_table(result),
    ]
    if grokked:
        blocks.append(
            drawn(
                "e1-leads",
                functools.partial(lead_dots, result.rules),
                "Lead by each rule. Dots: runs; diamonds: means; bars: 95 % intervals, where there are at "
                "least three runs. Right of 0 the signal came before grokking.",
                "Dots of the lead of each run for four ways to say when the entropy fell.",
            )
        )
        blocks += [
            Text(
                "The first row is circular: an entropy that only falls is first below its own value at "
                "T_grok one evaluation later, so its lead says how much the entropy wavers, not what it "
                "foretells. The second is the paper's; each run had a part in its own threshold. The third "
                "is what a monitor could have known. The fourth needs no threshold and no test labels; "
                "where evaluations are not 200 steps apart, a fifth has the paper's span of 800 steps."
            ),
            _sensitivity_table(result),
            Text(
                "T_grok is late in the jump: the test accuracy has been rising for a while when it reaches "
                "the criterion. The table dates grokking by lower accuracies too, with H* taken anew at "
                "each. A signal that leads the criterion of 99 % but not that of 50 % goes with the jump; "
                "it does not foretell it."
            ),
        ]
        near = max(500, round(0.6 * min(r.summary.t_grok or 0 for r in grokked)))
        blocks.append(
            drawn(
                "e1-around",
                functools.partial(around_grokking, runs, left_out, result.fall, reach=near),
                "Every run shifted to its own T_grok.",
                "Test accuracy and spectral entropy against the steps counted from grokking.",
            )
        )
    blocks += _sweep_blocks(result)
    return Section("e1", TITLE, tuple(blocks))


def _times_table(result: Baseline) -> Table:
    rows = []
    left_out, fall = result.left_out, result.fall
    for i, run in enumerate(result.runs):
        s = run.summary
        rows.append(
            (
                str(run.seed),
                steps(s.t_mem),
                steps(s.t_grok),
                steps(s.t_grok_sustained),
                decimal(left_out.thresholds[i]),
                steps(left_out.times[i]),
                steps(left_out.leads[i]),
                steps(fall.times[i]),
                steps(fall.leads[i]),
                percent(_accuracy_at(run, left_out.times[i])),
                percent(_accuracy_at(run, fall.times[i])),
                steps(s.last_step),
            )
        )
    columns = (
        *("seed", "T_mem", "T_grok", "T_grok sustained"),
        *("H* (other seeds)", "T_cross", "lead", "T_collapse", "lead"),
        *("test accuracy at T_cross", "test accuracy at T_collapse", "last step"),
    )
    caption = (
        "Times of each run, in training steps, and how far the test accuracy had risen when the entropy "
        "gave its signal."
    )
    return Table(caption, columns, tuple(rows), tuple(range(12)))


def _accuracy_at(run: MeasuredRun, step: int | None) -> float | None:
    return value_at(run.trajectory.step, run.trajectory.test_accuracy, step)


def _values_table(result: Baseline) -> Table:
    rows = []
    for run in result.runs:
        s = run.summary
        entropies = (s.entropy_start, s.entropy_at_mem, s.entropy_max, s.h_star, s.entropy_end)
        norms = (s.norm_start, s.norm_at_mem, s.norm_at_grok, s.norm_end)
        rows.append(
            (
                str(run.seed),
                *(decimal(h) for h in entropies),
                *(decimal(x, 1) for x in norms),
                decimal(s.test_accuracy_end, 4),
                str(s.unusable),
            )
        )
    columns = (
        *("seed", "H at start", "H at T_mem", "H max", "H at T_grok", "H at end"),
        *("norm at start", "norm at T_mem", "norm at T_grok", "norm at end"),
        *("test accuracy at end", "evaluations without H"),
    )
    caption = (
        "Entropy (normalised, no unit), Euclidean norm of all parameters, and test accuracy of each run."
    )
    return Table(caption, columns, tuple(rows), tuple(range(12)))


def _rules_table(result: Baseline) -> Table:
    rows = []
    for rule in result.rules:
        known = [h for h in rule.thresholds if h is not None]
        threshold = NONE if not known else decimal(min(known))
        if known and max(known) > min(known):
            threshold += f" to {decimal(max(known))}"
        missed = sum(
            t is None and r.summary.t_grok is not None for t, r in zip(rule.times, result.runs, strict=True)
        )
        reached = [_accuracy_at(r, t) for r, t in zip(result.runs, rule.times, strict=True)]
        there = [a for a in reached if a is not None]
        accuracy = f"{percent(min(there))} to {percent(max(there))}" if there else NONE
        cells = (counted(rule.preceding), worded(rule.mean), accuracy, str(missed))
        rows.append((rule.source, threshold, *cells))
    caption = (
        "How far the entropy led, by each rule. A run is preceded if its lead is positive; the mean lead "
        "includes negative ones."
    )
    columns = (
        *("signal: H below", "threshold", "preceded", "mean lead"),
        *("test accuracy at the signal", "grokked without signal"),
    )
    return Table(caption, columns, tuple(rows), (5,))


def _sensitivity_table(result: Baseline) -> Table:
    dated = [[run.dated_by(criterion) for run in result.runs] for criterion in CRITERIA]
    rows = [("H below H* of the other seeds", *(_outcome(leads.left_out_threshold(r), r) for r in dated))]
    for tau in TAUS:
        cells = [_outcome(leads.collapse(runs, tau=tau), runs) for runs in dated]
        rows.append((f"fall of H by more than {tau:g} within {WINDOW} evaluations", *cells))
    if (window := paper_window(result.runs)) is not None:
        signal = (
            f"fall of H by more than {TAU:g} within {window} evaluations ({PAPER_SPAN} steps, as the paper)"
        )
        rows.append((signal, *(_outcome(leads.collapse(runs, window=window), runs) for runs in dated)))
    columns = ("signal", *(f"grokked: test accuracy {percent(c)}" for c in CRITERIA))
    caption = (
        "Runs preceded and mean lead in steps, by what is called grokking, by tau and by window. A signal "
        "before T_mem belongs to the memorising, so it is no warning of grokking."
    )
    return Table(caption, columns, tuple(rows))


def _outcome(rule: Leads, runs: Sequence[MeasuredRun]) -> str:
    if rule.preceding is None or rule.mean is None:
        return NONE
    said = f"{round(rule.preceding.value * rule.preceding.n)} of {rule.preceding.n}; {steps(rule.mean.value)}"
    pairs = zip(rule.times, (run.summary.t_mem for run in runs), strict=True)
    early = sum(t is not None and (t_mem is None or t < t_mem) for t, t_mem in pairs)
    return said + (f" ({early} before T_mem)" if early else "")


def _sweep_blocks(result: Baseline) -> list[Block]:
    if result.sweep.thresholds.size == 0:
        return [Text("No run has a usable entropy, so there is nothing to sweep.", "note")]
    useful = result.sweep.useful()
    horizon = steps(result.sweep.horizon)
    if useful is None:
        found = (
            "No single threshold precedes every grokking without a false alarm (no grokking within "
            f"{horizon} steps) or an early one (before T_mem)."
        )
    else:
        middle = int(np.argmin(abs(result.sweep.thresholds - sum(useful) / 2)))
        found = (
            f"Every threshold from {decimal(useful[0])} to {decimal(useful[1])} (shaded) precedes every "
            f"grokking, with no false alarm (no grokking within {horizon} steps) and no early one (before "
            f"T_mem); in the middle of it the mean lead is {steps(float(result.sweep.lead[middle]))} steps. "
            "This is hindsight: the range was read off these same runs."
        )
    return [
        drawn(
            "e1-sweep",
            functools.partial(threshold_sweep, result.sweep, result.runs),
            "What each threshold would have given. Dotted lines: H of each run at its T_grok. To the left "
            "alarms come late; far to the right every run is below the threshold from the start, and "
            '"precedes" means nothing.',
            "Share of runs preceded, lead, and share of false and early alarms against the threshold on H.",
        ),
        Text(found),
    ]


def main() -> None:
    """Draw the README's picture: one panel for each complete E1 run of a folder of runs."""
    parser = argparse.ArgumentParser(
        prog="python -m fastent.grokking.experiments.e1_lead", description=main.__doc__
    )
    parser.add_argument("runs", type=Path, help="folder of runs, the --out of `fastent run e1`")
    parser.add_argument("picture", type=Path, help="PNG file to write")
    given = parser.parse_args()
    runs = [run.measure() for run in read_runs(given.runs) if run.experiment == "e1" and run.done is not None]
    if not runs:
        parser.error(f"{given.runs} holds no complete run of E1")
    result = analyse(runs, comparable=False)
    save_png(functools.partial(per_seed, result.runs, result.left_out, result.signal), given.picture)


if __name__ == "__main__":
    main()
