"""The seam between a sweep and where its jobs are trained, with an executor that trains nothing."""

import contextlib
import itertools
import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from toy_stack import JOB, contents

from fastent.grokking.train import executors
from fastent.grokking.train.config import preset
from fastent.grokking.train.executors import (
    End,
    Inline,
    Order,
    Pool,
    Ray,
    Reach,
    Slurm,
    SlurmAttempt,
    _attempt,
    make_attempt,
)
from fastent.grokking.train.runs import Job
from fastent.grokking.train.storage import Interrupted, Process, RunError, RunLocked, StopRequest, read_object
from fastent.grokking.train.sweep import JobOutcome, run_jobs

CONFIG = preset("paper", modulus=11, hidden=(8, 4), max_steps=400)


def job(seed, condition="baseline", config=CONFIG):
    return Job("e3" if "norm" in condition else "e1", condition, config, (seed,), ("modulus",))


class Planned:
    """Ends each attempt at a seed as planned, after a row at `step` in the folder of the run; the last plan stays."""

    reach = Reach.NETWORK

    def __init__(self, plans=None, size=None):
        self.plans = {seed: list(plan) for seed, plan in (plans or {}).items()}
        self.size, self.threads = size, 3
        self.orders, self.open, self.most, self.stopped, self.closed = [], [], 0, 0, 0

    def submit(self, orders):
        self.orders += orders
        self.open += orders
        self.most = max(self.most, len(self.open))
        self.signs = [(order.out / order.sign).is_file() for order in orders]

    def ended(self, observer, stop):
        for order in self.open[:2]:
            self.open.remove(order)
            (seed,) = order.job.seeds
            plan = self.plans.get(seed, [(None, False, "")])
            folder = order.out / order.job.run_name(seed)
            folder.mkdir(exist_ok=True)
            with open(folder / "metrics.jsonl", "w") as file:
                file.writelines(json.dumps({"step": step}) + "\n" for step in (0, len(self.orders)))
            yield End(order.job, *(plan.pop(0) if len(plan) > 1 else plan[0]))

    def stop(self):
        self.stopped += 1

    def close(self):
        self.closed += 1


class Told:
    def __init__(self):
        self.rows, self.over = [], []

    def row(self, job, seed, row):
        self.rows.append((seed, row["step"]))

    def done(self, job, seed):
        self.over.append(seed)


DIED = ("its process ended with status 1: a", False, "first\nlast\n")


def test_a_job_that_dies_is_tried_again_then_failed_with_its_last_lines_and_the_command(tmp_path, capsys):
    executor = Planned({0: [DIED], 1: [DIED, (None, False, "")], 2: [("no such folder", True, "")]})
    told = Told()
    outcomes = run_jobs(
        [job(seed) for seed in range(4)],
        tmp_path,
        executor=executor,
        observers=[told],
        command="fastent run e1",
    )
    assert outcomes == [
        JobOutcome(job(0), 2, DIED[0]),
        JobOutcome(job(1), 2),
        JobOutcome(job(2), 1, "no such folder"),
        JobOutcome(job(3), 1),
    ]
    assert outcomes[0].lines == ("first", "last")
    failed = {seed: tmp_path / job(seed).run_name(seed) / "FAILED" for seed in range(4)}
    assert [seed for seed, path in failed.items() if path.exists()] == [0]
    assert read_object(failed[0]) == {
        "schema_version": 2,
        "attempts": 2,
        "reason": DIED[0],
        "lines": ["first", "last"],
        "command": "fastent run e1",
    }
    assert capsys.readouterr().err == 3 * "first\nlast\n"
    assert told.over == [3, 1]
    assert sorted(told.rows) == sorted(set(told.rows)), "a row is told once, also after another attempt"
    assert executor.closed == 1


def test_no_more_attempts_are_open_than_the_executor_takes(tmp_path):
    for size, most in ((None, 7), (3, 3)):
        executor = Planned(size=size)
        run_jobs([job(seed) for seed in range(7)], tmp_path, executor=executor)
        assert executor.most == most
        assert len(executor.orders) == 7


