"""How far the entropy of a finite probe is from that of the distribution behind it: bias and standard error.

N rows make the spectrum look more spread than it is, so H of a probe is low: by about ``d / (2 N log d)`` for a flat
spectrum (0.026 at N = 512, d = 128), by less for one that decays. Both numbers come from the grouped jackknife:
delete each group of rows in turn, take H of the others. It takes rows as exchangeable, normal or not; the groups are
drawn at random, so an ordered probe does no harm. It costs one entropy for each group.

It removes the bias of order 1/N. For n <= d that leaves a part, since no sample shows directions that it does not have.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastent.activations import Array, Positions, RealTokens, Rows, Tokens, of_array
from fastent.covariance import Backend, CenteredMatrix, centered_matrix, mirror_lower
from fastent.display import Shown, Table, digits
from fastent.entropy import SpectralEntropy, Status, checked, entropy_of_matrix, entropy_of_rows
from fastent.process import uncompiled

GROUPS = 16


@dataclass(frozen=True)
class SamplingError(Shown):
    """Error of a normalised entropy as an estimate for the distribution that its rows come from.

    Attributes
    ----------
    normalized : float
        H of the rows themselves, as `fastent.spectral_entropy` gives it.
    bias : float
        Estimate of its expectation minus the distribution's H; negative.
    corrected : float
        ``normalized - bias``; its noise may lift it above 1.
    standard_error : float
        Of `corrected`, and for `normalized` rather too large: by half for a flat spectrum, not at all for a steep one.
    groups : int
        Groups deleted in turn. The standard error has itself a relative error of about ``1 / sqrt(2 groups)``, 18 %.
    n, d : int
        Samples and features.
    status, message : Status, str
        Of the entropy of all rows. All numbers are NaN for `nonfinite`; where the status is `zero_variance` the error
        is 0. `rank_limited` (n <= d): the correction is incomplete, and the standard error may be a quarter too small.
    """

    normalized: float
    bias: float
    corrected: float
    standard_error: float
    groups: int
    n: int
    d: int
    status: Status
    message: str

    def __repr__(self) -> str:
        corrected = f"corrected={digits(self.corrected)}, standard_error={digits(self.standard_error)}"
        return f"SamplingError({corrected}, n={self.n}, d={self.d}, status={self.status.value!r})"

    def _table(self) -> Table:
        rows = [
            ("H, normalised", digits(self.normalized)),
            ("bias", digits(self.bias)),
            ("corrected", f"{digits(self.corrected)} ± {digits(self.standard_error)}"),
            ("status", self.status.value),
        ]
        return Table(f"Sampling error: {self.n} samples, {self.d} features", rows, remark=self.message)


@uncompiled
def sampling_error(
    h: Tensor | Array,
    *,
    groups: int = GROUPS,
    population: int | None = None,
    tokens: Tokens | None = None,
    positions: Positions | None = None,
    channel_axis: int | None = None,
    mask: Tensor | Array | RealTokens | None = None,
    backend: Backend = "auto",
) -> SamplingError:
    """Bias and standard error of the normalised entropy of `h`, by the grouped jackknife.

    Parameters
    ----------
    h : Tensor or ndarray, shape (n, d)
        Activations, one sample per row, n >= 3; (n, tokens, d) needs `tokens`, a map `positions`. Rows must be
        exchangeable: several tokens of one sequence or positions of one map are not.
    groups : int
        At least 2; with more rows than that, each group has ``n / groups`` rows, drawn without regard to order.
    population : int, optional
        Number of all rows there are, where `h` is a part drawn from them without replacement (a probe from a training
        set): the answer is then about their entropy, and both errors shrink by the part already seen. Default:
        infinitely many.
    tokens, positions, channel_axis, mask, backend
        See `fastent.spectral_entropy`.

    Returns
    -------
    SamplingError

    Raises
    ------
    TypeError, ValueError
        For unusable activations, n < 3, ``groups < 2`` or a population smaller than n.

    References
    ----------
    Busing, Meijer and van der Leeden, "Delete-m jackknife for unequal m", Statistics and Computing 9 (1999). Efron and
    Stein, "The jackknife estimate of variance", Annals of Statistics 9 (1981): on average it is not too small.

    Examples
    --------
    >>> import torch
    >>> h = torch.randn(512, 128, generator=torch.Generator().manual_seed(0))  # a flat spectrum: H = 1 behind it
    >>> error = sampling_error(h)
    >>> round(error.normalized, 2), round(error.bias, 3), round(error.corrected, 2)
    (0.97, -0.026, 1.0)
    """
    if not isinstance(h, Tensor):
        h = of_array(h, "h")
    rows = Rows(tokens, positions, channel_axis, mask)
    x = checked(h, rows)
    n, d = x.shape
    if n < 3:
        raise ValueError(f"a jackknife needs at least 3 samples (rows); got N = {n}")
    groups = operator.index(groups)
    if groups < 2:
        raise ValueError(f"groups must be at least 2; got {groups}")
    if population is not None and not population >= n:
        raise ValueError(f"the population cannot be smaller than its sample; got {population} < {n}")
    whole = entropy_of_rows(x, rows.resolution(h), backend=backend)
    groups = min(groups, n)
    normalized = float(whole.normalized)
    if whole.status in (Status.ZERO_VARIANCE, Status.NONFINITE):
        error = 0.0 if whole.status is Status.ZERO_VARIANCE else math.nan
        return SamplingError(normalized, error, normalized, error, groups, n, d, whole.status, whole.message)
    x = _in_range(x, float(whole.total_variance))
    parts = _random_parts(n, groups, x.device)
    without = np.array([float(result.normalized) for result in _leave_out(x, parts, backend)])
    bias, variance = _jackknife(normalized, without, np.array([len(part) for part in parts]))
    unseen = 1.0 if population is None else 1.0 - n / population
    return SamplingError(
        normalized=normalized,
        bias=bias * unseen,
        corrected=normalized - bias * unseen,
        standard_error=math.sqrt(variance * unseen),
        groups=groups,
        n=n,
        d=d,
        status=whole.status,
        message=whole.message,
    )


def _random_parts(n: int, groups: int, device: torch.device) -> list[Tensor]:
    """Row numbers of each group, the same for every call, without a trace in torch's random state."""
    order = np.random.default_rng(0).permutation(n)
    return [torch.from_numpy(np.sort(part)).to(device) for part in np.array_split(order, groups)]


