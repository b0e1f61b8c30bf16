"""Runs read for analysis, never written: a folder may belong to a run that is still training.

What a folder holds is told in `fastent.train.runs`; runs packed into Parquet files by
`fastent.experiments.records` are read as if they were folders. The last line of a live log may be half written;
it is left out here with a warning, and left alone on disk.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastent.train.errors import RunError, RunWarning
from fastent.train.files import read_rows
from fastent.train.presets import PRESETS, TASK_SETTINGS, TrainConfig
from fastent.train.quantities import Levels, MeasuredRun, Trajectory, summarize_run


@dataclass(frozen=True)
class StoredRun:
    """One run as it was found.

    `path` is its folder, `record` the content of its config.json, `environment` the machine and software (empty
    if not recorded), `rows` its metrics and `timing` its clocks, `done` the content of DONE (None while the run
    is not complete), `failed` that of FAILED.

    Raises
    ------
    RunError
        If `record` is not a run's configuration.
    """

    path: Path
    record: dict[str, Any]
    environment: dict[str, Any]
    rows: tuple[dict[str, Any], ...]
    timing: tuple[dict[str, Any], ...]
    done: dict[str, Any] | None
    failed: dict[str, Any] | None

    def __post_init__(self) -> None:
        try:
            dict(self.record["config"])
            _ = self.experiment, self.condition, self.seed
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(f"{self.path / 'config.json'} is not a run's configuration ({error!r})") from error

    @property
    def experiment(self) -> str:
        """Which experiment asked for it, "e1" to "e8"."""
        return str(self.record["experiment"])

    @property
    def condition(self) -> str:
        """What sets it apart within its experiment."""
        return str(self.record["condition"])

    @property
    def seed(self) -> int:
        """Its seed."""
        return int(self.record["seed"])

    @property
    def config(self) -> dict[str, Any]:
        """The trainer's settings as JSON gives them."""
        settings: dict[str, Any] = self.record["config"]
        return settings

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.name

    @property
    def preset(self) -> tuple[str, dict[str, Any]]:
        """The preset nearest to its settings and the values of the fields that differ.

        The task is left aside, and so are the measures, which change nothing of the training.
        """
        name = min(PRESETS_JSON, key=lambda name: len(self.changes_from(name)))
        return name, self.changes_from(name)

    def changes_from(self, preset: str) -> dict[str, Any]:
        """Return the values of the fields that differ from a preset's, task and measures aside."""
        return _changes(self.config, PRESETS_JSON[preset])

    @property
    def state(self) -> str:
        """What became of it, in words."""
        if self.done is not None:
            return f"complete: {self.done.get('reason', 'no reason recorded')}"
        last = f"step {self.rows[-1]['step']:,}" if self.rows else "no evaluation yet"
        if self.failed is not None:
            return f"failed at {last}: {self.failed.get('reason', 'no reason recorded')}"
        return f"not complete: {last}"

    def measure(self) -> MeasuredRun:
        """Its columns and quantities.

        Raises
        ------
        ValueError
            If it holds no evaluation, or rows that do not follow each other.
        """
        trajectory = Trajectory.from_rows(self.rows)
        levels = Levels(self.config["criterion"], self.config["memorised"])
        return MeasuredRun(
            name=self.name,
            seed=self.seed,
            complete=self.done is not None,
            evaluate_every=self.config["evaluate_every"],
            levels=levels,
            trajectory=trajectory,
            summary=summarize_run(trajectory, levels),
        )


def _as_json(config: TrainConfig) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return values


PRESETS_JSON = {name: _as_json(config) for name, config in PRESETS.items()}
"""Settings of the presets by name, as JSON gives them."""

PAPER = PRESETS_JSON["paper"]


def _changes(config: dict[str, Any], preset: dict[str, Any]) -> dict[str, Any]:
    # Neither the task, with what it needs, nor what is measured beside makes it another setting.
    preset = {**preset, **TASK_SETTINGS.get(config.get("task", ""), {})}
    keys = [key for key in {**preset, **config} if key not in ("task", "measures")]
    # A setting that is younger than the run is not in its record.
    return {key: config[key] for key in keys if key in config and config[key] != preset.get(key)}


def read_runs(root: Path) -> list[StoredRun]:
    """All runs directly below `root`, folders and packed ones, by experiment, condition, task and seed.

    Raises
    ------
    RunError
        If `root` is not a folder or holds no run, holds one twice, or a file of a run cannot be read.
    """
    if not root.is_dir():
        raise RunError(f"{root} is not a folder: give the --out of `fastent run`")
    found = [read_run(path.parent) for path in root.glob("*/config.json")]
    if packed := sorted(root.glob("*.parquet")):
        from fastent.experiments.records import unpack

        found += [run for path in packed for run in unpack(path)]
    if not found:
        raise RunError(f"{root} holds no run folder: give the --out of `fastent run`")
    names = Counter(run.name for run in found)
    if twice := [name for name, count in names.items() if count > 1]:
        raise RunError(
            f"{root} holds {', '.join(sorted(twice))} twice: as a folder and packed, or in two files"
        )
    return sorted(found, key=lambda r: (r.experiment, r.condition, str(r.config.get("task")), r.seed))


def read_run(path: Path) -> StoredRun:
    """Read one run folder.

    Raises
    ------
    RunError
        If one of its files cannot be read.
    """
    record = _object(path / "config.json")
    if record is None:
        raise RunError(f"{path / 'config.json'} is not there, or went away while it was read")
    return StoredRun(
        path=path,
        record=record,
        environment=_object(path / "environment.json") or {},
        rows=tuple(_rows(path / "metrics.jsonl")),
        timing=tuple(_rows(path / "timing.jsonl")),
        done=_object(path / "DONE"),
        failed=_object(path / "FAILED"),
    )


def _object(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise RunError(f"{path} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise RunError(f"{path} does not hold a JSON object")
    return value


def _rows(path: Path) -> list[dict[str, Any]]:
    size = path.stat().st_size if path.exists() else 0  # before reading: the file may grow meanwhile
    rows, end = read_rows(path, 0)
    if end < size:
        message = f"{path}: line {len(rows) + 1} is torn; it and what follows it are not in the report"
        warnings.warn(message, RunWarning, stacklevel=2)
    return rows
