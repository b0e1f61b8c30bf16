"""E5, the question whether a power law of the entropy gap forecasts grokking, and what that is worth.

Analysis of E1's runs, and of a few trained to the limit of steps (paper, section 8, Figure 4b; section 10; Appendix D).
The law is fitted the paper's way, to all evaluations of all runs that grokked, and judged by R2; and by leaving out
whole runs, H* and the law fitted to the others, against the clock at the same evaluations
(`fastent.forecast.validation`). What the runs determine of its parameters is asked of the profile of gamma and of the
law without C2.

Stopping as the paper recommends (section 10): 1,000 steps after H fell below H*, here that of the other seeds. What is
saved is a share of the budget, and the budget is a choice: a run that groks at a quarter of it leaves three quarters to
be saved by whatever tells that it has grokked. So the same is computed for stopping at T_grok itself, which needs the
test accuracy and no entropy. The monitor's cost is what the trainer's timing log has measured: representations of the
probe and their entropy, of the whole stack at each evaluation, against the time between the log's entries.

Table 5, the paper's diagnostic guide, is read by `fastent.forecast.diagnosis.diagnose` at every evaluation of a run
before it grokked, from the run so far, with the H* of the baseline's other seeds. Each run has the same weight. Runs of
every experiment that trains the same task take part, also those that do not grok: a guide is needed where it is not
known which those are.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from matplotlib.figure import Figure

from fastent.forecast.diagnosis import Phase, diagnose
from fastent.forecast.history import History
from fastent.forecast.power_law import PowerLaw, Triples, profile_gamma
from fastent.forecast.validation import LeaveOneOut, leave_one_run_out
from fastent.grokking.experiments.claims import (
    CLAIMS,
    NONE,
    Experiment,
    Finding,
    Findings,
    by_run,
    counted,
    decimal,
    judge,
    judge_positive,
    judge_share,
    percent,
    span,
    steps,
    worded,
)
from fastent.grokking.experiments.data import Runs
from fastent.grokking.experiments.document import Block, Section, Table, Text, Verdict
from fastent.grokking.experiments.figures import LIGHT, WIDTH, drawn, legend_above, thousands
from fastent.grokking.experiments.leads import left_out_threshold
from fastent.grokking.experiments.statistics import (
    UNKNOWN,
    Array,
    Estimate,
    mean_known,
    over,
    share,
    where_known,
)
from fastent.monitor.monitor import StopAfterCrossing

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
    law: Estimate
    clock: Estimate
    law_r_squared: float
    clock_r_squared: float
    advantage: Estimate
    better: Estimate
    warning: Estimate


@dataclass(frozen=True, eq=False)
class Forecasts:
    """Analysis of E5. `law`, `profile` and `validation` are None with fewer than three runs that grokked.

    `profile` holds R2 at `GAMMAS`. `long` are the runs that went on to the limit of steps.
    """

    runs: Runs
    histories: tuple[History, ...]
    law: PowerLaw | None
    profile: tuple[float, ...] | None
    validation: Validation | None
    saved: Savings
    long: Runs
    cost: Cost | None
    guide: Guide | None


def analyse(runs: Runs) -> Forecasts | None:
    """Fit, cross-validate and stop E1's runs, with E5's and, for Table 5 alone, all others; None without E1's."""
    everything, runs = runs, runs.select("e1")
    if not len(runs):
        return None
    histories = [
        History(step, h, t_grok if np.isfinite(t_grok) else None, norm=norm)
        for t_grok, (step, h, norm) in zip(runs.t_grok, runs.lines(runs.entropy, runs.norm), strict=True)
    ]
    law: PowerLaw | None = None
    profile: tuple[float, ...] | None = None
    validation: Validation | None = None
    with contextlib.suppress(ValueError):  # too few runs that grokked, or too few evaluations above H*
        law = PowerLaw.fit(histories)
        profile = tuple(float(r) for r in profile_gamma(histories, GAMMAS))
        validation = _validate(leave_one_run_out(histories), runs)
    return Forecasts(
        runs=runs,
        histories=tuple(histories),
        law=law,
        profile=profile,
        validation=validation,
        saved=savings(runs, int(runs.setting("max_steps").min())),
        long=everything.select("e5"),
        cost=monitor_cost(runs),
        guide=guide(everything[[run.experiment != "e5" for run in everything.stored]], runs),
    )


