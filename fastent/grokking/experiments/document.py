"""The report as data: sections of text, tables, figures and code, written as HTML or as Markdown.

Text is plain: a pair of single backticks marks code and nothing else is markup; links are `Link`s. Everything is
escaped on the way out, so text that comes from a file, whose names may hold anything, makes no tag, no line and no
cell. The HTML is one page without scripts, fonts or links to anything outside it; figures are embedded as SVG data,
once for light and once for dark screens. The Markdown links the light figures, which the caller writes beside it
(`figures_of`).

A committed document takes in a section of the report between two comments, which no reader of the page sees::

    <!-- fastent report: summary -->
    ...
    <!-- fastent report: end -->

with the section's anchor (summary, e1, ..., arithmetic). `fill` writes what belongs there, and the section's figures as
files below the document; `check` says what differs, and which of the figures is not there.
"""

from __future__ import annotations

import base64
import difflib
import functools
import html
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import zip_longest
from pathlib import Path
from urllib.parse import quote

from fastent.grokking.train.storage import RunError, write_atomically


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
class Link:
    """A link within the report: to the section, the group or the figure that has the anchor."""

    label: str
    anchor: str


Piece = str | Verdict | Link
Words = Piece | tuple[Piece, ...]
"""What stands in a paragraph or a cell: text, a verdict, a link, or several of them one after the other."""


@dataclass(frozen=True)
class Text:
    """One paragraph; `kind` "note" sets it apart as a remark."""

    text: Words
    kind: str = "plain"


@dataclass(frozen=True)
class Items:
    """A numbered list of short paragraphs."""

    items: tuple[Words, ...]


@dataclass(frozen=True)
class Links:
    """Where to read on; what leads elsewhere than into a document is left out of it."""

    links: tuple[Link, ...]


@dataclass(frozen=True)
class Code:
    """Commands or configuration, verbatim."""

    text: str


@dataclass(frozen=True)
class Table:
    """A table with its caption; the columns in `numbers` align right.

    Raises
    ------
    ValueError
        If a row is not as long as `columns`.
    """

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Words, ...], ...]
    numbers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(
                    f"a row needs {len(self.columns)} cells, as the table has columns; got {len(row)}"
                )


@dataclass(frozen=True)
class Figure:
    """A picture; `name` is its anchor and its file's stem, `alt` its text.

    `draw` returns it as SVG for light and for dark screens. It is drawn when it is first asked for, so who reads the
    words alone waits for no picture.
    """

    name: str
    caption: str
    alt: str
    draw: Callable[[], tuple[str, str]]

    @functools.cached_property
    def _drawn(self) -> tuple[str, str]:
        return self.draw()

    @property
    def light(self) -> str:
        """SVG for light screens."""
        return self._drawn[0]

    @property
    def dark(self) -> str:
        """SVG for dark screens."""
        return self._drawn[1]


@dataclass(frozen=True)
class Group:
    """Blocks that are folded away behind one line, `summary`, until a reader opens them; no figures."""

    anchor: str
    summary: Words
    blocks: tuple[Block, ...]


Block = Text | Items | Links | Code | Table | Figure | Group


@dataclass(frozen=True)
class Section:
    """A headed part of the report; `anchor` is its link inside the page."""

    anchor: str
    title: str
    blocks: tuple[Block, ...]

    @property
    def short(self) -> str:
        """Its title for a list of contents: what stands before a colon."""
        return self.title.partition(":")[0]


def figures_of(sections: Sequence[Section]) -> Iterator[Figure]:
    """All figures, in order."""
    for section in sections:
        for block in section.blocks:
            if isinstance(block, Figure):
                yield block


def anchors_of(sections: Sequence[Section]) -> set[str]:
    """All that a link can lead to."""
    blocks = [block for section in sections for block in section.blocks]
    return {
        *(section.anchor for section in sections),
        *(block.name for block in blocks if isinstance(block, Figure)),
        *(block.anchor for block in blocks if isinstance(block, Group)),
    }


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
        "text": lambda text: Markup(html.escape(_visible(text))),
        "words": lambda words: Markup(_html(words)),
        "data": _data,
        "kind": lambda block: type(block).__name__,
    }
    return pages.get_template("page.html.jinja").render(title=title, subtitle=subtitle, sections=sections)


