"""The command line, from the arguments to the exit status."""

import dataclasses
import functools
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("tyro")
pytest.importorskip("safetensors")
import fastent
from fastent import cli, linalg, spectral_entropy
from fastent.cli import main, parse_seeds
from fastent.grokking.experiments.jobs import JOBS, planned
from fastent.grokking.train import environment, estimate, executors, sweep
from fastent.grokking.train.config import preset
from fastent.grokking.train.storage import RunWarning
from fastent.installation import install_command

ROOT = Path(__file__).parents[1]
TINY = (
    *("--modulus", "7", "--width", "8", "--feedforward", "8", "--heads", "2", "--batch-size", "8"),
    *("--probe-size", "8", "--evaluate-every", "10", "--max-steps", "40"),
)
CHANGES = "modulus=7,width=8,heads=2,feedforward=8,batch_size=8,max_steps=40,evaluate_every=10,probe_size=8"
NAME = f"e1-baseline-add-{CHANGES}-seed"


def test_run_trains_every_seed_and_prints_a_row_for_each_whatever_lies_beside(tmp_path, capsys):
    broken = tmp_path / "runs" / f"{NAME}9"
    for folder in (broken, tmp_path / "runs" / "model", tmp_path / "runs" / "notes.tmp"):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{")
    (broken / "metrics.jsonl").write_text('{"step": 0}\n')
    (tmp_path / "runs" / "table.parquet").write_text("PAR1")
    (tmp_path / "runs" / "sweep-x-1.json").write_text('{"pid": 1e999, "host": [], "limits": 3}')
    assert main(["run", "e1", "--seeds", "0,3", "--out", str(tmp_path / "runs"), *TINY]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""  # no progress bar where there is no terminal
    assert "e1 baseline add" in captured.out
    for word in ("seed", "T_mem", "T_grok", "T_cross", "lead"):
        assert word in captured.out
    assert re.findall(r"^ +(\d) .* 40 +max_steps", captured.out, re.MULTILINE) == ["0", "3"]
    config = json.loads((tmp_path / "runs" / f"{NAME}3" / "config.json").read_text())
    assert config["stack"] == [0, 3]
    assert config["config"]["modulus"] == 7
    assert config["config"]["learning_rate"] == preset("quick").learning_rate == 2e-3


def test_run_starts_from_the_preset_it_is_given(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(sweep, "run_jobs", lambda jobs, *arguments, **options: seen.extend(jobs) or [])
    for spelling in (["--preset", "paper"], ["--preset=paper"]):
        assert (
            main(["run", "e1", *spelling, "--seeds", "4", "--weight-decay", "0.5", "--out", str(tmp_path)])
            == 0
        )
    assert [dataclasses.replace(job.config, measures=()) for job in seen] == [
        preset("paper", weight_decay=0.5)
    ] * 2
    assert [job.seeds for job in seen] == [(4,), (4,)]


def test_run_all_asks_for_every_job_of_every_experiment_once(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(sweep, "run_jobs", lambda jobs, *arguments, **options: seen.extend(jobs) or [])
    assert main(["run", "all", "--seeds", "0-1", "--out", str(tmp_path)]) == 0
    assert seen == list(
        dict.fromkeys(job for each in JOBS for job in planned(each, preset("quick"), "quick", (0, 1)))
    )
    seen.clear()
    assert main(["run", "all", "--seeds", "0-11", "--out", str(tmp_path)]) == 0
    trained = [job.run_name(seed) for job in seen for seed in job.seeds]
    # E3 asks for ten of the mixed runs that E2 has twelve of.
    assert len(set(trained)) == len(trained)
    assert {f"e2-losses-0.1-add-seed{seed}" for seed in range(12)} <= set(trained)
    shares = {job.config.train_fraction for job in seen if job.config.modulus == 41}
    assert shares == {0.2, 0.3, 0.4, 0.5, 0.6}


@pytest.mark.parametrize(("device", "workers"), [("cpu", 3), ("cuda", 1)])
def test_run_uses_a_process_for_each_thread_of_a_cpu_unless_told(device, workers, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(
        sweep, "run_jobs", lambda jobs, *arguments, **options: seen.append((jobs, options["workers"])) or []
    )
    for given in ([], ["--workers", "2"]):
        assert main(["run", "e4", "--seeds", "0-5", "--device", device, "--out", str(tmp_path), *given]) == 0
    assert [n for _, n in seen] == [workers, 2]
    assert [len(jobs) for jobs, _ in seen] == [workers, 2]  # stacks


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["e9"], f"experiment must be one of {', '.join(JOBS)}, all or own; got 'e9'"),
        (
            ["e1", "--seeds", "2-0"],
            "seeds must be numbers and ranges without repetition, such as 0-2 or 0,3,7-9; got '2-0'",
        ),
        (["e1", "--preset", "slow"], "no preset is called 'slow'; there are quick, paper"),
        (["e1", "--workers", "0"], "workers must be at least 1; got 0"),
        (["e1", "--workers", "1000000"], "workers must be at least 1 and at most"),
        (["e1", "--seeds", "0-99999999999"], "seeds must be at most 10,000 at a time"),
        (["e1", "--seeds", "18446744073709551616"], "a seed must be below 2^64; got 18446744073709551616"),
        (
            ["e1", "--device", "banana"],
            "device must be cpu, or a CUDA device such as cuda or cuda:0; got 'banana'",
        ),
        (
            ["e1", "--device", "meta"],
            "device must be cpu, or a CUDA device such as cuda or cuda:0; got 'meta'",
        ),
        (["e1", "--device", "cuda:9"], "got 'cuda:9', and torch sees"),
        (
            ["e1", "--task", "mul_nonzero", "--modulus", "8"],
            "e1-baseline-mul_nonzero: mul_nonzero needs a prime",
        ),
        (
            ["e6", "--modulus", "9"],
            "e6-baseline-mul: characters of products need an odd prime modulus; got 9",
        ),
        (["e6", "--modulus", "1"], "modulus must be at least 1; got 0"),
        (["e1", "--train-fraction", "1e-4"], "e1-baseline-add: train_fraction 0.0001 leaves 1 of 9409 pairs"),
        (["e1", "--modulus", "1000000000"], "e1-baseline-add: a seed of these settings needs some"),
        (["e7", "--max-steps", "16777216"], "max_steps must be at most 2^24"),
        (["e1", "--width", "64,,128"], "--width 64,,128 has an empty item: write values with commas"),
        (["e1", "--width", "64,", "128"], "--width 64, has an empty item"),
        (["e1", "--width=64,128,64"], "--width 64,128,64 has 64 twice"),
        (["e1", "--learning-rate", "1e-3,0.001"], "--learning-rate 1e-3,0.001 has 0.001 twice"),
        (["e1", "--width", "64,wide"], "--width takes whole numbers; got 'wide' in 64,wide"),
        (["e1", "--learning_rate", "1e-3,x"], "--learning_rate takes numbers; got 'x' in 1e-3,x"),
        (["e1", "--task", "add,div"], "--task div: task must be add, sub, mul, mul_nonzero or s5"),
        (["e1", "--heads", "4,5"], "--heads 5: width must be a multiple of heads; got width=128, heads=5"),
        (
            ["e1", "--model", "transformer,mlp", "--operand-tokens", "images", "--task", "s5"],
            '--model mlp: operand_tokens="images" needs task="s5" and model="transformer"',
        ),
        (["e1", "--modulus", "97,1"], "--modulus 1: e1-baseline-add: train_fraction 0.4 leaves 0 of 1 pairs"),
        (["e1", "--betas", "0.9,0.98"], "--betas takes no list to sweep over"),
        (["e1", "--final-norm", "1,0"], "--final-norm takes no list to sweep over"),
        (["e1", "--width", "64,128", "--device", "banana"], "fastent: device must be cpu"),
    ],
)
def test_run_says_what_an_argument_must_be(tmp_path, capsys, arguments, message):
    assert main(["run", *arguments, "--out", str(tmp_path / "runs")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastent: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_run_refuses_a_file_in_the_place_of_its_folder(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["run", "e1", "--out", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err == (
        f"fastent: --out must be a folder, and {tmp_path / 'file'} is a file: give another place\n"
    )


@pytest.mark.parametrize(("option", "value"), [("--learning-rate", "inf"), ("--epsilon", "nan")])
def test_a_setting_out_of_its_range_is_wrong_usage(tmp_path, capsys, option, value):
    assert main(["run", "e1", "--out", str(tmp_path / "runs"), option, value]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"fastent: {option[2:].replace('-', '_')} must be finite")
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def jobs_of(monkeypatch, tmp_path, *arguments):
    seen = []
    monkeypatch.setattr(sweep, "run_jobs", lambda jobs, *rest, **options: seen.extend(jobs) or [])
    assert main(["run", *arguments, "--out", str(tmp_path)]) == 0
    return {(job.config.task, job.condition): job.config.train_fraction for job in seen}


def test_s5_trains_at_its_own_fraction_however_it_is_chosen_unless_a_fraction_is_given(monkeypatch, tmp_path):
    def fractions(*arguments):
        return jobs_of(monkeypatch, tmp_path, *arguments, "--seeds", "0")

    own = preset("paper", task="s5").train_fraction
    assert own == 0.5
    for spelling in (["--task", "s5"], ["--task=s5"]):
        for name in ("paper", "quick"):
            assert fractions("e1", *spelling, "--preset", name) == {("s5", "baseline"): 0.5}
    assert fractions("e1", "--task", "s5", "--preset", "paper", "--train-fraction", "0.7") == {
        ("s5", "baseline"): 0.7
    }
    by_task = fractions("e6", "--preset", "paper")
    assert by_task.pop(("s5", "baseline")) == by_task.pop(("s5", "with-images")) == 0.5
    assert set(by_task.values()) == {0.3}
    assert set(fractions("e6", "--preset", "paper", "--train-fraction", "0.6").values()) == {0.6}
    by_task = fractions("e6", "--preset", "paper", "--task", "s5")
    assert by_task.pop(("s5", "baseline")) == by_task.pop(("s5", "with-images")) == 0.5
    assert set(by_task.values()) == {0.3}


def test_lists_of_values_train_every_combination_under_names_that_say_which(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(sweep, "run_jobs", lambda jobs, *rest, **options: seen.extend(jobs) or [])

    def names(*arguments):
        seen.clear()
        assert main(["run", *arguments, "--seeds", "0", "--workers", "1", "--out", str(tmp_path)]) == 0
        return [job.run_name(0).removesuffix("-seed0") for job in seen]

    assert names("e1", "--width=64,128", "--learning_rate", "1e-3,2e-3", "--heads", "8") == [
        "e1-baseline-add-width=64,heads=8,learning_rate=0.001",
        "e1-baseline-add-width=64,heads=8",
        "e1-baseline-add-heads=8,learning_rate=0.001",
        "e1-baseline-add-heads=8",  # 128 and 2e-3 are the preset's
    ]
    assert [(job.config.width, job.config.learning_rate) for job in seen] == [
        *((64, 1e-3), (64, 2e-3), (128, 1e-3), (128, 2e-3))
    ]
    assert names("e1", "--width", "64,128", "--width", "32") == ["e1-baseline-add-width=32"]
    # What does not depend on a setting is trained once.
    modulus = names("e7", "--modulus", "59,97")
    assert len(modulus) == len(set(modulus)) == 2 * len(names("e7")) - 10
    assert names("e1", "--task", "add,s5") == ["e1-baseline-add", "e1-baseline-s5"]
    assert [job.config.train_fraction for job in seen] == [0.4, 0.5]


def test_the_sweep_of_the_docs_runs_as_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("TRIAL_SECONDS", "LEAST_SECONDS"):
        monkeypatch.setattr(estimate, name, 0.0)
    text = (ROOT / "docs" / "runs.md").read_text()
    part = text.partition("## A sweep over a setting\n")[2].partition("\n## ")[0]
    dry, run, compare = re.findall(r"^fastent (.*)$", part, re.MULTILINE)
    small = [*TINY[:2], *TINY[4:], "--seeds", "0"]  # not the width
    assert main([*dry.split(), *small]) == 0
    printed = capsys.readouterr().out
    assert "2 runs in 2 stacks" in printed
    assert re.findall(r"^  (--width \d+): 1 run, ", printed, re.MULTILINE) == ["--width 64", "--width 128"]
    assert main([*run.split(), *small, "--workers", "1"]) == 0
    titles = re.findall(r"^ *(e1-baseline-add-.*?)$", capsys.readouterr().out, re.MULTILINE)
    assert len(titles) == 2  # a table of each setting
    assert len(list((tmp_path / "runs" / "width").glob("*width=64*"))) == 1
    assert main([*compare.split()]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines if line.startswith("width ")] == [["width", "128", "64"]]


def test_the_executors_of_the_docs_are_started_as_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    started, ran = [], []

    def of_name(name):
        return lambda *arguments, **options: started.append((name, *arguments, options)) or name

    for name in ("Ray", "Slurm", "Pool", "Inline"):
        monkeypatch.setattr(executors, name, of_name(name))
    monkeypatch.setattr(sweep, "run_jobs", lambda *_, **options: ran.append(options) or [])
    monkeypatch.setattr(cli, "_check_out", lambda out: None)
    text = (ROOT / "docs" / "runs.md").read_text()
    part = text.partition("## On other machines\n")[2].partition("\n## ")[0]
    commands = re.findall(r"^fastent (.*)$", part, re.MULTILINE)
    for command in commands:
        assert main(shlex.split(command)) == 0
    ray, sharing, slurm, local = started
    assert ray == ("Ray", {"address": "auto", "size": None, "threads": 1, "gpus": 0.0})
    assert sharing == ("Ray", {"address": "auto", "size": None, "threads": 1, "gpus": 0.25})
    assert slurm[1:3] == (
        Path("/shared/paper"),
        {
            "local": False,
            "size": None,
            "threads": 1,
            "gpus": 0.0,
            "options": {"partition": "short", "time": 240, "mem": "8GB"},
        },
    )
    assert (local[2]["local"], local[2]["size"]) == (True, 1)
    assert [options["executor"] for options in ran] == ["Ray", "Ray", "Slurm", "Slurm"]
    assert [options["command"] for options in ran] == [f"fastent {command}" for command in commands]
    started.clear()
    for given in ([], ["--workers", "2"], ["--executor", "pool"], ["--executor", "inline", "--workers", "2"]):
        assert main(["run", "e1", "--out", "runs", *given]) == 0
    assert started == [("Inline", {}), ("Pool", 2, None, {}), ("Pool", 1, None, {}), ("Inline", {})]


def test_on_a_cluster_each_seed_is_a_job_on_a_cpu_and_all_are_one_on_a_gpu(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(executors, "Ray", lambda **_: None)
    monkeypatch.setattr(sweep, "run_jobs", lambda jobs, *_, **__: seen.append(len(jobs)) or [])
    cluster = ("--executor", "ray", "--address", "auto", "--seeds", "0-5", "--out", str(tmp_path))
    for device in ("cpu", "cuda"):  # which this machine does not have
        assert main(["run", "e1", *cluster, "--device", device]) == 0
    assert seen == [6, 1]


def test_a_failed_run_ends_with_its_last_lines_and_the_command_that_tries_it_again(
    tmp_path, monkeypatch, capsys
):
    def run_jobs(jobs, *_, **__):
        return [sweep.JobOutcome(job, 2, "its process ended with status 1", ("one", "two")) for job in jobs]

    monkeypatch.setattr(sweep, "run_jobs", run_jobs)
    assert main(["run", "e1", "--seeds", "7", "--out", str(tmp_path / "a b")]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "fastent: failed after 2 attempts: e1-baseline-add-seed7: its process ended with status 1",
        "  one",
        "  two",
        f"fastent: 1 of 1 jobs failed; to try again: fastent run e1 --seeds 7 --out '{tmp_path / 'a b'}'",
    ]


@pytest.mark.parametrize(
    ("executor", "package", "extra"), [("ray", "ray", "sweep"), ("slurm", "submitit", "slurm")]
)
def test_an_executor_that_is_not_installed_is_a_line_with_the_extra(
    tmp_path, monkeypatch, capsys, executor, package, extra
):
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["run", "e1", "--executor", executor, "--out", str(tmp_path / "runs")]) == 1
    assert capsys.readouterr().err == (
        f"fastent: this needs {package}, which is not installed: {install_command(extra)}\n"
    )
    assert not (tmp_path / "runs").exists()


def help_of(capsys, *command):
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def examples_in(text):
    found = text.partition("For example:\n")[2].partition("\n\n")[0]
    return [shlex.split(line.partition("|")[0]) for line in re.findall(r"^ +fastent (.*)", found, re.M)]


def test_the_help_of_every_command_has_examples_that_are_parsed(monkeypatch, capsys):
    called = []

    def only_noted(function, name):
        @functools.wraps(function)
        def noted(*_, **__):
            called.append(name)
            return 0

        return noted

    commands = re.findall(r"• (\w+)", help_of(capsys))
    assert {"run", "runs", "watch", "compare", "report", "entropy", "doctor"} <= set(commands)
    examples = examples_in(help_of(capsys))
    assert 2 <= len(examples) <= 4
    for name in commands:
        here = examples_in(help_of(capsys, name))
        assert 2 <= len(here) <= 3, name
        assert {example[0] for example in here} == {name}
        examples += here
        own = name + "_" * hasattr(
            cli, name + "_"
        )  # list_ and runs_ are names of Python's, or of an argument
        monkeypatch.setattr(cli, own, only_noted(getattr(cli, own), name))
    for example in examples:
        arguments = example[: next((i for i, part in enumerate(example) if part[0] in ">&"), None)]
        if "--help" in arguments:
            help_of(capsys, arguments[0])
            continue
        called.clear()
        assert main(arguments) == 0
        assert called == arguments[:1]


def test_the_help_of_all_commands_is_a_line_or_two_for_each(capsys):
    text = help_of(capsys)
    assert text.count("For example") == 1
    assert "• watch    Watch runs in training" in text
    assert text.count("\n") < 50


def test_runs_of_another_preset_do_not_join_a_folder_unless_forced(monkeypatch, tmp_path, capsys):
    assert main(["run", "e1", "--seeds", "0", "--out", str(tmp_path), *TINY]) == 0
    before = sorted(tmp_path.rglob("*"))
    arguments = ["run", "e1", "--seeds", "1", "--out", str(tmp_path), *TINY, "--preset", "paper"]
    capsys.readouterr()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"fastent: {tmp_path} holds {NAME}0 with other settings (train_fraction 0.4, ")
    assert error.endswith("give another --out, or --force to have them side by side\n")
    assert sorted(tmp_path.rglob("*")) == before
    assert main([*arguments, "--force"]) == 0
    # More seeds of the same settings, and other tasks, are no mixture.
    assert main(["run", "e1", "--seeds", "2", "--out", str(tmp_path / "a"), *TINY]) == 0
    for more in (["--seeds", "3"], ["--seeds", "3", "--task", "sub", "--weight-decay", "0.5"]):
        assert main(["run", "e1", "--out", str(tmp_path / "a"), *TINY, *more]) == 0


@pytest.mark.parametrize(
    ("encoding", "errors"),
    [("ascii", "strict"), ("cp1252", "strict"), ("latin-1", "strict"), ("ascii", "surrogateescape")],
)
def test_a_completed_run_ends_with_status_0_in_any_encoding_of_the_terminal(
    tmp_path, monkeypatch, encoding, errors
):
    streams = {}
    for name in ("stdout", "stderr"):
        streams[name] = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=errors)
        monkeypatch.setattr(sys, name, streams[name])
    assert main(["run", "e1", "--seeds", "0", "--out", str(tmp_path / "runs"), *TINY]) == 0
    streams["stdout"].flush()
    printed = streams["stdout"].buffer.getvalue().decode(encoding)
    assert re.search(r"0 +\S +\S .* 40 .*max_steps", printed)
    assert [stream.errors for stream in streams.values()] == [errors] * 2


DRAWN = """
import sys
from fastent import cli
def draw(arguments):
    from fastent.grokking.experiments import figures
    import matplotlib.pyplot
    print(matplotlib.get_backend())
    return 0
cli._dispatch = draw
sys.exit(cli.main([]))
"""


def test_figures_are_drawn_into_files_whatever_backend_a_notebook_named():
    environment = {**os.environ, "MPLBACKEND": "module://no_such_package.backend_inline"}
    done = subprocess.run([sys.executable, "-c", DRAWN], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip().lower(), done.stderr) == (0, "agg", "")


def test_another_configuration_fails_with_the_diff_and_force_goes_on(tmp_path, capsys):
    arguments = ["run", "e1", "--seeds", "0", "--out", str(tmp_path), *TINY]
    assert main([*arguments, "--preset", "paper"]) == 0
    capsys.readouterr()
    other = [*arguments, "--preset", "paper-gelu"]
    assert main(other) == 1
    captured = capsys.readouterr()
    assert "config.activation: relu in the folder, gelu now" in captured.err
    assert "fastent: 1 of 1 jobs failed" in captured.err
    assert captured.out == ""
    name = tmp_path / f"{NAME}0"
    (name / "DONE").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("always", RunWarning)
        assert main([*other, "--force"]) == 0
    assert capsys.readouterr().err == (
        f"fastent: warning: {name}: --force ignores that the folder has\n"
        "  config.activation: relu in the folder, gelu now\n"
    )


def test_a_run_with_another_setting_has_a_folder_that_says_which(tmp_path, capsys):
    arguments = ["run", "e1", "--seeds", "0", "--out", str(tmp_path), *TINY]
    assert main(arguments) == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert main([*arguments, "--learning-rate", "5e-4"]) == 0
    names = [NAME, NAME.replace("batch", "learning_rate=0.0005,batch")]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"{name}0" for name in names)
    assert {path: path.read_bytes() for path in before} == before
    capsys.readouterr()
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "report")]) == 1
    error = capsys.readouterr().err
    assert all(f"{name}0" in error for name in names)
    assert "one seed under 2 settings, and a report would mix them" in error


def test_a_folder_from_before_names_carried_settings_goes_on_under_its_name(tmp_path):
    arguments = ["run", "e1", "--seeds", "0", "--out", str(tmp_path), *TINY]
    assert main(arguments) == 0
    old = (tmp_path / f"{NAME}0").rename(tmp_path / "e1-baseline-add-seed0")
    (old / "DONE").unlink()
    assert main([*arguments[:3], "0-1", *arguments[4:]]) == 0
    assert (old / "DONE").exists()
    assert {path.name for path in tmp_path.iterdir()} == {f"e1-baseline-add-seed{seed}" for seed in (0, 1)}
    assert main([*arguments, "--learning-rate", "0.5"]) == 0  # of another setting
    assert (tmp_path / f"{NAME.replace('batch', 'learning_rate=0.5,batch')}0").is_dir()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_command_with_its_status_and_the_same_command_goes_on(
    tmp_path, number, status, capsys
):
    arguments = ["run", "e1", "--seeds", "0-1", "--out", str(tmp_path), *TINY[:-1], "6000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fastent.cli", *arguments]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        name = NAME.replace("max_steps=40", "max_steps=6000")
        metrics = tmp_path / f"{name}1" / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_bytes().count(b"\n") > 3):
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(number)
        _, error = process.communicate()
    assert process.returncode == status
    assert re.search(
        rf"fastent: {number.name}: stopped after step \d+, saved; the same command goes on", error
    )
    stopped = json.loads(next((tmp_path / f"{name}1").glob("checkpoint-*.json")).read_text())["step"]
    assert 30 <= stopped < 6000


