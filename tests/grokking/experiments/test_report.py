"""The written report: complete, self-contained, repeatable, and honest about what is not there.

Where the paper's figures are: each has a counterpart that some experiment draws, or is listed as not run.

The commands of a report make the runs that it was made from.
"""

import dataclasses
import json
import re
import shlex
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from closed_form import write_run as write_columns

from fastent import cli
from fastent.grokking.experiments import report
from fastent.grokking.experiments.claims import CLAIMS
from fastent.grokking.experiments.data import Runs, read_runs
from fastent.grokking.experiments.document import (
    Figure,
    Group,
    Link,
    Section,
    Table,
    Text,
    Verdict,
    figures_of,
)
from fastent.grokking.experiments.jobs import JOBS, planned
from fastent.grokking.experiments.report import (
    CONCLUSIONS,
    EXPERIMENTS,
    Judged,
    conclusions,
    make_sections,
    tally,
    write_report,
)
from fastent.grokking.train import sweep
from fastent.grokking.train.config import PRESETS, preset
from fastent.grokking.train.config import SOURCES as SOURCES_OF_VALUES
from fastent.grokking.train.storage import RunError


class Cells(HTMLParser):
    def __init__(self):
        super().__init__()
        self.cells, self.references, self.tags, self.inside = [], [], set(), False

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.references += [value for key, value in attrs if key in ("src", "srcset", "href")]
        if tag == "td":
            self.inside = True
            self.cells.append("")

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "td"

    def handle_data(self, data):
        if self.inside:
            self.cells[-1] += data.replace("\xa0", " ")


def parse(path):
    parser = Cells()
    parser.feed(path.read_text(encoding="utf-8"))
    parser.close()
    return parser


@pytest.fixture(scope="module")
def written(tmp_path_factory, writer):
    out = tmp_path_factory.mktemp("written")
    for seed in range(3):
        writer(out / "runs", seed, t_grok=1500 + 100 * seed)
    return out / "runs", write_report(out / "runs", out / "report")


def test_page_holds_the_numbers_of_its_runs_and_the_verdicts(written):
    cells = parse(written[1]).cells
    for value in (
        "1,500",
        "1,600",
        "1,700",
        "0.635",
        "0.630 to 0.650",
        "−100",
        "not reproduced",
        "other setting",
    ):
        assert value in cells
    assert "0 of 3 runs (95 % CI 0 % to 71 %); lead −50 steps (95 % CI −174 to 74; n = 3)" in cells


def test_page_is_self_contained(written):
    page = parse(written[1])
    drawn = list((written[1].parent / "figures").iterdir())
    assert len(drawn) >= 7
    # Each for light and for dark screens.
    embedded = [r for r in page.references if r.startswith("data:image/svg+xml;base64,")]
    assert len(embedded) == 2 * len(drawn)
    assert all(r.startswith(("data:", "#")) for r in page.references)
    assert "script" not in page.tags
    assert re.findall(r"https?://", written[1].read_text()) == []


def test_text_from_files_is_escaped(written):
    page = written[1].read_text()
    assert "an <b>old</b>" not in page
    assert "an &lt;b&gt;old&lt;/b&gt; one &amp; slow" in page


def test_the_same_runs_give_the_same_bytes_and_are_left_alone(written):
    runs, page = written
    before = {p: p.stat().st_mtime_ns for p in runs.rglob("*")}
    first = page.read_bytes(), (page.parent / "report.md").read_bytes()
    write_report(runs, page.parent)
    assert (page.read_bytes(), (page.parent / "report.md").read_bytes()) == first
    assert {p: p.stat().st_mtime_ns for p in runs.rglob("*")} == before
    assert not list(page.parent.rglob("*.tmp"))


def test_markdown_says_the_same_and_its_figures_lie_beside_it(written):
    text = (written[1].parent / "report.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\((figures/[^)]+)\)", text)
    assert len(links) == len(list((written[1].parent / "figures").iterdir()))
    for link in links:
        assert (written[1].parent / link).read_text().startswith("<svg")
    assert "| 0 | 300 | 1,500 | 1,500 | 0.635 | 1,600 | −100 | 800 | 700 | 100 % | 25 % | 2,500 |" in text


