"""The benchmarks' inputs and providers: who is right on which."""

import math

import pytest

import fastent
from bench import providers
from bench.entropy import LIMITS
from bench.providers import INPUTS, SHAPES
from fastent.reference.entropy import spectral_entropy


def test_every_float32_shape_has_a_limit():
    assert {(shape.n, shape.d) for shape in SHAPES if shape.dtype == "float32"} == set(LIMITS)


@pytest.mark.parametrize("case", INPUTS, ids=[case.name for case in INPUTS])
def test_fastent_is_right_to_1e_12_on_every_input_of_the_benchmark(case):
    h = case.tensor()
    truth = spectral_entropy(h.double().numpy(), extended=True).entropy
    assert abs(providers.ours(h) - truth) <= 1e-12 * math.log(h.shape[1])


def test_every_exact_provider_that_is_installed_agrees_on_easy_input():
    h = INPUTS[0].tensor()
    ours = providers.ours(h)
    found = {p.name: call(h) for p, call in providers.entropies().items() if p.exact}
    assert {"fastent", "numpy"} <= set(found)
    # ssrlib adds 1e-12 to the trace and to each share
    assert all(abs(value - ours) < 1e-11 for value in found.values()), found


def test_every_covariance_that_is_installed_agrees_on_easy_input():
    h = INPUTS[0].tensor()
    ours = fastent.covariance(h)
    found = {name: call(h) for name, call in providers.covariances().items()}
    assert {"torch.cov", "numpy.cov"} <= set(found)
    assert all(float((matrix - ours).abs().max()) < 1e-14 for matrix in found.values())
