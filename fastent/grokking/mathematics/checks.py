"""Checks of the paper's mathematical statements that need no training: Lemmas 1 and 5, Proposition 6, a finite probe.

Each check tries one formula on cases that are hard for it and returns the `CheckResult`. The formula is an argument,
the right one by default, so that a test can put a wrong one in its place and see the check fail. The statements, with
proofs, are in ``docs/mathematics.md``; the formulas in `fastent.reference`.

``python -m fastent.grokking.mathematics.checks`` prints that page's table of the bias, the correction and the standard
error of H, from 200 samples of normal rows for each line.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.integrate import solve_ivp

from fastent.reference import forecast, mixing, perturbation
from fastent.reference.covariance import covariance
from fastent.reference.entropy import entropy_of_eigenvalues, fannes_audenaert
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


@dataclass(frozen=True)
class CheckResult:
    """Whether a statement passed its check, and the figures in words."""

    holds: bool
    text: str


def entropy_of(c: ArrayLike) -> float:
    """H of a covariance, in nats, by the convention `relative`."""
    return entropy_of_eigenvalues(np.linalg.eigvalsh(np.asarray(c, dtype=np.float64)))


def regularized_lipschitz(
    constant: Callable[[float, float, int], float] = perturbation.lipschitz_regularized,
) -> CheckResult:
    """Check Lemma 1 with the paper's eps inside the logarithm: one constant for all covariances."""
    worst = 0.0
    for eps in (1e-12, 1e-6, 1e-3):
        for c, other in covariance_pairs(eps):
            change = abs(
                perturbation.regularized_entropy(np.maximum(np.linalg.eigvalsh(c), 0), eps)
                - perturbation.regularized_entropy(np.maximum(np.linalg.eigvalsh(other), 0), eps)
            )
            total = max(np.trace(c), np.trace(other))
            allowed = constant(eps, float(total), len(c)) * float(np.linalg.norm(other - c))
            worst = max(worst, change / allowed)
    return CheckResult(bool(0.9 < worst <= 1), f"with eps: largest |dH| / (K ||E||) of all cases {worst:.3f}")


def papers_constant() -> CheckResult:
    """Say what Lemma 1's constant is at the paper's eps = 1e-12 and d = 128."""
    constant = perturbation.lipschitz_regularized(1e-12, 1.0, 128)
    limit = np.log(128) / constant
    return CheckResult(
        bool(0.01 < limit < 0.02),
        f"at eps = 1e-12, d = 128: K = {constant:.0f} / tr C, which says nothing beyond ||E||_F = {limit:.3f} tr C",
    )


def floored_lipschitz(
    constant: Callable[[float, float, int], float] = perturbation.lipschitz_above_floor,
) -> CheckResult:
    """Check Lemma 1 without eps: the constant by the smallest eigenvalue holds and must grow with its logarithm."""
    worst, nearest = 0.0, 0.0
    rng = np.random.default_rng(1)
    for d, smallest in itertools.product((2, 5, 40), (1e-2, 1e-6, 1e-12)):
        one_large = np.full(d, smallest)
        one_large[0] = 1.0
        for _ in range(50):
            lam = np.exp(rng.uniform(np.log(smallest), 0, d)) if rng.random() < 0.7 else one_large
            step = rng.standard_normal(d) * smallest * 10 ** rng.uniform(-3, 2)
            other = np.maximum(lam + step, smallest)
            k = constant(smallest, min(lam.sum(), other.sum()), d)
            change = abs(entropy_of_eigenvalues(lam) - entropy_of_eigenvalues(other))
            worst = max(worst, change / max(k * float(np.linalg.norm(other - lam)), 1e-300))
        share = perturbation.lipschitz_local(one_large) / constant(smallest, one_large.sum(), d)
        nearest = max(nearest, share)
    return CheckResult(
        worst <= 1 and 0.9 < nearest <= 1,
        f"without eps, K by the smallest eigenvalue: largest |dH| / (K ||E||) {worst:.3f}; {nearest:.3f} of K is "
        "needed",
    )


