"""What untrusted files can reach: no code, no network, no shell, by every module's syntax tree (docs/security.md)."""

import ast
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from test_walls import MODULES, ROOT

UNPICKLERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml"}
CLIENTS = {
    *("http", "urllib.request", "urllib3", "requests", "httpx", "aiohttp", "ftplib", "smtplib", "xmlrpc"),
    *("socketserver", "websockets", "huggingface_hub", "datasets", "paramiko", "asyncio"),
}
RUNNERS = {"runpy", "code", "codeop", "pty", "commands"}
FORBIDDEN = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "tempfile.mktemp", "torch.jit.load"),
    *("subprocess.getoutput", "subprocess.getstatusoutput", "pandas.read_pickle", "numpy.fromregex"),
}
FAMILIES = ("os.exec", "os.spawn", "torch.hub.", "torch.package.", "builtins.")
NEEDED = {
    "torch.load": ("weights_only", True),
    "numpy.load": ("allow_pickle", False),
    "numpy.lib.format.read_array": ("allow_pickle", False),
    "jinja2.Environment": ("autoescape", True),
}
IMPORTERS = {
    "fastent": "its own public names",
    "fastent.records": "pandas or polars, by a name of ours",
    "fastent.testing": "what an extra installs, by a name of ours",
    "fastent.plan": "what `fastent plan --model` names",
    "fastent.integrations.lightning": "Lightning under its two names",
    "fastent.grokking.train": "its own public names",
    "fastent.grokking.train.registry": "entry points of fastent's groups in installed packages, and of ours",
    "fastent.grokking.train.executors": "Ray or submitit, by a name of ours",
    "bench.counters": "what it measures the import of",
    "bench.providers": "what it compares with, by a name of ours or of --provider",
    "bench.suite": "its own modules",
}
"""Modules that import by a name made at run time, and what name."""
CONNECTORS = {
    "fastent.grokking.train.executors": "looks whether a Ray answers at the --address that was given"
}
"""Modules that open a connection themselves, and why."""


def found(source: str, module: str = "somewhere") -> list[str]:
    """What the rules forbid in the text of a module, and in the Python that stands in it as text, by line."""
    return [f"{module}:{line}: {what}" for line, what in _found(ast.parse(source), module)]


