"""Claims of the paper beside our figures: the verdicts, how numbers are worded, and what the paper itself gets wrong.

The rule for a verdict stands beside the claim, so that a reader can disagree with it. A number of the paper that
belongs to the paper's setting is never judged by runs of another: the verdict is then "other setting".

No verdict rewards few runs. A number is reproduced if its difference from the paper's, with the interval that both
give, lies within a margin that has a reason, not reproduced if it lies outside, and undecided if it reaches across;
"more than 0" likewise, with what is too little to matter in the place of the margin. One run that fails refutes "in
every run", and so few runs that half of all seeds might fail leave it undecided where none does.

Two parts need no run. The paper's printed numbers, those that survive in the text of arXiv 2604.13123 v1 (many did
not) and what is known of v2: whether they follow from each other. And what of it is not so, by numbers computed when
the report is written:

- Lemma 5 says that mixing lowers the entropy by at most ``O(alpha^2)``. A slow against a fast wave, shifted
  cyclically, loses entropy in first order of alpha, and so refutes it.
- Appendix B clamps eigenvalues at an absolute floor. Constant rows, a dead representation, then score 1,
  "maximally uniform"; and the answer depends on the scale of the activations.
"""

from __future__ import annotations

import functools
import math
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from scipy import stats
from torch import Tensor

from fastent.entropy import spectral_entropy
from fastent.grokking.experiments.data import Runs
from fastent.grokking.experiments.document import Block, Section, Table, Text, Verdict
from fastent.grokking.experiments.statistics import Estimate, less
from fastent.mixing import mix_representations

NONE = "–"


@dataclass(frozen=True)
class Claim:
    """One claim of the paper: where it says what, and by which rule runs are judged by it.

    `id` begins with its experiment's. `says` may leave a {place} for a finding's own words, `rule` one for the margin.
    `number` is the paper's and `interval` its interval, where it has one. `margin`, in the unit of the number, is the
    largest difference that changes no conclusion; a quarter of the number if it is not given. `named` holds where
    and what a summary says of it where no run speaks to it; None if it need not be named then. `target` names the
    presets that were chosen with it in view (`bench/calibration.py`): runs of those are no evidence for it. `said`
    holds the wordings for the sentences at the head of a report.
    """

    id: str
    where: str
    says: str
    rule: str
    number: float = math.nan
    interval: tuple[float, float] = (math.nan, math.nan)
    margin: float = math.nan
    named: tuple[str, str] | None = None
    target: tuple[str, ...] = ()
    said: Mapping[str, str] = field(default_factory=dict)

    @property
    def experiment(self) -> str:
        """Which experiment speaks to it."""
        return self.id.partition(".")[0]

    @property
    def paper(self) -> Estimate:
        """Its number, as an estimate."""
        return Estimate(self.number, *self.interval)

    def judge(self, ours: Estimate, *, comparable: bool) -> Verdict:
        """Verdict on its number, by the margin; "other setting" if the runs are not `comparable` with the paper's."""
        if not comparable and ours.known:
            return Verdict.OTHER_SETTING
        return judge_within(less(ours, self.paper), self.margin)

    def finding(
        self,
        ours: Estimate,
        *,
        comparable: bool,
        unit: str = "steps",
        digits: int = 3,
        write: Callable[[float], str] | None = None,
    ) -> Finding:
        """Set our number beside the paper's: `ours` as `worded` has it, the difference of the two, and the verdict."""
        said, verdict = worded(ours, unit, digits, write), self.judge(ours, comparable=comparable)
        if verdict not in (Verdict.NOT_RUN, Verdict.OTHER_SETTING):
            number = _format(unit, digits, write)
            said += f"; less the paper's {span(less(ours, self.paper), number)}"
        return Finding(said, verdict)


class Finding(NamedTuple):
    """What runs say of a claim: our figures, the verdict, and the words for the places in the claim's wording."""

    ours: str
    verdict: Verdict
    words: Mapping[str, str] = {}


Findings = Mapping[str, Finding]
"""By the id of the claim."""


