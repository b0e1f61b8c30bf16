"""What modules keep beside their parameters: a snapshot of it, put back to the very objects.

Attributes, buffers, the containers among them at any depth, the tensors and modules in those, and the states of
generators; of the parameters only the weights of embeddings with ``max_norm``, which a forward pass writes to. The
walk costs about 4 us for each module, and as much for each tensor. An attribute with more entries than `MOST` is data
rather than state, and is not walked: what a pass adds at the end of its list or dict is taken off again, and no more.
"""

from __future__ import annotations

import functools
import itertools
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
