"""Another default device or dtype changes nothing: every tensor of the library names its own (fault 35)."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastent
from fastent import linalg

HOUSE = Path(fastent.__file__).parent.parent
STUDY = {"train", "experiments", "statements", "grokking"}  # a program of its own, with its own defaults
FACTORIES = {
    "arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "ones", "rand",
    "randint", "randn", "randperm", "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros",
}  # fmt: skip

CALLS = """
import contextlib, dataclasses, json, math, sys, warnings
import torch, torch.distributed as dist, fastent
from torch import nn

torch.set_num_threads(int(sys.argv[1]))
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
g = torch.Generator().manual_seed(0)
wide = torch.randn(40, 300, generator=g)
h = torch.randn(600, 24, generator=g) * torch.linspace(0.1, 2.0, 24)
batch = torch.stack([h[:50], torch.zeros(50, 24), h[50:100], torch.full((50, 24), math.nan)])
tokens = torch.randn(20, 5, 8, generator=g).half()
model = nn.Sequential(nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 2))


def bits(value):
    if isinstance(value, torch.Tensor):
        assert value.device.type == "cpu", value.device
        return [str(value.dtype), list(value.shape), value.flatten().view(torch.uint8).tolist()]
    if dataclasses.is_dataclass(value):
        return {f.name: bits(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        return [bits(item) for item in value]
    return value.hex() if isinstance(value, float) else str(value)


def monitored():
    with fastent.SpectralEntropyMonitor(model, h, "1", every=1) as monitor:
        monitor.step(0)
        monitor.observe(0, wide, layer="wide")
        return monitor.flush() + monitor.history


CASES = {
    "entropy, covariance side": lambda: fastent.spectral_entropy(h),
    "entropy, Gram side": lambda: fastent.spectral_entropy(wide),
    "entropy of integers": lambda: fastent.spectral_entropy((10 * h).long()),
    "entropy of tokens": lambda: fastent.spectral_entropy(tokens, tokens="mean"),
    "entropy at an extreme scale": lambda: fastent.spectral_entropy(h.double() * 1e200),
    "constant rows": lambda: fastent.spectral_entropy(h[:1].expand(9, 24)),
    "a batch with a dead and a NaN member": lambda: fastent.spectral_entropy(batch, batch_dims=1),
    "the paper's convention": lambda: fastent.spectral_entropy(h, convention="paper"),
    "covariance": lambda: fastent.covariance(h),
    "large covariance": lambda: fastent.covariance(wide.repeat(1, 3)),
    "moments": lambda: fastent.Moments().update(h[:1]).update(h[1:]).all_reduce().spectral_entropy(),
    "mean of moments": lambda: fastent.Moments().update(h).mean,
    "sampling error": lambda: fastent.sampling_error(h),
    "sampling error, Gram side": lambda: fastent.sampling_error(wide),
    "mixing": lambda: fastent.mix_representations(h),
    "monitor": monitored,
}


@contextlib.contextmanager
def default_device(name):
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


SURROUNDINGS = {
    "with torch.device('meta')": lambda: torch.device("meta"),
    "set_default_device('meta')": lambda: default_device("meta"),
    "float16": lambda: default_dtype(torch.float16),
    "float64": lambda: default_dtype(torch.float64),
}
plain = {name: bits(call()) for name, call in CASES.items()}
assert plain == {name: bits(call()) for name, call in CASES.items()}
changed = []
for surrounding, make in SURROUNDINGS.items():
    for name, call in CASES.items():
        try:
            with make():
                seen = call()
            if bits(seen) != plain[name]:
                changed.append(f"{name}, {surrounding}: other values")
        except Exception as error:
            changed.append(f"{name}, {surrounding}: {type(error).__name__}: {error}")
print(json.dumps([len(CASES) * len(SURROUNDINGS), changed]))
dist.destroy_process_group()
"""


@pytest.mark.parametrize("threads", [1, 2])
def test_no_call_depends_on_the_default_device_or_dtype(threads):
    # With one thread OpenBLAS gets addresses, where the processor is one that it serves.
    command = [sys.executable, "-c", CALLS, str(threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == [64, []]


def nameless(path: Path) -> list[str]:
    """Calls of torch's factories in a file that leave the device or the dtype to the defaults."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        owner = node.func.value
        if isinstance(owner, ast.Name) and owner.id == "torch" and node.func.attr in FACTORIES:
            missing = {"device", "dtype"} - {keyword.arg for keyword in node.keywords}
            if missing:
                found.append(f"{path.name}:{node.lineno}: torch.{node.func.attr} without {sorted(missing)}")
    return found


def test_every_tensor_that_the_library_makes_names_its_device_and_dtype(tmp_path):
    files = [path for folder in ("fastent", "kernels") for path in (HOUSE / folder).rglob("*.py")]
    files = [path for path in files if not STUDY & set(path.relative_to(HOUSE).parts)]
    assert len(files) > 20
    assert [line for path in files for line in nameless(path)] == []
    (tmp_path / "made.py").write_text("import torch\ntorch.zeros(3, device='cpu')\ntorch.eye(2)\n")
    assert len(nameless(tmp_path / "made.py")) == 2


@pytest.mark.parametrize(
    "wrong",
    [
        torch.empty(4, 4, dtype=torch.float64, device="meta"),
        torch.empty(4, 4, dtype=torch.float32, device="cpu"),
        torch.empty(4, 8, dtype=torch.float64, device="cpu")[:, ::2],
    ],
    ids=["other device", "other dtype", "strided"],
)
def test_openblas_is_given_no_address_of_other_memory_than_it_writes_to(wrong):
    if linalg._library() is None:
        pytest.skip("NumPy is not from a wheel with OpenBLAS")
    right = torch.zeros(4, 4, dtype=torch.float64, device="cpu")
    for lower, a in ((wrong, right), (right, wrong)):
        with pytest.raises(TypeError, match="contiguous float64 on the CPU"):
            linalg.add_lower_syrk(lower, a, 1.0, first=True)
    with pytest.raises(TypeError, match=r"\(4, 4\)"):
        linalg.add_lower_syrk(right, torch.zeros(5, 4, dtype=torch.float64, device="cpu"), 1.0)
