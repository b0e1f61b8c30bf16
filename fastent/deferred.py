"""Spectral entropy evaluated beside training: the thread that trains forms the matrices, a worker solves them.

An evaluation is opened at a step, gets the activations of any number of layers, and is committed: in the training
stream only the covariances are formed (`fastent.ring` brings them to the host). A daemon thread with one LAPACK
thread polls until they are there and takes the eigenvalues; where many matrices wait, cuSOLVER takes them in one call.
Results come back as (step, results by layer), in the order of the commits. The training thread never waits for
the device, and for the worker only in `flush`, or where a full ring was told to block.

On the CPU small matrices are evaluated in line and arrive at once: handing them over costs more than solving them
(`fastent.devices.Devices` has the rule, bench/NOTES.md the measurement). Records have the same bits either way.

A full ring drops the evaluation before anything is computed, counts it and warns once. What goes wrong in
the worker is raised when its result is due, with the step named. The worker ends with its owner; at the end of the
interpreter it is given a few seconds (`fastent.at_exit`).
"""

from __future__ import annotations

import os
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Literal, get_args

from torch import Tensor

from fastent.activations import Positions, RealTokens, Tokens, resolution_of
from fastent.devices import Devices
from fastent.entropy import checked, entropy_of_rows
from fastent.ring import Device, Staged
from fastent.rounding import Resolution
from fastent.sampling import SamplingError
from fastent.spectrum import SpectralEntropy
from fastent.user_warning import warn_user
from fastent.worker import Evaluated, Evaluation, Worker

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
        From checked activations to the `fastent.ring.Device` that serves them, None for an evaluation in line.
        `fastent.devices.in_line` evaluates all in line. Default: `fastent.devices.Devices`.

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
