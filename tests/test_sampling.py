"""The entropy of a finite probe: its bias, the correction, the standard error, each against planted spectra."""

import json

import numpy as np
import pytest
import torch

import fastent
from fastent.entropy import Status
from fastent.reference.entropy import entropy_of_eigenvalues
from fastent.reference.sampling import grouped_jackknife, sampling_bias, sampling_deviation
from fastent.sampling import GROUPS, _random_parts, sampling_error

SPECTRA = {
    "flat": lambda d: np.ones(d),
    "geometric": lambda d: 0.02 ** (np.arange(d) / d),
    "steep": lambda d: 1e-6 ** (np.arange(d) / d),
    "power law": lambda d: 1.0 / (1 + np.arange(d)),
}


def draws(name, n, d, count, seed=0):
    """Errors of independent samples of n normal rows, and the normalised entropy behind them."""
    rng = np.random.default_rng(seed)
    lam = SPECTRA[name](d)
    truth = entropy_of_eigenvalues(lam) / np.log(d)
    rows = (torch.from_numpy(rng.standard_normal((n, d)) * np.sqrt(lam)).float() for _ in range(count))
    errors = [sampling_error(h) for h in rows]
    columns = ("normalized", "corrected", "standard_error")
    return truth, {name: np.array([getattr(e, name) for e in errors]) for name in columns}


def test_bias_of_a_flat_spectrum_is_d_minus_1_times_d_plus_2_over_2_d_n():
    for d in (2, 7, 128):
        assert sampling_bias(np.ones(d), 512) == pytest.approx(-(d - 1) * (d + 2) / (2 * d * 512), rel=1e-12)
    # more than what the paper has between its tasks, 0.605 - 0.589
    assert sampling_bias(np.ones(128), 512) / np.log(128) == pytest.approx(-0.026, abs=5e-4)


def test_bias_formula_is_smooth_where_eigenvalues_coincide_and_free_of_scale():
    apart = sampling_bias([1.0, 1.0 + 1e-5, 0.3], 100)
    assert apart == pytest.approx(sampling_bias([1.0, 1.0, 0.3], 100), rel=1e-5)
    assert sampling_bias([5.0, 1.5, 0.0], 100) == pytest.approx(sampling_bias([10.0, 3.0], 100), rel=1e-12)


@pytest.mark.parametrize("name", ["flat", "geometric"])
def test_correction_leaves_at_most_a_tenth_of_the_bias_at_n_256_d_128(name):
    truth, found = draws(name, 256, 128, 40)
    bias = found["normalized"].mean() - truth
    assert bias < -0.03
    assert abs(found["corrected"].mean() - truth) < 0.1 * abs(bias)


@pytest.mark.parametrize("name", ["geometric", "power law"])
def test_standard_error_is_within_20_percent_on_spectra_that_are_not_flat(name):
    # d / N as at N = 512, d = 128
    _, found = draws(name, 128, 32, 200)
    assert found["standard_error"].mean() == pytest.approx(found["corrected"].std(ddof=1), rel=0.2)


def test_standard_error_on_a_flat_spectrum_is_too_large_rather_than_too_small():
    _, found = draws("flat", 128, 32, 200)
    spread = found["normalized"].std(ddof=1)
    assert spread < found["standard_error"].mean() < 2.5 * spread
    assert found["standard_error"].min() > 0.5 * spread
    assert found["standard_error"].mean() > found["corrected"].std(ddof=1)


