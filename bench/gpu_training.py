"""What a probe costs training on a GPU: its time, the slowdown of a step, what stops the host, memory at its peak.

`training`
    The step is an MLP under AdamW, captured in a CUDA graph and lengthened by an idle kernel to 0.15 ms; and the same
    step without a graph. The probe is the hidden activations of 512 fixed inputs, 128 wide. Slowdowns are ratios of
    neighbours: the same number of steps without a probe, then with one, again and again. The forward pass that makes
    the activations is a row of its own (`probe forward`) and is in none of the others.
`host`
    Host synchronisations, counted twice: calls of the CUDA runtime by torch's profiler, and by a stream that is kept
    busy: what waits for it comes back late. And the peak memory of the matrix by each way.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

import fastent
from bench.gpu_device import NO_GPU, Session, activations, device_times, host_times
from bench.harness import quantiles, ratio
from bench.providers import direct_covariance, direct_entropy
from fastent.covariance import centered_matrix
from fastent.grokking.train.stack import capture_cuda_graph
from fastent.kernels.resident import ResidentCovariance
from fastent.monitor.deferred import DeferredEntropy

N, WIDTH, BATCHED = 512, 128, 32
STEP = 1.5e-4  # seconds
STRIDES = (1, 10, 100)
# Runtime and driver calls that wait for the device.
WAITING = ("Synchronize", "cudaMemcpy", "cuMemcpy")
PAUSE = 0.05  # seconds for which the stream is kept busy
MEMORY_CASES = ((512, 128), (65536, 128), (8192, 4096))


def training_step(device: torch.device) -> tuple[nn.Sequential, Callable[[], None]]:
    """Make a small model and one step of its training, on inputs that stay."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 97)).to(device)
    x, y = torch.randn(N, WIDTH, device=device), torch.randint(97, (N,), device=device)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1.0, capturable=device.type == "cuda")

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return model, step


def graph_step(session: Session) -> tuple[nn.Sequential, Callable[[], None], float]:
    """Capture the step in a CUDA graph, lengthened to `STEP`; the model, the replay and its seconds."""
    model, step = training_step(session.device)
    bare = float(np.median(device_times(session, capture_cuda_graph(step)[0])))
    second = float(np.median(device_times(session, lambda: torch.cuda._sleep(1_000_000)))) / 1e6
    idle = max(0, int((STEP - bare) / second))

    def longer() -> None:
        step()
        if idle:
            torch.cuda._sleep(idle)

    replay, _ = capture_cuda_graph(longer)
    return model, replay, float(np.median(device_times(session, replay)))


def probes(session: Session, hidden: Tensor, deferred: DeferredEntropy) -> dict[str, Callable[[int], object]]:
    """Ways to follow `hidden` at a step, by name."""

    def defer(step: int) -> None:
        deferred_entropy(deferred, hidden, step)
        for _ in deferred.arrived():
            pass

    found: dict[str, Callable[[int], object]] = {
        "deferred": defer,
        "synchronous": lambda step: fastent.spectral_entropy(hidden),
    }
    if session.cuda:
        evaluator = ResidentCovariance(*hidden.shape, device=session.device)
        out = evaluator.output()
        replay, _ = capture_cuda_graph(functools.partial(evaluator, hidden, out))
        found = {
            "matrix and participation ratio": lambda step: evaluator(hidden, out),
            "the same, captured": lambda step: replay(),
            **found,
        }
    return found


def training(session: Session) -> None:
    """Time of a probe in the stream and on the thread; slowdown of both kinds of step."""
    model, plain = training_step(session.device)
    inputs = torch.randn(N, WIDTH, device=session.device)
    with torch.no_grad():
        hidden = model[:2](inputs)
        forward = functools.partial(model[:2], inputs)
        session.add(
            "probe forward", n=N, d=WIDTH, dtype="float32", **quantiles(device_times(session, forward))
        )
    shape = {"n": N, "d": WIDTH, "dtype": "float32"}
    deferred = DeferredEntropy(capacity=64)
    ways = probes(session, hidden, deferred)
    for name, probe in ways.items():
        seconds = host_times(functools.partial(probe, 0), rounds=20 if session.cuda else 10)
        session.add("probe on the thread", provider=name, **shape, **quantiles(seconds))
    if session.cuda:
        for batch in (1, BATCHED):
            h = hidden.bfloat16().expand(batch, N, WIDTH).contiguous()
            evaluator = ResidentCovariance(N, WIDTH, batch=batch, device=session.device)
            call = functools.partial(evaluator, h, evaluator.output())
            seconds = device_times(session, call, graph=True)
            session.add(
                "probe in the stream", batch=batch, n=N, d=WIDTH, dtype="bfloat16", **quantiles(seconds)
            )
        _, replay, seconds_of_step = graph_step(session)
        slowdowns(session, "graph step", replay, ways, seconds_of_step, deferred)
    else:
        session.skip("probe in the stream", NO_GPU)
        session.skip("slowdown", NO_GPU, step="graph step")
    seconds_of_step = float(np.median(device_times(session, plain, rounds=5)))
    slowdowns(session, "plain step", plain, ways, seconds_of_step, deferred)
    deferred.discard()
    deferred.close()


