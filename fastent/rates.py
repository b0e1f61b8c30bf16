"""Rates of the CPU that this process runs on, for `fastent.cost_model`: about two seconds of measuring.

Each is the median of a few repetitions of what an evaluation does (`fastent.torch_backend`, `fastent.eigenvalues`), at
this process's thread count.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median

import torch

from fastent import torch_backend
from fastent.cost_model import Rates, work
from fastent.covariance import centered_matrix
from fastent.eigenvalues import eigenvalues
from fastent.entropy import spectral_entropy

EDGES = (16, 64, 128, 256, 512, 1024)
LENGTH = 512


def measure_rates(edges: Sequence[int] = EDGES, *, budget: float = 0.1) -> Rates:
    """Measure this CPU.

    Parameters
    ----------
    edges : sequence of int
        Sizes of matrix to measure at, ascending; larger ones are extrapolated to.
    budget : float
        Seconds to spend on each of them, three repetitions at least.
    """
    generator = torch.Generator().manual_seed(0)
    product, solve = [], []
    for m in edges:
        h = torch.randn(LENGTH, m, generator=generator, dtype=torch.float64, device="cpu")
        lower, add_lower_product = torch_backend.target(h, m)
        products = partial(add_lower_product, lower, h.T, 1.0, first=True)
        solution = partial(eigenvalues, centered_matrix(h, side="covariance"))
        product.append((m, work(LENGTH, m, side="covariance").flops / _seconds(products, budget)))
        solve.append((m, _seconds(solution, budget)))
    tall = torch.randn(4096, 128, generator=generator, dtype=torch.float32, device="cpu")
    convert = partial(torch_backend.centered, tall, exact=False)
    small = work(2, 2)
    rates = Rates(0.0, work(4096, 128).bytes / _seconds(convert, budget), product, solve)
    pair = torch.eye(2, dtype=torch.float32, device="cpu")
    whole = _seconds(lambda: spectral_entropy(pair), budget)
    parts = small.bytes / rates.bandwidth + small.flops / product[0][1] + solve[0][1]
    return Rates(max(0.0, whole - parts), rates.bandwidth, product, solve)


def _seconds(call: Callable[[], object], budget: float) -> float:
    call()
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 3 or (time.perf_counter() - began < budget and len(times) < 1000):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return median(times)