@pytest.mark.nightly
@pytest.mark.parametrize("n", [256, 512])
@pytest.mark.parametrize("name", SPECTRA)
def test_correction_and_standard_error_at_d_128_over_200_draws(name, n):
    truth, found = draws(name, n, 128, 200)
    bias, spread = found["normalized"].mean() - truth, found["normalized"].std(ddof=1)
    # the second term is the noise of a mean over 200 draws
    assert abs(found["corrected"].mean() - truth) < 0.1 * abs(bias) + 3 * spread / np.sqrt(200)
    if name == "flat":
        assert found["standard_error"].mean() > spread
    else:
        assert found["standard_error"].mean() == pytest.approx(found["corrected"].std(ddof=1), rel=0.2)
        assert found["standard_error"].mean() > 0.85 * spread


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "d"), [(100, 12), (41, 127), (131, 128), (33, 2), (5, 9)])
def test_jackknife_is_that_of_the_reference_on_both_sides_and_all_dtypes(n, d, dtype):
    generator = torch.Generator().manual_seed(n)
    h = (torch.randn(n, d, generator=generator, dtype=torch.float64) * torch.linspace(1, 0.1, d) + 3).to(
        dtype
    )
    got = sampling_error(h)
    label = np.empty(n, dtype=int)
    for j, part in enumerate(_random_parts(n, min(GROUPS, n), h.device)):
        label[part.numpy()] = j
    want = grouped_jackknife(h.double().numpy(), label)
    assert got.normalized * np.log(d) == pytest.approx(want.entropy, abs=1e-12)
    assert got.corrected * np.log(d) == pytest.approx(want.corrected, abs=1e-10)
    assert got.standard_error * np.log(d) == pytest.approx(want.standard_error, abs=1e-11)
    assert got.bias == got.normalized - got.corrected
    assert (got.groups, got.n, got.d) == (min(GROUPS, n), n, d)


def test_an_offset_of_a_million_spreads_and_any_scale_change_nothing():
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(90, 7, generator=generator, dtype=torch.float64) * torch.linspace(1, 0.1, 7)
    plain = sampling_error(h)
    for other in (h * 2.0**600, h * 2.0**-700, (h + 1e6)):
        moved = sampling_error(other)
        assert moved.standard_error == pytest.approx(plain.standard_error, rel=1e-7)
        assert moved.bias == pytest.approx(plain.bias, rel=1e-7)


def test_sampling_from_a_finite_population_shrinks_both_errors_by_what_is_seen():
    rng = np.random.default_rng(1)
    everything = torch.from_numpy(rng.standard_t(8, (600, 16)) * 0.8 ** np.arange(16))
    truth = fastent.spectral_entropy(everything).normalized
    errors = [sampling_error(everything[rng.permutation(600)[:300]], population=600) for _ in range(200)]
    found = np.array([(e.normalized, e.corrected, e.standard_error) for e in errors])
    bias = found[:, 0].mean() - truth
    noise = found[:, 0].std() / np.sqrt(200)
    assert abs(found[:, 1].mean() - truth) < 0.1 * abs(bias) + 3 * noise
    assert found[:, 2].mean() == pytest.approx(found[:, 1].std(ddof=1), rel=0.2)
    all_of_it = sampling_error(everything, population=600)
    assert (all_of_it.bias, all_of_it.standard_error) == (0.0, 0.0)


def test_order_of_the_rows_does_no_harm():
    generator = torch.Generator().manual_seed(2)
    h = torch.randn(512, 8, generator=generator) * torch.linspace(1, 0.2, 8)
    ordered = h[h[:, 0].argsort()]
    assert sampling_error(ordered).standard_error == pytest.approx(sampling_error(h).standard_error, rel=0.5)
    # groups of neighbours would be off by more than that
    blocks = np.arange(512) // 16
    assert (
        grouped_jackknife(ordered.numpy(), blocks).standard_error
        > 1.5 * grouped_jackknife(h.numpy(), blocks).standard_error
    )


def test_no_random_state_is_touched():
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    h = torch.ones(10, 3)
    h[::2] = 0
    first = sampling_error(h)
    assert torch.equal(before, torch.get_rng_state())
    assert (numpy_before == np.random.get_state()[1]).all()  # noqa: NPY002
    assert first == sampling_error(h)


