"""Does a condition keep the entropy up? H of treated against baseline runs, seed by seed, at equal progress.

At equal step: over the baseline's plateau, between its memorising and its grokking. A condition that slows the
training altogether keeps H high at equal step without acting on H at all, so also at equal training loss: where
the loss on the training set, unmixed in both, first falls to a level, H is read on the line between the two
evaluations around it (in the logarithm of the loss).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastent.experiments.columns import column
from fastent.experiments.delays import Group
from fastent.experiments.statistics import Estimate, bootstrap, proportion
from fastent.experiments.stored import StoredRun
from fastent.train.quantities import MeasuredRun, first_below

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