def _read_claims() -> dict[str, Claim]:
    with (Path(__file__).parent / "claims.toml").open("rb") as file:
        rows = tomllib.load(file)
    found = {}
    for experiment, claims in rows.items():
        for name, row in claims.items():
            named, target = tuple(row.pop("named", ())) or None, tuple(row.pop("target", ()))
            row.setdefault("margin", abs(row.get("number", math.nan)) / 4)
            row["rule"] = row["rule"].replace("{margin}", f"{row['margin']:,g}")
            interval = tuple(row.pop("interval", (math.nan, math.nan)))
            key = f"{experiment}.{name}"
            found[key] = Claim(key, named=named, target=target, interval=interval, **row)
    return found


CLAIMS: Mapping[str, Claim] = _read_claims()
"""Every claim of the paper that is judged, by its id, in the order of the summary."""

CONTRIBUTIONS = (
    ("(i)", "two phases: the norm expands, then H collapses", ("e1.norm_grows", "e1.phase_1_stable")),
    (
        "(ii)",
        "H falls below H* before generalisation in every run",
        ("e1.precedes", "e1.precedes_left_out", "e1.collapse_at_half"),
    ),
    (
        "(iii)",
        "causal: preventing the collapse delays grokking, and it is not the norm",
        ("e2.delays", "e2.kept_up", "e3.driver"),
    ),
    ("(iv)", "a power law in H forecasts grokking", ("e5.r2", "e5.left_out_last", "e5.beats_clock")),
    ("(v)", "S5 and other tasks show the same", ("e6.pattern", "e6.s5_window")),
    ("a sixth", "collapse is necessary, not sufficient: MLPs", ("e7.mlp", "e7.insufficient")),
)
"""The paper's contributions (it says five and lists six), with the claims each rests on."""


Result = TypeVar("Result")


@dataclass(frozen=True)
class Experiment(Generic[Result]):
    """An experiment of the paper, as the report asks it.

    `analyse` takes the complete runs of the experiments in `reads` and returns its result, None where they are not
    enough; of a result `headline` says a few sentences, `claims` gives what the runs say of each of its claims, and
    `section` its part of the report. `of_verdicts`: it compares verdicts, so it says nothing of runs that differ in
    their settings, which are not judged.
    """

    id: str
    question: str
    reads: tuple[str, ...]
    analyse: Callable[[Runs], Result | None]
    headline: Callable[[Result], str]
    claims: Callable[[Result], Findings]
    section: Callable[[Result], Section]
    of_verdicts: bool = False


def marked(findings: Findings, runs: Runs) -> Findings:
    """Mark as calibrated what agrees with a claim that was a target of the choice of these runs' preset."""
    presets = {run.preset[0] for run in runs.stored if run.condition == "baseline" and not run.preset[1]}
    return {
        name: found._replace(verdict=Verdict.CALIBRATED)
        if presets & set(CLAIMS[name].target) and found.verdict in (Verdict.REPRODUCED, Verdict.IN_PART)
        else found
        for name, found in findings.items()
    }


def judge(known: bool, reproduced: bool, in_part: bool) -> Verdict:
    """Verdict by a rule with two steps: not run where nothing is known, else as far as the steps hold."""
    if not known:
        return Verdict.NOT_RUN
    return Verdict.REPRODUCED if reproduced else Verdict.IN_PART if in_part else Verdict.NOT_REPRODUCED


def judge_share(share: Estimate) -> Verdict:
    """Verdict on "in every run": reproduced if all do, and so many that surely (95 %) more than half of seeds would.

    Undecided if all do, but fewer; in part if not all do, and all the same surely more than half would; else a run that
    does not has refuted it.
    """
    if not share.known:
        return Verdict.NOT_RUN
    holding = round(share.value * share.n)
    most = holding > 0 and stats.beta.ppf(1 - share.level, holding, share.n - holding + 1) > 0.5
    if holding == share.n:
        return Verdict.REPRODUCED if most else Verdict.UNDECIDED
    return Verdict.IN_PART if most else Verdict.NOT_REPRODUCED


