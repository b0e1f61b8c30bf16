"""Moments and their merge."""

from dataclasses import replace
from functools import reduce

import numpy as np
import pytest

from fastent.reference.covariance import covariance
from fastent.reference.moments import Moments, merge, moments


@pytest.mark.parametrize("extended", [False, True])
@pytest.mark.parametrize("cuts", [(0,), (1,), (40, 41), (7, 20, 20, 90), tuple(range(1, 100))])
def test_merged_parts_have_the_moments_of_the_whole(cuts: tuple[int, ...], extended: bool) -> None:
    x = np.random.default_rng(0).standard_normal((100, 6)) + 10
    total = reduce(merge, (moments(part, extended=extended) for part in np.split(x, cuts)))
    assert total.n == 100
    np.testing.assert_allclose(total.mean, x.mean(axis=0), rtol=1e-15)
    np.testing.assert_allclose(total.covariance(), covariance(x, extended=True), atol=4e-15)
    np.testing.assert_allclose(total.covariance(correction=1), np.cov(x.T), atol=2e-14)
    assert np.array_equal(total.m2, total.m2.T)


def test_a_mean_in_one_float64_loses_what_the_shift_keeps_at_an_offset_of_1e6() -> None:
    x = np.random.default_rng(1).standard_normal((512, 8)) + 1e6 * np.sqrt(2)
    truth = covariance(x, extended=True)
    parts = [moments(part) for part in np.split(x, range(1, 512, 7))]

    def error(parts: list[Moments]) -> float:
        return float(np.max(np.abs(reduce(merge, parts).covariance() - truth)))

    rounded = [replace(part, shift=part.mean, delta=0 * part.delta) for part in parts]
    assert error(parts) < 4e-15
    assert 1e-12 < error(rounded) < 3e-10  # eps * offset / spread = 3e-10 for each mean


def test_empty_parts_are_neutral_and_have_no_covariance() -> None:
    part, empty = moments(np.eye(3)), moments(np.empty((0, 3)))
    assert merge(part, empty) is part
    assert merge(empty, part) is part
    assert empty.n == 0
    with pytest.raises(ValueError, match="number of rows 0"):
        empty.covariance()


def test_rows_that_are_not_a_matrix_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(n, d\); got \(3,\)"):
        moments(np.zeros(3))
