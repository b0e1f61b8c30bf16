"""The training batch in place of a probe: what counts, when hooks are there, and that training does not notice."""

import copy
import gc
import io
import json
import pickle
import random
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fastent import Moments, Status, spectral_entropy
from fastent.monitor.monitor import SpectralEntropyMonitor
from fastent.records import EntropyRecord

Monitor = SpectralEntropyMonitor


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(7)


def batch(n: int = 48, seed: int = 0) -> Tensor:
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.25), nn.Linear(8, 4))


class Taken:
    """What a layer gave in its passes in training mode, by a hook of the test's own."""

    def __init__(self, module: nn.Module) -> None:
        self.last: list[Tensor] = []
        module.register_forward_hook(lambda module, args, output: self.last.append(output.detach().clone()))

    def __call__(self) -> Tensor:
        h = torch.cat(self.last)
        self.last.clear()
        return h


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def train(model: nn.Module, *batches: Tensor) -> None:
    for x in batches:
        model(x).square().sum().backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p -= 0.01 * p.grad
                p.grad = None


def same(record: EntropyRecord, h: Tensor, **rows: Any) -> bool:
    expected = EntropyRecord.of(record.step, record.layer, spectral_entropy(h, **rows), None, record.mask)
    return record == expected


# The number


@pytest.mark.parametrize("n", [48, 5, 8, 100])
def test_one_batch_has_the_bits_of_the_entropy_of_its_activation(n: int) -> None:
    model = network()
    taken = {"1": Taken(model[1]), "2": Taken(model[2])}
    monitor = Monitor(model, "batch", ["2", "1"], every=2)
    for step in range(5):
        train(model, batch(n, step))
        records = monitor.step(step)
        activations = {layer: take() for layer, take in taken.items()}
        assert [record.layer for record in records] == ([] if step % 2 else ["2", "1"])
        assert all(same(record, activations[record.layer]) for record in records)
    assert [record.step for record in monitor.history] == [0, 0, 2, 2, 4, 4]


def test_micro_batches_are_merged_exactly() -> None:
    model = network()
    taken = Taken(model[1])
    monitor = Monitor(model, "batch", "1", every=3)
    for step in range(7):
        train(model, *(batch(20, 10 * step + i) for i in range(3)))
        records = monitor.step(step)
        h = taken()
        assert [record.step for record in records] == ([] if step % 3 else [step])
        for record in records:
            parts = Moments().update(h[:20]).update(h[20:40]).update(h[40:])
            assert record.n == 60
            assert record.normalized == pytest.approx(spectral_entropy(h).normalized, abs=1e-14)
            assert record.normalized == pytest.approx(parts.spectral_entropy().normalized, abs=1e-14)


def test_micro_batches_that_stay_below_the_features_have_the_bits_of_their_rows_together() -> None:
    model = network()
    taken = Taken(model[1])
    monitor = Monitor(model, "batch", "1", every=1)
    train(model, *(batch(2, i) for i in range(3)))
    (record,) = monitor.step(0)
    assert same(record, taken())
    train(model, *(batch(2, i) for i in range(6)))
    (record,) = monitor.step(1)
    assert record.n == 12
    assert record.normalized == pytest.approx(spectral_entropy(taken()).normalized, abs=1e-14)


def test_several_calls_for_the_first_time_put_the_evaluation_off_to_the_next_step() -> None:
    model = network()
    monitor = Monitor(model, "batch", "1", every=4)
    counts = {0: 1, 4: 2, 5: 2, 8: 2, 12: 1}
    for step in range(14):
        train(model, *(batch(20, i) for i in range(counts.get(step, 1))))
        monitor.step(step)
    assert [(record.step, record.n) for record in monitor.history] == [(0, 20), (5, 40), (8, 40), (12, 20)]


# Hooks and training


