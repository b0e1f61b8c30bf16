"""From a probe or activations at hand to an evaluation: checked layer by layer, all of a step or nothing of it.

What is no mistake is a status: a layer that ran before and is idle now, as a mixture's expert without tokens
(`not_run`), or gave fewer than two rows (`too_few_rows`); activations at hand may be a batch of one.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastent.activations import TooFewRows, rows_of
from fastent.axes import Axes, Reading
from fastent.deferred import DeferredEntropy, Opened
from fastent.entropy import checked, spectral_entropy
from fastent.guard import in_a_pass
from fastent.interrupts import interrupts_held
from fastent.moments import Moments
from fastent.records import Recording
from fastent.sampling import sampling_error
from fastent.spectrum import SpectralEntropy, Status, unmeasured
from fastent.user_warning import warn_user
from fastent.watching import Watched


class Evaluator:
    """Asks for the entropies of a monitor's layers.

    Parameters
    ----------
    evaluations : DeferredEntropy
        Where they are asked for.
    recording : Recording
        Knows which layer has a record at a step, and refuses one of another width.
    axes : Axes
        How the activations are read.
    standard_error : bool
        As `fastent.SpectralEntropyMonitor` takes it.
    """

    def __init__(
        self, evaluations: DeferredEntropy, recording: Recording, axes: Axes, standard_error: bool
    ) -> None:
        self._evaluations, self._recording = evaluations, recording
        self._axes, self._standard_error = axes, standard_error
        self._devices: dict[str, torch.device] = {}
        self._merged = _Merged()
        self._seen_in_backward: dict[str, bool] = {}  # by layer, for its newest observed step
        self._warned_of_repeats = False
        self._probing = False

    @property
    def probing(self) -> bool:
        """Whether the calling thread is in a pass of the probe."""
        return self._probing and in_a_pass()

    def check(self, watched: Watched) -> None:
        """Pass the probe through the model and check what comes, without an evaluation; every rank may do so."""
        with self._pass(
            "the probe's pass failed at construction; check=False puts it off to the first evaluation"
        ):
            watched.run(functools.partial(self._examine, watched.may_have_few_rows))

    def run(self, step: int, watched: Watched) -> None:
        """Evaluate the layers of a model on its probe; a full ring may drop that, and then nothing is run."""
        every_rank = watched.needs_every_rank
        evaluation = None
        if not (every_rank and _rank()):
            # The jackknife needs the activations: it is done in line.
            evaluation = self._evaluations.open(step, needs_room=not self._standard_error)
        if evaluation is not None:
            with evaluation, self._pass(f"in the pass of the monitor's probe at step {step}"):
                add = functools.partial(self._add, evaluation, watched.may_have_few_rows)
                for layer, d in watched.run(add).items():
                    message = "the layer did not run in this pass of the probe: nothing called it"
                    width = self._recording.width(layer) or d
                    evaluation.put(layer, unmeasured(Status.NOT_RUN, 0, width, message))
                evaluation.arrange(watched.order)
                self._expect(step, evaluation)
        elif every_rank:  # its part of the forward pass: the other ranks wait for it
            with self._pass(f"in the pass of the monitor's probe at step {step}"):
                watched.run(functools.partial(self._examine, watched.may_have_few_rows))

    def observe(self, step: int, layer: str, h: Tensor | SpectralEntropy, merge: bool) -> None:
        """Evaluate activations that are at hand, or take their entropy, or keep rows until the step is over."""
        if isinstance(h, SpectralEntropy) and not isinstance(h.normalized, float):
            raise ValueError("observe takes one entropy at a time; got a batch: use its unbind()")
        if merge and isinstance(h, SpectralEntropy):
            raise ValueError(
                "merge=True adds up activations, and entropies do not add up: pass the activations"
            )
        if merge and self._standard_error:
            raise ValueError(
                "merge=True keeps moments, and standard_error needs the activations: leave one of them out"
            )
        if (
            in_a_pass()
        ):  # by a hook of the user's that fires in the pass of a probe too, of another monitor's as well
            return
        merging = layer in self._merged.moments
        if merging or self._recording.newest(layer) == step:
            if _in_backward() and not self._seen_in_backward.get(layer, True):
                return  # the forward pass once more, by activation checkpointing: the same rows
            if not (merge and merging):
                self._ignore(step, layer)
                return
        else:
            self._seen_in_backward[layer] = _in_backward()
        if merge and not isinstance(h, SpectralEntropy):
            self._merge(step, layer, h)
            return
        known = isinstance(h, SpectralEntropy) or self._standard_error
        evaluation = self._evaluations.open(step, needs_room=not known)
        if evaluation is not None:
            with evaluation:
                if isinstance(h, SpectralEntropy):
                    evaluation.put(layer, h)
                else:
                    self._add(evaluation, _AnyLayer(), layer, h)
                self._expect(step, evaluation)

    def end_merging(self, next_step: int | None = None) -> None:
        """Evaluate what was merged, if that was at a step before `next_step` or there is none."""
        merged = self._merged
        if not merged.moments or next_step == merged.step:
            return
        with interrupts_held():
            self._merged = _Merged()
            self._evaluate(merged)

    def _evaluate(self, merged: _Merged) -> None:
        evaluation = self._evaluations.open(merged.step, needs_room=False)
        if evaluation is not None:
            with evaluation:
                for layer, moments in merged.moments.items():
                    few = moments.n < 2
                    entropy = _too_few(moments.n, merged.widths[layer]) if few else moments.spectral_entropy()
                    evaluation.put(layer, entropy)
                self._expect(merged.step, evaluation)

    def forget(self) -> None:
        """Let layers come from other devices than before, and drop what was merged."""
        self._devices = {}
        self._merged = _Merged()

    def _add(self, evaluation: Opened, few: Any, layer: str, h: Tensor) -> int:
        """Put activations into `evaluation` and return their width; of the layers `few`, under two rows too."""
        with self._checks_of(layer, h):
            reading = self._read(layer, h)
            try:
                if self._standard_error:
                    result = spectral_entropy(reading.h, **reading.choice)
                    sampling = sampling_error(reading.h, **reading.choice) if result.n >= 3 else None
                    evaluation.put(layer, result, sampling, mask_name=reading.mask)
                else:
                    evaluation.add(layer, reading.h, **reading.choice, mask_name=reading.mask)
            except TooFewRows as error:
                if layer not in few:
                    raise
                evaluation.put(layer, _too_few(error.n, error.d), mask_name=reading.mask)
        self._devices[layer] = h.device
        return evaluation.widths[layer]

    def _examine(self, few: Any, layer: str, h: Tensor) -> int:
        with self._checks_of(layer, h):
            reading = self._read(layer, h)
            try:
                return checked(reading.h, **reading.choice).shape[-1]
            except TooFewRows as error:
                if layer not in few:
                    raise
                return error.d

    def _merge(self, step: int, layer: str, h: Tensor) -> None:
        with self._checks_of(layer, h):
            reading = self._read(layer, h)
            part = Moments().update(reading.h, **reading.choice)
            d = len(part.mean) if part.n else rows_of(reading.h, **reading.choice, batch_dims=None).shape[-1]
            if d < 2:
                raise ValueError(
                    "the normalised entropy divides by log d, so d must be at least 2; got d = 1"
                )
            self._recording.check(step, layer, d)
            moments = self._merged.moments.get(layer, Moments()).merge(part)
        self._merged.step = step
        self._merged.moments[layer] = moments
        self._merged.widths[layer] = d
        self._devices[layer] = h.device

    def _read(self, layer: str, h: Tensor) -> Reading:
        h = h.detach() if isinstance(h, Tensor) else h
        return self._axes.on_probe(layer, h) if self._probing else self._axes.at_hand(h)

    def _ignore(self, step: int, layer: str) -> None:
        if not self._warned_of_repeats:
            self._warned_of_repeats = True
            warn_user(
                f"layer {layer!r} was observed again at step {step}, and that is ignored: pass merge=True to take "
                "all calls of a step together (gradient accumulation), or another step. Further ones are ignored "
                "without a warning",
                UserWarning,
            )

    def _expect(self, step: int, evaluation: Opened) -> None:
        for layer, d in evaluation.widths.items():
            self._recording.check(step, layer, d)
        for layer, d in evaluation.widths.items():
            self._recording.expect(step, layer, d)

    @contextmanager
    def _checks_of(self, layer: str, h: Tensor) -> Iterator[None]:
        try:
            if isinstance(h, Tensor):
                old = self._devices.get(layer, h.device)
                if old != h.device:
                    raise ValueError(
                        f"the activations moved from {old} to {h.device}: move the model back, or load the "
                        "state_dict() of this monitor into a new one"
                    )
            yield
        except (TypeError, ValueError) as error:
            error.args = (f"layer {layer!r}{' on the probe' if self._probing else ''}: {error}",)
            raise
        except Exception as error:
            error.add_note(f"in the activations of layer {layer!r}")
            raise

    @contextmanager
    def _pass(self, note: str) -> Iterator[None]:
        self._probing = True
        try:
            yield
        except Exception as error:
            error.add_note(note)
            raise
        finally:
            self._probing = False


@dataclass
class _Merged:
    """Rows of the step under way, by layer."""

    step: int = -1
    moments: dict[str, Moments] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)


class _AnyLayer:
    def __contains__(self, layer: object) -> bool:
        return True


def _too_few(n: int, d: int) -> SpectralEntropy:
    message = f"a covariance needs at least 2 rows; there {'was' if n == 1 else 'were'} {n}"
    return unmeasured(Status.TOO_FEW_ROWS, n, d, message)


def _in_backward() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)


def _rank() -> int:
    distributed = torch.distributed
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
