"""Reports from rows: the committed ones follow from theirs, and so do the README's tables."""

import json

import pytest

from bench import harness, report
from bench.report import README, README_TABLES, ROWS, fill


def test_the_tables_are_those_of_the_committed_rows():
    text = README.read_text()
    assert [name for name in README_TABLES if f"<!-- bench: {name} -->" not in text] == []
    assert fill(text, ROWS) == text


def test_a_changed_row_changes_the_table(tmp_path):
    for name in README_TABLES:
        rows = [json.loads(line) for line in (ROWS / f"{name}.jsonl").read_text().splitlines()]
        for row in rows:
            row |= {key: 2 * row[key] for key in ("ratio", "overhead") if key in row}
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = README.read_text()
    changed = fill(text, tmp_path)
    assert changed != text
    assert fill(changed, ROWS) == text


def test_the_fastest_exact_peer_is_named_beside_the_direct_way():
    row = {"op": "covariance", "n": 512, "d": 64, "dtype": "float32", "ratio_low": 0.4, "ratio_high": 1.5}
    rows = [
        row | {"provider": provider, "threads": threads, "us_p50": time, "ratio": round(50 / time, 2)}
        for threads in (1, 2)
        for provider, time in (
            ("fastent", 50),
            ("torch, direct", 100),
            ("numpy.cov", 40),
            ("ssrlib, streaming", 1),
        )
    ]
    _, _, line = README_TABLES["covariance"](rows).splitlines()
    assert (
        line == "| 512 x 64 | " + " | ".join(2 * ["0.50 [0.40, 1.50]", "1.25 [0.40, 1.50] numpy.cov"]) + " |"
    )


def test_the_committed_report_follows_from_the_committed_rows(tmp_path):
    for path in ROWS.glob("*.jsonl"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    report.write_cpu(tmp_path)
    assert (tmp_path / "report.md").read_text() == (ROWS / "report.md").read_text()


def test_check_compares_the_readme_and_writes_nothing(tmp_path, monkeypatch):
    readme = tmp_path / "README.md"
    readme.write_text(README.read_text())
    monkeypatch.setattr(report, "README", readme)
    assert report.main(["--check"]) == 0
    wrong = readme.read_text().replace("<!-- bench: entropy -->\n", "<!-- bench: entropy -->\nwrong\n")
    readme.write_text(wrong)
    assert report.main(["--check"]) == 1
    assert readme.read_text() == wrong
    assert report.main(["--readme"]) == 0
    assert readme.read_text() == README.read_text()
    with pytest.raises(SystemExit):
        report.main([])


def test_the_report_marks_a_peer_that_wins_and_a_limit_that_was_missed(tmp_path):
    common = {"op": "entropy", "n": 512, "d": 128, "dtype": "float32", "threads": 1, "us_p50": 800.0}
    rows = [
        {**common, "provider": "fastent", "floor_us": 500.0},
        {
            **common,
            "provider": "torch, direct",
            "ratio": 1.2,
            "ratio_low": 0.9,
            "ratio_high": 1.3,
            "limit": 1.05,
        },
        {**common, "provider": "numpy", "ratio": 1.1, "ratio_low": 1.05, "ratio_high": 1.15},
    ]
    harness.write_rows(tmp_path / "entropy.jsonl", rows)
    files = report.write_cpu(tmp_path)
    text = files[0].read_text()
    assert "1.20 [0.90, 1.30] (limit missed)" in text
    assert "**1.10 [1.05, 1.15]**" in text
    assert [path.name for path in files[1:]] == ["entropy.png"]
    assert files[1].read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "entropy.jsonl").read_text().splitlines()[0])["provider"] == "fastent"


def test_times_are_written_with_three_digits_and_a_unit():
    assert [report.microseconds(us) for us in (3.14159, 1234.5, 2.5e6)] == ["3.14 us", "1.23 ms", "2.5 s"]


def test_a_provider_that_nobody_gave_a_style_is_drawn_in_one_of_its_own():
    rows = [
        {"op": "accuracy", "provider": name, "input": "plain", "us_p50": 10.0 + i, "error": 1e-13}
        for i, name in enumerate(("new one", "fastent", "another"))
    ]
    found = report.styles(rows)
    assert list(found) == ["fastent", "new one", "another"]
    assert len(set(found.values())) == 3
    (axes,) = [ax for ax in report._accuracy(rows).axes if ax.axison]
    assert [line.get_label() for line in axes.lines[:3]] == ["new one", "fastent", "another"]
