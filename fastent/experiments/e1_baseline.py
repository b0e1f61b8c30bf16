"""E1, the question whether the collapse of the entropy precedes grokking.

Runs of modular addition, `fastent.experiments.jobs.e1` (paper, sections 3.3 and 5, Figure 1). The paper says
that H falls below a threshold H* in every run before the model generalises, 1,020 steps ahead on average.
What "the threshold" is decides the answer, so the leads are measured with four: see
`fastent.experiments.leads`. They also depend on what is called grokking and on tau, so both are varied; and
one threshold for all runs is swept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fastent.experiments import leads
from fastent.experiments.claims import (
    NOT_RUN,
    Claim,
    counted,
    decimal,
    judge_share,
    judge_value,
    steps,
    worded,
)
from fastent.experiments.comparisons import Times, restricted_mean
from fastent.experiments.leads import Leads, Sweep
from fastent.experiments.statistics import Estimate, bootstrap, proportion
from fastent.train.quantities import TAU, WINDOW, MeasuredRun

TITLE = "E1: does the entropy collapse precede grokking?"

PAPER_T_GROK = 14_360
PAPER_H_STAR = 0.605
PAPER_LEAD = 1_020

PAPER_SPAN = 800
"""Steps that the paper's window spans: five evaluations, 200 steps apart."""

TAUS = (0.02, 0.05, 0.10)
CRITERIA = (0.5, 0.9, 0.99)


@dataclass(frozen=True)
class Baseline:
    """Analysis of the complete runs of E1.

    `comparable` says whether they were made with the paper's setting, so that its numbers can be judged;
    `own`, `pooled`, `left_out` and `fall` are the leads by the rules of `fastent.experiments.leads`, and
    `wide` is `fall` over the paper's 800 steps, if five evaluations span fewer or more of them. `t_grok`
    is a restricted mean if some runs did not grok.
    """

    runs: tuple[MeasuredRun, ...]
    comparable: bool
    h_star: Estimate | None
    t_mem: Estimate | None
    t_grok: Estimate | None
    own: Leads
    pooled: Leads
    left_out: Leads
    fall: Leads
    wide: Leads | None
    sweep: Sweep

    @property
    def rules(self) -> tuple[Leads, ...]:
        """Leads by each rule, the circular one first."""
        known = (self.own, self.pooled, self.left_out, self.fall)
        return known if self.wide is None else (*known, self.wide)

    @property
    def signal(self) -> Leads:
        """The collapse over the paper's span of steps, whatever the grid of evaluations."""
        return self.fall if self.wide is None else self.wide


def analyse(runs: Sequence[MeasuredRun], *, comparable: bool) -> Baseline:
    """Leads by each rule, H* over the seeds and the sweep, from the runs of `runs` that are complete.

    Raises
    ------
    ValueError
        If no run is complete.
    """
    kept = tuple(run for run in runs if run.complete)
    if not kept:
        raise ValueError("no run of E1 is complete")
    return Baseline(
        runs=kept,
        comparable=comparable,
        h_star=_over([r.summary.h_star for r in kept]),
        t_mem=_over([r.summary.t_mem for r in kept]),
        t_grok=_mean_time(kept),
        own=leads.own_threshold(kept),
        pooled=leads.in_sample_threshold(kept),
        left_out=leads.left_out_threshold(kept),
        fall=leads.collapse(kept),
        wide=None if (window := paper_window(kept)) is None else leads.collapse(kept, window=window),
        sweep=leads.sweep(kept, leads.observed_thresholds(kept)),
    )


def paper_window(runs: Sequence[MeasuredRun]) -> int | None:
    """Count the evaluations that span the paper's 800 steps; None if they are five, or the grids differ."""
    every = {run.evaluate_every for run in runs}
    window = 1 + PAPER_SPAN // max(every)
    return None if len(every) > 1 or window in (1, WINDOW) else window


def _over(values: Sequence[float | None]) -> Estimate | None:
    known = [float(v) for v in values if v is not None]
    return bootstrap(known) if known else None


def _mean_time(runs: Sequence[MeasuredRun]) -> Estimate | None:
    """Mean T_grok; if some runs did not grok, the restricted mean to the earliest end of those."""
    times = [r.summary.t_grok for r in runs]
    ends = [r.summary.last_step for r in runs if r.summary.t_grok is None]
    if not ends:
        return _over(times)
    if len(ends) == len(runs):
        return None
    return restricted_mean(Times.of(times, [r.summary.last_step for r in runs]), min(ends))


def _share(runs: Sequence[MeasuredRun], holds: Callable[[MeasuredRun], bool | None]) -> Estimate | None:
    """Share of the runs for which `holds` is true, of those where it is not None."""
    known = [answer for run in runs if (answer := holds(run)) is not None]
    return proportion(sum(known), len(known)) if known else None


