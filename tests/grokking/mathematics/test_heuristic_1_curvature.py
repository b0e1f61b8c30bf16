"""Heuristic 1: does entropy fall faster where the loss is more curved? The eigenvalue exactly, the link measured."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

from fastent.grokking.mathematics.collapse import curvature_correlation
from fastent.grokking.mathematics.runs import FollowedRun, Ritz, follow, largest_eigenvalue, sharpness
from fastent.grokking.train.config import preset
from fastent.grokking.train.stack import Stack


@pytest.mark.parametrize("size", [1, 2, 40])
def test_largest_eigenvalue_is_that_of_the_matrix_and_its_residual_bounds_the_error(size):
    generator = torch.Generator().manual_seed(size)
    q = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    values = torch.linspace(-3, 2, size, dtype=torch.float64)
    matrix = (q * values) @ q.T
    start = torch.randn(size, generator=generator, dtype=torch.float64)
    loose = largest_eigenvalue(lambda v: matrix @ v, start, tolerance=0.05)
    assert loose.value <= values[-1] + 1e-12
    assert np.abs(values.numpy() - loose.value).min() <= loose.residual + 1e-12
    tight = largest_eigenvalue(lambda v: matrix @ v, start, tolerance=1e-12)
    assert tight.value == pytest.approx(float(values[-1]), abs=1e-10)
    assert tight.residual <= 1e-11


def test_rounded_products_do_not_spoil_the_residual():
    values = torch.linspace(-3, 2, 300)
    found = largest_eigenvalue(lambda v: values * v, torch.ones(300))
    assert abs(found.value - 2) <= found.residual + 1e-6
    assert found.residual <= 2e-2


@pytest.mark.parametrize("model", ["transformer", "mlp"])
def test_sharpness_is_the_largest_eigenvalue_of_the_whole_hessian(model):
    config = preset("quick", modulus=5, width=8, heads=2, feedforward=8, model=model, hidden=(8,))
    stack = Stack(config, [0])
    module = stack.module(0).double()
    pairs, labels = stack.task.inputs, stack.task.labels
    shapes = {name: p.shape for name, p in module.named_parameters()}
    flat = torch.cat([p.detach().flatten() for p in module.parameters()])

    def loss(v):
        parts = v.split([shape.numel() for shape in shapes.values()])
        parameters = {n: part.view(shape) for (n, shape), part in zip(shapes.items(), parts, strict=True)}
        return nn.functional.cross_entropy(functional_call(module, parameters, (pairs,)), labels)

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        hessian = torch.autograd.functional.hessian(loss, flat)
    found = sharpness(module, pairs, labels, tolerance=1e-10)
    assert found.value == pytest.approx(float(torch.linalg.eigvalsh(hessian)[-1]), rel=1e-8)
    rough = sharpness(module, pairs, labels)
    assert rough.value == pytest.approx(found.value, rel=1e-2)


def test_a_head_in_another_scale_moves_the_curvature_and_not_what_sgd_does_to_the_representation():
    generator = torch.Generator().manual_seed(0)
    x, body, head = (
        torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((20, 4), (4, 3), (3, 5))
    )
    labels = torch.randint(5, (20,), generator=generator)

    def measured(scale):
        """Gradient of the body, and the largest eigenvalue of the Hessian of body and phi = head / scale."""

        def loss(parameters):
            first, phi = parameters[:12].view(4, 3), parameters[12:].view(3, 5)
            return nn.functional.cross_entropy(torch.relu(x @ first) @ (scale * phi), labels)

        flat = torch.cat([body.flatten(), (head / scale).flatten()]).requires_grad_()
        (gradient,) = torch.autograd.grad(loss(flat), flat)
        hessian = torch.autograd.functional.hessian(loss, flat.detach())
        return gradient[:12], float(torch.linalg.eigvalsh(hessian)[-1])

    (one, low), (ten, middle), (hundred, high) = map(measured, (1.0, 10.0, 100.0))
    torch.testing.assert_close(ten, one)
    torch.testing.assert_close(hundred, one)
    assert middle > 10 * low
    assert high / middle == pytest.approx(100, rel=0.05)  # the head's block, scale squared


def test_correlation_and_its_interval_see_a_link_and_its_absence():
    def run(sharp):
        step = np.arange(0, 4001, 50)
        h = 0.9 - 0.4 / (1 + np.exp(-(step - 2000) / 300))
        rows = [{"step": int(s), "entropy": float(x)} for s, x in zip(step, h, strict=True)]
        at = range(0, 4001, 100)
        return FollowedRun(preset("quick"), 0, rows, [], [(s, Ritz(float(sharp(s)), 0.0, 1)) for s in at])

    linked, _ = curvature_correlation(run(lambda s: np.exp(-(((s - 2000) / 900) ** 2))))
    assert linked.value > 0.95
    assert linked.low is not None
    assert linked.low > 0.7
    generator = np.random.default_rng(0)
    absent, _ = curvature_correlation(run(lambda s: generator.standard_normal()))
    assert abs(absent.value) < 0.4
    assert absent.low is not None
    assert absent.high is not None
    assert absent.low < 0 < absent.high


@pytest.mark.nightly
def test_curvature_along_a_run_and_the_speed_of_the_fall_are_measured(small_run):
    run = follow(small_run.config, 0, max_steps=2800, measure_every=2800, curvature_every=50)
    whole, falling = curvature_correlation(run)
    assert whole.n >= 50
    for found in (whole, falling):
        assert found.low is not None
        assert found.high is not None
        assert -1 <= found.low <= found.value <= found.high <= 1
    # The paper's relation would need a correlation near 1.
    assert whole.value < 0.9
    assert all(ritz.residual < 0.05 * abs(ritz.value) for _, ritz in run.curvature)
