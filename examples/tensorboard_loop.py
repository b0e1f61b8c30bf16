"""The monitor in a training loop of one's own, its records in TensorBoard beside the loss.

Writes events to the folder runs/tensorboard; `tensorboard --logdir runs` shows them. It takes a few seconds. It needs
tensorboard.

    python examples/tensorboard_loop.py --steps 2000
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import fastent
from fastent.integrations.loggers import log_to


def main(arguments: Sequence[str] | None = None) -> None:
    """Train a network to tell the sign of a product, and log it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--every", type=int, default=50, help="steps between two evaluations of the entropy")
    parser.add_argument("--folder", type=Path, default=Path("runs/tensorboard"))
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    probe = torch.randn(512, 10)

    with (
        SummaryWriter(options.folder) as writer,
        fastent.SpectralEntropyMonitor(
            model, probe, ["1", "3"], every=options.every, on_record=log_to(writer)
        ) as monitor,
    ):
        for step in range(options.steps + 1):
            x = torch.randn(128, 10)
            loss = nn.functional.cross_entropy(model(x), (x[:, 0] * x[:, 1] > 0).long())
            monitor.step(step)  # logs entropy/1 and entropy/3 at each step that is due
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % options.every == 0:
                writer.add_scalar("loss", loss, step)


if __name__ == "__main__":
    main()
