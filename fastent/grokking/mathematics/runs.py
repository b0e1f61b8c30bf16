"""Training runs followed closely: single steps to first order, curvature, mixing and sampling, along one run.

``python -m fastent.grokking.mathematics.runs OUT`` trains seeds of a preset and writes one JSON-lines file for each,
``<task>-<width>-seed<seed>.jsonl``, which the figures and numbers of ``docs/mathematics.md`` come from: first a line
with the configuration, then lines of kind "evaluation", "step" and "curvature".

A step moves the parameters by dtheta, whatever optimiser made it, and the representations by ``J dtheta`` plus terms of
second order. From that `fastent.reference.perturbation` predicts the change of the covariance and of H (Lemma 2,
Proposition 3); the measured change is of the same step. The prediction is linear in dtheta, so it splits: weight decay
and the rest of AdamW's step. The paper's Lemma 2 has the loss's gradient in the place of dtheta; `along_gradient` is
what that would predict. Single steps are float64, whatever the trainer computes in.

Of the Hessian nothing is stored: `largest_eigenvalue` takes its products with vectors, and the residual that it returns
bounds the error: some eigenvalue lies that near to the one returned.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastent.entropy import spectral_entropy
from fastent.grokking.mathematics.checks import entropy_of, slopes_over
from fastent.grokking.train.config import PRESETS, TrainConfig, completed, preset
from fastent.grokking.train.models import PlainMLP, PlainTransformer
from fastent.grokking.train.stack import Stack
from fastent.grokking.train.storage import Log, RunError
from fastent.grokking.train.tasks import batch_index, probe_index, split
from fastent.reference import mixing
from fastent.reference.covariance import covariance
from fastent.reference.entropy import entropy_of_eigenvalues
from fastent.reference.perturbation import alignment, covariance_update, gradient_matrix, lipschitz_local
from fastent.sampling import sampling_error

ALPHA = 0.1
"""Mixing coefficient at which losses are recorded; the paper's text lost its value."""

PROBE_SIZES = (64, 128, 256, 512, 1024)
"""Training pairs whose entropy and sampling errors are recorded, beside all of them."""

HESSIAN_PAIRS = 512
"""Training pairs, at most, that the recorded curvature is the mean over."""


Direction = Mapping[str, Tensor]
"""A change of a module's parameters, by name."""


@dataclass(frozen=True)
class StepChange:
    """One training step of one seed, seen on the probe; entropies in nats.

    Attributes
    ----------
    step : int
        Steps made before it.
    entropy, change : float
        H before the step, and what the step changed.
    predicted, from_decay : float
        First-order change, and the part of it due to weight decay; the rest is Adam's.
    along_gradient : float
        First-order change along minus the learning rate times the batch's gradient, as the paper's Lemma 2 has it.
    correlation, spread_log_p, spread_growth, leading_growth : float
        Of `fastent.reference.perturbation.Alignment`.
    total_variance, distance : float
        tr C, and ``||C' - C||_F`` of the step.
    lipschitz : float
        Smallest constant of Lemma 1 at C without a regulariser; times `distance` it bounds the change.
    smallest_share : float
        Smallest eigenvalue of C over its trace.
    """

    step: int
    entropy: float
    change: float
    predicted: float
    from_decay: float
    along_gradient: float
    correlation: float
    spread_log_p: float
    spread_growth: float
    leading_growth: float
    total_variance: float
    distance: float
    lipschitz: float
    smallest_share: float


def represent(module: PlainTransformer | PlainMLP, pairs: Tensor) -> NDArray[np.float64]:
    """Representations of token pairs (N, 2), shape (N, d), float64."""
    with torch.no_grad():
        h: NDArray[np.float64] = module.represent(pairs).numpy().astype(np.float64)
    return h