def _leave_out(x: Tensor, parts: list[Tensor], backend: Backend) -> list[SpectralEntropy]:
    """Entropy of the rows without each part, on whichever side is smaller."""
    fewest = x.shape[0] - max(map(len, parts))
    leave_out = _leave_out_rows if fewest >= x.shape[1] else _leave_out_gram
    return [entropy_of_matrix(left) for left in leave_out(x, parts, backend)]


def _leave_out_rows(x: Tensor, parts: list[Tensor], backend: Backend) -> Iterator[CenteredMatrix]:
    """Covariances without each part: its products are taken off those of all rows, so each is formed once.

    With m of n rows gone, their mean off the whole by delta, ``M2 - M2_part - (n m / (n - m)) delta delta^T``.
    """
    whole = centered_matrix(x, backend=backend, side="covariance", scale=1.0, exact_mean=True)
    for part in parts:
        gone = centered_matrix(x[part], backend=backend, side="covariance", scale=1.0, exact_mean=True)
        left = whole.n - gone.n
        delta = (gone.shift - whole.shift) + (gone.delta - whole.delta)
        weighted = delta * (whole.n * gone.n / left)
        matrix = (whole.matrix - gone.matrix).addr_(weighted, delta, alpha=-1.0).div_(left)
        # Of the mean only whether it is away from the shift is asked, where all variance is gone.
        yield whole._replace(matrix=matrix, delta=whole.delta - delta * (gone.n / left), n=left)


def _leave_out_gram(x: Tensor, parts: list[Tensor], backend: Backend) -> Iterator[CenteredMatrix]:
    """Gram matrices without each part: cut out of the one of all rows, and centred again."""
    whole = centered_matrix(x, backend=backend, side="gram", scale=1.0)
    full = mirror_lower(whole.matrix)
    for part in parts:
        kept = torch.ones(whole.n, dtype=torch.bool, device=x.device)
        kept[part] = False
        cut = full[kept][:, kept]
        means = cut.mean(0)
        matrix = (cut - means - means[:, None] + means.mean()) / len(cut)
        yield whole._replace(matrix=matrix, n=len(cut))


def _jackknife(
    whole: float, without: np.ndarray[Any, Any], sizes: np.ndarray[Any, Any]
) -> tuple[float, float]:
    """Bias and variance of `whole` from the values without each part, whose sizes may differ by one."""
    ratio = sizes.sum() / sizes
    corrected = len(sizes) * whole - float(((1.0 - 1.0 / ratio) * without).sum())
    pseudo = ratio * whole - (ratio - 1.0) * without
    return whole - corrected, float(np.mean((pseudo - corrected) ** 2 / (ratio - 1.0)))


def _in_range(x: Tensor, total: float) -> Tensor:
    """`x`, by a power of two nearer to 1 where its squares, or those of a few rows, could leave float64's range."""
    if 1e-200 < total < 1e200:
        return x
    exponent = math.frexp(float(x.abs().amax()))[1]
    half = -exponent // 2  # in two steps: one factor of 2^1074 would overflow
    return x.to(torch.float64) * 2.0**half * 2.0 ** (-exponent - half)
