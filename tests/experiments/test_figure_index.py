"""Where the paper's figures are: each has a counterpart that some experiment draws, or is listed as not run."""

import re
from pathlib import Path

import pytest

from fastent.experiments import figure_index
from fastent.experiments.document import Figure, Section
from fastent.experiments.parts import EXPERIMENTS

SOURCES = "\n".join(path.read_text() for path in Path(figure_index.__file__).parent.glob("*.py"))


def rows(sections):
    return figure_index.section(sections).blocks[1].rows


def test_the_papers_ten_figures_and_its_tables_of_results_are_listed():
    papers = {each.paper.partition("(")[0] for each in figure_index.COUNTERPARTS}
    assert papers == {*(f"Figure {n}" for n in range(1, 11)), *(f"Table {n}" for n in (1, 2, 3, 5))}
    lost = {each.paper for each in figure_index.COUNTERPARTS if each.basis == figure_index.OURS}
    assert lost == {f"Figure {n}" for n in (2, 6, 7, 8)}


@pytest.mark.parametrize("each", figure_index.COUNTERPARTS, ids=lambda each: each.ours)
def test_a_counterpart_is_a_figure_that_is_drawn_or_an_experiments_section(each):
    if each.ours.endswith(":"):
        assert each.ours[:-1].lower() in {experiment.id for experiment in EXPERIMENTS}
    else:
        drawn = re.findall(r'(?:drawn|Figure|_figure)\(\s*"([^"]+)"', SOURCES)
        assert each.ours in drawn


def test_what_is_there_is_named_and_the_rest_is_not_run():
    figure = Figure("e4-norm-entropy", "", "", "", "")
    found = rows([Section("e4", "E4: norm against entropy", (figure,))])
    there = {row[0]: row[2] for row in found if row[2] != "not run"}
    assert there == {
        "Figure 4(a)": "figure `e4-norm-entropy`",
        "Table 2": 'table in "E4: norm against entropy"',
    }
    assert {row[3] for row in found if row[2] == "not run"} == {"–"}
