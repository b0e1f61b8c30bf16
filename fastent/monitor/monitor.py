"""Spectral entropy of a network's layers while it trains.

`SpectralEntropyMonitor` runs a fixed probe through the model every so many steps, or takes activations that are at
hand, and keeps one `EntropyRecord` for each layer and step. Training with a monitor is bit-identical to training
without one (`fastent.monitor.isolation`). Bad activations are recorded with their status: never a silent number, and
never the end of training unless asked for. What is no mistake is a status too: a layer that ran before and is idle now,
as a mixture's expert without tokens (`not_run`), or gave fewer than two rows (`too_few_rows`).

On CUDA the training thread only queues the covariances, and the rest is done beside it; on the CPU a worker has large
layers where there are cores to spare (`fastent.monitor.deferred`). A record then arrives a little later. No threshold
is built in: the entropy at grokking differs by model and must be calibrated from runs.
"""

from __future__ import annotations

import difflib
import math
import operator
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, NoReturn, Protocol, SupportsFloat, SupportsIndex, get_args

import torch
from torch import Tensor, nn

from fastent.activations import Positions, Tokens
from fastent.display import Shown, Table
from fastent.entropy import SpectralEntropy, Status
from fastent.forecast.diagnosis import Diagnosis, diagnosis_of
from fastent.forecast.history import History
from fastent.forecast.power_law import PowerLaw
from fastent.forecast.predict import Forecast, predict_grok_time
from fastent.moments import add_up
from fastent.monitor.batch import BatchEvaluator, WatchedBatch
from fastent.monitor.cost import Cost
from fastent.monitor.deferred import DeferredEntropy, Evaluated, FailedEvaluation, OnFull, in_line
from fastent.monitor.probe import Axes, Evaluator, Inputs, Layers, OnError, SamplesAxis, Watched
from fastent.monitor.ranks import count_ranks
from fastent.process import Interrupts, at_exit, interrupts_held, uncompiled, warn_user
from fastent.records import (
    Collapse,
    Course,
    Drawing,
    EntropyRecord,
    Recording,
    checked_count,
    checked_step,
    columns,
    matches_pattern,
    records_frame,
    rows_of,
)


class Monitored(Protocol):
    """What a policy may ask a monitor."""

    @property
    def crossed(self) -> bool:
        """Whether every watched layer has been below the threshold."""

    @property
    def crossings(self) -> dict[str, int]:
        """First step below the threshold by layer."""

    @property
    def last_step(self) -> int | None:
        """The newest step that the monitor was told of."""


@dataclass(frozen=True)
class StopAfterCrossing:
    """Stop once `steps` steps have passed since every watched layer's entropy went below the threshold.

    Parameters
    ----------
    steps : int
        0 stops at the crossing itself.

    Raises
    ------
    TypeError, ValueError
        If `steps` is no whole number, or negative.
    """

    steps: int = 1000

    def __post_init__(self) -> None:
        if not isinstance(self.steps, SupportsIndex):
            raise TypeError(f"steps must be a whole number; got {self.steps!r}")
        if operator.index(self.steps) < 0:
            raise ValueError(f"steps must not be negative; got {self.steps}")

    def __call__(self, monitor: Monitored) -> bool:
        """Whether it is time."""
        if not monitor.crossed or monitor.last_step is None:
            return False
        return monitor.last_step - max(monitor.crossings.values()) >= self.steps


OnNonfinite = Literal["record", "raise"]
OnRecord = Callable[[EntropyRecord], object]

# Records that wait for somebody to `take` them: those who only observe and read the history may never do so.
MOST_WAITING = 10_000