def test_what_was_not_run_is_shown_as_not_run_with_the_command_that_runs_it(written):
    runs, page = written
    cells = parse(page).cells
    # E2, E3, E7 and E8 have no run that they can be made from; E4 and E5 are made from E1's.
    for experiment in ("e2", "e3", "e7"):
        command = f"fastent run {experiment} --preset quick --seeds 0-2 --out {runs}"
        row = cells.index(f"{experiment.upper()}")
        assert cells[row + 2 : row + 5] == ["0 of 0", "not run", command]
        assert command in cells[:row]
    row = cells.index("E4")
    assert cells[row + 2 : row + 5] == ["0 of 0", "reported from the runs of E1", ""]
    claim = cells.index("mixing delays grokking by 5,020 steps")
    assert cells[claim + 2 : claim + 4] == ["not run", "–"]


def test_summary_names_the_papers_contributions_and_its_arithmetic(written):
    cells = parse(written[1]).cells
    found = {number: cells[cells.index(number) + 2] for number in ("(i)", "(ii)", "(iii)", "(iv)", "(v)")}
    assert (found["(ii)"], found["(iii)"]) == ("undecided", "not run")
    assert "19,420 − 14,360 = 5,060" in cells
    assert "contradicts" in cells


def test_every_section_of_an_experiment_names_its_runs_and_their_command(written):
    text = written[1].read_text()
    section = text[text.index('<section id="e4">') : text.index('<section id="e5">')]
    assert "e1-baseline-add-seed{0-2}" in section
    assert f"fastent run e1 --preset quick --seeds 0-2 --out {written[0]}" in section


def test_page_gives_the_commands_and_the_settings_with_their_source(written):
    runs, page = written
    text = page.read_text()
    assert f"fastent run e1 --preset quick --seeds 0-2 --out {runs}" in text
    assert f"fastent report {runs} --out {page.parent}" in text
    cells = parse(page).cells
    assert "paper, Appendix A" in cells
    assert "quick" in cells


def test_corrections_hold_the_first_order_loss_and_the_dead_score(written):
    text = written[1].read_text()
    for value in ("−0.990", "−0.939", "−0.896", "−0.886"):
        assert value in parse(written[1]).cells
    assert "constant rows score 1.000 by the paper" in text


def test_incomplete_failed_and_unknown_runs_are_listed_and_not_counted(written, tmp_path, writer):
    runs = tmp_path / "runs"
    shutil.copytree(written[0], runs)
    writer(runs, 3, done=False)
    failed = writer(runs, 4, done=False)
    (failed / "FAILED").write_text('{"attempts": 2, "reason": "killed by signal 9"}')
    writer(runs, 0, experiment="e99")
    cells = parse(write_report(runs, tmp_path / "report")).cells
    assert "not complete: step 2,500" in cells
    assert "failed at step 2,500: killed by signal 9" in cells
    assert "reported from its complete runs" in cells
    assert "unknown to this version" in cells
    assert "0 of 3 runs (95 % CI 0 % to 71 %); lead −50 steps (95 % CI −174 to 74; n = 3)" in cells


def test_without_a_complete_run_the_page_says_so(tmp_path, writer):
    writer(tmp_path / "runs", 0, done=False)
    page = write_report(tmp_path / "runs", tmp_path / "report").read_text()
    assert "No experiment has a complete run yet" in page
    assert "no complete run" in page


def test_a_folder_without_runs_is_refused_by_name(tmp_path):
    with pytest.raises(RunError, match="holds no run that can be read"):
        write_report(tmp_path, tmp_path / "report")
    (tmp_path / "file").touch()
    for name, said in (
        ("nowhere", "nowhere does not exist"),
        ("file", "file is a file and no folder of runs"),
    ):
        with pytest.raises(RunError, match=said):
            write_report(tmp_path / name, tmp_path / "report")
    assert not (tmp_path / "report").exists()


def words(section):
    """All paragraphs of a section, in one."""
    return " ".join(plain(block.text) for block in section.blocks if isinstance(block, Text))


def plain(words):
    pieces = words if isinstance(words, tuple) else (words,)
    return "".join(piece if isinstance(piece, str) else piece.label for piece in pieces)


def claim_rows(sections):
    groups = [block for block in sections[1].blocks if isinstance(block, Group)]
    return [
        row for group in groups for block in group.blocks if isinstance(block, Table) for row in block.rows
    ]


def claimed(sections):
    """The rows of the claims by the words of the claim."""
    return {row[1]: row for row in claim_rows(sections)}


def verdicts(runs):
    return {says: row[3].label for says, row in claimed(make_sections(runs)).items()}