def _data(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def _html(words: Words) -> str:
    match words:
        case tuple():
            return "".join(map(_html, words))
        case Verdict():
            return f'<span class="verdict {words.kind}">{_inline(words.label)}</span>'
        case Link():
            return f'<a href="#{html.escape(words.anchor)}">{_inline(words.label)}</a>'
    return _inline(words)


def _inline(text: str) -> str:
    # A number keeps its per cent sign, and n its value, on one line.
    kept = re.sub(r"(?<=\d) %", "&nbsp;%", html.escape(_visible(text))).replace("n = ", "n&nbsp;=&nbsp;")
    return re.sub(CODE, r"<code>\1</code>", kept)


CODE = r"(?<!`)`(?!`)([^`]+)(?<!`)`(?!`)"
"""Code within text, as Markdown reads it: a backtick beside another is no mark."""


def _visible(text: str) -> str:
    """`text` without what has no place on a page: controls, changes of direction, halves of characters."""
    kept = re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", " ", text)
    return kept.encode("utf-8", "backslashreplace").decode()


def as_markdown(title: str, subtitle: str, sections: Sequence[Section], figures: str = "figures") -> str:
    """Write the same as Markdown with GitHub's tables; figures are linked as ``<figures>/<name>.svg``."""
    write = _Markdown(figures, anchors_of(sections))
    parts = [f"# {_plain(title)}", _plain(subtitle)]
    for section in sections:
        parts += [f"{_place(section.anchor)}\n\n## {_plain(section.title)}", write.blocks(section.blocks)]
    return "\n\n".join(parts) + "\n"


def _place(anchor: str) -> str:
    return f'<a id="{html.escape(anchor)}"></a>'


@dataclass(frozen=True)
class _Markdown:
    """Blocks as Markdown: figures lie in the folder `figures`, and what leads elsewhere than `anchors` is no link."""

    figures: str
    anchors: Collection[str]

    def blocks(self, blocks: Sequence[Block]) -> str:
        return "\n\n".join(filter(None, map(self.block, blocks)))

    def block(self, block: Block) -> str:
        match block:
            case Text(text, kind):
                return self.words(text) if kind == "plain" else f"> {self.words(text)}"
            case Items(items):
                return "\n".join(f"{place}. {self.words(item)}" for place, item in enumerate(items, 1))
            case Links(links):
                found = ", ".join(self.words(link) for link in links if link.anchor in self.anchors)
                return found and f"See {found}."
            case Code(text):
                fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
                return f"{fence}\n{_visible(text)}\n{fence}"
            case Table():
                columns, *rows = ([self.words(cell) for cell in row] for row in (block.columns, *block.rows))
                return f"*{_plain(block.caption)}*\n\n" + markdown_table(columns, rows, block.numbers)
            case Figure():
                picture = f"![{_plain(block.alt)}]({quote(f'{self.figures}/{block.name}.svg')})"
                return f"{_place(block.name)}\n\n{picture}\n\n*{_plain(block.caption)}*"
            case Group():
                # A renderer reads no Markdown in a summary.
                summary = f"<details>\n<summary>{_text(block.summary)}</summary>"
                return f"{_place(block.anchor)}\n\n{summary}\n\n{self.blocks(block.blocks)}\n\n</details>"

    def words(self, words: Words) -> str:
        match words:
            case tuple():
                return "".join(map(self.words, words))
            case Verdict():
                return _plain(words.label)
            case Link():
                label = _plain(words.label)
                return f"[{label}](#{words.anchor})" if words.anchor in self.anchors else label
        return _plain(words)


def _text(words: Words) -> str:
    if isinstance(words, tuple):
        return "".join(map(_text, words))
    return html.escape(_line(words if isinstance(words, str) else words.label), quote=False)


def markdown_table(
    columns: Sequence[object], rows: Iterable[Sequence[object]], numbers: Sequence[int] = ()
) -> str:
    """Write cells as they are as a Markdown table; the columns at `numbers` align right."""
    rule = ["---:" if i in numbers else "---" for i in range(len(columns))]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (columns, rule, *rows))


def _plain(text: str) -> str:
    """Escape what Markdown or a renderer of it would take for markup; code spans stay, on the same line."""
    spans = re.split(CODE, _line(text))
    return "".join(
        _code(s) if i % 2 else re.sub(r"([\\`*_|\[\]])", r"\\\1", html.escape(s, quote=False))
        for i, s in enumerate(spans)
    )


def _code(text: str) -> str:
    if re.search(r"[\\<>&]", text) is None:
        return f"`{text}`".replace("|", r"\|")
    # A backslash before a bar would end the cell of a table, and with it the span.
    marks = re.sub(r"[^\w\s]|_", lambda mark: f"&#{ord(mark[0])};", text)
    return f"<code>{marks}</code>"


def _line(text: str) -> str:
    return re.sub(r"\s*[\n\u2028\u2029]\s*", " ", _visible(text))


TAG = "fastent report"


