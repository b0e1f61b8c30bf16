"""The command line, ``fastent``: its commands, the files of activations that it reads, and its exit status.

`main` imports what a command needs when that command is given, the parser among it: without the extra ``train``, and
for a command of which a part is missing, it says what to install.
"""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import functools
import io
import itertools
import math
import os
import platform
import select
import shlex
import signal
import subprocess
import sys
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, get_args, get_type_hints

import fastent
from fastent.installation import conflict, install_command

if not hasattr(fastent, "__version__"):
    sys.exit(f"fastent: {conflict()}")

import numpy as np
import torch
from torch import Tensor

from fastent import linalg
from fastent.activations import Tokens
from fastent.covariance import triton_obstacle
from fastent.entropy import Convention, SpectralEntropy, spectral_entropy
from fastent.grokking.train.config import TrainConfig, own_fraction
from fastent.grokking.train.config import preset as preset_called
from fastent.moments import Moments

if TYPE_CHECKING:
    from fastent.grokking.train.runs import Job

EXTRA = ("tyro", "rich", "safetensors", "matplotlib", "pyarrow", "jinja2")
"""What the extra ``train`` installs."""

HOSTS = (
    "lightning",
    "transformers",
    "accelerate",
    "torchmetrics",
    "tensorboard",
    "wandb",
    "mlflow",
    "trackio",
    "ray",
    "submitit",
)
"""What `fastent.integrations`, its recipes and sweeps run on; each is the user's own to install."""

DESCRIPTION = """spectral entropy of representations.

For example:
    fastent entropy activations.npy
    fastent run e1 --preset quick --seeds 0-2 --out runs/quick
    fastent report runs/quick --out report
    fastent report --help"""


def run(
    experiment: str,
    *,
    config: TrainConfig,
    condition: str = "baseline",
    combinations: Callable[[TrainConfig, str], dict[str, TrainConfig]] = lambda config, _: {"": config},
    preset: str = "quick",
    seeds: str = "0-2",
    out: Path = Path("runs"),
    workers: int | None = None,
    device: str = "cpu",
    executor: Literal["inline", "pool", "ray", "slurm"] | None = None,
    address: str | None = None,
    threads: int | None = None,
    gpus: float | None = None,
    slurm: tuple[str, ...] = (),
    quiet: bool = False,
    force: bool = False,
    dry_run: bool = False,
    command: Callable[[], str] = str,
) -> int:
    """Train an experiment's runs, or go on with those that are not complete.

    A run's folder is named by experiment, condition, task, the settings that are not the preset's, and seed; so several
    settings may lie in one --out. A setting of one number or name takes several, with commas between; of several such
    lists every combination is trained. Stop it at any time: the same command goes on.

    For example:
        fastent run e1 --preset quick --seeds 0-2 --out runs/quick
        fastent run own --task mul --width 64,128 --condition losses-0.2 --measures fourier --out runs/mixed
        fastent run all --preset paper --executor ray --address auto --out /shared/paper --dry-run

    Parameters
    ----------
    experiment : str
        One of `fastent list`; "all"; or "own", one task under one condition.
    config : TrainConfig
        The preset, with changes.
    condition : str
        What "own" trains under: baseline; losses-0.2, mixing with alpha 0.2, or logits-0.2; norm-start, norm-mem,
        norm-as-baseline, logits-as-baseline; several joined by +; or one of another package.
    combinations : function
        From `config` and the preset's name to all the settings to train, by what sets each apart: the lists among the
        options, which the parser does not see.
    preset : str
        The settings that the options below start from; `fastent list` names them.
    seeds : str
        Such as 0-2 or 0,3,7-9.
    out : Path
        Folder for one folder a run.
    workers : int
        Processes to train in, which share the threads out among them. Default: as many as there are threads on a
        CPU, where a seed on one thread is cheapest, and one on other devices; on a cluster as many as it has room for.
    device : str
        Where to train, as torch names it.
    executor : {"inline", "pool", "ray", "slurm"}, optional
        What trains: this process; processes of this machine, the default where there are several; tasks of a Ray
        cluster; Slurm jobs. For a cluster --out must be a folder that all its machines share.
    address : str, optional
        Of the Ray cluster, such as auto; without it a Ray of this machine alone. For Slurm, local starts the jobs on
        this machine.
    threads : int, optional
        Of each process. Default: this machine's shared out, and one on a cluster.
    gpus : float, optional
        Of each process on a cluster: with Ray 0.25 lets four share one. Default: one if --device is cuda.
    slurm : options, optional
        What to ask Slurm for, such as partition=gpu time=240 mem=8GB, as sbatch names it.
    quiet : bool
        No progress bar.
    force : bool
        Go on with runs of another configuration or of a newer fastent, saying what is ignored.
    dry_run : bool
        Train nothing: print how many runs there are and the time to expect, by runs recorded in the folder or by a
        trial of a few seconds.
    command : function
        What was typed, for who wants to try again what failed.
    """
    from fastent.grokking.experiments.report import print_summary
    from fastent.grokking.train.executors import Engine
    from fastent.grokking.train.progress import ProgressBar
    from fastent.grokking.train.storage import StopRequest
    from fastent.grokking.train.sweep import most_workers, run_jobs

    config = TrainConfig(**vars(config))
    with _wrong_usage():
        engine = Engine(executor, address, threads, gpus, slurm)
        engine.check(device)
        asked, chosen = workers, parse_seeds(seeds)
        if workers is None:
            most = len(chosen) if engine.elsewhere else min(torch.get_num_threads(), most_workers())
            workers = 1 if device.startswith("cuda") else most
        settings = combinations(config, preset)
        groups = _planned(
            *(experiment, condition, settings, preset, chosen, out, workers, device, force),
            elsewhere=engine.elsewhere,
        )
    jobs = [job for group in groups.values() for job in group]
    if dry_run:
        from fastent.grokking.train.estimate import describe, expect

        found = expect(jobs, out, workers=workers, device=device, groups=groups)
        print("\n".join(describe(found, workers=workers, out=out)))
        return 0
    with StopRequest() as stop:
        started = engine.start(out, asked if engine.elsewhere else workers, device)
        with ProgressBar(jobs, quiet=quiet) as bar:
            outcomes = run_jobs(
                *(jobs, out),
                workers=workers,
                device=device,
                force=force,
                observers=[bar],
                stop=stop,
                executor=started,
                command=command(),
            )
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    if len(failed) < len(outcomes):
        print_summary(out, {job.run_name(seed) for job in jobs for seed in job.seeds})
    for outcome in failed:
        names = ", ".join(outcome.job.run_name(seed) for seed in outcome.job.seeds)
        tried = f" after {outcome.attempts} attempts" if outcome.attempts > 1 else ""
        _complain("\n  ".join((f"failed{tried}: {names}: {outcome.error}", *outcome.lines)))
    if failed:
        again = f"; to try again: {command()}" if command() else ""
        _complain(f"{len(failed)} of {len(outcomes)} jobs failed{again}")
    return 1 if failed else 0


