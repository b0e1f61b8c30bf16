"""Bias, correction and standard error of H on planted spectra: the table of ``docs/mathematics.md``.

``python -m fastent.statements.sampling`` prints it as Markdown, from 200 samples of normal rows for each line.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fastent.reference.entropy import entropy_of_eigenvalues
from fastent.reference.sampling import sampling_bias
from fastent.sampling import sampling_error

Array = NDArray[np.float64]

SPECTRA: Mapping[str, Callable[[int], Array]] = {
    "flat": lambda d: np.ones(d),
    "geometric 0.97": lambda d: np.power(0.97, np.arange(d)),
    "geometric 0.9": lambda d: np.power(0.9, np.arange(d)),
    "power law 1/i": lambda d: 1 / (1.0 + np.arange(d)),
    "power law 1/i^2": lambda d: 1 / (1.0 + np.arange(d)) ** 2,
}


class Sampled(NamedTuple):
    """What many samples of one spectrum show, all in units of the normalised entropy.

    Attributes
    ----------
    truth : float
        H of the spectrum.
    bias, formula : float
        Mean of the samples' H minus `truth`, and what `fastent.reference.sampling.sampling_bias` says.
    left, noise : float
        Mean of the corrected H minus `truth`, and the standard error of that mean.
    spread, corrected_spread : float
        Standard deviation of the samples' H and of the corrected one.
    standard_error : float
        Mean of the standard errors given with each.
    """

    truth: float
    bias: float
    formula: float
    left: float
    noise: float
    spread: float
    corrected_spread: float
    standard_error: float


def sampled(eigenvalues: Array, n: int, *, draws: int, seed: int) -> Sampled:
    """Draw samples of n normal rows whose covariance has these eigenvalues, and take their H and its errors."""
    rng, d = np.random.default_rng(seed), len(eigenvalues)
    truth = entropy_of_eigenvalues(eigenvalues) / np.log(d)
    errors = [
        sampling_error(torch.from_numpy(rng.standard_normal((n, d)) * np.sqrt(eigenvalues)))
        for _ in range(draws)
    ]
    found = np.array([(e.normalized, e.corrected, e.standard_error) for e in errors])
    mean, spread = found.mean(axis=0), found.std(axis=0, ddof=1)
    return Sampled(
        truth=float(truth),
        bias=float(mean[0] - truth),
        formula=float(sampling_bias(eigenvalues, n) / np.log(d)),
        left=float(mean[1] - truth),
        noise=float(spread[1] / np.sqrt(draws)),
        spread=float(spread[0]),
        corrected_spread=float(spread[1]),
        standard_error=float(mean[2]),
    )


def rows(d: int, sizes: Sequence[int], draws: int) -> Iterator[str]:
    """Lines of the table, one for each number of rows and spectrum."""
    yield (
        "| N | spectrum | H behind | bias of H | by the formula | left after correction | spread of the corrected H "
        "| its standard error, mean |"
    )
    yield "|---" * 8 + "|"
    for n in sizes:
        for k, (name, spectrum) in enumerate(SPECTRA.items()):
            s = sampled(spectrum(d), n, draws=draws, seed=100 * k + n + d)
            yield (
                f"| {n:,} | {name} | {s.truth:.3f} | {s.bias:+.4f} | {s.formula:+.4f} | {s.left:+.4f} ± {s.noise:.4f} "
                f"| {s.corrected_spread:.4f} | {s.standard_error:.4f} |"
            )


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m fastent.statements.sampling", description=main.__doc__)
    parser.add_argument("--features", type=int, default=128)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 256, 512, 2048])
    parser.add_argument("--draws", type=int, default=200)
    given = parser.parse_args(argv)
    for line in rows(given.features, given.sizes, given.draws):
        print(line, flush=True)


if __name__ == "__main__":
    main()
