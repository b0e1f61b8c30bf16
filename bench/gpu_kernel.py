"""Times of what an evaluation consists of on a GPU: the kernel, its rivals, the eigensolve.

`kernel`
    Kernel time, from 512 x 64 to 65536 x 8192, warm and cold second-level cache, and its share of the floor: the longer
    of what the bytes and the floating-point operations take at the rates of `gpu_device`. Executed operations: lower
    tiles, those on the diagonal whole.
`providers`
    What else one could do with the same activations, timed in turn. `us_*` is time on the device, `host_us` the median
    time for which the calling thread is kept: a provider that stops the host pays there. Covariances and whole
    entropies are rows of their own (`op`).
`eigensolve`
    cuSOLVER one at a time and batched, LAPACK on one thread of the host, per size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

import fastent
from bench.gpu_device import NO_GPU, PEAK_BYTES, PEAK_FLOPS, Session, activations, device_times, host_times
from bench.harness import quantiles
from bench.providers import direct_covariance, direct_entropy
from fastent.covariance import centered_matrix
from fastent.kernels.launch import partition
from fastent.kernels.resident import ResidentCovariance

SHAPES = (
    *((512, d) for d in (64, 128, 256, 512, 1024, 2048, 4096, 8192)),
    *((4096, d) for d in (128, 512, 1024, 2048, 4096)),
    *((8192, d) for d in (1024, 2048, 4096, 8192)),
    *((65536, d) for d in (64, 128, 512, 1024, 2048, 4096, 8192)),
)
BATCHED = ((32, 512, 128), (8, 512, 1024))

PROVIDER_SHAPES = (
    (512, 64),
    (512, 128),
    (512, 512),
    (512, 1024),
    (4096, 128),
    (8192, 2048),
    (8192, 4096),
    (65536, 128),
)
COMPILED = ((512, 128), (8192, 2048))  # torch.compile takes ten seconds or more for each
QUICK_PROVIDER_SHAPES = ((512, 64), (512, 128), (2048, 96))

SIZES = (64, 128, 256, 512, 1024)
BATCH = 32


def work(evaluator: ResidentCovariance, h: torch.Tensor) -> tuple[int, int]:
    """Bytes that must move, and float64 operations that are executed, in one evaluation."""
    m, length = (h.shape[-1], h.shape[-2]) if evaluator.side == "covariance" else h.shape[-2:]
    cut = partition(evaluator.side, m, length)
    out = evaluator.output()
    # bytes: read h once, write the lower tiles once; flops: 2 for each product and sum in the lower tiles
    written = 8 * min(cut.tiles * cut.tile.edge**2, m * m) * evaluator.batch + out.centre.nbytes
    return h.numel() * h.element_size() + written, 2 * cut.tiles * cut.tile.edge**2 * length * evaluator.batch


def kernel(session: Session) -> None:
    """Time every shape in bfloat16, some in float32 and float64, and the batches."""
    if not session.cuda:
        session.skip("kernel", NO_GPU)
        return
    cases = [(1, n, d, torch.bfloat16) for n, d in SHAPES]
    cases += [
        (1, n, d, dtype)
        for n, d in ((512, 128), (8192, 2048), (8192, 4096))
        for dtype in (torch.float32, torch.float64)
    ]
    cases += [(*shape, torch.bfloat16) for shape in BATCHED]
    if session.quick:
        cases = [case for case in cases if case[1] <= 512 and case[2] <= 1024]
    for batch, n, d, dtype in cases:
        if session.late:
            session.skip("kernel", "the time of the run was used up", n=n, d=d)
            continue
        h = activations(n, d, dtype, session.device, batch=batch)
        evaluator = ResidentCovariance(n, d, batch=batch, device=session.device)
        out = evaluator.output()
        size, flops = work(evaluator, h)
        floor = max(size / PEAK_BYTES, flops / PEAK_FLOPS)
        rounds = 5 if flops > 1e12 else 20
        for cache in ("warm", "cold"):
            call = functools.partial(evaluator, h, out)
            seconds = device_times(session, call, rounds=rounds, cold=cache == "cold", graph=True)
            middle = float(sorted(seconds)[len(seconds) // 2])
            session.add(
                "kernel",
                provider="fastent",
                batch=batch,
                n=n,
                d=d,
                dtype=str(dtype).removeprefix("torch."),
                side=evaluator.side,
                cache=cache,
                launches=len(evaluator.launches(h, out)),
                **quantiles(seconds),
                bytes=size,
                flops=flops,
                tflops=flops / middle / 1e12,
                floor_us=floor * 1e6,
                share_of_floor=floor / middle,
            )
        del h, out, evaluator


def torch_cov(h: Tensor) -> Tensor:
    """`torch.cov` on a float64 copy."""
    return torch.cov(h.double().T, correction=0)


def float32_covariance(h: Tensor) -> Tensor:
    """Covariance in float32, without TF32: not exact, a floor for what precision costs."""
    x = h.float()
    x = x - x.mean(0)
    return x.T @ x / x.shape[0]


def rank_me(h: Tensor) -> Tensor:
    """RankMe: entropy of the singular values of the float32 activations (not centred, not squared)."""
    s = torch.linalg.svdvals(h.float())
    p = s / s.sum() + 1e-7
    return -(p * p.log()).sum()


def covariances(session: Session, h: Tensor) -> dict[str, Callable[[], object]]:
    """Return calls that make the covariance of `h`, by provider."""
    n, d = h.shape
    calls: dict[str, Callable[[], object]] = {
        "fastent": functools.partial(centered_matrix, h, side="covariance"),
        "direct": functools.partial(direct_covariance, h),
        "torch.cov": functools.partial(torch_cov, h),
        "float32": functools.partial(float32_covariance, h),
    }
    if session.cuda:
        evaluator = ResidentCovariance(n, d, device=session.device, side="covariance")
        calls["fastent, memory at hand"] = functools.partial(evaluator, h, evaluator.output())
    if not session.quick and (n, d) in COMPILED:
        calls["direct, torch.compile"] = functools.partial(torch.compile(direct_covariance, dynamic=False), h)
    copy, out = h.double(), torch.zeros(d, d, dtype=torch.float64, device=h.device)
    # The full float64 product alone, its copy made before: what the kernel at large d is compared with.
    calls["addmm on a float64 copy"] = functools.partial(
        torch.addmm, out, copy.T, copy, beta=0.0, alpha=1 / n
    )
    return calls


def entropies(session: Session, h: Tensor) -> dict[str, Callable[[], object]]:
    """Return calls that make the entropy of `h`, by provider."""
    calls: dict[str, Callable[[], object]] = {
        "fastent": functools.partial(fastent.spectral_entropy, h),
        "direct": functools.partial(direct_entropy, h),
    }
    if max(h.shape) <= 4096:
        calls["RankMe by svdvals"] = functools.partial(rank_me, h)
    if not session.quick and tuple(h.shape) in COMPILED:
        calls["direct, torch.compile"] = functools.partial(torch.compile(direct_entropy, dynamic=False), h)
    return calls


def providers(session: Session) -> None:
    """Time all providers at every shape."""
    if session.quick:
        session.skip(
            "covariance",
            "--quick: compilation takes longer than the rehearsal",
            provider="direct, torch.compile",
        )
    for n, d in QUICK_PROVIDER_SHAPES if session.quick else PROVIDER_SHAPES:
        if session.late:
            session.skip("covariance", "the time of the run was used up", n=n, d=d)
            continue
        h = activations(n, d, torch.bfloat16, session.device)
        groups = {"covariance": covariances(session, h)}
        if d <= 1024:
            groups["entropy"] = entropies(session, h)
        for op, calls in groups.items():
            torch.compiler.reset()
            found = _measured(session, calls)
            base = next(iter(found.values()))[0]
            for provider, (seconds, host) in found.items():
                session.add(
                    op,
                    provider=provider,
                    n=n,
                    d=d,
                    dtype="bfloat16",
                    **quantiles(seconds),
                    host_us=float(np.median(host)) * 1e6,
                    # bytes: read h (2 n d), write the matrix (8 d d); flops: the full product
                    bytes=2 * n * d + 8 * d * d,
                    flops=2 * n * d * d,
                    over_fastent=float(np.median(seconds) / np.median(base)),
                )


def _measured(
    session: Session, calls: dict[str, Callable[[], object]]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Device and host seconds of each call; a provider that fails is recorded and left out."""
    good = {}
    for provider, call in calls.items():
        try:
            call()
            good[provider] = call
        except Exception as error:  # a provider that cannot run must not end the benchmark
            session.skip("covariance", f"{type(error).__name__}: {error}"[:300], provider=provider)
    rounds = 5 if session.quick else 10
    parts: dict[str, list[np.ndarray]] = {provider: [] for provider in good}
    for _ in range(2 if session.quick else 3):  # in turn
        for provider, call in good.items():
            parts[provider].append(device_times(session, call, rounds=rounds))
    return {
        provider: (np.concatenate(parts[provider]), host_times(call, rounds=rounds))
        for provider, call in good.items()
    }


