"""Run folders: one per seed, with everything needed to continue it, judge it and repeat it.

::

    <out>/sweep-<host>-<pid>.json   the runs that a process is to train one after the other, while it does
    <out>/<experiment>-<condition>-<task>[-<changes>]-seed<k>/
        config.json         schema, experiment, condition, seed, seeds trained as one stack, every setting, and
                            what came from other packages (guests)
        environment.json    machine and software of the first start
        metrics.jsonl       one row an evaluation; a function of the configuration alone, so equal after a resume
        timing.jsonl        clocks, starts, resumes and the end, and what H cost the stack at each evaluation; all
                            that differs from one execution to the next
        checkpoint-<step>.safetensors, .json
        DONE                why and when the run ended, as JSON; it is complete
        FAILED              why a sweep gave the run up, as JSON; removed when it goes on
        lock                pid, host, boot and start, while a process holds the run

Seeds that started together are resumed together, because a batched matrix product may round differently with the
number of matrices. What a run has is its own all the same: a seed that lost its folder or its checkpoints is trained
again, and the files of the others stay as they are.

A name carries the settings that were changed from the preset's, as in ``e1-baseline-add-learning_rate=0.0005-seed0``,
so runs of several settings lie side by side. Folders from before names did keep theirs, and go on under them.

Each JSON file and each row has its checksum (`fastent.grokking.train.storage`). DONE holds length and SHA-256 of the
metrics and the last checkpoint, and the SHA-256 of the settings; the last row of the timing that of the environment,
since these two differ between executions and DONE must not. `damages` finds what of a complete run is not as DONE
closed it.

A run is told by what makes it: experiment, condition, settings and seed (`identity`), not by where it lies, because it
is a function of them. Two folders of one identity are one run and its copy.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import heapq
import json
import reprlib
import warnings
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from types import TracebackType
from typing import Any, Self, get_args, get_origin, get_type_hints

from fastent.grokking.train.checkpoint import (
    Checkpoint,
    checkpoint_steps,
    keep_last_sound,
    keep_newest,
    read_checkpoint,
    remove_checkpoints,
    write_checkpoint,
)
from fastent.grokking.train.config import TrainConfig, completed
from fastent.grokking.train.environment import changes_of_bits
from fastent.grokking.train.milestones import Reached
from fastent.grokking.train.registry import BUILT_IN, Kind, Origin, names_in, origin
from fastent.grokking.train.storage import (
    MEND,
    CheckpointError,
    Damaged,
    JsonLines,
    Log,
    Process,
    RowsLost,
    RunError,
    RunLock,
    RunWarning,
    dump_json,
    has_row,
    make_folder,
    open_regular,
    parse_object,
    printable,
    read_object,
    read_regular,
    remove_temporaries,
    seal,
    unseal,
    write_atomically,
)

SCHEMA_VERSION = 2
"""Of config.json, environment.json, DONE and FAILED: 1 had no checksums."""

OWN = "own"
"""Experiment of runs that belong to none: one's own."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """Runs that share everything but the seed: what an experiment asks the trainer for.

    Attributes
    ----------
    experiment : str
        "e1" to "e8", or `OWN`.
    condition : str
        What sets the job apart within its experiment, "baseline" where nothing does.
    config : TrainConfig
        Every setting.
    seeds : tuple of int
        Trained as one stack.
    changed : tuple of str
        Fields of `config` that the names of the folders carry with their values: those that somebody asked for.
    """

    experiment: str
    condition: str
    config: TrainConfig
    seeds: tuple[int, ...]
    changed: tuple[str, ...] = ()

    def run_name(self, seed: int) -> str:
        """Name of the folder of one seed."""
        parts = (self.experiment, self.condition, self.config.task, _changes(self.config, self.changed))
        return "-".join((*filter(None, parts), f"seed{seed}"))

    def settings(self) -> dict[str, Any]:
        """Return the configuration as JSON gives it back."""
        values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self.config)))
        return values

    def guests(self) -> list[dict[str, str]]:
        """Say where its task, model, measures and parts of its condition came from that are not of this package."""
        named: list[tuple[Kind, str]] = [("task", self.config.task), ("model", self.config.model)]
        named += [("condition", name) for name in names_in(self.condition)]
        named += [("measure", measure) for measure in self.config.measures]
        found = []
        for kind, name in named:
            if name not in BUILT_IN[kind]:
                with contextlib.suppress(ValueError):  # a name that is not there is refused where it is used
                    found.append(dataclasses.asdict(origin(kind, name)))
        return found

    @classmethod
    def of_settings(
        cls,
        experiment: str,
        condition: str,
        settings: dict[str, Any],
        seeds: Sequence[int],
        changed: Sequence[str] = (),
    ) -> Self:
        """Make a job from what `settings` gave.

        Raises
        ------
        TypeError, ValueError
            If `settings` has fields or values that `TrainConfig` does not take.
        """
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
        return cls(experiment, condition, TrainConfig(**values), tuple(seeds), tuple(changed))


LONGEST = 120
"""Letters of the changes in a name: file systems take 255 bytes with all the rest."""


def _changes(config: TrainConfig, fields: Sequence[str]) -> str:
    """Write fields of `config` with their values for a name; what is too long is cut, and told apart by its hash."""
    words = [f"{field}={_value(getattr(config, field))}" for field in fields]
    whole = ",".join(words)
    while len(",".join(words)) > LONGEST:
        words.pop()
    if cut := len(fields) - len(words):
        words.append(f"{cut}-more={hashlib.sha256(whole.encode()).hexdigest()[:8]}")
    return ",".join(words)


def _value(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, tuple) else str(value)


def named_as_before(jobs: Sequence[Job], out: Path) -> list[Job]:
    """Return `jobs` under the names without changes, where that is how they were begun in `out`."""
    plain = [dataclasses.replace(job, changed=()) for job in jobs]
    there = [same for job in plain for seed in job.seeds if (same := _begun(job, out / job.run_name(seed)))]
    return plain if there and all(same == "same" for same in there) else list(jobs)


def _begun(job: Job, path: Path) -> str:
    """Whether a folder holds a run of the "same" settings as `job` or of "others"; "" where it holds none."""
    try:
        recorded = read_settings(path) if what_counts(path) else None
    except (OSError, RunError):
        return "others"  # what it is cannot be read, and is said where it is asked for
    if recorded is None:
        return ""
    return "same" if {**recorded, "measures": []} == {**job.settings(), "measures": []} else "others"


def plan_stacks(job: Job, out: Path, workers: int = 1) -> list[Job]:
    """Split the seeds of `job` into the stacks to train.

    Seeds with a folder stay in the stack that it records, together with the rest of that stack, unless one of these
    was trained anew in another; new seeds are shared out over `workers` stacks. A folder without a row and without a
    checkpoint counts as new.

    Raises
    ------
    RunError
        If a folder's config.json cannot be read, or its stack is another run's.
    ValueError
        If `workers` is below 1.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1; got {workers}")

    def recorded(seed: int) -> tuple[int, ...] | None:
        path = out / job.run_name(seed)
        record = read_record(path) if what_counts(path) else None
        if record is not None and seed not in record["stack"]:
            found = _short(record["stack"])
            raise RunError(
                f"{path / 'config.json'}: stack must hold its own seed {seed}; got {found}: {MEND}"
            )
        return None if record is None else tuple(record["stack"])

    stacks: list[tuple[int, ...]] = []
    started: set[int] = set()
    for stack in dict.fromkeys(stack for seed in job.seeds if (stack := recorded(seed)) is not None):
        members = tuple(seed for seed in stack if seed not in started and recorded(seed) in (None, stack))
        stacks.append(members)
        started.update(members)
    new = [seed for seed in job.seeds if seed not in started]
    share = -(-len(new) // workers)
    parts = [tuple(new[i : i + share]) for i in range(0, len(new), share)] if new else []
    extra = sorted(
        seed for seed in started.difference(job.seeds) if not (out / job.run_name(seed) / "DONE").exists()
    )
    if extra:
        warnings.warn(
            f"seeds {', '.join(map(str, extra))} of {job.experiment}-{job.condition} started in one stack with "
            "seeds asked for, so they go on as well",
            RunWarning,
            stacklevel=2,
        )
    return [dataclasses.replace(job, seeds=stack) for stack in (*stacks, *parts)]


class Run:
    """The folder of one seed, locked while open (``with``).

    Parameters
    ----------
    out : Path
        Folder of all runs; made if it is not there.
    job : Job
        Its seeds are the stack.
    seed : int
        One of them.
    environment : dict
        `describe_environment` of this process.
    force : bool
        Go on although the folder was written with another configuration or by a newer fastent; each thing
        ignored is said in a `RunWarning`.

    Raises
    ------
    RunLocked
        On ``with``, if another process holds the folder.
    RunError
        On ``with``, if the folder was written with another configuration or a newer schema, and not `force`.
    Damaged
        On ``with``, if a file of its settings is damaged, or any of a complete run but its checkpoint.
    OSError
        If the folder cannot be written.
    """

    def __init__(
        self, out: Path, job: Job, seed: int, environment: dict[str, Any], *, force: bool = False
    ) -> None:
        self.job = job
        self.seed = seed
        self.name = job.run_name(seed)
        self.path = out / self.name
        self.done: dict[str, Any] | None = None
        self._environment = environment
        self._force = force
        self._lock = RunLock(self.path)

    def __enter__(self) -> Self:
        self._made = not self.path.exists()
        make_folder(self.path)
        try:
            self._lock.acquire()
            self._open()
        except BaseException:
            self._release()
            raise
        return self

    def _release(self) -> None:
        """Give the lock back, and remove a folder that was made and got nothing, as where another run is refused."""
        self._lock.release()
        if self._made:
            with contextlib.suppress(OSError):  # there is something in it
                self.path.rmdir()

    def _open(self) -> None:
        self._ignored, self._config = self._check_config()
        for damaged in damages(self.path):
            raise damaged
        self.done = read_done(self.path)
        self._began: dict[str, Any] | None = None
        if self.done is None and what_counts(self.path):
            self._began = read_object(self.path / "environment.json", REMEDY_OF_ENVIRONMENT)
        self.metrics, self.timing = (
            JsonLines(
                path := self.path / f"{name}.jsonl",
                self._lock.check,
                sums=True,
                each=partial(check_row, path),
            )
            for name in ("metrics", "timing")
        )
        if self.done is None:
            # Now, as another run of the stack may write before this one does. Of a complete one nothing is written.
            self.metrics.check_place()
            self.timing.check_place()
            if (failed := self.path / "FAILED").is_dir() and not failed.is_symlink():
                raise RunError(f"{failed} is a folder: move it away")
        self.reached = Reached(self.job.config)

    def begin(self) -> None:
        """Put the configuration and the environment down; until then nothing but the lock was written.

        Warns
        -----
        RunWarning
            Of what is ignored by `force`, and of another environment than the run began in.
        """
        self._lock.check()
        remove_temporaries(self.path)
        if self._ignored:
            warnings.warn(
                f"{self.path}: --force ignores that the folder has\n  " + "\n  ".join(self._ignored),
                RunWarning,
                stacklevel=2,
            )
        if self._config is not None:
            write_atomically(self.path / "config.json", seal(self._config))
        if self.done is None:
            (self.path / "FAILED").unlink(missing_ok=True)
        self._check_environment()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.metrics.close()
        self.timing.close()
        self._release()

    def _check_config(self) -> tuple[list[str], dict[str, Any] | None]:
        """Return what is ignored by `force`, and the content of config.json if it is to be written."""
        now = {
            "schema_version": SCHEMA_VERSION,
            "experiment": self.job.experiment,
            "condition": self.job.condition,
            "seed": self.seed,
            "stack": list(self.job.seeds),
            "config": self.job.settings(),
        }
        guests = self.job.guests()
        if guests:
            now["guests"] = guests
        path = self.path / "config.json"
        kept = what_counts(self.path)
        recorded = read_record(self.path) if kept else None
        if recorded is None and kept and not self._force:
            raise RunError(
                f"{path} is missing beside {kept}: {MEND}; --force goes on with the settings given now"
            )
        if recorded is not None:
            if self.seed in recorded["stack"]:
                # Which seeds began together does not change what any of them is.
                now["stack"] = recorded["stack"]
            changes = _differences(recorded, now) + _rewritten(recorded.get("guests", []), guests)
            if not changes and recorded.get("guests", []) != guests:
                told = (
                    ", ".join(in_words(each) for each in some)
                    for some in (recorded.get("guests", []), guests)
                )
                warnings.warn(
                    f"{self.path}: it began with {'; it goes on with '.join(told)}, which may do something else",
                    RunWarning,
                    stacklevel=2,
                )
            if changes and not self._force:
                raise RunError(
                    f"{path} was written with another configuration:\n  " + "\n  ".join(changes) + "\n"
                    "Give another --out or the settings of the folder; --force goes on with those given now"
                )
            if (self.path / "DONE").exists():
                return [], None
            if not changes:
                # An older fastent, which knows no checksums, must not go on after rows that have them.
                older = recorded["schema_version"] < SCHEMA_VERSION
                return [], {**recorded, "schema_version": SCHEMA_VERSION} if older else None
            at = max(checkpoint_steps(self.path), default=0)
            now["forced"] = [*recorded.get("forced", []), {"checkpoint": at, "changes": changes}]
            return changes, now
        return [], now

    def _check_environment(self) -> None:
        if self.done is not None:
            return
        if self._began is None:
            record = seal({"schema_version": SCHEMA_VERSION, **self._environment})
            write_atomically(self.path / "environment.json", record)
        elif changes := changes_of_bits(self._began, self._environment):
            warnings.warn(
                f"{self.path}: it began with {'; '.join(changes)}: the last bits of its numbers may differ from "
                "an uninterrupted run's",
                RunWarning,
                stacklevel=2,
            )

    def evaluation_due(self, step: int) -> bool:
        """Whether a row belongs to `step`: every `evaluate_every` steps, and at the last."""
        config = self.job.config
        return step % config.evaluate_every == 0 or step == config.max_steps

    @property
    def last_row_step(self) -> int:
        """Step of the newest row; -1 if there is none."""
        return self.metrics.log.steps[-1] if self.metrics.log.count else -1

    def trains_after(self, step: int) -> bool:
        """Whether the run has steps to make after `step`, as far as is known."""
        return self.done is None or int(self.done["steps"]) > step

    def newest(self) -> Checkpoint | None:
        """Read its newest checkpoint that can serve: it and all rows up to it are whole. None if there is none.

        Raises
        ------
        RunError
            If a checkpoint is whole and the rows before it are lost, with no older one to fall back to: they are
            written as the run trains, and it would have to start again.

        Warns
        -----
        RunWarning
            Of each checkpoint that cannot serve.
        """
        whole, reason = None, ""
        steps = checkpoint_steps(self.path)
        for step in reversed(steps):
            try:
                checkpoint = read_checkpoint(self.path, step)
                _check_saved(self.path, self.metrics.log, checkpoint, vars(self.job.config))
            except RowsLost as error:
                whole, reason = whole or step, error.finding
            except CheckpointError as error:
                reason = error.finding
            else:
                return checkpoint
            warnings.warn(f"falls back to the checkpoint before: {reason}", RunWarning, stacklevel=2)
        if whole is not None:
            fault = self.metrics.log.fault
            raise RunError(
                f"{self.path}: checkpoint {whole} is whole and rows before it are lost "
                f"({reason if fault is None else fault.finding}): put them back from a copy, or move the folder away "
                "to train the seed anew"
            )
        if steps:
            warnings.warn(
                f"{self.path}: no checkpoint that can serve, so the seed starts again from step 0",
                RunWarning,
                stacklevel=2,
            )
        return None

    def rewind(self, step: int | None) -> None:
        """Drop rows and checkpoints after `step`, its newest that can serve; all of them if it is None."""
        limit = -1 if step is None else step
        self._lock.check()
        self.metrics.keep(bisect_right(self.metrics.log.steps, limit))
        remove_checkpoints(self.path, above=limit)
        self.reached = Reached(self.job.config)
        if self.metrics.log.count:
            Log.read(self.metrics.path, lambda number, row: self.reached.add(row))

    def record(self, row: Row) -> None:
        """Write the next row of the metrics."""
        self.metrics.append(row)
        self.reached.add(row)

    def save(self, checkpoint: Checkpoint) -> None:
        """Write `checkpoint`, the rows before it first."""
        self._lock.check()
        self.metrics.sync()
        count = bisect_right(self.metrics.log.steps, checkpoint.step)
        state = {**checkpoint.state, "metrics": self.metrics.log.extent(count)}
        write_checkpoint(self.path, dataclasses.replace(checkpoint, state=state))

    def keep_newest(self, count: int) -> None:
        """Remove all that is older than the `count` newest checkpoints."""
        keep_newest(self.path, count)

    def keep_last(self) -> None:
        """Remove all that is older than the newest checkpoint that can be read: what a complete run needs."""
        keep_last_sound(self.path)

    def finish(self, steps: int, reason: str, now: dict[str, float]) -> None:
        """Mark the run complete after `steps` steps, saved before; the timing ends with the clocks `now`."""
        self._lock.check()
        environment = _sum_of(self.path / "environment.json")["sha256"]
        last = {"event": "end", "step": steps, **now, "environment_sha256": environment}
        self.timing.append(last)
        self.timing.sync()
        done = {
            "schema_version": SCHEMA_VERSION,
            "steps": steps,
            "reason": reason,
            **self.reached.as_json(),
            "settings_sha256": _settings_sum(
                unseal(self.path / "config.json", read_regular(self.path / "config.json"))
            ),
            "files": {name: _sum_of(self.path / name) for name in _closed(steps)},
        }
        write_atomically(self.path / "DONE", seal(done))
        self.done = done


@contextlib.contextmanager
def announced(jobs: Sequence[Job], out: Path) -> Iterator[str]:
    """Leave a file in `out`, while open, that names the runs of `jobs`: who watches sees what is still to come.

    Yields
    ------
    str
        Its name; "" if it could not be written.
    """
    process = Process.here()
    path = out / f"sweep-{process.host}-{process.pid}.json"
    limits = {job.run_name(seed): job.config.max_steps for job in jobs for seed in job.seeds}
    with contextlib.suppress(OSError):  # a folder that takes no file is refused where a run needs it
        out.mkdir(parents=True, exist_ok=True)
        _forget_the_dead(out)
        write_atomically(path, dump_json({**process.as_json(), "limits": limits}))
    try:
        yield path.name if path.exists() else ""
    finally:
        with contextlib.suppress(OSError):
            path.unlink()


def _forget_the_dead(out: Path) -> None:
    """Remove what processes of this host that were killed announced in `out`."""
    for path in out.glob("sweep-*.json"):
        with contextlib.suppress(RunError):
            process = Process.named(read_regular(path))
            if process is not None and not process.may_live():
                path.unlink(missing_ok=True)


def awaited(out: Path) -> dict[str, int]:
    """Name the runs that living processes announced in `out`, each with its limit of steps."""
    found: dict[str, int] = {}
    for path in out.glob("sweep-*.json"):
        try:
            data = read_regular(path)
            process, limits = Process.named(data), parse_object(data).get("limits")
        except (OSError, RunError, ValueError):
            continue  # it went away meanwhile, or is no such file
        if process is not None and process.may_live() and isinstance(limits, dict):
            found |= {name: limit for name, limit in limits.items() if _whole(limit)}
    return found


def mark_failed(
    out: Path, job: Job, attempts: int, reason: str, lines: Sequence[str] = (), command: str = ""
) -> None:
    """Leave a FAILED file in the folder of each run of `job` that is not complete.

    It says why, the last lines that the process wrote, and what to type to go on.
    """
    said = {
        "schema_version": SCHEMA_VERSION,
        "attempts": attempts,
        "reason": reason,
        "lines": list(lines),
        "command": command,
    }
    for seed in job.seeds:
        path = out / job.run_name(seed)
        if path.is_dir() and not (path / "DONE").exists():
            write_atomically(path / "FAILED", seal(said))


def read_record(path: Path) -> dict[str, Any] | None:
    """Read the config.json of the run folder `path`, the settings that are younger than it included; None without.

    Raises
    ------
    RunError
        If it holds no run's configuration.
    """
    path = path / "config.json"
    recorded = read_object(path)
    if recorded is None:
        return None
    check_record(path, recorded)
    for name in ("schema_version", "stack"):
        if name not in recorded:
            raise RunError(f"{path} is not a run's configuration, for it has no {name}: {MEND}")
    return {**recorded, "config": completed(recorded["config"])}


def read_settings(path: Path) -> dict[str, Any]:
    """Read the settings of the run in the folder `path`, those that are younger than it included.

    Raises
    ------
    OSError
        If its config.json cannot be read.
    RunError
        If it is missing or holds none.
    """
    recorded = read_record(path)
    if recorded is None:
        raise RunError(f"{path / 'config.json'} is missing: {MEND}")
    settings: dict[str, Any] = recorded["config"]
    return settings


def read_done(path: Path) -> dict[str, Any] | None:
    """Read the DONE of the run folder `path`; None while it has none.

    Raises
    ------
    RunError
        If it does not say when and why the run ended.
    """
    done = read_object(path / "DONE", _DONE_REMEDY)
    if done is not None:
        check_done(path / "DONE", done)
    return done


_DONE_REMEDY = "put it back from a copy, or remove it, and the run goes on from its last checkpoint"


def check_done(path: Path, done: dict[str, Any]) -> None:
    """See that `done`, of a file `path`, says when and why a run ended; raises RunError as `check_record`."""
    times: dict[str, Any] = {
        name: (int, None) for name in ("t_mem", "t_grok", "t_grok_sustained") if name in done
    }
    sums = {name: kind for name, kind in (("files", dict), ("settings_sha256", str)) if name in done}
    _check_fields(path, done, {"steps": int, "reason": str, **times, **sums}, _DONE_REMEDY)


def check_record(path: Path, record: dict[str, Any]) -> None:
    """See that `record`, of a file `path`, is a run's configuration; fields it may lack or add are left to the reader.

    Raises
    ------
    RunError
        If a field has a value of another kind than its own: which, and what it holds.
    """
    kinds = {"experiment": str, "condition": str, "seed": int, "config": dict}
    more = {"schema_version": int, "stack": list, "forced": list, "guests": list}
    _check_fields(path, record, kinds | {name: kind for name, kind in more.items() if name in record})
    for seed in record.get("stack", []):
        if not _whole(seed):
            raise RunError(
                f"{path}: stack must hold whole numbers, for they name folders; got {_short(seed)}: {MEND}"
            )
    for guest in record.get("guests", []):
        if not isinstance(guest, dict):
            raise RunError(f"{path}: guests must hold objects; got {_short(guest)}: {MEND}")
        _check_fields(
            path, guest, dict.fromkeys((f.name for f in dataclasses.fields(Origin)), str), of="guests."
        )
    config = record["config"]
    kinds_of_settings = _setting_kinds()
    if unknown := config.keys() - kinds_of_settings.keys():
        raise RunError(
            f"{path}: config.{printable(min(unknown))} is no setting that this fastent knows: {MEND}; a newer one may "
            "have written it"
        )
    counts = ("evaluate_every", "max_steps")  # which steps have rows follows from them
    known = {name: kind for name, kind in kinds_of_settings.items() if name in config or name in counts}
    _check_fields(path, config, known, of="config.")
    for name in counts:
        if config[name] == 0:
            raise RunError(f"{path}: config.{name} must be at least 1; got 0: {MEND}")


@functools.cache
def _setting_kinds() -> dict[str, Any]:
    """Kinds of the settings as JSON gives them back; of a list, the kind of its values in a list."""
    kinds = {}
    for name, hint in get_type_hints(TrainConfig).items():
        origin, inner = get_origin(hint), get_args(hint)
        kinds[name] = hint if origin is None else [inner[0]] if origin is tuple else type(inner[0])
    return kinds


_KINDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "a text in one line",
    bool: "true or false",
    dict: "an object",
    list: "a list",
    None: "null",
}


