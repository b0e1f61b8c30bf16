"""A monitor's probe: the fixed input, the layers, the pass that takes their activations, their axes, the evaluation.

What the pass gives, and what an `observe` hands over, is read by its axes and put into an evaluation
(`fastent.monitor.deferred`); nothing of it is kept.

A probe's content is hashed when it is taken on, and a probe that changed is an error. The pass runs the plain module
(what a compiled or DDP wrapper holds) inside `fastent.monitor.isolation.undisturbed`, with hooks that exist for its
duration only. The first pass is whole. A later one ends with the last of the watched layers, so that what is behind it
(a language model's projection onto its vocabulary) is not computed, where every watched layer has run once, in the
order of the last whole pass. It is whole where a layer is idle or the order is another, where a function gives the
activations, where ranks need each other (a sharded model, or collective calls in the whole pass), and where a hook
must be called at any end (``always_call``). What a layer would do behind that end, such as run again, is not seen.

A layer's activation is its module's output, reduced at the moment it appears: an in-place operation
later in the model cannot change it, and it is not kept. What a function returns in place of names is reduced when it
returns: whatever the model did to it until then is in it.

What the axes of an activation count (samples, tokens or positions, features; and what is padding): the probe says how
many samples there are, the model which of its modules put tokens first, and the user what cannot be seen. An activation
that fits none of it is an error with the shapes and the remedy, never a number. What shapes cannot show: that axes are
exchanged where samples and tokens are equally many (other than in a torch module with ``batch_first=False``), and
whether rows (n * tokens, d) come sample by sample, as is assumed, or token by token.

Under tensor parallelism, where torch says how the parts fit together (a DTensor) they are gathered; that of a
column-parallel layer is taken before its output is cut to the rank's own part. A plain tensor is whole if every rank
holds the same one; if not, it is a part of which nobody says where it belongs, and it is refused on every rank.
"""

from __future__ import annotations

import contextvars
import copy
import difflib
import functools
import hashlib
import inspect
import sys
import threading
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastent.activations import Positions, RealTokens, Rows, Tokens, TooFewRows
from fastent.entropy import SpectralEntropy, Status, checked, spectral_entropy, unmeasured
from fastent.linalg import check_pool
from fastent.moments import Moments, named_ranks
from fastent.monitor.deferred import DeferredEntropy, Evaluated, Evaluation, described, failed
from fastent.monitor.isolation import apart, fsdp1_modules, fsdp_modules, in_a_pass, undisturbed
from fastent.monitor.ranks import Gathered, Ranks
from fastent.process import interrupts_held, warn_user
from fastent.records import Recording, matches_pattern
from fastent.sampling import sampling_error

Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]
OnError = Literal["raise", "record"]
LayerFunction = Callable[[nn.Module, Any], Tensor | Mapping[str, Tensor]]
Layers = str | Iterable[str] | LayerFunction

_INPUT = ":input"  # behind a layer's name


class Probe:
    """A fixed input of a model, known by its content.

    Parameters
    ----------
    inputs : Tensor, tuple of arguments, or mapping of keyword arguments
        Tensors, nested in tuples, lists and mappings, beside plain values (numbers, strings, None). The
        tensors are kept by reference. Samples are counted along dimension 0 of the first tensor.
    fewest : int
        Samples that it must have: 2, or 1 where each token is a row, or 0 where other ranks have more.

    Raises
    ------
    TypeError
        For a leaf whose content cannot be hashed.
    ValueError
        If there is no tensor, or fewer samples than a covariance needs.
    """

    name = "probe"
    """What messages call it."""

    def __init__(self, inputs: Inputs, *, fewest: int = 2) -> None:
        check_pool()
        if isinstance(inputs, Tensor):
            self.inputs: Inputs = inputs
            self.args: tuple[Any, ...] = (inputs,)
            self.kwargs: dict[str, Any] = {}
        elif isinstance(inputs, Mapping):
            self.inputs = self.kwargs = dict(inputs)
            self.args = ()
        elif isinstance(inputs, tuple):
            self.inputs = self.args = inputs
            self.kwargs = {}
        else:
            given = type(inputs).__name__
            remedy = {"ndarray": ": use torch.from_numpy(probe)", "list": ": use torch.tensor(probe)"}
            raise TypeError(
                "probe must be a tensor, a tuple of arguments or a dict of keyword arguments; "
                f"got {given}{remedy.get(given, '')}"
            )
        tensors = self._tensors()
        first = next((t for t in tensors if t.ndim), None)
        if first is None:
            raise ValueError("the probe holds no tensor with a sample axis")
        self.shape = tuple(first.shape)
        """Shape of the first tensor with axes, whose first counts samples."""
        self.device = first.device
        if self.shape[0] < fewest:
            raise ValueError(f"a covariance needs at least 2 samples; the probe has N = {self.shape[0]}")
        self._marks = [_mark(t) for t in tensors]
        self.digest = self._hash()

    def __str__(self) -> str:
        return ", ".join(f"{t.dtype} of shape {tuple(t.shape)}" for t in self._tensors())

    def check(self, *, content: bool = False) -> None:
        """Refuse to go on with a probe that changed or moved.

        Tensors on the CPU are hashed again (about 0.5 ms for each MiB): NumPy may write to their memory and
        leave no mark. On a device that would stop the host, so there the address and version counter are
        compared first, and the content only where they differ or on request (`content`).
        """
        tensors = self._tensors()
        marks = [_mark(t) for t in tensors]
        for old, new in zip(self._marks, marks, strict=False):
            if old[0] != new[0]:
                raise ValueError(
                    f"the probe moved from {old[0]} to {new[0]}: move it back, or make a new monitor"
                )
        if marks != self._marks or content or any(t.device.type == "cpu" for t in tensors):
            digest = self._hash()
            if digest != self.digest:
                raise ValueError(
                    f"the probe changed: its content was {self.digest[:12]} and is {digest[:12]}; "
                    "entropies of different probes do not compare: keep a clone for the probe"
                )
            self._marks = marks

    def part(self, rows: slice) -> tuple[Inputs, tuple[Any, ...], dict[str, Any]]:
        """Give some of the samples, in the form of the probe, and as arguments and keyword arguments.

        Every tensor with as many entries along its first axis as there are samples is cut, at any depth. Others, and
        plain values, are given as they are.
        """
        inputs = _cut(self.inputs, rows, self.shape[0])
        if isinstance(inputs, Mapping):
            return inputs, (), dict(inputs)
        return inputs, inputs if isinstance(inputs, tuple) else (inputs,), {}

    def entries(self, model: nn.Module) -> dict[str, Any]:
        """Name what the probe holds: by parameters of the model's forward pass, and keys of mappings at any depth."""
        try:
            bound = self._signature(model.forward).bind_partial(*self.args, **self.kwargs)
            found = dict(bound.arguments)
        except (TypeError, ValueError):  # called otherwise than it says: the names in the probe are left
            found = {}
        waiting: list[Any] = [self.kwargs, *self.args]
        while waiting:
            value = waiting.pop(0)
            if isinstance(value, Mapping):
                for key, item in value.items():
                    found.setdefault(str(key), item)
                waiting += value.values()
            elif isinstance(value, tuple | list):
                waiting += value
        return found

    def _signature(self, forward: Callable[..., Any]) -> inspect.Signature:
        return inspect.signature(forward)

    def _tensors(self) -> list[Tensor]:
        return [leaf for _, leaf in _leaves(self.args or self.kwargs) if isinstance(leaf, Tensor)]

    def _hash(self) -> str:
        sha = hashlib.sha256()
        # By path: keyword arguments in another order are the same probe.
        for path, leaf in sorted(_leaves(self.args or self.kwargs), key=lambda item: item[0]):
            if isinstance(leaf, Tensor):
                sha.update(f"{path} {leaf.dtype} {tuple(leaf.shape)};".encode())
                raw = leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                sha.update(raw.numpy().data)
            else:
                sha.update(f"{path} {leaf!r};".encode())
        return sha.hexdigest()


