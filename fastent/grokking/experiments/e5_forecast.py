"""E5, the question whether a power law of the entropy gap forecasts grokking, and what that is worth.

Analysis of E1's runs, and of a few trained to the limit of steps (paper, section 8, Figure 4b; section 10; Appendix
D). The law is fitted the paper's way, to all evaluations of all runs that grokked, and judged by R2; and by leaving
out whole runs, H* and the law fitted to the others, against the clock at the same evaluations
(`fastent.leave_one_out`). What the runs determine of its parameters is asked of the profile of gamma and of the law
without C2.

Stopping as the paper recommends (section 10): 1,000 steps after H fell below H*, here that of the other seeds. What is
saved is a share of the budget, and the budget is a choice: a run that groks at a quarter of it leaves three quarters to
be saved by whatever tells that it has grokked. So the same is computed for stopping at T_grok itself, which needs the
test accuracy and no entropy. The monitor's cost is what the trainer's timing log has measured: representations of the
probe and their entropy, of the whole stack at each evaluation, against the time between the log's entries.

Table 5, the paper's diagnostic guide, is read by `fastent.diagnosis.diagnose` at every evaluation of a run before it
grokked, from the run so far, with the H* of the baseline's other seeds. Each run has the same weight. Runs of every
experiment that trains the same task take part, also those that do not grok: a guide is needed where it is not known
which those are.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from fastent.diagnosis import Phase, diagnose
from fastent.grokking.experiments import e4_predictors
from fastent.grokking.experiments.claims import (
    CLAIMS,
    NONE,
    Finding,
    Findings,
    counted,
    decimal,
    judge_share,
    percent,
    span,
    steps,
    worded,
)
from fastent.grokking.experiments.data import StoredRun, over
from fastent.grokking.experiments.delays import judge_positive
from fastent.grokking.experiments.document import Block, Section, Table, Text, Verdict
from fastent.grokking.experiments.figures import drawn
from fastent.grokking.experiments.leads import left_out_threshold
from fastent.grokking.experiments.statistics import Estimate, proportion
from fastent.history import History
from fastent.leave_one_out import LeaveOneOut, leave_one_run_out
from fastent.power_law import PowerLaw, profile_gamma
from fastent.stopping import StopAfterCrossing
from fastent.train.quantities import MeasuredRun
from fastent.triples import Triples

TITLE = "E5: does a power law forecast grokking?"

GAMMAS = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0)
"""Exponents at which the profile of the likelihood is shown."""


@dataclass(frozen=True)
class Validation:
    """Forecasts of runs left out.

    `law` and `clock` hold each run's mean absolute error over its T_grok, as estimates over runs; `advantage` is the
    clock's minus the law's, over runs; `better` the share of runs that the law forecasts better. `warning` is T_grok
    minus the first evaluation after T_mem at which the law forecasts at all, in steps.
    """

    runs: LeaveOneOut
    law: Estimate | None
    clock: Estimate | None
    law_r_squared: float
    clock_r_squared: float
    advantage: Estimate | None
    better: Estimate | None
    warning: Estimate | None


@dataclass(frozen=True)
class Forecasts:
    """Analysis of E5. `law`, `profile` and `validation` are None with fewer than three runs that grokked.

    `profile` holds R2 at `GAMMAS`. `long` are the runs that went on to the limit of steps.
    """

    runs: tuple[MeasuredRun, ...]
    histories: tuple[History, ...]
    law: PowerLaw | None
    profile: tuple[float, ...] | None
    validation: Validation | None
    saved: Savings
    long: tuple[MeasuredRun, ...]
    cost: Cost | None
    guide: Guide | None
    comparable: bool


def analyse(runs: Sequence[StoredRun], *, comparable: bool) -> Forecasts | None:
    """Fit, cross-validate and stop E1's runs; None without any.

    Parameters
    ----------
    runs : sequence of StoredRun
        Complete runs of E1, E5 and, for Table 5 alone, of any other experiment.
    comparable : bool
        Whether E1's were made with the paper's setting.
    """
    stored = [run for run in runs if run.experiment == "e1"]
    if not stored:
        return None
    measured = [run.measure() for run in stored]
    histories = [
        History(m.trajectory.step, m.trajectory.entropy, m.summary.t_grok, norm=m.trajectory.parameter_norm)
        for m in measured
    ]
    law: PowerLaw | None = None
    profile: tuple[float, ...] | None = None
    validation: Validation | None = None
    with contextlib.suppress(ValueError):  # too few runs that grokked, or too few evaluations above H*
        law = PowerLaw.fit(histories)
        profile = tuple(float(r) for r in profile_gamma(histories, GAMMAS))
        validation = _validate(leave_one_run_out(histories), measured)
    return Forecasts(
        runs=tuple(measured),
        histories=tuple(histories),
        law=law,
        profile=profile,
        validation=validation,
        saved=savings(measured, min(int(run.config["max_steps"]) for run in stored)),
        long=tuple(run.measure() for run in runs if run.experiment == "e5"),
        cost=monitor_cost(stored),
        guide=guide([run.measure() for run in runs if run.experiment != "e5"], measured),
        comparable=comparable,
    )


def _validate(runs: LeaveOneOut, measured: Sequence[MeasuredRun]) -> Validation:
    law, clock = runs.score("law"), runs.score("clock")
    both = np.isfinite(law.mape) & np.isfinite(clock.mape)
    advantage = clock.mape[both] - law.mape[both]
    warnings = []
    for held_out in runs.runs:
        t_mem = measured[held_out.run].summary.t_mem
        after = held_out.step[held_out.step >= t_mem] if t_mem is not None else held_out.step[:0]
        if after.size:
            warnings.append(held_out.t_grok - float(after[0]))
    return Validation(
        runs=runs,
        law=over(law.mape.tolist()),
        clock=over(clock.mape.tolist()),
        law_r_squared=law.r_squared,
        clock_r_squared=clock.r_squared,
        advantage=over(advantage.tolist()),
        better=proportion(int((advantage > 0).sum()), advantage.size) if advantage.size else None,
        warning=over(warnings),
    )


def parameter(law: PowerLaw | None, name: str) -> Estimate | None:
    """Return a law's parameter with its jackknife interval, or without one where the runs do not determine it."""
    if law is None or getattr(law, name) is None:
        return None
    interval = law.intervals.get(name)
    low, high = interval or (None, None)
    method = "jackknife over runs" if interval else "not determined by the runs"
    return Estimate(float(getattr(law, name)), low, high, law.n_runs, method, law.level)


