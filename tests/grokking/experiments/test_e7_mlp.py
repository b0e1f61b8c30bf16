"""E7 on planted runs, one of each outcome."""

import dataclasses

import pytest
from planted_columns import listed, planted, tables

from fastent.grokking.experiments import e7_mlp, figures
from fastent.grokking.experiments.data import Runs
from fastent.grokking.experiments.document import Verdict
from fastent.grokking.experiments.e7_mlp import OUTCOMES
from fastent.grokking.experiments.jobs import FEW_PAIRS, JOBS
from fastent.grokking.train.config import preset

E1, *JOBS_E7 = JOBS["e7"](preset("paper"), range(5))
FEW, E7 = {job.condition: job for job in JOBS_E7[: len(FEW_PAIRS)]}, JOBS_E7[len(FEW_PAIRS) :]
CONCAT, SUM = E7[:2]
FALLS = [0.9, 0.9, 0.8, 0.7, 0.6, 0.5]
LOW = [0.9, 0.9, 0.6, 0.5, 0.5, 0.5]
DIPS = [0.9, 0.5, 0.9, 0.9, 0.9, 0.9]
STAYS = [0.9] * 6
GROKS = [0.0, 0.0, 0.0, 0.5, 1.0, 1.0]
STUCK = [0.0, 0.01, 0.01, 0.02, 0.02, 0.02]
SPECTRA = {
    "alignment": [0.2, 0.2, 0.2, 0.3, 0.4, 0.5],
    "alignment_null": 0.21,
    "alignment_null_mean": 0.19,
    "label_share": [0.01, 0.1, 0.2, 0.5, 0.8, 0.9],
    "top_share": [0.12, 0.12, 0.2, 0.5, 0.9, 0.99],
    "frequencies": 5.0,
    "restricted_loss": [4.5, 4.0, 3.0, 1.0, 0.1, 0.01],
    "excluded_loss": [4.5, 2.0, 1.0, 2.0, 4.0, 4.6],
    "embedding_gini": 0.7,
}
FLAT = {**SPECTRA, "alignment": 0.2, "label_share": 0.02, "top_share": 0.15}


def mlp(job, seed, test=STUCK, entropy=LOW, spectra=FLAT, **more):
    return planted(job, seed, test=test, entropy=entropy, **spectra, **more)


@pytest.fixture
def transformers():
    # H at grokking, step 800: 0.6, 0.61, 0.62.
    return [
        planted(E1, seed, test=GROKS, entropy=[h + 0.01 * seed for h in FALLS], **SPECTRA)
        for seed in range(3)
    ]


@pytest.fixture
def undrawn(monkeypatch):
    monkeypatch.setattr(figures, "both", lambda draw: ("<svg/>", "<svg/>"))


def outcomes(result):
    return {model.label: model.outcomes for model in result.mlps}


def test_each_run_has_the_outcome_that_was_planted(transformers):
    unlearned = [0.5] * 6
    half = [0.0, 0.0, 0.2, 0.3, 0.3, 0.3]
    result = e7_mlp.analyse(
        Runs(
            (
                *transformers,
                mlp(CONCAT, 0),
                mlp(CONCAT, 1, test=GROKS),
                mlp(CONCAT, 2, test=half),
                mlp(SUM, 0, entropy=STAYS),
                mlp(SUM, 1, train=unlearned),
                mlp(SUM, 2, entropy=DIPS),
            )
        )
    )
    assert result.h_star.value == pytest.approx(0.61)
    assert outcomes(result) == {
        "concatenated, 512-128": (OUTCOMES[0], "groks", "half-way"),
        "summed, 512-128": ("does not collapse", "does not memorise", "dips, does not generalise"),
    }
    assert listed(result.mlps[0].below) == [400, 400, 400]
    assert listed(result.mlps[1].below) == [None, 400, 200]
    assert result.mlps[0].holds.value == pytest.approx(1 / 3)


