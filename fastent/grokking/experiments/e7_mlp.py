"""E7, the question whether the collapse of the entropy is sufficient for grokking.

MLPs of `fastent.grokking.experiments.jobs` beside E1's Transformers (paper, section 11 and Figure 9). The paper says of
one MLP, which it does not describe, that H collapses well below H* while test accuracy stays near 0 for 80,000 steps,
and explains it by a Fourier alignment near 0. The claim is about a model, so it is asked of each of ours: does H fall
below the Transformer's H*, and does the model nonetheless not generalise? The alignment is a maximum over some ten
thousand correlations and never near 0, so it is set beside its null (`fastent.grokking.train.measures`).

The paper's MLP is of p = 41, with few pairs to learn from. So there an MLP and the Transformer are trained on the same
pairs, at several shares of them: what the two have in common is no matter of the architecture.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
    counted,
    decimal,
    judge,
    judge_share,
    of,
    percent,
    span,
    steps,
    worded,
)
from fastent.grokking.experiments.data import Runs, StoredRun
from fastent.grokking.experiments.document import Block, Section, Table, Text, Verdict
from fastent.grokking.experiments.figures import (
    DASHED,
    DOTTED,
    GROK,
    LIGHT,
    WIDTH,
    compared,
    drawn,
    mark,
    thousands,
)
from fastent.grokking.experiments.jobs import FEW, FEW_PAIRS, MLPS
from fastent.grokking.experiments.statistics import Estimate, Mask, mean_known, over, share
from fastent.grokking.train.config import TrainConfig
from fastent.grokking.train.milestones import Array
from fastent.grokking.train.tasks import make_task

TITLE = "E7: is the collapse sufficient?"

MEMORISED_BY = 500

PAPERS_FRACTION = 0.2
"""Share of the pairs in the paper's later text."""


@dataclass(frozen=True, eq=False)
class Sufficiency:
    """Analysis of the complete runs of E7 beside E1's.

    `h_star` is the Transformers' mean H at T_grok; `mlps` are in the order of `MLPS`, those with no run left out; `few`
    are models of both kinds on the few pairs of p = 41, by share, and `few_h_star` what `h_star` is for them.
    """

    transformer: ModelRuns
    h_star: Estimate
    mlps: tuple[ModelRuns, ...]
    few: tuple[ModelRuns, ...]
    few_h_star: Estimate

    @property
    def models(self) -> tuple[ModelRuns, ...]:
        """All but those of few pairs, the Transformer first."""
        return (self.transformer, *self.mlps)

    @property
    def all_mlps(self) -> tuple[ModelRuns, ...]:
        """Those of few pairs too."""
        return (*self.mlps, *(model for model in self.few if model.kind == "mlp"))

    @property
    def papers(self) -> tuple[ModelRuns, ...]:
        """What is nearest to the paper's MLP: `own`, or the plainest at E1's settings."""
        return self.own or self.plainest

    @property
    def own(self) -> tuple[ModelRuns, ...]:
        """The MLP of the paper's modulus and of its share of the pairs."""
        return tuple(m for m in self.few if (m.kind, m.fraction) == ("mlp", PAPERS_FRACTION))

    @property
    def shown(self) -> tuple[ModelRuns, ...]:
        """The Transformer and the MLPs that figures set beside it."""
        return (self.transformer, *self.plainest, *self.own)

    @property
    def plainest(self) -> tuple[ModelRuns, ...]:
        """MLPs that differ from the Transformer's settings in the model alone."""
        names = [mlp.condition for mlp in MLPS[:2]]
        return tuple(model for model in self.mlps if model.runs.condition in names)


