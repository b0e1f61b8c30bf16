"""Spectral entropy of activations: from what a layer gave to the result, and what there is to distrust in it.

``H = -sum p log p`` with ``p = eig(C) / tr C``. Eigenvalues below ``d eps`` times the largest count as 0, so H does not
depend on the scale. H is NaN only where the input was not finite, or where there were no two rows. The covariance comes
from `fastent.covariance`, its eigenvalues from `fastent.linalg`; inputs whose squares leave float64's range take more.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from fastent.activations import (
    COARSEST,
    EXACT,
    RESOLUTIONS,
    UNRESOLVED_SHARE,
    Array,
    Positions,
    RealTokens,
    Resolution,
    Rows,
    Tokens,
    check_kind,
    first_nonfinite,
    held_dtype,
    of_array,
)
from fastent.covariance import Backend, CenteredMatrix, centered_matrix
from fastent.display import Shown, Table, digits
from fastent.linalg import EPS, check_pool, eigenvalues
from fastent.process import uncompiled, warn_of_detached

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
    FAILED = "failed"

    @property
    def usable(self) -> bool:
        """Whether crossings, stopping and forecasts may use the result."""
        return self in (Status.OK, Status.RANK_LIMITED)

    @property
    def severity(self) -> int:
        """Place in the order of the members; the worst of several is the largest."""
        return list(Status).index(self)


@dataclass(frozen=True)
class SpectralEntropy(Shown):
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
        Samples and features; n is 0 where a spectrum or a covariance was given, not its samples.
    solver : str
        "lapack" or "cusolver", and the matrix it solved; "given" where the eigenvalues were; "none" where there was
        nothing to solve.
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
    # Eigenvalues whose 2^exponent-fold are `eigenvalues`, where those leave float64's range.
    _scaled: tuple[Tensor, int] | None = dataclasses.field(default=None, repr=False)

    def unbind(self) -> tuple[SpectralEntropy, ...]:
        """Results of the batch one by one; of an unbatched result, itself alone."""
        return self._items or (self,)

    def __repr__(self) -> str:
        if self._items:
            found = [float(item.normalized) for item in self._items if item.status is not Status.NONFINITE]
            spread = f"{digits(min(found))} to {digits(max(found))}" if found else "nan"
            values = f"{len(self._items)} matrices, normalized={spread}"
        else:
            values = f"normalized={digits(self.normalized)}, effective_rank={digits(self.effective_rank)}"
        return f"SpectralEntropy({values}, n={self.n}, d={self.d}, status={self.status.value!r})"

    def _table(self) -> Table:
        size = f"{self.n} samples, {self.d} features" if self.n else f"{self.d} features"
        if self._items:
            heads = ("", "H", "effective rank", "participation ratio", "status")
            rows = [
                (
                    f"[{i}]",
                    *map(digits, (x.normalized, x.effective_rank, x.participation_ratio)),
                    x.status.value,
                )
                for i, x in enumerate(self._items)
            ]
            return Table(f"Spectral entropy of {len(rows)} matrices: {size}", rows, heads, self.message)
        most = f" of at most {digits(self.ceiling)}" if self.ceiling < 1 else ""
        rows = [
            ("H, normalised", digits(self.normalized) + most),
            ("entropy", f"{digits(self.entropy)} nats"),
            ("effective rank", f"{digits(self.effective_rank)} of {self.d}"),
            ("participation ratio", digits(self.participation_ratio)),
            ("total variance", digits(self.total_variance)),
            ("status", ", ".join(flag.value for flag in self.flags) or self.status.value),
        ]
        return Table(f"Spectral entropy: {size}", rows, remark=self.message)

    def plot(self, *, label: str | None = None, ax: Any = None) -> Any:
        """Draw the spectrum: eigenvalues as shares of the variance, with the effective rank as a dashed line.

        Those that count as 0 (below ``d eps`` times the largest) are left out. A batch is a line for each of its
        results that has a spectrum.

        Parameters
        ----------
        label : str, optional
            Name in the legend.
        ax : matplotlib.axes.Axes, optional
            Where to draw: several results go on the same. By default on a figure of its own, as in
            `SpectralEntropyMonitor.plot`.

        Returns
        -------
        matplotlib.axes.Axes

        Raises
        ------
        ModuleNotFoundError
            If matplotlib is not installed.
        TypeError
            If `ax` is not axes of matplotlib.
        ValueError
            If there is no spectrum: the message says why.
        """
        from fastent import plots

        items = self.unbind()
        names = [label or ""] if len(items) == 1 else [f"{label or ''}[{i}]" for i in range(len(items))]
        spectra = []
        for item, name in zip(items, names, strict=True):
            if item.solver == "none":
                continue
            values, _ = item._scaled or (item.eigenvalues, 0)
            largest_first = values.numpy()[::-1]
            kept = largest_first[largest_first >= item.d * EPS * largest_first[0]]
            rank = float(item.effective_rank)
            spectra.append(plots.Spectrum(name, kept / kept.sum(), float(item.normalized), rank))
        if not spectra:
            raise ValueError(f"there is no spectrum to draw: {self.message}")
        return plots.plot_spectra(spectra, ax)


def entropy_of_matrix(
    centered: CenteredMatrix, *, spectrum: tuple[Tensor, str] | None = None
) -> SpectralEntropy:
    """Entropy of one centred matrix whose activations are no longer at hand.

    Parameters
    ----------
    centered : CenteredMatrix
        Unbatched, scaled by 1/n.
    spectrum : (Tensor, str), optional
        What `fastent.linalg.eigenvalues` would return, where the matrix was solved together with others.

    Returns
    -------
    SpectralEntropy
        With status `out_of_range` where the squares left float64's range: without the activations
        they cannot be scaled and squared again. Of NaN and Inf the features are known, not the entries.
    """
    centered = centered.where_solved()
    value = float(centered.trace)
    if TINY <= value < math.inf:
        found = spectrum or eigenvalues(centered.matrix)
        return summarize(centered, *found, value, rows=centered.entries)
    if math.isnan(value):
        # The mean of a column is finite where the column is; Inf - Inf makes the trace NaN for large squares too.
        bad = (~(centered.shift + centered.delta).isfinite()).nonzero().flatten().tolist()
        if bad:
            kinds = "NaN or Inf" if centered.resolution.relative > EPS else "NaN, Inf or a sum beyond float64"
            message = f"{kinds} in {len(bad)} of {centered.d} features, the first is feature {bad[0]}"
            return unsolved(centered, Status.NONFINITE, math.nan, message)
        value = math.inf
    if value == 0 and not bool(centered.delta.any()):
        return constant_rows(centered)
    message = f"the squares leave float64's range (total variance {value:.3g}): scale the activations by a power of two"
    return unsolved(centered, Status.OUT_OF_RANGE, value, message)


def summarize(
    centered: CenteredMatrix,
    values: Tensor,
    solver: str,
    trace: float,
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
    rows : Tensor, shape (k, d), optional
        The activations, or some of them, which may hold values of a narrower dtype.
    """
    n, d = centered.n, centered.d
    if centered.side == "gram":
        values = torch.cat([values, values.new_zeros(d - n)]).sort().values
    h, purity = _entropy_and_purity(values, d)
    ceiling = _ceiling(n, d)
    normalized = min(max(h / math.log(d), 0.0), ceiling)  # rounding must not lift it out of its range
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
        solver=f"{solver} ({centered.side})",
    )


