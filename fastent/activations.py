"""Activations: which of their numbers are rows, and how finely their dtype resolves them.

**Rows.** Whatever a layer gave becomes an (n, d) or (batch, n, d) matrix; rows are samples, or their tokens or
positions. Bad input stops here, with the rule, the value seen and the remedy. Nothing is copied unless it must be: an
exact cast of integers, a move off MPS (which has no float64), a choice of tokens. The data are not read, except for the
range of 64-bit integers, so this costs no host synchronisation; a mask is read once (`RealTokens`).

**Resolution.** A number of size v in a dtype with spacing `relative` at 1 was rounded to a multiple of at most
``relative |v|``, and never of less than `absolute`, its smallest subnormal. Rounding to multiples of r is taken to add
``r^2 / 12``, the variance of an error that is uniform. Summed over all features,

``(relative^2 E|x|^2 + absolute^2 d) / 12``, with ``E|x|^2 = |mean|^2 + tr C``,

is compared with ``tr C``. So each feature counts with its own size: one whose variance is rounding alone plays no part
while that variance is a small share of the trace, and one large offset is enough where it is not. Whether a
feature that came in constant had a spread below its spacing cannot be known: it counts as if it had.

Values may be narrower than their dtype (bfloat16 activations cast to float32): only if that could matter
are they looked at, whether each survives a round trip through the narrower dtype. Float8 in a wider dtype is not looked
for: every few halves or quarters would be taken for it.
"""

from __future__ import annotations

import math
import operator
import sys
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor, nn

from fastent.linalg import check_pool

Tokens = Literal["flatten", "first", "last", "mean", "skip_first"]
Positions = Literal["flatten", "mean"]
Array = np.ndarray[Any, Any]

_INTEGERS = (
    torch.bool,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
)
_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INT64_EXACT = 2**53


# Rounding that makes up this share of the total variance moves H by about as much.
UNRESOLVED_SHARE = 0.01


class Resolution(NamedTuple):
    """Spacing of a dtype's values: that of numbers of size 1, and the least one, around 0."""

    relative: float
    absolute: float

    @staticmethod
    def of(dtype: torch.dtype) -> Resolution:
        """Resolution of activations of `dtype`; integers are exact."""
        return RESOLUTIONS.get(dtype, EXACT)

    def share(self, offset: float, unit: float) -> float:
        """Variance by rounding over the total variance.

        Parameters
        ----------
        offset : float
            ``|mean|^2 / tr C``.
        unit : float
            ``sqrt(d / tr C)``: one over the root mean square spread of a feature.
        """
        return (self.relative**2 * (offset + 1.0) + (self.absolute * unit) ** 2) / 12.0


EXACT = Resolution(0.0, 0.0)

RESOLUTIONS = {
    dtype: Resolution(2.0**-mantissa, 2.0**smallest)
    for dtype, mantissa, smallest in (
        # By bits of the mantissa and exponent of the smallest number: torch.finfo has no subnormals, and for one float8
        # another spacing than its values.
        (torch.float64, 52, -1074),
        (torch.float32, 23, -149),
        (torch.float16, 10, -24),
        (torch.bfloat16, 7, -133),
        (torch.float8_e4m3fn, 3, -9),
        (torch.float8_e5m2, 2, -16),
        (torch.float8_e4m3fnuz, 3, -10),
        (torch.float8_e5m2fnuz, 2, -17),
        (torch.float8_e8m0fnu, 0, -127),
    )
}
"""Every floating-point dtype whose tensors hold one number in each element."""

# What wider tensors may hold, the coarsest first.
_HELD = (torch.bfloat16, torch.float16, torch.float32)
COARSEST = Resolution(RESOLUTIONS[torch.bfloat16].relative, RESOLUTIONS[torch.float16].absolute)
"""As coarse as they are in each way: what it resolves, they all do."""
# Rows that are looked at before all of them are, and in place of all where there is no time.
_FEW = 4
# Tokens of a sample that have one value from which on their errors are one error too.
_FROZEN = 0.75


