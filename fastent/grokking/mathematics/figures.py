"""Figures of ``docs/mathematics.md``.

``python -m fastent.grokking.mathematics.figures bench/results/mathematics docs/figures`` draws all of them: those about
Lemma 5 and finite probes from formulas, the others from runs that `fastent.grokking.mathematics.runs` recorded.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from fastent.grokking.experiments.figures import LIGHT, WIDTH, save_png
from fastent.grokking.mathematics.checks import entropy_of
from fastent.grokking.mathematics.collapse import Phase, collapse_span, steps_by_phase
from fastent.grokking.mathematics.runs import PROBE_SIZES, FollowedRun, read_followed
from fastent.reference import mixing
from fastent.reference.covariance import covariance
from fastent.reference.entropy import entropy_of_eigenvalues
from fastent.reference.sampling import sampling_bias

Array = NDArray[np.float64]

PHASE_COLOURS: dict[Phase, str] = {"before": LIGHT.train, "during": LIGHT.signal, "after": LIGHT.test}
PHASE_MARKERS: dict[Phase, str] = {"before": "o", "during": "D", "after": "s"}


def counterexample() -> Figure:
    """H of the mixed counterexample against alpha, with the best bound and what the paper prints."""
    figure = Figure(figsize=(WIDTH, 4.0), layout="constrained")
    a, b = figure.subplots(1, 2)
    x = mixing.counterexample()
    shift = mixing.cyclic_shift(len(x))
    before = entropy_of(covariance(x))
    alpha = np.linspace(0, 0.25, 101)
    change = np.array([entropy_of(covariance(mixing.mix(x, shift, v))) - before for v in alpha])
    bound = np.array([-mixing.best_bound(v, 2) for v in alpha])
    rng = np.random.default_rng(0)
    some = [rng.permutation(len(x)) for _ in range(400)]
    mean = [
        np.mean([entropy_of(mixing.mixed_covariance(x, p, v)) for p in some]) - before for v in alpha[::10]
    ]
    a.plot(alpha, change, color=LIGHT.signal, linewidth=2.2, label="cyclic shift")
    a.plot(alpha, bound, color=LIGHT.ink, linewidth=1.5, linestyle=(0, (5, 2)), label="best bound, -B(α, 2)")
    a.plot(alpha[::10], mean, color=LIGHT.test, marker="o", markersize=4, label="mean of 400 permutations")
    constant = -change[40] / alpha[40] ** 2
    a.plot(
        alpha,
        -constant * alpha**2,
        color=LIGHT.norm,
        linestyle=(0, (1, 1.5)),
        linewidth=2,
        label="-c α², c fitted at α = 0.1",
    )
    a.set(
        title="A  Change of entropy by mixing",
        xlabel="mixing coefficient α",
        ylabel="H after - H before (nats)",
    )
    a.set_ylim(-0.5, 0.06)
    a.legend(loc="lower left")

    small = np.geomspace(1e-4, 0.25, 60)
    loss = np.array([before - entropy_of(covariance(mixing.mix(x, shift, v))) for v in small])
    best = np.array([mixing.best_bound(v, 2) for v in small])
    b.semilogx(small, loss / small, color=LIGHT.signal, linewidth=2.2, label="cyclic shift")
    b.semilogx(small, best / small, color=LIGHT.ink, linewidth=1.5, linestyle=(0, (5, 2)), label="best bound")
    b.semilogx(
        small,
        constant * small,
        color=LIGHT.norm,
        linestyle=(0, (1, 1.5)),
        linewidth=2,
        label="c α², as printed",
    )
    b.set(title="B  Loss divided by α", xlabel="mixing coefficient α", ylabel="nats", ylim=(0, 1.2))
    b.legend(loc="center left")
    return figure


def sandwich() -> Figure:
    """Ordered eigenvalues of three mixed covariances between ``(1 - 2 alpha)^2`` times the old ones and these."""
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    axes = figure.subplots()
    n, d, alpha = 256, 16, 0.3
    rng = np.random.default_rng(1)
    t = np.arange(n)
    # Slow columns first, then fast ones, so that a cyclic shift treats them unlike.
    waves = np.cos(2 * np.pi * np.outer(t, np.linspace(1, n // 2 - 1, d).round()) / n) * np.sqrt(2)
    x = waves * np.sqrt(0.72 ** np.arange(d))
    lam = np.linalg.eigvalsh(covariance(x))[::-1]
    low, _ = mixing.sandwich(alpha)
    place = np.arange(1, d + 1)
    axes.fill_between(place, low * lam, lam, color=LIGHT.entropy, alpha=0.18, linewidth=0, label="allowed")
    axes.plot(place, lam, color=LIGHT.ink, linewidth=1.5, label="λ, before")
    axes.plot(place, low * lam, color=LIGHT.ink, linewidth=1.5, linestyle=(0, (5, 2)), label="(1 - 2α)² λ")
    permutations = {
        "cyclic shift": (mixing.cyclic_shift(n), "o", LIGHT.signal),
        "random": (rng.permutation(n), "s", LIGHT.test),
        "shift by 2": (mixing.cyclic_shift(n, 2), "^", LIGHT.norm),
    }
    for name, (permutation, marker, colour) in permutations.items():
        after = np.linalg.eigvalsh(mixing.mixed_covariance(x, permutation, alpha))[::-1]
        change = entropy_of_eigenvalues(after) - entropy_of_eigenvalues(lam)
        label = f"{name}: H {change:+.3f} nats".replace("-", "−")
        axes.plot(place, after, marker, color=colour, markersize=6, label=label)
    axes.set(yscale="log", xlabel="place in the order", ylabel="eigenvalue of the covariance")
    axes.set_title(f"Eigenvalues after mixing with α = {alpha}: every permutation stays in the band")
    axes.legend(loc="lower left", ncols=2)
    return figure


def descent(run: FollowedRun) -> Figure:
    """Predicted against measured change of H in single steps, and alignment and entropy along the run."""
    figure = Figure(figsize=(WIDTH, 7.4), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(1.15, 1))
    step = run.column("step")
    start, end = collapse_span(run.evaluated("step"), run.evaluated("entropy"))
    phases = steps_by_phase(run)
    change = run.column("change")
    for place, (name, title) in enumerate(
        (
            ("predicted", "A  To first order, step as made"),
            ("along_gradient", "B  The loss's gradient for the step, as printed"),
        )
    ):
        axes = figure.add_subplot(grid[0, place])
        for phase in PHASE_COLOURS:
            axes.plot(
                _signed_root(run.column(name)[phases[phase]]),
                _signed_root(change[phases[phase]]),
                PHASE_MARKERS[phase],
                color=PHASE_COLOURS[phase],
                markersize=4,
                alpha=0.75,
                markeredgewidth=0,
                label=f"{phase} the collapse",
            )
        reach = float(_signed_root(np.abs(change)).max()) * 1.05
        axes.plot([-reach, reach], [-reach, reach], color=LIGHT.ink, linewidth=1)
        axes.axhline(0, color=LIGHT.ink, linewidth=0.6)
        axes.axvline(0, color=LIGHT.ink, linewidth=0.6)
        _root_ticks(axes, reach)
        axes.set(title=title, xlabel="predicted dH (nats a step)", ylabel="measured dH (nats a step)")
        axes.legend(loc="upper left")
    entropy_axes = figure.add_subplot(grid[1, 0])
    entropy_axes.plot(
        run.evaluated("step"), run.evaluated("entropy"), color=LIGHT.entropy, linewidth=2, label="H"
    )
    entropy_axes.plot(
        run.evaluated("step"),
        run.evaluated("test_accuracy"),
        color=LIGHT.test,
        linewidth=1.6,
        linestyle=(0, (5, 2)),
        label="test accuracy",
    )
    entropy_axes.set(
        title="C  The run", xlabel="training step", ylabel="H, accuracy (no unit)", ylim=(-0.03, 1.05)
    )
    alignment_axes = figure.add_subplot(grid[1, 1])
    alignment_axes.plot(
        step, run.column("correlation"), ".", color=LIGHT.train, markersize=3, label="single steps"
    )
    smooth = np.convolve(run.column("correlation"), np.ones(21) / 21, mode="valid")
    alignment_axes.plot(step[10:-10], smooth, color=LIGHT.signal, linewidth=2, label="mean of 21")
    alignment_axes.axhline(0, color=LIGHT.ink, linewidth=0.8)
    alignment_axes.set(title="D  Alignment", xlabel="training step", ylabel="correlation of log p and growth")
    for axes in (entropy_axes, alignment_axes):
        axes.axvspan(start, end, color=LIGHT.signal, alpha=0.12, linewidth=0, label="collapse")
    entropy_axes.legend(loc="lower left")
    alignment_axes.legend(loc="upper left")
    return figure


def _signed_root(x: Array) -> Array:
    """Signed square root: an axis on which single steps and instabilities both show."""
    root: Array = np.sign(x) * np.sqrt(np.abs(x))
    return root


def _root_ticks(axes: object, reach: float) -> None:
    magnitudes = [m for m in (1e-4, 1e-3, 1e-2, 1e-1, 1.0) if np.sqrt(m) <= reach]
    values = np.array([-m for m in reversed(magnitudes)] + [0.0, *magnitudes])
    crowded = (*magnitudes[:2], 0.0)
    labels = ["" if abs(v) in crowded else f"{v:g}".replace("-", "−") for v in values]
    for name in ("x", "y"):
        getattr(axes, f"set_{name}ticks")(_signed_root(values), labels, fontsize=8)
        getattr(axes, f"set_{name}lim")(-reach, reach)


def probes(run: FollowedRun) -> Figure:
    """H against the number of rows: planted spectra with the formula, and a run's activations with the correction."""
    figure = Figure(figsize=(WIDTH, 4.3), layout="constrained")
    a, b = figure.subplots(1, 2)
    d = 128
    spectra = {
        "flat": (np.ones(d), LIGHT.test, "o"),
        "geometric, 0.97": (0.97 ** np.arange(d), LIGHT.norm, "s"),
        "geometric, 0.9": (0.9 ** np.arange(d), LIGHT.signal, "D"),
        "power law, 1/i": (1 / (1.0 + np.arange(d)), LIGHT.entropy, "^"),
    }
    rng = np.random.default_rng(0)
    sizes = np.array([48, 96, 192, 384, 768, 1536])
    fine = np.geomspace(sizes[0], sizes[-1], 80)
    for name, (lam, colour, marker) in spectra.items():
        truth = entropy_of_eigenvalues(lam) / np.log(d)
        formula = [truth + sampling_bias(lam, 1) / n / np.log(d) for n in fine]
        seen = [
            np.mean([entropy_of(covariance(rng.standard_normal((n, d)) * np.sqrt(lam))) for _ in range(12)])
            for n in sizes
        ]
        a.semilogx(fine, formula, color=colour, linewidth=1.5)
        a.semilogx(sizes, np.array(seen) / np.log(d), marker, color=colour, markersize=5, label=name)
        a.axhline(truth, color=colour, linewidth=0.8, linestyle=(0, (1, 2)))
    a.axvline(d, color=LIGHT.ink, linewidth=0.8)
    a.plot([], [], color=LIGHT.ink, linewidth=1.5, label="formula")
    a.plot([], [], color=LIGHT.ink, linewidth=0.8, linestyle=(0, (1, 2)), label="H behind the sample")
    a.set(title="A  Normal rows, d = 128", xlabel="rows N", ylabel="H (no unit)", ylim=(0.47, 1.03))
    a.legend(loc="lower right", ncols=2)
    at = [i for i, row in enumerate(run.evaluations) if row["test_accuracy"] >= run.config.criterion]
    row = run.evaluations[at[0] if at else -1]
    kept = [size for size in PROBE_SIZES if f"entropy_{size}" in row]
    b.axhline(
        row["entropy_all"], color=LIGHT.ink, linewidth=1.5, label=f"all {row['training_pairs']:,} pairs"
    )
    b.semilogx(kept, [row[f"entropy_{n}"] for n in kept], "o-", color=LIGHT.entropy, label="as found")
    b.errorbar(
        kept,
        [row[f"corrected_{n}"] for n in kept],
        [1.96 * row[f"standard_error_{n}"] for n in kept],
        fmt="D",
        color=LIGHT.test,
        capsize=3,
        label="corrected, 95 %",
    )
    b.axvline(run.config.width, color=LIGHT.ink, linewidth=0.8)
    b.set(
        title=f"B  Activations at T_grok, seed {run.seed}",
        xlabel="probe's training pairs N",
        ylabel="H (no unit)",
    )
    b.legend(loc="lower right")
    for axes in (a, b):
        axes.set_xticks([64, 128, 256, 512, 1024], ["64", "128", "256", "512", "1,024"])
        axes.minorticks_off()
    return figure


