"""Runs as two tables, for pandas or polars: one of runs, one of their evaluations (docs/runs.md has the columns).

Runs are in them whatever their state. A run that cannot be read has its name, its state and the reason alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from fastent.display import Shown, Table, digits, whole
from fastent.grokking.experiments.data import Runs
from fastent.grokking.experiments.folder import Folder, RunState
from fastent.grokking.train.config import TrainConfig
from fastent.grokking.train.runs import MEASURED, NUMBERS
from fastent.records import Kind, columns, frame

__all__ = ["RunTable", "RunTables", "load_runs"]

WORDS, COUNT, NUMBER = str, int | None, float

RUN: Mapping[str, Kind] = {
    **dict.fromkeys(("run", "experiment", "condition"), WORDS),
    "seed": COUNT,
    **dict.fromkeys(("state", "detail"), WORDS),
    **dict.fromkeys(("step", "t_mem", "t_grok"), COUNT),
    **dict.fromkeys(("h_star", "entropy", "test_accuracy"), NUMBER),
}
SETTINGS: Mapping[str, Kind] = {
    name: {int: COUNT, float: NUMBER, bool: bool | None}.get(hint, WORDS)
    for name, hint in get_type_hints(TrainConfig).items()
}
# What every row has; measures bring more.
ROW: Mapping[str, Kind] = {
    "run": WORDS,
    "step": int,
    **{name: NUMBER if name in NUMBERS else WORDS for name in MEASURED},
}


@dataclass(frozen=True, repr=False)
class RunTable:
    """Columns with their types, in order; `to_pandas` and `to_polars` make a data frame of them."""

    kinds: Mapping[str, Kind]
    values: Mapping[str, list[Any]]

    def __len__(self) -> int:
        return len(next(iter(self.values.values())))

    def __repr__(self) -> str:
        return f"RunTable({len(self)} rows of {', '.join(self.kinds)})"

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        return list(self.kinds)

    def to_pandas(self) -> Any:
        """Give a data frame of pandas: string, float64, int64 and, where one may be missing, Int64 and boolean.

        Raises
        ------
        ModuleNotFoundError
            If pandas is not installed.
        """
        return frame("pandas", self.kinds, self.values)

    def to_polars(self) -> Any:
        """Give a data frame of polars, as `to_pandas`: String, Float64, Int64, Boolean, null where missing."""
        return frame("polars", self.kinds, self.values)


@dataclass(frozen=True, repr=False)
class RunTables(Shown):
    """The runs of a folder, as `fastent.load_runs` gives them; the column ``run`` joins the two tables.

    Attributes
    ----------
    runs : RunTable
        A row for each run: its state, its milestones, its settings.
    rows : RunTable
        A row for each evaluation of each run: its step and what was measured.
    """

    runs: RunTable
    rows: RunTable

    def __repr__(self) -> str:
        return f"RunTables({len(self.runs)} runs, {len(self.rows)} rows)"

    def _table(self) -> Table:
        names = ("run", "state", "step", "t_mem", "t_grok", "h_star")
        found = zip(*(self.runs.values[name] for name in names), strict=True)
        rows = [(run, state, *map(whole, steps), digits(h)) for run, state, *steps, h in found]
        return Table(
            f"{len(rows)} runs, {len(self.rows)} rows",
            rows,
            ("run", "state", "step", "T_mem", "T_grok", "H*"),
        )


def load_runs(path: str | os.PathLike[str]) -> RunTables:
    """Read the runs of a folder, whatever their state, into two tables.

    Parameters
    ----------
    path : str or PathLike
        The ``--out`` of ``fastent run``, the folder of one run, a folder of packed runs or one file of them. All else
        there is passed over. Nothing is written; runs may be in training.

    Returns
    -------
    RunTables
        Their columns are described in docs/runs.md.

    Raises
    ------
    fastent.grokking.train.storage.RunError
        If there is no such folder, or no run in it.

    Examples
    --------
    >>> import fastent
    >>> tables = fastent.load_runs("bench/results/paper/e1-baseline-add.parquet")  # doctest: +SKIP
    >>> tables.runs.to_pandas()[["seed", "t_mem", "t_grok", "h_star"]]  # doctest: +SKIP
    """
    found = Folder(Path(path), whole=True).look()
    rows = [
        {"run": state.name, **row} for state in found if state.stored is not None for row in state.stored.rows
    ]
    kinds = {**ROW, **_further(rows)}
    runs = {**RUN, **SETTINGS}
    return RunTables(
        RunTable(runs, columns(runs, map(_run, found))),
        RunTable(kinds, columns(kinds, ({**dict.fromkeys(kinds), **row} for row in rows))),
    )


def _further(rows: Sequence[Mapping[str, Any]]) -> dict[str, Kind]:
    """Columns that measures brought, in the order of their first rows: words where one of them is."""
    found: dict[str, Kind] = {}
    for row in rows:
        for name, value in row.items():
            if name not in ROW and found.get(name) is not WORDS:
                found[name] = WORDS if isinstance(value, str) else NUMBER
    return found


def _run(state: RunState) -> dict[str, Any]:
    values = {**dict.fromkeys((*RUN, *SETTINGS)), "run": state.name, "state": state.state.value}
    values |= {name: getattr(state, name) for name in values if name in _TOLD}
    run = state.stored
    if run is not None:
        values |= {"experiment": run.experiment, "condition": run.condition, "seed": run.seed}
        values["h_star"] = float(Runs((run,)).h_star[0]) if state.t_grok is not None else None
        values |= {name: _plain(value) for name, value in run.config.items() if name in SETTINGS}
    return values


_TOLD = ("detail", "step", "t_mem", "t_grok", "entropy", "test_accuracy")


def _plain(setting: Any) -> Any:
    return ", ".join(map(str, setting)) if isinstance(setting, list) else setting
