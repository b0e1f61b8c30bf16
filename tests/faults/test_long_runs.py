"""Long runs: memory that does not grow with the calls, few bytes a row, and nothing left of a thousand monitors.

Small in the default suite, at full size in the session `faults`, which writes down what it took. Sizes and counts are
judged; times are of the processor and only told.
"""

import dataclasses
import gc
import io
import json
import os
import sys
import threading
import time
import tracemalloc
import zlib
from contextlib import contextmanager

import pytest
import torch

pytest.importorskip("rich")
from rich.console import Console

import fastent
from fastent.grokking.experiments import folder
from fastent.grokking.experiments.data import read_runs
from fastent.grokking.experiments.folder import Folder, State
from fastent.grokking.experiments.watch import print_runs
from fastent.grokking.train.checkpoint import Checkpoint
from fastent.grokking.train.config import preset
from fastent.grokking.train.runs import Job, Run, _settings_sum, damages
from fastent.grokking.train.storage import read_object, seal


def at_both(small, full):
    return [small, pytest.param(full, marks=pytest.mark.nightly)]


@pytest.fixture
def took(request):
    """Run a block and take down, for the page, of how many things it was and what it took."""

    @contextmanager
    def took(what, count):
        figure = {"what": what, "count": count}
        request.node.user_properties.append(("long", figure))
        start = time.process_time()
        yield figure  # which gets its bytes later, where they are known
        figure["seconds"] = round(time.process_time() - start, 3)

    return took


