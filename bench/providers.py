"""Inputs and providers: shapes that are timed, inputs whose answer is known, and who computes what from them.

A provider is a function of activations (n, d), a torch tensor of any float dtype, that gives the entropy of the
covariance spectrum in nats, or another quantity that is named: fastent, the ways anyone writes first, and peers from
their published packages. Nothing of a peer is rewritten here: what is timed is its own code, called as its
documentation says, with its best settings: a float64 copy where it would compute in the input's precision ("no
copy": without it), no logging, the cheaper of two forms of the same thing; the copy is part of its time. RankMe is a
Lightning callback; it is called as Lightning would, with a queue that holds the activations and a module that keeps
what is logged. A package is imported when its provider is loaded, and not before. What is not installed, or raises, has
rows that say so, and ends nothing.

A guest comes in by one line: an entry of `PROVIDERS`, or from outside ``fastent bench --provider module:name``, which
names a function of activations that gives the entropy in nats, or a `Provider` (`invite`). It is in every question of
providers from then on.

How a peer's quantity becomes ours: exp H of ssrlib and of vendi-score by the logarithm; the Vendi score is of a
kernel matrix, so it gets centred rows divided by their Frobenius norm, whose kernel has the shares of the variance as
its eigenvalues. RankMe takes the entropy of singular values, uncentred, with 1e-5 added to each share:
no function of it gives ours, so it is compared with the truth of its own quantity (`RANKME`).
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastent

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}

Call = Callable[[Tensor], float]
Matrix = Callable[[Tensor], Tensor]

ENTROPY = "entropy"
COVARIANCE = "covariance"
RANKME = "RankMe"


@dataclass(frozen=True)
class Shape:
    """Normal entries of one shape and dtype; `quick` ones are measured by ``--quick`` too."""

    n: int
    d: int
    dtype: str = "float32"
    quick: bool = False

    def tensor(self) -> Tensor:
        """Activations (n, d)."""
        return torch.randn(self.n, self.d, generator=torch.Generator().manual_seed(0)).to(DTYPES[self.dtype])

    @property
    def columns(self) -> dict[str, object]:
        """Columns of a row."""
        return {"n": self.n, "d": self.d, "dtype": self.dtype}


def chosen(shapes: Iterable[Shape], quick: bool) -> list[Shape]:
    """All of them, or the ones for ``--quick``."""
    return [shape for shape in shapes if shape.quick or not quick]


SHAPES = (
    Shape(512, 64),
    Shape(512, 128, quick=True),
    Shape(512, 128, "bfloat16"),
    Shape(512, 128, "float64"),
    Shape(512, 256),
    Shape(512, 512),
    Shape(512, 768),
    Shape(4096, 128, quick=True),
    Shape(65536, 128),
    Shape(512, 1024, quick=True),
    Shape(512, 4096),
)


@dataclass(frozen=True)
class Input:
    """Activations whose entropy is known to many digits.

    Attributes
    ----------
    name : str
        What is easy or hard about it.
    make : callable
        From a generator to activations (n, d).
    """

    name: str
    make: Callable[[torch.Generator], Tensor]

    def tensor(self) -> Tensor:
        """Activations (n, d), the same ones each time."""
        return self.make(torch.Generator().manual_seed(1))


def planted(g: torch.Generator, n: int, d: int) -> Tensor:
    """Float64 rows with a decaying spectrum, ``1 / (1 + i)``, in a rotated basis."""
    basis = torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64))[0]
    shares = 1.0 / torch.arange(1, d + 1, dtype=torch.float64)
    return (torch.randn(n, d, generator=g, dtype=torch.float64) * shares.sqrt()) @ basis


def _duplicates(g: torch.Generator) -> Tensor:
    return planted(g, 8, 64).repeat(64, 1).float()


INPUTS = (
    Input("easy", lambda g: planted(g, 512, 64).float()),
    Input("easy, float64", lambda g: planted(g, 512, 64)),
    Input("bfloat16", lambda g: planted(g, 512, 64).bfloat16()),
    Input("offset 1e6", lambda g: (planted(g, 512, 64) + 1e6).float()),
    Input("offset 1e6, float64", lambda g: planted(g, 512, 64) + 1e6),
    Input("scale 1e-7", lambda g: (planted(g, 512, 64) * 1e-7).float()),
    Input("N < d", lambda g: planted(g, 24, 64).float()),
    Input("duplicates", _duplicates),
    Input("constant rows", lambda g: torch.full((512, 64), 0.1)),
)


@dataclass(frozen=True)
class Provider:
    """One way to the answer.

    Attributes
    ----------
    name : str
        As it stands in the rows.
    load : callable
        Imports what is needed and returns the function, `Call` or `Matrix`; raises ImportError where that is not
        installed.
    package : str, optional
        Distribution whose version goes into the rows; None for what comes with fastent.
    quantity : str
        `ENTROPY`, in nats, `COVARIANCE`, a matrix with the normaliser 1/n, or what it computes instead of an entropy.
    exact : bool
        Whether it is meant to be right to float64 rounding on ordinary input.
    """

    name: str
    load: Callable[[], Callable[[Tensor], Any]]
    package: str | None = None
    quantity: str = ENTROPY
    exact: bool = True


def entropy_of(eigenvalues: np.ndarray) -> float:
    """Entropy in nats of eigenvalues as a solver gave them: the ones that are not positive count as 0."""
    positive = eigenvalues[eigenvalues > 0]
    if positive.size == 0:
        return math.nan
    p = positive / positive.sum()
    return float(-(p * np.log(p)).sum())


def ours(h: Tensor) -> float:
    """Fastent's entropy."""
    return float(fastent.spectral_entropy(h).entropy)