def no_lipschitz_without_eps() -> CheckResult:
    """Check that without eps no constant serves: ``diag(1, 0)`` to ``diag(1, t)`` needs ``log(1/t) + 1``."""
    slopes = [entropy_of_eigenvalues([1.0, t]) / t for t in (1e-3, 1e-6, 1e-12)]
    expected = [np.log(1 / t) + 1 for t in (1e-3, 1e-6, 1e-12)]
    close = np.allclose(slopes, expected, rtol=1e-3)
    return CheckResult(
        bool(close),
        "without eps: |dH| / ||E|| = " + ", ".join(f"{s:.1f}" for s in slopes) + " for t = 1e-3, 1e-6, 1e-12",
    )


def fannes_audenaert_bound(bound: Callable[[float, int], float] = fannes_audenaert) -> CheckResult:
    """Check the bound that needs neither eps nor a smallest eigenvalue, and that it is attained."""
    worst = 0.0
    for c, other in covariance_pairs(1e-9):
        distance = perturbation.trace_distance(c, other)
        if distance > 1e-6:  # below, rounding of p near 1 shows in the ratio
            worst = max(worst, abs(entropy_of(c) - entropy_of(other)) / bound(distance, len(c)))
    return CheckResult(0.95 < worst <= 1 + 1e-8, f"Fannes-Audenaert: largest |dH| / bound {worst:.4f}")


def first_order_entropy(gradient: Callable[[Array], Array] = perturbation.gradient_matrix) -> CheckResult:
    """Check ``dH = tr(G dC)`` by differences, at spectra with coinciding eigenvalues and any change of basis."""
    rng = np.random.default_rng(2)
    worst = 0.0
    for lam in ([3.0, 1.0, 1.0, 1.0, 0.1], [1.0, 1.0, 1.0], [5.0, 2.0, 1e-3, 1e-4]):
        q = np.linalg.qr(rng.standard_normal((len(lam), len(lam))))[0]
        c = (q * lam) @ q.T
        e = rng.standard_normal(c.shape)
        e = (e + e.T) * lam[-1]
        step = 1e-4
        slope = (entropy_of(c + step * e) - entropy_of(c - step * e)) / (2 * step)
        worst = max(worst, abs(slope - float((gradient(c) * e).sum())) / max(abs(slope), lam[-1]))
    return CheckResult(worst < 1e-4, f"dH = tr(G dC): largest relative error against differences {worst:.1e}")


def mixing_sandwich(
    constant: Callable[[float], tuple[float, float]] = mixing.sandwich, largest: int = 7
) -> CheckResult:
    """Check ``(1-2a)^2 C <= C_mixed <= C`` for all permutations of up to `largest` rows, and that it is tight."""
    rng = np.random.default_rng(3)
    worst, lowest, highest, count = 0.0, 1.0, 0.0, 0
    for n in range(2, largest + 1):
        x = rng.standard_normal((n, 3)) * [3.0, 1.0, 0.2]
        y = x - x.mean(axis=0)
        every = np.array(list(itertools.permutations(range(n))))
        c = covariance(y)
        basis = np.linalg.eigh(c)
        kept = basis[0] > 1e-12 * basis[0][-1]
        whiten = basis[1][:, kept] / np.sqrt(basis[0][kept])
        for alpha in (0.1, 0.35, 0.5, 0.8):
            mixed = (1 - alpha) * y + alpha * y[every]  # (permutations, n, d)
            white = mixed @ whiten
            ratios = np.linalg.eigvalsh(white.mT @ white / n)  # of C_mixed against C
            low, high = constant(alpha)
            worst = max(worst, low - ratios.min(), ratios.max() - high)
            lowest, highest = min(lowest, ratios.min() - low), max(highest, ratios.max())
            count += len(every)
    tight = lowest < 1e-9 and highest > 1 - 1e-9
    return CheckResult(
        bool(worst < 1e-9 and tight),
        f"sandwich: all {count:,} permutations and coefficients inside, both ends attained",
    )