def judge_positive(estimate: Estimate, margin: float = 0.0) -> Verdict:
    """Verdict on "it is more than 0": reproduced if its interval is, not reproduced if that stays below the `margin`.

    In part if both hold, a surely positive number that is too small to matter, and undecided if neither does.
    """
    if not estimate.known:
        return Verdict.NOT_RUN
    more, little = estimate.low > 0, estimate.high <= margin
    if more:
        return Verdict.IN_PART if little else Verdict.REPRODUCED
    return Verdict.NOT_REPRODUCED if little else Verdict.UNDECIDED


def judge_within(difference: Estimate, margin: float) -> Verdict:
    """Verdict on "they are the same": reproduced if the interval lies within the margin, not if outside."""
    if not difference.known:
        return Verdict.NOT_RUN
    if -margin <= difference.low and difference.high <= margin:
        return Verdict.REPRODUCED
    outside = difference.low > margin or difference.high < -margin
    return Verdict.NOT_REPRODUCED if outside else Verdict.UNDECIDED


def least(*verdicts: Verdict) -> Verdict:
    """Take the least favourable; one that judges nothing comes before all but "not reproduced"."""
    order = (Verdict.NOT_REPRODUCED, Verdict.UNDECIDED, Verdict.IN_PART, Verdict.REPRODUCED)
    silent = [verdict for verdict in verdicts if verdict not in order]
    if silent and Verdict.NOT_REPRODUCED not in verdicts:
        return silent[0]
    return min((verdict for verdict in verdicts if verdict in order), key=order.index)


def steps(value: float) -> str:
    """Write a step or a number of steps, "1,020"; a dash for NaN."""
    return NONE if math.isnan(value) else f"{value:,.0f}".replace("-", "−")


def decimal(value: float | None, digits: int = 3) -> str:
    """Write a number to `digits` places; a dash for NaN, and for None."""
    return NONE if value is None or math.isnan(value) else f"{value:.{digits}f}".replace("-", "−")


def percent(value: float) -> str:
    """Write a share in per cent, no decimals; a dash for NaN."""
    return NONE if math.isnan(value) else f"{100 * value:.0f} %"


def worded(
    estimate: Estimate, unit: str = "steps", digits: int = 3, write: Callable[[float], str] | None = None
) -> str:
    """Write an estimate with interval and n: "1,020 steps (95 % CI 900 to 1,150; n = 10)"; a dash if it is unknown.

    `unit` "steps" and "%" choose their format, and `write` any other; else it is written to `digits` places. The unit
    comes after it.
    """
    if not estimate.known:
        return NONE
    number = _format(unit, digits, write)
    after = f" {unit}" if unit not in ("", "%") else ""
    if not estimate.bounded:
        return f"{number(estimate.value)}{after} ({estimate.method})"
    interval = f"{number(estimate.low)} to {number(estimate.high)}"
    return f"{number(estimate.value)}{after} ({100 * estimate.level:.0f} % CI {interval}; n = {estimate.n})"


def _format(unit: str, digits: int, write: Callable[[float], str] | None) -> Callable[[float], str]:
    formats: dict[str, Callable[[float], str]] = {"steps": steps, "%": percent}
    return write or formats.get(unit, functools.partial(decimal, digits=digits))


def span(estimate: Estimate, write: Callable[[float], str]) -> str:
    """Write a number with its interval, "1,020 [900, 1,150]"; without interval the number alone."""
    if not estimate.bounded:
        return write(estimate.value)
    return f"{write(estimate.value)} [{write(estimate.low)}, {write(estimate.high)}]"


def of(share: Estimate) -> str:
    """Write a share of runs: "9 of 10"."""
    return f"{round(share.value * share.n)} of {share.n}"


def by_run(runs: Runs, *columns: tuple[Any, ...]) -> list[tuple[str, ...]]:
    """Lay out numbers of runs, a row each, after their seeds: a column is a function that writes and arrays (n,)."""
    written = [(write, values) for write, *arrays in columns for values in arrays]
    return [
        (str(seed), *(write(values[i]) for write, values in written)) for i, seed in enumerate(runs.seeds)
    ]


