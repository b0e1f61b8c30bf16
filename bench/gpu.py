"""Everything that a GPU should tell us, in one call: ``python -m bench.gpu --out DIR``.

Rows are appended to ``DIR/gpu.jsonl`` as they are made; ``python -m bench.report DIR`` makes figures, tables and the
verdicts on the targets. A row that has no meaning on a device, or that could not be had, is written with ``"skipped"``
and the reason, and without a figure. Each part runs in a process of its own: an error that ends one, or leaves its CUDA
context unusable, costs the others nothing.

What is timed was found right before. A `Variant` is one of our ways to a result with the input that it is given; each
has a gate (`op` gate), and one that is outside it is skipped where it would be timed. What passed is timed.

`correctness`
    The gates of all that the other parts time, then of every dtype, side, split and stride of some shapes. Matrices are
    compared with the two-pass covariance in float64, their lower triangle whole, by that of the kernel tests:
    ``eps n a_i a_j`` with a the largest centred magnitude of a column; evaluators in batches of 1, 8 and 32, with their
    centres and spreads, into memory that held NaN, twice with the same bits. Entropies are compared with those of the
    float64 matrix. At most half of the time of the run.
`ceilings`
    What this card reaches: bytes that a copy moves in a second, operations of cuBLAS's float64 product, one launch in a
    graph. The report's shares are of these.
`training`
    The time of a probe on the thread, and the slowdown of a step: an MLP under AdamW, captured in a CUDA graph and
    lengthened by an idle kernel to 0.15 ms; and the same step without a graph. The probe is the hidden activations of
    512 fixed inputs, 128 wide. Slowdowns are ratios of neighbours: the same number of steps without a probe, then with
    one, again and again. Rows say how many probes there were and how many found the ring full: a dropped one costs next
    to nothing. The forward pass that makes the activations is a row of its own (`probe forward`) and is in none of the
    others.
`host`
    Host synchronisations, counted twice: calls of the CUDA runtime by torch's profiler, believed where it sees the
    direct way wait, which does; and by a stream that is kept busy: what waits for it comes back late. And the peak
    memory of the matrix by each way.
`kernel`
    Kernel time, from 512 x 64 to 65536 x 8192, warm and cold second-level cache, with the bytes that must move and the
    operations that are executed: lower tiles, those on the diagonal whole.
`providers`
    What else one could do with the same activations, timed in turn. `us_*` is time on the device, `host_us` the median
    time for which the calling thread is kept: a provider that stops the host pays there. Covariances and whole
    entropies are rows of their own (`op`).
`eigensolve`
    cuSOLVER one at a time and batched, LAPACK on one thread of the host, per size.

Under 8 minutes on an H100 or H200; no network, no test runner. The commit is that of the checkout, or of the variable
COMMIT where there is none. ``--device cpu --quick`` is a rehearsal: what needs a GPU is recorded as skipped, and no
time of it says anything about one. There the torch backend takes the place of the kernels; with TRITON_INTERPRET=1 they
run interpreted on the smallest shapes.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import multiprocessing
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import fastent
from bench.harness import COPY, PRODUCT, Row, columns, environment, quantiles, ratio, raw, recorded_commit
from bench.providers import direct_covariance, direct_entropy, torch_cov
from fastent.covariance import centered_matrix, triton_obstacle
from fastent.grokking.train.stack import capture_cuda_graph
from fastent.grokking.train.storage import JsonLines
from fastent.kernels.covariance import ResidentCovariance
from fastent.kernels.launch import IN_TRITON, TABLE, Launch, Output, Side, partition
from fastent.monitor.deferred import DeferredEntropy
from fastent.reference.entropy import entropy_of_eigenvalues

NO_GPU = "no CUDA device: this measures one"
NOT_RIGHT = "outside its gate: not timed"

EPS = torch.finfo(torch.float64).eps
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Split and whole, both sides, no multiple of anything, every entry of the launch table.
SHAPES = (
    (512, 64),
    (512, 128),
    (41, 127),
    (4096, 129),
    (65536, 32),
    (64, 4096),
    (300, 1000),
    (2100, 1700),
    (512, 2048),
)
QUICK = ((512, 64), (41, 127), (4096, 33), (64, 300))
TINY = ((41, 35), (140, 20), (20, 140))  # for the interpreter
TINY_BATCHES = ((8, 20, 6), (32, 6, 5))
# Multiplications up to which what the results are compared with comes from the CPU; beyond, from the device, by torch.
ON_HOST = 2**31

N, WIDTH = 512, 128
STEP = 1.5e-4  # seconds
STRIDES = (1, 10, 100)
# Runtime and driver calls that wait for the device.
WAITING = ("Synchronize", "cudaMemcpy", "cuMemcpy")
PAUSE = 0.05  # seconds for which the stream is kept busy
MEMORY_CASES = ((512, 128), (65536, 128), (8192, 4096))

KERNEL_SHAPES = (
    *((512, d) for d in (64, 128, 256, 512, 1024, 2048, 4096, 8192)),
    *((4096, d) for d in (128, 512, 1024, 2048, 4096)),
    *((8192, d) for d in (1024, 2048, 4096, 8192)),
    *((65536, d) for d in (64, 128, 512, 1024, 2048, 4096, 8192)),
)
KERNEL_BATCHES = ((32, 512, 128), (8, 512, 1024))

PROVIDER_SHAPES = (
    (512, 64),
    (512, 128),
    (512, 512),
    (512, 1024),
    (4096, 128),
    (8192, 1024),
    (8192, 2048),
    (8192, 4096),
    (65536, 128),
)
COMPILED = ((512, 128), (8192, 2048))  # torch.compile takes ten seconds or more for each
QUICK_PROVIDER_SHAPES = ((512, 64), (512, 128), (2048, 96))
TARGET_SHAPES = ((8192, 4096), (8192, 2048), (8192, 1024))  # of targets

SIZES = (64, 128, 256, 512, 1024)
BATCH = 32  # matrices in a batched solve

MOST_CALLS = 100  # in one measurement; what is queued ahead has to fit a stream's queue
LASTING = 2e-3  # seconds that the calls of one measurement should take
LEAST_AHEAD = 1e-4  # seconds of sleep, at least
GRACE = 30.0  # seconds after its time at which a part is ended


@dataclass
class Session:
    """One part of a run: where, how long, and the log of rows."""

    device: torch.device
    quick: bool
    out: Path
    deadline: float  # of time.monotonic(); parts stop before it and say so
    part: str = ""
    run: str = ""
    log: JsonLines = field(init=False)
    _machine: Row = field(default_factory=dict)
    _clocks: Row = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.log = JsonLines(self.out / "gpu.jsonl")

    @property
    def cuda(self) -> bool:
        """Whether there is a GPU to measure."""
        return self.device.type == "cuda"

    @property
    def rows(self) -> list[Row]:
        """Rows of this run so far, of all its parts."""
        return [row for row in self.log.rows if row.get("run") == self.run]

    def late(self, op: str, **values: object) -> bool:
        """Whether the time is used up; `op` is recorded as skipped then."""
        late = time.monotonic() > self.deadline
        if late:
            self.skip(op, "the time of the run was used up", late=True, **values)
        return late

    def add(self, op: str, **values: object) -> None:
        """Record a row, with the environment: it is in the file before this returns."""
        if not self._machine:
            self._machine = device_environment(self.device)
        self.look_at_clocks(under_load=False)
        self._write(op, {**values, **self._clocks, **self._machine})

    def skip(self, op: str, reason: str, **values: object) -> None:
        """Record that something was not measured, and why."""
        self.add(op, skipped=reason, **values)

    def broke(self, reason: str) -> None:
        """Record that the part ended early; without the environment, as the device may not answer any more."""
        self._write(self.part, {"skipped": reason, "broke": True, "commit": recorded_commit()})

    def look_at_clocks(self, *, under_load: bool) -> None:
        """Read the clocks, once a part: the first time, and the first time that the device has work."""
        if not self._clocks or (under_load and not self._clocks["clocks_under_load"]):
            self._clocks = {**clocks(self.device), "clocks_under_load": under_load}

    def _write(self, op: str, values: Row) -> None:
        self.log.append({"run": self.run, "part": self.part, "op": op, **values})

    @functools.cached_property
    def cycles_a_second(self) -> float:
        """Cycles that `torch.cuda._sleep` waits for in a second."""
        return 2e6 / float(np.median(device_seconds(self, lambda: torch.cuda._sleep(2_000_000), rounds=3)[0]))


def device_environment(device: torch.device) -> Row:
    """Machine and versions, the device's included."""
    row = environment()
    row["cuda"] = torch.version.cuda
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        row |= {
            "device": torch.cuda.get_device_name(device),
            "capability": f"sm_{properties.major}{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
        }
    return row