# NumPy for vectors of a few hundred: a call costs a fifth of torch's.
def _entropy_and_purity(values: Tensor, d: int) -> tuple[float, float]:
    """H in nats and sum p^2 of ascending eigenvalues (d,)."""
    ascending = values.numpy()
    kept = ascending[ascending.searchsorted(d * EPS * ascending[-1]) :]
    p = kept / np.add.reduce(kept)
    return 0.0 - float(p.dot(np.log(p))), float(p.dot(p))  # never -0.0


def by_the_paper(result: SpectralEntropy) -> SpectralEntropy:
    """Entropy of `result` by the recipe of the paper's Appendix B, from its eigenvalues.

    They are clamped at an absolute 1e-12, and 1e-12 is added inside the logarithm. Not finite stays NaN.
    """
    if result._items:
        return _stack([by_the_paper(item) for item in result._items])
    if result.solver == "none":
        uniform = result.status is not Status.NONFINITE  # all eigenvalues at the floor
        h, purity = (math.log(result.d), 1.0 / result.d) if uniform else (math.nan, math.nan)
    else:
        values, exponent = result._scaled or (result.eigenvalues, 0)
        floor = math.ldexp(PAPER_FLOOR, min(-exponent, 1000))  # from 1 on it clamps every eigenvalue
        clamped = np.maximum(values.numpy(), floor)
        p = clamped / np.add.reduce(clamped)
        h, purity = 0.0 - float(p.dot(np.log(p + PAPER_FLOOR))), float(p.dot(p))
    return dataclasses.replace(
        result,
        entropy=h,
        normalized=h / math.log(result.d),
        effective_rank=math.exp(h),
        participation_ratio=1.0 / purity,
    )


