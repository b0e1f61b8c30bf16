"""Each closed form against scipy's ODE solver, each inverse against its law, and which way each bends."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp

from fastent.reference.forecast import (
    entropy_paper,
    entropy_power,
    entropy_relaxing,
    entropy_repaired,
    exponent_repaired,
    norm_contracting,
    rate_power,
    rate_relaxing,
    remaining_paper,
    remaining_passage,
    remaining_power,
    remaining_repaired,
)

H0, H_STAR = 0.9, 0.605


def integrate(rate, h0, t):
    """H at times `t` by an eighth-order Runge-Kutta method, to about 1e-12."""
    solution = solve_ivp(lambda _, h: rate(h), (0.0, t[-1]), [h0], "DOP853", t_eval=t, rtol=1e-12, atol=1e-14)
    assert solution.success
    return solution.y[0]


@pytest.mark.parametrize("k", [1e-4, 3e-3])
def test_printed_proposition_6_solves_its_ode_and_reaches_only_its_tolerance(k):
    eps = 1e-3
    total = float(remaining_paper(H0, h_star=H_STAR, k=k, eps=eps))
    t = np.linspace(0, total, 41)
    h = integrate(lambda h: rate_relaxing(h, floor=H_STAR, k=k), H0, t)
    assert np.abs(h - entropy_relaxing(t, h0=H0, floor=H_STAR, k=k)).max() < 1e-8
    assert np.abs(h - entropy_paper(total - t, h_star=H_STAR, k=k, eps=eps)).max() < 1e-8
    assert np.abs(remaining_paper(h, h_star=H_STAR, k=k, eps=eps) - (total - t)).max() < 1e-8 * total
    assert h[-1] - H_STAR == pytest.approx(eps, abs=1e-8)


def test_printed_proposition_6_moves_with_its_tolerance_by_log_over_k():
    k = 1e-3
    near, far = (float(remaining_paper(0.8, h_star=H_STAR, k=k, eps=eps)) for eps in (1e-3, 1e-6))
    assert far - near == pytest.approx(np.log(1e3) / k, rel=1e-12)


@pytest.mark.parametrize("k", [1e-4, 3e-3])
@pytest.mark.parametrize("h_inf", [0.3, 0.6])
def test_repaired_proposition_6_solves_its_ode_and_crosses_the_threshold(k, h_inf):
    total = float(remaining_repaired(H0, h_star=H_STAR, h_inf=h_inf, k=k))
    t = np.linspace(0, 1.2 * total, 41)
    h = integrate(lambda h: rate_relaxing(h, floor=h_inf, k=k), H0, t)
    assert np.abs(h - entropy_repaired(total - t, h_star=H_STAR, h_inf=h_inf, k=k)).max() < 1e-8
    assert np.abs(remaining_repaired(h, h_star=H_STAR, h_inf=h_inf, k=k) - (total - t)).max() < 1e-8 * total
    assert h[-1] < H_STAR


def test_squared_norm_contracts_to_its_threshold_in_the_time_of_first_passage_and_from_below_never():
    rate, v_star = 2 * 0.9 * 1e-3, 400.0
    total = float(remaining_passage(2500.0, v_star=v_star, rate=rate))
    t = np.linspace(0, total, 41)
    v = integrate(lambda v: -rate * v, 2500.0, t)
    assert v[-1] == pytest.approx(v_star, rel=1e-9)
    assert np.abs(norm_contracting(total - t, v_star=v_star, rate=rate) / v - 1).max() < 1e-9
    assert np.abs(remaining_passage(v[:-1], v_star=v_star, rate=rate) - (total - t)[:-1]).max() < 1e-6
    assert np.isnan(remaining_passage(399.0, v_star=v_star, rate=rate))


@pytest.mark.parametrize("gamma", [0.6, 1.0, 1.65, 3.0])
def test_power_law_solves_its_ode(gamma):
    c1, c2 = 40_000.0, 700.0
    total = float(remaining_power(H0, h_star=H_STAR, c1=c1, gamma=gamma, c2=c2))
    # Up to 99 % of the way: at H* itself the speed is 0 or infinite.
    t = np.linspace(0, 0.99 * (total - c2), 41)
    h = integrate(lambda h: rate_power(h, h_star=H_STAR, c1=c1, gamma=gamma), H0, t)
    assert np.abs(h - entropy_power(total - t, h_star=H_STAR, c1=c1, gamma=gamma, c2=c2)).max() < 1e-8
    back = remaining_power(h, h_star=H_STAR, c1=c1, gamma=gamma, c2=c2)
    assert np.abs(back - (total - t)).max() < 1e-8 * total


@pytest.mark.parametrize(
    ("gamma", "bends"),
    [(0.6, 1), (1.0, 0), (1.65, -1), (3.0, -1)],
    ids=["slows", "steady", "speeds up", "cubic"],
)
def test_power_law_accelerates_only_for_gamma_above_1_and_relaxation_always_slows(gamma, bends):
    remaining = np.linspace(9_000, 1_000, 81)
    power = entropy_power(remaining, h_star=H_STAR, c1=40_000.0, gamma=gamma, c2=700.0)
    relaxing = entropy_repaired(remaining, h_star=H_STAR, h_inf=0.4, k=1e-4)
    printed = entropy_paper(remaining, h_star=H_STAR, k=1e-4, eps=0.05)
    second = np.diff(power, 2)
    assert (np.sign(np.where(np.abs(second) < 1e-12, 0, second)) == bends).all()
    for h in (relaxing, printed):
        assert (np.diff(h) < 0).all()
        assert (np.diff(h, 2) > 0).all()


@settings(deadline=None)
@given(
    h_star=st.floats(0.2, 0.8), below=st.floats(1e-3, 0.2), gap=st.floats(1e-4, 0.2), k=st.floats(1e-5, 1e-2)
)
def test_exponent_of_the_relaxation_never_exceeds_1_so_it_is_no_power_law_above_1(h_star, below, gap, k):
    h_inf = h_star - below
    exponent = float(exponent_repaired(h_star + gap, h_star=h_star, h_inf=h_inf))
    assert 0 < exponent < 1 + 1e-9
    step = 1e-4
    h = h_star + gap * np.exp([-step, step])
    low, high = np.log(remaining_repaired(h, h_star=h_star, h_inf=h_inf, k=k))
    # The central difference is off by step^2 and by the rounding of h_star + gap.
    assert exponent == pytest.approx((high - low) / (2 * step), rel=1e-6, abs=1e-6)


def test_laws_are_undefined_on_the_wrong_side():
    assert np.isnan(remaining_paper([H_STAR, 0.5], h_star=H_STAR, k=1e-3, eps=1e-3)).all()
    assert np.isnan(remaining_repaired([0.4, 0.3], h_star=H_STAR, h_inf=0.4, k=1e-3)).all()
    assert np.isnan(remaining_power(0.5, h_star=H_STAR, c1=1.0, gamma=2.0, c2=0.0))
    assert remaining_power(H_STAR, h_star=H_STAR, c1=1.0, gamma=2.0, c2=7.0) == 7.0
    assert np.isnan(rate_power(H_STAR, h_star=H_STAR, c1=1.0, gamma=2.0))
    assert np.isnan(entropy_power(6.0, h_star=H_STAR, c1=1.0, gamma=2.0, c2=7.0))
