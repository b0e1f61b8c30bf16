"""E5 on runs that follow a known law, and stopping, cost and Table 5 on closed-form runs."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
from closed_form import write_run
from planted_columns import listed
from scipy import stats

from fastent.forecast.diagnosis import Phase
from fastent.forecast.history import History
from fastent.forecast.power_law import PowerLaw
from fastent.forecast.predict import predict_grok_time
from fastent.grokking.experiments import e5_forecast, figures
from fastent.grokking.experiments.data import Runs, read_runs
from fastent.grokking.experiments.document import Figure, Table, Verdict
from fastent.grokking.experiments.e5_forecast import CLOCK, LAW, RUNNING, Outcome
from fastent.grokking.experiments.statistics import over
from fastent.reference.forecast import interval_across, norm_contracting

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
    assert verdicts["e5.gamma"] == Verdict.REPRODUCED  # 1.5, within 0.65 of 1.65
    assert verdicts["e5.beats_clock"] == Verdict.UNDECIDED  # three runs
    # H is at H* at T_grok and below it 200 steps later only.
    assert verdicts["e5.imminent_at_crossing"] == Verdict.NOT_REPRODUCED
    assert verdicts["e5.accuracy_kept"] == Verdict.UNDECIDED  # four of four


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


TIMES = (2000, 2200, 2400, 2600, 3400)


def planted(tmp_path, times=TIMES, memorised=300, **columns):
    """Runs with the law's entropy, as `law` has it, and columns that are functions of T_grok and of the step."""
    for seed, t_grok in enumerate(times):
        own = {name: lambda step, f=f, t_grok=t_grok: f(t_grok, step) for name, f in columns.items()}
        write_run(
            tmp_path, "e1", "baseline", seed, t_grok=t_grok, last_step=t_grok + 1500, t_mem=memorised,
            **{"entropy": law(t_grok), **own},
        )  # fmt: skip
    return Runs(tuple(read_runs(tmp_path)))


def with_column(runs, name, column):
    """The same runs with a column more, a function of T_grok and of the step."""
    stored = [
        dataclasses.replace(run, rows=tuple({**row, name: column(t_grok, row["step"])} for row in run.rows))
        for run, t_grok in zip(runs.stored, runs.t_grok, strict=True)
    ]
    return dataclasses.replace(runs, stored=tuple(stored))


def test_clocks_are_those_of_the_other_runs_and_the_law_that_holds_has_no_error(tmp_path):
    contest = e5_forecast.contest(planted(tmp_path))
    plateau = contest.plateau
    assert contest.standing(LAW).error == pytest.approx(np.zeros(5), abs=1e-6)
    assert contest.best.rival.name == LAW
    running = e5_forecast._still_running(np.median)
    for run, t_grok in enumerate(TIMES):
        own, others = plateau.run == run, np.delete(TIMES, run)
        step = np.arange(300, t_grok, 100)
        left = np.maximum(others.mean() - step, 0)
        assert contest.standing(CLOCK).forecast[own] == pytest.approx(left)
        error = np.mean(np.abs(left - (t_grok - step))) / t_grok
        assert contest.standing(CLOCK).error[run] == pytest.approx(error)
        later = [others[others > now] for now in step]
        median = [np.median(rest) - now if rest.size else 0 for rest, now in zip(later, step, strict=True)]
        assert running(plateau, np.arange(5) != run)[own] == pytest.approx(median)
    assert sum(contest.standing(RUNNING).chosen.values()) == 5
    assert not contest.standing(CLOCK).advantage.known
    gain = contest.standing(CLOCK).error
    assert contest.standing(LAW).advantage.value == pytest.approx(gain.mean())


def test_first_passage_of_a_norm_that_decays_to_its_threshold_is_exact_from_t_mem_and_from_now(tmp_path):
    def norm(t_grok, step):
        return np.sqrt(norm_contracting(t_grok - step, v_star=900.0, rate=4e-4))

    runs = planted(tmp_path, norm=norm)
    contest = e5_forecast.contest(runs)
    standing = contest.standing("norm, first passage")
    assert standing.error == pytest.approx(np.zeros(5), abs=1e-9)
    assert contest.below.value == 0
    others = np.arange(5) != 2
    for once in (True, False):
        forecast = e5_forecast._first_passage(once=once)(contest.plateau, others)
        assert forecast == pytest.approx(contest.plateau.remaining)


