"""E2's part of the report: its figures, its tables and what they say."""

from __future__ import annotations

import functools

from fastent.experiments import delay_figures
from fastent.experiments.claims import counted, decimal, steps, worded
from fastent.experiments.delay_blocks import delays_table, drawn, notes, span
from fastent.experiments.delays import words
from fastent.experiments.document import Block, Section, Table, Text
from fastent.experiments.e2_mixing import LOGITS, LOSSES, TITLE, Mixed, Mixing


def headline(result: Mixing) -> str:
    """Say in a few sentences what the runs show."""
    mixed = result.conditions.get(LOSSES)
    if mixed is None:
        return f"E2: {len(result.conditions)} conditions of mixing have complete runs, but not the paper's."
    delay, higher = mixed.delay, mixed.equal_step
    said = (
        f"E2: mixing with the losses averaged moves T_grok by {worded(delay.delay)}; "
        f"{round(delay.grokked.value * delay.grokked.n)} of {delay.grokked.n} runs grok."
    )
    if higher is not None:
        said += f" At equal step H differs from the baseline's by {worded(higher, '')}."
    return said


def section(result: Mixing) -> Section:
    """E2's part of the report."""
    mixed = list(result.conditions.values())
    all_delays = [each.delay for each in mixed]
    main = [result.conditions[name] for name in (LOSSES, LOGITS) if name in result.conditions]
    shown = [result.baseline, *(each.delay.group for each in main or mixed[:1])]
    blocks: list[Block] = [
        Text(
            "The paper mixes each representation of a batch with the next one, h̃ᵢ = (1 − α) hᵢ + α hᵢ₊₁, at every "
            "training step. Its formula averages the two losses, its text the two logits; both were run. As the head "
            "is affine, the average of the logits is its answer to the average representation: mixing alone, with α/2 "
            "in the place of α. Section 6 can also be read as mixing alone with α itself, which is to average the "
            "logits with 2α. The batches' order is random, so the next one is any other pair. The α of the paper is "
            "lost; 0.1 is ours, and the other values are a dose-response. Evaluation and H see the representations "
            "unmixed."
        ),
        delays_table(
            "When each condition groks, in steps, against E1's baseline.", result.baseline, all_delays
        ),
        Text(notes(all_delays), "note"),
        drawn(
            "e2-times",
            functools.partial(delay_figures.grokking_times, result.baseline, all_delays),
            "T_grok of every run. Triangles: runs that did not grok, at their end; diamonds and bars: restricted means "
            "with 95 % intervals; dashed: the baseline's mean.",
            "Dots of T_grok of each run by condition.",
        ),
    ]
    if result.dose is not None:
        blocks.append(
            Text(
                f"Dose-response, losses averaged: Kendall's τ between α (0 included) and T_grok, seed by seed, is "
                f"{worded(result.dose, '')}. 1 would be: later with every higher α, in every seed."
            )
        )
    blocks += [
        drawn(
            "e2-trajectories",
            functools.partial(delay_figures.trajectories, shown),
            "In the manner of the paper's Figure 3: baseline and mixing. Thin lines: runs; thick lines: their mean "
            "over the steps that all of them reached.",
            "Test accuracy, entropy and norm against the step, by condition.",
        ),
        *_entropy_blocks(result, mixed),
    ]
    return Section("e2", TITLE, tuple(blocks))


def _entropy_blocks(result: Mixing, mixed: list[Mixed]) -> list[Block]:
    blocks: list[Block] = [
        Text(
            "Does the intervention keep H up, as it is meant to? At equal step, a run that is slower in everything has "
            "a higher H without any action on H; so H is compared at equal training loss too (the loss of the unmixed "
            "representations on the training set, in both)."
        ),
        Table(
            "What becomes of the entropy. H* of the baseline is the mean over its runs.",
            (
                "condition",
                "H, difference at equal step",
                "H at own T_grok",
                "that, minus the baseline's",
                "below the baseline's H* before grokking",
            ),
            tuple(
                (
                    words(each.delay.condition),
                    span(each.equal_step, decimal),
                    span(each.collapse.h_star, decimal),
                    span(each.collapse.shift, decimal),
                    counted(each.collapse.below),
                )
                for each in mixed
            ),
            (1, 2, 3),
        ),
    ]
    rows = [
        (
            words(each.delay.condition),
            f"{level.loss:g}",
            span(level.control, decimal),
            span(level.treated, decimal),
            span(level.difference, decimal),
            f"{steps(level.control_step)}; {steps(level.treated_step)}",
            str(level.difference.n),
        )
        for each in mixed
        for level in each.equal_loss
    ]
    if rows:
        blocks += [
            Table(
                "H where the training loss first falls to a level, in baseline and treated runs of the same seeds.",
                (
                    "condition",
                    "loss (nats)",
                    "H, baseline",
                    "H",
                    "difference",
                    "steps, baseline; treated",
                    "pairs",
                ),
                tuple(rows),
                (1, 2, 3, 4, 5, 6),
            ),
            drawn(
                "e2-equal-loss",
                functools.partial(
                    delay_figures.at_equal_loss,
                    {each.delay.condition: each.equal_loss for each in mixed[:4] if each.equal_loss},
                ),
                "H of the treated minus H of the baseline runs at equal training loss, with 95 % intervals over seeds. "
                "Above 0 the intervention kept H up.",
                "Difference of entropy against the training loss, one line a condition.",
            ),
        ]
    return blocks