AFTER = StopAfterCrossing().steps
"""Steps between the crossing and the stop; the paper's 1,000."""


@dataclass(frozen=True)
class Stop:
    """One run stopped by its entropy: `step` of the stop and the test accuracy then; None if it never crosses.

    `final_accuracy` is that at the end of the run, `final_step`. A run that ended before its stop is read at its end.
    """

    seed: int
    crossed: int | None
    step: int | None
    accuracy: float | None
    final_accuracy: float
    final_step: int
    t_grok: int | None


@dataclass(frozen=True)
class Savings:
    """Stopping over runs.

    `saved`: share of `budget` saved by the runs that cross (those that do not go on to the budget and save nothing);
    `saved_by_accuracy`: the same for stopping at T_grok; `grokked`: share of stopped runs at the criterion when
    stopped; `within`: share of the runs that cross in which grokking comes after, and within 1,000 steps.
    """

    stops: tuple[Stop, ...]
    budget: int
    saved: Estimate | None
    saved_by_accuracy: Estimate | None
    grokked: Estimate | None
    within: Estimate | None


def savings(runs: Sequence[MeasuredRun], budget: int) -> Savings:
    """Stop each run 1,000 steps after it falls below the mean H* of the other seeds.

    Parameters
    ----------
    runs : sequence of MeasuredRun
        Complete runs of one configuration, each seed once.
    budget : int
        Steps that a run would otherwise take.
    """
    stops = [_stop(run, crossed) for run, crossed in zip(runs, left_out_threshold(runs).times, strict=True)]
    stopped = [stop for stop in stops if stop.step is not None]
    reached = [
        stop.accuracy is not None and stop.accuracy >= run.levels.criterion
        for stop, run in zip(stops, runs, strict=True)
        if stop.step is not None
    ]
    soon = [
        stop.crossed is not None and stop.t_grok is not None and 0 <= stop.t_grok - stop.crossed <= AFTER
        for stop in stopped
    ]
    return Savings(
        stops=tuple(stops),
        budget=budget,
        saved=over([1 - min(budget if s.step is None else s.step, budget) / budget for s in stops]),
        saved_by_accuracy=over([1 - min(s.t_grok or budget, budget) / budget for s in stops]),
        grokked=proportion(sum(reached), len(reached)) if reached else None,
        within=proportion(sum(soon), len(soon)) if soon else None,
    )


