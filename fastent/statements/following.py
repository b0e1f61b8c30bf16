"""Training runs followed closely: single steps to first order, curvature, mixing and sampling, along one run.

``python -m fastent.statements.following OUT`` trains seeds of a preset and writes one JSON-lines file for each,
``<task>-<width>-seed<seed>.jsonl``, which the figures and numbers of ``docs/mathematics.md`` come from: first a line
with the configuration, then lines of kind "evaluation", "step" and "curvature".
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastent.entropy import spectral_entropy
from fastent.reference import mixing
from fastent.reference.covariance import covariance
from fastent.sampling import sampling_error
from fastent.statements.checks import entropy_of, slopes_over
from fastent.statements.curvature import Ritz, sharpness
from fastent.statements.first_order import StepChange, measured_step
from fastent.train.presets import PRESETS, TrainConfig
from fastent.train.stack import Stack
from fastent.train.tasks import split

ALPHA = 0.1
"""Mixing coefficient at which losses are recorded; the paper's text lost its value."""

PROBE_SIZES = (64, 128, 256, 512, 1024)
"""Training pairs whose entropy and sampling errors are recorded, beside all of them."""

HESSIAN_PAIRS = 512
"""Training pairs, at most, that the recorded curvature is the mean over."""


@dataclass(frozen=True)
class FollowedRun:
    """What was seen of one run, each list in the order of steps.

    `evaluations` hold the trainer's metrics with `mixing_of` and `sampling_of`; `steps` the measured single steps;
    `curvature` pairs of a step and the Hessian's largest eigenvalue there.
    """

    config: TrainConfig
    seed: int
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    steps: list[StepChange] = field(default_factory=list)
    curvature: list[tuple[int, Ritz]] = field(default_factory=list)

    def column(self, name: str) -> NDArray[np.float64]:
        """Return a field of the measured steps, one entry each."""
        return np.array([getattr(step, name) for step in self.steps], dtype=np.float64)

    def evaluated(self, name: str) -> NDArray[np.float64]:
        """Return a quantity of the evaluations, one entry each."""
        return np.array([row[name] for row in self.evaluations], dtype=np.float64)


def follow(
    config: TrainConfig,
    seed: int,
    *,
    max_steps: int,
    measure_every: int,
    curvature_every: int | None = None,
    on_line: Callable[[dict[str, Any]], object] = lambda line: None,
) -> FollowedRun:
    """Train one seed and look closely.

    Parameters
    ----------
    config : TrainConfig
        What to train; evaluated every `config.evaluate_every`.
    seed : int
        Which seed.
    max_steps : int
        Where to end.
    measure_every : int
        Steps between steps that are compared with their first order.
    curvature_every : int, optional
        Steps between Hessian eigenvalues; none by default.
    on_line : callable
        Gets every line as it is found.
    """
    stack = Stack(config, [seed])
    run = FollowedRun(config, seed)
    while stack.steps_done < max_steps:
        step = stack.steps_done
        if step % config.evaluate_every == 0:
            run.evaluations.append(evaluation(stack, seed))
            on_line({"kind": "evaluation", **run.evaluations[-1]})
        if curvature_every is not None and step % curvature_every == 0:
            run.curvature.append((step, curvature_of(stack, seed)))
            on_line({"kind": "curvature", "step": step, **run.curvature[-1][1]._asdict()})
        if step % measure_every == 0:
            run.steps.append(measured_step(stack, seed))
            on_line({"kind": "step", **dataclasses.asdict(run.steps[-1])})
        else:
            stack.train_step()
    return run


def evaluation(stack: Stack, seed: int) -> dict[str, Any]:
    """Metrics of a seed now, H of its probe, what mixing does to it, and H of fewer and of all training pairs."""
    at = stack.seeds.index(seed)
    metrics = {name: float(column[at]) for name, column in stack.evaluate().items()}
    h = stack.representations()[at]
    return {
        "step": stack.steps_done,
        **metrics,
        "entropy": float(spectral_entropy(h).normalized),
        **mixing_of(h.double().numpy()),
        **sampling_of(stack, seed),
    }