def analyse(runs: Runs) -> Sufficiency | None:
    """Compare E7's MLPs with E1's Transformers; None without a run of an MLP."""
    base = runs.select("e1", "baseline")
    h_star = over(base.h_star, least=0, most=1)
    mlps = {mlp.label: runs.select("e7", mlp.condition) for mlp in MLPS}
    few = {each.label: runs.select("e7", each.condition) for each in FEW_PAIRS}
    if not any(len(each) for label, each in (mlps | few).items() if not label.startswith("Transformer")):
        return None

    def model(label: str, runs: Runs, h_star: Estimate = h_star) -> ModelRuns:
        return ModelRuns(label, runs, h_star, runs.first_below(h_star.value), outcomes_of(runs, h_star))

    transformers = [each.h_star for label, each in few.items() if label.startswith("Transformer")]
    few_h_star = over(np.concatenate(transformers), least=0, most=1)
    on_few = [model(label, each, few_h_star) for label, each in few.items() if len(each)]

    return Sufficiency(
        transformer=model("Transformer", base),
        h_star=h_star,
        mlps=tuple(model(label, each) for label, each in mlps.items() if len(each)),
        few=tuple(sorted(on_few, key=lambda model: model.fraction)),
        few_h_star=few_h_star,
    )


def claims(result: Sufficiency) -> Findings:
    """Each claim of the paper that E7's runs speak to, beside what they say."""
    memorised = np.concatenate([model.runs.t_mem for model in (*result.models, *result.few)])
    early = share(memorised[~np.isnan(memorised)] <= MEMORISED_BY)
    aligned = share(
        value <= null
        for model in result.all_mlps
        for value, null in zip(model.at_end("alignment"), model.at_end("alignment_null"), strict=True)
        if not np.isnan(value + null)
    )
    transformers = result.transformer.runs
    comparable = len(transformers) > 0 and transformers.comparable  # E7's own runs all differ from the preset
    growth = result.transformer.at_end("alignment") - transformers.at("alignment", transformers.t_grok)
    grows = share(growth[~np.isnan(growth)] > 0)
    grokked = share(answer for model in result.all_mlps for answer in _fell_first(model))
    held = [model.label for model in result.all_mlps if model.holds.value == 1]
    return {
        "e7.mlp": Finding(
            _said_of(result.papers), _judge_papers(result) if _judged(result.papers) else Verdict.NOT_RUN
        ),
        "e7.level": CLAIMS["e7.level"].finding(_level(result), comparable=comparable, unit=""),
        "e7.insufficient": Finding(_said_of_some(result, held), _judge_some(result)),
        "e7.same_pairs": _same_pairs(result),
        "e7.necessary": Finding(_said_of_fall(result, grokked), judge_share(grokked)),
        "e7.memorised_by": Finding(counted(early), judge_share(early)),
        "e7.alignment": Finding(
            f"at the end {_range(result.all_mlps)}; at most its null in {counted(aligned)}",
            judge_share(aligned),
        ),
        "e7.alignment_grows": Finding(counted(grows), judge_share(grows)),
    }


def _level(result: Sufficiency) -> Estimate:
    """H at the end of the runs of the paper's own MLP."""
    ends = [h for model in result.own for h in model.runs.at(model.runs.entropy, model.runs.end)]
    return over(ends, least=0, most=1)


def _judged(models: Sequence[ModelRuns]) -> bool:
    """Whether there is an H* to judge them by."""
    return not any(outcome == OUTCOMES[-1] for model in models for outcome in model.outcomes)


def _by_fraction(result: Sufficiency) -> dict[float, dict[str, ModelRuns]]:
    """Group the models of few pairs by share of the pairs and kind."""
    found: dict[float, dict[str, ModelRuns]] = {}
    for model in result.few:
        found.setdefault(model.fraction, {})[model.kind] = model
    return found


def _judge_papers(result: Sufficiency) -> Verdict:
    """Judge the paper's MLP: undecided where it matters whether what ends about H* is below it."""
    outcomes = [outcome for model in result.papers for outcome in model.outcomes]
    surely, perhaps = (
        judge_share(share(outcome in below for outcome in outcomes))
        for below in ((COLLAPSES,), (COLLAPSES, ABOUT))
    )
    return surely if surely is perhaps else Verdict.UNDECIDED


