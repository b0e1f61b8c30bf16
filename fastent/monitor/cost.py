"""What a monitor takes of training's time, and the clock that knows it.

Time is read in evaluations alone: a step that is not due costs nothing more. The clock of the thread that trains is
`time.perf_counter`; what a part contains of another part is the other's. Work that is only queued there takes the time
of the device that does it, between two events which are read once they have passed; nobody waits for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Literal


@dataclass(frozen=True)
class Cost:
    """Seconds that a monitor has taken in this process.

    `worker` is beside the thread that trains, and `queueing` beside the device: they are no part of a sum with the
    others. What another process took, such as one that a run was resumed from, is not in here: seconds of two
    machines do not add up.

    Attributes
    ----------
    forward : float
        In passes of the probe, with their checks and what keeps them apart from training, without what follows. On CUDA
        the device's time, but for the first pass.
    covariance : float
        In forming covariances, those of observed and training batches too. On CUDA the device's time.
    eigenvalues : float
        In taking eigenvalues and entropies in the thread that trains.
    recording : float
        In making and keeping records, with what `on_record` took.
    waiting : float
        In waiting for the device or the worker: `flush` and what calls it, and a full ring that blocks.
    queueing : float
        Of the thread that trains, for what a CUDA device does later.
    worker : float
        Of the worker, in eigenvalues and entropies.
    evaluations : int
        Steps that were evaluated.
    share : float or None
        Part of the time between the starts of the first and the latest evaluation that the monitor took, the latest
        left out; None before there are two. Of what the device did and what the host took to queue it the longer.

    Examples
    --------
    >>> print(Cost(forward=0.024, covariance=0.002, eigenvalues=0.003, evaluations=2, share=0.01))
    1 % of the time; 14.5 ms an evaluation: forward 12, covariance 1, eigenvalues 1.5
    """

    forward: float = 0.0
    covariance: float = 0.0
    eigenvalues: float = 0.0
    recording: float = 0.0
    waiting: float = 0.0
    queueing: float = 0.0
    worker: float = 0.0
    evaluations: int = 0
    share: float | None = None

    @property
    def seconds(self) -> float:
        """What training had to wait for."""
        done = max(self.forward + self.covariance, self.queueing)
        return done + self.eigenvalues + self.recording + self.waiting

    def __str__(self) -> str:
        if not self.evaluations:
            return "no evaluation yet"
        parts = {name: getattr(self, name) for name in (*_IN_TURN, *_BESIDE)}
        text = ", ".join(f"{name} {self._each(value)}" for name, value in parts.items() if value)
        share = "" if self.share is None else f"{100 * self.share:.3g} % of the time; "
        return f"{share}{self._each(self.seconds)} ms an evaluation: {text}"

    def _each(self, seconds: float) -> str:
        milliseconds = 1e3 * seconds / self.evaluations
        return f"{milliseconds:.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"


Part = Literal["forward", "covariance", "eigenvalues", "recording", "waiting", "queueing", "worker"]
_IN_TURN: tuple[Part, ...] = ("forward", "covariance", "eigenvalues", "recording", "waiting")
_BESIDE: tuple[Part, ...] = ("queueing", "worker")


class Clock:
    """Seconds by what they were spent on. It belongs to the thread that trains.

    Examples
    --------
    >>> clock = Clock()
    >>> clock.begin(0)
    >>> with clock.part("forward"):
    ...     with clock.part("covariance"):
    ...         clock.add("worker", 0.5)
    >>> clock.cost.evaluations, clock.cost.worker, clock.cost.covariance > 0.0
    (1, 0.5, True)
    """

    def __init__(self) -> None:
        self._seconds: dict[Part, float] = dict.fromkeys((*_IN_TURN, *_BESIDE), 0.0)
        self._inner = 0.0  # of the parts that ended within the one under way
        self._steps = 0
        self._step: int | None = None
        self._first = self._latest = self._before = 0.0
        self._last: tuple[int | None, int, float, float, float] = (None, 0, 0.0, 0.0, 0.0)

    @contextmanager
    def part(self, name: Part) -> Iterator[None]:
        """Count what is done inside, but for parts within it."""
        outer, self._inner = self._inner, 0.0
        began = perf_counter()
        try:
            yield
        finally:
            took = perf_counter() - began
            self._seconds[name] += took - self._inner
            self._inner = outer + took

    def add(self, name: Part, seconds: float) -> None:
        """Count what another clock has seen."""
        self._seconds[name] += seconds

    def begin(self, step: int) -> None:
        """Note that the evaluation of `step` begins, or goes on."""
        if step == self._step:
            return
        self._last = (self._step, self._steps, self._first, self._latest, self._before)
        self._step = step
        self._before, self._latest = self.cost.seconds, perf_counter()
        if not self._steps:
            self._first = self._latest
        self._steps += 1

    def rename(self, step: int) -> None:
        """Note that the evaluation that began last is that of `step`, which was not known then."""
        self._step = step

    def cancel(self, step: int) -> None:
        """Note that the evaluation of `step`, if it began last, came to nothing. What it took stays counted."""
        if step == self._step:
            self._step, self._steps, self._first, self._latest, self._before = self._last

    @property
    def cost(self) -> Cost:
        """What was counted so far."""
        share = self._before / (self._latest - self._first) if self._latest > self._first else None
        return Cost(**self._seconds, evaluations=self._steps, share=share)
