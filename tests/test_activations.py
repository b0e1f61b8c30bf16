"""Bad input stops at the door with the rule, the value and the remedy (faults 13 to 23)."""

import warnings
from typing import get_args

import numpy as np
import pytest
import torch

import fastent
from fastent import Moments, Status, covariance, sampling_error, spectral_entropy
from fastent.activations import RESOLUTIONS, RealTokens, Rows, Tokens, first_nonfinite
from fastent.process import warn_of_detached


def matrix_of(h: torch.Tensor, *, batch_dims: int = 0, **choice: object) -> torch.Tensor:
    return Rows(**choice).matrix(h, batch_dims)


def activations(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("n", [0, 1])
def test_fewer_than_two_rows_is_an_error_that_names_n(n):
    with pytest.raises(ValueError, match=f"N = {n}"):
        spectral_entropy(torch.zeros(n, 4))


def test_one_column_has_a_covariance_but_no_normalised_entropy():
    h = torch.tensor([[0.0], [2.0]])
    assert covariance(h).item() == 1.0
    with pytest.raises(ValueError, match="d = 1"):
        spectral_entropy(h)


def test_no_column_is_an_error():
    with pytest.raises(ValueError, match=r"\(5, 0\)"):
        spectral_entropy(torch.zeros(5, 0))


@pytest.mark.parametrize(
    "dtype",
    [
        torch.bool,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.uint8,
        torch.uint16,
        torch.uint32,
        torch.uint64,
    ],
)
def test_integers_and_booleans_are_cast_exactly(dtype):
    h = (activations(40, 6).abs() * 50).to(torch.int64).to(dtype)
    assert torch.equal(covariance(h), covariance(h.to(torch.float64)))


def test_int64_beyond_2_to_53_is_an_error_and_at_2_to_53_is_not():
    h = torch.tensor([[2**53, 0], [0, 1]])
    covariance(h)
    h[0, 0] += 1
    with pytest.raises(ValueError, match=r"int64 values beyond 2\^53"):
        covariance(h)
    with pytest.raises(ValueError, match=r"2\^53"):
        covariance(-h)


@pytest.mark.parametrize("value", [2**53 + 1, 2**60, 2**63, 2**64 - 1])
def test_uint64_beyond_2_to_53_is_an_error_and_at_2_to_53_is_exact(value):
    h = np.array([[2**53, 0], [0, 1], [5, 5]], dtype=np.uint64)
    assert torch.equal(covariance(torch.from_numpy(h)), covariance(torch.from_numpy(h.astype(np.float64))))
    h[0, 0] = value
    with pytest.raises(ValueError, match=r"uint64 values beyond 2\^53"):
        covariance(torch.from_numpy(h))


@pytest.mark.parametrize("name", ["float4_e2m1fn_x2", "int4", "uint4", "bits8"])
def test_packed_numbers_are_a_type_error_that_names_the_dtype(name):
    packed = torch.zeros(4, 3, dtype=torch.uint8).view(getattr(torch, name))
    for call in (covariance, spectral_entropy, fastent.Moments().update):
        with pytest.raises(TypeError, match=f"{name}.*unpack"):
            call(packed)


def test_complex_is_a_type_error():
    with pytest.raises(TypeError, match="complex"):
        spectral_entropy(torch.randn(8, 4, dtype=torch.complex64))


@pytest.mark.parametrize(
    "made",
    [
        lambda x: x,
        lambda x: x.astype(">f4"),
        lambda x: x[::-1, ::-1],  # strides below 0
        lambda x: np.broadcast_to(x, x.shape),  # not to be written
        lambda x: np.rec.fromarrays([np.zeros(12, "i1"), x], formats="i1, 3f8")["f1"],  # strides of 25 bytes
        lambda x: np.asfortranarray(x.astype(np.float16)),
        lambda x: (100 * x).astype(np.int16),
    ],
)
def test_numpy_arrays_are_taken_as_tensors_of_their_values(made):
    x = made(np.random.default_rng(0).standard_normal((12, 3)))
    tensor = torch.tensor(np.array(x, dtype=x.dtype.newbyteorder("="), order="C"))
    before = x.copy()
    assert spectral_entropy(x).entropy == spectral_entropy(tensor).entropy
    assert torch.equal(covariance(x), covariance(tensor))
    assert torch.equal(Moments().update(x).covariance(), Moments().update(tensor).covariance())
    assert sampling_error(x).standard_error == sampling_error(tensor).standard_error
    assert np.array_equal(x, before)


def test_a_numpy_mask_goes_with_numpy_tokens():
    rng = np.random.default_rng(0)
    h, mask = rng.standard_normal((5, 4, 3)), rng.integers(0, 2, (5, 4)) | (np.arange(4) < 1)
    for tokens in ("flatten", "mean"):
        by_tensors = spectral_entropy(torch.from_numpy(h), tokens=tokens, mask=torch.from_numpy(mask))
        assert spectral_entropy(h, tokens=tokens, mask=mask).entropy == by_tensors.entropy


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ma.masked_array(np.zeros((4, 2)), mask=True), r"masked array: use h\.filled"),
        (np.zeros((4, 2), object), r"array of object: use h\.astype"),
        (np.zeros((4, 2), np.longdouble), r"array of .*: use h\.astype\(numpy\.float64\)"),
        (np.zeros((4, 2), complex), "complex"),
        ([[1.0, 2.0], [3.0, 4.0]], "h must be a torch.Tensor or a NumPy array; got list"),
    ],
)
def test_what_an_array_cannot_give_is_refused_with_the_remedy(array, message):
    for call in (spectral_entropy, covariance, Moments().update, sampling_error):
        with pytest.raises(TypeError, match=message):
            call(array)


