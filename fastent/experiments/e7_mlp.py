"""E7, the question whether the collapse of the entropy is sufficient for grokking.

MLPs of `fastent.experiments.variants` beside E1's Transformers (paper, section 11 and Figure 9). The paper says of one
MLP, which it does not describe, that H collapses well below H* while test accuracy stays near 0 for 80,000 steps, and
explains it by a Fourier alignment near 0. The claim is about a model, so it is asked of each of ours: does H fall below
the Transformer's H*, and does the model nonetheless not generalise? The alignment is a maximum over some ten thousand
correlations and never near 0, so it is set beside its null (`fastent.train.spectra`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fastent.experiments import leads
from fastent.experiments.claims import (
    IN_PART,
    NONE,
    NOT_REPRODUCED,
    NOT_RUN,
    REPRODUCED,
    Claim,
    counted,
    decimal,
    judge_share,
    percent,
)
from fastent.experiments.columns import over, values_at
from fastent.experiments.delays import Group
from fastent.experiments.document import Verdict
from fastent.experiments.e1_baseline import paper_window
from fastent.experiments.e7_models import COLLAPSES, DIPS, NEAR_ZERO, Model, outcome_of, told
from fastent.experiments.statistics import Estimate, proportion
from fastent.experiments.stored import StoredRun
from fastent.experiments.variants import MLPS
from fastent.train.quantities import WINDOW, first_below

TITLE = "E7: is the collapse sufficient?"

MEMORISED_BY = 500


@dataclass(frozen=True)
class Sufficiency:
    """Analysis of the complete runs of E7 beside E1's.

    `h_star` is the Transformers' mean H at T_grok, None if none groks; `mlps` are in the order of `MLPS`, those with
    no run left out.
    """

    transformer: Model
    h_star: Estimate | None
    mlps: tuple[Model, ...]

    @property
    def plainest(self) -> tuple[Model, ...]:
        """MLPs that differ from the Transformer's settings in the model alone."""
        names = [mlp.condition for mlp in MLPS[:2]]
        return tuple(model for model in self.mlps if model.group.condition in names)


def analyse(runs: Sequence[StoredRun]) -> Sufficiency | None:
    """Compare the MLPs with the Transformers; None without a run of an MLP.

    Parameters
    ----------
    runs : sequence of StoredRun
        Complete runs of E1 and E7.
    """
    base = Group.of("baseline", [r for r in runs if r.experiment == "e1" and r.condition == "baseline"])
    h_star = over([run.summary.h_star for run in base.measured])
    mlps = [r for r in runs if r.experiment == "e7"]
    if not mlps:
        return None

    def model(label: str, group: Group) -> Model:
        below = tuple(
            None if h_star is None else first_below(r.trajectory.step, r.trajectory.entropy, h_star.value)
            for r in group.measured
        )
        outcomes = tuple(outcome_of(run, h_star) for run in group.measured)
        return Model(label, group, below, outcomes)

    groups = [
        (mlp.label, Group.of(mlp.condition, [r for r in mlps if r.condition == mlp.condition]))
        for mlp in MLPS
    ]
    return Sufficiency(
        transformer=model("Transformer", base),
        h_star=h_star,
        mlps=tuple(model(label, group) for label, group in groups if group.stored),
    )


def claims(result: Sufficiency) -> list[Claim]:
    """Each claim of the paper that E7's runs speak to, beside what they say."""
    everyone = [result.transformer, *result.mlps]
    plain = _pooled(result.plainest, lambda model: [o == COLLAPSES for o in model.outcomes])
    early = _pooled(
        everyone, lambda m: [None if t is None else t <= MEMORISED_BY for t in _times(m, "t_mem")]
    )
    aligned = _pooled(
        result.mlps,
        lambda m: [None if a is None or n is None else a <= n for a, n in _end_and_null(m)],
    )
    grows = _pooled([result.transformer], _grows)
    grokked = _pooled(result.mlps, _fell_first)
    held = [model.label for model in result.mlps if model.holds.value == 1]
    return [
        Claim(
            "§11, Fig. 9",
            "an MLP memorises, its H collapses well below H*, and test accuracy stays near 0 for 80,000 steps",
            _said_of(result.plainest),
            NOT_RUN if result.h_star is None else judge_share(plain),
            "every run of the MLPs with the Transformer's settings does; in part: at least half",
        ),
        Claim(
            "abstract, §11",
            "the collapse is not sufficient: there is a setting in which it comes without generalisation",
            _said_of_some(result, held),
            _judge_some(result),
            "in one setting every run ends below H* and does not generalise; in part: some run does, or every run of a "
            "setting falls below it at some time",
        ),
        Claim(
            "abstract",
            "it is necessary: no MLP that groks does so without H below H* or a collapse first",
            counted(grokked),
            judge_share(grokked),
            "every MLP that groks has H below the Transformer's H*, or T_collapse, by T_grok; in part: half",
        ),
        Claim(
            "§11",
            f"both memorise within {MEMORISED_BY} steps",
            counted(early),
            judge_share(early),
            "every run that memorises; in part: at least half",
        ),
        Claim(
            "§11",
            "the MLP's Fourier alignment (max |Pearson r|) remains near 0",
            f"at the end {_range(result.mlps)}; at most its null in {counted(aligned)}",
            judge_share(aligned),
            "at the end it is within the null of permuted labels in every run; in part: at least half",
        ),
        Claim(
            "§11",
            "the Transformer's alignment grows after the transition",
            counted(grows),
            judge_share(grows),
            "in every run that groks it is larger at the end than at T_grok; in part: at least half",
        ),
    ]


