"""Which claims depend on what the paper leaves open: E1's analysis of settings one choice apart.

The paper does not say where LayerNorm stands, which position is read, how embeddings start, whether the input ends in
"=", or which nonlinearity it has. `fastent.grokking.train.config.CHOICES` names one other answer to each. Here every
claim of E1 is judged under each of them, the paper's numbers included, as each could be its setting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fastent.grokking.experiments import e1_lead
from fastent.grokking.experiments.claims import CLAIMS, NONE, Experiment, Findings, decimal, steps
from fastent.grokking.experiments.data import Runs
from fastent.grokking.experiments.document import Block, Section, Table, Text, Verdict
from fastent.grokking.experiments.e1_lead import PAPER_H_STAR, Baseline, at_moments, led
from fastent.grokking.experiments.jobs import OTHER_CHOICES
from fastent.grokking.experiments.statistics import Array

TITLE = "Which claims depend on what the paper leaves open?"


@dataclass(frozen=True)
class Setting:
    """E1's analysis of the complete runs of one setting, the preset's own first."""

    label: str
    result: Baseline

    @property
    def findings(self) -> Findings:
        """What its runs say of E1's claims."""
        return e1_lead.claims(self.result)


def analyse(runs: Runs) -> tuple[Setting, ...] | None:
    """Analyse each setting; None without a complete run of another choice or of the preset's own."""
    groups = {"as the preset": runs.select("e1")}
    groups |= {choice.label: runs.select("choices", choice.condition) for choice in OTHER_CHOICES}
    settings = tuple(
        Setting(label, result)
        for label, group in groups.items()
        if (result := e1_lead.analyse_group(replace(group, judged=True))) is not None
    )
    return settings if len(settings) > 1 and len(groups["as the preset"]) else None


def agreed(settings: Sequence[Setting]) -> dict[str, bool]:
    """Whether each claim has one verdict under all settings; those that some setting cannot judge are left out."""
    verdicts = {
        key: [s.findings[key].verdict for s in settings if key in s.findings] for key in settings[0].findings
    }
    return {key: len(set(found)) == 1 for key, found in verdicts.items() if Verdict.NOT_RUN not in found}


def headline(settings: Sequence[Setting]) -> str:
    """Say in a few sentences what the runs show."""
    same = agreed(settings)
    known = [s.result.h_star.value for s in settings if s.result.h_star.known]
    said = (
        f"Choices: under {len(settings)} settings that the paper's text allows, {sum(same.values())} of {len(same)} "
        "claims of E1 have one and the same verdict."
    )
    if known:
        said += f" The mean H* of a setting lies between {decimal(min(known))} and {decimal(max(known))}."
    return said


def section(settings: Sequence[Setting]) -> Section:
    """Write the part of the report."""
    blocks: list[Block] = [
        Text(
            "The paper's text leaves choices open that a reader must make to run its model. Each setting below makes "
            "one of them differently from the preset and is otherwise the same. A verdict that changes along a row "
            "says more of that choice than of grokking."
        ),
        _figures_table(settings),
        _verdicts_table(settings),
    ]
    return Section("choices", TITLE, tuple(blocks))


def _figures_table(settings: Sequence[Setting]) -> Table:
    rows = []
    for setting in settings:
        runs = setting.result.runs
        start, _, highest = at_moments(runs)
        norms = runs.at(runs.norm, runs.t_mem) / runs.at(runs.norm, runs.start)
        rows.append(
            (
                setting.label,
                f"{runs.grokked.sum()} of {len(runs)}",
                _span(runs.t_mem, 0),
                _span(runs.t_grok, 0),
                _span(runs.h_star),
                _span(highest - start),
                _span(norms, 2),
                led(setting.result.left_out),
                led(setting.result.signal),
            )
        )
    columns = (
        *("setting", "grokked", "T_mem", "T_grok", "H*", "H max − start", "norm at T_mem / start"),
        *("lead, H below H* of other seeds", "lead, fall of H"),
    )
    caption = (
        f"Mean (smallest to largest) over the runs of each setting; the paper's H* is {PAPER_H_STAR}. Leads: runs "
        "preceded; mean lead in steps."
    )
    return Table(caption, columns, tuple(rows), tuple(range(1, 9)))


def _verdicts_table(settings: Sequence[Setting]) -> Table:
    same = agreed(settings)
    rows: list[tuple[str | Verdict, ...]] = []
    for key, found in settings[0].findings.items():
        claim = CLAIMS[key]
        verdicts: list[Verdict] = [
            s.findings[key].verdict if key in s.findings else Verdict.NOT_RUN for s in settings
        ]
        depends = "–" if key not in same else "no" if same[key] else "yes"
        rows.append((claim.where, claim.says.format(**found.words), *verdicts, depends))
    columns = ("Paper", "It says", *(setting.label for setting in settings), "depends on the choice")
    return Table("E1's claims under each setting, judged as in the summary.", columns, tuple(rows))


def _span(values: Array, digits: int = 3) -> str:
    known = values[~np.isnan(values)]
    if not known.size:
        return NONE
    mean, low, high = (
        steps(value) if digits == 0 else decimal(value, digits)
        for value in (sum(known) / len(known), known.min(), known.max())
    )
    return mean if known.min() == known.max() else f"{mean} ({low} to {high})"


EXPERIMENT = Experiment(
    "choices", TITLE, ("e1", "choices"), analyse, headline, lambda _: {}, section, of_verdicts=True
)
