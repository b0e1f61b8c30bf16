"""Runs of one's own: folders, resume and commands are those of the experiments, whatever was brought along."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("tyro")
from guests import install

from fastent.cli import main
from fastent.grokking.experiments.data import Runs, read_runs
from fastent.grokking.experiments.report import commands
from fastent.grokking.train import Condition, TrainConfig, registry, task_of_table, train
from fastent.grokking.train.config import preset
from fastent.grokking.train.estimate import _kind
from fastent.grokking.train.executors import REFUSED, Order, worker
from fastent.grokking.train.runs import Job, check_record
from fastent.grokking.train.stack import Stack
from fastent.grokking.train.storage import RunError, RunWarning

TINY = {
    "width": 8, "heads": 1, "feedforward": 8, "batch_size": 8, "evaluate_every": 5, "max_steps": 10, "probe_size": 8,
    "quiet": True,
}  # fmt: skip


def nim(config):
    n = np.arange(8)
    return task_of_table("nim", n[:, None] ^ n, config)


class Quiet(Condition):
    """The head is trained on smaller representations."""

    def before_head(self, hidden):
        return hidden / 2

    def before_head_gradient(self, grad):
        return grad / 2


def largest(moment):
    """Largest logit on the training set."""
    return {"largest": moment.logits("train").amax((1, 2))}


@pytest.fixture(autouse=True)
def _nothing_stays(monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    yield
    registry._installed.cache_clear()


def test_a_task_a_condition_and_a_measure_of_a_script_are_trained_recorded_and_read(tmp_path):
    paths = train(nim, condition=Quiet(), measures=[largest], seeds=(1, 0), out=tmp_path, **TINY)
    name = "own-quiet-nim-width=8,heads=1,feedforward=8,batch_size=8,max_steps=10,evaluate_every=5,probe_size=8-seed"
    assert [path.name for path in paths] == [f"{name}1", f"{name}0"]
    guests = json.loads((paths[0] / "config.json").read_text())["guests"]
    assert [(each["kind"], each["name"], each["package"]) for each in guests] == [
        ("task", "nim", ""),
        ("condition", "quiet", ""),
        ("measure", "largest", ""),
    ]
    assert guests[1]["place"] == "test_own:Quiet"
    stored = read_runs(tmp_path)
    # The same by hand.
    settings = {k: v for k, v in TINY.items() if k != "quiet"}
    config = preset("quick", task="nim", measures=("largest",), **settings)
    stack = Stack(config, (0,), condition=Quiet())
    for row in Runs(tuple(stored)).select("own", "quiet", "nim").stored[0].rows:
        assert row["largest"] == pytest.approx(
            float(stack.logits(torch.sort(stack._groups[0].train)[0]).max())
        )
        assert row["parameter_norm"] == float(stack.evaluate()["parameter_norm"][0])
        for _ in range(5):
            stack.train_step()
    (command,) = commands(stored, tmp_path)
    assert "fastent run own --preset quick --width 8 " in command
    assert "--task nim --condition quiet --measures largest --seeds 0-1" in command


class Scaled(Condition):
    """A condition with a value."""

    def __init__(self, kept):
        self.kept = kept

    def after_step(self, state, numbers):
        for tensor in state["parameter"].values():
            tensor.mul_(self.kept)


def test_a_complete_run_is_no_answer_for_a_condition_of_another_value(tmp_path):
    asked = {"modulus": 7, "seeds": [0], "out": tmp_path, **TINY}
    path = train("add", condition=Scaled(0.9), **asked)
    assert train("add", condition=Scaled(0.9), **asked) == path
    with pytest.raises(
        RunError,
        match=r"condition scaled \(test_own:Scaled\): its code or the values that it holds\n.*another --out",
    ):
        train("add", condition=Scaled(0.5), **asked)


def test_the_command_line_and_the_call_make_the_same_runs(tmp_path, capsys):
    arguments = [f"--{k.replace('_', '-')}={v}" for k, v in TINY.items() if k != "quiet"]
    common = [
        "--task",
        "sub",
        "--modulus",
        "7",
        "--condition",
        "losses-0.3+norm-start",
        "--measures",
        "logit_scale",
    ]
    line = ["run", "own", *common, *arguments, "--seeds", "4", "--workers", "1", "--quiet"]
    assert main([*line, "--out", str(tmp_path / "line")]) == 0
    (path,) = train(
        "sub",
        condition="losses-0.3+norm-start",
        measures=["logit_scale"],
        modulus=7,
        seeds=[4],
        out=tmp_path / "call",
        **TINY,
    )
    there = tmp_path / "line" / path.name
    for name in ("metrics.jsonl", "config.json", "checkpoint-10.safetensors", "DONE"):
        assert (path / name).read_bytes() == (there / name).read_bytes()
    assert "guests" not in json.loads((path / "config.json").read_text())
    capsys.readouterr()
    assert main([*line, "--dry-run", "--out", str(tmp_path / "line")]) == 0
    assert "1 complete" in capsys.readouterr().out


def test_a_run_goes_on_where_it_was_stopped_with_the_bits_of_one_that_was_not(tmp_path):
    class Stop:
        def row(self, job, seed, row):
            if row["step"] == 5:
                raise KeyboardInterrupt

        def done(self, job, seed):
            pass

    asked = {"task": nim, "condition": Quiet, "measures": [largest], "seeds": [0], **TINY}

    class Quiet2(Quiet):
        def __init__(self, argument, setting):
            assert (argument, setting.job.config.task) == ("", "nim")

    asked["condition"] = Quiet2
    with pytest.raises(KeyboardInterrupt):
        train(out=tmp_path / "a", observers=[Stop()], **asked)
    (a,), (b,) = train(out=tmp_path / "a", **asked), train(out=tmp_path / "b", **asked)
    assert (a / "metrics.jsonl").read_bytes() == (b / "metrics.jsonl").read_bytes()
    assert (a / "checkpoint-10.safetensors").read_bytes() == (b / "checkpoint-10.safetensors").read_bytes()


def test_workers_take_names_of_installed_packages_and_no_objects(tmp_path):
    with pytest.raises(
        ValueError, match="task 'nim', measure 'largest': known in this process alone, and not to 2"
    ):
        train(nim, measures=[largest], workers=2, out=tmp_path, **TINY)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"task": lambda config: nim(config)}, "a task's name must be a lower-case letter .* got '<lambda>'"),
        ({"task": "chess"}, "task must be add, sub, mul, mul_nonzero or s5; got 'chess'"),
        ({"model": "cnn"}, "model must be transformer or mlp; got 'cnn'"),
        ({"measures": ["slope"]}, "measure must be test_probe, .* or logit_scale; got 'slope'"),
        ({"condition": "noise-0.1"}, "condition must be losses, logits or norm; got 'noise'"),
        ({"condition": "losses-2"}, "own-losses-2-nim: alpha must lie in"),
        ({"condition": "norm-as-baseline"}, "`fastent run own --condition baseline` with the same settings"),
        ({"device": "tpu0"}, "device must be cpu"),
        ({"seeds": [2**64]}, "a seed must be below"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_a_folder_is_made(asked, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        train(**{"task": nim, "out": tmp_path, **TINY, **asked})
    assert not any(tmp_path.iterdir())


def test_what_fails_in_its_first_step_is_refused_with_where_it_came_from(tmp_path):
    def half(moment):
        return {"half": 1 / 0}

    with pytest.raises(
        ValueError, match=r"measure half \(.*half\) failed with ZeroDivisionError: division by zero"
    ):
        train(nim, measures=[half], out=tmp_path, **TINY)

    class Longer(Condition):
        def before_head(self, hidden):
            return hidden[:, :3]

    with pytest.raises(
        ValueError, match=r"Longer.before_head must return \(S, k N, d\) .* got \(1, 3, 8\) for N = 8"
    ):
        train("add", modulus=7, condition=Longer(), out=tmp_path, **TINY)
    assert not any(tmp_path.iterdir())


SOURCE = """
import numpy as np
from fastent.grokking.train import task_of_table
def nim(config):
    n = np.arange(8)
    return task_of_table("nim", n[:, None] ^ n, config)
