"""The worker and the process around it: threads, exits, kills, forks. Each case is a process of its own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

HEAD = """
import os, signal, sys, threading, time
import torch
from fake_device import FakeStreams
import fastent
from fastent import process
from fastent.monitor.deferred import DeferredEntropy
from fastent.monitor.deferred import Devices, Host, Ring, TorchFormer

streams = FakeStreams()
slots = Ring(streams, TorchFormer())
host = Host()
h = torch.randn(40, 12, generator=torch.Generator().manual_seed(0))

def ask(evaluations, step, h=h):
    with evaluations.open(step) as opened:
        opened.add("a", h)
"""


def start(script: str, threads: int = 1) -> "subprocess.Popen[str]":
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "PYTHONUNBUFFERED": "1",
        "OMP_WAIT_POLICY": "passive",  # on a busy machine, threads that wait by spinning wait for ever
    }
    environment.pop("MKL_NUM_THREADS", None)
    pipe = subprocess.PIPE
    command = [sys.executable, "-W", "error", "-c", HEAD + script]
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)


def run(script: str, threads: int = 1) -> tuple[int, str, str]:
    process = start(script, threads)
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, out, err


def test_the_worker_uses_one_thread_and_no_other_thread_notices() -> None:
    code, out, err = run(
        """
from fastent.linalg import use_one_thread
seen = {}
def note(name):
    seen[name] = torch.get_num_threads()
def limited():
    use_one_thread()
    note("limited")
    tasks = len(os.listdir("/proc/self/task"))
    torch.linalg.eigvalsh(m)
    seen["threads started by the solve"] = len(os.listdir("/proc/self/task")) - tasks
def new():
    thread = threading.Thread(target=note, args=("new",))
    thread.start(); thread.join()

m = torch.randn(200, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(0)); m = m @ m.T
whole, product = torch.linalg.eigvalsh(m), m @ m
thread = threading.Thread(target=limited); thread.start(); thread.join()
from fastent.monitor import deferred
solve = deferred.entropy_of_rows
def noted(*args, **kwargs):
    note("worker")
    return solve(*args, **kwargs)
deferred.entropy_of_rows = noted
evaluations = DeferredEntropy(device_of=lambda x: host)
ask(evaluations, 0); evaluations.flush()
note("training"); new()
assert seen == {"limited": 1, "worker": 1, "training": 2, "new": 2, "threads started by the solve": 0}, seen
assert torch.equal(torch.linalg.eigvalsh(m), whole) and torch.equal(m @ m, product)
ask(evaluations, 1); evaluations.close()
print("same")
""",
        threads=2,
    )
    assert (code, out.strip()) == (0, "same"), err


def test_a_process_ends_although_the_device_never_answers_and_says_what_is_missing() -> None:
    start_time = time.monotonic()
    code, _, err = run(
        """
process.EXIT_SECONDS = 0.3
evaluations = DeferredEntropy(device_of=lambda x: slots)
for step in range(3): ask(evaluations, step)
"""
    )
    assert code == 0
    assert "3 deferred evaluations were not finished when the process ended" in err
    assert time.monotonic() - start_time < 100


def test_at_a_regular_exit_and_at_an_exception_the_last_records_still_reach_the_logger() -> None:
    code, out, err = run(
        """
Devices.of = lambda self, x: slots
monitor = fastent.SpectralEntropyMonitor(on_record=lambda record: print(record.step, record.status.value))
for step in range(3): monitor.observe(step, h, layer="a")
assert monitor.history == [] and monitor.pending == 3
threading.Timer(0.2, streams.tick).start()
raise ArithmeticError("training failed")
"""
    )
    assert code == 1
    assert out.split("\n")[:3] == ["0 ok", "1 ok", "2 ok"]
    assert err.count("Traceback") == 1
    assert err.rstrip().endswith("ArithmeticError: training failed")


@pytest.mark.parametrize(("name", "code"), [("SIGKILL", -9), ("SIGINT", 1)])
def test_a_process_that_waits_for_a_dead_device_can_be_killed(name: str, code: int) -> None:
    process = start(
        """
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
process.EXIT_SECONDS = 0.3
evaluations = DeferredEntropy(capacity=1, on_full="block", device_of=lambda x: slots)
ask(evaluations, 0)
print("waiting")
try:
    evaluations.open(1)
except KeyboardInterrupt:
    sys.exit(1)
"""
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        time.sleep(0.2)
        process.send_signal(signal.Signals[name])
        assert process.wait(timeout=60) == code
    finally:
        process.kill()
        process.communicate()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="os.fork does not exist here")
def test_a_forked_child_is_told_to_make_its_own_and_ends_while_the_parent_goes_on() -> None:
    code, out, err = run(
        """
evaluations = DeferredEntropy(device_of=lambda x: slots)
idle = DeferredEntropy(device_of=lambda x: host)
ask(evaluations, 0)
child = os.fork()
if child == 0:
    for call in (lambda: evaluations.open(1), lambda: evaluations.flush(), lambda: list(evaluations.arrived())):
        try:
            call()
        except RuntimeError as error:
            assert "a forked process has no copy of it" in str(error), error
        else:
            os._exit(3)
    ask(idle, 0)  # had no worker yet: this process starts its own
    idle.close()
    assert [step for step, _ in idle.arrived()] == [0]
    del evaluations, idle
    sys.exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
streams.tick(); evaluations.flush()
print([step for step, _ in evaluations.arrived()])
evaluations.close()
"""
    )
    assert (code, out.strip()) == (0, "[0]"), err


def test_training_is_the_same_to_the_bit_beside_the_worker_with_several_threads() -> None:
    code, out, err = run(
        """
from torch import nn
def train(watch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Dropout(0.1), nn.Linear(128, 64))
    optimizer = torch.optim.AdamW(model.parameters())
    probe = torch.ones(300, 64).cumsum(0).sin()
    monitor = fastent.SpectralEntropyMonitor(model, probe, ["1", "3"], every=1) if watch else None
    for step in range(8):
        x = torch.randn(256, 64)
        if monitor: monitor.step(step)
        optimizer.zero_grad()
        (model(x) - x).square().mean().backward()
        optimizer.step()
    if monitor:
        monitor.close()
        assert len(monitor.history) == 16
    return [p.detach().clone() for p in model.parameters()], torch.get_rng_state(), torch.get_num_threads()
without = train(False)
Devices.of = lambda self, x: host
beside = train(True)
again = train(False)
for other in (beside, again):
    assert all(torch.equal(a, b) for a, b in zip(without[0], other[0]))
    assert torch.equal(without[1], other[1]) and without[2] == other[2] == 2
print("same")
""",
        threads=2,
    )
    assert (code, out.strip()) == (0, "same"), err
