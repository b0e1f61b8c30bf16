"""Runs whose power law is known: the entropy follows it exactly, apart from what is asked for."""

import numpy as np

from fastent.forecast.history import History
from fastent.reference.forecast import entropy_power, remaining_power

# A binary fraction, so that the mean of equal H* is exact.
H_STAR = 0.625


def planted_runs(
    n,
    *,
    c1=40_000.0,
    gamma=1.65,
    c2=700.0,
    every=100,
    rng=None,
    scale=0.0,
    offset=0.0,
    noise=0.0,
    shuffled=False,
):
    """`n` runs that start at different gaps, ascending or `shuffled`.

    `scale` is the standard deviation of log c1 over runs, `offset` that of a run's whole entropy, `noise` that
    of each evaluation. After H has crossed H*, c2 steps before grokking, it stays there.
    """
    rng = rng or np.random.default_rng(0)
    runs = []
    for i in rng.permutation(n) if shuffled else range(n):
        own = c1 * np.exp(scale * rng.normal())
        start = H_STAR + 0.2 + 0.1 * i / n
        total = float(remaining_power(start, h_star=H_STAR, c1=own, gamma=gamma, c2=c2))
        t_grok = every * np.ceil(total / every)
        step = np.arange(0, t_grok + 1, every)
        after_c2 = np.maximum(t_grok - step, c2)
        h = entropy_power(after_c2, h_star=H_STAR, c1=own, gamma=gamma, c2=c2)
        h = h + offset * rng.normal() + noise * rng.normal(size=h.size)
        runs.append(History(step, np.clip(h, 0, 1), t_grok))
    return runs