def _stop(run: MeasuredRun, crossed: int | None) -> Stop:
    t = run.trajectory
    step = None if crossed is None else crossed + AFTER
    # The accuracy that is known when the run stops: at the last evaluation until then.
    at = None if step is None else int(np.searchsorted(t.step, step, side="right")) - 1
    return Stop(
        seed=run.seed,
        crossed=crossed,
        step=step,
        accuracy=None if at is None else float(t.test_accuracy[at]),
        final_accuracy=float(t.test_accuracy[-1]),
        final_step=int(t.step[-1]),
        t_grok=run.summary.t_grok,
    )


@dataclass(frozen=True)
class Cost:
    """What the monitor took, over runs: share of the training's time, and milliseconds a run and evaluation."""

    share: Estimate
    milliseconds: Estimate
    machines: tuple[str, ...]


def monitor_cost(runs: Sequence[StoredRun]) -> Cost | None:
    """Read the cost off the timing logs; None if none of them has it."""
    shares, milliseconds, machines = [], [], set()
    for run in runs:
        measured = [row for row in run.timing if "monitor_seconds" in row]
        elapsed = _elapsed(run.timing)
        if not measured or elapsed <= 0:
            continue
        shares.append(sum(row["monitor_seconds"] for row in measured) / elapsed)
        milliseconds.append(1e3 * float(np.mean([row["monitor_seconds"] / row["seeds"] for row in measured])))
        device = str(run.environment.get("device", "unknown"))
        machines.add(str(run.environment.get("cpu", "unknown")) if device == "cpu" else device)
    share, each = over(shares), over(milliseconds)
    if share is None or each is None:
        return None
    return Cost(share, each, tuple(sorted(machines)))


def _elapsed(timing: Sequence[dict[str, object]]) -> float:
    """Seconds of the executions of a run: its clock starts anew with each, and what lies between is nobody's."""
    total = 0.0
    first = last = 0.0
    for row in timing:
        seconds = float(str(row["seconds"]))
        if row["event"] in ("start", "resume"):
            total += last - first
            first = seconds
        last = seconds
    return total + last - first


IMMINENT = 1000
"""Steps within which grokking must come after "imminent"; the paper's."""


class Outcome(StrEnum):
    """What came of a run after an evaluation."""

    SOON = "groks within 1,000 steps"
    LATER = "groks later"
    NEVER = "does not grok"


@dataclass(frozen=True)
class Guide:
    """Table 5 as a confusion matrix.

    `shares` holds, by phase and outcome, the share of a run's evaluations before grokking, averaged over the `n`
    runs; `evaluations` counts them. `imminent`: of a run's evaluations "near threshold", the share after which
    grokking came within 1,000 steps, over the runs that have such; `warned`: of the runs that grok, the share that was
    near threshold at some evaluation before, within 1,000 steps of grokking. `given_up`: of the runs called "no
    collapse" at some evaluation, the share that grokked all the same. None where there is no such run.
    """

    n: int
    evaluations: Counter[tuple[Phase, Outcome]]
    shares: dict[tuple[Phase, Outcome], float]
    imminent: Estimate | None
    warned: Estimate | None
    given_up: Estimate | None


