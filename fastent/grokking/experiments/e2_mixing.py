"""E2, the question whether mixing the representations delays grokking, and whether by way of the entropy.

Runs of `fastent.grokking.experiments.jobs.e2` against E1's (paper, section 6, Appendix C, Figure 3, Table 1). The paper
mixes "at every training step" to "prevent the covariance from collapsing" and concludes from the delay that the
collapse causes grokking. Its text has two readings of the loss, so both were run, and its alpha is lost, so there is a
dose-response. A delay shows an effect of mixing; that it acts through the entropy needs H to stay up, which is measured
(`fastent.grokking.experiments.delays`).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from scipy import stats

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
    least,
    of,
    span,
    steps,
    worded,
)
from fastent.grokking.experiments.data import Runs, by_condition
from fastent.grokking.experiments.delays import (
    Delay,
    at_equal_loss,
    collapse,
    condition_figures,
    delays,
    delays_table,
    judge_later,
    judge_test,
    notes,
    tested,
    trajectories,
    words,
)
from fastent.grokking.experiments.document import Block, Section, Table, Text, Verdict
from fastent.grokking.experiments.figures import drawn
from fastent.grokking.experiments.jobs import ALPHA
from fastent.grokking.experiments.statistics import UNKNOWN, Estimate, over

TITLE = "E2: does mixing the representations delay grokking?"


LOSSES, LOGITS = f"losses-{ALPHA:g}", f"logits-{ALPHA:g}"
"""The two readings of the paper's loss, at the alpha that stands for the lost one."""


@dataclass(frozen=True, eq=False)
class MixedRuns:
    """Analysis of E2: the baseline, every condition by name, and the dose-response.

    `dose` is the mean over seeds of Kendall's tau between alpha (0 included) and T_grok, losses averaged; a run
    that did not grok is as late as the limit.
    """

    baseline: Runs
    conditions: dict[str, Delay]
    dose: Estimate
    comparable: bool


def analyse(runs: Runs) -> MixedRuns | None:
    """Compare E2's conditions with E1's baseline; None if either has no run."""
    baseline, treated = runs.select("e1", "baseline"), by_condition(runs.select("e2"))
    if not len(baseline) or not treated:
        return None
    conditions = {delay.condition: delay for delay in delays(baseline, list(treated.values()))}
    return MixedRuns(baseline, conditions, _dose(baseline, treated), runs.comparable)


def alpha_of(condition: str) -> float:
    """Weight of the other row under a condition; 0 for the baseline."""
    return 0.0 if condition == "baseline" else float(condition.rpartition("-")[2])


def at_alpha(condition: str) -> str:
    """Write `alpha_of` for a sentence, "at α = 0.4"."""
    return f"at α = {alpha_of(condition):g}"


def _dose(baseline: Runs, treated: dict[str, Runs]) -> Estimate:
    doses = [baseline, *(runs for name, runs in treated.items() if name.startswith("losses-"))]
    shared = set.intersection(*(set(runs.seeds) for runs in doses))
    if len(doses) < 3 or not shared:
        return UNKNOWN
    alphas = [alpha_of(runs.condition) for runs in doses]
    times = zip(*(runs.only(shared).times.values for runs in doses), strict=True)
    # NaN where all times of a seed tie.
    return over((float(stats.kendalltau(alphas, seed).statistic) for seed in times), least=-1, most=1)


def claims(result: MixedRuns) -> Findings:
    """Each claim of the paper that E2's runs speak to, beside what they say."""
    losses, logits = result.conditions.get(LOSSES), result.conditions.get(LOGITS)
    mean, grokked = (losses.mean, losses.grokked) if losses else (UNKNOWN, UNKNOWN)
    comparable = result.comparable
    doses = "".join(f", {at_alpha(each.condition)} by {worded(each.later)}" for each in _other_doses(result))
    return {
        **{
            name: Finding(f"{worded(each.later)}{others}" if each else NONE, judge_later(each, CLAIMS[name]))
            for name, each, others in (("e2.delays", losses, doses), ("e2.delays_logits", logits, ""))
        },
        "e2.t_grok": CLAIMS["e2.t_grok"].finding(mean, comparable=comparable),
        "e2.test": Finding(tested(losses), judge_test(losses, CLAIMS["e2.test"], comparable=comparable)),
        "e2.all_grok": Finding(counted(grokked), judge_share(grokked)),
        "e2.kept_up": Finding(_kept_up(result, losses), judge_kept_up(losses)),
    }


def _other_doses(result: MixedRuns) -> list[Delay]:
    """Conditions of other alphas, losses averaged, that move T_grok: the paper's alpha is lost, and 0.1 may miss it."""
    return [
        each
        for name, each in result.conditions.items()
        if name.startswith("losses-") and name != LOSSES and each.later.excludes_zero
    ]


