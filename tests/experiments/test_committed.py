"""Documents that take in parts of the report, and whether they still follow from the runs."""

import json
from pathlib import Path

import pytest

from fastent.cli import main
from fastent.experiments.committed import documents
from fastent.experiments.report import check_documents, fill_documents
from fastent.train.errors import RunError

PLACE = "# Results\n\nBefore.\n\n<!-- fastent report: {} -->\nold\n<!-- fastent report: end -->\n\nAfter.\n"


@pytest.fixture
def document(three_runs, tmp_path):
    path = tmp_path / "docs" / "results.md"
    path.parent.mkdir()
    path.write_text(PLACE.format("e1") + PLACE.format("summary"))
    fill_documents(three_runs, [path])
    return path


def test_a_filled_document_holds_the_sections_tables_without_figures_and_keeps_the_rest(document):
    text = document.read_text()
    assert text.startswith("# Results\n\nBefore.\n\n<!-- fastent report: e1 -->\n")
    assert text.count("After.") == 2
    assert "old" not in text.splitlines()
    assert "| 0 | 300 | 1,500 | 1,500 | 0.635 | 1,600 | −100 |" in text
    assert "*Claims of the paper and what 3 complete runs say of them." in text
    assert "](figures/" not in text


def test_a_document_that_follows_from_its_runs_has_no_difference(three_runs, document):
    assert check_documents(three_runs, [document]) == []


def test_an_edited_number_and_a_changed_run_are_found(three_runs, document):
    text = document.read_text()
    document.write_text(text.replace("| 0 | 300 | 1,500 |", "| 0 | 300 | 1,400 |"))
    found = check_documents(three_runs, [document])
    assert any(line.startswith("-| 0 | 300 | 1,400 |") for line in found)
    assert any(line.startswith("+| 0 | 300 | 1,500 |") for line in found)
    document.write_text(text)
    metrics = three_runs / "e1-baseline-add-seed2" / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    rows[20]["test_accuracy"] = 0.995
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert any(line.startswith("+| 2 | 300 | 1,000 |") for line in check_documents(three_runs, [document]))


def test_a_section_that_the_runs_do_not_give_and_a_document_without_a_place_are_refused(three_runs, document):
    document.write_text(PLACE.format("e2"))
    with pytest.raises(
        RunError, match=r"takes in the section 'e2', which these runs do not give; there are summary"
    ):
        check_documents(three_runs, [document])
    document.write_text("# Nothing\n")
    with pytest.raises(RunError, match="takes in no part of the report"):
        fill_documents(three_runs, [document])


def test_documents_are_the_readme_and_those_below_docs_that_have_a_place(tmp_path, document):
    (tmp_path / "README.md").write_text("# No place\n")
    (tmp_path / "docs" / "deep").mkdir()
    (tmp_path / "docs" / "deep" / "more.md").write_text(PLACE.format("e1"))
    (tmp_path / "docs" / "other.md").write_text("text\n")
    assert documents(tmp_path) == [tmp_path / "docs" / "deep" / "more.md", document]


def test_the_command_fails_exactly_when_a_document_differs(
    three_runs, document, capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(three_runs), "--check"]) == 0
    assert capsys.readouterr().out == f"{Path('docs/results.md')}: as the runs say\n"
    document.write_text(document.read_text().replace("1,500", "1,501"))
    assert main(["report", str(three_runs), "--check", "docs/results.md"]) == 1
    assert "1,501" in capsys.readouterr().out
    assert main(["report", str(three_runs), "--fill"]) == 0
    assert main(["report", str(three_runs), "--check"]) == 0
    assert not (tmp_path / "report").exists()
    document.unlink()
    capsys.readouterr()
    assert main(["report", str(three_runs), "--check"]) == 1
    assert "hold no part of the report" in capsys.readouterr().err


def test_the_committed_tables_of_this_project_follow_from_its_committed_runs():
    root = Path(__file__).parents[2]
    runs, committed = root / "bench" / "results" / "paper", documents(root)
    if not committed:
        pytest.skip("no document takes in a part of the report yet")
    assert "\n".join(check_documents(runs, committed)) == ""