class Arrivals:
    """Takes results as they arrive, always in the calling thread.

    Parameters
    ----------
    evaluations : DeferredEntropy
        Where results come from.
    recording : Recording
        Where records go.
    on_record : callable or None
        Gets every record. If it raises, that is warned of once.
    on_collapse : callable or None
        Gets the record at which a layer collapsed, after `on_record` has. If it raises, that is warned of once.
    on_nonfinite : {"record", "raise"}
        Whether `collect` raises FloatingPointError once such a record has been kept.
    on_error : {"raise", "record"}
        Whether `collect` raises the error of an evaluation that failed in the worker.
    """

    def __init__(
        self,
        evaluations: DeferredEntropy,
        recording: Recording,
        on_record: OnRecord | None,
        on_collapse: OnRecord | None,
        on_nonfinite: OnNonfinite,
        on_error: OnError,
    ) -> None:
        self._evaluations, self._recording = evaluations, recording
        self._on_record, self._on_collapse = on_record, on_collapse
        self._on_nonfinite, self._on_error = on_nonfinite, on_error
        self._waiting: deque[EntropyRecord] = deque(maxlen=MOST_WAITING)
        self._ceiling_known: set[str] = set()
        self._to_raise: EntropyRecord | None = None
        self._warned_of_failure = False
        self._failed: set[str] = set()

    def collect(self) -> None:
        """Record what is there. Raises for an evaluation that failed, and for NaN or Inf, if asked to."""
        if self._evaluations.pending:
            with interrupts_held() as interrupts:  # nothing is taken out and not recorded
                for step, results in self._arrived():
                    self._record(step, results, interrupts)
        record, self._to_raise = self._to_raise, None
        if record is not None:
            raise FloatingPointError(f"layer {record.layer!r} at step {record.step}: {record.message}")

    def collect_all(self) -> None:
        """Record what is there, beyond the first failure too, and raise that one, with the others as notes."""
        self._tell_of_collapses()  # of a state that was loaded
        failures: list[Exception] = []
        pending = None
        while pending != self._evaluations.pending:
            pending = self._evaluations.pending
            try:
                self.collect()
            except (RuntimeError, FloatingPointError) as error:
                failures.append(error)
        if failures:
            first, *others = failures
            for other in others:
                first.add_note(f"and: {other}")
            raise first

    def take(self) -> list[EntropyRecord]:
        """Hand out the records that have arrived since the last time, at most the newest `MOST_WAITING`."""
        records = list(self._waiting)
        self._waiting.clear()
        return records

    def to_come(self) -> list[EntropyRecord]:
        """Give the records of what is there and was not collected; it stays there."""
        return [
            record
            for step, results, failed in self._evaluations.to_come()
            if not failed or self._on_error == "record"
            for record in _records(step, results)
        ]

    def hand_out(self, records: Iterable[EntropyRecord]) -> None:
        """Have `take` give records that are kept and logged already."""
        self._waiting.extend(records)

    def forget(self) -> None:
        """Wait for what is under way, and forget it and all that was not handed out."""
        self._evaluations.discard()
        self._waiting.clear()
        self._to_raise = None

    def _arrived(self) -> Iterator[tuple[int, Mapping[str, Evaluated]]]:
        while True:
            try:
                yield from self._evaluations.arrived()
            except FailedEvaluation as error:
                if self._on_error == "raise":
                    raise
                yield error.step, error.results
            else:
                return

    def _record(self, step: int, results: Mapping[str, Evaluated], interrupts: Interrupts) -> None:
        with self._evaluations.clock.part("recording"):
            self._keep(step, results, interrupts)

    def _keep(self, step: int, results: Mapping[str, Evaluated], interrupts: Interrupts) -> None:
        records = _records(step, results)
        for record in records:
            self._recording.add(record)
            self._waiting.append(record)
            if record.status is Status.NONFINITE and self._on_nonfinite == "raise":
                self._to_raise = self._to_raise or record
        with interrupts.second_at_once():
            for record in records:  # kept by now, in case a warning is made an error
                self._call("on_record", self._on_record, record)
            self._tell_of_collapses()
            for record in records:
                self._warn_of_ceiling(record)
                self._warn_of_failure(record)

    def _warn_of_failure(self, record: EntropyRecord) -> None:
        if record.status is Status.FAILED and not self._warned_of_failure:
            self._warned_of_failure = True
            warn_user(
                f"step {record.step} is recorded as failed, and training goes on: {record.message}. Further ones are "
                "recorded without a warning",
                RuntimeWarning,
            )

    def _warn_of_ceiling(self, record: EntropyRecord) -> None:
        if record.layer in self._ceiling_known or math.isnan(record.ceiling):  # nothing was measured
            return
        self._ceiling_known.add(record.layer)
        threshold = self._recording.threshold(record.layer)
        if threshold is not None and threshold > record.ceiling:
            warn_user(
                f"the threshold {threshold} is above {record.ceiling:.4f}, the most that {record.n} "
                f"samples of layer {record.layer!r} with d = {record.d} can reach: every record is below it",
                UserWarning,
            )

    def _tell_of_collapses(self) -> None:
        while self._recording.fallen:
            self._call("on_collapse", self._on_collapse, self._recording.fallen.popleft())

    def _call(self, name: str, function: OnRecord | None, record: EntropyRecord) -> None:
        if function is None:
            return
        try:
            function(record)
        except Exception as error:  # whatever a logger raises must not end training
            if name not in self._failed:
                self._failed.add(name)
                warn_user(
                    f"{name} failed at step {record.step}: {error!r}; training and the monitor go on, "
                    "without further warnings",
                    RuntimeWarning,
                )


def _records(step: int, results: Mapping[str, Evaluated]) -> list[EntropyRecord]:
    return [EntropyRecord.of(step, layer, *evaluated) for layer, evaluated in results.items()]


Mode = Literal["deferred", "sync"]

STATE_VERSION = 4
READ_VERSIONS = (1, 2, 3, 4)


