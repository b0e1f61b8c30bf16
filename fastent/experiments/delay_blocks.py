"""Tables and figures that E2 and E3 share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib.figure import Figure as Plot

from fastent.experiments import figures
from fastent.experiments.claims import NONE, decimal, percent, steps
from fastent.experiments.comparisons import Comparison
from fastent.experiments.delays import Delay, Group, mean_time, p_value, words
from fastent.experiments.document import Figure, Table
from fastent.experiments.statistics import Estimate


def drawn(name: str, draw: Callable[[], Plot], caption: str, alt: str) -> Figure:
    """Draw a figure for light and for dark screens."""
    light, dark = figures.both(draw)
    return Figure(name, caption, alt, light, dark)


def span(estimate: Estimate | None, write: Callable[[float | None], str]) -> str:
    """Write a number with its interval below it, "1,020 [900, 1,150]"; without interval the number alone."""
    if estimate is None:
        return NONE
    value = write(estimate.value)
    if estimate.low is None or estimate.high is None:
        return value
    return f"{value} [{write(estimate.low)}, {write(estimate.high)}]"


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
