"""Rows 1, 4 and 5 of the faults: whatever is damaged, the resumed run ends with the bytes of an uninterrupted one."""

import contextlib
import dataclasses
import functools
import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from toy_stack import JOB, contents

from fastent.train import loop
from fastent.train.loop import train
from fastent.train.presets import preset
from fastent.train.runs import Job
from fastent.train.stack import Stack

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


def real(out, together, die_at_rename=None):
    """Train the real job with one thread; die like a SIGKILL right before rename number `die_at_rename`."""
    torch.set_num_threads(1)
    loop.Stack = functools.partial(Real, together=together)
    rename, count = os.replace, 0

    def replace(source, target):
        nonlocal count
        count += 1
        if count == die_at_rename:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)

    os.replace = replace
    train(REAL, Path(out), checkpoint_every=20)


def run_real(processes, *arguments, kill_after=None):
    """Run `real` in a process; return its exit code."""
    process = processes.Process(target=real, args=arguments)
    process.start()
    process.join(kill_after)
    if process.exitcode is None:
        process.kill()
        process.join()
    return process.exitcode


@pytest.mark.parametrize("together", [False, True], ids=["seeds in turn", "seeds in one launch"])
def test_a_run_killed_at_random_instants_and_between_writing_and_renaming_ends_as_if_never_killed(
    processes, tmp_path, together
):
    began = time.monotonic()
    assert run_real(processes, tmp_path / "whole", together) == 0
    duration = time.monotonic() - began
    whole = contents(tmp_path / "whole")
    ends = [json.loads(whole[f"{REAL.run_name(seed)}/DONE"])["steps"] for seed in (0, 1, 4)]
    assert ends == [60, 80, 140]
    # Renames 1 to 6 are of configurations and environments; each checkpoint of a seed takes two.
    for number in (2, 8, 9):
        assert run_real(processes, tmp_path / "killed", together, number) == -signal.SIGKILL
    instants = random.Random(time.time_ns())
    for _ in range(4):
        patience = instants.uniform(0.1, 0.9) * duration
        assert run_real(processes, tmp_path / "killed", together, kill_after=patience) in (0, -signal.SIGKILL)
    for number in (5, 6, 7):  # with less left to do than renames, it ends
        assert run_real(processes, tmp_path / "killed", together, number) in (0, -signal.SIGKILL)
    assert run_real(processes, tmp_path / "killed", together) == 0
    assert contents(tmp_path / "killed") == whole


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
    events = (out / JOB.run_name(0) / "timing.jsonl").read_text()
    assert '"event": "resume", "step": 10' in events


def test_with_every_checkpoint_damaged_all_seeds_start_again(half, toy, uninterrupted, warned):
    out = half(27)
    for step in (10, 20):
        damage_bit(checkpoint(out, 2, step))
    toy(out)
    assert contents(out) == uninterrupted
    assert len(warned()) == 3
    assert "no step of which all have a sound checkpoint; they start again from step 0" in warned()[2]


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
    assert "seed1/metrics.jsonl: the row of step 15 is lost" in warned()[0]


def test_a_checkpoint_that_only_some_seeds_have_is_not_used(half, toy, uninterrupted, warned):
    out = half(27)
    for suffix in ("json", "safetensors"):
        checkpoint(out, 2, 20, suffix).unlink()
    toy(out)
    assert contents(out) == uninterrupted
    assert warned() == []
