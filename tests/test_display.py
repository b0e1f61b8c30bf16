"""Results show themselves: one line at a plain prompt, a small table in HTML and in rich, every name as it is."""

import dataclasses
import io
import math
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import pytest
import torch

from fastent import (
    Collapse,
    EntropyRecord,
    History,
    PowerLaw,
    SpectralEntropyMonitor,
    calibrate_threshold,
    diagnose,
    predict_grok_time,
    sampling_error,
    spectral_entropy,
)
from fastent.forecast.power_law import leave_one_run_out

NAME = '<b>"a" & [red]b[/red]</b>'
H = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
RUNS = [
    History(
        range(0, 1000 + 100 * i, 100),
        [0.9 - 0.35 * (k / (9 + i)) ** 2 + 0.003 * math.sin(7 * k + i) for k in range(10 + i)],
        t_grok=900 + 100 * i,
    )
    for i in range(4)
]
LAW = PowerLaw.fit(RUNS)


def observed(*layers: str, steps: int = 2) -> SpectralEntropyMonitor:
    monitor = SpectralEntropyMonitor(threshold=0.99, collapse=Collapse(0.05, 10))
    for step in range(steps):
        for layer in layers:
            monitor.observe(step, H / (1 + 99 * step * torch.arange(8)), layer=layer)
    monitor.flush()
    return monitor


def shown() -> Iterator[tuple[str, Any]]:
    yield "result", spectral_entropy(H)
    yield "batch", spectral_entropy(torch.stack([H, H.square()]), batch_dims=1)
    yield "not finite", spectral_entropy(H * math.nan)
    yield "batch that is not finite", spectral_entropy(torch.stack([H, H]) * math.nan, batch_dims=1)
    yield "record", observed(NAME).history[0]
    yield "run", RUNS[0]
    yield "empty run", History([], [])
    yield "unusable run", History([0], [math.nan])
    yield "threshold", calibrate_threshold(RUNS)
    yield "threshold of one run", calibrate_threshold(RUNS[:1])
    yield "law", LAW
    yield "law by hand", PowerLaw(40_000.0, 2.0, 500.0, 0.6)
    yield "forecast", predict_grok_time(0.75, LAW, step=600)
    yield "no forecast", predict_grok_time(0.75, None)
    yield "diagnosis", diagnose(RUNS[0], threshold=0.6)
    yield "no diagnosis", diagnose(RUNS[0].until(0))
    yield "sampling error", sampling_error(H)
    yield "left out", leave_one_run_out(RUNS)
    yield "monitor", observed(NAME, "b")
    yield "new monitor", SpectralEntropyMonitor()


SHOWN = dict(shown())


