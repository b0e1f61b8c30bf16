"""Kit for testing an implementation of the spectral entropy: what must hold, the inputs to try it on, and the truth.

`check_backend` puts a function through every property in `PROPERTIES`; fastent's backends are held to the same ones.
Inputs are `Activations`, described by their structure: shape, spectrum, offset, scale, dtype, stride, seed. A failing
one prints as a line that rebuilds it, and shrinks towards small, plain and unscaled. Nothing is drawn entry by entry:
random entries all have the same, well-conditioned spectrum.

The truth is for any matrix of floats. Up to d = 16 the covariance is computed in exact integers and its eigenvalues by
mpmath at 50 digits. Above, both are in long double (two-pass, then Jacobi rotations; see
`fastent.reference.covariance`), which leaves errors of about d * 1e-19 of the trace.

Hypothesis and mpmath (the extra `testing`) are imported where they are used.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastent.activations import Array
from fastent.installation import install_command
from fastent.reference.covariance import eigenvalues, scaled_covariance
from fastent.reference.entropy import ceiling, entropy_of_eigenvalues, fannes_audenaert
from fastent.reference.mixing import best_bound, mix

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

EPS = float(np.finfo(np.float64).eps)
EXACT_UP_TO = 16

# Spectra of r eigenvalues, the largest about 1. Those of TAME, and their products, stay far above the floor.
SPECTRA: dict[str, Callable[[int], Array]] = {
    "flat": lambda r: np.ones(r),
    "geometric": lambda r: 0.5 ** np.arange(r),
    "power law": lambda r: (1.0 + np.arange(r)) ** -2,
    "clustered": lambda r: np.where(np.arange(r) < r / 2, 1.0, 1e-4) * (1 + 1e-9 * np.arange(r)),
    "one large": lambda r: np.where(np.arange(r) == 0, 1.0, 1e-6),
    "rank one": lambda r: np.where(np.arange(r) == 0, 1.0, 0.0),
    "zero": lambda r: np.zeros(r),
    "through the floor": lambda r: 10.0 ** -np.linspace(0, 20, r),
}
TAME = ("flat", "geometric", "power law", "clustered", "one large")

LAYOUTS = (
    "contiguous",
    "transposed",
    "padded rows",
    "every other column",
    "strided both ways",
    "expanded columns",
    "expanded rows",
)

# Offsets (in units of the spread) and exponents of scale (powers of ten) that a dtype can hold.
RANGE = {
    torch.float64: ((0.0, 1.0, 1e3, 1e6), 150),
    torch.float32: ((0.0, 1.0, 1e3, 1e6), 30),
    torch.bfloat16: ((0.0, 1.0, 1e2), 30),
    torch.float16: ((0.0, 1.0, 1e2), 1),
}


@dataclass(frozen=True)
class Activations:
    """An (n, d) matrix of planted spectrum."""

    n: int = 8
    d: int = 4
    spectrum: str = "flat"
    offset: float = 0.0  # mean of each column, in units of the root mean square spread
    scale: float = 1.0
    dtype: torch.dtype = torch.float64
    layout: str = "contiguous"
    seed: int = 0

    @property
    def shares(self) -> Array:
        """Planted eigenvalues over their sum, descending; min(n - 1, d) of them, zeros when all are."""
        lam = SPECTRA[self.spectrum](min(self.n - 1, self.d))
        shares: Array = lam / max(lam.sum(), np.finfo(float).tiny)
        return shares

    def array(self) -> Array:
        """Matrix in float64, before any cast; its spread (root mean variance of a column) is `scale`."""
        rng = np.random.default_rng(self.seed)
        y = planted(self.n, self.d, self.shares, rng)
        return (y + self.offset * rng.choice([-1.0, 1.0], self.d)) * self.scale

    def tensor(self) -> Tensor:
        """Matrix in its dtype and layout, amid NaN wherever memory is not part of it."""
        x = torch.from_numpy(self.array()).to(self.dtype)
        n, d = self.n, self.d
        if self.layout == "transposed":
            return x.T.contiguous().T
        if self.layout == "padded rows":
            memory = x.new_full((n, d + 3), torch.nan)
            memory[:, 1 : d + 1] = x
            return memory[:, 1 : d + 1]
        if self.layout == "every other column":
            memory = x.new_full((n + 1, 2 * d), torch.nan)
            memory[1:, 1::2] = x
            return memory[1:, 1::2]
        if self.layout == "strided both ways":
            memory = x.new_full((d, 2 * n), torch.nan)
            memory[:, ::2] = x.T
            return memory[:, ::2].T
        if self.layout == "expanded columns":
            return x[:, :1].clone().expand(n, d)
        if self.layout == "expanded rows":
            return x[:1].clone().expand(n, d)
        return x

    def but(self, **changes: Any) -> Activations:
        """Copy with some fields replaced."""
        return replace(self, **changes)


def planted(n: int, d: int, shares: Array, rng: np.random.Generator) -> Array:
    """Rows of mean 0, (n, d) in float64, whose covariance has the trace d and the eigenvalues ``d shares``."""
    r = len(shares)
    basis = np.linalg.qr(np.column_stack([np.ones(n), rng.standard_normal((n, r))]))[0][:, 1:]
    directions = np.linalg.qr(rng.standard_normal((d, d)))[0][:, :r]
    y: Array = (basis * np.sqrt(n * d * shares)) @ directions.T
    return y


def seeds() -> SearchStrategy[int]:
    """Strategy of seeds."""
    return _st().integers(0, 2**32 - 1)


def activations(
    *,
    max_n: int = 40,
    max_d: int = 24,
    min_n: int = 2,
    spectra: Iterable[str] = tuple(SPECTRA),
    dtypes: Iterable[torch.dtype] = tuple(RANGE),
    layouts: Iterable[str] = LAYOUTS,
    max_offset: float = 1e6,
    scaled: bool = True,
) -> SearchStrategy[Activations]:
    """Strategy of `Activations` within limits; offsets and scales are those that the dtype can hold (`RANGE`)."""
    st = _st()

    def of(dtype: torch.dtype) -> SearchStrategy[Activations]:
        offsets, exponent = RANGE[dtype]
        return st.builds(
            Activations,
            n=st.integers(min_n, max_n),
            d=st.integers(2, max_d),
            spectrum=st.sampled_from(list(spectra)),
            offset=st.sampled_from([offset for offset in offsets if offset <= max_offset]),
            scale=st.integers(-exponent, exponent).map(lambda power: 10.0**power) if scaled else st.just(1.0),
            dtype=st.just(dtype),
            layout=st.sampled_from(list(layouts)),
            seed=seeds(),
        )

    return st.sampled_from(list(dtypes)).flatmap(of)


def plain(**limits: Any) -> SearchStrategy[Activations]:
    """Contiguous float64 near 1, no offset: for properties whose own arithmetic would round otherwise."""
    fixed = {"dtypes": (torch.float64,), "layouts": ("contiguous",), "max_offset": 0.0, "scaled": False}
    return activations(**{**fixed, **limits})


@dataclass(frozen=True)
class Truth:
    """Spectrum and entropy of one matrix.

    `shares` are the eigenvalues over their sum, long double, ascending, zeros for constant rows; the
    covariance is `matrix` times 2^exponent. `entropy` is in nats, floored as in the convention "relative".
    """

    shares: Array
    matrix: Array
    exponent: int
    entropy: float

    @property
    def d(self) -> int:
        """Number of features."""
        return len(self.shares)

    @property
    def at_the_floor(self) -> int:
        """Eigenvalues within a factor of 4 of d eps lambda_max, which rounding may put on either side."""
        return count_at_floor(self.shares)

    def tolerance(self, away: float = 1e-12) -> float:
        """Error allowed to an entropy in nats: ``away * log d``, or at the floor Fannes-Audenaert's bound.

        The distance of the spectra is then at most the mass of those eigenvalues and the error of the others,
        for which the gate of the eigenvalues stands, 10 d eps lambda_max each.
        """
        if self.at_the_floor == 0:
            return away * float(np.log(self.d))
        largest = float(self.shares[-1])
        mass = self.at_the_floor * 4 * self.d * EPS * largest
        return fannes_audenaert(mass + self.d * 10 * self.d * EPS * largest / 2, self.d)


def count_at_floor(eigenvalues: Array) -> int:
    """Eigenvalues within a factor of 4 of d eps times the largest."""
    floor = len(eigenvalues) * EPS * np.max(eigenvalues)
    return int(np.sum((eigenvalues > floor / 4) & (eigenvalues < 4 * floor)))


def truth_of(h: Tensor) -> Truth:
    """Truth for the values in `h`, an (n, d) tensor of any float dtype."""
    x = h.detach().to(torch.float64).cpu().numpy()
    return exact_truth(x) if x.shape[1] <= EXACT_UP_TO else long_double_truth(x)


def long_double_truth(x: Array) -> Truth:
    """Two-pass covariance and Jacobi rotations in long double."""
    matrix, exponent = scaled_covariance(x, extended=True)
    trace = np.trace(matrix)
    if trace == 0:
        return Truth(np.zeros(len(matrix), np.longdouble), matrix, exponent, 0.0)
    shares = np.maximum(eigenvalues(matrix / trace), 0)
    return Truth(shares, matrix, exponent, entropy_of_eigenvalues(shares))


def exact_truth(x: Array) -> Truth:
    """Covariance in integers, eigenvalues and entropy at 50 digits."""
    mp = _needed("mpmath")
    scatter, exponent = exact_scatter(x)
    n, d = x.shape
    trace = sum(scatter[i, i] for i in range(d))
    bits = max(0, int(trace).bit_length() - 64)
    matrix = np.array(
        [[_long_double(value, bits) for value in row] for row in scatter], dtype=np.longdouble
    ) / np.longdouble(n * n)
    if trace == 0:
        return Truth(np.zeros(d, np.longdouble), matrix, exponent, 0.0)
    with mp.workdps(50):
        normalized = mp.matrix([[mp.mpf(value) / trace for value in row] for row in scatter.tolist()])
        lam = sorted(max(value, mp.mpf(0)) for value in mp.eigsy(normalized, eigvals_only=True))
        kept = [value for value in lam if value >= d * EPS * lam[-1]]
        p = [value / mp.fsum(kept) for value in kept]
        entropy = float(-mp.fsum(value * mp.log(value) for value in p))
        shares = np.array([mp.nstr(value, 30) for value in lam]).astype(np.longdouble)
    return Truth(shares, matrix, exponent + bits, entropy)


def exact_scatter(x: Array) -> tuple[Array, int]:
    """``n^2 C`` as integers (Python's, in an object array) times 2^exponent, exactly."""
    mantissa, exponent = np.frexp(x)
    integers = (mantissa * 2.0**53).astype(np.int64).astype(object)
    used = exponent[mantissa != 0]
    lowest = int(used.min()) if used.size else 0
    steps = np.where(mantissa != 0, exponent - lowest, 0).astype(object)
    rows = integers * 2**steps
    sums = rows.sum(axis=0)
    return len(x) * (rows.T @ rows) - np.outer(sums, sums), 2 * (lowest - 53)


def _long_double(value: int, bits: int) -> np.longdouble:
    """``value / 2^bits`` to the last place of a long double, for values beyond its integers."""
    mp = _needed("mpmath")
    with mp.workdps(50):
        return np.longdouble(mp.nstr(mp.mpf(value) / mp.mpf(2) ** bits, 30))


Entropy = Callable[[Tensor], float]


class Comparison(NamedTuple):
    """A value, the nearest one that would be right, and the distance allowed between the two."""

    got: float
    want: float
    allowed: float


@dataclass(frozen=True)
class Property:
    """What must hold of the normalised entropy of every activation matrix.

    `check` takes an implementation and the inputs that it is tried on, which `inputs` gives strategies of.
    """

    name: str
    statement: str
    inputs: Callable[[], dict[str, SearchStrategy[Any]]]
    check: Callable[..., Comparison]


PROPERTIES: dict[str, Property] = {}
"""Every property by its name, in the order in which `check_backend` tries them."""


def check_backend(
    implementation: Callable[[Any], Any],
    *,
    properties: Iterable[str] | None = None,
    arrays: bool = False,
    examples: int | None = None,
) -> None:
    """Check of an implementation of the spectral entropy against every property in `PROPERTIES`.

    Parameters
    ----------
    implementation : callable
        A function of activations (n, d), one sample per row, n and d at least 2, to the normalised entropy
        ``H / log d`` of their covariance's spectrum: a float, or what `float` takes. Its input is float16, bfloat16,
        float32 or float64 of any strides, finite, and must be left as it is.
    properties : iterable of str, optional
        Names of those to try; all by default. One a test: ``pytest.mark.parametrize("name", PROPERTIES)``.
    arrays : bool
        Give it NumPy arrays instead of tensors; bfloat16, which NumPy lacks, as float32.
    examples : int, optional
        Matrices to try for each property; by default as many as the active profile of Hypothesis says, whose other
        settings hold too, except for the deadline.

    Raises
    ------
    AssertionError
        At the first property that fails: its name, what it says, both values and the input.
    ValueError
        If there is no property of a name.
    TypeError
        If `properties` is a text, whose letters are no names.
    ModuleNotFoundError
        If Hypothesis or mpmath is missing.

    Notes
    -----
    What the implementation raises is passed on, with the input in a note.

    Examples
    --------
    >>> import fastent
    >>> check_backend(lambda h: fastent.spectral_entropy(h).normalized, examples=3)
    """
    hypothesis = _needed("hypothesis")
    if isinstance(properties, str):
        raise TypeError(f"properties must be several names, such as [{properties!r}]; got a text")
    chosen = list(PROPERTIES if properties is None else properties)
    unknown = [name for name in chosen if name not in PROPERTIES]
    if unknown:
        raise ValueError(f"no property is called {unknown[0]!r}; there are {', '.join(PROPERTIES)}")
    settings = hypothesis.settings(
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
        **({} if examples is None else {"max_examples": examples}),
    )

    def entropy(h: Tensor) -> float:
        return float(implementation(_array_of(h) if arrays else h))

    for name in chosen:
        inputs = hypothesis.strategies.fixed_dictionaries(PROPERTIES[name].inputs())
        settings(hypothesis.given(inputs=inputs)(_test(PROPERTIES[name], entropy)))()


def _test(tried: Property, entropy: Entropy) -> Callable[[dict[str, Any]], None]:
    def holds(inputs: dict[str, Any]) -> None:
        got, want, allowed = tried.check(entropy, **inputs)
        if not abs(got - want) <= allowed:  # NaN is never right
            shown = ", ".join(f"{name}={value!r}" for name, value in inputs.items())
            raise AssertionError(
                f"{tried.name}: {tried.statement} Got {got!r}, expected {want!r} to within {allowed:.1e}, of {shown}"
            )

    holds.__name__ = holds.__qualname__ = tried.name  # by which Hypothesis keeps failing examples
    return holds


def _property(
    statement: str, inputs: Callable[[], dict[str, SearchStrategy[Any]]]
) -> Callable[[Callable[..., Comparison]], Callable[..., Comparison]]:
    """Enter a check of (implementation, inputs...) in `PROPERTIES`."""

    def enter(check: Callable[..., Comparison]) -> Callable[..., Comparison]:
        name = check.__name__.removeprefix("_")
        PROPERTIES[name] = Property(name, statement, inputs, check)
        return check

    return enter


@_property(
    "A constant added to each feature, up to 2^30 times the spread, changes nothing.",
    lambda: {"h": plain(), "exponent": _st().integers(0, 30), "seed": seeds()},
)
def _ignores_translation(entropy: Entropy, h: Activations, exponent: int, seed: int) -> Comparison:
    # Multiples of 2^-16 moved by integers: no sum is rounded, so only the implementation can err.
    x = np.round(h.array() * 2**16) / 2**16
    moved = x + np.random.default_rng(seed).integers(-(2**exponent), 2**exponent, h.d, endpoint=True)
    return _same(entropy, moved, x, 1e-13)


@_property(
    "Rows that are all equal have entropy 0, not NaN and not 1.",
    lambda: {"h": activations(spectra=("zero",))},
)
def _is_zero_for_constant_rows(entropy: Entropy, h: Activations) -> Comparison:
    return Comparison(entropy(h.tensor()), 0.0, 0.0)


@_property(
    "H lies between 0 and log min(n - 1, d), the most that n rows in d dimensions allow.",
    lambda: {"h": activations()},
)
def _lies_between_zero_and_the_rank_limit(entropy: Entropy, h: Activations) -> Comparison:
    got = entropy(h.tensor())
    return Comparison(got, float(np.clip(got, 0.0, ceiling(h.n, h.d))), 1e-14)


@_property("The order of the rows changes nothing.", lambda: {"h": activations(), "seed": seeds()})
def _ignores_the_order_of_rows(entropy: Entropy, h: Activations, seed: int) -> Comparison:
    x = h.tensor()
    order = torch.from_numpy(np.random.default_rng(seed).permutation(h.n))
    return _same(entropy, x[order], x, 1e-13)


@_property(
    "The order and the signs of the features change nothing.", lambda: {"h": activations(), "seed": seeds()}
)
def _ignores_the_order_and_signs_of_features(entropy: Entropy, h: Activations, seed: int) -> Comparison:
    x = h.tensor()
    rng = np.random.default_rng(seed)
    order = torch.from_numpy(rng.permutation(h.d))
    signs = torch.from_numpy(rng.choice([-1.0, 1.0], h.d)).to(h.dtype)
    return _same(entropy, x[:, order] * signs, x, 1e-13)


@_property("A rotation of the features changes nothing.", lambda: {"h": plain(), "seed": seeds()})
def _ignores_rotation(entropy: Entropy, h: Activations, seed: int) -> Comparison:
    # The product rounds by about d eps of each row, hence 1e-12 rather than 1e-13.
    q = np.linalg.qr(np.random.default_rng(seed).standard_normal((h.d, h.d)))[0]
    return _same(entropy, h.array() @ q, h.array(), 1e-12)


@_property(
    "Scaling all activations changes nothing: small eigenvalues are dropped by comparison with the largest.",
    lambda: {"h": plain(), "exponent": _st().floats(-6, 6)},
)
def _ignores_scale(entropy: Entropy, h: Activations, exponent: float) -> Comparison:
    return _same(entropy, h.array() * 10.0**exponent, h.array(), 1e-12)


@_property(
    "Every row taken the same number of times changes nothing, also where n then exceeds d.",
    lambda: {
        "h": activations(max_n=16),
        "copies": _st().integers(2, 4),
        "interleaved": _st().booleans(),
    },
)
def _ignores_repeated_rows(entropy: Entropy, h: Activations, copies: int, interleaved: bool) -> Comparison:
    x = h.tensor()
    repeated = x.repeat_interleave(copies, dim=0) if interleaved else torch.cat([x] * copies)
    return _same(entropy, repeated, x, 1e-13)


@_property(
    "Strides change nothing, and what lies between the entries in memory is not read.",
    lambda: {"h": activations()},
)
def _ignores_memory_layout(entropy: Entropy, h: Activations) -> Comparison:
    x = h.tensor()
    return _same(entropy, x, x.contiguous().clone(), 1e-13)


@_property(
    "No entry of the input is written to (the value is how many were).",
    lambda: {"h": activations(spectra=TAME, layouts=("contiguous",), dtypes=(torch.float64,))},
)
def _leaves_its_input_as_it_was(entropy: Entropy, h: Activations) -> Comparison:
    x = h.tensor()
    before = x.clone()
    entropy(x)
    return Comparison(float((x != before).sum()), 0.0, 0.0)


@_property(
    "Constant features leave H in nats, so that H / log d falls as d grows, also where d then exceeds n.",
    lambda: {"h": plain(spectra=TAME), "constant": _st().integers(1, 40)},
)
def _constant_features_add_nothing(entropy: Entropy, h: Activations, constant: int) -> Comparison:
    x = h.array()
    wide = np.concatenate([x, np.full((h.n, constant), 7.0)], axis=1)
    return Comparison(_nats(entropy, wide), _nats(entropy, x), 1e-12)


@_property(
    "Planted eigenvalues have the entropy of their shares.",
    lambda: {"h": plain(spectra=[name for name in SPECTRA if name != "through the floor"], max_offset=1.0)},
)
def _is_that_of_a_known_spectrum(entropy: Entropy, h: Activations) -> Comparison:
    return Comparison(_nats(entropy, h.array()), entropy_of_eigenvalues(h.shares), 1e-12)


@_property(
    "Eigenvalues of 16 d eps times the largest count, however many rows there are: the floor is d eps.",
    lambda: {"n": _st().sampled_from([32, 256]), "d": _st().integers(12, 14), "seed": seeds()},
)
def _counts_eigenvalues_above_the_floor(entropy: Entropy, n: int, d: int, seed: int) -> Comparison:
    shares = np.full(d, 16 * d * EPS)
    shares[0] = 1.0
    shares /= shares.sum()
    x = planted(n, d, shares, np.random.default_rng(seed))
    # Without them H would be smaller by 1.4e-11 or more; rounding moves each by a few eps.
    return Comparison(_nats(entropy, x), entropy_of_eigenvalues(shares), 5e-12)


@_property(
    "H is right to 1e-12 of its range, and to what eigenvalues at the floor can make of it.",
    lambda: {"h": activations()},
)
def _is_the_truth(entropy: Entropy, h: Activations) -> Comparison:
    return _true(entropy, h.tensor())


@_property(
    "H is right for activations whose squares leave float64's range.",
    lambda: {
        "h": activations(dtypes=(torch.float64,), max_n=24, max_d=12, scaled=False),
        "exponent": _st().sampled_from([-320, -310, -300, -200, -165, -155, 145, 155, 200, 290]),
    },
)
def _is_the_truth_near_overflow_and_underflow(entropy: Entropy, h: Activations, exponent: int) -> Comparison:
    # Subnormal rows have lost digits, but the truth sees the same rows.
    return _true(entropy, h.but(scale=10.0**exponent).tensor())


@_property(
    "H is right where row 0, which many subtract first, lies far from all others.",
    lambda: {"h": activations(max_offset=1e2), "size": _st().sampled_from([1e2, 1e3, 1e4]), "seed": seeds()},
)
def _is_the_truth_where_the_first_row_is_far_away(
    entropy: Entropy, h: Activations, size: float, seed: int
) -> Comparison:
    x = h.but(scale=1.0).array()
    x[0] += size * np.random.default_rng(seed).standard_normal(h.d)
    return _true(entropy, torch.from_numpy(x))


@_property(
    "Rows and columns of a matrix that is centred both ways have one entropy in nats.",
    lambda: {"h": plain(spectra=TAME, min_n=3)},
)
def _is_that_of_the_transpose_where_both_are_centred(entropy: Entropy, h: Activations) -> Comparison:
    # Z^T Z and Z Z^T share their non-zero spectrum; centred both ways, both are covariances.
    z = _centred(_centred(h.array()).T).T
    return Comparison(_nats(entropy, z), _nats(entropy, z.T), 1e-12)


@_property(
    "All products of a row of one matrix and a row of another have the sum of both entropies, in nats.",
    lambda: {name: plain(spectra=TAME, max_n=7, max_d=4) for name in "ab"},
)
def _adds_up_over_a_kronecker_product(entropy: Entropy, a: Activations, b: Activations) -> Comparison:
    # All pairs x_i (x) y_j of centred rows: mean 0 and covariance C_x (x) C_y.
    x, y = _centred(a.array()), _centred(b.array())
    product = np.einsum("ik,jl->ijkl", x, y).reshape(a.n * b.n, a.d * b.d)
    return Comparison(_nats(entropy, product), _nats(entropy, x) + _nats(entropy, y), 1e-12)


@_property(
    "A mixture of two covariances of trace one has at least the mean of their entropies.",
    lambda: {
        "a": plain(max_n=16, max_d=8),
        "seed": seeds(),
        "spectrum": _st().sampled_from(sorted(SPECTRA)),
        "weight": _st().floats(0, 1),
    },
)
def _is_concave_at_trace_one(
    entropy: Entropy, a: Activations, seed: int, spectrum: str, weight: float
) -> Comparison:
    parts = [_centred(h.array()) for h in (a, a.but(spectrum=spectrum, seed=seed))]
    if not all(part.any() for part in parts):
        return Comparison(0.0, 0.0, 0.0)  # constant rows cannot have trace one
    x, y = (part / math.sqrt((part * part).sum() / a.n) for part in parts)
    got = _nats(entropy, np.concatenate([np.sqrt(2 * weight) * x, np.sqrt(2 * (1 - weight)) * y]))
    return Comparison(got, max(got, weight * _nats(entropy, x) + (1 - weight) * _nats(entropy, y)), 1e-12)


@_property(
    "Mixing each row with another one changes H in nats by B(alpha, d) at most (docs/mathematics.md, Lemma 5).",
    lambda: {"h": plain(), "alpha": _st().floats(0, 1), "seed": seeds()},
)
def _changes_by_mixing_within_the_best_bound(
    entropy: Entropy, h: Activations, alpha: float, seed: int
) -> Comparison:
    x = h.array()
    before, bound = _nats(entropy, x), best_bound(alpha, h.d)
    after = _nats(entropy, mix(x, np.random.default_rng(seed).permutation(h.n), alpha))
    return Comparison(after, float(np.clip(after, before - bound, before + bound)), 1e-11)


def _true(entropy: Entropy, x: Tensor) -> Comparison:
    truth, unit = truth_of(x), math.log(x.shape[1])
    return Comparison(entropy(x), truth.entropy / unit, truth.tolerance(1e-12) / unit)


def _same(entropy: Entropy, moved: Tensor | Array, x: Tensor | Array, tolerance: float) -> Comparison:
    """Normalised entropies equal to `tolerance`, or to what eigenvalues at the floor can make of them."""
    matrices = [m if isinstance(m, Tensor) else torch.from_numpy(m) for m in (moved, x)]
    spectra = [eigenvalues(scaled_covariance(matrix.double().numpy())[0]) for matrix in matrices]
    at_floor = max(map(count_at_floor, spectra))
    if at_floor:
        d = len(spectra[0])
        share = float(spectra[0][-1] / spectra[0].sum())
        tolerance += fannes_audenaert(at_floor * 4 * d * EPS * share, d) / math.log(d)
    return Comparison(entropy(matrices[0]), entropy(matrices[1]), tolerance)


def _nats(entropy: Entropy, x: Array) -> float:
    return entropy(torch.from_numpy(np.ascontiguousarray(x))) * math.log(x.shape[1])


def _centred(x: Array) -> Array:
    y: Array = x - x.mean(axis=0)
    y -= y.mean(axis=0)
    return y


def _array_of(h: Tensor) -> Array:
    array: Array = (h.float() if h.dtype == torch.bfloat16 else h).numpy()
    return array


def _st() -> Any:
    return _needed("hypothesis").strategies


def _needed(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        command = install_command("testing")
        raise ModuleNotFoundError(
            f"fastent.testing needs {package}, which is not installed: {command}", name=package
        ) from None
