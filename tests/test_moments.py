"""Streaming, merging and sharding give what the whole gives; and moments say what they lack."""

import json
import subprocess
import sys

import pytest
import torch

import fastent
from fastent import Moments, Status


def activations(n: int, d: int, dtype: torch.dtype = torch.float64, offset: float = 0.0) -> torch.Tensor:
    return (torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + offset).to(
        dtype
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0.0, 1e3, 1e6])
@pytest.mark.parametrize("sizes", [(60, 40), (1, 99), (1, 1, 98), (33, 0, 33, 34), (100,)])
def test_chunks_of_any_size_give_the_whole(sizes, offset, dtype):
    h = activations(100, 5, dtype, offset)
    moments = Moments()
    for chunk in h.split(sizes):
        moments.update(chunk)
    whole = fastent.covariance(h)
    assert moments.n == 100
    assert torch.allclose(moments.covariance(), whole, rtol=0, atol=2e-14 * float(whole.abs().max()))
    assert torch.allclose(moments.mean, h.double().mean(0), rtol=1e-15, atol=1e-14)
    ours, theirs = moments.spectral_entropy(), fastent.spectral_entropy(h)
    assert abs(ours.entropy - theirs.entropy) < 1e-13
    assert ours.status is theirs.status


def test_merging_at_a_large_offset_keeps_the_digits_that_raw_sums_lose():
    h = activations(2000, 8, offset=1e7)
    left, right = Moments().update(h[:900]), Moments().update(h[900:])
    whole = fastent.covariance(h)
    assert (left.merge(right).covariance() - whole).abs().max() < 1e-14 * whole.max()


def test_merge_leaves_the_other_as_it_is_and_empty_ones_change_nothing():
    h = activations(30, 4)
    left, right = Moments().update(h[:10]), Moments().update(h[10:])
    before = right.covariance()
    left.merge(right).merge(Moments())
    assert torch.equal(right.covariance(), before)
    assert left.n == 30
    assert torch.equal(Moments().merge(right).covariance(), before)
    # a merge into an empty one must not share its state
    copy = Moments().merge(right)
    copy.update(h)
    assert torch.equal(right.covariance(), before)


def test_rows_that_are_changed_later_do_not_change_the_moments():
    for n in (1, 2):
        h = activations(n, 4)
        moments = Moments().update(h)
        before = moments.mean
        h.zero_()
        assert torch.equal(moments.mean, before), n


def test_one_row_or_none_may_come_out_of_tokens_or_padding():
    h = activations(12, 3).reshape(4, 3, 3)
    mask = torch.zeros(4, 3, dtype=torch.bool)
    moments = Moments().update(h, tokens="flatten", mask=mask)
    assert moments.n == 0
    mask[2, 1] = True
    moments.update(h, tokens="flatten", mask=mask).update(h[:1], tokens="last").update(h[1:1], tokens="last")
    assert torch.equal(moments.covariance(), fastent.covariance(torch.stack([h[2, 1], h[0, 2]])))


def test_a_change_of_d_is_an_error_naming_both():
    with pytest.raises(ValueError, match="d = 4, the new rows d = 3"):
        Moments().update(activations(5, 4)).update(activations(5, 3))


def test_too_few_rows_are_errors():
    with pytest.raises(ValueError, match="no row"):
        _ = Moments().mean
    with pytest.raises(ValueError, match="N = 1"):
        Moments().update(activations(1, 4)).covariance()
    with pytest.raises(ValueError, match="n = 5, correction = 5"):
        Moments().update(activations(5, 4)).covariance(correction=5)
    with pytest.raises(ValueError, match="d = 1"):
        Moments().update(activations(5, 1)).spectral_entropy()


def test_what_cannot_be_scaled_again_is_out_of_range_and_constant_rows_are_not():
    h = activations(20, 4)
    assert Moments().update(h * 1e-200).spectral_entropy().status is Status.OUT_OF_RANGE
    assert Moments().update(h * 1e200).spectral_entropy().status is Status.OUT_OF_RANGE
    assert Moments().update(torch.full((20, 4), 0.3)).spectral_entropy().status is Status.ZERO_VARIANCE


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_rows_that_are_gone_still_say_which_features_were_not_finite(bad):
    h = activations(20, 4, torch.float32)
    h[3, 3] = h[15, 1] = h[16, 1] = bad
    for parts in (1, 4):
        moments = Moments()
        for part in h.chunk(parts):
            moments.update(part)
        result = moments.spectral_entropy()
        assert result.status is Status.NONFINITE
        assert result.message == "NaN or Inf in 2 of 4 features, the first is feature 1"


