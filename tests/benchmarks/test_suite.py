"""The benchmarks' own arithmetic, their providers, and the report made from rows."""

import json
import math
import types

import numpy as np
import pytest
import torch

import fastent
from bench import harness, in_training, monitor, providers, report_cpu, tables
from bench.cases import INPUTS, SHAPES
from bench.entropy import LIMITS
from bench.host_reads import host_reads
from bench.loops import Loop
from fastent import checkout
from fastent.cli import main
from fastent.reference.entropy import spectral_entropy


def test_providers_take_turns_and_slow_ones_get_fewer_rounds():
    calls = []
    seconds = harness.interleaved(
        {name: (lambda name=name: calls.append(name)) for name in "ab"}, rounds=3, target=0.0
    )
    assert calls == [*"aabb", *"ababab"]
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}
    few = harness.interleaved({"a": lambda: sum(range(20_000))}, rounds=50, target=0.001, budget=0.0)
    assert len(few["a"]) == 3


def test_providers_far_slower_than_ours_are_timed_apart_and_leave_the_others_their_rounds(
    monkeypatch: pytest.MonkeyPatch,
):
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in ("ours", "near", "far")}
    took = {calls["ours"]: 0.02, calls["near"]: 0.09, calls["far"]: 1.0}
    monkeypatch.setattr(harness, "_seconds", took.__getitem__)
    found = harness.beside("ours", calls, rounds=9, budget=4.0)
    assert list(found) == list(calls)
    # 3 s for rounds of 0.02 + 0.09; 1 s for rounds of 0.02 + 1.0, of which there are three at least.
    assert order == ["ours", "near"] * 9 + ["ours", "far"] * 3
    assert {name: (len(theirs), len(ours)) for name, (theirs, ours) in found.items()} == {
        "ours": (9, 9),
        "near": (9, 9),
        "far": (3, 3),
    }
    assert found["near"][1] is found["ours"][0]
    order.clear()
    harness.beside("ours", {"ours": calls["ours"]}, rounds=2, budget=1.0)
    assert order == ["ours", "ours"]


def test_a_ratio_of_neighbours_ignores_what_weighs_on_both():
    weather = np.array([1.0, 5.0, 1.0, 9.0, 2.0, 1.0, 3.0])
    assert harness.ratio(2.0 * weather, weather) == (2.0, 2.0, 2.0)


def test_the_overhead_of_a_run_is_that_of_its_probes_at_every_stride():
    plain = np.full(200, 10.0)  # turns of 10 steps of 1
    for stride in (1, 10, 100, 200, 1000):
        ours = plain.copy()
        if stride <= 10:
            ours += 10 / stride * 0.5
        else:
            ours[stride // 10 - 1 :: stride // 10] += 0.5
        middle, low, high = monitor.overhead(ours, plain, stride)
        assert middle == pytest.approx(0.5 / stride, abs=1e-5)
        assert low <= middle <= high


def test_a_run_probes_at_the_end_of_each_period_and_not_before():
    loop = types.SimpleNamespace(
        step=lambda: None, activations=lambda: torch.randn(8, 4), model=None, probe=None, layer=None
    )
    run = monitor.Run(loop, 20)
    run.warm_up()
    run.advance(10)
    assert len(run.probe_seconds) == 0
    run.advance(10)
    assert len(run.probe_seconds) == 1
    assert len(run.monitor.history) == 2  # one of them to warm up
    assert len(run.step_seconds) == 20


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


def test_the_report_marks_a_peer_that_wins_and_a_limit_that_was_missed(tmp_path):
    common = {"op": "entropy", "n": 512, "d": 128, "dtype": "float32", "threads": 1, "us_p50": 800.0}
    rows = [
        {**common, "provider": "fastent", "floor_us": 500.0},
        {
            **common,
            "provider": "torch, direct",
            "ratio": 1.2,
            "ratio_low": 0.9,
            "ratio_high": 1.3,
            "limit": 1.05,
        },
        {**common, "provider": "numpy", "ratio": 1.1, "ratio_low": 1.05, "ratio_high": 1.15},
    ]
    harness.write_rows(tmp_path / "entropy.jsonl", rows)
    files = report_cpu.write(tmp_path, tmp_path / "out")
    text = files[0].read_text()
    assert "1.20 [0.90, 1.30] (limit missed)" in text
    assert "**1.10 [1.05, 1.15]**" in text
    assert [path.name for path in files[1:]] == ["entropy.png"]
    assert files[1].read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "entropy.jsonl").read_text().splitlines()[0])["provider"] == "fastent"


