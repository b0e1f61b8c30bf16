"""What the session `faults` writes down: faults tried and survived by row, and what long runs took."""

import datetime
import json
from pathlib import Path
from typing import Any

import pytest


class Faults:
    """Figures of all tests that passed, also of other processes', written at the end where all of them did.

    Those of long runs go beside the others, into ``long.json``.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.rows, self.long = path, list[dict[str, Any]](), list[dict[str, Any]]()

    def pytest_sessionstart(self) -> None:
        from fastent.grokking.train.environment import commit

        self.when = {"commit": commit(), "date": datetime.date.today().isoformat()}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            found = [value for name, value in report.user_properties if name == "fault"]
            self.rows += [{"row": each["row"], "test": report.nodeid, **each} for each in found]
            found = [value for name, value in report.user_properties if name == "long"]
            self.long += [{"test": report.nodeid, **each} for each in found]

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        from fastent.grokking.train.storage import write_atomically

        if exitstatus == 0:
            when = self.when
            rows = sorted(({**row, **when} for row in self.rows), key=lambda row: (row["row"], row["test"]))
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, (json.dumps(rows, indent=1) + "\n").encode())
            if long := [{**row, **when} for row in sorted(self.long, key=lambda row: row["test"])]:
                write_atomically(
                    self.path.with_name("long.json"), (json.dumps(long, indent=1) + "\n").encode()
                )
