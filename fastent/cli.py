"""The benchmarks of a checkout: no part of the installed package, ``fastent bench`` runs them from there."""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import functools
import io
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from fastent.activations import Tokens
from fastent.entropy import Convention
from fastent.grokking.train.config import TrainConfig, own_fraction
from fastent.grokking.train.config import preset as preset_called

if TYPE_CHECKING:
    from fastent.grokking.train.runs import Job


def find_suite() -> Path:
    """Find the checkout that holds ``bench/suite.py``: where this package lies, or the current folder.

    Raises
    ------
    FileNotFoundError
        If neither is one.
    """
    places = [Path(__file__).resolve().parents[1], Path.cwd()]
    for place in places:
        if (place / "bench" / "suite.py").is_file():
            return place
    raise FileNotFoundError(
        "the benchmarks are in fastent's repository, not in the installed package: clone it and run "
        f"`fastent bench` there (looked for bench/suite.py in {' and '.join(map(str, places))})"
    )


def run_benchmarks(*, quick: bool, out: Path, only: Sequence[str] = ()) -> int:
    """Run the suite in a process of its own and return its exit status; see `fastent.cli.bench`."""
    line = [sys.executable, "-m", "bench.suite", "--out", str(out.resolve())]
    line += ["--quick"] if quick else []
    line += ["--only", *only] if only else []
    return subprocess.run(line, cwd=find_suite(), check=False).returncode


def run(
    experiment: str,
    *,
    config: TrainConfig,
    preset: str = "quick",
    seeds: str = "0-2",
    out: Path = Path("runs"),
    workers: int | None = None,
    device: str = "cpu",
    quiet: bool = False,
    force: bool = False,
) -> int:
    """Train an experiment's runs, or go on with those that are not complete.

    Parameters
    ----------
    experiment : str
        One of `fastent list`, or "all".
    config : TrainConfig
        The preset, with changes.
    preset : str
        The settings that the options below start from: quick or paper.
    seeds : str
        Such as 0-2 or 0,3,7-9.
    out : Path
        Folder for one folder a run.
    workers : int
        Processes to train in, which share the threads out among them. Default: as many as there are threads on a
        CPU, where a seed on one thread is cheapest, and one on other devices.
    device : str
        Where to train, as torch names it.
    quiet : bool
        No progress bar.
    force : bool
        Go on with runs of another configuration or of a newer fastent, saying what is ignored.
    """
    from fastent.grokking.experiments.report import print_summary
    from fastent.grokking.train.progress import ProgressBar
    from fastent.grokking.train.storage import StopRequest
    from fastent.grokking.train.sweep import most_workers, run_jobs

    with _wrong_usage():
        if workers is None:
            workers = 1 if device.startswith("cuda") else min(torch.get_num_threads(), most_workers())
        jobs = _planned(experiment, config, preset, parse_seeds(seeds), out, workers, device, force)
    with StopRequest() as stop, ProgressBar(jobs, quiet=quiet) as bar:
        outcomes = run_jobs(
            jobs, out, workers=workers, device=device, force=force, observers=[bar], stop=stop
        )
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    if len(failed) < len(outcomes):
        print_summary(out, {job.run_name(seed) for job in jobs for seed in job.seeds})
    for outcome in failed:
        names = ", ".join(outcome.job.run_name(seed) for seed in outcome.job.seeds)
        tried = f" after {outcome.attempts} attempts" if outcome.attempts > 1 else ""
        _complain(f"failed{tried}: {names}: {outcome.error}")
    if failed:
        _complain(f"{len(failed)} of {len(outcomes)} jobs failed")
    return 1 if failed else 0