def clocks(device: torch.device) -> Row:
    """Clocks now in MHz, of the multiprocessors (and the highest they may have) and the memory, by NVML.

    Where they cannot be had they are None, and `clocks` says why.
    """
    unknown = dict.fromkeys(("sm_mhz", "sm_mhz_most", "memory_mhz"))
    if device.type != "cuda":
        return {**unknown, "clocks": NO_GPU}
    try:
        import pynvml
    except ImportError:
        return {**unknown, "clocks": "pynvml is not installed (nvidia-ml-py)"}
    try:
        pynvml.nvmlInit()
        card = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        return {
            "sm_mhz": pynvml.nvmlDeviceGetClockInfo(card, pynvml.NVML_CLOCK_SM),
            "sm_mhz_most": pynvml.nvmlDeviceGetMaxClockInfo(card, pynvml.NVML_CLOCK_SM),
            "memory_mhz": pynvml.nvmlDeviceGetClockInfo(card, pynvml.NVML_CLOCK_MEM),
            "clocks": None,
        }
    except pynvml.NVMLError as error:
        return {**unknown, "clocks": f"NVML: {error}"}


class Timing(NamedTuple):
    """Seconds of one call, shape (rounds,), and what they are of."""

    seconds: np.ndarray
    # "graph": of many calls in one CUDA graph. "sleep": queued behind a sleep that outlasted the host. Both are the
    # device's alone. "host": the call waits for the device, or no sleep was long enough. "clock": no GPU.
    how: str
    repeats: int  # calls in one measurement

    def columns(self) -> Row:
        """Columns of a row."""
        return {"timing": self.how, "repeats": self.repeats, **quantiles(self.seconds)}


def device_times(
    session: Session,
    call: Callable[[], object],
    *,
    rounds: int = 20,
    cold: bool = False,
    graph: bool = True,
) -> Timing:
    """Time `call` on the device.

    On CUDA by events around as many calls as last about `LASTING`: captured in one graph and replayed, where they can
    be (not with ``graph=False``), else queued one by one. Either way a sleep goes before them, longer than the host was
    measured to need for queueing, and an event tells whether it was still going on when all was queued: only then is
    the time the device's. With `cold` one call a round, after the second-level cache was overwritten. On the CPU by the
    clock.
    """
    if not session.cuda:
        return Timing(host_times(call, rounds=rounds), "clock", 1)
    took = float(host_times(lambda: (call(), torch.cuda.synchronize()), rounds=2).min())
    repeats = 1 if cold else max(1, min(MOST_CALLS, int(LASTING / max(took, 1e-7))))
    cache = torch.empty(256 * 2**20 if cold else 0, dtype=torch.int8, device=session.device) if cold else None

    def several() -> None:
        for _ in range(repeats):
            call()

    measure = functools.partial(device_seconds, session, rounds=rounds, overwritten=cache)
    if waits(call):
        return Timing(measure(several)[0] / repeats, "host", repeats)
    queue: Callable[[], object] = several
    how = "sleep"
    if graph:
        with contextlib.suppress(RuntimeError):  # it cannot be captured; the row says so
            queue, how = capture_cuda_graph(several)[0], "graph"
    pause = 1.5 * float(host_times(queue, rounds=2).max()) + LEAST_AHEAD
    for _ in range(3):
        seconds, ahead = measure(queue, pause=pause)
        if ahead:
            return Timing(seconds / repeats, how, repeats)
        pause *= 3
    return Timing(seconds / repeats, "host", repeats)


def device_seconds(
    session: Session,
    queue: Callable[[], object],
    *,
    rounds: int,
    pause: float = 0.0,
    overwritten: Tensor | None = None,
) -> tuple[np.ndarray, bool]:
    """Seconds between events around `queue`, shape (rounds,), and whether the host was ahead in every round.

    It was if the device, which sleeps for `pause` seconds first, had not come to the first event when all was queued.
    """
    seconds, ahead = [], True
    cycles = int(pause * session.cycles_a_second) if pause else 0
    for _ in range(rounds):
        if overwritten is not None:
            overwritten.zero_()
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(cycles)
        first.record()
        queue()
        last.record()
        ahead &= not first.query()
        session.look_at_clocks(under_load=True)
        torch.cuda.synchronize()
        seconds.append(first.elapsed_time(last) * 1e-3)
    return np.array(seconds), ahead


