"""What a run leaves in its folder, when it ends, and row 10 of the faults."""

import itertools
import json
import math
import signal

import pytest
import torch
from toy_stack import CONFIG, JOB, ToyStack, contents

from fastent import spectral_entropy
from fastent.grokking.train import loop
from fastent.grokking.train.loop import train
from fastent.grokking.train.runs import Job
from fastent.grokking.train.storage import Interrupted, RunError, RunWarning, StopRequest, read_rows


def rows(out, seed, name="metrics.jsonl"):
    return read_rows(out / JOB.run_name(seed) / name, 0)[0]


def test_each_seed_has_a_folder_named_after_experiment_condition_task_and_seed(uninterrupted):
    assert {name.split("/")[0] for name in uninterrupted} == {
        f"e1-baseline-add-seed{seed}" for seed in (0, 1, 2)
    }
    assert [name.split("/")[1] for name in uninterrupted if "seed1/" in name] == [
        "DONE", "checkpoint-45.json", "checkpoint-45.safetensors", "config.json", "environment.json", "metrics.jsonl",
        "timing.jsonl",
    ]  # fmt: skip


def test_rows_hold_what_the_stack_and_the_entropy_say(toy, tmp_path):
    toy(tmp_path)
    stack = ToyStack(CONFIG, JOB.seeds)
    for _ in range(15):
        stack.train_step()
    values = stack.evaluate()
    for i, seed in enumerate(JOB.seeds):
        row = next(row for row in rows(tmp_path, seed) if row["step"] == 15)
        expected = spectral_entropy(stack.representations()[i])
        assert row == {
            "step": 15,
            **{name: values[name][i].item() for name in values},
            "entropy": pytest.approx(expected.normalized, abs=1e-14),
            "entropy_status": "ok",
            "effective_rank": pytest.approx(expected.effective_rank, abs=1e-13),
            "participation_ratio": pytest.approx(expected.participation_ratio, abs=1e-13),
        }
    assert [row["step"] for row in rows(tmp_path, 2)] == list(range(0, 61, 5))


def test_a_run_goes_on_past_sustained_grokking_as_configured_and_says_why_it_ended(toy, tmp_path):
    toy(tmp_path)
    done = {seed: json.loads((tmp_path / JOB.run_name(seed) / "DONE").read_text()) for seed in JOB.seeds}
    # Seed 0 groks at 20 and goes on for half of that; seed 1 at 30; seed 2 would end at exactly the limit.
    assert [(done[k]["t_mem"], done[k]["t_grok"], done[k]["steps"]) for k in (0, 1, 2)] == [
        (10, 20, 30), (10, 30, 45), (10, 40, 60),
    ]  # fmt: skip
    assert [done[k]["reason"] for k in (0, 1, 2)] == ["grokked", "grokked", "max_steps"]
    assert rows(tmp_path, 0)[-1]["step"] == 30


def test_the_last_step_is_evaluated_although_it_is_no_multiple(toy, tmp_path):
    job = Job("e1", "baseline", CONFIG.__class__(**{**JOB.settings(), "max_steps": 8}), (3,))
    toy(tmp_path, job)
    assert [row["step"] for row in rows(tmp_path, 3)] == [0, 5, 8]


def test_nonfinite_values_become_null_and_training_goes_on(toy, tmp_path, monkeypatch):
    class Diverging(ToyStack):
        def evaluate(self):
            return {**super().evaluate(), "train_loss": torch.full((len(self.seeds),), math.inf)}

        def representations(self, which="probe"):
            return super().representations().fill_(math.nan)

    monkeypatch.setattr(loop, "stack_kind", lambda config: Diverging)
    toy(tmp_path)
    last = rows(tmp_path, 1)[-1]
    assert last["step"] == 45
    assert (last["train_loss"], last["entropy"], last["entropy_status"]) == (None, None, "nonfinite")


def test_training_a_complete_job_again_changes_nothing(toy, tmp_path):
    toy(tmp_path)
    before = contents(tmp_path)
    recorder = Recorder()
    toy(tmp_path, observers=[recorder])
    assert contents(tmp_path) == before
    assert (recorder.rows, recorder.ends) == ([], [0, 2, 1])


def test_clocks_are_kept_apart_from_the_metrics(toy, tmp_path):
    toy(tmp_path)
    timing = rows(tmp_path, 1, "timing.jsonl")
    assert [row["event"] for row in timing] == ["start", *["evaluation"] * 10, "end"]
    assert all(a["seconds"] <= b["seconds"] for a, b in itertools.pairwise(timing))
    assert "time" not in rows(tmp_path, 1)[0]


class Recorder:
    def __init__(self):
        self.rows, self.ends = [], []

    def row(self, job, seed, row):
        self.rows.append((seed, row["step"]))

    def done(self, job, seed):
        self.ends.append(seed)


class Broken:
    def row(self, job, seed, row):
        raise ConnectionError("the logging service is down")

    def done(self, job, seed):
        raise ConnectionError("the logging service is down")


def test_a_logger_that_raises_is_warned_of_once_and_the_run_and_the_other_loggers_go_on(
    toy, tmp_path, uninterrupted
):
    recorder = Recorder()
    with pytest.warns(RunWarning, match="Broken failed .*logging service is down") as warned:
        toy(tmp_path / "out", observers=[Broken(), recorder])
    assert len(warned) == 1
    assert recorder.rows[:4] == [(0, 0), (2, 0), (1, 0), (0, 5)]
    assert recorder.ends == [0, 1, 2]
    assert contents(tmp_path / "out") == uninterrupted


def test_a_request_to_stop_saves_the_step_and_the_rest_is_as_if_uninterrupted(toy, tmp_path, uninterrupted):
    stop = StopRequest()

    class Asks(Recorder):
        def row(self, job, seed, row):
            if row["step"] == 35:
                stop.signal = signal.SIGTERM

    with pytest.raises(Interrupted, match="SIGTERM: stopped after step 35, saved") as caught:
        toy(tmp_path / "out", observers=[Asks()], stop=stop)
    assert caught.value.signal == signal.SIGTERM
    assert (tmp_path / "out" / JOB.run_name(1) / "checkpoint-35.json").exists()
    toy(tmp_path / "out")
    assert contents(tmp_path / "out") == uninterrupted


def test_a_condition_that_nobody_knows_is_refused(tmp_path):
    with pytest.raises(RunError, match="no condition is called 'mixxing'"):
        train(Job("e2", "mixxing", CONFIG, (0,)), tmp_path)
