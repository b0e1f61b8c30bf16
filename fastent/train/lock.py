"""One process for one run folder.

The lock is `flock` on the file ``lock`` in the folder, so that it ends with its process however that dies;
the file names the holder (pid, host) for the message that another process gets. Where the file system has no
`flock`, the pid in the file decides: a holder on this host that is dead no longer counts, one on another host
does. POSIX only.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import warnings
from pathlib import Path
from types import TracebackType
from typing import Self

from fastent.train.errors import RunLocked, RunWarning

LOCK_NAME = "lock"


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
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunLocked(self._refusal(_read_holder(descriptor))) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            holder = _read_holder(descriptor)
            if holder is not None and _may_live(*holder):
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
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        return int(holder["pid"]), str(holder["host"])
    except (ValueError, KeyError, TypeError):
        return None


def _may_live(pid: int, host: str) -> bool:
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
