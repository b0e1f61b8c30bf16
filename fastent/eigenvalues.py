"""Eigenvalues of a centred matrix: cuSOLVER on CUDA, LAPACK on the CPU, and LAPACK where cuSOLVER fails.

LAPACK is torch's, or for large matrices NumPy's, where that is faster and has one thread (`fastent.openblas`).
``torch.linalg.eigvalsh`` on CUDA stops the host until the device is done. A solve whose eigenvalues do not sum to the
trace is a failed one. NaN must be kept out by the caller: solvers hang or fail on it.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from fastent import openblas
from fastent.covariance import CenteredMatrix
from fastent.forks import check_pool

EPS = torch.finfo(torch.float64).eps

fallbacks: list[str] = []
"""Reasons of the eigensolves that failed on a GPU and were done again on the CPU, in order."""

_log = logging.getLogger(__name__)


def eigenvalues(centered: CenteredMatrix) -> tuple[Tensor, str]:
    """Eigenvalues of the lower triangle of a centred matrix.

    Parameters
    ----------
    centered : CenteredMatrix
        With finite entries; batched or not.

    Returns
    -------
    values : Tensor, shape (..., m)
        float64 on the CPU, ascending.
    solver : str
        "cusolver" or "lapack", and the matrix in brackets.
    """
    check_pool()
    # LAPACK is column-major: the upper triangle of the transpose is our lower one, and needs no copy.
    matrix = centered.matrix.mT
    if matrix.device.type == "cuda":
        try:
            values = torch.linalg.eigvalsh(matrix, UPLO="U").cpu()
            if _sums_to_trace(values, matrix):
                return values, f"cusolver ({centered.side})"
            reason = "its eigenvalues do not sum to the trace"
        except RuntimeError as error:  # torch.linalg.LinAlgError is one
            reason = str(error)
        fallbacks.append(reason)
        _log.warning("eigvalsh failed on the GPU (%s): solved on the CPU, %d so far", reason, len(fallbacks))
        matrix = matrix.cpu()
    if matrix.shape[-1] >= openblas.SOLVE_FROM and openblas.preferred(matrix):
        return openblas.eigenvalues(matrix.mT), f"lapack ({centered.side})"
    return torch.linalg.eigvalsh(matrix, UPLO="U"), f"lapack ({centered.side})"


def _sums_to_trace(values: Tensor, matrix: Tensor) -> bool:
    trace = matrix.diagonal(dim1=-2, dim2=-1).sum(-1).cpu()
    gate = max(1e-12, 30 * matrix.shape[-1] * EPS)
    return bool(((values.sum(-1) - trace).abs() <= gate * trace).all())