def counted(share: Estimate) -> str:
    """Write a share of runs with its interval: "9 of 10 runs (95 % CI 55 % to 100 %)"; a dash if it is unknown."""
    if not share.known:
        return NONE
    interval = f"{100 * share.level:.0f} % CI {percent(share.low)} to {percent(share.high)}"
    return f"{of(share)} runs ({interval})"


GRID = 200
"""Steps between its evaluations, as it says (Appendix A): every time of a run is a multiple."""

FINE = 100
"""Steps between its evaluations, as its count of them says."""

POINTS = 1_436
"""Evaluations before grokking of ten runs (v2)."""

WARNING = 12_370

BUDGET = 50_000
BASELINE, MIXING, CONTROL = 14_360, 19_420, 22_664
"""Mean T_grok in its Table 1."""
LEAD = 1_020


@dataclass(frozen=True)
class Check:
    """What the paper prints where, what its own numbers give, and whether the two agree; None if that is open."""

    where: str
    prints: str
    gives: str
    holds: bool | None

    @property
    def verdict(self) -> Verdict:
        """The answer in a word."""
        return (
            Verdict.DOUBTFUL if self.holds is None else Verdict.FOLLOWS if self.holds else Verdict.CONTRADICTS
        )


def is_mean(value: int, n: int, *, grid: int = GRID) -> bool:
    """Whether a mean of `n` multiples of `grid` can round to `value`.

    Examples
    --------
    >>> is_mean(14_360, 10), is_mean(12_370, 10), is_mean(22_664, 28), is_mean(22_664, 30)
    (True, False, True, False)
    """
    nearest = round(value * n / grid)
    return round(nearest * grid / n) == value