def _same_pairs(result: Sufficiency) -> Finding:
    """At which shares of the pairs of p = 41 each kind of model groks."""
    both = {fraction: kinds for fraction, kinds in _by_fraction(result).items() if len(kinds) == 2}
    if not both:
        return Finding(NONE, Verdict.NOT_RUN)
    groks = {
        fraction: {kind: share(model.runs.grokked) for kind, model in kinds.items()}
        for fraction, kinds in both.items()
    }
    apart = [found["transformer"].value == 1 for found in groks.values() if found["mlp"].value == 0]
    said = "; ".join(
        f"{percent(fraction)} of the pairs: MLP {of(found['mlp'])}, Transformer {of(found['transformer'])}"
        for fraction, found in groks.items()
    )
    return Finding(f"groks at {said}", judge(True, all(apart), any(apart)) if apart else Verdict.NO_CASE)


def _said_of_fall(result: Sufficiency, grokked: Estimate) -> str:
    """Count the MLPs that grok after a fall of H, and beside them those that fall and do not grok."""
    fallen = share(
        fell for model in result.all_mlps for fell in (~np.isnan(_falls(model)))[~model.runs.grokked]
    )
    if not (grokked.known and fallen.known):
        return counted(grokked)
    return f"{counted(grokked)}; so it falls in {of(fallen)} of those that do not grok"


def _fell_first(model: ModelRuns) -> Mask:
    """Whether H fell below H* or collapsed by T_grok, of each run that grokked."""
    runs = model.runs
    return (_falls(model) <= runs.t_grok)[runs.grokked]


def _falls(model: ModelRuns) -> Array:
    """First step of each run at which H is below H* or has collapsed."""
    return np.fmin(model.below, leads.collapse(model.runs).times)


def _said_of(models: Sequence[ModelRuns]) -> str:
    if not models:
        return NONE
    return "; ".join(f"{model.label}: {told(model)}; {_course(model)}" for model in models)


def _course(model: ModelRuns) -> str:
    """How H goes, in means over the runs, and what of its fall comes after memorising, and stays."""
    runs, fall = model.runs, leads.paper_collapse(model.runs)
    at_start, at_t_mem, at_end = (
        decimal(over(runs.at(runs.entropy, at)).value) for at in (runs.start, runs.t_mem, runs.end)
    )
    said = f"H {at_start} at the start, {at_t_mem} at T_mem, {at_end} at the end"
    if model.h_star.known:
        said += f", H* {span(model.h_star, decimal)}"
    said += f"; T_collapse in {of(share(~np.isnan(fall.times)))}"
    return said + (f", and H does not recover in {of(fall.lasting)}" if fall.lasting.known else "")


def _judge_some(result: Sufficiency) -> Verdict:
    judged = [model for model in result.all_mlps if _judged([model])]
    most = max((model.holds.value for model in judged), default=0)
    found = judge(bool(judged), most == 1, most > 0 or bool(_crossing(result)))
    about = any(ABOUT in model.outcomes for model in judged)
    return Verdict.UNDECIDED if found is Verdict.NOT_REPRODUCED and about else found


def _crossing(result: Sufficiency) -> list[str]:
    """Name the MLPs of which every run has H below H* at some time and does not generalise."""
    return [
        model.label
        for model in result.all_mlps
        if set(model.outcomes) <= {COLLAPSES, ABOUT, DIPS} and not np.isnan(model.below).any()
    ]


def _said_of_some(result: Sufficiency, held: Sequence[str]) -> str:
    said = (
        f"in every run of {', '.join(held)}"
        if held
        else f"in no setting of {len(result.all_mlps)} in every run"
    )
    crossing = [label for label in _crossing(result) if label not in held]
    if crossing:
        said += f"; H falls below H* at some time, and no run generalises: {', '.join(crossing)}"
    return said


def _range(models: Sequence[ModelRuns]) -> str:
    values = np.concatenate([model.at_end("alignment") for model in models])
    known = values[~np.isnan(values)]
    return f"{decimal(known.min(), 2)} to {decimal(known.max(), 2)}" if known.size else NONE


