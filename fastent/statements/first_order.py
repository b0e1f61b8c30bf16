"""Single training steps to first order: what they do to a probe's covariance and entropy (Lemma 2, Proposition 3).

A step moves the parameters by dtheta, whatever optimiser made it, and the representations by ``J dtheta`` plus terms of
second order. From that `fastent.reference.perturbation` predicts the change of the covariance and of H; the
measured change is of the same step. The prediction is linear in dtheta, so it splits: weight decay and the rest
of AdamW's step. The paper's Lemma 2 has the loss's gradient in the place of dtheta; `along_gradient` is what that would
predict.

Everything is float64, whatever the trainer computes in.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastent.reference.covariance import covariance
from fastent.reference.entropy import entropy_of_eigenvalues
from fastent.reference.perturbation import alignment, covariance_update, gradient_matrix, lipschitz_local
from fastent.train.plain import PlainMLP, PlainTransformer
from fastent.train.stack import Stack
from fastent.train.tasks import batch_index, probe_index, split

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


class _Represent(nn.Module):
    """A plain module's representation as a forward pass of its own, for `functional_call`."""

    def __init__(self, module: PlainTransformer | PlainMLP) -> None:
        super().__init__()
        self.module = module

    def forward(self, pairs: Tensor) -> Tensor:
        return self.module.represent(pairs)


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
    parameters = {f"module.{name}": p.detach() for name, p in module.named_parameters()}
    tangents = {
        f"module.{name}": direction.get(name, torch.zeros_like(p)).to(p.dtype)
        for name, p in module.named_parameters()
    }

    def function(values: dict[str, Tensor]) -> Tensor:
        found: Tensor = functional_call(_Represent(module), values, (pairs,))
        return found

    # The fused attention has no forward derivative.
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        # torch's own, at its first forward derivative
        warnings.filterwarnings("ignore", "`torch.jit.script` is", DeprecationWarning)
        moved: Tensor = jvp(function, (parameters,), (tangents,))[1]
    result: NDArray[np.float64] = moved.detach().numpy()
    return result


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
    train = split(task, config.train_fraction, seed)[0]
    probe = task.inputs[probe_index(train, config.probe_size, seed, "probe")]
    batch = train[torch.from_numpy(batch_index(seed, step, len(train), config.batch_size))]
    before = stack.module(seed).double()
    stack.train_step()
    after = dict(stack.module(seed).double().named_parameters())

    moved = {name: after[name].detach() - p.detach() for name, p in before.named_parameters()}
    rate = config.learning_rate
    decay = {name: -rate * config.weight_decay * p.detach() for name, p in before.named_parameters()}
    gradient = loss_gradient(before, task.inputs[batch], task.labels[batch])

    h = represent(before, probe)
    c = covariance(h)
    eigenvalues = np.linalg.eigvalsh(c)
    entropy = entropy_of_eigenvalues(eigenvalues)
    c_after = covariance(represent(stack.module(seed).double(), probe))

    slope = gradient_matrix(c)

    def update(direction: Direction) -> NDArray[np.float64]:
        return covariance_update(h, displacement(before, probe, direction))

    aligned = alignment(c, update(moved))
    return StepChange(
        step=step,
        entropy=entropy,
        change=entropy_of_eigenvalues(np.linalg.eigvalsh(c_after)) - entropy,
        predicted=aligned.change,
        from_decay=float((slope * update(decay)).sum()),
        along_gradient=-rate * float((slope * update(gradient)).sum()),
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
    train = split(task, stack.config.train_fraction, seed)[0]
    if len(train) % batch_size:
        raise ValueError(f"batch_size must divide the {len(train)} training pairs; got {batch_size}")
    module = stack.module(seed).double()
    probe = task.inputs[train]
    h = represent(module, probe)

    def update(pairs: Tensor) -> NDArray[np.float64]:
        gradient = loss_gradient(module, task.inputs[pairs], task.labels[pairs])
        return covariance_update(h, displacement(module, probe, gradient))

    full = update(train)
    order = np.random.default_rng(0).permutation(len(train)).reshape(-1, batch_size)
    parts = [update(train[torch.from_numpy(part)]) - full for part in order]
    scale = np.linalg.norm(full)
    deviation = np.sqrt(np.mean([np.linalg.norm(part) ** 2 for part in parts])) / scale
    return BatchNoise(float(np.linalg.norm(np.mean(parts, axis=0)) / scale), float(deviation), len(parts))
