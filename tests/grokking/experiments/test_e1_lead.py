"""E1 on closed-form runs: its analysis, its verdicts and its section."""

import pytest
from planted_columns import listed

from fastent.grokking.experiments import e1_lead, figures
from fastent.grokking.experiments.data import Runs, read_runs
from fastent.grokking.experiments.document import Table, Text, Verdict


@pytest.fixture
def result(three_runs):
    return e1_lead.analyse(Runs(tuple(read_runs(three_runs)), judged=False))


@pytest.fixture
def undrawn(monkeypatch):
    """Sections without the time that drawing takes; what is drawn is tested in test_figures."""
    monkeypatch.setattr(figures, "both", lambda draw: ("<svg/>", "<svg/>"))


def verdicts(result):
    return {name: found.verdict for name, found in e1_lead.claims(result).items()}


def test_analysis_has_the_closed_form_times_thresholds_and_leads(result):
    assert result.runs.seeds == [0, 1, 2]
    assert result.runs.t_mem.tolist() == [300, 300, 300]
    assert result.runs.t_grok.tolist() == [1500, 1600, 1700]
    # H at grokking: 0.85 - 0.01 * 20, 0.86 - 0.01 * 22, 0.87 - 0.01 * 24.
    assert result.h_star.value == pytest.approx((0.65 + 0.64 + 0.63) / 3)
    assert result.left_out.thresholds == pytest.approx((0.635, 0.640, 0.645))
    assert listed(result.left_out.times) == [1600, 1650, 1650]
    assert listed(result.left_out.leads) == [-100, -50, 50]
    assert listed(result.pooled.leads) == [-100, -50, 0]
    assert listed(result.own.leads) == [-50, -50, -50]
    # 0.01 an evaluation from step 500 on: more than 0.05 below the level, and below H 1,000 steps before, from 300 on.
    assert listed(result.fall.times)[:2] == [800, 800]
    assert listed(result.paper_fall.times) == [1300, 1300, 1300]
    assert (result.fall.lasting.value, result.paper_fall.lasting.value) == (1, 1)
    assert result.t_grok.value == 1600


def test_claims_judge_the_closed_form_runs(result):
    got = verdicts(result)
    # Three of three are too few to say "in every run".
    assert got["e1.memorises_early"] == Verdict.UNDECIDED
    assert got["e1.t_grok"] == Verdict.OTHER_SETTING
    assert got["e1.h_star"] == Verdict.OTHER_SETTING
    assert got["e1.h_star_stable"] == Verdict.UNDECIDED  # 0.01, up to 0.06 by its interval
    assert got["e1.precedes"] == Verdict.NOT_REPRODUCED
    assert got["e1.precedes_left_out"] == Verdict.NOT_REPRODUCED
    assert got["e1.collapse"] == got["e1.collapse_ours"] == Verdict.UNDECIDED
    assert got["e1.collapse_at_half"] == got["e1.collapse_ours_at_half"] == Verdict.UNDECIDED
    assert got["e1.phase_1_stable"] == Verdict.UNDECIDED
    assert got["e1.norm_grows"] == Verdict.NOT_REPRODUCED


def test_numbers_of_the_paper_are_judged_only_in_its_setting(three_runs):
    runs = read_runs(three_runs)
    got = verdicts(e1_lead.analyse(Runs(tuple(runs), judged=True)))
    assert got["e1.t_grok"] == Verdict.NOT_REPRODUCED
    assert got["e1.h_star"] == Verdict.UNDECIDED  # 0.64, from 0.62 to 0.66: within and beyond 0.02 of 0.609


def test_without_a_run_of_e1_there_is_no_analysis(tmp_path, writer):
    writer(tmp_path, 0, experiment="e2")
    assert e1_lead.analyse(Runs(tuple(read_runs(tmp_path)))) is None


def test_a_run_that_does_not_grok_is_kept_to_its_end_in_the_mean_time(tmp_path, writer):
    writer(tmp_path, 0, t_grok=1500)
    writer(tmp_path, 1, t_grok=None, last_step=2500)
    result = e1_lead.analyse(Runs(tuple(read_runs(tmp_path)), judged=False))
    assert result.t_grok.value == pytest.approx((1500 + 2500) / 2)
    assert "restricted to step 2500" in result.t_grok.method
    assert verdicts(result)["e1.memorises_early"] == Verdict.NOT_REPRODUCED


