"""E3, the question whether it is the norm: mixing with the norm held, and the norm held without mixing.

Runs of `fastent.grokking.experiments.jobs.e3` against E1's and E2's (paper, section 6, Table 1). The paper's text does
not say whether its "norm-matched control" mixes, nor whether the norm is held constant or to the baseline's trajectory.
Here it mixes and follows the baseline: only then does a delay, "since norm is held constant", speak for the mixing. If
the control does not mix, the delay speaks for the norm, against the paper's conclusion.

A control that holds the norm needs a sham: the baseline's own norm re-imposed on it, without mixing. What the holding
does by itself is the sham against the baseline; what mixing does at a held norm is the control against the sham. With
the norm of the mixed runs held in both ways that makes a two by two design, in every cell of which a norm is held.

Temperatures (norm held, logits divided to the baseline's scale; norm free, logits at another's scale) say whether a
norm acts through the scale of the logits (arXiv 2606.18465). More conditions hold the norm constant: from where the
baseline has memorised, and at its start, all parameters together and tensor by tensor.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
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
    over_plateau,
    pairs,
    tested,
    trajectories,
    words,
)
from fastent.grokking.experiments.document import Block, Section, Table, Text, Verdict
from fastent.grokking.experiments.e2_mixing import LOSSES, alpha_of, at_alpha
from fastent.grokking.experiments.figures import drawn
from fastent.grokking.experiments.statistics import UNKNOWN, Estimate, over, pearson
from fastent.grokking.train.conditions import NORM, SCALE, followed

TITLE = "E3: is it the norm?"


CONTROL = f"{LOSSES}+norm-as-baseline"
"""Our reading of the paper's control."""

SHAM = "norm-as-baseline"
"""Each baseline run's own norm re-imposed on it: what the holding does by itself."""

MIXED_NORM = "norm-as-losses-"
"""How the conditions begin that hold the norm of runs mixed at some alpha, losses averaged, without their mixing."""

HELD = f"norm-as-{LOSSES}"
"""The mixed runs' norm without their mixing."""

RE_MIXED = f"{LOSSES}+{HELD}"
"""The mixed runs' own norm re-imposed on them: the sham of mixing, and the fourth cell of the design."""

AT_SCALE = {held: f"logits-as-baseline+{held}" for held in (SHAM, "norm-mem")}
"""Ways to hold the norm, each with the one that also holds the scale of the logits."""


@dataclass(frozen=True)
class Factorial:
    """Effects in the two by two design, in steps of T_grok restricted to the limit, over the `n` common seeds.

    A norm is held in every cell. `mixing`: mixed minus unmixed, averaged over both norms; `norm`: the mixed runs' norm
    minus the baseline's, averaged over mixed and unmixed; `interaction`: by how much mixing delays more with the mixed
    runs' norm.
    """

    mixing: Estimate
    norm: Estimate
    interaction: Estimate
    n: int


@dataclass(frozen=True)
class Apart:
    """How far the runs of a condition are from the baseline's, by seed; all but `time` over the baseline's plateau.

    `time` is ln(T_grok / the baseline's), runs that do not grok at their end; `norm` and `scale` are mean differences
    of the logarithms of the norm and of the scale of the logits that is trained on; `entropy` is that of H.
    """

    condition: str
    time: Mapping[int, float]
    norm: Mapping[int, float]
    scale: Mapping[int, float]
    entropy: Mapping[int, float]


@dataclass(frozen=True, eq=False)
class Norm:
    """Analysis of E3: the baseline, E2's mixed runs where there are any, and every condition by name.

    `conditions` are compared with the baseline, `against_sham` the others with the sham if it was run; `deviations`:
    the largest relative distance of each condition's norm from what it was held to; `apart` has each of E2's too.
    """

    baseline: Runs
    mixed: Runs
    conditions: dict[str, Delay]
    against_sham: dict[str, Delay]
    deviations: dict[str, float]
    factorial: Factorial | None
    apart: tuple[Apart, ...]
    comparable: bool


