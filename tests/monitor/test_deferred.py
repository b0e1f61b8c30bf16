"""Deferred evaluation on a device whose clock the test turns: order, overflow, flush, exceptions, counters."""

import copy
import ctypes
import gc
import pickle
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing
from types import SimpleNamespace
from typing import Any

import machines
import pytest
import torch
from fake_device import FakeEvent, FakeStreams, Operations
from machines import ask
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from fastent import Status, spectral_entropy
from fastent.covariance import centered_matrix
from fastent.entropy import SpectralEntropy
from fastent.kernels.launch import Launch
from fastent.linalg import fallbacks
from fastent.monitor import deferred
from fastent.monitor.deferred import (
    CudaStreams,
    DeferredEntropy,
    Devices,
    Host,
    KernelFormer,
    Ring,
    TorchFormer,
    in_line,
    spread_of,
)

FORMERS = [TorchFormer, pytest.param(KernelFormer, marks=pytest.mark.interpreter)]


def activations(seed: int, n: int = 24, d: int = 6) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) * torch.arange(1, d + 1)


@pytest.fixture
def streams() -> FakeStreams:
    return FakeStreams()


@pytest.fixture
def make(streams: FakeStreams) -> Iterator[Callable[..., DeferredEntropy]]:
    """Make evaluations on the fake device; at the end its clock runs out and they are closed."""
    made = []

    def build(**settings: Any) -> DeferredEntropy:
        slots = Ring(streams, TorchFormer())
        made.append(DeferredEntropy(device_of=lambda x: slots, **settings))
        return made[-1]

    yield build
    for evaluations in made:
        streams.tick()
        evaluations.close()


def arrived(evaluations: DeferredEntropy) -> dict[int, dict[str, SpectralEntropy]]:
    return {
        step: {layer: result.entropy for layer, result in results.items()}
        for step, results in evaluations.arrived()
    }


