"""Rows 3, 4 and 6 of the faults, for one folder of checkpoints."""

import dataclasses
import hashlib
import io
import os
import pickle
import subprocess
import sys

import pytest
import torch

from fastent.grokking.train import storage
from fastent.grokking.train.checkpoint import (
    Checkpoint,
    checkpoint_steps,
    keep_last_sound,
    keep_newest,
    read_checkpoint,
    remove_checkpoints,
    write_checkpoint,
)
from fastent.grokking.train.storage import CheckpointError, RunError, seal


def checkpoint(step):
    generator = torch.Generator().manual_seed(step)
    stacked = torch.randn(3, 4, 5, generator=generator)
    tensors = {
        "weight": stacked[1],
        "transposed": stacked[2].T,
        "moment": stacked[0].double(),
        "count": torch.tensor(step),
    }
    return Checkpoint(step, tensors, {"monitor": {"history": [0.1 + 0.2, None], "every": 50}})


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path):
    written = checkpoint(7)
    write_checkpoint(tmp_path, written)
    read = read_checkpoint(tmp_path, 7)
    assert read.step == 7
    assert read.state == written.state
    assert read.tensors.keys() == written.tensors.keys()
    for name, tensor in written.tensors.items():
        assert read.tensors[name].dtype == tensor.dtype
        assert torch.equal(read.tensors[name], tensor)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-7.json", "checkpoint-7.safetensors"]


def test_the_bytes_of_a_checkpoint_depend_on_its_content_alone(tmp_path):
    # In another process, because hash seeds and addresses differ there.
    write_checkpoint(tmp_path, checkpoint(7))
    (tmp_path / "other").mkdir()
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; import test_checkpoint as t;"
        "t.write_checkpoint(Path(sys.argv[2]), t.checkpoint(7))"
    )
    subprocess.run([sys.executable, "-c", program, os.path.dirname(__file__), tmp_path / "other"], check=True)
    for name in ("checkpoint-7.json", "checkpoint-7.safetensors"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


def flip(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize(
    "damage", [lambda data: b"", lambda data: data[:-1], flip], ids=["empty", "truncated", "bit flipped"]
)
def test_damaged_tensors_are_named_with_expected_and_found_checksum(tmp_path, damage):
    write_checkpoint(tmp_path, checkpoint(7))
    path = tmp_path / "checkpoint-7.safetensors"
    good = path.read_bytes()
    path.write_bytes(damage(good))
    expected, found = (hashlib.sha256(data).hexdigest() for data in (good, damage(good)))
    with pytest.raises(
        CheckpointError,
        match=rf"checkpoint-7\.safetensors: damaged: expected sha256 {expected}, found {found}",
    ):
        read_checkpoint(tmp_path, 7)


@pytest.mark.parametrize("at", range(0, 323, 19))
def test_one_bit_turned_anywhere_in_the_record_is_found(tmp_path, at):
    write_checkpoint(tmp_path, checkpoint(7))
    path = tmp_path / "checkpoint-7.json"
    data = bytearray(path.read_bytes())
    assert len(data) > 322
    data[at] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=r"checkpoint-7\.json: "):
        read_checkpoint(tmp_path, 7)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"step": 7}', b"null"])
def test_a_record_that_is_none_is_named(tmp_path, data):
    write_checkpoint(tmp_path, checkpoint(7))
    (tmp_path / "checkpoint-7.json").write_bytes(data)
    with pytest.raises(
        CheckpointError, match=r"checkpoint-7\.json: damaged: expected (JSON|a JSON object|record_sha256)"
    ):
        read_checkpoint(tmp_path, 7)


def test_a_checkpoint_of_another_step_under_this_name_is_refused(tmp_path):
    write_checkpoint(tmp_path, checkpoint(7))
    for suffix in ("json", "safetensors"):
        (tmp_path / f"checkpoint-7.{suffix}").rename(tmp_path / f"checkpoint-8.{suffix}")
    with pytest.raises(CheckpointError, match=r"checkpoint-8\.json: .* found schema 1, step 7"):
        read_checkpoint(tmp_path, 8)


def test_a_record_whose_state_is_no_object_is_refused(tmp_path):
    write_checkpoint(tmp_path, dataclasses.replace(checkpoint(7), state=[]))
    with pytest.raises(
        CheckpointError, match=r"checkpoint-7\.json: damaged: expected a record of its name's step"
    ):
        read_checkpoint(tmp_path, 7)


def test_a_newer_schema_is_an_error_and_not_a_reason_to_fall_back(tmp_path, monkeypatch):
    monkeypatch.setattr("fastent.grokking.train.checkpoint.SCHEMA_VERSION", 2)
    write_checkpoint(tmp_path, checkpoint(7))
    monkeypatch.undo()
    with pytest.raises(RunError, match="schema 2 of a newer fastent; this one reads up to 1") as caught:
        read_checkpoint(tmp_path, 7)
    assert not isinstance(caught.value, CheckpointError)