def slowdowns(
    session: Session,
    kind: str,
    step: Callable[[], object],
    ways: dict[str, Callable[[int], object]],
    seconds_of_step: float,
    deferred: DeferredEntropy,
) -> None:
    """Rows for one kind of step: each probe at each stride against no probe."""
    length = 0.02 if session.quick else 0.08
    strides = STRIDES[:2] if session.quick else STRIDES
    for name, probe in ways.items():
        for stride in strides:
            if session.late:
                session.skip("slowdown", "the time of the run was used up", step=kind, provider=name)
                continue
            steps = max(stride, int(length / seconds_of_step) // stride * stride)
            with_probe, without = [], []
            deferred.discard()
            before = deferred.dropped
            for _ in range(5 if session.quick else 15):
                without.append(seconds_for(session, step, steps, None, stride))
                with_probe.append(seconds_for(session, step, steps, probe, stride))
            middle, low, high = ratio(np.array(with_probe), np.array(without))
            session.add(
                "slowdown",
                step=kind,
                provider=name,
                stride=stride,
                steps=steps,
                n=N,
                d=WIDTH,
                dtype="float32",
                step_us=seconds_of_step * 1e6,
                dropped=deferred.dropped - before,  # evaluations that found the ring full
                slowdown=middle - 1.0,
                slowdown_low=low - 1.0,
                slowdown_high=high - 1.0,
            )


def seconds_for(
    session: Session,
    step: Callable[[], object],
    steps: int,
    probe: Callable[[int], object] | None,
    stride: int,
) -> float:
    """Wall time of some steps until the device is done with them."""
    if session.cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for i in range(steps):
        step()
        if probe is not None and i % stride == 0:
            probe(i)
    if session.cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def host(session: Session) -> None:
    """Count, block, and measure the memory."""
    if not session.cuda:
        for op in ("host synchronisations", "blocked stream", "peak memory"):
            session.skip(op, NO_GPU)
        return
    h = activations(512, 128, torch.bfloat16, session.device)
    evaluator = ResidentCovariance(512, 128, device=session.device)
    deferred = DeferredEntropy(capacity=64)
    calls: dict[str, Callable[[], object]] = {
        "matrix and participation ratio": functools.partial(evaluator, h, evaluator.output()),
        "deferred": functools.partial(deferred_entropy, deferred, h),
        "synchronous": functools.partial(fastent.spectral_entropy, h),
        "direct": lambda: float(direct_entropy(h)),
    }
    for name, call in calls.items():
        call()
        deferred.flush()
        session.add("host synchronisations", provider=name, n=512, d=128, calls=waiting_calls(call))
        deferred.flush()
        seconds = blocked(call)
        session.add("blocked stream", provider=name, n=512, d=128, pause_us=PAUSE * 1e6, us_p50=seconds * 1e6)
        deferred.flush()
    deferred.close()
    for n, d in MEMORY_CASES[:1] if session.quick else MEMORY_CASES:
        memory(session, n, d)


def deferred_entropy(deferred: DeferredEntropy, h: Tensor, step: int = 0) -> None:
    """One deferred evaluation, unless the ring is full."""
    evaluation = deferred.open(step)
    if evaluation is not None:
        with evaluation:
            evaluation.add("h", h)


def waiting_calls(call: Callable[[], object]) -> int:
    """CUDA calls that wait for the device in one `call` on this thread; the synchronisation at the end not counted."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    profiler = torch.profiler.profile(activities=activities, acc_events=True)
    with profiler as profile, torch.profiler.record_function("probe"):
        call()
    spans = [event for event in profile.events() if event.name == "probe"]
    start, end = spans[0].time_range.start, spans[0].time_range.end
    return sum(
        any(word in event.name and "Async" not in event.name for word in WAITING)
        and event.thread == spans[0].thread
        and start <= event.time_range.start <= end
        for event in profile.events()
    )


def blocked(call: Callable[[], object]) -> float:
    """Seconds after which `call` comes back while the stream is busy for `PAUSE`."""
    cycles = int(PAUSE * 2e9)
    torch.cuda.synchronize()
    torch.cuda._sleep(cycles)
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    torch.cuda.synchronize()
    return seconds


def memory(session: Session, n: int, d: int) -> None:
    """Bytes above the input at the peak, of the matrix by each way."""
    h = activations(n, d, torch.bfloat16, session.device)
    evaluator = ResidentCovariance(n, d, device=session.device)
    held = evaluator.workspace.nbytes() + evaluator.output().nbytes()
    ways: dict[str, Callable[[], object]] = {
        "fastent": functools.partial(centered_matrix, h),
        "fastent, memory at hand": functools.partial(evaluator, h, evaluator.output()),
        "direct": functools.partial(direct_covariance, h),
    }
    for name, call in ways.items():
        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        extra = torch.cuda.max_memory_allocated() - before
        del result
        session.add(
            "peak memory",
            provider=name,
            n=n,
            d=d,
            dtype="bfloat16",
            extra_bytes=extra,
            held_bytes=held if name.endswith("hand") else 0,
            input_bytes=h.nbytes,
        )
