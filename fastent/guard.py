"""A forward pass that leaves no trace in training.

Inside `undisturbed` a model evaluates: no dropout, no gradients, nothing compiled. Afterwards, and after an
exception too, all that a training step could notice is as before, bit for bit: of each submodule its mode, its
buffers, its attributes, the lists, dicts, sets and deques in them with the tensors and generators that they
hold, and the cache of its parametrisations; and the global random states of torch (CPU and CUDA), NumPy and
Python. Tensors are copied where the pass writes to them and nowhere else, small ones always. Modules that a list or
an attribute hides from ``modules()`` are put back too; their mode stays what it is, as with ``model.eval()``.
Gradients and parameters are not touched, but for the weights of embeddings with ``max_norm``, which are put back; a
parameter that the model's own forward pass writes to is warned of.

Not covered, since nobody can list it: objects of other kinds that an attribute holds (their own attributes, iterators;
subclasses of list, dict and such), a module's ``__slots__``, what a forward pass changes outside the model (closures,
globals, class attributes; NumPy arrays), the buffers of TorchScript modules. An attribute with more than 10,000
entries (1,000 tensors), counted over all that is in it, is taken for data: what the pass adds at the end of its list
or dict is taken off, changes within stay. Hooks that the user registered fire: those of weight normalisation or
sharding must, and no hook says which kind it is. Of a model sharded by FSDP the hooks, submodules and parameters that
a pass adds stay. A buffer of 64 KiB or more must not grow in place (`resize_`) in the pass: torch fails then.

Threads. Passes through one model, or a part of it, wait for each other. Two switches hold for the whole process
while a pass runs: compiled code runs eagerly and nn.TransformerEncoder's inference kernels are off, in other
threads too. While another thread lives, the pass draws torch's random numbers from generators of its own, and what
such a thread draws meanwhile is kept, unless it falls into an operation of the model that takes no generator;
Python's and NumPy's global generators cannot be told apart by thread and are then left where they are. Training the
very model in another thread meanwhile is not covered.

Ctrl-C during a pass is raised when the pass is over and all is put back (`fastent.interrupts`).
"""

from __future__ import annotations

import functools
import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from fastent.interrupts import Interrupts, interrupts_held
from fastent.snapshot import FIELDS, Snapshot
from fastent.user_warning import warn_user
from fastent.worker import THREAD_NAME

P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[Interrupts]:
    """Evaluate `model` inside; leave it, and every global state that training reads, as they were.

    Parameters
    ----------
    model : nn.Module
        The plain module, not its compiled or DDP wrapper.

    Yields
    ------
    Interrupts
        Its `second_at_once` is for the time in which the model runs.
    """
    modules = list(model.modules())
    for module in fsdp1_modules(modules):  # parents first; what a first forward pass sets up is to stay
        from torch.distributed.fsdp import _runtime_utils

        _runtime_utils._lazy_init(module, module)
        handle: Any = module._handle
        if handle is not None and handle._skipped_use_sharded_views:
            raise RuntimeError(
                "FSDP1 with SHARD_GRAD_OP and use_orig_params=True is between a forward pass and its backward, where "
                "another pass would change the gradients: call step after backward(), or shard by FSDP2 "
                "(torch.distributed.fsdp.fully_shard)"
            )
    with ExitStack() as stack:
        interrupts = stack.enter_context(interrupts_held())
        stack.enter_context(_alone(modules))
        stack.enter_context(_counted())
        if "torch._dynamo" in sys.modules:  # else nothing can be compiled, and the import takes a second
            stack.enter_context(_EAGER)
        # Resharded first: what is put back are attributes of the sharded model.
        for guard in (_attributes, _eval_mode, _parametrisations, _resharded):
            stack.enter_context(guard(modules))
        stack.enter_context(_random_states(interrupts))
        stack.enter_context(_SLOW_ATTENTION)
        stack.enter_context(_no_cached_casts())
        # Not inference_mode: a tensor that the model keeps for later must be one that training can use.
        stack.enter_context(torch.no_grad())
        yield interrupts


def apart(function: Callable[P, R], interrupts: Interrupts) -> Callable[P, R]:
    """Let `function` run in the middle of a pass as it would outside: no dispatch mode sees its operations.

    A few of torch's operations take another way, with other roundings, under a mode.
    """

    @functools.wraps(function)
    def alone(*args: P.args, **kwargs: P.kwargs) -> R:
        with interrupts.all_held(), _disable_current_modes():
            return function(*args, **kwargs)

    return alone


class _Passes(threading.local):
    depth = 0


_passes = _Passes()


@contextmanager
def _counted() -> Iterator[None]:
    _passes.depth += 1
    try:
        yield
    finally:
        _passes.depth -= 1


def in_a_pass() -> bool:
    """Whether the calling thread runs a model undisturbed, so that what hooks see is no training."""
    return _passes.depth > 0


_owners: dict[int, int] = {}  # from a module's id to the thread whose pass runs it
_owners_changed = threading.Condition()


