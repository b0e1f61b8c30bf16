"""E8, the question whether the choice of the probe matters.

E1's runs, whose entropy is also recorded on a probe of test pairs, on training probes of other sizes, on the whole
training set and on all pairs (paper, Appendix B and Figure 10). The entropy of all M pairs is the truth that a probe
of N of them estimates. A probe's spectrum looks more uneven than it is, so its entropy is low, by about ``b (1/N -
1/M)``: the factor that vanishes where the probe is everything. As the half probe is low by ``b (2/N - 1/M)``, two
sizes give b, and

    H_N + (H_N - H_{N/2}) (1 - N/M)

is the entropy corrected for N and for the finite population.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from fastent.grokking.experiments import leads
from fastent.grokking.experiments.claims import (
    NONE,
    Finding,
    Findings,
    counted,
    decimal,
    judge_share,
    steps,
    worded,
)
from fastent.grokking.experiments.data import StoredRun, entropy_column, over, with_entropy
from fastent.grokking.experiments.document import Block, Section, Table, Text, Verdict
from fastent.grokking.experiments.figures import LIGHT, WIDTH, drawn
from fastent.grokking.experiments.leads import Leads
from fastent.grokking.experiments.statistics import Estimate, pearson, proportion
from fastent.train.presets import TrainConfig
from fastent.train.quantities import MeasuredRun, value_at
from fastent.train.tasks import make_task

Array = NDArray[np.float64]

TITLE = "E8: does the choice of the probe matter?"

CLOSE = 0.01
"""Difference of H that no conclusion here turns on: a fifth of the fall that is called a collapse."""


@dataclass(frozen=True)
class Probe:
    """One probe over the grokked runs: its size `n` and its entropies.

    `at_mem` and `at_grok` are H at T_mem and T_grok, `deficit` H of the whole training set minus H at T_grok, all
    means over the runs; `spread` is the standard deviation over runs of that deficit, `corrected` the deficit that is
    left after the correction of the module's text. `own` holds the runs as a monitor on this probe sees them, `rule`
    their leads at the H* of the other runs on the same probe.
    """

    name: str
    n: int
    at_mem: Estimate | None
    at_grok: Estimate | None
    deficit: Estimate | None
    spread: float | None
    corrected: Estimate | None
    own: tuple[MeasuredRun, ...]
    rule: Leads


@dataclass(frozen=True)
class Probes:
    """Analysis of the complete runs of E1 that recorded the probes.

    `train` and `test` are H at T_grok on the two probes of the paper's size, `difference` test minus train over the
    runs, `correlation` Pearson's r of the two over the runs and `along` its mean over the evaluations of each run.
    `before` and `after` are the mean size of the difference on the plateau, from T_mem to T_grok, and from T_grok on.
    `largest` holds, for each run, the difference that is largest in size and the step of it. `grokked` gives both
    entropies of each run that grokked, `sized` the probes by size, then the training set and all pairs.
    """

    runs: tuple[MeasuredRun, ...]
    tested: tuple[MeasuredRun, ...]
    grokked: tuple[tuple[float, float], ...]
    train: Estimate | None
    test: Estimate | None
    difference: Estimate | None
    correlation: Estimate | None
    along: Estimate | None
    before: Estimate | None
    after: Estimate | None
    largest: tuple[tuple[float, int], ...]
    by_train: Leads
    by_test: Leads
    sized: tuple[Probe, ...]


def analyse(stored: Sequence[StoredRun]) -> Probes | None:
    """Compare the probes over those of `stored` that are complete and recorded them; None if none did."""
    kept = [run for run in stored if run.done is not None and entropy_column(run, "entropy_test") is not None]
    if not kept:
        return None
    runs = tuple(run.measure() for run in kept)
    tested = tuple(_seen_by(run, one, "entropy_test") for run, one in zip(kept, runs, strict=True))
    both = [(a.summary.h_star, b.summary.h_star) for a, b in zip(runs, tested, strict=True)]
    grokked = tuple((a, b) for a, b in both if a is not None and b is not None)
    return Probes(
        runs=runs,
        tested=tested,
        grokked=grokked,
        train=over([a for a, _ in grokked]),
        test=over([b for _, b in grokked]),
        difference=over([b - a for a, b in grokked]),
        correlation=pearson(*zip(*grokked, strict=True)) if len(grokked) > 1 else None,
        along=over([_along(a, b) for a, b in zip(runs, tested, strict=True)]),
        before=over([_size(a, b, plateau=True) for a, b in zip(runs, tested, strict=True)]),
        after=over([_size(a, b, plateau=False) for a, b in zip(runs, tested, strict=True)]),
        largest=tuple(_largest(a, b) for a, b in zip(runs, tested, strict=True)),
        by_train=leads.left_out_threshold(runs),
        by_test=leads.left_out_threshold(tested),
        sized=_sized(kept, runs),
    )


def _seen_by(stored: StoredRun, run: MeasuredRun, name: str) -> MeasuredRun:
    entropy = entropy_column(stored, name)
    assert entropy is not None
    return with_entropy(run, entropy)


def _both(a: MeasuredRun, b: MeasuredRun) -> tuple[Array, Array, NDArray[np.int64]]:
    known = np.isfinite(a.trajectory.entropy) & np.isfinite(b.trajectory.entropy)
    return a.trajectory.entropy[known], b.trajectory.entropy[known], a.trajectory.step[known]


def _along(a: MeasuredRun, b: MeasuredRun) -> float | None:
    x, y, _ = _both(a, b)
    return float(np.corrcoef(x, y)[0, 1]) if x.size > 1 and np.ptp(x) > 0 and np.ptp(y) > 0 else None


def _size(a: MeasuredRun, b: MeasuredRun, *, plateau: bool) -> float | None:
    """Mean size of the difference between T_mem and T_grok, or from T_grok on."""
    x, y, step = _both(a, b)
    t_mem, t_grok = a.summary.t_mem, a.summary.t_grok
    if t_mem is None or t_grok is None:
        return None
    within = (step >= t_mem) & (step < t_grok) if plateau else step >= t_grok
    return float(np.abs(y - x)[within].mean()) if within.any() else None


def _largest(a: MeasuredRun, b: MeasuredRun) -> tuple[float, int]:
    x, y, step = _both(a, b)
    at = int(np.argmax(np.abs(y - x)))
    return float((y - x)[at]), int(step[at])


def sizes(run: StoredRun) -> dict[str, int]:
    """Return the number of pairs of each probe by size that `run` recorded, by its column, ascending."""
    config = TrainConfig(**run.config)
    pairs = len(make_task(config).labels)
    names = [name for name in run.rows[0] if name.startswith("entropy_") and name.split("_")[1].isdecimal()]
    known = {name: int(name.split("_")[1]) for name in names if not name.endswith("_status")}
    whole = {"entropy_train": round(config.train_fraction * pairs), "entropy_all": pairs}
    return {**known, **{name: n for name, n in whole.items() if name in run.rows[0]}}


def _sized(stored: Sequence[StoredRun], runs: Sequence[MeasuredRun]) -> tuple[Probe, ...]:
    asked = sizes(stored[0])
    if "entropy_train" not in asked or any(sizes(run) != asked for run in stored):
        return ()
    seen = {
        name: tuple(_seen_by(one, run, name) for one, run in zip(stored, runs, strict=True)) for name in asked
    }
    population, whole = asked["entropy_train"], seen["entropy_train"]
    found = []
    before: tuple[MeasuredRun, ...] | None = None
    for name, n in asked.items():
        own = seen[name]
        low = [_minus(a.summary.h_star, b.summary.h_star) for a, b in zip(whole, own, strict=True)]
        known = [x for x in low if x is not None]
        corrected = None
        if before is not None and n < population:
            gains = [_minus(b.summary.h_star, a.summary.h_star) for a, b in zip(before, own, strict=True)]
            share = 1 - n / population
            left = [
                None if x is None or g is None else x - g * share for x, g in zip(low, gains, strict=True)
            ]
            corrected = over(left)
        found.append(
            Probe(
                name=name,
                n=n,
                at_mem=over(
                    [value_at(r.trajectory.step, r.trajectory.entropy, r.summary.t_mem) for r in own]
                ),
                at_grok=over([r.summary.h_star for r in own]),
                deficit=over(low),
                spread=float(np.std(known, ddof=1)) if len(known) > 1 else None,
                corrected=corrected,
                own=own,
                rule=leads.left_out_threshold(own),
            )
        )
        before = own
    return tuple(found)


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def rate_of_spread(result: Probes) -> float | None:
    """Exponent with which the spread of the deficit falls with ``1/N - 1/n``, n the training pairs; 0.5 if by chance.

    The slope of log(spread) over log(1/N - 1/n), by least squares over the sizes; None with fewer than three.
    """
    sampled = [p for p in result.sized if p.name not in ("entropy_train", "entropy_all") and p.spread]
    if len(sampled) < 3:
        return None
    (population,) = (p.n for p in result.sized if p.name == "entropy_train")
    x = np.log([1 / p.n - 1 / population for p in sampled])
    return float(np.polyfit(x, np.log([p.spread or np.nan for p in sampled]), 1)[0])


def probe_of(result: Probes, name: str) -> Probe | None:
    """Return the probe of a column's name; None if it was not recorded."""
    return next((probe for probe in result.sized if probe.name == name), None)


