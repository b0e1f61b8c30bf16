"""One small network that groks, trained inside the session and followed closely, for the statements about training."""

import dataclasses

import pytest

from fastent.grokking.mathematics.runs import follow
from fastent.grokking.mathematics.table import SMALL, SMALL_STEPS
from fastent.grokking.train.stack import Stack


@pytest.fixture(scope="session")
def small_run():
    """Addition mod 23 by a Transformer of width 32, from the start to beyond grokking."""
    run = follow(SMALL, 0, max_steps=SMALL_STEPS, measure_every=20)
    assert run.evaluations[-1]["test_accuracy"] > 0.9
    return run


@pytest.fixture(scope="session", params=["transformer", "transformer, gelu", "mlp"])
def trained(request):
    """A stack of one seed after 200 steps, memorising; its architecture by name."""
    changes = {
        "transformer": {},
        "transformer, gelu": {"activation": "gelu"},
        "mlp": {"model": "mlp", "hidden": (64, 32)},
    }[request.param]
    stack = Stack(dataclasses.replace(SMALL, **changes), [0])
    for _ in range(200):
        stack.train_step()
    return request.param, stack
