"""A call by itself: errors; times of entropy, covariance, eigenvalues, forecast; the cost model against them.

Each function gives the rows of one question at the thread count of its process (`bench.suite`). All providers are timed
in one process, in turn, on the same input; ratios are fastent's time over the other's, round by round.

`accuracy`
    Errors of every provider on easy and hard inputs. The truth is the entropy of the very values given, covariance and
    eigenvalues in long double (`fastent.reference`, held to 50 digits by the tests). The error of an entropy is
    ``|H - truth| / log d``; that of a covariance ``||C - truth||_F`` over the truth's norm. A provider that raises or
    gives NaN has no error but an ``answer``. Times are of the same inputs.
`entropy`
    fastent against everyone. `LIMITS` are shares of the direct way's time that fastent must not exceed.
`covariance`
    The same without the eigensolve: ``fastent.covariance`` (float64, symmetric bit for bit) against the ways it is
    usually formed.
`eigensolve`
    The floor under every way that forms a matrix; fastent takes torch's LAPACK on the transposed upper triangle, which
    saves torch's own transposition, or for large matrices NumPy's (`fastent.linalg`). The singular values of the rows
    (512, m) are the other way, which squares nothing.
`forecast`
    Fitting the power law to the histories of ten runs, once per experiment; a prediction, once per evaluation; and the
    sampling error of H, which an evaluation with ``standard_error=True`` takes besides.
`plan`
    The cost model against measured points. Rates are measured in the same process, half before and half after the
    points; the model must be within `PLAN_LIMIT` of every point of the role "check". Those of the role "extrapolated"
    have a matrix larger than any that the rates saw: they show how far to trust the model there.
"""

from __future__ import annotations

import math
from statistics import median

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

import fastent
from bench.harness import Row, beside, columns, environment, interleaved, quantiles, ratio_columns
from bench.providers import (
    COVARIANCE,
    ENTROPY,
    INPUTS,
    OURS,
    SHAPES,
    Input,
    Matrix,
    Shape,
    able,
    chosen,
    loaded,
    rankme_truth,
)
from fastent.covariance import centered_matrix
from fastent.linalg import eigenvalues
from fastent.plan import EDGES, Rates, estimate, floor, measure_rates, work
from fastent.reference.covariance import scaled_covariance
from fastent.reference.entropy import spectral_entropy

LIMITS = {
    (512, 64): 1.05,
    (512, 128): 1.05,
    (512, 256): 1.05,
    (512, 512): 1.05,
    (512, 768): 1.05,
    (4096, 128): 0.75,
    (65536, 128): 0.6,
    (512, 1024): 1 / 4,
    (512, 4096): 1 / 40,
}

SIZES = (32, 64, 128, 256, 512, 1024)
QUICK_SIZES = (64, 128, 512)

RUNS = 10
EVALUATIONS = 70

PLAN_LIMIT = 0.25
CHECKED = (
    Shape(512, 64, quick=True),
    Shape(512, 128, quick=True),
    Shape(512, 256),
    Shape(512, 512),
    Shape(512, 768),
    Shape(4096, 128, quick=True),
    Shape(16384, 256),
    Shape(64, 2048, quick=True),
    Shape(256, 8192),
    Shape(512, 8192, "bfloat16"),
)
EXTRAPOLATED = (Shape(2048, 1536), Shape(2048, 2048))


def accuracy(quick: bool) -> list[Row]:
    """Rows of all inputs: errors and times."""
    rows = []
    for case in INPUTS:
        h = case.tensor()
        rows += _entropy_errors(case, h, quick) + _covariance_errors(case, h)
    return rows


def _entropy_errors(case: Input, h: Tensor, quick: bool) -> list[Row]:
    truth = spectral_entropy(h.double().numpy(), extended=True).entropy
    calls, left_out = able(ENTROPY, h, {"op": "accuracy", "input": case.name, **columns(h), "error": None})
    answers = {provider: float(call(h)) for provider, call in calls.items()}
    seconds = interleaved(
        {provider.name: (lambda call=call: call(h)) for provider, call in calls.items()},
        rounds=7 if quick else 25,
        target=0.01,
    )
    rows = []
    for provider, answer in answers.items():
        right = truth if provider.quantity == ENTROPY else rankme_truth(h)
        row = {"op": "accuracy", "provider": provider.name, "quantity": provider.quantity, "input": case.name}
        row |= {**columns(h), "truth": right, "answer": str(answer), "error": None}
        if math.isfinite(answer):
            row |= {"answer": answer, "error": abs(answer - right) / math.log(h.shape[1])}
        rows.append(row | quantiles(seconds[provider.name]) | environment(provider.package))
    # What a peer raises is its answer.
    return rows + [row | {"answer": row["skipped"].partition(":")[0]} | environment() for row in left_out]


