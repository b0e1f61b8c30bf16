"""What the spectrum of one centred covariance says: the numbers, and what there is to distrust in them.

``H = -sum p log p`` with ``p = eig(C) / tr C``. Eigenvalues below ``d eps`` times the largest count as 0, so H does not
depend on the scale. H is NaN only where the input was not finite, or where there were no two rows.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from fastent.covariance import CenteredMatrix
from fastent.eigenvalues import EPS, eigenvalues
from fastent.rounding import COARSEST, RESOLUTIONS, UNRESOLVED_SHARE, Resolution, held

Convention = Literal["relative", "paper"]
CONVENTIONS = get_args(Convention)

TINY = torch.finfo(torch.float64).tiny  # below it, and at infinity, a total variance has lost digits
PAPER_FLOOR = 1e-12


class Status(StrEnum):
    """What to distrust in a result, from the least to the most severe."""

    OK = "ok"
    RANK_LIMITED = "rank_limited"
    UNRESOLVED_OFFSET = "unresolved_offset"
    OUT_OF_RANGE = "out_of_range"
    ZERO_VARIANCE = "zero_variance"
    TOO_FEW_ROWS = "too_few_rows"
    NOT_RUN = "not_run"
    NONFINITE = "nonfinite"

    @property
    def usable(self) -> bool:
        """Whether crossings, stopping and forecasts may use the result."""
        return self in (Status.OK, Status.RANK_LIMITED)

    @property
    def severity(self) -> int:
        """Place in the order of the members; the worst of several is the largest."""
        return list(Status).index(self)


@dataclass(frozen=True)
class SpectralEntropy:
    """Entropy of a covariance spectrum, with all that is needed to doubt it.

    The numbers are floats, or tensors of shape (batch,) when the input was batched; then `status` is the worst of
    the batch, `flags` and `message` are those of all, and `unbind` gives the results one by one.

    Attributes
    ----------
    normalized : float
        H / log d, 0 (one direction) to 1 (all directions equal); no unit.
    entropy : float
        H in nats.
    effective_rank : float
        exp(H), 1 to d (Roy and Vetterli 2007, on eigenvalues).
    participation_ratio : float
        (tr C)^2 / ||C||_F^2, 1 to d; the exponential of the Renyi-2 entropy, never above `effective_rank`.
    eigenvalues : Tensor, shape (d,) or (batch, d)
        float64 on the CPU, ascending, as the solver gave them (tiny negative ones included), zeros added where
        n < d; in units of the input squared.
    total_variance : float
        tr C in units of the input squared; infinite or 0 where it leaves float64's range.
    status : Status
        The worst of `flags`.
    flags : tuple of Status
        All that apply; empty when all is well.
    message : str
        The flags in sentences, with the remedy; empty when all is well.
    ceiling : float
        The largest `normalized` that n samples allow: log(n - 1) / log d for n <= d, else 1.
    n, d : int
        Samples and features.
    solver : str
        "lapack" or "cusolver", and the matrix it solved; "none" where there was nothing to solve.
    """

    normalized: float | Tensor
    entropy: float | Tensor
    effective_rank: float | Tensor
    participation_ratio: float | Tensor
    eigenvalues: Tensor
    total_variance: float | Tensor
    status: Status
    flags: tuple[Status, ...]
    message: str
    ceiling: float
    n: int
    d: int
    solver: str
    _items: tuple[SpectralEntropy, ...] = dataclasses.field(default=(), repr=False)

    def unbind(self) -> tuple[SpectralEntropy, ...]:
        """Results of the batch one by one; of an unbatched result, itself alone."""
        return self._items or (self,)


def entropy_of_matrix(
    centered: CenteredMatrix,
    *,
    convention: Convention = "relative",
    spectrum: tuple[Tensor, str] | None = None,
) -> SpectralEntropy:
    """Entropy of one centred matrix whose activations are no longer at hand.

    Parameters
    ----------
    centered : CenteredMatrix
        Unbatched, scaled by 1/n.
    convention : {"relative", "paper"}
        See `fastent.spectral_entropy`.
    spectrum : (Tensor, str), optional
        What `fastent.eigenvalues.eigenvalues` would return, where the matrix was solved together with others.

    Returns
    -------
    SpectralEntropy
        With status `out_of_range` where the squares left float64's range: without the activations
        they cannot be scaled and squared again. Of NaN and Inf the features are known, not the entries.
    """
    value = float(centered.trace)
    if TINY <= value < math.inf:
        found = spectrum or eigenvalues(centered)
        return summarize(centered, *found, value, convention, rows=centered.entries)
    if math.isnan(value):
        # The mean of a column is finite where the column is; Inf - Inf makes the trace NaN for large squares too.
        bad = (~(centered.shift + centered.delta).isfinite()).nonzero().flatten().tolist()
        if bad:
            kinds = "NaN or Inf" if centered.resolution.relative > EPS else "NaN, Inf or a sum beyond float64"
            message = f"{kinds} in {len(bad)} of {centered.d} features, the first is feature {bad[0]}"
            return unsolved(centered, Status.NONFINITE, math.nan, message, convention)
        value = math.inf
    if value == 0 and not bool(centered.delta.any()):
        return constant_rows(centered, convention)
    message = f"the squares leave float64's range (total variance {value:.3g}): scale the activations by a power of two"
    return unsolved(centered, Status.OUT_OF_RANGE, value, message, convention)


def summarize(
    centered: CenteredMatrix,
    values: Tensor,
    solver: str,
    trace: float,
    convention: Convention,
    floor: float = PAPER_FLOOR,
    *,
    rows: Tensor | None = None,
) -> SpectralEntropy:
    """Make the result of a matrix that was solved.

    Parameters
    ----------
    centered : CenteredMatrix
        Unbatched.
    values : Tensor, shape (m,)
        Its ascending eigenvalues.
    solver : str
        What they came from.
    trace : float
        Its trace, within float64's range.
    convention : {"relative", "paper"}
        See `fastent.spectral_entropy`.
    floor : float
        The paper's clamp in the units of `values`, which may have been scaled.
    rows : Tensor, shape (k, d), optional
        The activations, or some of them, which may hold values of a narrower dtype.
    """
    n, d = centered.n, centered.d
    if centered.side == "gram":
        values = torch.cat([values, values.new_zeros(d - n)]).sort().values
    h, purity = _paper_entropy(values, floor) if convention == "paper" else _relative_entropy(values, d)
    ceiling = _ceiling(n, d)
    normalized = h / math.log(d)
    if convention == "relative":  # rounding must not lift H out of its range; the paper's floor may
        normalized = min(max(normalized, 0.0), ceiling)
        h = min(max(h, 0.0), math.log(d))
    flags, sentences = [], []
    if n <= d:
        flags.append(Status.RANK_LIMITED)
        sentences.append(
            f"{n} samples in {d} dimensions: H cannot exceed {ceiling:.4f}; {d + 1} lift the ceiling"
        )
    unresolved = _unresolved(centered, trace, rows)
    if unresolved:
        flags.append(Status.UNRESOLVED_OFFSET)
        sentences.append(unresolved)
    return SpectralEntropy(
        normalized=normalized,
        entropy=h,
        effective_rank=math.exp(h),
        participation_ratio=1.0 / purity,
        eigenvalues=values,
        total_variance=trace,
        status=flags[-1] if flags else Status.OK,  # they come in the order of severity
        flags=tuple(flags),
        message="; ".join(sentences),
        ceiling=ceiling,
        n=n,
        d=d,
        solver=solver,
    )


# NumPy for vectors of a few hundred: a call costs a fifth of torch's.
def _relative_entropy(values: Tensor, d: int) -> tuple[float, float]:
    """H in nats and sum p^2 of ascending eigenvalues (d,)."""
    ascending = values.numpy()
    kept = ascending[ascending.searchsorted(d * EPS * ascending[-1]) :]
    p = kept / np.add.reduce(kept)
    return 0.0 - float(p.dot(np.log(p))), float(p.dot(p))  # never -0.0


def _paper_entropy(values: Tensor, floor: float) -> tuple[float, float]:
    """H in nats and sum p^2; `floor` is the paper's, in the units of `values`."""
    clamped = np.maximum(values.numpy(), floor)
    p = clamped / np.add.reduce(clamped)
    return 0.0 - float(p.dot(np.log(p + PAPER_FLOOR))), float(p.dot(p))


