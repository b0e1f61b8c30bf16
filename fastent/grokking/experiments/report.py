"""The report: one page of HTML and the same as Markdown, from a folder of runs alone.

`write_report` reads the runs, lets each experiment make its part (a headline, claims for the summary, and a section)
from the complete runs that it reads, and adds what belongs to all: what to believe, in five sentences made from the
verdicts; every claim by experiment; the paper's figures and tables and where they are here, what the quantities mean,
what is not so in the paper, what was not run, and where the runs came from. Nothing is trained, nothing is filled in:
an experiment without complete runs is listed as not run, with the command that runs it; runs that were made with
different settings judge nothing. The same folder gives the same bytes: no date of writing, no order of chance.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastent.grokking.experiments import (
    e1_lead,
    e2_mixing,
    e3_norm,
    e4_predictors,
    e5_forecast,
    e6_tasks,
    e7_mlp,
    e8_probes,
)
from fastent.grokking.experiments.claims import (
    CLAIMS,
    CONTRIBUTIONS,
    NONE,
    Experiment,
    Findings,
    arithmetic_section,
    corrections_section,
    decimal,
    marked,
    steps,
)
from fastent.grokking.experiments.data import PAPER, PRESETS_JSON, Runs, StoredRun, read_run, read_runs
from fastent.grokking.experiments.document import (
    Block,
    Code,
    Figure,
    Group,
    Items,
    Link,
    Links,
    Piece,
    Section,
    Table,
    Text,
    Verdict,
    Words,
    as_html,
    as_markdown,
    check,
    figures_of,
    fill,
    save,
)
from fastent.grokking.experiments.jobs import JOBS, planned
from fastent.grokking.experiments.leads import left_out_threshold
from fastent.grokking.train.config import SOURCES, TASK_SETTINGS, TrainConfig
from fastent.grokking.train.runs import OWN, in_words
from fastent.grokking.train.storage import RunError, printable, write_atomically

__all__ = ["EXPERIMENTS", "check_documents", "fill_documents", "write_report"]

TITLE = "Spectral entropy and grokking"


def write_report(runs: Path, out: Path) -> Path:
    """Write the report on the runs in a folder.

    Parameters
    ----------
    runs : Path
        Folder of run folders, the ``--out`` of ``fastent run``. It is only read.
    out : Path
        Folder for ``index.html`` (self-contained), ``report.md`` and ``figures/``; made if it is not there.

    Returns
    -------
    Path
        ``out/index.html``.

    Raises
    ------
    RunError
        If `runs` is not a folder, or holds no run that can be read.
    OSError
        If `out` cannot be written.
    """
    sections = make_sections(runs, out)
    subtitle = (
        "Runs of small Transformers that grok, under a live monitor of the spectral entropy of their "
        "representation, set beside what arXiv 2604.13123 says of it."
    )
    save(figures_of(sections), out / "figures")
    write_atomically(out / "report.md", as_markdown(TITLE, subtitle, sections).encode())
    page = out / "index.html"
    write_atomically(page, as_html(TITLE, subtitle, sections).encode())
    return page


def check_documents(runs: Path, documents: Sequence[Path]) -> list[str]:
    """Compare the parts of the report in committed documents with what the runs in a folder give.

    Parameters
    ----------
    runs : Path
        Folder of runs, packed ones as a rule. It is only read.
    documents : sequence of Path
        Markdown files with parts of the report; see `fastent.grokking.experiments.document`. Their figures lie in
        ``figures/<name of runs>`` beside them.

    Returns
    -------
    list of str
        The lines that differ, as a unified diff; empty if the documents follow from the runs.

    Raises
    ------
    RunError
        As `write_report`; and if a document has no part of the report, or one that the runs do not give.
    """
    return check(documents, make_sections(runs), f"figures/{runs.name}")


def fill_documents(runs: Path, documents: Sequence[Path]) -> None:
    """Write what `check_documents` would compare with, and draw the figures. Raises as that, and OSError."""
    fill(documents, make_sections(runs), f"figures/{runs.name}")


def make_sections(runs: Path, out: Path = Path("report")) -> list[Section]:
    """Make the report on the runs in the folder `runs`, as data; no figure is drawn. Raises RunError as `write_report`.

    `out` is the folder that the command in it names.
    """
    skipped: dict[str, str] = {}
    stored = read_runs(runs, skipped)
    _check_seeds(stored, runs)
    known = tuple(run for each in EXPERIMENTS for run in stored if run.experiment == each.id)
    found = settings([run for run in known if run.done is not None] or stored)
    parts = {
        experiment.id: part
        for experiment in EXPERIMENTS
        if (part := make_part(experiment, stored, judged=len(found) == 1)) is not None
    }
    ask = _asker(stored, found, run_folder(stored, runs))
    claims = judged(parts, ask)
    analyses = [parts[each.id].section for each in EXPERIMENTS if each.id in parts]
    first = [figure for figure in figures_of(analyses) if figure.name == FIRST_FIGURE]
    runs_of = {
        each.id: provenance(complete_runs(each, stored), runs) for each in EXPERIMENTS if each.id in parts
    }
    return [
        summary_section(claims, found, stored, first, skipped),
        claims_section(claims, parts),
        *(
            replace(section, blocks=(*(_placed(block) for block in section.blocks), runs_of[section.anchor]))
            for section in analyses
        ),
        figures_section(analyses),
        _meanings(),
        arithmetic_section(),
        corrections_section(),
        coverage(parts, stored, ask),
        origin_section(stored, runs, out, skipped),
    ]


def _check_seeds(stored: Sequence[StoredRun], runs: Path) -> None:
    """See that a seed of one kind is there once: two of them are of two settings, and pairs by seed would mix them."""
    kinds: dict[tuple[object, ...], list[str]] = defaultdict(list)
    for run in stored:
        kinds[run.experiment, run.condition, run.config["task"], run.seed].append(run.name)
    for names in kinds.values():
        if len(names) > 1:
            raise RunError(
                f"{runs} holds {' and '.join(names)}, one seed under {len(names)} settings, and a report would mix "
                f"them: move the runs of one setting to a folder of their own; `fastent compare {runs}` sets them side "
                "by side"
            )


FIRST_FIGURE = "e1-dynamics"
"""What the paper's Figure 1 shows: it stands at the head of the report, not in its section."""