def test_report_is_written_from_a_folder_of_runs(tmp_path, capsys):
    assert main(["run", "e1", "--seeds", "0", "--out", str(tmp_path / "runs"), *TINY]) == 0
    capsys.readouterr()
    assert main(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "report")]) == 0
    page = tmp_path / "report" / "index.html"
    assert capsys.readouterr().out.strip() == str(page)
    assert page.exists()
    assert main(["report", str(tmp_path / "nothing")]) == 1
    assert "nothing does not exist: give the --out" in capsys.readouterr().err


def test_entropy_prints_what_the_function_returns(tmp_path, capsys):
    h = np.random.default_rng(0).normal(size=(50, 8)) * np.arange(1, 9)
    np.save(tmp_path / "h.npy", h.astype(">f8"))
    assert main(["entropy", str(tmp_path / "h.npy")]) == 0
    printed = dict(re.split(r"  +", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    expected = spectral_entropy(torch.from_numpy(h))
    assert float(printed["H (normalised)"].split()[0]) == pytest.approx(expected.normalized, abs=1e-6)
    assert float(printed["effective rank"].split()[0]) == pytest.approx(expected.effective_rank, abs=1e-4)
    assert printed["samples, features"] == "50, 8   >f8"
    assert printed["status"] == "ok"


def test_entropy_passes_errors_and_warnings_on(tmp_path, capsys):
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).normal(size=(20, 3, 4)))
    assert main(["entropy", str(tmp_path / "tokens.npy")]) == 1
    assert "--tokens flatten" in capsys.readouterr().err
    assert main(["entropy", str(tmp_path / "tokens.npy"), "--tokens", "mean"]) == 0
    np.save(tmp_path / "few.npy", np.eye(4))
    assert main(["entropy", str(tmp_path / "few.npy")]) == 0
    assert "rank_limited: 4 samples in 4 dimensions" in capsys.readouterr().out
    assert main(["entropy", str(tmp_path / "missing.npy")]) == 1
    assert "missing.npy" in capsys.readouterr().err


