"""Tests and effects on runs that share their seeds: pairs with censoring, and differences with their intervals.

Seeds decide split, start and batches, so runs of the same seed under two conditions are pairs. The signed-rank
test is in `comparisons`; here is the log-rank test with each seed as its own stratum, which takes a censored run
for what it is, and the delay of each seed.
"""

from __future__ import annotations

from scipy import stats

from fastent.experiments.comparisons import Comparison, Times
from fastent.experiments.statistics import LEVEL, Estimate, bootstrap, proportion


def stratified_log_rank(control: Times, treated: Times, *, level: float = LEVEL) -> Comparison:
    """One-sided log-rank test stratified by seed, "the treated run of a pair is later".

    In a stratum of two runs only the first event counts, and by then one of two was as likely as the other: the
    test is the sign test over the pairs in which one run is known to be first. A pair whose times tie, or whose
    only event comes after the other run was cut, says nothing. The p-value is exact; the effect is the share of
    the pairs that say something in which the treated run is later.

    Parameters
    ----------
    control, treated : Times
        The same seeds in the same order.

    Raises
    ------
    ValueError
        If the two do not hold as many runs.

    References
    ----------
    Mantel, "Evaluation of survival data and two new rank order statistics arising in its consideration", Cancer
    Chemotherapy Reports 50 (1966).
    """
    if control.n != treated.n:
        raise ValueError(f"pairs need as many control as treated runs; got {control.n} and {treated.n}")
    later = earlier = 0
    columns = (control.values, control.observed, treated.values, treated.observed)
    for a, a_seen, b, b_seen in zip(*columns, strict=True):
        # An event at the very step of the other run's cut came first: the other was still without it.
        later += a_seen and (a < b or (a == b and not b_seen))
        earlier += b_seen and (b < a or (a == b and not a_seen))
    known = later + earlier
    silent = control.n - known
    note = f"{silent} of {control.n} pairs tie or are cut before either groks" if silent else ""
    n = (control.n, treated.n)
    test = "log-rank stratified by seed, one-sided, exact"
    if known == 0:
        effect = Estimate(0.5, None, None, 0, "share of pairs, treated later; no pair says anything", level)
        return Comparison(test, 0.0, 1.0, n, effect, note)
    p_value = float(stats.binomtest(later, known, alternative="greater").pvalue)
    statistic = (later - known / 2) / (known / 4) ** 0.5
    return Comparison(test, statistic, p_value, n, proportion(later, known, level=level), note)


def mean_delay(control: Times, treated: Times, limit: float, *, level: float = LEVEL) -> Estimate | None:
    """Mean over pairs of ``min(treated, limit) - min(control, limit)`` in steps, with a BCa interval over seeds.

    That is the difference of the restricted means to `limit`. None if a run was cut before `limit` without the
    event: its restricted time is then unknown.
    """
    for times in (control, treated):
        if any(value < limit and not seen for value, seen in zip(times.values, times.observed, strict=True)):
            return None
    pairs = zip(control.values, treated.values, strict=True)
    return bootstrap([min(b, limit) - min(a, limit) for a, b in pairs], level=level)