def _placed(block: Block) -> Block:
    if not isinstance(block, Figure) or block.name != FIRST_FIGURE:
        return block
    return Text(
        ("Over training: figure ", Link(f"`{block.name}`", block.name), ", at the head of this page.")
    )


MEANINGS = (
    (
        "H",
        "entropy of the spectrum of the representation's covariance over a fixed probe of training inputs, "
        "divided by log d: 1 if the variance is spread evenly over all d directions, 0 if it lies along one",
    ),
    (
        "T_mem",
        "first evaluation at which the train accuracy reaches the setting `memorised`: 0.99, and 0.95 in the preset "
        "`nearest`: the model fits its training set",
    ),
    (
        "T_grok",
        "first evaluation at which the test accuracy reaches the criterion, 0.99; sustained: the first of "
        "three such in a row",
    ),
    ("H*", "H at T_grok. It needs test labels, and a run that is over"),
    (
        "T_cross",
        "first evaluation with H below H*, which must come from somewhere: the run itself, all seeds, or the "
        "other seeds",
    ),
    (
        "T_collapse",
        "first evaluation, from T_mem on (ours: the paper does not say from when), at which H lies more than tau = "
        "0.05 below its largest value of the last 800 steps, five evaluations (ours), or below its value 1,000 steps "
        "before (the paper's). It does not recover if the median of the run's last five H is still as far below",
    ),
    ("lead", "T_grok minus T_cross or T_collapse, in steps. Positive: the entropy came first"),
    (
        "false alarm",
        "a crossing before grokking after which grokking does not come within 1,000 steps, the paper's "
        'horizon for "imminent"',
    ),
    ("parameter norm", "the Euclidean norm of all parameters together"),
)


def _meanings() -> Section:
    table = Table("Terms of this page, in the order of their use.", ("term", "meaning"), MEANINGS)
    return Section("meanings", "Terms: what the quantities mean", (table,))


@dataclass(frozen=True)
class Judged:
    """A row of the claims: a claim by its id, where the paper says what, what runs say, the verdict and its rule."""

    id: str
    where: str
    says: str
    ours: str
    verdict: Verdict
    rule: str


def judged(parts: Mapping[str, Part], ask: Callable[[str], str]) -> list[Judged]:
    """List the claims by experiment; one that no run speaks to with the command that `ask` gives for an experiment."""
    rows: list[Judged] = []
    for experiment in EXPERIMENTS:
        found = parts[experiment.id].findings if experiment.id in parts else {}
        for name, (ours, verdict, words) in found.items():
            claim = CLAIMS[name]
            rule = NONE if verdict is Verdict.MIXED else claim.rule
            rows.append(Judged(name, claim.where, claim.says.format(**words), ours, verdict, rule))
        rows += [
            Judged(claim.id, *claim.named, f"`{ask(experiment.id)}`", Verdict.NOT_RUN, NONE)
            for claim in CLAIMS.values()
            if claim.experiment == experiment.id and claim.named is not None and claim.id not in found
        ]
    return rows


