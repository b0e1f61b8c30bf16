"""The test kit: it names the property that a planted fault breaks, and a backend from outside passes."""

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import Phase, settings

import fastent
from fastent.testing import PROPERTIES, check_backend, exact_truth

PAGE = (Path(__file__).parent.parent / "docs" / "testing.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE)
EPS = np.finfo(np.float64).eps


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    """Few examples, the same ones each time, reported as they are found."""
    before = settings.default
    settings.register_profile(
        "as found", max_examples=3, derandomize=True, phases=[Phase.explicit, Phase.generate]
    )
    settings.load_profile("as found")
    yield
    settings.register_profile("before", before)
    settings.load_profile("before")


def spectral_entropy(
    h: torch.Tensor,
    *,
    centre: Callable[[np.ndarray], np.ndarray] = lambda x: x - x.mean(0),
    floor: Callable[[int, int], int] = lambda n, d: d,
    dtype: type = np.float64,
) -> float:
    x = h.double().numpy()
    y = centre(np.ldexp(x, -np.frexp(np.abs(x).max())[1]).astype(dtype))
    values = np.linalg.eigvalsh((y.T @ y).astype(np.float64) / len(y))
    kept = values[(values > 0) & (values >= floor(*y.shape) * EPS * values[-1])]
    p = kept / kept.sum()
    return float(-(p * np.log(p)).sum() / np.log(x.shape[1]))


def in_place(h: torch.Tensor) -> float:
    x = h if h.is_contiguous() else h.clone()
    x -= x.mean(0)
    return fastent.spectral_entropy(x).normalized


FAULTS = {
    "no centring": (lambda h: spectral_entropy(h, centre=lambda x: x), "ignores_translation"),
    "float32 sums at a large offset": (
        lambda h: spectral_entropy(h, dtype=np.float32),
        "ignores_translation",
    ),
    "NaN": (lambda h: float("nan"), "ignores_translation"),
    "the paper's floor": (
        lambda h: fastent.spectral_entropy(h, convention="paper").normalized,
        "is_zero_for_constant_rows",
    ),
    "variances alone": (
        lambda h: fastent.entropy_of_eigenvalues(fastent.covariance(h).diag()).normalized,
        "lies_between_zero_and_the_rank_limit",
    ),
    "centred in place": (in_place, "leaves_its_input_as_it_was"),
    "a floor of n - 1 in place of d": (
        lambda h: spectral_entropy(h, floor=lambda n, d: n - 1),
        "counts_eigenvalues_above_the_floor",
    ),
}
# Those that the faults break, in their order; the others take the truth at 50 digits or long sums.
TRIED = [name for name in PROPERTIES if name in {name for _, name in FAULTS.values()}]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_fails_the_property_that_it_breaks(fault: str) -> None:
    implementation, name = FAULTS[fault]
    with pytest.raises(AssertionError) as caught:
        check_backend(implementation, properties=TRIED)
    message = str(caught.value)
    assert message.startswith(f"{name}: {PROPERTIES[name].statement} Got ")
    got, want, allowed = map(
        float, re.search(r"Got (\S+), expected (\S+) to within (\S+), of ", message).groups()
    )
    assert not abs(got - want) <= allowed
    assert re.search(r"\b(n=\d+, d=\d+|seed=\d+)", message)


def test_the_same_implementation_passes_them_without_a_fault() -> None:
    check_backend(spectral_entropy, properties=TRIED)


def test_the_snippet_of_the_page_is_a_backend_from_outside_that_passes() -> None:
    snippet = SNIPPETS[0]
    assert len(snippet.splitlines()) <= 30
    exec(compile(snippet, "docs/testing.md", "exec"), {})


def test_the_page_lists_every_property_in_order() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", PAGE, re.MULTILINE)
    assert rows == [(name, found.statement) for name, found in PROPERTIES.items()]
    assert list(PROPERTIES) == [found.name for found in PROPERTIES.values()]


def test_an_error_of_the_implementation_is_passed_on_with_the_input() -> None:
    def fails(h: np.ndarray) -> float:
        assert isinstance(h, np.ndarray)
        raise ZeroDivisionError("of its own")

    with pytest.raises(ZeroDivisionError, match="of its own") as caught:
        check_backend(fails, arrays=True)
    assert "Activations(n=" in "".join(caught.value.__notes__)


def test_an_unknown_property_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="no property is called 'speed'; there are ignores_translation, "):
        check_backend(lambda h: 0.0, properties=["speed"])
    with pytest.raises(TypeError, match=r"several names, such as \['ignores_scale'\]; got a text"):
        check_backend(float, properties="ignores_scale")


@pytest.mark.parametrize("missing", ["hypothesis", "mpmath"])
def test_a_missing_package_is_one_sentence_with_its_remedy(monkeypatch, missing: str) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ModuleNotFoundError, match=rf"^fastent\.testing needs {missing}, .*\[testing\]'"):
        check_backend(lambda h: 0.0) if missing == "hypothesis" else exact_truth(np.eye(2))
