"""Runs read for analysis: folders, which are never written to, and runs packed into Parquet files.

What a folder holds is told in `fastent.train.runs`; it may belong to a run that is still training. The last line of a
live log may be half written; it is left out here with a warning, and left alone on disk.

Packed runs are one file for each experiment, condition and task, its runs by seed. A row is a line of a run's metrics
or of its timing (column ``log``) with the run's ``seed``; configurations, environments and ends are JSON in the file's
metadata under ``fastent``. Numbers are kept to the last bit, so a report from packed runs has the bytes of a report
from their folders. Only complete runs are packed, by ``python -m fastent.grokking.experiments.data RUNS FOLDER``:
beside what is there, a run of the same name in the place of the one packed before.
"""

from __future__ import annotations

import argparse
import io
import json
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from fastent.grokking.experiments.statistics import Estimate, bootstrap
from fastent.spectrum import Status
from fastent.train.errors import RunError, RunWarning
from fastent.train.files import read_rows, write_atomically
from fastent.train.presets import PRESETS, TASK_SETTINGS, TrainConfig
from fastent.train.quantities import Levels, MeasuredRun, Trajectory, summarize_run, value_at


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


SCHEMA_VERSION = 1

_KEY = b"fastent"
_LOGS = ("metrics", "timing")


def pack(runs: Iterable[StoredRun], folder: Path) -> list[Path]:
    """Write the complete ones of `runs` into `folder`, beside the runs packed there before.

    Parameters
    ----------
    runs : iterable of StoredRun
        Those that are not complete are passed over.
    folder : Path
        Made if it is not there.

    Returns
    -------
    list of Path
        The files written, one for each experiment, condition and task.

    Raises
    ------
    RunError
        If a file of `folder` that is to be added to cannot be read, or was packed by a newer fastent.
    OSError
        If a file cannot be written.
    """
    groups: dict[str, dict[str, StoredRun]] = defaultdict(dict)
    for run in runs:
        if run.done is not None:
            groups[f"{run.experiment}-{run.condition}-{run.config['task']}"][run.name] = run
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, group in sorted(groups.items()):
        path = folder / f"{name}.parquet"
        before = {run.name: run for run in unpack(path)} if path.exists() else {}
        write_atomically(path, _as_parquet(sorted((before | group).values(), key=lambda run: run.seed)))
        written.append(path)
    return written


def _as_parquet(runs: Sequence[StoredRun]) -> bytes:
    lines = [
        {"seed": run.seed, "log": log, **row}
        for run in runs
        for log, rows in zip(_LOGS, (run.rows, run.timing), strict=True)
        for row in rows
    ]
    names = list(dict.fromkeys(name for line in lines for name in line))
    columns = {name: pa.array([line.get(name) for line in lines]) for name in names}
    heads = [
        {
            "name": run.name,
            "config": run.record,
            "environment": run.environment,
            "done": run.done,
            # A number that was not finite is null in the metrics; other columns it does not have.
            "columns": list(dict.fromkeys(name for row in run.rows for name in row)),
        }
        for run in runs
    ]
    head = json.dumps({"schema_version": SCHEMA_VERSION, "runs": heads}, sort_keys=True)
    table = pa.table(columns).replace_schema_metadata({_KEY: head.encode()})
    file = io.BytesIO()
    pq.write_table(table, file, compression="zstd", compression_level=19)
    return file.getvalue()


def unpack(path: Path) -> list[StoredRun]:
    """Read the runs of one file, each as if its folder lay beside the file.

    Raises
    ------
    RunError
        If it is no such file, or was packed by a newer fastent.
    """
    try:
        table = pq.read_table(path)
        head = json.loads(table.schema.metadata[_KEY])
        version, heads = head["schema_version"], head["runs"]
    except (pa.ArrowInvalid, KeyError, TypeError, ValueError) as error:
        raise RunError(f"{path} does not hold packed runs ({error!r})") from error
    if version > SCHEMA_VERSION:
        raise RunError(
            f"{path} was packed with schema {version}, by a newer fastent than this ({SCHEMA_VERSION})"
        )
    logs: dict[tuple[int, str], list[dict[str, Any]]] = defaultdict(list)
    for line in table.to_pylist():
        logs[line.pop("seed"), line.pop("log")].append(line)
    return [_run(path.parent, each, *(logs[each["config"]["seed"], log] for log in _LOGS)) for each in heads]


def _run(
    folder: Path, head: dict[str, Any], metrics: list[dict[str, Any]], timing: list[dict[str, Any]]
) -> StoredRun:
    return StoredRun(
        path=folder / head["name"],
        record=head["config"],
        environment=head["environment"],
        rows=tuple({name: row[name] for name in head["columns"]} for row in metrics),
        timing=tuple({name: value for name, value in row.items() if value is not None} for row in timing),
        done=head["done"],
        failed=None,
    )


def main() -> None:
    """Pack a folder of runs into Parquet files."""
    parser = argparse.ArgumentParser(
        prog="python -m fastent.grokking.experiments.data", description=main.__doc__
    )
    parser.add_argument("runs", type=Path, help="folder of runs, the --out of `fastent run`")
    parser.add_argument("folder", type=Path, help="folder of the Parquet files")
    given = parser.parse_args()
    runs = read_runs(given.runs)
    for path in pack(runs, given.folder):
        print(f"{path}  {len(unpack(path))} runs, {path.stat().st_size / 1e3:.0f} kB")
    if waiting := [run.name for run in runs if run.done is None]:
        print(f"not complete, not packed: {', '.join(waiting)}")


if __name__ == "__main__":
    main()


Array = NDArray[np.float64]


def column(run: StoredRun, name: str) -> Array | None:
    """Return a column, shape (m,), NaN where the run has no number; None if it was not recorded."""
    if not run.rows or name not in run.rows[0]:
        return None
    return np.array([np.nan if row[name] is None else row[name] for row in run.rows], dtype=np.float64)


def entropy_column(run: StoredRun, name: str) -> Array | None:
    """Return a further entropy, NaN where its status makes it unusable; None if it was not recorded."""
    values = column(run, name)
    if values is None:
        return None
    usable = [Status(row[f"{name}_status"]).usable for row in run.rows]
    return np.where(usable, values, np.nan)


def with_entropy(run: MeasuredRun, entropy: Array) -> MeasuredRun:
    """Return `run` as a monitor on another probe would have seen it: the same but for `entropy`, (m,)."""
    trajectory = replace(run.trajectory, entropy=entropy)
    return replace(run, trajectory=trajectory, summary=summarize_run(trajectory, run.levels))


def values_at(
    stored: Sequence[StoredRun], measured: Sequence[MeasuredRun], name: str, steps: Sequence[int | None]
) -> list[float | None]:
    """Value of a column at one step of each run; None where there is none."""
    found = []
    for run, one, at in zip(stored, measured, steps, strict=True):
        values = column(run, name)
        found.append(None if values is None else value_at(one.trajectory.step, values, at))
    return found


def over(values: Sequence[float | None]) -> Estimate | None:
    """Mean of what is known, with its bootstrap interval; None if nothing is."""
    known = [float(value) for value in values if value is not None and np.isfinite(value)]
    return bootstrap(known) if known else None
