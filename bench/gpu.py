"""Everything that a GPU should tell us, in one call: ``python -m bench.gpu --out DIR``.

Correctness comes first: a wrong result ends the run with status 1, before any timing. Rows go to ``DIR/gpu.jsonl`` as
they are made; ``python -m bench.report DIR`` makes figures and tables. A row that has no meaning on a device is written
with ``"skipped"`` and the reason, and without a figure.

`correctness`
    Every dtype, side, split and stride against the CPU in float64. Up to 2,048 columns the whole lower triangle is
    compared with the two-pass covariance; above, entries at random places. The gate is that of the kernel tests:
    ``eps n a_i a_j`` with a the largest centred magnitude of a column. Entropies are compared with those of the CPU
    path for d <= 256.
`training`
    The time of a probe, and the slowdown of a step: an MLP under AdamW, captured in a CUDA graph and lengthened by an
    idle kernel to 0.15 ms; and the same step without a graph. The probe is the hidden activations of 512 fixed inputs,
    128 wide. Slowdowns are ratios of neighbours: the same number of steps without a probe, then with one, again and
    again. The forward pass that makes the activations is a row of its own (`probe forward`) and is in none of the
    others.
`host`
    Host synchronisations, counted twice: calls of the CUDA runtime by torch's profiler, and by a stream that is kept
    busy: what waits for it comes back late. And the peak memory of the matrix by each way.
`kernel`
    Kernel time, from 512 x 64 to 65536 x 8192, warm and cold second-level cache, and its share of the floor: the longer
    of what the bytes and the floating-point operations take at `PEAK_BYTES` and `PEAK_FLOPS`. Executed operations:
    lower tiles, those on the diagonal whole.
`providers`
    What else one could do with the same activations, timed in turn. `us_*` is time on the device, `host_us` the median
    time for which the calling thread is kept: a provider that stops the host pays there. Covariances and whole
    entropies are rows of their own (`op`).
`eigensolve`
    cuSOLVER one at a time and batched, LAPACK on one thread of the host, per size.

Under 8 minutes on an H100 or H200; no network, no test runner. ``--device cpu --quick`` is a rehearsal: what needs a
GPU is recorded as skipped, and no time of it says anything about one. There the torch backend takes the place of the
kernels; with TRITON_INTERPRET=1 they run interpreted on the smallest shapes.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import fastent
from bench.harness import Row, columns, environment, nvidia_smi, quantiles, ratio, write_rows
from bench.providers import direct_covariance, direct_entropy, torch_cov
from fastent.covariance import centered_matrix, triton_obstacle
from fastent.grokking.train.stack import capture_cuda_graph
from fastent.kernels.covariance import ResidentCovariance
from fastent.kernels.launch import partition
from fastent.monitor.deferred import DeferredEntropy

NO_GPU = "no CUDA device: this measures one"

# Datasheet of an H200 (SXM): the floors of the kernel's times refer to them. H100 SXM has the same tensor rate.
PEAK_FLOPS = 67e12  # float64 on the tensor cores
PEAK_BYTES = 4.3e12  # a copy, measured; datasheet 4.8

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
LARGE = ((8192, 4096), (4096, 8192))
QUICK = ((512, 64), (41, 127), (4096, 33), (64, 300))
TINY = ((41, 35), (140, 20), (20, 140))
SAMPLES = 4096

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
    (8192, 2048),
    (8192, 4096),
    (65536, 128),
)
COMPILED = ((512, 128), (8192, 2048))  # torch.compile takes ten seconds or more for each
QUICK_PROVIDER_SHAPES = ((512, 64), (512, 128), (2048, 96))

SIZES = (64, 128, 256, 512, 1024)
BATCH = 32  # matrices in a batched call, probes in one launch


@dataclass
class Session:
    """One run of the benchmark: where, how long, and the rows so far."""

    device: torch.device
    quick: bool
    out: Path
    deadline: float  # of time.monotonic(); parts stop before it and say so
    rows: list[Row] = field(default_factory=list)
    part: str = ""
    _environment: Row = field(default_factory=dict)

    @property
    def cuda(self) -> bool:
        """Whether there is a GPU to measure."""
        return self.device.type == "cuda"

    def late(self, op: str, **values: object) -> bool:
        """Whether the time of the whole run is used up; `op` is recorded as skipped then."""
        late = time.monotonic() > self.deadline
        if late:
            self.skip(op, "the time of the run was used up", **values)
        return late

    def add(self, op: str, **values: object) -> None:
        """Record a row, with the environment, and write all rows so far: nothing is lost to a crash."""
        if not self._environment:
            self._environment = device_environment(self.device)
        self.rows.append({"part": self.part, "op": op, **values, **clocks(self.device), **self._environment})
        write_rows(self.out / "gpu.jsonl", self.rows)

    def skip(self, op: str, reason: str, **values: object) -> None:
        """Record that something was not measured, and why."""
        self.add(op, skipped=reason, **values)


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
    """Clocks now in MHz, of the multiprocessors and the memory; nothing on the CPU."""
    if device.type == "cuda":
        with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError):
            sm, memory = map(int, nvidia_smi("clocks.sm,clocks.mem")[device.index or 0].split(","))
            return {"sm_mhz": sm, "memory_mhz": memory}
    return {"sm_mhz": None, "memory_mhz": None}


def device_times(
    session: Session,
    call: Callable[[], object],
    *,
    rounds: int = 20,
    cold: bool = False,
    graph: bool = False,
) -> np.ndarray:
    """Seconds of `call` on the device, shape (rounds,).

    On CUDA by events, around as many calls as last about a millisecond, queued behind a pause so that the host is
    ahead; with `graph` they are captured once and replayed, so that short kernels are not timed by their launches;
    with `cold` one call a round, after the second-level cache was overwritten. On the CPU by the clock.
    """
    if not session.cuda:
        return host_times(call, rounds=rounds)
    call()
    cache = torch.empty(256 * 2**20 if cold else 1, dtype=torch.int8, device=session.device)
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    repeats = 1 if cold else max(1, min(200, int(1e-3 / max(time.perf_counter() - start, 1e-7))))

    def several() -> None:
        for _ in range(repeats):
            call()

    queue: Callable[[], object] = capture_cuda_graph(several)[0] if graph else several
    pairs = []
    for _ in range(rounds):
        if cold:
            cache.zero_()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        torch.cuda._sleep(200_000)
        events[0].record()
        queue()
        events[1].record()
        pairs.append(events)
    torch.cuda.synchronize()
    return np.array([first.elapsed_time(last) * 1e-3 / repeats for first, last in pairs])


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


def layouts(x: Tensor) -> dict[str, Tensor]:
    """Return views of the same values under other strides."""
    return {
        "contiguous": x,
        "transposed": x.T.contiguous().T,
        "padded rows": torch.nn.functional.pad(x, (3, 2), value=7.0)[:, 3:-2],
        "strided": x.repeat_interleave(2, dim=1)[:, ::2],
    }


def correctness(session: Session) -> bool:
    """Compare everything; say whether all is inside the gates."""
    passed = True
    if session.cuda:
        obstacle = triton_obstacle(session.device)
        if obstacle:
            session.skip("gate", f"the kernels cannot run here: {obstacle}", provider="triton")
            return False
        shapes = QUICK if session.quick else SHAPES
        for n, d in shapes:
            for dtype in DTYPES:
                passed &= compare(session, n, d, dtype, "triton")
        if not session.quick:
            for n, d in LARGE:
                passed &= compare(session, n, d, torch.bfloat16, "triton")
        return passed
    for n, d in QUICK:
        for dtype in DTYPES:
            passed &= compare(session, n, d, dtype, "torch")
    if os.environ.get("TRITON_INTERPRET") == "1":
        for n, d in TINY:
            for dtype in DTYPES:
                passed &= compare(session, n, d, dtype, "triton")
    else:
        session.skip("gate", "no CUDA device, and TRITON_INTERPRET is not 1", provider="triton")
    return passed


def compare(session: Session, n: int, d: int, dtype: torch.dtype, provider: str) -> bool:
    """Rows for one shape and dtype: each layout and side against the CPU, and the entropy."""
    x = activations(n, d, dtype, session.device)
    # Each layout of each dtype is compiled anew: a few shapes are enough.
    views = layouts(x) if max(n, d) <= 512 else {"contiguous": x}
    host = x.cpu().double()  # x itself on the CPU in float64: not to be changed
    host = host - host.mean(0)
    sides = ["covariance", "gram"] if max(n, d) <= 2048 else ["gram" if n < d else "covariance"]
    good = True
    for side in sides:
        y = host if side == "covariance" else host.T
        largest = y.abs().amax(0)
        places = pick(y.shape[1])
        want = products(y, places) / n
        bits = None
        for layout, view in views.items():
            got = centered_matrix(view, backend=provider, side=side).matrix  # type: ignore[arg-type]
            found = got.cpu()[places]
            error = (
                (found - want).abs() / (EPS * (y.shape[0] + 2) * largest[places[0]] * largest[places[1]])
            ).max()
            bits = found if bits is None else bits
            same = bool(torch.equal(bits, found))
            passed = bool(error < 1.0) and same
            good &= passed
            session.add(
                "gate",
                provider=provider,
                batch=1,
                **columns(x),
                side=side,
                layout=layout,
                entries=len(want),
                matrix_over_gate=float(error),
                same_bits_as_contiguous=same,
                passed=passed,
            )
    if 1 < d <= 256:
        want_h = fastent.spectral_entropy(x.cpu(), backend="torch").normalized
        difference = abs(fastent.spectral_entropy(x, backend=provider).normalized - want_h)  # type: ignore[arg-type]
        good &= difference <= 1e-12
        session.add(
            "gate",
            provider=f"{provider}, entropy",
            batch=1,
            **columns(x),
            entropy_over_gate=difference / 1e-12,
            passed=difference <= 1e-12,
        )
    return good


def pick(m: int) -> tuple[Tensor, Tensor]:
    """Places on and below the diagonal: all of them up to 2,048, then `SAMPLES` at random, corners included."""
    if m <= 2048:
        i, j = torch.tril_indices(m, m)
        return i, j
    generator = torch.Generator().manual_seed(m)
    a, b = torch.randint(m, (2, SAMPLES), generator=generator)
    a[:4], b[:4] = torch.tensor([0, m - 1, m - 1, m - 2]), torch.tensor([0, 0, m - 1, 1])
    return torch.maximum(a, b), torch.minimum(a, b)


def products(y: Tensor, places: tuple[Tensor, Tensor]) -> Tensor:
    """Entries of ``y^T y`` at `places`."""
    if y.shape[1] <= 2048:
        return (y.T @ y)[places]
    columns = y.T.contiguous()
    parts = [
        (columns[i] * columns[j]).sum(1)
        for i, j in zip(places[0].split(256), places[1].split(256), strict=True)
    ]
    return torch.cat(parts)


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


def graph_step(session: Session) -> tuple[nn.Sequential, Callable[[], None], float]:
    """Capture the step in a CUDA graph, lengthened to `STEP`; the model, the replay and its seconds."""
    model, step = training_step(session.device)
    bare = float(np.median(device_times(session, capture_cuda_graph(step)[0])))
    second = float(np.median(device_times(session, lambda: torch.cuda._sleep(1_000_000)))) / 1e6
    idle = max(0, int((STEP - bare) / second))

    def longer() -> None:
        step()
        if idle:
            torch.cuda._sleep(idle)

    replay, _ = capture_cuda_graph(longer)
    return model, replay, float(np.median(device_times(session, replay)))


def probes(session: Session, hidden: Tensor, deferred: DeferredEntropy) -> dict[str, Callable[[int], object]]:
    """Ways to follow `hidden` at a step, by name."""

    def defer(step: int) -> None:
        deferred_entropy(deferred, hidden, step)
        for _ in deferred.arrived():
            pass

    found: dict[str, Callable[[int], object]] = {
        "deferred": defer,
        "synchronous": lambda step: fastent.spectral_entropy(hidden),
    }
    if session.cuda:
        evaluator = ResidentCovariance(*hidden.shape, device=session.device)
        out = evaluator.output()
        replay, _ = capture_cuda_graph(functools.partial(evaluator, hidden, out))
        found = {
            "matrix and participation ratio": lambda step: evaluator(hidden, out),
            "the same, captured": lambda step: replay(),
            **found,
        }
    return found


def training(session: Session) -> None:
    """Time of a probe in the stream and on the thread; slowdown of both kinds of step."""
    model, plain = training_step(session.device)
    inputs = torch.randn(N, WIDTH, device=session.device)
    with torch.no_grad():
        hidden = model[:2](inputs)
        forward = functools.partial(model[:2], inputs)
        session.add("probe forward", **columns(hidden), **quantiles(device_times(session, forward)))
    deferred = DeferredEntropy(capacity=64)
    ways = probes(session, hidden, deferred)
    for name, probe in ways.items():
        seconds = host_times(functools.partial(probe, 0), rounds=20 if session.cuda else 10)
        session.add("probe on the thread", provider=name, **columns(hidden), **quantiles(seconds))
    if session.cuda:
        for batch in (1, BATCH):
            h = hidden.bfloat16().expand(batch, N, WIDTH).contiguous()
            evaluator = ResidentCovariance(N, WIDTH, batch=batch, device=session.device)
            call = functools.partial(evaluator, h, evaluator.output())
            seconds = device_times(session, call, graph=True)
            session.add("probe in the stream", batch=batch, **columns(h), **quantiles(seconds))
        _, replay, seconds_of_step = graph_step(session)
        slowdowns(session, "graph step", replay, ways, seconds_of_step, deferred)
    else:
        session.skip("probe in the stream", NO_GPU)
        session.skip("slowdown", NO_GPU, step="graph step")
    seconds_of_step = float(np.median(device_times(session, plain, rounds=5)))
    slowdowns(session, "plain step", plain, ways, seconds_of_step, deferred)
    deferred.discard()
    deferred.close()


def slowdowns(
    session: Session,
    kind: str,
    step: Callable[[], object],
    ways: dict[str, Callable[[int], object]],
    seconds_of_step: float,
    deferred: DeferredEntropy,
) -> None:
    """Rows for one kind of step: each probe at each stride against no probe."""
    length = 0.02 if session.quick else 0.08
    strides = STRIDES[:2] if session.quick else STRIDES
    for name, probe in ways.items():
        for stride in strides:
            if session.late("slowdown", step=kind, provider=name):
                continue
            steps = max(stride, int(length / seconds_of_step) // stride * stride)
            with_probe, without = [], []
            deferred.discard()
            before = deferred.dropped
            turns = 5 if session.quick else 15
            for _ in range(turns):
                without.append(seconds_for(session, step, steps, None, stride))
                with_probe.append(seconds_for(session, step, steps, probe, stride))
            middle, low, high = ratio(np.array(with_probe), np.array(without))
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
                probes=turns * -(-steps // stride),
                dropped=deferred.dropped - before,  # evaluations that found the ring full
                slowdown=middle - 1.0,
                slowdown_low=low - 1.0,
                slowdown_high=high - 1.0,
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
    h = activations(512, 128, torch.bfloat16, session.device)
    evaluator = ResidentCovariance(512, 128, device=session.device)
    deferred = DeferredEntropy(capacity=64)
    calls: dict[str, Callable[[], object]] = {
        "matrix and participation ratio": functools.partial(evaluator, h, evaluator.output()),
        "deferred": functools.partial(deferred_entropy, deferred, h),
        "synchronous": functools.partial(fastent.spectral_entropy, h),
        "direct": lambda: float(direct_entropy(h)),
    }
    for name, call in calls.items():
        call()
        deferred.flush()
        session.add("host synchronisations", provider=name, n=512, d=128, calls=waiting_calls(call))
        deferred.flush()
        seconds = blocked(call)
        session.add("blocked stream", provider=name, n=512, d=128, pause_us=PAUSE * 1e6, us_p50=seconds * 1e6)
        deferred.flush()
    deferred.close()
    for n, d in MEMORY_CASES[:1] if session.quick else MEMORY_CASES:
        memory(session, n, d)


def deferred_entropy(deferred: DeferredEntropy, h: Tensor, step: int = 0) -> None:
    """One deferred evaluation, unless the ring is full."""
    evaluation = deferred.open(step)
    if evaluation is not None:
        with evaluation:
            evaluation.add("h", h)


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


def blocked(call: Callable[[], object]) -> float:
    """Seconds after which `call` comes back while the stream is busy for `PAUSE`."""
    cycles = int(PAUSE * 2e9)
    torch.cuda.synchronize()
    torch.cuda._sleep(cycles)
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    torch.cuda.synchronize()
    return seconds


def memory(session: Session, n: int, d: int) -> None:
    """Bytes above the input at the peak, of the matrix by each way."""
    h = activations(n, d, torch.bfloat16, session.device)
    evaluator = ResidentCovariance(n, d, device=session.device)
    held = evaluator.workspace.nbytes() + evaluator.output().nbytes()
    ways: dict[str, Callable[[], object]] = {
        "fastent": functools.partial(centered_matrix, h),
        "fastent, memory at hand": functools.partial(evaluator, h, evaluator.output()),
        "direct": functools.partial(direct_covariance, h),
    }
    for name, call in ways.items():
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


def kernel(session: Session) -> None:
    """Time every shape in bfloat16, some in float32 and float64, and the batches."""
    if not session.cuda:
        session.skip("kernel", NO_GPU)
        return
    cases = [(1, n, d, torch.bfloat16) for n, d in KERNEL_SHAPES]
    cases += [
        (1, n, d, dtype)
        for n, d in ((512, 128), (8192, 2048), (8192, 4096))
        for dtype in (torch.float32, torch.float64)
    ]
    cases += [(*shape, torch.bfloat16) for shape in KERNEL_BATCHES]
    if session.quick:
        cases = [case for case in cases if case[1] <= 512 and case[2] <= 1024]
    for batch, n, d, dtype in cases:
        if session.late("kernel", n=n, d=d):
            continue
        h = activations(n, d, dtype, session.device, batch=batch)
        evaluator = ResidentCovariance(n, d, batch=batch, device=session.device)
        out = evaluator.output()
        size, flops = work(evaluator, h)
        floor = max(size / PEAK_BYTES, flops / PEAK_FLOPS)
        rounds = 5 if flops > 1e12 else 20
        for cache in ("warm", "cold"):
            call = functools.partial(evaluator, h, out)
            seconds = device_times(session, call, rounds=rounds, cold=cache == "cold", graph=True)
            middle = float(sorted(seconds)[len(seconds) // 2])
            session.add(
                "kernel",
                provider="fastent",
                batch=batch,
                **columns(h),
                side=evaluator.side,
                cache=cache,
                launches=len(evaluator.launches(h, out)),
                **quantiles(seconds),
                bytes=size,
                flops=flops,
                tflops=flops / middle / 1e12,
                floor_us=floor * 1e6,
                share_of_floor=floor / middle,
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


def covariances(session: Session, h: Tensor) -> dict[str, Callable[[], object]]:
    """Return calls that make the covariance of `h`, by provider."""
    n, d = h.shape
    calls: dict[str, Callable[[], object]] = {
        "fastent": functools.partial(centered_matrix, h, side="covariance"),
        "direct": functools.partial(direct_covariance, h),
        "torch.cov": functools.partial(torch_cov, h),
        "float32": functools.partial(float32_covariance, h),
    }
    if session.cuda:
        evaluator = ResidentCovariance(n, d, device=session.device, side="covariance")
        calls["fastent, memory at hand"] = functools.partial(evaluator, h, evaluator.output())
    if not session.quick and (n, d) in COMPILED:
        calls["direct, torch.compile"] = functools.partial(torch.compile(direct_covariance, dynamic=False), h)
    copy, out = h.double(), torch.zeros(d, d, dtype=torch.float64, device=h.device)
    # The full float64 product alone, its copy made before: what the kernel at large d is compared with.
    calls["addmm on a float64 copy"] = functools.partial(
        torch.addmm, out, copy.T, copy, beta=0.0, alpha=1 / n
    )
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
    for n, d in QUICK_PROVIDER_SHAPES if session.quick else PROVIDER_SHAPES:
        if session.late("covariance", n=n, d=d):
            continue
        h = activations(n, d, torch.bfloat16, session.device)
        groups = {"covariance": covariances(session, h)}
        if d <= 1024:
            groups["entropy"] = entropies(session, h)
        for op, calls in groups.items():
            torch.compiler.reset()
            found = _measured(session, calls)
            base = next(iter(found.values()))[0]
            for provider, (seconds, kept) in found.items():
                session.add(
                    op,
                    provider=provider,
                    **columns(h),
                    **quantiles(seconds),
                    host_us=float(np.median(kept)) * 1e6,
                    # bytes: read h (2 n d), write the matrix (8 d d); flops: the full product
                    bytes=2 * n * d + 8 * d * d,
                    flops=2 * n * d * d,
                    over_fastent=float(np.median(seconds) / np.median(base)),
                )


def _measured(
    session: Session, calls: dict[str, Callable[[], object]]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Device and host seconds of each call; a provider that fails is recorded and left out."""
    good = {}
    for provider, call in calls.items():
        try:
            call()
            good[provider] = call
        except Exception as error:  # a provider that cannot run must not end the benchmark
            session.skip("covariance", f"{type(error).__name__}: {error}"[:300], provider=provider)
    rounds = 5 if session.quick else 10
    parts: dict[str, list[np.ndarray]] = {provider: [] for provider in good}
    for _ in range(2 if session.quick else 3):  # in turn
        for provider, call in good.items():
            parts[provider].append(device_times(session, call, rounds=rounds))
    return {
        provider: (np.concatenate(parts[provider]), host_times(call, rounds=rounds))
        for provider, call in good.items()
    }


