"""Runs read for analysis: folders, which are never written to, and runs packed into Parquet files.

What a folder holds is told in `fastent.grokking.train.runs`; it may belong to a run that is still training. The last
line of a live log may be half written; it is left out here with a warning, and left alone on disk. A complete run is
read if it is what its DONE closed.

Folders of one identity are one run and its copies, as by ``cp -r``, and so is a run that lies there packed as well: it
counts once, and what lies there besides is named.

Packed runs are one file for each experiment, condition, task and change of settings, its runs by seed. A row is a line
of a run's metrics or of its timing (column ``log``) with the run's ``seed``; configurations, environments and ends are
JSON in the file's metadata under ``fastent``. Numbers are kept to the last bit, so a report from packed runs has the
bytes of a report from their folders; a SHA-256 of the whole file, in its metadata under ``fastent.sha256``, is verified
whenever it is read. Only complete runs are packed, by ``python -m fastent.grokking.experiments.data
RUNS FOLDER``: beside what is there, a run of the same name in the place of the one packed before.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import io
import json
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fastent.entropy import Status
from fastent.grokking.experiments.statistics import Array, Mask, Times
from fastent.grokking.train import milestones
from fastent.grokking.train.config import JUDGED, PRESETS, TASK_SETTINGS, TrainConfig, completed
from fastent.grokking.train.milestones import SUSTAINED, TAU, WINDOW
from fastent.grokking.train.runs import (
    check_done,
    check_record,
    check_rows,
    damages,
    identity,
    read_done,
)
from fastent.grokking.train.storage import (
    MEND,
    Damaged,
    Log,
    RunError,
    RunWarning,
    parse_object,
    printable,
    read_object,
    read_regular,
    write_atomically,
)

REMEDY = "give the --out of `fastent run`, or a folder of packed runs"

ANALYSED = ("task", "model", "train_fraction", "max_steps", "evaluate_every", "criterion", "memorised")
"""Settings that analyses read; of others a run may be older."""


@dataclass(frozen=True)
class StoredRun:
    """One run as it was found.

    `path` is its folder, `record` the content of its config.json, `environment` the machine and software (empty
    if not recorded), `rows` its metrics and `timing` its clocks, `done` the content of DONE (None while the run
    is not complete), `failed` that of FAILED. `packed` is the file that it is read from, where that is no folder;
    `copies` names where it lies besides.

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
    packed: Path | None = None
    copies: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        path = self.path / "config.json"
        check_record(path, self.record)
        if missing := [name for name in ANALYSED if name not in self.config]:
            raise RunError(f"{path} is not a run's configuration, for it has no {', '.join(missing)}: {MEND}")

    def __repr__(self) -> str:
        return f"StoredRun({self.place}: {self.state}; {len(self.rows)} rows)"

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

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """The trainer's settings as JSON gives them, those that are younger than the run included."""
        return completed(self.record["config"])

    @property
    def name(self) -> str:
        """The folder's name."""
        return printable(self.path.name)

    @functools.cached_property
    def identity(self) -> str:
        """Digest of what makes it the run it is (`fastent.grokking.train.runs.identity`)."""
        return identity(self.record)

    @property
    def place(self) -> str:
        """What tells it from its copies: its folder's name, or that of the packed file too."""
        return self.name if self.packed is None else f"{self.name} in {self.packed.name}"

    @property
    def preset(self) -> tuple[str, dict[str, Any]]:
        """The preset nearest to its settings and the values of the fields that differ.

        The task is left aside, and so are the measures, which change nothing of the training.
        """
        name = min(PRESETS_JSON, key=lambda name: len(self.changes_from(name)))
        return name, self.changes_from(name)

    def changes_from(self, preset: str) -> dict[str, Any]:
        """Return the values of the fields that differ from a preset's, task and measures aside."""
        # Neither the task, with what it needs, nor what is measured beside makes it another setting.
        there = {**PRESETS_JSON[preset], **TASK_SETTINGS[preset].get(self.config.get("task", ""), {})}
        keys = [key for key in {**there, **self.config} if key not in ("task", "measures")]
        return {
            key: self.config[key] for key in keys if key in self.config and self.config[key] != there.get(key)
        }

    @functools.cached_property
    def _columns(self) -> dict[str, Array]:
        return {}

    def column(self, name: str) -> Array:
        """Return a column of its metrics, (m,), read once: NaN where there is no number or a status forbids its use."""
        if name not in self._columns:
            status = f"{name}_status"
            try:
                usable = (status not in row or Status(row[status]).usable for row in self.rows)
                values = [row.get(name) if use else None for row, use in zip(self.rows, usable, strict=True)]
                self._columns[name] = np.array(values, dtype=np.float64)
            except (ValueError, TypeError) as error:
                raise RunError(f"{self.path / 'metrics.jsonl'}: column {name}: {error}: {MEND}") from error
        return self._columns[name]

    @property
    def state(self) -> str:
        """What became of it, in words."""
        if self.done is not None:
            return f"complete: {self.done.get('reason', 'no reason recorded')}"
        last = f"step {self.rows[-1]['step']:,}" if self.rows else "no evaluation yet"
        if self.failed is not None:
            return f"failed at {last}: {self.failed.get('reason', 'no reason recorded')}"
        return f"not complete: {last}"