def claims(result: Probes) -> Findings:
    """Each claim of the paper that the probes speak to, beside what they say."""
    r, d = result.correlation, result.difference
    agree = _agreement(result)
    used, everything = probe_of(result, "entropy_512"), probe_of(result, "entropy_all")
    gap = None
    if used is not None and everything is not None:
        pairs = zip(everything.own, used.own, strict=True)
        gap = over([_minus(a.summary.h_star, b.summary.h_star) for a, b in pairs])
    return {
        "e8.close": Finding(
            f"train {worded(result.train, '')}, test {worded(result.test, '')}; test minus train {worded(d, '', 4)}",
            _judge_close(d),
        ),
        "e8.correlated": Finding(
            f"Pearson r {worded(r, '')}; along a run {worded(result.along, '')}", _judge_correlation(r)
        ),
        "e8.artefact": Finding(counted(agree), judge_share(agree)),
        "e8.enough": Finding(
            f"H of all pairs minus H of 512 at T_grok {worded(gap, '', 4)}", _judge_close(gap)
        ),
    }


def _agreement(result: Probes) -> Estimate | None:
    """Share of the runs whose T_cross by the two probes differs by at most one evaluation; both None agrees too."""
    same = [
        (a is None and b is None) or (a is not None and b is not None and abs(a - b) <= run.evaluate_every)
        for run, a, b in zip(result.runs, result.by_train.times, result.by_test.times, strict=True)
        if run.summary.t_grok is not None
    ]
    known = any(t is not None for t in (*result.by_train.times, *result.by_test.times))
    return proportion(sum(same), len(same)) if same and known else None