def summary_section(
    claims: Sequence[Judged],
    found: Sequence[tuple[Way, Sequence[StoredRun]]],
    stored: Sequence[StoredRun],
    figures: Sequence[Figure],
    skipped: Mapping[str, str],
) -> Section:
    """Say what to believe: the setting, five sentences, the tally, the paper's contributions, and its Figure 1."""
    blocks: list[Block] = [_setting(found)]
    if skipped:
        blocks.append(
            Text(
                ("Left out, as no run could be read: ", ", ".join(skipped), ". ", Link("Why", "origin"), "."),
                "note",
            )
        )
    if not any(run.done is not None for run in stored):
        blocks.append(Text("No experiment has a complete run yet: there is nothing to judge.", "note"))
    count = (
        f"Of {len(claims)} claims, the paper's and what follows from them: ",
        *tally(claims),
        ". ",
        Link("Each of them", "claims"),
        ".",
    )
    blocks += [Items(conclusions(claims)), Text(count), contributions_table(claims), *figures]
    return Section("summary", "Summary: what to believe", tuple(blocks))


def _setting(found: Sequence[tuple[Way, Sequence[StoredRun]]]) -> Text:
    said = [
        f"{_way(way)} ({len(made)} runs of {', '.join(dict.fromkeys(_named(run.experiment) for run in made))}, "
        f"seeds {ranges({run.seed for run in made})})"
        for way, made in found
    ]
    ((name, changes), _), *others = found
    if others:
        return Text(
            f"These runs differ in their settings, and what they say together is said of none, so no claim is judged: "
            f"{'; '.join(said)}. Put the runs of each setting into a folder of its own, and report on that.",
            "note",
        )
    ours = sum(source.startswith("ours") for source in SOURCES.values())
    told = {
        "paper": f" {ours} of the {len(SOURCES)} values of that preset are ours, as the paper gives none or we took "
        "another.",
        "nearest": " Of the 96 settings searched it is the one nearest to the paper's numbers, and misses some "
        "(docs/search.md).",
    }.get("" if changes else name, " No number that belongs to the paper's setting is judged by it.")
    return Text(f"True of one setting: {said[0]}.{told} {TERMS}", "note")


TERMS = (
    "H: the normalised spectral entropy; T_grok: the first evaluation with the test accuracy at the criterion; H*: H "
    "at T_grok."
)
"""What a reader of the first screen has to know."""


def _named(experiment: str) -> str:
    return experiment.upper() if experiment[1:].isdigit() else experiment


def _way(way: Way) -> str:
    name, changes = way
    differing = []
    for key, value in changes.items():
        own = isinstance(value, dict)
        for field, here in value.items() if own else ((key, value),):
            there = TASK_SETTINGS[name][key][field] if own else PRESETS_JSON[name].get(field, NONE)
            differing.append(f"`{field}`{f' of {key}' if own else ''} {here} (there {there})")
    return f"the preset `{name}` " + (f"but for {', '.join(differing)}" if differing else "as it is")


CONCLUSIONS = (
    ("e1.precedes_left_out", "e1.collapse", "e1.collapse_at_half"),
    ("e2.delays", "e2.kept_up"),
    ("e3.driver", "e3.delays"),
    ("e5.beats_clock", "e5.rivals", "e5.left_out_last"),
    ("e6.pattern", "e7.insufficient"),
)
"""The claims of each of the five sentences: warning, mixing, norm, forecast, other tasks and models."""


def conclusions(claims: Sequence[Judged]) -> tuple[Words, ...]:
    """Write the five sentences, each with links to the claims that it rests on."""
    rows = {row.id: row for row in claims}
    found: list[Words] = []
    for names in CONCLUSIONS:
        # The first claim names what the sentence is of; of the others only what some run speaks to is said.
        spoken = {name for name in names if name in rows and rows[name].verdict is not Verdict.NOT_RUN}
        told = [name for name in names if name == names[0] or name in spoken]
        said = "; ".join(_clause(CLAIMS[name].said, rows.get(name)) for name in told)
        experiments = dict.fromkeys(CLAIMS[name].experiment for name in names)
        links = [piece for each in experiments for piece in (" ", Link(each.upper(), f"claims-{each}"))]
        found.append((f"{said[0].upper()}{said[1:]}.", *links))
    return tuple(found)


def _clause(said: Mapping[str, str], row: Judged | None) -> str:
    """Write what is to be believed of a claim, with the first of our figures where `said` has a place for them."""
    verdict = Verdict.NOT_RUN if row is None else row.verdict
    undecided, calibrated = verdict is Verdict.UNDECIDED, verdict is Verdict.CALIBRATED
    text = (
        f"that {said['open']} is what the setting was chosen by"
        if calibrated
        else said.get(verdict.kind)
        or f"whether {said['open']} is {'' if undecided else 'open: '}{verdict.label}"
    )
    shown = verdict.kind != "none" or undecided or calibrated
    if row is None or not shown or "shows" not in said or row.ours == NONE:
        return text
    return f"{text}: {said['shows'].format(_first(row.ours))}"