def direct(h: Tensor) -> float:
    """`direct_entropy`, read by the host."""
    return float(direct_entropy(h))


def direct_entropy(h: Tensor) -> Tensor:
    """Spectral entropy as it is usually written, with the paper's absolute clamp."""
    eigenvalues = torch.linalg.eigvalsh(direct_covariance(h)).clamp(min=1e-12)
    p = eigenvalues / eigenvalues.sum()
    return -(p * p.log()).sum()


def direct_covariance(h: Tensor) -> Tensor:
    """Covariance as it is usually written: a float64 copy, its mean taken off, one full product."""
    x = h.double()
    x = x - x.mean(0)
    return x.T @ x / x.shape[0]


def torch_cov(h: Tensor) -> Tensor:
    """``torch.cov`` with the normaliser 1/n, of a float64 copy."""
    return torch.cov(h.double().T, correction=0)


def numpy_covariance(h: Tensor) -> np.ndarray:
    """``numpy.cov`` with the normaliser 1/n, in float64."""
    x = h.double() if h.dtype == torch.bfloat16 else h  # of other dtypes it makes float64 itself
    return np.cov(x.numpy(), rowvar=False, bias=True, dtype=np.float64)


def numpy_entropy(h: Tensor) -> float:
    """``numpy.cov`` and ``numpy.linalg.eigvalsh``."""
    return entropy_of(np.linalg.eigvalsh(numpy_covariance(h)))


def scikit_learn(solver: str, *, cast: bool = True) -> Callable[[], Call]:
    """``sklearn.decomposition.PCA``: shares from its explained variances.

    "covariance_eigh", the solver that its "auto" takes for tall matrices, is replaced by "full" for wide ones.
    """

    def load() -> Call:
        from sklearn.decomposition import PCA

        def call(h: Tensor) -> float:
            x = float64_array(h) if cast else h.numpy()
            chosen = "full" if x.shape[0] < x.shape[1] else solver
            with np.errstate(invalid="ignore", divide="ignore"):
                variances = PCA(svd_solver=chosen).fit(x).explained_variance_
            return entropy_of(variances.astype(np.float64))

        return call

    return load


def ssrlib(*, cast: bool = True) -> Callable[[], Call]:
    """Log of ``EffectiveRankProcessor`` through an ``EmbeddingProbe``."""

    def load() -> Call:
        _import("ssrlib")
        from ssrlib.analysis import EmbeddingProbe
        from ssrlib.processing import EffectiveRankProcessor

        probe = EmbeddingProbe([EffectiveRankProcessor()])

        def call(h: Tensor) -> float:
            return _log(probe(float64_array(h) if cast else h)["EffectiveRank"])

        return call

    return load