def _validate(left_out: LeaveOneOut, runs: Runs) -> Validation:
    law, clock = left_out.score("law"), left_out.score("clock")
    advantage = clock.mape - law.mape
    warnings = []
    for held_out in left_out.runs:
        after = held_out.step[held_out.step >= runs.t_mem[held_out.run]]
        warnings += [held_out.t_grok - float(after[0])] if after.size else []
    return Validation(
        runs=left_out,
        law=over(law.mape, least=0),
        clock=over(clock.mape, least=0),
        law_r_squared=law.r_squared,
        clock_r_squared=clock.r_squared,
        advantage=over(advantage),
        better=share(where_known(advantage, lambda gain: gain > 0)),
        warning=over(warnings, least=0),
    )


def parameter(law: PowerLaw | None, name: str) -> Estimate:
    """Return a law's parameter with its jackknife interval, or without one where the runs do not determine it."""
    value = getattr(law, name, None)
    if law is None or value is None:
        return UNKNOWN
    interval = law.intervals.get(name)
    method = "jackknife over runs" if interval else "not determined by the runs"
    return Estimate(float(value), *(interval or (np.nan, np.nan)), law.n_runs, method, law.level)


AFTER = StopAfterCrossing().steps
"""Steps between the crossing and the stop; the paper's 1,000."""


@dataclass(frozen=True, eq=False)
class Savings:
    """Stopping each run by its entropy, arrays of shape (n,) by run.

    `crossed` is the crossing, `step` the stop and `accuracy` the test accuracy then; NaN for a run that never crosses.
    A run that ended before its stop is read at its end.

    `saved`: share of `budget` saved by the runs that cross (those that do not go on to the budget and save nothing);
    `saved_by_accuracy`: the same for stopping at T_grok; `grokked`: share of stopped runs at the criterion when
    stopped; `within`: share of the runs that cross in which grokking comes after, and within 1,000 steps.
    """

    crossed: Array
    step: Array
    accuracy: Array
    budget: int
    saved: Estimate
    saved_by_accuracy: Estimate
    grokked: Estimate
    within: Estimate


def _part(step: Array, budget: int) -> Array:
    """Share of the budget that stopping at a step saves, (n,); 0 where it never comes."""
    return 1 - np.fmin(step, budget) / budget


def savings(runs: Runs, budget: int) -> Savings:
    """Stop each run 1,000 steps after it falls below the mean H* of the other seeds.

    Parameters
    ----------
    runs : Runs
        Complete runs of one configuration, each seed once.
    budget : int
        Steps that a run would otherwise take.
    """
    crossed = left_out_threshold(runs).times
    step = crossed + AFTER
    # The accuracy that is known when the run stops: at the last evaluation until then.
    last = np.where(runs.step <= step[:, None], runs.step, -np.inf).max(axis=1, initial=-np.inf)
    accuracy = runs.at(runs.test_accuracy, last)
    stopped, ahead = ~np.isnan(step), runs.t_grok - crossed
    return Savings(
        crossed=crossed,
        step=step,
        accuracy=accuracy,
        budget=budget,
        saved=over(_part(step, budget), least=0, most=1),
        saved_by_accuracy=over(_part(runs.t_grok, budget), least=0, most=1),
        grokked=share((accuracy >= runs.criteria)[stopped]),
        within=share(((ahead >= 0) & (ahead <= AFTER))[stopped]),
    )


@dataclass(frozen=True)
class Cost:
    """What the monitor took, over runs: share of the training's time, and milliseconds a run and evaluation."""

    share: Estimate
    milliseconds: Estimate
    machines: tuple[str, ...]


