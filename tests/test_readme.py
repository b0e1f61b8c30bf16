"""The Python of the README and of the pages on monitoring runs as it stands; its commands are those of the check.

``python tests/test_readme.py`` runs the lines of the README, the tutorial and docs/monitoring.md to their end, prints
what they print and writes the pictures that they show; of some of them, whose names (`PICTURES`) it is given.
"""

import contextlib
import io
import os
import re
import shutil
import sys
import tempfile
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text()
FIGURES = ROOT / "docs" / "figures"
STEPS = "range(2001)"
PICTURES = {
    "README": ("entropy.png", "watch.png"),
    "tutorial": ("tutorial.png",) * 2,
    "monitoring": ("layers.png",) * 2,
}
"""What the lines of a page write, and what it is called in docs/figures."""


def blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def executed(code: list[str]) -> tuple[dict, list[str]]:
    names: dict = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for block in code:
            exec(block, names)
    return names, printed.getvalue().splitlines()


def test_the_lines_of_the_readme_run_and_draw_what_they_say(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    watch, draw = blocks(README)
    assert watch.count(STEPS) == 1
    names, printed = executed([watch.replace(STEPS, "range(61)"), draw])
    assert all(re.fullmatch(r"\d+ [13] 0\.\d+ ok", line) for line in printed)  # the rest arrives at the flush
    drawn = {tuple(line.get_ydata()) for line in names["ax"].lines}
    for layer in ("1", "3"):
        found = [record for record in names["monitor"].history if record.layer == layer]
        assert [record.step for record in found] == [0, 20, 40, 60]
        assert tuple(record.normalized for record in found) in drawn
    assert tuple(names["solved"]) in drawn
    assert (tmp_path / "entropy.png").read_bytes().startswith(b"\x89PNG")


def test_the_tutorial_runs_and_prints_what_it_says(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    code = blocks(TUTORIAL)
    assert sum(block.count("range(1001)") for block in code) == 1
    names, printed = executed([block.replace("range(1001)", "range(21)") for block in code])
    fenced = re.findall(r"```(\w*)\n(.*?)```", TUTORIAL, re.DOTALL)
    said = "".join(text for language, text in fenced if not language).splitlines()
    for line, expected in zip(printed, said[: len(printed)], strict=True):
        assert line == expected or [float(each) for each in numbers(line)] == pytest.approx(
            [float(each) for each in numbers(expected)], rel=0.01
        )
    assert [record.step for record in names["monitor"].history] == [0, 0, 20, 20]
    assert (tmp_path / "tutorial.png").read_bytes().startswith(b"\x89PNG")


def ran(page: str) -> tuple[dict, list[str]]:
    code = blocks((ROOT / "docs" / f"{page}.md").read_text())
    assert code
    return executed(code)


def test_the_examples_of_pictures_and_of_a_result_without_a_model_run(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    code = blocks((ROOT / "docs" / "monitoring.md").read_text())
    assert code[0].count("range(401)") == 1
    names, _ = executed([block.replace("range(401)", "range(1)") for block in code])
    layers = [f"encoder.layers.{block}" for block in range(12)]
    assert [(record.step, record.layer) for record in names["records"]] == [(0, layer) for layer in layers]
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")
    said = [text.get_text().partition(":")[0] for text in names["ax"].get_legend().get_texts()]
    assert said == ["as drawn", "decaying"]
    assert names["result"].status == "ok"


def test_the_examples_of_an_alert_and_of_a_forecast_run():
    names, printed = ran("alerts")
    steps = names["monitor"].collapsed
    assert sorted(steps) == ["0", "2"]
    assert [line.split(" has")[0] for line in printed[:2]] == [
        f"step {step}: H of layer {layer!r}"
        for layer, step in sorted(steps.items(), key=lambda item: item[1])
    ]
    assert printed[2:] == [str(steps)]
    assert names["forecast"].step > 600


def test_the_example_of_all_blocks_watches_twelve_and_leaves_padding_out():
    names, _ = ran("layers")
    assert list(names["depth"]) == [f"encoder.layers.{block}" for block in range(12)]
    newest = names["monitor"].history[-1]
    assert (newest.n, newest.mask) == (64 * 12, "attention_mask")


def test_the_examples_of_probes_give_in_parts_what_a_pass_gives_and_add_up_micro_batches():
    names, _ = ran("probes")
    assert abs(names["difference"]) <= 1e-12
    assert [(record.step, record.n) for record in names["monitor"].history] == [
        (step, 128) for step in (0, 10, 20, 30)
    ]


def test_the_example_of_several_processes_runs_in_a_group_and_stops_it(monkeypatch):
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": 0}.items():
        monkeypatch.setenv(name, str(value))
    names, _ = ran("distributed")
    assert [(record.step, record.layer, record.n) for record in names["history"]] == [
        (0, "0", 512),
        (0, "2", 512),
    ]
    assert names["step"] == 0
    assert names["moments"].n == 1000


def test_the_example_of_a_resume_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names, _ = ran("resume")
    steps = [record.step for record in names["monitor"].history if record.layer == "0"]
    assert steps == [0, 100, 200, 300, 400]


def test_what_is_said_of_the_alert_is_in_the_recorded_results():
    said = (
        (ROOT / "docs" / "alerts.md")
        .read_text()
        .partition("came before\ngrokking in")[2]
        .partition("only")[0]
    )
    shares, leads = re.findall(r"\d+ of \d+ runs", said), re.findall(r"[\d,]+ steps", said)
    for page, lead, known in (("results", leads[0], shares), ("results-nearest", leads[1], shares[:1])):
        rows = (ROOT / "docs" / f"{page}.md").read_text().splitlines()
        ours = [
            row
            for row in rows
            if "the same by our definition (a fall of H by more than 0.05 within 800" in row
        ]
        assert [share in row for share, row in zip(known, ours, strict=False)] == [True] * len(known)
        assert f"lead {lead}" in ours[0]


def test_the_check_is_the_second_command():
    second = re.findall(r"```bash\n(.*?)\n```", README)[1]
    script = (ROOT / ".ci" / "run").read_text()
    assert all(part.strip() in script.replace("--quiet", "-q") for part in second.split("&&"))


def test_the_releases_of_torch_are_those_that_are_admitted():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (torch,) = (each for each in project["dependencies"] if each.startswith("torch"))
    first, last = re.search(r"needs torch 2\.(\d+) to 2\.(\d+),", README).groups()
    admitted = [minor for minor in range(30) if Requirement(torch).specifier.contains(f"2.{minor}.0")]
    assert admitted == list(range(int(first), int(last) + 1))


@pytest.mark.parametrize(
    "page", ["README.md", *sorted(f"docs/{path.name}" for path in ROOT.glob("docs/*.md"))]
)
def test_links_point_to_files_that_exist(page):
    text = re.sub(r"```.*?```|`[^`]*`", "", (ROOT / page).read_text(), flags=re.DOTALL)
    targets = [target for target in re.findall(r"\]\(([^)#\s]+)\)", text) if "://" not in target]
    assert [target for target in targets if not (ROOT / page).parent.joinpath(target).exists()] == []
    assert len(targets) > 10 or page != "README.md"


def numbers(text: str) -> list[str]:
    return [each.rstrip(".,") for each in re.findall(r"-?\d[\d,]*\.?\d*", text.replace("\u2212", "-"))]


def test_every_number_of_a_finding_about_the_paper_is_in_the_recorded_results():
    found = README.partition("### What we found")[2].partition("The claims one by one")[0]
    items = re.findall(r"^(\d)\. (.*?)(?=^\d\. |\Z)", found, re.DOTALL | re.MULTILINE)
    assert [number for number, _ in items] == ["1", "2", "3", "4", "5", "6", "7"]
    for chosen, page, least in (("123", "results.md", 15), ("456", "results-nearest.md", 25)):
        text = " ".join(item for number, item in items if number in chosen)
        said = numbers(re.sub(r"`[^`]*`|\([^()]*\.md\)", "", text))
        assert len(said) >= least
        known = set(numbers((ROOT / "docs" / page).read_text()))
        assert [each for each in said if each not in known] == []


if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "agg"
    os.chdir(tempfile.mkdtemp())
    for page in sys.argv[1:] or PICTURES:
        text = README if page == "README" else (ROOT / "docs" / f"{page}.md").read_text()
        print("\n".join(executed(blocks(text))[1]))
        written, shown = PICTURES[page]
        shutil.move(written, FIGURES / shown)