def analyse(runs: Runs) -> Norm | None:
    """Compare E3's conditions with E1's baseline; None if either has no run."""
    baseline, mixed = runs.select("e1", "baseline"), runs.select("e2", LOSSES)
    doses = by_condition(runs.select("e2"))
    treated = by_condition(runs.select("e3"))
    if not len(baseline) or not treated:
        return None
    sources = {"baseline": baseline, **doses, **treated}
    sham = treated.get(SHAM)
    others = [] if sham is None else [each for name, each in treated.items() if name != SHAM]
    intervened = [*doses.values(), *treated.values()]
    return Norm(
        baseline=baseline,
        mixed=mixed,
        conditions={each.condition: each for each in delays(baseline, list(treated.values()))},
        against_sham={} if sham is None else {each.condition: each for each in delays(sham, others)},
        deviations={name: _deviation(each, sources) for name, each in treated.items()},
        factorial=_factorial(*(treated.get(name) for name in (SHAM, RE_MIXED, CONTROL, HELD))),
        apart=tuple(_apart(baseline, each, sources) for each in intervened),
        comparable=runs.comparable,
    )


def _deviation(runs: Runs, sources: Mapping[str, Runs]) -> float:
    """Compare the norm of each run with that of the run it follows, or with its own start, at each evaluation."""
    parts = runs.condition.split("+")
    if not any(part.startswith("norm-") for part in parts):
        return np.nan
    follows = followed(runs.condition).get(NORM)
    source = None if follows is None else sources.get(follows)
    gaps = []
    for i, (step, norm) in enumerate(runs.lines(runs.norm)):
        if follows is None:
            wanted = np.full(step.size, norm[0])
        elif source is None or runs.seeds[i] not in source.seeds:
            continue
        else:
            other = source.only([runs.seeds[i]])
            held_from = other.t_mem[0] if "norm-mem" in parts else np.nan
            ((path_step, path),) = other.lines(other.norm)
            wanted = np.exp(np.interp(np.fmin(step, held_from), path_step, np.log(path)))
        # The start itself is not held: the first step is.
        gaps.append(float(np.nanmax(np.abs(norm / wanted - 1)[1:], initial=0.0)))
    return max(gaps, default=np.nan)


def _apart(baseline: Runs, runs: Runs, sources: Mapping[str, Runs]) -> Apart:
    control, treated = pairs(baseline, runs)
    trained = followed(runs.condition).get(SCALE)
    at_scale = treated if trained is None else sources.get(trained, treated[:0]).only(treated.seeds)
    ratios = np.log(treated.times.values / control.times.values)
    return Apart(
        condition=runs.condition,
        time=dict(zip(control.seeds, ratios.tolist(), strict=True)),
        norm=over_plateau(control, treated, lambda each: np.log(each.norm)),
        scale=over_plateau(*pairs(control, at_scale), lambda each: np.log(each.column(SCALE))),
        entropy=over_plateau(control, treated, lambda each: each.entropy),
    )


def _factorial(*cells: Runs | None) -> Factorial | None:
    """Effects from the cells: unmixed with the baseline's norm, mixed with the mixed runs', and the two crossed."""
    held = [runs for runs in cells if runs is not None]
    shared = set.intersection(*(set(runs.seeds) for runs in held)) if held else set()
    if len(held) < len(cells) or not shared:
        return None
    limit = min(runs.setting("max_steps").min() for runs in held)
    bb, mm, mb, bm = (np.minimum(runs.only(shared).times.values, limit) for runs in held)
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
    others = [
        f", {dose} by {worded(result.conditions[name].later)}" for name, dose in _other_doses(result).items()
    ]
    return {
        "e3.delays": Finding("".join((worded(later), *others)), judge_later(delay, CLAIMS["e3.delays"])),
        "e3.t_grok": CLAIMS["e3.t_grok"].finding(mean, comparable=result.comparable),
        "e3.grok_share": Finding(
            counted(grokked), CLAIMS["e3.grok_share"].judge(grokked, comparable=result.comparable)
        ),
        "e3.test": Finding(tested(delay), judge_test(delay, CLAIMS["e3.test"], comparable=result.comparable)),
        "e3.driver": Finding(_said_of_driver(result), _judge_driver(result)),
    }


def _other_doses(result: Norm) -> dict[str, str]:
    """Name the controls at other alphas: "at α = 0.4" by condition."""
    doses = {name: name.removesuffix(f"+{SHAM}") for name in result.conditions if name != CONTROL}
    return {
        name: at_alpha(mixing)
        for name, mixing in doses.items()
        if mixing != name and mixing.startswith("losses-")
    }


NO_SHAM = "the sham, the baseline's own norm re-imposed on it without mixing, is not among these runs"


