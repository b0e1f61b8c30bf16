"""E2 on closed-form runs: delays, tests, and what becomes of the entropy at equal step and at equal loss."""

import dataclasses
from types import SimpleNamespace

import pytest
from closed_form import write_run

from fastent.grokking.experiments import e2_mixing, figures
from fastent.grokking.experiments.data import Runs, read_runs
from fastent.grokking.experiments.document import Table, Verdict
from fastent.grokking.experiments.statistics import Estimate

SEEDS = range(6)


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    monkeypatch.setattr(figures, "both", lambda draw: (draw(), ("<svg/>", "<svg/>"))[1])


def baseline(step):
    return 0.9 - 0.3 * step / 4000


@pytest.fixture
def runs(tmp_path):
    """Baseline groks at 1,000 + 100 seed; mixing 600 later (seed 5 never), the logits' half as much.

    H falls by 0.3 over the run; under mixing it is 0.02 higher at equal step, of which 0.015 because the loss
    comes 200 steps later. H* of the baseline is 0.80625.
    """
    for seed in SEEDS:
        write_run(
            tmp_path, "e1", "baseline", seed, t_grok=1000 + 100 * seed, entropy=baseline, last_step=4000
        )
        shape = {
            "entropy": lambda step: baseline(step) + 0.02,
            "train_loss": lambda step: 2.0 ** -((step - 200) / 100),
        }
        late = None if seed == 5 else 1600 + 100 * seed
        write_run(tmp_path, "e2", "losses-0.1", seed, t_grok=late, **shape)
        write_run(tmp_path, "e2", "logits-0.1", seed, t_grok=1300 + 100 * seed)
        for alpha, delay in ((0.05, 300), (0.2, 1200)):
            if seed < 4:
                write_run(tmp_path, "e2", f"losses-{alpha}", seed, t_grok=1000 + 100 * seed + delay)
    return read_runs(tmp_path)


@pytest.fixture
def result(runs):
    return e2_mixing.analyse(Runs(tuple(runs), judged=False))


def test_delays_are_means_over_shared_seeds_with_the_censored_run_at_the_limit(result):
    losses = result.conditions["losses-0.1"]
    assert losses.limit == 4000
    assert losses.later.value == pytest.approx((5 * 600 + (4000 - 1500)) / 6)
    assert losses.mean.value == pytest.approx((1600 + 1700 + 1800 + 1900 + 2000 + 4000) / 6)
    assert not losses.effect_size.known
    assert (losses.grokked.value, losses.grokked.n) == (5 / 6, 6)
    logits = result.conditions["logits-0.1"]
    assert (logits.later.value, logits.later.low, logits.later.high) == (300, 300, 300)
    assert logits.effect_size.value == pytest.approx(300 / 187.0828693)  # the spread of 1000, 1100, ..., 1500
    fewer = result.conditions["losses-0.2"]
    assert (fewer.later.value, fewer.later.n, fewer.rank.n) == (1200, 4, (6, 4))


def test_tests_use_the_pairing_and_holm_runs_over_the_conditions(result):
    losses = result.conditions["losses-0.1"]
    signed, stratified = losses.paired
    assert signed.p_value == stratified.p_value == 1 / 64
    # All later than the latest baseline run: the exact chance of one order of 6 among 12.
    assert losses.rank.p_value < 2e-3
    p_values = sorted(mixed.rank.p_value for mixed in result.conditions.values())
    adjusted = sorted(mixed.adjusted for mixed in result.conditions.values())
    assert adjusted[0] == pytest.approx(4 * p_values[0])
    assert all(a >= p for a, p in zip(adjusted, p_values, strict=True))


def test_entropy_at_equal_step_is_the_shift_on_the_baselines_plateau(result):
    shift = result.conditions["losses-0.1"].equal_step
    assert (shift.value, shift.n) == (pytest.approx(0.02), 6)
    # Flat at 0.9 against a baseline whose mean from step 300 to T_grok is known.
    expected = sum(0.3 * ((300 + 1000 + 100 * s) / 2) / 4000 for s in SEEDS) / 6
    assert result.conditions["logits-0.1"].equal_step.value == pytest.approx(expected)