def ssrlib_streaming() -> Matrix:
    """``CovarianceProcessor`` fed in batches of 256, as its map-reduce interface is meant."""
    _import("ssrlib")
    from ssrlib.processing import CovarianceProcessor

    def call(h: Tensor) -> Tensor:
        processor = CovarianceProcessor()
        for batch in h.split(256):
            processor.partial_fit(float64_array(batch))
        return torch.from_numpy(processor.finalize()) * ((len(h) - 1) / len(h))

    return call


def vendi() -> Call:
    """Log of the Vendi score of centred rows, by the smaller of its two matrices."""
    from vendi_score import vendi as package

    def call(h: Tensor) -> float:
        x = float64_array(h)
        x = x - x.mean(0)
        norm = np.linalg.norm(x)
        if norm == 0:
            return math.nan  # it has no kernel
        n, d = x.shape
        x *= math.sqrt(n) / norm
        if d <= n:
            return _log(package.score_dual(x, normalize=False))
        return _log(package.score_K(x @ x.T))

    return call


def torchmetrics_states() -> Callable[[Tensor], Any]:
    """``FrechetInceptionDistance`` of features as they are, updated with the activations."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Features(torch.nn.Module):
        num_features = 0

        def forward(self, x: Tensor) -> Tensor:
            return x

    def call(h: Tensor) -> Any:
        features = Features()
        features.num_features = h.shape[1]
        metric = FrechetInceptionDistance(features, input_img_size=(h.shape[1],))
        metric.update(h, real=True)
        return metric

    call(torch.randn(4, 2))  # it raises ModuleNotFoundError itself where torch-fidelity would be needed
    return call


def torchmetrics_covariance() -> Matrix:
    """Covariance that its ``compute`` takes from those states, with the normaliser 1/n."""
    states = torchmetrics_states()

    def call(h: Tensor) -> Tensor:
        metric = states(h)
        n = metric.real_features_num_samples
        mean = (metric.real_features_sum / n).unsqueeze(0)
        return (metric.real_features_cov_sum - n * mean.t().mm(mean)) / n

    return call


def torchmetrics_entropy() -> Call:
    """Entropy of the eigenvalues of that covariance."""
    covariance = torchmetrics_covariance()
    return lambda h: entropy_of(torch.linalg.eigvalsh(covariance(h)).numpy())


def rankme() -> Call:
    """Log of what the callback logs for a queue that holds `h` in float32, its own precision."""
    _import("stable_pretraining")
    from loguru import logger
    from stable_pretraining.callbacks.rankme import RankMe

    logger.disable("stable_pretraining")
    logged: dict[str, float] = {}
    trainer = SimpleNamespace(global_rank=0)
    module = SimpleNamespace(log=logged.__setitem__)

    def call(h: Tensor) -> float:
        callback = RankMe("rankme", "features", len(h), h.shape[1], verbose=False)
        callback._target_queue = SimpleNamespace(data=h.float())
        callback.on_validation_batch_end(trainer, module, {}, {}, 0)
        return _log(logged["rankme"])

    return call


def rankme_truth(h: Tensor) -> float:
    """Entropy of singular values of `h`, uncentred, with RankMe's 1e-5, from long double eigenvalues."""
    from fastent.reference.covariance import eigenvalues

    x = h.double().numpy().astype(np.longdouble)
    s = np.sqrt(np.maximum(eigenvalues(x.T @ x), 0))[::-1][: min(h.shape)]
    p = s / s.sum() + np.longdouble(1e-5)
    return float(-(p * np.log(p)).sum())


def _import(package: str) -> None:
    """Import a package that imports torchvision, also where torchvision's compiled operators do not load.

    Its usual wheel is linked against CUDA and cannot be loaded beside a CPU build of torch. It then fails on the two
    operators that it describes without looking; neither peer uses them, so their names will do.
    """
    try:
        importlib.import_module(package)
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise ImportError(str(error)) from error
        for name in ("nms", "qnms"):
            torch.library.define(
                f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            )
        importlib.import_module(package)


def float64_array(h: Tensor) -> np.ndarray:
    """`h` in float64, by NumPy where it has the dtype: torch's pool of threads would be in the way of the peer's."""
    return (h.double() if h.dtype == torch.bfloat16 else h).numpy().astype(np.float64, copy=False)


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf


