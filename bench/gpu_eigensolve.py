"""(d) The eigensolve: cuSOLVER one at a time and batched, LAPACK on one thread of the host, per size."""

from __future__ import annotations

import functools

import numpy as np
import torch

from bench.gpu_device import NO_GPU, Session, activations, host_times
from bench.harness import quantiles
from fastent.covariance import centered_matrix

SIZES = (64, 128, 256, 512, 1024)
BATCH = 32


def run(session: Session) -> None:
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
            record(session, "lapack, one thread", 1, matrix.cpu(), rounds)
        finally:
            torch.set_num_threads(threads)
        if not session.cuda:
            session.skip("eigensolve", NO_GPU, provider="cusolver", d=d)
            continue
        record(session, "cusolver", 1, matrix, rounds)
        batch = matrix.expand(BATCH, d, d).contiguous()
        record(session, "cusolver, batched call", BATCH, batch, rounds)


def record(session: Session, provider: str, batch: int, matrix: torch.Tensor, rounds: int) -> None:
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