def _first(ours: str) -> str:
    """Cut what runs say after the first part, "9 of 10 runs (95 % CI 55 % to 100 %)"; brackets stay whole."""
    found = re.match(r"(?:\([^()]*\)|[^;(])*", ours)
    return ours if found is None else found[0].rstrip()


def tally(rows: Sequence[Judged]) -> tuple[Piece, ...]:
    """Count the verdicts, "5 reproduced, 2 in part", in the order of `Verdict`."""
    counts = Counter(row.verdict for row in rows)
    pieces: list[Piece] = []
    for verdict in Verdict:
        if counts[verdict]:
            pieces += [f"{', ' if pieces else ''}{counts[verdict]} ", verdict]
    return tuple(pieces)


def claims_section(claims: Sequence[Judged], parts: Mapping[str, Part]) -> Section:
    """Lay out the claims, a group for each experiment with what its runs show, its section and its figures."""
    groups = []
    for experiment in EXPERIMENTS:
        part = parts.get(experiment.id)
        rows = [row for row in claims if CLAIMS[row.id].experiment == experiment.id]
        if part is None and not rows:
            continue
        blocks: list[Block] = []
        if part is not None:
            drawn = (Link(figure.name, figure.name) for figure in figures_of([part.section]))
            blocks += [
                Text(part.headline),
                Links((Link(f"section {part.section.short}", part.section.anchor), *drawn)),
            ]
        if rows:
            columns = ("Paper", "It says", "These runs", "Verdict", "Judged by")
            lines = tuple((r.where, r.says, r.ours, r.verdict, r.rule) for r in rows)
            blocks.append(Table("The paper's claims, and what these runs say of them.", columns, lines))
        title = f"{experiment.id.upper()}: {experiment.question}" if part is None else part.section.title
        summary = (f"{title}  ·  " if rows else title, *tally(rows))
        groups.append(Group(f"claims-{experiment.id}", summary, tuple(blocks)))
    return Section(
        "claims",
        "Claims: one by one",
        (
            Text(
                "How a run goes is judged for the setting of these runs alone; a number of the paper only in its own "
                'setting, else it reads "other setting". What an interval reaches across reads "undecided"; so does '
                '"in every run" of so few that half of all seeds might not. What the setting was chosen by reads '
                '"calibrated".'
            ),
            *groups,
            Text(
                "Intervals of means are Student's over seeds, those of shares exact (Clopper-Pearson), p-values exact "
                "up to ten runs against ten.",
                "note",
            ),
        ),
    )


def contributions_table(rows: Sequence[Judged]) -> Table:
    """Lay out the paper's contributions, each with the verdict that those of its claims come to."""
    by_id = {row.id: row for row in rows}
    lines: list[tuple[Words, ...]] = []
    for number, says, names in CONTRIBUTIONS:
        resting = [by_id[name] for name in names if name in by_id]
        found: list[Piece] = []
        for row in resting:
            found += ["; " if found else "", f"{row.says}: ", row.verdict]
        verdict = together([row.verdict for row in resting])
        lines.append((number, says, verdict, tuple(found) or NONE))
    return Table(
        "The paper's contributions. Reproduced if every claim it rests on is, not reproduced if none is even in part, "
        "undecided if none is and some may be.",
        ("", "The paper's contribution", "Verdict", "It rests on"),
        tuple(lines),
    )


def together(verdicts: Sequence[Verdict]) -> Verdict:
    """Sum up verdicts; those with nothing to judge take no part."""
    judged = {verdict for verdict in verdicts if verdict.kind != "none" or verdict is Verdict.UNDECIDED}
    if not judged:
        silent = (Verdict.MIXED, Verdict.CALIBRATED)
        return next((verdict for verdict in silent if verdict in verdicts), Verdict.NOT_RUN)
    if judged == {Verdict.REPRODUCED} and Verdict.CALIBRATED in verdicts:
        return Verdict.IN_PART
    if len(judged) == 1:
        return judged.pop()
    # What is undecided may be so: it does not make "not reproduced" of the rest "in part".
    return Verdict.UNDECIDED if judged == {Verdict.NOT_REPRODUCED, Verdict.UNDECIDED} else Verdict.IN_PART


