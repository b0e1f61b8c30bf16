"""A run's folder kept whole: files written at once or not at all, logs, checksums, the lock, signals, errors.

Files are written whole under a temporary name, synced, renamed and their folder synced, so that a reader finds the old
content or the new one, also after a power cut. A log has one JSON object a line and is only ever appended to; a line
that a crash cut short has no newline, and is dropped when the log is opened again. Errors are `OSError` with the file's
name in it, so that a message can say what was full or read-only.

What a disk or a copy damages is noticed. A JSON file of ours is sealed: its member ``record_sha256`` is the SHA-256 of
the others, and its bytes are those that `dump_json` makes of them. The last member of a row of a log with checksums,
``crc32``, continues the CRC-32 of the row before over the row's own bytes: whatever is changed, missing, doubled or
swapped shows at the first row that does not continue its forerunner. What ends a log early shows where its length is
written down: in the checkpoint, and in DONE. Files from before there were checksums are read without.

One process has a folder: by `flock` on the file ``lock``, so that it ends with its process however that dies; the
file names the holder (`Process`) for the message that another process gets. Where the file system has no `flock`,
what the file names decides: a holder on this host that is dead no longer counts, nor does another process under its
number; one on another host does. A holder whose lock was removed or taken writes no more. POSIX only.

A folder may come from anybody. Nothing is written through a link, and nothing is read that is no regular file, for a
pipe would never end; what a JSON file holds is checked field by field before it is used.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import reprlib
import signal
import socket
import stat
import time
import warnings
import zlib
from array import array
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self


class RunError(RuntimeError):
    """Error that keeps a run from starting or going on; what is on disk is left as it was."""


class RunLocked(RunError):
    """Refusal of a run folder that another process holds."""


MEND = "put it back from a copy, or move the folder away to train the seed anew"


class Damaged(RunError):
    """Error of a file that does not hold what was written to it.

    Attributes
    ----------
    path : Path
    row : int or None
        Of a log, from 1.
    expected, found : str
    finding : str
        All of these in words; the message says what to do besides.
    """

    def __init__(
        self, path: Path, expected: str, found: str, *, row: int | None = None, remedy: str = MEND
    ) -> None:
        self.path, self.row, self.expected, self.found = path, row, expected, found
        what = "damaged" if row is None else f"row {row} is damaged"
        self.finding = f"{path}: {what}: expected {expected}, found {found}"
        super().__init__(f"{self.finding}: {remedy}")

    def replaced(self, remedy: str) -> Damaged:
        """Return the same with another remedy."""
        return Damaged(self.path, self.expected, self.found, row=self.row, remedy=remedy)


class CheckpointError(Damaged):
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

PICKLED = (".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".bin")
"""Suffixes of files that are refused unread: reading a pickle runs the code in it."""


def write_atomically(path: Path, data: bytes) -> None:
    """Put `data` at `path`, or leave what was there.

    Raises
    ------
    OSError
        If the disk is full or the folder cannot be written; the temporary file is gone then. If a folder lies where
        the temporary file belongs; it is left alone.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    if temporary.is_dir() and not temporary.is_symlink():
        raise OSError(
            errno.EISDIR, "a folder lies where a temporary file belongs, move it away", str(temporary)
        )
    try:
        # What a killed process left, or a link that would be written through, is no file of this write.
        temporary.unlink(missing_ok=True)
        with open(temporary, "xb", buffering=0) as file:
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


def make_folder(path: Path) -> None:
    """Make the folder `path` and those above it, where they are not there; they last through a power cut."""
    new = [each for each in (path, *path.parents) if not each.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for each in new:
        sync_folder(each.parent)


def remove_temporaries(folder: Path) -> None:
    """Remove what writes of a killed process left behind; only the holder of the folder's lock may. No folders."""
    for path in folder.glob("*" + TEMPORARY):
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)


