"""The scripts of docs/integrations.md, run as they stand with the hosts that are installed; a host that is not."""

import ast
import importlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "integrations.md").read_text()
HOSTS = sorted(
    {path.stem for path in (ROOT / "fastent" / "integrations").glob("*.py")} - {"__init__", "loggers"}
)
START, *PARTS = re.split(r"^## ", TEXT, flags=re.MULTILINE)
OURS = {"fastent", "torch", "numpy"}


def scripts(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


SECTIONS = {part.partition("\n")[0]: scripts(part) for part in PARTS}


def imported(script: str) -> set[str]:
    """Packages that a script imports, but for ours and the standard library's."""
    found = set()
    for node in ast.walk(ast.parse(script)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    return found - OURS - sys.stdlib_module_names


def run(section: str) -> dict[str, Any]:
    """Run a section's scripts in turn, after the page's first; skip where a host of theirs is not installed."""
    for host in sorted(set().union(*map(imported, SECTIONS[section]))):
        pytest.importorskip(host)
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
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")  # nor should it, here
@pytest.mark.parametrize("section", [section for section, found in SECTIONS.items() if found])
def test_a_script_that_uses_fastent_has_at_most_ten_lines_and_runs(
    section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for script in SECTIONS[section]:
        if "fastent" in script:
            assert len([line for line in script.splitlines() if line.strip()]) <= 10
    monkeypatch.chdir(tmp_path)
    run(section)


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
