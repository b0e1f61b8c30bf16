"""What the dtype of activations could not tell apart."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Resolution(NamedTuple):
    """Spacing of a dtype's values: that of numbers of size 1, and the least one, around 0."""

    relative: float
    absolute: float


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
