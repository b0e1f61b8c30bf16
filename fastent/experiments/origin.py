"""The report's last section: commands, run folders, settings and machines behind it."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

from fastent.experiments.document import Block, Code, Section, Table, Text
from fastent.experiments.stored import PAPER, StoredRun
from fastent.train.presets import SOURCES


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
    """Write the commands that make `stored`, one for each experiment and preset."""
    seeds: dict[tuple[str, str], set[int]] = {}
    for run in stored:
        name, _ = run.preset
        seeds.setdefault((run.experiment, name), set()).add(run.seed)
    return [command(experiment, name, numbers, runs) for (experiment, name), numbers in seeds.items()]


def command(experiment: str, preset: str, seeds: Iterable[int], runs: Path) -> str:
    """Write the command that makes an experiment's runs."""
    numbers = ranges(set(seeds))
    return shlex.join(
        ["fastent", "run", experiment, "--preset", preset, "--seeds", numbers, "--out", str(runs)]
    )


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
