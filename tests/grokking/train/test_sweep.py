"""Row 9 of the faults: a sweep's worker is killed."""

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from toy_stack import CONFIG, ToyStack

import fastent
from fastent.grokking.train import executors, loop, sweep
from fastent.grokking.train.config import preset
from fastent.grokking.train.executors import Pool
from fastent.grokking.train.runs import Job
from fastent.grokking.train.storage import Interrupted, RunError, StopRequest, read_object
from fastent.grokking.train.sweep import JobOutcome, run_jobs

TINY = preset(
    "quick", modulus=7, width=8, feedforward=8, heads=2, batch_size=8, probe_size=8, evaluate_every=100, max_steps=3000
)  # fmt: skip


def job(seed, config=TINY):
    return Job("e1", "baseline", config, (seed,))


class Killer:
    """Kills the worker of some seeds at its first row, so many times, and keeps what it is told."""

    def __init__(self, out, times):
        self.out, self.times, self.pids, self.steps, self.ended = out, dict(times), [], {}, []

    def row(self, job, seed, row):
        self.steps.setdefault(seed, []).append(row["step"])
        lock = self.out / job.run_name(seed) / "lock"
        if self.times.get(seed, 0) and lock.exists():
            pid = json.loads(lock.read_text())["pid"]
            if pid not in self.pids:
                self.times[seed] -= 1
                self.pids.append(pid)
                os.kill(pid, signal.SIGKILL)

    def done(self, job, seed):
        self.ended.append(seed)


def test_a_killed_worker_is_retried_then_marked_failed_and_the_others_finish(tmp_path, capfd, figure):
    short = dataclasses.replace(TINY, max_steps=60)
    refused = job(3, short)
    run_jobs([refused], tmp_path)
    refused = job(3, dataclasses.replace(short, learning_rate=0.5))
    jobs = [job(0), job(1, dataclasses.replace(TINY, max_steps=2000)), job(2, short), refused]
    # Retried from its checkpoint, a job has fewer rows left to be killed at than it had before.
    killer = Killer(tmp_path, {0: 2, 1: 1})
    outcomes = run_jobs(jobs, tmp_path, workers=2, observers=[killer])
    killed = "its process was ended by SIGKILL (out of memory?)"
    assert outcomes[:3] == [JobOutcome(jobs[0], 2, killed), JobOutcome(jobs[1], 2), JobOutcome(jobs[2], 1)]
    assert outcomes[3].attempts == 1
    assert "config.learning_rate: 0.002 in the folder, 0.5 now" in outcomes[3].error
    assert len(killer.pids) == 3
    assert read_object(tmp_path / jobs[0].run_name(0) / "FAILED") == {
        "schema_version": 2,
        "attempts": 2,
        "reason": killed,
        "lines": [],
        "command": "",
    }
    for complete in jobs[1:3]:
        (seed,) = complete.seeds
        assert (tmp_path / complete.run_name(seed) / "DONE").exists()
        steps = killer.steps[seed]
        assert steps == sorted(set(steps)), "a row is told once, also after a retry"
        assert seed in killer.ended
    assert 0 not in killer.ended
    figure(9, "SIGKILL of a pool's worker: tried again, then marked failed; the others finish", 3, 3)


def test_a_stop_reaches_the_workers_which_save(tmp_path):
    stop = StopRequest()

    class Stopper(Killer):
        def row(self, job, seed, row):
            stop.signal = signal.SIGINT

    with pytest.raises(Interrupted, match="SIGINT: stopped and saved"):
        run_jobs([job(0)], tmp_path, workers=2, observers=[Stopper(tmp_path, {})], stop=stop)
    assert not (tmp_path / job(0).run_name(0) / "lock").exists()
    assert list((tmp_path / job(0).run_name(0)).glob("checkpoint-*.json"))


def test_a_worker_whose_parent_is_gone_saves_and_stops(tmp_path, monkeypatch):
    closed = []

    def row(job, seed, row):
        closed.append(1)
        for worker in pool.working:
            worker.process.stdin.close()

    observer = type("Orphaner", (), {"row": staticmethod(row), "done": staticmethod(lambda *_: None)})()
    monkeypatch.setattr(sweep, "ATTEMPTS", 1)
    pool = Pool(2)
    (outcome,) = run_jobs([job(0)], tmp_path, observers=[observer], executor=pool)
    assert closed
    assert outcome.error.startswith("its process ended with status 143: SIGTERM: stopped after step")
    assert list((tmp_path / job(0).run_name(0)).glob("checkpoint-*.json"))


def test_in_this_process_too_a_failed_job_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    class Exploding(ToyStack):
        def train_step(self):
            if 1 in self.seeds and self.steps_done == 7:
                raise MemoryError("no more")
            return super().train_step()

    monkeypatch.setattr(loop, "stack_kind", lambda config: Exploding)
    jobs = [job(0, CONFIG), job(1, CONFIG), job(2, CONFIG)]
    outcomes = run_jobs(jobs, tmp_path)
    assert [outcome.error for outcome in outcomes] == [None, "MemoryError('no more')", None]
    assert "Traceback" in capsys.readouterr().err
    assert json.loads((tmp_path / jobs[1].run_name(1) / "FAILED").read_text())["attempts"] == 1
    monkeypatch.setattr(loop, "stack_kind", lambda config: ToyStack)
    assert run_jobs(jobs, tmp_path)[1].error is None
    assert not (tmp_path / jobs[1].run_name(1) / "FAILED").exists()


def test_fewer_than_one_worker_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="workers must be at least 1; got 0"):
        run_jobs([], tmp_path, workers=0)


def test_an_error_of_a_refused_job_is_told_as_it_is(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise RunError("the reason")

    monkeypatch.setattr(executors, "train", refuse)
    assert run_jobs([job(0)], tmp_path) == [JobOutcome(job(0), 1, "the reason")]
    assert not (tmp_path / job(0).run_name(0) / "FAILED").exists()


def test_a_worker_imports_nothing_from_the_current_folder(tmp_path, monkeypatch, capfd):
    for name in ("random", "fastent"):
        (tmp_path / f"{name}.py").write_text("import os\nos._exit(9)\n")
    monkeypatch.chdir(tmp_path)
    one = job(0, dataclasses.replace(TINY, max_steps=20))
    assert run_jobs([one], tmp_path / "runs", workers=2) == [JobOutcome(one, 1)]


def test_a_worker_runs_the_fastent_of_its_parent_where_another_is_installed_or_none(tmp_path, monkeypatch):
    # A copy beside: the worker is told of it, whatever its own search would find.
    shutil.copytree(Path(fastent.__file__).parent, tmp_path / "clone" / "fastent")
    with open(tmp_path / "clone" / "fastent" / "grokking" / "train" / "executors.py", "a") as file:
        file.write("\n\ndef worker():\n    print(__file__, file=sys.stderr)\n    return REFUSED\n")
    monkeypatch.setattr(fastent, "__file__", str(tmp_path / "clone" / "fastent" / "__init__.py"))
    (outcome,) = run_jobs([job(0)], tmp_path / "runs", workers=2)
    assert outcome.error == str(tmp_path / "clone" / "fastent" / "grokking" / "train" / "executors.py")