def test_a_job_that_follows_others_is_ordered_once_they_are_over(tmp_path):
    executor = Planned()
    jobs = [job(0, "norm-as-baseline"), job(0), job(1)]
    run_jobs(jobs, tmp_path, executor=executor)
    assert [order.job for order in executor.orders] == [job(0), job(1), job(0, "norm-as-baseline")]


def test_an_order_for_other_machines_names_the_folder_from_the_root_and_a_file_to_see_there(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    executor = Planned()
    run_jobs([job(0)], Path("runs"), executor=executor, force=True, device="cuda")
    (order,) = executor.orders
    assert order.out == tmp_path / "runs"
    assert executor.signs == [True]
    assert (order.threads, order.device, order.force) == (3, "cuda", True)
    assert order.patience > 0
    assert Order.of_line(order.line()) == order


def test_a_stop_reaches_the_executor_which_is_closed(tmp_path):
    executor, stop = Planned(), StopRequest()
    stop.signal = signal.SIGTERM
    with pytest.raises(Interrupted, match="SIGTERM: stopped and saved; the same command goes on"):
        run_jobs([job(0)], tmp_path, executor=executor, stop=stop)
    assert (executor.stopped, executor.closed, executor.orders) == (1, 1, [])


def test_a_folder_that_is_not_the_sweeps_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(executors, "SIGN_SECONDS", 0.0)
    order = Order(job(0), tmp_path / "mine", sign="sweep-host-1.json")
    with pytest.raises(
        RunError, match=r"is not the folder that the sweep was given \(it holds no sweep-host"
    ):
        _attempt(order, StopRequest())
    assert not (tmp_path / "mine").exists()


def test_an_attempt_waits_for_the_one_before_it_to_let_go_as_long_as_it_is_told(tmp_path, monkeypatch):
    held = iter([True, True, False])

    def train(*arguments, **options):
        if next(held):
            raise RunLocked("held")

    monkeypatch.setattr(executors, "train", train)
    monkeypatch.setattr(executors, "POLL_SECONDS", 0.01)
    _attempt(Order(job(0), tmp_path, patience=10.0), StopRequest())
    assert list(held) == []
    held = iter([True, False])
    with pytest.raises(RunLocked):
        _attempt(Order(job(0), tmp_path), StopRequest())


def test_inline_trains_to_the_bytes_of_the_trainer_and_tells_as_it_goes(tmp_path, toy, uninterrupted):
    told = Told()
    assert run_jobs([JOB], tmp_path / "out", executor=Inline(), observers=[told]) == [JobOutcome(JOB, 1)]
    assert contents(tmp_path / "out") == uninterrupted
    assert told.over == [0, 1, 2]
    assert {step for _, step in told.rows} == set(range(0, 61, 5))
    with pytest.raises(StopIteration):
        next(Inline().ended(told, None))


def test_a_pool_shares_the_threads_out_unless_told(monkeypatch):
    monkeypatch.setattr(executors.torch, "get_num_threads", lambda: 7)
    assert [Pool(size).threads for size in (1, 2, 3, 9)] == [7, 3, 2, 1]
    assert Pool(4, threads=5).threads == 5


def test_a_ray_that_would_listen_to_other_machines_is_refused(monkeypatch):
    started, ended = [], []
    ray = SimpleNamespace(
        is_initialized=lambda: False,
        init=lambda *address, **how: started.append((address, how, dict(os.environ))),
        nodes=lambda: [{"NodeManagerAddress": address} for address in addresses],
        shutdown=lambda: ended.append(True),
    )
    monkeypatch.setattr(executors, "_imported", lambda package, extra: ray)
    addresses = ["127.0.0.1", "10.0.0.5"]
    with pytest.raises(RunError, match=r"would listen to other machines, at 10\.0\.0\.5, 127\.0\.0\.1"):
        executors._connected(None, 2)
    assert ended == [True]
    ((address, how, environment),) = started
    assert (address, how["include_dashboard"]) == (("local",), False)
    assert environment.items() >= executors.RAY_ALONE.items()
    addresses = ["127.0.0.1"]
    assert executors._connected(None, 2) == (ray, True)


class Training:
    """Stands for the process of an attempt: runs until it is told to save and stop, or to its end after some looks."""

    def __init__(self, order, looks=10**9):
        self.process, self.pid, self.looks, self.told = self, 0, looks, 0
        self.returncode = None

    def poll(self):
        self.looks -= 1
        if self.returncode is None and (self.told or self.looks < 0):
            self.returncode = 143 if self.told else 0
        return self.returncode

    def stop(self):
        self.told += 1

    def end(self):
        assert self.poll() is not None
        return End(job(0), "stopped" if self.returncode else None)


def test_an_attempt_on_another_machine_that_is_interrupted_has_its_process_save(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(executors, "Worker", lambda order: made.append(Training(order)) or made[-1])

    def interrupt(seconds):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(executors.time, "sleep", interrupt)
        with pytest.raises(KeyboardInterrupt):
            make_attempt(Order(job(0), tmp_path).line())
    assert [(each.told, each.returncode) for each in made] == [(1, 143)]
    monkeypatch.setattr(executors, "Worker", lambda order: Training(order, looks=0))
    assert make_attempt(Order(job(0), tmp_path).line()) == End(job(0))


@pytest.fixture
def slurm_attempt(tmp_path, monkeypatch):
    """An attempt of a Slurm job, and a function that has a signal come while it waits."""
    attempt = SlurmAttempt(Order(job(0), tmp_path).line(), tmp_path / "answer.json")
    monkeypatch.setattr(executors, "Worker", Training)
    before = signal.getsignal(signal.SIGTERM)

    def heard(*signals):
        waiting = iter(signals)
        monkeypatch.setattr(executors.time, "sleep", lambda seconds: next(waiting, lambda: None)())

    yield attempt, heard
    signal.signal(signal.SIGTERM, before)


def test_a_slurm_job_that_is_told_to_end_saves_and_waits_for_what_comes(slurm_attempt, tmp_path, monkeypatch):
    attempt, heard = slurm_attempt
    now = itertools.count()
    monkeypatch.setattr(executors.time, "monotonic", lambda: 100.0 * next(now))
    heard(lambda: signal.raise_signal(signal.SIGTERM))
    attempt()
    assert (
        5 < next(now) < 12
    )  # looks at the clock: it waited as long as it may be until it is killed or requeued
    assert json.loads((tmp_path / "answer.json").read_text()) == {
        "error": "stopped",
        "final": False,
        "messages": "",
    }


def test_a_slurm_job_that_ended_well_answers_at_once(slurm_attempt, tmp_path, monkeypatch):
    attempt, _ = slurm_attempt
    monkeypatch.setattr(executors, "Worker", lambda order: Training(order, looks=0))
    attempt()
    assert json.loads((tmp_path / "answer.json").read_text())["error"] is None


def test_a_part_of_a_gpu_is_refused_for_slurm(tmp_path):
    with pytest.raises(ValueError, match=r"Slurm gives whole GPUs: gpus must be 0, 1 or more; got 0\.5"):
        Slurm(tmp_path, gpus=0.5)


def test_the_environment_of_what_is_started_is_put_back(monkeypatch):
    monkeypatch.setenv("FASTENT_A", "before")
    monkeypatch.delenv("FASTENT_B", raising=False)
    with executors._environment({"FASTENT_A": "1", "FASTENT_B": "2"}):
        assert (os.environ["FASTENT_A"], os.environ["FASTENT_B"]) == ("1", "2")
    assert os.environ["FASTENT_A"] == "before"
    assert "FASTENT_B" not in os.environ


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_where_nobody_answers_is_told_at_once(monkeypatch, scheme):
    ray = SimpleNamespace(is_initialized=lambda: False, init=None)
    monkeypatch.setitem(sys.modules, "ray", ray)
    with pytest.raises(RunError, match=f"no Ray cluster answers at {scheme}127.0.0.1:9: .*refused"):
        Ray(address=f"{scheme}127.0.0.1:9")


class RayError(Exception):
    pass


def fake_ray(results):
    """A module like `ray` of which each task gives the next of `results`; what it was asked for is in `calls`."""
    calls = []

    def remote(**resources):
        calls.append(("remote", resources))
        return lambda function: SimpleNamespace(
            remote=lambda line: calls.append(("task", line)) or len(calls)
        )

    def get(reference):
        if isinstance(result := next(results), RayError):
            raise result
        return result

    return SimpleNamespace(
        calls=calls,
        remote=remote,
        get=get,
        wait=lambda references, **_: (references[:1], references[1:]),
        cancel=lambda reference: calls.append(("cancel", reference)),
        shutdown=lambda: calls.append(("shutdown",)),
        exceptions=SimpleNamespace(RayError=RayError),
    )


def test_ray_is_asked_for_processors_and_parts_of_a_gpu_and_what_it_lost_is_not_final(tmp_path, monkeypatch):
    ray = fake_ray(iter([End(job(0)), RayError("no node\nleft")]))
    monkeypatch.setattr(executors, "_connected", lambda address, processors: (ray, True))
    executor = Ray(address="auto", threads=2, gpus=0.25)
    assert ray.calls == [("remote", {"num_cpus": 2, "num_gpus": 0.25, "max_retries": executors.RAY_RETRIES})]
    orders = [Order(job(seed), tmp_path) for seed in range(3)]
    executor.submit(orders)
    assert [call[1] for call in ray.calls[1:]] == [order.line() for order in orders]
    assert list(executor.ended(Told(), None)) == [End(job(0))]
    lost = End(job(1), "its Ray task ended with RayError", final=False, messages="no node\nleft\n")
    assert list(executor.ended(Told(), None)) == [lost]
    executor.stop()
    executor.close()
    assert ray.calls[4:] == [("cancel", 4), ("shutdown",)]


def test_a_stop_elsewhere_waits_until_the_runs_are_let_go(tmp_path, monkeypatch):
    lock = tmp_path / job(0).run_name(0) / "lock"
    lock.parent.mkdir()
    lock.touch()
    looks = []
    monkeypatch.setattr(
        executors.time, "sleep", lambda seconds: looks.append(1) or (len(looks) == 3 and lock.unlink())
    )
    executors._wait_until_saved([Order(job(seed), tmp_path) for seed in range(2)])
    assert len(looks) == 3


def test_a_slurm_job_is_ended_by_its_answer_or_by_the_lack_of_one(tmp_path, monkeypatch):
    submitted = []

    class Executor:
        def __init__(self, folder, max_num_timeout):
            self.folder = folder

        def update_parameters(self, **parameters):
            self.parameters = parameters

        def batch(self):
            return contextlib.nullcontext()

        def submit(self, attempt):
            submitted.append(attempt)
            name = str(len(submitted))
            return SimpleNamespace(job_id=name, stderr=lambda: "killed")

    queue, squeue = tmp_path / "queue", tmp_path / "bin" / "squeue"
    squeue.parent.mkdir()
    squeue.write_text(f'#!/bin/sh\nexec cat "{queue}"\n')
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{squeue.parent}:{os.environ['PATH']}")
    monkeypatch.setitem(sys.modules, "submitit", SimpleNamespace(SlurmExecutor=Executor))
    monkeypatch.setattr(executors, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(executors, "QUEUE_SECONDS", 0.0)
    executor = Slurm(tmp_path, size=5, threads=2, gpus=1, options={"time": 240, "partition": "short"})
    assert executor._executor.parameters == {
        "job_name": "fastent",
        "time": 240,
        "cpus_per_task": 2,
        "gpus_per_node": 1,
        "array_parallelism": 5,
        "additional_parameters": {"requeue": True},
        "partition": "short",
    }
    executor.submit([Order(job(seed), tmp_path) for seed in range(2)])
    assert [Order.of_line(attempt.line).job for attempt in submitted] == [job(0), job(1)]
    queue.write_text("1 COMPLETED\n2 FAILED\n")
    assert not list(executor.ended(Told(), None))  # a file system may show an answer late
    submitted[0].answer.parent.mkdir()
    submitted[0].answer.write_text(json.dumps({"error": None, "final": False, "messages": "done"}))
    assert list(executor.ended(Told(), None)) == [End(job(0), messages="done")]
    monkeypatch.setattr(executors, "LAG_SECONDS", 0.0)
    for state in ("PENDING", "RUNNING", "SUSPENDED", "COMPLETING", "REQUEUED", "STOPPED"):
        queue.write_text(f"2 {state}\n")
        assert not list(executor.ended(Told(), None))
    queue.unlink()  # squeue fails, as where the controller starts anew
    assert not list(executor.ended(Told(), None))
    queue.write_text("1 COMPLETED\n2 FAILED\n")
    died = End(job(1), "its Slurm job 2 was ended (FAILED)", final=False, messages="killed")
    assert list(executor.ended(Told(), None)) == [died]
    executor.submit([Order(job(1), tmp_path)])  # Slurm forgets a job some minutes after its end
    forgotten = End(job(1), "its Slurm job 3 was ended", final=False, messages="killed")
    assert list(executor.ended(Told(), None)) == [forgotten]
    assert not list(submitted[0].answer.parent.iterdir())
    for answer in ("", "[]", '{"error": 1}', '{"error": null, "final": 0, "messages": ""}'):
        executor.submit([Order(job(0), tmp_path)])
        submitted[-1].answer.write_text(answer)
        (end,) = executor.ended(Told(), None)
        assert (end.job, end.final) == (job(0), False)
        assert end.error.startswith(f"the answer of its Slurm job {len(submitted)} is none: ")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"setup": "module load x"}, "one process that srun starts.*setup='module load x'"),
        ({"nodes": 2}, "one process that srun starts.*nodes=2"),
        ({"comment": "a\nrm b"}, r"in one line; got comment='a\\nrm b'"),
        ({"time": "1:00:00"}, r"time must be a whole number from 1 \(minutes\); got '1:00:00'"),
        ({"time": 0}, "time must be a whole number from 1"),
    ],
)
def test_an_option_of_slurm_that_no_job_here_can_have_is_refused(tmp_path, options, said):
    with pytest.raises(ValueError, match=said):
        Slurm(tmp_path, options=options)