def test_entropy_at_equal_loss_takes_the_slower_training_out(result):
    levels = result.conditions["losses-0.1"].equal_loss
    # The loss halves every 100 steps, from 1 and from 4: level L at step -100 log2 L, and 200 later. It is 1 at
    # the start of the baseline run, which has thus not fallen to 1.
    assert [level.loss for level in levels] == [0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 1e-4, 1e-5]
    for level in levels:
        assert level.treated_step - level.control_step == pytest.approx(200)
        assert level.difference.value == pytest.approx(0.02 - 0.3 * 200 / 4000)
        assert level.difference.n == 6
    assert levels[3].control_step == pytest.approx(664.3856189774724)
    assert levels[3].control.value == pytest.approx(baseline(664.3856189774724))


def test_collapse_counts_the_grokked_runs_below_the_baselines_mean_entropy_at_grokking(result):
    mixed = result.conditions["losses-0.1"].collapse
    # H* = 0.80625, reached under mixing at step 1,516.7: all five that grok at 1,600 or later are below it first.
    assert (mixed.below.value, mixed.below.n) == (1.0, 5)
    assert mixed.shift.value == pytest.approx(0.02 - 0.3 * 600 / 4000)
    flat = result.conditions["logits-0.1"].collapse
    assert (flat.below.value, flat.below.n) == (0.0, 6)


def test_dose_response_is_kendalls_tau_by_seed(result):
    # T_grok rises with alpha (0, 0.05, 0.1, 0.2) in each of the four seeds that have all of them.
    assert (result.dose.value, result.dose.n) == (pytest.approx(1.0), 4)


def test_dose_response_is_no_correlation_beyond_one(tmp_path):
    # Kendall's tau is 1, 1 and -1/3 in the three seeds: Student's interval alone would end at 2.5.
    times = {"losses-0.1": (400, 400, 500), "losses-0.2": (500, 500, 200)}
    for seed in range(3):
        write_run(tmp_path, "e1", "baseline", seed, t_grok=300, last_step=600)
        for condition, at in times.items():
            write_run(tmp_path, "e2", condition, seed, t_grok=at[seed], last_step=600)
    dose = e2_mixing.analyse(Runs(tuple(read_runs(tmp_path)))).dose
    assert -1 <= dose.low < dose.value < dose.high == 1


@pytest.mark.parametrize(
    ("equal_step", "at_grokking", "verdict"),
    [
        ((-0.011, -0.025, 0.002), (0.014, -0.006, 0.034), Verdict.UNDECIDED),
        ((-0.011, -0.025, 0.002), (0.004, -0.006, 0.009), Verdict.NOT_REPRODUCED),
        ((-0.011, -0.025, 0.002), (0.024, 0.006, 0.034), Verdict.IN_PART),
        ((0.014, -0.006, 0.034), (0.014, -0.006, 0.034), Verdict.UNDECIDED),
    ],
)
def test_that_h_is_not_kept_up_needs_both_intervals_to_end_below_the_margin(equal_step, at_grokking, verdict):
    mixed = SimpleNamespace(
        equal_step=Estimate(*equal_step, 10), collapse=SimpleNamespace(shift=Estimate(*at_grokking, 10))
    )
    assert e2_mixing.judge_kept_up(mixed) == verdict


def test_claims_judge_the_closed_form_runs(result, runs):
    verdicts = {name: found.verdict for name, found in e2_mixing.claims(result).items()}
    assert verdicts["e2.delays"] == Verdict.REPRODUCED
    assert verdicts["e2.delays_logits"] == Verdict.REPRODUCED
    assert verdicts["e2.t_grok"] == Verdict.OTHER_SETTING
    assert verdicts["e2.all_grok"] == Verdict.NOT_REPRODUCED  # one of six does not
    # H is 0.02 higher at equal step, and lower at grokking, which comes later.
    assert verdicts["e2.kept_up"] == Verdict.IN_PART
    assert e2_mixing.judge_kept_up(result.conditions["logits-0.1"]) == Verdict.REPRODUCED
    none = dataclasses.replace(result.conditions["logits-0.1"], runs=result.baseline)
    assert e2_mixing.judge_kept_up(none) == Verdict.NOT_REPRODUCED
    again = {
        name: found.verdict
        for name, found in e2_mixing.claims(e2_mixing.analyse(Runs(tuple(runs), judged=True))).items()
    }
    assert again["e2.t_grok"] == Verdict.NOT_REPRODUCED
    assert again["e2.test"] == Verdict.UNDECIDED  # significant, but d is undefined


