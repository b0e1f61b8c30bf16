"""E5, the question whether a power law of the entropy gap forecasts grokking, and what that is worth.

Analysis of E1's runs, and of a few trained to the limit of steps (paper, section 8, Figure 4b; section 10; Appendix D).
The law is fitted the paper's way, to all evaluations of all runs that grokked, and judged by R2; and by leaving out
whole runs, H* and the law fitted to the others, against the clock at the same evaluations
(`fastent.forecast.power_law`). What the runs determine of its parameters is asked of the profile of gamma and of the
law without C2.

The law's rivals are judged by `contest`: each run that grokked is forecast from the others, at every evaluation from
T_mem on, and whatever a rival leaves open (a threshold, a window, an exponent, how much to shrink) is chosen by leaving
out one more run, so never with a look at the run that is forecast. All take for granted that the run groks; what they
say of runs that never do is counted beside. The intervals that a forecast comes with are tried in the same way, each
run left out once, beside intervals of the clock that are made alike.

Stopping as the paper recommends (section 10): 1,000 steps after H fell below H*, here that of the other seeds. What is
saved is a share of the budget, and the budget is a choice: a run that groks at a quarter of it leaves three quarters to
be saved by whatever tells that it has grokked. So the same is computed for stopping at T_grok itself, which needs the
test accuracy and no entropy. The monitor's cost is what the trainer's timing log has measured: representations of the
probe and their entropy, of the whole stack at each evaluation, against the time between the log's entries.

Table 5, the paper's diagnostic guide, is read as `fastent.diagnose` reads it at every evaluation of a run before it
grokked, from the run so far, with the H* of the baseline's other seeds. Each run has the same weight. Runs of every
experiment that trains on pairs like theirs take part, also those that do not grok: a guide is needed where it is not
known which those are.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from fastent.forecast.diagnosis import Phase, Tolerances, diagnosis_of
from fastent.forecast.history import History
from fastent.forecast.power_law import (
    FORECAST_LEVEL,
    GAMMA_BOUNDS,
    RUNS_FOR_INTERVAL,
    LeaveOneOut,
    PowerLaw,
    Triples,
    jackknife_plus,
    leave_one_run_out,
    profile_gamma,
    residual_life,
    solve,
)
from fastent.forecast.predict import predict_grok_time
from fastent.grokking.experiments.claims import (
    CLAIMS,
    NONE,
    Experiment,
    Finding,
    Findings,
    by_run,
    counted,
    decimal,
    judge,
    judge_positive,
    judge_share,
    least,
    of,
    percent,
    span,
    steps,
    worded,
)
from fastent.grokking.experiments.data import Runs
from fastent.grokking.experiments.document import Block, Section, Table, Text, Verdict
from fastent.grokking.experiments.e4_predictors import fit_power
from fastent.grokking.experiments.figures import DASHED, DOTTED, LIGHT, WIDTH, drawn, legend_above, thousands
from fastent.grokking.experiments.leads import left_out_threshold
from fastent.grokking.experiments.statistics import (
    UNKNOWN,
    Array,
    Estimate,
    Mask,
    less,
    mean_known,
    over,
    share,
    where_known,
)
from fastent.monitor.monitor import StopAfterCrossing
from fastent.records import Course

TITLE = "E5: does a power law forecast grokking?"

GAMMAS = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0)
"""Exponents at which the profile of the likelihood is shown."""


@dataclass(frozen=True)
class Validation:
    """Forecasts of runs left out.

    `law` and `clock` hold each run's mean absolute error over its T_grok, as estimates over runs; `advantage` is the
    clock's minus the law's, over runs; `better` the share of runs that the law forecasts better. `warning` is T_grok
    minus the first evaluation after T_mem at which the law forecasts at all, in steps.

    By the paper's second version: `last`, the law's error at the last evaluation before T_grok with H above H*, by run
    (shares of T_grok), `now` that of saying "it groks now" there; `below` T_grok minus the first evaluation at which
    the law's error is under a fifth of T_grok, in steps.
    """

    runs: LeaveOneOut
    law: Estimate
    clock: Estimate
    law_r_squared: float
    clock_r_squared: float
    advantage: Estimate
    better: Estimate
    warning: Estimate
    last: Array
    now: Array
    below: Estimate


@dataclass(frozen=True, eq=False)
class Forecasts:
    """Analysis of E5. `law`, `profile` and `validation` are None with fewer than three runs that grokked.

    `profile` holds R2 at `GAMMAS`. `long` are the runs that went on to the limit of steps. `contest` is the rivals' on
    E1's runs, None with fewer than four that grokked, and `elsewhere` by name on those of other settings. `spans` are
    by name the intervals of every setting with runs enough.
    """

    runs: Runs
    histories: tuple[History, ...]
    law: PowerLaw | None
    profile: tuple[float, ...] | None
    validation: Validation | None
    saved: Savings
    long: Runs
    cost: Cost | None
    guide: Guide | None
    contest: Contest | None
    elsewhere: Mapping[str, Contest]
    spans: Mapping[str, Spans]
    after: After


def analyse(runs: Runs) -> Forecasts | None:
    """Fit, cross-validate and stop E1's runs, with E5's and, for Table 5 alone, all others; None without E1's."""
    everything, runs = runs, runs.select("e1")
    if not len(runs):
        return None
    histories = _histories(runs)
    law: PowerLaw | None = None
    profile: tuple[float, ...] | None = None
    validation: Validation | None = None
    with contextlib.suppress(ValueError):  # too few runs that grokked, or too few evaluations above H*
        law = PowerLaw.fit(histories)
        profile = tuple(float(r) for r in profile_gamma(histories, GAMMAS))
        validation = _validate(leave_one_run_out(histories), runs)
    pairs = [runs.stored[0].config[name] for name in PAIRS]
    guided = everything[
        [
            run.experiment in GUIDED and [run.config[name] for name in PAIRS] == pairs
            for run in everything.stored
        ]
    ]
    others = {
        f"{experiment.upper()}: {condition}, {task}": everything.select(experiment, condition, task)
        for experiment, condition, task in dict.fromkeys(
            (run.experiment, run.condition, str(run.config["task"])) for run in everything.stored
        )
        if experiment not in ("e1", "e5")
    }
    return Forecasts(
        runs=runs,
        histories=tuple(histories),
        law=law,
        profile=profile,
        validation=validation,
        saved=savings(runs, int(runs.setting("max_steps").min())),
        long=everything.select("e5"),
        cost=monitor_cost(runs),
        guide=guide(guided, runs),
        contest=contest(runs, guided, law),
        elsewhere={
            name: found
            for name, other in others.items()
            if len(other) >= ELSEWHERE and (found := contest(other)) is not None
        },
        spans={
            name: apart
            for name, other in {"E1": runs, **others}.items()
            if (apart := spans(_histories(other))) is not None
        },
        after=after_grokking(runs),
    )


def _histories(runs: Runs) -> list[History]:
    return [
        History(step, h, t_grok if np.isfinite(t_grok) else None)
        for t_grok, (step, h) in zip(runs.t_grok, runs.lines(runs.entropy), strict=True)
    ]


