"""Where a run was made: versions, processor, threads, commit; and what of it can change a last bit."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import subprocess
import warnings
from pathlib import Path
from typing import Any

import numpy
import torch

import fastent
from fastent.grokking.train.storage import RunWarning

BITS = ("torch", "cpu", "threads", "device")
"""Entries of `describe_environment` that may change the last bits of a training run."""


def describe_environment(device: str | torch.device = "cpu") -> dict[str, Any]:
    """Describe the machine and the software as JSON values; `device` is named as torch names it.

    Warns
    -----
    RunWarning
        Once, if fastent runs from a git checkout but git cannot tell its commit.
    """
    device = torch.device(device)
    return {
        "fastent": fastent.__version__,
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "triton": version("triton"),
        "platform": platform.platform(),
        "cpu": processor(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def changes_of_bits(recorded: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Name what differs between two environments that may change the last bits of a run, in words."""
    return [f"{key} {recorded.get(key)!r}, now {now[key]!r}" for key in BITS if recorded.get(key) != now[key]]


def processor() -> str:
    """Name the processor, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@functools.cache
def commit() -> str | None:
    """Name the commit of the checkout that fastent runs from, with "-dirty" if changed; None outside one."""
    root = Path(fastent.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    try:
        flags = ("--always", "--dirty", "--abbrev=40", "--exclude=*")
        command = ("git", "--no-optional-locks", "-C", str(root), "describe", *flags)
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        warnings.warn(f"the commit is not recorded: git failed ({error})", RunWarning, stacklevel=2)
        return None


def version(package: str) -> str | None:
    """Version of an installed distribution, None if it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
