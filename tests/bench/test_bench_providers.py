"""The benchmarks' inputs and providers: who is right on which."""

import math

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
import fastent
from bench import entropy, harness, providers, report, suite
from bench.entropy import LIMITS
from bench.harness import read_rows
from bench.providers import INPUTS, SHAPES, Shape
from fastent.reference.entropy import spectral_entropy


def test_every_float32_shape_has_a_limit():
    assert {(shape.n, shape.d) for shape in SHAPES if shape.dtype == "float32"} == set(LIMITS)


@pytest.mark.parametrize("case", INPUTS, ids=[case.name for case in INPUTS])
def test_fastent_is_right_to_1e_12_on_every_input_of_the_benchmark(case):
    h = case.tensor()
    truth = spectral_entropy(h.double().numpy(), extended=True).entropy
    assert abs(providers.ours(h) - truth) <= 1e-12 * math.log(h.shape[1])


@pytest.mark.parametrize(("op", "ours"), [("entropy", providers.ours), ("covariance", fastent.covariance)])
def test_every_exact_provider_that_is_installed_agrees_on_easy_input(op, ours):
    h = INPUTS[0].tensor()
    calls = {p.name: call for p, call in providers.loaded(op).items() if p.exact and callable(call)}
    assert {"fastent", "numpy" if op == "entropy" else "numpy.cov"} <= set(calls)
    for name, call in calls.items():
        # ssrlib adds 1e-12 to the trace and to each share
        error = torch.as_tensor(call(h) - ours(h), device="cpu").abs().max()
        assert error < (1e-11 if op == "entropy" else 1e-14), name


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Three providers, one shape and one input, planted times, and every question in this process."""
    monkeypatch.setattr(providers, "PROVIDERS", providers.PROVIDERS[:3])
    providers.loaded.cache_clear()
    monkeypatch.setattr(entropy, "SHAPES", (Shape(256, 128, quick=True),))
    monkeypatch.setattr(entropy, "INPUTS", INPUTS[:1])
    monkeypatch.setitem(entropy.LIMITS, (256, 128), 2.0)
    monkeypatch.setattr(entropy, "measure_rates", lambda: None)
    monkeypatch.setattr(entropy, "floor", lambda *_: 1e-5)
    took = np.array([1e-5, 2e-5, 3e-5])
    monkeypatch.setattr(entropy, "interleaved", lambda calls, **_: dict.fromkeys(calls, took))
    monkeypatch.setattr(entropy, "beside", lambda ours, calls, **_: dict.fromkeys(calls, (took, took[::-1])))
    monkeypatch.setattr(
        suite, "part", lambda name, threads, *, quick, guests: suite.measure(name, quick=quick)
    )
    monkeypatch.setattr(harness, "recorded_changes", lambda: None)
    monkeypatch.setattr(report, "save_png", lambda *_, **__: None)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    providers.loaded.cache_clear()


def test_a_provider_from_outside_is_in_rows_tables_and_figures(tiny):
    (tiny / "mine.py").write_text(
        "import torch\nfrom bench.providers import Provider\n\ndef entropy(h):\n"
        "    p = torch.linalg.eigvalsh(torch.cov(h.double().T))\n"
        "    p = p / p.sum()\n    return float(-(p * p.log()).sum())\n\n\ndef broken(h):\n    return 1 / 0\n"
        "\n\nabsent = Provider('absent', lambda: __import__('absent'))\n"
    )
    guests = ["mine:entropy", "mine:broken", "absent"]
    places = [*guests[:2], "mine:absent"]
    arguments = ["--quick", "--only", "entropy", "accuracy", "--provider", *places, "--out", str(tiny)]
    assert suite.main(arguments) == 0
    rows = {name: read_rows(tiny / "cpu" / f"{name}.jsonl") for name in ("entropy", "accuracy")}
    assert [row["provider"] for row in rows["entropy"]] == ["fastent", "torch, direct", "numpy", *guests]
    (mine,) = (row for row in rows["accuracy"] if row["provider"] == guests[0])
    assert mine["error"] < 1e-14
    text = (tiny / "cpu" / "report.md").read_text()
    assert f"| threads | fastent | torch, direct | numpy | {' | '.join(guests)} |" in text
    assert "| 1.00 [0.33, 3.00] | ZeroDivisionError | not installed |" in text
    assert "| mine:broken | ZeroDivisionError |" in text
    assert "| absent | not installed |" in text
    for draw, name in ((report._cost, "entropy"), (report._accuracy, "accuracy")):
        done = [row for row in rows[name] if "skipped" not in row]
        drawn = {label for ax in draw(done).axes for label in ax.get_legend_handles_labels()[1]}
        assert {"fastent", "mine:entropy"} <= drawn
    assert "| 256 x 128 float32 | torch, direct |" in (tiny / "cpu" / "commits.md").read_text()
    same = [
        {**row, "case": report.SHAPE, "against": row["provider"]} for row in rows["entropy"] if "ratio" in row
    ]
    assert "mine:entropy" in report._over_commits(same).axes[-2].get_legend_handles_labels()[1]


def test_a_guest_may_be_a_provider_and_must_be_there_under_a_name_of_its_own(tiny, capsys):
    (tiny / "theirs.py").write_text(
        "from bench.providers import Provider\n\n"
        "matrix = Provider('theirs', lambda: lambda h: h.T @ h, None, 'covariance')\n"
        "taken = Provider('numpy', lambda: len)\n"
    )
    providers.invite("theirs:matrix")
    assert [provider.name for provider in providers.loaded("covariance")] == ["theirs"]
    with pytest.raises(ValueError, match="a provider of the entropy is called 'numpy' already"):
        providers.invite("theirs:taken")
    with pytest.raises(ValueError, match="a provider is given as module:name; got 'theirs'"):
        providers.invite("theirs")
    for place in ("theirs", "theirs:misspelt", "nowhere:entropy"):
        with pytest.raises(SystemExit):
            suite.main(["--only", "entropy", "--provider", place])
    assert "the provider nowhere:entropy cannot be loaded: ModuleNotFoundError" in capsys.readouterr().err