def plain_module(model: nn.Module) -> nn.Module:
    """Take off the wrappers of `torch.compile`, DistributedDataParallel and DataParallel, in any order."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif _is_compiled(model):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


class FoundLayer(NamedTuple):
    """Path of a layer for ``model.get_submodule``, whether it was named or is one of several, and input or output."""

    path: str
    named: bool
    of_input: bool = False

    def module(self, model: nn.Module, name: str) -> nn.Module:
        """Find the module in this place of `model` now; ValueError, with the layer's `name`, if there is none."""
        try:
            return model.get_submodule(self.path)
        except AttributeError:
            raise ValueError(
                f"layer {name!r} is not in the model any more, which was changed after the monitor was made: make a "
                "new one of the model as it is"
            ) from None


def find_layers(model: nn.Module, layers: str | Iterable[str]) -> dict[str, FoundLayer]:
    """Resolve names and patterns to submodules.

    Parameters
    ----------
    model : nn.Module
        A plain module.
    layers : str or iterable of str
        Names as in ``model.named_modules()``, or patterns over them: ``*``, ``?`` and ``[ab]`` stay within one level,
        ``**`` crosses dots ("**.mlp" is "mlp" at any depth). A container that cannot run (ModuleList, ModuleDict) means
        its children; a pattern passes over such containers unless it matches nothing else. Wrappers of the model and
        of submodules (compiled, FSDP1, checkpointed, DDP, an EMA copy, PEFT) are not part of a name, and may be written
        all the same; what PEFT puts in a layer's place, with its adapter, has the layer's name. ":input" behind a name
        or pattern asks for what a module is called with.

    Returns
    -------
    dict
        From the layer's name to where it is, in the order asked for. Children of a container and what a pattern matched
        are not `named`.

    Raises
    ------
    TypeError
        If a layer is, or lies in, a TorchScript module, which calls no hooks.
    ValueError
        If a name or pattern fits nothing, or a container is empty; close names are given.
    """
    if not isinstance(layers, Iterable):
        raise TypeError(f"layers takes a name, several of them, or a function; got {layers!r}")
    names = _names(model)
    paths: dict[str, str] = {}
    modules: dict[str, nn.Module] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(names[path], path)
        modules.setdefault(names[path], module)
    for path in names:  # as they are, wrappers included
        paths.setdefault(path, path)
        modules.setdefault(path, model.get_submodule(path))
    first = [path for path, _ in model.named_modules() if names[path]]  # a shared module by its first name
    once = list(dict.fromkeys(names[path] for path in first))
    found: dict[str, FoundLayer] = {}
    for wanted in [layers] if isinstance(layers, str) else layers:
        if not isinstance(wanted, str):
            raise TypeError(f"layers takes names; got {type(wanted).__name__} among them")
        asked, wanted = wanted, wanted.removesuffix(_INPUT)
        end = asked[len(wanted) :]
        named = wanted in paths
        matches = [wanted] if named else [name for name in once if matches_pattern(name, wanted)]
        matches = matches or [path for path in first if matches_pattern(path, wanted)]
        if not matches:
            close = difflib.get_close_matches(wanted, list(paths), n=3)
            known = ", ".join(map(repr, close or list(once)[:10])) or "no submodules"
            deep = wanted.replace("**", "*").replace("*", "**")
            deeper = [name for name in once if matches_pattern(name, deep)]
            if deeper:
                known += f"; * stays within one level, and ** would match {', '.join(map(repr, deeper[:3]))}"
            raise ValueError(
                f"no layer matches {asked!r}; {'close to it' if close else 'the model has'}: {known}"
            )
        layers_of = [name for name in matches if not _is_container(modules[name])]
        if not layers_of:
            layers_of = list(dict.fromkeys(_within(matches, modules)))
            named = False
        if not layers_of:
            raise ValueError(f"{wanted!r} is a container that holds no module: name a layer that runs")
        for name in layers_of:
            _refuse_scripted(name, modules)
            before = found.get(name + end)
            found[name + end] = FoundLayer(
                paths[name], named or (before is not None and before.named), of_input=bool(end)
            )
    if not found:
        raise ValueError("layers is empty: name at least one")
    return found


def is_sharded(model: nn.Module) -> bool:
    """Whether a forward pass of `model` needs every rank: FSDP or tensor parallelism."""
    modules = list(model.modules())
    return any(hasattr(p, "full_tensor") for p in model.parameters()) or bool(
        fsdp_modules(modules) or fsdp1_modules(modules)
    )


def _batch_first(module: nn.Module) -> bool | None:
    own = getattr(module, "batch_first", None)
    if isinstance(own, bool):
        return own
    if isinstance(module, nn.TransformerEncoder | nn.TransformerDecoder):
        module = module.layers[0]
    if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        return bool(module.self_attn.batch_first)
    return None


# Submodules that torch.compile, FSDP1, activation checkpointing, and Lightning's Fabric put in a path.
_WRAPPED = {
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "_forward_module",
    "_original_module",
}


def _names(model: nn.Module) -> dict[str, str]:
    """Names of all modules by their paths, without the wrappers in them: what is wrapped has its wrapper's name."""
    modules = dict(model.named_modules(remove_duplicate=False))
    names = {"": ""}
    for path in modules:
        above, _, part = path.rpartition(".")
        if path:
            wrapped = part in _WRAPPED or part == _wraps(modules[above])
            names[path] = names[above] if wrapped else f"{names[above]}.{part}".removeprefix(".")
    return names


def _wraps(module: nn.Module) -> str | None:
    """Submodule that `module` wraps, if it is of DDP, an EMA copy, or PEFT: its model, then its tuner."""
    if isinstance(
        module,
        nn.parallel.DistributedDataParallel | nn.DataParallel | torch.optim.swa_utils.AveragedModel,
    ):
        return "module"
    peft = sys.modules.get("peft")
    if peft is not None and isinstance(module, peft.PeftModel | peft.PeftMixedModel):
        return "base_model"
    if peft is not None and isinstance(module, peft.tuners.tuners_utils.BaseTuner):
        return "model"
    return None


def _is_container(module: nn.Module) -> bool:
    """Whether a module has no forward pass of its own."""
    return "forward" not in vars(module) and type(module).forward is nn.Module.forward