def _check_fields(
    path: Path, values: dict[str, Any], kinds: dict[str, Any], remedy: str = MEND, of: str = ""
) -> None:
    for name, kind in kinds.items():
        if name not in values:
            raise RunError(f"{path} is not what its name says, for it has no {of}{name}: {remedy}")
        allowed = kind if isinstance(kind, tuple) else (kind,)
        if not any(_is(values[name], each) for each in allowed):
            words = " or ".join(_words(each) for each in allowed)
            raise RunError(f"{path}: {of}{name} must be {words}; got {_short(values[name])}: {remedy}")


def _words(kind: Any) -> str:
    return f"a list, each {_KINDS[kind[0]]}" if isinstance(kind, list) else _KINDS[kind]


def _is(value: Any, kind: Any) -> bool:
    if kind is int:
        return _whole(value)
    if kind is float:
        return _number(value)
    if isinstance(kind, list):
        return isinstance(value, list) and all(_is(each, kind[0]) for each in value)
    if kind is str:
        return isinstance(value, str) and value.isprintable()
    return value is None if kind is None else isinstance(value, kind)


def _whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 64


def _number(value: Any) -> bool:
    # A whole number may be too large for a float.
    return type(value) in (int, float) and -1e308 < value < 1e308


def _short(value: Any) -> str:
    return reprlib.repr(value)