def test_hooks_are_there_for_due_steps_only_and_no_pass_is_added() -> None:
    model = network()
    passes = []
    model.register_forward_pre_hook(lambda module, args: passes.append(len(args)))
    before = hooks(model)
    monitor = Monitor(model, "batch", "1", every=4)
    armed = []
    for step in range(9):
        armed.append(hooks(model) > before)
        train(model, batch())
        monitor.step(step)
    # Before the second step nobody knows how far the steps go; after a record they notice a step that goes on.
    assert armed == [True, True, False, False, True, True, False, False, True]
    assert len(passes) == 9
    assert len(monitor.history) == 3
    monitor.close()
    assert hooks(model) == before


def test_training_is_the_same_to_the_bit() -> None:
    def run(watched: bool) -> tuple[bytes, Any]:
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.25), nn.Linear(8, 4))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        monitor = Monitor(model, "batch", ["1", "2", ""], every=2) if watched else None
        for step in range(6):
            for i in range(2):
                model(batch(20, 10 * step + i)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if monitor is not None:
                monitor.step(step)
        assert monitor is None or len(monitor.history) == 9
        kept = io.BytesIO()
        if monitor is not None:
            monitor.close()
        torch.save((model.state_dict(), optimizer.state_dict()), kept)
        legacy = np.random.get_state()[1].tolist()  # noqa: NPY002
        return kept.getvalue(), (torch.get_rng_state().tolist(), random.getstate(), legacy)

    assert run(True) == run(False)


def test_steps_that_go_on_otherwise_than_before_make_the_next_one_due() -> None:
    model = network()
    monitor = Monitor(model, "batch", "1", every=10)
    told = [0, 1, 2, 3, 12, 13, 14, 20, 21, 22, 30, 38, 46, 54]
    for step in told:
        train(model, batch())
        monitor.step(step)
    assert [record.step for record in monitor.history] == [0, 13, 21, 38, 46, 54]


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("every", [1, 3])
def test_a_step_told_of_after_each_micro_batch_is_warned_of_once_and_its_record_is_the_first_ones(
    first: int, every: int
) -> None:
    model = network()
    monitor = Monitor(model, "batch", "1", every=every)
    if first:  # as with a fixed probe
        with pytest.warns(UserWarning, match="nothing to record at step 0"):
            monitor.step(0)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for step in range(first, 8):
            for i in range(3):
                train(model, batch(20, i))
                monitor.step(step)
    (warning,) = said
    assert f"step {first} was told of again after" in str(warning.message)
    assert "Call step once for each optimizer step" in str(warning.message)
    assert {record.n for record in monitor.history} == {20}


def test_accumulation_that_begins_late_is_noticed_and_a_repeated_step_without_training_is_not() -> None:
    model = network()
    monitor = Monitor(model, "batch", "1", every=3)
    other = Monitor(model, batch(30), "1", every=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(9):
            train(model, batch(20), batch(20, 1))
            monitor.step(step)
            other.step(step)
            model.eval()
            model(batch(100))  # a validation, after which a host tells of its step again
            model.train()
            monitor.step(step)
    train(model, batch(20))
    monitor.step(9)
    train(model, batch(20))
    with pytest.warns(UserWarning, match="step 9 was told of again after further passes"):
        monitor.step(9)
    assert hooks(model) == 0


def test_a_layer_that_is_replaced_is_followed_to_its_place() -> None:
    model = network()
    monitor = Monitor(model, "batch", ["0", "3:input"], every=2)
    for step in range(7):
        if step in (0, 4, 5):
            model[0], model[3] = nn.Linear(6, 8), nn.Linear(8, 4)
        taken = [Taken(model[0]), Taken(model[2])]
        train(model, batch(20, step))
        records = monitor.step(step)
        assert len(records) == (0 if step % 2 else 2)
        assert all(same(record, take()) for record, take in zip(records, taken, strict=False))
    monitor.close()
    assert not model[0]._forward_pre_hooks
    assert not model[3]._forward_pre_hooks


@pytest.mark.parametrize("probe", ["fixed", "batch"])
def test_a_layer_that_left_the_model_is_named_with_the_remedy(probe: str) -> None:
    model = network()
    monitor = Monitor(model, batch() if probe == "fixed" else "batch", "3", every=1)
    del model[3]
    train(model, batch())
    with pytest.raises(ValueError, match=r"layer '3' is not in the model any more, .* make a new one"):
        monitor.step(0)


def test_a_layer_replaced_by_a_compiled_one_is_refused_at_the_step() -> None:
    model = network()
    monitor = Monitor(model, "batch", "1", every=1)
    model[1] = nn.Tanh()
    model[1]._compiled_call_impl = model[1]._call_impl  # as Module.compile has it, without its compiler
    train(model, batch())
    with pytest.raises(ValueError, match="layer '1' is in a compiled graph"):
        monitor.step(0)


def test_nothing_is_left_when_the_monitor_is_gone() -> None:
    model = network()
    monitor = Monitor(model, "batch", "1", every=1)
    assert hooks(model)
    del monitor
    gc.collect()
    assert hooks(model) == 0
    with Monitor(model, "batch", "1", every=1):
        assert hooks(model)
    assert hooks(model) == 0


# What counts


def test_evaluation_in_between_does_not_count() -> None:
    model = network()
    monitor = Monitor(model, "batch", "1", every=1)
    other = Monitor(model, batch(30), "1", every=1)
    train(model, batch(20))
    other.step(0)
    model.eval()
    model(batch(100))
    with torch.no_grad():
        model(batch(101))
    model.train()
    with torch.no_grad():
        model(batch(102))
    with torch.inference_mode():
        model(batch(103))
    (record,) = monitor.step(0)
    assert record.n == 20


class Checkpointed(nn.Module):
    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = network(), reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_layer_that_checkpointing_runs_twice_counts_once(reentrant: bool) -> None:
    model = Checkpointed(reentrant=reentrant)
    monitor = Monitor(model, "batch", ["inner.1", "inner"], every=1)
    for step, count in enumerate([1, 2, 2]):
        train(model, *(batch(20, i).requires_grad_() for i in range(count)))
        records = monitor.step(step)
        assert [record.n for record in records] == ([] if step == 1 else [20 * count] * 2)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("root", [False, True])
def test_checkpointing_of_the_whole_model_or_of_layers_called_past_it_counts_once(
    reentrant: bool, root: bool
) -> None:
    model = network()
    monitor = Monitor(model, "batch", "1", every=1)

    def past(x: Tensor) -> Tensor:
        return model[3](model[1](model[0](x)))

    for step, count in enumerate([1, 2, 2]):
        for i in range(count):
            x = batch(20, i).requires_grad_()
            checkpoint(model if root else past, x, use_reentrant=reentrant).sum().backward()
        records = monitor.step(step)
        assert [record.n for record in records] == ([] if step == 1 else [20 * count])


def test_a_frozen_layer_and_one_that_runs_without_gradients_count() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = network().requires_grad_(False), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                h = self.body(x)
            return self.head(h)

    model = Frozen()
    model.body.eval()
    monitor = Monitor(model, "batch", "body.1")
    train(model, batch())
    (record,) = monitor.step(0)
    assert same(record, model.body[:2](batch()).detach())


def test_a_layer_called_several_times_in_a_pass_gives_the_rows_of_all_calls() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.cell(self.cell(x)))

    model = Shared()
    taken = Taken(model.cell)
    monitor = Monitor(model, "batch", "cell")
    train(model, batch(20))
    (record,) = monitor.step(0)
    assert record.n == 40
    assert record.normalized == pytest.approx(spectral_entropy(taken()).normalized, abs=1e-14)


def test_layers_called_past_the_models_own_forward_count() -> None:
    model = network()
    monitor = Monitor(model, "batch", "1")
    h = model[1](model[0](batch()))
    h.sum().backward()
    (record,) = monitor.step(0)
    assert same(record, h.detach())


def test_what_autocast_gives_is_measured_as_it_is() -> None:
    model = network()
    taken = Taken(model[3])
    monitor = Monitor(model, "batch", "3", every=1)
    for step in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(batch()).square().sum()
        loss.backward()
        (record,) = monitor.step(step)
        h = taken()
        assert h.dtype == torch.bfloat16
        assert same(record, h)


def test_inputs_of_layers_and_of_the_model_are_taken() -> None:
    model = network()
    monitor = Monitor(model, "batch", ["3:input", ":input"])
    taken = Taken(model[2])
    train(model, batch())
    first, second = monitor.step(0)
    assert same(first, taken())
    assert same(second, batch())


# Rows


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.head(self.embed(input_ids))


def ids(n: int, tokens: int) -> Tensor:
    return torch.randint(11, (n, tokens))


def test_padding_is_left_out_by_the_mask_of_each_batch() -> None:
    model = Tokens()
    taken = Taken(model.embed)
    monitor = Monitor(model, "batch", "embed", every=1, tokens="flatten")
    for step, n in enumerate([12, 9]):
        mask = (torch.arange(5) < torch.randint(2, 6, (n, 1))).long()
        model(ids(n, 5), attention_mask=mask).sum().backward()
        (record,) = monitor.step(step)
        assert record.mask == "attention_mask"
        assert record.n == int(mask.sum())
        assert same(record, taken(), tokens="flatten", mask=mask)


def test_a_mask_that_a_pass_does_not_have_is_an_error_of_the_step() -> None:
    model = Tokens()
    monitor = Monitor(model, "batch", "embed", every=1, tokens="flatten", mask="real")
    model(ids(3, 5)).sum().backward()
    with pytest.raises(ValueError, match="the batch has no tensor 'real'"):
        monitor.step(0)
    model(ids(3, 5)).sum().backward()
    with pytest.raises(ValueError, match="the batch has no tensor 'real'"):
        monitor.step(1)


def test_a_batch_of_one_has_too_few_rows_and_micro_batches_of_one_add_up() -> None:
    model = network()
    monitor = Monitor(model, "batch", "1", every=1)
    train(model, batch(1))
    assert [(r.status, r.n) for r in monitor.step(0)] == [(Status.TOO_FEW_ROWS, 1)]
    train(model, *(batch(1, i) for i in range(20)))
    assert [(r.status, r.n) for r in monitor.step(1)] == [(Status.OK, 20)]


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.TransformerEncoderLayer(8, 2, 8, batch_first=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


@pytest.mark.parametrize("past", [False, True])
def test_a_layer_with_tokens_first_is_refused_also_where_it_is_called_past_the_model(past: bool) -> None:
    model = Encoder()
    monitor = Monitor(model, "batch", "body", tokens="last")
    x = torch.randn(5, 5, 8)
    (model.body(x) if past else model(x)).sum().backward()
    with pytest.raises(ValueError, match="batch_first=False: give samples_axis=1"):
        monitor.step(0)


def test_a_layer_called_past_the_model_has_no_mask_and_that_is_said() -> None:
    model = Tokens()
    monitor = Monitor(model, "batch", "embed", every=1, tokens="flatten")
    with pytest.warns(UserWarning, match="padding, if there is any, counts as tokens"):
        model.embed(ids(3, 5)).sum().backward()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.embed(ids(3, 5)).sum().backward()
    assert [record.n for record in monitor.step(0)] == [30]
    assert caught == []  # said at the first of them
    named = Monitor(model, "batch", "embed", tokens="flatten", mask="attention_mask")
    model.embed(ids(3, 5)).sum().backward()
    with pytest.raises(ValueError, match="called past the forward pass of the model, which has no mask"):
        named.step(0)


# What goes wrong


def test_a_failing_pass_makes_the_next_step_due() -> None:
    model = network()
    monitor = Monitor(model, "batch", "1", every=10)
    for step in range(3):
        with pytest.raises(RuntimeError) if step == 0 else nullcontext():
            train(model, batch(20)[:, :5] if step == 0 else batch(20))
        if step == 0:
            with pytest.raises(RuntimeError):
                model[0](model[1](model[0](batch(20))))
            train(model, batch(20))
        monitor.step(step)
    assert [record.step for record in monitor.history] == [1]


def test_an_error_in_a_hook_is_raised_by_step_and_not_in_training() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Unflatten(1, (2, 4)), nn.Flatten(), nn.Linear(8, 2))
    monitor = Monitor(model, "batch", "1", every=1)
    train(model, batch())
    with pytest.raises(ValueError, match=r"layer '1' on the training batch: h must have shape") as caught:
        monitor.step(0)
    assert "before step 0" in caught.value.__notes__[0]
    recorded = Monitor(model, "batch", "1", every=1, on_error="record")
    train(model, batch())
    with pytest.warns(RuntimeWarning, match="recorded as failed"):
        assert recorded.step(0)[0].status is Status.FAILED


def test_a_step_without_a_pass_is_warned_of_once_and_the_next_is_due() -> None:
    model = network()
    monitor = Monitor(model, "batch", "1", every=10)
    with pytest.warns(
        UserWarning, match=r"nothing to record at step 0, .*: no forward pass of the model was seen"
    ):
        assert monitor.step(0) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert monitor.step(1) == []
    train(model, batch())
    assert [record.step for record in monitor.step(2)] == [2]
    train(model, batch())
    assert monitor.step(3) == []


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("eval", r"the model was in eval mode in each .*: call model\.train\(\)"),
        ("no_grad", r"without gradients \(torch\.no_grad, inference_mode\)"),
        ("unwatched", "no forward pass of the model was seen"),
        ("failed", "did not come to its end"),
    ],
)
@pytest.mark.parametrize("past", [False, True])
def test_a_step_without_anything_says_what_was_wrong_with_the_passes(
    wrong: str, said: str, past: bool
) -> None:
    model = network()
    monitor = Monitor(model, "batch", ["0", "1"], every=1)
    model.train(wrong != "eval")
    used = copy.deepcopy(model) if wrong == "unwatched" else model
    with torch.set_grad_enabled(wrong != "no_grad"):
        if wrong == "failed":
            with pytest.raises(RuntimeError):
                model(batch()[:, :5])
        else:
            (used[1](used[0](batch())) if past else used(batch())).sum()
    with pytest.warns(UserWarning, match=said) as warned:
        assert monitor.step(0) == []
    assert len(warned) == 1


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.both = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](x)
        return self.blocks[1](x) if self.both else x


