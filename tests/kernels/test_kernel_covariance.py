"""The kernels against long double two-pass references, closed forms and themselves under other strides."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import GridExecutor

from fastent.kernels.covariance import covariance, covariance_launches, gram, shifted_covariance
from fastent.kernels.launch import Launch, output, workspace
from fastent.reference.covariance import EXTENDED_EPS, centered

EPS = float(np.finfo(np.float64).eps)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
Kernel = Callable[..., tuple[Tensor, Tensor]]

both_sides = pytest.mark.parametrize("kernel", [covariance, gram])
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
extended = pytest.mark.skipif(EXTENDED_EPS > 1e-18, reason=f"eps of a long double is {EXTENDED_EPS} here")

# No multiple of anything; tails of all but one and of one; the larger tile; two parts; nine, added in three groups.
SHAPES = ((2, 1), (41, 127), (31, 32), (257, 17), (17, 257), (129, 33), (576, 3), (3, 576))


def activations(n: int, d: int, dtype: torch.dtype = torch.float64, *, offset: float = 0.0) -> Tensor:
    """Columns with spreads from 0.1 to 10 about an offset."""
    x = torch.randn((n, d), generator=torch.Generator().manual_seed(n + d), dtype=torch.float64)
    return (x * torch.logspace(-1, 1, d, dtype=torch.float64) + offset).to(dtype)


def truth(x: Tensor, kernel: Kernel) -> tuple[np.ndarray, np.ndarray]:
    """The matrix in long double, and the largest magnitude in each of the vectors that it multiplies."""
    y, exponent = centered(x.double().cpu().numpy(), extended=True)
    y = np.ldexp(y if kernel is covariance else y.T, exponent)
    return y.T @ y / x.shape[0], np.abs(y).max(axis=0)


def lower_error(lower: Tensor, want: np.ndarray) -> np.ndarray:
    """Absolute error on and below the diagonal; what stands above it means nothing, NaN included."""
    below = np.tri(len(want), dtype=bool)
    return np.abs(np.where(below, lower.cpu().numpy(), 0) - np.where(below, want, 0))


def relative_error(lower: Tensor, want: np.ndarray, kernel: Kernel) -> float:
    """Largest error in units of the two spreads; of the largest row on the Gram side.

    A row close to the mean is a small difference of large numbers, whose rounding is of their size.
    """
    spread = np.sqrt(np.diag(want))
    unit = np.outer(spread, spread) if kernel is covariance else want.max()
    return float((lower_error(lower, want) / unit).max())


@extended
@both_sides
@all_dtypes
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_error_stays_inside_the_gate_for_every_dtype_and_tail(
    n: int, d: int, dtype: torch.dtype, kernel: Kernel, device: torch.device
) -> None:
    x = activations(n, d, dtype, offset=3.0).to(device)
    lower, mean = kernel(x)
    want, largest = truth(x, kernel)
    terms = n if kernel is covariance else d
    assert (lower_error(lower, want) < EPS * terms * np.outer(largest, largest)).all()
    # The gate takes every rounding at its worst; independent ones stay within a few eps.
    assert relative_error(lower, want, kernel) < 16 * EPS
    values = x.double().cpu().numpy().astype(np.longdouble)
    assert np.abs(mean.cpu().numpy() - values.mean(axis=0)).max() < 4 * EPS * np.abs(values).max()


@extended
@both_sides
@pytest.mark.parametrize("offset", [1e6, 1e7])
@pytest.mark.parametrize(("n", "d"), [(41, 127), (300, 20)])
def test_error_is_at_most_5e_15_when_the_mean_is_1e7_spreads(
    n: int, d: int, offset: float, kernel: Kernel, device: torch.device
) -> None:
    x = activations(n, d, offset=offset).to(device)
    want, _ = truth(x, kernel)
    assert relative_error(kernel(x)[0], want, kernel) < 5e-15


@extended
def test_mean_in_two_parts_is_right_beyond_one_float64(device: torch.device) -> None:
    x = activations(200, 5, offset=1e7).to(device)
    lower, shift, delta = shifted_covariance(x)
    shifted = x.cpu().numpy().astype(np.longdouble) - shift.cpu().numpy()
    error = np.abs(shifted.mean(axis=0) - delta.cpu().numpy())
    assert (error < 8 * EPS * shifted.std(axis=0)).all()
    assert torch.equal(shift + delta, covariance(x)[1])
    assert torch.equal(lower.tril(), covariance(x)[0].tril())


@extended
def test_one_outlying_row_costs_no_accuracy(device: torch.device) -> None:
    # A shift by row 0 would be 45 spreads from the mean here and lose three to four digits.
    x = activations(2048, 3)
    x[0] += 1e6
    want, _ = truth(x, covariance)
    assert relative_error(covariance(x.to(device))[0], want, covariance) < 16 * EPS


@extended
def test_outlying_shift_costs_no_more_than_samuelson_allows(device: torch.device) -> None:
    # First and middle row outlying, so the median is one of them: (shift - mean)^2 / variance is near N / 2.
    n = 2048
    x = activations(n, 3)
    x[[0, n // 2]] += 1e6
    want, _ = truth(x, covariance)
    assert 16 * EPS < relative_error(covariance(x.to(device))[0], want, covariance) < 2 * n * EPS


@both_sides
@pytest.mark.parametrize("value", [0.1, -1e7 - 1 / 3, 1e200])
@pytest.mark.parametrize(("n", "d"), [(41, 33), (150, 20), (20, 150)])
def test_equal_rows_give_exactly_zero_and_their_own_mean(
    n: int, d: int, value: float, kernel: Kernel, device: torch.device
) -> None:
    row = value * torch.linspace(0.5, 1.0, d, dtype=torch.float64, device=device)
    lower, mean = kernel(row.repeat(n, 1))
    assert torch.count_nonzero(lower.tril()) == 0
    assert torch.equal(mean, row)


@both_sides
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("n", "d"), [(41, 127), (140, 20), (20, 140)])
def test_every_dtype_gives_the_bits_of_its_float64_copy(
    n: int, d: int, dtype: torch.dtype, kernel: Kernel, device: torch.device
) -> None:
    x = activations(n, d, dtype).to(device)
    assert_same_bits(kernel(x), kernel(x.double()))


@both_sides
@pytest.mark.parametrize(
    "layout", ["transposed", "padded rows", "every other column", "offset", "both strided"]
)
@pytest.mark.parametrize(
    ("n", "d", "dtype"),
    [*((41, 35, dtype) for dtype in DTYPES), (140, 20, torch.float32), (20, 140, torch.float32)],
)
def test_views_give_the_bits_of_a_contiguous_copy(
    n: int, d: int, dtype: torch.dtype, layout: str, kernel: Kernel, device: torch.device
) -> None:
    x = activations(n, d, dtype).to(device)
    view = as_layout(x, layout)
    assert torch.equal(view, x)
    assert view.stride() != x.stride() or layout == "offset"
    assert_same_bits(kernel(view), kernel(x))


@both_sides
@pytest.mark.parametrize("axis", [0, 1])
def test_expanded_axes_give_the_bits_of_a_contiguous_copy(
    axis: int, kernel: Kernel, device: torch.device
) -> None:
    x = activations(140, 20).to(device)
    view = x.narrow(axis, 0, 1).expand(140, 20)
    assert 0 in view.stride()
    assert_same_bits(kernel(view), kernel(view.contiguous()))


@both_sides
@pytest.mark.parametrize(("n", "d"), [(41, 35), (140, 9), (9, 140)])
def test_each_matrix_of_a_batch_has_the_bits_it_has_alone(
    n: int, d: int, kernel: Kernel, device: torch.device
) -> None:
    x = torch.stack([activations(n, d, torch.float32) * scale for scale in (1.0, 3.0, 1e-3)]).to(device)
    alone = [kernel(matrix) for matrix in x]
    for batch in (x, x.transpose(0, 1).contiguous().transpose(0, 1)):
        lower, mean = kernel(batch)
        for index, single in enumerate(alone):
            assert_same_bits((lower[index], mean[index]), single)
    lower, mean = kernel(x[1].expand(2, n, d))
    assert_same_bits((lower[1], mean[1]), alone[1])


@both_sides
@pytest.mark.parametrize(
    ("bad", "where"),
    [
        ("nan", (0, 0)),
        ("nan", (-1, -1)),
        ("nan", (70, 10)),
        ("inf", (0, -1)),
        ("inf", (-1, -1)),
        ("-inf", (9, 0)),
    ],
)
@pytest.mark.parametrize(("n", "d"), [(71, 33), (135, 20)])
def test_one_bad_value_anywhere_makes_the_trace_non_finite(
    n: int, d: int, bad: str, where: tuple[int, int], kernel: Kernel, device: torch.device
) -> None:
    x = activations(n, d, torch.float32).to(device)
    x[where] = float(bad)
    with np.errstate(all="ignore"):  # the interpreter computes in NumPy, which warns
        lower, _ = kernel(x)
    assert not torch.isfinite(lower.diagonal().sum())
    if kernel is covariance:  # and spoils its own column only
        good = torch.arange(d, device=device) != where[1] % d
        assert torch.isfinite(lower.diagonal()[good]).all()


@both_sides
@pytest.mark.parametrize("exponent", [-480, 480])
def test_powers_of_two_scale_the_result_bit_for_bit_up_to_the_range(
    exponent: int, kernel: Kernel, device: torch.device
) -> None:
    x = activations(130, 20).to(device)
    lower, mean = kernel(x)
    factor = torch.tensor(2.0, dtype=torch.float64, device=device) ** exponent
    assert_same_bits(kernel(x * factor), (lower * factor * factor, mean * factor))


@both_sides
def test_scale_multiplies_the_sum_and_is_one_over_n_when_left_out(
    kernel: Kernel, device: torch.device
) -> None:
    for n, d in ((50, 20), (130, 5), (5, 130)):
        x = activations(n, d).to(device)
        total, _ = kernel(x, scale=1.0)
        assert torch.equal(kernel(x)[0].tril(), (total * (1.0 / n)).tril())
        # A scale that float32 cannot hold: Triton passes an unannotated Python float as one.
        assert torch.equal(kernel(x, scale=0.1)[0].tril(), (total * 0.1).tril())


@both_sides
def test_tiles_on_the_diagonal_are_symmetric_bit_for_bit(kernel: Kernel, device: torch.device) -> None:
    for n, d in ((40, 32), (140, 20), (20, 140)):
        lower, _ = kernel(activations(n, d).to(device))
        edge = min(32, len(lower))
        assert torch.equal(lower[:edge, :edge], lower[:edge, :edge].T)


@pytest.mark.parametrize(
    ("kernel", "n", "d", "count"),
    [(covariance, 41, 127, 1), (covariance, 140, 20, 1), (gram, 20, 41, 2), (gram, 20, 140, 2)],
)
def test_a_call_is_one_launch_and_on_the_gram_side_one_more_for_the_means(
    kernel: Kernel, n: int, d: int, count: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = []
    run = Launch.run
    monkeypatch.setattr(Launch, "run", lambda self: (launched.append(self.kernel), run(self)))
    kernel(activations(n, d).to(device).expand(3, n, d))
    assert len(launched) == count


@both_sides
@pytest.mark.parametrize("axis", ["row", "column", "batch"])
def test_offsets_beyond_2_31_elements_reach_the_right_values(
    axis: str, kernel: Kernel, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The interpreter copies every storage back onto itself after a launch; here that would be 4 GiB.
    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *args: None)
    values = activations(3 * 3, 3, torch.float16).view(3, 3, 3).to(device)
    far = 2**30 + 3
    strides = {"row": (30, far, 1), "column": (30, 3, far), "batch": (far, 3, 1)}[axis]  # index 2 is beyond
    try:
        storage = torch.empty(
            2 * far + 100, dtype=torch.float16, device=device
        )  # only touched pages take memory
    except RuntimeError as failure:
        pytest.skip(f"no room for {2 * far} half-precision numbers: {failure}")
    view = storage.as_strided((3, 3, 3), strides)
    view.copy_(values)
    got, want = kernel(view), kernel(values)
    for index in range(3):
        assert_same_bits((got[0][index], got[1][index]), (want[0][index], want[1][index]))


def test_no_float64_copy_of_the_input_is_made() -> None:
    h = torch.empty((65536, 128), dtype=torch.bfloat16, device="meta")
    out = output("covariance", 1, *h.shape, h.device, spread=True)
    work = workspace("covariance", 1, *h.shape, h.device, spread=True)
    used = {
        id(tensor): tensor.nbytes
        for launch in covariance_launches(h, out, work, 1.0)
        for tensor in launch.args
        if isinstance(tensor, Tensor) and tensor is not h
    }
    held = out.nbytes() + work.nbytes()
    assert 0 <= held - sum(used.values()) < 3 * 16  # each result starts at a multiple of 16 bytes
    assert held < h.nbytes / 4  # with the sums of 39 parts; a float64 copy has four times h


def assert_same_bits(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(got[0].tril(), want[0].tril())
    assert torch.equal(got[1], want[1])


def as_layout(x: Tensor, layout: str) -> Tensor:
    """A view with the values of `x` (n, d) and other strides."""
    n, d = x.shape
    if layout == "transposed":
        return x.T.contiguous().T
    if layout == "padded rows":
        return torch.nn.functional.pad(x, (3, 2), value=7.0)[:, 3:-2]
    if layout == "every other column":
        return x.repeat_interleave(2, dim=1)[:, ::2]
    if layout == "offset":
        return torch.cat([x.new_ones(1), x.flatten()])[1:].view(n, d)
    return x.T.repeat_interleave(3, dim=1)[:, 1::3].T
