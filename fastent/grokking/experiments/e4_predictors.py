"""E4, norm against entropy: whether they are the same thing, and which predicts the steps that remain.

Analysis of E1's runs (paper, section 7, Figure 4a, Table 2). The paper gives a weak negative correlation of norm and H,
finds "pairs of checkpoints with nearly identical norms but very different entropies", and ranks predictors by the R2 of
a power law for the remaining time.

A correlation over all evaluations of all runs mixes the common course of training with what ties the two together; so
it is also taken within each run, within the plateau, and between changes from one evaluation to the next.

Every predictor is fitted at the same evaluations, those before grokking with H above the mean H*, by least squares of
`remaining = a x^gamma + b`, gamma within `fastent.forecast.power_law.GAMMA_BOUNDS`, a and b of either sign: a norm may
rise or fall towards grokking. R2 is given in sample, as the paper's, and for runs left out of the fit and of the
constants (H*, the norm at grokking). In every run the remaining steps fall by one a step, so the clock, which needs no
measurement of the network, explains much of them. The difference of R2 on runs left out is paired over runs: a run
weighs in by what its squared errors differ.

The paper's second version sets H beside the Fourier alignment of the covariance's leading eigenvectors
(`fastent.grokking.train.measures`) and finds that they go against each other before grokking; its rho is read as
Spearman's, within each run.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy import stats

from fastent.forecast.power_law import GAMMA_BOUNDS, fit_line
from fastent.grokking.experiments.claims import (
    CLAIMS,
    NONE,
    Experiment,
    Finding,
    Findings,
    decimal,
    judge,
    judge_positive,
    judge_within,
    least,
    percent,
    span,
    steps,
    worded,
)
from fastent.grokking.experiments.data import Runs
from fastent.grokking.experiments.document import Block, Section, Table, Text, Verdict
from fastent.grokking.experiments.figures import GROK, LIGHT, WIDTH, drawn, legend_above
from fastent.grokking.experiments.statistics import (
    CORRELATION,
    EXPLAINED,
    UNKNOWN,
    Array,
    Estimate,
    Mask,
    jackknife,
    less,
    mean_known,
    over,
)

TITLE = "E4: norm against entropy"


@dataclass(frozen=True, eq=False)
class Predictors:
    """Analysis of E4.

    `table` is empty with fewer than three runs that grokked; `points` counts the evaluations in its fits.
    """

    runs: Runs
    correlations: Correlations
    pairs: Pairs
    table: tuple[Predictor, ...]
    points: int
    alignment: Alignment


def analyse(runs: Runs) -> Predictors | None:
    """Correlations, pairs of checkpoints and predictors of E1's runs; None without any."""
    runs = runs.select("e1")
    if not len(runs):
        return None
    data = Evaluations.of(runs)
    return Predictors(
        runs=runs,
        correlations=correlations(runs),
        pairs=pairs(runs),
        table=table(data),
        points=data.remaining.size,
        alignment=alignment(runs),
    )


def claims(result: Predictors) -> Findings:
    """Each claim of the paper that E4 speaks to, beside what E1's runs say."""
    r = result.correlations
    rows = {row.name: row for row in result.table}
    gap = rows[ENTROPY_GAP].in_sample if rows else UNKNOWN
    return {
        "e4.correlation": Finding(f"r = {worded(r.papers, '')}", _judge_weak(r.papers, "e4.correlation")),
        "e4.correlation_whole": Finding(
            f"r = {worded(r.overall, '')}; within runs {worded(r.within, '')}; of changes {worded(r.changes, '')}",
            _judge_weak(r.overall, "e4.correlation_whole"),
        ),
        "e4.pairs": Finding(
            f"of {result.pairs.count:,} pairs within 1 % in norm {percent(result.pairs.far_entropy)} are more than 0.1 "
            f"apart in H and {percent(result.pairs.far_accuracy)} more than 0.5 in test accuracy",
            _judge_pairs(result.pairs),
        ),
        "e4.gap_r2": CLAIMS["e4.gap_r2"].finding(gap, comparable=result.runs.comparable, unit=""),
        "e4.beats_norms": Finding(_listed(rows, (ENTROPY_GAP, NORM, NORM_GAP)), _judge_best(rows)),
        "e4.seven": Finding(_listed(rows, SEVEN), _judge_seven(rows)),
        "e4.alignment": Finding(
            _against_alignment(result.alignment),
            CLAIMS["e4.alignment"].judge(result.alignment.rho, comparable=result.runs.comparable),
        ),
        "e4.beats_clock": Finding(_beyond_clock(rows), judge_positive(_advantage(rows))),
    }


