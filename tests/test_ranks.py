"""Models spread over two processes (gloo): whole activations are recorded, and training does not notice."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

START = """
import json, sys, warnings, torch, torch.distributed as dist
from torch import nn
import fastent
warnings.simplefilter("ignore")  # FSDP1 says that it is deprecated
rank, store = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
x = torch.randn(48, 6, generator=torch.Generator().manual_seed(9))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.act, self.head = nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4)
    def forward(self, x):
        return self.head(self.act(self.first(x)))

def make():
    torch.manual_seed(0)
    return Net()

def entropies(records):
    return {record.layer: [record.normalized, record.d] for record in records}

def attempt(function):
    try:
        return function()
    except (RuntimeError, ValueError) as error:
        return str(error)
"""


def two_ranks(script: str, folder: Path) -> list[dict[str, Any]]:
    """What each of two processes put into `out`."""
    command = [
        sys.executable,
        "-c",
        START + script + "\nprint(json.dumps(out))\ndist.destroy_process_group()",
    ]
    processes = [
        subprocess.Popen([*command, str(rank), str(folder / "store")], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    return [json.loads(output) for output in outputs]


FSDP1 = """
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP, ShardingStrategy

def wrapped(strategy, original):
    net = make()
    options = {"use_orig_params": original, "sharding_strategy": ShardingStrategy[strategy],
               "device_id": torch.device("cpu")}
    net.head = FSDP(net.head, **options)
    return FSDP(net, **options)

def train(strategy, original, when):
    net = wrapped(strategy, original)
    opt = torch.optim.SGD(net.parameters(), lr=0.5)
    monitor = fastent.SpectralEntropyMonitor(net, x, ["first", "head"], every=1)
    for step in range(3):
        torch.manual_seed(10 * step + rank)
        loss = net(torch.randn(32, 6)).square().mean()
        if when == "between":
            monitor.step(step)
        opt.zero_grad()
        loss.backward()
        if when == "around":
            monitor.step(2 * step)
        opt.step()
        if when == "around":
            monitor.step(2 * step + 1)
    with FSDP.summon_full_params(net):
        return [p.tolist() for p in net.parameters()], monitor.history

out = {}
for strategy in ("FULL_SHARD", "SHARD_GRAD_OP"):
    for original in (True, False):
        without, _ = train(strategy, original, "never")
        for when in ("around", "between"):
            def run():
                weights, history = train(strategy, original, when)
                return [weights == without, len(history), entropies(history[:2]) if when == "around" else {}]
            out[f"{strategy} {original} {when}"] = attempt(run)
net = wrapped("FULL_SHARD", True)
out["named"] = entropies(fastent.SpectralEntropyMonitor(net, x, ["*", ""]).step(0))
out["plain"] = entropies(fastent.SpectralEntropyMonitor(make(), x, ["first", "act", "head", ""]).step(0))
"""


def test_an_fsdp1_model_trains_to_the_same_bits_with_a_probe_around_each_update(tmp_path: Path) -> None:
    first, second = two_ranks(FSDP1, tmp_path)
    refused = first.pop("SHARD_GRAD_OP True between"), second.pop("SHARD_GRAD_OP True between")
    assert all("call step after backward(), or shard by FSDP2" in message for message in refused)
    plain, named = first.pop("plain"), first.pop("named")
    assert plain == second.pop("plain")
    assert named == pytest.approx(plain)
    assert list(named) == ["first", "act", "head", ""]  # no wrapper in a name
    assert second.pop("named") == {}
    assert len(first) == len(second) == 7
    for case in first:
        same, count, _ = first[case]
        assert (same, count) == (True, 6 if "around" in case else 3 * 2), case
        assert second[case][:2] == [True, 0], case