def test_runs_of_different_settings_are_not_passed_off_as_one(tmp_path, writer):
    mixed = "differ in their settings"
    writer(tmp_path, 0)
    other = writer(tmp_path, 1) / "config.json"
    assert mixed not in words(make_sections(tmp_path)[0])
    record = json.loads(other.read_text())
    record["config"]["weight_decay"] = 0.5
    other.write_text(json.dumps(record))
    summary = make_sections(tmp_path)[0]
    assert mixed in words(summary)
    assert "the preset `quick` as it is (1 runs of E1, seeds 0)" in words(summary)
    assert "but for `weight_decay` 0.5 (there 1.0) (1 runs of E1, seeds 1)" in words(summary)
    assert set(verdicts(tmp_path).values()) == {"mixed settings", "not run"}


def test_a_report_over_two_settings_judges_nothing_not_even_an_experiment_that_is_of_one(tmp_path):
    for seed in range(3):
        write_columns(tmp_path, "e1", "baseline", seed, t_grok=1000)
        write_columns(tmp_path, "e2", "losses-0.1", seed, t_grok=2000)
    delayed = "mixing delays grokking by 5,020 steps (Table 1's means differ by 5,060)"
    early = "the model memorises early and generalises thousands of steps later, in every run"
    before = verdicts(tmp_path)
    assert (before[delayed], before[early]) == ("reproduced", "undecided")
    for path in tmp_path.glob("e2-*/config.json"):
        record = json.loads(path.read_text())
        record["config"]["learning_rate"] *= 3
        path.write_text(json.dumps(record))
    sections = make_sections(tmp_path)
    assert set(verdicts(tmp_path).values()) == {"mixed settings", "not run"}
    contributions = next(block for block in sections[0].blocks if isinstance(block, Table))
    assert {row[2].label for row in contributions.rows} == {"mixed settings", "not run"}
    # A setting that only runs which are not complete have is not one of the report.
    for path in tmp_path.glob("e2-*/DONE"):
        path.unlink()
    assert verdicts(tmp_path)[early] == "undecided"


def test_the_head_names_the_setting_by_its_preset_and_the_values_that_differ(tmp_path):
    for seed in range(2):
        write_columns(tmp_path / "own", "e1", "baseline", seed, t_grok=1000)
    head = words(make_sections(tmp_path / "own")[0])
    assert (
        "True of one setting: the preset `paper` but for `max_steps` 4000 (there 50000), `evaluate_every` 100"
        in head
    )
    assert "No number that belongs to the paper's setting is judged by it." in head
    (job,) = JOBS["e1"](preset("paper"), (0, 1, 2))
    write(tmp_path / "paper", job)
    head = words(make_sections(tmp_path / "paper")[0])
    assert "True of one setting: the preset `paper` as it is (3 runs of E1, seeds 0-2)." in head
    ours = [source for source in SOURCES_OF_VALUES.values() if source.startswith("ours")]
    assert f" {len(ours)} of the {len(SOURCES_OF_VALUES)} values of that preset are ours" in head
    assert "No number" not in head


def test_the_command_for_what_is_not_run_asks_for_the_setting_and_the_seeds_of_the_runs_that_are_there(
    tmp_path,
):
    for seed in (0, 1, 4):
        write_columns(tmp_path, "e1", "baseline", seed, t_grok=1000)
    row = claimed(make_sections(tmp_path))["mixing delays grokking by 5,020 steps"]
    assert row[2] == (
        f"`fastent run e2 --preset paper --max-steps 4000 --evaluate-every 100 --seeds 0-1,4 --out {tmp_path}`"
    )


def rows_with(verdict, ours="9 of 10 runs (95 % CI 55 % to 100 %; n = 10); lead 5"):
    return [Judged(name, "", "", ours, verdict, "") for names in CONCLUSIONS for name in names]


@pytest.mark.parametrize("verdict", Verdict)
def test_every_sentence_is_written_for_every_verdict_and_says_another_thing_for_each_kind(verdict):
    found = [plain(each) for each in conclusions(rows_with(verdict))]
    assert len(found) == 5
    for sentence, names in zip(found, CONCLUSIONS, strict=True):
        clauses = [CLAIMS[name].said for name in names[: 1 if verdict is Verdict.NOT_RUN else None]]
        if verdict is Verdict.CALIBRATED:
            expected = [f"hat {said['open']} is what the setting was chosen by" for said in clauses]
        elif verdict.kind == "none":
            state = "undecided" if verdict is Verdict.UNDECIDED else f"open: {verdict.label}"
            expected = [f"hether {said['open']} is {state}" for said in clauses]
        else:
            expected = [said[verdict.kind][1:] for said in clauses]
        assert all(words in sentence for words in expected)
        assert sentence[0].isupper()
        assert "{" not in sentence
        shown = verdict.kind != "none" or verdict in (Verdict.UNDECIDED, Verdict.CALIBRATED)
        figures = [
            said["shows"].format("9 of 10 runs (95 % CI 55 % to 100 %; n = 10)")
            for said in clauses
            if "shows" in said
        ]
        assert all((each in sentence) == shown for each in figures)
        assert "lead 5" not in sentence


