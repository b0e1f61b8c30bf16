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

Ctrl-C during a pass is raised when the pass is over and all is put back (`fastent.process`).

What modules keep is put back by a `Snapshot`, to the very objects. The walk costs about 4 us for each module, and as
much for each tensor.
"""

from __future__ import annotations

import functools
import itertools
import operator
import random
import sys
import threading
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from fastent.monitor.deferred import THREAD_NAME
from fastent.process import Interrupts, interrupts_held, warn_user

# Bytes from which a tensor's storage is copied when it is first written to: a copy below costs as little.
LARGE = 1 << 16

MOST = 10_000
"""Entries, over all the containers in it, that an attribute may have to be put back; a tensor counts `TENSOR`."""
TENSOR = 10

FIELDS = frozenset(nn.Module().__dict__)
"""Attributes of every module: its hooks, parameters, submodules and such."""

Container = dict[Any, Any] | list[Any] | set[Any] | deque[Any]

# These very types: a subclass may refuse what putting back does, or do more.
_DICTS = (dict, OrderedDict, defaultdict, Counter)
_CONTAINERS = (*_DICTS, list, set, deque)
_PLAIN, _CONTAINER, _TUPLE, _TENSOR, _GENERATOR, _GRAPH, _MODULE = range(7)
_NONE: frozenset[str] = frozenset()
_MISSING = object()


class Snapshot:
    """What `modules` keep, to be put back after a pass.

    Parameters
    ----------
    modules : list of nn.Module
        All modules of a model.
    skipped : dict
        By the id of a module's ``__dict__``, names that stay as the pass leaves them.
    """

    def __init__(self, modules: list[nn.Module], skipped: dict[int, frozenset[str]]) -> None:
        self._skipped = skipped
        self._kinds = _Kinds()
        self._empty: list[Container] = []
        self._dicts: list[tuple[dict[Any, Any], dict[Any, Any]]] = []  # live and old
        self._others: list[tuple[Any, Any]] = []
        self._long: list[tuple[Container, int]] = []  # and how long they were
        self._tensors: list[tuple[Any, Any, Any]] = []  # container, key or index, value
        self._put_back_states: list[Callable[[], object]] = []
        self._copies = _Copies()
        self._graphs = False
        self._versions: list[tuple[nn.Module, list[tuple[str, nn.Parameter, int]]]] = []
        self._buffers: set[int] = set()
        self._seen: set[int] = set()
        self._todo: list[Container] = []
        self._entries = 0
        self._take_modules(modules)

    @property
    def written(self) -> list[str]:
        """Parameters that are written to since the snapshot: these are not put back."""
        return [
            f"{type(module).__name__}.{name}"
            for module, parameters in self._versions
            for name, parameter, version in parameters
            if parameter._version != version
        ]

    def _take_modules(self, modules: list[nn.Module]) -> None:
        self._buffers.update([id(module._buffers) for module in modules])
        self._seen.update([id(module.__dict__) for module in modules])
        kinds, empty, dicts = self._kinds, self._empty, self._dicts
        for module in modules:
            fields = module.__dict__
            old = fields.copy()
            dicts.append((fields, old))
            names = self._skipped.get(id(fields), _NONE)
            for key, value in self._held(old.items(), old.values()):
                kind = kinds[type(value)]
                if kind == _CONTAINER and not value:  # most of them: hooks
                    empty.append(value)
                elif key in names:
                    continue
                elif key == "_modules" or key == "_parameters":
                    dicts.append((value, dict(value)))
                elif key in FIELDS and kind == _CONTAINER:  # however many buffers there are
                    if id(value) not in self._seen:
                        self._seen.add(id(value))
                        self._visit(value)
                elif kind == _CONTAINER or (kind == _TUPLE and self._holds_something(value)):
                    self._attribute(fields, key, kind, value)
                elif self._take(kind, value):
                    self._tensors.append((fields, key, value))
        if not self._skipped:
            self._take_parameters(modules)

    def _take_parameters(self, modules: list[nn.Module]) -> None:
        # Embeddings with max_norm scale their weight down in every forward pass; it may be tied to another layer.
        renormed = {
            id(module._parameters.get("weight"))
            for module in modules
            if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None
        }
        for module in modules:
            if not module._parameters:
                continue
            own = []
            for name, parameter in module._parameters.items():
                if type(parameter) is nn.Parameter:
                    if id(parameter) in renormed:
                        self._tensors.append((module._parameters, name, parameter))
                    elif not parameter.is_inference():
                        own.append((name, parameter, parameter._version))
            if own:
                self._versions.append((module, own))

    def put_copies(self) -> None:
        """Let the pass work on copies of the tensors.

        The originals come back untouched: even their version counters, so that a backward pass which is under way
        still runs, and even where the pass resizes or replaces them. Where a module keeps a CUDA graph, attributes
        that are no buffers stay: the graph reads and writes them by their addresses, and a copy would show neither.
        """
        copy = self._copies.of
        with torch.no_grad():
            for container, key, value in self._tensors:
                if type(value) is nn.Parameter:
                    container[key] = self._copies.of_parameter(value)
                elif not self._graphs or id(container) in self._buffers:
                    container[key] = copy(value)

    def put_back(self) -> None:
        """Make everything what it was; written to only where it differs."""
        filled: Iterable[Container] = filter(None, self._empty)
        for container in filled:
            container.clear()
        for container, length in self._long:
            _cut(container, length)
        for container, key, value in self._tensors:
            if key in container if isinstance(container, dict) else key < len(container):
                container[key] = value
        if self._skipped or not _all_same(self._dicts):
            for live, old in self._dicts:
                _put_back_dict(live, old, self._skipped.get(id(live), _NONE))
        for live, old in self._others:
            if isinstance(live, set):
                if live != old:
                    live.clear()
                    live.update(old)
            elif not _same(live, old):
                live.clear()
                live.extend(old)
        for put_back in self._put_back_states:
            put_back()
        self._tensors = []
        self._copies.drop()

    def _held(self, items: Iterable[Any], values: Iterable[Any]) -> Iterable[Any]:
        """Leave out what holds nothing, without a step of Python for each."""
        return itertools.compress(items, map(self._kinds.__getitem__, map(type, values)))

    def _holds_something(self, value: tuple[Any, ...]) -> bool:
        return len(value) <= MOST and any(map(self._kinds.__getitem__, map(type, value)))

    def _attribute(self, fields: dict[str, Any], key: str, kind: int, value: Any) -> None:
        """Take an attribute with all that is in it, or nothing of it."""
        lists: tuple[list[Any], ...] = (
            self._empty,
            self._dicts,
            self._others,
            self._tensors,
            self._put_back_states,
        )
        lengths = list(map(len, lists))
        self._entries = 0
        if self._take(kind, value):
            self._tensors.append((fields, key, value))
        self._walk()
        if self._entries > MOST:
            for taken, length in zip(lists, lengths, strict=True):
                del taken[length:]
            if kind == _CONTAINER:
                self._long.append((value, len(value)))

    def _walk(self) -> None:
        while self._todo:
            container = self._todo.pop()
            self._entries += len(container)
            if self._entries > MOST:
                self._todo.clear()
            else:
                self._visit(container)

    def _visit(self, container: Container) -> None:
        if isinstance(container, set):  # what it holds is hashable: no container, and compared by ==
            self._others.append((container, set(container)))
            return
        if isinstance(container, dict):
            old: Any = dict(container)
            self._dicts.append((container, old))
            items: Iterable[tuple[Any, Any]] = self._held(old.items(), old.values())
        else:
            old = list(container)
            self._others.append((container, old))
            items = self._held(enumerate(old), old)
        for key, value in items:
            kind = self._kinds[type(value)]
            if kind == _CONTAINER and not value:
                self._empty.append(value)
            elif self._take(kind, value):
                self._tensors.append((container, key, value))

    def _take(self, kind: int, value: Any) -> bool:
        """Note what `value` is or holds; whether that is a tensor to copy."""
        if kind == _TENSOR:
            self._entries += TENSOR
            return not isinstance(value, nn.Parameter)
        if kind == _TUPLE:
            self._entries += len(value)
            if self._entries > MOST:
                return False
            held = [
                self._take(self._kinds[type(item)], item) for item in self._held(value, value)
            ]  # all of them, whatever the first says
            return any(held)
        if kind == _GRAPH:
            self._graphs = True
            return False
        if kind == _MODULE:  # in a list, or past nn.Module.__setattr__, and so none of the model's
            if id(value.__dict__) not in self._seen and not self._skipped:
                entries, todo = self._entries, self._todo
                self._todo = []
                self._take_modules([m for m in value.modules() if id(m.__dict__) not in self._seen])
                self._entries, self._todo = entries, todo
            return False
        if id(value) not in self._seen:
            self._seen.add(id(value))
            if kind == _CONTAINER:
                self._todo.append(value)
            elif kind == _GENERATOR:
                self._put_back_states.append(_state_of(value))
        return False


class _Kinds(dict[type, int]):
    """What each type is, found when it is first asked for."""

    def __missing__(self, kind: type) -> int:
        self[kind] = found = _kind(kind)
        return found


def _generators() -> tuple[type, ...]:
    # NumPy loads its own when they are first asked for; before, a module can hold none of them.
    found: tuple[type, ...] = (torch.Generator, random.Random)
    if "numpy.random" in sys.modules:
        found += (np.random.Generator, np.random.BitGenerator, np.random.RandomState)
    return found


def _kind(kind: type) -> int:
    if kind in _CONTAINERS:
        return _CONTAINER
    if kind is tuple or (issubclass(kind, tuple) and hasattr(kind, "_make")):  # named
        return _TUPLE
    if kind is nn.Parameter:
        return _PLAIN
    if issubclass(kind, Tensor):
        return _TENSOR
    if issubclass(kind, _generators()) and not issubclass(kind, random.SystemRandom):  # which has no state
        return _GENERATOR
    if issubclass(kind, nn.Module):
        return _MODULE
    return _GRAPH if issubclass(kind, torch.cuda.CUDAGraph) else _PLAIN


def _put_back_dict(live: dict[Any, Any], old: dict[Any, Any], skipped: frozenset[str]) -> None:
    if _same(live, old) and _same(live.values(), old.values()):
        return
    for key in live.keys() - old.keys() - skipped:
        del live[key]
    for key, value in old.items():
        if key not in skipped and live.get(key, _MISSING) is not value:
            live[key] = value
    if not skipped and not _same(live, old):  # another order
        live.clear()
        live.update(old)


def _all_same(dicts: list[tuple[dict[Any, Any], dict[Any, Any]]]) -> bool:
    """Whether all live ones are as they were, in one sweep: as a rule they are."""
    live, old = [pair[0] for pair in dicts], [pair[1] for pair in dicts]
    chain, values = itertools.chain.from_iterable, operator.methodcaller("values")
    return (
        list(map(len, live)) == list(map(len, old))
        and all(map(operator.is_, chain(live), chain(old)))
        and all(map(operator.is_, chain(map(values, live)), chain(map(values, old))))
    )


def _cut(container: Container, length: int) -> None:
    if isinstance(container, set):
        return
    while len(container) > length:
        if isinstance(container, dict):
            container.popitem()
        else:
            container.pop()


def _same(a: Any, b: Any) -> bool:
    """Whether two collections hold the same objects in the same order."""
    return len(a) == len(b) and all(map(operator.is_, a, b))


def _is_lazy(tensor: Tensor) -> bool:
    return bool(torch._C._is_cow_tensor(tensor))  # type: ignore[attr-defined]


class _Copies:
    """Copies of tensors for the pass to work on; those that share memory go on sharing it.

    From `LARGE` on a copy takes memory when it, or the original, is first written to (torch calls that a lazy
    clone). Where torch cannot do that, such as memory that NumPy made or that is mapped from a file, it is a copy.
    """

    def __init__(self) -> None:
        self._tensors: dict[int, Tensor] = {}
        self._whole: dict[int, Tensor] = {}  # by storage, copies that are all of it
        self._lazy: list[tuple[Tensor, torch.UntypedStorage]] = []

    def of(self, value: Any) -> Any:
        """Copy a tensor, or a tuple with those in it."""
        if isinstance(value, tuple):
            items = tuple(map(self.of, value))
            if _same(items, value):
                return value
            return items if type(value) is tuple else type(value)._make(items)  # type: ignore[attr-defined]
        if not isinstance(value, Tensor) or isinstance(value, nn.Parameter):
            return value
        known = self._tensors.get(id(value))
        if known is None:
            known = self._tensors[id(value)] = self._copy(value)
        return known

    def of_parameter(self, value: nn.Parameter) -> nn.Parameter:
        """Copy a parameter."""
        return nn.Parameter(self._copy(value.detach()), value.requires_grad)

    def drop(self) -> None:
        """Give up the copies; the originals have their memory to themselves again, where it was."""
        self._tensors = {}
        self._whole = {}
        while self._lazy:
            original, storage = self._lazy.pop()
            kept = torch._C._storage_Use_Count(storage._cdata) > 1
            if kept and _is_lazy(torch.empty(0, dtype=torch.uint8, device=original.device).set_(storage)):
                storage.data_ptr()  # asked for by a writer: it is the copy that moves
            del storage
            original.data_ptr()

    def _copy(self, value: Tensor) -> Tensor:
        plain = type(value) is Tensor and value.layout == torch.strided and value.device.type != "meta"
        if not plain or value.is_nested or value.is_quantized or value.is_conj() or value.is_neg():
            return value.clone()
        storage = value.untyped_storage()
        whole = self._whole.get(storage._cdata)
        if whole is None:
            size = storage.nbytes()
            if size < LARGE and value.nbytes == size and value.is_contiguous():
                whole = self._whole[storage._cdata] = value.clone()
                return whole
            if size < LARGE:
                copied = storage.clone()  # type: ignore[no-untyped-call]
                whole = torch.empty(0, dtype=torch.uint8, device=value.device).set_(copied)
            else:
                tensor = value.detach()
                try:
                    whole = tensor._lazy_clone()
                except RuntimeError:
                    return tensor.clone()
                self._lazy.append((tensor, whole.untyped_storage()))
            self._whole[storage._cdata] = whole
        copy = torch.empty(0, dtype=value.dtype, device=value.device)
        return copy.set_(whole.untyped_storage(), value.storage_offset(), value.shape, value.stride())


def _state_of(generator: Any) -> Callable[[], object]:
    if isinstance(generator, torch.Generator):
        return functools.partial(generator.set_state, generator.get_state())
    if isinstance(generator, random.Random):
        return functools.partial(generator.setstate, generator.getstate())
    if isinstance(generator, np.random.RandomState):
        return functools.partial(generator.set_state, generator.get_state(legacy=False))
    bits = generator.bit_generator if isinstance(generator, np.random.Generator) else generator
    return functools.partial(setattr, bits, "state", bits.state)


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
    _passes.depth += 1
    try:
        yield
    finally:
        _passes.depth -= 1
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
