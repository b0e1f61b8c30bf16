"""Profiles of Hypothesis, chosen by HYPOTHESIS_PROFILE, and the backends every property runs against."""

import os

import pytest
from hypothesis import HealthCheck, settings

from properties.backends import backends

# No deadline: an interpreted kernel or an eigensolve at 50 digits takes its time, and others may be running.
COMMON = {"deadline": None, "print_blob": True, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("dev", max_examples=30, **COMMON)
settings.register_profile("ci", max_examples=60, derandomize=True, **COMMON)
# Not derandomized, also where CI is set and Hypothesis would be: the same examples every night find nothing new.
settings.register_profile("nightly", max_examples=2000, derandomize=False, **COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        available = backends(metafunc.config.getoption("--device"))
        metafunc.parametrize("backend", available, ids=[backend.name for backend in available])
