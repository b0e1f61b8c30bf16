"""The model, the probe and the layers that a monitor was given, checked once; and the pass through them."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping

import torch
from torch import Tensor, nn

from fastent.probing import (
    FoundLayer,
    Inputs,
    LayerFunction,
    Layers,
    Probe,
    find_layers,
    is_sharded,
    plain_module,
    reduce_activations,
    tokens_first,
)
from fastent.user_warning import warn_user


class Watched:
    """A model with a fixed probe and the layers to watch.

    A named layer must run in the first pass, and may be idle later. What a pattern matched, or a container holds, is
    watched from the first pass on in which it runs.

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
        self, model: nn.Module, probe: Inputs, layers: Layers, *, rows_from_tokens: bool = False
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module; got {type(model).__name__}")
        if isinstance(plain_module(model), torch.jit.ScriptModule):
            raise TypeError(
                "model is a TorchScript module, which calls no hooks and whose buffers cannot be put back: pass the "
                "module that was scripted or traced"
            )
        if any(nn.parameter.is_lazy(p) for p in model.parameters()):
            raise ValueError("the model has lazy parameters: run one batch through it first")
        if isinstance(layers, nn.Module):
            raise TypeError(f"layers takes names of model.named_modules(); got a {type(layers).__name__}")
        self._model = model
        self.probe = Probe(probe, rows_from_tokens=rows_from_tokens)
        self._layers: dict[str, FoundLayer] | LayerFunction = (
            layers if callable(layers) else find_layers(plain_module(model), layers)
        )
        self.ran: dict[str, int] = {}
        """Features of each layer that has run, in the order of the first time."""
        self._warned_of_idle = False

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

    def restore(self, ran: Mapping[str, int]) -> None:
        """Go back to the layers that had run, of those that are watched; a function may return any."""
        found = self._layers
        self.ran = {layer: d for layer, d in ran.items() if callable(found) or layer in found}

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
        return None if callable(self._layers) else tokens_first(self.model, self._layers[layer].path)

    @property
    def needs_every_rank(self) -> bool:
        """Whether a pass needs every rank: FSDP2 or tensor parallelism; rank 0 alone records then."""
        return is_sharded(plain_module(self._model))

    def run(self, reduce: Callable[[str, Tensor], int]) -> dict[str, int]:
        """Pass the probe through the model.

        Parameters
        ----------
        reduce : callable
            Gets each layer's name and activation as it appears and returns its width.

        Returns
        -------
        dict
            Widths of layers that have run before and did not run now.

        Warns
        -----
        UserWarning
            Once, of the layers that were not named and did not run.
        """
        model = plain_module(self._model)
        widths = reduce_activations(model, self.probe, self._layers, reduce, self.ran)
        for layer, d in widths.items():
            self.ran.setdefault(layer, d)
        idle = {layer: d for layer, d in self.ran.items() if layer not in widths}
        self._warn_of_idle([layer for layer in self.order if layer not in widths and layer not in idle])
        return idle

    def _warn_of_idle(self, layers: list[str]) -> None:
        if layers and not self._warned_of_idle:
            self._warned_of_idle = True
            more = f" and {len(layers) - 5} more" if len(layers) > 5 else ""
            warn_user(
                f"{', '.join(map(repr, layers[:5]))}{more} did not run in the probe's pass: left out until they do",
                UserWarning,
            )
