"""The probe, and the forward pass that takes activations from it.

A probe is a fixed input: its content is hashed when it is taken on, and a probe that changed is an error. The
pass runs the plain module (what a compiled or DDP wrapper holds) inside `fastent.guard.undisturbed`, with
hooks that exist for its duration only. A layer's activation is its module's output, reduced at the moment it
appears: an in-place operation later in the model cannot change it, and it is not kept. What a function returns in place
of names is reduced when it returns: whatever the model did to it until then is in it.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import re
import sys
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fastent.forks import check_pool
from fastent.guard import apart, fsdp1_modules, fsdp_modules, undisturbed
from fastent.spread import Spread

R = TypeVar("R")
Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]
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
    rows_from_tokens : bool
        Whether each token is a row, so that one sample is enough.

    Raises
    ------
    TypeError
        For a leaf whose content cannot be hashed.
    ValueError
        If there is no tensor, or fewer samples than a covariance needs.
    """

    def __init__(self, inputs: Inputs, *, rows_from_tokens: bool = False) -> None:
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
            raise TypeError(
                "probe must be a tensor, a tuple of arguments or a dict of keyword arguments; "
                f"got {type(inputs).__name__}"
            )
        tensors = self._tensors()
        shapes = [tuple(t.shape) for t in tensors if t.ndim]
        if not shapes:
            raise ValueError("the probe holds no tensor with a sample axis")
        self.shape = shapes[0]
        """Shape of the first tensor with axes, whose first counts samples."""
        if self.shape[0] < (1 if rows_from_tokens else 2):
            raise ValueError(f"a covariance needs at least 2 samples; the probe has N = {self.shape[0]}")
        self._marks = [_mark(t) for t in tensors]
        self.digest = self._hash()

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

    def entries(self, model: nn.Module) -> dict[str, Any]:
        """Name what the probe holds: by parameters of the model's forward pass, and keys of mappings at any depth."""
        try:
            bound = inspect.signature(model.forward).bind_partial(*self.args, **self.kwargs)
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


