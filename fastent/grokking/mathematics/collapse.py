"""What the collapse of a run says about the paper's Propositions 3 and 6, Lemma 4 and its two heuristics.

Functions of runs that were followed (`fastent.grokking.mathematics.runs`) or of thresholds of many runs. Phases of a
run: before, during and after the fall of H, which starts when H has lost a tenth of what it loses from its largest
value to its smallest afterwards, and ends when it has lost nine tenths.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

from fastent.grokking.experiments.statistics import LEVEL, Estimate
from fastent.grokking.mathematics.runs import FollowedRun
from fastent.reference import forecast

Array = NDArray[np.float64]
Phase = Literal["before", "during", "after", "all"]
PHASES: tuple[Phase, ...] = ("before", "during", "after", "all")


def collapse_span(step: Array, entropy: Array) -> tuple[float, float]:
    """First steps at which a tenth and nine tenths of the fall of H, from its maximum, are done."""
    top = int(np.argmax(entropy))
    high, low = entropy[top], entropy[top:].min()
    fallen = (high - entropy[top:]) / max(high - low, np.finfo(float).tiny)
    return float(step[top:][fallen >= 0.1][0]), float(step[top:][fallen >= 0.9][0])


def steps_by_phase(run: FollowedRun) -> dict[Phase, NDArray[np.bool_]]:
    """Which of the measured steps lie in each of `PHASES`."""
    start, end = collapse_span(run.evaluated("step"), run.evaluated("entropy"))
    step = run.column("step")
    return {
        "before": step < start,
        "during": (step >= start) & (step < end),
        "after": step >= end,
        "all": step >= 0,
    }


@dataclass(frozen=True)
class Descent:
    """Proposition 3 in one phase of a run: single steps, their first order against what was measured.

    Attributes
    ----------
    phase : str
        "before", "during", "after" the collapse, or "all".
    n : int
        Steps measured.
    correlation, rank_correlation, sign_agreement : float
        Of the predicted and the measured change of H: Pearson's r, Spearman's, and the share of steps with the same
        sign. Single steps of an instability, many times the size of the others, decide Pearson's.
    gradient_rank_correlation, gradient_sign : float
        The same, with the loss's gradient in the place of the step, as the paper has it.
    alignment : float
        Mean weighted correlation of log p and the eigenvalues' relative growth.
    aligned : float
        Share of steps with a positive one, which the paper assumes during the collapse.
    leading : float
        Share of steps in which the largest eigenvalue grew.
    change, predicted, from_decay : float
        Means per step in nats: measured, to first order, and the part of weight decay in that.
    """

    phase: Phase
    n: int
    correlation: float
    rank_correlation: float
    sign_agreement: float
    gradient_rank_correlation: float
    gradient_sign: float
    alignment: float
    aligned: float
    leading: float
    change: float
    predicted: float
    from_decay: float


def descent(run: FollowedRun) -> list[Descent]:
    """Proposition 3 by phase."""
    names = (
        "change", "predicted", "along_gradient", "from_decay", "correlation", "leading_growth"
    )  # fmt: skip
    columns = {name: run.column(name) for name in names}
    return [
        _descent(phase, {name: c[chosen] for name, c in columns.items()})
        for phase, chosen in steps_by_phase(run).items()
    ]


def _descent(phase: Phase, c: Mapping[str, Array]) -> Descent:
    change, predicted, gradient = c["change"], c["predicted"], c["along_gradient"]
    return Descent(
        phase=phase,
        n=len(change),
        correlation=float(np.corrcoef(change, predicted)[0, 1]),
        rank_correlation=float(stats.spearmanr(change, predicted).statistic),
        sign_agreement=float(np.mean(np.sign(change) == np.sign(predicted))),
        gradient_rank_correlation=float(stats.spearmanr(change, gradient).statistic),
        gradient_sign=float(np.mean(np.sign(change) == np.sign(gradient))),
        alignment=float(c["correlation"].mean()),
        aligned=float(np.mean(c["correlation"] > 0)),
        leading=float(np.mean(c["leading_growth"] > 0)),
        change=float(change.mean()),
        predicted=float(predicted.mean()),
        from_decay=float(c["from_decay"].mean()),
    )


class Shrinkage(NamedTuple):
    """Lemma 4 on a run: how steady the decay of the effective rank is during the collapse.

    Attributes
    ----------
    identity_error : float
        Largest ``|r'/r - exp(H' - H)|`` between evaluations.
    rank_start, rank_end : float
        exp(H) at the ends of the collapse.
    slowest, fastest : float
        Smallest and largest rate ``-dH/dt`` between evaluations of the collapse, in nats a step.
    rising : float
        Share of those intervals in which H rose.
    """

    identity_error: float
    rank_start: float
    rank_end: float
    slowest: float
    fastest: float
    rising: float


def shrinkage(step: Array, entropy: Array, rank: Array) -> Shrinkage:
    """Lemma 4 from evaluations: entropies in nats and effective ranks, each of shape (m,)."""
    identity = np.abs(rank[1:] / rank[:-1] - np.exp(np.diff(entropy))).max()
    start, end = collapse_span(step, entropy)
    inside = (step >= start) & (step <= end)
    rate = -np.diff(entropy[inside]) / np.diff(step[inside])
    return Shrinkage(
        float(identity),
        float(rank[inside][0]),
        float(rank[inside][-1]),
        float(rate.min()),
        float(rate.max()),
        float(np.mean(rate < 0)),
    )


class Law(NamedTuple):
    """One description of a fall of H: its root mean square residual in normalised H, and its parameters."""

    residual: float
    parameters: dict[str, float]


def fit_laws(step: Array, entropy: Array) -> dict[str, Law]:
    """Fit Proposition 6 and the power law to a fall of H that ends at its last point, grokking.

    Parameters
    ----------
    step, entropy : arrays of shape (m,)
        Evaluations from the start of the fall to T_grok, m >= 5, and the normalised entropy; H* is the last one.

    Returns
    -------
    dict
        "printed": relaxation to H* itself; "repaired": to a free level below H*; "power": the power law with
        C2 = 0; "power with C2"; "line", for scale. Least squares in H.
    """
    t = np.asarray(step, dtype=np.float64)
    left, h_star = t[-1] - t, float(entropy[-1])
    span, gap = float(left[0]), max(float(entropy[0]) - h_star, 1e-6)
    line = np.polynomial.Polynomial.fit(t, entropy, 1)

    def power(values: Array, c2: float) -> Array:
        c1, gamma = np.exp(values)
        above = np.maximum(left - c2, 0.0)
        return forecast.entropy_power(above, h_star=h_star, c1=c1, gamma=gamma, c2=0.0)

    models: dict[str, tuple[Callable[[Array], Array], list[float], list[str]]] = {
        "printed": (
            lambda v: forecast.entropy_relaxing(t - t[0], h0=v[0], floor=h_star, k=np.exp(v[1])),
            [float(entropy[0]), np.log(2 / span)],
            ["h0", "log k"],
        ),
        "repaired": (
            lambda v: forecast.entropy_relaxing(
                t - t[0], h0=v[0], floor=h_star - np.exp(v[2]), k=np.exp(v[1])
            ),
            [float(entropy[0]), np.log(1 / span), np.log(gap)],
            ["h0", "log k", "log (H* - Hinf)"],
        ),
        "power": (
            lambda v: power(v, 0.0), [np.log(span / gap), 0.0], ["log C1", "log gamma"]
        ),
        "power with C2": (
            lambda v: power(v[:2], span * v[2]), [np.log(span / gap), 0.0, 0.05], ["log C1", "log gamma", "C2 / span"]
        ),
    }  # fmt: skip
    laws = {"line": Law(_rms(line(t) - entropy), {"slope": float(line.convert().coef[1])})}
    for name, (model, start, names) in models.items():
        bounds = (-20.0, 20.0) if name != "power with C2" else ([-20.0, -20.0, 0.0], [20.0, 20.0, 0.9])
        found = optimize.least_squares(lambda v, f=model: f(v) - entropy, start, bounds=bounds, x_scale="jac")
        laws[name] = Law(_rms(found.fun), dict(zip(names, found.x.tolist(), strict=True)))
    return laws


def _rms(x: Array) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


BLOCKS, RESAMPLES = 8, 2000
"""Of the bootstrap along a run."""


def curvature_correlation(run: FollowedRun) -> tuple[Estimate, Estimate]:
    """Spearman correlation of the Hessian's largest eigenvalue with ``-dH/dt``, over the run and its collapse.

    Neighbouring points are not independent, so the interval is that of a circular block bootstrap.

    Returns
    -------
    (Estimate, Estimate)
        Over the whole run, and from the maximum of H on.

    References
    ----------
    Politis and Romano, "A circular block-resampling procedure for stationary data", 1992.
    """
    step, entropy = run.evaluated("step"), run.evaluated("entropy")
    at = np.array([s for s, _ in run.curvature], dtype=np.float64)
    sharp = np.array([ritz.value for _, ritz in run.curvature])
    gap = float(np.median(np.diff(at)))
    rate = (np.interp(at - gap / 2, step, entropy) - np.interp(at + gap / 2, step, entropy)) / gap
    inner = (at >= step[0] + gap / 2) & (at <= step[-1] - gap / 2)
    falling = inner & (at >= step[int(np.argmax(entropy))])
    return _blocked_spearman(sharp[inner], rate[inner]), _blocked_spearman(sharp[falling], rate[falling])


def _blocked_spearman(x: Array, y: Array) -> Estimate:
    n, rng = len(x), np.random.default_rng(0)
    length = max(1, round(n / BLOCKS))
    starts = rng.integers(0, n, (RESAMPLES, -(-n // length)))
    chosen = ((starts[:, :, None] + np.arange(length)) % n).reshape(RESAMPLES, -1)[:, :n]
    ranks_x, ranks_y = stats.rankdata(x[chosen], axis=1), stats.rankdata(y[chosen], axis=1)
    centred = [r - r.mean(axis=1, keepdims=True) for r in (ranks_x, ranks_y)]
    norm = np.sqrt((centred[0] ** 2).sum(axis=1) * (centred[1] ** 2).sum(axis=1))
    samples = (centred[0] * centred[1]).sum(axis=1) / np.maximum(norm, 1e-12)
    low, high = np.quantile(samples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    value = float(stats.spearmanr(x, y).statistic)
    return Estimate(value, float(low), float(high), n, f"circular block bootstrap, blocks of {length}")


@dataclass(frozen=True)
class Concentration:
    """Heuristic 2: how far H* varies over seeds, and between tasks.

    Attributes
    ----------
    within : Estimate
        Standard deviation over seeds of one task, pooled, with the interval of a normal sample.
    between : Estimate
        Standard deviation of the tasks' true means, by analysis of variance (0 where it comes out negative).
    share : Estimate
        Share of the variance that lies between tasks (intraclass correlation), with its F interval.
    p_value : float
        Of the F test that all tasks have one mean.
    """

    within: Estimate
    between: Estimate
    share: Estimate
    p_value: float


def concentration(h_star: Mapping[str, Sequence[float]]) -> Concentration:
    """Spread of H* within and between tasks, from its values by task.

    Raises
    ------
    ValueError
        If there are fewer than two tasks, or a task with fewer than two values.

    References
    ----------
    Searle, Casella and McCulloch, Variance Components, 1992, chapter 3.
    """
    groups = [np.asarray(values, dtype=np.float64) for values in h_star.values()]
    if len(groups) < 2 or min(map(len, groups)) < 2:
        raise ValueError("needs at least two tasks with at least two seeds each")
    n, k = sum(map(len, groups)), len(groups)
    error = n - k
    inside = float(sum(((g - g.mean()) ** 2).sum() for g in groups) / error)
    mean = np.concatenate(groups).mean()
    outside = float(sum(len(g) * (g.mean() - mean) ** 2 for g in groups) / (k - 1))
    size = (n - sum(len(g) ** 2 for g in groups) / n) / (k - 1)
    ratio = outside / inside
    tail = (1 - LEVEL) / 2
    chi = stats.chi2(error).ppf([1 - tail, tail])
    ends = [ratio / stats.f(k - 1, error).ppf(q) for q in (1 - tail, tail)]
    shares = [(f - 1) / (f - 1 + size) for f in (ratio, *ends)]
    between = max(0.0, (outside - inside) / size)
    low, high = (max(0.0, inside * (f - 1) / size) ** 0.5 for f in ends)
    spread = [float((error * inside / c) ** 0.5) for c in chi]
    return Concentration(
        within=Estimate(inside**0.5, spread[0], spread[1], n, "chi-squared, pooled"),
        between=Estimate(between**0.5, low, high, k, "analysis of variance, F interval"),
        share=Estimate(max(0.0, shares[0]), max(0.0, shares[1]), max(0.0, shares[2]), n, "F interval"),
        p_value=float(stats.f(k - 1, error).sf(ratio)),
    )
