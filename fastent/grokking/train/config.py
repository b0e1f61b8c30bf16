"""What a run is: one typed, frozen configuration, and the presets, each value with its source.

`TrainConfig` is the command line (tyro), ``config.json`` beside the results and what the trainer reads;
there is no other place for a setting. Every default is the `paper` preset's. Values that the paper gives are
marked "paper" in `SOURCES`; the others are marked "ours", with the reason, and were calibrated on seeds 1000 and
above, never on the seeds of the experiments (``bench/results/calibration-*.jsonl``).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from fastent.grokking.train.registry import BUILT_IN, check_known

Sampling = Literal["epochs", "replacement"]

_LAYER = re.compile(r"\w+(\.\w+)*", re.ASCII)

MOST_STEPS = 2**24
"""Steps that AdamW's count, a float32, tells apart."""


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a training run besides its seed and its condition.

    Raises
    ------
    ValueError
        If a value is out of its range or two of them do not fit; the message names the rule and the remedy.
    """

    task: str = "add"
    """add, sub, mul: a + b, a - b, a * b modulo `modulus` over all residues; mul_nonzero: without 0; s5: composition in
    S5; or a task of another package."""
    modulus: int = 97
    """p of the modular tasks; S5 has none and ignores it."""
    separate_tokens: bool = False
    """Whether the second operand has tokens of its own, so that a relabelling of it is the same problem."""
    operand_tokens: Literal["one", "images"] = "one"
    """An operand as one token; or a permutation as five, its images of 1 to 5 (S5, Transformer)."""
    train_fraction: float = 0.3
    """Share of all pairs that is trained on; the rest is the test set. The split depends on the seed."""

    model: str = "transformer"
    """transformer: one encoder layer; mlp: a multilayer perceptron on the embedded operands; or a model of another
    package."""
    layers: int = 1
    """Encoder layers (Transformer). Gradients are by hand for one; for more, torch's, and slower."""
    width: int = 128
    """Size of the embeddings (and of the Transformer's representation)."""
    heads: int = 4
    """Attention heads (Transformer)."""
    feedforward: int = 512
    """Hidden units of the feed-forward part (Transformer)."""
    activation: Literal["relu", "gelu"] = "relu"
    """Nonlinearity of the feed-forward part or of the MLP's hidden layers."""
    norm_place: Literal["post", "pre", "none"] = "post"
    """LayerNorm after each residual sum, before each sublayer, or nowhere (Transformer)."""
    readout: Literal["last", "mean"] = "last"
    """Vector read out of the layer: the last position's, or the mean over positions (Transformer)."""
    final_norm: bool = False
    """Whether one more LayerNorm stands between the vector read out and the head (Transformer)."""
    entropy_at: str = "readout"
    """Where the representation is taken, for the entropy and every other measure: readout or final_norm, before or
    after that LayerNorm; or the name of a layer, where gradients are torch's."""
    equals_token: bool = False
    """Whether the input is a, b, "=" rather than a, b (Transformer)."""
    start: Literal["torch", "normal", "xavier"] = "torch"
    """Weights as torch's layers start; all N(0, 0.02); or Xavier uniform but embeddings. Biases 0 in the last two."""
    init_scale: float = 128**-0.5
    """Standard deviation of the embeddings at the start; a "normal" start has its own."""
    hidden: tuple[int, ...] = (512, 128)
    """Sizes of the MLP's hidden layers; the last one is its representation."""
    combine: Literal["concat", "sum"] = "concat"
    """Whether the MLP reads the two embeddings side by side or their sum."""

    learning_rate: float = 1e-3
    """AdamW's step size, constant."""
    weight_decay: float = 1.0
    """AdamW's decoupled weight decay, on every parameter."""
    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW's decay rates of the two moments."""
    epsilon: float = 1e-8
    """AdamW's term beside the root of the second moment."""
    batch_size: int = 512
    """Pairs in a step."""
    sampling: Sampling = "epochs"
    """Whether the batches cut shuffled passes over the training set, or each pair is drawn from all of it anew."""
    max_steps: int = 50_000
    """Steps after which a run ends whatever it has reached."""

    evaluate_every: int = 200
    """Steps between evaluations of both sets, the norm and the entropy."""
    probe_size: int = 512
    """Training pairs, fixed per seed, whose representations the entropy is taken of."""
    criterion: float = 0.99
    """Test accuracy at which a run has grokked (T_grok is the first evaluation that reaches it)."""
    memorised: float = 0.99
    """Train accuracy at which a run has memorised (T_mem)."""
    run_past_steps: int = 3_000
    """A run goes on at least this many steps past T_grok ..."""
    run_past_share: float = 0.2
    """... and at least this share of T_grok; `max_steps` caps both."""
    measures: tuple[str, ...] = ()
    """Further columns at each evaluation; they change nothing of the training: test_probe, probe_sizes, fourier,
    progress, logit_scale (`fastent.grokking.train.measures`), or those of other packages."""

    def __post_init__(self) -> None:
        for name in ("betas", "hidden", "measures"):
            # JSON knows lists only; a configuration must come back equal, and hashable.
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, values in _choices().items():
            value = getattr(self, name)
            _require(
                value in values, f"{name} must be {', '.join(values[:-1])} or {values[-1]}; got {value!r}"
            )
        check_known("task", self.task)
        check_known("model", self.model)
        for measure in self.measures:
            check_known("measure", measure, "measures")
        for name in (
            "layers",
            "width",
            "heads",
            "feedforward",
            "batch_size",
            "max_steps",
            "evaluate_every",
            "modulus",
        ):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1; got {getattr(self, name)}")
        _require(
            self.max_steps <= MOST_STEPS,
            f"max_steps must be at most 2^24 = {MOST_STEPS:,}, as far as AdamW's float32 counts; got {self.max_steps}",
        )
        _require(
            0.0 < self.train_fraction < 1.0,
            f"train_fraction must lie strictly between 0 and 1; got {self.train_fraction}",
        )
        _require(
            self.model != "transformer" or self.width % self.heads == 0,
            f"width must be a multiple of heads; got width={self.width}, heads={self.heads}",
        )
        _require(
            self.model != "mlp" or (len(self.hidden) >= 1 and min(self.hidden) >= 1),
            f"hidden must name at least one layer size, each at least 1; got {self.hidden}",
        )
        _require(
            self.operand_tokens == "one" or (self.task == "s5" and self.model == "transformer"),
            'operand_tokens="images" needs task="s5" and model="transformer": residues have no images, and the MLP '
            f"reads two tokens; got task={self.task!r}, model={self.model!r}",
        )
        _require(
            self.layers == 1 or self.model != "mlp",
            f"layers must be 1 for the MLP, whose depth is that of hidden, and E7 trains MLPs; got {self.layers}",
        )
        ours = self.model == "mlp" or (self.model == "transformer" and self.layers == 1)
        _require(
            self.entropy_at in ("readout", "final_norm")
            if ours
            else _LAYER.fullmatch(self.entropy_at) is not None,
            "entropy_at must be readout or final_norm"
            + ("" if ours else ", or the name of a layer such as layer.0")
            + f"; got {self.entropy_at!r}",
        )
        _require(
            self.final_norm or self.entropy_at != "final_norm" or self.model not in BUILT_IN["model"],
            'entropy_at="final_norm" needs final_norm=True: without that LayerNorm there is nothing after it',
        )
        _require(self.probe_size >= 2, f"probe_size must be at least 2; got {self.probe_size}")
        _require(all(0.0 <= beta < 1.0 for beta in self.betas), f"betas must lie in [0, 1); got {self.betas}")
        for name in ("learning_rate", "weight_decay", "init_scale", "run_past_steps", "run_past_share"):
            _require(
                0 <= getattr(self, name) < math.inf,
                f"{name} must be finite and not negative; got {getattr(self, name)}",
            )
        _require(
            0 < self.epsilon < math.inf,
            f"epsilon must be finite and over 0, or a gradient of 0 would be divided by 0; got {self.epsilon}",
        )
        for name in ("criterion", "memorised"):
            _require(
                0.0 < getattr(self, name) <= 1.0, f"{name} must lie in (0, 1]; got {getattr(self, name)}"
            )

    def last_step(self, t_grok: int) -> int:
        """Step at which a run that grokked at `t_grok` ends.

        Examples
        --------
        >>> TrainConfig().last_step(20_000)
        24000
        """
        past = max(self.run_past_steps, self.run_past_share * t_grok)
        return min(self.max_steps, math.ceil(t_grok + past))


