"""The implementations that must agree, behind one interface; the decorator that runs a property on each."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastent
from fastent import linalg
from fastent.reference import activations as reference_activations
from fastent.reference import covariance as reference_covariance
from fastent.reference import entropy as reference_entropy
from fastent.reference import moments as reference_moments


@dataclass(frozen=True)
class Result:
    """What a backend says of one matrix; floats, and the eigenvalues ascending."""

    entropy: float
    normalized: float
    effective_rank: float
    participation_ratio: float
    total_variance: float
    ceiling: float
    eigenvalues: np.ndarray


FIELDS = ("entropy", "normalized", "effective_rank", "participation_ratio", "total_variance", "ceiling")


@dataclass(frozen=True)
class Reference:
    """`fastent.reference`, NumPy in float64."""

    name: str = "reference"
    share: float = 1.0  # of the profile's examples

    def covariance(self, h: Tensor, correction: int = 0) -> np.ndarray:
        return reference_covariance.covariance(_array(h), correction=correction)

    def result(self, h: Tensor, **choice: Any) -> Result:
        got = reference_entropy.spectral_entropy(self.rows(h, **choice))
        return Result(*(getattr(got, name) for name in FIELDS), np.asarray(got.eigenvalues))

    def entropy(self, h: Tensor) -> float:
        return self.result(h).entropy

    def moments(self, h: Tensor, **choice: Any) -> reference_moments.Moments:
        return reference_moments.moments(self.rows(h, **choice))

    def rows(
        self,
        h: Tensor,
        *,
        tokens: str | None = None,
        mask: Tensor | None = None,
        positions: str = "flatten",
        channel_axis: int | None = None,
    ) -> np.ndarray:
        """Rows of activations as `fastent.activations.Rows` chooses them."""
        if tokens is not None:
            kept = None if mask is None else _array(mask)
            return reference_activations.rows_of_tokens(_array(h), tokens, kept)
        if channel_axis is not None:
            return reference_activations.rows_of_map(_array(h), positions, channel_axis)
        return _array(h)

    def merge(self, a: reference_moments.Moments, b: reference_moments.Moments) -> reference_moments.Moments:
        return reference_moments.merge(a, b)

    def of_moments(self, m: reference_moments.Moments) -> tuple[np.ndarray, float]:
        matrix = m.covariance()
        eigenvalues = reference_covariance.eigenvalues(matrix)
        return matrix, reference_entropy.entropy_of_eigenvalues(eigenvalues)


@dataclass(frozen=True)
class Fastent:
    """The package, with one of its backends on one device."""

    name: str
    backend: str
    device: str = "cpu"
    share: float = 1.0
    by_openblas: bool = False  # NumPy's library for products and eigenvalues of any size, else torch's

    def covariance(self, h: Tensor, correction: int = 0) -> np.ndarray:
        with self._library():
            got = fastent.covariance(h.to(self.device), correction=correction, backend=self.backend)
        return got.cpu().numpy()

    def result(self, h: Tensor, **choice: Any) -> Result:
        with self._library():
            got = fastent.spectral_entropy(h.to(self.device), backend=self.backend, **self._here(choice))
        return Result(*(getattr(got, name) for name in FIELDS), got.eigenvalues.cpu().numpy())

    def entropy(self, h: Tensor) -> float:
        return self.result(h).entropy

    def moments(self, h: Tensor, **choice: Any) -> fastent.Moments:
        with self._library():
            return fastent.Moments().update(h.to(self.device), backend=self.backend, **self._here(choice))

    def _here(self, choice: dict[str, Any]) -> dict[str, Any]:
        return {
            name: value.to(self.device) if isinstance(value, Tensor) else value
            for name, value in choice.items()
        }

    def merge(self, a: fastent.Moments, b: fastent.Moments) -> fastent.Moments:
        return a.merge(b)

    def of_moments(self, m: fastent.Moments) -> tuple[np.ndarray, float]:
        with self._library():
            return m.covariance().cpu().numpy(), m.spectral_entropy().entropy

    def _library(self) -> Any:
        return patch.multiple(
            linalg, openblas_preferred=lambda x, product_edge=None: self.by_openblas, SOLVE_FROM=2
        )


Backend = Reference | Fastent


def backends(device: str) -> list[Backend]:
    """All that can run in this process: the CPU's, and the interpreter or with ``--device cuda`` the GPU's two."""
    # The interpreter runs a kernel some hundred times slower than compiled code, so it gets fewer examples.
    found: list[Backend] = [Reference(), Fastent("torch", "torch")]
    if linalg._library() is not None:
        found.append(Fastent("openblas", "torch", by_openblas=True))
    if os.environ.get("TRITON_INTERPRET") == "1":
        found.append(Fastent("triton-interpreter", "triton", share=0.4))
    elif device == "cuda":
        found += [Fastent("torch-cuda", "torch", "cuda"), Fastent("triton-cuda", "triton", "cuda")]
    return found


def examples(backend: Backend, share: float = 1.0) -> int:
    """Examples of a property for a backend: its share, and the property's, of the profile's."""
    return max(1, math.ceil(settings().max_examples * backend.share * share))


def for_every_backend(
    share: float = 1.0, /, **strategies: st.SearchStrategy[Any]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Like `given`, for a check of (backend, ...): one test per backend, each with its share of examples."""

    def decorate(check: Callable[..., None]) -> Callable[..., None]:
        def test(backend: Backend) -> None:
            run = given(backend=st.just(backend), **strategies)(check)
            settings(max_examples=examples(backend, share))(run)()

        test.__name__ = check.__name__
        test.__qualname__ = check.__qualname__
        test.__module__ = check.__module__
        test.__doc__ = check.__doc__
        return test

    return decorate


def merge_tree(backend: Backend, parts: list[Any], choices: list[int]) -> Any:
    """Merge neighbours in the order that `choices` spell: every binary tree has a spelling."""
    parts = list(parts)
    for choice in choices:
        if len(parts) > 1:
            i = choice % (len(parts) - 1)
            parts[i : i + 2] = [backend.merge(parts[i], parts[i + 1])]
    return reduce(backend.merge, parts)


def _array(h: Tensor) -> np.ndarray:
    return h.detach().to(torch.float64).cpu().numpy()
