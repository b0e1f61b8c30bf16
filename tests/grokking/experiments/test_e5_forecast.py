"""E5 on runs that follow a known law, and stopping, cost and Table 5 on closed-form runs."""

import numpy as np
import pytest
from closed_form import write_run
from planted_columns import listed

from fastent.forecast.diagnosis import Phase
from fastent.grokking.experiments import e5_forecast, figures
from fastent.grokking.experiments.data import Runs, read_runs
from fastent.grokking.experiments.document import Table, Verdict
from fastent.grokking.experiments.e5_forecast import Outcome

RISE = 100


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    monkeypatch.setattr(figures, "both", lambda draw: (draw(), ("<svg/>", "<svg/>"))[1])


def law(t_grok):
    """H = 0.6 + ((T_grok - t) / 40,000)^(1/1.5), and 0.55 from 200 steps after T_grok on."""
    return lambda step: 0.55 if step >= t_grok + 200 else 0.6 + (max(t_grok - step, 0) / 40_000) ** (1 / 1.5)


def write(out, seed, t_grok, **options):
    return write_run(
        out, options.pop("experiment", "e1"), options.pop("condition", "baseline"), seed, t_grok=t_grok,
        last_step=t_grok + 1500, entropy=law(t_grok), max_steps=50_000, **options,
    )  # fmt: skip


@pytest.fixture
def stored(tmp_path):
    for seed in range(4):
        write(tmp_path, seed, 2000 + 400 * seed)
    return read_runs(tmp_path)


@pytest.fixture
def result(stored):
    return e5_forecast.analyse(Runs(tuple(stored), judged=True))


def test_a_planted_law_is_found_and_forecasts_runs_left_out_where_the_clock_cannot(result):
    assert result.law.gamma == pytest.approx(1.5, rel=1e-4)
    assert result.law.h_star == pytest.approx(0.6)
    assert result.law.r_squared == pytest.approx(1, abs=1e-9)
    assert result.profile[3] == max(result.profile)
    valid = result.validation
    assert valid.law.value == pytest.approx(0, abs=1e-6)
    # The others' mean T_grok, seed by seed, off by 800, 267, 267 and 800 steps; forecasts are cut at 0.
    assert valid.clock.value > 0.1
    assert valid.better.value == 1
    assert valid.advantage.value == pytest.approx(valid.clock.value, abs=1e-6)
    # First evaluation after T_mem = 300, in each run.
    assert valid.warning.value == pytest.approx(np.mean([2000, 2400, 2800, 3200]) - 300)


def test_claims_on_the_planted_law(result):
    verdicts = {name: found.verdict for name, found in e5_forecast.claims(result).items()}
    assert verdicts["e5.r2"] == Verdict.NOT_REPRODUCED
    assert verdicts["e5.gamma"] == Verdict.IN_PART
    assert verdicts["e5.beats_clock"] == Verdict.IN_PART  # three runs
    # H is at H* at T_grok and below it 200 steps later only.
    assert verdicts["e5.imminent_at_crossing"] == Verdict.NOT_REPRODUCED
    assert verdicts["e5.accuracy_kept"] == Verdict.REPRODUCED


def test_too_few_runs_give_no_law_and_say_so(stored):
    result = e5_forecast.analyse(Runs(tuple(stored[:2]), judged=False))
    assert (result.law, result.validation) == (None, None)
    verdicts = [found.verdict for found in e5_forecast.claims(result).values()]
    assert verdicts[:5] == [Verdict.NOT_RUN] * 5
    assert "too few runs" in e5_forecast.headline(result)
    assert any("Fewer than three" in getattr(b, "text", "") for b in e5_forecast.section(result).blocks)
    assert e5_forecast.analyse(Runs((), judged=False)) is None


def test_runs_that_never_grok_are_not_stopped_and_have_no_law(tmp_path):
    for seed in range(3):
        write_run(tmp_path, "e1", "baseline", seed, t_grok=None)
    result = e5_forecast.analyse(Runs(tuple(read_runs(tmp_path)), judged=True))
    assert "No run crosses the H* of the other seeds" in e5_forecast.headline(result)
    assert {found.verdict for found in list(e5_forecast.claims(result).values())[:7]} == {Verdict.NOT_RUN}
    e5_forecast.section(result)


def test_stopping_saves_what_the_crossing_leaves_of_the_budget_and_reads_the_accuracy_known_then(tmp_path):
    # Seeds cross 0.7 at 900, 1,000 and 1,100, and grok 400 later, at the very stop, never.
    grokking = (1300, 2000, None)
    for seed, t_grok in enumerate(grokking):
        end = 900 + 100 * seed
        write_run(
            tmp_path, "e1", "baseline", seed, t_grok=t_grok, last_step=4000, max_steps=4000,
            entropy=lambda step, end=end, at=t_grok: 0.9 if step < end else 0.7 if step == at else 0.5,
        )  # fmt: skip
    runs = Runs(tuple(read_runs(tmp_path)))
    found = e5_forecast.savings(runs, 4000)
    assert found.crossed.tolist() == [900, 1000, 1100]
    assert found.step.tolist() == [1900, 2000, 2100]
    assert found.accuracy.tolist() == [1.0, 1.0, 0.0]
    assert found.saved.value == pytest.approx(np.mean([2100, 2000, 1900]) / 4000)
    assert found.saved_by_accuracy.value == pytest.approx((2700 + 2000 + 0) / 3 / 4000)
    assert (found.grokked.value, found.within.value) == (2 / 3, 2 / 3)


