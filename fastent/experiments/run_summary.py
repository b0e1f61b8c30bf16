"""What ``fastent run`` prints at its end: a table of the runs for each experiment, condition and task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from fastent.experiments.claims import decimal, steps
from fastent.experiments.leads import left_out_threshold
from fastent.experiments.stored import read_runs


def print_summary(out: Path, names: set[str]) -> None:
    """Print the times, entropies and leads of each run, leads from the H* of the other seeds of its job.

    Parameters
    ----------
    out : Path
        Folder of runs.
    names : set of str
        Of the runs to print; those without a record are left out.
    """
    groups: dict[tuple[str, str, str], list[Any]] = {}
    for stored in read_runs(out):
        if stored.name in names and stored.rows:
            groups.setdefault((stored.experiment, stored.condition, stored.config["task"]), []).append(stored)
    console = Console()
    for key, runs in groups.items():
        table = Table(
            "seed",
            title=" ".join(key),
            caption="T_cross: first H under the mean H at T_grok of the other seeds",
            box=SIMPLE,
            padding=(0, 1, 0, 0),
            pad_edge=False,
        )
        for column in ("T_mem", "T_grok", "H at T_grok", "T_cross", "lead", "test", "steps"):
            table.add_column(column, justify="right")
        table.add_column("ended")
        measured = [run.measure() for run in runs]
        leads = left_out_threshold(measured)
        for i, (run, one) in enumerate(zip(runs, measured, strict=True)):
            s = one.summary
            numbers = (
                steps(s.t_mem),
                steps(s.t_grok),
                decimal(s.h_star),
                steps(leads.times[i]),
                steps(leads.leads[i]),
            )
            ended = run.state if run.done is None else run.done["reason"]
            table.add_row(str(run.seed), *numbers, decimal(s.test_accuracy_end), steps(s.last_step), ended)
        console.print(table)
