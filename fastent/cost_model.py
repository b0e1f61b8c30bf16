"""What an evaluation costs: bytes, floating-point operations, memory, and time at given rates.

``time = call + bytes / bandwidth + flops / rate(m) + solve(m)`` for one layer's (n, d) activations, m = min(n, d): a
pass that converts and centres, the products of the lower triangle, the eigenvalues. Between measured sizes rates are
interpolated on logarithmic axes, above the largest a solve grows as m^3; that is an extrapolation and is said to be
one (`Estimate.extrapolated`). Bytes, operations and memory are counts of what the CPU path does.

Not in it: the forward pass of the probe, which is a model's own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fastent.torch_backend import SLAB, _chunk_length

FLOAT64 = 8

Side = Literal["covariance", "gram"]
Curve = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Work:
    """Counts for the entropy of (n, d) activations.

    Attributes
    ----------
    side : {"covariance", "gram"}
        Matrix that is formed and solved.
    m, length : int
        Its edge, and the terms that each of its entries sums.
    bytes : int
        Read and written by the pass that converts and centres, and the matrix.
    flops : int
        Of the products, multiplications and additions.
    solve_flops : int
        Of the reduction to tridiagonal form, ``4/3 m^3``; the rest of a solve is of lower order.
    memory : int
        Bytes beside the activations at the peak: the float64 buffer, the matrix and the solver's copy of it.
    launches : int
        Matrix products that are called.
    """

    side: Side
    m: int
    length: int
    bytes: int
    flops: int
    solve_flops: int
    memory: int
    launches: int


@dataclass(frozen=True)
class Rates:
    """What a device does, measured (`fastent.rates.measure_rates`) or assumed.

    Attributes
    ----------
    call : float
        Seconds of an evaluation that are there at any size.
    bandwidth : float
        Bytes per second of the pass that converts and centres.
    product : sequence of (edge, flops per second)
        Of the products, by the edge m of the matrix, ascending.
    solve : sequence of (edge, seconds)
        Of the eigenvalues, by the edge, ascending.
    """

    call: float
    bandwidth: float
    product: Curve
    solve: Curve


@dataclass(frozen=True)
class Estimate:
    """Seconds of one evaluation by parts.

    `extrapolated` says that the matrix is larger than any that the rates were measured on.
    """

    call: float
    convert: float
    product: float
    solve: float
    extrapolated: bool

    @property
    def seconds(self) -> float:
        """All parts together."""
        return self.call + self.convert + self.product + self.solve


def work(n: int, d: int, *, itemsize: int = 4, side: Side | None = None) -> Work:
    """Count what the entropy of (n, d) activations takes.

    Parameters
    ----------
    n, d : int
        Rows and features.
    itemsize : int
        Bytes of an entry of the activations.
    side : {"covariance", "gram"}, optional
        The smaller by default, as `fastent.spectral_entropy` takes it.

    Raises
    ------
    ValueError
        If n or d is less than 2.

    Examples
    --------
    >>> work(512, 8192, itemsize=2).side, work(512, 8192).m
    ('gram', 512)
    """
    if n < 2 or d < 2:
        raise ValueError(f"an entropy needs at least 2 rows and 2 features; got n = {n}, d = {d}")
    side = side or ("gram" if n < d else "covariance")
    m, length = (n, d) if side == "gram" else (d, n)
    chunk = _chunk_length(length, m)
    chunks = math.ceil(length / chunk)
    full, rest = divmod(m, SLAB)  # slabs of the lower triangle, each as long as it reaches
    return Work(
        side=side,
        m=m,
        length=length,
        # read the input, write the float64 buffer, read it for the means, read and write it to centre;
        # write and read the matrix
        bytes=n * d * (itemsize + 4 * FLOAT64) + 2 * FLOAT64 * m * m,
        flops=length * (SLAB**2 * full * (full + 1) + 2 * rest * m),
        solve_flops=4 * m**3 // 3,
        memory=FLOAT64 * (chunk * m + 2 * m * m),
        launches=chunks * (full + (rest > 0)),
    )


def estimate(one: Work, rates: Rates) -> Estimate:
    """Time of that work at those rates."""
    return Estimate(
        call=rates.call,
        convert=one.bytes / rates.bandwidth,
        product=one.flops / _between(rates.product, one.m, power=0.0),
        solve=_between(rates.solve, one.m, power=3.0),
        extrapolated=one.m > min(rates.product[-1][0], rates.solve[-1][0]),
    )


def floor(one: Work, rates: Rates) -> float:
    """Seconds that no implementation on this device undercuts by much.

    The products of a triangle (half of all) at the best rate that was measured, and the eigenvalues; reading the
    input goes on meanwhile.
    """
    best = max(rate for _, rate in rates.product)
    return one.m * one.m * one.length / best + _between(rates.solve, one.m, power=3.0)


def all_reduce_bytes(d: int, ranks: int) -> int:
    """Bytes that each rank sends to add up the moments of one layer (`fastent.Moments.all_reduce`), by a ring.

    The state is d sums and d^2 products in float64; a ring sends ``2 (ranks - 1) / ranks`` of it. The broadcast of the
    common shift, d numbers, is counted with it.
    """
    if ranks == 1:
        return 0
    return math.ceil(FLOAT64 * (d + d * d) * 2 * (ranks - 1) / ranks) + FLOAT64 * d


def _between(curve: Curve, x: float, *, power: float) -> float:
    """Value at `x` between points on logarithmic axes; above them with slope `power`, below them as at the first."""
    if x <= curve[0][0]:
        return curve[0][1]
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        if x <= x1:
            share = math.log(x / x0) / math.log(x1 / x0)
            return math.exp((1 - share) * math.log(y0) + share * math.log(y1))
    return curve[-1][1] * float((x / curve[-1][0]) ** power)
