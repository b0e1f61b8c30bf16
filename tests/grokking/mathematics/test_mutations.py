"""Checks that cannot fail prove nothing: a wrong constant or sign makes each of these fail."""

import numpy as np
import pytest

from fastent.grokking.mathematics import checks
from fastent.reference import mixing, perturbation
from fastent.reference.entropy import fannes_audenaert
from fastent.reference.sampling import sampling_bias


def bound_with(k):
    """The best bound of Lemma 5, with another constant in the place of (1 - 2 alpha)^2."""
    return lambda alpha, d: mixing.best_bound((1 - np.sqrt(k(alpha))) / 2, d)


def factor_without_the_derangement_term(alpha, n, over):
    return (1 - alpha) ** 2 + alpha**2


def factor_with_n_for_n_minus_1(alpha, n, over):
    return (1 - alpha) ** 2 + alpha**2 - (2 * alpha * (1 - alpha) / n if over == "derangements" else 0)


def relaxation_upside_down(h, *, h_star, h_inf, k):
    return np.log((h_star - h_inf) / (np.asarray(h) - h_inf)) / k


MUTATIONS = [
    (
        "lemma 1, eps: sqrt(d) missing",
        checks.regularized_lipschitz,
        lambda eps, total, d: perturbation.lipschitz_regularized(eps, total, 1),
    ),
    (
        "lemma 1, eps: logarithm halved",
        checks.regularized_lipschitz,
        lambda eps, total, d: np.sqrt(d) * np.log(1 / eps) / 2 / total,
    ),
    (
        "lemma 1, eps: ten times too large",
        checks.regularized_lipschitz,
        lambda eps, total, d: 10 * perturbation.lipschitz_regularized(eps, total, d),
    ),
    (
        "lemma 1, smallest eigenvalue: logarithm missing",
        checks.floored_lipschitz,
        lambda smallest, total, d: np.sqrt(d) / total,
    ),
    (
        "fannes and audenaert: log d for log(d - 1)",
        checks.fannes_audenaert_bound,
        lambda t, d: 0.5 * fannes_audenaert(t, d),
    ),
    (
        "derivative of entropy: sign",
        checks.first_order_entropy,
        lambda c: -perturbation.gradient_matrix(c),
    ),
    (
        "derivative of entropy: H missing",
        checks.first_order_entropy,
        lambda c: perturbation.gradient_matrix(c) + checks.entropy_of(c) / np.trace(c) * np.eye(len(c)),
    ),
    (
        "lemma 5, sandwich: (1 - a)^2 for (1 - 2a)^2",
        checks.mixing_sandwich,
        lambda alpha: ((1 - alpha) ** 2, 1.0),
    ),
    ("lemma 5, sandwich: 0 for (1 - 2a)^2", checks.mixing_sandwich, lambda alpha: (-0.01, 1.0)),
    (
        "lemma 5, sandwich: upper end 0.99",
        checks.mixing_sandwich,
        lambda alpha: ((1 - 2 * alpha) ** 2, 0.99),
    ),
    ("lemma 5, bound: (1 - a)^2 for (1 - 2a)^2", checks.mixing_bound, bound_with(lambda a: (1 - a) ** 2)),
    ("lemma 5, bound: quadratic in a, as printed", checks.mixing_bound, lambda alpha, d: 4 * alpha**2),
    (
        "lemma 5, bound: ten percent too large",
        checks.mixing_bound,
        lambda alpha, d: 1.1 * mixing.best_bound(alpha, d),
    ),
    (
        "lemma 5, expectation: derangements as permutations",
        checks.mixing_expectations,
        factor_without_the_derangement_term,
    ),
    ("lemma 5, expectation: N for N - 1", checks.mixing_expectations, factor_with_n_for_n_minus_1),
    (
        "lemma 5, on average: one permutation for all",
        checks.mixing_on_average,
        lambda n: mixing.cyclic_shift(n)[None],
    ),
    ("proposition 6: logarithm upside down", checks.relaxation_and_power_law, relaxation_upside_down),
    ("bias: sign", checks.bias_of_samples, lambda lam, n: -sampling_bias(lam, n)),
    ("bias: half", checks.bias_of_samples, lambda lam, n: sampling_bias(lam, 2 * n)),
]


@pytest.mark.parametrize(("check", "wrong"), [m[1:] for m in MUTATIONS], ids=[m[0] for m in MUTATIONS])
def test_a_wrong_formula_makes_its_check_fail(check, wrong):
    assert check().holds
    evidence = check(wrong)
    assert not evidence.holds, evidence.text
