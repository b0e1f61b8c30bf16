"""Delays of grokking under a condition, against baseline runs of the same settings, and what it does to H.

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

import functools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from fastent.grokking.experiments.claims import (
    NONE,
    Claim,
    decimal,
    judge_positive,
    of,
    percent,
    span,
    steps,
    worded,
)
from fastent.grokking.experiments.data import Runs
from fastent.grokking.experiments.document import Figure as Picture
from fastent.grokking.experiments.document import Table, Verdict
from fastent.grokking.experiments.figures import LIGHT, WIDTH, compared, legend_above, lines, thousands
from fastent.grokking.experiments.statistics import (
    UNKNOWN,
    Array,
    Comparison,
    Estimate,
    cohens_d,
    holm,
    log_rank,
    mann_whitney,
    mean_delay,
    mean_known,
    over,
    restricted_mean,
    share,
    signed_rank,
    stratified_log_rank,
)


@dataclass(frozen=True, eq=False)
class Delay:
    """One condition against the baseline.

    `mean` is the mean T_grok restricted to `limit`, `later` the difference of these means with an interval from
    pairs where seeds are shared (else Welch's); `paired` holds the tests on shared seeds and is empty without
    them; `adjusted` is the Mann-Whitney p-value after Holm over the conditions of the experiment; `events` counts the
    runs of both groups that grokked.
    """

    baseline: Runs
    runs: Runs
    limit: int
    grokked: Estimate
    mean: Estimate
    later: Estimate
    rank: Comparison
    survival: Comparison
    paired: tuple[Comparison, ...]
    effect_size: Estimate
    adjusted: float
    events: int

    @property
    def condition(self) -> str:
        """Name of the condition."""
        return self.runs.condition

    @property
    def mixes(self) -> bool:
        """Whether it mixes, and does not only hold the norm or the scale of the logits."""
        return re.match(r"(losses|logits)-\d", self.condition) is not None

    @functools.cached_property
    def equal_step(self) -> Estimate:
        """H of its runs minus H of the baseline's at equal step."""
        return equal_step(self.baseline, self.runs)

    @functools.cached_property
    def equal_loss(self) -> list[AtLoss]:
        """H of its runs and of the baseline's at equal training loss."""
        return equal_loss(self.baseline, self.runs)

    @functools.cached_property
    def collapse(self) -> Collapse:
        """What becomes of the entropy of its runs."""
        return collapse(self.baseline, self.runs)


def delays(baseline: Runs, treated: Sequence[Runs]) -> list[Delay]:
    """Compare each of `treated` with `baseline`; means go to the earliest limit of steps or end without grokking."""
    compared = [_delay(baseline, runs) for runs in treated]
    # One family: this experiment.
    adjusted = holm({delay.condition: delay.rank.p_value for delay in compared})
    return [replace(delay, adjusted=adjusted[delay.condition]) for delay in compared]


def _delay(baseline: Runs, runs: Runs) -> Delay:
    control, times = baseline.times, runs.times
    limits = (*baseline.setting("max_steps"), *runs.setting("max_steps"))
    limit = int(min(*limits, control.cut, times.cut))
    survival = log_rank(control, times, limit)
    delay = survival.effect
    paired: tuple[Comparison, ...] = ()
    if shared := set(baseline.seeds) & set(runs.seeds):
        a, b = baseline.only(shared).times, runs.only(shared).times
        paired = (signed_rank(a, b), stratified_log_rank(a, b))
        of_pairs = mean_delay(a, b, limit)
        delay = of_pairs if of_pairs.known else delay
    rank = mann_whitney(control, times)
    return Delay(
        baseline=baseline,
        runs=runs,
        limit=limit,
        grokked=share(times.observed),
        mean=restricted_mean(times, limit),
        later=delay,
        rank=rank,
        survival=survival,
        paired=paired,
        effect_size=cohens_d(control, times),
        adjusted=rank.p_value,
        events=int(control.observed.sum() + times.observed.sum()),
    )


def judge_later(delay: Delay | None, claim: Claim) -> Verdict:
    """Verdict on "it delays grokking", by the margin of the claim, a share of the baseline's mean T_grok."""
    if delay is None:
        return Verdict.NOT_RUN
    # Where no run groks at all there is nothing to be delayed.
    if not delay.events:
        return Verdict.NO_CASE
    return judge_positive(
        delay.later, claim.margin * restricted_mean(delay.baseline.times, delay.limit).value
    )


def tested(delay: Delay | None) -> str:
    """Write the paper's test and effect size: "p = 0.044, with Holm 0.13; d = 0.70 (95 % CI ...)"."""
    if delay is None:
        return NONE
    size = worded(delay.effect_size, "", 2) if delay.effect_size.known else "undefined, runs are censored"
    return f"p = {p_value(delay.rank.p_value)}, with Holm {p_value(delay.adjusted)}; d = {size}"


def judge_test(delay: Delay | None, claim: Claim, *, comparable: bool) -> Verdict:
    """Verdict on a significant effect of the claim's size: not reproduced if d is surely smaller than that."""
    if delay is None:
        return Verdict.NOT_RUN
    if not comparable:
        return Verdict.OTHER_SETTING
    d = delay.effect_size
    if d.high < claim.number:
        return Verdict.NOT_REPRODUCED
    return Verdict.REPRODUCED if delay.adjusted < 0.05 and d.low > 0 else Verdict.UNDECIDED


def p_value(value: float) -> str:
    """Write a p-value to two significant digits, "0.044" or "5.2e-05"; a dash for NaN."""
    if math.isnan(value):
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
    if found := re.fullmatch(r"(losses|logits)-(\d.*)", part):
        return form.format("mixing", f"α = {found[2]}, {found[1]} averaged")
    if found := re.fullmatch(r"(norm|logits)-as-(.+?)(-each|-moments|-every-step)?", part):
        what = "norm" if found[1] == "norm" else "logits' scale"
        other = "as in the baseline" if found[2] == "baseline" else f"as under {_words(found[2], '{} ({})')}"
        return f"{what} {other}{_HOW[found[3]]}"
    fixed = {
        "baseline": "baseline",
        "norm-mem": "norm held where the baseline has memorised",
        "norm-start": "norm held at its start",
        "norm-start-each": "norm of each tensor held at its start",
        "to-the-end": "baseline, trained to the limit of steps",
    }
    return fixed.get(part, part)


_HOW = {
    None: "",
    "-each": ", tensor by tensor",
    "-moments": ", moments scaled along",
    "-every-step": ", of every step",
}


LOSSES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 1e-4, 1e-5)
"""Training losses, in nats, at which entropies are compared."""


