"""What a monitor keeps: a record for each layer and step, each layer's course, where it crossed and collapsed.

The eigenvalues stay out: thousands of records must fit a checkpoint. Everything becomes plain JSON values and
comes back without losing a bit. A crossing is the first step whose record is usable and below the threshold, a collapse
the first whose entropy fell far enough (`Collapse`). They are remembered when their records have gone from the bounded
list of the layer, as is what a diagnosis and a forecast need (`Course`): no long run and no other layers change them.

The level of a run is the median of three usable evaluations in a row, so that a single wild one decides nothing. A
course keeps the highest level ever, the highest of the last `patience` steps (as the levels that no later one exceeds,
at most one for each step), since when the level is below the threshold, the first step, and the latest evaluations.
"""

from __future__ import annotations

import copy
import importlib
import math
import re
import reprlib
import sys
from collections import deque
from collections.abc import Iterable, KeysView, Mapping, Sequence
from dataclasses import astuple, dataclass, field, fields, replace
from itertools import pairwise
from types import UnionType
from typing import Any, Literal

import numpy as np

from fastent.display import Shown, Table, digits, whole
from fastent.entropy import SpectralEntropy, Status
from fastent.sampling import SamplingError

WINDOW = 5
MEDIAN = 3
PATIENCE = 20_000.0