def claims(result: Baseline) -> list[Claim]:
    """Each claim of the paper that E1's runs speak to, beside what they say."""
    runs, pooled, left_out = result.runs, result.pooled, result.left_out

    def delayed(run: MeasuredRun) -> bool:
        s = run.summary
        return s.t_mem is not None and s.t_grok is not None and s.t_grok >= 2 * s.t_mem

    def stable(run: MeasuredRun) -> bool | None:
        s = run.summary
        if s.entropy_start is None or s.entropy_at_mem is None:
            return None
        return abs(s.entropy_at_mem - s.entropy_start) < TAU

    def falls_from_start(run: MeasuredRun) -> bool | None:
        s = run.summary
        if s.entropy_start is None or s.entropy_max is None:
            return None
        return s.entropy_max - s.entropy_start < 0.01

    def norm_grows(run: MeasuredRun) -> bool | None:
        s = run.summary
        return None if s.norm_start is None or s.norm_at_mem is None else s.norm_at_mem > s.norm_start

    window = paper_window(runs) or WINDOW
    early = leads.collapse([run.dated_by(0.5) for run in runs], window=window)
    known = [r.summary.h_star for r in runs if r.summary.h_star is not None]
    spread = max(known) - min(known) if known else None
    tight = NOT_RUN if spread is None else judge_share(proportion(int(spread < TAU), 1))
    delay, calm = _share(runs, delayed), _share(runs, stable)
    monotone, growth = _share(runs, falls_from_start), _share(runs, norm_grows)
    change = _over([_difference(r.summary.entropy_at_mem, r.summary.entropy_start) for r in runs])
    rise = _over([_difference(r.summary.entropy_max, r.summary.entropy_start) for r in runs])
    norm = _over([_ratio(r.summary.norm_at_mem, r.summary.norm_start) for r in runs])
    return [
        Claim(
            "§5, Fig. 1A",
            "the model memorises early and generalises thousands of steps later, in every run",
            f"{counted(delay)}; memorised at {worded(result.t_mem)}",
            judge_share(delay),
            "every run groks, at least twice as late as it memorises",
        ),
        Claim(
            "Table 1",
            f"T_grok is {steps(PAPER_T_GROK)} steps",
            worded(result.t_grok),
            judge_value(PAPER_T_GROK, result.t_grok, comparable=result.comparable),
            "the paper's number lies in our interval; in part: within 25 %",
        ),
        Claim(
            "§3.3",
            f"H* is 0.61 ({PAPER_H_STAR} in Table 3)",
            worded(result.h_star, ""),
            judge_value(PAPER_H_STAR, result.h_star, comparable=result.comparable),
            "the paper's number lies in our interval; in part: within 25 %",
        ),
        Claim(
            "§3.3, App. E.6",
            "H* is stable over seeds",
            f"largest minus smallest {decimal(spread)} (n = {len(known)})",
            tight,
            f"they differ by less than {TAU:g}, the fall that we call a collapse",
        ),
        Claim(
            "§3.3, abstract",
            f"H falls below H* before grokking in 100 % of runs, on average {steps(PAPER_LEAD)} steps ahead "
            "(H* from the same seeds)",
            f"{counted(pooled.preceding)}; lead {worded(pooled.mean)}",
            judge_share(pooled.preceding),
            "every run that groks is preceded; in part: at least half",
        ),
        Claim(
            "§3.3",
            "the same, H* from the other seeds (not in the paper)",
            f"{counted(left_out.preceding)}; lead {worded(left_out.mean)}",
            judge_share(left_out.preceding),
            "every run that groks is preceded; in part: at least half",
        ),
        *(
            Claim(
                "§5",
                f"T_collapse ({rule.source}) comes before T_grok in 100 % of runs, on average "
                f"{steps(PAPER_LEAD)} steps ahead",
                f"{counted(rule.preceding)}; lead {worded(rule.mean)}",
                judge_share(rule.preceding),
                "every run that groks is preceded; in part: at least half",
            )
            for rule in result.rules[3:]
        ),
        Claim(
            "abstract",
            f"the collapse ({early.source}) comes before generalisation, dated at 50 % test accuracy (ours: "
            "T_grok is at the end of the rise)",
            f"{counted(early.preceding)}; lead {worded(early.mean)}",
            judge_share(early.preceding),
            "every run that gets there is preceded; in part: at least half",
        ),
        Claim(
            "§3.2",
            "Phase I: H stays high and stable while the model memorises",
            f"{counted(calm)}; change of H until T_mem {worded(change, '')}",
            judge_share(calm),
            f"H at T_mem is within {TAU:g} of H at the start in every run; in part: at least half",
        ),
        Claim(
            "§5, Fig. 1B",
            "H decreases monotonically from initialisation",
            f"{counted(monotone)}; H rises above its start by {worded(rise, '')}",
            judge_share(monotone),
            "H never rises more than 0.01 above its start; in part: at least half of the runs",
        ),
        Claim(
            "§3.2",
            "Phase I: the parameter norm grows while the model memorises",
            f"{counted(growth)}; norm at T_mem over norm at the start {worded(norm, '')}",
            judge_share(growth),
            "the norm at T_mem exceeds the norm at the start in every run; in part: at least half",
        ),
    ]


def _difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None or b == 0 else a / b