def test_the_papers_mlp_reproduces_its_claims(transformers):
    result = e7_mlp.analyse(
        Runs((*transformers, *(mlp(job, seed) for job in (CONCAT, SUM) for seed in range(5))))
    )
    claims = e7_mlp.claims(result)
    assert claims["e7.mlp"].verdict == Verdict.REPRODUCED
    assert claims["e7.insufficient"].verdict == Verdict.REPRODUCED
    assert claims["e7.memorised_by"].verdict == Verdict.REPRODUCED
    assert claims["e7.alignment"].verdict == Verdict.REPRODUCED
    assert claims["e7.alignment"].ours.startswith("at the end 0.20 to 0.20")
    assert claims["e7.alignment_grows"].verdict == Verdict.UNDECIDED  # in all of three Transformers
    assert (
        "concatenated, 512-128 (H* 0.610 [0.585, 0.635]), summed, 512-128 (H* 0.610 [0.585, 0.635])"
        in e7_mlp.headline(result)
    )


ABOUT = [0.9, 0.5, 0.9, 0.6, 0.6, 0.6]
"""Once below H*, and at the end within its interval, 0.585 to 0.635."""


@pytest.mark.parametrize(
    ("entropies", "mlp_is", "insufficient"),
    [
        ([ABOUT] * 5, Verdict.UNDECIDED, Verdict.IN_PART),
        ([LOW, *[ABOUT] * 4], Verdict.UNDECIDED, Verdict.IN_PART),
        ([STAYS, *[ABOUT] * 4], Verdict.NOT_REPRODUCED, Verdict.UNDECIDED),
        ([STAYS] * 5, Verdict.NOT_REPRODUCED, Verdict.NOT_REPRODUCED),
        ([LOW] * 5, Verdict.REPRODUCED, Verdict.REPRODUCED),
    ],
)
def test_an_mlp_that_ends_within_the_interval_of_h_star_decides_nothing(
    transformers, entropies, mlp_is, insufficient
):
    runs = [mlp(CONCAT, seed, entropy=entropy) for seed, entropy in enumerate(entropies)]
    result = e7_mlp.analyse(Runs((*transformers, *runs)))
    claims = e7_mlp.claims(result)
    assert claims["e7.mlp"].verdict == mlp_is
    assert claims["e7.insufficient"].verdict == insufficient
    assert ("of 5 ends about H*, does not generalise" in claims["e7.mlp"].ours) == (ABOUT in entropies)


def test_mlps_that_grok_do_not(transformers):
    runs = [mlp(job, seed, test=GROKS, spectra=SPECTRA) for job in (CONCAT, SUM) for seed in range(3)]
    result = e7_mlp.analyse(Runs((*transformers, *runs)))
    claims = e7_mlp.claims(result)
    assert claims["e7.mlp"].verdict == Verdict.NOT_REPRODUCED
    assert claims["e7.insufficient"].verdict == Verdict.NOT_REPRODUCED
    assert claims["e7.necessary"].verdict == Verdict.REPRODUCED
    assert claims["e7.alignment"].verdict == Verdict.NOT_REPRODUCED
    assert "T_grok 800 on average" in claims["e7.mlp"].ours
    assert "6 of 6 MLP runs grok" in e7_mlp.headline(result)
    figure = e7_mlp.spectra(result)
    legends = [axes.get_legend() for axes in figure.axes]
    assert [index for index, legend in enumerate(legends) if legend] == [
        2,
        5,
    ]  # at the end of each row, of that row
    assert figure.legends == []
    assert [text.get_text() for text in legends[2].get_texts()] == [
        "share between labels",
        "of it, five frequencies",
    ]
    assert [text.get_text() for text in legends[5].get_texts()] == [
        "restricted loss",
        "excluded loss",
        "test loss",
    ]


