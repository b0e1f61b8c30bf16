"""Leads by each rule and the sweep, on runs whose answers can be read off."""

import numpy as np
import pytest
from planted_columns import listed

from fastent.grokking.experiments import leads
from fastent.grokking.experiments.data import Runs


@pytest.fixture
def pair(measure):
    # Both fall by 0.1 an evaluation; the first groks at 300 (H = 0.6), the second at 500 (H = 0.4).
    fall = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]
    return Runs(
        (
            measure(fall, [0, 0, 0, 1, 1, 1, 1], seed=0),
            measure(fall, [0, 0, 0, 0, 0, 1, 1], seed=1),
        )
    )


def test_own_threshold_of_a_steady_fall_is_crossed_one_evaluation_late(pair):
    result = leads.own_threshold(pair)
    assert result.thresholds == pytest.approx((0.6, 0.4))
    assert listed(result.times) == [400, 600]
    assert listed(result.leads) == [-100, -100]
    assert (result.preceding.value, result.preceding.n) == (0.0, 2)


def test_in_sample_mean_must_fail_for_the_run_whose_entropy_at_grokking_is_above_it(pair):
    result = leads.in_sample_threshold(pair)
    # The mean is 0.5: first below it at 500. The run with H(T_grok) = 0.6 is late, the other has no lead left.
    assert result.thresholds == pytest.approx((0.5, 0.5))
    assert listed(result.times) == [500, 500]
    assert listed(result.leads) == [-200, 0]


def test_left_out_threshold_of_each_of_two_runs_is_the_other_ones(pair):
    result = leads.left_out_threshold(pair)
    assert result.thresholds == pytest.approx((0.4, 0.6))
    assert listed(result.times) == [600, 400]
    assert listed(result.leads) == [-300, 100]
    assert result.preceding.value == 0.5
    assert result.mean.value == -100


def test_left_out_threshold_leaves_the_run_itself_out(measure):
    flat = [[0.9, h, h] for h in (0.3, 0.5, 0.7)]
    runs = Runs(tuple(measure(entropy, [0, 1, 1], seed=i) for i, entropy in enumerate(flat)))
    assert leads.left_out_threshold(runs).thresholds == pytest.approx((0.6, 0.5, 0.4))


def test_one_run_has_no_left_out_threshold(measure):
    result = leads.left_out_threshold(Runs((measure([0.9, 0.5], [0, 1]),)))
    assert np.isnan([result.thresholds, result.times, result.leads]).all()
    assert not result.mean.known
    assert not result.preceding.known


def test_collapse_leads_the_run_that_groks_late(pair):
    result = leads.collapse(pair)
    assert listed(result.times) == [100, 100]
    assert listed(result.leads) == [200, 400]
    assert result.preceding.value == 1.0
    assert leads.collapse(pair, tau=0.25).times.tolist() == [300, 300]


def test_a_fall_counts_from_memorising_on_and_from_no_level_before_it(measure):
    # As the MLPs do: H falls by 0.3 at once, while the model memorises, and hardly after; then it never groks.
    mlp = measure([0.9, 0.6, 0.58, 0.57, 0.57, 0.57, 0.56], [0.0] * 7, every=200, t_mem=400)
    late = measure([0.9, 0.6, 0.6, 0.6, 0.5, 0.5, 0.5], [0.0] * 6 + [1.0], every=200, t_mem=400)
    runs = Runs((mlp, late))
    assert runs.memorised_entropy[0, 2] == 0.58
    for rule in (leads.collapse, leads.paper_collapse):
        assert np.isnan(rule(runs).times[0])
    assert leads.collapse(runs).times[1] == 800
    never = measure([0.9, 0.1, 0.1], [0.0] * 3, t_mem=10_000)
    assert np.isnan(leads.collapse(Runs((never,))).times[0])


def test_the_papers_collapse_is_below_the_value_of_1000_steps_before(measure):
    # 0.1 down within 600 steps and up again: a fall by our window; 1,000 steps apart it is seen from step 1,000 on.
    dip = [0.8, 0.9, 0.9, 0.8, 0.8, 0.9, 0.8, 0.8, 0.8]
    runs = Runs((measure(dip, [0.0] * 8 + [1.0], every=200),))
    assert (leads.collapse(runs).times, leads.paper_collapse(runs).times) == (600, 1200)
    assert leads.paper_collapse(runs, tau=0.2).times.tolist() != [1200]
    # Every 50 steps it is the same 1,000 steps.
    fine = Runs((measure(np.repeat(dip, 4), [0.0] * 35 + [1.0], every=50),))
    assert (leads.collapse(fine).times, leads.paper_collapse(fine).times) == (600, 1200)