def _covariance_errors(case: Input, h: Tensor) -> list[Row]:
    matrix, exponent = scaled_covariance(h.double().numpy(), extended=True)
    truth = np.ldexp(matrix, exponent)
    norm = float(np.sqrt((truth**2).sum()))
    same = {"op": "covariance accuracy", "input": case.name, **columns(h)}
    return [
        same
        | {"provider": provider.name}
        | _covariance_error(call, h, truth, norm)
        | environment(provider.package)
        for provider, call in loaded(COVARIANCE).items()
    ]


def _covariance_error(call: Matrix | str, h: Tensor, truth: np.ndarray, norm: float) -> Row:
    if isinstance(call, str):
        return {"answer": call.partition(":")[0], "error": None, "skipped": call}
    try:
        got = call(h).to(torch.float64).numpy().astype(np.longdouble)
    except Exception as error:  # what a peer raises is its answer
        return {"answer": type(error).__name__, "error": None}
    distance = float(np.sqrt(((got - truth) ** 2).sum()))
    if norm == 0:  # no variance: any is wrong, and there is nothing to divide by
        return {"error": None, "answer": "0" if distance == 0 else f"{distance:.1e}, not 0"}
    return {"error": distance / norm}


def entropy(quick: bool) -> list[Row]:
    """Rows of all shapes at this process's thread count."""
    rows: list[Row] = []
    threads = torch.get_num_threads()
    rates = measure_rates()
    for shape in chosen(SHAPES, quick):
        rows += _entropy_rows(shape, rates, rounds=9 if quick else 25, budget=4.0 if quick else 10.0)
    assert torch.get_num_threads() == threads  # no import of a peer may change it
    return rows


def _entropy_rows(shape: Shape, rates: Rates, *, rounds: int, budget: float) -> list[Row]:
    """Rows of one shape: each provider's time, and fastent's over it; the floor at `rates`."""
    h = shape.tensor()
    calls, left_out = able(ENTROPY, h, {"op": "entropy", **shape.columns})
    named = {provider.name: (lambda call=call: call(h)) for provider, call in calls.items()}
    seconds = beside(OURS, named, rounds=rounds, budget=budget)
    rows = []
    for provider in calls:
        mine = provider.name == OURS
        side = min(shape.n, shape.d) if mine else shape.d
        products = 2 * shape.n * shape.d * side
        row = {"op": "entropy", "provider": provider.name, "quantity": provider.quantity, **shape.columns}
        theirs, ours = seconds[provider.name]
        row |= quantiles(theirs)
        if mine or provider.name == "torch, direct":
            # bytes: read h + write and read the matrix (16 m m); flops: products of the side taken, half of
            # them for fastent, without the eigensolve
            row["bytes"] = h.element_size() * h.numel() + 16 * side * side
            row["flops"] = products // 2 if mine else products
        if mine:
            row["floor_us"] = round(1e6 * floor(work(shape.n, shape.d), rates), 1)
        if not mine:
            row |= ratio_columns(ours, theirs) | {"exact": provider.exact}
        if provider.name == "torch, direct" and shape.dtype == "float32":
            row["limit"] = LIMITS[shape.n, shape.d]
        rows.append(row | environment(provider.package))
    return rows + [row | environment() for row in left_out]


def covariance(quick: bool) -> list[Row]:
    """Rows of all shapes at this process's thread count."""
    rows: list[Row] = []
    for shape in chosen(SHAPES, quick):
        h = shape.tensor()
        found, left_out = able(COVARIANCE, h, {"op": "covariance", **shape.columns})
        calls = {provider.name: (lambda call=call, h=h: call(h)) for provider, call in found.items()}
        seconds = beside(OURS, calls, rounds=9 if quick else 25, budget=3.0 if quick else 8.0)
        for provider in found:
            values, ours = seconds[provider.name]
            mine = provider.name == OURS
            # bytes: read h + write C (8 d d); flops: all products, or for fastent the lower triangle's
            flops = 2 * shape.n * shape.d**2
            row = {"op": "covariance", "provider": provider.name, **shape.columns, **quantiles(values)}
            row |= {
                "bytes": h.element_size() * h.numel() + 8 * shape.d**2,
                "flops": flops // 2 if mine else flops,
            }
            if not mine:
                row |= ratio_columns(ours, values) | {"exact": provider.exact}
            rows.append(row | environment(provider.package))
        rows += [row | environment() for row in left_out]
    return rows


