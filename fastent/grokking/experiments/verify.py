"""What of runs is damaged, and what makes it again: the answer of ``fastent verify``.

Every file of a run is held to its checksum (`fastent.grokking.train.runs`), the checkpoint too, and every packed file
to its own. Runs and files from before there were checksums are read through and said to be unchecked. What can be made
again is what follows from the configuration: a run is trained anew, to the same bits on the same machine, or goes on
from its newest checkpoint that is whole. Nothing is written.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastent.grokking.experiments.data import PACK_AGAIN, REMEDY, StoredRun, is_checked, unpack
from fastent.grokking.experiments.folder import beside, holds_runs, is_run, skipped
from fastent.grokking.train.runs import damages, has_checksums, what_is_left
from fastent.grokking.train.storage import Damaged, RunError, read_object

GOOD, UNCHECKED, DAMAGED = "good", "unchecked", "damaged"


@dataclass(frozen=True)
class Verified:
    """A run's folder or a packed file: good, unchecked or damaged; its damages, and what to do about them."""

    path: Path
    state: str
    damages: Sequence[Damaged] = ()
    remedy: str = ""
    command: str = ""


def verify(path: Path, *, as_json: bool = False) -> int:
    """Print what is damaged in a folder of runs, a run's folder or a packed file, and what makes it again.

    Parameters
    ----------
    path : Path
    as_json : bool
        One JSON object.

    Returns
    -------
    int
        Exit status: 1 if anything is damaged, else 0.

    Raises
    ------
    RunError
        If there is nothing to verify, or what was written by a newer fastent.
    """
    found, foreign = look(path)
    worst = any(each.state == DAMAGED for each in found)
    if as_json:
        print(json.dumps({"path": str(path), "runs": [*map(_as_json, found)], "skipped": foreign}))
        return int(worst)
    for each in found:
        if each.state == DAMAGED:
            lines = [f"{each.path}: {each.state}", *(damage.finding for damage in each.damages), each.remedy]
            print("\n  ".join([*lines, each.command] if each.command else lines), end="\n\n")
    counts = Counter(each.state for each in found)
    words = {UNCHECKED: " (from before there were checksums)"}
    said = (
        f"{counts[state]} {state}{words.get(state, '')}"
        for state in (GOOD, UNCHECKED, DAMAGED)
        if counts[state]
    )
    print(f"{path}: {', '.join(said)}")
    if foreign:
        print(skipped(foreign))
    return int(worst)


def look(path: Path) -> tuple[list[Verified], list[str]]:
    """Verify what is at `path`, and name what lies there and is no run. Raises `RunError` as `verify`."""
    if not path.exists():
        raise RunError(f"{path} does not exist: {REMEDY}")
    alone = path.is_file() or is_run(path)
    found, foreign = list[Verified](), list[str]()
    for each in [path] if alone else sorted(path.iterdir()):
        if holds_runs(each):
            found.append(_packed(each) if each.is_file() else _folder(each))
        else:
            foreign += beside(each)
    if not found:
        raise RunError(f"{path} holds no run: {REMEDY}")
    return found, foreign


def _packed(path: Path) -> Verified:
    try:
        unpack(path)
    except Damaged as damaged:
        return Verified(path, DAMAGED, (damaged,), PACK_AGAIN)
    return Verified(path, GOOD if is_checked(path) else UNCHECKED)


def _folder(path: Path) -> Verified:
    try:
        found, step = _damages(path)
    except RunError as error:  # such as a pickled checkpoint
        return Verified(path, DAMAGED, (), str(error))
    if not found:
        return Verified(path, GOOD if has_checksums(path) else UNCHECKED)
    return Verified(path, DAMAGED, found, _remedy(path, found, step), _command(path))


def _damages(path: Path) -> tuple[list[Damaged], int | None]:
    """Find what of a run is damaged, and the step from which it goes on where it is not complete."""
    found, step = _look_once(path)
    if found:
        # What a run in training was about to replace, or removed as it ended, is no damage: gone at a second look.
        seen = {damage.finding for damage in found}
        again, step = _look_once(path)
        found = [damage for damage in again if damage.finding in seen]
    return found, step


def _look_once(path: Path) -> tuple[list[Damaged], int | None]:
    if (path / "DONE").exists():
        return damages(path, checkpoint=True), None
    return what_is_left(path)


COPY = "put what is damaged back from a copy"
ANEW = f"{COPY}, or move {{path}} away, and this trains it anew:"


def _remedy(path: Path, found: Sequence[Damaged], step: int | None) -> str:
    """Say what to do about the damages of a run; `step` is where one that is not complete can go on."""
    names = {damage.path.name for damage in found}
    closing = {"DONE", "timing.jsonl", "environment.json"}
    if (path / "DONE").exists():
        if names <= closing:
            gone = " and ".join(name for name in ("environment.json", "DONE") if name in {*names, "DONE"})
            return f"{COPY}, or remove {gone}: no result is lost, and this closes the run again:"
        weights = all(name.startswith("checkpoint-") for name in names)
        return f"{'the metrics are whole, the weights are not: ' if weights else ''}{ANEW.format(path=path)}"
    if step is None or "config.json" in names:
        return ANEW.format(path=path)
    gone = "remove environment.json, and " if "environment.json" in names else ""
    return f"{gone}this goes on from step {step:,} and writes again what follows:"


def _command(path: Path) -> str:
    """Return the command that makes the run in the folder `path`; "" where its settings cannot be read."""
    from fastent.grokking.experiments.report import commands

    try:
        run = StoredRun(path, read_object(path / "config.json") or {}, {}, (), (), None, None)
        return commands([run], path.parent)[0]
    except (RunError, OSError):
        return "the command that made it"


def _as_json(found: Verified) -> dict[str, Any]:
    return {
        "path": str(found.path),
        "state": found.state,
        "damages": [
            {"file": str(each.path), "row": each.row, "expected": each.expected, "found": each.found}
            for each in found.damages
        ],
        "remedy": found.remedy,
        "command": found.command,
    }
