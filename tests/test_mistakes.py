"""Typical mistakes at the command line and in Python, each with the sentence that it ends in; none is a traceback."""

import re
import sys

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("tyro")
pytest.importorskip("safetensors")
from fastent import Collapse, SpectralEntropyMonitor, StopAfterCrossing, cli, spectral_entropy
from fastent.cli import main
from fastent.integrations.loggers import log_to

WRITTEN = """
import fastent, torch
def raises(): return 1 / 0
def another_width():
    return fastent.SpectralEntropyMonitor(torch.nn.Linear(4, 3), torch.ones(8, 5), "")
def at_the_first_pass():
    return fastent.SpectralEntropyMonitor(torch.nn.Linear(4, 3), torch.ones(8, 5), "", check=False)
def a_number(): return 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, in which things are as they should not be."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("no runs here")
    (tmp_path / "file").write_text("")
    (tmp_path / "h.csv").write_text("1,2\n")
    (tmp_path / "planned.py").write_text(WRITTEN)
    (tmp_path / "broken.py").write_text("def make(:\n")
    (tmp_path / "needs.py").write_text("import not_here\n")
    for name, array in {
        "flat": np.ones(5),
        "complex": np.ones((5, 3), complex),
        "objects": np.array([[1, "a"], [2, "b"]], dtype=object),
        "words": np.array([["a", "b"]]),
        "row": np.ones((1, 4)),
        "tokens": np.ones((4, 3, 2)),
    }.items():
        np.save(tmp_path / f"{name}.npy", array)
    np.savez(tmp_path / "two.npz", a=np.ones((3, 3)), b=np.ones((3, 3)))
    yield tmp_path
    for name in ("planned", "broken", "needs"):
        sys.modules.pop(name, None)


ONE_SETTING = "bench/results/paper/e1-baseline-add.parquet"

COMMANDS = {
    "rnu e1": "Unrecognized options: rnu",
    "": "Missing subcommand",
    "run": "One of `fastent list`",
    "run e9": "experiment must be one of e1, e2, .*, all or own; got 'e9'",
    "run e1 --sedes 1": "--sedes.*Perhaps you meant: --seeds",
    "run e1 --preset qiuck": "no preset is called 'qiuck'; there are quick, paper",
    "run e1 --task ad": "task must be add, .*; got 'ad'",
    "run e1 --seeds 5-2": "seeds must be numbers and ranges .* such as 0-2 or 0,3,7-9; got '5-2'",
    "run e1 --seeds a": "seeds must be numbers and ranges .*; got 'a'",
    "run e1 --max-steps -5": "^fastent: max_steps must be at least 1; got -5$",
    "run e1 --max-steps lots": "--max-steps: .*'lots'",
    "run e1 --heads 3": "^fastent: width must be a multiple of heads; got width=128, heads=3$",
    "run e7 --layers 2": "^fastent: layers must be 1 for the MLP, .* E7 trains MLPs; got 2$",
    "run e1 --workers -1": "workers must be at least 1; got -1",
    "run e1 --executor dask": "invalid choice 'dask'",
    "run e1 --address auto": "--address is for --executor ray or slurm; got 'auto' without either",
    "run e1 --executor slurm --address auto": "--address must be local for --executor slurm, or left out; got 'auto'",
    "run e1 --gpus 1": "--gpus is for --executor ray or slurm; got 1 without either",
    "run e1 --executor ray --gpus -1": "--gpus must be 0 or more; got -1",
    "run e1 --executor pool --slurm time=1": "--slurm is for --executor slurm; got time=1 without it",
    "run e1 --executor slurm --slurm time": "--slurm takes options as name=value, such as partition=gpu; got 'time'",
    "run e1 --threads 0": "--threads must be at least 1; got 0",
    "run e1 --executor inline --threads 3": "--threads must be 1 .* begin the command with OMP_NUM_THREADS=3",
    "run e1 --executor ray --device cuda:1": "--device must be cpu or cuda for --executor ray; got 'cuda:1'",
    "run e1 --device gpu": "device must be cpu, or a CUDA device such as cuda or cuda:0; got 'gpu'",
    "run e1 --out file": "--out must be a folder, and file is a file: give another place",
    "run e1 --out file/runs": "--out must be a folder, and file is a file: give another place",
    "report": "The --out of `fastent run`",
    "report nowhere": "nowhere does not exist: give the --out of `fastent run`",
    "report empty": "empty holds no run that can be read: give the --out of `fastent run`",
    "report empty --out file": "--out must be a folder, and file is a file: give another place",
    "report empty --check --fill": "give --check or --fill, not both",
    "runs file": "file is a file and no folder of runs: give the --out of `fastent run`",
    "runs other": "other holds no run, only notes.txt: give the --out of `fastent run`",
    "watch nowhere": "nowhere does not exist: give the --out of `fastent run`",
    "watch empty": "empty is empty: give the --out of `fastent run`",
    f"compare {ONE_SETTING}": "a comparison needs complete runs of two settings, .*: name two folders",
    "compare empty --out x.pdf": "--out must end in .html, .* got x.pdf",
    "entropy none.npy": "none.npy does not exist; the current folder is /",
    "entropy empty": "empty is a folder: name the file of activations in it",
    "entropy h.csv": "h.csv is neither .npy, .npz nor .safetensors: save the activations with numpy.save",
    "entropy flat.npy": r"flat.npy holds shape \(5,\): it must be \(n, d\)",
    "entropy complex.npy": r"complex.npy: h is complex \(torch.complex128\): use torch.view_as_real",
    "entropy objects.npy": "objects.npy holds Python objects, .*: save numbers",
    "entropy words.npy": "words.npy holds <U1, .*: save it as float32",
    "entropy row.npy": "row.npy: a covariance needs at least 2 samples .* got N = 1",
    "entropy two.npz": r"two.npz holds 2 arrays \(a, b\), and it must be one: save that one alone",
    "entropy tokens.npy": r"tokens.npy holds shape \(4, 3, 2\).*: say what the tokens are to be, --tokens",
    "entropy tokens.npy --tokens lsat": "'lsat'.*'last'",
    "plan --model": "Missing value for argument '--model'",
    "plan --model planned": "model is MODULE:FUNCTION, such as train:make_monitor; got 'planned'",
    "plan --model nowhere:make": "model='nowhere:make': No module named 'nowhere'; looked for in /",
    "plan --model planned:make": "planned has no 'make'; its functions are raises, another_width",
    "plan --model planned:raises": r"raised ZeroDivisionError: division by zero \(/.*planned.py, line 3\)",
    "plan --model planned:a_number": "must return a fastent.SpectralEntropyMonitor, .*; got int",
    "plan --model planned:another_width": r"shapes cannot .*of shape \(8, 5\).*planned.py, line 5\)",
    "plan --model planned:at_the_first_pass": "model='planned:at_the_first_pass' raised RuntimeError: mat1",
    "plan --model broken:make": r"model='broken:make': invalid syntax \(broken.py, line 1\)",
    "plan --model needs:make": r"No module named 'not_here' \(/.*needs.py, line 1\)",
    "plan --layers 0": "layers must be from 1 to .*; got 0",
    "plan --step-time 0": "step_time must be from 1e-09 to .* seconds; got 0",
    "check math": "'math'.*'maths'",
    "check maths --runs nowhere": "nowhere does not exist: give the --out of `fastent run`",
    "bench --only": "--only names no question: give one or more, such as entropy",
    "list all": "Unrecognized options: all",
}


@pytest.mark.parametrize("line", COMMANDS)
def test_a_wrong_command_ends_with_a_sentence_and_a_status(folder, request, capsys, line):
    arguments = line.replace("bench/results", str(request.config.rootpath / "bench" / "results")).split()
    before = sorted(folder.rglob("*"))
    try:
        status = main(arguments)
    except SystemExit as ended:  # of the parser
        status = ended.code
    assert status in (1, 2)
    printed = capsys.readouterr()
    assert re.search(COMMANDS[line], " ".join(re.sub("[│╭╮╰╯─]", " ", printed.err).split()))
    assert "Traceback" not in printed.err + printed.out
    assert "tyro" not in printed.err
    left = [path for path in sorted(folder.rglob("*")) if "__pycache__" not in path.parts]
    assert left == before


def test_a_folder_that_may_not_be_written_to_is_told_of_before_anything_is_done(folder, monkeypatch, capsys):
    monkeypatch.setattr(cli.os, "access", lambda path, mode: False)
    for command in (["run", "e1"], ["report", "empty"]):
        assert main([*command, "--out", "results/new"]) == 2
        assert capsys.readouterr().err == (
            "fastent: --out is results/new, and you may not write to .: give another place\n"
        )


def test_what_the_system_refuses_is_named_with_the_file(folder, monkeypatch, capsys):
    def refused(*_, **__):
        raise PermissionError(13, "Permission denied", "h.npy")

    monkeypatch.setattr(cli, "entropy_of_file", refused)
    assert main(["entropy", "flat.npy"]) == 1
    assert capsys.readouterr().err == "fastent: h.npy: Permission denied\n"


MODEL = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
PROBE = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))


def watch(model=MODEL, probe=PROBE, layers="1", **options):
    return SpectralEntropyMonitor(model, probe, layers, **options)


def changed_probe():
    probe = PROBE.clone()
    monitor = watch(probe=probe, every=1)
    monitor.step(0)
    probe += 1
    monitor.step(1)


def back():
    monitor = watch()
    monitor.step(5)
    monitor.step(3)


def closed():
    monitor = watch()
    monitor.close()
    monitor.step(0)


CALLS = {
    "a layer that is not there": (
        lambda: watch(layers="encodr"),
        ValueError,
        "no layer matches 'encodr'; the model has: '0'",
    ),
    "no layer": (lambda: watch(layers=[]), ValueError, "layers is empty: name at least one"),
    "a module as layer": (lambda: watch(layers=MODEL[1]), TypeError, "got a ReLU, whose name is '1'"),
    "an index as layer": (lambda: watch(layers=1), TypeError, "layers takes a name, .*; got 1"),
    "a class as model": (
        lambda: watch(nn.Linear),
        TypeError,
        "model must be an nn.Module; got the class Linear: make one",
    ),
    "a probe of another width": (
        lambda: watch(probe=PROBE[:, :3]),
        RuntimeError,
        r"must take the probe, torch.float32 of shape \(16, 3\)",
    ),
    "a probe of another dtype": (
        lambda: watch(probe=PROBE.long()),
        RuntimeError,
        r"must take the probe, torch.int64 of shape \(16, 4\)",
    ),
    "a probe of one sample": (
        lambda: watch(probe=PROBE[:1]),
        ValueError,
        "at least 2 samples; the probe has N = 1",
    ),
    "an array as probe": (
        lambda: watch(probe=PROBE.numpy()),
        TypeError,
        r"got ndarray: use torch.from_numpy\(probe\)",
    ),
    "a list as probe": (
        lambda: watch(probe=[[1.0] * 4] * 2),
        TypeError,
        r"got list: use torch.tensor\(probe\)",
    ),
    "a misspelt batch": (
        lambda: watch(probe="bacth"),
        ValueError,
        """probe must be an input of the model or "batch"; got 'bacth'""",
    ),
    "no probe": (
        lambda: SpectralEntropyMonitor(MODEL, layers="1"),
        ValueError,
        "model, probe and layers go together; missing: probe",
    ),
    "a probe that changed": (
        changed_probe,
        ValueError,
        "the probe changed: .*: keep a clone for the probe",
    ),
    "every 0": (lambda: watch(every=0), ValueError, "every must be at least 1; got 0"),
    "every 2.5": (lambda: watch(every=2.5), TypeError, "every must be a whole number; got 2.5"),
    "every None": (lambda: watch(every=None), TypeError, "every must be a whole number; got None"),
    "a threshold as text": (
        lambda: watch(threshold="0.6"),
        TypeError,
        "threshold is a number, .*; got '0.6'",
    ),
    "a layer's threshold as text": (
        lambda: watch(threshold={"1": "0.6"}),
        TypeError,
        "threshold is a number, .*; got '0.6'",
    ),
    "a threshold in percent": (
        lambda: watch(threshold=60),
        ValueError,
        r"a normalised entropy, in \(0, 1\]; got 60",
    ),
    "a threshold of another layer": (
        lambda: watch(threshold={"0": 0.6}),
        ValueError,
        "threshold has '0', which fits no layer that is watched: '1'",
    ),
    "a number as collapse": (
        lambda: watch(collapse=0.05),
        TypeError,
        "collapse must be a fastent.Collapse; got 0.05",
    ),
    "an alarm without its rule": (
        lambda: watch(on_collapse=print),
        ValueError,
        r"give collapse=fastent.Collapse\(\) too",
    ),
    "an alarm that is no function": (
        lambda: watch(on_collapse="mail", collapse=Collapse()),
        TypeError,
        "on_collapse must be a function of a record; got 'mail'",
    ),
    "a file as logger": (
        lambda: watch(on_record="log.jsonl"),
        TypeError,
        "on_record must be a function of a record; .*log_to .*; got 'log.jsonl'",
    ),
    "a number as law": (
        lambda: watch(law=0.6),
        TypeError,
        "law must be a fastent.PowerLaw, .*; got 0.6. A level of the entropy is a threshold",
    ),
    "a number as stopping policy": (
        lambda: watch(stopping=100),
        TypeError,
        r"such as fastent.StopAfterCrossing\(1000\); got 100",
    ),
    "steps as text": (
        lambda: StopAfterCrossing("100"),
        TypeError,
        "steps must be a whole number; got '100'",
    ),
    "an unknown choice of tokens": (
        lambda: watch(tokens="cls"),
        ValueError,
        "tokens must be one of 'flatten', .*; got 'cls'",
    ),
    "half a step": (lambda: watch().step(0.5), TypeError, "step must be a whole number; got 0.5"),
    "a step back": (
        back,
        ValueError,
        "steps do not go back: got 3 after 5; after a resume call load_state_dict",
    ),
    "a step after the end": (closed, RuntimeError, "the monitor is closed: .*To go on, make a new monitor"),
    "a step without a model": (
        lambda: SpectralEntropyMonitor().step(0),
        RuntimeError,
        "step needs a model, .*call observe",
    ),
    "an array observed": (
        lambda: SpectralEntropyMonitor().observe(0, PROBE.numpy(), layer="h"),
        TypeError,
        r"layer 'h': h must be a torch.Tensor; got an ndarray: use torch.from_numpy\(h\)",
    ),
    "tokens observed": (
        lambda: SpectralEntropyMonitor().observe(0, PROBE[None], layer="h"),
        ValueError,
        r'got \(1, 16, 4\). Say which: tokens="flatten"',
    ),
    "step and activations exchanged": (
        lambda: SpectralEntropyMonitor().observe(PROBE, 0, layer="h"),
        TypeError,
        "step must be a whole number; got a Tensor",
    ),
    "a list measured": (
        lambda: spectral_entropy([[1.0, 2.0], [3.0, 4.0]]),
        TypeError,
        "h must be a torch.Tensor or a NumPy array; got list",
    ),
    "an unknown logger": (
        lambda: log_to(object()),
        TypeError,
        "log_to takes a TensorBoard SummaryWriter, .*; got object",
    ),
    "a log in no folder": (
        lambda: log_to("nowhere/log.jsonl"),
        FileNotFoundError,
        "log_to opens log.jsonl in /.*nowhere, which is no folder: make it first",
    ),
}


@pytest.mark.parametrize("mistake", CALLS)
def test_a_wrong_call_raises_what_is_documented_with_the_rule_and_the_remedy(folder, mistake):
    call, kind, message = CALLS[mistake]
    with pytest.raises(kind) as raised:
        call()
    assert re.search(message, " ".join([str(raised.value), *getattr(raised.value, "__notes__", ())]))
