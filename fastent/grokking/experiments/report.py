"""The report: one page of HTML and the same as Markdown, from a folder of runs alone.

`write_report` reads the runs, lets each experiment make its part (a headline, claims for the summary, and a section)
from the complete runs that it reads, and adds what belongs to all: the summary, the paper's figures and tables and
where they are here, what the quantities mean, what is not so in the paper, what was not run, and where the runs came
from. Nothing is trained, nothing is filled in: an experiment without complete runs is listed as not run, with the
command that runs it; one whose runs were made with different settings judges nothing. The same folder gives the same
bytes: no date of writing, no order of chance.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
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
    figures,
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
from fastent.grokking.experiments.data import PAPER, PRESETS_JSON, Runs, StoredRun, read_runs
from fastent.grokking.experiments.document import (
    Block,
    Code,
    Section,
    Table,
    Text,
    Verdict,
    as_html,
    as_markdown,
    check,
    figures_of,
    fill,
)
from fastent.grokking.experiments.jobs import JOBS
from fastent.grokking.experiments.leads import left_out_threshold
from fastent.grokking.train.config import SOURCES, TrainConfig
from fastent.grokking.train.storage import write_atomically

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
        If `runs` is not a folder, holds no run, or holds one that cannot be read.
    OSError
        If `out` cannot be written.
    """
    sections = _sections(read_runs(runs), runs, out)
    subtitle = (
        "Runs of small Transformers that grok, under a live monitor of the spectral entropy of their "
        "representation, set beside what arXiv 2604.13123 says of it."
    )
    (out / "figures").mkdir(parents=True, exist_ok=True)
    for figure in figures_of(sections):
        write_atomically(out / "figures" / f"{figure.name}.svg", figure.light.encode())
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
        Markdown files with parts of the report; see `fastent.grokking.experiments.document`.

    Returns
    -------
    list of str
        The lines that differ, as a unified diff; empty if the documents follow from the runs.

    Raises
    ------
    RunError
        As `write_report`; and if a document has no part of the report, or one that the runs do not give.
    """
    return check(documents, _words_alone(runs))


def fill_documents(runs: Path, documents: Sequence[Path]) -> None:
    """Write what `check_documents` would compare with. Raises as that, and OSError."""
    fill(documents, _words_alone(runs))


def _words_alone(runs: Path) -> list[Section]:
    with figures.left_out():
        return _sections(read_runs(runs), runs, Path("report"))


def _sections(stored: Sequence[StoredRun], runs: Path, out: Path) -> list[Section]:
    made = {experiment.id: make_part(experiment, stored) for experiment in EXPERIMENTS}
    parts = {name: part for name, part in made.items() if part is not None}
    analyses = [
        _with_provenance(parts[experiment.id].section, experiment, stored, runs)
        for experiment in EXPERIMENTS
        if experiment.id in parts
    ]
    return [
        summary_section(parts, stored, runs),
        figures_section(analyses),
        *analyses,
        _meanings(),
        arithmetic_section(),
        corrections_section(),
        coverage(parts, stored, runs),
        origin_section(stored, runs, out),
    ]


def _with_provenance(
    section: Section, experiment: Experiment[Any], stored: Sequence[StoredRun], runs: Path
) -> Section:
    text = provenance(complete_runs(experiment, stored), runs)
    return dataclasses.replace(section, blocks=(*section.blocks, text))


MEANINGS = (
    (
        "H",
        "entropy of the spectrum of the representation's covariance over a fixed probe of training inputs, "
        "divided by log d: 1 if the variance is spread evenly over all d directions, 0 if it lies along one",
    ),
    ("T_mem", "first evaluation at which the train accuracy reaches 0.99: the model fits its training set"),
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
        "first evaluation, from T_mem on, at which H lies more than tau = 0.05 below its largest value of the last "
        "800 steps, five evaluations (ours), or below its value 1,000 steps before (the paper's). It does not recover "
        "if the median of the run's last five H is still as far below",
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
    return Section("meanings", "What the quantities mean", (table,))


@dataclass(frozen=True)
class Judged:
    """A row of the summary: a claim by its id, where the paper says what, what runs say, the verdict and its rule."""

    id: str
    where: str
    says: str
    ours: str
    verdict: Verdict
    rule: str


SEEDS = range(10)
"""The paper's seeds of its main experiments."""


