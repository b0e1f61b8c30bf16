"""What only a GPU can show: races, graph capture, streams, real memory, no stop of the host. ``pytest -m gpu``.

Beside these, ``pytest --device cuda`` runs the whole suite with its tensors there, properties included.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fastent
from fastent.covariance import centered_matrix, triton_obstacle
from fastent.kernels.evaluator import Evaluator
from fastent.kernels.memory import Output

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
    evaluator = Evaluator(n, d, device=x.device)
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


@pytest.mark.parametrize(("n", "d"), [(512, 128), (65536, 64), (64, 2048), (2000, 1600)])
def test_many_runs_beside_other_work_have_the_same_bits(n: int, d: int) -> None:
    x = activations(n, d, batch=2)
    evaluator = Evaluator(n, d, batch=2, device=x.device)
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
    assert not evaluator.workspace.arrived.any()


@pytest.mark.parametrize(("n", "d"), [(512, 128), (41, 127), (2000, 1600)])
def test_a_captured_evaluation_replays_with_the_bits_of_a_plain_one(n: int, d: int) -> None:
    first, second = activations(n, d), activations(n, d).flip(1).contiguous()
    x = first.clone()
    evaluator = Evaluator(n, d, device=x.device)
    out, plain = evaluator.output(), evaluator.output()
    evaluator(x, out)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
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
    evaluators = [Evaluator(*shape, device=x.device) for shape, x in zip(shapes, inputs, strict=True)]
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
    evaluator = Evaluator(512, 128, device=x.device)
    out = evaluator.output()
    evaluator(x, out)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(200_000_000)  # a tenth of a second
        start = time.perf_counter()
        evaluator(x, out)
        seconds = time.perf_counter() - start
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    assert seconds < 1e-3


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


@pytest.fixture
def compiled_model() -> Iterator[Any]:
    torch.manual_seed(0)
    yield torch.compile(nn.Sequential(nn.Linear(20, 64), nn.GELU(), nn.Linear(64, 5)).cuda())
    torch.compiler.reset()


def test_a_compiled_model_under_autocast_is_followed_and_trains_as_without(compiled_model: Any) -> None:
    probe = torch.randn(256, 20, device="cuda")
    x, y = torch.randn(64, 20, device="cuda"), torch.randint(5, (64,), device="cuda")
    start = {name: value.clone() for name, value in compiled_model.state_dict().items()}

    def train(every: int | None) -> tuple[list[Tensor], list[fastent.EntropyRecord]]:
        compiled_model.load_state_dict(start)
        optimizer = torch.optim.AdamW(compiled_model.parameters())
        monitor = fastent.SpectralEntropyMonitor(compiled_model, probe, layers="1", every=every or 10**9)
        for step in range(6):
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = nn.functional.cross_entropy(compiled_model(x), y)
                if every:
                    monitor.step(step)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        monitor.flush()
        history = list(monitor.history)
        monitor.close()
        return [value.clone() for value in compiled_model.state_dict().values()], history

    without, _ = train(None)
    weights, history = train(2)
    assert all(torch.equal(one, two) for one, two in zip(weights, without, strict=True))
    assert [record.step for record in history] == [0, 2, 4]
    assert all(0.0 < record.normalized <= 1.0 for record in history)
