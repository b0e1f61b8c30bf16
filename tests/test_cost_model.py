"""The cost model and the plan made from it, at rates that make the arithmetic plain."""

import math

import pytest

from fastent.cli import main
from fastent.cost_model import Rates, all_reduce_bytes, estimate, floor, work
from fastent.plan import describe, make_plan

# 1 GB/s, 1 GFLOP/s at any size, a solve that takes (m / 1000)^3 seconds.
RATES = Rates(
    call=1e-6,
    bandwidth=1e9,
    product=[(10, 1e9), (1000, 1e9)],
    solve=[(10, 1e-6), (100, 1e-3), (1000, 1.0)],
)
PLAN = {"layers": 80, "d": 8192, "probe": 512, "ranks": 1024, "stride": 100, "step_time": 1.0}


def test_the_smaller_matrix_is_formed_and_counted():
    tall, wide = work(1000, 48), work(48, 1000)
    assert (tall.side, tall.m, tall.length) == ("covariance", 48, 1000)
    assert (wide.side, wide.m, wide.length) == ("gram", 48, 1000)
    assert tall.flops == wide.flops == 2 * 1000 * 48 * 48  # one slab: nothing to leave out
    assert work(1000, 4800).flops < 0.54 * 2 * 4800 * 1000**2  # many: little more than half
    assert tall.bytes == 1000 * 48 * (4 + 32) + 16 * 48 * 48
    assert tall.solve_flops == 4 * 48**3 // 3


def test_a_large_input_goes_through_a_bounded_buffer():
    assert work(10**6, 128).memory <= 4 * 2**20 + 16 * 128**2
    assert work(100, 64).memory == 8 * (100 * 64 + 2 * 64**2)


def test_an_estimate_is_the_sum_of_its_parts_at_the_given_rates():
    one = work(4000, 100)
    found = estimate(one, RATES)
    assert found.convert == one.bytes / 1e9
    assert found.product == pytest.approx(one.flops / 1e9)
    assert found.solve == pytest.approx(1e-3)
    assert found.seconds == pytest.approx(1e-6 + one.bytes / 1e9 + one.flops / 1e9 + 1e-3)
    assert not found.extrapolated
    assert floor(one, RATES) == pytest.approx(4000 * 100**2 / 1e9 + 1e-3)
    assert floor(one, RATES) < found.seconds


def test_between_sizes_a_solve_follows_its_power_and_beyond_them_the_cube():
    assert estimate(work(4000, 316), RATES).solve == pytest.approx(0.316**3, rel=1e-6)
    beyond = estimate(work(4000, 2000), RATES)
    assert beyond.solve == pytest.approx(8.0)
    assert beyond.extrapolated


def test_a_ring_sends_twice_the_state_less_a_share():
    state = 8 * (64 + 64 * 64)
    assert all_reduce_bytes(64, 1) == 0
    assert all_reduce_bytes(64, 2) == state + 8 * 64
    assert all_reduce_bytes(64, 4096) == math.ceil(state * 2 * 4095 / 4096) + 8 * 64


def test_the_plan_of_a_large_model_shares_the_layers_out_and_solves_the_gram_matrix():
    plan = make_plan(RATES, **PLAN)
    one, layers, rows = plan.ways
    single = estimate(work(512, 8192, itemsize=2), RATES).seconds
    assert plan.best is layers
    assert layers.work.side == "gram"
    assert one.seconds == pytest.approx(80 * single)
    assert layers.seconds == pytest.approx(single, rel=1e-6)  # 80 layers on 1,024 ranks: one each
    assert rows.work.side == "covariance"
    assert rows.sent == 80 * all_reduce_bytes(8192, 1024)
    assert plan.other_side > 100 * single
    assert plan.share == pytest.approx(layers.seconds / 100)


def test_the_stride_of_the_plan_is_the_smallest_within_the_budget():
    for budget in (0.01, 0.001):
        stride = make_plan(RATES, **PLAN, budget=budget).stride
        assert make_plan(RATES, **(PLAN | {"stride": stride}), budget=budget).share <= budget
        assert make_plan(RATES, **(PLAN | {"stride": stride - 1}), budget=budget).share > budget


def test_on_one_rank_nothing_is_sent_and_the_forward_pass_counts():
    plan = make_plan(RATES, **(PLAN | {"ranks": 1}), probe_time=3.0)
    (way,) = plan.ways
    assert way.sent == 0
    assert plan.share == pytest.approx((way.seconds + 3.0) / 100)


def test_an_extrapolation_is_called_one():
    small = {"layers": 2, "probe": 512, "d": 256, "stride": 100}
    for d, said in ((256, False), (2048, True)):
        sizes = small | {"d": d, "probe": 4096}
        text = "\n".join(describe(make_plan(RATES, **sizes, ranks=1, step_time=1.0), **sizes))
        assert ("extrapolated" in text) is said


@pytest.mark.parametrize("name", ["layers", "ranks", "stride", "step_time"])
def test_a_plan_refuses_what_is_not_positive(name):
    with pytest.raises(ValueError, match=f"{name} must be positive; got 0"):
        make_plan(RATES, **(PLAN | {name: 0}))


def test_a_plan_of_one_row_is_refused():
    with pytest.raises(ValueError, match="at least 2 rows"):
        make_plan(RATES, **(PLAN | {"probe": 1}))


def test_the_command_prints_the_ways_and_the_choice(monkeypatch, capsys):
    monkeypatch.setattr("fastent.rates.measure_rates", lambda: RATES)
    line = "plan --layers 80 --d 8192 --probe 512 --ranks 1024 --stride 100 --step-time 1.0"
    assert main(line.split()) == 0
    out = capsys.readouterr().out
    for text in ("one rank", "layers over ranks", "rows over ranks", "512 x 512 gram", "85.8 GB", "share"):
        assert text in out
    assert "choose         layers over ranks" in out
