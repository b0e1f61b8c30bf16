"""`log_to` with each logger as it is: every late record at its own step, and none that fails stops a monitor."""

import io
import json
import math
import os
import re
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from fake_wandb import FakeWandb
from torch import Tensor

import fastent
from fastent.integrations.loggers import log_to

LAYERS = ("", "fc:input")


def activations(step: int) -> Tensor:
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(step))
    return x * torch.tensor([1.0, 0.5, 0.2, 0.1])


def records(*steps: int) -> list[fastent.EntropyRecord]:
    entropy = {step: fastent.spectral_entropy(activations(step)) for step in steps}
    return [fastent.EntropyRecord.of(step, layer, entropy[step]) for step in steps for layer in LAYERS]


def curves(*steps: int, prefix: str = "entropy") -> dict[str, list[tuple[int, float]]]:
    """What a logger must hold of `records`, by name."""
    kept = {f"{prefix}/{layer or 'model'}": layer for layer in LAYERS}
    return {
        name: [(r.step, r.normalized) for r in records(*steps) if r.layer == layer]
        for name, layer in kept.items()
    }


def assert_training_goes_on(on_record: Callable[[fastent.EntropyRecord], object], error: str) -> None:
    monitor = fastent.SpectralEntropyMonitor(on_record=on_record)
    with pytest.warns(RuntimeWarning, match=f"on_record failed at step 0: .*{re.escape(error)}"):
        monitor.observe(0, activations(0), layer="a")
    for step in (1, 2):
        monitor.observe(step, activations(step), layer="a")  # and no further warning, which is an error here
    assert [record.step for record in monitor.history] == [0, 1, 2]


# Lines of JSON


def lines_of(text: str) -> list[fastent.EntropyRecord]:
    return [fastent.EntropyRecord.from_dict(json.loads(line)) for line in text.splitlines()]


def test_a_path_gets_a_line_for_each_record_and_keeps_what_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("log.jsonl", Path("log.jsonl")):
        on_record = log_to(name)
        (tmp_path / "elsewhere").mkdir(exist_ok=True)
        monkeypatch.chdir("elsewhere")
        for record in records(0, 100):
            on_record(record)
        monkeypatch.chdir(tmp_path)
    assert lines_of((tmp_path / "log.jsonl").read_text()) == 2 * records(0, 100)


def test_a_name_of_a_layer_is_text_in_a_line_and_no_path(tmp_path: Path) -> None:
    name = '../../escaped/"a\\n\n{"step": 0}\x00'
    monitor = fastent.SpectralEntropyMonitor(on_record=log_to(tmp_path / "h.jsonl", prefix="../out"))
    monitor.observe(0, torch.eye(3), layer=name)
    monitor.flush()
    assert [path.name for path in tmp_path.iterdir()] == ["h.jsonl"]
    (line,) = (tmp_path / "h.jsonl").read_bytes().splitlines()
    assert json.loads(line)["layer"] == name


def test_a_line_that_a_crash_cut_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    on_record = log_to(path)
    first, second, third, fourth = records(0, 100)
    on_record(first)
    whole = path.read_bytes()
    on_record(second)
    path.write_bytes(path.read_bytes()[: len(whole) + 30])
    on_record(third)
    on_record(fourth)
    lines = path.read_text().splitlines()
    assert lines_of("\n".join([lines[0], *lines[2:]])) == [first, third, fourth]
    assert len(lines[1]) == 30


def test_an_open_file_has_each_line_on_disk_before_the_next_record(tmp_path: Path) -> None:
    with (tmp_path / "log.jsonl").open("w") as file:
        on_record = log_to(file)
        for i, record in enumerate(records(0, 100)):
            on_record(record)
            assert lines_of((tmp_path / "log.jsonl").read_text()) == records(0, 100)[: i + 1]


def test_a_record_without_a_number_is_a_line_that_every_reader_of_json_takes() -> None:
    monitor = fastent.SpectralEntropyMonitor(on_record=log_to(file := io.StringIO()))
    monitor.observe(5, torch.full((8, 3), math.nan), layer="a")
    assert json.loads(file.getvalue(), parse_constant=pytest.fail)["status"] == "nonfinite"


def test_a_file_that_cannot_be_written_to_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        log_to(tmp_path / "missing" / "log.jsonl")
    with pytest.raises(TypeError, match="bytes-like"):
        log_to(io.BytesIO())
    closed = io.StringIO()
    closed.close()
    with pytest.raises(ValueError, match="closed file"):
        log_to(closed)


def test_a_file_that_goes_away_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    on_record = log_to(tmp_path / "runs" / "log.jsonl")
    (tmp_path / "runs" / "log.jsonl").unlink()
    (tmp_path / "runs").rmdir()
    assert_training_goes_on(on_record, "FileNotFoundError")
    file = io.StringIO()
    on_record = log_to(file)
    file.close()
    assert_training_goes_on(on_record, "closed file")


# TensorBoard


@pytest.fixture(scope="module")
def tensorboard() -> ModuleType:
    pytest.importorskip("tensorboard")
    return pytest.importorskip("torch.utils.tensorboard")


def test_tensorboard_holds_every_record_at_its_own_step(tensorboard: ModuleType, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with tensorboard.SummaryWriter(str(tmp_path)) as writer:
        writer.add_scalar("loss", 1.0, 1000)
        on_record = log_to(writer, prefix="h")
        for record in records(300, 200):
            on_record(record)
    events = EventAccumulator(str(tmp_path)).Reload()
    for name, expected in curves(300, 200, prefix="h").items():
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(step, pytest.approx(value, rel=1e-6)) for step, value in expected]  # float32 there


