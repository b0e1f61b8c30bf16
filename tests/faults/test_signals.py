"""Row 2 of the faults: SIGTERM and SIGINT."""

import os
import signal
import time

import pytest
from toy_stack import JOB, contents
from victims import Slow, Stuck, train_toy, wait_for

from fastent.grokking.train.checkpoint import checkpoint_steps


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_step_saves_and_exits_and_the_resume_is_exact(
    start, toy, tmp_path, uninterrupted, figure, number, status
):
    out = tmp_path / "out"
    process = start(train_toy, out, Slow)
    metrics = out / JOB.run_name(1) / "metrics.jsonl"
    wait_for(process, lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= 3)
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == status
    steps = [checkpoint_steps(out / JOB.run_name(seed))[-1] for seed in (1, 2)]
    assert steps[0] == steps[1] >= 10
    assert not (out / JOB.run_name(1) / "lock").exists()
    toy(out)
    assert contents(out) == uninterrupted
    figure(2, f"{signal.Signals(number).name} to a run in training", 1, 1)


def test_a_second_signal_exits_at_once(start, tmp_path):
    process = start(train_toy, tmp_path / "out", Stuck)
    wait_for(process, (tmp_path / "stuck").exists)
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(0.2)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGINT)
    process.join(10)
    assert process.exitcode == 130
