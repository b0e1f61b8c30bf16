"""Spectral entropy evaluated beside training: the thread that trains forms the matrices, a worker solves them.

An evaluation is opened at a step, gets the activations of any number of layers, and is committed: in the training
stream only the covariances are formed (`fastent.monitor.cuda` brings them to the host). A daemon thread with one LAPACK
thread polls until they are there (a wait for a CUDA event would be one more call that blocks) and takes the
eigenvalues; of the matrices that have arrived, those of one size are solved together where the device can and they are
many. Results come back as (step, results by layer), in the order of the commits. The training thread never waits for
the device, and for the worker only in `flush`, or where a full ring was told to block.

On the CPU small matrices are evaluated in line and arrive at once: handing them over costs more than solving them
(`fastent.monitor.cuda.Devices` has the rule, bench/NOTES.md the measurement). Records have the same bits either way.

A full ring drops the evaluation before anything is computed, counts it and warns once. What goes wrong in the worker is
raised when its result is due, with the step named, and ends neither the thread nor the process. The worker ends with
its owner; at the end of the interpreter it is given `fastent.process.EXIT_SECONDS`, and then abandoned.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType, TracebackType
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from fastent.activations import Positions, RealTokens, Tokens, resolution_of
from fastent.entropy import TINY, SpectralEntropy, Status, checked, entropy_of_matrix, entropy_of_rows
from fastent.linalg import EPS, fallbacks, use_one_thread
from fastent.monitor.cuda import Device, Devices, Staged, Streams
from fastent.process import at_exit, warn_user
from fastent.rounding import Resolution
from fastent.sampling import SamplingError

# Matrices of one size from which on a batched solver is called: 32 of 128 x 128 take 7 ms together on a small GPU, and
# 0.4 ms each by LAPACK. Not measured on a large one yet.
BATCH_FROM = 16
# Seconds between two looks at an event: at first, and at most.
_FIRST_PAUSE, _LONGEST_PAUSE = 5e-5, 1e-3
# Seconds that a thread which was told to end has to hear of it.
_LAST_SECONDS = 0.1

THREAD_NAME = "fastent-eigenvalues"

_log = logging.getLogger(__name__)

Spectrum = tuple[Tensor, str]
"""Eigenvalues and the solver's name, as `fastent.linalg.eigenvalues` returns them."""


class Evaluated(NamedTuple):
    """Entropy of one layer, with its sampling errors where they were put in with it, and the name of its mask."""

    entropy: SpectralEntropy
    sampling: SamplingError | None = None
    mask: str | None = None


class Evaluation:
    """What was asked for at one step, and later its results or its error."""

    def __init__(
        self,
        step: int,
        order: list[str],
        staged: Mapping[str, Staged],
        known: Mapping[str, Evaluated],
        masks: Mapping[str, str | None] = MappingProxyType({}),
    ) -> None:
        self.step = step
        self._order = order
        self.staged = dict(staged)
        self._known = dict(known)
        self._masks = dict(masks)
        self.error: BaseException | None = None
        self.done = not staged

    @property
    def results(self) -> dict[str, Evaluated]:
        """Results by layer, in the order in which the layers came."""
        return {layer: self._known[layer] for layer in self._order}

    def solve(self, spectra: Mapping[Staged, Spectrum]) -> None:
        """Find what is missing, by LAPACK where `spectra` does not have the eigenvalues."""
        for layer, staged in self.staged.items():
            self._known[layer] = Evaluated(_entropy(staged, spectra.get(staged)), mask=self._masks.get(layer))

    def release(self) -> None:
        """Give all slots back."""
        for staged in self.staged.values():
            staged.release()
        self.staged = {}


class Worker:
    """A daemon thread that solves evaluations in the order in which they are submitted."""

    def __init__(self) -> None:
        self._state = _State()
        self._thread = threading.Thread(target=_work, args=(self._state,), name=THREAD_NAME, daemon=True)
        self._thread.start()
        at_exit(self)

    @property
    def unsolved(self) -> int:
        """Evaluations submitted and not done."""
        return self._state.unsolved

    def submit(self, evaluation: Evaluation) -> None:
        """Queue an evaluation; it will be `done`."""
        with self._state.changed:
            self._state.waiting.append(evaluation)
            self._state.unsolved += 1
            self._state.changed.notify_all()

    def wait(self, most: int, timeout: float | None = None) -> bool:
        """Wait until at most `most` evaluations are unsolved; False if the time was up first."""
        state = self._state
        end = None if timeout is None else time.monotonic() + timeout
        with state.changed:
            while state.unsolved > most:
                if not self._thread.is_alive():
                    raise RuntimeError(f"the worker is gone; {state.unsolved} evaluations are lost")
                left = 1.0 if end is None else min(1.0, end - time.monotonic())
                if left <= 0:
                    return False
                state.changed.wait(left)
        return True

    def stop(self, timeout: float | None = None) -> None:
        """End the thread after the matrix that it is solving, and wait for that."""
        self.abandon()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def abandon(self) -> None:
        """Tell the thread to end, and do not wait."""
        self._state.stop()

    def finish(self, deadline: float) -> None:
        """Solve what is left until `deadline`, then end the thread, or leave it to its fate."""
        if self._thread.is_alive() and not self.wait(0, max(0.0, deadline - time.monotonic())):
            _log.warning("%d deferred evaluations were not finished when the process ended", self.unsolved)
        self.stop(max(_LAST_SECONDS, deadline - time.monotonic()))


