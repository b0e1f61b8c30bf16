"""Sweeps on the engines themselves: a Ray one of whose two nodes dies; submitit, whose jobs are killed and preempted.

Each sweep is of the same 24 short runs, and the folder of runs is all that its processes have in common. Its files must
be those of one process that was left alone, byte for byte. What was measured goes to FASTENT_SWEEPS, a JSON file, where
that is set; times are told and never judged.
"""

import contextlib
import dataclasses
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from toy_stack import contents

from fastent.grokking.train import executors
from fastent.grokking.train.checkpoint import checkpoint_steps
from fastent.grokking.train.config import preset
from fastent.grokking.train.environment import describe_environment
from fastent.grokking.train.executors import RAY_ALONE, Inline, Pool, Ray, Slurm
from fastent.grokking.train.runs import Job
from fastent.grokking.train.storage import Interrupted, StopRequest, write_atomically
from fastent.grokking.train.sweep import run_jobs

pytestmark = [pytest.mark.sweeps, pytest.mark.filterwarnings("default")]


def needs(package):
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed: nox -s sweeps")


STEPS, SAVED = 600, 300
CONFIG = preset(
    "quick", modulus=7, width=8, feedforward=8, heads=2, batch_size=8, probe_size=8,
    evaluate_every=50, max_steps=STEPS,
)  # fmt: skip
JOBS = [Job("e1", "baseline", CONFIG, (seed,)) for seed in range(24)]


@pytest.fixture(scope="module")
def figures():
    """Rows of what was measured, written down once all of them are there."""
    rows = []
    yield rows
    if path := os.environ.get("FASTENT_SWEEPS"):
        data = {"machine": describe_environment(), "processors": os.cpu_count(), "sweeps": rows}
        write_atomically(Path(path), (json.dumps(data, indent=1) + "\n").encode())


@pytest.fixture(scope="module")
def alone(tmp_path_factory, figures):
    """The files of each run, trained in one process, one after the other."""
    out = tmp_path_factory.mktemp("alone")
    return sweep(out, Inline(), "in this process", figures)


class Harm:
    """Does harm once, at the first row of `SAVED` steps of a run whose process `harm` takes."""

    def __init__(self, out, harm):
        self.out, self.harm, self.done_at = out, harm, []

    def row(self, job, seed, row):
        holder = self.out / job.run_name(seed) / "lock"
        if row["step"] == SAVED and holder.exists() and self.harm(json.loads(holder.read_text())["pid"]):
            self.done_at.append(seed)

    def done(self, job, seed):
        pass


def events(folder):
    return [json.loads(line) for line in (folder / "timing.jsonl").read_text().splitlines()]


def evaluations_at_the_end(folder):
    return sum(event["event"] == "evaluation" and event["step"] == STEPS for event in events(folder))


def sweep(out, executor, name, figures, alone=None, harm=lambda pid: False):
    """Run all jobs; return the files. Every run is complete, trained to its end once, and has the bytes of `alone`."""
    harmed = Harm(out, harm)
    start = time.monotonic()
    outcomes = run_jobs(JOBS, out, executor=executor, observers=[harmed])
    seconds = time.monotonic() - start
    assert [outcome.error for outcome in outcomes] == [None] * len(JOBS)
    starts, ends = {}, {}
    for job in JOBS:
        (seed,) = job.seeds
        folder = out / job.run_name(seed)
        assert json.loads((folder / "environment.json").read_text())["threads"] == 1
        starts[seed] = [each["step"] for each in events(folder) if each["event"] in ("start", "resume")]
        ends[seed] = evaluations_at_the_end(folder)
    files = {job: of_run(out, job) for job in JOBS}
    figures.append(
        {
            "executor": name,
            "runs": len(JOBS),
            "complete": sum(any(name.endswith("/DONE") for name in each) for each in files.values()),
            "same_bytes": sum(files[job] == (alone or files)[job] for job in JOBS),
            "trained_twice_to_the_end": sum(count > 1 for count in ends.values()),
            "resumed": sum(len(steps) > 1 for steps in starts.values()),
            "harmed": len(harmed.done_at),
            "seconds": round(seconds, 1),
        }
    )
    assert files == (alone or files)
    assert set(ends.values()) == {1}
    assert all(len(starts[seed]) > 1 and min(starts[seed][1:]) > 0 for seed in harmed.done_at)
    return files


def of_run(out, job):
    (seed,) = job.seeds
    name = job.run_name(seed)
    return {f"{name}/{file}": data for file, data in contents(out / name).items()}


def test_a_pool_one_of_whose_processes_is_killed(tmp_path, alone, figures):
    killed = []

    def kill(pid):
        if killed:
            return False
        os.kill(pid, signal.SIGKILL)
        killed.append(pid)
        return True

    sweep(tmp_path, Pool(2, threads=1), "pool, one process killed", figures, alone, kill)
    assert len(killed) == 1