def _found(tree: ast.Module, module: str) -> Iterator[tuple[int, str]]:
    names: dict[str, str] = {}
    kinds = (ast.Import, ast.ImportFrom, ast.Call, ast.Constant)
    nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
                yield from _import(node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield from _import(node.lineno, f"{node.module}.{alias.name}")
    for node in nodes:
        if isinstance(node, ast.Call):
            yield from _call(node, _dotted(node.func, names), module)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "import " in node.value:
            try:
                inner = ast.parse(node.value)
            except SyntaxError:
                continue  # words
            yield from ((node.lineno, what) for _, what in _found(inner, module))


def _import(line: int, name: str) -> Iterator[tuple[int, str]]:
    parts = name.split(".")
    if {".".join(parts[: i + 1]) for i in range(len(parts))} & (UNPICKLERS | CLIENTS | RUNNERS):
        yield line, f"import {name}"


def _dotted(node: ast.expr, names: dict[str, str]) -> str:
    match node:
        case ast.Name():
            return names.get(node.id, node.id)
        case ast.Attribute():
            return f"{_dotted(node.value, names)}.{node.attr}"
    return "?"


def _call(node: ast.Call, name: str, module: str) -> Iterator[tuple[int, str]]:
    given = {keyword.arg: keyword.value for keyword in node.keywords}
    if name in FORBIDDEN or name.startswith(FAMILIES):
        yield node.lineno, name
    if name in NEEDED:
        argument, value = NEEDED[name]
        said = given.get(argument)
        if not (isinstance(said, ast.Constant) and said.value is value):
            yield node.lineno, f"{name} without {argument}={value}"
    if "shell" in given and name.startswith("subprocess."):
        yield node.lineno, f"{name} with shell="
    connects = name == "socket.create_connection" and module in CONNECTORS
    if name.startswith("socket.") and name != "socket.gethostname" and not connects:
        yield node.lineno, name
    if (
        name
        in (
            *("importlib.import_module", "importlib.util.spec_from_file_location"),
            *("importlib.metadata.EntryPoint", "importlib.metadata.entry_points"),
        )
        and module not in IMPORTERS
    ):
        yield node.lineno, f"{name} in a module without a reason in IMPORTERS"


def test_no_module_unpickles_evaluates_or_connects():
    wrong = [each for module, path in MODULES.items() for each in found(path.read_text(), module)]
    assert wrong == []
    assert len(MODULES) > 100
    # A reason that nothing needs any more would let the next import by.
    unused = [module for module in IMPORTERS | CONNECTORS if not found(MODULES[module].read_text())]
    assert unused == []


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("import pickle", "import pickle"),
        ("from pickle import loads as l", "import pickle.loads"),
        ("def f():\n    import yaml", "import yaml"),
        ("import urllib.request", "import urllib.request"),
        ("from urllib import request", "import urllib.request"),
        ("eval(x)", "eval"),
        ("import torch\ntorch.load(x)", "torch.load without weights_only=True"),
        ("import torch as t\nt.load(x, weights_only=False)", "torch.load without weights_only=True"),
        ("from torch import load\nload(x)", "torch.load without weights_only=True"),
        ("import torch\ntorch.hub.load(x)", "torch.hub.load"),
        ("import numpy as np\nnp.load(x)", "numpy.load without allow_pickle=False"),
        ("import numpy as np\nnp.load(x, allow_pickle=True)", "numpy.load without allow_pickle=False"),
        ("import jinja2\njinja2.Environment()", "jinja2.Environment without autoescape=True"),
        ("import subprocess\nsubprocess.run(x, shell=True)", "subprocess.run with shell="),
        ("import os\nos.system(x)", "os.system"),
        ("import os\nos.execv(x, y)", "os.execv"),
        ("import socket\nsocket.create_connection(x)", "socket.create_connection"),
        ("import importlib\nimportlib.import_module(x)", "importlib.import_module in a module without a reason"),
        ('RUN = """\nimport pickle\n"""', "import pickle"),
    ],
)  # fmt: skip
def test_each_rule_finds_what_it_forbids(source, what):
    (said,) = found(source)
    assert what in said


@pytest.mark.parametrize(
    "source",
    [
        "import re\nre.compile(x)",
        "model.eval()",
        "import torch\ntorch.load(x, weights_only=True)",
        "import torch\ntorch.compile(x)",
        "from urllib.parse import quote",
        "import socket\nsocket.gethostname()",
        '"""Says that one would import pickle."""',
    ],
)
def test_what_is_harmless_is_left_alone(source):
    assert found(source) == []


def test_no_command_that_reads_opens_a_connection(tmp_path, monkeypatch, capsys):
    pytest.importorskip("tyro")
    from fastent.cli import main

    def refused(*arguments, **options):
        raise AssertionError("a connection")

    monkeypatch.setattr(socket, "socket", refused)
    monkeypatch.setattr(socket, "create_connection", refused)
    np.save(tmp_path / "h.npy", np.eye(4))
    (tmp_path / "e1-baseline-add-seed0").mkdir()
    (tmp_path / "e1-baseline-add-seed0" / "config.json").write_text("{}")
    for arguments in (
        ["entropy", str(tmp_path / "h.npy")],
        ["runs", str(tmp_path)],
        ["watch", str(tmp_path), "--once"],
        ["list"],
        ["doctor"],
    ):
        assert main(arguments) == 0
    assert "0.792481" in capsys.readouterr().out  # log 3 / log 4: four points about their mean


def test_every_test_that_the_page_names_is_there():
    page = (ROOT / "docs" / "security.md").read_text()
    named = re.findall(r"`(tests/\S+\.py)(?:::(\w+))?`", page)
    assert len(named) > 10
    for path, name in named:
        text = Path(ROOT, path).read_text()
        assert not name or f"def {name}(" in text, f"{path} has no {name}"
