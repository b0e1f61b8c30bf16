"""Who computes what: fastent, the ways anyone writes first, and peers from their published packages.

A provider is a function of activations (n, d), a torch tensor of any float dtype, that gives the entropy of the
covariance spectrum in nats, or another quantity that is named. Peers get their best settings: a float64 copy where
they would compute in the input's precision ("no copy": without it), no logging, the cheaper of two forms of the same
thing; the copy is part of their time. What is not installed is left out and said (`missing`).

How a peer's quantity becomes ours: exp H of ssrlib and of vendi-score by the logarithm; the Vendi score is of a
kernel matrix, so it gets centred rows divided by their Frobenius norm, whose kernel has the shares of the variance as
its eigenvalues. RankMe takes the entropy of singular values, uncentred, with 1e-5 added to each share:
no function of it gives ours, so it is compared with the truth of its own quantity (`RANKME`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

import fastent
from bench import peers

Call = Callable[[Tensor], float]
Matrix = Callable[[Tensor], Tensor]

ENTROPY = "entropy"
RANKME = "RankMe"


@dataclass(frozen=True)
class Provider:
    """One way to the answer.

    Attributes
    ----------
    name : str
        As it stands in the rows.
    load : callable
        Imports what is needed and returns the function; raises ImportError where that is not installed.
    package : str, optional
        Distribution whose version goes into the rows; None for what comes with fastent.
    quantity : str
        `ENTROPY`, in nats, or what it computes instead.
    exact : bool
        Whether it is meant to be right to float64 rounding on ordinary input.
    """

    name: str
    load: Callable[[], Call]
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
    """Spectral entropy as it is usually written, with the paper's absolute clamp."""
    eigenvalues = torch.linalg.eigvalsh(direct_covariance(h)).clamp(min=1e-12)
    p = eigenvalues / eigenvalues.sum()
    return float(-(p * p.log()).sum())


def direct_covariance(h: Tensor) -> Tensor:
    """Covariance as it is usually written: a float64 copy, its mean taken off, one full product."""
    x = h.double()
    x = x - x.mean(0)
    return x.T @ x / x.shape[0]


def numpy_covariance(h: Tensor) -> np.ndarray:
    """``numpy.cov`` with the normaliser 1/n, in float64."""
    x = h.double() if h.dtype == torch.bfloat16 else h  # of other dtypes it makes float64 itself
    return np.cov(x.numpy(), rowvar=False, bias=True, dtype=np.float64)


def numpy_entropy(h: Tensor) -> float:
    """``numpy.cov`` and ``numpy.linalg.eigvalsh``."""
    return entropy_of(np.linalg.eigvalsh(numpy_covariance(h)))


ENTROPIES = (
    Provider("fastent", lambda: ours),
    Provider("torch, direct", lambda: direct, exact=False),  # its clamp is an absolute one
    Provider("numpy", lambda: numpy_entropy, "numpy"),
    Provider("scikit-learn PCA, full", peers.scikit_learn("full"), "scikit-learn"),
    Provider("scikit-learn PCA, covariance", peers.scikit_learn("covariance_eigh"), "scikit-learn"),
    Provider(
        "scikit-learn PCA, no copy", peers.scikit_learn("full", cast=False), "scikit-learn", exact=False
    ),
    Provider("ssrlib", peers.ssrlib(), "ssrlib"),
    Provider("ssrlib, no copy", peers.ssrlib(cast=False), "ssrlib", exact=False),
    Provider("vendi-score", peers.vendi, "vendi-score"),
    Provider("torchmetrics FID states", peers.torchmetrics_entropy, "torchmetrics"),
    Provider("stable-pretraining RankMe", peers.rankme, "stable-pretraining", RANKME, exact=False),
)

COVARIANCES: dict[str, tuple[Callable[[], Matrix], str | None]] = {
    "fastent": (lambda: fastent.covariance, None),
    "torch, direct": (lambda: direct_covariance, None),
    "torch.cov": (lambda: lambda h: torch.cov(h.double().T, correction=0), None),
    "numpy.cov": (lambda: lambda h: torch.from_numpy(numpy_covariance(h)), "numpy"),
    "ssrlib, streaming": (peers.ssrlib_streaming, "ssrlib"),
    "torchmetrics FID states": (peers.torchmetrics_covariance, "torchmetrics"),
}


@cache
def entropies() -> dict[Provider, Call]:
    """Load the providers that are installed."""
    found = {}
    for provider in ENTROPIES:
        try:
            found[provider] = provider.load()
        except ImportError:
            continue
    return found


@cache
def covariances() -> dict[str, Matrix]:
    """Load the providers of a covariance that are installed."""
    found = {}
    for name, (load, _) in COVARIANCES.items():
        try:
            found[name] = load()
        except ImportError:
            continue
    return found


def missing() -> list[str]:
    """Distributions of providers that are not installed, as far as their functions could not be loaded."""
    absent = {p.package for p in ENTROPIES if p not in entropies()}
    absent |= {package for name, (_, package) in COVARIANCES.items() if name not in covariances()}
    return sorted(name for name in absent if name)
