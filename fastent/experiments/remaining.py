"""Predictors of the steps that remain until grokking: the paper's Table 2, with the clock beside it.

Every predictor is fitted at the same evaluations, those before grokking with H above the mean H*, by least squares
of `remaining = a x^gamma + b`, gamma within `fastent.triples.GAMMA_BOUNDS`, a and b of either sign: a norm may rise or
fall towards grokking. R2 is given in sample, as the paper's, and for runs left out of the fit and of the constants
(H*, the norm at grokking). In every run the remaining steps fall by one a step, so the clock, which needs no
measurement of the network, explains much of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastent.experiments.jackknife import EXPLAINED, jackknife
from fastent.experiments.statistics import Estimate
from fastent.train.quantities import MeasuredRun
from fastent.triples import GAMMA_BOUNDS, fit_line

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

NORM, NORM_GAP, ENTROPY, ENTROPY_GAP = "norm", "norm gap, |norm − norm at T_grok|", "H", "H gap, H − H*"
CLOCK = "clock: mean T_grok of the runs, minus the step"

_GAMMAS = np.geomspace(*GAMMA_BOUNDS, 241)


@dataclass(frozen=True)
class Predictor:
    """One row of Table 2. `in_sample` is R2 with an interval from leaving out runs; `left_out`, R2 on runs left out."""

    name: str
    gamma: float | None
    in_sample: Estimate
    left_out: float


@dataclass(frozen=True)
class Evaluations:
    """Evaluations before grokking with H above H*, of the runs that grokked, flat; `run` numbers these runs.

    `h_star`, `norm_star` and `t_grok` hold each run's values at its grokking, shape (n_runs,).
    """

    run: NDArray[np.int64]
    step: Array
    remaining: Array
    entropy: Array
    norm: Array
    h_star: Array
    norm_star: Array
    t_grok: Array

    @classmethod
    def of(cls, runs: Sequence[MeasuredRun]) -> Evaluations:
        """Collect them; a run without a usable entropy at its grokking takes no part."""
        ends = [
            (run, s.t_grok, s.h_star, s.norm_at_grok)
            for run in runs
            for s in [run.summary]
            if s.t_grok is not None and s.h_star is not None and s.norm_at_grok is not None
        ]
        h_star = _floats([h for *_, h, _ in ends])
        parts = [np.empty((5, 0))]
        for k, (run, t_grok, _, _) in enumerate(ends):
            t = run.trajectory
            kept = (t.step < t_grok) & (t.entropy > h_star.mean()) & np.isfinite(t.parameter_norm)
            step = t.step[kept]
            parts.append(
                np.stack(
                    [np.full(step.size, k), step, t_grok - step, t.entropy[kept], t.parameter_norm[kept]]
                )
            )
        run_number, step, remaining, entropy, norm = np.concatenate(parts, axis=1)
        return cls(
            run=run_number.astype(np.int64),
            step=step,
            remaining=remaining,
            entropy=entropy,
            norm=norm,
            h_star=h_star,
            norm_star=_floats([norm for *_, norm in ends]),
            t_grok=_floats([t for _, t, *_ in ends]),
        )


def _floats(values: ArrayLike) -> Array:
    return np.asarray(values, dtype=np.float64)


Constants = Callable[[Evaluations, Mask], Array]

PREDICTORS: dict[str, Constants] = {
    NORM: lambda data, used: data.norm,
    NORM_GAP: lambda data, used: np.abs(data.norm - data.norm_star[used].mean()),
    ENTROPY: lambda data, used: data.entropy,
    ENTROPY_GAP: lambda data, used: np.maximum(data.entropy - data.h_star[used].mean(), 0.0),
}
"""By name, a predictor at every evaluation, its constants calibrated on the runs of a mask."""


def table(data: Evaluations) -> tuple[Predictor, ...]:
    """Fit every predictor and the clock; empty with fewer than three runs."""
    n = data.t_grok.size
    if n < 3 or data.remaining.size == 0:
        return ()
    rows = [
        _row(name, data, functools.partial(_fit, data, predictor)) for name, predictor in PREDICTORS.items()
    ]
    return (*rows, _row(CLOCK, data, lambda used: (None, _clock(data, used))))


Fitted = tuple[float | None, Array]
"""Gamma, and the forecast at every evaluation of every run."""


def _row(name: str, data: Evaluations, fit: Callable[[Mask], Fitted]) -> Predictor:
    n = data.t_grok.size
    everyone, others = np.ones(n, dtype=bool), ~np.eye(n, dtype=bool)
    gamma, whole = fit(everyone)
    folds = [fit(used)[1] for used in others]
    held_out = np.empty_like(data.remaining)
    for i, fold in enumerate(folds):
        held_out[data.run == i] = fold[data.run == i]
    left_out = [_r_squared(fold, data, used) for fold, used in zip(folds, others, strict=True)]
    in_sample = jackknife(_r_squared(whole, data, everyone), left_out, EXPLAINED)
    return Predictor(name, gamma, in_sample, _r_squared(held_out, data, everyone))


def _clock(data: Evaluations, used: Mask) -> Array:
    """Forecast by the mean T_grok of the runs `used`; no forecast lies in the past."""
    forecast: Array = np.maximum(data.t_grok[used].mean() - data.step, 0)
    return forecast


def _fit(data: Evaluations, predictor: Constants, used: Mask) -> Fitted:
    """Least squares on the runs `used`."""
    x = predictor(data, used)
    kept = used[data.run]
    top = float(x[kept].max()) or 1.0
    y = data.remaining[kept]
    powers = (x[kept] / top) ** _GAMMAS[:, None]
    found = []
    for sign in (1.0, -1.0):
        # fit_line wants a slope of at least 0: of the mirror image, for predictors that rise towards grokking.
        slope, intercept, error = fit_line(powers, sign * y, c2="free")
        k = int(np.argmin(error))
        found.append((float(error[k]), float(_GAMMAS[k]), sign * float(slope[k]), sign * float(intercept[k])))
    _, gamma, slope_at, intercept_at = min(found)
    forecast: Array = slope_at * (x / top) ** gamma + intercept_at
    return gamma, forecast


def _r_squared(forecast: Array, data: Evaluations, used: Mask) -> float:
    """Of the evaluations of the runs `used`."""
    kept = used[data.run]
    truth = data.remaining[kept]
    total = float(((truth - truth.mean()) ** 2).sum())
    return 1 - float(((forecast[kept] - truth) ** 2).sum()) / total if total > 0 else float("nan")