def _validate(left_out: LeaveOneOut, runs: Runs) -> Validation:
    law, clock = left_out.score("law"), left_out.score("clock")
    advantage = clock.mape - law.mape
    warnings, last, now, below = [], [], [], []
    for held_out in left_out.runs:
        after = held_out.step[held_out.step >= runs.t_mem[held_out.run]]
        warnings += [held_out.t_grok - float(after[0])] if after.size else []
        error = np.abs(held_out.by_law - held_out.remaining) / held_out.t_grok
        close = held_out.remaining[error < CLOSE]
        below += [float(close[0])] if close.size else []
        if error.size:
            last.append(float(error[-1]))
            now.append(float(held_out.remaining[-1]) / held_out.t_grok)
    return Validation(
        runs=left_out,
        law=over(law.mape, least=0),
        clock=over(clock.mape, least=0),
        law_r_squared=law.r_squared,
        clock_r_squared=clock.r_squared,
        advantage=over(advantage),
        better=share(where_known(advantage, lambda gain: gain > 0)),
        warning=over(warnings, least=0),
        last=np.array(last),
        now=np.array(now),
        below=over(below, least=0),
    )


CLOSE = 0.2
"""Error as a share of T_grok from which on a forecast counts as a warning, by the paper's second version."""

GUIDED = ("e1", "e2", "e3", "e7")
"""Experiments with runs on the pairs of E1's: these are diagnosed, and those that never grok are forecast."""

PAIRS = ("task", "modulus", "train_fraction")
"""Settings that say what is learnt, and from which share of it."""

ELSEWHERE = 5
"""Runs of another setting from which on the rivals are compared there too."""


@dataclass(frozen=True, eq=False)
class Plateau:
    """Evaluations of runs from T_mem until they grok, or to their end, flat.

    `run` numbers the run of each; `remaining` are its steps until T_grok, NaN in a run that never groks. `where` (n, m)
    says which evaluations of the runs they are.
    """

    runs: Runs
    where: Mask
    run: NDArray[np.int64]
    step: Array
    remaining: Array
    triples: Triples

    @classmethod
    def of(cls, runs: Runs) -> Plateau:
        """Collect those with H, norm and training loss."""
        until = np.where(runs.grokked, runs.t_grok, np.inf)
        known = ~np.isnan(runs.entropy + runs.norm + runs.column("train_loss"))
        where = (runs.step >= runs.t_mem[:, None]) & (runs.step < until[:, None]) & known
        run, step = np.nonzero(where)[0], runs.step[where]
        return cls(runs, where, run, step, runs.t_grok[run] - step, Triples.of(_histories(runs)))

    @functools.cached_property
    def columns(self) -> dict[str, Array]:
        """What was computed of the runs once, by name."""
        return {}

    def column(self, name: str, make: Callable[[], Array]) -> Array:
        """Return an array of the runs, made at the first call."""
        if name not in self.columns:
            self.columns[name] = make()
        return self.columns[name]

    def mean_error(self, forecast: Array) -> Array:
        """Mean absolute error of a forecast over each run's evaluations, as a share of its T_grok, (n,)."""
        n = len(self.runs)
        total = np.bincount(self.run, np.abs(forecast - self.remaining), n)
        share: Array = total / np.bincount(self.run, minlength=n) / self.runs.t_grok
        return share


Forecaster = Callable[[Plateau, Mask], Array]
"""Fitted to the runs of a mask, all of which grokked: the steps that remain at every evaluation of every run."""


@dataclass(frozen=True)
class Rival:
    """A way to forecast: `needs` says what of the run it reads, `choices` holds by name what is chosen by leaving out.

    `column` is a column of the metrics that not every run has.
    """

    name: str
    needs: str
    choices: Mapping[str, Forecaster]
    column: str = "entropy"


def _clock(plateau: Plateau, used: Mask) -> Array:
    return float(plateau.runs.t_grok[used].mean()) - plateau.step


def _still_running(statistic: Callable[[Array], np.floating]) -> Forecaster:
    return lambda plateau, used: residual_life(plateau.runs.t_grok[used], plateau.step, statistic)


def _first_passage(*, once: bool) -> Forecaster:
    """``log(V / V*) / (2 kappa eta lambda)`` steps, from T_mem with V there, or from now with V now.

    V is the squared norm; V*, the geometric mean at T_grok, and the constant before the logarithm, by least squares,
    are those of the other runs. The law needs kappa > 0; where V is below V* when the run has memorised, the runs give
    another sign, which is left as it is.
    """

    def forecast(plateau: Plateau, used: Mask) -> Array:
        runs = plateau.runs
        log_v = plateau.column("log V", lambda: 2 * np.log(runs.norm))
        excess = log_v - float(runs.at(log_v, runs.t_grok)[used].mean())
        if not once:
            x, kept = excess[plateau.where], used[plateau.run]
            left: Array = x * _slope(x[kept], plateau.remaining[kept])
            return left
        x, delay = runs.at(excess, runs.t_mem), runs.t_grok - runs.t_mem
        times = runs.t_mem + x * _slope(x[used], delay[used])
        return times[plateau.run] - plateau.step

    return forecast


def _slope(x: Array, y: Array) -> float:
    """Slope through the origin; 0 where x is."""
    return float(x @ y / (x @ x)) if x.any() else 0.0


def _running_median(values: Array, window: int) -> Array:
    """Median of the last `window` values of each row (n, m); before its first stands the first."""
    padded = np.concatenate([np.repeat(values[:, :1], window - 1, axis=1), values], axis=1)
    median: Array = np.median(np.lib.stride_tricks.sliding_window_view(padded, window, axis=1), axis=2)
    return median


_EXPONENTS = np.geomspace(*GAMMA_BOUNDS, 41)


_LEAST_LOSS = float(np.finfo(np.float32).tiny)


def _loss(window: int) -> Forecaster:
    """Fit ``a x^gamma + b``, x how far log training loss, a median over evaluations, lies above its mean at T_grok."""

    def forecast(plateau: Plateau, used: Mask) -> Array:
        runs = plateau.runs
        log_loss = plateau.column(
            f"log loss, {window}",
            # A loss can round to 0.
            lambda: np.log(np.maximum(_running_median(runs.column("train_loss"), window), _LEAST_LOSS)),
        )
        above = np.maximum(log_loss[plateau.where] - runs.at(log_loss, runs.t_grok)[used].mean(), 0)
        return fit_power(above, plateau.remaining, used[plateau.run], _EXPONENTS)[1]

    return forecast


def _share(window: int) -> Forecaster:
    """Fit ``a x^gamma + b``, x what is not in the five frequencies, a median over evaluations."""

    def forecast(plateau: Plateau, used: Mask) -> Array:
        rest = plateau.column(
            f"rest, {window}",
            lambda: 1 - _running_median(plateau.runs.column("top_share"), window)[plateau.where],
        )
        return fit_power(rest, plateau.remaining, used[plateau.run], _EXPONENTS)[1]

    return forecast