def _planned(
    experiment: str,
    condition: str,
    settings: Mapping[str, TrainConfig],
    preset: str,
    seeds: tuple[int, ...],
    out: Path,
    workers: int,
    device: str,
    force: bool,
    *,
    elsewhere: bool,
) -> dict[str, list[Job]]:
    """Return the stacks to train of each of `settings`, each rule checked that can be checked before the first of them.

    What experiments and settings share is trained once, for the first that asks for it.
    """
    from fastent.grokking.experiments.jobs import JOBS, planned
    from fastent.grokking.train.own import own_job
    from fastent.grokking.train.runs import OWN, named_as_before, plan_stacks
    from fastent.grokking.train.sweep import check_jobs

    if experiment not in (*JOBS, "all", OWN):
        raise ValueError(f"experiment must be one of {', '.join(JOBS)}, all or {OWN}; got {experiment!r}")
    if condition != "baseline" and experiment != OWN:
        raise ValueError(
            f"--condition is for `fastent run {OWN}`: an experiment has its own; got {condition!r}"
        )
    _check_out(out)
    check_jobs((), out, workers=workers, device=device, elsewhere=elsewhere)
    groups: dict[str, list[Job]] = {}
    runs: set[tuple[Job, int]] = set()
    for label, config in settings.items():
        asked: list[Job] = []
        with _said_of(label):
            names = [name for name in JOBS if experiment in (name, "all")]
            jobs = [job for name in names for job in planned(name, config, preset, seeds)]
            for job in jobs if experiment != OWN else [own_job(config, preset, seeds, condition)]:
                kind = dataclasses.replace(
                    job, config=dataclasses.replace(job.config, measures=()), seeds=(), changed=()
                )
                new = tuple(seed for seed in job.seeds if (kind, seed) not in runs)
                runs.update((kind, seed) for seed in new)
                if new:
                    asked.append(dataclasses.replace(job, seeds=new))
            asked = named_as_before(asked, out)
            check_jobs(asked, out, workers=workers, device=device, force=force, elsewhere=elsewhere)
        groups[label] = [stack for job in asked for stack in plan_stacks(job, out, workers)]
    return groups


