"""The report's last section: commands, run folders, settings and machines behind it."""

from __future__ import annotations

import functools
import json
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fastent.experiments.document import Block, Code, Section, Table, Text
from fastent.experiments.jobs import JOBS
from fastent.experiments.stored import PAPER, PRESETS_JSON, StoredRun
from fastent.train.presets import SOURCES, TrainConfig


def section(stored: Sequence[StoredRun], runs: Path, out: Path) -> Section:
    """Tell where the runs in the folder `runs` came from."""
    last = [shlex.join(["fastent", "report", str(runs), "--out", str(out)])]
    if any(not run.path.is_dir() for run in stored):
        source = str(run_folder(stored, runs))
        last.insert(0, shlex.join(["python", "-m", "fastent.experiments.records", source, str(runs)]))
    blocks: list[Block] = [
        Text(
            "The commands that made the runs and this page. The first goes on with runs that are not "
            "complete."
        ),
        Code("\n".join([*commands(stored, run_folder(stored, runs)), *last])),
        _runs_table(stored),
        _settings_table(stored),
        _environment_table(stored),
    ]
    return Section("origin", "Where the runs came from", tuple(blocks))


def provenance(stored: Sequence[StoredRun], runs: Path) -> Text:
    """Name the complete runs that one experiment's section rests on, and the commands that make them."""
    groups: dict[str, set[int]] = {}
    for run in stored:
        name = f"{run.experiment}-{run.condition}-{run.config['task']}"
        groups.setdefault(name, set()).add(run.seed)
    named = ", ".join(f"`{name}-seed{{{ranges(seeds)}}}`" for name, seeds in groups.items())
    made = ", ".join(f"`{each}`" for each in commands(stored, run_folder(stored, runs)))
    return Text(f"Runs of this section: {named}. Made by {made}.", "note")


def run_folder(stored: Sequence[StoredRun], runs: Path) -> Path:
    """Name the folder to train in: `runs`, but a folder of its own where those in it are packed."""
    packed = any(not run.path.is_dir() for run in stored)
    return Path("runs") / runs.name if packed else runs


def commands(stored: Sequence[StoredRun], runs: Path) -> list[str]:
    """Write the commands that make `stored`: as few as there are presets and changed settings behind the runs."""
    found = []
    # What explains one experiment's runs may not be read off them: some multiply a setting that was given.
    first = {(run.experiment, run.condition, run.config["task"]): run for run in reversed(stored)}
    ways = [(name, _changes(run, name)) for run in first.values() for name in PRESETS_JSON]
    for experiment in dict.fromkeys(run.experiment for run in stored):
        left = [run for run in stored if run.experiment == experiment]
        while left:
            own = [(name, _changes(left[0], name)) for name in PRESETS_JSON]
            name, changes = min(
                (way for way in [*ways, *own] if _explains(left[0], *way)),
                key=lambda way: (-sum(_explains(run, *way) for run in left), len(way[1])),
                default=(left[0].preset[0], {}),
            )
            made = [run for run in left if run is left[0] or _explains(run, name, changes)]
            seeds = {run.seed for run in made}
            found.append(command(experiment, name, _options(changes), seeds=seeds, runs=runs))
            left = [run for run in left if run not in made]
    return found


def of_one_setting(stored: Sequence[StoredRun]) -> bool:
    """Whether one preset with one set of changes is behind all of `stored`, whatever their experiments vary.

    Measures change nothing of the training and are left aside. A run of a kind that no experiment asks for varies
    nothing but its task.
    """
    groups = {(run.experiment, run.condition, json.dumps(run.config, sort_keys=True)): run for run in stored}
    first = list(groups.values())
    ways = [(name, _changes(run, name)) for run in first for name in PRESETS_JSON]
    ways += [run.preset for run in first]
    return any(all(_made_by(run, *way) for run in first) for way in ways)


def _made_by(run: StoredRun, preset: str, changes: dict[str, Any]) -> bool:
    if _asked(run, preset, changes) is not None:
        return _explains(run, preset, changes)
    return run.changes_from(preset) == changes


