"""Spectral entropy of a network's layers while it trains.

`SpectralEntropyMonitor` runs a fixed probe through the model every so many steps, or takes activations that
are at hand, and keeps one `EntropyRecord` for each layer and step. Training with a monitor is bit-identical
to training without one (`fastent.guard`). Bad activations are recorded with their status: never a silent number,
and never the end of training unless asked for.

Every evaluation runs in line, in the calling thread. No threshold is built in: the entropy at grokking
differs by model and must be calibrated from runs.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fastent.activations import Tokens
from fastent.diagnosis import Diagnosis, diagnose
from fastent.entropy import SpectralEntropy, Status, spectral_entropy
from fastent.forecast import WINDOW as FORECAST_WINDOW
from fastent.forecast import Forecast, predict_grok_time
from fastent.history import History
from fastent.power_law import PowerLaw
from fastent.probing import (
    Inputs,
    LayerFunction,
    Layers,
    Probe,
    find_layers,
    is_sharded,
    plain_module,
    reduce_activations,
)
from fastent.records import EntropyRecord, Recording
from fastent.sampling import SamplingError, sampling_error
from fastent.stopping import StopAfterCrossing

OnNonfinite = Literal["record", "raise"]

STATE_VERSION = 1

_Evaluated = tuple[SpectralEntropy, SamplingError | None]


class SpectralEntropyMonitor:
    """Records the spectral entropy of layers during training, and says when it has fallen.

    Parameters
    ----------
    model : nn.Module, optional
        The model; also a compiled, DDP or FSDP2-wrapped one. `model`, `probe` and `layers` go together;
        without them the monitor only takes activations through `observe`.
    probe : Tensor, tuple of arguments, or dict of keyword arguments, optional
        The fixed input, with at least two samples along dimension 0, on the model's device. Kept by
        reference; changing it later is an error.
    layers : str, iterable of str, or callable, optional
        A name of ``model.named_modules()``, several, or `fnmatch` patterns ("blocks.*.mlp"; ``*`` crosses
        dots; "" is the model itself). A layer's activation is its module's output; of a tuple, list or dict
        the first tensor. Or a function of (model, probe) that returns activations, or a dict of them by name,
        for anything else, such as the input of a layer (last example).
    every : int
        `step` evaluates at multiples of this.
    threshold : float, optional
        Normalised entropy, in (0, 1], that counts as collapse, for each layer.
    law : PowerLaw, optional
        What `predict_grok_time` forecasts with. Its H* is the threshold where none is given.
    stopping : callable, optional
        Policy for `should_stop`: a function of the monitor, such as `fastent.StopAfterCrossing`.
    tokens : {"flatten", "last", "mean", "skip_first"}, optional
        What to make of (samples, tokens, d) activations; needed for those, ignored for (n, d).
    standard_error : bool
        Record the sampling errors of H too, `fastent.sampling_error` for infinitely many samples. An evaluation
        then costs some 12 times as much. Tokens of one sample are not independent: with "flatten" or
        "skip_first" the error comes out too small.
    history_size : int
        Records kept; the oldest go first. `on_record` sees all.
    on_nonfinite : {"record", "raise"}
        Whether NaN or Inf in activations is recorded and training goes on, or raises once recorded.
    on_record : callable, optional
        Gets every record, for a logger. If it raises, the monitor warns once and goes on.

    Raises
    ------
    TypeError, ValueError
        For an unusable probe, a layer that the model does not have (close names are given) or a bad argument.

    Warns
    -----
    UserWarning
        At a layer's first record, if `threshold` is above the most that so few samples can reach.

    Notes
    -----
    Only records with a `usable` status count for crossings. Under FSDP2 or tensor parallelism every rank must
    call `step`, since the forward pass needs them all, and rank 0 alone records: send its answer of
    `should_stop` to the others. Under DDP each rank that calls `step` records for itself.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    >>> monitor = SpectralEntropyMonitor(model, torch.randn(64, 4), layers="1", every=100)
    >>> for step in range(201):
    ...     records = monitor.step(step)
    >>> [(record.step, record.layer, record.status.value) for record in monitor.history]
    [(0, '1', 'ok'), (100, '1', 'ok'), (200, '1', 'ok')]

    Activations at hand, without a model:

    >>> monitor = SpectralEntropyMonitor(threshold=0.6)
    >>> h = torch.outer(torch.arange(8.0), torch.ones(3))
    >>> monitor.observe(0, h, layer="encoder")[0].normalized < 1e-9, monitor.crossed
    (True, True)

    The input of a layer:

    >>> def head_input(model, probe):
    ...     taken = []
    ...     handle = model[2].register_forward_pre_hook(lambda module, args: taken.append(args[0]))
    ...     try:
    ...         model(probe)
    ...     finally:
    ...         handle.remove()
    ...     return taken[0]
    >>> SpectralEntropyMonitor(model, torch.randn(64, 4), head_input).step(0)[0].layer
    'head_input'
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        probe: Inputs | None = None,
        layers: Layers | None = None,
        *,
        every: int = 200,
        threshold: float | None = None,
        law: PowerLaw | None = None,
        stopping: Callable[[SpectralEntropyMonitor], bool] | None = None,
        tokens: Tokens | None = None,
        standard_error: bool = False,
        history_size: int = 10_000,
        on_nonfinite: OnNonfinite = "record",
        on_record: Callable[[EntropyRecord], object] | None = None,
    ) -> None:
        if threshold is None and law is not None:
            threshold = law.h_star
        for name, value in (("every", every), ("history_size", history_size)):
            if operator.index(value) < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        if threshold is not None and not 0 < threshold <= 1:
            raise ValueError(f"threshold is a normalised entropy, in (0, 1]; got {threshold}")
        if isinstance(stopping, StopAfterCrossing) and threshold is None:
            raise ValueError("StopAfterCrossing needs a threshold to cross")
        _check_choice("tokens", tokens, (None, *get_args(Tokens)))
        _check_choice("on_nonfinite", on_nonfinite, get_args(OnNonfinite))
        self._every, self._threshold, self._stopping = operator.index(every), threshold, stopping
        self._law = law
        self._tokens, self._on_nonfinite, self._on_record = tokens, on_nonfinite, on_record
        self._standard_error = standard_error

        self._model: nn.Module | None = None
        self._probe: Probe | None = None
        self._layers: dict[str, str] | LayerFunction = {}
        if model is not None and probe is not None and layers is not None:
            self._watch(model, probe, layers)
        elif not (model is None and probe is None and layers is None):
            given = {"model": model, "probe": probe, "layers": layers}
            missing = ", ".join(name for name, value in given.items() if value is None)
            raise ValueError(f"model, probe and layers go together; missing: {missing}")

        self._recording = Recording(operator.index(history_size), threshold)
        self._devices: dict[str, torch.device] = {}
        self._last_step: int | None = None
        self._last_probed: int | None = None
        self._closed = False
        self._logger_failed = False

    def step(self, step: int) -> list[EntropyRecord]:
        """Evaluate the probe if `step` is due; call it once in every training step.

        A step seen again (gradient accumulation) is not evaluated again.

        Parameters
        ----------
        step : int
            0 or more, never going back except by `load_state_dict`.

        Returns
        -------
        list of EntropyRecord
            What arrived during this call, one record for each layer; empty when nothing did.

        Raises
        ------
        ValueError
            If `step` goes back, the probe changed or moved, a layer's width changed or its device moved.
        RuntimeError
            If there is no model, the monitor is closed, or a layer ran not exactly once.
        FloatingPointError
            For NaN or Inf in activations with ``on_nonfinite="raise"``.
        """
        step = self._advance(step)
        if self._model is None or self._probe is None:
            raise RuntimeError("step needs a model, a probe and layers; without them call observe")
        if step % self._every or step == self._last_probed:
            return []
        self._probe.check()
        module = plain_module(self._model)
        if _rank() and is_sharded(module):  # its part of the forward pass, for rank 0 to record
            reduce_activations(module, self._probe, self._layers, lambda layer, h: None)
            results = {}
        else:
            results = reduce_activations(module, self._probe, self._layers, self._evaluate)
        records = self._arrive(step, results)
        self._last_probed = step
        return self._raise_nonfinite(records)

    def observe(self, step: int, h: Tensor | SpectralEntropy, *, layer: str) -> list[EntropyRecord]:
        """Record activations that are at hand, whether `step` is a multiple of `every` or not.

        Parameters
        ----------
        step : int
            0 or more, never going back.
        h : Tensor, shape (n, d), or (n, tokens, d) if the monitor has `tokens`; or SpectralEntropy
            Activations; they are detached and not kept. Or their entropy, unbatched, where it was computed
            for many layers or seeds in one call (`SpectralEntropy.unbind`).
        layer : str
            The name to record.

        Returns
        -------
        list of EntropyRecord
            What arrived during this call; evaluated in line, the one record of `h`.

        Raises
        ------
        ValueError
            If `step` goes back, `layer` has a record at `step`, its width changed or its device moved, or for
            unusable activations (`fastent.spectral_entropy`).
        RuntimeError
            If the monitor is closed.
        FloatingPointError
            For NaN or Inf in `h` with ``on_nonfinite="raise"``.
        """
        step = self._advance(step)
        self._recording.check(step, layer)
        if isinstance(h, SpectralEntropy):
            if not isinstance(h.normalized, float):
                raise ValueError("observe takes one entropy at a time; got a batch: use its unbind()")
            evaluated: _Evaluated = (h, None)
        else:
            evaluated = self._evaluate(layer, h)
        return self._raise_nonfinite(self._arrive(step, {layer: evaluated}))

    @property
    def history(self) -> list[EntropyRecord]:
        """The newest `history_size` records, oldest first."""
        return list(self._recording.records)

    @property
    def last_step(self) -> int | None:
        """The newest step that the monitor was told of."""
        return self._last_step

    @property
    def crossings(self) -> dict[str, int]:
        """First step with a usable record below the threshold, by layer; a layer without one is absent."""
        return self._recording.crossings

    @property
    def crossed(self) -> bool:
        """Whether every watched layer has been below the threshold at some step; False without one."""
        watched = self._recording.layers
        if not callable(self._layers):
            watched |= self._layers.keys()
        return bool(watched) and watched <= self.crossings.keys()

    def should_stop(self) -> bool:
        """Answer of the stopping policy; False if none was given."""
        return self._stopping is not None and self._stopping(self)

    def predict_grok_time(self, *, layer: str | None = None) -> Forecast:
        """Forecast when the run will grok, by the monitor's law.

        Parameters
        ----------
        layer : str, optional
            Needed where more than one is recorded.

        Returns
        -------
        Forecast
            Always one; see `fastent.predict_grok_time` for when its `step` is None.

        Raises
        ------
        ValueError
            If `layer` is needed or has no record.
        """
        return predict_grok_time(History.from_records(self._of(layer)[-FORECAST_WINDOW:]), self._law)

    def diagnose(self, *, layer: str | None = None, test_accuracy: float | None = None) -> Diagnosis:
        """Find the run's row in the paper's diagnostic guide.

        Parameters
        ----------
        layer : str, optional
            Needed where more than one is recorded.
        test_accuracy : float, optional
            The latest, in [0, 1]. Without it a collapse cannot be told from grokking.

        Returns
        -------
        Diagnosis
            For the monitor's threshold; other tolerances are arguments of `fastent.diagnose`.

        Raises
        ------
        ValueError
            If `layer` is needed or has no record, or the accuracy lies outside [0, 1].
        """
        history = History.from_records(self._of(layer))
        return diagnose(history, threshold=self._threshold, test_accuracy=test_accuracy)

    def state_dict(self) -> dict[str, Any]:
        """State as plain JSON values; float64 survives a round trip through JSON bit for bit."""
        return {
            "version": STATE_VERSION,
            "probe": self._probe.digest if self._probe else None,
            "last_step": self._last_step,
            "last_probed": self._last_probed,
            **self._recording.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to a saved state; records made since are gone, so a replayed step is not there twice.

        With another threshold than the saved one, crossings are found again in the saved history.

        Raises
        ------
        ValueError
            If the state is of another version or probe, or the probe changed. Nothing is loaded then.
        """
        if state["version"] != STATE_VERSION:
            raise ValueError(f"the state has version {state['version']}; this release reads {STATE_VERSION}")
        if self._probe is not None:
            self._probe.check(content=True)
        digest = self._probe.digest if self._probe else None
        if state["probe"] != digest:
            old, new = (f"probe {d[:12]}" if d else "no probe" for d in (state["probe"], digest))
            raise ValueError(f"the state was recorded with {old}, this monitor has {new}")
        last_step, last_probed = state["last_step"], state["last_probed"]
        self._recording.load_state_dict(state)
        self._last_step, self._last_probed, self._devices = last_step, last_probed, {}

    def flush(self) -> None:
        """Wait until every evaluation has arrived; evaluated in line, they have."""

    def close(self) -> None:
        """Flush, and take no more steps; the history stays. May be called again."""
        self.flush()
        self._closed = True

    def __enter__(self) -> SpectralEntropyMonitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _watch(self, model: nn.Module, probe: Inputs, layers: Layers) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module; got {type(model).__name__}")
        if any(nn.parameter.is_lazy(p) for p in model.parameters()):
            raise ValueError("the model has lazy parameters: run one batch through it first")
        if isinstance(layers, nn.Module):
            raise TypeError(f"layers takes names of model.named_modules(); got a {type(layers).__name__}")
        self._model = model
        self._probe = Probe(probe, rows_from_tokens=self._tokens in ("flatten", "skip_first"))
        if callable(layers):
            self._layers = layers
        else:
            self._layers = find_layers(plain_module(model), layers)

    def _of(self, layer: str | None) -> list[EntropyRecord]:
        """Return the records of one layer, oldest first; of the only one where `layer` is None."""
        recorded = sorted(self._recording.layers)
        if layer is None and len(recorded) > 1:
            raise ValueError(f"several layers are recorded: name one of {recorded} as layer")
        if layer is not None and layer not in recorded:
            raise ValueError(f"layer {layer!r} has no record; recorded so far: {recorded}")
        return [record for record in self._recording.records if layer in (None, record.layer)]

    def _advance(self, step: int) -> int:
        if self._closed:
            raise RuntimeError("the monitor is closed")
        step = operator.index(step)
        if step < 0:
            raise ValueError(f"steps start at 0; got {step}")
        if self._last_step is not None and step < self._last_step:
            raise ValueError(
                f"steps do not go back: got {step} after {self._last_step}; after a resume call "
                "load_state_dict, for another run make a new monitor"
            )
        self._last_step = step
        return step

    def _evaluate(self, layer: str, h: Tensor) -> _Evaluated:
        try:
            if isinstance(h, Tensor):
                old = self._devices.get(layer, h.device)
                if old != h.device:
                    raise ValueError(
                        f"the activations moved from {old} to {h.device}: move the model back, or load the "
                        "state_dict() of this monitor into a new one"
                    )
            tokens = self._tokens if isinstance(h, Tensor) and h.ndim == 3 else None
            result = spectral_entropy(h, tokens=tokens)
            jackknife = self._standard_error and result.n >= 3
            sampling = sampling_error(h, tokens=tokens) if jackknife else None
        except Exception as error:
            error.add_note(f"in the activations of layer {layer!r}")
            raise
        self._devices[layer] = h.device
        return result, sampling

    def _arrive(self, step: int, results: Mapping[str, _Evaluated]) -> list[EntropyRecord]:
        for layer, (result, _) in results.items():
            self._recording.check(step, layer, result.d)
        records = [EntropyRecord.of(step, layer, *evaluated) for layer, evaluated in results.items()]
        for record in records:
            if record.layer not in self._recording.layers:
                self._warn_of_ceiling(record)
            self._recording.add(record)
            self._log(record)
        return records

    def _raise_nonfinite(self, records: list[EntropyRecord]) -> list[EntropyRecord]:
        for record in records:
            if record.status is Status.NONFINITE and self._on_nonfinite == "raise":
                raise FloatingPointError(f"layer {record.layer!r} at step {record.step}: {record.message}")
        return records

    def _warn_of_ceiling(self, record: EntropyRecord) -> None:
        if self._threshold is not None and self._threshold > record.ceiling:
            warnings.warn(
                f"the threshold {self._threshold} is above {record.ceiling:.4f}, the most that {record.n} "
                f"samples of layer {record.layer!r} with d = {record.d} can reach: every record is below it",
                UserWarning,
                stacklevel=4,
            )

    def _log(self, record: EntropyRecord) -> None:
        if self._on_record is None:
            return
        try:
            self._on_record(record)
        except Exception as error:  # whatever a logger raises must not end training
            if not self._logger_failed:
                self._logger_failed = True
                warnings.warn(
                    f"on_record failed at step {record.step}: {error!r}; training and the monitor go on, "
                    "without further warnings",
                    RuntimeWarning,
                    stacklevel=4,
                )


def _check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")


def _rank() -> int:
    distributed = torch.distributed
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