def _ceiling(n: int, d: int) -> float:
    return math.log(n - 1) / math.log(d) if n <= d else 1.0


def held_resolution(centered: CenteredMatrix, trace: float, rows: Tensor) -> Resolution:
    """Resolution of the values of `rows`, where it is narrower than that of their dtype and matters."""
    dtype = held_dtype(rows, centered.resolution, *_offset_and_unit(centered, trace))
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
        share, offset = float(centered.rounding) / trace, size > 1.0
    elif (
        COARSEST.share(size, unit) <= UNRESOLVED_SHARE
        and resolution.relative <= COARSEST.relative
        and resolution.absolute <= COARSEST.absolute
    ):
        return ""  # nearly always
    else:
        narrow = None if rows is None else held_dtype(rows, resolution, size, unit)
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
        f"the input's own rounding may make up {min(share, 1.0):.0%} of the variance, {what} for {holder}: take "
        f"activations of a wider dtype, or {remedy} before the cast"
    )


def constant_rows(centered: CenteredMatrix) -> SpectralEntropy:
    """Make the result of rows that are all equal."""
    message = "all rows are equal: there is no variance to have a spectrum"
    return unsolved(centered, Status.ZERO_VARIANCE, 0.0, message)


def unsolved(centered: CenteredMatrix, status: Status, trace: float, message: str) -> SpectralEntropy:
    """Make the result where there is no spectrum: NaN for non-finite input, else 0."""
    n, d = centered.n, centered.d
    flags = (Status.RANK_LIMITED, status) if n <= d else (status,)
    h = math.nan if status is Status.NONFINITE else 0.0
    return _without_spectrum(n, d, h, flags, message, trace=trace, ceiling=_ceiling(n, d))


def unmeasured(status: Status, n: int, d: int, message: str) -> SpectralEntropy:
    """Make the result of a layer that gave fewer rows than a covariance needs: NaN, and no ceiling."""
    return _without_spectrum(n, d, math.nan, (status,), message, trace=math.nan, ceiling=math.nan)


def _without_spectrum(
    n: int, d: int, h: float, flags: tuple[Status, ...], message: str, *, trace: float, ceiling: float
) -> SpectralEntropy:
    """Make the result of entropy `h`, 0 or NaN, whatever d is."""
    return SpectralEntropy(
        normalized=h,
        entropy=h,
        effective_rank=math.exp(h),
        participation_ratio=math.exp(h),
        eigenvalues=torch.full((d,), h, dtype=torch.float64, device="cpu"),
        total_variance=trace,
        status=flags[-1],
        flags=flags,
        message=message,
        ceiling=ceiling,
        n=n,
        d=d,
        solver="none",
    )