def command(
    experiment: str, preset: str, options: Sequence[str] = (), *, seeds: Iterable[int], runs: Path
) -> str:
    """Write the command that makes an experiment's runs."""
    place = ["--seeds", ranges(set(seeds)), "--out", str(runs)]
    return shlex.join(["fastent", "run", experiment, "--preset", preset, *options, *place])


def _changes(run: StoredRun, preset: str) -> dict[str, Any]:
    """Find the fewest settings that, changed in a preset, make the run's experiment ask for it as it is."""
    asked = _asked(run, preset, {})
    if asked is None:
        return {}
    changes = {key: run.config[key] for key, value in asked.items() if run.config.get(key, value) != value}
    for key in list(changes):
        # One setting may follow from another: a run to the end goes on for as long as the limit of steps.
        fewer = {name: value for name, value in changes.items() if name != key}
        if _explains(run, preset, fewer):
            changes = fewer
    return changes


def _explains(run: StoredRun, preset: str, changes: dict[str, Any]) -> bool:
    """Whether the run's experiment asks for it as it is, given a preset with `changes`; measures aside."""
    asked = _asked(run, preset, changes)
    # A setting that is younger than the run is not in its record.
    return asked is not None and {**asked, "measures": None} == {**asked, **run.config, "measures": None}


def _asked(run: StoredRun, preset: str, changes: dict[str, Any]) -> dict[str, Any] | None:
    """Return the settings that the run's experiment gives to a run of its kind; None if it asks for none."""
    kinds = _settings(run.experiment, preset, json.dumps(changes, sort_keys=True))
    return kinds.get((run.condition, run.config["task"]))


@functools.lru_cache(maxsize=1024)
def _settings(experiment: str, preset: str, changes: str) -> dict[tuple[str, str], dict[str, Any]]:
    """Return what an experiment asks for, by condition and task, given a preset with changes (JSON)."""
    make = JOBS.get(experiment)
    try:
        config = TrainConfig(**_frozen({**PRESETS_JSON[preset], **json.loads(changes)}))
        jobs = [] if make is None else make(config, (0,))
    except ValueError:  # changes that do not fit each other
        return {}
    return {(job.condition, job.config.task): job.settings() for job in jobs if job.experiment == experiment}


def _options(changes: dict[str, Any]) -> list[str]:
    words = []
    for key, value in changes.items():
        words.append(f"--{key.replace('_', '-')}")
        if value is not True:
            words += map(str, value if isinstance(value, list) else [value])
    return words


def _frozen(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}


def ranges(numbers: set[int]) -> str:
    """Write numbers as the command line reads them: "0-2,5"."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and parts[-1][-1] == number - 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ",".join("-".join(str(end) for end in part) for part in parts)


def _runs_table(stored: Sequence[StoredRun]) -> Table:
    rows = []
    for run in stored:
        name, changes = run.preset
        setting = name + "".join(f", {key} = {value}" for key, value in changes.items())
        rows.append((f"`{run.name}`", setting, str(len(run.rows)), run.state))
    return Table("Run folders.", ("folder", "setting", "evaluations", "state"), tuple(rows), (2,))


def _settings_table(stored: Sequence[StoredRun]) -> Table:
    rows = []
    for key in sorted({key for run in stored for key in run.config}):
        values = dict.fromkeys(str(run.config.get(key, "–")) for run in stored)
        here, there = "; ".join(values), str(PAPER.get(key, "–"))
        rows.append((f"`{key}`", here, "the same" if here == there else there, SOURCES.get(key, "–")))
    columns = ("setting", "these runs", "preset `paper`", "where the preset's value comes from")
    return Table("Every setting of the runs, and the source of the paper's.", columns, tuple(rows))


def _environment_table(stored: Sequence[StoredRun]) -> Table:
    rows = []
    for key in sorted({key for run in stored for key in run.environment}):
        values = dict.fromkeys(str(run.environment.get(key, "–")) for run in stored)
        rows.append((key, "; ".join(values)))
    if not rows:
        rows.append(("not recorded", "–"))
    return Table("Machine and software at the runs' first start.", ("what", "value"), tuple(rows))