def _kept_up(result: MixedRuns, mixed: Delay | None) -> str:
    if mixed is None:
        return NONE
    baseline = result.baseline
    said = f"H is higher at equal step by {worded(mixed.equal_step, '')}"
    said += f", at grokking by {worded(mixed.collapse.shift, '')}"
    if mixed.equal_loss:
        # The lowest loss that the most seeds reach under both.
        most = max(level.difference.n for level in mixed.equal_loss)
        last = [level for level in mixed.equal_loss if level.difference.n == most][-1]
        said += f", at equal training loss ({last.loss:g}) by {worded(last.difference, '')}"
    own = collapse(baseline, baseline).below
    said += f"; below the baseline's H* by T_grok: {counted(mixed.collapse.below)}, of the baseline {counted(own)}"
    for each in _other_doses(result):
        said += f"; {at_alpha(each.condition)}, at equal step, by {worded(each.equal_step, '')}"
    return said


def judge_kept_up(mixed: Delay | None) -> Verdict:
    """Judge whether mixing keeps H up, by H at equal step and at grokking."""
    if mixed is None:
        return Verdict.NOT_RUN
    shifts, margin = (mixed.equal_step, mixed.collapse.shift), CLAIMS["e2.kept_up"].margin
    found = [judge_positive(shift, margin) for shift in shifts]
    # Two measures of one thing: what only one of them shows is shown in part.
    if Verdict.NOT_RUN not in found and Verdict.REPRODUCED in found and len(set(found)) > 1:
        return Verdict.IN_PART
    # "Neither" is said of both: where one may still exceed the margin, it is open.
    if set(found) == {Verdict.NOT_REPRODUCED, Verdict.UNDECIDED}:
        return Verdict.UNDECIDED
    return least(*found)


def headline(result: MixedRuns) -> str:
    """Say in a few sentences what the runs show."""
    mixed = result.conditions.get(LOSSES)
    if mixed is None:
        return f"E2: {len(result.conditions)} conditions of mixing have complete runs, but not the paper's."
    said = (
        f"E2: mixing with the losses averaged, {at_alpha(mixed.condition)}, moves T_grok by {worded(mixed.later)}; "
        f"{of(mixed.grokked)} runs grok."
    )
    if mixed.equal_step.known:
        said += f" At equal step H differs from the baseline's by {worded(mixed.equal_step, '')}."
    for each in _other_doses(result):
        said += (
            f" {at_alpha(each.condition).capitalize()} mixing moves T_grok by {worded(each.later)}, "
            f"{of(each.grokked)} runs grok, and H differs by {worded(each.equal_step, '')}."
        )
    return said


def section(result: MixedRuns) -> Section:
    """E2's part of the report."""
    mixed = list(result.conditions.values())
    main = [result.conditions[name] for name in (LOSSES, LOGITS) if name in result.conditions]
    shown = [result.baseline, *(each.runs for each in main or mixed[:1])]
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
        delays_table("When each condition groks, in steps, against E1's baseline.", result.baseline, mixed),
        Text(notes(mixed), "note"),
        *condition_figures("e2", result.baseline, mixed),
    ]
    if result.dose.known:
        blocks.append(
            Text(
                f"Dose-response, losses averaged: Kendall's τ between α (0 included) and T_grok, seed by seed, is "
                f"{worded(result.dose, '')}. 1 would be: later with every higher α, in every seed. Of the α other than "
                f"{alpha_of(LOSSES):g}, told from the baseline by their own interval: "
                f"{', '.join(f'{alpha_of(each.condition):g}' for each in _other_doses(result)) or 'none'}."
            )
        )
    blocks += [
        drawn(
            "e2-trajectories",
            functools.partial(trajectories, shown),
            "In the manner of the paper's Figure 3: baseline and mixing. Thin lines: runs; thick lines: their mean, in "
            "which a run that has ended counts with its last values.",
            "Test accuracy, entropy and norm against the step, by condition.",
        ),
        *_entropy_blocks(result, mixed),
    ]
    return Section("e2", TITLE, tuple(blocks))


def _entropy_blocks(result: MixedRuns, mixed: list[Delay]) -> list[Block]:
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
                    words(each.condition),
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
            words(each.condition),
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
                    at_equal_loss, {each.condition: each.equal_loss for each in mixed[:4] if each.equal_loss}
                ),
                "H of the treated minus H of the baseline runs at equal training loss, with 95 % intervals over seeds. "
                "Above 0 the intervention kept H up.",
                "Difference of entropy against the training loss, one line a condition.",
            ),
        ]
    return blocks


EXPERIMENT = Experiment(
    "e2", "Does mixing the representations delay grokking?", ("e1", "e2"), analyse, headline, claims, section
)
