"""Moments and their merge."""

import numpy as np
import pytest

from fastent.reference.covariance import covariance
from fastent.reference.moments import merge, moments


@pytest.mark.parametrize("cuts", [(0,), (1,), (40, 41), (7, 20, 20, 90), tuple(range(1, 100))])
def test_merged_parts_have_the_moments_of_the_whole(cuts: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).standard_normal((100, 6)) + 10
    total = moments(x[: cuts[0]])
    for part in np.split(x, cuts)[1:]:
        total = merge(total, moments(part))
    assert total.n == 100
    np.testing.assert_allclose(total.mean, x.mean(axis=0), rtol=1e-15)
    np.testing.assert_allclose(total.covariance(), covariance(x), atol=2e-14)
    np.testing.assert_allclose(total.covariance(correction=1), np.cov(x.T), atol=2e-14)
    assert np.array_equal(total.m2, total.m2.T)


def test_plain_means_lose_what_the_extended_ones_keep_at_an_offset_of_1e6() -> None:
    x = np.random.default_rng(1).standard_normal((512, 8)) + 1e6 * np.sqrt(2)
    truth = covariance(x, extended=True)

    def error(extended: bool) -> float:
        total = moments(x[:1], extended=extended)
        for part in np.split(x[1:], 73):
            total = merge(total, moments(part, extended=extended))
        return float(np.max(np.abs(total.covariance() - truth)))

    kept, lost = error(extended=True), error(extended=False)
    assert kept < 1e-13  # EXTENDED_EPS * offset / spread = 1.5e-13 for each mean
    assert 100 * kept < lost < 3e-10  # eps * offset / spread = 3e-10


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
