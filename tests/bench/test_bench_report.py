"""Reports from rows: the committed ones follow from theirs, and so do the tables of the documents."""

import json
import re

import pytest

pytest.importorskip("matplotlib")
from bench import harness, report
from bench.report import DOCUMENTS, ROWS, TABLES, fill


def test_the_tables_are_those_of_the_committed_rows():
    texts = [path.read_text() for path in DOCUMENTS]
    marked = [name for text in texts for name in re.findall(r"<!-- bench: (?!end)(\w+) -->", text)]
    assert sorted(marked) == sorted(TABLES)
    assert [fill(text, ROWS) for text in texts] == texts


def test_a_changed_row_changes_the_table(tmp_path):
    for question in {question for question, _ in TABLES.values()}:
        rows = [json.loads(line) for line in (ROWS / f"{question}.jsonl").read_text().splitlines()]
        for row in rows:
            row |= {key: 2 * row[key] for key in ("ratio", "overhead", "share") if key in row}
        (tmp_path / f"{question}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for path in DOCUMENTS:
        text = path.read_text()
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
    _, _, line = TABLES["covariance"][1](rows).splitlines()
    assert (
        line == "| 512 x 64 | " + " | ".join(2 * ["0.50 [0.40, 1.50]", "1.25 [0.40, 1.50] numpy.cov"]) + " |"
    )


def test_the_committed_report_follows_from_the_committed_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "save_png", lambda *_, **__: None)
    for path in ROWS.glob("*.jsonl"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    report.write_cpu(tmp_path)
    for name in ("report.md", "commits.md", "commits.jsonl"):
        assert (tmp_path / name).read_text() == (ROWS / name).read_text()


def test_check_compares_the_documents_and_the_rounds_and_writes_nothing(tmp_path, monkeypatch, capsys):
    copies = tuple(tmp_path / path.name for path in DOCUMENTS)
    for path, copy in zip(DOCUMENTS, copies, strict=True):
        copy.write_text(path.read_text())
    monkeypatch.setattr(report, "DOCUMENTS", copies)
    assert report.main(["--check"]) == 0
    rows = [{"op": "x", "raw_us": [1.0, 2.0, 3.0], "us_p20": 1.4, "us_p50": 2.5, "us_p80": 2.6}]
    harness.write_rows(tmp_path / "rows" / "x.jsonl", rows)
    capsys.readouterr()
    assert report.main(["--check", str(tmp_path / "rows")]) == 1
    assert "x None: us_p50 2.5, of its rounds 2.0" in capsys.readouterr().out
    for copy, name in zip(copies, ("cost", "entropy"), strict=True):
        right = copy.read_text()
        wrong = right.replace(f"<!-- bench: {name} -->\n", f"<!-- bench: {name} -->\nwrong\n")
        copy.write_text(wrong)
        assert report.main(["--check"]) == 1
        assert copy.read_text() == wrong
        assert report.main(["--docs"]) == 0
        assert copy.read_text() == right
    with pytest.raises(SystemExit):
        report.main([])


def test_the_report_marks_where_fastent_wins_and_names_a_limit_that_was_missed(tmp_path):
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
        {**common, "provider": "ssrlib", "ratio": 0.7, "ratio_low": 0.6, "ratio_high": 0.8, "limit": 1.05},
    ]
    harness.write_rows(tmp_path / "entropy.jsonl", rows)
    files = report.write_cpu(tmp_path)
    text = files[0].read_text()
    assert "| 1.20 [0.90, 1.30] (above our limit, 1.05) | 1.10 [1.05, 1.15] | **0.70 [0.60, 0.80]** |" in text
    assert [path.name for path in files[1:]] == ["entropy.png"]
    assert files[1].read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "entropy.jsonl").read_text().splitlines()[0])["provider"] == "fastent"


CHANGED = {"op": "covariance", "n": 512, "d": 128, "dtype": "float32", "threads": 1, "us_p50": 8.0}
TREES = ({"commit": "aaaaaaa"}, {"commit": "bbbbbbb-dirty", "changes": "1234abcd"})


