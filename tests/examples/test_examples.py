"""The examples do what they say: each in a few steps here, in full where nightly tests run."""

import importlib.util
import re
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

FOLDER = Path(__file__).parents[2] / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def drawn(path):
    return path.read_bytes().startswith(b"\x89PNG")


def layers_and_steps(axes):
    """Rows and columns of a heatmap, which is drawn row by row."""
    rows = [mesh.get_array().shape for mesh in axes.collections if hasattr(mesh, "get_coordinates")]
    (width,) = {columns for _, columns in rows}
    return sum(height for height, _ in rows), width


def test_the_vision_transformer_is_watched_block_by_block_and_drawn_as_depth_by_step(tmp_path, capsys):
    pytest.importorskip("sklearn")
    picture = tmp_path / "vit.png"
    monitor = example("digits_vit").main(["--steps", "1", "--every", "1", "--picture", str(picture)])
    assert monitor.layers == tuple(f"blocks.{i}" for i in range(6))
    assert [(record.step, record.layer) for record in monitor.history] == [
        (step, layer) for step in range(2) for layer in monitor.layers
    ]
    assert {(record.n, record.d, record.status) for record in monitor.history} == {(256, 48, "ok")}
    assert layers_and_steps(monitor.plot("heatmap")) == (6, 2)
    assert drawn(picture)
    assert re.match(r"step    0  loss 2\.\d+  test accuracy 0\.\d+\n", capsys.readouterr().out)


def test_the_language_model_logs_each_block_at_each_step_that_is_due(tmp_path, capsys):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    text = tmp_path / "text"
    text.write_bytes(bytes(range(97, 123)) * 200)
    picture = tmp_path / "lm.png"
    options = ["--text", str(text), "--steps", "1", "--every", "1", "--picture", str(picture)]
    trainer = example("language_model").main(options)
    names = {f"entropy/model.layers.{i}" for i in range(6)}
    logged = [row for row in trainer.state.log_history if names <= row.keys()]
    assert [row["step"] for row in logged] == [0, 1]
    assert all(0 < row[name] < 1 for row in logged for name in names)
    assert drawn(picture)
    said = dict(
        re.findall(r"(model\.layers\.\d): entropy \S+ at first, (\S+) at last", capsys.readouterr().out)
    )
    assert said == {name[8:]: f"{logged[-1][name]:.3f}" for name in names}


def test_the_loop_writes_both_layers_and_the_loss_to_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    example("tensorboard_loop").main(["--steps", "20", "--every", "10", "--folder", str(tmp_path)])
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "entropy/1", "entropy/3"}
    for tag in ("loss", "entropy/1", "entropy/3"):
        values = events.Scalars(tag)
        assert [value.step for value in values] == [0, 10, 20]
        assert all(0 < value.value < 1 for value in values)


def test_the_alarm_goes_off_at_the_fall_and_not_before_it_may(tmp_path, capsys):
    picture = tmp_path / "alarm.png"
    alarm = example("collapse_alarm")
    both = alarm.main(["--steps", "60", "--since", "0", "--picture", str(picture)])
    assert drawn(picture)
    printed = capsys.readouterr().out
    for weight_decay, monitor in both.items():
        h = {record.step: record.normalized for record in monitor.history}
        (step,) = monitor.collapsed.values()
        assert h[step] < max(h.values()) - 0.05
        assert min(h[before] for before in h if before < step) >= h[0] - 0.05
        assert f"weight decay {weight_decay}: collapse at step {step}\n" in printed
    monitor, _ = alarm.train(2.0, 60, 200)
    assert monitor.collapsed == {}
    assert capsys.readouterr().out.endswith("collapsed at no step\n")


def test_a_task_of_ones_own_is_trained_with_its_measure_in_folders(tmp_path, monkeypatch, capsys):
    pytest.importorskip("safetensors")
    pytest.importorskip("pyarrow")
    import fastent
    from fastent.grokking.train import preset, registry

    monkeypatch.setattr(registry, "_registered", {})
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    own = example("own_task")
    task = own.squares(preset("quick", modulus=23))
    a, b = task.inputs.T
    assert task.labels.tolist() == ((a * a + b * b) % 23).tolist()
    own.main(["--steps", "1", "--out", str(tmp_path / "runs"), "--picture", str(tmp_path / "own.png")])
    assert drawn(tmp_path / "own.png")
    rows = fastent.load_runs(tmp_path / "runs").rows.values
    assert len(rows["favourite"]) == 6
    assert all(1 / 23 <= share <= 1 for share in rows["favourite"])
    assert capsys.readouterr().out.count("knows its pairs at step None, new ones at step None") == 3


@pytest.mark.nightly
def test_in_full_the_alarm_goes_off_where_new_pairs_are_solved_and_not_where_pairs_are_known_by_heart(
    tmp_path,
):
    both = example("collapse_alarm").main(["--picture", str(tmp_path / "alarm.png")])
    assert list(both[2.0].collapsed) == ["3"]
    assert 400 < both[2.0].collapsed["3"] < 2000
    assert both[0.0].collapsed == {}


@pytest.mark.nightly
def test_in_full_the_vision_transformer_reads_nine_of_ten_new_digits(tmp_path, capsys):
    pytest.importorskip("sklearn")
    monitor = example("digits_vit").main(["--picture", str(tmp_path / "vit.png")])
    assert max(map(float, re.findall(r"test accuracy (\S+)", capsys.readouterr().out))) > 0.9
    assert layers_and_steps(monitor.plot("heatmap")) == (6, 31)


@pytest.mark.nightly
def test_in_full_the_language_model_learns(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    trainer = example("language_model").main(["--picture", str(tmp_path / "lm.png")])
    losses = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 3.0


@pytest.mark.nightly
def test_in_full_every_seed_of_the_own_task_comes_to_solve_new_pairs(tmp_path, monkeypatch):
    pytest.importorskip("safetensors")
    pytest.importorskip("pyarrow")
    import fastent
    from fastent.grokking.train import registry

    monkeypatch.setattr(registry, "_registered", {})
    example("own_task").main(["--out", str(tmp_path / "runs"), "--picture", str(tmp_path / "own.png")])
    best: dict = {}
    rows = fastent.load_runs(tmp_path / "runs").rows.values
    for run, accuracy in zip(rows["run"], rows["test_accuracy"], strict=True):
        best[run] = max(accuracy, best.get(run, 0.0))
    assert len(best) == 3
    assert min(best.values()) > 0.95
