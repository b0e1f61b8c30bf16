"""What the dtype of activations could not tell apart, and how much of a variance that may be.

A number of size v in a dtype with spacing `relative` at 1 was rounded to a multiple of at most ``relative |v|``, and
never of less than `absolute`, its smallest subnormal. Rounding to multiples of r is taken to add ``r^2 / 12``, the
variance of an error that is uniform. Summed over all features,

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
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Rounding that makes up this share of the total variance moves H by about as much.
UNRESOLVED_SHARE = 0.01


class Resolution(NamedTuple):
    """Spacing of a dtype's values: that of numbers of size 1, and the least one, around 0."""

    relative: float
    absolute: float

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


def _of_bits(mantissa: int, smallest: int) -> Resolution:
    return Resolution(2.0**-mantissa, 2.0**smallest)


# By bits of the mantissa and exponent of the smallest number: torch.finfo has no subnormals, and for one float8 another
# spacing than its values.
RESOLUTIONS = {
    torch.float64: _of_bits(52, -1074),
    torch.float32: _of_bits(23, -149),
    torch.float16: _of_bits(10, -24),
    torch.bfloat16: _of_bits(7, -133),
    torch.float8_e4m3fn: _of_bits(3, -9),
    torch.float8_e5m2: _of_bits(2, -16),
    torch.float8_e4m3fnuz: _of_bits(3, -10),
    torch.float8_e5m2fnuz: _of_bits(2, -17),
    torch.float8_e8m0fnu: _of_bits(0, -127),
}
"""Every floating-point dtype whose tensors hold one number in each element."""

EXACT = Resolution(0.0, 0.0)  # integers

# What wider tensors may hold, the coarsest first.
_HELD = (torch.bfloat16, torch.float16, torch.float32)
COARSEST = Resolution(RESOLUTIONS[torch.bfloat16].relative, RESOLUTIONS[torch.float16].absolute)
"""As coarse as they are in each way: what it resolves, they all do."""
# Rows that are looked at before all of them are, and in place of all where there is no time.
_FEW = 4
# Tokens of a sample that have one value from which on their errors are one error too.
_FROZEN = 0.75


def of_dtype(dtype: torch.dtype) -> Resolution:
    """Resolution of activations of `dtype`; integers are exact."""
    return RESOLUTIONS.get(dtype, EXACT)


def held(rows: Tensor, given: Resolution, offset: float, unit: float) -> torch.dtype | None:
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
    for dtype in _HELD:
        narrow = RESOLUTIONS[dtype]
        if not narrow.relative > given.relative > 0.0:
            break
        if (
            narrow.share(offset, unit) > UNRESOLVED_SHARE
            and _survives(dtype, some(rows))
            and _fits(dtype, rows)
        ):
            return dtype
    return None


def squared_relative(rows: Tensor, given: Resolution) -> Tensor:
    """``relative^2`` of what a few `rows` hold, float64 on their device, which is not waited for."""
    few = some(rows)
    found = torch.full((), given.relative**2, dtype=torch.float64, device=rows.device)
    for dtype in reversed(_HELD):
        narrow = RESOLUTIONS[dtype].relative
        if narrow > given.relative > 0.0:
            found = torch.where(_holds(dtype, few), narrow**2, found)
    return found


def of_means(samples: Sequence[Tensor], given: Resolution) -> Resolution:
    """Resolution of means over the tokens of a sample.

    Errors of k tokens are independent, and that of their mean has a variance k times smaller, unless the tokens
    have one value: then they have one error. How much of the rounding is of that kind is seen in a few samples.

    Parameters
    ----------
    samples : sequence of Tensor, each of shape (tokens, d)
        Some of them.
    given : Resolution
        That of the tokens.
    """
    if given == EXACT or not samples:
        return given
    for dtype in _HELD:
        narrow = RESOLUTIONS[dtype]
        if narrow.relative > given.relative and _fits(dtype, torch.cat(list(samples))):
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


def some(rows: Tensor) -> Tensor:
    """Return a few rows from all over, or an only one."""
    return rows[:: -(-len(rows) // _FEW)] if rows.ndim == 2 and len(rows) > _FEW else rows


def _survives(dtype: torch.dtype, rows: Tensor) -> bool:
    return bool((rows.to(dtype) == rows).all())


def _fits(dtype: torch.dtype, rows: Tensor) -> bool:
    return bool(_holds(dtype, rows))


def _holds(dtype: torch.dtype, rows: Tensor) -> Tensor:
    """Whether all values survive a round trip through `dtype` and are not whole numbers that it tells apart."""
    survive = (rows.to(dtype) == rows).all()
    whole = (rows == rows.round()).all() & (rows.abs().amax() <= 2.0 / RESOLUTIONS[dtype].relative)
    return survive & ~whole