def _against_alignment(found: Alignment) -> str:
    if not found.rho.known:
        return "not recorded in these runs: `fastent run e1 --preset paper` records it"
    first, last = (f"({decimal(h.value, 2)}, {decimal(a.value, 2)})" for h, a in (found.first, found.last))
    return f"ρ = {worded(found.rho, '')}; (H, alignment) from {first} at the start to {last} at T_grok"


def _judge_weak(r: Estimate, name: str) -> Verdict:
    claim = CLAIMS[name]
    return judge_within(less(r, Estimate(claim.number)), claim.margin)


def _judge_pairs(pairs: Pairs) -> Verdict:
    return judge(pairs.count > 0, pairs.far_entropy > 0 and pairs.far_accuracy > 0, False)


def _judge_best(rows: dict[str, Predictor]) -> Verdict:
    if not rows:
        return Verdict.NOT_RUN
    return least(*_beyond(rows, (NORM, NORM_GAP)))


def _beyond(rows: dict[str, Predictor], names: Sequence[str]) -> list[Verdict]:
    """Judge whether the gap's R2 in sample exceeds each of the others', by what leaving out runs does to both."""
    gap = rows[ENTROPY_GAP]
    return [
        judge_positive(
            jackknife(
                gap.in_sample.value - other.in_sample.value,
                [a - b for a, b in zip(gap.replicates, other.replicates, strict=True)],
            )
        )
        for other in (rows[name] for name in names)
    ]


def _judge_seven(rows: dict[str, Predictor]) -> Verdict:
    if not rows:
        return Verdict.NOT_RUN
    _, *others = SEVEN
    beyond = (less(rows[name].in_sample, Estimate(CLAIMS["e4.seven"].number)) for name in others)
    low = (judge_positive(dataclasses.replace(each, low=-each.high, high=-each.low)) for each in beyond)
    both = {least(*_beyond(rows, others)), least(*low)}
    if len(both) == 1:
        return both.pop()
    return Verdict.IN_PART if Verdict.REPRODUCED in both else Verdict.UNDECIDED


def _listed(rows: dict[str, Predictor], names: Sequence[str]) -> str:
    return "; ".join(f"{name}: {decimal(rows[name].in_sample.value)}" for name in names) if rows else NONE


def _advantage(rows: dict[str, Predictor]) -> Estimate:
    return rows[ENTROPY_GAP].advantage if rows else UNKNOWN


def _beyond_clock(rows: dict[str, Predictor]) -> str:
    if not rows:
        return NONE
    gap, clock = rows[ENTROPY_GAP], rows[CLOCK]
    return (
        f"runs left out: {decimal(gap.left_out)}, the clock {decimal(clock.left_out)}; difference, paired over "
        f"runs: {worded(gap.advantage, '')}"
    )


NEARLY_NORM = 0.01
"""Relative difference below which two norms count as nearly identical. Ours: the paper gives none."""

PAPER_TAIL = 1200
"""Steps that the paper's runs go on after T_grok, by its 1,556 evaluations of ten runs, 1,436 of them before."""

NEARLY_ENTROPY = 0.005
"""Difference below which two entropies count as nearly identical. Ours."""


@dataclass(frozen=True)
class Correlations:
    """Pearson's r of norm and H.

    `papers`: all evaluations of all runs until 1,200 steps after T_grok, where the paper's runs end; `overall`: all
    evaluations of all runs; `within`: mean over runs of each run's own; `plateau`: the same between
    T_mem and T_grok; `changes`: mean over runs of the r of their changes from one evaluation to the next;
    `changes_plateau`: the same on the plateau; `ranks`: Spearman's rho of all evaluations.
    """

    papers: Estimate
    overall: Estimate
    within: Estimate
    plateau: Estimate
    changes: Estimate
    changes_plateau: Estimate
    ranks: Estimate


LEADING = "leading_alignment"


@dataclass(frozen=True)
class Alignment:
    """H beside the alignment of the leading eigenvectors, over the runs that recorded it; unknown where none did.

    `rho`: Spearman's of the two within each run, at its evaluations before T_grok. `first` and `last`: H and alignment
    at the first evaluation and at T_grok.
    """

    rho: Estimate
    first: tuple[Estimate, Estimate]
    last: tuple[Estimate, Estimate]