def _planned(
    experiment: str,
    config: TrainConfig,
    preset: str,
    seeds: tuple[int, ...],
    out: Path,
    workers: int,
    device: str,
    force: bool,
) -> list[Job]:
    """Return the stacks to train, each rule checked that can be checked before the first of them starts."""
    from fastent.grokking.experiments.jobs import JOBS
    from fastent.grokking.train.runs import plan_stacks
    from fastent.grokking.train.sweep import check_jobs

    if experiment not in (*JOBS, "all"):
        raise ValueError(f"experiment must be one of {', '.join(JOBS)} or all; got {experiment!r}")
    base, asked = preset_called(preset), []
    for name in JOBS:
        for job in JOBS[name](config, seeds) if experiment in (name, "all") else []:
            fraction = own_fraction(config, job.config.task, base)
            asked.append(
                dataclasses.replace(job, config=dataclasses.replace(job.config, train_fraction=fraction))
            )
    # Experiments share runs: each is trained once.
    asked = list(dict.fromkeys(asked))
    check_jobs(asked, out, workers=workers, device=device, force=force)
    return [stack for job in asked for stack in plan_stacks(job, out, workers)]


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
        Write the parts of the report into these documents, the same ones if none is named.
    """
    from fastent.grokking.experiments.document import documents
    from fastent.grokking.experiments.report import check_documents, fill_documents, write_report

    if check is not None and fill is not None:
        raise ValueError("give --check or --fill, not both")
    named = check or fill
    if check is None and fill is None:
        print(write_report(runs, out))
        return 0
    chosen = list(named or documents(Path()))
    if not chosen:
        raise ValueError(
            "README.md and docs/ hold no part of the report: mark a place as <!-- fastent report: summary -->"
        )
    if fill is not None:
        fill_documents(runs, chosen)
        return 0
    differing = check_documents(runs, chosen)
    print("\n".join(differing) or f"{', '.join(map(str, chosen))}: as the runs say")
    return 1 if differing else 0


def entropy(activations: Path, *, tokens: Tokens | None = None, convention: Convention = "relative") -> int:
    """Print the spectral entropy of activations in a file; exit status 1 where there is none (NaN or Inf in them).

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
    from fastent.activation_files import entropy_of_file

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


def list_() -> int:
    """Print the experiments and the presets."""
    from fastent.grokking.experiments.jobs import JOBS
    from fastent.grokking.experiments.report import EXPERIMENTS
    from fastent.grokking.train.config import PRESETS

    print("experiments")
    for experiment in EXPERIMENTS:
        print(
            f"  {experiment.id}  {experiment.question}"
            + ("" if experiment.id in JOBS else "  (not in this version)")
        )
    print("presets")
    for name, config in PRESETS.items():
        changes = {
            field.name: value
            for field in dataclasses.fields(config)
            if (value := getattr(config, field.name)) != field.default
        }
        print(
            f"  {name:<6} " + (", ".join(f"{k} = {v}" for k, v in changes.items()) or "the paper's setting")
        )
    return 0


def doctor() -> int:
    """Print what fastent would use on this machine, and why."""
    from fastent.doctor import examine

    for name, value in examine():
        print(f"{name:<12} {value}")
    return 0


def plan(
    *,
    layers: int = 12,
    d: int = 768,
    probe: int = 512,
    ranks: int = 1,
    stride: int = 200,
    step_time: float = 1.0,
    itemsize: int = 2,
    link: float = 25.0,
    budget: float = 1.0,
    probe_time: float | None = None,
) -> int:
    """Estimate what monitoring a large model would cost, and say what to choose.

    Rates are those of this machine's CPU, measured for some two seconds; sizes beyond the measured are extrapolated.

    Parameters
    ----------
    layers : int
        Layers watched.
    d : int
        Features of each.
    probe : int
        Rows of the probe.
    ranks : int
        Processes that hold the model.
    stride : int
        Steps between probes.
    step_time : float
        Seconds of a training step.
    itemsize : int
        Bytes of an entry of the activations: 2 for bfloat16.
    link : float
        GB per second that a rank sends: an assumption.
    budget : float
        Percent of the training time that a monitor may take.
    probe_time : float, optional
        Seconds of the probe's forward pass, which the estimate cannot know: without it the plan says that it is left
        out.
    """
    from fastent.plan import check_plan, describe, make_plan, measure_rates

    sizes = {"layers": layers, "d": d, "probe": probe, "stride": stride}
    rest: dict[str, Any] = {
        "ranks": ranks,
        "step_time": step_time,
        "itemsize": itemsize,
        "link": link * 1e9,
        "budget": budget / 100,
        "probe_time": probe_time,
    }
    with _wrong_usage():
        check_plan(**sizes, **rest)
    found = make_plan(measure_rates(), **sizes, **rest)
    print("\n".join(describe(found, **sizes, budget=budget / 100)))
    return 0