def eigensolve(session: Session) -> None:
    """Time each size; eigenvalues alone, of covariances of 2 d rows."""
    threads = torch.get_num_threads()
    for d in SIZES[:3] if session.quick else SIZES:
        if session.late("eigensolve", d=d):
            continue
        matrix = centered_matrix(activations(2 * d, d, torch.float32, session.device)).matrix.tril()
        matrix = matrix + matrix.tril(-1).mT
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


PARTS: dict[str, Callable[[Session], bool | None]] = {
    "correctness": correctness,
    "training": training,
    "host": host,
    "kernel": kernel,
    "providers": providers,
    "eigensolve": eigensolve,
}


def main(argv: list[str] | None = None) -> int:
    """Run the parts that were asked for; 1 where a result is wrong or a part broke."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true", help="few shapes and rounds")
    parser.add_argument("--part", action="append", choices=PARTS, help="default: all")
    parser.add_argument("--minutes", type=float, default=7.5, help="after which what is left is skipped")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch.cuda.is_available() is False; --device cpu --quick is a rehearsal without a GPU")
    options.out.mkdir(parents=True, exist_ok=True)
    torch.backends.cuda.matmul.allow_tf32 = False
    start = time.monotonic()
    deadline = start + 60 * options.minutes
    session = Session(torch.device(options.device), options.quick, options.out, deadline)
    failed = False
    for name in options.part or PARTS:
        session.part = name
        begun = time.monotonic()
        try:
            if PARTS[name](session) is False:
                failed = True
                print("a result is outside its gate: nothing is timed", file=sys.stderr)
        except Exception as error:  # one part must not cost the rows of the others
            failed = True
            session.skip(name, f"the part broke: {type(error).__name__}: {error}"[:500], broke=True)
            traceback.print_exc()
        print(f"{name:12s} {time.monotonic() - begun:6.1f} s", flush=True)
        if failed and name == "correctness":
            break
    skipped = sum("skipped" in row for row in session.rows)
    print(
        f"{len(session.rows)} rows, {skipped} of them skipped, {time.monotonic() - start:.0f} s: {options.out}"
    )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
