"""Verdicts and the wording of numbers.

The paper's arithmetic, and that every claim a summary must name has a claim that covers it.

What is not so in the paper, against the closed forms of the counterexamples.
"""

import dataclasses
import inspect
import itertools
import math
import re

import pytest
from closed_form import write_run

from fastent.grokking.experiments import (
    claims,
    e1_lead,
    e2_mixing,
    e3_norm,
    e4_predictors,
    e5_forecast,
    e6_tasks,
    e7_mlp,
    e8_probes,
)
from fastent.grokking.experiments.claims import (
    counted,
    decimal,
    judge_positive,
    judge_share,
    judge_within,
    percent,
    steps,
    worded,
)
from fastent.grokking.experiments.data import Runs, read_runs
from fastent.grokking.experiments.document import Verdict
from fastent.grokking.experiments.report import EXPERIMENTS, together
from fastent.grokking.experiments.statistics import UNKNOWN, Estimate, over, proportion
from fastent.reference.entropy import entropy_of_eigenvalues


@pytest.mark.parametrize(
    ("successes", "n", "verdict"),
    [
        (10, 10, Verdict.REPRODUCED),
        (5, 5, Verdict.REPRODUCED),  # 0.05 ** (1 / 5) = 0.549
        (4, 4, Verdict.UNDECIDED),  # 0.473: half of all seeds might fail
        (1, 1, Verdict.UNDECIDED),
        (9, 10, Verdict.IN_PART),  # surely more than 0.606
        (8, 10, Verdict.NOT_REPRODUCED),  # 0.493
        (1, 2, Verdict.NOT_REPRODUCED),
        (0, 10, Verdict.NOT_REPRODUCED),
    ],
)
def test_every_run_is_refuted_by_one_and_undecided_by_few(successes, n, verdict):
    assert judge_share(proportion(successes, n)) == verdict


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (-9, 10, Verdict.REPRODUCED),
        (1, 9, Verdict.REPRODUCED),
        (11, 12, Verdict.NOT_REPRODUCED),
        (-12, -11, Verdict.NOT_REPRODUCED),
        (9, 11, Verdict.UNDECIDED),
        (-50, 50, Verdict.UNDECIDED),
        (math.nan, math.nan, Verdict.UNDECIDED),  # without an interval nothing is decided
    ],
)
def test_a_number_is_the_same_within_the_margin_and_undecided_across_it(low, high, verdict):
    assert judge_within(Estimate(0.0, low, high, 5), 10) == verdict


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (1, 20, Verdict.REPRODUCED),
        (1, 9, Verdict.IN_PART),  # surely more than 0, and too little to matter
        (-5, 9, Verdict.NOT_REPRODUCED),
        (-5, 11, Verdict.UNDECIDED),
        (math.nan, math.nan, Verdict.UNDECIDED),
    ],
)
def test_more_than_zero_needs_the_interval_and_less_than_the_margin_refutes_it(low, high, verdict):
    assert judge_positive(Estimate(5.0, low, high, 5), 10) == verdict


def test_fewer_runs_never_turn_an_undecided_number_into_an_agreeing_one():
    claim = claims.Claim("e1.x", "§1", "x is 100", "", number=100, margin=20)
    values = [70.0, 130.0, 90.0, 110.0, 80.0, 120.0, 95.0, 105.0, 100.0, 100.0] * 6
    found = [claim.judge(over(values[:n]), comparable=True) for n in (2, 3, 10, 60)]
    assert found == [Verdict.UNDECIDED, Verdict.UNDECIDED, Verdict.REPRODUCED, Verdict.REPRODUCED]
    far = [claim.judge(over([x + 60 for x in values[:n]]), comparable=True) for n in (2, 3, 10, 60)]
    assert far == [Verdict.UNDECIDED, Verdict.UNDECIDED, Verdict.NOT_REPRODUCED, Verdict.NOT_REPRODUCED]


def test_a_number_is_set_beside_the_papers_with_the_interval_that_both_give():
    claim = claims.Claim("e1.x", "§1", "x is 100", "", number=100, interval=(70, 130), margin=60)
    found = claim.finding(Estimate(110.0, 70.0, 150.0, 5), comparable=True)
    assert found.ours == "110 steps (95 % CI 70 to 150; n = 5); less the paper's 10 [−40, 60]"
    assert found.verdict == Verdict.REPRODUCED
    other = claim.finding(Estimate(110.0, 70.0, 150.0, 5), comparable=False)
    assert other == ("110 steps (95 % CI 70 to 150; n = 5)", Verdict.OTHER_SETTING, {})


