"""The paper's arithmetic, and that every claim a summary must name has a claim that covers it."""

import ast
import contextlib
import inspect
import itertools

import pytest

from fastent.experiments import (
    e1_baseline,
    e2_mixing,
    e3_norm,
    e4_predictors,
    e5_claims,
    e6_tasks,
    e7_mlp,
    e8_probes,
    paper,
)
from fastent.experiments.claims import IN_PART, MIXED, NOT_REPRODUCED, NOT_RUN, OTHER_SETTING, REPRODUCED
from fastent.experiments.parts import EXPERIMENTS
from fastent.experiments.summary import together

MODULES = (e1_baseline, e2_mixing, e3_norm, e4_predictors, e5_claims, e6_tasks, e7_mlp, e8_probes)


def test_is_mean_agrees_with_trying_all_sums():
    for n, grid in itertools.product((3, 7, 28), (20, 200)):
        means = {round(k * grid / n) for k in range(1000)}
        for value in range(300):
            assert paper.is_mean(value, n, grid=grid) == (value in means)


def test_the_checks_find_what_is_known_of_the_printed_numbers():
    found = {check.prints.split(",")[0].split(":")[0]: check for check in paper.checks()}
    assert not found["mixing delays by 5"].holds
    assert found["mixing delays by 5"].gives == "19,420 − 14,360 = 5,060"
    assert found["the norm control delays by 8"].holds
    assert not found["mean T_grok of the norm control"].holds
    assert "the mean is 24,487 and the delay 10,127" in found["mean T_grok of the norm control"].gives
    assert not found["mean advance warning 12"].holds
    assert not found["largest advance warning 16"].holds
    assert found["addition"].holds
    assert found["94 % of the pairs of S5 do not commute"].holds
    stop = found["stopping within 1"]
    assert not stop.holds
    assert "a stop at 7,000, before the mean T_grok" in stop.gives
    assert "14,340, 71 %" in stop.gives


def wordings(module):
    """All strings in a module's claims, with the module's own numbers filled in where they need nothing else."""
    for node in ast.walk(ast.parse(inspect.getsource(module.claims))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            with contextlib.suppress(NameError):
                yield eval(compile(ast.Expression(node), "claims", "eval"), vars(module))


@pytest.mark.parametrize("said", paper.SAID, ids=lambda said: said.marker)
def test_a_claim_that_must_be_named_is_covered_by_its_experiment(said):
    (module,) = (
        each for each in MODULES if each.__name__.rpartition(".")[2].startswith(f"{said.experiment}_")
    )
    assert any(said.marker in wording for wording in wordings(module))


def test_every_experiment_has_a_claim_that_must_be_named():
    # "choices" judges E1's claims again.
    asked = {experiment.id for experiment in EXPERIMENTS} - {"choices"}
    assert {said.experiment for said in paper.SAID} == asked


def test_verdicts_come_together():
    assert together([REPRODUCED, REPRODUCED, OTHER_SETTING]) == REPRODUCED
    assert together([REPRODUCED, NOT_REPRODUCED]) == IN_PART
    assert together([NOT_REPRODUCED, NOT_REPRODUCED]) == NOT_REPRODUCED
    assert together([NOT_REPRODUCED, IN_PART]) == IN_PART
    assert together([NOT_RUN, OTHER_SETTING]) == together([]) == NOT_RUN
    assert together([MIXED, NOT_RUN]) == MIXED
