"""E5's part of the report: its figures, its tables and what they say."""

from __future__ import annotations

import functools

import numpy as np

from fastent.diagnosis import Phase
from fastent.experiments import e4_figures
from fastent.experiments.claims import NONE, counted, decimal, percent, steps, worded
from fastent.experiments.delay_blocks import drawn, span
from fastent.experiments.document import Block, Section, Table, Text
from fastent.experiments.e5_claims import in_percent
from fastent.experiments.e5_forecast import GAMMAS, TITLE, Forecasts, parameter
from fastent.experiments.savings import AFTER, Stop
from fastent.experiments.table5 import Guide, Outcome
from fastent.triples import Triples


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
                e4_figures.remaining_against_gap, gaps, left, (grid, law.remaining(grid + law.h_star))
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
