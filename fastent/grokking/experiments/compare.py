"""Settings side by side: what differs between runs, when they memorise and grok, H* and curves, as text and as HTML.

A group is the complete runs of one place that share everything but the seed. Groups of the same experiment, condition
and task are set side by side where there are several, as of two folders; else all groups are. The first of them is what
the others are compared with: by pairs of runs where three seeds or more are shared (a seed decides split, start and
batches), else as groups that share nothing. Intervals are those of `fastent.grokking.experiments.statistics`, of single
comparisons: of many of them some miss by chance.

Times are restricted to the step up to which all runs of a section are known, where one of them ended without the event:
a run that did not grok counts with that step.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.text import Text

from fastent.grokking.experiments import document
from fastent.grokking.experiments.claims import decimal, of, span, steps
from fastent.grokking.experiments.data import Runs, StoredRun
from fastent.grokking.experiments.document import Block, Section, Table
from fastent.grokking.experiments.figures import (
    DASHED,
    DOTTED,
    GROK,
    LIGHT,
    WIDTH,
    drawn,
    lines,
    mark,
    mean_over_runs,
    save_png,
    thousands,
)
from fastent.grokking.experiments.folder import Folder, RunState, State, skipped, some
from fastent.grokking.experiments.statistics import FEWEST, Array, Estimate, Times, over, share, welch
from fastent.grokking.experiments.watch import (
    blocks_of,
    new_table,
    plain_console,
    show,
    sparkline,
    width_of,
)
from fastent.grokking.train.storage import RunError, write_atomically

LOOKS: tuple[dict[str, Any], ...] = (
    {"color": LIGHT.test, "linestyle": "solid"},
    {"color": LIGHT.entropy, "linestyle": DASHED},
    {"color": LIGHT.norm, "linestyle": "dashdot"},
    {"color": LIGHT.signal, "linestyle": DOTTED},
    {"color": LIGHT.ink, "linestyle": "solid"},
    {"color": LIGHT.train, "linestyle": DASHED},
)
"""Colour and line of each group in a picture: of more than these none is drawn, for they could not be told apart."""

CURVES = (("entropy", "H (no unit)"), ("test_accuracy", "test accuracy (share)"))
"""What is drawn, each with the label of its axis."""


@dataclass(frozen=True, eq=False)
class Group:
    """Complete runs of one place that share everything but the seed.

    Attributes
    ----------
    source : str
        Where they lie, as it was given.
    kind : str
        Their name without the seed.
    runs : Runs
    """

    source: str
    kind: str
    runs: Runs

    @property
    def key(self) -> tuple[str, str, str]:
        """Experiment, condition and task."""
        first = self.runs.stored[0]
        return first.experiment, first.condition, str(first.config["task"])

    @property
    def config(self) -> dict[str, Any]:
        """Every setting, as JSON gives it; the measures aside, which change nothing."""
        return {key: value for key, value in self.runs.stored[0].config.items() if key != "measures"}

    def times(self, name: str) -> Times:
        """Return its T_mem or T_grok, censored at the ends of its runs."""
        return Times.of(getattr(self.runs, name), self.runs.end)


@dataclass(frozen=True, eq=False)
class Row:
    """Numbers of a group, or of what it has beyond the first; unknown where there are none."""

    name: str
    n: str
    grokked: Estimate | None
    t_mem: Estimate
    t_grok: Estimate
    h_star: Estimate


@dataclass(frozen=True, eq=False)
class Side:
    """Groups side by side, each with a letter; the first is what the others are compared with."""

    title: str
    groups: tuple[Group, ...]

    @cached_property
    def names(self) -> list[str]:
        """What tells each group from the others, place and kind as far as they differ."""
        parts = [
            [getattr(group, name) for group in self.groups]
            for name in ("source", "kind")
            if len({getattr(group, name) for group in self.groups}) > 1
        ]
        names = [": ".join(each) for each in zip(*parts, strict=True)] or [g.source for g in self.groups]
        return [
            name if names.count(name) == 1 else f"{name}, seeds {','.join(map(str, group.runs.seeds))}"
            for name, group in zip(names, self.groups, strict=True)
        ]

    @property
    def differing(self) -> dict[str, list[Any]]:
        """Settings that are not the same for all groups, each with its values, None where a record has none."""
        configs = [group.config for group in self.groups]
        fields = dict.fromkeys(key for config in configs for key in config)
        rows = {key: [config.get(key) for config in configs] for key in fields}
        return {key: values for key, values in rows.items() if any(value != values[0] for value in values)}

    @property
    def fields(self) -> int:
        """Count all settings that were compared."""
        return len({key for group in self.groups for key in group.config})

    def limit(self, name: str) -> float:
        """Step that T_mem or T_grok is restricted to: the earliest end without it; infinite if all came to it."""
        return min(group.times(name).cut for group in self.groups)

    @cached_property
    def rows(self) -> list[Row]:
        """The numbers of each group, and after those what each has beyond the first."""
        first = self.groups[0]
        values: list[dict[str, Array]] = [
            {
                "t_mem": np.minimum(group.times("t_mem").values, self.limit("t_mem")),
                "t_grok": np.minimum(group.times("t_grok").values, self.limit("t_grok")),
                "h_star": group.runs.h_star,
            }
            for group in self.groups
        ]
        found = []
        for letter, group, own in zip(ascii_uppercase, self.groups, values, strict=False):
            ends = {"t_mem": self.limit("t_mem"), "t_grok": self.limit("t_grok"), "h_star": 1.0}
            numbers = {name: over(own[name], least=0, most=ends[name]) for name in own}
            found.append(Row(letter, str(len(group.runs)), share(group.runs.grokked), **numbers))
        for letter, group, own in zip(ascii_uppercase[1:], self.groups[1:], values[1:], strict=False):
            shared = set(first.runs.seeds) & set(group.runs.seeds)
            paired = len(shared) >= FEWEST
            gaps = {
                name: difference(
                    first.runs.seeds, values[0][name], group.runs.seeds, own[name], paired=paired
                )
                for name in own
            }
            rests_on = f"{len(shared)} pairs" if paired else f"{len(first.runs)} + {len(group.runs)}"
            found.append(Row(f"{letter} − A", rests_on, None, **gaps))
        return found

    @property
    def note(self) -> str:
        """Say what the numbers rest on."""
        said = "Means with 95 % intervals over runs"
        for name, title in (("t_mem", "T_mem"), ("t_grok", "T_grok")):
            if math.isfinite(limit := self.limit(name)):
                said += f"; {title} restricted to step {limit:,.0f}, where a run ended without it"
        return (
            said + "; differences by pairs of seeds where three are shared, else of independent runs (Welch)."
        )


def difference(
    seeds: Sequence[int], values: Array, other_seeds: Sequence[int], others: Array, *, paired: bool
) -> Estimate:
    """Mean of `others` less that of `values`: of the seeds that both have, or of groups that share nothing."""
    if paired:
        there = dict(zip(seeds, values, strict=True))
        return over(b - there[seed] for seed, b in zip(other_seeds, others, strict=True) if seed in there)
    known = [each[np.isfinite(each)] for each in (values, others)]
    return welch(*known) if all(each.size for each in known) else Estimate()


@dataclass(frozen=True, eq=False)
class Compared:
    """What was found in the places given: sides, kinds that are in one place alone, and what was left out."""

    sides: tuple[Side, ...]
    alone: dict[str, list[str]]
    left_out: list[str] = field(default_factory=list)


def read(paths: Sequence[Path]) -> Compared:
    """Read groups of runs and set them side by side.

    Parameters
    ----------
    paths : sequence of Path
        Folders of runs, single runs' folders, and files of packed runs.

    Raises
    ------
    RunError
        As `Folder`; and if there is one group alone, none, or more than there are letters on a side.
    ValueError
        If a path is given twice.
    """
    if twice := [path for i, path in enumerate(paths) if path in paths[:i]]:
        raise ValueError(f"{twice[0]} is given twice: name another place to compare it with")
    found: dict[tuple[str, str, str], list[StoredRun]] = {}
    left_out = []
    for path in paths:
        folder = Folder(path, whole=True)
        for state in folder.look():
            if state.state is State.COMPLETE and state.stored is not None:
                run = state.stored
                source = path.parent if path == run.path or path.is_file() else path
                settings = json.dumps({**run.config, "measures": []}, sort_keys=True)
                found.setdefault((str(source), run.name.rpartition("-seed")[0], settings), []).append(run)
            else:
                left_out.append(f"{path}: {_why(state)}")
            if state.copies:
                left_out.append(
                    f"{path}: {state.name} lies there again, counted once: {some(list(state.copies))}"
                )
        if folder.foreign:
            left_out.append(f"{path}: {skipped(folder.foreign)}")
    groups = []
    places: dict[str, str] = {}
    for (where, kind, _), runs in found.items():
        once: dict[str, StoredRun] = {}
        for run in runs:
            once.setdefault(run.identity, run)
        left_out += [
            f"{where}: {run.name} is {once[run.identity].name} again, counted once"
            for run in runs
            if run is not once[run.identity]
        ]
        here = f"{where}/{kind}"
        elsewhere = [run for run in once.values() if places.setdefault(run.identity, here) != here]
        if elsewhere:
            names, first = some([run.name for run in elsewhere]), places[elsewhere[0].identity]
            left_out.append(f"{where}: {names}: the same in {first}, copies and no other runs")
        groups.append(Group(where, kind, Runs(tuple(once.values()))))
    if len(groups) < 2:
        have = f"only {groups[0].kind} of {groups[0].source}" if groups else "none"
        also = f" ({'; '.join(left_out)})" if left_out else ""
        raise RunError(
            f"a comparison needs complete runs of two settings, and there is {have}{also}: name two folders of runs, "
            "or one that holds both"
        )
    keys = dict.fromkeys(group.key for group in groups)
    by_key = {key: tuple(group for group in groups if group.key == key) for key in keys}
    sides = tuple(Side(", ".join(key), each) for key, each in by_key.items() if len(each) > 1)
    alone: dict[str, list[str]] = {}
    if sides:
        for group, *others in by_key.values():
            if not others:
                alone.setdefault(group.source, []).append(group.kind)
    else:
        sides = (Side("all settings", tuple(groups)),)
    for side in sides:
        _check_count(side, len(ascii_uppercase), "settings can be set side by side")
    return Compared(sides, alone, left_out)


def _check_count(side: Side, most: int, what: str) -> None:
    if len(side.groups) > most:
        first, second = (f"{group.source}/{group.kind}" for group in side.groups[:2])
        raise RunError(
            f"at most {most} {what}, and there are {len(side.groups)}: name those to compare, as {first}*  {second}*"
        )


def _why(state: RunState) -> str:
    at = f" at step {state.step:,}" if state.step is not None else ""
    return f"{state.name} is {state.state}{at}, left out"


def compare(paths: Sequence[Path], out: Path | None = None, console: Console | None = None) -> None:
    """Print groups of runs side by side, and write them as a page or a picture.

    Parameters
    ----------
    paths : sequence of Path
        As `read`.
    out : Path, optional
        ``.html``: one self-contained page; ``.png``: its curves.
    console : rich Console, optional
        Where to print, standard output if not given.

    Raises
    ------
    RunError, ValueError
        As `read`; and if `out` has another suffix, or more groups would be drawn in a picture than can be told apart.
    OSError
        If `out` cannot be written.
    """
    if out is not None and out.suffix not in (".html", ".png"):
        raise ValueError(f"--out must end in .html, for a page, or .png, for the curves alone; got {out}")
    if out is not None and out.parent.exists() and not out.parent.is_dir():
        raise ValueError(f"--out must lie in a folder, and {out.parent} is a file: give another place")
    found, console = read(paths), console or plain_console()
    for side in found.sides if out is not None and out.suffix == ".png" else ():
        _check_count(side, len(LOOKS), "curves can be told apart in a picture")
    for side in found.sides:
        _print_side(side, console)
    for text in _remarks(found):
        show(console, Text(text))
    if out is None:
        return
    if out.suffix == ".png":
        save_png(partial(draw, found.sides), out)
    else:
        page = document.as_html("Runs compared", "Complete runs, side by side.", sections(found))
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, page.encode())
    show(console, Text(str(out)))


def _remarks(found: Compared) -> list[str]:
    alone = [f"in {source} alone: {some(kinds)}" for source, kinds in found.alone.items()]
    return [*alone, *found.left_out]


def _print_side(side: Side, console: Console) -> None:
    groups = new_table("", side.title, ">runs")
    for letter, name, group in zip(ascii_uppercase, side.names, side.groups, strict=False):
        groups.add_row(letter, Text(name, overflow="fold"), str(len(group.runs)))
    settings = new_table(_settings_title(side), *ascii_uppercase[: len(side.groups)])
    for row in _settings_rows(side):
        settings.add_row(*row)
    results = new_table(*RESULTS)
    for row in _result_rows(side):
        results.add_row(*row)
    for each in (groups, settings, results):
        show(console, each)
        show(console, Text())
    for text in _curves(side, console):
        show(console, Text(text, no_wrap=True, overflow="crop"))
    show(console, Text(side.note))
    show(console, Text())


RESULTS = ("", ">runs", ">grokked", ">T_mem", ">T_grok", ">H*")


def _settings_title(side: Side) -> str:
    return f"{len(side.differing)} of {side.fields} settings differ"


def _settings_rows(side: Side) -> list[list[str]]:
    return [[key, *map(_value, values)] for key, values in side.differing.items()]


def _value(value: Any) -> str:
    return (
        ", ".join(map(str, value))
        if isinstance(value, list)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


def _result_rows(side: Side) -> list[list[str]]:
    return [
        [
            row.name,
            row.n,
            of(row.grokked) if row.grokked else "",
            span(row.t_mem, steps),
            span(row.t_grok, steps),
            span(row.h_star, decimal),
        ]
        for row in side.rows
    ]


def _curves(side: Side, console: Console) -> list[str]:
    """Draw the mean curves in lines, one a group, on the same axes."""
    width, end = min(64, width_of(console) - 4), max(float(group.runs.end.max()) for group in side.groups)
    found = []
    for name, label in CURVES:
        means = [mean_over_runs(group.runs, name) for group in side.groups]
        known = np.concatenate([[np.nan], *(values for _, values in means)])
        known = known[~np.isnan(known)]
        scale = (
            (0.0, 1.0)
            if name == "test_accuracy" or not known.size
            else (float(known.min()), float(known.max()))
        )
        found.append(
            f"{label.partition(' (')[0]}, mean, {scale[0]:.2f} to {scale[1]:.2f}; steps 0 to {end:,.0f}"
        )
        for letter, (step, values) in zip(ascii_uppercase, means, strict=False):
            found.append(f"{letter}  {sparkline(step, values, end, scale, width, blocks_of(console))}")
        found.append("")
    return found


def sections(found: Compared) -> list[Section]:
    """Make the page's sections, one a side, and what was left out."""
    parts = [_section(place, side) for place, side in enumerate(found.sides, 1)]
    if remarks := _remarks(found):
        parts.append(Section("left-out", "Left out", (document.Items(tuple(remarks)),)))
    return parts