def coverage(parts: Mapping[str, Part], stored: Sequence[StoredRun], ask: Callable[[str], str]) -> Section:
    """Say which experiments are here, from how many runs, and with which command of `ask` to get the others."""
    rows = []
    for experiment in EXPERIMENTS:
        mine = [run for run in stored if run.experiment == experiment.id]
        complete = sum(run.done is not None for run in mine)
        reads = ", ".join(name.upper() for name in experiment.reads if name != experiment.id)
        if experiment.id not in parts:
            state = "no complete run" if mine else "not run"
            if complete:
                state = "not reported: what it is compared with is missing, or differs in its settings"
        elif complete < len(mine):
            state = "reported from its complete runs"
        else:
            state = "reported" if mine else f"reported from the runs of {reads}"
        how = "" if experiment.id in parts else f"`{ask(experiment.id)}`"
        rows.append((experiment.id.upper(), experiment.question, f"{complete} of {len(mine)}", state, how))
    unknown = sorted({run.experiment for run in stored} - {experiment.id for experiment in EXPERIMENTS})
    rows += [(name, "unknown to this version", NONE, "not reported", "") for name in unknown]
    table = Table(
        "The paper's experiments, and what of them is here.",
        ("experiment", "question", "runs complete", "state", "command that adds it"),
        tuple(rows),
        (2,),
    )
    return Section("coverage", "Coverage: what was run, and what was not", (table,))


@dataclass(frozen=True)
class Part:
    """What one experiment gives to the report: a few sentences, its claims and its section."""

    headline: str
    findings: Findings
    section: Section


EXPERIMENTS: tuple[Experiment[Any], ...] = (
    e1_lead.EXPERIMENT,
    e2_mixing.EXPERIMENT,
    e3_norm.EXPERIMENT,
    e4_predictors.EXPERIMENT,
    e5_forecast.EXPERIMENT,
    e6_tasks.EXPERIMENT,
    e7_mlp.EXPERIMENT,
    e8_probes.EXPERIMENT,
    e1_lead.CHOICES_EXPERIMENT,
)


def complete_runs(experiment: Experiment[Any], stored: Sequence[StoredRun]) -> tuple[StoredRun, ...]:
    """Pick the runs that an experiment reads and that are complete."""
    return tuple(run for run in stored if run.experiment in experiment.reads and run.done is not None)


def make_part(
    experiment: Experiment[Any], stored: Sequence[StoredRun], *, judged: bool = True
) -> Part | None:
    """Make an experiment's part from those of `stored` that it reads and that are complete; None if it cannot be.

    `judged`: whether all runs of the report are of one setting, so that claims may be judged by them.
    """
    runs = Runs(complete_runs(experiment, stored))
    result = experiment.analyse(runs)
    if result is None or (experiment.of_verdicts and not judged):
        return None
    findings = marked(experiment.claims(result), runs)
    if not judged:
        findings = {name: found._replace(verdict=Verdict.MIXED) for name, found in findings.items()}
    return Part(experiment.headline(result), findings, experiment.section(result))


OURS = "ours: its description is lost"
AFTER = "after its description"


@dataclass(frozen=True)
class Counterpart:
    """A figure or table of the paper, what it shows, and what of the report stands in its place.

    `ours` names a figure of the report, or a section by its anchor where `ours` has a table there.
    """

    paper: str
    shows: str
    ours: str
    basis: str


COUNTERPARTS = (
    Counterpart("Figure 1", "accuracy, H and norm over training, 10 seeds", "e1-dynamics", AFTER),
    Counterpart("Figure 2", "H around grokking, runs shifted to their T_grok", "e1-around", OURS),
    Counterpart("Figure 3", "T_grok and H under mixing", "e2-trajectories", AFTER),
    Counterpart("Figure 3", "T_grok and H with the norm held", "e3-trajectories", AFTER),
    Counterpart("Figure 4(a)", "norm against entropy", "e4-norm-entropy", AFTER),
    Counterpart("Figure 4(b)", "remaining steps against H − H*, with the law", "e5-law", AFTER),
    Counterpart("Figure 5", "H of the tasks", "e6-tasks", AFTER),
    Counterpart("Figure 6", "what of S5 its representations hold", "e6-isotypic", OURS),
    Counterpart("Figure 7", "every threshold: runs preceded, lead, false alarms", "e1-sweep", OURS),
    Counterpart("Figure 8", "lead of each run by each rule", "e1-leads", OURS),
    Counterpart("Figure 9", "Transformer and MLPs: accuracy, H, Fourier alignment", "e7-models", AFTER),
    Counterpart("Figure 10", "probes from the training and the test set", "e8-probes", AFTER),
    Counterpart(
        "v2, phase portrait", "H and Fourier alignment of the leading eigenvectors", "e4-portrait", AFTER
    ),
    Counterpart("Table 1", "T_grok under each condition", "e2", AFTER),
    Counterpart("Table 1", "the norm-matched control", "e3", AFTER),
    Counterpart("Table 2", "R² of each predictor", "e4", AFTER),
    Counterpart("Table 3", "T_grok and H* of each task", "e6", AFTER),
    Counterpart("Table 5", "its diagnosis, as a confusion matrix", "e5", AFTER),
)


