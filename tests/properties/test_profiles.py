"""The profiles of Hypothesis as they come out where CI is set."""

import os
import runpy
from pathlib import Path

import pytest
from hypothesis import settings


@pytest.mark.parametrize(("name", "derandomize"), [("nightly", False), ("ci", True)])
def test_under_ci_every_night_searches_new_examples_and_every_check_the_same_ones(
    monkeypatch, name, derandomize
):
    now = os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev")
    monkeypatch.setenv("CI", "true")
    monkeypatch.setenv("HYPOTHESIS_PROFILE", name)
    try:
        # Where CI is set Hypothesis begins derandomized, and a profile takes over what it leaves out.
        settings.load_profile("ci")
        runpy.run_path(str(Path(__file__).with_name("conftest.py")))
        assert settings.default.derandomize is derandomize
    finally:
        settings.load_profile(now)