def dump_json(value: Any) -> bytes:
    """`value` as readable JSON: sorted keys, a newline at the end, never NaN or Infinity."""
    return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


DEEPEST = 32
"""Levels of lists and objects that a JSON file of ours may have: more could not be written out again."""


def parse_object(data: bytes) -> dict[str, Any]:
    """Parse one JSON object.

    Raises
    ------
    ValueError
        If `data` is something else, is nested deeper than `DEEPEST`, or holds NaN or Infinity, which JSON has not.
    """
    try:
        value = json.loads(data, parse_constant=_no_number)
    except RecursionError:
        raise ValueError(f"it is nested more than {DEEPEST} levels deep") from None
    if not isinstance(value, dict):
        raise ValueError(f"it holds {reprlib.repr(value)}, no object")
    level: list[Any] = [value]
    for _ in range(DEEPEST):
        level = [inner for each in level for inner in _inside(each)]
    if level:
        raise ValueError(f"it is nested more than {DEEPEST} levels deep")
    return value


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _inside(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []


SEAL = "record_sha256"
"""Member of a sealed record that holds the checksum of the others."""


def seal(record: dict[str, Any]) -> bytes:
    """`record` as `dump_json` writes it, with the checksum of its content."""
    return dump_json({**record, SEAL: _content_sum(record)})


def unseal(path: Path, data: bytes, *, must: bool = False, remedy: str = MEND) -> dict[str, Any]:
    """Return the record that `data`, the content of the file `path`, holds, its checksum verified and left out.

    Raises
    ------
    Damaged
        If it is no JSON object or not what was sealed, or if it has no checksum where it `must`: by what it is, or
        by its schema version, which is 2 at least where there are checksums.
    """
    try:
        record = parse_object(data)
    except ValueError as error:
        raise Damaged(path, "a JSON object", f"none ({error})", remedy=remedy) from error
    expected = record.pop(SEAL, None)
    if expected is None:
        version = record.get("schema_version")
        if must or (type(version) is int and version > 1):
            raise Damaged(path, f"{SEAL}, the checksum of its content", "none", remedy=remedy)
        return record
    found = _content_sum(record)
    if found != expected:
        raise Damaged(path, f"sha256 {expected} of its content", found, remedy=remedy)
    if dump_json({**record, SEAL: expected}) != data:  # such as a digit too many for a float to hold
        raise Damaged(path, "the bytes of its content", "others of the same meaning", remedy=remedy)
    return record


def _content_sum(record: dict[str, Any]) -> str:
    canonical = json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def read_object(path: Path, remedy: str = MEND) -> dict[str, Any] | None:
    """Read the JSON object in the file `path`, sealed or from before there were checksums; None without the file.

    Raises
    ------
    Damaged
        If it holds something else than was written; the message has `remedy`, what to do then.
    """
    try:
        return unseal(path, read_regular(path), remedy=remedy)
    except FileNotFoundError:
        return None


def read_regular(path: Path) -> bytes:
    """Read a regular file.

    Raises
    ------
    RunError
        If it is none: a folder, or a pipe or device, whose reading might never end.
    """
    with open_regular(path) as file:
        return file.read()


def open_regular(path: Path) -> io.BufferedReader:
    """Open a file for reading; raises as `read_regular`."""
    return open(path, "rb", opener=_regular)


def _regular(path: str, flags: int) -> int:
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise RunError(f"{path} is no regular file: move it away")
    return descriptor


def _open_own(path: Path, flags: int) -> int:
    """Open a file for writing, made if it is not there; raises RunError where what is written would land elsewhere."""
    try:
        descriptor = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO):
            raise
        what = "a link" if error.errno == errno.ELOOP else "a pipe"
        raise RunError(f"{path} is {what}, and is not written through: {_OWN}") from error
    found = os.fstat(descriptor)
    if stat.S_ISREG(found.st_mode) and found.st_nlink <= 1:
        return descriptor
    os.close(descriptor)
    what = f"one file under {found.st_nlink} names" if stat.S_ISREG(found.st_mode) else "no regular file"
    raise RunError(f"{path} is {what}, and is not written to: {_OWN}")


