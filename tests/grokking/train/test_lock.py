"""Row 8 of the faults: two processes on one run folder."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fastent.grokking.train import storage
from fastent.grokking.train.storage import JsonLines, RunError, RunLock, RunLocked, RunWarning

HOLD = """
import sys, time
from pathlib import Path
from fastent.grokking.train.storage import RunLock
RunLock(Path(sys.argv[1])).acquire()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_the_second_process_refuses_and_names_the_first(tmp_path, holder):
    with pytest.raises(RunLocked, match=rf"in use by process {holder.pid} on host {socket.gethostname()}"):
        RunLock(tmp_path).acquire()
    assert json.loads((tmp_path / "lock").read_text())["pid"] == holder.pid


@pytest.mark.parametrize(
    "before", [b"", json.dumps({"pid": 2**22 + 1, "host": socket.gethostname()}).encode()]
)
def test_one_that_has_just_taken_the_lock_is_named_once_it_has_said_who_it_is(tmp_path, before):
    lock = tmp_path / "lock"
    lock.write_bytes(before)
    named = json.dumps(storage.Process.here().as_json()).encode()
    with lock.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        soon = threading.Timer(0.1, lock.write_bytes, [named])
        soon.start()
        with pytest.raises(RunLocked, match=f"in use by process {os.getpid()} on host "):
            RunLock(tmp_path).acquire()
        soon.join()
    assert lock.read_bytes() == named


def test_one_that_takes_the_lock_and_says_nothing_is_refused_without_a_name(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "NAME_SECONDS", 0.05)
    with (tmp_path / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(RunLocked, match="in use by another process: wait for it"):
            RunLock(tmp_path).acquire()


def test_the_lock_of_a_killed_process_is_recovered(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "lock").exists()
    with RunLock(tmp_path):
        held = json.loads((tmp_path / "lock").read_text())
        assert (held["pid"], held["host"]) == (os.getpid(), socket.gethostname())
    assert os.listdir(tmp_path) == []


def test_a_lock_whose_file_was_removed_before_it_was_taken_is_taken_again(tmp_path, monkeypatch):
    real, calls = fcntl.flock, []

    def flock(descriptor, operation):
        if not calls:  # the last holder leaves between our open and our lock
            (tmp_path / "lock").unlink()
        calls.append(1)
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with RunLock(tmp_path):
        assert len(calls) == 2
        with pytest.raises(RunLocked, match=f"process {os.getpid()} "):
            RunLock(tmp_path).acquire()


def no_locks(descriptor, operation):
    raise OSError(errno.ENOLCK, "No locks available")


def test_without_flock_a_living_holder_is_refused_and_a_dead_one_recovered(tmp_path, holder, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(RunLocked, match=f"process {holder.pid} "):
        RunLock(tmp_path).acquire()
    holder.kill()
    holder.wait()
    with pytest.warns(RunWarning, match=r"no locks \(No locks available\)"), RunLock(tmp_path):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()


def test_without_flock_a_holder_on_another_host_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", no_locks)
    (tmp_path / "lock").write_text('{"pid": 1, "host": "elsewhere"}')
    with pytest.raises(RunLocked, match="process 1 on host elsewhere") as caught:
        RunLock(tmp_path).acquire()
    assert f"if that process is gone, which cannot be seen from here, remove {tmp_path / 'lock'}" in str(
        caught.value
    )
    (tmp_path / "lock").unlink()
    with pytest.warns(RunWarning, match="no locks"), RunLock(tmp_path):
        pass


def test_a_lock_names_the_start_of_its_process_so_a_later_one_under_its_number_holds_nothing(
    tmp_path, holder, monkeypatch
):
    held = json.loads((tmp_path / "lock").read_text())
    assert held["boot"] == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert held["started"] == int(Path(f"/proc/{holder.pid}/stat").read_text().rsplit(")")[1].split()[19])
    monkeypatch.setattr(fcntl, "flock", no_locks)
    for change in ({"started": held["started"] - 1}, {"boot": "of before the power cut"}):
        (tmp_path / "lock").write_text(json.dumps(held | change))
        assert not storage.Process.named((tmp_path / "lock").read_bytes()).may_live()
        with pytest.warns(RunWarning, match="no locks"), RunLock(tmp_path):
            pass
    # Where nothing tells them apart, the number decides.
    (tmp_path / "lock").write_text(json.dumps(held | {"started": held["started"] - 1}))
    monkeypatch.setattr(storage, "PROC", tmp_path)
    with pytest.raises(RunLocked, match=f"process {holder.pid} "):
        RunLock(tmp_path).acquire()


@pytest.mark.parametrize("taken", [False, True])
def test_a_holder_whose_lock_was_removed_or_taken_writes_no_more_and_leaves_the_other_its_lock(
    tmp_path, taken
):
    with RunLock(tmp_path) as lock:
        log = JsonLines(tmp_path / "metrics.jsonl", lock.check)
        log.append({"step": 0})
        lock.path.unlink()
        if taken:
            lock.path.write_text('{"pid": 1, "host": "b"}')
        for change in (lambda: log.append({"step": 50}), lambda: log.keep(0)):
            with pytest.raises(RunLocked, match="lock was removed or taken while this process had it"):
                change()
        log.close()
    assert log.path.read_text() == '{"step": 0}\n'
    assert lock.path.exists() == taken


def test_of_two_that_start_at_once_without_flock_the_one_that_came_first_stops(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", no_locks)
    first = RunLock(tmp_path)
    with pytest.warns(RunWarning, match="of two processes that start here"):
        first.acquire()
    first.check()
    first.path.write_text(
        '{"pid": 1, "host": "b"}'
    )  # what the second writes, having looked before the first wrote
    with pytest.raises(RunLocked, match="removed or taken"):
        first.check()
    first.release()
    assert first.path.exists()


@pytest.mark.parametrize("kind", ["symlink", "hard link", "pipe", "folder"])
def test_a_lock_that_leads_elsewhere_is_refused_and_nothing_is_written_there(tmp_path, kind):
    victim, path = tmp_path / "victim", tmp_path / "lock"
    victim.write_text("precious")
    {
        "symlink": lambda: path.symlink_to(victim),
        "hard link": lambda: path.hardlink_to(victim),
        "pipe": lambda: os.mkfifo(path),
        "folder": path.mkdir,
    }[kind]()
    with pytest.raises((RunError, IsADirectoryError), match="lock"):
        RunLock(tmp_path).acquire()
    assert victim.read_text() == "precious"


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(OSError, match="lock"):
        RunLock(tmp_path / "missing").acquire()


@pytest.mark.parametrize("written", [0, 20])
def test_a_lock_that_finds_the_disk_full_is_named_and_leaves_no_file(tmp_path, monkeypatch, written):
    left = [written]

    def full(descriptor, data):
        if not left:
            raise OSError(errno.ENOSPC, "No space left on device")
        return os.pwrite(descriptor, bytes(data)[: left.pop()], 0)

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        RunLock(tmp_path).acquire()
    assert caught.value.filename == str(tmp_path / "lock")
    assert os.listdir(tmp_path) == []