def monitor_cost(runs: Runs) -> Cost | None:
    """Read the cost off the timing logs; None if none of them has it."""
    shares, milliseconds, machines = [], [], set()
    for run in runs.stored:
        measured = [row for row in run.timing if "monitor_seconds" in row]
        elapsed = _elapsed(run.timing)
        if not measured or elapsed <= 0:
            continue
        shares.append(sum(row["monitor_seconds"] for row in measured) / elapsed)
        milliseconds.append(1e3 * float(np.mean([row["monitor_seconds"] / row["seeds"] for row in measured])))
        device = str(run.environment.get("device", "unknown"))
        machines.add(str(run.environment.get("cpu", "unknown")) if device == "cpu" else device)
    return (
        Cost(over(shares, least=0), over(milliseconds, least=0), tuple(sorted(machines))) if shares else None
    )


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
    collapse" at some evaluation, the share that grokked all the same.
    """

    n: int
    evaluations: Counter[tuple[Phase, Outcome]]
    shares: dict[tuple[Phase, Outcome], float]
    imminent: Estimate
    warned: Estimate
    given_up: Estimate


def guide(runs: Runs, baseline: Runs) -> Guide | None:
    """Diagnose `runs` with the H* of `baseline`, the same seed left out; None without an H* or an evaluation."""
    others = (mean_known(baseline.h_star[[seed != own for seed in baseline.seeds]]) for own in runs.seeds)
    diagnosed = [
        [] if np.isnan(threshold) else _diagnosed(row, t_grok, threshold, criterion)
        for row, t_grok, threshold, criterion in zip(
            runs.lines(runs.entropy, runs.norm, runs.test_accuracy),
            runs.t_grok,
            others,
            runs.criteria,
            strict=True,
        )
    ]
    found = [(rows, grokked) for rows, grokked in zip(diagnosed, runs.grokked, strict=True) if rows]
    if not found:
        return None
    evaluations = Counter(row for rows, _ in found for row in rows)
    shares = {key: float(np.mean([rows.count(key) / len(rows) for rows, _ in found])) for key in evaluations}
    near, doubted = Phase.NEAR_THRESHOLD, Phase.NO_COLLAPSE
    hits = [[outcome is Outcome.SOON for phase, outcome in rows if phase is near] for rows, _ in found]
    return Guide(
        n=len(found),
        evaluations=evaluations,
        shares=shares,
        imminent=over((float(np.mean(each)) for each in hits if each), least=0, most=1),
        warned=share((near, Outcome.SOON) in rows for rows, grokked in found if grokked),
        given_up=share(grokked for rows, grokked in found if any(phase is doubted for phase, _ in rows)),
    )


def _diagnosed(
    run: tuple[Array, ...], t_grok: float, threshold: float, criterion: float
) -> list[tuple[Phase, Outcome]]:
    step, entropy, norm, accuracy = run
    history = History(step, entropy, norm=norm)
    rows = []
    for now, reached in zip(step.tolist(), accuracy.tolist(), strict=True):
        if now >= t_grok:
            break
        known = None if np.isnan(reached) else reached
        read = diagnose(history.until(now), threshold=threshold, test_accuracy=known, criterion=criterion)
        rows.append((read.phase, _outcome(t_grok - now)))
    return rows


def _outcome(ahead: float) -> Outcome:
    if np.isnan(ahead):
        return Outcome.NEVER
    return Outcome.SOON if ahead <= IMMINENT else Outcome.LATER


def claims(result: Forecasts) -> Findings:
    """Each claim of the paper that E5 speaks to, beside what the runs say."""
    law, valid, comparable = result.law, result.validation, result.runs.comparable
    r_squared, gamma = parameter(law, "r_squared"), parameter(law, "gamma")
    error, clock, advantage, better, warning = (UNKNOWN,) * 5
    if valid is not None:
        error, clock, advantage, better = valid.law, valid.clock, valid.advantage, valid.better
        warning = valid.warning
    against = f"clock: {in_percent(clock)}; law better in {counted(better)}"
    cost, table = result.cost, result.guide
    return {
        "e5.r2": Finding(worded(r_squared, ""), CLAIMS["e5.r2"].judge(r_squared, comparable=comparable)),
        "e5.gamma": Finding(worded(gamma, "", 2), CLAIMS["e5.gamma"].judge(gamma, comparable=comparable)),
        "e5.left_out": Finding(in_percent(error), CLAIMS["e5.left_out"].judge(error, comparable=comparable)),
        "e5.beats_clock": Finding(against if valid else NONE, judge_positive(advantage)),
        "e5.warning": Finding(worded(warning), CLAIMS["e5.warning"].judge(warning, comparable=comparable)),
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


def in_percent(estimate: Estimate) -> str:
    """Write a share with its interval in per cent with one decimal."""
    return worded(estimate, "", write=percent_of)


def _cost(cost: Cost) -> str:
    share = percent_of(cost.share.value) if cost.share.value >= 1e-3 else f"{100 * cost.share.value:.2g} %"
    return (
        f"{worded(cost.milliseconds, 'ms', 2)}, {share} of the time; {', '.join(cost.machines)}, "
        "evaluations as often as in these runs"
    )


def _judge_cost(cost: Cost) -> Verdict:
    fast, cheap = cost.milliseconds.value <= CLAIMS["e5.cost"].number, cost.share.value <= 0.01
    return judge(True, fast and cheap, fast or cheap)


def _imminent(table: Guide | None) -> str:
    if table is None:
        return NONE
    said = f"of the runs that grok, {counted(table.warned)} were called so in the {IMMINENT:,} steps before"
    if not table.imminent.known:
        return f"no run is called so before it groks; {said}"
    return f"grokking came within {IMMINENT:,} steps after {worded(table.imminent, '%')} of such evaluations; {said}"


def _judge_guide(table: Guide | None) -> Verdict:
    if table is None:
        return Verdict.NOT_RUN
    both = min(table.imminent.value, table.warned.value)
    return judge(table.warned.known, both >= 0.9, both >= 0.5)


def _given_up(table: Guide | None) -> str:
    if table is None:
        return NONE
    return f"{counted(table.given_up)} called so grokked" if table.given_up.known else "no run is called so"


def _judge_given_up(table: Guide | None) -> Verdict:
    if table is None:
        return Verdict.NOT_RUN
    share = table.given_up
    return judge(share.known, share.value <= 0.1, share.value <= 0.5) if share.known else Verdict.NO_CASE


def headline(result: Forecasts) -> str:
    """Say in a few sentences what the runs show."""
    said, saved = "No run crosses the H* of the other seeds, so none is stopped early.", result.saved
    if saved.grokked.known:
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


def remaining_against_gap(
    gap: Sequence[np.ndarray], remaining: Sequence[np.ndarray], curve: tuple[np.ndarray, np.ndarray]
) -> Figure:
    """Draw the steps that remain against H − H*, one line a run, with the fitted law."""
    figure = Figure(figsize=(WIDTH, 5.0), layout="constrained")
    axes = figure.subplots()
    for x, y in zip(gap, remaining, strict=True):
        axes.plot(x, y, "o-", color=LIGHT.entropy, markersize=3, linewidth=0.6, alpha=0.6)
    axes.plot([], [], "o-", color=LIGHT.entropy, markersize=3, linewidth=0.6, label="runs")
    axes.plot(*curve, color=LIGHT.ink, linewidth=2.2, label="fitted law")
    axes.set(xlabel="H − H* (no unit)", ylabel="steps until T_grok", ylim=(0, None), xlim=(0, None))
    axes.yaxis.set_major_formatter(thousands)
    legend_above(axes)
    return figure


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
            functools.partial(remaining_against_gap, gaps, left, (grid, law.remaining(grid + law.h_star))),
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
                str(result.runs.seeds[held_out.run]),
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
            _stop_rows(result),
            tuple(range(7)),
        ),
    ]
    if len(long := result.long):
        rows = []
        after = long.step >= long.t_grok_sustained[:, None]
        for i, seed in enumerate(long.seeds):
            accuracy, h = long.test_accuracy[i][after[i]], long.entropy[i][after[i]]
            usable = h[~np.isnan(h)]
            rows.append(
                (
                    str(seed),
                    steps(long.t_grok[i]),
                    steps(long.end[i]),
                    percent(accuracy.min()) if accuracy.size else NONE,
                    percent((accuracy < long.criteria[i]).mean()) if accuracy.size else NONE,
                    f"{decimal(usable.min())} to {decimal(usable.max())}" if usable.size else NONE,
                )
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


def _stop_rows(result: Forecasts) -> tuple[tuple[str, ...], ...]:
    runs, saved = result.runs, result.saved
    ends = [
        f"{percent(a)} ({steps(t)})"
        for a, t in zip(runs.at(runs.test_accuracy, runs.end), runs.end, strict=True)
    ]
    return tuple(
        by_run(
            runs,
            (steps, runs.t_grok, saved.crossed, saved.step),
            (percent, saved.accuracy),
            (str, ends),
            (percent, _part(saved.step, saved.budget)),
        )
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


EXPERIMENT = Experiment(
    "e5",
    "Does a power law forecast the time of grokking?",
    ("e1", "e2", "e3", "e5", "e7"),
    analyse,
    headline,
    claims,
    section,
)