def marked(text: str, tag: str, make: Callable[[str], str]) -> str:
    """Make anew what stands between each ``<!-- TAG: NAME -->`` and the ``<!-- TAG: end -->`` below it.

    Raises
    ------
    ValueError
        If no place is marked, or a mark is without its end or an end without its mark.
    """
    marks = list(re.finditer(rf"<!-- {tag}: (\w+) -->", text))
    if not marks:
        raise ValueError(f"no place is marked by <!-- {tag}: NAME --> and, below it, <!-- {tag}: end -->")
    parts, kept = [], 0
    for first, last in zip_longest(marks[::2], marks[1::2]):
        line = text.count("\n", 0, first.start()) + 1
        if first[1] == "end":
            raise ValueError(f"{first[0]} in line {line} ends nothing")
        if last is None or last[1] != "end":
            raise ValueError(f"{first[0]} in line {line} has no end: put <!-- {tag}: end --> below it")
        parts += [text[kept : first.end()], "\n", make(first[1])]
        kept = last.start()
    return "".join((*parts, text[kept:]))


def documents(root: Path, runs: Path) -> list[Path]:
    """Find the Markdown files of a project, README and docs, that take in parts of the report on the folder `runs`.

    One that says of which runs it is, as in ``<!-- fastent report of bench/results/paper -->``, is of those alone.
    """
    found = [root / "README.md", *sorted((root / "docs").rglob("*.md"))]
    texts = {path: _contents(path) for path in found if path.is_file()}
    of = {path: re.search(rf"<!-- {TAG} of (\S+) -->", text) for path, text in texts.items()}
    return [
        path
        for path, text in texts.items()
        if f"<!-- {TAG}: " in text
        and ((said := of[path]) is None or (root / said[1]).resolve() == runs.resolve())
    ]


def _contents(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RunError(f"{path} is no text in UTF-8: {error}") from error


def filled(path: Path, sections: Sequence[Section], figures: str) -> tuple[str, list[Figure]]:
    """Return the text of the document `path` with its parts of the report as `sections` give them, and their figures.

    Its figures are linked as ``<figures>/<name>.svg``.

    Raises
    ------
    RunError
        If it takes in no part, or a section that the report does not have, if a mark is without its end, or if it is
        not in UTF-8.
    """
    by_anchor: Mapping[str, Section] = {section.anchor: section for section in sections}
    text = _contents(path)
    taken = re.findall(rf"<!-- {TAG}: (?!end )(\w+) -->", text)
    if not taken:
        raise RunError(
            f"{path} takes in no part of the report: mark the place as <!-- fastent report: summary -->"
        )
    for anchor in taken:
        if anchor not in by_anchor:
            raise RunError(
                f"{path} takes in the section {anchor!r}, which these runs do not give; there are "
                f"{', '.join(by_anchor)}"
            )
    parts = [by_anchor[anchor] for anchor in taken]
    write = _Markdown(figures, anchors_of(parts))
    try:
        new = marked(
            text, TAG, lambda anchor: f"\n{_place(anchor)}\n\n{write.blocks(by_anchor[anchor].blocks)}\n\n"
        )
    except ValueError as error:
        raise RunError(f"{path}: {error}") from error
    return new, list(figures_of(parts))


def fill(paths: Sequence[Path], sections: Sequence[Section], figures: str) -> None:
    """Write the parts of the report into the documents `paths`, and their figures into `figures` beside each.

    Raises as `filled`, before anything is written, and OSError.
    """
    made = [(path, *filled(path, sections, figures)) for path in paths]
    for path, text, pictures in made:
        write_atomically(path, text.encode())
        save(pictures, path.parent / figures)


def save(pictures: Iterable[Figure], folder: Path) -> None:
    """Write figures for light screens as SVG files into `folder`, which is made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        write_atomically(folder / f"{picture.name}.svg", picture.light.encode())


def check(paths: Sequence[Path], sections: Sequence[Section], figures: str) -> list[str]:
    """Compare the documents `paths` with the report; return what differs as a unified diff, empty if nothing does.

    Of a figure it is only seen that its file is there: another version of the drawing library draws other bytes.

    Raises
    ------
    RunError
        As `filled`.
    """
    lines: list[str] = []
    for path in paths:
        new, pictures = filled(path, sections, figures)
        lines += difflib.unified_diff(
            _contents(path).splitlines(),
            new.splitlines(),
            f"{path} as committed",
            f"{path} from the runs",
            lineterm="",
            n=1,
        )
        files = [path.parent / figures / f"{picture.name}.svg" for picture in pictures]
        lines += [
            f"{file} is not there: `fastent report` with --fill draws it"
            for file in files
            if not file.is_file()
        ]
    return lines