def test_tensors_without_dense_data_are_type_errors_with_the_reason():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with pytest.raises(TypeError, match="meta or fake"):
        spectral_entropy(torch.zeros(4, 2, device="meta"))
    with FakeTensorMode():
        fake = torch.zeros(4, 2)
    with pytest.raises(TypeError, match="meta or fake"):
        spectral_entropy(fake)
    with pytest.raises(TypeError, match="to_dense"):
        spectral_entropy(torch.eye(4).to_sparse())


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_a_type_error(layout):
    nested = torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(4, 3)], layout=layout)
    with pytest.raises(TypeError, match="nested tensor"):
        spectral_entropy(nested)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantised_tensors_are_a_type_error():
    quantised = torch.quantize_per_tensor(torch.randn(4, 3), 0.1, 0, torch.qint8)
    with pytest.raises(TypeError, match="dequantize"):
        spectral_entropy(quantised)


@pytest.mark.parametrize("dtype", [dtype for dtype in RESOLUTIONS if dtype.itemsize == 1])
def test_float8_is_read_exactly(dtype):
    h = activations(64, 8).abs().to(dtype)
    assert torch.equal(covariance(h), covariance(h.to(torch.float32)))


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.interpreter)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(41, 13), (13, 41)])
def test_views_give_the_same_bits_as_contiguous_input(backend, dtype, shape):
    n, d = shape
    base = activations(2 * max(shape) + 3, 2 * max(shape) + 5).to(dtype)
    views = {
        "transposed": base.T[:n, :d],
        "strided": base[: 2 * n : 2, 3 : 3 + 2 * d : 2],
        "offset": base[3 : 3 + n, 5 : 5 + d],
        "expanded rows": base[:1, :d].expand(n, d),
        "expanded columns": base[:n, :1].expand(n, d),
        "negative": base[:n, :d].flip(0),
    }
    for name, view in views.items():
        assert torch.equal(
            covariance(view, backend=backend), covariance(view.contiguous(), backend=backend)
        ), name
        ours, theirs = (spectral_entropy(h, backend=backend) for h in (view, view.contiguous()))
        assert ours.entropy == theirs.entropy, name


