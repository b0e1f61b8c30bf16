"""E4's part of the report: its figures, its tables and what they say."""

from __future__ import annotations

import functools

from fastent.experiments import e4_figures
from fastent.experiments.claims import NONE, decimal, percent, steps, worded
from fastent.experiments.delay_blocks import drawn, span
from fastent.experiments.document import Block, Section, Table, Text
from fastent.experiments.e4_predictors import TITLE, Predictors
from fastent.experiments.norm_entropy import Checkpoint
from fastent.experiments.remaining import CLOCK, ENTROPY_GAP
from fastent.experiments.statistics import Estimate


def headline(result: Predictors) -> str:
    """Say in a few sentences what the runs show."""
    rows = {row.name: row for row in result.table}
    said = (
        f"E4: norm and H correlate with r = {decimal(result.correlations.overall.value)} over all "
        f"evaluations of {len(result.runs)} runs."
    )
    if rows:
        ours, clock = rows[ENTROPY_GAP], rows[CLOCK]
        said += (
            f" The gap of H explains R² = {decimal(ours.in_sample.value)} of the steps that remain, and "
            f"{decimal(ours.left_out)} on runs left out; the clock alone {decimal(clock.left_out)}."
        )
    return said


def section(result: Predictors) -> Section:
    """E4's part of the report."""
    r = result.correlations
    blocks: list[Block] = [
        Text(
            "The paper finds norm and H weakly anti-correlated and concludes that they carry independent "
            "information. A correlation over all evaluations mostly says how both move on the common "
            "course of training, so here it is also within runs, on the plateau between T_mem and T_grok, "
            "and between changes from one evaluation to the next."
        ),
        Table(
            "Correlation of parameter norm and H. Overall: jackknife over runs, Fisher's z; else the mean "
            "over runs with a BCa interval.",
            ("over", "r", "runs"),
            tuple(
                (name, span(value, decimal), NONE if value is None else str(value.n))
                for name, value in (
                    ("all evaluations of all runs", r.overall),
                    ("the same, of ranks (Spearman)", r.ranks),
                    ("each run's evaluations", r.within),
                    ("those between T_mem and T_grok", r.plateau),
                    ("changes between evaluations", r.changes),
                    ("those between T_mem and T_grok", r.changes_plateau),
                )
            ),
            (1, 2),
        ),
        *_without_interval({"all evaluations of all runs": r.overall, "the same, of ranks": r.ranks}),
        drawn(
            "e4-norm-entropy",
            functools.partial(e4_figures.norm_against_entropy, result.runs),
            "In the manner of the paper's Figure 4(a): every evaluation of every run.",
            "Entropy against the parameter norm, coloured by test accuracy.",
        ),
        *_pair_blocks(result),
        *_predictor_blocks(result),
    ]
    return Section("e4", TITLE, tuple(blocks))


def _without_interval(estimates: dict[str, Estimate]) -> list[Block]:
    """Say which of a table's jackknife estimates have no interval, and why; nothing where all have one."""
    reasons = [f"{name}: {e.method}" for name, e in estimates.items() if e.low is None]
    return [Text("; ".join(reasons) + ".", "note")] if reasons else []


def _pair_blocks(result: Predictors) -> list[Block]:
    pairs = result.pairs
    if not pairs.count:
        return [Text("No two evaluations have nearly identical norms.", "note")]
    rows = tuple(
        (
            _at(a),
            _at(b),
            decimal(a.norm, 2),
            decimal(b.norm, 2),
            decimal(a.entropy),
            decimal(b.entropy),
            *_accuracies(a, b),
        )
        for a, b in pairs.widest
    )
    return [
        Table(
            "Checkpoints with nearly identical norms (within 1 %) that are furthest apart in H, one pair "
            "for each pair of seeds.",
            ("first", "second", "norm", "norm", "H", "H", "test accuracy", "test accuracy"),
            rows,
            tuple(range(2, 8)),
        ),
        Text(
            f"So the norm alone does not tell how far a run has come: of {pairs.count:,} pairs alike in "
            f"norm, {percent(pairs.far_accuracy)} are more than one half apart in test accuracy. The same "
            f"test put to H: of the pairs within 0.005 in H, {percent(pairs.same_entropy)} are."
        ),
    ]


def _at(point: Checkpoint) -> str:
    return f"seed {point.seed}, step {steps(point.step)}"


def _accuracies(a: Checkpoint, b: Checkpoint) -> tuple[str, str]:
    return percent(a.test_accuracy), percent(b.test_accuracy)


def _predictor_blocks(result: Predictors) -> list[Block]:
    if not result.table:
        return [Text("Fewer than three runs grokked: no predictor can be fitted with runs left out.", "note")]
    rows = tuple(
        (
            row.name,
            span(row.in_sample, decimal),
            decimal(row.left_out),
            NONE if row.gamma is None else decimal(row.gamma, 2),
        )
        for row in result.table
    )
    clock = next(row for row in result.table if row.name == CLOCK)
    return [
        Table(
            f"The paper's Table 2: R² of the steps that remain, at the same {result.points:,} evaluations "
            "before grokking with H above H*, by a power law a x^γ + b of each predictor. The mean as a "
            "forecast has R² 0.",
            ("predictor", "R², in sample", "R², runs left out", "γ"),
            rows,
            (1, 2, 3),
        ),
        *_without_interval({row.name: row.in_sample for row in result.table}),
        drawn(
            "e4-predictors",
            functools.partial(e4_figures.explained, result.table),
            "R² of each predictor with 95 % jackknife intervals over runs.",
            "R squared of five predictors, in sample and on runs left out.",
        ),
        Text(
            f"The clock is what every predictor has to beat: {worded(clock.in_sample, '')} in sample. R² of "
            "the remaining steps rewards whatever falls with time, and time itself most of all."
        ),
    ]