class Full(Planned):
    """Takes no more after the first jobs, as a queue that is full."""

    def submit(self, orders):
        if self.orders:
            raise RunError("Slurm did not take the jobs: full")
        super().submit(orders)


def test_a_queue_that_takes_no_more_ends_no_other_job_and_one_that_takes_nothing_ends_the_sweep(tmp_path):
    executor = Full({0: [DIED]})
    outcomes = run_jobs([job(seed) for seed in range(4)], tmp_path, executor=executor)
    assert outcomes == [
        JobOutcome(job(0), 2, "Slurm did not take the jobs: full"),
        *(JobOutcome(job(seed), 1) for seed in range(1, 4)),
    ]
    executor.orders.append(None)
    with pytest.raises(RunError, match="did not take the jobs: full"):
        run_jobs([job(4)], tmp_path, executor=executor)


def test_a_process_that_cannot_be_started_is_an_attempt_that_failed(tmp_path, monkeypatch):
    def full(order):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(executors, "Worker", full)
    monkeypatch.setattr(executors, "POLL_SECONDS", 0.0)
    said = "its process could not be started: [Errno 11] Resource temporarily unavailable"
    outcomes = run_jobs([job(0), job(1)], tmp_path, executor=Pool(2, 1))
    assert outcomes == [JobOutcome(job(0), 2, said), JobOutcome(job(1), 2, said)]


def test_an_end_by_a_signal_without_a_name_is_told_by_its_number():
    assert executors._end(job(0), -signal.SIGRTMIN - 1, "").error == (
        f"its process was ended by signal {signal.SIGRTMIN + 1}"
    )


def test_what_a_killed_sweep_announced_goes_with_the_next_one(tmp_path):
    here = Process.here()
    for name, process in (
        ("killed", replace(here, pid=2**22 + 1)),
        ("elsewhere", replace(here, host="another")),
    ):
        (tmp_path / f"sweep-{name}.json").write_text(json.dumps(process.as_json()))
    (tmp_path / "sweep-mine.json").write_text("[]")
    run_jobs([], tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sweep-elsewhere.json", "sweep-mine.json"]


def test_where_there_is_no_slurm_its_jobs_can_be_started_here(tmp_path, monkeypatch):
    def missing(folder, max_num_timeout):
        raise RuntimeError('Could not detect "srun".')

    monkeypatch.setitem(sys.modules, "submitit", SimpleNamespace(SlurmExecutor=missing))
    with pytest.raises(
        RunError, match=r'detect "srun"\. Give --address local to start such jobs on this machine'
    ):
        Slurm(tmp_path)