def _pooled(models: Sequence[Model], holds: Callable[[Model], Sequence[bool | None]]) -> Estimate | None:
    known = [answer for model in models for answer in holds(model) if answer is not None]
    return proportion(sum(known), len(known)) if known else None


def _times(model: Model, name: str) -> list[int | None]:
    return [getattr(run.summary, name) for run in model.group.measured]


def _end_and_null(model: Model) -> list[tuple[float | None, float | None]]:
    return list(zip(model.at_end("alignment"), model.at_end("alignment_null"), strict=True))


def _grows(model: Model) -> list[bool | None]:
    at = values_at(model.group.stored, model.group.measured, "alignment", _times(model, "t_grok"))
    pairs = zip(at, model.at_end("alignment"), strict=True)
    return [None if a is None or b is None else b > a for a, b in pairs]


def _fell_first(model: Model) -> list[bool | None]:
    runs = model.group.measured
    falls = leads.collapse(runs, window=paper_window(runs) or WINDOW).times
    answers: list[bool | None] = []
    for run, below, fell in zip(runs, model.below, falls, strict=True):
        t_grok = run.summary.t_grok
        signals = [t for t in (below, fell) if t is not None]
        answers.append(None if t_grok is None else bool(signals) and min(signals) <= t_grok)
    return answers


def _said_of(models: Sequence[Model]) -> str:
    if not models:
        return NONE
    return "; ".join(f"{model.label}: {told(model)}" for model in models)


def _judge_some(result: Sufficiency) -> Verdict:
    if result.h_star is None:
        return NOT_RUN
    shares = [model.holds.value for model in result.mlps]
    if max(shares) == 1:
        return REPRODUCED
    return IN_PART if max(shares) > 0 or _crossing(result) else NOT_REPRODUCED


def _crossing(result: Sufficiency) -> list[str]:
    """Name the MLPs of which every run has H below H* at some time and does not generalise."""
    return [model.label for model in result.mlps if set(model.outcomes) <= {COLLAPSES, DIPS}]


def _said_of_some(result: Sufficiency, held: Sequence[str]) -> str:
    said = (
        f"in every run of {', '.join(held)}" if held else f"in no setting of {len(result.mlps)} in every run"
    )
    crossing = [label for label in _crossing(result) if label not in held]
    if crossing:
        said += f"; H falls below H* at some time, and no run generalises: {', '.join(crossing)}"
    return said


def _range(models: Sequence[Model]) -> str:
    known = [a for model in models for a in model.at_end("alignment") if a is not None]
    return f"{decimal(min(known), 2)} to {decimal(max(known), 2)}" if known else NONE


def headline(result: Sufficiency) -> str:
    """Say in a few sentences what the runs show."""
    runs = sum(len(model.outcomes) for model in result.mlps)
    grokked = sum(model.outcomes.count("groks") for model in result.mlps)
    said = f"E7: {grokked} of {runs} MLP runs grok, of {len(result.mlps)} settings."
    if result.h_star is None:
        return said + " No Transformer groks, so there is no H* to say whether their entropy collapses."
    held = [model.label for model in result.mlps if model.holds.value == 1]
    if held:
        said += (
            f" What the paper says of its MLP, H below {decimal(result.h_star.value)} and test accuracy at most "
            f"{percent(NEAR_ZERO)} to the end, holds in every run of: {', '.join(held)}."
        )
    else:
        said += (
            f" What the paper says of its MLP, H below {decimal(result.h_star.value)} and test accuracy at most "
            f"{percent(NEAR_ZERO)} to the end, holds in every run of no setting."
        )
    return said
