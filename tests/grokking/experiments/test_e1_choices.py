"""Choices on planted runs: one setting agrees with the preset's, one does not, one never groks."""

import dataclasses

import pytest
from planted_columns import planted, tables

from fastent.grokking.experiments import e1_lead
from fastent.grokking.experiments.data import Runs
from fastent.grokking.experiments.jobs import JOBS, TO_THE_END
from fastent.grokking.experiments.report import EXPERIMENTS, make_part
from fastent.grokking.train.config import CHOICES, PRESETS, preset

E1, *OTHERS = JOBS["choices"](preset("paper"), range(10))
FALLS = [0.9, 0.9, 0.8, 0.7, 0.6, 0.5]
STAYS = [0.9] * 6
GROKS = [0.0, 0.0, 0.0, 0.5, 1.0, 1.0]
STUCK = [0.0, 0.01, 0.01, 0.02, 0.02, 0.02]
UNIT, MEAN, EQUALS = OTHERS[:3]


def runs_of(job, entropy, test):
    return [planted(job, seed, test=test, entropy=[h + 0.01 * seed for h in entropy]) for seed in range(5)]


@pytest.fixture
def settings():
    stored = [*runs_of(E1, FALLS, GROKS), *runs_of(UNIT, FALLS, GROKS), *runs_of(MEAN, STAYS, GROKS)]
    return e1_lead.analyse_choices(Runs(tuple(stored)))


def test_every_choice_is_trained_with_the_rest_as_it_is():
    assert [job.condition for job in OTHERS] == [f"with-{name}" for name in CHOICES]
    for job, changes in zip(OTHERS, CHOICES.values(), strict=True):
        assert dataclasses.replace(job.config, measures=()) == dataclasses.replace(
            PRESETS["paper"], **changes
        )
        assert job.seeds == tuple(range(TO_THE_END))


def test_a_choice_that_is_the_settings_own_is_not_trained_twice():
    conditions = [job.condition for job in JOBS["choices"](preset("quick"), (0,))]
    assert "with-unit-scale" not in conditions
    assert len(conditions) == len(CHOICES)


def test_a_claim_depends_on_the_choice_where_its_verdict_does(settings):
    found = e1_lead.agreed(settings)
    assert not found["e1.collapse_ours"]  # with the entropy that stays there is no fall
    assert found["e1.memorises_early"]
    # Too few runs to decide is no disagreement.
    few = Runs((*runs_of(E1, FALLS, GROKS), *runs_of(UNIT, FALLS, GROKS)[:2]))
    assert "e1.memorises_early" not in e1_lead.agreed(e1_lead.analyse_choices(few))


def test_a_setting_that_differs_in_nothing_changes_no_verdict():
    settings = e1_lead.analyse_choices(Runs((*runs_of(E1, FALLS, GROKS), *runs_of(UNIT, FALLS, GROKS))))
    assert all(e1_lead.agreed(settings).values())
    assert (
        f"of {len(e1_lead.agreed(settings))} claims of E1 that two or more of 2 settings decide"
        in e1_lead.choices_headline(settings)
    )


def test_a_setting_that_never_groks_has_no_h_star_and_is_left_out_of_what_it_cannot_judge():
    settings = e1_lead.analyse_choices(Runs((*runs_of(E1, FALLS, GROKS), *runs_of(EQUALS, FALLS, STUCK))))
    figures, verdicts = tables(e1_lead.choices_section(settings)).values()
    assert figures.rows[1][1:5] == ("0 of 5", figures.rows[0][2], "–", "–")
    unjudged = [row for row in verdicts.rows if row[-1] == "–"]
    assert any("H* is stable" in row[1] for row in unjudged)


def test_without_runs_of_another_choice_or_of_the_preset_there_is_nothing_to_say():
    assert e1_lead.analyse_choices(Runs(tuple(runs_of(E1, FALLS, GROKS)))) is None
    assert e1_lead.analyse_choices(Runs(tuple(runs_of(UNIT, FALLS, GROKS)))) is None


def test_the_report_takes_the_part():
    (experiment,) = (each for each in EXPERIMENTS if each.id == "choices")
    part = make_part(experiment, [*runs_of(E1, FALLS, GROKS), *runs_of(UNIT, FALLS, GROKS)])
    assert part is not None
    assert part.section.title == e1_lead.CHOICES_TITLE