def alignment(runs: Runs) -> Alignment:
    """Set H of `runs` beside the alignment of the leading eigenvectors."""
    columns = runs.entropy, runs.column(LEADING)
    before = runs.step < runs.t_grok[:, None]
    both = before & ~np.isnan(columns[0] + columns[1])
    ranks = ([stats.rankdata(column[i][kept]) for column in columns] for i, kept in enumerate(both))

    def at(step: Array) -> tuple[Estimate, Estimate]:
        h, aligned = (runs.at(column, step) for column in columns)
        return over(h[~np.isnan(aligned)]), over(aligned)

    return Alignment(over(_pearson(*pair) for pair in ranks), at(runs.start), at(runs.t_grok))


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of one run."""

    seed: int
    step: int
    norm: float
    entropy: float
    test_accuracy: float


@dataclass(frozen=True)
class Pairs:
    """Pairs of evaluations, of any runs, that are alike in the norm or in H.

    Of the `count` pairs whose norms differ by less than 1 %: `far_entropy`, the share whose H differ by more than
    0.1; `far_accuracy`, that more than one half apart in test accuracy; `widest`, the pairs furthest apart in H, one
    for each pair of seeds at most. `same_entropy` is the mirror image: of the pairs whose H differ by less than
    0.005, the share more than one half apart in test accuracy. NaN where there is no pair.
    """

    count: int
    far_entropy: float
    far_accuracy: float
    widest: tuple[tuple[Evaluation, Evaluation], ...]
    same_entropy: float


def _pearson(a: Array, b: Array) -> float:
    if a.size < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def _usable(runs: Runs, within: Mask | None = None) -> list[tuple[Array, Array]]:
    """Norm and H of each run's usable evaluations, those of a mask (n, m) alone if one is given."""
    kept = ~np.isnan(runs.entropy + runs.norm) & (True if within is None else within)
    return [(norm[k], h[k]) for norm, h, k in zip(runs.norm, runs.entropy, kept, strict=True)]


def correlations(runs: Runs) -> Correlations:
    """Correlate norm and H of `runs`, at least one; intervals leave out runs, or are over them."""
    start, end = (np.where(np.isnan(at), runs.end, at)[:, None] for at in (runs.t_mem, runs.t_grok))
    whole, plateau = _usable(runs), _usable(runs, (runs.step >= start) & (runs.step <= end))

    def pooled(parts: list[tuple[Array, Array]], correlate: Callable[[Array, Array], float]) -> Estimate:
        def of(parts: Sequence[tuple[Array, Array]]) -> float:
            return correlate(*(np.concatenate(column) for column in zip(*parts, strict=True)))

        left_out = [of(parts[:i] + parts[i + 1 :]) for i in range(len(parts))] if len(parts) > 1 else []
        return jackknife(of(parts), left_out, CORRELATION)

    return Correlations(
        papers=pooled(_usable(runs, runs.step <= end + PAPER_TAIL), _pearson),
        overall=pooled(whole, _pearson),
        within=over((_pearson(*part) for part in whole), least=-1, most=1),
        plateau=over((_pearson(*part) for part in plateau), least=-1, most=1),
        changes=over((_pearson(*map(np.diff, part)) for part in whole), least=-1, most=1),
        changes_plateau=over((_pearson(*map(np.diff, part)) for part in plateau), least=-1, most=1),
        ranks=pooled(whole, lambda a, b: _pearson(stats.rankdata(a), stats.rankdata(b))),
    )


def pairs(runs: Runs, widest: int = 5) -> Pairs:
    """Look at all pairs of evaluations of `runs`; name the `widest`."""
    tables = (runs.step, runs.norm, runs.entropy, runs.test_accuracy)
    seeds = np.broadcast_to(np.array(runs.seeds, dtype=np.float64)[:, None], runs.step.shape)
    rows = np.stack([each.ravel() for each in (seeds, *tables)])
    rows = rows[:, ~np.isnan(rows).any(axis=0)]
    seed, step, norm, entropy, accuracy = rows
    i, j = np.triu_indices(norm.size, 1)
    mirrored = np.abs(entropy[i] - entropy[j]) < NEARLY_ENTROPY
    same = _part(np.abs(accuracy[i] - accuracy[j])[mirrored] > 0.5)
    close = np.abs(np.log(norm[i]) - np.log(norm[j])) < NEARLY_NORM
    i, j = i[close], j[close]
    apart = np.abs(entropy[i] - entropy[j])
    chosen: dict[frozenset[float], tuple[Evaluation, Evaluation]] = {}
    for k in np.argsort(-apart, kind="stable"):
        if len(chosen) == widest:
            break
        first, second = sorted((int(i[k]), int(j[k])), key=lambda at: float(step[at]))
        chosen.setdefault(
            frozenset((seed[first], seed[second])),
            (_checkpoint(rows[:, first]), _checkpoint(rows[:, second])),
        )
    return Pairs(
        count=int(i.size),
        far_entropy=_part(apart > 0.1),
        far_accuracy=_part(np.abs(accuracy[i] - accuracy[j]) > 0.5),
        widest=tuple(chosen.values()),
        same_entropy=same,
    )