MEASURED = (
    *("train_loss", "train_accuracy", "test_loss", "test_accuracy", "parameter_norm"),
    *("entropy", "entropy_status", "effective_rank", "participation_ratio"),
)
"""Columns that every row of the metrics has beside its step; measures bring more."""

NUMBERS = frozenset((*MEASURED, "time", "seconds", "monitor_seconds", "seeds")) - {"entropy_status"}
"""Columns of metrics and timing that hold numbers or null; those of measures may hold words too."""

SHARES = ("train_accuracy", "test_accuracy", "entropy")
"""Those that lie from 0 to 1, rounding aside."""


def check_rows(path: Path, rows: Sequence[dict[str, Any]], first: int = 1) -> None:
    """See that the rows of a log, from its line `first` on, hold a step, and numbers, words or null.

    Raises
    ------
    RunError
        At the first field that is something else: the line, the field, and what it holds.
    """
    for line, row in enumerate(rows, first):
        check_row(path, line, row)


def check_row(path: Path, line: int, row: Row) -> None:
    """See that one row of a log, its line `line`, is one of metrics or of clocks; raises as `check_rows`."""
    if not _whole(row.get("step")):
        _refuse_row(path, line, "step", "a whole number", row.get("step"))
    for name, value in row.items():
        if not (value is None or _number(value) or (isinstance(value, str | bool) and name not in NUMBERS)):
            _refuse_row(path, line, name, "a number or null", value)
        if name in SHARES and value is not None and not 0 <= value <= 1 + 1e-6:
            _refuse_row(path, line, name, "from 0 to 1", value)
    if path.name == "timing.jsonl":
        if not isinstance(row.get("event"), str):
            _refuse_row(path, line, "event", "a word", row.get("event"))
        clocks = ("seconds", "monitor_seconds", "seeds") if "monitor_seconds" in row else ("seconds",)
        for name in clocks:
            if not _number(row.get(name)) or (name == "seeds" and row[name] < 1):
                _refuse_row(path, line, name, "a number" + " from 1" * (name == "seeds"), row.get(name))