@uncompiled
def spectral_entropy(
    h: Tensor | Array,
    *,
    convention: Convention = "relative",
    tokens: Tokens | None = None,
    positions: Positions | None = None,
    channel_axis: int | None = None,
    mask: Tensor | Array | RealTokens | None = None,
    batch_dims: int = 0,
    backend: Backend = "auto",
) -> SpectralEntropy:
    """Entropy of the covariance spectrum of `h`.

    Parameters
    ----------
    h : Tensor or ndarray, shape (n, d), or (batch, n, d) with ``batch_dims=1``
        Activations, one sample per row; any real dtype, device and strides.
    convention : {"relative", "paper"}
        "paper" clamps eigenvalues at an absolute 1e-12 and adds 1e-12 inside the logarithm, as printed in the
        paper's Appendix B. For comparison only: constant rows score 1, and H depends on the scale.
    tokens : {"flatten", "first", "last", "mean", "skip_first"}, optional
        What to make of a (n, tokens, d) input: every token a row; the first token (a class token); the last; the mean
        over tokens (in float64); every token but the first (the attention sink of language models).
    positions : {"flatten", "mean"}, optional
        What to make of a map with channels, such as (n, c, height, width) or (n, c, length): every position a row of c
        features, or the mean over positions (in float64).
    channel_axis : int, optional
        The axis of `h`, counted among all of them, that holds the features of a map: 1 in torch's own convolutions.
        Goes with `positions`.
    mask : Tensor or ndarray, shape (n, tokens), or `fastent.activations.RealTokens` (checked once), optional
        True or 1 for a real token, False or 0 for padding, where activations may be anything, NaN too; goes with
        `tokens`, not with ``batch_dims=1``. "flatten" keeps real tokens and "skip_first" leaves out the first real one
        of each sample, so that a sample without one gives no row; "first" and "last" are the first and last real token,
        wherever the padding is; "mean" is over real tokens.
    batch_dims : {0, 1}
        1 when the first axis counts independent matrices (layers, seeds).
    backend : {"auto", "torch", "triton"}
        See `fastent.covariance`.

    Returns
    -------
    SpectralEntropy
        Floats, or tensors of shape (batch,). On CUDA this waits for the device, once for matrices that LAPACK solves
        (`fastent.linalg.eigenvalues`).

    Raises
    ------
    TypeError
        If `h` or `mask` is not a dense real tensor with data.
    ValueError
        If the shape is wrong or leaves a choice open, n < 2, d < 2, an argument is unknown, an integer is beyond 2^53,
        or `mask` has another shape or device, other values, or no real token where one is asked for.

    Warns
    -----
    UserWarning
        Once, if `h` requires a gradient while gradients are recorded: none flows through the result.

    References
    ----------
    arXiv 2604.13123, Definition 2; Roy and Vetterli, "The effective rank", EUSIPCO 2007.

    Examples
    --------
    >>> import torch
    >>> h = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    >>> spectral_entropy(h).normalized
    1.0
    >>> spectral_entropy(torch.ones(4, 2)).status
    <Status.ZERO_VARIANCE: 'zero_variance'>
    """
    if not isinstance(h, Tensor):
        h = of_array(h, "h")
    elif h.requires_grad and torch.is_grad_enabled():
        warn_of_detached("spectral_entropy")
    if convention not in CONVENTIONS:
        raise ValueError(f"convention must be 'relative' or 'paper'; got {convention!r}")
    rows = Rows(tokens, positions, channel_axis, mask)
    x = checked(h, rows, batch_dims)
    result = entropy_of_rows(x, rows.resolution(h, batch_dims), backend=backend)
    return result if convention == "relative" else by_the_paper(result)


@uncompiled
def entropy_of_eigenvalues(eigenvalues: Tensor | Array) -> SpectralEntropy:
    """Entropy of the spectrum of a covariance, or of any positive semidefinite matrix.

    Parameters
    ----------
    eigenvalues : Tensor or ndarray, shape (d,)
        In any order, of any real dtype; those that came out a little below 0, by up to ``30 d eps`` of their dtype
        times the largest, count as 0.

    Returns
    -------
    SpectralEntropy
        As of `spectral_entropy`, with the same floor of ``d eps`` (of float64) times the largest; `ceiling` is 1, `n` 0
        and no status speaks of samples. All 0 is `zero_variance`.

    Raises
    ------
    TypeError
        If `eigenvalues` is not a dense real tensor or array with data.
    ValueError
        If there are fewer than two or another number of axes, NaN or Inf among them, or one below 0.

    Examples
    --------
    >>> import torch
    >>> round(entropy_of_eigenvalues(torch.tensor([1.0, 1.0, 0.0, 0.0])).normalized, 15)  # log 2 / log 4
    0.5
    """
    given, eps = _float64(eigenvalues, "eigenvalues")
    if given.ndim != 1 or len(given) < 2:
        raise ValueError(f"eigenvalues must have shape (d,) with d at least 2; got {tuple(given.shape)}")
    return _of_spectrum(given.cpu().sort().values, "given", eps)


