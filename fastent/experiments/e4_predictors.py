"""E4, norm against entropy: whether they are the same thing, and which predicts the steps that remain.

Analysis of E1's runs (paper, section 7, Figure 4a, Table 2). The paper gives a weak negative correlation of norm
and H, finds "pairs of checkpoints with nearly identical norms but very different entropies", and ranks predictors
by the R2 of a power law for the remaining time. See `norm_entropy` and `remaining`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastent.experiments import norm_entropy, remaining
from fastent.experiments.claims import (
    IN_PART,
    NONE,
    NOT_REPRODUCED,
    NOT_RUN,
    REPRODUCED,
    Claim,
    decimal,
    judge_value,
    percent,
    worded,
)
from fastent.experiments.document import Verdict
from fastent.experiments.norm_entropy import Correlations, Pairs
from fastent.experiments.remaining import CLOCK, ENTROPY_GAP, NORM, NORM_GAP, Predictor
from fastent.experiments.statistics import Estimate
from fastent.train.quantities import MeasuredRun

TITLE = "E4: norm against entropy"

PAPER_R2 = 0.543


@dataclass(frozen=True)
class Predictors:
    """Analysis of E4.

    `table` is empty with fewer than three runs that grokked; `points` counts the evaluations in its fits.
    """

    runs: tuple[MeasuredRun, ...]
    correlations: Correlations
    pairs: Pairs
    table: tuple[Predictor, ...]
    points: int
    comparable: bool


def analyse(runs: Sequence[MeasuredRun], *, comparable: bool) -> Predictors:
    """Correlations, pairs of checkpoints and predictors of E1's complete `runs`.

    Raises
    ------
    ValueError
        If there is no run.
    """
    if not runs:
        raise ValueError("no run of E1 is complete")
    data = remaining.Evaluations.of(runs)
    return Predictors(
        runs=tuple(runs),
        correlations=norm_entropy.correlations(runs),
        pairs=norm_entropy.pairs(runs),
        table=remaining.table(data),
        points=data.remaining.size,
        comparable=comparable,
    )


def claims(result: Predictors) -> list[Claim]:
    """Each claim of the paper that E4 speaks to, beside what E1's runs say."""
    r = result.correlations
    rows = {row.name: row for row in result.table}
    gap = rows.get(ENTROPY_GAP)
    return [
        Claim(
            "§3.3, §7, Fig. 4a",
            "norm and H are weakly negatively correlated (its value is lost from the text)",
            f"r = {worded(r.overall, '')}; within runs {worded(r.within, '')}; of changes {worded(r.changes, '')}",
            _judge_weak(r.overall),
            "r of all evaluations lies in (−0.5, 0); in part: it is negative, or weak",
        ),
        Claim(
            "§7",
            "there are pairs of checkpoints with nearly identical norms and very different H and test accuracy",
            f"of {result.pairs.count:,} pairs within 1 % in norm {percent(result.pairs.far_entropy)} are more than 0.1 "
            f"apart in H and {percent(result.pairs.far_accuracy)} more than 0.5 in test accuracy",
            _judge_pairs(result.pairs),
            "there is such a pair",
        ),
        Claim(
            "Table 2, abstract (iv)",
            f"the gap of H predicts the remaining steps with R² = {PAPER_R2}",
            NONE if gap is None else worded(gap.in_sample, ""),
            judge_value(PAPER_R2, None if gap is None else gap.in_sample, comparable=result.comparable),
            "the paper's number lies in our interval; in part: within 25 %. In sample, all evaluations with H > H*",
        ),
        Claim(
            "Table 2",
            "the gap of H outperforms both norm-based predictors",
            "; ".join(
                f"{row.name}: {decimal(row.in_sample.value)}" for row in result.table if row.name != CLOCK
            )
            or NONE,
            _judge_best(rows),
            "its R² exceeds both; in part: one of them",
        ),
        Claim(
            "Table 2",
            "and the clock, which it does not compare with",
            "; ".join(
                f"{row.name}, runs left out: {decimal(row.left_out)}"
                for row in result.table
                if row.name in _LAST
            )
            or NONE,
            _judge_clock(rows),
            "R² on runs left out exceeds the clock's",
        ),
    ]


_LAST = (ENTROPY_GAP, CLOCK)


def _judge_weak(r: Estimate) -> Verdict:
    if np.isnan(r.value):
        return NOT_RUN
    if -0.5 < r.value < 0:
        return REPRODUCED
    return IN_PART if r.value < 0.5 else NOT_REPRODUCED


def _judge_pairs(pairs: Pairs) -> Verdict:
    if not pairs.count:
        return NOT_RUN
    return REPRODUCED if pairs.far_entropy > 0 and pairs.far_accuracy > 0 else NOT_REPRODUCED


def _judge_best(rows: dict[str, Predictor]) -> Verdict:
    if not rows:
        return NOT_RUN
    ours, *others = (rows[name].in_sample.value for name in (ENTROPY_GAP, NORM, NORM_GAP))
    return (NOT_REPRODUCED, IN_PART, REPRODUCED)[sum(ours > other for other in others)]


def _judge_clock(rows: dict[str, Predictor]) -> Verdict:
    if not rows:
        return NOT_RUN
    ours, clock = (rows[name].left_out for name in _LAST)
    return REPRODUCED if ours > clock else NOT_REPRODUCED