def _checkpoint(row: Array) -> Evaluation:
    seed, step, norm, entropy, accuracy = (float(x) for x in row)
    return Evaluation(int(seed), int(step), norm, entropy, accuracy)


def _part(answers: NDArray[np.bool_]) -> float:
    return float(answers.mean()) if answers.size else float("nan")


NORM, NORM_GAP, ENTROPY, ENTROPY_GAP = "norm", "norm gap, |norm − norm at T_grok|", "H", "H gap, H − H*"
INVERSE_NORM, TRAIN_ERROR = "1 / norm", "1 − train accuracy"
ENTROPY_SPEED, NORM_SPEED = "|dH/dt|", "|dnorm/dt|"
CLOCK = "clock: mean T_grok of the runs, minus the step"

SEVEN = (ENTROPY_GAP, ENTROPY, NORM, INVERSE_NORM, TRAIN_ERROR, ENTROPY_SPEED, NORM_SPEED)
"""The predictors of the paper's second version, its own first; the norm gap is the first version's."""

GAMMAS = np.geomspace(*GAMMA_BOUNDS, 241)
"""Exponents among which the best is taken."""


@dataclass(frozen=True)
class Predictor:
    """One row of Table 2. `in_sample` is R2 with an interval from leaving out runs; `left_out`, R2 on runs left out.

    `replicates` holds the first with each run left out. `advantage` is `left_out` less the clock's, paired over runs;
    unknown for the clock.
    """

    name: str
    gamma: float
    in_sample: Estimate
    replicates: tuple[float, ...]
    left_out: float
    advantage: Estimate


@dataclass(frozen=True)
class Evaluations:
    """Evaluations before grokking with H above H*, of the runs that grokked, flat; `run` numbers these runs.

    `entropy_speed` and `norm_speed` are the change a step from the evaluation before (for the first, to the second),
    without its sign. `h_star`, `norm_star` and `t_grok` hold each run's values at its grokking, shape (n_runs,).
    """

    run: NDArray[np.int64]
    step: Array
    remaining: Array
    entropy: Array
    norm: Array
    train_accuracy: Array
    entropy_speed: Array
    norm_speed: Array
    h_star: Array
    norm_star: Array
    t_grok: Array

    @classmethod
    def of(cls, runs: Runs) -> Evaluations:
        """Collect them; a run without a usable entropy at its grokking takes no part."""
        norm_star = runs.at(runs.norm, runs.t_grok)
        known = ~np.isnan(runs.h_star + norm_star)
        runs, norm_star = runs[known], norm_star[known]
        remaining = runs.t_grok[:, None] - runs.step
        entropy_speed, norm_speed = (_speed(runs, values) for values in (runs.entropy, runs.norm))
        measured = ~np.isnan(runs.norm + runs.train_accuracy + entropy_speed + norm_speed)
        kept = (remaining > 0) & (runs.entropy > mean_known(runs.h_star)) & measured
        return cls(
            run=np.nonzero(kept)[0],
            step=runs.step[kept],
            remaining=remaining[kept],
            entropy=runs.entropy[kept],
            norm=runs.norm[kept],
            train_accuracy=runs.train_accuracy[kept],
            entropy_speed=entropy_speed[kept],
            norm_speed=norm_speed[kept],
            h_star=runs.h_star,
            norm_star=norm_star,
            t_grok=runs.t_grok,
        )


def _speed(runs: Runs, values: Array) -> Array:
    change = np.abs(np.diff(values, axis=1) / np.diff(runs.step, axis=1))
    return np.concatenate([change[:, :1], change], axis=1)