def _judge_close(difference: Estimate | None) -> Verdict:
    if difference is None:
        return Verdict.NOT_RUN
    bounds = (difference.low, difference.high)
    if all(bound is not None and abs(bound) <= CLOSE for bound in bounds):
        return Verdict.REPRODUCED
    return Verdict.IN_PART if abs(difference.value) <= 2 * CLOSE else Verdict.NOT_REPRODUCED


def _judge_correlation(r: Estimate | None) -> Verdict:
    if r is None:
        return Verdict.NOT_RUN
    if r.low is not None and r.low > 0.5:
        return Verdict.REPRODUCED
    return Verdict.IN_PART if r.value > 0.5 else Verdict.NOT_REPRODUCED


def headline(result: Probes) -> str:
    """Say in a few sentences what the probes show."""
    if result.difference is None or result.train is None or result.test is None:
        return "E8: no run groks, so there is no H at grokking to compare probes by."
    said = (
        f"E8: at grokking H is {decimal(result.train.value)} on a training probe and "
        f"{decimal(result.test.value)} on a test probe"
    )
    step = max(result.largest, key=lambda pair: abs(pair[0]))
    said += f"; along the runs the two differ by up to {decimal(abs(step[0]))}, at step {step[1]:,}."
    small, used = probe_of(result, "entropy_64"), probe_of(result, "entropy_512")
    if small is not None and used is not None and small.deficit is not None and used.deficit is not None:
        said += (
            f" A probe of 64 pairs reads {decimal(small.deficit.value)} too low, one of 512 "
            f"{decimal(used.deficit.value)}: an H* holds for its size of probe alone."
        )
    return said


DASHED = (0, (5, 2))


