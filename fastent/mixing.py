"""Representation mixing, the intervention of the paper's Section 6 (equation 3, Appendix C).

``h~_i = (1 - alpha) h_i + alpha h_(i + shift mod N)``. The paper says that it keeps the entropy up; it need not:
see `fastent.reference.mixing` for the exact covariance and the sharp bound.
"""

from __future__ import annotations

from torch import Tensor

from fastent.linalg import check_pool


def mix_representations(h: Tensor, alpha: float = 0.1, shift: int = 1) -> Tensor:
    """Mix each row with the one `shift` places on; differentiable.

    Parameters
    ----------
    h : Tensor, shape (..., n, d)
        Representations, one sample per row.
    alpha : float
        Weight of the other row, 0 to 1 (no unit). The paper's text lost its value; 0.1 is ours.
    shift : int
        Cyclic shift along the rows; not a multiple of n, so that no row is mixed with itself.

    Returns
    -------
    Tensor
        Same shape and dtype as `h`.

    Raises
    ------
    ValueError
        If `alpha` is outside [0, 1] or `shift` is a multiple of n.

    References
    ----------
    arXiv 2604.13123, equation 3 and Appendix C.

    Examples
    --------
    >>> import torch
    >>> mix_representations(torch.tensor([[0.0], [1.0], [2.0]]), alpha=0.5)
    tensor([[0.5000],
            [1.5000],
            [1.0000]])
    """
    check_pool()
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must be between 0 and 1; got {alpha!r}")
    n = h.shape[-2]
    if n == 0 or shift % n == 0:
        raise ValueError(f"shift must not be a multiple of the number of rows; got shift = {shift}, n = {n}")
    return (1.0 - alpha) * h + alpha * h.roll(-shift, dims=-2)