def bench(*, quick: bool = False, out: Path = Path("bench/results"), only: tuple[str, ...] = ()) -> int:
    """Run the benchmarks of a checkout: rows, figures and tables.

    Parameters
    ----------
    quick : bool
        Fewer cases and rounds: under five minutes on two cores instead of under an hour.
    out : Path
        Folder for the rows (cpu/*.jsonl, one file a question), the figures and the tables.
    only : names, optional
        These questions alone, such as entropy or monitor.
    """
    from fastent.cli import run_benchmarks

    return run_benchmarks(quick=quick, out=out, only=only)


def check(subject: Literal["maths"], *, runs: Path | None = None) -> int:
    """Check the paper's mathematics anew, a minute or two, and print its Table 6 beside what was found.

    Parameters
    ----------
    subject : {"maths"}
        What to check.
    runs : Path, optional
        The --out of `fastent run`, or packed runs: take the spread of H* from these.
    """
    from fastent.grokking.mathematics.table import print_table

    return print_table(runs)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (`sys.argv` if None); return the exit status.

    Raises
    ------
    SystemExit
        For ``--help`` and wrong usage, from the parser.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with warnings.catch_warnings(), _any_encoding(), _files_only():
            warnings.showwarning = _show_warning
            return _dispatch(arguments)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        from fastent.doctor import EXTRA, INSTALL

        if package not in EXTRA:
            raise
        _complain(f"this needs {package}, which is not installed: {INSTALL}")
        return 1


def _dispatch(arguments: list[str]) -> int:
    import tyro

    from fastent.grokking.train.storage import Interrupted, RunError

    try:
        commands: dict[str, Callable[..., int]] = {
            "run": functools.partial(run, config=_default_settings(arguments)),
            "report": report,
            "entropy": entropy,
            "list": list_,
            "check": check,
            "doctor": doctor,
            "plan": plan,
            "bench": bench,
        }
        status: int = tyro.extras.subcommand_cli_from_dict(
            commands,
            prog="fastent",
            args=arguments,
            config=(
                tyro.conf.PositionalRequiredArgs,
                tyro.conf.FlagCreatePairsOff,
                tyro.conf.OmitArgPrefixes,
            ),
        )
    except Interrupted as interruption:
        _complain(str(interruption))
        return 128 + interruption.signal
    except WrongUsage as error:
        _complain(str(error))
        return 2
    except (RunError, OSError, ValueError, TypeError) as error:
        _complain(str(error))
        return 1
    return status


def _default_settings(arguments: Sequence[str]) -> TrainConfig:
    """Find preset and task in the arguments before they are parsed: they decide the defaults of the options."""
    given = {"--preset": "quick", "--task": ""}
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name in given:
            given[name] = value if equals else (arguments[i + 1] if i + 1 < len(arguments) else "")
    with _wrong_usage():
        base = preset_called(given["--preset"])
        return dataclasses.replace(base, train_fraction=own_fraction(base, given["--task"], base))


class WrongUsage(ValueError):
    """Options that cannot be served; nothing was begun."""


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
    print(f"fastent: {message}", file=sys.stderr)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    _complain(f"warning: {message}")


if __name__ == "__main__":
    sys.exit(main())
