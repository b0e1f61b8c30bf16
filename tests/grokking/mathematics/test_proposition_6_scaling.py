"""Proposition 6: exponential relaxation, and why the power law does not generalise it.

Closed forms, inverses and exponents one by one: ``tests/reference/test_reference_forecast.py``.
"""

import numpy as np
import pytest

from fastent.grokking.mathematics import checks
from fastent.grokking.mathematics.collapse import fit_laws
from fastent.reference.forecast import entropy_power, entropy_relaxing


def test_closed_forms_solve_their_equations_and_bend_opposite_ways():
    evidence = checks.relaxation_and_power_law()
    assert evidence.holds, evidence.text


def test_fit_recovers_the_law_that_made_the_data_and_tells_the_laws_apart():
    t = np.linspace(0, 1000, 21)
    relaxing = entropy_relaxing(t, h0=0.85, floor=0.5, k=3e-3)
    laws = fit_laws(t, relaxing)
    assert laws["repaired"].residual < 1e-6
    assert np.exp(laws["repaired"].parameters["log k"]) == pytest.approx(3e-3, rel=1e-3)
    assert laws["power"].residual > 0.005
    power = entropy_power(1000 - t, h_star=0.6, c1=20_000.0, gamma=1.65, c2=0.0)
    laws = fit_laws(t, power)
    assert laws["power"].residual < 1e-6
    assert np.exp(laws["power"].parameters["log gamma"]) == pytest.approx(1.65, rel=1e-3)
    # neither generalises the other: a relaxation cannot bend down
    assert laws["repaired"].residual >= 0.95 * laws["line"].residual
    assert laws["printed"].residual > laws["line"].residual


def test_on_a_run_no_law_describes_the_collapse_to_the_precision_of_h(small_run):
    step, entropy = small_run.evaluated("step"), small_run.evaluated("entropy")
    grokked = int(np.argmax(small_run.evaluated("test_accuracy") >= 0.9))
    top = int(np.argmax(entropy[:grokked]))
    assert grokked - top >= 8
    laws = fit_laws(step[top : grokked + 1], entropy[top : grokked + 1])
    fall = entropy[top] - entropy[grokked]
    for law in laws.values():
        assert law.residual < 0.4 * fall
    # Evaluations repeat to 1e-9; what is left over is the run's own course.
    assert min(law.residual for law in laws.values()) > 1e-3
