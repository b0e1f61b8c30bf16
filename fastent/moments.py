"""Streaming and sharded moments: the covariance of data that is never in one place.

A state is (n, shift, mean - shift, M2), M2 the centred sum of products, all float64. Parts merge by Chan, Golub and
LeVeque (1983) on differences of shifts, never by raw sums: those lose eps * (offset / spread)^2, all digits at an
offset of 1e8. The mean is kept as two parts since their sum rounds at the size of the offset.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastent.activations import Positions, RealTokens, Tokens, rows_of
from fastent.covariance import Backend, CenteredMatrix, centered_matrix, mirror_lower
from fastent.spectrum import SpectralEntropy, entropy_of_matrix
from fastent.spread import device_of_group


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
        self.n = 0
        self._resolution = 0.0
        # shift (d,), delta = mean - shift (d,), products (d, d) lower triangle; None until the first row
        self._state: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def mean(self) -> Tensor:
        """Mean of the rows, shape (d,), float64.

        Raises
        ------
        ValueError
            If no row was seen.
        """
        shift, delta, _ = self._filled()
        return shift + delta

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
            See `fastent.spectral_entropy`. A batch that is padding alone adds no row.

        Returns
        -------
        Moments
            Itself.

        Raises
        ------
        TypeError, ValueError
            For unusable input, or when d differs from before.
        """
        x = rows_of(
            h, tokens=tokens, positions=positions, channel_axis=channel_axis, mask=mask, batch_dims=None
        )
        if len(x) == 0:
            return self
        part = Moments()
        part._resolution = torch.finfo(x.dtype).eps
        if len(x) == 1:
            shift = x[0].to(torch.float64, copy=True)
            part.n = 1
            part._state = (shift, torch.zeros_like(shift), shift.new_zeros(len(shift), len(shift)))
        else:
            centered = centered_matrix(x, backend=backend, side="covariance", scale=1.0, exact_mean=True)
            part.n = centered.n
            part._state = (centered.shift, centered.delta, centered.matrix)
        return self.merge(part)

    def merge(self, other: Moments) -> Moments:
        """Add the rows that `other` has seen; `other` stays as it is.

        Returns
        -------
        Moments
            Itself.

        Raises
        ------
        ValueError
            If d differs.
        """
        if other._state is None:
            return self
        self._resolution = max(self._resolution, other._resolution)
        if self._state is None:
            self.n = other.n
            self._state = other._state
            return self
        shift, delta, products = self._state
        other_shift, other_delta, other_products = other._state
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
        )
        self.n = n
        return self

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> Moments:
        """Moments of all ranks of a group together, on every rank; a collective call.

        Ranks may be empty. One gather of the counts, one broadcast of a common shift, one sum of products about
        it: (2 d + d^2) float64 per rank.

        Parameters
        ----------
        group : ProcessGroup, optional
            The default group if left out.

        Returns
        -------
        Moments
            New; this one stays as it is, so calling twice counts nothing twice. NaN on one rank reaches all.

        Raises
        ------
        ValueError
            On every rank, if d differs between ranks or no rank has a row.
        """
        device = self._state[0].device if self._state is not None else device_of_group(group)
        mine = torch.tensor(
            [float(self.n), 0.0 if self._state is None else float(len(self._state[0])), self._resolution],
            dtype=torch.float64,
            device=device,
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
        d = widths[0]
        root = int((counts[:, 0] > 0).to(torch.uint8).argmax())
        common = torch.zeros(d, dtype=torch.float64, device=device)
        if dist.get_rank(group) == root:
            common.copy_(self.mean)
        dist.broadcast(common, group=group, group_src=root)
        packed = torch.zeros(d + d * d, dtype=torch.float64, device=device)
        if self._state is not None:
            shift, delta, products = self._state
            gap = (shift - common) + delta
            packed[:d] = self.n * gap
            packed[d:] = (products + self.n * torch.outer(gap, gap)).tril().flatten()
        dist.all_reduce(packed, group=group)
        total = Moments()
        total.n = int(filled[:, 0].sum())
        total._resolution = float(filled[:, 2].max())
        sums, products = packed[:d], packed[d:].view(d, d)
        delta = sums / total.n
        total._state = (common, delta, products - torch.outer(sums, delta))
        return total

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
        _, _, products = self._at_least_two()
        if correction >= self.n:
            raise ValueError(
                f"the normaliser is n - correction and must be positive; got n = {self.n}, {correction = }"
            )
        return mirror_lower(products / (self.n - correction))

    def spectral_entropy(self) -> SpectralEntropy:
        """Entropy of the covariance of all rows; see `fastent.spectral_entropy`.

        The rows are gone, so values near 1e200 or 1e-200 cannot be scaled and tried again: `out_of_range`.

        Raises
        ------
        ValueError
            If fewer than two rows were seen, or d = 1.
        """
        shift, delta, products = self._at_least_two()
        if len(shift) < 2:
            raise ValueError("the normalised entropy divides by log d, so d must be at least 2; got d = 1")
        return entropy_of_matrix(
            CenteredMatrix(
                products / self.n, shift, delta, "covariance", self.n, len(shift), self._resolution
            )
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain dictionary of numbers and tensors, for a checkpoint."""
        state: dict[str, Any] = {"n": self.n, "resolution": self._resolution}
        if self._state is not None:
            state |= dict(
                zip(("shift", "delta", "products"), (part.clone() for part in self._state), strict=True)
            )
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave; raises KeyError when a part is missing."""
        self.n = int(state["n"])
        self._resolution = float(state["resolution"])
        self._state = None
        if self.n:
            self._state = (state["shift"].clone(), state["delta"].clone(), state["products"].clone())

    def _filled(self) -> tuple[Tensor, Tensor, Tensor]:
        if self._state is None:
            raise ValueError("these moments have seen no row yet: call update first")
        return self._state

    def _at_least_two(self) -> tuple[Tensor, Tensor, Tensor]:
        if self.n < 2:
            raise ValueError(f"a covariance needs at least 2 rows; these moments have seen N = {self.n}")
        return self._filled()
