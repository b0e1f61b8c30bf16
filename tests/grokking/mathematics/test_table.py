"""The table of all items, its command, and the records and figures of the documentation."""

import dataclasses
import json

import numpy as np
import pytest

pytest.importorskip("matplotlib")
from fastent import cli
from fastent.grokking.mathematics import figures, runs, table
from fastent.grokking.mathematics.checks import CheckResult
from fastent.grokking.mathematics.table import Item, items, spread_of_thresholds, stored_thresholds
from fastent.grokking.train.config import PRESETS, preset
from fastent.grokking.train.storage import RunError

TABLE_6 = (
    "Lemma 1",
    "Lemma 2",
    "Proposition 3",
    "Lemma 4",
    "Heuristic 1",
    "Heuristic 2",
    "Lemma 5",
    "Proposition 6",
)


@pytest.mark.nightly
def test_every_item_of_table_6_is_checked_and_every_finding_confirmed():
    found = list(items())
    assert len(found) == len(TABLE_6) + 1
    for name, item in zip(TABLE_6, found, strict=False):
        assert item.name.startswith(name)
        assert item.evidence
        assert item.holds, [e.text for e in item.evidence if not e.holds]


@pytest.mark.parametrize(("holds", "status"), [(True, 0), (False, 1)])
def test_command_prints_the_table_and_fails_when_a_finding_is_not_confirmed(
    monkeypatch, capsys, holds, status
):
    pytest.importorskip("tyro")
    rows = [
        Item("Lemma 1", "full proof", "holds", (CheckResult(True, "ratio 0.99"),)),
        Item(
            "Lemma 5",
            "full proof",
            "false",
            (CheckResult(True, "slope -0.9"), CheckResult(holds, "bound 1.2")),
        ),
    ]
    monkeypatch.setattr(table, "items", lambda runs: iter(rows))
    monkeypatch.setenv("COLUMNS", "120")
    assert cli.main(["check", "maths"]) == status
    shown = capsys.readouterr().out
    for text in ("Lemma 1", "full proof", "false", "slope -0.9", "bound 1.2"):
        assert text in shown
    assert ("NOT CONFIRMED: bound 1.2" in shown) == (not holds)
    assert ("not confirmed: Lemma 5" in shown) == (not holds)


def test_thresholds_of_stored_runs_are_grouped_by_task_without_interventions(tmp_path):
    values = {"add": (0.60, 0.62, 0.64), "mul": (0.50, 0.52, 0.54)}
    folders = [(task, "baseline" if task == "add" else task, h) for task, hs in values.items() for h in hs]
    folders += [("add", "losses-0.1", 0.1), ("add", "losses-0.1", 0.2)]
    for seed, (task, condition, h) in enumerate(folders):
        run = tmp_path / f"run{seed}"
        run.mkdir()
        config = dataclasses.asdict(dataclasses.replace(PRESETS["quick"], task=task))
        head = {
            "experiment": "e6",
            "condition": condition,
            "seed": seed,
            "config": config,
            "schema_version": 1,
        }
        (run / "config.json").write_text(json.dumps(head))
        rows = [
            {"step": 0, "test_accuracy": 0.0, "entropy": 0.9},
            {"step": 50, "test_accuracy": 1.0, "entropy": h},
        ]
        common = {"train_accuracy": 1.0, "entropy_status": "ok", "parameter_norm": 1.0}
        (run / "metrics.jsonl").write_text("".join(json.dumps(row | common) + "\n" for row in rows))
    evidence = stored_thresholds(tmp_path)
    assert "add 3, mul 3" in evidence.text
    assert "Mean H*: add 0.620, mul 0.520. Standard deviation over seeds 0.020 " in evidence.text
    assert not spread_of_thresholds({"add": (0.6, 0.7)}, "one task").holds
    # A run of another preset among them would make a difference of settings one of tasks.
    head["config"] = dataclasses.asdict(dataclasses.replace(PRESETS["paper"], task="mul"))
    for seed, folder in ((3, "run3"), (4, "run4"), (5, "run5")):
        (tmp_path / folder / "config.json").write_text(json.dumps({**head, "condition": "mul", "seed": seed}))
    mixed = stored_thresholds(tmp_path)
    assert (mixed.holds, "differ in their settings" in mixed.text) == (False, True)