def eigensolve(session: Session) -> None:
    """Time each size; eigenvalues alone, of covariances of 2 d rows."""
    threads = torch.get_num_threads()
    for d in SIZES[:3] if session.quick else SIZES:
        if session.late:
            session.skip("eigensolve", "the time of the run was used up", d=d)
            continue
        matrix = centered_matrix(activations(2 * d, d, torch.float32, session.device)).matrix.tril()
        matrix = matrix + matrix.tril(-1).mT
        rounds = 5 if d >= 512 or session.quick else 15
        torch.set_num_threads(1)  # as the worker has
        try:
            _record(session, "lapack, one thread", 1, matrix.cpu(), rounds)
        finally:
            torch.set_num_threads(threads)
        if not session.cuda:
            session.skip("eigensolve", NO_GPU, provider="cusolver", d=d)
            continue
        _record(session, "cusolver", 1, matrix, rounds)
        batch = matrix.expand(BATCH, d, d).contiguous()
        _record(session, "cusolver, batched call", BATCH, batch, rounds)


def _record(session: Session, provider: str, batch: int, matrix: torch.Tensor, rounds: int) -> None:
    """Time one way and record it: the host waits for the eigenvalues, so its clock has all of it."""
    call = functools.partial(torch.linalg.eigvalsh, matrix)

    def solve() -> None:
        call().cpu()

    seconds = host_times(solve, rounds=rounds)
    d = matrix.shape[-1]
    session.add(
        "eigensolve",
        provider=provider,
        batch=batch,
        d=d,
        dtype="float64",
        **quantiles(seconds),
        us_per_matrix=float(np.median(seconds)) * 1e6 / batch,
        # bytes: read the matrix; flops: 4/3 d^3, the reduction to tridiagonal form
        bytes=8 * d * d * batch,
        flops=4 * d**3 * batch // 3,
    )