def test_three_dimensional_input_names_the_choices():
    tokens = '"flatten", "first", "last", "mean", "skip_first"'
    with pytest.raises(ValueError, match=rf"tokens={tokens}, positions=.* or batch_dims=1$"):
        spectral_entropy(torch.zeros(4, 3, 2))


def test_each_choice_of_tokens_is_what_it_says():
    h = activations(9, 4, 3)
    expected = {
        "flatten": h.reshape(36, 3),
        "first": h[:, 0],
        "last": h[:, 3],
        "mean": h.mean(1),
        "skip_first": h[:, 1:].reshape(27, 3),
    }
    for tokens, matrix in expected.items():
        assert torch.equal(matrix_of(h, tokens=tokens), matrix)
    assert matrix_of(h.half(), tokens="mean").dtype == torch.float64
    assert torch.equal(matrix_of(h, batch_dims=1), h)


def test_choices_that_do_not_fit_the_shape_are_errors():
    with pytest.raises(ValueError, match="leave it out"):
        matrix_of(torch.zeros(4, 2), tokens="last")
    with pytest.raises(ValueError, match="more tokens"):
        matrix_of(torch.zeros(4, 1, 2), tokens="skip_first")
    with pytest.raises(ValueError, match="tokens must be one of"):
        matrix_of(torch.zeros(4, 3, 2), tokens="second")
    with pytest.raises(ValueError, match="batch_dims must be"):
        matrix_of(torch.zeros(4, 3, 2), batch_dims=2)
    with pytest.raises(ValueError, match=r"\(batch, n, d\)"):
        matrix_of(torch.zeros(4, 3), batch_dims=1)
    with pytest.raises(ValueError, match="batch axis is empty"):
        matrix_of(torch.zeros(0, 4, 3), batch_dims=1)
    with pytest.raises(ValueError, match=r"\(n, d\)"):
        matrix_of(torch.zeros(4))


def test_a_call_offers_only_what_it_accepts():
    h = torch.zeros(4, 3, 2)
    for call in (sampling_error, Moments().update):
        with pytest.raises(ValueError, match="Say which") as caught:
            call(h)
        assert "batch_dims" not in str(caught.value)


def test_axes_of_1_behind_the_features_of_a_pool_are_dropped():
    h = activations(9, 4)
    assert torch.equal(matrix_of(h[..., None, None]), h)
    assert torch.equal(matrix_of(h[..., None, None, None]), h)
    assert torch.equal(matrix_of(activations(2, 9, 4)[..., None, None], batch_dims=1), activations(2, 9, 4))


def test_a_last_axis_of_1_after_two_others_leaves_open_what_is_what():
    h = activations(9, 4)[..., None]  # of a 1-D pool, or tokens of one feature
    with pytest.raises(ValueError, match="Say which"):
        spectral_entropy(h)
    with pytest.raises(ValueError, match="d = 1"):
        spectral_entropy(h, tokens="flatten")
    assert torch.equal(matrix_of(h, positions="flatten", channel_axis=1), h[..., 0])


def test_maps_are_an_error_that_names_positions_and_the_channel_axis():
    with pytest.raises(ValueError, match=r'positions="flatten" or "mean" with channel_axis=1'):
        spectral_entropy(torch.zeros(4, 3, 2, 2))
    with pytest.raises(ValueError, match=r"\(batch, n, d\).* channel_axis=2"):
        spectral_entropy(torch.zeros(5, 4, 3, 2, 2), batch_dims=1)


def test_positions_of_maps_are_rows_or_their_mean():
    h = activations(6, 3, 4, 5)
    rows = torch.stack([h[i, :, j, k] for i in range(6) for j in range(4) for k in range(5)])
    assert torch.equal(matrix_of(h, positions="flatten", channel_axis=1), rows)
    assert torch.equal(matrix_of(h, positions="flatten", channel_axis=-3), rows)
    means = h.reshape(6, 3, 20).mean(2)
    assert torch.allclose(matrix_of(h, positions="mean", channel_axis=1), means, rtol=0, atol=1e-15)
    assert matrix_of(h.half(), positions="mean", channel_axis=1).dtype == torch.float64
    last = h.movedim(1, -1).contiguous()
    assert torch.equal(matrix_of(last, positions="flatten", channel_axis=3), rows)
    assert torch.equal(matrix_of(h[..., 0], positions="flatten", channel_axis=1), h[..., 0].mT.reshape(24, 3))
    batch = torch.stack([h, h + 1])
    assert torch.equal(
        matrix_of(batch, positions="flatten", channel_axis=2, batch_dims=1), torch.stack([rows, rows + 1])
    )


