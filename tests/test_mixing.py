"""The mixing intervention: its definition, its gradient and its bad arguments."""

import pytest
import torch

from fastent import mix_representations


def test_each_row_is_mixed_with_the_one_shift_places_on():
    h = torch.arange(10.0).reshape(5, 2)
    for shift in (1, 2, -1, 6):
        mixed = mix_representations(h, alpha=0.25, shift=shift)
        for i in range(5):
            assert torch.equal(mixed[i], 0.75 * h[i] + 0.25 * h[(i + shift) % 5])


def test_leading_axes_are_mixed_apart():
    h = torch.randn(3, 5, 2)
    mixed = mix_representations(h)
    for item, alone in zip(mixed, h, strict=True):
        assert torch.equal(item, mix_representations(alone))


def test_alpha_0_changes_nothing_and_alpha_1_shifts():
    h = torch.randn(5, 2)
    assert torch.equal(mix_representations(h, alpha=0.0), h)
    assert torch.equal(mix_representations(h, alpha=1.0), h.roll(-1, 0))


def test_gradients_flow_through_both_rows():
    h = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(mix_representations, (h,))


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_alpha_outside_0_to_1_is_an_error(alpha):
    with pytest.raises(ValueError, match="between 0 and 1"):
        mix_representations(torch.zeros(4, 2), alpha=alpha)


@pytest.mark.parametrize("shift", [0, 4, -8])
def test_a_shift_that_mixes_rows_with_themselves_is_an_error(shift):
    with pytest.raises(ValueError, match="multiple of the number of rows"):
        mix_representations(torch.zeros(4, 2), shift=shift)
