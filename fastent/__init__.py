"""Exact spectral entropy of a network's representations, cheap enough to leave on while it trains."""

from fastent.covariance import covariance
from fastent.entropy import SpectralEntropy, Status, spectral_entropy
from fastent.mixing import mix_representations
from fastent.moments import Moments

__all__ = [
    "Moments",
    "SpectralEntropy",
    "Status",
    "covariance",
    "mix_representations",
    "spectral_entropy",
]