def summary_section(parts: Mapping[str, Part], stored: Sequence[StoredRun], runs: Path) -> Section:
    """Write the summary of the parts, by experiment, from the runs in the folder `runs`."""
    claims = judged(parts, run_folder(stored, runs))
    complete = sum(run.done is not None for run in stored)
    blocks: list[Block] = [Text(part.headline) for part in parts.values()]
    if not parts:
        blocks.append(Text("No experiment has a complete run yet: there is nothing to judge.", "note"))
    blocks += [
        contributions_table(claims),
        claims_table(
            f"Claims of the paper and what {complete} complete runs say of them. How a run goes is judged for the "
            "setting of these runs alone; a number of the paper only in its own setting, else it reads "
            '"other setting".',
            claims,
        ),
        Text(
            "Intervals over fewer than about ten runs are narrower than they should be: a bootstrap cannot see "
            "values that no seed has shown. A share, such as 3 of 3 runs, has an exact interval.",
            "note",
        ),
    ]
    return Section("summary", "Summary", tuple(blocks))


def judged(parts: Mapping[str, Part], runs: Path) -> list[Judged]:
    """List the claims by experiment; one that no run speaks to with the command that runs it in the folder `runs`."""
    rows: list[Judged] = []
    for experiment in EXPERIMENTS:
        found = parts[experiment.id].findings if experiment.id in parts else {}
        for name, (ours, verdict, words) in found.items():
            claim = CLAIMS[name]
            rule = NONE if verdict is Verdict.MIXED else claim.rule
            rows.append(Judged(name, claim.where, claim.says.format(**words), ours, verdict, rule))
        asked = f"`{command(experiment.id, 'paper', seeds=SEEDS, runs=runs)}`"
        rows += [
            Judged(claim.id, *claim.named, asked, Verdict.NOT_RUN, NONE)
            for claim in CLAIMS.values()
            if claim.experiment == experiment.id and claim.named is not None and claim.id not in found
        ]
    return rows


def claims_table(caption: str, rows: Sequence[Judged]) -> Table:
    """Lay out judged claims as the summary table."""
    columns = ("Paper", "It says", "These runs", "Verdict", "Judged by")
    return Table(caption, columns, tuple((r.where, r.says, r.ours, r.verdict, r.rule) for r in rows))


