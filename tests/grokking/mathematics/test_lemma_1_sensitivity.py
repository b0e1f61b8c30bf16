"""Lemma 1: a small change of the covariance changes the entropy little. In which reading, and by which constant."""

import numpy as np
import pytest

from fastent.grokking.mathematics import checks
from fastent.reference.entropy import entropy_of_eigenvalues
from fastent.reference.perturbation import (
    entropy_gradient,
    lipschitz_above_floor,
    lipschitz_local,
    lipschitz_regularized,
    mirsky,
    regularized_entropy,
    trace_distance,
    weyl,
)


@pytest.mark.parametrize("d", [2, 5, 30])
def test_eigenvalues_move_by_no_more_than_weyl_and_mirsky_say(d):
    rng = np.random.default_rng(d)
    for scale in (1e-9, 1e-2, 10.0):
        c, e = (rng.standard_normal((d, d)) for _ in range(2))
        c, e = c @ c.T, scale * (e + e.T)
        moved = np.linalg.eigvalsh(c + e) - np.linalg.eigvalsh(c)
        frobenius, trace = mirsky(e)
        slack = 1e-13 * np.linalg.norm(c)
        assert np.abs(moved).max() <= weyl(e) + slack
        assert np.linalg.norm(moved) <= frobenius + slack
        assert np.abs(moved).sum() <= trace + d * slack
    # attained where the change commutes with C and keeps the order
    c, e = np.diag(np.arange(1.0, d + 1)), np.diag(0.1 * np.arange(d))
    moved = np.linalg.eigvalsh(c + e) - np.linalg.eigvalsh(c)
    assert np.abs(moved).max() == pytest.approx(weyl(e), rel=1e-12)
    assert (np.linalg.norm(moved), np.abs(moved).sum()) == pytest.approx(mirsky(e), rel=1e-12)


def test_gradient_of_entropy_is_minus_log_p_plus_h_over_the_trace():
    lam = np.array([4.0, 1.0, 0.5, 1e-3])
    step = 1e-6
    for i, slope in enumerate(entropy_gradient(lam)):
        up, down = lam.copy(), lam.copy()
        up[i] += step * lam[i]
        down[i] -= step * lam[i]
        difference = (entropy_of_eigenvalues(up) - entropy_of_eigenvalues(down)) / (2 * step * lam[i])
        assert slope == pytest.approx(difference, rel=1e-6)
    assert entropy_gradient(lam) @ lam == pytest.approx(0, abs=1e-14)  # H does not see the scale


def test_gradient_of_the_entropy_matrix_holds_where_eigenvalues_coincide():
    evidence = checks.first_order_entropy()
    assert evidence.holds, evidence.text


def test_with_eps_one_constant_serves_all_covariances_and_is_nearly_needed():
    evidence = checks.regularized_lipschitz()
    assert evidence.holds, evidence.text


def test_without_eps_no_constant_serves():
    evidence = checks.no_lipschitz_without_eps()
    assert evidence.holds, evidence.text


def test_without_eps_the_constant_grows_with_the_logarithm_of_the_smallest_eigenvalue():
    evidence = checks.floored_lipschitz()
    assert evidence.holds, evidence.text
    with pytest.raises(ValueError, match="no constant serves"):
        lipschitz_above_floor(0.0, 1.0, 4)


def test_constant_does_not_depend_on_a_spectral_gap():
    for gap in (1e-1, 1e-6, 0.0):
        assert lipschitz_local([1.0, 1.0 + gap, 0.5]) == pytest.approx(
            lipschitz_local([1.0, 1.0, 0.5]), rel=gap + 1e-12
        )
    # a wide gap does not help once the smallest eigenvalue goes
    growth = [lipschitz_local([1.0, smallest]) for smallest in (1e-2, 1e-4, 1e-8)]
    assert growth == pytest.approx([np.log(1 / s) for s in (1e-2, 1e-4, 1e-8)], rel=0.15)


def test_local_constant_is_attained_and_not_passed():
    rng = np.random.default_rng(0)
    lam = np.array([3.0, 1.0, 0.2, 0.01])
    constant = lipschitz_local(lam)
    step = 1e-7
    best = entropy_gradient(lam) / constant
    assert abs(
        entropy_of_eigenvalues(lam + step * best) - entropy_of_eigenvalues(lam)
    ) / step == pytest.approx(constant, rel=1e-5)
    for _ in range(200):
        direction = rng.standard_normal(4)
        change = entropy_of_eigenvalues(lam + step * direction) - entropy_of_eigenvalues(lam)
        assert abs(change) <= step * np.linalg.norm(direction) * constant * (1 + 1e-5)


def test_at_the_papers_eps_the_constant_says_nothing_beyond_a_change_of_1_5_percent():
    constant = lipschitz_regularized(1e-12, 1.0, 128)
    assert constant == pytest.approx(324, abs=1)
    assert np.log(128) / constant == pytest.approx(0.015, abs=5e-4)


def test_fannes_audenaert_holds_for_covariances_and_is_attained():
    evidence = checks.fannes_audenaert_bound()
    assert evidence.holds, evidence.text


def test_trace_distance_is_at_least_the_distance_of_the_spectra():
    rng = np.random.default_rng(1)
    for _ in range(20):
        a, b = (y.T @ y for y in rng.standard_normal((2, 9, 6)))
        p, q = (np.linalg.eigvalsh(c) / np.trace(c) for c in (a, b))
        assert np.abs(p - q).sum() / 2 <= trace_distance(a, 7 * b) + 1e-14


def test_regularised_entropy_is_the_papers_formula():
    p = np.array([0.5, 0.3, 0.2])
    assert regularized_entropy(4 * p, 0.01) == pytest.approx(-(p * np.log(p + 0.01)).sum(), rel=1e-14)


def test_on_a_run_the_smallest_eigenvalue_is_0_and_the_constant_is_measured(small_run):
    # The representation ends in a LayerNorm, so it lies in a hyperplane: the printed assumption fails throughout.
    assert small_run.column("smallest_share").max() < 1e-12
    # Each step's change stays within the constant at C times ||C' - C||, and far within.
    used = np.abs(small_run.column("change")) / (small_run.column("lipschitz") * small_run.column("distance"))
    quiet = small_run.column("spread_growth") < 0.02  # first order
    assert quiet.mean() > 0.5
    assert used[quiet].max() <= 1.0
    assert np.median(used) < 0.1
    constant = small_run.column("lipschitz") * small_run.column("total_variance")
    assert 5 < np.median(constant) < 50
