"""The training batch in place of a probe: activations of the forward passes that training makes anyway.

Hooks on the watched layers take what they give, reduce it at the moment it appears and keep nothing of it; no pass is
made beside those of training. They are registered only while the next step that the monitor will be told of is
expected to be due, and for one more step, in which they take nothing and notice whether the step that was recorded
goes on (`BatchEvaluator.arm`); other steps run the model as it is without a monitor. A layer that was replaced in the
model is found in its place when the pass begins.

What counts: a pass of the model that begins in training mode with gradients recorded, and everything in it, frozen
layers and what runs without gradients included; and, where a training script calls the layers past the model's own
forward pass, each call while the model is in training mode and gradients are recorded. Passes in eval mode or without
gradients, and those of a monitor's probe, do not. A layer that activation checkpointing runs again in the backward pass
counts once. A layer that is called several times, in one pass or in several micro-batches, gives the rows of all calls.

Rows fewer than the features are copied, which takes less memory than their moments, and go the way of a probe's when
the step is over; so does what has more rows and comes in one call, at once: the record has the bits of
`fastent.spectral_entropy`. Further calls are merged exactly (`fastent.moments`). Whether they will come is known from
the evaluations before: in the first one both ways are taken; where several calls come for the first time later on, the
evaluation is put off to the next step; and where one comes after that, its record is right to rounding.

A step that gave nothing to evaluate makes the next one due: no forward pass that counts came before it, the hooks were
not registered since the steps went on otherwise than before, or a pass failed on its way. Rows of a pass that was
completed count, whatever became of it later.

A step is over when `step` is called with it: its rows have gone to the evaluation by then, and a record is not opened
again. Passes of training between two calls with one step are warned of, since the second call comes too late for them.

A compiled graph holds what was there when it was compiled, so layers within one cannot be watched this way: that is
refused where the model says that it is compiled. Where it does not (a wrapper that the monitor was not given), the
graph leaves the hooks out without being broken, and the missing pass is warned of.

A copy of the model, by `copy.deepcopy` or pickle, has idle hooks; a copy of a monitor watches its own copy.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastent.activations import Resolution
from fastent.linalg import check_pool
from fastent.moments import Moments
from fastent.monitor.deferred import DeferredEntropy, Evaluation
from fastent.monitor.isolation import apart, in_a_pass
from fastent.monitor.probe import (
    Axes,
    Evaluator,
    FoundLayer,
    Layers,
    OnError,
    Probe,
    Reading,
    Spread,
    Watched,
    check_width,
    first_tensor,
    in_backward,
    is_sharded,
    plain_module,
    put_merged,
    too_few,
)
from fastent.monitor.ranks import Gathered, Ranks
from fastent.process import interrupts_held, warn_user
from fastent.records import Recording

_FIXED = "watch a fixed probe: pass its input as probe"


class Batch(Probe):
    """The input of the forward pass under way; nothing of it is kept afterwards."""

    name = "batch"
    digest = "batch"

    def __init__(self) -> None:
        self._known: tuple[Callable[..., Any], inspect.Signature] | None = None
        self.end()

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take what the model is called with."""
        self.args, self.kwargs = args, kwargs
        self.shape = next(
            (tuple(leaf.shape) for leaf in _tensors([*args, *kwargs.values()]) if leaf.ndim), ()
        )

    def end(self) -> None:
        """Forget it."""
        self.args, self.kwargs, self.shape = (), {}, ()

    def _signature(self, forward: Callable[..., Any]) -> inspect.Signature:
        if self._known is None or self._known[0] != forward:
            self._known = forward, inspect.signature(forward)
        return self._known[1]

    def check(self, *, content: bool = False) -> None:
        """Nothing to compare: each pass has another one."""


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):
            yield from _tensors(value.values())
        elif isinstance(value, tuple | list):
            yield from _tensors(value)


