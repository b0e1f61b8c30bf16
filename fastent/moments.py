"""Streaming and sharded moments: the covariance of data that is never in one place.

A state is (n, shift, mean - shift, M2, rounding), M2 the centred sum of products, rounding what the dtypes of the rows
add to its trace (`fastent.activations`), all float64. Parts merge by Chan, Golub and LeVeque (1983) on differences of
shifts, never by raw sums: those lose eps * (offset / spread)^2, all digits at an offset of 1e8. The mean is kept as two
parts since their sum rounds at the size of the offset.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastent.activations import (
    EXACT,
    RESOLUTIONS,
    Positions,
    RealTokens,
    Resolution,
    Rows,
    Tokens,
    held_dtype,
    squared_relative,
)
from fastent.covariance import Backend, CenteredMatrix, centered_matrix, mirror_lower
from fastent.entropy import SpectralEntropy, entropy_of_matrix
from fastent.linalg import check_pool
from fastent.process import uncompiled

_MOST_ROWS = 2**53  # as float64 counts them


class Moments:
    """Count, mean and centred products of rows seen so far, exact however they are split.

    Examples
    --------
    >>> import torch
    >>> h = torch.randn(100, 8)
    >>> parts = Moments().update(h[:30]).merge(Moments().update(h[30:]))
    >>> parts.n, torch.allclose(parts.covariance(), torch.cov(h.T.double(), correction=0))
    (100, True)

    References
    ----------
    Chan, Golub and LeVeque, "Algorithms for computing the sample variance", 1983.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> Moments:
        """Forget all rows.

        Returns
        -------
        Moments
            Itself.
        """
        self.n = 0
        self._finest = math.inf  # relative spacing of the finest dtype among the rows
        # shift (d,), delta = mean - shift (d,), products (d, d) lower triangle, rounding (); None until the first row
        self._state: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
        self._ranks: list[int] = []  # whose rows these are, after all_reduce
        self._grown = False  # by rows of one rank, since
        return self

    @property
    def mean(self) -> Tensor:
        """Mean of the rows, shape (d,), float64.

        Raises
        ------
        ValueError
            If no row was seen.
        """
        shift, delta, _, _ = self._filled()
        return shift + delta

    @uncompiled
    def update(
        self,
        h: Tensor,
        *,
        tokens: Tokens | None = None,
        positions: Positions | None = None,
        channel_axis: int | None = None,
        mask: Tensor | RealTokens | None = None,
        backend: Backend = "auto",
    ) -> Moments:
        """Add rows.

        Parameters
        ----------
        h : Tensor, shape (k, d)
            Any number of rows of any real dtype, none included. (k, tokens, d) needs `tokens`, a map `positions`.
        tokens, positions, channel_axis, mask, backend
            See `fastent.spectral_entropy`. A batch that is padding alone adds no row; by a mask of floating-point
            numbers that would be an additive one perhaps, and is an error.

        Returns
        -------
        Moments
            Itself.

        Raises
        ------
        TypeError, ValueError
            For unusable input, or when d differs from before.
        """
        rows = Rows(tokens, positions, channel_axis, mask)
        x = rows.of(h)
        if len(x) == 0:
            return self
        resolution = rows.resolution(h)
        part = Moments()
        part.n, part._finest = len(x), resolution.relative
        if part.n == 1:
            shift = x[0].to(torch.float64, copy=True)
            parts = (shift, torch.zeros_like(shift), shift.new_zeros(len(shift), len(shift)))
        else:
            centered = centered_matrix(x, backend=backend, side="covariance", scale=1.0, exact_mean=True)
            parts = (centered.shift, centered.delta, centered.matrix)
        part._state = (*parts, _rounding(x, resolution, *parts))
        return self.merge(part)

    def merge(self, other: Moments) -> Moments:
        """Add the rows that `other` has seen; `other` stays as it is.

        Returns
        -------
        Moments
            Itself.

        Raises
        ------
        TypeError
            If `other` is no Moments: rows are added by `update`.
        ValueError
            If d differs.
        """
        check_pool()
        if not isinstance(other, Moments):
            raise TypeError(f"merge takes Moments; got {type(other).__name__}: rows are added by update")
        if other._state is None:
            return self
        if self._state is None:
            self.n, self._finest = other.n, other._finest
            self._state = other._state
            self._ranks, self._grown = other._ranks, other._grown
            return self
        shift, delta, products, rounding = self._state
        other_shift, other_delta, other_products, other_rounding = other._state
        if len(shift) != len(other_shift):
            raise ValueError(
                f"d changed: these moments have d = {len(shift)}, the new rows d = {len(other_shift)}"
            )
        n = self.n + other.n
        gap = (other_shift - shift) + (other_delta - delta)
        weighted = gap * (self.n * other.n / n)
        self._state = (
            shift,
            delta + gap * (other.n / n),
            products + other_products + torch.outer(weighted, gap),
            rounding + other_rounding,
        )
        self.n, self._finest = n, min(self._finest, other._finest)
        self._ranks, self._grown = self._ranks or other._ranks, True
        return self

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> Moments:
        """Add the rows of all other ranks of a group, so that each rank has those of all; a collective call.

        Ranks may be empty. One gather of the counts, one broadcast of a common shift, one sum of products about
        it: (1 + 2 d + d^2) float64 per rank. To go on collecting on each rank, add up a copy:
        ``Moments().merge(mine).all_reduce()``.

        Parameters
        ----------
        group : ProcessGroup, optional
            The default group if left out.

        Returns
        -------
        Moments
            Itself. A second call for the same ranks changes nothing. NaN on one rank reaches all.

        Raises
        ------
        ValueError
            On every rank, if d differs between ranks, no rank has a row, or a rank has added rows to those of all
            ranks, which would be counted once for each rank.
        """
        device = self._state[0].device if self._state is not None else device_of_group(group)
        ranks = dist.get_process_group_ranks(dist.group.WORLD if group is None else group)
        d = 0 if self._state is None else len(self._state[0])
        whole = 1 + self._grown if self._ranks == ranks else 0
        mine = torch.tensor(
            [float(self.n), float(d), self._finest, float(whole)], dtype=torch.float64, device=device
        )
        gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(gathered, mine, group=group)
        counts = torch.stack(gathered).cpu()
        filled = counts[counts[:, 0] > 0]
        widths = sorted({int(width) for width in filled[:, 1]})
        if len(widths) != 1:
            raise ValueError(
                f"ranks must hold rows of one width d; got d = {widths}" if widths else "no rank holds a row"
            )
        if bool((counts[:, 3] == 1).all()):
            return self
        if bool((counts[:, 3] > 0).any()):
            raise ValueError(
                "some ranks hold the rows of all ranks already, and further ones: they would be counted once for each "
                "rank. Keep each rank's own and add up a copy, Moments().merge(own).all_reduce(), or reset()"
            )
        d = widths[0]
        root = int((counts[:, 0] > 0).to(torch.uint8).argmax())
        common = torch.zeros(d, dtype=torch.float64, device=device)
        if dist.get_rank(group) == root:
            common.copy_(self.mean)
        dist.broadcast(common, group=group, group_src=root)
        packed = torch.zeros(1 + d + d * d, dtype=torch.float64, device=device)
        if self._state is not None:
            shift, delta, products, rounding = self._state
            gap = (shift - common) + delta
            packed[0] = rounding
            packed[1 : 1 + d] = self.n * gap
            packed[1 + d :] = (products + self.n * torch.outer(gap, gap)).tril().flatten()
        dist.all_reduce(packed, group=group)
        self.n = int(filled[:, 0].sum())
        self._finest = float(filled[:, 2].min())
        sums, products = packed[1 : 1 + d], packed[1 + d :].view(d, d)
        delta = sums / self.n
        self._state = (common, delta, products - torch.outer(sums, delta), packed[0])
        self._ranks, self._grown = ranks, False
        return self

    @uncompiled
    def covariance(self, *, correction: int = 0) -> Tensor:
        """Covariance of all rows, shape (d, d), float64, symmetric bit for bit.

        Parameters
        ----------
        correction : int
            The normaliser is ``n - correction``.

        Raises
        ------
        ValueError
            If fewer than two rows were seen or ``n <= correction``.
        """
        _, _, products, _ = self._at_least_two()
        if not correction < self.n:
            raise ValueError(
                f"the normaliser is n - correction and must be positive; got n = {self.n}, {correction = }"
            )
        return mirror_lower(products / (self.n - correction))

    @uncompiled
    def spectral_entropy(self) -> SpectralEntropy:
        """Entropy of the covariance of all rows; see `fastent.spectral_entropy`.

        The rows are gone, so values near 1e200 or 1e-200 cannot be scaled and tried again: `out_of_range`.

        Raises
        ------
        ValueError
            If fewer than two rows were seen, or d = 1.
        """
        shift, delta, products, rounding = self._at_least_two()
        if len(shift) < 2:
            raise ValueError("the normalised entropy divides by log d, so d must be at least 2; got d = 1")
        return entropy_of_matrix(
            CenteredMatrix(
                products / self.n,
                shift,
                delta,
                "covariance",
                self.n,
                len(shift),
                Resolution(self._finest, 0.0),
                float(rounding) / self.n,
            )
        )

    def pack(self) -> Tensor:
        """All rows in one vector, to send or to store; `unpack` reads it.

        What it does not hold is that `all_reduce` added up the ranks' rows, which `state_dict` does: what is unpacked
        counts as one rank's own.

        Returns
        -------
        Tensor, shape (3 + 2 d + d (d + 1) / 2,) or (3,) without rows, float64
            n; rounding; finest relative spacing; shift; mean - shift; the lower triangle of the products, row by
            row. Every element is defined: equal moments give equal bits.
        """
        check_pool()
        if self._state is None:
            return torch.tensor([0.0, 0.0, self._finest], dtype=torch.float64, device="cpu")
        shift, delta, products, rounding = self._state
        head = shift.new_tensor([float(self.n), 0.0, self._finest])
        head[1] = rounding
        below = torch.ones(products.shape, dtype=torch.bool, device=products.device).tril()
        return torch.cat([head, shift, delta, products[below]])

    @classmethod
    def unpack(cls, packed: Tensor) -> Moments:
        """Moments of what `pack` gave, on its device.

        Raises
        ------
        TypeError
            If it is no tensor with data.
        ValueError
            If it has another dtype or shape, or numbers that cannot be.
        """
        check_pool()
        if not isinstance(packed, Tensor) or packed.is_meta:
            what = "a meta tensor" if isinstance(packed, Tensor) else type(packed).__name__
            raise TypeError(
                f"packed moments are a float64 tensor; got {what}: of a list of numbers use torch.tensor(numbers, "
                "dtype=torch.float64)"
            )
        size = packed.numel() if packed.ndim == 1 else -1
        d = (math.isqrt(25 + 8 * (size - 3)) - 5) // 2 if size >= 3 else 0
        if packed.dtype != torch.float64 or size != 3 + 2 * d + d * (d + 1) // 2:
            raise ValueError(
                "packed moments are float64 of shape (3 + 2 d + d (d + 1) / 2,); "
                f"got {packed.dtype}, {tuple(packed.shape)}"
            )
        n, rounding, finest = packed[:3].tolist()
        if not 0 <= n <= _MOST_ROWS or not n.is_integer() or (n > 0) != (d > 0):
            raise ValueError(
                f"packed moments of n rows have n = 0 and d = 0, or both positive; got {n = }, {d = }"
            )
        if rounding < 0.0 or not finest >= 0.0:
            raise ValueError(
                f"packed moments have a rounding and a spacing of 0 or more; got {rounding}, {finest}"
            )
        moments = cls()
        if n:
            packed = packed.detach().clone()
            shift, delta, lower = packed[3:].split([d, d, d * (d + 1) // 2])  # type: ignore[no-untyped-call]
            products = packed.new_zeros(d, d)
            products[torch.ones(d, d, dtype=torch.bool, device=packed.device).tril()] = lower
            if bool((products.diagonal() < 0.0).any()):
                raise ValueError("packed moments have sums of squares of 0 or more, and here one is below 0")
            moments.n, moments._finest = int(n), finest
            moments._state = (shift, delta, products, packed[1])
        return moments

    def state_dict(self) -> dict[str, Any]:
        """Plain dictionary of a tensor (`pack`) and of the ranks that `all_reduce` added up, for a checkpoint."""
        return {"packed": self.pack(), "ranks": list(self._ranks), "grown": self._grown}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave.

        Raises
        ------
        KeyError, ValueError
            When a part is missing or has another shape; then nothing is taken over.
        """
        loaded = Moments.unpack(state["packed"])
        ranks, grown = [int(rank) for rank in state["ranks"]], bool(state["grown"])
        self.n, self._finest, self._state = loaded.n, loaded._finest, loaded._state
        self._ranks, self._grown = ranks, grown

    def __eq__(self, other: object) -> bool:
        """Whether both hold the same bits: those of the same rows in the same parts do."""
        if not isinstance(other, Moments):
            return NotImplemented
        ours, theirs = (moments.pack().cpu().view(torch.int64) for moments in (self, other))
        return torch.equal(ours, theirs)

    def __repr__(self) -> str:
        return f"Moments(n={self.n}" + (f", d={len(self._state[0])})" if self._state is not None else ")")

    def _filled(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        check_pool()
        if self._state is None:
            raise ValueError("these moments have seen no row yet: call update first")
        return self._state

    def _at_least_two(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if self.n < 2:
            raise ValueError(f"a covariance needs at least 2 rows; these moments have seen N = {self.n}")
        return self._filled()


def _rounding(x: Tensor, resolution: Resolution, shift: Tensor, delta: Tensor, products: Tensor) -> Tensor:
    """Variance that rounding adds to the trace of `products`, shape (), float64 on their device.

    On the CPU values are looked at as `spectral_entropy` does; on a device, which is not waited for, a few always are.
    """
    n, d = x.shape
    mean = shift + delta
    offset, trace = n * mean.dot(mean), products.trace()
    squared: float | Tensor = resolution.relative**2
    if x.device.type == "cpu":
        total = float(trace.numpy())
        if not math.isnan(total):
            ratio = float(offset.numpy()) / total if total > 0.0 else math.inf
            narrow = held_dtype(x, resolution, ratio, math.sqrt(n * d / total) if total > 0.0 else math.inf)
            if narrow is not None:
                resolution = RESOLUTIONS[narrow]
                squared = resolution.relative**2
    elif resolution != EXACT:
        squared = squared_relative(x, resolution)
    return (squared * (offset + trace) + resolution.absolute**2 * (n * d)) / 12.0


def device_of_group(group: dist.ProcessGroup | None) -> torch.device:
    """Device that the tensors of a group's collective calls must be on."""
    nccl = dist.get_backend(group) == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