def mixing_bound(bound: Callable[[float, int], float] = mixing.best_bound) -> CheckResult:
    """Check the best bound for all permutations of 6 rows and random ones of 200, and that it is attained."""
    rng = np.random.default_rng(4)
    every = np.array(list(itertools.permutations(range(6))))
    worst = 0.0
    for d, alpha in itertools.product((2, 3), (0.05, 0.1, 0.3, 0.7)):
        x = rng.standard_normal((6, d)) * 0.3 ** np.arange(d)
        worst = max(worst, _largest_change(x, every, alpha) / bound(alpha, d))
    for d, alpha in itertools.product((4, 16), (0.1, 0.4)):
        x = np.cumsum(rng.standard_normal((200, d)), axis=0) * 0.7 ** np.arange(d)
        some = np.stack([rng.permutation(200) for _ in range(20)])
        worst = max(worst, _largest_change(x, some, alpha) / bound(alpha, d))
    shares = []
    for d, alpha in ((2, 0.1), (8, 0.1), (8, 0.3), (128, 0.1)):
        rows, swap = mixing.extremal_rows(256, d, alpha)
        loss = entropy_of(covariance(rows)) - entropy_of(mixing.mixed_covariance(rows, swap, alpha))
        shares.append(loss / bound(alpha, d))
    attained = all(abs(share - 1) < 1e-9 for share in shares)
    return CheckResult(
        worst <= 1 + 1e-9 and attained,
        f"best bound: largest |dH| / B of all other cases {worst:.3f}; swapped pairs attain {min(shares):.9f} of it",
    )


def _largest_change(x: Array, permutations: NDArray[np.intp], alpha: float) -> float:
    y = x - x.mean(axis=0)
    mixed = (1 - alpha) * y + alpha * y[permutations]
    spectra = np.linalg.eigvalsh(mixed.mT @ mixed / len(y))
    before = entropy_of(covariance(x))
    return max(abs(entropy_of_eigenvalues(lam) - before) for lam in spectra)


def printed_mixing_bound() -> CheckResult:
    """Check that the printed Lemma 5 fails: on the counterexample the loss over alpha tends to a constant."""
    x = mixing.counterexample()
    shift = mixing.cyclic_shift(len(x))
    before = entropy_of(covariance(x))
    slopes = [
        (entropy_of(covariance(mixing.mix(x, shift, alpha))) - before) / alpha
        for alpha in (0.1, 0.05, 0.01, 0.001)
    ]
    expected = (-0.990, -0.939, -0.896, -0.886)
    limit = mixing.slope(x, shift)
    holds = np.allclose(slopes, expected, atol=5e-4) and abs(limit - slopes[-1]) < 2e-3
    listed = ", ".join(f"{s:.3f}" for s in slopes)
    return CheckResult(
        bool(holds),
        f"counterexample: (H_mix - H) / a = {listed} at a = 0.1, 0.05, 0.01, 0.001; {limit:.3f} in the limit",
    )


def mixing_expectations(
    factor: Callable[[float, int, str], float] = lambda alpha, n, over: float(
        mixing.expected_covariance(np.ones((1, 1)), n, alpha, over=over)[0, 0]  # type: ignore[arg-type]
    ),
    largest: int = 7,
) -> CheckResult:
    """Check both expected covariances, the mean slope 0 and its spread, over all permutations of few rows."""
    rng = np.random.default_rng(5)
    worst = 0.0
    for n in range(3, largest + 1):
        x = rng.standard_normal((n, 3)) * [2.0, 1.0, 0.3]
        y = x - x.mean(axis=0)
        c = covariance(x)
        every = np.array(list(itertools.permutations(range(n))))
        free = (every != np.arange(n)).all(axis=1)
        for alpha in (0.2, 0.6):
            mixed = (1 - alpha) * y + alpha * y[every]
            covariances = mixed.mT @ mixed / n
            for over, chosen in (("permutations", covariances), ("derangements", covariances[free])):
                error = chosen.mean(axis=0) - factor(alpha, n, over) * c
                worst = max(worst, float(np.abs(error).max()))
        slopes = slopes_over(x, every)
        lam = np.linalg.eigvalsh(c)
        deviation = mixing.slope_deviation(lam, n)
        worst = max(worst, abs(slopes.mean()), abs(slopes[free].mean()), abs(slopes.std() / deviation - 1))
    return CheckResult(
        worst < 1e-10,
        f"averages and spread of the slope: largest error over all permutations of 3 to {largest} rows {worst:.0e}",
    )


