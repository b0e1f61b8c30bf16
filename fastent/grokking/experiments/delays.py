"""By how much a condition delays grokking, against the baseline runs of the same settings, and what it does to H.

Every run is kept: one that did not grok is censored at the limit of steps, and means are restricted to that limit.
Tests are one-sided, "later than the baseline", as the paper's; Mann-Whitney treats the groups as unpaired, as the
paper does, the others use that seeds are shared.

H of treated and baseline runs is compared seed by seed, at equal progress. At equal step: over the baseline's plateau,
between its memorising and its grokking. A condition that slows the training altogether keeps H high at equal step
without acting on H at all, so also at equal training loss: where the loss on the training set, unmixed in both, first
falls to a level, H is read on the line between the two evaluations around it (in the logarithm of the loss).

The figures and tables here are those that E2 and E3 share.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray

from fastent.grokking.experiments.claims import (
    NONE,
    Claim,
    decimal,
    percent,
    span,
    steps,
    worded,
)
from fastent.grokking.experiments.data import StoredRun, column
from fastent.grokking.experiments.document import Table, Verdict
from fastent.grokking.experiments.figures import LIGHT, WIDTH, mean_over_runs
from fastent.grokking.experiments.statistics import (
    Comparison,
    Estimate,
    Times,
    bootstrap,
    cohens_d,
    holm,
    log_rank,
    mann_whitney,
    mean_delay,
    proportion,
    restricted_mean,
    signed_rank,
    stratified_log_rank,
)
from fastent.train.quantities import MeasuredRun, first_below


@dataclass(frozen=True)
class Group:
    """The complete runs of one condition, by seed; `stored` and `measured` are the same runs."""

    condition: str
    stored: tuple[StoredRun, ...]
    measured: tuple[MeasuredRun, ...]

    @classmethod
    def of(cls, condition: str, stored: Sequence[StoredRun]) -> Group:
        """Measure `stored`."""
        runs = sorted(stored, key=lambda run: run.seed)
        return cls(condition, tuple(runs), tuple(run.measure() for run in runs))

    @property
    def seeds(self) -> tuple[int, ...]:
        """Their seeds, ascending."""
        return tuple(run.seed for run in self.stored)

    def only(self, seeds: Sequence[int]) -> Group:
        """Return the runs of `seeds` alone."""
        kept = [i for i, seed in enumerate(self.seeds) if seed in seeds]
        return Group(
            self.condition, tuple(self.stored[i] for i in kept), tuple(self.measured[i] for i in kept)
        )

    @property
    def times(self) -> Times:
        """T_grok of each, censored at its end."""
        summaries = [run.summary for run in self.measured]
        return Times.of([s.t_grok for s in summaries], [s.last_step for s in summaries])


def groups_of(runs: Sequence[StoredRun], experiment: str) -> dict[str, Group]:
    """Group the runs of one experiment by condition, in the order of their names."""
    conditions = sorted({run.condition for run in runs if run.experiment == experiment})
    return {
        name: Group.of(name, [r for r in runs if r.experiment == experiment and r.condition == name])
        for name in conditions
    }


@dataclass(frozen=True)
class Delay:
    """One condition against the baseline.

    `mean` is the mean T_grok restricted to `limit`, `delay` the difference of these means with an interval from
    pairs where seeds are shared (else Greenwood's); `paired` holds the tests on shared seeds and is empty without
    them; `adjusted` is the Mann-Whitney p-value after Holm over the conditions of the experiment; `events` counts the
    runs of both groups that grokked.
    """

    group: Group
    limit: int
    grokked: Estimate
    mean: Estimate
    delay: Estimate
    rank: Comparison
    survival: Comparison
    paired: tuple[Comparison, ...]
    effect_size: Estimate | None
    adjusted: float
    events: int

    @property
    def condition(self) -> str:
        """Name of the condition."""
        return self.group.condition

    @property
    def known(self) -> bool:
        """Whether any run groks at all, so that there is something to be delayed."""
        return self.events > 0


def delays(baseline: Group, treated: Sequence[Group]) -> list[Delay]:
    """Compare each of `treated` with `baseline`; means go to the earliest limit of steps or end without grokking."""
    compared = [_delay(baseline, group) for group in treated]
    adjusted = holm({delay.condition: delay.rank.p_value for delay in compared})
    return [
        replace(delay, adjusted=adjusted[delay.condition])  # one family: this experiment
        for delay in compared
    ]


def _delay(baseline: Group, group: Group) -> Delay:
    control, times = baseline.times, group.times
    limits = [int(run.config["max_steps"]) for run in (*baseline.stored, *group.stored)]
    summaries = [run.summary for run in (*baseline.measured, *group.measured)]
    limit = min(*limits, *(s.last_step for s in summaries if s.t_grok is None))
    shared = [seed for seed in group.seeds if seed in baseline.seeds]
    survival = log_rank(control, times, limit)
    delay = _without_interval(survival.effect) if min(control.n, times.n) < 3 else survival.effect
    paired: tuple[Comparison, ...] = ()
    if shared:
        a, b = baseline.only(shared).times, group.only(shared).times
        paired = (signed_rank(a, b), stratified_log_rank(a, b))
        delay = mean_delay(a, b, limit) or delay
    rank = mann_whitney(control, times)
    return Delay(
        group=group,
        limit=limit,
        grokked=proportion(times.n - times.censored, times.n),
        mean=mean_time(group, limit),
        delay=delay,
        rank=rank,
        survival=survival,
        paired=paired,
        effect_size=cohens_d(control, times),
        adjusted=rank.p_value,
        events=sum(control.observed) + sum(times.observed),
    )


def mean_time(group: Group, limit: int) -> Estimate:
    """Mean T_grok of a group, restricted to `limit` steps; without an interval below three runs."""
    mean = restricted_mean(group.times, limit)
    return _without_interval(mean) if group.times.n < 3 else mean


def _without_interval(estimate: Estimate) -> Estimate:
    # Greenwood's variance of one or two runs is 0 or next to it: that is ignorance, not certainty.
    return replace(estimate, low=None, high=None, method=f"no interval: n = {estimate.n}")


def judge_later(delay: Delay | None) -> Verdict:
    """Verdict on "it delays grokking": reproduced if the interval of the delay lies above 0, in part if its value."""
    if delay is None:
        return Verdict.NOT_RUN
    return judge_positive(delay.delay) if delay.known else Verdict.NO_CASE


def judge_positive(estimate: Estimate | None) -> Verdict:
    """Verdict on "it is more than 0": reproduced if the whole interval is, in part if the value is, else not."""
    if estimate is None:
        return Verdict.NOT_RUN
    if estimate.low is not None and estimate.low > 0:
        return Verdict.REPRODUCED
    return Verdict.IN_PART if estimate.value > 0 else Verdict.NOT_REPRODUCED


def tested(delay: Delay | None) -> str:
    """Write the paper's test and effect size: "p = 0.044, with Holm 0.13; d = 0.70 (95 % CI ...)"."""
    if delay is None:
        return NONE
    size = "undefined, runs are censored" if delay.effect_size is None else worded(delay.effect_size, "", 2)
    return f"p = {p_value(delay.rank.p_value)}, with Holm {p_value(delay.adjusted)}; d = {size}"


def judge_test(delay: Delay | None, claim: Claim, *, comparable: bool) -> Verdict:
    """Verdict on a significant effect of a size: in part if only the adjusted p-value or only the size agrees."""
    if delay is None:
        return Verdict.NOT_RUN
    if not comparable:
        return Verdict.OTHER_SETTING
    agrees = claim.judge(delay.effect_size, comparable=True) == Verdict.REPRODUCED
    return (Verdict.NOT_REPRODUCED, Verdict.IN_PART, Verdict.REPRODUCED)[(delay.adjusted < 0.05) + agrees]


def p_value(value: float | None) -> str:
    """Write a p-value to two significant digits, "0.044" or "5.2e-05"; a dash for None."""
    if value is None:
        return NONE
    return f"{value:.2g}" if value >= 1e-3 else f"{value:.1e}"


def words(condition: str) -> str:
    """Say what a condition does.

    Examples
    --------
    >>> words("losses-0.1+norm-as-baseline")
    'mixing, α = 0.1, losses averaged; norm as in the baseline'
    """
    return "; ".join(_words(part) for part in condition.split("+"))


def _words(part: str, form: str = "{}, {}") -> str:
    if found := re.fullmatch(r"(losses|logits)-(.+)", part):
        return form.format("mixing", f"α = {found[2]}, {found[1]} averaged")
    if part.startswith("norm-as-"):
        other = part.removeprefix("norm-as-")
        return (
            "norm as in the baseline" if other == "baseline" else f"norm as under {_words(other, '{} ({})')}"
        )
    fixed = {
        "baseline": "baseline",
        "norm-mem": "norm held where the baseline has memorised",
        "norm-start": "norm held at its start",
        "norm-start-each": "norm of each tensor held at its start",
        "to-the-end": "baseline, trained to the limit of steps",
    }
    return fixed.get(part, part)


Array = NDArray[np.float64]

LOSSES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 1e-4, 1e-5)
"""Training losses, in nats, at which entropies are compared."""