def _since(threshold: float) -> Forecaster:
    """Take the mean residual life since the share first reached a threshold after T_mem; before, the clock's."""

    def forecast(plateau: Plateau, used: Mask) -> Array:
        runs = plateau.runs
        reached = plateau.column(
            f"{threshold} reached",
            lambda: runs.first((runs.column("top_share") >= threshold) & (runs.step >= runs.t_mem[:, None])),
        )
        leads = (runs.t_grok - reached)[used]
        leads = leads[leads > 0]
        before = residual_life(runs.t_grok[used], plateau.step, np.mean)
        if not leads.size:
            return before
        elapsed = plateau.step - reached[plateau.run]
        return np.where(elapsed >= 0, residual_life(leads, elapsed, np.mean), before)

    return forecast


def _law(plateau: Plateau, used: Mask) -> Array:
    """Fit as the paper does, to all evaluations before grokking; C2 below H*."""
    fit = solve(plateau.triples, used[list(plateau.triples.origin)])
    return fit.remaining(np.maximum(plateau.runs.entropy[plateau.where], fit.h_star))


def _gap_and_clock(gamma: float, shrink: float) -> Forecaster:
    """Fit ``a (H - H*)^gamma + b t + c`` by least squares, a and b shrunk (ridge, in units of the terms' variance)."""

    def forecast(plateau: Plateau, used: Mask) -> Array:
        gap = plateau.runs.entropy[plateau.where] - plateau.runs.h_star[used].mean()
        terms = np.stack([np.maximum(gap, 0) ** gamma, plateau.step])
        kept = used[plateau.run]
        mean, spread = terms[:, kept].mean(1, keepdims=True), terms[:, kept].std(1, keepdims=True)
        terms = (terms - mean) / np.where(spread > 0, spread, 1.0)
        x, y = terms[:, kept], plateau.remaining[kept]
        weights = np.linalg.lstsq(x @ x.T / y.size + shrink * np.eye(2), x @ (y - y.mean()) / y.size)[0]
        left: Array = weights @ terms + y.mean()
        return left

    return forecast


CLOCK, RUNNING = "clock: mean T_grok of the other runs", "clock among those still running"
LAW, WITH_H = "power law of the gap (the paper's)", "H"

RIVALS = (
    Rival(CLOCK, "nothing", {"": _clock}),
    Rival(
        RUNNING,
        "nothing",
        {"mean": _still_running(np.mean), "median": _still_running(np.median)},
    ),
    Rival(
        "norm, first passage",
        "norm",
        {"from V at T_mem": _first_passage(once=True), "from V now": _first_passage(once=False)},
    ),
    Rival(
        "training loss",
        "training loss",
        {f"median of {window}": _loss(window) for window in (1, 3, 5, 9)},
    ),
    Rival(
        "label share in five frequencies",
        "labels of the test set",
        {
            **{f"{part:g} reached": _since(part) for part in (0.3, 0.5, 0.7, 0.9)},
            **{f"power law, median of {window}": _share(window) for window in (1, 5)},
        },
        "top_share",
    ),
    Rival(LAW, WITH_H, {"": _law}),
    Rival(
        "gap and clock",
        WITH_H,
        {
            f"γ = {gamma:g}, ridge {shrink:g}": _gap_and_clock(gamma, shrink)
            for gamma in (0.5, 1.0, 2.0)
            for shrink in (0.0, 0.1)
        },
    ),
)
"""Every way to forecast, the clock first: what the others have to beat."""


@dataclass(frozen=True, eq=False)
class Standing:
    """How well a rival forecasts runs left out, arrays (n,) by run.

    `error`: mean absolute error over its evaluations as a share of T_grok; `advantage`: the clock's error minus that,
    over runs; `chosen`: how often which choice was made; `forecast`: the steps that it says remain, by evaluation of
    the contest; `alarms`: share of the evaluations of a run that never groks at which it is forecast to grok by a step
    that the run then passes, over such runs.
    """

    rival: Rival
    error: Array
    advantage: Estimate
    chosen: Counter[str]
    forecast: Array
    alarms: Estimate

    @property
    def mean(self) -> Estimate:
        """Mean error over runs."""
        return over(self.error, least=0)


@dataclass(frozen=True, eq=False)
class Contest:
    """The rivals on the runs of one setting that grokked; in `standings` those that the runs allow.

    That is, whose columns they have, and for the law, entropies above H* in every fold.

    `below` counts the runs whose norm is lower at T_mem than at T_grok: there the first-passage law has no answer.
    `declined`: share of the evaluations of runs that never grok at which `fastent.predict_grok_time` gives no step, and
    `wrongly` of those at which it gives one that the run then passes; over such runs.
    """

    plateau: Plateau
    standings: tuple[Standing, ...]
    below: Estimate
    never: int
    declined: Estimate
    wrongly: Estimate

    def standing(self, name: str) -> Standing | None:
        """Return a rival's, None if it is not in `standings`."""
        return next((each for each in self.standings if each.rival.name == name), None)

    @property
    def best(self) -> Standing:
        """The one with the least mean error."""
        return min(self.standings, key=lambda each: each.mean.value)


FEWEST = 4
"""Runs below which none can be left out twice: two must be left to fit to."""


def contest(runs: Runs, never: Runs | None = None, law: PowerLaw | None = None) -> Contest | None:
    """Cross-validate every rival over whole runs, choices inside.

    Parameters
    ----------
    runs : Runs
        Of one setting, each seed once. Those that did not grok, or have no usable entropy there, take no part.
    never : Runs, optional
        Those that memorised and did not grok are forecast by all of `runs`.
    law : PowerLaw, optional
        That of `runs`, for what `predict_grok_time` says of `never`.

    Returns
    -------
    Contest or None
        None with fewer than four runs that take part.
    """
    runs = runs[
        ~np.isnan(runs.h_star + runs.at(runs.norm, runs.t_grok) + runs.t_mem) & (runs.t_grok > runs.t_mem)
    ]
    if len(runs) < FEWEST:
        return None
    plateau = Plateau.of(runs)
    never = replace(runs, stored=()) if never is None else never[~never.grokked & ~np.isnan(never.t_mem)]
    unseen = Plateau.of(replace(runs, stored=runs.stored + never.stored)) if len(never) else None
    declined, wrongly = _declined(never, law) if law is not None else (UNKNOWN, UNKNOWN)
    standings: list[Standing] = []
    for rival in RIVALS:
        with contextlib.suppress(
            ValueError
        ):  # no law where too few evaluations are above H*, as where H rises
            of_clock = standings[0].error if standings else None
            standing = _standing(rival, plateau, unseen, of_clock)
            standings += [] if standing is None else [standing]
    return Contest(
        plateau=plateau,
        standings=tuple(standings),
        below=share(runs.at(runs.norm, runs.t_mem) < runs.at(runs.norm, runs.t_grok)),
        never=len(never),
        declined=declined,
        wrongly=wrongly,
    )