def test_one_setting_in_which_some_runs_collapse_without_generalising_is_sufficiency_in_part(transformers):
    result = e7_mlp.analyse(Runs((*transformers, mlp(CONCAT, 0), mlp(CONCAT, 1, test=GROKS))))
    claims = e7_mlp.claims(result)
    assert claims["e7.insufficient"].verdict == Verdict.IN_PART
    assert claims["e7.mlp"].verdict == Verdict.NOT_REPRODUCED  # one that does not refutes "an MLP does"


def test_crossing_h_star_for_a_while_without_generalising_is_sufficiency_denied_in_part(transformers):
    result = e7_mlp.analyse(Runs((*transformers, *(mlp(CONCAT, seed, entropy=DIPS) for seed in range(3)))))
    claim = e7_mlp.claims(result)["e7.insufficient"]
    assert claim.verdict == Verdict.IN_PART
    assert "no run generalises: concatenated, 512-128" in claim.ours


def test_grokking_without_a_fall_of_entropy_denies_necessity(transformers):
    result = e7_mlp.analyse(Runs((*transformers, mlp(CONCAT, 0, test=GROKS, entropy=STAYS))))
    assert e7_mlp.claims(result)["e7.necessary"].verdict == Verdict.NOT_REPRODUCED


def test_necessity_is_said_beside_the_falls_of_the_mlps_that_do_not_grok(transformers):
    runs = [mlp(CONCAT, seed, entropy=entropy) for seed, entropy in enumerate((LOW, DIPS, STAYS))]
    result = e7_mlp.analyse(Runs((*transformers, *runs, mlp(CONCAT, 3, test=GROKS))))
    said = e7_mlp.claims(result)["e7.necessary"].ours
    assert said == "1 of 1 runs (95 % CI 3 % to 100 %); so it falls in 2 of 3 of those that do not grok"


def test_alignment_is_dated_after_memorising_by_two_evaluations_above_the_null(transformers):
    once = {**SPECTRA, "alignment": [0.3, 0.3, 0.2, 0.3, 0.2, 0.2]}
    result = e7_mlp.analyse(
        Runs((*transformers, mlp(CONCAT, 0, spectra=once), mlp(CONCAT, 1, spectra=SPECTRA)))
    )
    assert listed(result.mlps[0].aligned()) == [None, 600]


def test_signals_are_dated_and_counted_before_grokking(transformers, undrawn):
    result = e7_mlp.analyse(
        Runs((*transformers, mlp(CONCAT, 0), mlp(CONCAT, 1, test=GROKS, spectra=SPECTRA)))
    )
    signals = result.mlps[0].signals()
    assert listed(signals["alignment above its null"]) == [None, 600]
    # 0.5 is not above one half, 0.9 is; log 97 / 2 is 2.29.
    assert listed(signals["half of the variance between labels in five frequencies"]) == [None, 800]
    assert listed(signals["restricted loss below half of chance"]) == [600, 600]
    assert listed(signals["H below the Transformers' H*"]) == [400, 400]
    rows = {
        row[1]: row[2:]
        for row in tables(e7_mlp.section(result))["What moves first: steps from each signal to T_grok"].rows
        if row[0] != "Transformer"
    }
    assert rows["restricted loss below half of chance"][1:] == ("200 steps (no interval: n = 1)", "1 of 1")
    assert rows["alignment above its null"][2] == "0 of 1"
    assert rows["half of the variance between labels in five frequencies"][0].startswith("0 of 1 runs")


def test_without_mlps_there_is_no_analysis(transformers):
    assert e7_mlp.analyse(Runs(tuple(transformers))) is None
    alone = planted(FEW["with-transformer-41-0.2"], 0, test=GROKS, entropy=FALLS, **SPECTRA)
    unknown = planted(dataclasses.replace(CONCAT, condition="baseline"), 0, test=STUCK, entropy=LOW, **FLAT)
    assert e7_mlp.analyse(Runs((*transformers, alone, unknown))) is None