@uncompiled
def entropy_of_covariance(covariance: Tensor | Array) -> SpectralEntropy:
    """Entropy of a covariance, or of any positive semidefinite matrix.

    Parameters
    ----------
    covariance : Tensor or ndarray, shape (d, d)
        Of any real dtype, symmetric up to ``30 d eps`` of its dtype times its largest entry.

    Returns
    -------
    SpectralEntropy
        As of `entropy_of_eigenvalues`.

    Raises
    ------
    TypeError
        If `covariance` is not a dense real tensor or array with data.
    ValueError
        If it is not square with d at least 2, holds NaN or Inf, is not symmetric, or has an eigenvalue below 0.

    Examples
    --------
    >>> import numpy as np
    >>> entropy_of_covariance(np.eye(3)).normalized
    1.0
    """
    given, eps = _float64(covariance, "covariance")
    if given.ndim != 2 or given.shape[0] != given.shape[1] or len(given) < 2:
        raise ValueError(f"covariance must have shape (d, d) with d at least 2; got {tuple(given.shape)}")
    near_one, exponent = _near_one(given)
    apart = (near_one - near_one.mT).abs()
    if bool((apart > 30 * len(given) * eps).any()):
        i, j = divmod(int(apart.argmax()), len(given))
        raise ValueError(
            f"a covariance is symmetric; got {float(given[i, j]):.6g} at ({i}, {j}) and {float(given[j, i]):.6g} at "
            f"({j}, {i}): of activations take fastent.spectral_entropy"
        )
    symmetric = near_one / 2 + near_one.mT / 2
    return _of_spectrum(*eigenvalues(symmetric), eps, exponent)


def _float64(given: Tensor | Array, name: str) -> tuple[Tensor, float]:
    """`given` in float64, and the spacing at 1 of the dtype it came in; errors as in `entropy_of_eigenvalues`."""
    check_pool()
    tensor = of_array(given, name)
    check_kind(tensor, name)
    x = tensor.detach().to(torch.float64)
    found = first_nonfinite(x)
    if found is not None:
        raise ValueError(f"{name} must be finite; got {found[0]} NaN or Inf, the first at {found[1]}")
    return x, max(Resolution.of(tensor.dtype).relative, EPS)


def _of_spectrum(values: Tensor, solver: str, eps: float, exponent: int = 0) -> SpectralEntropy:
    """Entropy of ascending eigenvalues ``values * 2^exponent``, whose dtype had the spacing `eps`."""
    d, largest = len(values), float(values[-1])
    if float(values[0]) < -30 * d * eps * max(largest, 0.0):
        low, high = _times_power_of_two(values[[0, -1]], exponent).tolist()
        raise ValueError(
            f"eigenvalues of a covariance are not below 0; got {low:.6g} (the largest is {high:.6g}): of a matrix that "
            "is not a covariance take the squares of its singular values"
        )
    # Without samples there is no ceiling: more of them than d.
    zeros = torch.zeros(d, dtype=torch.float64, device="cpu")
    centered = CenteredMatrix(values, zeros, zeros, "covariance", d + 1, d, EXACT)
    if largest <= 0.0:
        return dataclasses.replace(
            unsolved(centered, Status.ZERO_VARIANCE, 0.0, "all eigenvalues are 0: there is no spectrum"), n=0
        )
    near_one, further = _near_one(values)
    result = summarize(centered, near_one, solver, float(near_one.sum()))
    total = _times_power_of_two(near_one.sum(), exponent + further)
    return dataclasses.replace(
        result,
        eigenvalues=_times_power_of_two(near_one, exponent + further),
        total_variance=float(total),
        solver=solver if solver == "given" else result.solver,
        n=0,
        _scaled=(near_one, exponent + further),
    )


def entropy_of_rows(
    x: Tensor, resolution: Resolution, *, backend: Backend = "auto", centered: CenteredMatrix | None = None
) -> SpectralEntropy:
    """Entropy of activations that were `checked`, with the resolution of what they were made of.

    `centered` is what `fastent.covariance.centered_matrix` makes of them, where that is known.
    """
    if centered is None:
        centered = centered_matrix(x, backend=backend, resolution=resolution)
    centered = centered.where_solved()
    if x.ndim == 2:
        trace = float(centered.trace)
        if TINY <= trace < math.inf:
            return summarize(centered, *eigenvalues(centered.matrix), trace, rows=x)
        return _of_extreme_values(x, centered, backend)
    traces = centered.trace.tolist()
    good = [TINY <= trace < math.inf for trace in traces]
    if not all(good):  # a NaN would stop the solver for the whole batch
        kept = torch.tensor(good, dtype=torch.bool, device=centered.matrix.device)[:, None, None]
        centered = centered._replace(matrix=torch.where(kept, centered.matrix, 0.0))
    values, solver = eigenvalues(centered.matrix)
    items = []
    for i, trace in enumerate(traces):
        item = centered._replace(matrix=centered.matrix[i], shift=centered.shift[i], delta=centered.delta[i])
        if good[i]:
            items.append(summarize(item, values[i], solver, trace, rows=x[i]))
        else:
            items.append(_of_extreme_values(x[i], item, backend))
    return _stack(items)