class _State:
    """What the thread shares with its owner. The thread knows no more, so that the owner can be collected."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.waiting: deque[Evaluation] = deque()
        self.unsolved = 0
        self.stopping = False
        self._pid = os.getpid()

    def stop(self) -> None:
        self.stopping = True
        if self._pid == os.getpid():  # in a forked child the lock may be held by a thread that is not there
            with self.changed:
                self.changed.notify_all()

    def take(self, wait: bool) -> list[Evaluation]:
        """All that was submitted since; waits for one if asked to, and returns nothing at the end."""
        with self.changed:
            while wait and not self.waiting and not self.stopping:
                self.changed.wait()
            taken = list(self.waiting)
            self.waiting.clear()
            return taken

    def finish(self, evaluation: Evaluation, error: BaseException | None) -> None:
        """Give its slots back, then let its owner see it."""
        try:
            evaluation.release()
        except BaseException as second:
            error = error or second
        with self.changed:
            evaluation.error = error
            evaluation.done = True
            self.unsolved -= 1
            self.changed.notify_all()


def _work(state: _State) -> None:
    use_one_thread()
    queue: list[Evaluation] = []
    while not state.stopping:
        queue += state.take(wait=not queue)
        if queue:
            arrived = _arrived(state, queue)
            queue = queue[len(arrived) :]
            spectra = _solve_together(arrived)
            for evaluation in arrived:
                if state.stopping:
                    return
                _solve(state, evaluation, spectra)


def _solve(state: _State, evaluation: Evaluation, spectra: Mapping[Staged, Spectrum]) -> None:
    try:
        for staged in evaluation.staged.values():
            staged.ready()  # raises what `_arrived` met
        evaluation.solve(spectra)
    except BaseException as error:
        state.finish(evaluation, error)
    else:
        state.finish(evaluation, None)


def _arrived(state: _State, queue: list[Evaluation]) -> list[Evaluation]:
    """Wait for the first; return it and those right behind it that are there too, of all that was submitted."""
    pause = _FIRST_PAUSE
    while not _is_there(queue[0]) and not state.stopping:
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)
    queue += state.take(wait=False)  # what came in the meantime
    count = 1
    while count < len(queue) and _is_there(queue[count]):
        count += 1
    return queue[:count]


def _is_there(evaluation: Evaluation) -> bool:
    try:
        return all(staged.ready() for staged in evaluation.staged.values())
    except BaseException:  # asked again where it has a place to go
        return True


def _solve_together(evaluations: list[Evaluation]) -> dict[Staged, Spectrum]:
    """Spectra of the sizes that came in numbers, from the device's batched solver; none where it fails."""
    groups: dict[tuple[Streams, int], list[Staged]] = {}
    for evaluation in evaluations:
        for staged in evaluation.staged.values():
            # A NaN would stop the solver for all of them.
            if staged.batched is not None and staged.source is not None and _in_range(staged):
                groups.setdefault((staged.batched, staged.source.shape[-1]), []).append(staged)
    spectra: dict[Staged, Spectrum] = {}
    for (streams, _), group in groups.items():
        if len(group) < BATCH_FROM:
            continue
        try:
            values = streams.solve([staged.source for staged in group if staged.source is not None])
        except Exception as error:  # whatever a device's solver raises, LAPACK still works
            _fall_back(str(error))
            continue
        for staged, own in zip(group, values, strict=True):
            spectra[staged] = own, f"cusolver ({staged.centered.side})"
    return spectra


def _in_range(staged: Staged) -> bool:
    try:
        spread = staged.spread() if staged.ready() else None
    except BaseException:  # met again by `_solve`
        return False
    return spread is not None and TINY <= spread[0] < torch.inf


def _fall_back(reason: str) -> None:
    fallbacks.append(reason)
    _log.warning("a batch failed on the device (%s): solved on the CPU, %d so far", reason, len(fallbacks))


