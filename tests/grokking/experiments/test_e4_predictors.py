"""E4 on runs whose correlations and laws are known."""

import dataclasses
import math

import numpy as np
import pytest
from closed_form import write_run

from fastent.forecast.history import History
from fastent.forecast.power_law import PowerLaw
from fastent.grokking.experiments import e4_predictors, figures
from fastent.grokking.experiments.data import Runs, read_runs
from fastent.grokking.experiments.document import Table, Verdict
from fastent.grokking.experiments.statistics import CORRELATION, EXPLAINED, UNKNOWN, jackknife, over


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    monkeypatch.setattr(figures, "both", lambda draw: (draw(), ("<svg/>", "<svg/>"))[1])


def law(seed):
    """H = H* + ((T_grok - t) / 20,000)^(1/1.5): H* = 0.6, C1 = 20,000, gamma = 1.5, C2 = 0, T_grok by seed."""
    t_grok = 2000 + 200 * seed
    return t_grok, lambda step: 0.6 + (max(t_grok - step, 0) / 20_000) ** (1 / 1.5)


def runs(out, norm, seeds=range(4), entropy=None):
    for seed in seeds:
        t_grok, exact = law(seed)
        own = exact if entropy is None else entropy(seed)
        write_run(
            out,
            "e1",
            "baseline",
            seed,
            t_grok=t_grok,
            last_step=t_grok + 600,
            entropy=own,
            norm=norm(seed, own),
        )
    return Runs(tuple(read_runs(out)))


def falling(seed, own):
    return lambda step: 90 - 50 * own(step)


def test_norm_that_is_minus_the_entropy_correlates_with_minus_one_everywhere(tmp_path):
    r = e4_predictors.correlations(runs(tmp_path, falling))
    for value in (r.overall, r.ranks, r.within, r.plateau, r.changes, r.changes_plateau):
        assert value.value == pytest.approx(-1)
    assert r.overall.n == 4


def test_opposite_courses_within_and_over_runs_are_told_apart(tmp_path):
    # Within a run the norm falls with H; runs with a higher H throughout have a far higher norm.
    measured = runs(
        tmp_path,
        lambda seed, own: lambda step: 50 + 40 * seed - 50 * own(step),
        entropy=lambda seed: lambda step: 0.5 + 0.1 * seed - (step / 1e4) ** 2,
    )
    r = e4_predictors.correlations(measured)
    assert r.within.value == pytest.approx(-1)
    assert r.changes.value == pytest.approx(-1)
    assert r.overall.value > 0.9