@contextlib.contextmanager
def _said_of(label: str) -> Iterator[None]:
    """Put in front of an error the settings of a sweep that it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{label}: {error}" if label else str(error)) from error


def find_lists(arguments: Sequence[str]) -> tuple[list[str], dict[str, tuple[Any, ...]]]:
    """Find the settings that are given several values, as in ``--width 64,128``.

    Returns
    -------
    list of str
        `arguments` with the first value of each, for the parser.
    dict of tuple
        All the values of each, by the names of the fields of `TrainConfig`.

    Raises
    ------
    ValueError
        If a list has an empty item, one that the setting does not take, or one twice; or if the setting takes no list.
    """
    hints, first, lists = get_type_hints(TrainConfig), list(arguments), dict[str, tuple[Any, ...]]()
    for i, argument in enumerate(arguments):
        option, equals, text = argument.partition("=")
        name = option.removeprefix("--").replace("-", "_")
        if not option.startswith("--") or name not in hints:
            continue
        place = i if equals else i + 1
        text = text if equals else "".join(arguments[place : place + 1])
        lists.pop(name, None)  # of an option that is given twice the last counts
        if "," in text and not text.startswith("--"):
            lists[name] = _values(option, hints[name], text)
            head = text.partition(",")[0].strip()
            first[place] = f"{option}={head}" if equals else head
    return first, lists


def _values(option: str, kind: Any, text: str) -> tuple[Any, ...]:
    """Read the list of values `text` of an option whose field has the type `kind`."""
    items, choices = [item.strip() for item in text.split(",")], get_args(kind)
    named = kind is str or (choices and all(isinstance(choice, str) for choice in choices))
    if kind not in (int, float) and not named:
        raise ValueError(
            f"{option} takes no list to sweep over, which settings of one number or name do; got {text!r}: give each "
            "value a command of its own (parts of one value stand apart by spaces)"
        )
    values = list[Any]()
    for item in items:
        if not item:
            raise ValueError(
                f"{option} {text} has an empty item: write values with commas and no spaces between"
            )
        try:
            values.append(kind(item) if kind in (int, float) else item)
        except ValueError as error:
            what = "whole numbers" if kind is int else "numbers"
            raise ValueError(f"{option} takes {what}; got {item!r} in {text}") from error
        if choices and item not in choices:
            raise ValueError(f"{option} takes {', '.join(choices)}; got {item!r} in {text}")
        if values[-1] in values[:-1]:
            raise ValueError(f"{option} {text} has {item} twice: each value is trained once")
    return tuple(values)


def every_combination(
    lists: Mapping[str, tuple[Any, ...]], config: TrainConfig, preset: str
) -> dict[str, TrainConfig]:
    """Return `config` with each combination of the values in `lists`, by what sets it apart, as "--width 64".

    A task has its own share of the pairs, as `own_fraction` says.

    Raises
    ------
    ValueError
        If values do not fit together; the message begins with them.
    """
    found = {}
    for values in itertools.product(*lists.values()):
        changes = dict(zip(lists, values, strict=True))
        label = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in changes.items())
        with _said_of(label):
            fraction = own_fraction(config, changes.get("task", config.task), preset)
            found[label] = dataclasses.replace(config, **{"train_fraction": fraction, **changes})
    return found


def _check_out(out: Path) -> None:
    """Raise ValueError where there can be no folder `out` to write to."""
    there = next(place for place in (out, *out.parents) if place.exists())
    if not there.is_dir():
        raise ValueError(f"--out must be a folder, and {there} is a file: give another place")
    if not os.access(there, os.W_OK):
        raise ValueError(f"--out is {out}, and you may not write to {there}: give another place")


def parse_seeds(text: str) -> tuple[int, ...]:
    """Read "0-2,5" as (0, 1, 2, 5).

    Raises
    ------
    ValueError
        If `text` is no such list, names a seed twice, or more of them or larger ones than can be trained.
    """
    from fastent.grokking.train.sweep import check_seeds

    ranges: list[range] = []
    with contextlib.suppress(ValueError):
        for part in text.split(","):
            first, dash, last = part.partition("-")
            ranges.append(range(int(first), int(last if dash else first) + 1))
    if len(ranges) < text.count(",") + 1 or not all(r.stop > r.start >= 0 for r in ranges):
        ranges = []
    check_seeds(sum(r.stop - r.start for r in ranges), max((r.stop - 1 for r in ranges), default=0))
    seeds = [seed for r in ranges for seed in r]
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(
            f"seeds must be numbers and ranges without repetition, such as 0-2 or 0,3,7-9; got {text!r}"
        )
    return tuple(seeds)


def report(
    runs: Path,
    *,
    out: Path = Path("report"),
    check: tuple[Path, ...] | None = None,
    fill: tuple[Path, ...] | None = None,
) -> int:
    """Write the report on a folder of runs; or see whether committed documents follow from it.

    For example:
        fastent report runs/quick --out report
        fastent report bench/results/paper --check

    Parameters
    ----------
    runs : Path
        The --out of `fastent run`, or a folder of packed runs such as bench/results/paper.
    out : Path
        Folder of the report; open its index.html.
    check : paths, optional
        Write nothing: compare the parts of the report in these documents (README.md and docs/ if none is
        named) with the runs, print what differs and fail if anything does.
    fill : paths, optional
        Write the parts of the report, and their figures, into these documents, the same ones if none is named.
    """
    from fastent.grokking.experiments.document import documents
    from fastent.grokking.experiments.report import check_documents, fill_documents, write_report

    if check is not None and fill is not None:
        raise ValueError("give --check or --fill, not both")
    named = check or fill
    if check is None and fill is None:
        with _wrong_usage():
            _check_out(out)
        print(write_report(runs, out))
        return 0
    chosen = list(named or documents(Path(), runs))
    if not chosen:
        raise ValueError(
            f"README.md and docs/ hold no part of the report on {runs}: mark a place as "
            "<!-- fastent report: summary -->"
        )
    if fill is not None:
        fill_documents(runs, chosen)
        return 0
    differing = check_documents(runs, chosen)
    print("\n".join(differing) or f"{', '.join(map(str, chosen))}: as the runs say")
    return 1 if differing else 0


def runs_(path: Path, *, json: bool = False) -> int:
    """Print what the runs in a folder are doing: state, steps, T_mem, T_grok, H, and when each was last written.

    A run is running, waiting (its command is at another), interrupted (the command that began it goes on with it),
    failed, damaged or complete. Nothing is written to the folder, and it may be in use.

    For example:
        fastent runs runs/quick
        fastent runs bench/results/paper
        fastent runs runs/quick --json

    Parameters
    ----------
    path : Path
        The --out of `fastent run`, one run's folder, or a folder of packed runs.
    json : bool
        One JSON object for programs; times are in UTC.
    """
    from fastent.grokking.experiments.watch import print_runs

    print_runs(path, as_json=json)
    return 0


def verify(path: Path, *, json: bool = False) -> int:
    """Say what of runs is damaged, and what makes it again; exit status 1 if anything is.

    Every file is held to its checksum. Nothing is written; runs in training may be verified too.

    For example:
        fastent verify runs/quick
        fastent verify bench/results/paper
        fastent verify runs/quick --json

    Parameters
    ----------
    path : Path
        The --out of `fastent run`, one run's folder, a folder of packed runs, or one of their files.
    json : bool
        One JSON object for programs.
    """
    from fastent.grokking.experiments.verify import verify as verify_runs

    return verify_runs(path, as_json=json)


def compare(paths: tuple[Path, ...], *, out: Path | None = None) -> int:
    """Set runs of several settings side by side: what differs, T_mem, T_grok, H* with intervals, and curves.

    Runs of the same experiment, condition and task are compared, as of two folders or of a sweep over a setting; else
    all settings that are there.
    Complete runs count; others are named. The first setting is what the rest is compared with.

    For example:
        fastent compare bench/results/paper bench/results/nearest --out compare.html
        fastent compare runs/quick
        fastent compare runs/lr/e1-baseline-add-seed* runs/lr/e1-baseline-add-learning_rate=0.0005-seed*

    Parameters
    ----------
    paths : paths
        Folders of runs, single runs' folders, or files of packed runs.
    out : Path, optional
        Write one self-contained page (.html), or the curves alone (.png); curves of six settings at most are drawn.
    """
    from fastent.grokking.experiments.compare import compare as side_by_side

    side_by_side(paths, out)
    return 0


def watch(path: Path, *, once: bool = False) -> int:
    """Watch runs in training: progress, H as a curve, the forecast of T_grok, and what failed.

    It ends by itself once nobody trains in the folder: exit status 0 if all runs are complete, 1 if not. Without a
    terminal it prints a line for each run that moves on. Ctrl-C ends it; the runs go on.

    For example:
        fastent watch runs/quick
        fastent watch runs/quick --once
        fastent watch runs/quick >> progress.log &

    Parameters
    ----------
    path : Path
        The --out of `fastent run`.
    once : bool
        Print one frame and end.
    """
    from fastent.grokking.experiments.watch import watch as show

    return show(path, once=once)


def entropy(activations: Path, *, tokens: Tokens | None = None, convention: Convention = "relative") -> int:
    """Print the spectral entropy of activations in a file; exit status 1 where there is none (NaN or Inf in them).

    For example:
        fastent entropy activations.npy
        fastent entropy hidden.safetensors --tokens last
        fastent entropy activations.npy --convention paper

    Parameters
    ----------
    activations : Path
        A .npy, .npz or .safetensors file of one array of shape (n, d), one sample a row, or (n, tokens, d); larger than
        memory if need be. A pickle (.pt) is refused.
    tokens : {"flatten", "first", "last", "mean", "skip_first"}, optional
        What to make of a tokens axis.
    convention : {"relative", "paper"}
        "paper" clamps eigenvalues at 1e-12, for comparison only.
    """
    result, dtype = entropy_of_file(activations, tokens=tokens, convention=convention)
    lines = {
        "H (normalised)": f"{result.normalized:.6f}   0 to {result.ceiling:.4f}",
        "entropy": f"{result.entropy:.6f}   nats",
        "effective rank": f"{result.effective_rank:.4f}   of {result.d}",
        "participation ratio": f"{result.participation_ratio:.4f}",
        "total variance": f"{result.total_variance:.6g}",
        "samples, features": f"{result.n}, {result.d}   {dtype}",
        "status": result.status.value + (f": {result.message}" if result.message else ""),
    }
    for name, value in lines.items():
        print(f"{name:<20} {value}")
    return 1 if math.isnan(result.normalized) else 0


# An array that is larger is never in memory as a whole: its rows are read CHUNK_BYTES at a time and added up by
# `Moments`. Where it has fewer rows than features, which takes the Gram matrix, or the paper's convention is asked for,
# it is mapped instead, and the system reads the pages as they are needed; an .npz cannot be mapped and is read.
WHOLE_BYTES = 1 << 28
CHUNK_BYTES = 1 << 25


@dataclass(frozen=True)
class Stored:
    """An array in a file.

    Attributes
    ----------
    shape : tuple of int
    dtype : str
        As the file names it, with how it is read where that says too little.
    nbytes : int
    rows : function of a number of rows
        Reads the array anew, as tensors of so many rows at a time.
    whole : function
        The array as one tensor, mapped where the file allows.
    """

    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    rows: Callable[[int], Iterator[Tensor]]
    whole: Callable[[], Tensor]


def entropy_of_file(
    path: Path, *, tokens: Tokens | None = None, convention: Convention = "relative"
) -> tuple[SpectralEntropy, str]:
    """Entropy of the activations in a file, and the dtype that it holds; arguments as in `entropy`.

    Raises
    ------
    OSError
        If the file cannot be read.
    ValueError, TypeError
        If it holds something else: what, and how to save it; or its shape leaves a choice open.
    """
    with open_array(path) as stored:
        shape = stored.shape
        if len(shape) not in (2, 3):
            raise ValueError(
                f"{path} holds shape {shape}: it must be (n, d), or (n, tokens, d) with --tokens; reshape it and save "
                "it again"
            )
        if len(shape) == 3 and tokens is None:
            raise ValueError(
                f"{path} holds shape {shape}, read as (n, tokens, d): say what the tokens are to be, --tokens flatten, "
                "first, last, mean or skip_first"
            )
        if len(shape) == 2 and tokens is not None:
            raise ValueError(f"{path} holds shape {shape}, which has no tokens axis: leave out --tokens")
        n = shape[0] * (shape[1] if tokens == "flatten" and len(shape) == 3 else 1)
        # One sample may be more than there is memory for: mapped, its tokens are read as they are needed.
        long = stored.nbytes > CHUNK_BYTES * shape[0]
        try:
            if stored.nbytes <= WHOLE_BYTES or n < shape[-1] or convention == "paper" or long:
                return spectral_entropy(stored.whole(), tokens=tokens, convention=convention), stored.dtype
            moments = Moments()
            for rows in stored.rows(max(1, CHUNK_BYTES * shape[0] // stored.nbytes)):
                moments.update(rows, tokens=tokens)
            return moments.spectral_entropy(), stored.dtype
        except (ValueError, TypeError) as error:
            if str(error).startswith(str(path)):
                raise
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"{path}: {error}") from error


@contextlib.contextmanager
def open_array(path: Path) -> Iterator[Stored]:
    """Open the one array of a file, by its first bytes and its name.

    Raises
    ------
    OSError, ValueError
        As `entropy_of_file`.
    """
    from fastent.grokking.train.storage import PICKLED

    if path.is_dir():
        raise ValueError(f"{path} is a folder: name the file of activations in it")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; the current folder is {Path.cwd()}")
    try:
        with open(path, "rb") as file:
            start = file.read(8)
        if path.suffix == ".safetensors":
            with _safetensors(path) as stored:
                yield stored
        elif start.startswith(b"\x93NUMPY"):
            yield _numpy(path, lambda: path.open("rb"), path.stat().st_size, mapped=True)
        elif start.startswith(b"PK") and path.suffix not in PICKLED:
            member = _only_member(path)
            yield _numpy(
                path, functools.partial(_member, path, member.filename), member.file_size, mapped=False
            )
        elif path.suffix in PICKLED or start.startswith(b"\x80"):
            raise ValueError(
                f"{path} is a pickle, and reading one runs the code in it: load it where you trust it, and save the "
                "activations with numpy.save or safetensors.torch.save_file"
            )
        else:
            raise ValueError(
                f"{path} is neither .npy, .npz nor .safetensors: save the activations with numpy.save"
            )
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path} is cut short or damaged: {error}") from error
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, f"cannot be read ({error.strerror or error})", str(path)) from error


def _only_member(path: Path) -> zipfile.ZipInfo:
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    names = [member.filename for member in members]
    if any(name.endswith(".pkl") for name in names):
        raise ValueError(
            f"{path} is a file of torch.save, a pickle, and reading one runs the code in it: save the activations with "
            "numpy.save or safetensors.torch.save_file"
        )
    _check_one(path, [name.removesuffix(".npy") for name in names])
    if not names[0].endswith(".npy"):
        raise ValueError(
            f"{path} holds {names[0]!r}, no array: save the activations with numpy.savez or numpy.save"
        )
    if members[0].compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or members[0].flag_bits & 1:
        raise ValueError(
            f"{path} is encrypted or compressed in a way that NumPy does not write: save the activations with "
            "numpy.savez or numpy.save"
        )
    return members[0]


@contextlib.contextmanager
def _member(path: Path, name: str) -> Iterator[IO[bytes]]:
    with zipfile.ZipFile(path) as archive, archive.open(name) as file:
        yield file


def _check_one(path: Path, names: list[str]) -> None:
    if len(names) != 1:
        raise ValueError(
            f"{path} holds {len(names)} arrays ({', '.join(sorted(names)[:10])}), and it must be one: save that one "
            "alone"
        )


def _numpy(
    path: Path, opened: Callable[[], AbstractContextManager[IO[bytes]]], there: int, *, mapped: bool
) -> Stored:
    """Describe the array of a .npy stream of `there` bytes, which `opened` opens anew at each call."""
    with opened() as file:
        try:
            shape, column_major, dtype = _header(file)
            if not all(0 <= size < 1 << 63 for size in shape):
                raise ValueError(f"shape {shape}")
        except (ValueError, SyntaxError, tokenize.TokenError) as error:
            raise ValueError(
                f"{path} has no whole NumPy header, and is cut short or damaged: {error}"
            ) from error
        start = file.tell()
    if dtype.hasobject:
        raise ValueError(
            f"{path} holds Python objects, a pickle, and reading one runs the code in it: save numbers, with "
            "numpy.save(..., allow_pickle=False)"
        )
    if dtype.type in (np.longdouble, np.clongdouble):
        raise ValueError(f"{path} holds {dtype}, wider than torch's types: save it as float64")
    if dtype.kind not in "biufcV" or dtype.names or (dtype.kind == "V" and dtype.itemsize != 2):
        raise ValueError(
            f"{path} holds {dtype}, which is no type of number here (NumPy writes float8 and other types of ml_dtypes "
            "so): save it as float32"
        )
    if dtype.kind == "V":
        said = "bfloat16 (two-byte void in the file)"
    else:
        said = dtype.str if dtype.byteorder == ">" else dtype.name
    width = dtype.itemsize * math.prod(shape[1:])
    if there < start + dtype.itemsize * math.prod(shape):
        raise ValueError(f"{path} is cut short: its header says {shape} of {dtype}, and it has {there} bytes")

    def whole() -> Tensor:
        if mapped:
            # Copied on writing, which nobody does here: torch warns of memory that is read-only.
            return _tensor(np.load(path, mmap_mode="c", allow_pickle=False))
        with opened() as file:
            return _tensor(np.lib.format.read_array(file, allow_pickle=False))

    def rows(count: int) -> Iterator[Tensor]:
        if column_major and len(shape) > 1:
            array = whole()
            for first in range(0, shape[0], count):
                yield array[first : first + count].clone()
            return
        with opened() as file:
            _header(file)
            for first in range(0, shape[0], count):
                here = min(count, shape[0] - first)
                data = file.read(here * width)
                if len(data) != here * width:
                    raise ValueError(
                        f"{path} is cut short: it ends in row {first + len(data) // max(1, width)}"
                    )
                yield _tensor(np.frombuffer(bytearray(data), dtype).reshape(here, *shape[1:]))

    return Stored(shape, said, dtype.itemsize * math.prod(shape), rows, whole)


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, column_major, dtype = read(file)
    return shape, column_major, dtype


def _tensor(array: np.ndarray[Any, Any]) -> Tensor:
    if array.dtype.kind == "V":
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))


@contextlib.contextmanager
def _safetensors(path: Path) -> Iterator[Stored]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as archive:
            names = list(archive.keys())
            _check_one(path, names)
            part = archive.get_slice(names[0])
            shape = tuple(part.get_shape())

            def rows(count: int) -> Iterator[Tensor]:
                for first in range(0, shape[0], count):
                    yield part[first : first + count]

            def whole() -> Tensor:
                tensor: Tensor = archive.get_tensor(names[0])
                return tensor

            sample = part[0:0] if shape else whole()
            size = sample.dtype.itemsize * math.prod(shape)
            yield Stored(shape, str(sample.dtype).removeprefix("torch."), size, rows, whole)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole .safetensors file: {error}") from error


def list_() -> int:
    """Print the experiments, the names of tasks, models, conditions and measures, and the presets.

    For example:
        fastent list
        fastent list | grep norm
    """
    from fastent.grokking.experiments.jobs import JOBS
    from fastent.grokking.experiments.report import EXPERIMENTS
    from fastent.grokking.train.config import PRESETS
    from fastent.grokking.train.registry import GROUPS
    from fastent.grokking.train.registry import names as names_of
    from fastent.grokking.train.runs import OWN

    print("experiments")
    for experiment in EXPERIMENTS:
        print(
            f"  {experiment.id}  {experiment.question}"
            + ("" if experiment.id in JOBS else "  (not in this version)")
        )
    for name in JOBS.keys() - {experiment.id for experiment in EXPERIMENTS}:
        print(f"  {name}  {(JOBS[name].__doc__ or '').partition(chr(10))[0]}")
    print(f"  {OWN}  a task, model, condition and measures of one's own choice, by the names below")
    for kind in GROUPS:
        found = [
            each.name + (f" ({each.package or 'this process'})" if each.package != "fastent" else "")
            for each in names_of(kind)
        ]
        print(f"{kind}s\n  {', '.join(found)}")
    print("presets")
    for name, config in PRESETS.items():
        changes = {
            field.name: value
            for field in dataclasses.fields(config)
            if (value := getattr(config, field.name)) != field.default
        }
        print(
            f"  {name:<6} "
            + (
                ", ".join(f"{k} = {v}" for k, v in changes.items())
                or "what the others start from: the paper's values as far as its first version has them, and ours"
            )
        )
    return 0


def doctor() -> int:
    """Print what fastent would use on this machine, and why.

    For example:
        fastent doctor
        fastent doctor > machine.txt
    """
    for name, value in examine():
        print(f"{name:<12} {value}")
    return 0


MISSING = "not installed"


def examine() -> list[tuple[str, str]]:
    """Look at software, processor, GPUs, extras, and the tools that the monitor works in.

    Returns
    -------
    list of (str, str)
        What was looked at, and what was found, in the order for reading.
    """
    from fastent.grokking.train.environment import commit, processor, version

    found = [
        ("fastent", fastent.__version__ + (f", commit {commit()}" if commit() else "")),
        ("python", platform.python_version()),
        (
            "torch",
            f"{torch.__version__}, "
            + (f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"),
        ),
        ("triton", version("triton") or MISSING),
        ("processor", processor()),
        ("threads", _threads()),
        ("products", _products()),
    ]
    if not torch.cuda.is_available():
        found.append(
            ("GPU", "none that torch can use: tensors stay on the CPU, and torch computes the covariance")
        )
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        obstacle = triton_obstacle(torch.device("cuda", i))
        way = "the Triton kernels compute" if obstacle is None else f"torch computes, because {obstacle}:"
        found.append(
            (f"GPU {i}", f"{torch.cuda.get_device_name(i)}, sm_{major}{minor}: {way} the covariance")
        )
    versions = {name: version(name) or MISSING for name in EXTRA}
    found += versions.items()
    for host in HOSTS:
        # The package of MLflow's clients alone has another name.
        here = version(host) or (version("mlflow-skinny") if host == "mlflow" else None)
        found.append((host, here or MISSING))
    missing = [name for name in EXTRA if versions[name] == MISSING]
    if missing:
        found.append(("to do", f"{install_command('train')}, for {', '.join(missing)}"))
    if trouble := conflict():
        found.append(("conflict", trouble))
    return found


def _threads() -> str:
    reasons = [
        f"{name}={os.environ[name]}" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if name in os.environ
    ]
    return f"{torch.get_num_threads()} of {os.cpu_count()} processors" + "".join(
        f", {reason}" for reason in reasons
    )


def _products() -> str:
    if linalg.openblas_preferred(torch.empty(1, dtype=torch.float32, device="cpu")):
        return "NumPy's OpenBLAS computes covariances and large eigensolves"
    hint = "; with OMP_NUM_THREADS=1 NumPy's OpenBLAS, faster on this processor"
    return "torch computes covariances and eigensolves" + (hint if linalg.openblas_available() else "")


def plan(
    *,
    model: str | None = None,
    layers: int | None = None,
    d: int | None = None,
    probe: int | None = None,
    ranks: int = 1,
    stride: int | None = None,
    step_time: float = 1.0,
    itemsize: int = 2,
    link: float = 25.0,
    budget: float = 1.0,
    probe_time: float | None = None,
) -> int:
    """Estimate what monitoring a large model would cost, and say what to choose.

    Rates are those of this machine's CPU, measured for some two seconds; sizes beyond the measured are extrapolated.
    The forward pass of the probe, as a rule most of the cost, is in it where --model or --probe-time says what it
    takes. In the second example train.py has
    `def make_monitor(): return fastent.SpectralEntropyMonitor(model, probe, layers="blocks.*")`.

    For example:
        fastent plan --layers 24 --d 1024 --step-time 0.3
        fastent plan --model train:make_monitor --step-time 0.02 --stride 10

    Parameters
    ----------
    model : str, optional
        MODULE:FUNCTION that returns the monitor of the run that is planned: its probe is evaluated for some two
        seconds, forward pass and entropies.
    layers : int, optional
        Layers watched: those of --model, or 12.
    d : int, optional
        Features of each: those of --model, or 768.
    probe : int, optional
        Rows of the probe: those of --model, or 512.
    ranks : int
        Processes that hold the model.
    stride : int, optional
        Steps between probes: those of --model, or 200.
    step_time : float
        Seconds of a training step.
    itemsize : int
        Bytes of an entry of the activations: 2 for bfloat16.
    link : float
        GB per second that a rank sends: an assumption.
    budget : float
        Percent of the training time that a monitor may take.
    probe_time : float, optional
        Seconds of the probe's forward pass, in place of --model: without either the plan says that it is left out.
    """
    from fastent.plan import (
        Measured,
        Monitoring,
        called_for,
        describe,
        made_by,
        make_plan,
        measure,
        measure_rates,
    )

    def asked(found: Measured | None, every: int) -> Monitoring:
        return Monitoring(
            layers=found.layers if found else 12 if layers is None else layers,
            d=found.d if found else 768 if d is None else d,
            probe=found.probe if found else 512 if probe is None else probe,
            ranks=ranks,
            stride=every if stride is None else stride,
            step_time=step_time,
            itemsize=itemsize,
            link=link * 1e9,
            budget=budget / 100,
            probe_time=found.forward if found else probe_time,
            evaluation_time=found.evaluation if found else None,
        )

    with _wrong_usage():
        sizes = {"layers": layers, "d": d, "probe": probe, "probe-time": probe_time}
        given = [f"--{name}" for name, value in sizes.items() if value is not None]
        if model is not None and given:
            raise ValueError(f"--model says what {', '.join(given)} would: leave one of them out")
        wanted = asked(None, 200)
        monitor = None if model is None else made_by(model)
    if model is not None and monitor is not None:
        with _wrong_usage(), called_for(model):
            wanted = asked(measure(monitor), monitor.every)
        monitor.close()
    print("\n".join(describe(make_plan(measure_rates(), wanted))))
    return 0


def bench(
    *,
    quick: bool = False,
    out: Path = Path("bench/results"),
    only: tuple[str, ...] | None = None,
    provider: tuple[str, ...] = (),
) -> int:
    """Run the benchmarks of a checkout: rows, figures and tables.

    For example:
        fastent bench --quick
        fastent bench --only entropy monitor --out rows
        fastent bench --quick --only entropy accuracy --provider mine:entropy --out rows

    Parameters
    ----------
    quick : bool
        Fewer cases and rounds: under five minutes on two cores instead of under an hour.
    out : Path
        Folder for the rows (cpu/*.jsonl, one file a question), the figures and the tables.
    only : names, optional
        These questions alone, such as entropy or monitor.
    provider : MODULE:NAME, optional
        Further providers: functions of activations that give the entropy in nats, in modules of the current folder or
        installed ones. Each is in every table and figure of providers.
    """
    if only == ():
        raise WrongUsage(
            "--only names no question: give one or more, such as entropy or monitor, or leave it out"
        )
    line = [sys.executable, "-m", "bench.suite", "--out", str(out.resolve())]
    line += ["--quick"] if quick else []
    line += ["--only", *only] if only else []
    line += ["--provider", *provider] if provider else []
    found = os.pathsep.join(filter(None, (os.getcwd(), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": found} if provider else None
    return subprocess.run(line, cwd=_checkout(), check=False, env=environment).returncode


def _checkout() -> Path:
    """Find the folder that holds ``bench/suite.py``: where this package lies, or the current one."""
    places = [Path(__file__).resolve().parents[1], Path.cwd()]
    for place in places:
        if (place / "bench" / "suite.py").is_file():
            return place
    raise FileNotFoundError(
        "the benchmarks are in fastent's repository, not in the installed package: clone it and run "
        f"`fastent bench` there (looked for bench/suite.py in {' and '.join(map(str, places))})"
    )


def check(subject: Literal["maths"], *, runs: Path | None = None) -> int:
    """Check the paper's mathematics anew, a minute or two, and print its Table 6 beside what was found.

    For example:
        fastent check maths
        fastent check maths --runs bench/results/paper

    Parameters
    ----------
    subject : {"maths"}
        What to check.
    runs : Path, optional
        The --out of `fastent run`, or packed runs: take the spread of H* from these.
    """
    from fastent.grokking.mathematics.table import print_table, stored_thresholds

    if runs is not None:
        stored_thresholds(runs)  # one that is no folder of runs is told of now, not after a minute of work
    return print_table(runs)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (`sys.argv` if None), ``--version`` or a command; return the exit status.

    That of a command whose reader has gone, as in ``fastent list | head -1``, is 141, and that of one ended by Ctrl-C
    is 130, as a shell has it for signals.

    Raises
    ------
    SystemExit
        For ``--help`` and wrong usage, from the parser.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        try:
            return _run(arguments)
        finally:
            sys.stdout.flush()  # here, and not when the interpreter ends, which would complain
    except KeyboardInterrupt:  # before or after training, which saves and says so
        return 128 + signal.SIGINT
    except BrokenPipeError as error:
        if not (_drop_unread(sys.stdout) | _drop_unread(sys.stderr)):
            _complain(str(error))
            return 1
        return 128 + signal.SIGPIPE


def _drop_unread(stream: IO[str]) -> bool:
    """Drop what `stream` holds and will get if nobody reads it any more, and return whether that is so."""
    # Asked of the pipe: an unbuffered stream holds nothing whose writing would fail again.
    asked = select.poll()
    try:
        asked.register(stream, 0)
    except (OSError, ValueError):  # it is no file
        return False
    if not asked.poll(0):
        return False
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
    return True


def _run(arguments: list[str]) -> int:
    """Run the command line `arguments`, in the surroundings that every command has."""
    if arguments == ["--version"]:
        print(f"fastent {fastent.__version__}")
        return 0
    try:
        with warnings.catch_warnings(), _any_encoding(), _files_only():
            warnings.showwarning = _show_warning
            return _dispatch(arguments)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRA:
            raise
        _complain(f"this needs {package}, which is not installed: {install_command('train')}")
        return 1


def _dispatch(arguments: list[str]) -> int:
    import tyro

    from fastent.grokking.train.storage import Interrupted, RunError

    typed = shlex.join(("fastent", *arguments))
    try:
        with _wrong_usage():
            arguments, lists = find_lists(arguments) if arguments[:1] == ["run"] else (arguments, {})
        commands: dict[str, Callable[..., int]] = {
            "run": functools.partial(
                run,
                config=_default_settings(arguments),
                combinations=functools.partial(every_combination, lists),
                command=lambda: typed,
            ),
            "report": report,
            "runs": runs_,
            "watch": watch,
            "verify": verify,
            "compare": compare,
            "entropy": entropy,
            "list": list_,
            "check": check,
            "doctor": doctor,
            "plan": plan,
            "bench": bench,
        }
        if arguments and arguments[0] not in commands:
            # No command will run: the help of all of them says what each is, in a sentence.
            commands = {name: _named(command) for name, command in commands.items()}
        status: int = tyro.extras.subcommand_cli_from_dict(
            commands,
            prog="fastent",
            description=f"fastent {fastent.__version__} (--version): {DESCRIPTION}",
            args=arguments,
            config=(
                tyro.conf.PositionalRequiredArgs,
                tyro.conf.FlagCreatePairsOff,
                tyro.conf.OmitArgPrefixes,
                tyro.conf.SuppressFixed,  # what is no option: the combinations of a sweep
            ),
        )
    except Interrupted as interruption:
        _complain(str(interruption))
        return 128 + interruption.signal
    except WrongUsage as error:
        _complain(str(error))
        return 2
    except BrokenPipeError:
        raise
    except (RunError, OSError, ValueError, TypeError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            _complain(f"{error.filename}: {error.strerror}")
        else:
            _complain(str(error))
        return 1
    return status


def _named(command: Callable[..., int]) -> Callable[[], int]:
    """Return a function that is only described, by the first sentence of a command."""
    function = command.func if isinstance(command, functools.partial) else command

    def described() -> int:
        raise NotImplementedError

    described.__doc__ = (function.__doc__ or "").partition("\n")[0]
    return described


def _default_settings(arguments: Sequence[str]) -> TrainConfig:
    """Find preset and task in the arguments before they are parsed: they decide the defaults of the options."""
    from fastent.grokking.train.registry import BUILT_IN

    given = {"--preset": "quick", "--task": "", "--model": "", "--out": "runs"}
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name in given:
            given[name] = value if equals else (arguments[i + 1] if i + 1 < len(arguments) else "")
    with _wrong_usage():
        kinds: tuple[Literal["task", "model"], ...] = ("task", "model")
        for kind in kinds:
            name = given[f"--{kind}"] if arguments[:1] == ["run"] else ""
            if name and name not in BUILT_IN[kind]:
                from fastent.grokking.train.own import check_there

                check_there(kind, name, Path(given["--out"]))
        base = preset_called(given["--preset"])
        fraction = own_fraction(base, given["--task"], given["--preset"])
        return _Settings(**{**vars(base), "train_fraction": fraction})


class WrongUsage(Exception):
    """Options that cannot be served; nothing was begun. The parser would reword a ValueError, and lets this pass."""


@dataclass(frozen=True)
class _Settings(TrainConfig):
    """A configuration on its way through the parser."""

    def __post_init__(self) -> None:
        with _wrong_usage():
            super().__post_init__()


@contextlib.contextmanager
def _wrong_usage() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise WrongUsage(str(error)) from error


@contextlib.contextmanager
def _any_encoding() -> Iterator[None]:
    """Let the terminal's encoding show what it lacks as "-" or "?": a result must not fail at the table of it."""
    codecs.register_error("fastent", _in_ascii)
    changed = [
        (stream, stream.errors)
        for stream in (sys.stdout, sys.stderr)
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape")
    ]
    for stream, _ in changed:
        stream.reconfigure(errors="fastent")
    try:
        yield
    finally:
        for stream, errors in changed:
            stream.reconfigure(errors=errors)


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join("-" if character in "\u2013\u2014\u2212" else "?" for character in lacking), error.end


@contextlib.contextmanager
def _files_only() -> Iterator[None]:
    """Draw into files: a notebook's MPLBACKEND names a backend that is not here, and matplotlib would refuse it."""
    before = os.environ.get("MPLBACKEND")
    os.environ["MPLBACKEND"] = "agg"
    try:
        yield
    finally:
        if before is None:
            del os.environ["MPLBACKEND"]
        else:
            os.environ["MPLBACKEND"] = before


def _complain(message: str) -> None:
    from fastent.grokking.train.storage import printable

    # Names of files and what they hold are in it.
    print(f"fastent: {printable(message)}", file=sys.stderr)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    _complain(f"warning: {message}")


if __name__ == "__main__":
    sys.exit(main())