def test_positions_that_do_not_fit_are_errors_with_a_remedy():
    h = torch.zeros(4, 3, 2, 2)
    for choice, message in [
        ({"positions": "flatten"}, "add channel_axis=1"),
        ({"channel_axis": 1}, 'add positions="flatten"'),
        ({"positions": "last", "channel_axis": 1}, "positions must be one of"),
        ({"positions": "mean", "channel_axis": 0}, r"after that of the samples \(0\)"),
        ({"positions": "mean", "channel_axis": -4}, "after that of the samples"),
        ({"positions": "mean", "channel_axis": 4}, "must be an axis of h"),
        ({"positions": "mean", "channel_axis": 1, "tokens": "mean"}, "leave one of them out"),
        ({"positions": "mean", "channel_axis": 1, "mask": torch.ones(4, 3)}, "mask is for"),
    ]:
        with pytest.raises(ValueError, match=message):
            spectral_entropy(h, **choice)
    with pytest.raises(ValueError, match="leave it out"):
        spectral_entropy(torch.zeros(4, 3), positions="flatten", channel_axis=1)
    with pytest.raises(TypeError):
        spectral_entropy(h, positions="flatten", channel_axis=1.0)


RIGHT = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]])


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float32])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_no_row_and_the_first_and_last_tokens_are_real_ones(side, dtype):
    h, mask = activations(3, 4, 2), RIGHT
    if side == "left":
        h, mask = h.flip(1), mask.flip(1)
    padded = torch.where(mask[..., None] == 1, h, torch.nan)
    mask = mask.to(dtype)
    real = [sample[kept == 1] for sample, kept in zip(h, mask, strict=True)]
    expected = {
        "flatten": torch.cat(real),
        "first": torch.stack([rows[0] for rows in real]),
        "last": torch.stack([rows[-1] for rows in real]),
        "mean": torch.stack([rows.mean(0) for rows in real]),
        "skip_first": torch.cat([rows[1:] for rows in real]),
    }
    assert set(expected) == set(get_args(Tokens))
    for tokens, matrix in expected.items():
        assert torch.allclose(matrix_of(padded, tokens=tokens, mask=mask), matrix, rtol=0, atol=1e-15), tokens
        result = spectral_entropy(padded, tokens=tokens, mask=mask)
        assert result.status is not Status.NONFINITE
        assert (result.n, result.normalized) == (len(matrix), spectral_entropy(matrix).normalized), tokens


def test_every_call_that_takes_activations_takes_a_mask():
    h, mask = activations(12, 4, 2), RIGHT.repeat(4, 1)
    rows = h[mask == 1]
    assert torch.equal(covariance(h, tokens="flatten", mask=mask), covariance(rows))
    assert sampling_error(h, tokens="flatten", mask=mask) == sampling_error(rows)
    moments = Moments().update(h[:5], tokens="flatten", mask=mask[:5])
    moments.update(h[5:], tokens="flatten", mask=mask[5:])
    assert moments.n == len(rows)
    assert torch.allclose(moments.covariance(), covariance(rows), rtol=0, atol=1e-14)
    once = RealTokens(mask)
    for tokens in get_args(Tokens):
        first, second = (spectral_entropy(h, tokens=tokens, mask=once) for _ in range(2))
        plain = spectral_entropy(h, tokens=tokens, mask=mask)
        assert first.entropy == second.entropy == plain.entropy


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_a_mask_checked_once_is_not_changed_by_what_happens_to_the_tensor(dtype):
    h, mask = activations(12, 4, 2), RIGHT.repeat(4, 1).to(dtype)
    expected = {tokens: matrix_of(h, tokens=tokens, mask=mask) for tokens in get_args(Tokens)}
    real = RealTokens(mask)
    mask.fill_(1)
    for tokens, rows in expected.items():
        assert torch.equal(matrix_of(h, tokens=tokens, mask=real), rows), tokens