def _as_json(config: TrainConfig) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return values


PRESETS_JSON = {name: _as_json(config) for name, config in PRESETS.items()}
"""Settings of the presets by name, as JSON gives them."""

PAPER = PRESETS_JSON["paper"]


@dataclass(frozen=True, eq=False)
class Runs:
    """Runs as arrays: a row for each run, a column for each of its evaluations, NaN where there is none.

    Whatever a run did not reach, record or could not use is NaN: it fails every comparison and no mean takes it in
    (`fastent.grokking.experiments.statistics.over`). An entropy counts where its status is usable. Times are steps.

    Parameters
    ----------
    stored : tuple of StoredRun
        As they were found, each with at least one evaluation.
    criterion : float, optional
        Test accuracy that dates grokking, in [0, 1]; each run's own if it is None.
    probe : str
        Column of the entropy: another one shows the runs as a monitor on another probe would have seen them.
    judged : bool, optional
        Whether the paper's numbers are judged by them; None: if all were made with
        a preset that stands for its setting (`JUDGED`), as it is.

    Raises
    ------
    ValueError
        Where arrays are asked for and a run holds no evaluation, or steps that do not increase.
    """

    stored: tuple[StoredRun, ...]
    criterion: float | None = None
    probe: str = "entropy"
    judged: bool | None = None

    def __len__(self) -> int:
        return len(self.stored)

    def __getitem__(self, keep: Mask | Sequence[int] | slice) -> Runs:
        """Those of a mask, at indices or of a slice."""
        return replace(self, stored=tuple(self.stored[i] for i in np.arange(len(self))[keep]))

    def select(self, experiment: str, condition: str | None = None, task: str | None = None) -> Runs:
        """Those of an experiment, of one of its conditions and of a task, by seed."""
        kept = [
            run
            for run in self.stored
            if run.experiment == experiment
            and condition in (None, run.condition)
            and task in (None, run.config["task"])
        ]
        return replace(self, stored=tuple(sorted(kept, key=lambda run: run.seed)))

    def only(self, seeds: Iterable[int]) -> Runs:
        """Those of some seeds."""
        return self[np.isin(self.seeds, list(seeds))]

    def dated_by(self, criterion: float) -> Runs:
        """Return the same runs with grokking dated by another test accuracy."""
        return replace(self, criterion=criterion)

    def seen_by(self, probe: str) -> Runs:
        """Return the same runs with the entropy of another column."""
        return replace(self, probe=probe)

    @property
    def seeds(self) -> list[int]:
        """Their seeds."""
        return [run.seed for run in self.stored]

    @property
    def condition(self) -> str:
        """The condition of the first: of all, where one was selected."""
        return self.stored[0].condition

    @property
    def comparable(self) -> bool:
        """Whether the paper's numbers are judged by them."""
        if self.judged is not None:
            return self.judged
        return all(name in JUDGED and not changes for name, changes in (run.preset for run in self.stored))

    def setting(self, name: str) -> Array:
        """Return a number of each run's configuration, (n,)."""
        return np.array([run.config[name] for run in self.stored], dtype=np.float64)

    @functools.cached_property
    def step(self) -> Array:
        """Steps of the evaluations, (n, m)."""
        for run in self.stored:
            if not run.rows:
                raise ValueError(f"{run.name} holds no evaluation: its metrics are empty")
        step = self.column("step")
        if (np.diff(step) <= 0).any():
            run, at = np.argwhere(np.diff(step) <= 0)[0]
            raise ValueError(
                f"steps must increase from row to row; in {self.stored[run].name} step {step[run, at + 1]:g} follows "
                f"{step[run, at]:g}"
            )
        return step

    def column(self, name: str) -> Array:
        """Return a column of the metrics, (n, m); an entropy of any probe is NaN where it is not usable."""
        table = np.full((len(self), max((len(run.rows) for run in self.stored), default=0)), np.nan)
        for values, run in zip(table, self.stored, strict=True):
            values[: len(run.rows)] = run.column(name)
        return table

    @functools.cached_property
    def entropy(self) -> Array:
        """Normalised entropy, (n, m)."""
        return self.column(self.probe)

    @functools.cached_property
    def train_accuracy(self) -> Array:
        """Share of the training set that is right, (n, m)."""
        return self.column("train_accuracy")

    @functools.cached_property
    def test_accuracy(self) -> Array:
        """Share of the test set that is right, (n, m)."""
        return self.column("test_accuracy")

    @functools.cached_property
    def norm(self) -> Array:
        """Euclidean norm of all parameters, (n, m)."""
        return self.column("parameter_norm")

    @property
    def criteria(self) -> Array:
        """Test accuracy that dates each run's grokking, (n,)."""
        return self.setting("criterion") if self.criterion is None else np.full(len(self), self.criterion)

    @functools.cached_property
    def t_mem(self) -> Array:
        """First step with the train accuracy that counts as memorised, (n,)."""
        return self.first(self.train_accuracy >= self.setting("memorised")[:, None])

    @functools.cached_property
    def t_grok(self) -> Array:
        """First step with test accuracy at the criterion, (n,)."""
        return self.first(self.test_accuracy >= self.criteria[:, None])

    @functools.cached_property
    def t_grok_sustained(self) -> Array:
        """First step of the first three evaluations in a row with test accuracy at the criterion, (n,)."""
        return self.first(self.test_accuracy >= self.criteria[:, None], in_a_row=SUSTAINED)

    @functools.cached_property
    def h_star(self) -> Array:
        """Entropy at T_grok, (n,)."""
        return self.at(self.entropy, self.t_grok)

    @property
    def grokked(self) -> Mask:
        """Whether each has grokked, (n,)."""
        return np.isfinite(self.t_grok)

    @functools.cached_property
    def start(self) -> Array:
        """First step that was evaluated, (n,)."""
        return self.step[:, 0] if len(self) else np.empty(0)

    @functools.cached_property
    def end(self) -> Array:
        """Last step that was evaluated, (n,)."""
        return np.nanmax(self.step, axis=1) if len(self) else np.empty(0)

    @property
    def times(self) -> Times:
        """T_grok of each, censored at its end."""
        return Times.of(self.t_grok, self.end)

    def first(self, hit: Mask, in_a_row: int = 1) -> Array:
        """Step of the first evaluation of each run where `hit` (n, m) holds, or of the first `in_a_row`; (n,)."""
        return milestones.first(self.step, hit, in_a_row)

    def first_below(self, threshold: Array | float) -> Array:
        """T_cross: first step of each run with an entropy below a threshold, its own (n,) or one for all; (n,)."""
        return self.first(self.entropy < np.reshape(threshold, (-1, 1)))

    @functools.cached_property
    def memorised_entropy(self) -> Array:
        """Normalised entropy from T_mem on, (n, m); NaN before it, and throughout a run that does not memorise."""
        return np.where(self.step >= self.t_mem[:, None], self.entropy, np.nan)

    def first_collapse(self, tau: float = TAU, window: int = WINDOW) -> Array:
        """T_collapse of each, (n,): `fastent.grokking.train.milestones.first_collapse` of the entropy from T_mem on."""
        return milestones.first_collapse(self.step, self.memorised_entropy, tau=tau, window=window)

    def at(self, values: Array | str, step: Array) -> Array:
        """Value of each run at a step that it evaluated, of an array (n, m) or a column by its name; (n,)."""
        values = self.column(values) if isinstance(values, str) else values
        hit = self.step == step[:, None]
        rows, at = (
            np.arange(len(self)),
            hit.argmax(axis=1) if hit.size else np.zeros(len(self), dtype=np.int64),
        )
        return np.where(hit[rows, at], values[rows, at], np.nan)

    def lines(self, *columns: Array | str) -> Iterator[tuple[Array, ...]]:
        """For each run its steps and its values of arrays (n, m) or columns, without what lies beyond its end."""
        tables = [self.step, *(self.column(c) if isinstance(c, str) else c for c in columns)]
        for row, run in enumerate(self.stored):
            yield tuple(table[row, : len(run.rows)] for table in tables)


