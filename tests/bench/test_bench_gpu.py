"""The rehearsal of the GPU benchmark on a CPU, and the report made from its rows."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("matplotlib")

from bench import gpu
from bench.report import TARGETS
from fastent.kernels.launch import IN_TRITON, TABLE, Entry, output

ROOT = Path(__file__).parents[2]
FIGURES = ("us_p50", "slowdown", "calls", "extra_bytes", "passed")
# Every operation of the benchmark; those that need a GPU are skipped with their reason.
MEASURED = {"covariance", "entropy", "eigensolve", "probe forward", "probe on the thread", "slowdown", "gate"}
NEEDS_A_GPU = {"kernel", "ceiling", "host synchronisations", "blocked stream", "peak memory"}


def rehearse(folder: Path, *parts: str, interpret: bool = False) -> list[dict[str, Any]]:
    chosen = [argument for part in parts for argument in ("--part", part)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"OMP_NUM_THREADS": "1"} | ({"TRITON_INTERPRET": "1"} if interpret else {})
    command = [sys.executable, "-m", "bench.gpu", "--device", "cpu", "--quick", "--out", str(folder), *chosen]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in (folder / "gpu.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rehearsal")


@pytest.fixture(scope="module")
def rows(folder: Path) -> list[dict[str, Any]]:
    return rehearse(folder, *(part for part in gpu.PARTS if part != "correctness"))


def test_a_rehearsal_measures_or_says_why_not(rows: list[dict[str, Any]]) -> None:
    assert {row["op"] for row in rows if "skipped" not in row} == MEASURED
    assert {row["op"] for row in rows if "skipped" in row} >= NEEDS_A_GPU
    for row in rows:
        assert row["device"]
        assert row["torch"]
        assert "triton" in row
        assert "commit" in row
        assert row["clocks"] == gpu.NO_GPU
        figures = [name for name in FIGURES if name in row]
        assert bool(figures) != ("skipped" in row), row
        assert row.get("skipped", "-")


def test_a_provider_is_compared_with_itself_as_one(rows: list[dict[str, Any]]) -> None:
    ours = [row["over_fastent"] for row in rows if row.get("provider") == "fastent" and "over_fastent" in row]
    assert ours == [1.0] * len(ours)
    assert len(ours) == 6


def test_the_kernel_without_gluon_is_a_provider_where_gluon_is_and_is_that_of_the_other_table(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    there: Any = SimpleNamespace(cuda=True, quick=True)
    tile = dataclasses.replace(IN_TRITON[-1].tile, warps=8, gluon=False)
    providers = {}
    for gluon in (False, True):
        monkeypatch.setitem(TABLE, "covariance", (Entry(None, dataclasses.replace(tile, gluon=gluon)),))
        providers[gluon] = set(gpu.provider_variants(there, 8192, 4096)["covariance"])
    assert providers[True] - providers[False] == {"fastent, without Gluon"}
    monkeypatch.setitem(TABLE, "covariance", (Entry(None, tile),))
    warps = []
    for kind in (gpu.WithoutGluon, gpu.ResidentCovariance, gpu.WithoutGluon):
        h = torch.empty((8192, 4096), dtype=torch.bfloat16, device="meta")
        evaluator = kind(*h.shape, device=h.device)
        warps.append(evaluator.launches(h, evaluator.output())[-1].options["num_warps"])
    ours = IN_TRITON[-1].tile.warps
    assert ours != tile.warps
    assert warps == [ours, tile.warps, ours]


def test_the_report_has_a_table_for_each_measurement_and_lists_what_was_skipped(
    folder: Path, rows: list[dict[str, Any]]
) -> None:
    subprocess.run([sys.executable, "-m", "bench.report", str(folder)], cwd=ROOT, check=True)
    text = (folder / "report.md").read_text()
    for op in MEASURED:
        assert f"\n## {op}\n" in text
    assert "\n## kernel\n" not in text
    verdicts, not_measured = (text.split(f"## {title}\n")[1] for title in ("verdicts", "Not measured"))
    assert verdicts.split("##")[0].count("| not measured |") == len(TARGETS)
    assert verdicts.split("##")[0].count("no CUDA device") >= 5
    assert not_measured.count("\n|") - 2 == sum("skipped" in row for row in rows)
    assert (folder / "slowdown.png").stat().st_size > 10_000


@pytest.mark.nightly
def test_the_whole_rehearsal_is_inside_every_gate(tmp_path: Path) -> None:
    rows = rehearse(tmp_path, interpret=True)
    checked = [row for row in rows if row["part"] == "correctness"]
    assert all(row["passed"] for row in checked)
    assert {row["provider"] for row in checked} == set(gpu.GATES)
    assert {row["backend"] for row in checked} == {"torch", "triton"}
    batches = {row["batch"] for row in checked if row["provider"] == "ResidentCovariance"}
    assert batches == {1, 8, 32}


class Card:
    """A stand-in for a GPU: a clock of its own, which runs on while the host queues."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = self.done = 0.0  # of the host's clock: now, and when the device will be done
        self.graph: list[float] | None = None
        self.strict = False
        self.sleeps = self.captures = True
        for name, value in {
            "Event": lambda **_: Mark(self),
            "synchronize": self.synchronize,
            "_sleep": lambda cycles: self.launch(cycles / 1.7e9 if self.sleeps else 0.0, host=5e-6),
            "set_sync_debug_mode": lambda mode: setattr(self, "strict", mode == "error"),
            "is_available": lambda: True,
        }.items():
            patch.setattr(torch.cuda, name, value, raising=False)
        patch.setattr(gpu, "capture_cuda_graph", self.capture)
        patch.setattr(gpu, "clocks", lambda device: {"sm_mhz": 1700})
        patch.setattr(gpu.time, "perf_counter", lambda: self.now)

    def launch(self, device: float, host: float) -> None:
        if self.graph is not None:
            self.graph.append(device)
            return
        self.now += host
        self.done = max(self.done, self.now) + device

    def synchronize(self) -> None:
        self.now = max(self.now, self.done)

    def read(self) -> None:
        if self.strict:
            raise RuntimeError("called a synchronizing CUDA operation")
        self.synchronize()

    def capture(self, function: Any) -> tuple[Any, None]:
        if not self.captures:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.graph = []
        function()
        nodes, self.graph = self.graph, None
        return lambda: self.launch(sum(nodes), host=30e-6), None