def figures_section(sections: Sequence[Section]) -> Section:
    """Say where the figures and tables of the paper are in a report of these sections, or that they are not run."""
    places: dict[str, Words] = {
        figure.name: ("figure ", Link(f"`{figure.name}`", figure.name)) for figure in figures_of(sections)
    }
    places |= {section.anchor: ("table in ", Link(section.title, section.anchor)) for section in sections}
    rows: list[tuple[Words, ...]] = []
    for each in COUNTERPARTS:
        place = places.get(each.ours, "not run")
        rows.append((each.paper, each.shows, place, each.basis if place != "not run" else "–"))
    return Section(
        "figures",
        "Figures: the paper's, its tables, and ours",
        (
            Text(
                "All are made from these runs. Table 6 of the paper is its mathematics: `fastent check maths`. "
                "Its text does not mention a Table 4."
            ),
            Table(
                "Where this page has the paper's figures and tables.",
                ("Paper", "It shows", "Here", "Made"),
                tuple(rows),
            ),
        ),
    )


def origin_section(stored: Sequence[StoredRun], runs: Path, out: Path, skipped: Mapping[str, str]) -> Section:
    """Tell where the runs in the folder `runs` came from, and from what lies there no run could be read."""
    last = [shlex.join(["fastent", "report", str(runs), "--out", str(out)])]
    if any(not run.path.is_dir() for run in stored):
        source = str(run_folder(stored, runs))
        last.insert(0, shlex.join(["python", "-m", "fastent.grokking.experiments.data", source, str(runs)]))
    guests = dict.fromkeys(in_words(each) for run in stored for each in run.record.get("guests", []))
    blocks: list[Block] = [
        Text(
            "The commands that made the runs and this page. The first goes on with runs that are not complete."
        ),
        Code("\n".join([*commands(stored, run_folder(stored, runs)), *last])),
        *([Text(f"Not of this package: {'; '.join(guests)}.")] if guests else []),
        _runs_table(stored),
        _settings_table(stored),
        _environment_table(stored),
    ]
    if skipped:
        blocks.append(
            Table("Left out: no run could be read from these.", ("name", "why"), tuple(skipped.items()))
        )
    return Section("origin", "Origin: where the runs came from", tuple(blocks))


def provenance(stored: Sequence[StoredRun], runs: Path) -> Text:
    """Name the complete runs that one experiment's section rests on, and the commands that make them."""
    groups: dict[str, set[int]] = {}
    for run in stored:
        groups.setdefault(run.name.rpartition("-seed")[0], set()).add(run.seed)
    named = ", ".join(f"`{name}-seed{{{ranges(seeds)}}}`" for name, seeds in groups.items())
    made = ", ".join(f"`{each}`" for each in commands(stored, run_folder(stored, runs)))
    return Text(f"Runs of this section: {named}. Made by {made}.", "note")


def run_folder(stored: Sequence[StoredRun], runs: Path) -> Path:
    """Name the folder to train in: `runs`, but a folder of its own where those in it are packed."""
    packed = any(not run.path.is_dir() for run in stored)
    return Path("runs") / runs.name if packed else runs


Way = tuple[str, dict[str, Any]]
"""A setting: a preset and the values that differ from it, given to whatever an experiment asks for.

Under the name of a task stand those that differ from what the task needs by itself (`TASK_SETTINGS`), as a dictionary.
"""


def settings(stored: Sequence[StoredRun]) -> list[tuple[Way, list[StoredRun]]]:
    """Find the settings behind runs, as few as there can be, each with its runs, most runs first.

    Whatever the experiments vary is part of no setting, nor are measures, which change nothing of the training. A run
    of a kind that no experiment asks for varies nothing but its task.
    """
    kinds: dict[str, list[StoredRun]] = defaultdict(list)
    for run in stored:
        kinds[json.dumps((run.experiment, run.condition, run.config), sort_keys=True)].append(run)
    read = [
        way
        for run, *_ in kinds.values()
        for way in (*((name, _changes(run, name)) for name in PRESETS_JSON), run.preset)
    ]
    # What is a task's own is read off its runs, and what is shared off those of others.
    own: list[dict[str, Any]] = [{}]
    for run, *_ in kinds.values():
        for needs in TASK_SETTINGS.values():
            if fields := needs.get(task := run.config["task"]):
                each = {task: {key: run.config[key] for key in fields}}
                own += [] if each in own else [each]
    ways = {
        json.dumps(way, sort_keys=True): way
        for name, changes in read
        for each in own
        for way in [(name, {**changes, **each})]
    }
    found, left = [], list(kinds.values())
    while left:
        behind = [
            (way, made)
            for way in ways.values()
            if (made := [runs for runs in left if _made_by(runs[0], *way)])
        ] or [(left[0][0].preset, left[:1])]
        # A preset as it is says more than another one with changes, and `paper` with changes more than its variants.
        way, made = min(
            behind,
            key=lambda each: (-sum(map(len, each[1])), each[0][1] != {}, "-" in each[0][0], len(each[0][1])),
        )
        found.append((way, [run for runs in made for run in runs]))
        left = [runs for runs in left if runs not in made]
    return found


