"""E1's part of the report: its figures, its tables and what they say."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.figure import Figure as Plot

from fastent.experiments import figures, leads
from fastent.experiments.claims import NONE, counted, decimal, percent, steps, worded
from fastent.experiments.document import Block, Figure, Section, Table, Text
from fastent.experiments.e1_baseline import CRITERIA, PAPER_SPAN, TAUS, TITLE, Baseline, paper_window
from fastent.experiments.leads import Leads
from fastent.train.quantities import TAU, WINDOW, MeasuredRun, value_at


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
        _figure(
            "e1-dynamics",
            functools.partial(figures.training_dynamics, runs, left_out, result.fall, h_star),
            "In the manner of the paper's Figure 1. Thin lines: runs; thick lines: their mean. Circles: "
            "T_grok, the first evaluation with test accuracy at the criterion. Triangles: T_cross, H first "
            "below the H* of the other seeds. Diamonds: T_collapse, the first fall of H by more than 0.05 "
            "within five evaluations.",
            "Train and test accuracy, spectral entropy and parameter norm against the training step, one "
            "line a run.",
        ),
        _figure(
            "e1-seeds",
            functools.partial(figures.per_seed, runs, left_out, result.signal),
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
            _figure(
                "e1-leads",
                functools.partial(figures.lead_dots, result.rules),
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
            _figure(
                "e1-around",
                functools.partial(figures.around_grokking, runs, left_out, result.fall, reach=near),
                "Every run shifted to its own T_grok.",
                "Test accuracy and spectral entropy against the steps counted from grokking.",
            )
        )
    blocks += _sweep_blocks(result)
    return Section("e1", TITLE, tuple(blocks))


def _figure(name: str, draw: Callable[[], Plot], caption: str, alt: str) -> Figure:
    light, dark = figures.both(draw)
    return Figure(name, caption, alt, light, dark)


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
        _figure(
            "e1-sweep",
            functools.partial(figures.threshold_sweep, result.sweep, result.runs),
            "What each threshold would have given. Dotted lines: H of each run at its T_grok. To the left "
            "alarms come late; far to the right every run is below the threshold from the start, and "
            '"precedes" means nothing.',
            "Share of runs preceded, lead, and share of false and early alarms against the threshold on H.",
        ),
        Text(found),
    ]
