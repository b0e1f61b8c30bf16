"""Runs of one's own: `train` takes any task, model, condition and measures, by name or as they are.

Folders, resume, reports and the commands that look at runs are those of the paper's experiments; the experiment in the
names of the folders is "own". What is not of this package is recorded in ``config.json`` with the package that it came
from (``guests``). ``fastent run own`` is the same from the command line, for names.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastent.grokking.train.conditions import ConditionMaker
from fastent.grokking.train.config import TrainConfig, changed_from
from fastent.grokking.train.config import preset as preset_called
from fastent.grokking.train.loop import Observer
from fastent.grokking.train.measures import Measure
from fastent.grokking.train.models import Condition, ModelMaker
from fastent.grokking.train.registry import Kind, check_known, find, names, names_in, register
from fastent.grokking.train.runs import OWN, Job, in_words, plan_stacks, read_record
from fastent.grokking.train.storage import RunError, StopRequest
from fastent.grokking.train.sweep import check_jobs, check_seeds, run_jobs
from fastent.grokking.train.tasks import Task, TaskMaker


def train(
    task: str | TaskMaker | Task = "add",
    *,
    model: str | ModelMaker = "transformer",
    condition: str | ConditionMaker | Condition = "baseline",
    measures: Sequence[str | Measure] = (),
    preset: str = "quick",
    seeds: Sequence[int] = (0, 1, 2),
    out: str | Path = "runs",
    workers: int = 1,
    device: str = "cpu",
    quiet: bool = False,
    force: bool = False,
    observers: Sequence[Observer] = (),
    **settings: Any,
) -> list[Path]:
    """Train a task, or go on with those of its runs that are not complete.

    Ctrl-C saves and stops; the same call goes on.

    Parameters
    ----------
    task : str, TaskMaker or Task
        A name, or a function of a `TrainConfig` that returns a `Task`.
    model : str or ModelMaker
        A name, or a function of a `TrainConfig` and a `Task` that returns a `torch.nn.Module`, such as its class.
    condition : str, ConditionMaker or Condition
        A name with its argument, such as "losses-0.1", several of them joined by "+"; or an object.
    measures : sequence of str or Measure
        Further columns at each evaluation: names, or functions of a `Moment`.
    preset : str
        What the settings start from.
    seeds : sequence of int
        One run each.
    out : str or Path
        Folder of the run folders.
    workers : int
        Processes. More than one know the names of installed packages only: objects need 1.
    device : str
        Where to train, as torch names it.
    quiet : bool
        No progress bar. It needs rich and a terminal.
    force : bool
        Go on although folders hold other settings.
    observers : sequence of Observer
        Told of each row.
    **settings
        Fields of `TrainConfig`, such as ``modulus=59``.

    Returns
    -------
    list of Path
        The folder of each seed, complete.

    Raises
    ------
    ValueError
        If a name is not there or settings do not fit; nothing was begun.
    RunError
        If a run failed; the others are complete. `Interrupted`, if it was stopped.

    Examples
    --------
    >>> train("add", condition="losses-0.2", modulus=59, seeds=[0, 1], out="runs/mixed")  # doctest: +SKIP
    """
    out = Path(out)
    given = (
        _named("task", task, out),
        _named("model", model, out),
        _named("condition", condition, out),
        tuple(_named("measure", measure, out) for measure in measures),
    )
    config = preset_called(preset, task=given[0], model=given[1], measures=given[3], **settings)
    seeds = tuple(seeds)
    check_seeds(len(seeds), max(seeds, default=0))
    job = own_job(config, preset, seeds, given[2])
    if workers > 1 and (here := [f"{g['kind']} {g['name']!r}" for g in job.guests() if not g["package"]]):
        raise ValueError(
            f"{', '.join(here)}: known in this process alone, and not to {workers} workers: leave workers at 1, or "
            "make a package with an entry point (docs/extending.md)"
        )
    check_jobs([job], out, workers=workers, device=device, force=force)
    with contextlib.ExitStack() as opened:
        watching = list(observers)
        if not quiet and importlib.util.find_spec("rich") is not None:
            from fastent.grokking.train.progress import ProgressBar

            watching.append(opened.enter_context(ProgressBar([job])))
        main = threading.current_thread() is threading.main_thread()
        stop = opened.enter_context(StopRequest()) if main else None
        outcomes = run_jobs(
            plan_stacks(job, out, workers),
            out,
            workers=workers,
            device=device,
            force=force,
            observers=watching,
            stop=stop,
        )
    if failed := [each for each in outcomes if each.error is not None]:
        raise RunError(
            "; ".join(f"{', '.join(map(each.job.run_name, each.job.seeds))}: {each.error}" for each in failed)
        )
    return [out / job.run_name(seed) for seed in seeds]


def own_job(config: TrainConfig, preset: str, seeds: Sequence[int], condition: str = "baseline") -> Job:
    """Return the job of runs of one's own, named by what `config` changes in the preset."""
    return Job(OWN, condition, config, tuple(seeds), changed_from(config, preset))


def check_there(kind: Kind, name: str, out: Path) -> None:
    """Check that a name is there.

    Raises
    ------
    ValueError
        If it is not: the names that are, and the package that runs in `out` had it from.
    """
    try:
        check_known(kind, name)
    except ValueError as error:
        for path in sorted(out.glob("*/config.json")):
            for guest in _guests(path.parent):
                if (guest["kind"], guest["name"]) == (kind, name):
                    remedy = "install it" if guest["package"] else "give it again"
                    raise ValueError(
                        f"{in_words(guest)}, which {path.parent.name} was trained with, is not there: {remedy}"
                    ) from error
        raise


def _guests(path: Path) -> list[dict[str, str]]:
    try:
        return list((read_record(path) or {}).get("guests", []))
    except (OSError, RunError):
        return []  # what cannot be read is refused where it is asked for


def _named(kind: Kind, given: Any, out: Path) -> str:
    """Return the name of what is given, registered if it is no name."""
    if isinstance(given, str):
        for name in names_in(given) if kind == "condition" else [given]:
            check_there(kind, name, out)
        return given
    if isinstance(given, Task | Condition):
        name = given.name if isinstance(given, Task) else _as_name(type(given).__name__)
        register(kind, name, _Made(given))
        return name
    name = _as_name(getattr(given, "__name__", type(given).__name__))
    installed = [each for each in names(kind) if each.name == name and each.package]
    if not (len(installed) == 1 and find(kind, name) is given):
        register(kind, name, given)
    return name


class _Made:
    """The maker of what is made already."""

    def __init__(self, value: Task | Condition) -> None:
        self._value = value
        self.__module__, self.__qualname__ = type(value).__module__, type(value).__qualname__

    def __call__(self, *_: object) -> Task | Condition:
        return self._value


def _as_name(name: str) -> str:
    """Write the name of a class as a name: "TwoLayers" as "two_layers"."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
