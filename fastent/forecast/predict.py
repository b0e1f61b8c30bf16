"""Online forecast of the step at which a run will grok, from its entropy and a fitted power law.

``step + C1 (H - H*)^gamma + C2``, with a conformal interval where the law was fitted to nine runs or more
(`fastent.forecast.power_law` says what it promises). There is always a `Forecast`: where the law has no answer, or one
that should not be believed, its `step` is None and its `reason` says why. A forecast takes for granted that the run
groks; it cannot know. Beside the law's stands what a clock says, which needs no entropy, and whether the law was better
than that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import StrEnum

from torch import Tensor

from fastent.display import Shown, Table, between, whole
from fastent.entropy import SpectralEntropy
from fastent.forecast.history import History, Interval, recent_change
from fastent.forecast.power_law import FORECAST_LEVEL, PowerLaw

# Ours. A rise within the last WINDOW evaluations by more than RISE, of which half may be noise.
WINDOW = 5
RISE = 0.01
# Ours: how far beyond the gaps of the fit a forecast may go, as a share of their range.
SLACK = 0.1


class Reason(StrEnum):
    """Why a forecast has no step, in the order in which they are looked for."""

    NO_LAW = "no_law"
    NO_HISTORY = "no_history"
    UNUSABLE = "unusable"
    BELOW_THRESHOLD = "below_threshold"
    RISING = "rising"
    EXTRAPOLATION = "extrapolation"


@dataclass(frozen=True)
class Forecast(Shown):
    """When a run is expected to grok, or why that cannot be said.

    Attributes
    ----------
    step : float or None
        Training step, never before `now`.
    remaining : float or None
        ``step - now``, in steps, never negative.
    interval : (low, high) or None
        Where the run groks, at `level`; holds `step` and starts at `now` or later. None where `step` is, and where the
        law was fitted to fewer than nine runs, or made by hand: `note` says so.
    level : float or None
        Share of runs that grok within every interval that they are given, 0.9. The promise is for all forecasts of a
        run at once, and so holds for one that was picked; for runs that grok and are like those of the law's fit.
    now : float
        Step of the evaluation that the forecast rests on.
    reason : Reason or None
        None when there is a step.
    message : str
        The reason in a sentence; empty when there is a step.
    by_clock : float or None
        Step by the clock, with a law's step or without: the median T_grok of the law's runs that had not grokked by
        `now`. None where all had, or the law was made by hand.
    beats_clock : bool or None
        Whether the law forecast its own runs, each left out in turn, better than that clock (`PowerLaw.advantage`, the
        whole interval above 0). Where it is False the clock says as much. None where it is not known.
    note : str
        What it rests on and lacks, in sentences (`PowerLaw.note`): why there is no interval, that the law does not beat
        the clock, how many of the runs given never grokked. Empty where nothing is to be said.
    """

    step: float | None
    remaining: float | None
    interval: Interval | None
    level: float | None
    now: float
    reason: Reason | None = None
    message: str = ""
    by_clock: float | None = None
    beats_clock: bool | None = None
    note: str = ""

    def __repr__(self) -> str:
        if self.step is None:
            return f"Forecast(step=None, now={self.now:.0f}, reason={self.reason and self.reason.value!r})"
        within = f", interval=({self.interval[0]:.0f}, {self.interval[1]:.0f})" if self.interval else ""
        return f"Forecast(step={self.step:.0f}{within}, now={self.now:.0f})"

    def _table(self) -> Table:
        rows = [
            ("grokking expected at step", whole(self.step)),
            (
                "interval" if self.level is None else f"interval, {100 * self.level:.0f} %",
                between(self.interval, whole),
            ),
            ("by the clock", whole(self.by_clock)),
            ("as of step", whole(self.now)),
        ]
        remark = " ".join(filter(None, (self.message, self.note)))
        return Table("Forecast", rows, remark=remark)


def predict_grok_time(
    entropy: float | SpectralEntropy | History | None, law: PowerLaw | None, *, step: float | None = None
) -> Forecast:
    """Forecast when the run will grok: the paper's function.

    Parameters
    ----------
    entropy : float, SpectralEntropy, History or None
        Normalised entropy now, or the run so far: only a history can show that the entropy is rising. Of a
        history the last 5 evaluations are read.
    law : PowerLaw or None
        Fitted to runs of the same model and task.
    step : float, optional
        Step at which a bare entropy was measured, 0 if left out. A history brings its own.

    Returns
    -------
    Forecast
        With `step` None and a `reason` where there is no law or no evaluation, the latest entropy is unusable, at
        or below H*, rising by more than 0.01 over the last 5 evaluations, or outside the gaps that the law was
        fitted to by more than a tenth of their range.

    Raises
    ------
    ValueError
        If the entropy lies outside [0, 1] (it must be normalised), a SpectralEntropy is batched, `step` is
        negative or not finite, or it is given together with a history.

    Notes
    -----
    Go by the law where `beats_clock` says so, and by the clock else: it needs no entropy. In the ten recorded runs of
    modular addition (bench/results/paper), each forecast from the others between memorisation and grokking, the clock
    of `by_clock` has the least mean error of seven forecasts, 14.4 % of T_grok; the law's is 16.3 %, that of the other
    runs' mean T_grok 19.4 %, and ten runs cannot tell these three apart. For S5 the clock is nearer too, with 16.9 %
    against the law's 25.3 %; for subtraction the law, with 13.6 % against 17.5 %. A run that never groks is forecast
    all the same, and the interval is for runs that grok; where some given to the fit did not, `note` counts them
    (docs/results.md, E5).

    References
    ----------
    arXiv 2604.13123, Section 8 and Appendix D.1, step 3.

    Examples
    --------
    >>> law = PowerLaw(c1=40_000.0, gamma=2.0, c2=500.0, h_star=0.6)
    >>> round(predict_grok_time(0.7, law, step=2_000).step, 6)
    2900.0
    >>> predict_grok_time(0.5, law, step=2_000).reason
    <Reason.BELOW_THRESHOLD: 'below_threshold'>
    """
    history = _as_history(entropy, step)
    now = float(history.step[-1]) if len(history) else float(step or 0)
    if law is None:
        return _none(
            now, Reason.NO_LAW, "no law: fit one to 3 or more runs that grokked, PowerLaw.fit(histories)"
        )
    said = _by_law(history, now, law)
    return replace(said, by_clock=law.by_clock(now), beats_clock=law.beats_clock, note=law.note)


def _by_law(history: History, now: float, law: PowerLaw) -> Forecast:
    if not len(history):
        return _none(now, Reason.NO_HISTORY, "no evaluation yet")
    h = float(history.entropy[-1])
    if math.isnan(h):
        return _none(now, Reason.UNUSABLE, "the latest entropy must not be used: see its status")
    gap = h - law.h_star
    if gap <= 0:
        return _none(now, Reason.BELOW_THRESHOLD, f"H = {h:.4f} is already at or below H* = {law.h_star:.4f}")
    change = recent_change(history.step, history.entropy, WINDOW)
    if change is not None and change > RISE:
        message = f"H rose by {change:.4f} over the last {WINDOW} evaluations: it is not on its way to H*"
        return _none(now, Reason.RISING, message)
    low, high = law.gap_range
    slack = SLACK * (high - low)
    remaining = float(law.remaining(h))
    if not (low - slack <= gap <= high + slack and math.isfinite(now + remaining)):
        message = f"H - H* = {gap:.4f} lies outside the {low:.4f} to {high:.4f} that the law was fitted to"
        return _none(now, Reason.EXTRAPOLATION, message)
    interval = law.forecast_interval(now, h)
    return Forecast(now + remaining, remaining, interval, None if interval is None else FORECAST_LEVEL, now)


def _none(now: float, reason: Reason, message: str) -> Forecast:
    return Forecast(None, None, None, None, now, reason, message)


def _as_history(entropy: float | SpectralEntropy | History | None, step: float | None) -> History:
    if step is not None and not 0 <= step < math.inf:
        raise ValueError(f"step must be finite and not negative; got {step}")
    if isinstance(entropy, History):
        if step is not None:
            raise ValueError("step must be left out with a history: its last evaluation says when it is")
        return entropy
    if entropy is None:
        return History([], [])
    if isinstance(entropy, SpectralEntropy):
        if isinstance(entropy.normalized, Tensor):
            raise ValueError("the entropies are batched: forecast each, `for one in entropy.unbind()`")
        entropy = entropy.normalized if entropy.status.usable else math.nan
    return History([step or 0], [entropy])
