"""The report as data: sections of text, tables, figures and code, written as HTML or as Markdown.

Text is plain: a pair of backticks marks code and nothing else is markup. Everything is escaped on the way out, so text
that comes from a file can hold no tag. The HTML is one page without scripts, fonts or links to anything outside it;
figures are embedded as SVG data, once for light and once for dark screens. The Markdown links the light figures, which
the caller writes beside it (`figures_of`).

A committed document takes in a section of the report between two comments, which no reader of the page sees::

    <!-- fastent report: summary -->
    ...
    <!-- fastent report: end -->

with the section's anchor (summary, e1, ..., arithmetic), its figures left out: they are files of their own. `fill`
writes what belongs there; `check` says what differs.
"""

from __future__ import annotations

import base64
import difflib
import html
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from fastent.grokking.train.storage import RunError, write_atomically


@dataclass(frozen=True)
class Text:
    """One paragraph; `kind` "note" sets it apart as a remark."""

    text: str
    kind: str = "plain"


@dataclass(frozen=True)
class Code:
    """Commands or configuration, verbatim."""

    text: str


class Verdict(Enum):
    """A judgement: its `label`, and its `kind`: "yes", "part", "no" or "none" (nothing was judged)."""

    REPRODUCED = ("reproduced", "yes")
    IN_PART = ("in part", "part")
    NOT_REPRODUCED = ("not reproduced", "no")
    UNDECIDED = ("undecided", "none")
    """The runs leave it open: a control is missing, or the interval is too wide."""
    OTHER_SETTING = ("other setting", "none")
    """The number belongs to a setting that these runs do not have."""
    NOT_RUN = ("not run", "none")
    NO_CASE = ("no case", "none")
    """The runs hold nothing that the claim is about."""
    MIXED = ("mixed settings", "none")
    """The runs were not made with one and the same settings: what they say together is said of none."""
    CALIBRATED = ("calibrated", "none")
    """It agrees, and the setting was chosen so that it would: no evidence."""
    AS_EXPECTED = ("as it must be", "yes")
    NOT_AS_EXPECTED = ("not as it must be", "no")
    FOLLOWS = ("follows", "yes")
    DOUBTFUL = ("doubtful", "part")
    CONTRADICTS = ("contradicts", "no")

    def __init__(self, label: str, kind: str) -> None:
        self.label = label
        self.kind = kind


@dataclass(frozen=True)
class Table:
    """A table with its caption; a cell is text or a `Verdict`, and the columns in `numbers` align right.

    Raises
    ------
    ValueError
        If a row is not as long as `columns`.
    """

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | Verdict, ...], ...]
    numbers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(
                    f"a row needs {len(self.columns)} cells, as the table has columns; got {len(row)}"
                )


@dataclass(frozen=True)
class Figure:
    """A picture as SVG for light and for dark screens; `name` is its file's stem, `alt` is its text."""

    name: str
    caption: str
    alt: str
    light: str
    dark: str


Block = Text | Code | Table | Figure


@dataclass(frozen=True)
class Section:
    """A headed part of the report; `anchor` is its link inside the page."""

    anchor: str
    title: str
    blocks: tuple[Block, ...]


def figures_of(sections: Sequence[Section]) -> Iterator[Figure]:
    """All figures, in order."""
    for section in sections:
        for block in section.blocks:
            if isinstance(block, Figure):
                yield block