def headline(result: Sufficiency) -> str:
    """Say in a few sentences what the runs show."""
    mlps = result.all_mlps
    runs = sum(len(model.outcomes) for model in mlps)
    grokked = sum(model.outcomes.count("groks") for model in mlps)
    said = f"E7: {grokked} of {runs} MLP runs grok, of {len(mlps)} settings."
    if (pairs := _same_pairs(result)).verdict is not Verdict.NOT_RUN:
        said += f" At p = {FEW}, {pairs.ours}."
    judged = [model for model in mlps if model.h_star.known]
    if not judged:
        return said + " No Transformer groks, so there is no H* to say whether their entropy collapses."
    of_its_mlp = (
        f"H at the end below the interval of the Transformer's H*, test accuracy at most {percent(NEAR_ZERO)}"
    )
    held = [model for model in judged if model.holds.value == 1]
    if held:
        named = ", ".join(f"{model.label} (H* {span(model.h_star, decimal)})" for model in held)
        return f"{said} What the paper says of its MLP, {of_its_mlp}, holds in every run of: {named}."
    levels = " or ".join(dict.fromkeys(span(model.h_star, decimal) for model in judged))
    return (
        f"{said} In none of these settings does every run do what the paper says of its MLP: {of_its_mlp} "
        f"(H* {levels})."
    )


NEAR_ZERO = 0.1
"""Test accuracy that still counts as near 0; chance is about 0.01."""

OUTCOMES = (
    "collapses, does not generalise",
    "groks",
    "half-way",
    "ends about H*, does not generalise",
    "dips, does not generalise",
    "does not collapse",
    "does not memorise",
    "does not generalise, no H* to judge by",
)
"""What a run can do; the first is what the paper says of its MLP. Half-way: test accuracy above 0.1, not grokked. Dips:
H falls below H* and is back above it over the last evaluations; collapses: it stays; about: within H*'s interval."""

COLLAPSES, ABOUT, DIPS = OUTCOMES[0], OUTCOMES[3], OUTCOMES[4]

LAST = 5
"""Evaluations at the end of a run whose median H says whether it has collapsed."""


@dataclass(frozen=True, eq=False)
class ModelRuns:
    """The runs of one model, `outcomes` as in `OUTCOMES` and `below` the first step with H under H*, by run.

    `h_star` is the Transformers', by which it is judged.
    """

    label: str
    runs: Runs
    h_star: Estimate
    below: Array
    outcomes: tuple[str, ...]

    @property
    def holds(self) -> Estimate:
        """Share of its runs that do what the paper says of its MLP."""
        return share(outcome == COLLAPSES for outcome in self.outcomes)

    @property
    def kind(self) -> str:
        """Which model, as the settings name it."""
        return str(self.runs.stored[0].config["model"])

    @property
    def fraction(self) -> float:
        """Share of the pairs that it is trained on."""
        return float(self.runs.stored[0].config["train_fraction"])

    def at_end(self, name: str) -> Array:
        """Values of a column at the end of each run."""
        return self.runs.at(name, self.runs.end)

    def aligned(self) -> Array:
        """First step of each run from which the alignment exceeds its null twice in a row after T_mem."""
        memorised = self.runs.step >= self.runs.t_mem[:, None]
        above = self.runs.column("alignment") > self.runs.column("alignment_null")
        return self.runs.first(above & memorised, in_a_row=2)

    def signals(self) -> dict[str, Array]:
        """Date, by what it is in words, each thing that may say that a run will grok: a step for each run."""
        runs = self.runs
        fall = leads.collapse(runs)
        chance = np.array([math.log(_classes(run)) for run in runs.stored])
        return {
            "alignment above its null": self.aligned(),
            "half of the variance between labels in five frequencies": runs.first(
                runs.column("top_share") > 0.5, in_a_row=2
            ),
            "restricted loss below half of chance": runs.first(
                runs.column("restricted_loss") < chance[:, None] / 2, in_a_row=2
            ),
            fall.source: fall.times,
            "H below the Transformers' H*": self.below,
        }