def test_a_named_layer_must_run_at_first_and_is_idle_later() -> None:
    model = Optional()
    named = Monitor(model, "batch", ["blocks.0", "blocks.1"], every=1)
    model(batch()).sum().backward()
    with pytest.raises(RuntimeError, match=r"layer 'blocks.1' did not run in the forward pass of training"):
        named.step(0)
    unused = Monitor(model, "batch", "blocks.1", every=1)
    model(batch()).sum().backward()
    with pytest.raises(RuntimeError, match=r"layer 'blocks.1' did not run in the forward pass of training"):
        unused.step(0)
    model.both = True
    model(batch()).sum().backward()
    assert [record.status for record in unused.step(1)] == [Status.OK]
    model.both = False
    model(batch()).sum().backward()
    assert [record.status for record in unused.step(2)] == [Status.NOT_RUN]
    by_pattern = Monitor(model, "batch", "blocks", every=1)
    for step, both in enumerate([False, True, False]):
        model.both = both
        model(batch()).sum().backward()
        with pytest.warns(UserWarning, match="'blocks.1' did not run") if step == 0 else nullcontext():
            records = by_pattern.step(step)
        statuses = (
            [Status.OK, Status.OK] if both else [Status.OK] if step == 0 else [Status.OK, Status.NOT_RUN]
        )
        assert [record.status for record in records] == statuses