def derangements(n: int) -> NDArray[np.intp]:
    """All permutations of `n` rows without a fixed point, (count, n)."""
    every = np.array(list(itertools.permutations(range(n))))
    return np.asarray(every[(every != np.arange(n)).all(axis=1)])


def mixing_on_average(allowed: Callable[[int], NDArray[np.intp]] = derangements) -> CheckResult:
    """Check that over all derangements the mean change of H is of second order in alpha, of either sign."""
    rng = np.random.default_rng(7)
    data = [np.array([[5.0, -6.0], [-4.0, 0.0], [4.0, -6.0], [-4.0, 1.0]])]
    data += [rng.standard_normal((6, 3)) * np.exp(rng.uniform(-2, 0, 3)) for _ in range(6)]
    limits, steady, worst = [], True, 0.0
    for x in data:
        y, permutations = x - x.mean(axis=0), allowed(len(x))
        before = entropy_of(covariance(x))
        changes = []
        for alpha in (0.01, 0.001):
            mixed = (1 - alpha) * y + alpha * y[permutations]
            spectra = np.linalg.eigvalsh(mixed.mT @ mixed / len(y))
            changes.append(np.array([entropy_of_eigenvalues(lam) for lam in spectra]) - before)
        coarse, fine = changes[0].mean() / 0.01**2, changes[1].mean() / 0.001**2
        steady &= bool(abs(coarse - fine) < 0.1 * abs(fine))
        limits.append(float(fine))
        worst = min(worst, float(changes[1].min()) / 0.001)
    return CheckResult(
        steady and min(limits) < 0 < max(limits) and worst < -0.1,
        f"mean over all derangements: (H_mix - H) / a^2 tends to {min(limits):+.2f} to {max(limits):+.2f}, of "
        f"{len(data)} data sets; for one of them (H_mix - H) / a to {worst:.2f}",
    )


def relaxation_and_power_law(
    remaining: Callable[..., Array] = forecast.remaining_repaired,
) -> CheckResult:
    """Check Proposition 6's closed forms against scipy's solver, and which way each law bends."""
    h0, h_star, h_inf, k = 0.9, 0.605, 0.5, 2e-4
    t = np.linspace(0, 1e4, 60)

    def solve(rate: Callable[[Array], Array], times: Array) -> tuple[Array, float]:
        """H at the times, and when it crosses H* (NaN if it does not)."""
        solution = solve_ivp(
            lambda _, h: rate(h),
            (0.0, times[-1]),
            [h0],
            "DOP853",
            t_eval=times,
            events=lambda _, h: h[0] - h_star,
            rtol=1e-12,
            atol=1e-14,
        )
        crossing = solution.t_events[0]
        return np.asarray(solution.y[0]), float(crossing[0]) if crossing.size else np.nan

    relaxing, crossing = solve(lambda h: forecast.rate_relaxing(h, floor=h_inf, k=k), t)
    error = np.abs(relaxing - forecast.entropy_relaxing(t, h0=h0, floor=h_inf, k=k)).max()
    foretold = float(remaining(h0, h_star=h_star, h_inf=h_inf, k=k))
    error = max(error, abs(foretold / crossing - 1))
    printed = forecast.entropy_relaxing(np.array([1e3, 1e4, 1e6]), h0=h0, floor=h_star, k=k)
    c1, gamma = 40_000.0, 1.65
    whole = float(forecast.remaining_power(h0, h_star=h_star, c1=c1, gamma=gamma, c2=0.0))
    times = np.linspace(0, 0.99 * whole, 60)
    power, _ = solve(lambda h: forecast.rate_power(h, h_star=h_star, c1=c1, gamma=gamma), times)
    law = forecast.entropy_power(whole - times, h_star=h_star, c1=c1, gamma=gamma, c2=0.0)
    error = max(error, np.abs(power - law).max())
    bends = bool((np.diff(relaxing, 2) > 0).all() and (np.diff(power, 2) < 0).all())
    never = bool((printed >= h_star).all())
    return CheckResult(
        bool(error < 1e-8) and bends and never,
        f"closed forms to {error:.0e} of the solver; the relaxation slows throughout, gamma = {gamma} speeds up",
    )