def checks() -> list[Check]:
    """Work the paper's arithmetic out."""
    delay, control_delay = MIXING - BASELINE, CONTROL - BASELINE
    total = round(CONTROL * 28 / GRID) * GRID
    restricted = (total + 2 * BUDGET) / 30
    stop = BASELINE - LEAD + 1000
    saved = 1 - stop / BUDGET
    others = (10 * BASELINE - 5 * 14_040) / 5
    commuting = 7 / 120
    return [
        Check(
            "Table 1, §6, §3.3",
            "mixing delays by 5,020 steps",
            f"{steps(MIXING)} − {steps(BASELINE)} = {steps(delay)}",
            delay == 5_020,
        ),
        Check(
            "Table 1, §6",
            "the norm control delays by 8,304 steps",
            f"{steps(CONTROL)} − {steps(BASELINE)} = {steps(control_delay)}",
            control_delay == 8_304,
        ),
        Check(
            "Table 1",
            f"mean T_grok of the norm control, n = 30: {steps(CONTROL)}",
            f"no mean of 30 times on a grid of {GRID} steps; one of 28, {steps(total)} / 28. The two runs "
            f"that did not grok were dropped; counted as {steps(BUDGET)}, the least they can be, the mean "
            f"is {steps(restricted)} and the delay {steps(restricted - BASELINE)}",
            is_mean(CONTROL, 30),
        ),
        Check(
            "§8, abstract, §13",
            f"mean advance warning {steps(WARNING)} steps, over 10 seeds",
            f"a mean of 10 differences of times on a grid of {GRID} steps is a multiple of {GRID // 10}; on one of "
            f"{FINE} steps it can be",
            is_mean(WARNING, 10),
        ),
        Check(
            "v2, Appendix A",
            f"{steps(POINTS)} evaluations before grokking over 10 seeds, {GRID} steps apart, T_grok {steps(BASELINE)}",
            f"{steps(POINTS)} × {GRID} / 10 = {steps(POINTS * GRID / 10)}; {steps(POINTS)} × {FINE} / 10 = "
            f"{steps(POINTS * FINE / 10)}: they were {FINE} steps apart, and five of them span half",
            POINTS * GRID / 10 == BASELINE,
        ),
        Check(
            "§8",
            "largest advance warning 16,500 steps",
            f"a difference of two times on the grid is a multiple of {GRID}",
            16_500 % GRID == 0,
        ),
        Check(
            "§3.3, §5, abstract",
            f"mean lead {steps(LEAD)} steps for T_collapse, and for H below H*",
            f"possible for 10 seeds ({steps(LEAD)} is a multiple of {GRID // 10}); two definitions that share a mean",
            None if is_mean(LEAD, 10) else False,
        ),
        Check(
            "Table 1, Table 3",
            f"addition: T_grok {steps(BASELINE)} over seeds 0–9, {steps(14_040)} over seeds 0–4",
            f"seeds 5–9 would have {steps(others)}: possible",
            is_mean(round(others), 5) and is_mean(14_040, 5) and is_mean(BASELINE, 10),
        ),
        Check(
            "§10",
            "stopping within 1,000 steps of the crossing saves 86 % of the budget",
            f"86 % of {steps(BUDGET)} saved is a stop at {steps(0.14 * BUDGET)}, before the mean T_grok of "
            f"{steps(BASELINE)}; its own lead gives {steps(BASELINE)} − {steps(LEAD)} + 1,000 = "
            f"{steps(stop)}, {percent(saved)}",
            abs(saved - 0.86) < 0.01,
        ),
        Check(
            "§8, §10",
            "86 % of the budget saved",
            f"{steps(WARNING)} / {steps(BASELINE)} = {percent(WARNING / BASELINE)}: its mean warning as a share of its "
            f"mean T_grok, not of a budget of {steps(BUDGET)}",
            False,
        ),
        Check(
            "v2, §7",
            "r(norm, H) = −0.248, 95 % interval −0.049 to 0.050",
            "the interval does not hold the number",
            -0.049 <= -0.248 <= 0.050,
        ),
        Check(
            "v2, §7, Table 2",
            "the gap of H outperforms the other predictors by at least a factor 6.8 in R²: 0.507, none of them above "
            "0.38",
            f"0.507 / 0.38 = {decimal(0.507 / 0.38, 1)}",
            0.507 / 0.38 >= 6.8,
        ),
        Check(
            "Table 3",
            "multiplication and subtraction: 21,560 steps, H* 0.589, both",
            "two tasks, five seeds each, with one T_grok to the step and one H* to three digits: not "
            "impossible, and not likely by chance",
            None,
        ),
        Check(
            "§9",
            "94 % of the pairs of S5 do not commute",
            f"1 − 7 classes / 120 = {decimal(100 * (1 - commuting), 2)} %",
            round(100 * (1 - commuting)) == 94,
        ),
        Check(
            "§9, abstract (ii), (v)",
            "H falls before generalisation in 100 % of runs; S5 shows the same pattern",
            "in S5 the collapse is detected before grokking in 5 of 10 seeds. A window of 5 evaluations "
            f"spans {steps(4 * GRID)} steps, so T_grok = 4,380 is not too short for it",
            False,
        ),
        Check(
            "abstract, §3.3",
            "10 seeds and three modular tasks",
            "5 seeds for two of the three (§4, Table 3)",
            False,
        ),
        Check("abstract, §1", '"five contributions"', "its list has six", False),
        Check(
            "§2.2, §3.2, §5",
            'H in Phase I: "high and stable", "approximately isotropic"',
            '"decreasing monotonically from initialisation" (§5), "decreases monotonically during memorisation" (§2.2)',
            False,
        ),
        Check(
            "§8",
            "γ = 1.65 is like critical slowing down near a transition",
            "the law gives |dH/dt| ∝ (H − H*)^(1 − γ), which grows without bound at H*: an acceleration",
            False,
        ),
    ]


def arithmetic_section() -> Section:
    """Write the report's section on the paper's arithmetic."""
    rows = tuple((c.where, c.prints, c.gives, c.verdict) for c in checks())
    blocks: list[Block] = [
        Text("What the paper's printed numbers and sentences say of each other; no run is needed for it."),
        Table("The paper's own arithmetic.", ("Paper", "It prints", "Its own numbers give", ""), rows),
    ]
    return Section("arithmetic", "Arithmetic: what the paper's numbers say of each other", tuple(blocks))


ALPHAS = (0.1, 0.05, 0.01, 0.001)
SCALES = (1.0, 1e-3, 1e-6, 1e-9)