def displacement(
    module: PlainTransformer | PlainMLP, pairs: Tensor, direction: Direction
) -> NDArray[np.float64]:
    """``J dtheta``: the representations' derivative along a change of the parameters, shape (N, d), float64.

    Parameters
    ----------
    module : PlainTransformer or PlainMLP
        With float64 parameters.
    pairs : Tensor, shape (N, 2)
        Token pairs.
    direction : mapping of str to Tensor
        Change of each parameter that moves; the head's does not matter.
    """
    body = copy.deepcopy(module)
    body.forward = body.represent  # type: ignore[method-assign]
    parameters = {name: p.detach() for name, p in body.named_parameters()}
    tangents = {name: direction.get(name, torch.zeros_like(p)).to(p.dtype) for name, p in parameters.items()}

    def function(values: dict[str, Tensor]) -> Tensor:
        found: Tensor = functional_call(body, values, (pairs,))
        return found

    # The fused attention has no forward derivative.
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        # torch's own, at its first forward derivative; its category goes by the release.
        warnings.filterwarnings("ignore", "`torch.jit.script` is")
        moved: Tensor = jvp(function, (parameters,), (tangents,))[1]
    result: NDArray[np.float64] = moved.detach().numpy()
    return result


def first_order_update(
    module: PlainTransformer | PlainMLP, pairs: Tensor, direction: Direction
) -> NDArray[np.float64]:
    """Form ``A + A^T`` of Lemma 2, shape (d, d), along a change of the parameters; arguments as of `displacement`."""
    return covariance_update(represent(module, pairs), displacement(module, pairs, direction))


def training_pairs(stack: Stack, seed: int) -> Tensor:
    """Places of a seed's training pairs among all pairs of the task."""
    return split(stack.task, stack.config.train_fraction, seed)[0]