class SpectralEntropyMonitor(Shown):
    """Records the spectral entropy of layers during training, and says when it has fallen.

    Parameters
    ----------
    model : nn.Module, optional
        The model; also a compiled, DDP or FSDP2-wrapped one. `model`, `probe` and `layers` go together;
        without them the monitor only takes activations through `observe`.
    probe : Tensor, tuple of arguments, or dict of keyword arguments, or "batch", optional
        The fixed input, with at least two samples along dimension 0, on the model's device. Kept by
        reference; changing it later is an error. "batch": no input and no pass of its own, but what the forward passes
        of training give at due steps, between the call of `step` before and that call (Notes).
    layers : str, iterable of str, or callable, optional
        A name of ``model.named_modules()`` ("" is the model itself), several, or patterns: ``*`` stays within
        one level, ``**`` crosses dots ("blocks.*.mlp", "**.mlp"). What wraps a module (compiled, DDP, FSDP1, PEFT, an
        EMA copy) is not in its name. A ModuleList means its children. A layer's
        activation is its module's output as it leaves it; of a tuple, list or dict the first tensor. ":input" behind
        a name or pattern ("fc:input", "blocks.*:input") is for the first tensor that the module is called with. What is
        named must run at the first evaluation; what only a pattern matched is left out until it runs, with one
        warning. Or a function of (model, probe) that returns activations, or a dict of them by name, measured
        at the moment it returns (example in `fastent.monitor.probe.Watched`). Records come in this order.
    every : int
        `step` evaluates at multiples of this; where the steps it is told of pass over one, at the next of them.
    threshold : float or dict, optional
        Normalised entropy, in (0, 1], to fall below: one for every layer, or a value for each name or pattern, as in
        `layers`: {"head": 0.6, "blocks.*": 0.7}. A name goes before patterns, the first of those before others; a layer
        that none fits has no threshold.
    collapse : Collapse, optional
        Fall of the entropy to look for in each layer, beside or instead of a threshold: it needs no calibrated level.
    law : PowerLaw, optional
        What `predict_grok_time` forecasts with. Its H* is the threshold where none is given.
    stopping : callable, optional
        Policy for `should_stop`: a function of the monitor, such as `fastent.StopAfterCrossing`.
    tokens : {"flatten", "first", "last", "mean", "skip_first"}, optional
        What to make of (samples, tokens, d) activations; needed for those, ignored for (n, d). With "flatten" a layer
        may also give any number of rows (rows, d): tokens of all samples, or those sent to an expert. Without it, fewer
        rows than samples are taken as a part of them.
    positions : {"flatten", "mean"}, optional
        What to make of maps, such as (n, channels, height, width); with `tokens` given, of those with more than three
        axes. See `fastent.spectral_entropy`.
    channel_axis : int, optional
        The axis of such maps that holds the features; goes with `positions`.
    samples_axis : {0, 1}, optional
        Axis of three-dimensional activations that counts samples: 1 where layers, or the probe too, are
        (tokens, samples, d). By default 0, and a torch module with ``batch_first=False`` is an error. An activation
        with another number of samples than the probe is one always; where samples and tokens are equally many,
        exchanged axes cannot be seen.
    mask : str, optional
        Entry of the probe, a key or the name of a parameter of the model's forward pass, that is (n, tokens) and 1 or
        True for real tokens: others are left out where activations are (n, tokens, d) or (n * tokens, d). "~name" where
        0 or False is a real token ("~src_key_padding_mask" of torch, additive masks). By default "attention_mask",
        where the probe has one and the number of tokens fits; records say which mask was used.
    batch_size : int, optional
        Samples of the probe in one pass, so that a large probe fits into memory. The passes' moments are merged exactly
        (`fastent.Moments`, d x d float64 for each layer), and H is that of one pass to about 1e-12, but for the model's
        own roundings, which may be others where a product has fewer rows. Every tensor of the probe with as many
        entries along its first axis as the first tensor has is cut along it; other tensors and plain values are given
        whole. A function as `layers` gets the parts. Each part is a pass of its own, from the same state: where a
        sample's output depends on the others in the pass (batch statistics in use in eval mode too), H does.
    autocast : torch.dtype, optional
        torch.bfloat16 or torch.float16: the probe's pass is made under ``torch.autocast`` of this dtype on the probe's
        device, as training may be. By default under what is on where `step` is called.
    standard_error : bool
        Record the sampling errors of H too, `fastent.sampling_error` for infinitely many samples. An evaluation
        then costs some 12 times as much. Tokens of one sample, or positions of one map, are not independent: with
        "flatten" or "skip_first" the error comes out too small. Not with `batch_size`.
    history_size : int
        Records kept of each layer (about 0.7 kB each); the oldest go first. `on_record` sees all, and crossings,
        diagnosis and forecast do not depend on it.
    on_nonfinite : {"record", "raise"}
        Whether NaN or Inf in activations is recorded and training goes on, or raises once recorded.
    on_error : {"raise", "record"}
        Whether an evaluation that fails, in the model's pass, in forming a covariance or in the worker, raises, or is
        recorded for all its layers with the status `failed` and the error as message: training goes on, after one
        warning. Bad arguments raise in either case, and so does the check at construction.
    on_record : callable, optional
        Gets every record, for a logger, in the thread that calls `step`, `observe`, `flush` or `close`. If it raises,
        the monitor warns once and goes on.
    on_collapse : callable, optional
        Gets the record at which a layer collapses, once for each layer, as `on_record` does and after it. What a loaded
        state knows of and nobody was told of comes with the next record, or at `flush`.
    mode : {"deferred", "sync"}
        "deferred": a worker takes the eigenvalues, and where it is idle on the CPU forms the covariances too, so that
        records arrive a little later, in order, at a later call of `step`, `observe` or `flush`. On the CPU that is for
        large layers with cores to spare, all else arrives at once (`fastent.monitor.deferred.Devices`); the records are
        the same to the bit. "sync": all at once, which on CUDA waits for the device. `standard_error`
        makes every evaluation one in line.
    on_full : {"drop", "block"}
        What happens to an evaluation on CUDA while too many wait (`fastent.monitor.deferred`): dropped, counted and
        warned of once, or waited for.
    across_ranks : bool
        Evaluate the rows of all ranks of the default process group together: each has its own part of the probe, none
        included, or its own batch, and all of them record the entropy of the whole. Each rank makes the monitor alike
        and calls `step` with the same counts; an evaluation is one sum over the ranks (`fastent.monitor.ranks`), for
        which it waits as long as the group does. An error on one rank is one on all. What `observe` takes stays a
        rank's own.
    check : bool
        Pass the probe through the model now, so that a wrong width, dtype, shape or layer raises here and not at the
        first step that is due. It records nothing and leaves no trace in training. False puts it off, for a model
        that is not ready yet (on the meta device, not moved, weights not loaded). Of a sharded model every rank must
        make the monitor.

    Raises
    ------
    TypeError, ValueError
        For an unusable probe, a layer that the model does not have (close names are given) or a bad argument.
    Exception
        What the model raises on its probe, with a note that it was the probe.

    Warns
    -----
    UserWarning
        At a layer's first record, if `threshold` is above the most that so few samples can reach.

    Notes
    -----
    `history`, `crossed` and `should_stop` know what has arrived by the last call of `step`, `observe` or `flush`:
    when a deferred run stops by `should_stop` depends on the clock, unless `flush` is called before it. So flush before
    whatever reads a record: a validation whose end decides on stopping or on a checkpoint, `should_stop`, the end of
    the run; and log each record at its own step (docs/logging.md). A checkpoint (`state_dict`) waits for everything
    asked for so far. Only records with a `usable` status count for crossings.

    With ``probe="batch"`` the rows are those of the training batch: each record is of another sample, in training mode
    (dropout on), by the weights before the step's update. It is noisier than that of a fixed probe, and one threshold
    does not serve both. In return no pass is made, and the model has hooks at due steps and, idle, at the one after.
    All forward passes since the last call count together, as if their rows had come in one batch (gradient
    accumulation); passes in eval mode or without gradients do not, what checkpointing runs again counts once, and a
    layer that is called several times in a pass gives the rows of all calls. The mask is that of each pass. Call `step`
    once after each optimizer step, not after each micro-batch: at the first call with a step it is over, and what
    training passes before it is told of the same step again is in no record, which is warned of once. Where a step that
    was due gave nothing to evaluate, the next one is due: no pass came before it, one failed, or the steps went on in
    another stride than before. A layer that is replaced in the model is followed to its place. Each rank records its
    own batch. Layers in a compiled graph are refused (`fastent.monitor.batch`).

    Under FSDP or tensor parallelism every rank must call `step`, since the forward pass needs them all, and rank 0
    alone records. Under DDP each rank that calls `step` records for itself. In both, ``should_stop(agree=True)`` on
    every rank gives all of them one answer. With `across_ranks` every rank records the same in both. Ranks that hold
    the same rows, by tensor parallelism, count them as often. A state does not tell the probe then: one rank's can be
    loaded on all, and on another number of them. A layer that holds only a part of its activations on each rank is
    gathered where it says how, and refused where it does not (`fastent.monitor.probe`).

    After the first, a pass ends with the last watched layer where that is safe (`fastent.monitor.probe`): what comes
    behind it, a projection onto a vocabulary for instance, is not computed. Forward hooks that the model has fire in
    the probe too, but for those of modules that are not done by then.

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
    >>> monitor.observe(0, h, layer="encoder")
    >>> monitor.flush()[0].normalized < 1e-9, monitor.crossed
    (True, True)
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        probe: Inputs | Literal["batch"] | None = None,
        layers: Layers | None = None,
        *,
        every: int = 200,
        threshold: float | Mapping[str, float] | None = None,
        collapse: Collapse | None = None,
        law: PowerLaw | None = None,
        stopping: Callable[[SpectralEntropyMonitor], bool] | None = None,
        tokens: Tokens | None = None,
        positions: Positions | None = None,
        channel_axis: int | None = None,
        samples_axis: SamplesAxis | None = None,
        mask: str | None = None,
        batch_size: int | None = None,
        autocast: torch.dtype | None = None,
        standard_error: bool = False,
        history_size: int = 10_000,
        on_nonfinite: OnNonfinite = "record",
        on_error: OnError = "raise",
        on_record: OnRecord | None = None,
        on_collapse: OnRecord | None = None,
        mode: Mode = "deferred",
        on_full: OnFull = "drop",
        across_ranks: bool = False,
        check: bool = True,
    ) -> None:
        if not isinstance(law, PowerLaw | None):
            raise TypeError(
                f"law must be a fastent.PowerLaw, as PowerLaw.fit gives it; got {law!r}. A level of the entropy is a "
                "threshold"
            )
        if threshold is None and law is not None:
            threshold = law.h_star
        for name, value in (("every", every), ("history_size", history_size), ("batch_size", batch_size)):
            if not isinstance(value, SupportsIndex) and not (value is None and name == "batch_size"):
                raise TypeError(f"{name} must be a whole number; got {value!r}")
            if value is not None and operator.index(value) < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        if batch_size is not None and standard_error:
            raise ValueError(
                "batch_size keeps moments of the parts, and standard_error needs the activations: leave one of them out"
            )
        if isinstance(threshold, Mapping):
            threshold = {str(layer): value for layer, value in threshold.items()}
        for level in threshold.values() if isinstance(threshold, dict) else [threshold]:
            if not isinstance(level, SupportsFloat | None):
                raise TypeError(
                    f"threshold is a number, or one for each layer such as {{'head': 0.6}}; got {level!r}"
                )
            if level is not None and not 0 < float(level) <= 1:
                raise ValueError(f"threshold is a normalised entropy, in (0, 1]; got {level}")
        if not isinstance(collapse, Collapse | None):
            raise TypeError(f"collapse must be a fastent.Collapse; got {collapse!r}")
        if on_collapse is not None and collapse is None:
            raise ValueError(
                "on_collapse needs to know what a collapse is: give collapse=fastent.Collapse() too"
            )
        if model is not None and collapse is not None and collapse.within < every:
            raise ValueError(
                f"a fall needs two evaluations, and collapse has within={collapse.within} with every={every}: "
                "make within several times every"
            )
        _check_called("stopping", stopping, "the monitor, such as fastent.StopAfterCrossing(1000)")
        _check_called(
            "on_record",
            on_record,
            "a record; fastent.integrations.loggers.log_to makes one that logs to a file",
        )
        _check_called("on_collapse", on_collapse, "a record")
        if isinstance(stopping, StopAfterCrossing) and not threshold:
            raise ValueError("StopAfterCrossing needs a threshold to cross")
        _check_choice("autocast", autocast, (None, torch.bfloat16, torch.float16))
        _check_choice("on_nonfinite", on_nonfinite, get_args(OnNonfinite))
        _check_choice("on_error", on_error, get_args(OnError))
        _check_choice("mode", mode, get_args(Mode))
        self._recording = Recording(operator.index(history_size), threshold, collapse)
        self._law, self._stopping = law, stopping
        self._last_step: int | None = None
        self._every = operator.index(every)
        if across_ranks and standard_error:
            raise ValueError(
                "across_ranks adds up moments, and standard_error needs the activations: leave one of them out"
            )
        if across_ranks and model is None:
            raise ValueError("across_ranks is for what step evaluates, and needs a model, a probe and layers")
        self._across_ranks = across_ranks
        rows_from_tokens = tokens in ("flatten", "skip_first") or positions == "flatten"
        batch = None
        if isinstance(probe, str):
            if probe != "batch":
                raise ValueError(f'probe must be an input of the model or "batch"; got {probe!r}')
            if batch_size is not None or autocast is not None:
                raise ValueError(
                    'batch_size and autocast are for the pass of a probe, and probe="batch" makes none'
                )
            self._watched: Watched | None = (batch := WatchedBatch(model, layers))
        else:
            self._watched = Watched.of(
                model,
                probe,
                layers,
                fewest=0 if across_ranks else 1 if rows_from_tokens else 2,
                batch_size=batch_size,
                autocast=autocast,
            )
        axes = Axes(tokens, positions, channel_axis, samples_axis, mask, self._watched)
        self._evaluations = DeferredEntropy(on_full=on_full, device_of=in_line if mode == "sync" else None)
        self._arrivals = Arrivals(
            self._evaluations, self._recording, on_record, on_collapse, on_nonfinite, on_error
        )
        asked = self._evaluations, self._recording
        self._batch = (
            BatchEvaluator(*asked, batch, axes, standard_error, on_error, across_ranks) if batch else None
        )
        self._evaluator = self._batch or Evaluator(
            *asked, self._watched, axes, standard_error, on_error, across_ranks
        )
        self._last_called: int | None = None  # by `step`, not by `observe`
        self._unfinished: int | None = None  # the step whose evaluation failed: it may be repeated
        self._stride: int | None = None  # between the last two steps told of
        self._told: int | None = None  # the last of them
        self._evaluated: int | None = None  # the last step that was
        self._closed = False
        self._gone: dict[str, int] = {}  # features of layers in the state that was loaded and watched no more
        if check:
            self._evaluator.check()
        if isinstance(threshold, dict) and self._watched is not None:
            _check_layers(threshold, self._watched.order)
        if self._batch is not None:
            self._arm(self._batch)
        at_exit(self)

    @uncompiled
    def step(self, step: int) -> list[EntropyRecord]:
        """Evaluate the probe, or the training batch, if `step` is due; call it once in every training step.

        A step is due when ``step // every`` has grown since the last call, the first call of all when `step` is a
        multiple of `every`: counts that skip multiples are evaluated right after them, and recorded at the step that
        they were given. A step seen again (gradient accumulation) is not evaluated again, unless that failed. A call
        from a hook of the model, which fires in the probe's own pass too, does nothing there.

        Parameters
        ----------
        step : int
            0 or more, never going back except by `load_state_dict`.

        Returns
        -------
        list of EntropyRecord
            What has arrived since the last call, one record for each step and layer; each is handed out once.

        Raises
        ------
        ValueError
            If `step` goes back, the probe changed or moved, a layer's width changed or its device moved.
        RuntimeError
            If there is no model, the monitor is closed, or a layer ran not exactly once; or an evaluation failed in
            the worker, at the step in the message (`step` may then be called again).
        FloatingPointError
            For NaN or Inf in activations with ``on_nonfinite="raise"``.
        """
        if self._evaluator.probing:
            return []
        step = self._advance(step)
        if self._watched is None:
            raise RuntimeError("step needs a model, a probe and layers; without them call observe")
        try:
            self._arrivals.collect()
            if self._is_due(step):
                self._evaluate(step)
            elif self._batch is not None and step == self._last_called:
                self._batch.told_again(step)
            self._last_called = step
        finally:
            if self._batch is not None:
                self._arm(self._batch)
        return self._arrivals.take()

    @uncompiled
    def observe(self, step: int, h: Tensor | SpectralEntropy, *, layer: str, merge: bool = False) -> None:
        """Record activations that are at hand, whether `step` is a multiple of `every` or not.

        Made for forward hooks: ``module.register_forward_hook(lambda m, args, out: monitor.observe(step, out,
        layer="x"))``. It returns None, since torch takes what a hook returns for the layer's output: the record comes
        out of the next `step` or `flush`, to `on_record` and into the `history`. Of less than two rows, as of a batch
        of one, the status is `too_few_rows`. A forward pass that activation checkpointing repeats during the backward
        pass counts once, and the pass of a monitor's probe, this one's or another's, not at all.

        Parameters
        ----------
        step : int
            0 or more, never going back.
        h : Tensor, shape (n, d), (n, tokens, d) if the monitor has `tokens`, or a map if it has `positions`; or
            SpectralEntropy
            Activations; they are detached and not kept. Or their entropy, unbatched, where it was computed
            for many layers or seeds in one call (`SpectralEntropy.unbind`), or with a mask: the monitor's is for its
            probe alone.
        layer : str
            The name to record.
        merge : bool
            Take all calls of one step together, as if their rows had come in one (gradient accumulation): their moments
            add up, and the entropy is taken when the step is over, that is at a call with a later step, `flush`,
            `state_dict` or `close`. Without it a second call for `layer` and `step` is ignored, with one warning.

        Raises
        ------
        ValueError
            If `step` goes back, the width of `layer` changed or its device moved, for unusable activations
            (`fastent.spectral_entropy`), or to merge entropies or with `standard_error`.
        RuntimeError
            If the monitor is closed.
        FloatingPointError
            For NaN or Inf in `h` with ``on_nonfinite="raise"``.
        """
        step = self._advance(step)
        self._arrivals.collect()
        with interrupts_held():
            self._evaluator.observe(step, str(layer), h, merge)
            self._arrivals.collect()

    @property
    def history(self) -> list[EntropyRecord]:
        """The newest `history_size` records of each layer that have arrived, oldest first."""
        return self._recording.records

    @property
    def every(self) -> int:
        """Steps between evaluations."""
        return self._every

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers that are recorded: of the model in the order asked for, then those only observed.

        Those that a pattern matched or a function returns are known once they have run. Those that only a loaded state
        has are in the `history` alone.
        """
        watched = self._watched.names if self._watched is not None else ()
        recorded = (layer for layer in self._recording.layers if layer not in self._gone)
        return tuple(dict.fromkeys((*watched, *recorded)))

    @property
    def needs_every_rank(self) -> bool:
        """Whether every rank must make the monitor and call `step`, with the same counts.

        So it is with `across_ranks`, and where the model is sharded; rank 0 alone records then.
        """
        watched = self._watched
        return watched is not None and (self._across_ranks or watched.needs_every_rank)

    @property
    def closed(self) -> bool:
        """Whether `close` was called: no more steps are taken, and what was recorded can be read."""
        return self._closed

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
        """Whether every watched layer with a threshold has been below it at some step; False without one."""
        watched = {layer for layer in self.layers if self._recording.threshold(layer) is not None}
        return bool(watched) and watched <= self.crossings.keys()

    @property
    def collapsed(self) -> dict[str, int]:
        """Step at which each layer collapsed, by `collapse`; a layer that has not is absent."""
        return self._recording.collapsed

    def to_pandas(self) -> Any:
        """Give the `history` as a data frame of pandas, a row for each record; an empty one gives the columns too.

        Returns
        -------
        pandas.DataFrame
            Columns are the attributes of `EntropyRecord`:

            - `step` (int64, training steps), `layer` (string), `n`, `d` (int64, rows and features);
            - `normalized`, `ceiling` (float64, no unit, 0 to 1), `entropy` (float64, nats), `effective_rank`,
              `participation_ratio` (float64, dimensions), `total_variance` (float64, activations squared): NaN where
              nothing was measured;
            - `status`, `message`, `flags` (string; flags with spaces between);
            - `bias`, `standard_error` (float64, as `normalized`), `mask` (string): missing where there is none.

        Raises
        ------
        ModuleNotFoundError
            If pandas is not installed.
        """
        return records_frame("pandas", self.history)

    def to_polars(self) -> Any:
        """Give the `history` as a data frame of polars, as `to_pandas`: Int64, Float64, String, null where missing."""
        return records_frame("polars", self.history)

    def plot(self, kind: Drawing | None = None, *, ax: Any = None) -> Any:
        """Draw the `history`: the normalised entropy of each layer over the steps.

        Parameters
        ----------
        kind : {"lines", "heatmap"}, optional
            A line for each layer, or a row for each, the first at the top, and the entropy as colour. By default lines
            for up to 6 layers.
        ax : matplotlib.axes.Axes, optional
            Where to draw. By default on a figure of their own, whose axes a notebook shows as the value of a cell, and
            ``monitor.plot().figure.savefig("entropy.png")`` writes; pyplot does not know it. A legend stands beside the
            axes of a figure with a layout (``layout="constrained"``), else within.

        Returns
        -------
        matplotlib.axes.Axes
            A dashed line is a threshold, in a heatmap on the scale of colours; a triangle the first record below it, a
            diamond a collapse, where their records are still kept. What is `rank_limited` is dotted. A cross is an
            evaluation that must not be used, with the statuses in the legend: it has no value, and lines and rows have
            a gap there. Names of layers are without the parts that all have in common, which stand beside them, and
            cut in the middle.

        Raises
        ------
        ModuleNotFoundError
            If matplotlib is not installed.
        TypeError
            If `ax` is not axes of matplotlib.
        ValueError
            If `kind` is unknown, or no record has arrived.
        """
        return self._recording.plot(self.layers, kind, ax)

    @uncompiled
    def should_stop(self, *, agree: bool | None = None) -> bool:
        """Answer of the stopping policy, from the records that have arrived; False if none was given.

        Parameters
        ----------
        agree : bool, optional
            Needed where the default process group (`torch.distributed`) has several ranks and a policy was given:
            records arrive on each rank at a time of its own, or on rank 0 alone, and a rank that stops by itself
            leaves the others waiting. True: every rank calls this at the same step, and all stop if one of them
            would. False: the answer of this rank, for a loop that shares it in its own way. With `across_ranks` it
            is not needed: all ranks have the same records, and a policy that asks for nothing else gives one answer.

        Raises
        ------
        RuntimeError
            If `agree` is needed and was not given.
        """
        own = self._stopping is not None and self._stopping(self)
        ranks = count_ranks()
        if ranks == 1 or agree is False or (agree is None and self._same_on_all_ranks):
            return own
        if agree:
            return any(vote for (vote,) in add_up([], [], notes=[float(own)]))
        if self._stopping is not None:
            raise RuntimeError(
                f"should_stop() answers for this rank alone, and there are {ranks}: one that stops by itself "
                "leaves the others waiting. Call should_stop(agree=True) at the same step on every rank, or "
                "should_stop(agree=False) where you share the answer yourself"
            )
        return False

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
        recent = self._course(layer).recent
        return predict_grok_time(History([step for step, _ in recent], [h for _, h in recent]), self._law)

    def diagnose(self, *, layer: str | None = None, test_accuracy: float | None = None) -> Diagnosis:
        """Find the run's row in the paper's diagnostic guide, from the whole run, however long.

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
        return diagnosis_of(self._course(layer), test_accuracy)

    @property
    def pending(self) -> int:
        """Evaluations that were asked for and have not arrived."""
        return self._evaluations.pending

    @property
    def dropped(self) -> int:
        """Evaluations that were dropped because too many were waiting."""
        return self._evaluations.dropped

    @property
    def cost(self) -> Cost:
        """What the monitor has taken of this process's time; ``dataclasses.asdict`` makes it loggable."""
        return self._evaluations.clock.cost

    def __repr__(self) -> str:
        names = ", ".join((*self.layers[:3], *(["..."] if len(self.layers) > 3 else ())))
        return f"<{type(self).__name__} of {len(self.layers)} layers ({names}), every {self._every} steps: {self.cost}>"

    def _table(self) -> Table:
        return self._recording.table(
            self.layers, f"{len(self.layers)} layers, every {self._every} steps: {self.cost}"
        )

    def state_dict(self) -> dict[str, Any]:
        """State as plain JSON values; float64 survives a round trip through JSON bit for bit.

        Its keys are the same whatever was recorded, so that a monitor is a `Stateful` for
        `torch.distributed.checkpoint`, and ``torch.load(weights_only=True)`` reads it. Asking for it changes nothing:
        it waits for all that was asked for, so that it is in there, as are rows that are being merged, as if their step
        ended now; the records come out of the monitor, and errors are raised, when they would without it. Of an
        evaluation that failed there is no record. The `cost` is not in there: another process may be on another
        machine.
        """
        known = self._to_come()
        recording = self._recording.with_records(known) if known else self._recording
        ran = (self._watched.ran if self._watched else {}) | self._gone
        return {
            "version": STATE_VERSION,
            "probe": self._digest,
            "last_step": self._last_step,
            "last_called": self._last_called,
            "unfinished": self._unfinished,
            "ran": columns(("layer", "d"), ({"layer": layer, "d": d} for layer, d in ran.items())),
            "dropped": self.dropped,
            **recording.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to a saved state; records made since are gone, so a replayed step is not there twice.

        A state of other layers is loaded too, since a run may go on with more of them or with fewer: the new ones'
        records begin here, and those of layers that are watched no more stay in the `history` and decide nothing. With
        another threshold than the saved one, crossings are found again in the saved history; so are collapses with
        another `collapse`, or of a version before 4. A state of version 1 knows no more of a long run than
        its records. A layer whose rows were being merged has its record: further rows of that step are ignored.

        Raises
        ------
        ValueError
            If the state is damaged, or of another version or probe, or the probe changed. Nothing is loaded then.

        Warns
        -----
        UserWarning
            If the state is of other layers than those watched, with the names.
        """
        if self._watched is not None:
            self._watched.probe.check(content=True)
        try:
            if state["version"] not in READ_VERSIONS:
                raise ValueError(
                    f"the state has version {state['version']}; this release reads 1 to {STATE_VERSION}"
                )
            digest = self._digest
            if state["probe"] != digest:
                old, new = (f"probe {d[:12]}" if d else "no probe" for d in (state["probe"], digest))
                raise ValueError(f"the state was recorded with {old}, this monitor has {new}")
            last_step = checked_step("last_step", state)
            if state["version"] == 1:  # it knew only the last multiple that was evaluated
                probed = checked_step("last_probed", state)
                missed = last_step is not None and last_step % self._every == 0 and last_step != probed
                called, unfinished = last_step, last_step if missed else None
                order = self._watched.order if self._watched else ()
                ran = {layer: values["d"] for layer, values in state["layers"].items() if layer in order}
            else:
                called, unfinished = checked_step("last_called", state), checked_step("unfinished", state)
                pairs = state["ran"].items()
                if state["version"] > 2:
                    pairs = [(row["layer"], row["d"]) for row in rows_of(state["ran"])]
                ran = {str(layer): checked_count("ran", d) for layer, d in pairs}
            dropped = checked_count("dropped", state.get("dropped", 0))
            recording = self._recording.empty()
            recording.load_state_dict(state)
            gone, added = self._watched.compare(ran) if self._watched else ({}, [])
        except (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError) as error:
            raise ValueError(f"nothing is loaded: {_reason(error)}") from error
        with interrupts_held():
            self._arrivals.forget()
            self._recording.become(recording)
            self._last_step, self._last_called, self._unfinished = last_step, called, unfinished
            if self._watched is not None:
                self._watched.restore(ran)
            self._gone, self._evaluated = gone, None
            self._evaluator.forget()
            self._evaluations.dropped = dropped
            if self._batch is not None:
                self._stride = self._told = None
                self._arm(self._batch)
        if gone or added:
            warn_user(_of_other_layers(gone, added), UserWarning)

    @uncompiled
    def flush(self) -> list[EntropyRecord]:
        """Wait for all that was asked for, and return the records that arrived; raises as `step` does."""
        self._evaluator.end_merging()
        self._evaluations.flush()
        self._arrivals.collect_all()
        return self._arrivals.take()

    def close(self) -> None:
        """Flush into the history, end the worker and take no more steps. May be called again."""
        self._closed = True
        if self._batch is not None:
            self._batch.arm(None)
        self._evaluator.end_merging()
        try:
            self._evaluations.close()
        finally:
            self._arrivals.collect_all()

    def finish(self, deadline: float) -> None:
        """Record what is under way until `deadline`; called when the interpreter ends (`fastent.process`)."""
        self._evaluator.end_merging()
        if self.pending:
            self._evaluations.flush(max(0.0, deadline - time.monotonic()))
            self._arrivals.collect_all()

    def __enter__(self) -> SpectralEntropyMonitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except Exception as failure:
            if error is None:
                raise
            error.add_note(f"closing the monitor failed too: {failure!r}")

    def __copy__(self) -> NoReturn:
        raise TypeError(
            "a shallow copy would share this monitor's records and hooks: take copy.deepcopy(monitor), which copies "
            "the model too, or for a second monitor of the same model make one and give it the state_dict() of this one"
        )

    def __getstate__(self) -> dict[str, Any]:
        # A copy holds what was asked for so far, as a checkpoint does: here nothing of it is taken out.
        return {**self.__dict__, "_known": self._to_come()}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        known = self.__dict__.pop("_known")
        self._recording.become(self._recording.with_records(known))
        self._recording.fallen.clear()  # the original tells of them
        self._arrivals.hand_out(known)
        at_exit(self)

    def _to_come(self) -> list[EntropyRecord]:
        """Wait for what was asked for, and give the records of it and, as if their step ended now, of merged rows."""
        self._evaluations.flush()
        return self._arrivals.to_come() + _records(*self._evaluator.merged_so_far())

    def _evaluate(self, step: int) -> None:
        with interrupts_held():  # a step is evaluated and recorded, or it is not
            self._last_called, self._unfinished = step, None if self._batch else step
            self._unfinished = None if self._evaluator.run(step) else step
            self._evaluated = step
            self._arrivals.collect()

    def _arm(self, batch: BatchEvaluator) -> None:
        """Prepare the hooks for the next step, if it will be due as far as can be known."""
        last, told = self._last_called, self._told
        if last is not None and told is not None and last > told:
            self._stride = last - told
        self._told = last
        following = 0 if last is None else last + (self._stride or 1)
        if self._stride is None or self._is_due(following):
            batch.arm(following)
        elif last == self._evaluated:
            batch.arm(following, recorded=True)
        else:
            batch.arm(None)

    @property
    def _digest(self) -> str | None:
        # Each rank has a part of its own, and one rank's state is loaded on all, or on another number of them.
        return self._watched.probe.digest if self._watched and not self._across_ranks else None

    @property
    def _same_on_all_ranks(self) -> bool:
        """Whether every rank has the records that this one has: none comes from `observe`."""
        own = self._recording.layers - {*self._watched.names, *self._gone} if self._watched else ()
        return self._across_ranks and not own

    def _is_due(self, step: int) -> bool:
        if self._batch is not None and self._unfinished is not None:
            return True  # the last one that was due gave nothing
        if self._last_called is None:
            return step % self._every == 0
        return step == self._unfinished or step // self._every > self._last_called // self._every

    def _advance(self, step: int) -> int:
        if self._closed:
            raise RuntimeError(
                "the monitor is closed: its records can be read, and no more are made. To go on, make a new monitor "
                "and give it the state_dict() of this one by load_state_dict"
            )
        try:
            step = operator.index(step)
        except TypeError:
            given = repr(step) if isinstance(step, float | str | None) else f"a {type(step).__name__}"
            raise TypeError(f"step must be a whole number; got {given}") from None
        if step < 0:
            raise ValueError(f"steps start at 0; got {step}")
        if self._last_step is not None and step < self._last_step:
            raise ValueError(
                f"steps do not go back: got {step} after {self._last_step}; after a resume call "
                "load_state_dict, for another run make a new monitor"
            )
        self._evaluator.end_merging(step)
        self._last_step = step
        return step

    def _course(self, layer: str | None) -> Course:
        """Return what is known of `layer`, or of the only one that is recorded where it is None."""
        recorded = sorted(self._recording.layers)
        layer = None if layer is None else str(layer)  # as the record has it
        if layer is None and not recorded:
            return Course(None)
        if layer is None and len(recorded) > 1:
            raise ValueError(f"several layers are recorded: name one of {recorded} as layer")
        if layer is not None and layer not in recorded:
            raise ValueError(f"layer {layer!r} has no record; recorded so far: {recorded}")
        return self._recording.course(recorded[0] if layer is None else layer)


def _check_layers(threshold: Iterable[str], known: Iterable[str]) -> None:
    """Refuse a name or pattern in `threshold` that fits none of the `known` layers, where there are such."""
    known = list(known)
    for wanted in threshold if known else ():
        if wanted not in known and not any(matches_pattern(layer, wanted) for layer in known):
            close = difflib.get_close_matches(wanted, known) or known[:10]
            raise ValueError(
                f"threshold has {wanted!r}, which fits no layer that is watched: {', '.join(map(repr, close))}. (What "
                "is only observed takes a monitor of its own, without a model)"
            )


def _of_other_layers(gone: Collection[str], new: Collection[str]) -> str:
    said = {
        "in it and not watched, so without further records": gone,
        "watched and not in it, so new from here on": new,
    }
    parts = [f"{what}: {', '.join(map(repr, layers))}" for what, layers in said.items() if layers]
    return (
        f"the state is of other layers than this monitor's ({'; '.join(parts)}). If that is not meant, watch the "
        "layers of the state, or leave it out"
    )


def _reason(error: Exception) -> str:
    return f"the state has no {error}" if isinstance(error, KeyError) else str(error)


def _check_called(name: str, value: object, what: str) -> None:
    if value is not None and not callable(value):
        raise TypeError(f"{name} must be a function of {what}; got {value!r}")


def _check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")