@pytest.fixture
def cluster(monkeypatch):
    """A Ray of two nodes with a processor each, on loopback, that asks nobody where it is."""
    for name, value in {**RAY_ALONE, "RAY_USAGE_STATS_REPORT_URL": "http://127.0.0.1:9"}.items():
        monkeypatch.setenv(name, value)
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "num_gpus": 1, "object_store_memory": 10**8}
    quick = {
        "health_check_period_ms": 500,
        "health_check_failure_threshold": 4,
        "health_check_initial_delay_ms": 0,
    }
    cluster = Cluster(
        initialize_head=True, head_node_args={**node, "include_dashboard": False, "_system_config": quick}
    )
    try:
        yield cluster, cluster.add_node(**node)
    finally:
        ours = psutil.Process().children(recursive=True)
        cluster.shutdown()
        for process in psutil.wait_procs(ours, timeout=10)[1]:
            process.kill()


@needs("ray")
def test_a_ray_one_of_whose_two_nodes_dies(tmp_path, alone, figures, cluster):
    ray, node = cluster
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    killed = []

    def kill(pid):
        """Kill all of the node at once where it has the run, as a power cut does."""
        there = raylet.children(recursive=True) if raylet.is_running() else []
        if pid not in [process.pid for process in there]:
            return False
        for process in (raylet, *there):
            process.kill()
            killed.append(process.pid)
        return True

    executor = Ray(address=ray.address, threads=1, gpus=0.5)  # a GPU in name, of which each job has its part
    sweep(tmp_path, executor, "Ray, one of two nodes killed", figures, alone, kill)
    assert raylet.pid in killed


@needs("ray")
def test_a_run_on_a_ray_node_that_is_cut_off_is_not_trained_twice_to_the_end(tmp_path, alone, cluster):
    ray, node = cluster
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    left = []

    class CutOff:
        def row(self, job, seed, row):
            lock = tmp_path / job.run_name(seed) / "lock"
            if row["step"] == SAVED and not left and lock.exists():
                pid = json.loads(lock.read_text())["pid"]
                if pid in [process.pid for process in raylet.children(recursive=True)]:
                    left.append((seed, psutil.Process(pid)))
                    raylet.kill()  # its processes find out by themselves, some seconds later

        def done(self, job, seed):
            pass

    jobs = JOBS[:3]
    outcomes = run_jobs(jobs, tmp_path, executor=Ray(address=ray.address, gpus=0.5), observers=[CutOff()])
    assert [outcome.error for outcome in outcomes] == [None] * 3
    ((seed, process),) = left
    assert not process.is_running()
    assert [of_run(tmp_path, job) for job in jobs] == [alone[job] for job in jobs]
    assert evaluations_at_the_end(tmp_path / jobs[seed].run_name(seed)) == 1


TINY = (
    *("--modulus", "7", "--width", "8", "--feedforward", "8", "--heads", "2", "--batch-size", "8"),
    *("--probe-size", "8", "--evaluate-every", "50", "--max-steps", "20000", "--seeds", "0-1"),
)


@needs("ray")
def test_the_command_on_a_ray_of_its_own_listens_on_loopback_alone_and_saves_when_it_is_told_to_stop(
    tmp_path,
):
    out = tmp_path / "runs"
    command = (sys.executable, "-m", "fastent.cli", "run", "e1", "--executor", "ray", "--workers", "2")
    process = subprocess.Popen([*command, "--out", str(out), *TINY], stderr=subprocess.PIPE, text=True)
    started = [psutil.Process(process.pid)]
    try:
        deadline = time.monotonic() + 200
        while len([path for path in out.glob("*/metrics.jsonl") if path.read_bytes().count(b"\n") > 1]) < 2:
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline, "the runs did not begin"
            time.sleep(0.2)
        started += started[0].children(recursive=True)
        places = {
            connection.laddr.ip
            for each in started
            for connection in each.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        }
        assert places
        assert places <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=100)
    finally:
        for each in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
    assert process.returncode == 143
    assert said == "fastent: SIGTERM: stopped and saved; the same command goes on\n"
    assert not list(out.glob("*/lock"))
    for folder in out.glob("e1-*"):
        row = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        assert max(checkpoint_steps(folder)) >= row["step"]
    assert len(list(out.glob("e1-*"))) == 2


