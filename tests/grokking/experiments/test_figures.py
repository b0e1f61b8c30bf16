"""Figures: what is drawn where, the same bytes for the same data, nothing from outside."""

import dataclasses
import functools
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from fastent.grokking.experiments import e1_lead, figures, leads
from fastent.grokking.experiments.data import Runs
from fastent.grokking.experiments.figures import DARK, LIGHT


@pytest.fixture
def runs(measure):
    fall = [0.9, 0.9, 0.8, 0.7, 0.6, 0.5]
    return Runs(
        (
            measure(fall, [0, 0, 0, 0, 1, 1], seed=3),
            measure([h + 0.02 for h in fall] + [0.5], [0, 0, 0, 0, 0, 1, 1], seed=4),
        )
    )


@pytest.fixture
def rules(runs):
    return leads.left_out_threshold(runs), leads.collapse(runs)


def dynamics(runs, rules):
    return functools.partial(e1_lead.training_dynamics, runs, *rules, 0.6)


def points(axes, marker):
    lines = [line for line in axes.lines if line.get_marker() == marker]
    return sorted(
        (float(x), round(float(y), 9)) for line in lines for x, y in zip(*line.get_data(), strict=True)
    )


def test_the_mean_goes_on_to_the_last_end_and_a_run_that_has_ended_counts_with_its_last_value(runs):
    step, mean = figures.mean_over_runs(runs, "entropy")
    assert step.tolist() == [0, 100, 200, 300, 400, 500, 600]
    assert mean.tolist() == pytest.approx([0.91, 0.91, 0.81, 0.71, 0.61, 0.51, 0.5])


def test_the_mean_of_runs_evaluated_at_different_steps_holds_the_last_value_of_each(measure):
    often, seldom = measure([0.8, 0.6, 0.4], [0, 0, 0]), measure([0.6, 0.2], [0, 0], every=200, seed=1)
    step, mean = figures.mean_over_runs(Runs((often, seldom)), "entropy")
    assert step.tolist() == [0, 100, 200]
    assert mean.tolist() == pytest.approx([0.7, 0.6, 0.3])


def test_the_share_grokked_is_kaplan_meiers(measure):
    ends = [[0, 1, 1, 1, 1, 1], [0, 0], [0, 0, 0, 1], [0, 0, 0, 0, 0, 0]]
    runs = Runs(tuple(measure([0.5] * len(test), test, seed=seed) for seed, test in enumerate(ends)))
    step, share, cut = figures.share_grokked(runs)
    # At 100 one of four groks; one is cut at 100 too; at 300 one of the two that are left groks; one is cut at 500.
    assert dict(zip(step.tolist(), share.tolist(), strict=True)) == pytest.approx(
        {0: 0, 100: 1 / 4, 300: 5 / 8, 500: 5 / 8}
    )
    assert sorted(cut.tolist()) == [100, 500]


def test_a_panel_shows_its_groups_curve_beside_the_first_groups_in_grey_with_a_bar_where_a_run_was_cut(
    measure,
):
    first = Runs((measure([0.5] * 4, [0, 0, 1, 1]), measure([0.5] * 3, [0, 1, 1], seed=1)))
    other = Runs((measure([0.5] * 9, [0] * 9), measure([0.5] * 7, [0, 0, 0, 0, 1, 1, 1], seed=1)))
    grokked, _ = figures.compared("e9", {"baseline": first, "mixed": other})
    assert grokked.name == "e9-grokked"
    (axes,) = grokked.draw.args[0]().axes
    assert axes.get_title() == "mixed"
    curves = [line for line in axes.lines if line.get_drawstyle() == "steps-post"]
    grey, blue = ((line.get_color(), [list(map(float, xy)) for xy in line.get_data()]) for line in curves)
    # The first goes on to the last end of all, as all of its runs have grokked; the other to where a run was cut.
    assert grey == (LIGHT.train, [[0, 100, 200, 800], [0, 0.5, 1, 1]])
    assert blue == (LIGHT.test, [[0, 400, 800, 800], [0, 0.5, 0.5, 0.5]])
    assert points(axes, "|") == [(800, 0.5)]


def test_entropy_by_accuracy_is_the_mean_in_each_tenth_from_memorising_on(measure):
    runs = Runs(
        (
            measure([0.9, 0.8, 0.7, 0.6, 0.5], [0.31, 0.32, 0.38, 1.0, 0.95], t_mem=100),
            measure([np.nan, 0.4], [0.05, 0.05], seed=1),
        )
    )
    found = figures.entropy_at_accuracy(runs)
    known = {(int(i), int(k)): round(float(found[i, k]), 9) for i, k in np.argwhere(~np.isnan(found))}
    assert known == {(0, 3): 0.75, (0, 9): 0.55, (1, 0): 0.4}


def test_no_legend_lies_on_the_curves_of_its_axes(runs, rules):
    swept = leads.sweep(runs, leads.observed_thresholds(runs))
    for figure in (
        dynamics(runs, rules)(),
        e1_lead.around_grokking(runs, *rules, reach=300),
        e1_lead.threshold_sweep(swept, runs),
    ):
        FigureCanvasAgg(figure).draw()
        for axes in figure.axes:
            if (legend := axes.get_legend()) is not None:
                assert legend.get_window_extent().y0 > axes.bbox.y0 + 0.95 * axes.bbox.height