@dataclass(frozen=True)
class EntropyRecord(Shown):
    """Spectral entropy of one layer at one training step.

    Attributes
    ----------
    step : int
        Training step, as the loop counts it.
    layer : str
        Name of the layer.
    normalized, entropy, effective_rank, participation_ratio, total_variance, ceiling : float
        As in `fastent.SpectralEntropy`; all NaN for `too_few_rows`, `not_run` and `failed`.
    status : Status
        What to distrust; crossings, stopping and forecasts use only a `usable` one.
    flags : tuple of Status
        All that apply; `status` is the worst of them.
    message : str
        The flags in sentences; empty when all is well.
    n, d : int
        Samples (rows; 0 of a layer that did not run, and of an evaluation that failed) and features (0 where no
        evaluation has told yet).
    bias, standard_error : float or None
        Sampling errors of `normalized` as in `fastent.SamplingError`; None where they were not asked for.
    mask : str or None
        Entry of the probe whose padding was left out, as the monitor's `mask` names it; None where every token counted.

    Examples
    --------
    >>> import torch
    >>> from fastent import spectral_entropy
    >>> h = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    >>> record = EntropyRecord.of(200, "encoder", spectral_entropy(h))
    >>> record.step, record.layer, record.normalized
    (200, 'encoder', 1.0)
    >>> EntropyRecord.from_dict(record.as_dict()) == record
    True
    """

    step: int
    layer: str
    normalized: float
    entropy: float
    effective_rank: float
    participation_ratio: float
    total_variance: float
    ceiling: float
    status: Status
    flags: tuple[Status, ...]
    message: str
    n: int
    d: int
    bias: float | None = None
    standard_error: float | None = None
    mask: str | None = None

    @classmethod
    def of(
        cls,
        step: int,
        layer: str,
        result: SpectralEntropy,
        sampling: SamplingError | None = None,
        mask: str | None = None,
    ) -> EntropyRecord:
        """Record of an unbatched result, with its sampling errors and the name of its mask where there are."""
        return cls(
            step=step,
            layer=layer,
            **{name: float(getattr(result, name)) for name in _FLOATS},
            status=result.status,
            flags=result.flags,
            message=result.message,
            n=result.n,
            d=result.d,
            bias=None if sampling is None else sampling.bias,
            standard_error=None if sampling is None else sampling.standard_error,
            mask=mask,
        )

    def __repr__(self) -> str:
        return (
            f"EntropyRecord(step={self.step}, layer={self.layer!r}, normalized={digits(self.normalized)}, "
            f"effective_rank={digits(self.effective_rank)}, n={self.n}, d={self.d}, status={self.status.value!r})"
        )

    def _table(self) -> Table:
        rows = [
            ("H, normalised", digits(self.normalized)),
            ("standard error", digits(self.standard_error)),
            ("effective rank", f"{digits(self.effective_rank)} of {self.d}"),
            ("participation ratio", digits(self.participation_ratio)),
            ("samples", whole(self.n)),
            ("status", ", ".join(flag.value for flag in self.flags) or self.status.value),
        ]
        if self.standard_error is None:
            del rows[1]
        return Table(f"Layer {self.layer!r} at step {whole(self.step)}", rows, remark=self.message)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values: NaN is None, an infinity the string "inf", statuses are strings."""
        values = dict(vars(self))
        values["status"] = self.status.value
        values["flags"] = [flag.value for flag in self.flags]
        return {key: _plain(value) for key, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EntropyRecord:
        """Record from what `as_dict` gave; KeyError, ValueError or TypeError for anything else."""
        for status in (values["status"], *values["flags"]):
            if not isinstance(status, str):
                raise TypeError(f"a status must be a string; got {reprlib.repr(status)}")
        record = cls(
            **{
                **values,
                **{name: _float(values[name]) for name in _FLOATS},
                "status": Status(values["status"]),
                "flags": tuple(Status(flag) for flag in values["flags"]),
            }
        )
        for name in _COUNTS:
            checked_count(name, getattr(record, name))
        for name in ("layer", "message", "mask"):
            value = getattr(record, name)
            if not isinstance(value, str) and (name != "mask" or value is not None):
                raise TypeError(f"{name} must be a string; got {reprlib.repr(value)}")
        for name in _ERRORS:
            checked_number(name, getattr(record, name))
        return record


@dataclass(frozen=True)
class Collapse:
    """A fall of the normalised entropy that counts as collapse: `fall` below its highest of the last `within` steps.

    A layer collapses at its first evaluation whose H lies more than `fall` below the largest H of the evaluations of
    the last `within` steps: ``T_collapse`` of the study of grokking, which takes evaluations from the one on at which
    the training set is memorised. Unusable evaluations are left out.

    Parameters
    ----------
    fall : float
        Difference in H, in (0, 1). 0.05 is the paper's (arXiv 2604.13123, section 5).
    within : int
        Steps, at least 1. 800 is ours: five evaluations, 200 steps apart, for the paper's "5-step rolling window",
        which it also calls 1,000 steps. In both recorded settings, of 10 runs each that grok at step 13,800 and 11,560
        on average, every run collapses so before it groks (docs/results.md and docs/results-nearest.md, E1). Scale it
        with the length of a run.
    since : int
        Step of the first evaluation that counts. A network that memorises can lower H by more than `fall` within its
        first hundreds of steps, whether it will grok or not: where it does, give the step at which it has memorised.

    Raises
    ------
    ValueError
        If `fall` lies outside (0, 1), `within` is below 1 or `since` negative.
    """

    fall: float = 0.05
    within: int = 800
    since: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.fall < 1:
            raise ValueError(f"fall is a difference of normalised entropies, in (0, 1); got {self.fall}")
        if not self.within >= 1:
            raise ValueError(f"within must be at least 1 step; got {self.within}")
        if not self.since >= 0:
            raise ValueError(f"since is a step, 0 or more; got {self.since}")


class Course:
    """Running summary of one layer's normalised entropy.

    Parameters
    ----------
    threshold : float or None
        Level to be below.
    patience : float
        Steps over which `recent_peak` looks back.

    Attributes
    ----------
    first : int, float or None
        Step of the first evaluation.
    peak : float or None
        The highest level ever.
    below_since : int, float or None
        Step at which the level last went below the threshold; None at or above it, or without one.

    Examples
    --------
    >>> course = Course(threshold=0.7, patience=400)
    >>> for step, entropy in enumerate([0.9, 0.9, 0.9, 0.8, 0.6, 0.5, 0.4]):
    ...     course.add(200 * step, entropy)
    >>> course.level, course.peak, course.recent_peak, course.below_since
    (0.5, 0.9, 0.8, 1000)
    """

    def __init__(self, threshold: float | None, patience: float = PATIENCE) -> None:
        self.threshold, self.patience = threshold, patience
        self.first: float | None = None
        self.peak: float | None = None
        self.below_since: float | None = None
        self._recent: deque[tuple[float, float]] = deque(maxlen=WINDOW)
        self._usable: deque[float] = deque(maxlen=MEDIAN)
        self._peaks: deque[tuple[float, float]] = deque()  # steps rise, levels fall

    def add(self, step: float, entropy: float) -> None:
        """Take the next evaluation; NaN is an unusable one."""
        if self.first is None:
            self.first = step
        self._recent.append((step, entropy))
        if math.isnan(entropy):
            return
        self._usable.append(entropy)
        level = self.level
        if level is None:
            return
        self.peak = level if self.peak is None else max(self.peak, level)
        _add_peak(self._peaks, step, level, self.patience)
        if self.threshold is None or level >= self.threshold:
            self.below_since = None
        elif self.below_since is None:
            self.below_since = step

    @property
    def last(self) -> float | None:
        """Step of the latest evaluation."""
        return self._recent[-1][0] if self._recent else None

    @property
    def recent(self) -> list[tuple[float, float]]:
        """Steps and entropies of the latest evaluations, 5 at most."""
        return list(self._recent)

    @property
    def level(self) -> float | None:
        """Median of the last three usable evaluations; None before there are so many."""
        return sorted(self._usable)[MEDIAN // 2] if len(self._usable) == MEDIAN else None

    @property
    def recent_peak(self) -> float | None:
        """The highest level of the last `patience` steps; the latest level counts wherever it is."""
        if self._recent:
            _forget(self._peaks, self._recent[-1][0] - self.patience)
        return self._peaks[0][1] if self._peaks else None

    def state_dict(self) -> dict[str, Any]:
        """State as plain JSON values; NaN is None."""
        return {
            "first": self.first,
            "peak": self.peak,
            "below_since": self.below_since,
            "recent": [[step, None if math.isnan(h) else h] for step, h in self._recent],
            "usable": list(self._usable),
            "peaks": [list(item) for item in self._peaks],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace everything by what `state_dict` gave, for the same threshold and patience.

        Raises
        ------
        KeyError, TypeError, ValueError
            For anything else. Nothing is replaced then.
        """
        single = {name: checked_number(name, state[name]) for name in ("first", "peak", "below_since")}
        recent = [
            (_number("a step", step), math.nan if h is None else _entropy(h)) for step, h in state["recent"]
        ]
        if any(step <= before for (before, _), (step, _) in pairwise(recent)):
            raise ValueError("the steps of recent must increase")
        usable = [_entropy(h) for h in state["usable"]]
        peaks = _peaks(state["peaks"])
        self.first, self.peak, self.below_since = single["first"], single["peak"], single["below_since"]
        self._recent, self._usable = deque(recent, WINDOW), deque(usable, MEDIAN)
        self._peaks = peaks

    def find_below(self, evaluations: Iterable[tuple[float, float]]) -> None:
        """Find `below_since` again in what is left of the run, for a threshold that is not the saved one.

        Exact as far back as `evaluations` go; where the level was below the threshold in all of them, and had been
        above it before, the first of them stands for the step that is not known.
        """
        rest = Course(self.threshold, self.patience)
        for step, entropy in evaluations:
            rest.add(step, entropy)
        self.below_since = rest.below_since
        level, threshold = self.level, self.threshold
        if rest.level is None and level is not None and threshold is not None and level < threshold:
            self.below_since = self.last


