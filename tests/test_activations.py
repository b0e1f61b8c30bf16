"""Bad input stops at the door with the rule, the value and the remedy (faults 13 to 23)."""

import numpy as np
import pytest
import torch

from fastent import covariance, spectral_entropy
from fastent.activations import first_nonfinite, matrix_of


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
    "dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool]
)
def test_integers_and_booleans_are_cast_exactly(dtype):
    h = (activations(40, 6) * 50).to(dtype)
    assert torch.equal(covariance(h), covariance(h.to(torch.float64)))


def test_int64_beyond_2_to_53_is_an_error_and_at_2_to_53_is_not():
    h = torch.tensor([[2**53, 0], [0, 1]])
    covariance(h)
    h[0, 0] += 1
    with pytest.raises(ValueError, match=r"2\^53"):
        covariance(h)
    with pytest.raises(ValueError, match=r"2\^53"):
        covariance(-h)


def test_complex_is_a_type_error():
    with pytest.raises(TypeError, match="complex"):
        spectral_entropy(torch.randn(8, 4, dtype=torch.complex64))


def test_numpy_arrays_are_a_type_error_with_the_remedy():
    with pytest.raises(TypeError, match="from_numpy"):
        spectral_entropy(np.zeros((4, 2)))


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


def test_float8_is_read_exactly():
    h = activations(64, 8).to(torch.float8_e4m3fn)
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
    with pytest.raises(ValueError, match=r'"flatten", "last", "mean", "skip_first", or batch_dims=1'):
        spectral_entropy(torch.zeros(4, 3, 2))


def test_each_choice_of_tokens_is_what_it_says():
    h = activations(9, 4, 3)
    expected = {
        "flatten": h.reshape(36, 3),
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
        matrix_of(torch.zeros(4, 3, 2), tokens="first")
    with pytest.raises(ValueError, match="batch_dims must be"):
        matrix_of(torch.zeros(4, 3, 2), batch_dims=2)
    with pytest.raises(ValueError, match=r"\(batch, n, d\)"):
        matrix_of(torch.zeros(4, 3), batch_dims=1)
    with pytest.raises(ValueError, match="batch axis is empty"):
        matrix_of(torch.zeros(0, 4, 3), batch_dims=1)
    with pytest.raises(ValueError, match=r"\(n, d\)"):
        matrix_of(torch.zeros(4))


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