@pytest.mark.parametrize("transformer", [[], [planted(E1, 0, test=STUCK, entropy=FALLS)]])
def test_without_transformers_that_grok_nothing_is_said_of_a_collapse(transformer, undrawn):
    result = e7_mlp.analyse(Runs((*transformer, mlp(CONCAT, 0), mlp(CONCAT, 1, test=GROKS))))
    assert outcomes(result)["concatenated, 512-128"] == (OUTCOMES[-1], "groks")
    claims = e7_mlp.claims(result)
    assert claims["e7.mlp"].verdict == Verdict.NOT_RUN
    assert claims["e7.insufficient"].verdict == Verdict.NOT_RUN
    assert "no H* to say" in e7_mlp.headline(result)
    assert e7_mlp.section(result).anchor == "e7"
    e7_mlp.side_by_side(result)
    e7_mlp.settings(result.mlps)


def test_runs_without_the_columns_are_reported_without_their_spectra(transformers, undrawn):
    result = e7_mlp.analyse(Runs((*transformers, mlp(CONCAT, 0, spectra={}))))
    assert listed(result.mlps[0].aligned()) == [None]
    rows = tables(e7_mlp.section(result))["Every run"].rows
    assert rows[-1][7:12] == ("–",) * 5
    assert rows[0][7] == "0.20 → 0.50"


def test_figures_draw_every_run_in_the_column_of_its_model(transformers):
    runs = [mlp(CONCAT, seed) for seed in range(2)] + [mlp(SUM, 0), mlp(dataclasses.replace(E7[4]), 0)]
    result = e7_mlp.analyse(Runs((*transformers, *runs)))
    figure = e7_mlp.side_by_side(result)
    top = figure.axes[:3]
    assert [axes.get_title(loc="left") or axes.get_title() for axes in top] == [
        "Transformer",
        "concatenated, 512-128",
        "summed, 512-128",
    ]
    drawn = [line.get_ydata() for line in top[1].lines if len(line.get_xdata()) == 6]
    assert sum(list(y) == STUCK for y in drawn) == 2
    assert len([axes for axes in e7_mlp.settings(result.mlps).axes if axes.get_visible()]) == 3
    assert len(e7_mlp.spectra(result).axes) == 6


def few(model, fraction, test, *, n=5, entropy=LOW):
    return [
        planted(FEW[f"with-{model}-41-{fraction:g}"], seed, test=test, entropy=entropy, **FLAT)
        for seed in range(n)
    ]


def test_at_p_41_both_models_are_judged_on_the_same_pairs_and_by_their_own_h_star(transformers, undrawn):
    runs = [
        *transformers,
        *few("mlp", 0.2, STUCK),
        *few("transformer", 0.2, STUCK, entropy=STAYS),
        *few("mlp", 0.5, GROKS),
        *few("transformer", 0.5, GROKS, entropy=[h + 0.01 for h in FALLS]),
    ]
    result = e7_mlp.analyse(Runs(tuple(runs)))
    assert result.few_h_star.value == pytest.approx(0.61)
    assert [model.label for model in result.papers] == ["MLP, p = 41, 20 %"]
    claims = e7_mlp.claims(result)
    assert claims["e7.mlp"].verdict == Verdict.REPRODUCED
    assert claims["e7.insufficient"].verdict == Verdict.REPRODUCED
    # The Transformer does not grok on those pairs either: the number of pairs, not the architecture.
    assert claims["e7.same_pairs"] == (
        "groks at 20 % of the pairs: MLP 0 of 5, Transformer 0 of 5; 50 % of the pairs: MLP 5 of 5, Transformer 5 of 5",
        Verdict.NOT_REPRODUCED,
        {},
    )
    assert "At p = 41, groks at 20 %" in e7_mlp.headline(result)
    rows = tables(e7_mlp.section(result))["Models"].rows
    assert [row[0] for row in rows] == ["Transformer"]
    assert len(e7_mlp.few_pairs(result).axes) == 4