def _within(containers: Iterable[str], modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """Names of the modules in containers that can run, through containers in containers."""
    for name in containers:
        for child, module in modules[name].named_children():
            path = f"{name}.{child}".removeprefix(".")
            if _is_container(module):
                yield from _within([path], modules)
            else:
                yield path


def _refuse_scripted(name: str, modules: Mapping[str, nn.Module]) -> None:
    parts = name.split(".")
    above = {".".join(parts[:i]) for i in range(1, len(parts) + 1)}
    for path in above & modules.keys():
        if isinstance(modules[path], torch.jit.ScriptModule):
            raise TypeError(
                f"layer {name!r} is in a TorchScript module, which calls no hooks: keep the module that was scripted "
                "or traced, or pass a function as layers"
            )


def _is_compiled(model: nn.Module) -> bool:
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    return dynamo is not None and isinstance(model, dynamo.OptimizedModule)


def first_tensor(name: str, output: Any) -> Tensor:
    """Return the activation in what a layer gave or was called with; TypeError if there is none."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        parts: Iterable[Any] = output.values()
    else:
        parts = output if isinstance(output, tuple | list) else ()
    for part in parts:
        if isinstance(part, Tensor):
            return part
    what = (
        "was called without a tensor"
        if name.endswith(_INPUT)
        else f"returned {type(output).__name__} without a tensor"
    )
    raise TypeError(
        f"layer {name!r} {what} at its first level; pass a callable as layers to take the activations out of it"
    )


def _hook(
    module: nn.Module, name: str, take: Callable[[str, nn.Module, Any], None], of_input: bool
) -> RemovableHandle:
    """Have `take` called with what `module` returns, or with what it is called with."""
    if of_input:
        return module.register_forward_pre_hook(
            lambda module, args, kwargs: take(name, module, (*args, *kwargs.values())), with_kwargs=True
        )
    return module.register_forward_hook(lambda module, args, output: take(name, module, output))


def _has_hooks_for_any_end(model: nn.Module) -> bool:
    """Whether forward hooks are to be called after an exception too: torch does that for an Exception alone."""
    everywhere = nn.modules.module._global_forward_hooks_always_called
    return bool(everywhere) or any(m._forward_hooks_always_called for m in model.modules())


def _collectives() -> list[int] | None:
    """Count the collective calls so far, by process group and device; None where a backend does not."""
    if not (dist.is_available() and dist.is_initialized()):
        return []
    try:
        return [
            group._get_backend(device)._get_sequence_number_for_group()  # type: ignore[attr-defined]  # by the stubs
            for group in dist.distributed_c10d._world.pg_map
            for device in group._device_types
        ]
    except RuntimeError:
        return None


def _call_that_does_not_fit(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
    """Say what a probe should be like, if the model's forward pass has no such arguments."""
    try:
        signature = inspect.signature(model.forward)
        signature.bind(*args, **kwargs)
    except ValueError:  # it has no signature
        return None
    except TypeError as error:
        return (
            f"the probe does not fit {type(model).__name__}.forward{signature}: {error}. A tuple is its arguments and "
            "a dict its keyword arguments: of a batch (x, y) give x alone, where y are labels"
        )
    return None


def _mark(t: Tensor) -> tuple[torch.device, int, int | None]:
    return t.device, t.data_ptr(), None if t.is_inference() else t._version


def _cut(value: Any, rows: slice, samples: int) -> Any:
    if isinstance(value, Tensor):
        return value[rows] if value.ndim and len(value) == samples else value
    if isinstance(value, Mapping):
        items = {key: _cut(item, rows, samples) for key, item in value.items()}
        if type(value) is dict or not isinstance(value, MutableMapping):
            return items
        part = copy.copy(value)  # a class of its own, whose attributes a model may ask for
        for key, item in items.items():
            part[key] = item
        return part
    if isinstance(value, tuple | list):
        parts = [_cut(item, rows, samples) for item in value]
        if isinstance(value, list):
            return parts
        return type(value)._make(parts) if hasattr(value, "_make") else tuple(parts)
    return value


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}")
    elif isinstance(value, tuple | list):
        for i, item in enumerate(value):
            yield from _leaves(item, f"{path}.{i}")
    elif isinstance(value, Tensor) and value.layout != torch.strided:
        raise TypeError(f"a probe's tensors must be dense; probe{path} has layout {value.layout}")
    elif value is None or isinstance(value, Tensor | bool | int | float | str | torch.dtype | torch.device):
        yield path, value
    else:
        raise TypeError(
            f"a probe holds tensors and plain values; probe{path} is {type(value).__name__}: pass its tensors"
        )


class _Over(BaseException):
    """End of a pass that has given all that is watched.

    Raised in the last hook, and caught where the pass began. No Exception: a model may catch those, and go on.
    """


