"""Row 8 of the faults: two processes on one run folder."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess

import pytest
from toy_stack import JOB, contents
from victims import Slow, Stuck, train_toy, wait_for

from fastent.grokking.train.storage import Process, RunLocked


def test_a_second_process_on_a_run_refuses_and_names_the_first_and_the_killed_first_is_no_obstacle(
    start, toy, tmp_path, uninterrupted, figure
):
    out = tmp_path / "out"
    process = start(train_toy, out, Stuck)
    wait_for(process, (tmp_path / "stuck").exists)
    with pytest.raises(RunLocked, match=rf"in use by process {process.pid} on host {socket.gethostname()}"):
        toy(out)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    toy(out)
    assert contents(out) == uninterrupted
    figure(8, "a second process while the first has the folder, and one after it was killed", 2, 2)


def train_without_flock(out):
    """Train where the file system has no locks."""

    def no_locks(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    fcntl.flock = no_locks
    train_toy(out)


@pytest.mark.filterwarnings("ignore::fastent.grokking.train.storage.RunWarning")
@pytest.mark.parametrize(
    "target",
    [
        pytest.param(train_toy, marks=pytest.mark.nightly, id="flock"),
        pytest.param(train_without_flock, id="no flock"),
    ],
)
def test_a_stale_lock_is_no_obstacle_and_one_that_may_be_held_is_one_without_flock(
    start, toy, half, uninterrupted, figure, target
):
    here = vars(Process.here())
    with subprocess.Popen(["true"]) as gone:
        pass
    locks = {
        "dead pid": ({**here, "pid": gone.pid}, True),
        "reused pid": ({**here, "started": here["started"] - 1}, True),
        "of before a restart": ({**here, "boot": "another"}, True),
        "of nobody": ({}, True),
        "living": (here, False),
        "another host": ({"pid": 1, "host": "elsewhere"}, False),
    }
    for name, (content, stale) in locks.items():
        out = half(27, name)
        lock = out / JOB.run_name(2) / "lock"
        lock.write_text(json.dumps(content))
        process = start(target, out)
        process.join()
        if stale or target is train_toy:  # a lock that nobody holds is stale, whatever it says
            assert process.exitcode == 0, name
        else:
            assert process.exitcode == 1, name
            assert (
                f"in use by process {content['pid']} on host {content['host']}"
                in (out.parent / "error").read_text()
            )
            lock.unlink()
            toy(out)
        assert contents(out) == uninterrupted, name
    where = "with flock" if target is train_toy else "without flock"
    figure(8, f"a lock that is there: {', '.join(locks)}; {where}", len(locks), len(locks))


@pytest.mark.nightly
def test_of_two_processes_that_start_at_once_one_trains_and_the_other_refuses_or_finds_it_done(
    start, tmp_path, uninterrupted, figure
):
    refused = 0
    for number in range(20):
        folder = tmp_path / str(number)
        folder.mkdir()
        both = [start(train_toy, folder / "out", Slow) for _ in range(2)]
        for process in both:
            process.join()
        statuses = sorted(process.exitcode for process in both)
        assert statuses in ([0, 1], [0, 0])
        if statuses == [0, 1]:
            refused += 1
            assert "in use by process" in (folder / "error").read_text()
        assert contents(folder / "out") == uninterrupted
    assert refused
    figure(8, "two processes that start at once", 20, 20)