def _said_of_driver(result: Norm) -> str:
    sham, control = result.conditions.get(SHAM), result.against_sham.get(CONTROL)
    if sham is None or control is None:
        return NO_SHAM if CONTROL in result.conditions else NONE
    said = (
        f"mixing against the sham, at one norm: later by {worded(control.later)}; the sham against the baseline: "
        f"later by {worded(sham.later)}"
    )
    for name, path in result.against_sham.items():
        if name.startswith(MIXED_NORM):
            dose = "" if name == HELD else f" (α = {alpha_of(name):g})"
            said += (
                f"; the mixed runs' norm{dose} without mixing against the sham: later by {worded(path.later)}"
            )
    for name, dose in _other_doses(result).items():
        said += f"; mixing {dose} against the sham: later by {worded(result.against_sham[name].later)}"
    return said


def _judge_driver(result: Norm) -> Verdict:
    control, mixing = result.conditions.get(CONTROL), result.against_sham.get(CONTROL)
    if control is None:
        return Verdict.NOT_RUN
    if mixing is None:
        return Verdict.UNDECIDED if control.events else Verdict.NO_CASE
    verdict, path = judge_later(mixing, CLAIMS["e3.driver"]), result.against_sham.get(HELD)
    too = verdict == Verdict.REPRODUCED and path is not None and path.later.excludes_zero
    return Verdict.IN_PART if too else verdict


def headline(result: Norm) -> str:
    """Say in a few sentences what the runs show."""
    said = []
    if control := result.conditions.get(CONTROL):
        said.append(f"E3: mixing with the baseline's norm moves T_grok by {worded(control.later)}.")
    if sham := result.conditions.get(SHAM):
        said.append(f"The sham, that norm held without mixing, moves it by {worded(sham.later)}.")
        if at_equal := result.against_sham.get(CONTROL):
            said.append(f"At equal norm, so held, mixing moves it by {worded(at_equal.later)}.")
    elif control:
        said.append(f"What of this the holding does by itself is open: {NO_SHAM}.")
    for name, dose in _other_doses(result).items():
        moved = worded(result.conditions[name].later)
        said.append(f"{dose.capitalize()} mixing with the baseline's norm moves T_grok by {moved}.")
    without = [name for name in result.conditions if name.startswith(MIXED_NORM)]
    for name in (*without, "norm-mem", AT_SCALE["norm-mem"], "norm-start"):
        if held := result.conditions.get(name):
            said.append(f"Without mixing, {words(name)}: {worded(held.later)}.")
    return (
        " ".join(said) or f"E3: {len(result.conditions)} conditions have complete runs, but not the controls."
    )