@dataclass
class _Layer:
    d: int  # 0 while every evaluation failed
    newest: int
    course: Course
    crossed_at: int | None = None
    collapsed_at: int | None = None
    highs: deque[tuple[float, float]] = field(default_factory=deque)
    """Entropies that a fall is counted from (`_add_peak`)."""
    records: deque[tuple[int, EntropyRecord]] = field(default_factory=deque)
    """Numbered in the order of arrival over all layers."""


class Recording:
    """The newest records of each layer, with its width, newest step, crossing, collapse and course.

    Parameters
    ----------
    size : int
        Records kept of each layer; the oldest go first.
    threshold : float, dict or None
        Normalised entropy to cross; by name or pattern of layers, or one for all.
    collapse : Collapse or None
        Fall to look for.

    Attributes
    ----------
    fallen : deque of EntropyRecord
        Those at which a layer collapsed, for somebody to take out who tells of them; in a state as long as they are in
        here, so that each is told of once, however often the run is resumed.
    """

    def __init__(
        self, size: int, threshold: float | Mapping[str, float] | None, collapse: Collapse | None = None
    ) -> None:
        self.fallen: deque[EntropyRecord] = deque()
        self._threshold, self._collapse = threshold, collapse
        self._thresholds: dict[str, float | None] = {}  # found so far
        self._size = size
        self._layers: dict[str, _Layer] = {}
        self._expected: dict[str, tuple[int, int]] = {}  # width and newest step
        self._count = 0
        self._ordered: list[EntropyRecord] | None = None

    @property
    def records(self) -> list[EntropyRecord]:
        """All records kept, in the order of arrival."""
        if self._ordered is None:  # sorted once for each evaluation: a policy may ask at every step
            kept = (item for layer in self._layers.values() for item in layer.records)
            self._ordered = [record for _, record in sorted(kept, key=lambda item: item[0])]
        return list(self._ordered)

    @property
    def layers(self) -> KeysView[str]:
        """Layers that have been recorded, in the order of their first records."""
        return self._layers.keys()

    @property
    def crossings(self) -> dict[str, int]:
        """First step below the threshold by layer; layers that have not been below it are absent."""
        return {
            name: layer.crossed_at for name, layer in self._layers.items() if layer.crossed_at is not None
        }

    @property
    def collapsed(self) -> dict[str, int]:
        """Step of the collapse by layer; layers that have not collapsed are absent."""
        return {
            name: layer.collapsed_at for name, layer in self._layers.items() if layer.collapsed_at is not None
        }

    def table(self, order: Iterable[str], title: str) -> Table:
        """Put the newest record of each layer into a table, those of the layers in `order` first."""
        rows = []
        for name in dict.fromkeys((*order, *self._layers)):
            cells = ["–"] * 6
            layer = self._layers.get(name)
            if layer is not None and layer.records:
                _, newest = layer.records[-1]
                cells = [whole(newest.step), digits(newest.normalized), digits(newest.effective_rank)]
                cells += [newest.status.value, whole(layer.crossed_at), whole(layer.collapsed_at)]
            rows.append((name or "(model)", *cells))
        heads = ("layer", "step", "H", "effective rank", "status", "crossed at", "collapsed at")
        return Table(title, rows, heads)

    def plot(self, order: Iterable[str], kind: Drawing | None, ax: Any) -> Any:
        """Draw the records kept, those of the layers in `order` first (`fastent.plots.plot_layers`)."""
        from fastent import plots

        series = []
        for name in dict.fromkeys((*order, *self._layers)):
            layer = self._layers.get(name)
            if layer is None or not layer.records:
                continue
            records = [record for _, record in layer.records]
            usable = np.array([record.status.usable for record in records])
            series.append(
                plots.Series(
                    name or "(model)",
                    np.array([record.step for record in records], dtype=np.float64),
                    np.array([record.normalized for record in records]),
                    usable,
                    usable & [record.status is Status.RANK_LIMITED for record in records],
                    tuple(dict.fromkeys(r.status.value for r in records if not r.status.usable)),
                    layer.course.threshold,
                    layer.crossed_at,
                    layer.collapsed_at,
                )
            )
        return plots.plot_layers(series, kind, ax)

    def threshold(self, layer: str) -> float | None:
        """Return the threshold of `layer`: that of its name, else of the first pattern that matches, else None."""
        if not isinstance(self._threshold, Mapping):
            return self._threshold
        if layer not in self._thresholds:
            matching = (value for key, value in self._threshold.items() if matches_pattern(layer, key))
            self._thresholds[layer] = self._threshold.get(layer, next(matching, None))
        return self._thresholds[layer]

    def course(self, layer: str) -> Course:
        """Give what a diagnosis and a forecast need of a layer that has been recorded."""
        return self._layers[layer].course

    def check(self, step: int, layer: str, d: int | None = None) -> None:
        """Refuse a second record of `layer` at `step`, or another width than before."""
        known = self._known(layer)
        if known is None:
            return
        width, newest = known
        if newest == step:
            raise ValueError(f"layer {layer!r} already has a record at step {step}")
        if d and width and d != width:
            raise ValueError(
                f"layer {layer!r} had d = {width} and now has d = {d}: entropies of different widths do "
                "not compare; record it under another name"
            )

    def newest(self, layer: str) -> int | None:
        """Return the step of the newest record of `layer`, one on its way included."""
        known = self._known(layer)
        return None if known is None else known[1]

    def width(self, layer: str) -> int | None:
        """Return the features of `layer`, if it has been recorded or will be; 0 where every evaluation failed."""
        known = self._known(layer)
        return None if known is None else known[0]

    def expect(self, step: int, layer: str, d: int) -> None:
        """Let `check` count a record that is on its way."""
        self._expected[layer] = d or self.width(layer) or 0, step

    def add(self, record: EntropyRecord) -> None:
        """Keep a record that `check` let through."""
        layer = self._layers.get(record.layer)
        if layer is None:
            course = Course(self.threshold(record.layer))
            layer = _Layer(record.d, record.step, course, records=deque(maxlen=self._size))
            self._layers[record.layer] = layer
        layer.d, layer.newest = layer.d or record.d, record.step
        layer.course.add(*_evaluation(record))
        self._note_crossing(layer, record)
        if self._collapses(layer, record):
            self.fallen.append(record)
        layer.records.append((self._count, record))
        self._count += 1
        self._ordered = None

    def state_dict(self) -> dict[str, Any]:
        """State as plain JSON values, with the same keys whatever was recorded (`columns`)."""
        layers = (
            {
                "name": name,
                "d": layer.d,
                "newest": layer.newest,
                "threshold": layer.course.threshold,
                "crossed_at": layer.crossed_at,
                "collapsed_at": layer.collapsed_at,
                "highs": [list(item) for item in layer.highs],
                **layer.course.state_dict(),
            }
            for name, layer in self._layers.items()
        )
        own = ("name", "d", "newest", "threshold", "crossed_at", "collapsed_at", "highs")
        return {
            "collapse": self._collapse and list(astuple(self._collapse)),
            "layers": columns((*own, *Course(None).state_dict()), layers),
            "history": columns(_RECORD, (record.as_dict() for record in self.records)),
            "fallen": columns(_RECORD, (record.as_dict() for record in self.fallen)),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace everything kept, or nothing if it cannot be read.

        Under another threshold, crossings are found again in the saved records, and collapses under another `Collapse`;
        `fallen` gets those of layers that nobody was told of. Versions 1 to 3 had one threshold for all and no
        collapses; 1 and 2 had a dictionary for each layer and record; version 1 had no courses, which come from its
        records.
        """
        history, saved = state["history"], state["layers"]
        if isinstance(history, Mapping):
            history = rows_of(history)
            saved = {_name(row["name"]): {**row, "course": row} for row in rows_of(saved)}
        records = [EntropyRecord.from_dict(values) for values in history]
        if "threshold" in state:
            added = {"threshold": state["threshold"], "collapsed_at": None, "highs": []}
            saved = {name: {**values, **added} for name, values in saved.items()}
            state = {**state, "collapse": None, "fallen": {}}
        fallen = deque(EntropyRecord.from_dict(values) for values in rows_of(state["fallen"]))
        same_collapse = state["collapse"] == (self._collapse and list(astuple(self._collapse)))
        if not same_collapse:
            untold, fallen = {record.layer for record in fallen}, deque()
        kept: dict[str, list[tuple[int, EntropyRecord]]] = {name: [] for name in saved}
        for number, record in enumerate(records):
            kept[record.layer].append((number, record))
        layers: dict[str, _Layer] = {}
        for name, values in saved.items():
            own = kept[name]
            course = Course(self.threshold(name))
            same_threshold = checked_number("threshold", values["threshold"]) == course.threshold
            layer = _Layer(
                checked_count("d", values["d"]),
                checked_count("newest", values["newest"]),
                course,
                checked_step("crossed_at", values),
                checked_step("collapsed_at", values),
                _peaks(values["highs"]),
                deque(own, self._size),
            )
            if "course" in values:
                course.load_state_dict(values["course"])
                if not same_threshold:
                    course.find_below(_evaluation(record) for _, record in own)
            else:
                for _, record in own:
                    course.add(*_evaluation(record))
            if not same_threshold:
                layer.crossed_at = None
                for _, record in own:
                    self._note_crossing(layer, record)
            if not same_collapse:
                told = layer.collapsed_at is not None and name not in untold
                layer.collapsed_at, layer.highs = None, deque()
                found = [record for _, record in own if self._collapses(layer, record)]
                fallen.extend([] if told else found)
            layers[name] = layer
        self._layers, self._expected, self._count = layers, {}, len(records)
        self._ordered, self.fallen = None, fallen

    def become(self, other: Recording) -> None:
        """Keep what `other` keeps, and nothing else."""
        self._layers, self._expected, self._count = other._layers, other._expected, other._count
        self._ordered, self.fallen = None, other.fallen

    def with_records(self, records: Iterable[EntropyRecord]) -> Recording:
        """Make one that keeps `records` too; this one stays as it is."""
        other = self.empty()
        other._layers = {
            name: replace(
                layer,
                course=copy.deepcopy(layer.course),
                highs=layer.highs.copy(),
                records=layer.records.copy(),
            )
            for name, layer in self._layers.items()
        }
        other._count, other.fallen = self._count, self.fallen.copy()
        for record in records:
            other.add(record)
        return other

    def empty(self) -> Recording:
        """Make one of the same size, thresholds and collapse."""
        return Recording(self._size, self._threshold, self._collapse)

    def _known(self, layer: str) -> tuple[int, int] | None:
        recorded = self._layers.get(layer)
        return self._expected.get(layer) or (None if recorded is None else (recorded.d, recorded.newest))

    def _note_crossing(self, layer: _Layer, record: EntropyRecord) -> None:
        threshold = layer.course.threshold
        if threshold is None or layer.crossed_at is not None or not record.status.usable:
            return
        if record.normalized < threshold:
            layer.crossed_at = record.step

    def _collapses(self, layer: _Layer, record: EntropyRecord) -> bool:
        """Whether `record`, which comes next, is the one at which `layer` collapses."""
        collapse = self._collapse
        if collapse is None or layer.collapsed_at is not None or not record.status.usable:
            return False
        if record.step < collapse.since:
            return False
        _add_peak(layer.highs, record.step, record.normalized, collapse.within)
        if not layer.highs[0][1] - record.normalized > collapse.fall:
            return False
        layer.collapsed_at = record.step
        layer.highs.clear()
        return True


def _add_peak(peaks: deque[tuple[float, float]], step: float, value: float, span: float) -> None:
    """Take the next value, so that the first of `peaks` is the highest of the last `span` steps.

    Steps rise and values fall along them: what a later value is as high as can never be the highest again.
    """
    while peaks and peaks[-1][1] <= value:
        peaks.pop()
    peaks.append((step, value))
    _forget(peaks, step - span)


def _forget(peaks: deque[tuple[float, float]], before: float) -> None:
    while len(peaks) > 1 and peaks[0][0] < before:
        peaks.popleft()


def _peaks(saved: Iterable[Sequence[Any]]) -> deque[tuple[float, float]]:
    return deque((_number("a step", step), _number("a peak", value)) for step, value in saved)


def _evaluation(record: EntropyRecord) -> tuple[int, float]:
    return record.step, record.normalized if record.status.usable else math.nan


_RECORD = tuple(field.name for field in fields(EntropyRecord))
_COUNTS, _ERRORS = ("step", "n", "d"), ("bias", "standard_error")
_FLOATS = ("normalized", "entropy", "effective_rank", "participation_ratio", "total_variance", "ceiling")


def _plain(value: Any) -> Any:
    # Python's json writes NaN and Infinity, which no other reader of JSON accepts.
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def _float(value: float | str | None) -> float:
    try:
        return math.nan if value is None else float(value)
    except OverflowError as error:  # a whole number of JSON may be larger than any float
        raise ValueError(
            f"a number of a record is too large for a float; got {reprlib.repr(value)}"
        ) from error


def matches_pattern(name: str, pattern: str) -> bool:
    """Whether a layer's name fits a pattern as in `fastent.monitor.probe.find_layers`."""
    return re.fullmatch(_regex(pattern), name) is not None


def _regex(pattern: str) -> str:
    parts = re.findall(r"(?:^|(?<=\.))\*\*\.|\*\*|\*|\?|\[!?\]?[^\]]*\]|.", pattern, re.DOTALL)
    signs = {"**.": r"(?:.*\.)?", "**": ".*", "*": r"[^.]*", "?": r"[^.]"}
    return "".join(signs.get(part) or _class_or_text(part) for part in parts)


def _class_or_text(part: str) -> str:
    if len(part) < 3:  # a lone bracket too
        return re.escape(part)
    inside = part[1:-1].replace("\\", r"\\").replace("[", r"\[")
    return f"[^{inside[1:]}]" if inside.startswith("!") else f"[{inside}]"


Drawing = Literal["lines", "heatmap"]


def plot_records(
    records: Iterable[EntropyRecord],
    *,
    kind: Drawing | None = None,
    ax: Any = None,
    threshold: float | Mapping[str, float] | None = None,
    collapse: Collapse | None = None,
) -> Any:
    """Draw records, such as those of a log that was read back, as `SpectralEntropyMonitor.plot` draws its own.

    Parameters
    ----------
    records : iterable of EntropyRecord
        In any order. Of several of one layer and step the last counts: a run that is resumed writes some steps again.
    kind, ax
        As of `SpectralEntropyMonitor.plot`.
    threshold, collapse
        As of `SpectralEntropyMonitor`: what to mark.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    ModuleNotFoundError, TypeError, ValueError
        As of `SpectralEntropyMonitor.plot`.
    """
    latest = {(record.layer, record.step): record for record in records}
    recording = Recording(max(len(latest), 1), threshold, collapse)
    for record in sorted(latest.values(), key=lambda record: record.step):
        recording.add(record)
    return recording.plot(dict.fromkeys(layer for layer, _ in latest), kind, ax)


Library = Literal["pandas", "polars"]


def records_frame(library: Library, records: Iterable[EntropyRecord]) -> Any:
    """Put records into a data frame; its columns are described at `SpectralEntropyMonitor.to_pandas`."""
    rows = [
        {
            **vars(record),
            "status": record.status.value,
            "flags": " ".join(flag.value for flag in record.flags),
        }
        for record in records
    ]
    kinds = dict.fromkeys(_COUNTS, int) | dict.fromkeys((*_FLOATS, *_ERRORS), float)
    return frame(library, {name: kinds.get(name, str) for name in _RECORD}, columns(_RECORD, rows))


Kind = type | UnionType
"""What a column holds: str, float, int, and int or bool that may be missing (``int | None``)."""


def frame(library: Library, kinds: Mapping[str, Kind], values: Mapping[str, Any]) -> Any:
    """Put columns into a data frame; of `values` those that `kinds` names, in their order.

    Raises
    ------
    ModuleNotFoundError
        If `library` is not installed; this one does not depend on it.
    """
    try:
        module = importlib.import_module(library)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"to_{library} needs {error.name}, which is not installed: pip install {error.name}",
            name=error.name,
        ) from error
    if library == "pandas":
        names: dict[Kind, str] = {
            int: "int64",
            float: "float64",
            str: "string",
            int | None: "Int64",
            bool | None: "boolean",
        }
        return module.DataFrame(
            {name: module.Series(values[name], dtype=names[kind]) for name, kind in kinds.items()}
        )
    types: dict[Kind, Any] = {int: module.Int64, float: module.Float64, str: module.String}
    types |= {int | None: module.Int64, bool | None: module.Boolean}
    return module.DataFrame(values, schema={name: types[kind] for name, kind in kinds.items()})