def loss_gradient(module: PlainTransformer | PlainMLP, pairs: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Gradient of the mean cross-entropy on token pairs, by parameter name."""
    named = dict(module.named_parameters())
    loss = nn.functional.cross_entropy(module(pairs), labels)
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def measured_step(stack: Stack, seed: int) -> StepChange:
    """Make one step of the stack, and compare what it did to `seed`'s probe with its first order.

    Parameters
    ----------
    stack : Stack
        On the CPU. It steps once, as by `Stack.train_step`.
    seed : int
        One of its seeds.
    """
    task, config, step = stack.task, stack.config, stack.steps_done
    train = training_pairs(stack, seed)
    probe = task.inputs[probe_index(train, config.probe_size, seed, "probe")]
    batch = train[torch.from_numpy(batch_index(seed, step, len(train), config.batch_size, config.sampling))]
    before = stack.module(seed).double()
    stack.train_step()
    after = dict(stack.module(seed).double().named_parameters())

    moved = {name: after[name].detach() - p.detach() for name, p in before.named_parameters()}
    rate = config.learning_rate
    decay = {name: -rate * config.weight_decay * p.detach() for name, p in before.named_parameters()}
    gradient = loss_gradient(before, task.inputs[batch], task.labels[batch])

    c = covariance(represent(before, probe))
    eigenvalues = np.linalg.eigvalsh(c)
    entropy = entropy_of_eigenvalues(eigenvalues)
    c_after = covariance(represent(stack.module(seed).double(), probe))

    slope = gradient_matrix(c)
    aligned = alignment(c, first_order_update(before, probe, moved))
    return StepChange(
        step=step,
        entropy=entropy,
        change=entropy_of_eigenvalues(np.linalg.eigvalsh(c_after)) - entropy,
        predicted=aligned.change,
        from_decay=float((slope * first_order_update(before, probe, decay)).sum()),
        along_gradient=-rate * float((slope * first_order_update(before, probe, gradient)).sum()),
        correlation=aligned.correlation,
        spread_log_p=aligned.spread_log_p,
        spread_growth=aligned.spread_growth,
        leading_growth=aligned.leading_growth,
        total_variance=float(np.trace(c)),
        distance=float(np.linalg.norm(c_after - c)),
        lipschitz=lipschitz_local(eigenvalues),
        smallest_share=float(max(eigenvalues[0], 0.0) / np.trace(c)),
    )


def adamw_direction(stack: Stack, seed: int, gradient: Direction) -> dict[str, Tensor]:
    """Next step of AdamW for a learning rate of 1, float64: from the stack's moments, `gradient` and the decay."""
    state, config = stack.state_dict(seed), stack.config
    count = stack.steps_done + 1
    (beta1, beta2), direction = config.betas, {}
    for name, g in gradient.items():
        first = beta1 * state[f"first.{name}"].double() + (1 - beta1) * g
        second = beta2 * state[f"second.{name}"].double() + (1 - beta2) * g * g
        root = (second / (1 - beta2**count)).sqrt() + config.epsilon
        decay = config.weight_decay * state[f"parameter.{name}"].double()
        direction[name] = -(first / (1 - beta1**count) / root + decay)
    return direction


def remainders(
    module: PlainTransformer | PlainMLP,
    pairs: Tensor,
    direction: Direction,
    rates: Sequence[float],
    *,
    first_order: Direction | None = None,
    update: Callable[[ArrayLike, ArrayLike], NDArray[np.float64]] = covariance_update,
) -> NDArray[np.float64]:
    """``||C(theta + eta dtheta) - C - eta (A + A^T)||_F / eta^2`` for each eta: bounded, if Lemma 2 holds.

    Parameters
    ----------
    module : PlainTransformer or PlainMLP
        With float64 parameters.
    pairs : Tensor, shape (N, 2)
        The probe.
    direction : mapping of str to Tensor
        What the parameters move by, for a rate of 1.
    rates : sequence of float
        eta.
    first_order : mapping of str to Tensor, optional
        What to form A of, if not of `direction`: the paper's statement has the loss's gradient there.
    update : callable
        Forms ``A + A^T`` of the representations and their derivative.
    """
    h = represent(module, pairs)
    c = covariance(h)
    linear = update(h, displacement(module, pairs, direction if first_order is None else first_order))
    found = []
    for rate in rates:
        moved = copy.deepcopy(module)
        with torch.no_grad():
            for name, p in moved.named_parameters():
                if name in direction:
                    p.add_(rate * direction[name])
        rest = covariance(represent(moved, pairs)) - c - rate * linear
        found.append(float(np.linalg.norm(rest)) / rate**2)
    return np.array(found)


class BatchNoise(NamedTuple):
    """How far the first-order update of single minibatches is from that of the whole training set, under SGD.

    Attributes
    ----------
    mean_error : float
        ``||mean over an epoch's batches - full|| / ||full||`` of ``A + A^T``: 0, as both are linear.
    deviation : float
        Root mean square of ``||one batch - full|| / ||full||``. It does not shrink with the rate: a single step is off
        by a term of first order, and only the expectation follows the lemma.
    batches : int
        In the epoch.
    """

    mean_error: float
    deviation: float
    batches: int


def batch_noise(stack: Stack, seed: int, batch_size: int) -> BatchNoise:
    """Compare the batches of one epoch, which cut the training set into equal parts, with all of it.

    Raises
    ------
    ValueError
        If `batch_size` does not divide the training set.
    """
    task = stack.task
    train = training_pairs(stack, seed)
    if len(train) % batch_size:
        raise ValueError(f"batch_size must divide the {len(train)} training pairs; got {batch_size}")
    module = stack.module(seed).double()
    probe = task.inputs[train]

    def update(pairs: Tensor) -> NDArray[np.float64]:
        gradient = loss_gradient(module, task.inputs[pairs], task.labels[pairs])
        return first_order_update(module, probe, gradient)

    full = update(train)
    order = np.random.default_rng(0).permutation(len(train)).reshape(-1, batch_size)
    parts = [update(train[torch.from_numpy(part)]) - full for part in order]
    scale = np.linalg.norm(full)
    deviation = np.sqrt(np.mean([np.linalg.norm(part) ** 2 for part in parts])) / scale
    return BatchNoise(float(np.linalg.norm(np.mean(parts, axis=0)) / scale), float(deviation), len(parts))


class Ritz(NamedTuple):
    """Approximate eigenvalue of a symmetric operator.

    Attributes
    ----------
    value : float
        Largest Ritz value, never above the largest eigenvalue.
    residual : float
        ``||A v - value v||``: an eigenvalue lies within this distance.
    products : int
        Products with the operator that it took, that for the residual among them.
    """

    value: float
    residual: float
    products: int


def largest_eigenvalue(
    operator: Callable[[Tensor], Tensor],
    start: Tensor,
    *,
    tolerance: float = 1e-2,
) -> Ritz:
    """Largest eigenvalue of a symmetric operator by ARPACK's restarted Lanczos (`scipy.sparse.linalg.eigsh`).

    Parameters
    ----------
    operator : callable
        Maps a vector (m,) to a vector (m,), linearly and symmetrically.
    start : Tensor, shape (m,)
        Where to start: not orthogonal to the eigenvector sought; a random vector is not.
    tolerance : float
        Stop when the residual is below this share of the value.

    Raises
    ------
    scipy.sparse.linalg.ArpackNoConvergence
        If ten times m restarts do not get there.

    References
    ----------
    Lehoucq, Sorensen and Yang, ARPACK Users' Guide, 1998.
    """
    products = 0

    def product(v: NDArray[Any]) -> NDArray[Any]:
        nonlocal products
        products += 1
        image: NDArray[Any] = operator(torch.from_numpy(np.ravel(v)).to(start.dtype)).numpy()
        return image

    m = len(start)
    if m == 1:  # ARPACK wants fewer eigenvalues than rows
        return Ritz(float(product(np.ones(1))[0]), 0.0, products)
    # float64 outside the operator: rounding of the basis would else bring eigenvalues twice. ARPACK tests only a whole
    # basis, so a small one (`ncv`) spends few products where the eigenvalue stands apart, as that of a Hessian does.
    linear = LinearOperator((m, m), matvec=product, dtype=np.float64)
    values, vectors = eigsh(linear, k=1, which="LA", v0=start.double().numpy(), ncv=min(m, 8), tol=tolerance)
    rest = product(vectors[:, 0]) - values[0] * vectors[:, 0]
    return Ritz(float(values[0]), float(np.linalg.norm(rest)), products)


def sharpness(
    module: PlainTransformer | PlainMLP,
    pairs: Tensor,
    labels: Tensor,
    *,
    tolerance: float = 1e-2,
) -> Ritz:
    """Largest eigenvalue of the Hessian of the mean cross-entropy in all parameters.

    Parameters
    ----------
    module : PlainTransformer or PlainMLP
        The model, in the precision to compute in.
    pairs : Tensor, shape (N, 2)
        Token pairs, all of the training set for the training loss's curvature.
    labels : Tensor, shape (N,)
        Their classes.
    tolerance : float
        As in `largest_eigenvalue`.
    """
    parameters = list(module.parameters())
    with sdpa_kernel(SDPBackend.MATH):  # the fused attention has no second derivative
        loss = nn.functional.cross_entropy(module(pairs), labels)
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, create_graph=True)])

        def hessian_product(v: Tensor) -> Tensor:
            parts = torch.autograd.grad(gradient @ v, parameters, retain_graph=True)
            return torch.cat([part.flatten() for part in parts])

        start = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(0)).to(gradient.dtype)
        return largest_eigenvalue(hessian_product, start, tolerance=tolerance)


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
    train = training_pairs(stack, seed)
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
    train = training_pairs(stack, seed)
    kept = np.random.default_rng(seed).permutation(len(train))[:HESSIAN_PAIRS]
    pairs = train[torch.from_numpy(np.sort(kept))]
    return sharpness(stack.module(seed), stack.task.inputs[pairs], stack.task.labels[pairs])