def guide(runs: Sequence[MeasuredRun], baseline: Sequence[MeasuredRun]) -> Guide | None:
    """Diagnose `runs` with the H* of `baseline`, the same seed left out; None without an H* or an evaluation."""
    found = []
    for run in runs:
        known = [b.summary.h_star for b in baseline if b.seed != run.seed and b.summary.h_star is not None]
        if known:
            found.append((run, _diagnosed(run, float(np.mean(known)))))
    found = [(run, rows) for run, rows in found if rows]
    if not found:
        return None
    evaluations = Counter(row for _, rows in found for row in rows)
    shares = {key: float(np.mean([rows.count(key) / len(rows) for _, rows in found])) for key in evaluations}
    near = Phase.NEAR_THRESHOLD
    hits = [
        [outcome is Outcome.SOON for phase, outcome in rows if phase is near]
        for _, rows in found
        if any(phase is near for phase, _ in rows)
    ]
    grokked = [rows for run, rows in found if run.summary.t_grok is not None]
    doubted = [run for run, rows in found if any(phase is Phase.NO_COLLAPSE for phase, _ in rows)]
    came = sum(run.summary.t_grok is not None for run in doubted)
    return Guide(
        n=len(found),
        evaluations=evaluations,
        shares=shares,
        imminent=over([float(np.mean(each)) for each in hits]),
        warned=proportion(sum((near, Outcome.SOON) in rows for rows in grokked), len(grokked))
        if grokked
        else None,
        given_up=proportion(came, len(doubted)) if doubted else None,
    )


def _diagnosed(run: MeasuredRun, threshold: float) -> list[tuple[Phase, Outcome]]:
    t, t_grok = run.trajectory, run.summary.t_grok
    history = History(t.step, t.entropy, norm=t.parameter_norm)
    rows = []
    for step, accuracy in zip(t.step.tolist(), t.test_accuracy.tolist(), strict=True):
        if t_grok is not None and step >= t_grok:
            break
        known = None if np.isnan(accuracy) else accuracy
        phase = diagnose(
            history.until(step), threshold=threshold, test_accuracy=known, criterion=run.levels.criterion
        ).phase
        rows.append((phase, _outcome(step, t_grok)))
    return rows


def _outcome(step: int, t_grok: int | None) -> Outcome:
    if t_grok is None:
        return Outcome.NEVER
    return Outcome.SOON if t_grok - step <= IMMINENT else Outcome.LATER


def claims(result: Forecasts) -> Findings:
    """Each claim of the paper that E5 speaks to, beside what the runs say."""
    law, valid, comparable = result.law, result.validation, result.comparable
    r_squared, gamma = parameter(law, "r_squared"), parameter(law, "gamma")
    cost, table = result.cost, result.guide
    return {
        "e5.r2": Finding(worded(r_squared, ""), CLAIMS["e5.r2"].judge(r_squared, comparable=comparable)),
        "e5.gamma": Finding(worded(gamma, "", 2), CLAIMS["e5.gamma"].judge(gamma, comparable=comparable)),
        "e5.left_out": Finding(
            NONE if valid is None else in_percent(valid.law),
            CLAIMS["e5.left_out"].judge(None if valid is None else valid.law, comparable=comparable),
        ),
        "e5.beats_clock": Finding(
            NONE
            if valid is None
            else f"clock: {in_percent(valid.clock)}; law better in {counted(valid.better)}",
            judge_positive(None if valid is None else valid.advantage),
        ),
        "e5.warning": Finding(
            NONE if valid is None else worded(valid.warning),
            CLAIMS["e5.warning"].judge(None if valid is None else valid.warning, comparable=comparable),
        ),
        "e5.imminent_at_crossing": Finding(
            f"{counted(result.saved.within)} that cross the H* of the other seeds",
            judge_share(result.saved.within),
        ),
        "e5.accuracy_kept": Finding(
            f"{counted(result.saved.grokked)} have grokked when they are stopped",
            judge_share(result.saved.grokked),
        ),
        "e5.saved": Finding(
            f"{worded(result.saved.saved, '%')}; stopping at T_grok itself saves "
            f"{worded(result.saved.saved_by_accuracy, '%')}",
            CLAIMS["e5.saved"].judge(result.saved.saved, comparable=comparable),
        ),
        "e5.cost": Finding(
            "not measured: the timing logs of these runs lack it" if cost is None else _cost(cost),
            Verdict.NO_CASE if cost is None else _judge_cost(cost),
        ),
        "e5.imminent": Finding(_imminent(table), _judge_guide(table)),
        "e5.stagnates": Finding(_given_up(table), _judge_given_up(table)),
    }


def percent_of(value: float) -> str:
    """Write a share in per cent with one decimal: "4.1 %"."""
    return f"{decimal(100 * value, 1)} %"