def test_dynamics_mark_grokking_crossing_and_collapse_on_the_curves(runs, rules):
    a, b, c = dynamics(runs, rules)().axes
    # Grokked at 400 and 500 (H 0.60 and 0.52); crossed 0.52 at 500 and 0.60 at 500; fell by more than 0.05 at 200.
    assert points(b, "o") == [(400, 0.60), (500, 0.52)]
    assert points(b, "v") == [(500, 0.50), (500, 0.52)]
    assert points(b, "D") == [(200, 0.80), (200, 0.82)]
    assert points(a, "o") == [(400, 1.0), (500, 1.0)]
    assert points(c, "o") == [(400, 10.0), (500, 10.0)]


def test_every_axis_of_every_figure_has_a_label_with_its_unit(runs, rules):
    swept = leads.sweep(runs, leads.observed_thresholds(runs))
    drawn = [
        dynamics(runs, rules)(),
        e1_lead.around_grokking(runs, *rules, reach=300),
        e1_lead.per_seed(runs, *rules),
        e1_lead.threshold_sweep(swept, runs),
        e1_lead.lead_dots(rules),
    ]
    for figure in drawn:
        labels = [axes.get_xlabel() for axes in figure.axes if axes.get_visible()]
        labels += [axes.get_ylabel() for axes in figure.axes if axes.get_visible()]
        assert [label for label in labels if "step" in label or "H" in label]
        units = ("step", "unit", "share")
        assert all(any(unit in label for unit in units) for label in labels if label)


def test_around_grokking_puts_every_run_at_its_own_zero(runs, rules):
    a, _ = e1_lead.around_grokking(runs, *rules, reach=100).axes
    jumps = [
        line.get_data()
        for line in a.lines
        if line.get_marker() in (None, "None") and len(line.get_xdata()) > 2
    ]
    assert len(jumps) == 2
    for x, y in jumps:
        assert np.asarray(x).tolist() == [-100, 0, 100][: len(x)]
        assert np.asarray(y).tolist() == [0, 1, 1][: len(y)]


def test_per_seed_titles_give_the_lead_of_the_collapse(runs, rules):
    axes = e1_lead.per_seed(runs, *rules).axes
    assert [a.get_title(loc="left") or a.get_title() for a in axes] == [
        "seed 3, lead 200 steps",
        "seed 4, lead 300 steps",
    ]


def test_lead_dots_show_runs_mean_and_interval(runs, rules):
    axes = e1_lead.lead_dots(rules).axes[0]
    assert points(axes, "o") == [(-100, 0), (0, 0), (200, 1), (300, 1)]
    assert points(axes, "D") == [(-50, 0), (250, 1)]


def test_svg_is_xml_that_repeats_itself_and_holds_no_link_or_document_type(runs, rules):
    text = figures.both(dynamics(runs, rules))[0]
    assert text == figures.both(dynamics(runs, rules))[0]
    assert text.startswith("<svg")
    root = ElementTree.fromstring(text)
    links = [v for e in root.iter() for k, v in e.attrib.items() if k.endswith("href")]
    assert all(link.startswith("#") for link in links)
    assert "<text" not in text  # letters are outlines: no font is needed


def test_dark_and_light_figures_have_the_colours_of_their_theme(runs, rules):
    light, dark = figures.both(dynamics(runs, rules))
    for colour in ("paper", "ink", "test", "entropy", "norm", "signal"):
        assert getattr(LIGHT, colour) in light
        assert getattr(DARK, colour) in dark
        assert getattr(LIGHT, colour) not in dark
    assert len(light) == len(dark)


def test_png_is_written_at_the_asked_resolution(runs, rules, tmp_path):
    path = tmp_path / "docs" / "picture.png"
    figures.save_png(dynamics(runs, rules), path, dpi=50)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    assert int.from_bytes(data[16:20], "big") == 500  # ten inches


def test_figures_of_runs_that_never_grok_or_have_no_entropy_are_drawn(measure):
    runs = Runs((measure([np.nan, np.nan], [0, 0]), measure([0.9, 0.9], [0, 0], seed=1)))
    rules = (leads.left_out_threshold(runs), leads.collapse(runs))
    assert figures.both(dynamics(runs, rules))[0].startswith("<svg")
    assert figures.both(functools.partial(e1_lead.per_seed, runs, *rules))[0].startswith("<svg")
    assert figures.both(functools.partial(e1_lead.lead_dots, rules))[0].startswith("<svg")


def test_no_two_roles_of_a_theme_share_a_colour_so_that_one_can_be_put_for_the_other():
    for theme in (LIGHT, DARK):
        assert len(set(dataclasses.astuple(theme))) == len(dataclasses.fields(theme))
    assert not set(dataclasses.astuple(LIGHT)) & set(dataclasses.astuple(DARK))


def test_command_draws_the_complete_runs_and_refuses_a_folder_without_any(
    three_runs, tmp_path, writer, monkeypatch, capsys
):
    monkeypatch.setattr("sys.argv", ["figures", str(three_runs), str(tmp_path / "docs" / "quick.png")])
    e1_lead.main()
    assert (tmp_path / "docs" / "quick.png").read_bytes().startswith(b"\x89PNG")
    writer(tmp_path / "begun", 0, done=False)
    monkeypatch.setattr("sys.argv", ["figures", str(tmp_path / "begun"), str(tmp_path / "other.png")])
    with pytest.raises(SystemExit):
        e1_lead.main()
    assert "holds no complete run of E1" in capsys.readouterr().err
    assert not (tmp_path / "other.png").exists()
