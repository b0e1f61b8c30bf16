"""Lemma 2: the covariance moves by A + A^T of the step that was made, up to the square of the rate."""

import numpy as np
import pytest

from fastent.grokking.mathematics.runs import (
    adamw_direction,
    batch_noise,
    displacement,
    loss_gradient,
    measured_step,
    remainders,
    represent,
)
from fastent.grokking.train.tasks import batch_index, split
from fastent.reference.perturbation import covariance_update

RATES = np.geomspace(1e-5, 1e-3, 5)  # two decades, the trainer's own rate at their end


@pytest.fixture
def at_hand(trained):
    """Name, module in float64, training pairs, full gradient, and a direction of comparable size for each optimiser."""
    name, stack = trained
    train = split(stack.task, stack.config.train_fraction, 0)[0]
    module = stack.module(0).double()
    pairs = stack.task.inputs[train]
    gradient = loss_gradient(module, pairs, stack.task.labels[train])
    adamw = adamw_direction(stack, 0, gradient)
    scale = size(adamw) / size(gradient)
    return name, module, pairs, {"sgd": {k: -scale * g for k, g in gradient.items()}, "adamw": adamw}


def size(direction):
    return float(sum((v * v).sum() for v in direction.values())) ** 0.5


@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
def test_remainder_over_the_square_of_the_rate_is_bounded_over_two_decades(at_hand, optimiser):
    name, module, pairs, directions = at_hand
    rest = remainders(module, pairs, directions[optimiser], RATES)
    # A ReLU that switches within the step adds to the remainder of small rates; GELU is smooth.
    spread = 1.1 if "gelu" in name else 5.0
    assert rest.max() < spread * rest.min(), rest


def test_gradient_in_the_place_of_an_adamw_step_leaves_a_term_of_first_order(at_hand):
    _, module, pairs, directions = at_hand
    rest = remainders(module, pairs, directions["adamw"], RATES, first_order=directions["sgd"])
    assert rest[0] > 50 * rest[-1], rest  # as 1 / rate


@pytest.mark.parametrize(
    "wrong",
    [
        lambda h, dh: covariance_update(h, dh) / 2,
        lambda h, dh: -covariance_update(h, dh),
        lambda h, dh: (h - h.mean(0)).T @ dh / len(h) * 2,
    ],
    ids=["half", "sign", "not symmetric"],
)
def test_a_wrong_update_leaves_a_term_of_first_order(at_hand, wrong):
    _, module, pairs, directions = at_hand
    rest = remainders(module, pairs, directions["adamw"], RATES, update=wrong)
    assert rest[0] > 20 * rest[-1], rest


def test_displacement_is_the_derivative_of_the_representation(trained):
    _, stack = trained
    module = stack.module(0).double()
    pairs = stack.task.inputs[:50]
    gradient = loss_gradient(module, pairs, stack.task.labels[:50])
    step = 1e-6 / size(gradient)
    moved = stack.module(0).double()
    for parameter, g in zip(moved.parameters(), gradient.values(), strict=True):
        parameter.data += step * g
    difference = (represent(moved, pairs) - represent(module, pairs)) / step
    exact = displacement(module, pairs, gradient)
    assert np.linalg.norm(difference - exact) < 1e-4 * np.linalg.norm(exact)


def test_only_the_expectation_over_minibatches_follows_the_full_gradient(trained):
    _, stack = trained
    noise = batch_noise(stack, 0, 37)
    assert noise.batches == 10
    assert noise.mean_error < 1e-12
    assert noise.deviation > 0.3  # of the update itself, whatever the rate
    with pytest.raises(ValueError, match="370 training pairs; got 100"):
        batch_noise(stack, 0, 100)


def test_adamw_direction_is_the_step_that_the_trainer_makes(trained):
    _, stack = trained
    config = stack.config
    train = split(stack.task, config.train_fraction, 0)[0]
    batch = train[batch_index(0, stack.steps_done, len(train), config.batch_size)]
    before = stack.module(0).double()
    gradient = loss_gradient(before, stack.task.inputs[batch], stack.task.labels[batch])
    direction = adamw_direction(stack, 0, gradient)
    change = measured_step(stack, 0)
    after = dict(stack.module(0).double().named_parameters())
    step = {name: (after[name] - p).detach() for name, p in before.named_parameters()}
    # Not each by itself: the keys' bias has no gradient but rounding, and Adam scales that up.
    wrong = {name: step[name] - config.learning_rate * direction[name] for name in step}
    assert size(wrong) < 5e-3 * size(step)
    assert change.step == stack.steps_done - 1