def _refuse_row(path: Path, line: int, name: str, rule: str, value: Any) -> None:
    raise RunError(f"{path}: line {line}: {name} must be {rule}; got {_short(value)}: {MEND}")


REMEDY_OF_ENVIRONMENT = (
    "put it back from a copy, or remove it and DONE, and what this machine is takes its place"
)
REMEDY_OF_TIMING = (
    "put it back from a copy, or remove DONE, and the same command closes the run without the rows from there on: they "
    "hold clocks alone"
)


def _closed(steps: int) -> tuple[str, ...]:
    """Name the files that are a function of the configuration, whose checksums DONE holds."""
    return "metrics.jsonl", f"checkpoint-{steps}.json", f"checkpoint-{steps}.safetensors"


def _settings_sum(record: dict[str, Any]) -> str:
    """SHA-256 of a config.json, but for the seeds that were trained beside, which change nothing."""
    own = {key: value for key, value in record.items() if key != "stack"}
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()


def damages(path: Path, *, checkpoint: bool = False) -> list[Damaged]:
    """Find what of the complete run in the folder `path` is not as it was when it ended, one for each file.

    Of a run from before there were checksums: logs whose rows are not whole or do not come to the end.

    Parameters
    ----------
    path : Path
    checkpoint : bool
        Look at the last checkpoint too, which no report reads and which is far larger than all the rest.
    """
    try:
        done = read_done(path)
    except Damaged as damaged:
        return [damaged]
    if done is None:
        return []
    found: list[Damaged] = []
    for check in (_check_settings, _check_metrics, _check_timing, *([_check_last] if checkpoint else [])):
        try:
            check(path, done)
        except Damaged as damaged:
            found.append(damaged)
    return found