def waits(call: Callable[[], object]) -> bool:
    """Whether torch notices that `call` waits for the device; it is left there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def host_times(call: Callable[[], object], *, rounds: int = 20) -> np.ndarray:
    """Seconds that `call` keeps the thread that makes it, shape (rounds,); the device is idle before each."""
    seconds = []
    call()
    for _ in range(rounds):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return np.array(seconds)


def activations(
    n: int, d: int, dtype: torch.dtype, device: torch.device, *, batch: int | None = None
) -> Tensor:
    """Columns with spreads from 0.1 to 10 about 1, the same on every device."""
    generator = torch.Generator().manual_seed(n + d)
    shape = (n, d) if batch is None else (batch, n, d)
    if n * d * (batch or 1) > 2**26:  # too long to draw on the host
        x = torch.randn(shape, device=device, dtype=torch.float32)
    else:
        x = torch.randn(shape, generator=generator).to(device)
    return (x * torch.logspace(-1, 1, d, device=device) + 1.0).to(dtype)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.T.contiguous().T,
    "padded rows": lambda x: torch.nn.functional.pad(x, (3, 2), value=7.0)[:, 3:-2],
    "strided": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
}
"""The same values under other strides."""


@contextlib.contextmanager
def without_gluon() -> Iterator[None]:
    """Have the launch table that it is where Triton has no Gluon."""
    kept = TABLE["covariance"]
    TABLE["covariance"] = IN_TRITON
    try:
        yield
    finally:
        TABLE["covariance"] = kept


class WithoutGluon(ResidentCovariance):
    """The evaluator that it is where Triton has no Gluon."""

    def __init__(self, *args: Any, **options: Any) -> None:
        with without_gluon():
            super().__init__(*args, **options)

    def launches(self, h: Tensor, out: Output) -> list[Launch]:
        """Return what `__call__` runs, in order."""
        with without_gluon():
            return super().launches(h, out)


class Variant(NamedTuple):
    """One of our ways to a result, and the input that it is given: what is held to a gate, and what is timed."""

    provider: str  # of `GATES`
    n: int
    d: int
    dtype: torch.dtype
    batch: int = 1
    side: Side | None = None  # None: the smaller
    layout: str = "contiguous"
    backend: str = "triton"

    def columns(self) -> Row:
        """Columns that tell its rows from others."""
        side = self.side or ("gram" if self.n < self.d else "covariance")
        name = str(self.dtype).removeprefix("torch.")
        return {**self._asdict(), "dtype": name, "side": side}

    def input(self, device: torch.device) -> Tensor:
        """Activations (n, d), or (batch, n, d) of several."""
        batch = self.batch if self.batch > 1 else None
        return LAYOUTS[self.layout](activations(self.n, self.d, self.dtype, device, batch=batch))

    def evaluator(self, device: torch.device) -> ResidentCovariance:
        """Take an evaluator of its shape."""
        kind = WithoutGluon if self.provider == "WithoutGluon" else ResidentCovariance
        return kind(self.n, self.d, batch=self.batch, device=device, side=self.side)


class Exact(NamedTuple):
    """What a result is compared with: float64, in two passes, by torch."""

    x: Tensor  # (n, d)
    mean: Tensor  # (d,)
    matrix: Tensor  # (m, m)
    largest: Tensor  # (m,) the largest of the centred numbers whose products an entry adds
    length: int  # of the summed axis

    @classmethod
    def of(cls, h: Tensor, side: str) -> Exact:
        """Covariance or Gram matrix of activations (n, d), on the CPU where it takes few multiplications."""
        n, d = h.shape
        host = n * d * (d if side == "covariance" else n) <= ON_HOST
        x = h.double().cpu() if host else h.double()
        mean = x.mean(0)
        y = x - mean if side == "covariance" else (x - mean).T
        return cls(x, mean, y.T @ y / n, y.abs().amax(0), y.shape[0])

    def matrix_error(self, lower: Tensor) -> float | None:
        """Largest error of the lower triangle, over the gate of the entry."""
        gate = EPS * (self.length + 2) * torch.outer(self.largest, self.largest)
        return worst(((lower.to(gate.device) - self.matrix).abs() / gate).tril())

    def centre_error(self, centre: Tensor) -> float | None:
        """Largest error of the mean, given as one number and as shift and rest; the shift has to be an entry."""
        shift, rest, mean = centre.to(self.x.device)
        if not (self.x == shift).any(0).all():
            return None
        far = (self.x - self.mean).abs().amax(0)
        gate = 2 * EPS * ((len(self.x) + 2) * far + 2 * (self.mean.abs() + far))
        return worst((torch.stack([mean, shift + rest]) - self.mean).abs() / gate)

    def spread_error(self, spread: Tensor) -> float | None:
        """Largest relative error of trace, sum of squares and participation ratio, over 4 eps a term."""
        trace, squares = self.matrix.trace(), self.matrix.square().sum()
        want = torch.stack([trace, squares, trace**2 / squares])
        return worst((spread.to(want.device) / want - 1).abs() / (4 * EPS * (self.length + len(self.matrix))))

    def entropy_error(self, normalized: float) -> float | None:
        """Difference of the normalised entropy over 1e-12, from 256 columns on in proportion to them."""
        d = self.x.shape[1]
        values = np.zeros(d)
        found = np.linalg.eigvalsh(self.matrix.cpu().numpy())[-d:]
        values[: len(found)] = found
        want = entropy_of_eigenvalues(values) / np.log(d)
        return worst(torch.tensor(abs(normalized - want) / (1e-12 * max(1.0, d / 256))))


def worst(errors: Tensor) -> float | None:
    """Return the largest; None where one is no finite number."""
    value = float(errors.max())
    return value if np.isfinite(value) else None


def check_evaluator(variant: Variant, x: Tensor) -> Row:
    """Errors of an evaluator: lower triangle, centre and spread of each matrix; the same bits again."""
    evaluator = variant.evaluator(x.device)
    out, results = evaluator.output(), []
    assert out.spread is not None
    # Again into the same memory, as a loop does, and as what is timed does.
    for h in (x, x) if x.is_contiguous() else (x, x, x.contiguous()):
        out.block.fill_(torch.nan)  # what is not written shows
        evaluator(h, out)
        results.append((out.lower.tril(), out.centre.clone(), out.spread.clone()))
    (lower, centre, spread), *others = results
    errors = []
    for k, h in enumerate(x.view(variant.batch, variant.n, variant.d) if variant.batch > 1 else [x]):
        exact = Exact.of(h, evaluator.side)
        found = exact.matrix_error(lower[k]), exact.centre_error(centre[k]), exact.spread_error(spread[k])
        errors.append(found)
    matrix, middle, sums = (None if None in each else max(each) for each in zip(*errors, strict=True))
    same = all(torch.equal(a, b) for other in others for a, b in zip(results[0], other, strict=True))
    return {
        "matrix_over_gate": matrix,
        "centre_over_gate": middle,
        "spread_over_gate": sums,
        "same_bits": same,
    }


def check_matrix(variant: Variant, x: Tensor) -> Row:
    """Error of one call of `centered_matrix`, and whether its bits are those of contiguous input."""
    side = variant.columns()["side"]
    call = functools.partial(centered_matrix, backend=variant.backend, side=side)  # type: ignore[arg-type]
    lower = call(x).matrix.tril()
    same = x.is_contiguous() or torch.equal(lower, call(x.contiguous()).matrix.tril())
    return {"matrix_over_gate": Exact.of(x, side).matrix_error(lower), "same_bits": same}


def check_entropy(variant: Variant, x: Tensor) -> Row:
    """Error of the entropy of one call, or of one deferred evaluation."""
    if variant.provider == "DeferredEntropy":
        deferred = DeferredEntropy()
        deferred_entropy(deferred, x)
        deferred.flush()
        ((_, results),) = deferred.arrived()
        deferred.close()
        found = results["h"].entropy.normalized
    else:
        found = fastent.spectral_entropy(x, backend=variant.backend).normalized  # type: ignore[arg-type]
    return {"entropy_over_gate": Exact.of(x, variant.columns()["side"]).entropy_error(float(found))}


GATES: dict[str, Callable[[Variant, Tensor], Row]] = {
    "ResidentCovariance": check_evaluator,
    "WithoutGluon": check_evaluator,
    "centered_matrix": check_matrix,
    "spectral_entropy": check_entropy,
    "DeferredEntropy": check_entropy,
}


def right(session: Session, variant: Variant) -> bool:
    """Whether a variant is inside its gate: as this run has found already, or held to it now."""
    named = variant.columns()
    for row in session.rows:
        if row["op"] == "gate" and "passed" in row and named.items() <= row.items():
            return bool(row["passed"])
    obstacle = triton_obstacle(session.device) if variant.backend == "triton" else None
    if obstacle:
        session.skip("gate", f"the kernels cannot run here: {obstacle}", **named)
        return False
    try:
        found = GATES[variant.provider](variant, variant.input(session.device))
    except Exception as error:  # one that cannot run must not cost the others
        session.add("gate", **named, passed=False, error=f"{type(error).__name__}: {error}"[:300])
        if session.cuda:
            torch.cuda.synchronize()  # raises where no other can run any more
        return False
    passed = not outside(found)
    session.add("gate", **named, **found, passed=passed)
    return passed


def outside(found: Row) -> bool:
    """Whether what a gate found is not good enough."""
    errors = [value for name, value in found.items() if name.endswith("over_gate")]
    return not (all(error is not None and error < 1.0 for error in errors) and found.get("same_bits", True))


def only_right(session: Session, op: str, variants: dict[str, Variant], **values: object) -> list[str]:
    """Names of those inside their gates; the others are recorded as skipped."""
    found = {name: right(session, variant) for name, variant in variants.items()}
    for name in (name for name, passed in found.items() if not passed):
        session.skip(op, NOT_RIGHT, provider=name, **values)
    return [name for name, passed in found.items() if passed]


def correctness(session: Session) -> None:
    """Hold everything to its gate: first what is timed."""
    for variant in dict.fromkeys([*timed_variants(session), *table_variants(session)]):
        if session.late("gate"):
            break
        right(session, variant)
    if not session.cuda and os.environ.get("TRITON_INTERPRET") != "1":
        session.skip("gate", "no CUDA device, and TRITON_INTERPRET is not 1", provider="ResidentCovariance")


def timed_variants(session: Session) -> Iterator[Variant]:
    """Everything of ours that another part times."""
    if session.cuda:
        yield from kernel_variants(session)
        for n, d in memory_cases(session):
            yield from memory_variants(n, d).values()
    yield from probe_variants(session, torch.float32).values()
    yield from probe_variants(session, torch.bfloat16).values()
    for n, d in provider_shapes(session):
        for group in provider_variants(session, n, d).values():
            yield from group.values()


def table_variants(session: Session) -> Iterator[Variant]:
    """Every dtype, side, split and stride of some shapes."""
    interpreted = not session.cuda and os.environ.get("TRITON_INTERPRET") == "1"
    for n, d in SHAPES if session.cuda and not session.quick else QUICK:
        for dtype in DTYPES:
            # On the CPU the torch backend takes the place of the kernels.
            backend, layouts = ("triton", True) if session.cuda else ("torch", dtype == torch.bfloat16)
            yield from variants_of_shape(n, d, dtype, backend, layouts=layouts)
    for n, d in TINY if interpreted else ():
        for dtype in (torch.bfloat16, torch.float32):
            yield from variants_of_shape(n, d, dtype, "triton", layouts=dtype == torch.bfloat16)
    for batch, n, d in TINY_BATCHES if interpreted else ():
        yield Variant("ResidentCovariance", n, d, torch.bfloat16, batch)


def variants_of_shape(
    n: int, d: int, dtype: torch.dtype, backend: str, *, layouts: bool
) -> Iterator[Variant]:
    """Both sides up to 2,048; each layout of each dtype is compiled anew, so a few shapes have them all."""
    sides: list[Side] = ["covariance", "gram"] if max(n, d) <= 2048 else ["gram" if n < d else "covariance"]
    some = LAYOUTS if layouts and max(n, d) <= 512 else ("contiguous",)
    for side in sides:
        yield Variant("centered_matrix", n, d, dtype, 1, side, backend=backend)
        for layout in some:
            provider = "ResidentCovariance" if backend == "triton" else "centered_matrix"
            yield Variant(provider, n, d, dtype, 1, side, layout, backend)
    if d <= 256:
        yield Variant("spectral_entropy", n, d, dtype, backend=backend)


def ceilings(session: Session) -> None:
    """Measure what the card reaches at most."""
    if not session.cuda:
        session.skip("ceiling", NO_GPU)
        return
    if session.late("ceiling"):
        return
    device = session.device

    def record(provider: str, call: Callable[[], object], amount: float, **values: object) -> None:
        found = device_times(session, call)
        rate = amount / float(np.median(found.seconds))
        session.add("ceiling", provider=provider, **values, **found.columns(), per_second=rate)

    source = torch.zeros(2**30, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    # bytes: read, write
    record(COPY, functools.partial(target.copy_, source), 2 * source.nbytes, bytes=2 * source.nbytes)
    del source, target
    for m in (4096, 8192):
        x = torch.randn(m, m, dtype=torch.float64, device=device)
        call = functools.partial(torch.mm, x, x, out=torch.empty_like(x))
        record(PRODUCT, call, 2 * m**3, n=m, d=m, flops=2 * m**3)
    one = torch.zeros(1, device=device)
    record("launch of the smallest kernel", functools.partial(one.add_, 1), 1)


def training_step(device: torch.device) -> tuple[nn.Sequential, Callable[[], None]]:
    """Make a small model and one step of its training, on inputs that stay."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 97)).to(device)
    x, y = torch.randn(N, WIDTH, device=device), torch.randint(97, (N,), device=device)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1.0, capturable=device.type == "cuda")

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return model, step


