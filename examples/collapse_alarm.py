"""An alarm at the collapse of the entropy, in a run that comes to generalise and in one that does not.

A network learns addition modulo 31 from six in ten of all pairs. With weight decay it groks: the entropy of its second
hidden layer falls, the alarm goes off, and new pairs are solved. Without, it knows its own pairs by heart; the entropy
stays, and the alarm is silent. Prints the alarms and what was solved; draws both runs, with a diamond at the alarm. It
takes a quarter of a minute on one core. It needs matplotlib.

    python examples/collapse_alarm.py --picture docs/figures/examples/collapse_alarm.png
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn

import fastent

P, TRAINED = 31, 576


def train(weight_decay: float, steps: int, since: int) -> tuple[fastent.SpectralEntropyMonitor, float]:
    """Train one network; return its monitor and the share of new pairs that it solves."""
    torch.manual_seed(0)
    pairs = torch.cartesian_prod(torch.arange(P), torch.arange(P))[torch.randperm(P * P)]
    x = nn.functional.one_hot(pairs + torch.tensor([0, P]), 2 * P).sum(1).float()
    y = pairs.sum(1) % P
    model = nn.Sequential(nn.Linear(2 * P, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, P))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.002, weight_decay=weight_decay)
    monitor = fastent.SpectralEntropyMonitor(
        model, x, "3", every=20,
        collapse=fastent.Collapse(fall=0.05, within=800, since=since),
        on_collapse=lambda record: print(f"weight decay {weight_decay}: collapse at step {record.step}"),
    )  # fmt: skip
    with monitor:
        for step in range(steps + 1):
            loss = nn.functional.cross_entropy(model(x[:TRAINED]), y[:TRAINED])
            monitor.step(step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    solved = (model(x).argmax(1) == y).float()
    print(
        f"weight decay {weight_decay}: after {steps} steps {solved[:TRAINED].mean():.0%} of its own pairs are "
        f"solved, {solved[TRAINED:].mean():.0%} of the new ones; collapsed at {monitor.collapsed or 'no step'}"
    )
    return monitor, solved[TRAINED:].mean().item()


def main(arguments: Sequence[str] | None = None) -> dict[float, fastent.SpectralEntropyMonitor]:
    """Train both, draw them, and return their monitors by weight decay."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--since", type=int, default=200, help="step at which the training pairs are known")
    parser.add_argument("--picture", type=Path, default=Path("collapse_alarm.png"))
    options = parser.parse_args(arguments)
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    monitors = {}
    for weight_decay, ax in zip((2.0, 0.0), figure.subplots(1, 2, sharey=True), strict=True):
        monitors[weight_decay], solved = train(weight_decay, options.steps, options.since)
        monitors[weight_decay].plot("lines", ax=ax)
        ax.set_title(f"weight decay {weight_decay}: {solved:.0%} of new pairs solved")
    figure.savefig(options.picture, dpi=120)
    return monitors


if __name__ == "__main__":
    main()
