"""The least squares against scipy's and against NumPy's without constraints."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted_runs import H_STAR, planted_runs
from scipy.optimize import nnls

from fastent.forecast.history import History
from fastent.forecast.power_law import Triples, fit_line, solve


@settings(deadline=None)
@given(seed=st.integers(0, 10**6), m=st.integers(3, 40), tilt=st.floats(-2, 2), shift=st.floats(0, 2))
def test_fit_line_is_non_negative_least_squares(seed, m, tilt, shift):
    rng = np.random.default_rng(seed)
    u, w = rng.uniform(0, 1, m), rng.uniform(0.1, 1, m)
    y = np.maximum(tilt * u + shift + 0.3 * rng.normal(size=m), 0)
    slope, intercept, error = fit_line(u, y, w)
    root = np.sqrt(w / w.sum())
    expected, norm = nnls(np.stack([u, np.ones(m)], 1) * root[:, None], y * root)
    assert [slope, intercept] == pytest.approx(expected, abs=1e-9)
    assert error == pytest.approx(norm**2, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("c2", ["free", "zero"])
def test_fit_line_without_the_intercepts_sign_is_plain_least_squares(c2):
    rng = np.random.default_rng(0)
    u = rng.uniform(0, 1, (4, 30))
    y = np.maximum(3 * u[0] - 1 + 0.1 * rng.normal(size=30), 0)
    slope, intercept, error = fit_line(u, y, c2=c2)
    for i in range(4):
        design = u[i, :, None] if c2 == "zero" else np.stack([u[i], np.ones(30)], 1)
        if i == 0:
            expected, residual, *_ = np.linalg.lstsq(design, y)
            assert [slope[0], intercept[0]][: design.shape[1]] == pytest.approx(expected, rel=1e-12)
            assert error[0] == pytest.approx(residual[0] / 30, rel=1e-12)
    assert intercept[0] == 0 if c2 == "zero" else intercept[0] < 0


def test_a_constant_power_gets_no_slope_and_no_division_by_zero():
    slope, intercept, error = fit_line(np.ones(5), np.arange(5.0))
    assert (slope, intercept, error) == (0, 2, 2)
    slope, intercept, _ = fit_line(np.zeros(5), np.arange(5.0), c2="zero")
    assert (slope, intercept) == (0, 0)


def test_triples_hold_what_came_before_grokking_of_runs_with_a_usable_entropy_there():
    runs = [
        History([0, 200, 400], [0.9, 0.8, 0.7]),
        History([0, 200, 400, 600], [0.9, np.nan, 0.7, 0.5], 400),
        History([0, 200], [0.9, np.nan], 200),
        History([0, 100, 200], [0.9, 0.8, 0.5], 200),
    ]
    triples = Triples.of(runs)
    assert triples.origin == (1, 3)
    assert triples.run.tolist() == [0, 1, 1]
    assert triples.step.tolist() == [0, 0, 100]
    assert triples.remaining.tolist() == [400, 200, 100]
    assert triples.entropy_at_grok.tolist() == [0.7, 0.5]


@pytest.mark.parametrize("c2", ["non-negative", "free", "zero"])
def test_searched_gamma_is_the_best_of_a_fine_grid(c2):
    runs = planted_runs(5, rng=np.random.default_rng(1), scale=0.2, offset=0.01, noise=0.005)
    triples = Triples.of(runs)
    used = np.ones(5, bool)
    best = solve(triples, used, c2=c2)
    grid = np.geomspace(0.1, 20, 2000)
    others = [solve(triples, used, c2=c2, gamma=g).r_squared for g in grid]
    assert best.r_squared >= max(others)
    assert best.gamma == pytest.approx(grid[np.argmax(others)], rel=0.01)
    assert best.determined


def test_evaluations_at_or_below_the_threshold_and_runs_left_out_take_no_part():
    runs = planted_runs(4)
    strange = History(runs[3].step, np.full(len(runs[3]), 0.99), runs[3].t_grok)
    triples, other = Triples.of(runs), Triples.of([*runs[:3], strange])
    used = np.array([True, True, True, False])
    assert solve(triples, used) == solve(other, used)
    above = sum(int((run.entropy[run.step < run.t_grok] > H_STAR).sum()) for run in runs[:3])
    assert solve(triples, used).n_points == above


def test_too_few_gaps_are_refused():
    runs = [History([0, 200], [0.9, 0.5], 200)] * 3
    with pytest.raises(ValueError, match=r"at least 3 different entropies .* hold 1"):
        solve(Triples.of(runs), np.ones(3, bool))
