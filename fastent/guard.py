"""A forward pass that leaves no trace in training.

Inside `undisturbed` a model evaluates: no dropout, no gradients, nothing compiled. Afterwards, and after an
exception too, all that a training step could notice is as before, bit for bit: the mode of each submodule,
its buffers, and the random states of torch (CPU and CUDA), NumPy and Python. Parameters and gradients are not
touched.

Not covered, since nobody can list it: plain attributes that a forward pass sets, generators that a module
keeps to itself, the buffers of TorchScript modules.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluate `model` inside; leave it, and every global state that training reads, as they were.

    Parameters
    ----------
    model : nn.Module
        The plain module, not its compiled or DDP wrapper.
    """
    modules = list(model.modules())
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # else nothing can be compiled, and the import takes a second
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for guard in (_eval_mode, _scratch_buffers, _resharded):
            stack.enter_context(guard(modules))
        stack.enter_context(_random_states())
        stack.enter_context(_plain_layers())
        # Not inference_mode: a tensor that the model keeps for later must be one that training can use.
        stack.enter_context(torch.no_grad())
        yield


@contextmanager
def _eval_mode(modules: list[nn.Module]) -> Iterator[None]:
    # The flags, not model.eval(): an override of train() may do more, such as merging adapters into weights.
    training = [module for module in modules if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _scratch_buffers(modules: list[nn.Module]) -> Iterator[None]:
    # The pass works on copies and the originals come back untouched: even their version counters, so that a
    # backward pass which is under way still runs, and even where the pass resizes, replaces or adds a buffer.
    originals = [
        (module._buffers, dict(module._buffers)) for module in modules if isinstance(module._buffers, dict)
    ]
    copies: dict[int, torch.Tensor] = {}  # a buffer shared by two modules stays shared
    try:
        with torch.no_grad():
            for live, saved in originals:
                for name, buffer in saved.items():
                    if buffer is not None:
                        live[name] = copies.setdefault(id(buffer), buffer.clone())
        yield
    finally:
        for live, saved in originals:
            if live or saved:
                live.clear()
                live.update(saved)


@contextmanager
def _resharded(modules: list[nn.Module]) -> Iterator[None]:
    """Shard FSDP2 parameters again: after a pass without a backward the root's stay gathered and go stale."""
    try:
        yield
    finally:
        for module in fsdp_modules(modules):
            module.reshard()  # type: ignore[operator]


def fsdp_modules(modules: list[nn.Module]) -> list[nn.Module]:
    """Those of `modules` that FSDP2 (`torch.distributed.fsdp.fully_shard`) shards."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # not imported: nothing is sharded
    return [] if fsdp is None else [module for module in modules if isinstance(module, fsdp.FSDPModule)]


@contextmanager
def _random_states() -> Iterator[None]:
    on_cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = range(torch.cuda.device_count()) if on_cuda else ()
    python, legacy = random.getstate(), np.random.get_state(legacy=False)  # noqa: NPY002  the old global state is meant
    with torch.random.fork_rng(devices, device_type="cuda"):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)  # noqa: NPY002


@contextmanager
def _plain_layers() -> Iterator[None]:
    # The caller's autocast stays on, but its cache of cast weights is neither read (a weight may have been
    # updated since) nor filled (training would find casts made without gradients).
    cached = torch.is_autocast_cache_enabled()
    # nn.TransformerEncoder's inference kernels call no submodule and turn padded batches into nested tensors.
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.set_autocast_cache_enabled(False)
        torch.backends.mha.set_fastpath_enabled(False)
        yield
    finally:
        torch.set_autocast_cache_enabled(cached)
        torch.backends.mha.set_fastpath_enabled(fast)