"""


def test_a_package_that_is_gone_is_named_and_another_version_of_it_is_warned_of(tmp_path, monkeypatch):
    site, out = tmp_path / "site", tmp_path / "runs"
    site.mkdir()
    install(site, "nim-games", "nim_games", SOURCE, {"fastent.tasks": {"nim": "nim_games:nim"}})
    monkeypatch.delitem(sys.modules, "nim_games", raising=False)
    with monkeypatch.context() as there:
        there.syspath_prepend(site)
        (path,) = train("nim", seeds=[0], out=out, **TINY)
        import nim_games

        # The object itself is the package's, too.
        assert train(nim_games.nim, seeds=[0], out=out, **TINY) == [path]
        metadata = site / "nim_games-1.0.dist-info" / "METADATA"
        metadata.write_text(metadata.read_text().replace("Version: 1.0", "Version: 1.1"))
        registry._installed.cache_clear()
        (path / "DONE").unlink()
        with pytest.warns(
            RunWarning, match="with task nim of nim-games 1.0 .*; it goes on with task nim of nim-games 1.1"
        ):
            train("nim", seeds=[0], out=out, **TINY)
    registry._installed.cache_clear()
    with pytest.raises(
        ValueError,
        match=r"nim of nim-games 1\.0 \(nim_games:nim\), which own-.* was trained with, is not there: install it",
    ):
        train("nim", seeds=[0], out=out, **TINY)
    assert main(["run", "own", "--task", "nim", "--out", str(out)]) == 2
    assert main(["runs", str(out)]) == 0  # what only reads needs no package
    assert main(["report", str(out), "--out", str(tmp_path / "report")]) == 0
    page = (tmp_path / "report" / "index.html").read_text()
    assert "Not of this package: task nim of nim-games 1.0 (nim_games:nim)." in page


@pytest.mark.nightly  # two processes, each with torch
def test_an_installed_name_is_known_to_workers(tmp_path, monkeypatch):
    site, out = tmp_path / "site", tmp_path / "runs"
    site.mkdir()
    install(site, "nim-games", "nim_games", SOURCE, {"fastent.tasks": {"nim": "nim_games:nim"}})
    monkeypatch.delitem(sys.modules, "nim_games", raising=False)
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("PYTHONPATH", str(site))
    there = train("nim", seeds=[0, 1], workers=2, out=out, **TINY)
    here = train("nim", seeds=[0, 1], out=tmp_path / "here", **TINY)
    for a, b in zip(there, here, strict=True):
        assert (a / "metrics.jsonl").read_bytes() == (b / "metrics.jsonl").read_bytes()


def test_a_worker_without_the_package_says_so_in_a_sentence_and_is_not_tried_again(monkeypatch, capsys):
    registry.register("task", "nim", nim)
    line = Order(Job("own", "baseline", preset("quick", task="nim"), (0,)), Path("runs")).line()
    monkeypatch.setattr(registry, "_registered", {})
    monkeypatch.setattr(sys, "stdin", io.StringIO(line))
    assert worker() == REFUSED
    assert "task must be add, sub, mul, mul_nonzero or s5; got 'nim'" in capsys.readouterr().err


def test_kinds_of_jobs_that_other_packages_make_slower_are_timed_apart():
    settings = Job("own", "baseline", TrainConfig(), (0,)).settings()
    kinds = [
        _kind(settings, each) for each in ("baseline", "norm-start", "silent-0.1", "losses-0.1+silent-0.1")
    ]
    assert kinds[0] == kinds[1]
    assert (
        len(
            {
                *kinds,
                _kind({**settings, "task": "nim"}, "baseline"),
                _kind({**settings, "layers": 2}, "baseline"),
            }
        )
        == 5
    )


@pytest.mark.parametrize(
    ("guests", "said"), [([3], "guests must hold objects; got 3"), ([{"kind": "task"}], "has no guests.name")]
)
def test_guests_of_another_shape_in_a_folder_are_refused_by_field(guests, said):
    record = {"experiment": "own", "condition": "baseline", "seed": 0, "config": {}, "guests": guests}
    with pytest.raises(RunError, match=said):
        check_record(Path("config.json"), record)


def test_a_job_of_built_in_names_has_no_guests():
    for condition in ("baseline", "to-the-end", "with-mlp-sum", "losses-0.1+norm-as-baseline-each"):
        assert Job("e1", condition, TrainConfig(measures=("fourier",)), (0,)).guests() == []


def test_a_failure_of_one_run_is_raised_once_the_others_are_over(tmp_path, monkeypatch):
    def late(moment):
        if moment.step == 10 and tmp_path.exists() and any(tmp_path.glob("*/metrics.jsonl")):
            raise OverflowError("too much")
        return {"late": [0.0] * len(moment.seeds)}

    with pytest.raises(RunError, match="too much"):
        train(nim, measures=[late], seeds=[0], out=tmp_path, **TINY)