def test_lines_from_a_changed_tree_are_marked_and_the_changes_named():
    rows = [
        {
            **CHANGED,
            "provider": name,
            "threads": threads,
            "ratio": 0.5,
            "ratio_low": 0.4,
            "ratio_high": 0.6,
            **tree,
        }
        for threads, tree in enumerate(TREES, 1)
        for name in ("fastent", "torch, direct", "numpy.cov")
    ]
    clean, changed, _, note = report.ratio_table(rows).splitlines()[2:]
    assert clean.startswith("| 512 x 128 float32 | 1 |")
    assert changed.startswith("| 512 x 128 float32 † | 2 |")
    assert note == "† From a changed tree: bbbbbbb with changes 1234abcd."
    assert "| 512 x 128 † |" in TABLES["covariance"][1](rows)  # of the documents too
    assert "†" not in report.ratio_table(rows[:3])
    assert "changes (not recorded which)" in report.ratio_table([{**rows[3], "changes": None}])


def test_the_page_over_commits_keeps_ratios_of_older_rows_and_shows_times_of_a_gpu_alone(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(report, "save_png", lambda *_, **__: None)
    span = {"ratio": 0.5, "ratio_low": 0.4, "ratio_high": 0.6}
    row = {**CHANGED, "provider": "torch, direct", "device": "x", **span}
    training = {"op": "training step, per seed", "model": "paper", "seeds": 1, "threads": 1, **TREES[0]}
    report.write_commits(
        tmp_path,
        [
            {**row, **TREES[0]},
            {**row, "provider": "numpy.cov", "d": 64, **TREES[0]},  # of the providers at one shape alone
            {**training, "provider": "plain", "us_p50": 40.0},
            {**training, "provider": "fastent", "us_p50": 10.0},
        ],
    )
    page, _ = report.write_commits(tmp_path, [{**row, **TREES[1], "ratio": 0.55}])
    text = page.read_text()
    assert "| of | over | aaaaaaa | bbbbbbb † |" in text
    assert "| 512 x 128 float32 | torch, direct | **0.50 [0.40, 0.60]** | **0.55 [0.40, 0.60]** |" in text
    assert "| paper, seeds: 1 | plain loop | 0.25 |" in text  # of medians: no interval
    assert "numpy.cov" not in text
    assert not re.search(r"\d (?:us|ms|s)\b", text)
    # The same tree again: the newer counts, in its place.
    report.write_commits(tmp_path, [{**row, **TREES[0], "ratio": 0.45}])
    assert "| **0.45 [0.40, 0.60]** | **0.55 [0.40, 0.60]** |" in page.read_text()

    kernel = {**SMALL, **TIMES, "batch": 1, "threads": 2, **TREES[0]}
    report.write_commits(tmp_path / "gpu", [kernel, {**kernel, "timing": "host", "n": 1024}])
    text = (tmp_path / "gpu" / "commits.md").read_text()
    assert "## kernel, NVIDIA H100" in text
    assert "8.5 us (8 us to 9 us)" in text
    assert "1,024" not in text


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


def test_figures_name_what_is_drawn_on_their_edges_and_every_kind_of_point():
    common = {"op": "accuracy", "input": "plain", "us_p50": 10.0}
    rows = [
        {**common, "provider": "fastent", "error": 0.0},
        {**common, "provider": "numpy", "error": None, "answer": "nan"},
    ]
    (axes,) = [ax for ax in report._accuracy(rows).axes if ax.axison]
    named = dict(zip((text.get_text() for text in axes.get_yticklabels()), axes.get_yticks(), strict=True))
    edges = [named["exactly 0"], named["no number"]]
    assert [line.get_ydata()[0] for line in axes.lines[:2]] == edges
    assert axes.get_ylim()[0] < min(axes.get_yticks()) == edges[0]

    spans = {"overhead": 0.004, "overhead_low": -0.001, "overhead_high": 0.01, "share": 0.003}
    loop = {"op": "monitor", "loop": "vision", "mode": "plain", "threads": 1}
    (legend,) = report._overhead([{**loop, "stride": 0}, {**loop, "stride": 200, **spans}]).legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "vision",
        "probes, by their time",
        "1 %",
        "the default stride",
        "slowdown against a run without, 95 % interval",
    ]