def _classes(run: StoredRun) -> int:
    return make_task(TrainConfig(**run.config)).classes


def outcomes_of(runs: Runs, h_star: Estimate) -> tuple[str, ...]:
    """Say which of `OUTCOMES` each run has, by the Transformers' H* with its interval, if it has one."""
    collapses, groks, half_way, about, dips, stays, never, unjudged = OUTCOMES
    low, high = (h_star.low, h_star.high) if h_star.bounded else (h_star.value, h_star.value)
    found = []
    for i, (_, accuracy, entropy) in enumerate(runs.lines(runs.test_accuracy, runs.entropy)):
        usable = entropy[~np.isnan(entropy)]
        if runs.grokked[i]:
            found.append(groks)
        elif np.isnan(runs.t_mem[i]):
            found.append(never)
        elif np.nanmax(accuracy) > NEAR_ZERO:
            found.append(half_way)
        elif not h_star.known or usable.size == 0:
            found.append(unjudged)
        elif (end := np.median(usable[-LAST:])) < low:
            found.append(collapses)
        elif end < high:
            found.append(about)
        else:
            found.append(dips if usable.min() < low else stays)
    return tuple(found)


def told(model: ModelRuns) -> str:
    """Say how many runs of a model do what, with the mean T_grok: "5 of 5 groks, T_grok 12,000 on average"."""
    parts = []
    for outcome in OUTCOMES:
        count = model.outcomes.count(outcome)
        if count:
            parts.append(f"{count} of {len(model.outcomes)} {outcome}")
    times = over(model.runs.t_grok)
    if times.known:
        parts.append(f"T_grok {steps(times.value)} on average")
    return ", ".join(parts)


def side_by_side(result: Sufficiency) -> Figure:
    """Accuracy, H and alignment of the models `shown`, one column a model."""
    models = result.shown
    figure, grid = _grid(models, 3, 7.8)
    for axes, model in zip(grid[0], models, strict=True):
        for step, train, test in model.runs.lines(model.runs.train_accuracy, model.runs.test_accuracy):
            axes.plot(step, train, color=LIGHT.train, linestyle=DASHED, linewidth=0.9)
            axes.plot(step, test, color=LIGHT.test, linewidth=1.1)
        axes.set(title=model.label, ylim=(-0.03, 1.05))
    for axes, model in zip(grid[1], models, strict=True):
        for i, (step, entropy) in enumerate(model.runs.lines(model.runs.entropy)):
            axes.plot(step, entropy, color=LIGHT.entropy, linewidth=1.1)
            mark(axes, step, entropy, model.runs.t_grok[i], GROK, LIGHT.ink)
        if model.h_star.known:
            axes.axhline(model.h_star.value, color=LIGHT.signal, linewidth=1.2, linestyle=DOTTED)
    for axes, model in zip(grid[2], models, strict=True):
        _columns(axes, model, "alignment_null", LIGHT.train, DOTTED)
        _columns(axes, model, "alignment", LIGHT.norm, "solid")
        axes.set_ylim(0, 1.03)
    _named(
        grid[0][0],
        "accuracy (share)",
        {"train accuracy": (LIGHT.train, DASHED), "test accuracy": (LIGHT.test, "solid")},
    )
    _named(
        grid[1][0],
        "H (normalised, no unit)",
        {"H": (LIGHT.entropy, "solid"), "H* of the Transformer": (LIGHT.signal, DOTTED)},
    )
    _named(
        grid[2][0],
        "alignment, max |r| (no unit)",
        {"alignment": (LIGHT.norm, "solid"), "its null, labels permuted": (LIGHT.train, DOTTED)},
    )
    return _with_legends(figure, grid)


