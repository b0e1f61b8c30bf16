"""How the parameter norm and the entropy go together: correlations, and checkpoints alike in one and not the other.

A correlation over all evaluations of all runs mixes the common course of training with what ties the two together;
so it is also taken within each run, within the plateau, and between changes from one evaluation to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from fastent.experiments.jackknife import CORRELATION, jackknife
from fastent.experiments.statistics import Estimate, bootstrap
from fastent.train.quantities import MeasuredRun

Array = NDArray[np.float64]

NEARLY_NORM = 0.01
"""Relative difference below which two norms count as nearly identical. Ours: the paper gives none."""

NEARLY_ENTROPY = 0.005
"""Difference below which two entropies count as nearly identical. Ours."""


@dataclass(frozen=True)
class Correlations:
    """Pearson's r of norm and H.

    `overall`: all evaluations of all runs; `within`: mean over runs of each run's own; `plateau`: the same between
    T_mem and T_grok; `changes`: mean over runs of the r of their changes from one evaluation to the next;
    `changes_plateau`: the same on the plateau; `ranks`: Spearman's rho of all evaluations. None without runs.
    """

    overall: Estimate
    within: Estimate | None
    plateau: Estimate | None
    changes: Estimate | None
    changes_plateau: Estimate | None
    ranks: Estimate


@dataclass(frozen=True)
class Checkpoint:
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
    widest: tuple[tuple[Checkpoint, Checkpoint], ...]
    same_entropy: float


def _pearson(a: Array, b: Array) -> float:
    if a.size < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def _usable(run: MeasuredRun, *, plateau: bool = False) -> tuple[Array, Array]:
    """Norm and H of the run's usable evaluations, those between T_mem and T_grok alone if `plateau`."""
    t, s = run.trajectory, run.summary
    kept = np.isfinite(t.entropy) & np.isfinite(t.parameter_norm)
    if plateau:
        end = s.last_step if s.t_grok is None else s.t_grok
        kept &= (t.step >= (s.last_step if s.t_mem is None else s.t_mem)) & (t.step <= end)
    return t.parameter_norm[kept], t.entropy[kept]


def correlations(runs: Sequence[MeasuredRun]) -> Correlations:
    """Correlate norm and H of `runs`, at least one; intervals leave out runs, or are over them."""
    whole = [_usable(run) for run in runs]
    plateau = [_usable(run, plateau=True) for run in runs]

    def pooled(correlate: Callable[[Array, Array], float]) -> Estimate:
        def of(parts: Sequence[tuple[Array, Array]]) -> float:
            return correlate(*(np.concatenate(column) for column in zip(*parts, strict=True)))

        left_out = [of(whole[:i] + whole[i + 1 :]) for i in range(len(whole))] if len(whole) > 1 else []
        return jackknife(of(whole), left_out, CORRELATION)

    return Correlations(
        overall=pooled(_pearson),
        within=_mean([_pearson(*part) for part in whole]),
        plateau=_mean([_pearson(*part) for part in plateau]),
        changes=_mean([_pearson(*map(np.diff, part)) for part in whole]),
        changes_plateau=_mean([_pearson(*map(np.diff, part)) for part in plateau]),
        ranks=pooled(lambda a, b: _pearson(stats.rankdata(a), stats.rankdata(b))),
    )


def _mean(values: Sequence[float]) -> Estimate | None:
    known = [v for v in values if np.isfinite(v)]
    return bootstrap(known) if known else None


def pairs(runs: Sequence[MeasuredRun], widest: int = 5) -> Pairs:
    """Look at all pairs of evaluations of `runs`; name the `widest`."""
    tables = [
        (np.full(t.step.size, run.seed), t.step, t.parameter_norm, t.entropy, t.test_accuracy)
        for run in runs
        for t in [run.trajectory]
    ]
    rows = np.concatenate([np.array(table, dtype=np.float64) for table in tables], axis=1)
    rows = rows[:, np.isfinite(rows).all(axis=0)]
    seed, step, norm, entropy, accuracy = rows
    i, j = np.triu_indices(norm.size, 1)
    mirrored = np.abs(entropy[i] - entropy[j]) < NEARLY_ENTROPY
    same = _share(np.abs(accuracy[i] - accuracy[j])[mirrored] > 0.5)
    close = np.abs(np.log(norm[i]) - np.log(norm[j])) < NEARLY_NORM
    i, j = i[close], j[close]
    apart = np.abs(entropy[i] - entropy[j])
    chosen: dict[frozenset[float], tuple[Checkpoint, Checkpoint]] = {}
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
        far_entropy=_share(apart > 0.1),
        far_accuracy=_share(np.abs(accuracy[i] - accuracy[j]) > 0.5),
        widest=tuple(chosen.values()),
        same_entropy=same,
    )


def _checkpoint(row: Array) -> Checkpoint:
    seed, step, norm, entropy, accuracy = (float(x) for x in row)
    return Checkpoint(int(seed), int(step), norm, entropy, accuracy)


def _share(answers: NDArray[np.bool_]) -> float:
    return float(answers.mean()) if answers.size else float("nan")
