"""Whether the kernels are right at all: each entry of the launch table in each dtype, by the gates of `bench.gpu`.

``python -m bench.first_contact.smoke FILE [cuda|cpu]``: a line for each check, PASS or FAIL, and a row of FILE as it
comes; none stops the others. Beside the values: the same bits 100 times beside other work and from a graph; counters
that move by whole launches; and a deferred evaluation that does not wait for a busy stream. On the CPU (a rehearsal)
the smallest cases alone, interpreted.
"""

from __future__ import annotations

import functools
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

import fastent
from bench.gpu import DTYPES, GATES, LAYOUTS, Variant, activations, outside
from bench.harness import Row, write_rows
from fastent.covariance import triton_obstacle
from fastent.kernels.launch import TABLE, Entry, Output, Side, partition


def cases(table: Mapping[Side, Iterable[Entry]] = TABLE) -> Iterator[tuple[Side, int, int]]:
    """Side, n and d: each entry whole and in parts, at its largest and smallest edge, no multiple of anything."""
    for side, entries in table.items():
        smallest = 1
        for entry in entries:
            largest = entry.largest or smallest + 1000
            for m, length in ((largest, 512), (largest - 3, 41), (smallest + 36, 4099)):
                yield (side, length, m) if side == "covariance" else (side, m, length)
            smallest = largest


def variants(device: torch.device) -> Iterator[Variant]:
    """Yield what is held to a gate: the cases in every dtype, batches, every layout, and entropies."""
    evaluator = functools.partial(Variant, "ResidentCovariance")
    if device.type == "cpu":
        for dtype in DTYPES[1:3]:
            yield evaluator(140, 20, dtype)
            yield evaluator(41, 35, dtype, layout="strided")
            yield evaluator(20, 140, dtype, batch=2)
        return
    for side, n, d in cases():
        for dtype in DTYPES:
            yield evaluator(n, d, dtype, side=side)
    for side, n, d in cases({"covariance": [entry for entry in TABLE["covariance"] if entry.tile.gluon]}):
        for dtype in DTYPES:
            for layout in (name for name in LAYOUTS if name != "contiguous"):
                yield evaluator(n, d, dtype, side=side, layout=layout)
            yield Variant("WithoutGluon", n, d, dtype, side=side)
    yield evaluator(512, 128, torch.bfloat16, batch=32)
    yield evaluator(33, 300, torch.bfloat16, batch=3)
    for n, d in ((512, 128), (512, 127), (127, 512)):
        for layout in LAYOUTS:
            for dtype in DTYPES:
                yield evaluator(n, d, dtype, layout=layout)
    for provider in ("spectral_entropy", "DeferredEntropy"):
        for dtype in DTYPES:
            yield Variant(provider, 512, 128, dtype)


def right(variant: Variant, device: torch.device) -> str:
    """Hold one to its gate."""
    found = GATES[variant.provider](variant, variant.input(device))
    said = ", ".join(
        f"{name} {value if isinstance(value, bool | None) else f'{value:.2g}'}"
        for name, value in found.items()
    )
    assert not outside(found), said
    return said


def bits(out: Output) -> Tensor:
    """All results of an evaluation that have a meaning, in one piece."""
    assert out.spread is not None
    return torch.cat([out.lower.tril().flatten(), out.centre.flatten(), out.spread.flatten()])


def same_bits(side: Side, n: int, d: int, device: torch.device) -> str:
    """Repeat an evaluation beside other work on the device: the same bits, and each program counted once."""
    variant = Variant("ResidentCovariance", n, d, torch.bfloat16, batch=2, side=side)
    x, evaluator = variant.input(device), variant.evaluator(device)
    out = evaluator.output()
    evaluator(x, out)
    counters = [
        tensor for tensor in evaluator.workspace if tensor is not None and tensor.dtype == torch.int64
    ]
    want, once = bits(out), [counter.clone() for counter in counters]
    cuda = device.type == "cuda"
    noise, other = (
        torch.randn((2048 if cuda else 8,) * 2, device=device),
        torch.cuda.Stream() if cuda else None,
    )
    runs, wrong = 100 if cuda else 2, 0
    for run in range(runs):
        with torch.cuda.stream(other):
            if run % 4 == 0:
                noise @ noise
        out.block.fill_(torch.nan)
        evaluator(x, out)
        wrong += not torch.equal(bits(out), want)
    assert not wrong, f"{wrong} of {runs} runs have other bits: a race"
    for now, then in zip(counters, once, strict=True):
        assert torch.equal(now, (runs + 1) * then), "a program was not counted, or twice"
    return f"{runs} runs, {partition(side, *((d, n) if side == 'covariance' else (n, d))).parts} parts"


