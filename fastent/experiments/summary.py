"""The report's first section: every claim of the paper beside our figure and a verdict, and what was not run.

Claims come from the parts of the experiments. Those that a summary must name (`paper.SAID`) and no part speaks to
are listed as not run, with the command that runs them; nothing is filled in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from fastent.experiments import paper
from fastent.experiments.claims import (
    IN_PART,
    MIXED,
    NONE,
    NOT_REPRODUCED,
    NOT_RUN,
    REPRODUCED,
    Claim,
    claims_table,
)
from fastent.experiments.document import Block, Section, Table, Text, Verdict
from fastent.experiments.origin import command, of_one_setting, run_folder
from fastent.experiments.parts import EXPERIMENTS, Part
from fastent.experiments.stored import StoredRun

SEEDS = range(10)
"""The paper's seeds of its main experiments."""


def section(parts: Mapping[str, Part], stored: Sequence[StoredRun], runs: Path) -> Section:
    """Write the summary of the parts, by experiment, from the runs in the folder `runs`."""
    claims = all_claims(parts, run_folder(stored, runs))
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


def all_claims(parts: Mapping[str, Part], runs: Path) -> list[Claim]:
    """List the claims by experiment, and those not run with the command that runs them in the folder `runs`."""
    made = [claim for part in parts.values() for claim in part.claims]
    claims: list[Claim] = []
    for experiment in EXPERIMENTS:
        claims += parts[experiment.id].claims if experiment.id in parts else ()
        claims += [
            Claim(
                said.where,
                said.says,
                f"`{command(said.experiment, 'paper', seeds=SEEDS, runs=runs)}`",
                NOT_RUN,
                NONE,
            )
            for said in paper.SAID
            if said.experiment == experiment.id and not paper.covering(said.marker, made)
        ]
    return claims


def contributions_table(claims: list[Claim]) -> Table:
    """Lay out the paper's contributions, each with the verdict that those of its claims come to."""
    rows = []
    for number, says, markers in paper.CONTRIBUTIONS:
        resting = [claim for marker in markers for claim in paper.covering(marker, claims)]
        found = "; ".join(f"{claim.says}: {claim.verdict.label}" for claim in resting) or NONE
        rows.append((number, says, found, together([claim.verdict for claim in resting])))
    return Table(
        "The paper's contributions. Reproduced if every claim it rests on is, not reproduced if none is even in part.",
        ("", "The paper's contribution", "It rests on", "Verdict"),
        tuple(rows),
    )


def together(verdicts: Sequence[Verdict]) -> Verdict:
    """Sum up verdicts; those with nothing to judge take no part."""
    judged = [verdict for verdict in verdicts if verdict.kind != "none"]
    if not judged:
        return MIXED if MIXED in verdicts else NOT_RUN
    if all(verdict == REPRODUCED for verdict in judged):
        return REPRODUCED
    return NOT_REPRODUCED if all(verdict == NOT_REPRODUCED for verdict in judged) else IN_PART


def coverage(parts: Mapping[str, Part], stored: Sequence[StoredRun], runs: Path) -> Section:
    """Say which experiments are here, from how many runs, and how to get the others."""
    rows, folder = [], run_folder(stored, runs)
    for experiment in EXPERIMENTS:
        mine = [run for run in stored if run.experiment == experiment.id]
        complete = sum(run.done is not None for run in mine)
        reads = ", ".join(name.upper() for name in experiment.reads if name != experiment.id)
        if experiment.id not in parts:
            state = "no complete run" if mine else "not run"
            if complete and not of_one_setting(experiment.complete(stored)):
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