class Watched:
    """A model with a fixed probe and the layers to watch.

    A named layer must run in the first pass, and may be idle later. What a pattern matched, or a container holds, is
    watched from the first pass on in which it runs.

    Parameters
    ----------
    model, probe, layers
        As `fastent.SpectralEntropyMonitor` takes them.
    fewest : int
        Samples that the probe must have.
    batch_size, autocast
        As `fastent.SpectralEntropyMonitor` takes them.

    Raises
    ------
    TypeError, ValueError
        For an unusable model or probe, or a layer that the model does not have.

    Examples
    --------
    Rows of one's own, by a function, as they are when it returns (``clone()`` what the model goes on to change in
    place): of what the first layer gives, every other sample.

    >>> import torch
    >>> import fastent
    >>> def half(model, probe):
    ...     return model[0](probe)[::2]
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    >>> fastent.SpectralEntropyMonitor(model, torch.randn(64, 4), half).step(0)[0].n
    32
    """

    def __init__(
        self,
        model: nn.Module,
        probe: Inputs | Probe,
        layers: Layers,
        *,
        fewest: int = 2,
        batch_size: int | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            given = (
                f"the class {model.__name__}: make one" if isinstance(model, type) else type(model).__name__
            )
            raise TypeError(f"model must be an nn.Module; got {given}")
        if isinstance(plain_module(model), torch.jit.ScriptModule):
            raise TypeError(
                "model is a TorchScript module, which calls no hooks and whose buffers cannot be put back: pass the "
                "module that was scripted or traced"
            )
        if any(nn.parameter.is_lazy(p) for p in model.parameters()):
            raise ValueError("the model has lazy parameters: run one batch through it first")
        if isinstance(layers, nn.Module):
            own = next(
                (f", whose name is {name!r}" for name, part in model.named_modules() if part is layers), ""
            )
            raise TypeError(
                f"layers takes names of model.named_modules(); got a {type(layers).__name__}{own}"
            )
        self._model = model
        self.probe = probe if isinstance(probe, Probe) else Probe(probe, fewest=fewest)
        self._layers: dict[str, FoundLayer] | LayerFunction = (
            layers if callable(layers) else find_layers(plain_module(model), layers)
        )
        self.ran: dict[str, int] = {}
        """Features of each layer that has run, in the order of the first time."""
        self.rows: slice | None = None
        """Samples of the probe in the pass under way, if those are not all."""
        self._parts: list[slice] = []
        if batch_size is not None and batch_size < self.probe.shape[0]:
            samples = self.probe.shape[0]
            starts = range(0, samples, batch_size)
            self._parts = [slice(start, min(start + batch_size, samples)) for start in starts]
        self._autocast = autocast
        self._sequence: list[str] | None = None  # of the layers in the last whole pass, if each ran once
        self._warned_of_idle = False

    @classmethod
    def of(
        cls,
        model: nn.Module | None,
        probe: Inputs | None,
        layers: Layers | None,
        *,
        fewest: int,
        batch_size: int | None,
        autocast: torch.dtype | None,
    ) -> Watched | None:
        """Watch what was given, None if nothing was; in part is an error."""
        if model is not None and probe is not None and layers is not None:
            return cls(
                model,
                probe,
                layers,
                fewest=fewest,
                batch_size=batch_size,
                autocast=autocast,
            )
        given = {"model": model, "probe": probe, "layers": layers}
        missing = [name for name, value in given.items() if value is None]
        if len(missing) < len(given):
            raise ValueError(f"model, probe and layers go together; missing: {', '.join(missing)}")
        if batch_size is not None or autocast is not None:
            raise ValueError(
                "batch_size and autocast are for the pass of a probe: give model, probe and layers"
            )
        return None

    def restore(self, ran: Mapping[str, int]) -> None:
        """Go back to the layers that had run, of those that are watched; a function may return any."""
        found = self._layers
        self.ran = {layer: d for layer, d in ran.items() if callable(found) or layer in found}
        self._sequence = None

    def compare(self, ran: Mapping[str, int]) -> tuple[dict[str, int], list[str]]:
        """Find layers that had run elsewhere and are not watched, with their features, and watched ones that had not.

        What is not known without a pass is in neither.
        """
        if not ran or (self.by_function and not self.ran):
            return {}, []
        watched = set(self.order)
        return {layer: d for layer, d in ran.items() if layer not in watched}, [
            layer for layer in self.names if layer not in ran
        ]

    @property
    def names(self) -> Iterable[str]:
        """Names of the layers that are recorded, as far as they are known before a pass."""
        if callable(self._layers):
            return self.ran.keys()
        return [name for name, layer in self._layers.items() if layer.named or name in self.ran]

    @property
    def order(self) -> Iterable[str]:
        """Names of all layers in the order in which they were asked for, or a function first returned them."""
        return self.ran.keys() if callable(self._layers) else self._layers.keys()

    @property
    def may_have_few_rows(self) -> Container[str]:
        """Names of layers under two rows of which are no mistake: they ran before, or are some of many."""
        found = {} if callable(self._layers) else self._layers
        return self.ran.keys() | {name for name, layer in found.items() if not layer.named}

    @property
    def model(self) -> nn.Module:
        """The plain module."""
        return plain_module(self._model)

    @property
    def in_parts(self) -> bool:
        """Whether the probe is passed in several parts, so that `run` gets several activations of each layer."""
        return bool(self._parts)

    @property
    def sizes(self) -> set[int]:
        """Numbers of samples in the parts."""
        return {rows.stop - rows.start for rows in self._parts}

    @property
    def by_function(self) -> bool:
        """Whether a function returns the activations, which are then taken at its word."""
        return callable(self._layers)

    @property
    def has_decoder(self) -> bool:
        """Whether the model has an encoder and a decoder, by its configuration or by names in the probe."""
        config = getattr(self.model, "config", None)
        return getattr(config, "is_encoder_decoder", False) is True or any(
            name.startswith("decoder_") for name in self.probe.entries(self.model)
        )

    def tokens_first(self, layer: str) -> str | None:
        """Type of the torch module with ``batch_first=False`` that the layer is or is part of, None if none is."""
        if callable(self._layers):
            return None
        parts = self._layers[layer].path.split(".")
        for count in range(len(parts), -1, -1):
            module = self.model.get_submodule(".".join(parts[:count]))
            batch_first = _batch_first(module)
            if batch_first is not None:
                return None if batch_first else type(module).__name__
        return None

    @property
    def needs_every_rank(self) -> bool:
        """Whether a pass needs every rank: FSDP2 or tensor parallelism; rank 0 alone records then."""
        return is_sharded(self.model)

    def run(
        self,
        reduce: Callable[[str, Tensor], int],
        *,
        done: Callable[[], object] | None = None,
        whole: bool = False,
    ) -> dict[str, int]:
        """Pass the probe through the model; when it is sharded (FSDP, tensor parallelism) every rank must do so.

        Parameters
        ----------
        reduce : callable
            Gets each layer's name and activation as it appears and returns its width.
        done : callable, optional
            Called when all has been passed, and before anything is noted as having run.
        whole : bool
            Whether other ranks take part in the pass: then it does not end with the last of the layers, nor with an
            error of `reduce`, which is raised when the pass is over, since it may be this rank's alone.

        Returns
        -------
        dict
            Widths of layers that have run before and did not run now.

        Raises
        ------
        RuntimeError
            If a layer ran more than once, or a named one not at all the first time.
        TypeError
            If a layer's output holds no tensor.
        ValueError
            If a layer of a model under tensor parallelism holds only a part.

        Warns
        -----
        UserWarning
            Once, of the layers that were not named and did not run.
        """
        check_pool()
        widths: dict[str, int] = {}
        most = {} if callable(self._layers) else dict.fromkeys(self._layers, 0)
        errors: list[Exception] = []

        def reduce_to_the_end(name: str, h: Tensor) -> int:
            try:
                return reduce(name, h)
            except Exception as error:
                errors.append(error)
                return 0

        try:
            for rows in self._parts or (None,):
                self.rows = rows
                for name, count in self._pass(reduce_to_the_end if whole else reduce, widths, whole).items():
                    most[name] = max(most[name], count)
        finally:
            self.rows = None
        if errors:
            raise errors[0]
        return self._note(widths, most, done)

    def _note(
        self,
        widths: Mapping[str, int],
        fired: Mapping[str, int],
        done: Callable[[], object] | None = None,
    ) -> dict[str, int]:
        """Take note of what ran, how wide and how often; return the widths of layers that ran before and not now."""
        for name, count in fired.items():
            self._check_fired(name, count)
        if done is not None:
            done()
        for name in widths if self.by_function else self.order:
            if name in widths:
                self.ran.setdefault(name, widths[name])
        idle = {layer: d for layer, d in self.ran.items() if layer not in widths}
        self._warn_of_idle([layer for layer in self.order if layer not in widths and layer not in idle])
        return idle

    def _pass(
        self, reduce: Callable[[str, Tensor], int], widths: dict[str, int], whole: bool
    ) -> Mapping[str, int]:
        """Pass `rows` of the probe, add the layers' `widths`, and return how often each of them ran."""
        model, layers, probe = self.model, self._layers, self.probe
        inputs, args, kwargs = (
            (probe.inputs, probe.args, probe.kwargs) if self.rows is None else probe.part(self.rows)
        )
        with undisturbed(model) as interrupts, Spread(model.modules()) as spread, self._casting():
            reduce = apart(reduce, interrupts)
            if callable(layers):
                with interrupts.second_at_once():
                    given = layers(model, inputs)
                own_name = str(getattr(layers, "__name__", type(layers).__name__))
                named = list(given.items()) if isinstance(given, Mapping) else [(own_name, given)]
                names = [str(name) for name, _ in named]
                for name, (_, h) in zip(names, named, strict=True):
                    if names.count(name) > 1:
                        raise ValueError(f"layers returned two activations named {name!r}")
                    widths[name] = reduce(name, spread.whole(name, h))
                return {}
            fired = dict.fromkeys(layers, 0)
            order: list[str] = []
            end = None if whole or _has_hooks_for_any_end(model) else self._sequence
            over, thread, collectives = False, threading.get_ident(), _collectives()

            def take(name: str, module: nn.Module, output: Any) -> None:
                nonlocal over
                if over:  # the model caught even that
                    return
                fired[name] += 1
                order.append(name)
                if fired[name] == 1:
                    widths[name] = reduce(name, spread.whole(name, first_tensor(name, output), module))
                if order == end and threading.get_ident() == thread:
                    over = True
                    raise _Over

            handles = []
            try:
                for name, layer in layers.items():
                    handles.append(_hook(layer.module(model, name), name, take, layer.of_input))
                with interrupts.second_at_once(), suppress(_Over):
                    # Context variables that the model sets and would reset behind the end stay in the copy.
                    contextvars.copy_context().run(model, *args, **kwargs)
            except TypeError as error:
                note = _call_that_does_not_fit(model, args, kwargs)
                if note is not None:
                    error.add_note(note)
                raise
            finally:
                for handle in handles:
                    handle.remove()
            if not over:
                alone = collectives is not None and collectives == _collectives()
                once = all(count == 1 for count in fired.values())
                self._sequence = order if alone and once else None
            return fired

    def _casting(self) -> AbstractContextManager[object]:
        if self._autocast is None:
            return nullcontext()  # that of the caller, if there is one
        return torch.autocast(self.probe.device.type, self._autocast)

    def _check_fired(self, name: str, count: int) -> None:
        assert not callable(self._layers)
        layer = self._layers[name]
        if count == 1 or (count == 0 and (name in self.ran or not layer.named)):
            return
        reason = "it is shared or runs in a loop, so which of its outputs is meant is open"
        if count == 0:
            reason = "its parent does not call it on this probe, or uses its weights without calling it"
            module = self.model.get_submodule(layer.path)
            children = [repr(f"{name}.{child}") for child, _ in module.named_children()]
            if children:
                reason += f" (its children may run without it: {', '.join(children[:3])})"
        raise RuntimeError(
            f"layer {name!r} fired {count} times in one forward pass: {reason}; "
            "pass a callable as layers to choose the activations yourself"
        )

    def _warn_of_idle(self, layers: list[str]) -> None:
        if layers and not self._warned_of_idle:
            self._warned_of_idle = True
            more = f" and {len(layers) - 5} more" if len(layers) > 5 else ""
            warn_user(
                f"{', '.join(map(repr, layers[:5]))}{more} did not run in the {self.probe.name}'s pass: left out until "
                "they do",
                UserWarning,
            )


SamplesAxis = Literal[0, 1]

_USUAL_MASK = "attention_mask"
_TORCH_MASK = "key_padding_mask"  # the end of its names in torch.nn, where True is padding
_BY_HAND = "give a function as layers that returns the rows you mean"


@dataclass(frozen=True)
class Reading:
    """Activations with samples first, how to take rows of them, and the name of the mask that is used, if any."""

    h: Tensor
    rows: Rows
    mask: str | None = None


class Axes:
    """How a monitor reads activations.

    Parameters
    ----------
    tokens, positions, channel_axis, samples_axis, mask
        As `fastent.SpectralEntropyMonitor` takes them. With both, `tokens` are for (samples, tokens, d) and `positions`
        for activations of more axes.
    watched : Watched or None
        The model and its probe.

    Raises
    ------
    ValueError
        If the arguments do not go together, or the mask is not in the probe or no (n, tokens) mask.
    """

    def __init__(
        self,
        tokens: Tokens | None,
        positions: Positions | None,
        channel_axis: int | None,
        samples_axis: SamplesAxis | None,
        mask: str | None,
        watched: Watched | None,
    ) -> None:
        _check_choices(tokens, positions, channel_axis, samples_axis)
        self._tokens, self._positions, self._channel_axis = tokens, positions, channel_axis
        self._samples_axis, self._mask, self._given = samples_axis, mask, watched
        self._real: dict[tuple[int, torch.device | None], RealTokens] = {}  # by the end of the part
        self._used: str | None = None
        self._warned: set[str] = set()
        self._tokens_first: dict[str, str | None] = {}
        self._warned_of_mask = False
        self._two_masks = False  # which of them a layer has is open
        self._samples_at: dict[int, str] = {}  # by axis of the probe: a layer whose samples are along it
        if mask is not None and (watched is None or tokens is None):
            missing = "tokens, which says what to make of the real ones" if watched else "a probe that has it"
            hint = "" if watched else "; for observe give spectral_entropy(h, tokens=..., mask=...)"
            raise ValueError(f"mask={mask!r} names an entry of the probe, and needs {missing}{hint}")
        if watched is not None and samples_axis == 1 and watched.sizes & set(watched.probe.shape[1:2]):
            raise ValueError(
                f"of parts of the probe {watched.probe.shape} with as many samples as its second axis has entries, "
                "samples_axis=1 cannot tell which one counts samples: take another batch_size"
            )
        if watched is not None and watched.probe.shape:
            self.read_mask()

    @property
    def _watched(self) -> Watched:
        assert self._given is not None
        return self._given

    @property
    def needs_mask(self) -> bool:
        """Whether a mask makes a difference."""
        return self._tokens is not None

    def read_mask(self) -> None:
        """Find the mask in the input, if there is one for `tokens`."""
        self._real, self._used, self._two_masks = {}, None, False
        if self._tokens is not None:
            real = self._named_mask(self._mask) if self._mask is not None else self._usual_mask()
            if real is not None:
                self._real[0, None] = real

    def at_hand(self, h: Tensor) -> Reading:
        """Activations that did not come from the probe: taken at their word."""
        if _is_odd(h):
            return Reading(h, Rows())
        if self._samples_axis == 1 and self._by_tokens(h):
            h = h.transpose(0, 1)
        return Reading(h, self._rows(h))

    def on_probe(self, layer: str, h: Tensor) -> Reading:
        """Activations of a layer on the probe.

        Raises
        ------
        ValueError
            If an axis does not count what it should, or which tokens are padding is open.
        """
        if _is_odd(h):
            return Reading(h, Rows())
        if _is_matrix(h) and not self._watched.by_function and len(h) not in self._samples():
            h = self._rows_of_tokens(h.flatten(1))
            if _is_matrix(h):
                return Reading(h, Rows())
        if not _is_matrix(h) and h.ndim >= 3:
            h = self._samples_first(layer, h)
        rows = self._rows(h)
        if rows.tokens is None:
            return Reading(h, rows)
        real = self._real_tokens(layer, h)
        return Reading(h, rows._replace(mask=real), None if real is None else self._used)

    def past_the_model(self, layer: str, h: Tensor) -> Reading:
        """Activations of a layer that was called past the model's own forward pass: nobody knows of a mask.

        Raises
        ------
        ValueError
            If a mask was named, or which axis counts samples is open.
        """
        if self._mask is not None:
            raise ValueError(
                f"it was called past the forward pass of the model, which has no mask {self._mask!r} then: give the "
                "module whose forward pass is called as model"
            )
        if not _is_odd(h) and self._by_tokens(h):
            self._refuse_open_axis(layer, h)
            if self._tokens is not None and not self._warned_of_mask:
                self._warned_of_mask = True
                warn_user(
                    f"layer {layer!r} was called past the forward pass of the model, so that padding, if there is any, "
                    "counts as tokens: give the module whose forward pass is called as model. Said once",
                    UserWarning,
                )
        return self.at_hand(h)

    def _rows(self, h: Tensor) -> Rows:
        if _is_matrix(h):
            return Rows()
        if self._by_tokens(h):
            return Rows(self._tokens)
        return Rows(positions=self._positions, channel_axis=self._channel_axis)

    def _by_tokens(self, h: Tensor) -> bool:
        return h.ndim == 3 and (self._tokens is not None or self._positions is None)

    def _samples(self) -> tuple[int, ...]:
        """Numbers of samples that the pass may have: along its first axis, or, where tokens come first, its second."""
        rows = self._watched.rows
        if rows is not None:  # cut along the first
            return (rows.stop - rows.start,)
        return self._watched.probe.shape[: 2 if self._samples_axis == 1 else 1]

    def _fits(self, layer: str, size: int) -> bool:
        """Whether an axis of `layer` counts samples; no other layer may find them along the probe's other axis."""
        axes = [axis for axis, count in enumerate(self._samples()) if count == size]
        if len(axes) == 1:
            self._samples_at.setdefault(axes[0], layer)
            if len(self._samples_at) == 2:
                raise ValueError(
                    f"by samples_axis=1 the samples of the probe {self._watched.probe.shape} are along its first axis "
                    f"in layer {self._samples_at[0]!r} and along its second in {self._samples_at[1]!r}: watch layers "
                    "with samples first with a monitor of their own"
                )
        return bool(axes)

    def _rows_of_tokens(self, h: Tensor) -> Tensor:
        """Activations (rows, d) that are not one row for each sample, as (samples, tokens, d) where that is known."""
        rows, d = h.shape
        real = self._mask_of_pass()
        if real is not None and rows == real.mask.numel():
            n, tokens = real.mask.shape
            return h.reshape((tokens, n, d) if self._samples_axis == 1 else (n, tokens, d))
        samples = self._samples()[0]
        if self._tokens is None and rows < samples and d != samples:
            return h  # a part of the samples, such as an expert's
        if (self._tokens == "flatten" or self._positions == "flatten") and (real is None or real.full):
            return h
        seen = f"gave {tuple(h.shape)} on {self._probe()}, not a row for each sample"
        if real is not None and self._tokens == "flatten":
            raise ValueError(
                f"it {seen}, and which of its rows are padding is open: take a probe without padding, or {_BY_HAND}"
            )
        if rows in self._watched.probe.shape[1:2] and self._samples_axis is None:
            raise ValueError(
                f"it {seen}. If the probe counts samples along its second axis, give samples_axis=1; if each row is a "
                'token or a sample sent to this layer, give tokens="flatten"'
            )
        raise ValueError(
            f'it {seen}. If each row is a token, or a sample sent to this layer, give tokens="flatten"; else {_BY_HAND}'
        )

    def _samples_first(self, layer: str, h: Tensor) -> Tensor:
        shape = tuple(h.shape)
        if self._samples_axis == 1 and self._by_tokens(h):
            if not self._watched.by_function and not self._fits(layer, shape[1]):
                raise ValueError(
                    f"with samples_axis=1 the second axis of its activations counts samples; it gave {shape} on "
                    f"{self._probe()}: {_BY_HAND}"
                )
            return h.transpose(0, 1)
        self._refuse_open_axis(layer, h)
        samples = self._samples()[0]
        if shape[0] == samples or (self._samples_axis == 1 and self._fits(layer, shape[0])):
            return h
        seen = f"the first axis of its activations should count samples; it gave {shape} on {self._probe()}"
        if shape[1] == samples and self._by_tokens(h) and self._samples_axis is None:
            raise ValueError(f"{seen}: give samples_axis=1 if that is (tokens, samples, d)")
        if self._watched.by_function:
            return h
        raise ValueError(f"{seen}: {_BY_HAND}")

    def _refuse_open_axis(self, layer: str, h: Tensor) -> None:
        if self._samples_axis is None and self._by_tokens(h):
            if layer not in self._tokens_first:
                self._tokens_first[layer] = self._watched.tokens_first(layer)
            owner = self._tokens_first[layer]
            if owner is not None:
                raise ValueError(
                    f"it gave {tuple(h.shape)}, and its {owner} has batch_first=False: give samples_axis=1 if that is "
                    "(tokens, samples, d), samples_axis=0 if it is (samples, tokens, d)"
                )

    def _real_tokens(self, layer: str, h: Tensor) -> RealTokens | None:
        real = self._mask_of_pass()
        if real is None:
            return None
        if real.mask.shape != h.shape[:2]:
            owner = self._watched.probe.name
            seen = f"{self._used!r} of the {owner} is for {_count(real.mask.shape)}, and there are {_count(h.shape)}"
            if self._mask is not None:
                raise ValueError(f"{seen}: watch such layers with a monitor of their own")
            if not real.full and layer not in self._warned:
                self._warned.add(layer)
                warn_user(f"{seen} in layer {layer!r}: what is padding there counts as tokens", UserWarning)
            return None
        if self._two_masks:
            raise ValueError(
                "the model has an encoder and a decoder, and which mask is its own is open: give "
                f"mask={_USUAL_MASK!r} for layers of the encoder, the name of the decoder's for its layers (all ones "
                "if there is no padding), in a monitor for each"
            )
        return self._mask_of_pass(h.device)

    def _mask_of_pass(self, device: torch.device | None = None) -> RealTokens | None:
        """Real tokens of the samples that are passed, on `device` or where the probe has them; kept for later."""
        whole = self._real.get((0, None))
        if whole is None:
            return None
        rows = self._watched.rows
        key = (rows.stop if rows is not None else 0, device)
        if key not in self._real:
            real = whole if rows is None else RealTokens(whole.mask[rows])
            self._real[key] = real if device is None else real.to(device)
        return self._real[key]

    def _named_mask(self, name: str) -> RealTokens:
        plain = name.removeprefix("~")
        entries = self._watched.probe.entries(self._watched.model)
        tensors = [key for key, value in entries.items() if isinstance(value, Tensor)]
        if plain not in tensors:
            raise ValueError(
                f"mask={name!r}: the {self._watched.probe.name} has no tensor {plain!r}; it has: "
                f"{', '.join(tensors) or 'none with a name'}"
            )
        if plain.endswith(_TORCH_MASK) and plain == name:
            raise ValueError(f'in {name!r} of torch True is padding: give mask="~{name}"')
        entry = entries[plain]
        self._used = name
        try:
            return RealTokens(entry if name == plain else entry == 0)
        except (TypeError, ValueError) as error:
            error.args = (f"mask={name!r} of the {self._watched.probe.name}: {error}",)
            raise

    def _usual_mask(self) -> RealTokens | None:
        entries = self._watched.probe.entries(self._watched.model)
        entry = entries.get(_USUAL_MASK)
        if isinstance(entry, Tensor) and entry.ndim and entry.shape[0] in self._samples():
            self._used, self._two_masks = _USUAL_MASK, self._watched.has_decoder
            try:
                return RealTokens(entry)
            except ValueError as error:
                error.args = (
                    f"{_USUAL_MASK!r} of the {self._watched.probe.name}: {error}. In a monitor: "
                    f'mask="~{_USUAL_MASK}" where 0 or False is a real token; a mask that is not (n, tokens) cannot be '
                    f"read, so {_BY_HAND}",
                )
                raise
        torch_masks = [name for name in entries if name.endswith(_TORCH_MASK)]
        if torch_masks and not self._warned_of_mask:
            self._warned_of_mask = True
            warn_user(
                f"the {self._watched.probe.name}'s {torch_masks[0]!r} is not used, so padding counts as tokens: give "
                f'mask="~{torch_masks[0]}" to leave it out',
                UserWarning,
            )
        return None

    def _probe(self) -> str:
        probe = self._watched.probe
        if self._watched.rows is not None:
            return f"a part of the probe, {self._samples()[0]} samples along its first axis"
        return f"a {probe.name} of {probe.shape[0]} samples"


def _is_odd(h: Any) -> bool:
    """Whether `h` has no axes to ask for, and an error of its own."""
    return not isinstance(h, Tensor) or h.is_nested


def _is_matrix(h: Tensor) -> bool:
    """Whether `h` is (rows, d), or a pool with further axes of 1."""
    return h.ndim == 2 or (h.ndim > 3 and all(size == 1 for size in h.shape[2:]))


def _count(shape: torch.Size) -> str:
    return f"{shape[0]} samples of {shape[1]} tokens"


def _check_choices(tokens: Any, positions: Any, channel_axis: Any, samples_axis: Any) -> None:
    for name, value, choices in (
        ("tokens", tokens, get_args(Tokens)),
        ("positions", positions, get_args(Positions)),
        ("samples_axis", samples_axis, get_args(SamplesAxis)),
    ):
        if value is not None and value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")
    if (positions is None) != (channel_axis is None):
        raise ValueError(
            "positions and channel_axis go together: channel_axis=1 for (n, channels, ...) maps, and "
            'positions="flatten" or "mean"'
        )


class Evaluator:
    """Asks for the entropies of a monitor's layers.

    Parameters
    ----------
    evaluations : DeferredEntropy
        Where they are asked for.
    recording : Recording
        Knows which layer has a record at a step, and refuses one of another width.
    watched : Watched or None
        The model and its probe.
    axes : Axes
        How the activations are read.
    standard_error, on_error, across_ranks
        As `fastent.SpectralEntropyMonitor` takes them.
    """

    def __init__(
        self,
        evaluations: DeferredEntropy,
        recording: Recording,
        watched: Watched | None,
        axes: Axes,
        standard_error: bool,
        on_error: OnError,
        across_ranks: bool,
    ) -> None:
        self._evaluations, self._recording, self._watched = evaluations, recording, watched
        self._ranks = Ranks() if across_ranks else None
        self._axes, self._standard_error, self._on_error = axes, standard_error, on_error
        self._devices: dict[str, torch.device] = {}
        self._merged = Merged()
        self._seen_in_backward: dict[str, bool] = {}  # by layer, for its newest observed step
        self._failed: dict[str, int] = {}  # by layer, the newest step
        self._warned_of_repeats = self._warned_of_failure = False
        self._probing = False

    @property
    def _where(self) -> str:
        return " on the probe" if self._probing else ""

    @property
    def probing(self) -> bool:
        """Whether the calling thread is in a pass of the probe."""
        return self._probing and in_a_pass()

    def check(self) -> None:
        """Pass the probe through the model and check what comes, without an evaluation; every rank may do so."""
        if self._watched is not None and self._has_pass(self._watched):
            with self._pass(
                f"the probe's pass failed at construction: the model must take the probe, {self._watched.probe}, as "
                "its input. (check=False puts the pass off to the first evaluation)"
            ):
                self._run_probe(self._watched, None, whole=self._watched.needs_every_rank)

    def run(self, step: int) -> bool:
        """Evaluate the layers of the model on its probe; a full ring may drop that, and then nothing is run.

        Returns
        -------
        bool
            False if `step` gave nothing to evaluate, so that the next one is due.
        """
        watched = self._watched
        assert watched is not None
        every_rank = watched.needs_every_rank
        names = () if every_rank and _rank() and self._ranks is None else watched.names
        with self._evaluations.clock.part("forward"), self._failing(step, names):
            if self._ranks is None:
                watched.probe.check()
                self._run(step, watched, every_rank)
            else:
                self._run_across(step, watched, self._ranks)
        return True

    def _has_pass(self, watched: Watched) -> bool:
        """Whether this rank runs the model: where others have all samples, only if they need it for theirs."""
        return self._ranks is None or watched.probe.shape[0] > 0 or watched.needs_every_rank

    def _run_across(self, step: int, watched: Watched, ranks: Ranks) -> None:
        merged, idle, failure = Merged(step), watched.ran, None
        try:
            watched.probe.check()
            if self._has_pass(watched):
                with self._pass(f"in the pass of the monitor's probe at step {step}"):
                    merge = functools.partial(self._merge, merged)
                    idle = watched.run(merge, whole=watched.needs_every_rank)
        except Exception as error:  # raised when the other ranks know of it
            failure = error
        own = merged.gathered()
        own.update({layer: Gathered(Moments(), d, ran=False) for layer, d in idle.items()})
        total = self._add_up(step, ranks, own, failure)
        self._put_together(step, total, "in this pass of the probe: nothing called it")

    def _add_up(
        self, step: int, ranks: Ranks, own: Mapping[str, Gathered], failure: Exception | None
    ) -> dict[str, Gathered]:
        with self._evaluations.clock.part("waiting"):
            return ranks.add_up(step, own, failure)

    def _put_together(self, step: int, total: Mapping[str, Gathered], where: str) -> None:
        """Ask for the entropies of all ranks' rows."""
        assert self._watched is not None
        evaluation = self._evaluations.open(step, needs_room=False)
        assert evaluation is not None
        with evaluation:
            for layer, rows in total.items():
                self._watched.ran.setdefault(layer, rows.d)
                if rows.ran and not rows.nonfinite_on:
                    put_merged(evaluation, layer, rows.moments, rows.d, rows.mask)
                elif rows.ran:  # no eigenvalues are to be found
                    entropy = entropy_of(rows.moments, rows.d)
                    message = f"{entropy.message}, on {named_ranks(rows.nonfinite_on)}"
                    if entropy.status is Status.NONFINITE:
                        entropy = replace(entropy, message=message)
                    evaluation.put(layer, entropy, mask_name=rows.mask)
            idle = {layer: rows.d for layer, rows in total.items() if not rows.ran}
            self._finish(step, evaluation, idle, where)

    def _run(self, step: int, watched: Watched, every_rank: bool) -> None:
        evaluation = None
        if not (every_rank and _rank()):
            # The jackknife needs the activations: it is done in line.
            evaluation = self._evaluations.open(step, needs_room=not self._standard_error)
        note = f"in the pass of the monitor's probe at step {step}"
        if evaluation is not None:
            with evaluation, evaluation.passing(), self._pass(note):
                idle = self._run_probe(watched, evaluation, whole=every_rank)
                self._finish(step, evaluation, idle, "in this pass of the probe: nothing called it")
        elif every_rank:  # its part of the forward pass: the other ranks wait for it
            with self._pass(note):
                self._run_probe(watched, None, whole=True)

    def _run_probe(
        self, watched: Watched, evaluation: Evaluation | None, *, whole: bool = False
    ) -> dict[str, int]:
        """Put what a pass gives into `evaluation`, or only check it; return as `Watched.run`."""
        if not watched.in_parts:
            take = self._examine if evaluation is None else functools.partial(self._add, evaluation)
            return watched.run(take, whole=whole)
        merged, may_have_few = Merged(), watched.may_have_few_rows

        def done() -> None:
            for layer, moments in merged.moments.items():
                if moments.n < 2 and layer not in may_have_few and self._ranks is None:
                    message = (
                        f"a covariance needs at least 2 rows; layer {layer!r} gave {moments.n} on the probe"
                    )
                    raise TooFewRows(message, moments.n, merged.widths[layer])
                if evaluation is not None:
                    merged.put(layer, evaluation)

        return watched.run(functools.partial(self._merge, merged), done=done, whole=whole)

    def _finish(self, step: int, evaluation: Evaluation, idle: Mapping[str, int], where: str) -> None:
        """Say of `idle` layers, given with their widths, that they did not run, and put all in order."""
        assert self._watched is not None
        for layer, d in idle.items():
            width = self._recording.width(layer) or d
            evaluation.put(layer, unmeasured(Status.NOT_RUN, 0, width, f"the layer did not run {where}"))
        evaluation.arrange(self._watched.order)
        self._expect(step, evaluation)

    def observe(self, step: int, layer: str, h: Tensor | SpectralEntropy, merge: bool) -> None:
        """Evaluate activations that are at hand, or take their entropy, or keep rows until the step is over."""
        if isinstance(h, SpectralEntropy) and not isinstance(h.normalized, float):
            raise ValueError("observe takes one entropy at a time; got a batch: use its unbind()")
        if merge and isinstance(h, SpectralEntropy):
            raise ValueError(
                "merge=True adds up activations, and entropies do not add up: pass the activations"
            )
        if merge and self._standard_error:
            raise ValueError(
                "merge=True keeps moments, and standard_error needs the activations: leave one of them out"
            )
        if (
            in_a_pass()
        ):  # by a hook of the user's that fires in the pass of a probe too, of another monitor's as well
            return
        merging = layer in self._merged.moments
        if merging or self._recording.newest(layer) == step:
            if in_backward() and not self._seen_in_backward.get(layer, True):
                return  # the forward pass once more, by activation checkpointing: the same rows
            if not (merge and merging):
                self._ignore(step, layer)
                return
        else:
            self._seen_in_backward[layer] = in_backward()
        with self._failing(step, [layer]):
            self._take(step, layer, h, merge)

    def _take(self, step: int, layer: str, h: Tensor | SpectralEntropy, merge: bool) -> None:
        if merge and not isinstance(h, SpectralEntropy):
            self._merged.step = step
            self._merge(self._merged, layer, h)
            return
        known = isinstance(h, SpectralEntropy) or self._standard_error
        evaluation = self._evaluations.open(step, needs_room=not known)
        if evaluation is not None:
            with evaluation:
                if isinstance(h, SpectralEntropy):
                    evaluation.put(layer, h)
                else:
                    self._add(evaluation, layer, h)
                self._expect(step, evaluation)

    def end_merging(self, next_step: int | None = None) -> None:
        """Evaluate what was merged, if that was at a step before `next_step` or there is none."""
        merged = self._merged
        if not merged.moments or next_step == merged.step:
            return
        with interrupts_held():
            self._merged = Merged()
            with self._failing(merged.step, merged.moments):
                self._evaluate(merged)

    def merged_so_far(self) -> tuple[int, dict[str, Evaluated]]:
        """Give the step that is being merged, and what its entropies would be if it ended now."""
        merged = self._merged
        with self._evaluations.clock.part("eigenvalues"):
            results = {
                layer: Evaluated(entropy_of(moments, merged.widths[layer]), mask=merged.masks[layer])
                for layer, moments in merged.moments.items()
            }
        return merged.step, results

    def _evaluate(self, merged: Merged) -> None:
        evaluation = self._evaluations.open(merged.step, needs_room=False)
        if evaluation is not None:
            with evaluation:
                for layer in merged.moments:
                    merged.put(layer, evaluation)
                self._expect(merged.step, evaluation)

    @contextmanager
    def _failing(self, step: int, layers: Iterable[str]) -> Iterator[None]:
        """Record what goes wrong inside for `layers`, if it is not to be raised."""
        try:
            yield
        except Exception as error:  # whatever a model raises on its probe must not end training
            if self._on_error == "raise":
                raise
            ran = self._watched.ran if self._watched is not None else {}
            evaluation = self._evaluations.open(step, needs_room=False)
            assert evaluation is not None
            with evaluation:
                for layer in layers:
                    self._merged.moments.pop(layer, None)
                    self._failed[layer] = step
                    if self._recording.newest(layer) != step:
                        width = self._recording.width(layer) or ran.get(layer, 0)
                        evaluation.put(layer, failed(width, error))
                self._expect(step, evaluation)
            if not evaluation.widths and not self._warned_of_failure:  # nor will a record warn
                self._warned_of_failure = True
                warn_user(
                    f"the evaluation of step {step} failed, and leaves no record: {described(error)}",
                    RuntimeWarning,
                )

    def forget(self) -> None:
        """Let layers come from other devices than before, and drop what was merged."""
        self._devices = {}
        self._merged = Merged()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_merged": Merged()}  # whose records the copy of the monitor has

    def _add(self, evaluation: Evaluation, layer: str, h: Tensor) -> int:
        """Put activations into `evaluation` and return their width."""
        with self._reading(layer, h) as reading:
            try:
                if self._standard_error:
                    with self._evaluations.clock.part("eigenvalues"):
                        result = spectral_entropy(reading.h, **reading.rows._asdict())
                        sampling = (
                            sampling_error(reading.h, **reading.rows._asdict()) if result.n >= 3 else None
                        )
                    evaluation.put(layer, result, sampling, mask_name=reading.mask)
                else:
                    evaluation.add(layer, reading.h, reading.rows, mask_name=reading.mask)
            except TooFewRows as error:
                self._check_few(layer, error)
                evaluation.put(layer, too_few(error.n, error.d), mask_name=reading.mask)
        self._devices[layer] = h.device
        return evaluation.widths[layer]

    def _examine(self, layer: str, h: Tensor) -> int:
        """Check activations and return their width."""
        with self._reading(layer, h) as reading:
            try:
                return checked(reading.h, reading.rows).shape[-1]
            except TooFewRows as error:
                self._check_few(layer, error)
                return error.d

    def _check_few(self, layer: str, error: TooFewRows) -> None:
        """Raise `error` where it is a mistake: on the probe, for a layer that has not run before."""
        if self._ranks is not None:  # others may have more
            return
        if self._probing and self._watched is not None and layer not in self._watched.may_have_few_rows:
            raise error

    def _merge(self, merged: Merged, layer: str, h: Tensor) -> int:
        """Add the rows of activations to `merged` and return their width."""
        with self._reading(layer, h) as reading:
            rows = reading.rows
            with self._evaluations.clock.part("covariance"):
                part = Moments().update(reading.h, **rows._asdict())
            d = len(part.mean) if part.n else rows.of(reading.h).shape[-1]
            check_width(d)
            self._recording.check(merged.step, layer, d)
            with self._evaluations.clock.part("covariance"):
                merged.add(layer, part, d, reading.mask)
        self._devices[layer] = h.device
        return d

    def _ignore(self, step: int, layer: str) -> None:
        if not self._warned_of_repeats and self._failed.get(layer) != step:
            self._warned_of_repeats = True
            warn_user(
                f"layer {layer!r} was observed again at step {step}, and that is ignored: pass merge=True to take "
                "all calls of a step together (gradient accumulation), or another step. Further ones are ignored "
                "without a warning",
                UserWarning,
            )

    def _expect(self, step: int, evaluation: Evaluation) -> None:
        for layer, d in evaluation.widths.items():
            self._recording.check(step, layer, d)
        for layer, d in evaluation.widths.items():
            self._recording.expect(step, layer, d)

    @contextmanager
    def _reading(self, layer: str, h: Tensor) -> Iterator[Reading]:
        """Read activations by their axes; what is wrong with them is said with the name of the layer."""
        try:
            if isinstance(h, Tensor):
                old = self._devices.get(layer, h.device)
                if old != h.device:
                    raise ValueError(
                        f"the activations moved from {old} to {h.device}: move the model back, or load the "
                        "state_dict() of this monitor into a new one"
                    )
                h = h.detach()
            yield self._read(layer, h)
        except (TypeError, ValueError) as error:
            error.args = (f"layer {layer!r}{self._where}: {error}",)
            raise
        except Exception as error:
            error.add_note(f"in the activations of layer {layer!r}")
            raise

    def _read(self, layer: str, h: Tensor) -> Reading:
        return self._axes.on_probe(layer, h) if self._probing else self._axes.at_hand(h)

    @contextmanager
    def _pass(self, note: str) -> Iterator[None]:
        self._probing = True
        try:
            yield
        except Exception as error:
            error.add_note(note)
            raise
        finally:
            self._probing = False


@dataclass
class Merged:
    """Rows that came in several parts, by layer."""

    step: int = -1
    moments: dict[str, Moments] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)
    masks: dict[str, str | None] = field(default_factory=dict)

    def add(self, layer: str, part: Moments, d: int, mask: str | None) -> None:
        """Add rows of a layer of `d` features, and the name of their mask."""
        self.moments[layer] = self.moments.get(layer, Moments()).merge(part)
        self.widths[layer] = d
        self.masks[layer] = mask

    def gathered(self) -> dict[str, Gathered]:
        """Give the rows of each layer as ranks add them up."""
        return {
            layer: Gathered(moments, self.widths[layer], self.masks[layer])
            for layer, moments in self.moments.items()
        }

    def put(self, layer: str, evaluation: Evaluation) -> None:
        """Have `evaluation` take the entropy of a layer's rows, however few they are."""
        put_merged(evaluation, layer, self.moments[layer], self.widths[layer], self.masks[layer])


