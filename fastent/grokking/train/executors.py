"""Executors: where the attempts at a sweep's jobs are made, each behind the same four calls.

`fastent.grokking.train.sweep` decides what is tried, in which order and how often; an executor makes attempts and says
how each ended. Nothing is shared with an attempt but the order it is given, one line of JSON, and the folder of runs:
progress is read there, and a run goes on there, whoever trained it before. Except for `Inline`, an attempt is a process
of its own with its number of threads set, so that the same job gives the same bytes wherever it is trained.

========== ====================================== ===================== =============================================
executor   attempts                               installed by          a lost machine
========== ====================================== ===================== =============================================
`Inline`   in this process, one after the other   the core              -
`Pool`     in processes of this machine           the core              -
`Ray`      as tasks of a Ray cluster              extra ``sweep``       Ray begins its attempts anew, elsewhere
`Slurm`    as Slurm jobs, by submitit             extra ``slurm``       Slurm requeues them
========== ====================================== ===================== =============================================

The process of an attempt (`worker`) reads what to train from the first line of its standard input. The rest of it only
has to stay open: when it ends, whoever started it is gone, and the process saves and stops rather than train on unseen.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import reprlib
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, Self

import torch

import fastent
from fastent.grokking.train.loop import Observer, train
from fastent.grokking.train.runs import Job
from fastent.grokking.train.storage import (
    LOCK_NAME,
    Interrupted,
    RunError,
    RunLocked,
    StopRequest,
    dump_json,
    parse_object,
    read_regular,
    write_atomically,
)
from fastent.installation import install_command

REFUSED = 3
"""Exit status for a `RunError`: trying again would end the same way."""

POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Order:
    """What an attempt is to do.

    Attributes
    ----------
    job : Job
        Trained as one stack.
    out : Path
        Folder of the run folders.
    device : str
        Where to train, as torch names it.
    threads : int
        Of the process.
    force : bool
        See `fastent.grokking.train.loop.train`.
    sign : str
        Name of a file that lies in `out`, "" for none: where it cannot be seen, `out` is another machine's folder.
    patience : float
        Seconds to wait for runs that another process holds: on another machine an attempt that was given up may still
        be saving.
    """

    job: Job
    out: Path
    device: str = "cpu"
    threads: int = 1
    force: bool = False
    sign: str = ""
    patience: float = 0.0

    def line(self) -> str:
        """Return the order as one line, for `worker` to read."""
        job = self.job
        named = {"experiment": job.experiment, "condition": job.condition, "settings": job.settings()}
        values = {**vars(self), "job": {**named, "seeds": job.seeds, "changed": job.changed}}
        return json.dumps({**values, "out": str(self.out)}) + "\n"

    @classmethod
    def of_line(cls, line: str) -> Self:
        """Make an order from what `line` gave."""
        values: dict[str, Any] = json.loads(line)
        return cls(**{**values, "job": Job.of_settings(**values["job"]), "out": Path(values["out"])})


@dataclass(frozen=True)
class End:
    """How an attempt ended.

    Attributes
    ----------
    job : Job
    error : str or None
        Why it is not complete; None if it is.
    final : bool
        Whether trying again would end the same way: it was refused.
    messages : str
        What it wrote to standard error.
    """

    job: Job
    error: str | None = None
    final: bool = False
    messages: str = ""


class Reach(StrEnum):
    """How far away attempts are made."""

    HERE = "this process"
    MACHINE = "this machine"
    NETWORK = "other machines"


class Executor(Protocol):
    """Makes attempts.

    Attributes
    ----------
    reach : Reach
        From another process, rows are read in the folder of runs, and a job whose process died is tried again.
    threads : int
        Of each.
    """

    reach: Reach
    threads: int

    @property
    def size(self) -> int | None:
        """Attempts at a time; None for as many as there are, where a queue takes them."""

    def submit(self, orders: Sequence[Order]) -> None:
        """Take `orders`, `size` at a time at most, those before that have not ended included.

        Raises
        ------
        RunError
            If none of `orders` is taken; those before are as they were.
        """

    def ended(self, observer: Observer, stop: StopRequest | None) -> Iterator[End]:
        """Wait a moment, and yield the attempts that have ended since.

        One that trains in this process does so meanwhile, tells `observer` and heeds `stop`, and raises `Interrupted`.
        """

    def stop(self) -> None:
        """Have all attempts save and stop, and wait until they have; none of them is yielded any more."""

    def close(self) -> None:
        """Let go of everything; attempts that have not ended are ended."""


class Inline:
    """Attempts in this process, one after the other, in its own threads."""

    reach, size = Reach.HERE, 1

    def __init__(self) -> None:
        self.threads = torch.get_num_threads()
        self._orders: deque[Order] = deque()

    def submit(self, orders: Sequence[Order]) -> None:
        """See `Executor`."""
        self._orders.extend(orders)

    def ended(self, observer: Observer, stop: StopRequest | None) -> Iterator[End]:
        """See `Executor`."""
        while self._orders:
            order = self._orders.popleft()
            how = {"device": order.device, "force": order.force, "observers": [observer], "stop": stop}
            try:
                train(order.job, order.out, **how)  # type: ignore[arg-type]
            except Interrupted:
                raise
            except RunError as error:
                yield End(order.job, str(error), final=True)
            except Exception as error:  # whatever it is, the other jobs have their turn
                yield End(order.job, repr(error), messages=traceback.format_exc())
            else:
                yield End(order.job)

    def stop(self) -> None:
        """See `Executor`."""
        self._orders.clear()

    close = stop


class Pool:
    """Attempts in processes of this machine.

    Parameters
    ----------
    size : int
        Attempts at a time.
    threads : int, optional
        Of each; this process's shared out among them if not given.
    """

    reach = Reach.MACHINE

    def __init__(self, size: int, threads: int | None = None) -> None:
        self.size = size
        self.threads = threads or max(1, torch.get_num_threads() // size)
        self.working: list[Worker] = []
        self._refused: list[End] = []

    def submit(self, orders: Sequence[Order]) -> None:
        """See `Executor`."""
        for order in orders:
            try:
                self.working.append(Worker(order))
            except OSError as error:  # no process, memory or temporary file is left for now
                self._refused.append(End(order.job, f"its process could not be started: {error}"))

    def ended(self, observer: Observer, stop: StopRequest | None) -> Iterator[End]:
        """See `Executor`."""
        time.sleep(POLL_SECONDS)
        while self._refused:
            yield self._refused.pop()
        for worker in list(self.working):
            if worker.process.poll() is not None:
                self.working.remove(worker)
                yield worker.end()

    def stop(self) -> None:
        """See `Executor`."""
        for worker in self.working:
            worker.stop()
        for worker in self.working:
            sys.stderr.write(worker.end().messages)
        self.working.clear()

    def close(self) -> None:
        """See `Executor`."""
        for worker in self.working:
            worker.process.kill()
            worker.end()
        self.working.clear()


RAY_RETRIES = 5
"""How often Ray begins an attempt anew whose machine was lost; it is no fault of the job, and does not count as one."""

RAY_STORE = 10**8
"""Bytes of the object store of a Ray that is started here, which takes nothing but a line and its answer."""

CONNECT_SECONDS = 5.0
"""How long a machine may take to answer at the address of a cluster."""

# Read at 2.60. Told 127.0.0.1, Ray takes the machine's own address; a switch for Windows and macOS makes loopback its
# address. With usage statistics off it still asks the address of a cloud's metadata where it is
# (findings/ray-asks-for-its-cloud-with-usage-statistics-off.sh): a proxy that nobody serves keeps that here.
RAY_ALONE = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HTTP_PROXY": "http://127.0.0.1:9",
    "http_proxy": "http://127.0.0.1:9",
    "NO_PROXY": "127.0.0.1,localhost",
    "no_proxy": "127.0.0.1,localhost",
}


class Ray:
    """Attempts as tasks of a Ray cluster, each with its processors and its share of a GPU.

    Parameters
    ----------
    address : str, optional
        Of a cluster, as `ray.init` takes it, such as "auto"; a Ray of this machine alone is started if not given. It is
        bound to loopback, without a dashboard, and speaks to nobody.
    size : int, optional
        Attempts at a time, at most; as many as the cluster has room for if not given.
    threads : int
        Of each: so many processors are asked for.
    gpus : float
        GPUs that each is given: 0.25 lets four share one.

    Raises
    ------
    RunError
        If Ray is not installed, there is no cluster at `address`, or Ray would listen to other machines.
    """

    reach = Reach.NETWORK

    def __init__(
        self, *, address: str | None = None, size: int | None = None, threads: int = 1, gpus: float = 0.0
    ) -> None:
        self.size, self.threads = size, threads
        self._orders: dict[Any, Order] = {}
        self._ray, self._started = _connected(address, (size or 1) * threads)
        resources = {"num_cpus": threads, "num_gpus": gpus, "max_retries": RAY_RETRIES}
        self._attempt = self._ray.remote(**resources)(make_attempt)

    def submit(self, orders: Sequence[Order]) -> None:
        """See `Executor`."""
        self._orders |= {self._attempt.remote(order.line()): order for order in orders}

    def ended(self, observer: Observer, stop: StopRequest | None) -> Iterator[End]:
        """See `Executor`."""
        asked = list(self._orders)
        ready, _ = self._ray.wait(asked, num_returns=len(asked), timeout=POLL_SECONDS)
        for reference in ready:
            job = self._orders.pop(reference).job
            try:
                yield self._ray.get(reference)
            except self._ray.exceptions.RayError as error:
                yield End(job, f"its Ray task ended with {type(error).__name__}", messages=f"{error}\n")

    def stop(self) -> None:
        """See `Executor`."""
        for reference in self._orders:
            self._ray.cancel(reference)
        _wait_until_saved(list(self._orders.values()))
        self._orders.clear()

    def close(self) -> None:
        """See `Executor`."""
        if self._started:
            self._ray.shutdown()


def _connected(address: str | None, processors: int) -> tuple[Any, bool]:
    """Return the module `ray`, in a cluster, and whether it was not in one before."""
    with _environment({} if address else RAY_ALONE):
        ray = _imported("ray", "sweep")
        if ray.is_initialized():
            return ray, False
        how = {"log_to_driver": False, "logging_level": "ERROR"}
        if not address:
            how |= {"num_cpus": processors, "include_dashboard": False, "object_store_memory": RAY_STORE}
        handler = signal.getsignal(signal.SIGTERM)
        try:
            host, _, port = (address or "").removeprefix("ray://").rpartition(":")
            if port.isdecimal():  # Ray itself would try for minutes
                socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
            ray.init(address or "local", **how)
        except OSError as error:
            what = f"no Ray cluster answers at {address}" if address else "Ray did not start"
            raise RunError(f"{what}: {error}") from error
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, handler)  # Ray's own would end us with nothing saved
    addresses = {node["NodeManagerAddress"] for node in ray.nodes()}
    if not address and addresses - {"127.0.0.1", "::1"}:
        ray.shutdown()
        raise RunError(
            f"Ray would listen to other machines, at {', '.join(sorted(addresses))}: it was imported before it could "
            "be bound to loopback. Leave that import to fastent, or start a cluster yourself and give its address"
        )
    return ray, True


def make_attempt(line: str) -> End:
    """Make the attempt of an order in a process of its own; where this is interrupted, that process saves first."""
    worker = Worker(Order.of_line(line))
    try:
        while worker.process.poll() is None:
            time.sleep(POLL_SECONDS)
    finally:
        worker.stop()
        end = worker.end()
    return end


TIMEOUTS = 100
"""How often a Slurm job may come to its time limit and be requeued; each time it goes on where it was."""

GRACE_SECONDS = 600.0
"""How long a Slurm job that was told to end, and has saved, waits to be requeued or killed."""

LAG_SECONDS = 15.0
"""How long a file system may take to show the answer of a Slurm job that is over."""

QUEUE_SECONDS = 30.0
"""How often Slurm is asked which jobs it has, at most."""

OVER = (
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"),
    *("REVOKED", "TIMEOUT"),
)
"""States in which Slurm names a job that it does not start again; one that it may start again is pending."""


class SlurmQueue:
    """The jobs of this user that Slurm has: waiting, running, or suspended.

    Not by `submitit.Job.done`: that takes a suspended job for one that is over, and without Slurm's accounting database
    none for over.
    """

    def __init__(self) -> None:
        self._jobs: dict[str, str] | None = None
        self._asked = -math.inf

    def state(self, job_id: str) -> str | None:
        """Return the state of a job as it was when Slurm was asked; None where it did not answer.

        "" of one that it does not know, as all are some minutes after they ended.
        """
        if time.monotonic() - self._asked >= QUEUE_SECONDS:
            command = ("squeue", "--me", "--array", "--noheader", "--states=all", "--format=%i %T")
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
            except (OSError, subprocess.SubprocessError):  # such as a controller that starts anew
                self._jobs = None
            else:
                lines = (line.split() for line in done.stdout.splitlines())
                self._jobs = {line[0]: line[1] for line in lines if len(line) == 2}
            self._asked = time.monotonic()
        return None if self._jobs is None else self._jobs.get(job_id, "")


NO_OPTIONS = (
    *("additional_parameters", "setup", "teardown", "srun_args", "use_srun", "stderr_to_stdout"),
    *("nodes", "ntasks_per_node"),
)
"""What submitit takes that is no word, or starts a job more than once."""

WHOLE = {"time": "minutes", "signal_delay_s": "seconds", "array_parallelism": "jobs at a time"}
"""What submitit reckons with, and takes as it comes."""


class Slurm:
    """Attempts as Slurm jobs, those that begin together as one array, by submitit.

    Its files lie in the folder ``.submitit`` of the runs: the order of each job, pickled, which that job alone reads,
    its log, and its answer, as JSON.

    Parameters
    ----------
    out : Path
        Folder of the run folders, which all machines share.
    local : bool
        Start the jobs on this machine, without Slurm.
    size : int, optional
        Attempts at a time, at most; as many as Slurm gives if not given.
    threads : int
        Of each: so many processors are asked for.
    gpus : int
        GPUs of each.
    options : mapping
        What `submitit.SlurmExecutor` takes beside, as ``partition``, ``account``, ``time`` (minutes), ``mem``.

    Raises
    ------
    RunError
        If submitit or Slurm is not installed.
    ValueError
        If there is no such option, or it is none of a job of one process, or a part of a GPU is asked for.
    """

    reach = Reach.NETWORK

    def __init__(
        self,
        out: Path,
        *,
        local: bool = False,
        size: int | None = None,
        threads: int = 1,
        gpus: float = 0,
        options: Mapping[str, int | str] | None = None,
    ) -> None:
        for name, value in (options or {}).items():
            if name in NO_OPTIONS or not str(value).isprintable():
                raise ValueError(
                    "a Slurm job here is one process that srun starts, and its options are in one line; got "
                    f"{name}={value!r}"
                )
            if name in WHOLE and not (isinstance(value, int) and value >= 1):
                raise ValueError(
                    f"the Slurm option {name} must be a whole number from 1 ({WHOLE[name]}); got {value!r}"
                )
        if gpus != int(gpus):
            raise ValueError(f"Slurm gives whole GPUs: gpus must be 0, 1 or more; got {gpus:g}")
        self.size, self.threads = size, threads
        self._folder = out.resolve() / ".submitit"
        self._local = local
        self._pause = POLL_SECONDS if local else 10 * POLL_SECONDS
        self._jobs: list[_Submitted] = []
        self._queue = SlurmQueue()
        submitit = _imported("submitit", "slurm")
        if local:
            self._executor = submitit.LocalExecutor(self._folder, max_num_timeout=TIMEOUTS)
            chosen: dict[str, Any] = {"timeout_min": 60 * 24 * 365, "gpus_per_node": int(gpus)}
        else:
            try:
                self._executor = submitit.SlurmExecutor(self._folder, max_num_timeout=TIMEOUTS)
            except RuntimeError as error:
                raise RunError(f"{error} Give --address local to start such jobs on this machine") from error
            chosen = {"job_name": "fastent", "time": 60, "cpus_per_task": threads}
            chosen |= {"gpus_per_node": int(gpus)} if gpus else {}
            chosen |= {"array_parallelism": size} if size else {}
            chosen |= {"additional_parameters": {"requeue": True}}
        self._executor.update_parameters(**{**chosen, **(options or {})})

    def submit(self, orders: Sequence[Order]) -> None:
        """See `Executor`."""
        attempts = [SlurmAttempt(order.line(), self._folder / f"{uuid.uuid4().hex}.json") for order in orders]
        try:
            with self._executor.batch():
                jobs = [self._executor.submit(attempt) for attempt in attempts]
        except (RuntimeError, OSError) as error:  # of submitit, for what sbatch said
            raise RunError(f"Slurm did not take the jobs: {error}") from error
        self._jobs += map(_Submitted, jobs, orders, [attempt.answer for attempt in attempts])

    def ended(self, observer: Observer, stop: StopRequest | None) -> Iterator[End]:
        """See `Executor`."""
        time.sleep(self._pause)
        for submitted in list(self._jobs):
            if (end := self._end(submitted)) is not None:
                self._jobs.remove(submitted)
                yield end

    def _end(self, submitted: _Submitted) -> End | None:
        """Read the answer of a job; None where it may still come."""
        job, over = submitted.order.job, self._over(submitted)
        try:
            said = parse_object(read_regular(submitted.answer))
        except OSError:
            if over is None:
                return None
            reason = f"its Slurm job {submitted.job.job_id} was ended" + (f" ({over})" if over else "")
            return End(job, reason, messages=submitted.job.stderr() or "")
        except (RunError, ValueError) as error:
            return End(job, f"the answer of its Slurm job {submitted.job.job_id} is none: {error}")
        with contextlib.suppress(OSError):
            submitted.answer.unlink()
        why, final, messages = (said.get(name) for name in ("error", "final", "messages"))
        if not isinstance(why, str | None) or type(final) is not bool or not isinstance(messages, str):
            return End(
                job, f"the answer of its Slurm job {submitted.job.job_id} is none: {reprlib.repr(said)}"
            )
        return End(job, why, final, messages)

    def _over(self, submitted: _Submitted) -> str | None:
        """State in which a job is over, for long enough that its answer would be there; None if it is not."""
        if self._local:
            return str(submitted.job.state) if submitted.job.done() else None
        state = self._queue.state(submitted.job.job_id)
        if state is None or (state and state not in OVER):
            submitted.over = None
            return None
        if submitted.over is None:
            submitted.over = time.monotonic()
        return state if time.monotonic() - submitted.over >= LAG_SECONDS else None

    def stop(self) -> None:
        """See `Executor`."""
        for submitted in self._jobs:
            submitted.job.cancel(check=False)
        _wait_until_saved([submitted.order for submitted in self._jobs])
        self._jobs.clear()

    close = stop


@dataclass
class _Submitted:
    job: Any
    order: Order
    answer: Path
    over: float | None = None


class SlurmAttempt:
    """What a job of submitit does; sent to it as a pickle."""

    def __init__(self, line: str, answer: Path) -> None:
        self.line, self.answer = line, answer
        self._worker: Worker | None = None
        self._asked = 0.0

    def __call__(self) -> None:
        """Make the attempt in a process of its own, and leave its answer.

        On SIGTERM that process saves and stops; what follows (a requeue, the end) is Slurm's to say.
        """
        worker = self._worker = Worker(Order.of_line(self.line))
        signal.signal(signal.SIGTERM, self._save)
        try:
            while worker.process.poll() is None:
                time.sleep(POLL_SECONDS)
            while worker.process.returncode and time.monotonic() < self._asked:
                time.sleep(POLL_SECONDS)
        finally:
            worker.stop()
            end = worker.end()
        said = {"error": end.error, "final": end.final, "messages": end.messages}
        write_atomically(self.answer, dump_json(said))

    def _save(self, number: int, frame: FrameType | None) -> None:
        assert self._worker is not None
        self._asked = time.monotonic() + GRACE_SECONDS
        self._worker.stop()

    def checkpoint(self) -> Any:
        """Save, and return what submitit is to submit anew: called on SIGUSR2, before preemption or the time limit."""
        if self._worker is not None:
            self._worker.stop()
            # Not by Popen, whose lock the code that this signal interrupted may hold.
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PID, self._worker.process.pid, os.WEXITED | os.WNOWAIT)
        return _imported("submitit", "slurm").helpers.DelayedSubmission(SlurmAttempt(self.line, self.answer))


SAVE_SECONDS = 60.0
"""How long attempts on other machines have to save when they are stopped."""


def _wait_until_saved(orders: Sequence[Order]) -> None:
    """Wait until no attempt holds its runs any more."""
    locks = [order.out / order.job.run_name(seed) / LOCK_NAME for order in orders for seed in order.job.seeds]
    deadline = time.monotonic() + SAVE_SECONDS
    while any(lock.exists() for lock in locks) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)


def _imported(package: str, extra: str) -> Any:
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise RunError(f"this needs {package}, which is not installed: {install_command(extra)}") from error


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables of the environment, for what is started meanwhile."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@dataclass(frozen=True)
class Engine:
    """The executor that somebody chose, and what was said about it; `Executor` once it is started.

    Attributes
    ----------
    name : {"inline", "pool", "ray", "slurm"} or None
        None for `Inline` or `Pool`, by the number of workers.
    address : str or None
        See `Ray`; "local" for `Slurm` without Slurm.
    threads, gpus : number or None
        Of each attempt.
    slurm : tuple of str
        Options of `Slurm`, as "partition=gpu".
    """

    name: str | None = None
    address: str | None = None
    threads: int | None = None
    gpus: float | None = None
    slurm: tuple[str, ...] = ()

    @property
    def elsewhere(self) -> bool:
        """Whether other machines than this one may train."""
        return (self.name == "ray" and self.address is not None) or (
            self.name == "slurm" and self.address != "local"
        )

    def check(self, device: str) -> None:
        """Check that what was said fits together.

        Raises
        ------
        ValueError
            At the first rule that does not hold.
        """
        cluster = self.name in ("ray", "slurm")
        if self.address is not None and not cluster:
            raise ValueError(f"--address is for --executor ray or slurm; got {self.address!r} without either")
        if self.name == "slurm" and self.address not in (None, "local"):
            raise ValueError(
                f"--address must be local for --executor slurm, or left out; got {self.address!r}"
            )
        if self.gpus is not None and not cluster:
            raise ValueError(f"--gpus is for --executor ray or slurm; got {self.gpus:g} without either")
        if self.gpus is not None and not self.gpus >= 0:
            raise ValueError(f"--gpus must be 0 or more; got {self.gpus:g}")
        if self.slurm and self.name != "slurm":
            raise ValueError(f"--slurm is for --executor slurm; got {' '.join(self.slurm)} without it")
        if wrong := [option for option in self.slurm if not option.partition("=")[2]]:
            raise ValueError(f"--slurm takes options as name=value, such as partition=gpu; got {wrong[0]!r}")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"--threads must be at least 1; got {self.threads}")
        here = torch.get_num_threads()
        if self.name == "inline" and self.threads not in (None, here):
            raise ValueError(
                f"--threads must be {here} for --executor inline, as this process has; got {self.threads}: begin the "
                f"command with OMP_NUM_THREADS={self.threads}"
            )
        if cluster and device not in ("cpu", "cuda"):
            raise ValueError(f"--device must be cpu or cuda for --executor {self.name}; got {device!r}")

    def start(self, out: Path, size: int | None, device: str) -> Executor:
        """Start the executor, for `size` attempts at a time at most.

        Raises
        ------
        RunError, ValueError
            As the executors.
        """
        gpus = float(device == "cuda") if self.gpus is None else self.gpus
        if self.name == "ray":
            # A Ray that is started here is of this machine, whose threads are shared out as a pool does.
            threads = self.threads or (1 if self.address or size is None else Pool(size).threads)
            return Ray(address=self.address, size=size, threads=threads, gpus=gpus)
        if self.name == "slurm":
            pairs = (option.partition("=") for option in self.slurm)
            options = {name: int(value) if value.isdecimal() else value for name, _, value in pairs}
            return Slurm(
                *(out,),
                local=self.address == "local",
                size=size,
                threads=self.threads or 1,
                gpus=gpus,
                options=options,
            )
        several = size is None or size > 1 or self.threads not in (None, torch.get_num_threads())
        if self.name == "pool" or (self.name is None and several):
            return Pool(size or 1, self.threads)
        return Inline()


START_WORKER = """
import importlib.util, os, sys
spec = importlib.util.spec_from_file_location(
    "fastent", sys.argv[1], submodule_search_locations=[os.path.dirname(sys.argv[1])]
)
sys.modules["fastent"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["fastent"])
from fastent.grokking.train.executors import worker
sys.exit(worker())
"""
"""A worker runs this process's own fastent, installed or not, and with -P nothing that lies in the current folder: a
file there may have the name of any module."""


class Worker:
    """A process that makes one attempt."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self._messages = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  closed by `end`
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", START_WORKER, fastent.__file__],
            stdin=subprocess.PIPE,
            stderr=self._messages,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(order.threads)},
            # Out of reach of the terminal's Ctrl-C, which the parent passes on once.
            start_new_session=True,
        )
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died already: its status tells
            self.process.stdin.write(order.line())
            self.process.stdin.flush()
        self._asked = False

    def stop(self) -> None:
        """Have it save and stop: told once, since a second signal would end it at once."""
        if not self._asked:
            self._asked = True
            self.process.terminate()

    def end(self) -> End:
        """Wait for its end, and say how it was."""
        status = self.process.wait()
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        self._messages.seek(0)
        messages = self._messages.read()
        self._messages.close()
        return _end(self.order.job, status, messages)


