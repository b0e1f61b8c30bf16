"""Adapters to the peers' published functions; each imports its package when it is loaded, and not before.

Nothing of a peer is rewritten here: what is timed is its own code, called as its documentation says. RankMe is a
Lightning callback; it is called as Lightning would, with a queue that holds the activations and a module
that keeps what is logged.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

Call = Callable[[Tensor], float]
Matrix = Callable[[Tensor], Tensor]


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
            return _entropy(variances.astype(np.float64))

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
    return lambda h: _entropy(torch.linalg.eigvalsh(covariance(h)).numpy())


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


def _entropy(eigenvalues: np.ndarray) -> float:
    from bench.providers import entropy_of

    return entropy_of(eigenvalues)
