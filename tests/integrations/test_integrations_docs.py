"""The scripts of docs/integrations.md, run as they stand with the hosts that are installed; a host that is not.

Run as a program, this file writes the page's last table, of the releases that are installed.
"""

import ast
import datetime
import importlib
import importlib.metadata
import importlib.util
import platform
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "integrations.md"
TEXT = PAGE.read_text()
HOSTS = sorted(
    {path.stem for path in (ROOT / "fastent" / "integrations").glob("*.py")} - {"__init__", "loggers"}
)
START, *PARTS = re.split(r"^## ", TEXT, flags=re.MULTILINE)
OURS = {"fastent", "torch", "numpy"}


RECIPE = "the script above"
TESTED = {
    "lightning": "the callback, in one process and two",
    "transformers": "the callback, in one process and two",
    "accelerate": "the scripts above, two processes; behind Transformers",
    "peft": "names of layers, and the callback of Transformers",
    "trl": "the callback of Transformers, in its SFTTrainer",
    "torchmetrics": "the metric, in one process and two",
    "tensorboard": "`log_to`",
    "wandb": "`log_to`, offline",
    "mlflow-skinny": "`log_to`, a store of files",
    "trackio": "`log_to`, a local store",
    "pytorch-ignite": RECIPE,
    "skorch": RECIPE,
    "fastai": RECIPE,
    "keras": f"{RECIPE}, backend torch",
}
# Steps at which a recipe evaluates: of its batches, 4 an epoch, or 7 where a fifth of the samples is for validation.
EVALUATED = {
    "Ignite": [0, 10, 20, 30],
    "skorch": [10, 20, 30, 40, 50],
    "fastai": [10, 20, 30],
    "Keras": [10, 20, 30],
}


def table() -> str:
    """What was tested with what, as installed here."""
    rows = [f"| {host} | {importlib.metadata.version(host)} | {what} |" for host, what in TESTED.items()]
    with_what = f"Python {platform.python_version()} and torch {importlib.metadata.version('torch')}"
    return "\n".join(
        [
            f"In {datetime.date.today():%B %Y}, with {with_what}:",
            "",
            "| host | release | tested |",
            "|---|---|---|",
            *rows,
            "",
            "Other releases of torch were not tried with these hosts.",
        ]
    )


def scripts(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


SECTIONS = {part.partition("\n")[0]: scripts(part) for part in PARTS}


def imported(script: str) -> set[str]:
    """Packages that a script imports, or torch for it, but for ours and the standard library's."""
    found = set()
    for node in ast.walk(ast.parse(script)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    behind = {"tensorboard"} if "torch.utils.tensorboard" in script else set()
    return (found | behind) - OURS - sys.stdlib_module_names


def run(section: str) -> dict[str, Any]:
    """Run a section's scripts in turn, after the page's first; skip where a host of theirs is not installed."""
    for host in sorted(set().union(*map(imported, SECTIONS[section]))):
        if importlib.util.find_spec(host) is None:  # not by importing it: a script says with which backend
            pytest.skip(f"{host} is not installed")
    names: dict[str, Any] = {"__name__": "__main__"}
    for script in (*scripts(START), *SECTIONS[section]):
        exec(compile(script, f"docs/integrations.md, {section}", "exec"), names)
    return names


def test_there_is_a_section_for_each_host() -> None:
    assert list(SECTIONS) == [
        "Lightning",
        "Transformers",
        "Accelerate",
        "torchmetrics",
        "Loggers",
        "Ignite",
        "skorch",
        "fastai",
        "Keras",
        "What was tested with what",
    ]


@pytest.mark.filterwarnings(  # of torch 2.13, where Lightning's data fetcher uses what torch will give up
    r"ignore:.isinstance\(treespec, LeafSpec\). is deprecated:FutureWarning"
)
@pytest.mark.filterwarnings(  # of torch 2.13, where Ignite imports torch.distributed.optim
    r"ignore:`torch\.jit\.\w+` is deprecated"
)
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")  # nor should it, here
@pytest.mark.nightly  # for what it imports
@pytest.mark.parametrize("section", [section for section, found in SECTIONS.items() if found])
def test_a_script_that_uses_fastent_has_at_most_ten_lines_and_runs(
    section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for script in SECTIONS[section]:
        if "fastent" in script:
            assert len([line for line in script.splitlines() if line.strip()]) <= 10
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))  # where it writes its settings when it is imported
    names = run(section)
    if section in EVALUATED:
        assert [record.step for record in names["monitor"].history] == EVALUATED[section]


@pytest.mark.parametrize("host", HOSTS)
def test_a_host_that_is_not_installed_is_one_line_that_names_what_to_install(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    integration = f"fastent.integrations.{host}"
    packages = (host, "pytorch_lightning") if host == "lightning" else (host,)
    parts = tuple(f"{package}." for package in packages)
    for name in [name for name in sys.modules if name == integration or name.startswith(parts)]:
        monkeypatch.delitem(sys.modules, name)
    for package in packages:
        monkeypatch.setitem(sys.modules, package, None)  # what an import statement takes for not installed
    with pytest.raises(ModuleNotFoundError) as raised:
        importlib.import_module(integration)
    assert str(raised.value) == f"{integration} needs {host}, which is not installed: pip install {host}"
    assert raised.value.name == host


def test_the_table_has_a_row_for_each_host_that_is_installed_for_the_tests() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    asked = [
        requirement
        for group in ("integrations", "fastai")
        for requirement in project["dependency-groups"][group]
    ]
    asked += [
        requirement
        for extra in ("lightning", "transformers", "torchmetrics")
        for requirement in extras[extra]
    ]
    assert {re.split(r"[>=]", requirement)[0] for requirement in asked} == set(TESTED)
    found = re.findall(r"^\| ([\w-]+) \| [\d.]+ \| (.*) \|$", PARTS[-1], re.MULTILINE)
    assert found == list(TESTED.items())


if __name__ == "__main__":
    PAGE.write_text(TEXT.replace(PARTS[-1], f"What was tested with what\n\n{table()}\n"))
