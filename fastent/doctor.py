"""What fastent would use on this machine, and why."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch

from fastent import linalg
from fastent.covariance import triton_obstacle
from fastent.grokking.train.environment import commit, processor

EXTRA = ("tyro", "rich", "safetensors", "matplotlib", "pyarrow", "jinja2")
"""What the extra ``train`` installs."""

INSTALL = "pip install '.[train]' in a clone of fastent"
"""How to get it. Not by the name alone: on the package index that is another project's."""


def examine() -> list[tuple[str, str]]:
    """Look at software, processor, GPUs and extras.

    Returns
    -------
    list of (str, str)
        What was looked at, and what was found, in the order for reading.
    """
    found = [
        ("fastent", _version("fastent") + (f", commit {commit()}" if commit() else "")),
        ("python", platform.python_version()),
        (
            "torch",
            f"{torch.__version__}, "
            + (f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"),
        ),
        ("triton", _version("triton")),
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
    versions = {name: _version(name) for name in EXTRA}
    found += versions.items()
    missing = [name for name, version in versions.items() if version == MISSING]
    if missing:
        found.append(("to do", f"{INSTALL}, for {', '.join(missing)}"))
    return found


MISSING = "not installed"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return MISSING


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
