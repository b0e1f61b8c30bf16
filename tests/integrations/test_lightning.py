"""The callback in Lightning's own Trainer."""

import copy
import csv
import json
import os
import pickle
import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_device import FakeStreams
from torch import nn

import fastent
from fastent.monitor.deferred import Devices, Ring, TorchFormer

pytest.importorskip("lightning.pytorch")

import lightning.pytorch as pl
from lightning.pytorch import callbacks, loggers

from fastent.integrations.lightning import SpectralEntropyCallback

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        # Of torch 2.13, where Lightning's data fetcher uses what torch will give up.
        r".isinstance\(treespec, LeafSpec\). is deprecated:FutureWarning",
        # What the host says of runs as small as these.
        "You defined a `validation_step` but have no `val_dataloader`",
        "The '.*_dataloader' does not have many workers",
        "The number of training batches .* is smaller than the logging interval",
        "You're resuming from a checkpoint that ended before the epoch ended",
        "GPU available but not used",
    )
]

PROBE = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
ROWS = torch.randn(32, 6, generator=torch.Generator().manual_seed(2))


class Net(pl.LightningModule):
    """Random in each pass, with buffers that a pass changes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.Tanh(), nn.Linear(16, 4)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.net(batch[0]).square().mean()

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.net(batch[0]).square().mean())

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class Kept(loggers.Logger):
    """A logger that keeps what it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    name = version = "kept"

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, params: Any) -> None:
        pass

    def of(self, key: str) -> list[tuple[int, float]]:
        return [(step, row[key]) for step, row in self.rows if key in row]


class During(callbacks.Callback):
    """Calls a function with the Trainer and the module at a hook."""

    def __init__(self, hook: str, function: Any) -> None:
        setattr(self, hook, lambda trainer, module, *args: function(trainer, module))


def loader(batch_size: int = 8, shuffle: bool = False) -> torch.utils.data.DataLoader:
    data = torch.utils.data.TensorDataset(ROWS)
    return torch.utils.data.DataLoader(data, batch_size=batch_size, shuffle=shuffle)


def trainer(*own: Any, **options: Any) -> pl.Trainer:
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": any(isinstance(callback, callbacks.ModelCheckpoint) for callback in own),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return pl.Trainer(callbacks=list(own), **{"max_epochs": 1, "log_every_n_steps": 1, **quiet, **options})


def entropy(**options: Any) -> SpectralEntropyCallback:
    return SpectralEntropyCallback(**{"layers": "net.0", "probe": PROBE, "every": 2, **options})


def steps(callback: SpectralEntropyCallback) -> list[int]:
    assert callback.monitor is not None
    return [record.step for record in callback.monitor.history]


def values(callback: SpectralEntropyCallback) -> dict[tuple[int, str], float]:
    assert callback.monitor is not None
    return {(record.step, record.layer): record.normalized for record in callback.monitor.history}


def entropy_of(layer: nn.Module, probe: torch.Tensor = PROBE) -> float:
    with torch.no_grad():
        return fastent.spectral_entropy(layer(probe)).normalized


