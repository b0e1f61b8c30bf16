"""From results to records: what has arrived is recorded, logged and handed out once, in the order of the steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Literal

from fastent.deferred import DeferredEntropy
from fastent.interrupts import Interrupts, interrupts_held
from fastent.records import EntropyRecord, Recording
from fastent.spectrum import Status
from fastent.user_warning import warn_user
from fastent.worker import Evaluated

OnNonfinite = Literal["record", "raise"]

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
    on_nonfinite : {"record", "raise"}
        Whether `collect` raises FloatingPointError once such a record has been kept.
    """

    def __init__(
        self,
        evaluations: DeferredEntropy,
        recording: Recording,
        on_record: Callable[[EntropyRecord], object] | None,
        on_nonfinite: OnNonfinite,
    ) -> None:
        self._evaluations, self._recording = evaluations, recording
        self._on_record, self._on_nonfinite = on_record, on_nonfinite
        self._waiting: deque[EntropyRecord] = deque(maxlen=MOST_WAITING)
        self._ceiling_known: set[str] = set()
        self._to_raise: EntropyRecord | None = None
        self._logger_failed = False

    def collect(self) -> None:
        """Record what is there. Raises for an evaluation that failed, and for NaN or Inf if asked to."""
        if self._evaluations.pending:
            with interrupts_held() as interrupts:  # nothing is taken out and not recorded
                for step, results in self._evaluations.arrived():
                    self._record(step, results, interrupts)
        record, self._to_raise = self._to_raise, None
        if record is not None:
            raise FloatingPointError(f"layer {record.layer!r} at step {record.step}: {record.message}")

    def collect_all(self) -> None:
        """Record what is there, beyond the first failure too, and raise that one, with the others as notes."""
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

    def forget(self) -> None:
        """Wait for what is under way, and forget it and all that was not handed out."""
        self._evaluations.discard()
        self._waiting.clear()
        self._to_raise = None

    def _record(self, step: int, results: Mapping[str, Evaluated], interrupts: Interrupts) -> None:
        records = [EntropyRecord.of(step, layer, *evaluated) for layer, evaluated in results.items()]
        for record in records:
            self._recording.add(record)
            self._waiting.append(record)
            if record.status is Status.NONFINITE and self._on_nonfinite == "raise":
                self._to_raise = self._to_raise or record
        with interrupts.second_at_once():
            for record in records:  # kept by now, in case a warning is made an error
                self._log(record)
            for record in records:
                self._warn_of_ceiling(record)

    def _warn_of_ceiling(self, record: EntropyRecord) -> None:
        if record.layer in self._ceiling_known or record.status in (Status.TOO_FEW_ROWS, Status.NOT_RUN):
            return
        self._ceiling_known.add(record.layer)
        threshold = self._recording.threshold
        if threshold is not None and threshold > record.ceiling:
            warn_user(
                f"the threshold {threshold} is above {record.ceiling:.4f}, the most that {record.n} "
                f"samples of layer {record.layer!r} with d = {record.d} can reach: every record is below it",
                UserWarning,
            )

    def _log(self, record: EntropyRecord) -> None:
        if self._on_record is None:
            return
        try:
            self._on_record(record)
        except Exception as error:  # whatever a logger raises must not end training
            if not self._logger_failed:
                self._logger_failed = True
                warn_user(
                    f"on_record failed at step {record.step}: {error!r}; training and the monitor go on, "
                    "without further warnings",
                    RuntimeWarning,
                )
