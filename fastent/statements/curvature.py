"""Largest eigenvalue of the loss's Hessian, by Lanczos on Hessian-vector products.

Nothing of the Hessian is stored. The Krylov basis is kept orthogonal in full, so no eigenvalue comes twice, and the
residual ``|beta s|`` bounds the error: some eigenvalue of the Hessian lies that near to the one returned.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastent.train.plain import PlainMLP, PlainTransformer


class Ritz(NamedTuple):
    """Approximate eigenvalue of a symmetric operator.

    Attributes
    ----------
    value : float
        Largest Ritz value, never above the largest eigenvalue.
    residual : float
        ``||A v - value v||``: an eigenvalue lies within this distance.
    products : int
        Products with the operator that it took.
    """

    value: float
    residual: float
    products: int


def largest_eigenvalue(
    operator: Callable[[Tensor], Tensor],
    start: Tensor,
    *,
    tolerance: float = 1e-2,
    max_products: int = 60,
) -> Ritz:
    """Largest eigenvalue of a symmetric operator by Lanczos with full reorthogonalisation.

    Parameters
    ----------
    operator : callable
        Maps a vector (m,) to a vector (m,), linearly and symmetrically.
    start : Tensor, shape (m,)
        Where to start: not orthogonal to the eigenvector sought; a random vector is not.
    tolerance : float
        Stop when the residual is below this share of the value.
    max_products : int
        Stop after so many products whatever the residual.

    References
    ----------
    Parlett, The Symmetric Eigenvalue Problem, 1998, chapter 13.
    """
    basis = [start / torch.linalg.vector_norm(start)]
    diagonal: list[float] = []
    beside: list[float] = []
    while True:
        image = operator(basis[-1])
        diagonal.append(float(basis[-1] @ image))
        known = torch.stack(basis)
        for _ in range(2):  # once leaves rounding errors that grow
            image = image - known.T @ (known @ image)
        beta = float(torch.linalg.vector_norm(image))
        values, vectors = np.linalg.eigh(np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1))
        ritz = Ritz(float(values[-1]), beta * abs(float(vectors[-1, -1])), len(diagonal))
        small = ritz.residual <= tolerance * abs(ritz.value)
        if small or len(diagonal) == min(max_products, len(start)):
            return ritz
        beside.append(beta)
        basis.append(image / beta)


def sharpness(
    module: PlainTransformer | PlainMLP,
    pairs: Tensor,
    labels: Tensor,
    *,
    tolerance: float = 1e-2,
    max_products: int = 60,
) -> Ritz:
    """Largest eigenvalue of the Hessian of the mean cross-entropy in all parameters.

    Parameters
    ----------
    module : PlainTransformer or PlainMLP
        The model, in the precision to compute in.
    pairs : Tensor, shape (N, 2)
        Token pairs, all of the training set for the training loss's curvature.
    labels : Tensor, shape (N,)
        Their classes.
    tolerance, max_products
        As in `largest_eigenvalue`.
    """
    parameters = list(module.parameters())
    with sdpa_kernel(SDPBackend.MATH):  # the fused attention has no second derivative
        loss = nn.functional.cross_entropy(module(pairs), labels)
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, create_graph=True)])

        def hessian_product(v: Tensor) -> Tensor:
            parts = torch.autograd.grad(gradient @ v, parameters, retain_graph=True)
            return torch.cat([part.flatten() for part in parts])

        start = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(0)).to(gradient.dtype)
        return largest_eigenvalue(hessian_product, start, tolerance=tolerance, max_products=max_products)