def _standing(
    rival: Rival, plateau: Plateau, unseen: Plateau | None, of_clock: Array | None
) -> Standing | None:
    if np.isnan(plateau.runs.column(rival.column)[plateau.where]).any():
        return None
    n = len(plateau.runs)
    fitted: dict[tuple[str, bytes], Array] = {}

    def forecast(choice: str, used: Mask) -> Array:
        key = choice, used.tobytes()
        if key not in fitted:
            fitted[key] = np.maximum(rival.choices[choice](plateau, used), 0)
        return fitted[key]

    def choose(used: Mask) -> str:
        """Take the choice with the least mean error on the runs of a mask, each left out of the fit in turn."""
        if len(rival.choices) == 1:
            return next(iter(rival.choices))
        runs = np.nonzero(used)[0]
        apart = [used & (np.arange(n) != run) for run in runs]
        errors = {
            choice: np.mean(
                [
                    plateau.mean_error(forecast(choice, rest))[run]
                    for run, rest in zip(runs, apart, strict=True)
                ]
            )
            for choice in rival.choices
        }
        return min(errors, key=lambda choice: float(errors[choice]))

    left_out, chosen = np.empty_like(plateau.step), Counter[str]()
    for run, others in enumerate(~np.eye(n, dtype=bool)):
        choice = choose(others)
        chosen[choice] += 1
        own = plateau.run == run
        left_out[own] = forecast(choice, others)[own]
    error = plateau.mean_error(left_out)
    alarms = UNKNOWN
    if unseen is not None:
        everyone = np.arange(len(unseen.runs)) < n
        said = np.maximum(rival.choices[choose(np.ones(n, dtype=bool))](unseen, everyone), 0)
        said[np.isnan(unseen.runs.column(rival.column)[unseen.where])] = np.nan
        alarms = _alarms(unseen, said, ~everyone)
    return Standing(
        rival=rival,
        error=error,
        advantage=UNKNOWN if of_clock is None else over(of_clock - error),
        chosen=chosen,
        forecast=left_out,
        alarms=alarms,
    )


def _alarms(plateau: Plateau, remaining: Array, never: Mask) -> Estimate:
    """Share of a run's evaluations at which it is forecast to grok by a step that it passes without, over `never`."""
    wrong = plateau.step + remaining <= plateau.runs.end[plateau.run]
    known = ~np.isnan(remaining)
    own = [(plateau.run == run) & known for run in np.nonzero(never)[0]]
    return over((float(wrong[mine].mean()) for mine in own if mine.any()), least=0, most=1)


def _declined(never: Runs, law: PowerLaw) -> tuple[Estimate, Estimate]:
    declined, wrongly = [], []
    for start, end, (step, h) in zip(never.t_mem, never.end, never.lines(never.entropy), strict=True):
        history = History(step, h)
        said = [predict_grok_time(history.until(now), law).step for now in step[step >= start]]
        if said:
            declined.append(float(np.mean([at is None for at in said])))
            wrongly.append(float(np.mean([at is not None and at <= end for at in said])))
    return over(declined, least=0, most=1), over(wrongly, least=0, most=1)


@dataclass(frozen=True)
class Spans:
    """Intervals of runs left out, at each of their evaluations above the others' H*: the law's, and the clock's.

    The clock is that among those still running. Of each, `held`: share of the runs whose T_grok all its intervals hold;
    `width`: mean over a run's evaluations as a share of its T_grok, over runs.
    """

    law_held: Estimate
    law_width: Estimate
    clock_held: Estimate
    clock_width: Estimate


def spans(histories: Sequence[History]) -> Spans | None:
    """Give each run that grokked the intervals of the others; None where these are too few, or a fold has no law."""
    triples = Triples.of(histories)
    runs = [histories[i] for i in triples.origin]
    if len(runs) <= RUNS_FOR_INTERVAL:
        return None
    held, width = [], []
    for i, t_grok in enumerate(triples.t_grok):
        others = runs[:i] + runs[i + 1 :]
        try:
            law, folds = PowerLaw.fit(others), leave_one_run_out(others).runs
        except ValueError:  # too few evaluations above H*
            return None
        own = (triples.run == i) & (triples.entropy > law.h_star)
        step = triples.step[own]
        by_law = [
            law.forecast_interval(*now)
            for now in zip(step.tolist(), triples.entropy[own].tolist(), strict=True)
        ]
        clocks = [step + residual_life(np.delete(law.t_grok, j), step) for j in range(len(others))]
        misses = [np.abs(fold.by_running_clock - fold.remaining).max(initial=0.0) for fold in folds]
        low, high = jackknife_plus(np.stack(clocks, 1), np.array(misses))
        both = np.array(by_law, dtype=np.float64).reshape(-1, 2), np.stack([np.maximum(low, step), high], 1)
        held.append([bool(((ends[:, 0] <= t_grok) & (t_grok <= ends[:, 1])).all()) for ends in both])
        width.append([float(np.ptp(ends, axis=1).mean() / t_grok) if len(ends) else np.nan for ends in both])
    (law_held, clock_held), (law_width, clock_width) = zip(*held, strict=True), zip(*width, strict=True)
    return Spans(share(law_held), over(law_width, least=0), share(clock_held), over(clock_width, least=0))


def parameter(law: PowerLaw | None, name: str) -> Estimate:
    """Return a law's parameter with its jackknife interval, or without one where the runs do not determine it."""
    value = getattr(law, name, None)
    if law is None or value is None:
        return UNKNOWN
    interval = law.intervals.get(name)
    method = "jackknife over runs" if interval else "not determined by the runs"
    return Estimate(float(value), *(interval or (np.nan, np.nan)), law.n_runs, method, law.level)


AFTER = StopAfterCrossing().steps
"""Steps between the crossing and the stop; the paper's 1,000."""


@dataclass(frozen=True, eq=False)
class Savings:
    """Stopping each run by its entropy, arrays of shape (n,) by run.

    `crossed` is the crossing, `step` the stop and `accuracy` the test accuracy then; NaN for a run that never crosses.
    A run that ended before its stop is read at its end.

    `saved`: share of `budget` saved by the runs that cross (those that do not go on to the budget and save nothing);
    `saved_by_accuracy`: the same for stopping at T_grok; `grokked`: share of stopped runs at the criterion when
    stopped; `within`: share of the runs that cross in which grokking comes after, and within 1,000 steps.
    """

    crossed: Array
    step: Array
    accuracy: Array
    budget: int
    saved: Estimate
    saved_by_accuracy: Estimate
    grokked: Estimate
    within: Estimate


def _part(step: Array, budget: int) -> Array:
    """Share of the budget that stopping at a step saves, (n,); 0 where it never comes."""
    return 1 - np.fmin(step, budget) / budget


def savings(runs: Runs, budget: int) -> Savings:
    """Stop each run 1,000 steps after it falls below the mean H* of the other seeds.

    Parameters
    ----------
    runs : Runs
        Complete runs of one configuration, each seed once.
    budget : int
        Steps that a run would otherwise take.
    """
    crossed = left_out_threshold(runs).times
    step = crossed + AFTER
    # The accuracy that is known when the run stops: at the last evaluation until then.
    last = np.where(runs.step <= step[:, None], runs.step, -np.inf).max(axis=1, initial=-np.inf)
    accuracy = runs.at(runs.test_accuracy, last)
    stopped, ahead = ~np.isnan(step), runs.t_grok - crossed
    return Savings(
        crossed=crossed,
        step=step,
        accuracy=accuracy,
        budget=budget,
        saved=over(_part(step, budget), least=0, most=1),
        saved_by_accuracy=over(_part(runs.t_grok, budget), least=0, most=1),
        grokked=share((accuracy >= runs.criteria)[stopped]),
        within=share(((ahead >= 0) & (ahead <= AFTER))[stopped]),
    )


