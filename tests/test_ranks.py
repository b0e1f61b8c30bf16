"""Models spread over two processes (gloo): whole activations are recorded, and training does not notice."""

import json
import subprocess
import sys
from typing import Any

import pytest

SECONDS = 300
"""That a machine may take for both processes; one that waits longer ends and shows where it waits."""

START = """
import json, sys, warnings, torch, torch.distributed as dist
from torch import nn
import fastent
warnings.simplefilter("ignore")  # FSDP1 says that it is deprecated
rank, store = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
out = {}
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

def in_training(net, layers):
    monitor = fastent.SpectralEntropyMonitor(net, "batch", layers, every=1)
    net(x).square().mean().backward()
    found = attempt(lambda: entropies(monitor.step(0) + monitor.flush()))
    monitor.close()
    return found

def passes(net):
    heads = []
    net.head.register_forward_hook(lambda module, args, output: heads.append(1))
    monitor = fastent.SpectralEntropyMonitor(net, x, "first", every=1, batch_size=24)
    for step in range(2):
        monitor.step(step)
    return len(heads)

def attempt(function):
    try:
        return function()
    except (RuntimeError, ValueError) as error:
        return str(error)
"""


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
    for step in range(2):
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

fsdp1 = {}
for strategy in ("FULL_SHARD", "SHARD_GRAD_OP"):
    for original in (True, False):
        without, _ = train(strategy, original, "never")
        for when in ("around", "between"):
            def run():
                weights, history = train(strategy, original, when)
                return [weights == without, len(history), entropies(history[:2]) if when == "around" else {}]
            fsdp1[f"{strategy} {original} {when}"] = attempt(run)
net = wrapped("FULL_SHARD", True)
out["fsdp1"], out["named"] = fsdp1, entropies(fastent.SpectralEntropyMonitor(net, x, ["*", ""]).step(0))
out["passes, FSDP1"] = passes(wrapped("FULL_SHARD", True))
out["batch, FSDP1"] = in_training(wrapped("FULL_SHARD", True), ["first", "act", "head", ""])
out["plain"] = entropies(fastent.SpectralEntropyMonitor(make(), x, ["first", "act", "head", ""]).step(0))
"""


TENSOR_PARALLEL = """
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

def parallel(net, mesh, local=True):
    plan = {"first": ColwiseParallel(use_local_output=local), "head": RowwiseParallel()}
    return parallelize_module(net, mesh, plan)

def probed(net, layers):
    return attempt(lambda: entropies(fastent.SpectralEntropyMonitor(net, x, layers).step(0)))

mesh = init_device_mesh("cpu", (2,))
net = parallel(make(), mesh)
out["whole"] = probed(net, ["first", "head", ""])
out["part"] = probed(net, "act")
out["batch, whole"], out["batch, part"] = in_training(net, ["first", "head", ""]), in_training(net, "act")
out["of a function"] = probed(net, lambda net, x: {"part": net.act(net.first(x))})
out["kept as DTensor"] = probed(parallel(make(), mesh, local=False), ["first", "act", "head"])
out["hooks"] = sum(len(module._forward_hooks) for module in net.modules())
both = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
net = parallel(make(), both["tp"])
net = fully_shard(net, mesh=both["dp"])
out["FSDP2 too"] = probed(net, ["first", "head"])
out["FSDP2 too, part"] = probed(net, "act")
out["batch, FSDP2 too"] = in_training(net, ["first", "head"])
out["passes, FSDP2"], out["passes, TP"] = passes(fully_shard(make(), mesh=mesh)), passes(parallel(make(), mesh))
out["FSDP2 alone"] = probed(fully_shard(make(), mesh=mesh), ["first", "act", "head"])
out["batch, FSDP2 alone"] = in_training(fully_shard(make(), mesh=mesh), ["first", "act", "head"])
mine = x.split((40, 8))[rank]
for case, net, part in (
    ("FSDP1, a part each", wrapped("FULL_SHARD", True), mine),
    ("FSDP2, a part each", fully_shard(make(), mesh=mesh), mine),
    ("FSDP2, none on one", fully_shard(make(), mesh=mesh), x if rank == 0 else x[:0]),
    ("TP, the same on both", parallel(make(), mesh), x),
):
    records = fastent.SpectralEntropyMonitor(net, part, ["first", "head"], across_ranks=True).step(0)
    out[case] = [entropies(records), [record.n for record in records]]

def failing_on_rank_0(net, probe):
    monitor = fastent.SpectralEntropyMonitor(net, probe, ["first", "head"], every=1, on_error="record")
    found = []
    for step in range(2):
        monitor._evaluator.forget()
        if rank == 0 and step == 0:
            monitor._evaluator._devices["first"] = torch.device("meta")  # from where it has moved
        if probe == "batch":
            net(x)
        found.append([[r.layer, r.status, r.normalized] for r in monitor.step(step) + monitor.flush()])
    monitor.close()
    return found

net = make()
fully_shard([net.first, net.act], mesh=mesh)
fully_shard(net.head, mesh=mesh)
out["failing, FSDP2"] = failing_on_rank_0(fully_shard(net, mesh=mesh), (x,))
out["failing, TP"] = failing_on_rank_0(parallel(make(), mesh), (x,))
out["failing, batch"] = failing_on_rank_0(parallel(make(), mesh), "batch")
"""

STOP = """
def stopping(above):
    monitor = fastent.SpectralEntropyMonitor(threshold=0.5, stopping=fastent.StopAfterCrossing(0), mode="sync")
    rows = torch.outer(torch.arange(20.0), torch.ones(3))
    monitor.observe(0, torch.randn(20, 3) if above else rows, layer="a")
    return monitor