def hooks(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def test_a_record_is_logged_at_its_own_step_with_the_entropy_of_the_weights_after_so_many_batches() -> None:
    kept, net, expected = Kept(), Net(), {}
    first = During("on_train_start", lambda t, m: expected.update({0: entropy_of(m.net[0])}))
    later = During("on_train_batch_end", lambda t, m: expected.update({t.global_step: entropy_of(m.net[0])}))
    callback = entropy(layers=["net.0", ""])
    trainer(first, later, callback, logger=kept, log_every_n_steps=50).fit(net, loader())
    assert kept.of("entropy/net.0") == [(step, expected[step]) for step in (0, 2, 4)]
    assert [step for step, _ in kept.of("entropy")] == [0, 2, 4]  # the LightningModule itself
    assert kept.of("entropy/net.0") == [
        (step, value) for (step, layer), value in values(callback).items() if layer == "net.0"
    ]
    assert hooks(net) == 0


def test_callbacks_of_the_host_decide_on_the_entropy_of_the_weights_they_judge(tmp_path: Path) -> None:
    seen = []

    def look(t: pl.Trainer, m: pl.LightningModule) -> None:
        seen.append((t.callback_metrics["entropy/net.0"].item(), entropy_of(m.net[0])))

    stop = callbacks.EarlyStopping("entropy/net.0", stopping_threshold=1.0, patience=100)
    best = callbacks.ModelCheckpoint(tmp_path, monitor="entropy/net.0", filename="{step}", save_top_k=-1)
    rate = callbacks.LearningRateMonitor()
    t = trainer(
        stop, best, rate, entropy(), During("on_validation_end", look),
        logger=Kept(), max_epochs=3, val_check_interval=2,
    )  # fmt: skip
    t.fit(Net(), loader(), loader())
    assert stop.stopping_reason is callbacks.EarlyStopping("x").stopping_reason.__class__.STOPPING_THRESHOLD
    assert t.global_step == 2
    assert len(seen) == 1
    assert seen[0][0] == pytest.approx(seen[0][1], rel=1e-6)  # float32
    assert best.best_model_score.item() == seen[0][0]


def run(tmp_path: Path, *own: Any, resumed_from: str | None = None, **options: Any) -> tuple[Any, ...]:
    """Weights, optimizer and random states after a fit, the Trainer's checkpoint of them, and its logger."""
    pl.seed_everything(3, verbose=False)
    net, kept = Net(), Kept()
    t = trainer(*own, logger=kept, **options)
    t.fit(net, loader(shuffle=True), loader(), ckpt_path=resumed_from)
    path = str(tmp_path / f"{len(list(tmp_path.iterdir()))}.ckpt")
    t.save_checkpoint(path)
    state = [*net.state_dict().values()]
    for group in t.optimizers[0].state.values():
        state += group.values()
    rest = (random.getstate(), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist())  # noqa: NPY002
    return [x.tolist() for x in state], rest, path, kept


@pytest.mark.parametrize("probe", [PROBE, "batch"])
def test_training_and_its_resumption_are_the_same_to_the_bit_with_the_callback_and_without_it(
    probe: Any, tmp_path: Path
) -> None:
    options = {"accumulate_grad_batches": 2, "num_sanity_val_steps": 1}
    watching = {"every": 1, "layers": ["net.*"], "probe": probe}
    without = run(tmp_path, max_epochs=2, **options)
    with_it = run(tmp_path, entropy(**watching), max_epochs=2, **options)
    assert with_it[:2] == without[:2]
    assert len(with_it[3].of("entropy/net.1")) == (4 if probe == "batch" else 5)
    own = [[row for row in log.rows if "entropy" not in str(row)] for log in (with_it[3], without[3])]
    assert own[0] == own[1] != []
    resumed = [
        run(tmp_path, *callback, max_epochs=3, resumed_from=before[2], **options)
        for callback, before in (([entropy(**watching)], with_it), ([], without))
    ]
    assert resumed[0][:2] == resumed[1][:2]


def test_a_resumed_fit_goes_on_with_the_record_and_its_checkpoint_loads_with_weights_only(
    tmp_path: Path,
) -> None:
    whole, first, second = entropy(threshold=0.999), entropy(threshold=0.999), entropy(threshold=0.999)
    all_of_it = run(tmp_path, whole, max_epochs=3)
    half = run(tmp_path, first, max_epochs=1)[2]
    offered = {}
    look = During("on_train_start", lambda t, m: offered.update(t.callback_metrics))
    rest = run(tmp_path, second, look, resumed_from=half, max_epochs=3)
    assert steps(second) == steps(whole) == [0, 2, 4, 6, 8, 10, 12]
    assert values(second).items() >= values(first).items()
    assert rest[3].of("entropy/net.0") == [(s, h) for (s, _), h in values(second).items() if s > 4]
    assert [step for step, _ in all_of_it[3].of("entropy/net.0")] == steps(whole)
    assert offered["entropy/net.0"].item() == pytest.approx(values(first)[4, "net.0"], rel=1e-6)
    assert second.monitor.crossings == {"net.0": 0}
    state = torch.load(half, weights_only=True)["callbacks"][first.state_key]
    assert json.loads(json.dumps(state, allow_nan=False)) == state == first.monitor.state_dict()


def test_a_fit_resumed_within_an_epoch_and_under_accumulation_counts_as_the_whole_one(tmp_path: Path) -> None:
    for at, accumulate in ((3, 1), (1, 3), (3, 3)):  # the last of an epoch's three steps has two batches
        path = tmp_path / f"{at} {accumulate}.ckpt"

        def save(t: pl.Trainer, m: pl.LightningModule, at: int = at, path: Path = path) -> None:
            if t.global_step == at and not path.exists():
                t.save_checkpoint(path)

        options = {"max_epochs": 2, "accumulate_grad_batches": accumulate}
        whole, again = entropy(every=1), entropy(every=1)
        trainer(whole, During("on_train_batch_end", save), **options).fit(Net(), loader(batch_size=4))
        trainer(again, **options).fit(Net(), loader(batch_size=4), ckpt_path=path)
        assert steps(again) == steps(whole) == list(range(17 if accumulate == 1 else 7)), path


class Adversaries(Net):
    """Two optimizers that step in turn, by hand."""

    automatic_optimization = False

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.net(batch[0]).square().mean())
            optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(self.net[i].parameters(), lr=0.1) for i in (0, 4)]


