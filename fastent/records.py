"""What a monitor keeps: a record for each layer and step, each layer's course, and where it crossed the threshold.

The eigenvalues stay out: thousands of records must fit a checkpoint. Everything becomes plain JSON values and
comes back without losing a bit. A crossing is the first step whose record is usable and below the threshold. It
is remembered when its record has gone from the bounded list of its layer, as is what a diagnosis and a forecast need
(`Course`): neither a long run nor many layers change them.

The level of a run is the median of three usable evaluations in a row, so that a single wild one decides nothing. A
course keeps the highest level ever, the highest of the last `patience` steps (as the levels that no later one exceeds,
at most one for each step), since when the level is below the threshold, the first step, and the latest evaluations.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Iterable, KeysView, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from fastent.entropy import SpectralEntropy, Status
from fastent.sampling import SamplingError

WINDOW = 5
MEDIAN = 3
PATIENCE = 20_000.0


@dataclass(frozen=True)
class EntropyRecord:
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

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values: NaN is None, an infinity the string "inf", statuses are strings."""
        values = dict(vars(self))
        values["status"] = self.status.value
        values["flags"] = [flag.value for flag in self.flags]
        return {key: _plain(value) for key, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EntropyRecord:
        """Record from what `as_dict` gave; ValueError or TypeError for anything else."""
        record = cls(
            **{
                **values,
                **{name: _float(values[name]) for name in _FLOATS},
                "status": Status(values["status"]),
                "flags": tuple(Status(flag) for flag in values["flags"]),
            }
        )
        for name in ("step", "n", "d"):
            checked_count(name, getattr(record, name))
        for name in ("layer", "message"):
            if not isinstance(getattr(record, name), str):
                raise TypeError(f"{name} must be a string; got {getattr(record, name)!r}")
        for name in ("bias", "standard_error"):
            checked_number(name, getattr(record, name))
        return record


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
        while self._peaks and self._peaks[-1][1] <= level:
            self._peaks.pop()
        self._peaks.append((step, level))
        self._forget(step)
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
            self._forget(self._recent[-1][0])
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
            (_number("a step", step), math.nan if h is None else _number("H", h))
            for step, h in state["recent"]
        ]
        usable = [_number("H", h) for h in state["usable"]]
        peaks = [(_number("a step", step), _number("a peak", level)) for step, level in state["peaks"]]
        self.first, self.peak, self.below_since = single["first"], single["peak"], single["below_since"]
        self._recent, self._usable = deque(recent, WINDOW), deque(usable, MEDIAN)
        self._peaks = deque(peaks)

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

    def _forget(self, now: float) -> None:
        while len(self._peaks) > 1 and self._peaks[0][0] < now - self.patience:
            self._peaks.popleft()


@dataclass
class _Layer:
    d: int  # 0 while every evaluation failed
    newest: int
    course: Course
    crossed_at: int | None = None
    records: deque[tuple[int, EntropyRecord]] = field(default_factory=deque)
    """Numbered in the order of arrival over all layers."""


class Recording:
    """The newest records of each layer, with its width, newest step, crossing and course.

    Parameters
    ----------
    size : int
        Records kept of each layer; the oldest go first.
    threshold : float or None
        Normalised entropy to cross.
    """

    def __init__(self, size: int, threshold: float | None) -> None:
        self.threshold = threshold
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
            layer = _Layer(record.d, record.step, Course(self.threshold), records=deque(maxlen=self._size))
            self._layers[record.layer] = layer
        layer.d, layer.newest = layer.d or record.d, record.step
        layer.course.add(*_evaluation(record))
        self._note_crossing(layer, record)
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
                "crossed_at": layer.crossed_at,
                **layer.course.state_dict(),
            }
            for name, layer in self._layers.items()
        )
        course = Course(self.threshold).state_dict()
        return {
            "threshold": self.threshold,
            "layers": columns(("name", "d", "newest", "crossed_at", *course), layers),
            "history": columns(_RECORD, (record.as_dict() for record in self.records)),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace everything kept, or nothing if it cannot be read.

        Under another threshold, crossings are found again in the saved records. Versions 1 and 2 had a dictionary for
        each layer and record; version 1 had no courses, which come from its records.
        """
        history, saved = state["history"], state["layers"]
        if isinstance(history, Mapping):
            history = rows_of(history)
            saved = {_name(row["name"]): {**row, "course": row} for row in rows_of(saved)}
        records = [EntropyRecord.from_dict(values) for values in history]
        same_threshold = checked_number("threshold", state["threshold"]) == self.threshold
        kept: dict[str, list[tuple[int, EntropyRecord]]] = {name: [] for name in saved}
        for number, record in enumerate(records):
            kept[record.layer].append((number, record))
        layers: dict[str, _Layer] = {}
        for name, values in saved.items():
            own = kept[name]
            course = Course(self.threshold)
            layer = _Layer(
                checked_count("d", values["d"]),
                checked_count("newest", values["newest"]),
                course,
                None if values["crossed_at"] is None else checked_count("crossed_at", values["crossed_at"]),
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
            layers[name] = layer
        self._layers, self._expected, self._count = layers, {}, len(records)
        self._ordered = None

    def become(self, other: Recording) -> None:
        """Keep what `other` keeps, and nothing else."""
        self._layers, self._expected, self._count = other._layers, other._expected, other._count
        self._ordered = None

    def with_records(self, records: Iterable[EntropyRecord]) -> Recording:
        """Make one that keeps `records` too; this one stays as it is."""
        other = self.empty()
        other._layers = {
            name: replace(layer, course=copy.deepcopy(layer.course), records=layer.records.copy())
            for name, layer in self._layers.items()
        }
        other._count = self._count
        for record in records:
            other.add(record)
        return other

    def empty(self) -> Recording:
        """Make one of the same size and threshold."""
        return Recording(self._size, self.threshold)

    def _known(self, layer: str) -> tuple[int, int] | None:
        recorded = self._layers.get(layer)
        return self._expected.get(layer) or (None if recorded is None else (recorded.d, recorded.newest))

    def _note_crossing(self, layer: _Layer, record: EntropyRecord) -> None:
        if self.threshold is None or layer.crossed_at is not None or not record.status.usable:
            return
        if record.normalized < self.threshold:
            layer.crossed_at = record.step


def _evaluation(record: EntropyRecord) -> tuple[int, float]:
    return record.step, record.normalized if record.status.usable else math.nan


_RECORD = tuple(field.name for field in fields(EntropyRecord))
_FLOATS = ("normalized", "entropy", "effective_rank", "participation_ratio", "total_variance", "ceiling")


def _plain(value: Any) -> Any:
    # Python's json writes NaN and Infinity, which no other reader of JSON accepts.
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def _float(value: float | str | None) -> float:
    return math.nan if value is None else float(value)


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
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name} must be an integer, 0 or more; got {value!r}")
    return value


def checked_number(name: str, value: Any) -> float | None:
    """Give a saved number or None, or raise ValueError."""
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    raise ValueError(f"{name} must be a number or null; got {value!r}")


def _name(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a layer's name must be a string; got {value!r}")
    return value


def _number(name: str, value: Any) -> float:
    number = checked_number(name, value)
    if number is None:
        raise ValueError(f"{name} must be a number; got null")
    return number