def curvature(runs: Sequence[FollowedRun]) -> Figure:
    """Largest Hessian eigenvalue and the speed of the fall of H along each run."""
    figure = Figure(figsize=(WIDTH, 4.8), layout="constrained")
    above, below = figure.subplots(2, len(runs), sharex="col", sharey="row", squeeze=False)
    for a, b, run in zip(above, below, runs, strict=True):
        at = np.array([s for s, _ in run.curvature])
        a.semilogy(at, [ritz.value for _, ritz in run.curvature], color=LIGHT.norm, linewidth=1.8)
        a.set_title(f"seed {run.seed}")
        step, entropy = run.evaluated("step"), run.evaluated("entropy")
        reach = 4  # evaluations to either side: single differences hide the course
        fall = (entropy[: -2 * reach] - entropy[2 * reach :]) / (step[2 * reach :] - step[: -2 * reach]) * 1e3
        b.plot(step[reach:-reach], fall, color=LIGHT.entropy, linewidth=1.3)
        b.axhline(0, color=LIGHT.ink, linewidth=0.8)
        b.set_xlabel("training step")
    above[0].set_ylabel("largest Hessian eigenvalue")
    below[0].set_ylabel("fall of H per 1,000 steps")
    return figure


def draw_all(records: Path, out: Path) -> list[Path]:
    """Draw every figure; return the files written.

    Raises
    ------
    FileNotFoundError
        If `records` holds no run.
    """
    runs = [read_followed(path) for path in sorted(records.glob("*-seed*.jsonl"))]
    if not runs:
        raise FileNotFoundError(
            f"{records} holds no run: python -m fastent.grokking.mathematics.runs {records}"
        )
    figures: dict[str, Callable[[], Figure]] = {
        "mixing-counterexample": counterexample,
        "mixing-sandwich": sandwich,
        "entropy-descent": functools.partial(descent, runs[0]),
        "finite-probe": functools.partial(probes, runs[0]),
        "curvature": functools.partial(curvature, runs),
    }
    written = []
    for name, draw in figures.items():
        written.append(out / f"{name}.png")
        save_png(draw, written[-1], dpi=130)
    return written


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the figures of docs/mathematics.md."""
    parser = argparse.ArgumentParser(
        prog="python -m fastent.grokking.mathematics.figures", description=main.__doc__
    )
    parser.add_argument("records", type=Path, help="folder of followed runs, bench/results/mathematics")
    parser.add_argument("out", type=Path, help="folder of the pictures, docs/figures")
    given = parser.parse_args(argv)
    for path in draw_all(given.records, given.out):
        print(path)


if __name__ == "__main__":
    main()
