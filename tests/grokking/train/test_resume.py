"""Rows 1, 4 and 5 of the faults: whatever is damaged, the resumed run ends with the bytes of an uninterrupted one."""

import contextlib
import dataclasses
import functools
import os
import shutil
import warnings

import pytest
import torch
from toy_stack import JOB, ToyStack, contents

from fastent.grokking.train import loop
from fastent.grokking.train.checkpoint import read_checkpoint, write_checkpoint
from fastent.grokking.train.config import preset
from fastent.grokking.train.loop import train
from fastent.grokking.train.runs import Job
from fastent.grokking.train.stack import Stack
from fastent.grokking.train.storage import RunError, RunWarning

REAL = Job(
    "e1",
    "baseline",
    preset(
        "quick", modulus=23, width=32, feedforward=64, heads=2, batch_size=64, probe_size=64, train_fraction=0.8,
        evaluate_every=10, max_steps=180, run_past_steps=10, run_past_share=0.0,
    ),
    (1, 4, 0),
)  # fmt: skip


class Real(Stack):
    """The stack, told when it groks: seed k at 40 + 20 k, so that seeds 0, 1 and 4 end at 60, 80 and 140."""

    def evaluate(self):
        reached = [self.steps_done >= 40 + 20 * seed for seed in self.seeds]
        return super().evaluate() | {"test_accuracy": torch.tensor(reached, dtype=torch.float64)}


class Crash(BaseException):
    """Not an OSError and not an Exception: nothing in the trainer handles it."""


OPERATIONS = ("replace", "fsync", "write", "unlink", "truncate")