def by_condition(runs: Runs) -> dict[str, Runs]:
    """Group the runs of one experiment by condition, in the order of the names."""
    kinds = {run.condition: run.experiment for run in runs.stored}
    return {name: runs.select(kinds[name], name) for name in sorted(kinds)}


def read_runs(root: Path, skipped: dict[str, str] | None = None) -> list[StoredRun]:
    """All runs directly below `root`, folders and packed ones, by experiment, condition, task and seed.

    Parameters
    ----------
    root : Path
    skipped : dict, optional
        Gets the name of each folder or file that holds no run that can be read, and why.

    Raises
    ------
    RunError
        If `root` is not a folder, holds no run, or holds two of one name.

    Warns
    -----
    RunWarning
        Of each that is skipped, and of each run that lies there more than once, and whether what lies there is the
        same.
    """
    if not root.is_dir():
        what = "is a file and no folder of runs" if root.exists() else "does not exist"
        raise RunError(f"{root} {what}: {REMEDY}")
    found: list[StoredRun] = []
    left: dict[str, str] = {} if skipped is None else skipped
    for path in sorted(root.iterdir()):
        try:
            if path.suffix == ".parquet" and path.is_file():
                found += unpack(path)
            elif any((path / name).exists() for name in ("config.json", "metrics.jsonl", "DONE")):
                found.append(read_run(path))
        except (RunError, OSError) as error:
            name = printable(path.name)
            left[name] = printable(str(error))
            warnings.warn(f"skipped {name}: {left[name]}", RunWarning, stacklevel=2)
    if not found:
        said = "".join(f"\n  {name}: {reason}" for name, reason in left.items())
        raise RunError(f"{root} holds no run that can be read: {REMEDY}{said}")
    found = counted_once(found, root)
    names = Counter(run.name for run in found)
    if twice := [name for name, count in names.items() if count > 1]:
        raise RunError(
            f"{root} holds {', '.join(sorted(twice))} twice, of other settings: as a folder and packed, or in two files"
        )
    return sorted(found, key=lambda r: (r.experiment, r.condition, str(r.config.get("task")), r.seed))