def spectra(result: Sufficiency) -> Figure:
    """Shares of variance by label and frequency, and the progress measures, one column a model."""
    models = result.shown
    figure, grid = _grid(models, 2, 5.6)
    for axes, model in zip(grid[0], models, strict=True):
        _columns(axes, model, "label_share", LIGHT.test, DASHED)
        _columns(axes, model, "top_share", LIGHT.norm, "solid")
        axes.set(title=model.label, ylim=(-0.03, 1.05))
    for axes, model in zip(grid[1], models, strict=True):
        _columns(axes, model, "test_loss", LIGHT.train, DOTTED)
        _columns(axes, model, "restricted_loss", LIGHT.test, "solid")
        _columns(axes, model, "excluded_loss", LIGHT.signal, DASHED)
        axes.set_yscale("log")
    _named(
        grid[0][0],
        "share (no unit)",
        {"share between labels": (LIGHT.test, DASHED), "of it, five frequencies": (LIGHT.norm, "solid")},
    )
    _named(
        grid[1][0],
        "loss (nats)",
        {
            "restricted loss": (LIGHT.test, "solid"),
            "excluded loss": (LIGHT.signal, DASHED),
            "test loss": (LIGHT.train, DOTTED),
        },
    )
    return _with_legends(figure, grid)


