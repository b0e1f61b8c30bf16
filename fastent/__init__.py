"""Exact spectral entropy of a network's representations, cheap enough to leave on while it trains."""

__version__ = "0.1.0"

import importlib
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from collections.abc import Callable
    from os import PathLike

    load_runs: Callable[[str | PathLike[str]], Any]
else:

    def __getattr__(name: str) -> Any:
        """Import what is the study's, and takes packages that the library does not need, when it is asked for."""
        if name != "load_runs":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            return importlib.import_module("fastent.grokking.experiments.tables").load_runs
        except ModuleNotFoundError as error:
            from fastent.installation import install_command

            raise ModuleNotFoundError(
                f"load_runs needs {error.name}, which is not installed: {install_command('train')}",
                name=error.name,
            ) from error

    def __dir__() -> list[str]:
        return [*globals(), "load_runs"]