def graph_step(session: Session) -> tuple[Callable[[], None], float]:
    """Capture the step in a CUDA graph, lengthened to `STEP`; the replay and its seconds."""
    _, step = training_step(session.device)

    def seconds(replay: Callable[[], object]) -> float:
        return float(np.median(device_times(session, replay, graph=False).seconds))

    idle = max(0, int((STEP - seconds(capture_cuda_graph(step)[0])) * session.cycles_a_second))

    def longer() -> None:
        step()
        if idle:
            torch.cuda._sleep(idle)

    replay, _ = capture_cuda_graph(longer)
    return replay, seconds(replay)


PROBES = {
    "matrix and participation ratio": "ResidentCovariance",
    "the same, captured": "ResidentCovariance",
    "deferred": "DeferredEntropy",
    "synchronous": "spectral_entropy",
}
"""Ways to follow activations, and what is held to a gate for each."""


def probe_variants(session: Session, dtype: torch.dtype) -> dict[str, Variant]:
    """Variants of `PROBES` that can run here."""
    backend = "triton" if session.cuda else "torch"
    return {
        name: Variant(provider, N, WIDTH, dtype, backend=backend)
        for name, provider in PROBES.items()
        if session.cuda or provider != "ResidentCovariance"
    }


def probes(
    session: Session, hidden: Tensor, names: list[str], deferred: DeferredEntropy
) -> dict[str, Callable[[int], object]]:
    """Return calls that follow `hidden` at a step, of the names given, in order."""

    def defer(step: int) -> None:
        deferred_entropy(deferred, hidden, step)
        for _ in deferred.arrived():
            pass

    found: dict[str, Callable[[int], object]] = {}
    for name in names:
        if name == "deferred":
            found[name] = defer
        elif name == "synchronous":
            found[name] = lambda step: fastent.spectral_entropy(hidden)
        else:
            evaluator = ResidentCovariance(*hidden.shape, device=session.device)
            call = functools.partial(evaluator, hidden, evaluator.output())
            if name == "the same, captured":
                call = capture_cuda_graph(call)[0]  # type: ignore[assignment]
            found[name] = lambda step, call=call: call()  # type: ignore[misc]
    return found