def test_with_several_optimizers_a_step_is_a_batch_though_the_global_step_counts_each_optimizer() -> None:
    callback, kept = entropy(every=3), Kept()
    t = trainer(callback, logger=kept, max_epochs=2)
    t.fit(Adversaries(), loader())
    assert t.global_step == 16
    assert steps(callback) == [step for step, _ in kept.of("entropy/net.0")] == [0, 3, 6]


def test_under_accumulation_a_step_is_an_update_and_each_is_evaluated_once() -> None:
    callback = entropy(every=1)
    t = trainer(callback, accumulate_grad_batches=3)
    t.fit(Net(), loader(batch_size=4))
    assert steps(callback) == [0, 1, 2, 3]  # the last two of eight batches are a step too
    assert t.global_step == 3


def test_several_callbacks_keep_apart_by_layers_or_by_name(tmp_path: Path) -> None:
    other_probe = 2 * PROBE.flip(0)[:40]
    callbacks_ = [
        entropy(layers=(name for name in ["net.0", "net.3"])),
        entropy(layers="net.4", every=4),
        entropy(layers="net.4", every=4, probe=other_probe, name="train"),
        entropy(layers=lambda module, probe: {"half": module.net[0](probe)[::2]}, every=4),
    ]
    assert len({callback.state_key for callback in callbacks_}) == 4
    _, _, path, kept = run(tmp_path, *callbacks_)
    assert [step for step, _ in kept.of("entropy/net.3")] == [0, 2, 4]
    for key in ("entropy/net.4", "train/net.4", "entropy/half"):
        assert [step for step, _ in kept.of(key)] == [0, 4]
    assert kept.of("entropy/net.4") != kept.of("train/net.4")
    saved = torch.load(path, weights_only=True)["callbacks"]
    assert [saved[callback.state_key] for callback in callbacks_] == [
        callback.monitor.state_dict() for callback in callbacks_
    ]
    with pytest.raises(RuntimeError, match="must be unique"):  # the host's
        trainer(entropy(), entropy(every=7))


@pytest.mark.parametrize("probe", [PROBE, "batch"])
def test_two_callbacks_of_one_name_that_share_a_layer_are_refused_before_the_first_batch(probe: Any) -> None:
    first, second = entropy(layers=["net.3", "net.0"]), entropy(layers="net.*", probe=probe, every=4)
    net, t = Net(), trainer(first, second)
    with pytest.raises(
        ValueError, match=r'would log entropy/net\.0, entropy/net\.3: .* name="entropy_train"'
    ):
        t.fit(net, loader())
    assert t.global_step == hooks(net) == 0
    assert first.monitor.closed
    assert second.monitor.closed
    first, second = (
        entropy(layers="net.0"),
        entropy(layers=["0", "1"], module="net"),
    )  # entropy/0 is another name
    trainer(first, second).fit(net, loader())
    assert {layer for _, layer in values(first) | values(second)} == {"net.0", "0", "1"}