def test_every_claim_of_a_sentence_has_words_for_each_kind_of_verdict_and_they_differ():
    for names in CONCLUSIONS:
        for name in names:
            said = CLAIMS[name].said
            assert {"yes", "part", "no", "open"} <= set(said)
            assert len({said["yes"], said["part"], said["no"]}) == 3
            assert "shows" not in said or said["shows"].count("{}") == 1


def test_a_sentence_of_claims_that_no_run_speaks_to_is_open_and_gives_no_figure():
    assert (
        plain(conclusions([])[1]) == "Whether mixing the representations delays grokking is open: not run. E2"
    )
    delays = Judged("e2.delays", "", "", "–", Verdict.NOT_RUN, "")
    kept_up = Judged("e2.kept_up", "", "", "by 0.1", Verdict.NOT_REPRODUCED, "")
    assert plain(conclusions([delays, kept_up])[1]) == (
        "Whether mixing the representations delays grokking is open: not run; it does not keep H up, as it is meant "
        "to. E2"
    )
    unknown = rows_with(Verdict.UNDECIDED, ours="–")
    assert "–" not in plain(conclusions(unknown)[1])


def test_the_tally_counts_each_verdict_in_their_order():
    rows = [
        *rows_with(Verdict.IN_PART)[:3],
        *rows_with(Verdict.REPRODUCED)[:2],
        rows_with(Verdict.NOT_RUN)[0],
    ]
    assert plain(tally(rows)) == "2 reproduced, 3 in part, 1 not run"
    assert tally([]) == ()


def test_the_first_screen_has_the_setting_the_sentences_the_tally_the_contributions_and_figure_1(written):
    sections = make_sections(written[0])
    setting, sentences, count, contributions, figure = sections[0].blocks
    assert plain(setting.text).startswith("True of one setting: the preset `quick`")
    assert all(f"{term}: " in plain(setting.text) for term in ("H", "T_grok", "H*"))
    assert plain(sentences.items[0]).startswith("The threshold H* is no sure warning of grokking: ")
    assert plain(count.text).startswith(
        f"Of {len(claim_rows(sections))} claims, the paper's and what follows from them: "
    )
    assert [row[0] for row in contributions.rows][:2] == ["(i)", "(ii)"]
    assert figure.name == "e1-dynamics"
    # It stands once, and its section says where.
    assert sum(each.name == "e1-dynamics" for each in figures_of(sections)) == 1


def test_every_link_of_the_page_leads_to_a_place_in_it(written):
    page = written[1].read_text()
    places = re.findall(r' id="([^"]+)"', page)
    assert len(places) == len(set(places))
    links = re.findall(r'href="#([^"]+)"', page)
    assert {"claims-e1", "e1", "e1-dynamics", "e1-seeds", "origin"} <= set(links) <= set(places)


SOURCES = "\n".join(path.read_text() for path in Path(report.__file__).parent.glob("*.py"))


def rows(sections):
    return report.figures_section(sections).blocks[1].rows


def test_the_papers_ten_figures_and_its_tables_of_results_are_listed():
    papers = {each.paper.partition("(")[0] for each in report.COUNTERPARTS}
    first_version = {*(f"Figure {n}" for n in range(1, 11)), *(f"Table {n}" for n in (1, 2, 3, 5))}
    assert papers == first_version | {"v2, phase portrait"}
    lost = {each.paper for each in report.COUNTERPARTS if each.basis == report.OURS}
    assert lost == {f"Figure {n}" for n in (2, 6, 7, 8)}


@pytest.mark.parametrize("each", report.COUNTERPARTS, ids=lambda each: each.ours)
def test_a_counterpart_is_a_figure_that_is_drawn_or_an_experiments_section(each):
    drawn = re.findall(r'drawn\(\s*"([^"]+)"', SOURCES)
    assert each.ours in {*drawn, *(experiment.id for experiment in EXPERIMENTS)}


