"""A masked entropy is that of the real tokens' rows picked one by one, whatever the padding holds and where it is."""

from typing import get_args

import numpy as np
import torch
from hypothesis import assume
from hypothesis import strategies as st

from fastent.activations import Tokens
from properties.backends import Backend, Reference, for_every_backend
from properties.strategies import Padded, padded

CHOICES = st.sampled_from(get_args(Tokens))
# A mean of a few numbers near 1 is rounded once or twice; the spectra here decay by 100 at most.
CLOSE = 1e-12


def picked(h: Padded, tokens: Tokens) -> torch.Tensor:
    """Rows by hand."""
    own = [sample[kept].double() for sample, kept in zip(h.tensor(), h.mask() == 1, strict=True)]
    if tokens in ("flatten", "skip_first"):
        return torch.cat([rows[int(tokens == "skip_first") :] for rows in own])
    one = {"first": lambda rows: rows[0], "last": lambda rows: rows[-1], "mean": lambda rows: rows.mean(0)}
    return torch.stack([one[tokens](rows) for rows in own])


@for_every_backend(h=padded(), tokens=CHOICES)
def test_masked_entropy_is_that_of_the_rows_picked_by_hand(
    backend: Backend, h: Padded, tokens: Tokens
) -> None:
    x, mask, by_hand = h.tensor(), h.mask(), picked(h, tokens)
    assume(len(by_hand) >= 2)
    got, expected = backend.result(x, tokens=tokens, mask=mask), Reference().result(by_hand)
    assert abs(got.normalized - expected.normalized) < CLOSE
    assert abs(got.total_variance - expected.total_variance) < CLOSE
    assert got.ceiling == expected.ceiling


@for_every_backend(0.3, h=padded(), tokens=CHOICES)
def test_masked_moments_are_those_of_the_rows_picked_by_hand(
    backend: Backend, h: Padded, tokens: Tokens
) -> None:
    x, mask, by_hand = h.tensor(), h.mask(), picked(h, tokens)
    assume(len(by_hand) >= 1)
    moments = backend.moments(x, tokens=tokens, mask=mask)
    assert moments.n == len(by_hand)
    mean = torch.as_tensor(
        np.asarray(moments.mean, dtype=float) if backend.name == "reference" else moments.mean
    )
    assert (mean.cpu() - by_hand.mean(0)).abs().max() < CLOSE


@for_every_backend(0.3, h=padded(), tokens=CHOICES)
def test_a_mask_without_padding_changes_no_bit(backend: Backend, h: Padded, tokens: Tokens) -> None:
    x = h.but(lengths=(h.tokens,) * len(h.lengths)).tensor()
    assume(tokens != "skip_first" or h.tokens > 1)
    ones = torch.ones(x.shape[:2], dtype=h.mask_dtype)
    masked, plain = backend.result(x, tokens=tokens, mask=ones), backend.result(x, tokens=tokens)
    assert masked.entropy == plain.entropy
    assert masked.total_variance == plain.total_variance


@for_every_backend(
    0.5,
    shape=st.tuples(st.integers(2, 5), st.integers(2, 5), st.integers(2, 4), st.integers(1, 3)),
    positions=st.sampled_from(["flatten", "mean"]),
    channel_axis=st.integers(1, 3),
    one_dimensional=st.booleans(),
    seed=st.integers(0, 99),
)
def test_positions_of_a_map_are_the_rows_picked_by_hand(
    backend: Backend,
    shape: tuple[int, ...],
    positions: str,
    channel_axis: int,
    one_dimensional: bool,
    seed: int,
) -> None:
    h = torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))
    if one_dimensional:
        h, channel_axis = h[..., 0], min(channel_axis, 2)
    assume(h.shape[channel_axis] >= 2)
    choice = {"positions": positions, "channel_axis": channel_axis}
    by_hand = h.movedim(channel_axis, -1).flatten(1, -2)
    by_hand = by_hand.mean(1) if positions == "mean" else by_hand.flatten(0, 1)
    got, expected = backend.result(h, **choice), Reference().result(by_hand)
    assert abs(got.normalized - expected.normalized) < CLOSE
    assert abs(got.total_variance - expected.total_variance) < CLOSE