class Mark:
    """An event in the stream of a `Card`."""

    def __init__(self, card: Card) -> None:
        self.card, self.at = card, 0.0

    def record(self) -> None:
        self.card.now += 1e-6
        self.at = max(self.card.now, self.card.done)

    def query(self) -> bool:
        return self.card.now >= self.at

    def elapsed_time(self, last: Mark) -> float:
        return 1e3 * (last.at - self.at)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    return Card(monkeypatch)


def session(folder: Path, device: str = "cpu", *, late: bool = False, **values: Any) -> gpu.Session:
    deadline = gpu.time.monotonic() + (-1.0 if late else 600.0)
    return gpu.Session(torch.device(device), True, folder, deadline, **values)


def test_a_call_that_takes_the_host_longer_than_the_device_is_timed_on_the_device(
    tmp_path: Path, card: Card
) -> None:
    for options, captures, how in (
        ({}, True, "graph"),
        ({}, False, "sleep"),
        ({"graph": False}, True, "sleep"),
    ):
        card.captures = captures
        found = gpu.device_times(session(tmp_path, "cuda"), lambda: card.launch(8e-6, host=40e-6), **options)
        assert found.how == how
        # The last event is recorded 1 us of the host's time after the last of the calls, and these are many.
        assert found.seconds == pytest.approx(np.full(20, 8e-6), rel=1e-6)
        assert found.repeats > 10