def entropy_of(moments: Moments, d: int) -> SpectralEntropy:
    """Entropy of merged rows of `d` features, however few they are, in line."""
    return too_few(moments.n, d) if moments.n < 2 else moments.spectral_entropy()


def put_merged(evaluation: Evaluation, layer: str, moments: Moments, d: int, mask: str | None) -> None:
    """Have `evaluation` take the entropy of merged rows of `d` features, however few they are."""
    if moments.n < 2:
        evaluation.put(layer, too_few(moments.n, d), mask_name=mask)
    else:
        evaluation.add_moments(layer, moments, mask_name=mask)


def check_width(d: int) -> None:
    """Refuse a single feature."""
    if d < 2:
        raise ValueError("the normalised entropy divides by log d, so d must be at least 2; got d = 1")


def too_few(n: int, d: int) -> SpectralEntropy:
    """Make the result of `n` rows, 0 or 1, of `d` features."""
    message = f"a covariance needs at least 2 rows; there {'was' if n == 1 else 'were'} {n}"
    return unmeasured(Status.TOO_FEW_ROWS, n, d, message)


def in_backward() -> bool:
    """Whether the calling thread is in a backward pass."""
    return bool(torch._C._current_graph_task_id() != -1)


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


# Values compared between ranks, and how far they may be apart: kernels that add in any order differ by rounding.
_SAMPLES, _TOLERANCE = 64, 0.02