_OWN = "put a copy of what it holds in its place, or move it away"


def printable(text: str) -> str:
    """`text` without what would move the cursor of a terminal or cannot be encoded, written as escapes."""
    return "".join(
        each if each.isprintable() or each in "\n\t" else each.encode("unicode_escape").decode()
        for each in text
    )


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


_CHECKED = re.compile(rb', "crc32": "([0-9a-f]{8})"\}')
_CHECKED_LENGTH = len(b', "crc32": "01234567"}')


Each = Callable[[int, dict[str, Any]], object]
"""Gets the rows of a log one by one: its number, from 1, and the row without its checksum."""


@dataclass
class Log:
    """What a log holds, up to the first row that is not whole: 20 bytes for each row, and the rows if they are kept.

    Attributes
    ----------
    rows : list of dict
        Without their checksums; empty where somebody took them one by one.
    last : dict
        The last of them; empty without one.
    steps : array of int
        Step of each; -1 where it has none.
    ends : array of int
        Where each ends, in bytes.
    sums : array of int
        CRC-32 up to each.
    fault : Damaged or None
        Why the next row is not read; None at the end.
    torn : bool
        Whether that is because it has no end, as a crash leaves the last one, or as it is while it is being written.
    checked : bool
        Whether the last row has a checksum. From the first that has, all must.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    last: dict[str, Any] = field(default_factory=dict)
    steps: array[int] = field(default_factory=lambda: array("q"))
    ends: array[int] = field(default_factory=lambda: array("q"))
    sums: array[int] = field(default_factory=lambda: array("I"))
    fault: Damaged | None = None
    torn: bool = False
    checked: bool = False

    @property
    def count(self) -> int:
        """Number of rows."""
        return len(self.ends)

    @property
    def end(self) -> int:
        """Where the last row ends, in bytes."""
        return self.ends[-1] if self.ends else 0

    def extent(self, count: int) -> dict[str, Any]:
        """Return bytes and CRC-32 of the first `count` rows, by which a checkpoint knows them again."""
        if not count:
            return {"bytes": 0, "crc32": "00000000"}
        return {"bytes": self.ends[count - 1], "crc32": f"{self.sums[count - 1]:08x}"}

    def add(self, row: dict[str, Any], end: int, total: int) -> None:
        """Count a row that ends at byte `end`, where the CRC-32 is `total`."""
        step = row.get("step")
        self.last = row
        self.steps.append(step if type(step) is int and 0 <= step < 1 << 63 else -1)
        self.ends.append(end)
        self.sums.append(total)

    @classmethod
    def of(cls, path: Path, lines: Iterable[bytes], before: bytes = b"", each: Each | None = None) -> Self:
        """Read the rows of `lines`, from the file `path`, which there follow `before` (its end is enough).

        The first row is not verified against what is before it where that is not empty and has no checksum. `each`
        gets the rows if it is given, one at a time, so that a log of any length takes little memory.
        """
        log = cls()
        mark = _CHECKED.fullmatch(before, len(before) - _CHECKED_LENGTH - 1, len(before) - 1)
        log.checked, known = mark is not None, mark is not None or not before
        total = int(mark[1], 16) if mark else 0
        end = 0
        for number, whole in enumerate(lines, 1):
            line = whole.removesuffix(b"\n")
            if line == whole:
                log.fault = Damaged(path, "a line with an end", f"{line[:40]!r}", row=number)
                log.torn = True
                return log
            mark = _CHECKED.fullmatch(line, max(0, len(line) - _CHECKED_LENGTH))
            found = zlib.crc32(line[: mark.start()] if mark else whole, total)
            total = int(mark[1], 16) if mark else found
            if found != total and known:
                log.fault = Damaged(path, f"crc32 {total:08x}", f"{found:08x}", row=number)
            elif log.checked and not mark:
                log.fault = Damaged(path, "its crc32", f"none in {line[-40:]!r}", row=number)
            else:
                try:
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError("no object")
                except (ValueError, RecursionError):
                    log.fault = Damaged(path, "a JSON object", f"{line[:40]!r}", row=number)
            if log.fault is not None:
                return log
            row.pop("crc32", None)
            end += len(whole)
            log.checked, known = mark is not None, True
            log.add(row, end, total)
            if each is None:
                log.rows.append(row)
            else:
                each(number, row)
        return log

    @classmethod
    def read(cls, path: Path, each: Each | None = None) -> Self:
        """Read the log in the file `path`, line by line; empty without the file, raises as `read_regular`."""
        try:
            with open_regular(path) as file:
                return cls.of(path, file, each=each)
        except FileNotFoundError:
            return cls()


class JsonLines:
    """A log of one JSON object a line, each on its way to the disk before `append` returns.

    Parameters
    ----------
    path : Path
        Opened for appending when the first row comes; its whole rows are read at once.
    check : function, optional
        Called before each change of the file, as `RunLock.check`.
    sums : bool
        Write each row with a checksum that continues the one of the row before. Those that are there are verified.
    each : function, optional
        Gets the rows that are there, one by one; no row is kept then.

    Attributes
    ----------
    log : Log
        What is in the file.
    rows : list of dict
        All its whole rows, in order, without checksums; empty with `each`.

    Warns
    -----
    RunWarning
        If the end of the file is torn, or a row is damaged; the bytes from there on are removed by the next `append`
        or `keep`.
    """

    def __init__(
        self,
        path: Path,
        check: Callable[[], None] | None = None,
        *,
        sums: bool = False,
        each: Each | None = None,
    ) -> None:
        self.path = path
        self._check, self._sums, self._kept = check, sums, each is None
        self._descriptor: int | None = None
        self._length = path.stat().st_size if path.exists() else 0
        self.log = Log.read(path, each)
        self.rows = self.log.rows
        if self.log.fault is not None:
            torn = f"{path}: line {self.log.count + 1} is torn"
            warnings.warn(
                f"{torn if self.log.torn else self.log.fault.finding}; {self._length - self.log.end} bytes from there "
                "on dropped",
                RunWarning,
                stacklevel=2,
            )

    def check_place(self) -> None:
        """See that rows can be appended, if the file is there; nothing is written.

        Raises
        ------
        OSError
            If it may not be written.
        RunError
            If it is a link, or one file under several names.
        """
        if os.path.lexists(self.path):
            os.close(_open_own(self.path, os.O_WRONLY | os.O_APPEND))

    def append(self, row: dict[str, Any]) -> None:
        """Add `row` to the file and to `rows`; on a failure the file ends where it ended before.

        Raises
        ------
        OSError
            If the line cannot be written.
        RunError
            If the file is a link, or somebody else wrote to it or took its place.
        ValueError
            If `row` holds NaN or an infinity.
        """
        body = json.dumps(row, allow_nan=False)[:-1].encode()
        end, before = self.log.end, self.log.sums[-1] if self.log.sums else 0
        total = zlib.crc32(body if self._sums else body + b"}\n", before)
        line = body + (b', "crc32": "%08x"}\n' % total if self._sums else b"}\n")
        self.keep(self.log.count)
        descriptor = self._own()
        try:
            _write_all(descriptor, line)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(descriptor, end)
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        self._length = end + len(line)
        self.log.add(row, self._length, total)
        if self._kept:
            self.rows.append(row)

    def keep(self, count: int) -> None:
        """Drop all rows after the first `count`, and a torn end, in the file too."""
        del self.rows[count:], self.log.steps[count:], self.log.ends[count:], self.log.sums[count:]
        if self.log.end < self._length:
            os.truncate(self._own(), self.log.end)
            self._length = self.log.end

    def _own(self) -> int:
        """Return the open file, as nobody else has changed it since it was read."""
        if self._check is not None:
            self._check()
        if self._descriptor is None:
            self._descriptor = _open_own(self.path, os.O_WRONLY | os.O_APPEND)
        if os.fstat(self._descriptor).st_size != self._length or not _same_file(self._descriptor, self.path):
            raise RunError(
                f"{self.path} was changed by another process since this one read it: stopped before writing more; the "
                "same command goes on from the last checkpoint"
            )
        return self._descriptor

    def sync(self) -> None:
        """Make the rows last through a power cut."""
        if self._descriptor is not None:
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file; a later `append` opens it again."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def has_row(path: Path) -> bool:
    """Whether the log in the file `path` begins with a whole row; no more of it is read."""
    try:
        with open_regular(path) as file:
            return Log.of(path, islice(file, 1)).count > 0
    except FileNotFoundError:
        return False


def read_rows(path: Path, offset: int) -> tuple[list[dict[str, Any]], int]:
    """Read the whole rows that begin at byte `offset` of a log which another process is writing.

    Returns
    -------
    rows : list of dict
        Without checksums; up to the first row that is not whole. Empty if there is no such file yet.
    offset : int
        Where to go on next time.
    """
    try:
        with open_regular(path) as file:
            before = max(0, offset - _CHECKED_LENGTH - 1)
            file.seek(before)
            data = file.read()
    except FileNotFoundError:
        return [], offset
    log = Log.of(path, io.BytesIO(data[offset - before :]), data[: offset - before])
    return log.rows, offset + log.end


LOCK_NAME = "lock"


@dataclass(frozen=True)
class Process:
    """A process as a lock names it, told from a later one that has its number.

    Attributes
    ----------
    pid : int
    host : str
    boot : str or None
        Of the host's running system, where it tells that.
    started : int or None
        When it was started, in ticks since then.
    """

    pid: int
    host: str
    boot: str | None = None
    started: int | None = None

    @classmethod
    def here(cls) -> Self:
        """Name this process."""
        return cls(os.getpid(), socket.gethostname(), _boot(), _started(os.getpid()))

    @classmethod
    def named(cls, data: bytes) -> Self | None:
        """Read what a file names; None if it names none."""
        try:
            value = parse_object(data)
        except ValueError:
            return None
        pid, host, boot, started = (value.get(name) for name in ("pid", "host", "boot", "started"))
        if not (type(pid) is int and 0 < pid < 1 << 31 and isinstance(host, str)):
            return None
        known = boot if isinstance(boot, str) else None
        return cls(pid, host, known, started if type(started) is int else None)

    def as_json(self) -> dict[str, Any]:
        """Return what `named` reads, what is not known left out."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def may_live(self) -> bool:
        """Whether it may be alive and is not this process; on another host it may always."""
        if self.host != socket.gethostname():
            return True
        if None not in (self.boot, _boot()) and self.boot != _boot():
            return False
        if self.pid == os.getpid():
            return False  # our own earlier life under the same number, after a reboot or in a container
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        now = _started(self.pid)
        return None in (self.started, now) or self.started == now


