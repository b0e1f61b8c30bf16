"""E2, the question whether mixing the representations delays grokking, and whether by way of the entropy.

Runs of `fastent.experiments.jobs.e2` against E1's (paper, section 6, Appendix C, Figure 3, Table 1). The paper
mixes "at every training step" to "prevent the covariance from collapsing" and concludes from the delay that the
collapse causes grokking. Its text has two readings of the loss, so both were run, and its alpha is lost, so there
is a dose-response. A delay shows an effect of mixing; that it acts through the entropy needs H to stay up, which is
measured (`fastent.experiments.entropy_shift`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

from fastent.experiments import entropy_shift
from fastent.experiments.claims import (
    IN_PART,
    NONE,
    NOT_REPRODUCED,
    NOT_RUN,
    REPRODUCED,
    Claim,
    counted,
    decimal,
    judge_share,
    judge_value,
    steps,
    worded,
)
from fastent.experiments.delays import Delay, Group, delays, groups_of, judge_later, judge_test, tested
from fastent.experiments.document import Verdict
from fastent.experiments.entropy_shift import AtLoss, Collapse
from fastent.experiments.jobs import ALPHA
from fastent.experiments.statistics import Estimate, bootstrap
from fastent.experiments.stored import StoredRun

TITLE = "E2: does mixing the representations delay grokking?"

PAPER_MEAN = 19_420
PAPER_DELAY = 5_060
"""From its Table 1's means, 19,420 - 14,360; the paper prints 5,020."""
PAPER_EFFECT = 0.70
PAPER_P = 0.044

LOSSES, LOGITS = f"losses-{ALPHA:g}", f"logits-{ALPHA:g}"
"""The two readings of the paper's loss, at the alpha that stands for the lost one."""


@dataclass(frozen=True)
class Mixed:
    """One condition of E2: its delay and what became of the entropy."""

    delay: Delay
    equal_step: Estimate | None
    equal_loss: tuple[AtLoss, ...]
    collapse: Collapse


@dataclass(frozen=True)
class Mixing:
    """Analysis of E2: the baseline, every condition by name, and the dose-response.

    `dose` is the mean over seeds of Kendall's tau between alpha (0 included) and T_grok, losses averaged; a run
    that did not grok is as late as the limit.
    """

    baseline: Group
    conditions: dict[str, Mixed]
    dose: Estimate | None
    comparable: bool


def analyse(runs: Sequence[StoredRun], *, comparable: bool) -> Mixing | None:
    """Compare E2's conditions with E1's baseline; None if either has no run.

    Parameters
    ----------
    runs : sequence of StoredRun
        Complete runs of E1 and E2.
    comparable : bool
        Whether they were made with the paper's setting.
    """
    baseline = groups_of(runs, "e1").get("baseline")
    treated = groups_of(runs, "e2")
    if baseline is None or not treated:
        return None
    conditions = {
        delay.condition: Mixed(
            delay=delay,
            equal_step=entropy_shift.equal_step(baseline, delay.group),
            equal_loss=tuple(entropy_shift.equal_loss(baseline, delay.group)),
            collapse=entropy_shift.collapse(baseline, delay.group),
        )
        for delay in delays(baseline, list(treated.values()))
    }
    return Mixing(baseline, conditions, _dose(baseline, treated), comparable)


def alpha_of(condition: str) -> float:
    """Weight of the other row under a condition; 0 for the baseline."""
    return 0.0 if condition == "baseline" else float(condition.rpartition("-")[2])


def _dose(baseline: Group, treated: dict[str, Group]) -> Estimate | None:
    doses = [baseline, *(group for name, group in treated.items() if name.startswith("losses-"))]
    shared = set.intersection(*(set(group.seeds) for group in doses))
    if len(doses) < 3 or not shared:
        return None
    alphas = [alpha_of(group.condition) for group in doses]
    times = zip(*(group.only(sorted(shared)).times.values for group in doses), strict=True)
    taus = [float(stats.kendalltau(alphas, seed).statistic) for seed in times]
    known = [tau for tau in taus if tau == tau]  # NaN where all times of a seed tie
    return bootstrap(known) if known else None


def claims(result: Mixing) -> list[Claim]:
    """Each claim of the paper that E2's runs speak to, beside what they say."""
    losses, logits = result.conditions.get(LOSSES), result.conditions.get(LOGITS)
    delay = None if losses is None else losses.delay
    return [
        Claim(
            "§6, abstract (iii)",
            f"mixing delays grokking by 5,020 steps (Table 1's means differ by {steps(PAPER_DELAY)})",
            _delayed(delay),
            judge_later(delay),
            "the interval of the mean delay lies above 0; in part: the delay does. Losses averaged",
        ),
        Claim(
            "Appendix C",
            "the same with the other reading of its loss, logits averaged",
            _delayed(None if logits is None else logits.delay),
            judge_later(None if logits is None else logits.delay),
            "as above",
        ),
        Claim(
            "Table 1",
            f"T_grok under mixing is {steps(PAPER_MEAN)} steps",
            NONE if delay is None else worded(delay.mean),
            judge_value(PAPER_MEAN, None if delay is None else delay.mean, comparable=result.comparable),
            "the paper's number lies in our interval; in part: within 25 %",
        ),
        Claim(
            "§6",
            f"Mann-Whitney p = {PAPER_P}, Cohen's d = {decimal(PAPER_EFFECT, 2)}",
            tested(delay),
            judge_test(delay, PAPER_EFFECT, comparable=result.comparable),
            "p (Holm over E2's conditions) below 0.05 and the paper's d in our interval; in part: one of them",
        ),
        Claim(
            "Table 1",
            "10 of 10 runs grok under mixing",
            NONE if delay is None else counted(delay.grokked),
            judge_share(None if delay is None else delay.grokked),
            "every run groks; in part: at least half",
        ),
        Claim(
            "§6",
            "mixing prevents the covariance from collapsing",
            _kept_up(result.baseline, losses),
            judge_kept_up(losses),
            "H is higher than in the baseline run of the same seed at equal step and at grokking, both intervals above "
            "0; in part: one of them",
        ),
    ]


def _delayed(delay: Delay | None) -> str:
    return NONE if delay is None else worded(delay.delay)


def _kept_up(baseline: Group, mixed: Mixed | None) -> str:
    if mixed is None:
        return NONE
    said = f"H is higher at equal step by {worded(mixed.equal_step, '')}"
    said += f", at grokking by {worded(mixed.collapse.shift, '')}"
    if mixed.equal_loss:
        # The lowest loss that the most seeds reach under both.
        most = max(level.difference.n for level in mixed.equal_loss)
        last = [level for level in mixed.equal_loss if level.difference.n == most][-1]
        said += f", at equal training loss ({last.loss:g}) by {worded(last.difference, '')}"
    own = entropy_shift.collapse(baseline, baseline).below
    return f"{said}; below the baseline's H* by T_grok: {counted(mixed.collapse.below)}, of the baseline {counted(own)}"


def judge_kept_up(mixed: Mixed | None) -> Verdict:
    """Judge whether mixing keeps H up, by H at equal step and at grokking."""
    if mixed is None or mixed.equal_step is None or mixed.collapse.shift is None:
        return NOT_RUN
    higher = [e.low is not None and e.low > 0 for e in (mixed.equal_step, mixed.collapse.shift)]
    return REPRODUCED if all(higher) else IN_PART if any(higher) else NOT_REPRODUCED
