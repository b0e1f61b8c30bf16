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
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from fastent.grokking.experiments import leads
from fastent.grokking.experiments.claims import (
    CLAIMS,
    NONE,
    Experiment,
    Finding,
    Findings,
    by_run,
    counted,
    decimal,
    judge_positive,
    judge_share,
    judge_within,
    steps,
    worded,
)
from fastent.grokking.experiments.data import Runs, StoredRun
from fastent.grokking.experiments.document import Block, Section, Table, Text, Verdict
from fastent.grokking.experiments.figures import (
    DASHED,
    DOTTED,
    LIGHT,
    WIDTH,
    drawn,
    legend_above,
    lines,
    thousands,
)
from fastent.grokking.experiments.leads import Leads
from fastent.grokking.experiments.statistics import (
    UNKNOWN,
    Array,
    Estimate,
    Mask,
    less,
    mean_known,
    over,
    pearson,
    share,
)
from fastent.grokking.train.config import TrainConfig
from fastent.grokking.train.tasks import make_task

TITLE = "E8: does the choice of the probe matter?"

CLOSE = CLAIMS["e8.enough"].margin
"""Difference of H that no conclusion here turns on: a fifth of the fall that is called a collapse."""


WHOLE = ("entropy_train", "entropy_all")
"""Columns of the probes that are no sample of the training set: all of it, and all pairs."""


@dataclass(frozen=True, eq=False)
class ProbeEntropies:
    """One probe over the runs: its size `n` and its entropies.

    `at_mem` and `at_grok` are H at T_mem and T_grok, `deficit` H of the whole training set minus H at T_grok, all
    means over the runs; `spread` is the standard deviation over runs of that deficit, `corrected` the deficit that is
    left after the correction of the module's text. `rule` holds the leads at the H* of the other runs on the same
    probe, `h_star` H at T_grok of each run.
    """

    name: str
    n: int
    h_star: Array
    at_mem: Estimate
    at_grok: Estimate
    deficit: Estimate
    spread: float
    corrected: Estimate
    rule: Leads


@dataclass(frozen=True, eq=False)
class Probes:
    """Analysis of the complete runs of E1 that recorded the probes.

    `runs` are seen by the training probe, `tested` by the test probe, both of the paper's size. `train` and `test` are
    H at T_grok on them, `difference` test minus train over the runs, `correlation` Pearson's r of the two over the runs
    and `along` its mean over the evaluations of each run. `before` and `after` are the mean size of the difference on
    the plateau, from T_mem to T_grok, and from T_grok on. `largest` holds, for each run, the difference that is largest
    in size, and `largest_at` the step of it. `sized` are the probes by size, then the training set and all pairs.
    """

    runs: Runs
    tested: Runs
    train: Estimate
    test: Estimate
    difference: Estimate
    correlation: Estimate
    along: Estimate
    before: Estimate
    after: Estimate
    largest: Array
    largest_at: Array
    by_train: Leads
    by_test: Leads
    sized: tuple[ProbeEntropies, ...]

    def probe(self, name: str) -> ProbeEntropies | None:
        """Return the probe of a column's name; None if it was not recorded."""
        return next((probe for probe in self.sized if probe.name == name), None)


def analyse(runs: Runs) -> Probes | None:
    """Compare the probes over those of E1's runs that recorded them; None if none did."""
    runs = runs.select("e1")
    runs = runs[["entropy_test" in run.rows[0] for run in runs.stored]]
    if not len(runs):
        return None
    tested = runs.seen_by("entropy_test")
    gap = tested.entropy - runs.entropy
    known = ~np.isnan(runs.h_star + tested.h_star)
    after = runs.step >= runs.t_grok[:, None]
    plateau = (runs.step >= runs.t_mem[:, None]) & (runs.step < runs.t_grok[:, None])
    after &= ~np.isnan(runs.t_mem)[:, None]
    at = np.argmax(np.abs(np.nan_to_num(gap)), axis=1)
    return Probes(
        runs=runs,
        tested=tested,
        train=over(runs.h_star[known], least=0, most=1),
        test=over(tested.h_star[known], least=0, most=1),
        difference=over(tested.h_star - runs.h_star),
        correlation=pearson(runs.h_star[known], tested.h_star[known]) if known.sum() > 1 else UNKNOWN,
        along=over(map(_along, runs.entropy, tested.entropy), least=-1, most=1),
        before=over(map(_size, gap, plateau), least=0),
        after=over(map(_size, gap, after), least=0),
        largest=gap[np.arange(len(runs)), at],
        largest_at=runs.step[np.arange(len(runs)), at],
        by_train=leads.left_out_threshold(runs),
        by_test=leads.left_out_threshold(tested),
        sized=_sized(runs),
    )


def _along(a: Array, b: Array) -> float:
    known = ~np.isnan(a + b)
    x, y = a[known], b[known]
    return float(np.corrcoef(x, y)[0, 1]) if x.size > 1 and np.ptp(x) > 0 and np.ptp(y) > 0 else np.nan