PROC = Path("/proc")


def _boot() -> str | None:
    try:
        return (PROC / "sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def _started(pid: int) -> int | None:
    try:
        # The name of the program stands in brackets and may hold anything.
        return int((PROC / str(pid) / "stat").read_bytes().rpartition(b")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


NAME_SECONDS = 1.0
"""How long whoever took a lock may need to write down who it is."""


# Not `filelock` (read at 4.3.1): its refusal names no holder, and of file systems without flock it knows ENOSYS alone.
class RunLock:
    """The right to write into `folder`, held from `acquire` (or ``with``) to `release`."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK_NAME
        self._descriptor: int | None = None
        self._named = b""

    def acquire(self) -> None:
        """Take the lock; one left by a dead process is taken over.

        Raises
        ------
        RunLocked
            If another process holds it; the message has its pid and host.
        RunError
            If the lock is a link, or no regular file.
        OSError
            If the folder cannot be written.
        """
        while self._descriptor is None:
            descriptor = _open_own(self.path, os.O_RDWR)
            try:
                self._lock(descriptor)
                # The last holder may have removed the file between our open and our lock.
                if _same_file(descriptor, self.path):
                    self._named = self._name(descriptor)
                    self._descriptor = descriptor
            finally:
                if self._descriptor is None:
                    os.close(descriptor)

    def _name(self, descriptor: int) -> bytes:
        """Write into the file that this process has the lock; one that cannot be written whole is removed."""
        named = json.dumps(Process.here().as_json()).encode()
        try:
            os.ftruncate(descriptor, 0)
            _write_all(descriptor, named)
        except OSError as error:
            with contextlib.suppress(OSError):
                self.path.unlink()
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        return named

    def _lock(self, descriptor: int) -> None:
        deadline = time.monotonic() + NAME_SECONDS
        try:
            while not _locked(descriptor):
                holder = Process.named(_content(descriptor))
                # One that has just taken the lock has not said yet who it is; the one before it may stand there.
                if (holder is not None and holder.may_live()) or time.monotonic() >= deadline:
                    raise RunLocked(self._refusal(holder))
                time.sleep(NAME_SECONDS / 100)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            holder = Process.named(_content(descriptor))
            if holder is not None and (holder.may_live() or holder == Process.here()):
                raise RunLocked(self._refusal(holder)) from error
            warnings.warn(
                f"{self.path.parent}: this file system has no locks ({error.strerror}); of two processes that start "
                "here at the same instant one stops when it first writes",
                RunWarning,
                stacklevel=4,
            )

    def _refusal(self, holder: Process | None) -> str:
        who = "another process" if holder is None else f"process {holder.pid} on host {holder.host}"
        refusal = f"{self.path.parent} is in use by {who}: wait for it, stop it, or give another --out"
        if holder is not None and holder.host != socket.gethostname():
            refusal += f"; if that process is gone, which cannot be seen from here, remove {self.path}"
        return refusal

    def check(self) -> None:
        """See that the lock is still this one's: before each change of a file below it.

        Raises
        ------
        RunLocked
            If its file was removed or taken.
        """
        if self._descriptor is None or not self._ours(self._descriptor):
            raise RunLocked(
                f"{self.path} was removed or taken while this process had it, so another may write into this folder: "
                "stopped before writing more; the same command goes on from the last checkpoint"
            )

    def _ours(self, descriptor: int) -> bool:
        return _same_file(descriptor, self.path) and _content(descriptor) == self._named

    def release(self) -> None:
        """Give the lock back and remove its file, unless that is another's by now."""
        if self._descriptor is None:
            return
        try:
            # Removed while still held, so that nobody can lock the name in between.
            with contextlib.suppress(OSError):
                if self._ours(self._descriptor):
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


def holder(folder: Path) -> Process | None:
    """Process that has `folder`, as its lock names it; None if none does, or it is dead.

    The lock itself is left alone, so that looking at a folder keeps nobody from taking it. A process on another host
    counts as alive.

    Raises
    ------
    RunError
        If the lock is no regular file.
    """
    try:
        named = Process.named(read_regular(folder / LOCK_NAME))
    except FileNotFoundError:
        return None
    return named if named is not None and named.may_live() else None


def _locked(descriptor: int) -> bool:
    """Take the lock of an open file; return whether it is this one's now. Raises OSError where files have none."""
    import fcntl  # where there is none, only training needs it

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _content(descriptor: int) -> bytes:
    return os.pread(descriptor, 4096, 0)
