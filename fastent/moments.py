"""Streaming and sharded moments: the covariance of data that is never in one place.

A state is (n, shift, mean - shift, M2, rounding), M2 the centred sum of products, rounding what the dtypes of the rows
add to its trace (`fastent.activations`), all float64. Parts merge by Chan, Golub and LeVeque (1983) on differences of
shifts, never by raw sums: those lose eps * (offset / spread)^2, all digits at an offset of 1e8. The mean is kept as two
parts since their sum rounds at the size of the offset.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastent.activations import (
    EXACT,
    RESOLUTIONS,
    Array,
    Positions,
    RealTokens,
    Resolution,
    Rows,
    Tokens,
    held_dtype,
    of_array,
    squared_relative,
)
from fastent.covariance import Backend, CenteredMatrix, centered_matrix, mirror_lower
from fastent.entropy import SpectralEntropy, entropy_of_matrix
from fastent.linalg import check_pool
from fastent.process import uncompiled

_MOST_ROWS = 2**53  # as float64 counts them

_log = logging.getLogger(__name__)


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
        h: Tensor | Array,
        *,
        tokens: Tokens | None = None,
        positions: Positions | None = None,
        channel_axis: int | None = None,
        mask: Tensor | Array | RealTokens | None = None,
        backend: Backend = "auto",
    ) -> Moments:
        """Add rows.

        Parameters
        ----------
        h : Tensor or ndarray, shape (k, d)
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
        if not isinstance(h, Tensor):
            h = of_array(h, "h")
        rows = Rows(tokens, positions, channel_axis, mask)
        x = rows.of(h)
        return self.add_rows(x, rows.resolution(h), backend=backend) if len(x) else self

    def add_rows(self, x: Tensor, resolution: Resolution, *, backend: Backend = "auto") -> Moments:
        """Add rows that were checked, one at least, with the resolution of what they were made of."""
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

        Ranks may be empty. Two sums, of the counts and of the rest (`add_up`): 3 R + R (3 + 2 d) + d (d + 1) / 2
        float64 for R ranks. To go on collecting on each rank, add up a copy: ``Moments().merge(mine).all_reduce()``.

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
        RuntimeError
            If ranks did not come, with their numbers.
        """
        ranks = dist.get_process_group_ranks(dist.group.WORLD if group is None else group)
        d = 0 if self._state is None else len(self._state[0])
        whole = 1 + self._grown if self._ranks == ranks else 0
        counts = add_up([], [], group, notes=[self.n, d, whole])
        widths = sorted({int(d) for n, d, _ in counts if n > 0})
        if len(widths) != 1:
            raise ValueError(
                f"ranks must hold rows of one width d; got d = {widths}" if widths else "no rank holds a row"
            )
        if all(whole == 1 for *_, whole in counts):
            return self
        if any(whole > 0 for *_, whole in counts):
            raise ValueError(
                "some ranks hold the rows of all ranks already, and further ones: they would be counted once for each "
                "rank. Keep each rank's own and add up a copy, Moments().merge(own).all_reduce(), or reset()"
            )
        add_up([self], widths, group)
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
        return entropy_of_matrix(self.centered())

    def centered(self) -> CenteredMatrix:
        """Covariance of all rows, and what else their entropy is made of, on their device.

        Raises
        ------
        ValueError
            As `spectral_entropy` does.
        """
        shift, delta, products, rounding = self._at_least_two()
        d = len(shift)
        if d < 2:
            raise ValueError("the normalised entropy divides by log d, so d must be at least 2; got d = 1")
        resolution = Resolution(self._finest, 0.0)
        matrix, added = products / self.n, rounding / self.n
        return CenteredMatrix(matrix, shift, delta, "covariance", self.n, d, resolution, added)

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
            finite = products.diagonal().isfinite()
            if bool((~products.isfinite() & finite & finite[:, None]).any()):
                raise ValueError(
                    "packed moments have finite products where the sums of squares are, and here one is not"
                )
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

    def _take_sum(self, slots: Tensor, heads: Tensor, lower: Tensor) -> None:
        """Become the sum over ranks.

        Parameters
        ----------
        slots : Tensor, shape (ranks, 3 + 2 d)
            Each rank's n, rounding, finest spacing, shift, and mean - shift.
        heads : Tensor
            The same on the host.
        lower : Tensor, shape (d (d + 1) / 2,)
            Sum of the products about each rank's own mean.
        """
        filled = heads[:, 0] > 0
        if not bool(filled.any()):
            return
        n = heads[filled, 0]
        slots = slots[filled.to(slots.device)]
        device = slots.device if self._state is None else self._state[0].device
        shifts, deltas = slots[:, 3:].tensor_split(2, dim=1)
        shift = shifts[0]
        means = (shifts - shift) + deltas
        share = slots[:, 0] / float(n.sum())
        delta = share @ means
        apart = means - delta
        products = (apart * slots[:, :1]).mT @ apart
        products[torch.ones(products.shape, dtype=torch.bool, device=slots.device).tril()] += lower
        self.n, self._finest = int(n.sum()), float(heads[filled, 2].min())
        parts = (shift.clone(), delta, products, slots[:, 1].sum())
        self._state = tuple(part.to(device) for part in parts)  # type: ignore[assignment]

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


def add_up(
    parts: Sequence[Moments],
    widths: Sequence[int],
    group: dist.ProcessGroup | None = None,
    *,
    notes: Sequence[float] = (),
) -> list[list[float]]:
    """Give each of `parts` the rows of all ranks, in one all-reduce for all of them.

    A rank writes its counts and means to a place of its own, so that their sum over the ranks is what each of them
    wrote, and its lower triangle of products about its own mean to where all write. What the means' differences add
    to the products every rank finds by itself, about the first row of the first rank that has one: no sum runs over
    raw values, and no shift has to be agreed on before.

    Parameters
    ----------
    parts : sequence of Moments
        As many, in the same order, on every rank; any may be empty. They keep their devices.
    widths : sequence of int
        Features d of each, the same on every rank.
    group : ProcessGroup, optional
        The default group if left out.
    notes : sequence of float
        What to tell the other ranks, as many on each.

    Returns
    -------
    list of list of float
        Notes of each rank, in the order of the group.

    Raises
    ------
    RuntimeError
        If ranks did not come, with their numbers.
    """
    device = device_of_group(group)
    ranks, own = dist.get_world_size(group), dist.get_rank(group)
    ends = list(itertools.accumulate([len(notes), *(3 + 2 * d for d in widths)]))
    slots = torch.zeros(ranks, ends[-1], dtype=torch.float64, device=device)
    slots[own, : len(notes)] = torch.tensor(notes, dtype=torch.float64, device=device)
    products = []
    for part, d, start, end in zip(parts, widths, ends, ends[1:], strict=False):
        if part.n:
            head, lower = part.pack().to(device).tensor_split([3 + 2 * d])
            slots[own, start:end] = head
        else:
            lower = slots.new_zeros(d * (d + 1) // 2)
        products.append(lower)
    buffer = torch.cat([slots.flatten(), *products])
    _all_reduce(buffer, group)
    slots = buffer[: slots.numel()].view_as(slots)
    heads = slots.cpu()
    place = slots.numel()
    for part, d, start, end in zip(parts, widths, ends, ends[1:], strict=False):
        size = d * (d + 1) // 2
        part._take_sum(slots[:, start:end], heads[:, start:end], buffer[place : place + size])
        place += size
    found: list[list[float]] = heads[:, : len(notes)].tolist()
    return found


# Seconds after which a rank that waits says that it is there; and how long one that was let down looks who is.
_QUIET, _LOOKING = 0.5, 5.0
# Seconds of waiting after which the ranks that are not there are named in the log: not every backend raises.
_LONG = 30.0
_calls: Counter[str] = Counter()


def _all_reduce(buffer: Tensor, group: dist.ProcessGroup | None) -> None:
    """Sum over the ranks, in place. Waits as long as the group does; who is not there is then named.

    While all come in time, that takes nothing beyond the sum itself: no barrier, and no word to the group's store.
    """
    name = (dist.distributed_c10d._get_default_group() if group is None else group).group_name
    _calls[name] += 1
    ranks = _Present(f"fastent/{name}/{_calls[name]}", group)
    start = time.monotonic()
    try:
        work = dist.all_reduce(buffer, group=group, async_op=True)
        while not work.is_completed():
            waited = time.monotonic() - start
            if waited > _QUIET:
                ranks.report()
            if waited > _LONG:
                ranks.log(waited)
            time.sleep(min(max(waited / 16, 2e-5), 0.05))
        work.wait()
    except RuntimeError as error:
        missing = ranks.missing(until=max(start + _LOOKING, time.monotonic() + 2 * _QUIET))
        if missing is None:
            raise
        waited = time.monotonic() - start
        raise RuntimeError(
            f"{missing} did not come to a sum over the ranks, for which this one waited {waited:.1f} s: gone, late, or "
            "not called for it (every rank must evaluate at the same steps)"
        ) from error


class _Present:
    """Which ranks have come to a collective call, by the group's store; asked only when it takes too long.

    Parameters
    ----------
    key : str
        Of this call, the same on every rank.
    group : ProcessGroup or None
        Whose ranks.
    """

    def __init__(self, key: str, group: dist.ProcessGroup | None) -> None:
        self._key, self._group = key, group
        self._reported = self._logged = False

    def report(self) -> None:
        """Tell the others that this rank is there."""
        if not self._reported:
            self._reported = True
            with suppress(RuntimeError):  # the store may be gone with the rank that has it
                dist.distributed_c10d._get_default_store().set(f"{self._key}/{dist.get_rank()}", "there")

    def log(self, waited: float) -> None:
        """Name once in the log who is not there."""
        if not self._logged:
            self._logged = True
            with suppress(RuntimeError):
                _log.warning(
                    "for %.0f s a sum over the ranks waits for %s", waited, named_ranks(self._absent())
                )

    def missing(self, until: float) -> str | None:
        """Name the ranks that are not there by then; None if all are, or the store does not tell."""
        self.report()
        try:
            absent = self._absent()
            while absent and time.monotonic() < until:
                time.sleep(0.05)
                absent = self._absent()
        except RuntimeError:
            return None
        return named_ranks(absent) if absent else None

    def _absent(self) -> list[int]:
        ranks = dist.get_process_group_ranks(dist.group.WORLD if self._group is None else self._group)
        store = dist.distributed_c10d._get_default_store()
        return [rank for rank in ranks if not store.check([f"{self._key}/{rank}"])]


def named_ranks(ranks: Sequence[int]) -> str:
    """Say which ranks these are."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
