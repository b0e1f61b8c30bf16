"""E7, the question whether the collapse of the entropy is sufficient for grokking.

MLPs of `fastent.grokking.experiments.jobs` beside E1's Transformers (paper, section 11 and Figure 9). The paper says of
one MLP, which it does not describe, that H collapses well below H* while test accuracy stays near 0 for 80,000 steps,
and explains it by a Fourier alignment near 0. The claim is about a model, so it is asked of each of ours: does H fall
below the Transformer's H*, and does the model nonetheless not generalise? The alignment is a maximum over some ten
thousand correlations and never near 0, so it is set beside its null (`fastent.train.spectra`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastent.grokking.experiments import leads
from fastent.grokking.experiments.claims import (
    NONE,
    Finding,
    Findings,
    counted,
    decimal,
    judge_share,
    percent,
    span,
    steps,
    worded,
)
from fastent.grokking.experiments.data import StoredRun, column, over, values_at
from fastent.grokking.experiments.delays import Group
from fastent.grokking.experiments.document import Block, Section, Table, Text, Verdict
from fastent.grokking.experiments.e1_lead import paper_window
from fastent.grokking.experiments.figures import GROK, LIGHT, WIDTH, drawn
from fastent.grokking.experiments.jobs import MLPS
from fastent.grokking.experiments.statistics import Estimate, proportion
from fastent.train.presets import TrainConfig
from fastent.train.quantities import WINDOW, Array, MeasuredRun, first_below, first_reaching
from fastent.train.tasks import make_task

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


def claims(result: Sufficiency) -> Findings:
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
    return {
        "e7.mlp": Finding(
            _said_of(result.plainest), Verdict.NOT_RUN if result.h_star is None else judge_share(plain)
        ),
        "e7.insufficient": Finding(_said_of_some(result, held), _judge_some(result)),
        "e7.necessary": Finding(counted(grokked), judge_share(grokked)),
        "e7.memorised_by": Finding(counted(early), judge_share(early)),
        "e7.alignment": Finding(
            f"at the end {_range(result.mlps)}; at most its null in {counted(aligned)}", judge_share(aligned)
        ),
        "e7.alignment_grows": Finding(counted(grows), judge_share(grows)),
    }


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
        return Verdict.NOT_RUN
    shares = [model.holds.value for model in result.mlps]
    if max(shares) == 1:
        return Verdict.REPRODUCED
    return Verdict.IN_PART if max(shares) > 0 or _crossing(result) else Verdict.NOT_REPRODUCED


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


NEAR_ZERO = 0.1
"""Test accuracy that still counts as near 0; chance is about 0.01."""

OUTCOMES = (
    "collapses, does not generalise",
    "groks",
    "half-way",
    "dips, does not generalise",
    "does not collapse",
    "does not memorise",
    "does not generalise, no H* to judge by",
)
"""What a run can do; the first is what the paper says of its MLP. Half-way: test accuracy above 0.1, not grokked. Dips:
H falls below H* and is back above it over the last evaluations; collapses: it stays."""

COLLAPSES, DIPS = OUTCOMES[0], OUTCOMES[3]

LAST = 5
"""Evaluations at the end of a run whose median H says whether it has collapsed."""


@dataclass(frozen=True)
class Model:
    """The runs of one model, `outcomes` as in `OUTCOMES` and `below` the first step with H under H*, by run."""

    label: str
    group: Group
    below: tuple[int | None, ...]
    outcomes: tuple[str, ...]

    @property
    def holds(self) -> Estimate:
        """Share of its runs that do what the paper says of its MLP."""
        return proportion(self.outcomes.count(COLLAPSES), len(self.outcomes))

    def at_end(self, name: str) -> list[float | None]:
        """Values of a column at the end of each run."""
        ends = [run.summary.last_step for run in self.group.measured]
        return values_at(self.group.stored, self.group.measured, name, ends)

    def at_mem(self, name: str) -> list[float | None]:
        """Values of a column at T_mem of each run."""
        ends = [run.summary.t_mem for run in self.group.measured]
        return values_at(self.group.stored, self.group.measured, name, ends)

    def aligned(self) -> list[int | None]:
        """First step of each run from which the alignment exceeds its null twice in a row after T_mem."""
        return [
            None
            if run.summary.t_mem is None
            else _twice(run, column(stored, "alignment"), _null_of(stored, run))
            for stored, run in zip(self.group.stored, self.group.measured, strict=True)
        ]

    def signals(self) -> dict[str, list[int | None]]:
        """Date, by what it is in words, each thing that may say that a run will grok: a step for each run."""
        runs = list(zip(self.group.stored, self.group.measured, strict=True))
        falls = leads.collapse(self.group.measured, window=paper_window(self.group.measured) or WINDOW)
        chance = [math.log(_classes(stored)) for stored, _ in runs]
        return {
            "alignment above its null": self.aligned(),
            "half of the variance between labels in five frequencies": [
                _twice(run, column(stored, "top_share"), 0.5) for stored, run in runs
            ],
            "restricted loss below half of chance": [
                _twice(run, _negative(column(stored, "restricted_loss")), -loss / 2)
                for (stored, run), loss in zip(runs, chance, strict=True)
            ],
            falls.source: list(falls.times),
            "H below the Transformers' H*": list(self.below),
        }


def _null_of(stored: StoredRun, run: MeasuredRun) -> Array:
    """Return the alignment's null from T_mem on; before, nothing exceeds it."""
    null = column(stored, "alignment_null")
    missing = np.full(len(run.trajectory.step), np.inf)
    return (
        missing if null is None else np.where(run.trajectory.step >= (run.summary.t_mem or 0), null, np.inf)
    )