def test_finite_rows_whose_sums_overflow_are_not_said_to_hold_nan():
    h = activations(200_000, 4)  # chunks: Inf - Inf between them makes the trace NaN
    assert Moments().update(h * 1e200).spectral_entropy().status is Status.OUT_OF_RANGE
    h[:, 2] = h[:, 2].clamp(0.1, 1.0) * 1.7e308
    message = Moments().update(h).spectral_entropy().message
    assert message == "NaN, Inf or a sum beyond float64 in 1 of 4 features, the first is feature 2"


def test_rows_of_a_narrow_dtype_keep_their_resolution():
    h = activations(100, 4, torch.bfloat16, offset=300.0)
    moments = Moments().update(h).update(activations(1, 4) + 300.0)
    assert moments.spectral_entropy().status is fastent.spectral_entropy(h).status is Status.UNRESOLVED_OFFSET


def test_state_survives_a_checkpoint_to_the_bit():
    h = activations(50, 4, offset=1e5)
    moments = Moments().update(h[:20])
    copy = Moments()
    copy.load_state_dict(moments.state_dict())
    assert torch.equal(copy.update(h[20:]).covariance(), moments.update(h[20:]).covariance())
    empty = Moments()
    empty.load_state_dict(Moments().state_dict())
    assert empty.n == 0


def poisoned(h: torch.Tensor) -> Moments:
    """Moments of `h` with NaN in the memory that holds nothing."""
    moments = Moments().update(h)
    products = moments._state[2]
    products[torch.ones_like(products).triu(1).bool()] = torch.nan
    return moments


def test_a_state_holds_no_memory_that_nothing_was_written_to():
    h = activations(50, 4)
    packed = poisoned(h).state_dict()["packed"]
    assert packed.isfinite().all()
    assert torch.equal(packed, Moments().update(h).state_dict()["packed"])
    assert poisoned(h) == Moments().update(h)