class Cells(HTMLParser):
    """Reads back rows of cells; tags must close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.attributes: set[tuple[str, str | None]] = set()
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.attributes |= set(attributes)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        else:
            self.text.append(data)


def printed(value: Any) -> str:
    console = pytest.importorskip("rich.console").Console(file=io.StringIO(), width=150)
    console.print(value)
    return str(console.file.getvalue())


@pytest.mark.parametrize("name", SHOWN)
def test_a_prompt_gets_one_readable_line_and_tables_the_same_cells_without_colours(name: str) -> None:
    value = SHOWN[name]
    assert "\n" not in repr(value)
    assert len(repr(value)) < 200
    assert type(value).__name__ in repr(value)
    page = Cells(value._repr_html_())
    assert {len(row) for row in page.rows} <= {len(page.rows[0])} if page.rows else True
    assert page.attributes <= {("style", "text-align: left")}
    in_rich = printed(value)
    for row in page.rows:
        assert any(all(cell in line for cell in row) for line in in_rich.splitlines()), row
    for text in page.text:
        assert text.split()[0] in in_rich


def test_a_results_line_and_table_say_what_it_holds() -> None:
    result = spectral_entropy(H[:6])
    line = f"normalized={result.normalized:.4g}, effective_rank={result.effective_rank:.4g}"
    assert repr(result) == f"SpectralEntropy({line}, n=6, d=8, status='rank_limited')"
    page = Cells(result._repr_html_())
    rows = dict(page.rows)
    assert rows["H, normalised"] == f"{result.normalized:.4g} of at most {result.ceiling:.4g}"
    assert rows["effective rank"] == f"{result.effective_rank:.4g} of 8"
    assert rows["status"] == "rank_limited"
    assert page.text == ["Spectral entropy: 6 samples, 8 features", result.message]


def test_a_batch_has_a_row_for_each_and_of_many_the_ends() -> None:
    batch = spectral_entropy(torch.stack([(i + 1) * H**2 for i in range(21)]), batch_dims=1)
    rows = Cells(batch._repr_html_()).rows
    assert [row[0] for row in rows] == [
        *("", *(f"[{i}]" for i in range(10)), "… 1 more"),
        *(f"[{i}]" for i in range(11, 21)),
    ]
    assert rows[1][1:] == [f"{batch.unbind()[0].normalized:.4g}", *rows[-1][2:]]


def test_names_are_the_users_in_html_and_in_rich() -> None:
    monitor = observed(NAME, "")
    text = monitor._repr_html_()
    assert "<b>&quot;a&quot;" not in text
    rows = Cells(text).rows
    assert [row[0] for row in rows] == ["layer", NAME, "(model)"]
    assert NAME in printed(monitor)
    assert repr(NAME) in Cells(monitor.history[0]._repr_html_()).text[0]


def test_a_monitors_table_is_the_newest_record_of_each_layer_with_what_it_reached() -> None:
    monitor = observed("a")
    newest = monitor.history[-1]
    values = (f"{newest.normalized:.4g}", f"{newest.effective_rank:.4g}")
    assert monitor.crossings == {"a": 0}
    assert monitor.collapsed == {"a": 1}
    assert Cells(monitor._repr_html_()).rows[1] == ["a", "1", *values, "ok", "0", "1"]
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    waiting = SpectralEntropyMonitor(model, H, "0")
    assert Cells(waiting._repr_html_()).rows[1] == ["0", *["–"] * 6]


def test_lines_of_runs_laws_and_forecasts() -> None:
    run = History([0, 200], [0.9, 0.5], t_grok=200)
    assert repr(run) == "History(2 evaluations, steps 0 to 200, entropy 0.9 to 0.5, t_grok=200)"
    assert repr(PowerLaw(40_000.0, 2.0, 500.0, 0.6)) == "PowerLaw(c1=40000, gamma=2, c2=500, h_star=0.6)"
    law = dataclasses.replace(LAW, c1=40_000.0, gamma=2.0, c2=500.0, h_star=0.6, gap_range=(0.0, 0.3))
    assert repr(predict_grok_time(0.7, law, step=20_000)) == "Forecast(step=20900, now=20000)"
    assert repr(predict_grok_time(0.7, None)) == "Forecast(step=None, now=0, reason='no_law')"
    rows = dict(Cells(predict_grok_time(0.7, law, step=20_000)._repr_html_()).rows)
    assert rows == {
        "grokking expected at step": "20,900",
        "interval": "–",
        "by the clock": "–",
        "as of step": "20,000",
    }


def test_what_holds_arrays_is_a_line_too() -> None:
    left_out = leave_one_run_out(RUNS)
    run, score = left_out.runs[1], left_out.score("law")
    assert repr(run) == f"HeldOut(run=1, t_grok=1000, {len(run.step)} evaluations, {run.law!r})"
    assert repr(score).startswith(f"Score(r_squared={score.r_squared:.4g}, 4 runs, mean mape=")


def test_a_record_is_told_with_its_standard_error_where_it_has_one() -> None:
    record = observed("a").history[0]
    assert "standard error" not in dict(Cells(record._repr_html_()).rows)
    with_error = dataclasses.replace(record, standard_error=0.0123)
    assert dict(Cells(with_error._repr_html_()).rows)["standard error"] == "0.0123"
    assert isinstance(record, EntropyRecord)
