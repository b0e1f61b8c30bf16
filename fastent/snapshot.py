"""What modules keep beside their parameters: a snapshot of it, put back to the very objects.

Attributes, buffers, the containers among them at any depth, the tensors in those, and the states of generators. The
walk costs about 1 us for each attribute that may hold something, and 0.1 us for any other.
"""

from __future__ import annotations

import functools
import operator
import random
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# Bytes from which a tensor's storage is copied when it is first written to: a copy below costs as little.
LARGE = 1 << 16

FIELDS = frozenset(nn.Module().__dict__)
"""Attributes of every module: its hooks, parameters, submodules and such."""

Container = dict[Any, Any] | list[Any] | set[Any] | deque[Any]

# These very types: a subclass may refuse what putting back does, or do more.
_DICTS = (dict, OrderedDict, defaultdict, Counter)
_CONTAINERS = (*_DICTS, list, set, deque)
_PLAIN, _CONTAINER, _TUPLE, _TENSOR, _GENERATOR, _GRAPH = range(6)
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
        self._kinds: dict[type, int] = {}
        self._empty: list[Container] = []
        self._filled: list[tuple[Container, Any]] = []
        self._tensors: list[tuple[Any, Any, Any]] = []  # container, key or index, value
        self._put_back_states: list[Callable[[], object]] = []
        self._copies = _Copies()
        self._graphs = False
        self._seen: set[int] = set()
        self._buffers = {id(module._buffers) for module in modules}
        self._todo: list[Container] = [module.__dict__ for module in modules]
        self._seen.update(map(id, self._todo))
        while self._todo:
            self._visit(self._todo.pop())

    def put_copies(self) -> None:
        """Let the pass work on copies of the tensors.

        The originals come back untouched: even their version counters, so that a backward pass which is under way
        still runs, and even where the pass resizes or replaces them. Where a module keeps a CUDA graph, attributes
        that are no buffers stay: the graph reads and writes them by their addresses, and a copy would show neither.
        """
        for container, key, value in self._tensors:
            if not self._graphs or id(container) in self._buffers:
                container[key] = self._copies.of(value)

    def put_back(self) -> None:
        """Make everything what it was; written to only where it differs."""
        for container in self._empty:
            if container:
                container.clear()
        for live, old in self._filled:
            if isinstance(live, dict):
                _put_back_dict(live, old, self._skipped.get(id(live), _NONE))
            elif isinstance(live, set):
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

    def _visit(self, container: Container) -> None:
        if isinstance(container, set):  # what it holds is hashable: no container, and compared by ==
            self._filled.append((container, set(container)))
            return
        names = self._skipped.get(id(container), _NONE)
        if isinstance(container, dict):
            old: Any = dict(container)
            items: Iterable[tuple[Any, Any]] = old.items()
        else:
            old = list(container)
            items = enumerate(old)
        self._filled.append((container, old))
        kinds = self._kinds
        for key, value in items:
            kind = kinds.get(type(value))
            if kind is None:
                kind = self._kinds[type(value)] = _kind(type(value))
            if kind == _PLAIN or key in names:
                continue
            if kind == _CONTAINER and not value:  # most of them: a module's hooks
                self._empty.append(value)
            elif self._take(kind, value):
                self._tensors.append((container, key, value))

    def _take(self, kind: int, value: Any) -> bool:
        """Note what `value` is or holds; whether that is a tensor to copy."""
        if kind == _TENSOR:
            return not isinstance(value, nn.Parameter)
        if kind == _TUPLE:
            held = [
                self._take(_kind(type(item)), item) for item in value
            ]  # all of them, whatever the first says
            return any(held)
        if kind == _GRAPH:
            self._graphs = True
            return False
        if id(value) not in self._seen:
            self._seen.add(id(value))
            if kind == _CONTAINER:
                self._todo.append(value)
            elif kind == _GENERATOR:
                self._put_back_states.append(_state_of(value))
        return False


def _generators() -> tuple[type, ...]:
    # NumPy loads its own when they are first asked for; before, a module can hold none of them.
    found: tuple[type, ...] = (torch.Generator, random.Random)
    if "numpy.random" in sys.modules:
        found += (np.random.Generator, np.random.BitGenerator, np.random.RandomState)
    return found


def _kind(kind: type) -> int:
    if kind in _CONTAINERS:
        return _CONTAINER
    if kind is tuple:
        return _TUPLE
    if issubclass(kind, Tensor):
        return _TENSOR
    if issubclass(kind, _generators()) and not issubclass(kind, random.SystemRandom):  # which has no state
        return _GENERATOR
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
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._lazy: list[tuple[Tensor, torch.UntypedStorage]] = []

    def of(self, value: Any) -> Any:
        """Copy a tensor, or a tuple with those in it."""
        if type(value) is tuple:
            items = tuple(map(self.of, value))
            return value if _same(items, value) else items
        if not isinstance(value, Tensor) or isinstance(value, nn.Parameter):
            return value
        known = self._tensors.get(id(value))
        if known is None:
            known = self._tensors[id(value)] = self._copy(value)
        return known

    def drop(self) -> None:
        """Give up the copies; the originals have their memory to themselves again, where it was."""
        self._tensors = {}
        self._storages = {}
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
            with torch.no_grad():
                return value.clone()
        tensor = value.detach()
        storage = tensor.untyped_storage()
        copied = self._storages.get(storage._cdata)
        if copied is None:
            if storage.nbytes() < LARGE:
                copied = storage.clone()  # type: ignore[no-untyped-call]
            else:
                try:
                    copied = tensor._lazy_clone().untyped_storage()
                except RuntimeError:
                    return tensor.clone()
                self._lazy.append((tensor, copied))
            self._storages[storage._cdata] = copied
        copy = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return copy.set_(copied, tensor.storage_offset(), tensor.shape, tensor.stride())


def _state_of(generator: Any) -> Callable[[], object]:
    if isinstance(generator, torch.Generator):
        return functools.partial(generator.set_state, generator.get_state())
    if isinstance(generator, random.Random):
        return functools.partial(generator.setstate, generator.getstate())
    if isinstance(generator, np.random.RandomState):
        return functools.partial(generator.set_state, generator.get_state(legacy=False))
    bits = generator.bit_generator if isinstance(generator, np.random.Generator) else generator
    return functools.partial(setattr, bits, "state", bits.state)
