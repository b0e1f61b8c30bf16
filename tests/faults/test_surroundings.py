"""Row 10 of the faults: the clock jumps, git is missing, a logger raises or hangs."""

import os
import random
import signal
import time
import warnings
from pathlib import Path

import pytest
from toy_stack import JOB, contents
from victims import train_toy, wait_for

import fastent
from fastent.grokking.train import environment
from fastent.grokking.train.storage import RunWarning, read_object


def warnings_of(call):
    """Texts of the warnings of a run that a call makes."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RunWarning)
        call()
    return [str(each.message) for each in caught]


def test_a_wall_clock_that_jumps_at_every_look_is_said_once_and_changes_no_number(
    toy, tmp_path, uninterrupted, monkeypatch, figure
):
    draw, jumps = random.Random(10), []

    def jumping():
        jumps.append(draw.uniform(-1e6, 1e6))
        return 1.7e9 + jumps[-1]

    monkeypatch.setattr(time, "time", jumping)
    (said,) = warnings_of(lambda: toy(tmp_path / "out"))
    assert "the wall clock moved by" in said
    assert contents(tmp_path / "out") == uninterrupted
    figure(10, "a jump of the wall clock", len(jumps), len(jumps))


def train_without_git(out):
    os.environ["PATH"] = ""
    root = Path(out).parent / "checkout"
    (root / ".git").mkdir(parents=True)
    fastent.__file__ = str(root / "fastent" / "__init__.py")
    environment.commit.cache_clear()
    said = warnings_of(lambda: [train_toy(out), train_toy(out.with_name("again"))])
    return said, read_object(out / JOB.run_name(0) / "environment.json")["commit"]


def test_without_git_the_run_goes_on_and_says_so_once(elsewhere, tmp_path, uninterrupted, figure):
    (said,), commit = elsewhere(train_without_git, tmp_path / "out")
    assert "the commit is not recorded: git failed" in said
    assert commit is None
    assert contents(tmp_path / "out") == uninterrupted
    figure(10, "git that is missing", 1, 1)


class Raises:
    """Raises at row number `at` and all that follow."""

    def __init__(self, at, error):
        self.at, self.error = at, error

    def row(self, job, seed, row):
        self.at -= 1
        if self.at < 0:
            raise self.error

    def done(self, job, seed):
        raise self.error


@pytest.mark.parametrize(
    "error", [ConnectionError("down"), OSError(28, "No space"), MemoryError(), ValueError("x")]
)
def test_a_logger_that_raises_from_any_row_on_is_said_once_and_costs_no_byte(
    toy, tmp_path, uninterrupted, figure, error
):
    for at in range(0, 27, 9):
        out = tmp_path / f"from row {at}"
        (said,) = warnings_of(lambda at=at, out=out: toy(out, observers=[Raises(at, error)]))
        assert said.startswith(f"Raises failed ({error!r}); the run goes on")
        assert contents(out) == uninterrupted
    figure(10, f"a logger that raises {type(error).__name__}", 3, 3)


class Hangs:
    """Tells by a file that it is asked for row number 10, and answers no more."""

    rows = 0

    def row(self, job, seed, row):
        self.rows += 1
        if self.rows == 10:
            Path("hangs").touch()
            while True:
                time.sleep(60)

    def done(self, job, seed):
        pass


def train_hanging(out):
    train_toy(out, observers=[Hangs()])


@pytest.mark.parametrize(
    "numbers", [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGTERM), (signal.SIGKILL,)]
)
def test_a_run_whose_logger_hangs_ends_at_the_second_signal_and_goes_on_from_what_it_saved(
    start, toy, tmp_path, uninterrupted, figure, numbers
):
    out = tmp_path / "out"
    process = start(train_hanging, out)
    wait_for(process, (tmp_path / "hangs").exists)
    for number in numbers:
        assert process.is_alive()
        os.kill(process.pid, number)
        time.sleep(0.2)
    process.join(30)
    assert process.exitcode == (-signal.SIGKILL if signal.SIGKILL in numbers else 128 + numbers[-1])
    toy(out)
    assert contents(out) == uninterrupted
    figure(10, "a logger that hangs, ended by signals", 1, 1)
