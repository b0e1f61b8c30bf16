"""Settings side by side: what differs, times and H* with intervals, pairs and independent runs, page and picture."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tyro")
from matplotlib.figure import Figure

from fastent.cli import main
from fastent.grokking.experiments import compare as module
from fastent.grokking.experiments.compare import Compared, draw, read, sections
from fastent.grokking.experiments.data import pack, read_runs
from fastent.grokking.experiments.statistics import over, welch

ROOT = Path(__file__).parents[3]
H_STAR = [0.65, 0.64, 0.63]
"""Of the planted seeds 0, 1, 2 at 1,500, 1,600 and 1,700; 100 steps later each is lower by 0.02."""


def change(run, **settings):
    path = run / "config.json"
    record = json.loads(path.read_text())
    record["config"] |= settings
    path.write_text(json.dumps(record))


@pytest.fixture
def other(tmp_path, writer):
    """The seeds of `three_runs` with half the learning rate, which grok 100 steps later."""
    for seed in range(3):
        change(writer(tmp_path / "slow", seed, t_grok=1600 + 100 * seed), learning_rate=1e-3)
    return tmp_path / "slow"


def test_what_a_name_holds_is_shown_and_is_no_markup_anywhere(three_runs, other, tmp_path, capsys):
    for run in other.iterdir():
        run.rename(other / run.name.replace("add", "a[bold]$\\frac${:smile:\x1b[2J\n<b>`"))
    assert main(["compare", str(three_runs), str(other), "--out", str(tmp_path / "page.html")]) == 0
    shown = r"e1-baseline-a[bold]$\frac${:smile:\x1b[2J"
    out = capsys.readouterr().out
    assert shown in out
    assert "\x1b" not in out
    page = (tmp_path / "page.html").read_text()
    assert "&lt;b&gt;`" in page
    assert "<b>" not in page


def test_two_folders_are_told_by_their_settings_and_by_pairs_of_seeds(three_runs, other, capsys):
    assert main(["compare", str(three_runs), str(other)]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0].split() == ["e1,", "baseline,", "add", "runs"]
    assert [line.split() for line in lines[1:3]] == [["A", str(three_runs), "3"], ["B", str(other), "3"]]
    assert re.fullmatch(r"1 of \d\d settings differ  A      B", lines[4])
    assert lines[5].split() == ["learning_rate", "0.002", "0.001"]
    low, high = over(H_STAR).low, over(H_STAR).high
    assert [re.split("  +", line.strip()) for line in lines[8:11]] == [
        ["A", "3", "3 of 3", "300 [300, 300]", "1,600 [1,352, 1,848]", f"0.640 [{low:.3f}, {high:.3f}]"],
        [
            "B",
            "3",
            "3 of 3",
            "300 [300, 300]",
            "1,700 [1,452, 1,948]",
            f"0.620 [{low - 0.02:.3f}, {high - 0.02:.3f}]",
        ],
        ["B − A", "3 pairs", "0 [0, 0]", "100 [100, 100]", "−0.020 [−0.020, −0.020]"],
    ]
    assert lines[12] == "H, mean, 0.56 to 0.86; steps 0 to 2,500"
    assert lines[13] == lines[14].replace("B", "A")  # H does not differ, in these, at equal step
    a, b = (line[3:] for line in lines[17:19])
    assert a.index("█") <= b.index("█")
    assert a.rstrip()[-1] == b.rstrip()[-1] == "█"
    assert captured.err == ""


def test_runs_that_share_no_seed_are_compared_as_independent(three_runs, tmp_path, writer):
    for seed in (3, 4, 5, 6):
        change(writer(tmp_path / "b", seed, t_grok=1300 + 50 * seed), learning_rate=1e-3)
    ((side,), alone, left_out) = vars(read([three_runs, tmp_path / "b"])).values()
    _, _, gap = side.rows
    assert gap.n == "3 + 4"
    assert gap.t_grok == welch([1500.0, 1600.0, 1700.0], [1450.0, 1500.0, 1550.0, 1600.0])
    assert (alone, left_out) == ({}, [])


def test_a_run_that_never_groks_counts_with_the_step_it_is_known_to(three_runs, other, writer):
    change(writer(other, 3, t_grok=None), learning_rate=1e-3)
    (side,) = read([three_runs, other]).sides
    first, second, gap = side.rows
    assert side.limit("t_grok") == 2500
    assert (second.grokked.value, second.t_grok.value) == (0.75, np.mean([1600, 1700, 1800, 2500]))
    assert second.t_grok.high == 2500  # no restricted time is beyond the limit
    assert (first.t_grok.value, gap.t_grok.value) == (1600, 100)
    assert "T_grok restricted to step 2,500" in side.note
    assert "T_mem restricted" not in side.note


def test_settings_of_one_folder_are_set_beside_each_other_by_name(three_runs, writer, tmp_path):
    for seed in (0, 1):
        run = writer(tmp_path / "wide", seed)
        change(run, width=64)
        run.rename(three_runs / f"e1-baseline-add-width=64-seed{seed}")
    found = read([three_runs])
    (side,) = found.sides
    assert side.names == ["e1-baseline-add", "e1-baseline-add-width=64"]
    assert side.differing == {"width": [128, 64]}
    # The same by the names of the runs, and packed.
    assert read(sorted(three_runs.glob("*-seed*"))).sides[0].names == side.names
    pack(read_runs(three_runs), tmp_path / "packed")
    packed = read([tmp_path / "packed" / f"{name}.parquet" for name in side.names]).sides[0]
    assert packed.names == side.names
    assert [row.t_grok for row in packed.rows] == [row.t_grok for row in side.rows]


def test_kinds_in_one_folder_alone_and_runs_that_do_not_count_are_named(three_runs, other, writer):
    writer(other, 0, experiment="e5")
    writer(other, 7, last_step=1000, done=False)
    (three_runs / "notes.txt").write_text("")
    found = read([three_runs, other])
    assert found.alone == {str(other): ["e5-baseline-add"]}
    assert found.left_out == [
        f"{three_runs}: no runs, skipped: notes.txt",
        f"{other}: e1-baseline-add-seed7 is interrupted at step 1,000, left out",
    ]
    assert len(found.sides[0].groups[1].runs) == 3
    assert [section.title for section in sections(found)] == ["e1, baseline, add", "Left out"]


def test_what_cannot_be_compared_is_refused_with_the_remedy(
    three_runs, tmp_path, writer, capsys, monkeypatch
):
    def refusal(*arguments):
        assert main(["compare", *map(str, arguments)]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert "is given twice" in refusal(three_runs, three_runs)
    alone = f"a comparison needs complete runs of two settings, and there is only e1-baseline-add of {three_runs}: "
    assert refusal(three_runs).startswith(f"fastent: {alone}")
    assert "missing does not exist" in refusal(three_runs, tmp_path / "missing")
    assert "--out must end in .html, for a page, or .png" in refusal(three_runs, "--out", "x.pdf")
    (tmp_path / "file").write_text("")
    place = tmp_path / "file" / "x.html"
    assert f"{tmp_path / 'file'} is a file: give another place" in refusal(three_runs, "--out", place)
    assert "there is none: name two folders of runs" in refusal()
    writer(tmp_path / "young", 0, last_step=1000, done=False)
    assert "there is none (" in refusal(tmp_path / "young")
    for width in range(1, 8):
        change(writer(tmp_path / "many", width), width=4 * width)
    assert "at most 6 curves can be told apart in a picture, and there are 7: name" in refusal(
        tmp_path / "many", "--out", "x.png"
    )
    (seven,) = read([tmp_path / "many"]).sides
    assert [row.name for row in seven.rows][6:8] == ["G", "B − A"]
    assert seven.differing == {"width": [4, 8, 12, 16, 20, 24, 28]}
    (section,) = sections(Compared((seven,), {}))
    assert [type(block).__name__ for block in section.blocks] == ["Table"] * 3
    monkeypatch.setattr(module, "ascii_uppercase", "ABC")
    assert "at most 3 settings can be set side by side, and there are 7: name" in refusal(tmp_path / "many")


def test_the_page_holds_all_that_it_shows(three_runs, other, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        module, "draw", lambda sides: Figure(figsize=(1, 1))
    )  # the curves have a test of their own
    renamed = other.rename(tmp_path / "slow & <b>")
    page = tmp_path / "new" / "compare.html"
    assert main(["compare", str(three_runs), str(renamed), "--out", str(page)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(page)
    text = page.read_text()
    assert "<b>" not in text
    assert "slow &amp; &lt;b&gt;" in text
    assert not re.findall(r"(?:src|srcset|href)=\"(?!data:|#)", text)
    assert "<script" not in text
    for cell in ("<code>learning_rate</code>", "1,600 [1,352, 1,848]", "100 [100, 100]", "3 pairs"):
        assert cell in text
    assert main(["compare", str(three_runs), str(renamed), "--out", str(tmp_path / "curves.png")]) == 0
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_curves_are_those_of_the_runs_and_their_mean(three_runs, other):
    h, accuracy = draw(read([three_runs, other]).sides).axes
    assert [text.get_text() for text in h.get_legend().get_texts()] == [f"A: {three_runs}", f"B: {other}"]
    for axes, value in ((h, 0.86), (accuracy, 0.25)):
        # For each group three runs and their mean, and on H three dots.
        assert len(axes.lines) == 2 * (4 + 3 * (axes is h))
        mean = axes.lines[3]
        assert mean.get_xdata()[0] == 0
        assert mean.get_ydata()[0] == pytest.approx(value)
    dots = [(line.get_xdata()[0], line.get_ydata()[0]) for line in h.lines[4:7]]
    assert dots == list(zip([1500, 1600, 1700], H_STAR, strict=True))


def test_the_page_of_the_docs_shows_what_the_recorded_runs_give(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = (ROOT / "docs" / "runs.md").read_text()
    command = re.search(r"fastent (compare .*) --out docs/figures/compare.png", text)[1]
    assert main(command.split()) == 0
    assert f"```\n{capsys.readouterr().out.rstrip()}\n```" in text
    assert (ROOT / "docs" / "figures" / "compare.png").is_file()