def test_without_runs_of_either_side_there_is_no_part(runs):
    assert e2_mixing.analyse(Runs(tuple([r for r in runs if r.experiment == "e1"]), judged=False)) is None
    assert e2_mixing.analyse(Runs(tuple([r for r in runs if r.experiment == "e2"]), judged=False)) is None


def test_a_reading_that_was_not_run_is_said_to_be_not_run(runs):
    only = [r for r in runs if r.condition in ("baseline", "logits-0.1")]
    claims = e2_mixing.claims(e2_mixing.analyse(Runs(tuple(only), judged=False)))
    assert [found.verdict for found in claims.values()].count(Verdict.NOT_RUN) == 5
    assert "but not the paper's" in e2_mixing.headline(e2_mixing.analyse(Runs(tuple(only), judged=False)))


def test_section_tables_hold_the_closed_form_values(result):
    tables = [block for block in e2_mixing.section(result).blocks if isinstance(block, Table)]
    rows = {row[0]: row for row in tables[0].rows}
    assert rows["baseline"][:3] == ("baseline", "6 of 6", "1,250 [1,054, 1,446]")
    assert rows["mixing, α = 0.1, logits averaged"][3] == "300 [300, 300]"
    assert rows["mixing, α = 0.1, losses averaged"][5] == "undefined"
    assert "losses averaged, at α = 0.1, moves T_grok by 917 steps" in e2_mixing.headline(result)


def test_other_alphas_are_named_where_they_move_t_grok_for_that_of_the_paper_is_lost(result, runs):
    found, said = e2_mixing.claims(result), e2_mixing.headline(result)
    assert (
        ", at α = 0.05 by 300 steps (95 % CI 300 to 300; n = 4), at α = 0.2 by 1,200 steps"
        in found["e2.delays"].ours
    )
    assert "; at α = 0.2, at equal step, by " in found["e2.kept_up"].ours
    assert "at α" not in found["e2.delays_logits"].ours
    assert (
        "At α = 0.2 mixing moves T_grok by 1,200 steps (95 % CI 1,200 to 1,200; n = 4), 4 of 4 runs grok"
        in said
    )
    assert any(
        "their own interval: 0.05, 0.2." in getattr(b, "text", "") for b in e2_mixing.section(result).blocks
    )
    # One seed has no interval, and an interval around 0 says nothing.
    for kept in ([0], [0, 1, 2, 3]):
        fewer = [run for run in runs if run.condition != "losses-0.2" or run.seed in kept]
        seen = e2_mixing.headline(e2_mixing.analyse(Runs(tuple(fewer), judged=False)))
        assert ("At α = 0.2" in seen) == (len(kept) > 1)
    undone = dataclasses.replace(result.conditions["losses-0.2"], later=Estimate(10.0, -5.0, 25.0, 4))
    several = {**result.conditions, "losses-0.2": undone}
    assert "α = 0.2" not in e2_mixing.headline(dataclasses.replace(result, conditions=several))


def test_one_run_against_one_has_a_delay_and_no_certainty(tmp_path):
    for condition, t_grok in (("losses-0.1", 1500), ("logits-0.1", 1000)):
        write_run(tmp_path, "e2", condition, 0, t_grok=t_grok)
    write_run(tmp_path, "e1", "baseline", 0, t_grok=1000)
    result = e2_mixing.analyse(Runs(tuple(read_runs(tmp_path)), judged=False))
    later, same = (result.conditions[name] for name in ("losses-0.1", "logits-0.1"))
    assert (later.later.value, later.mean.value) == (500, 1500)
    assert not later.later.bounded
    assert not later.mean.bounded
    assert (same.survival.p_value, same.later.value) == (1.0, 0.0)
    verdicts = [found.verdict for found in e2_mixing.claims(result).values()]
    assert verdicts[:2] == [Verdict.UNDECIDED, Verdict.UNDECIDED]
    e2_mixing.section(result)