def test_what_is_there_is_named_and_the_rest_is_not_run():
    figure = Figure("e4-norm-entropy", "", "", lambda: ("", ""))
    found = rows([Section("e4", "E4: norm against entropy", (figure,))])
    there = {row[0]: row[2] for row in found if row[2] != "not run"}
    assert there == {
        "Figure 4(a)": ("figure ", Link("`e4-norm-entropy`", "e4-norm-entropy")),
        "Table 2": ("table in ", Link("E4: norm against entropy", "e4")),
    }
    assert {row[3] for row in found if row[2] == "not run"} == {"–"}


def write(out, job):
    for seed in job.seeds:
        folder = out / job.run_name(seed)
        folder.mkdir(parents=True, exist_ok=True)
        record = {
            "schema_version": 1, "experiment": job.experiment, "condition": job.condition, "seed": seed,
            "stack": list(job.seeds), "config": job.settings(),
        }  # fmt: skip
        (folder / "config.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("quick", {"hidden": (64, 32), "equals_token": True, "weight_decay": 0.5}),
        ("paper", {}),
        ("paper", {"learning_rate": 0.003, "max_steps": 8000}),
        ("companion", {"final_norm": False, "entropy_at": "readout"}),
    ],
    ids=lambda value: value if isinstance(value, str) else ", ".join(value) or "as it is",
)
def test_every_command_asks_for_the_runs_it_stands_for(tmp_path, monkeypatch, name, given):
    pytest.importorskip("tyro")
    made = {}
    for experiment in JOBS:
        for job in planned(experiment, preset(name, **given), name, (0, 1, 3, 4, 5, 8)):
            write(tmp_path, job)
            made |= {job.run_name(seed): job.settings() for seed in job.seeds}
    asked = {}
    monkeypatch.setattr(
        sweep,
        "run_jobs",
        lambda jobs, *_, **__: (
            asked.update({job.run_name(s): job.settings() for job in jobs for s in job.seeds}) or []
        ),
    )
    monkeypatch.setattr(report, "print_summary", lambda *arguments: None)
    commands = report.commands(read_runs(tmp_path), tmp_path / "elsewhere")
    assert len(commands) == len(
        {job.experiment for make in JOBS.values() for job in make(preset(name), (0,))}
    )
    for command in commands:
        words = shlex.split(command)
        assert words[:2] == ["fastent", "run"]
        assert cli.main(words[1:]) == 0
    assert asked == made


@pytest.mark.parametrize("times", [(1500, 1500, 1700), (1500, 2400, 2400), (500, 900, 5000)])
def test_no_interval_of_a_length_is_negative_and_none_is_beyond_what_a_number_can_be(tmp_path, writer, times):
    # Without one seed two T_grok are equal, and what is fitted is perfect or undefined.
    for seed, t_grok in enumerate(times):
        writer(tmp_path, seed, t_grok=t_grok, last_step=t_grok + 1000)
    runs = Runs(tuple(read_runs(tmp_path)))
    results = {e.id: e.analyse(runs) for e in EXPERIMENTS[:8]}
    found = {
        k: f.ours for e in EXPERIMENTS[:8] if (r := results[e.id]) is not None for k, f in e.claims(r).items()
    }
    assert len(found) > 30

    def ends(name):
        written = re.findall(r"CI (\S+?)(?: %)? to (\S+?)(?: %)?;", found[name])
        return [float(end.replace("−", "-").replace(",", "")) for pair in written for end in pair]

    for name in (
        "e1.memorises_early",
        "e1.t_grok",
        "e1.h_star",
        "e5.left_out",
        "e5.warning",
        "e5.warning_close",
    ):
        assert all(end >= 0 for end in ends(name)), found[name]
    for name in ("e4.gap_r2", "e5.r2", "e1.h_star", "e4.correlation"):
        assert all(-1 <= end <= 1 for end in ends(name)), found[name]
    assert max(abs(end) for name in found for end in ends(name)) < 30_000
    assert "every run of no" not in SOURCES


def test_seeds_are_written_as_the_command_line_reads_them():
    assert report.ranges({0, 1, 2, 5, 7, 8}) == "0-2,5,7-8"
    assert cli.parse_seeds(report.ranges({4, 0, 2, 3})) == (0, 2, 3, 4)