def bias_of_samples(
    bias: Callable[[Array, int], float] = sampling_bias, *, n: int = 256, d: int = 128, draws: int = 30
) -> CheckResult:
    """Check the bias formula on normal rows with planted spectra, and that H of a sample is low."""
    rng = np.random.default_rng(6)
    worst, parts = 0.0, []
    spectra: dict[str, Array] = {"flat": np.ones(d), "geometric 0.97": np.power(0.97, np.arange(d))}
    for name, lam in spectra.items():
        seen = [entropy_of(covariance(rng.standard_normal((n, d)) * np.sqrt(lam))) for _ in range(draws)]
        measured = np.mean(seen) - entropy_of_eigenvalues(lam)
        predicted = bias(lam, n)
        noise = np.std(seen) / np.sqrt(draws)
        worst = max(worst, (abs(predicted - measured) - 3 * noise) / abs(measured))
        parts.append(f"{name} {measured / np.log(d):.4f} (formula {predicted / np.log(d):.4f})")
    return CheckResult(bool(worst < 0.02), f"bias of H at N = {n}, d = {d}: " + ", ".join(parts))


def covariance_pairs(eps: float) -> Iterator[tuple[Array, Array]]:
    """Pairs of covariances near and far: random ones, and the families that are worst for a bound on entropy."""
    rng = np.random.default_rng(0)
    for d in (2, 3, 8, 64):
        single = np.diag([1.0] + [0.0] * (d - 1))
        for t in (1e-12, eps, 1e3 * eps, 0.01, 0.3):
            yield single, np.diag([1.0] + [t] * (d - 1))
            yield single, np.diag([1 - t] + [t / (d - 1)] * (d - 1))
        for _ in range(8):
            lam = np.exp(rng.uniform(-20, 0, d))
            q = np.linalg.qr(rng.standard_normal((d, d)))[0]
            c = (q * lam) @ q.T
            y = rng.standard_normal((2 * d, d)) * 10 ** rng.uniform(-6, 0)
            c = (c + c.T) / 2
            yield c, c + y.T @ y / len(y)
            yield c, np.asarray(covariance(y), dtype=np.float64)


def slopes_over(x: Array, permutations: NDArray[np.intp]) -> Array:
    """``dH / d alpha`` at 0 for many permutations (m, n) at once: `fastent.reference.mixing.slope`, shape (m,)."""
    y = x - x.mean(axis=0)
    q = 2 * y @ perturbation.gradient_matrix(covariance(x)) @ y.T
    slopes: Array = q[np.arange(len(y)), permutations].mean(axis=1)
    return slopes


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


def correction_of_samples(draws: int = 12) -> CheckResult:
    """Check the jackknife's correction on flat and geometric spectra at N = 256, d = 128."""
    found = {
        name: sampled(SPECTRA[name](128), 256, draws=draws, seed=0) for name in ("flat", "geometric 0.97")
    }
    parts = [f"{name} {s.bias:+.4f} to {s.left:+.4f}" for name, s in found.items()]
    return CheckResult(
        all(abs(s.left) < 0.1 * abs(s.bias) for s in found.values()),
        "correction at N = 256, d = 128: " + ", ".join(parts),
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
    """Print the table of a finite probe's H."""
    parser = argparse.ArgumentParser(
        prog="python -m fastent.grokking.mathematics.checks", description=main.__doc__
    )
    parser.add_argument("--features", type=int, default=128)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 256, 512, 2048])
    parser.add_argument("--draws", type=int, default=200)
    given = parser.parse_args(argv)
    for line in rows(given.features, given.sizes, given.draws):
        print(line, flush=True)


if __name__ == "__main__":
    main()