def _check_settings(path: Path, done: dict[str, Any]) -> None:
    path = path / "config.json"
    try:
        found = _settings_sum(unseal(path, read_regular(path)))
    except FileNotFoundError as error:
        raise Damaged(path, "a file", "none") from error
    expected = done.get("settings_sha256")
    if expected not in (None, found):
        raise Damaged(path, f"sha256 {expected} of the settings", found)


def _check_metrics(path: Path, done: dict[str, Any]) -> None:
    path = path / "metrics.jsonl"
    found = _sum_of(path)
    if done.get("files", {}).get(path.name) == found:
        return
    log = Log.read(path, _no_more)
    if log.fault is not None:
        raise log.fault
    last = log.last.get("step")
    if last != done["steps"]:
        raise Damaged(path, f"rows up to step {done['steps']:,}", f"{log.count:,}, the last of step {last}")
    if "files" in done:
        raise Damaged(path, f"{done['files'].get(path.name)}", f"{found}")


def _no_more(number: int, row: Row) -> None:
    """Leave a row at being whole."""


def _check_timing(path: Path, done: dict[str, Any]) -> None:
    path, environment = path / "timing.jsonl", path / "environment.json"
    if "files" not in done:
        if (fault := Log.read(path, _no_more).fault) is not None:
            raise fault.replaced(REMEDY_OF_TIMING)
        read_object(environment, REMEDY_OF_ENVIRONMENT)
        return
    if not path.exists():
        raise Damaged(path, "a file", "none", remedy=REMEDY_OF_TIMING)
    log = Log.read(path, _no_more)
    if log.fault is not None:
        raise log.fault.replaced(REMEDY_OF_TIMING)
    if log.last.get("event") != "end":
        raise Damaged(
            path, 'a last row of the event "end"', f"{log.last.get('event')!r}", remedy=REMEDY_OF_TIMING
        )
    expected = log.last.get("environment_sha256")
    found = _sum_of(environment, remedy=REMEDY_OF_ENVIRONMENT)["sha256"]
    if found != expected:
        raise Damaged(environment, f"sha256 {expected}", found, remedy=REMEDY_OF_ENVIRONMENT)


