"""One run's entropy over time, and the threshold H* calibrated from several.

H* of a run is its normalised entropy at ``T_grok``; of a task, the mean over runs (the paper's Appendix D.1,
step 2). It needs test labels, and it moves with architecture, scale and learning rate (0.41 to 0.74 in our
trials), so none is built in.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from fastent.display import Shown, Table, between, digits, whole
from fastent.records import EntropyRecord, Library, frame

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

Array = np.ndarray[Any, np.dtype[np.float64]]
Interval = tuple[float, float]

ROUNDING = 1e-9
LEVEL = 0.95


@dataclass(frozen=True, eq=False, init=False)
class History(Shown):
    """Evaluations of one run in the order of their steps. Arrays are float64 of shape (m,), m >= 0.

    Parameters
    ----------
    step : array_like
        Training steps, finite and strictly increasing.
    entropy : array_like
        Normalised entropy in [0, 1]; NaN where its status makes it unusable.
    t_grok : float, optional
        First step with test accuracy at the criterion; None if the run has not grokked.
    norm : array_like, optional
        Euclidean norm of the parameters, NaN where not measured. Only `diagnose` reads it.

    Raises
    ------
    ValueError
        If lengths differ, steps do not increase, or an entropy lies outside [0, 1].

    Examples
    --------
    >>> run = History([0, 200, 400], [0.9, 0.75, 0.25], t_grok=300)
    >>> run.entropy_at_grok
    0.5
    """

    step: Array
    entropy: Array
    t_grok: float | None
    norm: Array | None

    def __init__(
        self,
        step: ArrayLike,
        entropy: ArrayLike,
        t_grok: float | None = None,
        *,
        norm: ArrayLike | None = None,
    ) -> None:
        for name, values in {"step": step, "entropy": entropy, "norm": norm}.items():
            column = None if values is None else np.array(values, dtype=np.float64)
            object.__setattr__(self, name, column)
            if column is not None and column.shape != (np.size(step),):
                raise ValueError(
                    f"{name} must have one entry for each of {np.size(step)} steps; got shape {column.shape}"
                )
        object.__setattr__(self, "t_grok", None if t_grok is None else float(t_grok))
        if not (np.isfinite(self.step).all() and (np.diff(self.step) > 0).all()):
            raise ValueError("steps must be finite and strictly increase: one run, one layer, sorted")
        # NaN passes: it marks an unusable entropy. A little above 1 is rounding.
        outside = (self.entropy < 0) | (self.entropy > 1 + ROUNDING)
        if outside.any():
            raise ValueError(
                f"entropy must be normalised (0 to 1); got {self.entropy[outside][0]:.6g} at step "
                f"{self.step[outside][0]:.0f}. Divide by log d, or take SpectralEntropy.normalized"
            )

    def __len__(self) -> int:
        return len(self.step)

    def __repr__(self) -> str:
        if not len(self):
            return "History(no evaluation)"
        grok = "" if self.t_grok is None else f", t_grok={self.t_grok:.0f}"
        course = f"entropy {digits(self.entropy[0])} to {digits(self.entropy[-1])}"
        return f"History({len(self)} evaluations, steps {self._steps}, {course}{grok})"

    @property
    def _steps(self) -> str:
        return between((self.step[0], self.step[-1]), whole)

    def _table(self) -> Table:
        if not len(self):
            return Table("Entropy of a run", [("evaluations", "0")])
        bad = int((~self.usable).sum())
        known = self.entropy[self.usable]
        course = (known[0], known.min(), known[-1]) if len(known) else [None]
        rows = [
            ("evaluations", f"{len(self)}, {bad} not usable" if bad else str(len(self))),
            ("steps", self._steps),
            ("H, first, lowest, last", ", ".join(map(digits, course))),
            ("grokked at step", whole(self.t_grok)),
            ("H there", digits(self.entropy_at_grok)),
        ]
        return Table("Entropy of a run", rows)

    @classmethod
    def from_records(
        cls, records: Iterable[EntropyRecord], *, layer: str | None = None, t_grok: float | None = None
    ) -> Self:
        """History of one layer from a monitor's records; unusable ones become NaN.

        Parameters
        ----------
        records : iterable of EntropyRecord
            In the order of their steps, such as `SpectralEntropyMonitor.history`.
        layer : str, optional
            Which layer; may be left out where the records hold one only.
        t_grok : float, optional
            See the class.

        Raises
        ------
        ValueError
            If `layer` is left out and the records hold several.
        """
        rows = list(records)
        names = list(dict.fromkeys(row.layer for row in rows))
        if layer is None and len(names) > 1:
            raise ValueError(f"the records hold several layers; say which: {', '.join(map(repr, names))}")
        rows = [row for row in rows if layer is None or row.layer == str(layer)]
        return cls(
            [row.step for row in rows],
            [row.normalized if row.status.usable else math.nan for row in rows],
            t_grok,
        )

    @property
    def usable(self) -> NDArray[np.bool_]:
        """Shape (m,): where the entropy may be used."""
        return ~np.isnan(self.entropy)

    @property
    def entropy_at_grok(self) -> float | None:
        """H* of this run: the entropy at `t_grok`, on the line between the two evaluations around it.

        None where the run has not grokked, or an evaluation that it takes is missing or unusable.
        """
        if self.t_grok is None or not len(self) or not self.step[0] <= self.t_grok <= self.step[-1]:
            return None
        after = int(np.searchsorted(self.step, self.t_grok))
        if self.step[after] == self.t_grok:
            value = self.entropy[after]
        else:
            value = np.interp(
                self.t_grok, self.step[after - 1 : after + 1], self.entropy[after - 1 : after + 1]
            )
        return None if np.isnan(value) else float(value)

    def to_pandas(self) -> Any:
        """Give a data frame of pandas, a row for each evaluation; an empty history gives the columns too.

        Returns
        -------
        pandas.DataFrame
            Columns, all float64: `step` and `t_grok` (training steps; `t_grok` the same in every row, NaN where the run
            has not grokked), `entropy` (no unit, 0 to 1; NaN where unusable), `norm` (no unit; NaN where not measured).

        Raises
        ------
        ModuleNotFoundError
            If pandas is not installed.
        """
        return self._frame("pandas")

    def to_polars(self) -> Any:
        """Give a data frame of polars with the columns of `to_pandas`, all Float64."""
        return self._frame("polars")

    def _frame(self, library: Library) -> Any:
        unknown = np.full(len(self), math.nan)
        values = {
            "step": self.step,
            "entropy": self.entropy,
            "norm": unknown if self.norm is None else self.norm,
            "t_grok": unknown if self.t_grok is None else np.full(len(self), self.t_grok),
        }
        return frame(library, dict.fromkeys(values, float), values)

    def plot(self, *, label: str | None = None, ax: Any = None) -> Any:
        """Draw the entropy over the steps, with a dashed line and a dot where the run grokked.

        Parameters
        ----------
        label : str, optional
            Name of the run in the legend.
        ax : matplotlib.axes.Axes, optional
            Where to draw, in the next of its colours: several runs go on the same. By default on a figure of its own,
            as in `SpectralEntropyMonitor.plot`.

        Returns
        -------
        matplotlib.axes.Axes

        Raises
        ------
        ModuleNotFoundError
            If matplotlib is not installed.
        TypeError
            If `ax` is not axes of matplotlib.
        """
        from fastent import plots

        limited = np.zeros(len(self), dtype=bool)
        series = plots.Series("", self.step, self.entropy, self.usable, limited)
        return plots.plot_run(series, self.t_grok, self.entropy_at_grok, ax, label)

    def until(self, step: float) -> History:
        """Return the run as it stood at `step`: what came later, `t_grok` included, is not known yet."""
        known = self.step <= step
        return History(
            self.step[known],
            self.entropy[known],
            self.t_grok if self.t_grok is not None and self.t_grok <= step else None,
            norm=None if self.norm is None else self.norm[known],
        )


@dataclass(frozen=True)
class Threshold(Shown):
    """H* of a task.

    Attributes
    ----------
    value : float
        Mean of `per_run`.
    interval : tuple of two floats, or None
        Student's, of the mean; None for a single run.
    level : float
        Confidence of `interval`.
    per_run : tuple of floats
        Entropy at ``T_grok`` of each run that grokked. The others are left out: they cannot tell at which entropy
        they would have.
    """

    value: float
    interval: Interval | None
    level: float
    per_run: tuple[float, ...]

    def __repr__(self) -> str:
        spread = f", interval={between(self.interval)}" if self.interval else ""
        return f"Threshold(value={digits(self.value)}{spread}, runs={len(self.per_run)})"

    def _table(self) -> Table:
        rows = [
            ("H*", digits(self.value)),
            (f"{100 * self.level:.0f} % interval", between(self.interval)),
            ("runs", str(len(self.per_run))),
            ("H at grokking", between((min(self.per_run), max(self.per_run)))),
        ]
        return Table("Threshold", rows)


def calibrate_threshold(histories: Sequence[History], *, level: float = LEVEL) -> Threshold:
    """Mean entropy at ``T_grok`` over the runs that grokked: the paper's H*.

    The interval is Student's and not a bootstrap's because the protocol asks for 3 to 5 runs: no resample leaves
    the range of the data, so for three runs a bootstrap covers at most 75 %.

    Parameters
    ----------
    histories : sequence of History
        One per seed.
    level : float
        Confidence of the interval, in (0, 1).

    Raises
    ------
    ValueError
        If no run grokked with a usable entropy there.

    References
    ----------
    arXiv 2604.13123, Appendix D.1, step 2.

    Examples
    --------
    >>> runs = [History([0, 200], [0.9, h], t_grok=200) for h in (0.5, 0.625, 0.75)]
    >>> calibrate_threshold(runs).value
    0.625
    """
    per_run = tuple(h for h in (run.entropy_at_grok for run in histories) if h is not None)
    if not per_run:
        raise ValueError(
            f"H* cannot be calibrated: none of {len(histories)} runs grokked with a usable entropy at t_grok. "
            "Train 3 to 5 seeds to grokking first"
        )
    return Threshold(float(np.mean(per_run)), mean_interval(per_run, level), level, per_run)


def mean_interval(values: ArrayLike, level: float) -> Interval | None:
    """Student's interval of the mean of independent `values`; None for fewer than two."""
    from scipy.special import stdtrit

    x = np.asarray(values, dtype=np.float64)
    if x.size < 2:
        return None
    width = -float(stdtrit(x.size - 1, (1 - level) / 2)) * float(x.std(ddof=1)) / math.sqrt(x.size)
    return float(x.mean()) - width, float(x.mean()) + width


def recent_change(step: Array, values: Array, window: int) -> float | None:
    """Change over the last `window` evaluations: the median slope of all pairs times their span.

    One wild evaluation of five does not move it. NaN are passed over; None where fewer than three are left.

    References
    ----------
    Theil (1950) and Sen, "Estimates of the regression coefficient based on Kendall's tau", JASA 63 (1968).
    """
    # Without NumPy, whose calls cost more than ten slopes: a forecast may be asked for at each step.
    recent = zip(step[-window:].tolist(), values[-window:].tolist(), strict=True)
    known: list[tuple[float, float]] = [(t, x) for t, x in recent if not math.isnan(x)]
    if len(known) < 3:
        return None
    slopes = sorted((later - x) / (then - t) for (t, x), (then, later) in combinations(known, 2))
    middle = len(slopes) // 2
    return (slopes[middle] + slopes[~middle]) / 2 * (known[-1][0] - known[0][0])
