"""A run's folder kept whole: files written at once or not at all, logs, the lock, signals, and what can go wrong.

Files are written whole under a temporary name, synced, renamed and their folder synced, so that a reader finds the old
content or the new one, also after a power cut. A log has one JSON object a line and is only ever appended to; a line
that a crash cut short has no newline (or does not parse), and is dropped with all that follows it when the log is
opened again. Errors are `OSError` with the file's name in it, so that a message can say what was full or read-only.

One process has a folder: by `flock` on the file ``lock``, so that it ends with its process however that dies; the
file names the holder (pid, host) for the message that another process gets. Where the file system has no `flock`,
the pid in the file decides: a holder on this host that is dead no longer counts, one on another host does. POSIX only.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self


class RunError(RuntimeError):
    """Error that keeps a run from starting or going on; what is on disk is left as it was."""


class RunLocked(RunError):
    """Refusal of a run folder that another process holds."""


class CheckpointError(RunError):
    """Error of one checkpoint that cannot be used; the one before it may."""


class RowsLost(CheckpointError):
    """Error of a whole checkpoint without all rows of metrics before it."""


class Interrupted(RunError):
    """End of a run that a signal asked to stop, and that stopped after saving.

    Attributes
    ----------
    signal : int
        The signal's number; the exit status of a shell command is 128 more.
    """

    def __init__(self, signal: int, message: str) -> None:
        super().__init__(message)
        self.signal = signal


class RunWarning(UserWarning):
    """Warning of what is not as it should be in a run that goes on."""


SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Watch for the signals while open (``with``, main thread only); `signal` is the first to come, or None."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            # Nothing is flushed or unwound: whatever is on disk is what a SIGKILL would have left.
            os._exit(128 + number)
        self.signal = number

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


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
        for row, end in _whole_rows(data):
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


def _whole_rows(data: bytes) -> Iterator[tuple[dict[str, Any], int]]:
    """Rows of a log, each with where it ends, up to the first line that is torn."""
    end = 0
    for line in data.splitlines(keepends=True):
        if not line.endswith(b"\n"):
            return
        try:
            row = json.loads(line)
        except ValueError:
            return
        if not isinstance(row, dict):
            return
        end += len(line)
        yield row, end


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
    found = list(_whole_rows(data))
    return [row for row, _ in found], offset + (found[-1][1] if found else 0)


LOCK_NAME = "lock"


# Not `filelock` (read at 4.3.1): its refusal names no holder, and of file systems without flock it knows ENOSYS alone.
class RunLock:
    """The right to write into `folder`, held from `acquire` (or ``with``) to `release`."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK_NAME
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Take the lock; one left by a dead process is taken over.

        Raises
        ------
        RunLocked
            If another process holds it; the message has its pid and host.
        OSError
            If the folder cannot be written.
        """
        while self._descriptor is None:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                self._lock(descriptor)
                # The last holder may have removed the file between our open and our lock.
                if _same_file(descriptor, self.path):
                    _write_holder(descriptor)
                    self._descriptor = descriptor
            finally:
                if self._descriptor is None:
                    os.close(descriptor)

    def _lock(self, descriptor: int) -> None:
        import fcntl  # where there is none, only training needs it

        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunLocked(self._refusal(_read_holder(descriptor))) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            holder = _read_holder(descriptor)
            if holder is not None and may_live(*holder):
                raise RunLocked(self._refusal(holder)) from error
            warnings.warn(
                f"{self.path.parent}: this file system has no locks ({error.strerror}); two processes that "
                "start here at the same instant would not see each other",
                RunWarning,
                stacklevel=4,
            )

    def _refusal(self, holder: tuple[int, str] | None) -> str:
        who = "another process" if holder is None else f"process {holder[0]} on host {holder[1]}"
        refusal = f"{self.path.parent} is in use by {who}: wait for it, stop it, or give another --out"
        if holder is not None and holder[1] != socket.gethostname():
            refusal += f"; if that process is gone, which cannot be seen from here, remove {self.path}"
        return refusal

    def release(self) -> None:
        """Give the lock back and remove its file."""
        if self._descriptor is None:
            return
        try:
            # Removed while still held, so that nobody can lock the name in between.
            with contextlib.suppress(OSError):
                self.path.unlink()
        finally:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()


def holder(folder: Path) -> tuple[int, str] | None:
    """Process that has `folder`, pid and host, as its lock names it; None if none does, or it is dead.

    The lock itself is left alone, so that looking at a folder keeps nobody from taking it. A process on another host
    counts as alive.
    """
    try:
        named = _parsed_holder((folder / LOCK_NAME).read_bytes())
    except FileNotFoundError:
        return None
    return named if named is not None and may_live(*named) else None


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _write_holder(descriptor: int) -> None:
    data = json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode()
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, data, 0)


def _read_holder(descriptor: int) -> tuple[int, str] | None:
    return _parsed_holder(os.pread(descriptor, 4096, 0))


def _parsed_holder(data: bytes) -> tuple[int, str] | None:
    try:
        holder = json.loads(data)
        return int(holder["pid"]), str(holder["host"])
    except (ValueError, KeyError, TypeError):
        return None


def may_live(pid: int, host: str) -> bool:
    """Whether a process may be alive that is not this one; on another host it may always."""
    if host != socket.gethostname():
        return True
    if pid == os.getpid():
        return False  # our own earlier life under the same number, after a reboot or in a container
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
