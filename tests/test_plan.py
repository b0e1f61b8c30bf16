"""The cost model and the plan made from it, at rates that make the arithmetic plain."""

import itertools
import math
import sys
import tracemalloc

import pytest
import torch
from torch import nn

pytest.importorskip("tyro")
from fastent import SpectralEntropyMonitor
from fastent.cli import main
from fastent.linalg import SLAB
from fastent.plan import (
    Monitoring,
    Rates,
    all_reduce_bytes,
    describe,
    estimate,
    floor,
    make_plan,
    measure,
    work,
)

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
    def state(ranks):
        return 8 * (64 * 65 // 2 + ranks * (3 + 3 + 2 * 64))

    assert all_reduce_bytes(64, 1) == 0
    assert all_reduce_bytes(64, 2) == state(2)
    assert all_reduce_bytes(64, 4096) == math.ceil(state(4096) * 2 * 4095 / 4096)


def test_the_plan_of_a_large_model_shares_the_layers_out_and_solves_the_gram_matrix():
    plan = make_plan(RATES, Monitoring(**PLAN))
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
        stride = make_plan(RATES, Monitoring(**PLAN, budget=budget)).stride
        assert make_plan(RATES, Monitoring(**(PLAN | {"stride": stride}), budget=budget)).share <= budget
        assert make_plan(RATES, Monitoring(**(PLAN | {"stride": stride - 1}), budget=budget)).share > budget


def test_on_one_rank_nothing_is_sent_and_the_forward_pass_counts():
    plan = make_plan(RATES, Monitoring(**(PLAN | {"ranks": 1}), probe_time=3.0))
    (way,) = plan.ways
    assert way.sent == 0
    assert plan.share == pytest.approx((way.seconds + 3.0) / 100)


def test_an_extrapolation_is_called_one():
    small = {"layers": 2, "probe": 512, "d": 256, "stride": 100}
    for d, said in ((256, False), (2048, True)):
        sizes = small | {"d": d, "probe": 4096}
        text = "\n".join(describe(make_plan(RATES, Monitoring(**sizes, ranks=1, step_time=1.0))))
        assert ("extrapolated" in text) is said


BEYOND = {
    "layers": (0, -1, 10**20),
    "d": (1, 10**20),
    "probe": (1, 10**20),
    "ranks": (0, 10**20),
    "stride": (0, 10**20),
    "itemsize": (0, 17),
    "step_time": (0.0, -1.0, math.nan, math.inf),
    "link": (0.0, -1.0, math.nan, math.inf),
    "budget": (0.0, -1.0, math.nan, math.inf),
    "probe_time": (-1.0, math.nan, math.inf),
    "evaluation_time": (-1.0, math.nan, math.inf),
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BEYOND.items() for value in values]
)
def test_a_plan_refuses_what_is_beyond_a_bound_with_the_rule(name, value):
    with pytest.raises(ValueError, match=rf"{name} must be .*; got "):
        Monitoring(**(PLAN | {name: value}))


def test_the_largest_sizes_that_are_answered_take_no_memory():
    tracemalloc.start()
    try:
        sizes = {"layers": 10**12, "d": 10**12, "probe": 10**12, "stride": 10**12}
        rest = {"ranks": 10**12, "step_time": 1e-9, "link": 1.0, "budget": 1e-9, "probe_time": 1e12}
        assert describe(make_plan(RATES, Monitoring(**sizes, **rest)))
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("m", [2, 127, 128, 129, 256, 1000, 1024])
def test_the_operations_are_those_of_every_slab_of_the_lower_triangle(m):
    one = work(5000, m, side="covariance")
    edges = [*range(0, m, SLAB), m]
    assert one.flops == sum(2 * 5000 * (b - a) * b for a, b in itertools.pairwise(edges))
    assert one.launches % (len(edges) - 1) == 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            [],
            "forward pass   not in these numbers, and as a rule most of what a probe costs: --model MODULE:FUNCTION "
            "has it measured, --probe-time gives it",
        ),
        (["--probe-time", "0"], "forward pass   0 for the probe, as given; in share and stride"),
        (["--probe-time", "3"], "forward pass   3 s for the probe, as given; in share and stride"),
    ],
)  # fmt: skip
def test_the_forward_pass_is_named_whether_it_is_counted_or_not(monkeypatch, capsys, given, said):
    monkeypatch.setattr("fastent.plan.measure_rates", lambda: RATES)
    assert main(["plan", *given]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert said in lines
    left_out = [line for line in lines if line.endswith(", the forward pass left out")]
    assert [line.split()[0] for line in left_out] == ([] if given else ["share", "choose"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ["--d", "100000000000000000000"],
            "d must be from 2 to 1,000,000,000,000; got 100000000000000000000",
        ),
        (["--budget", "0"], "budget must be over 0 and at most 100 percent; got 0"),
        (["--link", "0"], "link must be from 1e-09 to 1e+12 GB per second; got 0"),
        (["--step-time", "nan"], "step_time must be from 1e-09 to 1e+12 seconds; got nan"),
    ],
)
def test_a_plan_of_wrong_numbers_is_wrong_usage_before_anything_is_measured(
    monkeypatch, capsys, given, message
):
    monkeypatch.setattr("fastent.plan.measure_rates", lambda: pytest.fail("measured"))
    assert main(["plan", *given]) == 2
    assert capsys.readouterr().err == f"fastent: {message}\n"


def test_the_command_prints_the_ways_and_the_choice(monkeypatch, capsys):
    monkeypatch.setattr("fastent.plan.measure_rates", lambda: RATES)
    line = "plan --layers 80 --d 8192 --probe 512 --ranks 1024 --stride 100 --step-time 1.0"
    assert main(line.split()) == 0
    out = capsys.readouterr().out
    for text in ("one rank", "layers over ranks", "rows over ranks", "512 x 512 gram", "64.4 GB", "share"):
        assert text in out
    assert "choose         layers over ranks" in out


