"""Processes that train the toy job as the command line does, for harm to be done to them."""

import os
import sys
import time
import traceback
from pathlib import Path

import torch
from toy_stack import CHECKPOINT_EVERY, JOB, ToyStack

from fastent.grokking.train import loop
from fastent.grokking.train.loop import train
from fastent.grokking.train.storage import Interrupted, RunError, StopRequest


class Slow(ToyStack):
    def train_step(self):
        time.sleep(0.02)
        return super().train_step()


class Stuck(ToyStack):
    """Tells by a file that it is in a step that takes long."""

    def train_step(self):
        Path("stuck").touch()
        time.sleep(60)


def train_toy(out, stack=ToyStack, observers=()):
    """Train the toy job; exit with the status of the command line, the message left in the file ``error``."""
    os.chdir(Path(out).parent)
    torch.set_num_threads(1)
    loop.stack_kind = lambda config: stack
    try:
        with StopRequest() as stop:
            train(JOB, Path(out), checkpoint_every=CHECKPOINT_EVERY, stop=stop, observers=observers)
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


def answer(connection, function, arguments):
    """Send what a function returns, or the traceback of its error."""
    os.fsync = lambda descriptor: None  # a test cannot cut the power, and a thousand syncs take their time
    try:
        connection.send((function(*arguments), ""))
    except BaseException:
        connection.send((None, traceback.format_exc()))
