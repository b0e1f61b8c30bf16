"""Small tables by which results show themselves in a notebook and where rich prints.

The HTML has no colours of its own, so that it can be read on a light and on a dark page, and every text in it is
escaped: names of layers are the user's. Of a long table the ends are shown. A plain `repr` is one line.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

MOST_ROWS = 20


class Table(NamedTuple):
    """Rows of text, with their heads where there are any, below a title and above a remark."""

    title: str
    rows: Sequence[Sequence[str]]
    heads: Sequence[str] = ()
    remark: str = ""

    def cut(self) -> Table:
        """Return the table with the first and last rows of many."""
        if len(self.rows) <= MOST_ROWS:
            return self
        half = MOST_ROWS // 2
        gap = [f"… {len(self.rows) - 2 * half} more", *[""] * (len(self.rows[0]) - 1)]
        return self._replace(rows=[*self.rows[:half], gap, *self.rows[-half:]])


class Shown:
    """What has a small table, asked for when it is shown."""

    def _table(self) -> Table:
        raise NotImplementedError

    def _repr_html_(self) -> str:
        import html

        table = self._table().cut()

        def row(kind: str, cells: Sequence[str]) -> str:
            first, *others = (html.escape(cell) for cell in cells)
            left = f'<{kind} style="text-align: left">{first}</{kind}>'
            return f"<tr>{left}{''.join(f'<{kind}>{cell}</{kind}>' for cell in others)}</tr>"

        head = f"<thead>{row('th', table.heads)}</thead>" if table.heads else ""
        body = "".join(row("td", cells) for cells in table.rows)
        remark = f"<p>{html.escape(table.remark)}</p>" if table.remark else ""
        return (
            f"<div><b>{html.escape(table.title)}</b><table>{head}<tbody>{body}</tbody></table>{remark}</div>"
        )

    def __rich__(self) -> Any:
        from rich import box
        from rich.console import Group
        from rich.table import Table as RichTable
        from rich.text import Text  # not markup: a name may have brackets

        table = self._table().cut()
        shown = RichTable(box=box.SIMPLE_HEAD, show_header=bool(table.heads))
        for i, head in enumerate(table.heads or [""] * len(table.rows[0])):
            shown.add_column(Text(head), justify="right" if i and table.heads else "left")
        for cells in table.rows:
            shown.add_row(*map(Text, cells))
        return Group(Text(table.title, "bold"), shown, *([Text(table.remark)] if table.remark else []))


def digits(value: Any) -> str:
    """Write a number to four digits, those before the point all; a dash where there is none."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value:.0f}" if 1e4 <= abs(value) < 1e9 else f"{float(value):.4g}"


def whole(value: float | None) -> str:
    """Write a step or another count; a dash where there is none."""
    return "–" if value is None or math.isnan(value) else f"{value:,.0f}"


def between(interval: tuple[float, float] | None, write: Callable[[float], str] = digits) -> str:
    """Write an interval; a dash where there is none."""
    return "–" if interval is None else f"{write(interval[0])} to {write(interval[1])}"
