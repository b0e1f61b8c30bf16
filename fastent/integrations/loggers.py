"""Records in the loggers that people use: `log_to` makes a monitor's `on_record` of a run, a writer or a file.

Each record is logged at its own step, late or not, as ``<prefix>/<layer>`` (``<prefix>/model`` for the whole model,
whose layer is ""); an evaluation that gave no number is NaN there. Lines of JSON hold whole records. A logger is
recognised by the package that it is from or by what it can do; none is imported here.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from fastent.records import EntropyRecord


def log_to(run_or_writer: Any, prefix: str = "entropy") -> Callable[[EntropyRecord], None]:
    """Make the `on_record` of a `fastent.SpectralEntropyMonitor` that logs to a run, a writer or a file.

    Parameters
    ----------
    run_or_writer : object
        - a TensorBoard ``SummaryWriter``, or what has its ``add_scalar``;
        - a W&B run, or ``wandb`` itself after ``wandb.init``. Values are drawn over ``<prefix>/step``, and stand in the
          row of what was logged last: W&B refuses a row whose ``step=`` has passed;
        - an MLflow run, or ``mlflow`` itself in an active run: the run that is active now;
        - a Trackio run, or ``trackio`` itself;
        - a path, or a text file open for writing, for lines of JSON. A path is appended to, a line at a time, and
          opened for that alone: a crash can cut the last line at most, and the next one begins a line of its own.
    prefix : str
        What the names of the values begin with; lines of JSON have none.

    Raises
    ------
    TypeError
        For anything else.
    ValueError
        If MLflow has no active run.
    OSError
        If the path or the file cannot be written to.

    Examples
    --------
    >>> import io, torch
    >>> from fastent import SpectralEntropyMonitor
    >>> lines = io.StringIO()
    >>> monitor = SpectralEntropyMonitor(on_record=log_to(lines))
    >>> _ = monitor.observe(200, torch.eye(3), layer="encoder")
    >>> record = EntropyRecord.from_dict(json.loads(lines.getvalue()))
    >>> record.step, record.layer, round(record.effective_rank, 12)
    (200, 'encoder', 2.0)
    """
    packages = _packages(run_or_writer)
    if isinstance(run_or_writer, str | os.PathLike):
        return _JsonLines.appended_to(Path(run_or_writer).absolute())
    if "wandb" in packages:
        return _Wandb.prepared(run_or_writer, prefix)
    if "mlflow" in packages:
        return _Mlflow.of(run_or_writer, prefix)
    if "trackio" in packages:
        return _Trackio(run_or_writer, prefix)
    if callable(getattr(run_or_writer, "add_scalar", None)):
        return _TensorBoard(run_or_writer, prefix)
    if callable(getattr(run_or_writer, "write", None)) and callable(getattr(run_or_writer, "flush", None)):
        return _OpenFile.checked(run_or_writer)
    raise TypeError(
        "log_to takes a TensorBoard SummaryWriter, a run of W&B, MLflow or Trackio (or wandb, mlflow or trackio "
        f"itself), a path, or an open text file; got {type(run_or_writer).__name__}. For another logger, write "
        "on_record yourself: any function of a record"
    )


def _packages(x: object) -> set[str]:
    """Top-level packages that a module or the classes of an object are from."""
    names = [x.__name__] if isinstance(x, ModuleType) else [kind.__module__ for kind in type(x).__mro__]
    return {name.partition(".")[0] for name in names}


def _name(prefix: str, record: EntropyRecord) -> str:
    return f"{prefix}/{record.layer or 'model'}"


@dataclass(frozen=True)
class _TensorBoard:
    writer: Any
    prefix: str

    def __call__(self, record: EntropyRecord) -> None:
        self.writer.add_scalar(_name(self.prefix, record), record.normalized, record.step)


@dataclass
class _Wandb:
    """One row of W&B for each evaluated step, and none where the user's own call has just begun one.

    Every call of ``log`` that ends a row counts, and a user's ``log(..., step=s)`` is refused once so many have counted
    that s has passed. So values are added to the row that is open, which the next call of the user, the next
    evaluated step or the end of the run closes.
    """

    run: Any
    prefix: str
    _open: int | None = field(default=None, init=False)

    @classmethod
    def prepared(cls, run: Any, prefix: str) -> _Wandb:
        run.define_metric(f"{prefix}/*", step_metric=f"{prefix}/step")
        return cls(run, prefix)

    def __call__(self, record: EntropyRecord) -> None:
        if self._open not in (None, record.step):
            self.run.log({}, commit=True)
        self._open = record.step
        values = {f"{self.prefix}/step": record.step, _name(self.prefix, record): record.normalized}
        self.run.log(values, commit=False)


@dataclass(frozen=True)
class _Mlflow:
    client: Any
    run_id: str
    prefix: str

    @classmethod
    def of(cls, run: Any, prefix: str) -> _Mlflow:
        if isinstance(run, ModuleType):
            run = run.active_run()
            if run is None:
                raise ValueError(
                    "log_to(mlflow) logs to the active run, and there is none: mlflow.start_run()"
                )
        return cls(sys.modules["mlflow"].MlflowClient(), run.info.run_id, prefix)

    def __call__(self, record: EntropyRecord) -> None:
        self.client.log_metric(self.run_id, _name(self.prefix, record), record.normalized, step=record.step)


@dataclass(frozen=True)
class _Trackio:
    run: Any
    prefix: str

    def __call__(self, record: EntropyRecord) -> None:
        self.run.log({_name(self.prefix, record): record.normalized}, step=record.step)


def _line(record: EntropyRecord) -> str:
    return json.dumps(record.as_dict(), allow_nan=False) + "\n"


@dataclass(frozen=True)
class _JsonLines:
    path: Path

    @classmethod
    def appended_to(cls, path: Path) -> _JsonLines:
        if not path.parent.is_dir():
            raise FileNotFoundError(
                f"log_to opens {path.name} in {path.parent}, which is no folder: make it first"
            )
        path.open("ab").close()  # one that cannot be written is told of now
        return cls(path)

    def __call__(self, record: EntropyRecord) -> None:
        line = _line(record).encode()
        with self.path.open("a+b") as file:
            if file.tell() > 0:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a crash, or a full disk, has cut the line before
                    line = b"\n" + line
            file.write(line)


@dataclass(frozen=True)
class _OpenFile:
    file: Any

    @classmethod
    def checked(cls, file: Any) -> _OpenFile:
        file.write("")  # a closed, a binary or a read-only file is told of now
        return cls(file)

    def __call__(self, record: EntropyRecord) -> None:
        self.file.write(_line(record))
        self.file.flush()