def test_a_run_that_never_crosses_saves_nothing_and_is_not_stopped(measure):
    runs = [measure([0.9] * 5, [0, 0, 0, 1, 1], seed=s) for s in range(2)] + [
        measure([0.9, 0.8, 0.7, 0.6, 0.5], [0] * 5)
    ]
    found = e5_forecast.savings(Runs(tuple(runs)), 1000)
    assert listed(found.step) == [None, None, 1100]
    assert found.saved.value == 0
    assert found.grokked.n == 1


def timing(monitor, elapsed, seeds=2):
    rows = [{"event": "start", "step": 0, "time": 0.0, "seconds": 5.0}]
    for k in range(4):
        row = {"event": "evaluation", "step": k, "time": 0.0, "seconds": 5.0 + elapsed * (k + 1) / 4}
        rows.append({**row, "monitor_seconds": monitor, "seeds": seeds})
    return rows


def test_cost_is_the_share_of_the_executions_time_and_milliseconds_a_run(tmp_path):
    # Two executions: 10 and 20 seconds; eight evaluations of a stack of two, 30 ms each.
    again = [
        {**row, "event": "resume" if row["event"] == "start" else row["event"]} for row in timing(0.03, 20.0)
    ]
    write(tmp_path, 0, 2000, timing=[*timing(0.03, 10.0), *again])
    write(tmp_path, 1, 2000)
    cost = e5_forecast.monitor_cost(Runs(tuple(read_runs(tmp_path))))
    assert cost.share.value == pytest.approx(8 * 0.03 / 30)
    assert cost.milliseconds.value == pytest.approx(15)
    assert cost.share.n == 1
    assert e5_forecast.monitor_cost(Runs(tuple(read_runs(tmp_path)[1:]))) is None


def test_table_5_counts_what_was_said_against_what_came(measure):
    # Every 100 steps: H high for 20 evaluations, then falling by 0.02 to 0.5; grokked at 3,500, or never.
    entropy = [0.9] * 20 + [0.9 - 0.02 * k for k in range(1, 21)]
    test = [0.0] * 35 + [1.0] * 5
    groks = measure(entropy, test, seed=1)
    never = measure(entropy, [0.0] * 40, seed=2)
    baseline = Runs((measure([0.9, 0.625], [0.0, 1.0], seed=9),))
    found = e5_forecast.guide(Runs((groks, never)), baseline)
    assert found.n == 2
    assert sum(found.shares.values()) == pytest.approx(1)
    assert found.evaluations[Phase.NEAR_THRESHOLD, Outcome.LATER] == 0
    near = found.evaluations[Phase.NEAR_THRESHOLD, Outcome.SOON]
    # A median of three, within 0.02 of 0.625 from 0.64 on: at step 3,300 the median is that of 3,200.
    assert near == 2
    assert found.evaluations[Phase.NEAR_THRESHOLD, Outcome.NEVER] == 40 - 33
    assert found.imminent.value == pytest.approx(1 / 2)
    assert (found.warned.value, found.warned.n) == (1, 1)
    assert found.evaluations[Phase.NOT_ENOUGH_HISTORY, Outcome.LATER] == 4
    assert not found.given_up.known


def test_table_5_leaves_the_runs_own_threshold_out(measure):
    run = measure([0.9, 0.8, 0.7, 0.6, 0.5, 0.4], [0, 0, 0, 0, 0, 1.0], seed=3)
    assert e5_forecast.guide(Runs((run,)), Runs((run,))) is None


def test_section_holds_the_long_runs_and_the_confusion_matrix(tmp_path, stored):
    write(tmp_path / "more", 0, 2000, experiment="e5", condition="to-the-end")
    runs = [*stored, *read_runs(tmp_path / "more")]
    result = e5_forecast.analyse(Runs(tuple(runs), judged=False))
    tables = {
        block.columns[0]: block for block in e5_forecast.section(result).blocks if isinstance(block, Table)
    }
    assert tables["parameter"].rows[2][1].startswith("1.50")
    assert tables["diagnosis"].columns[1:4] == tuple(outcome.value for outcome in Outcome)
    captions = [b.caption for b in e5_forecast.section(result).blocks if isinstance(b, Table)]
    assert any("trained on to the limit" in caption for caption in captions)
    assert len(result.long) == 1
    assert result.guide.n == 4  # the run to the end repeats one of E1's