def read_followed(path: Path) -> FollowedRun:
    """Read what `main` wrote; a run that was cut short is as good as any.

    Raises
    ------
    RunError
        If the file is missing, damaged, or none that `main` writes.
    """
    again = "follow the seed again, or put the file back from a copy"
    log = Log.read(path)
    if log.fault is not None and not log.torn:
        raise log.fault.replaced(again)
    if not log.rows:
        raise RunError(f"{path} is no followed run, for it is missing or empty: {again}")
    head, *lines = log.rows
    try:
        run = FollowedRun(TrainConfig(**completed(head["config"])), head["seed"])
        for line in lines:
            kind = line.pop("kind")
            if kind == "evaluation":
                run.evaluations.append(line)
            elif kind == "step":
                run.steps.append(StepChange(**line))
            elif kind == "curvature":
                run.curvature.append((line.pop("step"), Ritz(**line)))
            else:
                raise ValueError(f"a line is of kind {kind!r}")
    except (KeyError, TypeError, ValueError) as error:
        what = f"there is no {error}" if isinstance(error, KeyError) else error
        raise RunError(f"{path} is no followed run ({what}): {again}") from error
    return run


def main(argv: Sequence[str] | None = None) -> None:
    """Follow seeds of a preset into files."""
    parser = argparse.ArgumentParser(
        prog="python -m fastent.grokking.mathematics.runs", description=main.__doc__
    )
    parser.add_argument("out", type=Path, help="folder of the files")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="quick")
    parser.add_argument("--task", default="add")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--measure-every", type=int, default=10)
    parser.add_argument("--curvature-every", type=int, default=100)
    given = parser.parse_args(argv)
    config = preset(given.preset, task=given.task)
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
