"""Monitors of several processes (gloo) that evaluate the rows of all of them together."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastent.monitor.monitor import SpectralEntropyMonitor

# Forked from one interpreter, which has imported torch once for all; or each started by torchrun.
START = """
import datetime, json, os, signal, sys, time, warnings, torch, torch.distributed as dist
from torch import nn
import fastent
from fastent.monitor.monitor import SpectralEntropyMonitor as Monitor
folder, seconds = sys.argv[1], float(sys.argv[2])
torch.set_num_threads(1)
options = {"timeout": datetime.timedelta(seconds=seconds)}
if "RANK" in os.environ:
    dist.init_process_group("gloo", **options)
else:
    rank = next((rank for rank in range(3) if os.fork() == 0), 3)
    where = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=4, **options)
rank, out = dist.get_rank(), {}
sent, all_reduce = [], dist.all_reduce

def counted(tensor, **options):
    sent.append(tensor.nbytes)
    return all_reduce(tensor, **options)

dist.all_reduce = counted

def inputs(n, d, seed=0):
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8)).double()

def numbers(records):
    return [[r.step, r.layer, r.n, r.status, r.normalized, r.mask] for r in records]

def attempt(function):
    try:
        return function()
    except (ArithmeticError, RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
"""

END = """
with open(f"{folder}/{rank}.json", "w") as file:
    json.dump(out, file)
dist.barrier()
dist.destroy_process_group()
if "RANK" not in os.environ and rank == 3:
    assert all(os.wait()[1] == 0 for _ in range(3))
"""

SCENARIOS = """
# The whole, on each rank by itself.
x = inputs(512, 16) + 100.0
out["whole"] = numbers(Monitor(make(), x, ["2", "0"]).step(0))
short = inputs(20, 16)
out["short whole"] = numbers(Monitor(make(), short, ["0"]).step(0))

# Some have all rows.
monitor = Monitor(make(), x.split((300, 212, 0, 0))[rank], ["2", "0"], every=1, across_ranks=True)
out["needs"], out["before"] = monitor.needs_every_rank, len(sent)
out["first"] = numbers(monitor.step(0))
out["sent first"], sent[:] = list(sent), []
if rank == 3:
    time.sleep(0.7)  # longer than the others wait without a word
out["second"], out["sent second"] = numbers(monitor.step(1)), list(sent)
out["layers"] = monitor.layers
state = [monitor.state_dict()]
dist.broadcast_object_list(state, 0)
resumed = Monitor(make(), x.split((0, 0, 12, 500))[rank], ["2", "0"], every=1, across_ranks=True)
resumed.load_state_dict(state[0])
out["resumed"] = numbers(resumed.step(2))
out["short"] = numbers(Monitor(make(), short.split((1, 0, 18, 1))[rank], ["0"], across_ranks=True).step(0))
out["one row"] = numbers(Monitor(make(), short.split((0, 1, 0, 0, 19))[rank], ["0"], across_ranks=True).step(0))

# NaN on some.
out["nan"] = []
for where in ((1,), (0, 1)):
    mine = x.split((300, 212, 0, 0))[rank].clone()
    mine[7:8, 3] = torch.nan if rank in where else 0.0
    monitor = Monitor(make(), mine, ["2", "0"], across_ranks=True)
    out["nan"].append([[r.layer, r.status, r.message] for r in monitor.step(0)])

# An error on one.
def fail(module, args, output):
    if failing:
        raise ArithmeticError("no luck")

for on_error in ("raise", "record"):
    net, failing = make(), False
    monitor = Monitor(net, x.split((300, 212, 0, 0))[rank], "2", every=1, across_ranks=True, on_error=on_error)
    monitor.step(0)
    failing = rank == 1
    net[1].register_forward_hook(fail)
    with warnings.catch_warnings(record=True):
        found = attempt(lambda: [[r.status, r.d, r.message] for r in monitor.step(1)])
    failing = False
    out[on_error] = [found, numbers(monitor.step(2))]

# Another step on one.
monitor = Monitor(make(), x.split((300, 212, 0, 0))[rank], "2", every=1, across_ranks=True)
out["steps"] = attempt(lambda: monitor.step(7 if rank == 2 else 5))

# Layers that run on some, and not always.
class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(nn.Linear(16, 4 + i) for i in range(3)).double()
        self.used = [0]
    def forward(self, x):
        return [self.experts[i](x) for i in self.used]

net = Mixture()
monitor = Monitor(net, x.split((300, 200, 11, 1))[rank], "experts", every=1, across_ranks=True)
out["experts"] = [numbers(monitor.step(0))]
net.used = [0, 2] if rank == 1 else [0]
out["experts"].append(numbers(monitor.step(1)))
net.used = []
out["experts"].append(numbers(monitor.step(2)))
out["experts named"] = monitor.layers

# Padding.
class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = make()[0]
    def forward(self, tokens, attention_mask):
        return self.first(tokens)

tokens = inputs(60, 16).view(12, 5, 16)
mask = (torch.arange(5) < 1 + torch.arange(12)[:, None] % 5).long()
def probe(parts):
    both = {"tokens": tokens, "attention_mask": mask}
    return {name: value.split(parts)[min(rank, len(parts) - 1)] for name, value in both.items()}
out["padded"] = [numbers(Monitor(Tokens(), probe(parts), "first", tokens="flatten", across_ranks=ranks).step(0))
                 for parts, ranks in (((12,), False), ((3, 0, 8, 1), True))]

# Batches: two on each of the first ranks, an empty one, no pass at all; then no pass on any.
net = make()
monitor = Monitor(net, "batch", ["2", "0"], every=1, across_ranks=True)
out["batch"] = []
for step in range(3):
    for part in x.split((300, 212, 0, 0))[rank].split(150):
        if step < 2 and rank < 3:
            net(part)
    with warnings.catch_warnings(record=True):
        out["batch"].append(numbers(monitor.step(step)))
in_parts = Monitor(make(), x.split((300, 212, 0, 0))[rank], ["2", "0"], batch_size=299, across_ranks=True)
out["in parts"] = numbers(in_parts.step(0))

# One decision.
monitor = Monitor(make(), x.split((300, 212, 0, 0))[rank], "2", threshold=1.0, across_ranks=True,
                  stopping=fastent.StopAfterCrossing(0))
monitor.step(0)
sent[:] = []
out["stop"] = [monitor.should_stop(), list(sent)]
monitor.observe(1, x, layer="own")
out["own"] = attempt(monitor.should_stop)
out["agreed"] = monitor.should_stop(agree=True)
"""


def launch(folder: Path, body: str, *, by: str, seconds: float = 60.0) -> list[dict[str, Any] | None]:
    """What each of four ranks put into `out`; None for one that did not come to the end."""
    script = folder / "script.py"
    script.write_text(START + body + END)
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"] if by == "torchrun" else []
    )
    command = [sys.executable, *launcher, str(script), str(folder), str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    found = [folder / f"{rank}.json" for rank in range(4)]
    outputs = [json.loads(path.read_text()) if path.exists() else None for path in found]
    assert any(outputs), done.stderr
    return outputs


@pytest.fixture(scope="module", params=["fork", pytest.param("torchrun", marks=pytest.mark.nightly)])
def ranks(request: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Outcomes of every scenario on each of four ranks."""
    outputs = launch(tmp_path_factory.mktemp("group"), SCENARIOS, by=request.param)
    assert all(outputs)
    return outputs  # type: ignore[return-value]


def whole(found: list[list[Any]], expected: list[list[Any]], step: int) -> bool:
    """Whether records are those of the whole, at `step`."""
    return len(found) == len(expected) and all(
        own[0] == step and own[1:4] == other[1:4] and abs(own[4] - other[4]) < 1e-13 and own[5:] == other[5:]
        for own, other in zip(found, expected, strict=True)
    )


def test_shards_on_some_ranks_are_evaluated_as_the_whole_on_all(ranks: Any) -> None:
    for out in ranks:
        assert [record[1:4] for record in out["whole"]] == [["2", 512, "ok"], ["0", 512, "ok"]]
        assert whole(out["first"], out["whole"], 0)
        assert whole(out["second"], out["whole"], 1)  # for which one was late
        assert whole(out["resumed"], out["whole"], 2)  # from rank 0's state, cut in another way
        assert whole(out["short"], out["short whole"], 0)  # of fewer rows than features
        assert out["layers"] == ["2", "0"]
        assert out["needs"] is True
    assert len({str(out["first"]) for out in ranks}) == 1  # to the bit


def test_an_evaluation_is_one_sum_over_the_ranks_once_they_know_their_layers(ranks: Any) -> None:
    notes = 2 + 2  # the step, whether the layers are those agreed on, and which of them ran
    places = 4 * (notes + (3 + 2 * 8) + (3 + 2 * 32))
    triangles = 8 * 9 // 2 + 32 * 33 // 2
    for out in ranks:
        assert out["before"] == 0  # the check at construction asks nobody
        assert out["sent first"] == [8 * 4 * 2, 8 * (places + triangles)]
        assert out["sent second"] == [8 * (places + triangles)]


def test_a_single_row_on_all_ranks_together_has_its_status_on_all(ranks: Any) -> None:
    for out in ranks:
        assert [record[2:4] for record in out["one row"]] == [[1, "too_few_rows"]]


def test_nan_on_some_ranks_has_its_status_on_all_and_a_message_that_names_them(ranks: Any) -> None:
    message = "NaN, Inf or a sum beyond float64 in {0} of {0} features, the first is feature 0, on {1}"
    for out in ranks:
        for found, where in zip(out["nan"], ("rank 1", "ranks 0, 1"), strict=True):
            assert found == [
                [name, "nonfinite", message.format(d, where)] for name, d in (("2", 8), ("0", 32))
            ]


def test_an_error_on_one_rank_is_one_on_all_and_the_next_evaluation_is_right(ranks: Any) -> None:
    said = "ArithmeticError: no luck; in the pass of the monitor's probe at step 1"
    other = f"RuntimeError: the evaluation of step 1 failed on rank 1: {said}"
    for rank, out in enumerate(ranks):
        raised, after = out["raise"]
        assert raised == ("ArithmeticError: no luck" if rank == 1 else other)
        assert whole(after, out["whole"][:1], 2)
        recorded, after = out["record"]
        message = f"the evaluation failed: {said if rank == 1 else other}"
        assert recorded == [["failed", 8, message]]
        assert whole(after, out["whole"][:1], 2)


def test_ranks_at_different_steps_are_refused_on_all(ranks: Any) -> None:
    for out in ranks:
        assert out["steps"].startswith(
            "ValueError: with across_ranks every rank evaluates at the same steps; they "
        )
        assert "[5, 5, 7, 5]" in out["steps"]


def test_a_layer_that_runs_on_one_rank_is_recorded_on_all_and_later_idle_on_all(ranks: Any) -> None:
    for out in ranks:
        first, second, third = ([record[1:4] for record in records] for records in out["experts"])
        assert first == [["experts.0", 512, "ok"]]
        assert second == [["experts.0", 512, "ok"], ["experts.2", 200, "ok"]]
        assert third == [["experts.0", 0, "not_run"], ["experts.2", 0, "not_run"]]
        assert out["experts named"] == ["experts.0", "experts.2"]
    assert len({str(out["experts"][:2]) for out in ranks}) == 1


def test_the_batches_of_all_ranks_count_as_one_and_so_do_parts_of_a_probe(ranks: Any) -> None:
    for out in ranks:
        first, second, nothing = out["batch"]
        assert whole(first, out["whole"], 0)
        assert whole(second, out["whole"], 1)
        assert nothing == []
        assert whole(out["in parts"], out["whole"], 0)


def test_padding_is_left_out_on_all_ranks(ranks: Any) -> None:
    for out in ranks:
        expected, found = out["padded"]
        assert expected[0][2:] == [2 * 15 + 3, "ok", expected[0][4], "attention_mask"]
        assert whole(found, expected, 0)


def test_all_ranks_stop_by_the_same_records_without_a_vote(ranks: Any) -> None:
    for out in ranks:
        assert out["stop"] == [True, []]
        assert out["own"].startswith(
            "RuntimeError: should_stop() answers for this rank alone, and there are 4: "
        )
        assert out["agreed"] is True


LOST = """
monitor = Monitor(make(), inputs(64, 16).split((16, 16, 16, 16))[rank], "2", every=1, across_ranks=True)
monitor.step(0)
if rank == 2 and {gone}:
    os.kill(os.getpid(), signal.SIGKILL)
if rank == 2:
    time.sleep(20)
    os._exit(0)
if rank == 0:
    time.sleep(1.0)  # the others must not take it for the one that is missing
start = time.monotonic()
out["found"] = attempt(lambda: monitor.step(1))
out["seconds"] = time.monotonic() - start
with open(f"{{folder}}/{{rank}}.json", "w") as file:
    json.dump(out, file)
os._exit(0)
"""


@pytest.mark.nightly
@pytest.mark.parametrize(("gone", "seconds"), [(True, 60.0), (False, 6.0)])
def test_a_rank_that_does_not_come_is_named_on_the_others_within_the_timeout(
    tmp_path: Path, gone: bool, seconds: float
) -> None:
    outputs = launch(tmp_path, LOST.format(gone=gone), by="fork", seconds=seconds)
    assert outputs.pop(2) is None
    for out in outputs:
        assert out is not None
        assert out["found"].startswith(
            "RuntimeError: rank 2 did not come to a sum over the ranks, for which "
        )
        assert out["seconds"] < (seconds if gone else 60.0)


def test_across_ranks_needs_a_model_and_moments() -> None:
    with pytest.raises(ValueError, match="needs a model, a probe and layers"):
        SpectralEntropyMonitor(across_ranks=True)
    with pytest.raises(
        ValueError, match="across_ranks adds up moments, and standard_error needs the activations"
    ):
        SpectralEntropyMonitor(across_ranks=True, standard_error=True)
