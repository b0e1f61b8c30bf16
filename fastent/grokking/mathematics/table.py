"""The paper's Table 6 with our column: what each mathematical item claims, what we find, and the evidence, made afresh.

Statements that need no training are checked on cases that are hard for them
(`fastent.grokking.mathematics.checks`); those about training on a small network that groks within seconds, trained
here. The proofs, and the same figures for larger runs, are in ``docs/mathematics.md``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastent.entropy import spectral_entropy
from fastent.grokking.mathematics import checks
from fastent.grokking.mathematics.checks import CheckResult
from fastent.grokking.mathematics.collapse import (
    collapse_span,
    concentration,
    curvature_correlation,
    descent,
    fit_laws,
    shrinkage,
)
from fastent.grokking.mathematics.runs import (
    FollowedRun,
    adamw_direction,
    batch_noise,
    follow,
    loss_gradient,
    remainders,
    training_pairs,
)
from fastent.grokking.train.config import TrainConfig, preset
from fastent.grokking.train.stack import Stack

SMALL = preset(
    "quick",
    readout="mean",
    modulus=23,
    width=32,
    feedforward=128,
    train_fraction=0.7,
    learning_rate=2e-3,
    batch_size=256,
    evaluate_every=50,
)
"""A Transformer on addition mod 23 that groks in about 2,000 steps, a few seconds."""

SMALL_STEPS = 2800

RATES = (1e-5, 1e-4, 1e-3)


@dataclass(frozen=True)
class Item:
    """A row of Table 6: its status in the paper, ours, and how it was checked just now."""

    name: str
    paper: str
    finding: str
    evidence: tuple[CheckResult, ...]

    @property
    def holds(self) -> bool:
        """Whether the evidence supports the finding (not: the paper)."""
        return all(evidence.holds for evidence in self.evidence)


def items(runs: Path | None = None) -> Iterator[Item]:
    """Check every item of Table 6, in its order, and the sampling error of H; about a minute in all.

    Parameters
    ----------
    runs : Path, optional
        Folder of runs, the --out of `fastent run`, for Heuristic 2 in the place of small ones.
    """
    yield Item(
        "Lemma 1 (entropy sensitivity)",
        "full proof",
        "holds with eps in the logarithm, for all covariances and with no spectral gap; without it no constant serves. "
        "Fannes-Audenaert is sharper and needs neither",
        (
            checks.regularized_lipschitz(),
            checks.no_lipschitz_without_eps(),
            checks.floored_lipschitz(),
            checks.fannes_audenaert_bound(),
            checks.papers_constant(),
        ),
    )
    yield Item(
        "Lemma 2 (covariance update)",
        "full proof",
        "holds for the step that is made; with the loss's gradient it is SGD's, in expectation over minibatches only",
        tuple(covariance_updates()),
    )
    run = follow(SMALL, 0, max_steps=SMALL_STEPS, measure_every=20, curvature_every=100)
    yield Item(
        "Proposition 3 (entropy descent)",
        "proof sketch",
        "an identity to first order, dH = -Cov_p(log p, growth); the alignment is weak, and the paper's condition for "
        "its sign does not decide it",
        (checks.first_order_entropy(), descent_of(run)),
    )
    yield Item(
        "Lemma 4 (effective rank)",
        "full proof",
        "r'/r = exp(dH) is exact; exponential shrinkage needs a rate bounded away from 0, which runs do not have",
        (shrinkage_of(run),),
    )
    yield Item(
        "Heuristic 1 (curvature)",
        "heuristic",
        "not a law: under AdamW the loss's scale moves one side only, under SGD the head's; measured",
        (curvature_of_run(run),),
    )
    spread = thresholds() if runs is None else stored_thresholds(runs)
    yield Item(
        "Heuristic 2 (threshold)",
        "empirical",
        "measured, seeds against tasks: tasks do not differ at the preset quick, and do at the preset paper",
        (spread,),
    )
    yield Item(
        "Lemma 5 (mixing)",
        "full proof",
        "false for a given permutation: the loss can be of first order in alpha, and is for half of them. On average "
        "over random derangements the first order vanishes: the loss is O(alpha^2), and a gain as well. For each, a "
        "sharp bound B(alpha, d)",
        (
            checks.printed_mixing_bound(),
            checks.mixing_on_average(),
            checks.mixing_sandwich(),
            checks.mixing_bound(),
            checks.mixing_expectations(),
            mixing_on(run),
        ),
    )
    yield Item(
        "Proposition 6 (scaling)",
        "proof sketch",
        "solves its equation, but never reaches H*; relaxing to less than H* repairs it. The power law with gamma > 1 "
        "bends the other way, so it generalises neither",
        (checks.relaxation_and_power_law(), laws_of(run)),
    )
    yield Item(
        "H of a finite probe",
        "not treated",
        "low by about d / (2 N log d) for a flat spectrum, less for a steep one; the grouped jackknife corrects it",
        (checks.bias_of_samples(), checks.correction_of_samples()),
    )


def covariance_updates() -> Iterator[CheckResult]:
    """Check Lemma 2 on the Transformer and an MLP for both optimisers, and with the gradient for AdamW's step."""
    changes: Mapping[str, dict[str, object]] = {
        "Transformer": {"activation": "gelu"},
        "MLP": {"model": "mlp", "hidden": (64, 32), "activation": "gelu"},
    }
    for name, change in changes.items():
        stack = Stack(dataclasses.replace(SMALL, **change), [0])  # type: ignore[arg-type]
        for _ in range(200):
            stack.train_step()
        train = training_pairs(stack, 0)
        module, pairs = stack.module(0).double(), stack.task.inputs[train]
        gradient = loss_gradient(module, pairs, stack.task.labels[train])
        adamw = adamw_direction(stack, 0, gradient)
        sgd = {key: -g for key, g in gradient.items()}
        spreads = [_spread(remainders(module, pairs, direction, RATES)) for direction in (sgd, adamw)]
        printed = _spread(remainders(module, pairs, adamw, RATES, first_order=sgd))
        yield CheckResult(
            max(spreads) < 1.2 and printed > 30,
            f"{name}: remainder / eta^2 varies by {max(spreads):.2f} over two decades, SGD and AdamW; by {printed:.0f} "
            "with the gradient in the place of AdamW's step",
        )
    noise = batch_noise(stack, 0, 37)
    yield CheckResult(
        noise.mean_error < 1e-12,
        f"one minibatch of a tenth of the pairs is off by {noise.deviation:.1f} of the update, their mean by "
        f"{noise.mean_error:.0e}",
    )


