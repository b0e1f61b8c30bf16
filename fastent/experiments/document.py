"""The report as data: sections of text, lists, tables, figures and code, written as HTML or as Markdown.

Text is plain: a pair of backticks marks code and nothing else is markup. Everything is escaped on the way
out, so text that comes from a file can hold no tag. The HTML is one page without scripts, fonts or links to
anything outside it; figures are embedded as SVG data, once for light and once for dark screens. The Markdown
links the light figures, which the caller writes beside it (`figures_of`).
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fastent.experiments.style import CSS


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


@dataclass(frozen=True)
class Verdict:
    """A judgement: a short `label` and its `kind`: "yes", "part", "no" or "none" (nothing to judge)."""

    kind: str
    label: str


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
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    rule = ["---:" if i in table.numbers else "---" for i in range(len(table.columns))]
    rows = [[_cell_markdown(cell) for cell in row] for row in table.rows]
    lines = [line([_cell_markdown(c) for c in table.columns]), line(rule), *(line(row) for row in rows)]
    return f"*{_plain(table.caption)}*\n\n" + "\n".join(lines)


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