@pytest.mark.parametrize(
    "fails_at", [0, 1, 2, 3], ids=["tensors", "rename of tensors", "record", "rename of record"]
)
def test_a_write_that_fails_anywhere_leaves_the_one_before_as_the_newest(tmp_path, monkeypatch, fails_at):
    write_checkpoint(tmp_path, checkpoint(5))
    count = iter(range(4))

    def failing(real):
        def call(*arguments):
            if next(count) == fails_at:
                raise OSError(28, "No space left on device")
            return real(*arguments)

        return call

    monkeypatch.setattr(storage, "_write_all", failing(storage._write_all))
    monkeypatch.setattr(os, "replace", failing(os.replace))
    with pytest.raises(OSError, match="No space left on device"):
        write_checkpoint(tmp_path, checkpoint(7))
    monkeypatch.undo()
    assert checkpoint_steps(tmp_path) == [5]
    assert torch.equal(read_checkpoint(tmp_path, 5).tensors["weight"], checkpoint(5).tensors["weight"])
    write_checkpoint(tmp_path, checkpoint(9))
    keep_newest(tmp_path, 1)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-9.json", "checkpoint-9.safetensors"]


def test_only_the_newest_are_kept(tmp_path):
    for step in (5, 50, 500):
        write_checkpoint(tmp_path, checkpoint(step))
    keep_newest(tmp_path, 2)
    assert checkpoint_steps(tmp_path) == [50, 500]
    assert len(os.listdir(tmp_path)) == 4
    remove_checkpoints(tmp_path, above=50)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-50.json", "checkpoint-50.safetensors"]


@pytest.mark.parametrize("lost", ["record lost", "record damaged", "tensors lost", "tensors damaged"])
def test_of_a_complete_run_the_newest_sound_weights_stay_whatever_became_of_the_last(tmp_path, lost):
    for step in (5, 50, 500):
        write_checkpoint(tmp_path, checkpoint(step))
    path = tmp_path / ("checkpoint-500.json" if "record" in lost else "checkpoint-500.safetensors")
    other = next(p for p in tmp_path.glob("checkpoint-500.*") if p != path)
    kept = other.read_bytes()
    if lost.endswith("lost"):
        path.unlink()
    else:
        path.write_bytes(flip(path.read_bytes()))
    keep_last_sound(tmp_path)
    assert other.read_bytes() == kept
    assert torch.equal(read_checkpoint(tmp_path, 50).tensors["weight"], checkpoint(50).tensors["weight"])
    assert not list(tmp_path.glob("checkpoint-5.*"))


def test_weights_without_a_record_stay_until_newer_ones_are_whole(tmp_path):
    write_checkpoint(tmp_path, checkpoint(7))
    (tmp_path / "checkpoint-7.json").unlink()
    kept = (tmp_path / "checkpoint-7.safetensors").read_bytes()
    for tidy in (
        keep_last_sound,
        keep_newest,
        remove_checkpoints,
        lambda folder: remove_checkpoints(folder, above=-1),
    ):
        tidy(tmp_path)
        assert (tmp_path / "checkpoint-7.safetensors").read_bytes() == kept
    write_checkpoint(tmp_path, checkpoint(9))
    keep_newest(tmp_path, 1)
    assert checkpoint_steps(tmp_path) == [9]
    assert not (tmp_path / "checkpoint-7.safetensors").exists()


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("suffix", ["pt", "pth", "pkl"])
def test_a_pickled_checkpoint_is_refused_and_nothing_in_it_runs(tmp_path, suffix):
    trace = tmp_path / "executed"
    (tmp_path / f"checkpoint-9.{suffix}").write_bytes(pickle.dumps(Bomb(str(trace))))
    with pytest.raises(RunError, match=rf"checkpoint-9\.{suffix}: a pickled checkpoint is refused"):
        checkpoint_steps(tmp_path)
    assert not trace.exists()


def test_a_pickle_in_safetensors_clothing_is_refused_and_nothing_in_it_runs(tmp_path):
    trace = tmp_path / "executed"
    buffer = io.BytesIO()
    torch.save({"weight": Bomb(str(trace))}, buffer)
    write_checkpoint(tmp_path, checkpoint(9))
    (tmp_path / "checkpoint-9.safetensors").write_bytes(buffer.getvalue())
    record = {
        "schema_version": 1,
        "step": 9,
        "sha256": hashlib.sha256(buffer.getvalue()).hexdigest(),
        "state": {},
    }
    (tmp_path / "checkpoint-9.json").write_bytes(seal(record))
    with pytest.raises(CheckpointError, match=r"checkpoint-9\.safetensors: .* expected a safetensors file"):
        read_checkpoint(tmp_path, 9)
    assert not trace.exists()
