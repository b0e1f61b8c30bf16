"""What the axes of activations count in a monitor: samples, tokens or positions, features; and what is padding.

The probe says how many samples there are, the model which of its modules put tokens first, and the user what cannot be
seen. An activation that fits none of it is an error with the shapes and the remedy, never a number. What shapes cannot
show: that axes are exchanged where samples and tokens are equally many (other than in a torch module with
``batch_first=False``), and whether rows (n * tokens, d) come sample by sample, as is assumed, or token by token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypedDict, get_args

import torch
from torch import Tensor

from fastent.activations import Positions, RealTokens, Tokens
from fastent.user_warning import warn_user
from fastent.watching import Watched

SamplesAxis = Literal[0, 1]

_USUAL_MASK = "attention_mask"
_TORCH_MASK = "key_padding_mask"  # the end of its names in torch.nn, where True is padding
_BY_HAND = "give a function as layers that returns the rows you mean"


class Choice(TypedDict, total=False):
    """Arguments of `fastent.spectral_entropy` that choose rows."""

    tokens: Tokens | None
    positions: Positions | None
    channel_axis: int | None
    mask: RealTokens | None


@dataclass(frozen=True)
class Reading:
    """Activations with samples first, how to take rows of them, and the name of the mask that is used, if any."""

    h: Tensor
    choice: Choice
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
        self._samples_axis, self._mask, self._watched = samples_axis, mask, watched
        self._real: dict[torch.device, RealTokens] = {}
        self._used: str | None = None
        self._warned: set[str] = set()
        self._tokens_first: dict[str, str | None] = {}
        self._two_masks = False  # which of them a layer has is open
        self._samples_at: dict[int, str] = {}  # by axis of the probe: a layer whose samples are along it
        if mask is not None and (watched is None or tokens is None):
            missing = "tokens, which says what to make of the real ones" if watched else "a probe that has it"
            hint = "" if watched else "; for observe give spectral_entropy(h, tokens=..., mask=...)"
            raise ValueError(f"mask={mask!r} names an entry of the probe, and needs {missing}{hint}")
        if watched is not None and tokens is not None:
            real = self._named_mask(mask) if mask is not None else self._usual_mask()
            if real is not None:
                self._real[real.mask.device] = real

    def at_hand(self, h: Tensor) -> Reading:
        """Activations that did not come from the probe: taken at their word."""
        if _is_odd(h):
            return Reading(h, {})
        if self._samples_axis == 1 and self._by_tokens(h):
            h = h.transpose(0, 1)
        return Reading(h, self._choice(h))

    def on_probe(self, layer: str, h: Tensor) -> Reading:
        """Activations of a layer on the probe.

        Raises
        ------
        ValueError
            If an axis does not count what it should, or which tokens are padding is open.
        """
        watched = self._watched
        assert watched is not None
        if _is_odd(h):
            return Reading(h, {})
        if _is_matrix(h) and not watched.by_function and len(h) not in self._samples():
            h = self._rows_of_tokens(h.flatten(1))
            if _is_matrix(h):
                return Reading(h, {})
        if not _is_matrix(h) and h.ndim >= 3:
            h = self._samples_first(layer, h)
        choice = self._choice(h)
        if choice.get("tokens") is None:
            return Reading(h, choice)
        real = self._real_tokens(layer, h)
        return Reading(h, {**choice, "mask": real}, None if real is None else self._used)

    def _choice(self, h: Tensor) -> Choice:
        if _is_matrix(h):
            return {}
        if self._by_tokens(h):
            return {"tokens": self._tokens}
        return {"positions": self._positions, "channel_axis": self._channel_axis}

    def _by_tokens(self, h: Tensor) -> bool:
        return h.ndim == 3 and (self._tokens is not None or self._positions is None)

    def _samples(self) -> tuple[int, ...]:
        """Numbers of samples that the probe may have: along its first axis, or, where tokens come first, its second."""
        assert self._watched is not None
        return self._watched.probe.shape[: 2 if self._samples_axis == 1 else 1]

    def _fits(self, layer: str, size: int) -> bool:
        """Whether an axis of `layer` counts samples; no other layer may find them along the probe's other axis."""
        assert self._watched is not None
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
        assert self._watched is not None
        rows, d = h.shape
        real = next(iter(self._real.values()), None)
        if real is not None and rows == real.mask.numel():
            n, tokens = real.mask.shape
            return h.reshape((tokens, n, d) if self._samples_axis == 1 else (n, tokens, d))
        samples = self._watched.probe.shape[0]
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
        assert self._watched is not None
        shape = tuple(h.shape)
        if self._samples_axis == 1 and self._by_tokens(h):
            if not self._watched.by_function and not self._fits(layer, shape[1]):
                raise ValueError(
                    f"with samples_axis=1 the second axis of its activations counts samples; it gave {shape} on "
                    f"{self._probe()}: {_BY_HAND}"
                )
            return h.transpose(0, 1)
        if self._samples_axis is None and self._by_tokens(h):
            if layer not in self._tokens_first:
                self._tokens_first[layer] = self._watched.tokens_first(layer)
            owner = self._tokens_first[layer]
            if owner is not None:
                raise ValueError(
                    f"it gave {shape}, and its {owner} has batch_first=False: give samples_axis=1 if that is (tokens, "
                    "samples, d), samples_axis=0 if it is (samples, tokens, d)"
                )
        samples = self._watched.probe.shape[0]
        if shape[0] == samples or (self._samples_axis == 1 and self._fits(layer, shape[0])):
            return h
        seen = f"the first axis of its activations should count samples; it gave {shape} on {self._probe()}"
        if shape[1] == samples and self._by_tokens(h) and self._samples_axis is None:
            raise ValueError(f"{seen}: give samples_axis=1 if that is (tokens, samples, d)")
        if self._watched.by_function:
            return h
        raise ValueError(f"{seen}: {_BY_HAND}")

    def _real_tokens(self, layer: str, h: Tensor) -> RealTokens | None:
        if not self._real:
            return None
        real = next(iter(self._real.values()))
        if real.mask.shape != h.shape[:2]:
            seen = f"{self._used!r} of the probe is for {_count(real.mask.shape)}, and there are {_count(h.shape)}"
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
        if h.device not in self._real:
            self._real[h.device] = real.to(h.device)
        return self._real[h.device]

    def _named_mask(self, name: str) -> RealTokens:
        assert self._watched is not None
        plain = name.removeprefix("~")
        entries = self._watched.probe.entries(self._watched.model)
        tensors = [key for key, value in entries.items() if isinstance(value, Tensor)]
        if plain not in tensors:
            raise ValueError(
                f"mask={name!r}: the probe has no tensor {plain!r}; it has: {', '.join(tensors) or 'none with a name'}"
            )
        if plain.endswith(_TORCH_MASK) and plain == name:
            raise ValueError(f'in {name!r} of torch True is padding: give mask="~{name}"')
        entry = entries[plain]
        self._used = name
        try:
            return RealTokens(entry if name == plain else entry == 0)
        except (TypeError, ValueError) as error:
            error.args = (f"mask={name!r} of the probe: {error}",)
            raise

    def _usual_mask(self) -> RealTokens | None:
        assert self._watched is not None
        entries = self._watched.probe.entries(self._watched.model)
        entry = entries.get(_USUAL_MASK)
        if isinstance(entry, Tensor) and entry.ndim and entry.shape[0] in self._samples():
            self._used, self._two_masks = _USUAL_MASK, self._watched.has_decoder
            try:
                return RealTokens(entry)
            except ValueError as error:
                error.args = (
                    f'{_USUAL_MASK!r} of the probe: {error}. In a monitor: mask="~{_USUAL_MASK}" where 0 or False is a '
                    f"real token; a mask that is not (n, tokens) cannot be read, so {_BY_HAND}",
                )
                raise
        torch_masks = [name for name in entries if name.endswith(_TORCH_MASK)]
        if torch_masks:
            warn_user(
                f"the probe's {torch_masks[0]!r} is not used, so padding counts as tokens: give "
                f'mask="~{torch_masks[0]}" to leave it out',
                UserWarning,
            )
        return None

    def _probe(self) -> str:
        assert self._watched is not None
        return f"a probe of {self._watched.probe.shape[0]} samples"


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