def test_list_names_experiments_and_presets(capsys):
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^  e1  Does the entropy collapse precede grokking\?$", printed, re.MULTILINE)
    assert len(re.findall(r"^  (?:e\d|choices|sham)  .*[.?]$", printed, re.MULTILINE)) == len(JOBS)
    assert re.search(
        r"^  paper  what the others start from: the paper's values .* and ours$", printed, re.MULTILINE
    )
    assert re.search(r"^  quick  .*evaluate_every = 50", printed, re.MULTILINE)


@pytest.mark.parametrize("buffering", [-1, 0], ids=["buffered", "PYTHONUNBUFFERED"])
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("command", ["list", "entropy --help", "report nowhere", "--version"])
def test_a_command_whose_reader_has_gone_ends_without_a_word(stream, command, buffering, monkeypatch, capfd):
    written, complaints = os.pipe(), io.StringIO()
    os.close(written[0])
    streams = {"stdout": io.StringIO(), "stderr": complaints}
    with io.TextIOWrapper(open(written[1], "wb", buffering), write_through=not buffering) as unread:
        for name, other in streams.items():
            monkeypatch.setattr(sys, name, unread if name == stream else other)
        silent = (command == "report nowhere") == (stream == "stdout")
        try:
            status = main(command.split())
        except SystemExit as ended:
            status = ended.code
    assert status == ({"report nowhere": 1}.get(command, 0) if silent else 141)
    assert "pipe" not in complaints.getvalue() + "".join(capfd.readouterr()).lower()