def contributions_table(rows: Sequence[Judged]) -> Table:
    """Lay out the paper's contributions, each with the verdict that those of its claims come to."""
    by_id = {row.id: row for row in rows}
    lines = []
    for number, says, names in CONTRIBUTIONS:
        resting = [by_id[name] for name in names if name in by_id]
        found = "; ".join(f"{row.says}: {row.verdict.label}" for row in resting) or NONE
        lines.append((number, says, found, together([row.verdict for row in resting])))
    return Table(
        "The paper's contributions. Reproduced if every claim it rests on is, not reproduced if none is even in part.",
        ("", "The paper's contribution", "It rests on", "Verdict"),
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


def coverage(parts: Mapping[str, Part], stored: Sequence[StoredRun], runs: Path) -> Section:
    """Say which experiments are here, from how many runs, and how to get the others."""
    rows, folder = [], run_folder(stored, runs)
    for experiment in EXPERIMENTS:
        mine = [run for run in stored if run.experiment == experiment.id]
        complete = sum(run.done is not None for run in mine)
        reads = ", ".join(name.upper() for name in experiment.reads if name != experiment.id)
        if experiment.id not in parts:
            state = "no complete run" if mine else "not run"
            if complete and not of_one_setting(complete_runs(experiment, stored)):
                state = "not reported: its runs, or those it is compared with, differ in their settings"
        elif complete < len(mine):
            state = "reported from its complete runs"
        else:
            state = "reported" if mine else f"reported from the runs of {reads}"
        how = (
            "" if experiment.id in parts else f"`{command(experiment.id, 'paper', seeds=SEEDS, runs=folder)}`"
        )
        rows.append((experiment.id.upper(), experiment.question, f"{complete} of {len(mine)}", state, how))
    unknown = sorted({run.experiment for run in stored} - {experiment.id for experiment in EXPERIMENTS})
    rows += [(name, "unknown to this version", NONE, "not reported", "") for name in unknown]
    table = Table(
        "The paper's experiments, and what of them is here.",
        ("experiment", "question", "runs complete", "state", "command that adds it"),
        tuple(rows),
        (2,),
    )
    return Section("coverage", "What was run, and what was not", (table,))


@dataclass(frozen=True)
class Part:
    """What one experiment gives to the report: a few sentences, its claims and its section."""

    headline: str
    findings: Findings
    section: Section

    def unjudged(self) -> Part:
        """Return it as it is said of runs that differ in their settings: no claim is judged, and a note says why."""
        note = (
            "These runs differ in their settings (see the last section): what is said of all mixes them, and no "
            "claim is judged by it."
        )
        return Part(
            f"{self.headline} {note}",
            {name: found._replace(verdict=Verdict.MIXED) for name, found in self.findings.items()},
            replace(self.section, blocks=(Text(note, "note"), *self.section.blocks)),
        )


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


def make_part(experiment: Experiment[Any], stored: Sequence[StoredRun]) -> Part | None:
    """Make an experiment's part from those of `stored` that it reads and that are complete; None if it cannot be."""
    runs = complete_runs(experiment, stored)
    result = experiment.analyse(Runs(runs))
    if result is None:
        return None
    findings = marked(experiment.claims(result), Runs(runs))
    part = Part(experiment.headline(result), findings, experiment.section(result))
    if of_one_setting(runs):
        return part
    return None if experiment.of_verdicts else part.unjudged()


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
    Counterpart("Table 1", "T_grok under each condition", "e2", AFTER),
    Counterpart("Table 1", "the norm-matched control", "e3", AFTER),
    Counterpart("Table 2", "R² of each predictor", "e4", AFTER),
    Counterpart("Table 3", "T_grok and H* of each task", "e6", AFTER),
    Counterpart("Table 5", "its diagnosis, as a confusion matrix", "e5", AFTER),
)