def test_constant_rows_have_no_error_and_rows_that_are_not_finite_none_known():
    still = sampling_error(torch.ones(10, 3))
    assert (still.normalized, still.bias, still.standard_error, still.status) == (
        0.0,
        0.0,
        0.0,
        Status.ZERO_VARIANCE,
    )
    bad = torch.ones(10, 3)
    bad[0, 0] = torch.nan
    lost = sampling_error(bad)
    assert np.isnan([lost.normalized, lost.bias, lost.corrected, lost.standard_error]).all()
    assert lost.status is Status.NONFINITE
    one_differs = torch.zeros(10, 3)
    one_differs[4] = 1.0
    assert sampling_error(one_differs).normalized == 0.0


@pytest.mark.parametrize(("n", "left"), [(32, 0.43), (64, 0.22), (96, 0.07), (128, 0.0)])
def test_what_the_correction_leaves_of_a_flat_bias_at_few_rows_is_as_documented(n, left):
    _, found = draws("flat", n, 128, 8)
    share = (found["corrected"].mean() - 1.0) / (found["normalized"].mean() - 1.0)
    assert share == pytest.approx(left, abs=0.015)


def test_few_rows_are_corrected_in_part_and_say_so():
    _, found = draws("flat", 64, 128, 5)
    assert (found["normalized"] < 0.81).all()
    assert ((found["corrected"] > 0.9) & (found["corrected"] < 0.99)).all()
    few = sampling_error(torch.randn(64, 128, generator=torch.Generator().manual_seed(0)))
    assert few.status is Status.RANK_LIMITED
    assert "64 samples in 128 dimensions" in few.message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"h": torch.zeros(2, 3)}, "at least 3 samples"),
        ({"h": torch.zeros(9, 3), "groups": 1}, "groups must be at least 2; got 1"),
        ({"h": torch.zeros(9, 3), "population": 8}, "got 8 < 9"),
        ({"h": torch.zeros(9, 3), "population": float("nan")}, "got nan < 9"),
        ({"h": torch.zeros(9, 3, 4)}, "tokens="),
        ({"h": torch.zeros(9, 1)}, "d must be at least 2"),
    ],
)
def test_unusable_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        sampling_error(**arguments)


def test_delta_method_gives_0_for_a_flat_spectrum_and_the_spread_of_a_steep_one():
    assert sampling_deviation(np.ones(16), 100) == pytest.approx(0, abs=1e-12)
    _, found = draws("steep", 512, 8, 200)
    predicted = sampling_deviation(SPECTRA["steep"](8), 512) / np.log(8)
    assert predicted == pytest.approx(found["normalized"].std(ddof=1), rel=0.2)


def test_monitor_records_the_errors_on_request_and_keeps_them_through_its_state():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh())
    probe = torch.randn(60, 4)
    monitor = fastent.SpectralEntropyMonitor(model, probe, layers="1", standard_error=True)
    (record,) = monitor.step(0)
    with torch.no_grad():
        error = sampling_error(model(probe))
    assert (record.normalized, record.bias, record.standard_error) == (
        error.normalized,
        error.bias,
        error.standard_error,
    )
    again = fastent.SpectralEntropyMonitor(model, probe, layers="1", standard_error=True)
    again.load_state_dict(json.loads(json.dumps(monitor.state_dict())))
    assert again.history == [record]
    (plain,) = fastent.SpectralEntropyMonitor(model, probe, layers="1").step(0)
    assert (plain.normalized, plain.bias, plain.standard_error) == (record.normalized, None, None)


def test_monitor_takes_two_samples_and_given_entropies_without_errors():
    monitor = fastent.SpectralEntropyMonitor(standard_error=True)
    monitor.observe(0, torch.tensor([[0.0, 1.0], [1.0, 0.0]]), layer="few")
    h = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    monitor.observe(0, fastent.spectral_entropy(h), layer="given")
    few, given = monitor.flush()
    assert few.standard_error is given.standard_error is None
    of_tokens = fastent.SpectralEntropyMonitor(tokens="last", standard_error=True)
    of_tokens.observe(0, h[:, None], layer="t")
    (tokens,) = of_tokens.flush()
    assert tokens.standard_error == sampling_error(h).standard_error
