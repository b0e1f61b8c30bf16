"""E3's part of the report: its figures, its tables and what they say."""

from __future__ import annotations

import functools

from fastent.experiments import delay_figures
from fastent.experiments.claims import NONE, counted, decimal, steps, worded
from fastent.experiments.delay_blocks import delays_table, drawn, notes, span
from fastent.experiments.delays import words
from fastent.experiments.document import Block, Section, Table, Text
from fastent.experiments.e3_norm import CONTROL, HELD, TITLE, Norm


def headline(result: Norm) -> str:
    """Say in a few sentences what the runs show."""
    said = []
    for name, held in result.conditions.items():
        if name == CONTROL:
            said.append(f"E3: mixing with the baseline's norm moves T_grok by {worded(held.delay.delay)}.")
    alone = [held for held in result.conditions.values() if not held.mixes]
    for held in alone:
        said.append(f"Without mixing, {words(held.delay.condition)}: {worded(held.delay.delay)}.")
    return (
        " ".join(said) or f"E3: {len(result.conditions)} conditions have complete runs, but not the controls."
    )


def section(result: Norm) -> Section:
    """E3's part of the report."""
    held = list(result.conditions.values())
    all_delays = [each.delay for each in held]
    mixed = () if result.mixed is None else (result.mixed,)
    main = [result.conditions[name].delay.group for name in (CONTROL, HELD) if name in result.conditions]
    shown = [result.baseline, *mixed, *(main or [held[0].delay.group])]
    blocks: list[Block] = [
        Text(
            "The paper's control leaves two things open: whether it mixes, and whether the norm is held constant or to "
            "the baseline's trajectory. All readings were run. After each step the parameters are scaled by one "
            "factor, so that their common Euclidean norm is the one wanted (tensor by tensor: each by its own, tensors "
            "that start at zero left free). AdamW's moments are left as they are. A norm that follows another run is "
            "that of the same seed, log-linear between its evaluations and constant after its end."
        ),
        Text(
            "The control that the paper lacks is the norm held without mixing. If that delays grokking as well, a "
            "control that changes both says nothing about the entropy."
        ),
        delays_table(
            "When each condition groks, in steps, against E1's baseline.", result.baseline, all_delays
        ),
        Text(notes(all_delays), "note"),
        *_factorial_blocks(result),
        drawn(
            "e3-times",
            functools.partial(delay_figures.grokking_times, result.baseline, all_delays),
            "T_grok of every run. Triangles: runs that did not grok, at their end; diamonds and bars: restricted means "
            "with 95 % intervals; dashed: the baseline's mean.",
            "Dots of T_grok of each run by condition.",
        ),
        drawn(
            "e3-trajectories",
            functools.partial(delay_figures.trajectories, shown),
            "The cells of the design: baseline, mixing, mixing with the baseline's norm, and the norm of mixing "
            "without it, as far as they were run. Thin lines: runs; thick lines: their mean over the steps that all "
            "reached.",
            "Test accuracy, entropy and norm against the step, by condition.",
        ),
        Table(
            "How well the norm was held (largest relative distance at an evaluation), and what becomes of the entropy.",
            (
                "condition",
                "norm off by",
                "H, difference at equal step",
                "H at own T_grok",
                "below the baseline's H* before grokking",
            ),
            tuple(
                (
                    words(each.delay.condition),
                    NONE if each.deviation is None else f"{each.deviation:.1e}",
                    span(each.equal_step, decimal),
                    span(each.collapse.h_star, decimal),
                    counted(each.collapse.below),
                )
                for each in held
            ),
            (1, 2, 3),
        ),
    ]
    return Section("e3", TITLE, tuple(blocks))


def _factorial_blocks(result: Norm) -> list[Block]:
    effects = result.factorial
    if effects is None:
        return [
            Text(
                "The two by two design (mixed or not, the baseline's norm or the mixed runs') is not complete: none of "
                "its effects can be given.",
                "note",
            )
        ]
    rows = (
        ("mixing, averaged over both norms", span(effects.mixing, steps)),
        (
            "the mixed runs' norm in place of the baseline's, averaged over mixed and unmixed",
            span(effects.norm, steps),
        ),
        (
            "interaction: how much more mixing delays with the mixed runs' norm",
            span(effects.interaction, steps),
        ),
    )
    return [
        Table(
            f"The two by two design: effects on T_grok in steps, over the {effects.n} seeds of all four cells, with "
            "BCa intervals over seeds.",
            ("effect of", "steps"),
            rows,
            (1,),
        )
    ]
