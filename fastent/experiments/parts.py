"""The paper's experiments, and what each gives to the report.

An experiment reads complete runs, its own and those it is compared with, and makes its part: a few sentences,
its claims and its section. One that finds nothing to say of the runs there are gives None; one whose runs were made
with different settings judges nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from fastent.experiments import (
    choices,
    e1_baseline,
    e1_section,
    e2_mixing,
    e2_section,
    e3_norm,
    e3_section,
    e4_predictors,
    e4_section,
    e5_claims,
    e5_forecast,
    e5_section,
    e6_section,
    e6_tasks,
    e7_mlp,
    e7_section,
    e8_probes,
    e8_section,
)
from fastent.experiments.claims import MIXED, NONE, Claim
from fastent.experiments.document import Section, Text
from fastent.experiments.origin import of_one_setting
from fastent.experiments.stored import StoredRun


@dataclass(frozen=True)
class Part:
    """What one experiment gives to the report: a few sentences, its claims and its section."""

    headline: str
    claims: tuple[Claim, ...]
    section: Section

    def unjudged(self) -> Part:
        """Return it as it is said of runs that differ in their settings: no claim is judged, and a note says why."""
        note = (
            "These runs differ in their settings (see the last section): what is said of all mixes them, and no "
            "claim is judged by it."
        )
        return Part(
            f"{self.headline} {note}",
            tuple(replace(claim, verdict=MIXED, why=NONE) for claim in self.claims),
            replace(self.section, blocks=(Text(note, "note"), *self.section.blocks)),
        )


@dataclass(frozen=True)
class Experiment:
    """An experiment of the paper.

    `part` makes its part from the complete runs of the experiments in `reads` (its own if that is empty); None
    where this version has no analysis of it.
    """

    id: str
    question: str
    part: Callable[[Sequence[StoredRun]], Part | None] | None = None
    reads: tuple[str, ...] = ()

    def make_part(self, stored: Sequence[StoredRun]) -> Part | None:
        """Make its part from those of `stored` that it reads and that are complete; None if it cannot be."""
        complete = self.complete(stored)
        part = self.part(complete) if complete and self.part is not None else None
        return part if part is None or of_one_setting(complete) else part.unjudged()

    def complete(self, stored: Sequence[StoredRun]) -> list[StoredRun]:
        """Pick the runs that it reads and that are complete."""
        reads = self.reads or (self.id,)
        return [run for run in stored if run.experiment in reads and run.done is not None]


def _baseline(runs: Sequence[StoredRun]) -> Part:
    result = e1_baseline.analyse([run.measure() for run in runs], comparable=in_papers_setting(runs))
    return Part(e1_section.headline(result), tuple(e1_baseline.claims(result)), e1_section.section(result))


def _mixing(runs: Sequence[StoredRun]) -> Part | None:
    result = e2_mixing.analyse(runs, comparable=in_papers_setting(runs))
    if result is None:
        return None
    return Part(e2_section.headline(result), tuple(e2_mixing.claims(result)), e2_section.section(result))


def _norm(runs: Sequence[StoredRun]) -> Part | None:
    result = e3_norm.analyse(runs, comparable=in_papers_setting(runs))
    if result is None:
        return None
    return Part(e3_section.headline(result), tuple(e3_norm.claims(result)), e3_section.section(result))


def _predictors(runs: Sequence[StoredRun]) -> Part:
    result = e4_predictors.analyse([run.measure() for run in runs], comparable=in_papers_setting(runs))
    return Part(e4_section.headline(result), tuple(e4_predictors.claims(result)), e4_section.section(result))


def _forecast(runs: Sequence[StoredRun]) -> Part | None:
    baseline = [run for run in runs if run.experiment == "e1"]
    result = e5_forecast.analyse(runs, comparable=in_papers_setting(baseline))
    if result is None:
        return None
    return Part(e5_section.headline(result), tuple(e5_claims.claims(result)), e5_section.section(result))


def _tasks(runs: Sequence[StoredRun]) -> Part | None:
    result = e6_tasks.analyse(runs)
    if result is None:
        return None
    return Part(e6_tasks.headline(result), tuple(e6_tasks.claims(result)), e6_section.section(result))


def _mlps(runs: Sequence[StoredRun]) -> Part | None:
    result = e7_mlp.analyse(runs)
    if result is None:
        return None
    return Part(e7_mlp.headline(result), tuple(e7_mlp.claims(result)), e7_section.section(result))


def _probes(runs: Sequence[StoredRun]) -> Part | None:
    result = e8_probes.analyse(runs)
    if result is None:
        return None
    return Part(e8_probes.headline(result), tuple(e8_probes.claims(result)), e8_section.section(result))


def _choices(runs: Sequence[StoredRun]) -> Part | None:
    # It compares verdicts, and there are none on runs of different settings.
    settings = choices.analyse(runs) if of_one_setting(runs) else None
    return None if settings is None else Part(choices.headline(settings), (), choices.section(settings))


def in_papers_setting(runs: Sequence[StoredRun]) -> bool:
    """Whether all of `runs` were made with the preset `paper`, so that the paper's numbers can be judged."""
    return all(run.preset == ("paper", {}) for run in runs)


EXPERIMENTS = (
    Experiment("e1", "Does the entropy collapse precede grokking?", _baseline),
    Experiment("e2", "Does mixing the representations delay grokking?", _mixing, ("e1", "e2")),
    Experiment("e3", "Is it the norm? Control with the norm held.", _norm, ("e1", "e2", "e3")),
    Experiment("e4", "Norm against entropy as predictors.", _predictors, ("e1",)),
    Experiment(
        "e5", "Does a power law forecast the time of grokking?", _forecast, ("e1", "e2", "e3", "e5", "e7")
    ),
    Experiment("e6", "Do other tasks and groups show the same?", _tasks, ("e1", "e6")),
    Experiment("e7", "Is the collapse sufficient? MLP against Transformer.", _mlps, ("e1", "e7")),
    Experiment("e8", "Does the choice of the probe matter?", _probes, ("e1",)),
    Experiment("choices", choices.TITLE, _choices, ("e1", "choices")),
)
