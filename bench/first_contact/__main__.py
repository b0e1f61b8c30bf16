"""The stages of a first contact, one after the other, each in its own time.

In a clone, nothing installed (docs/gpu.md)::

    COMMIT=<hash> END=470 bash bench/first_contact/first_contact.sh
    COMMIT=<hash> END=150 STAGES="env warm smoke gluon compiled sanitize" bash bench/first_contact/first_contact.sh

A stage is a process group of its own with a limit of its own. What it prints is in ``log.txt`` at once. One that fails,
hangs or takes the GPU's context with it costs the others nothing but its time. After ``END`` seconds (470) all are
over. What was found stands last: checks and tests that failed, and a verdict on each target (`bench.report`).

At most eight files come to ``OUT`` (default: a folder in the system's temporary one): summary.txt, log.txt,
smoke.jsonl, gpu.jsonl (rows for `bench.report`), junit.xml, e1.json and ncu.txt.

``--rehearse`` walks the stages without a GPU: small shapes, the kernels interpreted. It shows that the scripts run,
measures nothing: no target gets a verdict by it.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).parents[2]
GRACE = 5.0  # seconds from the interrupt at a stage's limit, which lets pytest write its report, to its end
LEAST = 10.0  # seconds below which a stage is not begun
KEPT = 1_500_000  # bytes of a stage's output that are kept, the last ones
VERDICTS = 25.0  # seconds for the verdicts, after all stages


@dataclass(frozen=True)
class Stage:
    """A command of the shell, and the seconds that it may take at most; None: all that is left."""

    name: str
    limit: float | None
    command: str  # LIMIT stands for the seconds it has
    lines: int = 12  # of the end of its output, shown when it is over


def stages(out: Path, *, rehearse: bool) -> list[Stage]:
    """All stages, in their order; results go to `out`."""
    python, folder = shlex.quote(sys.executable), shlex.quote(str(out))
    interpreted = "TRITON_INTERPRET=1 " if rehearse else ""
    device, quick = ("cpu", " --quick") if rehearse else ("cuda", "")
    pytest = f"{python} -m pytest -p no:cacheprovider --tb=short"
    gpu = f"{python} -m bench.gpu --out {folder} --device {device}"
    ours = f"{interpreted}{python} -m bench.first_contact"
    query = "name,driver_version,clocks.sm,clocks.max.sm,power.limit,memory.total"
    sanitized = "tests/kernels/test_gpu.py -k 'those_of_the_cpu and bfloat16 and 512-128'"
    return [
        Stage(
            "env",
            40,
            f"nvidia-smi --query-gpu={query} --format=csv,noheader; type gcc ncu compute-sanitizer; "
            f"{python} -c 'import numpy, fastent.reference; from fastent.cli import examine; "
            'print("numpy", numpy.__version__, *(f"{name}: {found}" for name, found in examine()), sep="\\n")\'',
            40,
        ),
        Stage("warm", 70, f"{python} -m bench.first_contact.warm" + (" --at-most 2" if rehearse else "")),
        Stage("smoke", 90, f"{ours}.smoke {folder}/smoke.jsonl {device}"),
        Stage("headline", 110, f"{gpu} --quick {TARGETS}", 30),
        Stage(
            "tests",
            150,
            f"{pytest} -v -m gpu --maxfail=25 --durations=8 --junitxml={folder}/junit.xml tests "
            "-k 'not compiled_model'",
            30,
        ),
        Stage("e1", 100, f"{python} -m bench.first_contact.e1 {folder} {device}"),
        Stage("ncu", 70, f"{ours}.profiled {folder}/ncu.txt {device}"),
        Stage("bench", None, f"{gpu}{quick} {REST} --minutes $(awk 'BEGIN {{print (LIMIT - 15) / 60}}')"),
        # Only where STAGES names them:
        Stage("gluon", 60, f"{gpu} --quick --part ceilings --part providers"),
        Stage(
            "compiled", 120, f"{pytest} -q -m gpu tests/monitor/test_deferred_machines.py -k compiled_model"
        ),
        Stage(
            "properties",
            120,
            f"{pytest} -q --device cuda --maxfail=25 tests/properties tests/kernels/test_kernel_covariance.py "
            "tests/kernels/test_resident.py",
        ),
        Stage(
            "sanitize",
            120,
            "export PYTORCH_NO_CUDA_MEMORY_CACHING=1; for tool in memcheck racecheck synccheck; do "
            f"timeout 38 compute-sanitizer --error-exitcode 1 --tool $tool {pytest} -q -m gpu {sanitized}; "
            'echo "$tool: $?"; done',
        ),
        Stage("correctness", 150, f"{gpu}{quick} --part correctness"),
        Stage(LAST, VERDICTS, f"{python} -m bench.first_contact.verdicts {folder}"),
    ]


TARGETS = (
    "--part kernel --part training --part host --part ceilings --part providers"  # quick: what targets name
)
REST = "--part kernel --part providers --part eigensolve --part training --part host"
FIRST = "env warm smoke headline tests e1 ncu bench"
LAST = "verdicts"  # whatever became of the others


def run(chosen: Iterable[Stage], out: Path, *, end: float, start: float | None = None) -> None:
    """Run stages one after the other.

    Parameters
    ----------
    chosen : iterable of Stage
    out : Path
        Folder of ``summary.txt``, a line for each stage, and ``log.txt``, all that they print.
    end : float
        Seconds after `start` (now) by which all are over; one that would have less than `LEAST` is not begun.
    """
    start = time.monotonic() if start is None else start
    for stage in chosen:
        left = end - (time.monotonic() - start)
        if left < LEAST:
            _note(out, f"{stage.name}: not begun, {max(left, 0):.0f} s left")
            continue
        limit = left if stage.limit is None else min(stage.limit, left)
        begun = time.monotonic()
        try:
            status, printed = _run(stage, limit, out / "log.txt")
        except OSError as error:  # a disk that is full
            status, printed = str(error), ""
        _note(out, f"{stage.name}: {status}, {time.monotonic() - begun:.0f} of {limit:.0f} s")
        for line in printed.splitlines()[-stage.lines :]:
            print(line[:200])


def _run(stage: Stage, limit: float, log: Path) -> tuple[str, str]:
    """Run one stage; return what became of it, and the end of what it printed."""
    with log.open("ab") as file:
        file.write(f"===== {stage.name}, {limit:.0f} s at most\n".encode())
        file.flush()
        first = file.tell()
        command = ("bash", "-c", stage.command.replace("LIMIT", f"{limit:.0f}"))
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            cwd=ROOT,
            env=environment(),
            start_new_session=True,
            # A shell has what it starts in the background ignore interrupts, and whatever that starts.
            preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )
        try:
            status = f"exit {process.wait(limit)}"
        except subprocess.TimeoutExpired:
            status = "stopped at its limit"
            os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        finally:  # whatever it left running would disturb the next
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    with log.open("r+b") as file:
        file.seek(first)
        printed = file.read()
        if len(printed) > KEPT:
            printed = printed[-KEPT:]
            file.seek(first)
            file.write(printed)
            file.truncate()
    return status, printed.decode(errors="replace")


def environment() -> dict[str, str]:
    """Variables that the stages get."""
    ours = {
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": str(ROOT),
        "MPLBACKEND": "Agg",
        "PYTEST_TIMEOUT": "60",  # of pytest-timeout, where it is installed
        "TRITON_CACHE_DIR": str(Path(tempfile.gettempdir(), "first_contact_cache")),
    }
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | ours


def _note(out: Path, line: str) -> None:
    print(line, flush=True)
    with contextlib.suppress(OSError), (out / "summary.txt").open("a") as file:
        file.write(line + "\n")


def heed_signals() -> None:
    """Be ended by an interrupt in the background too, and take the stage that runs along."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _end)