def plainest(name: str) -> tuple[bool, int, str]:
    """Key that sorts names of a run's folders: first those that end in a seed, as they were made, and short ones."""
    return re.search(r"-seed\d+$", name) is None, len(name), name


def counted_once(found: Iterable[StoredRun], root: Path) -> list[StoredRun]:
    """Keep one of the runs of each identity: complete rather than not, longer, a folder, the plainest name.

    Warns
    -----
    RunWarning
        Of each run of which there are more in `root`, and whether what lies there is the same.
    """
    groups: dict[str, list[StoredRun]] = defaultdict(list)
    for run in found:
        groups[run.identity].append(run)
    kept = []
    for group in groups.values():
        order = sorted(
            group,
            key=lambda run: (run.done is None, -len(run.rows), run.packed is not None, *plainest(run.name)),
        )
        first, *copies = order
        if copies:
            first = replace(first, copies=tuple(run.place for run in copies))
            said = "".join(
                f"; {run.place} is another from step {step:,} on"
                for run in copies
                if (step := _parting(first, run)) is not None
            )
            warnings.warn(
                f"{root}: {' and '.join(run.place for run in order)} are one run, by settings and seed, and count "
                f"once, as {first.place}{said}",
                RunWarning,
                stacklevel=3,
            )
        kept.append(first)
    return kept


def _parting(run: StoredRun, other: StoredRun) -> int | None:
    """Step of the first row in which two runs differ, as far as both go and record the same; None if in none."""
    for a, b in zip(run.rows, other.rows, strict=False):
        if any(a[key] != b[key] for key in a.keys() & b.keys()):
            return int(a["step"])
    return None


def read_run(path: Path) -> StoredRun:
    """Read one run folder.

    Raises
    ------
    RunError
        If one of its files cannot be read, or holds what no run writes.
    Damaged
        If it is complete, and a file that is read here is not what its DONE closed.
    """
    done = read_done(path)  # before the others: what it closes no longer changes
    for damaged in damages(path) if done is not None else ():
        raise damaged
    record = read_object(path / "config.json")
    if record is None:
        raise RunError(f"{path / 'config.json'} is missing: {MEND}")
    return sound(
        StoredRun(
            path=path,
            record=record,
            environment=_without(read_object(path / "environment.json") or {}, "schema_version"),
            rows=tuple(_rows(path / "metrics.jsonl")),
            timing=tuple(_rows(path / "timing.jsonl")),
            done=None if done is None else _without(done, "settings_sha256", "files"),
            failed=read_object(path / "FAILED"),
        )
    )