CARD = {"device": "NVIDIA H100", "capability": "sm_90", "run": "1", "part": "all"}
SMALL = {"op": "kernel", "n": 512, "d": 128, "dtype": "bfloat16", "cache": "warm", "timing": "graph", **CARD}
TIMES = {"us_p20": 8.0, "us_p50": 8.5, "us_p80": 9.0}
LARGE = {"op": "covariance", "n": 8192, "d": 4096, "dtype": "bfloat16", "timing": "graph", **CARD}
SLOWDOWN = {
    "op": "slowdown",
    "step": "graph step",
    "provider": "deferred",
    "stride": 10,
    "step_us": 151.0,
    "probes": 800,
    "dropped": 0,
    "slowdown": 0.006,
    "slowdown_low": 0.004,
    "slowdown_high": 0.008,
    **CARD,
}


def judged(name, *rows):
    (found,) = (one for one in report.verdicts(list(rows)) if one.target.startswith(name))
    return found


def test_each_target_is_met_missed_or_not_measured_by_the_rows():
    one, many = "512 x 128, in the stream", "512 x 128, 32 in one launch"
    rows = [{**SMALL, "batch": 1, **TIMES}, {**SMALL, "batch": 32, **TIMES, "us_p50": 20.5}]
    assert judged(one, *rows) == (one, "<= 10 us", "8.5 us (8 to 9)", "met", "NVIDIA H100")
    assert judged(many, *rows)[2:] == ("20.5 us (8 to 9)", "missed", "NVIDIA H100")
    assert {verdict.verdict for verdict in report.verdicts([])} == {"not measured"}
    assert judged("slowdown of a captured", SLOWDOWN)[1:4] == ("<= 1 %", "0.60 % [0.40, 0.80]", "met")
    host = {"op": "probe on the thread", **CARD}
    ways = [{**host, "provider": "deferred", "us_p50": 100.0}, {**host, "provider": "direct", "us_p50": 2e3}]
    assert judged("512 x 128: time that the direct way", *ways)[1:4] == (
        ">= 50",
        "20: 2 ms over 100 us",
        "missed",
    )
    gates = [{"op": "gate", "n": n, "passed": passed, **CARD} for n, passed in ((1, True), (2, False))]
    assert judged("results outside", *gates)[2:4] == ("1 of 2", "missed")
    assert judged("results outside", *gates, {**gates[1], "passed": True})[2:4] == ("0 of 2", "met")
    ceiling = {"op": "ceiling", "provider": report.PRODUCT, "per_second": 5e13, "timing": "graph", **CARD}
    rate = {**SMALL, "batch": 1, "n": 8192, "d": 4096, "flops": 1.5e11, **TIMES, "us_p50": 5e3}
    assert judged("8192 x 4096: executed", ceiling, rate)[2:4] == ("0.6: 30 of 50 TFLOP/s", "missed")
    e1 = {
        "op": "e1",
        "seeds": 10,
        "seed_steps_per_second": 5e4,
        "cpu_seed_steps_per_second": 1e3,
        **CARD,
    }
    assert judged("E1, 10 seeds", e1)[2:4] == ("50: 50,000 over 1,000 seed-steps a second", "met")