def test_an_mlp_of_few_pairs_is_told_with_the_h_star_of_few_pairs_and_with_the_course_of_its_h(
    transformers, undrawn
):
    runs = [
        *transformers,
        *few("mlp", 0.2, STUCK),
        *few("transformer", 0.5, GROKS, entropy=[h + 0.1 for h in FALLS]),
    ]
    result = e7_mlp.analyse(Runs(tuple(runs)))
    assert (result.h_star.value, result.few_h_star.value) == pytest.approx((0.61, 0.7))
    headline = e7_mlp.headline(result)
    assert headline.endswith("holds in every run of: MLP, p = 41, 20 % (H* 0.700 [0.700, 0.700]).")
    claims = e7_mlp.claims(result)
    # The fall is over when they have memorised.
    assert claims["e7.mlp"].ours == (
        "MLP, p = 41, 20 %: 5 of 5 collapses, does not generalise; "
        "H 0.900 at the start, 0.600 at T_mem, 0.500 at the end, H* 0.700 [0.700, 0.700]; T_collapse in 0 of 5"
    )
    # It ends well above the paper's 0.15, though below H*.
    assert claims["e7.level"].verdict == Verdict.NOT_REPRODUCED
    assert claims["e7.level"].ours.startswith("0.500 (95 % CI 0.500 to 0.500; n = 5); less the paper's 0.350")
    assert [model.label for model in result.shown] == ["Transformer", "MLP, p = 41, 20 %"]
    levels = [
        line.get_ydata()[0]
        for axes in e7_mlp.side_by_side(result).axes[2:4]
        for line in axes.lines
        if list(line.get_xdata()) == [0, 1]  # across the panel
    ]
    assert levels == pytest.approx([0.61, 0.7])
    panels = e7_mlp.few_pairs(result).axes  # by share of the pairs, the MLP at the left
    assert [axes.get_title(loc="left") or axes.get_title() for axes in panels if axes.get_visible()] == [
        "MLP, p = 41, 20 %",
        "Transformer, p = 41, 50 %",
    ]
    assert [axes.get_visible() for axes in panels] == [True, False, False, True]
    assert panels[3].get_ylabel() == panels[0].get_ylabel() == "accuracy; H (no unit)"
    assert panels[3].yaxis.get_tick_params()["labelleft"]


def test_without_the_papers_own_mlp_nothing_is_said_of_the_level_that_its_h_falls_to(transformers):
    claims = e7_mlp.claims(e7_mlp.analyse(Runs((*transformers, mlp(CONCAT, 0)))))
    assert claims["e7.level"].verdict == Verdict.NOT_RUN


@pytest.mark.parametrize(
    ("transformer", "verdict"), [(GROKS, Verdict.REPRODUCED), (STUCK, Verdict.NOT_REPRODUCED)]
)
def test_the_architecture_is_what_matters_where_the_transformer_groks_on_the_mlps_pairs(
    transformers, transformer, verdict
):
    runs = [*transformers, *few("mlp", 0.3, STUCK), *few("transformer", 0.3, transformer, entropy=FALLS)]
    assert e7_mlp.claims(e7_mlp.analyse(Runs(tuple(runs))))["e7.same_pairs"].verdict == verdict


def test_without_a_share_of_pairs_at_which_no_mlp_groks_there_is_no_case(transformers):
    runs = [*transformers, *few("mlp", 0.6, GROKS), *few("transformer", 0.6, GROKS)]
    assert e7_mlp.claims(e7_mlp.analyse(Runs(tuple(runs))))["e7.same_pairs"].verdict == Verdict.NO_CASE
    assert (
        e7_mlp.claims(e7_mlp.analyse(Runs((*transformers, mlp(CONCAT, 0)))))["e7.same_pairs"].verdict
        == Verdict.NOT_RUN
    )