def _end(number: int, frame: object) -> None:
    # By the system's list: one that is being started may have no name here yet.
    for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(child), signal.SIGKILL)
    sys.exit(128 + number)


def main(argv: list[str] | None = None) -> int:
    """Run the chosen stages, then print the summary and the verdicts; the status is 0 whatever became of the stages."""
    start = time.monotonic()
    parser = argparse.ArgumentParser(
        prog="bash bench/first_contact/first_contact.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rehearse", action="store_true", help="walk the stages without a GPU")
    rehearse = parser.parse_args(argv).rehearse
    out = Path(os.environ.get("OUT") or Path(tempfile.gettempdir(), "first_contact"))
    out.mkdir(parents=True, exist_ok=True)
    known = {stage.name: stage for stage in stages(out.resolve(), rehearse=rehearse)}
    names = (os.environ.get("STAGES") or FIRST).split()
    if unknown := [name for name in names if name not in known]:
        parser.error(f"STAGES names {' '.join(unknown)}; there are {' '.join(known)}")
    _note(out, f"commit {os.environ.get('COMMIT', 'unknown')}, stages: {' '.join(names)}")
    chosen = [known[name] for name in names]
    if rehearse:  # the limits are those of another machine
        chosen = [replace(stage, limit=None) for stage in chosen]
    run(chosen, out, end=float(os.environ.get("END", "3600" if rehearse else "470")), start=start)
    print(f"----- {time.monotonic() - start:.0f} s, {out}: {' '.join(sorted(p.name for p in out.iterdir()))}")
    with contextlib.suppress(OSError):
        print((out / "summary.txt").read_text(), end="", flush=True)
        print(_run(known[LAST], 3600 if rehearse else VERDICTS, out / "log.txt")[1], end="")
    return 0


if __name__ == "__main__":
    heed_signals()
    sys.exit(main())