def test_what_is_not_the_devices_time_alone_is_said_to_be_the_hosts_too(tmp_path: Path, card: Card) -> None:
    def waits() -> None:
        card.launch(8e-6, host=40e-6)
        card.read()

    assert gpu.device_times(session(tmp_path, "cuda"), waits).how == "host"
    card.sleeps = False  # whatever the pause, the device comes to the first event before all is queued
    found = gpu.device_times(session(tmp_path, "cuda"), lambda: card.launch(8e-6, host=40e-6), graph=False)
    assert found.how == "host"
    assert gpu.joined([found, found._replace(how="graph")]).how == "host"


def test_the_clocks_are_read_once_a_part_and_where_it_has_work_under_load(
    tmp_path: Path, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy = []
    monkeypatch.setattr(gpu, "clocks", lambda device: busy.append(card.done > card.now) or {"sm_mhz": 1700})
    monkeypatch.setattr(gpu, "device_environment", lambda device: {"device": "card"})
    for gates, reads in ((0, [True]), (2, [False, True])):
        here = session(tmp_path, "cuda", part="kernel", run=str(gates))
        for _ in range(gates):
            here.add("gate")
        for _ in range(2):
            gpu.device_times(here, lambda: card.launch(8e-6, host=40e-6))
            here.add("kernel")
        assert busy == reads
        assert [row["clocks_under_load"] for row in here.rows] == [False] * gates + [True] * 2
        busy.clear()


def test_clocks_come_from_nvml_or_are_null_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    class NVMLError(Exception):
        pass

    def asked(handle: str, kind: str) -> int:
        return {"GPU-u-sm": 1755, "GPU-u-memory": 2619}[f"{handle}-{kind}"]

    def handle(uuid: str) -> str:
        if uuid != "GPU-u":
            raise NVMLError("Not Found")
        return uuid

    nvml = SimpleNamespace(
        NVMLError=NVMLError,
        NVML_CLOCK_SM="sm",
        NVML_CLOCK_MEM="memory",
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=handle,
        nvmlDeviceGetClockInfo=asked,
        nvmlDeviceGetMaxClockInfo=lambda handle, kind: 1980,
    )
    cuda = torch.device("cuda")
    known = {"sm_mhz": 1755, "sm_mhz_most": 1980, "memory_mhz": 2619}
    for module, uuid, reason in (
        (nvml, "u", None),
        (nvml, "other", "NVML: Not Found"),
        (None, "u", "pynvml is not installed (nvidia-ml-py)"),
    ):
        monkeypatch.setitem(sys.modules, "pynvml", module)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=uuid))  # noqa: B023
        clocks = known if reason is None else dict.fromkeys(known)
        assert gpu.clocks(cuda) == {**clocks, "clocks": reason}
    assert gpu.clocks(torch.device("cpu")) == {**dict.fromkeys(known), "clocks": gpu.NO_GPU}


class Planted:
    """An evaluator by torch in float64, with one fault."""

    def __init__(self, fault: str, n: int, d: int, **options: Any) -> None:
        self.fault, self.shape, self.side = fault, (n, d), options["side"] or "covariance"
        self.batch, self.calls = options["batch"], 0

    def output(self) -> Any:
        return output(self.side, self.batch, *self.shape, torch.device("cpu"), spread=True)

    def __call__(self, h: torch.Tensor, out: Any) -> None:
        self.calls += 1
        x = h.double().view(self.batch, *self.shape)
        mean = x.mean(1, keepdim=True)
        out.lower.copy_((x - mean).mT @ (x - mean) / self.shape[0])
        out.centre.copy_(torch.cat([x[:, :1], mean - x[:, :1], mean], 1))
        trace, squares = out.lower.diagonal(dim1=1, dim2=2).sum(1), out.lower.square().sum((1, 2))
        out.spread.copy_(torch.stack([trace, squares, trace**2 / squares], 1))
        last = self.batch - 1
        if self.fault == "unwritten":
            out.lower[last, -1, 0] = torch.nan
        elif self.fault == "second call":
            out.lower[last, -1, 0] *= 1 + 1e-15 * (self.calls % 2)
        elif self.fault == "shift":
            out.centre[last, 0, 0], out.centre[last, 1, 0] = 0.0, mean[last, 0, 0]
        elif self.fault:
            {"lower": out.lower[last, -1], "centre": out.centre[last, 2], "spread": out.spread[last]}[
                self.fault
            ][0] *= 1 + 1e-10