def crash_at(monkeypatch, number):
    """Make operation `number` on files raise `Crash` before it is done; count operations in the list returned."""
    count = []

    def wrapped(name, real):
        def call(*arguments, **options):
            count.append(name)
            if len(count) == number:
                if name == "write":  # and a write may be cut short
                    real(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
                raise Crash
            return real(*arguments, **options)

        return call

    for name in OPERATIONS:
        monkeypatch.setattr(os, name, wrapped(name, getattr(os, name)))
    return count


def test_a_crash_before_any_single_operation_on_files_leaves_a_folder_that_resumes_to_the_same_bytes(
    toy, tmp_path, monkeypatch, warned
):
    # Seed 0 ends at 30 and seed 1 at 35.
    job = dataclasses.replace(JOB, config=dataclasses.replace(JOB.config, max_steps=35), seeds=(0, 1))
    train_toy = functools.partial(toy, job=job, checkpoint_every=15)
    with monkeypatch.context() as patch:
        operations = crash_at(patch, -1)
        train_toy(tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    assert set(operations) == set(OPERATIONS) - {"truncate"}
    assert len(operations) > 100
    for number in range(1, len(operations) + 1):
        out = tmp_path / f"crash-{number}"
        with monkeypatch.context() as patch:
            crash_at(patch, number)
            with pytest.raises(Crash):
                train_toy(out)
        # The resume crashes too, at an early operation that differs from case to case.
        with monkeypatch.context() as patch:
            crash_at(patch, 1 + number % 17)
            with contextlib.suppress(Crash):
                train_toy(out)
        train_toy(out)
        assert contents(out) == whole, f"crash at {operations[number - 1]}, operation {number}"
    # A crash tears a log or leaves the first checkpoint to some seeds only; it damages nothing that counts.
    assert not [text for text in warned() if "is torn" not in text and "from step 0" not in text]


def checkpoint(out, seed, step, suffix="safetensors"):
    return out / JOB.run_name(seed) / f"checkpoint-{step}.{suffix}"


def damage_empty(path):
    path.write_bytes(b"")


def damage_truncated(path):
    path.write_bytes(path.read_bytes()[:-3])


def damage_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("suffix", ["safetensors", "json"])
@pytest.mark.parametrize("damage", [damage_empty, damage_truncated, damage_bit, os.unlink])
def test_a_damaged_checkpoint_is_named_and_the_one_before_serves(
    half, toy, uninterrupted, warned, damage, suffix
):
    out = half(27)
    damage(checkpoint(out, 2, 20, suffix))
    toy(out)
    assert contents(out) == uninterrupted
    if (suffix, damage) != ("json", os.unlink):  # then it was never written to the end: nothing to warn of
        (text,) = warned()
        assert text.startswith(f"falls back to the checkpoint before: {checkpoint(out, 2, 20, suffix)}: ")
    for seed, step in ((2, 10), (0, 20), (1, 20)):
        events = (out / JOB.run_name(seed) / "timing.jsonl").read_text()
        assert f'"event": "resume", "step": {step}' in events


def test_with_every_checkpoint_damaged_a_seed_starts_again(half, toy, uninterrupted, warned):
    out = half(27)
    for step in (10, 20):
        damage_bit(checkpoint(out, 2, step))
    toy(out)
    assert contents(out) == uninterrupted
    assert len(warned()) == 4
    assert "seed2: no checkpoint that can serve, so the seed starts again from step 0" in warned()[2]
    assert warned()[3].startswith(f"{JOB.run_name(2)}: no checkpoint, though others of the stack have one")


def test_falling_back_to_before_a_seed_ended_rebuilds_the_stack_with_it_and_leaves_its_folder_alone(
    half, toy, uninterrupted, warned
):
    out = half(32)  # seed 0 ended at 30, where the others were saved
    done = {name: data for name, data in contents(out).items() if "seed0/" in name}
    assert f"{JOB.run_name(0)}/DONE" in done
    damage_bit(checkpoint(out, 1, 30))
    toy(out)
    assert contents(out) == uninterrupted
    assert all(uninterrupted.get(name) == data for name, data in done.items() if "-20." not in name)
    assert len(warned()) == 1


def test_a_torn_last_row_is_written_again_and_no_step_is_there_twice(half, toy, uninterrupted):
    out = half(27)
    path = out / JOB.run_name(1) / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.warns(match=r"seed1/metrics\.jsonl: line 6 is torn"):
        toy(out)
    assert contents(out) == uninterrupted


def test_rows_lost_before_a_checkpoint_make_an_earlier_one_serve(half, toy, uninterrupted, warned):
    out = half(27)
    path = out / JOB.run_name(1) / "metrics.jsonl"
    path.write_bytes(
        b"".join(path.read_bytes().splitlines(keepends=True)[:3])
    )  # steps 0, 5, 10; saved at 10 and 20
    toy(out)
    assert contents(out) == uninterrupted
    assert (
        "seed1/metrics.jsonl: damaged: expected the row of step 15, for checkpoint 20, found none"
        in warned()[0]
    )


def test_a_checkpoint_that_claims_a_step_beyond_counting_is_refused_at_once(half, toy, uninterrupted, warned):
    out = half(27)
    run = out / JOB.run_name(1)
    write_checkpoint(run, dataclasses.replace(read_checkpoint(run, 20), step=10**15))
    toy(out)
    assert contents(out) == uninterrupted
    assert "expected the row of step 30, for checkpoint 1000000000000000, found none" in warned()[0]


def test_a_seed_without_the_newest_checkpoint_goes_on_from_the_one_before(half, toy, uninterrupted, warned):
    out = half(27)
    for suffix in ("json", "safetensors"):
        checkpoint(out, 2, 20, suffix).unlink()
    toy(out)
    assert contents(out) == uninterrupted
    assert warned() == []


class Alone(ToyStack):
    """The toy on a CPU: what a seed computes does not depend on how many there are."""

    shares_launches = staticmethod(lambda device: False)

    def train_step(self):
        self.steps_done += 1
        for seed in self.seeds:
            self.weights[seed] = torch.frac(self.weights[seed] * 3.7 + self.steps_done)


def others(out, lost=2):
    """Files of all seeds but `lost`; locks come and go."""
    found = contents(out).items()
    return {name: data for name, data in found if f"seed{lost}/" not in name and not name.endswith("/lock")}


def lose_folder(run):
    shutil.rmtree(run)


def lose_checkpoints(run):
    for path in run.glob("checkpoint-*"):
        path.unlink()


def lose_records(run):
    for path in run.glob("checkpoint-*.json"):
        path.unlink()


def lose_newest_record(run):
    (run / "checkpoint-20.json").unlink()


def lose_newest_tensors(run):
    (run / "checkpoint-20.safetensors").unlink()


def lose_checkpoints_and_rows(run):
    lose_checkpoints(run)
    (run / "metrics.jsonl").unlink()


def lose_rows_before_the_newest(run):
    path = run / "metrics.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:4]))


LOSSES = [
    lose_folder, lose_checkpoints, lose_records, lose_newest_record, lose_newest_tensors, lose_checkpoints_and_rows,
    lose_rows_before_the_newest,
]  # fmt: skip


@pytest.mark.filterwarnings("ignore::fastent.grokking.train.storage.RunWarning")
@pytest.mark.parametrize("lose", LOSSES)
@pytest.mark.parametrize("stack", [ToyStack, Alone], ids=["shared launches", "seeds in turn"])
def test_what_one_seed_of_a_stack_loses_costs_the_others_no_byte_and_all_end_as_if_nothing_were_lost(
    half, toy, tmp_path, monkeypatch, lose, stack
):
    monkeypatch.setattr(loop, "stack_kind", lambda config: stack)
    toy(tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    out, crashed = tmp_path / "lost", []

    class Watched(stack):
        def train_step(self):
            if self.steps_done == 22 and not crashed:
                crashed.append(True)
                raise Crash
            if crashed and self.steps_done < 20:
                assert others(out) == before
                steps.append((self.steps_done, 2 in self.seeds))
            super().train_step()

    monkeypatch.setattr(loop, "stack_kind", lambda config: Watched)
    with pytest.raises(Crash):
        toy(out)
    lose(out / JOB.run_name(2))
    before, steps = others(out), []
    assert f"{JOB.run_name(1)}/checkpoint-20.safetensors" in before
    toy(out)
    assert contents(out) == whole
    first = 10 if "newest" in lose.__name__ else 0
    assert steps == [(step, True) for step in range(first, 20)]


@pytest.mark.filterwarnings("ignore::fastent.grokking.train.storage.RunWarning")
@pytest.mark.parametrize("lose", [lose_folder, lose_checkpoints, lambda run: (run / "DONE").unlink()])
@pytest.mark.parametrize("stack", [ToyStack, Alone], ids=["shared launches", "seeds in turn"])
def test_a_seed_lost_from_a_complete_stack_is_trained_again_and_the_complete_ones_are_only_read(
    toy, tmp_path, monkeypatch, lose, stack
):
    monkeypatch.setattr(loop, "stack_kind", lambda config: stack)
    toy(tmp_path / "out")
    whole = contents(tmp_path / "out")
    lose(tmp_path / "out" / JOB.run_name(2))
    if lose is lose_checkpoints:
        (tmp_path / "out" / JOB.run_name(2) / "DONE").unlink()
    before = others(tmp_path / "out")
    trained = []

    class Watched(stack):
        def train_step(self):
            assert others(tmp_path / "out") == before
            trained.append(self.seeds)
            super().train_step()

    monkeypatch.setattr(loop, "stack_kind", lambda config: Watched)
    toy(tmp_path / "out")
    assert contents(tmp_path / "out") == whole
    if stack is Alone:
        assert set(trained) <= {(2,)}


def test_a_seed_that_is_trained_again_comes_further_with_every_interruption(half, toy, tmp_path, monkeypatch):
    out = half(52)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RunWarning)
        lose_checkpoints(out / JOB.run_name(2))
        for stop, step in ((12, 10), (25, 20), (33, 30)):
            crashing = crashing_at(stop)
            monkeypatch.setattr(loop, "stack_kind", lambda config, stack=crashing: stack)
            with pytest.raises(Crash):
                toy(out)
            assert (out / JOB.run_name(2) / f"checkpoint-{step}.json").exists()
        monkeypatch.setattr(loop, "stack_kind", lambda config: ToyStack)
        toy(out)
        toy(tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


def crashing_at(step):
    class Crashing(ToyStack):
        def train_step(self):
            if self.steps_done == step:
                raise Crash
            super().train_step()

    return Crashing


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.json"])
def test_a_run_whose_checkpoints_are_whole_and_whose_rows_or_settings_are_lost_is_refused_with_a_remedy(
    half, toy, uninterrupted, name
):
    out = half(27)
    kept = (out / JOB.run_name(2) / name).read_bytes()
    (out / JOB.run_name(2) / name).unlink()
    before = contents(out)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RunWarning)
        with pytest.raises(
            RunError, match=r"put (them|it) back .* move the folder away to train the seed anew"
        ):
            toy(out)
    assert {key: data for key, data in contents(out).items() if not key.endswith("/lock")} == before
    (out / JOB.run_name(2) / name).write_bytes(kept)
    toy(out)
    assert contents(out) == uninterrupted


@pytest.mark.parametrize("lost", ["json", "safetensors"])
def test_a_complete_run_that_lost_a_file_of_its_last_checkpoint_keeps_the_other(toy, tmp_path, lost):
    toy(tmp_path)
    checkpoint(tmp_path, 1, 45, lost).unlink()
    before = contents(tmp_path)
    toy(tmp_path)
    assert contents(tmp_path) == before
    assert f"{JOB.run_name(1)}/DONE" in before


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"steps": null}'])
def test_a_mark_of_completion_that_cannot_be_read_is_named_with_a_remedy(toy, tmp_path, data):
    toy(tmp_path)
    (tmp_path / JOB.run_name(1) / "DONE").write_bytes(data)
    before = contents(tmp_path)
    with pytest.raises(
        RunError,
        match=r"seed1/DONE.* (expected a JSON object|steps must be).* remove it, and the run goes on",
    ):
        toy(tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.filterwarnings("ignore::fastent.grokking.train.storage.RunWarning")
def test_on_a_cpu_a_seed_that_lost_its_folder_is_trained_alone_to_the_bits_it_had(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "stack_kind", lambda config: Real)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    train(REAL, tmp_path / "whole", checkpoint_every=20)
    whole = contents(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "lost")
    lose_folder(tmp_path / "lost" / REAL.run_name(4))
    train(REAL, tmp_path / "lost", checkpoint_every=20)
    assert contents(tmp_path / "lost") == whole
