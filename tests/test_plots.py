"""Pictures: what is drawn is what was recorded, names stay names, and pyplot hears nothing of it."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastent import (
    Collapse,
    EntropyRecord,
    History,
    SpectralEntropy,
    SpectralEntropyMonitor,
    Status,
    entropy_of_eigenvalues,
    plot_records,
    spectral_entropy,
)

pytest.importorskip("matplotlib")
import matplotlib as mpl
import matplotlib.style
from matplotlib.figure import Figure

from fastent import plots


@pytest.fixture(autouse=True)
def without_pyplot(monkeypatch: pytest.MonkeyPatch) -> Any:
    before = dict(mpl.rcParams)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # to import it is an error
    yield
    assert dict(mpl.rcParams) == before


def record(step: int, layer: str, h: float, status: Status = Status.OK) -> EntropyRecord:
    flags = () if status is Status.OK else (status,)
    return EntropyRecord(step, layer, h, h, 1.0, 1.0, 1.0, 1.0, status, flags, "", 8, 4)


def records(layer: str, *values: float, **statuses: Status) -> list[EntropyRecord]:
    """Records of `layer` every 100 steps; ``at2=Status`` gives the third another status than ok."""
    return [record(100 * i, layer, h, statuses.get(f"at{i}", Status.OK)) for i, h in enumerate(values)]


def drawn(ax: Any) -> list[tuple[list[float], list[float]]]:
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in ax.lines]


def legend(ax: Any) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def rows(ax: Any) -> list[list[float]]:
    return [np.ma.filled(mesh.get_array(), np.nan)[0].tolist() for mesh in ax.collections]


def test_lines_go_through_usable_records_and_marks_stand_at_crossing_collapse_and_what_is_not_usable() -> (
    None
):
    found = records("a", 0.9, 0.8, 0.1, 0.7, 0.6, at2=Status.ZERO_VARIANCE)
    ax = plot_records(found, threshold=0.75, collapse=Collapse(0.05, 800))
    line, crossing, collapse, unusable, threshold = drawn(ax)
    assert line[0] == [0, 100, 200, 300, 400]
    assert line[1] == pytest.approx([0.9, 0.8, math.nan, 0.7, 0.6], nan_ok=True)
    assert (crossing, collapse, unusable) == (([300], [0.7]), ([100], [0.8]), ([200], [0]))
    assert ax.lines[-2].get_transform() == ax.get_xaxis_transform()  # at the lower edge
    assert threshold[1] == [0.75, 0.75]
    assert legend(ax) == ["a", "threshold 0.75", "below the threshold", "collapse", "zero_variance"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("training step", "normalised spectral entropy H")


def test_what_few_rows_hold_down_is_dotted_and_a_point_without_neighbours_is_a_dot() -> None:
    held = dict.fromkeys(("at0", "at1"), Status.RANK_LIMITED)
    found = records("a", 0.9, 0.8, 0.7, 0.6, math.nan, 0.4, **held, at4=Status.NONFINITE)
    ax = plot_records(found)
    dotted, solid, alone, _ = ax.lines
    assert (dotted.get_linestyle(), solid.get_linestyle(), alone.get_marker()) == (":", "-", ".")
    nan = math.nan
    assert dotted.get_ydata() == pytest.approx([0.9, 0.8, 0.7, 0.6, nan, 0.4], nan_ok=True)
    assert solid.get_ydata() == pytest.approx([nan, nan, 0.7, 0.6, nan, 0.4], nan_ok=True)
    assert (alone.get_xdata().tolist(), alone.get_ydata().tolist()) == ([500], [0.4])
    assert legend(ax)[1:] == ["rank_limited", "nonfinite"]


def test_thresholds_of_their_own_are_in_the_colours_of_their_layers() -> None:
    found = [*records("a", 0.9, 0.8), *records("b", 0.7, 0.6), *records("c", 0.7, 0.6)]
    ax = plot_records(found, threshold={"a": 0.85, "b": 0.65})
    dashed = {line.get_ydata()[0]: line.get_color() for line in ax.lines if line.get_linestyle() == "--"}
    solid = [line.get_color() for line in ax.lines if line.get_linestyle() == "-"]
    assert dashed.keys() == {0.85, 0.65}
    assert (dashed[0.85] == solid[0]).all()
    assert (dashed[0.65] == solid[1]).all()
    assert legend(ax) == ["a", "b", "c", "threshold of a layer", "below the threshold"]


def test_a_heatmap_has_a_row_for_each_layer_over_its_own_steps_and_a_gap_where_nothing_is_usable() -> None:
    found = [*records("in", 0.9, 0.8), *records("out", 0.5, math.nan, 0.3, at1=Status.FAILED)]
    ax = plot_records([*found, record(700, "in", 0.6)], kind="heatmap", threshold=0.4)
    (first, second), meshes = rows(ax), ax.collections
    assert first == [0.9, 0.8, 0.6]
    assert second == pytest.approx([0.5, math.nan, 0.3], nan_ok=True)
    assert meshes[0].get_coordinates()[0, :, 0].tolist() == [-50, 50, 400, 1000]
    assert meshes[1].get_coordinates()[0, :, 0].tolist() == [-50, 50, 150, 250]
    assert [text.get_text() for text in ax.get_yticklabels()] == ["in", "out"]
    assert ax.get_ylim() == (1.5, -0.5)  # the first at the top
    assert {mesh.norm.vmin for mesh in meshes} == {0.3}
    assert {mesh.norm.vmax for mesh in meshes} == {0.9}
    assert drawn(ax) == [([200], [1]), ([100], [1])]  # the crossing, the failure
    scale = ax.figure.axes[1]
    assert scale.get_ylabel() == "normalised spectral entropy H"
    assert [line.get_ydata()[0] for line in scale.lines if line.get_color() == "white"] == [0.4]
    assert legend(ax) == ["threshold, on the scale", "below the threshold", "failed"]


def test_up_to_six_layers_are_lines_and_more_are_a_heatmap_unless_said() -> None:
    def count(layers: int, kind: Any = None) -> tuple[int, int]:
        ax = plot_records([one for i in range(layers) for one in records(f"b.{i}", 0.9, 0.8)], kind=kind)
        return sum(line.get_linestyle() == "-" for line in ax.lines), len(ax.collections)

    assert count(6) == (6, 0)
    assert count(7) == (0, 7)
    assert (count(7, "lines"), count(6, "heatmap")) == ((7, 0), (0, 6))


def test_every_line_stands_out_from_a_light_and_from_a_dark_background() -> None:
    found = [one for i in range(6) for one in records(f"b.{i}", 0.9, 0.8)]
    for style, paper in (("default", 1.0), ("dark_background", 0.0)):
        with mpl.style.context(style):
            lines = plot_records(found).lines
        # Luminance of sRGB, relative to white.
        apart = [abs(paper - float(np.dot([0.2126, 0.7152, 0.0722], line.get_color()[:3]))) for line in lines]
        assert min(apart) > 0.25, style


def test_a_single_evaluation_and_one_value_are_drawn() -> None:
    for kind in ("lines", "heatmap"):
        ax = plot_records(records("a", 0.5), kind=kind)
        ax.figure.draw_without_rendering()
        points = rows(ax) if kind == "heatmap" else [line[1] for line in drawn(ax) if len(line[0]) == 1]
        assert [0.5] in points


def test_names_are_shown_as_they_are_and_cut_only_as_far_as_they_stay_apart() -> None:
    names = ["_orig.$x$.0", "_orig.$x$._1_$", "_orig.$x$.2"]
    ax = plot_records([one for name in names for one in records(name, 0.9)])
    texts = ax.get_legend().get_texts()
    assert [text.get_text() for text in texts] == ["0", "_1_$", "2"]
    assert ax.get_legend().get_title().get_text() == "_orig.$x$.*"
    assert not any(text.get_parse_math() for text in (*texts, ax.get_legend().get_title()))
    ax = plot_records([one for name in names for one in records(name, 0.9)], kind="heatmap")
    assert not any(text.get_parse_math() for text in (*ax.get_yticklabels(), ax.yaxis.label))
    ax.figure.draw_without_rendering()
    long = [f"{'the_same_beginning_' * 3}{i}{'_the_same_end' * 3}" for i in range(3)]
    short, pattern = plots.shortened([*long, "head"])
    assert len(set(short)) == 4
    assert pattern == ""
    assert plots.shortened(["model.blocks.3.mlp"]) == (["model.blocks.3.mlp"], "")
    assert plots.shortened(["a.b", "a.b.c"]) == (["b", "b.c"], "a.*")


def test_many_layers_leave_the_legend_and_the_ticks_readable() -> None:
    found = [one for i in range(45) for one in records(f"blocks.{i}.mlp", 0.9, 0.8)]
    shown = legend(plot_records(found, kind="lines"))
    assert (len(shown), shown[0], shown[-1]) == (20, "0", "44")
    ticks = plot_records(found).get_yticklabels()
    assert [text.get_text() for text in ticks] == [str(i) for i in range(0, 45, 2)]


def test_of_a_resumed_log_the_last_record_of_a_step_counts_in_whatever_order_they_are(tmp_path: Path) -> None:
    lines = [
        *records("a", 0.9, 0.8, 0.7),
        record(200, "a", 0.65),
        record(100, "a", 0.75),
        record(50, "a", 0.85),
    ]
    path = tmp_path / "entropy.jsonl"
    path.write_text("".join(json.dumps(line.as_dict()) + "\n" for line in lines))
    ax = plot_records(EntropyRecord.from_dict(json.loads(line)) for line in path.read_text().splitlines())
    assert drawn(ax) == [([0, 50, 100, 200], [0.9, 0.85, 0.75, 0.65])]


def test_a_monitor_draws_its_history_in_the_order_of_its_layers() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh())
    monitor = SpectralEntropyMonitor(model, torch.randn(64, 4), ["1", "0"], every=10)
    for step in range(21):
        monitor.step(step)
    monitor.flush()
    ax = monitor.plot()
    expected = [[one.normalized for one in monitor.history if one.layer == layer] for layer in ("1", "0")]
    assert drawn(ax) == [([0, 10, 20], values) for values in expected]
    assert legend(ax) == ["1", "0"]


def test_axes_that_are_given_are_drawn_on_and_others_show_themselves() -> None:
    figure = Figure()
    ax = figure.subplots()
    assert plot_records(records("a", 0.9, 0.8), ax=ax) is ax
    assert not hasattr(ax, "_repr_png_")  # whoever made the figure shows it
    own = plot_records(records("a", 0.9, 0.8))
    assert own._repr_png_().startswith(b"\x89PNG")


def test_runs_go_on_one_axes_with_a_dot_where_they_grokked() -> None:
    ax = History([0, 100, 200], [0.9, math.nan, 0.5], t_grok=200).plot(label="seed 0")
    assert History([0, 100], [0.8, 0.7]).plot(label="seed 1", ax=ax) is ax
    first, _, at, dot, second = ax.lines  # what has no neighbours is a dot too
    assert first.get_ydata() == pytest.approx([0.9, math.nan, 0.5], nan_ok=True)
    assert (at.get_xdata()[0], dot.get_xdata()[0], dot.get_ydata()[0]) == (200, 200, 0.5)
    assert first.get_color() == at.get_color() == dot.get_color() != second.get_color()
    assert legend(ax) == ["seed 0", "seed 1"]


def spectra(ax: Any) -> list[list[float]]:
    return [list(line.get_ydata()) for line in ax.lines if line.get_linestyle() == "-"]


def test_a_spectrum_is_shares_of_the_variance_on_a_log_scale_without_what_counts_as_0() -> None:
    result = entropy_of_eigenvalues(np.array([4.0, 0.0, 2.0, 2.0, 1e-17]))
    ax = result.plot(label="a")
    assert spectra(ax) == [[0.5, 0.25, 0.25]]
    assert ax.get_yscale() == "log"
    (rank,) = (line.get_xdata()[0] for line in ax.lines if line.get_linestyle() == "--")
    assert rank == result.effective_rank == pytest.approx(2**1.5)
    assert legend(ax) == [f"a: H = {1.5 * math.log(2) / math.log(5):.3f}, effective rank 2.83"]


def test_a_batch_is_a_spectrum_for_each_and_one_beyond_float64_has_its_shares() -> None:
    h = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]], dtype=torch.float64)
    batch = spectral_entropy(torch.stack([h, torch.ones(4, 2), 1e200 * h]), batch_dims=1)
    ax = batch.plot()
    assert spectra(ax) == [[0.5, 0.5], [0.5, 0.5]]
    assert legend(ax) == ["[0]: H = 1.000, effective rank 2", "[2]: H = 1.000, effective rank 2"]


def without_spectrum() -> SpectralEntropy:
    return spectral_entropy(torch.ones(4, 2))


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: SpectralEntropyMonitor().plot(), ValueError, "no record to draw: .*flush"),
        (
            lambda: plot_records(records("a", 0.5), kind="bars"),
            ValueError,
            "'lines' or 'heatmap'; got 'bars'",
        ),
        (lambda: plot_records(records("a", 0.5), ax=Figure()), TypeError, "axes of matplotlib.*got Figure"),
        (lambda: without_spectrum().plot(), ValueError, "no spectrum to draw: all rows are equal"),
    ],
)
def test_what_cannot_be_drawn_is_said(call: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        call()


def test_without_matplotlib_a_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "fastent.plots")
    monkeypatch.delattr("fastent.plots")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"^a picture needs matplotlib, .*: pip install matplotlib$"
    ):
        plot_records(records("a", 0.5))