@pytest.mark.parametrize(
    "arguments",
    [
        {"model": None, "layers": "1"},
        {"layers": None},
        {"layers": lambda model, probe: probe},
        {"probe": "Batch"},
        {"layers": "nothing"},
    ],
)
def test_bad_arguments_are_refused_with_the_remedy(arguments: dict[str, Any]) -> None:
    with pytest.raises(
        (TypeError, ValueError), match=r"fixed probe|needs a model and layers|probe must be|no layer matches"
    ):
        Monitor(**{"model": network(), "probe": "batch", "layers": "1", **arguments})


def test_standard_error_needs_a_single_call() -> None:
    model = network()
    monitor = Monitor(model, "batch", "1", every=1, standard_error=True)
    train(model, batch())
    (record,) = monitor.step(0)
    assert record.standard_error is not None
    train(model, batch(), batch())
    with pytest.raises(ValueError, match="standard_error needs the activations"):
        monitor.step(1)


def test_the_clock_counts_the_steps_that_were_evaluated() -> None:
    model = network()
    monitor = Monitor(model, "batch", "1", every=10)
    for step in range(1, 32):  # armed at first, and the first step is not due
        train(model, batch(20))
        monitor.step(step)
    assert [record.step for record in monitor.history] == [10, 20, 30]
    assert monitor.cost.evaluations == 3
    assert monitor.cost.covariance > 0 < monitor.cost.eigenvalues