def columns(names: Iterable[str], rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Put rows into lists of the values of each name: as many keys, however many rows.

    Tools for distributed checkpoints take what they load by the keys of an empty state.
    """
    rows = list(rows)
    return {name: [row[name] for row in rows] for name in names}


def rows_of(columns: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    """Take rows out of what `columns` gave; ValueError or TypeError for anything else."""
    if not all(isinstance(values, list) for values in columns.values()):
        raise TypeError(f"each of {', '.join(map(str, columns))} must be a list")
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def checked_count(name: str, value: Any) -> int:
    """Give a saved count or step, or raise ValueError."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 63:
        raise ValueError(f"{name} must be an integer, 0 or more, of 63 bits; got {reprlib.repr(value)}")
    return value


def checked_step(name: str, state: Mapping[str, Any]) -> int | None:
    """Give a step of a saved state, None where there is none, or raise ValueError."""
    return None if state[name] is None else checked_count(name, state[name])


def checked_number(name: str, value: Any) -> float | None:
    """Give a saved number or None, or raise ValueError."""
    # A whole number of JSON may be larger than any float.
    if value is None or (
        isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    ):
        return value
    raise ValueError(f"{name} must be a finite number or null; got {reprlib.repr(value)}")


def _name(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a layer's name must be a string; got {reprlib.repr(value)}")
    return value


def _entropy(value: Any) -> float:
    number = _number("H", value)
    if not 0 <= number <= 1 + 1e-6:  # a little above 1 is rounding
        raise ValueError(f"H must lie in [0, 1]; got {number:g}")
    return number


def _number(name: str, value: Any) -> float:
    number = checked_number(name, value)
    if number is None:
        raise ValueError(f"{name} must be a number; got null")
    return number
