"""Row 3 of the faults: a full disk, a folder that is read-only."""

import os
import resource

import pytest
from toy_stack import JOB, contents
from victims import train_toy

from fastent.grokking.train.checkpoint import checkpoint_steps, read_checkpoint
from fastent.grokking.train.storage import RunError


def full_disk(out, limit):
    """Train with no file allowed to grow over `limit` bytes: the system refuses like a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    train_toy(out)


def test_a_file_that_cannot_grow_ends_the_run_with_a_clear_error_and_the_old_checkpoint_intact(
    start, half, toy, uninterrupted, figure
):
    out = half(27)
    size = (out / JOB.run_name(0) / "metrics.jsonl").stat().st_size
    process = start(full_disk, out, size + 100)
    process.join()
    assert process.exitcode == 1
    error = (out.parent / "error").read_text()
    assert error.startswith(f"cannot write {out / JOB.run_name(0)}")
    assert "File too large. What was saved before is intact" in error
    assert read_checkpoint(out / JOB.run_name(0), 20).step == 20
    assert not list(out.rglob("*.tmp"))
    toy(out)
    assert contents(out) == uninterrupted
    figure(3, "a file that the system lets grow no further", 1, 1)


def test_no_space_for_a_checkpoint_leaves_the_one_before_and_says_so(half, toy, uninterrupted, monkeypatch):
    out = half(27)
    real = os.write

    def write(descriptor, data):
        if len(data) > 600:  # rows go in, checkpoints do not
            raise OSError(28, "No space left on device")
        return real(descriptor, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        with pytest.raises(RunError) as caught:
            toy(out)
    assert str(caught.value).startswith(f"cannot write {out / JOB.run_name(0)}/checkpoint-30")
    assert "No space left on device. What was saved before is intact" in str(caught.value)
    assert checkpoint_steps(out / JOB.run_name(0)) == [10, 20]
    assert not list(out.rglob("*.tmp"))
    toy(out)
    assert contents(out) == uninterrupted


def test_a_read_only_folder_is_named(toy, tmp_path, monkeypatch):
    def read_only(path, flags, *mode):
        if flags & os.O_CREAT:
            raise OSError(30, "Read-only file system", str(path))
        return real(path, flags, *mode)

    real = os.open
    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(RunError, match=r"cannot write .*/lock: Read-only file system"):
        toy(tmp_path / "out")


def test_a_file_in_the_place_of_the_folder_is_named(toy, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(RunError, match=r"cannot write .*/out/.*: Not a directory"):
        toy(tmp_path / "out")