def test_followed_runs_are_written_and_read_back_and_drawn(tmp_path, monkeypatch):
    tiny = preset("quick", modulus=11, width=16, heads=2, feedforward=16, batch_size=40, train_fraction=0.7)
    monkeypatch.setitem(PRESETS, "quick", dataclasses.replace(tiny, evaluate_every=5))
    arguments = ["--seeds", "0", "1", "--steps", "90", "--measure-every", "3", "--curvature-every", "10"]
    runs.main([str(tmp_path), *arguments])
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["add-16-seed0.jsonl", "add-16-seed1.jsonl"]
    run = runs.read_followed(tmp_path / files[1])
    assert run.seed == 1
    assert run.config == PRESETS["quick"]
    assert (len(run.evaluations), len(run.steps), len(run.curvature)) == (18, 30, 9)
    again = runs.follow(run.config, 1, max_steps=90, measure_every=3, curvature_every=10)
    assert again.steps == run.steps
    assert again.evaluations == run.evaluations
    assert again.curvature == run.curvature
    written = figures.draw_all(tmp_path, tmp_path / "figures")
    assert len(written) == 5
    for path in written:
        assert path.read_bytes()[:4] == b"\x89PNG"
        assert path.stat().st_size > 20_000
    with pytest.raises(FileNotFoundError, match="holds no run"):
        figures.draw_all(tmp_path / "figures", tmp_path)


def test_a_file_that_is_no_followed_run_is_named_with_what_it_lacks(tmp_path):
    path = tmp_path / "add-16-seed0.jsonl"
    head = {"config": {"task": "add"}, "seed": 0}
    step = {"kind": "curvature", "step": 10, "value": 1.0, "residual": 0.1, "products": 9}

    def read(*lines, end="\n"):
        path.write_text("\n".join(lines) + end)
        return runs.read_followed(path)

    whole = [json.dumps(line) for line in (head, step)]
    assert len(read(*whole, whole[1]).curvature) == 2
    assert len(read(*whole, whole[1][:20], end="").curvature) == 1
    for lines, lacks in (
        ([whole[1]], "no 'config'"),
        ([json.dumps({"config": {"tusk": "add"}, "seed": 0})], "tusk"),
        ([json.dumps({"config": ["add"], "seed": 0})], "add"),
        ([whole[0], json.dumps({"kind": "curvature", "step": 10})], "value"),
        ([whole[0], json.dumps({"step": 10})], "no 'kind'"),
        ([whole[0], json.dumps({"kind": "walk"})], "'walk'"),
        ([whole[0], "{", whole[1]], "row 2 is damaged"),
    ):
        with pytest.raises(RunError) as error:
            read(*lines)
        assert str(path) in str(error.value)
        assert lacks in str(error.value)
        assert "follow the seed again" in str(error.value)
    for make in (path.unlink, path.touch):
        make()
        with pytest.raises(RunError, match="no followed run, for it is missing or empty"):
            runs.read_followed(path)


def test_a_task_is_followed_at_its_own_share_of_the_pairs(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(runs, "follow", lambda config, seed, **_: seen.append(config))
    runs.main([str(tmp_path), "--preset", "paper", "--task", "s5", "--seeds", "0"])
    assert seen == [preset("paper", task="s5")]
    assert seen[0].train_fraction == 0.5


def test_measuring_a_run_leaves_its_training_as_it_is():
    from fastent.grokking.train.stack import Stack

    config = preset("quick", modulus=11, width=16, heads=2, feedforward=16, batch_size=40, train_fraction=0.7)
    config = dataclasses.replace(config, evaluate_every=5)
    plain, measured = Stack(config, [3]), runs.follow(config, 3, max_steps=20, measure_every=4)
    for _ in range(15):
        plain.train_step()
    assert measured.evaluations[-1]["step"] == 15
    assert measured.evaluations[-1]["train_loss"] == float(plain.evaluate()["train_loss"][0])
    assert np.isfinite(measured.column("predicted")).all()