def as_html(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """Write one self-contained page, by the template beside this module."""
    import jinja2
    from markupsafe import Markup

    pages = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    pages.filters |= {
        "text": lambda text: Markup(html.escape(text)),
        "inline": lambda text: Markup(_inline(text)),
        "data": _data,
        "kind": lambda block: type(block).__name__,
    }
    return pages.get_template("page.html.jinja").render(title=title, subtitle=subtitle, sections=sections)


def _data(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def _inline(text: str) -> str:
    # A number keeps its per cent sign, and n its value, on one line.
    kept = re.sub(r"(?<=\d) %", "&nbsp;%", html.escape(text)).replace("n = ", "n&nbsp;=&nbsp;")
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", kept)


def as_markdown(title: str, subtitle: str, sections: Sequence[Section], figures: str = "figures") -> str:
    """Write the same as Markdown with GitHub's tables; figures are linked as ``<figures>/<name>.svg``."""
    parts = [f"# {_plain(title)}", _plain(subtitle)]
    for section in sections:
        parts += [f"## {_plain(section.title)}", blocks_markdown(section.blocks, figures)]
    return "\n\n".join(parts) + "\n"


def blocks_markdown(blocks: Sequence[Block], figures: str = "figures") -> str:
    """Write blocks as Markdown, without a heading."""
    return "\n\n".join(_block_markdown(block, figures) for block in blocks)


def _block_markdown(block: Block, figures: str) -> str:
    match block:
        case Text(text, kind):
            return _plain(text) if kind == "plain" else f"> {_plain(text)}"
        case Code(text):
            fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
            return f"{fence}\n{text}\n{fence}"
        case Table():
            return _table_markdown(block)
        case Figure():
            return f"![{_plain(block.alt)}]({figures}/{block.name}.svg)\n\n*{_plain(block.caption)}*"


def _table_markdown(table: Table) -> str:
    columns, *rows = ([_cell_markdown(cell) for cell in row] for row in (table.columns, *table.rows))
    return f"*{_plain(table.caption)}*\n\n" + markdown_table(columns, rows, table.numbers)


def markdown_table(
    columns: Sequence[object], rows: Iterable[Sequence[object]], numbers: Sequence[int] = ()
) -> str:
    """Write cells as they are as a Markdown table; the columns at `numbers` align right."""
    rule = ["---:" if i in numbers else "---" for i in range(len(columns))]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (columns, rule, *rows))


def _cell_markdown(cell: str | Verdict) -> str:
    text = cell.label if isinstance(cell, Verdict) else cell
    return _plain(text).replace("\n", " ")


def _plain(text: str) -> str:
    """Escape what Markdown or a renderer of it would take for markup, outside of code spans."""
    spans = re.split(r"(`[^`]+`)", text)
    return "".join(
        s.replace("|", r"\|") if i % 2 else re.sub(r"([\\*_|\[\]])", r"\\\1", html.escape(s, quote=False))
        for i, s in enumerate(spans)
    )


TAG = "fastent report"


def marked(text: str, tag: str, make: Callable[[str], str]) -> tuple[str, int]:
    """Make anew what stands between ``<!-- TAG: NAME -->`` and ``<!-- TAG: end -->``; return the text and the count."""
    return re.subn(
        rf"(<!-- {tag}: (\w+) -->\n).*?(<!-- {tag}: end -->)",
        lambda place: place[1] + make(place[2]) + place[3],
        text,
        flags=re.DOTALL,
    )


def documents(root: Path) -> list[Path]:
    """Find the Markdown files of a project, README and docs, that take in parts of the report."""
    found = [root / "README.md", *sorted((root / "docs").rglob("*.md"))]
    return [path for path in found if path.is_file() and f"<!-- {TAG}: " in path.read_text(encoding="utf-8")]


def filled(text: str, sections: Sequence[Section], name: str) -> str:
    """Return the document `text`, called `name` in errors, with its parts of the report as `sections` give them.

    Raises
    ------
    RunError
        If it takes in no part, or a section that the report does not have.
    """
    by_anchor: Mapping[str, Section] = {section.anchor: section for section in sections}

    def part(anchor: str) -> str:
        section = by_anchor.get(anchor)
        if section is None:
            raise RunError(
                f"{name} takes in the section {anchor!r}, which these runs do not give; there are "
                f"{', '.join(by_anchor)}"
            )
        blocks = [block for block in section.blocks if not isinstance(block, Figure)]
        return f"\n{blocks_markdown(blocks)}\n\n"

    new, count = marked(text, TAG, part)
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