def settings(models: Sequence[ModelRuns | None], columns: int = 3) -> Figure:
    """Test accuracy and H of every run, one panel a model, on one scale; None leaves a place empty."""
    columns = min(columns, len(models))
    rows = -(-len(models) // columns)
    figure = Figure(figsize=(WIDTH, 0.9 + 2.3 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    panels = grid.ravel()
    for axes, model in itertools.zip_longest(panels, models):
        if model is None:
            axes.set_visible(False)
            continue
        for step, test, entropy in model.runs.lines(model.runs.test_accuracy, model.runs.entropy):
            axes.plot(step, test, color=LIGHT.test, linewidth=1.1)
            axes.plot(step, entropy, color=LIGHT.entropy, linewidth=1.1, linestyle=DASHED)
        if model.h_star.known:
            axes.axhline(model.h_star.value, color=LIGHT.signal, linewidth=1.2, linestyle=DOTTED)
        axes.set(title=model.label, ylim=(-0.03, 1.05), xlabel="training step")
        axes.xaxis.set_major_formatter(thousands)
        axes.xaxis.set_major_locator(MaxNLocator(4))
    for row in grid:
        first = next(axes for axes in row if axes.get_visible())
        first.set_ylabel("accuracy; H (no unit)")
        first.tick_params(
            labelleft=True
        )  # a shared axis has its numbers at the left alone, even where that place is empty
    series = {
        "test accuracy": (LIGHT.test, "solid"),
        "H": (LIGHT.entropy, DASHED),
        "H* of the Transformer": (LIGHT.signal, DOTTED),
    }
    handles = [panels[0].plot([], [], color=c, linestyle=d, label=name)[0] for name, (c, d) in series.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, fontsize=9)
    return figure


def few_pairs(result: Sufficiency) -> Figure:
    """Draw `settings` of the models of few pairs, a row for each share of these, the MLP at the left."""
    panels = [kinds.get(kind) for kinds in _by_fraction(result).values() for kind in ("mlp", "transformer")]
    return settings(panels, columns=2)


def _grid(models: Sequence[ModelRuns], rows: int, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    grid = figure.subplots(rows, len(models), sharex="col", sharey="row", squeeze=False)
    for axes in grid[-1]:
        axes.set_xlabel("training step")
        axes.xaxis.set_major_formatter(thousands)
        axes.xaxis.set_major_locator(MaxNLocator(4))
    return figure, grid


def _columns(axes: Axes, model: ModelRuns, name: str, colour: str, dash: Any) -> None:
    for step, values in model.runs.lines(name):
        if not np.isnan(values).all():
            axes.plot(step, values, color=colour, linestyle=dash, linewidth=1.1)


def _named(axes: Axes, label: str, series: dict[str, tuple[str, Any]]) -> None:
    axes.set_ylabel(label)
    for name, (colour, dash) in series.items():
        axes.plot([], [], color=colour, linestyle=dash, label=name)


def _with_legends(figure: Figure, grid: Any) -> Figure:
    """Put what the first panel of each row names at the end of that row: two rows may use one colour."""
    for axes in grid:
        handles = axes[0].get_legend_handles_labels()[0]
        axes[-1].legend(handles=handles, loc="upper left", bbox_to_anchor=(1.02, 1.0), borderaxespad=0)
    return figure


def section(result: Sufficiency) -> Section:
    """E7's part of the report."""
    blocks: list[Block] = [
        Text(
            "The paper's MLP, which it does not describe, memorises, loses entropy and never generalises; hence "
            '"necessary but not sufficient". Here are MLPs, as far as they were run, trained longer than the '
            "Transformers of E1, with the settings of E1 but for what each is named by. What a run does: half-way, its "
            f"test accuracy exceeds {NEAR_ZERO:g} and it does not grok; collapses, H is below the interval of H* at "
            "the end; about H*, within it."
        ),
        *_few_blocks(result),
        _models_table(result.models),
        drawn(
            "e7-models",
            functools.partial(side_by_side, result),
            "In the manner of the paper's Figure 9: the Transformer, the MLPs with its settings and that of the "
            f"paper's p = {FEW} and share of the pairs, as far as they were run, one line a run. "
            "Circles: T_grok. Bottom: the paper's Fourier alignment, and the largest of 19 values that it takes "
            "for permuted labels.",
            "Accuracy, spectral entropy and Fourier alignment against the training step, one column a model.",
        ),
        Text(
            "The alignment is the largest of some ten thousand correlations, so it is never near 0: for permuted "
            f"labels it is {_null(result)} in these runs. A share of variance has a plain null: with no structure "
            "five of 48 frequencies have a tenth, and a little more for being the largest."
        ),
        drawn(
            "e7-spectra",
            functools.partial(spectra, result),
            "Above: share of the variance of test representations that lies between labels, and the share of that "
            "in the five strongest frequencies of the label. Below: cross-entropy with the logits restricted to the "
            "five key frequencies of the moment, without them, and on the test set, after Nanda et al. 2023.",
            "Shares of variance and losses against the training step, one column a model.",
        ),
        _signals_table(result.shown),
        Text(
            "The first three need the group and the labels, of the training probe, of the test set and of all pairs; "
            "the last two the representations alone. What comes in runs that never grok too is no warning."
        ),
        *compared("e7", {model.label: model.runs for model in (*result.models, *result.own)}),
        *(
            [
                drawn(
                    "e7-settings",
                    functools.partial(settings, result.mlps),
                    "Every MLP, one line a run.",
                    "Test accuracy and spectral entropy against the training step, one panel a setting.",
                )
            ]
            if result.mlps
            else []
        ),
        _runs_table((*result.models, *result.few)),
    ]
    return Section("e7", TITLE, tuple(blocks))


def _few_blocks(result: Sufficiency) -> list[Block]:
    if not result.few:
        return []
    return [
        Text(
            f"The paper's MLP is of p = {FEW}, whose {FEW**2:,} pairs leave few to learn from. Below are an MLP and "
            "the Transformer by the share of these pairs that they are trained on, as far as they were run; H* is that "
            "of all these Transformers together. Where less than 512 pairs are trained on, H is of those alone, "
            "and reads lower than that of E1's probe."
        ),
        _models_table(result.few),
        drawn(
            "e7-few-pairs",
            functools.partial(few_pairs, result),
            f"The models at p = {FEW}, one line a run, a row for each share of the pairs that they are trained on.",
            "Test accuracy and spectral entropy against the training step, one panel a model and share of the pairs.",
        ),
    ]


def _models_table(models: Sequence[ModelRuns]) -> Table:
    """Make a table of models that are judged by one H*."""
    rows = []
    for model in models:
        runs = model.runs
        start, memorised, end = (runs.at(runs.entropy, at) for at in (runs.start, runs.t_mem, runs.end))
        shown = (start, memorised, runs.h_star, end)
        ends = (model.at_end(name) for name in ("alignment", "alignment_null", "top_share"))
        rows.append(
            (
                model.label,
                told(model),
                *(span(over(h, least=0, most=1), decimal) for h in shown),
                f"{(~np.isnan(model.below)).sum()} of {len(runs)}",
                span(over(runs.at(runs.test_accuracy, runs.end), least=0, most=1), percent),
                *(span(over(values, least=0, most=1), _two) for values in ends),
            )
        )
    caption = (
        "Models, means over their runs with 95 % intervals where there are three. "
        f"H*: the Transformers' mean H at T_grok, {worded(models[0].h_star, '')}. A run collapses if H ends "
        f"below its interval (median of the last {LAST} evaluations) and dips if H was there before; "
        f"it does not generalise if test accuracy never exceeds {percent(NEAR_ZERO)}."
    )
    columns = (
        *("model", "runs", "H at start", "H at T_mem", "H at T_grok", "H at end", "H below H*"),
        *("test accuracy at end", "alignment at end", "its null", "five frequencies at end"),
    )
    return Table(caption, columns, tuple(rows))


def _signals_table(models: Sequence[ModelRuns]) -> Table:
    rows = []
    for model in models:
        runs, grokked = model.runs, model.runs.grokked
        if not len(runs):
            continue
        for signal, times in model.signals().items():
            found = runs.t_grok - times
            silent = (~np.isnan(times) & ~grokked).sum()
            rows.append(
                (
                    model.label,
                    signal,
                    counted(share(found[grokked] > 0)),
                    worded(over(found)),
                    NONE if grokked.all() else f"{silent} of {(~grokked).sum()}",
                )
            )
    caption = (
        "What moves first: steps from each signal to T_grok. A signal of columns counts from the first of two "
        "evaluations in a row."
    )
    columns = ("model", "signal", "before T_grok", "lead", "signal, but not grokked")
    return Table(caption, columns, tuple(rows))


def _null(result: Sufficiency) -> str:
    """Mean over runs and evaluations of what the alignment is for permuted labels."""
    rows = (values for model in result.models for values in model.runs.column("alignment_null_mean"))
    return worded(over(map(mean_known, rows), least=0, most=1), "", 2)


def _two(value: float) -> str:
    return decimal(value, 2)


def _runs_table(models: Sequence[ModelRuns]) -> Table:
    rows = []
    for model in models:
        runs = model.runs
        further = [
            (runs.at(name, runs.t_mem), model.at_end(name))
            for name in ("alignment", "label_share", "top_share", "restricted_loss", "excluded_loss")
        ]
        aligned, gini = model.aligned(), model.at_end("embedding_gini")
        for i, outcome in enumerate(model.outcomes):
            pairs = [f"{_two(mem[i])} → {_two(end[i])}" for mem, end in further]
            rows.append(
                (
                    model.label,
                    str(runs.seeds[i]),
                    outcome,
                    steps(runs.t_mem[i]),
                    steps(runs.t_grok[i]),
                    steps(model.below[i]),
                    steps(aligned[i]),
                    *(NONE if pair == f"{NONE} → {NONE}" else pair for pair in pairs),
                    _two(gini[i]),
                    steps(runs.end[i]),
                )
            )
    caption = (
        "Every run. T_align: from here on after T_mem the alignment exceeds its null twice in a row. Arrows lead "
        "from T_mem to the end of the run. Gini: of the embedding's spectrum. Losses in nats."
    )
    columns = (
        *(
            "model",
            "seed",
            "outcome",
            "T_mem",
            "T_grok",
            "H below H*",
            "T_align",
            "alignment",
            "between labels",
        ),
        *("five frequencies", "restricted loss", "excluded loss", "Gini", "last step"),
    )
    return Table(caption, columns, tuple(rows), (1, 3, 4, 5, 6, 12, 13))


EXPERIMENT = Experiment(
    "e7",
    "Is the collapse sufficient? MLP against Transformer.",
    ("e1", "e7"),
    analyse,
    headline,
    claims,
    section,
)