@functools.cache
def _choices() -> dict[str, tuple[str, ...]]:
    """Values of each field that has few."""
    hints = get_type_hints(TrainConfig)
    return {name: get_args(hint) for name, hint in hints.items() if get_origin(hint) is Literal}


def _require(holds: bool, rule: str) -> None:
    if not holds:
        raise ValueError(rule)


SOURCES: dict[str, str] = {
    "task": "paper, section 4 (add first); S5 in section 9",
    "modulus": "paper, version 2, as its reviews quote it; lost in version 1",
    "separate_tokens": "ours: off, as in Power et al. 2022; on in the relabelling controls",
    "operand_tokens": "ours: not given; one, as in Power et al. 2022",
    "train_fraction": "ours: 0.3, calibrated, and 0.5 for S5; lost in version 1, version 2 has 0.20 and 0.10",
    "model": "paper, section 4 and Appendix A; the MLP in section 11",
    "layers": "paper, section 4: one",
    "width": "paper, Appendix A",
    "heads": "paper, Appendix A",
    "feedforward": "paper, Appendix A",
    "activation": "ours: not given; ReLU, the default of torch's layer; calibrated; GELU in the authors' sibling code",
    "norm_place": "ours: not given; post, as in torch's layer and in Vaswani et al. 2017, which it cites",
    "readout": "ours: not given; last, calibrated",
    "final_norm": "ours: not given; none; the authors' sibling code has one",
    "entropy_at": "ours: not given; what is read out of the layer",
    "equals_token": "ours: not given; none: with it and a small scale there is no plateau; calibrated",
    "start": "ours: not given; torch's",
    "init_scale": "ours: not given; width^-1/2, so that the norm rises while it memorises, as in the paper",
    "hidden": "ours: the paper does not describe its MLP",
    "combine": "ours: the paper does not describe its MLP",
    "learning_rate": "paper, version 2, as its reviews quote it; lost in version 1, and calibrated then",
    "weight_decay": "paper, Appendix A",
    "betas": "ours: not given; 0.9 and 0.98 as in Power et al. 2022; 0.9 and 0.999 in the sibling code",
    "epsilon": "ours: not given; torch's default",
    "batch_size": "paper, section 4 and Appendix A",
    "sampling": "ours: not given; shuffled passes, as torch's loader draws them; with replacement in the sibling code",
    "max_steps": "paper, section 4 and Appendix A",
    "evaluate_every": "paper, Appendix A",
    "probe_size": "paper, Appendix A",
    "criterion": "ours: lost in version 1; 0.99, as in the authors' sibling code",
    "memorised": "ours: the paper has no criterion for memorising",
    "run_past_steps": "ours: to see what entropy does after grokking, and T_grok sustained",
    "run_past_share": "ours: as run_past_steps",
    "measures": "ours: none; each experiment names those it analyses",
}
"""Where the `paper` preset's value of each field comes from."""