def _section(place: int, side: Side) -> Section:
    letters = ascii_uppercase[: len(side.groups)]
    named = zip(letters, side.names, side.groups, strict=True)
    curves = drawn(
        f"curves-{place}",
        partial(draw, [side]),
        "H and test accuracy. Thin lines: runs; thick lines: their mean, in which a run that has ended counts with "
        "its last value; dots: H at T_grok.",
        "Curves of the entropy and of the test accuracy of each group over training steps.",
    )
    blocks: list[Block] = [
        Table(
            "What is side by side.",
            ("", "place and kind", "runs", "seeds"),
            tuple(
                (a, f"`{name}`", str(len(g.runs)), ", ".join(map(str, g.runs.seeds))) for a, name, g in named
            ),
        ),
        Table(
            f"When they memorise and grok, in steps, and H at T_grok. {side.note}",
            tuple(name.removeprefix(">") for name in RESULTS),
            tuple(map(tuple, _result_rows(side))),
            (1, 2, 3, 4, 5),
        ),
        *([curves] if len(side.groups) <= len(LOOKS) else []),
        Table(
            f"{_settings_title(side)}; the measures aside, which change nothing of the training.",
            ("setting", *letters),
            tuple((f"`{key}`", *values) for key, *values in _settings_rows(side)),
        ),
    ]
    return Section(f"side-{place}", side.title, tuple(blocks))