def pairs(baseline: Runs, runs: Runs) -> tuple[Runs, Runs]:
    """Return the runs of both whose seeds they share, by seed."""
    shared = sorted(set(baseline.seeds) & set(runs.seeds))
    a, b = (each[[each.seeds.index(seed) for seed in shared]] for each in (baseline, runs))
    return a, b


def equal_step(baseline: Runs, runs: Runs) -> Estimate:
    """H of the treated minus H of the baseline run, averaged over the evaluations of the baseline's plateau.

    From T_mem of the baseline run to its T_grok (its end, if it has none), at the steps that both runs evaluated;
    one difference a seed. Unknown if no seed is shared or has such steps.
    """
    return over(over_plateau(*pairs(baseline, runs), lambda each: each.entropy).values())


def over_plateau(control: Runs, treated: Runs, of: Callable[[Runs], Array]) -> dict[int, float]:
    """Differences, treated minus control, of values (n, m) `of` runs with the same seeds, as `equal_step` has it."""
    ends = np.where(control.grokked, control.t_grok, control.end)
    rows = zip(control.lines(of(control)), treated.lines(of(treated)), control.t_mem, ends, strict=True)
    differences = []
    for (x, h), (y, g), start, end in rows:
        step, a, b = np.intersect1d(x, y, return_indices=True)
        differences.append(mean_known((g[b] - h[a])[(step >= start) & (step <= end)]))
    return dict(zip(control.seeds, differences, strict=True))


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


def equal_loss(baseline: Runs, runs: Runs, losses: Sequence[float] = LOSSES) -> list[AtLoss]:
    """Compare H at each training loss that runs of at least one shared seed reach under both conditions."""
    found = []
    for loss in losses:
        (step, h), (other_step, other_h) = (entropy_at_loss(each, loss) for each in pairs(baseline, runs))
        both = ~np.isnan(h + other_h)
        if both.any():
            found.append(
                AtLoss(
                    loss=loss,
                    control=over(h[both], least=0, most=1),
                    treated=over(other_h[both], least=0, most=1),
                    control_step=float(np.mean(step[both])),
                    treated_step=float(np.mean(other_step[both])),
                    difference=over((other_h - h)[both]),
                )
            )
    return found


def entropy_at_loss(runs: Runs, loss: float) -> tuple[Array, Array]:
    """Step and H of each run where its training loss first falls to `loss`, (n,) each; NaN if it does not.

    A run that begins at or below `loss` has not fallen to it.
    """
    found = []
    for step, entropy, losses in runs.lines(runs.entropy, "train_loss"):
        after = int(np.argmax(losses <= loss))
        if not losses[after] <= loss or after == 0 or not losses[after - 1] > loss:
            found.append((np.nan, np.nan))
            continue
        # A loss of exactly 0 (float32 can round to it) is as far below as the interpolation can see.
        logs = np.log(np.maximum(losses[[after - 1, after]], 1e-12))
        part = (logs[0] - np.log(loss)) / (logs[0] - logs[1])
        found.append(tuple(x[after - 1] + part * (x[after] - x[after - 1]) for x in (step, entropy)))
    steps_there, h = np.array(found, dtype=np.float64).reshape(-1, 2).T
    return steps_there, h


@dataclass(frozen=True)
class Collapse:
    """Whether the entropy collapses under a condition all the same.

    `below`: share of its grokked runs first below the baseline's H* at or before their own T_grok; `h_star`: H at
    their own T_grok; `shift`: that minus the baseline run's, over shared seeds.
    """

    below: Estimate
    h_star: Estimate
    shift: Estimate