def two_probes(result: Probes) -> Figure:
    """H of both probes along the runs, and of one against the other at T_grok."""
    figure = Figure(figsize=(WIDTH, 4.4), layout="constrained")
    a, b = figure.subplots(1, 2, width_ratios=(1.7, 1))
    kinds = ((result.runs, LIGHT.entropy, "solid", "training"), (result.tested, LIGHT.test, DASHED, "test"))
    for runs, colour, dash, name in kinds:
        for run in runs:
            a.plot(run.trajectory.step, run.trajectory.entropy, color=colour, linestyle=dash, linewidth=1)
        a.plot([], [], color=colour, linestyle=dash, label=f"{name} probe")
    grokked = [run.summary.t_grok for run in result.runs if run.summary.t_grok is not None]
    for step in grokked:
        a.axvline(step, color=LIGHT.ink, linewidth=0.8, linestyle=(0, (1, 2)))
    a.set(title="A  Along the runs", xlabel="training step", ylabel="H (normalised, no unit)")
    a.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    a.legend(loc="upper right")
    if result.grokked:
        x, y = np.array(result.grokked).T
        low, high = min(x.min(), y.min()) - 0.005, max(x.max(), y.max()) + 0.005
        b.plot([low, high], [low, high], color=LIGHT.ink, linewidth=1)
        b.plot(x, y, "o", color=LIGHT.signal, alpha=0.75, markeredgewidth=0)
        b.set(xlim=(low, high), ylim=(low, high), aspect="equal")
    b.set(title="B  At T_grok", xlabel="H, training probe (no unit)", ylabel="H, test probe (no unit)")
    return figure


def probe_sizes(result: Probes) -> Figure:
    """Deficit of H, its spread over the runs, and the entropy of each size along the first run."""
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    a, b = figure.subplots(1, 2)
    sampled = [p for p in result.sized if p.name not in ("entropy_train", "entropy_all")]
    (population,) = (p.n for p in result.sized if p.name == "entropy_train")
    n = np.array([p.n for p in sampled])
    a.plot(n, [_value(p) for p in sampled], "o", color=LIGHT.entropy, label="as read")
    half = [(p.n, p.corrected.value) for p in sampled if p.corrected is not None]
    if half:
        a.plot(*zip(*half, strict=True), "D", color=LIGHT.norm, fillstyle="none", label="corrected")
    a.plot(
        n, _law(sampled, n, population), color=LIGHT.ink, linewidth=1, label="b (1/N − 1/n), from the largest"
    )
    a.axhline(0, color=LIGHT.ink, linewidth=0.8)
    a.set(title="A  What H lacks at T_grok", ylabel="H of all training pairs − H of N (no unit)")
    a.legend(loc="upper right")
    spread = np.array([np.nan if p.spread is None else p.spread for p in sampled])
    b.plot(n, spread, "o", color=LIGHT.signal, label="over the runs")
    if (spread > 0).all():
        root = np.sqrt(1 / n - 1 / population)
        at = int(np.argmin(np.abs(np.log(n / 512))))
        b.plot(n, spread[at] * root / root[at], color=LIGHT.ink, linewidth=1, label="√(1/N − 1/n)")
        b.set_yscale("log")
        b.legend(loc="upper right")
    b.set(title="B  Its spread", ylabel="standard deviation (no unit)")
    for axes in (a, b):
        _sizes_axis(axes, n)
    return figure


def _value(probe: Probe) -> float:
    return float("nan") if probe.deficit is None else probe.deficit.value


def _law(sampled: list[Probe], n: np.ndarray, population: int) -> np.ndarray:
    largest = sampled[-1]
    return _value(largest) * (1 / n - 1 / population) / (1 / largest.n - 1 / population)


def _sizes_axis(axes: Axes, n: np.ndarray) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(n, [f"{value:,}" for value in n])
    axes.minorticks_off()
    axes.set_xlabel("pairs in the probe, N (number)")


NAMES = {"entropy_train": "training set", "entropy_all": "all pairs"}


def section(result: Probes) -> Section:
    """E8's part of the report."""
    blocks: list[Block] = [
        Text(
            "The paper takes H of 512 training pairs. Here it is beside H of 512 test pairs, which the model was "
            "never trained on, and beside H of probes from 64 pairs to all there are, in the same runs as E1."
        ),
        drawn(
            "e8-probes",
            functools.partial(two_probes, result),
            "In the manner of the paper's Figure 10. Dotted lines: T_grok of each run. Right: one dot a run; on "
            "the line the two probes agree.",
            "Spectral entropy of a training and a test probe against the training step, and against each other "
            "at grokking.",
        ),
        _runs_table(result),
        Text(_told_along(result)),
    ]
    if result.sized:
        if any(probe.deficit is not None for probe in result.sized):
            blocks.append(
                drawn(
                    "e8-sizes",
                    functools.partial(probe_sizes, result),
                    "What a probe of N of the n training pairs reads too low, and how much that varies between "
                    "runs. Probes are nested and without repetition, so both vanish at N = n.",
                    "Deficit of the entropy and its standard deviation against the size of the probe.",
                )
            )
        blocks += [_sizes_table(result), Text(_sizes_text(result))]
    return Section("e8", TITLE, tuple(blocks))


