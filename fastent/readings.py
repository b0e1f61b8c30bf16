"""What can be asked of a monitor: the records that have arrived, crossings, stopping, forecast, diagnosis."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from fastent.forecast.course import Course
from fastent.forecast.diagnosis import Diagnosis, diagnosis_of
from fastent.forecast.history import History
from fastent.forecast.power_law import PowerLaw
from fastent.forecast.predict import Forecast, predict_grok_time
from fastent.records import EntropyRecord, Recording
from fastent.spread import any_rank, world_size
from fastent.uncompiled import uncompiled


class Readings:
    """The reading side of `fastent.SpectralEntropyMonitor`: what it knows, from the records that have arrived.

    Parameters
    ----------
    recording : Recording
        Where the records are kept; its threshold is the monitor's.
    law : PowerLaw or None
        What `predict_grok_time` forecasts with.
    stopping : callable or None
        Policy for `should_stop`: a function of the monitor.
    """

    def __init__(
        self, recording: Recording, law: PowerLaw | None, stopping: Callable[[Any], bool] | None
    ) -> None:
        self._recording = recording
        self._law = law
        self._stopping = stopping
        self._last_step: int | None = None

    @property
    def history(self) -> list[EntropyRecord]:
        """The newest `history_size` records of each layer that have arrived, oldest first."""
        return self._recording.records

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
        watched = self._recording.layers.union(self._named_layers())
        return bool(watched) and watched <= self.crossings.keys()

    @uncompiled
    def should_stop(self, *, agree: bool | None = None) -> bool:
        """Answer of the stopping policy, from the records that have arrived; False if none was given.

        Parameters
        ----------
        agree : bool, optional
            Needed where the default process group (`torch.distributed`) has several ranks and a policy was given:
            records arrive on each rank at a time of its own, or on rank 0 alone, and a rank that stops by itself
            leaves the others waiting. True: every rank calls this at the same step, and all stop if one of them
            would. False: the answer of this rank, for a loop that shares it in its own way.

        Raises
        ------
        RuntimeError
            If `agree` is needed and was not given.
        """
        own = self._stopping is not None and self._stopping(self)
        if world_size() == 1 or agree is False:
            return own
        if agree:
            return any_rank(own)
        if self._stopping is not None:
            raise RuntimeError(
                f"should_stop() answers for this rank alone, and there are {world_size()}: one that stops by itself "
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

    def _named_layers(self) -> Iterable[str]:
        """Layers that are to be recorded, whether they have been or not."""
        return ()

    def _course(self, layer: str | None) -> Course:
        """Return what is known of `layer`, or of the only one that is recorded where it is None."""
        recorded = sorted(self._recording.layers)
        layer = None if layer is None else str(layer)  # as the record has it
        if layer is None and not recorded:
            return Course(self._recording.threshold)
        if layer is None and len(recorded) > 1:
            raise ValueError(f"several layers are recorded: name one of {recorded} as layer")
        if layer is not None and layer not in recorded:
            raise ValueError(f"layer {layer!r} has no record; recorded so far: {recorded}")
        return self._recording.course(recorded[0] if layer is None else layer)
