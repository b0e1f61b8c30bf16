"""Where deferred evaluation runs, behind one interface: the CPU with a clock that the test turns, or a CUDA device.

A test holds the machine, asks for something, and looks whether it is still busy: then nobody has waited for it. No
clock on the wall is read.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import pytest
import torch
from fake_device import FakeStreams, Operations
from torch import Tensor

from fastent.activations import Resolution
from fastent.monitor import deferred
from fastent.monitor.deferred import CudaStreams, DeferredEntropy, Device, Devices, Ring, TorchFormer

# About half a second: long for what a host does in between, and short where a test waits for its end.
CYCLES = 1_000_000_000


class Machine(Protocol):
    device: torch.device
    streams_type: type[Any]

    def device_of(self, x: Tensor) -> Device | None:
        """What `fastent.monitor.deferred.Devices.of` answers."""

    def hold(self) -> None:
        """Keep the stream that training uses busy."""

    def busy(self) -> bool:
        """Whether it has been busy ever since."""

    def release(self, after: float = 0.0) -> None:
        """Let it go on, now or from another thread after some seconds."""

    def no_wait(self) -> Any:
        """Make it an error to wait for the device inside."""

    def stream(self, name: str) -> Any:
        """Use another stream inside."""

    def disturb(self) -> None:
        """Queue other work beside the training stream."""


class FakeMachine:
    """The CPU; copies to the host are made when the test lets them."""

    device = torch.device("cpu")
    streams_type = FakeStreams

    def __init__(self, *, batched: bool) -> None:
        self.streams = FakeStreams(batched=batched)
        self._ring = Ring(self.streams, TorchFormer())
        self._held = False

    def device_of(self, x: Tensor) -> Device:
        return self._ring

    def hold(self) -> None:
        self._held = True

    def busy(self) -> bool:
        return self._held

    def release(self, after: float = 0.0) -> None:
        if after:
            threading.Timer(after, self.release).start()
        else:
            self._held = False
            self.streams.tick()

    def no_wait(self) -> Any:
        return Operations()

    def stream(self, name: str) -> Any:
        return nullcontext()

    def disturb(self) -> None:
        pass


class CudaMachine:
    """A CUDA device; it is held by a kernel that sleeps, and goes on when that is done."""

    device = torch.device("cuda")
    streams_type = CudaStreams

    def __init__(self) -> None:
        self._devices, self._of = Devices(), Devices.of
        self._blocked = torch.cuda.Event()
        self._streams = {name: torch.cuda.Stream() for name in ("one", "two", "noise")}
        self._noise = torch.randn(2048, 2048, device="cuda")
        torch.cuda._sleep(1)  # its module is loaded now
        torch.cuda.synchronize()

    def device_of(self, x: Tensor) -> Device | None:
        return self._of(self._devices, x)

    def hold(self) -> None:
        torch.cuda.synchronize()
        torch.cuda._sleep(CYCLES)
        self._blocked.record()

    def busy(self) -> bool:
        return not self._blocked.query()

    def release(self, after: float = 0.0) -> None:
        pass

    @contextmanager
    def no_wait(self) -> Iterator[None]:
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(mode)

    def stream(self, name: str) -> Any:
        return torch.cuda.stream(self._streams[name])

    def disturb(self) -> None:
        with torch.cuda.stream(self._streams["noise"]):
            self._noise @ self._noise


MACHINES = [
    "fake",
    pytest.param("cuda", marks=pytest.mark.gpu),
    pytest.param("cuda without kernels", marks=pytest.mark.gpu),
]


def make(name: str, monkeypatch: pytest.MonkeyPatch, *, batched: bool = False) -> Machine:
    """Make the machine that every monitor of the test will use."""
    if name == "cuda without kernels":
        monkeypatch.setattr(sys.modules["fastent.covariance"], "_use_triton", lambda x, backend: False)
        monkeypatch.setattr(deferred, "triton_obstacle", lambda device: "not wanted here")
    if name != "fake":
        monkeypatch.setattr(CudaStreams, "batched", batched)
    machine = FakeMachine(batched=batched) if name == "fake" else CudaMachine()
    monkeypatch.setattr(Devices, "of", lambda self, x: machine.device_of(x))
    return machine


def ask(evaluations: DeferredEntropy, step: int, **layers: Tensor) -> bool:
    """Have the entropy of all `layers` taken at `step`; False where that was dropped."""
    opened = evaluations.open(step)
    if opened is None:
        return False
    with opened:
        for layer, h in layers.items():
            opened.add(layer, h)
    return True


def take_slots(machine: Machine, h: Tensor, count: int) -> None:
    """Have the memory of `count` evaluations allocated and the kernels compiled: both may wait for the device."""
    device = machine.device_of(h)
    assert device is not None
    staged = [device.stage(h, Resolution.of(h.dtype)) for _ in range(count)]
    machine.release()
    if machine.device.type == "cuda":
        torch.cuda.synchronize()
    for slot in staged:
        assert slot is not None
        slot.release()