def test_a_second_fit_of_a_trainer_goes_on_and_another_trainer_begins_anew() -> None:
    callback, net, kept = entropy(), Net(), Kept()
    t = trainer(callback, logger=kept)
    t.fit(net, loader())
    first = callback.monitor
    t.fit_loop.max_epochs = 2
    t.fit(net, loader())
    assert steps(callback) == [step for step, _ in kept.of("entropy/net.0")] == [0, 2, 4, 6, 8]
    assert first.closed
    assert callback.monitor.closed
    trainer(callback).fit(net, loader())
    assert steps(callback) == [0, 2, 4]


def test_the_probe_is_passed_in_the_precision_of_training() -> None:
    net, kept = Net(), Kept()
    mixed = entropy(layers=["net.0", "net.3"])
    trainer(mixed, precision="bf16-mixed", logger=kept).fit(net, loader())
    with torch.autocast("cpu", torch.bfloat16):
        assert values(mixed)[4, "net.0"] == entropy_of(net.net[0])
    assert values(mixed)[4, "net.0"] != entropy_of(net.net[0])

    true = entropy(probe={"x": PROBE})  # a copy of it in bfloat16 is passed
    net = Net()
    trainer(true, precision="bf16-true").fit(net, loader())
    assert net.net[0].weight.dtype == torch.bfloat16
    assert values(true)[4, "net.0"] == entropy_of(net.net[0], PROBE.bfloat16())

    double = entropy(probe=(PROBE,))
    net = Net()
    trainer(double, precision="64-true").fit(net, loader())
    assert values(double)[4, "net.0"] == entropy_of(net.net[0], PROBE.double())


class Watching(Net):
    """Keeps what its first layer gives in training, and the step that Lightning counts."""

    def __init__(self) -> None:
        super().__init__()
        self.given: dict[int, list[torch.Tensor]] = {}

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.given.setdefault(self.trainer.global_step, []).append(self.net[0](batch[0]).detach())
        return super().training_step(batch, batch_idx)


def test_the_training_batch_is_recorded_at_the_step_of_its_loss_micro_batches_together(
    tmp_path: Path,
) -> None:
    callback, net, kept = entropy(probe="batch", layers="0", module="net", every=4), Watching(), Kept()
    seen = []
    count = During("on_train_batch_end", lambda t, m: seen.append(hooks(m)))
    t = trainer(callback, count, accumulate_grad_batches=2, max_epochs=2, logger=kept, val_check_interval=1)
    t.fit(net, loader(batch_size=4), loader())
    rows = {step: torch.cat(given) for step, given in net.given.items()}
    assert {len(x) for x in rows.values()} == {8}
    expected = [(step, fastent.spectral_entropy(rows[step]).normalized) for step in (0, 4)]
    assert kept.of("entropy/0") == expected
    assert {(step, "0"): value for step, value in expected} == values(callback)
    assert 0 in seen  # where no evaluation is due, nor was in the step before
    assert hooks(net) == 0

    again = entropy(probe="batch", layers="0", module="net", every=4)
    t.save_checkpoint(tmp_path / "saved.ckpt")
    trainer(again, accumulate_grad_batches=2, max_epochs=3).fit(
        net, loader(batch_size=4), ckpt_path=tmp_path / "saved.ckpt"
    )
    assert steps(again) == [0, 4, 8]
    with pytest.raises(ZeroDivisionError):
        trainer(During("on_train_batch_end", lambda t, m: 1 / 0), again).fit(net, loader())
    assert hooks(net) == 0


class Headless(Net):
    """Made in configure_model, without a forward of its own."""

    forward = pl.LightningModule.forward

    def __init__(self) -> None:
        pl.LightningModule.__init__(self)

    def configure_model(self) -> None:
        self.net = Net().net