class Spread:
    """What one pass through a model tells of its parts. Every rank must make the same calls.

    Parameters
    ----------
    modules : iterable of nn.Module
        Parts of the plain module that may be hooked.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules = modules
        self._handles: list[RemovableHandle] = []
        self._groups: dict[str, Any] = {}
        self._outputs: dict[int, Tensor] = {}

    def __enter__(self) -> Spread:
        for module in self._modules:
            if any(hasattr(p, "full_tensor") for p in module.parameters(recurse=False)):
                # First of its hooks: the layer's style has not cut the output yet. FSDP has gathered its own shards
                # by then, so that only those of tensor parallelism are left.
                self._handles.append(module.register_forward_hook(self._note, prepend=True))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def whole(self, name: str, h: Tensor, module: nn.Module | None = None) -> Tensor:
        """Give all of an activation.

        Parameters
        ----------
        name : str
            Of the layer, for the error.
        h : Tensor
            What this rank holds.
        module : nn.Module, optional
            The layer whose output it is.

        Raises
        ------
        ValueError
            On every rank, if they hold different parts that nobody can put together.
        """
        if hasattr(h, "full_tensor"):
            return h.full_tensor()  # type: ignore[no-any-return]
        if hasattr(h, "trigger_wait"):  # of a collective that is under way
            h = h.trigger_wait()
        before = self._outputs.pop(id(module), None)
        if before is not None and isinstance(h, Tensor) and before.shape != h.shape:
            return before.full_tensor()  # type: ignore[attr-defined, no-any-return]
        for group in self._groups.values():
            if not _is_the_same(h, group):
                raise ValueError(
                    f"layer {name!r} holds another part of its activations on each rank (tensor parallelism), here of "
                    f"shape {tuple(h.shape)}, and nobody says how they fit together: watch a layer that gives the "
                    "whole, such as the row-parallel one behind it, let the column-parallel layer before it keep "
                    "DTensors (use_local_output=False), or pass a function as layers that gathers them"
                )
        return h

    def _note(self, module: nn.Module, args: Any, output: Any) -> None:
        for p in module.parameters(recurse=False):
            mesh = getattr(p, "device_mesh", None)
            for group in [] if mesh is None else mesh.get_all_groups():
                if dist.get_world_size(group) > 1:
                    self._groups.setdefault(group.group_name, group)
        if hasattr(output, "full_tensor"):
            self._outputs[id(module)] = output


def _is_the_same(h: Tensor, group: Any) -> bool:
    """Whether all ranks of `group` hold the same values, as far as some of them tell."""
    flat = h.detach().reshape(-1)
    where = torch.linspace(0, max(len(flat) - 1, 0), _SAMPLES, dtype=torch.float64, device="cpu")
    where = where.long().to(h.device)
    seen = torch.zeros(_SAMPLES + 1, dtype=torch.float64, device=h.device)
    seen[0] = len(flat)
    if len(flat):
        seen[1:] = flat[where].to(torch.float64).nan_to_num()
    all_seen = [torch.empty_like(seen) for _ in range(dist.get_world_size(group))]
    dist.all_gather(all_seen, seen, group=group)
    values = torch.stack(all_seen)
    counts, samples = values[:, 0], values[:, 1:]
    apart = (samples - samples[0]).abs().max()
    return bool((counts == counts[0]).all() & (apart <= _TOLERANCE * samples.square().mean().sqrt()))
