"""What the dtype that came in could not tell apart is said, and what it could is not doubted (fault 39)."""

import math

import pytest
import torch
from fake_device import FakeStreams

import fastent
from fastent import Moments, Status, sampling_error, spectral_entropy
from fastent.activations import EXACT, RESOLUTIONS, Resolution, squared_relative
from fastent.monitor.deferred import DeferredEntropy, Host, KernelFormer, Ring, TorchFormer

UNRESOLVED = Status.UNRESOLVED_OFFSET
D = 32


def activations(n: int = 512, d: int = D, seed: int = 0) -> torch.Tensor:
    """Rows of a layer that uses few directions: spread 1, H = 0.6 or so."""
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(n, d, dtype=torch.float64, generator=generator) * torch.arange(1, d + 1) ** -1.0
    h = h @ torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=generator))[0]
    return h / h.std()


def status_of(h: torch.Tensor, **options: object) -> Status:
    """Status of `h`, the same by every way to it."""
    seen = spectral_entropy(h, **options).status
    assert Moments().update(h, **options).spectral_entropy().status is seen
    assert sampling_error(h, **options).status is seen
    return seen


@pytest.mark.parametrize("dtype", [dtype for dtype in RESOLUTIONS if dtype.itemsize <= 2])
def test_the_resolution_is_the_spacing_of_the_dtypes_values(dtype):
    patterns = torch.arange(2 ** (8 * dtype.itemsize), dtype=torch.int64)
    bits = patterns.to(torch.uint8 if dtype.itemsize == 1 else torch.uint16)
    values = bits.view(dtype).double()
    values = values[values.isfinite() & (values > 0)].unique()
    assert RESOLUTIONS[dtype].relative == values[values > 1][0] - 1
    assert RESOLUTIONS[dtype].absolute == values[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_resolution_of_wide_dtypes_is_that_of_their_neighbours(dtype):
    one, zero, up = (torch.tensor(value, dtype=dtype) for value in (1.0, 0.0, math.inf))
    assert RESOLUTIONS[dtype].relative == torch.nextafter(one, up).double() - 1
    assert RESOLUTIONS[dtype].absolute == torch.nextafter(zero, up).double()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_at_an_offset_is_unresolved_and_without_one_is_not(dtype):
    h = activations()
    truth = spectral_entropy(h).normalized
    lost = (h + 10.0).to(dtype)
    assert spectral_entropy(lost).normalized - truth > 0.05
    assert status_of(lost) is UNRESOLVED
    assert status_of(h.to(dtype)) is Status.OK
    assert abs(spectral_entropy(h.to(dtype)).normalized - truth) < 0.01


@pytest.mark.parametrize("holder", [torch.float16, torch.float32, torch.float64])
def test_float16_underflow_is_unresolved_and_says_that_values_are_too_small(holder):
    h = (activations() * 1e-8).half().to(holder)
    assert (h == 0).double().mean() > 0.97
    assert status_of(h) is UNRESOLVED
    message = spectral_entropy(h).message
    assert "its values are too small" in message
    assert "scale them up" in message


def test_true_zeros_of_a_relu_in_float16_are_resolved():
    h = (activations() * 0.01 - 0.02).relu().half()
    assert (h == 0).double().mean() > 0.95
    assert status_of(h) is Status.OK


@pytest.mark.parametrize(("spread", "expected"), [(1.0, Status.OK), (0.01, UNRESOLVED)])
def test_a_feature_that_is_rounding_alone_matters_by_its_share_of_the_trace(spread, expected):
    h = activations() * spread
    h[:, 3] = 100.0 + 0.01 * h[:, 3]
    lost = h.bfloat16()
    assert lost[:, 3].double().std() < 0.26  # the spacing at 100 is 0.5
    assert status_of(lost) is expected
    assert status_of(lost.float()) is expected


@pytest.mark.parametrize("shape", [(512, 32), (24, 32)])
@pytest.mark.parametrize(
    ("narrow", "offset"), [(torch.bfloat16, 100.0), (torch.bfloat16, 300.0), (torch.float16, 1e3)]
)
@pytest.mark.parametrize("holder", [torch.float32, torch.float64])
def test_values_of_a_narrower_dtype_are_seen_in_a_wider_one(holder, narrow, offset, shape):
    h = activations(*shape) + offset
    held = h.to(narrow).to(holder)
    assert UNRESOLVED in spectral_entropy(held).flags
    assert f"{narrow}".removeprefix("torch.") in spectral_entropy(held).message
    assert UNRESOLVED in spectral_entropy(torch.stack([h.to(holder), held]), batch_dims=1).unbind()[1].flags
    assert status_of(held) is status_of(h.to(narrow)) is UNRESOLVED
    assert UNRESOLVED not in spectral_entropy(h.to(holder)).flags


def test_rows_that_happen_to_be_whole_do_not_hide_what_the_others_hold():
    h = (activations() * 0.2 + 1000.0).half().float()
    h[::128] = 1000.0  # those that are looked at first
    assert 0.1 < float((h != h.round()).double().mean()) < 0.5
    assert status_of(h) is UNRESOLVED
    assert Moments().update(h).spectral_entropy().status is UNRESOLVED
    tokens = h[:, None].repeat(1, 3, 1)
    assert status_of(tokens, tokens="mean") is UNRESOLVED
    tokens[1::2] = 1000.5
    assert status_of(tokens, tokens="mean") is UNRESOLVED


def test_float64_that_holds_float32_is_seen():
    h = activations() + 1e8
    assert status_of(h.float().double()) is UNRESOLVED
    assert status_of(h) is Status.OK


@pytest.mark.parametrize("offset", [0, 100, 200, 1000, 2000, 100_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_whole_numbers_are_not_taken_for_rounded_ones(offset, dtype):
    h = (activations().round() + offset).to(dtype)
    assert status_of(h) is Status.OK


def test_small_exact_values_are_not_taken_for_rounded_ones():
    generator = torch.Generator().manual_seed(0)
    halves = torch.randint(0, 2, (512, D), generator=generator).float() * 0.5 + 1.0
    one_hot = torch.eye(D).repeat(20, 1) + 1.0
    constants = torch.cat([activations().float(), torch.full((512, D), 300.0)], 1)
    for h in (halves, one_hot, constants):
        assert status_of(h) is Status.OK


def test_integers_are_exact_however_large():
    h = activations().round().long() + 2**52
    assert Resolution.of(h.dtype) == EXACT
    assert status_of(h) is Status.OK
    assert status_of(h.double()) is UNRESOLVED  # whose spacing there is 1


def test_subnormal_float64_is_unresolved_at_its_own_scale():
    h = activations()
    assert spectral_entropy(h * 2.0**-1000).status is Status.OK
    assert spectral_entropy(h * 2.0**-1074).status is UNRESOLVED


@pytest.mark.parametrize("holder", [torch.bfloat16, torch.float32])
def test_a_mean_over_tokens_resolves_more_than_one_token_unless_all_have_one_value(holder):
    # Spread of the tokens 4 spacings: errors of 64 tokens are independent.
    generator = torch.Generator().manual_seed(0)
    tokens = (
        torch.randn(512, 64, D, dtype=torch.float64, generator=generator) * 2.0 + activations()[:, None] / 4
    )
    fine = (tokens + 100.0).bfloat16().to(holder)
    assert status_of(fine, tokens="mean") is Status.OK
    assert (
        abs(
            spectral_entropy(fine, tokens="mean").normalized
            - spectral_entropy(tokens, tokens="mean").normalized
        )
        < 0.01
    )
    same = (activations()[:, None].repeat(1, 64, 1) + 100.0).bfloat16().to(holder)
    assert status_of(same, tokens="mean") is UNRESOLVED
    same[:, :4] += 1.0  # the mean is no bfloat16 any more, and 60 tokens still have one error
    assert status_of(same, tokens="mean") is UNRESOLVED
    padded = same.clone()
    padded[:, 3:] = torch.randn(512, 61, D, generator=generator).to(holder)
    mask = torch.arange(64).expand(512, 64) < 3
    assert status_of(padded, tokens="mean", mask=mask) is UNRESOLVED
    maps = same.transpose(1, 2).unflatten(2, (8, 8))
    assert status_of(maps, positions="mean", channel_axis=1) is UNRESOLVED


def evaluated(h: torch.Tensor, device: object, streams: FakeStreams | None = None) -> fastent.SpectralEntropy:
    evaluations = DeferredEntropy(device_of=lambda x: device)  # type: ignore[arg-type, return-value]
    with evaluations.open(0) as opened:  # type: ignore[union-attr]
        opened.add("layer", h)
    if streams is not None:
        streams.tick()
    evaluations.flush()
    ((_, results),) = evaluations.arrived()
    evaluations.close()
    return results["layer"].entropy


@pytest.mark.parametrize(
    "where", ["ring", pytest.param("kernels", marks=pytest.mark.interpreter), "worker", "in line"]
)
@pytest.mark.parametrize("shape", [(512, 32), (24, 32)])
def test_a_monitor_knows_the_resolution_wherever_the_eigenvalues_are_taken(where, shape):
    h = activations(*shape)
    cases = {
        "float8": (h + 10.0).to(torch.float8_e4m3fn),
        "underflow": (h * 1e-8).half(),
        "held": (h + 100.0).bfloat16().float(),
        "healthy": (h + 100.0).float(),
        "whole": h.round().float() + 100.0,
    }
    for name, case in cases.items():
        streams = FakeStreams() if where in ("ring", "kernels") else None
        former = KernelFormer() if where == "kernels" else TorchFormer()
        device = Ring(streams, former) if streams else Host() if where == "worker" else None
        seen = evaluated(case, device, streams)
        assert seen.flags == spectral_entropy(case).flags, name
        assert (UNRESOLVED in seen.flags) is (name in ("float8", "underflow", "held")), name


def test_moments_weigh_the_rounding_of_each_part_by_its_rows():
    h = activations(2000) + 300.0
    coarse, fine = Moments().update(h[:10].bfloat16()), Moments().update(h[10:])
    assert coarse.spectral_entropy().status is UNRESOLVED
    assert fine.spectral_entropy().status is Status.OK
    for parts in ((coarse, fine), (fine, coarse)):
        merged = Moments().merge(parts[0]).merge(parts[1])
        assert merged.spectral_entropy().status is Status.OK  # 10 rows of 2,000
    merged = Moments().update(h[:1000].bfloat16().float()).update(h[1000:])
    assert merged.spectral_entropy().status is UNRESOLVED
    loaded = Moments()
    loaded.load_state_dict(merged.state_dict())
    assert loaded.spectral_entropy().message == merged.spectral_entropy().message


def test_moments_of_single_rows_know_what_these_hold():
    h = activations(40) + 300.0
    for rows, expected in ((h.bfloat16().float(), UNRESOLVED), (h.float(), Status.OK)):
        moments = Moments()
        for row in rows:
            moments.update(row[None])
        assert moments.spectral_entropy().status is expected


def test_what_a_device_finds_in_a_few_rows_is_the_resolution_of_what_they_hold():
    h = activations() + 100.0
    for dtype in (torch.bfloat16, torch.float16):
        assert (
            squared_relative(h.to(dtype).float(), Resolution.of(torch.float32))
            == RESOLUTIONS[dtype].relative ** 2
        )
    for rows in (h.float(), h.round().float()):
        assert (
            squared_relative(rows, Resolution.of(torch.float32)) == RESOLUTIONS[torch.float32].relative ** 2
        )


def moved(values: torch.Tensor, offset: float) -> tuple[float, float, Status]:
    """H of rows with these eigenvalues and spread 1, and what bfloat16 at an offset makes of it."""
    d = len(values)
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=generator))[0]
    h = (torch.randn(512, d, dtype=torch.float64, generator=generator) * values.sqrt()) @ basis
    h = h / h.std()
    rounded = spectral_entropy((h + offset).bfloat16())
    return spectral_entropy(h).normalized, rounded.normalized, rounded.status


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [("flat", 0.0, 1e-4), ("geometric 0.97", 0.003, 0.005), ("power law 1/i", 0.005, 0.008),
     ("geometric 0.9", 0.014, 0.020), ("power law 1/i^2", 0.020, 0.028), ("rank 4", 0.028, 0.042),
     ("rank 2", 0.030, 0.042)],
)  # fmt: skip
def test_rounding_at_100_times_the_spread_moves_h_as_documented(name, least, most):
    i = torch.arange(1, 129, dtype=torch.float64)
    values = {
        "flat": torch.ones_like(i), "geometric 0.97": 0.97**i, "geometric 0.9": 0.9**i, "power law 1/i": 1 / i,
        "power law 1/i^2": 1 / i**2, "rank 4": (i <= 4).double(), "rank 2": (i <= 2).double(),
    }[name]  # fmt: skip
    h, rounded, status = moved(values, 100.0)
    assert status is UNRESOLVED
    assert least <= rounded - h <= most
    for offset, bound in ((0.0, 2e-5), (10.0, 1e-3), (30.0, 4e-3)):
        h, rounded, status = moved(values, offset)
        assert status is Status.OK
        assert abs(rounded - h) < bound


def test_noise_over_all_directions_moves_h_by_its_share_and_the_entropy_of_its_share():
    h, rounded, _ = moved(torch.tensor([1.0, 1.0] + [0.0] * 126, dtype=torch.float64), 100.0)
    s = 0.5**2 / 12 / (1 + 0.5**2 / 12)  # bfloat16 has a spacing of 0.5 from 64 to 128
    noise = -(s * math.log(s) + (1 - s) * math.log1p(-s)) / math.log(128)
    # Noise of 512 rows is not quite flat in 128 directions.
    assert rounded == pytest.approx((1 - s) * h + s + noise, abs=0.004)