def test_a_fall_lasts_if_the_last_five_entropies_are_as_low_in_the_middle(measure):
    down, up = [0.9, 0.9, 0.7, 0.7, 0.7, 0.7, 0.9], [0.9, 0.9, 0.7, 0.9, 0.9, 0.9, 0.7]
    runs = Runs(tuple(measure(h, [0.0] * 7, every=200, seed=i) for i, h in enumerate((down, up))))
    assert leads.collapse(runs).times.tolist() == [400, 400]
    assert (leads.collapse(runs).lasting.value, leads.collapse(runs).lasting.n) == (0.5, 2)
    assert not leads.own_threshold(runs).lasting.known


def test_a_run_that_does_not_grok_has_no_lead_and_gives_no_threshold(measure, pair):
    never = measure([0.9, 0.1, 0.1], [0, 0, 0], seed=2)
    result = leads.in_sample_threshold(Runs((*pair.stored, never)))
    assert result.thresholds == pytest.approx((0.5, 0.5, 0.5))
    assert result.times[2] == 100
    assert np.isnan(result.leads[2])
    assert result.preceding.n == 2


def test_a_grokked_run_that_never_crosses_counts_as_not_preceded(measure, pair):
    high = measure([0.9, 0.9, 0.9], [0, 1, 1], seed=2)
    result = leads.collapse(Runs((*pair.stored, high)))
    assert np.isnan(result.times[2])
    assert (result.preceding.value, result.preceding.n, result.mean.n) == (pytest.approx(2 / 3), 3, 2)


def test_a_run_without_other_seeds_or_a_usable_entropy_is_not_asked_whether_it_is_preceded(measure, pair):
    alone = pair[np.array([True, False])]
    assert not leads.left_out_threshold(alone).preceding.known
    assert leads.collapse(alone).preceding.n == leads.own_threshold(alone).preceding.n == 1
    blind = Runs((*pair.stored, measure([np.nan] * 3, [0, 1, 1], seed=2)))
    for rule in (leads.collapse, leads.paper_collapse, leads.left_out_threshold):
        assert rule(blind).preceding.n == 2


def test_sweep_of_a_known_pair(pair):
    result = leads.sweep(pair, [0.35, 0.45, 0.65, 0.85], horizon=300)
    # First below at 600, 500, 300, 100; grokked at 300 and 500.
    assert result.preceding.tolist() == [0.0, 0.0, 0.5, 1.0]
    assert result.lead.tolist() == [-200, -100, 100, 300]
    assert result.lead_low.tolist() == [-300, -200, 0, 200]
    assert result.lead_high.tolist() == [-100, 0, 200, 400]
    # Before grokking: none, none, the second (200 steps), both (200 and 400: the latter is beyond the horizon).
    assert np.isnan(result.false[:2]).all()
    assert result.false[2:].tolist() == [0.0, 0.5]


def test_sweep_calls_an_alarm_false_only_when_the_run_lasted_long_enough_to_tell(measure):
    fell = measure([0.9, 0.5, 0.5, 0.5, 0.5], [0] * 5)
    assert leads.sweep(Runs((fell,)), [0.6], horizon=300).false[0] == 1.0
    assert np.isnan(leads.sweep(Runs((fell,)), [0.6], horizon=301).false[0])


def test_sweep_counts_alarms_before_memorising_as_early(measure):
    runs = Runs(tuple(measure([0.9, 0.5, 0.5], [0, 0, 1], t_mem=m) for m in (0, 100, 200)))
    assert leads.sweep(runs, [0.6]).early[0] == pytest.approx(1 / 3)


def test_useful_thresholds_are_those_without_miss_false_or_early_alarm(measure):
    entropy = [0.85, 0.9, 0.8, 0.7, 0.6, 0.5]
    run = measure(entropy, [0, 0, 0, 0, 0, 1], t_mem=100)
    result = leads.sweep(Runs((run,)), [0.45, 0.55, 0.65, 0.75, 0.82, 0.88], horizon=250)
    # 0.45 never; 0.55 at grokking, not before; 0.82 is 300 steps ahead; 0.88 at step 0, before memorising.
    assert result.useful() == (0.65, 0.75)
    assert leads.sweep(Runs((run,)), [0.45], horizon=250).useful() is None


def test_observed_thresholds_span_the_usable_entropies_on_round_numbers(measure):
    run = measure([0.7512, np.nan, 0.7388], [0, 0, 1])
    assert leads.observed_thresholds(Runs((run,))).tolist() == pytest.approx(
        [0.735, 0.740, 0.745, 0.750, 0.755]
    )
    assert leads.observed_thresholds(Runs((measure([np.nan, np.nan], [0, 1]),))).size == 0


def test_a_run_dated_by_another_accuracy_has_its_own_grokking_threshold_and_leads(measure):
    runs = Runs((measure([0.9, 0.9, 0.8, 0.7, 0.6], [0, 0.2, 0.6, 0.9, 1.0]),))
    assert (runs.t_grok, runs.h_star, leads.collapse(runs).leads) == (400, 0.6, 200)
    half = runs.dated_by(0.5)
    assert (half.t_grok, half.h_star, leads.collapse(half).leads) == (200, 0.8, 0)
    assert (half.criteria, half.t_mem) == (0.5, 0)
