"""The progress bar: what it says, and when it is silent."""

import dataclasses
import io
import re

import pytest
from toy_stack import JOB

from fastent.grokking.train.progress import ProgressBar


class Terminal(io.StringIO):
    def isatty(self):
        return True


def row(step, **values):
    return {
        "step": step, "train_loss": 0.5, "train_accuracy": 1.0, "test_accuracy": 0.25, "entropy": 0.8, **values,
    }  # fmt: skip


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    return Terminal()


def test_it_shows_step_loss_accuracies_and_entropy_averaged_over_the_seeds(terminal):
    with ProgressBar([JOB], stream=terminal) as bar:
        bar.row(JOB, 0, row(50))
        bar.row(JOB, 2, row(50, test_accuracy=0.75, entropy=0.6, train_loss=1.5))
    last = terminal.getvalue().split("\r")[-1]
    assert "e1 add step 50 loss 1.0e+00 train 1.00 test 0.50 H 0.700" in last


def test_a_run_that_ends_early_gives_the_rest_of_its_steps_and_leaves_the_average(terminal):
    with ProgressBar([JOB], stream=terminal) as bar:
        for seed in JOB.seeds:
            bar.row(JOB, seed, row(30, entropy=seed / 10))
        assert bar._bar.tasks[0].percentage == pytest.approx(50)
        bar.done(JOB, 0)
        assert bar._bar.tasks[0].percentage == pytest.approx(100 * (60 + 30 + 30) / 180)
        bar.row(JOB, 1, row(30, entropy=0.1))
    assert "H 0.150" in terminal.getvalue().split("\r")[-1]


def test_several_jobs_share_one_bar(terminal):
    other = dataclasses.replace(JOB, experiment="e2", condition="mixing")
    with ProgressBar([JOB, other], stream=terminal) as bar:
        bar.row(other, 0, row(60))
        assert bar._bar.tasks[0].percentage == pytest.approx(100 / 6)
    assert "e2 add mixing step 60" in terminal.getvalue()


def test_in_80_columns_everything_is_there_and_in_fewer_the_text_gives_way(terminal, monkeypatch):
    text = "e1 add step 12,400 loss 8.9e-02 train 1.00 test 0.01 H 0.788"
    for columns, whole in ((80, True), (60, False)):
        monkeypatch.setenv("COLUMNS", str(columns))
        with ProgressBar([JOB], stream=terminal) as bar:
            bar.row(JOB, 0, row(12_400, train_loss=0.089, test_accuracy=0.01, entropy=0.788))
        last = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue().split("\r")[-1])
        assert (text in last) == whole
        assert re.search(r"━{8} +\d+% +[-0-9:]{5}", last)


def test_an_entropy_that_is_missing_is_a_dash(terminal):
    with ProgressBar([JOB], stream=terminal) as bar:
        bar.row(JOB, 0, row(5, entropy=None, train_loss=None))
    assert "step 5 train 1.00 test 0.25 H -" in terminal.getvalue()


@pytest.mark.parametrize(
    ("stream", "quiet"), [(io.StringIO(), False), (Terminal(), True)], ids=["pipe", "quiet"]
)
def test_it_is_silent_when_not_a_terminal_or_told_to_be(stream, quiet):
    with ProgressBar([JOB], quiet=quiet, stream=stream) as bar:
        bar.row(JOB, 0, row(50))
        bar.done(JOB, 0)
    assert stream.getvalue() == ""
