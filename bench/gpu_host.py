"""(f) Whether an evaluation stops the host, and (g) how much memory it takes at its peak.

Host synchronisations are counted twice: calls of the CUDA runtime by torch's profiler, and by a stream that is kept
busy: what waits for it comes back late.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch

import fastent
from bench.gpu_device import NO_GPU, Session, activations
from bench.gpu_providers import direct_entropy
from fastent.covariance import centered_matrix
from fastent.deferred import DeferredEntropy
from fastent.kernels.resident import ResidentCovariance

# Runtime and driver calls that wait for the device.
WAITING = ("Synchronize", "cudaMemcpy", "cuMemcpy")
PAUSE = 0.05  # seconds for which the stream is kept busy
MEMORY_CASES = ((512, 128), (65536, 128), (8192, 4096))


def run(session: Session) -> None:
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
        "deferred": functools.partial(defer, deferred, h),
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


def defer(deferred: DeferredEntropy, h: torch.Tensor) -> None:
    """One deferred evaluation."""
    evaluation = deferred.open(0)
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
        "direct": functools.partial(direct_matrix, h),
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


def direct_matrix(h: torch.Tensor) -> torch.Tensor:
    """Make the matrix of the direct way."""
    x = h.double()
    x = x - x.mean(0)
    return x.T @ x / x.shape[0]
