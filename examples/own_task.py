"""A task and a measure of one's own in the trainer of the experiments, with its folders.

The task is the sum of two squares modulo 23. The measure is the share of the test pairs that get the most frequent
answer: it tells what happens where the accuracy falls for a moment. Prints what became of each seed; draws test
accuracy, entropy and the measure over the training. What was stopped goes on when it is started again, and `fastent
runs`, `watch` and `report` read the folder. It takes half a minute on one core. It needs the extra train:
pip install '.[train]'.

    python examples/own_task.py --picture docs/figures/examples/own_task.png
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

import fastent
from fastent.grokking.train import Moment, Task, TrainConfig, task_of_table, train


def squares(config: TrainConfig) -> Task:
    """Tabulate a^2 + b^2 for all residues a and b."""
    squared = np.arange(config.modulus) ** 2
    return task_of_table("squares", (squared[:, None] + squared) % config.modulus, config)


def favourite(moment: Moment) -> dict[str, torch.Tensor]:
    """Share of the test pairs that get the most frequent answer, for each seed."""
    answers = moment.logits("test").argmax(-1)
    return {"favourite": torch.stack([each.bincount().max() / each.numel() for each in answers])}


def main(arguments: Sequence[str] | None = None) -> None:
    """Train three seeds and draw them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--out", type=Path, default=Path("runs/squares"), help="folder for the runs")
    parser.add_argument("--picture", type=Path, default=Path("own_task.png"))
    options = parser.parse_args(arguments)

    folders = train(
        squares, measures=[favourite], out=options.out, max_steps=options.steps, modulus=23, train_fraction=0.6,
        readout="mean", width=32, feedforward=128, batch_size=256, evaluate_every=50,
    )  # fmt: skip

    figure = Figure(figsize=(8, 3.5), layout="constrained")
    ax = figure.subplots()
    for seed, folder in enumerate(folders):
        tables = fastent.load_runs(folder)
        rows = tables.rows.values
        for column, style in (("test_accuracy", "-"), ("entropy", "--"), ("favourite", ":")):
            ax.plot(rows["step"], rows[column], f"C{seed}{style}", label=column if seed == 0 else None)
        (t_mem,), (t_grok,) = tables.runs.values["t_mem"], tables.runs.values["t_grok"]
        print(f"seed {seed}: knows its pairs at step {t_mem}, new ones at step {t_grok}")
    ax.set(xlabel="training step", ylabel="share; entropy H", ylim=(0, 1))
    ax.legend()
    figure.savefig(options.picture, dpi=120)


if __name__ == "__main__":
    main()
