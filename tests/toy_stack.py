"""A stack with the interface of `fastent.grokking.train.stack.Stack` that costs microseconds a step.

Its arithmetic is chaotic and depends on which seeds share the stack, so that a resume which met another state, step
or stack would end with other bits. Seed k reaches test accuracy 1 at step 20 + 10 k.

Below it are the fixtures that train it, for the conftest.py of the folders whose tests do.
"""

import json
import multiprocessing
import os
import warnings

import pytest
import torch

from fastent.grokking.train import loop
from fastent.grokking.train.config import TrainConfig
from fastent.grokking.train.loop import train
from fastent.grokking.train.runs import Job
from fastent.grokking.train.storage import RunWarning, dump_json, read_object, read_rows, seal

CONFIG = TrainConfig(
    width=4, heads=1, evaluate_every=5, max_steps=60, run_past_steps=0, run_past_share=0.5, batch_size=1
)
JOB = Job("e1", "baseline", CONFIG, (0, 2, 1))
CHECKPOINT_EVERY = 10


class ToyStack:
    @staticmethod
    def shares_launches(device):
        return True

    def __init__(self, config, seeds, device="cpu", condition=None):
        assert condition is None
        self.seeds = tuple(seeds)
        self.steps_done = 0
        self.weights = {
            seed: torch.linspace(seed, seed + 1, 24, dtype=torch.float64).reshape(8, 3) for seed in seeds
        }

    def train_step(self):
        self.steps_done += 1
        for seed in self.seeds:
            self.weights[seed] = torch.frac(
                self.weights[seed] * 3.7 + self.steps_done + 0.01 * len(self.seeds)
            )
        return torch.zeros(len(self.seeds))

    def evaluate(self):
        means = torch.stack([self.weights[seed].mean() for seed in self.seeds])
        reached = torch.tensor(
            [self.steps_done >= 20 + 10 * seed for seed in self.seeds], dtype=torch.float64
        )
        known = torch.full_like(reached, float(self.steps_done >= 10))
        return {
            "train_loss": means,
            "train_accuracy": known,
            "test_loss": -means,
            "test_accuracy": reached,
            "parameter_norm": torch.stack([self.weights[seed].norm() for seed in self.seeds]),
        }

    def representations(self, which="probe"):
        return torch.stack([self.weights[seed] for seed in self.seeds])

    def state_dict(self, seed):
        return {"weights": self.weights[seed].clone(), "steps": torch.tensor(self.steps_done)}

    @staticmethod
    def misfits(config, state):
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        return [] if shapes == {"weights": (8, 3), "steps": ()} else [str(shapes)]

    def load_state_dict(self, seed, state):
        self.weights[seed] = state["weights"].clone()
        self.steps_done = int(state["steps"])

    def keep(self, seeds):
        self.seeds = tuple(seed for seed in self.seeds if seed in seeds)


def contents(out):
    """All files below `out` by name, with the bytes that an execution may not change: all but clocks and machine."""
    return {
        str(path.relative_to(out)): b""
        if path.name in ("timing.jsonl", "environment.json")
        else path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }


def without_checksums(run):
    """Make of a run's folder what it was before there were checksums."""
    for name in ("metrics.jsonl", "timing.jsonl"):
        rows = [row for row in read_rows(run / name, 0)[0] if row.get("event") != "end"]
        (run / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("config.json", "environment.json", "DONE"):
        if (run / name).exists():
            record = read_object(run / name) | {"schema_version": 1}
            for key in ("settings_sha256", "files"):
                record.pop(key, None)
            (run / name).write_bytes(dump_json(record))
    for path in run.glob("checkpoint-*.json"):
        record = read_object(path)
        record["state"].pop("metrics")
        path.write_bytes(seal(record))


@pytest.fixture
def toy(monkeypatch):
    """`train` of a toy job, as a function of the folder."""
    monkeypatch.setattr(loop, "stack_kind", lambda config: ToyStack)
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
        loop.stack_kind = lambda config: Crashing
        with pytest.raises(Crash):
            toy(out)
        loop.stack_kind = lambda config: ToyStack
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
