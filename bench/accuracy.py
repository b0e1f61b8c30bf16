"""Errors of every provider on easy and hard inputs, a question of `bench.suite`.

The truth is the entropy of the very values given, covariance and eigenvalues in long double (`fastent.reference`, held
to 50 digits by the tests). The error of an entropy is ``|H - truth| / log d``; that of a covariance ``||C - truth||_F``
over the truth's norm. A provider that raises or gives NaN has no error but an ``answer``. Times are of the same
inputs.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from bench.harness import Row, environment, interleaved, quantiles
from bench.providers import (
    COVARIANCES,
    ENTROPY,
    INPUTS,
    Input,
    Matrix,
    Provider,
    covariances,
    entropies,
    rankme_truth,
)
from fastent.reference.covariance import scaled_covariance
from fastent.reference.entropy import spectral_entropy


def accuracy(quick: bool) -> list[Row]:
    """Rows of all inputs: errors and times."""
    rows = []
    for case in INPUTS:
        h = case.tensor()
        rows += _entropy_rows(case, h, quick) + _covariance_rows(case, h)
    return rows


def _entropy_rows(case: Input, h: Tensor, quick: bool) -> list[Row]:
    truth = spectral_entropy(h.double().numpy(), extended=True).entropy
    n, d = h.shape
    answers: dict[Provider, float | str] = {}
    for provider, call in entropies().items():
        try:
            answers[provider] = call(h)
        except Exception as error:  # what a peer raises is its answer
            answers[provider] = type(error).__name__
    seconds = interleaved(
        {p.name: (lambda p=p: entropies()[p](h)) for p, a in answers.items() if isinstance(a, float)},
        rounds=7 if quick else 25,
        target=0.01,
    )
    rows = []
    for provider, answer in answers.items():
        right = truth if provider.quantity == ENTROPY else rankme_truth(h)
        row = {
            "op": "accuracy",
            "provider": provider.name,
            "quantity": provider.quantity,
            "input": case.name,
            "n": n,
            "d": d,
            "dtype": str(h.dtype).removeprefix("torch."),
            "truth": right,
            **_answer(answer, lambda value, right=right: abs(value - right) / math.log(d)),
        }
        if provider.name in seconds:
            row |= quantiles(seconds[provider.name])
        rows.append(row | environment(*([provider.package] if provider.package else [])))
    return rows


def _answer(answer: float | str, error: object) -> Row:
    if isinstance(answer, str):
        return {"answer": answer, "error": None}
    if not math.isfinite(answer):
        return {"answer": str(answer), "error": None}
    return {"answer": answer, "error": error(answer)}  # type: ignore[operator]


def _covariance_rows(case: Input, h: Tensor) -> list[Row]:
    matrix, exponent = scaled_covariance(h.double().numpy(), extended=True)
    truth = np.ldexp(matrix, exponent)
    norm = float(np.sqrt((truth**2).sum()))
    return [
        {
            "op": "covariance accuracy",
            "provider": name,
            "input": case.name,
            "n": h.shape[0],
            "d": h.shape[1],
            "dtype": str(h.dtype).removeprefix("torch."),
            **_covariance_error(call, h, truth, norm),
            **environment(*([COVARIANCES[name][1]] if COVARIANCES[name][1] else [])),
        }
        for name, call in covariances().items()
    ]


def _covariance_error(call: Matrix, h: Tensor, truth: np.ndarray, norm: float) -> Row:
    try:
        got = call(h).to(torch.float64).numpy().astype(np.longdouble)
    except Exception as error:  # what a peer raises is its answer
        return {"answer": type(error).__name__, "error": None}
    distance = float(np.sqrt(((got - truth) ** 2).sum()))
    if norm == 0:  # no variance: any is wrong, and there is nothing to divide by
        return {"error": None, "answer": "0" if distance == 0 else f"{distance:.1e}, not 0"}
    return {"error": distance / norm}