class WatchedBatch(Watched):
    """A model in training and the layers to watch.

    Parameters
    ----------
    model, layers
        As `fastent.SpectralEntropyMonitor` takes them.

    Raises
    ------
    TypeError, ValueError
        For an unusable model, a layer that it does not have, that is in a compiled graph, or a function as layers.
    """

    needs_every_rank = False  # each rank has its own batch

    def __init__(self, model: nn.Module | None, layers: Layers | None) -> None:
        if model is None or layers is None:
            raise ValueError('probe="batch" needs a model and layers')
        if callable(layers) and not isinstance(layers, nn.Module):
            raise TypeError(
                'probe="batch" takes names of layers, since it makes no pass of its own that a function could make: '
                f"{_FIXED}, or call observe(step, h, layer=...) where h is at hand"
            )
        self.batch = Batch()
        super().__init__(model, self.batch, layers)
        _refuse_replicas(model)
        for name, layer in self.found.items():
            _refuse_compiled(model, name, layer.path)

    @property
    def found(self) -> dict[str, FoundLayer]:
        """The layers by name."""
        assert not callable(self._layers)
        return self._layers

    def note(self, widths: Mapping[str, int]) -> dict[str, int]:
        """Take note of the layers that ran, with their widths; return those of layers that ran before and not now."""
        return self._note(widths, {name: int(name in widths) for name in self.order})

    def _check_fired(self, name: str, count: int) -> None:
        if count == 0 and self.found[name].named and name not in self.ran:
            raise RuntimeError(
                f"layer {name!r} did not run in the forward pass of training: its parent does not call it, or uses its "
                f"weights without calling it, or is part of a compiled graph: name a layer that runs, or {_FIXED}"
            )


def _refuse_replicas(model: nn.Module) -> None:
    if isinstance(model, nn.DataParallel):
        raise ValueError(
            "nn.DataParallel runs copies of the model in threads, each on a part of the batch: take "
            f"DistributedDataParallel, or {_FIXED}"
        )


def _refuse_compiled(model: nn.Module, name: str, path: str) -> None:
    """Refuse a layer whose hooks would be in a compiled graph. Those of what `torch.compile` wraps are outside."""
    if id(plain_module(model).get_submodule(path)) in _in_graphs(model):
        raise ValueError(
            f'layer {name!r} is in a compiled graph, which runs no hooks: with probe="batch" watch a layer outside, or '
            f"what torch.compile(module) returned as a whole; or {_FIXED}, whose pass runs the plain module"
        )


def _in_graphs(model: nn.Module) -> set[int]:
    """Ids of the modules whose hooks a compiled graph would hold."""
    found: set[int] = set()
    for module in model.modules():
        # Compiled in place, with its own hooks; or its forward pass alone, as of what torch.compile returns.
        with_hooks = module._compiled_call_impl is not None
        if with_hooks or hasattr(module.forward, "_torchdynamo_orig_callable"):
            found |= {id(part) for part in module.modules() if with_hooks or part is not module}
    return found


class _Hook:
    """What is registered on a module; a copy, in a copy of the module, does nothing.

    Parameters
    ----------
    module : nn.Module
        Where it is registered.
    call : callable
        A bound method; it is not kept alive.
    name : str
        What it is called with, before what torch gives a hook.
    """

    def __init__(
        self, module: nn.Module | None = None, call: Callable[..., None] | None = None, name: str = ""
    ) -> None:
        self._module = None if module is None else weakref.ref(module)
        self._call = None if call is None else weakref.WeakMethod(call)
        self._name = name

    def __call__(self, module: nn.Module, *given: Any) -> None:
        """Hand on what torch gives a hook. A graph that is being compiled leaves it out."""
        if torch.compiler.is_compiling() or self._module is None or self._module() is not module:
            return
        call = self._call() if self._call is not None else None
        if call is not None:
            call(self._name, module, *given)

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()


@dataclass
class _Layer:
    """What a layer gave since the last step."""

    d: int
    mask: str | None
    calls: int = 0
    held: list[tuple[Tensor, Resolution]] = field(default_factory=list)  # fewer rows than features
    moments: Moments | None = None

    @property
    def rows(self) -> int:
        return sum(len(x) for x, _ in self.held)

    def merge(self, x: Tensor, resolution: Resolution) -> None:
        """Add rows, and those held, to the moments."""
        self.moments = self.moments or Moments()
        for rows in (*self.held, (x, resolution)):
            if len(rows[0]):
                self.moments.add_rows(*rows)
        self.held = []

    def put(self, layer: str, evaluation: Evaluation) -> None:
        """Ask for the entropy of what is held, or of the moments."""
        if self.moments is not None:
            evaluation.drop(layer)
            put_merged(evaluation, layer, self.moments, self.d, self.mask)
        elif self.rows < 2:
            evaluation.put(layer, too_few(self.rows, self.d), mask_name=self.mask)
        else:
            coarsest = Resolution(*map(max, zip(*(resolution for _, resolution in self.held), strict=True)))
            x = torch.cat([x for x, _ in self.held]) if len(self.held) > 1 else self.held[0][0]
            evaluation.add_rows(layer, x, coarsest, mask_name=self.mask)