def test_a_figure_of_something_else_gives_no_verdict_but_the_reason():
    small = {**SMALL, "batch": 1, **TIMES}
    for change, reason in (
        ({"timing": "host"}, "timed by host: not the device's time alone"),
        ({"skipped": "outside its gate"}, "outside its gate"),
        ({"capability": None}, "no row of a GPU"),
        ({"cache": "cold"}, "no row of a GPU"),
    ):
        assert judged("512 x 128, in the stream", {**small, **change})[2:4] == (reason, "not measured")
    for change, reason in (
        ({"dropped": 30}, "30 of 800 evaluations were dropped"),
        ({"step_us": 300.0}, "the step took 300 us instead of 150"),
    ):
        assert judged("slowdown of a captured", {**SLOWDOWN, **change})[2:4] == (reason, "not measured")
    whole = {"op": "kernel", "skipped": "no CUDA device", "part": "kernel"}
    assert judged("512 x 128, in the stream", whole).measured == "no CUDA device"
    # A later run that found no figure takes the older one back; one that had no time does not.
    later = {"op": "kernel", "n": 512, "d": 128, "run": "2", "part": "kernel"}
    wrong, late = {**later, "skipped": "outside its gate"}, {**later, "skipped": "time", "late": True}
    assert judged("512 x 128, in the stream", small, wrong).measured == "outside its gate"
    broke = {"op": "kernel", "part": "kernel", "run": "1", "skipped": "the part broke", "broke": True}
    assert judged("512 x 128, in the stream", small, late, broke).verdict == "met"
    assert judged("512 x 128, in the stream", late).measured == "time"


def test_what_could_not_be_held_to_its_gate_is_not_inside_it():
    kept = {"op": "gate", "n": 1, "passed": True, **CARD}
    ours = {"op": "gate", "n": 2, "skipped": "the kernels cannot run here", **CARD}
    name = "results outside"
    assert judged(name, kept, ours)[2:4] == (
        "1 of 2 could not be held to theirs: the kernels cannot run here",
        "not measured",
    )
    assert judged(name, ours).verdict == "not measured"
    assert judged(name, {**kept, "passed": False}, ours)[2:4] == ("1 of 2", "missed")
    later = {**ours, "passed": True, "run": "2"}
    del later["skipped"]
    assert judged(name, kept, ours, later)[2:4] == ("0 of 2", "met")
    late = {"op": "gate", "skipped": "time", "late": True, **CARD}
    assert judged(name, kept, late)[2:4] == ("0 of 1", "met")
    assert judged(name, late).verdict == "not measured"


def test_times_of_two_runs_or_cards_are_not_compared():
    ours = {**LARGE, "provider": "fastent, memory at hand", "us_p50": 2500.0}
    theirs = {**LARGE, "provider": report.PRODUCT, "us_p50": 5000.0}
    name = "8192 x 4096: time over that of cuBLAS"
    assert judged(name, ours, theirs)[1:4] == ("<= 0.55", "0.5: 2.5 ms over 5 ms", "met")
    for change in ({"run": "2"}, {"device": "NVIDIA H200"}):
        assert judged(name, ours, {**theirs, **change})[2:4] == ("no row of a GPU", "not measured")


def test_shares_are_of_the_ceilings_of_the_same_card_and_of_nothing_else():
    row = {**SMALL, "batch": 1, **TIMES, "bytes": 3e6, "flops": 1e8}
    ceilings = [
        {"op": "ceiling", "provider": name, "per_second": rate, "timing": "graph", **CARD}
        for name, rate in ((report.COPY, 3e12), (report.PRODUCT, 4e13), (report.PRODUCT, 5e13))
    ]
    *_, found = report.with_shares([*ceilings, row])
    assert found["floor_us"] == pytest.approx(2.0, rel=1e-12)
    assert found["share_of_floor"] == pytest.approx(2.0 / 8.5, rel=1e-12)
    for other in (
        ceilings[:1],
        [{**ceiling, "device": "NVIDIA H200"} for ceiling in ceilings],
        [{**ceiling, "timing": "host"} for ceiling in ceilings],
    ):
        *_, found = report.with_shares([*other, row])
        assert "share_of_floor" not in found


def test_of_each_part_the_newest_run_counts():
    rows = [
        {"part": part, "run": run, "us": us}
        for part, run, us in (("a", "1", 1), ("b", "1", 2), ("a", "2", 3), ("a", "2", 4))
    ]
    assert [row["us"] for row in report.newest(rows)] == [2, 3, 4]