def deferred_entropy(deferred: DeferredEntropy, h: Tensor, step: int = 0) -> None:
    """One deferred evaluation, unless the ring is full."""
    evaluation = deferred.open(step)
    if evaluation is not None:
        with evaluation:
            evaluation.add("h", h)


RING = 64


@contextlib.contextmanager
def ring(h: Tensor) -> Iterator[DeferredEntropy]:
    """Deferred evaluations of `h` whose ring has been full once: it has taken the memory of its slots."""
    deferred = DeferredEntropy(capacity=RING)
    try:
        for step in range(RING):
            deferred_entropy(deferred, h, step)
        deferred.discard()
        yield deferred
        deferred.discard()
    finally:
        deferred.close()


def training(session: Session) -> None:
    """Time of a probe on the thread; slowdown of both kinds of step."""
    if session.late("training"):
        return
    model, plain = training_step(session.device)
    inputs = torch.randn(N, WIDTH, device=session.device)
    with torch.no_grad():
        hidden = model[:2](inputs)
        forward = device_times(session, functools.partial(model[:2], inputs))
        session.add("probe forward", **columns(hidden), **forward.columns())
    narrow = hidden.bfloat16()
    names = only_right(session, "probe on the thread", probe_variants(session, torch.bfloat16))
    with ring(narrow) as deferred:
        ways = probes(session, narrow, names, deferred)
        ways["direct"] = lambda step: float(direct_entropy(narrow))
        for name, probe in ways.items():
            if session.late("probe on the thread", provider=name):
                continue
            before = deferred.dropped
            seconds = host_times(functools.partial(probe, 0), rounds=20 if session.cuda else 10)
            dropped = deferred.dropped - before
            session.add(
                "probe on the thread",
                provider=name,
                **columns(narrow),
                **quantiles(seconds),
                dropped=dropped,
            )
    names = only_right(session, "slowdown", probe_variants(session, torch.float32))
    with ring(hidden) as deferred:
        ways = probes(session, hidden, names, deferred)
        if session.cuda:
            replay, seconds_of_step = graph_step(session)
            slowdowns(session, "graph step", replay, ways, seconds_of_step, deferred)
        else:
            session.skip("slowdown", NO_GPU, step="graph step")
        plain()
        seconds_of_step = seconds_for(session, plain, 20, None, 1) / 20
        slowdowns(session, "plain step", plain, ways, seconds_of_step, deferred)