def _ceiling(n: int, d: int) -> float:
    return math.log(n - 1) / math.log(d) if n <= d else 1.0


def held_resolution(centered: CenteredMatrix, trace: float, rows: Tensor) -> Resolution:
    """Resolution of the values of `rows`, where it is narrower than that of their dtype and matters."""
    dtype = held(rows, centered.resolution, *_offset_and_unit(centered, trace))
    return centered.resolution if dtype is None else RESOLUTIONS[dtype]


def _offset_and_unit(centered: CenteredMatrix, trace: float) -> tuple[float, float]:
    """``|mean|^2 / trace`` and ``sqrt(d / trace)``."""
    root = math.sqrt(trace)
    with np.errstate(over="ignore"):
        # Before squaring: it may be 1e160.
        mean = (centered.shift + centered.delta).cpu().numpy() * (1.0 / root)
        return float(mean.dot(mean)), math.sqrt(centered.d) / root


def _unresolved(centered: CenteredMatrix, trace: float, rows: Tensor | None) -> str:
    """Sentence on rounding that makes up too much of the variance; empty where it does not."""
    size, unit = _offset_and_unit(centered, trace)
    resolution, holder = centered.resolution, "its dtype"
    if centered.rounding is not None:
        share, offset = centered.rounding / trace, size > 1.0
    elif (
        COARSEST.share(size, unit) <= UNRESOLVED_SHARE
        and resolution.relative <= COARSEST.relative
        and resolution.absolute <= COARSEST.absolute
    ):
        return ""  # nearly always
    else:
        narrow = None if rows is None else held(rows, resolution, size, unit)
        if narrow is not None:
            resolution = RESOLUTIONS[narrow]
            holder = f"{str(narrow).removeprefix('torch.')}, whose values it holds"
        share = resolution.share(size, unit)
        offset = resolution._replace(absolute=0.0).share(size, unit) > 0.5 * share
    if share <= UNRESOLVED_SHARE:
        return ""
    what, remedy = (
        ("its offset is too large", "subtract the offset")
        if offset
        else ("its values are too small", "scale them up")
    )
    return (
        f"the input's own rounding makes up {min(share, 1.0):.0%} of the variance, {what} for {holder}: take "
        f"activations of a wider dtype, or {remedy} before the cast"
    )