def test_a_module_without_forward_that_is_made_in_configure_model_takes_the_name_of_a_submodule() -> None:
    callback, kept = entropy(layers="0", module="net"), Kept()
    trainer(callback, logger=kept).fit(Headless(), loader())
    assert values(callback)[0, "0"] == kept.of("entropy/0")[0][1] == entropy_of(Net().net[0])
    with pytest.raises(NotImplementedError) as raised:
        trainer(entropy()).fit(Headless(), loader())
    assert 'name the submodule that has one, such as module="net"' in raised.value.__notes__[-1]


@pytest.mark.nightly
def test_of_a_compiled_module_the_probe_runs_what_was_compiled() -> None:
    compiled = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        compiled.append(len(inputs))
        return graph.forward

    counts = {}
    for with_it in (False, True):
        torch.compiler.reset()
        compiled.clear()
        net, callback = Net(), entropy(every=1)
        t = trainer(*[callback] * with_it, max_epochs=2)
        t.fit(torch.compile(net, backend=backend), loader())
        counts[with_it] = len(compiled), [p.tolist() for p in net.parameters()]
    assert counts[True] == counts[False]
    assert counts[True][0] > 0
    assert steps(callback) == list(range(9))
    assert values(callback)[8, "net.0"] == entropy_of(net.net[0])
    with pytest.raises(ValueError, match="is in a compiled graph"):
        trainer(entropy(probe="batch")).fit(torch.compile(net, backend=backend), loader())


def test_validation_and_tests_alone_need_no_monitor_and_leave_a_record_as_it_is(tmp_path: Path) -> None:
    callback = entropy()
    t = trainer(callback)
    t.validate(Net(), loader(), verbose=False)
    assert callback.monitor is None
    assert callback.state_dict() == {}
    half = run(tmp_path, entropy())[2]
    t.fit(Net(), loader(), loader())
    before = callback.monitor.state_dict()
    t.test(Net(), loader(), ckpt_path=half, verbose=False)
    t.validate(Net(), loader(), ckpt_path=half, verbose=False)
    assert callback.monitor.state_dict() == callback.state_dict() == before
    again = entropy()
    t = trainer(again)
    t.test(Net(), loader(), ckpt_path=half, verbose=False)
    t.fit(Net(), loader())
    assert steps(again) == [0, 2, 4]


def test_a_fit_that_fails_or_has_nothing_to_do_leaves_a_closed_monitor_and_no_hook(tmp_path: Path) -> None:
    class Failing(Net):
        def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
            if self.trainer.global_step == 3:
                raise ZeroDivisionError("of the user")
            return super().training_step(batch, batch_idx)

    net, callback = Failing(), entropy()
    saved = callbacks.ModelCheckpoint(tmp_path, save_on_exception=True, filename="failed")
    with pytest.raises(ZeroDivisionError, match="of the user"):
        trainer(callback, saved).fit(net, loader())
    assert steps(callback) == [0, 2]
    assert callback.monitor.closed
    assert hooks(net) == 0
    state = torch.load(tmp_path / "failed.ckpt", weights_only=True)["callbacks"][callback.state_key]
    assert state == callback.monitor.state_dict()

    t = trainer(callback, max_epochs=0)
    t.fit(Net(), loader())
    assert callback.monitor.closed
    assert steps(callback) == []
    path = run(tmp_path, entropy())[2]
    t = trainer(callback, max_epochs=1)
    t.fit(Net(), loader(), ckpt_path=path)  # it was done
    assert callback.monitor.closed
    assert steps(callback) == [0, 2, 4]