def of_one_setting(stored: Sequence[StoredRun]) -> bool:
    """Whether one preset with one set of changes is behind all of `stored`, whatever their experiments vary."""
    return len(settings(stored)) <= 1


def commands(stored: Sequence[StoredRun], runs: Path) -> list[str]:
    """Write the commands that make `stored`, one for each experiment and setting behind the runs."""
    found = settings(stored)
    return [
        command(experiment, name, [*_options(changes), *kind], seeds={run.seed for run in asked}, runs=runs)
        + "".join(
            f"  # {task} had {', '.join(f'{key} {value}' for key, value in own.items())}"
            for task, own in changes.items()
            if isinstance(own, dict) and any(run.config["task"] == task for run in asked)
        )
        for experiment in dict.fromkeys(run.experiment for run in stored)
        for (name, changes), made in found
        for kind, asked in _kinds([run for run in made if run.experiment == experiment]).items()
    ]


def _kinds(stored: Sequence[StoredRun]) -> dict[tuple[str, ...], list[StoredRun]]:
    """Group runs of one experiment by the options that choose them, beside its settings: one's own have some."""
    kinds: dict[tuple[str, ...], list[StoredRun]] = defaultdict(list)
    for run in stored:
        options: tuple[str, ...] = ()
        if run.experiment == OWN:
            measures = run.config["measures"]
            options = ("--task", run.config["task"], "--condition", run.condition)
            options += ("--measures", *measures) if measures else ()
        kinds[options].append(run)
    return kinds


def _asker(
    stored: Sequence[StoredRun], found: Sequence[tuple[Way, Sequence[StoredRun]]], runs: Path
) -> Callable[[str], str]:
    """Return what writes the command that adds an experiment to runs: their first setting, and their seeds."""
    name, changes = found[0][0]
    seeds = {run.seed for run in stored}
    return lambda experiment: command(experiment, name, _options(changes), seeds=seeds, runs=runs)


def _made_by(run: StoredRun, preset: str, changes: dict[str, Any]) -> bool:
    if _asked(run, preset, changes) is not None:
        return _explains(run, preset, changes)
    return run.changes_from(preset) == changes


def command(
    experiment: str, preset: str, options: Sequence[str] = (), *, seeds: Iterable[int], runs: Path
) -> str:
    """Write the command that makes an experiment's runs."""
    place = ["--seeds", ranges(set(seeds)), "--out", str(runs)]
    return shlex.join(["fastent", "run", experiment, "--preset", preset, *options, *place])


def _changes(run: StoredRun, preset: str) -> dict[str, Any]:
    """Find the fewest settings that, changed in a preset, make the run's experiment ask for it as it is."""
    asked = _asked(run, preset, {})
    if asked is None:
        return {}
    changes = {key: run.config[key] for key, value in asked.items() if run.config.get(key, value) != value}
    task = run.config["task"]
    if own := {key: changes.pop(key) for key in TASK_SETTINGS[preset].get(task, {}) if key in changes}:
        changes[task] = own
    for key in list(changes):
        # One setting may follow from another: a run to the end goes on for as long as the limit of steps.
        fewer = {name: value for name, value in changes.items() if name != key}
        if _explains(run, preset, fewer):
            changes = fewer
    return changes


def _explains(run: StoredRun, preset: str, changes: dict[str, Any]) -> bool:
    """Whether the run's experiment asks for it as it is, given a preset with `changes`; measures aside."""
    asked = _asked(run, preset, changes)
    # A setting that is younger than the run is not in its record.
    return asked is not None and {**asked, "measures": None} == {**asked, **run.config, "measures": None}


def _asked(run: StoredRun, preset: str, changes: dict[str, Any]) -> dict[str, Any] | None:
    """Return the settings that the run's experiment gives to a run of its kind; None if it asks for none."""
    shared = {key: value for key, value in changes.items() if not isinstance(value, dict)}
    kinds, task = _settings(run.experiment, preset, json.dumps(shared, sort_keys=True)), run.config["task"]
    asked = kinds.get((run.condition, task))
    return None if asked is None else {**asked, **changes.get(task, {})}