def assert_same(ours: SpectralEntropy, theirs: SpectralEntropy, *, bits: bool = True) -> None:
    for name in ("normalized", "entropy", "effective_rank", "total_variance", "status", "flags", "n", "d"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert torch.equal(ours.eigenvalues, theirs.eigenvalues)
    # Of the device's norms, not of the eigenvalues: the same to rounding.
    assert ours.participation_ratio == pytest.approx(theirs.participation_ratio, rel=1e-12)


class Driver:
    """Stands in for libcuda: notes the mode and the thread of each call."""

    def __init__(self, answer: int = 0) -> None:
        self.answer = answer
        self.log: list[tuple[str, str]] = []

    def load(self, name: str, real: Any = ctypes.CDLL) -> Any:
        return self if name == "libcuda.so.1" else real(name)

    def cuThreadExchangeStreamCaptureMode(self, mode: Any) -> int:
        self.log.append((f"mode {mode._obj.value}", threading.current_thread().name))
        return self.answer


class Queried(FakeStreams):
    query = CudaStreams.query  # type: ignore[assignment]


# Captures


def test_the_worker_ignores_captures_by_others_once_and_before_its_first_query(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver, streams = Driver(), Queried()
    query = FakeEvent.query

    def noted(event: FakeEvent) -> bool:
        driver.log.append(("query", threading.current_thread().name))
        return query(event)

    monkeypatch.setattr(ctypes, "CDLL", driver.load)
    monkeypatch.setattr(FakeEvent, "query", noted)
    rings = [Ring(streams, TorchFormer()), Ring(Queried(), TorchFormer())]  # a host may have two devices
    places = [Host(), *rings, rings[0]]
    evaluations = DeferredEntropy(device_of=lambda x: places.pop(0))
    with closing(evaluations):
        for step in range(4):
            ask(evaluations, step, a=activations(step))
            for ring in rings:
                ring._streams.tick()  # type: ignore[attr-defined]
            evaluations.flush()
    calls, threads = zip(*driver.log, strict=True)
    assert calls == ("mode 1", *["query"] * (len(calls) - 1))
    assert len(calls) > 4
    assert set(threads) == {deferred.THREAD_NAME}


@pytest.mark.parametrize(
    ("library", "level", "words"),
    [
        (OSError("libcuda.so.1: no such file"), "DEBUG", "libcuda.so.1: no such file"),
        (SimpleNamespace(), "DEBUG", "has no attribute 'cuThreadExchangeStreamCaptureMode'"),
        (
            Driver(answer=3),
            "WARNING",
            "returned 3: capture CUDA graphs with capture_error_mode='thread_local'",
        ),
    ],
    ids=["missing", "old", "refused"],
)
def test_a_driver_that_cannot_ignore_captures_is_logged_and_queries_go_on(
    library: Any, level: str, words: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def load(name: str) -> Any:
        if isinstance(library, OSError):
            raise library
        return library

    event = FakeEvent(threading.Lock())
    monkeypatch.setattr(deferred, "_thread", deferred._Thread())  # this thread's own is not touched
    monkeypatch.setattr(ctypes, "CDLL", load)
    with caplog.at_level("DEBUG", "fastent.monitor.deferred"):
        assert Queried().query(event)
        assert Queried().query(event)
    (record,) = caplog.records
    assert record.levelname == level
    assert words in record.getMessage()


# Order


def test_nothing_arrives_before_the_device_is_done_and_then_all_in_the_order_of_the_steps(
    make: Any, streams: FakeStreams
) -> None:
    evaluations = make()
    for step in range(4):
        ask(evaluations, step, a=activations(step), b=activations(step + 10, 5, 9))
    time.sleep(0.02)
    assert arrived(evaluations) == {}
    assert evaluations.pending == 4
    streams.tick(2)  # one evaluation has two matrices
    assert evaluations.flush(0.02) is False
    assert list(arrived(evaluations)) == [0]
    streams.tick()
    assert evaluations.flush() is True
    results = arrived(evaluations)
    assert list(results) == [1, 2, 3]
    for step, layers in results.items():
        assert list(layers) == ["a", "b"]
        assert_same(layers["a"], spectral_entropy(activations(step)))
        assert_same(layers["b"], spectral_entropy(activations(step + 10, 5, 9)))  # the Gram side
    assert evaluations.pending == 0


def test_a_result_that_is_known_keeps_its_place_behind_those_that_are_not(
    make: Any, streams: FakeStreams
) -> None:
    evaluations = make()
    ask(evaluations, 0, a=activations(0))
    known = spectral_entropy(activations(1))
    with evaluations.open(1) as opened:
        opened.put("a", known)
    assert arrived(evaluations) == {}
    streams.tick()
    evaluations.flush()
    results = arrived(evaluations)
    assert list(results) == [0, 1]
    assert results[1]["a"] is known


def test_the_participation_ratio_comes_from_the_device() -> None:
    for h, scale in (
        (activations(0), 1.0),
        (activations(1), 1e80),
        (activations(2), 1e-120),
        (activations(3, 5, 9), 1.0),
    ):
        h = h.double() * scale
        centered = centered_matrix(h)
        poisoned = centered.matrix.clone()
        m = poisoned.shape[0]
        poisoned[torch.triu(torch.ones(m, m, dtype=torch.bool), 1)] = torch.nan
        trace, _, ratio = spread_of(poisoned).tolist()
        expected = spectral_entropy(h)
        assert trace == pytest.approx(expected.total_variance, rel=1e-14)
        assert ratio == pytest.approx(expected.participation_ratio, rel=1e-12)


# A full ring


def test_a_full_ring_drops_before_anything_is_computed_counts_and_warns_once(
    make: Any, streams: FakeStreams
) -> None:
    evaluations = make(capacity=2)
    assert ask(evaluations, 0, a=activations(0))
    assert ask(evaluations, 1, a=activations(1))
    calls = dict(streams.calls)
    with pytest.warns(RuntimeWarning, match="the evaluation of step 2 was dropped: 2 are waiting") as caught:
        assert not ask(evaluations, 2, a=activations(2))
    assert caught[0].filename == machines.__file__  # of the caller, who is `ask`
    assert not ask(evaluations, 3, a=activations(3))  # a second warning would be an error here
    assert evaluations.dropped == 2
    assert dict(streams.calls) == calls
    streams.tick()
    evaluations.flush()
    assert ask(evaluations, 4, a=activations(4))
    streams.tick()
    evaluations.flush()
    assert list(arrived(evaluations)) == [0, 1, 4]


def test_a_full_ring_that_blocks_waits_for_room_and_drops_nothing(make: Any, streams: FakeStreams) -> None:
    evaluations = make(capacity=2, on_full="block")
    for step in range(2):
        ask(evaluations, step, a=activations(step))
    timer = threading.Timer(0.05, streams.tick, args=(1,))
    start = time.monotonic()
    timer.start()
    assert ask(evaluations, 2, a=activations(2))
    assert time.monotonic() - start >= 0.05
    timer.join()
    streams.tick()
    evaluations.flush()
    assert list(arrived(evaluations)) == [0, 1, 2]
    assert evaluations.dropped == 0


def test_a_known_result_needs_no_room(make: Any) -> None:
    evaluations = make(capacity=1)
    ask(evaluations, 0, a=activations(0))
    with evaluations.open(1, needs_room=False) as opened:
        opened.put("a", spectral_entropy(activations(1)))
    assert evaluations.pending == 2
    assert evaluations.dropped == 0


def test_on_the_cpu_a_full_ring_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    solve = deferred.entropy_of_rows
    monkeypatch.setattr(deferred, "entropy_of_rows", lambda *a, **k: gate.wait(10) and solve(*a, **k))
    host = Host()
    evaluations = DeferredEntropy(capacity=1, device_of=lambda x: host)
    ask(evaluations, 0, a=activations(0))
    threading.Timer(0.05, gate.set).start()
    assert ask(evaluations, 1, a=activations(1))
    evaluations.close()
    assert list(arrived(evaluations)) == [0, 1]


@pytest.mark.parametrize("settings", [{"capacity": 0}, {"on_full": "wait"}])
def test_bad_settings_are_refused(settings: Any) -> None:
    with pytest.raises(ValueError, match=r"at least 1; got 0|'drop' or 'block'; got 'wait'"):
        DeferredEntropy(**settings)


# Exceptions


def test_an_error_of_the_device_is_raised_at_its_turn_with_its_step_and_the_rest_still_arrives(
    make: Any, streams: FakeStreams
) -> None:
    evaluations = make()
    for step in (100, 200, 300):
        ask(evaluations, step, a=activations(step))
    streams.tick()
    evaluations.flush()
    arrived(evaluations)
    for step in (400, 500, 600):
        ask(evaluations, step, a=activations(step))
    streams.events[1].error = RuntimeError("CUDA error: an illegal memory access was encountered")
    streams.tick()
    evaluations.flush()
    taken = evaluations.arrived()
    assert next(taken)[0] == 400
    with pytest.raises(
        RuntimeError, match=r"evaluation of step 500 failed: RuntimeError: CUDA error"
    ) as caught:
        next(taken)
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert list(arrived(evaluations)) == [600]
    streams.events[1].error = None
    for step in (700, 800, 900):  # its slot came back
        ask(evaluations, step, a=activations(step))
    assert streams.calls["event"] == 3


def test_an_error_of_the_solver_is_raised_with_its_step_and_the_worker_goes_on(
    make: Any, streams: FakeStreams, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluations = make()
    solve = deferred.entropy_of_matrix

    def fails_once(*args: Any, **kwargs: Any) -> SpectralEntropy:
        monkeypatch.setattr(deferred, "entropy_of_matrix", solve)
        raise MemoryError("no room")

    monkeypatch.setattr(deferred, "entropy_of_matrix", fails_once)
    ask(evaluations, 7, a=activations(0))
    ask(evaluations, 8, a=activations(1))
    streams.tick()
    evaluations.flush()
    with pytest.raises(RuntimeError, match="evaluation of step 7 failed: MemoryError: no room"):
        arrived(evaluations)
    assert_same(arrived(evaluations)[8]["a"], spectral_entropy(activations(1)))


def test_a_copy_that_went_wrong_is_seen_by_the_trace(make: Any, streams: FakeStreams) -> None:
    evaluations = make()
    ask(evaluations, 5, a=activations(0))
    streams.events[0].passed = True  # the event lies: nothing has been copied but the fill of new memory
    evaluations.flush()
    with pytest.raises(RuntimeError, match=r"step 5 failed.*the trace on the device was 7.0"):
        arrived(evaluations)


def test_a_failure_while_a_step_is_put_together_leaves_nothing_of_it(make: Any, streams: FakeStreams) -> None:
    evaluations = make()
    for _ in range(3):
        with pytest.raises(ValueError, match="at least 2 samples"):
            ask(evaluations, 1, good=activations(0), bad=torch.zeros(1, 6))
    assert evaluations.pending == 0
    assert streams.calls["event"] == 1  # one slot, given back each time
    ask(evaluations, 1, good=activations(4))
    streams.tick()  # the copies of the failed ones are still queued, before those of this one
    evaluations.flush()
    assert_same(arrived(evaluations)[1]["good"], spectral_entropy(activations(4)))


def test_not_finite_constant_and_extreme_activations_have_their_status_without_a_solve(
    make: Any, streams: FakeStreams
) -> None:
    evaluations = make()
    nan = activations(0).clone()
    nan[3, 2] = torch.nan
    ask(evaluations, 0, nan=nan, constant=torch.ones(8, 3), tiny=activations(1).double() * 1e-200)
    streams.tick()
    evaluations.flush()
    results = arrived(evaluations)[0]
    assert results["nan"].status is Status.NONFINITE
    assert results["constant"].status is Status.ZERO_VARIANCE
    assert results["tiny"].status is Status.OUT_OF_RANGE  # fault 17: the activations are gone
    assert {result.solver for result in results.values()} == {"none"}


@pytest.mark.parametrize("former", FORMERS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(("n", "d"), [(90, 40), (24, 40)])
def test_features_that_are_not_finite_are_counted_and_the_first_is_named(
    streams: FakeStreams, former: Any, bad: float, n: int, d: int
) -> None:
    slots = Ring(streams, former())
    evaluations = DeferredEntropy(device_of=lambda x: slots)
    h = activations(0, n, d).half()
    h[n - 1, 31] = h[0, 7] = h[5, 7] = bad
    with Operations():  # that are no waits
        ask(evaluations, 0, a=h)
    streams.tick()
    evaluations.close()
    result = arrived(evaluations)[0]["a"]
    assert result.status is Status.NONFINITE
    assert result.message == (
        "NaN or Inf in 2 of 40 features, the first is feature 7 (torch.float16); "
        "the activations are gone: mode='sync' counts the entries"
    )


@pytest.mark.parametrize("former", FORMERS)
def test_finite_activations_whose_squares_overflow_are_out_of_range_and_not_said_to_hold_nan(
    streams: FakeStreams, former: Any
) -> None:
    slots = Ring(streams, former())
    evaluations = DeferredEntropy(device_of=lambda x: slots)
    ask(evaluations, 0, a=activations(0).double() * 1e200)
    streams.tick()
    evaluations.close()
    result = arrived(evaluations)[0]["a"]
    assert result.status is Status.OUT_OF_RANGE
    assert "total variance inf" in result.message


# Counters


def test_the_training_thread_does_not_wait_for_the_device_and_asks_it_the_same_little_each_time(
    make: Any, streams: FakeStreams
) -> None:
    evaluations = make()
    h, wide = activations(0), activations(1, 5, 9)
    per_step = []
    for step in range(3):
        before = streams.calls.copy()
        with Operations() as operations:  # fails on an operation that stops the host
            ask(evaluations, step, a=h, b=wide)
            list(evaluations.arrived())
        per_step.append(operations.seen)
        made = streams.calls - before
        assert {name: made[name] for name in ("aside", "copy", "record")} == {
            "aside": 2,
            "copy": 2,
            "record": 2,
        }
        assert made["pinned"] == (2 if step == 0 else 0)  # the steady state allocates nothing
        assert made["event"] == (2 if step == 0 else 0)
        streams.tick()
        evaluations.flush()
        list(evaluations.arrived())
    assert per_step[1] == per_step[2]
    assert streams.threads == {threading.get_ident()}


@pytest.mark.interpreter
@pytest.mark.parametrize(("n", "d", "launches"), [(200, 32, 1), (64, 32, 1), (24, 40, 2), (24, 300, 2)])
def test_a_probe_is_one_launch_of_ours_or_two_on_the_gram_side_and_no_operation_of_torch(
    streams: FakeStreams, monkeypatch: pytest.MonkeyPatch, n: int, d: int, launches: int
) -> None:
    launched = []
    run = Launch.run

    def count(self: Launch) -> None:
        launched.append(self.kernel)
        with _disable_current_modes():  # the interpreter emulates a GPU by torch's operations
            run(self)

    monkeypatch.setattr(Launch, "run", count)
    slots = Ring(streams, KernelFormer())
    evaluations = DeferredEntropy(device_of=lambda x: slots)
    h = activations(0, n, d)
    for step in range(2):
        launched.clear()
        before = streams.calls.copy()
        with Operations() as operations:
            ask(evaluations, step, a=h)
        assert len(launched) == launches
        assert (streams.calls - before)["copy"] == 1
        streams.tick()
        evaluations.flush()
    assert set(operations.seen) <= {"detach", "select", "slice", "unsqueeze"}  # views
    evaluations.close()
    for result in arrived(evaluations).values():
        expected = spectral_entropy(h)
        assert result["a"].normalized == pytest.approx(expected.normalized, abs=1e-12)
        assert result["a"].participation_ratio == pytest.approx(expected.participation_ratio, rel=1e-12)


def test_as_many_slots_as_were_under_way_at_once_are_kept(streams: FakeStreams) -> None:
    slots = Ring(streams, TorchFormer())
    evaluations = DeferredEntropy(device_of=lambda x: slots)
    for round_ in range(3):
        for step in range(5):
            ask(evaluations, 10 * round_ + step, a=activations(step))
        streams.tick()
        evaluations.flush()
    assert slots.allocated == 5
    evaluations.close()


def test_slots_made_in_inference_mode_serve_outside_of_it(make: Any, streams: FakeStreams) -> None:
    evaluations = make()
    with torch.inference_mode():
        ask(evaluations, 0, a=activations(0))
    streams.tick()
    evaluations.flush()
    ask(evaluations, 1, a=activations(1))
    streams.tick()
    evaluations.flush()
    assert_same(arrived(evaluations)[1]["a"], spectral_entropy(activations(1)))


# Many at once


@pytest.mark.parametrize("failure", [None, "raises", "wrong"])
def test_many_matrices_of_one_size_are_solved_in_one_call_and_by_lapack_where_that_fails(
    failure: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = FakeStreams(batched=True)
    if failure:
        right = streams.solve

        def wrong(matrices: list[Tensor]) -> Tensor:
            if failure == "raises":
                raise torch.linalg.LinAlgError("cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR")
            return right(matrices) * 1.001

        monkeypatch.setattr(streams, "solve", wrong)
    slots = Ring(streams, TorchFormer())
    evaluations = DeferredEntropy(capacity=10, device_of=lambda x: slots)
    before = len(fallbacks)
    nan = torch.full((24, 6), torch.nan)
    for step in range(9):  # held up by the first, so that all wait together
        ask(
            evaluations,
            step,
            a=activations(step),
            b=activations(-step - 1),
            odd=nan,
            c=activations(step, 24, 5),
        )
    streams.tick()
    evaluations.close()
    results = arrived(evaluations)
    assert streams.solved == ([] if failure == "raises" else [18])  # not the 9 of another size, nor the NaN
    for step in range(9):
        expected = spectral_entropy(activations(step))
        assert results[step]["a"].normalized == pytest.approx(expected.normalized, abs=1e-13)
        assert results[step]["a"].solver == ("lapack (covariance)" if failure else "cusolver (covariance)")
        assert results[step]["c"].solver == "lapack (covariance)"
        assert results[step]["odd"].status is Status.NONFINITE
    assert len(fallbacks) - before == {None: 0, "raises": 1, "wrong": 18}[failure]
    del fallbacks[before:]


# Where


def test_the_cpu_takes_the_worker_for_large_matrices_of_one_thread_with_cores_to_spare(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(deferred, "_usable_cores", lambda: 2)
    large, wide, small = torch.zeros(600, 128), torch.zeros(130, 600), torch.zeros(1000, 127)
    of = Devices().of
    assert isinstance(of(large), Host)
    assert isinstance(of(wide), Host)  # its Gram matrix is 130 x 130
    assert of(small) is None
    assert in_line(large) is None
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert of(large) is None
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(deferred, "_usable_cores", lambda: 1)
    assert of(large) is None


def test_within_a_capture_nothing_is_taken_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    chosen = Devices()
    with pytest.raises(RuntimeError, match="cannot be part of a CUDA graph"):
        chosen.of(SimpleNamespace(device=torch.device("cuda", 0)))  # type: ignore[arg-type]
    assert not chosen._rings


@pytest.mark.parametrize("most_copied", [0, 10**6])
def test_on_the_cpu_the_worker_gives_the_bits_of_an_evaluation_in_line(
    most_copied: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deferred, "MOST_COPIED", most_copied)  # the matrix formed here, or all done there
    monkeypatch.setattr(deferred, "_free_cores", lambda: 3)
    host = Host()
    evaluations = DeferredEntropy(capacity=64, device_of=lambda x: host)
    cases = {
        "flat": activations(0, 300, 64),
        "gram": activations(1, 30, 70),
        "half": activations(2, 50, 20).half(),
        "offset": activations(3, 50, 20) + 3e7,
        "large": activations(4, 600, 300),
        "nan": activations(5) / 0.0,
        "constant": torch.ones(9, 4),
        "huge": activations(6).double() * 1e200,
        "tiny": activations(7).double() * 1e-200,
    }
    ask(evaluations, 0, **cases)
    evaluations.close()
    results = arrived(evaluations)[0]
    for name, h in cases.items():
        expected = spectral_entropy(h)
        got = results[name]
        assert torch.equal(got.eigenvalues, expected.eigenvalues) or name == "nan"
        for field in ("normalized", "entropy", "effective_rank", "participation_ratio", "total_variance"):
            a, b = getattr(got, field), getattr(expected, field)
            assert a == b or (a != a and b != b), (name, field)
        assert (got.status, got.flags, got.message, got.solver) == (
            expected.status,
            expected.flags,
            expected.message,
            expected.solver,
        )


def test_an_idle_worker_forms_the_matrix_of_a_copy_and_a_busy_one_is_given_the_matrix(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate = threading.Event()
    solve = deferred.entropy_of_rows
    monkeypatch.setattr(deferred, "entropy_of_rows", lambda *a, **k: gate.wait(10) and solve(*a, **k))
    host, h = Host(), activations(0, 96, 12)
    wide = activations(1, 12, 400)  # more memory than four matrices
    expected = {"h": spectral_entropy(h), "wide": spectral_entropy(wide)}
    evaluations = DeferredEntropy(device_of=lambda x: host)
    kinds = []
    for step in range(2):
        given = {"h": h.clone(), "wide": wide.clone()}
        with evaluations.open(step) as opened:  # type: ignore[union-attr]
            for layer, x in given.items():
                opened.add(layer, x)
                x.fill_(torch.nan)  # nothing of it is needed any more
            kinds.append({layer: type(staged) for layer, staged in opened.staged.items()})
    gate.set()
    evaluations.close()
    assert kinds[0] == {"h": deferred.Copied, "wide": deferred.Staged}
    assert kinds[1] == {"h": deferred.Staged, "wide": deferred.Staged}
    for results in arrived(evaluations).values():
        for layer, theirs in expected.items():
            assert_same(results[layer], theirs)


def test_layers_of_one_evaluation_are_solved_side_by_side_where_cores_are_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    together = threading.Barrier(3)
    solve, solvers = deferred.entropy_of_rows, []

    def at_once(x: Tensor, *given: Any) -> SpectralEntropy:
        together.wait(10)  # for ever broken, if fewer than three come
        solvers.append(threading.get_ident())
        return solve(x, *given)

    monkeypatch.setattr(deferred, "entropy_of_rows", at_once)
    monkeypatch.setattr(deferred, "_free_cores", lambda: 3)
    host, inputs = Host(), {str(seed): activations(seed) for seed in range(6)}
    evaluations = DeferredEntropy(device_of=lambda x: host)
    for step in range(2):
        ask(evaluations, step, **inputs)
        evaluations.flush()
    results = arrived(evaluations)
    assert [list(layers) for layers in results.values()] == [list(inputs)] * 2
    for layer, h in inputs.items():
        assert_same(results[1][layer], spectral_entropy(h))
    assert len(solvers) == 12
    assert len(set(solvers)) == 3  # the same three the second time
    evaluations.close()


def test_an_error_of_one_layer_is_that_of_the_evaluation_and_the_threads_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    solve, failing = deferred.entropy_of_rows, threading.Event()

    def fails(x: Tensor, *given: Any) -> SpectralEntropy:
        if len(x) == 25 and not failing.is_set():
            failing.set()
            raise MemoryError("no room")
        return solve(x, *given)

    monkeypatch.setattr(deferred, "entropy_of_rows", fails)
    monkeypatch.setattr(deferred, "_free_cores", lambda: 3)
    host, inputs = Host(), {str(n): activations(0, n) for n in (24, 25, 26, 27)}
    evaluations = DeferredEntropy(device_of=lambda x: host)
    ask(evaluations, 0, **inputs)
    evaluations.flush()
    with pytest.raises(RuntimeError, match="evaluation of step 0 failed: MemoryError: no room"):
        arrived(evaluations)
    ask(evaluations, 1, **inputs)
    evaluations.close()
    assert list(arrived(evaluations)[1]) == list(inputs)


@pytest.mark.parametrize(("load", "free"), [(0.0, 7), (1.2, 7), (3.0, 5), (40.0, 1)])
def test_free_cores_are_those_that_the_last_minute_left(
    load: float, free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deferred, "_usable_cores", lambda: 8)
    monkeypatch.setattr(deferred.os, "getloadavg", lambda: (load, 0.0, 0.0), raising=False)
    assert deferred._free_cores() == free
    monkeypatch.delattr(deferred.os, "getloadavg")
    assert deferred._free_cores() == 7  # not known


# Life and death


def test_discard_throws_away_what_is_under_way(make: Any, streams: FakeStreams) -> None:
    evaluations = make()
    ask(evaluations, 0, a=activations(0))
    streams.tick()
    evaluations.discard()
    assert evaluations.pending == 0
    assert arrived(evaluations) == {}
    assert evaluations.dropped == 0


def test_the_threads_end_when_it_is_closed_or_its_owner_is_collected(
    streams: FakeStreams, monkeypatch: pytest.MonkeyPatch
) -> None:
    def threads() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name == "fastent-eigenvalues"}

    monkeypatch.setattr(deferred, "_free_cores", lambda: 2)
    slots = Ring(streams, TorchFormer())
    before = threads()
    closed, dropped = (DeferredEntropy(device_of=lambda x: slots) for _ in range(2))
    for evaluations in (closed, dropped):
        ask(evaluations, 0, a=activations(0), b=activations(1))
    assert len(threads() - before) == 2
    streams.tick()
    for evaluations in (closed, dropped):
        evaluations.flush()
    assert len(threads() - before) == 4
    closed.close()
    closed.close()
    assert len(threads() - before) == 2
    assert list(arrived(closed)) == [0]
    ask(dropped, 1, a=activations(1))  # never done: the clock stands
    ref = weakref.ref(dropped)
    del dropped, evaluations
    gc.collect()
    assert ref() is None
    end = time.monotonic() + 5
    while threads() - before and time.monotonic() < end:
        time.sleep(0.01)
    assert not threads() - before


def test_a_copy_starts_empty_and_what_is_under_way_stays(streams: FakeStreams) -> None:
    evaluations = DeferredEntropy(capacity=3, on_full="block", device_of=in_line)
    ask(evaluations, 0, a=activations(0))
    evaluations.dropped = 4
    for twin in (copy.deepcopy(evaluations), pickle.loads(pickle.dumps(evaluations))):
        assert (twin.pending, twin.dropped) == (0, 4)
        ask(twin, 1, a=activations(1))
        assert list(arrived(twin)) == [1]
    assert list(arrived(evaluations)) == [0]