def test_what_is_wrong_is_said_before_the_first_batch_and_leaves_nothing_behind() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'treshold'"):
        entropy(treshold=0.5)
    batches = []
    count = During("on_train_batch_start", lambda t, m: batches.append(1))
    net = Net()
    for callback, error in (
        (entropy(layers="net.9"), "no layer matches 'net.9'"),
        (entropy(probe=PROBE[:, :5]), "cannot be multiplied"),
        (entropy(threshold=2.0), "threshold is a normalised entropy"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=error):
            trainer(count, callback).fit(net, loader())
        assert hooks(net) == 0
    assert batches == []


def test_the_debugging_run_and_sanity_checking_evaluate_as_any_other() -> None:
    callback = entropy()
    trainer(callback, fast_dev_run=True, logger=Kept()).fit(Net(), loader(), loader())
    assert steps(callback) == [0]
    callback = entropy()
    trainer(callback, num_sanity_val_steps=2).fit(Net(), loader(), loader())
    assert steps(callback) == [0, 2, 4]


def test_a_stopping_policy_stops_the_trainer_as_early_stopping_does() -> None:
    options = {"threshold": 1.0, "every": 3, "stopping": fastent.StopAfterCrossing(4)}
    callback = entropy(**options)
    t = trainer(callback, max_epochs=5)
    t.fit(Net(), loader())
    assert t.global_step == 6  # the first evaluation that is 4 steps after the crossing at 0
    t = trainer(entropy(**options), max_epochs=5, min_epochs=3)
    t.fit(Net(), loader())
    assert t.global_step == 12
    asked: list[int | None] = []
    policy = {"threshold": 1e-9, "stopping": lambda monitor: asked.append(monitor.last_step)}
    t = trainer(entropy(**options | policy))
    t.fit(Net(), loader())
    assert t.global_step == 4
    assert asked == [0, 3]  # once each: a policy may count


def test_an_unusable_record_is_kept_and_neither_logged_nor_offered_to_callbacks() -> None:
    class Diverging(Net):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if self.trainer.global_step == 1:
                self.net[0].weight.data.fill_(torch.nan)

    kept, callback = Kept(), entropy()
    stop = callbacks.EarlyStopping("entropy/net.0", patience=100)
    t = trainer(callback, stop, logger=kept)
    t.fit(Diverging(), loader(), loader())
    assert [record.status.value for record in callback.monitor.history] == ["ok", "nonfinite", "nonfinite"]
    assert [step for step, _ in kept.of("entropy/net.0")] == [0]
    assert t.global_step == 4
    assert t.callback_metrics["entropy/net.0"].item() == pytest.approx(values(callback)[0, "net.0"])


def test_copies_and_pickles_of_a_callback_within_a_fit_and_after_it_hold_their_own_record() -> None:
    copies = []

    def take(t: pl.Trainer, m: pl.LightningModule) -> None:
        if t.global_step == 3:
            callback = t.callbacks[0]
            copies.extend([copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))])
            copies.append(copy.deepcopy(t).callbacks[0])
            assert copy.deepcopy(m).net[0].weight.equal(m.net[0].weight)

    callback = entropy()
    trainer(callback, During("on_train_batch_end", take)).fit(Net(), loader())
    copies += [copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))]
    assert [steps(copied) for copied in copies] == [[0, 2]] * 3 + [[0, 2, 4]] * 2
    assert all(values(callback).items() >= values(copied).items() for copied in copies)
    trainer(copies[0]).fit(Net(), loader())
    assert steps(copies[0]) == steps(callback) == [0, 2, 4]


def test_the_search_for_a_learning_rate_before_the_fit_is_no_part_of_the_record(tmp_path: Path) -> None:
    class Tuned(Net):
        lr = 0.01

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    for first in (False, True):
        callback = entropy()
        finder = callbacks.LearningRateFinder(num_training_steps=5)
        own = [callback, finder][:: 1 if first else -1]
        trainer(*own, default_root_dir=tmp_path).fit(Tuned(), loader())
        assert steps(callback) == [0, 2, 4]