def test_a_common_trend_hides_changes_against_each_other(tmp_path):
    # Norm and H fall together, and waver against each other from one evaluation to the next.
    def wave(step):
        return (-1) ** (step // 100)

    measured = runs(
        tmp_path,
        lambda seed, own: lambda step: 50 - step / 100 - 0.5 * wave(step),
        entropy=lambda seed: lambda step: 0.9 - step / 1e4 + 0.01 * wave(step),
    )
    r = e4_predictors.correlations(measured)
    assert r.within.value > 0.9
    assert r.changes.value == pytest.approx(-1)


def test_pairs_of_equal_norm_and_different_entropy_are_counted_and_the_widest_named(tmp_path):
    # Constant norms, 1 % apart and more: only evaluations of one run are alike in norm.
    measured = runs(
        tmp_path,
        lambda seed, own: lambda step: 50.0 * 1.02**seed,
        entropy=lambda seed: lambda step: 0.9 - 1.1 * step / 1e4,
    )
    pairs = e4_predictors.pairs(measured)
    counts = (~np.isnan(measured.step)).sum(axis=1).tolist()
    assert pairs.count == sum(n * (n - 1) // 2 for n in counts)
    assert pairs.far_entropy == pytest.approx(
        sum((n - 10) * (n - 9) // 2 for n in counts) / pairs.count  # ten evaluations apart or more
    )
    first, second = pairs.widest[0]
    assert (first.seed, first.step, second.step) == (3, 0, 3200)
    assert len(pairs.widest) == 4
    # Equal H means equal step here, whatever the seed, and seeds grok at different steps.
    assert 0 < pairs.same_entropy < 1


def test_gap_of_entropy_is_fitted_as_the_power_law_is_and_beats_a_norm_that_says_nothing(tmp_path):
    rng = np.random.default_rng(0)
    measured = runs(tmp_path, lambda seed, own: lambda step: 50 + rng.normal())
    table = {row.name: row for row in e4_predictors.table(e4_predictors.Evaluations.of(measured))}
    gap = table[e4_predictors.ENTROPY_GAP]
    assert gap.in_sample.value == pytest.approx(1, abs=1e-4)
    assert gap.gamma == pytest.approx(1.5, rel=0.02)
    assert gap.left_out == pytest.approx(1, abs=1e-3)
    assert table[e4_predictors.NORM].in_sample.value < 0.1
    histories = [
        History(step, h, t_grok)
        for t_grok, (step, h) in zip(measured.t_grok, measured.lines(measured.entropy), strict=True)
    ]
    assert gap.in_sample.value == pytest.approx(PowerLaw.fit(histories).r_squared, abs=1e-4)


def test_clock_is_fitted_on_the_other_runs_alone(tmp_path):
    measured = runs(tmp_path, falling)
    data = e4_predictors.Evaluations.of(measured)
    clock = e4_predictors.table(data)[-1]
    errors, truth = [], []
    for k, (at, entropy) in enumerate(measured.lines(measured.entropy)):
        t_grok = measured.t_grok[k]
        others = np.delete(measured.t_grok, k).mean()
        step = at[(data.h_star.mean() < entropy) & (at < t_grok)]
        truth += list(t_grok - step)
        errors += list(np.maximum(others - step, 0) - (t_grok - step))
        assert (data.run == k).sum() == step.size
    expected = 1 - np.sum(np.square(errors)) / np.sum(np.square(truth - np.mean(truth)))
    assert clock.left_out == pytest.approx(expected)
    assert clock.name == e4_predictors.CLOCK
    assert not clock.advantage.known


def test_difference_to_the_clock_is_that_of_the_two_r2_and_its_interval_is_over_runs(tmp_path):
    rng = np.random.default_rng(0)
    data = e4_predictors.Evaluations.of(runs(tmp_path, lambda seed, own: lambda step: 50 + rng.normal()))
    rows = {row.name: row for row in e4_predictors.table(data)}
    gap, clock = rows[e4_predictors.ENTROPY_GAP], rows[e4_predictors.CLOCK]
    for row in rows.values():
        if row is not clock:
            assert row.advantage.value == pytest.approx(row.left_out - clock.left_out)
            assert row.advantage.n == 4
    # The gap leaves next to no error (its exponents are a grid): a run weighs in by the clock's squared errors alone.
    total = np.sum((data.remaining - data.remaining.mean()) ** 2)
    weights = []
    for k, t_grok in enumerate(data.t_grok):
        own = data.run == k
        late = np.maximum(np.delete(data.t_grok, k).mean() - data.step[own], 0)
        assert t_grok == (data.remaining + data.step)[own][0]
        weights.append(4 * np.sum((late - data.remaining[own]) ** 2) / total)
    expected = over(weights)
    assert (gap.advantage.low, gap.advantage.high) == pytest.approx((expected.low, expected.high), abs=1e-3)
    assert rows[e4_predictors.NORM].advantage.high < 0


def test_speeds_are_changes_a_step_without_sign_and_the_first_is_that_of_the_second(tmp_path):
    data = e4_predictors.Evaluations.of(
        runs(
            tmp_path,
            lambda seed, own: lambda step: 50 - step / 100 if step <= 500 else 45 + (step - 500) / 50,
            entropy=lambda seed: lambda step: 0.9 - step / 1e4,
        )
    )
    assert data.entropy_speed == pytest.approx(np.full(data.step.size, 1e-4))
    # The table of the claim leaves no evaluation out for want of one before it.
    assert (data.step == 0).sum() == 4
    assert data.norm_speed == pytest.approx(np.where(data.step <= 500, 0.01, 0.02))


def test_a_norm_that_rises_towards_grokking_is_as_good_as_one_that_falls(tmp_path):
    up = runs(tmp_path / "up", lambda seed, own: lambda step: 30 + 20 * (1 - math.exp(-step / 1000)))
    down = runs(tmp_path / "down", lambda seed, own: lambda step: 30 + 20 * math.exp(-step / 1000))
    found = [e4_predictors.table(e4_predictors.Evaluations.of(measured))[0] for measured in (up, down)]
    assert all(row.name == e4_predictors.NORM and row.in_sample.value > 0.8 for row in found)


def test_a_predictor_is_better_only_where_leaving_out_runs_leaves_it_better():
    def row(name, value, *replicates):
        return e4_predictors.Predictor(
            name, 1.0, jackknife(value, replicates, EXPLAINED), replicates, math.nan, UNKNOWN
        )

    gap = row(e4_predictors.ENTROPY_GAP, 0.6, 0.55, 0.6, 0.65)
    others = [name for name in e4_predictors.PREDICTORS if name != gap.name]
    worse, wild = (0.1, 0.06, 0.1, 0.14), (0.5, 0.7, 0.5, 0.3)
    for of_norm, of_all, best, seven in (
        (worse, worse, Verdict.REPRODUCED, Verdict.REPRODUCED),
        (wild, worse, Verdict.UNDECIDED, Verdict.UNDECIDED),
        ((0.8, 0.78, 0.8, 0.82), worse, Verdict.NOT_REPRODUCED, Verdict.NOT_REPRODUCED),
    ):
        rows = {name: row(name, *of_all) for name in others}
        rows |= {gap.name: gap, e4_predictors.NORM: row(e4_predictors.NORM, *of_norm)}
        assert e4_predictors._judge_best(rows) == best
        assert e4_predictors._judge_seven(rows) == seven


def test_claims_judge_weak_correlation_pairs_and_predictors(tmp_path):
    rng = np.random.default_rng(1)
    measured = runs(tmp_path, lambda seed, own: lambda step: 50 - 4 * own(step) + rng.normal())
    result = e4_predictors.analyse(dataclasses.replace(measured, judged=False))
    verdicts = [found.verdict for found in e4_predictors.claims(result).values()]
    assert verdicts == [
        Verdict.REPRODUCED,
        Verdict.REPRODUCED,
        Verdict.REPRODUCED,
        Verdict.OTHER_SETTING,
        Verdict.REPRODUCED,
        Verdict.IN_PART,
        Verdict.NOT_RUN,  # no alignment was recorded
        Verdict.UNDECIDED,  # four runs
    ]
    strong = e4_predictors.analyse(dataclasses.replace(runs(tmp_path / "strong", falling), judged=True))
    verdicts = [found.verdict for found in e4_predictors.claims(strong).values()]
    assert verdicts[0] == Verdict.UNDECIDED  # r is −1, and has no interval
    assert verdicts[3] == Verdict.NOT_REPRODUCED  # R2 is near 1 here


def test_alignment_that_rises_as_the_entropy_falls_has_rho_minus_one_and_its_portrait_ends_at_t_grok(
    tmp_path,
):
    measured = runs(tmp_path, falling)
    aligned = dataclasses.replace(
        measured,
        stored=tuple(
            # After grokking, which plays no part, it falls again.
            dataclasses.replace(
                run,
                rows=tuple(
                    {
                        **row,
                        "leading_alignment": (0.9 - row["entropy"]) ** 3 if row["step"] <= t_grok else 0.1,
                    }
                    for row in run.rows
                ),
            )
            for run, t_grok in zip(measured.stored, measured.t_grok, strict=True)
        ),
    )
    result = e4_predictors.analyse(dataclasses.replace(aligned, judged=True))
    found = result.alignment
    assert (found.rho.value, found.rho.n) == (pytest.approx(-1), 4)
    assert [e.value for e in found.last] == pytest.approx([0.6, 0.027])
    start = np.mean([law(seed)[1](0) for seed in range(4)])
    assert found.first[0].value == pytest.approx(start)
    names = [getattr(block, "name", "") for block in e4_predictors.section(result).blocks]
    assert "e4-portrait" in names
    claim = e4_predictors.claims(result)["e4.alignment"]
    assert claim.verdict == Verdict.UNDECIDED  # −1 is within 0.2 of −0.82, and not of its interval
    assert claim.ours.endswith("at the start to (0.60, 0.03) at T_grok")


def test_runs_that_recorded_no_alignment_say_which_command_does(tmp_path):
    result = e4_predictors.analyse(runs(tmp_path, falling))
    claim = e4_predictors.claims(result)["e4.alignment"]
    assert claim.verdict == Verdict.NOT_RUN
    assert "`fastent run e1 --preset paper`" in claim.ours
    assert not any(
        getattr(block, "name", "") == "e4-portrait" for block in e4_predictors.section(result).blocks
    )


def test_two_runs_are_too_few_for_predictors_and_that_is_said(tmp_path):
    result = e4_predictors.analyse(dataclasses.replace(runs(tmp_path, falling, seeds=range(2)), judged=True))
    assert result.table == ()
    assert [found.verdict for found in e4_predictors.claims(result).values()][3:] == [Verdict.NOT_RUN] * 5
    assert any("Fewer than three" in getattr(b, "text", "") for b in e4_predictors.section(result).blocks)


def test_section_tables_hold_the_closed_form_values(tmp_path):
    result = e4_predictors.analyse(dataclasses.replace(runs(tmp_path, falling), judged=False))
    tables = [block for block in e4_predictors.section(result).blocks if isinstance(block, Table)]
    assert tables[0].rows[0][0] == "evaluations until 1,200 steps after T_grok, as the paper's"
    assert tables[0].rows[1][0] == "all evaluations of all runs"
    assert tables[0].rows[0][1].startswith("−1.000")
    assert tables[2].rows[3][0] == e4_predictors.ENTROPY_GAP
    assert tables[2].rows[3][1].startswith("1.000")
    assert "the clock alone" in e4_predictors.headline(result)


def test_jackknife_of_a_mean_is_students_interval():
    x = np.array([3.0, 5.0, 4.0, 8.0])
    e = jackknife(x.mean(), [np.delete(x, i).mean() for i in range(4)])
    half = 3.182446305284263 * x.std(ddof=1) / 2
    assert (e.low, e.high) == (pytest.approx(x.mean() - half), pytest.approx(x.mean() + half))


def test_jackknife_gives_no_interval_it_cannot_know():
    assert not jackknife(0.5, [0.4, 0.6]).bounded
    assert not jackknife(0.5, [0.4, 0.6, math.nan]).bounded
    full = jackknife(0.99, [0.985, 0.99, 0.995], CORRELATION)
    assert -1 < full.low < 0.99 < full.high < 1


@pytest.mark.parametrize(
    ("value", "left_out", "scale", "why"),
    [
        (0.932, [0.9, 1.0, 0.9], EXPLAINED, "a perfect fit with a run left out"),
        (0.932, [0.9, 1 - 1e-15, 0.9], EXPLAINED, "a perfect fit with a run left out"),
        (1.0, [1.0, 1.0, 1.0], EXPLAINED, "a perfect fit"),
        (-0.9, [-0.8, -1.0, -0.9], CORRELATION, "a perfect fit with a run left out"),
        (0.932, [0.9, 1 - 1e-6, 0.9], EXPLAINED, "not determined by 3 runs"),
        (0.5, [0.4, math.nan, 0.6], EXPLAINED, "undefined with a run left out"),
    ],
)
def test_jackknife_at_the_end_of_a_scale_has_no_interval_and_says_why(value, left_out, scale, why):
    e = jackknife(value, left_out, scale)
    assert (e.value, e.bounded, e.method) == (value, False, f"no interval: {why}")


def test_clock_of_two_runs_that_grok_at_one_step_has_no_interval_and_the_report_says_so(tmp_path):
    for seed, t_grok in enumerate((2200, 1800, 2200)):
        write_run(
            tmp_path, "e1", "baseline", seed, t_grok=t_grok, last_step=t_grok + 600,
            entropy=lambda step, t_grok=t_grok: 0.6 + (max(t_grok - step, 0) / 20_000) ** (1 / 1.5),
            norm=lambda step: 50 + math.sin(step),
        )  # fmt: skip
    result = e4_predictors.analyse(Runs(tuple(read_runs(tmp_path)), judged=True))
    clock = result.table[-1].in_sample
    # With seed 1 left out the clock of the other two is exact: no finite spread of what stays unexplained.
    assert (clock.bounded, clock.method) == (False, "no interval: a perfect fit with a run left out",
    )  # fmt: skip
    said = " ".join(getattr(block, "text", "") for block in e4_predictors.section(result).blocks)
    assert f"{e4_predictors.CLOCK}: no interval: a perfect fit with a run left out" in said