def equal_step(baseline: Group, group: Group) -> Estimate | None:
    """H of the treated minus H of the baseline run, averaged over the evaluations of the baseline's plateau.

    From T_mem of the baseline run to its T_grok (its end, if it has none), at the steps that both runs evaluated;
    one difference a seed. None if no seed is shared or has such steps.
    """
    differences = []
    for control, treated in _pairs(baseline, group):
        start, end = control.summary.t_mem, control.summary.t_grok or control.summary.last_step
        if start is None:
            continue
        step, a, b = np.intersect1d(control.trajectory.step, treated.trajectory.step, return_indices=True)
        within = (step >= start) & (step <= end)
        change = (treated.trajectory.entropy[b] - control.trajectory.entropy[a])[within]
        if np.isfinite(change).any():
            differences.append(float(np.nanmean(change)))
    return bootstrap(differences) if differences else None


def _pairs(baseline: Group, group: Group) -> list[tuple[MeasuredRun, MeasuredRun]]:
    controls = dict(zip(baseline.seeds, baseline.measured, strict=True))
    return [
        (controls[seed], run)
        for seed, run in zip(group.seeds, group.measured, strict=True)
        if seed in controls
    ]


@dataclass(frozen=True)
class AtLoss:
    """Entropies where the training loss first falls to `loss`; `difference` is treated minus baseline.

    `control` and `treated` are means over the seeds that reach it in both, `control_step` and `treated_step` the
    mean steps of that.
    """

    loss: float
    control: Estimate
    treated: Estimate
    control_step: float
    treated_step: float
    difference: Estimate


