"""(b) Kernel time, from 512 x 64 to 65536 x 8192, warm and cold second-level cache, and its share of the floor.

The floor is the longer of what the bytes and the floating-point operations take at the rates of `gpu_device`.
Executed operations: lower tiles, those on the diagonal whole.
"""

from __future__ import annotations

import functools

import torch

from bench.gpu_device import NO_GPU, PEAK_BYTES, PEAK_FLOPS, Session, activations, device_times
from bench.harness import quantiles
from fastent.kernels.launch import plan
from fastent.kernels.resident import ResidentCovariance

SHAPES = (
    *((512, d) for d in (64, 128, 256, 512, 1024, 2048, 4096, 8192)),
    *((4096, d) for d in (128, 512, 1024, 2048, 4096)),
    *((8192, d) for d in (1024, 2048, 4096, 8192)),
    *((65536, d) for d in (64, 128, 512, 1024, 2048, 4096, 8192)),
)
BATCHED = ((32, 512, 128), (8, 512, 1024))


def work(evaluator: ResidentCovariance, h: torch.Tensor) -> tuple[int, int]:
    """Bytes that must move, and float64 operations that are executed, in one evaluation."""
    m, length = (h.shape[-1], h.shape[-2]) if evaluator.side == "covariance" else h.shape[-2:]
    cut = plan(evaluator.side, m, length)
    out = evaluator.output()
    # bytes: read h once, write the lower tiles once; flops: 2 for each product and sum in the lower tiles
    written = 8 * min(cut.tiles * cut.tile.edge**2, m * m) * evaluator.batch + out.centre.nbytes
    return h.numel() * h.element_size() + written, 2 * cut.tiles * cut.tile.edge**2 * length * evaluator.batch


def run(session: Session) -> None:
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