def test_a_pass_under_a_dispatch_mode_does_not_see_our_operations() -> None:
    seen: list[str] = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    model = network()

    def operations() -> list[str]:
        seen.clear()
        with Seen():
            train(model, batch())
        return list(seen)

    expected = operations()
    monitor = Monitor(model, "batch", ["1", "3"])
    assert operations() == expected
    assert len(monitor.step(0)) == 2


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_ddp_and_fsdp_are_watched_through_their_wrappers() -> None:
    from torch.distributed.fsdp import fully_shard

    for wrap in (nn.parallel.DistributedDataParallel, fully_shard):
        model = network()
        taken = Taken(model[1])
        wrapped = wrap(model)
        monitor = Monitor(wrapped, "batch", "1", every=1)
        assert not monitor.needs_every_rank
        for step in range(2):
            wrapped(batch(20, step)).sum().backward()
            (record,) = monitor.step(step)
            assert same(record, taken())


# Compiled models


class Affine(nn.Linear):  # torch.compile skips the code of torch's own modules, not of this one
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


def compiled(function: Callable[..., Any]) -> Any:
    return torch.compile(function, backend="eager")


def test_layers_in_a_compiled_graph_are_refused() -> None:
    whole = network()
    by_method = network()
    by_method.compile(backend="eager")
    part = network()
    part[1].compile(backend="eager")
    nested = nn.Sequential(compiled(network()), nn.Linear(4, 2))
    by_forward = nn.Sequential(network(), nn.Linear(4, 2))
    by_forward[0].forward = compiled(by_forward[0].forward)
    for model, layers in [
        (compiled(whole), "1"),
        (by_method, "1"),
        (by_method, ""),
        (part, "1"),
        (nested, "0.1"),
        (by_forward, "0.1"),
    ]:
        with pytest.raises(ValueError, match=r"is in a compiled graph, which runs no hooks: .* fixed probe"):
            Monitor(model, "batch", layers)
        assert hooks(model) == 0


