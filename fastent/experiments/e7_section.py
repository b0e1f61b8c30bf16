"""E7's part of the report: the MLPs beside the Transformer, setting by setting."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from fastent.experiments import e7_figures
from fastent.experiments.claims import NONE, counted, decimal, percent, steps, worded
from fastent.experiments.columns import column, over
from fastent.experiments.delay_blocks import drawn, span
from fastent.experiments.document import Block, Section, Table, Text
from fastent.experiments.e7_mlp import TITLE, Sufficiency
from fastent.experiments.e7_models import LAST, NEAR_ZERO, Model, told
from fastent.experiments.statistics import proportion


def section(result: Sufficiency) -> Section:
    """E7's part of the report."""
    blocks: list[Block] = [
        Text(
            "The paper's MLP, which it does not describe, memorises, loses entropy and never generalises; hence "
            '"necessary but not sufficient". Here are MLPs of several kinds, trained longer than the '
            "Transformers of E1, with the settings of E1 but for what each is named by."
        ),
        _models_table(result),
        drawn(
            "e7-models",
            functools.partial(e7_figures.side_by_side, result),
            "In the manner of the paper's Figure 9: the Transformer and the MLPs with its settings, one line a run. "
            "Circles: T_grok. Bottom: the paper's Fourier alignment, and the largest of 19 values that it takes "
            "for permuted labels.",
            "Accuracy, spectral entropy and Fourier alignment against the training step, one column a model.",
        ),
        Text(
            "The alignment is the largest of some ten thousand correlations, so it is never near 0: for permuted "
            f"labels it is {_null(result)} in these runs. "
            "A share of variance has a plain null: with no structure five of 48 frequencies have a tenth, and a "
            "little more for being the largest."
        ),
        drawn(
            "e7-spectra",
            functools.partial(e7_figures.spectra, result),
            "Above: share of the variance of test representations that lies between labels, and the share of that "
            "in the five strongest frequencies of the label. Below: cross-entropy with the logits restricted to the "
            "five key frequencies of the moment, without them, and on the test set, after Nanda et al. 2023.",
            "Shares of variance and losses against the training step, one column a model.",
        ),
        _signals_table((result.transformer, *result.plainest)),
        Text(
            "The first three need the group and the labels, of the training probe, of the test set and of all pairs; "
            "the last two the representations alone. They say what is learnt before the test accuracy moves, the "
            "entropy how much of the representation is that."
        ),
        drawn(
            "e7-settings",
            functools.partial(e7_figures.settings, result),
            "Every MLP, one line a run.",
            "Test accuracy and spectral entropy against the training step, one panel a setting.",
        ),
        _runs_table([result.transformer, *result.mlps]),
    ]
    return Section("e7", TITLE, tuple(blocks))


def _models_table(result: Sufficiency) -> Table:
    rows = []
    for model in (result.transformer, *result.mlps):
        runs = model.group.measured
        shown = (
            over([r.summary.entropy_start for r in runs]),
            over([r.summary.h_star for r in runs]),
            over([r.summary.entropy_end for r in runs]),
        )
        rows.append(
            (
                model.label,
                told(model),
                *(span(h, decimal) for h in shown),
                f"{sum(t is not None for t in model.below)} of {len(runs)}",
                span(over([r.summary.test_accuracy_end for r in runs]), percent),
                *(
                    span(over(model.at_end(name)), _two)
                    for name in ("alignment", "alignment_null", "top_share")
                ),
            )
        )
    caption = (
        "Models, means over their runs with 95 % intervals where there are three. "
        f"H*: the Transformers' mean H at T_grok, {worded(result.h_star, '')}. A run collapses if H ends "
        f"below it (median of the last {LAST} evaluations) and dips if H was below it before; "
        f"it does not generalise if test accuracy never exceeds {percent(NEAR_ZERO)}."
    )
    columns = (
        *("model", "runs", "H at start", "H at T_grok", "H at end", "H below H*"),
        *("test accuracy at end", "alignment at end", "its null", "five frequencies at end"),
    )
    return Table(caption, columns, tuple(rows))


def _signals_table(models: Sequence[Model]) -> Table:
    rows = []
    for model in models:
        if not model.group.stored:
            continue
        grokked = [run.summary.t_grok for run in model.group.measured]
        n = sum(t is not None for t in grokked)
        for signal, times in model.signals().items():
            found = [
                None if t is None or at is None else t - at for t, at in zip(grokked, times, strict=True)
            ]
            known = [x for x in found if x is not None]
            silent = [at for t, at in zip(grokked, times, strict=True) if t is None and at is not None]
            rows.append(
                (
                    model.label,
                    signal,
                    counted(proportion(sum(x > 0 for x in known), n)) if n else NONE,
                    worded(over(known)),
                    f"{len(silent)} of {len(grokked) - n}" if n < len(grokked) else NONE,
                )
            )
    caption = (
        "What moves first: steps from each signal to T_grok. A signal of columns counts from the first of two "
        "evaluations in a row."
    )
    columns = ("model", "signal", "before T_grok", "lead", "signal, but not grokked")
    return Table(caption, columns, tuple(rows))


def _null(result: Sufficiency) -> str:
    """Mean over runs and evaluations of what the alignment is for permuted labels."""
    means = [
        float(np.nanmean(values))
        for model in (result.transformer, *result.mlps)
        for run in model.group.stored
        if (values := column(run, "alignment_null_mean")) is not None
    ]
    return worded(over(means), "", 2)


def _two(value: float | None) -> str:
    return decimal(value, 2)


def _runs_table(models: Sequence[Model]) -> Table:
    rows = []
    for model in models:
        further = {
            name: (model.at_mem(name), model.at_end(name))
            for name in ("alignment", "label_share", "top_share", "restricted_loss", "excluded_loss")
        }
        aligned, gini = model.aligned(), model.at_end("embedding_gini")
        for i, (run, outcome) in enumerate(zip(model.group.measured, model.outcomes, strict=True)):
            s = run.summary
            pairs = [f"{_two(mem[i])} → {_two(end[i])}" for mem, end in further.values()]
            rows.append(
                (
                    model.label,
                    str(run.seed),
                    outcome,
                    steps(s.t_mem),
                    steps(s.t_grok),
                    steps(model.below[i]),
                    steps(aligned[i]),
                    *(NONE if pair == f"{NONE} → {NONE}" else pair for pair in pairs),
                    _two(gini[i]),
                    steps(s.last_step),
                )
            )
    caption = (
        "Every run. T_align: from here on after T_mem the alignment exceeds its null twice in a row. Arrows lead "
        "from T_mem to the end of the run. Gini: of the embedding's spectrum. Losses in nats."
    )
    columns = (
        *(
            "model",
            "seed",
            "outcome",
            "T_mem",
            "T_grok",
            "H below H*",
            "T_align",
            "alignment",
            "between labels",
        ),
        *("five frequencies", "restricted loss", "excluded loss", "Gini", "last step"),
    )
    return Table(caption, columns, tuple(rows), (1, 3, 4, 5, 6, 12, 13))
