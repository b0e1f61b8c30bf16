"""The thread that takes eigenvalues: waits for matrices without stopping anybody, and solves them in order.

It polls (a wait for a CUDA event would be one more call that blocks), with one LAPACK thread, so that training keeps
its cores. Of the matrices that have arrived, those of one size are solved together where the device can and they
are many. An exception belongs to its evaluation and ends neither the thread nor the process.

A daemon thread, so that a process can always end: at a regular end it is given `fastent.at_exit.EXIT_SECONDS` to
finish, and then abandoned.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from fastent.at_exit import at_exit
from fastent.eigenvalues import EPS, fallbacks
from fastent.lapack_threads import use_one_thread
from fastent.ring import Staged, Streams
from fastent.sampling import SamplingError
from fastent.spectrum import TINY, SpectralEntropy, Status, entropy_of_matrix

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
"""Eigenvalues and the solver's name, as `fastent.eigenvalues.eigenvalues` returns them."""


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
