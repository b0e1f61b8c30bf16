"""Proposition 6: exponential relaxation, and why the power law does not generalise it.

Closed forms, inverses and exponents one by one: ``tests/reference/test_reference_forecast.py``.
"""

import numpy as np
import pytest

from fastent.experiments import statements
from fastent.experiments.collapse import fit_laws
from fastent.reference.forecast import entropy_power, entropy_relaxing


def test_closed_forms_solve_their_equations_and_bend_opposite_ways():
    evidence = statements.relaxation_and_power_law()
    assert evidence.holds, evidence.text