def test_a_sample_without_a_real_token_is_left_out_or_named_where_it_must_give_a_row():
    h, mask = activations(3, 4, 2), RIGHT.clone()
    mask[1] = 0
    assert matrix_of(h, tokens="flatten", mask=mask).shape == (4, 2)
    assert matrix_of(h, tokens="skip_first", mask=mask).shape == (2, 2)
    for tokens in ("first", "last", "mean"):
        with pytest.raises(ValueError, match=r"sample 1 has no real token.*use mask == 0"):
            spectral_entropy(h, tokens=tokens, mask=mask)
    with pytest.raises(ValueError, match=r"N = 0 from shape \(3, 4, 2\) with its mask"):
        spectral_entropy(h, tokens="flatten", mask=torch.zeros(3, 4, dtype=torch.bool))


def test_masks_that_do_not_fit_are_errors_with_a_remedy():
    h, right = activations(3, 4, 2), RIGHT
    additive = torch.where(right == 1, 0.0, -torch.inf)
    for mask, message in [
        (right.T, "use mask.T"),
        (right[:, :3], r"shape \(n, tokens\) = \(3, 4\).* got \(3, 3\)"),
        (right[:, None, None, :], r"got \(3, 1, 1, 4\): use mask\[:, 0, 0\]$"),
        (additive[:, None, None, :], r"use mask\[:, 0, 0\] == 0"),
        (right[0], r"\(n, tokens\); got \(4,\)"),
        (right[:, None, :].expand(3, 4, 4), r"\(n, tokens\); got \(3, 4, 4\)$"),
        (additive, "such as -inf: for an additive mask .* use mask == 0"),
        (torch.zeros(3, 4), "holds no 1: for an additive mask"),
        (right * torch.tensor([1, 2, 3, 4]), "such as 2: .* numbered segments mask > 0"),
        (torch.full((3, 4), torch.nan), "such as nan"),
    ]:
        with pytest.raises(ValueError, match=message):
            spectral_entropy(h, tokens="flatten", mask=mask)
    for mask, message in [
        ([[1]], "mask must be a torch.Tensor or a NumPy array; got list"),
        (right.to("meta"), "mask is a meta or fake tensor"),
        (right.to_sparse(), "mask.to_dense"),
        (right.to(torch.complex64), "mask is complex"),
    ]:
        with pytest.raises(TypeError, match=message):
            spectral_entropy(h, tokens="flatten", mask=mask)


def test_a_mask_needs_tokens_and_one_matrix():
    h = activations(3, 4, 2)
    with pytest.raises(ValueError, match='Say which: tokens="flatten"'):
        spectral_entropy(h, mask=RIGHT)
    with pytest.raises(ValueError, match=r"use h\[mask.flatten\(\)\]"):
        spectral_entropy(activations(12, 2), mask=RIGHT)
    with pytest.raises(ValueError, match="call once for each"):
        spectral_entropy(activations(5, 3, 4, 2), tokens="last", mask=RIGHT, batch_dims=1)


def test_a_mask_on_another_device_is_an_error_with_the_remedy():
    real = RealTokens(RIGHT)
    real.mask = torch.zeros(3, 4, dtype=torch.bool, device="meta")  # stands for a device that is not here
    real._full = False
    with pytest.raises(ValueError, match=r"mask is on meta and h on cpu: use mask.to\(h.device\)"):
        spectral_entropy(activations(3, 4, 2), tokens="flatten", mask=real)