@pytest.mark.parametrize("fault", ["", "lower", "centre", "spread", "unwritten", "second call", "shift"])
def test_the_gate_of_an_evaluator_sees_each_fault_of_the_last_matrix_of_a_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(gpu, "ResidentCovariance", functools.partial(Planted, fault))
    monkeypatch.setattr(gpu, "triton_obstacle", lambda device: None)
    here = session(tmp_path)
    for batch in (1, 8, 32):
        variant = gpu.Variant("ResidentCovariance", 20, 6, torch.bfloat16, batch)
        assert gpu.right(here, variant) is (not fault), (fault, here.rows[-1])
        assert here.rows[-1]["batch"] == batch


SMALL = gpu.Variant("centered_matrix", 20, 6, torch.bfloat16, backend="torch")


@pytest.fixture
def wrong_at_7_columns(monkeypatch: pytest.MonkeyPatch) -> gpu.Variant:
    right = gpu.centered_matrix

    def wrong(x: torch.Tensor, **options: Any) -> Any:
        found = right(x, **options)
        if x.shape[1] == 7:
            found.matrix[-1, 0] *= 1 + 1e-9
        elif x.shape[1] == 8:
            raise RuntimeError("out of resource: shared memory")
        return found

    monkeypatch.setattr(gpu, "centered_matrix", wrong)
    return SMALL._replace(d=7)


def test_what_is_outside_its_gate_is_not_timed_and_what_is_inside_is(
    tmp_path: Path, wrong_at_7_columns: gpu.Variant
) -> None:
    here = session(tmp_path, part="providers", run="1")
    variants = {"right": SMALL, "wrong": wrong_at_7_columns, "broken": SMALL._replace(d=8)}
    assert gpu.only_right(here, "covariance", variants, n=20) == ["right"]
    gates = {row["d"]: row for row in here.rows if row["op"] == "gate"}
    assert {d: row["passed"] for d, row in gates.items()} == {6: True, 7: False, 8: False}
    assert gates[8]["error"] == "RuntimeError: out of resource: shared memory"
    skipped = [(row["op"], row["provider"], row["skipped"]) for row in here.rows if "skipped" in row]
    assert skipped == [("covariance", name, gpu.NOT_RIGHT) for name in ("wrong", "broken")]


