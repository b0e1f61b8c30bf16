"""Jobs of each experiment: a function from settings and seeds to what it asks the trainer for.

An experiment varies what it is about (a task, a condition) and takes everything else from the settings it is
given, a preset with the command line's changes. What E6, E7 and the choices vary stands under the names of their
conditions. Each lists its jobs from the most telling to the least, as far as runs that follow others let it: a machine
that is stopped half-way has made the better half.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastent.grokking.train.config import CHOICES, TrainConfig, changed_from, own_fraction
from fastent.grokking.train.runs import Job

ALPHA = 0.1
"""Weight of the other row in the mixing. Ours: the paper's text lost it."""

DOSES = (0.05, 0.1, 0.2, 0.4)
"""Weights of the dose-response."""

TEN, FEWER, TO_THE_END = 10, 5, 3
"""Seeds, the first ones, of E3's runs beside its control, of those that only support others, and of long or many."""

SPECTRA: tuple[str, ...] = ("fourier", "progress")
"""What E6 and E7 record beside H, and E1, whose runs they are set beside."""

PROBES: tuple[str, ...] = ("test_probe", "probe_sizes")
"""What E1 records besides for E8."""

LOGITS: tuple[str, ...] = ("logit_scale",)
"""What E2 and E3 record, and E1 for them."""

LONGER = 1.6
"""Steps of an MLP that does not grok, over the preset's limit: the paper's 80,000 over its 50,000."""

Jobs = Callable[[TrainConfig, Sequence[int]], list[Job]]


def e1(config: TrainConfig, seeds: Sequence[int]) -> list[Job]:
    """E1, does the collapse of the entropy precede grokking: the settings as they are."""
    return [_job("e1", "baseline", config, seeds, (*PROBES, *SPECTRA, *LOGITS))]


def e2(config: TrainConfig, seeds: Sequence[int]) -> list[Job]:
    """E2, does mixing delay grokking: E1's runs, the readings of the loss, and a dose-response over alpha.

    The third reading, training on the mixed representations alone, is to average the logits with twice the alpha.
    """
    losses, logits = (_job("e2", f"{each}-{ALPHA:g}", config, seeds, LOGITS) for each in ("losses", "logits"))
    fewer = [f"losses-{alpha:g}" for alpha in DOSES if alpha != ALPHA] + [f"logits-{2 * ALPHA:g}"]
    others = [_job("e2", name, config, seeds[:FEWER], LOGITS) for name in fewer]
    return [*e1(config, seeds), losses, *others[:-1], logits, others[-1]]


def e3(config: TrainConfig, seeds: Sequence[int]) -> list[Job]:
    """E3, is it the norm: the control, its sham, and what else holds the norm or the scale of the logits.

    The control is our reading of the paper's, mixing with the baseline's norm; the sham holds that norm without mixing.
    With the norm of E2's mixed runs held too these make a two by two design: mixed or not, with the baseline's norm or
    with that of the mixed runs. Then temperatures, with a held norm and without; the sham's variants; and the norm held
    where the baseline has memorised, and at its start. All seeds that are asked for go to the baseline and the control,
    at most ten to the sham and the mixing: ``--seeds 0-29`` gives the control the paper's thirty.
    """
    mixed, most = (f"losses-{alpha:g}" for alpha in (ALPHA, max(DOSES)))
    sham, held = "norm-as-baseline", "norm-mem"
    fewer = [
        *(f"logits-as-baseline+{sham}", held, f"logits-as-baseline+{held}", f"logits-as-{held}"),
        *(f"norm-as-{mixed}", f"{mixed}+norm-as-{mixed}", "logits-as-baseline", f"logits-as-{sham}"),
        *(f"{sham}-{how}" for how in ("every-step", "each", "moments")),
        *(f"{mixed}+{held}", "norm-start", f"{mixed}+norm-start"),
        *("norm-start-each", f"{mixed}+norm-start-each", f"{most}+{sham}", f"norm-as-{most}"),
    ]

    def job(experiment: str, condition: str, seeds: Sequence[int]) -> Job:
        return _job(experiment, condition, config, seeds, LOGITS)

    return [
        *e1(config, seeds),
        job("e3", sham, seeds[:TEN]),
        job("e3", f"{mixed}+{sham}", seeds),
        job("e2", mixed, seeds[:TEN]),
        job("e2", most, seeds[:FEWER]),
        *(job("e3", condition, seeds[:FEWER]) for condition in fewer),
    ]


def sham(config: TrainConfig, seeds: Sequence[int]) -> list[Job]:
    """E3's first question alone, what holding the baseline's own norm does, in each variant, and with mixing."""
    return [job for job in e3(config, seeds) if job.condition == "baseline" or _reimposes(job.condition)]


def _reimposes(condition: str) -> bool:
    mixing, _, rest = condition.rpartition("+")
    return rest.startswith("norm-as-baseline") and not mixing.startswith("logits-as")


def e5(config: TrainConfig, seeds: Sequence[int]) -> list[Job]:
    """E5, does a power law forecast grokking, and what does stopping early save: E1's runs.

    And a few of them trained to the limit of steps, to see what is lost by stopping and which alarms are false.
    """
    to_the_end = dataclasses.replace(config, run_past_steps=config.max_steps)
    return [*e1(config, seeds), _job("e5", "to-the-end", to_the_end, seeds[:TO_THE_END])]