def graph(device: torch.device) -> str:
    """Replay a captured evaluation on other values."""
    x = activations(512, 128, torch.bfloat16, device)
    evaluator = Variant("ResidentCovariance", 512, 128, torch.bfloat16).evaluator(device)
    out, plain = evaluator.output(), evaluator.output()
    evaluator(x, out)
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured, capture_error_mode="thread_local"):
        evaluator(x, out)
    for _ in range(3):
        x.normal_()
        captured.replay()
        replayed = bits(out)
        evaluator(x, plain)
        assert torch.equal(replayed, bits(plain)), "other bits than a plain evaluation"
    return "3 replays"


def deferred(device: torch.device) -> str:
    """Make a step of a monitor while the stream is busy for 0.2 s; a wait for the device is an error."""
    x = activations(512, 128, torch.bfloat16, device)
    want = fastent.spectral_entropy(x.cpu(), backend="torch").normalized
    busy = torch.cuda.Event()
    with fastent.SpectralEntropyMonitor() as monitor:
        monitor.observe(0, x, layer="a")
        monitor.flush()
        torch.cuda._sleep(1)  # its module is loaded now
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            torch.cuda._sleep(400_000_000)
            busy.record()
            begun = time.perf_counter()
            monitor.observe(1, x, layer="a")
            took = time.perf_counter() - begun
            assert not busy.query(), "the call waited for the device"
        finally:
            torch.cuda.set_sync_debug_mode("default")
        (record,) = monitor.flush()
    assert abs(record.normalized - want) <= 1e-12, f"{record.normalized} instead of {want}"
    return f"came back after {took * 1e6:.0f} us"


def kernels_can_run(device: torch.device) -> str:
    """Nothing keeps the library from its kernels on this device."""
    obstacle = triton_obstacle(device)
    assert obstacle is None, obstacle
    return torch.cuda.get_device_name(device)


def checks(device: torch.device) -> Iterator[tuple[str, Callable[[], str]]]:
    """All checks by name, in their order."""
    cuda = device.type == "cuda"
    if cuda:
        yield "the kernels can run", functools.partial(kernels_can_run, device)
    for variant in variants(device):
        name = " ".join(str(value).removeprefix("torch.") for value in variant if value is not None)
        yield name, functools.partial(right, variant, device)
    for side, n, d in cases() if cuda else (("covariance", 140, 20), ("gram", 20, 41)):
        yield f"same bits, {side} {n} x {d}", functools.partial(same_bits, side, n, d, device)
    if cuda:
        yield "graph", functools.partial(graph, device)
        yield "deferred on a busy stream", functools.partial(deferred, device)


def main(argv: list[str] | None = None) -> int:
    """Make all checks; the number that failed."""
    file, *rest = sys.argv[1:] if argv is None else argv
    device = torch.device(rest[0] if rest else "cuda", 0 if rest != ["cpu"] else None)
    rows: list[Row] = []
    start = time.monotonic()
    for name, check in checks(device):
        begun = time.monotonic()
        try:
            passed, said = True, check()
        except Exception as error:  # a check that cannot run has failed, and the others go on
            passed, said = False, f"{type(error).__name__}: {error}"[:300]
            traceback.print_exc()
        rows.append(
            {"check": name, "passed": passed, "said": said, "seconds": round(time.monotonic() - begun, 2)}
        )
        print("PASS" if passed else "FAIL", name, said, f"{rows[-1]['seconds']} s", flush=True)
        write_rows(Path(file), rows)
    failed = [row["check"] for row in rows if not row["passed"]]
    print(
        f"{len(rows) - len(failed)} of {len(rows)} checks passed in {time.monotonic() - start:.0f} s",
        *failed,
        sep="\nFAIL ",
    )
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
