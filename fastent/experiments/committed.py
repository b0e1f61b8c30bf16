"""Parts of the report inside committed documents, and whether they still follow from the committed runs.

A document takes in a section of the report between two comments, which no reader of the page sees::

    <!-- fastent report: summary -->
    ...
    <!-- fastent report: end -->

with the section's anchor (summary, e1, ..., arithmetic). Figures are left out: they are files of their own. `fill`
writes what belongs there; `check` says what differs.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from fastent.experiments.document import Figure, Section, blocks_markdown
from fastent.train.errors import RunError
from fastent.train.files import write_atomically

_PLACE = re.compile(
    r"(?P<begin><!-- fastent report: (?P<anchor>\w+) -->\n)(?P<text>.*?)(?P<end><!-- fastent report: end -->)",
    re.DOTALL,
)


def documents(root: Path) -> list[Path]:
    """Find the Markdown files of a project, README and docs, that take in parts of the report."""
    found = [root / "README.md", *sorted((root / "docs").rglob("*.md"))]
    return [path for path in found if path.is_file() and _PLACE.search(path.read_text(encoding="utf-8"))]


def filled(text: str, sections: Sequence[Section], name: str) -> str:
    """Return the document `text`, called `name` in errors, with its parts of the report as `sections` give them.

    Raises
    ------
    RunError
        If it takes in no part, or a section that the report does not have.
    """
    by_anchor: Mapping[str, Section] = {section.anchor: section for section in sections}

    def part(place: re.Match[str]) -> str:
        section = by_anchor.get(place["anchor"])
        if section is None:
            raise RunError(
                f"{name} takes in the section {place['anchor']!r}, which these runs do not give; there are "
                f"{', '.join(by_anchor)}"
            )
        blocks = [block for block in section.blocks if not isinstance(block, Figure)]
        return f"{place['begin']}\n{blocks_markdown(blocks)}\n\n{place['end']}"

    new, count = _PLACE.subn(part, text)
    if not count:
        raise RunError(
            f"{name} takes in no part of the report: mark the place as <!-- fastent report: summary -->"
        )
    return new


def fill(paths: Sequence[Path], sections: Sequence[Section]) -> None:
    """Write the parts of the report into the documents `paths`. Raises as `filled`, and OSError."""
    for path in paths:
        text = filled(path.read_text(encoding="utf-8"), sections, str(path))
        write_atomically(path, text.encode())


def check(paths: Sequence[Path], sections: Sequence[Section]) -> list[str]:
    """Compare the documents `paths` with the report; return what differs as a unified diff, empty if nothing does.

    Raises
    ------
    RunError
        As `filled`.
    """
    lines: list[str] = []
    for path in paths:
        text = path.read_text(encoding="utf-8")
        new = filled(text, sections, str(path))
        lines += difflib.unified_diff(
            text.splitlines(),
            new.splitlines(),
            f"{path} as committed",
            f"{path} from the runs",
            lineterm="",
            n=1,
        )
    return lines