def _size(gap: Array, where: Mask) -> float:
    """Mean size of a difference at some evaluations."""
    return mean_known(np.abs(gap[where]))


def sizes(run: StoredRun) -> dict[str, int]:
    """Return the number of pairs of each probe by size that `run` recorded, by its column, ascending."""
    config = TrainConfig(**run.config)
    pairs = len(make_task(config).labels)
    names = [name for name in run.rows[0] if name.startswith("entropy_") and name.split("_")[1].isdecimal()]
    known = {name: int(name.split("_")[1]) for name in names if not name.endswith("_status")}
    whole = {"entropy_train": round(config.train_fraction * pairs), "entropy_all": pairs}
    return {**known, **{name: n for name, n in whole.items() if name in run.rows[0]}}


def _sized(runs: Runs) -> tuple[ProbeEntropies, ...]:
    asked = sizes(runs.stored[0])
    if "entropy_train" not in asked or any(sizes(run) != asked for run in runs.stored):
        return ()
    population, whole = asked["entropy_train"], runs.seen_by("entropy_train").h_star
    found: list[ProbeEntropies] = []
    for name, n in asked.items():
        own = runs.seen_by(name)
        low = whole - own.h_star
        known = low[~np.isnan(low)]
        corrected = UNKNOWN
        if found and n < population:
            corrected = over(low - (own.h_star - found[-1].h_star) * (1 - n / population))
        found.append(
            ProbeEntropies(
                name=name,
                n=n,
                h_star=own.h_star,
                at_mem=over(own.at(own.entropy, own.t_mem), least=0, most=1),
                at_grok=over(own.h_star, least=0, most=1),
                deficit=over(low),
                spread=float(np.std(known, ddof=1)) if known.size > 1 else np.nan,
                corrected=corrected,
                rule=leads.left_out_threshold(own),
            )
        )
    return tuple(found)


def rate_of_spread(result: Probes) -> float:
    """Exponent with which the spread of the deficit falls with ``1/N - 1/n``, n the training pairs; 0.5 if by chance.

    The slope of log(spread) over log(1/N - 1/n), by least squares over the sizes; NaN with fewer than three.
    """
    sampled = [p for p in result.sized if p.name not in WHOLE and p.spread > 0]
    if len(sampled) < 3:
        return np.nan
    (population,) = (p.n for p in result.sized if p.name == "entropy_train")
    x = np.log([1 / p.n - 1 / population for p in sampled])
    return float(np.polyfit(x, np.log([p.spread for p in sampled]), 1)[0])


def claims(result: Probes) -> Findings:
    """Each claim of the paper that the probes speak to, beside what they say."""
    r, d = result.correlation, result.difference
    agree = _agreement(result)
    used = result.probe("entropy_512")
    lacking = used.deficit if used else UNKNOWN
    return {
        "e8.close": Finding(
            f"train {worded(result.train, '')}, test {worded(result.test, '')}; test minus train {worded(d, '', 4)}",
            judge_within(d, CLOSE),
        ),
        "e8.correlated": Finding(
            f"Pearson r {worded(r, '')}; along a run {worded(result.along, '')}", _judge_correlation(r)
        ),
        "e8.artefact": Finding(counted(agree), judge_share(agree)),
        "e8.enough": Finding(
            f"H of all training pairs minus H of 512 at T_grok {worded(lacking, '', 4)}",
            judge_within(lacking, CLOSE),
        ),
    }


def _agreement(result: Probes) -> Estimate:
    """Share of the grokked runs whose T_cross by the two probes differs by at most one evaluation, or is never."""
    a, b = result.by_train.times, result.by_test.times
    if np.isnan(a).all() and np.isnan(b).all():
        return UNKNOWN
    same = (np.abs(a - b) <= result.runs.setting("evaluate_every")) | (np.isnan(a) & np.isnan(b))
    return share(same[result.runs.grokked])


def _judge_correlation(r: Estimate) -> Verdict:
    return judge_positive(less(r, Estimate(0.5)))


def headline(result: Probes) -> str:
    """Say in a few sentences what the probes show."""
    if not result.difference.known:
        return "E8: no run groks, so there is no H at grokking to compare probes by."
    i = np.argmax(np.abs(result.largest))
    said = (
        f"E8: at grokking H is {decimal(result.train.value)} on a training probe and "
        f"{decimal(result.test.value)} on a test probe; along the runs the two differ by up to "
        f"{decimal(abs(result.largest[i]))}, at step {steps(result.largest_at[i])}."
    )
    small, used = result.probe("entropy_64"), result.probe("entropy_512")
    if small and used and small.deficit.known and used.deficit.known:
        said += (
            f" A probe of 64 pairs reads {decimal(small.deficit.value)} too low, one of 512 "
            f"{decimal(used.deficit.value)}: an H* holds for its size of probe alone."
        )
    return said


