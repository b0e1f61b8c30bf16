"""E8 on planted runs: the two probes, and a law of the size that the correction must undo."""

import numpy as np
import pytest
from planted_columns import planted, tables

from fastent.grokking.experiments import e8_probes, figures
from fastent.grokking.experiments.data import Runs
from fastent.grokking.experiments.document import Verdict
from fastent.grokking.experiments.jobs import JOBS
from fastent.grokking.train.config import preset

JOB = JOBS["e1"](preset("paper"), range(6))[0]
TRAIN, ALL = round(0.3 * 97**2), 97**2
SIZES = (64, 128, 256, 512, 1024, 2048)
GROKS = 8


def entropy(seed):
    """0.9 for four evaluations, then down by 0.05 each; a hundredth of the seed higher."""
    return [0.9 - 0.05 * max(0, k - 3) + 0.01 * seed for k in range(12)]


def run(seed, *, lower=(0.0,) * 12, b=4.0, noise=0.0, groks=GROKS):
    """H of the whole training set is `entropy`; a probe of N lacks b (1/N - 1/n), the test probe `lower`."""
    h = np.array(entropy(seed))
    rng = np.random.default_rng(seed)
    lack = {
        n: b * (1 / n - 1 / TRAIN) + noise * rng.standard_normal() * (1 / n - 1 / TRAIN) ** 0.5 for n in SIZES
    }
    return planted(
        JOB,
        seed,
        test=[1.0 if k >= groks else 0.0 for k in range(12)],
        entropy=list(h - lack[512]),
        entropy_test=list(h - lack[512] - np.array(lower)),
        **{f"entropy_{n}": list(h - lack[n]) for n in SIZES},
        entropy_train=list(h),
        entropy_all=list(h + 0.001),
    )


@pytest.fixture
def undrawn(monkeypatch):
    monkeypatch.setattr(figures, "both", lambda draw: ("<svg/>", "<svg/>"))


@pytest.fixture
def result():
    # At grokking the test probe reads 0.002 lower, half-way there 0.08 lower.
    lower = [0.0, 0.0, 0.01, 0.03, 0.08, 0.04, 0.02, 0.01, 0.002, 0.0, 0.0, 0.0]
    return e8_probes.analyse(Runs(tuple([run(seed, lower=lower) for seed in range(6)])))


def test_sizes_are_those_recorded_with_the_training_set_and_all_pairs():
    assert e8_probes.sizes(run(0)) == {
        **{f"entropy_{n}": n for n in SIZES},
        "entropy_train": TRAIN,
        "entropy_all": ALL,
    }


def test_probes_are_compared_at_grokking_and_along_the_runs(result):
    lack = 4.0 * (1 / 512 - 1 / TRAIN)
    mean = 0.9 - 0.05 * 5 + 0.025 - lack
    assert result.train.value == pytest.approx(mean)
    assert result.test.value == pytest.approx(mean - 0.002)
    assert result.difference.value == pytest.approx(-0.002)
    assert result.correlation.value == pytest.approx(1.0)
    assert result.largest == pytest.approx([-0.08] * 6)
    assert result.largest_at.tolist() == [800] * 6
    x = np.array(entropy(0))
    y = x - np.array([0.0, 0.0, 0.01, 0.03, 0.08, 0.04, 0.02, 0.01, 0.002, 0.0, 0.0, 0.0])
    # T_mem is at step 400, T_grok at 1,600.
    assert result.before.value == pytest.approx((0.01 + 0.03 + 0.08 + 0.04 + 0.02 + 0.01) / 6)
    assert result.after.value == pytest.approx(0.002 / 4)
    assert result.along.value == pytest.approx(np.corrcoef(x, y)[0, 1])


def test_correction_undoes_the_law_of_the_size_and_the_population(result):
    for probe in result.sized[1:-2]:
        assert probe.deficit.value == pytest.approx(4.0 * (1 / probe.n - 1 / TRAIN))
        assert probe.corrected.value == pytest.approx(0, abs=1e-12)
    assert not result.sized[0].corrected.known
    assert result.sized[-1].deficit.value == pytest.approx(-0.001)


