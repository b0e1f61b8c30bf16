import multiprocessing
import os
import warnings

import pytest

pytest.importorskip("safetensors")
from toy_stack import CHECKPOINT_EVERY, JOB, ToyStack, contents

from fastent.grokking.train import loop
from fastent.grokking.train.loop import train
from fastent.grokking.train.storage import RunWarning


@pytest.fixture
def toy(monkeypatch):
    """`train` of a toy job, as a function of the folder."""
    monkeypatch.setattr(loop, "Stack", ToyStack)
    # A test cannot cut the power, and a thousand syncs take their time.
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)

    def run(out, job=JOB, **options):
        train(job, out, **{"checkpoint_every": CHECKPOINT_EVERY, **options})

    return run


@pytest.fixture
def uninterrupted(toy, tmp_path):
    """The files of the toy job when nothing goes wrong."""
    out = tmp_path / "uninterrupted"
    toy(out)
    return contents(out)


@pytest.fixture
def half(toy, tmp_path):
    """Make a folder of the toy job as a crash at a given step left it."""

    class Crash(BaseException):
        pass

    def make(step, name="half"):
        original = ToyStack.train_step

        class Crashing(ToyStack):
            def train_step(self):
                if self.steps_done == step:
                    raise Crash
                return original(self)

        out = tmp_path / name
        loop.Stack = Crashing
        with pytest.raises(Crash):
            toy(out)
        loop.Stack = ToyStack
        return out

    return make


@pytest.fixture(scope="session")
def processes():
    """Real processes that begin with everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fastent.grokking.train.sweep", "fastent.grokking.train.stack"])
    return context


@pytest.fixture
def warned():
    """Collect the texts of `RunWarning`s; others are errors as everywhere."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("error")
        warnings.simplefilter("always", RunWarning)
        yield lambda: [str(warning.message) for warning in caught]