def peak(function):
    """Most bytes that Python had at once during a call, beyond what it had before."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def falling(entropy, step):
    """An entropy that falls for 1,000 steps, and begins anew: the case in which most levels are remembered."""
    return dataclasses.replace(entropy, normalized=0.9 - 0.4 * (step % 1000) / 1000)


WARM = 3_000
"""Calls until a history of 100, the patience and the window of a collapse are full."""


@pytest.mark.parametrize("calls", at_both(3_000, 10_000_000))
def test_evaluations_leave_no_block_of_memory_behind(calls, took):
    entropies = [
        falling(fastent.spectral_entropy(torch.eye(6, 3, dtype=torch.float64)), k) for k in range(1000)
    ]
    logged = [0]

    def log(record):
        logged[0] += 1

    monitor = fastent.SpectralEntropyMonitor(
        every=1, history_size=100, threshold=0.7, collapse=fastent.Collapse(), on_record=log
    )

    def evaluate(steps):
        for step in steps:
            monitor.observe(step, entropies[step % 1000], layer="x")
            if step % 100 == 0:
                monitor.flush()

    evaluate(range(WARM))
    before = sys.getallocatedblocks()
    with took("evaluations recorded by a monitor", calls) as found:
        evaluate(range(WARM, WARM + calls))
    grown = sys.getallocatedblocks() - before
    found["bytes"] = 0
    assert grown < 100, f"{grown} blocks after {calls:,} calls"
    assert logged[0] == WARM + calls
    assert len(monitor.history) == 100


@pytest.mark.parametrize("calls", at_both(3_000, 10_000_000))
def test_steps_that_are_not_due_leave_no_block_of_memory_behind(calls, took):
    monitor = fastent.SpectralEntropyMonitor(torch.nn.Linear(2, 3), torch.ones(4, 2), "", every=1 << 40)

    def train(steps):
        for step in steps:
            monitor.step(step)

    train(range(10))
    before = sys.getallocatedblocks()
    with took("steps of a monitor that are not due", calls) as found:
        train(range(10, 10 + calls))
    found["bytes"] = 0
    assert sys.getallocatedblocks() - before < 100


@pytest.mark.parametrize("calls", at_both(1_000, 1_000_000))
def test_forecasts_of_a_full_history_leave_no_block_of_memory_behind(calls, took):
    law = fastent.PowerLaw(c1=40_000.0, gamma=1.65, c2=700.0, h_star=0.5)
    monitor = fastent.SpectralEntropyMonitor(every=1, history_size=10_000, law=law)
    entropy = fastent.spectral_entropy(torch.eye(6, 3, dtype=torch.float64))
    for step in range(1000):
        monitor.observe(step, falling(entropy, step // 2), layer="x")

    def ask(times):
        for _ in range(times):
            monitor.predict_grok_time()

    ask(100)
    gc.collect()
    before = sys.getallocatedblocks()
    with took("forecasts", calls) as found:
        ask(calls)
    gc.collect()
    found["bytes"] = 0
    assert sys.getallocatedblocks() - before < 500


@pytest.mark.parametrize("monitors", at_both(30, 1_000))
def test_a_monitor_that_is_closed_leaves_no_thread_file_hook_or_object(monitors, took):
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    probe = torch.randn(16, 4)

    def watch(times):
        for _ in range(times):
            for kind in ({"probe": probe}, {"probe": "batch"}):
                with fastent.SpectralEntropyMonitor(model, layers=["0", "2"], every=1, **kind) as monitor:
                    model(probe)
                    monitor.step(0)
                    monitor.flush()
            del monitor

    def left():
        gc.collect()
        hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
        return threading.active_count(), len(os.listdir("/proc/self/fd")), hooks, len(gc.get_objects())

    watch(5)
    before = left()
    with took("monitors opened and closed", 2 * monitors):
        watch(monitors)
    after = left()
    assert after[:3] == before[:3]
    assert after[3] - before[3] < 10


ENVIRONMENT = {"torch": "2.0", "cpu": "any", "threads": 1, "device": "cpu", "commit": None}
CLOCKS = {"time": 1.7e9, "seconds": 0.25}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # a test cannot cut the power


def write(path, rows):
    """Write a log as the trainer does, in one go."""
    total, lines = 0, []
    for row in rows:
        body = json.dumps(row)[:-1].encode()
        total = zlib.crc32(body, total)
        lines.append(body + b', "crc32": "%08x"}\n' % total)
    path.write_bytes(b"".join(lines))


def plant(out, rows, *, done):
    """Write what a run of so many evaluations leaves, one each step: complete, or killed after its last checkpoint."""
    config = preset("quick", width=8, heads=1, evaluate_every=1, max_steps=rows + 100)
    job = Job("e1", "baseline", config, (0,))
    metrics = (
        {
            "step": step, "train_loss": 1 / (1 + step), "train_accuracy": 1.0, "test_loss": 2 / (1 + step),
            "test_accuracy": step / rows, "parameter_norm": 10.123456789 + step / rows,
            "entropy": 0.9123456789 - step / rows / 2, "entropy_status": "ok",
            "effective_rank": 7.123456789, "participation_ratio": 5.123456789,
        }
        for step in range(rows)
    )  # fmt: skip
    with Run(out, job, 0, ENVIRONMENT) as run:
        run.begin()
    write(run.path / "metrics.jsonl", metrics)
    write(run.path / "timing.jsonl", ({"event": "evaluation", "step": k, **CLOCKS} for k in range(rows)))
    with Run(out, job, 0, ENVIRONMENT) as run:
        run.rewind(rows - 1)
        run.save(Checkpoint(rows - 1, {"weight": torch.zeros(8)}, {"monitor": {}}))
        if done:
            run.finish(rows - 1, "max_steps", CLOCKS)
    return job, run.path


@pytest.mark.parametrize("rows", at_both(2_000, 1_000_000))
def test_a_log_is_resumed_from_a_few_bytes_for_each_row(tmp_path, rows, took):
    job, path = plant(tmp_path, rows, done=False)
    opened = []

    def resume():
        with Run(tmp_path, job, 0, ENVIRONMENT) as run:
            assert run.newest().step == rows - 1
            run.begin()
            run.rewind(rows - 1)
            run.record({"step": rows, "train_accuracy": 1.0, "test_accuracy": 1.0})
            opened.append((run.metrics.log.count, run.reached.t_mem, run.last_row_step))

    with took("rows of a log that is resumed from", rows) as found:
        resume()
    assert opened == [(rows + 1, 0, rows)]
    found["bytes"] = peak(resume)
    # 20 bytes a row and log, with the spare ones of arrays that grow, and 16 to compare steps with those due
    assert found["bytes"] < 80 * rows + 300_000
    assert path.joinpath("metrics.jsonl").stat().st_size > 200 * rows


@pytest.mark.parametrize("rows", at_both(1_000, 1_000_000))
def test_a_complete_log_is_verified_and_listed_without_being_held(tmp_path, rows, took):
    _, path = plant(tmp_path, rows, done=True)
    screen = Console(file=io.StringIO())
    with took("rows of a complete log that is verified and listed", rows) as found:
        print_runs(path, console=screen)
        assert damages(path, checkpoint=True) == []
    found["bytes"] = peak(lambda: (print_runs(path, console=screen), damages(path, checkpoint=True)))
    assert found["bytes"] < 80 * rows + 300_000
    with took("rows read by load_runs", rows) as found:
        assert len(fastent.load_runs(path).rows) == rows
    found["bytes"] = peak(lambda: fastent.load_runs(path))
    assert found["bytes"] < 3_000 * rows + 300_000


def copies(path, count):
    """Plant `count` complete runs that differ from the one in `path` in their seeds."""
    record, done = read_object(path / "config.json"), read_object(path / "DONE")
    for seed in range(1, count):
        other = path.with_name(f"{path.name.removesuffix('0')}{seed}")
        other.mkdir()
        own = {**record, "seed": seed, "stack": [seed]}
        (other / "config.json").write_bytes(seal(own))
        (other / "DONE").write_bytes(seal({**done, "settings_sha256": _settings_sum(own)}))
        for name in ("metrics.jsonl", "timing.jsonl", "environment.json"):
            os.link(path / name, other / name)


@pytest.mark.parametrize("runs", at_both(20, 10_000))
def test_a_folder_of_many_runs_is_read_one_run_at_a_time(tmp_path, monkeypatch, capsys, runs, took):
    _, path = plant(tmp_path, 30, done=True)
    copies(path, runs)
    opened = [0]
    real = folder.damages

    def counted(path):
        opened[0] += 1
        return real(path)

    monkeypatch.setattr(folder, "damages", counted)
    with took("complete runs listed by fastent runs", runs) as found:
        print_runs(tmp_path, as_json=True)
    assert len(json.loads(capsys.readouterr().out)["runs"]) == opened[0] == runs
    watched = Folder(tmp_path)
    found["bytes"] = peak(watched.look)
    assert found["bytes"] < 5_000 * runs + 1_000_000
    opened[0] = 0
    with took("complete runs looked at again by fastent watch", runs):
        assert {state.state for state in watched.look()} == {State.COMPLETE}
    assert opened[0] == 0
    with took("runs of 30 rows read for a report", runs) as found:
        assert len(read_runs(tmp_path)) == runs
    found["bytes"] = peak(lambda: read_runs(tmp_path))
    assert found["bytes"] < 200_000 * runs
    with took("runs of 30 rows read by load_runs", runs) as found:
        assert len(fastent.load_runs(tmp_path).rows) == 30 * runs
