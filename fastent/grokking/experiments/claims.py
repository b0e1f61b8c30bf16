"""Claims of the paper beside our figures: the verdicts, how numbers are worded, and what the paper itself gets wrong.

The rule for a verdict stands in the claim itself (`why`), so that a reader can disagree with it. A number of the paper
that belongs to the paper's setting is never judged by runs of another: the verdict is then "other setting".

Two parts need no run. The paper's printed numbers, those that survive in the text of arXiv 2604.13123 v1 (many did
not): whether they follow from each other. And what of it is not so, by numbers computed when the report is written:

- Lemma 5 says that mixing lowers the entropy by at most ``O(alpha^2)``. A slow against a fast wave, shifted
  cyclically, loses entropy in first order of alpha, and so refutes it.
- Appendix B clamps eigenvalues at an absolute floor. Constant rows, a dead representation, then score 1,
  "maximally uniform"; and the answer depends on the scale of the activations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastent.entropy import spectral_entropy
from fastent.grokking.experiments.document import Block, Section, Table, Text, Verdict
from fastent.grokking.experiments.statistics import Estimate
from fastent.mixing import mix_representations

REPRODUCED = Verdict("yes", "reproduced")
IN_PART = Verdict("part", "in part")
NOT_REPRODUCED = Verdict("no", "not reproduced")
OTHER_SETTING = Verdict("none", "other setting")
NOT_RUN = Verdict("none", "not run")
NO_CASE = Verdict("none", "no case")
"""The runs hold nothing that the claim is about."""
MIXED = Verdict("none", "mixed settings")
"""The runs were not made with one and the same settings: what they say together is said of none."""

NONE = "–"


@dataclass(frozen=True)
class Claim:
    """One row of the summary: where the paper says what, what we find, and the verdict with its rule."""

    where: str
    says: str
    ours: str
    verdict: Verdict
    why: str


def claims_table(caption: str, claims: list[Claim]) -> Table:
    """Lay out `claims` as the summary table."""
    rows = tuple((c.where, c.says, c.ours, c.verdict, c.why) for c in claims)
    return Table(caption, ("Paper", "It says", "These runs", "Verdict", "Judged by"), rows)


def judge_share(share: Estimate | None) -> Verdict:
    """Verdict on "in every run": reproduced at all, not reproduced below one half, in part between."""
    if share is None:
        return NOT_RUN
    if share.value == 1:
        return REPRODUCED
    return IN_PART if share.value >= 0.5 else NOT_REPRODUCED


def judge_value(paper: float, ours: Estimate | None, *, comparable: bool) -> Verdict:
    """Verdict on a number: reproduced if inside our interval, in part if within a quarter, else not."""
    if ours is None:
        return NOT_RUN
    if not comparable:
        return OTHER_SETTING
    if ours.low is not None and ours.high is not None and ours.low <= paper <= ours.high:
        return REPRODUCED
    return IN_PART if abs(ours.value - paper) <= 0.25 * abs(paper) else NOT_REPRODUCED


def steps(value: float | None) -> str:
    """Write a step or a number of steps, "1,020"; a dash for None."""
    return NONE if value is None else f"{value:,.0f}".replace("-", "−")


def decimal(value: float | None, digits: int = 3) -> str:
    """Write a number to `digits` places; a dash for None."""
    return NONE if value is None else f"{value:.{digits}f}".replace("-", "−")


def percent(value: float | None) -> str:
    """Write a share in per cent, no decimals; a dash for None."""
    return NONE if value is None else f"{100 * value:.0f} %"


def worded(estimate: Estimate | None, unit: str = "steps", digits: int = 3) -> str:
    """Write an estimate with interval and n: "1,020 steps (95 % CI 900 to 1,150; n = 10)".

    `unit` "steps" and "%" choose their format, anything else is written to `digits` places with the unit
    after it.
    """
    if estimate is None:
        return NONE

    def number(value: float) -> str:
        if unit == "steps":
            return steps(value)
        return percent(value) if unit == "%" else decimal(value, digits)

    after = f" {unit}" if unit not in ("", "%") else ""
    if estimate.low is None or estimate.high is None:
        return f"{number(estimate.value)}{after} ({estimate.method})"
    span = f"{number(estimate.low)} to {number(estimate.high)}"
    return f"{number(estimate.value)}{after} ({100 * estimate.level:.0f} % CI {span}; n = {estimate.n})"


def span(estimate: Estimate | None, write: Callable[[float | None], str]) -> str:
    """Write a number with its interval below it, "1,020 [900, 1,150]"; without interval the number alone."""
    if estimate is None:
        return NONE
    value = write(estimate.value)
    if estimate.low is None or estimate.high is None:
        return value
    return f"{value} [{write(estimate.low)}, {write(estimate.high)}]"


def counted(share: Estimate | None) -> str:
    """Write a share of runs: "9 of 10 runs (95 % CI 55 % to 100 %)"; a dash for None."""
    if share is None:
        return NONE
    span = f"{100 * share.level:.0f} % CI {percent(share.low)} to {percent(share.high)}"
    return f"{round(share.value * share.n)} of {share.n} runs ({span})"


GRID = 200
"""Steps between its evaluations (Appendix A): every time of a run is a multiple."""

BUDGET = 50_000
BASELINE, MIXING, CONTROL = 14_360, 19_420, 22_664
"""Mean T_grok in its Table 1."""
LEAD = 1_020

FOLLOWS = Verdict("yes", "follows")
CONTRADICTS = Verdict("no", "contradicts")
DOUBTFUL = Verdict("part", "doubtful")


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
        return DOUBTFUL if self.holds is None else FOLLOWS if self.holds else CONTRADICTS


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
            "mean advance warning 12,370 steps, over 10 seeds",
            f"a mean of 10 differences of times on a grid of {GRID} steps is a multiple of {GRID // 10}",
            is_mean(12_370, 10),
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
            f"possible for 10 seeds ({steps(LEAD)} is a multiple of {GRID // 10}); two definitions that "
            "share a mean",
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
        Table(
            "The paper's own arithmetic.",
            ("Paper", "It prints", "Its own numbers give", ""),
            rows,
        ),
    ]
    return Section("arithmetic", "The paper's own arithmetic", tuple(blocks))


@dataclass(frozen=True)
class Said:
    """A claim that a summary must name: `marker` is a piece of the wording of the claim that covers it."""

    experiment: str
    where: str
    says: str
    marker: str


SAID = (
    Said(
        "e1", "§5, Fig. 1A", "the model memorises early and generalises late, in every run", "memorises early"
    ),
    Said("e1", "Table 1", "T_grok is 14,360 steps", "T_grok is 14,360"),
    Said("e1", "§3.3", "H* is 0.61", "H* is 0.61"),
    Said(
        "e1",
        "§3.3, abstract (ii)",
        "H falls below H* before grokking in 100 % of runs",
        "H falls below H* before grokking in 100 %",
    ),
    Said("e1", "§3.2", "Phase I: H stays high and stable", "Phase I: H stays high"),
    Said("e1", "§5", "H decreases monotonically from initialisation", "H decreases monotonically"),
    Said("e2", "Table 1, abstract (iii)", "mixing delays grokking by 5,020 steps", "mixing delays grokking"),
    Said("e2", "§6", "mixing prevents the covariance from collapsing", "mixing prevents the covariance"),
    Said(
        "e3",
        "Table 1",
        "the norm-matched control delays grokking, by 8,304 steps",
        "norm-matched control delays",
    ),
    Said(
        "e3",
        "§6, abstract (iii)",
        "entropy collapse, not the norm, is the driver",
        "entropy collapse, not the parameter norm",
    ),
    Said("e4", "§3.3, §7", "norm and H are weakly negatively correlated", "weakly negatively correlated"),
    Said(
        "e4", "Table 2", "the gap of H outperforms both norm-based predictors", "outperforms both norm-based"
    ),
    Said("e5", "§8, abstract (iv)", "a power law explains R² = 0.543", "a power law in H"),
    Said("e5", "§8", "left-out runs are forecast within 4.1 %", "left-out runs are forecast"),
    Said(
        "e5",
        "§10, App. D.2",
        "grokking follows within 1,000 steps of the crossing",
        "within 1,000 steps of H falling",
    ),
    Said("e5", "§10", "stopping early saves 86 % of the budget", "of the budget of"),
    Said("e5", "App. D.3", "H costs about 8 ms an evaluation", "ms an evaluation"),
    Said("e5", "Table 5", "near the threshold, grokking is imminent", "grokking is imminent"),
    Said("e5", "Table 5, §10", "a run whose H stagnates is unlikely to grok", "whose H stagnates"),
    Said(
        "e6",
        "Table 3, abstract (v)",
        "other tasks and S5 show the same pattern",
        "the pattern is the same across",
    ),
    Said(
        "e6",
        "Table 3",
        "multiplication and subtraction are alike to the step",
        "multiplication and subtraction have one",
    ),
    Said(
        "e6", "§9", "S5: the collapse is detected before grokking in 5 of 10 seeds", "in 5 of 10 seeds of S5"
    ),
    Said("e7", "§11", "an MLP's H collapses and it does not grok", "an MLP memorises"),
    Said("e7", "abstract, §11", "collapse is necessary, not sufficient", "the collapse is not sufficient"),
    Said(
        "e8",
        "App. B, Fig. 10",
        "probes from train and test sets agree at grokking",
        "of a training and of a test probe",
    ),
)
"""Claims that the summary names even where no run speaks to them."""

CONTRIBUTIONS = (
    (
        "(i)",
        "two phases: the norm expands, then H collapses",
        ("Phase I: the parameter norm", "Phase I: H stays high"),
    ),
    (
        "(ii)",
        "H falls below H* before generalisation in every run",
        ("H falls below H* before grokking in 100 %", "H* from the other seeds", "dated at 50 %"),
    ),
    (
        "(iii)",
        "causal: preventing the collapse delays grokking, and it is not the norm",
        (
            "mixing delays grokking",
            "mixing prevents the covariance",
            "entropy collapse, not the parameter norm",
        ),
    ),
    (
        "(iv)",
        "a power law in H forecasts grokking",
        ("a power law in H", "left-out runs are forecast", "forecasts better than the clock"),
    ),
    ("(v)", "S5 and other tasks show the same", ("the pattern is the same across", "in 5 of 10 seeds of S5")),
    (
        "a sixth",
        "collapse is necessary, not sufficient: MLPs",
        ("an MLP memorises", "the collapse is not sufficient"),
    ),
)
"""The paper's contributions (it says five and lists six), with markers of the claims each rests on."""


def covering(marker: str, claims: list[Claim]) -> list[Claim]:
    """Return the claims whose wording holds `marker`."""
    return [claim for claim in claims if marker in claim.says]


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
            "Entropy lost by mixing, for the two waves. If the lemma held, the last column would stay "
            "bounded.",
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
    return Section("corrections", "What is not so in the paper", tuple(blocks))