def in_percent(estimate: Estimate | None) -> str:
    """Write a share with its interval in per cent with one decimal."""
    if estimate is None:
        return NONE
    if estimate.low is None or estimate.high is None:
        return f"{percent_of(estimate.value)} ({estimate.method})"
    span = f"{percent_of(estimate.low)} to {percent_of(estimate.high)}"
    return f"{percent_of(estimate.value)} ({100 * estimate.level:.0f} % CI {span}; n = {estimate.n})"


def _cost(cost: Cost) -> str:
    share = percent_of(cost.share.value) if cost.share.value >= 1e-3 else f"{100 * cost.share.value:.2g} %"
    return (
        f"{worded(cost.milliseconds, 'ms', 2)}, {share} of the time; {', '.join(cost.machines)}, "
        "evaluations as often as in these runs"
    )


def _judge_cost(cost: Cost) -> Verdict:
    cheap = cost.milliseconds.value <= CLAIMS["e5.cost"].number, cost.share.value <= 0.01
    return (Verdict.NOT_REPRODUCED, Verdict.IN_PART, Verdict.REPRODUCED)[sum(cheap)]


def _imminent(table: Guide | None) -> str:
    if table is None:
        return NONE
    said = f"of the runs that grok, {counted(table.warned)} were called so in the {IMMINENT:,} steps before"
    if table.imminent is None:
        return f"no run is called so before it groks; {said}"
    return f"grokking came within {IMMINENT:,} steps after {worded(table.imminent, '%')} of such evaluations; {said}"


def _judge_guide(table: Guide | None) -> Verdict:
    if table is None or table.warned is None:
        return Verdict.NOT_RUN
    if table.imminent is None:
        return Verdict.NOT_REPRODUCED
    shares = table.imminent.value, table.warned.value
    if min(shares) >= 0.9:
        return Verdict.REPRODUCED
    return Verdict.IN_PART if min(shares) >= 0.5 else Verdict.NOT_REPRODUCED


def _given_up(table: Guide | None) -> str:
    if table is None:
        return NONE
    return "no run is called so" if table.given_up is None else f"{counted(table.given_up)} called so grokked"


def _judge_given_up(table: Guide | None) -> Verdict:
    if table is None:
        return Verdict.NOT_RUN
    if table.given_up is None:
        return Verdict.NO_CASE
    if table.given_up.value <= 0.1:
        return Verdict.REPRODUCED
    return Verdict.IN_PART if table.given_up.value <= 0.5 else Verdict.NOT_REPRODUCED


def headline(result: Forecasts) -> str:
    """Say in a few sentences what the runs show."""
    said, saved = "No run crosses the H* of the other seeds, so none is stopped early.", result.saved
    if saved.grokked is not None and saved.saved is not None and saved.saved_by_accuracy is not None:
        said = (
            f"Stopping {steps(AFTER)} steps after H falls below the H* of the other seeds stops "
            f"{counted(saved.grokked)} at the criterion and saves {percent(saved.saved.value)} of the budget; stopping "
            f"at T_grok saves {percent(saved.saved_by_accuracy.value)}."
        )
    valid = result.validation
    if result.law is None or valid is None:
        return f"E5: too few runs grokked to fit a law. {said}"
    return (
        f"E5: the law explains R² = {decimal(result.law.r_squared)} in sample; on runs left out it is off by "
        f"{in_percent(valid.law)} of T_grok, the clock by {in_percent(valid.clock)}. {said}"
    )


def section(result: Forecasts) -> Section:
    """E5's part of the report."""
    return Section(
        "e5",
        TITLE,
        (
            *_law_blocks(result),
            *_validation_blocks(result),
            *_savings_blocks(result),
            *_cost_blocks(result),
            *_guide_blocks(result.guide),
        ),
    )