def equal_loss(baseline: Group, group: Group, losses: Sequence[float] = LOSSES) -> list[AtLoss]:
    """Compare H at each training loss that runs of at least one shared seed reach under both conditions."""
    controls, treated_runs = (
        {run.seed: (run, one) for run, one in zip(each.stored, each.measured, strict=True)}
        for each in (baseline, group)
    )
    found = []
    for loss in losses:
        pairs = [
            (a, b)
            for seed, run in treated_runs.items()
            if seed in controls
            and (a := entropy_at_loss(*controls[seed], loss)) is not None
            and (b := entropy_at_loss(*run, loss)) is not None
        ]
        if pairs:
            control, treated = [a for a, _ in pairs], [b for _, b in pairs]
            found.append(
                AtLoss(
                    loss=loss,
                    control=bootstrap([h for _, h in control]),
                    treated=bootstrap([h for _, h in treated]),
                    control_step=float(np.mean([step for step, _ in control])),
                    treated_step=float(np.mean([step for step, _ in treated])),
                    difference=bootstrap([b[1] - a[1] for a, b in pairs]),
                )
            )
    return found


def entropy_at_loss(stored: StoredRun, run: MeasuredRun, loss: float) -> tuple[float, float] | None:
    """Step and H where the training loss of a run first falls to `loss`; None if it does not, or without H there.

    A run that begins at or below `loss` has not fallen to it.
    """
    trajectory, losses = run.trajectory, column(stored, "train_loss")
    if losses is None:
        return None
    reached = np.flatnonzero(losses <= loss)
    if reached.size == 0 or reached[0] == 0 or not losses[reached[0] - 1] > loss:
        return None
    after = int(reached[0])
    before = after - 1
    # A loss of exactly 0 (float32 can round to it) is as far below as the interpolation can see.
    logs = np.log(np.maximum(losses[[before, after]], 1e-12))
    share = (logs[0] - np.log(loss)) / (logs[0] - logs[1])
    step = trajectory.step[before] + share * (trajectory.step[after] - trajectory.step[before])
    h = trajectory.entropy[before] + share * (trajectory.entropy[after] - trajectory.entropy[before])
    return None if np.isnan(h) else (float(step), float(h))


