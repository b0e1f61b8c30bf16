"""The report: one page of HTML and the same as Markdown, from a folder of runs alone.

`write_report` reads the run folders, lets each experiment's module make its part (claims for the summary, and
a section), and adds what belongs to all: the summary, what the quantities mean, what is not so in the paper,
what was not run, and where the runs came from. Nothing is trained, nothing is filled in: an experiment
without complete runs is listed as not run. The same folder gives the same bytes: no date of writing, no order
of chance.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from fastent.experiments import committed, corrections, figure_index, figures, origin, paper, summary
from fastent.experiments.document import Section, Table, as_html, as_markdown, figures_of
from fastent.experiments.parts import EXPERIMENTS, Experiment
from fastent.experiments.stored import StoredRun, read_runs

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
        _write(out / "figures" / f"{figure.name}.svg", figure.light)
    _write(out / "report.md", as_markdown(TITLE, subtitle, sections))
    page = out / "index.html"
    _write(page, as_html(TITLE, subtitle, sections))
    return page


def check_documents(runs: Path, documents: Sequence[Path]) -> list[str]:
    """Compare the parts of the report in committed documents with what the runs in a folder give.

    Parameters
    ----------
    runs : Path
        Folder of runs, packed ones as a rule. It is only read.
    documents : sequence of Path
        Markdown files with parts of the report; see `fastent.experiments.committed`.

    Returns
    -------
    list of str
        The lines that differ, as a unified diff; empty if the documents follow from the runs.

    Raises
    ------
    RunError
        As `write_report`; and if a document has no part of the report, or one that the runs do not give.
    """
    return committed.check(documents, _words_alone(runs))


def fill_documents(runs: Path, documents: Sequence[Path]) -> None:
    """Write what `check_documents` would compare with. Raises as that, and OSError."""
    committed.fill(documents, _words_alone(runs))


def _words_alone(runs: Path) -> list[Section]:
    with figures.left_out():
        return _sections(read_runs(runs), runs, Path("report"))


def _write(path: Path, text: str) -> None:
    # A reader of the page never finds half of it: written beside, then renamed.
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text, encoding="utf-8", newline="\n")
    os.replace(beside, path)


def _sections(stored: Sequence[StoredRun], runs: Path, out: Path) -> list[Section]:
    made = {experiment.id: experiment.make_part(stored) for experiment in EXPERIMENTS}
    parts = {name: part for name, part in made.items() if part is not None}
    analyses = [
        _with_provenance(parts[experiment.id].section, experiment, stored, runs)
        for experiment in EXPERIMENTS
        if experiment.id in parts
    ]
    return [
        summary.section(parts, stored, runs),
        figure_index.section(analyses),
        *analyses,
        _meanings(),
        paper.section(),
        corrections.section(),
        summary.coverage(parts, stored, runs),
        origin.section(stored, runs, out),
    ]


def _with_provenance(
    section: Section, experiment: Experiment, stored: Sequence[StoredRun], runs: Path
) -> Section:
    text = origin.provenance(experiment.complete(stored), runs)
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
