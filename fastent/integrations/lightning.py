"""Spectral entropy in Lightning: a callback that keeps a monitor for the length of a fit.

A step is what Lightning's loggers count: a batch after which gradients were not left to accumulate. `global_step` is
another number where there are several optimizers, since it counts the steps of each. A record's step says how many
such batches the weights have seen; 0 is the untrained model.

A fixed probe is evaluated at the end of a batch, when the optimizer has stepped and Lightning has neither validated nor
saved: `EarlyStopping` and `ModelCheckpoint` see the entropy of the weights that they decide on. The training batch was
passed by the weights before that, and is recorded at their step, where Lightning logs its loss.

`lightning` and `pytorch_lightning` are two packages of one content, and each refuses the other's callbacks. The class
here is a callback of both where both are imported by the time this module is, or else of the one that there is.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fastent.monitor.monitor import SpectralEntropyMonitor
from fastent.monitor.probe import Inputs, Layers
from fastent.records import EntropyRecord

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:

    def _callback() -> type:
        packages = ("lightning.pytorch", "pytorch_lightning")
        hosts = [name for name in packages if sys.modules.get(name)]
        hosts = hosts or [name for name in packages if importlib.util.find_spec(name.partition(".")[0])][:1]
        if not hosts:
            raise ModuleNotFoundError(
                "fastent.integrations.lightning needs lightning, which is not installed: pip install lightning",
                name="lightning",
            )
        return type("Callback", tuple(importlib.import_module(name).Callback for name in hosts), {})

    Callback = _callback()


class SpectralEntropyCallback(Callback):
    """Callback that records the spectral entropy of layers while a Trainer fits.

    It logs ``<name>/<layer>`` to the Trainer's loggers, at the record's own step, and puts the newest value into
    `trainer.callback_metrics`, where `EarlyStopping` and `ModelCheckpoint` find it. A record that is not `usable` (NaN
    in the activations, a layer that did not run) is in the monitor's history alone. Training is bit-identical with it
    and without it.

    Parameters
    ----------
    layers : str, iterable of str, or callable
        As `fastent.SpectralEntropyMonitor` takes them: names of ``named_modules()`` of the LightningModule, or of its
        submodule `module`.
    probe : Tensor, tuple of arguments, or dict of keyword arguments, or "batch"
        The fixed input, with at least two samples, on any device: it is moved to the model, and converted as the
        Trainer's precision converts batches. "batch": no input, but what the training batch gives at due steps, all
        micro-batches of a step together.
    every : int
        Steps from one evaluation to the next.
    stopping : callable, optional
        Policy such as `fastent.StopAfterCrossing`, asked after each evaluation. The Trainer stops as it does for
        `EarlyStopping`, not before its `min_epochs` and `min_steps`.
    name : str
        First part of what is logged. Two callbacks that share a layer need two names.
    module : str
        Submodule that takes the probe, for a LightningModule without `forward`; "" is the LightningModule itself.
    **options
        Further arguments of `fastent.SpectralEntropyMonitor`: `threshold`, `law`, `tokens`, `mask` and so on.

    Attributes
    ----------
    monitor : SpectralEntropyMonitor or None
        The monitor of the fit under way, or that of the last one, closed: `history`, `crossings`, `diagnose()`. None
        before the first fit, and after one that ran in processes of its own ("ddp_spawn").

    Raises
    ------
    TypeError
        For an option that the monitor does not have. What else is wrong with the arguments raises when a fit starts,
        before its first batch, since the monitor is made there.
    ValueError
        When a fit starts, if another callback of the Trainer would log under the same name and layer.

    Notes
    -----
    The state is in the Trainer's checkpoints; ``fit(ckpt_path=...)`` goes on with it, and so does a second `fit` of the
    same Trainer. Another Trainer begins anew.

    Under DDP every rank evaluates the probe, and what is logged, offered to callbacks and decided is rank 0's. Under
    FSDP or tensor parallelism every rank takes part in the probe's pass, and rank 0 records.

    Examples
    --------
    A script that runs is in docs/integrations.md.
    """

    def __init__(
        self,
        *,
        layers: Layers,
        probe: Inputs | Literal["batch"],
        every: int = 200,
        stopping: Callable[[SpectralEntropyMonitor], bool] | None = None,
        name: str = "entropy",
        module: str = "",
        **options: Any,
    ) -> None:
        inspect.signature(SpectralEntropyMonitor).bind(
            None, probe, layers, every=every, stopping=stopping, **options
        )
        self.monitor: SpectralEntropyMonitor | None = None
        self._layers = layers if callable(layers) or isinstance(layers, str) else list(layers)
        self._probe, self._every, self._stopping = probe, every, stopping
        self._name, self._module, self._options = name, module, options
        self._stage: str | None = None
        self._loaded: dict[str, Any] | None = None  # a state that waits for its monitor
        self._records: list[EntropyRecord] = []  # that are not logged yet

    @property
    def state_key(self) -> str:
        """Key of the state in a checkpoint: callbacks of another name or for other layers have another."""
        layers = self._layers
        if callable(layers):
            layers = getattr(layers, "__qualname__", type(layers).__qualname__)
        return str(self._generate_state_key(name=self._name, module=self._module, layers=layers))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keep the state of the last fit where the same Trainer goes on, and forget it where another one begins."""
        self._stage = stage
        if stage == "fit":
            before, self.monitor = self.monitor, None
            if before is not None and 0 < (before.last_step or 0) <= _steps(trainer):
                self._loaded = before.state_dict()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the monitor: `configure_model` has run, and the model is on its device in its precision."""
        from lightning_utilities.core.apply_func import apply_to_collection

        probe = self._probe
        if not self._of_batch:
            probe = apply_to_collection(probe, Tensor, lambda t: t.to(pl_module.device))
            probe = trainer.precision_plugin.convert_input(probe)
        model = pl_module.get_submodule(self._module)
        try:
            with trainer.precision_plugin.forward_context():
                self.monitor = SpectralEntropyMonitor(
                    model,
                    probe,
                    self._layers,
                    every=self._every,
                    stopping=self._stopping,
                    **self._options,
                )
        except NotImplementedError as error:
            error.add_note(
                'the probe passes through the forward method: name the submodule that has one, such as module="net"'
            )
            raise
        self._refuse_shared_names(trainer)
        self._records = []
        state, self._loaded = self._loaded, None
        if state is not None:
            self.monitor.load_state_dict(state)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Offer the newest values of a run that goes on: the Trainer has forgotten them."""
        assert self.monitor is not None
        known = [record for record in self.monitor.history if record.layer in self.monitor.layers]
        self._offer(trainer, trainer.strategy.broadcast(known))

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Evaluate the model that the run begins with; earlier than here a resumed Trainer's count is one too small."""
        assert self.monitor is not None
        if self.monitor.last_step is None and not self._of_batch:
            self._step(trainer, _steps(trainer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Tell the monitor of a step; the Trainer counts it later, after validation."""
        if not trainer.fit_loop._should_accumulate():
            self._step(trainer, _steps(trainer) + (0 if self._of_batch else 1))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait for the records that callbacks decide on when the validation ends."""
        self._flush(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait for the records that callbacks decide on when the epoch ends."""
        self._flush(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what is left and close the monitor."""
        self._flush(trainer)
        self._close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close the monitor of a fit that found nothing to do."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the monitor; if that fails too, `exception` gets a note."""
        if self.monitor is not None:
            self.monitor.__exit__(type(exception), exception, exception.__traceback__)

    def state_dict(self) -> dict[str, Any]:
        """State of the monitor as plain values, which ``torch.load(weights_only=True)`` reads; empty before a fit."""
        if self._loaded is not None or self.monitor is None:
            return self._loaded or {}
        return self.monitor.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with a saved state. Where the Trainer validates, tests or predicts, what was recorded stays."""
        if self._stage not in (None, "fit"):
            return
        if self.monitor is None:
            self._loaded = state_dict
        else:  # strategies that restore once the model is set up
            self.monitor.load_state_dict(state_dict)

    @property
    def _of_batch(self) -> bool:
        return isinstance(self._probe, str)

    def _step(self, trainer: Trainer, step: int) -> None:
        assert self.monitor is not None
        due = step % self._every == 0
        with trainer.precision_plugin.forward_context():
            self._records += self.monitor.step(step)
        if due and self._stopping is not None:  # so that the clock has no say in when a run stops
            self._records += self.monitor.flush()
        if due or trainer.world_size == 1:  # on all ranks at the same steps
            self._publish(trainer)
        if due and self._stopping is not None:
            stop = trainer.strategy.broadcast(self.monitor.should_stop(agree=False))
            trainer.should_stop = trainer.should_stop or stop

    def _flush(self, trainer: Trainer) -> None:
        if self.monitor is not None and not self.monitor.closed:
            self._records += self.monitor.flush()
            self._publish(trainer)

    def _close(self) -> None:
        if self.monitor is not None:
            self.monitor.close()

    def _publish(self, trainer: Trainer) -> None:
        """Log the records of rank 0 and offer them on all ranks."""
        records, self._records = trainer.strategy.broadcast(self._records), []
        for record in records:
            if record.status.usable:
                for logger in trainer.loggers:
                    logger.log_metrics({self._key(record.layer): record.normalized}, step=record.step)
        self._offer(trainer, records)

    def _offer(self, trainer: Trainer, records: Iterable[EntropyRecord]) -> None:
        """Put the newest values where callbacks look for them, as Lightning's `LearningRateMonitor` does."""
        newest = {self._key(record.layer): record.normalized for record in records if record.status.usable}
        if newest:  # to ask for the metrics makes the Trainer reduce all that it holds
            device = trainer.strategy.root_device
            trainer.callback_metrics.update(
                {
                    key: torch.tensor(value, dtype=torch.float32, device=device)
                    for key, value in newest.items()
                }
            )

    def _refuse_shared_names(self, trainer: Trainer) -> None:
        """Refuse what another callback of the Trainer, whose monitor is made already, logs too."""
        for other in trainer.callbacks:
            if isinstance(other, SpectralEntropyCallback) and other is not self:
                shared = sorted(self._keys & other._keys)
                if shared:
                    raise ValueError(
                        f"two callbacks of one Trainer would log {', '.join(shared[:3])}: give one of them another "
                        f'name, name="{self._name}_train"'
                    )

    @property
    def _keys(self) -> set[str]:
        watched = None if self.monitor is None else self.monitor._watched
        return set() if watched is None else {self._key(layer) for layer in watched.order}

    def _key(self, layer: str) -> str:
        return f"{self._name}/{layer}" if layer else self._name


def _steps(trainer: Trainer) -> int:
    """Return how many steps the Trainer has counted: where its loggers' axis stands."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)
