"""Row 8 of the faults: two processes on one run folder."""

import os
import signal
import socket

import pytest
from toy_stack import contents
from victims import Stuck, train_toy, wait_for

from fastent.grokking.train.storage import RunLocked


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