Constants = Callable[[Evaluations, Mask], Array]

PREDICTORS: dict[str, Constants] = {
    NORM: lambda data, used: data.norm,
    NORM_GAP: lambda data, used: np.abs(data.norm - data.norm_star[used].mean()),
    ENTROPY: lambda data, used: data.entropy,
    ENTROPY_GAP: lambda data, used: np.maximum(data.entropy - data.h_star[used].mean(), 0.0),
    INVERSE_NORM: lambda data, used: 1 / data.norm,
    TRAIN_ERROR: lambda data, used: 1 - data.train_accuracy,
    ENTROPY_SPEED: lambda data, used: data.entropy_speed,
    NORM_SPEED: lambda data, used: data.norm_speed,
}
"""By name, a predictor at every evaluation, its constants calibrated on the runs of a mask."""


def table(data: Evaluations) -> tuple[Predictor, ...]:
    """Fit every predictor and the clock; empty with fewer than three runs."""
    n = data.t_grok.size
    if n < 3 or data.remaining.size == 0:
        return ()
    clock = functools.partial(_clock, data)
    error = _squared_errors(clock, data)
    rows = [
        _row(name, data, functools.partial(_fit, data, predictor), error)
        for name, predictor in PREDICTORS.items()
    ]
    last = _row(CLOCK, data, lambda used: (np.nan, clock(used)), error)
    return (*rows, dataclasses.replace(last, advantage=UNKNOWN))


Fitted = tuple[float, Array]
"""Gamma (NaN without one), and the forecast at every evaluation of every run."""


def _row(name: str, data: Evaluations, fit: Callable[[Mask], Fitted], of_clock: Array) -> Predictor:
    n = data.t_grok.size
    everyone, others = np.ones(n, dtype=bool), ~np.eye(n, dtype=bool)
    gamma, whole = fit(everyone)
    folds = [fit(used)[1] for used in others]
    left_out = [_r_squared(fold, data, used) for fold, used in zip(folds, others, strict=True)]
    error = _squared_errors(lambda used: folds[int(np.argmin(used))], data)
    total = float(((data.remaining - data.remaining.mean()) ** 2).sum())
    return Predictor(
        name,
        gamma,
        jackknife(_r_squared(whole, data, everyone), left_out, EXPLAINED),
        tuple(left_out),
        1 - float(error.sum()) / total if total > 0 else np.nan,
        # The mean over runs of what each adds to the difference of two R2, times their number, is that difference.
        over((of_clock - error) * n / total if total > 0 else ()),
    )


def _squared_errors(forecast: Callable[[Mask], Array], data: Evaluations) -> Array:
    """Sum of each run's squared errors as `forecast` of the other runs has them, (n_runs,)."""
    return np.array(
        [
            ((forecast(used)[data.run == i] - data.remaining[data.run == i]) ** 2).sum()
            for i, used in enumerate(~np.eye(data.t_grok.size, dtype=bool))
        ]
    )


def _clock(data: Evaluations, used: Mask) -> Array:
    """Forecast by the mean T_grok of the runs `used`; no forecast lies in the past."""
    forecast: Array = np.maximum(data.t_grok[used].mean() - data.step, 0)
    return forecast


def _fit(data: Evaluations, predictor: Constants, used: Mask) -> Fitted:
    """Least squares on the runs `used`."""
    return fit_power(predictor(data, used), data.remaining, used[data.run])


def fit_power(x: Array, remaining: Array, kept: Mask, gammas: Array = GAMMAS) -> Fitted:
    """Least squares of ``remaining = a x^gamma + b`` at the evaluations `kept`, for x >= 0; forecast at all."""
    top = float(x[kept].max()) or 1.0
    y = remaining[kept]
    powers = (x[kept] / top) ** gammas[:, None]
    found = []
    for sign in (1.0, -1.0):
        # fit_line wants a slope of at least 0: of the mirror image, for predictors that rise towards grokking.
        slope, intercept, error = fit_line(powers, sign * y, c2="free")
        k = int(np.argmin(error))
        found.append((float(error[k]), float(gammas[k]), sign * float(slope[k]), sign * float(intercept[k])))
    _, gamma, slope_at, intercept_at = min(found)
    forecast: Array = slope_at * (x / top) ** gamma + intercept_at
    return gamma, forecast