def test_ctrl_c_ends_a_command_that_trains_nothing_without_a_traceback(monkeypatch, capsys):
    def stopped():
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "list_", stopped)
    assert main(["list"]) == 130
    assert capsys.readouterr().err == ""


def test_a_broken_pipe_of_another_kind_is_told(monkeypatch, capsys):
    def broken():
        raise BrokenPipeError("a worker has gone")

    monkeypatch.setattr(cli, "list_", broken)
    assert main(["list"]) == 1
    assert capsys.readouterr().err == "fastent: a worker has gone\n"


def test_doctor_says_what_would_be_used_and_what_is_missing(capsys, monkeypatch):
    monkeypatch.setattr(cli, "EXTRA", ("tyro", "no-such-package"))
    assert main(["doctor"]) == 0
    found = dict(re.split(r" +", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert found["torch"].startswith(torch.__version__)
    assert found["threads"].startswith(f"{torch.get_num_threads()} of {os.cpu_count()} processors")
    assert found["no-such-package"] == "not installed"
    if not torch.cuda.is_available():
        assert found["GPU"].endswith("torch computes the covariance")


def test_doctor_lists_each_host_of_an_integration_with_its_version_or_as_missing(monkeypatch):
    there = {"lightning": "2.6.6", "mlflow-skinny": "3.17.2"}
    monkeypatch.setattr(environment, "version", there.get)
    found = dict(cli.examine())
    assert {host: found[host] for host in cli.HOSTS} == {
        **dict.fromkeys(cli.HOSTS, "not installed"),
        "lightning": "2.6.6",
        "mlflow": "3.17.2",
    }
    assert not {"lightning", "torchmetrics"} & set(cli.EXTRA)  # nobody is told to install them


@pytest.mark.parametrize(
    ("preferred", "available", "said"),
    [
        (True, True, "NumPy's OpenBLAS computes"),
        (False, True, "torch computes covariances and eigensolves; with OMP_NUM_THREADS=1"),
        (False, False, "torch computes covariances and eigensolves"),
    ],
)
def test_doctor_says_which_library_serves_the_cpu(preferred, available, said, monkeypatch):
    monkeypatch.setattr(linalg, "openblas_preferred", lambda x, product_edge=None: preferred)
    monkeypatch.setattr(linalg, "openblas_available", lambda: available)
    found = dict(cli.examine())["products"]
    assert found.startswith(said)
    assert ("OMP_NUM_THREADS" in found) == ("OMP_NUM_THREADS" in said)


def test_doctor_ends_with_the_remedy(monkeypatch):
    monkeypatch.setattr(cli, "EXTRA", ("tyro", "no-such-package"))
    assert cli.examine()[-1] == (
        "to do",
        f"{install_command('train')}, for no-such-package",
    )


def test_doctor_says_where_another_project_of_this_name_is_in_the_way(monkeypatch):
    assert "conflict" not in dict(cli.examine())
    monkeypatch.setattr(cli, "conflict", lambda: "another project")
    assert cli.examine()[-1] == ("conflict", "another project")


def test_the_version_is_that_of_the_package(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fastent {fastent.__version__}\n"


WITHOUT = """
import sys
from fastent.cli import main
for name in ("tyro", "safetensors", "rich"):
    sys.modules[name] = None
    print(main(["run", "e1", "--seeds", "0", "--out", sys.argv[1]]), file=sys.stderr)
    del sys.modules[name]
"""


def test_fastent_imports_without_its_extra_and_names_the_remedy_where_it_is_needed(tmp_path):
    command = [sys.executable, "-c", WITHOUT, str(tmp_path / "runs")]
    error = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    assert error == "".join(
        f"fastent: this needs {name}, which is not installed: {install_command('train')}\n1\n"
        for name in ("tyro", "safetensors", "rich")
    )
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("text", "seeds"), [("0-2", (0, 1, 2)), ("5", (5,)), ("0,3,7-9", (0, 3, 7, 8, 9)), ("10-10", (10,))]
)
def test_seeds_are_read_as_numbers_and_ranges(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "a", "3-1", "-1", "1,,2", "0-2,1", "1.5"])
def test_what_is_no_list_of_seeds_is_refused(text):
    with pytest.raises(ValueError, match="seeds must be numbers and ranges without repetition"):
        parse_seeds(text)