def _spread(x: np.ndarray) -> float:
    return float(x.max() / x.min())


def descent_of(run: FollowedRun) -> CheckResult:
    """Proposition 3 on a run, by phase of its collapse."""
    phases = {row.phase: row for row in descent(run)}
    parts = [
        f"{name}: rank correlation {row.rank_correlation:.2f}, signs {row.sign_agreement:.0%}, alignment "
        f"{row.alignment:+.2f}, leading eigenvalue grows in {row.leading:.0%}"
        for name, row in phases.items()
        if name != "all"
    ]
    row = phases["all"]
    parts.append(
        f"with the loss's gradient: {row.gradient_rank_correlation:.2f}, signs {row.gradient_sign:.0%}"
    )
    holds = row.rank_correlation > 0.6 and row.sign_agreement > 0.7
    return CheckResult(holds, "predicted against measured, single steps. " + "; ".join(parts))


def shrinkage_of(run: FollowedRun) -> CheckResult:
    """Lemma 4 on a run."""
    entropy = run.evaluated("entropy") * np.log(run.config.width)
    found = shrinkage(run.evaluated("step"), entropy, np.exp(entropy))
    return CheckResult(
        found.identity_error < 1e-13 and found.slowest < 0.2 * found.fastest,
        f"identity to {found.identity_error:.0e}; in the collapse, rank {found.rank_start:.1f} to "
        f"{found.rank_end:.1f}, -dH/dt is {found.slowest:.1e} to {found.fastest:.1e} nats a step, negative in "
        f"{found.rising:.0%}",
    )


def curvature_of_run(run: FollowedRun) -> CheckResult:
    """Heuristic 1 on a run; any correlation will do, but it must come with its interval."""
    whole, falling = curvature_correlation(run)
    parts = [
        f"{name} {estimate.value:+.2f} ({estimate.low:+.2f} to {estimate.high:+.2f}, n = {estimate.n})"
        for name, estimate in (("whole run", whole), ("from the maximum of H", falling))
    ]
    return CheckResult(
        bool(np.isfinite([whole.value, falling.value]).all()),
        "Spearman correlation of the Hessian's largest eigenvalue with -dH/dt: " + ", ".join(parts),
    )


def thresholds(config: TrainConfig = SMALL, *, seeds: int = 4, max_steps: int = 6000) -> CheckResult:
    """Heuristic 2: train seeds of three tasks until they grok; any spread of H* will do, but with its interval."""
    tasks: tuple[str, ...] = ("add", "sub", "mul")
    values = {
        task: grokking_entropies(dataclasses.replace(config, task=task), seeds, max_steps) for task in tasks
    }
    counts = "runs that grokked: " + ", ".join(
        f"{task} {len(found)} of {seeds}" for task, found in values.items()
    )
    return spread_of_thresholds({task: found for task, found in values.items() if len(found) > 1}, counts)