OURS = "fastent"
PROVIDERS = [
    Provider(OURS, lambda: ours),
    Provider("torch, direct", lambda: direct, exact=False),  # its clamp is an absolute one
    Provider("numpy", lambda: numpy_entropy, "numpy"),
    Provider("scikit-learn PCA, full", scikit_learn("full"), "scikit-learn"),
    Provider("scikit-learn PCA, covariance", scikit_learn("covariance_eigh"), "scikit-learn"),
    Provider("scikit-learn PCA, no copy", scikit_learn("full", cast=False), "scikit-learn", exact=False),
    Provider("ssrlib", ssrlib(), "ssrlib"),
    Provider("ssrlib, no copy", ssrlib(cast=False), "ssrlib", exact=False),
    Provider("vendi-score", vendi, "vendi-score"),
    Provider("torchmetrics FID states", torchmetrics_entropy, "torchmetrics"),
    Provider("stable-pretraining RankMe", rankme, "stable-pretraining", RANKME, exact=False),
    Provider(OURS, lambda: fastent.covariance, None, COVARIANCE),
    Provider("torch, direct", lambda: direct_covariance, None, COVARIANCE),
    Provider("torch.cov", lambda: torch_cov, None, COVARIANCE),
    Provider("numpy.cov", lambda: lambda h: torch.from_numpy(numpy_covariance(h)), "numpy", COVARIANCE),
    # What these two sum is not centred.
    Provider("ssrlib, streaming", ssrlib_streaming, "ssrlib", COVARIANCE, exact=False),
    Provider("torchmetrics FID states", torchmetrics_covariance, "torchmetrics", COVARIANCE, exact=False),
]


def invite(place: str) -> None:
    """Take in a provider from outside.

    Parameters
    ----------
    place : str
        ``module:name`` of a `Provider`, or of a function of activations (n, d) that gives the entropy in nats, which is
        then called by `place` and not taken for exact.

    Raises
    ------
    ValueError
        If `place` names no module and name, or nothing that can be imported, or a provider of its name and quantity
        is there.
    """
    module, colon, name = place.partition(":")
    if not (module and colon and name):
        raise ValueError(f"a provider is given as module:name; got {place!r}")

    def load() -> Any:
        return getattr(importlib.import_module(module), name)

    try:
        found = load()
    except Exception as error:  # whatever the guest's module raises: whoever typed the name reads it
        raise ValueError(f"the provider {place} cannot be loaded: {type(error).__name__}: {error}") from error
    guest = found if isinstance(found, Provider) else Provider(place, load, exact=False)
    if any((guest.name, _of(guest)) == (other.name, _of(other)) for other in PROVIDERS):
        raise ValueError(
            f"a provider of the {_of(guest)} is called {guest.name!r} already: give it another name"
        )
    PROVIDERS.append(guest)
    loaded.cache_clear()


def _of(provider: Provider) -> str:
    return COVARIANCE if provider.quantity == COVARIANCE else ENTROPY


@cache
def loaded(op: str) -> dict[Provider, Callable[[Tensor], Any] | str]:
    """Load all providers of "entropy" or "covariance"; of one that cannot be loaded, why."""
    found: dict[Provider, Callable[[Tensor], Any] | str] = {}
    for provider in PROVIDERS:
        if _of(provider) == op:
            try:
                found[provider] = provider.load()
            except ImportError as error:
                found[provider] = f"not installed: {error}"
            except Exception as error:  # a guest must not end the benchmark
                found[provider] = f"{type(error).__name__}: {error}"
            if isinstance(reason := found[provider], str):
                print(f"left out: {provider.name} ({reason})", file=sys.stderr)
    return found


def able(
    op: str, h: Tensor, case: dict[str, Any]
) -> tuple[dict[Provider, Callable[[Tensor], Any]], list[dict[str, Any]]]:
    """Return the providers that can be called with `h`, and of each other one a row of `case` that says why not."""
    calls: dict[Provider, Callable[[Tensor], Any]] = {}
    rows = []
    for provider, call in loaded(op).items():
        reason = call
        if not isinstance(call, str):
            try:
                answer = call(h)
                if op == ENTROPY:
                    float(answer)
            except Exception as error:  # as above
                reason = f"{type(error).__name__}: {error}"
            else:
                calls[provider] = call
                continue
        rows.append(
            {**case, "provider": provider.name, "quantity": provider.quantity, "skipped": str(reason)[:300]}
        )
    return calls, rows