def test_times_are_written_with_three_digits_and_a_unit():
    assert [tables.microseconds(us) for us in (3.14159, 1234.5, 2.5e6)] == ["3.14 us", "1.23 ms", "2.5 s"]


def test_bench_outside_a_checkout_says_where_the_benchmarks_are(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkout, "__file__", str(tmp_path / "site" / "fastent" / "checkout.py"))
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "--quick"]) == 1
    error = capsys.readouterr().err
    assert "not in the installed package" in error
    assert "clone it" in error


def test_bench_hands_its_options_to_the_suite_of_the_checkout(monkeypatch, tmp_path):
    seen = []

    def run(line, *, cwd, check):
        seen.append((line[1:], cwd))
        return types.SimpleNamespace(returncode=0)

    monkeypatch.setattr(checkout.subprocess, "run", run)
    assert main(["bench", "--quick", "--out", str(tmp_path), "--only", "entropy", "monitor"]) == 0
    ((line, cwd),) = seen
    assert line == ["-m", "bench.suite", "--out", str(tmp_path), "--quick", "--only", "entropy", "monitor"]
    assert (cwd / "bench" / "suite.py").is_file()


def test_reads_by_the_host_are_numbers_arrays_and_decompositions():
    x = torch.randn(8, 3, dtype=torch.float64)
    assert host_reads(lambda: x.T @ x) == 0
    assert host_reads(lambda: float(x.sum())) == 1
    assert host_reads(lambda: np.cov(x.numpy())) == 1
    assert host_reads(lambda: np.asarray(x)) == 1
    assert host_reads(lambda: torch.linalg.eigvalsh(x.T @ x)) == 1
    assert host_reads(lambda: torch.linalg.svdvals(x).sum().item()) == 2


def test_calls_between_training_steps_take_turns_and_get_the_layer_of_the_probe():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    order: list[str] = []
    probe = torch.randn(5, 3)
    loop = Loop(model, lambda: order.append("step"), probe, "0")
    seen = []

    def call(h: torch.Tensor) -> None:
        order.append("call")
        seen.append(h)

    seconds = in_training.turns(loop, {None: lambda h: order.append("none"), "call": call}, rounds=2)
    turn = ["step"] * in_training.BEFORE, ["step"] * in_training.AFTER
    none, called = ([*turn[0], name, *turn[1]] for name in ("none", "call"))
    assert order == [*called, *none, *none, *called, *called, *none]  # the first round is warm-up
    assert all(torch.equal(h, model[0](probe)) for h in seen)
    assert [values.shape for values in seconds.values()] == [(2, 2), (2, 2)]


def test_what_a_call_adds_to_the_steps_after_it_is_a_difference_within_a_round():
    weather = np.array([1.0, 5.0, 2.0, 9.0, 3.0])
    found = in_training.excess(weather + 0.25, weather)
    assert found == {"after_us": 250_000.0, "after_low": 250_000.0, "after_high": 250_000.0}


def test_measurements_at_several_threads_wait_until_no_other_thread_runs(monkeypatch: pytest.MonkeyPatch):
    seen = iter([{"7": "1"}, {"7": "2"}, {"7": "3"}, {"7": "3"}])
    monkeypatch.setattr(harness, "_seconds_of_others", lambda: next(seen))
    monkeypatch.setattr(harness, "SPINNING", math.inf)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert harness.settle()
    assert next(seen, None) is None
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert not harness.settle()
