"""Deferred evaluation on every machine there is: a busy device, a full ring, failures, ends; `machines` has the list.

Without a GPU the device is the CPU behind a clock that the test turns; with one (``-m gpu``) the same tests hold the
real device by a kernel that sleeps.
"""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from machines import MACHINES, Machine, ask, make, take_slots
from torch import Tensor, nn

from fastent import SpectralEntropyMonitor as Monitor
from fastent import Status, spectral_entropy
from fastent.entropy import SpectralEntropy
from fastent.monitor import deferred
from fastent.monitor.deferred import DeferredEntropy
from fastent.records import EntropyRecord


@pytest.fixture(params=MACHINES)
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return make(request.param, monkeypatch)


def activations(machine: Machine, seed: int = 0, n: int = 48, d: int = 6) -> Tensor:
    h = torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) * torch.arange(1, d + 1)
    return h.to(machine.device)


def net(machine: Machine) -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4)).to(machine.device)


def assert_close(ours: SpectralEntropy | EntropyRecord, h: Tensor) -> None:
    expected = spectral_entropy(h.cpu())
    assert ours.status is expected.status
    assert ours.normalized == pytest.approx(expected.normalized, abs=1e-12)
    assert ours.participation_ratio == pytest.approx(expected.participation_ratio, rel=1e-12)


# A busy device


def test_a_step_returns_while_the_device_is_busy_and_its_records_are_right(machine: Machine) -> None:
    model, probe = net(machine), activations(machine)
    monitor = Monitor(model, probe, ["0", "2"], every=1)
    monitor.step(0)  # compiles, allocates
    machine.release()
    monitor.flush()
    machine.hold()
    with machine.no_wait():
        assert monitor.step(1) == []
        assert monitor.step(1) == []
    assert machine.busy()
    assert monitor.pending == 1
    machine.release()
    first, second = monitor.flush()
    with torch.no_grad():
        assert_close(first, model[:1](probe))
        assert_close(second, model(probe))
    monitor.close()


@pytest.mark.parametrize("tokens", ["flatten", "first", "last", "mean", "skip_first"])
def test_padding_is_left_out_without_waiting_for_the_device_and_the_record_says_so(
    machine: Machine, tokens: Any
) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = net(machine)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.body(x)

    model, x = Model(), activations(machine, n=240).reshape(48, 5, 6)
    mask = (torch.arange(5) < torch.arange(48)[:, None] % 5 + 1).to(machine.device)
    monitor = Monitor(model, {"x": x, "attention_mask": mask}, "body.0", every=1, tokens=tokens)
    monitor.step(0)  # compiles, allocates, reads the mask
    machine.release()
    monitor.flush()
    machine.hold()
    with machine.no_wait():
        assert monitor.step(1) == []
    machine.release()
    (record,) = monitor.flush()
    with torch.no_grad():
        h = model.body[0](x).cpu()
    expected = spectral_entropy(h, tokens=tokens, mask=mask.cpu())
    assert record.mask == "attention_mask"
    assert record.n == expected.n
    assert record.normalized == pytest.approx(expected.normalized, abs=1e-12)
    monitor.close()


def test_a_full_ring_drops_and_counts_while_the_device_is_busy(machine: Machine) -> None:
    evaluations = DeferredEntropy(capacity=3)
    inputs = [activations(machine, seed) for seed in range(3)]
    take_slots(machine, inputs[0], 3)
    machine.hold()
    with machine.no_wait():
        assert all(ask(evaluations, step, a=h) for step, h in enumerate(inputs))
        with pytest.warns(RuntimeWarning, match="the evaluation of step 3 was dropped: 3 are waiting"):
            assert not ask(evaluations, 3, a=inputs[0])
        assert not ask(evaluations, 4, a=inputs[0])  # a second warning would be an error here
    assert machine.busy()
    assert (evaluations.dropped, evaluations.pending) == (2, 3)
    machine.release()
    evaluations.close()
    results = dict(evaluations.arrived())
    assert list(results) == [0, 1, 2]
    for step, h in enumerate(inputs):
        assert_close(results[step]["a"].entropy, h)


def test_a_full_ring_that_is_told_to_block_waits_for_the_device_and_drops_nothing(machine: Machine) -> None:
    evaluations = DeferredEntropy(capacity=2, on_full="block")
    h = activations(machine)
    take_slots(machine, h, 3)
    machine.hold()
    for step in range(2):
        ask(evaluations, step, a=h)
    assert machine.busy()
    machine.release(after=0.05)
    assert ask(evaluations, 2, a=h)
    assert not machine.busy()
    machine.release()
    evaluations.close()
    assert [step for step, _ in evaluations.arrived()] == [0, 1, 2]
    assert evaluations.dropped == 0


