"""(c) Providers side by side: what else one could do with the same activations, timed in turn.

`us_*` is time on the device, `host_us` the median time for which the calling thread is kept: a provider that stops the
host pays there. Covariances and whole entropies are rows of their own (`op`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

import fastent
from bench.gpu_device import Session, activations, device_times, host_times
from bench.harness import quantiles
from fastent.covariance import centered_matrix
from fastent.kernels.resident import ResidentCovariance

SHAPES = (
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
QUICK = ((512, 64), (512, 128), (2048, 96))


def direct_covariance(h: Tensor) -> Tensor:
    """Covariance as it is usually written: a float64 copy and a full product."""
    x = h.double()
    x = x - x.mean(0)
    return x.T @ x / x.shape[0]


def direct_entropy(h: Tensor) -> Tensor:
    """Spectral entropy as it is usually written."""
    p = torch.linalg.eigvalsh(direct_covariance(h)).clamp(min=1e-12)
    p = p / p.sum()
    return -(p * p.log()).sum()


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


def run(session: Session) -> None:
    """Time all providers at every shape."""
    if session.quick:
        session.skip(
            "covariance",
            "--quick: compilation takes longer than the rehearsal",
            provider="direct, torch.compile",
        )
    for n, d in QUICK if session.quick else SHAPES:
        if session.late:
            session.skip("covariance", "the time of the run was used up", n=n, d=d)
            continue
        h = activations(n, d, torch.bfloat16, session.device)
        groups = {"covariance": covariances(session, h)}
        if d <= 1024:
            groups["entropy"] = entropies(session, h)
        for op, calls in groups.items():
            torch.compiler.reset()
            found = measure(session, calls)
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


def measure(
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
