"""One progress bar for the whole of ``fastent run``: jobs, steps, losses, accuracies, entropy; what alone needs rich.

Silent when its stream is not a terminal. The bar counts steps of single runs up to their limits; a run that
ends early gives the rest of its steps at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from statistics import fmean
from types import TracebackType
from typing import Any, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Column

from fastent.grokking.train.runs import Job, Row

SHOWN = (("loss", "train_loss", ".1e"), ("train", "train_accuracy", ".2f"), ("test", "test_accuracy", ".2f"))


class ProgressBar:
    """An `Observer` that draws; a context manager.

    Parameters
    ----------
    jobs : sequence of Job
        All that will be trained.
    quiet : bool
        Draw nothing.
    stream : text stream, optional
        Where to draw, standard error if not given.
    """

    def __init__(self, jobs: Sequence[Job], *, quiet: bool = False, stream: TextIO | None = None) -> None:
        self._steps = {(job, seed): 0 for job in jobs for seed in job.seeds}
        self._rows: dict[tuple[Job, int], Row] = {}
        console = Console(file=stream or sys.stderr)
        self._bar = Progress(
            # Where the terminal is narrow, the text gives way from its end.
            TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
            BarColumn(bar_width=8),
            TaskProgressColumn(),
            TimeRemainingColumn(compact=True),
            expand=True,
            console=console,
            disable=quiet or not console.is_terminal,
        )
        total = sum(job.config.max_steps for job, _ in self._steps)
        self._task = self._bar.add_task("starting", total=total)

    def row(self, job: Job, seed: int, row: Row) -> None:
        """Show the job of `row`, averaged over its seeds that are still in training."""
        self._rows[job, seed] = row
        self._steps[job, seed] = row["step"]
        rows = [row for (other, _), row in self._rows.items() if other == job]
        self._bar.update(self._task, completed=sum(self._steps.values()), description=_words(job, rows))

    def done(self, job: Job, seed: int) -> None:
        """Count the run as a whole."""
        self._rows.pop((job, seed), None)
        self._steps[job, seed] = job.config.max_steps
        self._bar.update(self._task, completed=sum(self._steps.values()))

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()


def _words(job: Job, rows: Sequence[Row]) -> str:
    name = " ".join(
        (job.experiment, job.config.task, *([job.condition] if job.condition != "baseline" else []))
    )
    step = max(row["step"] for row in rows)
    parts = [f"{label} {_mean(rows, key):{form}}" for label, key, form in SHOWN if _known(rows, key)]
    entropy = f"H {_mean(rows, 'entropy'):.3f}" if _known(rows, "entropy") else "H -"
    return " ".join([f"{name} step {step:,}", *parts, entropy])


def _known(rows: Sequence[Row], key: str) -> list[Any]:
    return [row[key] for row in rows if row[key] is not None]


def _mean(rows: Sequence[Row], key: str) -> float:
    return fmean(_known(rows, key))
