"""The settings that E6 and E7 vary, each under the name of its condition."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastent.train.presets import CHOICES, TASK_SETTINGS


@dataclass(frozen=True)
class Variant:
    """Settings that differ from the preset's in `changes`; `label` says how, in a few words.

    `condition` is the one of its runs, together with the task if `changes` names one.
    """

    condition: str
    changes: Mapping[str, Any]
    label: str


TASKS = (
    Variant("baseline", {"task": "mul"}, "a b mod p, 0 included"),
    Variant("baseline", {"task": "sub"}, "a - b mod p"),
    Variant("baseline", {"task": "s5", **TASK_SETTINGS["s5"]}, "composition in S5"),
)
"""The paper's other tasks (section 9)."""


def controls(modulus: int) -> tuple[Variant, ...]:
    """Relabelling controls, in pairs: either of a pair is the other under new names of operands and results.

    By discrete logarithms the non-zero residues under multiplication modulo a prime p are 0 .. p - 2 under
    addition; and with a table of tokens for each operand, the second one's b can be called -b. Nothing in
    training knows names, so what differs between the two of a pair differs as seeds do.
    """
    less = modulus - 1
    own = {"separate_tokens": True}
    return (
        Variant("baseline", {"task": "mul_nonzero"}, "a b mod p, without 0"),
        Variant(f"with-modulus-{less}", {"task": "add", "modulus": less}, "a + b mod p - 1"),
        Variant("with-own-tokens", {"task": "sub", **own}, "a - b mod p, own tokens"),
        Variant("with-own-tokens", {"task": "add", **own}, "a + b mod p, own tokens"),
    )


OTHER_CHOICES = tuple(
    Variant(f"with-{name}", CHOICES[name], label)
    for name, label in (
        ("unit-scale", "embeddings start at 1"),
        ("mean", "mean over positions"),
        ("equals", 'input a, b, "="'),
        ("gelu", "GELU"),
        ("pre-norm", "LayerNorm before"),
        ("no-norm", "no LayerNorm"),
    )
)
"""Settings one choice apart from the preset's, where the paper leaves the choice open."""

MLPS = (
    Variant("with-mlp-concat", {"model": "mlp"}, "concatenated, 512-128"),
    Variant("with-mlp-sum", {"model": "mlp", "combine": "sum"}, "summed, 512-128"),
    Variant("with-mlp-concat-small", {"model": "mlp", "init_scale": 0.05}, "concatenated, small start"),
    Variant(
        "with-mlp-sum-small", {"model": "mlp", "combine": "sum", "init_scale": 0.05}, "summed, small start"
    ),
    Variant("with-mlp-one-layer", {"model": "mlp", "hidden": (256,)}, "one hidden layer, 256"),
    Variant("with-mlp-narrow", {"model": "mlp", "hidden": (128, 128)}, "narrow, 128-128"),
    Variant("with-mlp-wide", {"model": "mlp", "hidden": (2048, 128)}, "wide, 2048-128"),
    Variant("with-mlp-weak-decay", {"model": "mlp", "weight_decay": 0.1}, "weight decay 0.1"),
    Variant("with-mlp-no-decay", {"model": "mlp", "weight_decay": 0.0}, "weight decay 0"),
    Variant(
        "with-mlp-fast-no-decay",
        {"model": "mlp", "weight_decay": 0.0, "learning_rate": 1e-2},
        "learning rate 1e-2, weight decay 0",
    ),
    Variant("with-mlp-slow", {"model": "mlp", "learning_rate": 1e-4}, "learning rate 1e-4"),
)
"""MLPs of E7: the paper does not describe its own. The first two are the plainest; the others
vary one thing, or two. The fast one without decay was found on seed 1000: its entropy falls and stays low."""