def test_the_output_of_a_compiled_part_is_watched_outside_of_its_graph() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    part = nn.Sequential(nn.Linear(6, 8), nn.Tanh())
    model = nn.Sequential(torch.compile(part, backend=backend), nn.Linear(8, 2))
    monitor = Monitor(model, "batch", "0", every=2)
    for step in range(5):
        train(model, batch())
        monitor.step(step)
    assert [record.step for record in monitor.history] == [0, 2, 4]
    assert len(graphs) == 1


@pytest.mark.usefixtures("group")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo looks at it
def test_compiled_blocks_of_an_fsdp2_model_are_left_as_they_are() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    graphs = []
    for watched in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model, mesh = (
            nn.Sequential(Affine(6, 6), Affine(6, 6), nn.Linear(6, 4)),
            init_device_mesh("cpu", (1,)),
        )
        for block in model[:2]:
            block.compile(backend="eager")
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        monitor = Monitor(model, "batch", "2", every=2) if watched else None
        for step in range(4):
            train(model, batch())
            if monitor is not None:
                monitor.step(step)
        assert not torch._dynamo.utils.counters["graph_break"]
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert monitor is not None
    assert [record.step for record in monitor.history] == [0, 2]
    assert graphs[0] == graphs[1] > 0
    with pytest.raises(ValueError, match=r"'1' is in a compiled graph"):
        Monitor(model, "batch", "1")