def test_runs_that_never_grok_leave_nothing_to_lead(tmp_path, writer, undrawn):
    for seed in range(2):
        writer(tmp_path, seed, t_grok=None)
    result = e1_lead.analyse(Runs(tuple(read_runs(tmp_path)), judged=True))
    got = verdicts(result)
    assert got["e1.t_grok"] == Verdict.NOT_RUN
    assert got["e1.precedes"] == Verdict.NOT_RUN
    assert e1_lead.headline(result) == "E1: 0 of 2 runs grok; there is no lead to measure."
    assert e1_lead.section(result).anchor == "e1"


def test_section_tables_hold_the_closed_form_values(result, undrawn):
    tables = [block for block in e1_lead.section(result).blocks if isinstance(block, Table)]
    times, values = tables[:2]
    assert times.rows[0] == (
        *("0", "300", "1,500", "1,500", "0.635", "1,600", "−100", "800", "700", "100 %", "25 %", "2,500"),
    )
    assert values.rows[2][:6] == ("2", "0.870", "0.870", "0.870", "0.630", "0.570")
    assert values.rows[2][6:10] == ("120.0", "117.0", "103.0", "95.0")
    rules = tables[2]
    assert [row[1] for row in rules.rows] == ["0.630 to 0.650", "0.640", "0.635 to 0.645", "–", "–"]
    assert [row[4] for row in rules.rows] == [
        "100 % to 100 %",
        "100 % to 100 %",
        "25 % to 100 %",
        "25 % to 25 %",
        "25 % to 25 %",
    ]
    assert [row[5] for row in rules.rows] == ["0"] * 5
    assert [row[6] for row in rules.rows] == ["–", "–", "–", "3 of 3", "3 of 3"]


def test_headline_and_sweep_say_what_the_runs_show(result, undrawn):
    assert "3 of 3 runs grok, at step 1,600 on average, where H is 0.640" in e1_lead.headline(result)
    assert "came before T_grok in 3 of 3 runs" in e1_lead.headline(result)
    assert "other seeds before T_grok in 1 of 3 runs" in e1_lead.headline(result)
    said = " ".join(block.text for block in e1_lead.section(result).blocks if isinstance(block, Text))
    assert "Every threshold from 0.665 to 0.840" in said


def test_a_collapse_amid_the_rise_precedes_the_criterion_but_not_half_the_accuracy(measure):
    # H falls by 0.1 at step 600, when the test accuracy is 0.6 already; it reaches the criterion at 1,000.
    entropy, test = [0.9, 0.9, 0.9, 0.8, 0.7, 0.6], [0, 0, 0.5, 0.6, 0.9, 1.0]
    runs = [measure(entropy, test, seed=s, every=200) for s in range(5)]
    got = verdicts(e1_lead.analyse(Runs(tuple(runs), judged=False)))
    assert got["e1.collapse_ours"] == Verdict.REPRODUCED
    assert got["e1.collapse_ours_at_half"] == Verdict.NOT_REPRODUCED


def test_sensitivity_leaves_out_what_falls_before_memorising_and_has_both_windows(measure, undrawn):
    # Every 50 steps: a dip by 0.03 at step 100, before T_mem at 200; then 0.006 an evaluation from 200 on.
    entropy = [0.9, 0.9, 0.87, 0.9, 0.9] + [0.9 - 0.006 * i for i in range(1, 31)]
    test = [0.0] * 34 + [1.0]
    runs = [measure(entropy, test, seed=s, every=50, t_mem=200) for s in range(3)]
    section = e1_lead.section(e1_lead.analyse(Runs(tuple(runs), judged=False)))
    table = next(b for b in section.blocks if isinstance(b, Table) and b.columns[0] == "signal")
    rows = {row[0]: row[3] for row in table.rows}
    # T_grok is 1,700; 0.024 below the level of step 200 at step 400, 0.054 at 650; 1,000 steps before from 1,200 on.
    assert rows["a fall of H by more than 0.02 within 800 steps (our T_collapse)"] == "3 of 3; 1,300"
    assert rows["a fall of H by more than 0.05 within 800 steps (our T_collapse)"] == "3 of 3; 1,050"
    lower = "H lower by more than {} than 1,000 steps before (the paper's T_collapse)"
    assert rows[lower.format(0.02)] == rows[lower.format("0.1")] == "3 of 3; 500"