@dataclass(frozen=True)
class Cost:
    """What the monitor took, over runs: share of the training's time, and milliseconds a run and evaluation."""

    share: Estimate
    milliseconds: Estimate
    machines: tuple[str, ...]


def monitor_cost(runs: Runs) -> Cost | None:
    """Read the cost off the timing logs; None if none of them has it."""
    shares, milliseconds, machines = [], [], set()
    for run in runs.stored:
        measured = [row for row in run.timing if "monitor_seconds" in row]
        elapsed = _elapsed(run.timing)
        if not measured or elapsed <= 0:
            continue
        shares.append(sum(row["monitor_seconds"] for row in measured) / elapsed)
        milliseconds.append(1e3 * float(np.mean([row["monitor_seconds"] / row["seeds"] for row in measured])))
        device = str(run.environment.get("device", "unknown"))
        machines.add(str(run.environment.get("cpu", "unknown")) if device == "cpu" else device)
    return (
        Cost(over(shares, least=0), over(milliseconds, least=0), tuple(sorted(machines))) if shares else None
    )


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


IMMINENT = 1000
"""Steps within which grokking must come after "imminent"; the paper's."""


AFTERWARDS = 1200
"""Steps after T_grok at which the paper's runs end, by its counts of evaluations."""


@dataclass(frozen=True, eq=False)
class After:
    """H over the 1,200 steps after T_grok: its least-squares slope, a step, and its fall from T_grok on, over runs.

    `falls`: share of the runs with a negative slope.
    """

    falls: Estimate
    slope: Estimate
    fall: Estimate


def after_grokking(runs: Runs) -> After:
    """Measure it where a run has three evaluations or more from T_grok on."""
    slopes, falls = [], []
    for t_grok, (step, h) in zip(runs.t_grok, runs.lines(runs.entropy), strict=True):
        near = (step >= t_grok) & (step <= t_grok + AFTERWARDS) & ~np.isnan(h)
        if near.sum() >= 3:
            slopes.append(float(np.polyfit(step[near], h[near], 1)[0]))
            falls.append(float(h[near][0] - h[near][-1]))
    return After(share(slope < 0 for slope in slopes), over(slopes), over(falls))


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
    collapse" at some evaluation, the share that grokked all the same.
    """

    n: int
    evaluations: Counter[tuple[Phase, Outcome]]
    shares: dict[tuple[Phase, Outcome], float]
    imminent: Estimate
    warned: Estimate
    given_up: Estimate


def guide(runs: Runs, baseline: Runs) -> Guide | None:
    """Diagnose `runs` with the H* of `baseline`, the same seed left out; None without an H* or an evaluation."""
    others = (mean_known(baseline.h_star[[seed != own for seed in baseline.seeds]]) for own in runs.seeds)
    diagnosed = [
        [] if np.isnan(threshold) else _diagnosed(row, t_grok, threshold, criterion)
        for row, t_grok, threshold, criterion in zip(
            runs.lines(runs.entropy, runs.test_accuracy),
            runs.t_grok,
            others,
            runs.criteria,
            strict=True,
        )
    ]
    found = [(rows, grokked) for rows, grokked in zip(diagnosed, runs.grokked, strict=True) if rows]
    if not found:
        return None
    evaluations = Counter(row for rows, _ in found for row in rows)
    shares = {key: float(np.mean([rows.count(key) / len(rows) for rows, _ in found])) for key in evaluations}
    near, doubted = Phase.NEAR_THRESHOLD, Phase.NO_COLLAPSE
    hits = [[outcome is Outcome.SOON for phase, outcome in rows if phase is near] for rows, _ in found]
    return Guide(
        n=len(found),
        evaluations=evaluations,
        shares=shares,
        imminent=over((float(np.mean(each)) for each in hits if each), least=0, most=1),
        warned=share((near, Outcome.SOON) in rows for rows, grokked in found if grokked),
        given_up=share(grokked for rows, grokked in found if any(phase is doubted for phase, _ in rows)),
    )


def _diagnosed(
    run: tuple[Array, ...], t_grok: float, threshold: float, criterion: float
) -> list[tuple[Phase, Outcome]]:
    course, tolerances = Course(threshold), Tolerances(criterion=criterion)
    rows = []
    for now, entropy, reached in zip(*(column.tolist() for column in run), strict=True):
        if now >= t_grok:
            break
        course.add(now, entropy)
        read = diagnosis_of(course, None if np.isnan(reached) else reached, tolerances=tolerances)
        rows.append((read.phase, _outcome(t_grok - now)))
    return rows


def _outcome(ahead: float) -> Outcome:
    if np.isnan(ahead):
        return Outcome.NEVER
    return Outcome.SOON if ahead <= IMMINENT else Outcome.LATER


def claims(result: Forecasts) -> Findings:
    """Each claim of the paper that E5 speaks to, beside what the runs say."""
    law, valid, comparable = result.law, result.validation, result.runs.comparable
    r_squared, gamma = parameter(law, "r_squared"), parameter(law, "gamma")
    error, clock, advantage, better, warning = (UNKNOWN,) * 5
    if valid is not None:
        error, clock, advantage, better = valid.law, valid.clock, valid.advantage, valid.better
        warning = valid.warning
    against = f"clock: {in_percent(clock)}; law better in {counted(better)}"
    cost, table, after = result.cost, result.guide, result.after
    last = UNKNOWN if valid is None else over(valid.last, least=0)
    below = UNKNOWN if valid is None else valid.below
    return {
        "e5.r2": CLAIMS["e5.r2"].finding(r_squared, comparable=comparable, unit=""),
        "e5.gamma": CLAIMS["e5.gamma"].finding(gamma, comparable=comparable, unit="", digits=2),
        "e5.left_out": CLAIMS["e5.left_out"].finding(error, comparable=comparable, unit="", write=percent_of),
        "e5.left_out_last": Finding(
            _at_the_last(valid), CLAIMS["e5.left_out_last"].judge(last, comparable=comparable)
        ),
        "e5.beats_clock": Finding(against if valid else NONE, judge_positive(advantage)),
        "e5.rivals": _against_rivals(result.contest),
        "e5.warning": CLAIMS["e5.warning"].finding(warning, comparable=comparable),
        "e5.warning_close": CLAIMS["e5.warning_close"].finding(below, comparable=comparable),
        "e5.imminent_at_crossing": Finding(
            f"{counted(result.saved.within)} that cross the H* of the other seeds",
            judge_share(result.saved.within),
        ),
        "e5.accuracy_kept": Finding(
            f"{counted(result.saved.grokked)} have grokked when they are stopped",
            judge_share(result.saved.grokked),
        ),
        "e5.saved": Finding(
            f"{worded(result.saved.saved, '%')}; stopping at T_grok itself saves "
            f"{worded(result.saved.saved_by_accuracy, '%')}",
            CLAIMS["e5.saved"].judge(result.saved.saved, comparable=comparable),
        ),
        "e5.cost": Finding(
            "not measured: the timing logs of these runs lack it" if cost is None else _cost(cost),
            Verdict.NO_CASE if cost is None else _judge_cost(cost),
        ),
        "e5.imminent": Finding(_imminent(table), _judge_guide(table)),
        "e5.stagnates": Finding(_given_up(table), _judge_given_up(table)),
        "e5.after_falls": Finding(counted(after.falls), judge_share(after.falls)),
        "e5.after_slope": CLAIMS["e5.after_slope"].finding(
            after.slope, comparable=comparable, unit="a step", write=_per_step
        ),
        "e5.after_fall": CLAIMS["e5.after_fall"].finding(after.fall, comparable=comparable, unit=""),
    }


def _per_step(value: float) -> str:
    return f"{value:.1e}".replace("-", "−").replace("−0", "−")


def _at_the_last(valid: Validation | None) -> str:
    if valid is None or not valid.last.size:
        return NONE
    return (
        f"{in_percent(over(valid.last, least=0))}, median {percent_of(float(np.median(valid.last)))}, largest "
        f'{percent_of(float(valid.last.max()))}; "it groks now" is off by {percent_of(float(valid.now.mean()))} there, '
        "so the figure says next to nothing"
    )


def _against_rivals(contest: Contest | None) -> Finding:
    if contest is None or (law := contest.standing(LAW)) is None:
        return Finding(NONE, Verdict.NOT_RUN)
    gains = [over(each.error - law.error) for each in contest.standings if each.rival.needs != WITH_H]
    said = "; ".join(f"{each.rival.name}: {percent_of(each.mean.value)}" for each in contest.standings)
    return Finding(said, least(*map(judge_positive, gains)))


def percent_of(value: float) -> str:
    """Write a share in per cent with one decimal: "4.1 %"."""
    return f"{decimal(100 * value, 1)} %"


def in_percent(estimate: Estimate) -> str:
    """Write a share with its interval in per cent with one decimal."""
    return worded(estimate, "", write=percent_of)


def _cost(cost: Cost) -> str:
    share = percent_of(cost.share.value) if cost.share.value >= 1e-3 else f"{100 * cost.share.value:.2g} %"
    return (
        f"{worded(cost.milliseconds, 'ms', 2)}, {share} of the time; {', '.join(cost.machines)}, "
        "evaluations as often as in these runs"
    )


def _judge_cost(cost: Cost) -> Verdict:
    fast, cheap = cost.milliseconds.value <= CLAIMS["e5.cost"].number, cost.share.value <= 0.01
    return judge(True, fast and cheap, fast or cheap)


def _imminent(table: Guide | None) -> str:
    if table is None:
        return NONE
    said = f"of the runs that grok, {counted(table.warned)} were called so in the {IMMINENT:,} steps before"
    if not table.imminent.known:
        return f"no run is called so before it groks; {said}"
    return f"grokking came within {IMMINENT:,} steps after {worded(table.imminent, '%')} of such evaluations; {said}"


def _judge_guide(table: Guide | None) -> Verdict:
    if table is None:
        return Verdict.NOT_RUN
    return least(*(judge_positive(less(each, Estimate(0.9))) for each in (table.imminent, table.warned)))


def _given_up(table: Guide | None) -> str:
    if table is None:
        return NONE
    return f"{counted(table.given_up)} called so grokked" if table.given_up.known else "no run is called so"


def _judge_given_up(table: Guide | None) -> Verdict:
    if table is None:
        return Verdict.NOT_RUN
    share = table.given_up
    if not share.known:
        return Verdict.NO_CASE
    rightly = Estimate(1 - share.value, 1 - share.high, 1 - share.low, share.n)
    return judge_positive(less(rightly, Estimate(0.9)))


def headline(result: Forecasts) -> str:
    """Say in a few sentences what the runs show."""
    said, saved = "No run crosses the H* of the other seeds, so none is stopped early.", result.saved
    if saved.grokked.known:
        said = (
            f"Stopping {steps(AFTER)} steps after H falls below the H* of the other seeds stops "
            f"{counted(saved.grokked)} at the criterion and saves {percent(saved.saved.value)} of the budget; stopping "
            f"at T_grok saves {percent(saved.saved_by_accuracy.value)}."
        )
    valid = result.validation
    if result.law is None or valid is None:
        return f"E5: too few runs grokked to fit a law. {said}"
    return (
        f"E5: the law explains R² = {decimal(result.law.r_squared)} in sample; on runs left out it is off by "
        f"{in_percent(valid.law)} of T_grok, the clock by {in_percent(valid.clock)}.{_winner(result.contest)} {said}"
    )


def _winner(contest: Contest | None) -> str:
    if contest is None:
        return ""
    best, law = contest.best, contest.standing(LAW)
    said = (
        f' From T_mem on, the least error of {len(contest.standings)} forecasts has "{best.rival.name}", which needs '
        f"{best.rival.needs}: {in_percent(best.mean)}"
    )
    if best is law or law is None:
        return f"{said}."
    gain = over(law.error - best.error)
    return f"{said}; the law {percent_of(law.mean.value)}, {worded(gain, '', write=percent_of)} more."


def section(result: Forecasts) -> Section:
    """E5's part of the report."""
    return Section(
        "e5",
        TITLE,
        (
            *_law_blocks(result),
            *_validation_blocks(result),
            *_contest_blocks(result),
            *_spans_blocks(result.spans),
            *_savings_blocks(result),
            *_cost_blocks(result),
            *_guide_blocks(result.guide),
        ),
    )