def test_a_run_of_an_unknown_experiment_gets_its_preset_and_what_differs_from_it(tmp_path):
    from fastent.grokking.train.runs import Job

    write(tmp_path, Job("e99", "baseline", dataclasses.replace(preset("paper"), weight_decay=0.5), (0,)))
    assert report.commands(read_runs(tmp_path), tmp_path) == [
        f"fastent run e99 --preset paper --weight-decay 0.5 --seeds 0 --out {tmp_path}"
    ]


@pytest.mark.parametrize("name", ["quick", "paper"])
def test_runs_of_all_experiments_of_one_preset_are_of_one_setting_and_one_run_of_another_is_not(
    tmp_path, name
):
    for experiment in JOBS:
        for job in planned(experiment, preset(name, max_steps=7000), name, (0, 1)):
            write(tmp_path, job)
    assert report.of_one_setting(read_runs(tmp_path))
    (job,) = JOBS["e1"](preset({"quick": "paper", "paper": "quick"}[name], max_steps=7000), (2,))
    write(tmp_path, job)
    assert not report.of_one_setting(read_runs(tmp_path))


def test_runs_of_a_kind_that_no_experiment_asks_for_are_compared_by_their_settings(tmp_path):
    from fastent.grokking.train.runs import Job

    config = dataclasses.replace(preset("paper"), weight_decay=0.5)
    write(tmp_path, Job("e99", "baseline", config, (0, 1)))
    assert report.of_one_setting(read_runs(tmp_path))
    write(tmp_path, Job("e99", "baseline", preset("paper"), (2,)))
    assert not report.of_one_setting(read_runs(tmp_path))


def test_runs_of_a_preset_that_has_changed_since_are_of_one_setting_that_the_head_can_name(
    tmp_path, monkeypatch
):
    for experiment in ("e1", "e6"):
        for job in planned(experiment, preset("paper"), "paper", (0, 1)):
            write(tmp_path, job)
    for name in (name for name in PRESETS if name.startswith("paper")):
        newer = preset(name, train_fraction=0.2, final_norm=True, evaluate_every=100)
        monkeypatch.setitem(PRESETS, name, newer)
        monkeypatch.setitem(report.PRESETS_JSON, name, json.loads(json.dumps(dataclasses.asdict(newer))))
    monkeypatch.setattr(report, "_settings", report._settings.__wrapped__)
    stored = read_runs(tmp_path)
    ((way, made),) = report.settings(stored)
    shared = {"train_fraction": 0.3, "final_norm": False, "evaluate_every": 200}
    own = {"s5": {"train_fraction": 0.5}}  # else the share that is asked for goes for S5 too
    assert way == ("paper", {**shared, **own})
    assert len(made) == len(stored)
    assert report._way(way) == (
        "the preset `paper` but for `train_fraction` 0.3 (there 0.2), `final_norm` False (there True), "
        "`evaluate_every` 200 (there 100), `train_fraction` of s5 0.5 (there 0.5)"
    )


def test_what_a_task_had_for_itself_is_named_and_two_of_it_are_two_settings(tmp_path):
    for experiment in ("e1", "e6"):
        for job in planned(experiment, preset("paper", weight_decay=0.5), "paper", (0, 1)):
            if job.config.task == "s5":
                job = dataclasses.replace(job, config=dataclasses.replace(job.config, train_fraction=0.1))
            write(tmp_path, job)
    stored = read_runs(tmp_path)
    ((way, _),) = report.settings(stored)
    assert way == ("paper", {"weight_decay": 0.5, "s5": {"train_fraction": 0.1}})
    assert "`weight_decay` 0.5 (there 1.0), `train_fraction` of s5 0.1 (there 0.5)" in report._way(way)
    first, sixth = report.commands(stored, tmp_path)
    assert "#" not in first
    assert sixth == (
        f"fastent run e6 --preset paper --weight-decay 0.5 --seeds 0-1 --out {tmp_path}  # s5 had train_fraction 0.1"
    )
    path = tmp_path / "e6-baseline-s5-weight_decay=0.5-seed1" / "config.json"
    path.write_text(path.read_text().replace('"train_fraction": 0.1', '"train_fraction": 0.2'))
    assert not report.of_one_setting(read_runs(tmp_path))


def test_a_setting_younger_than_the_runs_does_not_set_them_apart(tmp_path):
    (job,) = JOBS["e1"](preset("paper"), (0, 1))
    write(tmp_path, job)
    path = tmp_path / job.run_name(1) / "config.json"
    record = json.loads(path.read_text())
    del record["config"]["separate_tokens"]
    path.write_text(json.dumps(record))
    assert report.of_one_setting(read_runs(tmp_path))