def _law_blocks(result: Forecasts) -> list[Block]:
    law = result.law
    if law is None or result.profile is None:
        return [Text("Fewer than three runs grokked with a usable H: there is no law to fit.", "note")]
    triples = Triples.of(result.histories)
    above = triples.entropy > law.h_star
    gaps = [triples.entropy[above & (triples.run == k)] - law.h_star for k in range(len(triples.origin))]
    left = [triples.remaining[above & (triples.run == k)] for k in range(len(triples.origin))]
    grid = np.linspace(*law.gap_range, 200)
    best = max(range(len(GAMMAS)), key=lambda i: result.profile[i] if result.profile else 0.0)
    rows = tuple(
        (name, span(parameter(law, key), write), meaning)
        for name, key, write, meaning in (
            ("H*", "h_star", decimal, "mean H at T_grok"),
            ("C1", "c1", steps, "steps at a gap of 1"),
            ("γ", "gamma", functools.partial(decimal, digits=2), "exponent"),
            ("C2", "c2", steps, "steps left when H crosses H*"),
            ("R²", "r_squared", decimal, "in sample, the paper's way"),
        )
    )
    without, alone = law.r_squared_without_c2, law.gamma_without_c2
    correlations = ", ".join(f"{pair}: {decimal(value, 2)}" for pair, value in law.correlations.items())
    return [
        Text(
            "The paper's law: the steps that remain are C1 (H − H*)^γ + C2, fitted by least squares to all "
            "evaluations of all runs before they grokked, with H above H*. Intervals leave out whole runs: "
            "evaluations of a run share its T_grok."
        ),
        Table(
            f"The fitted law, from {law.n_points:,} evaluations of {law.n_runs} runs; 95 % jackknife "
            "intervals, none where the runs do not determine the parameter.",
            ("parameter", "value", "what it is"),
            rows,
            (1,),
        ),
        drawn(
            "e5-law",
            functools.partial(
                e4_predictors.remaining_against_gap, gaps, left, (grid, law.remaining(grid + law.h_star))
            ),
            "In the manner of the paper's Figure 4(b): steps until T_grok against the gap, with the law.",
            "Remaining steps against the entropy gap, one line a run, and the fitted curve.",
        ),
        Table(
            "What the runs determine of γ: R² of the best law at each, C1 and C2 fitted anew.",
            ("γ", *(f"{gamma:g}" for gamma in GAMMAS)),
            (("R²", *(decimal(value) for value in result.profile)),),
            tuple(range(1, 1 + len(GAMMAS))),
        ),
        Text(
            f"Of these γ = {GAMMAS[best]:g} is the best. Without C2 the best law has γ = "
            f"{decimal(alone, 2)} and R² = {decimal(without)}. Correlations of the estimates as runs are "
            f"left out: {correlations or NONE}. Near 1 or −1 two parameters trade against each other. An "
            "exponent above 1 means that H falls ever faster towards H*, "
            'which is no "critical slowing down".'
        ),
    ]


def _validation_blocks(result: Forecasts) -> list[Block]:
    valid = result.validation
    if valid is None:
        return []
    rows = []
    law, clock = valid.runs.score("law"), valid.runs.score("clock")
    for k, held_out in enumerate(valid.runs.runs):
        rows.append(
            (
                str(result.runs[held_out.run].seed),
                steps(held_out.t_grok),
                decimal(held_out.law.h_star),
                decimal(held_out.law.gamma, 2),
                str(held_out.step.size),
                steps(law.mae[k]) if held_out.step.size else NONE,
                steps(clock.mae[k]) if held_out.step.size else NONE,
            )
        )
    return [
        Text(
            "Forecasts of runs left out: H*, C1, γ and C2 come from the other runs. In every run the "
            "remaining steps fall by one a step, so the clock, the mean T_grok of the other runs minus the "
            "step, forecasts too. It is what the entropy has to beat."
        ),
        Table(
            "Each run forecast from the others: mean absolute error in steps over its evaluations above H*.",
            ("seed", "T_grok", "H*", "γ", "evaluations", "error, law", "error, clock"),
            tuple(rows),
            tuple(range(7)),
        ),
        Table(
            "The same, over runs. Errors are shares of T_grok.",
            ("", "law", "clock"),
            (
                ("mean absolute percentage error", in_percent(valid.law), in_percent(valid.clock)),
                ("R² of the steps that remain", decimal(valid.law_r_squared), decimal(valid.clock_r_squared)),
                ("clock's error minus the law's", in_percent(valid.advantage), NONE),
                ("runs forecast better than by the clock", counted(valid.better), NONE),
                ("first forecast after T_mem, before T_grok", worded(valid.warning), NONE),
            ),
        ),
    ]


