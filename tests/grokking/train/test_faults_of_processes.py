"""Rows 2, 3 and 8 of the faults with real processes: signals, a full disk, two at once."""

import os
import resource
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
from toy_stack import CHECKPOINT_EVERY, JOB, ToyStack, contents

from fastent.grokking.train import loop
from fastent.grokking.train.checkpoint import checkpoint_steps, read_checkpoint
from fastent.grokking.train.loop import train
from fastent.grokking.train.storage import Interrupted, RunError, RunLocked, StopRequest


class Slow(ToyStack):
    def train_step(self):
        time.sleep(0.02)
        return super().train_step()


class Stuck(ToyStack):
    """Tells by a file that it is in a step that takes long."""

    def train_step(self):
        Path("stuck").touch()
        time.sleep(60)


def train_toy(out, stack):
    """Train the toy job as the command line does; exit with its status."""
    os.chdir(Path(out).parent)
    torch.set_num_threads(1)
    loop.Stack = stack
    try:
        with StopRequest() as stop:
            train(JOB, Path(out), checkpoint_every=CHECKPOINT_EVERY, stop=stop)
    except Interrupted as interruption:
        sys.exit(128 + interruption.signal)
    except RunError as error:
        Path("error").write_text(str(error))
        sys.exit(1)


def wait_for(process, condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert process.is_alive()
        assert time.monotonic() < deadline, "the process did not get there"
        time.sleep(0.01)


@pytest.fixture
def start(processes):
    started = []

    def start(*arguments):
        process = processes.Process(target=train_toy, args=arguments)
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_step_saves_and_exits_and_the_resume_is_exact(
    start, toy, tmp_path, uninterrupted, number, status
):
    out = tmp_path / "out"
    process = start(out, Slow)
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


def test_a_second_signal_exits_at_once(start, tmp_path):
    process = start(tmp_path / "out", Stuck)
    wait_for(process, (tmp_path / "stuck").exists)
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(0.2)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGINT)
    process.join(10)
    assert process.exitcode == 130


def test_a_second_process_on_a_run_refuses_and_names_the_first_and_the_killed_first_is_no_obstacle(
    start, toy, tmp_path, uninterrupted
):
    out = tmp_path / "out"
    process = start(out, Stuck)
    wait_for(process, (tmp_path / "stuck").exists)
    with pytest.raises(RunLocked, match=rf"in use by process {process.pid} on host {socket.gethostname()}"):
        toy(out)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    toy(out)
    assert contents(out) == uninterrupted


def full_disk(out, limit):
    """Train with no file allowed to grow over `limit` bytes: the system refuses like a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    train_toy(out, ToyStack)


def test_a_file_that_cannot_grow_ends_the_run_with_a_clear_error_and_the_old_checkpoint_intact(
    processes, half, toy, uninterrupted
):
    out = half(27)
    size = (out / JOB.run_name(0) / "metrics.jsonl").stat().st_size
    process = processes.Process(target=full_disk, args=(out, size + 100))
    process.start()
    process.join()
    assert process.exitcode == 1
    error = (out.parent / "error").read_text()
    assert error.startswith(f"cannot write {out / JOB.run_name(0)}")
    assert "File too large. What was saved before is intact" in error
    assert read_checkpoint(out / JOB.run_name(0), 20).step == 20
    assert not list(out.rglob("*.tmp"))
    toy(out)
    assert contents(out) == uninterrupted


def test_no_space_for_a_checkpoint_leaves_the_one_before_and_says_so(half, toy, uninterrupted, monkeypatch):
    out = half(27)
    real = os.write

    def write(descriptor, data):
        if len(data) > 600:  # rows go in, checkpoints do not
            raise OSError(28, "No space left on device")
        return real(descriptor, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        with pytest.raises(RunError) as caught:
            toy(out)
    assert str(caught.value).startswith(f"cannot write {out / JOB.run_name(0)}/checkpoint-30")
    assert "No space left on device. What was saved before is intact" in str(caught.value)
    assert checkpoint_steps(out / JOB.run_name(0)) == [10, 20]
    assert not list(out.rglob("*.tmp"))
    toy(out)
    assert contents(out) == uninterrupted


def test_a_read_only_folder_is_named(toy, tmp_path, monkeypatch):
    def read_only(path, flags, *mode):
        if flags & os.O_CREAT:
            raise OSError(30, "Read-only file system", str(path))
        return real(path, flags, *mode)

    real = os.open
    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(RunError, match=r"cannot write .*/lock: Read-only file system"):
        toy(tmp_path / "out")


def test_a_file_in_the_place_of_the_folder_is_named(toy, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(RunError, match=r"cannot write .*/out/.*: Not a directory"):
        toy(tmp_path / "out")