def figures_section(sections: Sequence[Section]) -> Section:
    """Say where the figures and tables of the paper are in a report of these sections, or that they are not run."""
    places = {figure.name: f"figure `{figure.name}`" for figure in figures_of(sections)}
    places |= {section.anchor: f'table in "{section.title}"' for section in sections}
    rows = []
    for each in COUNTERPARTS:
        place = places.get(each.ours, "not run")
        rows.append((each.paper, each.shows, place, each.basis if place != "not run" else "–"))
    return Section(
        "figures",
        "The paper's figures and tables, and ours",
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


def origin_section(stored: Sequence[StoredRun], runs: Path, out: Path) -> Section:
    """Tell where the runs in the folder `runs` came from."""
    last = [shlex.join(["fastent", "report", str(runs), "--out", str(out)])]
    if any(not run.path.is_dir() for run in stored):
        source = str(run_folder(stored, runs))
        last.insert(0, shlex.join(["python", "-m", "fastent.grokking.experiments.data", source, str(runs)]))
    blocks: list[Block] = [
        Text(
            "The commands that made the runs and this page. The first goes on with runs that are not complete."
        ),
        Code("\n".join([*commands(stored, run_folder(stored, runs)), *last])),
        _runs_table(stored),
        _settings_table(stored),
        _environment_table(stored),
    ]
    return Section("origin", "Where the runs came from", tuple(blocks))


def provenance(stored: Sequence[StoredRun], runs: Path) -> Text:
    """Name the complete runs that one experiment's section rests on, and the commands that make them."""
    groups: dict[str, set[int]] = {}
    for run in stored:
        name = f"{run.experiment}-{run.condition}-{run.config['task']}"
        groups.setdefault(name, set()).add(run.seed)
    named = ", ".join(f"`{name}-seed{{{ranges(seeds)}}}`" for name, seeds in groups.items())
    made = ", ".join(f"`{each}`" for each in commands(stored, run_folder(stored, runs)))
    return Text(f"Runs of this section: {named}. Made by {made}.", "note")


def run_folder(stored: Sequence[StoredRun], runs: Path) -> Path:
    """Name the folder to train in: `runs`, but a folder of its own where those in it are packed."""
    packed = any(not run.path.is_dir() for run in stored)
    return Path("runs") / runs.name if packed else runs


def commands(stored: Sequence[StoredRun], runs: Path) -> list[str]:
    """Write the commands that make `stored`: as few as there are presets and changed settings behind the runs."""
    found = []
    # What explains one experiment's runs may not be read off them: some multiply a setting that was given.
    first = {(run.experiment, run.condition, run.config["task"]): run for run in reversed(stored)}
    ways = [(name, _changes(run, name)) for run in first.values() for name in PRESETS_JSON]
    for experiment in dict.fromkeys(run.experiment for run in stored):
        left = [run for run in stored if run.experiment == experiment]
        while left:
            own = [(name, _changes(left[0], name)) for name in PRESETS_JSON]
            name, changes = min(
                (way for way in [*ways, *own] if _explains(left[0], *way)),
                key=lambda way: (-sum(_explains(run, *way) for run in left), len(way[1])),
                default=(left[0].preset[0], {}),
            )
            made = [run for run in left if run is left[0] or _explains(run, name, changes)]
            seeds = {run.seed for run in made}
            found.append(command(experiment, name, _options(changes), seeds=seeds, runs=runs))
            left = [run for run in left if run not in made]
    return found


def of_one_setting(stored: Sequence[StoredRun]) -> bool:
    """Whether one preset with one set of changes is behind all of `stored`, whatever their experiments vary.

    Measures change nothing of the training and are left aside. A run of a kind that no experiment asks for varies
    nothing but its task.
    """
    groups = {(run.experiment, run.condition, json.dumps(run.config, sort_keys=True)): run for run in stored}
    first = list(groups.values())
    ways = [(name, _changes(run, name)) for run in first for name in PRESETS_JSON]
    ways += [run.preset for run in first]
    return not first or any(all(_made_by(run, *way) for run in first) for way in ways)


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
    kinds = _settings(run.experiment, preset, json.dumps(changes, sort_keys=True))
    return kinds.get((run.condition, run.config["task"]))


@functools.lru_cache(maxsize=1024)
def _settings(experiment: str, preset: str, changes: str) -> dict[tuple[str, str], dict[str, Any]]:
    """Return what an experiment asks for, by condition and task, given a preset with changes (JSON)."""
    make = JOBS.get(experiment)
    try:
        config = TrainConfig(**_frozen({**PRESETS_JSON[preset], **json.loads(changes)}))
        jobs = [] if make is None else make(config, (0,))
    except ValueError:  # changes that do not fit each other
        return {}
    return {(job.condition, job.config.task): job.settings() for job in jobs if job.experiment == experiment}


def _options(changes: dict[str, Any]) -> list[str]:
    words = []
    for key, value in changes.items():
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
        rows.append((f"`{run.name}`", setting, str(len(run.rows)), run.state))
    return Table("Run folders.", ("folder", "setting", "evaluations", "state"), tuple(rows), (2,))


def _settings_table(stored: Sequence[StoredRun]) -> Table:
    rows = []
    for key in sorted({key for run in stored for key in run.config}):
        values = dict.fromkeys(str(run.config.get(key, "–")) for run in stored)
        here, there = "; ".join(values), str(PAPER.get(key, "–"))
        rows.append((f"`{key}`", here, "the same" if here == there else there, SOURCES.get(key, "–")))
    columns = ("setting", "these runs", "preset `paper`", "where the preset's value comes from")
    return Table("Every setting of the runs, and the source of the paper's.", columns, tuple(rows))


def _environment_table(stored: Sequence[StoredRun]) -> Table:
    rows = []
    for key in sorted({key for run in stored for key in run.environment}):
        values = dict.fromkeys(str(run.environment.get(key, "–")) for run in stored)
        rows.append((key, "; ".join(values)))
    if not rows:
        rows.append(("not recorded", "–"))
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
    from rich import box, table
    from rich.console import Console

    groups: dict[tuple[str, str, str], list[Any]] = {}
    for stored in read_runs(out):
        if stored.name in names and stored.rows:
            groups.setdefault((stored.experiment, stored.condition, stored.config["task"]), []).append(stored)
    console = Console()
    for key, runs in groups.items():
        printed = table.Table(
            "seed",
            title=" ".join(key),
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
            printed.add_row(str(run.seed), *numbers, decimal(accuracy[i]), steps(measured.end[i]), ended)
        console.print(printed)