def _negative(values: Array | None) -> Array | None:
    return None if values is None else -values


def _twice(run: MeasuredRun, values: Array | None, level: Array | float) -> int | None:
    """Step of the first of two evaluations in a row with values above `level`; None if there is none."""
    if values is None:
        return None
    return first_reaching(run.trajectory.step, np.where(values > level, 1.0, 0.0), 1.0, in_a_row=2)


def _classes(run: StoredRun) -> int:
    return make_task(TrainConfig(**run.config)).classes


def outcome_of(run: MeasuredRun, h_star: Estimate | None) -> str:
    """Say which of `OUTCOMES` a run has, H* being the Transformers' mean; None if there is none."""
    collapses, groks, half_way, dips, stays, never, unjudged = OUTCOMES
    entropy = run.trajectory.entropy[~np.isnan(run.trajectory.entropy)]
    if run.summary.t_grok is not None:
        return groks
    if run.summary.t_mem is None:
        return never
    if np.nanmax(run.trajectory.test_accuracy) > NEAR_ZERO:
        return half_way
    if h_star is None or entropy.size == 0:
        return unjudged
    if np.median(entropy[-LAST:]) < h_star.value:
        return collapses
    return dips if entropy.min() < h_star.value else stays


def told(model: Model) -> str:
    """Say how many runs of a model do what, with the mean T_grok: "5 of 5 groks, T_grok 12,000 on average"."""
    parts = []
    for outcome in OUTCOMES:
        count = model.outcomes.count(outcome)
        if count:
            parts.append(f"{count} of {len(model.outcomes)} {outcome}")
    times = over([run.summary.t_grok for run in model.group.measured])
    if times is not None:
        parts.append(f"T_grok {steps(times.value)} on average")
    return ", ".join(parts)


DASHED: Any = (0, (5, 2))
DOTTED: Any = (0, (1, 2))


def side_by_side(result: Sufficiency) -> Figure:
    """Accuracy, H and alignment of the Transformer and of the plainest MLPs, one column a model."""
    models = (result.transformer, *result.plainest)
    figure, grid = _grid(models, 3, 7.8)
    for axes, model in zip(grid[0], models, strict=True):
        for run in model.group.measured:
            step = run.trajectory.step
            axes.plot(step, run.trajectory.train_accuracy, color=LIGHT.train, linestyle=DASHED, linewidth=0.9)
            axes.plot(step, run.trajectory.test_accuracy, color=LIGHT.test, linewidth=1.1)
        axes.set(title=model.label, ylim=(-0.03, 1.05))
    for axes, model in zip(grid[1], models, strict=True):
        for run in model.group.measured:
            axes.plot(run.trajectory.step, run.trajectory.entropy, color=LIGHT.entropy, linewidth=1.1)
            here = run.trajectory.step == run.summary.t_grok
            axes.plot(run.trajectory.step[here], run.trajectory.entropy[here], color=LIGHT.ink, **GROK)
        if result.h_star is not None:
            axes.axhline(result.h_star.value, color=LIGHT.signal, linewidth=1.2, linestyle=DOTTED)
    for axes, model in zip(grid[2], models, strict=True):
        _columns(axes, model, "alignment_null", LIGHT.train, DOTTED)
        _columns(axes, model, "alignment", LIGHT.norm, "solid")
        axes.set_ylim(0, 1.03)
    _named(grid[0][0], "accuracy (share)", {"train": (LIGHT.train, DASHED), "test": (LIGHT.test, "solid")})
    _named(
        grid[1][0],
        "H (normalised, no unit)",
        {"H": (LIGHT.entropy, "solid"), "H* of the Transformer": (LIGHT.signal, DOTTED)},
    )
    _named(
        grid[2][0],
        "alignment, max |r| (no unit)",
        {"training probe": (LIGHT.norm, "solid"), "labels permuted": (LIGHT.train, DOTTED)},
    )
    return figure