def section(result: Norm) -> Section:
    """E3's part of the report."""
    held = list(result.conditions.values())
    mixed = (result.mixed,) if len(result.mixed) else ()
    main = [result.conditions[name].runs for name in (SHAM, CONTROL, HELD) if name in result.conditions]
    shown = [result.baseline, *mixed, *(main or [held[0].runs])]
    blocks: list[Block] = [
        Text(
            "The paper's control leaves two things open: whether it mixes, and whether the norm is held constant or to "
            "the baseline's trajectory. All readings were run. After each step the parameters are scaled by one "
            "factor, so that their common Euclidean norm is the one wanted (tensor by tensor: each by its own, tensors "
            "that start at zero left free). AdamW's moments are left as they are unless it says otherwise. A norm that "
            "follows another run is that of the same seed, log-linear between its evaluations and constant after its "
            "end."
        ),
        Text(
            "The control that the paper lacks is the sham: the baseline's own norm, held without mixing. What the "
            "control does beyond the sham is the mixing's, what the sham does beyond the baseline is the holding's."
        ),
        delays_table("When each condition groks, in steps, against E1's baseline.", result.baseline, held),
        Text(notes(held), "note"),
        *_sham_blocks(result),
        *_factorial_blocks(result),
        *_apart_blocks(result),
        *condition_figures("e3", result.baseline, held),
        drawn(
            "e3-trajectories",
            functools.partial(trajectories, shown),
            "The baseline, mixing, the sham, mixing with the baseline's norm, and the norm of mixing without it, as "
            "far as they were run. Thin lines: runs; thick lines: their mean, in which a run that has ended counts "
            "with its last values.",
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


def _sham_blocks(result: Norm) -> list[Block]:
    if SHAM not in result.conditions:
        return [Text(f"{NO_SHAM[0].upper()}{NO_SHAM[1:]}; `fastent run e3` makes it.", "note")]
    shown = [
        each
        for name, each in result.against_sham.items()
        if name == RE_MIXED or name.startswith((f"{SHAM}-", MIXED_NORM)) or name.endswith(f"+{SHAM}")
    ]
    sham = result.conditions[SHAM].runs
    blocks: list[Block] = [delays_table("At a held norm: against the sham.", sham, shown)] if shown else []
    if rounded := result.conditions.get(f"{SHAM}-every-step"):
        blocks.append(
            Text(
                "The sham of every step holds the norm that the run has of itself, rounded to float32: it is the "
                f"baseline run but for rounding. It moves T_grok by {worded(rounded.later)}. So runs of one seed part "
                "by rounding alone, pairing by seed takes little of the noise away, and a difference of that size "
                "between a few seeds says little.",
                "note",
            )
        )
    return blocks


def _factor(logarithm: float) -> str:
    return NONE if math.isnan(logarithm) else decimal(math.exp(logarithm), 2)


def _apart_blocks(result: Norm) -> list[Block]:
    rows = tuple(
        (
            words(each.condition),
            *(span(over(ratios.values()), _factor) for ratios in (each.time, each.norm, each.scale)),
            span(over(each.entropy.values()), decimal),
        )
        for each in result.apart
    )
    caption = (
        "What T_grok follows. Times the baseline's of the same seed, as geometric means over seeds: T_grok (a run that "
        "does not grok counts with its end), the norm, and the scale of the logits that the loss sees; and H minus the "
        "baseline's. All but T_grok over the baseline's plateau, from its T_mem to its T_grok, at equal step."
    )
    columns = ("condition", "T_grok", "norm", "scale of the logits", "H, difference")
    blocks: list[Block] = [Table(caption, columns, rows, (1, 2, 3, 4))]
    pooled = {
        "norm": _correlation(result.apart, "norm"),
        "scale of the logits": _correlation(result.apart, "scale"),
        "H": _correlation(result.apart, "entropy"),
    }
    said = [
        f"{name} {decimal(found.value**2, 2)} (n = {found.n})"
        for name, found in pooled.items()
        if found.known
    ]
    if said:
        blocks.append(
            Text(
                f"Share of the variance of ln(T_grok / the baseline's) over all these runs that goes with each (r²): "
                f"{', '.join(said)}. Runs of a condition are alike, so these have no interval; and a run that groks "
                "earlier than the baseline has the lower H at equal step for that alone, so H's share is too large.",
                "note",
            )
        )
    apart = {each.condition: each for each in result.apart}
    said = [
        _said_of_scale(apart[held], apart[cooled])
        for held, cooled in AT_SCALE.items()
        if held in apart and cooled in apart
    ]
    return [*blocks, Text(" ".join(said))] if said else blocks


def _said_of_scale(held: Apart, cooled: Apart) -> str:
    """Say what is left of a held norm's effect at the baseline's scale of the logits, and where H is then."""
    shared = held.time.keys() & cooled.time.keys()
    factor = over(cooled.time[seed] - held.time[seed] for seed in sorted(shared))
    before, after, entropy = (over(each.values()) for each in (held.time, cooled.time, cooled.entropy))
    said = (
        f"With the {words(held.condition)}, dividing the logits to the baseline's scale changes T_grok to "
        f"{span(factor, _factor)} times what it is"
    )
    if before.excludes_zero:
        delays = "delay" if before.value > 0 else "advance"
        if after.excludes_zero and before.value * after.value > 0:
            said += f": the {delays} is not the scale's, for it is there without it"
            if entropy.bounded and not entropy.excludes_zero:
                said += f", and with an H that is not told from the baseline's ({span(entropy, decimal)} off)"
        else:
            said += f": the {delays} may be the scale's, for without it it is not told from none"
    return f"{said}."


def _correlation(apart: tuple[Apart, ...], name: str) -> Estimate:
    points = [
        (values[seed], time)
        for each in apart
        for seed, time in each.time.items()
        if not math.isnan((values := getattr(each, name)).get(seed, np.nan) + time)
    ]
    x, y = np.array(points, dtype=np.float64).reshape(-1, 2).T
    return pearson(x, y) if len(points) > 3 and np.ptp(x) > 0 and np.ptp(y) > 0 else UNKNOWN


def _factorial_blocks(result: Norm) -> list[Block]:
    effects = result.factorial
    if effects is None:
        return [
            Text(
                "The two by two design (mixed or not, the baseline's norm or the mixed runs', held in every cell) is "
                "not complete: none of its effects can be given.",
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
