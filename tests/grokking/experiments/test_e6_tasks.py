"""E6 on planted runs: the rows of Table 3, the relabelling controls, S5's representations."""

import pytest
from planted_columns import EVERY, planted, tables

from fastent.grokking.experiments import e6_tasks, figures
from fastent.grokking.experiments.data import Runs
from fastent.grokking.experiments.document import Verdict
from fastent.grokking.experiments.jobs import planned
from fastent.grokking.train.config import TrainConfig, preset

ADD, S5, IMAGES, MUL, SUB, MUL_NONZERO, LESS, OWN_SUB, OWN_ADD = planned(
    "e6", preset("paper"), "paper", range(10)
)
ROWS = 120


def run(job, seed, t_grok, h_star, *, dip=None, **columns):
    """Entropy falls on a line through `h_star` at `t_grok`, 0.002 an evaluation; a fall by 0.1 at step `dip`."""
    at = t_grok // EVERY
    entropy = [h_star + 0.002 * (at - k) for k in range(ROWS)]
    if dip is not None:
        entropy = [h if k < dip // EVERY else h - 0.1 for k, h in enumerate(entropy)]
    return planted(job, seed, test=[float(k >= at) for k in range(ROWS)], entropy=entropy, **columns)


def some(job, t_grok, h_star, *, n=5, **more):
    """Seeds around the given means: T_grok 200 apart, H* 0.001 apart."""
    middle = (n - 1) // 2
    return [
        run(job, s, t_grok + EVERY * (s - middle), h_star + 0.001 * (s - middle), **more) for s in range(n)
    ]


@pytest.fixture
def undrawn(monkeypatch):
    monkeypatch.setattr(figures, "both", lambda draw: ("<svg/>", "<svg/>"))


@pytest.fixture
def runs():
    shares = {"41": 0.6, "32": 0.1, "311": 0.1, "221": 0.1, "2111": 0.05, "11111": 0.05}
    return [
        *some(ADD, 14_000, 0.605),
        *some(MUL, 21_600, 0.589),
        *some(SUB, 16_000, 0.55),
        *some(S5, 4_400, 0.655, n=10, **{f"isotypic_{k}": v for k, v in shares.items()}),
    ]


@pytest.fixture
def controls():
    return [
        *some(MUL_NONZERO, 12_000, 0.6),
        *some(LESS, 12_200, 0.6005),
        *some(OWN_SUB, 18_000, 0.5),
        *some(OWN_ADD, 12_000, 0.6),
    ]


def test_rows_hold_the_planted_times_and_thresholds(runs):
    tasks = e6_tasks.analyse(Runs(tuple(runs))).tasks
    assert {name: (t.t_grok.value, round(t.h_star.value, 4)) for name, t in tasks.items()} == {
        "add": (14_000, 0.605),
        "mul": (21_600, 0.589),
        "sub": (16_000, 0.55),
        "s5": (4_500, 0.6555),
    }
    assert tasks["s5"].grokked.n == 10


def test_claims_judge_the_rows_by_number_and_share(runs):
    claims = e6_tasks.claims(e6_tasks.analyse(Runs(tuple(runs))))
    assert claims["e6.add"].verdict == Verdict.REPRODUCED
    assert claims["e6.mul"].verdict == Verdict.REPRODUCED
    assert claims["e6.sub"].verdict == Verdict.NOT_REPRODUCED  # 16,000 for 21,560
    assert claims["e6.s5"].verdict == Verdict.REPRODUCED
    assert claims["e6.modular"].verdict == Verdict.NOT_REPRODUCED  # 0.055 apart
    assert claims["e6.rows_alike"].verdict == Verdict.NOT_REPRODUCED
    assert claims["e6.s5_threshold"].verdict == Verdict.REPRODUCED
    assert claims["e6.not_commuting"].ours.startswith("94 %")


def test_rows_are_alike_within_the_margins_and_undecided_across_them():
    alike = [*some(MUL, 21_600, 0.589), *some(SUB, 21_600, 0.589)]
    assert (
        e6_tasks.claims(e6_tasks.analyse(Runs(tuple(alike))))["e6.rows_alike"].verdict == Verdict.REPRODUCED
    )
    few = [*some(MUL, 21_600, 0.589)[:1], *some(SUB, 21_600, 0.589)[:1]]
    assert e6_tasks.claims(e6_tasks.analyse(Runs(tuple(few))))["e6.rows_alike"].verdict == Verdict.UNDECIDED


def test_a_run_that_does_not_grok_is_kept_to_the_limit_of_steps():
    stuck = planted(MUL, 5, test=[0.0] * 251, entropy=[0.9] * 251)
    task = e6_tasks.analyse(Runs((*some(MUL, 20_000, 0.6), stuck))).tasks["mul"]
    assert task.grokked.value == pytest.approx(5 / 6)
    assert task.t_grok.value == pytest.approx((5 * 20_000 + 50_000) / 6)


def test_claims_about_runs_that_grok_have_no_case_where_none_does(runs):
    stuck = [planted(S5, seed, test=[0.0] * 251, entropy=[0.9] * 251) for seed in range(10)]
    claims = e6_tasks.claims(e6_tasks.analyse(Runs((*runs[:5], *stuck))))
    for name in ("e6.pattern", "e6.s5_window", "e6.s5_threshold"):
        assert claims[name].verdict == Verdict.NO_CASE
        assert claims[name].ours.startswith("S5: grokked 0 of 10 runs")
    assert claims["e6.s5"].verdict == Verdict.NOT_REPRODUCED


def test_numbers_of_the_paper_are_judged_only_in_its_setting():
    quick = {job.config.task: job for job in planned("e6", preset("quick"), "quick", range(10))[:4]}
    claims = e6_tasks.claims(e6_tasks.analyse(Runs(tuple(some(quick["mul"], 21_600, 0.589)))))
    assert claims["e6.mul"].verdict == Verdict.OTHER_SETTING


def test_one_run_of_a_task_has_no_other_seeds_to_be_preceded_by(runs):
    alone = [run for run in runs if run.seed == 0 and run.experiment == "e6"]
    assert (
        e6_tasks.claims(e6_tasks.analyse(Runs((*runs[:5], *alone))))["e6.pattern"].verdict == Verdict.NOT_RUN
    )


def test_ten_runs_do_not_tell_the_papers_five_of_ten_from_others():
    dips = [2_000] * 5 + [None] * 5
    s5 = [run(S5, s, 4_400, 0.655, dip=dip) for s, dip in enumerate(dips)]
    claim = e6_tasks.claims(e6_tasks.analyse(Runs(tuple(s5))))["e6.s5_window"]
    assert claim.ours.startswith("5 of 10")
    assert claim.verdict == Verdict.UNDECIDED


def test_controls_that_agree_and_that_do_not_are_told_apart(runs, controls):
    result = e6_tasks.analyse(Runs((*runs, *controls)))
    assert [(d.first.name, d.second.name) for d in result.controls] == [
        ("addition modulo p - 1", "mul_nonzero"),
        ("addition, own tokens", "subtraction, own tokens"),
    ]
    assert [d.t_grok.value for d in result.controls] == [-200, 6_000]
    assert e6_tasks.claims(result)["e6.relabelled"].verdict == Verdict.NOT_AS_EXPECTED
    alike = e6_tasks.analyse(Runs((*runs, *controls[:10])))
    assert e6_tasks.claims(alike)["e6.relabelled"].verdict == Verdict.AS_EXPECTED
    (tokens,) = alike.contrasts
    assert tokens.t_grok.value == 2_000
    assert "1 of 2 pairs of tasks that are one under other names surely agree" in e6_tasks.headline(result)


def test_where_no_run_groks_nothing_is_compared(undrawn):
    stuck = [
        planted(job, seed, test=[0.0] * 251, entropy=[0.9] * 251)
        for job in (MUL, SUB, MUL_NONZERO, LESS)
        for seed in range(2)
    ]
    result = e6_tasks.analyse(Runs(tuple(stuck)))
    assert not result.controls[0].t_grok.known
    claims = e6_tasks.claims(result)
    for name in ("e6.relabelled", "e6.rows_alike", "e6.modular"):
        assert claims[name].verdict == Verdict.NOT_RUN
    assert claims["e6.mul"].verdict == Verdict.NOT_REPRODUCED
    assert e6_tasks.section(result).anchor == "e6"


def test_without_a_run_of_e6_there_is_no_analysis(runs):
    assert e6_tasks.analyse(Runs(tuple(some(ADD, 14_000, 0.6)))) is None


def test_share_of_pairs_that_do_not_commute_is_counted():
    assert e6_tasks.not_commuting(TrainConfig(task="s5")) == pytest.approx(1 - 7 / 120, rel=1e-12)
    assert e6_tasks.not_commuting(TrainConfig(task="sub", modulus=7)) == pytest.approx(6 / 7)
    assert e6_tasks.not_commuting(TrainConfig(task="add")) == 0


def test_shares_without_structure_are_the_squared_dimensions():
    assert e6_tasks.chance_shares()["311"] == pytest.approx(36 / 119)
    assert sum(e6_tasks.chance_shares().values()) == pytest.approx(1)


def test_section_sets_the_rows_beside_the_papers(runs, controls, undrawn):
    found = tables(e6_tasks.section(e6_tasks.analyse(Runs((*runs, *controls)))))
    rows = {row[0]: row for row in found["Table 3 with ours"].rows}
    assert rows["multiplication"][3:5] == ("21,560", "21,600 steps (95 % CI 21,207 to 21,993; n = 5)")
    assert rows["multiplication without 0"][3] == "–"
    assert list(rows)[:4] == ["addition", "multiplication", "subtraction", "S5"]
    pairs = found["Pairs of tasks: differences of mean T_grok and of mean H*"].rows
    assert [row[1] for row in pairs] == ["yes", "yes", "no"]
    isotypic = found["Shares of the irreducible representations of S5"].rows
    assert isotypic[0][:2] == ("(4, 1)", "0.134")
    assert isotypic[0][3].startswith("0.600")


def test_figures_have_a_column_for_each_task_and_a_panel_for_each_representation(runs):
    result = e6_tasks.analyse(Runs(tuple(runs)))
    drawn = e6_tasks.trajectories(result)
    titles = [axes.get_title(loc="left") or axes.get_title() for axes in drawn.axes[:4]]
    assert titles == ["Addition", "Multiplication", "Subtraction", "S5"]
    panels = e6_tasks.isotypic(result.tasks["s5"]).axes
    assert len(panels) == 6
    heights = sorted({float(y) for line in panels[0].lines for y in line.get_ydata()})
    assert heights == pytest.approx([16 / 119, 0.6])


def test_s5_as_ten_tokens_stands_beside_s5_as_two_and_in_no_row_of_the_papers(runs, undrawn):
    result = e6_tasks.analyse(Runs((*runs, *some(IMAGES, 6_500, 0.7, n=10))))
    assert "s5_images" not in result.tasks
    tokens = result.contrasts[-1]
    assert (tokens.second.title, tokens.t_grok.value) == ("S5, ten tokens", 2_000)
    section = e6_tasks.section(result)
    pairs = tables(section)["Pairs of tasks: differences of mean T_grok and of mean H*"].rows
    assert pairs[-1][:2] == ("S5, ten tokens less S5", "no")
    assert e6_tasks.claims(result)["e6.s5"].verdict == Verdict.REPRODUCED
