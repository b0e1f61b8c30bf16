"""E3 on closed-form runs: the two by two design, how well norms were held, and what the control can say."""

import math

import pytest
from closed_form import write_run

from fastent.grokking.experiments import e3_norm, figures
from fastent.grokking.experiments.data import Runs, read_runs
from fastent.grokking.experiments.document import Table, Verdict

DRIVER = "e3.driver"


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    monkeypatch.setattr(figures, "both", lambda draw: (draw(), ("<svg/>", "<svg/>"))[1])


def falling(step):
    return 50 - step / 1000


def rising(step):
    return 50 + step / 1000


def cells(out, *, mixing, norm, interaction=0, seeds=range(5)):
    """All four cells, with effects in steps, and the norm held at its start."""
    for seed in seeds:
        base = 1000 + 100 * seed
        write_run(out, "e1", "baseline", seed, t_grok=base, norm=falling)
        write_run(out, "e2", "losses-0.1", seed, t_grok=base + mixing + norm + interaction, norm=rising)
        write_run(
            out,
            "e3",
            "losses-0.1+norm-as-baseline",
            seed,
            t_grok=base + mixing,
            norm=lambda s: falling(s) * (1 + 1e-7),
        )
        write_run(out, "e3", "norm-as-losses-0.1", seed, t_grok=base + norm, norm=rising)
        write_run(out, "e3", "norm-start", seed, t_grok=base, norm=lambda s: 50.0 if s == 0 else 49.5)
    return read_runs(out)


def verdicts(runs):
    return {
        name: found.verdict
        for name, found in e3_norm.claims(e3_norm.analyse(Runs(tuple(runs), judged=False))).items()
    }


def test_factorial_effects_are_those_planted(tmp_path):
    effects = e3_norm.analyse(
        Runs(tuple(cells(tmp_path, mixing=500, norm=300, interaction=200)), judged=False)
    ).factorial
    assert effects.n == 5
    assert effects.mixing.value == pytest.approx(600)  # 500 with the baseline's norm, 700 with the other
    assert effects.norm.value == pytest.approx(400)
    assert effects.interaction.value == pytest.approx(200)


def test_deviation_is_from_the_run_followed_or_from_the_start(tmp_path):
    deviations = e3_norm.analyse(Runs(tuple(cells(tmp_path, mixing=500, norm=0)), judged=False)).deviations
    assert deviations["losses-0.1+norm-as-baseline"] == pytest.approx(1e-7, rel=1e-3)
    assert deviations["norm-as-losses-0.1"] == pytest.approx(0, abs=1e-12)
    assert deviations["norm-start"] == pytest.approx(0.01)


def test_norm_held_from_memorising_on_is_compared_with_the_baselines_norm_then(tmp_path):
    cells(tmp_path, mixing=500, norm=0, seeds=range(1))
    write_run(tmp_path, "e3", "norm-mem", 0, t_grok=1000, norm=lambda step: falling(min(step, 300)))
    found = e3_norm.analyse(Runs(tuple(read_runs(tmp_path)), judged=False)).deviations
    assert found["norm-mem"] == pytest.approx(0, abs=1e-12)


def test_the_driver_is_the_entropy_only_if_the_norm_alone_does_nothing(tmp_path):
    assert verdicts(cells(tmp_path / "a", mixing=500, norm=0))[DRIVER] == Verdict.REPRODUCED
    runs = cells(tmp_path / "b", mixing=500, norm=200)
    assert verdicts(runs)[DRIVER] == Verdict.UNDECIDED  # without the sham
    for seed in range(5):
        write_run(tmp_path / "b", "e3", "norm-as-baseline", seed, t_grok=1000 + 100 * seed, norm=falling)
    assert verdicts(read_runs(tmp_path / "b"))[DRIVER] == Verdict.NOT_REPRODUCED
    assert verdicts(cells(tmp_path / "c", mixing=0, norm=0))[DRIVER] == Verdict.IN_PART
    without = [
        run for run in read_runs(tmp_path / "a") if "norm-" not in run.condition or "+" in run.condition
    ]
    assert verdicts(without)[DRIVER] == Verdict.NOT_RUN


def test_where_no_run_groks_there_is_nothing_to_judge(tmp_path):
    for experiment, condition in (
        ("e1", "baseline"),
        ("e3", "losses-0.1+norm-as-baseline"),
        ("e3", "norm-start"),
    ):
        for seed in range(3):
            write_run(tmp_path, experiment, condition, seed, t_grok=None)
    got = verdicts(read_runs(tmp_path))
    assert got[DRIVER] == Verdict.NO_CASE
    assert got["e3.delays"] == Verdict.NO_CASE


def test_an_incomplete_design_has_no_factorial_and_says_so(tmp_path):
    runs = [run for run in cells(tmp_path, mixing=500, norm=0) if run.experiment != "e2"]
    result = e3_norm.analyse(Runs(tuple(runs), judged=False))
    assert result.factorial is None
    # What it follows is not among the runs.
    assert math.isnan(result.deviations["norm-as-losses-0.1"])
    assert any("is not complete" in getattr(b, "text", "") for b in e3_norm.section(result).blocks)


def test_section_names_every_condition_in_words(tmp_path):
    result = e3_norm.analyse(Runs(tuple(cells(tmp_path, mixing=500, norm=200)), judged=False))
    table = next(b for b in e3_norm.section(result).blocks if isinstance(b, Table))
    rows = {row[0]: row for row in table.rows}
    assert rows["mixing, α = 0.1, losses averaged; norm as in the baseline"][3] == "500 [500, 500]"
    assert rows["norm as under mixing (α = 0.1, losses averaged)"][3] == "200 [200, 200]"
    assert rows["norm held at its start"][3] == "0 [0, 0]"
    assert "Without mixing, norm held at its start: 0 steps" in e3_norm.headline(result)