def checked(h: Tensor, rows: Rows, batch_dims: int | None = None) -> Tensor:
    """Activations that a normalised entropy can be taken of; errors as in `spectral_entropy`."""
    x = rows.matrix(h, batch_dims)
    if x.shape[-1] < 2:
        raise ValueError("the normalised entropy divides by log d, so d must be at least 2; got d = 1")
    return x


def _of_extreme_values(x: Tensor, centered: CenteredMatrix, backend: Backend) -> SpectralEntropy:
    """Entropy where the trace was 0, subnormal or not finite: look at the data, scale by a power of two, redo."""
    found = first_nonfinite(x)
    if found is not None:
        count, index = found
        message = f"{count} NaN or Inf in the activations ({x.dtype}), the first at {index}"
        return unsolved(centered, Status.NONFINITE, math.nan, message)
    if not bool((x != x[:1]).any()):
        return constant_rows(centered)
    # Near 1 first, so that row 0 can be subtracted; then the spread near 1, far below a constant column perhaps.
    small, first = _near_one(x.to(torch.float64))
    spread, second = _near_one(small - small[:1])
    exponent = first + second
    scaled = centered_matrix(spread, backend=backend)
    given = centered.resolution
    scaled = scaled._replace(
        shift=_times_power_of_two(small[0], -second),
        resolution=given._replace(absolute=_ldexp(given.absolute, -exponent)),
    ).where_solved()
    again = summarize(scaled, *eigenvalues(scaled.matrix), float(scaled.trace))
    total = _times_power_of_two(scaled.trace.cpu(), 2 * exponent)
    values = _times_power_of_two(again.eigenvalues, 2 * exponent)
    return dataclasses.replace(
        again, eigenvalues=values, total_variance=float(total), _scaled=(again.eigenvalues, 2 * exponent)
    )


def _near_one(x: Tensor) -> tuple[Tensor, int]:
    """`x` with its largest magnitude in [1/2, 1), and the exponent of two that was taken out."""
    exponent = math.frexp(float(x.abs().amax()))[1]
    return _times_power_of_two(x, -exponent), exponent


def _times_power_of_two(x: Tensor, exponent: int) -> Tensor:
    """``x * 2^exponent`` in steps whose factors are floats: one of 2^1074 is not, but a product may be."""
    step = max(-1000, min(1000, exponent))
    return x * 2.0**step if step == exponent else _times_power_of_two(x * 2.0**step, exponent - step)


def _ldexp(x: float, exponent: int) -> float:
    """``x * 2^exponent``, infinite where it is too large for a float."""
    return math.inf if x and math.frexp(x)[1] + exponent > sys.float_info.max_exp else math.ldexp(x, exponent)


def _stack(items: list[SpectralEntropy]) -> SpectralEntropy:
    def column(name: str) -> Tensor:
        return torch.tensor([getattr(item, name) for item in items], dtype=torch.float64, device="cpu")

    flags = sorted({flag for item in items for flag in item.flags}, key=lambda flag: flag.severity)
    messages = dict.fromkeys(item.message for item in items if item.message)
    changes: dict[str, Any] = {
        name: column(name)
        for name in ("normalized", "entropy", "effective_rank", "participation_ratio", "total_variance")
    }
    return dataclasses.replace(
        items[0],
        eigenvalues=torch.stack([item.eigenvalues for item in items]),
        status=max((item.status for item in items), key=lambda status: status.severity),
        flags=tuple(flags),
        message="; ".join(messages),
        solver=", ".join(dict.fromkeys(item.solver for item in items)),
        _items=tuple(items),
        _scaled=None,
        **changes,
    )