def test_a_norm_that_never_moves_says_now_and_one_that_rises_has_no_first_passage(tmp_path):
    still = e5_forecast.contest(planted(tmp_path / "still"))
    assert not still.standing("norm, first passage").forecast.any()
    rising = e5_forecast.contest(planted(tmp_path / "up", norm=lambda t_grok, step: 30 + step / 100))
    assert (rising.below.value, rising.below.n) == (1, 5)


def test_training_loss_and_label_share_forecast_where_they_tell_and_only_where_they_were_recorded(tmp_path):
    runs = planted(tmp_path, train_loss=lambda t_grok, step: 0.01 * np.exp((t_grok - step) / 1000))
    assert "label share in five frequencies" not in [
        each.rival.name for each in e5_forecast.contest(runs).standings
    ]
    # The share reaches a half 900 steps before grokking, and nothing else of it tells.
    shares = with_column(runs, "top_share", lambda t_grok, step: 0.2 if step < t_grok - 900 else 0.6)
    contest = e5_forecast.contest(shares)
    loss = contest.standing("training loss")
    # A median of an exponential is one, only later, so any window is as good; exponents are a grid.
    assert loss.error.max() < 0.01
    near = contest.plateau.remaining <= 900
    share = contest.standing("label share in five frequencies")
    assert set(share.chosen) <= {"0.3 reached", "0.5 reached"}
    assert share.forecast[near] == pytest.approx(contest.plateau.remaining[near])


