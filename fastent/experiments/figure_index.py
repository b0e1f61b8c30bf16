"""The paper's figures and tables, and where this report has them.

Of Figures 2, 6, 7 and 8 the paper's text has lost even the description: what stands in their place is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastent.experiments.document import Section, Table, Text, figures_of

OURS = "ours: its description is lost"
AFTER = "after its description"


@dataclass(frozen=True)
class Counterpart:
    """A figure or table of the paper, what it shows, and what of the report stands in its place.

    `ours` names a figure of the report, or a section by the beginning of its title where `ours` has a table there.
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
    Counterpart("Table 1", "T_grok under each condition", "E2:", AFTER),
    Counterpart("Table 1", "the norm-matched control", "E3:", AFTER),
    Counterpart("Table 2", "R² of each predictor", "E4:", AFTER),
    Counterpart("Table 3", "T_grok and H* of each task", "E6:", AFTER),
    Counterpart("Table 5", "its diagnosis, as a confusion matrix", "E5:", AFTER),
)


def section(sections: Sequence[Section]) -> Section:
    """Say where the figures and tables of the paper are in a report of these sections, or that they are not run."""
    figures = {figure.name for figure in figures_of(sections)}
    rows = []
    for each in COUNTERPARTS:
        if each.ours in figures:
            place = f"figure `{each.ours}`"
        else:
            titles = [s.title for s in sections if each.ours.endswith(":") and s.title.startswith(each.ours)]
            place = f'table in "{titles[0]}"' if titles else "not run"
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