def _entropy(staged: Staged, spectrum: Spectrum | None) -> SpectralEntropy:
    """Entropy of a matrix that has arrived, checked against the trace that the device found."""
    spread = staged.spread()
    if spread is not None and spectrum is not None and not _sums_to(spread[0], spectrum[0]):
        _fall_back("its eigenvalues do not sum to the trace")
        spectrum = None
    entropy = entropy_of_matrix(staged.centered, spectrum=spectrum)
    if entropy.status is Status.NONFINITE:
        message = (
            f"{entropy.message} ({staged.dtype}); the activations are gone: mode='sync' counts the entries"
        )
        return dataclasses.replace(entropy, message=message)
    if spread is None or entropy.solver == "none":
        return entropy
    trace, ratio = spread
    if not _sums_to(trace, entropy.eigenvalues):
        total = float(entropy.eigenvalues.sum())
        raise RuntimeError(
            f"the eigenvalues sum to {total}, and the trace on the device was {trace}: the copy or the solve went wrong"
        )
    if not 0.0 < ratio < torch.inf:  # squares out of float64's range: that of the eigenvalues stands
        return entropy
    return dataclasses.replace(entropy, participation_ratio=ratio)


def _sums_to(trace: float, values: Tensor) -> bool:
    gate = max(1e-12, 30 * values.shape[-1] * EPS)
    return abs(float(values.sum()) - trace) <= gate * trace


OnFull = Literal["drop", "block"]

CAPACITY = 8


