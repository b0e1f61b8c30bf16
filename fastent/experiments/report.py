"""The report: one page of HTML and the same as Markdown, from a folder of runs alone.

`write_report` reads the run folders, lets each experiment's module make its part (claims for the summary, and
a section), and adds what belongs to all: the summary, what the quantities mean, what is not so in the paper,
what was not run, and where the runs came from. Nothing is trained, nothing is filled in: an experiment
without complete runs is listed as not run. The same folder gives the same bytes: no date of writing, no order
of chance.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from fastent.experiments import corrections
from fastent.experiments.claims import claims_table
from fastent.experiments.document import (
    Block,
    Code,
    Section,
    Table,
    Text,
    as_html,
    as_markdown,
    figures_of,
)
from fastent.experiments.parts import EXPERIMENTS, Part
from fastent.experiments.stored import PAPER, StoredRun, read_runs
from fastent.train.presets import SOURCES

__all__ = ["EXPERIMENTS", "write_report"]

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
    stored = read_runs(runs)
    sections = _sections(stored, runs, out)
    subtitle = (
        "Runs of small Transformers that grok, under a live monitor of the spectral entropy of their "
        "representation, set beside what arXiv 2604.13123 says of it."
    )
    (out / "figures").mkdir(parents=True, exist_ok=True)
    for figure in figures_of(sections):
        _write(out / "figures" / f"{figure.name}.svg", figure.light)
    _write(out / "report.md", as_markdown(TITLE, subtitle, sections))
    page = out / "index.html"
    _write(page, as_html(TITLE, subtitle, sections))
    return page


def _write(path: Path, text: str) -> None:
    # A reader of the page never finds half of it: written beside, then renamed.
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text, encoding="utf-8", newline="\n")
    os.replace(beside, path)


def _sections(stored: Sequence[StoredRun], runs: Path, out: Path) -> list[Section]:
    made = {experiment.id: experiment.make_part(stored) for experiment in EXPERIMENTS}
    parts = {name: part for name, part in made.items() if part is not None}
    return [
        _summary(parts, stored),
        *(part.section for part in parts.values()),
        _meanings(),
        corrections.section(),
        _coverage(parts, stored),
        _origin(stored, runs, out),
    ]


def _summary(parts: dict[str, Part], stored: Sequence[StoredRun]) -> Section:
    claims = [claim for part in parts.values() for claim in part.claims]
    complete = sum(run.done is not None for run in stored)
    blocks: list[Block] = [Text(part.headline) for part in parts.values()]
    if claims:
        caption = (
            f"Claims of the paper and what {complete} complete runs say of them. How a run goes is judged "
            "for the setting of these runs alone; a number of the paper only in its own setting, else it "
            'reads "other setting".'
        )
        blocks.append(claims_table(caption, claims))
        blocks.append(
            Text(
                "Intervals over fewer than about ten runs are narrower than they should be: a bootstrap "
                "cannot see values that no seed has shown. A share, such as 3 of 3 runs, has an exact "
                "interval.",
                "note",
            )
        )
    else:
        blocks.append(Text("No experiment has a complete run yet: there is nothing to judge.", "note"))
    return Section("summary", "Summary", tuple(blocks))


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
        "first evaluation at which H lies more than tau = 0.05 below its largest value among the last five "
        "evaluations. The paper's text lost its tau; 0.05 is ours",
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


def _coverage(parts: dict[str, Part], stored: Sequence[StoredRun]) -> Section:
    rows = []
    for experiment in EXPERIMENTS:
        mine = [run for run in stored if run.experiment == experiment.id]
        complete = sum(run.done is not None for run in mine)
        if experiment.id in parts:
            state = "reported" if complete == len(mine) else "reported from its complete runs"
        elif experiment.part is None:
            state = "not run: this version has no analysis of it"
        else:
            state = "not run" if not mine else "no complete run"
        rows.append((experiment.id.upper(), experiment.question, f"{complete} of {len(mine)}", state))
    unknown = sorted({run.experiment for run in stored} - {experiment.id for experiment in EXPERIMENTS})
    rows += [(name, "unknown to this version", "–", "not reported") for name in unknown]
    table = Table(
        "The paper's experiments, and what of them is here.",
        ("experiment", "question", "runs complete", "state"),
        tuple(rows),
        (2,),
    )
    return Section("coverage", "What was run, and what was not", (table,))


def _origin(stored: Sequence[StoredRun], runs: Path, out: Path) -> Section:
    blocks: list[Block] = [
        Text(
            "The commands that made the runs and this page. The first goes on with runs that are not "
            "complete."
        ),
        Code(
            "\n".join(
                [*_commands(stored, runs), shlex.join(["fastent", "report", str(runs), "--out", str(out)])]
            )
        ),
        _runs_table(stored),
        _settings_table(stored),
        _environment_table(stored),
    ]
    return Section("origin", "Where the runs came from", tuple(blocks))


def _commands(stored: Sequence[StoredRun], runs: Path) -> list[str]:
    seeds: dict[tuple[str, str], set[int]] = {}
    for run in stored:
        name, _ = run.preset
        seeds.setdefault((run.experiment, name), set()).add(run.seed)
    return [
        shlex.join(
            ["fastent", "run", experiment, "--preset", name, "--seeds", _ranges(numbers), "--out", str(runs)]
        )
        for (experiment, name), numbers in seeds.items()
    ]


def _ranges(numbers: set[int]) -> str:
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
