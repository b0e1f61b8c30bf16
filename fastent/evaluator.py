"""From a probe or activations at hand to an evaluation: checked layer by layer, all of a step or nothing of it."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastent.activations import Tokens
from fastent.deferred import DeferredEntropy, Opened
from fastent.entropy import spectral_entropy
from fastent.records import Recording
from fastent.sampling import sampling_error
from fastent.spectrum import SpectralEntropy
from fastent.watching import Watched


class Evaluator:
    """Asks for the entropies of a monitor's layers.

    Parameters
    ----------
    evaluations : DeferredEntropy
        Where they are asked for.
    recording : Recording
        Refuses a second record of a layer at a step, or one of another width.
    tokens, standard_error
        As `fastent.SpectralEntropyMonitor` takes them.
    """

    def __init__(
        self, evaluations: DeferredEntropy, recording: Recording, tokens: Tokens | None, standard_error: bool
    ) -> None:
        self._evaluations, self._recording = evaluations, recording
        self._tokens, self._standard_error = tokens, standard_error
        self._devices: dict[str, torch.device] = {}

    def run(self, step: int, watched: Watched) -> None:
        """Evaluate the layers of a model on its probe; a full ring may drop that, and then nothing is run."""
        every_rank = watched.needs_every_rank
        evaluation = None
        if not (every_rank and _rank()):
            # The jackknife needs the activations: it is done in line.
            evaluation = self._evaluations.open(step, needs_room=not self._standard_error)
        if evaluation is not None:
            with evaluation:
                watched.run(functools.partial(self._add, evaluation))
                self._expect(step, evaluation)
        elif every_rank:  # its part of the forward pass: the other ranks wait for it
            watched.run(lambda layer, h: None)

    def observe(self, step: int, layer: str, h: Tensor | SpectralEntropy) -> None:
        """Evaluate activations that are at hand, or take their entropy."""
        if isinstance(h, SpectralEntropy) and not isinstance(h.normalized, float):
            raise ValueError("observe takes one entropy at a time; got a batch: use its unbind()")
        known = isinstance(h, SpectralEntropy) or self._standard_error
        evaluation = self._evaluations.open(step, needs_room=not known)
        if evaluation is not None:
            with evaluation:
                if isinstance(h, SpectralEntropy):
                    evaluation.put(layer, h)
                else:
                    self._add(evaluation, layer, h)
                self._expect(step, evaluation)

    def forget_devices(self) -> None:
        """Let layers come from other devices than before."""
        self._devices = {}

    def _add(self, evaluation: Opened, layer: str, h: Tensor) -> None:
        try:
            if isinstance(h, Tensor):
                old = self._devices.get(layer, h.device)
                if old != h.device:
                    raise ValueError(
                        f"the activations moved from {old} to {h.device}: move the model back, or load the "
                        "state_dict() of this monitor into a new one"
                    )
            tokens = self._tokens if isinstance(h, Tensor) and h.ndim == 3 else None
            if self._standard_error:
                h = h.detach() if isinstance(h, Tensor) else h
                result = spectral_entropy(h, tokens=tokens)
                evaluation.put(layer, result, sampling_error(h, tokens=tokens) if result.n >= 3 else None)
            else:
                evaluation.add(layer, h, tokens=tokens)
        except Exception as error:
            error.add_note(f"in the activations of layer {layer!r}")
            raise
        self._devices[layer] = h.device

    def _expect(self, step: int, evaluation: Opened) -> None:
        for layer, d in evaluation.widths.items():
            self._recording.check(step, layer, d)
        for layer, d in evaluation.widths.items():
            self._recording.expect(step, layer, d)


def _rank() -> int:
    distributed = torch.distributed
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
