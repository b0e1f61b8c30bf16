"""The captured step, with a stand-in for CUDA graphs that replays the same operations on the same tensors.

What a CUDA graph cannot do, the stand-in cannot either: it knows nothing of Python's numbers that change from step
to step, reads every tensor where it lay during the capture, and refuses to record what the host would have to read.
"""

from dataclasses import replace

import pytest
import torch
from test_stack import IDS, TINY, VARIANTS, equal, train
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastent.grokking.train import stack
from fastent.grokking.train.conditions import HeldLogits, HeldNorm, InTurn, Mixing
from fastent.grokking.train.stack import Stack
from fastent.grokking.train.stacked import add_in_order
from fastent.grokking.train.tasks import batch_index, batch_indices

READ_ON_THE_HOST = {"_local_scalar_dense", "nonzero", "item", "equal", "is_nonzero"}


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in READ_ON_THE_HOST, f"{name} would stop the host and end the capture"
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result

    def replay(self):
        for function, args, kwargs, result in self.calls:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def record(function, state):
    """Capture as `stack.capture_cuda_graph` does: launches first, whose traces are wiped out, then the recording."""
    saved = [tensor.clone() for tensor in state]
    function()
    with Recorder() as recorder:
        result = function()
    for tensor, before in zip(state, saved, strict=True):
        tensor.copy_(before)
    return recorder.replay, result


def held(seed, step):
    return (20.0 + seed + 0.01 * step,)


CONDITIONS = {
    "baseline": None,
    "scale and norm": InTurn(
        [
            HeldLogits(lambda seed, step: (1 + 0.1 * seed + 0.01 * step,)),
            HeldNorm(lambda seed, step: (10.0 + seed,)),
        ]
    ),
    "mixing": Mixing(0.1, "losses"),
    "norm": HeldNorm(held),
    "both": InTurn([Mixing(0.1, "logits"), HeldNorm(held)]),
}


def pair(config, condition=None, **options):
    return [
        Stack(config, [4, 5, 6], condition=condition, together=True, capture=capture, **options)
        for capture in (record, None)
    ]


@pytest.mark.parametrize("config", VARIANTS, ids=IDS)
def test_a_captured_step_is_the_step_bit_for_bit(config, monkeypatch):
    monkeypatch.setattr(stack, "WINDOW", 7)  # 40 steps need several windows, the last one not whole
    graphed, eager = pair(config)
    assert torch.equal(train(graphed, 40), train(eager, 40))
    assert all(equal(graphed.state_dict(seed), eager.state_dict(seed)) for seed in (4, 5, 6))
    assert equal(graphed.evaluate(), eager.evaluate())


@pytest.mark.parametrize("condition", CONDITIONS.values(), ids=CONDITIONS)
def test_a_condition_is_captured_with_the_step(condition, monkeypatch):
    monkeypatch.setattr(stack, "WINDOW", 7)
    graphed, eager = pair(TINY, condition)
    assert torch.equal(train(graphed, 20), train(eager, 20))
    assert equal(graphed.state_dict(5), eager.state_dict(5))


def test_a_captured_stack_goes_on_from_a_checkpoint_and_after_seeds_have_left(monkeypatch):
    monkeypatch.setattr(stack, "WINDOW", 7)
    graphed, eager = pair(TINY)
    train(eager, 10)
    train(graphed, 3)
    for seed in (4, 5, 6):
        graphed.load_state_dict(seed, eager.state_dict(seed))
    assert torch.equal(train(graphed, 5), train(eager, 5))
    for pair_of in (graphed, eager):
        pair_of.keep([4, 6])
    assert torch.equal(train(graphed, 5), train(eager, 5))
    assert all(equal(graphed.state_dict(seed), eager.state_dict(seed)) for seed in (4, 6))


def test_losses_of_a_step_are_not_overwritten_by_the_next():
    graphed, _ = pair(TINY)
    first = graphed.train_step()
    before = first.clone()
    graphed.train_step()
    assert torch.equal(first, before)


def test_the_recorder_refuses_a_step_that_reads_on_the_host():
    with pytest.raises(AssertionError, match="_local_scalar_dense"):
        record(lambda: torch.ones(3) * float(torch.ones(3).sum()), [])


@pytest.mark.parametrize("sampling", ["epochs", "replacement"])
@pytest.mark.parametrize(("first", "steps"), [(0, 1), (0, 40), (17, 9), (1000, 30)])
def test_batches_prepared_together_are_those_of_each_step(first, steps, sampling):
    seeds, n_train, size = (3, 8), 85, 48
    prepared = batch_indices(seeds, first, steps, n_train, size, sampling, torch.device("cpu"))
    assert prepared.shape == (steps, 2, size)
    for k in range(steps):
        for s, seed in enumerate(seeds):
            assert prepared[k, s].tolist() == batch_index(seed, first + k, n_train, size, sampling).tolist()


@pytest.mark.parametrize("shape", [(), (5,)])
def test_adding_in_order_is_scattering(shape):
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(3, 7, *shape, dtype=torch.float64, generator=generator)
    index = torch.randint(7, (3, 50), generator=generator)
    values = torch.randn(3, 50, *shape, dtype=torch.float64, generator=generator)
    expected = table.clone()
    for g in range(3):
        for n in range(50):
            expected[g, index[g, n]] += values[g, n]
    add_in_order(table, index, values)
    assert torch.allclose(table, expected, rtol=0, atol=1e-13)


@pytest.mark.gpu
@pytest.mark.parametrize("config", VARIANTS, ids=IDS)
def test_on_a_gpu_the_graph_repeats_its_own_bits_and_follows_the_cpu(config):
    first, second = (Stack(config, [4, 5, 6], device="cuda", dtype=torch.float64) for _ in range(2))
    eager = Stack(config, [4, 5, 6], dtype=torch.float64, together=True)
    losses, again, expected = (train(stack, 300).cpu() for stack in (first, second, eager))
    assert torch.equal(losses, again)
    assert ((losses - expected).abs() / expected).max() < 1e-10


def test_the_window_does_not_change_what_is_computed(monkeypatch):
    monkeypatch.setattr(stack, "WINDOW", 3)
    short, _ = pair(replace(TINY, batch_size=100))
    losses = train(short, 10)
    monkeypatch.setattr(stack, "WINDOW", 64)
    long, _ = pair(replace(TINY, batch_size=100))
    assert torch.equal(losses, train(long, 10))
