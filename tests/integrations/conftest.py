"""A host that is not installed skips its tests; with FASTENT_HOSTS=all in the environment that is a failure.

A GPU that is not there skips as elsewhere.
"""

import os
from collections.abc import Generator, Iterator
from typing import TypeVar

import pytest


@pytest.fixture(autouse=True)
def environment_as_before() -> Iterator[None]:
    """The environment as it was, after hosts that set the address of their process group and leave it."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


Report = TypeVar("Report", pytest.CollectReport, pytest.TestReport)


def _every_host_is_wanted(report: Report) -> Report:
    about_hosts = not hasattr(report, "wasxfail") and "gpu" not in getattr(report, "keywords", ())
    if report.skipped and about_hosts and os.environ.get("FASTENT_HOSTS") == "all":
        report.outcome = "failed"
        report.longrepr = f"FASTENT_HOSTS=all, and here is skipped: {report.longrepr[2]}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    return _every_host_is_wanted((yield))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    return _every_host_is_wanted((yield))
