"""E8's part of the report: the two probes, and the sizes."""

from __future__ import annotations

import functools

from fastent.experiments import e8_figures
from fastent.experiments.claims import NONE, counted, decimal, steps, worded
from fastent.experiments.delay_blocks import drawn
from fastent.experiments.document import Block, Section, Table, Text
from fastent.experiments.e8_probes import CLOSE, TITLE, Probes, rate_of_spread
from fastent.experiments.statistics import Estimate

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
            functools.partial(e8_figures.two_probes, result),
            "In the manner of the paper's Figure 10. Dotted lines: T_grok of each run. Right: one dot a run; on "
            "the line the two probes agree.",
            "Spectral entropy of a training and a test probe against the training step, and against each other "
            "at grokking.",
        ),
        _runs_table(result),
        Text(_along(result)),
    ]
    if result.sized:
        if any(probe.deficit is not None for probe in result.sized):
            blocks.append(
                drawn(
                    "e8-sizes",
                    functools.partial(e8_figures.sizes, result),
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


def _along(result: Probes) -> str:
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
