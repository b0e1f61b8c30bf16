"""Exact spectral entropy of a network's representations, cheap enough to leave on while it trains."""

from fastent.covariance import covariance
from fastent.entropy import SpectralEntropy, Status, spectral_entropy
from fastent.mixing import mix_representations
from fastent.moments import Moments
from fastent.monitor import SpectralEntropyMonitor
from fastent.records import EntropyRecord
from fastent.stopping import StopAfterCrossing

__all__ = [
    "EntropyRecord",
    "Moments",
    "SpectralEntropy",
    "SpectralEntropyMonitor",
    "Status",
    "StopAfterCrossing",
    "covariance",
    "mix_representations",
    "spectral_entropy",
]
