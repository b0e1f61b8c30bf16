"""What stopping early saves and costs, and what the monitor costs.

Stopping as the paper recommends (section 10): 1,000 steps after H fell below H*, here that of the other seeds. What
is saved is a share of the budget, and the budget is a choice: a run that groks at a quarter of it leaves three quarters
to be saved by whatever tells that it has grokked. So the same is computed for stopping at T_grok itself, which needs
the test accuracy and no entropy.

The monitor's cost is what the trainer's timing log has measured: representations of the probe and their entropy, of
the whole stack at each evaluation, against the time between the log's entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastent.experiments.columns import over
from fastent.experiments.leads import left_out_threshold
from fastent.experiments.statistics import Estimate, proportion
from fastent.experiments.stored import StoredRun
from fastent.stopping import StopAfterCrossing
from fastent.train.quantities import MeasuredRun

AFTER = StopAfterCrossing().steps
"""Steps between the crossing and the stop; the paper's 1,000."""


@dataclass(frozen=True)
class Stop:
    """One run stopped by its entropy: `step` of the stop and the test accuracy then; None if it never crosses.

    `final_accuracy` is that at the end of the run, `final_step`. A run that ended before its stop is read at its end.
    """

    seed: int
    crossed: int | None
    step: int | None
    accuracy: float | None
    final_accuracy: float
    final_step: int
    t_grok: int | None


@dataclass(frozen=True)
class Savings:
    """Stopping over runs.

    `saved`: share of `budget` saved by the runs that cross (those that do not go on to the budget and save nothing);
    `saved_by_accuracy`: the same for stopping at T_grok; `grokked`: share of stopped runs at the criterion when
    stopped; `within`: share of the runs that cross in which grokking comes after, and within 1,000 steps.
    """

    stops: tuple[Stop, ...]
    budget: int
    saved: Estimate | None
    saved_by_accuracy: Estimate | None
    grokked: Estimate | None
    within: Estimate | None


def savings(runs: Sequence[MeasuredRun], budget: int) -> Savings:
    """Stop each run 1,000 steps after it falls below the mean H* of the other seeds.

    Parameters
    ----------
    runs : sequence of MeasuredRun
        Complete runs of one configuration, each seed once.
    budget : int
        Steps that a run would otherwise take.
    """
    stops = [_stop(run, crossed) for run, crossed in zip(runs, left_out_threshold(runs).times, strict=True)]
    stopped = [stop for stop in stops if stop.step is not None]
    reached = [
        stop.accuracy is not None and stop.accuracy >= run.levels.criterion
        for stop, run in zip(stops, runs, strict=True)
        if stop.step is not None
    ]
    soon = [
        stop.crossed is not None and stop.t_grok is not None and 0 <= stop.t_grok - stop.crossed <= AFTER
        for stop in stopped
    ]
    return Savings(
        stops=tuple(stops),
        budget=budget,
        saved=over([1 - min(budget if s.step is None else s.step, budget) / budget for s in stops]),
        saved_by_accuracy=over([1 - min(s.t_grok or budget, budget) / budget for s in stops]),
        grokked=proportion(sum(reached), len(reached)) if reached else None,
        within=proportion(sum(soon), len(soon)) if soon else None,
    )


def _stop(run: MeasuredRun, crossed: int | None) -> Stop:
    t = run.trajectory
    step = None if crossed is None else crossed + AFTER
    # The accuracy that is known when the run stops: at the last evaluation until then.
    at = None if step is None else int(np.searchsorted(t.step, step, side="right")) - 1
    return Stop(
        seed=run.seed,
        crossed=crossed,
        step=step,
        accuracy=None if at is None else float(t.test_accuracy[at]),
        final_accuracy=float(t.test_accuracy[-1]),
        final_step=int(t.step[-1]),
        t_grok=run.summary.t_grok,
    )


@dataclass(frozen=True)
class Cost:
    """What the monitor took, over runs: share of the training's time, and milliseconds a run and evaluation."""

    share: Estimate
    milliseconds: Estimate
    machines: tuple[str, ...]


def monitor_cost(runs: Sequence[StoredRun]) -> Cost | None:
    """Read the cost off the timing logs; None if none of them has it."""
    shares, milliseconds, machines = [], [], set()
    for run in runs:
        measured = [row for row in run.timing if "monitor_seconds" in row]
        elapsed = _elapsed(run.timing)
        if not measured or elapsed <= 0:
            continue
        shares.append(sum(row["monitor_seconds"] for row in measured) / elapsed)
        milliseconds.append(1e3 * float(np.mean([row["monitor_seconds"] / row["seeds"] for row in measured])))
        device = str(run.environment.get("device", "unknown"))
        machines.add(str(run.environment.get("cpu", "unknown")) if device == "cpu" else device)
    share, each = over(shares), over(milliseconds)
    if share is None or each is None:
        return None
    return Cost(share, each, tuple(sorted(machines)))


def _elapsed(timing: Sequence[dict[str, object]]) -> float:
    """Seconds of the executions of a run: its clock starts anew with each, and what lies between is nobody's."""
    total = 0.0
    first = last = 0.0
    for row in timing:
        seconds = float(str(row["seconds"]))
        if row["event"] in ("start", "resume"):
            total += last - first
            first = seconds
        last = seconds
    return total + last - first
