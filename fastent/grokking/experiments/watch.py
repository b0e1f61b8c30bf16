"""Runs on the terminal: a table of a folder of them, and a live view of those in training.

The view ends by itself once nobody trains in the folder, and leaves its last frame behind. Where there is no terminal
it is lines, one for each run that has moved on. H is drawn on one scale for all runs that are shown. The forecast of
T_grok for a run that has memorised is that of `fastent.predict_grok_time`, from the complete runs of the same settings
in the folder: by the power law of three or more that grokked where it did better than a clock on these, else by the
clock, the median T_grok of those that had not grokked by then.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fastent.forecast.history import History
from fastent.forecast.power_law import PowerLaw
from fastent.forecast.predict import predict_grok_time
from fastent.grokking.experiments.claims import NONE, decimal, steps
from fastent.grokking.experiments.data import Runs, StoredRun
from fastent.grokking.experiments.folder import Folder, RunState, State, skipped, some
from fastent.grokking.experiments.statistics import Array
from fastent.grokking.train.storage import StopRequest

REFRESH = 1.0
"""Seconds between two frames on a terminal."""

LINES_EVERY = 10.0
"""Seconds between two looks where there is none."""

WIDE = 1000
"""Columns of what is written to a file or a pipe: nothing is folded or cut there."""

ROOM = 116
"""Columns from which a terminal shows all that there is of a run."""

COLOURS = {
    State.RUNNING: "cyan",
    State.WAITING: "dim",
    State.INTERRUPTED: "yellow",
    State.FAILED: "red",
    State.DAMAGED: "red",
    State.COMPLETE: "green",
}

BLOCKS, PLAIN = " ▁▂▃▄▅▆▇█", " .:-=+*#@"
"""What curves are drawn with: nothing, then from the lowest value to the highest; and the same in ASCII."""


def print_runs(path: Path, *, as_json: bool = False, console: Console | None = None) -> None:
    """Print the state of each run in a folder.

    Parameters
    ----------
    path : Path
    as_json : bool
        One JSON object, its numbers null where there are none, its times in UTC.
    console : rich Console, optional
        Where to print, standard output if not given.

    Raises
    ------
    RunError
        As `Folder` and `Folder.look`.
    """
    folder, console = Folder(path), console or plain_console()
    states = folder.look()
    if as_json:
        print(json.dumps({"path": str(path), "runs": [*map(_as_json, states)], "skipped": folder.foreign}))
        return
    table = new_table(
        "run",
        "state",
        *(">step", ">of", ">T_mem", ">T_grok", ">H"),
        "written",
        wide=width_of(console) >= ROOM,
    )
    now = time.time()
    for state in states:
        table.add_row(
            Text(state.name, overflow="fold"),
            _state(state),
            *(_count(number) for number in (state.step, state.limit, state.t_mem, state.t_grok)),
            decimal(state.entropy),
            _ago(state.written, now),
        )
    show(console, Group(table, Text(), *_remarks(states, folder.foreign)))


def _as_json(state: RunState) -> dict[str, Any]:
    values = {key: value for key, value in vars(state).items() if key != "stored"}
    if state.written is not None:
        values["written"] = datetime.fromtimestamp(state.written, UTC).isoformat(timespec="seconds")
    return values


def watch(path: Path, *, once: bool = False, console: Console | None = None) -> int:
    """Show the runs in a folder until nobody trains there.

    Parameters
    ----------
    path : Path
    once : bool
        Print one frame.
    console : rich Console, optional
        Where to print, standard output if not given.

    Returns
    -------
    int
        0 if all runs are complete (or `once`), 1 if some are not and nobody trains them, 128 and the signal's number
        where one ended it.

    Raises
    ------
    RunError
        As `Folder` and `Folder.look`.
    """
    console = console or plain_console()
    folder, forecasts = Folder(path, whole=True), Forecasts()
    states = folder.look()
    if not once:
        with StopRequest() as stop:
            follow = _show_live if console.is_terminal else _show_lines
            states = follow(console, folder, forecasts, states, stop)
        if stop.signal is not None:
            return 128 + stop.signal
    if once or console.is_terminal:
        show(console, frame(folder, states, forecasts, console))
    return 0 if once or all(state.state is State.COMPLETE for state in states) else 1


def _show_live(
    console: Console, folder: Folder, forecasts: Forecasts, states: list[RunState], stop: StopRequest
) -> list[RunState]:
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while _going_on(states):
            rows = max(3, console.height - 8)
            live.update(frame(folder, states, forecasts, console, most=rows), refresh=True)
            if _stopped_within(REFRESH, stop):
                break
            states = folder.look()
    return states


def _show_lines(
    console: Console, folder: Folder, forecasts: Forecasts, states: list[RunState], stop: StopRequest
) -> list[RunState]:
    told: dict[str, tuple[Any, ...]] = {}
    while True:
        for state in states:
            if told.get(state.name) != (state.state, state.step):
                told[state.name] = (state.state, state.step)
                show(console, Text(_line(state, forecasts.of(state, states))))
        if not _going_on(states):
            show(console, Group(*_remarks(states, folder.foreign)))
            return states
        if _stopped_within(LINES_EVERY, stop):
            return states
        states = folder.look()


def _going_on(states: Sequence[RunState]) -> bool:
    return any(state.state in (State.RUNNING, State.WAITING) for state in states)


def _stopped_within(seconds: float, stop: StopRequest) -> bool:
    end = time.monotonic() + seconds
    while stop.signal is None and (left := end - time.monotonic()) > 0:
        time.sleep(min(0.1, left))
    return stop.signal is not None


def _line(state: RunState, forecast: str) -> str:
    parts = [f"{datetime.now():%H:%M:%S}", state.name, state.state]
    if state.step is not None:
        parts.append(f"step {_count(state.step)} of {_count(state.limit)}")
        parts += [f"H {decimal(state.entropy)}", f"test {decimal(state.test_accuracy, 2)}"]
    if forecast != NONE:
        parts.append(f"T_grok {forecast}")
    if state.detail and state.state is not State.COMPLETE:
        parts.append(state.detail)
    return "  ".join(parts)


def frame(
    folder: Folder,
    states: Sequence[RunState],
    forecasts: Forecasts,
    console: Console,
    most: int | None = None,
) -> Group:
    """Make what `console` shows of a folder at one time: `most` rows at most, runs in training first."""
    wide, blocks = width_of(console) >= ROOM, blocks_of(console)
    order = list(State)
    shown = sorted(states, key=lambda state: order.index(state.state))[:most]
    curves = {state.name: state.stored for state in shown if state.stored is not None and state.stored.rows}
    known = np.concatenate([[np.nan], *(run.column("entropy") for run in curves.values())])
    known = known[~np.isnan(known)]
    scale = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
    drawn = f"H, {scale[0]:.2f} to {scale[1]:.2f}" if known.size else "H"
    columns: dict[str, list[str | Text]] = {
        "run": [Text(state.name, overflow="fold") for state in shown],
        "state": [_state(state) for state in shown],
        "progress": [_bar(state, blocks) for state in shown],
        ">step": [_count(state.step) for state in shown],
        ">of": [_count(state.limit) for state in shown],
        drawn if wide else "": [
            _curve(curves.get(state.name), scale, 20 if wide else 10, blocks) for state in shown
        ],
        ">H": [decimal(state.entropy) for state in shown],
        ">test": [decimal(state.test_accuracy, 2) for state in shown],
        ">T_mem": [_count(state.t_mem) for state in shown],
        "T_grok": [forecasts.of(state, states) for state in shown],
    }
    if not wide:
        for name in ("progress", ">of", ">test", ">T_mem"):
            del columns[name]
    table = new_table(*columns, wide=wide)
    for row in zip(*columns.values(), strict=True):
        table.add_row(*row)
    lines = [Text(f"and {len(states) - len(shown)} more")] if len(states) > len(shown) else []
    lines += [Text(), *_remarks(states, folder.foreign)]
    if any(str(text).startswith(ABOUT) for text in columns["T_grok"]):
        lines.append(Text(f"{ABOUT}: forecast from the complete runs of the same settings here, if it groks"))
    elif any(state.state is State.RUNNING and state.t_grok is None for state in states):
        lines.append(
            Text("no forecast: it takes three complete runs of the same settings that grokked, and T_mem")
        )
    return Group(table, *lines)


def _bar(state: RunState, blocks: str) -> Text:
    made, limit = _progress(state)
    full = round(8 * (made or 0) / (limit or 1))
    return Text(
        blocks[-1] * full + ("." if blocks is PLAIN else "░") * (8 - full), style=COLOURS[state.state]
    )


def _curve(run: StoredRun | None, scale: tuple[float, float], width: int, blocks: str) -> str:
    if run is None:
        return ""
    step = run.column("step")
    return sparkline(step, run.column("entropy"), step[-1], scale, width, blocks)


def sparkline(
    step: Array, values: Array, end: float, scale: tuple[float, float], width: int, blocks: str = BLOCKS
) -> str:
    """Draw a curve in one line.

    Parameters
    ----------
    step, values : ndarray, shape (m,)
        NaN leaves a gap.
    end : float
        Step of the right end.
    scale : (float, float)
        Values of the lowest and of the highest block.
    width : int
        Columns, each the mean of its evaluations; one without any goes on with the last before it.
    blocks : str
        Nothing, then the blocks from the lowest to the highest.
    """
    at = np.minimum((step * width / max(end, 1)).astype(int), width - 1)
    drawn, last = "", np.nan
    for column in range(int(at[-1]) + 1 if at.size else 0):
        here = values[at == column]
        if here.size:
            known = here[~np.isnan(here)]
            last = known.mean() if known.size else np.nan
        share = (last - scale[0]) / ((scale[1] - scale[0]) or 1)
        drawn += " " if np.isnan(share) else blocks[1 + round(min(max(share, 0), 1) * (len(blocks) - 2))]
    return drawn.ljust(width)


ABOUT = "~"


class Forecasts:
    """Forecasts of T_grok from the complete runs of each setting, whose law is fitted when there are more of them."""

    def __init__(self) -> None:
        self._laws: dict[str, tuple[int, PowerLaw | None]] = {}

    def of(self, state: RunState, states: Sequence[RunState]) -> str:
        """Say when a run grokked, or will if it groks; a dash where nothing says that."""
        if state.t_grok is not None:
            return steps(state.t_grok)
        if state.state is not State.RUNNING or state.t_mem is None or state.stored is None:
            return NONE
        law = self._law(_setting(state.stored), states)
        forecast = predict_grok_time(_history(state.stored, None), law)
        by_law = forecast.step is not None and forecast.beats_clock
        at = forecast.step if by_law else forecast.by_clock
        return NONE if at is None else f"{ABOUT}{steps(at)} ({'law' if by_law else 'clock'})"

    def _law(self, setting: str, states: Sequence[RunState]) -> PowerLaw | None:
        alike = [
            (state.stored, state.t_grok)
            for state in states
            if state.state is State.COMPLETE
            and state.stored is not None
            and _setting(state.stored) == setting
        ]
        count, law = self._laws.get(setting, (-1, None))
        if count != len(alike):
            try:
                law = PowerLaw.fit([_history(run, t_grok) for run, t_grok in alike])
            except ValueError:
                law = None  # too few of them grokked
            self._laws[setting] = (len(alike), law)
        return law


def _setting(run: StoredRun) -> str:
    return json.dumps([run.experiment, run.condition, {**run.config, "measures": []}], sort_keys=True)


def _history(run: StoredRun, t_grok: float | None) -> History:
    runs = Runs((run,))
    return History(runs.step[0], runs.entropy[0], t_grok)


def _remarks(states: Sequence[RunState], foreign: list[str]) -> list[Text]:
    counts = Counter(state.state for state in states)
    parts = [f"{counts[state]} {state}" for state in reversed(State) if counts[state]]
    done, most = (sum(x or 0 for x in column) for column in zip(*map(_progress, states), strict=True))
    said = (
        f"{len(states)} run{'s' * (len(states) > 1)}: {', '.join(parts)}; {done:,} of at most {most:,} steps"
    )
    lines = [Text(said)]
    for state in states:
        if state.detail and state.state is not State.COMPLETE:
            lines.append(Text(f"{state.name}: {state.detail}", style=COLOURS[state.state]))
            lines += [Text(f"  {line}", style="dim") for line in state.lines]
            lines += [Text(f"  to try again: {state.command}")] if state.command else []
        if state.copies:
            lines.append(Text(f"{state.name} lies there again, and counts once: {some(list(state.copies))}"))
    if foreign:
        lines.append(Text(skipped(foreign), style="dim"))
    return lines


def _progress(state: RunState) -> tuple[int | None, int | None]:
    """Return the steps made, and to make at most: a complete run has none left."""
    return state.step, state.step if state.state is State.COMPLETE else state.limit


def blocks_of(console: Console) -> str:
    """Return what curves are drawn with there."""
    return BLOCKS if console.encoding.startswith("utf") else PLAIN


def new_table(*columns: str, wide: bool = True) -> Table:
    """Make an empty table without lines; a ">" before a heading aligns its column right."""
    table = Table(box=None, pad_edge=False, padding=(0, 2 if wide else 1, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(
            column.removeprefix(">"),
            justify="right" if column.startswith(">") else "left",
            no_wrap=column != "run",
        )
    return table


def _state(state: RunState) -> Text:
    return Text(state.state, style=COLOURS[state.state])


def _count(number: int | None) -> str:
    return NONE if number is None else f"{number:,}"


def _ago(written: float | None, now: float) -> str:
    if written is None:
        return NONE
    seconds = max(0.0, now - written)
    for unit, size, most in (("s", 1, 100), ("min", 60, 6_000), ("h", 3_600, 172_800)):
        if seconds < most:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{datetime.fromtimestamp(written):%Y-%m-%d}"


def width_of(console: Console) -> int:
    """Return the columns of a terminal; where there is none there are enough."""
    return console.width if console.is_terminal else WIDE


def plain_console() -> Console:
    """Make a console on standard output to which a bracket or a colon in a name is no markup."""
    return Console(markup=False, emoji=False)


def show(console: Console, shown: Any) -> None:
    """Print on a terminal as wide as it is; else as plain text that is neither folded nor padded."""
    if console.is_terminal:
        console.print(shown)
        return
    plain = Console(width=WIDE, no_color=True, markup=False, emoji=False)
    with plain.capture() as captured:
        plain.print(shown, soft_wrap=False)
    text = "\n".join(line.rstrip() for line in captured.get().splitlines())
    console.file.write(text + "\n")
    console.file.flush()
