"""What only a GPU can show: races, graph capture, streams, real memory, no stop of the host. ``pytest -m gpu``.

That runs the tests of `test_deferred_machines` too: a full ring, failures and ends on a busy device. ``pytest --device
cuda`` runs the whole suite with its tensors there, properties included.
"""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastent
from fastent.covariance import centered_matrix, triton_obstacle
from fastent.kernels.covariance import ResidentCovariance
from fastent.kernels.launch import Output, partition

pytestmark = pytest.mark.gpu

EPS = torch.finfo(torch.float64).eps
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Whole and split, both sides, every entry of the launch table.
SHAPES = ((512, 128), (41, 127), (4096, 33), (700, 300), (2000, 1600), (64, 2048), (300, 1000))


@pytest.fixture(autouse=True)
def kernels_run_here() -> None:
    obstacle = triton_obstacle(torch.device("cuda", torch.cuda.current_device()))
    assert obstacle is None, obstacle


def activations(n: int, d: int, dtype: torch.dtype = torch.bfloat16, *, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(n + d)
    x = torch.randn((batch, n, d), generator=generator, dtype=torch.float64)
    return (x * torch.logspace(-1, 1, d, dtype=torch.float64) + 1.0).to(dtype).cuda()


def bits(out: Output) -> tuple[Tensor, Tensor, Tensor]:
    assert out.spread is not None
    return out.lower.tril(), out.centre[:, 2].clone(), out.spread.clone()


def assert_same(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for one, two in zip(got, want, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_matrix_and_spread_are_those_of_the_cpu(n: int, d: int, dtype: torch.dtype) -> None:
    x = activations(n, d, dtype)
    evaluator = ResidentCovariance(n, d, device=x.device)
    out = evaluator.output()
    evaluator(x, out)
    y = x[0].double().cpu()
    y = y - y.mean(0)
    y = y if evaluator.side == "covariance" else y.T
    want = y.T @ y / n
    largest = y.abs().amax(0)
    error = (out.lower[0].cpu() - want).tril().abs()
    assert (error <= EPS * (len(y) + 2) * torch.outer(largest, largest)).all()
    assert out.spread is not None
    ratio = want.trace() ** 2 / want.square().sum()
    assert out.spread[0, 2].item() == pytest.approx(ratio.item(), rel=1e-11)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(2, 700),
    d=st.integers(2, 256),
    dtype=st.sampled_from(DTYPES),
    scale=st.floats(1e-3, 1e3),
    transposed=st.booleans(),
)
def test_entropy_is_that_of_the_cpu_to_1e_12(
    n: int, d: int, dtype: torch.dtype, scale: float, transposed: bool
) -> None:
    x = (activations(n, d, torch.float64)[0] * scale).to(dtype)
    x = x.T.contiguous().T if transposed else x
    got = fastent.spectral_entropy(x, backend="triton")
    want = fastent.spectral_entropy(x.cpu(), backend="torch")
    assert abs(got.normalized - want.normalized) <= 1e-12
    assert got.status == want.status


def test_entropies_of_stacked_matrices_stop_the_host_once() -> None:
    x = activations(512, 128, torch.float32, batch=10)
    fastent.spectral_entropy(x, batch_dims=1)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchronizing") as stops:
            result = fastent.spectral_entropy(x, batch_dims=1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(stops) == 1
    assert result.solver == "lapack (covariance)"


@pytest.mark.parametrize(("n", "d"), [(512, 128), (65536, 64), (64, 2048), (2000, 1600)])
def test_many_runs_beside_other_work_have_the_same_bits(n: int, d: int) -> None:
    x = activations(n, d, batch=2)
    evaluator = ResidentCovariance(n, d, batch=2, device=x.device)
    out = evaluator.output()
    evaluator(x, out)
    want = bits(out)
    other, noise = torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda")
    for run in range(200):
        if run % 4 == 0:
            with torch.cuda.stream(other):
                noise @ noise
        out.lower.fill_(float("nan"))
        evaluator(x, out)
        assert_same(bits(out), want)
    assert evaluator.workspace.arrived is not None
    assert (evaluator.workspace.arrived == 201 * partition(evaluator.side, min(n, d), max(n, d)).tiles).all()


@pytest.mark.parametrize(("n", "d"), [(512, 128), (64, 2048)])
def test_launches_that_overlapped_spoil_none_that_comes_later(n: int, d: int) -> None:
    x = activations(n, d, batch=32)
    evaluator = ResidentCovariance(n, d, batch=32, device=x.device)
    out = evaluator.output()
    evaluator(x, out)
    want = bits(out)
    streams, outs = [torch.cuda.Stream() for _ in range(2)], [evaluator.output() for _ in range(2)]
    torch.cuda.synchronize()
    for _ in range(100):
        for stream, other in zip(streams, outs, strict=True):
            with torch.cuda.stream(stream):
                evaluator(x, other)  # forbidden: both use the same scratch memory
    torch.cuda.synchronize()
    for _ in range(10):
        out.block.fill_(float("nan"))
        evaluator(x, out)
        assert_same(bits(out), want)


@pytest.mark.parametrize(("n", "d"), [(512, 128), (41, 127), (2000, 1600)])
def test_a_captured_evaluation_replays_with_the_bits_of_a_plain_one(n: int, d: int) -> None:
    first, second = activations(n, d), activations(n, d).flip(1).contiguous()
    x = first.clone()
    evaluator = ResidentCovariance(n, d, device=x.device)
    out, plain = evaluator.output(), evaluator.output()
    evaluator(x, out)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        evaluator(x, out)
    for values in (second, first, second):
        x.copy_(values)
        graph.replay()
        replayed = bits(out)
        evaluator(values, plain)
        assert_same(replayed, bits(plain))


def test_evaluations_on_two_streams_do_not_disturb_each_other() -> None:
    shapes = ((4096, 128), (300, 1000))
    inputs = [activations(*shape) for shape in shapes]
    evaluators = [
        ResidentCovariance(*shape, device=x.device) for shape, x in zip(shapes, inputs, strict=True)
    ]
    want = []
    for evaluator, x in zip(evaluators, inputs, strict=True):
        out = evaluator.output()
        evaluator(x, out)
        want.append(bits(out))
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in shapes]
    outs = [[evaluator.output() for _ in range(20)] for evaluator in evaluators]
    torch.cuda.synchronize()
    for run in range(20):
        for stream, evaluator, x, ring in zip(streams, evaluators, inputs, outs, strict=True):
            with torch.cuda.stream(stream):
                evaluator(x, ring[run])
    torch.cuda.synchronize()
    for ring, expected in zip(outs, want, strict=True):
        for out in ring:
            assert_same(bits(out), expected)


def test_an_evaluation_takes_no_memory_and_does_not_wait_for_the_device() -> None:
    x = activations(512, 128)
    evaluator = ResidentCovariance(512, 128, device=x.device)
    out = evaluator.output()
    evaluator(x, out)
    torch.cuda._sleep(1)
    blocked = torch.cuda.Event()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(1_000_000_000)  # half a second
        blocked.record()
        evaluator(x, out)
        assert not blocked.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@pytest.mark.parametrize("axis", ["rows", "columns", "batch"])
def test_offsets_beyond_2_31_elements_reach_the_right_values(axis: str) -> None:
    elements = 2**31 + 2**20
    free, _ = torch.cuda.mem_get_info()
    if free < 2 * elements + 2**31:
        pytest.skip(f"{free} bytes of GPU memory free; this needs {2 * elements + 2**31}")
    storage = torch.zeros(elements, dtype=torch.float16, device="cuda")
    values = activations(3, 5, torch.float16, batch=2)
    far = 2**30 + 2**10
    strides = {"rows": (64, far, 1), "columns": (64, 8, 2**29), "batch": (2**31, 8, 1)}[axis]
    view = storage.as_strided(values.shape, strides)
    view.copy_(values)
    for side in ("covariance", "gram"):
        got = centered_matrix(view, backend="triton", side=side).matrix.tril()  # type: ignore[arg-type]
        assert torch.equal(got, centered_matrix(values, backend="triton", side=side).matrix.tril())  # type: ignore[arg-type]


def test_a_matrix_of_more_than_2_31_elements_is_right_where_it_is_looked_at() -> None:
    n, d = 2**31 // 4096 + 4096, 4096
    free, _ = torch.cuda.mem_get_info()
    if free < 2 * n * d + 2**32:
        pytest.skip(f"{free} bytes of GPU memory free; this needs {2 * n * d + 2**32}")
    x = torch.randn(n, d, device="cuda", dtype=torch.bfloat16)
    lower = centered_matrix(x, backend="triton").matrix
    for i, j in ((0, 0), (d - 1, 0), (d - 1, d - 1), (3001, 77)):
        a, b = x[:, i].double(), x[:, j].double()
        want = ((a - a.mean()) * (b - b.mean())).mean()
        assert abs(lower[i, j] - want).item() <= 1e-13


def test_steps_between_replays_of_a_graph_work_and_within_a_capture_are_refused() -> None:
    x = activations(256, 64, torch.float32)[0]
    y = torch.empty_like(x)
    with fastent.SpectralEntropyMonitor() as monitor:
        monitor.observe(0, x, layer="a")
        monitor.flush()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            torch.mul(x, 2.0, out=y)
        for step in range(1, 4):
            x.normal_()
            graph.replay()
            monitor.observe(step, y, layer="a")
            (record,) = monitor.flush()
            want = fastent.spectral_entropy(y.cpu()).normalized
            assert record.normalized == pytest.approx(want, abs=1e-12)
        refused = pytest.raises(RuntimeError, match="cannot be part of a CUDA graph")
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            torch.mul(x, 2.0, out=y)  # torch warns of an empty graph
            with refused:
                monitor.observe(9, y, layer="a")
        monitor.observe(10, x, layer="a")
        assert [record.step for record in monitor.flush()] == [10]


def test_the_worker_may_wait_for_its_matrices_while_a_graph_is_captured() -> None:
    x = activations(256, 64, torch.float32)[0]
    y, z = torch.empty_like(x), torch.empty_like(x)
    capturing, training = torch.cuda.Stream(), torch.cuda.Stream()
    graph, blocked = torch.cuda.CUDAGraph(), torch.cuda.Event()
    with fastent.SpectralEntropyMonitor() as monitor:
        with torch.cuda.stream(training):
            monitor.observe(0, x, layer="a")
            monitor.flush()
            torch.cuda._sleep(1)
        with torch.cuda.stream(capturing):
            torch.mul(x, 2.0, out=z)
        torch.cuda.synchronize()
        with torch.cuda.stream(training):
            torch.cuda._sleep(1_000_000_000)  # half a second
            blocked.record()
            monitor.observe(1, x, layer="a")
        with torch.cuda.stream(capturing):
            graph.capture_begin()  # in torch's default mode, which a query by another thread spoils
            torch.mul(x, 2.0, out=y)
            time.sleep(0.05)  # the worker asks its event some 50 times
            graph.capture_end()
        assert not blocked.query()
        graph.replay()
        (record,) = monitor.flush()
        torch.cuda.synchronize()
    assert torch.equal(y, z)
    assert record.normalized == pytest.approx(fastent.spectral_entropy(x.cpu()).normalized, abs=1e-12)