def test_a_number_of_another_setting_is_not_judged_and_no_run_is_not_run():
    claim = claims.Claim("e1.x", "§1", "x is 100", "", number=100, margin=1)
    assert claim.judge(Estimate(1, 0, 2, 5), comparable=False) == Verdict.OTHER_SETTING
    assert claim.judge(UNKNOWN, comparable=True) == claim.judge(UNKNOWN, comparable=False) == Verdict.NOT_RUN
    assert judge_share(UNKNOWN) == Verdict.NOT_RUN


def test_every_claim_with_a_number_has_a_margin_and_says_it():
    numbered = [claim for claim in claims.CLAIMS.values() if not math.isnan(claim.number)]
    assert all(claim.margin > 0 for claim in numbered)
    assert all("{" not in claim.rule for claim in claims.CLAIMS.values())
    assert "±2,510 steps" in claims.CLAIMS["e1.t_grok"].rule


def test_the_least_favourable_verdict_counts():
    least = claims.least
    assert least(Verdict.REPRODUCED, Verdict.UNDECIDED, Verdict.IN_PART) == Verdict.UNDECIDED
    assert least(Verdict.NOT_RUN, Verdict.NOT_REPRODUCED) == Verdict.NOT_REPRODUCED
    assert least(Verdict.REPRODUCED, Verdict.NOT_RUN) == Verdict.NOT_RUN


def test_numbers_are_worded_with_interval_n_and_unit():
    assert worded(Estimate(1020.4, -90.0, 1150.0, 10, "m")) == "1,020 steps (95 % CI −90 to 1,150; n = 10)"
    assert worded(Estimate(0.5, 0.25, 0.75, 4, "m"), "%") == "50 % (95 % CI 25 % to 75 %; n = 4)"
    assert worded(Estimate(0.64, 0.6, 0.7, 3, "m"), "", 2) == "0.64 (95 % CI 0.60 to 0.70; n = 3)"
    assert worded(over([5.0, 7.0])) == "6 steps (no interval: n = 2)"
    assert worded(UNKNOWN) == "–"
    assert counted(proportion(3, 3)) == "3 of 3 runs (95 % CI 29 % to 100 %)"
    assert (steps(math.nan), decimal(math.nan), percent(math.nan), counted(UNKNOWN)) == ("–",) * 4
    assert (steps(-1500), decimal(-0.12345), percent(0.999)) == ("−1,500", "−0.123", "100 %")


MODULES = (e1_lead, e2_mixing, e3_norm, e4_predictors, e5_forecast, e6_tasks, e7_mlp, e8_probes)


def test_is_mean_agrees_with_trying_all_sums():
    for n, grid in itertools.product((3, 7, 28), (20, 200)):
        means = {round(k * grid / n) for k in range(1000)}
        for value in range(300):
            assert claims.is_mean(value, n, grid=grid) == (value in means)


def test_the_checks_find_what_is_known_of_the_printed_numbers():
    found = {check.prints.split(",")[0].split(":")[0]: check for check in claims.checks()}
    assert not found["mixing delays by 5"].holds
    assert found["mixing delays by 5"].gives == "19,420 − 14,360 = 5,060"
    assert found["the norm control delays by 8"].holds
    assert not found["mean T_grok of the norm control"].holds
    assert "the mean is 24,487 and the delay 10,127" in found["mean T_grok of the norm control"].gives
    assert not found["mean advance warning 12"].holds
    assert not found["largest advance warning 16"].holds
    assert found["addition"].holds
    assert found["94 % of the pairs of S5 do not commute"].holds
    for prints, gives in (
        ("86 % of the budget saved", "12,370 / 14,360 = 86 %"),
        ("1", "1,436 × 200 / 10 = 28,720; 1,436 × 100 / 10 = 14,360"),
        ("r(norm", "does not hold the number"),
        (
            "the gap of H outperforms the other predictors by at least a factor 6.8 in R²",
            "0.507 / 0.38 = 1.3",
        ),
    ):
        assert not found[prints].holds
        assert gives in found[prints].gives
    assert found["multiplication and subtraction"].holds is None
    stop = found["stopping within 1"]
    assert not stop.holds
    assert "a stop at 7,000, before the mean T_grok" in stop.gives
    assert "14,340, 71 %" in stop.gives


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.rpartition(".")[2])
def test_every_claim_of_an_experiment_is_judged_by_its_module(module):
    (experiment,) = (e.id for e in EXPERIMENTS if module.__name__.rpartition(".")[2].startswith(f"{e.id}_"))
    asked = {claim.id for claim in claims.CLAIMS.values() if claim.experiment == experiment}
    given = {f"e6.{task}" for task in e6_tasks.PAPER} if module is e6_tasks else set()
    assert given | set(re.findall(rf'"({experiment}\.\w+)"', inspect.getsource(module))) == asked


def test_a_contribution_rests_on_claims_that_there_are():
    assert {name for _, _, names in claims.CONTRIBUTIONS for name in names} <= set(claims.CLAIMS)