def _end(job: Job, status: int, messages: str) -> End:
    """Say in words how the process of an attempt ended."""
    if status == 0:
        return End(job, messages=messages)
    if status == REFUSED:
        return End(job, messages.strip(), final=True, messages=messages)
    if status < 0:
        # Those of real time have no names.
        name = signal.Signals(-status).name if -status in {*signal.Signals} else f"signal {-status}"
        said = f"its process was ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    else:
        said = f"its process ended with status {status}" + "".join(f": {line}" for line in last(messages, 1))
    return End(job, said, messages=messages)


def last(messages: str, lines: int) -> list[str]:
    """Return the last lines of what a process wrote."""
    return messages.strip().splitlines()[-lines:]


def worker() -> int:
    """Train what standard input orders; return the exit status."""
    with StopRequest() as stop:
        try:
            order = Order.of_line(sys.stdin.readline())
        except ValueError as error:  # such as a task whose package is not installed on this machine
            print(error, file=sys.stderr)
            return REFUSED
        threading.Thread(target=_stop_at_end_of, args=(sys.stdin.fileno(),), daemon=True).start()
        torch.set_num_threads(order.threads)
        try:
            _attempt(order, stop)
        except Interrupted as interruption:
            print(interruption, file=sys.stderr)
            return 128 + interruption.signal
        except RunError as error:
            print(error, file=sys.stderr)
            return REFUSED
    return 0


SIGN_SECONDS = 10.0
"""How long a file system may take to show a file of another machine."""


def _attempt(order: Order, stop: StopRequest) -> None:
    start = time.monotonic()
    while order.sign and not (order.out / order.sign).exists():
        if time.monotonic() - start > SIGN_SECONDS:
            raise RunError(
                f"{order.out} on {os.uname().nodename} is not the folder that the sweep was given (it holds no "
                f"{order.sign}): give an --out that all machines share"
            )
        time.sleep(POLL_SECONDS)
    while True:
        try:
            return train(order.job, order.out, device=order.device, force=order.force, stop=stop)
        except RunLocked:
            if stop.signal is not None or time.monotonic() - start > order.patience:
                raise
            time.sleep(POLL_SECONDS)


def _stop_at_end_of(descriptor: int) -> None:
    # Not through sys.stdin: a thread that waits inside a buffered stream aborts the interpreter's shutdown.
    while os.read(descriptor, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
