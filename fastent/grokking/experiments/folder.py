"""What is in a folder of runs: the state of each, read from the ends of its files, and never written to.

`Folder.look` may be called again and again; each look reads what was written since the last. Of a run that is complete
``DONE`` has its times, and the last line of its metrics the rest, so a thousand of them take a second or two, with the
checksums of their logs; of others all lines are read once, for T_mem and T_grok. Packed runs
(`fastent.grokking.experiments.data`) are complete.

A last line that is not whole is one that is being written, or that a crash cut short and the run drops when it goes on:
it is left out. A line that is not whole and has others after it, and a file that cannot be read or is not what DONE
closed, make a run `DAMAGED`. Copies of a run count once (`Folder.look`).

Whether somebody trains is told by the run's lock, whose process is looked for on this host; on another host it counts
as alive, and the time of the last line says how far to believe that.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np

from fastent.grokking.experiments.data import REMEDY, Runs, StoredRun, plainest, sound, unpack
from fastent.grokking.train.runs import awaited, check_rows, damages, read_done, what_counts
from fastent.grokking.train.storage import (
    MEND,
    RunError,
    holder,
    open_regular,
    parse_object,
    printable,
    read_object,
    read_rows,
)


class State(StrEnum):
    """What a run is doing, in the order in which it is told."""

    RUNNING = "running"
    """A process has its lock."""
    WAITING = "waiting"
    """A process that trains others has announced it."""
    INTERRUPTED = "interrupted"
    """Nobody trains it; the command that began it goes on with it."""
    FAILED = "failed"
    """A sweep gave it up: FAILED says why."""
    DAMAGED = "damaged"
    """One of its files cannot be read, or misses what it must hold."""
    COMPLETE = "complete"


@dataclass(frozen=True)
class RunState:
    """A run as it was found.

    Attributes
    ----------
    name : str
        Of its folder.
    state : State
    step, limit : int or None
        Last step that was evaluated, and the step at which the run ends at the latest.
    t_mem, t_grok : int or None
        First steps with the train and the test accuracy that count; None where it has not come to them.
    entropy, test_accuracy : float or None
        At `step`; None where there is none, or its status forbids its use.
    written : float or None
        When its metrics were last written, seconds since 1970.
    detail : str
        What there is to say of it, as why it failed.
    lines : tuple of str
        The last that the process of a failed run wrote to standard error.
    command : str
        What to type to try a failed run again; "" where it is not known.
    identity : str
        Of the run, wherever it lies (`fastent.grokking.train.runs.identity`); "" where it cannot be read.
    copies : tuple of str
        Where it lies besides.
    stored : StoredRun or None
        With all its lines, where these were read.
    """

    name: str
    state: State
    step: int | None = None
    limit: int | None = None
    t_mem: int | None = None
    t_grok: int | None = None
    entropy: float | None = None
    test_accuracy: float | None = None
    written: float | None = None
    detail: str = ""
    lines: tuple[str, ...] = ()
    command: str = ""
    identity: str = ""
    copies: tuple[str, ...] = ()
    stored: StoredRun | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("name", "detail", "command"):  # they go to a terminal
            object.__setattr__(self, name, printable(getattr(self, name)))
        object.__setattr__(self, "lines", tuple(map(printable, self.lines)))


class Folder:
    """A folder of runs, a single run's folder, or a file of packed runs.

    Parameters
    ----------
    path : Path
    whole : bool
        Read all lines of complete runs too.

    Attributes
    ----------
    foreign : list of str
        Names of what lies there beside runs, as of the last look.

    Raises
    ------
    RunError
        If there is no such folder.
    """

    def __init__(self, path: Path, *, whole: bool = False) -> None:
        if not path.exists():
            raise RunError(f"{path} does not exist: {REMEDY}")
        if not path.is_dir() and path.suffix != ".parquet":
            raise RunError(f"{path} is a file and no folder of runs: {REMEDY}")
        self.path = path
        self.foreign: list[str] = []
        self._whole = whole
        self._logs: dict[Path, _Log] = {}
        self._settled: dict[Path, list[RunState]] = {}

    def look(self) -> list[RunState]:
        """Return its runs by name, seeds in the order of their numbers.

        A run that lies there several times counts once: complete rather than in training, further rather than less
        far, under the plainest name. Its other places are its `copies`.

        Raises
        ------
        RunError
            If there is none, and none announced: what is there instead.
        """
        self.foreign = []
        alone = self.path.is_file() or is_run(self.path)
        states = [
            each
            for path in ([self.path] if alone else sorted(self.path.iterdir()))
            for each in self._of(path)
        ]
        found = {each.name: each for each in _counted_once(states)}
        if not alone:
            for name, limit in awaited(self.path).items():
                known = found.get(name, RunState(name, State.WAITING, limit=limit))
                if known.state in (State.WAITING, State.INTERRUPTED):
                    found[name] = replace(known, state=State.WAITING)
        if not found:
            raise RunError(self._nothing())
        return sorted(found.values(), key=_order)

    def _of(self, path: Path) -> list[RunState]:
        if path in self._settled:
            return self._settled[path]
        if not holds_runs(path):
            self.foreign += beside(path)
            return []
        if path.is_file():
            self._settled[path] = _packed(path)
            return self._settled[path]
        state = self._judge(path)
        if state.state is State.COMPLETE:
            self._settled[path] = [state]
        return [state]

    def _judge(self, path: Path) -> RunState:
        try:
            return self._read(path)
        except (RunError, OSError) as error:
            said = str(error) if isinstance(error, RunError) else f"{path} cannot be read ({error}): {MEND}"
            return RunState(path.name, State.DAMAGED, written=_written(path), detail=said)

    def _read(self, path: Path) -> RunState:
        trained_by = holder(path)  # before the files: a run that ends meanwhile is complete, not interrupted
        done = read_done(path)
        if done is not None and "files" in done:
            for damaged in damages(path):
                raise damaged
        failed = read_object(path / "FAILED")
        record = read_object(path / "config.json")
        if record is None:
            if trained_by is not None:
                return RunState(path.name, State.RUNNING, written=_written(path))  # it is about to begin
            if not what_counts(path):
                return RunState(
                    path.name, State.INTERRUPTED, written=_written(path), detail="it has not begun"
                )
            raise RunError(f"{path / 'config.json'} is missing: {MEND}")
        log = self._logs.setdefault(path, _Log(path / "metrics.jsonl"))
        known = done is not None and {"t_mem", "t_grok"} <= done.keys() and not self._whole
        log.read(last=known)
        if done is not None and (not log.rows or log.rows[-1]["step"] != done["steps"]):
            at = f"end at step {log.rows[-1]['step']:,}" if log.rows else "are none"
            raise RunError(f"{log.path}: its rows {at}, and DONE says {done['steps']:,}: {MEND}")
        stored = sound(StoredRun(path, record, {}, tuple(log.rows), (), done, failed))
        told = _told(stored, done if known else None)
        told["stored"] = None if known else stored
        told["identity"] = stored.identity
        told["written"] = _written(path)
        if done is not None:
            return RunState(path.name, State.COMPLETE, detail=str(done.get("reason", "")), **told)
        if trained_by is not None:
            return RunState(path.name, State.RUNNING, **told)
        if failed is not None:
            lines = failed.get("lines")
            told["lines"] = tuple(map(str, lines)) if isinstance(lines, list) else ()
            told["command"] = str(failed.get("command", ""))
            return RunState(path.name, State.FAILED, detail=str(failed.get("reason", "")), **told)
        torn = f"line {len(log.rows) + 1} of its metrics is torn, and is dropped when it goes on"
        return RunState(path.name, State.INTERRUPTED, detail=torn if log.torn else "", **told)

    def _nothing(self) -> str:
        inside = [each for each in self.path.iterdir() if each.is_dir() and any(map(is_run, each.glob("*/")))]
        if inside:
            return f"{self.path} holds no run itself: give {' or '.join(map(str, sorted(inside)))}"
        if not self.foreign:
            return f"{self.path} is empty: {REMEDY}"
        return f"{self.path} holds no run, only {some(self.foreign)}: {REMEDY}"


def _counted_once(states: Iterable[RunState]) -> list[RunState]:
    groups: dict[str, list[RunState]] = {}
    for state in states:
        groups.setdefault(state.identity or state.name, []).append(state)
    ranks = (State.COMPLETE, State.RUNNING)
    kept = []
    for group in groups.values():
        first, *copies = sorted(
            group,
            key=lambda each: (
                ranks.index(each.state) if each.state in ranks else len(ranks),
                -(each.step or 0),
                len(_place(each)) > len(each.name),
                *plainest(each.name),
            ),
        )
        kept.append(replace(first, copies=tuple(map(_place, copies))))
    return kept


def _place(state: RunState) -> str:
    return state.name if state.stored is None else state.stored.place


def some(names: list[str], most: int = 5) -> str:
    """Write the first few of many names, and how many there are besides."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def skipped(foreign: list[str]) -> str:
    """Say what was passed over, in a line; empty where nothing was."""
    return f"no runs, skipped: {some(foreign)}" if foreign else ""