def two_probes(result: Probes) -> Figure:
    """H of both probes along the runs, and of one against the other at T_grok."""
    figure = Figure(figsize=(WIDTH, 4.4), layout="constrained")
    a, b = figure.subplots(1, 2, width_ratios=(1.7, 1))
    kinds = ((result.runs, LIGHT.entropy, "solid", "training"), (result.tested, LIGHT.test, DASHED, "test"))
    for runs, colour, dash, name in kinds:
        lines(a, runs, "entropy", color=colour, linestyle=dash, thin=1, alpha=1)
        a.plot([], [], color=colour, linestyle=dash, label=f"{name} probe")
    for step in result.runs.t_grok[result.runs.grokked]:
        a.axvline(step, color=LIGHT.ink, linewidth=0.8, linestyle=DOTTED)
    a.set(title="A  Along the runs", xlabel="training step", ylabel="H (normalised, no unit)")
    a.xaxis.set_major_formatter(thousands)
    legend_above(a)
    x, y = result.runs.h_star, result.tested.h_star
    known = ~np.isnan(x + y)
    if known.any():
        x, y = x[known], y[known]
        low, high = min(x.min(), y.min()) - 0.005, max(x.max(), y.max()) + 0.005
        b.plot([low, high], [low, high], color=LIGHT.ink, linewidth=1)
        b.plot(x, y, "o", color=LIGHT.signal, alpha=0.75, markeredgewidth=0)
        b.set(xlim=(low, high), ylim=(low, high), aspect="equal")
    b.set(title="B  At T_grok", xlabel="H, training probe (no unit)", ylabel="H, test probe (no unit)")
    return figure


def probe_sizes(result: Probes) -> Figure:
    """Deficit of H by the size of the probe, and its spread over the runs."""
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    a, b = figure.subplots(1, 2)
    sampled = [p for p in result.sized if p.name not in WHOLE]
    (population,) = (p.n for p in result.sized if p.name == "entropy_train")
    n = np.array([p.n for p in sampled])
    a.plot(n, [p.deficit.value for p in sampled], "o", color=LIGHT.entropy, label="as read")
    half = [(p.n, p.corrected.value) for p in sampled if p.corrected.known]
    if half:
        a.plot(*zip(*half, strict=True), "D", color=LIGHT.norm, fillstyle="none", label="corrected")
    a.plot(
        n, _law(sampled, n, population), color=LIGHT.ink, linewidth=1, label="b (1/N − 1/n), from the largest"
    )
    a.axhline(0, color=LIGHT.ink, linewidth=0.8)
    a.set(title="A  What H lacks at T_grok", ylabel="H of all training pairs − H of N (no unit)")
    a.legend(loc="upper right")
    spread = np.array([p.spread for p in sampled])
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
    if b.get_yscale() == "log":  # within two powers of ten: these alone would leave one tick
        b.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        b.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    return figure


def _law(sampled: list[ProbeEntropies], n: np.ndarray, population: int) -> np.ndarray:
    largest = sampled[-1]
    return largest.deficit.value * (1 / n - 1 / population) / (1 / largest.n - 1 / population)


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
        if any(probe.deficit.known for probe in result.sized):
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
    a, b = result.runs, result.tested
    at = [(a.at(a.entropy, step), b.at(b.entropy, step)) for step in (a.start, a.t_mem, a.t_grok)]
    largest = [f"{decimal(h)} at {steps(t)}" for h, t in zip(result.largest, result.largest_at, strict=True)]
    rows = by_run(
        a,
        (decimal, *(h for pair in at for h in pair)),
        (functools.partial(decimal, digits=4), b.h_star - a.h_star),
        (str, largest),
        (steps, result.by_train.times, result.by_test.times),
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
    if not (result.before.known and result.after.known):
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
            decimal(probe.at_mem.value),
            decimal(probe.at_grok.value),
            NONE if probe.name == "entropy_train" else worded(probe.deficit, "", 4),
            NONE if probe.name == "entropy_train" else decimal(probe.spread, 4),
            worded(probe.corrected, "", 4),
            counted(probe.rule.preceding),
            steps(probe.rule.mean.value),
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


def _sizes_text(result: Probes) -> str:
    rate, small = rate_of_spread(result), result.sized[0]
    if not small.deficit.known:
        return "No run groks, so there is no H at grokking to compare sizes by."
    said = (
        f"At T_grok a probe of {small.n} pairs reads H {decimal(small.deficit.value)} lower than the whole training "
        f"set, with a standard deviation over runs of {decimal(small.spread)}. A threshold that was calibrated on one "
        "size of probe does not hold for another."
    )
    if not np.isnan(rate):
        said += (
            f" The spread falls with 1/N − 1/n to the power {decimal(rate, 2)}; chance alone would give 0.5."
        )
    if (enough := _enough(result)) is not None:
        said += f" From N = {enough:,} on, what the correction leaves is below {CLOSE:g} on average."
    return said


def _enough(result: Probes) -> int | None:
    """Smallest size from which on every corrected mean is close; None if the largest is not."""
    corrected = [p for p in result.sized if p.corrected.known]
    enough = None
    for probe in reversed(corrected):
        if abs(probe.corrected.value) > CLOSE:
            break
        enough = probe.n
    return enough


EXPERIMENT = Experiment(
    "e8", "Does the choice of the probe matter?", ("e1",), analyse, headline, claims, section
)