def test_every_experiment_has_a_claim_that_must_be_named():
    # "choices" judges E1's claims again.
    asked = {experiment.id for experiment in EXPERIMENTS} - {"choices"}
    assert {claim.experiment for claim in claims.CLAIMS.values() if claim.named} == asked


def test_agreement_with_what_the_preset_was_chosen_by_is_calibrated_and_disagreement_counts(tmp_path):
    found = {name: claims.Finding("", Verdict.REPRODUCED) for name in ("e1.t_grok", "e1.precedes")}
    found["e1.h_star"] = claims.Finding("", Verdict.NOT_REPRODUCED)
    write_run(tmp_path, "e1", "baseline", 0, t_grok=1000, max_steps=50_000, evaluate_every=200)
    (run,) = read_runs(tmp_path)
    assert run.preset == ("paper", {})
    got = {name: each.verdict for name, each in claims.marked(found, Runs((run,))).items()}
    assert got == {
        "e1.t_grok": Verdict.CALIBRATED,
        "e1.precedes": Verdict.REPRODUCED,
        "e1.h_star": Verdict.NOT_REPRODUCED,
    }
    # Another choice than the preset's was not calibrated.
    record = {**run.record, "config": {**run.config, "activation": "gelu"}}
    other = dataclasses.replace(run, record=record)
    assert claims.marked(found, Runs((other,))) == found


def test_verdicts_come_together():
    assert together([Verdict.REPRODUCED, Verdict.REPRODUCED, Verdict.OTHER_SETTING]) == Verdict.REPRODUCED
    assert together([Verdict.REPRODUCED, Verdict.NOT_REPRODUCED]) == Verdict.IN_PART
    assert together([Verdict.NOT_REPRODUCED, Verdict.NOT_REPRODUCED]) == Verdict.NOT_REPRODUCED
    assert together([Verdict.NOT_REPRODUCED, Verdict.IN_PART]) == Verdict.IN_PART
    assert together([Verdict.NOT_REPRODUCED, Verdict.UNDECIDED]) == Verdict.UNDECIDED
    assert together([Verdict.REPRODUCED, Verdict.UNDECIDED]) == Verdict.IN_PART
    assert together([Verdict.UNDECIDED, Verdict.NOT_RUN]) == Verdict.UNDECIDED
    assert together([Verdict.REPRODUCED, Verdict.CALIBRATED]) == Verdict.IN_PART
    assert together([Verdict.NOT_REPRODUCED, Verdict.CALIBRATED]) == Verdict.NOT_REPRODUCED
    assert together([Verdict.CALIBRATED, Verdict.NOT_RUN]) == Verdict.CALIBRATED
    assert together([Verdict.NOT_RUN, Verdict.OTHER_SETTING]) == together([]) == Verdict.NOT_RUN
    assert together([Verdict.MIXED, Verdict.NOT_RUN]) == Verdict.MIXED


def exact_change(alpha):
    """Both columns are waves, so a cyclic shift scales their variances (1 and 1/4) by |1 - a + a w|^2."""
    slow = 1 - 2 * alpha * (1 - alpha) * (1 - math.cos(2 * math.pi / 64))
    fast = (1 - 2 * alpha) ** 2
    return entropy_of_eigenvalues([0.25 * fast, slow]) - entropy_of_eigenvalues([0.25, 1.0])


def test_mixing_losses_match_the_closed_form_and_are_of_first_order():
    losses = claims.mixing_losses()
    for loss in losses:
        assert loss.change == pytest.approx(exact_change(loss.alpha), abs=1e-12)
    slopes = [loss.change / loss.alpha for loss in losses]
    assert slopes == pytest.approx([-0.990, -0.939, -0.896, -0.886], abs=1e-3)


def test_constant_rows_score_one_by_the_papers_convention_and_zero_by_ours():
    import torch

    assert claims.scores(torch.ones(512, 128)) == (1.0, 0.0)


def test_the_papers_convention_depends_on_the_unit_and_ours_does_not():
    matrix = claims.decaying()
    paper, ours = zip(*(claims.scores(s * matrix) for s in claims.SCALES), strict=True)
    assert max(ours) - min(ours) < 1e-12
    assert paper[0] == pytest.approx(ours[0], abs=1e-6)
    assert paper[-1] > 0.999


def test_what_is_not_known_is_judged_by_no_rule():
    assert claims.judge(False, True, True) == claims.judge_share(UNKNOWN) == Verdict.NOT_RUN
    assert judge_positive(UNKNOWN) == judge_within(UNKNOWN, 1.0) == Verdict.NOT_RUN
    assert {claim.judge(UNKNOWN, comparable=True) for claim in claims.CLAIMS.values()} == {Verdict.NOT_RUN}