def _r_squared(forecast: Array, data: Evaluations, used: Mask) -> float:
    """Of the evaluations of the runs `used`."""
    kept = used[data.run]
    truth = data.remaining[kept]
    total = float(((truth - truth.mean()) ** 2).sum())
    return 1 - float(((forecast[kept] - truth) ** 2).sum()) / total if total > 0 else float("nan")


def norm_against_entropy(runs: Runs) -> Figure:
    """Every run's way through the plane of norm and H; filled once it has grokked, open before."""
    figure = Figure(figsize=(WIDTH, 5.2), layout="constrained")
    axes = figure.subplots()
    columns = runs.lines(runs.norm, runs.entropy, runs.test_accuracy)
    for criterion, (_, norm, entropy, accuracy) in zip(runs.criteria, columns, strict=True):
        axes.plot(norm, entropy, color=LIGHT.faint, linewidth=0.8, zorder=1)
        grokked = accuracy >= criterion
        rising = ~grokked & (accuracy >= 0.5)
        early = ~grokked & ~rising
        axes.plot(norm[early], entropy[early], "o", color=LIGHT.train, markersize=3, fillstyle="none")
        axes.plot(norm[rising], entropy[rising], "v", color=LIGHT.signal, markersize=5, zorder=3)
        axes.plot(norm[grokked], entropy[grokked], "o", color=LIGHT.test, markersize=3.5, zorder=2)
    for marker, colour, style, label in (
        ("o", LIGHT.train, "none", "test accuracy below 0.5"),
        ("v", LIGHT.signal, "full", "0.5 up to the criterion"),
        ("o", LIGHT.test, "full", "grokked"),
    ):
        axes.plot([], [], marker, color=colour, fillstyle=style, label=label)
    axes.set(xlabel="Euclidean norm of all parameters (no unit)", ylabel="H (normalised, no unit)")
    legend_above(axes)
    return figure


def portrait(runs: Runs) -> Figure:
    """Every run's way through the plane of H and alignment, up to where it groks and beyond."""
    figure = Figure(figsize=(WIDTH, 5.2), layout="constrained")
    axes = figure.subplots()
    for t_grok, (step, entropy, aligned) in zip(runs.t_grok, runs.lines(runs.entropy, LEADING), strict=True):
        until = step <= t_grok if np.isfinite(t_grok) else np.full(step.size, True)
        axes.plot(entropy, aligned, color=LIGHT.faint, linewidth=0.8, zorder=1)
        axes.plot(entropy[until], aligned[until], color=LIGHT.test, linewidth=0.9, zorder=2)
        axes.plot(entropy[:1], aligned[:1], "o", color=LIGHT.train, markersize=5, fillstyle="none", zorder=3)
        axes.plot(entropy[step == t_grok], aligned[step == t_grok], color=LIGHT.ink, **GROK)
    axes.plot([], [], color=LIGHT.test, label="until T_grok")
    axes.plot([], [], color=LIGHT.faint, label="after")
    axes.plot([], [], "o", color=LIGHT.train, fillstyle="none", label="start")
    axes.plot([], [], color=LIGHT.ink, label="T_grok", **GROK)
    axes.set(xlabel="H (normalised, no unit)", ylabel="alignment of the leading eigenvectors (no unit)")
    legend_above(axes)
    return figure


def explained(table: Sequence[Predictor]) -> Figure:
    """R2 of every predictor, in sample with its interval, and on runs left out."""
    figure = Figure(figsize=(WIDTH, 1.0 + 0.55 * len(table)), layout="constrained")
    axes = figure.subplots()
    for row, predictor in enumerate(table):
        value = predictor.in_sample
        axes.plot(value.value, row - 0.12, "D", color=LIGHT.entropy, markersize=6)
        if value.bounded:
            axes.plot([value.low, value.high], [row - 0.12, row - 0.12], color=LIGHT.entropy, linewidth=1.5)
        axes.plot(
            max(predictor.left_out, -1.0), row + 0.16, "o", color=LIGHT.test, markersize=6, fillstyle="none"
        )
    axes.plot([], [], "D", color=LIGHT.entropy, label="in sample, as in the paper")
    axes.plot([], [], "o", color=LIGHT.test, fillstyle="none", label="runs left out (at −1: worse)")
    axes.axvline(0, color=LIGHT.ink, linewidth=1)
    axes.set_yticks(range(len(table)), [predictor.name for predictor in table])
    axes.set_ylim(len(table) - 0.5, -0.5)
    axes.set_xlim(-1.05, 1.02)
    axes.set_xlabel("R² of the steps that remain")
    figure.legend(handles=axes.get_legend_handles_labels()[0], loc="outside upper right", ncols=2)
    return figure