_YOUNGER: dict[str, Any] = {
    "layers": 1,
    "final_norm": False,
    "entropy_at": "readout",
    "start": "torch",
    "sampling": "epochs",
    "operand_tokens": "one",
}


def completed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return recorded settings with the fields that are younger than the record, at what it was trained with.

    Examples
    --------
    >>> completed({"task": "s5", "start": "xavier"})["start"], completed({"task": "s5"})["start"]
    ('xavier', 'torch')
    """
    return {**_YOUNGER, **settings}


_PAPER = TrainConfig()

CHOICES: dict[str, dict[str, Any]] = {
    "unit-scale": {"init_scale": 1.0},
    "mean": {"readout": "mean"},
    "equals": {"equals_token": True},
    "gelu": {"activation": "gelu"},
    "pre-norm": {"norm_place": "pre"},
    "no-norm": {"norm_place": "none"},
}
"""What the paper leaves open, each time one other choice than ours: which claims depend on it?"""

PRESETS: dict[str, TrainConfig] = {
    # The fastest of its grid whose plateau is plain (test accuracy under 10 % for 1,150 to 1,700 steps after
    # memorising, four seeds), 20 seconds of one core a seed: bench/results/calibration-quick.jsonl.
    "quick": dataclasses.replace(
        _PAPER,
        train_fraction=0.4,
        learning_rate=2e-3,
        init_scale=1.0,
        evaluate_every=50,
        max_steps=8_000,
        run_past_steps=1_000,
    ),
    # bench/results/calibration-paper.jsonl.
    "paper": _PAPER,
    # What the authors' public code of the same months trains (ClevixLab/grokking-norm-separation and
    # critical-norm-grokking): T_grok 1,500 to 2,500 there, 1,400 to 2,100 here, four seeds, each evaluated every 100
    # steps (bench/results/calibration-companion.jsonl).
    "companion": dataclasses.replace(
        _PAPER,
        train_fraction=0.5,
        activation="gelu",
        final_norm=True,
        entropy_at="final_norm",
        init_scale=1.0,
        betas=(0.9, 0.999),
        sampling="replacement",
        evaluate_every=100,
    ),
    # What docs/search.md found nearest to the paper's numbers (bench/results/search.jsonl, point 44 of 96); it does not
    # give them jointly. The train fractions, S5's too, are those of the paper's second version.
    "nearest": dataclasses.replace(
        _PAPER,
        train_fraction=0.2,
        activation="gelu",
        norm_place="pre",
        final_norm=True,
        entropy_at="final_norm",
        start="normal",
        learning_rate=9.1e-4,
        betas=(0.9, 0.999),
        sampling="replacement",
        evaluate_every=100,
        memorised=0.95,
        run_past_steps=1_200,
        run_past_share=0.0,
    ),
    **{f"paper-{name}": dataclasses.replace(_PAPER, **changes) for name, changes in CHOICES.items()},
}
"""Named configurations."""

JUDGED = ("paper", "nearest")
"""Presets whose runs the paper's numbers are judged by: neither is known to be its setting, either could be."""