def collapse(baseline: Runs, runs: Runs) -> Collapse:
    """Judge the treated runs that grokked by the mean H* of the baseline runs."""
    a, b = pairs(baseline, runs)
    level = mean_known(baseline.h_star)
    below = UNKNOWN if np.isnan(level) else share((runs.first_below(level) <= runs.t_grok)[runs.grokked])
    return Collapse(below, over(runs.h_star, least=0, most=1), over(b.h_star - a.h_star))


def delays_table(caption: str, baseline: Runs, delays: Sequence[Delay]) -> Table:
    """Each condition's T_grok, delay, tests and effect: the paper's Table 1 with what it lacks."""
    mean = restricted_mean(baseline.times, min(delay.limit for delay in delays))
    row = (words(baseline.condition), of(share(baseline.grokked)), span(mean, steps), *[NONE] * 8)
    columns = (
        *("condition", "grokked", "T_grok, mean", "later by, mean", "P(later)", "d"),
        *("p Mann-Whitney", "with Holm", "p log-rank", "the same, by seed", "p signed-rank"),
    )
    rows = [row, *map(_row, delays)]
    return Table(caption, columns, tuple(rows), tuple(range(1, len(columns))))


def _row(delay: Delay) -> tuple[str, ...]:
    signed, stratified = (test.p_value for test in delay.paired) if delay.paired else (np.nan, np.nan)
    effect = delay.effect_size
    return (
        words(delay.condition),
        of(delay.grokked),
        span(delay.mean, steps),
        span(delay.later, steps),
        span(delay.rank.effect, percent),
        span(effect, functools.partial(decimal, digits=2)) if effect.known else "undefined",
        *map(p_value, (delay.rank.p_value, delay.adjusted, delay.survival.p_value, stratified, signed)),
    )


def notes(delays: Sequence[Delay]) -> str:
    """Say how the columns of `delays_table` were made."""
    limit = min(delay.limit for delay in delays)
    said = (
        f"Means are restricted to {steps(limit)} steps; the delay is the mean over seeds that both conditions share, "
        "so where one has more seeds it is not the difference of the means, and may differ in sign from P(later), d "
        "and the tests that take all runs; both with Student's interval over seeds. P(later): the "
        "chance that a run under the condition groks later than a baseline run. d: Cohen's, undefined once "
        "a run is censored. All tests are one-sided and, up to ten runs against ten, exact; by seed: each seed a "
        "stratum; Holm is over the "
        "conditions of this table. Brackets: 95 % intervals."
    )
    if any(delay.rank.note for delay in delays):
        said += (
            " Runs that do not grok are tied last in Mann-Whitney and cut at the limit in the signed-rank test and in "
            "the delay, which is larger in truth."
        )
    return said


LOOKS: tuple[tuple[str, Any], ...] = (
    (LIGHT.train, (0, (5, 2))),
    (LIGHT.test, "solid"),
    (LIGHT.entropy, "solid"),
    (LIGHT.norm, (0, (6, 1.5, 1, 1.5))),
    (LIGHT.signal, (0, (1, 1.2))),
)
"""Colour and dash of the baseline and of up to four conditions."""


def condition_figures(name: str, baseline: Runs, delays: Sequence[Delay]) -> tuple[Picture, Picture]:
    """When the runs of each condition grok, and their H on the way, beside the baseline's, as figures of the report."""
    return compared(
        name, {words(runs.condition): runs for runs in (baseline, *(each.runs for each in delays))}
    )


def trajectories(groups: Sequence[Runs]) -> Figure:
    """Test accuracy, entropy and norm of up to five conditions: thin lines are runs, thick ones their mean."""
    figure = Figure(figsize=(WIDTH, 8.4), layout="constrained")
    a, b, c = figure.subplots(3, 1, sharex=True, height_ratios=(1, 1.3, 0.9))
    columns = {a: "test_accuracy", b: "entropy", c: "norm"}
    for axes, name in columns.items():
        for runs, (colour, dash) in zip(groups, LOOKS, strict=False):
            label = words(runs.condition)
            lines(axes, runs, name, label, thin=0.7, alpha=0.4, color=colour, linestyle=dash)
    a.set(title="A  Test accuracy", ylabel="accuracy (share)", ylim=(-0.03, 1.05))
    b.set(title="B  Spectral entropy", ylabel="H (normalised, no unit)")
    c.set(title="C  Parameter norm", ylabel="Euclidean norm (no unit)", xlabel="training step")
    figure.legend(handles=a.get_legend_handles_labels()[0], loc="outside upper center", ncols=2, fontsize=9)
    c.set_xlim(left=0)
    c.xaxis.set_major_formatter(thousands)
    return figure


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
            if level.difference.bounded:
                axes.plot([x, x], [level.difference.low, level.difference.high], color=colour, linewidth=1.5)
    axes.axhline(0, color=LIGHT.ink, linewidth=1)
    axes.set_xscale("log")
    axes.invert_xaxis()
    axes.set(xlabel="training loss (nats), falling", ylabel="H minus the baseline's (no unit)")
    legend_above(axes, 2)
    return figure