def test_what_is_chosen_for_a_run_does_not_see_it(tmp_path):
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(6, 60))

    def entropy(t_grok, step):
        return (
            0.6
            + (max(t_grok - step, 0) / 40_000) ** (1 / 1.5)
            + 0.005 * noise[TIMES.index(t_grok), step // 100]
        )

    def norm(t_grok, step):
        return 40 + (t_grok - step) / 200 + noise[TIMES.index(t_grok), step // 100]

    def share(t_grok, step):
        return min(max(0.9 - (t_grok - step) / 3000 + 0.05 * noise[TIMES.index(t_grok), step // 100], 0), 1)

    runs = with_column(planted(tmp_path, entropy=entropy, norm=norm), "top_share", share)
    first = runs.stored[0]
    # The first run groks 600 steps earlier, all that is measured of it until then being the same.
    early = dataclasses.replace(
        first,
        rows=tuple({**row, "test_accuracy": float(row["step"] >= TIMES[0] - 600)} for row in first.rows),
    )
    before, after = (
        e5_forecast.contest(dataclasses.replace(runs, stored=(one, *runs.stored[1:])))
        for one in (first, early)
    )
    shared = after.plateau.run == 0
    assert shared.sum() == (before.plateau.run == 0).sum() - 6
    for old, new in zip(before.standings, after.standings, strict=True):
        assert new.forecast[shared].tolist() == old.forecast[before.plateau.run == 0][: shared.sum()].tolist()
        others = before.plateau.run != 0
        assert old.forecast[others].tolist() != new.forecast[after.plateau.run != 0].tolist()


def test_false_alarms_are_forecasts_of_a_step_that_a_run_passes_without_grokking(tmp_path):
    runs = planted(tmp_path / "e1")
    # H stays where the law says 1,200 steps: every forecast but those of the last 1,200 steps is passed.
    held = 0.6 + (1200 / 40_000) ** (1 / 1.5)
    write_run(
        tmp_path / "never", "e7", "mlp", 0, t_grok=None, last_step=6000, max_steps=6000,
        entropy=lambda step: held,
    )  # fmt: skip
    never = Runs(tuple(read_runs(tmp_path / "never")))
    fitted = PowerLaw(c1=40_000.0, gamma=1.5, c2=0.0, h_star=0.6)
    contest = e5_forecast.contest(runs, Runs((*runs.stored, *never.stored)), fitted)
    assert contest.never == 1
    step = np.arange(300, 6001, 100)
    assert contest.standing(LAW).alarms.value == pytest.approx(np.mean(step + 1200 <= 6000 + 1e-6))
    assert contest.standing(CLOCK).alarms.value == 1
    assert contest.declined.value == 0
    assert contest.wrongly.value == pytest.approx(np.mean(step + 1200 <= 6000 + 1e-6))


def test_errors_at_the_last_evaluation_and_the_first_close_one_are_by_the_papers_definition(tmp_path):
    # In the last run H is too high by what the law takes for another 500 steps, until the very last evaluation.
    def entropy(t_grok, step):
        late = 500 if t_grok == 3400 and step < 3300 else 0
        return law(t_grok)(step - late)

    valid = e5_forecast.analyse(planted(tmp_path, entropy=entropy)).validation
    assert valid.now == pytest.approx([100 / t_grok for t_grok in TIMES])
    assert valid.last.shape == (5,)
    assert valid.last[-1] == pytest.approx(0, abs=1e-6)
    # 500 of 3,400 steps are under a fifth from the start on.
    assert valid.below.value == pytest.approx(np.mean(TIMES), rel=1e-6)


def test_after_grokking_slope_and_fall_are_those_of_the_1200_steps_after(tmp_path):
    runs = planted(
        tmp_path,
        entropy=lambda t_grok, step: 0.7 - 4e-5 * min(step - t_grok, 1200) if step >= t_grok else 0.8,
    )
    after = e5_forecast.after_grokking(runs)
    assert (after.falls.value, after.falls.n) == (1, 5)
    assert after.slope.value == pytest.approx(-4e-5)
    assert after.fall.value == pytest.approx(0.048)


def test_section_has_the_rivals_their_figure_and_other_settings(tmp_path):
    runs = planted(tmp_path / "e1")
    for seed, t_grok in enumerate(TIMES):
        write(tmp_path / "e6", seed, t_grok, experiment="e6", task="mul")
    others = tuple(read_runs(tmp_path / "e6"))
    result = e5_forecast.analyse(Runs((*runs.stored, *others), judged=True))
    blocks = e5_forecast.section(result).blocks
    tables = {block.columns[0]: block for block in blocks if isinstance(block, Table)}
    rivals = {row[0]: row for row in tables["forecast"].rows}
    assert rivals[LAW][2].startswith("0.0 %")
    assert rivals[RUNNING][5] == "median (3); mean (2)"
    assert tables["runs"].rows[0][:2] == ("E6: baseline, mul", "5")
    assert tables["runs"].rows[0][-1] == LAW
    assert "e5-rivals" in [block.name for block in blocks if isinstance(block, Figure)]
    claims = e5_forecast.claims(result)
    assert claims["e5.rivals"].verdict == Verdict.REPRODUCED
    assert "needs H" in e5_forecast.headline(result)
    assert result.guide.n == 5  # runs of other tasks are not diagnosed with this one's H*


def test_runs_on_other_pairs_are_neither_diagnosed_nor_false_alarms(tmp_path):
    runs = planted(tmp_path / "e1", TIMES[:4])
    for seed, changes in enumerate(({}, {"modulus": 41}, {"train_fraction": 0.2})):
        write_run(tmp_path / "e7", "e7", "mlp", seed, t_grok=None, **changes)
    result = e5_forecast.analyse(Runs((*runs.stored, *read_runs(tmp_path / "e7"))))
    assert result.contest.never == 1
    assert result.guide.n == 5


def test_where_h_rises_until_grokking_there_is_no_law_and_the_others_stand(tmp_path):
    runs = planted(tmp_path, entropy=lambda t_grok, step: 0.3 + step / 20_000)
    result = e5_forecast.analyse(dataclasses.replace(runs, judged=True))
    assert [each.rival.name for each in result.contest.standings[:2]] == [CLOCK, RUNNING]
    assert result.contest.standing(LAW) is None
    assert e5_forecast.claims(result)["e5.rivals"].verdict == Verdict.NOT_RUN
    assert any(getattr(block, "name", "") == "e5-rivals" for block in e5_forecast.section(result).blocks)


def test_a_run_that_lacks_a_rivals_column_raises_no_alarm_of_that_rival(tmp_path):
    runs = planted(tmp_path / "e1")
    shared = with_column(runs, "top_share", lambda t_grok, step: 0.2 if step < t_grok - 900 else 0.6)
    write_run(tmp_path / "never", "e2", "losses-0.1", 0, t_grok=None, last_step=6000, max_steps=6000)
    never = Runs(tuple(read_runs(tmp_path / "never")))
    contest = e5_forecast.contest(shared, Runs((*shared.stored, *never.stored)))
    assert contest.standing(CLOCK).alarms.value == 1
    assert not contest.standing("label share in five frequencies").alarms.known


def test_three_runs_are_too_few_to_leave_two_out_and_the_section_says_so(stored):
    result = e5_forecast.analyse(Runs(tuple(stored[:3]), judged=True))
    assert result.contest is None
    assert e5_forecast.claims(result)["e5.rivals"].verdict == Verdict.NOT_RUN
    assert any("Fewer than 4" in getattr(b, "text", "") for b in e5_forecast.section(result).blocks)


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


def test_intervals_of_runs_left_out_have_no_width_where_the_law_holds_and_the_clocks_are_the_references():
    times, runs = 2_000 + 400 * np.arange(10), []
    for t_grok in times:
        step = np.arange(0, t_grok + 1, 200)
        runs.append(History(step, 0.625 + ((t_grok - step) / 40_000) ** (1 / 1.5), t_grok))

    def clock(others, step):
        later = others[others > step]
        return np.median(later) if later.size else step

    held, widths = [], []
    for i, t_grok in enumerate(times):
        others = np.delete(times, i)
        rest = [np.delete(others, j) for j in range(9)]
        misses = [
            max(abs(clock(them, step) - own) for step in range(0, own, 200))
            for own, them in zip(others, rest, strict=True)
        ]
        ends = []
        for step in range(0, t_grok, 200):
            low, high = interval_across([clock(them, step) for them in rest], misses)
            ends.append((max(low, step), high))
        held.append(all(low <= t_grok <= high for low, high in ends))
        widths.append(np.mean([high - low for low, high in ends]) / t_grok)
    found = e5_forecast.spans(runs)
    assert found.law_width.n == 10
    assert found.law_width.value == pytest.approx(0, abs=1e-6)
    assert found.clock_held.value == pytest.approx(np.mean(held))
    assert found.clock_width.value == pytest.approx(np.mean(widths), rel=1e-12)
    assert e5_forecast.spans(runs[:9]) is None
    assert e5_forecast.spans([History(run.step, 1 - run.entropy, run.t_grok) for run in runs]) is None


@pytest.mark.nightly
def test_intervals_hold_as_many_of_the_recorded_runs_as_they_promise():
    found = e5_forecast.analyse(Runs(tuple(read_runs(Path("bench/results/paper"))))).spans
    assert len(found) == 4
    runs = sum(each.law_held.n for each in found.values())
    for held in ("law_held", "clock_held"):
        missed = sum(round((1 - getattr(each, held).value) * 10) for each in found.values())
        # As many as chance allows of 90 %, by both tails.
        assert stats.binom.cdf(missed, runs, 0.1) > 0.01
        assert stats.binom.sf(missed - 1, runs, 0.1) > 0.01


@pytest.mark.nightly
def test_what_predict_grok_time_says_of_the_recorded_runs_is_what_they_say():
    runs = Runs(tuple(read_runs(Path("bench/results/paper"))))
    said = " ".join(predict_grok_time.__doc__.split())
    add = e5_forecast.contest(runs.select("e1"))
    for name in (RUNNING, LAW, CLOCK):
        assert f"{e5_forecast.percent_of(add.standing(name).mean.value)}" in said
    for task, winner in (("s5", RUNNING), ("sub", LAW)):
        other = e5_forecast.contest(runs.select("e6", "baseline", task))
        first, second = (e5_forecast.percent_of(other.standing(name).mean.value) for name in (RUNNING, LAW))
        assert f"{first} against the law's {second}" in said or f"{second} against {first}" in said
        assert other.best.rival.name == winner
    assert add.best.rival.name == RUNNING
    # "cannot tell these three apart"
    errors = [add.standing(name).error for name in (RUNNING, LAW, CLOCK)]
    for one, other in itertools.combinations(errors, 2):
        difference = over(other - one)
        assert difference.low < 0 < difference.high
    assert len(add.standings) == 7