def test_a_gate_is_believed_in_its_run_and_for_its_variant_alone(
    tmp_path: Path, wrong_at_7_columns: gpu.Variant, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert gpu.right(session(tmp_path, part="correctness", run="1"), SMALL)
    assert not gpu.right(session(tmp_path, part="correctness", run="1"), wrong_at_7_columns)
    monkeypatch.setattr(gpu, "GATES", {})
    assert gpu.right(session(tmp_path, part="kernel", run="1"), SMALL)
    assert not gpu.right(session(tmp_path, part="kernel", run="1"), wrong_at_7_columns)
    for other, run in (
        (SMALL, "2"),
        (SMALL._replace(dtype=torch.float32), "1"),
        (SMALL._replace(batch=8), "1"),
    ):
        assert not gpu.right(session(tmp_path, run=run), other)  # held to it anew, and there is no gate now


def test_everything_of_ours_that_is_timed_is_held_to_its_gate_first(
    tmp_path: Path, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = session(tmp_path, "cuda")
    here.quick = False
    timed = set(gpu.timed_variants(here))
    held: list[gpu.Variant] = []
    monkeypatch.setattr(gpu, "right", lambda session, variant: held.append(variant) or True)
    gpu.correctness(here)
    assert set(held[: len(timed)]) == timed
    evaluators = {variant.batch for variant in timed if variant.provider == "ResidentCovariance"}
    assert evaluators == {1, 8, 32}
    # And a part asks again: of what is outside its gate the kernel part times nothing.
    monkeypatch.setattr(gpu, "right", lambda session, variant: False)
    monkeypatch.setattr(gpu, "device_environment", lambda device: {"device": "card"})
    gpu.kernel(here)
    assert {row["skipped"] for row in here.rows} == {gpu.NOT_RIGHT}
    assert len(here.rows) == len(gpu.kernel_variants(here))


def test_zeros_of_the_profiler_are_believed_where_it_sees_the_direct_way_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deferred = SimpleNamespace(discard=lambda: None)
    for waits in (3, 0):
        here = session(tmp_path, run=str(waits))
        monkeypatch.setattr(gpu, "waiting_calls", lambda call: call())
        gpu.host_synchronisations(
            here, {"deferred": lambda: 0, "direct": lambda waits=waits: waits}, deferred
        )
        assert [row.get("calls") for row in here.rows] == ([0, 3] if waits else [None, None])
        assert all("skipped" in row for row in here.rows) == (waits == 0)


def test_a_slowdown_says_how_many_of_its_probes_were_dropped(tmp_path: Path) -> None:
    deferred = SimpleNamespace(dropped=7, discard=lambda: None)

    def full(step: int) -> None:
        deferred.dropped += step > 0

    here = session(tmp_path)
    gpu.slowdowns(here, "plain step", lambda: None, {"deferred": full}, 5e-4, deferred)
    assert [(row["stride"], row["probes"], row["dropped"]) for row in here.rows] == [
        (1, 200, 195),
        (10, 20, 15),
    ]


@pytest.mark.parametrize("part", gpu.PARTS)
def test_no_part_begins_anything_after_its_time(tmp_path: Path, part: str) -> None:
    here = session(tmp_path, late=True, part=part)
    gpu.PARTS[part](here)
    assert here.rows
    assert all("skipped" in row for row in here.rows)


# Python 3.12 warns of forks of a process with threads; the children here do not compute.
forks = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


@forks
def test_a_part_that_hangs_is_ended() -> None:
    assert gpu.isolated(signal.pause, 0.05) == "the part was ended after 0 s"
    assert gpu.isolated(lambda: None, 60.0) is None


@forks
def test_a_part_that_breaks_or_dies_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def breaks(session: gpu.Session) -> None:
        session.add("one", us_p50=1.0)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    parts = {
        "breaks": breaks,
        "dies": lambda session: os.kill(os.getpid(), signal.SIGKILL),
        "goes on": lambda session: session.add("two", us_p50=2.0),
    }
    monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.setattr(gpu, "device_environment", lambda device: {"device": "card"})
    options = ["--device", "cpu", "--out", str(tmp_path)]
    assert gpu.main([*options, "--part", "goes on"]) == 0
    # Rows of a run before are kept.
    assert gpu.main(options) == 1
    rows = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert [(row["part"], row["op"], row.get("broke")) for row in rows] == [
        ("goes on", "two", None),
        ("breaks", "one", None),
        ("breaks", "breaks", True),
        ("dies", "dies", True),
        ("goes on", "two", None),
    ]
    assert [row["skipped"].partition(": ")[0] for row in rows if "skipped" in row] == [
        "the part broke",
        "the part's process ended with status -9",
    ]
    assert "illegal memory access" in capfd.readouterr().err
    assert len({row["run"] for row in rows}) == 2


def test_without_a_gpu_the_benchmark_of_one_refuses(tmp_path: Path) -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "bench.gpu", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--device cpu --quick is a rehearsal" in done.stderr
