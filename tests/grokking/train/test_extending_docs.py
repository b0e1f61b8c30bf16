"""The page on extending: each of its snippets is run as it stands, and is at most 30 lines."""

import re
import shlex
from pathlib import Path

import pytest

pytest.importorskip("tyro")
from guests import install

from fastent.cli import main
from fastent.grokking.experiments.data import read_runs
from fastent.grokking.train import registry, train

PAGE = (Path(__file__).parents[3] / "docs" / "extending.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = re.findall(r"^fastent run .*$", PAGE, re.MULTILINE)
POINTS = dict(re.findall(r'^\[project\.entry-points\."(.*)"\]\n(.*)$', PAGE, re.MULTILINE))
# What a run of each snippet has that no other does.
FOUND = {
    "own-losses-0.2-add": "alignment",
    "own-baseline-gcd": "entropy",
    "own-losses-0.1-add": "entropy",
    "own-shrunk-add": "entropy",
    "own-baseline-add": "margin_test",
}
SHORT = ("max_steps=100", "max_steps=2, evaluate_every=1, batch_size=8")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_registered", {})
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    yield
    registry._installed.cache_clear()


@pytest.mark.filterwarnings("ignore:model gated. gradients by torch")
@pytest.mark.parametrize(("snippet", "name"), list(zip(SNIPPETS, FOUND, strict=True)), ids=list(FOUND))
def test_a_snippet_trains_what_it_brings_in_at_most_30_lines(snippet, name, capsys):
    assert len(snippet.splitlines()) <= 30
    assert SHORT[0] in snippet
    exec(compile(snippet.replace(*SHORT), "docs/extending.md", "exec"), {"__name__": "extending"})
    runs = read_runs(Path("runs"))
    assert all(run.name.startswith(f"{name}-") and run.done is not None for run in runs)
    assert all(FOUND[name] in row for row in runs[0].rows)
    capsys.readouterr()


@pytest.mark.filterwarnings("default:model transformer of 2 layers. gradients by torch")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page_trains(command, capsys):
    arguments = shlex.split(command)[1:]
    arguments[arguments.index("--max-steps") + 1] = "2"
    small = ["--evaluate-every", "1", "--batch-size", "8", "--workers", "1", "--quiet"]
    assert main([*arguments, *small]) == 0
    assert all(run.done is not None for run in read_runs(Path("runs")))
    capsys.readouterr()


def test_the_entry_points_of_the_page_give_its_objects_their_names(tmp_path, monkeypatch, capsys):
    definitions = [re.sub(r"^train\(.*\n", "", snippet, flags=re.MULTILINE) for snippet in SNIPPETS]
    points = {group: dict([line.replace('"', "").split(" = ")]) for group, line in POINTS.items()}
    install(tmp_path, "my-package", "my_package", "\n".join(definitions), points)
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["list"]) == 0
    listed = capsys.readouterr().out
    assert all(f"{name} (my-package)" in listed for name in ("gcd", "gated", "shrunk", "margin"))
    small = {"width": 8, "max_steps": 2, "evaluate_every": 1, "batch_size": 8, "seeds": [0], "quiet": True}
    with pytest.warns(UserWarning, match="model gated: gradients by torch"):
        train(
            "gcd", model="gated", condition="shrunk-0.01+losses-0.1", measures=["margin"], modulus=12, **small
        )
    (run,) = read_runs(tmp_path / "runs")
    assert [each["package"] for each in run.record["guests"]] == ["my-package"] * 4
    assert set(run.rows[-1]) >= {"margin_train", "margin_test", "entropy"}
