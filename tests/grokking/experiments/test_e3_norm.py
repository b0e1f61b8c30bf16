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


SHAM, CONTROL = "norm-as-baseline", "losses-0.1+norm-as-baseline"


def cells(out, *, mixing, norm, interaction=0, holding=0, seeds=range(5)):
    """Baseline and mixing, free; the four cells with a norm held, effects in steps; and a norm held at its start."""
    for seed in seeds:
        base = 1000 + 100 * seed
        held = base + holding
        write_run(out, "e1", "baseline", seed, t_grok=base, norm=falling)
        write_run(out, "e2", "losses-0.1", seed, t_grok=base + mixing, norm=rising)
        write_run(out, "e3", SHAM, seed, t_grok=held, norm=falling)
        write_run(out, "e3", CONTROL, seed, t_grok=held + mixing, norm=lambda s: falling(s) * (1 + 1e-7))
        write_run(out, "e3", "norm-as-losses-0.1", seed, t_grok=held + norm, norm=rising)
        write_run(
            out,
            "e3",
            "losses-0.1+norm-as-losses-0.1",
            seed,
            t_grok=held + mixing + norm + interaction,
            norm=rising,
        )
        write_run(out, "e3", "norm-start", seed, t_grok=base, norm=lambda s: 50.0 if s == 0 else 49.5)
    return read_runs(out)


def verdicts(runs):
    return {
        name: found.verdict
        for name, found in e3_norm.claims(e3_norm.analyse(Runs(tuple(runs), judged=False))).items()
    }