def draw(sides: Sequence[Side]) -> Figure:
    """Draw H and test accuracy of each side in a column, groups over each other."""
    columns = len(sides)
    figure = Figure(figsize=(WIDTH * (1 if columns == 1 else 0.75 * columns), 6.4), layout="constrained")
    grid = figure.subplots(len(CURVES), columns, sharex="col", sharey="row", squeeze=False)
    for column, side in zip(grid.T, sides, strict=True):
        for axes, (name, label) in zip(column, CURVES, strict=True):
            for letter, title, group, look in zip(
                ascii_uppercase, side.names, side.groups, LOOKS, strict=False
            ):
                lines(axes, group.runs, name, f"{letter}: {title}", **look)
                if name == "entropy":
                    for (step, h), at in zip(
                        group.runs.lines(group.runs.entropy), group.runs.t_grok, strict=True
                    ):
                        mark(axes, step, h, at, GROK, look["color"])
            if axes in grid[:, 0]:
                axes.set_ylabel(label)
        # The legend stands between title and axes, off the curves.
        column[0].set_title(side.title, pad=8 + 13 * len(side.groups))
        column[0].legend(loc="lower left", bbox_to_anchor=(-0.01, 0.99), fontsize=8, handlelength=3.5)
        column[-1].set_xlabel("training step")
        column[-1].set_xlim(left=0)
        column[-1].xaxis.set_major_formatter(thousands)
    return figure