def two_waves(n: int = 64) -> Tensor:
    """Return the counterexample to Lemma 5, of columns ``sqrt(2) cos(2 pi t / n)`` and ``(-1)^t / 2``."""
    t = torch.arange(n, dtype=torch.float64)
    return torch.stack([2**0.5 * torch.cos(2 * torch.pi * t / n), 0.5 * torch.cos(torch.pi * t)], dim=1)


@dataclass(frozen=True)
class MixingLoss:
    """Change of entropy in nats by mixing with weight `alpha`, of `two_waves`."""

    alpha: float
    change: float


def mixing_losses() -> list[MixingLoss]:
    """Mix with each of `ALPHAS`: the change over alpha tends to a constant, over its square it diverges."""
    h = two_waves()
    before = float(spectral_entropy(h).entropy)
    return [
        MixingLoss(a, float(spectral_entropy(mix_representations(h, alpha=a)).entropy) - before)
        for a in ALPHAS
    ]


def scores(h: Tensor) -> tuple[float, float]:
    """Return the normalised entropy of `h` by the paper's convention and by ours."""
    return float(spectral_entropy(h, convention="paper").normalized), float(spectral_entropy(h).normalized)


def decaying(n: int = 512, d: int = 128) -> Tensor:
    """Return normal rows whose columns' standard deviations fall geometrically from 1 to 1e-2."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.logspace(0, -2, d, dtype=torch.float64)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) * spread


def corrections_section() -> Section:
    """Write the report's section on what is not so in the paper."""
    dead_paper, dead_ours = scores(torch.ones(512, 128))
    matrix = decaying()
    blocks: list[Block] = [
        Text(
            "Each number below is computed when this page is written; the proofs are in the documentation of "
            "`fastent.reference`."
        ),
        Text(
            "Lemma 5 (mixing cannot lower the entropy by more than O(α²)) is false. Take 64 rows of two "
            "waves, √2 cos(2πt/64) and (−1)^t / 2, and mix each row with the next. The loss of entropy is "
            "of first order in α: divided by α it tends to a constant. The proof uses concavity of H on all "
            "covariances, which holds on those of trace one only. So mixing is not a sure way to hold the "
            "entropy up, and what it did has to be measured in each run."
        ),
        Table(
            "Entropy lost by mixing, for the two waves. If the lemma held, the last column would stay bounded.",
            ("α", "change of H (nats)", "change / α", "change / α²"),
            tuple(
                (
                    f"{m.alpha:g}",
                    decimal(m.change, 5),
                    decimal(m.change / m.alpha),
                    decimal(m.change / m.alpha**2, 1),
                )
                for m in mixing_losses()
            ),
            numbers=(0, 1, 2, 3),
        ),
        Text(
            "The absolute floor on eigenvalues (Appendix B) inverts the answer on a dead representation: "
            f'constant rows score {decimal(dead_paper)} by the paper\'s convention, "maximally uniform", '
            f"and {decimal(dead_ours)} here, with the status `zero_variance`. The floor also makes the "
            "entropy depend on the unit of the activations."
        ),
        Table(
            "Entropy of one and the same 512 × 128 matrix in four units.",
            ("activations times", "H, paper's convention", "H, this package"),
            tuple((f"{s:g}", *map(decimal, scores(s * matrix))) for s in SCALES),
            numbers=(0, 1, 2),
        ),
        Text(
            "H* is circular as the paper uses it: it is the entropy at grokking, averaged over the runs "
            "whose leads are then measured with it. If the entropy falls steadily, a run is first below H* "
            "before it groks exactly when its own entropy at grokking is below the mean, so about half the "
            'runs must fail. Hence "100 % of runs" depends on where H* comes from; section E1 gives each '
            "choice, and the sweep over all thresholds."
        ),
        Text(
            'Phase I is described as "high and stable" (section 3.2), as "decreasing monotonically from '
            'initialisation" (section 5) and as "decreasing monotonically during memorisation" (section '
            "2.2). These cannot all hold; section E1 measures it."
        ),
    ]
    return Section("corrections", "Corrections: what is not so in the paper", tuple(blocks))