def find_layers(model: nn.Module, layers: str | Iterable[str]) -> dict[str, FoundLayer]:
    """Resolve names and patterns to submodules.

    Parameters
    ----------
    model : nn.Module
        A plain module.
    layers : str or iterable of str
        Names as in ``model.named_modules()``, or patterns over them: ``*``, ``?`` and ``[ab]`` stay within one level,
        ``**`` crosses dots ("**.mlp" is "mlp" at any depth). A container that cannot run (ModuleList, ModuleDict) means
        its children; a pattern passes over such containers unless it matches nothing else. Wrappers of submodules
        (compiled, FSDP1, checkpointed) are not part of a name. ":input" behind a name or pattern asks for what a module
        is called with.

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
        raise TypeError(f"layers takes a name, several of them, or a function; got {type(layers).__name__}")
    paths: dict[str, str] = {}
    modules: dict[str, nn.Module] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(_name(path), path)
        modules.setdefault(_name(path), module)
    once = {
        _name(path): path for path, _ in model.named_modules() if _name(path)
    }  # a shared module by its first name
    found: dict[str, FoundLayer] = {}
    for wanted in [layers] if isinstance(layers, str) else layers:
        if not isinstance(wanted, str):
            raise TypeError(f"layers takes names; got {type(wanted).__name__} among them")
        asked, wanted = wanted, wanted.removesuffix(_INPUT)
        end = asked[len(wanted) :]
        named = wanted in paths
        matches = [wanted] if named else [name for name in once if _matches(name, wanted)]
        if not matches:
            close = difflib.get_close_matches(wanted, list(paths), n=3)
            names = ", ".join(map(repr, close or list(once)[:10])) or "no submodules"
            deeper = [name for name in once if _matches(name, wanted.replace("**", "*").replace("*", "**"))]
            if deeper:
                names += f"; * stays within one level, and ** would match {', '.join(map(repr, deeper[:3]))}"
            raise ValueError(
                f"no layer matches {asked!r}; {'close to it' if close else 'the model has'}: {names}"
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


def reduce_activations(
    model: nn.Module,
    probe: Probe,
    layers: Mapping[str, FoundLayer] | LayerFunction,
    reduce: Callable[[str, Tensor], R],
    may_be_idle: Container[str] = (),
) -> dict[str, R]:
    """Run the probe through the model and reduce the activations of the layers.

    Parameters
    ----------
    model : nn.Module
        A plain module; when it is sharded by FSDP or tensor parallelism, every rank must call this.
    probe : Probe
        The input.
    layers : mapping or callable
        What `find_layers` returned, or a function of (model, probe as it was given) that returns activations,
        or a mapping of names to them.
    reduce : callable
        Gets the layer's name and its activation, as soon as there is one.
    may_be_idle : container of str
        Names of layers that may be left out because they did not run, as those that are not `named` may.

    Returns
    -------
    dict
        What `reduce` returned, by layer. If one layer fails, it raises.

    Raises
    ------
    RuntimeError
        If a layer ran more than once, or not at all and may not be idle.
    TypeError
        If a layer's output holds no tensor.
    ValueError
        If a layer of a model under tensor parallelism holds only a part (`fastent.spread`).
    """
    check_pool()
    with undisturbed(model) as interrupts, Spread(model) as spread:
        reduce = apart(reduce, interrupts)
        if callable(layers):
            with interrupts.second_at_once():
                given = layers(model, probe.inputs)
            named = given.items() if isinstance(given, Mapping) else [(name_of(layers), given)]
            reduced: dict[str, R] = {}
            for name, h in named:
                if str(name) in reduced:
                    raise ValueError(f"layers returned two activations named {str(name)!r}")
                reduced[str(name)] = reduce(str(name), spread.whole(str(name), h))
            return reduced
        results: dict[str, R] = {}
        fired = dict.fromkeys(layers, 0)

        def hook_for(name: str) -> Callable[[nn.Module, Any, Any], None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                fired[name] += 1
                if fired[name] == 1:
                    results[name] = reduce(name, spread.whole(name, _first_tensor(name, output), module))

            return hook

        def input_hook_for(name: str) -> Callable[[nn.Module, Any, Any], None]:
            hook = hook_for(name)
            return lambda module, args, kwargs: hook(module, args, (*args, *kwargs.values()))

        handles = []
        try:
            for name, layer in layers.items():
                module = model.get_submodule(layer.path)
                handles.append(
                    module.register_forward_pre_hook(input_hook_for(name), with_kwargs=True)
                    if layer.of_input
                    else module.register_forward_hook(hook_for(name))
                )
            with interrupts.second_at_once():
                model(*probe.args, **probe.kwargs)
        finally:
            for handle in handles:
                handle.remove()
    for name, count in fired.items():
        if count == 0 and (name in may_be_idle or not layers[name].named):
            continue
        if count != 1:
            children = [
                f"{name}.{child}" for child, _ in model.get_submodule(layers[name].path).named_children()
            ]
            reason = (
                "its parent does not call it on this probe, or uses its weights without calling it"
                + (
                    f" (its children may run without it: {', '.join(map(repr, children[:3]))})"
                    if children
                    else ""
                )
                if count == 0
                else "it is shared or runs in a loop, so which of its outputs is meant is open"
            )
            raise RuntimeError(
                f"layer {name!r} fired {count} times in one forward pass: {reason}; "
                "pass a callable as layers to choose the activations yourself"
            )
    return {name: results[name] for name in layers if name in results}


def is_sharded(model: nn.Module) -> bool:
    """Whether a forward pass of `model` needs every rank: FSDP or tensor parallelism."""
    modules = list(model.modules())
    return any(hasattr(p, "full_tensor") for p in model.parameters()) or bool(
        fsdp_modules(modules) or fsdp1_modules(modules)
    )


def tokens_first(model: nn.Module, path: str) -> str | None:
    """Type of the nearest torch module around `path` that says ``batch_first``, where it says False; else None."""
    parts = path.split(".")
    for count in range(len(parts), -1, -1):
        module = model.get_submodule(".".join(parts[:count]))
        batch_first = _batch_first(module)
        if batch_first is not None:
            return None if batch_first else type(module).__name__
    return None


def _batch_first(module: nn.Module) -> bool | None:
    own = getattr(module, "batch_first", None)
    if isinstance(own, bool):
        return own
    if isinstance(module, nn.TransformerEncoder | nn.TransformerDecoder):
        module = module.layers[0]
    if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        return bool(module.self_attn.batch_first)
    return None


def name_of(layers: LayerFunction) -> str:
    """Layer name of activations that a function returned without one."""
    return str(getattr(layers, "__name__", type(layers).__name__))


# Submodules that torch.compile, FSDP1, activation checkpointing, and Lightning's Fabric put in a path.
_WRAPPED = {
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "_forward_module",
    "_original_module",
}


def _name(path: str) -> str:
    return ".".join(part for part in path.split(".") if part not in _WRAPPED)


def _matches(name: str, pattern: str) -> bool:
    return re.fullmatch(_regex(pattern), name) is not None


def _regex(pattern: str) -> str:
    parts = re.findall(r"(?:^|(?<=\.))\*\*\.|\*\*|\*|\?|\[!?\]?[^\]]*\]|.", pattern, re.DOTALL)
    signs = {"**.": r"(?:.*\.)?", "**": ".*", "*": r"[^.]*", "?": r"[^.]"}
    return "".join(signs.get(part) or _class_or_text(part) for part in parts)


def _class_or_text(part: str) -> str:
    if len(part) < 3:  # a lone bracket too
        return re.escape(part)
    inside = part[1:-1].replace("\\", r"\\").replace("[", r"\[")
    return f"[^{inside[1:]}]" if inside.startswith("!") else f"[{inside}]"


def _is_container(module: nn.Module) -> bool:
    """Whether a module has no forward pass of its own."""
    return "forward" not in vars(module) and type(module).forward is nn.Module.forward


def _within(containers: Iterable[str], modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """Names of the modules in containers that can run, through containers in containers."""
    for name in containers:
        for child, module in modules[name].named_children():
            path = _name(f"{name}.{child}" if name else child)
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


def _first_tensor(name: str, output: Any) -> Tensor:
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


def _mark(t: Tensor) -> tuple[torch.device, int, int | None]:
    return t.device, t.data_ptr(), None if t.is_inference() else t._version


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
