"""Spectral entropy: closed forms, conventions, and a status for every number that cannot be trusted."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from fastent import Status, covariance, entropy_of_covariance, entropy_of_eigenvalues, spectral_entropy
from fastent.reference import entropy as reference

BACKENDS = ["torch", pytest.param("triton", marks=pytest.mark.interpreter)]


def activations(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def with_spectrum(eigenvalues: list[float], n: int = 64) -> torch.Tensor:
    """Rows whose covariance has exactly these eigenvalues, up to rounding: scaled Hadamard columns."""
    cosines = (
        torch.arange(n, dtype=torch.float64)[:, None]
        * torch.arange(1, len(eigenvalues) + 1)
        * 2
        * math.pi
        / n
    )
    return math.sqrt(2) * torch.cos(cosines) * torch.tensor(eigenvalues, dtype=torch.float64).sqrt()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "eigenvalues", [[1.0, 1.0, 1.0, 1.0], [8.0, 4.0, 2.0, 1.0], [1e6, 1.0, 1.0], [3.0, 0.0, 0.0], [1.0, 1e-9]]
)
def test_entropy_of_a_known_spectrum(eigenvalues, backend):
    p = np.array(eigenvalues) / sum(eigenvalues)
    expected = -sum(x * math.log(x) for x in p if x > 0)
    r = spectral_entropy(with_spectrum(eigenvalues), backend=backend)
    assert abs(r.entropy - expected) < 1e-13
    assert abs(r.normalized - expected / math.log(len(p))) < 1e-13
    assert abs(r.effective_rank - math.exp(expected)) < 1e-12
    assert abs(r.participation_ratio - 1 / (p**2).sum()) < 1e-12
    assert abs(r.total_variance / sum(eigenvalues) - 1) < 1e-13
    assert np.allclose(r.eigenvalues, sorted(eigenvalues), rtol=1e-12, atol=1e-14 * max(eigenvalues))
    assert (r.status, r.flags, r.message, r.ceiling, r.n, r.d) == (Status.OK, (), "", 1.0, 64, len(p))
    assert r.solver == "lapack (covariance)"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [0.0, 0.1, -3e5, 1e-300])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(40, 7), (7, 40)])
def test_constant_rows_have_entropy_zero_and_status_zero_variance(value, dtype, shape, backend):
    h = torch.full(shape, max(value, -6e4) if dtype == torch.float16 else value, dtype=dtype)
    r = spectral_entropy(h, backend=backend)
    assert (r.normalized, r.entropy, r.effective_rank, r.participation_ratio) == (0.0, 0.0, 1.0, 1.0)
    assert r.status is Status.ZERO_VARIANCE
    assert r.total_variance == 0
    assert not r.eigenvalues.any()
    assert "rows are equal" in r.message


def test_the_papers_floor_calls_constant_rows_maximally_uniform():
    r = spectral_entropy(torch.ones(40, 7), convention="paper")
    assert r.normalized == 1.0
    assert r.status is Status.ZERO_VARIANCE


def test_the_papers_convention_is_appendix_b_to_the_letter():
    eigenvalues = [1.0, 1e-3, 1e-20]
    clamped = np.maximum(eigenvalues, 1e-12)
    p = clamped / clamped.sum()
    expected = -(p * np.log(p + 1e-12)).sum()
    assert abs(spectral_entropy(with_spectrum(eigenvalues), convention="paper").entropy - expected) < 1e-14
    # and it depends on the scale, where ours does not
    small = spectral_entropy(with_spectrum(eigenvalues) * 1e-7, convention="paper").normalized
    assert small > 0.9
    ours = [spectral_entropy(with_spectrum(eigenvalues) * scale).entropy for scale in (1.0, 2.0**-23)]
    assert ours[0] == ours[1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [2.0**600, 2.0**665, 2.0**1000, 2.0**-520, 2.0**-600, 2.0**-900])
@pytest.mark.parametrize("shape", [(60, 8), (8, 60)])
def test_extreme_scales_give_the_bits_of_the_unscaled_answer(scale, shape, backend):
    h = activations(*shape)
    plain, scaled = (spectral_entropy(x, backend=backend) for x in (h, h * scale))
    assert abs(plain.normalized - scaled.normalized) < 1e-15
    assert scaled.status is plain.status
    total = plain.total_variance * scale**2 if abs(math.log2(scale)) < 500 else None
    assert total is None or scaled.total_variance == total


def test_total_variance_beyond_float64_is_inf_and_eigenvalues_follow():
    r = spectral_entropy(activations(60, 8) * 1e200)
    assert r.total_variance == math.inf
    assert r.eigenvalues.isinf().all()
    assert 0.9 < r.normalized < 1.0


def test_an_offset_at_an_extreme_scale_is_still_resolved():
    h = activations(60, 8) + 1e3
    assert abs(spectral_entropy(h * 1e200).normalized - spectral_entropy(h).normalized) < 1e-11


def test_few_samples_are_rank_limited_with_their_ceiling():
    d = 32
    for n in (2, 16, 32, 33):
        r = spectral_entropy(activations(n, d))
        assert r.normalized <= r.ceiling
        if n <= d:
            assert r.status is Status.RANK_LIMITED
            assert r.ceiling == math.log(n - 1) / math.log(d)
            assert "33 lift the ceiling" in r.message
        else:
            assert (r.status, r.ceiling) == (Status.OK, 1.0)
    assert spectral_entropy(activations(16, 32)).solver == "lapack (gram)"
    # a flat spectrum reaches the ceiling
    simplex = torch.eye(17, 40, dtype=torch.float64)
    assert abs(spectral_entropy(simplex).normalized - math.log(16) / math.log(40)) < 1e-14


def test_gram_side_pads_the_spectrum_to_d_in_ascending_order():
    h = activations(5, 9)
    values = spectral_entropy(h).eigenvalues
    x = h - h.mean(0)
    assert values.shape == (9,)
    assert (values.diff() >= 0).all()
    assert torch.allclose(values, torch.linalg.eigvalsh(x.T @ x / 5), atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_an_offset_beyond_the_inputs_own_precision_is_flagged(dtype):
    h = activations(256, 8)
    eps = torch.finfo(dtype).eps
    resolved = spectral_entropy((h + 0.1 / eps).to(dtype))  # rounding is a tenth of the spread, at most
    assert resolved.status is Status.OK
    lost = spectral_entropy((h + 2.0 / eps).to(dtype))
    assert lost.status is Status.UNRESOLVED_OFFSET
    assert "wider dtype" in lost.message
    assert spectral_entropy(h.float() + 1e6).status is Status.OK


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", [(40, 7), (7, 40)])
def test_nonfinite_input_gives_nan_with_count_first_index_and_dtype(bad, shape, backend):
    h = activations(*shape).float()
    h[3, 5] = h[6, 2] = bad
    r = spectral_entropy(h, backend=backend)
    assert math.isnan(r.normalized)
    assert math.isnan(r.entropy)
    assert r.status is Status.NONFINITE
    assert r.message == "2 NaN or Inf in the activations (torch.float32), the first at (3, 5)"


def test_half_precision_overflow_names_the_dtype():
    r = spectral_entropy((activations(40, 7) * 1e6).half())
    assert r.status is Status.NONFINITE
    assert "torch.float16" in r.message


def test_a_batch_gives_tensors_and_its_items_are_those_alone():
    good = activations(50, 6)
    h = torch.stack([good, torch.zeros_like(good), good * 1e200, torch.full_like(good, math.nan)])
    r = spectral_entropy(h, batch_dims=1)
    assert r.normalized.shape == (4,)
    assert r.eigenvalues.shape == (4, 6)
    assert r.status is Status.NONFINITE
    assert r.flags == (Status.ZERO_VARIANCE, Status.NONFINITE)
    for item, alone in zip(r.unbind(), h, strict=True):
        expected = spectral_entropy(alone)
        assert item.status is expected.status
        assert item.message == expected.message
        assert item.entropy == expected.entropy or math.isnan(expected.entropy)
    assert spectral_entropy(good).unbind()[0].entropy == r.unbind()[0].entropy


def test_statuses_are_strings_in_the_order_of_severity():
    assert [str(status) for status in Status] == [
        "ok", "rank_limited", "unresolved_offset", "out_of_range", "zero_variance", "too_few_rows", "not_run",
        "nonfinite", "failed",
    ]  # fmt: skip
    assert [status for status in Status if status.usable] == [Status.OK, Status.RANK_LIMITED]
    assert max(Status, key=lambda status: status.severity) is Status.FAILED


def test_unknown_convention_is_an_error():
    with pytest.raises(ValueError, match="'relative' or 'paper'"):
        spectral_entropy(activations(4, 2), convention="absolute")


def test_three_independent_packages_formulas_agree():
    # scikit-bio's hill(p, order=1), hill(p, order=2) and pielou_e(p) on the same p, written out.
    h = activations(300, 12) * torch.linspace(0.1, 3, 12)
    r = spectral_entropy(h)
    p = (r.eigenvalues / r.eigenvalues.sum()).numpy()
    assert abs(r.effective_rank - np.prod(p**-p)) < 1e-10
    assert abs(r.participation_ratio - 1 / np.sum(p**2)) < 1e-11
    assert abs(r.normalized - np.log(np.prod(p**-p)) / np.log(12)) < 1e-13
    # the Vendi score of the centred kernel, K / N with unit trace, is the same effective rank
    x = h - h.mean(0)
    kernel = torch.linalg.eigvalsh(x @ x.T / x.square().sum())
    kernel = kernel[kernel > 1e-14]
    assert abs(r.effective_rank - float(torch.exp(-(kernel * kernel.log()).sum()))) < 1e-8


IMPORTS = """
import sys, torch
before = set(sys.modules)
import fastent
new = {name.split(".")[0] for name in set(sys.modules) - before}
import fastent.testing
new |= {"hypothesis", "mpmath"} & set(sys.modules) - before
print(sorted(new & {"triton", "scipy", "matplotlib", "tyro", "rich", "safetensors", "pandas", "hypothesis", "mpmath"}))
"""


def test_importing_fastent_imports_no_optional_or_heavy_package():
    output = subprocess.run(
        [sys.executable, "-c", IMPORTS], check=True, capture_output=True, text=True
    ).stdout
    assert output.strip() == "[]"


@pytest.mark.parametrize("n", [16, 32, 33])
def test_the_formula_of_the_readme_is_the_entropy_also_where_rounding_leaves_a_negative_eigenvalue(n):
    h = activations(n, 32)
    x = h - h.mean(0)
    p = torch.linalg.eigvalsh(x.T @ x)
    p = p / p.sum()
    naive, advised = -(p * p.log()).sum(), torch.special.entr(p.clamp(min=0)).sum()
    assert bool(naive.isnan()) is bool((p < 0).any())
    assert n > 16 or bool(naive.isnan())
    assert float(advised) == pytest.approx(spectral_entropy(h).entropy, abs=1e-10)


@pytest.mark.parametrize("scale", [1.0, 1e-300, 1e300])
@pytest.mark.parametrize("make", [torch.tensor, np.array])
def test_entropy_of_given_eigenvalues_is_the_closed_form_at_any_scale(make, scale):
    given = np.array([2.0, 0.0, 4.0, 2.0]) * scale
    r = entropy_of_eigenvalues(make(given))
    assert r.entropy == pytest.approx(1.5 * math.log(2), rel=1e-15)
    assert r.normalized == pytest.approx(0.75, rel=1e-15)
    assert r.participation_ratio == pytest.approx(64 / 24, rel=1e-15)
    assert r.eigenvalues.tolist() == sorted(given)
    assert r.total_variance == pytest.approx(8 * scale)
    assert (r.status, r.flags, r.ceiling, r.n, r.d, r.solver) == (Status.OK, (), 1.0, 0, 4, "given")


def test_entropy_of_given_eigenvalues_has_the_floor_of_the_reference():
    given = 10.0 ** -np.linspace(0, 20, 12)
    assert entropy_of_eigenvalues(given).entropy == pytest.approx(
        reference.entropy_of_eigenvalues(given), rel=1e-14
    )
    floor = reference.relative_floor(given)
    below, above = (np.array([1.0] + [c * floor] * 11) for c in (0.9, 1.1))
    assert entropy_of_eigenvalues(below).entropy == 0.0
    assert entropy_of_eigenvalues(above).entropy > 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_entropy_of_a_covariance_is_that_of_its_rows(dtype):
    h = activations(50, 7) * torch.logspace(0, -3, 7)
    c, r = covariance(h).to(dtype), spectral_entropy(h)
    got = entropy_of_covariance(c)
    assert got.entropy == pytest.approx(r.entropy, abs=1e-13 if dtype == torch.float64 else 1e-6)
    assert entropy_of_covariance(c.numpy()).entropy == got.entropy
    assert (got.ceiling, got.n, got.d, got.solver) == (1.0, 0, 7, "lapack (covariance)")
    for exponent in (-900, 900):
        assert entropy_of_covariance(c.double() * 2.0**exponent).entropy == got.entropy
    few = spectral_entropy(h[:4])  # three eigenvalues above 0, the rest a little to either side of it
    of_few = entropy_of_covariance(covariance(h[:4]).to(dtype))
    assert of_few.entropy == pytest.approx(few.entropy, abs=1e-12 if dtype == torch.float64 else 1e-5)
    assert of_few.status is Status.OK


def test_entropy_of_a_zero_spectrum_is_zero_by_its_status():
    for r in (entropy_of_eigenvalues(torch.zeros(3)), entropy_of_covariance(torch.zeros(3, 3))):
        assert (r.normalized, r.effective_rank, r.status, r.n) == (0.0, 1.0, Status.ZERO_VARIANCE, 0)
        assert "rows" not in r.message


@pytest.mark.parametrize(
    ("call", "given", "error", "message"),
    [
        (entropy_of_eigenvalues, [1.0, -0.1], ValueError, r"not below 0; got -0.1 \(the largest is 1\)"),
        (entropy_of_eigenvalues, [-1.0, -2.0], ValueError, "not below 0; got -2"),
        (
            entropy_of_eigenvalues,
            [1.0, math.nan],
            ValueError,
            r"finite; got 1 NaN or Inf, the first at \(1,\)",
        ),
        (entropy_of_eigenvalues, [1.0], ValueError, r"d at least 2; got \(1,\)"),
        (entropy_of_eigenvalues, [[1.0, 2.0]], ValueError, r"shape \(d,\) .* got \(1, 2\)"),
        (entropy_of_covariance, [[1.0, 2.0], [2.0, 1.0]], ValueError, "not below 0; got -1 "),
        (entropy_of_covariance, [[1.0, 0.5], [0.4, 1.0]], ValueError, r"got 0.5 at \(0, 1\) and 0.4 at"),
        (entropy_of_covariance, [[math.inf, 0.0], [0.0, 1.0]], ValueError, r"the first at \(0, 0\)"),
        (entropy_of_covariance, [[1.0, 0.0]], ValueError, r"shape \(d, d\) .* got \(1, 2\)"),
        (entropy_of_covariance, [[1.0 + 0j, 0.0], [0.0, 1.0]], TypeError, "covariance is complex"),
    ],
)
def test_what_is_no_spectrum_and_no_covariance_is_refused(call, given, error, message):
    for make in (torch.tensor, np.array):
        with pytest.raises(error, match=message):
            call(make(given))


def test_a_list_is_no_spectrum():
    with pytest.raises(TypeError, match=r"eigenvalues must be a torch.Tensor or a NumPy array; got list"):
        entropy_of_eigenvalues([1.0, 1.0])