@dataclass(frozen=True)
class Collapse:
    """Whether the entropy collapses under a condition all the same.

    `below`: share of its grokked runs first below the baseline's H* at or before their own T_grok; `h_star`: H at
    their own T_grok; `shift`: that minus the baseline run's, over shared seeds. None where nothing is to be told.
    """

    below: Estimate | None
    h_star: Estimate | None
    shift: Estimate | None


def collapse(baseline: Group, group: Group) -> Collapse:
    """Judge the treated runs that grokked by the mean H* of the baseline runs."""
    known = [r.summary.h_star for r in baseline.measured if r.summary.h_star is not None]
    own = [r.summary.h_star for r in group.measured if r.summary.h_star is not None]
    shifts = [
        b.summary.h_star - a.summary.h_star
        for a, b in _pairs(baseline, group)
        if a.summary.h_star is not None and b.summary.h_star is not None
    ]
    below = None
    if known:
        level = float(np.mean(known))
        answers = [
            crossed is not None and crossed <= run.summary.t_grok
            for run in group.measured
            if run.summary.t_grok is not None
            for crossed in [first_below(run.trajectory.step, run.trajectory.entropy, level)]
        ]
        below = proportion(sum(answers), len(answers)) if answers else None
    return Collapse(below, bootstrap(own) if own else None, bootstrap(shifts) if shifts else None)


def delays_table(caption: str, baseline: Group, delays: Sequence[Delay]) -> Table:
    """Each condition's T_grok, delay, tests and effect: the paper's Table 1 with what it lacks."""
    times = baseline.times
    mean = mean_time(baseline, min(delay.limit for delay in delays))
    row = (
        words("baseline"),
        f"{times.n - times.censored} of {times.n}",
        span(mean, steps),
        *[NONE] * 8,
    )
    columns = (
        *("condition", "grokked", "T_grok, mean", "later by, mean", "P(later)", "d"),
        *("p Mann-Whitney", "with Holm", "p log-rank", "the same, by seed", "p signed-rank"),
    )
    rows = [row, *map(_row, delays)]
    return Table(caption, columns, tuple(rows), tuple(range(1, len(columns))))


def _row(delay: Delay) -> tuple[str, ...]:
    signed, stratified = delay.paired if delay.paired else (None, None)
    return (
        words(delay.condition),
        f"{round(delay.grokked.value * delay.grokked.n)} of {delay.grokked.n}",
        span(delay.mean, steps),
        span(delay.delay, steps),
        span(delay.rank.effect, percent),
        "undefined" if delay.effect_size is None else span(delay.effect_size, _two),
        p_value(delay.rank.p_value),
        p_value(delay.adjusted),
        _p(delay.survival),
        _p(stratified),
        _p(signed),
    )


def _two(value: float | None) -> str:
    return decimal(value, 2)


def _p(comparison: Comparison | None) -> str:
    return p_value(None if comparison is None else comparison.p_value)


def notes(delays: Sequence[Delay]) -> str:
    """Say how the columns of `delays_table` were made."""
    limit = min(delay.limit for delay in delays)
    said = (
        f"Means are restricted to {steps(limit)} steps, with a Greenwood interval; the delay is the mean "
        "over seeds that both conditions share, with a BCa bootstrap interval over them. P(later): the "
        "chance that a run under the condition groks later than a baseline run. d: Cohen's, undefined once "
        "a run is censored. All tests are one-sided; by seed: each seed a stratum; Holm is over the "
        "conditions of this table. Brackets: 95 % intervals."
    )
    if any(delay.rank.note for delay in delays):
        said += " Runs that do not grok are tied last in Mann-Whitney and cut at the limit in the signed-rank test."
    return said


THOUSANDS = FuncFormatter(lambda value, _: f"{value:,.0f}".replace("-", "−"))

LOOKS: tuple[tuple[str, Any], ...] = (
    (LIGHT.train, (0, (5, 2))),
    (LIGHT.test, "solid"),
    (LIGHT.entropy, "solid"),
    (LIGHT.norm, (0, (6, 1.5, 1, 1.5))),
    (LIGHT.signal, (0, (1, 1.2))),
)
"""Colour and dash of the baseline and of up to four conditions."""