def remaining_against_gap(
    gap: Sequence[np.ndarray], remaining: Sequence[np.ndarray], curve: tuple[np.ndarray, np.ndarray]
) -> Figure:
    """Draw the steps that remain against H − H*, one line a run, with the fitted law."""
    figure = Figure(figsize=(WIDTH, 5.0), layout="constrained")
    axes = figure.subplots()
    for x, y in zip(gap, remaining, strict=True):
        axes.plot(x, y, "o-", color=LIGHT.entropy, markersize=3, linewidth=0.6, alpha=0.6)
    axes.plot([], [], "o-", color=LIGHT.entropy, markersize=3, linewidth=0.6, label="runs")
    axes.plot(*curve, color=LIGHT.ink, linewidth=2.2, label="fitted law")
    axes.set(xlabel="H − H* (no unit)", ylabel="steps until T_grok", ylim=(0, None), xlim=(0, None))
    axes.yaxis.set_major_formatter(thousands)
    legend_above(axes)
    return figure


def _law_blocks(result: Forecasts) -> list[Block]:
    law = result.law
    if law is None or result.profile is None:
        return [Text("Fewer than three runs grokked with a usable H: there is no law to fit.", "note")]
    triples = Triples.of(result.histories)
    above = triples.entropy > law.h_star
    gaps = [triples.entropy[above & (triples.run == k)] - law.h_star for k in range(len(triples.origin))]
    left = [triples.remaining[above & (triples.run == k)] for k in range(len(triples.origin))]
    grid = np.linspace(*law.gap_range, 200)
    best = max(range(len(GAMMAS)), key=lambda i: result.profile[i] if result.profile else 0.0)
    rows = tuple(
        (name, span(parameter(law, key), write), meaning)
        for name, key, write, meaning in (
            ("H*", "h_star", decimal, "mean H at T_grok"),
            ("C1", "c1", steps, "steps at a gap of 1"),
            ("γ", "gamma", functools.partial(decimal, digits=2), "exponent"),
            ("C2", "c2", steps, "steps left when H crosses H*"),
            ("R²", "r_squared", decimal, "in sample, the paper's way"),
        )
    )
    without, alone = law.r_squared_without_c2, law.gamma_without_c2
    correlations = ", ".join(f"{pair}: {decimal(value, 2)}" for pair, value in law.correlations.items())
    return [
        Text(
            "The paper's law: the steps that remain are C1 (H − H*)^γ + C2, fitted by least squares to all "
            "evaluations of all runs before they grokked, with H above H*. Intervals leave out whole runs: "
            "evaluations of a run share its T_grok."
        ),
        Table(
            f"The fitted law, from {law.n_points:,} evaluations of {law.n_runs} runs; 95 % jackknife "
            "intervals, none where the runs do not determine the parameter.",
            ("parameter", "value", "what it is"),
            rows,
            (1,),
        ),
        drawn(
            "e5-law",
            functools.partial(remaining_against_gap, gaps, left, (grid, law.remaining(grid + law.h_star))),
            "In the manner of the paper's Figure 4(b): steps until T_grok against the gap, with the law.",
            "Remaining steps against the entropy gap, one line a run, and the fitted curve.",
        ),
        Table(
            "What the runs determine of γ: R² of the best law at each, C1 and C2 fitted anew.",
            ("γ", *(f"{gamma:g}" for gamma in GAMMAS)),
            (("R²", *(decimal(value) for value in result.profile)),),
            tuple(range(1, 1 + len(GAMMAS))),
        ),
        Text(
            f"Of these γ = {GAMMAS[best]:g} is the best. Without C2 the best law has γ = "
            f"{decimal(alone, 2)} and R² = {decimal(without)}. Correlations of the estimates as runs are "
            f"left out: {correlations or NONE}. Near 1 or −1 two parameters trade against each other. An "
            "exponent above 1 means that H falls ever faster towards H*, "
            'which is no "critical slowing down".'
        ),
    ]


