"""The model, the probe and the layers that a monitor was given, checked once; and the pass through them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor, nn

from fastent.probing import (
    Inputs,
    LayerFunction,
    Layers,
    Probe,
    find_layers,
    is_sharded,
    plain_module,
    reduce_activations,
)


class Watched:
    """A model with a fixed probe and the layers to watch.

    Parameters
    ----------
    model, probe, layers
        As `fastent.SpectralEntropyMonitor` takes them.
    rows_from_tokens : bool
        Whether each token is a row, so that one sample is enough.

    Raises
    ------
    TypeError, ValueError
        For an unusable model or probe, or a layer that the model does not have.

    Examples
    --------
    The input of a layer, by a function:

    >>> import torch
    >>> import fastent
    >>> def head_input(model, probe):
    ...     taken = []
    ...     handle = model[2].register_forward_pre_hook(lambda module, args: taken.append(args[0]))
    ...     try:
    ...         model(probe)
    ...     finally:
    ...         handle.remove()
    ...     return taken[0]
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    >>> fastent.SpectralEntropyMonitor(model, torch.randn(64, 4), head_input).step(0)[0].layer
    'head_input'
    """

    def __init__(
        self, model: nn.Module, probe: Inputs, layers: Layers, *, rows_from_tokens: bool = False
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module; got {type(model).__name__}")
        if any(nn.parameter.is_lazy(p) for p in model.parameters()):
            raise ValueError("the model has lazy parameters: run one batch through it first")
        if isinstance(layers, nn.Module):
            raise TypeError(f"layers takes names of model.named_modules(); got a {type(layers).__name__}")
        self._model = model
        self.probe = Probe(probe, rows_from_tokens=rows_from_tokens)
        self._layers: dict[str, str] | LayerFunction = (
            layers if callable(layers) else find_layers(plain_module(model), layers)
        )

    @classmethod
    def of(
        cls,
        model: nn.Module | None,
        probe: Inputs | None,
        layers: Layers | None,
        *,
        rows_from_tokens: bool,
    ) -> Watched | None:
        """Watch what was given, None if nothing was; in part is an error."""
        if model is not None and probe is not None and layers is not None:
            return cls(model, probe, layers, rows_from_tokens=rows_from_tokens)
        given = {"model": model, "probe": probe, "layers": layers}
        missing = [name for name, value in given.items() if value is None]
        if len(missing) < len(given):
            raise ValueError(f"model, probe and layers go together; missing: {', '.join(missing)}")
        return None

    @property
    def names(self) -> Iterable[str]:
        """Names of the layers, as far as they are known before a pass."""
        return () if callable(self._layers) else self._layers.keys()

    @property
    def needs_every_rank(self) -> bool:
        """Whether a pass needs every rank: FSDP2 or tensor parallelism; rank 0 alone records then."""
        return is_sharded(plain_module(self._model))

    def run(self, reduce: Callable[[str, Tensor], object]) -> None:
        """Pass the probe through the model; `reduce` gets each layer's name and activation as it appears."""
        reduce_activations(plain_module(self._model), self.probe, self._layers, reduce)