@pytest.mark.parametrize(
    "options",
    [{"every": 1, "threshold": 1.0, "stopping": lambda monitor: len(monitor.history) == 9}, {"every": 4}],
    ids=["a policy", "validation"],
)
def test_records_that_come_late_are_logged_at_their_own_step_and_are_there_when_something_decides(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = FakeStreams()
    slots = Ring(streams, TorchFormer())
    monkeypatch.setattr(Devices, "of", lambda self, x: slots)
    done, waits, late = threading.Event(), threading.Event(), []
    flush = fastent.SpectralEntropyMonitor.flush

    def flush_of_a_late_device(self: fastent.SpectralEntropyMonitor) -> list[fastent.EntropyRecord]:
        waits.set()
        try:
            return flush(self)
        finally:
            waits.clear()

    monkeypatch.setattr(fastent.SpectralEntropyMonitor, "flush", flush_of_a_late_device)

    def run_on() -> None:  # nothing is ready before somebody waits
        while not done.wait(0.002):
            if waits.is_set():
                streams.tick()

    def look(t: pl.Trainer, m: pl.LightningModule) -> None:
        late.append(t.callback_metrics["entropy/net.0"].item())

    kept, callback = Kept(), entropy(**options)
    threading.Thread(target=run_on, daemon=True).start()
    epochs = 5 if "stopping" in options else 2
    t = trainer(callback, During("on_validation_end", look), logger=kept, max_epochs=epochs)
    t.fit(Net(), loader(), loader())
    done.set()
    assert t.global_step == 8
    assert kept.of("entropy/net.0") == [(step, h) for (step, _), h in values(callback).items()]
    assert late == [pytest.approx(values(callback)[step, "net.0"], rel=1e-6) for step in (4, 8)]


@pytest.mark.gpu
def test_a_second_fit_may_be_on_another_device() -> None:
    callback = entropy(layers=["net.0", "net.1"])
    for accelerator in ("gpu", "cpu"):
        net = Net()
        trainer(callback, accelerator=accelerator, precision="bf16-mixed").fit(net, loader())
        assert steps(callback) == [0, 0, 2, 2, 4, 4]
        with torch.autocast("cpu", torch.bfloat16):
            assert values(callback)[4, "net.0"] == pytest.approx(entropy_of(net.cpu().net[0]), abs=1e-3)


RANKS = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch
import lightning.pytorch as pl
from lightning.pytorch import callbacks
from fastent.integrations.lightning import SpectralEntropyCallback
from test_lightning import Net, PROBE, ROWS, Kept, values
torch.set_num_threads(1)
folder = sys.argv[1]

class Offered(callbacks.Callback):
    def on_train_batch_end(self, trainer, *args):
        out["offered"].append(trainer.callback_metrics["entropy/net.1"].item())

def fit(*own, resumed_from=None, **options):
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(ROWS), batch_size=4)
    net = Net()
    t = pl.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", callbacks=list(own), enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **{"logger": False, **options})
    t.fit(net, data, data, ckpt_path=resumed_from)
    return t, [p.tolist() for p in net.parameters()]

def entropy(**options):
    return SpectralEntropyCallback(**{"layers": ["net.0", "net.1"], "probe": PROBE, "every": 3, **options})

out = {"offered": []}
t, out["without"] = fit(max_epochs=2)
rank = t.global_rank
first, kept = entropy(), Kept()
t, out["with"] = fit(first, Offered(), max_epochs=2, logger=kept)
t.save_checkpoint(folder + "/saved.ckpt")
out["history"] = [[step, layer, h] for (step, layer), h in values(first).items()]
out["logged"] = kept.of("entropy/net.1")
again = entropy()
fit(again, max_epochs=3, resumed_from=folder + "/saved.ckpt")
out["resumed"] = [[step, layer, h] for (step, layer), h in values(again).items()]
for name, stops in (("rank 0 stops", 0), ("rank 1 alone stops", 1)):
    policy = lambda monitor: rank == stops and monitor.last_step == 3
    out[name] = fit(entropy(stopping=policy), max_epochs=2)[0].global_step
together = entropy(probe="batch", across_ranks=True)
fit(together, max_epochs=1)
out["together"] = [[r.step, r.layer, r.n, r.normalized] for r in together.monitor.history]
early = callbacks.EarlyStopping("entropy/net.1", mode="max", min_delta=1.0, patience=2)
out["early"] = fit(entropy(), early, max_epochs=5)[0].global_step
with open(f"{folder}/{rank}.json", "w") as file:
    json.dump(out, file)
