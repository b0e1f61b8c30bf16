"""Does the entropy forecast grokking better than the clock? Leave-one-run-out cross-validation of both.

Each run that grokked is left out in turn; H* and the law are fitted to the others and forecast its remaining
time at each of its evaluations above H*. Beside it, at the same evaluations, the clock: the mean ``T_grok`` of
the other runs minus t, cut at 0 because no forecast lies in the past. In every run ``T_grok - t`` falls by one a
step, so the clock explains much of it: a claim for the entropy has to beat the clock, not the mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fastent.forecast.history import Array, History
from fastent.forecast.power_law import PowerLaw, Triples, solve


@dataclass(frozen=True, eq=False)
class HeldOut:
    """One run, forecast from the others. Arrays have shape (m,), an entry per evaluation above H*; m may be 0.

    Attributes
    ----------
    run : int
        Its place among the histories given.
    law : PowerLaw
        Fitted to the other runs, without intervals; `law.h_star` is theirs.
    t_grok : float
        Its own.
    step : array
        Evaluation steps t.
    remaining : array
        ``t_grok - t``, the truth.
    by_law, by_clock : arrays
        The two forecasts of it, in steps, not negative.
    """

    run: int
    law: PowerLaw
    t_grok: float
    step: Array
    remaining: Array
    by_law: Array
    by_clock: Array


@dataclass(frozen=True, eq=False)
class Score:
    """How well one of the two forecasts the runs left out.

    Attributes
    ----------
    r_squared : float
        1 - squared error / squared deviation from the mean remaining time, over all evaluations; negative
        when the mean does better.
    mae : array of shape (n_runs,)
        Mean absolute error of each run, in steps; NaN for a run without evaluations above H*.
    mape : array of shape (n_runs,)
        The same over the run's ``T_grok``, as a fraction (the paper's percentage error).
    """

    r_squared: float
    mae: Array
    mape: Array


@dataclass(frozen=True)
class LeaveOneOut:
    """The runs in turn left out, in order; `score` sums them up."""

    runs: tuple[HeldOut, ...]

    def score(self, by: Literal["law", "clock"]) -> Score:
        """Score the law or the clock, at the same evaluations.

        Raises
        ------
        ValueError
            If `by` is unknown.
        """
        if by not in ("law", "clock"):
            raise ValueError(f"by must be 'law' or 'clock'; got {by!r}")
        errors = [(run.by_law if by == "law" else run.by_clock) - run.remaining for run in self.runs]
        truth = np.concatenate([run.remaining for run in self.runs])
        mae = np.array([np.abs(error).mean() if error.size else np.nan for error in errors])
        deviation = ((truth - truth.mean()) ** 2).sum()
        return Score(
            r_squared=float(1 - (np.concatenate(errors) ** 2).sum() / deviation),
            mae=mae,
            mape=mae / np.array([run.t_grok for run in self.runs]),
        )


def leave_one_run_out(histories: Sequence[History]) -> LeaveOneOut:
    """Forecast each run that grokked from a law, and from a clock, fitted to the others.

    Parameters
    ----------
    histories : sequence of History
        One per seed, at least three that grokked with a usable entropy there; the others take no part.

    Raises
    ------
    ValueError
        As `PowerLaw.fit`.

    References
    ----------
    arXiv 2604.13123, Section 8, "Leave-one-out prediction", which has no clock.
    """
    triples = Triples.of(histories)
    n = len(triples.origin)
    if n < 3:
        raise ValueError(
            f"leaving one run out needs at least 3 that grokked with a usable entropy there; got {n} of "
            f"{len(histories)} runs"
        )
    held_out = []
    for i, others in enumerate(~np.eye(n, dtype=bool)):
        fit = solve(triples, others)
        law = PowerLaw(
            fit.c1,
            fit.gamma,
            fit.c2,
            fit.h_star,
            fit.r_squared,
            gap_range=fit.gap_range,
            n_points=fit.n_points,
        )
        own = (triples.run == i) & (triples.entropy > fit.h_star)
        step = triples.step[own]
        held_out.append(
            HeldOut(
                run=triples.origin[i],
                law=law,
                t_grok=float(triples.t_grok[i]),
                step=step,
                remaining=triples.remaining[own],
                by_law=law.remaining(triples.entropy[own]),
                by_clock=np.maximum(triples.t_grok[others].mean() - step, 0),
            )
        )
    return LeaveOneOut(tuple(held_out))
