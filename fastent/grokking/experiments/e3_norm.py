"""E3, the question whether it is the norm: mixing with the norm held, and the norm held without mixing.

Runs of `fastent.grokking.experiments.jobs.e3` against E1's and E2's (paper, section 6, Table 1). The paper's text does
not say whether its "norm-matched control" mixes, nor whether the norm is held constant or to the baseline's trajectory.
Here it mixes and follows the baseline: only then does a delay, "since norm is held constant", speak for the mixing. If
the control does not mix, the delay speaks for the norm, against the paper's conclusion; so the norm was held without
mixing as well.

With the baseline and E2 that makes a two by two design: mixed or not, with the baseline's norm or with that of the
mixed runs. More pairs of conditions hold the norm constant: from where the baseline has memorised, and at its start,
all parameters together and tensor by tensor.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from fastent.grokking.experiments.claims import (
    CLAIMS,
    NONE,
    Experiment,
    Finding,
    Findings,
    counted,
    decimal,
    span,
    steps,
    worded,
)
from fastent.grokking.experiments.data import Runs, by_condition
from fastent.grokking.experiments.delays import (
    Delay,
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
from fastent.grokking.experiments.e2_mixing import LOSSES
from fastent.grokking.experiments.figures import drawn
from fastent.grokking.experiments.statistics import UNKNOWN, Estimate, over
from fastent.grokking.train.conditions import followed

TITLE = "E3: is it the norm?"


CONTROL = f"{LOSSES}+norm-as-baseline"
"""Our reading of the paper's control."""

SHAM = "norm-as-baseline"
"""Each baseline run's own norm re-imposed on it: what the holding does by itself."""

HELD = f"norm-as-{LOSSES}"
"""The fourth cell of the design: the mixed runs' norm without their mixing."""


@dataclass(frozen=True)
class Factorial:
    """Effects in the two by two design, in steps of T_grok restricted to the limit, over the `n` common seeds.

    `mixing`: mixed minus unmixed, averaged over both norms; `norm`: the mixed runs' norm minus the baseline's,
    averaged over mixed and unmixed; `interaction`: by how much mixing delays more with the mixed runs' norm.
    """

    mixing: Estimate
    norm: Estimate
    interaction: Estimate
    n: int


@dataclass(frozen=True, eq=False)
class Norm:
    """Analysis of E3: the baseline, E2's mixed runs where there are any, and every condition by name.

    `deviations`: the largest relative distance of each condition's norm from what it was held to.
    """

    baseline: Runs
    mixed: Runs
    conditions: dict[str, Delay]
    deviations: dict[str, float]
    factorial: Factorial | None
    comparable: bool


def analyse(runs: Runs) -> Norm | None:
    """Compare E3's conditions with E1's baseline; None if either has no run."""
    baseline, mixed = runs.select("e1", "baseline"), runs.select("e2", LOSSES)
    treated = by_condition(runs.select("e3"))
    if not len(baseline) or not treated:
        return None
    sources = {"baseline": baseline, LOSSES: mixed}
    conditions = {delay.condition: delay for delay in delays(baseline, list(treated.values()))}
    deviations = {name: _deviation(each, sources) for name, each in treated.items()}
    cells = (baseline, mixed, treated.get(CONTROL), treated.get(HELD))
    return Norm(baseline, mixed, conditions, deviations, _factorial(*cells), runs.comparable)


def _deviation(runs: Runs, sources: dict[str, Runs]) -> float:
    """Compare the norm of each run with that of the run it follows, or with its own start, at each evaluation."""
    follows = followed(runs.condition)
    source = None if follows is None else sources.get(follows)
    gaps = []
    for i, (step, norm) in enumerate(runs.lines(runs.norm)):
        if follows is None:
            wanted = np.full(step.size, norm[0])
        elif source is None or runs.seeds[i] not in source.seeds:
            continue
        else:
            other = source.only([runs.seeds[i]])
            held_from = other.t_mem[0] if "norm-mem" in runs.condition else np.nan
            ((path_step, path),) = other.lines(other.norm)
            wanted = np.exp(np.interp(np.fmin(step, held_from), path_step, np.log(path)))
        # The start itself is not held: the first step is.
        gaps.append(float(np.nanmax(np.abs(norm / wanted - 1)[1:], initial=0.0)))
    return max(gaps, default=np.nan)


