"""What a monitor keeps: one record for each layer and step, and where each layer crossed the threshold.

The eigenvalues stay out: thousands of records must fit a checkpoint. Everything becomes plain JSON values and
comes back without losing a bit. A crossing is the first step whose record is usable and below the threshold;
it is remembered when its record has gone from the bounded list.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastent.sampling import SamplingError
from fastent.spectrum import SpectralEntropy, Status


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
        As in `fastent.SpectralEntropy`.
    status : Status
        What to distrust; crossings, stopping and forecasts use only a `usable` one.
    flags : tuple of Status
        All that apply; `status` is the worst of them.
    message : str
        The flags in sentences; empty when all is well.
    n, d : int
        Samples and features.
    bias, standard_error : float or None
        Sampling errors of `normalized` as in `fastent.SamplingError`; None where they were not asked for.

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

    @classmethod
    def of(
        cls, step: int, layer: str, result: SpectralEntropy, sampling: SamplingError | None = None
    ) -> EntropyRecord:
        """Record of an unbatched result, with its sampling errors where they are known."""
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
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values: NaN is None, an infinity the string "inf", statuses are strings."""
        values = dataclasses.asdict(self)
        values["status"] = self.status.value
        values["flags"] = [flag.value for flag in self.flags]
        return {key: _plain(value) for key, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EntropyRecord:
        """Record from what `as_dict` gave."""
        return cls(
            **{
                **values,
                **{name: _number(values[name]) for name in _FLOATS},
                "status": Status(values["status"]),
                "flags": tuple(Status(flag) for flag in values["flags"]),
            }
        )


@dataclass
class _Layer:
    d: int
    newest: int
    crossed_at: int | None = None


class Recording:
    """The newest records of a run, and for each layer its width, newest step and crossing.

    Parameters
    ----------
    size : int
        Records kept; the oldest go first.
    threshold : float or None
        Normalised entropy to cross.
    """

    def __init__(self, size: int, threshold: float | None) -> None:
        self.records: deque[EntropyRecord] = deque(maxlen=size)
        self.threshold = threshold
        self._layers: dict[str, _Layer] = {}
        self._expected: dict[str, _Layer] = {}

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

    def check(self, step: int, layer: str, d: int | None = None) -> None:
        """Refuse a second record of `layer` at `step`, or another width than before."""
        known = self._expected.get(layer) or self._layers.get(layer)
        if known is None:
            return
        if known.newest == step:
            raise ValueError(f"layer {layer!r} already has a record at step {step}")
        if d is not None and d != known.d:
            raise ValueError(
                f"layer {layer!r} had d = {known.d} and now has d = {d}: entropies of different widths do "
                "not compare; record it under another name"
            )

    def expect(self, step: int, layer: str, d: int) -> None:
        """Let `check` count a record that is on its way."""
        self._expected[layer] = _Layer(d, step)

    def add(self, record: EntropyRecord) -> None:
        """Keep a record that `check` let through."""
        layer = self._layers.setdefault(record.layer, _Layer(record.d, record.step))
        layer.newest = record.step
        self._note_crossing(record)
        self.records.append(record)

    def state_dict(self) -> dict[str, Any]:
        """State as plain JSON values."""
        return {
            "threshold": self.threshold,
            "layers": {name: dataclasses.asdict(layer) for name, layer in self._layers.items()},
            "history": [record.as_dict() for record in self.records],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace everything kept; under another threshold, find the crossings again in the saved records."""
        records = [EntropyRecord.from_dict(values) for values in state["history"]]
        layers = {name: _Layer(**values) for name, values in state["layers"].items()}
        same_threshold = state["threshold"] == self.threshold
        self.records, self._layers = deque(records, maxlen=self.records.maxlen), layers
        self._expected = {}
        if not same_threshold:
            for layer in layers.values():
                layer.crossed_at = None
            for record in records:
                self._note_crossing(record)

    def _note_crossing(self, record: EntropyRecord) -> None:
        layer = self._layers[record.layer]
        if self.threshold is None or layer.crossed_at is not None or not record.status.usable:
            return
        if record.normalized < self.threshold:
            layer.crossed_at = record.step


_FLOATS = ("normalized", "entropy", "effective_rank", "participation_ratio", "total_variance", "ceiling")


def _plain(value: Any) -> Any:
    # Python's json writes NaN and Infinity, which no other reader of JSON accepts.
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def _number(value: float | str | None) -> float:
    return math.nan if value is None else float(value)
