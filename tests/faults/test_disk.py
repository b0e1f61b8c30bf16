"""Row 3 of the faults: a full disk, a folder that is read-only.

The disk is a small tmpfs, mounted where nobody else sees it; where that is not allowed, a limit on the size of files
makes the system refuse too, and that is tried everywhere.
"""

import ctypes
import os
import resource
import shutil
import tempfile
import warnings
from pathlib import Path

import pytest
from toy_stack import CHECKPOINT_EVERY, JOB, ToyStack, contents

from fastent.grokking.train import loop
from fastent.grokking.train.checkpoint import checkpoint_steps, read_checkpoint
from fastent.grokking.train.loop import train
from fastent.grokking.train.storage import RunError, RunWarning

PAGE, PAGES = 4096, 100
NEW_MOUNTS, NEW_USER = 0x20000, 0x10000000
READ_ONLY, REMOUNT, PRIVATE = 1, 32, 0x44000


def system(name, *arguments):
    """Call a function of the C library that returns -1 and a number where it fails."""
    library = ctypes.CDLL(None, use_errno=True)
    if getattr(library, name)(*arguments) == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), name)


def mount_tmpfs(folder, pages=PAGES):
    """Mount a tmpfs for this process alone, as root or as root of a user namespace."""
    user, group = os.getuid(), os.getgid()
    try:
        system("unshare", NEW_MOUNTS)
    except PermissionError:
        system("unshare", NEW_MOUNTS | NEW_USER)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    system("mount", None, b"/", None, PRIVATE, None)
    folder.mkdir()
    system("mount", b"tmpfs", os.fsencode(folder), b"tmpfs", 0, b"size=%d" % (pages * PAGE))


def remount(folder, flags=0):
    system("mount", None, os.fsencode(folder), None, REMOUNT | flags, None)


def whether_it_mounts(folder):
    try:
        mount_tmpfs(folder)
    except OSError as error:
        return str(error)
    return ""


@pytest.fixture
def disk(elsewhere, tmp_path):
    """Folder where a process may mount a tmpfs."""
    if refusal := elsewhere(whether_it_mounts, tmp_path / "tried"):
        pytest.skip(f"no tmpfs can be mounted here: {refusal}")
    return tmp_path / "disk"


def train_toy(out):
    """Train the toy job with what a crash may leave to be said left unsaid."""
    loop.stack_kind = lambda config: ToyStack
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RunWarning)
        train(JOB, out, checkpoint_every=CHECKPOINT_EVERY)


def refusal(out):
    """Train; what it was refused with, or nothing."""
    try:
        train_toy(out)
    except RunError as error:
        return str(error)
    return ""


def check_refusal(text, out, said):
    """See that a refusal names a file and what to do, that each checkpoint is whole, and that nothing is half there."""
    assert text.startswith(f"cannot write {out}/"), text
    assert f": {said}. What was saved before is intact: make room" in text
    for run in out.iterdir():
        for step in checkpoint_steps(run):
            assert read_checkpoint(run, step).step == step
    assert not list(out.rglob("*.tmp"))
    assert not list(out.rglob("lock"))


def check_small_files(out, every):
    """Train under each limit on the size of files, from nothing on, until all fits."""
    train_toy(out.with_name("whole"))
    whole = contents(out.with_name("whole"))
    most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    limits = range(1, max(map(len, whole.values())), every)
    for limit in limits:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
        text = refusal(out)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        check_refusal(text, out, "File too large")
        train_toy(out)
        assert contents(out) == whole, limit
        shutil.rmtree(out)
    return len(limits)


def check_full_disk(disk, every):
    """Train with each number of free pages on a disk, from none on, until all fits."""
    train_toy(disk.with_name("whole"))
    whole = contents(disk.with_name("whole"))
    mount_tmpfs(disk)
    out = disk / "out"
    for tried, free in enumerate(range(0, PAGES, every)):
        (disk / "filler").write_bytes(bytes((PAGES - free) * PAGE))
        text = refusal(out)
        if not text:
            return tried
        check_refusal(text, out, "No space left on device")
        (disk / "filler").unlink()
        train_toy(out)
        assert contents(out) == whole, free
        shutil.rmtree(out)
    raise AssertionError("the disk was always full")