def constant_rows(centered: CenteredMatrix, convention: Convention) -> SpectralEntropy:
    """Make the result of rows that are all equal."""
    message = "all rows are equal: there is no variance to have a spectrum"
    return unsolved(centered, Status.ZERO_VARIANCE, 0.0, message, convention)


def unsolved(
    centered: CenteredMatrix, status: Status, trace: float, message: str, convention: Convention
) -> SpectralEntropy:
    """Make the result where there is no spectrum: NaN for non-finite input, else 0 (the paper's convention: 1)."""
    n, d = centered.n, centered.d
    bad = status is Status.NONFINITE
    uniform = convention == "paper" and not bad
    h = math.nan if bad else math.log(d) if uniform else 0.0
    flags = (Status.RANK_LIMITED, status) if n <= d else (status,)
    return SpectralEntropy(
        normalized=h / math.log(d),
        entropy=h,
        effective_rank=math.exp(h),
        participation_ratio=math.nan if bad else float(d) if uniform else 1.0,
        eigenvalues=torch.full((d,), math.nan if bad else 0.0, dtype=torch.float64, device="cpu"),
        total_variance=trace,
        status=status,
        flags=flags,
        message=message,
        ceiling=_ceiling(n, d),
        n=n,
        d=d,
        solver="none",
    )


def unmeasured(status: Status, n: int, d: int, message: str) -> SpectralEntropy:
    """Make the result of a layer that gave fewer rows than a covariance needs: NaN, and no ceiling."""
    nan = math.nan
    return SpectralEntropy(
        normalized=nan,
        entropy=nan,
        effective_rank=nan,
        participation_ratio=nan,
        eigenvalues=torch.full((d,), nan, dtype=torch.float64, device="cpu"),
        total_variance=nan,
        status=status,
        flags=(status,),
        message=message,
        ceiling=nan,
        n=n,
        d=d,
        solver="none",
    )