@needs("submitit")
def test_submitit_one_of_whose_jobs_is_killed_and_one_preempted(tmp_path, alone, figures):
    told = []

    def harm(pid):
        if len(told) == 2:
            return False
        job = psutil.Process(pid).parent()
        job.send_signal(signal.SIGUSR2 if told else signal.SIGKILL)
        told.append(job.pid)
        return True

    executor = Slurm(tmp_path, local=True, size=2, threads=1)
    sweep(tmp_path, executor, "submitit, one job killed, one preempted", figures, alone, harm)
    assert len(told) == 2


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A Slurm whose commands are those of fake_slurm.py; its folder."""
    commands, folder = tmp_path / "bin", tmp_path / "slurm"
    commands.mkdir()
    folder.mkdir()
    for name in ("sbatch", "srun", "squeue", "scontrol", "scancel"):
        script = commands / name
        script.write_text(f"#!{sys.executable}\n" + Path(__file__).with_name("fake_slurm.py").read_text())
        script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(folder))
    monkeypatch.setattr(executors, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(executors, "QUEUE_SECONDS", 0.0)
    return folder


@needs("submitit")
def test_an_array_of_slurm_jobs_one_of_which_is_preempted_and_one_comes_to_its_time_limit(
    tmp_path, alone, slurm
):
    signals = {0: ["SIGTERM", "USR2"], 1: ["USR2"]}

    class Slurmctld:
        def row(self, job, seed, row):
            if row["step"] == SAVED:
                for each in signals.pop(seed, []):
                    subprocess.run(["scancel", f"0_{seed}", "--signal", each], check=True)

        def done(self, job, seed):
            pass

    out, jobs = tmp_path / "runs", JOBS[:3]
    executor = Slurm(out, options={"partition": "short", "time": 1})
    outcomes = run_jobs(jobs, out, executor=executor, observers=[Slurmctld()])
    assert [(outcome.attempts, outcome.error) for outcome in outcomes] == 3 * [(1, None)]
    assert [of_run(out, job) for job in jobs] == [alone[job] for job in jobs]
    logs = [events(out / job.run_name(seed)) for seed, job in enumerate(jobs)]
    resumed = [sum(event["event"] == "resume" for event in log) for log in logs]
    assert resumed == [1, 1, 0]
    (script,) = slurm.glob("*.script")
    flags = set(re.findall("^#SBATCH (.*)$", script.read_text(), re.MULTILINE))
    assert {"--array=0-2%3", "--requeue", "--cpus-per-task=1", "--partition=short", "--time=1"} <= flags
    assert any(flag.startswith("--signal=USR2@") for flag in flags)


@needs("submitit")
@pytest.mark.parametrize("fault", ["suspended", "down"])
def test_a_slurm_job_that_is_suspended_and_a_slurm_that_does_not_answer_are_waited_for(
    tmp_path, alone, slurm, monkeypatch, fault
):
    monkeypatch.setattr(executors, "LAG_SECONDS", 0.0)
    mark = slurm / {"suspended": "0.suspended", "down": "down"}[fault]
    asked = slurm / "asked"

    def go_on(pid, before):
        deadline = time.monotonic() + 60
        while asked.stat().st_size < before + 3 and time.monotonic() < deadline:
            time.sleep(0.02)
        mark.unlink()
        os.killpg(pid, signal.SIGCONT)

    class Harm:
        resumed = None

        def row(self, job, seed, row):
            if row["step"] == SAVED:
                mark.touch()
                lock = json.loads((tmp_path / "runs" / job.run_name(seed) / "lock").read_text())
                os.killpg(lock["pid"], signal.SIGSTOP)
                self.resumed = threading.Thread(target=go_on, args=(lock["pid"], asked.stat().st_size))
                self.resumed.start()

        def done(self, job, seed):
            pass

    out, harm = tmp_path / "runs", Harm()
    (outcome,) = run_jobs(JOBS[:1], out, executor=Slurm(out), observers=[harm])
    harm.resumed.join()
    assert (outcome.attempts, outcome.error) == (1, None)
    assert of_run(out, JOBS[0]) == alone[JOBS[0]]
    assert len(list(slurm.glob("*.script"))) == 1


@needs("submitit")
def test_a_slurm_job_that_is_killed_is_ordered_again_and_a_stop_saves(tmp_path, slurm, monkeypatch):
    monkeypatch.setattr(executors, "LAG_SECONDS", 0.0)
    stop, out = StopRequest(), tmp_path / "runs"
    longer = dataclasses.replace(JOBS[0], config=dataclasses.replace(CONFIG, max_steps=100 * STEPS))

    class Harm:
        killed = False

        def row(self, job, seed, row):
            if row["step"] == SAVED and not self.killed:
                os.kill(int((slurm / "0.pid").read_text()), signal.SIGKILL)
                self.killed = True
            elif row["step"] > SAVED and len(list(slurm.glob("*.script"))) == 2:
                stop.signal = signal.SIGINT

        def done(self, job, seed):
            pass

    with pytest.raises(Interrupted, match="SIGINT: stopped and saved"):
        run_jobs([longer], out, executor=Slurm(out), observers=[Harm()], stop=stop)
    assert len(list(slurm.glob("*.script"))) == 2
    (folder,) = out.glob("e1-*")
    assert not (folder / "lock").exists()
    last_row = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert max(checkpoint_steps(folder)) >= last_row > SAVED
