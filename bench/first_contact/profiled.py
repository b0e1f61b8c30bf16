"""Bank conflicts, occupancy and stalls of the kernels, by Nsight Compute.

``python -m bench.first_contact.profiled FILE [cuda|cpu]`` has ncu run this module alone and write what it found to
FILE; with no FILE it makes the launches: each shape twice, the second with warm caches. On the CPU, a rehearsal, it
makes small ones and writes nothing.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from bench.gpu import activations
from fastent.kernels.covariance import ResidentCovariance

SHAPES = ((512, 128), (8192, 1024), (8192, 4096), (512, 4096))
SECTIONS = (
    "SpeedOfLight",
    "Occupancy",
    "LaunchStats",
    "WarpStateStats",
    "MemoryWorkloadAnalysis_Tables",
)
METRICS = (
    "l1tex__data_bank_conflicts_pipe_lsu_mem_shared_op_ld.sum",
    "l1tex__data_bank_conflicts_pipe_lsu_mem_shared_op_st.sum",
    "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum",
)


def launch(shapes: Iterable[tuple[int, int]], device: torch.device) -> None:
    """Evaluate each shape twice."""
    for n, d in shapes:
        h = activations(n, d, torch.bfloat16, device)
        evaluator = ResidentCovariance(n, d, device=h.device)
        out = evaluator.output()
        for _ in range(2):
            evaluator(h, out)


def main(argv: list[str] | None = None) -> int:
    """Make the launches, or have them profiled; the exit status of ncu."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments:
        launch(SHAPES, torch.device("cuda", 0))
        torch.cuda.synchronize()
        return 0
    if arguments[1:] == ["cpu"]:
        launch(((41, 35), (20, 140)), torch.device("cpu"))
        print("no GPU: nothing to profile")
        return 0
    sections = [part for section in SECTIONS for part in ("--section", section)]
    command = (
        *(
            "ncu",
            "--clock-control",
            "none",
            "-k",
            "regex:(covariance|gram|mean)_kernel",
            *sections,
            "--metrics",
            ",".join(METRICS),
        ),
        *(sys.executable, "-m", "bench.first_contact.profiled"),
    )
    with Path(arguments[0]).open("w") as file:
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode
    print(*Path(arguments[0]).read_text().splitlines()[-4:], sep="\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
