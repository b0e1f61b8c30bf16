"""A device whose clock the test turns: work on its side stream happens when `tick` is called, and not before."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class FakeEvent:
    """Passed or not; it has no way to be waited for."""

    def __init__(self, clock: threading.Lock) -> None:
        self.passed = True
        self.time = 0.0
        self.error: RuntimeError | None = None
        self._clock = clock

    def query(self) -> bool:
        if self.error is not None:
            raise self.error
        with self._clock:
            return self.passed


class FakeStreams:
    """The interface of a device over ordinary tensors; `batched` says whether it can solve."""

    def __init__(self, *, batched: bool = False) -> None:
        self.batched = batched
        self.calls: Counter[str] = Counter()
        self.events: list[FakeEvent] = []
        self.threads: set[int] = set()
        self.solved: list[int] = []
        self._clock = threading.Lock()  # a tick is one instant
        self._queue: deque[Callable[[], None] | FakeEvent] = deque()

    def current(self) -> str:
        return "training"

    def event(self) -> FakeEvent:
        self.calls["event"] += 1
        self.events.append(FakeEvent(self._clock))
        return self.events[-1]

    def stamp(self) -> FakeEvent:
        return FakeEvent(self._clock)

    def mark(self, stamp: FakeEvent) -> None:  # type: ignore[override]
        """Training's own stream is done at once; each stamp is a second after the one before."""
        self.calls["mark"] += 1
        stamp.time = float(self.calls["mark"])

    def seconds(self, first: FakeEvent, second: FakeEvent) -> float:  # type: ignore[override]
        assert first.passed
        assert second.passed
        return second.time - first.time

    def pinned(self, size: int) -> Tensor:
        self.calls["pinned"] += 1
        # Finite: to be read too early must show in the values.
        return torch.full((size,), 7.0, dtype=torch.float64)

    @contextmanager
    def aside(self, block: Tensor, after: FakeEvent) -> Iterator[None]:  # type: ignore[override]
        self.calls["aside"] += 1
        self.threads.add(threading.get_ident())
        yield

    def copy(self, source: Tensor, target: Tensor) -> None:
        self.calls["copy"] += 1
        self._queue.append(lambda: target.copy_(source))  # type: ignore[arg-type, return-value]

    def record(self, event: FakeEvent) -> None:  # type: ignore[override]
        self.calls["record"] += 1
        event.passed = False
        self._queue.append(event)

    def query(self, event: FakeEvent) -> bool:  # type: ignore[override]
        return event.query()

    def solve(self, matrices: list[Tensor]) -> Tensor:
        self.solved.append(len(matrices))
        return torch.linalg.eigvalsh(torch.stack(matrices).mT, UPLO="U")

    def tick(self, count: int | None = None) -> None:
        """Let the side stream run past `count` events, by default to its end."""
        with self._clock:
            while self._queue and count != 0:
                item = self._queue.popleft()
                if isinstance(item, FakeEvent):
                    item.passed = True
                    count = None if count is None else count - 1
                else:
                    item()


class OnDevice(Tensor):
    """A tensor that says it is on CUDA, and computes on the CPU; `waits` counts what would stop the host, by name."""

    waits: ClassVar[Counter[str]] = Counter()
    is_cuda = True
    content: Tensor

    @staticmethod
    def __new__(cls, content: Tensor) -> OnDevice:
        made: OnDevice = Tensor._make_wrapper_subclass(
            cls, content.shape, content.stride(), content.storage_offset(), dtype=content.dtype
        )
        made.content = content
        return made

    def cpu(self) -> Tensor:  # type: ignore[override]
        self.waits["copy"] += 1
        return self.content

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if (name := func.overloadpacket.__name__) in Operations.WAIT:
            cls.waits[name] += 1
        args, kwargs = tree_map_only(OnDevice, lambda tensor: tensor.content, (args, kwargs or {}))
        return tree_map_only(Tensor, cls, func(*args, **kwargs))


class Operations(TorchDispatchMode):
    """Counts the operations of this thread, and fails on one that would wait for a device."""

    WAIT = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "_linalg_eigh", "masked_select")

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__
        assert name not in self.WAIT, f"{name} stops the host"
        self.seen[name] += 1
        return func(*args, **(kwargs or {}))
