"""Files that survive a crash: whole-file writes that are all or nothing, and logs of one JSON object a line.

A whole file is written under a temporary name, synced, renamed and its folder synced, so that a reader finds
the old content or the new one, also after a power cut. A log is only ever appended to; a line that a crash
cut short has no newline (or does not parse), and is dropped with all that follows it when the log is opened
again.

Errors are `OSError` with the file's name in it, so that a message can say what was full or read-only.
"""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from pathlib import Path
from typing import Any

from fastent.train.errors import RunWarning

TEMPORARY = ".tmp"


def write_atomically(path: Path, data: bytes) -> None:
    """Put `data` at `path`, or leave what was there.

    Raises
    ------
    OSError
        If the disk is full or the folder cannot be written; the temporary file is gone then.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with open(temporary, "wb", buffering=0) as file:
            _write_all(file.fileno(), data)
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from error
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` (a rename, a removal) last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_temporaries(folder: Path) -> None:
    """Remove what writes of a killed process left behind; only the holder of the folder's lock may."""
    for path in folder.glob("*" + TEMPORARY):
        path.unlink(missing_ok=True)


def dump_json(value: Any) -> bytes:
    """`value` as readable JSON: sorted keys, a newline at the end, never NaN or Infinity."""
    return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


class JsonLines:
    """A log of one JSON object a line, each on its way to the disk before `append` returns.

    Parameters
    ----------
    path : Path
        Opened for appending when the first row comes; its whole rows are read into `rows` at once.

    Attributes
    ----------
    rows : list of dict
        All whole rows, in order.

    Warns
    -----
    RunWarning
        If the end of the file is torn; those bytes are removed by the next `append` or `keep`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self._ends: list[int] = []
        self._descriptor: int | None = None
        data = path.read_bytes() if path.exists() else b""
        end = 0
        for line in data.splitlines(keepends=True):
            row = _parse(line)
            if row is None:
                break
            end += len(line)
            self.rows.append(row)
            self._ends.append(end)
        if end < len(data):
            warnings.warn(
                f"{path}: line {len(self.rows) + 1} is torn; {len(data) - end} bytes from there on dropped",
                RunWarning,
                stacklevel=2,
            )
        self._length = len(data)

    def append(self, row: dict[str, Any]) -> None:
        """Add `row` to the file and to `rows`; on a failure the file ends where it ended before.

        Raises
        ------
        OSError
            If the line cannot be written.
        ValueError
            If `row` holds NaN or an infinity.
        """
        line = (json.dumps(row, allow_nan=False) + "\n").encode()
        end = self._ends[-1] if self._ends else 0
        self.keep(len(self.rows))
        try:
            if self._descriptor is None:
                self._descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            _write_all(self._descriptor, line)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(self.path, end)
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        self.rows.append(row)
        self._length = end + len(line)
        self._ends.append(self._length)

    def keep(self, count: int) -> None:
        """Drop all rows after the first `count`, and a torn end, in the file too."""
        del self.rows[count:], self._ends[count:]
        end = self._ends[-1] if self._ends else 0
        if end < self._length:
            os.truncate(self.path, end)
            self._length = end

    def sync(self) -> None:
        """Make the rows last through a power cut."""
        if self._descriptor is not None:
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file; a later `append` opens it again."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _parse(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def read_rows(path: Path, offset: int) -> tuple[list[dict[str, Any]], int]:
    """Read the whole rows that begin at byte `offset` of a log which another process is writing.

    Returns
    -------
    rows : list of dict
        Empty if there is no such file yet.
    offset : int
        Where to go on next time.
    """
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            data = file.read()
    except FileNotFoundError:
        return [], offset
    rows = []
    for line in data.splitlines(keepends=True):
        row = _parse(line)
        if row is None:
            break
        rows.append(row)
        offset += len(line)
    return rows, offset