def test_activations_that_are_overwritten_and_freed_do_not_reach_the_records(machine: Machine) -> None:
    monitor = Monitor()
    expected = []
    for step in range(40):
        h = activations(machine, step)
        expected.append(h.cpu().clone())
        monitor.observe(step, h, layer="a")
        h.fill_(torch.nan)
        del h
        torch.full((48, 48), torch.nan, dtype=torch.float64, device=machine.device)  # takes freed memory
        if step % 8 == 7:
            machine.release()
            monitor.flush()
    monitor.close()
    assert monitor.dropped == 0
    for record, h in zip(monitor.history, expected, strict=True):
        assert_close(record, h)


@pytest.mark.parametrize(("n", "d"), [(512, 24), (24, 40)])
def test_many_evaluations_beside_other_work_have_the_same_bits(machine: Machine, n: int, d: int) -> None:
    monitor, h = Monitor(), activations(machine, 0, n, d)
    for step in range(160):
        machine.disturb()
        monitor.observe(step, h, layer="a")
        if step % 8 == 7:
            machine.release()
            monitor.flush()
    monitor.close()
    numbers = {(record.normalized, record.participation_ratio) for record in monitor.history}
    assert (len(monitor.history), len(numbers)) == (160, 1)


def test_evaluations_from_two_streams_do_not_disturb_each_other(machine: Machine) -> None:
    evaluations = DeferredEntropy(capacity=100)
    inputs = {name: activations(machine, seed, 300, 20) for seed, name in enumerate(("one", "two"))}
    if machine.device.type == "cuda":
        torch.cuda.synchronize()
    for step in range(20):
        for name, h in inputs.items():
            with machine.stream(name):
                ask(evaluations, step, **{name: h})
    machine.release()
    evaluations.close()
    results = list(evaluations.arrived())
    assert len(results) == 40
    for _, layers in results:
        for name, result in layers.items():
            assert_close(result.entropy, inputs[name])


def test_features_that_are_not_finite_are_named(machine: Machine) -> None:
    monitor, h = Monitor(on_nonfinite="raise"), activations(machine)
    h[40, 3] = torch.inf
    monitor.observe(0, h, layer="a")
    machine.release()
    with pytest.raises(FloatingPointError, match="NaN or Inf in 1 of 6 features, the first is feature 3"):
        monitor.flush()
    assert monitor.history[0].status is Status.NONFINITE
    monitor.close()


# Failures in the worker