def headline(result: Predictors) -> str:
    """Say in a few sentences what the runs show."""
    rows = {row.name: row for row in result.table}
    said = (
        f"E4: norm and H correlate with r = {decimal(result.correlations.papers.value)} over the evaluations of "
        f"{len(result.runs)} runs until {PAPER_TAIL:,} steps after T_grok, as the paper has it, and with "
        f"{decimal(result.correlations.overall.value)} over all."
    )
    if rows:
        ours, clock = rows[ENTROPY_GAP], rows[CLOCK]
        said += (
            f" The gap of H explains R² = {decimal(ours.in_sample.value)} of the steps that remain, and "
            f"{decimal(ours.left_out)} on runs left out; the clock alone {decimal(clock.left_out)}, a difference of "
            f"{worded(ours.advantage, '')}."
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
            "over runs with Student's interval.",
            ("over", "r", "runs"),
            tuple(
                (name, span(value, decimal), str(value.n) if value.known else NONE)
                for name, value in (
                    (f"evaluations until {PAPER_TAIL:,} steps after T_grok, as the paper's", r.papers),
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
            functools.partial(norm_against_entropy, result.runs),
            "In the manner of the paper's Figure 4(a): every evaluation of every run.",
            "Entropy against the parameter norm, coloured by test accuracy.",
        ),
        *_pair_blocks(result),
        *_alignment_blocks(result),
        *_predictor_blocks(result),
    ]
    return Section("e4", TITLE, tuple(blocks))


def _without_interval(estimates: dict[str, Estimate]) -> list[Block]:
    """Say which of a table's jackknife estimates have no interval, and why; nothing where all have one."""
    reasons = [f"{name}: {e.method}" for name, e in estimates.items() if e.known and not e.bounded]
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


def _alignment_blocks(result: Predictors) -> list[Block]:
    found = result.alignment
    if not found.rho.known:
        return [Text(f"The alignment of the leading eigenvectors is {_against_alignment(found)}.", "note")]
    return [
        Text(
            "The alignment of the covariance's leading eigenvectors with frequencies of the label, and H: "
            f"{_against_alignment(found)}. Both follow the training, so a correlation of the two says no more than "
            "one of norm and H over all evaluations does."
        ),
        drawn(
            "e4-portrait",
            functools.partial(portrait, result.runs),
            "H and the alignment of the leading eigenvectors, one line a run.",
            "Fourier alignment of the leading eigenvectors against the spectral entropy.",
        ),
    ]


def _at(point: Evaluation) -> str:
    return f"seed {point.seed}, step {steps(point.step)}"


def _accuracies(a: Evaluation, b: Evaluation) -> tuple[str, str]:
    return percent(a.test_accuracy), percent(b.test_accuracy)


def _predictor_blocks(result: Predictors) -> list[Block]:
    if not result.table:
        return [Text("Fewer than three runs grokked: no predictor can be fitted with runs left out.", "note")]
    rows = tuple(
        (
            row.name,
            span(row.in_sample, decimal),
            decimal(row.left_out),
            span(row.advantage, decimal),
            decimal(row.gamma, 2),
        )
        for row in result.table
    )
    clock = next(row for row in result.table if row.name == CLOCK)
    return [
        Table(
            f"The paper's Table 2: R² of the steps that remain, at the same {result.points:,} evaluations before "
            "grokking with H above H*, by a power law a x^γ + b of each predictor. The mean as a forecast has R² 0. "
            "The last difference is paired over runs left out.",
            ("predictor", "R², in sample", "R², runs left out", "less the clock's", "γ"),
            rows,
            (1, 2, 3, 4),
        ),
        *_without_interval({row.name: row.in_sample for row in result.table}),
        drawn(
            "e4-predictors",
            functools.partial(explained, result.table),
            "R² of each predictor with 95 % jackknife intervals over runs.",
            "R squared of each predictor, in sample and on runs left out.",
        ),
        Text(
            f"The clock is what every predictor has to beat: {worded(clock.in_sample, '')} in sample. R² of "
            "the remaining steps rewards whatever falls with time, and time itself most of all."
        ),
    ]


EXPERIMENT = Experiment(
    "e4", "Norm against entropy as predictors.", ("e1",), analyse, headline, claims, section
)