class Slow(nn.Module):
    """A model whose pass takes 8 ms of a clock that only it turns, its first one 500, and whose layers 1 ms each."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 4)

    def forward(self, x):
        Clock.now += 0.008 if Clock.passes else 0.5
        Clock.passes += 1
        return self.second(self.first(x))


class Clock:
    now = 0.0
    passes = 0


@pytest.fixture
def clock(monkeypatch):
    from fastent.monitor import deferred

    solve = deferred.entropy_of_rows

    def slow(*args, **kwargs):
        Clock.now += 0.001
        return solve(*args, **kwargs)

    monkeypatch.setattr(deferred, "entropy_of_rows", slow)
    monkeypatch.setattr("fastent.monitor.cost.perf_counter", lambda: Clock.now)
    Clock.now, Clock.passes = 0.0, 0


def monitor(**options) -> SpectralEntropyMonitor:
    return SpectralEntropyMonitor(Slow(), torch.randn(48, 6), ["first", "second"], every=7, **options)


@pytest.mark.parametrize("check", [True, False])
def test_a_monitors_pass_and_its_evaluation_are_measured_apart_and_the_first_does_not_count(clock, check):
    watching = monitor(check=check)
    watching.step(14)
    found = measure(watching, budget=0.0)
    assert found.forward == pytest.approx(0.008)
    assert found.evaluation == pytest.approx(0.002)
    assert (found.layers, found.d, found.probe) == (2, 16, 48)  # the larger layer
    assert [record.step for record in watching.history[::2]] == [14, 21, 28, 35, 42]


def test_the_plan_of_a_monitor_has_the_share_that_it_takes_in_the_loop(clock, monkeypatch, capsys):
    monkeypatch.setattr("fastent.plan.measure_rates", lambda: RATES)
    monkeypatch.setitem(sys.modules, "planned", type(sys)("planned"))
    sys.modules["planned"].make = monitor
    line = ["plan", "--model", "planned:make"]
    assert main([*line, "--step-time", "0.051"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "forward pass   8 ms for the probe, measured; in share and stride" in lines
    assert any(line.startswith("evaluation     2 ms for 2 layers, measured; by the rates ") for line in lines)
    # (8 + 2) / (7 * 51)
    assert "share          2.80% of the training time at stride 7 and 51 ms a step" in lines
    assert "choose         one rank; stride 20 or more keeps it within 1 %" in lines
    assert main([*line, "--step-time", "0.01", "--stride", "100", "--ranks", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    # (8 + 1) / (100 * 10)
    assert "share          0.90% of the training time at stride 100 and 10 ms a step" in lines


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ["--model", "planned:LAYERS"],
            "model='planned:LAYERS' is a list and no function: write one without arguments that makes the model",
        ),
        (
            ["--model", "planned:network"],
            "model='planned:network' is a Sequential and no function: write one",
        ),
        (
            ["--model", "planned:takes_one"],
            "model='planned:takes_one' is called without arguments, and it has: missing a required argument: 'x'",
        ),
        (["--model", "planned"], "model is MODULE:FUNCTION, such as train:make_monitor; got 'planned'"),
        (["--model", "planned:other"], "model='planned:other': planned has no 'other'; its functions are "),
        (["--model", "nowhere:make"], "model='nowhere:make': No module named 'nowhere'; looked for in "),
        (["--model", "planned:make"], "model='planned:make' must return a fastent.SpectralEntropyMonitor"),
        (["--model", "planned:make", "--d", "8"], "--model says what --d would: leave one of them out"),
    ],
)
def test_what_cannot_be_measured_is_wrong_usage(monkeypatch, capsys, given, message):
    monkeypatch.setattr("fastent.plan.measure_rates", lambda: pytest.fail("measured"))
    monkeypatch.setitem(sys.modules, "planned", type(sys)("planned"))
    planned = {"LAYERS": ["first"], "network": nn.Sequential(), "takes_one": lambda x: x}
    vars(sys.modules["planned"]).update(planned, make=lambda: (Slow(), torch.randn(48, 6)))
    assert main(["plan", *given]) == 2
    assert capsys.readouterr().err.startswith(f"fastent: {message}")


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (SpectralEntropyMonitor, "has no model"),
        (lambda: SpectralEntropyMonitor(Slow(), probe="batch", layers="first"), "watches the training batch"),
    ],
)
def test_a_monitor_without_a_fixed_probe_is_wrong_usage_of_the_plan(monkeypatch, capsys, make, what):
    monkeypatch.setattr("fastent.plan.measure_rates", lambda: pytest.fail("measured"))
    monkeypatch.setitem(sys.modules, "planned", type(sys)("planned"))
    sys.modules["planned"].make = make
    assert main(["plan", "--model", "planned:make"]) == 2
    assert capsys.readouterr().err.startswith(
        "fastent: model='planned:make' must return a monitor with a fixed probe, whose pass is measured; got one that "
        f"{what}. What it takes of training is in its `cost`"
    )


def test_a_monitor_without_a_pass_of_its_own_cannot_be_measured():
    with (
        pytest.warns(UserWarning, match="no forward pass"),
        pytest.raises(ValueError, match="no pass of its own to measure"),
    ):
        measure(SpectralEntropyMonitor(Slow(), probe="batch", layers="first"))


def test_a_module_of_the_current_folder_is_found(monkeypatch, tmp_path, capsys):
    (tmp_path / "my_training.py").write_text("def make():\n    return 3\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert main(["plan", "--model", "my_training:make"]) == 2
    assert capsys.readouterr().err.endswith("; got int\n")
    del sys.modules["my_training"]