def spectra(result: Sufficiency) -> Figure:
    """Shares of variance by label and frequency, and the progress measures, one column a model."""
    models = (result.transformer, *result.plainest)
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
        {"between labels": (LIGHT.test, DASHED), "of it, five frequencies": (LIGHT.norm, "solid")},
    )
    _named(
        grid[1][0],
        "loss (nats)",
        {
            "restricted": (LIGHT.test, "solid"),
            "excluded": (LIGHT.signal, DASHED),
            "test": (LIGHT.train, DOTTED),
        },
    )
    return figure


def settings(result: Sufficiency) -> Figure:
    """Test accuracy and H of every run, one panel a setting, on one scale."""
    columns = min(3, len(result.mlps))
    rows = -(-len(result.mlps) // columns)
    figure = Figure(figsize=(WIDTH, 0.9 + 2.3 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    panels = grid.ravel()
    for axes, model in zip(panels, result.mlps, strict=False):
        for run in model.group.measured:
            axes.plot(run.trajectory.step, run.trajectory.test_accuracy, color=LIGHT.test, linewidth=1.1)
            axes.plot(
                run.trajectory.step,
                run.trajectory.entropy,
                color=LIGHT.entropy,
                linewidth=1.1,
                linestyle=DASHED,
            )
        if result.h_star is not None:
            axes.axhline(result.h_star.value, color=LIGHT.signal, linewidth=1.2, linestyle=DOTTED)
        axes.set(title=model.label, ylim=(-0.03, 1.05), xlabel="training step")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.xaxis.set_major_locator(_few())
    for axes in panels[len(result.mlps) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("accuracy; H (no unit)")
    series = {
        "test accuracy": (LIGHT.test, "solid"),
        "H": (LIGHT.entropy, DASHED),
        "H* of the Transformer": (LIGHT.signal, DOTTED),
    }
    handles = [panels[0].plot([], [], color=c, linestyle=d, label=name)[0] for name, (c, d) in series.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, fontsize=9)
    return figure


def _few() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(4)


def _grid(models: Sequence[Model], rows: int, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    grid = figure.subplots(rows, len(models), sharex="col", sharey="row", squeeze=False)
    for axes in grid[-1]:
        axes.set_xlabel("training step")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.xaxis.set_major_locator(_few())
    return figure, grid


def _columns(axes: Axes, model: Model, name: str, colour: str, dash: Any) -> None:
    for stored, run in zip(model.group.stored, model.group.measured, strict=True):
        values = column(stored, name)
        if values is not None:
            axes.plot(run.trajectory.step, values, color=colour, linestyle=dash, linewidth=1.1)


def _named(axes: Axes, label: str, series: dict[str, tuple[str, Any]]) -> None:
    axes.set_ylabel(label)
    for name, (colour, dash) in series.items():
        axes.plot([], [], color=colour, linestyle=dash, label=name)
    axes.legend(loc="best")


def section(result: Sufficiency) -> Section:
    """E7's part of the report."""
    blocks: list[Block] = [
        Text(
            "The paper's MLP, which it does not describe, memorises, loses entropy and never generalises; hence "
            '"necessary but not sufficient". Here are MLPs of several kinds, trained longer than the '
            "Transformers of E1, with the settings of E1 but for what each is named by."
        ),
        _models_table(result),
        drawn(
            "e7-models",
            functools.partial(side_by_side, result),
            "In the manner of the paper's Figure 9: the Transformer and the MLPs with its settings, one line a run. "
            "Circles: T_grok. Bottom: the paper's Fourier alignment, and the largest of 19 values that it takes "
            "for permuted labels.",
            "Accuracy, spectral entropy and Fourier alignment against the training step, one column a model.",
        ),
        Text(
            "The alignment is the largest of some ten thousand correlations, so it is never near 0: for permuted "
            f"labels it is {_null(result)} in these runs. "
            "A share of variance has a plain null: with no structure five of 48 frequencies have a tenth, and a "
            "little more for being the largest."
        ),
        drawn(
            "e7-spectra",
            functools.partial(spectra, result),
            "Above: share of the variance of test representations that lies between labels, and the share of that "
            "in the five strongest frequencies of the label. Below: cross-entropy with the logits restricted to the "
            "five key frequencies of the moment, without them, and on the test set, after Nanda et al. 2023.",
            "Shares of variance and losses against the training step, one column a model.",
        ),
        _signals_table((result.transformer, *result.plainest)),
        Text(
            "The first three need the group and the labels, of the training probe, of the test set and of all pairs; "
            "the last two the representations alone. They say what is learnt before the test accuracy moves, the "
            "entropy how much of the representation is that."
        ),
        drawn(
            "e7-settings",
            functools.partial(settings, result),
            "Every MLP, one line a run.",
            "Test accuracy and spectral entropy against the training step, one panel a setting.",
        ),
        _runs_table([result.transformer, *result.mlps]),
    ]
    return Section("e7", TITLE, tuple(blocks))


def _models_table(result: Sufficiency) -> Table:
    rows = []
    for model in (result.transformer, *result.mlps):
        runs = model.group.measured
        shown = (
            over([r.summary.entropy_start for r in runs]),
            over([r.summary.h_star for r in runs]),
            over([r.summary.entropy_end for r in runs]),
        )
        rows.append(
            (
                model.label,
                told(model),
                *(span(h, decimal) for h in shown),
                f"{sum(t is not None for t in model.below)} of {len(runs)}",
                span(over([r.summary.test_accuracy_end for r in runs]), percent),
                *(
                    span(over(model.at_end(name)), _two)
                    for name in ("alignment", "alignment_null", "top_share")
                ),
            )
        )
    caption = (
        "Models, means over their runs with 95 % intervals where there are three. "
        f"H*: the Transformers' mean H at T_grok, {worded(result.h_star, '')}. A run collapses if H ends "
        f"below it (median of the last {LAST} evaluations) and dips if H was below it before; "
        f"it does not generalise if test accuracy never exceeds {percent(NEAR_ZERO)}."
    )
    columns = (
        *("model", "runs", "H at start", "H at T_grok", "H at end", "H below H*"),
        *("test accuracy at end", "alignment at end", "its null", "five frequencies at end"),
    )
    return Table(caption, columns, tuple(rows))


def _signals_table(models: Sequence[Model]) -> Table:
    rows = []
    for model in models:
        if not model.group.stored:
            continue
        grokked = [run.summary.t_grok for run in model.group.measured]
        n = sum(t is not None for t in grokked)
        for signal, times in model.signals().items():
            found = [
                None if t is None or at is None else t - at for t, at in zip(grokked, times, strict=True)
            ]
            known = [x for x in found if x is not None]
            silent = [at for t, at in zip(grokked, times, strict=True) if t is None and at is not None]
            rows.append(
                (
                    model.label,
                    signal,
                    counted(proportion(sum(x > 0 for x in known), n)) if n else NONE,
                    worded(over(known)),
                    f"{len(silent)} of {len(grokked) - n}" if n < len(grokked) else NONE,
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
    means = [
        float(np.nanmean(values))
        for model in (result.transformer, *result.mlps)
        for run in model.group.stored
        if (values := column(run, "alignment_null_mean")) is not None
    ]
    return worded(over(means), "", 2)


def _two(value: float | None) -> str:
    return decimal(value, 2)


def _runs_table(models: Sequence[Model]) -> Table:
    rows = []
    for model in models:
        further = {
            name: (model.at_mem(name), model.at_end(name))
            for name in ("alignment", "label_share", "top_share", "restricted_loss", "excluded_loss")
        }
        aligned, gini = model.aligned(), model.at_end("embedding_gini")
        for i, (run, outcome) in enumerate(zip(model.group.measured, model.outcomes, strict=True)):
            s = run.summary
            pairs = [f"{_two(mem[i])} → {_two(end[i])}" for mem, end in further.values()]
            rows.append(
                (
                    model.label,
                    str(run.seed),
                    outcome,
                    steps(s.t_mem),
                    steps(s.t_grok),
                    steps(model.below[i]),
                    steps(aligned[i]),
                    *(NONE if pair == f"{NONE} → {NONE}" else pair for pair in pairs),
                    _two(gini[i]),
                    steps(s.last_step),
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