@pytest.mark.parametrize("d", [1, 2, 4, 127])
def test_packed_moments_are_count_rounding_mean_and_triangle_and_come_back_to_the_bit(d):
    h = activations(50, d, offset=1e5)
    moments = poisoned(h)
    packed = moments.pack()
    assert packed.shape == (3 + 2 * d + d * (d + 1) // 2,)
    assert packed.dtype == torch.float64
    assert packed[0] == 50
    assert torch.allclose(packed[3 : 3 + d] + packed[3 + d : 3 + 2 * d], h.mean(0), rtol=1e-15)
    i, j = torch.tril_indices(d, d)
    assert torch.allclose(packed[3 + 2 * d :], 50 * fastent.covariance(h)[i, j], rtol=1e-12)
    copy = Moments.unpack(packed)
    assert copy == moments
    copy.update(h)  # of its own memory
    assert torch.equal(packed, moments.pack())
    assert copy == moments.update(h)
    assert Moments.unpack(Moments().pack()) == Moments()


@pytest.mark.parametrize(
    "packed",
    [
        torch.zeros(0, dtype=torch.float64),
        torch.zeros(2, dtype=torch.float64),
        torch.zeros(7, dtype=torch.float64),
        torch.zeros(3, 1, dtype=torch.float64),
        torch.zeros(3),
        torch.tensor([5.0, 0.0, 1.0], dtype=torch.float64),
        torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64),
        torch.tensor([1.5, 0.0, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64),
        torch.tensor([torch.nan, 0.0, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64),
        torch.tensor([torch.inf, 0.0, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64),
        torch.tensor([1e300, 0.0, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64),
        torch.tensor([2.0, -1.0, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64),
        torch.tensor([2.0, 0.0, torch.nan, 1.0, 1.0, 1.0], dtype=torch.float64),
        torch.tensor([2.0, 0.0, -1.0, 1.0, 1.0, 1.0], dtype=torch.float64),
        torch.tensor([2.0, 0.0, 1.0, 1.0, 1.0, -1.0], dtype=torch.float64),
    ],
)
def test_a_damaged_state_is_refused_and_nothing_of_it_is_taken_over(packed):
    moments = Moments().update(activations(50, 4))
    before = moments.pack()
    with pytest.raises(ValueError, match="packed moments"):
        moments.load_state_dict({"packed": packed, "ranks": [], "grown": False})
    with pytest.raises(KeyError):
        moments.load_state_dict({"packed": Moments().pack()})
    assert torch.equal(moments.pack(), before)


@pytest.mark.parametrize(
    "packed", [None, Moments().pack().tolist(), Moments().pack().numpy(), Moments().pack().to("meta")]
)
def test_a_state_that_is_no_tensor_with_data_is_refused_with_a_remedy(packed):
    moments = Moments().update(activations(50, 4))
    before = moments.pack()
    with pytest.raises(TypeError, match=r"packed moments are a float64 tensor.*torch\.tensor\(numbers"):
        moments.load_state_dict({"packed": packed, "ranks": [], "grown": False})
    assert torch.equal(moments.pack(), before)


def test_a_state_with_rows_that_are_not_finite_comes_back():
    moments = Moments().update(torch.tensor([[torch.nan, 1.0], [2.0, 3.0], [torch.inf, 0.0]]))
    assert Moments.unpack(moments.pack()) == moments
    assert Moments.unpack(moments.pack()).spectral_entropy().status is Status.NONFINITE


@pytest.mark.parametrize("other", [activations(5, 4), None, {}])
def test_merging_what_are_no_moments_says_that_rows_are_added_by_update(other):
    moments = Moments().update(activations(50, 4))
    with pytest.raises(TypeError, match="rows are added by update"):
        moments.merge(other)
    assert moments == Moments().update(activations(50, 4))


@pytest.mark.parametrize("correction", [50, 51, float("nan")])
def test_a_normaliser_that_is_not_positive_is_refused(correction):
    h = activations(50, 4)
    with pytest.raises(ValueError, match="the normaliser is n - correction and must be positive"):
        Moments().update(h).covariance(correction=correction)
    with pytest.raises(ValueError, match="the normaliser is n - correction and must be positive"):
        fastent.covariance(h, correction=correction)


def test_reset_forgets_everything_even_the_width():
    h = activations(50, 4)
    moments = Moments().update(activations(9, 3).bfloat16()).reset()
    assert moments == Moments()
    assert moments.update(h) == Moments().update(h)


def test_moments_are_equal_where_their_bits_are_and_say_what_they_hold():
    h = activations(50, 4)
    assert Moments().update(h) == Moments().update(h.clone())
    assert Moments().update(h) != Moments().update(h[:49])
    assert Moments().update(h) != Moments().update(h + 1.0)
    assert Moments().update(h) != Moments().update(h[:, :3])
    assert Moments() != 0
    h[0, 0] = torch.nan
    assert Moments().update(h) == Moments().update(h)
    assert repr(Moments()) == "Moments(n=0)"
    assert repr(Moments().update(h)) == "Moments(n=50, d=4)"


@pytest.mark.parametrize(
    ("tokens", "rows"), [("last", 1), ("first", 1), ("mean", 1), ("flatten", 3), ("skip_first", 2)]
)
def test_one_sample_of_tokens_is_taken_as_one_row_is(tokens, rows):
    h = activations(3, 4)[None]
    chosen = {"last": h[0, 2:], "first": h[0, :1], "mean": h.mean(1), "flatten": h[0], "skip_first": h[0, 1:]}
    moments = Moments().update(h, tokens=tokens)
    assert moments.n == rows
    assert torch.equal(moments.mean, Moments().update(chosen[tokens]).mean)


def test_a_merge_that_fails_changes_nothing():
    moments = Moments().update(activations(50, 4))
    before = moments.pack()
    with pytest.raises(ValueError, match="d changed"):
        moments.merge(Moments().update(activations(5, 3).bfloat16()))
    assert torch.equal(moments.pack(), before)


RANK = """
import json, sys, torch, torch.distributed as dist, fastent
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=3)
h = torch.randn(200, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1e6
outcomes = {}
for case, parts in {"empty": (0, 120, 80), "nan": (50, 100, 50), "widths": (100, 100, 0), "none": (0, 0, 0)}.items():
    mine = h.split(parts)[rank] if sum(parts) else h[:0]
    if case == "nan" and rank == 1:
        mine = mine.clone()
        mine[3, 2] = torch.nan
    if case == "widths" and rank == 0:
        mine = mine[:, :5]
    moments = fastent.Moments().update(mine)
    try:
        copy = fastent.Moments().merge(moments)
        itself = moments.all_reduce() is moments
        once = moments.n
        twice = moments.all_reduce().n
        r = moments.spectral_entropy()
        error = (moments.covariance() - fastent.covariance(h)).abs().max().item()
        outcomes[case] = [itself, once, twice, copy.n, r.status, r.entropy, error]
    except ValueError as failure:
        outcomes[case] = str(failure)
for case in ("grown", "merged", "loaded"):
    moments = fastent.Moments().update(h.split((0, 120, 80))[rank]).all_reduce()
    if rank == 1 and case == "grown":
        moments.update(h[:5])
    if rank == 1 and case == "merged":
        moments = fastent.Moments().update(h[:5]).merge(moments)
    if case == "loaded":
        state, moments = moments.state_dict(), fastent.Moments()
        moments.load_state_dict(state)
    try:
        outcomes[case] = moments.all_reduce().n
    except ValueError as failure:
        outcomes[case] = str(failure)
pairs = [dist.new_group([0, 1]), dist.new_group([1, 2])]
moments = fastent.Moments().update(h.split((50, 50, 100))[rank])
if rank < 2:  # first within a machine, then over machines
    moments.all_reduce(pairs[0])
if rank > 0:
    moments.all_reduce(pairs[1])
outcomes["groups"] = moments.n
sent, all_reduce = [], dist.all_reduce
dist.all_reduce = lambda t, **options: sent.append(t.nbytes) or all_reduce(t, **options)
fastent.Moments().update(h.split((0, 120, 80))[rank]).all_reduce()
outcomes["sent"], dist.all_reduce = sent, all_reduce
near = h - 1e6 + 300.0
narrow = fastent.Moments().update(near.float() if rank else near.bfloat16().float())
outcomes["rounding"] = [narrow.spectral_entropy().status, narrow.all_reduce().spectral_entropy().status]
print(json.dumps(outcomes))
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of three processes printed: the outcome of every case."""
    store = str(tmp_path_factory.mktemp("group") / "store")
    processes = [
        subprocess.Popen([sys.executable, "-c", RANK, str(rank), store], stdout=subprocess.PIPE, text=True)
        for rank in range(3)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes)
    return [json.loads(output) for output in outputs]


def test_ranks_merge_to_the_whole_also_when_one_is_empty(ranks):
    h = torch.randn(200, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1e6
    whole = fastent.spectral_entropy(h)
    for rank, outcome in enumerate(ranks):
        itself, once, twice, own, status, entropy, error = outcome["empty"]
        assert itself  # in place, as update and merge are
        assert (once, twice, own) == (200, 200, (0, 120, 80)[rank])
        assert status == "ok"
        assert abs(entropy - whole.entropy) < 1e-13
        assert error < 1e-14


def test_nan_on_one_rank_is_flagged_on_all(ranks):
    assert [outcome["nan"][4] for outcome in ranks] == ["nonfinite"] * 3


def test_ranks_of_different_width_or_without_rows_all_raise(ranks):
    assert all("d = [5, 6]" in outcome["widths"] for outcome in ranks)
    assert [outcome["none"] for outcome in ranks] == ["no rank holds a row"] * 3


def test_a_second_sum_over_the_same_ranks_is_refused_on_all_where_one_has_added_rows(ranks):
    for case in ("grown", "merged"):
        assert all("once for each rank" in outcome[case] for outcome in ranks), case
    assert [outcome["loaded"] for outcome in ranks] == [200] * 3


def test_sums_over_one_group_and_then_another_count_every_row(ranks):
    assert [outcome["groups"] for outcome in ranks] == [100, 200, 200]


def test_two_sums_are_made_of_the_counts_and_of_a_place_for_each_rank_and_a_triangle(ranks):
    places, triangle = 3 * (3 + 2 * 6), 6 * 7 // 2
    assert [outcome["sent"] for outcome in ranks] == [[8 * 3 * 3, 8 * (places + triangle)]] * 3


def test_the_rounding_of_one_rank_is_known_on_all(ranks):
    assert [outcome["rounding"][0] for outcome in ranks] == ["unresolved_offset", "ok", "ok"]
    assert [outcome["rounding"][1] for outcome in ranks] == ["unresolved_offset"] * 3
