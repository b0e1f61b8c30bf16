"""Exact spectral entropy of a network's representations, cheap enough to leave on while it trains."""

__version__ = "0.1.0"

from fastent.covariance import covariance
from fastent.entropy import (
    SpectralEntropy,
    Status,
    entropy_of_covariance,
    entropy_of_eigenvalues,
    spectral_entropy,
)
from fastent.forecast.diagnosis import Diagnosis, diagnose
from fastent.forecast.history import History, calibrate_threshold
from fastent.forecast.power_law import PowerLaw
from fastent.forecast.predict import Forecast, predict_grok_time
from fastent.mixing import mix_representations
from fastent.moments import Moments
from fastent.monitor.monitor import SpectralEntropyMonitor, StopAfterCrossing
from fastent.records import Collapse, EntropyRecord, plot_records
from fastent.sampling import SamplingError, sampling_error

__all__ = [
    "Collapse",
    "Diagnosis",
    "EntropyRecord",
    "Forecast",
    "History",
    "Moments",
    "PowerLaw",
    "SamplingError",
    "SpectralEntropy",
    "SpectralEntropyMonitor",
    "Status",
    "StopAfterCrossing",
    "__version__",
    "calibrate_threshold",
    "covariance",
    "diagnose",
    "entropy_of_covariance",
    "entropy_of_eigenvalues",
    "mix_representations",
    "plot_records",
    "predict_grok_time",
    "sampling_error",
    "spectral_entropy",
]