def test_an_error_in_the_worker_is_raised_by_flush_with_its_step_and_the_others_are_kept(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    solve = deferred.entropy_of_matrix

    def fails_once(*args: Any, **kwargs: Any) -> SpectralEntropy:
        monkeypatch.setattr(deferred, "entropy_of_matrix", solve)
        raise MemoryError("no room")

    monitor, h = Monitor(), activations(machine)
    take_slots(machine, h, 3)
    monkeypatch.setattr(deferred, "entropy_of_matrix", fails_once)
    machine.hold()
    for step in range(3):
        monitor.observe(step, h, layer="a")
    machine.release()
    with pytest.raises(RuntimeError, match="evaluation of step 0 failed: MemoryError: no room"):
        monitor.flush()
    assert [record.step for record in monitor.flush()] == [1, 2]
    monitor.observe(3, h, layer="a")
    machine.release()
    assert [record.step for record in monitor.flush()] == [3]
    monitor.close()


@pytest.mark.parametrize("failure", [None, "raises", "wrong"])
@pytest.mark.parametrize("name", MACHINES)
def test_many_matrices_are_solved_by_the_device_and_by_lapack_where_that_fails(
    name: str, failure: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = make(name, monkeypatch, batched=True)
    right: Callable[..., Tensor] = machine.streams_type.solve

    def wrong(self: Any, matrices: list[Tensor]) -> Tensor:
        if failure == "raises":
            raise torch.linalg.LinAlgError("cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR")
        return right(self, matrices) * 1.001

    if failure:
        monkeypatch.setattr(machine.streams_type, "solve", wrong)
    monkeypatch.setattr(deferred, "fallbacks", fallbacks := [])
    evaluations = DeferredEntropy()
    inputs = {str(seed): activations(machine, seed) for seed in range(deferred.BATCH_FROM)}
    ask(evaluations, 0, **inputs)
    machine.release()
    evaluations.close()
    ((_, results),) = evaluations.arrived()
    for layer, h in inputs.items():
        assert_close(results[layer].entropy, h)
        assert results[layer].entropy.solver == f"{'lapack' if failure else 'cusolver'} (covariance)"
    assert len(fallbacks) == {None: 0, "raises": 1, "wrong": deferred.BATCH_FROM}[failure]


@pytest.mark.gpu
def test_in_line_on_a_gpu_lapack_takes_over_where_cusolver_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    solve = torch.linalg.eigvalsh

    def fails(matrix: Tensor, UPLO: str) -> Tensor:
        if matrix.device.type == "cuda":
            raise torch.linalg.LinAlgError("cusolver error: CUSOLVER_STATUS_EXECUTION_FAILED")
        return solve(matrix, UPLO=UPLO)

    monkeypatch.setattr(torch.linalg, "eigvalsh", fails)
    monkeypatch.setattr(sys.modules["fastent.linalg"], "fallbacks", fallbacks := [])
    monkeypatch.setattr(sys.modules["fastent.linalg"], "LAPACK_TO", 39)
    h = torch.randn(300, 40, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    result = spectral_entropy(h)
    assert result.solver == "lapack (covariance)"
    assert len(fallbacks) == 1
    assert_close(result, h)


# Ends


def test_leaving_by_an_exception_waits_for_the_device_and_keeps_the_records(machine: Machine) -> None:
    monitor, h = Monitor(), activations(machine)
    take_slots(machine, h, 3)
    machine.hold()

    def train() -> None:
        with monitor:
            for step in range(3):
                monitor.observe(step, h, layer="a")
            assert machine.busy()
            machine.release(after=0.05)
            raise ArithmeticError("diverged")

    with pytest.raises(ArithmeticError, match="diverged"):
        train()
    assert not machine.busy()
    assert [record.step for record in monitor.history] == [0, 1, 2]
    assert_close(monitor.history[2], h)


def test_a_checkpoint_waits_for_the_device_and_holds_what_was_asked_for(machine: Machine) -> None:
    monitor, h = Monitor(threshold=0.5), activations(machine)
    take_slots(machine, h, 1)
    machine.hold()
    monitor.observe(7, h, layer="a")
    assert machine.busy()
    machine.release(after=0.05)
    state = monitor.state_dict()
    assert not machine.busy()
    resumed = Monitor(threshold=0.5)
    resumed.load_state_dict(state)
    assert monitor.flush() == monitor.history == resumed.history
    assert_close(resumed.history[0], h)
    monitor.close()


@pytest.mark.filterwarnings("default")  # a compiler's warnings are not ours
def test_a_compiled_model_under_autocast_is_followed_and_trains_as_without(machine: Machine) -> None:
    kind = machine.device.type
    # On the CPU the compiler's front end and autograd; its C++ back end takes minutes.
    compiled: Any = torch.compile(net(machine), backend="inductor" if kind == "cuda" else "aot_eager")
    probe, x = activations(machine), activations(machine, 1)
    y = torch.randint(4, (48,), generator=torch.Generator().manual_seed(0)).to(machine.device)
    start = {name: value.clone() for name, value in compiled.state_dict().items()}

    def train(watch: bool) -> tuple[list[Tensor], list[EntropyRecord]]:
        compiled.load_state_dict(start)
        optimizer = torch.optim.AdamW(compiled.parameters())
        monitor = Monitor(compiled, probe, "1", every=2)
        for step in range(6):
            with torch.autocast(kind, dtype=torch.bfloat16):
                loss = nn.functional.cross_entropy(compiled(x), y)
                if watch:
                    monitor.step(step)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        machine.release()
        monitor.close()
        return [value.clone() for value in compiled.state_dict().values()], list(monitor.history)

    try:
        without, nothing = train(watch=False)
        weights, history = train(watch=True)
    finally:
        torch.compiler.reset()
    assert nothing == []
    assert all(torch.equal(one, two) for one, two in zip(weights, without, strict=True))
    assert [record.step for record in history] == [0, 2, 4]
    compiled.load_state_dict(start)
    with torch.autocast(kind, dtype=torch.bfloat16), torch.no_grad():
        assert_close(history[0], compiled._orig_mod[:2](probe))