def mixing_of(h: NDArray[np.float64], permutations: int = 200) -> dict[str, float]:
    """How the printed Lemma 5 fares on activations (N, d): random permutations without fixed points.

    `mixing_slope_negative` is the share of them that lose entropy at first order in alpha; `mixing_loss` and
    `mixing_worst` are the mean and largest loss in nats at `ALPHA`, and `mixing_cyclic` that of the cyclic shift.
    """
    rng = np.random.default_rng(0)
    n = len(h)
    # A random order, then each row gets the next one's place: one cycle, so nothing stays.
    chosen = np.empty((permutations, n), dtype=np.intp)
    for row in chosen:
        order = rng.permutation(n)
        row[order] = np.roll(order, -1)
    slopes = slopes_over(h, chosen)
    c = covariance(h)
    before = entropy_of(c)
    losses = [before - entropy_of(mixing.mixed_covariance(h, p, ALPHA)) for p in chosen[:20]]
    shift = mixing.cyclic_shift(n)
    return {
        "mixing_slope_negative": float(np.mean(slopes < 0)),
        "mixing_slope_spread": float(slopes.std()),
        "mixing_slope_predicted": mixing.slope_deviation(np.linalg.eigvalsh(c), n),
        "mixing_loss": float(np.mean(losses)),
        "mixing_worst": float(np.max(losses)),
        "mixing_cyclic": before - entropy_of(mixing.mixed_covariance(h, shift, ALPHA)),
        "mixing_cyclic_slope": mixing.slope(h, shift),
    }


def sampling_of(stack: Stack, seed: int) -> dict[str, float]:
    """Normalised H of all training pairs, and of nested parts: as found, corrected, and its standard error.

    The parts are drawn from the training pairs, and the errors say so (`population`).
    """
    at = stack.seeds.index(seed)
    train = split(stack.task, stack.config.train_fraction, seed)[0]
    everything = stack.represent(train)[at]
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(train)))
    found: dict[str, float] = {
        "entropy_all": float(spectral_entropy(everything).normalized),
        "entropy_bfloat16": float(spectral_entropy(everything.bfloat16()).normalized),
        "entropy_float16": float(spectral_entropy(everything.half()).normalized),
        "training_pairs": len(train),
    }
    for size in PROBE_SIZES:
        if size < len(train):
            error = sampling_error(everything[order[:size]], population=len(train))
            found |= {
                f"entropy_{size}": error.normalized,
                f"corrected_{size}": error.corrected,
                f"standard_error_{size}": error.standard_error,
            }
    return found


def curvature_of(stack: Stack, seed: int) -> Ritz:
    """Largest Hessian eigenvalue of the training loss, over at most `HESSIAN_PAIRS` fixed pairs."""
    train = split(stack.task, stack.config.train_fraction, seed)[0]
    kept = np.random.default_rng(seed).permutation(len(train))[:HESSIAN_PAIRS]
    pairs = train[torch.from_numpy(np.sort(kept))]
    return sharpness(stack.module(seed), stack.task.inputs[pairs], stack.task.labels[pairs])


def read_followed(path: Path) -> FollowedRun:
    """Read what `main` wrote; lines of a run that was cut short are as good as any."""
    lines = _lines(path)
    head = next(lines)
    values: dict[str, Any] = {
        name: tuple(v) if isinstance(v, list) else v for name, v in head["config"].items()
    }
    run = FollowedRun(TrainConfig(**values), head["seed"])
    for line in lines:
        kind = line.pop("kind")
        if kind == "evaluation":
            run.evaluations.append(line)
        elif kind == "step":
            run.steps.append(StepChange(**line))
        else:
            run.curvature.append((line.pop("step"), Ritz(**line)))
    return run


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open() as file:
        for line in file:
            yield json.loads(line)


def main(argv: Sequence[str] | None = None) -> None:
    """Follow seeds of a preset into files."""
    parser = argparse.ArgumentParser(prog="python -m fastent.statements.following", description=main.__doc__)
    parser.add_argument("out", type=Path, help="folder of the files")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="quick")
    parser.add_argument("--task", default="add")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--measure-every", type=int, default=10)
    parser.add_argument("--curvature-every", type=int, default=100)
    given = parser.parse_args(argv)
    config = dataclasses.replace(PRESETS[given.preset], task=given.task)
    given.out.mkdir(parents=True, exist_ok=True)
    for seed in given.seeds:
        with (given.out / f"{config.task}-{config.width}-seed{seed}.jsonl").open("w") as file:

            def write(line: dict[str, Any], file: Any = file) -> None:
                print(json.dumps(line), file=file, flush=True)

            write({"config": dataclasses.asdict(config), "seed": seed})
            follow(
                config,
                seed,
                max_steps=given.steps,
                measure_every=given.measure_every,
                curvature_every=given.curvature_every,
                on_line=write,
            )


if __name__ == "__main__":
    main()
