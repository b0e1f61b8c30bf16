"""E1, the question whether the collapse of the entropy precedes grokking.

Runs of modular addition, `fastent.grokking.experiments.jobs.e1` (paper, sections 3.3 and 5, Figure 1). The paper says
that H falls below a threshold H* in every run before the model generalises, 1,020 steps ahead on average. What "the
threshold" is decides the answer, so the leads are measured with four: see `fastent.grokking.experiments.leads`. They
also depend on what is called grokking and on tau, so both are varied; and one threshold for all runs is swept.

The paper does not say where LayerNorm stands, which position is read, how embeddings start, whether the input ends in
"=", or which nonlinearity it has. `fastent.grokking.train.config.CHOICES` names one other answer to each. Under each of
them every claim of E1 is judged again, the paper's numbers included, as each could be its setting.

``python -m fastent.grokking.experiments.e1_lead RUNS PICTURE`` draws the README's picture from the E1 runs in a folder.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fastent.grokking.experiments import leads
from fastent.grokking.experiments.claims import (
    CLAIMS,
    NONE,
    Experiment,
    Finding,
    Findings,
    by_run,
    counted,
    decimal,
    judge_share,
    judge_within,
    of,
    percent,
    steps,
    worded,
)
from fastent.grokking.experiments.data import Runs, read_runs
from fastent.grokking.experiments.document import Block, Section, Table, Text, Verdict
from fastent.grokking.experiments.figures import (
    CROSS,
    DASHED,
    DOTTED,
    FALL,
    GROK,
    LIGHT,
    WIDTH,
    drawn,
    legend_above,
    lines,
    mark,
    save_png,
    thousands,
)
from fastent.grokking.experiments.jobs import OTHER_CHOICES
from fastent.grokking.experiments.leads import Leads, Sweep
from fastent.grokking.experiments.statistics import (
    UNKNOWN,
    Array,
    Estimate,
    over,
    restricted_mean,
    share,
    spread,
    where_known,
)
from fastent.grokking.train.milestones import TAU

TITLE = "E1: does the entropy collapse precede grokking?"

PAPER_H_STAR = 0.605

TAUS = (0.02, 0.05, 0.10)
CRITERIA = (0.5, 0.9, 0.99)


@dataclass(frozen=True, eq=False)
class Baseline:
    """Analysis of the complete runs of E1.

    `own`, `pooled`, `left_out`, `fall` (our T_collapse) and `paper_fall` (the paper's) are the leads by the rules of
    `fastent.grokking.experiments.leads`. `t_grok` is a restricted mean if some runs did not grok.
    """

    runs: Runs
    h_star: Estimate
    t_mem: Estimate
    t_grok: Estimate
    own: Leads
    pooled: Leads
    left_out: Leads
    fall: Leads
    paper_fall: Leads
    sweep: Sweep

    @property
    def rules(self) -> tuple[Leads, ...]:
        """Leads by each rule, the circular one first."""
        return (self.own, self.pooled, self.left_out, self.fall, self.paper_fall)


def analyse(runs: Runs) -> Baseline | None:
    """Leads by each rule, H* over the seeds and the sweep, from the runs of E1; None without any."""
    return analyse_group(runs.select("e1"))


def analyse_group(runs: Runs) -> Baseline | None:
    """Analyse runs of one condition, of whatever experiment; None without any."""
    if not len(runs):
        return None
    return Baseline(
        runs=runs,
        h_star=over(runs.h_star, least=0, most=1),
        t_mem=over(runs.t_mem, least=0),
        t_grok=mean_time(runs),
        own=leads.own_threshold(runs),
        pooled=leads.in_sample_threshold(runs),
        left_out=leads.left_out_threshold(runs),
        fall=leads.collapse(runs),
        paper_fall=leads.paper_collapse(runs),
        sweep=leads.sweep(runs, leads.observed_thresholds(runs)),
    )


def mean_time(runs: Runs) -> Estimate:
    """Mean T_grok; if some runs did not grok, the restricted mean to the earliest end of those."""
    if runs.grokked.all():
        return over(runs.t_grok, least=0)
    return restricted_mean(runs.times, runs.times.cut) if runs.grokked.any() else UNKNOWN


def claims(result: Baseline) -> Findings:
    """Each claim of the paper that E1's runs speak to, beside what they say."""
    runs = result.runs
    start, at_mem, highest = at_moments(runs)
    norm_start, norm_at_mem = runs.at(runs.norm, runs.start), runs.at(runs.norm, runs.t_mem)
    half = runs.dated_by(0.5)
    varies, stable = spread(runs.h_star), CLAIMS["e1.h_star_stable"].margin
    delay = share(runs.t_grok >= 2 * runs.t_mem)
    calm = share(where_known(np.abs(at_mem - start), lambda change: change < TAU))
    monotone = share(where_known(highest - start, lambda rise: rise < 0.01))
    growth = share(where_known(norm_at_mem - norm_start, lambda grown: grown > 0))
    change, rise = over(at_mem - start), over(highest - start, least=0)
    norm = over(norm_at_mem / norm_start, least=0)
    comparable = runs.comparable
    return {
        "e1.memorises_early": Finding(
            f"{counted(delay)}; memorised at {worded(result.t_mem)}", judge_share(delay)
        ),
        "e1.t_grok": CLAIMS["e1.t_grok"].finding(result.t_grok, comparable=comparable),
        "e1.h_star": CLAIMS["e1.h_star"].finding(result.h_star, comparable=comparable, unit=""),
        "e1.h_star_stable": Finding(f"standard deviation {worded(varies, '')}", judge_within(varies, stable)),
        "e1.precedes": _led(result.pooled),
        "e1.precedes_left_out": _led(result.left_out),
        "e1.collapse": _led(result.paper_fall),
        "e1.collapse_ours": _led(result.fall),
        "e1.collapse_at_half": _led(leads.paper_collapse(half)),
        "e1.collapse_ours_at_half": _led(leads.collapse(half)),
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


def at_moments(runs: Runs) -> tuple[Array, Array, Array]:
    """H at the start, at T_mem and at its largest, (n,) each."""
    highest = np.array([np.nanmax(h) if np.isfinite(h).any() else np.nan for h in runs.entropy])
    return runs.at(runs.entropy, runs.start), runs.at(runs.entropy, runs.t_mem), highest


def _led(rule: Leads) -> Finding:
    said = f"{counted(rule.preceding)}; lead {worded(rule.mean)}"
    if rule.lasting.known:
        said += f"; H does not recover in {of(rule.lasting)}"
    return Finding(said, judge_share(rule.preceding), {"source": rule.source})


def training_dynamics(runs: Runs, crossing: Leads, fall: Leads, h_star: float) -> Figure:
    """Accuracies, entropy and parameter norm against the step: the paper's Figure 1.

    `crossing` and `fall` give T_cross, whose thresholds are drawn as a band, and T_collapse; `h_star` is the
    mean over the seeds, NaN draws no line.
    """
    figure = Figure(figsize=(WIDTH, 8.4), layout="constrained")
    a, b, c = figure.subplots(3, 1, sharex=True, height_ratios=(1.1, 1.35, 0.85))
    lines(a, runs, "train_accuracy", "train", color=LIGHT.train, linestyle=DASHED)
    lines(a, runs, "test_accuracy", "test", color=LIGHT.test, linestyle="solid")
    a.set(title="A  Accuracy", ylabel="accuracy (share)", ylim=(-0.03, 1.05))

    lines(b, runs, "entropy", "H", color=LIGHT.entropy, linestyle="solid")
    known = crossing.thresholds[~np.isnan(crossing.thresholds)]
    if known.size:
        label = f"H* of {crossing.rule}"
        b.axhspan(known.min(), known.max(), color=LIGHT.signal, alpha=0.22, linewidth=0, label=label)
    if not np.isnan(h_star):
        b.axhline(h_star, color=LIGHT.signal, linewidth=1.2, linestyle=(0, (2, 2)), label="H*, mean")
    b.set(title="B  Spectral entropy", ylabel="H (normalised, no unit)")

    lines(c, runs, "norm", "norm", color=LIGHT.norm, linestyle="solid")
    c.set(title="C  Parameter norm", ylabel="Euclidean norm (no unit)", xlabel="training step")
    c.set_ylim(bottom=0)
    for axes, name in {a: "test_accuracy", b: "entropy", c: "norm"}.items():
        _marks(axes, runs, name, crossing, fall)
    for axes in (a, b):
        legend_above(axes)
    c.set_xlim(0, runs.end.max())
    c.xaxis.set_major_formatter(thousands)
    return figure


def around_grokking(runs: Runs, crossing: Leads, fall: Leads, *, reach: int) -> Figure:
    """Test accuracy and entropy against the step counted from each run's own T_grok, `reach` either way."""
    figure = Figure(figsize=(WIDTH, 5.4), layout="constrained")
    a, b = figure.subplots(2, 1, sharex=True)
    for axes, name, colour in ((a, "test_accuracy", LIGHT.test), (b, "entropy", LIGHT.entropy)):
        for i, (step, y) in enumerate(runs.lines(getattr(runs, name))):
            if not runs.grokked[i]:
                continue
            x = step - runs.t_grok[i]
            near = np.abs(x) <= reach
            axes.plot(x[near], y[near], color=colour, linewidth=1.2, alpha=0.8)
            for rule, marker in ((crossing, CROSS), (fall, FALL)):
                if abs(rule.leads[i]) <= reach:
                    here = step == rule.times[i]
                    axes.plot(x[here], y[here], color=LIGHT.signal, **marker)
        axes.axvline(0, color=LIGHT.ink, linewidth=1)
    b.plot([], [], color=LIGHT.signal, label="T_collapse", **FALL)
    b.plot([], [], color=LIGHT.signal, label=f"T_cross, H* of {crossing.rule}", **CROSS)
    legend_above(b)
    a.set(title="A  Test accuracy", ylabel="accuracy (share)", ylim=(-0.03, 1.05))
    b.set(title="B  Spectral entropy", ylabel="H (normalised, no unit)", xlabel="training steps after T_grok")
    b.xaxis.set_major_formatter(thousands)
    return figure


def per_seed(runs: Runs, crossing: Leads, fall: Leads) -> Figure:
    """One panel a run: accuracies and entropy on one scale; the span from the fall of H to T_grok is shaded."""
    columns = min(len(runs), 3)
    rows = -(-len(runs) // columns)
    figure = Figure(figsize=(WIDTH, 0.8 + 2.8 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    columns_of = runs.lines(runs.train_accuracy, runs.test_accuracy, runs.entropy)
    for i, (axes, (step, train, test, entropy)) in enumerate(zip(grid, columns_of, strict=False)):
        threshold, fell, t_grok, ahead = (
            x[i] for x in (crossing.thresholds, fall.times, runs.t_grok, fall.leads)
        )
        axes.plot(step, train, color=LIGHT.train, linestyle=DASHED, linewidth=1.3)
        axes.plot(step, test, color=LIGHT.test, linewidth=1.8)
        axes.plot(step, entropy, color=LIGHT.entropy, linewidth=1.8)
        if not np.isnan(threshold):
            axes.axhline(threshold, color=LIGHT.signal, linestyle=(0, (2, 2)), linewidth=1.2)
        title = f"seed {runs.seeds[i]}"
        if not np.isnan(ahead):
            axes.axvspan(min(fell, t_grok), max(fell, t_grok), color=LIGHT.signal, alpha=0.18, linewidth=0)
            title += f", lead {thousands(ahead, 0)} steps"
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
    grid[0].set_xlim(0, runs.end.max())
    handles = [
        grid[0].plot([], [], color=LIGHT.train, linestyle=DASHED, label="train accuracy")[0],
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
        known = rule.leads[~np.isnan(rule.leads)]
        axes.plot(known, [row] * len(known), "o", color=LIGHT.signal, alpha=0.65, markeredgewidth=0)
        if rule.mean.known:
            axes.plot(rule.mean.value, row, "D", color=LIGHT.ink, markersize=6, zorder=3)
            if rule.mean.bounded:
                axes.plot([rule.mean.low, rule.mean.high], [row, row], color=LIGHT.ink, linewidth=1.5)
    axes.axvline(0, color=LIGHT.ink, linewidth=1)
    axes.set_yticks(range(len(rules)), [rule.source for rule in rules])
    axes.set_ylim(len(rules) - 0.5, -0.5)
    axes.set_xlabel("lead: T_grok minus the step of the signal (training steps)")
    axes.xaxis.set_major_formatter(thousands)
    return figure


def threshold_sweep(result: Sweep, runs: Runs) -> Figure:
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
        h, result.early, color=LIGHT.train, linestyle=DASHED, linewidth=1.5, label="before it has memorised"
    )
    c.set(title="C  Alarms that are false or too early", ylabel="share", xlabel="threshold on H (no unit)")
    legend_above(c)
    for axes in (a, c):
        axes.set_ylim(-0.04, 1.04)
    useful = result.useful()
    for axes in (a, b, c):
        if useful is not None:
            axes.axvspan(*useful, color=LIGHT.norm, alpha=0.18, linewidth=0)
        for h_star in runs.h_star:
            if not np.isnan(h_star):
                axes.axvline(h_star, color=LIGHT.ink, linewidth=0.8, linestyle=DOTTED)
    return figure


def _marks(axes: Axes, runs: Runs, name: str, crossing: Leads, fall: Leads) -> None:
    for i, (step, y) in enumerate(runs.lines(getattr(runs, name))):
        mark(axes, step, y, fall.times[i], FALL)
        mark(axes, step, y, crossing.times[i], CROSS)
        mark(axes, step, y, runs.t_grok[i], GROK, LIGHT.ink)
    axes.plot([], [], color=LIGHT.signal, label="T_collapse", **FALL)
    axes.plot([], [], color=LIGHT.signal, label="T_cross", **CROSS)
    axes.plot([], [], color=LIGHT.ink, label="T_grok", **GROK)


def headline(result: Baseline) -> str:
    """Say in a few sentences what the runs show."""
    grokked = int(result.runs.grokked.sum())
    said = f"E1: {grokked} of {len(result.runs)} runs grok"
    if not (result.t_grok.known and result.h_star.known):
        return said + "; there is no lead to measure."

    def led(rule: Leads) -> str:
        if not rule.mean.known:
            return f"in none of {rule.preceding.n} runs"
        return (
            f"before T_grok in {of(rule.preceding)} runs, with a mean lead of {steps(rule.mean.value)} steps"
        )

    return (
        f"{said}, at step {steps(result.t_grok.value)} on average, where H is "
        f'{decimal(result.h_star.value)}. The signal "{result.paper_fall.source}" came {led(result.paper_fall)}; '
        f"H fell below the H* of the other seeds {led(result.left_out)}."
    )


def section(result: Baseline) -> Section:
    """E1's part of the report."""
    runs, left_out = result.runs, result.left_out
    grokked = int(runs.grokked.sum())
    every = sorted(set(runs.setting("evaluate_every")))
    h_star = result.pooled.thresholds[0]
    blocks: list[Block] = [
        Text(
            "The paper: in every run the spectral entropy H of the representation falls below a threshold "
            "H* before the test accuracy jumps. Here are the runs; then how far the entropy led, under each "
            "way of choosing the threshold; then what every other threshold would have given."
        ),
        Text(
            f"{len(runs)} complete runs, {grokked} grokked, seeds {', '.join(map(str, runs.seeds))}. H is evaluated "
            f"every {' or '.join(map(steps, every))} steps, and no time below is finer than that.",
            "note",
        ),
        drawn(
            "e1-dynamics",
            functools.partial(training_dynamics, runs, left_out, result.fall, h_star),
            "In the manner of the paper's Figure 1. Thin lines: runs; thick lines: their mean, in which a run "
            "that has ended counts with its last values. Circles: T_grok, the "
            "first evaluation with test accuracy at the criterion. Triangles: T_cross, H first below the H* of the "
            f"other seeds. Diamonds: T_collapse, the first {result.fall.source.removeprefix('a ')}.",
            "Train and test accuracy, spectral entropy and parameter norm against the training step, one line a run.",
        ),
        drawn(
            "e1-seeds",
            functools.partial(per_seed, runs, left_out, result.fall),
            "The same runs one by one. Accuracy and H share the scale from 0 to 1. Shaded: from "
            f"{result.fall.source} to T_grok.",
            "One panel a seed with train accuracy, test accuracy and spectral entropy against the training step.",
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
                "Dots of the lead of each run for five ways to say when the entropy fell.",
            )
        )
        blocks += [
            Text(
                "The first row is circular: an entropy that only falls is first below its own value at "
                "T_grok one evaluation later, so its lead says how much the entropy wavers, not what it "
                "foretells. The second is the paper's; each run had a part in its own threshold. The third "
                "is what a monitor could have known. The last two need no threshold and no test labels: a fall "
                "below the largest H of the last 800 steps, and the paper's, below H 1,000 steps before. Both count "
                "from T_mem on, as memorising alone can lower H by more."
            ),
            _sensitivity_table(result),
            Text(
                "T_grok is late in the jump: the test accuracy has been rising for a while when it reaches the "
                "criterion. The table dates grokking by lower accuracies too, with H* taken anew at each. A signal "
                "that leads the criterion of 99 % but not that of 50 % goes with the jump; it does not foretell it."
            ),
        ]
        near = max(500, round(0.6 * np.nanmin(runs.t_grok)))
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
    runs, left_out, fall = result.runs, result.left_out, result.fall
    rows = by_run(
        runs,
        (steps, runs.t_mem, runs.t_grok, runs.t_grok_sustained),
        (decimal, left_out.thresholds),
        (steps, left_out.times, left_out.leads, fall.times, fall.leads),
        (percent, *(runs.at(runs.test_accuracy, rule.times) for rule in (left_out, fall))),
        (steps, runs.end),
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


def _values_table(result: Baseline) -> Table:
    runs = result.runs
    start, at_mem, highest = at_moments(runs)
    rows = by_run(
        runs,
        (decimal, start, at_mem, highest, runs.h_star, runs.at(runs.entropy, runs.end)),
        (
            functools.partial(decimal, digits=1),
            *(runs.at(runs.norm, step) for step in (runs.start, runs.t_mem, runs.t_grok, runs.end)),
        ),
        (functools.partial(decimal, digits=4), runs.at(runs.test_accuracy, runs.end)),
        (str, (~np.isnan(runs.step) & np.isnan(runs.entropy)).sum(axis=1)),
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
    runs, rows = result.runs, []
    for rule in result.rules:
        known = rule.thresholds[~np.isnan(rule.thresholds)]
        threshold = decimal(known.min()) if known.size else NONE
        if known.size and known.max() > known.min():
            threshold += f" to {decimal(known.max())}"
        missed = int((np.isnan(rule.times) & runs.grokked).sum())
        reached = runs.at(runs.test_accuracy, rule.times)
        there = reached[~np.isnan(reached)]
        accuracy = f"{percent(there.min())} to {percent(there.max())}" if there.size else NONE
        cells = (counted(rule.preceding), worded(rule.mean), accuracy, str(missed))
        rows.append((rule.source, threshold, *cells, of(rule.lasting) if rule.lasting.known else NONE))
    caption = (
        "How far the entropy led, by each rule. A run is preceded if its lead is positive; the mean lead "
        "includes negative ones."
    )
    columns = (
        *("signal: H below", "threshold", "preceded", "mean lead"),
        *("test accuracy at the signal", "grokked without signal", "H does not recover"),
    )
    return Table(caption, columns, tuple(rows), (5, 6))


def _sensitivity_table(result: Baseline) -> Table:
    dated = [result.runs.dated_by(criterion) for criterion in CRITERIA]
    rows = [("H below H* of the other seeds", *(_outcome(leads.left_out_threshold(r), r) for r in dated))]
    for rule in (leads.collapse, leads.paper_collapse):
        for tau in TAUS:
            found = [rule(runs, tau=tau) for runs in dated]
            rows.append((found[0].source, *map(_outcome, found, dated)))
    columns = ("signal", *(f"grokked: test accuracy {percent(c)}" for c in CRITERIA))
    caption = (
        "Runs preceded and mean lead in steps, by what is called grokking, by tau and by window. A crossing "
        "before T_mem belongs to the memorising, so it is no warning of grokking; a fall counts from T_mem on."
    )
    return Table(caption, columns, tuple(rows))


def _outcome(rule: Leads, runs: Runs) -> str:
    if not rule.mean.known:
        return NONE
    early = int((~np.isnan(rule.times) & ~(rule.times >= runs.t_mem)).sum())
    return led(rule) + (f" ({early} before T_mem)" if early else "")


def led(rule: Leads) -> str:
    """Write how many runs are preceded and the mean lead: "9 of 10; 1,020"."""
    return f"{of(rule.preceding)}; {steps(rule.mean.value)}" if rule.mean.known else NONE


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


EXPERIMENT = Experiment(
    "e1", "Does the entropy collapse precede grokking?", ("e1",), analyse, headline, claims, section
)


CHOICES_TITLE = "Choices: which claims depend on what the paper leaves open?"


@dataclass(frozen=True)
class Setting:
    """E1's analysis of the complete runs of one setting, the preset's own first."""

    label: str
    result: Baseline

    @functools.cached_property
    def findings(self) -> Findings:
        """What its runs say of E1's claims."""
        return claims(self.result)


def analyse_choices(runs: Runs) -> tuple[Setting, ...] | None:
    """Analyse each setting; None without a complete run of another choice or of the preset's own."""
    groups = {"as the preset": runs.select("e1")}
    groups |= {choice.label: runs.select("choices", choice.condition) for choice in OTHER_CHOICES}
    settings = tuple(
        Setting(label, result)
        for label, group in groups.items()
        if (result := analyse_group(replace(group, judged=True))) is not None
    )
    return settings if len(settings) > 1 and len(groups["as the preset"]) else None


def agreed(settings: Sequence[Setting]) -> dict[str, bool]:
    """Whether each claim has one verdict under all settings that decide it, for those that at least two decide."""
    verdicts = {
        key: [v for s in settings if key in s.findings and (v := s.findings[key].verdict).kind != "none"]
        for key in settings[0].findings
    }
    return {key: len(set(found)) == 1 for key, found in verdicts.items() if len(found) > 1}


def choices_headline(settings: Sequence[Setting]) -> str:
    """Say in a few sentences what the runs show."""
    same = agreed(settings)
    known = [s.result.h_star.value for s in settings if s.result.h_star.known]
    said = (
        f"Choices: of {len(same)} claims of E1 that two or more of {len(settings)} settings decide, all of which the "
        f"paper's text allows, {sum(same.values())} have one and the same verdict."
    )
    if known:
        said += f" The mean H* of a setting lies between {decimal(min(known))} and {decimal(max(known))}."
    return said


def choices_section(settings: Sequence[Setting]) -> Section:
    """Write the part of the report."""
    blocks: list[Block] = [
        Text(
            "The paper's text leaves choices open that a reader must make to run its model. Each setting below makes "
            "one of them differently from the preset and is otherwise the same. A verdict that changes along a row "
            "says more of that choice than of grokking."
        ),
        _choices_table(settings),
        _verdicts_table(settings),
    ]
    return Section("choices", CHOICES_TITLE, tuple(blocks))


def _choices_table(settings: Sequence[Setting]) -> Table:
    rows = []
    for setting in settings:
        runs = setting.result.runs
        start, _, highest = at_moments(runs)
        norms = runs.at(runs.norm, runs.t_mem) / runs.at(runs.norm, runs.start)
        rows.append(
            (
                setting.label,
                f"{runs.grokked.sum()} of {len(runs)}",
                _mean_and_span(runs.t_mem, 0),
                _mean_and_span(runs.t_grok, 0),
                _mean_and_span(runs.h_star),
                _mean_and_span(highest - start),
                _mean_and_span(norms, 2),
                led(setting.result.left_out),
                led(setting.result.fall),
            )
        )
    columns = (
        *("setting", "grokked", "T_mem", "T_grok", "H*", "H max − start", "norm at T_mem / start"),
        *("lead, H below H* of other seeds", "lead, our T_collapse"),
    )
    caption = (
        f"Mean (smallest to largest) over the runs of each setting; the paper's H* is {PAPER_H_STAR}. Leads: runs "
        "preceded; mean lead in steps."
    )
    return Table(caption, columns, tuple(rows), tuple(range(1, 9)))


def _verdicts_table(settings: Sequence[Setting]) -> Table:
    same = agreed(settings)
    rows: list[tuple[str | Verdict, ...]] = []
    for key, found in settings[0].findings.items():
        claim = CLAIMS[key]
        verdicts: list[Verdict] = [
            s.findings[key].verdict if key in s.findings else Verdict.NOT_RUN for s in settings
        ]
        depends = "–" if key not in same else "no" if same[key] else "yes"
        rows.append((claim.where, claim.says.format(**found.words), *verdicts, depends))
    columns = ("Paper", "It says", *(setting.label for setting in settings), "depends on the choice")
    return Table("E1's claims under each setting, judged as in the summary.", columns, tuple(rows))


def _mean_and_span(values: Array, digits: int = 3) -> str:
    known = values[~np.isnan(values)]
    if not known.size:
        return NONE
    mean, low, high = (
        steps(value) if digits == 0 else decimal(value, digits)
        for value in (sum(known) / len(known), known.min(), known.max())
    )
    return mean if known.min() == known.max() else f"{mean} ({low} to {high})"


CHOICES_EXPERIMENT = Experiment(
    "choices",
    "Which claims depend on what the paper leaves open?",
    ("e1", "choices"),
    analyse_choices,
    choices_headline,
    lambda _: {},
    choices_section,
    of_verdicts=True,
)


def main() -> None:
    """Draw the README's picture: one panel for each complete E1 run of a folder of runs."""
    parser = argparse.ArgumentParser(
        prog="python -m fastent.grokking.experiments.e1_lead", description=main.__doc__
    )
    parser.add_argument("runs", type=Path, help="folder of runs, the --out of `fastent run e1`")
    parser.add_argument("picture", type=Path, help="PNG file to write")
    given = parser.parse_args()
    result = analyse(Runs(tuple(run for run in read_runs(given.runs) if run.done is not None)))
    if result is None:
        parser.error(f"{given.runs} holds no complete run of E1")
    save_png(functools.partial(per_seed, result.runs, result.left_out, result.fall), given.picture)


if __name__ == "__main__":
    main()