def eigensolve(quick: bool) -> list[Row]:
    """Rows of all sizes at this process's thread count."""
    rows: list[Row] = []
    for m in QUICK_SIZES if quick else SIZES:
        h = torch.randn(512, m, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        centered = centered_matrix(h, side="covariance")
        matrix = fastent.covariance(h)
        array, centred = matrix.numpy(), h - h.mean(0)
        calls = {
            "fastent": lambda a=centered.matrix: eigenvalues(a),
            "torch eigvalsh": lambda a=matrix: torch.linalg.eigvalsh(a),
            "numpy eigvalsh": lambda a=array: np.linalg.eigvalsh(a),
            "scipy evr": lambda a=array: scipy.linalg.eigvalsh(a, driver="evr", check_finite=False),
            "torch svdvals of the rows": lambda a=centred: torch.linalg.svdvals(a),
        }
        seconds = interleaved(calls, rounds=9 if quick else 25, budget=3.0 if quick else 15.0)
        for name, values in seconds.items():
            row = {"op": "eigensolve", "provider": name, "n": 512, "d": m, "dtype": "float64"}
            row |= quantiles(values)
            # flops: reduction to tridiagonal form, 4/3 m^3 (LAPACK's count); the svd's are another algorithm's
            if "svd" not in name:
                row["flops"] = 4 * m**3 // 3
            if name != "fastent":
                row |= ratio_columns(seconds["fastent"], values)
            rows.append(row | environment("scipy"))
    return rows


def _histories() -> list[fastent.History]:
    """Make runs whose entropy falls along a curve, each at its own pace, with a little noise."""
    g = torch.Generator().manual_seed(0)
    runs = []
    for _ in range(RUNS):
        t_grok = 12_000 + 200 * int(torch.randint(10, (), generator=g))
        steps = list(range(0, t_grok + 1, 200))
        noise = (0.003 * torch.randn(len(steps), generator=g)).tolist()
        curve = [
            0.61 + 0.3 * math.sqrt(max(0.0, 1 - t / t_grok)) + e for t, e in zip(steps, noise, strict=True)
        ]
        runs.append(fastent.History(steps, curve, t_grok=t_grok))
    return runs


def forecast(quick: bool) -> list[Row]:
    """Rows at this process's thread count."""
    runs = _histories()
    law = fastent.PowerLaw.fit(runs)
    h = torch.randn(512, 128, generator=torch.Generator().manual_seed(0))
    calls = {
        f"PowerLaw.fit, {RUNS} runs of about {EVALUATIONS} evaluations": lambda: fastent.PowerLaw.fit(runs),
        "predict_grok_time": lambda: fastent.predict_grok_time(0.75, law, step=6000),
        "sampling_error, 512 x 128": lambda: fastent.sampling_error(h),
    }
    seconds = interleaved(calls, rounds=9 if quick else 25, budget=3.0 if quick else 30.0)
    return [
        {
            "op": "forecast",
            "provider": name,
            **quantiles(values),
            **environment("scipy"),
        }
        for name, values in seconds.items()
    ]


def _between(a: Rates, b: Rates) -> Rates:
    """Middle of two measurements of the same processor."""
    return Rates(
        median((a.call, b.call)),
        median((a.bandwidth, b.bandwidth)),
        [(m, (x + y) / 2) for (m, x), (_, y) in zip(a.product, b.product, strict=True)],
        [(m, (x + y) / 2) for (m, x), (_, y) in zip(a.solve, b.solve, strict=True)],
    )


def plan(quick: bool) -> list[Row]:
    """Rows of all points at this process's thread count."""
    edges = EDGES[:-1] if quick else EDGES
    before = measure_rates(edges)
    points = [(shape, "check") for shape in chosen(CHECKED, quick)]
    points += [] if quick else [(shape, "extrapolated") for shape in EXTRAPOLATED]
    timings = []
    for shape, _ in points:
        h = shape.tensor()
        call = {"fastent": lambda h=h: fastent.spectral_entropy(h)}
        timings.append(interleaved(call, rounds=9 if quick else 25, budget=2.0 if quick else 8.0)["fastent"])
    rates = _between(before, measure_rates(edges))
    rows = []
    for (shape, role), seconds in zip(points, timings, strict=True):
        one = work(shape.n, shape.d, itemsize=2 if shape.dtype == "bfloat16" else 4)
        predicted = estimate(one, rates)
        row = {"op": "cost model", "provider": "fastent", **shape.columns, **quantiles(seconds)}
        row |= {"role": role, "m": one.m, "bytes": one.bytes, "flops": one.flops, "memory": one.memory}
        row |= {
            "predicted_us": round(predicted.seconds * 1e6, 1),
            "floor_us": round(floor(one, rates) * 1e6, 1),
            "limit": PLAN_LIMIT,
        }
        rows.append(row | environment())
    return rows
