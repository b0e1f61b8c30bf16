"""The monitor in the Trainer of Transformers: its records in the logs, the metrics and the checkpoints.

The Trainer builds callbacks that keep a state anew from JSON when it resumes, and of two of one class it keeps one. So
this callback keeps none in the Trainer: its monitor's state lies in a file of its own in each checkpoint. The Trainer
tells a callback everything but where its reporters are: `SpectralEntropyCallback.attach` does.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self

from fastent.monitor.monitor import SpectralEntropyMonitor
from fastent.monitor.probe import Inputs, Layers
from fastent.process import warn_user
from fastent.records import EntropyRecord

try:
    import transformers  # before what it needs itself: one that is missing is named
    from accelerate.utils import broadcast_object_list, send_to_device
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
except ModuleNotFoundError as error:
    if error.name not in ("transformers", "accelerate"):
        raise
    raise ModuleNotFoundError(
        f"fastent.integrations.transformers needs {error.name}, which is not installed: pip install {error.name}",
        name=error.name,
    ) from None


class _Metrics(transformers.TrainerCallback):
    """What stands before all other callbacks, so that those which read an evaluation's metrics find the values."""

    def __init__(self, callback: SpectralEntropyCallback) -> None:
        self._callback = callback

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Put the newest values into the metrics."""
        self._callback.on_evaluate(*args, **kwargs)


class SpectralEntropyCallback(transformers.TrainerCallback):
    """A callback that records the spectral entropy of a model's layers while a `transformers.Trainer` trains it.

    Every `train()` makes a new monitor, of the model as the Trainer trains it then, and evaluates at multiples of
    `every`, a fixed probe at step 0 too. The values of a step go to the Trainer's ``state.log_history``
    and, once the callback is attached, to all that ``report_to`` names, as ``<name>/<layer>`` at the step of the
    records. At an evaluation of the Trainer the newest are put into its metrics as ``eval_<name>/<layer>``, which
    ``metric_for_best_model`` and `transformers.EarlyStoppingCallback` may name. A record that is not usable is in
    ``monitor.history`` alone, and NaN in the metrics.

    Parameters
    ----------
    layers : str, iterable of str, or callable
        As `fastent.SpectralEntropyMonitor` takes them: names of the model as it was built, without what wraps it
        (compilation, DDP, FSDP, PEFT).
    probe : Tensor, tuple of arguments, or mapping of keyword arguments, or "batch"
        The fixed input of at least two samples, such as a dict of `input_ids` and `attention_mask`, (n, tokens) each.
        It is moved to the Trainer's device, and passes through the model under the Trainer's own precision. "batch": no
        input, but what the training batch gives at due steps, all micro-batches together, at the step of their loss.
    every : int, optional
        Steps between two evaluations; by default the Trainer's ``logging_steps``.
    stopping : callable, optional
        Policy such as `fastent.StopAfterCrossing`, asked at multiples of `every`.
    name : str
        Under which values are logged and the state is saved, `<name>.json` in each checkpoint. Two callbacks of one
        Trainer need two names.
    **options
        Further arguments of `fastent.SpectralEntropyMonitor`: `tokens`, `threshold`, `law`, `mask` and so on.

    Attributes
    ----------
    monitor : fastent.SpectralEntropyMonitor or None
        Of the latest `train()`; closed at its end, and readable. None before the first.

    Raises
    ------
    TypeError
        For an option that the monitor does not have. What else is wrong with the arguments raises when training
        begins, since the monitor is made there.
    ValueError
        If `name` is no name of a file. When training begins, if an attached callback shares it with another.

    Notes
    -----
    Of several processes the first records, and its values and decisions are everybody's. Where the others are needed
    for it (FSDP, tensor parallelism) they take part in each evaluation.

    A run that resumes goes on with the records of its checkpoint, which is looked for where
    ``args.resume_from_checkpoint`` says, then in the output folder: the Trainer tells nobody which it was given. A
    trial of a hyperparameter search saves no state.
    """

    def __init__(
        self,
        *,
        layers: Layers,
        probe: Inputs | Literal["batch"],
        every: int | None = None,
        stopping: Callable[[SpectralEntropyMonitor], bool] | None = None,
        name: str = "entropy",
        **options: Any,
    ) -> None:
        inspect.signature(SpectralEntropyMonitor).bind(
            None, probe, layers, every=every, stopping=stopping, **options
        )
        if Path(name).name != name or name in ("", ".."):
            raise ValueError(f"name is that of a file in each checkpoint, without folders; got {name!r}")
        self._layers, self._probe, self._every, self._name = layers, probe, every, name
        self._stopping, self._options = stopping, options
        self._handler: Any = None
        self._metrics = _Metrics(self)
        self._running = False
        self.monitor: SpectralEntropyMonitor | None = None

    def attach(self, trainer: Any) -> Self:
        """Join a trainer, in place of ``callbacks=[...]`` or beside it, and send the records to its `report_to`.

        The other callbacks, whenever they joined it, find the values in an evaluation's metrics.

        Parameters
        ----------
        trainer : transformers.Trainer
            Or one of its subclasses.

        Returns
        -------
        SpectralEntropyCallback
            This one.

        Raises
        ------
        TypeError
            For anything else.
        """
        if not isinstance(trainer, transformers.Trainer):
            raise TypeError(
                f"attach takes the transformers.Trainer that will train; got {type(trainer).__name__}"
            )
        self._handler = trainer.callback_handler
        if self not in self._handler.callbacks:
            trainer.add_callback(self)
        if self._metrics not in self._handler.callbacks:
            self._handler.callbacks.insert(0, self._metrics)
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Make the monitor, load its records where training resumes, and take the first step."""
        if self.monitor is not None:  # of a `train()` that did not come to its end
            self.monitor.close()
        others = () if self._handler is None else self._handler.callbacks
        if any(
            isinstance(other, SpectralEntropyCallback) and other is not self and other._name == self._name
            for other in others
        ):
            raise ValueError(
                f"two callbacks of one Trainer have the name {self._name!r}, under which each logs and saves: give one "
                'of them another, name="entropy_train"'
            )
        first = state.is_world_process_zero
        if first and self._handler is None and args.report_to:
            warn_user(
                f"the records do not reach {', '.join(args.report_to)}: the Trainer tells a callback nothing of its "
                "reporters. Give it the trainer by callback.attach(trainer)",
                UserWarning,
            )
        if self._of_batch and args.torch_compile:
            raise ValueError(
                'probe="batch" takes activations by hooks, and a graph that torch_compile=True makes of the model runs '
                "none: give a fixed probe, whose pass runs the plain model"
            )
        self._due = int(state.logging_steps) if self._every is None else self._every
        probe = send_to_device(self._probe, args.device)
        monitor = SpectralEntropyMonitor(
            model, probe, self._layers, every=self._due, stopping=self._stopping, **self._options
        )
        found = _of_first(self._saved(args, state.global_step) if first and state.global_step else None)
        if not first and not monitor.needs_every_rank:
            monitor.close()
        elif found is not None:
            file, saved = found
            with _named(file):
                monitor.load_state_dict(saved)
        self.monitor, self._running = monitor, True
        if not self._of_batch:
            self._step(args, state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate if it is time, and ask the stopping policy then."""
        self._step(args, state, control)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        """Put the newest values into the metrics of an evaluation during training."""
        if self._running and metrics is not None:
            self._flush(args, state, control)
            metrics.update(_of_first(self._newest()))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the records into the checkpoint that was just saved."""
        if self._running and state.is_world_process_zero and not state.is_hyper_param_search:
            path = self._file(_checkpoint(args, state.global_step))
            temporary = path.with_name(path.name + ".tmp")
            with temporary.open("w", encoding="utf-8") as file:
                json.dump(self._open.state_dict(), file, allow_nan=False)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log what is under way and close the monitor."""
        if self._running:
            self._flush(args, state, control)
            self._open.close()
            self._running = False

    @property
    def _of_batch(self) -> bool:
        return isinstance(self._probe, str)

    @property
    def _open(self) -> SpectralEntropyMonitor:
        assert self.monitor is not None
        return self.monitor

    def _step(self, args: Any, state: Any, control: Any) -> None:
        if not self._open.closed:
            self._report(self._open.step(state.global_step), args, state, control)
        if self._stopping is not None and state.global_step % self._due == 0:
            self._flush(args, state, control)
            own = state.is_world_process_zero and self._open.should_stop(agree=False)
            if _of_first(own):
                control.should_training_stop = True

    def _flush(self, args: Any, state: Any, control: Any) -> None:
        if not self._open.closed:
            self._report(self._open.flush(), args, state, control)

    def _report(self, records: Iterable[EntropyRecord], args: Any, state: Any, control: Any) -> None:
        rows: defaultdict[int, dict[str, float]] = defaultdict(dict)
        for record in records:
            if record.status.usable:
                rows[record.step][f"{self._name}/{record.layer}"] = record.normalized
        for step, values in rows.items():
            state.log_history.append({**values, "step": step})
            if self._handler is not None:
                # Not by trainer.log: subclasses, as those of TRL, empty metrics of their own into any call of it.
                # Reporters log at the state's step. And on_log marks the Trainer's own values of this step as logged.
                should_log = control.should_log
                self._handler.on_log(
                    args, dataclasses.replace(state, global_step=step), control, dict(values)
                )
                control.should_log = should_log

    def _newest(self) -> dict[str, float]:
        values = dict.fromkeys(self._open.layers, math.nan)
        for record in self._open.history:
            if record.layer in values:  # a resumed run may have begun with other layers
                values[record.layer] = record.normalized if record.status.usable else math.nan
        return {f"eval_{self._name}/{layer}": value for layer, value in values.items()}

    def _saved(self, args: Any, step: int) -> tuple[str, Any] | None:
        """Read the state of the checkpoint that training resumes from, with its path; None if there is none."""
        for folder in (args.resume_from_checkpoint, _checkpoint(args, step)):
            if isinstance(folder, str | os.PathLike) and (file := self._file(folder)).exists():
                with _named(str(file)):
                    return str(file), json.loads(file.read_text(encoding="utf-8"))
        warn_user(
            f"training resumes at step {step}, and {self._file(_checkpoint(args, step))} is not there: records begin "
            "anew. If the checkpoint lies elsewhere, set args.resume_from_checkpoint to it",
            UserWarning,
        )
        return None

    def _file(self, checkpoint: str | os.PathLike[str]) -> Path:
        return Path(checkpoint, f"{self._name}.json")


def _checkpoint(args: Any, step: int) -> Path:
    return Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{step}")


@contextmanager
def _named(file: str) -> Iterator[None]:
    """Name the file, and what to do, in errors about what it holds."""
    try:
        yield
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{file} is no state that this monitor can take up ({error}): put it back from a copy, or remove it, and "
            "records begin anew"
        ) from error


def _of_first(value: Any) -> Any:
    """Give what the first process has, to all; every one must call this."""
    return broadcast_object_list([value])[0]