def spread_of_thresholds(h_star: Mapping[str, Sequence[float]], origin: str) -> CheckResult:
    """Heuristic 2: H* over seeds and between tasks, from its values by task."""
    if len(h_star) < 2:
        return CheckResult(False, f"too few tasks with two runs that grokked; {origin}")
    found = concentration(h_star)
    means = ", ".join(f"{task} {np.mean(values):.3f}" for task, values in h_star.items())
    modular = {task: values for task, values in h_star.items() if task in ("add", "sub", "mul")}
    alone = ""
    if 1 < len(modular) < len(h_star):
        alone = f"; of {', '.join(modular)} alone p = {concentration(modular).p_value:.2g}"
    return CheckResult(
        found.within.value > 0,
        f"{origin}. Mean H*: {means}. Standard deviation over seeds {found.within.value:.3f} "
        f"({found.within.low:.3f} to {found.within.high:.3f}); between tasks {found.between.value:.3f} "
        f"({found.between.low:.3f} to {found.between.high:.3f}), p = {found.p_value:.2g}{alone}",
    )


def stored_thresholds(folder: Path) -> CheckResult:
    """Heuristic 2 from runs without intervention that exist, by task."""
    from fastent.grokking.experiments.data import Runs, read_runs
    from fastent.grokking.experiments.report import of_one_setting

    plain = [
        run for run in read_runs(folder) if run.rows and run.condition in ("baseline", run.config["task"])
    ]
    if not of_one_setting(plain):
        return CheckResult(False, f"runs in {folder} differ in their settings: their H* say nothing of tasks")
    runs = Runs(tuple(plain))
    h_star: dict[str, list[float]] = {}
    for run, value in zip(runs.stored, runs.h_star.tolist(), strict=True):
        if not np.isnan(value):
            h_star.setdefault(run.config["task"], []).append(value)
    kept = {task: values for task, values in h_star.items() if len(values) > 1}
    return spread_of_thresholds(
        kept, f"runs in {folder}: " + ", ".join(f"{t} {len(v)}" for t, v in h_star.items())
    )


def grokking_entropies(config: TrainConfig, seeds: int, max_steps: int) -> list[float]:
    """H* of each seed that groks within `max_steps`: normalised H at its first evaluation at the criterion."""
    stack, found = Stack(config, range(seeds)), []
    while stack.seeds and stack.steps_done <= max_steps:
        if stack.steps_done % config.evaluate_every == 0:
            accuracy, h = stack.evaluate()["test_accuracy"], stack.representations()
            done = [i for i, value in enumerate(accuracy.tolist()) if value >= config.criterion]
            found += [float(spectral_entropy(h[i]).normalized) for i in done]
            stack.keep([seed for i, seed in enumerate(stack.seeds) if i not in done])
            if not stack.seeds:
                break
        stack.train_step()
    return found


def mixing_on(run: FollowedRun) -> CheckResult:
    """How the printed Lemma 5 fares on a run's activations."""
    negative = run.evaluated("mixing_slope_negative")
    worst = run.evaluated("mixing_worst").max()
    return CheckResult(
        bool(0.3 < negative.mean() < 0.7),
        f"on a run's activations (N = 370, random derangements) it fails at first order in {negative.mean():.0%}; "
        f"the largest loss at alpha = 0.1 is {worst:.3f} nats",
    )


def laws_of(run: FollowedRun) -> CheckResult:
    """Proposition 6 and the power law on a run's fall of H, from its maximum to 90 % test accuracy."""
    step, entropy = run.evaluated("step"), run.evaluated("entropy")
    end = int(np.argmax(run.evaluated("test_accuracy") >= 0.9))
    start = int(np.argmax(entropy[: end + 1]))
    laws = fit_laws(step[start : end + 1], entropy[start : end + 1])
    listed = ", ".join(f"{name} {law.residual:.4f}" for name, law in laws.items())
    span = collapse_span(step, entropy)
    return CheckResult(
        all(np.isfinite(law.residual) for law in laws.values()) and span[0] < span[1],
        f"root mean square residual of H in a fall of {entropy[start] - entropy[end]:.3f}: {listed}",
    )


def print_table(runs: Path | None = None) -> int:
    """Check everything and print the table; return 0 if all evidence supports the findings, else 1."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table("item", "the paper", "we find", "evidence, made now", box=SIMPLE_HEAD, show_lines=True)
    failed = []
    console = Console()
    with console.status("checking") as status:
        for item in items(runs):
            status.update(f"after {item.name}")
            marked = [("" if e.holds else "NOT CONFIRMED: ") + e.text for e in item.evidence]
            table.add_row(item.name, item.paper, item.finding, "\n".join(marked))
            if not item.holds:
                failed.append(item.name)
    console.print(table)
    print("not confirmed: " + ", ".join(failed) if failed else "every finding is confirmed by its evidence")
    return 1 if failed else 0