def _runs_table(result: Probes) -> Table:
    rows = []
    for i, (run, test) in enumerate(zip(result.runs, result.tested, strict=True)):
        gap = None
        if run.summary.h_star is not None and test.summary.h_star is not None:
            gap = test.summary.h_star - run.summary.h_star
        rows.append(
            (
                str(run.seed),
                decimal(run.summary.entropy_start),
                decimal(test.summary.entropy_start),
                decimal(run.summary.entropy_at_mem),
                decimal(test.summary.entropy_at_mem),
                decimal(run.summary.h_star),
                decimal(test.summary.h_star),
                decimal(gap, 4),
                f"{decimal(result.largest[i][0])} at {steps(result.largest[i][1])}",
                steps(result.by_train.times[i]),
                steps(result.by_test.times[i]),
            )
        )
    columns = (
        *("seed", "H at start, train", "test", "H at T_mem, train", "test", "H at T_grok, train", "test"),
        *("test − train", "largest difference", "T_cross, train", "T_cross, test"),
    )
    caption = (
        "Both probes of each run. T_cross is of the H* of the other seeds on the same probe; the largest "
        "difference is test minus train."
    )
    return Table(caption, columns, tuple(rows), tuple(range(11)))


def _told_along(result: Probes) -> str:
    """Say where along the runs the probes differ."""
    said = f"Over the evaluations of a run the two correlate with r {worded(result.along, '')}."
    if result.before is None or result.after is None:
        return said
    said += (
        f" Their difference has a mean size of {worded(result.before, '', 4)} on the plateau, from T_mem to T_grok, "
        f"and of {worded(result.after, '', 4)} from T_grok on."
    )
    if result.before.value > 2 * result.after.value:
        said += (
            " A model that has memorised treats pairs that it was trained on and others unlike, and alike once it "
            "has grokked: agreement at grokking is no sign that the choice of probe is without effect before it."
        )
    return said


def _sizes_table(result: Probes) -> Table:
    rows = [
        (
            NAMES.get(probe.name, "probe"),
            f"{probe.n:,}",
            decimal(_mean(probe.at_mem)),
            decimal(_mean(probe.at_grok)),
            NONE if probe.name == "entropy_train" else worded(probe.deficit, "", 4),
            NONE if probe.name == "entropy_train" else decimal(probe.spread, 4),
            worded(probe.corrected, "", 4),
            counted(probe.rule.preceding),
            steps(_mean(probe.rule.mean)),
        )
        for probe in result.sized
    ]
    caption = (
        "H by size of the probe, means over the runs, and the lead of T_cross at the H* of the other seeds, taken "
        "on the same probe. Deficit: H of the whole training set minus H of the probe, at T_grok; corrected: what is "
        "left of it after H_N + (H_N − H_{N/2}) (1 − N/n). All pairs are a training and a test set, not a sample of "
        "the training set."
    )
    columns = (
        *("", "N", "H at T_mem", "H at T_grok", "deficit", "its standard deviation over runs", "corrected"),
        *("preceded", "mean lead"),
    )
    return Table(caption, columns, tuple(rows), (1, 2, 3, 8))


def _mean(estimate: Estimate | None) -> float | None:
    return None if estimate is None else estimate.value


def _sizes_text(result: Probes) -> str:
    rate, small = rate_of_spread(result), result.sized[0]
    if small.deficit is None:
        return "No run groks, so there is no H at grokking to compare sizes by."
    said = (
        f"At T_grok a probe of {small.n} pairs reads H {decimal(small.deficit.value)} lower than the whole training "
        f"set, with a standard deviation over runs of {decimal(small.spread)}. A threshold that was calibrated on one "
        "size of probe does not hold for another."
    )
    if rate is not None:
        said += (
            f" The spread falls with 1/N − 1/n to the power {decimal(rate, 2)}; chance alone would give 0.5."
        )
    if (enough := _enough(result)) is not None:
        said += f" From N = {enough:,} on, what the correction leaves is below {CLOSE:g} on average."
    return said


def _enough(result: Probes) -> int | None:
    """Smallest size from which on every corrected mean is close; None if the largest is not."""
    corrected = [p for p in result.sized if p.corrected is not None]
    enough = None
    for probe in reversed(corrected):
        if probe.corrected is None or abs(probe.corrected.value) > CLOSE:
            break
        enough = probe.n
    return enough