def test_factorial_effects_are_those_planted(tmp_path):
    effects = e3_norm.analyse(
        Runs(tuple(cells(tmp_path, mixing=500, norm=300, interaction=200, holding=900)), judged=False)
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


def test_the_driver_is_the_entropy_where_mixing_delays_against_the_sham(tmp_path):
    # Whatever the holding does by itself: against the free baseline the control is later by 1,400 in the first two.
    found = {
        "yes": cells(tmp_path / "a", mixing=900, norm=0, holding=500),
        "no": cells(tmp_path / "b", mixing=0, norm=0, holding=1400),
        "norm too": cells(tmp_path / "c", mixing=900, norm=200),
        "small": cells(tmp_path / "d", mixing=100, norm=0),
        "sooner": cells(tmp_path / "e", mixing=-300, norm=200),
    }
    assert {name: verdicts(runs)[DRIVER] for name, runs in found.items()} == {
        "yes": Verdict.REPRODUCED,
        "no": Verdict.NOT_REPRODUCED,
        "norm too": Verdict.IN_PART,
        "small": Verdict.IN_PART,
        "sooner": Verdict.NOT_REPRODUCED,
    }


def test_without_the_sham_the_driver_is_undecided_and_says_what_it_needs(tmp_path):
    runs = [run for run in cells(tmp_path, mixing=500, norm=900) if run.condition != SHAM]
    assert verdicts(runs)[DRIVER] == Verdict.UNDECIDED
    result = e3_norm.analyse(Runs(tuple(runs), judged=False))
    assert e3_norm.claims(result)[DRIVER].ours == e3_norm.NO_SHAM
    assert "is not among these runs" in e3_norm.headline(result)
    assert any("`fastent run e3` makes it" in getattr(b, "text", "") for b in e3_norm.section(result).blocks)
    assert verdicts([run for run in runs if run.condition != CONTROL])[DRIVER] == Verdict.NOT_RUN


def test_a_wide_interval_against_the_sham_decides_nothing(tmp_path):
    runs = [run for run in cells(tmp_path, mixing=0, norm=0) if run.condition != CONTROL]
    for seed, late in enumerate((-400, -200, 0, 500, 900)):
        write_run(tmp_path / "wide", "e3", CONTROL, seed, t_grok=1000 + 100 * seed + late)
    runs += read_runs(tmp_path / "wide")
    assert verdicts(runs)[DRIVER] == Verdict.UNDECIDED
    one = cells(tmp_path / "one", mixing=500, norm=0, seeds=range(1))
    assert verdicts(one)[DRIVER] == Verdict.UNDECIDED


def test_more_seeds_of_the_control_than_of_the_sham_are_compared_over_the_shared(tmp_path):
    cells(tmp_path, mixing=500, norm=0, holding=300)
    for seed in range(5, 9):
        write_run(tmp_path, "e1", "baseline", seed, t_grok=3000)
        write_run(tmp_path, "e3", CONTROL, seed, t_grok=3900)
    result = e3_norm.analyse(Runs(tuple(read_runs(tmp_path)), judged=False))
    assert result.conditions[CONTROL].later.n == 9
    later = result.against_sham[CONTROL].later
    assert (later.value, later.n) == (pytest.approx(500), 5)


def test_what_t_grok_follows_is_measured_against_the_baseline_of_the_same_seed(tmp_path):
    def scale(times):
        return {"logit_scale": lambda step: times * 5.0}

    for seed in range(5):
        base = 1000 + 100 * seed
        write_run(tmp_path, "e1", "baseline", seed, t_grok=base, columns=scale(1))
        for condition, times, norm, logits in (
            ("norm-mem", 2, 3, 2),
            ("logits-as-baseline+norm-mem", 1, 3, 7),
            ("logits-as-norm-mem", 2, 1, 9),
        ):
            write_run(
                tmp_path,
                "e3",
                condition,
                seed,
                t_grok=times * base,
                norm=lambda step, norm=norm: 50.0 * norm,
                entropy=lambda step: 0.85,
                columns=scale(logits),
            )
    result = e3_norm.analyse(Runs(tuple(read_runs(tmp_path)), judged=False))
    table = next(
        b for b in e3_norm.section(result).blocks if isinstance(b, Table) and "T_grok follows" in b.caption
    )
    rows = {row[0]: row[1:] for row in table.rows}
    # The scale that is trained on is the followed run's, whatever the logits before the division.
    assert rows["norm held where the baseline has memorised"][:3] == (
        "2.00 [2.00, 2.00]",
        "3.00 [3.00, 3.00]",
        "2.00 [2.00, 2.00]",
    )
    held, free = (row for name, row in rows.items() if name.startswith("logits' scale"))
    assert (held[0][:4], held[1][:4], held[2][:4]) == ("1.00", "3.00", "1.00")
    assert (free[0][:4], free[1][:4], free[2][:4]) == ("2.00", "1.00", "2.00")
    assert held[3].startswith("−0.050")
    said = next(
        b.text for b in e3_norm.section(result).blocks if "variance of ln(T_grok" in getattr(b, "text", "")
    )
    assert "scale of the logits 1.00 (n = 15)" in said
    (left,) = (
        b.text for b in e3_norm.section(result).blocks if "dividing the logits" in getattr(b, "text", "")
    )
    assert "0.50 [0.50, 0.50] times what it is: the delay may be the scale's" in left
    assert math.isnan(result.deviations["logits-as-norm-mem"])


@pytest.mark.parametrize(
    ("held", "cooled", "entropy", "says"),
    [
        (
            2,
            2.5,
            0,
            "1.25: the delay is not the scale's, for it is there without it, and with an H that is not told",
        ),
        (2, 2, 0.1, "1.00: the delay is not the scale's, for it is there without it."),
        (2, 1, 0, "0.50: the delay may be the scale's, for without it it is not told from none."),
        (2, 0.5, 0, "0.25: the delay may be the scale's"),
        (0.5, 0.5, 0.1, "1.00: the advance is not the scale's"),
        (1, 2, 0, "2.00."),
    ],
)
def test_a_held_norm_acts_through_the_scale_of_the_logits_only_where_nothing_is_left_without_it(
    held, cooled, entropy, says
):
    def apart(condition, times, h):
        # Seeds that differ, the first of which only one of the two has.
        seeds, off = range(condition == "norm-mem", 5), (0.0, -0.1, 0.1, -0.1, 0.1)
        time = {seed: math.log(times) + off[seed] for seed in seeds}
        return e3_norm.Apart(condition, time, {}, {}, {seed: h + off[seed] / 10 for seed in seeds})

    said = e3_norm._said_of_scale(
        apart("norm-mem", held, 0.2), apart("logits-as-baseline+norm-mem", cooled, entropy)
    )
    start = "With the norm held where the baseline has memorised, dividing the logits to the baseline's scale changes"
    said = said.removeprefix(f"{start} T_grok to ")
    figure, _, rest = said.partition(" times what it is")
    assert f"{figure.partition(' ')[0]}{rest}".startswith(says)


def test_controls_at_other_alphas_are_named_beside_that_of_the_claim(tmp_path):
    runs = cells(tmp_path, mixing=500, norm=0, holding=300)
    before = verdicts(runs)
    for seed in range(4):
        write_run(tmp_path / "other", "e3", f"losses-0.4+{SHAM}", seed, t_grok=1000 + 100 * seed + 1300)
        write_run(tmp_path / "other", "e3", "losses-0.4+norm-mem", seed, t_grok=3000)
        write_run(tmp_path / "other", "e3", "norm-as-losses-0.4", seed, t_grok=1000 + 100 * seed + 1000)
        write_run(tmp_path / "other", "e3", f"{SHAM}-every-step", seed, t_grok=1000 + 100 * seed + 200)
    runs += read_runs(tmp_path / "other")
    result = e3_norm.analyse(Runs(tuple(runs), judged=False))
    found = e3_norm.claims(result)
    assert found["e3.delays"].ours == (
        "800 steps (95 % CI 800 to 800; n = 5), at α = 0.4 by 1,300 steps (95 % CI 1,300 to 1,300; n = 4)"
    )
    assert "; mixing at α = 0.4 against the sham: later by 1,000 steps" in found[DRIVER].ours
    assert "; the mixed runs' norm without mixing against the sham: later by 0 steps" in found[DRIVER].ours
    assert (
        "; the mixed runs' norm (α = 0.4) without mixing against the sham: later by 700 steps"
        in found[DRIVER].ours
    )
    said = e3_norm.headline(result)
    assert "At α = 0.4 mixing with the baseline's norm moves T_grok by 1,300 steps" in said
    assert "Without mixing, norm as under mixing (α = 0.4, losses averaged): 1,000 steps" in said
    blocks = e3_norm.section(result).blocks
    (sham,) = (block for block in blocks if isinstance(block, Table) and "against the sham" in block.caption)
    assert {row[0] for row in sham.rows} >= {
        "norm as under mixing (α = 0.4, losses averaged)",
        "mixing, α = 0.4, losses averaged; norm as in the baseline",
    }
    assert any("but for rounding. It moves T_grok by 200 steps" in getattr(b, "text", "") for b in blocks)
    assert {name: each.verdict for name, each in found.items()} == before


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
    runs = [
        run
        for run in cells(tmp_path, mixing=500, norm=0)
        if run.experiment != "e2" and run.condition != "losses-0.1+norm-as-losses-0.1"
    ]
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