@functools.lru_cache(maxsize=1024)
def _settings(experiment: str, preset: str, changes: str) -> dict[tuple[str, str], dict[str, Any]]:
    """Return what an experiment asks for, by condition and task, given a preset with changes (JSON)."""
    try:
        config = TrainConfig(**_frozen({**PRESETS_JSON[preset], **json.loads(changes)}))
        jobs = planned(experiment, config, preset, (0,)) if experiment in JOBS else []
    except ValueError:  # changes that do not fit each other
        return {}
    return {(job.condition, job.config.task): job.settings() for job in jobs if job.experiment == experiment}


def _options(changes: dict[str, Any]) -> list[str]:
    words = []
    for key, value in changes.items():
        if isinstance(value, dict):
            continue  # no option gives a task of an experiment another value than its own
        words.append(f"--{'no-' if value is False else ''}{key.replace('_', '-')}")
        if not isinstance(value, bool):
            words += map(str, value if isinstance(value, list) else [value])
    return words


def _frozen(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}


def ranges(numbers: set[int]) -> str:
    """Write numbers as the command line reads them: "0-2,5"."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and parts[-1][-1] == number - 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ",".join("-".join(str(end) for end in part) for part in parts)


def _runs_table(stored: Sequence[StoredRun]) -> Table:
    rows = []
    for run in stored:
        name, changes = run.preset
        setting = name + "".join(f", {key} = {value}" for key, value in changes.items())
        again = f"; lies there again: {', '.join(run.copies)}" if run.copies else ""
        rows.append((f"`{run.name}`", setting, str(len(run.rows)), run.state + again))
    return Table("Run folders.", ("folder", "setting", "evaluations", "state"), tuple(rows), (2,))


def _settings_table(stored: Sequence[StoredRun]) -> Table:
    rows = []
    for key, here in _values([run.config for run in stored]):
        there = str(PAPER.get(key, NONE))
        rows.append((f"`{key}`", here, "the same" if here == there else there, SOURCES.get(key, NONE)))
    columns = ("setting", "these runs", "preset `paper`", "where the preset's value comes from")
    return Table("Every setting of the runs, and the source of the paper's.", columns, tuple(rows))


def _values(records: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """List the values that records hold under each key, by the key."""
    keys = sorted({key for record in records for key in record})
    return [(key, "; ".join(dict.fromkeys(str(record.get(key, NONE)) for record in records))) for key in keys]


def _environment_table(stored: Sequence[StoredRun]) -> Table:
    rows = _values([run.environment for run in stored]) or [("not recorded", NONE)]
    return Table("Machine and software at the runs' first start.", ("what", "value"), tuple(rows))


def print_summary(out: Path, names: set[str]) -> None:
    """Print the times, entropies and leads of each run, leads from the H* of the other seeds of its job.

    Parameters
    ----------
    out : Path
        Folder of runs.
    names : set of str
        Of the runs to print; those without a record are left out.
    """
    from rich import box, table, text

    from fastent.grokking.experiments.watch import plain_console

    groups: dict[str, list[StoredRun]] = {}
    for name in names:
        # A run that could not begin, or whose files are damaged, was told of when it was to be trained.
        with contextlib.suppress(RunError):
            if (stored := read_run(out / name)).rows:
                groups.setdefault(name.rpartition("-seed")[0], []).append(stored)
    kinds = {name: (run.experiment, run.condition, run.config["task"]) for name, (run, *_) in groups.items()}
    console = plain_console()
    for name, runs in sorted(groups.items(), key=lambda group: (kinds[group[0]], group[0])):
        runs.sort(key=lambda run: run.seed)
        several = list(kinds.values()).count(kinds[name]) > 1  # settings, which the name carries
        printed = table.Table(
            "seed",
            title=name if several else " ".join(kinds[name]),
            caption="T_cross: first H under the mean H at T_grok of the other seeds",
            box=box.SIMPLE,
            padding=(0, 1, 0, 0),
            pad_edge=False,
        )
        for column in ("T_mem", "T_grok", "H at T_grok", "T_cross", "lead", "test", "steps"):
            printed.add_column(column, justify="right")
        printed.add_column("ended")
        measured = Runs(tuple(runs))
        leads = left_out_threshold(measured)
        accuracy = measured.at(measured.test_accuracy, measured.end)
        for i, run in enumerate(runs):
            times = (measured.t_mem[i], measured.t_grok[i], leads.times[i], leads.leads[i])
            t_mem, t_grok, t_cross, ahead = map(steps, times)
            numbers = (t_mem, t_grok, decimal(measured.h_star[i]), t_cross, ahead)
            ended = run.state if run.done is None else run.done["reason"]
            last = (decimal(accuracy[i]), steps(measured.end[i]), text.Text(printable(ended)))
            printed.add_row(str(run.seed), *numbers, *last)
        console.print(printed)