def slowdowns(
    session: Session,
    kind: str,
    step: Callable[[], object],
    ways: dict[str, Callable[[int], object]],
    seconds_of_step: float,
    deferred: DeferredEntropy,
) -> None:
    """Rows for one kind of step: each probe at each stride against no probe."""
    short = session.quick and kind == "plain step"  # which no target names
    length, turns = (0.02, 5) if short else (0.08, 15)
    strides = STRIDES[:2] if session.quick else STRIDES
    for name, probe in ways.items():
        for stride in strides:
            if session.late("slowdown", step=kind, provider=name, stride=stride):
                continue
            steps = max(stride, int(length / seconds_of_step) // stride * stride)
            with_probe, without = [], []
            deferred.discard()
            before = deferred.dropped
            for _ in range(turns):
                without.append(seconds_for(session, step, steps, None, stride))
                with_probe.append(seconds_for(session, step, steps, probe, stride))
            rounds = [raw(np.array(seconds) / steps) for seconds in (with_probe, without)]
            middle, low, high = ratio(*map(np.array, rounds))
            session.add(
                "slowdown",
                step=kind,
                provider=name,
                stride=stride,
                steps=steps,
                n=N,
                d=WIDTH,
                dtype="float32",
                step_us=seconds_of_step * 1e6,
                probes=turns * (steps // stride),
                # Evaluations that found the ring full: where there are any, the row measures dropping.
                dropped=deferred.dropped - before,
                slowdown=middle - 1.0,
                slowdown_low=low - 1.0,
                slowdown_high=high - 1.0,
                ours_us=rounds[0],
                theirs_us=rounds[1],
            )


def seconds_for(
    session: Session,
    step: Callable[[], object],
    steps: int,
    probe: Callable[[int], object] | None,
    stride: int,
) -> float:
    """Wall time of some steps until the device is done with them."""
    if session.cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for i in range(steps):
        step()
        if probe is not None and i % stride == 0:
            probe(i)
    if session.cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def host(session: Session) -> None:
    """Count, block, and measure the memory."""
    if not session.cuda:
        for op in ("host synchronisations", "blocked stream", "peak memory"):
            session.skip(op, NO_GPU)
        return
    if session.late("host synchronisations"):
        return
    h = activations(N, WIDTH, torch.bfloat16, session.device)
    names = only_right(session, "host synchronisations", probe_variants(session, torch.bfloat16))
    with ring(h) as deferred:
        ways = probes(session, h, names, deferred)
        calls = {name: functools.partial(probe, 0) for name, probe in ways.items()}
        calls["direct"] = lambda: float(direct_entropy(h))
        host_synchronisations(session, calls, deferred)
        for name, call in calls.items():
            if session.late("blocked stream", provider=name):
                continue
            deferred.discard()
            seconds, waited = blocked(call)
            session.add(
                "blocked stream",
                provider=name,
                **columns(h),
                pause_us=PAUSE * 1e6,
                us_p50=seconds * 1e6,
                waited=waited,
            )
    for n, d in memory_cases(session):
        if not session.late("peak memory", n=n, d=d):
            memory(session, n, d)


def host_synchronisations(
    session: Session, calls: dict[str, Callable[[], object]], deferred: DeferredEntropy
) -> None:
    """Rows of the calls that wait, if the profiler saw the direct way wait: else its zeros mean nothing."""
    counts = {}
    for name, call in calls.items():
        call()
        deferred.discard()
        counts[name] = waiting_calls(call)
        deferred.discard()
    for name, count in counts.items():
        if counts["direct"] > 0:
            session.add("host synchronisations", provider=name, n=N, d=WIDTH, calls=count)
        else:
            blind = "the profiler saw no wait in the direct way, which waits: it would see none elsewhere"
            session.skip("host synchronisations", blind, provider=name, n=N, d=WIDTH)


def waiting_calls(call: Callable[[], object]) -> int:
    """CUDA calls that wait for the device in one `call` on this thread; the synchronisation at the end not counted."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    profiler = torch.profiler.profile(activities=activities, acc_events=True)
    with profiler as profile, torch.profiler.record_function("probe"):
        call()
    spans = [event for event in profile.events() if event.name == "probe"]
    start, end = spans[0].time_range.start, spans[0].time_range.end
    return sum(
        any(word in event.name and "Async" not in event.name for word in WAITING)
        and event.thread == spans[0].thread
        and start <= event.time_range.start <= end
        for event in profile.events()
    )


def blocked(call: Callable[[], object]) -> tuple[float, bool]:
    """Seconds after which `call` comes back while the stream is busy for `PAUSE`, and whether it was idle again."""
    torch.cuda.synchronize()
    torch.cuda._sleep(int(PAUSE * 2e9))
    busy = torch.cuda.Event()
    busy.record()
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    waited = bool(busy.query())
    torch.cuda.synchronize()
    return seconds, waited


def memory_cases(session: Session) -> tuple[tuple[int, int], ...]:
    """Shapes whose peak memory is measured."""
    return MEMORY_CASES[:1] if session.quick else MEMORY_CASES


def memory_variants(n: int, d: int) -> dict[str, Variant]:
    """Our ways whose memory is measured."""
    return {
        "fastent": Variant("centered_matrix", n, d, torch.bfloat16),
        "fastent, memory at hand": Variant("ResidentCovariance", n, d, torch.bfloat16),
    }


def memory(session: Session, n: int, d: int) -> None:
    """Bytes above the input at the peak, of the matrix by each way."""
    variants = memory_variants(n, d)
    names = only_right(session, "peak memory", variants, n=n, d=d)
    h = activations(n, d, torch.bfloat16, session.device)
    evaluator = variants["fastent, memory at hand"].evaluator(session.device)
    held = evaluator.workspace.nbytes() + evaluator.output().nbytes()
    ways: dict[str, Callable[[], object]] = {
        "fastent": functools.partial(centered_matrix, h),
        "fastent, memory at hand": functools.partial(evaluator, h, evaluator.output()),
        "direct": functools.partial(direct_covariance, h),
    }
    for name in [*names, "direct"]:
        call = ways[name]
        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        extra = torch.cuda.max_memory_allocated() - before
        del result
        session.add(
            "peak memory",
            provider=name,
            **columns(h),
            extra_bytes=extra,
            held_bytes=held if name.endswith("hand") else 0,
            input_bytes=h.nbytes,
        )


def work(evaluator: ResidentCovariance, h: Tensor) -> tuple[int, int]:
    """Bytes that must move, and float64 operations that are executed, in one evaluation."""
    m, length = (h.shape[-1], h.shape[-2]) if evaluator.side == "covariance" else h.shape[-2:]
    cut = partition(evaluator.side, m, length)
    out = evaluator.output()
    # bytes: read h once, write the lower tiles once; flops: 2 for each product and sum in the lower tiles
    written = 8 * min(cut.tiles * cut.tile.edge**2, m * m) * evaluator.batch + out.centre.nbytes
    return h.numel() * h.element_size() + written, 2 * cut.tiles * cut.tile.edge**2 * length * evaluator.batch


def kernel_variants(session: Session) -> list[Variant]:
    """Every shape in bfloat16, some in float32 and float64, and the batches."""
    cases = [Variant("ResidentCovariance", n, d, torch.bfloat16) for n, d in KERNEL_SHAPES]
    cases += [
        Variant("ResidentCovariance", n, d, dtype)
        for n, d in ((512, 128), (8192, 2048), (8192, 4096))
        for dtype in (torch.float32, torch.float64)
    ]
    cases += [Variant("ResidentCovariance", n, d, torch.bfloat16, batch) for batch, n, d in KERNEL_BATCHES]
    named = {(1, 512, 128), (BATCH, 512, 128), (1, 8192, 4096)}  # by targets
    quick = [case for case in cases if case.dtype == torch.bfloat16 and (case.batch, case.n, case.d) in named]
    return quick if session.quick else cases


def kernel(session: Session) -> None:
    """Time the evaluator, warm and cold."""
    if not session.cuda:
        session.skip("kernel", NO_GPU)
        return
    for variant in kernel_variants(session):
        named = {key: variant.columns()[key] for key in ("batch", "n", "d", "dtype", "side")}
        if session.late("kernel", **named):
            continue
        if not right(session, variant):
            session.skip("kernel", NOT_RIGHT, **named)
            continue
        h, evaluator = variant.input(session.device), variant.evaluator(session.device)
        out = evaluator.output()
        size, flops = work(evaluator, h)
        rounds = 5 if flops > 1e12 else 20
        for cache in ("warm", "cold"):
            call = functools.partial(evaluator, h, out)
            found = device_times(session, call, rounds=rounds, cold=cache == "cold")
            session.add(
                "kernel",
                provider="fastent",
                **named,
                cache=cache,
                launches=len(evaluator.launches(h, out)),
                **found.columns(),
                bytes=size,
                flops=flops,
                tflops=flops / float(np.median(found.seconds)) / 1e12,
            )
        del h, out, evaluator


def float32_covariance(h: Tensor) -> Tensor:
    """Covariance in float32, without TF32: not exact, a floor for what precision costs."""
    x = h.float()
    x = x - x.mean(0)
    return x.T @ x / x.shape[0]


def rank_me(h: Tensor) -> Tensor:
    """RankMe: entropy of the singular values of the float32 activations (not centred, not squared)."""
    s = torch.linalg.svdvals(h.float())
    p = s / s.sum() + 1e-7
    return -(p * p.log()).sum()


def provider_shapes(session: Session) -> tuple[tuple[int, int], ...]:
    """Shapes at which the providers are timed."""
    if session.quick:
        return TARGET_SHAPES if session.cuda else QUICK_PROVIDER_SHAPES
    return PROVIDER_SHAPES


def provider_variants(session: Session, n: int, d: int) -> dict[str, dict[str, Variant]]:
    """Ours among the providers, by operation."""
    backend = "triton" if session.cuda else "torch"
    matrix = Variant("centered_matrix", n, d, torch.bfloat16, side="covariance", backend=backend)
    groups = {"covariance": {"fastent": matrix}}
    if session.cuda:
        groups["covariance"]["fastent, memory at hand"] = matrix._replace(provider="ResidentCovariance")
        if partition("covariance", d, n).tile.gluon:
            groups["covariance"]["fastent, without Gluon"] = matrix._replace(provider="WithoutGluon")
    if d <= 1024:
        groups["entropy"] = {
            "fastent": Variant("spectral_entropy", n, d, torch.bfloat16, backend=backend),
        }
    return groups


def covariances(session: Session, h: Tensor) -> dict[str, Callable[[], object]]:
    """Return calls that make the covariance of `h`, by provider."""
    n, d = h.shape
    calls: dict[str, Callable[[], object]] = {
        "fastent": functools.partial(centered_matrix, h, side="covariance"),
        "direct": functools.partial(direct_covariance, h),
        "torch.cov": functools.partial(torch_cov, h),
        "float32": functools.partial(float32_covariance, h),
    }
    for provider, variant in provider_variants(session, n, d)["covariance"].items():
        if provider != "fastent":
            evaluator = variant.evaluator(session.device)
            calls[provider] = functools.partial(evaluator, h, evaluator.output())
    if not session.quick and (n, d) in COMPILED:
        calls["direct, torch.compile"] = functools.partial(torch.compile(direct_covariance, dynamic=False), h)
    # The full float64 product alone, its copy made before: what the kernel at large d is compared with.
    copy, out = h.double(), torch.empty(d, d, dtype=torch.float64, device=h.device)
    calls[PRODUCT] = functools.partial(torch.mm, copy.T, copy, out=out)
    return calls


def entropies(session: Session, h: Tensor) -> dict[str, Callable[[], object]]:
    """Return calls that make the entropy of `h`, by provider."""
    calls: dict[str, Callable[[], object]] = {
        "fastent": functools.partial(fastent.spectral_entropy, h),
        "direct": functools.partial(direct_entropy, h),
    }
    if max(h.shape) <= 4096:
        calls["RankMe by svdvals"] = functools.partial(rank_me, h)
    if not session.quick and tuple(h.shape) in COMPILED:
        calls["direct, torch.compile"] = functools.partial(torch.compile(direct_entropy, dynamic=False), h)
    return calls


def providers(session: Session) -> None:
    """Time all providers at every shape."""
    if session.quick:
        session.skip(
            "covariance",
            "--quick: compilation takes longer than the rehearsal",
            provider="direct, torch.compile",
        )
    makers = {"covariance": covariances, "entropy": entropies}
    for n, d in provider_shapes(session):
        for op, variants in provider_variants(session, n, d).items():
            if session.late(op, n=n, d=d):
                continue
            good = only_right(session, op, variants, n=n, d=d)
            h = activations(n, d, torch.bfloat16, session.device)
            calls = makers[op](session, h)
            calls = {name: call for name, call in calls.items() if name in good or name not in variants}
            torch.compiler.reset()
            found = _measured(session, op, h, calls)
            base = found.get("fastent")
            for provider, (times, kept) in found.items():
                session.add(
                    op,
                    provider=provider,
                    **columns(h),
                    **times.columns(),
                    host_us=float(np.median(kept)) * 1e6,
                    # bytes: read h (2 n d), write the matrix (8 d d); flops: the full product
                    bytes=2 * n * d + 8 * d * d,
                    flops=2 * n * d * d,
                    over_fastent=base and float(np.median(times.seconds) / np.median(base[0].seconds)),
                )


def _measured(
    session: Session, op: str, h: Tensor, calls: dict[str, Callable[[], object]]
) -> dict[str, tuple[Timing, np.ndarray]]:
    """Device and host seconds of each call; a provider that fails is recorded and left out."""
    good = {}
    for provider, call in calls.items():
        try:
            call()
            good[provider] = call
        except Exception as error:  # a provider that cannot run must not end the benchmark
            session.skip(op, f"{type(error).__name__}: {error}"[:300], provider=provider, **columns(h))
    rounds = 5 if session.quick else 10
    parts: dict[str, list[Timing]] = {provider: [] for provider in good}
    for _ in range(2 if session.quick else 3):  # in turn
        for provider, call in good.items():
            parts[provider].append(device_times(session, call, rounds=rounds))
    return {
        provider: (joined(parts[provider]), host_times(good[provider], rounds=rounds)) for provider in good
    }


def joined(timings: list[Timing]) -> Timing:
    """Put timings of one call together: the device's alone only where each is."""
    hows = list(dict.fromkeys(timing.how for timing in timings))
    how = hows[0] if len(hows) == 1 else "host" if "host" in hows else "sleep"
    seconds = np.concatenate([timing.seconds for timing in timings])
    return Timing(seconds, how, min(timing.repeats for timing in timings))


def eigensolve(session: Session) -> None:
    """Time each size; eigenvalues alone, of covariances of 2 d rows."""
    threads = torch.get_num_threads()
    for d in SIZES[:3] if session.quick else SIZES:
        if session.late("eigensolve", d=d):
            continue
        matrix = direct_covariance(activations(2 * d, d, torch.float32, session.device))
        rounds = 5 if d >= 512 or session.quick else 15
        torch.set_num_threads(1)  # as the worker has
        try:
            _record(session, "lapack, one thread", 1, matrix.cpu(), rounds)
        finally:
            torch.set_num_threads(threads)
        if not session.cuda:
            session.skip("eigensolve", NO_GPU, provider="cusolver", d=d)
            continue
        _record(session, "cusolver", 1, matrix, rounds)
        batch = matrix.expand(BATCH, d, d).contiguous()
        _record(session, "cusolver, batched call", BATCH, batch, rounds)


def _record(session: Session, provider: str, batch: int, matrix: Tensor, rounds: int) -> None:
    """Time one way and record it: the host waits for the eigenvalues, so its clock has all of it."""
    call = functools.partial(torch.linalg.eigvalsh, matrix)

    def solve() -> None:
        call().cpu()

    seconds = host_times(solve, rounds=rounds)
    d = matrix.shape[-1]
    session.add(
        "eigensolve",
        provider=provider,
        batch=batch,
        d=d,
        dtype="float64",
        **quantiles(seconds),
        us_per_matrix=float(np.median(seconds)) * 1e6 / batch,
        # bytes: read the matrix; flops: 4/3 d^3, the reduction to tridiagonal form
        bytes=8 * d * d * batch,
        flops=4 * d**3 * batch // 3,
    )


PARTS: dict[str, Callable[[Session], None]] = {
    "correctness": correctness,
    "ceilings": ceilings,
    "training": training,
    "host": host,
    "kernel": kernel,
    "providers": providers,
    "eigensolve": eigensolve,
}


def run_part(make: Callable[[], Session]) -> None:
    """Run the part of the session that `make` opens; what ends it early is a row."""
    session = make()
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        PARTS[session.part](session)
    except Exception as error:  # the other parts go on
        traceback.print_exc()
        session.broke(f"the part broke: {type(error).__name__}: {error}"[:500])


def isolated(work: Callable[[], object], seconds: float) -> str | None:
    """Run `work` in a process of its own and say why it did not end by itself, None if it did.

    The process is a fork, so that it need not import everything again; this one never touches the GPU, which a fork
    could not use any more.
    """
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(max(0.0, seconds))
    if process.is_alive():
        process.kill()
        process.join()
        return f"the part was ended after {seconds:.0f} s"
    return f"the part's process ended with status {process.exitcode}" if process.exitcode else None


def main(argv: list[str] | None = None) -> int:
    """Run the parts that were asked for; 1 where a result is wrong or a part broke."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true", help="few shapes: on a GPU those that targets name")
    parser.add_argument("--part", action="append", choices=PARTS, help="default: all")
    parser.add_argument("--minutes", type=float, default=7.5, help="after which what is left is skipped")
    options = parser.parse_args(argv)
    if options.device == "cuda" and isolated(lambda: sys.exit(not torch.cuda.is_available()), 60.0):
        parser.error("torch.cuda.is_available() is False; --device cpu --quick is a rehearsal without a GPU")
    options.out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    end = start + 60 * options.minutes
    run = datetime.now(UTC).isoformat(timespec="milliseconds")
    names = options.part or list(PARTS)
    opened = functools.partial(Session, torch.device(options.device), options.quick, options.out, run=run)
    for name in names:
        begun = time.monotonic()
        # What the other parts time is held to its gate by them, where the time for it is up here.
        deadline = (begun + end) / 2 if name == "correctness" and len(names) > 1 else end
        make = functools.partial(opened, deadline=deadline, part=name)
        reason = isolated(functools.partial(run_part, make), max(0.0, deadline - begun) + GRACE)
        if reason:
            make().broke(reason)
        print(f"{name:12s} {time.monotonic() - begun:6.1f} s", flush=True)
    rows = opened(deadline=end).rows
    outside = [row for row in rows if not row.get("passed", True)]
    broke = [row for row in rows if row.get("broke")]
    for row in outside:
        print("outside its gate, not timed:", {key: row.get(key) for key in Variant._fields}, file=sys.stderr)
    for row in broke:
        print(f"{row['part']}: {row['skipped']}", file=sys.stderr)
    skipped = sum("skipped" in row for row in rows)
    print(f"{len(rows)} rows, {skipped} of them skipped, {time.monotonic() - start:.0f} s: {options.out}")
    return int(bool(outside or broke))


if __name__ == "__main__":
    sys.exit(main())