def holds_runs(path: Path) -> bool:
    """Whether `path`, in a folder of runs, is a file of packed runs, or a run's folder that may be looked into."""
    try:
        return (path.suffix == ".parquet" and path.is_file()) or (path.is_dir() and is_run(path))
    except OSError:
        return False  # nobody may look into it


def beside(path: Path) -> list[str]:
    """Name what lies beside runs; nothing where it is hidden, or announces runs."""
    if path.name.startswith((".", "sweep-")):
        return []
    return [printable(path.name) + ("/" if path.is_dir() else "")]


def is_run(path: Path) -> bool:
    """Whether `path` is the folder of a run: by a file that only runs have, or its name and its config.json."""
    if any((path / name).is_file() for name in ("metrics.jsonl", "DONE", "FAILED")):
        return True
    # A folder of another kind may hold one of these, as that of a model does.
    named = re.search(r"-seed\d+$", path.name) is not None
    try:
        record = read_object(path / "config.json")
    except (RunError, OSError):
        return named
    if record is not None:
        return named or record.keys() >= {"experiment", "condition", "seed"}
    return named and (path / "lock").is_file()


def _order(state: RunState) -> tuple[str, int]:
    name, _, seed = state.name.rpartition("-seed")
    return (name, int(seed)) if seed.isdecimal() else (state.name, 0)