def e6(config: TrainConfig, seeds: Sequence[int]) -> list[Job]:
    """E6, do other tasks and groups show the same: E1's runs, the paper's other tasks, and relabelled ones."""
    one = dataclasses.replace(config, operand_tokens="one")  # only S5 has images, and has them as a variant
    tasks = [
        _variant("e6", task, one, seeds if task.changes["task"] == "s5" else seeds[:FEWER]) for task in TASKS
    ]
    relabelled = [_variant("e6", each, one, seeds[:FEWER]) for each in controls(config.modulus)]
    return [*e1(config, seeds), *tasks, *relabelled]


def e7(config: TrainConfig, seeds: Sequence[int]) -> list[Job]:
    """E7, is the collapse sufficient: an MLP and the Transformer on the same few pairs, and MLPs of several kinds.

    All for longer than E1's Transformers, which the MLPs of several kinds are set beside. Of those the first two are
    the plainest, and have more seeds than those that vary one thing. A run that does not grok goes on to the last step.
    """
    longer = dataclasses.replace(config, max_steps=round(LONGER * config.max_steps))
    # S5 has no modulus.
    few = [_variant("e7", each, longer, seeds[:FEWER]) for each in FEW_PAIRS if config.task != "s5"]
    mlps = [
        _variant("e7", mlp, longer, seeds[: FEWER if place < 2 else TO_THE_END])
        for place, mlp in enumerate(MLPS)
    ]
    return [*e1(config, seeds), *few, *mlps]


def choices(config: TrainConfig, seeds: Sequence[int]) -> list[Job]:
    """Which claims of E1 depend on what the paper leaves open: E1's runs, and settings one choice apart."""
    other = [
        _job("choices", choice.condition, changed, seeds[:TO_THE_END])
        for choice in OTHER_CHOICES
        if (changed := dataclasses.replace(config, **choice.changes)) != config
    ]
    return [*e1(config, seeds), *other]


def _variant(experiment: str, variant: Variant, config: TrainConfig, seeds: Sequence[int]) -> Job:
    return _job(experiment, variant.condition, dataclasses.replace(config, **variant.changes), seeds, SPECTRA)


def _job(
    experiment: str,
    condition: str,
    config: TrainConfig,
    seeds: Sequence[int],
    measures: tuple[str, ...] = (),
) -> Job:
    asked = tuple(dict.fromkeys((*config.measures, *measures)))
    return Job(experiment, condition, dataclasses.replace(config, measures=asked), tuple(seeds))


JOBS: dict[str, Jobs] = {
    "e1": e1,
    "e2": e2,
    "e3": e3,
    "e4": e1,
    "e5": e5,
    "e6": e6,
    "e7": e7,
    "e8": e1,
    "choices": choices,
    "sham": sham,
}
"""By id, all that can be run. E4 and E8 are analyses of E1's runs, and the sham is a part of E3."""


def planned(experiment: str, config: TrainConfig, preset: str, seeds: Sequence[int]) -> list[Job]:
    """Jobs of an experiment under settings made from a preset, each task trained on its own share of the pairs.

    The names of their folders carry what `config` changes in the preset, beside the task and what is measured.

    Parameters
    ----------
    experiment : str
        A key of `JOBS`.
    config : TrainConfig
        The preset, with changes.
    preset : str
        The name of the preset.
    seeds : sequence of int
        In the order of their importance.
    """
    few = {variant.condition for variant in FEW_PAIRS}  # a share of the pairs is what those are about
    changed = changed_from(config, preset)
    asked = [dataclasses.replace(job, changed=changed) for job in JOBS[experiment](config, seeds)]
    return [
        job
        if job.condition in few
        else dataclasses.replace(
            job,
            config=dataclasses.replace(
                job.config, train_fraction=own_fraction(config, job.config.task, preset)
            ),
        )
        for job in asked
    ]


@dataclass(frozen=True)
class Variant:
    """Settings that differ from the preset's in `changes`; `label` says how, in a few words.

    `condition` is the one of its runs, together with the task if `changes` names one.
    """

    condition: str
    changes: Mapping[str, Any]
    label: str


TASKS = (
    Variant("baseline", {"task": "s5"}, "composition in S5"),
    Variant("with-images", {"task": "s5", "operand_tokens": "images"}, "composition in S5, ten tokens"),
    Variant("baseline", {"task": "mul"}, "a b mod p, 0 included"),
    Variant("baseline", {"task": "sub"}, "a - b mod p"),
)
"""The paper's other tasks (section 9). It does not say how many tokens a permutation has: S5 both ways."""


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

FEW, FRACTIONS = 41, (0.2, 0.5, 0.3, 0.4, 0.6)
"""The modulus of the paper's MLP, and shares of its pairs: the paper's own first, then where an MLP may grok."""

FEW_PAIRS = tuple(
    Variant(
        f"with-{model}-{FEW}-{share:g}",
        {"model": model, "modulus": FEW, "train_fraction": share},
        f"{name}, p = {FEW}, {100 * share:.0f} %",
    )
    for share in FRACTIONS
    for model, name in (("mlp", "MLP"), ("transformer", "Transformer"))
)
"""E7's comparison on the same pairs: whether a model groks may be a matter of how many there are."""

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