class DeferredEntropy:
    """Evaluates entropies in the order of their steps, beside the thread that asks for them.

    Parameters
    ----------
    capacity : int
        Evaluations that may wait at once; each takes the memory of its matrices (m x m float64 for each layer, m the
        smaller of samples and features), on the device and pinned on the host.
    on_full : {"drop", "block"}
        What to do with one more: drop and count it, or wait for room. On the CPU it always waits.
    device_of : callable, optional
        From checked activations to the `fastent.monitor.cuda.Device` that serves them, None for an evaluation in line.
        `fastent.monitor.cuda.in_line` evaluates all in line. Default: `fastent.monitor.cuda.Devices`.

    Examples
    --------
    >>> import torch
    >>> evaluations = DeferredEntropy()
    >>> h = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    >>> with evaluations.open(100) as evaluation:
    ...     evaluation.add("encoder", h)
    >>> evaluations.flush()
    True
    >>> [(step, results["encoder"].entropy.normalized) for step, results in evaluations.arrived()]
    [(100, 1.0)]
    >>> evaluations.close()
    """

    def __init__(
        self,
        *,
        capacity: int = CAPACITY,
        on_full: OnFull = "drop",
        device_of: Callable[[Tensor], Device | None] | None = None,
    ) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1; got {capacity}")
        if on_full not in get_args(OnFull):
            raise ValueError(f"on_full must be 'drop' or 'block'; got {on_full!r}")
        self._settings = {"capacity": capacity, "on_full": on_full, "device_of": device_of}
        self._capacity, self._on_full = capacity, on_full
        self._device_of = device_of or Devices().of
        self._ordered: deque[Evaluation] = deque()
        self._worker: Worker | None = None
        self._pid = os.getpid()
        self._device: Device | None = None  # the last one used
        self.dropped = 0
        """Evaluations that found the ring full."""

    @property
    def pending(self) -> int:
        """Evaluations committed whose results have not been handed out."""
        return len(self._ordered)

    def open(self, step: int, *, needs_room: bool = True) -> Opened | None:
        """Begin the evaluation of a step; use it in a ``with`` statement, which commits or discards it.

        Parameters
        ----------
        step : int
            What its results will be labelled with.
        needs_room : bool
            False if only known results will be `put` in, so that a full ring does not matter.

        Returns
        -------
        Opened or None
            None if the ring is full and the evaluation was dropped.

        Raises
        ------
        RuntimeError
            In a forked child of the process that has the worker.
        """
        self._check_process()
        if needs_room and self._worker is not None and self._worker.unsolved >= self._capacity:
            if self._on_full == "drop" and not (self._device and self._device.waits_when_full):
                self._drop(step)
                return None
            self._worker.wait(self._capacity - 1)
        return Opened(self, step)

    def arrived(self) -> Iterator[tuple[int, Mapping[str, Evaluated]]]:
        """Hand out what is there, in the order of the commits: (step, results by layer). Never waits.

        Raises
        ------
        RuntimeError
            When the next one is an evaluation that failed in the worker, with its step; later ones are still to come.
        """
        if self._ordered:
            self._check_process()
        while self._ordered and self._ordered[0].done:
            evaluation = self._ordered.popleft()
            if evaluation.error is not None:
                raise RuntimeError(
                    f"the deferred evaluation of step {evaluation.step} failed: "
                    f"{type(evaluation.error).__name__}: {evaluation.error}"
                ) from evaluation.error
            yield evaluation.step, evaluation.results

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until all that was committed is there to be handed out.

        Parameters
        ----------
        timeout : float, optional
            Seconds; by default as long as it takes.

        Returns
        -------
        bool
            False if the time was up first.
        """
        if self._worker is None:
            return True
        self._check_process()
        return self._worker.wait(0, timeout)

    def discard(self) -> None:
        """Wait for what was committed, and throw all results and errors away."""
        self.flush()
        self._ordered.clear()

    def close(self) -> None:
        """Flush and end the worker; results that are there can still be handed out. May be called again."""
        try:
            self.flush()
        finally:
            if self._worker is not None and os.getpid() == self._pid:
                self._worker.stop()
                self._worker = None

    def _commit(self, evaluation: Evaluation) -> None:
        if not evaluation.done:
            if self._worker is None:
                self._worker = Worker()
                weakref.finalize(self, self._worker.abandon)
            self._worker.submit(evaluation)
        self._ordered.append(evaluation)

    def _stage(self, x: Tensor, resolution: Resolution) -> Staged | None:
        device = self._device_of(x)
        if device is None:
            return None
        self._device = device
        return device.stage(x, resolution)

    def _drop(self, step: int) -> None:
        self.dropped += 1
        if self.dropped == 1:
            warn_user(
                f"the evaluation of step {step} was dropped: {self._capacity} are waiting for the device or "
                "for their eigenvalues; evaluate less often, or wait for room (on_full='block'). Further ones are "
                "counted (dropped) without a warning",
                RuntimeWarning,
            )

    def _check_process(self) -> None:
        if self._pid != os.getpid():
            if self._worker is not None:
                raise RuntimeError(
                    f"the worker of this deferred evaluation belongs to process {self._pid}, and a forked process "
                    "has no copy of it: make a new one (a new monitor) after the fork"
                )
            self._pid = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        if self._ordered:
            raise TypeError(
                f"{self.pending} deferred evaluations are under way, and a thread cannot be copied or "
                "pickled: flush them and take what arrived() first"
            )
        return {"settings": self._settings, "dropped": self.dropped}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__init__(**state["settings"])  # type: ignore[misc]
        self.dropped = state["dropped"]


class Opened:
    """An evaluation that is being put together; made by `DeferredEntropy.open`."""

    def __init__(self, owner: DeferredEntropy, step: int) -> None:
        self._owner = owner
        self._step = step
        self._staged: dict[str, Staged] = {}
        self._masks: dict[str, str | None] = {}
        self._known: dict[str, Evaluated] = {}
        self.widths: dict[str, int] = {}
        """Features d of each layer, in the order of arrival."""

    def add(
        self,
        layer: str,
        h: Tensor,
        *,
        tokens: Tokens | None = None,
        positions: Positions | None = None,
        channel_axis: int | None = None,
        mask: Tensor | RealTokens | None = None,
        mask_name: str | None = None,
    ) -> None:
        """Form the matrix of a layer's activations, in the current stream; they are not kept.

        Parameters
        ----------
        layer : str
            A name within this evaluation.
        h : Tensor, shape (n, d), (n, tokens, d) with `tokens`, or a map with `positions`
            Activations.
        tokens, positions, channel_axis, mask
            See `fastent.spectral_entropy`.
        mask_name : str, optional
            What the result says of its mask.

        Raises
        ------
        TypeError, ValueError
            As `fastent.spectral_entropy` does.
        """
        x = checked(h, tokens=tokens, positions=positions, channel_axis=channel_axis, mask=mask)
        resolution = resolution_of(
            h, tokens=tokens, positions=positions, channel_axis=channel_axis, mask=mask
        )
        staged = self._owner._stage(x, resolution)
        if staged is None:
            self.put(layer, entropy_of_rows(x, resolution), mask_name=mask_name)
        else:
            self._staged[layer] = staged
            self._masks[layer] = mask_name
            self.widths[layer] = x.shape[-1]

    def put(
        self,
        layer: str,
        entropy: SpectralEntropy,
        sampling: SamplingError | None = None,
        *,
        mask_name: str | None = None,
    ) -> None:
        """Give a layer's result where it is known already; it keeps its place in the order."""
        self._known[layer] = Evaluated(entropy, sampling, mask_name)
        self.widths[layer] = entropy.d

    def arrange(self, layers: Iterable[str]) -> None:
        """Put the results in the order of `layers`, whichever arrived first; others come after them."""
        order = [layer for layer in layers if layer in self.widths]
        self.widths = {layer: self.widths[layer] for layer in (*order, *self.widths)}

    def __enter__(self) -> Opened:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._owner._commit(
                Evaluation(self._step, list(self.widths), self._staged, self._known, self._masks)
            )
        else:
            for staged in self._staged.values():
                staged.release()