def _written(path: Path) -> float | None:
    for name in ("metrics.jsonl", "config.json", "lock"):
        try:
            return (path / name).stat().st_mtime
        except OSError:
            continue
    return None


def _told(run: StoredRun, done: dict[str, Any] | None) -> dict[str, Any]:
    """Return what a run's lines say; its times by `done`, where only the last line was read."""
    found: dict[str, Any] = {"limit": int(run.config["max_steps"])}
    if run.rows:
        runs = Runs((run,))
        found["step"] = int(runs.end[0])
        found["entropy"], found["test_accuracy"] = (
            _number(column[0, -1]) for column in (runs.entropy, runs.test_accuracy)
        )
        if done is None:
            found["t_mem"], found["t_grok"] = (_step(each[0]) for each in (runs.t_mem, runs.t_grok))
    if done is not None:
        found["t_mem"], found["t_grok"] = done["t_mem"], done["t_grok"]
    return found


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _step(value: float) -> int | None:
    return None if np.isnan(value) else int(value)


def _packed(path: Path) -> list[RunState]:
    try:
        runs = unpack(path)
        return [
            RunState(
                run.name,
                State.COMPLETE,
                detail=str((run.done or {}).get("reason", "")),
                written=max((row["time"] for row in run.timing if "time" in row), default=None),
                stored=run,
                identity=run.identity,
                **_told(run, None),
            )
            for run in runs
        ]
    except (RunError, OSError) as error:
        return [RunState(path.name, State.DAMAGED, detail=str(error))]


END = 1 << 14
"""Bytes read from the end of a file at first: several lines with every measure."""


@dataclass
class _Log:
    """The lines of a run's metrics, read on from where the last reading ended."""

    path: Path
    rows: list[dict[str, Any]] = field(default_factory=list)
    torn: bool = False
    _offset: int = 0

    def read(self, *, last: bool) -> None:
        """Read what is new; the `last` line alone, where that is enough."""
        if last:
            self.rows = list(_last_row(self.path))
            check_rows(self.path, self.rows)
            return
        if self._offset and self.path.stat().st_size < self._offset:
            self._begin_anew()  # a run that goes on drops what its checkpoint does not know
        whole = self._read_on()
        if not whole and self._offset:
            self._begin_anew()  # it was dropped, and written again to more than there was
            whole = self._read_on()
        if not whole:
            raise RunError(f"{self.path}: line {len(self.rows) + 1} is damaged, and rows follow it: {MEND}")

    def _begin_anew(self) -> None:
        self.rows, self._offset = [], 0

    def _read_on(self) -> bool:
        """Read the new rows; whether what follows them is nothing, or a line without an end."""
        rows, self._offset = read_rows(self.path, self._offset)
        check_rows(self.path, rows, len(self.rows) + 1)
        self.rows += rows
        self.torn = self.path.exists() and self.path.stat().st_size > self._offset
        return not (self.torn and _lines_after(self.path, self._offset))


def _lines_after(path: Path, offset: int) -> bool:
    """Whether a line that does not parse begins at `offset`, and has an end."""
    if read_rows(path, offset)[0]:
        return False  # it was being written
    with open_regular(path) as file:
        file.seek(offset)
        return b"\n" in file.read()


def _last_row(path: Path) -> Iterator[dict[str, Any]]:
    """Read the last whole line of a log, without those before it."""
    if not path.exists():
        return
    with open_regular(path) as file:
        size, length = path.stat().st_size, END
        while True:
            file.seek(max(0, size - length))
            lines = re.split(rb"(?<=\n)", file.read())
            # The first piece may be the end of a line; a last one without an end is torn.
            whole = [line for line in (lines if length >= size else lines[1:]) if line.endswith(b"\n")]
            if whole or length >= size:
                break
            length *= 4
    if whole:
        try:
            yield parse_object(whole[-1])
        except ValueError as error:
            raise RunError(f"{path}: its last line is no row of metrics ({error}): {MEND}") from error
