"""The README's benchmark tables follow from the committed rows."""

import json

from bench.readme import README, ROWS, TABLES, covariance_table, fill


def test_the_tables_are_those_of_the_committed_rows():
    text = README.read_text()
    assert [name for name in TABLES if f"<!-- bench: {name} -->" not in text] == []
    assert fill(text, ROWS) == text


def test_a_changed_row_changes_the_table(tmp_path):
    for name in TABLES:
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
    _, _, line = covariance_table(rows).splitlines()
    assert (
        line == "| 512 x 64 | " + " | ".join(2 * ["0.50 [0.40, 1.50]", "1.25 [0.40, 1.50] numpy.cov"]) + " |"
    )
