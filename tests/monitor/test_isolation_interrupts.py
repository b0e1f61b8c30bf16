"""Ctrl-C at any instruction of a probe: it is raised, and nothing of the probe is left behind."""

import contextlib
import itertools
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo  # the probe changes the compiler's stance only where it is loaded
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from fastent.monitor import isolation
from fastent.monitor.isolation import LARGE, undisturbed
from fastent.monitor.monitor import SpectralEntropyMonitor
from fastent.process import interrupts_held


class Busy(nn.Module):
    """Changes all that a pass can change."""

    count: Tensor
    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))
        self.register_buffer("table", torch.zeros(LARGE // 4))
        self.calls = 0
        self.seen: list[int] = []
        self.generator = torch.Generator().manual_seed(1)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(self.calls)
        self.count.add_(1)
        self.table.add_(1)
        return x + torch.rand(1) + random.random() + torch.rand(1, generator=self.generator)


def make_model() -> nn.Module:
    torch.manual_seed(0)
    layers = [parametrizations.spectral_norm(nn.Linear(6, 5)), nn.BatchNorm1d(5), Busy()]
    return nn.Sequential(*layers)


def state(model: nn.Module) -> list[Any]:
    busy = model[2]
    modules = list(model.modules())
    return [
        [module.training for module in modules],
        [len(module._forward_hooks) for module in modules],
        [id(buffer) for buffer in model.buffers()],
        [(buffer._version, buffer.sum().item()) for buffer in model.buffers()],
        [buffer.data_ptr() for buffer in model.buffers()],
        (busy.calls, list(busy.seen), busy.generator.get_state().tolist()),
        (torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())),  # noqa: NPY002
        (
            torch.is_grad_enabled(),
            torch.is_autocast_cache_enabled(),
            torch.backends.mha.get_fastpath_enabled(),
        ),
        torch._dynamo.eval_frame._stance.stance,
        (dict(parametrize._cache), parametrize._cache_enabled),
        (signal.getsignal(signal.SIGINT), dict(isolation._owners)),
    ]


FOLDERS = (str(Path(isolation.__file__).parent), contextlib.__file__, __file__)


class Interrupting:
    """Raises SIGINT at one instruction of the code of a probe, counted from its start."""

    def __init__(self, at: int) -> None:
        self.at, self.count = at, 0

    def __call__(self, frame: FrameType, event: str, arg: Any) -> Any:
        if not frame.f_code.co_filename.startswith(FOLDERS):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            self.count += 1
            if self.count == self.at:
                signal.raise_signal(signal.SIGINT)
        return self

    def run(self, call: Callable[[], object]) -> None:
        before = sys.gettrace()
        sys._getframe().f_trace_opcodes = True  # Python 3.12 looks for one such frame when it begins to trace
        sys.settrace(self)
        try:
            call()
        finally:
            sys.settrace(before)


@pytest.fixture(autouse=True)
def _plain_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(
        isolation, "_other_threads", lambda: False
    )  # pytest-xdist's workers have one of their own
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_at_any_instruction_is_raised_and_leaves_nothing_behind() -> None:
    model = make_model()
    monitor = SpectralEntropyMonitor(model, torch.randn(12, 6), ["0", ""], every=1)
    monitor.step(0)  # what happens once
    counting = Interrupting(0)
    counting.run(lambda: monitor.step(1))
    assert counting.count > 3000
    expected = state(model)
    rng = random.Random(12)
    steps = itertools.count(2)
    for at in sorted(rng.sample(range(1, counting.count + 1), 60)):
        step = next(steps)
        with pytest.raises(KeyboardInterrupt):
            Interrupting(at).run(lambda step=step: monitor.step(step))
        assert state(model) == expected, f"interrupted at instruction {at}"
        monitor.step(step)  # as a cell that is run again
    monitor.step(next(steps))
    recorded = [(record.step, record.layer) for record in monitor.history]
    assert recorded == [(step, layer) for step in range(next(steps)) for layer in ("0", "")]


def test_a_third_ctrl_c_is_raised_wherever_it_comes() -> None:
    raised: list[str] = []

    def press() -> None:
        with interrupts_held():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            raised.append("not yet")
            signal.raise_signal(signal.SIGINT)
            raised.append("too late")

    with pytest.raises(KeyboardInterrupt):
        press()
    assert raised == ["not yet"]


def test_ctrl_c_in_a_logger_waits_until_the_step_is_recorded() -> None:
    logged: list[str] = []

    def log(record: Any) -> None:
        signal.raise_signal(signal.SIGINT) if not logged else None
        logged.append(record.layer)

    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    monitor = SpectralEntropyMonitor(model, torch.randn(12, 6), ["0", "1"], on_record=log)
    with pytest.raises(KeyboardInterrupt):
        monitor.step(0)
    assert logged == [record.layer for record in monitor.history] == ["0", "1"]


def test_ctrl_c_is_raised_when_the_pass_is_over_and_a_second_one_at_once() -> None:
    reached: list[str] = []

    class Interrupted(nn.Module):
        def __init__(self, times: int) -> None:
            super().__init__()
            self.times = times

        def forward(self, x: Tensor) -> Tensor:
            for i in range(self.times):
                signal.raise_signal(signal.SIGINT)
                reached.append(f"after {i + 1}")
            reached.append("end")
            return x

    for times, expected in ((1, ["after 1", "end"]), (2, ["after 1"]), (3, ["after 1"])):
        model = Interrupted(times)
        reached.clear()
        with pytest.raises(KeyboardInterrupt):
            SpectralEntropyMonitor(model, torch.randn(12, 6), "", every=1).step(0)
        assert reached == expected
        assert model.training
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_that_only_takes_note_is_called_once_for_each_time() -> None:
    noted: list[int] = []
    handler = lambda number, frame: noted.append(number)  # noqa: E731
    signal.signal(signal.SIGINT, handler)
    model = nn.Linear(6, 4)
    model.register_forward_hook(lambda *args: signal.raise_signal(signal.SIGINT))
    assert len(SpectralEntropyMonitor(model, torch.randn(12, 6), "", every=1, check=False).step(0)) == 1
    assert noted == [signal.SIGINT]
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL])
def test_a_handler_that_is_not_pythons_stays(handler: Any) -> None:
    signal.signal(signal.SIGINT, handler)
    with undisturbed(nn.Linear(6, 4)):
        assert signal.getsignal(signal.SIGINT) is handler


def test_a_pass_in_another_thread_leaves_the_handler_alone() -> None:
    seen: list[Any] = []

    def run() -> None:
        with undisturbed(nn.Linear(6, 4)):
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]


def test_an_error_of_the_model_is_the_context_of_an_interrupt_that_waited() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            signal.raise_signal(signal.SIGINT)
            raise ArithmeticError

    with pytest.raises(KeyboardInterrupt) as caught:
        SpectralEntropyMonitor(Fails(), torch.randn(12, 6), "").step(0)
    assert isinstance(caught.value.__context__, ArithmeticError)
