"""Checkpoints: a safetensors file with the tensors and a JSON file, written last, that makes it count.

The checkpoint of step s is the pair ``checkpoint-<s>.safetensors`` and ``checkpoint-<s>.json``. The JSON
holds the step, all state that is not a tensor, and two SHA-256 sums: the tensors' file's and its own
content's. A pair is used only if both agree with what is read, so a file cut short, emptied or with one bit
turned is never half-loaded.

Nothing here reads a pickle, because unpickling runs code: a file with a pickle's suffix is refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fastent.grokking.train.storage import (
    PICKLED,
    CheckpointError,
    Damaged,
    RunError,
    read_regular,
    seal,
    sync_folder,
    unseal,
    write_atomically,
)

SCHEMA_VERSION = 1
KEPT = 2

_NAME = re.compile(r"checkpoint-(\d+)\.(json|safetensors)")


@dataclass(frozen=True)
class Checkpoint:
    """The state after `step` steps: named tensors, and JSON values."""

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write `checkpoint` into `folder`; until the last rename the ones before it are all that counts.

    The bytes depend on the content alone, not on time or place.

    Raises
    ------
    OSError
        If the disk is full or the folder cannot be written; older checkpoints are intact.
    """
    # Copies: tensors that are views into one stack share its storage, which safetensors refuses.
    data = save(
        {name: tensor.detach().cpu().contiguous().clone() for name, tensor in checkpoint.tensors.items()}
    )
    record = {
        "schema_version": SCHEMA_VERSION,
        "step": checkpoint.step,
        "sha256": hashlib.sha256(data).hexdigest(),
        "state": checkpoint.state,
    }
    json_path = _path(folder, checkpoint.step, "json")
    # Written over a checkpoint of the same step, new tensors beside the old record would be a broken pair.
    json_path.unlink(missing_ok=True)
    write_atomically(_path(folder, checkpoint.step, "safetensors"), data)
    write_atomically(json_path, seal(record))


def read_checkpoint(folder: Path, step: int) -> Checkpoint:
    """Read and check the checkpoint of `step` in `folder`.

    Raises
    ------
    CheckpointError
        If a file is missing, does not parse, or does not have its checksum; the message names it with the
        expected and the found sum.
    RunError
        If a newer fastent wrote it: falling back would throw its work away.
    """
    json_path = _path(folder, step, "json")
    record = _read_record(json_path)
    if record["schema_version"] > SCHEMA_VERSION:
        raise RunError(
            f"{json_path}: schema {record['schema_version']} of a newer fastent; this one reads up to "
            f"{SCHEMA_VERSION}. Update fastent, or give another --out"
        )
    path = _path(folder, step, "safetensors")
    data = _read(path)
    found = hashlib.sha256(data).hexdigest()
    if found != record["sha256"]:
        raise CheckpointError(path, f"sha256 {record['sha256']}", f"{found} ({len(data)} bytes)")
    try:
        tensors = load(data)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            path, "a safetensors file", f"none, though its checksum is right: {error}"
        ) from error
    return Checkpoint(record["step"], tensors, record["state"])


def checkpoint_steps(folder: Path) -> list[int]:
    """List the steps of whole pairs in `folder`, ascending, their content not checked.

    Raises
    ------
    RunError
        If a pickled checkpoint lies there; it is not opened.
    """
    for path in sorted(folder.glob("*")):
        if path.suffix in PICKLED:
            raise RunError(
                f"{path}: a pickled checkpoint is refused, because loading one runs the code in it; only "
                "safetensors with JSON are read. Move it away to go on without it"
            )
    return sorted(
        int(m[1]) for path in folder.iterdir() if (m := _NAME.fullmatch(path.name)) and m[2] == "json"
    )


def remove_checkpoints(folder: Path, *, below: int = 0, above: int | None = None) -> None:
    """Remove the files of steps under `below`, and the checkpoints of steps over `above`.

    Tensors whose record is missing lie there until newer ones are whole: a killed process may have left them, or
    somebody may have lost the record of weights that are still good.
    """
    counted = set(checkpoint_steps(folder))
    removed = False
    # In order of name a record goes before its tensors: a removal cut short leaves tensors that do not count.
    for path in sorted(folder.iterdir()):
        match = _NAME.fullmatch(path.name)
        if match is None:
            continue
        step = int(match[1])
        if step < below or (above is not None and step > above and step in counted):
            path.unlink()
            removed = True
    if removed:
        sync_folder(folder)


def keep_newest(folder: Path, count: int = KEPT) -> None:
    """Remove all that is older than the `count` newest checkpoints."""
    remove_checkpoints(folder, below=min(checkpoint_steps(folder)[-count:], default=0))


def keep_last_sound(folder: Path) -> None:
    """Remove all that is older than the newest checkpoint that can be read; nothing where none can be."""
    steps = checkpoint_steps(folder)
    matches = [match for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    if all(int(match[1]) >= steps[-1] for match in matches if steps):
        return  # nothing to remove, so nothing to read
    for step in reversed(steps):
        with contextlib.suppress(CheckpointError):
            read_checkpoint(folder, step)
            remove_checkpoints(folder, below=step)
            return


def _path(folder: Path, step: int, suffix: str) -> Path:
    return folder / f"checkpoint-{step}.{suffix}"


def _read(path: Path) -> bytes:
    try:
        return read_regular(path)
    except FileNotFoundError as error:
        raise CheckpointError(path, "a file", "none") from error


def _read_record(path: Path) -> dict[str, Any]:
    data = _read(path)
    try:
        record = unseal(path, data, must=True)
    except Damaged as error:
        raise CheckpointError(path, error.expected, error.found) from error
    version, step, state = (record.get(name) for name in ("schema_version", "step", "state"))
    named = isinstance(step, int) and path == _path(path.parent, step, "json")
    if not (named and isinstance(version, int) and isinstance(state, dict) and "sha256" in record):
        raise CheckpointError(path, "a record of its name's step", f"schema {version!r}, step {step!r}")
    return record