"""


@pytest.mark.nightly
def test_two_processes_log_decide_and_resume_by_rank_0_and_train_as_without(tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, script, tmp_path],
        env=os.environ | {"PYTHONPATH": f"{here}{os.pathsep}{here.parent}"},
        timeout=600,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    for out in ranks:
        assert out["with"] == out["without"] == ranks[0]["with"]
        assert out["rank 0 stops"] == 3
        assert out["rank 1 alone stops"] == 8
        assert out["early"] == 12  # after the first of five epochs, two without a gain
        assert out["offered"] == ranks[0]["offered"]
        assert out["together"] == ranks[0]["together"]  # the rows of both ranks' batches of 4
        assert [record[:3] for record in out["together"][::2]] == [[step, "net.0", 8] for step in (0, 3)]
    # Each rank's BatchNorm has seen rows of its own: the histories differ from then on.
    assert ranks[0]["history"][:2] == ranks[1]["history"][:2]
    assert ranks[0]["history"] != ranks[1]["history"]
    of_rank_0 = {step: h for step, layer, h in ranks[0]["history"] if layer == "net.1"}
    assert list(of_rank_0) == [0, 3, 6]
    assert ranks[0]["logged"] == [[step, h] for step, h in of_rank_0.items()]
    in_force = [of_rank_0[at] for at in (0, 0, 3, 3, 3, 6, 6, 6)]
    assert ranks[0]["offered"] == pytest.approx(in_force, rel=1e-6)
    for out in ranks:  # both go on with what rank 0 saved
        assert out["resumed"][:6] == ranks[0]["history"]
        assert [step for step, *_ in out["resumed"]] == [0, 0, 3, 3, 6, 6, 9, 9, 12, 12]


OTHER_PACKAGE = """
import warnings
warnings.simplefilter("ignore")
import torch, pytorch_lightning as pl
from fastent.integrations.lightning import SpectralEntropyCallback

class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(6, 4)
    def forward(self, x):
        return self.net(x)
    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

for both in (False, True):
    if both:
        import sys
        import lightning.pytorch
        del sys.modules["fastent.integrations.lightning"]
        from fastent.integrations.lightning import SpectralEntropyCallback
        assert issubclass(SpectralEntropyCallback, lightning.pytorch.Callback)
    assert issubclass(SpectralEntropyCallback, pl.Callback)
    callback = SpectralEntropyCallback(layers="net", probe=torch.randn(32, 6), every=2)
    stop = pl.callbacks.EarlyStopping("entropy/net", mode="max", min_delta=1.0, patience=1)
    trainer = pl.Trainer(
        accelerator="cpu", callbacks=[callback, stop], max_epochs=5, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(Net(), torch.utils.data.DataLoader(torch.randn(16, 6), batch_size=4))
    print([record.step for record in callback.monitor.history])
"""


@pytest.mark.nightly
def test_the_other_package_of_the_host_works_where_it_is_imported_first() -> None:
    pytest.importorskip("pytorch_lightning")
    done = subprocess.run(
        [sys.executable, "-c", OTHER_PACKAGE], check=True, timeout=600, capture_output=True, text=True
    )
    assert done.stdout.splitlines() == ["[0, 2, 4, 6, 8]"] * 2


@pytest.mark.nightly
def test_the_loggers_of_the_host_hold_each_value_at_its_step(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    callback = entropy()
    sheet, board = loggers.CSVLogger(tmp_path / "sheet"), loggers.TensorBoardLogger(tmp_path / "board")
    trainer(callback, logger=[sheet, board], max_epochs=2, log_every_n_steps=50).fit(
        Net(), loader(), loader()
    )
    expected = {step: value for (step, _), value in values(callback).items()}
    with open(Path(sheet.log_dir, "metrics.csv")) as file:
        rows = [row for row in csv.DictReader(file) if row["entropy/net.0"]]
    assert {int(row["step"]): float(row["entropy/net.0"]) for row in rows} == expected
    written = events.EventAccumulator(board.log_dir)
    written.Reload()
    assert {e.step: e.value for e in written.Scalars("entropy/net.0")} == pytest.approx(expected, rel=1e-6)