@contextmanager
def _alone(modules: list[nn.Module]) -> Iterator[None]:
    """Wait until no other thread's pass runs one of `modules`: it would see this one's copies and hooks."""
    me = threading.get_ident()
    ids = {id(module) for module in modules}
    with _owners_changed:
        _owners_changed.wait_for(lambda: all(_owners.get(key, me) == me for key in ids))
        ids -= _owners.keys()  # those of a pass around this one stay its own
        _owners.update(dict.fromkeys(ids, me))
    try:
        yield
    finally:
        with _owners_changed:
            for key in ids:
                del _owners[key]
            _owners_changed.notify_all()


class _Switch:
    """A setting of the whole process: the first pass throws it, the last one puts it back."""

    def __init__(self, throw: Callable[[], Callable[[], object]]) -> None:
        self._throw = throw
        self._lock = threading.Lock()
        self._users = 0
        self._put_back: Callable[[], object] = dict

    def __enter__(self) -> None:
        with self._lock:
            if not self._users:
                self._put_back = self._throw()
            self._users += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                self._put_back()


def _force_eager() -> Callable[[], object]:
    stance = torch.compiler.set_stance("force_eager")
    return functools.partial(stance.__exit__, None, None, None)


def _disable_fast_attention() -> Callable[[], object]:
    # nn.TransformerEncoder's inference kernels call no submodule and turn padded batches into nested tensors.
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    return functools.partial(torch.backends.mha.set_fastpath_enabled, fast)


_EAGER = _Switch(_force_eager)
_SLOW_ATTENTION = _Switch(_disable_fast_attention)


@contextmanager
def _eval_mode(modules: list[nn.Module]) -> Iterator[None]:
    # The flags, not model.eval(): an override of train() may do more, such as merging adapters into weights.
    training = [module for module in modules if module.training]
    try:
        for module in training:
            _set_mode(module, False)
        yield
    finally:
        for module in training:
            _set_mode(module, True)


def _set_mode(module: nn.Module, mode: bool) -> None:
    fields = module.__dict__
    # Past nn.Module.__setattr__, which looks for parameters, buffers and modules of that name: 1 us each.
    if "training" in fields and type(module).__setattr__ is nn.Module.__setattr__:
        fields["training"] = mode
    else:
        module.training = mode


@contextmanager
def _attributes(modules: list[nn.Module]) -> Iterator[None]:
    """Put back what modules keep; the pass works on copies of their tensors."""
    snapshot = Snapshot(modules, _not_put_back(modules))
    try:
        snapshot.put_copies()
        yield
    finally:
        snapshot.put_back()
        written = snapshot.written
    if written:
        warn_user(
            f"the model's forward pass writes to parameters in eval mode ({', '.join(written[:5])}), and a probe does "
            "so too: keep in buffers what a forward pass writes to, they are put back",
            UserWarning,
        )


def _not_put_back(modules: list[nn.Module]) -> dict[int, frozenset[str]]:
    """Names that stay as the pass leaves them, by the id of a module's ``__dict__``.

    FSDP changes its modules' own fields in the first pass, for good. FSDP1 keeps its state in attributes too, and
    sets parameters as plain tensors.
    """
    first = fsdp1_modules(modules)
    if not (first or fsdp_modules(modules)):
        return {}
    fields = FIELDS - {"_buffers"}
    wrappers = {id(module) for module in first}
    return {
        id(module.__dict__): frozenset(module.__dict__)
        if id(module) in wrappers
        else fields.union(
            name for name, value in module.__dict__.items() if first and isinstance(value, Tensor)
        )
        for module in modules
    }


@contextmanager
def _parametrisations(modules: list[nn.Module]) -> Iterator[None]:
    """Neither read nor fill what `torch.nn.utils.parametrize.cached` keeps of these modules' weights.

    In the pass they are made without gradients and in eval mode, and training could not use them.
    """
    ids = {id(module) for module in modules}

    def take_out() -> dict[tuple[int, str], Tensor | None]:
        keys = [key for key in list(parametrize._cache) if key[0] in ids]
        return {key: parametrize._cache.pop(key) for key in keys}

    kept: dict[tuple[int, str], Tensor | None] = {}
    try:
        kept = take_out()
        yield
    finally:
        take_out()
        parametrize._cache.update(kept)


@contextmanager
def _resharded(modules: list[nn.Module]) -> Iterator[None]:
    """Shard FSDP parameters again: after a pass without a backward the root's stay gathered and go stale.

    Between a forward pass and its backward FSDP1 keeps some gathered itself: those stay.
    """
    first = fsdp1_modules(modules)
    whole = {id(module) for module in first if _is_gathered(module)}
    try:
        yield
    finally:
        for module in fsdp_modules(modules):
            module.reshard()  # type: ignore[operator]
        for module in first:
            if id(module) not in whole and _is_gathered(module):
                from torch.distributed.fsdp import _runtime_utils

                _runtime_utils._reshard(module, module._handle, free_unsharded_flat_param=True)


def _is_gathered(module: nn.Module) -> bool:
    handle: Any = module._handle
    return handle is not None and handle.uses_sharded_strategy and not handle.needs_unshard()