@pytest.mark.parametrize("call", [spectral_entropy, covariance])
def test_a_tensor_that_requires_a_gradient_is_warned_of_once_and_a_monitors_never(call):
    warn_of_detached.cache_clear()
    h = activations(20, 4).requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.no_grad():
            call(h)
        for standard_error in (False, True):
            fastent.SpectralEntropyMonitor(standard_error=standard_error).observe(0, h * 2.0, layer="head")
        fastent.Moments().update(h)
        fastent.sampling_error(h)
        call(h.detach())
    with pytest.warns(UserWarning, match=r"no gradient|none flows") as warned:
        call(h)
    assert [warning.filename for warning in warned] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(h)


def test_no_graph_is_kept_and_inference_tensors_work():
    h = activations(20, 4).requires_grad_()
    assert not covariance(h).requires_grad
    assert not spectral_entropy(h).eigenvalues.requires_grad
    with torch.inference_mode():
        inside = activations(20, 4)
    assert spectral_entropy(inside).entropy == spectral_entropy(h).entropy


def test_autocast_does_not_change_a_bit():
    h = activations(600, 12, dtype=torch.float32)
    plain = spectral_entropy(h)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = spectral_entropy(h)
    assert torch.equal(plain.eigenvalues, inside.eigenvalues)


def test_first_nonfinite_counts_and_finds():
    x = torch.zeros(3, 4)
    assert first_nonfinite(x) is None
    x[1, 2], x[2, 0] = torch.nan, torch.inf
    assert first_nonfinite(x) == (2, (1, 2))


TRANSFORMS = {
    "vmap": lambda f, h: torch.func.vmap(f)(h[None]),
    "grad": lambda f, h: torch.func.grad(lambda x: (f(x), x.sum())[1])(h),
    "jvp": lambda f, h: torch.func.jvp(f, (h,), (h,)),
    "vmap of grad": lambda f, h: torch.func.vmap(torch.func.grad(lambda x: (f(x), x.sum())[1]))(h[None]),
}


@pytest.mark.filterwarnings(
    "ignore:.torch.jit.script. is"
)  # torch's own, in jvp; its category goes by the release
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_tensor_inside_a_transform_is_refused_with_the_way_out(transform, threads):
    def measures(x):
        with pytest.raises(
            TypeError, match=r"inside a transform of torch\.func .* has_aux=True .* batch_dims=1"
        ):
            spectral_entropy(x)
        with pytest.raises(TypeError, match=r"inside a transform of torch\.func"):
            Moments().update(x)
        seen.append(x.shape)
        return x

    seen, before = [], torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        TRANSFORMS[transform](measures, activations(20, 4))
    finally:
        torch.set_num_threads(before)
    assert seen == [(20, 4)]


def test_a_tensor_whose_memory_was_freed_is_refused():
    for h in (activations(20, 4), torch.nn.Parameter(activations(20, 4))):
        h.untyped_storage().resize_(0)
        with pytest.raises(TypeError, match=r"h \(20, 4\) has no memory left"):
            spectral_entropy(h)
        with pytest.raises(TypeError, match=r"mask \(20, 4\) has no memory left"):
            RealTokens(h)


def test_a_mean_over_no_position_is_an_error_as_one_over_no_token_is():
    for shape in ((8, 4, 0, 3), (8, 4, 0)):
        with pytest.raises(ValueError, match="positions='mean' needs more positions than shape"):
            Moments().update(torch.zeros(shape), positions="mean", channel_axis=1)
    assert Moments().update(torch.zeros(0, 4, 3, 3), positions="mean", channel_axis=1).n == 0


def test_a_mask_of_no_sample_is_no_mask_without_ones():
    for dtype in (torch.bool, torch.int64, torch.float32):
        mask = torch.zeros(0, 5, dtype=dtype)
        assert Moments().update(torch.zeros(0, 5, 4), tokens="last", mask=mask).n == 0


def test_a_vector_is_told_how_to_be_a_row():
    with pytest.raises(ValueError, match=r"got \(4,\): of one row give h\[None\]"):
        Moments().update(activations(4))
    assert Moments().update(activations(4)[None]).n == 1
