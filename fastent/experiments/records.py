"""Runs packed into Parquet files: everything a run folder holds but its checkpoints, in a few kilobytes a run.

One file for each experiment, condition and task, its runs by seed. A row is a line of a run's metrics or of its
timing (column ``log``) with the run's ``seed``; configurations, environments and ends are JSON in the file's
metadata under ``fastent``. Numbers are kept to the last bit, so a report from packed runs has the bytes of a
report from their folders. Only complete runs are packed.

``python -m fastent.experiments.records RUNS FOLDER`` packs a folder of runs into another folder, beside what is
there: a run of the same name takes the place of the one packed before.
"""

from __future__ import annotations

import argparse
import io
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fastent.experiments.stored import StoredRun, read_runs
from fastent.train.errors import RunError
from fastent.train.files import write_atomically

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
    parser = argparse.ArgumentParser(prog="python -m fastent.experiments.records", description=main.__doc__)
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
