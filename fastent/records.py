"""What a monitor keeps: one record for each layer and step, and where each layer crossed the threshold.

The eigenvalues stay out: thousands of records must fit a checkpoint. Everything becomes plain JSON values and
comes back without losing a bit. A crossing is the first step whose record is usable and below the threshold. It
is remembered when its record has gone from the bounded list of its layer, as is what a diagnosis needs
(`fastent.forecast.course`): neither a long run nor many layers change them.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastent.entropy import SpectralEntropy, Status
from fastent.forecast.course import Course, checked_number
from fastent.sampling import SamplingError


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
        As in `fastent.SpectralEntropy`; all NaN for `too_few_rows` and `not_run`.
    status : Status
        What to distrust; crossings, stopping and forecasts use only a `usable` one.
    flags : tuple of Status
        All that apply; `status` is the worst of them.
    message : str
        The flags in sentences; empty when all is well.
    n, d : int
        Samples (rows; 0 of a layer that did not run) and features.
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
            normalized=float(result.normalized),
            entropy=float(result.entropy),
            effective_rank=float(result.effective_rank),
            participation_ratio=float(result.participation_ratio),
            total_variance=float(result.total_variance),
            ceiling=result.ceiling,
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
                **{name: _number(values[name]) for name in _FLOATS},
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


@dataclass
class _Layer:
    d: int
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
    def layers(self) -> set[str]:
        """Layers that have been recorded."""
        return set(self._layers)

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
        if d is not None and d != width:
            raise ValueError(
                f"layer {layer!r} had d = {width} and now has d = {d}: entropies of different widths do "
                "not compare; record it under another name"
            )

    def newest(self, layer: str) -> int | None:
        """Return the step of the newest record of `layer`, one on its way included."""
        known = self._known(layer)
        return None if known is None else known[1]

    def width(self, layer: str) -> int | None:
        """Return the features of `layer`, if it has been recorded or will be."""
        known = self._known(layer)
        return None if known is None else known[0]

    def expect(self, step: int, layer: str, d: int) -> None:
        """Let `check` count a record that is on its way."""
        self._expected[layer] = d, step

    def add(self, record: EntropyRecord) -> None:
        """Keep a record that `check` let through."""
        layer = self._layers.get(record.layer)
        if layer is None:
            layer = _Layer(record.d, record.step, Course(self.threshold), records=deque(maxlen=self._size))
            self._layers[record.layer] = layer
        layer.newest = record.step
        layer.course.add(*_evaluation(record))
        self._note_crossing(layer, record)
        layer.records.append((self._count, record))
        self._count += 1
        self._ordered = None

    def state_dict(self) -> dict[str, Any]:
        """State as plain JSON values."""
        return {
            "threshold": self.threshold,
            "layers": {
                name: {
                    "d": layer.d,
                    "newest": layer.newest,
                    "crossed_at": layer.crossed_at,
                    "course": layer.course.state_dict(),
                }
                for name, layer in self._layers.items()
            },
            "history": [record.as_dict() for record in self.records],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace everything kept, or nothing if it cannot be read.

        Under another threshold, crossings are found again in the saved records. A state without courses (version 1)
        gets them from its records.
        """
        records = [EntropyRecord.from_dict(values) for values in state["history"]]
        same_threshold = checked_number("threshold", state["threshold"]) == self.threshold
        kept: dict[str, list[tuple[int, EntropyRecord]]] = {name: [] for name in state["layers"]}
        for number, record in enumerate(records):
            kept[record.layer].append((number, record))
        layers: dict[str, _Layer] = {}
        for name, values in state["layers"].items():
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


_FLOATS = ("normalized", "entropy", "effective_rank", "participation_ratio", "total_variance", "ceiling")


def _plain(value: Any) -> Any:
    # Python's json writes NaN and Infinity, which no other reader of JSON accepts.
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def _number(value: float | str | None) -> float:
    return math.nan if value is None else float(value)


def checked_count(name: str, value: Any) -> int:
    """Give a saved count or step, or raise ValueError."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name} must be an integer, 0 or more; got {value!r}")
    return value