def fsdp_modules(modules: list[nn.Module]) -> list[nn.Module]:
    """Those of `modules` that FSDP2 (`torch.distributed.fsdp.fully_shard`) shards."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # not imported: nothing is sharded
    return [] if fsdp is None else [module for module in modules if isinstance(module, fsdp.FSDPModule)]


def fsdp1_modules(modules: list[nn.Module]) -> list[nn.Module]:
    """Those of `modules` that FSDP1 (`torch.distributed.fsdp.FullyShardedDataParallel`) wraps."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [] if fsdp is None else [m for m in modules if isinstance(m, fsdp.FullyShardedDataParallel)]


@contextmanager
def _random_states(interrupts: Interrupts) -> Iterator[None]:
    """Leave the global generators of torch, NumPy and Python as a run without the pass would find them."""
    torch_states = _TorchStates.now()
    python, legacy = random.getstate(), np.random.get_state(legacy=False)  # noqa: NPY002  the old global state is meant
    alone = not _other_threads()
    try:
        if alone:
            yield
        else:
            with _OwnDraws(torch_states, interrupts):
                yield
    finally:
        if alone:
            torch_states.put_back()
            random.setstate(python)
            np.random.set_state(legacy)  # noqa: NPY002


def _other_threads() -> bool:
    """Whether another thread might draw: any that runs Python, but for the one that takes eigenvalues."""
    harmless = {thread.ident for thread in threading.enumerate() if thread.name == THREAD_NAME}
    return bool(sys._current_frames().keys() - harmless - {threading.get_ident()})


class _TorchStates:
    """States of torch's global generators by device: the CPU and CUDA devices in use."""

    def __init__(self, states: dict[torch.device, Tensor]) -> None:
        self._states = states

    @classmethod
    def now(cls) -> _TorchStates:
        """Take them as they are."""
        on_cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        cuda = torch.cuda.get_rng_state_all() if on_cuda else []
        states = {torch.device("cuda", i): state for i, state in enumerate(cuda)}
        return cls({torch.device("cpu"): torch.get_rng_state(), **states})

    def put_back(self) -> None:
        """Make the generators' states these."""
        for device, state in self._states.items():
            if device.type == "cpu":
                torch.set_rng_state(state)
            else:
                torch.cuda.set_rng_state(state, device)

    def generators(self) -> dict[torch.device, torch.Generator]:
        """Make new ones in these states."""
        return {device: torch.Generator(device).set_state(state) for device, state in self._states.items()}


class _OwnDraws(TorchDispatchMode):
    """Random operations of this thread draw from generators of their own.

    Where an operation takes no generator, the global ones lend it their place for that long: another thread's draw
    in that time is from ours.
    """

    supports_higher_order_operators = True

    def __init__(self, states: _TorchStates, interrupts: Interrupts) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._generators, self._interrupts = states.generators(), interrupts
        self._random: dict[Any, tuple[bool, Any]] = {}  # asked for once for each operation: tags are slow

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = self._random.get(func)
        if known is None:
            draws = torch.Tag.nondeterministic_seeded in getattr(func, "tags", ())
            known = self._random[func] = draws, _with_generator(func) if draws else None
        draws, takes_one = known
        if not draws or kwargs.get("generator") is not None:
            return func(*args, **kwargs)
        if takes_one is not None and not types:
            device = _device_of(args, kwargs)
            if device in self._generators:
                return takes_one(*args, **kwargs, generator=self._generators[device])
        return self._swapped(func, args, kwargs)

    def _swapped(self, func: Any, args: Any, kwargs: Any) -> Any:
        with self._interrupts.all_held():
            theirs = _TorchStates.now()
            _TorchStates({device: own.get_state() for device, own in self._generators.items()}).put_back()
            try:
                return func(*args, **kwargs)
            finally:
                self._generators = _TorchStates.now().generators()
                theirs.put_back()


def _with_generator(func: Any) -> Any:
    """Find the overload of an operation that takes a generator beside the same arguments."""

    def arguments(overload: Any) -> list[tuple[str, str]]:
        return [(a.name, str(a.type)) for a in overload._schema.arguments if a.name != "generator"]

    for name in func.overloadpacket.overloads():
        overload = getattr(func.overloadpacket, name)
        named = any(a.name == "generator" and a.kwarg_only for a in overload._schema.arguments)
        if named and arguments(overload) == arguments(func):
            return overload
    return None


def _device_of(args: Any, kwargs: Any) -> Any:
    """Device on which an operation runs; None if its arguments do not tell."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    device = tensors[0].device if tensors else kwargs.get("device")
    if device is None or device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device())


@contextmanager
def _no_cached_casts() -> Iterator[None]:
    # The caller's autocast stays on, but its cache of cast weights is neither read (a weight may have been
    # updated since) nor filled (training would find casts made without gradients). The switch is the thread's own.
    cached = torch.is_autocast_cache_enabled()
    try:
        torch.set_autocast_cache_enabled(False)
        yield
    finally:
        torch.set_autocast_cache_enabled(cached)