def sound(run: StoredRun) -> StoredRun:
    """Return `run`, having seen that its logs can be analysed.

    Raises
    ------
    RunError
        If a row holds what no run writes, steps do not increase, or a complete run has no row.
    """
    metrics = run.path / "metrics.jsonl"
    check_rows(metrics, run.rows)
    check_rows(run.path / "timing.jsonl", run.timing)
    if run.done is not None and not run.rows:
        raise RunError(f"{metrics} holds no evaluation, and DONE says that the run ended: {MEND}")
    for line, (before, row) in enumerate(pairwise(run.rows), 2):
        if row["step"] <= before["step"]:
            raise RunError(
                f"{metrics}: line {line}: steps must increase from row to row; step {row['step']} follows "
                f"{before['step']}: {MEND}"
            )
    run.column("entropy")
    return run


def _without(record: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in keys}


def _rows(path: Path) -> list[dict[str, Any]]:
    log = Log.read(path)
    if log.fault is not None:
        said = f"{path}: line {len(log.rows) + 1} is torn" if log.torn else log.fault.finding
        warnings.warn(f"{said}; it and what follows it are not in the report", RunWarning, stacklevel=2)
    return log.rows


SCHEMA_VERSION = 2
"""Of packed files: 1 had no checksums."""

_KEY = b"fastent"
_SUM = re.compile(rb"fastent\.sha256..([0-9a-f]{64})", re.DOTALL)
"""The checksum in a packed file, behind its name: 64 digits, counted as zeros in what it is a checksum of."""

_NO_SUM = b"0" * 64

PACK_AGAIN = (
    "put it back from a copy, or pack its runs again: python -m fastent.grokking.experiments.data RUNS FOLDER"
)
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
        The files written, one for each experiment, condition, task and change of settings.

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
            # A file tells its runs apart by their seeds, so it is of one setting.
            groups[run.name.rpartition("-seed")[0]][run.name] = run
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
    table = pa.table(columns).replace_schema_metadata({_KEY: head.encode(), b"fastent.sha256": _NO_SUM})
    file = io.BytesIO()
    pq.write_table(table, file, compression="zstd", compression_level=19)
    data = file.getvalue()
    (place,) = _SUM.finditer(data)
    return data[: place.start(1)] + hashlib.sha256(data).hexdigest().encode() + data[place.end(1) :]


def unpack(path: Path) -> list[StoredRun]:
    """Read the runs of one file, each as if its folder lay beside the file.

    Raises
    ------
    Damaged
        If it is no such file, or not what was written.
    RunError
        If it was packed by a newer fastent.
    """
    data = read_regular(path)
    mark = _SUM.search(data)
    if mark is not None:
        expected = mark[1].decode()
        found = hashlib.sha256(data[: mark.start(1)] + _NO_SUM + data[mark.end(1) :]).hexdigest()
        if found != expected:
            raise Damaged(path, f"sha256 {expected}", found, remedy=PACK_AGAIN)
    try:
        table = pq.read_table(pa.BufferReader(data))
        head = parse_object(table.schema.metadata[_KEY])
        version, heads = head["schema_version"], head["runs"]
        if version > SCHEMA_VERSION:
            raise RunError(
                f"{path} was packed with schema {version}, by a newer fastent than this ({SCHEMA_VERSION})"
            )
        if mark is None and version != 1:
            raise Damaged(path, "fastent.sha256, its checksum", "none", remedy=PACK_AGAIN)
        logs: dict[tuple[int, str], list[dict[str, Any]]] = defaultdict(list)
        for line in table.to_pylist():
            logs[line.pop("seed"), line.pop("log")].append(line)
        return [_run(path, each, *(logs[each["config"]["seed"], log] for log in _LOGS)) for each in heads]
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise Damaged(path, "packed runs", f"none that can be read ({error!r})", remedy=PACK_AGAIN) from error


def is_checked(path: Path) -> bool:
    """Whether a packed file has a checksum, which `unpack` verifies: those from before there were any have none."""
    return _SUM.search(path.read_bytes()) is not None


def _run(
    file: Path, head: dict[str, Any], metrics: list[dict[str, Any]], timing: list[dict[str, Any]]
) -> StoredRun:
    path = file.parent / head["name"]
    if head["name"] != path.name or path.name == "..":
        raise ValueError(f"{head['name']!r} is no name of a folder")
    done = head["done"]
    if done is not None:
        check_done(path / "DONE", done)
    return sound(
        StoredRun(
            path=path,
            record=head["config"],
            environment=dict(head["environment"]),
            rows=tuple({name: row[name] for name in head["columns"]} for row in metrics),
            timing=tuple({name: value for name, value in row.items() if value is not None} for row in timing),
            done=done,
            failed=None,
            packed=file,
        )
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