def grokking_times(baseline: Group, delays: Sequence[Delay]) -> Figure:
    """T_grok of every run by condition, with the mean restricted to the limit of steps and its interval."""
    rows = [baseline, *(delay.group for delay in delays)]
    figure = Figure(figsize=(WIDTH, 1.1 + 0.55 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for row, group in enumerate(rows):
        times = group.times
        for value, seen in zip(times.values, times.observed, strict=True):
            axes.plot(value, row, "o" if seen else ">", color=LIGHT.signal, alpha=0.65, markeredgewidth=0)
    limit = min(delay.limit for delay in delays)
    for row, mean in enumerate([mean_time(baseline, limit), *(delay.mean for delay in delays)]):
        axes.plot(mean.value, row, "D", color=LIGHT.ink, markersize=6, zorder=3)
        if mean.low is not None and mean.high is not None:
            axes.plot([mean.low, mean.high], [row, row], color=LIGHT.ink, linewidth=1.5)
        if row == 0:
            axes.axvline(mean.value, color=LIGHT.ink, linewidth=1, linestyle=(0, (2, 2)))
    axes.set_yticks(range(len(rows)), [words(group.condition) for group in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, 1.03 * max(max(group.times.values) for group in rows))
    axes.set_xlabel("T_grok (training steps)")
    axes.xaxis.set_major_formatter(THOUSANDS)
    return figure


def trajectories(groups: Sequence[Group]) -> Figure:
    """Test accuracy, entropy and norm of up to five conditions: thin lines are runs, thick ones their mean."""
    figure = Figure(figsize=(WIDTH, 8.4), layout="constrained")
    a, b, c = figure.subplots(3, 1, sharex=True, height_ratios=(1, 1.3, 0.9))
    columns = {a: "test_accuracy", b: "entropy", c: "parameter_norm"}
    for axes, name in columns.items():
        for group, (colour, dash) in zip(groups, LOOKS, strict=False):
            _lines(axes, group.measured, name, colour, dash, words(group.condition))
    a.set(title="A  Test accuracy", ylabel="accuracy (share)", ylim=(-0.03, 1.05))
    b.set(title="B  Spectral entropy", ylabel="H (normalised, no unit)")
    c.set(title="C  Parameter norm", ylabel="Euclidean norm (no unit)", xlabel="training step")
    figure.legend(handles=a.get_legend_handles_labels()[0], loc="outside upper center", ncols=2, fontsize=9)
    c.set_xlim(left=0)
    c.xaxis.set_major_formatter(THOUSANDS)
    return figure


def _lines(axes: Axes, runs: Sequence[MeasuredRun], name: str, colour: str, dash: Any, label: str) -> None:
    for run in runs:
        axes.plot(
            run.trajectory.step,
            getattr(run.trajectory, name),
            color=colour,
            linewidth=0.7,
            alpha=0.4,
            linestyle=dash,
        )
    step, mean = mean_over_runs(runs, name)
    axes.plot(step, mean, color=colour, linewidth=2.2, linestyle=dash, label=label)


def at_equal_loss(rows: dict[str, Sequence[AtLoss]]) -> Figure:
    """Difference of H to the baseline at equal training loss, one line a condition, with intervals."""
    figure = Figure(figsize=(WIDTH, 3.8), layout="constrained")
    axes = figure.subplots()
    count = len(rows)
    for place, ((condition, levels), (colour, dash)) in enumerate(zip(rows.items(), LOOKS[1:], strict=False)):
        # Set side by side, so that intervals do not cover each other.
        shift = 1.04 ** (place - (count - 1) / 2)
        loss: NDArray[np.float64] = np.array([level.loss for level in levels]) * shift
        axes.plot(
            loss,
            [v.difference.value for v in levels],
            "o",
            color=colour,
            linestyle=dash,
            label=words(condition),
        )
        for x, level in zip(loss, levels, strict=True):
            if level.difference.low is not None and level.difference.high is not None:
                axes.plot([x, x], [level.difference.low, level.difference.high], color=colour, linewidth=1.5)
    axes.axhline(0, color=LIGHT.ink, linewidth=1)
    axes.set_xscale("log")
    axes.invert_xaxis()
    axes.set(xlabel="training loss (nats), falling", ylabel="H minus the baseline's (no unit)")
    axes.legend(loc="best")
    return figure
