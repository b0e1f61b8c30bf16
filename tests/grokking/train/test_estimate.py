"""The time to expect: from recorded clocks, from a trial, and by how runs of the same settings ended."""

import dataclasses
import json

import pytest
import torch

from fastent.cli import main
from fastent.grokking.experiments.jobs import planned
from fastent.grokking.train import estimate
from fastent.grokking.train.config import preset
from fastent.grokking.train.environment import describe_environment
from fastent.grokking.train.estimate import Speed, expect, makespan, trial
from fastent.grokking.train.runs import Job

CONFIG = preset("quick", width=8, heads=2, feedforward=8, batch_size=8, modulus=7, probe_size=8)
JOB = Job("e1", "baseline", CONFIG, (0, 1, 2, 3))


def plant(out, seed, *, job=JOB, seconds=0.125, end=None, checkpoint=0, threads=None):
    """Leave a run behind whose steps took so many seconds each, two seeds a stack."""
    folder = out / job.run_name(seed)
    folder.mkdir(parents=True)
    record = {"schema_version": 1, "experiment": job.experiment, "condition": job.condition}
    record |= {"seed": seed, "stack": [seed]}
    record["config"] = job.settings()
    (folder / "config.json").write_text(json.dumps(record))
    environment = {**describe_environment(), "threads": threads or torch.get_num_threads()}
    (folder / "environment.json").write_text(json.dumps(environment))
    rows = [{"event": "start", "step": 0, "seconds": 0.5}]
    rows += [
        {"event": "evaluation", "step": s, "seconds": 1 + 2 * seconds * s, "seeds": 2}
        for s in range(0, 300, 50)
    ]
    # A resume begins another clock: nothing is told by the time between the two.
    rows += [{"event": "resume", "step": 250, "seconds": 0.1}]
    rows += [{"event": "evaluation", "step": 300, "seconds": 40.0, "seeds": 2}]
    (folder / "timing.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if end is not None:
        (folder / "DONE").write_text(json.dumps({"steps": end, "reason": "grokked"}))
    if checkpoint:
        (folder / f"checkpoint-{checkpoint}.json").write_text("{}")


@pytest.fixture
def no_trial(monkeypatch):
    """Let nothing be timed: every trial says two seconds a step."""
    asked = []

    def told(job, out, device, budget):
        asked.append((job.condition, torch.get_num_threads(), budget))
        return Speed(2.0, 1.0, 4.0, recorded=False)

    monkeypatch.setattr(estimate, "trial", told)
    return asked


def test_recorded_clocks_give_the_time_of_what_is_left(tmp_path, no_trial):
    plant(tmp_path, 0, end=3000)
    plant(tmp_path, 1, end=5000)
    plant(tmp_path, 2, checkpoint=1000)
    found = expect([JOB], tmp_path, workers=1, device="cpu")
    assert (found.complete, found.begun, found.new) == (2, 1, 1)
    assert (found.most, found.likely) == (7000 + 8000, 3000 + 4000)  # the limit is 8,000, the mean end 4,000
    assert found.speeds == (Speed(0.125, 0.125, 0.125, recorded=True),)
    assert found.longest == (15_000 * 0.125,) * 2
    assert found.usual == (7_000 * 0.125,) * 2
    assert no_trial == []


def test_clocks_of_other_sizes_or_of_another_machine_tell_nothing(tmp_path, no_trial):
    plant(tmp_path, 0, threads=torch.get_num_threads() + 1)
    wide = dataclasses.replace(JOB, config=dataclasses.replace(CONFIG, width=16))
    plant(tmp_path / "wide", 0, job=wide)
    slow = dataclasses.replace(JOB, config=dataclasses.replace(CONFIG, learning_rate=1e-4))
    plant(tmp_path / "slow", 0, job=slow, end=7000)
    for out, recorded in ((tmp_path, False), (tmp_path / "wide", False), (tmp_path / "slow", True)):
        found = expect([dataclasses.replace(JOB, seeds=(4,))], out, workers=1, device="cpu")
        assert [speed.recorded for speed in found.speeds] == [recorded]
        assert found.likely is None  # with another learning rate runs end elsewhere
        assert found.longest == ((1000.0, 1000.0) if recorded else (8000.0, 32000.0))


def test_kinds_of_a_step_are_timed_once_each_with_the_threads_of_a_worker(tmp_path, no_trial, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    given = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    jobs = planned("e2", preset("quick"), "quick", (0,))
    found = expect(jobs, tmp_path, workers=3, device="cpu")
    # E1's with its measures; the losses averaged, and the logits.
    assert [condition for condition, _, _ in no_trial] == ["baseline", "losses-0.4", "logits-0.2"]
    assert given == [2, 6]
    # Seven jobs of 8,000 steps, three at a time, a second a step at the fastest.
    assert len(jobs) == 7
    assert found.longest[0] == makespan([8000.0] * 7, 3) == 24_000


def test_a_trial_times_steps_and_writes_nothing(tmp_path):
    for condition in ("baseline", "losses-0.1", "norm-as-baseline"):
        speed = trial(dataclasses.replace(JOB, condition=condition), tmp_path / "out", "cpu", 0.0)
        assert 0 < speed.low <= speed.seconds <= speed.high < 10
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_says_what_would_be_trained_and_trains_nothing(tmp_path, no_trial, capsys):
    pytest.importorskip("tyro")
    out = tmp_path / "runs"
    tiny = ["--modulus", "7", "--width", "8", "--batch-size", "8", "--probe-size", "8"]

    def lines(seeds):
        arguments = ["run", "e1", "--seeds", seeds, *tiny, "--workers", "1", "--out", str(out), "--dry-run"]
        assert main(arguments) == 0
        return capsys.readouterr().out.splitlines()

    assert lines("0-3") == [
        "4 runs in 1 stack: 4 new",
        f"steps: at most 32,000; fewer where runs grok, and {out} has no complete run of each setting to tell how many",
        "speed: 1,000.0 to 4,000.0 ms a step and seed (1 kind of job timed just now, alone on the machine)",
        "time: 8.9 to 35.6 h if every run goes to its limit",
        "not counted: other programs, workers in each other's way, and what conditions cost that follow other runs",
    ]
    assert not out.exists()
    (job,) = planned("e1", preset("quick", modulus=7, width=8, batch_size=8, probe_size=8), "quick", (0,))
    plant(out, 0, job=job, end=3000)
    first, second, third, fourth, _ = lines("0-1")
    assert first == "2 runs in 2 stacks: 1 complete, 1 new"
    assert second.startswith("steps: at most 8,000; about 3,000 if runs end when the complete ones")
    assert third.startswith("speed: 125.0 to 125.0 ms a step and seed (1 kind of job recorded in")
    assert fourth == "time: 17 min if every run goes to its limit, 6 min by the complete runs"
    assert lines("0") == ["1 run in 1 stack: 1 complete", "nothing is left to train"]


def test_a_dry_run_of_several_settings_tells_the_time_of_each(tmp_path, no_trial, capsys):
    pytest.importorskip("tyro")
    job = Job("e1", "baseline", preset("quick"), (0,))
    plant(tmp_path, 0, job=job, end=3000)
    arguments = ["run", "e1", "--seeds", "0", "--max-steps", "8000,16000", "--workers", "2"]
    assert main([*arguments, "--out", str(tmp_path), "--dry-run"]) == 0
    first, *_, title, short, long = capsys.readouterr().out.splitlines()
    assert first == "2 runs in 2 stacks, 2 at a time: 1 complete, 1 new"
    assert (title, short) == ("each setting alone:", "  --max-steps 8000: 1 run, nothing left to train")
    assert long == "  --max-steps 16000: 1 run, 4.4 to 17.8 h if every run goes to its limit"