TASK_SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    # At 0.3 of its pairs S5 did not grok in 40,000 steps, at 0.5 in 5,800.
    **{name: {"s5": {"train_fraction": 0.5}} for name in PRESETS},
    # The second version of the paper.
    "nearest": {"s5": {"train_fraction": 0.1}},
}
"""What a task needs besides its name, by preset."""


def own_fraction(config: TrainConfig, task: str, name: str) -> float:
    """Share of the pairs that `task` is trained on under `config`, which was made from the preset called `name`.

    A share that was asked for goes for every task; otherwise each has its own.

    Examples
    --------
    >>> own_fraction(preset("paper"), "s5", "paper"), own_fraction(preset("paper", train_fraction=0.4), "s5", "paper")
    (0.5, 0.4)
    """
    own = {
        each: TASK_SETTINGS[name].get(each, {}).get("train_fraction", PRESETS[name].train_fraction)
        for each in (task, config.task)
    }
    return float(own[task] if config.train_fraction == own[config.task] else config.train_fraction)


def changed_from(config: TrainConfig, name: str) -> tuple[str, ...]:
    """Name the fields that `config` changes in the preset called `name`, but the task and what is measured.

    Examples
    --------
    >>> changed_from(preset("quick", task="s5", width=64), "quick")
    ('width',)
    """
    base = preset(name, task=config.task)
    return tuple(
        field.name
        for field in dataclasses.fields(config)
        if field.name not in ("task", "measures") and getattr(config, field.name) != getattr(base, field.name)
    )


def preset(name: str, **changes: Any) -> TrainConfig:
    """Return the configuration called `name` with what a task in `changes` needs, and `changes` themselves.

    Parameters
    ----------
    name : str
        A key of `PRESETS`.
    **changes
        Fields of `TrainConfig`.

    Raises
    ------
    ValueError
        If there is no such preset.

    Examples
    --------
    >>> preset("paper", task="s5").train_fraction
    0.5
    """
    if name not in PRESETS:
        raise ValueError(f"no preset is called {name!r}; there are {', '.join(PRESETS)}")
    needed = TASK_SETTINGS[name].get(changes.get("task", ""), {})
    return dataclasses.replace(PRESETS[name], **{**needed, **changes})