def _validation_blocks(result: Forecasts) -> list[Block]:
    valid = result.validation
    if valid is None:
        return []
    rows = []
    law, clock = valid.runs.score("law"), valid.runs.score("clock")
    for k, held_out in enumerate(valid.runs.runs):
        rows.append(
            (
                str(result.runs.seeds[held_out.run]),
                steps(held_out.t_grok),
                decimal(held_out.law.h_star),
                decimal(held_out.law.gamma, 2),
                str(held_out.step.size),
                steps(law.mae[k]) if held_out.step.size else NONE,
                steps(clock.mae[k]) if held_out.step.size else NONE,
            )
        )
    return [
        Text(
            "Forecasts of runs left out: H*, C1, γ and C2 come from the other runs. In every run the "
            "remaining steps fall by one a step, so the clock, the mean T_grok of the other runs minus the "
            "step and 0 from there on, forecasts too. It is what the entropy has to beat."
        ),
        Table(
            "Each run forecast from the others: mean absolute error in steps over its evaluations above H*.",
            ("seed", "T_grok", "H*", "γ", "evaluations", "error, law", "error, clock"),
            tuple(rows),
            tuple(range(7)),
        ),
        Table(
            "The same, over runs. Errors are shares of T_grok.",
            ("", "law", "clock"),
            (
                ("mean absolute percentage error", in_percent(valid.law), in_percent(valid.clock)),
                ("R² of the steps that remain", decimal(valid.law_r_squared), decimal(valid.clock_r_squared)),
                ("clock's error minus the law's", in_percent(valid.advantage), NONE),
                ("runs forecast better than by the clock", counted(valid.better), NONE),
                ("first forecast after T_mem, before T_grok", worded(valid.warning), NONE),
            ),
        ),
        Text(
            "The paper's second version takes the error at the last evaluation before T_grok alone: here "
            f"{_at_the_last(valid)}. Its advance warning runs from the first evaluation at which the error is under a "
            f"fifth of T_grok: {worded(valid.below)}."
        ),
    ]


_LOOKS: tuple[tuple[str, Any], ...] = (
    (LIGHT.ink, "solid"),
    (LIGHT.ink, DASHED),
    (LIGHT.norm, "solid"),
    (LIGHT.train, DASHED),
    (LIGHT.test, DASHED),
    (LIGHT.entropy, "solid"),
    (LIGHT.signal, DASHED),
)
"""Colour and dash of each of `RIVALS`."""


def error_against_steps_left(contest: Contest) -> Figure:
    """Mean absolute error of each forecast by the steps that are left, as far as half of the runs have them."""
    plateau = contest.plateau
    figure = Figure(figsize=(WIDTH, 5.0), layout="constrained")
    axes = figure.subplots()
    left, place, count = np.unique(plateau.remaining, return_inverse=True, return_counts=True)
    shown = 2 * count >= len(plateau.runs)
    looks = dict(zip((rival.name for rival in RIVALS), _LOOKS, strict=True))
    highest = 0.0
    for each in contest.standings:
        colour, dash = looks[each.rival.name]
        error = (np.bincount(place, np.abs(each.forecast - plateau.remaining)) / count)[shown]
        axes.plot(left[shown], error, color=colour, linestyle=dash, linewidth=1.6, label=each.rival.name)
        highest = max(highest, float(error.max()))
    axes.plot(
        left[shown], left[shown], color=LIGHT.train, linestyle=DOTTED, linewidth=1.2, label='"it groks now"'
    )
    axes.set(xlabel="steps left until T_grok", ylabel="mean absolute error over runs (steps)")
    axes.set_ylim(0, 1.15 * highest)
    axes.invert_xaxis()
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(thousands)
    figure.legend(handles=axes.get_legend_handles_labels()[0], loc="outside upper center", ncols=3)
    return figure


def _contest_blocks(result: Forecasts) -> list[Block]:
    contest = result.contest
    if contest is None:
        return [
            Text(f"Fewer than {FEWEST} runs grokked: rivals cannot be compared, choices and all.", "note")
        ]
    rows = tuple(
        (
            each.rival.name,
            each.rival.needs,
            in_percent(each.mean),
            steps(float((each.error * contest.plateau.runs.t_grok).mean())),
            worded(each.advantage, "", write=percent_of),
            "; ".join(f"{name} ({count})" for name, count in each.chosen.most_common() if name) or NONE,
            worded(each.alarms, "%"),
        )
        for each in contest.standings
    )
    blocks: list[Block] = [
        Text(
            "The law's rivals, under nested cross-validation over whole runs: each run is forecast from the others at "
            "every evaluation between T_mem and T_grok, and what a forecast leaves open is chosen among these by "
            "leaving out one more. False alarms are forecasts, in runs that never grok, of a step that the run passes: "
            f"of {contest.never} runs, by what all runs that grok have taught. The norm's first-passage law "
            f"(arXiv 2605.18845) needs a norm that falls from T_mem to T_grok; in {of(contest.below)} runs it is lower "
            "at T_mem, so its fitted rate has the wrong sign."
        ),
        Table(
            "Forecasts from T_mem on, of runs left out; errors are shares of T_grok, means over a run's evaluations.",
            (
                *("forecast", "needs", "error", "in steps", "clock's error minus its"),
                *("chosen (times)", "false alarms, share of evaluations"),
            ),
            rows,
            (3,),
        ),
        drawn(
            "e5-rivals",
            functools.partial(error_against_steps_left, contest),
            "Error of each forecast of runs left out against the steps left, where half of the runs or more have them. "
            'Dotted: saying "it groks now".',
            "Mean absolute error of seven forecasts against the steps left until grokking.",
        ),
        Text(_recommended(contest)),
    ]
    if result.elsewhere:
        names = [each.rival.name for each in contest.standings]
        blocks.append(
            Table(
                "The same in other settings: error as a share of T_grok, means over runs.",
                ("runs", "n", *names, "least"),
                tuple(_elsewhere(name, found, names) for name, found in result.elsewhere.items()),
                tuple(range(1, 2 + len(names))),
            )
        )
    return blocks