def _savings_blocks(result: Forecasts) -> list[Block]:
    saved = result.saved
    blocks: list[Block] = [
        Text(
            f"Stopping early, as the paper recommends: {steps(AFTER)} steps after H fell below H*, here "
            f"that of the other seeds. The saving is a share of the budget of {steps(saved.budget)} steps, "
            "and mostly says that runs grok long before it ends: stopping when the test accuracy reaches "
            f"the criterion needs no entropy, and saves {worded(saved.saved_by_accuracy, '%')}."
        ),
        Table(
            "Every run stopped by its entropy. Accuracy at the stop: the last evaluation until then.",
            ("seed", "T_grok", "T_cross", "stopped at", "test accuracy then", "at the end", "saved"),
            tuple(_stop_row(stop, saved.budget) for stop in saved.stops),
            tuple(range(7)),
        ),
    ]
    if result.long:
        rows = []
        for run in result.long:
            t, s = run.trajectory, run.summary
            after = t.step >= (s.t_grok_sustained if s.t_grok_sustained is not None else np.inf)
            worst = float(t.test_accuracy[after].min()) if after.any() else None
            below = float((t.test_accuracy[after] < run.levels.criterion).mean()) if after.any() else None
            span_h = (
                f"{decimal(float(np.nanmin(t.entropy[after])))} to "
                f"{decimal(float(np.nanmax(t.entropy[after])))}"
                if after.any() and np.isfinite(t.entropy[after]).any()
                else NONE
            )
            rows.append(
                (str(run.seed), steps(s.t_grok), steps(s.last_step), percent(worst), percent(below), span_h)
            )
        blocks.append(
            Table(
                "Runs trained on to the limit of steps: what comes after grokking (sustained).",
                (
                    *("seed", "T_grok", "last step", "least test accuracy after"),
                    *("evaluations below the criterion after", "H after"),
                ),
                tuple(rows),
                tuple(range(6)),
            )
        )
    return blocks


def _stop_row(stop: Stop, budget: int) -> tuple[str, ...]:
    return (
        str(stop.seed),
        steps(stop.t_grok),
        steps(stop.crossed),
        steps(stop.step),
        percent(stop.accuracy),
        f"{percent(stop.final_accuracy)} ({steps(stop.final_step)})",
        percent(0.0 if stop.step is None else 1 - min(stop.step, budget) / budget),
    )


def _cost_blocks(result: Forecasts) -> list[Block]:
    cost = result.cost
    if cost is None:
        return [Text("The monitor's cost was not measured: the timing logs of these runs lack it.", "note")]
    return [
        Text(
            f"The monitor's cost, from the trainer's clocks on {', '.join(cost.machines)}: "
            f"{worded(cost.milliseconds, 'ms', 2)} for an evaluation of one run, probe and entropy together, "
            f"{100 * cost.share.value:.2g} % of the training time. It is wall time, with whatever else the machine did."
        )
    ]


def _guide_blocks(guide: Guide | None) -> list[Block]:
    if guide is None:
        return [Text("The paper's Table 5 could not be tested: no run has an H* of other seeds.", "note")]
    seen = [phase for phase in Phase if any((phase, outcome) in guide.evaluations for outcome in Outcome)]
    rows = []
    for phase in seen:
        shares = [guide.shares.get((phase, outcome), 0.0) for outcome in Outcome]
        count = sum(guide.evaluations[phase, outcome] for outcome in Outcome)
        rows.append(
            (phase.value.replace("_", " "), *map(_tenths, shares), _tenths(sum(shares)), f"{count:,}")
        )
    return [
        Text(
            "The paper's Table 5 as a forecast: `fastent.diagnose` reads it at every evaluation before "
            f"grokking, with the H* of the baseline's other seeds, in {guide.n} runs: those of E1, E2, E3 and E7 "
            "that are complete."
        ),
        Table(
            "Table 5 as a confusion matrix: what it says at an evaluation, and what came. Shares of a "
            "run's evaluations before grokking, each run with the same weight.",
            ("diagnosis", *(outcome.value for outcome in Outcome), "together", "evaluations"),
            tuple(rows),
            (1, 2, 3, 4, 5),
        ),
    ]


def _tenths(share: float) -> str:
    return f"{decimal(100 * share, 1)} %"