def _check_last(path: Path, done: dict[str, Any]) -> None:
    if "files" in done:
        for name in _closed(done["steps"])[1:]:
            found, expected = _sum_of(path / name), done["files"].get(name)
            if found != expected:
                raise Damaged(path / name, f"{expected}", f"{found}")
    elif steps := checkpoint_steps(path):
        read_checkpoint(path, steps[-1])


def _sum_of(path: Path, *, remedy: str = MEND) -> dict[str, Any]:
    """Length and SHA-256 of a file that must be there."""
    try:
        with open_regular(path) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return {"bytes": file.tell(), "sha256": digest}
    except FileNotFoundError as error:
        raise Damaged(path, "a file", "none", remedy=remedy) from error


def has_checksums(path: Path) -> bool:
    """Whether all of the run in the folder `path`, whose files are whole, is covered by checksums."""
    done, metrics = read_done(path), path / "metrics.jsonl"
    if done is not None:
        return done.get("schema_version") != 1
    log = Log.read(metrics, _no_more)
    return log.checked or not log.count  # the last covers those before


def what_is_left(path: Path) -> tuple[list[Damaged], int | None]:
    """Find what is damaged of the run in the folder `path`, which is not complete, and where it can go on.

    A last row without an end, as a crash leaves it, is no damage: the run writes it again.

    Returns
    -------
    list of Damaged
    int or None
        Step of the newest checkpoint that can serve; 0 where there is none, so that it starts anew. None if it has to
        be moved away for that, as checkpoints are whole and what belongs to them is lost.
    """
    found: list[Damaged] = []
    record: dict[str, Any] | None = None
    try:
        record = read_record(path)
        if record is None and what_counts(path):
            raise Damaged(path / "config.json", "a file", "none")
    except Damaged as damaged:
        found.append(damaged)
    for name in ("environment.json", "FAILED"):
        try:
            read_object(path / name)
        except Damaged as damaged:
            found.append(damaged)
    logs = {}
    for name in ("metrics.jsonl", "timing.jsonl"):
        file = path / name
        logs[name] = log = Log.read(file, partial(check_row, file))
        if log.fault is not None and not log.torn:
            found.append(log.fault)
    whole, serving = False, None
    for step in checkpoint_steps(path):
        try:
            checkpoint, whole = read_checkpoint(path, step), True
            if record is not None:
                _check_saved(path, logs["metrics.jsonl"], checkpoint, record["config"])
                serving = step
        except Damaged as damaged:
            found.append(damaged)
    return found, 0 if serving is None and not whole else serving