def _factorial(baseline: Runs, mixed: Runs, control: Runs | None, held: Runs | None) -> Factorial | None:
    if not len(mixed) or control is None or held is None:
        return None
    cells = (baseline, mixed, control, held)
    shared = set.intersection(*(set(runs.seeds) for runs in cells))
    if not shared:
        return None
    limit = min(runs.setting("max_steps").min() for runs in cells)
    bb, mm, mb, bm = (np.minimum(runs.only(shared).times.values, limit) for runs in cells)
    return Factorial(
        mixing=over((mb - bb + mm - bm) / 2),
        norm=over((bm - bb + mm - mb) / 2),
        interaction=over(mm - mb - bm + bb),
        n=len(shared),
    )


def claims(result: Norm) -> Findings:
    """Each claim of the paper that E3's runs speak to, beside what they say."""
    delay = result.conditions.get(CONTROL)
    later, mean, grokked = (delay.later, delay.mean, delay.grokked) if delay else (UNKNOWN,) * 3
    return {
        "e3.delays": Finding(worded(later), judge_later(delay)),
        "e3.t_grok": Finding(worded(mean), CLAIMS["e3.t_grok"].judge(mean, comparable=result.comparable)),
        "e3.grok_share": Finding(
            counted(grokked), CLAIMS["e3.grok_share"].judge(grokked, comparable=result.comparable)
        ),
        "e3.test": Finding(tested(delay), judge_test(delay, CLAIMS["e3.test"], comparable=result.comparable)),
        "e3.driver": Finding(_alone(result), _judge_driver(result)),
    }


def _without_mixing(result: Norm) -> list[Delay]:
    return [held for held in result.conditions.values() if not held.mixes]


def _alone(result: Norm) -> str:
    return (
        "; ".join(
            f"{words(held.condition)}: later by {worded(held.later)}" for held in _without_mixing(result)
        )
        or NONE
    )


def _judge_driver(result: Norm) -> Verdict:
    alone, control = _without_mixing(result), result.conditions.get(CONTROL)
    if not alone or control is None:
        return Verdict.NOT_RUN
    if not control.events:
        return Verdict.NO_CASE
    moved = [_excludes_zero(held.later) for held in alone]
    if any(moved):
        # Re-imposing a norm may delay by itself: what the norm does is told by the sham alone.
        return Verdict.NOT_REPRODUCED if SHAM in result.conditions else Verdict.UNDECIDED
    return Verdict.REPRODUCED if judge_later(control) == Verdict.REPRODUCED else Verdict.IN_PART


def _excludes_zero(estimate: Estimate) -> bool:
    return estimate.bounded and not estimate.low <= 0 <= estimate.high


def headline(result: Norm) -> str:
    """Say in a few sentences what the runs show."""
    said = []
    for name, held in result.conditions.items():
        if name == CONTROL:
            said.append(f"E3: mixing with the baseline's norm moves T_grok by {worded(held.later)}.")
    for held in _without_mixing(result):
        said.append(f"Without mixing, {words(held.condition)}: {worded(held.later)}.")
    return (
        " ".join(said) or f"E3: {len(result.conditions)} conditions have complete runs, but not the controls."
    )


def section(result: Norm) -> Section:
    """E3's part of the report."""
    held = list(result.conditions.values())
    mixed = (result.mixed,) if len(result.mixed) else ()
    main = [result.conditions[name].runs for name in (CONTROL, HELD) if name in result.conditions]
    shown = [result.baseline, *mixed, *(main or [held[0].runs])]
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
        delays_table("When each condition groks, in steps, against E1's baseline.", result.baseline, held),
        Text(notes(held), "note"),
        *_factorial_blocks(result),
        *condition_figures("e3", result.baseline, held),
        drawn(
            "e3-trajectories",
            functools.partial(trajectories, shown),
            "The cells of the design: baseline, mixing, mixing with the baseline's norm, and the norm of mixing "
            "without it, as far as they were run. Thin lines: runs; thick lines: their mean, in which a run that "
            "has ended counts with its last values.",
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
                    words(each.condition),
                    NONE if np.isnan(gap := result.deviations[each.condition]) else f"{gap:.1e}",
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
            "Student's intervals over seeds.",
            ("effect of", "steps"),
            rows,
            (1,),
        )
    ]


EXPERIMENT = Experiment(
    "e3",
    "Is it the norm? Control with the norm held.",
    ("e1", "e2", "e3"),
    analyse,
    headline,
    claims,
    section,
)