def held_dtype(rows: Tensor, given: Resolution, offset: float, unit: float) -> torch.dtype | None:
    """Narrower dtype that holds every value of `rows`, if its rounding makes up too much of the variance.

    Whole numbers that the narrower dtype tells apart are not its work: they may be counts.

    Parameters
    ----------
    rows : Tensor, shape (n, d)
        Activations, or some of them.
    given : Resolution
        That of their dtype.
    offset, unit : float
        As in `Resolution.share`.
    """
    if COARSEST.share(offset, unit) <= UNRESOLVED_SHARE:
        return None
    few = _some(rows)
    for dtype in _HELD:
        narrow = RESOLUTIONS[dtype]
        if not narrow.relative > given.relative > 0.0:
            break
        if (
            narrow.share(offset, unit) > UNRESOLVED_SHARE
            and bool((few.to(dtype) == few).all())
            and bool(_holds(dtype, rows))
        ):
            return dtype
    return None


def squared_relative(rows: Tensor, given: Resolution) -> Tensor:
    """``relative^2`` of what a few `rows` hold, float64 on their device, which is not waited for."""
    few = _some(rows)
    found = torch.full((), given.relative**2, dtype=torch.float64, device=rows.device)
    for dtype in reversed(_HELD):
        narrow = RESOLUTIONS[dtype].relative
        if narrow > given.relative > 0.0:
            found = torch.where(_holds(dtype, few), narrow**2, found)
    return found