@dataclass
class _Gathered:
    """What the forward passes since the last step gave."""

    step: int  # as far as is known: for a warning
    evaluation: Evaluation | None = None  # of what was asked for at once
    dropped: bool = False
    recorded: bool = False
    """Whether a step was evaluated already, and nothing is to be taken until the next one."""
    layers: dict[str, _Layer] = field(default_factory=dict)
    in_backward: dict[str, bool] = field(default_factory=dict)
    """Whether a layer's first call was in a backward pass."""
    passes: list[bool] = field(default_factory=list)
    """Of those under way, the outermost first, whether they count; one that failed stays."""
    passed: bool = False
    """Whether there was one that counts, or a call of a layer past the model."""
    in_eval: bool = False
    without_gradients: bool = False
    error: Exception | None = None

    @property
    def spoiled(self) -> bool:
        """Whether nothing more of it is wanted."""
        return self.error is not None or self.dropped

    @property
    def why_nothing(self) -> str:
        """Reason why no layer gave anything, and the remedy."""
        if self.passes:
            return "the forward pass before it did not come to its end"
        if self.passed:
            return "no watched layer ran in the forward passes before it"
        if self.in_eval:
            return (
                "the model was in eval mode in each forward pass before it (model.training is False), and passes in "
                f"training mode count: call model.train() before training, or {_FIXED}"
            )
        if self.without_gradients:
            return (
                "each forward pass before it was made without gradients (torch.no_grad, inference_mode), and those of "
                f"training count: call step after a training step, or {_FIXED}"
            )
        return (
            "no forward pass of the model was seen before it. Call step after a training step; where another model "
            "trains, such as a copy, give that one to the monitor; and where it runs compiled, "
            f"{_FIXED}, since a compiled graph runs no hooks"
        )

    def drop(self) -> None:
        """Give back what was taken."""
        if self.evaluation is not None:
            self.evaluation.cancel()


