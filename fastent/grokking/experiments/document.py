"""The report as data: sections of text, lists, tables, figures and code, written as HTML or as Markdown.

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

from fastent.train.errors import RunError
from fastent.train.files import write_atomically

CSS = """
:root {
  --paper: #ffffff; --ink: #1c2430; --soft: #5a6675; --line: #d9dee5; --panel: #f5f7f9; --link: #00639c;
  --yes: #00684b; --part: #8a5300; --no: #a3261b; --none: #5a6675;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --paper: #12161c; --ink: #e3e8ef; --soft: #9aa5b4; --line: #2c3541; --panel: #1a2029; --link: #6fbdf0;
    --yes: #4fd1a5; --part: #f0b45c; --no: #f58d83; --none: #9aa5b4;
  }
}
* { box-sizing: border-box; }
html { color-scheme: light dark; scroll-behavior: smooth; }
body {
  margin: 0 auto; max-width: 68rem; padding: 2rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.6 system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif;
}
header h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .5rem; letter-spacing: -.01em; }
header p { margin: 0; color: var(--soft); max-width: 48rem; }
nav { margin: 1.25rem 0 0; border: solid var(--line); border-width: 1px 0; padding: .6rem 0; font-size: .92rem; }
nav ol { margin: 0; padding: 0; list-style: none; display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; }
a { color: var(--link); text-decoration: none; }
a:hover, a:focus { text-decoration: underline; }
section { margin-top: 2.5rem; }
h2 { font-size: 1.35rem; line-height: 1.3; margin: 0 0 .75rem; }
p, ul { max-width: 48rem; margin: .6rem 0; }
ul { padding-left: 1.25rem; }
li { margin: .25rem 0; }
p.note { border-left: 3px solid var(--line); padding-left: .9rem; color: var(--soft); font-size: .94rem; }
code {
  font: .88em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; background: var(--panel);
  padding: .1em .3em; border-radius: .25em; overflow-wrap: anywhere;
}
pre {
  background: var(--panel); border: 1px solid var(--line); border-radius: .4rem; padding: .7rem .9rem;
  overflow-x: auto;
}
pre code { background: none; padding: 0; overflow-wrap: normal; }
.scroll { overflow-x: auto; margin: 1.1rem 0; }
table {
  border-collapse: collapse; max-width: 100%; min-width: min(100%, 30rem); font-size: .9rem; line-height: 1.45;
}
table:has(th:nth-child(5)) { min-width: 46rem; }
caption { text-align: left; color: var(--soft); padding-bottom: .5rem; max-width: 52rem; }
th, td { text-align: left; vertical-align: top; padding: .4rem .7rem .4rem 0; border-bottom: 1px solid var(--line); }
thead th { border-bottom: 2px solid var(--ink); font-weight: 600; vertical-align: bottom; }
td:last-child, th:last-child { padding-right: 0; }
.number { text-align: right; }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
.verdict { font-weight: 600; white-space: nowrap; }
.verdict.yes { color: var(--yes); }
.verdict.part { color: var(--part); }
.verdict.no { color: var(--no); }
.verdict.none { color: var(--none); font-weight: 400; }
figure { margin: 1.5rem 0; }
figure img { display: block; width: 100%; height: auto; }
figcaption { color: var(--soft); font-size: .92rem; max-width: 52rem; margin-top: .5rem; }
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; }
  nav { display: none; }
  figure, tr { break-inside: avoid; }
  h2 { break-after: avoid; }
  .scroll { overflow: visible; }
}
"""


@dataclass(frozen=True)
class Text:
    """One paragraph; `kind` "note" sets it apart as a remark."""

    text: str
    kind: str = "plain"


@dataclass(frozen=True)
class Items:
    """A list of sentences."""

    items: tuple[str, ...]


@dataclass(frozen=True)
class Code:
    """Commands or configuration, verbatim."""

    text: str


class Verdict(Enum):
    """A judgement: its `label`, and its `kind`: "yes", "part", "no" or "none" (nothing was judged)."""

    REPRODUCED = ("reproduced", "yes")
    IN_PART = ("in part", "part")
    NOT_REPRODUCED = ("not reproduced", "no")
    OTHER_SETTING = ("other setting", "none")
    """The number belongs to a setting that these runs do not have."""
    NOT_RUN = ("not run", "none")
    NO_CASE = ("no case", "none")
    """The runs hold nothing that the claim is about."""
    MIXED = ("mixed settings", "none")
    """The runs were not made with one and the same settings: what they say together is said of none."""
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


Block = Text | Items | Code | Table | Figure


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
    """One self-contained page."""
    links = "".join(f'<li><a href="#{_escape(s.anchor)}">{_inline(s.title)}</a></li>' for s in sections)
    body = "\n".join(_section_html(section) for section in sections)
    return (
        "<!DOCTYPE html>\n"
        '<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{_escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        f"<header><h1>{_inline(title)}</h1><p>{_inline(subtitle)}</p></header>\n"
        f"<nav><ol>{links}</ol></nav>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _section_html(section: Section) -> str:
    blocks = "\n".join(_block_html(block) for block in section.blocks)
    return (
        f'<section id="{_escape(section.anchor)}">\n<h2>{_inline(section.title)}</h2>\n{blocks}\n</section>'
    )


def _block_html(block: Block) -> str:
    match block:
        case Text(text, kind):
            return f'<p class="{kind}">{_inline(text)}</p>' if kind != "plain" else f"<p>{_inline(text)}</p>"
        case Items(items):
            return "<ul>" + "".join(f"<li>{_inline(item)}</li>" for item in items) + "</ul>"
        case Code(text):
            return f"<pre><code>{_escape(text)}</code></pre>"
        case Table():
            return _table_html(block)
        case Figure():
            return _figure_html(block)


def _table_html(table: Table) -> str:
    right = [' class="number"' if i in table.numbers else "" for i in range(len(table.columns))]
    head = "".join(f'<th scope="col"{c}>{_inline(t)}</th>' for c, t in zip(right, table.columns, strict=True))
    rows = "\n".join(
        "<tr>" + "".join(f"<td{c}>{_cell_html(t)}</td>" for c, t in zip(right, row, strict=True)) + "</tr>"
        for row in table.rows
    )
    return (
        f'<div class="scroll"><table>\n<caption>{_inline(table.caption)}</caption>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table></div>"
    )


def _cell_html(cell: str | Verdict) -> str:
    if isinstance(cell, Verdict):
        return f'<span class="verdict {cell.kind}">{_inline(cell.label)}</span>'
    return _inline(cell)


def _figure_html(figure: Figure) -> str:
    dark = f'<source media="screen and (prefers-color-scheme: dark)" srcset="{_data(figure.dark)}">'
    light = f'<img src="{_data(figure.light)}" alt="{_escape(figure.alt)}">'
    return (
        f"<figure><picture>{dark}{light}</picture>\n"
        f"<figcaption>{_inline(figure.caption)}</figcaption></figure>"
    )


def _data(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def _escape(text: str) -> str:
    return html.escape(text, quote=True)


def _inline(text: str) -> str:
    # A number keeps its per cent sign, and n its value, on one line.
    kept = re.sub(r"(?<=\d) %", "&nbsp;%", _escape(text)).replace("n = ", "n&nbsp;=&nbsp;")
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
        case Items(items):
            return "\n".join(f"- {_plain(item)}" for item in items)
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
