"""The trainer on the GPU: rates of several stacks, the same bits twice, and E1's baseline to grokking.

``python -m bench.first_contact.e1 DIR [cuda|cpu]`` needs no command line. It writes ``DIR/e1.json`` as it goes, and a
row for `bench.report` to ``DIR/gpu.jsonl``: seed-steps a second of 10 seeds here and on this machine's CPU, one by one
or stacked, by the number of threads that serves it best. Beside T_grok of each seed stands that of the committed runs
on a CPU; the two differ where rounding does.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from bench.gpu import device_environment
from bench.harness import ROOT
from fastent.grokking.experiments.data import read_run, unpack
from fastent.grokking.train.config import preset
from fastent.grokking.train.runs import Job
from fastent.grokking.train.stack import Stack
from fastent.grokking.train.storage import JsonLines, StopRequest
from fastent.grokking.train.sweep import run_jobs

RECORDED = ROOT / "bench" / "results" / "paper" / "e1-baseline-add.parquet"


def seconds_a_step(stack: Stack, steps: int) -> float:
    """Wall time of a step, after some that compile, capture and warm."""
    for _ in range(min(5, steps)):
        stack.train_step()
    _wait()
    start = time.perf_counter()
    for _ in range(steps):
        losses = stack.train_step()
    _wait()
    seconds = (time.perf_counter() - start) / steps
    assert bool(losses.isfinite().all()), losses
    return seconds


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def rates(device: torch.device, steps: int) -> dict[str, float]:
    """Seed-steps a second by number of seeds, on the CPU by number of threads too."""
    config, found = preset("paper"), {}
    for seeds in (1, 3, 10, 32) if device.type == "cuda" else (1,):
        found[f"{seeds} seeds"] = seeds / seconds_a_step(
            Stack(config, tuple(range(seeds)), device=device), steps
        )
        print(f"{seeds} seeds: {found[f'{seeds} seeds']:,.0f} seed-steps a second", flush=True)
    before = torch.get_num_threads()
    cores = os.cpu_count() or 1
    ways = (
        itertools.product((1, 10), sorted({1, min(4, cores), cores})) if device.type == "cuda" else ((1, 1),)
    )
    for seeds, threads in ways:
        torch.set_num_threads(threads)
        seconds = seconds_a_step(Stack(config, tuple(range(seeds))), max(2, steps // 10))
        found[f"CPU, {seeds} seeds, {threads} threads"] = seeds / seconds
    torch.set_num_threads(before)
    return found


def same_bits(device: torch.device, steps: int) -> bool:
    """Whether two stacks of the same seeds have the same losses, bit for bit."""
    first, second = (Stack(preset("paper"), (0, 1), device=device) for _ in range(2))
    return all(torch.equal(first.train_step(), second.train_step()) for _ in range(steps))


def train_to_grokking(device: torch.device, max_steps: int) -> dict[str, Any]:
    """Train E1's baseline with seeds 0 to 2; what the runs say when they are done, and what is recorded of a CPU."""
    job = Job("e1", "baseline", preset("paper", max_steps=max_steps), (0, 1, 2))
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, StopRequest() as stop:
        (outcome,) = run_jobs([job], Path(folder), device=str(device), stop=stop)
        seconds = time.perf_counter() - start
        runs = [read_run(Path(folder, job.run_name(seed))) for seed in job.seeds]
    return {
        "error": outcome.error,
        "seconds": seconds,
        "done": {run.seed: run.done for run in runs},
        "monitor_seconds": {
            run.seed: sum(row.get("monitor_seconds", 0) for row in run.timing) for run in runs
        },
        "t_grok_of_the_recorded_cpu_runs": {
            run.seed: run.done and run.done["t_grok"] for run in unpack(RECORDED) if run.seed in job.seeds
        },
    }


def main(argv: list[str] | None = None) -> int:
    """Measure, then train; 1 where a run did not end well or the bits differ."""
    folder, name = [*(sys.argv[1:] if argv is None else argv), "cuda"][:2]
    out, device = Path(folder), torch.device(name)
    out.mkdir(parents=True, exist_ok=True)
    cuda = device.type == "cuda"
    steps = 300 if cuda else 3
    found: dict[str, Any] = {}

    def save(**values: Any) -> None:
        found.update(values)
        (out / "e1.json").write_text(json.dumps(found, indent=1) + "\n")
        print(values, flush=True)

    here = device_environment(device)
    save(**here)
    measured = rates(device, steps)
    save(seed_steps_per_second=measured)
    if cuda:
        row = {
            "run": datetime.now(UTC).isoformat(timespec="seconds"),
            "part": "e1",
            "op": "e1",
            "seeds": 10,
            "seed_steps_per_second": measured["10 seeds"],
            "cpu_seed_steps_per_second": max(
                rate for name, rate in measured.items() if name.startswith("CPU")
            ),
        }
        JsonLines(out / "gpu.jsonl").append({**row, **here})
    same = same_bits(device, steps)
    save(two_stacks_have_the_same_bits=same)
    trained = train_to_grokking(device, 30_000 if cuda else 2)
    save(trained_to_grokking=trained)
    return int(not same or trained["error"] is not None)


if __name__ == "__main__":
    sys.exit(main())
