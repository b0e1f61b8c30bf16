"""What of the paper is not so, shown by numbers that are computed when the report is written.

- Lemma 5 says that mixing lowers the entropy by at most ``O(alpha^2)``. A slow against a fast wave, shifted
  cyclically, loses entropy in first order of alpha, and so refutes it.
- Appendix B clamps eigenvalues at an absolute floor. Constant rows, a dead representation, then score 1,
  "maximally uniform"; and the answer depends on the scale of the activations.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastent.entropy import spectral_entropy
from fastent.experiments.claims import decimal
from fastent.experiments.document import Block, Section, Table, Text
from fastent.mixing import mix_representations

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


def section() -> Section:
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
