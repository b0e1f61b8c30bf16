"""The paper's diagnostic guide (Table 5) put to the test: what it says of a run at each evaluation, and what came.

`fastent.diagnosis.diagnose` reads the table at every evaluation of a run before it grokked, from the run so far, with
the H* of the baseline's other seeds. Each run has the same weight. Runs of every experiment that trains the same task
take part, also those that do not grok: a guide is needed where it is not known which those are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from fastent.diagnosis import Phase, diagnose
from fastent.experiments.columns import over
from fastent.experiments.statistics import Estimate, proportion
from fastent.history import History
from fastent.train.quantities import MeasuredRun

IMMINENT = 1000
"""Steps within which grokking must come after "imminent"; the paper's."""


class Outcome(StrEnum):
    """What came of a run after an evaluation."""

    SOON = "groks within 1,000 steps"
    LATER = "groks later"
    NEVER = "does not grok"


@dataclass(frozen=True)
class Guide:
    """Table 5 as a confusion matrix.

    `shares` holds, by phase and outcome, the share of a run's evaluations before grokking, averaged over the `n`
    runs; `evaluations` counts them. `imminent`: of a run's evaluations "near threshold", the share after which
    grokking came within 1,000 steps, over the runs that have such; `warned`: of the runs that grok, the share that was
    near threshold at some evaluation before, within 1,000 steps of grokking. `given_up`: of the runs called "no
    collapse" at some evaluation, the share that grokked all the same. None where there is no such run.
    """

    n: int
    evaluations: Counter[tuple[Phase, Outcome]]
    shares: dict[tuple[Phase, Outcome], float]
    imminent: Estimate | None
    warned: Estimate | None
    given_up: Estimate | None


def guide(runs: Sequence[MeasuredRun], baseline: Sequence[MeasuredRun]) -> Guide | None:
    """Diagnose `runs` with the H* of `baseline`, the same seed left out; None without an H* or an evaluation."""
    found = []
    for run in runs:
        known = [b.summary.h_star for b in baseline if b.seed != run.seed and b.summary.h_star is not None]
        if known:
            found.append((run, _diagnosed(run, float(np.mean(known)))))
    found = [(run, rows) for run, rows in found if rows]
    if not found:
        return None
    evaluations = Counter(row for _, rows in found for row in rows)
    shares = {key: float(np.mean([rows.count(key) / len(rows) for _, rows in found])) for key in evaluations}
    near = Phase.NEAR_THRESHOLD
    hits = [
        [outcome is Outcome.SOON for phase, outcome in rows if phase is near]
        for _, rows in found
        if any(phase is near for phase, _ in rows)
    ]
    grokked = [rows for run, rows in found if run.summary.t_grok is not None]
    doubted = [run for run, rows in found if any(phase is Phase.NO_COLLAPSE for phase, _ in rows)]
    came = sum(run.summary.t_grok is not None for run in doubted)
    return Guide(
        n=len(found),
        evaluations=evaluations,
        shares=shares,
        imminent=over([float(np.mean(each)) for each in hits]),
        warned=proportion(sum((near, Outcome.SOON) in rows for rows in grokked), len(grokked))
        if grokked
        else None,
        given_up=proportion(came, len(doubted)) if doubted else None,
    )


def _diagnosed(run: MeasuredRun, threshold: float) -> list[tuple[Phase, Outcome]]:
    t, t_grok = run.trajectory, run.summary.t_grok
    history = History(t.step, t.entropy, norm=t.parameter_norm)
    rows = []
    for step, accuracy in zip(t.step.tolist(), t.test_accuracy.tolist(), strict=True):
        if t_grok is not None and step >= t_grok:
            break
        known = None if np.isnan(accuracy) else accuracy
        phase = diagnose(
            history.until(step), threshold=threshold, test_accuracy=known, criterion=run.levels.criterion
        ).phase
        rows.append((phase, _outcome(step, t_grok)))
    return rows


def _outcome(step: int, t_grok: int | None) -> Outcome:
    if t_grok is None:
        return Outcome.NEVER
    return Outcome.SOON if t_grok - step <= IMMINENT else Outcome.LATER