out["asked for"] = attempt(lambda: stopping(True).should_stop())
out["no policy"] = fastent.SpectralEntropyMonitor().should_stop()
out["own"] = stopping(rank == 0).should_stop(agree=False)
out["one"] = [stopping(rank == stays).should_stop(agree=True) for stays in (0, 1)]
out["none"] = stopping(True).should_stop(agree=True)
out["sharded"] = stopping(False).should_stop(agree=True) if rank == 0 else (
    fastent.SpectralEntropyMonitor(threshold=0.5, stopping=fastent.StopAfterCrossing(0)).should_stop(agree=True))
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes put into `out`."""
    store = str(tmp_path_factory.mktemp("group") / "store")
    end = "\nprint(json.dumps(out))\ndist.destroy_process_group()"
    watchdog = f"import faulthandler\nfaulthandler.dump_traceback_later({SECONDS}, exit=True)\n"
    script = watchdog + START + FSDP1 + TENSOR_PARALLEL + STOP + end
    processes = [
        subprocess.Popen([sys.executable, "-c", script, str(rank), store], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=2 * SECONDS)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    return [json.loads(output) for output in outputs]


def same(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    return all(
        found[name] == [pytest.approx(expected[name][0], rel=1e-5), expected[name][1]] for name in found
    )


def test_an_fsdp1_model_trains_to_the_same_bits_with_a_probe_around_each_update(ranks: Any) -> None:
    for rank, out in enumerate(ranks):
        cases = out["fsdp1"]
        assert len(cases) == 8
        refused = cases["SHARD_GRAD_OP True between"]
        assert "call step after backward(), or shard by FSDP2" in refused
        for case, outcome in cases.items():
            if outcome is not refused:
                count = 0 if rank else 8 if "around" in case else 4
                assert outcome[:2] == [True, count], (rank, case)
                assert same(outcome[2], out["plain"])


def test_no_wrapper_of_fsdp1_is_part_of_a_layers_name(ranks: Any) -> None:
    assert list(ranks[0]["named"]) == ["first", "act", "head", ""]
    assert same(ranks[0]["named"], ranks[0]["plain"])
    assert ranks[1]["named"] == {}


@pytest.mark.parametrize("case", ["whole", "kept as DTensor", "FSDP2 too", "FSDP2 alone"])
def test_a_layer_under_tensor_parallelism_is_recorded_whole(ranks: Any, case: str) -> None:
    found = ranks[0][case]
    assert len(found) == (2 if case == "FSDP2 too" else 3)
    assert same(found, ranks[0]["plain"])
    assert ranks[1][case] == {}
    assert ranks[0]["hooks"] == ranks[1]["hooks"] == 2  # those of the two parallel layers


@pytest.mark.parametrize("case", ["FSDP1", "FSDP2", "TP"])
def test_passes_of_a_sharded_model_are_whole_on_every_rank(ranks: Any, case: str) -> None:
    for out in ranks:
        assert out[f"passes, {case}"] == 3 * 2  # the check and two steps, of two parts each


@pytest.mark.parametrize("case", ["FSDP2", "TP", "batch"])
def test_an_error_on_one_rank_leaves_the_ranks_in_step(ranks: Any, case: str) -> None:
    for rank, out in enumerate(ranks):
        first, second = out[f"failing, {case}"]
        if rank == 0:
            assert [record[:2] for record in first] == [["first", "failed"], ["head", "failed"]]
        else:
            assert len(first) == (2 if case == "batch" else 0)
        for name, status, normalized in second:
            assert status == "ok"
            assert normalized == pytest.approx(out["plain"][name][0], rel=1e-5)
        assert len(second) == (2 if case == "batch" or rank == 0 else 0)


@pytest.mark.parametrize("case", ["whole", "FSDP1", "FSDP2 too", "FSDP2 alone"])
def test_every_rank_records_what_its_batch_gives_of_a_sharded_model_and_a_parallel_layer_whole(
    ranks: Any, case: str
) -> None:
    for out in ranks:  # the same batch on both
        found = out[f"batch, {case}"]
        assert len(found) == {"whole": 3, "FSDP1": 4, "FSDP2 too": 2, "FSDP2 alone": 3}[case]
        assert same(found, out["plain"])


@pytest.mark.parametrize(
    ("case", "n"),
    [
        ("FSDP1, a part each", 48),
        ("FSDP2, a part each", 48),
        ("FSDP2, none on one", 48),
        ("TP, the same on both", 96),  # counted as often as they are held
    ],
)
def test_a_sharded_model_evaluates_the_rows_of_every_rank_and_all_record_the_whole(
    ranks: Any, case: str, n: int
) -> None:
    assert ranks[0][case] == ranks[1][case]
    found, counts = ranks[0][case]
    assert list(found) == ["first", "head"]
    assert same(found, ranks[0]["plain"])
    assert counts == [n, n]


@pytest.mark.parametrize("case", ["part", "of a function", "FSDP2 too, part", "batch, part"])
def test_a_part_of_a_layer_that_nobody_can_put_together_is_refused_on_every_rank(
    ranks: Any, case: str
) -> None:
    name = "part" if case == "of a function" else "act"
    message = (
        f"layer '{name}' holds another part of its activations on each rank (tensor parallelism), here of "
    )
    for out in ranks:
        assert out[case].startswith(message + "shape (48, 8)")
        assert "row-parallel one behind it" in out[case]


def test_a_decision_to_stop_is_agreed_over_the_ranks_or_asks_to_be(ranks: Any) -> None:
    for rank, out in enumerate(ranks):
        assert out["asked for"].startswith("should_stop() answers for this rank alone, and there are 2: ")
        assert "should_stop(agree=True)" in out["asked for"]
        assert out["no policy"] is False
        assert out["own"] is (rank == 1)
        assert out["one"] == [True, True]
        assert out["none"] is False
        assert out["sharded"] is True