def test_files_that_may_not_grow_end_the_run_with_a_clear_error_and_all_that_was_saved(elsewhere, tmp_path):
    assert elsewhere(check_small_files, tmp_path / "out", 2500) >= 2


def test_a_full_disk_ends_the_run_with_a_clear_error_and_all_that_was_saved(elsewhere, disk):
    assert elsewhere(check_full_disk, disk, 7) >= 3


@pytest.mark.nightly
def test_whatever_size_no_file_may_pass_the_run_ends_with_a_clear_error(elsewhere, tmp_path, figure):
    tried = elsewhere(check_small_files, tmp_path / "out", 61)
    figure(3, "a limit on the size of files, from 1 byte to what is needed", tried, tried)


@pytest.mark.nightly
def test_whenever_the_disk_is_full_the_run_ends_with_a_clear_error(elsewhere, disk, figure):
    tried = elsewhere(check_full_disk, disk, 1)
    figure(3, "a full disk, from no page free to what is needed", tried, tried)


def fill(path):
    with open(path, "wb", buffering=0) as file:
        while True:
            file.write(bytes(PAGE))


def check_packing(disk):
    """Pack and report onto a full disk over what is there: it stays, and nothing else does."""
    from fastent.cli import main
    from fastent.grokking.experiments import data

    runs = disk.with_name("runs")
    train_toy(runs)
    stored = data.read_runs(runs)
    mount_tmpfs(disk, 10 * PAGES)
    (path,) = data.pack(stored[:2], disk / "packed")
    report = disk / "report"
    report.mkdir()
    (report / "report.md").write_text("old")
    before = contents(disk)
    filler = disk / "filler"
    with pytest.raises(OSError, match="No space left on device"):
        fill(filler)
    with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
        data.pack(stored, disk / "packed")
    assert main(["report", str(runs), "--out", str(report)]) == 1
    filler.unlink()
    found = contents(disk)
    assert {name: found[name] for name in before} == before
    assert {name for name in found.keys() - before.keys() if not name.endswith(".svg")} == set()
    data.pack(stored, disk / "packed")
    assert [run.name for run in data.unpack(path)] == sorted(run.name for run in stored)
    assert main(["report", str(runs), "--out", str(report)]) == 0


@pytest.mark.nightly
def test_a_full_disk_leaves_packed_runs_and_a_report_as_they_were(elsewhere, disk, figure):
    elsewhere(check_packing, disk)
    figure(3, "a full disk under packing and a report", 2, 2)


def check_read_only(disk, half):
    mount_tmpfs(disk)
    out = disk / "out"
    shutil.copytree(half, out)
    before = contents(out)
    remount(disk, READ_ONLY)
    check_refusal(refusal(out), out, "Read-only file system")
    assert contents(out) == before
    remount(disk)
    train_toy(out)
    return contents(out)


def test_a_file_system_that_is_read_only_is_named_and_once_it_is_not_the_run_goes_on(
    elsewhere, half, disk, uninterrupted, figure
):
    assert elsewhere(check_read_only, disk, half(27)) == uninterrupted
    figure(3, "a file system that is read-only", 1, 1)


def check_forbidden(half):
    """Train as a user who may not write to the folder; root may always, so it becomes nobody."""
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        out = Path(place) / "out"
        shutil.copytree(half, out)
        train_toy(Path(place) / "imports what it needs")
        paths = [out, *out.rglob("*")]
        for path in paths:
            os.chmod(path, 0o555 if path.is_dir() else 0o444)
        before = contents(out)
        if os.geteuid() == 0:
            os.seteuid(65534)
        text = refusal(out)
        os.seteuid(os.getuid())
        check_refusal(text, out, "Permission denied")
        assert contents(out) == before
        for path in paths:
            os.chmod(path, 0o755)
        train_toy(out)
        return contents(out)


def test_a_folder_that_may_not_be_written_is_named_and_once_it_may_be_the_run_goes_on(
    elsewhere, half, uninterrupted, figure
):
    assert elsewhere(check_forbidden, half(27)) == uninterrupted
    figure(3, "a folder that may not be written", 1, 1)


def test_a_file_in_the_place_of_the_folder_is_named(toy, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(RunError, match=r"cannot write .*/out/.*: Not a directory"):
        toy(tmp_path / "out")