def _check_saved(path: Path, log: Log, checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
    """See that all rows up to a checkpoint are there and are those it was saved with."""
    path, step = path / "metrics.jsonl", checkpoint.step
    have = array("q", (s for s in log.steps if s <= step))
    if any(due != there for due, there in zip_longest(_steps_due(step, config), have)):
        there = set(have)
        lost = next((due for due in _steps_due(step, config) if due not in there), step)
        raise RowsLost(path, f"the row of step {lost}, for checkpoint {step}", "none")
    found = log.extent(len(have))
    expected = checkpoint.state.get("metrics", found)  # one from before there were checksums does not say
    if found != expected:
        raise RowsLost(path, f"{expected}, for checkpoint {step}", f"{found}")


def _steps_due(step: int, config: Mapping[str, Any]) -> Iterator[int]:
    """List the evaluations up to `step`, one by one: of a forged checkpoint they may be more than memory holds."""
    every, end = config["evaluate_every"], config["max_steps"]
    return heapq.merge(range(0, step + 1, every), [end] if end <= step and end % every else [])


def identity(record: Mapping[str, Any]) -> str:
    """Digest of what makes a run the one it is, from its config.json.

    Experiment, condition, seed, every setting and the changes that were forced upon it; neither where it lies, nor
    the seeds trained beside it, nor the measures, which change nothing of the training.
    """
    settings = {**completed(record["config"]), "measures": []}
    for name, kind in _setting_kinds().items():  # 1 is 1.0
        if name in settings and kind in (float, [float]):
            settings[name] = float(settings[name]) if kind is float else [*map(float, settings[name])]
    own = [record.get(key) for key in ("experiment", "condition", "seed", "forced")]
    return hashlib.sha256(json.dumps([own, settings], sort_keys=True).encode()).hexdigest()


def what_counts(path: Path) -> str:
    """Name a file in the run folder `path` that was trained for; "" where nothing has come of the run yet."""
    if (path / "DONE").exists():
        return "DONE"
    if has_row(path / "metrics.jsonl"):
        return "metrics.jsonl"
    steps = checkpoint_steps(path) if path.is_dir() else []
    return f"checkpoint-{steps[-1]}.json" if steps else ""


def _differences(recorded: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Each field that differs, in words; fields of `recorded` that this version does not know included."""
    before, after = _flat(recorded), _flat(now)
    lines = []
    if before["schema_version"] > SCHEMA_VERSION:
        lines.append(
            f"schema_version: {before['schema_version']}, of a newer fastent; this one knows {SCHEMA_VERSION}"
        )
    for key in sorted({*before, *after} - {"schema_version", "forced", "guests"}):
        if before.get(key, _ABSENT) != after.get(key, _ABSENT):
            lines.append(f"{key}: {before.get(key, _ABSENT)} in the folder, {after.get(key, _ABSENT)} now")
    return lines


def _rewritten(recorded: Sequence[dict[str, str]], now: Sequence[dict[str, str]]) -> list[str]:
    """Each guest of a script whose code or values are not what they were, in words.

    Another version of Python compiles the same code to another `fingerprint`, which tells nothing then.
    """
    before = {(each["kind"], each["name"]): each for each in recorded if not each["package"]}
    lines = []
    for each in now:
        old = before.get((each["kind"], each["name"]))
        if old is None or each["package"] or old["version"] == each["version"]:
            continue
        if old["version"].partition(" ")[2] == each["version"].partition(" ")[2]:
            lines.append(
                f"{each['kind']} {each['name']} ({each['place']}): its code or the values that it holds"
            )
    return lines


def in_words(guest: dict[str, str]) -> str:
    """Write a guest for people."""
    where, place = f"{guest['package']} {guest['version']}".strip(), guest["place"]
    if not guest["package"]:
        where, place = "a script", ", ".join(filter(None, (place, guest["version"])))
    return f"{guest['kind']} {guest['name']} of {where} ({place})"


_ABSENT = "(absent)"


def _flat(record: dict[str, Any]) -> dict[str, Any]:
    nested = {f"config.{key}": value for key, value in record["config"].items()}
    return {**{key: value for key, value in record.items() if key != "config"}, **nested}