def test_a_graph_compiled_from_a_wrapper_that_was_not_given_is_not_broken_and_that_is_said() -> None:
    torch._dynamo.reset()
    model = network()
    monitor = Monitor(model, "batch", "1", every=1)
    whole = torch.compile(model, backend="eager", fullgraph=True)
    whole(batch()).sum().backward()
    with pytest.warns(UserWarning, match="a compiled graph runs no hooks"):
        monitor.step(0)


# Copies and states


def test_copies_of_the_model_have_idle_hooks_and_do_not_drag_the_monitor_along() -> None:
    model = network()
    monitor = Monitor(model, "batch", "1", every=1)
    copies = [copy.deepcopy(model), copy.copy(model), pickle.loads(pickle.dumps(model))]
    train(model, batch(20))
    for other in copies:
        other.train()
        if other[1] is not model[1]:
            train(other, batch(100))
    assert [record.n for record in monitor.step(0)] == [20]


def test_a_copy_of_the_monitor_watches_its_own_copy_of_the_model() -> None:
    model = network()
    monitor = Monitor(model, "batch", "1", every=1)
    train(model, batch())
    monitor.step(0)
    twin = copy.deepcopy(monitor)
    train(model, batch())
    assert len(monitor.step(1)) == 1
    with pytest.warns(UserWarning, match="no forward pass"):
        assert twin.step(1) == []
    train(twin._watched.model, batch(30))
    assert [(record.step, record.n) for record in twin.step(2)] == [(2, 30)]
    assert len(pickle.loads(pickle.dumps(monitor)).history) == 2


def test_a_resumed_run_records_what_the_run_that_went_on_does() -> None:
    def run(steps: Iterable[int], model: nn.Module, monitor: Monitor) -> None:
        for step in steps:
            torch.manual_seed(step)
            train(model, batch(20, step))
            monitor.step(step)

    model = network()
    monitor = Monitor(model, "batch", "1", every=5)
    run(range(0, 18, 2), model, monitor)
    state, weights = json.loads(json.dumps(monitor.state_dict())), copy.deepcopy(model.state_dict())
    run(range(18, 40, 2), model, monitor)
    again = network()
    again.load_state_dict(weights)
    resumed = Monitor(again, "batch", "1", every=5)
    resumed.load_state_dict(state)
    run(range(18, 40, 2), again, resumed)
    assert resumed.history == monitor.history
    assert [record.step for record in monitor.history] == [0, 6, 10, 16, 20, 26, 30, 36]
    assert state["probe"] == "batch"
    with pytest.raises(ValueError, match="recorded with probe batch"):
        Monitor(model, batch(), "1").load_state_dict(state)


def test_the_first_step_after_going_back_closes_nothing_of_before() -> None:
    model = network()
    monitor = Monitor(model, "batch", "1", every=1)
    train(model, batch())
    monitor.step(0)
    state = monitor.state_dict()
    train(model, batch(20))
    monitor.load_state_dict(state)
    train(model, batch(30))
    assert [record.n for record in monitor.step(1)] == [30]