def _of_means(samples: list[Tensor], given: Resolution) -> Resolution:
    """Resolution of means over the tokens of a sample.

    Errors of k tokens are independent, and that of their mean has a variance k times smaller, unless the tokens
    have one value: then they have one error. How much of the rounding is of that kind is seen in a few samples.

    Parameters
    ----------
    samples : list of Tensor, each of shape (tokens, d)
        Some of them.
    given : Resolution
        That of the tokens.
    """
    if given == EXACT or not samples:
        return given
    for dtype in _HELD:
        narrow = RESOLUTIONS[dtype]
        if narrow.relative > given.relative and bool(_holds(dtype, torch.cat(samples))):
            given = narrow
            break
    kept = 0.0
    for sample in samples:
        values = sample.to(torch.float64)
        one = values[len(values) // 2]
        frozen = (values == one).to(torch.float64).mean(0) >= _FROZEN
        rounding = one.square()
        total = float(rounding.sum())
        common = float(rounding[frozen].sum()) / total if total > 0.0 else 0.0
        kept += (common + (1.0 - common) / len(values)) / len(samples)
    return given._replace(relative=given.relative * math.sqrt(kept))


def _some(rows: Tensor) -> Tensor:
    """Return a few rows from all over, or an only one."""
    return rows[:: -(-len(rows) // _FEW)] if rows.ndim == 2 and len(rows) > _FEW else rows


def _holds(dtype: torch.dtype, rows: Tensor) -> Tensor:
    """Whether all values survive a round trip through `dtype` and are not whole numbers that it tells apart."""
    survive = (rows.to(dtype) == rows).all()
    whole = (rows == rows.round()).all() & (rows.abs().amax() <= 2.0 / RESOLUTIONS[dtype].relative)
    return survive & ~whole


class RealTokens:
    """Which tokens of padded samples are real, checked once; what it picks is kept for the next call.

    Parameters
    ----------
    mask : Tensor or ndarray, shape (n, tokens)
        True or 1 for a real token, False or 0 for padding, which may lie before, after or between the real ones; bool,
        integers, or floating-point 0 and 1. Later changes of it are not noticed.

    Raises
    ------
    TypeError
        If it is not a dense real tensor that holds data.
    ValueError
        If it has another number of axes or other values, such as an additive mask (0 and -inf).

    Examples
    --------
    >>> import torch
    >>> import fastent
    >>> h = torch.randn(4, 3, 2)
    >>> real = RealTokens(torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]]))
    >>> fastent.spectral_entropy(h, tokens="flatten", mask=real).n
    9
    """

    def __init__(self, mask: Tensor | Array) -> None:
        check_pool()
        mask = of_array(mask, "mask")
        check_kind(mask, "mask")
        if mask.ndim != 2:
            axes = "[" + ":, " + ", ".join("0" for _ in mask.shape[1:-1]) + "]"
            broadcast = mask.ndim > 2 and set(mask.shape[1:-1]) == {1}
            use = f": use mask{axes}{' == 0' if mask.is_floating_point() else ''}" if broadcast else ""
            raise ValueError(f"mask must have shape (n, tokens); got {tuple(mask.shape)}{use}")
        mask = mask.detach()
        if mask.dtype == torch.bool:
            self.mask = mask.clone()
        else:
            self.mask = mask == 1
            other = mask[~(self.mask | (mask == 0))]
            if len(other):
                raise ValueError(
                    "mask is True or 1 for a real token and False or 0 for padding; it holds other values, such as "
                    f"{other[0].item():g}: for an additive mask (0 and -inf) use mask == 0, for numbered segments "
                    "mask > 0"
                )
            if mask.is_floating_point() and mask.numel() and not bool(self.mask.any()):
                raise ValueError(
                    "mask is 1 for a real token and 0 for padding, and holds no 1: for an additive mask (0 and -inf) "
                    "use mask == 0"
                )
        self._picked: dict[Tokens, tuple[Tensor, Tensor]] = {}
        self._full: bool | None = None

    @property
    def full(self) -> bool:
        """Whether there is no padding."""
        if self._full is None:
            self._full = bool(self.mask.all())
        return self._full

    def to(self, device: torch.device) -> RealTokens:
        """Copy on another device; itself if it is there."""
        return self if self.mask.device == device else RealTokens(self.mask.to(device))

    def rows(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Numbers of the samples and of their tokens that are rows, in the order of the samples.

        Raises
        ------
        ValueError
            If `tokens` asks for one row of each sample and a sample has no real token.
        """
        if tokens not in self._picked:
            self._picked[tokens] = self._pick(tokens)
        return self._picked[tokens]

    def _pick(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        samples = torch.arange(len(self.mask), dtype=torch.int64, device=self.mask.device)
        real = self.mask.to(torch.uint8)
        if tokens in ("first", "last", "mean"):
            empty = (~self.mask.any(1)).nonzero()
            if len(empty):
                raise ValueError(
                    f"tokens={tokens!r} takes a row of each sample, and sample {int(empty[0])} has no real token: "
                    "leave it out; if mask is 1 for padding, use mask == 0"
                )
        if tokens == "first":
            return samples, real.argmax(1)
        if tokens == "last":
            return samples, self.mask.shape[1] - 1 - real.flip(1).argmax(1)
        kept = self.mask
        if tokens == "skip_first":
            kept = kept.clone()
            kept[samples, real.argmax(1)] = False
        return kept.nonzero(as_tuple=True)  # type: ignore[return-value]


class TooFewRows(ValueError):
    """Activations of `n` rows, 0 or 1, and `d` features: no covariance, which for a batch of one is no mistake."""

    def __init__(self, message: str, n: int, d: int) -> None:
        super().__init__(message)
        self.n, self.d = n, d


class Rows(NamedTuple):
    """What to make of a tokens axis, of a map and of padding, as a caller said it; `fastent.spectral_entropy` explains.

    Of a pool (n, d, 1, 1) the axes of 1 are dropped; (n, d, 1) leaves open which axis is which, and needs `tokens` or
    `positions`. The methods take ``batch_dims`` None for 0 in a call that does not take it.
    """

    tokens: Tokens | None = None
    positions: Positions | None = None
    channel_axis: int | None = None
    mask: Tensor | Array | RealTokens | None = None

    def matrix(self, h: Tensor, batch_dims: int | None = None) -> Tensor:
        """Check activations and bring them into the shape that everything after this expects.

        Returns
        -------
        Tensor, shape (n, d) or (batch, n, d)
            float16, bfloat16, float32 or float64, detached from autograd.

        Raises
        ------
        TypeError
            If `h` or `mask` is not a dense real tensor that holds data.
        ValueError
            If the shape leaves a choice open, has fewer than two rows (`TooFewRows`) or no column, an integer is beyond
            2^53, or `mask` has another shape, other values than 0 and 1, another device, or for one row of each sample
            no real token.
        """
        x = self.of(h, batch_dims)
        n = x.shape[-2]
        if n < 2:
            padding = "" if self.mask is None else " with its mask"
            raise TooFewRows(
                f"a covariance needs at least 2 samples (rows); got N = {n} from shape {tuple(h.shape)}{padding}",
                n,
                x.shape[-1],
            )
        return x

    def of(self, h: Tensor, batch_dims: int | None = None) -> Tensor:
        """Rows as `matrix` gives them, of any number, none included; the other errors are the same."""
        check_pool()
        check_kind(h, "h")
        if self.tokens is not None and self.tokens not in get_args(Tokens):
            raise ValueError(
                f"tokens must be one of {', '.join(map(repr, get_args(Tokens)))}; got {self.tokens!r}"
            )
        if batch_dims not in (0, 1, None):
            raise ValueError(f"batch_dims must be 0 or 1; got {batch_dims!r}")
        x = h.detach()
        if self.positions is not None or self.channel_axis is not None:
            x = self._choose_positions(x, batch_dims or 0)
        elif self.mask is not None:
            x = self._choose_real_tokens(x, self.mask, batch_dims)
        else:
            x = self._choose_tokens(x, batch_dims)
        x = _exact_float(x)
        if x.shape[-1] < 1:
            raise ValueError(f"activations need at least one column; got shape {tuple(h.shape)}")
        if x.ndim == 3 and x.shape[0] < 1:
            raise ValueError(f"the batch axis is empty; got shape {tuple(h.shape)}")
        return x

    def resolution(self, h: Tensor, batch_dims: int | None = None) -> Resolution:
        """Resolution of the rows that `matrix` made of `h`.

        Of a mean it depends on how many tokens differ, which is looked at in three samples; on a device other than the
        CPU, where that would stop the host, they are taken to differ.
        """
        given = Resolution.of(h.dtype)
        if self.tokens != "mean" and self.positions != "mean":
            return given
        leading = batch_dims or 0
        h = h.detach()
        if self.channel_axis is not None:
            h = h.movedim(self.channel_axis, -1).flatten(leading + 1, -2)
        real = self.mask if self.mask is None or isinstance(self.mask, RealTokens) else RealTokens(self.mask)
        if leading:
            h = h.flatten(0, 1)
        if h.device.type != "cpu":
            return given._replace(relative=given.relative / h.shape[1] ** 0.5)
        chosen = {0, len(h) // 2, len(h) - 1}
        samples = [h[i] if real is None else h[i][real.mask[i]] for i in chosen]
        return _of_means([_exact_float(sample) for sample in samples], given)

    def _choose_tokens(self, h: Tensor, batch_dims: int | None) -> Tensor:
        tokens = self.tokens
        leading = batch_dims or 0
        dims = h.ndim - leading
        if dims == 2 and tokens is None:
            return h
        shape = tuple(h.shape)
        if dims > 3 and all(size == 1 for size in shape[leading + 2 :]):
            h = h.flatten(leading + 1)  # a pool
            dims = 2
        if dims == 2:
            if tokens is not None:
                raise ValueError(
                    f"tokens={tokens!r} needs h of shape (samples, tokens, d); got {shape}: leave it out"
                )
            return h
        if dims != 3:
            wanted = "(batch, n, d)" if leading else "(n, d)"
            axes = "(batch, n, channels, ...)" if leading else "(n, channels, ...)"
            remedy = (
                f'. For a map {axes} say positions="flatten" or "mean" with channel_axis={leading + 1}'
                if dims > 3
                else ""
            )
            if dims < 2 and h.numel():
                remedy = f": of one row give h[None]{', for a batch of one matrix too' if leading else ''}"
            raise ValueError(f"h must have shape {wanted}; got {shape}{remedy}")
        if tokens is None:
            choices = ['tokens="flatten", "first", "last", "mean", "skip_first"']
            choices.append(
                f'positions="flatten", "mean" with channel_axis={leading + 1} for channels before positions'
            )
            if batch_dims == 0:
                choices.append("or batch_dims=1")
            raise ValueError(f"h must have shape (n, d); got {shape}. Say which: {', '.join(choices)}")
        if h.shape[-2] < (2 if tokens == "skip_first" else 1):
            raise ValueError(f"tokens={tokens!r} needs more tokens than shape {shape} has")
        if tokens == "first":
            return h[..., 0, :]
        if tokens == "last":
            return h[..., -1, :]
        if tokens == "mean":
            return _exact_float(h).mean(-2, dtype=torch.float64)
        if tokens == "skip_first":
            h = h[..., 1:, :]
        return h.flatten(-3, -2)

    def _choose_real_tokens(
        self, h: Tensor, mask: Tensor | Array | RealTokens, batch_dims: int | None
    ) -> Tensor:
        tokens = self.tokens
        shape = tuple(h.shape)
        if batch_dims:
            raise ValueError(
                "mask does not go with batch_dims=1: matrices of one batch have the same number of rows; call once for "
                "each"
            )
        if h.ndim != 3:
            rows = ": where rows are samples leave it out, where they are all tokens use h[mask.flatten()]"
            raise ValueError(
                f"mask needs h of shape (samples, tokens, d); got {shape}{rows if h.ndim == 2 else ''}"
            )
        if tokens is None:
            raise ValueError(
                f"mask says which tokens of h {shape} are real, not what to make of them. Say which: "
                'tokens="flatten", "first", "last", "mean", "skip_first"'
            )
        real = mask if isinstance(mask, RealTokens) else RealTokens(mask)
        seen = tuple(real.mask.shape)
        if seen != shape[:2]:
            turned = ": use mask.T" if seen == shape[1::-1] else ""
            raise ValueError(
                f"mask must have shape (n, tokens) = {shape[:2]}, as h {shape} has; got {seen}{turned}"
            )
        if real.mask.device != h.device:
            raise ValueError(f"mask is on {real.mask.device} and h on {h.device}: use mask.to(h.device)")
        if real.full:
            return self._choose_tokens(h, batch_dims)
        samples, places = real.rows(tokens)
        if tokens != "mean":
            return h[samples, places]
        # Padding is 0 before the cast: whatever it holds, it is neither added nor checked.
        kept = _exact_float(torch.where(real.mask[..., None], h, h.new_zeros(())))
        return kept.sum(1, dtype=torch.float64) / real.mask.sum(1).to(kept.device)[:, None]

    def _choose_positions(self, h: Tensor, leading: int) -> Tensor:
        tokens, positions, channel_axis, mask = self
        shape = tuple(h.shape)
        if positions is None or channel_axis is None:
            given, missing = (
                ("channel_axis", 'positions="flatten" or "mean"')
                if positions is None
                else ("positions", f"channel_axis={leading + 1} where channels come after samples")
            )
            raise ValueError(f"positions and channel_axis go together; got {given} alone: add {missing}")
        if positions not in get_args(Positions):
            raise ValueError(
                f"positions must be one of {', '.join(map(repr, get_args(Positions)))}; got {positions!r}"
            )
        if tokens is not None or mask is not None:
            other = "mask" if tokens is None else f"tokens={tokens!r}"
            raise ValueError(
                f"{other} is for (samples, tokens, d) and positions for maps with channels: leave one of them out"
            )
        if h.ndim - leading < 3:
            raise ValueError(
                f"positions={positions!r} needs h of shape (samples, channels, ...); got {shape}: leave it out"
            )
        axis = int(operator.index(channel_axis))
        if not (leading < axis < h.ndim or leading < axis + h.ndim < h.ndim):
            raise ValueError(
                f"channel_axis must be an axis of h {shape} after that of the samples ({leading}); got {channel_axis}"
            )
        h = h.movedim(axis, -1)
        if positions == "mean":
            if 0 in h.shape[leading + 1 : -1]:
                raise ValueError(f"positions='mean' needs more positions than shape {shape} has")
            return _exact_float(h).flatten(leading + 1, -2).mean(-2, dtype=torch.float64)
        return h.flatten(leading, -2)


def first_nonfinite(x: Tensor) -> tuple[int, tuple[int, ...]] | None:
    """Count NaN and Inf in `x` and find the first, or None when all are finite. Reads all of `x`."""
    bad = ~torch.isfinite(x)
    count = int(bad.sum())
    if count == 0:
        return None
    flat = int(bad.reshape(-1).to(torch.uint8).argmax())
    index = []
    for size in reversed(x.shape):
        flat, i = divmod(flat, size)
        index.append(i)
    return count, tuple(reversed(index))


def of_array(values: Tensor | Array, name: str) -> Tensor:
    """Tensor of a NumPy array, on its memory where torch can use that; anything else as it is, for `check_kind`.

    Raises
    ------
    TypeError
        If the array is masked, or holds what torch has no dtype for.
    """
    if not isinstance(values, np.ndarray):
        return values
    if isinstance(values, np.ma.MaskedArray):
        raise TypeError(
            f"{name} is a masked array: use {name}.filled(...), or the rows without masked entries"
        )
    if values.dtype.char not in "?bBhHiIlLqQefdFD":
        raise TypeError(f"{name} is an array of {values.dtype}: use {name}.astype(numpy.float64)")
    native = values.astype(values.dtype.newbyteorder("="), copy=False)
    # torch warns of memory that must not be written, and takes no other strides than whole, positive ones.
    usable = native.flags.writeable and all(
        stride >= 0 and stride % native.itemsize == 0 for stride in native.strides
    )
    return torch.from_numpy(native if usable else native.copy())


def check_kind(h: Tensor, name: str) -> None:
    """Raise TypeError if `h` is no dense real tensor that holds data."""
    if not isinstance(h, Tensor):
        if isinstance(h, np.ndarray):  # where arrays are taken, `of_array` came before
            raise TypeError(f"{name} must be a torch.Tensor; got an ndarray: use torch.from_numpy({name})")
        raise TypeError(f"{name} must be a torch.Tensor or a NumPy array; got {type(h).__name__}")
    plain = type(h) is Tensor
    # A fake tensor can exist only when its module has been imported: no import of ours for the check.
    fake = None if plain else sys.modules.get("torch._subclasses.fake_tensor")
    if h.is_meta or (fake is not None and isinstance(h, fake.FakeTensor)):
        raise TypeError(
            f"{name} is a meta or fake tensor: it has a shape but no data; run the model on real tensors"
        )
    if torch._C._functorch.is_functorch_wrapped_tensor(h):
        raise TypeError(
            f"{name} is inside a transform of torch.func (vmap, grad, jvp), where its numbers cannot be read: return "
            "it from the transformed function, with has_aux=True beside a loss, and measure it outside; of vmap with "
            "batch_dims=1"
        )
    if h.is_nested:
        raise TypeError(f"{name} is a nested tensor: use {name}.values(), whose rows are its tokens")
    if h.layout != torch.strided:
        raise TypeError(f"{name} must be dense; got layout {h.layout}: use {name}.to_dense()")
    numbers = h.dtype in RESOLUTIONS or h.dtype in _INTEGERS
    if not numbers and h.is_quantized:
        raise TypeError(f"{name} is quantised ({h.dtype}): use {name}.dequantize()")
    if not plain and hasattr(h, "full_tensor"):
        raise TypeError(
            f"{name} is a DTensor: use {name}.full_tensor(), or fastent.Moments over {name}.to_local() for row shards"
        )
    if not numbers and h.is_complex():
        raise TypeError(
            f"{name} is complex ({h.dtype}): use torch.view_as_real({name}).flatten(-2), or its abs()"
        )
    # torch reads from address 0 here; tensors of other classes keep their memory in tensors of their own.
    if (plain or type(h) is nn.Parameter) and not h.untyped_storage().nbytes() and h.numel():
        raise TypeError(
            f"{name} {tuple(h.shape)} has no memory left: somebody freed it, as sharded training does after use; "
            "measure it while the forward pass runs, or keep a copy"
        )
    if not numbers:
        raise TypeError(
            f"{name} is {h.dtype}, whose elements torch cannot read as numbers (packed or bare bits): unpack and scale "
            "it to the numbers it stands for, such as float32, first"
        )


def _exact_float(h: Tensor) -> Tensor:
    if h.is_mps:  # no float64 there
        h = h.cpu()
    if h.dtype in _KERNEL_DTYPES:
        return h
    if h.is_floating_point():  # float8: every value is exact in float32
        return h.to(torch.float32)
    if h.dtype in (torch.int64, torch.uint64) and h.numel():
        signed = h.view(torch.int64)  # torch takes no minimum of uint64, whose upper half is negative here
        low, high = int(signed.min()), int(signed.max())
        if max(-low, high) > _INT64_EXACT or (low < 0 and h.dtype == torch.uint64):
            kind = str(h.dtype).removeprefix("torch.")
            raise ValueError(
                f"h holds {kind} values beyond 2^53, which float64 cannot represent; scale them down"
            )
    return h.to(torch.float64)