def _spans_blocks(found: Mapping[str, Spans]) -> list[Block]:
    if not found:
        return []
    return [
        Text(
            f"A forecast's interval is a conformal one across runs, from {RUNS_FOR_INTERVAL} runs on "
            f"(`fastent.forecast.power_law`): in {percent(FORECAST_LEVEL)} of runs that grok, all intervals of the run "
            "hold its T_grok at once. Here each run is left out and given the law's intervals of the others, at its "
            "evaluations above H*, and those of the clock among those still running, made in the same way."
        ),
        Table(
            "Intervals of runs left out: in how many all of them hold T_grok, and their width as a share of T_grok.",
            ("runs", "held, law", "width, law", "held, clock", "width, clock"),
            tuple(
                (
                    *(name, counted(each.law_held), in_percent(each.law_width)),
                    *(counted(each.clock_held), in_percent(each.clock_width)),
                )
                for name, each in found.items()
            ),
        ),
    ]


def _recommended(contest: Contest) -> str:
    ahead = [each.rival.name for each in contest.standings if each.advantage.low > 0]
    said = (
        f'The least error has "{contest.best.rival.name}"; the interval of the lead over the clock is above 0 for '
        f"{', '.join(ahead) or 'none'}. `fastent.predict_grok_time` gives the step by the clock among those still "
        "running beside the law's, and says whether the law was clearly better than that on the runs of its fit."
    )
    if contest.declined.known:
        said += (
            f" In the runs that never grok it declines to answer at {worded(contest.declined, '%')} of the "
            f"evaluations, and names a step that the run passes at {worded(contest.wrongly, '%')}."
        )
    return said


def _elsewhere(name: str, contest: Contest, rivals: Sequence[str]) -> tuple[str, ...]:
    errors = {each.rival.name: percent_of(each.mean.value) for each in contest.standings}
    written = (errors.get(rival, NONE) for rival in rivals)
    return (name, str(len(contest.plateau.runs)), *written, contest.best.rival.name)


def _savings_blocks(result: Forecasts) -> list[Block]:
    saved = result.saved
    blocks: list[Block] = [
        Text(
            f"Stopping early, as the paper recommends: {steps(AFTER)} steps after H fell below H*, here "
            f"that of the other seeds. The saving is a share of the budget of {steps(saved.budget)} steps, "
            "and mostly says that runs grok long before it ends: stopping when the test accuracy reaches "
            f"the criterion needs no entropy, and saves {worded(saved.saved_by_accuracy, '%')}."
        ),
        Table(
            "Every run stopped by its entropy. Accuracy at the stop: the last evaluation until then.",
            ("seed", "T_grok", "T_cross", "stopped at", "test accuracy then", "at the end", "saved"),
            _stop_rows(result),
            tuple(range(7)),
        ),
    ]
    if len(long := result.long):
        rows = []
        after = long.step >= long.t_grok_sustained[:, None]
        for i, seed in enumerate(long.seeds):
            accuracy, h = long.test_accuracy[i][after[i]], long.entropy[i][after[i]]
            usable = h[~np.isnan(h)]
            rows.append(
                (
                    str(seed),
                    steps(long.t_grok[i]),
                    steps(long.end[i]),
                    percent(accuracy.min()) if accuracy.size else NONE,
                    percent((accuracy < long.criteria[i]).mean()) if accuracy.size else NONE,
                    f"{decimal(usable.min())} to {decimal(usable.max())}" if usable.size else NONE,
                )
            )
        blocks.append(
            Table(
                "Runs trained on to the limit of steps: what comes after grokking (sustained).",
                (
                    *("seed", "T_grok", "last step", "least test accuracy after"),
                    *("evaluations below the criterion after", "H after"),
                ),
                tuple(rows),
                tuple(range(6)),
            )
        )
    return blocks


def _stop_rows(result: Forecasts) -> tuple[tuple[str, ...], ...]:
    runs, saved = result.runs, result.saved
    ends = [
        f"{percent(a)} ({steps(t)})"
        for a, t in zip(runs.at(runs.test_accuracy, runs.end), runs.end, strict=True)
    ]
    return tuple(
        by_run(
            runs,
            (steps, runs.t_grok, saved.crossed, saved.step),
            (percent, saved.accuracy),
            (str, ends),
            (percent, _part(saved.step, saved.budget)),
        )
    )


def _cost_blocks(result: Forecasts) -> list[Block]:
    cost = result.cost
    if cost is None:
        return [Text("The monitor's cost was not measured: the timing logs of these runs lack it.", "note")]
    return [
        Text(
            f"The monitor's cost, from the trainer's clocks on {', '.join(cost.machines)}: "
            f"{worded(cost.milliseconds, 'ms', 2)} for an evaluation of one run, probe and entropy together, "
            f"{100 * cost.share.value:.2g} % of the training time. It is wall time, with whatever else the machine did."
        )
    ]


def _guide_blocks(guide: Guide | None) -> list[Block]:
    if guide is None:
        return [Text("The paper's Table 5 could not be tested: no run has an H* of other seeds.", "note")]
    seen = [phase for phase in Phase if any((phase, outcome) in guide.evaluations for outcome in Outcome)]
    rows = []
    for phase in seen:
        shares = [guide.shares.get((phase, outcome), 0.0) for outcome in Outcome]
        count = sum(guide.evaluations[phase, outcome] for outcome in Outcome)
        rows.append(
            (phase.value.replace("_", " "), *map(_tenths, shares), _tenths(sum(shares)), f"{count:,}")
        )
    return [
        Text(
            "The paper's Table 5 as a forecast: `fastent.diagnose` reads it at every evaluation before "
            f"grokking, with the H* of the baseline's other seeds, in {guide.n} runs: those of E1, E2, E3 and E7 "
            "that are complete."
        ),
        Table(
            "Table 5 as a confusion matrix: what it says at an evaluation, and what came. Shares of a "
            "run's evaluations before grokking, each run with the same weight.",
            ("diagnosis", *(outcome.value for outcome in Outcome), "together", "evaluations"),
            tuple(rows),
            (1, 2, 3, 4, 5),
        ),
    ]


def _tenths(share: float) -> str:
    return f"{decimal(100 * share, 1)} %"


EXPERIMENT = Experiment(
    "e5",
    "Does a power law forecast the time of grokking?",
    ("e1", "e2", "e3", "e5", "e6", "e7"),
    analyse,
    headline,
    claims,
    section,
)