def test_a_tensorboard_writer_that_fails_stops_nothing(tensorboard: ModuleType, tmp_path: Path) -> None:
    writer = tensorboard.SummaryWriter(str(tmp_path))
    writer.file_writer.close()
    assert_training_goes_on(log_to(writer), "Writer is closed")


# MLflow


@pytest.fixture(scope="module")
def mlflow(tmp_path_factory: pytest.TempPathFactory) -> Any:
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = (
        "true"  # a store in a database needs more than the package of clients
    )
    mlflow = pytest.importorskip("mlflow")
    mlflow.set_tracking_uri((tmp_path_factory.mktemp("mlflow") / "runs").as_uri())
    return mlflow


@pytest.mark.parametrize("given", ["run", "module"])
def test_mlflow_holds_every_record_at_its_own_step_in_the_run_that_was_given(mlflow: Any, given: str) -> None:
    with mlflow.start_run() as run:
        on_record = log_to(run if given == "run" else mlflow)
    with mlflow.start_run():
        for record in records(300, 200):
            on_record(record)
    for name, expected in curves(300, 200).items():
        history = mlflow.MlflowClient().get_metric_history(run.info.run_id, name)
        assert [(metric.step, metric.value) for metric in history] == expected


def test_a_run_of_mlflow_that_fails_stops_nothing(mlflow: Any) -> None:
    with mlflow.start_run() as run:
        on_record = log_to(run)
    mlflow.delete_run(run.info.run_id)
    assert_training_goes_on(on_record, "MlflowException")


def test_mlflow_without_an_active_run_is_refused(mlflow: Any) -> None:
    with pytest.raises(ValueError, match=r"there is none: mlflow.start_run\(\)"):
        log_to(mlflow)


# Trackio


@pytest.fixture(scope="module")
def trackio(tmp_path_factory: pytest.TempPathFactory) -> Any:
    if "trackio" not in sys.modules:  # which reads it when it is imported
        os.environ["TRACKIO_DIR"] = str(tmp_path_factory.mktemp("trackio"))
    return pytest.importorskip("trackio")


@pytest.mark.parametrize("given", ["run", "module"])
def test_trackio_holds_every_record_at_its_own_step(trackio: Any, given: str) -> None:
    from trackio.sqlite_storage import SQLiteStorage

    run = trackio.init(project=f"test-{given}", embed=False, auto_log_gpu=False, auto_log_cpu=False)
    run.log({"loss": 1.0}, step=1000)
    on_record = log_to(run if given == "run" else trackio)
    for record in records(300, 200):
        on_record(record)
    trackio.finish()
    rows = SQLiteStorage.get_logs(f"test-{given}", run.name)
    for name, expected in curves(300, 200).items():
        assert [(row["step"], row[name]) for row in rows if name in row] == expected


def test_trackio_without_a_run_stops_nothing(trackio: Any) -> None:
    assert_training_goes_on(log_to(trackio), "Call trackio.init()")


# Weights & Biases


@pytest.fixture(params=["modelled", pytest.param("real", marks=pytest.mark.nightly)])
def wandb_run(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Any, Callable[[], Any]]:
    """A run, and what to call for its axes and rows once it is finished."""
    if request.param == "modelled":
        modelled = FakeWandb()
        return modelled, lambda: (modelled.axes, modelled.rows)
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = wandb.init(project="test", dir=str(tmp_path))
    return run, lambda: stored(next(tmp_path.glob("wandb/offline-run-*/*.wandb")).read_bytes())


def test_wandb_keeps_every_record_and_every_row_of_the_user(wandb_run: tuple[Any, Callable[[], Any]]) -> None:
    run, kept = wandb_run
    on_record = log_to(run)
    for step in range(31):
        run.log({"loss": float(step)}, step=step)
        if step % 10 == 5:  # of five steps ago, and of two layers
            for record in records(step - 5):
                on_record(record)
    for record in records(29, 30):
        on_record(record)
    run.finish()
    axes, rows = kept()
    assert axes == {"entropy/*": "entropy/step"}
    for name, expected in curves(0, 10, 20, 29, 30).items():
        assert [(row["entropy/step"], row[name]) for row in rows if name in row] == expected
    assert [row["loss"] for row in rows if "loss" in row] == [float(step) for step in range(31)]
    assert_training_goes_on(on_record, "finished")


def stored(data: bytes) -> tuple[dict[str, str], list[dict[str, float]]]:
    """Axes and rows of an offline run: records in LevelDB's log format, each a message."""
    from wandb.proto import wandb_internal_pb2

    axes, rows, message, at = {}, [], b"", 7
    while at + 7 <= len(data):
        if at % 32768 > 32768 - 7:
            at += 32768 - at % 32768
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        message += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole message, or its last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(message)
            message = b""
            if record.HasField("metric"):
                axes[record.metric.glob_name or record.metric.name] = record.metric.step_metric
            if record.HasField("history"):
                items = record.history.item
                rows.append(
                    {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}
                )
    return axes, rows


# What is none of them


@pytest.mark.parametrize("other", [None, 5, {}, print, object(), torch])
def test_what_is_no_logger_is_refused_with_the_list(other: object) -> None:
    with pytest.raises(
        TypeError, match=r"TensorBoard SummaryWriter, a run of W&B, MLflow or Trackio .* an open text file"
    ):
        log_to(other)