def test_spread_over_the_runs_falls_with_the_square_root_of_the_law():
    result = e8_probes.analyse(Runs(tuple([run(seed, noise=0.05) for seed in range(60)])))
    expected = 0.05 * np.sqrt(1 / 64 - 1 / TRAIN)
    assert result.sized[0].spread == pytest.approx(expected, rel=0.3)
    assert e8_probes.rate_of_spread(result) == pytest.approx(0.5, abs=0.12)


def test_claims_judge_the_planted_probes(result):
    claims = e8_probes.claims(result)
    assert claims["e8.close"].verdict == Verdict.REPRODUCED
    assert claims["e8.correlated"].verdict == Verdict.UNDECIDED  # r is 1: Fisher's interval does not exist
    assert claims["e8.artefact"].verdict == Verdict.REPRODUCED
    assert (
        claims["e8.enough"].verdict == Verdict.REPRODUCED
    )  # 4 (1/512 - 1/2823) = 0.0064 of the training set


def test_a_certain_difference_beyond_the_margin_is_no_agreement():
    claims = e8_probes.claims(
        e8_probes.analyse(Runs(tuple([run(seed, lower=[0.015] * 12) for seed in range(6)])))
    )
    assert claims["e8.close"].verdict == Verdict.NOT_REPRODUCED


def test_a_test_probe_far_from_the_training_probe_is_said_to_be():
    claims = e8_probes.claims(
        e8_probes.analyse(Runs(tuple([run(seed, lower=[0.3] * 12) for seed in range(6)])))
    )
    assert claims["e8.close"].verdict == Verdict.NOT_REPRODUCED
    # Its own threshold is as much lower, so it crosses at the same step.
    assert claims["e8.artefact"].verdict == Verdict.REPRODUCED


def test_a_test_probe_that_dips_early_does_not_see_the_collapse_when_the_training_probe_does():
    early = [run(seed, lower=[0.5 * (k == 3) for k in range(12)]) for seed in range(6)]
    assert (
        e8_probes.claims(e8_probes.analyse(Runs(tuple(early))))["e8.artefact"].verdict
        == Verdict.NOT_REPRODUCED
    )


def test_runs_that_never_grok_leave_nothing_to_compare_at_grokking(undrawn):
    result = e8_probes.analyse(Runs(tuple([run(seed, groks=99) for seed in range(2)])))
    assert {found.verdict for found in e8_probes.claims(result).values()} == {Verdict.NOT_RUN}
    assert "no run groks" in e8_probes.headline(result)
    assert e8_probes.section(result).anchor == "e8"


def test_without_the_columns_there_is_no_analysis():
    assert e8_probes.analyse(Runs((planted(JOB, 0, test=[0.0], entropy=[0.9]),))) is None


def test_section_has_the_planted_numbers(result, undrawn):
    found = tables(e8_probes.section(result))
    first = found["Both probes of each run"].rows[0]
    assert first[5:8] == ("0.644", "0.642", "−0.0020")
    assert first[8] == "−0.080 at 800"
    sizes = found["H by size of the probe"].rows
    assert [row[1] for row in sizes] == ["64", "128", "256", "512", "1,024", "2,048", "2,823", "9,409"]
    assert sizes[3][4].startswith("0.0064 (95 % CI")


def test_figures_show_the_pairs_at_grokking_and_the_law_through_every_size(result):
    b = e8_probes.two_probes(result).axes[1]
    (dots,) = [line for line in b.lines if line.get_marker() == "o"]
    np.testing.assert_allclose(dots.get_data(), [result.runs.h_star, result.tested.h_star])
    a = e8_probes.probe_sizes(result).axes[0]
    read = next(line for line in a.lines if line.get_label() == "as read").get_ydata()
    law = next(line for line in a.lines if "from the largest" in line.get_label()).get_ydata()
    np.testing.assert_allclose(read, law, rtol=1e-9)