class BatchEvaluator(Evaluator):
    """Takes activations out of training's own forward passes, and asks for their entropies when a step is over.

    Parameters
    ----------
    evaluations, recording, watched, axes, standard_error, on_error, across_ranks
        As `fastent.monitor.probe.Evaluator` takes them.
    """

    def __init__(
        self,
        evaluations: DeferredEntropy,
        recording: Recording,
        watched: WatchedBatch,
        axes: Axes,
        standard_error: bool,
        on_error: OnError,
        across_ranks: bool,
    ) -> None:
        super().__init__(evaluations, recording, watched, axes, standard_error, on_error, across_ranks)
        self._model = watched.model
        self._in_training = watched
        self._gathered = _Gathered(0)
        self._modules = {name: layer.module(watched.model, name) for name, layer in watched.found.items()}
        self._most_calls: dict[str, int] = {}  # of a layer in one step, so far
        self._warned_of_nothing = self._warned_of_more = False
        self._hooks = _Hooks()
        weakref.finalize(self, self._hooks.remove)

    def check(self) -> None:
        """Nothing can be checked without a pass."""

    def arm(self, step: int | None, *, recorded: bool = False) -> None:
        """Forget what was gathered, and register the hooks for `step`; None removes them.

        With `recorded` they take nothing, and notice whether the step before goes on; once that was warned of, they are
        not needed.
        """
        self._gathered.drop()
        self._gathered = _Gathered(step or 0, recorded=recorded)
        self._in_training.batch.end()
        if step is None or (recorded and self._warned_of_more):
            self._hooks.remove()
        elif not self._hooks.registered:
            self._register()
        else:
            self._guarded(self._follow)

    def told_again(self, step: int) -> None:
        """Warn once if training went on between two calls with one step: what it gave is in no record."""
        if self._gathered.passed and not self._warned_of_more:
            self._warned_of_more = True
            warn_user(
                f"step {step} was told of again after further passes of training, which are in no record: a step is "
                "over at the first call. Call step once for each optimizer step, after it: it takes all micro-batches "
                "since the last call together. Said once",
                UserWarning,
            )

    def run(self, step: int) -> bool:
        """Ask for the entropies of what the passes since the last step gave; False if there is nothing."""
        gathered, self._gathered = self._gathered, _Gathered(step)
        with self._failing(step, self._in_training.names):
            try:
                if self._ranks is not None:
                    return self._close_across(step, gathered, self._ranks)
                return self._close(step, gathered)
            except BaseException:
                gathered.drop()
                raise
        return True  # it failed, and that is recorded

    def forget(self) -> None:
        """Let layers come from other devices than before, and drop what was gathered."""
        super().forget()
        self._most_calls = {}

    def _register(self) -> None:
        model, hooks = self._model, self._hooks
        hooks.registered = True
        if is_sharded(model):
            in_graphs = _in_graphs(model)
            hooks.spread = Spread(module for module in model.modules() if id(module) not in in_graphs)
            hooks.spread.__enter__()
        add = hooks.handles.append
        add(model.register_forward_pre_hook(_Hook(model, self._begin), with_kwargs=True))
        self._guarded(self._follow)
        add(model.register_forward_hook(_Hook(model, self._end)))

    def _follow(self) -> None:
        """Have the hooks of the layers where these are now: a module may have been replaced since."""
        hooked = self._hooks.layers
        for name, layer in self._in_training.found.items():
            module = layer.module(self._model, name)
            if name in hooked and hooked[name][1] is module:
                continue
            if name in hooked:
                hooked.pop(name)[0].remove()
            if self._modules[name] is not module:
                _refuse_compiled(self._model, name, layer.path)
                self._modules[name] = module
            if layer.of_input:
                hook = _Hook(module, self._take_from_input, name)
                handle = module.register_forward_pre_hook(hook, with_kwargs=True)
            else:
                handle = module.register_forward_hook(_Hook(module, self._take_from, name))
            hooked[name] = handle, module

    def _begin(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if in_a_pass():
            return
        gathered, counts = self._gathered, self._is_training()
        if (
            not in_backward()
        ):  # there, checkpointing ends a pass by an exception once it has all that it needs
            gathered.passes.append(counts)
        if counts and len(gathered.passes) <= 1 and not gathered.recorded:
            self._guarded(self._follow)
            self._in_training.batch.begin(args, kwargs)
            if self._axes.needs_mask:
                self._guarded(self._axes.read_mask)

    def _end(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        passes = self._gathered.passes
        if in_a_pass():
            return
        if passes and not in_backward():
            counted = passes.pop()
            self._gathered.passed |= counted and not passes
        if not passes:
            self._in_training.batch.end()

    def _is_training(self) -> bool:
        """Whether what begins now counts; why it does not is noted."""
        training, gradients = self._model.training, torch.is_grad_enabled()
        self._gathered.in_eval |= not training
        self._gathered.without_gradients |= training and not gradients
        return training and gradients

    def _take_from_input(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._take_from(name, module, args, (*args, *kwargs.values()))

    def _take_from(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._counts(name):
            self._gathered.passed = True
            if not self._gathered.recorded:
                self._guarded(self._reduce, name, module, output)

    def _counts(self, layer: str) -> bool:
        gathered = self._gathered
        # Of a model that other ranks take part in they may wait for this one's part of a layer.
        if (gathered.spoiled and self._hooks.spread is None) or in_a_pass():
            return False
        # By the pass that it is part of: reentrant checkpointing runs layers without gradients.
        if not (gathered.passes[0] if gathered.passes else self._is_training()):
            return False
        return gathered.in_backward.setdefault(layer, in_backward()) or not in_backward()

    def _guarded(self, function: Callable[..., None], *args: Any) -> None:
        """Call it as outside of training's pass; what goes wrong is raised by `run`, not in the middle of training."""
        try:
            with interrupts_held() as interrupts, torch.no_grad():
                apart(function, interrupts)(*args)
        except Exception as error:
            self._gathered.error = self._gathered.error or error

    def _reduce(self, layer: str, module: nn.Module, output: Any) -> None:
        check_pool()
        h = first_tensor(layer, output)
        if self._hooks.spread is not None:
            h = self._hooks.spread.whole(layer, h, module)
        if self._gathered.spoiled:
            return
        kind = h.device.type
        with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext():
            self._gather(layer, h)

    def _gather(self, layer: str, h: Tensor) -> None:
        with self._reading(layer, h) as reading:
            x = reading.rows.of(reading.h)
            n, d = x.shape
            check_width(d)
            known = self._gathered.layers.get(layer)
            if known is None:
                known = _Layer(d, reading.mask)
                self._gathered.layers[layer] = known
            elif known.d != d:
                raise ValueError(f"it gave d = {known.d} and d = {d} in one step")
            known.calls += 1
            first, most = known.calls == 1, self._most_calls.get(layer)
            if not first and self._standard_error:
                raise ValueError(
                    "it gave activations several times before the step was over: they are merged as moments, and "
                    "standard_error needs the activations: leave it out"
                )
            clock = self._evaluations.clock
            if self._ranks is not None:
                with clock.part("covariance"):
                    known.merge(x, reading.rows.resolution(reading.h))
            elif self._standard_error:
                evaluation = self._open()  # known at once, so that there is room
                assert evaluation is not None
                self._add(evaluation, layer, h)
            elif known.moments is None and known.rows + n < d and (first or known.held):
                with clock.part("covariance"):
                    known.held.append((x.clone(), reading.rows.resolution(reading.h)))
            else:
                resolution = reading.rows.resolution(reading.h)
                if first and most in (None, 1):
                    evaluation = self._open()
                    if evaluation is not None:
                        evaluation.add_rows(layer, x, resolution, mask_name=reading.mask)
                if known.held or not first or most != 1:
                    with clock.part("covariance"):
                        known.merge(x, resolution)
        self._devices[layer] = h.device

    def _open(self) -> Evaluation | None:
        """Give the evaluation of the step under way; None if a full ring dropped it."""
        gathered = self._gathered
        if gathered.evaluation is None:
            gathered.evaluation = self._evaluations.open(gathered.step, needs_room=not self._standard_error)
            gathered.dropped = gathered.evaluation is None
        return gathered.evaluation

    def _close_across(self, step: int, gathered: _Gathered, ranks: Ranks) -> bool:
        """Do the same for the rows of all ranks; one that has nothing does not keep the others from it."""
        if gathered.error is not None:
            gathered.error.add_note(f"in the forward pass of training before step {step}")
        layers = {} if gathered.passes else gathered.layers
        own = {
            name: Gathered(layer.moments or Moments(), layer.d, layer.mask) for name, layer in layers.items()
        }
        total = self._add_up(step, ranks, own, gathered.error)
        if not any(rows.ran for rows in total.values()):
            self._warn_of_nothing(step, gathered)
            return False
        self._in_training.note({name: rows.d for name, rows in total.items() if rows.ran})
        self._put_together(step, total, "in the forward passes of this step")
        return True

    def _close(self, step: int, gathered: _Gathered) -> bool:
        if gathered.error is not None:
            gathered.error.add_note(f"in the forward pass of training before step {step}")
            raise gathered.error
        if gathered.dropped:  # counted and warned of
            return True
        layers = gathered.layers
        nothing = not layers and (bool(gathered.passes) or not gathered.passed)
        if nothing:
            self._warn_of_nothing(step, gathered)
        surprised = False
        for name, layer in layers.items():
            asked = gathered.evaluation is not None and name in gathered.evaluation.widths
            surprised |= layer.calls > 1 and asked and self._most_calls.get(name) == 1
            self._most_calls[name] = max(layer.calls, self._most_calls.get(name, 0))
        if nothing or gathered.passes or surprised:
            gathered.drop()
            return False
        evaluation = gathered.evaluation or self._evaluations.open(step, needs_room=False)
        assert evaluation is not None
        evaluation.rename(step)
        with evaluation:
            for name, layer in layers.items():
                if layer.calls > 1 or name not in evaluation.widths:
                    layer.put(name, evaluation)
            idle = self._in_training.note({name: layer.d for name, layer in layers.items()})
            self._finish(step, evaluation, idle, "in the forward passes of this step")
        return True

    def _warn_of_nothing(self, step: int, gathered: _Gathered) -> None:
        if not self._warned_of_nothing and self._hooks.registered:
            self._warned_of_nothing = True
            warn_user(
                f"there is nothing to record at step {step}, and the next step is due instead: {gathered.why_nothing}. "
                "Said once",
                UserWarning,
            )

    @property
    def _where(self) -> str:
        return " on the training batch"

    def _read(self, layer: str, h: Tensor) -> Reading:
        known = self._in_training.batch.shape
        return self._axes.on_probe(layer, h) if known else self._axes.past_the_model(layer, h)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_gathered": _Gathered(0), "_hooks": self._hooks.registered}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _hooks=_Hooks())
        weakref.finalize(self, self._hooks.remove)
        self.arm(0 if state["_hooks"] else None)


class _Hooks:
    """Hooks that are registered now."""

    def __init__(self) -> None:
        self.handles: list[RemovableHandle] = []
        self.layers: dict[str, tuple[RemovableHandle, nn.Module]] = {}
        """Handles of the layers' hooks, and the modules that these are on."""
        self.spread: Spread | None = None
        self.registered = False

    def remove(self) -> None:
        """Take them off."""
        while self.handles:
            self.handles.pop().remove()
        while self.layers:
            handle, _ = self.layers.popitem()[1]
            handle.remove()
        if self.spread is not None:
            self.spread.__exit__()
        self.spread, self.registered = None, False
