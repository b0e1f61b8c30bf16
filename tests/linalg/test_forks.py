"""A forked child that lost torch's threads says so (fault 45)."""

import json
import os
import subprocess
import sys

import pytest

FORKED = """
import json, os, signal, sys, warnings
import torch, fastent
from fastent import linalg
from fastent.activations import RealTokens

if linalg.openblas_pool() is None or not os.path.exists("/proc/self/task"):
    print("threads cannot be counted here")
    sys.exit()
h = torch.randn(600, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
packed = torch.cat([torch.tensor([1.0, 0.0, 1.0]).double(), h[0], h[0], torch.zeros(64 * 65 // 2).double()])
torch.set_num_threads(1)  # starts no pool
model = torch.nn.Sequential(torch.nn.Linear(64, 256)).double()
mask = torch.ones(400, 300)
monitor = fastent.SpectralEntropyMonitor(model, h, layers="0", check=False)
torch.set_num_threads(2)
if sys.argv[1] == "pool":
    torch.ones(1_000_000).exp()
if sys.argv[2] == "1":
    torch.set_num_threads(1)
read, write = os.pipe()
warnings.simplefilter("ignore")
child = os.fork()
if child == 0:
    signal.alarm(30)  # a child that waits for ever is not left behind
    seen = []
    calls = (
        lambda: fastent.spectral_entropy(h),
        lambda: fastent.covariance(h),
        lambda: fastent.Moments().update(h),
        lambda: fastent.Moments.unpack(packed).mean,
        lambda: fastent.sampling_error(h),
        lambda: fastent.mix_representations(h),
        lambda: RealTokens(mask),
        lambda: fastent.SpectralEntropyMonitor(model, h, layers="0"),
        lambda: monitor.step(0),
    )
    for threads in (None, 1):
        if threads:
            torch.set_num_threads(threads)
        for call in calls:
            try:
                call()
                seen.append("ok")
            except Exception as error:
                seen.append(str(error))
    os.write(write, json.dumps(seen).encode())
    os._exit(0)
os.waitpid(child, 0)
print(os.read(read, 100_000).decode())
"""


def forked(mode: str, threads: int) -> str:
    command = [sys.executable, "-c", FORKED, mode, str(threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
    return done.stdout


@pytest.mark.parametrize(
    ("mode", "threads", "refused"), [("pool", 2, True), ("pool", 1, False), ("none", 2, False)]
)
def test_a_forked_child_raises_where_it_would_wait_for_threads_of_its_parent(mode, threads, refused):
    output = forked(mode, threads)
    if output.startswith("threads cannot"):
        pytest.skip(output.strip())
    seen = json.loads(output)
    if refused:
        assert all(
            "spawn" in message and "set_num_threads(1)" in message for message in seen[: len(seen) // 2]
        )
    else:
        assert seen[: len(seen) // 2] == ["ok"] * 9
    assert seen[len(seen) // 2 :] == ["ok"] * 9
