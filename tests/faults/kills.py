"""Processes that are killed by SIGKILL, at a file operation of theirs or at an instant, and tell how far they were.

A process tells by memory that it shares with the one that forked it: how many operations on files below a folder it
has begun, the last of them, and the phase of its work. So a kill has two proofs: how the process ended, and where.
Syncs to the disk are counted and not done: what a process has written outlives it without.
"""

import contextlib
import functools
import mmap
import os
import shutil
import signal
import struct
import sys
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from toy_stack import contents

from fastent.grokking.train import loop
from fastent.grokking.train.runs import Run
from fastent.grokking.train.storage import JsonLines

PHASES = ("starting", "training", "logging", "checkpointing", "completing", "packing", "report writing")
OPENED_TO_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Told:
    """Memory that a process and those it forks share: operations begun, phase, phases begun, the last operation."""

    HEAD = struct.Struct("qqqq")

    def __init__(self):
        self.memory = mmap.mmap(-1, 4096)

    def begin(self):
        self.memory[:] = bytes(4096)

    def _number(self, place, value=None):
        if value is not None:
            struct.pack_into("q", self.memory, 8 * place, value)
        return struct.unpack_from("q", self.memory, 8 * place)[0]

    operations = property(lambda self: self._number(0), lambda self, value: self._number(0, value))
    phases = property(lambda self: self._number(2), lambda self, value: self._number(2, value))

    @property
    def phase(self):
        return PHASES[self._number(1)]

    @phase.setter
    def phase(self, name):
        self._number(1, PHASES.index(name))

    @property
    def last(self):
        return self.memory[32:].partition(b"\0")[0].decode()

    @last.setter
    def last(self, text):
        self.memory[32 : 33 + len(text)] = text.encode() + b"\0"

    def phase_of(self, owner, name, phase):
        """Make a function tell that it is a phase."""
        real = getattr(owner, name)

        @functools.wraps(real)
        def call(*arguments, **options):
            before, self.phase = self.phase, phase
            self.phases += 1
            try:
                return real(*arguments, **options)
            finally:
                self.phase = before

        setattr(owner, name, call)

    def tell_operations(self, below, fatal=0):
        """Tell each operation on a file below a folder, and die at number `fatal`: of a write when half is written."""

        def begins(name, path):
            if not os.fsdecode(path).startswith(str(below)):
                return False
            self.operations += 1
            self.last = f"{name} {os.fsdecode(path)[len(str(below)) + 1 :]}"
            return self.operations == fatal

        def audit(event, arguments):
            if event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.truncate"):
                return
            if event == "open" and (arguments[0] is None or not arguments[2] & OPENED_TO_WRITE):
                return
            if begins(event.removeprefix("os."), named(arguments[0])):
                os.kill(os.getpid(), signal.SIGKILL)

        def named(file):
            return os.readlink(f"/proc/self/fd/{file}") if isinstance(file, int) else os.fspath(file)

        def half_written(name, real):
            def call(descriptor, data, *place):
                if begins(name, named(descriptor)):
                    real(descriptor, bytes(data)[: len(data) // 2], *place)
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(descriptor, data, *place)

            return call

        def synced(descriptor):
            if begins("fsync", named(descriptor)):
                os.kill(os.getpid(), signal.SIGKILL)

        os.write, os.pwrite = half_written("write", os.write), half_written("pwrite", os.pwrite)
        os.fsync = synced
        sys.addaudithook(audit)


@dataclass
class Work:
    """Something that writes files below `out`, done by processes that are killed.

    Attributes
    ----------
    do : function
        Of the folder.
    out : Path
    before : dict
        By name, the files that are there when it begins.
    whole : dict
        The files of a process that nothing happened to.
    """

    do: object
    out: Path
    before: dict = field(default_factory=dict)
    told: Told = field(default_factory=Told)
    landed: Counter = field(default_factory=Counter)

    def __post_init__(self):
        self.reset()
        assert self.finish() == 0
        self.whole = contents(self.out)
        self.operations, self.phases = self.told.operations, self.told.phases
        assert self.operations > 0
        assert self.whole

    def reset(self):
        shutil.rmtree(self.out, ignore_errors=True)
        for name, data in self.before.items():
            (self.out / name).parent.mkdir(parents=True, exist_ok=True)
            (self.out / name).write_bytes(data)

    def begin(self, fatal=0):
        """Fork a process that does the work."""
        self.told.begin()
        pid = os.fork()
        if pid == 0:
            try:
                warnings.simplefilter("error")
                # What a crash does: it tears a log, or leaves the first checkpoint to some seeds only.
                for said in (".* is torn; ", ".*: no checkpoint, though others of the stack have one"):
                    warnings.filterwarnings("ignore", message=said)
                self.told.tell_operations(self.out, fatal)
                self.do(self.out)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        return pid

    def finish(self, fatal=0):
        return os.waitstatus_to_exitcode(os.waitpid(self.begin(fatal), 0)[1])

    def kill_at_operation(self, number):
        """Whether a process died at file operation `number`; one with fewer left to do comes to its end."""
        status = self.finish(number)
        if status == 0:
            assert self.told.operations < number
            return False
        assert (status, self.told.operations) == (-signal.SIGKILL, number), self.told.last
        self.landed[self.told.phase] += 1
        return True

    def kill_at_instant(self, phases, delay):
        """Whether a process died `delay` seconds after it began its phase number `phases`; it may have ended."""
        pid = self.begin()
        deadline = time.monotonic() + 60
        while (
            self.told.phases < phases
            and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        ):
            assert time.monotonic() < deadline, "it did not get there"
            time.sleep(1e-4)
        time.sleep(delay)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status == 0:
            return False
        assert status == -signal.SIGKILL
        self.landed[self.told.phase] += 1
        return True

    def check(self, what):
        """See that the work, done again, leaves the files of an uninterrupted one."""
        assert self.finish() == 0, what
        found = contents(self.out)
        differ = sorted(
            name for name in found.keys() | self.whole.keys() if found.get(name) != self.whole.get(name)
        )
        assert not differ, f"{what}: {differ}"

    def at_operations(self, numbers, draw, partly=lambda: None):
        """Kill a process at each of these operations, and half of the time what goes on from there at another."""
        for number in numbers:
            self.reset()
            assert self.kill_at_operation(number)
            what = f"killed at operation {number}, {self.told.last}"
            partly()
            if draw.random() < 0.5 and self.kill_at_operation(draw.randint(1, max(2, self.operations // 4))):
                what += f", then at {self.told.last}"
                partly()
            self.check(what)

    def at_instants(self, count, draw, partly=lambda: None):
        """Kill so many processes at instants, and half of those that go on from there."""
        killed = 0
        while killed < count:
            self.reset()
            if not self.kill_at_instant(draw.randint(0, self.phases), draw.uniform(0, 0.004)):
                continue
            killed += 1
            what = f"killed while {self.told.phase}, after {self.told.operations} operations"
            partly()
            if draw.random() < 0.5 and self.kill_at_instant(
                draw.randint(0, self.phases // 2), draw.uniform(0, 0.004)
            ):
                killed += 1
                what += f", then while {self.told.phase}"
                partly()
            self.check(what)


def tell_training(told):
    """Let the phases of training be told."""
    for owner, name, phase in (
        (Run, "save", "checkpointing"),
        (Run, "finish", "completing"),
        (JsonLines, "append", "logging"),
        (loop._Training, "run", "training"),
    ):
        told.phase_of(owner, name, phase)
